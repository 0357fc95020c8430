//! From facts to events: dates them, names their processes, and finds out what is left of each connection.
//!
//! What comes in: decoded facts, in order. What goes out: events. A connection whose end is not certain yet (a FIN_WAIT2
//! mini-socket, which can still become TIME_WAIT) is held back, and the kernel asked for it from time to time until it is.
//! Nothing is asked while nothing is held; what is held is bounded, and so is the rate of questions.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use crate::decode::{Blind, Fact, Socket, Task};
use crate::event::{Cause, Close, ClosedBy, Event, Final, FinalSource, How, Process, Source, State, StateAt, TcpState};
use crate::process::Processes;
use crate::time_namespace;
use crate::time_wait::{Answer, Question, SockDiag};
use crate::verdict::{self, Ending, Fate};

/// At most so many connections are held back; beyond, the oldest is reported as it stands.
const HELD: usize = 8192;
/// At most so many questions in one [`Connections::poll`].
const QUESTIONS: usize = 256;
/// The first question after the one at the end of the socket; each later one waits twice as long, up to [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(10);
/// How long at most a question is put off because there are still records to be read.
const OVERDUE: Duration = Duration::from_secs(1);
/// How long a TIME_WAIT socket lives (`TCP_TIMEWAIT_LEN`).
const TIME_WAIT: Duration = Duration::from_secs(60);
/// Well within [`TIME_WAIT`], so that none is missed.
const SLOWEST: Duration = Duration::from_secs(1);
/// How long the last questions may take.
const FINISH: Duration = Duration::from_secs(1);
/// How long a foreign network namespace is held without need.
const RELEASE: Duration = Duration::from_secs(1);
/// How late a mini-socket's timer may fire, and still be the reason that it is gone.
const TIMER_SLACK: Duration = Duration::from_millis(1500);

/// `CLOCK_MONOTONIC` in nanoseconds to dates. Taken anew from time to time, so that a clock that is set does not lead
/// astray for long.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch: Timestamp,
}

impl Clock {
    /// Reads both clocks.
    pub fn now() -> Self {
        Self::new(Timestamp::now(), monotonic_ns())
    }

    /// `now` is the date of the moment `at_ns`.
    fn new(now: Timestamp, at_ns: u64) -> Self {
        Self { epoch: now.checked_sub(since_boot(at_ns)).unwrap_or(Timestamp::UNIX_EPOCH) }
    }

    /// The date of a moment of `CLOCK_MONOTONIC`.
    pub fn date(self, at_ns: u64) -> Timestamp {
        self.epoch.checked_add(since_boot(at_ns)).unwrap_or(Timestamp::MAX)
    }
}

fn since_boot(at_ns: u64) -> SignedDuration {
    SignedDuration::from_nanos(i64::try_from(at_ns).unwrap_or(i64::MAX))
}

/// A connection that is held back.
struct Held {
    socket: Box<Socket>,
    ending: Ending,
    close: Box<Close>,
    /// When it is asked for next, and how long after that again.
    next: Instant,
    pause: Duration,
    /// Until when its FIN_WAIT2 mini-socket lives, if one was seen.
    deadline: Option<Instant>,
    /// When it was last asked for.
    seen: Instant,
    /// The first question found nothing, and is repeated once a RST that followed the end would have been told.
    awaits_reset: bool,
}

/// Joins facts into events.
pub struct Connections {
    processes: Processes,
    sock_diag: SockDiag,
    clock: Clock,
    /// `--states`
    states: bool,
    held: VecDeque<Held>,
    /// Ends that were taken in.
    ended: u64,
    /// When foreign network namespaces are let go of, if none is needed; `None` while none is held.
    release_at: Option<Instant>,
    /// [`Connections::blind`]
    blind: Blind,
}

impl Connections {
    /// With no connection held back.
    pub fn new(processes: Processes, sock_diag: SockDiag, states: bool) -> Self {
        Self {
            processes,
            sock_diag,
            clock: Clock::now(),
            states,
            held: VecDeque::new(),
            ended: 0,
            release_at: None,
            blind: Blind::default(),
        }
    }

    /// Hooks that are missing: what they would have told is not judged.
    #[must_use]
    pub const fn blind(mut self, blind: Blind) -> Self {
        self.blind = blind;
        self
    }

    /// Reads the clocks anew.
    pub fn set_clock(&mut self) {
        self.clock = Clock::now();
    }

    /// Takes one fact in; events that follow from it are appended to `out`.
    pub fn fact(&mut self, mut fact: Fact, now: Instant, out: &mut Vec<Event>) {
        if let Fact::Changed(socket) | Fact::Ended(socket) | Fact::CloseWait(socket) = &mut fact {
            socket.blind = self.blind;
        }
        match fact {
            Fact::Changed(socket) => {
                let event = self.state(&socket, socket.old, socket.new, socket.at_ns, now);
                out.push(event);
            }
            Fact::Ended(socket) => {
                self.ended += 1;
                self.ended(socket, now, out);
            }
            Fact::CloseWait(mut socket) => {
                let ending = verdict::half_closed(&socket);
                let mut close = self.close(&socket, &ending, now);
                close.cause = verdict::cause(&socket, &ending);
                complete(&mut close, &mut socket);
                out.push(Event::CloseWait(Box::new(close)));
            }
            Fact::ResetAfterEnd { cookie } => {
                // Only a connection whose end is open can be changed by this; of the others the RST was foreseen.
                if let Some(at) = self.held.iter().position(|held| held.socket.cookie == cookie)
                    && let Some(mut held) = self.held.remove(at)
                {
                    held.ending.how = Some(How::Rst);
                    held.socket.rst_sent = true;
                    self.settle(held, Final::Reset, FinalSource::State, now, out);
                }
            }
        }
    }

    fn ended(&mut self, socket: Box<Socket>, now: Instant, out: &mut Vec<Event>) {
        let ending = verdict::ending(&socket);
        let close = Box::new(self.close(&socket, &ending, now));
        let held =
            Held { socket, ending, close, next: now, pause: FIRST, deadline: None, seen: now, awaits_reset: false };
        match held.ending.fate {
            Fate::Known(fate, source) => self.settle(held, fate, source, now, out),
            Fate::Ask => self.ask(held, now, out),
        }
    }

    /// Asks for what is left of one connection: it is reported, or held back.
    fn ask(&mut self, mut held: Held, now: Instant, out: &mut Vec<Event>) {
        if held.socket.cookie_late {
            // Its mini-socket has another cookie than the one we know: nothing can be said for certain.
            return self.settle(held, Final::Unknown, FinalSource::Inferred, now, out);
        }
        let answer = self.sock_diag.ask(&question(&held.socket));
        if self.release_at.is_none() && self.sock_diag.holds_foreign() {
            self.release_at = Some(now + RELEASE);
        }
        match answer {
            Answer::FinWait2(left) => {
                held.deadline = Some(now + left);
                held.seen = now;
                held.next = now + held.pause;
                held.pause = (held.pause * 2).min(self.slowest());
                self.hold(held, now, out);
            }
            Answer::Gone | Answer::Replaced | Answer::Unknown
                if held.deadline.is_none() && !held.awaits_reset && may_reset(&held.socket) =>
            {
                // `close` with unread data sends its RST after the socket's end: that record may be on its way.
                held.awaits_reset = true;
                held.next = now + FIRST;
                self.hold(held, now, out);
            }
            answer => self.answered(held, answer, now, out),
        }
    }

    /// Reports one connection by what the kernel answered last.
    fn answered(&mut self, held: Held, answer: Answer, now: Instant, out: &mut Vec<Event>) {
        let (fate, source) = match answer {
            Answer::TimeWait => (Final::TimeWait, FinalSource::SockDiag),
            Answer::FinWait2(_) => (Final::FinWait2, FinalSource::SockDiag),
            Answer::Gone => gone(&held, now),
            // A SYN takes the place of a TIME_WAIT, and nobody need have asked for it in between.
            Answer::Replaced if may_leave_mini_socket(&held) => (Final::Unknown, FinalSource::Inferred),
            Answer::Replaced => gone(&held, now),
            Answer::Alive | Answer::Unknown => (Final::Unknown, FinalSource::Inferred),
        };
        self.settle(held, fate, source, now, out);
    }

    fn hold(&mut self, held: Held, now: Instant, out: &mut Vec<Event>) {
        if self.held.len() >= HELD
            && let Some(oldest) = self.held.pop_front()
        {
            // It can still become TIME_WAIT.
            let fate = if oldest.awaits_reset { Final::Unknown } else { Final::FinWait2 };
            self.settle(oldest, fate, FinalSource::Inferred, now, out);
        }
        self.held.push_back(held);
    }

    /// With very many connections held back each is asked for more rarely, but still well within TIME_WAIT's 60 s.
    fn slowest(&self) -> Duration {
        SLOWEST.max(Duration::from_millis(self.held.len() as u64 * 2))
    }

    /// Ends of sockets that were taken in, and those of them that are held back.
    pub fn ends(&self) -> (u64, u64) {
        (self.ended, self.held.len() as u64)
    }

    /// When [`Connections::poll`] should be called next; `None` while nothing is held back.
    pub fn next_poll(&self) -> Option<Instant> {
        self.held.iter().map(|held| held.next).chain(self.release_at).min()
    }

    /// Asks again for the connections that are due. Where there is `more` to be read, that a RST followed may be among it.
    pub fn poll(&mut self, now: Instant, more: bool, out: &mut Vec<Event>) {
        let mut questions = QUESTIONS;
        for _ in 0..self.held.len() {
            let Some(mut held) = self.held.pop_front() else { break };
            if held.next > now || questions == 0 {
                self.held.push_back(held);
            } else if held.awaits_reset && more && now < held.seen + OVERDUE {
                held.next = now + FIRST;
                self.held.push_back(held);
            } else {
                questions -= 1;
                self.ask(held, now, out);
            }
        }
        if self.release_at.is_some_and(|at| at <= now) {
            let held = &self.held;
            self.sock_diag.release(|netns| held.iter().any(|held| held.socket.netns == netns));
            self.release_at = self.sock_diag.holds_foreign().then(|| now + RELEASE);
        }
    }

    /// Reports all that is held back as it stands: tracing ends.
    pub fn finish(&mut self, now: Instant, out: &mut Vec<Event>) {
        let mut held = Vec::from(std::mem::take(&mut self.held));
        // Namespace by namespace: each is entered once.
        held.sort_by_key(|held| held.socket.netns);
        let until = Instant::now() + FINISH;
        for held in held {
            if Instant::now() < until {
                let answer = self.sock_diag.ask(&question(&held.socket));
                self.answered(held, answer, now, out);
            } else {
                self.settle(held, Final::Unknown, FinalSource::Inferred, now, out);
            }
        }
    }

    /// Reports one connection.
    fn settle(&mut self, held: Held, fate: Final, fate_source: FinalSource, now: Instant, out: &mut Vec<Event>) {
        let a_reset_is_missed = may_have_reset_unseen(&held, fate);
        let Held { mut socket, ending, mut close, deadline, .. } = held;
        let (ending, fate, fate_source) = if a_reset_is_missed {
            (verdict::unobserved(&socket), Final::Unknown, FinalSource::Inferred)
        } else {
            (ending, fate, fate_source)
        };
        close.closed_by = ending.closed_by;
        close.how = ending.how;
        close.fate = Some(fate);
        close.fate_source = Some(fate_source);
        close.cause = verdict::cause(&socket, &ending);
        // What the kernel reports as CLOSE is the end of the full socket. If it was FIN_WAIT2 when it was asked for before, the
        // FIN came since then.
        let (new, at_ns) = match (fate, deadline) {
            (Final::TimeWait, Some(_)) => (TcpState::TimeWait, monotonic_ns()),
            (Final::TimeWait, None) => (TcpState::TimeWait, socket.at_ns),
            _ => (socket.new, socket.at_ns),
        };
        if self.states {
            out.push(self.state(&socket, socket.old, new, at_ns, now));
        }
        complete(&mut close, &mut socket);
        if fate == Final::TimeWait
            && let Some(last) = close.states.last_mut()
        {
            last.state = new;
            last.at_us = last.at_us.saturating_add(micros_between(socket.at_ns, at_ns));
        }
        out.push(Event::Close(close));
    }

    /// All but what [`complete`] adds.
    fn close(&mut self, socket: &Socket, ending: &Ending, now: Instant) -> Close {
        let process = self.owner(socket, now);
        let closer = socket
            .closer
            .filter(|closer| socket.owner.is_none_or(|owner| !same(&owner, closer)) && !self.processes.is_own(closer))
            .map(|task| self.processes.describe(&Task { source: Source::Close, ..task }, now));
        Close {
            time: self.clock.date(socket.at_ns),
            cookie: socket.cookie,
            netns: socket.netns,
            family: socket.family,
            local: socket.local,
            remote: socket.remote,
            role: socket.role,
            process,
            closed_by: ending.closed_by,
            closer,
            how: ending.how,
            fate: None,
            fate_source: None,
            states: Vec::new(),
            duration_us: socket.established_ns.map_or(0, |from| socket.at_ns.saturating_sub(from) / 1000),
            started_before: socket.started_before,
            idle_us: verdict::idle_us(socket),
            rx_bytes: socket.rx_bytes,
            tx_bytes: socket.tx_bytes,
            protocol: socket.protocol,
            http: None,
            cause: Cause::Unknown,
        }
    }

    fn owner(&mut self, socket: &Socket, now: Instant) -> Option<Arc<Process>> {
        let owner = socket.owner.filter(|task| !self.processes.is_own(task))?;
        Some(self.processes.describe(&owner, now))
    }

    fn state(&mut self, socket: &Socket, old: TcpState, new: TcpState, at_ns: u64, now: Instant) -> Event {
        // A transition into the same state (FIN_WAIT1 twice) is not kept as one.
        let earlier = if old == new { 0 } else { 1 };
        let before = socket.states.iter().rev().nth(earlier).map(|(_, at)| *at);
        Event::State(Box::new(State {
            time: self.clock.date(at_ns),
            cookie: socket.cookie,
            netns: socket.netns,
            local: socket.local,
            remote: socket.remote,
            role: socket.role,
            process: self.owner(socket, now),
            old,
            new,
            delta_us: before.map(|before| at_ns.saturating_sub(before) / 1000),
            closed_by: closed_by(socket),
            http: socket.http.clone(),
        }))
    }
}

/// Moves to the event what of its socket is of no more use once it is judged.
fn complete(close: &mut Close, socket: &mut Socket) {
    let zero = socket.established_ns.or_else(|| socket.states.first().map(|(_, at)| *at)).unwrap_or(socket.at_ns);
    let states = std::mem::take(&mut socket.states).into_iter();
    close.states = states.map(|(state, at)| StateAt { state, at_us: micros_between(zero, at) }).collect();
    close.http = socket.http.take();
}

/// Now, in the clock of the facts: the host's, whatever time namespace this process is in.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let own = u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0);
    own.saturating_add_signed(time_namespace::shifts().monotonic_ns.saturating_neg())
}

/// Who has ended the connection so far.
fn closed_by(socket: &Socket) -> ClosedBy {
    match (socket.new, socket.first_end) {
        (TcpState::Close, _) => verdict::ending(socket).closed_by,
        // The FIN leaves right after this transition.
        (TcpState::FinWait1, ClosedBy::None) => ClosedBy::Local,
        (_, first) => first,
    }
}

/// One process, whatever it is called by now.
fn same(one: &Task, other: &Task) -> bool {
    one.pid == other.pid && one.start_ns == other.start_ns
}

fn micros_between(from: u64, to: u64) -> i64 {
    if to >= from {
        i64::try_from((to - from) / 1000).unwrap_or(i64::MAX)
    } else {
        -i64::try_from((from - to) / 1000).unwrap_or(i64::MAX)
    }
}

fn question(socket: &Socket) -> Question {
    Question {
        netns: socket.netns,
        pid: socket.owner.or(socket.closer).map(|task| task.pid),
        local: socket.local,
        remote: socket.remote,
        bound_dev: socket.bound_dev,
        cookie: socket.cookie,
    }
}

/// Whether a RST may have followed the end: not where both FINs were acknowledged.
fn may_reset(socket: &Socket) -> bool {
    !socket.fin_received || matches!(socket.old, TcpState::LastAck | TcpState::Closing)
}

/// Whether a RST may have followed the end which no hook tells of on this host.
fn may_have_reset_unseen(held: &Held, fate: Final) -> bool {
    held.socket.blind.send_reset
        && held.ending.fate == Fate::Ask
        && held.deadline.is_none()
        && !matches!(fate, Final::TimeWait | Final::FinWait2)
        && may_reset(&held.socket)
}

/// Whether a mini-socket was or may have been left: not by an end that comes before both FINs are acknowledged.
fn may_leave_mini_socket(held: &Held) -> bool {
    held.deadline.is_some() || held.socket.old == TcpState::FinWait2 || !may_reset(&held.socket)
}

/// What it means that nothing is left.
fn gone(held: &Held, now: Instant) -> (Final, FinalSource) {
    match held.deadline {
        // Nobody asked for so long that a TIME_WAIT may have come and gone.
        Some(_) if now.duration_since(held.seen) >= TIME_WAIT / 2 => (Final::Unknown, FinalSource::Inferred),
        // Its time-out has passed. Had the FIN come, it would be TIME_WAIT for another minute.
        Some(deadline) if now + TIMER_SLACK >= deadline => (Final::FinWait2, FinalSource::SockDiag),
        // It went before its time, and not by a FIN: mini-sockets are deleted by a RST. No hook sees that.
        Some(_) => (Final::Reset, FinalSource::Inferred),
        // An orphan that the kernel gave up, or an end by the application: no RST followed.
        None if !may_leave_mini_socket(held) => (Final::Closed, FinalSource::State),
        // The FIN had come, so it would be there if there had been room for it.
        None if held.socket.fin_received => (Final::Closed, FinalSource::SockDiag),
        // It was never seen: a RST within moments, or no memory for it.
        None => (Final::Unknown, FinalSource::SockDiag),
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use tracer_ebpf::{Record, first_end, flag, kind, pack_state};

    use super::*;
    use crate::decode::decode;

    /// The end of a socket that is half-closed: its peer has sent no FIN.
    fn half_closed(cookie: u64) -> Fact {
        let mut record = Record::zeroed();
        (record.kind, record.family, record.cookie) = (kind::CLOSE, 4, cookie);
        (record.old_state, record.new_state, record.first_end) = (5, 7, first_end::LOCAL);
        record.flags = flag::FIN_SENT | flag::ALL_ACKNOWLEDGED | flag::SHUT_DOWN;
        (record.established_ns, record.end_ns, record.at_ns) = (1, 2, 3);
        record.states[..4].copy_from_slice(&[pack_state(1, 1), pack_state(4, 2), pack_state(5, 2), pack_state(7, 3)]);
        decode(bytemuck::bytes_of(&record)).expect("a record")
    }

    #[test]
    fn of_too_many_uncertain_ends_the_oldest_is_reported_as_it_stands() {
        const MORE: usize = 3;
        let answer = Answer::FinWait2(Duration::from_secs(60));
        let sock_diag = SockDiag::scripted(std::iter::repeat_n(answer, HELD + MORE));
        let mut connections = Connections::new(Processes::new(), sock_diag, false);
        let (now, mut out) = (Instant::now(), Vec::new());
        for cookie in 0..HELD + MORE {
            connections.fact(half_closed(cookie as u64 + 1), now, &mut out);
            assert_eq!(out.len(), (cookie + 1).saturating_sub(HELD));
        }
        assert_eq!(connections.ends(), ((HELD + MORE) as u64, HELD as u64));
        for (event, cookie) in out.iter().zip(1..) {
            let Event::Close(close) = event else { panic!("{event:?}") };
            let told = (close.cookie, close.fate, close.fate_source);
            assert_eq!(told, (cookie, Some(Final::FinWait2), Some(FinalSource::Inferred)));
        }
    }

    /// The end of a socket that was closed with unread data: its RST may come behind it.
    #[test]
    fn a_reset_is_waited_for_as_long_as_there_is_more_to_be_read() {
        let polled = |more: &[bool], pause: Duration| {
            let sock_diag = SockDiag::scripted(std::iter::repeat_n(Answer::Gone, 2));
            let mut connections = Connections::new(Processes::new(), sock_diag, false);
            let (mut now, mut out) = (Instant::now(), Vec::new());
            connections.fact(half_closed(1), now, &mut out);
            for more in more {
                assert_eq!(out.len(), 0);
                now += pause;
                assert!(connections.next_poll().is_some_and(|at| at <= now));
                connections.poll(now, *more, &mut out);
            }
            let told = out.len();
            connections.fact(Fact::ResetAfterEnd { cookie: 1 }, now, &mut out);
            let Some(Event::Close(close)) = out.first() else { panic!("{out:?}") };
            (told, close.fate)
        };
        assert_eq!(polled(&[true, true, true], FIRST), (0, Some(Final::Reset)));
        assert_eq!(polled(&[true, true, false], FIRST).0, 1);
        assert_eq!(polled(&[true, true], OVERDUE / 2).0, 1, "not for ever");
    }

    #[test]
    fn dates_are_exact_to_the_nanosecond() {
        let now: Timestamp = "2026-01-02T03:04:05.000000006Z".parse().expect("a date");
        let clock = Clock::new(now, 100_000_000_005);
        assert_eq!(clock.date(100_000_000_005), now);
        assert_eq!(clock.date(0).to_string(), "2026-01-02T03:02:25.000000001Z");
    }

    /// Whoever sets the clock: what comes from then on has the new time, and how far apart two moments were is not changed.
    #[test]
    fn a_clock_that_is_set_moves_dates_and_nothing_else() {
        let date = |text: &str| text.parse::<Timestamp>().expect("a date");
        let before = Clock::new(date("2026-01-02T03:04:05Z"), 100_000_000_000);
        for set_to in ["2026-01-02T04:04:05Z", "2026-01-01T03:04:05Z", "1970-01-01T00:00:00Z", "2199-12-31T23:59:59Z"] {
            let after = Clock::new(date(set_to), 100_000_000_000);
            assert_eq!(after.date(100_000_000_000), date(set_to));
            for clock in [before, after] {
                let (early, late) = (clock.date(99_000_000_000), clock.date(99_250_000_000));
                assert_eq!(late.duration_since(early), SignedDuration::from_millis(250), "{set_to}");
            }
        }
    }

    /// `CLOCK_MONOTONIC` stands still while the host sleeps, the date does not: the next look at both clocks knows.
    #[test]
    fn after_a_suspend_the_date_is_right_again() {
        let date = |text: &str| text.parse::<Timestamp>().expect("a date");
        let asleep = Clock::new(date("2026-01-02T03:00:00Z"), 100_000_000_000);
        let awake = Clock::new(date("2026-01-02T11:00:01Z"), 101_000_000_000);
        assert_eq!(asleep.date(99_000_000_000), date("2026-01-02T02:59:59Z"));
        assert_eq!(awake.date(101_000_000_000), date("2026-01-02T11:00:01Z"));
        // Durations are of `CLOCK_MONOTONIC`: the night is not in them.
        assert_eq!(micros_between(99_000_000_000, 101_000_000_000), 2_000_000);
    }

    #[test]
    fn times_before_established_are_negative() {
        assert_eq!(micros_between(5_000_000, 3_000_000), -2000);
        assert_eq!(micros_between(3_000_000, 5_000_999), 2000);
    }
}
