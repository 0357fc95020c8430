//! The command line: arguments in, typed options out.
//!
//! What is wrong with an argument by itself is refused here, with exit code 2; whether a process exists is not asked here.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, ColorChoice, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};

use crate::event::Cause;

use crate::filter;

const EXAMPLES: &str = "\
Examples:
  sudo tracer run                      one line for each TCP connection that closes
  sudo tracer run --demo               the same, with something to see at once
  sudo tracer run --pid 1234           only that process and its descendants
  sudo tracer run --port 8080 --json   as JSON, one object a line
  sudo tracer run --final time_wait --peer 10.0.0.0/8
                                       only what leaves TIME_WAIT, of connections with that network
  sudo tracer snapshot                 the sockets now, and which destinations run out of ports
  sudo tracer run --record today.rec   and keep it
  tracer report today.rec              print it again, on any machine, without root
  sudo tracer run --every 10s          every ten seconds: who closes most, why, and what to change
  sudo tracer doctor                   what this host has and lacks for it, and how to mend that

Exit codes:
  0  ended: by a signal, after --duration, or because stdout was closed
  1  failed while running
  2  bad usage; also a filter that can match nothing, such as a process id that does not exist
  3  not enough privileges
  4  the kernel lacks something that is needed: it is too old, or was built without
  5  the kernel has no BTF
  6  no cgroup-v2 hierarchy could be used
  7  the kernel refused for its security policy (lockdown, seccomp, a security module)
  8  a recording is incomplete: it could not be written, or read, to its end
  9  only with doctor --strict: it works, but degraded
  10 only with run --strict: closes were lost, or not seen";

const SNAPSHOT: &str = "\
Examples:
  sudo tracer snapshot             the sockets now, and which destinations run out of ports
  sudo tracer snapshot --json      the same as one JSON object

Exit codes:
  0  printed
  1  failed, or stdout could not be written
  2  bad usage
  4  the kernel lacks sock_diag for TCP
  7  the kernel refused for its security policy";

const DOCTOR: &str = "\
Examples:
  sudo tracer doctor               what works, what is degraded, what is missing, and how to mend it
  sudo tracer doctor --json        the same as one JSON object
  sudo tracer doctor --strict      for scripts: exit code 9 if it works, but degraded

Exit codes:
  0  it works, or works degraded
  1  failed, or stdout could not be written
  2  bad usage
  3  not enough privileges
  4  the kernel lacks something that is needed
  5  the kernel has no BTF
  6  no cgroup-v2 hierarchy could be used
  7  the kernel refused for its security policy
  9  with --strict: it works, but degraded";

const REPORT: &str = "\
Examples:
  tracer report today.rec                          what was printed
  tracer report today.rec --summary-only           who closed most, why, and what to change
  tracer report today.rec --port 8080 --json       some of it, as JSON
  tracer report today.rec --html today.html        one page to attach to an incident

Exit codes:
  0  printed
  1  it is no recording, or a newer tracer made it, or stdout could not be written
  2  bad usage
  8  the recording is incomplete: it could not be read to its end";

const EXPLAIN: &str = "\
Examples:
  tracer explain request_close     what it means, how to confirm it by hand, and what to change
  tracer explain | less            all causes

Exit codes:
  0  printed
  1  stdout could not be written
  2  bad usage; also a cause that does not exist";

const COMPLETIONS: &str = "\
Examples:
  tracer completions bash > /usr/share/bash-completion/completions/tracer
  tracer completions zsh > /usr/local/share/zsh/site-functions/_tracer

Exit codes:
  0  printed
  1  stdout could not be written
  2  bad usage";

const MAN: &str = "\
Examples:
  tracer man | man -l -
  tracer man > /usr/local/share/man/man1/tracer.1

Exit codes:
  0  printed
  1  stdout could not be written
  2  bad usage";

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

impl From<Color> for ColorChoice {
    fn from(color: Color) -> Self {
        match color {
            Color::Auto => Self::Auto,
            Color::Always => Self::Always,
            Color::Never => Self::Never,
        }
    }
}

/// Parses the arguments of this process. Where they ask for help, or are refused, it prints that, coloured as they say, and
/// ends the process.
pub fn parse() -> Cli {
    let color = color_choice(std::env::args_os());
    let mut matches = Cli::command().color(color).get_matches();
    Cli::from_arg_matches_mut(&mut matches)
        .unwrap_or_else(|error| error.format(&mut Cli::command().color(color)).exit())
}

/// What `--color` says. The parser prints its help while it parses, so it must know this before. It refuses `--color` as
/// the value of another option, so what looks like the option is it.
fn color_choice(args: impl Iterator<Item = OsString>) -> ColorChoice {
    let mut args = args.skip(1).take_while(|arg| arg != "--");
    let mut found = None;
    while let (None, Some(arg)) = (&found, args.next()) {
        found = match arg.to_str().and_then(|arg| arg.strip_prefix("--color")) {
            Some("") => args.next(),
            Some(value) => value.strip_prefix('=').map(Into::into),
            None => None,
        };
    }
    found.and_then(|value| Color::from_str(value.to_str()?, false).ok()).map_or(ColorChoice::Auto, Into::into)
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trace, and print one line for each connection that closes
    Run(Run),
    /// Show the sockets in TIME_WAIT, FIN_WAIT2, CLOSE_WAIT and ESTABLISHED now, and which destinations run out of ports
    #[command(after_help = SNAPSHOT)]
    Snapshot(Snapshot),
    /// Print what a recording holds (tracer run --record), or make a page of it
    #[command(after_help = REPORT)]
    Report(Report),
    /// Explain a cause: what it means, how to confirm it by hand, and what to change in common servers and clients
    #[command(after_help = EXPLAIN)]
    Explain {
        /// The cause, as the output names it; without it all are explained
        cause: Option<Cause>,
    },
    /// Print a completion script for a shell
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the man pages
    #[command(after_help = MAN)]
    Man,
    /// Find out what this host has and lacks for tracing, and how to mend that; each hook is tried
    #[command(after_help = DOCTOR)]
    Doctor(Doctor),
    /// The process that keeps what privileges are needed while tracing
    #[command(hide = true)]
    Broker {
        /// As `tracer run --no-sandbox`
        #[arg(long)]
        no_sandbox: bool,
    },
    /// The process that runs the command of `--exec`
    #[command(hide = true)]
    Launcher {
        /// For `sh -c`
        command: String,
    },
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
#[derive(Args, Clone, Debug, PartialEq)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("alert").multiple(true))]
pub struct Run {
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// Print each change of a connection's state as well
    #[arg(long)]
    pub states: bool,
    /// What to report.
    #[command(flatten)]
    pub filter: Box<filter::Args>,
    /// End after this time: 10s, 500ms, 1m, 1h, or a number of seconds
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
    /// Report a connection that its process has not closed so long after its peer did
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    pub close_wait_after: Duration,
    /// Room for records that have not been read yet: 64K to 1G, a power of two. 4M hold about 11,000; what finds no room is
    /// lost, and counted. (180,000 more wait in tracer's own memory where it is they that are too many, and not stdout that is
    /// too slow.)
    #[arg(long, value_name = "BYTES", value_parser = ring_size, default_value = "4M")]
    pub ring_size: u32,
    /// Room for sockets that are young, or not idle: a power of two up to 1048576, of 512 bytes each. What finds none costs more.
    /// [default: 8192 for each processor, from 32768 to 131072]
    #[arg(long, value_name = "NUMBER", value_parser = slots)]
    pub slots: Option<u32>,
    /// Exit with code 10 if a close was lost or not seen, or the counts in the summary do not agree
    #[arg(long)]
    pub strict: bool,
    /// Print a summary this often, of what was added since the one before. SIGUSR1 asks for one at any time
    #[arg(long, value_name = "TIME", value_parser = at_least_a_second)]
    pub every: Option<Duration>,
    /// No line for each connection: summaries, alerts and losses only
    #[arg(long)]
    pub summary_only: bool,
    /// Alert at so many sockets in TIME_WAIT in the network namespace of tracer, whoever made them (say 300)
    #[arg(long, value_name = "N", group = "alert", value_parser = clap::value_parser!(u64).range(1..))]
    pub alert_time_wait: Option<u64>,
    /// Alert when so many TIME_WAIT a second are seen made, over ten seconds; the filters hold
    #[arg(long, value_name = "RATE", group = "alert", value_parser = rate)]
    pub alert_rate: Option<f64>,
    /// For each alert, run this with sh -c, with the summary as JSON on its stdin; one at a time, without capabilities
    #[arg(long, value_name = "COMMAND", requires = "alert")]
    pub exec: Option<String>,
    /// Show the query string of targets, too; it may hold secrets
    #[arg(long)]
    pub full_target: bool,
    /// Do without Landlock and seccomp; privileges are given up all the same
    #[arg(long)]
    pub no_sandbox: bool,
    /// Start a small HTTP server, and a client that sends "Connection: close" once a second, to have something to see
    #[arg(long)]
    pub demo: bool,
    /// Record all that is printed to this file, for `tracer report`; only its owner can read it
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Replace the file of --record if it exists
    #[arg(long, requires = "record")]
    pub overwrite: bool,
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
pub struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Exit with code 9 where tracing would work, but degraded
    #[arg(long)]
    pub strict: bool,
}

impl Run {
    /// The filters as on the command line, for the `start` event.
    pub fn filters(&self) -> Vec<String> {
        self.filter.shown()
    }
}

/// `tracer report`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The recording
    #[arg(value_name = "FILE")]
    pub recording: PathBuf,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// No line for each connection: the summary, alerts and losses only
    #[arg(long, conflicts_with = "html")]
    pub summary_only: bool,
    /// Write one page to this file instead, which needs nothing beside it; only its owner can read it
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub html: Option<PathBuf>,
    /// Replace the file of --html if it exists
    #[arg(long, requires = "html")]
    pub overwrite: bool,
    /// What of it is reported.
    #[command(flatten)]
    pub filter: Box<filter::Args>,
}

/// The name of a process as the kernel keeps it: at most 15 bytes, padded with NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comm(pub [u8; 16]);

impl Comm {
    // By value, as the parser gives it.
    #[expect(clippy::needless_pass_by_value, reason = "the signature that clap asks for")]
    pub(crate) fn new(name: OsString) -> Result<Self, &'static str> {
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

/// A power of two.
fn slots(text: &str) -> Result<u32, String> {
    let number = text.parse::<u32>().ok();
    number
        .filter(|number| number.is_power_of_two() && *number <= 1 << 20)
        .ok_or_else(|| "expected a power of two from 1 to 1048576, such as 32768".to_owned())
}

/// A number with an optional fraction and an optional unit.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
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

fn at_least_a_second(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time < Duration::from_secs(1) { Err("it must be at least 1s".to_owned()) } else { Ok(time) }
}

fn rate(text: &str) -> Result<f64, &'static str> {
    let rate: f64 = text.parse().map_err(|_| "expected a number such as 5 or 0.5")?;
    if rate.is_finite() && rate > 0.0 { Ok(rate) } else { Err("it must be more than 0") }
}

#[cfg(test)]
mod tests {
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
            "--every",
            "10s",
            "--summary-only",
            "--alert-time-wait",
            "300",
            "--alert-rate",
            "2.5",
            "--exec",
            "cat",
            "--full-target",
            "--demo",
        ])
        .expect("options");
        assert!(run.json && run.states && run.full_target && run.demo && run.summary_only);
        assert_eq!(run.duration, Some(Duration::from_secs(10)));
        assert_eq!(run.close_wait_after, Duration::from_secs(5));
        assert_eq!((run.every, run.alert_time_wait), (Some(Duration::from_secs(10)), Some(300)));
        assert_eq!((run.alert_rate, run.exec.as_deref()), (Some(2.5), Some("cat")));
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
    fn a_report() {
        let parsed = |args: &[&str]| match Cli::try_parse_from(["tracer", "report"].iter().chain(args))?.command {
            Command::Report(report) => Ok::<_, clap::Error>(report),
            other => panic!("{other:?}"),
        };
        let report = parsed(&["a.rec", "--port", "80", "--comm", "a-very-long-name-of-a-process", "--html", "a.html"]);
        let args = report.expect("options").filter;
        let filter = args.on_record().expect("it can match");
        assert_eq!((filter.ports, filter.comms), (vec![80], vec!["a-very-long-nam".to_owned()]));
        assert_eq!(args.shown(), ["--port 80", "--comm a-very-long-nam"]);
        let refused: [&[&str]; 5] = [
            &[],
            &["a.rec", "b.rec"],
            &["a.rec", "--json", "--html", "b"],
            &["a.rec", "--summary-only", "--html", "b"],
            &["a.rec", "--overwrite"],
        ];
        for args in refused {
            assert_eq!(parsed(args).expect_err("refused").exit_code(), 2, "{args:?}");
        }
        assert_eq!(run(&["--overwrite"]).expect_err("refused").exit_code(), 2);
        assert!(run(&["--record", "a.rec", "--overwrite"]).expect("options").overwrite);
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
    fn colour_is_known_before_the_rest() {
        let choice = |args: &str| color_choice(args.split(' ').map(OsString::from));
        for (args, expected) in [
            ("tracer run", ColorChoice::Auto),
            ("tracer --color never --help", ColorChoice::Never),
            ("tracer run --color=always --nonsense", ColorChoice::Always),
            ("tracer --color sometimes", ColorChoice::Auto),
            ("tracer run --color", ColorChoice::Auto),
            ("tracer run --colored never", ColorChoice::Auto),
            ("tracer run -- --color never", ColorChoice::Auto),
            ("--color never tracer", ColorChoice::Auto),
        ] {
            assert_eq!(choice(args), expected, "{args}");
        }
    }

    #[test]
    fn a_cause_to_explain() {
        let parsed = |args: &[&str]| match Cli::try_parse_from(["tracer", "explain"].iter().chain(args))?.command {
            Command::Explain { cause } => Ok::<_, clap::Error>(cause),
            other => panic!("{other:?}"),
        };
        assert_eq!(parsed(&[]).expect("options"), None);
        assert_eq!(parsed(&["reset_by_peer"]).expect("options"), Some(Cause::ResetByPeer));
        for args in [&["reset-by-peer"][..], &["Timeout"], &[""], &["h2", "tls"]] {
            assert_eq!(parsed(args).expect_err("refused").exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn out_of_range_is_refused() {
        let cases: [&[&str]; 22] = [
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
            &["--every", "0.9s"],
            &["--every", "500ms"],
            &["--alert-time-wait", "0"],
            &["--alert-rate", "0"],
            &["--alert-rate", "-1"],
            &["--alert-rate", "nan"],
            &["--alert-rate", "inf"],
            // Without an alert it would never run.
            &["--exec", "cat"],
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
    fn numbers_of_slots() {
        assert_eq!(run(&[]).expect("options").slots, None);
        assert_eq!(run(&["--slots", "65536"]).expect("options").slots, Some(1 << 16));
        assert_eq!(slots("1"), Ok(1));
        assert_eq!(slots("1048576"), Ok(1 << 20));
        for text in ["", "0", "3", "2097152", "-4", "4K", "4294967296"] {
            assert!(slots(text).is_err(), "{text}");
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
