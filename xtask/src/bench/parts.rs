//! The parts with a setting of their own: many open connections, very many closes, a consumer that stalls, and rings of other sizes.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

use super::contender::{Active, Contender, Reading};
use super::floor::Counting;
use super::load::{Held, PORT, Workload};
use super::measure::{Maps, Sockets, forget_peak, resident};
use super::report::{Budget, lower, megabytes, number};
use super::{Bench, OPEN, SETTLE};

/// Closes before the cost is measured again.
const CLOSES: u64 = 5_000_000;
/// They must have come by then.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Rounds of each kind, of which the one counts that is least disturbed.
const ROUNDS: u32 = 12;
/// Their parts, with many connections open and with few in turn: what else the machine does is then the same for both.
const TURNS: u32 = 2;
/// Seconds of short connections before many others count as idle: tracer looks through all open files twice until those have left their
/// slots, and takes no more than a hundredth of a processor for it.
const IDLE_S: u32 = 30;
/// Open connections, where they are few.
const FEW: u64 = 100;
/// A cost is flat if it grows by no more.
const FLAT: f64 = 1.25;
/// How long nobody reads.
const STALL: Duration = Duration::from_secs(30);
/// What may be resident meanwhile: what may be set aside for a moment (64 MiB), and what tracer may have at all (30 MB), rounded up.
const STALLED_MB: f64 = 100.0;
/// Sizes of the ring that are compared.
const RINGS: [&str; 5] = ["256K", "1M", "4M", "16M", "64M"];

impl Bench<'_> {
    /// Resident memory with very many connections open; what they take in the kernel; and what becomes of them when they
    /// all end at once.
    pub(super) fn resident(&mut self) -> Result<u64> {
        eprintln!("bench: {OPEN} open connections");
        let active = self.starter.start(Contender::Json, Reading::Lines, &[])?;
        let maps = Maps::of(active.pid())?;
        let held = Held::open(&self.load.namespace, OPEN)?;
        std::thread::sleep(SETTLE);
        let (now, peak) = resident(active.pid())?;
        held.close()?;
        quiet(&active);
        let ended = active.stop(Contender::Json)?;
        let storage = maps.socket_value.map(|value| self.starter.types.socket_storage(value)).transpose()?;
        let value = maps.socket_value.unwrap_or(0);
        self.report.section(format!(
            "## Memory\n\n\
             With {} connections open (both ends here): {} resident, at most {} before. Maps: {}. For each socket {} bytes of \
             kernel memory: a value of {value}, and what the kernel's own types say that it puts around it, rounded up as its \
             allocator does.\n\n\
             When all of these connections end at once, {} of {} records are lost.\n",
            number(Some(OPEN as f64), 0),
            megabytes(now),
            megabytes(peak),
            megabytes(maps.bytes),
            storage.map_or("?".to_owned(), |bytes| bytes.to_string()),
            number(Some(ended.lost as f64), 0),
            number(Some((ended.lost + ended.closes) as f64), 0),
        ));
        self.report.value(
            "memory",
            json!({
                "open": OPEN, "resident_bytes": now, "resident_peak_bytes": peak, "map_bytes": maps.bytes,
                "socket_value_bytes": value, "socket_storage_bytes": storage, "burst_lost": ended.lost,
                "burst_closes": ended.closes,
            }),
        );
        Ok(now)
    }

    /// The same cost for each close, however many connections are open, and however many have been.
    pub(super) fn scale(&mut self) -> Result<()> {
        let _counting = Counting::start()?;
        let active = self.starter.start(Contender::Text, Reading::Lines, &[])?;
        self.load.run(Workload::Short, 3)?;
        let begun = self.beside_a_new_one(&active)?;
        let mut levels = Vec::new();
        let floor = self.starter.start(Contender::Floor, Reading::Lines, &[])?;
        for open in [10_000, OPEN] {
            eprintln!("bench: {open} open connections");
            let (mut few, mut many) = (Cost::default(), Cost::default());
            for _ in 0..TURNS {
                for (connections, cost) in [(FEW, &mut few), (open, &mut many)] {
                    let held = Held::open(&self.load.namespace, connections)?;
                    if connections > FEW {
                        self.load.run(Workload::Short, IDLE_S)?;
                    }
                    self.rounds(cost, ROUNDS / TURNS, &active, &floor)?;
                    held.close()?;
                    quiet(&active);
                }
            }
            let open = number(Some(open as f64), 0);
            levels.push(((format!("{FEW} open, in turn with {open}"), few), (format!("{open} open"), many)));
        }
        drop(floor);
        let deadline = Instant::now() + PATIENCE;
        while active.lines() < CLOSES {
            eprintln!("bench: {} closes", active.lines());
            self.load.run(Workload::Short, 20)?;
            if Instant::now() > deadline {
                bail!("only {} closes in {PATIENCE:?}", active.lines());
            }
        }
        let after = self.beside_a_new_one(&active)?;
        levels.push((("just started".to_owned(), begun), ("after 5 million closes".to_owned(), after)));
        let ended = active.stop(Contender::Text)?;

        let mut text = format!(
            "## Scale\n\n\
             Costs of one short connection, both ends, the least of {ROUNDS} rounds. With many other connections open and with few, in \
             turn, beside empty programs; and at the beginning and after very many closes, each beside another tracer that was just \
             started: what is attached second finds in the caches what the first has fetched.\n\n\
             | | BPF ns | daemon ns | beside it: BPF ns | daemon ns | resident |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
        );
        let mut seen = Vec::new();
        for (few, many) in &levels {
            for (name, cost) in [few, many] {
                let _ = writeln!(
                    text,
                    "| {name} | {} | {} | {} | {} | {} |",
                    number(cost.bpf_ns, 0),
                    number(cost.daemon_ns, 0),
                    number(cost.beside_bpf_ns, 0),
                    number(cost.beside_daemon_ns, 0),
                    megabytes(cost.resident)
                );
                seen.push(json!({
                    "level": name, "bpf_ns": cost.bpf_ns, "daemon_ns": cost.daemon_ns, "beside_bpf_ns": cost.beside_bpf_ns,
                    "beside_daemon_ns": cost.beside_daemon_ns, "resident_bytes": cost.resident,
                }));
            }
            let ((few_name, few), (name, many)) = (few, many);
            let grown = |what: fn(&Cost) -> Option<f64>| Some(what(many)? / what(few)?);
            let bpf = "BPF, relative to what runs beside it";
            // Empty programs have none.
            let daemon = few.beside_daemon_ns.map_or("daemon", |_| "daemon, relative to that beside it");
            for (what, grown) in [(bpf, grown(Cost::bpf)), (daemon, grown(Cost::daemon))] {
                let what = format!("{name}: {what}, times that of: {few_name}");
                self.report.budget(Budget::at_most(what, grown, FLAT, 2));
            }
        }
        let _ = writeln!(text, "\nLost, also of those that end at once: {}.", ended.lost);
        self.report.section(text);
        self.report.value("scale", seen.into());
        Ok(())
    }

    /// What one costs beside another that is just started.
    fn beside_a_new_one(&self, active: &Active) -> Result<Cost> {
        let new = self.starter.start(Contender::Text, Reading::Lines, &[])?;
        let mut cost = Cost::default();
        self.rounds(&mut cost, ROUNDS, active, &new)?;
        new.stop(Contender::Text)?;
        Ok(cost)
    }

    /// Has a cost lowered by so many more rounds.
    fn rounds(&self, cost: &mut Cost, rounds: u32, active: &Active, beside: &Active) -> Result<()> {
        for _ in 0..rounds {
            let ([used, other], operations) = self.round(Workload::Short, [active, beside])?;
            let each = |n: u64| n as f64 / operations as f64;
            lower(&mut cost.bpf_ns, each(used.runs().ns));
            lower(&mut cost.daemon_ns, each(used.cpu_ns));
            lower(&mut cost.beside_bpf_ns, each(other.runs().ns));
            // Empty programs have none.
            if other.cpu_ns > 0 {
                lower(&mut cost.beside_daemon_ns, each(other.cpu_ns));
            }
        }
        cost.resident = resident(active.pid())?.0;
        Ok(())
    }

    /// What the size of the ring is worth: at the highest rate of short connections, and when very many connections end at once.
    pub(super) fn rings(&mut self) -> Result<()> {
        let mut text = format!(
            "## The size of the ring\n\n\
             `tracer run --json --ring-size SIZE`, one size after the other: short connections without a pause (costs are the \
             least of three rounds, losses those of all), and, for another such tracer, {} connections, both ends here, that all \
             end at once.\n\n\
             | | short: BPF ns | daemon ns | lost | at once: records | lost | resident at most | afterwards | maps |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
            number(Some(OPEN as f64), 0)
        );
        self.load.run(Workload::Short, 2)?;
        let mut sizes = Vec::new();
        for size in RINGS {
            eprintln!("bench: a ring of {size}");
            let (mut bpf, mut daemon) = (None, None);
            let active = self.starter.start(Contender::Json, Reading::Lines, &["--ring-size", size])?;
            {
                let _counting = Counting::start()?;
                for _ in 0..3 {
                    let ([usage], operations) = self.round(Workload::Short, [&active])?;
                    lower(&mut bpf, usage.runs().ns as f64 / operations as f64);
                    lower(&mut daemon, usage.cpu_ns as f64 / operations as f64);
                }
            }
            let short_lost = active.stop(Contender::Json)?.lost;
            let active = self.starter.start(Contender::Json, Reading::Lines, &["--ring-size", size])?;
            let held = Held::open(&self.load.namespace, OPEN)?;
            std::thread::sleep(SETTLE);
            // What the start took at most is not meant.
            forget_peak(active.pid())?;
            held.close()?;
            quiet(&active);
            let ((resident, peak), maps) = (resident(active.pid())?, Maps::of(active.pid())?.bytes);
            let ended = active.stop(Contender::Json)?;
            let records = ended.lost + ended.closes;
            let _ = writeln!(
                text,
                "| {size} | {} | {} | {short_lost} | {} | {} | {} | {} | {} |",
                number(bpf, 0),
                number(daemon, 0),
                number(Some(records as f64), 0),
                number(Some(ended.lost as f64), 0),
                megabytes(peak),
                megabytes(resident),
                megabytes(maps),
            );
            sizes.push(json!({
                "size": size, "bpf_ns": bpf, "daemon_ns": daemon, "lost": short_lost, "burst_records": records,
                "burst_lost": ended.lost, "resident_peak_bytes": peak, "resident_bytes": resident, "map_bytes": maps,
            }));
        }
        self.report.section(text);
        self.report.value("rings", sizes.into());
        Ok(())
    }

    /// Nobody reads stdout for a while: the host goes on, memory stays bounded, and what is lost is counted.
    pub(super) fn stall(&mut self) -> Result<()> {
        self.load.run(Workload::Short, 2)?;
        let port = PORT.to_string();
        let filter = ["--port", &port];
        let alone = self.load.run(Workload::Short, 5)?.rate();
        // Not of the load itself: the kernel's own count of sockets is the witness, and must begin with none open.
        self.none_established()?;
        let before = Sockets::of(self.load.pid())?;
        let mut active = self.starter.start(Contender::Json, Reading::Stalled, &filter)?;
        let (resident_before, _) = resident(active.pid())?;
        // What the start took at most is not meant.
        forget_peak(active.pid())?;
        let began = Instant::now();
        let mut rates = Vec::new();
        while began.elapsed() < STALL {
            rates.push(self.load.run(Workload::Short, 5)?.rate());
        }
        let (_, most) = resident(active.pid())?;
        let stalled = began.elapsed();
        let stuck = active.lines();
        active.read();
        quiet(&active);
        let resumed = active.lines();
        let reading = self.load.run(Workload::Short, 5)?.rate();
        self.none_established()?;
        quiet(&active);
        let after = active.lines();
        let (resident_after, _) = resident(active.pid())?;
        let sockets = Sockets::of(self.load.pid())?;
        let (opened, resets) = (sockets.opened - before.opened, sockets.resets - before.resets);
        let ended = active.stop(Contender::Json)?;
        // A RST that is sent after a socket's end has a record of its own, which may be lost, too, but is no line.
        let unaccounted = match (ended.closes + ended.lost).checked_sub(opened) {
            Some(more) => more.saturating_sub(resets),
            None => opened - ended.closes - ended.lost,
        };
        let least = rates.iter().copied().fold(f64::MAX, f64::min);
        self.report.section(format!(
            "## Nobody reads stdout\n\n\
             `tracer run --json --port {port}`, short connections without a pause; its stdout, a pipe, is not read for {:.0} s.\n\n\
             | | |\n| --- | ---: |\n\
             | connections/s without tracer | {} |\n\
             | connections/s while nobody reads, the least of {} rounds | {} |\n\
             | connections/s while it is read again | {} |\n\
             | sockets that the kernel counted | {} |\n\
             | resets that it counted (one after a socket's end has a record, but no line) | {} |\n\
             | closes printed | {} |\n\
             | records counted as lost | {} |\n\
             | lines that were read before, when it was read again, and of what came then | {stuck}, {}, {} |\n\
             | resident before | {} |\n\
             | resident at most meanwhile | {} |\n\
             | resident at the end | {} |\n",
            stalled.as_secs_f64(),
            number(Some(alone), 0),
            rates.len(),
            number(Some(least), 0),
            number(Some(reading), 0),
            number(Some(opened as f64), 0),
            number(Some(resets as f64), 0),
            number(Some(ended.closes as f64), 0),
            number(Some(ended.lost as f64), 0),
            number(Some((resumed - stuck) as f64), 0),
            number(Some((after - resumed) as f64), 0),
            megabytes(resident_before),
            megabytes(most),
            megabytes(resident_after),
        ));
        for budget in [
            Budget::at_most("stall: sockets neither printed nor counted as lost", Some(unaccounted as f64), 0.0, 0),
            Budget::at_least("stall: lines after it", Some((after - resumed) as f64), 1.0, 0),
            Budget::at_most("stall: resident at most, MB", Some(most as f64 / 1e6), STALLED_MB, 1),
        ] {
            self.report.budget(budget);
        }
        self.report.value(
            "stall",
            json!({
                "seconds": stalled.as_secs_f64(), "rate_alone": alone, "rates_stalled": rates, "rate_after": reading,
                "sockets": opened, "resets": resets, "printed": ended.closes, "lost": ended.lost, "resident_before_bytes": resident_before,
                "resident_most_bytes": most, "resident_after_bytes": resident_after,
            }),
        );
        Ok(())
    }

    /// Waits until no connection of the namespace is left.
    fn none_established(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Sockets::of(self.load.pid())?.established > 0 {
            if Instant::now() > deadline {
                bail!("connections of the load do not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Of a short connection, the least of several rounds; and of what ran beside it, the least of the same ones.
#[derive(Default)]
struct Cost {
    bpf_ns: Option<f64>,
    daemon_ns: Option<f64>,
    beside_bpf_ns: Option<f64>,
    /// `None`: it has no process.
    beside_daemon_ns: Option<f64>,
    /// Bytes.
    resident: u64,
}

impl Cost {
    /// As a multiple of what ran beside it.
    fn bpf(&self) -> Option<f64> {
        Some(self.bpf_ns? / self.beside_bpf_ns?)
    }

    /// The same, if that has a daemon.
    fn daemon(&self) -> Option<f64> {
        Some(self.daemon_ns? / self.beside_daemon_ns.unwrap_or(1.0))
    }
}

/// Waits until no more lines come, or for a while only: other connections of the host may make some.
fn quiet(active: &Active) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut lines = active.lines();
    loop {
        std::thread::sleep(Duration::from_millis(1200));
        let now = active.lines();
        if now.saturating_sub(lines) < 500 || Instant::now() > deadline {
            return;
        }
        lines = now;
    }
}
