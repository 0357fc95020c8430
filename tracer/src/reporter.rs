//! Events and requests in, lines on stdout out: what the writing thread does.
//!
//! It counts closes for the summary as it prints them, records them if that is wanted, answers requests for a summary, and
//! watches the limits of alerts. It may block on stdout, and nothing else.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use crate::alert::{Alerts, Watch};
use crate::event::{Alert, AlertState, Event};
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

/// What the writing thread is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// To look whether an alert is due. Comes once a second.
    Check,
    /// A summary of what was added since the last one of this kind.
    Every,
    /// A summary of the last time.
    Now,
}

/// What the writing thread is given at a time. Empty: what is recorded is to be written to the file.
#[derive(Debug, Default)]
pub struct Batch {
    /// To be printed.
    pub events: Vec<Event>,
    /// To be done then.
    pub ask: Option<(Ask, Moment)>,
}

/// The writing end of a run.
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

    /// Prints and does what is asked for.
    ///
    /// # Errors
    /// Those of stdout.
    pub fn take(&mut self, batch: &Batch) -> io::Result<()> {
        self.record(&batch.events);
        self.print(&batch.events)?;
        match &batch.ask {
            None => Ok(()),
            Some((Ask::Check, moment)) => self.check(moment),
            Some((Ask::Every, moment)) => self.summarize(About::SinceLast, moment),
            Some((Ask::Now, moment)) => self.summarize(About::Recent, moment),
        }
    }

    /// Records events; without any, writes to the file what waits.
    pub fn record(&mut self, events: &[Event]) {
        if let Some(recording) = &mut self.recording {
            recording.events(events);
        }
    }

    /// Prints the last summary, if nothing has failed to be `printed` so far.
    ///
    /// # Errors
    /// Those of stdout.
    pub fn finish(&mut self, printed: io::Result<()>, moment: &Moment) -> io::Result<()> {
        if let Some(recording) = &mut self.recording {
            recording.end(&End {
                time: moment.time,
                ran: moment.now.saturating_duration_since(self.began),
                missed: moment.missed,
                time_wait_sockets: moment.time_wait_sockets,
            });
        }
        printed.and_then(|()| self.summarize(About::Run, moment))
    }

    /// Waits until all is recorded; answers whether it is, or there was nothing to do.
    pub fn finish_recording(self) -> bool {
        self.recording.is_none_or(Recording::finish)
    }

    fn summarize(&mut self, about: About, moment: &Moment) -> io::Result<()> {
        let summary = self.summary.summary(about, moment);
        self.print(&[Event::Summary(Box::new(summary))])
    }

    fn print(&mut self, events: &[Event]) -> io::Result<()> {
        if events.is_empty() {
            return Ok(());
        }
        let mut out = io::BufWriter::with_capacity(64 << 10, io::stdout().lock());
        for event in events {
            self.summary.event(event);
            if self.summary_only && matches!(event, Event::Close(_) | Event::CloseWait(_) | Event::State(_)) {
                continue;
            }
            self.sink.event(event, &mut out)?;
        }
        out.flush()
    }

    fn check(&mut self, moment: &Moment) -> io::Result<()> {
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
        // First: stdout may block.
        if self.alerts.has_command() && changes.iter().any(|change| change.state == AlertState::Raised) {
            let mut json = Vec::new();
            Json::default().event(&Event::Summary(Box::new(summary)), &mut json)?;
            self.alerts.run(&json);
        }
        self.record(&alerts);
        self.print(&alerts)
    }
}
