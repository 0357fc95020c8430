//! `cargo xtask soak`: does tracer stay as it is under a load that goes on and on?
//!
//! A mixed load at a bounded rate runs in network namespaces of its own, and tracer traces its ports. What comes in: for how
//! long. What goes out: a table of samples (resident memory of tracer and of its broker, descriptors, threads, maps, CPU
//! time, records), and a verdict. Flat is: after the warm-up resident memory grows by less than a megabyte, nothing is lost,
//! no record is missing but of ends that the kernel hid, and at rest everything is as before. It changes nothing outside its
//! namespaces.

mod load;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use self::load::Load;
use crate::bench::measure::{Maps, Usage, number};
use crate::hidden::{self, Hidden};
use crate::workspace;

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// For how long
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=24 * 60))]
    minutes: u32,
    /// Connections a second
    #[arg(long, default_value_t = 150, value_parser = clap::value_parser!(u32).range(10..=1_000))]
    rate: u32,
    /// This tracer, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// How much resident memory may grow after the warm-up, in bytes.
const GROWTH: u64 = 1_000_000;
/// How many of the ends whose other one is missing are listed.
const LISTED: usize = 20;
/// Rows of the table, about.
const SAMPLES: u32 = 60;
/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// The warm-up: a quarter of a short run, five minutes of a long one.
fn warm_up(whole: Duration) -> Duration {
    (whole / 4).min(Duration::from_secs(300))
}

pub(crate) fn soak(options: &Options) -> Result<()> {
    if !workspace::is_root() {
        let mut command = Command::new("sudo");
        return workspace::succeed(command.arg("-E").arg(std::env::current_exe()?).args(std::env::args_os().skip(1)));
    }
    workspace::install("the soak", &load::NEEDED)?;
    let binary = if let Some(binary) = &options.binary {
        binary.clone()
    } else {
        workspace::succeed(workspace::cargo().args(["build", "--release", "--package", "tracer"]))?;
        workspace::target_dir().join("release/tracer")
    };
    let directory = tempfile::Builder::new().prefix("tracer-soak-").tempdir()?;
    let mut load = Load::prepare(directory.path())?;
    let mut hidden = Hidden::watch(load::SERVER..=load::OWN)?;
    let mut unseen = Unseen::default();
    let tracer = Tracer::start(&binary)?;
    let before = tracer.at_rest(|_| true)?;

    let whole = Duration::from_secs(60 * u64::from(options.minutes));
    let warm = warm_up(whole);
    println!("{} min at {} connections/s; warm-up {} s\n\n{HEADINGS}", options.minutes, options.rate, warm.as_secs());
    let began = Instant::now();
    load.begin(options.rate)?;
    let period = (whole / SAMPLES).max(Duration::from_secs(5));
    let mut samples: Vec<Sample> = Vec::new();
    let mut next = began + period;
    while began.elapsed() < whole {
        std::thread::sleep(Duration::from_millis(200).min(next.saturating_duration_since(Instant::now())));
        load.check()?;
        unseen.add(hidden.take()?);
        if Instant::now() >= next {
            next += period;
            let sample = tracer.sample(began)?;
            println!("{}", sample.row(samples.last().unwrap_or(&before)));
            std::io::stdout().flush()?;
            samples.push(sample);
        }
    }
    let made = load.end()?;
    unseen.add(hidden.take()?);
    // Descriptors of namespaces, and what is held back until it is decided.
    let after = tracer.at_rest(|held| held == before.held)?;
    let seen = tracer.stop()?;
    let judged: Vec<_> = samples.iter().filter(|sample| sample.at >= warm).collect();
    let verdict = Verdict::of(&judged, &before, &after, made, &seen, unseen.count)?;
    println!("\n{}", verdict.text());
    // The one that is missing has the same addresses, the other way round.
    let missing = seen.alone.0.iter().map(|((_, local, remote), line)| (unseen.remove(remote, local), line));
    let mut missing: Vec<_> = missing.collect();
    missing.sort();
    for (hidden, line) in missing.into_iter().take(LISTED) {
        let why = if hidden { "the kernel hid it" } else { "the kernel did NOT hide it" };
        println!("its other end has no record, {why}: {line}");
    }
    if verdict.is_flat() { Ok(()) } else { bail!("it is not flat") }
}

const HEADINGS: &str = "\
      at    closes  lost  tracer KiB  anon KiB  broker KiB  fds  threads  maps  maps KiB  CPU %  broker %
--------  --------  ----  ----------  --------  ----------  ---  -------  ----  --------  -----  --------";

/// What the kernel holds for tracer and its broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    /// Descriptors of tracer, of the broker.
    files: [usize; 2],
    /// The same for threads.
    threads: [u64; 2],
    maps: usize,
}

/// What was seen at one moment.
#[derive(Clone, Debug)]
struct Sample {
    /// Since the load began.
    at: Duration,
    closes: u64,
    lost: u64,
    /// Resident memory of tracer, of the broker, in bytes.
    resident: [u64; 2],
    /// Of it in tracer: what is no file's.
    anonymous: u64,
    held: Held,
    maps_bytes: u64,
    /// Of tracer, of the broker, since they began.
    cpu_ns: [u64; 2],
}

impl Sample {
    fn row(&self, before: &Self) -> String {
        let seconds = self.at.as_secs();
        let clock = format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        let elapsed_ns = self.at.saturating_sub(before.at).as_nanos().max(1) as f64;
        let cpu = |n: usize| (self.cpu_ns[n].saturating_sub(before.cpu_ns[n])) as f64 / elapsed_ns * 100.0;
        format!(
            "{clock:>8}  {:>8}  {:>4}  {:>10}  {:>8}  {:>10}  {:>3}  {:>7}  {:>4}  {:>8}  {:>5.2}  {:>8.2}",
            self.closes,
            self.lost,
            self.resident[0] >> 10,
            self.anonymous >> 10,
            self.resident[1] >> 10,
            self.held.files.iter().sum::<usize>(),
            self.held.threads.iter().sum::<u64>(),
            self.held.maps,
            self.maps_bytes >> 10,
            cpu(0),
            cpu(1),
        )
    }
}

/// An end of a connection: network namespace, local and remote address.
type Address = (u64, String, String);

/// Ends whose other end has not come yet, with their lines: a record that is missing shows by its twin.
#[derive(Debug, Default)]
struct Ends(BTreeMap<Address, String>);

impl Ends {
    fn add(&mut self, line: &str) -> Result<()> {
        let event: Value = serde_json::from_str(line).context("a line of tracer's")?;
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let (netns, local, remote) = (event["netns"].as_u64().unwrap_or(0), text("local"), text("remote"));
        if self.0.remove(&(netns, remote.clone(), local.clone())).is_none() {
            self.0.insert((netns, local, remote), line.trim_end().to_owned());
        }
        Ok(())
    }
}

/// Ends that the kernel showed to no BPF program.
#[derive(Debug, Default)]
struct Unseen {
    count: u64,
    /// Local and remote addresses of the first of them, to tell which of the missing ones they are.
    ends: Vec<(SocketAddr, SocketAddr)>,
}

impl Unseen {
    /// More than any run may have.
    const KEPT: usize = 10_000;

    fn add(&mut self, ends: Vec<(SocketAddr, SocketAddr)>) {
        self.count += ends.len() as u64;
        self.ends.extend(ends.into_iter().take(Self::KEPT - self.ends.len()));
    }

    /// Whether one of them has these addresses; it is not counted for another missing one then.
    fn remove(&mut self, local: &str, remote: &str) -> bool {
        let (Ok(local), Ok(remote)) = (local.parse::<SocketAddr>(), remote.parse::<SocketAddr>()) else { return false };
        let found = self.ends.iter().position(|ends| *ends == (local, remote));
        found.map(|at| self.ends.swap_remove(at)).is_some()
    }
}

/// What tracer printed so far.
#[derive(Default)]
struct Printed {
    closes: AtomicU64,
    lost: AtomicU64,
    lines: AtomicU64,
}

/// A tracer that runs.
struct Tracer {
    child: Child,
    broker: u32,
    printed: Arc<Printed>,
    /// Ends with the last line.
    reader: Option<JoinHandle<Result<(String, Ends)>>>,
}

/// What tracer says at its end.
struct Seen {
    closes: u64,
    /// Records, and sockets that could not be followed.
    lost: u64,
    alone: Ends,
}

impl Tracer {
    fn start(binary: &Path) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(binary);
        command.args(["run", "--json", "--every", "10s", "--close-wait-after", "1s"]);
        for port in [load::SERVER, load::OWN] {
            command.args(["--port", &port.to_string()]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run tracer")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let printed = Arc::<Printed>::default();
        let reader = std::thread::Builder::new().spawn({
            let printed = Arc::clone(&printed);
            move || read(stdout, &printed)
        })?;
        let mut tracer = Self { child, broker: 0, printed, reader: Some(reader) };
        let deadline = Instant::now() + PATIENCE;
        while tracer.printed.lines.load(Ordering::Relaxed) == 0 {
            if let Some(status) = tracer.child.try_wait()? {
                bail!("tracer: {status}");
            }
            if Instant::now() > deadline {
                bail!("tracer does not begin");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let pid = tracer.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        tracer.broker = children.trim().parse().context("tracer has another number of children than one")?;
        Ok(tracer)
    }

    fn held(&self) -> Result<Held> {
        let pids = [self.child.id(), self.broker];
        let files = pids.map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count));
        let [files, broker_files] = files;
        let threads = |pid| number(&status(pid)?, "Threads").with_context(|| format!("process {pid} has no threads"));
        Ok(Held {
            files: [files?, broker_files?],
            threads: [threads(pids[0])?, threads(pids[1])?],
            maps: Maps::of(pids[0])?.count,
        })
    }

    fn sample(&self, began: Instant) -> Result<Sample> {
        let (pid, broker) = (self.child.id(), self.broker);
        let bytes = |pid, name| -> Result<u64> {
            Ok(number(&status(pid)?, name).with_context(|| format!("no {name} of process {pid}"))? << 10)
        };
        Ok(Sample {
            at: began.elapsed(),
            closes: self.printed.closes.load(Ordering::Relaxed),
            lost: self.printed.lost.load(Ordering::Relaxed),
            resident: [bytes(pid, "VmRSS")?, bytes(broker, "VmRSS")?],
            anonymous: bytes(pid, "RssAnon")?,
            held: self.held()?,
            maps_bytes: Maps::of(pid)?.bytes,
            cpu_ns: [Usage::of(pid)?.cpu_ns, Usage::of(broker)?.cpu_ns],
        })
    }

    /// A sample without load: when it holds what is expected, or else after a time in which it should.
    fn at_rest(&self, expected: impl Fn(Held) -> bool) -> Result<Sample> {
        let deadline = Instant::now() + Duration::from_secs(5);
        std::thread::sleep(Duration::from_millis(500));
        while !expected(self.held()?) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut sample = self.sample(Instant::now())?;
        sample.at = Duration::ZERO;
        Ok(sample)
    }

    fn stop(mut self) -> Result<Seen> {
        kill_process(Pid::from_child(&self.child), Signal::INT)?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                bail!("tracer does not end");
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        if !status.success() {
            bail!("tracer: {status}");
        }
        let reader = self.reader.take().context("it is read once")?;
        let (last, alone) = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
        let summary: Value = serde_json::from_str(&last).context("tracer's last line")?;
        let field = |name: &str| summary[name].as_u64().with_context(|| format!("tracer's summary has no {name}"));
        Ok(Seen { closes: field("closes")?, lost: field("lost")? + field("untracked")?, alone })
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn status(pid: u32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} has ended"))
}

/// Counts what tracer prints; returns the last line, and the ends that came alone.
fn read(stdout: ChildStdout, printed: &Printed) -> Result<(String, Ends)> {
    let mut stdout = BufReader::new(stdout);
    let mut ends = Ends::default();
    let (mut line, mut last) = (String::new(), String::new());
    while stdout.read_line(&mut line)? > 0 {
        if line.starts_with(r#"{"type":"close","#) {
            printed.closes.fetch_add(1, Ordering::Relaxed);
            ends.add(&line)?;
        } else if line.starts_with(r#"{"type":"lost","#) {
            let event: Value = serde_json::from_str(&line).context("a line of tracer's")?;
            printed.lost.fetch_add(event["records"].as_u64().unwrap_or(0), Ordering::Relaxed);
        }
        printed.lines.fetch_add(1, Ordering::Relaxed);
        std::mem::swap(&mut line, &mut last);
        line.clear();
    }
    Ok((last, ends))
}

/// What it comes to.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    /// The most after the warm-up, above what it was at its end: tracer, broker, in bytes.
    growth: [u64; 2],
    lost: u64,
    /// Two for each connection.
    expected: u64,
    closes: u64,
    /// Ends that the kernel showed to no BPF program.
    hidden: u64,
    before: Held,
    after: Held,
}

impl Verdict {
    fn of(judged: &[&Sample], before: &Sample, after: &Sample, made: u64, seen: &Seen, hidden: u64) -> Result<Self> {
        let first = judged.first().context("no sample after the warm-up")?;
        let growth = [0, 1].map(|n| {
            let most = judged.iter().map(|sample| sample.resident[n]).max().unwrap_or(0);
            most.saturating_sub(first.resident[n])
        });
        let expected = 2 * made;
        let (closes, lost) = (seen.closes, seen.lost);
        Ok(Self { growth, lost, expected, closes, hidden, before: before.held, after: after.held })
    }

    fn is_flat(&self) -> bool {
        self.growth.iter().all(|growth| *growth < GROWTH)
            && self.lost == 0
            && self.closes <= self.expected
            && self.expected <= self.closes + self.hidden
            && self.hidden * hidden::ONE_OF <= self.expected
            && self.before == self.after
    }

    fn text(&self) -> String {
        let [tracer, broker] = self.growth.map(|bytes| bytes as f64 / 1e6);
        format!(
            "resident memory after the warm-up grew by {tracer:.2} MB at most, the broker's by {broker:.2} MB \
             (limit: {:.2})\n{} records of {} ends, {} lost, {} hidden by the kernel\nat rest before: {}\nat rest after:  {}\n{}",
            GROWTH as f64 / 1e6,
            self.closes,
            self.expected,
            self.lost,
            self.hidden,
            self.before.text(),
            self.after.text(),
            if self.is_flat() { "flat" } else { "NOT flat" },
        )
    }
}

impl Held {
    fn text(&self) -> String {
        let [files, broker_files] = self.files;
        let [threads, broker_threads] = self.threads;
        format!(
            "{files} descriptors, {threads} threads, {} maps; broker: {broker_files} descriptors, {broker_threads} threads",
            self.maps
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELD: Held = Held { files: [20, 5], threads: [2, 1], maps: 12 };

    fn sample(resident: [u64; 2]) -> Sample {
        let (at, maps_bytes, cpu_ns) = (Duration::ZERO, 0, [0; 2]);
        Sample { at, closes: 0, lost: 0, resident, anonymous: 0, held: HELD, maps_bytes, cpu_ns }
    }

    fn seen(closes: u64) -> Seen {
        Seen { closes, lost: 0, alone: Ends::default() }
    }

    fn verdict(resident: &[[u64; 2]]) -> Verdict {
        let samples: Vec<_> = resident.iter().map(|resident| sample(*resident)).collect();
        let judged: Vec<_> = samples.iter().collect();
        let rest = sample([0; 2]);
        Verdict::of(&judged, &rest, &rest, 50, &seen(100), 0).expect("there are samples")
    }

    #[test]
    fn a_warm_up_is_a_quarter_and_five_minutes_at_most() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        assert_eq!([2, 20, 60].map(|whole| warm_up(minutes(whole)).as_secs()), [30, 300, 300]);
    }

    #[test]
    fn growth_is_the_most_above_the_first() {
        let flat = verdict(&[[9_000_000, 4_000_000], [9_999_999, 3_000_000], [9_000_000, 4_000_000]]);
        assert_eq!((flat.growth, flat.is_flat()), ([999_999, 0], true), "{}", flat.text());
        assert!(!verdict(&[[9_000_000, 0], [10_000_000, 0], [9_000_000, 0]]).is_flat());
        assert!(!verdict(&[[0, 3_000_000], [0, 4_000_000]]).is_flat());
    }

    #[test]
    fn an_end_without_its_twin_is_kept() {
        let close = |local: &str, remote: &str| format!(r#"{{"netns":7,"local":"{local}","remote":"{remote}"}}"#);
        let mut ends = Ends::default();
        for (local, remote) in [("a:1", "b:2"), ("c:1", "b:2"), ("b:2", "a:1")] {
            ends.add(&close(local, remote)).expect("JSON");
        }
        assert_eq!(ends.0.into_values().collect::<Vec<_>>(), [close("c:1", "b:2")]);
    }

    #[test]
    fn one_hidden_end_explains_one_that_is_missing() {
        let ends = ("127.0.0.1:1".parse().expect("an address"), "127.0.0.1:2".parse().expect("an address"));
        let mut unseen = Unseen::default();
        unseen.add(vec![ends]);
        assert!(!unseen.remove("127.0.0.1:2", "127.0.0.1:1"), "the other end");
        assert_eq!([0, 1].map(|_| unseen.remove("127.0.0.1:1", "127.0.0.1:2")), [true, false]);
        unseen.add(vec![ends; 2 * Unseen::KEPT]);
        assert_eq!((unseen.count, unseen.ends.len()), (2 * Unseen::KEPT as u64 + 1, Unseen::KEPT));
    }

    #[test]
    fn what_is_lost_missing_or_held_is_not_flat() {
        let flat = || verdict(&[[1, 1]]);
        assert!(flat().is_flat());
        assert!(!Verdict { lost: 1, ..flat() }.is_flat());
        assert!(!Verdict { closes: 99, ..flat() }.is_flat());
        let hidden = |closes, hidden| Verdict { closes, hidden, expected: 10_000, ..flat() }.is_flat();
        assert!(hidden(9_990, 10) && hidden(9_980, 20), "each that is missing was hidden");
        assert!(!hidden(9_989, 10), "one is missing that was not hidden");
        assert!(!hidden(9_979, 21), "so many are not believed");
        assert!(!Verdict { closes: 101, ..flat() }.is_flat());
        assert!(!Verdict { after: Held { files: [21, 5], ..HELD }, ..flat() }.is_flat());
        assert!(!Verdict { after: Held { threads: [2, 2], ..HELD }, ..flat() }.is_flat());
        let rest = sample([0; 2]);
        assert!(Verdict::of(&[], &rest, &rest, 0, &seen(0), 0).is_err());
    }
}
