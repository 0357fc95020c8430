//! Events in, a recording out; and back.
//!
//! A recording is a header (magic, version, checksum) and then frames: two lengths, a checksum, and one LZ4 block of events
//! in postcard's encoding. A frame is written whole, at the latest [`FLUSH_AFTER`] after its first event, and depends on no
//! other: what a killed run has written can be read. The last event says that the run ended; without it something is missing.
//!
//! The reader takes any bytes: it never panics, checks each length before it allocates, and gives out nothing that its
//! checksum does not cover. Files are written by a thread of their own, behind a bounded queue. What fails, or does not keep
//! up, ends the recording: it must never hold up or end the tracing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::warn;
use serde::{Deserialize, Serialize};

use crate::event::{
    Alert, Cause, Close, ClosedBy, Event, Family, Final, FinalSource, How, Http, Lost, Process, Protocol, Role, Start,
    State, StateAt, TcpState, shared,
};
use crate::sink::summary::Missed;

/// The version that is written, and the newest that can be read. It changes with everything that an older reader would
/// misunderstand: a field or a variant of what an event holds, and their order.
pub const VERSION: u32 = 1;
/// How old an event gets, at most, before it is in the file.
pub const FLUSH_AFTER: Duration = Duration::from_millis(500);

/// No text file and no file of another kind begins like this; and a transfer as text would break it.
const MAGIC: [u8; 8] = *b"\x89TRACE\r\n";
/// Magic, version, CRC-32 of both.
const HEADER: usize = MAGIC.len() + 8;
/// Length of the block as it is stored, length of what is in it, CRC-32 of both lengths and the stored block.
const FRAME_HEADER: usize = 12;
/// A block is written once it holds so many bytes of events.
const BLOCK: usize = 256 << 10;
/// Frames that may wait for the disk: half a minute's, or very many events.
const QUEUE: usize = 64;
/// No block may hold more.
const BLOCK_MAX: usize = 1 << 20;

/// One recorded event, as it is read.
#[derive(Debug, Deserialize)]
enum Entry {
    Start(Start),
    Close(#[serde(with = "CloseEntry")] Close),
    CloseWait(#[serde(with = "CloseEntry")] Close),
    State(#[serde(with = "StateEntry")] State),
    Lost(Lost),
    End(#[serde(with = "EndEntry")] End),
    Alert(Alert),
}

/// The same, as it is written: the variants must stay in the same order.
#[derive(Serialize)]
enum EntryRef<'a> {
    Start(&'a Start),
    Close(#[serde(with = "CloseEntry")] &'a Close),
    CloseWait(#[serde(with = "CloseEntry")] &'a Close),
    State(#[serde(with = "StateEntry")] &'a State),
    Lost(&'a Lost),
    End(#[serde(with = "EndEntry")] &'a End),
    Alert(&'a Alert),
}

/// [`Close`] without the freedoms of JSON: all fields, in this order.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Close")]
struct CloseEntry {
    #[serde(with = "nanoseconds")]
    time: Timestamp,
    cookie: u64,
    netns: u32,
    family: Family,
    local: SocketAddr,
    remote: SocketAddr,
    role: Role,
    #[serde(with = "shared")]
    process: Option<Arc<Process>>,
    closed_by: ClosedBy,
    #[serde(with = "shared")]
    closer: Option<Arc<Process>>,
    how: Option<How>,
    fate: Option<Final>,
    fate_source: Option<FinalSource>,
    states: Vec<StateAt>,
    duration_us: u64,
    started_before: bool,
    idle_us: Option<u64>,
    rx_bytes: u64,
    tx_bytes: u64,
    protocol: Protocol,
    http: Option<Http>,
    cause: Cause,
}

/// [`State`], likewise.
#[derive(Serialize, Deserialize)]
#[serde(remote = "State")]
struct StateEntry {
    #[serde(with = "nanoseconds")]
    time: Timestamp,
    cookie: u64,
    netns: u32,
    local: SocketAddr,
    remote: SocketAddr,
    role: Role,
    #[serde(with = "shared")]
    process: Option<Arc<Process>>,
    old: TcpState,
    new: TcpState,
    delta_us: Option<u64>,
    closed_by: ClosedBy,
    http: Option<Http>,
}

/// How the run ended: what its summary says beyond what the events do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// When tracing ended.
    pub time: Timestamp,
    /// How long it ran.
    pub ran: Duration,
    /// What it missed.
    pub missed: Missed,
    /// Sockets in TIME_WAIT then, if the kernel said.
    pub time_wait_sockets: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "End")]
struct EndEntry {
    #[serde(with = "nanoseconds")]
    time: Timestamp,
    ran: Duration,
    #[serde(with = "MissedEntry")]
    missed: Missed,
    time_wait_sockets: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Missed")]
struct MissedEntry {
    lost: u64,
    untracked: u64,
}

/// A time as nanoseconds since the epoch: a third of the text's length, and nothing to parse.
mod nanoseconds {
    use super::{Deserialize as _, Timestamp};
    use serde::{Deserializer, Serializer, de, ser};

    pub(super) fn serialize<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        let time = i64::try_from(time.as_nanosecond()).map_err(|_| ser::Error::custom("a time after 2262"))?;
        serializer.serialize_i64(time)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        let time = i64::deserialize(deserializer)?;
        Timestamp::from_nanosecond(i128::from(time)).map_err(de::Error::custom)
    }
}

/// Writes a recording.
#[derive(Debug)]
pub struct Recorder<W: Write> {
    out: W,
    /// Events that are not written yet, encoded.
    block: Vec<u8>,
    /// When the first of them came.
    since: Instant,
    /// The frame in the making.
    frame: Vec<u8>,
}

impl<W: Write> Recorder<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(mut out: W) -> io::Result<Self> {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let sum = crc32fast::hash(&header[..12]);
        header[12..].copy_from_slice(&sum.to_le_bytes());
        out.write_all(&header)?;
        Ok(Self { out, block: Vec::with_capacity(BLOCK + 4096), since: Instant::now(), frame: Vec::new() })
    }

    /// Records one event; it is in the file after [`Self::flush`]. A summary is not recorded: it follows from the rest,
    /// and from what is given to [`Self::end`].
    ///
    /// # Errors
    /// Those of `out`.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        self.entry(&match event {
            Event::Start(start) => EntryRef::Start(start),
            Event::Close(close) => EntryRef::Close(close),
            Event::CloseWait(open) => EntryRef::CloseWait(open),
            Event::State(state) => EntryRef::State(state),
            Event::Lost(lost) => EntryRef::Lost(lost),
            Event::Alert(alert) => EntryRef::Alert(alert),
            Event::Summary(_) => return Ok(()),
        })
    }

    fn entry(&mut self, entry: &EntryRef<'_>) -> io::Result<()> {
        if self.block.is_empty() {
            self.since = Instant::now();
        }
        let block = std::mem::take(&mut self.block);
        self.block = postcard::to_extend(entry, block).map_err(io::Error::other)?;
        // Far less is the rule: what one event may hold is bounded by paths, which are.
        if self.block.len() > BLOCK_MAX {
            return Err(io::Error::other("an event is too long to be recorded"));
        }
        if self.block.len() >= BLOCK { self.flush() } else { Ok(()) }
    }

    /// Writes what waits, if it has waited for [`FLUSH_AFTER`].
    ///
    /// # Errors
    /// Those of `out`.
    pub fn flush_if_due(&mut self, now: Instant) -> io::Result<()> {
        if now.saturating_duration_since(self.since) >= FLUSH_AFTER { self.flush() } else { Ok(()) }
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        self.frame.resize(FRAME_HEADER + lz4_flex::block::get_maximum_output_size(self.block.len()), 0);
        let stored = lz4_flex::block::compress_into(&self.block, &mut self.frame[FRAME_HEADER..])
            .map_err(|error| io::Error::other(format!("LZ4: {error}")))?;
        self.frame.truncate(FRAME_HEADER + stored);
        self.frame[..4].copy_from_slice(&length(stored)?);
        self.frame[4..8].copy_from_slice(&length(self.block.len())?);
        let sum = frame_sum(&self.frame[..8], &self.frame[FRAME_HEADER..]);
        self.frame[8..12].copy_from_slice(&sum.to_le_bytes());
        self.block.clear();
        self.out.write_all(&self.frame)
    }

    /// Records that the run ended, and writes all. Without this the recording counts as that of a killed run.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn end(&mut self, end: &End) -> io::Result<()> {
        self.entry(&EntryRef::End(end))?;
        self.flush()
    }

    /// What was written to.
    pub fn into_inner(self) -> W {
        self.out
    }
}

fn length(len: usize) -> io::Result<[u8; 4]> {
    Ok(u32::try_from(len).map_err(io::Error::other)?.to_le_bytes())
}

fn frame_sum(lengths: &[u8], stored: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(lengths);
    sum.update(stored);
    sum.finalize()
}

/// Where a run is recorded to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The file.
    pub path: PathBuf,
    /// Replace it if it exists.
    pub overwrite: bool,
}

/// Makes a file that only its owner can read: addresses, paths and names are nobody else's business.
///
/// It must not exist, unless `overwrite` says so; then a regular file is replaced, never written through: a symbolic link is
/// not followed.
///
/// # Errors
/// Those of the file system; that it exists, with the remedy.
pub fn create_private(path: &Path, overwrite: bool) -> io::Result<File> {
    let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if !overwrite {
                let said = "it exists; give another name, or --overwrite";
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, said));
            }
            if !fs::symlink_metadata(path)?.is_file() {
                return Err(io::Error::other("it is no regular file, and is not overwritten"));
            }
            fs::remove_file(path)?;
            create()
        }
        file => file,
    }
}

/// A file that is written by a thread of its own: a disk that stalls must not hold up who writes.
#[derive(Debug)]
struct Behind {
    /// Both are `None` once the thread has been waited for.
    queue: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Behind {
    fn start(mut file: File) -> io::Result<Self> {
        let (queue, frames) = sync_channel::<Vec<u8>>(QUEUE);
        let thread = std::thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || frames.into_iter().try_for_each(|frame| file.write_all(&frame)))?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Waits until all is written.
    fn finish(&mut self) -> io::Result<()> {
        self.queue = None;
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| io::Error::other("the recorder panicked"))?
    }
}

impl Write for Behind {
    /// Takes all or nothing.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(queue) = &self.queue else { return Err(io::ErrorKind::BrokenPipe.into()) };
        match queue.try_send(bytes.to_vec()) {
            Ok(()) => Ok(bytes.len()),
            // The thread is stuck in a write, and is left there.
            Err(TrySendError::Full(_)) => Err(io::Error::other("the disk does not keep up")),
            Err(TrySendError::Disconnected(_)) => Err(self.finish().err().unwrap_or(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Nothing to do: who wants to know when all is written calls [`Self::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The recording of a run: what fails is said once, and ends the recording only.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The file is there, and nothing in it.
    Made(File),
    Recording(Recorder<Behind>),
    Failed,
}

impl Recording {
    /// Makes the file. No thread is started before there is something to record.
    ///
    /// # Errors
    /// It exists, or cannot be made.
    pub fn create(target: &Target) -> io::Result<Self> {
        // Beyond RLIMIT_FSIZE a write must fail, as on a full disk, not end the tracing.
        // SAFETY: no handler is set.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let file = create_private(&target.path, target.overwrite)?;
        Ok(Self { path: target.path.clone(), stage: Stage::Made(file) })
    }

    /// Records a batch of events. What waits is written when it is old enough; with an empty batch, in any case.
    pub fn events(&mut self, events: &[Event]) {
        self.attempt(|recorder| {
            for event in events {
                recorder.event(event)?;
            }
            if events.is_empty() { recorder.flush() } else { recorder.flush_if_due(Instant::now()) }
        });
    }

    /// Records that the run ended.
    pub fn end(&mut self, end: &End) {
        self.attempt(|recorder| recorder.end(end));
    }

    /// Waits until all is written; answers whether it is.
    #[must_use]
    pub fn finish(mut self) -> bool {
        self.attempt(|recorder| recorder.out.finish());
        !matches!(self.stage, Stage::Failed)
    }

    fn attempt(&mut self, write: impl FnOnce(&mut Recorder<Behind>) -> io::Result<()>) {
        let written = match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Failed => return,
            Stage::Made(file) => Behind::start(file).and_then(Recorder::new),
            Stage::Recording(recorder) => Ok(recorder),
        }
        .and_then(|mut recorder| write(&mut recorder).map(|()| recorder));
        match written {
            Ok(recorder) => self.stage = Stage::Recording(recorder),
            Err(error) => warn!(
                "cannot write to {} ({error}): the recording ends here, and is incomplete; tracing goes on",
                self.path.display()
            ),
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // The run did not start: no file is left that looks like a recording of it.
        if matches!(self.stage, Stage::Made(_)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a recording cannot be read, or not any further. What was read before holds.
#[derive(Debug)]
pub enum Unreadable {
    /// It is none.
    NotARecording,
    /// A newer version of the format.
    Newer(u32),
    /// It ends without its end.
    Unfinished {
        /// Bytes up to the last whole frame.
        at: u64,
    },
    /// The bytes are not those that were written.
    Damaged {
        /// Where the frame begins.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Reading failed.
    Io(io::Error),
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotARecording => {
                f.write_str("this is no recording of tracer: make one with tracer run --record FILE")
            }
            Self::Newer(version) => write!(
                f,
                "a newer tracer has written this (format {version}; this one reads up to {VERSION}): \
                 use that tracer, or a newer one"
            ),
            Self::Unfinished { at } => write!(
                f,
                "the recording stops at byte {at} without its end: its run still goes on, was killed or had no room, or the \
                 file was cut short; everything before is reported"
            ),
            Self::Damaged { at, what } => write!(
                f,
                "the recording is damaged at byte {at} ({what}): everything before is reported, nothing after it; copy it \
                 again from where it was made"
            ),
            Self::Io(error) => write!(f, "cannot read the recording: {error}"),
        }
    }
}

impl std::error::Error for Unreadable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            // Its own words are among ours.
            Self::Io(error) => error.source(),
            _ => None,
        }
    }
}

/// What a recording holds.
#[derive(Debug)]
pub enum Recorded {
    /// An event; never a summary.
    Event(Event),
    /// The run's end: nothing comes after it.
    End(End),
}

/// Reads a recording; holds one frame at a time.
#[derive(Debug)]
pub struct Reader<R: Read> {
    input: R,
    /// Bytes read up to the frame in `block`, and with it.
    begin: u64,
    end: u64,
    stored: Vec<u8>,
    block: Vec<u8>,
    /// How far `block` is decoded.
    at: usize,
    over: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It is no recording, a newer one, or cannot be read.
    pub fn new(mut input: R) -> Result<Self, Unreadable> {
        let mut header = [0; HEADER];
        let got = fill(&mut input, &mut header).map_err(Unreadable::Io)?;
        if got < MAGIC.len() || header[..8] != MAGIC {
            return Err(Unreadable::NotARecording);
        }
        if got < HEADER {
            return Err(Unreadable::Unfinished { at: 0 });
        }
        if crc32fast::hash(&header[..12]) != word(&header, 12) {
            return Err(Unreadable::Damaged { at: 0, what: "its header" });
        }
        let version = word(&header, 8);
        if version > VERSION {
            return Err(Unreadable::Newer(version));
        }
        let at = HEADER as u64;
        Ok(Self { input, begin: at, end: at, stored: Vec::new(), block: Vec::new(), at: 0, over: false })
    }

    /// The next event, or the end; `None` after it.
    ///
    /// # Errors
    /// Why it cannot be read any further; nothing comes after an error.
    #[expect(clippy::should_implement_trait, reason = "after an error there is no next item")]
    pub fn next(&mut self) -> Result<Option<Recorded>, Unreadable> {
        if self.over {
            return Ok(None);
        }
        let next = self.read();
        self.over = !matches!(next, Ok(Recorded::Event(_)));
        next.map(Some)
    }

    fn read(&mut self) -> Result<Recorded, Unreadable> {
        if self.at == self.block.len() {
            self.frame()?;
        }
        let damaged = |what| Unreadable::Damaged { at: self.begin, what };
        let (entry, rest) = postcard::take_from_bytes::<Entry>(&self.block[self.at..])
            .map_err(|_| damaged("an event that cannot be understood"))?;
        self.at = self.block.len() - rest.len();
        Ok(Recorded::Event(match entry {
            Entry::Start(start) => Event::Start(start),
            Entry::Close(close) => Event::Close(Box::new(close)),
            Entry::CloseWait(open) => Event::CloseWait(Box::new(open)),
            Entry::State(state) => Event::State(Box::new(state)),
            Entry::Lost(lost) => Event::Lost(lost),
            Entry::Alert(alert) => Event::Alert(Box::new(alert)),
            Entry::End(end) => {
                let mut more = [0];
                if self.at < self.block.len() || fill(&mut self.input, &mut more).map_err(Unreadable::Io)? > 0 {
                    return Err(Unreadable::Damaged { at: self.end, what: "something comes after its end" });
                }
                return Ok(Recorded::End(end));
            }
        }))
    }

    /// Reads the next frame into `block`.
    fn frame(&mut self) -> Result<(), Unreadable> {
        self.begin = self.end;
        let at = self.begin;
        let damaged = |what| Unreadable::Damaged { at, what };
        let mut header = [0; FRAME_HEADER];
        if fill(&mut self.input, &mut header).map_err(Unreadable::Io)? < FRAME_HEADER {
            return Err(Unreadable::Unfinished { at });
        }
        let (stored, len) = (word(&header, 0) as usize, word(&header, 4) as usize);
        if len == 0 || len > BLOCK_MAX || stored > lz4_flex::block::get_maximum_output_size(len) {
            return Err(damaged("a length that cannot be"));
        }
        self.stored.resize(stored, 0);
        if fill(&mut self.input, &mut self.stored).map_err(Unreadable::Io)? < stored {
            return Err(Unreadable::Unfinished { at });
        }
        if frame_sum(&header[..8], &self.stored) != word(&header, 8) {
            return Err(damaged("its checksum is another"));
        }
        self.block.resize(len, 0);
        self.at = 0;
        if !lz4_flex::block::decompress_into(&self.stored, &mut self.block).is_ok_and(|got| got == len) {
            return Err(damaged("its compression"));
        }
        self.end = at + (FRAME_HEADER + stored) as u64;
        Ok(())
    }
}

/// Reads as much as there is, up to the length of `into`; answers how much that was.
fn fill(input: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < into.len() {
        match input.read(&mut into[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    /// A pipe that nobody reads stands for it.
    #[test]
    fn a_disk_that_stalls_ends_the_recording_only() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let mut behind = Behind::start(File::from(OwnedFd::from(writer))).expect("a thread");
        let begun = Instant::now();
        // More than a pipe takes by itself.
        let frame = vec![0; 1 << 20];
        let failed = (0..QUEUE + 2).find_map(|_| behind.write_all(&frame).err()).expect("it is full");
        assert_eq!(failed.to_string(), "the disk does not keep up");
        assert!(begun.elapsed() < Duration::from_secs(10), "nobody waited for the disk");
        // The thread ends when its write does.
        drop(reader);
        assert_eq!(behind.finish().expect_err("nobody reads").kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_the_disk_says_is_told() {
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        let mut behind = Behind::start(File::from(OwnedFd::from(writer))).expect("a thread");
        let failed = (0..10_000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            behind.write_all(b"frame").err()
        });
        assert_eq!(failed.expect("it failed").kind(), io::ErrorKind::BrokenPipe);
        assert!(behind.write_all(b"frame").is_err(), "for good");
    }
}
