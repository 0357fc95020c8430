//! What TIME_WAIT is, once a second, in; alerts out, and the command that shall run for them.
//!
//! An alert is raised when its limit is reached, and cleared after ten seconds below four fifths of it: it does not flap.
//! The command gets the summary on its stdin, from memory, so that it cannot hold tracer up; at most one runs at a time. It
//! starts after tracer has given up its capabilities, and cannot gain any (`no_new_privs`).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use log::warn;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::event::{AlertState, Metric};

/// An alert ends below this part of its limit,
const CLEAR_BELOW: f64 = 0.8;
/// once it was there so many times in a row: seconds.
const CLEAR_AFTER: u32 = 10;
/// What the rate is the mean of; more, if nobody looked for longer.
const RATE_OVER: Duration = Duration::from_secs(10);

/// What to watch, and what to do then.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Watch {
    /// Sockets in TIME_WAIT, in the network namespace of tracer.
    pub time_wait: Option<u64>,
    /// TIME_WAIT seen made, sockets a second.
    pub rate: Option<f64>,
    /// Run by `sh -c` for each alert that is raised.
    pub command: Option<String>,
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
    command: Option<String>,
    running: Option<Child>,
}

impl Alerts {
    /// Nothing is raised.
    pub fn new(watch: Watch) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "2^53 sockets are too many for any kernel")]
        let time_wait = watch.time_wait.map(|limit| (Metric::TimeWait, Alarm::new(limit as f64)));
        let rate = watch.rate.map(|limit| (Metric::Rate, Alarm::new(limit)));
        let alarms = time_wait.into_iter().chain(rate).collect();
        Self { alarms, rate: Rate::default(), command: watch.command, running: None }
    }

    /// To be called about once a second. `sockets`: in TIME_WAIT now, if the kernel says; `made`: seen going there since the start.
    #[expect(clippy::cast_precision_loss, reason = "counts of sockets")]
    pub fn check(&mut self, now: Instant, sockets: Option<u64>, made: u64) -> Vec<Change> {
        self.reap();
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
        self.command.is_some()
    }

    /// Runs the command with this on its stdin, unless it still runs for an earlier alert. What it prints goes to stderr:
    /// stdout is for events.
    pub fn run(&mut self, summary: &[u8]) {
        let Some(command) = &self.command else { return };
        if self.running.is_some() {
            warn!("--exec: the command still runs for an earlier alert, and is not started again");
            return;
        }
        match start(command, summary) {
            Ok(child) => self.running = Some(child),
            Err(error) => warn!("--exec: the command could not be started: {error}"),
        }
    }

    /// Takes note of its end.
    fn reap(&mut self) {
        let Some(child) = &mut self.running else { return };
        match child.try_wait() {
            Ok(None) => return,
            Ok(Some(status)) if status.success() => {}
            Ok(Some(status)) => warn!("--exec: the command failed: {status}"),
            Err(error) => warn!("--exec: the command cannot be waited for: {error}"),
        }
        self.running = None;
    }
}

fn start(command: &str, summary: &[u8]) -> io::Result<Child> {
    let mut stdin = File::from(memfd_create("tracer-summary", MemfdFlags::CLOEXEC)?);
    stdin.write_all(summary)?;
    stdin.rewind()?;
    let stderr = || io::stderr().as_fd().try_clone_to_owned().map(Stdio::from);
    Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(stdin)
        .stdout(stderr()?)
        .stderr(stderr()?)
        // Ctrl-C is for tracer.
        .process_group(0)
        .spawn()
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

    #[test]
    fn a_command_that_does_not_read_holds_nothing_up() {
        let command = Some("exec sleep 60".to_owned());
        let mut alerts = Alerts::new(Watch { time_wait: Some(1), command, ..Watch::default() });
        // More than any pipe holds.
        alerts.run(&vec![b'x'; 4 << 20]);
        let pid = alerts.running.as_ref().map(Child::id);
        assert!(pid.is_some());
        alerts.run(b"again");
        assert_eq!(alerts.running.as_ref().map(Child::id), pid, "one at a time");
        let mut child = alerts.running.take().expect("it runs");
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
    }

    #[test]
    fn a_command_is_reaped_and_can_run_again() {
        let mut alerts =
            Alerts::new(Watch { time_wait: Some(1), command: Some("exit 0".to_owned()), ..Watch::default() });
        alerts.run(b"{}");
        let begun = std::time::Instant::now();
        while alerts.running.is_some() {
            assert!(begun.elapsed().as_secs() < 20, "it has ended long ago");
            std::thread::sleep(std::time::Duration::from_millis(5));
            alerts.check(Instant::now(), None, 0);
        }
        alerts.run(b"{}");
        assert!(alerts.running.is_some());
        alerts.running.take().expect("it runs").wait().expect("it is our child");
    }
}
