//! The thread that has the kernel walk over open files and sockets, from time to time. What the walks find comes through the ring, like
//! everything else. What comes in here is only that slots are wanted, and that it is to end.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use log::{debug, warn};

use crate::kernel::{Over, Walk};

/// The least time between two walks over files: by then what the first one has marked, the second one moves.
const HURRY: Duration = Duration::from_secs(1);

/// The thread that walks.
pub(super) struct Walker {
    wishes: mpsc::SyncSender<()>,
    /// Never anything but disconnected.
    ended: mpsc::Receiver<()>,
}

/// When a walk is made.
struct Schedule {
    period: Duration,
    next: Instant,
    /// Not before, also if there is need.
    earliest: Instant,
}

impl Schedule {
    fn new(period: Duration) -> Self {
        let now = Instant::now();
        Self { period, next: now + period, earliest: now }
    }

    /// One was made now, and took so much time of a processor: two never take more than a hundredth.
    fn made(&mut self, took: Duration) {
        let now = Instant::now();
        self.next = now + self.period.max(took * 200);
        self.earliest = now + HURRY.max(took * 200);
    }
}

impl Walker {
    /// Starts it; `after`: which sockets in CLOSE_WAIT are wanted.
    ///
    /// # Errors
    /// There can be no more threads.
    pub(super) fn start(walks: Vec<Walk>, after: Duration) -> io::Result<Self> {
        let (wishes, wished) = mpsc::sync_channel(1);
        let (ends, ended) = mpsc::sync_channel(0);
        Builder::new().name("walker".to_owned()).spawn(move || {
            let _ends = ends;
            walk(&walks, after, &wished);
        })?;
        Ok(Self { wishes, ended })
    }

    /// Sockets find their slots taken, so those that are idle shall leave.
    pub(super) fn hurry(&self) {
        // One wish is enough.
        let _ = self.wishes.try_send(());
    }

    /// Ends it, after the walk that it is at, or with this process.
    pub(super) fn end(self) {
        let Self { wishes, ended } = self;
        drop(wishes);
        // What others close while a walk has it in hand, that thread closes, and that can take long (`SO_LINGER`).
        if ended.recv_timeout(HURRY) == Err(RecvTimeoutError::Timeout) {
            warn!("a walk over open files is not over yet; it ends with this process");
        }
    }
}

fn walk(walks: &[Walk], after: Duration, wished: &mpsc::Receiver<()>) {
    let storage_too = walks.iter().any(|walk| walk.over == Over::Storage);
    let mut walks: Vec<_> =
        walks.iter().map(|walk| (walk, Schedule::new(period(after, walk.over, storage_too)))).collect();
    while let Some(next) = walks.iter().map(|(_, schedule)| schedule.next).min() {
        match wished.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(()) => {
                for (_, schedule) in walks.iter_mut().filter(|(walk, _)| walk.makes_room) {
                    schedule.next = schedule.next.min(schedule.earliest);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        for (walk, schedule) in &mut walks {
            if schedule.next > Instant::now() {
                continue;
            }
            let took = walk.run().unwrap_or_else(|error| {
                warn!("idle sockets and those in CLOSE_WAIT could not be looked for: {error:#}");
                Duration::ZERO
            });
            debug!("the walk over {:?} took {took:?}", walk.over);
            schedule.made(took);
        }
    }
}

/// How often there is a walk, if sockets are wanted that have been in CLOSE_WAIT for `after`: so that they are not reported much later.
/// Over files there are fewer where a walk over storage finds most of those sockets.
fn period(after: Duration, over: Over, storage_too: bool) -> Duration {
    if over == Over::Files && storage_too {
        (after / 2).clamp(Duration::from_millis(100), Duration::from_secs(30))
    } else {
        (after / 10).clamp(Duration::from_millis(100), Duration::from_secs(5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_are_as_often_as_is_wanted_and_never_take_much() {
        let second = Duration::from_secs(1);
        assert_eq!(period(60 * second, Over::Storage, true), 5 * second);
        assert_eq!(period(60 * second, Over::Files, true), 30 * second);
        // Where it is the only one.
        assert_eq!(period(60 * second, Over::Files, false), 5 * second);
        assert_eq!(period(second / 1000, Over::Files, true), second / 10);

        let mut schedule = Schedule::new(5 * second);
        let before = Instant::now();
        schedule.made(Duration::from_micros(100));
        assert!(schedule.next >= before + 5 * second && schedule.next < before + 6 * second);
        assert!(schedule.earliest >= before + HURRY && schedule.earliest < before + 2 * HURRY);
        let before = Instant::now();
        schedule.made(second / 5);
        assert!(schedule.next >= before + 40 * second && schedule.earliest >= before + 40 * second);
    }
}
