//! Events in, lines of aligned columns out, never wider than 120.
//!
//! Columns begin at fixed places; one that is too wide (an IPv6 address) pushes the next ones, and the end of the line is
//! shortened for it, never an address. Widths are those on the terminal: escape sequences do not count.

mod summary;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::escape::{fit, is_plain};
use super::pieces::Pieces;
use crate::event::{
    Cause, Close, ClosedBy, Connection, Event, Final, FinalSource, Http, Lost, Process, Role, State, TcpState,
};
use crate::verdict;

/// No line is wider.
pub const WIDTH: usize = 120;

/// Where the columns begin.
mod column {
    pub(super) const PROCESS: usize = 9;
    pub(super) const SOCKET: usize = 28;
    pub(super) const CLOSED: usize = 56;
    pub(super) const FINAL: usize = 63;
    pub(super) const WHY: usize = 73;
}

/// The widest process: a longer name is cut.
const PROCESS_WIDTH: usize = column::SOCKET - column::PROCESS - 1;
/// Before the process that made the close, where it is not the owner.
const CLOSER: &str = ", by ";
const CLOSER_WIDTH: usize = CLOSER.len() + PROCESS_WIDTH;
/// It is shown if so many columns are left for it and the reason.
const CLOSER_MIN: usize = CLOSER_WIDTH + 14;
/// A request is shown behind the reason if so many columns are left for it.
const REQUEST_MIN: usize = 14;
/// Groups of the summary that are shown.
const GROUPS: usize = 10;

const HEADER: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const TIME_WAIT: Style = AnsiColor::Yellow.on_default();
const ALARM: Style = AnsiColor::Red.on_default();
const ADVICE: Style = AnsiColor::Cyan.on_default();

/// Writes text.
#[derive(Debug)]
pub struct Text {
    zone: TimeZone,
    clock: Clock,
    line: Line,
}

/// The time of the last line: most lines share their second with the one before.
#[derive(Debug)]
struct Clock {
    second: Option<i64>,
    text: String,
}

impl Text {
    /// Text with times of `zone`; `styled`: with the escape sequences of a terminal.
    pub fn new(zone: TimeZone, styled: bool) -> Self {
        Self {
            zone,
            clock: Clock { second: None, text: String::new() },
            line: Line { text: Pieces::new(), column: 0, styled },
        }
    }

    /// The line with the names of the columns.
    pub fn header(&self) -> Vec<u8> {
        let mut line = Line { text: Pieces::new(), column: 0, styled: self.line.styled };
        line.style(HEADER, |line| {
            line.put("TIME");
            for (at, name) in [
                (column::PROCESS, "PROCESS"),
                (column::SOCKET, "SOCKET"),
                (column::CLOSED, "CLOSED"),
                (column::FINAL, "FINAL"),
                (column::WHY, "WHY"),
            ] {
                line.stop(at);
                line.put(name);
            }
        });
        line.end();
        line.text.whole().to_vec()
    }

    /// Prints one event, in one write. `start` is the header: what it says beyond is no line of a connection.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn event(&mut self, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        self.line.text.clear();
        self.line.column = 0;
        match event {
            Event::Start(_) => self.line.text.bytes(&self.header()),
            Event::Close(close) => self.close(close),
            Event::CloseWait(open) => self.close_wait(open),
            Event::State(state) => self.state(state),
            Event::Lost(lost) => self.lost(lost),
            Event::Summary(summary) => self.summary(summary),
            Event::Alert(alert) => self.alert(alert),
        }
        out.write_all(self.line.text.whole())
    }

    fn close(&mut self, close: &Close) {
        self.time(close.time);
        let line = &mut self.line;
        line.begin(close.process.as_deref(), close.role, close.local, close.remote);
        line.word(closed_by_word(close.closed_by));
        line.stop(column::FINAL);
        let fate = close.fate.unwrap_or(Final::Unknown);
        let inferred = close.fate_source == Some(FinalSource::Inferred) && fate != Final::Unknown;
        line.style(fate_style(fate), |line| {
            line.word(fate_word(fate));
            if inferred {
                line.word("?");
            }
        });
        line.stop(column::WHY);
        // Who made the close must not be lost behind why.
        let room = WIDTH - line.column;
        let closer = close.closer.as_ref().filter(|_| room >= CLOSER_MIN);
        let room = if closer.is_some() { room - CLOSER_WIDTH } else { room };
        match verdict::advice(close) {
            Some(Cow::Borrowed(advice)) if advice.len() <= room => line.style(ADVICE, |line| line.word(advice)),
            Some(advice) => line.style(ADVICE, |line| line.put_within(&advice, room)),
            None => line.word(cause_word(close.cause)),
        }
        if let Some(closer) = closer {
            line.word(CLOSER);
            line.process(closer);
        }
        if let Some(http) = &close.http
            && !matches!(close.cause, Cause::Unanswered)
        {
            line.request(http);
        }
        line.end();
    }

    fn close_wait(&mut self, open: &Close) {
        self.time(open.time);
        let line = &mut self.line;
        line.begin(open.process.as_deref(), open.role, open.local, open.remote);
        line.word(closed_by_word(open.closed_by));
        line.stop(column::FINAL);
        line.style(ALARM, |line| line.word("close_wait"));
        line.stop(column::WHY);
        let since_us = open.states.last().map_or(0, |last| last.at_us.try_into().unwrap_or(0));
        let waited = elapsed(open.duration_us.saturating_sub(since_us));
        line.style(ADVICE, |line| line.put(&format!("not closed here for {waited}")));
        if let Some(http) = &open.http {
            line.request(http);
        }
        line.end();
    }

    fn state(&mut self, state: &State) {
        self.time(state.time);
        let line = &mut self.line;
        line.begin(state.process.as_deref(), state.role, state.local, state.remote);
        line.put(if state.closed_by == ClosedBy::None { "-" } else { closed_by_word(state.closed_by) });
        line.stop(column::FINAL);
        let style = if state.new == TcpState::TimeWait { TIME_WAIT } else { DIM };
        line.style(style, |line| {
            line.put(state_word(state.old));
            line.put(">");
            line.put(state_word(state.new));
        });
        if let Some(us) = state.delta_us {
            line.put(" +");
            line.put(&elapsed(us));
        }
        if let Some(http) = &state.http {
            let word = |connection: Option<Connection>| connection.map_or("-".to_owned(), |said| said.to_string());
            line.put(&format!(" (req {}, resp {})", word(http.request_connection), word(http.response_connection)));
        }
        line.end();
    }

    fn lost(&mut self, lost: &Lost) {
        self.time(lost.since);
        let since = self.clock.text.clone();
        self.line.text.clear();
        self.line.column = 0;
        self.time(lost.time);
        let line = &mut self.line;
        line.stop(column::PROCESS);
        let records = if lost.records == 1 { "record" } else { "records" };
        line.style(ALARM, |line| {
            line.put(&format!("LOST {} {records} since {since}: up to as many lines are missing", lost.records));
        });
        line.end();
    }

    fn time(&mut self, time: Timestamp) {
        let second = time.as_second();
        if self.clock.second != Some(second) {
            self.clock.second = Some(second);
            self.clock.text.clear();
            let local = self.zone.to_datetime(time);
            // Writing to a string does not fail.
            let _ = write!(self.clock.text, "{:02}:{:02}:{:02}", local.hour(), local.minute(), local.second());
        }
        let clock = &self.clock.text;
        self.line.style(DIM, |line| line.own(clock));
    }
}

/// A line in the making. Nothing gets into it unescaped, nor behind column [`WIDTH`].
#[derive(Debug)]
struct Line {
    text: Pieces,
    column: usize,
    styled: bool,
}

impl Line {
    /// Appends text, as far as there is room.
    fn put(&mut self, text: &str) {
        self.put_within(text, WIDTH);
    }

    fn put_within(&mut self, text: &str, max: usize) {
        let max = max.min(WIDTH - self.column);
        if text.len() <= max && is_plain(text) {
            self.text.put(text);
            self.column += text.len();
            return;
        }
        let mut fitted = String::new();
        self.column += fit(&mut fitted, text, max);
        self.text.put(&fitted);
    }

    /// Appends one of our own words.
    #[inline(always)]
    fn word(&mut self, word: &'static str) {
        self.own(word);
    }

    /// Appends what was made here, of ASCII, and needs no escaping.
    #[inline(always)]
    fn own(&mut self, text: &str) {
        if text.len() <= WIDTH - self.column {
            self.text.put(text);
            self.column += text.len();
        } else {
            self.put(text);
        }
    }

    /// Spaces up to a column, at least one.
    fn stop(&mut self, column: usize) {
        let spaces = column.saturating_sub(self.column).max(1).min(WIDTH - self.column);
        self.column += spaces;
        let mut left = spaces;
        while left > 0 {
            let some = left.min(Pieces::SPACES);
            self.text.spaces(some);
            left -= some;
        }
    }

    fn style(&mut self, style: Style, put: impl FnOnce(&mut Self)) {
        if !self.styled {
            return put(self);
        }
        let _ = write!(self.text, "{style}");
        put(self);
        let _ = write!(self.text, "{style:#}");
    }

    fn end(&mut self) {
        self.text.put("\n");
        self.column = 0;
    }

    /// Process and socket, up to the column CLOSED.
    fn begin(&mut self, process: Option<&Process>, role: Role, local: SocketAddr, remote: SocketAddr) {
        self.stop(column::PROCESS);
        match process {
            Some(process) => self.process(process),
            None => self.style(DIM, |line| line.put("unknown")),
        }
        self.stop(column::SOCKET);
        // Numbers and addresses only: they fit, and need no escaping.
        self.text.put(":");
        let local = self.text.number(local.port().into());
        self.text.put(match role {
            Role::Server => " < ",
            Role::Client => " > ",
            Role::Unknown => " - ",
        });
        let ip = match remote.ip() {
            IpAddr::V4(ip) => self.text.ipv4(ip),
            IpAddr::V6(ip) => {
                let ip = format!("[{ip}]");
                self.text.put(&ip);
                ip.len()
            }
        };
        self.text.put(":");
        let remote = self.text.number(remote.port().into());
        self.column += 1 + local + 3 + ip + 1 + remote;
        self.stop(column::CLOSED);
    }

    fn process(&mut self, process: &Process) {
        let begin = self.column;
        let mut pid = itoa::Buffer::new();
        self.own(pid.format(process.pid));
        self.word("/");
        self.put_within(&process.comm, (begin + PROCESS_WIDTH).saturating_sub(self.column));
    }

    /// ` (GET /target 200)`, with the target as far as there is room.
    fn request(&mut self, http: &Http) {
        let Some((method, target)) = http.method.as_deref().zip(http.target.as_deref()) else { return };
        let room = WIDTH - self.column;
        if room < REQUEST_MIN {
            return;
        }
        let mut status_text = itoa::Buffer::new();
        let status = http.status.map_or("-", |status| status_text.format(status));
        self.word(" (");
        let last = WIDTH - (status.len() + 2);
        self.put_within(method, last - self.column);
        self.put_within(" ", last - self.column);
        // One column for the mark of a target that the record itself has cut.
        let mark = usize::from(http.target_truncated);
        let max = (last - self.column).saturating_sub(mark);
        if http.target_truncated {
            let mut shown = String::new();
            self.column += fit(&mut shown, target, max.min(WIDTH - self.column));
            self.text.put(&shown);
            if !shown.ends_with('…') {
                self.put_within("…", last - self.column);
            }
        } else {
            self.put_within(target, max);
        }
        self.word(" ");
        self.own(status);
        self.word(")");
    }
}

/// `850 us`, `12 ms`, `3.4 s`
pub(super) fn elapsed(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{}.{} s", us / 1_000_000, us / 100_000 % 10),
    }
}

const fn fate_style(fate: Final) -> Style {
    match fate {
        Final::TimeWait | Final::FinWait2 => TIME_WAIT,
        Final::Reset | Final::TimedOut => ALARM,
        Final::Closed | Final::Unknown => Style::new(),
    }
}

pub(super) const fn closed_by_word(closed_by: ClosedBy) -> &'static str {
    match closed_by {
        ClosedBy::Local => "local",
        ClosedBy::Remote => "remote",
        ClosedBy::Both => "both",
        ClosedBy::None => "none",
        // There is no room for its name.
        ClosedBy::Unobserved => "?",
    }
}

pub(super) const fn fate_word(fate: Final) -> &'static str {
    match fate {
        Final::TimeWait => "time_wait",
        Final::FinWait2 => "fin_wait2",
        Final::Closed => "closed",
        Final::Reset => "reset",
        Final::TimedOut => "timed_out",
        Final::Unknown => "unknown",
    }
}

pub(super) const fn cause_word(cause: Cause) -> &'static str {
    match cause {
        Cause::Timeout => "timeout",
        Cause::ResetByPeer => "reset_by_peer",
        Cause::ResetByLocal => "reset_by_local",
        Cause::ProcessExit => "process_exit",
        Cause::Unused => "unused",
        Cause::Tls => "tls",
        Cause::Upgraded => "upgraded",
        Cause::H2 => "h2",
        Cause::NotHttp => "not_http",
        Cause::Unanswered => "unanswered",
        Cause::Truncated => "truncated",
        Cause::RequestClose => "request_close",
        Cause::ResponseClose => "response_close",
        Cause::Http10 => "http10",
        Cause::IdleTimeout => "idle_timeout",
        Cause::NoReuse => "no_reuse",
        Cause::Unknown => "unknown",
    }
}

pub(super) const fn state_word(state: TcpState) -> &'static str {
    match state {
        TcpState::Established => "ESTABLISHED",
        TcpState::SynSent => "SYN_SENT",
        TcpState::SynRecv => "SYN_RECV",
        TcpState::FinWait1 => "FIN_WAIT1",
        TcpState::FinWait2 => "FIN_WAIT2",
        TcpState::TimeWait => "TIME_WAIT",
        TcpState::Close => "CLOSE",
        TcpState::CloseWait => "CLOSE_WAIT",
        TcpState::LastAck => "LAST_ACK",
        TcpState::Listen => "LISTEN",
        TcpState::Closing => "CLOSING",
        TcpState::NewSynRecv => "NEW_SYN_RECV",
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    /// A word of the text is the word of the JSON.
    fn same_as_json<T: serde::Serialize + Copy>(values: &[T], word: fn(T) -> &'static str) {
        for value in values {
            assert_eq!(serde_json::to_value(value).expect("JSON"), word(*value));
        }
    }

    #[test]
    fn words_are_those_of_the_contract() {
        same_as_json(&[ClosedBy::Local, ClosedBy::Remote, ClosedBy::Both, ClosedBy::None], closed_by_word);
        same_as_json(Final::value_variants(), fate_word);
        same_as_json(Cause::value_variants(), cause_word);
        same_as_json(
            &[
                TcpState::Established,
                TcpState::SynSent,
                TcpState::SynRecv,
                TcpState::FinWait1,
                TcpState::FinWait2,
                TcpState::TimeWait,
                TcpState::Close,
                TcpState::CloseWait,
                TcpState::LastAck,
                TcpState::Listen,
                TcpState::Closing,
                TcpState::NewSynRecv,
            ],
            state_word,
        );
    }

    #[test]
    fn elapsed_times() {
        let cases = [(0, "0 us"), (999, "999 us"), (1_000, "1 ms"), (999_999, "999 ms"), (1_000_000, "1.0 s")];
        for (us, expected) in cases {
            assert_eq!(elapsed(us), expected);
        }
        assert_eq!(elapsed(61_250_000), "61.2 s");
    }
}
