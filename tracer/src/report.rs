//! A recording in; what its run would have printed out, or one HTML page.
//!
//! The same sinks and the same summary as live, on any machine and without privileges. Events are read, filtered and printed
//! one by one: the memory that this takes does not depend on the recording's length. A recording that cannot be read to its
//! end is reported up to there, with its summary, and then said to be incomplete.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::event::Event;
use crate::filter::Filter;
use crate::preflight::{Refusal, exit};
use crate::record::{End, Reader, Recorded, Unreadable, create_private};
use crate::sink::summary::{About, Missed, Moment, Summarizer};
use crate::sink::{Page, Sink};

/// What is read, and what is made of it.
#[derive(Debug)]
pub struct Options {
    /// The recording.
    pub recording: PathBuf,
    /// What of it.
    pub filter: Filter,
    /// The same as on the command line, for the `start` event.
    pub filters: Vec<String>,
    /// No line for each connection: the summary, alerts and losses only. A page has its own table.
    pub summary_only: bool,
    /// As what.
    pub output: Output,
}

/// What is made of a recording.
#[derive(Debug)]
pub enum Output {
    /// Lines on stdout.
    Print(Sink),
    /// A page in a file.
    Html {
        /// The file.
        path: PathBuf,
        /// Replace it if it exists.
        overwrite: bool,
    },
}

/// Reports; a closed stdout is no error.
///
/// # Errors
/// A [`Refusal`] with [`exit::INCOMPLETE`] after all that could be read; otherwise that nothing could be read, or that the
/// output could not be written.
pub fn report(options: Options) -> Result<()> {
    let path = &options.recording;
    let about = || path.display().to_string();
    let file = File::open(path).with_context(about)?;
    let input = file.metadata().map(|file| (file.dev(), file.ino())).with_context(about)?;
    let reader = match Reader::new(BufReader::with_capacity(64 << 10, file)) {
        Ok(reader) => reader,
        Err(why @ (Unreadable::Unfinished { .. } | Unreadable::Damaged { .. })) => return whole(path, Some(why)),
        Err(why) => return Err(why).with_context(about),
    };
    match options.output {
        Output::Print(mut sink) => {
            let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
            let printed = replay(reader, &options.filter, &options.filters, |event| {
                if options.summary_only && matches!(event, Event::Close(_) | Event::CloseWait(_) | Event::State(_)) {
                    return Ok(());
                }
                sink.event(event, &mut out)
            });
            match printed.and_then(|unreadable| out.flush().map(|()| unreadable)) {
                Ok(unreadable) => whole(path, unreadable),
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                Err(error) => Err(error).context("cannot write to stdout"),
            }
        }
        Output::Html { path: to, overwrite } => {
            if fs::metadata(&to).is_ok_and(|file| (file.dev(), file.ino()) == input) {
                let same = io::Error::other("it is the recording");
                return Err(Refusal::cannot_make(&to, &same).into());
            }
            // Before the work is done, so that nobody waits for an error.
            let mut out = create_private(&to, overwrite).map_err(|error| Refusal::cannot_make(&to, &error))?;
            let mut page = Page::new(TimeZone::system());
            let mut summary = None;
            let unreadable = replay(reader, &options.filter, &options.filters, |event| {
                match event {
                    Event::Summary(last) => summary = Some(last.clone()),
                    event => page.event(event),
                }
                Ok(())
            })?;
            let summary = summary.context("a recording ends with a summary")?;
            let trouble = unreadable.as_ref().map(ToString::to_string);
            out.write_all(page.finish(&summary, trouble.as_deref()).as_bytes())
                .with_context(|| format!("cannot write to {}", to.display()))?;
            whole(path, unreadable)
        }
    }
}

fn whole(path: &Path, unreadable: Option<Unreadable>) -> Result<()> {
    match unreadable {
        None => Ok(()),
        Some(why) => Err(Refusal { code: exit::INCOMPLETE, message: format!("{}: {why}", path.display()) }.into()),
    }
}

/// Gives `each` every event that passes `filter` (`filters` in words), and last the summary of them; answers why the recording could not be read to its
/// end, if so.
///
/// # Errors
/// Those of `each`.
pub fn replay<R: io::Read>(
    mut reader: Reader<R>,
    filter: &Filter,
    filters: &[String],
    mut each: impl FnMut(&Event) -> io::Result<()>,
) -> io::Result<Option<Unreadable>> {
    let began = Instant::now();
    let mut summary = Summarizer::new(began, false, None);
    let mut seen = Seen::default();
    loop {
        let (end, unreadable) = match reader.next() {
            Ok(Some(Recorded::Event(mut event))) => {
                seen.event(&event);
                if let Event::Start(start) = &mut event {
                    start.filters.extend_from_slice(filters);
                    summary.limit(start.time_wait_max);
                }
                if filter.passes(&event) {
                    summary.event(&event);
                    each(&event)?;
                }
                continue;
            }
            Ok(Some(Recorded::End(end))) => (end, None),
            Ok(None) => (seen.end(), None),
            Err(why) => (seen.end(), Some(why)),
        };
        let moment = Moment {
            time: end.time,
            // A recording may hold any number.
            now: began.checked_add(end.ran).unwrap_or(began),
            missed: end.missed,
            time_wait_sockets: end.time_wait_sockets,
            ledger: None,
        };
        each(&Event::Summary(Box::new(summary.summary(About::Run, &moment))))?;
        return Ok(unreadable);
    }
}

/// What stands in for the end of a run that has none: the last event was the end.
#[derive(Debug, Default)]
struct Seen {
    first: Option<Timestamp>,
    last: Option<Timestamp>,
    lost: u64,
}

impl Seen {
    fn event(&mut self, event: &Event) {
        let time = match event {
            Event::Start(start) => start.time,
            Event::Close(close) | Event::CloseWait(close) => close.time,
            Event::State(state) => state.time,
            Event::Alert(alert) => alert.time,
            Event::Lost(lost) => {
                self.lost = self.lost.saturating_add(lost.records);
                lost.time
            }
            Event::Summary(summary) => summary.time,
        };
        self.first.get_or_insert(time);
        self.last = self.last.max(Some(time));
    }

    fn end(&self) -> End {
        let time = self.last.unwrap_or(Timestamp::UNIX_EPOCH);
        let ran = time.duration_since(self.first.unwrap_or(time));
        let ran = Duration::try_from(ran).unwrap_or(Duration::ZERO);
        End { time, ran, missed: Missed { lost: self.lost, untracked: 0 }, time_wait_sockets: None }
    }
}
