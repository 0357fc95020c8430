//! The ring buffer's reader: bytes of records out, as soon as it pays to look.
//!
//! A wake-up costs more than everything else that the programs do. So the reader, once woken, looks by itself every
//! [`PAUSE`] for as long as it finds records, and tells the programs until when it will: under load there are no wake-ups.
//! When it finds none it looks once more, when that time has passed and everything that was written without a wake-up is
//! there; then it sleeps until the next one. An idle host costs nothing.
//!
//! To copy a record takes a small part of what it takes to deal with it. So when they come faster than they are dealt with (a
//! server with 100,000 connections ends), they are copied out of the ring, into a [`Backlog`], after each batch.

mod backlog;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use aya::maps::{Array, MapData, RingBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;
use tracer_ebpf::{Record, WAKEUP_NS};

use self::backlog::Backlog;
use crate::connection::monotonic_ns;

/// Records of a batch: between two of them other things are done.
const BATCH: usize = 1024;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);
/// How long after a look the programs need not wake the reader: longer than [`PAUSE`], for a look that comes late.
const UNWOKEN: Duration = Duration::from_millis(15);
/// A program may have looked at the clock a moment before it writes its record. Also after [`WAKEUP_NS`].
const LATE: Duration = Duration::from_millis(5);

/// Waits for `fd` in the event loop.
///
/// # Errors
/// It cannot be waited for: a file, for example.
pub(crate) fn watch<T: AsFd + AsRawFd>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: what implements `AsFd` has an open descriptor while it lives; those that are passed here (a map, a log, a
    // duplicate of stdout) own theirs and never change it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Waits until then, and never less than for one turn of the event loop, in which signals come in. (The shortest sleep would take a
/// millisecond.)
pub(crate) async fn until(at: Instant) {
    if at <= Instant::now() {
        tokio::task::yield_now().await;
    } else {
        tokio::time::sleep_until(at).await;
    }
}

/// The reading end.
pub struct Ring {
    ring: AsyncFd<RingBuf<MapData>>,
    /// What comes before all that is in the ring.
    backlog: Backlog,
    /// Records of a batch: at most a quarter of what the ring holds, or there would be no room for more meanwhile.
    batch: usize,
    /// Something may come without a wake-up: look again then.
    look_at: Option<Instant>,
    /// The programs' word for it: until when they wake nobody.
    looks_until: Array<MapData, u64>,
    /// From when on everything is there that came without a wake-up.
    settled_at: Instant,
}

impl Ring {
    /// A ring of so many bytes. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The buffer's descriptor cannot be waited for.
    pub fn new(ring: RingBuf<MapData>, bytes: u32, looks_until: Array<MapData, u64>) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            ring: watch(ring, Interest::READABLE)?,
            backlog: Backlog::default(),
            batch: (bytes as usize / size_of::<Record>() / 4).clamp(1, BATCH),
            look_at: Some(now),
            looks_until,
            settled_at: now,
        })
    }

    /// Waits until there may be records. May be dropped and called again at any time: that delays nothing.
    ///
    /// # Errors
    /// Waiting failed.
    pub async fn ready(&mut self) -> io::Result<()> {
        if let Some(at) = self.look_at {
            until(at).await;
            self.look_at = None;
        } else {
            self.ring.readable().await?.clear_ready();
            self.settled_at = Instant::now() + Duration::from_nanos(WAKEUP_NS) + LATE;
        }
        Ok(())
    }

    /// Passes a batch of records on, oldest first; answers whether there may be more. Then they are copied out of the ring,
    /// unless they are to be left there: where it is not this thread that is too slow, more memory would only put off the loss.
    pub fn drain(&mut self, leave: bool, mut record: impl FnMut(&[u8])) -> bool {
        let ring = self.ring.get_mut();
        let mut count = 0;
        while count < self.batch {
            if !self.backlog.pop(&mut record) {
                let Some(item) = ring.next() else { break };
                record(&item);
            }
            count += 1;
        }
        if count == self.batch {
            self.look_at = Some(Instant::now());
            if !leave {
                self.set_aside();
            }
        } else if count > 0 {
            let unwoken = u64::try_from(UNWOKEN.as_nanos()).unwrap_or(0);
            // Where that fails there are more wake-ups, and no more harm than that.
            let told = self.looks_until.set(0, monotonic_ns() + unwoken, 0).is_ok();
            // Behind it: this thread may have been kept waiting just then.
            let now = Instant::now();
            if told {
                self.settled_at = now + UNWOKEN + LATE;
            }
            self.look_at = Some(now + PAUSE);
        } else if Instant::now() < self.settled_at {
            self.look_at = Some(self.settled_at);
        }
        count == self.batch
    }

    /// Copies what is there out of the ring; [`Ring::drain`] passes it on later.
    pub fn set_aside(&mut self) {
        let ring = self.ring.get_mut();
        while self.backlog.has_room()
            && let Some(item) = ring.next()
        {
            self.backlog.push(&item);
        }
        // What waits there wakes nobody.
        self.look_at = Some(Instant::now());
    }
}
