//! Messages as RFC 9112 frames them, and payload that is no HTTP: one table of conversations for each subject.
//!
//! The server always closes first, at once, so that what it says of the cause depends on the messages alone.

use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::process::Command;

use serde_json::{Value, json};

use crate::rig::{Listener, Namespace, Pair, Tracer, expect, free_port, get, ok, port_of, run};
use crate::servers;

/// What one end sends.
enum Said {
    Client(Vec<u8>),
    Server(Vec<u8>),
}

fn client(bytes: impl AsRef<[u8]>) -> Said {
    Said::Client(bytes.as_ref().to_vec())
}

fn server(bytes: impl AsRef<[u8]>) -> Said {
    Said::Server(bytes.as_ref().to_vec())
}

/// Plays all conversations, and compares the records of both ends of each.
#[track_caller]
fn conversations(all: impl IntoIterator<Item = (Vec<Said>, Value)>) {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut played = Vec::new();
    for (said, wanted) in all {
        let mut pair = listener.connect();
        let mut text = String::new();
        for said in said {
            match said {
                Said::Client(bytes) => {
                    pair.request(&bytes);
                    text.push_str(&format!("client: {:?}\n", String::from_utf8_lossy(&bytes[..bytes.len().min(400)])));
                }
                Said::Server(bytes) => {
                    pair.respond(&bytes);
                    text.push_str(&format!("server: {:?}\n", String::from_utf8_lossy(&bytes[..bytes.len().min(400)])));
                }
            }
        }
        played.push((pair.server_closes_first(), text, wanted));
    }
    for ((server, client), text, wanted) in played {
        eprint!("{text}");
        for (local, remote) in [(server, client), (client, server)] {
            expect(&tracer.wait_for_close(local, remote), &wanted);
        }
    }
    tracer.stop();
}

/// One exchange each.
#[track_caller]
fn exchanges<A: AsRef<[u8]>, B: AsRef<[u8]>>(all: impl IntoIterator<Item = (A, B, Value)>) {
    conversations(all.into_iter().map(|(request, response, wanted)| (vec![client(request), server(response)], wanted)));
}

const CLOSE: &str = "Connection: close\r\n";

#[test]
fn several_lines_lists_case_and_white_space() {
    let ways = [
        ("Connection: keep-alive\r\nX: y\r\nConnection: close\r\n", "close, keep-alive", "request_close"),
        ("Connection: keep-alive, Upgrade\r\n", "keep-alive, upgrade", "no_reuse"),
        ("CoNNeCTioN:\t \tcLoSe\t \r\n", "close", "request_close"),
        ("Connection:close\r\n", "close", "request_close"),
        ("Connection: ,, close ,\r\n", "close", "request_close"),
        // obs-fold
        ("Connection: keep-alive,\r\n\t close\r\n", "close, keep-alive", "request_close"),
        ("Connection:\r\n close\r\n", "close", "request_close"),
        ("X: y\r\n Connection: close\r\n", "absent", "no_reuse"),
        // What is nearly that.
        ("Connection: closed\r\n", "other", "no_reuse"),
        ("Connection:\r\n", "other", "no_reuse"),
        ("Proxy-Connection: close\r\nX-Connection: close\r\n", "absent", "no_reuse"),
        // White space before the colon: some refuse it, some ignore the line.
        ("Connection : close\r\n", "other", "no_reuse"),
    ];
    exchanges(ways.map(|(lines, shown, cause)| {
        (get(lines), ok(""), json!({ "cause": cause, "http": { "request_connection": shown, "requests": 1 } }))
    }));
    exchanges(ways.map(|(lines, shown, cause)| {
        let cause = if cause == "request_close" { "response_close" } else { cause };
        (get(""), ok(lines), json!({ "cause": cause, "http": { "response_connection": shown, "responses": 1 } }))
    }));
}

#[test]
fn response_bodies_are_no_heads() {
    let bait = "HTTP/1.1 500 X\r\nConnection: close\r\n\r\n\r\nConnection: close\r\n\r\nGET /bait HTTP/1.1\r\n\r\n";
    let sized = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{bait}", bait.len());
    let chunk = format!("{:x};a=b\r\n{bait}\r\n", bait.len());
    let chunked = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}0\r\n\r\n");
    let wanted = |responses| {
        json!({
            "cause": "no_reuse",
            "http": { "requests": responses, "responses": responses, "status": 200, "response_connection": "absent" },
        })
    };
    conversations([
        (vec![client(get("")), server(&sized)], wanted(1)),
        (vec![client(get("")), server(&chunked)], wanted(1)),
        (vec![client(get("")), server(&sized), client(get("")), server(&chunked)], wanted(2)),
    ]);
    // To the end of the connection; that is why it ends.
    let endless = format!("HTTP/1.1 200 OK\r\n\r\n{bait}");
    exchanges([(get(""), endless, json!({ "cause": "unknown", "http": { "responses": 1, "status": 200 } }))]);
}

#[test]
fn trailers_are_no_headers() {
    let body = "5\r\nhello\r\n0\r\nConnection: close\r\nX: y\r\n\r\n";
    let post = format!("POST /path HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
    let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Connection\r\n\r\n{body}");
    let http = json!({
        "requests": 1, "responses": 1, "request_connection": "absent", "response_connection": "absent",
    });
    exchanges([(&post, &answer, json!({ "cause": "no_reuse", "http": http }))]);
    // The last line end is missing.
    let cut = &answer[..answer.len() - 2];
    exchanges([(&post, cut, json!({ "cause": "truncated", "http": http }))]);
}

#[test]
fn responses_without_a_body() {
    let head = get("").replace("GET", "HEAD");
    let (length, chunked) = ("Content-Length: 500\r\n", "Transfer-Encoding: chunked\r\n");
    let mut all = Vec::new();
    for fields in [length, chunked] {
        all.push((head.clone(), format!("HTTP/1.1 200 OK\r\n{fields}\r\n")));
        all.push((get(""), format!("HTTP/1.1 204 No Content\r\n{fields}\r\n")));
        all.push((get(""), format!("HTTP/1.1 304 Not Modified\r\n{fields}\r\n")));
    }
    conversations(all.into_iter().map(|(request, response)| {
        let said = vec![client(request), server(response), client(get("")), server(ok(""))];
        (said, json!({ "cause": "no_reuse", "http": { "requests": 2, "responses": 2, "answered": true } }))
    }));
}

#[test]
fn interim_responses_decide_nothing() {
    let post =
        |fields: &str| format!("POST /path HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n{fields}\r\n");
    let go_on = "HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\n";
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n";
    let http = json!({ "requests": 1, "responses": 1, "status": 200, "response_connection": "absent" });
    conversations([
        (
            vec![client(post("")), server(go_on), client("ok"), server(hints), server(ok(""))],
            json!({ "cause": "no_reuse", "http": http }),
        ),
        (
            vec![client(post(CLOSE)), server(go_on), client("ok"), server(ok(""))],
            json!({ "cause": "request_close", "http": http }),
        ),
        // Without a final one.
        (
            vec![client(post("")), server(go_on), client("ok")],
            json!({ "cause": "unanswered", "http": { "responses": 0, "status": null, "answered": false } }),
        ),
    ]);
}

#[test]
fn upgrades() {
    let ask = |to: &str| get(&format!("Connection: keep-alive, Upgrade\r\nUpgrade: {to}\r\n"));
    let switch = |to: &str| format!("HTTP/1.1 101 Switching Protocols\r\nUpgrade: {to}\r\nConnection: upgrade\r\n\r\n");
    let wanted = |protocol| {
        json!({
            "cause": "upgraded", "protocol": protocol,
            "http": {
                "status": 101, "request_connection": "keep-alive, upgrade", "response_connection": "upgrade",
                "requests": 1, "responses": 1,
            },
        })
    };
    conversations([
        (
            vec![client(ask("websocket")), server(switch("websocket")), client(b"\x81\x85GET /"), server(b"\x88\0")],
            wanted("websocket"),
        ),
        (vec![client(ask("h2c")), server(switch("h2c")), client("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")], wanted("h2")),
        (vec![client(ask("other/1")), server(switch("other/1")), server(ok(CLOSE))], wanted("http/1.1")),
        // Refused: HTTP goes on.
        (
            vec![client(ask("websocket")), server(ok(""))],
            json!({ "cause": "no_reuse", "protocol": "http/1.1", "http": { "status": 200 } }),
        ),
    ]);
}

#[test]
fn tunnels() {
    let connect = "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n";
    let hello = b"\x16\x03\x01\0\x04\x01\0\0\0";
    let open = "HTTP/1.1 200 Connection established\r\n\r\n";
    let http = json!({ "method": "CONNECT", "target": "example.org:443", "requests": 1, "status": 200 });
    conversations([
        (
            vec![client(connect), server(open), client(hello), server(hello)],
            json!({ "cause": "upgraded", "protocol": "http/1.1", "http": http }),
        ),
        (
            vec![
                client(connect),
                server("HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"),
                client(get(CLOSE)),
                server(ok("")),
            ],
            json!({ "cause": "request_close", "http": { "requests": 2, "responses": 2, "method": "GET" } }),
        ),
    ]);
}

#[test]
fn versions() {
    let old = |fields: &str| get(fields).replace("HTTP/1.1", "HTTP/1.0");
    let old_ok = |fields: &str| ok(fields).replace("HTTP/1.1", "HTTP/1.0");
    let keep = "Connection: Keep-Alive\r\n";
    let wanted = |request: &str, response: &str, cause: &str| {
        let protocol = format!("http/{request}");
        json!({
            "cause": cause, "protocol": protocol,
            "http": { "request_version": request, "response_version": response, "answered": true },
        })
    };
    exchanges([
        (old(""), old_ok(""), wanted("1.0", "1.0", "http10")),
        (old(keep), old_ok(keep), wanted("1.0", "1.0", "no_reuse")),
        (old(keep), ok(keep), wanted("1.0", "1.1", "no_reuse")),
        (old(keep), old_ok(""), wanted("1.0", "1.0", "http10")),
        (old(keep), ok(""), wanted("1.0", "1.1", "http10")),
        (old(""), ok(""), wanted("1.0", "1.1", "http10")),
        (old(""), ok(CLOSE), wanted("1.0", "1.1", "response_close")),
        (get(""), old_ok(""), wanted("1.1", "1.0", "http10")),
        (get(""), old_ok(keep), wanted("1.1", "1.0", "no_reuse")),
        (get(CLOSE), old_ok(""), wanted("1.1", "1.0", "request_close")),
    ]);
    // A body in chunks is none that HTTP/1.0 knows: what follows it is not read.
    let chunked = "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
    exchanges([(get(""), chunked, json!({ "cause": "unknown", "http": { "response_connection": "keep-alive" } }))]);
    // HTTP/0.9 has no heads at all.
    exchanges([("GET /\r\n", "<p>hello", json!({ "cause": "not_http", "protocol": "other", "http": null }))]);
}

#[test]
fn protocols_that_are_not_http() {
    let wanted = json!({ "cause": "not_http", "protocol": "other", "http": null });
    let talk = |said: &[(bool, &[u8])]| {
        said.iter().map(|(by_client, bytes)| if *by_client { client(bytes) } else { server(bytes) }).collect()
    };
    conversations(
        [
            // The server speaks first.
            &[(false, &b"SSH-2.0-OpenSSH_9.2\r\n"[..]), (true, b"SSH-2.0-client\r\n"), (false, b"\0\0\x04\x0c")][..],
            &[(false, b"220 mail.example.org ESMTP\r\n"), (true, b"EHLO x\r\n"), (false, b"250 OK\r\n")],
            &[(false, b"HTTP is not spoken here\r\n"), (true, b"QUIT\r\n")],
            // The client does.
            &[(true, b"*1\r\n$4\r\nPING\r\n"), (false, b"+PONG\r\n")],
            &[(true, b"get key\r\n"), (false, b"END\r\n")],
            &[(true, b"OPTIONS rtsp://x RTSP/1.0\r\nConnection: close\r\n\r\n"), (false, b"RTSP/1.0 200 OK\r\n\r\n")],
            &[(true, b"\0\0\0\x08\x04\xd2\x16\x2f"), (false, b"N")],
            &[(true, b"\x16\x03")],
            &[(true, b"x")],
        ]
        .map(|said| (talk(said), wanted.clone())),
    );
}

#[test]
fn methods_and_targets() {
    let wanted = |method: &str, target: &str| json!({ "cause": "request_close", "http": { "method": method, "target": target, "requests": 1 } });
    let request = |line: &str| format!("{line} HTTP/1.1\r\nHost: test\r\n{CLOSE}\r\n");
    exchanges([
        (request("get /lower"), ok(""), wanted("get", "/lower")),
        (request("PROPFIND /dav"), ok(""), wanted("PROPFIND", "/dav")),
        (request("M-SEARCH *"), ok(""), wanted("M-SEARCH", "*")),
        (request("OPTIONS *"), ok(""), wanted("OPTIONS", "*")),
        (request("GET http://example.org:80/a?secret"), ok(""), wanted("GET", "http://example.org:80/a")),
        (request("GET /\u{e9}\u{202e}gpj"), ok(""), wanted("GET", "/\u{e9}\u{202e}gpj")),
        (request("GET /\u{7f}"), ok(""), wanted("GET", "/\u{7f}")),
    ]);
    // Bytes that are no UTF-8.
    let bytes = [b"GET /\xff\xfe HTTP/1.1\r\n", CLOSE.as_bytes(), b"\r\n"].concat();
    exchanges([(bytes, ok(""), wanted("GET", "/\u{fffd}\u{fffd}"))]);
}

#[test]
fn requests_that_cannot_be_read() {
    // What they asked for is not known, so neither is the cause; but the connection speaks HTTP.
    let bad = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n{CLOSE}\r\n");
    let wanted = json!({
        "cause": "unknown", "protocol": "http/1.1",
        "http": {
            "requests": 0, "responses": 1, "method": null, "target": null, "status": 400,
            "request_connection": "unobserved", "response_connection": "close",
        },
    });
    let lines =
        ["GET /\u{1b}[31m HTTP/1.1", "GET  / HTTP/1.1", "GET / HTTP/1.1 ", "GET / HTTP/1.2", "G(T / HTTP/1.1", "GET /"];
    exchanges(lines.map(|line| (format!("{line}\r\nConnection: close\r\n\r\n"), bad.clone(), wanted.clone())));
    // TLS, to a port that does not speak it.
    exchanges([(b"\x16\x03\x01\0\x04\x01\0\0\0", &bad, wanted)]);
}

#[test]
fn status_lines() {
    let wanted = |status: u16| json!({ "cause": "response_close", "http": { "status": status, "responses": 1 } });
    exchanges(
        [("HTTP/1.1 200", 200), ("HTTP/1.1 404 ", 404), ("HTTP/1.1 599 \u{e9}\t HTTP/1.1 200 OK", 599)]
            .map(|(line, status)| (get(""), format!("{line}\r\nContent-Length: 0\r\n{CLOSE}\r\n"), wanted(status))),
    );
}

#[test]
fn responses_that_nobody_asked_for() {
    for status in [408, 400] {
        let unasked = format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\n{CLOSE}\r\n");
        conversations([
            (
                vec![server(&unasked)],
                json!({
                    "cause": "response_close",
                    "http": {
                        "requests": 0, "responses": 1, "status": status, "method": null,
                        "request_connection": null, "response_connection": "close",
                    },
                }),
            ),
            // After an exchange it is the last response all the same.
            (
                vec![client(get("")), server(ok("")), server(&unasked)],
                json!({ "cause": "response_close", "http": { "requests": 1, "responses": 2, "status": status } }),
            ),
        ]);
    }
}

#[test]
fn responses_before_the_request_is_complete() {
    let post = "POST /up HTTP/1.1\r\nHost: test\r\nContent-Length: 5000\r\n\r\n";
    let chunks = "POST /up HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let no = |fields: &str| format!("HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n{fields}\r\n");
    let http = json!({ "requests": 1, "responses": 1, "method": "POST", "status": 413, "answered": true });
    for request in [[post, "some of it"].concat(), chunks.to_owned()] {
        exchanges([
            (&request, no(CLOSE), json!({ "cause": "response_close", "http": http })),
            // It did not say so, but the connection could not go on: nobody failed to reuse it.
            (&request, no(""), json!({ "cause": "unknown", "http": http })),
        ]);
    }
    // Before the end of its head.
    exchanges([(
        "GET /path HTTP/1.1\r\nHost: te",
        format!("HTTP/1.1 431 Too Large\r\nContent-Length: 0\r\n{CLOSE}\r\n"),
        json!({
            "cause": "unknown",
            "http": { "requests": 0, "request_connection": "unobserved", "response_connection": "close", "status": 431 },
        }),
    )]);
}

#[test]
fn behind_a_proxy_protocol_header() {
    let v2 = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], b"\xc0\0\x02\x01\xc0\0\x02\x02\xc3\x50\0\x50"].concat();
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".to_vec();
    let v1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 80\r\n".to_vec();
    let unknown = b"PROXY UNKNOWN\r\n".to_vec();
    let request = get(CLOSE);
    let http = json!({
        "cause": "request_close", "protocol": "http/1.1",
        "http": { "requests": 1, "responses": 1, "method": "GET", "target": "/path", "request_connection": "close" },
    });
    for header in [v1, unknown, v2, local] {
        let hello = [&header[..], b"\x16\x03\x01\0\x04\x01\0\0\0"].concat();
        conversations([
            (vec![client([&header[..], request.as_bytes()].concat()), server(ok(""))], http.clone()),
            (vec![client(&header), client(&request), server(ok(""))], http.clone()),
            (vec![client(&header[..9]), client(&header[9..]), client(&request), server(ok(""))], http.clone()),
            (vec![client(hello), server(b"\x16\x03\x03")], json!({ "cause": "tls", "protocol": "tls", "http": null })),
        ]);
    }
}

#[test]
fn the_last_request_has_no_answer() {
    let wanted = json!({
        "cause": "unanswered",
        "http": { "requests": 2, "responses": 1, "answered": false, "status": null, "request_connection": "close" },
    });
    conversations([
        (vec![client(get("")), server(ok("")), client(get(CLOSE))], wanted.clone()),
        (vec![client([get(""), get(CLOSE)].concat()), server(ok(""))], wanted.clone()),
    ]);
}

#[test]
fn transfer_codings_and_two_framings() {
    let chunks = "14\r\nGET /bait HTTP/1.1\r\n\r\n0\r\n\r\n";
    let both = "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n";
    let mut all = Vec::new();
    for fields in
        ["Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: gzip\r\nTransfer-Encoding: Chunked\r\n", both]
    {
        all.push((
            vec![
                client(format!("POST /path HTTP/1.1\r\n{fields}\r\n{chunks}")),
                server(format!("HTTP/1.1 200 OK\r\n{fields}\r\n{chunks}")),
                client(get(CLOSE)),
                server(ok("")),
            ],
            json!({ "cause": "request_close", "http": { "requests": 2, "responses": 2, "method": "GET" } }),
        ));
    }
    // No framing at all: what follows is no head, and what the last request asked for is not known.
    for fields in
        ["Transfer-Encoding: gzip\r\n", "Content-Length: 3\r\nContent-Length: 4\r\n", "Content-Length : 3\r\n"]
    {
        all.push((
            vec![client(format!("POST /path HTTP/1.1\r\n{fields}\r\n{}", get(CLOSE))), server(ok(""))],
            json!({ "cause": "unknown", "http": { "requests": 1, "request_connection": "unobserved" } }),
        ));
    }
    conversations(all);
}

#[test]
fn over_ipv6() {
    let port = free_port();
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).expect("the port is free");
    let tracer = Tracer::on_port(port);
    let stream = TcpStream::connect((Ipv6Addr::LOCALHOST, port)).expect("it listens");
    let (accepted, peer) = listener.accept().expect("it listens");
    let mut pair = Pair { server: accepted, client: stream, server_port: port, client_port: peer.port() };
    let post = format!("POST /six HTTP/1.1\r\nContent-Length: 30000\r\n\r\n{}", "x".repeat(30_000));
    pair.request([post.as_str(), &get(CLOSE)].concat());
    pair.respond([ok("Keep-Alive: timeout=5\r\n"), ok("Keep-Alive: timeout=6\r\n")].concat());
    let (server, client) = pair.server_closes_first();
    for (local, remote) in [(server, client), (client, server)] {
        let close = tracer.wait_for_close(local, remote);
        let http = json!({ "requests": 2, "responses": 2, "request_connection": "close", "keep_alive_timeout_s": 6 });
        expect(&close, &json!({ "family": "ipv6", "cause": "request_close", "http": http }));
    }
    tracer.stop();
}

#[test]
fn a_real_tls_handshake() {
    let server = servers::tls();
    let tracer = Tracer::on_port(server.port);
    let url = format!("https://127.0.0.1:{}/", server.port);
    let page = run(Command::new("curl").args(["--silent", "--show-error", "--insecure", "--http1.1", &url]));
    assert!(page.contains("TLS"), "{page}");
    for close in tracer.wait_for_closes(2, |_| true) {
        expect(&close, &json!({ "protocol": "tls", "http": null }));
        assert_eq!(close["cause"], "tls", "{close:#}");
    }
    tracer.stop();
}

/// Two exchanges, whose responses Python sends with these statements; both records of the connection.
fn sent_by(namespace: Option<&Namespace>, send: &str) {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let script = format!(
        "import os, socket, tempfile\n\
         listener = socket.create_server(('127.0.0.1', {port}))\n\
         client = socket.create_connection(('127.0.0.1', {port}))\n\
         server, _ = listener.accept()\n\
         first = b'POST /first HTTP/1.1\\r\\nContent-Length: 150000\\r\\n\\r\\n' + b'x' * 150000\n\
         last = b'GET /last HTTP/1.1\\r\\nHost: test\\r\\n\\r\\n'\n\
         import threading\n\
         def ask(): client.sendall(first + last)\n\
         asking = threading.Thread(target=ask)\n\
         asking.start()\n\
         left = len(first + last)\n\
         while left: left -= len(server.recv(min(left, 65536)))\n\
         asking.join()\n\
         bait = b'\\r\\nConnection: keep-alive\\r\\n\\r\\nHTTP/1.1 500 No\\r\\n\\r\\n' * 3000\n\
         data = b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(bait) + bait\n\
         data += b'HTTP/1.1 201 Created\\r\\nX: ' + b'y' * 2000 + b'\\r\\nConnection: close\\r\\nContent-Length: 2\\r\\n\\r\\nok'\n\
         def read():\n\
        \x20    while client.recv(65536): pass\n\
         reading = threading.Thread(target=read)\n\
         reading.start()\n\
         {send}\n\
         server.close()\n\
         reading.join()\n\
         client.close()\n"
    );
    let mut command = match namespace {
        None => Command::new("python3"),
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &namespace.name, "python3"]);
            command
        }
    };
    run(command.args(["-c", &script]));
    for close in tracer.wait_for_closes(2, |_| true) {
        eprintln!("{send}");
        let http = json!({
            "requests": 2, "responses": 2, "method": "GET", "target": "/last", "status": 201, "answered": true,
            "request_connection": "absent", "response_connection": "close",
        });
        expect(&close, &json!({ "cause": "response_close", "http": http }));
        let server = port_of(&close, "local") == Some(port);
        assert_eq!(close["closed_by"], if server { "local" } else { "remote" }, "{close:#}");
    }
    tracer.stop();
}

#[test]
fn payload_in_fragments() {
    // From the page cache: heads and bodies are in pages that were never copied.
    sent_by(
        None,
        "file = tempfile.TemporaryFile(); file.write(data); file.flush(); at = 0\n\
         while at < len(data): at += os.sendfile(server.fileno(), file.fileno(), at, len(data) - at)",
    );
    // SO_ZEROCOPY is 60, MSG_ZEROCOPY 0x4000000.
    sent_by(
        None,
        "server.setsockopt(socket.SOL_SOCKET, 60, 1)\n\
         while data: data = data[server.send(data, 0x4000000):]",
    );
}

#[test]
fn corked_heads() {
    let byte_by_byte =
        "server.sendall(data[:-300])\nfor i in range(len(data) - 300, len(data)): server.send(data[i:i+1], ";
    sent_by(None, &format!("{byte_by_byte}socket.MSG_MORE if i + 1 < len(data) else 0)"));
    sent_by(
        None,
        &format!(
            "server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)\n{byte_by_byte}0)\n\
             server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)"
        ),
    );
}

#[test]
fn segments_that_the_device_would_cut() {
    // With the frames of a real network, what leaves is 64 KiB that the device is to cut, and arrives so.
    let namespace = Namespace::new("gso");
    run(Command::new("ip").args(["-n", &namespace.name, "link", "set", "lo", "mtu", "1500"]));
    sent_by(Some(&namespace), "server.sendall(data)");
    let inside = ["netns", "exec", &namespace.name, "cat", "/proc/net/dev"];
    let devices = run(Command::new("ip").args(inside));
    let counts = devices.split_once("lo:").expect("the only device").1;
    let mut counts = counts.split_whitespace().map(|n| n.parse::<u64>().expect("a number"));
    let (bytes, packets) = (counts.next().expect("bytes"), counts.next().expect("packets"));
    assert!(bytes > 250_000 && packets < bytes / 1500 / 2, "{bytes} bytes in {packets} packets");
}
