//! Tests of the scanner: what each message means, and that no cut, duplicate or gap changes it.

use proptest::prelude::*;

use super::*;
use crate::head;

// What the fuzz targets check, and the reader that the scanner is compared with.
#[path = "../fuzz/src/checks.rs"]
#[expect(unreachable_pub, reason = "it is part of a package of its own, too")]
mod checks;
#[path = "../fuzz/src/reader.rs"]
#[expect(unreachable_pub, reason = "it is part of a package of its own, too")]
mod reader;

const IN: usize = INGRESS;
const OUT: usize = EGRESS;
const SERVER: u8 = crate::role::SERVER;
const CLIENT: u8 = crate::role::CLIENT;

/// A connection whose streams begin at odd places, one of them right before the sequence numbers wrap.
struct Connection {
    http: Http,
    next: [u32; 2],
}

impl Connection {
    fn new(role: u8) -> Self {
        let mut http = Http::ZERO;
        super::role(&mut http, role);
        Self { http, next: [0xffff_fff0, 77] }
    }

    /// The next bytes of a direction, at an offset from where they should be.
    fn at<const D: usize>(&mut self, offset: i64, bytes: &[u8]) {
        let seq = self.next[D].wrapping_add(offset as u32);
        // TCP has taken all that was looked at before.
        checks::arrive(&mut self.http, D, seq, bytes, seq.wrapping_add(1 << 20));
    }

    fn send<const D: usize>(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.at::<D>(0, bytes);
        self.skip::<D>(bytes.len());
        self
    }

    fn skip<const D: usize>(&mut self, n: usize) -> &mut Self {
        self.next[D] = self.next[D].wrapping_add(n as u32);
        self
    }

    fn send_to(&mut self, direction: usize, bytes: &[u8]) {
        if direction == IN {
            self.send::<IN>(bytes)
        } else {
            self.send::<OUT>(bytes)
        };
    }

    /// The verdict, were it read now.
    fn x(&self) -> Exchange {
        let mut http = self.http;
        // Nothing passes by unseen here.
        let [received, acknowledged] = self.http.streams.map(|stream| stream.next);
        settle(&mut http, received, acknowledged, false);
        http.exchange
    }

    fn has(&self, bits: u16) -> bool {
        self.x().flags & bits == bits
    }
}

fn bytes_of(x: &Exchange) -> &[u8] {
    bytemuck::bytes_of(x)
}

fn method(x: &Exchange) -> &[u8] {
    &x.method[..x.method_len as usize]
}

fn target(x: &Exchange) -> &[u8] {
    &x.target[..x.target_len as usize]
}

/// One request to a server.
fn request(bytes: impl AsRef<[u8]>) -> Connection {
    let mut c = Connection::new(SERVER);
    c.send::<IN>(bytes);
    c
}

/// A plain request to a server, and its answer.
fn response(bytes: impl AsRef<[u8]>) -> Connection {
    answer_to("GET / HTTP/1.1\r\n\r\n", bytes)
}

fn answer_to(request_head: &str, bytes: impl AsRef<[u8]>) -> Connection {
    let mut c = request(request_head);
    c.send::<OUT>(bytes);
    c
}

const COMPLETE: u8 = token::COMPLETE;
const CLOSE: u8 = token::CLOSE | COMPLETE;
const KEEP_ALIVE: u8 = token::KEEP_ALIVE | COMPLETE;
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

#[test]
fn a_plain_exchange() {
    let mut c = request("GET /a/b?secret=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let x = c.x();
    assert_eq!((x.requests, x.responses, x.protocol), (1, 0, protocol::HTTP1));
    assert_eq!((method(&x), target(&x)), (&b"GET"[..], &b"/a/b"[..]));
    assert_eq!((x.request_connection, x.request_version), (CLOSE, 11));
    assert_eq!(x.flags, bit::REQUESTS_IN);
    assert!(x.target[4..].iter().all(|&b| b == 0) && x.method[3..].iter().all(|&b| b == 0));

    c.send::<OUT>("HTTP/1.0 404 Not Found\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\nKeep-Alive: timeout=5, max=99\r\n\r\n");
    let x = c.x();
    assert_eq!((x.requests, x.responses, x.status, x.response_version), (1, 1, 404, 10));
    assert_eq!(x.response_connection, KEEP_ALIVE);
    assert_eq!((x.keep_alive_timeout_s, x.keep_alive_max), (5, 99));
    let all = bit::REQUESTS_IN | bit::HAS_TIMEOUT | bit::HAS_MAX;
    assert_eq!(x.flags, all | bit::BODY_INCOMPLETE);
    c.send::<OUT>("12345");
    assert_eq!(c.x().flags, all);

    // A new request clears the answer to the old one, from its first byte on.
    c.send::<IN>("P");
    let x = c.x();
    assert_eq!((x.requests, x.responses, x.status, x.response_connection, x.request_connection), (1, 1, 0, 0, 0));
    assert_eq!((x.keep_alive_timeout_s, x.keep_alive_max, x.method_len, x.target_len), (0, 0, 0, 0));
    assert_eq!(x.flags, bit::REQUESTS_IN);
}

#[test]
fn the_connection_field() {
    let value = |lines: &str| request(format!("GET / HTTP/1.1\r\n{lines}\r\n")).x().request_connection;
    let (other, upgrade) = (token::OTHER | COMPLETE, token::UPGRADE | COMPLETE);
    for (lines, expected) in [
        ("", COMPLETE),
        ("Connection: close\r\n", CLOSE),
        ("Connection:close\r\n", CLOSE),
        ("cOnNeCtIoN:\t \tClOsE \t\r\n", CLOSE),
        ("Connection: keep-alive\r\n", KEEP_ALIVE),
        ("Connection: Keep-Alive, Upgrade\r\n", KEEP_ALIVE | upgrade),
        ("Connection: ,,close , , upgrade\r\n", CLOSE | upgrade),
        ("Connection: close\r\nHost: x\r\nConnection: keep-alive\r\n", CLOSE | KEEP_ALIVE),
        ("Connection: TE\r\n", other),
        ("Connection: closed\r\n", other),
        ("Connection: clos\r\n", other),
        ("Connection: close keep-alive\r\n", other),
        ("Connection: \"close\"\r\n", other),
        ("Connection: keep\x0dalive\r\n", other),
        ("Connection: keep-alivee\r\n", other),
        ("Connection: keep-alive-and-well-for-ever-and-ever, close\r\n", CLOSE | other),
        ("Connection: Transfer-Encoding, foo\r\n", other),
        ("Connection:\r\n", other),
        ("Connection: ,\r\n", other),
        ("Connection: \r\n close\r\n", CLOSE),
        ("Connection: keep-alive,\r\n\tclose\r\nHost: x\r\n", CLOSE | KEEP_ALIVE),
        ("Connection: close\r\n , foo\r\n", CLOSE | other),
        ("Connection: close\r\n foo\r\n", other),
        ("Connection: keep-\r\n alive\r\n", other),
        ("Connection: keep-\n alive\r\n", other),
        ("Connection: close\r\n \r\nHost: x\r\n", CLOSE),
        ("X: a\r\n Connection: close\r\n", COMPLETE),
        ("X-Connection: close\r\n", COMPLETE),
        ("Connection-Foo: close\r\n", COMPLETE),
        ("Connection : close\r\n", other),
        ("connection\t: keep-alive, close\r\n close\r\n", other),
        ("Connection : close\r\nConnection: close\r\n", CLOSE | other),
        ("Connectio n: close\r\n", COMPLETE),
        ("Connectio: close\r\n", COMPLETE),
        ("Connectionn: close\r\n", COMPLETE),
        ("Keep\rAlive: close\r\n", COMPLETE),
        ("Cookie: Connection: close\r\n", COMPLETE),
        ("Proxy-Connection: close\r\n", COMPLETE),
        ("Connection: close\n", CLOSE),
    ] {
        assert_eq!(value(lines), expected, "{lines:?}");
    }
    assert_eq!(request("GET / HTTP/1.1\nConnection: close\n\n").x().request_connection, CLOSE);
    // The next line may go on with the value.
    let mut c = request("GET / HTTP/1.1\r\nConnection: close\r\n");
    assert_eq!(c.x().request_connection, 0);
    c.send::<IN>("H");
    assert_eq!(c.x().request_connection, token::CLOSE);
}

#[test]
fn start_lines() {
    for (line, m, t, v) in [
        ("OPTIONS * HTTP/1.1", "OPTIONS", "*", 11),
        ("GET http://example.org/a?b HTTP/1.0", "GET", "http://example.org/a", 10),
        ("PROPFIND /dav HTTP/1.1", "PROPFIND", "/dav", 11),
        ("VERSION-CONTROL /x HTTP/1.1", "VERSION-CONTROL", "/x", 11),
        ("SIXTEEN-BYTES-LO /x HTTP/1.1", "SIXTEEN-BYTES-LO", "/x", 11),
        ("CONNECT example.org:443 HTTP/1.1", "CONNECT", "example.org:443", 11),
        ("GET ?q HTTP/1.1", "GET", "", 11),
        ("GET /#f HTTP/1.1", "GET", "/", 11),
        ("M / HTTP/1.1", "M", "/", 11),
        ("HTTQ / HTTP/1.1", "HTTQ", "/", 11),
    ] {
        for lead in ["", "\r\n", "\n\r\n"] {
            let c = request(format!("{lead}{line}\r\n\r\n"));
            let x = c.x();
            assert_eq!((method(&x), target(&x)), (m.as_bytes(), t.as_bytes()), "{line}");
            assert_eq!((x.request_version, x.requests, x.request_connection), (v, 1, COMPLETE), "{line}");
            assert!(!c.has(bit::TARGET_TRUNCATED));
        }
    }
    for line in [
        "GET / HTTP/1.2",
        "GET / HTTP/2.0",
        "GET / http/1.1",
        "GET /",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        " GET / HTTP/1.1",
        "SEVENTEEN-BYTES-X / HTTP/1.1",
        "G(T / HTTP/1.1",
        "GET /a b HTTP/1.1",
        "HTTP/1.1 200 OK",
    ] {
        let c = request(format!("{line}\r\n\r\n"));
        assert_eq!((c.x().protocol, c.x().requests, c.x().flags), (protocol::OTHER, 0, bit::REQUESTS_LOST), "{line}");
        assert_eq!((c.x().method_len, c.x().target_len), (0, 0));
        let mut c = request("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
        c.send::<IN>(format!("{line}\r\n\r\n"));
        assert!(c.has(bit::REQUESTS_LOST) && c.x().request_connection & COMPLETE == 0, "{line}");
        assert_eq!(c.x().protocol, protocol::HTTP1);
    }
}

#[test]
fn a_request_that_cannot_be_read_may_be_answered() {
    // Servers read more than RFC 9112 §3 demands, and answer what they cannot read with 400.
    for line in ["GET / HTTP/1.2", "GET  / HTTP/1.1", "GET / HTTP/1.1 ", "GET /\u{1b}[1m HTTP/1.1", "GET /", "\0\u{1}"]
    {
        let mut c = request(format!("{line}\r\nConnection: close\r\n\r\n"));
        assert_eq!((c.x().protocol, c.http.stopped), (protocol::OTHER, 0), "{line:?}");
        c.send::<OUT>("HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 1\r\n\r\n-");
        let x = c.x();
        assert_eq!((x.protocol, x.requests, x.responses, x.status), (protocol::HTTP1, 0, 1, 400), "{line:?}");
        // What it asked for is not known.
        assert_eq!((x.request_connection, x.response_connection), (0, CLOSE));
        assert!(c.has(bit::REQUESTS_LOST) && c.x().response_version != 0 && c.x().request_version == 0);
        // It is another protocol only if the answer is, too.
        let mut c = request(format!("{line}\r\n\r\n"));
        c.send::<OUT>("RTSP/1.0 200 OK\r\n\r\n");
        assert_eq!(c.x().protocol, protocol::OTHER);
        assert_ne!(c.http.stopped, 0);
    }
}

#[test]
fn targets_of_every_length() {
    for len in 1..200 {
        for query in ["", "?q=1&r=%20", "#f"] {
            let path = format!("/{}", "p".repeat(len - 1));
            let head = format!("GET {path}{query} HTTP/1.1\r\nConnection: close\r\n\r\n");
            let c = request(&head);
            assert_eq!(target(&c.x()), &path.as_bytes()[..len.min(64)]);
            assert_eq!(c.has(bit::TARGET_TRUNCATED), len > 64, "{len}");
            assert_eq!(c.x().request_connection, CLOSE);

            let mut c = Connection::new(SERVER);
            c.http.full_target = 1;
            c.send::<IN>(&head);
            let full = format!("{path}{query}");
            assert_eq!(target(&c.x()), &full.as_bytes()[..full.len().min(64)]);
            assert_eq!(c.has(bit::TARGET_TRUNCATED), full.len() > 64);
        }
    }
}

#[test]
fn status_lines() {
    for (line, status, version) in [
        ("HTTP/1.1 200 OK", 200, 11),
        ("HTTP/1.0 999", 999, 10),
        ("HTTP/1.1 404 ", 404, 11),
        ("HTTP/1.1 500 a b c", 500, 11),
    ] {
        for end in ["\r\n", "\n"] {
            let c = response(format!("{line}{end}Content-Length: 0{end}{end}"));
            assert_eq!((c.x().status, c.x().response_version, c.x().responses), (status, version, 1), "{line}");
            assert!(c.x().response_version != 0);
        }
    }
    for line in [
        "HTTP/1.1 20",
        "HTTP/1.1 2000",
        "HTTP/1.1 099",
        "HTTP/1.1  200",
        "HTTP/1.3 200",
        "HTTP/2 200",
        "\r\nHTTP/1.1 200",
        "ICY 200 OK",
    ] {
        let c = response(format!("{line}\r\nContent-Length: 0\r\n\r\n"));
        assert!(c.has(bit::RESPONSES_LOST) && c.x().response_version == 0, "{line}");
        assert_eq!(c.x().responses, 0);
    }
}

#[test]
fn keep_alive_parameters() {
    let parameters = |value: &str| {
        let c = response(format!("HTTP/1.1 200 OK\r\nKeep-Alive: {value}\r\nContent-Length: 0\r\n\r\n"));
        let x = c.x();
        let of = |flag, n| if c.has(flag) { Some(n) } else { None };
        (of(bit::HAS_TIMEOUT, x.keep_alive_timeout_s), of(bit::HAS_MAX, x.keep_alive_max))
    };
    for (value, expected) in [
        ("timeout=5, max=100", (Some(5), Some(100))),
        ("MAX=7,Timeout=60", (Some(60), Some(7))),
        ("timeout=\"15\"", (Some(15), None)),
        ("timeout=99999999999999999999", (Some(u32::MAX), None)),
        ("timeout=, max", (None, None)),
        ("timeout=5s, max=1", (None, Some(1))),
        ("timeouts=5, min=1", (None, None)),
        ("timeout=0", (Some(0), None)),
        ("foo=1,\r\n max=3", (None, Some(3))),
        ("300", (None, None)),
        ("a-parameter-of-no-interest=5, max=2", (None, Some(2))),
    ] {
        assert_eq!(parameters(value), expected, "{value}");
    }
    // Of no meaning in a request.
    let c = request("GET / HTTP/1.1\r\nKeep-Alive: timeout=5\r\n\r\n");
    assert!(!c.has(bit::HAS_TIMEOUT));
}

/// What is not the head of the next message must not be taken for it.
const BAIT: &str =
    "\r\nConnection: close\r\n\r\nGET /bait HTTP/1.1\r\nConnection: close\r\n\r\nHTTP/1.1 200 OK\r\n\r\n";

fn chunked(body: &str) -> String {
    let (a, b) = body.split_at(body.len() / 2);
    format!("{:X};ext=\"1\"\r\n{a}\r\n00{:x} \n{b}\r\n0\r\nConnection: close\r\nX: y\r\n\r\n", a.len(), b.len())
}

#[test]
fn request_bodies() {
    let fields = format!("Content-Length: {}\r\n\r\n{BAIT}", BAIT.len());
    let long = format!("Content-Length: 123456789\r\n\r\n{BAIT}{}", "x".repeat(123_456_789 - BAIT.len()));
    let twice = format!("Content-Length: {0}\r\nContent-Length: {0}, {0}\r\n\r\n{BAIT}", BAIT.len());
    let coded = format!("Transfer-Encoding: gzip, Chunked\r\nContent-Length: 3\r\n\r\n{}", chunked(BAIT));
    let lines = format!("Transfer-Encoding: gzip\r\nTransfer-Encoding:chunked\r\n\r\n{}", chunked(BAIT));
    for rest in [fields, long, twice, coded, lines] {
        let mut c = request(format!("POST /first HTTP/1.1\r\n{rest}"));
        assert_eq!((c.x().requests, c.x().request_connection), (1, COMPLETE), "{:.90}", rest);
        assert_eq!(target(&c.x()), b"/first");
        c.send::<IN>("GET /second HTTP/1.1\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!((c.x().requests, c.x().request_connection), (2, KEEP_ALIVE), "{:.90}", rest);
        assert_eq!(target(&c.x()), b"/second");
        assert_eq!((c.x().flags, c.x().request_version, c.x().response_version), (bit::REQUESTS_IN, 11, 0));
    }
}

#[test]
fn a_request_is_incomplete_until_its_body_ends() {
    for (fields, body) in [
        ("Content-Length: 9\r\n", &["12345678", "9"][..]),
        ("Transfer-Encoding: chunked\r\n", &["5\r\nhello\r\n0\r\nX: y", "\r\n\r\n"]),
    ] {
        let mut c = Connection::new(SERVER);
        c.send::<IN>("POST / HTTP/1.1\r\n").send::<IN>(fields);
        assert!(!c.has(bit::REQUEST_INCOMPLETE), "its head is not whole");
        c.send::<IN>("\r\n").send::<OUT>(OK);
        for part in body {
            assert!(c.has(bit::REQUEST_INCOMPLETE));
            c.send::<IN>(part);
        }
        assert!(!c.has(bit::REQUEST_INCOMPLETE));
    }
    for fields in ["", "Content-Length: 0\r\n"] {
        assert!(!request(format!("POST / HTTP/1.1\r\n{fields}\r\n")).has(bit::REQUEST_INCOMPLETE));
    }
}

#[test]
fn unknown_framing_loses_what_follows() {
    for fields in [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 6\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 5 5\r\n",
        "Content-Length: 5\r\n 6\r\n",
        "Content-Length:\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Content-Length: 0x10\r\n",
        "Content-Length : 5\r\n",
        "Content-Length: 5\r\nContent-Length\t: 5\r\n",
        "Transfer-Encoding: chunked, gzip\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding:\r\n",
    ] {
        let mut c = request(format!("POST / HTTP/1.1\r\nConnection: close\r\n{fields}\r\n"));
        assert_eq!((c.x().requests, c.x().request_connection), (1, CLOSE), "{fields}");
        assert!(!c.has(bit::REQUESTS_LOST) && c.has(bit::REQUEST_INCOMPLETE));
        let head = format!("POST / HTTP/1.1\r\nConnection: close\r\n{fields}\r\n");
        for cut in 1..head.len() {
            let mut c = request(&head[..cut]);
            c.send::<IN>(&head[cut..]).send::<IN>("G");
            assert!(c.has(bit::REQUESTS_LOST) && c.x().requests == 1, "{fields} {cut}");
        }
        c.send::<IN>("GET / HTTP/1.1\r\n\r\n");
        assert_eq!((c.x().requests, c.x().request_connection & COMPLETE), (1, 0), "{fields}");
        assert!(c.has(bit::REQUESTS_LOST));
    }
    for body in ["x", "\r\n", "5\r\nhelloX", "5\r\nhello\rX", "1000000000000000", "5x\r\n", "0\r\n\rX"] {
        let c = request(format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}"));
        assert!(c.has(bit::REQUESTS_LOST), "{body:?}");
    }
    // HTTP/1.0 has no Transfer-Encoding.
    let head = "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n";
    let c = request([head, "0\r\n\r\n"].concat());
    assert!(c.has(bit::REQUESTS_LOST) && c.x().requests == 1 && c.x().request_connection & COMPLETE == 0);
    let c = response("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n0\r\n\r\n");
    assert!(c.has(bit::RESPONSES_LOST) && c.x().response_version != 0 && c.x().response_connection == KEEP_ALIVE);
    // A length that cannot be told is not none.
    let c = response("HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\n");
    assert!(c.has(bit::BODY_UNTIL_CLOSE) && !c.has(bit::RESPONSES_LOST));
    for coding in ["gzip", "chunked, gzip"] {
        let c = response(format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"));
        assert!(c.has(bit::BODY_UNTIL_CLOSE) && !c.has(bit::RESPONSES_LOST) && c.x().responses == 1);
    }
}

#[test]
fn response_bodies() {
    // By RFC 9112 §6.3: status, fields, whether the request is a HEAD; then whether a body follows.
    for (head, status, fields, body) in [
        ("GET", 200, "Content-Length: 9\r\n", true),
        ("HEAD", 200, "Content-Length: 9\r\n", false),
        ("HEAD", 200, "Transfer-Encoding: chunked\r\n", false),
        ("HEAD", 200, "", false),
        ("GET", 204, "Content-Length: 9\r\n", false),
        ("GET", 304, "Content-Length: 9\r\n", false),
        ("GET", 304, "Transfer-Encoding: chunked\r\n", false),
        ("GET", 200, "Content-Length: 0\r\n", false),
        ("GET", 204, "", false),
    ] {
        let c = answer_to(&format!("{head} / HTTP/1.1\r\n\r\n"), format!("HTTP/1.1 {status} X\r\n{fields}\r\n"));
        assert_eq!(c.has(bit::BODY_INCOMPLETE), body, "{head} {status} {fields}");
        assert!(!c.has(bit::BODY_UNTIL_CLOSE));
    }
    for (rest, flags) in [
        (format!("Content-Length: {}\r\n\r\n{BAIT}", BAIT.len()), 0),
        (format!("Transfer-Encoding: chunked\r\n\r\n{}", chunked(BAIT)), 0),
        (format!("\r\n{BAIT}"), bit::BODY_UNTIL_CLOSE),
    ] {
        let c = response(format!("HTTP/1.1 200 OK\r\n{rest}"));
        assert_eq!((c.x().responses, c.x().response_connection), (1, COMPLETE));
        assert_eq!((c.x().flags, c.x().response_version), (flags | bit::REQUESTS_IN, 11));
    }
    let mut c = response("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    for part in ["5\r\n", "hello", "\r\n", "0\r\n", "T: x\r\n"] {
        assert!(c.send::<OUT>(part).has(bit::BODY_INCOMPLETE));
    }
    assert!(!c.send::<OUT>("\r\n").has(bit::BODY_INCOMPLETE));
}

#[test]
fn interim_responses_do_not_count() {
    let mut c = request("POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    c.send::<OUT>(
        "HTTP/1.1 100 Continue\r\nConnection: close\r\nKeep-Alive: timeout=1\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
    );
    let x = c.x();
    assert_eq!(
        (x.responses, x.status, x.response_version, x.response_connection, x.flags),
        (0, 0, 0, 0, bit::REQUESTS_IN | bit::REQUEST_INCOMPLETE)
    );
    c.send::<IN>("hi").send::<OUT>("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!((c.x().responses, c.x().status, c.x().response_connection), (1, 200, COMPLETE));
}

#[test]
fn upgrades() {
    for (upgrade, expected) in [
        ("websocket", protocol::WEBSOCKET),
        ("WebSocket", protocol::WEBSOCKET),
        ("h2c", protocol::H2),
        ("foo", protocol::HTTP1),
        ("foo, h2c", protocol::H2),
    ] {
        let mut c = request("GET /chat HTTP/1.1\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n");
        c.send::<OUT>(format!(
            "HTTP/1.1 101 Switching\r\nUpgrade: {upgrade}\r\nConnection: Upgrade\r\n\r\nHTTP/1.1 200"
        ));
        let x = c.x();
        assert_eq!((x.protocol, x.status, x.responses), (expected, 101, 1), "{upgrade}");
        assert_eq!(x.response_connection, token::UPGRADE | COMPLETE);
        assert!(c.has(bit::UPGRADED) && c.x().response_version != 0 && c.http.stopped != 0);
        c.send::<IN>("\x16\x03GET").send::<OUT>(OK);
        assert_eq!(bytes_of(&c.x()), bytes_of(&x));
    }
}

#[test]
fn connect_requests() {
    let head = "CONNECT a:1 HTTP/1.1\r\n\r\n";
    let mut c = answer_to(head, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n");
    assert!(c.has(bit::UPGRADED) && !c.has(bit::BODY_INCOMPLETE));
    c.send::<IN>("\x16\x03\x01");
    assert!(!c.has(bit::REQUESTS_LOST));
    // Refused, then tried again.
    let mut c = answer_to(head, "HTTP/1.1 407 No\r\nContent-Length: 1\r\n\r\n-");
    c.send::<IN>(head).send::<OUT>("HTTP/1.1 200 OK\r\n\r\n");
    assert_eq!((c.x().requests, c.x().responses, c.x().status), (2, 2, 200));
    assert!(c.has(bit::UPGRADED) && !c.has(bit::REQUESTS_LOST));
    // Data before the answer.
    let mut c = request(head);
    c.send::<IN>("data").send::<OUT>("HTTP/1.1 200 OK\r\n\r\n");
    assert!(c.has(bit::UPGRADED));
}

#[test]
fn pipelining() {
    let mut c = request("GET /1 HTTP/1.1\r\n\r\nHEAD /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert_eq!((c.x().requests, target(&c.x())), (3, &b"/3"[..]));
    c.send::<OUT>("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\nKeep-Alive: max=1\r\n\r\nabc");
    assert_eq!((c.x().responses, c.x().status, c.x().response_connection), (1, 0, 0));
    assert!(c.x().response_version == 0 && !c.has(bit::HAS_MAX));
    c.send::<OUT>("HTTP/1.1 201 OK\r\nContent-Length: 3\r\n\r\n");
    assert_eq!((c.x().responses, c.x().status), (2, 0));
    c.send::<OUT>("HTTP/1.1 202 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert_eq!((c.x().responses, c.x().status, c.x().response_connection), (3, 202, CLOSE));

    // A request that begins in the middle of the head, or body, that answers the one before it.
    let mut c = response("HTTP/1.1 200 OK\r\nConnection: close\r\n");
    c.send::<IN>("GET /2").send::<OUT>("Connection: keep-alive\r\nContent-Length: 2\r\n\r\n-");
    assert_eq!((c.x().responses, c.x().response_connection, c.x().status), (1, 0, 0));
    assert!(c.has(bit::BODY_INCOMPLETE) && c.x().response_version == 0);
    c.send::<IN>(" HTTP/1.1\r\n\r\n").send::<OUT>("-HTTP/1.1 500 X\r\n");
    assert_eq!((c.x().status, c.x().responses), (500, 1));

    // HEADs are told apart at any depth up to 64.
    for depth in 1..=65 {
        let mut c = Connection::new(SERVER);
        for i in 0..depth {
            c.send::<IN>(format!("{} / HTTP/1.1\r\n\r\n", if i % 3 == 0 { "HEAD" } else { "GET" }));
        }
        for i in 0..depth {
            c.send::<OUT>(format!(
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
                if i % 3 == 0 { "" } else { "ab" }
            ));
        }
        if depth <= 64 {
            assert_eq!((c.x().responses, c.x().flags & bit::RESPONSES_LOST), (depth, 0));
            assert!(!c.has(bit::BODY_INCOMPLETE) && c.x().response_version != 0);
        } else {
            assert!(c.has(bit::RESPONSES_LOST) && c.x().response_version == 0);
        }
    }
}

#[test]
fn a_response_without_a_request() {
    let mut c = Connection::new(SERVER);
    c.send::<OUT>("HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 2\r\n\r\n--");
    assert_eq!((c.x().requests, c.x().responses, c.x().status, c.x().response_connection), (0, 1, 408, CLOSE));
    assert_eq!((c.x().flags, c.x().request_version, c.x().response_version), (bit::REQUESTS_IN, 0, 11));
    // It is nobody's answer.
    c.send::<IN>("HEAD / HTTP/1.1\r\n\r\n").send::<OUT>("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n").send::<OUT>(OK);
    assert_eq!((c.x().responses, c.x().status), (3, 200));
    assert!(!c.has(bit::RESPONSES_LOST));

    // Once requests are lost it may answer a HEAD.
    let mut c = response(OK);
    c.skip::<IN>(1).send::<IN>("x");
    assert!(c.has(bit::REQUESTS_LOST));
    c.send::<OUT>("HTTP/1.1 204 OK\r\n\r\n")
        .send::<OUT>("HTTP/1.1 201 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n");
    assert_eq!((c.x().responses, c.x().status, c.x().response_connection), (3, 201, CLOSE));
    assert!(!c.has(bit::RESPONSES_LOST) && !c.has(bit::BODY_INCOMPLETE));
    c.send::<OUT>("--");
    assert!(c.has(bit::RESPONSES_LOST));
}

#[test]
fn long_heads() {
    let cookie = |n: usize| format!("Cookie: {}\r\n", "c=d; ".repeat(n / 5));
    for n in [100, 2048, 60 << 10] {
        let head = format!("GET / HTTP/1.1\r\n{}Connection: close\r\n\r\n", cookie(n));
        assert_eq!(request(&head).x().request_connection, CLOSE);
        for segment in [1, 7, 100, 1448] {
            let mut c = Connection::new(SERVER);
            for part in head.as_bytes().chunks(segment) {
                c.send::<IN>(part);
            }
            assert_eq!((c.x().requests, c.x().request_connection), (1, CLOSE));
        }
    }
    let head = format!("GET / HTTP/1.1\r\n{}Connection: close\r\n\r\n", cookie(70 << 10));
    for segment in [1, 1448, 1 << 20] {
        let mut c = Connection::new(SERVER);
        for part in head.as_bytes().chunks(segment) {
            c.send::<IN>(part);
        }
        assert!(c.has(bit::REQUESTS_LOST) && c.x().request_version != 0);
        assert_eq!((c.x().requests, c.x().request_connection & COMPLETE), (0, 0));
    }
    // The limit is exact, however the head is cut.
    for (n, lost) in [(MAX_HEAD as usize, false), (MAX_HEAD as usize + 1, true)] {
        let head = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(n - 23));
        assert_eq!(head.len(), n);
        for segment in [1, 1448, 1 << 20] {
            let mut c = Connection::new(SERVER);
            c.send::<IN>("POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n").send::<IN>("x".repeat(100_000));
            for part in head.as_bytes().chunks(segment) {
                c.send::<IN>(part);
            }
            assert_eq!(c.has(bit::REQUESTS_LOST), lost);
        }
    }
    // Too much work for one segment.
    let c = request(format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{}", "1\r\nx\r\n".repeat(10_000)));
    assert!(c.has(bit::REQUESTS_LOST));
}

/// Of long messages, the window's end comes anywhere.
#[test]
fn wherever_the_window_ends() {
    // In a skipped line; in or between short ones; in what is not ASCII.
    let fillers: [fn(usize) -> String; 3] = [
        |n| format!("X: {}\r\n", "x".repeat(n)),
        |n| format!("{}Y: {}\r\n", "a:\r\n".repeat(n / 4), "y".repeat(n % 4)),
        |n| format!("X: {}{}\r\n", "é".repeat(n / 2), "x".repeat(n % 2)),
    ];
    let (fill, passed) = (FILL as usize, WINDOW);
    for end in [fill, passed, fill + passed] {
        for n in end - 220..end + 8 {
            for filler in fillers {
                let filler = filler(n);
                let requests = format!(
                    "POST /a HTTP/1.1\r\n{filler}cOnnection: foo,\r\n close\r\nContent-Length: 5\r\nCookie: c\r\n\r\nabcde\
                     GET /b?q HTTP/1.1\r\nConnection: keep-alive\r\n\r\n"
                );
                let responses = format!(
                    "HTTP/1.1 200 OK\r\n{filler}Keep-Alive: timeout=5, max=9\r\nTransfer-Encoding: chunked\r\n\
                     Connection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\nHTTP/1.0 404 N\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
                let whole = {
                    let mut c = Connection::new(SERVER);
                    c.send::<IN>(&requests).send::<OUT>(&responses);
                    c
                };
                let mut cut = Connection::new(SERVER);
                for (direction, bytes) in [(IN, &requests), (OUT, &responses)] {
                    for part in bytes.as_bytes().chunks(61) {
                        cut.send_to(direction, part);
                    }
                }
                assert_eq!(bytes_of(&whole.x()), bytes_of(&cut.x()), "{filler}");
                let x = whole.x();
                assert_eq!((x.requests, x.responses, x.status, target(&x)), (2, 2, 404, &b"/b"[..]), "{filler}");
                assert_eq!((x.request_connection, x.response_connection), (KEEP_ALIVE, CLOSE), "{filler}");
            }
        }
        // In a target, behind it, and in a reason.
        for n in end - 100..end + 100 {
            let long = "r".repeat(n);
            let x = request(format!("GET /a?{long} HTTP/1.1\r\nConnection: close\r\n\r\n")).x();
            assert_eq!((x.requests, target(&x), x.request_connection), (1, &b"/a"[..], CLOSE));
            let x = request(format!("GET /{long} HTTP/1.1\r\nConnection: close\r\n\r\n")).x();
            assert_eq!((x.requests, x.target_len as usize, x.request_connection), (1, TARGET, CLOSE));
            let x = response(format!("HTTP/1.1 200 {long}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")).x();
            assert_eq!((x.responses, x.status, x.response_connection), (1, 200, CLOSE));
        }
    }
}

#[test]
fn other_protocols() {
    let first = |role, direction, bytes: &[u8]| {
        let mut whole = Connection::new(role);
        whole.send_to(direction, bytes);
        let mut cut = Connection::new(role);
        for byte in bytes {
            cut.send_to(direction, &[*byte]);
        }
        assert_eq!(bytes_of(&whole.x()), bytes_of(&cut.x()), "{bytes:?}");
        // No bytes of that direction are read any more.
        let done = whole.http.stopped != 0 || whole.http.streams[direction].phase == phase::LOST;
        (whole.x().protocol, done)
    };
    for role in [0, SERVER, CLIENT] {
        for direction in [IN, OUT] {
            assert_eq!(first(role, direction, b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), (protocol::OTHER, true));
            assert_eq!(first(role, direction, b"SSH-2.0-Go\r\n"), (protocol::OTHER, true));
            assert_eq!(first(role, direction, b"220 mail.example.org ESMTP\r\n"), (protocol::OTHER, true));
            assert_eq!(first(role, direction, b"\x16\x03\x01\x02\x00\x01\x00"), (protocol::TLS, true));
            assert_eq!(first(role, direction, b"\x16\x03\x04"), (protocol::TLS, true));
            assert_eq!(first(role, direction, b"\x16\x03\x05"), (protocol::OTHER, true));
            assert_eq!(first(role, direction, b"\x16\x03"), (protocol::UNDECIDED, false));
            assert_eq!(first(role, direction, b"*1\r\n$4\r\nPING\r\n"), (protocol::OTHER, true));
            assert_eq!(first(role, direction, b"\0\0\0"), (protocol::OTHER, true));
        }
    }
    // TLS to a server that does not know it.
    let mut c = request("\x16\x03\x01\x02\0\x01\0");
    c.send::<OUT>("HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    assert_eq!((c.x().protocol, c.x().requests, c.x().status), (protocol::HTTP1, 0, 400));
    assert!(c.has(bit::REQUESTS_LOST) && c.x().response_connection == CLOSE);
    let mut c = request("\x16\x03\x01\x02\0\x01\0");
    c.send::<OUT>("\x16\x03\x03").send::<OUT>(OK);
    assert_eq!((c.x().protocol, c.x().responses, c.http.stopped), (protocol::TLS, 0, 1));
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04";
    for role in [0, SERVER] {
        assert_eq!(first(role, IN, preface), (protocol::H2, true));
        assert_eq!(first(role, IN, b"PR"), (protocol::UNDECIDED, false));
        assert_eq!(first(role, IN, b"GET /"), (protocol::UNDECIDED, false));
        for cut in 1..preface.len() {
            let mut c = Connection::new(role);
            c.send::<IN>(&preface[..cut]).send::<IN>(&preface[cut..]);
            assert_eq!((c.x().protocol, c.x().requests, c.x().method_len, c.x().flags), (protocol::H2, 0, 0, 0));
        }
    }
    assert_eq!(Connection::new(0).x().protocol, protocol::NONE);
}

#[test]
fn a_request_behind_a_proxy_protocol_header() {
    let v2 = |rest: &[u8]| {
        let length = (rest.len() as u16).to_be_bytes();
        [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11"[..], &length, rest].concat()
    };
    let headers = [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 80\r\n".to_vec(),
        b"PROXY UNKNOWN\r\n".to_vec(),
        v2(b"\x7f\0\0\x01\x7f\0\0\x01\xc3\x50\0\x50"),
        v2(b""),
        v2(&b"GET / HTTP/1.1\r\nConnection: keep-alive\r\n\r\n".repeat(10)),
    ];
    let request = b"GET /path HTTP/1.1\r\nConnection: close\r\n\r\n";
    for role in [0, SERVER] {
        for header in &headers {
            let bytes = [&header[..], request].concat();
            for cut in 0..bytes.len() {
                let mut c = Connection::new(role);
                c.send::<IN>(&bytes[..cut]).send::<IN>(&bytes[cut..]).send::<OUT>(OK);
                let x = c.x();
                assert_eq!((x.requests, x.responses, x.request_connection), (1, 1, CLOSE), "{header:?} {cut}");
                assert_eq!((method(&x), target(&x)), (&b"GET"[..], &b"/path"[..]));
                assert!(!c.has(bit::REQUESTS_LOST) && c.x().response_version != 0);
            }
            let mut c = Connection::new(role);
            c.send::<IN>(header).send::<IN>("\x16\x03\x01");
            assert_eq!(c.x().protocol, protocol::TLS);
            // Only in front.
            let mut c = Connection::new(role);
            c.send::<IN>(request).send::<IN>(header);
            assert!(c.x().requests == 1 && c.x().request_connection & COMPLETE == 0 || c.has(bit::REQUESTS_LOST));
        }
    }
    for bytes in [&b"\r\n\r\n\0\r\nQUIT\0\x21\x11\0\0"[..], b"\r\n\r\n\0\r\nQUIT \x21\x11\0\0", b"PROXYTCP4 / \r\n"] {
        let mut c = Connection::new(SERVER);
        c.send::<IN>(bytes).send::<IN>(request);
        assert_eq!((c.x().protocol, c.x().requests), (protocol::OTHER, 0), "{bytes:?}");
    }
}

#[test]
fn the_role_is_found() {
    for role in [0, SERVER] {
        let mut c = Connection::new(role);
        c.send::<IN>("HEAD / HTTP/1.1\r\n\r\n").send::<OUT>("HTTP/1.1 200 OK\r\n\r\n");
        assert!(c.has(bit::REQUESTS_IN) && !c.has(bit::REQUESTS_OUT) && c.x().responses == 1);
    }
    for role in [0, CLIENT] {
        let mut c = Connection::new(role);
        c.send::<OUT>("H").send::<OUT>("EAD / HTTP/1.1\r\n\r\n").send::<IN>("H").send::<IN>("TTP/1.1 200 OK\r\n\r\n");
        assert!(c.has(bit::REQUESTS_OUT) && !c.has(bit::REQUESTS_IN) && c.x().responses == 1);
        assert_eq!(method(&c.x()), b"HEAD");
    }
    for (a, b) in
        [("H", "TTP/1.1 408 X\r\nContent-Length: 0\r\n\r\n"), ("HT", "TP/1.1 408 X\r\nContent-Length: 0\r\n\r\n")]
    {
        let mut c = Connection::new(0);
        c.send::<IN>(a).send::<IN>(b);
        assert_eq!((c.x().responses, c.x().status), (1, 408));
        assert!(c.has(bit::REQUESTS_OUT));
    }
    // Which direction was lost is known only later.
    let mut c = Connection::new(0);
    c.send::<IN>("H").skip::<IN>(3).send::<IN>("x").send::<OUT>("HTTP/1.1 200 OK\r\n\r\n");
    assert!(c.has(bit::REQUESTS_LOST) && !c.has(bit::RESPONSES_LOST));
}

#[test]
fn duplicates_and_overlaps() {
    let head = b"GET /path HTTP/1.1\r\nConnection: close\r\n\r\n";
    let mut c = Connection::new(SERVER);
    c.send::<IN>(&head[..10]);
    c.at::<IN>(-10, &head[..10]);
    c.at::<IN>(-5, &head[5..20]);
    c.skip::<IN>(10).at::<IN>(-20, &head[..20]);
    c.at::<IN>(-20, head);
    c.skip::<IN>(head.len() - 20).at::<IN>(-(head.len() as i64), head);
    c.at::<IN>(-1, b"\n");
    assert_eq!((c.x().requests, c.x().request_connection, c.x().flags), (1, CLOSE, bit::REQUESTS_IN));
    assert_eq!(target(&c.x()), b"/path");
}

#[test]
fn gaps() {
    // In a body they are harmless, up to its last byte.
    for gap in [1, 500, 1000] {
        let mut c = request("POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n");
        c.skip::<IN>(gap);
        c.send::<IN>([&vec![b'x'; 1000 - gap][..], b"GET /2 HTTP/1.1\r\nConnection: close\r\n\r\n"].concat());
        assert_eq!((c.x().requests, c.x().request_connection), (2, CLOSE), "{gap}");
        // The missing part comes late.
        c.at::<IN>(-1000, &vec![b'y'; gap]);
        assert_eq!((c.x().requests, c.has(bit::REQUESTS_LOST)), (2, false));
    }
    let mut c = request("POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n");
    c.skip::<IN>(1001).send::<IN>("ET /2 HTTP/1.1\r\n\r\n");
    assert!(c.has(bit::REQUESTS_LOST) && c.x().request_connection == 0);

    // In or between heads they are not.
    let mut c = request("GET / HTTP/1.1\r\nConnection: close\r\nX: ");
    c.skip::<IN>(1).send::<IN>("\r\n\r\n");
    assert!(c.has(bit::REQUESTS_LOST));
    assert_eq!((c.x().requests, c.x().request_connection), (0, token::CLOSE));
    let mut c = request("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
    c.skip::<IN>(100).send::<IN>("GET / HTTP/1.1\r\n\r\n");
    assert_eq!((c.x().requests, c.x().request_connection), (1, 0));

    // A response that was seen stays the answer; the next request has none.
    let mut c = response("HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel");
    c.skip::<OUT>(10).send::<OUT>("x");
    assert!(c.has(bit::RESPONSES_LOST) && c.x().response_version != 0 && !c.has(bit::BODY_INCOMPLETE));
    assert_eq!((c.x().status, c.x().response_connection), (200, CLOSE));
    c.send::<IN>("GET / HTTP/1.1\r\n\r\n").send::<OUT>(OK);
    assert_eq!((c.x().status, c.x().response_connection, c.x().responses), (0, 0, 1));
    assert!(c.x().response_version == 0);

    let mut c = response("HTTP/1.1 200 OK\r\nConn");
    lose(&mut c.http, OUT);
    c.send::<OUT>("ection: close\r\n\r\n");
    assert!(
        c.has(bit::RESPONSES_LOST)
            && c.x().response_version != 0
            && c.x().response_connection == 0
            && c.x().responses == 0
    );

    let mut c = request("GET / HTTP/1.1\r\n\r\n");
    miss(&mut c.http, IN);
    assert!(c.has(bit::REQUESTS_LOST));
    c.send::<IN>("GET / HTTP/1.1\r\n\r\n");
    assert_eq!((c.x().requests, c.x().request_connection), (1, 0));
}

#[test]
fn what_comes_too_early_is_put_aside() {
    let head = "POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n";
    let all = [head, &"x".repeat(1000), "GET /2 HTTP/1.1\r\n\r\n"].concat().into_bytes();
    let (body, end) = (head.len(), head.len() + 1000);
    // Parts in the order in which they come, and what is known then: requests, the last one's tokens, whether all of it.
    for (parts, known) in [
        // Parts of a body come before its head, in any order, with or without a gap between them.
        (&[(body, end), (0, body), (end, all.len())][..], (2, COMPLETE, true)),
        (&[(body + 500, end), (body, body + 500), (0, body), (end, all.len())], (2, COMPLETE, true)),
        (&[(body + 9, body + 99), (body + 500, end), (0, body + 1), (end, all.len())], (2, COMPLETE, true)),
        (&[(body - 1, body), (body - 1, end), (0, body), (body, end), (end, all.len())], (2, COMPLETE, true)),
        (&[(body + 500, body + 600), (0, body), (body, body + 500)], (1, COMPLETE | CLOSE, true)),
        // What is missing is a part of the body, too.
        (&[(body + 500, end), (0, body), (end, all.len())], (2, COMPLETE, true)),
        (&[(0, body), (end, all.len()), (body, end)], (2, COMPLETE, true)),
        // Part of a head that does not come again.
        (&[(9, 20), (0, 9)], (0, 0, false)),
        (&[(9, all.len()), (0, 9)], (0, 0, false)),
        (&[(9, 20), (0, 9), (20, all.len())], (0, 0, false)),
        // Part of one that does.
        (&[(9, all.len()), (0, 9), (9, all.len())], (2, COMPLETE, true)),
        (&[(9, 20), (0, all.len())], (2, COMPLETE, true)),
        // A head behind the body.
        (&[(body, all.len()), (0, body)], (1, 0, false)),
        (&[(0, body), (end + 1, all.len())], (1, 0, false)),
    ] {
        let mut c = Connection::new(SERVER);
        sync(&mut c.http, IN, c.next[IN]);
        for &(from, to) in parts {
            c.at::<IN>(from as i64, &all[from..to]);
        }
        let x = c.x();
        let found = (x.requests, x.request_connection & (COMPLETE | CLOSE), x.flags & bit::REQUESTS_LOST == 0);
        assert_eq!(found, known, "{parts:?}");
    }
    // What is sent may answer what was put aside.
    for (role, known) in [(SERVER, bit::REQUESTS_LOST), (CLIENT, bit::RESPONSES_LOST)] {
        let mut c = Connection::new(role);
        sync(&mut c.http, IN, c.next[IN]);
        c.at::<IN>(5, b"/ HTTP/1.1\r\n\r\n");
        c.send::<OUT>(if role == SERVER { OK } else { "GET / HTTP/1.1\r\n\r\n" });
        c.send::<IN>(if role == SERVER { "GET  / HTTP/1.1\r\n\r\n" } else { OK });
        assert_eq!(c.x().flags & (bit::REQUESTS_LOST | bit::RESPONSES_LOST), known);
    }
}

#[test]
fn what_passes_by_unseen_is_lost() {
    let unseen = |c: &Connection, received: u32, acknowledged: u32| {
        let mut http = c.http;
        let [a, b] = c.next;
        settle(&mut http, a.wrapping_add(received), b.wrapping_add(acknowledged), false);
        http.exchange.flags & (bit::REQUESTS_LOST | bit::RESPONSES_LOST)
    };
    let mut c = Connection::new(SERVER);
    sync(&mut c.http, IN, c.next[IN]);
    sync(&mut c.http, OUT, c.next[OUT]);
    for bytes in ["GET / HTTP/1.1\r\n", "\r\n", "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n12345"] {
        // All that was sent is seen before it is acknowledged; a FIN counts as one.
        assert_eq!(unseen(&c, 1, 1), 0);
        assert_eq!(unseen(&c, 0, 9), bit::RESPONSES_LOST);
        assert_eq!(unseen(&c, 2, 0), bit::REQUESTS_LOST);
        c.send::<IN>(bytes);
    }
    // What can be anything is not followed.
    c.send::<OUT>("HTTP/1.0 200 OK\r\n\r\n").send::<OUT>("HTTP/1.0 200 OK\r\n\r\n");
    assert_eq!(unseen(&c, 0, 1000), 0);
    let mut c = Connection::new(SERVER);
    mid_stream(&mut c.http);
    assert_eq!(unseen(&c, 1000, 1000), 0);
}

#[test]
fn what_tcp_has_not_received_is_not_believed() {
    let head = "GET / HTTP/1.1\r\n\r\n";
    // The first byte that TCP misses, when the head comes again.
    for (missed, lost) in [(0, true), (head.len() - 1, true), (head.len(), false)] {
        for late in [0, 5] {
            let mut c = Connection::new(SERVER);
            let first = c.next[IN];
            sync(&mut c.http, IN, first);
            assert!(!repeats(&mut c.http, first));
            c.send::<IN>(head);
            let (seq, len) = (first.wrapping_add(late), head.len() as u32 - late);
            assert!(repeats(&mut c.http, seq));
            again(&mut c.http, seq, len, first.wrapping_add(missed as u32));
            assert_eq!(c.has(bit::REQUESTS_LOST), lost, "{missed}");
        }
    }
    // However much comes behind it.
    for head in ["\u{16}\u{3}\u{1}\u{0}", "POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"] {
        let mut c = request(head);
        let behind = c.next[IN];
        for n in 0..40u32 {
            let seq = behind.wrapping_add(n.wrapping_mul(1 << 28));
            assert!(!repeats(&mut c.http, seq), "{n} times 256 MiB");
        }
    }
    // However long a body is.
    let mut c = request("POST / HTTP/1.1\r\nContent-Length: 6000000000\r\n\r\n");
    let bytes = vec![0; 1_000_000];
    for n in 0..5_900 {
        let (seq, next) = (c.next[IN], c.next[IN]);
        checks::arrive(&mut c.http, IN, seq, &bytes, next);
        c.skip::<IN>(bytes.len());
        assert!(!c.has(bit::REQUESTS_LOST), "after {n} MB");
    }
    // A part of a body that was passed over is no such thing.
    let mut c = request("POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n");
    let body = c.next[IN];
    c.skip::<IN>(100).send::<IN>(vec![b'x'; 100]);
    assert!(!repeats(&mut c.http, body));
    // What was no HTTP may have been damaged.
    let mut c = Connection::new(SERVER);
    let first = c.next[IN];
    c.send::<IN>("\u{1}\u{2}\u{3}\u{4}");
    assert_eq!(c.x().protocol, protocol::OTHER);
    again(&mut c.http, first, 4, first);
    assert_eq!((c.x().protocol, c.has(bit::REQUESTS_LOST)), (protocol::UNDECIDED, true));
    // What the other direction had begun was forgotten with it.
    let mut c = Connection::new(CLIENT);
    let first = c.next[IN];
    c.send::<OUT>("GET /a").send::<IN>("\u{1}\u{2}\u{3}\u{4}");
    again(&mut c.http, first, 4, first);
    c.send::<OUT>("b HTTP/1.1\r\n\r\n");
    assert_eq!((c.x().request_version != 0, c.has(bit::REQUESTS_LOST)), (false, true));
}

#[test]
fn what_tcp_refused_is_taken_back() {
    // How much of a second request TCP has not taken at the end; how much of it when this end closed, before or after it came.
    for (missing, closed, lost) in [
        (0, None, false),
        (1, None, true),
        (19, None, true),
        (19, Some((true, 19)), true),
        (0, Some((true, 19)), false),
        (19, Some((false, 0)), false),
    ] {
        let mut c = response(OK);
        let before = c.next[IN];
        let closes_before = closed.is_some_and(|(came, _)| !came);
        if closes_before {
            closes(&mut c.http, before);
        }
        c.send::<IN>("GET /x HTTP/1.1\r\n\r\n");
        let [next, acknowledged] = c.http.streams.map(|stream| stream.next);
        if let Some((true, missing)) = closed {
            closes(&mut c.http, next.wrapping_sub(missing));
        }
        settle(&mut c.http, next.wrapping_sub(missing), acknowledged, closed.is_some());
        let x = c.http.exchange;
        let found = (x.flags & bit::REQUESTS_LOST != 0, target(&x).is_empty(), x.requests);
        assert_eq!(found, (lost, lost, if lost { 1 } else { 2 }), "{missing} {closed:?}");
    }
    // What was not looked at is not missing: the rest of a body, or of what is not HTTP.
    for head in ["POST / HTTP/1.1\r\nContent-Length: 9999\r\n\r\n", "\u{1}\u{2}\u{3}\u{4}"] {
        let mut c = request(head);
        let behind = c.next[IN];
        let before = c.http.exchange;
        c.send::<IN>(vec![b'x'; 100]);
        settle(&mut c.http, behind, 0, false);
        assert_eq!(bytes_of(&c.http.exchange), bytes_of(&before), "{head:?}");
    }
}

#[test]
fn the_first_byte_can_be_told() {
    let mut c = Connection::new(SERVER);
    sync(&mut c.http, IN, c.next[IN]);
    c.skip::<IN>(1).send::<IN>("GET / HTTP/1.1\r\n\r\n");
    assert!(c.has(bit::REQUESTS_LOST) && c.x().protocol == protocol::UNDECIDED);
    let mut c = Connection::new(SERVER);
    sync(&mut c.http, IN, c.next[IN]);
    sync(&mut c.http, IN, 1);
    c.send::<IN>("GET / HTTP/1.1\r\n\r\n");
    assert_eq!(c.x().requests, 1);
}

#[test]
fn a_connection_older_than_the_programs() {
    for role in [0, SERVER] {
        let mut c = Connection::new(role);
        mid_stream(&mut c.http);
        c.send::<OUT>("HTTP/1.1 200 OK\r\n\r\n").send::<IN>("Connection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n");
        c.send::<IN>("GETX / HTTP/1.1\r\n\r\n").send::<OUT>("half a body, GET / HTTP/1.1\r\n\r\n");
        assert_eq!((c.x().protocol, c.x().flags, c.x().requests), (protocol::UNDECIDED, 0, 0));
        c.skip::<IN>(1000).send::<IN>("GET a body that begins so\r\n");
        c.send::<IN>("POST \r\n\r\n");
        if role == 0 {
            c.send::<OUT>("DELETE from a, b where c");
        }
        assert_eq!((c.x().protocol, c.x().flags, c.x().method_len), (protocol::UNDECIDED, 0, 0));
        c.send::<IN>("GET /x HT").send::<IN>("TP/1.1\r\nConnection: close\r\n\r\n");
        assert_eq!((c.x().protocol, c.x().requests, c.x().request_connection), (protocol::HTTP1, 1, CLOSE));
        c.skip::<OUT>(5).send::<OUT>("rest of a body").send::<OUT>("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n12");
        c.send::<OUT>("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        assert_eq!((c.x().responses, c.x().status), (2, 200));
        assert_eq!((c.x().flags, c.x().request_version, c.x().response_version), (bit::REQUESTS_IN, 11, 11));
    }
}

/// A conversation that uses every phase: direction and bytes of each message.
fn conversation() -> Vec<(usize, String)> {
    vec![
        (IN, "\r\nPOST /up?x=1 HTTP/1.1\r\nHost: example.org\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\nUpgrade-Insecure-Requests: 1\r\n\r\n5;a=b\r\nGET /\r\n1f\r\n\r\nConnection: close\r\n\r\nHTTP/1.1\r\n0\r\nConnection: close\r\n\r\n".into()),
        (OUT, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 201 Created\r\nKeep-Alive: max=12, timeout=\"345\"\r\nCONNECTION: Keep-Alive\r\nContent-Length: 12\r\nConnection-X: close\r\n\r\nHTTP/1.1 204".into()),
        (IN, "HEAD /aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa#x HTTP/1.0\r\nX: y\r\nCookie: a\r\nContent-Type: t\r\nConnection: foo,\r\n close\r\nKeep-Alive: timeout=3\r\n\r\n".into()),
        (OUT, "HTTP/1.1 200 OK\r\nContent-Length: 123456\r\nContent-Length: 123456\r\nconnection:close\r\n\r\n".into()),
        (IN, "PROPFIND /1234567?89 HTTP/1.1\r\nContent-Length:  3 \r\nConnection: upgrade , keep-alive\r\n\r\nabc".into()),
        (OUT, "HTTP/1.1 207 Multi\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\nKeep-Alive: timeout=7\r\n\r\n3\r\nabc\r\n0\r\n\r\n".into()),
        (IN, "GET /last HTTP/1.1\r\nConnection: close\r\n\r\n".into()),
        (OUT, "HTTP/1.1 101 X\r\nUpgrade: foo, websocket\r\nConnection: Upgrade\r\n\r\n".into()),
    ]
}

#[test]
fn every_cut_gives_the_same() {
    for role in [0, SERVER] {
        let mut whole = Connection::new(role);
        for (done, (direction, bytes)) in conversation().iter().enumerate() {
            let before = Connection { http: whole.http, next: whole.next };
            whole.send_to(*direction, bytes.as_bytes());
            assert_eq!(whole.x().flags & (bit::REQUESTS_LOST | bit::RESPONSES_LOST), 0);
            assert_eq!((whole.x().requests + whole.x().responses) as usize, done + 1);
            let bytes = bytes.as_bytes();
            for a in 0..=bytes.len() {
                for b in a..=bytes.len() {
                    let mut cut = Connection { http: before.http, next: before.next };
                    for part in [&bytes[..a], &bytes[a..b], &bytes[b..]] {
                        cut.send_to(*direction, part);
                    }
                    assert_eq!(bytes_of(&cut.x()), bytes_of(&whole.x()), "{done} {a} {b}");
                }
            }
        }
        assert_eq!((whole.x().protocol, whole.x().status), (protocol::WEBSOCKET, 101));
    }
}

fn any_case(text: &'static str) -> impl Strategy<Value = String> {
    proptest::collection::vec(any::<bool>(), text.len())
        .prop_map(move |up| text.chars().zip(up).map(|(c, up)| if up { c.to_ascii_uppercase() } else { c }).collect())
}

fn blank() -> impl Strategy<Value = String> {
    "[ \t]{0,3}"
}

fn connection_value() -> impl Strategy<Value = String> {
    let element = prop_oneof![
        4 => any_case("close"),
        4 => any_case("keep-alive"),
        2 => any_case("upgrade"),
        1 => Just(String::new()),
        1 => "[a-zA-Z-]{1,20}",
        1 => "(close|keep-alive)[ \ta-z;=\"]{1,4}",
    ];
    proptest::collection::vec((blank(), element, blank()), 0..4)
        .prop_map(|e| e.into_iter().map(|(a, b, c)| a + &b + &c).collect::<Vec<_>>().join(","))
}

fn header() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => (any_case("connection"), connection_value()).prop_map(|(n, v)| format!("{n}:{v}")),
        2 => (any_case("content-length"), blank(), 0u64..3_000_000, blank()).prop_map(|(n, a, v, b)| format!("{n}:{a}{v}{b}")),
        1 => (any_case("content-length"), 0u32..40).prop_map(|(n, v)| format!("{n}: {v}")),
        1 => (any_case("keep-alive"), "[ a-z0-9=,\"]{0,30}").prop_map(|(n, v)| format!("{n}:{v}")),
        1 => (any_case("upgrade"), "[ a-z0-9,]{0,30}").prop_map(|(n, v)| format!("{n}:{v}")),
        2 => "(Con|Cont|Connection|Content-Lengt|Keep-Aliv|Transfer-Encodin|Upgrad|X-Connection)[a-z-]{1,9}: ?close",
        4 => "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,30}:[ -~]{0,150}",
        1 => "(?i)(connection|content-length|transfer-encoding|upgrade)[ \t]?:[ \t]?(close|3|chunked|h2c)(\r?\n[ \t]+[a-z0-9]{0,3})?",
        1 => "[ -~\r\t\u{1}\u{80}-\u{ff}]{0,30}",
    ]
}

fn end_of_line() -> impl Strategy<Value = &'static str> {
    prop_oneof![9 => Just("\r\n"), 1 => Just("\n")]
}

fn rest_of_head() -> impl Strategy<Value = String> {
    (proptest::collection::vec((header(), end_of_line()), 0..8), end_of_line())
        .prop_map(|(lines, end)| lines.into_iter().map(|(h, e)| h + e).collect::<String>() + end)
}

fn request_line() -> impl Strategy<Value = String> {
    let method = prop_oneof![
        3 => Just("GET".to_owned()),
        3 => Just("HEAD".to_owned()),
        1 => Just("OPTIONS".to_owned()),
        1 => Just("CONNECT".to_owned()),
        2 => "[A-Z!#$%&'*+.^_`|~a-z0-9-]{1,16}"
    ];
    let target = prop_oneof!["/[!-~]{0,150}", "[!-~]{1,30}", Just("*".to_owned())];
    (method, target, 0..2, end_of_line()).prop_map(|(m, t, v, e)| format!("{m} {t} HTTP/1.{v}{e}"))
}

fn request_head() -> impl Strategy<Value = String> {
    (request_line(), rest_of_head()).prop_map(|(line, rest)| line + &rest)
}

fn body() -> impl Strategy<Value = String> {
    prop_oneof![Just(BAIT.to_owned()), "[ -~]{0,40}"]
}

/// The framing fields of a message, and the body that they announce, or nearly.
fn framed() -> impl Strategy<Value = (String, String)> {
    prop_oneof![
        3 => Just((String::new(), String::new())),
        3 => body().prop_map(|b| (format!("Content-Length: {}\r\n", b.len()), b)),
        3 => body().prop_map(|b| ("Transfer-Encoding: chunked\r\n".to_owned(), chunked(&b))),
        1 => body().prop_map(|b| ("Content-Length: 1\r\ntransfer-encoding:gzip ,\t Chunked\r\n".to_owned(), chunked(&b))),
        1 => (body(), 0usize..80).prop_map(|(b, n)| (format!("Content-Length: {n}\r\n"), b)),
    ]
}

/// A request, and what answers it.
fn exchange() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let interim = prop_oneof![
        6 => Just(String::new()),
        1 => Just("HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\n".to_owned()),
    ];
    let status = prop_oneof![6 => Just(200u16), 1 => Just(204), 1 => Just(304), 1 => Just(101), 2 => 100u16..600];
    let reason = prop_oneof![Just(String::new()), "[ ][ -~\t\r]{0,20}"];
    let junk = prop_oneof![12 => Just(Vec::new()), 1 => proptest::collection::vec(any::<u8>(), 1..9)];
    let request = (request_line(), framed(), rest_of_head());
    let response = (interim, 0..2, status, reason, framed(), rest_of_head());
    (request, response, junk).prop_map(|((line, (fields, body), rest), answer, junk)| {
        let (interim, version, status, reason, (announced, told), tail) = answer;
        let request = format!("{line}{fields}{rest}{body}").into_bytes();
        let response = format!("{interim}HTTP/1.{version} {status}{reason}\r\n{announced}{tail}{told}");
        (request, [response.into_bytes(), junk].concat())
    })
}

/// In which order messages come.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Each request is answered before the next one.
    Alternating,
    /// All requests come first.
    Pipelined,
    /// Each answer comes before the last bytes of its request.
    Early,
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![3 => Just(Order::Alternating), 1 => Just(Order::Pipelined), 1 => Just(Order::Early)]
}

impl Order {
    fn apply(self, messages: &mut Vec<(usize, Vec<u8>)>, requests: usize) {
        match self {
            Self::Alternating => {}
            Self::Pipelined => messages.sort_by_key(|(direction, _)| *direction != requests),
            Self::Early => {
                for i in (0..messages.len()).rev().filter(|i| i % 2 == 0) {
                    let bytes = &mut messages[i].1;
                    let end = bytes.split_off(bytes.len() - bytes.len().min(3));
                    messages.insert(i + 2, (requests, end));
                }
            }
        }
    }
}

/// Splits at random places, also into single bytes.
fn cuts() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![1usize..4, 1usize..40, 1usize..400], 1..40)
}

fn parts<'a>(mut bytes: &'a [u8], cuts: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut cuts = cuts.iter().cycle();
    std::iter::from_fn(move || {
        let n = (*cuts.next()?).min(bytes.len());
        let (part, rest) = bytes.split_at(n);
        bytes = rest;
        (n != 0).then_some(part)
    })
}

/// What the fuzz targets have found worth keeping.
#[test]
fn the_fuzz_corpus_passes() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, check) in [("head", checks::head as fn(&[u8])), ("differential", checks::differential)] {
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpus.join(target)).expect("it is part of the repository") {
            let path = entry.expect("it can be read").path();
            let data = std::fs::read(&path).expect("it can be read");
            let passes = std::panic::catch_unwind(|| check(&data)).is_ok();
            assert!(passes, "{}", path.display());
            inputs += 1;
        }
        assert!(inputs > 100, "{target}: {inputs} inputs");
    }
}

/// The next head begins in the segment that ends one, and goes on in another: what is known of the lines of one is not taken for the
/// other's, when both are looked at for a second socket.
#[test]
fn lines_are_of_one_head() {
    let text = "x".repeat(600);
    let body = format!(
        "POST /1 HTTP/1.1\r\nConnection: close\r\nContent-Length: 600\r\n\r\n{text}GET /2 HTTP/1.1\r\nA: b\r\n\r\n"
    );
    let get = format!("GET /1 HTTP/1.1\r\nA: {text}\r\nB: {}\r\n\r\nGET /2 HTTP/1.1\r\nA: b\r\n\r\n", &text[..300]);
    for stream in [body, get] {
        let end = stream.find("GET /2").expect("it is there");
        for first in 1..end - 1 {
            let mut c = Connection::new(SERVER);
            let (whole, cut) = (stream.as_bytes(), end + "GET /2 HTTP/1.1\r\nA:".len());
            c.send::<IN>(&whole[..first]).send::<IN>(&whole[first..cut]).send::<IN>(&whole[cut..]);
            let x = c.x();
            assert_eq!((x.requests, target(&x), x.request_connection), (2, &b"/2"[..], COMPLETE), "cut at {first}");
            assert!(!c.has(bit::REQUESTS_LOST), "cut at {first}");
        }
    }
}

/// Between two processes of one host.
#[test]
fn what_leaves_is_not_read_again_as_it_arrives() {
    let response = b"HTTP/1.1 200 OK\r\nServer: s\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
    let mut window = Window::EMPTY;
    let mut look = |direction: usize, same: bool| {
        let mut http = Http::ZERO;
        super::role(&mut http, if direction == EGRESS { SERVER } else { CLIENT });
        let at = enter(&mut http, direction, 7, response.len() as u32).expect("it is new");
        begin(&mut window, at, response.len() as u32, same);
        let filled = refill(&mut http, direction, &mut window);
        assert_eq!(filled.is_none(), same);
        if filled.is_some() {
            bytemuck::cast_slice_mut(&mut window.words)[..response.len()].copy_from_slice(response);
        }
        assert!(!step(&mut http, direction, &mut window));
        leave(&mut http, direction, true);
        // The lines are not looked at a second time.
        bytemuck::cast_slice_mut::<u64, u8>(&mut window.words)[b"HTTP/1.1 200 OK\r\n".len()..].fill(b'?');
        assert_eq!((stream(&mut http, direction).phase, stream(&mut http, direction).length), (phase::START, 0));
        http.exchange
    };
    let (leaves, arrives) = (look(EGRESS, false), look(INGRESS, true));
    assert_eq!((leaves.status, leaves.response_connection), (200, CLOSE));
    assert_eq!((arrives.status, arrives.response_connection), (200, CLOSE));
}

proptest! {
    // The reader starts again with each segment: fewer, and longer ones.
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn streams_as_a_plain_reader_reads_them(
        exchanges in proptest::collection::vec(exchange(), 1..6),
        order in order(),
        role in 1u8..3,
        full_target in any::<bool>(),
        cuts in cuts(),
    ) {
        let options = checks::Options { role, full_target, mid_stream: false, disorder: false };
        let requests = if role == SERVER { IN } else { OUT };
        let mut messages: Vec<(usize, Vec<u8>)> = Vec::new();
        for (request, response) in exchanges {
            messages.push((requests, request));
            messages.push((1 - requests, response));
        }
        order.apply(&mut messages, requests);
        let segments = messages.iter().flat_map(|(d, bytes)| parts(bytes, &cuts).map(|part| (*d, part)));
        checks::compare(options, segments);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn segmentation_never_matters(
        messages in proptest::collection::vec((any::<bool>(), prop_oneof![
            request_head().prop_map(String::into_bytes),
            rest_of_head().prop_map(|r| format!("HTTP/1.1 200 OK\r\n{r}").into_bytes()),
            Just(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".to_vec()),
            Just(b"POST / HTTP/1.1\r\nTransfer-Encoding:\tchunked\r\n\r\nA\r\nabcdefghij\r\n0\r\nX: y\r\n\r\n".to_vec()),
            proptest::collection::vec(any::<u8>(), 0..60),
        ]), 1..8),
        role in 0u8..3,
        hunting in any::<bool>(),
        cuts in cuts(),
    ) {
        // Where a segment begins matters while hunting, so that only the absence of a panic is checked then.
        let (mut whole, mut cut) = (Connection::new(role), Connection::new(role));
        if hunting {
            mid_stream(&mut whole.http);
            mid_stream(&mut cut.http);
        }
        for (ingress, bytes) in &messages {
            let direction = if *ingress { IN } else { OUT };
            whole.send_to(direction, bytes);
            for part in parts(bytes, &cuts) {
                cut.send_to(direction, part);
            }
        }
        if !hunting {
            let (whole, cut) = (whole.x(), cut.x());
            prop_assert_eq!(bytes_of(&whole), bytes_of(&cut));
        }
    }

    #[test]
    fn disorder_never_invents_a_head(
        segments in proptest::collection::vec((any::<bool>(), -60i64..60, 0usize..400, 1usize..90), 0..30)
    ) {
        // Pieces of a valid stream at their true places, in any order: what is answered must be in the stream.
        let stream = "POST /a HTTP/1.1\r\nConnection: close\r\nContent-Length: 40\r\n\r\nGET /bait HTTP/1.1\r\nConnection: upgrade\r\nGET /b HTTP/1.1\r\nConnection: close\r\n\r\n".repeat(3);
        let mut c = Connection::new(SERVER);
        let start = c.next[IN];
        sync(&mut c.http, IN, start);
        let mut at = 0i64;
        for (jump, by, _, len) in segments {
            let from = (at + if jump { by } else { 0 }).clamp(0, stream.len() as i64) as usize;
            let to = (from + len).min(stream.len());
            checks::segment(&mut c.http, IN, start.wrapping_add(from as u32), &stream.as_bytes()[from..to]);
            at = to as i64;
        }
        let x = c.x();
        prop_assert!(x.request_connection & COMPLETE == 0 || x.request_connection == CLOSE);
        prop_assert!(x.request_connection & token::UPGRADE == 0);
        prop_assert!(c.x().request_version == 0 || b"/a".starts_with(target(&x)) || b"/b".starts_with(target(&x)));
        prop_assert!(!c.has(bit::REQUESTS_LOST) || x.request_connection & COMPLETE == 0);
    }
}
