//! Heads as they really arrive: cut anywhere, huge, pipelined, repeated, or no heads at all.

use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::process::Command;

use serde_json::{Value, json};

use crate::leftovers::{bpftool, held_by};
use crate::rig::{Listener, Pair, Tracer, expect, get, ok, run};

/// Sends pieces one by one, each in a segment of its own.
fn in_pieces(pair: &mut Pair, from_client: bool, bytes: &[u8], size: usize) {
    let (from, to) =
        if from_client { (&mut pair.client, &mut pair.server) } else { (&mut pair.server, &mut pair.client) };
    for piece in bytes.chunks(size) {
        from.write_all(piece).expect("the connection is open");
        // Until it is there: the next one cannot be joined to it.
        to.read_exact(&mut vec![0; piece.len()]).expect("the connection is open");
    }
}

/// The server's and the client's record after this script; the server closes first.
fn records(script: impl FnOnce(&mut Pair)) -> [Value; 2] {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut pair = listener.connect();
    script(&mut pair);
    let (server, client) = pair.server_closes_first();
    let both = [tracer.wait_for_close(server, client), tracer.wait_for_close(client, server)];
    tracer.stop();
    both
}

#[test]
fn cut_at_every_few_bytes() {
    let request = get("Connection: close\r\nX-Filler: some more bytes\r\n");
    let response = ok("Keep-Alive: timeout=7, max=9\r\nConnection: keep-alive\r\n");
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let sizes = (1..=24).chain([31, 32, 33, 63, 64, 65]);
    let ports: Vec<_> = sizes
        .map(|size| {
            let mut pair = listener.connect();
            in_pieces(&mut pair, true, request.as_bytes(), size);
            in_pieces(&mut pair, false, response.as_bytes(), size);
            (size, pair.server_closes_first())
        })
        .collect();
    for (size, (server, client)) in ports {
        for (local, remote) in [(server, client), (client, server)] {
            let close = tracer.wait_for_close(local, remote);
            eprintln!("pieces of {size} bytes");
            expect(
                &close,
                &json!({
                    "cause": "request_close",
                    "http": {
                        "requests": 1, "responses": 1, "method": "GET", "target": "/path", "status": 200,
                        "request_connection": "close", "response_connection": "keep-alive",
                        "keep_alive_timeout_s": 7, "keep_alive_max": 9,
                    },
                }),
            );
        }
    }
    tracer.stop();
}

/// Sends `request` and `response` in segments that end at these places, over a connection for each set of places.
fn cut_at(request: &str, response: &str, places: impl IntoIterator<Item = Vec<usize>>, wanted: &Value) {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut played = Vec::new();
    for places in places {
        let mut pair = listener.connect();
        for (from_client, text) in [(true, request), (false, response)] {
            let mut at = 0;
            for end in places.iter().copied().chain([text.len()]) {
                let piece = &text[at.min(text.len())..end.min(text.len())];
                if from_client {
                    pair.request(piece);
                } else {
                    pair.respond(piece);
                }
                at = end;
            }
        }
        played.push((places, pair.server_closes_first()));
    }
    for (places, (server, client)) in played {
        for (local, remote) in [(server, client), (client, server)] {
            let close = tracer.wait_for_close(local, remote);
            eprintln!("cut after {places:?} bytes");
            expect(&close, wanted);
        }
    }
    tracer.stop();
}

/// Every field of interest is in it, and every phase of a head.
const REQUEST: &str = "POST /a?b HTTP/1.1\r\nConnection: a, close\r\nContent-Length: 2\r\n\r\nok";
const RESPONSE: &str =
    "HTTP/1.1 201 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\n\r\n";

fn whole() -> Value {
    json!({
        "cause": "request_close",
        "http": {
            "requests": 1, "responses": 1, "answered": true, "method": "POST", "target": "/a", "status": 201,
            "request_connection": "close, other", "response_connection": "keep-alive",
        },
    })
}

#[test]
fn cut_once_at_every_place() {
    let longest = REQUEST.len().max(RESPONSE.len());
    cut_at(REQUEST, RESPONSE, (1..longest).map(|at| vec![at]), &whole());
}

#[test]
fn cut_twice() {
    // One in 19 of all pairs; a number that has no divisor in common with what a head is made of.
    let longest = REQUEST.len().max(RESPONSE.len());
    let pairs = (1..longest).flat_map(|a| (a + 1..longest).map(move |b| vec![a, b]));
    cut_at(REQUEST, RESPONSE, pairs.step_by(19), &whole());
}

#[test]
fn behind_16_kib_of_other_fields() {
    // Lines of all lengths, some of which begin like a field of interest.
    let mut lines = String::new();
    for n in 0.. {
        let name =
            ["X-Field", "Connection-Id", "Content-Type", "Keep-Alive-Not", "Transfer", "Upgrade-Insecure-Requests"]
                [n % 6];
        lines.push_str(&format!("{name}: {}\r\n", "v".repeat(n % 97)));
        if lines.len() >= 16 << 10 {
            break;
        }
    }
    let (request, response) =
        (get(&format!("{lines}Connection: close\r\n")), ok(&format!("{lines}Connection: Keep-Alive, foo\r\n")));
    let wanted = json!({
        "cause": "request_close",
        "http": {
            "requests": 1, "responses": 1, "request_connection": "close", "response_connection": "keep-alive, other",
        },
    });
    // At once, and in pieces of the size of frames.
    let frames = (1..14).map(|n| n * 1448).collect();
    cut_at(&request, &response, [vec![], frames, vec![200, 201], vec![16_384]], &wanted);
}

#[test]
fn behind_a_cookie_of_60_kib() {
    let cookie = "c".repeat(60 << 10);
    let request = get(&format!("Cookie: secret={cookie}\r\nConnection: close\r\n"));
    for record in records(|pair| {
        pair.request(&request);
        pair.respond(ok(""));
    }) {
        expect(
            &record,
            &json!({
                "cause": "request_close",
                "http": { "requests": 1, "target": "/path", "request_connection": "close", "answered": true },
            }),
        );
        assert!(!record.to_string().contains("ccc"), "a cookie left the kernel: {record:#}");
    }
}

#[test]
fn with_no_end() {
    let mut request = String::from("GET /endless HTTP/1.1\r\n");
    while request.len() < 200 << 10 {
        request.push_str("X-Line: and on and on and on and on and on and on and on and on\r\n");
    }
    for record in records(|pair| pair.request(&request)) {
        // It cannot be said that there was no such header.
        assert_ne!(record["http"]["request_connection"], "absent", "{record:#}");
        assert!(matches!(record["cause"].as_str(), Some("unanswered" | "unknown")), "{record:#}");
    }
}

#[test]
fn pipelined() {
    let two = [get(""), get("Connection: close\r\n")].concat();
    for record in records(|pair| {
        pair.request(&two);
        pair.respond([ok(""), ok("")].concat());
    }) {
        expect(
            &record,
            &json!({
                "cause": "request_close",
                "http": { "requests": 2, "responses": 2, "request_connection": "close", "answered": true },
            }),
        );
    }
}

#[test]
fn several_connection_headers() {
    let request = get("connection: Keep-Alive\r\nX: y\r\nCONNECTION:\tfoo ,\t CLOSE\r\n");
    for record in records(|pair| {
        pair.request(&request);
        pair.respond(ok("Connection: x-close, keep-alive\r\nX-Connection: close\r\n"));
    }) {
        expect(
            &record,
            &json!({
                "cause": "request_close",
                "http": { "request_connection": "close, keep-alive, other", "response_connection": "keep-alive, other" },
            }),
        );
    }
}

#[test]
fn bodies_are_no_heads() {
    let body = "GET /not-a-head HTTP/1.1\r\nConnection: close\r\n\r\n";
    let post = format!("POST /one HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let chunked = format!(
        "POST /two HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    for record in records(|pair| {
        pair.request(&post);
        pair.respond(ok(""));
        pair.request(&chunked);
        pair.respond(ok(""));
    }) {
        expect(
            &record,
            &json!({
                "cause": "no_reuse",
                "http": {
                    "requests": 2, "responses": 2, "method": "POST", "target": "/two",
                    "request_connection": "absent", "response_connection": "absent",
                },
            }),
        );
    }
}

#[test]
fn interim_responses_do_not_count() {
    for record in records(|pair| {
        pair.request(get("Expect: 100-continue\r\nConnection: close\r\n"));
        pair.respond("HTTP/1.1 100 Continue\r\n\r\n");
        pair.respond(ok(""));
    }) {
        expect(&record, &json!({ "cause": "request_close", "http": { "requests": 1, "responses": 1, "status": 200 } }));
    }
}

#[test]
fn targets_are_bounded_and_without_query() {
    let request = format!("GET /{}?token=secret HTTP/1.1\r\nConnection: close\r\n\r\n", "p".repeat(200));
    for record in records(|pair| {
        pair.request(&request);
        pair.respond(ok(""));
    }) {
        let target = record["http"]["target"].as_str().expect("a target");
        assert_eq!(target, format!("/{}", "p".repeat(63)));
        assert_eq!(record["http"]["target_truncated"], true);
    }
    for record in records(|pair| {
        pair.request("GET /short?token=secret HTTP/1.1\r\nConnection: close\r\n\r\n");
        pair.respond(ok(""));
    }) {
        expect(&record, &json!({ "http": { "target": "/short" } }));
        assert!(!record.to_string().contains("secret"), "{record:#}");
    }
}

#[test]
fn full_target() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--full-target", "--port", &listener.port.to_string()]);
    let mut pair = listener.connect();
    pair.request("GET /short?a=b HTTP/1.1\r\nConnection: close\r\n\r\n");
    pair.respond(ok(""));
    let (server, client) = pair.server_closes_first();
    expect(&tracer.wait_for_close(server, client), &json!({ "http": { "target": "/short?a=b" } }));
    tracer.stop();
}

#[test]
fn many_requests_on_one_connection() {
    const MANY: usize = 500;
    for record in records(|pair| {
        for _ in 0..MANY {
            pair.request(get(""));
            pair.respond(ok(""));
        }
    }) {
        expect(&record, &json!({ "cause": "no_reuse", "http": { "requests": MANY, "responses": MANY } }));
    }
}

/// The map where the programs of a tracer have what they look at. For each processor there are eight windows, of which the first
/// bytes say whether a program has taken it.
struct Windows {
    id: String,
    size: u64,
}

impl Windows {
    fn of(tracer: &Tracer) -> Self {
        let show = |kind: &str, id: &str| bpftool(&[kind, "show", "id", id]);
        let programs = held_by(tracer.pid()).into_iter().filter(|(kind, _)| *kind == "prog");
        let mut programs = programs.map(|(_, id)| show("prog", &id.to_string()));
        let packets = programs.find(|program| program["name"] == "packets").expect("tracer holds its programs");
        let mut maps =
            packets["map_ids"].as_array().expect("it has maps").iter().map(|id| show("map", &id.to_string()));
        let map = maps.find(|map| map["name"] == "WINDOWS").expect("it has windows");
        Self { id: map["id"].to_string(), size: map["bytes_value"].as_u64().expect("a number") }
    }

    /// Takes some, or gives them back, on all processors.
    fn set(&self, which: Range<u8>, taken: bool) {
        let value = vec!["0"; self.size as usize - 1];
        for window in which {
            let (window, first) = (window.to_string(), u8::from(taken).to_string());
            let mut bpftool = Command::new("bpftool");
            bpftool
                .args(["map", "update", "id", &self.id, "key", &window, "0", "0", "0", "value", &first])
                .args(&value);
            run(&mut bpftool);
        }
    }

    /// How many are taken on the first processor.
    fn taken(&self) -> usize {
        let dump = bpftool(&["map", "dump", "id", &self.id]);
        let windows = dump.as_array().expect("it is a list");
        assert_eq!(windows.len(), 8);
        windows.iter().filter(|window| window["values"][0]["value"][0] != "0x00").count()
    }
}

#[test]
fn without_a_window_a_head_is_unobserved() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let windows = Windows::of(&tracer);
    let expect_both = |wanted: &Value| {
        let mut pair = listener.connect();
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        let (server, client) = pair.server_closes_first();
        expect(&tracer.wait_for_close(server, client), wanted);
        expect(&tracer.wait_for_close(client, server), wanted);
    };
    let seen =
        json!({ "cause": "request_close", "http": { "requests": 1, "responses": 1, "request_connection": "close" } });
    expect_both(&seen);
    assert_eq!(windows.taken(), 0);
    // Another one is taken, and given back.
    windows.set(0..2, true);
    expect_both(&seen);
    assert_eq!(windows.taken(), 2);
    windows.set(2..8, true);
    expect_both(&json!({ "cause": "unknown", "protocol": "unobserved", "http": null }));
    assert_eq!(windows.taken(), 8);
    windows.set(0..8, false);
    expect_both(&seen);
    tracer.stop();
}
