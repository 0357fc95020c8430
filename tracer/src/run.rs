//! `tracer run`: wires the steps together and ends them in order.
//!
//! Two threads. This one reads the ring buffer and turns records into lines, in [`outbox`]; the other, in [`writer`], writes them. Between
//! them is a bounded queue: when stdout is not read, this thread stops reading, some seconds later at most, the ring buffer fills, and
//! the programs count what they lose. The traced host is never blocked, and a signal is always heard.

mod outbox;
mod walker;
mod writer;

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use log::{debug, warn};
use tokio::io::Interest;
use tokio::signal::unix::{SignalKind, signal};

use crate::broker::Broker;
use crate::connection::Connections;
use crate::decode::decode;
use crate::event::{Event, Ledger, Lost, Reconciled, Start};
use crate::filter::Filter;
use crate::kernel::{Ask, Attached, Counters, Kernel};
use crate::launcher::Launcher;
use crate::ledger::{self, Row, Tally, Witness};
use crate::memory;
use crate::preflight::{self, Refusal};
use crate::privileges;
use crate::process::Processes;
use crate::record::{self, Recording};
use crate::reporter::{self, Reporter, Wanted};
use crate::ring::{self, Ring, watch};
use crate::sandbox::{self, Part};
use crate::sink::Sink;
use crate::sink::summary::{Missed, Moment};
use crate::time_wait::{self, SockDiag};
use outbox::Outbox;
use walker::Walker;
use writer::Writer;

/// What to trace, and how to print it.
pub struct Options {
    /// What the programs report.
    pub ask: Ask,
    /// The filters as on the command line.
    pub filters: Vec<String>,
    /// Those of them that the programs do not apply.
    pub filter: Filter,
    /// End by itself after this time.
    pub duration: Option<Duration>,
    /// Summaries in between, and alerts.
    pub wanted: Wanted,
    /// Whether the two processes are confined, see [`sandbox`].
    pub sandbox: bool,
    /// Whether it is a failure that closes were lost or not seen.
    pub strict: bool,
    /// Run by `sh -c` for each alert that is raised, see [`crate::launcher`].
    pub exec: Option<String>,
    /// Processes that were started will be ended here.
    pub ends_children: bool,
    /// How to print.
    pub sink: Sink,
    /// Where to record it, too.
    pub record: Option<record::Target>,
}

/// How often losses are looked for.
const LOSS_CHECK: Duration = Duration::from_secs(1);

/// How often records are set aside while there is no room in the queue: a small ring is full after a few milliseconds.
const SET_ASIDE: Duration = Duration::from_millis(1);

/// Traces until a signal, the end of the duration, or a closed stdout.
///
/// # Errors
/// A [`Refusal`] before the start, or what failed while running.
pub fn run(mut options: Options) -> Result<()> {
    let mut host = preflight::check()?;
    if options.sandbox {
        host.degraded.append(&mut sandbox::support().missing());
    }
    for missing in &host.degraded {
        warn!("{missing}");
    }
    if !options.sandbox {
        // It was asked for: no reason to warn.
        host.degraded.push(sandbox::UNCONFINED.to_owned());
    }
    // Before anything is opened that it could hold. Without `/proc` it would have nothing to look at, and cannot be started.
    let broker = match std::fs::symlink_metadata("/proc/self/exe") {
        Ok(_) => Some(Arc::new(Broker::start(options.sandbox)?)),
        Err(_) => None,
    };
    options.wanted.watch.launcher = options.exec.as_deref().map(Launcher::start).transpose()?;
    // Behind the start of the others, who would inherit it. Where the kernel gives huge pages unasked, three small heaps take megabytes.
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        debug!("huge pages cannot be done without: {error}");
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")?;
    runtime.block_on(trace(options, host, broker))
}

async fn trace(options: Options, host: preflight::Host, broker: Option<Arc<Broker>>) -> Result<()> {
    // Handlers first: a signal during the start must end it like any other.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut summary_wanted = signal(SignalKind::user_defined1())?;

    let Attached { mut kernel, ring, looks_until, log, walks } =
        Kernel::attach(&options.ask, &host.cgroup, &host.layout).map_err(preflight::explain)?;
    let (books, without_witness) = Books::open(&kernel);
    // Not before: what is there already is not replaced by the recording of a run that could not begin.
    let recording = match &options.record {
        Some(target) => Some(Recording::create(target).map_err(|error| Refusal::cannot_make(&target.path, &error))?),
        None => None,
    };
    privileges::leave_root()?;
    privileges::drop_all(|| kernel.counters().is_ok())?;
    let began = Instant::now();
    let mut ring = Ring::new(ring, options.ask.ring_bytes, looks_until)?;
    let mut programs_log = watch(log, Interest::READABLE)?;
    let mut degraded = host.degraded;
    for missing in kernel.degraded.drain(..) {
        warn!("{missing}");
        degraded.push(missing);
    }
    // Without `/proc` its own namespace is not known; the host's check has said so.
    let sock_diag = broker.as_ref().and_then(|broker| SockDiag::by(Arc::clone(broker)).ok());
    let mut sock_diag = sock_diag.unwrap_or_else(SockDiag::unable);
    if let Err(error) = sock_diag.probe() {
        let missing = preflight::without_sock_diag(&error);
        warn!("{missing}");
        degraded.push(missing);
    }
    if let Some(missing) = without_witness {
        warn!("{missing}");
        degraded.push(missing);
    }
    let processes = broker.map_or_else(Processes::new, Processes::by);
    let mut connections = Connections::new(processes, sock_diag, options.ask.states).blind(kernel.blind);

    let sockstat = Sockstat::open();
    let time_wait_max = time_wait_max();
    writer::widen_stdout();
    // What the start took and nobody needs any more: the kernel's types, most of all.
    memory::give_back();
    privileges::seal()?;
    // Last before the first thread, and before the first record is read: from here on no file can be opened.
    if options.sandbox {
        sandbox::confine(Part::Reader { ends_children: options.ends_children })?;
    }
    let records = recording.is_some();
    let every = options.wanted.every;
    let reporter = Reporter::new(options.sink, options.wanted, recording, began, time_wait_max);
    let mut writer = Writer::start()?;
    let walker = Walker::start(walks, options.ask.close_wait_after)?;
    let start = Event::Start(Start {
        time: Timestamp::now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: preflight::kernel_release(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        filters: options.filters,
        hooks: kernel.hooks.clone(),
        time_wait: sockstat.time_wait(),
        time_wait_max,
        degraded,
    });
    let mut losses = Losses { missed: Missed::default(), since: Timestamp::now(), left_out: 0, crowded: 0 };
    let mut loss_check = tokio::time::interval(LOSS_CHECK);
    loss_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut summary_ticks = every.map(|every| {
        let mut ticks = tokio::time::interval_at((began + every).into(), every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        ticks
    });
    let closed = stdout_closed();
    tokio::pin!(closed);
    let end = async {
        match options.duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(end);

    let mut outbox = Outbox::new(books, options.filter, reporter, start);
    // When what was recorded must be in the file.
    let mut flush_at = None;
    // What is asked for, behind the events.
    let mut ask = None;
    let outcome = loop {
        if let Err(error) = outbox.answer(ask.take()) {
            break Err(error.into());
        }
        if std::mem::take(&mut outbox.has_passed) && records {
            flush_at = flush_at.or_else(|| Some(Instant::now() + record::FLUSH_AFTER));
        }
        // Room in the queue first: without it no record is dealt with. For a moment they are set aside, then they wait in the ring.
        let full = !outbox.lines.is_empty();
        let set_aside = full && !writer.is_slow();
        let poll_at = connections.next_poll();
        tokio::select! {
            biased;
            _ = interrupt.recv() => break Ok(()),
            _ = terminate.recv() => break Ok(()),
            () = &mut end => break Ok(()),
            () = &mut closed => break Ok(()),
            // Stdout has failed; the writer says why.
            () = writer.ended() => break Ok(()),
            // That it has ended is seen above.
            () = writer.send(&mut outbox.lines), if full => {}
            () = tokio::time::sleep(SET_ASIDE), if set_aside => ring.set_aside(),
            _ = summary_wanted.recv(), if !full => {
                let ledger = outbox.books.ledger(&kernel, &connections);
                ask = Some((reporter::Ask::Now, moment(losses.missed, &sockstat, ledger)));
            }
            () = tick(&mut summary_ticks), if !full => {
                let ledger = outbox.books.ledger(&kernel, &connections);
                ask = Some((reporter::Ask::Every, moment(losses.missed, &sockstat, ledger)));
            }
            () = until(flush_at), if flush_at.is_some() => {
                outbox.reporter.record(&[]);
                flush_at = None;
            }
            // Before the ring: alerts are for when there is always something in it.
            _ = loss_check.tick(), if !full => {
                // Should a wake-up ever be missed, this is how long it takes at most.
                look(&mut ring, &mut connections, &mut outbox, poll_at, writer.is_slow());
                // A few find no slot for other reasons, and would find none behind a walk.
                if losses.check(&kernel, &mut outbox.events)? > u64::from(options.ask.slots / 256) {
                    walker.hurry();
                }
                ask = Some((reporter::Ask::Check, moment(losses.missed, &sockstat, None)));
            }
            ready = ring.ready(), if !full => {
                ready?;
                look(&mut ring, &mut connections, &mut outbox, poll_at, writer.is_slow());
            }
            () = until(poll_at), if !full && poll_at.is_some() => {
                look(&mut ring, &mut connections, &mut outbox, poll_at, writer.is_slow());
            }
            guard = programs_log.readable_mut() => {
                let mut guard = guard?;
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        }
    };

    // What was written up to now still counts; nothing is added to it.
    let reconciled = outbox.books.compare(&kernel, 20);
    kernel.detach();
    walker.end();
    let now = Instant::now();
    // One of the programs may still be at work on another CPU: until all that they have counted is here.
    let mut attempts = 100;
    let rows = loop {
        let mut more = true;
        while more {
            writer.send_last(&mut outbox.lines).await;
            more = take(&mut ring, &mut connections, now, &mut outbox, true);
        }
        let rows = match kernel.ledger() {
            Ok(rows) => rows,
            Err(error) => {
                warn!("what the programs counted cannot be read: {error:#}");
                break None;
            }
        };
        attempts -= 1;
        if attempts == 0 || ledger::is_whole(&rows) && ledger::emitted(&rows) == connections.ends().0 {
            break Some(rows);
        }
        std::thread::sleep(ledger::PAUSE);
    };
    connections.finish(now, &mut outbox.events);
    losses.check(&kernel, &mut outbox.events)?;
    outbox.answer(None)?;
    let Outbox { mut books, mut reporter, mut lines, .. } = outbox;
    let ledger = rows.map(|rows| books.close(&rows, &connections, reconciled));
    let ledger = reporter.finish(&moment(losses.missed, &sockstat, ledger), &mut lines)?;
    let complaint = match ledger {
        _ if !options.strict => None,
        _ if losses.left_out > 0 => {
            Some(format!("{} processes that --pid asks for were too many to be followed at once", losses.left_out))
        }
        Some(ledger) => ledger::complaint(&ledger, losses.missed.lost),
        None => Some("what the programs counted cannot be read".to_owned()),
    };
    writer.end(lines, reporter, options.strict).await?;
    outcome.and_then(|()| complaint.map_or(Ok(()), |why| Err(Refusal::unaccounted(&why).into())))
}

/// What is counted of closes, from the first record to the last line.
struct Books {
    /// The network namespace of tracer, if that is known.
    here: Option<u32>,
    /// The kernel's own counters of it, if they can be read.
    witness: Option<Witness>,
    tally: Tally,
}

impl Books {
    /// To be called once the programs are attached. Also says so if there is nothing to compare closes with.
    fn open(kernel: &Kernel) -> (Self, Option<String>) {
        let here = time_wait::own_namespace();
        let begun = here
            .as_ref()
            .map_err(|error| anyhow::anyhow!("/proc/self/ns/net: {error}"))
            .and_then(|netns| Witness::begin(*netns, || kernel.ledger()));
        let (witness, missing) = match begun {
            Ok(witness) => (Some(witness), None),
            Err(error) => (None, Some(ledger::without_witness(&error))),
        };
        (Self { here: here.ok(), witness, tally: Tally::default() }, missing)
    }

    /// Leaves out what does not pass the filter.
    fn sift(&mut self, filter: &Filter, events: &mut Vec<Event>) {
        events.retain(|event| {
            let passes = filter.passes(event);
            if let (false, Event::Close(close)) = (passes, event) {
                self.tally.filtered += 1;
                self.tally.close(close, self.here);
            }
            passes
        });
    }

    /// These are on their way to the writer.
    fn sent(&mut self, events: &[Event]) {
        for event in events {
            if let Event::Close(close) = event {
                self.tally.passed += 1;
                self.tally.close(close, self.here);
            }
        }
    }

    /// As they are now; no event may be on its way between the ring and [`Books::sent`].
    fn ledger(&mut self, kernel: &Kernel, connections: &Connections) -> Option<Box<Ledger>> {
        let reconciled = self.compare(kernel, 3);
        let rows = ledger::whole(10, || kernel.ledger());
        let rows = rows.inspect_err(|error| warn!("what the programs count cannot be read: {error:#}")).ok()?;
        Some(self.balance(&rows, connections, reconciled))
    }

    /// As they are once everything was read and sent.
    fn close(&mut self, rows: &[Row], connections: &Connections, reconciled: Option<Reconciled>) -> Box<Ledger> {
        let mut ledger = self.balance(rows, connections, reconciled);
        ledger.balanced &= ledger.emitted == ledger.read && ledger.waiting == 0;
        ledger
    }

    fn balance(&mut self, rows: &[Row], connections: &Connections, reconciled: Option<Reconciled>) -> Box<Ledger> {
        let (read, held) = connections.ends();
        self.tally.read = read;
        Box::new(ledger::close_books(rows, &self.tally, held, reconciled))
    }

    fn compare(&self, kernel: &Kernel, attempts: u32) -> Option<Reconciled> {
        let compared = self.witness.as_ref()?.compare(attempts, || kernel.ledger());
        compared.inspect_err(|error| warn!("the kernel's own counters cannot be read any more: {error:#}")).ok()
    }
}

/// Moves a batch of records on, and then asks for the connections that are due, the first of them at `poll_at`. `leave`: see
/// [`Ring::drain`].
fn look(ring: &mut Ring, connections: &mut Connections, outbox: &mut Outbox, poll_at: Option<Instant>, leave: bool) {
    connections.set_clock();
    let more = take(ring, connections, Instant::now(), outbox, leave);
    let now = Instant::now();
    if poll_at.is_some_and(|at| at <= now) {
        connections.poll(now, more, &mut outbox.events);
    }
}

/// Moves a batch of records on; answers whether there may be more. `leave`: see [`Ring::drain`].
fn take(ring: &mut Ring, connections: &mut Connections, now: Instant, outbox: &mut Outbox, leave: bool) -> bool {
    ring.drain(leave, |bytes| match decode(bytes) {
        Ok(fact) => {
            connections.fact(fact, now, &mut outbox.events);
            outbox.pass();
        }
        Err(error) => warn!("the kernel programs wrote something that is no record: {error}"),
    })
}

/// Never, if no summaries are wanted in between.
async fn tick(ticks: &mut Option<tokio::time::Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    if let Some(at) = at {
        ring::until(at.into()).await;
    }
}

/// What the programs could not follow or write, as far as it has been reported.
struct Losses {
    missed: Missed,
    since: Timestamp,
    /// Processes that `--pid` asks for, and that were not followed.
    left_out: u64,
    /// Sockets that found their slot taken.
    crowded: u64,
}

impl Losses {
    /// Answers how many more sockets found their slot taken.
    fn check(&mut self, kernel: &Kernel, events: &mut Vec<Event>) -> Result<u64> {
        let Counters { lost, untracked, left_out, crowded } = kernel.counters()?;
        let more_crowded = crowded - self.crowded;
        self.crowded = crowded;
        self.left_out = left_out;
        let missed = &mut self.missed;
        if untracked > missed.untracked {
            warn!(
                "the kernel had no memory to follow {} sockets: their ends are not reported",
                untracked - missed.untracked
            );
            missed.untracked = untracked;
        }
        if lost > missed.lost {
            let time = Timestamp::now();
            events.push(Event::Lost(Lost { time, records: lost - missed.lost, since: self.since }));
            missed.lost = lost;
            self.since = time;
        }
        Ok(more_crowded)
    }
}

/// Ends when nobody can read stdout any more, even while there is nothing to write; never for a file.
async fn stdout_closed() {
    // `io::Stdout` has no address of its own to borrow from, a descriptor of our own has.
    let Ok(fd) = io::stdout().as_fd().try_clone_to_owned() else { return std::future::pending().await };
    match watch(fd, Interest::ERROR) {
        Ok(fd) => {
            if fd.ready(Interest::ERROR).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        // A file, or /dev/null: it cannot be closed by a reader.
        Err(_) => std::future::pending().await,
    }
}

/// `/proc/net/sockstat` of the network namespace of tracer, opened while files can be.
struct Sockstat(Option<File>);

impl Sockstat {
    fn open() -> Self {
        Self(File::open("/proc/net/sockstat").ok())
    }

    /// Sockets in TIME_WAIT now.
    fn time_wait(&self) -> Option<u64> {
        let mut file = self.0.as_ref()?;
        // From the beginning it is written anew.
        file.rewind().ok()?;
        let mut text = String::new();
        file.read_to_string(&mut text).ok()?;
        sockets_in_time_wait(&text)
    }
}

/// The number in `/proc/net/sockstat`.
pub(crate) fn sockets_in_time_wait(sockstat: &str) -> Option<u64> {
    let mut words = sockstat.lines().find(|line| line.starts_with("TCP:"))?.split(' ').skip_while(|word| *word != "tw");
    words.nth(1)?.parse().ok()
}

/// How many there may be.
fn time_wait_max() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_max_tw_buckets").ok()?.trim().parse().ok()
}

/// Now, with what was missed up to now.
fn moment(missed: Missed, sockstat: &Sockstat, ledger: Option<Box<Ledger>>) -> Moment {
    Moment { time: Timestamp::now(), now: Instant::now(), missed, time_wait_sockets: sockstat.time_wait(), ledger }
}

/// Lets no SIGUSR1 end this process before tracing begins; from then on it asks for a summary.
pub fn ignore_usr1() {
    // SAFETY: it is a signal that can be ignored, and no handler is set that could do something wrong.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
}

/// Whether a refusal is behind this error, and with which exit code.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Refusal>().map_or(preflight::exit::FAILURE, |refusal| refusal.code)
}
