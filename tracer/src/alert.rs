//! What TIME_WAIT is, once a second, in; alerts out, and word of them to the process that runs a command.
//!
//! An alert is raised when its limit is reached, and cleared after ten seconds below four fifths of it: it does not flap.
//! Nothing is started here: that is the [`launcher`](crate::launcher)'s.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::event::{AlertState, Metric};
use crate::launcher::Launcher;

/// An alert ends below this part of its limit,
const CLEAR_BELOW: f64 = 0.8;
/// once it was there so many times in a row: seconds.
const CLEAR_AFTER: u32 = 10;
/// What the rate is the mean of; more, if nobody looked for longer.
const RATE_OVER: Duration = Duration::from_secs(10);

/// What to watch, and what to do then.
#[derive(Debug, Default)]
pub struct Watch {
    /// Sockets in TIME_WAIT, in the network namespace of tracer.
    pub time_wait: Option<u64>,
    /// TIME_WAIT seen made, sockets a second.
    pub rate: Option<f64>,
    /// Runs a command for each alert that is raised.
    pub launcher: Option<Launcher>,
}

/// A change of an alert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// What is watched.
    pub metric: Metric,
    /// Raised or cleared.
    pub state: AlertState,
    /// What it is now.
    pub value: f64,
    /// Its limit.
    pub limit: f64,
}

/// The alerts of a run.
#[derive(Debug)]
pub struct Alerts {
    alarms: Vec<(Metric, Alarm)>,
    rate: Rate,
    launcher: Option<Launcher>,
}

impl Alerts {
    /// Nothing is raised.
    pub fn new(watch: Watch) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "2^53 sockets are too many for any kernel")]
        let time_wait = watch.time_wait.map(|limit| (Metric::TimeWait, Alarm::new(limit as f64)));
        let rate = watch.rate.map(|limit| (Metric::Rate, Alarm::new(limit)));
        let alarms = time_wait.into_iter().chain(rate).collect();
        Self { alarms, rate: Rate::default(), launcher: watch.launcher }
    }

    /// To be called about once a second. `sockets`: in TIME_WAIT now, if the kernel says; `made`: seen going there since the start.
    #[expect(clippy::cast_precision_loss, reason = "counts of sockets")]
    pub fn check(&mut self, now: Instant, sockets: Option<u64>, made: u64) -> Vec<Change> {
        self.rate.next(now, made);
        let rate = self.rate.per_second();
        self.alarms
            .iter_mut()
            .filter_map(|(metric, alarm)| {
                let value = match metric {
                    Metric::TimeWait => sockets? as f64,
                    Metric::Rate => rate,
                };
                let state = alarm.check(value)?;
                Some(Change { metric: *metric, state, value, limit: alarm.limit })
            })
            .collect()
    }

    /// TIME_WAIT seen made, sockets a second, over the last ten.
    pub fn rate(&self) -> f64 {
        self.rate.per_second()
    }

    /// There is a command to run.
    pub const fn has_command(&self) -> bool {
        self.launcher.is_some()
    }

    /// Has the command run with this on its stdin.
    pub fn run(&mut self, summary: &[u8]) {
        if let Some(launcher) = &mut self.launcher {
            launcher.run(summary);
        }
    }
}

/// One limit, with hysteresis.
#[derive(Debug)]
struct Alarm {
    limit: f64,
    raised: bool,
    /// Checks in a row at which it was low enough to be cleared.
    low: u32,
}

impl Alarm {
    const fn new(limit: f64) -> Self {
        Self { limit, raised: false, low: 0 }
    }

    fn check(&mut self, value: f64) -> Option<AlertState> {
        if !self.raised {
            self.raised = value >= self.limit;
            self.low = 0;
            return self.raised.then_some(AlertState::Raised);
        }
        self.low = if value < self.limit * CLEAR_BELOW { self.low + 1 } else { 0 };
        if self.low < CLEAR_AFTER {
            return None;
        }
        self.raised = false;
        Some(AlertState::Cleared)
    }
}

/// The mean of the last ten seconds; before that many have passed, as if none had been made before.
#[derive(Debug, Default)]
struct Rate {
    /// How many there were, and when that was, about once a second.
    made: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn next(&mut self, now: Instant, made: u64) {
        // One that is older than it need be: while nobody read stdout, nobody looked.
        while self.made.get(1).is_some_and(|(then, _)| now.saturating_duration_since(*then) >= RATE_OVER) {
            self.made.pop_front();
        }
        if self.made.is_empty() {
            self.made.push_back((now, 0));
        }
        self.made.push_back((now, made));
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of sockets")]
    fn per_second(&self) -> f64 {
        let Some(((now, last), (then, first))) = self.made.back().zip(self.made.front()) else { return 0.0 };
        let over = now.saturating_duration_since(*then).max(RATE_OVER);
        last.saturating_sub(*first) as f64 / over.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an alarm at 300 makes of values that come once a second.
    fn changes(values: impl IntoIterator<Item = u64>) -> Vec<(usize, AlertState)> {
        let mut alerts = Alerts::new(Watch { time_wait: Some(300), ..Watch::default() });
        let checks = values.into_iter().enumerate();
        let now = Instant::now();
        checks
            .flat_map(|(at, value)| alerts.check(now, Some(value), 0).into_iter().map(move |c| (at, c.state)))
            .collect()
    }

    #[test]
    fn raised_at_the_limit_once() {
        assert_eq!(changes([0, 299, 300, 301, 5_000, 300]), [(2, AlertState::Raised)]);
    }

    #[test]
    fn it_does_not_flap_around_the_limit() {
        let values = (0..100).map(|at| if at % 2 == 0 { 305 } else { 295 });
        assert_eq!(changes(values), [(0, AlertState::Raised)]);
        // Nor around the lower limit, 240, as long as it is not below for ten seconds.
        let values = std::iter::once(300).chain((0..100).map(|at| if at % 10 == 9 { 240 } else { 239 }));
        assert_eq!(changes(values), [(0, AlertState::Raised)]);
    }

    #[test]
    fn cleared_after_ten_seconds_and_raised_again() {
        let values = std::iter::once(300).chain([239; 10]).chain([299, 300]);
        assert_eq!(changes(values), [(0, AlertState::Raised), (10, AlertState::Cleared), (12, AlertState::Raised)]);
    }

    #[test]
    fn what_the_kernel_does_not_say_raises_nothing() {
        let mut alerts = Alerts::new(Watch { time_wait: Some(1), ..Watch::default() });
        assert_eq!(alerts.check(Instant::now(), None, 0), []);
    }

    #[test]
    fn the_rate_is_the_mean_of_ten_seconds() {
        let mut alerts = Alerts::new(Watch { rate: Some(5.0), ..Watch::default() });
        // 10 a second: the mean reaches 5 after five.
        let began = Instant::now();
        let at = |second| began + Duration::from_secs(second);
        let raised: Vec<_> = (1..=9).map(|second| alerts.check(at(second), None, second * 10)).collect();
        assert!(raised[..4].iter().all(Vec::is_empty));
        let wanted = Change { metric: Metric::Rate, state: AlertState::Raised, value: 5.0, limit: 5.0 };
        assert_eq!(raised[4], [wanted]);
        for second in 10..20 {
            alerts.check(at(second), None, 90);
        }
        assert!(alerts.rate().abs() < 1e-9);
        // What came while nobody looked, for half a minute, is no outburst.
        alerts.check(at(49), None, 180);
        assert!((alerts.rate() - 3.0).abs() < 0.2, "{}", alerts.rate());
    }
}
