//! The parts with a setting of their own: many open connections, very many closes, a consumer that stalls, and rings of other sizes.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::contender::{Active, Contender, Reading};
use super::floor::Counting;
use super::load::{Held, PORT, Workload};
use super::measure::{Maps, Sockets, Usage, resident};
use super::report::{Budget, lower, megabytes, number};
use super::{Bench, OPEN, SETTLE};

/// Closes before the cost is measured again.
const CLOSES: u64 = 5_000_000;
/// They must have come by then.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Rounds with as many connections open, of which the one counts that is least disturbed.
const ROUNDS: u32 = 12;
/// A cost is flat if it grows by no more.
const FLAT: f64 = 1.25;
/// How long nobody reads.
const STALL: Duration = Duration::from_secs(30);
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
        // At the same time, and so equally slow or fast.
        let floor = self.starter.start(Contender::Floor, Reading::Lines, &[])?;
        self.load.run(Workload::Short, 3)?;
        let mut levels = Vec::new();
        for open in [100, 10_000, OPEN] {
            eprintln!("bench: {open} open connections");
            let held = Held::open(&self.load.namespace, open)?;
            levels.push(self.level(format!("{} open", number(Some(held.connections as f64), 0)), &active, &floor)?);
            held.close()?;
            quiet(&active);
        }
        let deadline = Instant::now() + PATIENCE;
        while active.lines() < CLOSES {
            eprintln!("bench: {} closes", active.lines());
            self.load.run(Workload::Short, 20)?;
            if Instant::now() > deadline {
                bail!("only {} closes in {PATIENCE:?}", active.lines());
            }
        }
        let held = Held::open(&self.load.namespace, 100)?;
        levels.push(self.level("100 open, after 5 million closes".to_owned(), &active, &floor)?);
        held.close()?;
        let ended = active.stop(Contender::Text)?;

        let mut text = format!(
            "## Scale\n\n\
             Costs of one short connection, both ends, the least of {ROUNDS} rounds, while other connections are open. The empty \
             programs are attached at the same time.\n\n\
             | | BPF ns | empty programs ns | daemon ns | resident |\n| --- | ---: | ---: | ---: | ---: |\n"
        );
        for level in &levels {
            let _ = writeln!(
                text,
                "| {} | {:.0} | {:.0} | {:.0} | {} |",
                level.name,
                level.bpf_ns,
                level.floor_ns,
                level.daemon_ns,
                megabytes(level.resident)
            );
        }
        let _ = writeln!(text, "\nLost, with all that end at once: {}.", ended.lost);
        self.report.section(text);
        let first = levels.first().context("no level")?;
        let relative = |level: &Level| level.bpf_ns / level.floor_ns;
        for level in levels.iter().skip(1) {
            let what = |what: &str| format!("{}: {what}, times that with 100 open", level.name);
            self.report.budget(Budget::at_most(
                what("BPF against the floor"),
                Some(relative(level) / relative(first)),
                FLAT,
                2,
            ));
            self.report.budget(Budget::at_most(what("daemon"), Some(level.daemon_ns / first.daemon_ns), FLAT, 2));
        }
        let seen = levels.iter().map(|level| {
            json!({
                "level": level.name, "bpf_ns": level.bpf_ns, "floor_ns": level.floor_ns, "daemon_ns": level.daemon_ns,
                "resident_bytes": level.resident,
            })
        });
        self.report.value("scale", seen.collect());
        Ok(())
    }

    fn level(&self, name: String, active: &Active, floor: &Active) -> Result<Level> {
        let (mut bpf, mut empty, mut daemon) = (None, None, None);
        for _ in 0..ROUNDS {
            let ([usage, floor], operations) = self.round(Workload::Short, [active, floor])?;
            let each = |n: u64| n as f64 / operations as f64;
            let ns = |usage: &Usage| each(usage.runs().ns);
            lower(&mut bpf, ns(&usage));
            lower(&mut empty, ns(&floor));
            lower(&mut daemon, each(usage.cpu_ns));
        }
        Ok(Level {
            name,
            bpf_ns: bpf.context("no round")?,
            floor_ns: empty.context("no round")?,
            daemon_ns: daemon.context("no round")?,
            resident: resident(active.pid())?.0,
        })
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
            fs::write(format!("/proc/{}/clear_refs", active.pid()), "5").context("the peak of resident memory")?;
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
        let began = Instant::now();
        let (mut rates, mut most) = (Vec::new(), 0);
        while began.elapsed() < STALL {
            rates.push(self.load.run(Workload::Short, 5)?.rate());
            most = most.max(resident(active.pid())?.0);
        }
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

struct Level {
    name: String,
    bpf_ns: f64,
    floor_ns: f64,
    daemon_ns: f64,
    resident: u64,
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
