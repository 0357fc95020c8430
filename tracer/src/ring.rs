//! The ring buffer's reader: bytes of records out, as soon as it pays to look.
//!
//! The programs wake the reader at most every 5 ms, because a wake-up costs more than everything else they do. So after a
//! wake-up the reader looks twice: at once, and [`PAUSE`] later, when everything that was written without a wake-up is
//! there. While records keep coming it goes on like this; on an idle host it sleeps until the next wake-up.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// Between two looks; more than the 5 ms within which the programs do not wake again.
const PAUSE: Duration = Duration::from_millis(10);

/// Waits for `fd` in the event loop.
///
/// # Errors
/// It cannot be waited for: a file, for example.
pub(crate) fn watch<T: AsFd + AsRawFd>(fd: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: what implements `AsFd` has an open descriptor while it lives; those that are passed here (a map, a log, a
    // duplicate of stdout) own theirs and never change it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// The reading end.
pub struct Ring {
    ring: AsyncFd<RingBuf<MapData>>,
    /// Something may come without a wake-up: look again then.
    look_at: Option<Instant>,
}

impl Ring {
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The buffer's descriptor cannot be waited for.
    pub fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        Ok(Self { ring: watch(ring, Interest::READABLE)?, look_at: Some(Instant::now()) })
    }

    /// Waits until there may be records. May be dropped and called again at any time: that delays nothing.
    ///
    /// # Errors
    /// Waiting failed.
    pub async fn ready(&mut self) -> io::Result<()> {
        if let Some(at) = self.look_at {
            tokio::time::sleep_until(at).await;
            self.look_at = None;
        } else {
            self.ring.readable().await?.clear_ready();
            self.look_at = Some(Instant::now() + PAUSE);
        }
        Ok(())
    }

    /// Passes at most `most` records on, oldest first; answers how many there were.
    pub fn drain(&mut self, most: usize, mut record: impl FnMut(&[u8])) -> usize {
        let ring = self.ring.get_mut();
        let mut count = 0;
        while count < most
            && let Some(item) = ring.next()
        {
            record(&item);
            count += 1;
        }
        if count > 0 {
            // At once if some may be left.
            self.look_at = Some(if count == most { Instant::now() } else { Instant::now() + PAUSE });
        }
        count
    }
}
