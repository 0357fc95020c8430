//! `tracer run`: wires the steps together and ends them in order.
//!
//! Two threads. This one reads the ring buffer and turns records into events; the other formats and writes them. Between
//! them is a bounded queue: when stdout is not read, this thread stops reading, the ring buffer fills, and the programs
//! count what they lose. The traced host is never blocked, and a signal is always heard.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use log::warn;
use tokio::io::Interest;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::connection::Connections;
use crate::decode::decode;
use crate::event::{Event, Lost, Start};
use crate::kernel::{Ask, Attached, Counters, Kernel};
use crate::preflight::{self, Refusal};
use crate::privileges;
use crate::process::Processes;
use crate::ring::{Ring, watch};
use crate::sink::Sink;
use crate::sink::summary::{Missed, Summarizer};
use crate::time_wait::SockDiag;

/// What to trace, and how to print it.
pub struct Options {
    /// What the programs report.
    pub ask: Ask,
    /// The filters as on the command line.
    pub filters: Vec<String>,
    /// End by itself after this time.
    pub duration: Option<Duration>,
    /// How to print.
    pub sink: Sink,
}

/// Batches of events on their way to the writer.
const QUEUE: usize = 64;
/// Records that are turned into one batch.
const BATCH: usize = 1024;
/// How long the writer may take to print the rest after the end.
const GRACE: Duration = Duration::from_secs(2);
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
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the event loop")?;
    runtime.block_on(trace(options, host))
}

async fn trace(options: Options, host: preflight::Host) -> Result<()> {
    // Handlers first: a signal during the start must end it like any other.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    let Attached { mut kernel, ring, looks_until, log } =
        Kernel::attach(&options.ask, &host.cgroup, &host.offsets).map_err(preflight::explain)?;
    privileges::drop_unneeded()?;
    let began = Instant::now();
    let mut ring = Ring::new(ring, looks_until)?;
    let mut programs_log = watch(log, Interest::READABLE)?;
    let mut degraded = host.degraded;
    for missing in kernel.degraded.drain(..) {
        warn!("{missing}");
        degraded.push(missing);
    }
    // Without `/proc` its own namespace is not known; the host's check has said so.
    let mut sock_diag = SockDiag::new().unwrap_or_else(|_| SockDiag::unable());
    if let Err(error) = sock_diag.probe() {
        let missing = preflight::without_sock_diag(&error);
        warn!("{missing}");
        degraded.push(missing);
    }
    let mut connections = Connections::new(Processes::new(), sock_diag, options.ask.states).blind(kernel.blind);

    let (queue, batches) = mpsc::channel::<Vec<Event>>(QUEUE);
    let writer = Writer::start(options.sink, batches, began)?;
    let start = Event::Start(Start {
        time: Timestamp::now(),
        version: env!("CARGO_PKG_VERSION"),
        kernel: preflight::kernel_release(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        filters: options.filters,
        hooks: kernel.hooks.clone(),
        time_wait: time_wait_sockets(),
        degraded,
    });
    let mut losses = Losses { missed: Missed::default(), since: Timestamp::now() };
    let mut loss_check = tokio::time::interval(LOSS_CHECK);
    loss_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut close_wait_check = tokio::time::interval(close_wait_period(options.ask.close_wait_after));
    close_wait_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
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
    let outcome = loop {
        // Room in the queue first: without it nothing is read, and records wait in the ring buffer.
        let full = !events.is_empty();
        let poll_at = connections.next_poll();
        tokio::select! {
            biased;
            _ = interrupt.recv() => break Ok(()),
            _ = terminate.recv() => break Ok(()),
            () = &mut end => break Ok(()),
            () = &mut closed => break Ok(()),
            permit = queue.reserve(), if full => match permit {
                Ok(permit) => permit.send(std::mem::take(&mut events)),
                // The writer has ended: stdout is closed, or failed; it says which.
                Err(_) => break Ok(()),
            },
            ready = ring.ready(), if !full => {
                ready?;
                connections.set_clock();
                let now = Instant::now();
                take(&mut ring, &mut connections, now, &mut events);
            }
            () = until(poll_at), if !full && poll_at.is_some() => {
                connections.poll(Instant::now(), &mut events);
            }
            _ = loss_check.tick(), if !full => {
                losses.check(&kernel, &mut events)?;
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
    losses.check(&kernel, &mut events)?;
    writer.end(queue, events, losses.missed).await?;
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

/// Sockets in TIME_WAIT in the network namespace of tracer, by `/proc/net/sockstat`.
fn time_wait_sockets() -> Option<u64> {
    let sockstat = std::fs::read_to_string("/proc/net/sockstat").ok()?;
    let mut words = sockstat.lines().find(|line| line.starts_with("TCP:"))?.split(' ').skip_while(|word| *word != "tw");
    words.nth(1)?.parse().ok()
}

/// The thread that formats and writes.
struct Writer {
    thread: std::thread::JoinHandle<(Summarizer, Sink, io::Result<()>)>,
    began: Instant,
}

impl Writer {
    fn start(sink: Sink, mut batches: mpsc::Receiver<Vec<Event>>, began: Instant) -> io::Result<Self> {
        let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
            let mut sink = sink;
            let mut summary = Summarizer::new();
            while let Some(batch) = batches.blocking_recv() {
                if let Err(error) = write(&mut sink, &batch, &mut summary) {
                    return (summary, sink, Err(error));
                }
            }
            (summary, sink, Ok(()))
        })?;
        Ok(Self { thread, began })
    }

    /// Prints the rest and the summary, unless stdout is closed or nobody reads it.
    async fn end(self, queue: mpsc::Sender<Vec<Event>>, rest: Vec<Event>, missed: Missed) -> Result<()> {
        let began = self.began;
        let finish = tokio::task::spawn_blocking(move || {
            // Fails only where the writer has ended already, and says why below.
            let _ = queue.blocking_send(rest);
            drop(queue);
            let (summary, mut sink, written) =
                self.thread.join().map_err(|_| io::Error::other("the writer panicked"))?;
            written?;
            let summary = summary.finish(Timestamp::now(), began.elapsed(), missed);
            write(&mut sink, &[Event::Summary(summary)], &mut Summarizer::new())
        });
        match tokio::time::timeout(GRACE, finish).await {
            Ok(done) => match done? {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                done => done.context("cannot write to stdout"),
            },
            Err(_) => {
                warn!("stdout was not read for {} s: the rest is dropped", GRACE.as_secs());
                // The writer is stuck in a write; nothing else is left to be done.
                std::process::exit(preflight::exit::SUCCESS.into());
            }
        }
    }
}

fn write(sink: &mut Sink, events: &[Event], summary: &mut Summarizer) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(64 << 10, io::stdout().lock());
    for event in events {
        match event {
            Event::Close(close) => summary.close(close),
            Event::CloseWait(_) => summary.close_wait(),
            _ => {}
        }
        sink.event(event, &mut out)?;
    }
    out.flush()
}

/// Whether a refusal is behind this error, and with which exit code.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Refusal>().map_or(preflight::exit::FAILURE, |refusal| refusal.code)
}
