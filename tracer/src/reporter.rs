//! Events and requests in, lines out, in memory: what is done with an event once it is known.
//!
//! It counts closes for the summary as it formats them, records them if that is wanted, answers requests for a summary, and
//! watches the limits of alerts. It must not wait (but for a moment where an alert's command is to be run): it runs in the thread that reads the ring buffer, so that an event is
//! made, formatted and freed by one thread, while it is in that CPU's cache. Another thread has the lines to write.

use std::io;
use std::time::{Duration, Instant};

use crate::alert::{Alerts, Watch};
use crate::event::{Alert, AlertState, Event, Ledger};
use crate::record::{End, Recording};
use crate::sink::summary::{About, Moment, Summarizer};
use crate::sink::{Json, Sink};

/// What else is wanted besides a line for each event.
#[derive(Debug, Default)]
pub struct Wanted {
    /// A summary every so often.
    pub every: Option<Duration>,
    /// No line for each connection.
    pub summary_only: bool,
    /// Alerts.
    pub watch: Watch,
}

/// What is asked for besides.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// To look whether an alert is due. Comes once a second.
    Check,
    /// A summary of what was added since the last one of this kind.
    Every,
    /// A summary of the last time.
    Now,
}

/// Where the events of a run go.
#[derive(Debug)]
pub struct Reporter {
    sink: Sink,
    summary: Summarizer,
    summary_only: bool,
    alerts: Alerts,
    recording: Option<Recording>,
    began: Instant,
}

impl Reporter {
    /// Begins a run. `time_wait_max`: the kernel's limit of TIME_WAIT sockets, if it is known.
    pub fn new(
        sink: Sink,
        wanted: Wanted,
        recording: Option<Recording>,
        began: Instant,
        time_wait_max: Option<u64>,
    ) -> Self {
        let summary = Summarizer::new(began, wanted.every.is_some(), time_wait_max);
        let alerts = Alerts::new(wanted.watch);
        Self { sink, summary, summary_only: wanted.summary_only, alerts, recording, began }
    }

    /// Appends the lines of these events, and then of what is asked for.
    ///
    /// # Errors
    /// An event cannot be printed.
    pub fn take(&mut self, events: &[Event], ask: Option<(Ask, Moment)>, lines: &mut Vec<u8>) -> io::Result<()> {
        if !events.is_empty() {
            self.record(events);
            self.print(events, lines)?;
        }
        match ask {
            None => Ok(()),
            Some((Ask::Check, moment)) => self.check(&moment, lines),
            Some((Ask::Every, moment)) => self.summarize(About::SinceLast, &moment, lines),
            Some((Ask::Now, moment)) => self.summarize(About::Recent, &moment, lines),
        }
    }

    /// Records events; without any, writes to the file what waits.
    pub fn record(&mut self, events: &[Event]) {
        if let Some(recording) = &mut self.recording {
            recording.events(events);
        }
    }

    /// Appends the last summary.
    ///
    /// # Errors
    /// It cannot be printed.
    pub fn finish(&mut self, moment: &Moment, lines: &mut Vec<u8>) -> io::Result<Option<Box<Ledger>>> {
        if let Some(recording) = &mut self.recording {
            recording.end(&End {
                time: moment.time,
                ran: moment.now.saturating_duration_since(self.began),
                missed: moment.missed,
                time_wait_sockets: moment.time_wait_sockets,
            });
        }
        let summary = self.summary.summary(About::Run, moment);
        let ledger = summary.ledger.clone();
        self.print(&[Event::Summary(Box::new(summary))], lines)?;
        Ok(ledger)
    }

    /// Waits until all is recorded; answers whether it is, or there was nothing to do.
    pub fn finish_recording(self) -> bool {
        self.recording.is_none_or(Recording::finish)
    }

    fn summarize(&mut self, about: About, moment: &Moment, lines: &mut Vec<u8>) -> io::Result<()> {
        let summary = self.summary.summary(about, moment);
        self.print(&[Event::Summary(Box::new(summary))], lines)
    }

    fn print(&mut self, events: &[Event], lines: &mut Vec<u8>) -> io::Result<()> {
        for event in events {
            self.summary.event(event);
            if self.summary_only && matches!(event, Event::Close(_) | Event::CloseWait(_) | Event::State(_)) {
                continue;
            }
            self.sink.event(event, lines)?;
        }
        Ok(())
    }

    fn check(&mut self, moment: &Moment, lines: &mut Vec<u8>) -> io::Result<()> {
        self.summary.pass(moment.now);
        let changes = self.alerts.check(moment.now, moment.time_wait_sockets, self.summary.time_wait());
        if changes.is_empty() {
            return Ok(());
        }
        let summary = self.summary.summary(About::Recent, moment);
        let alerts: Vec<Event> = changes
            .iter()
            .map(|change| {
                let raised = change.state == AlertState::Raised;
                Event::Alert(Box::new(Alert {
                    time: moment.time,
                    state: change.state,
                    metric: change.metric,
                    value: change.value,
                    limit: change.limit,
                    time_wait_sockets: moment.time_wait_sockets,
                    time_wait_per_s: self.alerts.rate(),
                    advice: summary.advice.first().filter(|_| raised).cloned(),
                }))
            })
            .collect();
        if self.alerts.has_command() && changes.iter().any(|change| change.state == AlertState::Raised) {
            let mut json = Vec::new();
            Json::default().event(&Event::Summary(Box::new(summary)), &mut json)?;
            self.alerts.run(&json);
        }
        self.record(&alerts);
        self.print(&alerts, lines)
    }
}
