//! Events in, one JSON object a line out.
//!
//! JSON lets most control characters of Unicode stand in strings as they are. Here they are written as `\u….` as well: a
//! line of output that is shown on a terminal must not be able to do anything to it.
//!
//! `close` lines, of which there are thousands a second, are put together here by hand: serde looks at each byte of each
//! name of a field. What many of them share, a second and a process, is kept as it is written. A test holds them against
//! what serde writes.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize as _;
use serde_json::ser::{Formatter, Serializer};

use super::escape::is_hostile;
use super::pieces::Pieces;
use super::text::{cause_word, closed_by_word, fate_word, state_word};
use crate::event::{
    Close, ClosedBy, Connection, Event, Family, FinalSource, How, Http, HttpVersion, Process, Protocol, Role, Source,
};
use crate::recent::Recent;

/// Processes that are kept as they are written.
const PROCESSES: usize = 4;

/// Writes NDJSON.
#[derive(Debug, Default)]
pub struct Json {
    line: Line,
    second: Second,
    processes: Recent<Written, PROCESSES>,
}

/// The second of the last line, up to its fraction: most lines share it with the one before.
#[derive(Debug, Default)]
struct Second {
    of: Option<i64>,
    text: String,
}

impl Second {
    /// What [`Timestamp`] displays.
    fn put(&mut self, time: Timestamp, line: &mut Line) -> io::Result<()> {
        let (second, Ok(fraction)) = (time.as_second(), u32::try_from(time.subsec_nanosecond())) else {
            // Before 1970 both are negative.
            return write!(line.0, "{time}");
        };
        if self.of != Some(second) {
            let whole = Timestamp::from_second(second).map_err(io::Error::other)?.to_string();
            self.text.clear();
            self.text.push_str(whole.trim_end_matches('Z'));
            self.of = Some(second);
        }
        line.raw(&self.text);
        if fraction > 0 {
            // A leading 1 keeps the zeros behind it.
            let mut digits = itoa::Buffer::new();
            let digits = digits.format(1_000_000_000 + fraction);
            line.raw(".");
            line.raw(digits.get(1..).unwrap_or_default().trim_end_matches('0'));
        }
        line.raw("Z");
        Ok(())
    }
}

/// A process, and how it is written.
#[derive(Debug)]
struct Written {
    /// Held: while it is, no other one has its address.
    process: Arc<Process>,
    json: Vec<u8>,
}

impl Json {
    /// Appends one line, in one write.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn event(&mut self, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        self.line.0.clear();
        match event {
            Event::Close(close) => self.close(close)?,
            event => append(&mut self.line.0, event)?,
        }
        out.write_all(self.line.0.whole())
    }

    /// What serde makes of [`Event::Close`].
    fn close(&mut self, close: &Close) -> io::Result<()> {
        let line = &mut self.line;
        let Close { time, cookie, netns, family, local, remote, role, process, closed_by, closer, how, fate, .. } =
            close;
        line.raw(r#"{"type":"close","time":""#);
        self.second.put(*time, line)?;
        line.number(r#"","cookie":"#, *cookie);
        line.number(r#","netns":"#, *netns);
        line.raw(match family {
            Family::Ipv4 => r#","family":"ipv4","local":""#,
            Family::Ipv6 => r#","family":"ipv6","local":""#,
        });
        line.address(*local)?;
        line.raw(r#"","remote":""#);
        line.address(*remote)?;
        line.raw(match role {
            Role::Server => r#"","role":"server","process":"#,
            Role::Client => r#"","role":"client","process":"#,
            Role::Unknown => r#"","role":"unknown","process":"#,
        });
        process_of(&mut self.processes, line, process.as_ref())?;
        line.word(
            r#","closed_by":""#,
            match closed_by {
                ClosedBy::Unobserved => "unobserved",
                seen => closed_by_word(*seen),
            },
        );
        line.raw(r#","closer":"#);
        process_of(&mut self.processes, line, closer.as_ref())?;
        line.optional_word(r#","how":"#, how.map(how_word));
        if let Some(fate) = fate {
            line.word(r#","final":""#, fate_word(*fate));
        }
        if let Some(source) = close.fate_source {
            line.word(r#","final_source":""#, fate_source_word(source));
        }
        line.raw(r#","states":["#);
        for (n, at) in close.states.iter().enumerate() {
            line.word(if n == 0 { r#"{"state":""# } else { r#",{"state":""# }, state_word(at.state));
            line.raw(if at.at_us < 0 { r#","at_us":-"# } else { r#","at_us":"# });
            line.0.number(at.at_us.unsigned_abs());
            line.raw("}");
        }
        line.number(r#"],"duration_us":"#, close.duration_us);
        line.truth(r#","started_before":"#, close.started_before);
        line.optional_number(r#","idle_us":"#, close.idle_us);
        line.number(r#","rx_bytes":"#, close.rx_bytes);
        line.number(r#","tx_bytes":"#, close.tx_bytes);
        line.word(r#","protocol":""#, protocol_word(close.protocol));
        match &close.http {
            Some(http) => line.http(http)?,
            None => line.raw(r#","http":null"#),
        }
        line.word(r#","cause":""#, cause_word(close.cause));
        line.raw("}\n");
        Ok(())
    }
}

/// Appends a process as it is written, or `null`.
fn process_of(
    written: &mut Recent<Written, PROCESSES>,
    line: &mut Line,
    process: Option<&Arc<Process>>,
) -> io::Result<()> {
    let Some(process) = process else {
        line.raw("null");
        return Ok(());
    };
    if let Some(kept) = written.find(|kept| Arc::ptr_eq(&kept.process, process)) {
        line.0.bytes(&kept.json);
        return Ok(());
    }
    let mut json = Line::default();
    json.process(process)?;
    line.0.bytes(json.0.whole());
    written.keep(Written { process: Arc::clone(process), json: json.0.whole().to_vec() });
    Ok(())
}

/// Appends any value as one line.
///
/// # Errors
/// The value cannot be JSON.
pub(crate) fn append(mut out: impl Write, value: &impl serde::Serialize) -> io::Result<()> {
    value.serialize(&mut Serializer::with_formatter(&mut out, Harmless))?;
    out.write_all(b"\n")
}

/// A line in the making. A `name` begins with the comma before it and ends where the value begins: with the colon, or with
/// the quotation mark of what is always a word.
#[derive(Debug, Default)]
struct Line(Pieces);

impl Line {
    fn process(&mut self, process: &Process) -> io::Result<()> {
        let Process { pid, comm, exe, uid, cgroup, container, source } = process;
        self.number(r#"{"pid":"#, *pid);
        self.text(r#","comm":"#, Some(comm))?;
        self.text(r#","exe":"#, exe.as_deref())?;
        self.number(r#","uid":"#, *uid);
        self.text(r#","cgroup":"#, cgroup.as_deref())?;
        self.text(r#","container":"#, container.as_deref())?;
        self.word(
            r#","source":""#,
            match source {
                Source::Read => "read",
                Source::Close => "close",
                Source::Connect => "connect",
                Source::OpenFiles => "open-files",
            },
        );
        self.raw("}");
        Ok(())
    }

    fn http(&mut self, http: &Http) -> io::Result<()> {
        self.number(r#","http":{"requests":"#, http.requests);
        self.number(r#","responses":"#, http.responses);
        self.text(r#","method":"#, http.method.as_deref())?;
        self.text(r#","target":"#, http.target.as_deref())?;
        self.truth(r#","target_truncated":"#, http.target_truncated);
        self.optional_number(r#","status":"#, http.status);
        self.optional_word(r#","request_version":"#, http.request_version.map(version_word));
        self.optional_word(r#","response_version":"#, http.response_version.map(version_word));
        self.connection(r#","request_connection":"#, http.request_connection)?;
        self.connection(r#","response_connection":"#, http.response_connection)?;
        self.optional_number(r#","keep_alive_timeout_s":"#, http.keep_alive_timeout_s);
        self.optional_number(r#","keep_alive_max":"#, http.keep_alive_max);
        self.truth(r#","answered":"#, http.answered);
        self.raw("}");
        Ok(())
    }

    fn connection(&mut self, name: &str, connection: Option<Connection>) -> io::Result<()> {
        match connection {
            None => self.optional_word(name, None),
            Some(Connection::Absent) => self.optional_word(name, Some("absent")),
            Some(Connection::Unobserved) => self.optional_word(name, Some("unobserved")),
            Some(Connection::Tokens { close: true, keep_alive: false, upgrade: false, other: false }) => {
                self.optional_word(name, Some("close"));
            }
            Some(Connection::Tokens { close: false, keep_alive: true, upgrade: false, other: false }) => {
                self.optional_word(name, Some("keep-alive"));
            }
            Some(tokens) => write!(self.0, "{name}\"{tokens}\"")?,
        }
        Ok(())
    }

    fn address(&mut self, address: SocketAddr) -> io::Result<()> {
        match address {
            SocketAddr::V4(address) => {
                self.0.ipv4(*address.ip());
                self.number(":", address.port());
                Ok(())
            }
            SocketAddr::V6(address) => write!(self.0, "{address}"),
        }
    }

    #[inline(always)]
    fn raw(&mut self, text: &str) {
        self.0.put(text);
    }

    #[inline(always)]
    fn number(&mut self, name: &str, number: impl Into<u64>) {
        self.raw(name);
        self.0.number(number.into());
    }

    fn optional_number(&mut self, name: &str, number: Option<impl Into<u64>>) {
        match number {
            Some(number) => self.number(name, number),
            None => self.optional_word(name, None),
        }
    }

    #[inline(always)]
    fn truth(&mut self, name: &str, truth: bool) {
        self.raw(name);
        self.raw(if truth { "true" } else { "false" });
    }

    /// One of our own words.
    #[inline(always)]
    fn word(&mut self, name: &str, word: &str) {
        self.raw(name);
        self.raw(word);
        self.raw("\"");
    }

    #[inline(always)]
    fn optional_word(&mut self, name: &str, word: Option<&str>) {
        self.raw(name);
        match word {
            Some(word) => self.word("\"", word),
            None => self.raw("null"),
        }
    }

    /// What somebody else chose.
    fn text(&mut self, name: &str, text: Option<&str>) -> io::Result<()> {
        match text {
            Some(text) if text.bytes().all(|byte| (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\') => {
                self.optional_word(name, Some(text));
                Ok(())
            }
            text => {
                self.raw(name);
                text.serialize(&mut Serializer::with_formatter(&mut self.0, Harmless))?;
                Ok(())
            }
        }
    }
}

const fn version_word(version: HttpVersion) -> &'static str {
    match version {
        HttpVersion::V10 => "1.0",
        HttpVersion::V11 => "1.1",
    }
}

const fn how_word(how: How) -> &'static str {
    match how {
        How::Fin => "fin",
        How::Rst => "rst",
        How::Timeout => "timeout",
        How::Unobserved => "unobserved",
    }
}

const fn fate_source_word(source: FinalSource) -> &'static str {
    match source {
        FinalSource::Fin => "fin",
        FinalSource::SockDiag => "sock_diag",
        FinalSource::State => "state",
        FinalSource::Inferred => "inferred",
    }
}

const fn protocol_word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Http10 => "http/1.0",
        Protocol::Http11 => "http/1.1",
        Protocol::H2 => "h2",
        Protocol::Websocket => "websocket",
        Protocol::Tls => "tls",
        Protocol::Other => "other",
        Protocol::None => "none",
        Protocol::Unobserved => "unobserved",
    }
}

/// Compact JSON without raw control characters.
struct Harmless;

impl Formatter for Harmless {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // The serializer has already escaped C0 controls. Nearly everything else is ASCII, and goes out in one piece.
        if fragment.bytes().all(|byte| byte < 0x7f) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut from = 0;
        for (at, c) in fragment.char_indices().filter(|(_, c)| is_hostile(*c)) {
            writer.write_all(&fragment.as_bytes()[from..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            from = at + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[from..])
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;
    use proptest::option::of;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::event::{Cause, Final, StateAt, TcpState};

    fn json(text: &str) -> String {
        let mut out = Vec::new();
        text.serialize(&mut Serializer::with_formatter(&mut out, Harmless)).expect("JSON");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn controls_are_escaped() {
        assert_eq!(json("a\x1b\"\\\n\0"), r#""a\u001b\"\\\n\u0000""#);
        assert_eq!(json("\x7f\u{9b}\u{202e}x\u{2028}\u{2066}"), r#""\u007f\u009b\u202ex\u2028\u2066""#);
        assert_eq!(json("\u{e0041}"), r#""\udb40\udc41""#);
        assert_eq!(json("größe 日本 🦀"), "\"größe 日本 🦀\"");
    }

    fn process() -> impl Strategy<Value = Process> {
        let source = select(vec![Source::Read, Source::Close, Source::Connect, Source::OpenFiles]);
        let text = any::<String>;
        (any::<(u32, u32)>(), text(), of(text()), of(text()), of(text()), source).prop_map(
            |((pid, uid), comm, exe, cgroup, container, source)| Process {
                pid,
                comm,
                exe,
                uid,
                cgroup,
                container,
                source,
            },
        )
    }

    fn http() -> impl Strategy<Value = Http> {
        let version = || of(select(vec![HttpVersion::V10, HttpVersion::V11]));
        let connection = || {
            let tokens = any::<[bool; 4]>().prop_map(|[close, keep_alive, upgrade, other]| Connection::Tokens {
                close,
                keep_alive,
                upgrade,
                other,
            });
            of(prop_oneof![Just(Connection::Absent), Just(Connection::Unobserved), tokens])
        };
        let numbers = any::<(u32, u32, Option<u16>, Option<u32>, Option<u32>)>();
        (
            numbers,
            of(any::<String>()),
            of(any::<String>()),
            any::<[bool; 2]>(),
            [version(), version()],
            [connection(), connection()],
        )
            .prop_map(|(numbers, method, target, [target_truncated, answered], versions, connections)| Http {
                requests: numbers.0,
                responses: numbers.1,
                method,
                target,
                target_truncated,
                status: numbers.2,
                request_version: versions[0],
                response_version: versions[1],
                request_connection: connections[0],
                response_connection: connections[1],
                keep_alive_timeout_s: numbers.3,
                keep_alive_max: numbers.4,
                answered,
            })
    }

    fn states() -> impl Strategy<Value = Vec<StateAt>> {
        use TcpState::*;
        let state = select(vec![
            Established,
            SynSent,
            SynRecv,
            FinWait1,
            FinWait2,
            TimeWait,
            Close,
            CloseWait,
            LastAck,
            Listen,
            Closing,
            NewSynRecv,
        ]);
        proptest::collection::vec((state, any::<i64>()).prop_map(|(state, at_us)| StateAt { state, at_us }), 0..7)
    }

    fn close() -> impl Strategy<Value = Close> {
        let causes = Cause::value_variants();
        let fates = Final::value_variants();
        let sources = vec![FinalSource::Fin, FinalSource::SockDiag, FinalSource::State, FinalSource::Inferred];
        let protocols = vec![
            Protocol::Http10,
            Protocol::Http11,
            Protocol::H2,
            Protocol::Websocket,
            Protocol::Tls,
            Protocol::Other,
            Protocol::None,
            Protocol::Unobserved,
        ];
        let closers = vec![ClosedBy::Local, ClosedBy::Remote, ClosedBy::Both, ClosedBy::None, ClosedBy::Unobserved];
        let words = (
            select(causes),
            of(select(fates)),
            of(select(sources)),
            select(protocols),
            select(closers),
            of(select(vec![How::Fin, How::Rst, How::Timeout, How::Unobserved])),
            select(vec![Role::Server, Role::Client, Role::Unknown]),
            select(vec![Family::Ipv4, Family::Ipv6]),
        );
        let numbers = any::<(u64, u32, u64, bool, Option<u64>, u64, u64)>();
        let time = (0_i64..4_000_000_000, 0_i32..1_000_000_000);
        let ends = any::<(SocketAddr, SocketAddr)>();
        (words, numbers, time, ends, [of(process()), of(process())], of(http()), states()).prop_map(
            |(words, numbers, (second, nanosecond), (local, remote), [process, closer], http, states)| {
                crate::event::Close {
                    time: Timestamp::new(second, nanosecond).expect("a time"),
                    cookie: numbers.0,
                    netns: numbers.1,
                    family: words.7,
                    local,
                    remote,
                    role: words.6,
                    process: process.map(Arc::new),
                    closed_by: words.4,
                    closer: closer.map(Arc::new),
                    how: words.5,
                    fate: words.1,
                    fate_source: words.2,
                    states,
                    duration_us: numbers.2,
                    started_before: numbers.3,
                    idle_us: numbers.4,
                    rx_bytes: numbers.5,
                    tx_bytes: numbers.6,
                    protocol: words.3,
                    http,
                    cause: words.0,
                }
            },
        )
    }

    fn by_hand(json: &mut Json, event: &Event) -> String {
        let mut line = Vec::new();
        json.event(event, &mut line).expect("memory");
        String::from_utf8(line).expect("UTF-8")
    }

    fn by_serde(event: &Event) -> String {
        let mut line = Vec::new();
        append(&mut line, event).expect("JSON");
        String::from_utf8(line).expect("UTF-8")
    }

    #[test]
    fn times_are_those_of_the_contract() {
        let mut json = Json::default();
        for time in [
            "2026-01-02T03:04:05.678901234Z",
            "2026-01-02T03:04:05.6Z",
            "2026-01-02T03:04:05.00000001Z",
            "2026-01-02T03:04:05Z",
            "2026-01-02T03:04:06Z",
            "1970-01-01T00:00:00Z",
            "1969-12-31T23:59:59.5Z",
            "1969-12-31T23:59:59Z",
        ] {
            let mut line = Line::default();
            json.second.put(time.parse().expect("a time"), &mut line).expect("memory");
            assert_eq!(String::from_utf8_lossy(line.0.whole()), time);
        }
    }

    proptest! {
        /// One writer for all of them: what it keeps of one must not be taken for another's.
        #[test]
        fn closes_in_a_row_are_what_serde_makes_of_them(closes in proptest::collection::vec(close(), 1..12)) {
            let mut json = Json::default();
            for mut close in closes {
                // Few ids, so that they share a place; and each process twice.
                for process in [&mut close.process, &mut close.closer].into_iter().flatten() {
                    Arc::make_mut(process).pid %= 4;
                }
                let event = Event::Close(Box::new(close));
                for _ in 0..2 {
                    prop_assert_eq!(by_hand(&mut json, &event), by_serde(&event));
                }
            }
        }

        #[test]
        fn a_close_by_hand_is_what_serde_makes_of_it(close in close()) {
            let event = Event::Close(Box::new(close));
            prop_assert_eq!(by_hand(&mut Json::default(), &event), by_serde(&event));
        }

        #[test]
        fn the_text_stays_the_same(text in any::<String>()) {
            let json = json(&text);
            prop_assert!(!json.chars().any(is_hostile));
            prop_assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), text);
        }
    }
}
