//! The witness for HTTP: two byte streams in, what a careful reader makes of them out.
//!
//! Reads whole reassembled streams with `httparse`, and frames messages as RFC 9112, section 6, says. It has nothing in
//! common with the scanner in the kernel but the contract of the answers.

use httparse::{EMPTY_HEADER, Header, Status};
use serde_json::{Value, json};

/// More fields than any head of the programs here has.
const FIELDS: usize = 512;
/// Bytes of a target that are kept.
const TARGET: usize = 64;

/// A head.
#[derive(Debug)]
struct Head {
    version: &'static str,
    /// `None`: the stream ends within the head.
    connection: Option<String>,
    framing: Framing,
    upgrade: Option<String>,
    keep_alive: KeepAlive,
    length: usize,
}

/// The parameters of `Keep-Alive`.
#[derive(Clone, Copy, Debug, Default)]
struct KeepAlive {
    timeout: Option<u32>,
    max: Option<u32>,
}

/// What the head says of its body, whatever the message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    None,
    Length(u64),
    Chunked,
    /// Another transfer coding, or a length that cannot be read.
    Unknown,
}

#[derive(Debug)]
struct Request {
    method: String,
    target: String,
    head: Head,
}

#[derive(Debug)]
struct Response {
    status: u16,
    head: Head,
    body: Body,
}

/// What was said on a connection.
#[derive(Debug)]
pub(crate) struct Reading {
    /// As the contract names it.
    pub(crate) protocol: &'static str,
    /// The contract's `http`, or `null`.
    pub(crate) http: Value,
    /// What became of the body of the last final response.
    pub(crate) body: Body,
    /// Some of the last request's body is missing.
    pub(crate) unfinished: bool,
    /// Behind the last response comes something that is none.
    pub(crate) garbage: bool,
}

/// The body of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// There is none, or all of it is there.
    Complete,
    /// It was announced, and not all of it is there.
    Incomplete,
    /// It ends with the connection.
    UntilClose,
}

/// Reads both directions of a connection.
pub(crate) fn read(from_client: &[u8], from_server: &[u8]) -> Reading {
    let other =
        |protocol| Reading { protocol, http: Value::Null, body: Body::Complete, unfinished: false, garbage: false };
    if from_client.is_empty() && from_server.is_empty() {
        return other("none");
    }
    if from_client.starts_with(b"PRI * HTTP/2") {
        return other("h2");
    }
    // Unless the server does not speak it, and says so in the clear.
    if from_client.starts_with(&[0x16, 3]) && !from_server.starts_with(b"HTTP/1.") {
        return other("tls");
    }
    let (mut requests, rest) = requests(from_client);
    let mut unreadable = rest == Rest::Garbage;
    let (responses, behind) = responses(from_server, &requests);
    if behind == Rest::Switched {
        // What follows is not HTTP/1.x, even if it looks so.
        requests.truncate(responses.len());
        unreadable = false;
    }
    let Some(version) =
        requests.last().map(|last| last.head.version).or(responses.last().map(|last| last.head.version))
    else {
        return other("other");
    };
    let whole = |head: &&Head| head.connection.is_some();
    let request_heads = requests.iter().map(|request| &request.head).filter(whole).count();
    let response_heads = responses.iter().map(|response| &response.head).filter(whole).count();
    // What cannot be read was meant as one more request, and a server may answer it.
    let request = requests.last().filter(|_| !unreadable);
    let begun = requests.len() + usize::from(unreadable);
    // It answers the last request, or was sent without one.
    let response = responses.last().filter(|_| responses.len() >= begun);
    let answered = response.is_some_and(|response| response.head.connection.is_some());
    let tokens = |head: &Head| head.connection.clone().unwrap_or_else(|| "unobserved".to_owned());
    let protocol = match response {
        Some(Response { status: 101, head, .. }) => match head.upgrade.as_deref() {
            Some("websocket") => "websocket",
            Some("h2c") => "h2",
            _ => "http/1.1",
        },
        _ if version == "1.0" => "http/1.0",
        _ => "http/1.1",
    };
    let target = request.map(|request| request.target.split(['?', '#']).next().unwrap_or_default());
    Reading {
        protocol,
        http: json!({
            "requests": request_heads,
            "responses": response_heads,
            "method": request.map(|request| &request.method),
            "target": target.map(|target| target.get(..TARGET).unwrap_or(target)),
            "status": response.map(|response| response.status),
            "request_version": request.map(|request| request.head.version),
            "response_version": response.map(|response| response.head.version),
            "request_connection": if unreadable {
                Some("unobserved".to_owned())
            } else {
                request.map(|request| tokens(&request.head))
            },
            "response_connection": response.map(|response| tokens(&response.head)),
            "answered": answered,
            "keep_alive_timeout_s": response.and_then(|response| response.head.keep_alive.timeout),
            "keep_alive_max": response.and_then(|response| response.head.keep_alive.max),
        }),
        body: response.map_or(Body::Complete, |response| response.body),
        unfinished: rest == Rest::Body,
        garbage: behind == Rest::Garbage,
    }
}

/// The requests, and what comes behind them.
fn requests(mut bytes: &[u8]) -> (Vec<Request>, Rest) {
    let mut requests = Vec::new();
    loop {
        // RFC 9112, section 2.2: empty lines before a request are ignored.
        while let [b'\r' | b'\n', rest @ ..] = bytes {
            bytes = rest;
        }
        let mut fields = [EMPTY_HEADER; FIELDS];
        let mut parsed = httparse::Request::new(&mut fields);
        let Ok(status) = parsed.parse(bytes) else { return (requests, Rest::Garbage) };
        let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
            return (requests, Rest::Nothing);
        };
        let head = head(version, parsed.headers, status);
        // A version is whole once the line is.
        if !bytes.contains(&b'\n') {
            return (requests, Rest::Nothing);
        }
        let (length, framing) = (head.length, head.framing);
        let whole = head.connection.is_some();
        requests.push(Request { method: method.to_owned(), target: target.to_owned(), head });
        let rest = bytes.get(length..).unwrap_or_default();
        if !whole {
            return (requests, Rest::Nothing);
        }
        let Some(body) = body(rest, framing, Some(0)) else { return (requests, Rest::Body) };
        bytes = rest.get(body..).unwrap_or_default();
    }
}

/// What comes behind the last message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing, or a part of a head.
    Nothing,
    /// A part of its body.
    Body,
    /// No HTTP/1.x any more: the last response was a 101, or accepted a `CONNECT`.
    Switched,
    /// Something that is no message.
    Garbage,
}

/// The final responses, and what comes behind them.
fn responses(mut bytes: &[u8], requests: &[Request]) -> (Vec<Response>, Rest) {
    let mut responses: Vec<Response> = Vec::new();
    loop {
        let mut fields = [EMPTY_HEADER; FIELDS];
        let mut parsed = httparse::Response::new(&mut fields);
        let Ok(parse) = parsed.parse(bytes) else { return (responses, Rest::Garbage) };
        let (Some(status), Some(version)) = (parsed.code, parsed.version) else { return (responses, Rest::Nothing) };
        if !bytes.contains(&b'\n') {
            return (responses, Rest::Nothing);
        }
        let head = head(version, parsed.headers, parse);
        let whole = head.connection.is_some();
        let rest = bytes.get(head.length..).unwrap_or_default();
        if (100..200).contains(&status) && status != 101 {
            if !whole {
                return (responses, Rest::Nothing);
            }
            bytes = rest;
            continue;
        }
        let method = requests.get(responses.len()).map(|request| request.method.as_str());
        let switches = status == 101 || method == Some("CONNECT") && (200..300).contains(&status);
        let bodiless = method == Some("HEAD") || status == 204 || status == 304 || switches;
        let framing = if bodiless { Framing::None } else { head.framing };
        let body = if !whole {
            None
        } else if bodiless {
            Some(0)
        } else {
            body(rest, framing, None)
        };
        let fate = match framing {
            _ if bodiless || body.is_some() || !whole => Body::Complete,
            Framing::None | Framing::Unknown => Body::UntilClose,
            Framing::Length(_) | Framing::Chunked => Body::Incomplete,
        };
        responses.push(Response { status, head, body: fate });
        if switches && whole {
            return (responses, Rest::Switched);
        }
        let Some(body) = body else { return (responses, Rest::Nothing) };
        bytes = rest.get(body..).unwrap_or_default();
    }
}

fn keep_alive(values: impl Iterator<Item = String>) -> KeepAlive {
    let mut parameters = KeepAlive::default();
    for value in values {
        for (name, number) in value.split(',').filter_map(|parameter| parameter.split_once('=')) {
            match (name.trim(), number.trim().parse().ok()) {
                ("timeout", Some(seconds)) => parameters.timeout = Some(seconds),
                ("max", Some(requests)) => parameters.max = Some(requests),
                _ => {}
            }
        }
    }
    parameters
}

fn head(version: u8, fields: &[Header<'_>], parsed: Status<usize>) -> Head {
    let values = |name: &str| {
        let name = name.to_owned();
        fields
            .iter()
            .filter(move |field| field.name.eq_ignore_ascii_case(&name))
            .map(|field| String::from_utf8_lossy(field.value).to_ascii_lowercase())
    };
    let whole = parsed.is_complete();
    let framing = match (values("transfer-encoding").next_back(), values("content-length").next()) {
        (Some(coding), _) if coding.trim().ends_with("chunked") => Framing::Chunked,
        (Some(_), _) => Framing::Unknown,
        (None, Some(length)) => length.trim().parse().map_or(Framing::Unknown, Framing::Length),
        (None, None) => Framing::None,
    };
    Head {
        version: if version == 0 { "1.0" } else { "1.1" },
        connection: whole.then(|| tokens(&values("connection").collect::<Vec<_>>())),
        framing,
        upgrade: values("upgrade").next().map(|value| value.trim().to_owned()),
        keep_alive: keep_alive(values("keep-alive")),
        length: match parsed {
            Status::Complete(length) => length,
            Status::Partial => 0,
        },
    }
}

/// The known tokens of all `Connection` fields, as the contract writes them.
fn tokens(values: &[String]) -> String {
    if values.is_empty() {
        return "absent".to_owned();
    }
    let list = values.join(",");
    let words: Vec<&str> = list.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    let mut known: Vec<&str> =
        ["close", "keep-alive", "upgrade"].into_iter().filter(|word| words.contains(word)).collect();
    if words.len() != words.iter().filter(|word| known.contains(word)).count() || words.is_empty() {
        known.push("other");
    }
    known.join(", ")
}

/// The length of a body that is there as a whole; `otherwise` for one without framing.
fn body(bytes: &[u8], framing: Framing, otherwise: Option<usize>) -> Option<usize> {
    match framing {
        Framing::None => otherwise,
        Framing::Unknown => None,
        Framing::Length(length) => usize::try_from(length).ok().filter(|length| *length <= bytes.len()),
        Framing::Chunked => {
            let mut at = 0;
            loop {
                let (line, size) = match httparse::parse_chunk_size(bytes.get(at..)?) {
                    Ok(Status::Complete(chunk)) => chunk,
                    _ => return None,
                };
                at += line;
                if size != 0 {
                    at = at.checked_add(usize::try_from(size).ok()?)?.checked_add(2)?;
                    bytes.get(..at)?;
                    continue;
                }
                // Trailers, up to an empty line.
                let end = bytes.get(at..)?;
                if end.starts_with(b"\r\n") {
                    return Some(at + 2);
                }
                let trailers = end.windows(4).position(|four| four == b"\r\n\r\n")?;
                return Some(at + trailers + 4);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framing_decides_what_is_a_head() {
        let reading = read(
            b"POST /a HTTP/1.1\r\nContent-Length: 21\r\n\r\nGET / HTTP/1.1\r\nA: b\r\nHEAD /b?c HTTP/1.1\r\nConnection: Keep-Alive, x\r\nconnection: close\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: u\r\n\r\nHTTP/1.0 404 x\r\nContent-Length: 9\r\nKeep-Alive: timeout=5, max=99\r\n\r\n",
        );
        assert_eq!(reading.protocol, "http/1.1");
        assert_eq!(
            reading.http,
            json!({
                "requests": 2, "responses": 2, "method": "HEAD", "target": "/b", "status": 404,
                "request_version": "1.1", "response_version": "1.0",
                "request_connection": "close, keep-alive, other", "response_connection": "absent", "answered": true,
                "keep_alive_timeout_s": 5, "keep_alive_max": 99,
            })
        );
    }
}
