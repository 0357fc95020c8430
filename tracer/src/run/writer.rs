//! Lines in, stdout out: the thread that may be held up by whoever reads it.
//!
//! Lines come in chunks, through a bounded queue, and each chunk goes out in few writes. The buffers come back to be filled
//! again. Nothing is formatted here, and nothing but stdout is waited for: what an event is made of never changes threads.

use std::future::Future;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;

use crate::preflight::{self, Refusal};
use crate::reporter::Reporter;

/// Chunks on their way. Each holds what was made of at most so many records as are read at once.
const QUEUE: usize = 4;
/// Buffers that may wait to be filled again.
const SPARE: usize = 2;
/// A larger one is given back to the allocator.
const SPARE_MAX: usize = 1 << 20;
/// Bytes in the pipe to whoever reads stdout: as much as anybody may ask for (`/proc/sys/fs/pipe-max-size`).
const PIPE: libc::c_int = 1 << 20;
/// As long as many other processes may keep the writer, or the reader of stdout, from a processor: also while very many
/// connections end at once.
const MOMENT: Duration = Duration::from_secs(3);
/// Bytes that are written at once, in whole lines: stdout has taken them, or has not.
const PIECE: usize = 64 << 10;
/// After the end, how long the writer may take for a piece.
const GRACE: Duration = Duration::from_secs(2);
/// The same, for the rest as a whole; and for a piece, where stdout takes more: then it is the writer that is kept waiting, for a
/// processor or a disk.
const BUSY: Duration = Duration::from_secs(20);

/// The thread that writes.
pub(super) struct Writer {
    queue: mpsc::Sender<Vec<u8>>,
    spare: std_mpsc::Receiver<Vec<u8>>,
    thread: std::thread::JoinHandle<io::Result<()>>,
    /// Since when the queue was full whenever it was looked at.
    full_since: Option<Instant>,
    /// Pieces of chunks that stdout has taken.
    taken: Arc<AtomicU64>,
    /// Since when there is only the rest.
    ending_since: Option<Instant>,
    /// The rest is not read, and dropped.
    dropping: bool,
}

/// Makes room for more lines in the pipe that stdout may be: each time that it is full, the writer waits for the reader to be
/// woken, and is woken itself.
pub(super) fn widen_stdout() {
    let stdout = io::stdout().as_raw_fd();
    // SAFETY: no memory is passed, and stdout stays what it is.
    let size = unsafe { libc::fcntl(stdout, libc::F_GETPIPE_SZ) };
    // Negative: it is no pipe.
    if (0..PIPE).contains(&size) {
        // Refused where the user has many such pipes: then there are more wake-ups, and no more harm than that.
        // SAFETY: as above.
        unsafe { libc::fcntl(stdout, libc::F_SETPIPE_SZ, PIPE) };
    }
}

impl Writer {
    /// Starts it.
    ///
    /// # Errors
    /// There can be no more threads.
    pub(super) fn start() -> io::Result<Self> {
        let (queue, mut chunks) = mpsc::channel::<Vec<u8>>(QUEUE);
        let (used, spare) = std_mpsc::sync_channel(SPARE);
        let taken = Arc::<AtomicU64>::default();
        let count = Arc::clone(&taken);
        let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
            let mut out = io::stdout().lock();
            while let Some(mut chunk) = chunks.blocking_recv() {
                let mut rest = chunk.as_slice();
                while !rest.is_empty() {
                    let (piece, behind) = rest.split_at(whole_lines(rest));
                    out.write_all(piece)?;
                    out.flush()?;
                    count.fetch_add(1, Ordering::Relaxed);
                    rest = behind;
                }
                chunk.clear();
                if chunk.capacity() <= SPARE_MAX {
                    // There may be enough of them.
                    let _ = used.try_send(chunk);
                }
            }
            Ok(())
        })?;
        Ok(Self { queue, spare, thread, full_since: None, taken, ending_since: None, dropping: false })
    }

    /// Waits for room, and then takes the lines; leaves a buffer without any. May be dropped and called again: then none
    /// were taken. Nor are they where nobody writes any more, see [`Writer::ended`].
    pub(super) async fn send(&self, lines: &mut Vec<u8>) {
        if let Ok(permit) = self.queue.reserve().await {
            permit.send(std::mem::replace(lines, self.spare.try_recv().unwrap_or_default()));
        }
    }

    /// Whether stdout takes less than there is, and not only for a moment. To be asked whenever there are more lines.
    pub(super) fn is_slow(&mut self) -> bool {
        if self.queue.capacity() > 0 {
            self.full_since = None;
            return false;
        }
        self.full_since.get_or_insert_with(Instant::now).elapsed() > MOMENT
    }

    /// [`Writer::send`] for lines of the rest, after the end; they are dropped where nobody reads them.
    pub(super) async fn send_last(&mut self, lines: &mut Vec<u8>) {
        if lines.is_empty() {
            return;
        }
        let since = *self.ending_since.get_or_insert_with(Instant::now);
        if !self.dropping {
            self.dropping = while_it_is_read(self.send(lines), &self.taken, since).await.is_none();
        }
        // Also where stdout has failed: then they were not taken.
        lines.clear();
    }

    /// Waits until nobody writes any more, even while there is nothing to write. May be dropped and called again.
    pub(super) async fn ended(&self) {
        self.queue.closed().await;
    }

    /// Prints the last lines, unless stdout is closed or nobody reads it, and ends the recording.
    ///
    /// # Errors
    /// Stdout failed; the recording is incomplete. Where nobody reads the last lines the process ends here,
    /// and that is a failure if it is `strict`.
    pub(super) async fn end(self, lines: Vec<u8>, reporter: Reporter, strict: bool) -> Result<()> {
        let Self { queue, thread, taken, ending_since, dropping, .. } = self;
        let since = ending_since.unwrap_or_else(Instant::now);
        // Each for itself: the disk may not answer, or the reader of stdout.
        let recorded = tokio::task::spawn_blocking(move || reporter.finish_recording());
        let printed = tokio::task::spawn_blocking(move || {
            // Fails only where stdout has failed, which is said below.
            let _ = queue.blocking_send(lines);
            drop(queue);
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
        });
        let printed = async { if dropping { None } else { while_it_is_read(printed, &taken, since).await } };
        let (recorded, printed) = tokio::join!(tokio::time::timeout(GRACE, recorded), printed);
        let grace = GRACE.as_secs();
        let recorded = match recorded {
            Ok(done) => done?,
            Err(_) => {
                warn!("the recording could not be ended in {grace} s");
                false
            }
        };
        let Some(printed) = printed else {
            warn!("stdout was not read for {grace} s, or too slowly: the rest is dropped");
            let code = match (recorded, strict) {
                (false, _) => preflight::exit::INCOMPLETE,
                (true, true) => preflight::exit::UNACCOUNTED,
                (true, false) => preflight::exit::SUCCESS,
            };
            // The writer is stuck in a write; nothing else is left to be done.
            std::process::exit(code.into());
        };
        match printed? {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                if strict {
                    return Err(Refusal::unaccounted("stdout was closed before all was written").into());
                }
            }
            printed => printed.context("cannot write to stdout")?,
        }
        if recorded { Ok(()) } else { Err(Refusal::recording_incomplete().into()) }
    }
}

/// Bytes of the first lines that are a piece; of the first line, if it is longer.
fn whole_lines(lines: &[u8]) -> usize {
    let Some((piece, behind)) = lines.split_at_checked(PIECE) else { return lines.len() };
    let is_end = |byte: &u8| *byte == b'\n';
    let end = piece.iter().rposition(is_end).or_else(|| Some(PIECE + behind.iter().position(is_end)?));
    end.map_or(lines.len(), |last| last + 1)
}

/// Waits until the rest is `printed`, which began at `since`; `None`: nobody reads it.
async fn while_it_is_read<T>(printed: impl Future<Output = T>, taken: &AtomicU64, since: Instant) -> Option<T> {
    let mut printed = pin!(printed);
    let mut before = taken.load(Ordering::Relaxed);
    loop {
        let within = GRACE.min(BUSY.saturating_sub(since.elapsed()));
        if let Ok(done) = tokio::time::timeout(within, &mut printed).await {
            return Some(done);
        }
        let now = taken.load(Ordering::Relaxed);
        let goes_on = std::mem::replace(&mut before, now) != now || takes_more();
        if !goes_on || since.elapsed() >= BUSY {
            return None;
        }
    }
}

/// Whether stdout could be written to now.
fn takes_more() -> bool {
    let stdout = io::stdout();
    let mut polled = [PollFd::new(&stdout, PollFlags::OUT)];
    poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::OUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_lines() {
        let lines = "x".repeat(999) + "\n";
        let lines = lines.repeat(200);
        let (mut rest, mut pieces) = (lines.as_bytes(), 0);
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(whole_lines(rest));
            assert!(piece.len() <= PIECE && piece.ends_with(b"\n"));
            (rest, pieces) = (behind, pieces + 1);
        }
        assert_eq!(pieces, 4);
        let long = [b'x'; PIECE + 10];
        assert_eq!(whole_lines(&long), long.len(), "one line");
        assert_eq!(whole_lines(&[&long[..], b"\nb\n"].concat()), long.len() + 1, "the first one");
        assert_eq!(whole_lines(b"a\nb"), 3, "all of what is short");
    }
}
