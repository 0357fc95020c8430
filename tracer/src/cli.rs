//! The command line: arguments in, typed options out.
//!
//! What is wrong with an argument by itself is refused here, with exit code 2; whether a process exists is not asked here.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  sudo tracer run                      one line for each TCP connection that closes
  sudo tracer run --demo               the same, with something to see at once
  sudo tracer run --pid 1234           only that process and its descendants
  sudo tracer run --port 8080 --json   as JSON, one object a line
  sudo tracer snapshot                 the sockets now, and which destinations run out of ports
  sudo tracer doctor                   what this host has and lacks for it, and how to mend that

Exit codes:
  0  ended: by a signal, after --duration, or because stdout was closed
  1  failed while running
  2  bad usage; also a process id that does not exist
  3  not enough privileges
  4  the kernel lacks something that is needed: it is too old, or was built without
  5  the kernel has no BTF
  6  no cgroup-v2 hierarchy could be used
  7  the kernel refused for its security policy (lockdown, seccomp, a security module)
  8  only with doctor --strict: it works, but degraded";

const ABOUT: &str = "\
Shows who closed each TCP connection first, which process owns it, whether it left TIME_WAIT, and which HTTP Connection \
header was the reason";

/// `tracer`
#[derive(Debug, Parser)]
#[command(name = "tracer", version, about = ABOUT, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct Cli {
    /// When to colour
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// `--color`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl From<Color> for anstream::ColorChoice {
    fn from(color: Color) -> Self {
        match color {
            Color::Auto => Self::Auto,
            Color::Always => Self::Always,
            Color::Never => Self::Never,
        }
    }
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trace, and print one line for each connection that closes
    Run(Run),
    /// Show the sockets in TIME_WAIT, FIN_WAIT2, CLOSE_WAIT and ESTABLISHED now, and which destinations run out of ports
    Snapshot(Snapshot),
    /// Find out what this host has and lacks for tracing, and how to mend that; each hook is tried
    Doctor(Doctor),
    /// The server of `--demo`
    #[command(hide = true)]
    DemoServer,
    /// The client of `--demo`
    #[command(hide = true)]
    DemoClient {
        /// The server's port
        port: u16,
    },
}

/// `tracer run`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(after_help = EXAMPLES)]
pub struct Run {
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// Print each change of a connection's state as well
    #[arg(long)]
    pub states: bool,
    /// Only this process, its threads and its descendants; may be repeated
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    pub pid: Vec<u32>,
    /// Only connections with this local or remote port; may be repeated
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Vec<u16>,
    /// Only processes of this name; may be repeated. The kernel keeps 15 bytes of a name, so do we
    #[arg(long, value_name = "NAME", value_parser = OsStringValueParser::new().try_map(Comm::new))]
    pub comm: Vec<Comm>,
    /// End after this time: 10s, 500ms, 1m, 1h, or a number of seconds
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
    /// Report a connection that its process has not closed so long after its peer did
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    pub close_wait_after: Duration,
    /// Room for records that have not been read yet: 64K to 1G, a power of two. 4M hold about 11,000; what finds no room is
    /// lost, and counted
    #[arg(long, value_name = "BYTES", value_parser = ring_size, default_value = "4M")]
    pub ring_size: u32,
    /// Show the query string of targets, too; it may hold secrets
    #[arg(long)]
    pub full_target: bool,
    /// Start a small HTTP server, and a client that sends "Connection: close" once a second, to have something to see
    #[arg(long)]
    pub demo: bool,
}

/// `tracer snapshot`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `tracer doctor`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[command(after_help = EXAMPLES)]
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Exit with code 8 where tracing would work, but degraded
    #[arg(long)]
    pub strict: bool,
}

impl Run {
    /// The filters as on the command line, for the `start` event.
    pub fn filters(&self) -> Vec<String> {
        let pids = self.pid.iter().map(|pid| format!("--pid {pid}"));
        let ports = self.port.iter().map(|port| format!("--port {port}"));
        let comms = self.comm.iter().map(|comm| format!("--comm {comm}"));
        pids.chain(ports).chain(comms).collect()
    }
}

/// The name of a process as the kernel keeps it: at most 15 bytes, padded with NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comm(pub [u8; 16]);

impl Comm {
    // By value, as the parser gives it.
    #[expect(clippy::needless_pass_by_value, reason = "the signature that clap asks for")]
    fn new(name: OsString) -> Result<Self, &'static str> {
        let name = name.as_bytes();
        if name.is_empty() {
            return Err("a name cannot be empty");
        }
        let mut comm = [0; 16];
        let len = name.len().min(15);
        comm[..len].copy_from_slice(&name[..len]);
        Ok(Self(comm))
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        f.write_str(&String::from_utf8_lossy(name))
    }
}

/// A power of two, in bytes or with a unit.
fn ring_size(text: &str) -> Result<u32, String> {
    const EXPECTED: &str = "expected a power of two from 64K to 1G, such as 4M";
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches(['i', 'B']) {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(EXPECTED.to_owned()),
    };
    let bytes = number.parse::<u32>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes
        .filter(|bytes| bytes.is_power_of_two() && (1 << 16..=1 << 30).contains(bytes))
        .ok_or_else(|| EXPECTED.to_owned())
}

/// A number with an optional fraction and an optional unit.
fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = if unit.is_empty() { "s" } else { unit.trim_start() };
    let Some((_, unit_ms)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err("expected a time such as 10s, 500ms, 1m or 1h".to_owned());
    };
    let number: f64 = number.parse().map_err(|_| "expected a time such as 10s, 500ms, 1m or 1h".to_owned())?;
    #[expect(clippy::cast_precision_loss, reason = "at most 3,600,000")]
    let seconds = number * (*unit_ms as f64) / 1e3;
    if seconds > 1e9 {
        return Err("that is more than 30 years".to_owned());
    }
    if seconds < 1e-3 {
        return Err("it must be at least 1ms".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;

    fn run(args: &[&str]) -> Result<Run, clap::Error> {
        match Cli::try_parse_from(["tracer", "run"].iter().chain(args))?.command {
            Command::Run(run) => Ok(run),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn verify_cli() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_at_once() {
        let run = run(&[
            "--json",
            "--states",
            "--pid",
            "1",
            "--pid",
            "77",
            "--port",
            "80",
            "--port",
            "65535",
            "--comm",
            "nginx",
            "--duration",
            "10s",
            "--close-wait-after",
            "5s",
            "--full-target",
            "--demo",
        ])
        .expect("options");
        assert!(run.json && run.states && run.full_target && run.demo);
        assert_eq!(run.duration, Some(Duration::from_secs(10)));
        assert_eq!(run.close_wait_after, Duration::from_secs(5));
        assert_eq!(run.filters(), ["--pid 1", "--pid 77", "--port 80", "--port 65535", "--comm nginx"]);
    }

    #[test]
    fn snapshot() {
        for (args, json) in [(&["tracer", "snapshot"][..], false), (&["tracer", "snapshot", "--json"], true)] {
            match Cli::try_parse_from(args).expect("options").command {
                Command::Snapshot(snapshot) => assert_eq!(snapshot.json, json),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(Cli::try_parse_from(["tracer", "snapshot", "extra"]).expect_err("refused").exit_code(), 2);
    }

    #[test]
    fn doctor() {
        let cases =
            [(&["tracer", "doctor"][..], false, false), (&["tracer", "doctor", "--json", "--strict"], true, true)];
        for (args, json, strict) in cases {
            match Cli::try_parse_from(args).expect("options").command {
                Command::Doctor(doctor) => assert_eq!(doctor, Doctor { json, strict }),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn colour_is_global() {
        for args in [["tracer", "--color", "never", "run"], ["tracer", "run", "--color", "never"]] {
            assert_eq!(Cli::try_parse_from(args).expect("options").color, Color::Never);
        }
        assert_eq!(Cli::try_parse_from(["tracer", "run"]).expect("options").color, Color::Auto);
    }

    #[test]
    fn out_of_range_is_refused() {
        let cases: [&[&str]; 14] = [
            &["--port", "0"],
            &["--port", "65536"],
            &["--port", "-1"],
            &["--port", "http"],
            &["--pid", "0"],
            &["--pid", "-1"],
            &["--pid", "2147483648"],
            &["--pid", "x"],
            &["--comm", ""],
            &["--duration", "0"],
            &["--duration", "1d"],
            &["--duration", ""],
            &["--duration", "1e3"],
            &["extra"],
        ];
        for args in cases {
            let error = run(args).expect_err("refused");
            assert_eq!(error.exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn durations() {
        let cases = [
            ("10", 10_000),
            ("10s", 10_000),
            ("500ms", 500),
            ("1m", 60_000),
            ("2h", 7_200_000),
            ("1.5s", 1_500),
            ("0.25", 250),
            ("3 s", 3_000),
        ];
        for (text, ms) in cases {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", ".", "1..2", "-1s", "1x", "1 s s", "inf", "nan", "0", "0.0001", "99999999999h", "1s2"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ring_sizes() {
        assert_eq!(run(&[]).expect("options").ring_size, 4 << 20);
        for (text, bytes) in [("64K", 1 << 16), ("65536", 1 << 16), ("16M", 1 << 24), ("1GiB", 1 << 30)] {
            assert_eq!(ring_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "0", "32K", "3M", "2G", "4294967296", "99999999999", "4T", "-4M", "4 M"] {
            assert!(ring_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_cut_as_the_kernel_cuts_them() {
        assert_eq!(Comm::new("nginx".into()), Ok(Comm(*b"nginx\0\0\0\0\0\0\0\0\0\0\0")));
        assert_eq!(Comm::new("a-very-long-name-of-a-process".into()), Ok(Comm(*b"a-very-long-nam\0")));
    }

    #[test]
    fn help_lists_the_exit_codes() {
        let error = run(&["--help"]).expect_err("help");
        assert_eq!(error.kind(), ErrorKind::DisplayHelp);
        let help = error.to_string();
        assert!(help.contains("Exit codes:") && help.contains("Examples:"));
        assert!(help.lines().all(|line| line.len() <= 120));
    }
}
