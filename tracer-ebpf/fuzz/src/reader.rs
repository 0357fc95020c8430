//! A plain reader of both directions of a connection, to compare the scanner with.
//!
//! What comes in: payload in order. What goes out: every head, and what RFC 9112 §6 says of its body. It keeps all bytes,
//! and leaves the heads to `httparse`, once they are whole. It shares no code with the scanner.
//!
//! # Where more is read than `httparse` reads, and what the scanner must say
//!
//! - A bare LF ends a line (RFC 9112 §2.2: MAY). [`lines`]
//! - A bare CR is white space (§2.2). It ends no line; at the beginning of one it is a fault: lost. [`lines`]
//! - Empty lines, and single CRs and LFs, before a request are ignored (§2.2). Before a response they are a fault: lost.
//! - White space before the first field: such lines are ignored (§2.2). [`fields`]
//! - obs-fold is white space (§5.2). [`fields`]
//! - White space before a colon is refused by some, ignored by others, and makes others ignore the line (§5.1). So the
//!   value is not read: `Connection` is `other`, `Content-Length` is invalid, `Transfer-Encoding` is not `chunked`.
//! - Lines without a colon, or with a name that is no token, have no meaning. [`fields`]
//! - Control characters in a value make its list element an unknown one (RFC 9110 §5.5). [`fields`]
//! - A target may have any bytes above SP (RFC 9112 §3.2 allows fewer): they are shown, escaped. [`request_line`]
//! - Methods of more than 16 bytes, and versions but 1.0 and 1.1, are not HTTP.
//! - A `Content-Length` above 2^63 + 1 is invalid, as is a list with an empty element (RFC 9110 §8.6).

use super::head::{protocol, token};

/// Largest `Content-Length`, and sizes of chunks, that are followed.
const MAX_LENGTH: u128 = 9_223_372_036_854_775_809;
const MAX_CHUNK_DIGITS_SHIFT: u32 = 56;
/// Outstanding requests that are followed.
const MAX_OUTSTANDING: usize = 64;

/// A request or response head that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Where it begins and ends in its direction.
    pub from: usize,
    /// See `from`.
    pub to: usize,
    pub method: Vec<u8>,
    pub target: Vec<u8>,
    pub status: u16,
    pub version: u8,
    /// As the scanner's `token`s, with `COMPLETE`.
    pub connection: u8,
}

/// What one direction's next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A head, or what is before it.
    Head,
    ProxyLine,
    Proxy,
    Body(u64),
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
    Unframed,
    Connect,
    Lost,
}

#[derive(Debug)]
struct Direction {
    bytes: Vec<u8>,
    at: usize,
    state: State,
    /// Of the head in progress: what has been noticed of it.
    begun: bool,
    named: bool,
    line: bool,
    /// It began as TLS does, before the connection was known for HTTP.
    tls: bool,
    /// Heads so far, interim responses included.
    heads: Vec<Head>,
}

impl Direction {
    fn new() -> Self {
        let (bytes, heads) = (Vec::new(), Vec::new());
        Self { bytes, at: 0, state: State::Head, begun: false, named: false, line: false, tls: false, heads }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }
}

/// The reader.
#[derive(Debug)]
pub struct Reader {
    requests: Direction,
    responses: Direction,
    pub protocol: u8,
    /// Nothing that comes now matters.
    pub stopped: bool,
    pub upgraded: bool,
    /// Methods of the requests whose method is whole, and how many were begun.
    methods: Vec<Vec<u8>>,
    begun: usize,
    answered: usize,
    pub final_responses: u32,
    connect: bool,
    /// The last request, if its start line is whole, and its head, if that is.
    pub has_request: bool,
    pub request: Option<Head>,
    /// Likewise the response that answers it.
    pub has_response: bool,
    pub response: Option<Head>,
    pub request_incomplete: bool,
    pub body_incomplete: bool,
    pub body_until_close: bool,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            requests: Direction::new(),
            responses: Direction::new(),
            protocol: protocol::NONE,
            stopped: false,
            upgraded: false,
            methods: Vec::new(),
            begun: 0,
            answered: 0,
            final_responses: 0,
            connect: false,
            has_request: false,
            request: None,
            has_response: false,
            response: None,
            request_incomplete: false,
            body_incomplete: false,
            body_until_close: false,
        }
    }
}

/// How far a parse came.
enum Parse<T> {
    Partial,
    Faulty,
    /// The value, and the bytes that it took.
    Whole(T, usize),
}

impl Reader {
    pub fn requests_lost(&self) -> bool {
        self.requests.state == State::Lost
    }

    pub fn responses_lost(&self) -> bool {
        self.responses.state == State::Lost
    }

    /// The whole request heads, in order.
    pub fn request_heads(&self) -> &[Head] {
        &self.requests.heads
    }

    /// The whole response heads, in order.
    pub fn response_heads(&self) -> &[Head] {
        &self.responses.heads
    }

    /// The next bytes of a direction.
    pub fn read(&mut self, request: bool, bytes: &[u8]) {
        if self.stopped || bytes.is_empty() {
            return;
        }
        if self.protocol == protocol::NONE {
            self.protocol = protocol::UNDECIDED;
        }
        self.direction(request).bytes.extend_from_slice(bytes);
        while !self.stopped && self.turn(request) {}
    }

    fn direction(&mut self, request: bool) -> &mut Direction {
        if request { &mut self.requests } else { &mut self.responses }
    }

    /// One step; false: more bytes are needed.
    fn turn(&mut self, request: bool) -> bool {
        let d = self.direction(request);
        if d.rest().is_empty() {
            return false;
        }
        match d.state {
            State::Head if request => self.request_head(),
            State::Head => self.response_head(),
            State::Body(0) => self.end_message(request),
            State::Body(n) => {
                let taken = (d.rest().len() as u64).min(n);
                d.at += taken as usize;
                d.state = State::Body(n - taken);
                n != taken || self.end_message(request)
            }
            State::ChunkData(n) => {
                let taken = (d.rest().len() as u64).min(n);
                d.at += taken as usize;
                d.state = if n == taken { State::ChunkEnd } else { State::ChunkData(n - taken) };
                true
            }
            State::ChunkSize => match chunk_size(d.rest()) {
                Parse::Whole(size, n) => {
                    d.at += n;
                    d.state = if size == 0 { State::Trailers } else { State::ChunkData(size) };
                    true
                }
                Parse::Partial => false,
                Parse::Faulty => self.lose(request),
            },
            State::ChunkEnd => match d.rest() {
                [b'\n', ..] | [b'\r', b'\n', ..] => {
                    d.at += if d.rest()[0] == b'\n' { 1 } else { 2 };
                    d.state = State::ChunkSize;
                    true
                }
                [b'\r'] => false,
                _ => self.lose(request),
            },
            State::Trailers => match trailers(d.rest()) {
                Parse::Whole((), n) => {
                    d.at += n;
                    self.end_message(request)
                }
                Parse::Partial => false,
                Parse::Faulty => self.lose(request),
            },
            State::ProxyLine => {
                let Some(end) = d.rest().iter().position(|b| *b == b'\n') else { return false };
                d.at += end + 1;
                d.state = State::Head;
                true
            }
            State::Proxy => self.proxy_header(),
            State::Unframed | State::Connect => self.lose(request),
            State::UntilClose | State::Lost => false,
        }
    }

    fn end_message(&mut self, request: bool) -> bool {
        self.direction(request).state = State::Head;
        if request {
            self.request_incomplete = false;
        } else {
            self.body_incomplete = false;
        }
        true
    }

    fn lose(&mut self, request: bool) -> bool {
        self.direction(request).state = State::Lost;
        if !request {
            self.body_incomplete = false;
        }
        false
    }

    /// What is in the place of a start line is none.
    fn reject(&mut self, request: bool) -> bool {
        if self.protocol == protocol::HTTP1 {
            return self.lose(request);
        }
        let first = self.protocol == protocol::UNDECIDED;
        self.forget();
        if self.protocol != protocol::TLS {
            self.protocol = protocol::OTHER;
        }
        if request && first {
            self.begun = 0;
            self.methods.clear();
            self.connect = false;
            return self.lose(request);
        }
        self.stopped = true;
        false
    }

    fn forget(&mut self) {
        self.has_request = false;
        self.has_response = false;
        self.request = None;
        self.response = None;
        self.request_incomplete = false;
    }

    /// TLS at the very beginning: false if it is none.
    fn is_tls(&mut self, request: bool) -> Option<bool> {
        let undecided = self.protocol == protocol::UNDECIDED;
        let d = self.direction(request);
        match *d.rest() {
            [0x16, ref more @ ..] if undecided || d.tls => Some(match *more {
                [] | [3] => {
                    d.tls = true;
                    false
                }
                [3, minor, ..] if minor <= 4 => {
                    // What the other direction turned out to be meanwhile stays.
                    if self.protocol == protocol::UNDECIDED {
                        self.protocol = protocol::TLS;
                    }
                    self.lose(request)
                }
                _ => self.reject(request),
            }),
            _ => None,
        }
    }

    /// The header of the PROXY protocol, version 2, from its first NUL on.
    fn proxy_header(&mut self) -> bool {
        const SIGNATURE: &[u8] = b"\0\r\nQUIT\n";
        let rest = self.requests.rest();
        let n = rest.len().min(SIGNATURE.len());
        if rest[..n] != SIGNATURE[..n] {
            return self.reject(true);
        }
        if rest.len() < 12 {
            return false;
        }
        let length = u64::from(u16::from_be_bytes([rest[10], rest[11]]));
        self.requests.at += 12;
        self.requests.state = State::Body(length);
        true
    }

    fn request_head(&mut self) -> bool {
        if !self.requests.begun {
            let empty = self.requests.rest().iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
            self.requests.at += empty;
            if self.requests.rest().is_empty() {
                return false;
            }
            if let Some(more) = self.is_tls(true) {
                return more;
            }
            if self.protocol == protocol::UNDECIDED && self.requests.rest()[0] == 0 {
                self.requests.state = State::Proxy;
                return true;
            }
            self.requests.begun = true;
            self.begun += 1;
            self.forget();
        }
        let rest = self.requests.rest().to_vec();
        if !self.requests.line {
            let method = rest.iter().position(|b| *b == b' ').map(|n| &rest[..n]);
            let proxy = self.protocol == protocol::UNDECIDED && method == Some(b"PROXY");
            let is_fault = |n: &usize| matches!(request_line(&rest[..*n]), Parse::Faulty);
            if proxy && let Some(fault) = (1..=rest.len()).find(is_fault) {
                // Version 1 of the PROXY protocol: a line, that ends with CRLF.
                self.requests.at += fault;
                self.requests.state = State::ProxyLine;
                (self.requests.begun, self.requests.named, self.begun) = (false, false, 0);
                self.methods.clear();
                return true;
            }
            if method == Some(b"PRI") && rest.len() >= 4 && is_preface(&rest) {
                self.forget();
                self.begun -= 1;
                self.protocol = protocol::H2;
                self.stopped = true;
                return false;
            }
            let parsed = request_line(&rest);
            if let (Some(method), false) = (method, self.requests.named)
                && is_method(method)
            {
                self.requests.named = true;
                self.methods.push(method.to_vec());
                self.connect = method == b"CONNECT";
                if self.begun - self.answered.min(self.begun) > MAX_OUTSTANDING {
                    self.lose(false);
                }
            }
            match parsed {
                Parse::Partial => return false,
                Parse::Faulty => return self.reject(true),
                Parse::Whole((), _) => {
                    self.requests.line = true;
                    self.has_request = true;
                    self.protocol = protocol::HTTP1;
                }
            }
        }
        let (lines, n) = match lines(&rest) {
            Parse::Partial => return false,
            Parse::Faulty => return self.lose(true),
            Parse::Whole(lines, n) => (lines, n),
        };
        let fields = fields(&lines[1..]);
        let head = parse_request(&lines[0], &fields, self.requests.at, n);
        self.requests.at += n;
        (self.requests.begun, self.requests.named, self.requests.line) = (false, false, false);
        let state = match () {
            () if fields.coded && head.version == 10 => State::Unframed,
            () if fields.chunked => State::ChunkSize,
            () if fields.coded || fields.length.is_err() => State::Unframed,
            () => State::Body(fields.length.unwrap_or_default().unwrap_or(0)),
        };
        self.request_incomplete = state != State::Body(0);
        self.requests.state = state;
        // Unless it was refused before its end.
        if self.connect {
            self.requests.state = State::Connect;
            self.request_incomplete = false;
        }
        self.requests.heads.push(head.clone());
        self.request = Some(head);
        self.requests.state != State::Body(0) || self.end_message(true)
    }

    /// Whether a final response that comes now answers the last request.
    fn is_last(&self) -> bool {
        self.answered + 1 >= self.begun
    }

    fn response_head(&mut self) -> bool {
        if !self.responses.begun
            && let Some(more) = self.is_tls(false)
        {
            return more;
        }
        if !self.responses.begun && self.protocol == protocol::UNDECIDED && self.responses.rest()[0] == 0 {
            // Where a PROXY protocol header could begin it takes two bytes to tell.
            return match self.responses.rest() {
                [_] => false,
                _ => self.reject(false),
            };
        }
        self.responses.begun = true;
        let rest = self.responses.rest().to_vec();
        if !self.responses.line {
            let status = match status_line(&rest) {
                Parse::Partial => return false,
                Parse::Faulty => return self.reject(false),
                Parse::Whole(status, _) => status,
            };
            self.responses.line = true;
            self.protocol = protocol::HTTP1;
            if (status >= 200 || status == 101) && self.is_last() {
                self.has_response = true;
                self.response = None;
            }
        }
        let (lines, n) = match lines(&rest) {
            Parse::Partial => return false,
            Parse::Faulty => return self.lose(false),
            Parse::Whole(lines, n) => (lines, n),
        };
        let fields = fields(&lines[1..]);
        let head = parse_response(&lines[0], &fields, self.responses.at, n);
        self.responses.at += n;
        (self.responses.begun, self.responses.line) = (false, false);
        self.responses.heads.push(head.clone());
        if head.status < 200 && head.status != 101 {
            return true;
        }
        let (number, last) = (self.answered, self.is_last());
        let method = self.methods.get(number).cloned();
        if last {
            self.response = Some(head.clone());
        }
        self.final_responses += 1;
        if number < self.begun {
            self.answered += 1;
        }
        let connect = last && self.connect;
        if head.status == 101 || connect && head.status < 300 {
            self.upgraded = true;
            self.stopped = true;
            self.protocol = match fields.upgrade {
                Some(protocol) if head.status == 101 => protocol,
                _ => protocol::HTTP1,
            };
            return false;
        }
        if connect {
            self.connect = false;
            if self.requests.state == State::Connect {
                self.requests.state = State::Head;
            }
        }
        let state = match () {
            () if method.as_deref() == Some(b"HEAD") || matches!(head.status, 204 | 304) => State::Body(0),
            () if fields.coded && head.version == 10 => State::Unframed,
            () if fields.chunked => State::ChunkSize,
            () if fields.coded => State::UntilClose,
            () => match fields.length {
                Err(()) => State::Unframed,
                Ok(Some(n)) => State::Body(n),
                Ok(None) => State::UntilClose,
            },
        };
        // It may answer a HEAD that was not read.
        let state =
            if method.is_none() && state != State::Body(0) && self.requests_lost() { State::Unframed } else { state };
        match state {
            State::Body(0) => {}
            State::UntilClose | State::Unframed => self.body_until_close = true,
            _ => self.body_incomplete = true,
        }
        self.responses.state = if state == State::Body(0) { State::Head } else { state };
        true
    }
}

fn is_tchar(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_method(method: &[u8]) -> bool {
    (1..=16).contains(&method.len()) && method.iter().all(|b| is_tchar(*b))
}

/// `bytes` begin with `word`, as far as both reach.
fn agrees(bytes: &[u8], word: &[u8]) -> bool {
    let n = bytes.len().min(word.len());
    bytes[..n] == word[..n]
}

/// `PRI`, a target, and version 2.
fn is_preface(line: &[u8]) -> bool {
    let mut words = line.splitn(3, |b| *b == b' ');
    let (_, target, version) = (words.next(), words.next(), words.next());
    target.is_some_and(|t| !t.is_empty() && t.iter().all(|b| *b > b' '))
        && version.is_some_and(|v| v.starts_with(b"HTTP/2"))
}

/// A request line, with its LF. Faults are found at once, not only at its end.
fn request_line(bytes: &[u8]) -> Parse<()> {
    let Some(method) = bytes.iter().position(|b| *b == b' ') else {
        let whole = bytes.len() > 16 || !bytes.iter().all(|b| is_tchar(*b));
        return if whole { Parse::Faulty } else { Parse::Partial };
    };
    if !is_method(&bytes[..method]) {
        return Parse::Faulty;
    }
    let rest = &bytes[method + 1..];
    let Some(target) = rest.iter().position(|b| *b <= b' ') else {
        return Parse::Partial;
    };
    if target == 0 || rest[target] != b' ' {
        return Parse::Faulty;
    }
    let rest = &rest[target + 1..];
    for end in ["HTTP/1.0\r\n", "HTTP/1.1\r\n", "HTTP/1.0\n", "HTTP/1.1\n"] {
        if rest.starts_with(end.as_bytes()) {
            return Parse::Whole((), method + target + 2 + end.len());
        }
        if agrees(rest, end.as_bytes()) {
            return Parse::Partial;
        }
    }
    Parse::Faulty
}

/// A status line, with its LF: the code.
fn status_line(bytes: &[u8]) -> Parse<u16> {
    if !agrees(bytes, b"HTTP/1.0 ") && !agrees(bytes, b"HTTP/1.1 ") {
        return Parse::Faulty;
    }
    let code = bytes.get(9..).unwrap_or_default();
    let mut status = 0;
    for (i, byte) in code.iter().take(3).enumerate() {
        if !byte.is_ascii_digit() || i == 0 && *byte == b'0' {
            return Parse::Faulty;
        }
        status = status * 10 + u16::from(byte - b'0');
    }
    match code.get(3) {
        None => Parse::Partial,
        Some(b' ' | b'\r' | b'\n') => match bytes.iter().position(|b| *b == b'\n') {
            Some(n) => Parse::Whole(status, n + 1),
            None => Parse::Partial,
        },
        Some(_) => Parse::Faulty,
    }
}

/// The lines of a head, without their ends and without the empty one.
fn lines(bytes: &[u8]) -> Parse<Vec<Vec<u8>>> {
    let (mut lines, mut at) = (Vec::new(), 0);
    loop {
        let rest = &bytes[at..];
        if !lines.is_empty() {
            match rest {
                [b'\n', ..] => return Parse::Whole(lines, at + 1),
                [b'\r', b'\n', ..] => return Parse::Whole(lines, at + 2),
                [b'\r', _, ..] => return Parse::Faulty,
                _ => {}
            }
        }
        let Some(end) = rest.iter().position(|b| *b == b'\n') else {
            return Parse::Partial;
        };
        let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
        lines.push(line.to_vec());
        at += end + 1;
    }
}

/// The lines behind the last chunk, up to the empty one.
fn trailers(bytes: &[u8]) -> Parse<()> {
    // As if a line was there before.
    match lines(&[b"x\n", bytes].concat()) {
        Parse::Whole(_, n) => Parse::Whole((), n - 2),
        Parse::Partial => Parse::Partial,
        Parse::Faulty => Parse::Faulty,
    }
}

fn chunk_size(bytes: &[u8]) -> Parse<u64> {
    let mut size = 0u64;
    let digits = bytes.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    for digit in &bytes[..digits] {
        if size >> MAX_CHUNK_DIGITS_SHIFT != 0 {
            return Parse::Faulty;
        }
        size = size * 16 + u64::from(char::from(*digit).to_digit(16).unwrap_or(0));
    }
    match bytes.get(digits) {
        None => Parse::Partial,
        Some(_) if digits == 0 => Parse::Faulty,
        Some(b';' | b'\r' | b'\n' | b' ' | b'\t') => match bytes.iter().position(|b| *b == b'\n') {
            Some(n) => Parse::Whole(size, n + 1),
            None => Parse::Partial,
        },
        Some(_) => Parse::Faulty,
    }
}

/// What the fields of a head say.
#[derive(Debug)]
struct Fields {
    /// Those that `httparse` may see.
    clean: Vec<u8>,
    connection_malformed: bool,
    length: Result<Option<u64>, ()>,
    coded: bool,
    chunked: bool,
    upgrade: Option<u8>,
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// Reads the lines behind the start line: unfolds them, and sorts out what has no meaning.
fn fields(lines: &[Vec<u8>]) -> Fields {
    // With the length of its first line: a name is in one.
    let mut unfolded: Vec<(usize, Vec<u8>)> = Vec::new();
    for line in lines {
        if !line.first().is_some_and(|b| is_blank(*b)) {
            unfolded.push((line.len(), line.clone()));
        } else if let Some((_, last)) = unfolded.last_mut() {
            last.push(b' ');
            last.extend_from_slice(line);
        }
    }
    let mut fields = Fields {
        clean: Vec::new(),
        connection_malformed: false,
        length: Ok(None),
        coded: false,
        chunked: false,
        upgrade: None,
    };
    let mut length_malformed = false;
    for (first, line) in unfolded {
        let Some(end) = line[..first].iter().position(|b| *b == b':' || is_blank(*b)) else { continue };
        let name = &line[..end];
        if line[end] != b':' {
            fields.connection_malformed |= name.eq_ignore_ascii_case(b"connection");
            length_malformed |= name.eq_ignore_ascii_case(b"content-length");
            fields.coded |= name.eq_ignore_ascii_case(b"transfer-encoding");
        } else if !name.is_empty() && name.iter().all(|b| is_tchar(*b)) {
            let value = line[end + 1..].iter().map(|b| match b {
                b'\r' => b' ',
                b'\t' | b' '..=b'~' | 0x80.. => *b,
                _ => b'?',
            });
            fields.clean.extend_from_slice(name);
            fields.clean.push(b':');
            fields.clean.extend(value);
            fields.clean.extend_from_slice(b"\r\n");
        }
    }
    let mut parsed = vec![httparse::EMPTY_HEADER; lines.len() + 1];
    let clean = [&fields.clean[..], b"\r\n"].concat();
    let Ok(httparse::Status::Complete((_, parsed))) = httparse::parse_headers(&clean, &mut parsed) else {
        panic!("httparse cannot read {:?}", String::from_utf8_lossy(&clean));
    };
    let mut length: Option<u128> = None;
    for (name, value) in parsed.iter().map(|h| (h.name.to_ascii_lowercase(), h.value)) {
        match name.as_str() {
            "content-length" => {
                for element in elements(value) {
                    let digits = !element.is_empty() && element.iter().all(u8::is_ascii_digit);
                    // Longer numbers than fit are too large in any case.
                    let text = String::from_utf8_lossy(element);
                    let n = if digits { text.trim_start_matches('0').parse().unwrap_or(0u128) } else { u128::MAX };
                    let zeros = element.iter().all(|b| *b == b'0');
                    let n = if digits && n == 0 && !zeros { u128::MAX } else { n };
                    length_malformed |= n > MAX_LENGTH || length.is_some_and(|known| known != n);
                    length = Some(n);
                }
            }
            "transfer-encoding" => {
                fields.coded = true;
                for element in elements(value).filter(|e| !e.is_empty()) {
                    fields.chunked = element.eq_ignore_ascii_case(b"chunked");
                }
            }
            "upgrade" => {
                for element in elements(value) {
                    if element.eq_ignore_ascii_case(b"websocket") {
                        fields.upgrade = Some(protocol::WEBSOCKET);
                    } else if element.eq_ignore_ascii_case(b"h2c") && fields.upgrade.is_none() {
                        fields.upgrade = Some(protocol::H2);
                    }
                }
            }
            _ => {}
        }
    }
    fields.length = if length_malformed { Err(()) } else { Ok(length.map(|n| n as u64)) };
    fields
}

/// The elements of a list (RFC 9110 §5.6.1), empty ones included.
fn elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(|element| {
        let from = element.iter().position(|b| !is_blank(*b)).unwrap_or(element.len());
        let to = element.iter().rposition(|b| !is_blank(*b)).map_or(from, |n| n + 1);
        &element[from..to]
    })
}

/// The tokens of all `Connection` fields.
fn connection(headers: &[httparse::Header<'_>], malformed: bool) -> u8 {
    let mut tokens = if malformed { token::OTHER } else { 0 };
    let mut present = malformed;
    for header in headers.iter().filter(|h| h.name.eq_ignore_ascii_case("connection")) {
        present = true;
        for element in elements(header.value).filter(|e| !e.is_empty()) {
            tokens |= match element.to_ascii_lowercase().as_slice() {
                b"close" => token::CLOSE,
                b"keep-alive" => token::KEEP_ALIVE,
                b"upgrade" => token::UPGRADE,
                _ => token::OTHER,
            };
        }
    }
    if present && tokens == 0 { token::OTHER | token::COMPLETE } else { tokens | token::COMPLETE }
}

fn parse_request(line: &[u8], fields: &Fields, at: usize, n: usize) -> Head {
    let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let [method, target, version] = words[..] else {
        panic!("three words: {:?}", String::from_utf8_lossy(line));
    };
    let shown = if target.iter().all(u8::is_ascii_alphanumeric) { target } else { b"/" };
    let text = [method, b" ", shown, b" ", version, b"\r\n", &fields.clean, b"\r\n"].concat();
    let mut headers = vec![httparse::EMPTY_HEADER; n];
    let mut request = httparse::Request::new(&mut headers);
    assert_eq!(
        request.parse(&text),
        Ok(httparse::Status::Complete(text.len())),
        "{:?}",
        String::from_utf8_lossy(&text)
    );
    Head {
        from: at,
        to: at + n,
        method: request.method.unwrap_or_default().into(),
        target: target.to_vec(),
        status: 0,
        version: 10 + request.version.unwrap_or_default(),
        connection: connection(request.headers, fields.connection_malformed),
    }
}

fn parse_response(line: &[u8], fields: &Fields, at: usize, n: usize) -> Head {
    // The reason phrase means nothing.
    let text = [&line[..12], b" \r\n", &fields.clean, b"\r\n"].concat();
    let mut headers = vec![httparse::EMPTY_HEADER; n];
    let mut response = httparse::Response::new(&mut headers);
    assert_eq!(
        response.parse(&text),
        Ok(httparse::Status::Complete(text.len())),
        "{:?}",
        String::from_utf8_lossy(&text)
    );
    Head {
        from: at,
        to: at + n,
        method: Vec::new(),
        target: Vec::new(),
        status: response.code.unwrap_or_default(),
        version: 10 + response.version.unwrap_or_default(),
        connection: connection(response.headers, fields.connection_malformed),
    }
}
