//! Events in, one JSON object a line out.
//!
//! JSON lets most control characters of Unicode stand in strings as they are. Here they are written as `\u….` as well: a
//! line of output that is shown on a terminal must not be able to do anything to it.
//!
//! `close` lines, of which there are thousands a second, are put together here by hand: serde looks at each byte of each
//! name of a field. A test holds them against what serde writes.

use std::io::{self, Write};

use serde::Serialize as _;
use serde_json::ser::{Formatter, Serializer};

use super::escape::is_hostile;
use super::text::{cause_word, closed_by_word, fate_word, state_word};
use crate::event::{
    Close, ClosedBy, Connection, Event, Family, FinalSource, How, Http, HttpVersion, Process, Protocol, Role, Source,
};

/// Writes NDJSON.
#[derive(Debug, Default)]
pub struct Json {
    line: Vec<u8>,
}

impl Json {
    /// Appends one line, in one write.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn event(&mut self, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        self.line.clear();
        match event {
            Event::Close(close) => {
                Line(&mut self.line).close(close)?;
                self.line.push(b'\n');
            }
            event => append(&mut self.line, event)?,
        }
        out.write_all(&self.line)
    }
}

/// Appends any value as one line.
///
/// # Errors
/// The value cannot be JSON.
pub(crate) fn append(out: &mut Vec<u8>, value: &impl serde::Serialize) -> io::Result<()> {
    value.serialize(&mut Serializer::with_formatter(&mut *out, Harmless))?;
    out.push(b'\n');
    Ok(())
}

/// A line in the making.
struct Line<'a>(&'a mut Vec<u8>);

impl Line<'_> {
    /// What serde makes of [`Event::Close`].
    fn close(&mut self, close: &Close) -> io::Result<()> {
        let Close { time, cookie, netns, family, local, remote, role, process, closed_by, closer, how, fate, .. } =
            close;
        write!(self.0, r#"{{"type":"close","time":"{time}""#)?;
        self.number("cookie", *cookie);
        self.number("netns", *netns);
        self.word(
            "family",
            match family {
                Family::Ipv4 => "ipv4",
                Family::Ipv6 => "ipv6",
            },
        );
        write!(self.0, r#","local":"{local}","remote":"{remote}""#)?;
        self.word(
            "role",
            match role {
                Role::Server => "server",
                Role::Client => "client",
                Role::Unknown => "unknown",
            },
        );
        self.process("process", process.as_ref())?;
        self.word(
            "closed_by",
            match closed_by {
                ClosedBy::Unobserved => "unobserved",
                seen => closed_by_word(*seen),
            },
        );
        self.process("closer", closer.as_ref())?;
        self.optional_word("how", how.map(how_word));
        if let Some(fate) = fate {
            self.word("final", fate_word(*fate));
        }
        if let Some(source) = close.fate_source {
            self.word("final_source", fate_source_word(source));
        }
        self.raw(r#","states":["#);
        for (n, at) in close.states.iter().enumerate() {
            self.raw(if n == 0 { r#"{"state":""# } else { r#",{"state":""# });
            self.raw(state_word(at.state));
            self.raw(r#"","at_us":"#);
            self.raw(itoa::Buffer::new().format(at.at_us));
            self.raw("}");
        }
        self.raw("]");
        self.number("duration_us", close.duration_us);
        self.truth("started_before", close.started_before);
        self.optional_number("idle_us", close.idle_us);
        self.number("rx_bytes", close.rx_bytes);
        self.number("tx_bytes", close.tx_bytes);
        self.word("protocol", protocol_word(close.protocol));
        match &close.http {
            Some(http) => self.http(http)?,
            None => self.raw(r#","http":null"#),
        }
        self.word("cause", cause_word(close.cause));
        self.raw("}");
        Ok(())
    }

    fn process(&mut self, name: &str, process: Option<&Process>) -> io::Result<()> {
        let Some(Process { pid, comm, exe, uid, cgroup, container, source }) = process else {
            self.optional_word(name, None);
            return Ok(());
        };
        self.name(name);
        self.raw(r#"{"pid":"#);
        self.raw(itoa::Buffer::new().format(*pid));
        self.text("comm", Some(comm))?;
        self.text("exe", exe.as_deref())?;
        self.number("uid", *uid);
        self.text("cgroup", cgroup.as_deref())?;
        self.text("container", container.as_deref())?;
        self.word(
            "source",
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
        self.raw(r#","http":{"requests":"#);
        self.raw(itoa::Buffer::new().format(http.requests));
        self.number("responses", http.responses);
        self.text("method", http.method.as_deref())?;
        self.text("target", http.target.as_deref())?;
        self.truth("target_truncated", http.target_truncated);
        self.optional_number("status", http.status);
        for (name, version) in [("request_version", http.request_version), ("response_version", http.response_version)]
        {
            self.optional_word(
                name,
                version.map(|version| match version {
                    HttpVersion::V10 => "1.0",
                    HttpVersion::V11 => "1.1",
                }),
            );
        }
        self.connection("request_connection", http.request_connection)?;
        self.connection("response_connection", http.response_connection)?;
        self.optional_number("keep_alive_timeout_s", http.keep_alive_timeout_s);
        self.optional_number("keep_alive_max", http.keep_alive_max);
        self.truth("answered", http.answered);
        self.raw("}");
        Ok(())
    }

    fn connection(&mut self, name: &str, connection: Option<Connection>) -> io::Result<()> {
        match connection {
            None => self.optional_word(name, None),
            Some(Connection::Absent) => self.word(name, "absent"),
            Some(Connection::Unobserved) => self.word(name, "unobserved"),
            Some(tokens) => {
                self.name(name);
                write!(self.0, "\"{tokens}\"")?;
            }
        }
        Ok(())
    }

    fn raw(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    /// The name of a field that is not the first one.
    fn name(&mut self, name: &str) {
        self.raw(",\"");
        self.raw(name);
        self.raw("\":");
    }

    fn number(&mut self, name: &str, number: impl itoa::Integer) {
        self.name(name);
        self.raw(itoa::Buffer::new().format(number));
    }

    fn optional_number(&mut self, name: &str, number: Option<impl itoa::Integer>) {
        match number {
            Some(number) => self.number(name, number),
            None => self.optional_word(name, None),
        }
    }

    fn truth(&mut self, name: &str, truth: bool) {
        self.name(name);
        self.raw(if truth { "true" } else { "false" });
    }

    /// One of our own words.
    fn word(&mut self, name: &str, word: &str) {
        self.name(name);
        self.raw("\"");
        self.raw(word);
        self.raw("\"");
    }

    fn optional_word(&mut self, name: &str, word: Option<&str>) {
        match word {
            Some(word) => self.word(name, word),
            None => {
                self.name(name);
                self.raw("null");
            }
        }
    }

    /// What somebody else chose.
    fn text(&mut self, name: &str, text: Option<&str>) -> io::Result<()> {
        match text {
            Some(text) if text.bytes().all(|byte| (b' '..0x7f).contains(&byte) && byte != b'"' && byte != b'\\') => {
                self.word(name, text);
                Ok(())
            }
            text => {
                self.name(name);
                text.serialize(&mut Serializer::with_formatter(&mut *self.0, Harmless))?;
                Ok(())
            }
        }
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
    use std::net::SocketAddr;

    use clap::ValueEnum as _;
    use jiff::Timestamp;
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
                    process,
                    closed_by: words.4,
                    closer,
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

    proptest! {
        #[test]
        fn a_close_by_hand_is_what_serde_makes_of_it(close in close()) {
            let event = Event::Close(Box::new(close));
            let (mut by_hand, mut by_serde) = (Vec::new(), Vec::new());
            Json::default().event(&event, &mut by_hand).expect("memory");
            append(&mut by_serde, &event).expect("JSON");
            prop_assert_eq!(String::from_utf8_lossy(&by_hand), String::from_utf8_lossy(&by_serde));
        }

        #[test]
        fn the_text_stays_the_same(text in any::<String>()) {
            let json = json(&text);
            prop_assert!(!json.chars().any(is_hostile));
            prop_assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), text);
        }
    }
}
