//! Who is measured: tracer, its peers, and the floor. Started, watched, and ended in the same way.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::floor::Floor;
use super::measure::Usage;
use crate::bpf::Types;
use crate::network::Namespace;
use crate::workspace::{self, Program};

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Contender {
    /// Nothing at all: how far the machine's own unrest moves what is measured.
    Nothing,
    /// Empty programs on the hooks of tracer.
    Floor,
    Text,
    Json,
    Tcplife,
    Tcpstates,
    Bpftrace,
    Tcpdump,
}

impl Contender {
    pub(crate) const PEERS: [Self; 4] = [Self::Tcplife, Self::Tcpstates, Self::Bpftrace, Self::Tcpdump];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing (the control)",
            Self::Floor => "empty programs (the floor)",
            Self::Text => "tracer",
            Self::Json => "tracer --json",
            Self::Tcplife => "tcplife",
            Self::Tcpstates => "tcpstates",
            Self::Bpftrace => "bpftrace, transitions",
            Self::Tcpdump => "tcpdump -w",
        }
    }

    /// Whether it is a process of its own.
    pub(crate) const fn is_process(self) -> bool {
        !matches!(self, Self::Nothing | Self::Floor)
    }

    /// The program, and the Debian package that has it.
    pub(crate) const fn program(self) -> Option<Program> {
        match self {
            Self::Nothing | Self::Floor | Self::Text | Self::Json => None,
            Self::Tcplife => Some(("tcplife", "libbpf-tools")),
            Self::Tcpstates => Some(("tcpstates", "libbpf-tools")),
            Self::Bpftrace => Some(("bpftrace", "bpftrace")),
            Self::Tcpdump => Some(("tcpdump", "tcpdump")),
        }
    }
}

/// The same of each transition as what tcpstates prints.
const BPFTRACE: &str = "tracepoint:sock:inet_sock_set_state /args->protocol == 6/ { printf(\"%-6d %-16s %-6d %-6d %d %d\\n\", \
                        pid, comm, args->sport, args->dport, args->oldstate, args->newstate); }";

/// What is needed to start one.
pub(crate) struct Starter<'a> {
    pub(crate) tracer: &'a Path,
    /// Of the load.
    pub(crate) namespace: &'a Namespace,
    pub(crate) directory: &'a Path,
    pub(crate) types: &'a Types,
    /// Of tracer; none are known before its first start.
    pub(crate) hooks: Vec<String>,
}

/// How stdout is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Through a pipe, at once, counting lines and no more.
    Lines,
    /// The same, and how late each record of `tracer --json` comes.
    Latency,
    /// Not before [`Active::read`].
    Stalled,
}

/// A running one.
pub(crate) struct Active {
    /// Attached while it lives.
    _floor: Option<Floor>,
    process: Option<(Child, Output)>,
    stderr: std::path::PathBuf,
}

impl Starter<'_> {
    /// Starts one, and waits until it is attached.
    pub(crate) fn start(&self, contender: Contender, reading: Reading, args: &[&str]) -> Result<Active> {
        let stderr = self.directory.join("stderr");
        if !contender.is_process() {
            let floor = (contender == Contender::Floor).then(|| Floor::attach(&self.hooks, self.types)).transpose()?;
            return Ok(Active { _floor: floor, process: None, stderr });
        }
        let found = |program: &str| workspace::find(program).with_context(|| format!("not installed: {program}"));
        let mut command = match contender {
            Contender::Tcpdump => {
                let mut command = self.namespace.command(&found("tcpdump")?);
                command.args(["-n", "-Z", "root", "-i", "lo", "-w"]).arg(self.directory.join("tcpdump.pcap"));
                command
            }
            _ => Command::new("setpriv"),
        };
        match contender {
            Contender::Text | Contender::Json => {
                command.args(["--pdeathsig", "KILL", "--"]).arg(self.tracer).arg("run");
                command.args((contender == Contender::Json).then_some("--json")).args(args);
            }
            Contender::Tcplife | Contender::Tcpstates | Contender::Bpftrace => {
                let (program, _) = contender.program().context("it is a program")?;
                // They want tracefs where they look for it; it is mounted for them alone.
                let mount =
                    "[ -d /sys/kernel/tracing/events ] || mount -t tracefs tracefs /sys/kernel/tracing; exec \"$@\"";
                command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "sh", "-c", mount, "sh"]);
                command.arg(found(program)?);
                if contender == Contender::Bpftrace {
                    command.args(["-e", BPFTRACE]);
                }
            }
            Contender::Nothing | Contender::Floor | Contender::Tcpdump => {}
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&stderr)?)
            .spawn()
            .with_context(|| format!("cannot run {}", contender.name()))?;
        let stdout = child.stdout.take().context("no stdout")?;
        let mut active = Active { _floor: None, process: Some((child, Output::new(stdout, reading)?)), stderr };
        active.wait_until_attached(contender)?;
        Ok(active)
    }
}

impl Active {
    fn wait_until_attached(&mut self, contender: Contender) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let said = fs::read_to_string(&self.stderr).unwrap_or_default();
            let (child, output) = self.process.as_mut().context("it is a process")?;
            if let Some(status) = child.try_wait()? {
                let reason = said.lines().next_back().unwrap_or("it said nothing").to_owned();
                bail!("{}: {status}: {reason}", contender.name());
            }
            let attached = match contender {
                // The tail of what libpcap says.
                Contender::Tcpdump => said.contains("listening on"),
                Contender::Text | Contender::Json => output.tally.first.get().is_some(),
                // They may keep their first lines back: once their program is loaded, a moment more must do.
                _ => !Usage::of(child.id())?.programs.is_empty(),
            };
            if attached {
                std::thread::sleep(Duration::from_millis(if Contender::PEERS.contains(&contender) { 300 } else { 50 }));
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} was not attached within 30 s: {}", contender.name(), said.trim());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its process; where it has none, this one.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().map_or_else(std::process::id, |(child, _)| child.id())
    }

    /// What it has used so far.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let mut usage = Usage::of(self.pid())?;
        if self.process.is_none() {
            usage.cpu_ns = 0;
        }
        Ok(usage)
    }

    /// The first line that it printed.
    pub(crate) fn first_line(&self) -> Option<&str> {
        self.process.as_ref()?.1.tally.first.get().map(String::as_str)
    }

    /// Lines that were read so far.
    pub(crate) fn lines(&self) -> u64 {
        self.process.as_ref().map_or(0, |(_, output)| output.tally.lines.load(Ordering::Relaxed))
    }

    /// Begins to read what nobody has.
    pub(crate) fn read(&mut self) {
        if let Some((_, output)) = &mut self.process {
            // Dropped, it lets the reader go.
            output.stalled = None;
        }
    }

    /// Ends it.
    pub(crate) fn stop(mut self, contender: Contender) -> Result<Ended> {
        self.read();
        let Some((mut child, output)) = self.process.take() else { return Ok(Ended::default()) };
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut ask_at = Instant::now();
        let mut killed = false;
        while child.try_wait()?.is_none() {
            let now = Instant::now();
            if now > deadline {
                child.kill()?;
                child.wait()?;
                killed = true;
                break;
            }
            // bpftrace has been seen to miss one.
            if now >= ask_at {
                kill_process(Pid::from_child(&child), Signal::INT)?;
                ask_at = now + Duration::from_secs(2);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if killed && !Contender::PEERS.contains(&contender) {
            bail!("{} did not end", contender.name());
        }
        let read = output.reader.join().map_err(|_| anyhow!("the reader panicked"))??;
        let stderr = fs::read_to_string(&self.stderr).unwrap_or_default();
        let mut ended = Ended { killed, latencies_us: read.latencies_us, ..Ended::default() };
        match contender {
            Contender::Json => {
                let last = read.tail.lines().next_back().unwrap_or_default();
                let summary: Value = serde_json::from_str(last).context("tracer's last line")?;
                let field =
                    |name: &str| summary[name].as_u64().with_context(|| format!("tracer's summary has no {name}"));
                ended.lost = field("lost")? + field("untracked")?;
                ended.closes = field("closes")?;
            }
            Contender::Text => {
                let summary = read.tail.lines().rev().find(|line| line.contains(" closed in "));
                ended.lost = before(summary.unwrap_or_default(), " lost").context("tracer printed no summary")?;
            }
            // `lost 12 events on CPU #0!`
            Contender::Tcplife | Contender::Tcpstates => ended.lost = stderr.lines().filter_map(after_lost).sum(),
            Contender::Bpftrace => ended.lost = read.lost + stderr.lines().filter_map(after_lost).sum::<u64>(),
            Contender::Tcpdump => {
                ended.lost = before(&stderr, " packets dropped by kernel").unwrap_or(0);
                // They are large.
                let _ = fs::remove_file(self.stderr.with_file_name("tcpdump.pcap"));
            }
            Contender::Nothing | Contender::Floor => {}
        }
        Ok(ended)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some((child, _)) = &mut self.process {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The number before a word.
fn before(text: &str, word: &str) -> Option<u64> {
    text.split_once(word)?.0.split_whitespace().next_back()?.parse().ok()
}

/// `Lost 12 events`
fn after_lost(line: &str) -> Option<u64> {
    let rest = line.strip_prefix("Lost ").or_else(|| line.strip_prefix("lost "))?;
    rest.split(' ').next()?.parse().ok()
}

/// What one left when it ended.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    /// Records, events or packets, by its own account.
    pub(crate) lost: u64,
    /// A peer that did not end, and so may have lost more.
    pub(crate) killed: bool,
    /// That tracer has printed.
    pub(crate) closes: u64,
    /// From the kernel's record to its line, sorted.
    pub(crate) latencies_us: Vec<u32>,
}

/// The reader of a stdout.
struct Output {
    tally: Arc<Tally>,
    reader: JoinHandle<Result<WasRead>>,
    /// Nothing is read while this lives.
    stalled: Option<mpsc::Sender<()>>,
}

#[derive(Default)]
struct Tally {
    lines: AtomicU64,
    first: OnceLock<String>,
}

/// What a reader has at the end.
#[derive(Default)]
struct WasRead {
    tail: String,
    lost: u64,
    latencies_us: Vec<u32>,
}

impl Output {
    fn new(stdout: ChildStdout, reading: Reading) -> Result<Self> {
        let tally = Arc::<Tally>::default();
        let (stalled, wait) = mpsc::channel::<()>();
        let reader = std::thread::Builder::new().spawn({
            let tally = Arc::clone(&tally);
            move || read(stdout, reading, &tally, &wait)
        })?;
        Ok(Self { tally, reader, stalled: (reading == Reading::Stalled).then_some(stalled) })
    }
}

/// Bytes that are kept for the end.
const TAIL: usize = 256 << 10;
/// Latencies that are kept.
const LATENCIES: usize = 4 << 20;

fn read(mut stdout: impl Read, reading: Reading, tally: &Tally, stalled: &mpsc::Receiver<()>) -> Result<WasRead> {
    let mut read = WasRead::default();
    let mut buffer = vec![0; TAIL];
    let mut filled = 0;
    let mut old: Vec<u8> = Vec::new();
    loop {
        let n = stdout.read(buffer.get_mut(filled..).unwrap_or_default())?;
        let now = SystemTime::now();
        if n == 0 {
            break;
        }
        let fresh = buffer.get(filled..filled + n).unwrap_or_default();
        let lines = fresh.iter().filter(|byte| **byte == b'\n').count() as u64;
        let begin = if tally.first.get().is_none() { 0 } else { filled };
        filled += n;
        let text = buffer.get(begin..filled).unwrap_or_default();
        if tally.first.get().is_none()
            && let Some(end) = text.iter().position(|byte| *byte == b'\n')
        {
            let line = text.get(..end).unwrap_or_default();
            // Nobody else sets it.
            let _ = tally.first.set(String::from_utf8_lossy(line).into_owned());
            if reading == Reading::Stalled {
                // Ends when the other end is dropped.
                let _ = stalled.recv();
            }
        }
        if fresh.starts_with(b"Lost ") || fresh.windows(6).any(|six| six == b"\nLost ") {
            let lost: u64 = String::from_utf8_lossy(fresh).lines().filter_map(after_lost).sum();
            read.lost += lost;
        }
        if reading == Reading::Latency {
            latencies(fresh, now, &mut read.latencies_us);
        }
        tally.lines.fetch_add(lines, Ordering::Relaxed);
        if filled == buffer.len() {
            old = std::mem::replace(&mut buffer, vec![0; TAIL]);
            filled = 0;
        }
    }
    old.extend_from_slice(buffer.get(..filled).unwrap_or_default());
    read.tail = String::from_utf8_lossy(&old).into_owned();
    read.latencies_us.sort_unstable();
    Ok(read)
}

/// How old the records are whose beginnings are in `text`.
fn latencies(text: &[u8], now: SystemTime, into: &mut Vec<u32>) {
    const BEGIN: &[u8] = br#"{"type":"close","time":""#;
    const DAY: u64 = 86_400 * 1_000_000;
    let Ok(now) = now.duration_since(SystemTime::UNIX_EPOCH) else { return };
    let now = now.as_micros() as u64 % DAY;
    for line in text.split(|byte| *byte == b'\n') {
        if let Some(rest) = line.strip_prefix(BEGIN)
            && let Some(at) = rest.get(..27).and_then(micros_of_the_day)
            && into.len() < LATENCIES
        {
            into.push(u32::try_from((now + DAY - at) % DAY).unwrap_or(u32::MAX));
        }
    }
}

/// Of `2026-01-02T03:04:05.678901234Z`, the microseconds since midnight.
fn micros_of_the_day(time: &[u8]) -> Option<u64> {
    let number =
        |from: usize, to: usize| -> Option<u64> { std::str::from_utf8(time.get(from..to)?).ok()?.parse().ok() };
    let seconds = (number(11, 13)? * 60 + number(14, 16)?) * 60 + number(17, 19)?;
    Some(seconds * 1_000_000 + number(20, 26)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_late_a_record_is() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_micros(1_767_323_045_700_000);
        let mut found = Vec::new();
        let line = br#"{"type":"close","time":"2026-01-02T03:04:05.678901234Z","cookie":1}"#;
        latencies(line, now, &mut found);
        assert_eq!(found, [21_099]);
    }

    #[test]
    fn losses_by_their_own_account() {
        assert_eq!(after_lost("Lost 12 events"), Some(12));
        assert_eq!(after_lost("lost 3 events on CPU #0!"), Some(3));
        assert_eq!(before("9 packets captured\n5 packets dropped by kernel\n", " packets dropped by kernel"), Some(5));
        assert_eq!(before("12:00:00 4 closed in 1.0 s, 2 of them left TIME_WAIT, 7 lost", " lost"), Some(7));
    }
}
