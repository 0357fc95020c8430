//! `tracer run`: wires the steps together and ends them in order.
//!
//! Two threads. This one reads the ring buffer and turns records into events; the other formats and writes them. Between
//! them is a bounded queue: when stdout is not read, this thread stops reading, the ring buffer fills, and the programs
//! count what they lose. The traced host is never blocked, and a signal is always heard.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use log::warn;
use tokio::io::Interest;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::broker::Broker;
use crate::connection::Connections;
use crate::decode::decode;
use crate::event::{Event, Lost, Start};
use crate::filter::Filter;
use crate::kernel::{Ask, Attached, Counters, Kernel};
use crate::preflight::{self, Refusal};
use crate::privileges;
use crate::process::Processes;
use crate::record::{self, Recording};
use crate::reporter::{self, Batch, Reporter, Wanted};
use crate::ring::{Ring, watch};
use crate::sandbox::{self, Part};
use crate::sink::Sink;
use crate::sink::summary::{Missed, Moment};
use crate::time_wait::SockDiag;

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
    /// Processes that were started will be ended here.
    pub ends_children: bool,
    /// How to print.
    pub sink: Sink,
    /// Where to record it, too.
    pub record: Option<record::Target>,
}

/// Batches of events on their way to the writer.
const QUEUE: usize = 64;
/// Records that are turned into one batch.
const BATCH: usize = 1024;
/// How long the writer may take to print the rest after the end.
const GRACE: Duration = Duration::from_secs(2);
/// How often the writer is asked again to write what is to be recorded, if it was busy.
const FLUSH_AGAIN: Duration = Duration::from_millis(50);
/// How often losses are looked for.
const LOSS_CHECK: Duration = Duration::from_secs(1);

/// Traces until a signal, the end of the duration, or a closed stdout.
///
/// # Errors
/// A [`Refusal`] before the start, or what failed while running.
pub fn run(options: Options) -> Result<()> {
    let host = preflight::check()?;
    for missing in &host.degraded {
        warn!("{missing}");
    }
    // Before anything is opened that it could hold. Without `/proc` it would have nothing to look at, and cannot be started.
    let broker = match std::fs::symlink_metadata("/proc/self/exe") {
        Ok(_) => Some(Arc::new(Broker::start(options.sandbox)?)),
        Err(_) => None,
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")?;
    runtime.block_on(trace(options, host, broker))
}

async fn trace(options: Options, host: preflight::Host, broker: Option<Arc<Broker>>) -> Result<()> {
    // Handlers first: a signal during the start must end it like any other.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut summary_wanted = signal(SignalKind::user_defined1())?;

    let Attached { mut kernel, ring, looks_until, log } =
        Kernel::attach(&options.ask, &host.cgroup, &host.offsets).map_err(preflight::explain)?;
    // Not before: what is there already is not replaced by the recording of a run that could not begin.
    let recording = match &options.record {
        Some(target) => Some(Recording::create(target).map_err(|error| Refusal::cannot_make(&target.path, &error))?),
        None => None,
    };
    privileges::drop_all(|| kernel.counters().is_ok())?;
    let began = Instant::now();
    let mut ring = Ring::new(ring, looks_until)?;
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
    let processes = broker.map_or_else(Processes::new, Processes::by);
    let mut connections = Connections::new(processes, sock_diag, options.ask.states).blind(kernel.blind);

    let sockstat = Sockstat::open();
    let time_wait_max = time_wait_max();
    // Last before the first thread, and before the first record is read: from here on no file can be opened.
    if options.sandbox {
        sandbox::confine(Part::Reader { ends_children: options.ends_children })?;
    }
    let (queue, batches) = mpsc::channel::<Batch>(QUEUE);
    let records = recording.is_some();
    let every = options.wanted.every;
    let reporter = Reporter::new(options.sink, options.wanted, recording, began, time_wait_max);
    let writer = Writer::start(reporter, batches, records)?;
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
    let mut losses = Losses { missed: Missed::default(), since: Timestamp::now() };
    let mut loss_check = tokio::time::interval(LOSS_CHECK);
    loss_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut close_wait_check = tokio::time::interval(close_wait_period(options.ask.close_wait_after));
    close_wait_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
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

    let mut events = vec![start];
    // When what was sent must be in the recording.
    let mut flush_at = None;
    // What the writer is asked for, behind these.
    let mut ask = None;
    let outcome = loop {
        events.retain(|event| options.filter.passes(event));
        // Room in the queue first: without it nothing is read, and records wait in the ring buffer.
        let full = !events.is_empty() || ask.is_some();
        let poll_at = connections.next_poll();
        tokio::select! {
            biased;
            _ = interrupt.recv() => break Ok(()),
            _ = terminate.recv() => break Ok(()),
            () = &mut end => break Ok(()),
            () = &mut closed => break Ok(()),
            permit = queue.reserve(), if full => match permit {
                Ok(permit) => {
                    permit.send(Batch { events: std::mem::take(&mut events), ask: ask.take() });
                    flush_at = flush_at.or_else(|| records.then(|| Instant::now() + record::FLUSH_AFTER));
                }
                // The writer has ended: stdout is closed, or failed; it says which.
                Err(_) => break Ok(()),
            },
            _ = summary_wanted.recv(), if !full => {
                ask = Some((reporter::Ask::Now, moment(losses.missed, &sockstat)));
            }
            () = tick(&mut summary_ticks), if !full => {
                ask = Some((reporter::Ask::Every, moment(losses.missed, &sockstat)));
            }
            // Before the ring: alerts are for when there is always something in it.
            _ = loss_check.tick(), if !full => {
                // Should a wake-up ever be missed, this is how long it takes at most.
                take(&mut ring, &mut connections, Instant::now(), &mut events);
                losses.check(&kernel, &mut events)?;
                ask = Some((reporter::Ask::Check, moment(losses.missed, &sockstat)));
            }
            ready = ring.ready(), if !full => {
                ready?;
                connections.set_clock();
                let now = Instant::now();
                take(&mut ring, &mut connections, now, &mut events);
            }
            () = until(poll_at), if !full && poll_at.is_some() => {
                // First: that a RST followed may be in the ring by now.
                take(&mut ring, &mut connections, Instant::now(), &mut events);
                connections.poll(Instant::now(), &mut events);
            }
            () = until(flush_at), if flush_at.is_some() => {
                // An empty batch asks for it.
                flush_at = queue.try_send(Batch::default()).is_err().then(|| Instant::now() + FLUSH_AGAIN);
            }
            _ = close_wait_check.tick(), if !full => {
                if let Err(error) = kernel.look_for_close_wait() {
                    warn!("sockets in CLOSE_WAIT could not be looked for: {error:#}");
                }
            }
            guard = programs_log.readable_mut() => {
                let mut guard = guard?;
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        }
    };

    // What was written up to now still counts; nothing is added to it.
    kernel.detach();
    let now = Instant::now();
    while take(&mut ring, &mut connections, now, &mut events) == BATCH {}
    connections.finish(now, &mut events);
    events.retain(|event| options.filter.passes(event));
    losses.check(&kernel, &mut events)?;
    writer.end(queue, events, losses.missed, sockstat).await?;
    outcome
}

/// How often all sockets are looked at, if those are wanted that have been in CLOSE_WAIT for `after`: so that they are
/// not reported much later, and yet a host with very many sockets does not notice.
fn close_wait_period(after: Duration) -> Duration {
    (after / 10).clamp(Duration::from_millis(100), Duration::from_secs(5))
}

/// Moves a batch of records on; answers how many there were.
fn take(ring: &mut Ring, connections: &mut Connections, now: Instant, events: &mut Vec<Event>) -> usize {
    ring.drain(BATCH, |bytes| match decode(bytes) {
        Ok(fact) => connections.fact(fact, now, events),
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
        tokio::time::sleep_until(at.into()).await;
    }
}

/// What the programs could not follow or write, as far as it has been reported.
struct Losses {
    missed: Missed,
    since: Timestamp,
}

impl Losses {
    fn check(&mut self, kernel: &Kernel, events: &mut Vec<Event>) -> Result<()> {
        let Counters { lost, untracked } = kernel.counters()?;
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
        Ok(())
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
fn moment(missed: Missed, sockstat: &Sockstat) -> Moment {
    Moment { time: Timestamp::now(), now: Instant::now(), missed, time_wait_sockets: sockstat.time_wait() }
}

/// Lets no SIGUSR1 end this process before tracing begins; from then on it asks for a summary.
pub fn ignore_usr1() {
    // SAFETY: it is a signal that can be ignored, and no handler is set that could do something wrong.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
}

/// The thread that formats, records and writes.
struct Writer {
    thread: std::thread::JoinHandle<(Reporter, io::Result<()>)>,
    /// Whether it is recorded, too.
    records: bool,
}

impl Writer {
    fn start(mut reporter: Reporter, mut batches: mpsc::Receiver<Batch>, records: bool) -> io::Result<Self> {
        let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
            let mut printed = Ok(());
            while let Some(batch) = batches.blocking_recv() {
                if printed.is_ok() {
                    printed = reporter.take(&batch);
                } else {
                    reporter.record(&batch.events);
                }
                if printed.is_err() {
                    // Nothing more is sent, and tracing ends; what is on its way is still recorded.
                    batches.close();
                }
            }
            (reporter, printed)
        })?;
        Ok(Self { thread, records })
    }

    /// Prints the rest and the summary, unless stdout is closed or nobody reads it.
    async fn end(self, queue: mpsc::Sender<Batch>, rest: Vec<Event>, missed: Missed, sockstat: Sockstat) -> Result<()> {
        let Self { thread, records } = self;
        let finish = tokio::task::spawn_blocking(move || {
            // Fails only where stdout has failed, which is said below; it is still recorded.
            let unsent = queue.blocking_send(Batch { events: rest, ask: None }).err().map(|unsent| unsent.0.events);
            drop(queue);
            let (mut reporter, printed) = thread.join().map_err(|_| io::Error::other("the writer panicked"))?;
            reporter.record(&unsent.unwrap_or_default());
            let printed = reporter.finish(printed, &moment(missed, &sockstat));
            // Last, as the disk may not answer.
            let recorded = reporter.finish_recording();
            Ok::<_, io::Error>((recorded, printed))
        });
        match tokio::time::timeout(GRACE, finish).await {
            Ok(done) => {
                let (recorded, printed) = done??;
                match printed {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                    printed => printed.context("cannot write to stdout")?,
                }
                if recorded { Ok(()) } else { Err(Refusal::recording_incomplete().into()) }
            }
            Err(_) => {
                let code = if records { preflight::exit::INCOMPLETE } else { preflight::exit::SUCCESS };
                let nor = if records { ", or the recording not written," } else { "" };
                warn!("stdout was not read{nor} for {} s: the rest is dropped", GRACE.as_secs());
                // The writer is stuck in a write; nothing else is left to be done.
                std::process::exit(code.into());
            }
        }
    }
}

/// Whether a refusal is behind this error, and with which exit code.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Refusal>().map_or(preflight::exit::FAILURE, |refusal| refusal.code)
}
