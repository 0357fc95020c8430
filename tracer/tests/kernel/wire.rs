//! What the network does to segments: they come twice, late, cut otherwise, or not at all. A head is then either right or
//! `unobserved`: never wrong, and never `absent`.

use std::io::Write as _;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::peer::{ACK, FIN, PSH, Peer, RST, SYN, Segment, URG, Wire, accept, receive, set_option};
use crate::rig::{Namespace, PATIENCE, Tracer, end_of, expect, free_port, get, not_hidden, ok, run, wait_until};

/// Numbers of bytes are small here.
fn len(bytes: impl AsRef<[u8]>) -> i32 {
    i32::try_from(bytes.as_ref().len()).expect("a small number")
}

/// The kernel's end answers and closes first, then the peer, which has sent `sent` bytes.
pub(crate) fn answer_and_close(mut server: TcpStream, peer: &mut Peer<'_>, sent: i32, response: &str) {
    server.write_all(response.as_bytes()).expect("the connection is open");
    peer.receive(response.len());
    peer.acknowledge_at(sent);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.fin(sent);
}

/// The record of the kernel's end.
#[track_caller]
fn record(tracer: &Tracer, peer: &Peer<'_>) -> Value {
    tracer.wait_for_close(peer.host_port, peer.port)
}

/// Fails unless the record's header is the one that was sent, or unobserved.
#[track_caller]
fn right_or_unobserved(record: &Value, header: &str, right: &str) {
    let found = &record["http"][header];
    // With no `http` at all, nothing was claimed.
    assert!(*found == right || *found == "unobserved" || record["http"].is_null(), "{record:#}");
}

const PLAY: [&str; 3] = ["all at once", "each half twice", "all of it twice"];

#[test]
fn a_request_that_comes_twice() {
    let wire = Wire::new("twice");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("X-Filler: some bytes\r\nConnection: close\r\nX-More: yet more bytes\r\n");
    let (response, all) = (ok("Connection: keep-alive\r\n"), len(&request));
    for cut in (1..all).step_by(9) {
        let at = usize::try_from(cut).expect("positive");
        let (head, tail) = request.split_at(at);
        for play in PLAY {
            let (mut server, mut peer) = wire.accepted(&listener);
            match play {
                "all at once" => {
                    peer.data(0, head);
                    peer.data(0, &request);
                }
                "each half twice" => {
                    peer.data(0, head);
                    peer.data(0, head);
                    peer.data(cut, tail);
                    peer.data(cut, tail);
                }
                _ => {
                    peer.data(0, &request);
                    peer.data(0, head);
                    peer.data(0, &request);
                }
            }
            receive(&mut server, request.len());
            answer_and_close(server, &mut peer, all, &response);
            eprintln!("cut after {cut} bytes, {play}");
            expect(
                &record(&tracer, &peer),
                &json!({
                    "rx_bytes": request.len(), "tx_bytes": response.len(),
                    "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "request_close",
                    "http": {
                        "requests": 1, "responses": 1, "request_connection": "close",
                        "response_connection": "keep-alive", "method": "GET", "target": "/path",
                    },
                }),
            );
        }
    }
    tracer.stop();
}

#[test]
fn a_response_that_comes_twice() {
    let wire = Wire::new("twice-r");
    let tracer = Tracer::on_port(wire.port);
    let request = get("");
    let response = ok("X-Filler: some bytes\r\nConnection: close\r\nKeep-Alive: timeout=7\r\n");
    let all = len(&response);
    for cut in (1..response.len()).step_by(9) {
        let (mut client, mut peer) = wire.connected();
        client.write_all(request.as_bytes()).expect("the connection is open");
        peer.receive(request.len());
        // Overlaps by up to 16 bytes on either side of the cut.
        let from = cut.saturating_sub(16);
        peer.data(0, &response[..response.len().min(cut + 16)]);
        peer.data(i32::try_from(from).expect("small"), &response[from..]);
        peer.data(0, &response);
        receive(&mut client, response.len());
        peer.fin(all);
        end_of(&mut client);
        drop(client);
        peer.wait_for("a FIN", |segment| segment.has(FIN));
        peer.acknowledge_at(all + 1);
        eprintln!("cut at {cut}");
        expect(
            &record(&tracer, &peer),
            &json!({
                "rx_bytes": response.len(), "tx_bytes": request.len(), "role": "client",
                "closed_by": "remote", "how": "fin", "final": "closed", "cause": "response_close",
                "http": { "requests": 1, "responses": 1, "response_connection": "close", "keep_alive_timeout_s": 7 },
            }),
        );
    }
    tracer.stop();
}

#[test]
fn a_response_that_is_not_acknowledged() {
    let wire = Wire::new("noack");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let response = ok("X-Filler: some bytes\r\n");
    let (mut server, mut peer) = wire.accepted(&listener);
    peer.data(0, &request);
    receive(&mut server, request.len());
    server.write_all(response.as_bytes()).expect("the connection is open");
    let (first, again) = (peer.ack, |segment: &Segment| !segment.payload.is_empty());
    for _ in 0..3 {
        let segment = peer.wait_for("the response, and its retransmissions", again);
        assert_eq!(segment.seq, first);
    }
    // Half of it is acknowledged, and the rest comes again.
    peer.send(Segment { ack: first.wrapping_add(20), ..peer.at(len(&request)) });
    let rest = peer.wait_for("the rest", again);
    assert_eq!(rest.seq, first.wrapping_add(20));
    peer.acknowledge_at(len(&request));
    drop(server);
    // So does the FIN.
    for _ in 0..2 {
        peer.wait_for("a FIN", |segment| segment.has(FIN));
    }
    peer.fin(len(&request));
    expect(
        &record(&tracer, &peer),
        &json!({
            "rx_bytes": request.len(), "tx_bytes": response.len(), "closed_by": "local", "final": "time_wait",
            "cause": "request_close",
            "http": { "requests": 1, "responses": 1, "response_connection": "absent", "answered": true },
        }),
    );
    tracer.stop();
}

#[test]
fn the_end_of_a_head_comes_first() {
    let wire = Wire::new("order");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("X-Filler: some bytes\r\nConnection: close\r\nX-More: yet more bytes\r\n");
    let (response, all) = (ok(""), len(&request));
    for cut in (1..all).step_by(9) {
        let (head, tail) = request.split_at(usize::try_from(cut).expect("positive"));
        for again in [false, true] {
            let (mut server, mut peer) = wire.accepted(&listener);
            peer.data(cut, tail);
            peer.data(0, head);
            if again {
                peer.data(cut, tail);
            }
            receive(&mut server, request.len());
            answer_and_close(server, &mut peer, all, &response);
            let close = record(&tracer, &peer);
            eprintln!("cut after {cut} bytes, again: {again}");
            expect(&close, &json!({ "rx_bytes": request.len(), "closed_by": "local", "final": "time_wait" }));
            if again {
                expect(&close, &json!({ "cause": "request_close", "http": { "request_connection": "close" } }));
            } else {
                right_or_unobserved(&close, "request_connection", "close");
                assert!(matches!(close["cause"].as_str(), Some("request_close" | "unknown")), "{close:#}");
            }
        }
    }
    tracer.stop();
}

#[test]
fn a_body_that_overtakes_its_head() {
    let wire = Wire::new("body");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let head = "POST /path HTTP/1.1\r\nConnection: close\r\nContent-Length: 3000\r\n\r\n";
    let body = "GET / HTTP/1.1\r\nA: b\r\n\r\n".repeat(125);
    let request = [head, &body].concat();
    let cut = len(head) + 100;
    let part =
        |from: i32, to: i32| &request[usize::try_from(from).expect("positive")..usize::try_from(to).expect("positive")];
    let all = len(&request);
    // Which parts come, in which order: the first one is missing at first.
    for order in [
        &[(cut, all), (0, cut)][..],
        &[(cut, cut + 500), (cut + 500, all), (0, cut)],
        &[(cut + 500, all), (cut, cut + 500), (0, cut)],
    ] {
        let (mut server, mut peer) = wire.accepted(&listener);
        for (from, to) in order {
            for at in (*from..*to).step_by(1400) {
                peer.data(at, part(at, (at + 1400).min(*to)));
            }
        }
        receive(&mut server, request.len());
        answer_and_close(server, &mut peer, all, &ok(""));
        eprintln!("{order:?}");
        expect(
            &record(&tracer, &peer),
            &json!({
                "rx_bytes": request.len(), "closed_by": "local", "final": "time_wait", "cause": "request_close",
                "http": { "requests": 1, "method": "POST", "request_connection": "close", "answered": true },
            }),
        );
    }
    tracer.stop();
}

#[test]
fn a_gap_that_is_never_filled() {
    let wire = Wire::new("gap");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let (request, response) = (get(""), ok(""));
    let second = get("Connection: close\r\n");
    let (mut server, mut peer) = wire.accepted(&listener);
    peer.data(0, &request);
    receive(&mut server, request.len());
    server.write_all(response.as_bytes()).expect("the connection is open");
    peer.receive(response.len());
    // The beginning of a second request is lost for good.
    peer.data(len(&request) + 10, &second[10..]);
    peer.wait_for("an ACK of what came before the gap", |segment| segment.payload.is_empty());
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.rst(len(&request));
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "rx_bytes": request.len(), "http": { "request_connection": "unobserved" } }));
    tracer.stop();
}

#[test]
fn a_fin_behind_a_gap_crosses_ours() {
    let wire = Wire::new("fingap");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let all = len(&request);
    for acknowledges in [false, true] {
        let (server, mut peer) = wire.accepted(&listener);
        peer.data(0, &request[..10]);
        // The peer's FIN arrives, but its last data does not: this end does not know yet.
        let before = peer.at(0);
        peer.fin(all);
        peer.wait_for("an ACK of what came before the gap", |segment| segment.ack == before.seq.wrapping_add(10));
        server.shutdown(Shutdown::Write).expect("the connection is open");
        peer.wait_for("a FIN", |segment| segment.has(FIN));
        let ack = if acknowledges { peer.ack } else { before.ack };
        peer.send(Segment { ack, flags: ACK | PSH | FIN, payload: request[10..].into(), ..peer.at(10) });
        peer.wait_for("the ACK of the peer's FIN", |segment| segment.ack == before.seq.wrapping_add_signed(all + 1));
        peer.acknowledge_at(all + 1);
        // Neither FIN was known to the end that sent the other.
        eprintln!("acknowledges: {acknowledges}");
        expect(
            &record(&tracer, &peer),
            &json!({ "closed_by": "both", "how": "fin", "final": "time_wait", "rx_bytes": request.len() }),
        );
    }
    tracer.stop();
}

/// A connection whose handshake these segments complete, one after the other: parts of the request by where they begin
/// and end. The ACK of the SYN-ACK is lost.
fn handshake_by(of: &str, parts: &[(usize, usize)], wanted: &Value) {
    let wire = Wire::new(of);
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let mut peer = wire.client(port);
    peer.open();
    for (from, to) in parts {
        peer.data(i32::try_from(*from).expect("small"), &request[*from..request.len().min(*to)]);
    }
    let mut server = accept(&listener);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "role": "server", "rx_bytes": request.len(), "closed_by": "local", "final": "time_wait" }));
    expect(&close, wanted);
    tracer.stop();
}

#[test]
fn a_request_that_completes_the_handshake() {
    handshake_by(
        "shake",
        &[(0, 99)],
        &json!({
            "cause": "request_close",
            "http": { "requests": 1, "request_connection": "close", "answered": true },
        }),
    );
}

#[test]
fn a_request_that_completes_the_handshake_comes_twice() {
    handshake_by(
        "shake-twice",
        &[(0, 99), (0, 99)],
        &json!({ "cause": "request_close", "http": { "requests": 1, "request_connection": "close" } }),
    );
}

#[test]
fn a_request_with_a_fin_completes_the_handshake() {
    let wire = Wire::new("shakefin");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let mut peer = wire.client(port);
    peer.open();
    peer.send(Segment { flags: ACK | PSH | FIN, payload: request.clone().into(), ..peer.at(0) });
    let mut server = accept(&listener);
    end_of(&mut server);
    server.write_all(ok("").as_bytes()).expect("only the peer's direction has ended");
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge_at(len(&request) + 1);
    expect(
        &record(&tracer, &peer),
        &json!({
            "role": "server", "closed_by": "remote", "how": "fin", "final": "closed", "cause": "request_close",
            "rx_bytes": request.len(), "http": { "requests": 1, "request_connection": "close", "answered": true },
        }),
    );
    tracer.stop();
}

#[test]
fn the_first_half_of_a_request_completes_the_handshake() {
    handshake_by(
        "shake-half",
        &[(0, 40), (40, 99)],
        &json!({ "cause": "request_close", "http": { "requests": 1, "request_connection": "close" } }),
    );
}

#[test]
fn the_second_half_of_a_request_completes_the_handshake() {
    // What is read first looks like no HTTP at all.
    let wire = Wire::new("shakehalf");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let mut peer = wire.client(port);
    peer.open();
    peer.data(10, &request[10..]);
    peer.data(0, &request[..10]);
    let mut server = accept(&listener);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    let close = record(&tracer, &peer);
    right_or_unobserved(&close, "request_connection", "close");
    assert!(matches!(close["cause"].as_str(), Some("request_close" | "unknown")), "{close:#}");
    tracer.stop();
}

#[test]
fn a_deferred_accept_of_two_halves() {
    let wire = Wire::new("defer");
    let (listener, port) = wire.listen();
    set_option(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 10);
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let mut peer = wire.client(port);
    peer.open();
    // A bare ACK does not complete the handshake then.
    peer.acknowledge();
    peer.data(0, &request[..40]);
    peer.data(40, &request[40..]);
    let mut server = accept(&listener);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    expect(
        &record(&tracer, &peer),
        &json!({
            "role": "server", "closed_by": "local", "final": "time_wait", "cause": "request_close",
            "http": { "requests": 1, "request_connection": "close" },
        }),
    );
    tracer.stop();
}

#[test]
fn a_damaged_segment_is_not_believed() {
    let wire = Wire::new("sum");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request =
        get("X-Filler: so many bytes that the checksum is verified late, after the hook\r\nConnection: close\r\n");
    let damaged = request.replace("Connection: close", "Connection: cloze");
    let (mut server, mut peer) = wire.accepted(&listener);
    // Same length, so what differs is the checksum of the segment that holds it: TCP drops it.
    let mut packet = peer.packet(&Segment { flags: ACK | PSH, payload: request.clone().into(), ..peer.at(0) });
    let at = packet.len() - damaged.len();
    packet[at..].copy_from_slice(damaged.as_bytes());
    peer.write(&packet);
    peer.data(0, &request);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    let close = record(&tracer, &peer);
    right_or_unobserved(&close, "request_connection", "close");
    tracer.stop();
}

/// Segments that TCP refuses, and that do not come again: what they hold was not read by anybody.
#[test]
fn what_tcp_refuses_is_not_believed() {
    let wire = Wire::new("refused");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: keep-alive\r\n");
    let (response, all) = (ok(""), len(&request));
    let invented = "GET /invented HTTP/1.1\r\nConnection: close\r\n\r\n";
    let first = json!({
        "requests": 1, "responses": 1, "request_connection": "keep-alive", "response_connection": "absent", "target": "/path",
    });
    let none = json!({
        "requests": 1, "responses": 1, "request_connection": "unobserved", "response_connection": "unobserved", "target": null,
    });
    let second = json!({ "requests": 2, "responses": 1, "request_connection": "close", "target": "/invented" });
    /// What is done to a request.
    type Change = fn(Segment) -> Segment;
    let no_ack: Change = |good| Segment { flags: PSH, ..good };
    let fin_without_ack: Change = |good| Segment { flags: FIN, payload: Vec::new(), ..good };
    let ack_of_what_was_not_sent: Change = |good| Segment { ack: good.ack.wrapping_add(100_000), ..good };
    let none_at_all: Change = |good| good;
    // Whether TCP takes it; whether the socket has ended when the peer's FIN comes.
    for (n, (change, taken, late, cause, http)) in [
        (no_ack, false, false, "idle_timeout", &first),
        (fin_without_ack, false, false, "idle_timeout", &first),
        (ack_of_what_was_not_sent, false, false, "unknown", &none),
        (ack_of_what_was_not_sent, false, true, "unknown", &none),
        (none_at_all, true, false, "unanswered", &second),
    ]
    .into_iter()
    .enumerate()
    {
        eprintln!("case {n}");
        let (mut server, mut peer) = wire.accepted(&listener);
        peer.data(0, &request);
        receive(&mut server, request.len());
        server.write_all(response.as_bytes()).expect("the connection is open");
        peer.receive(response.len());
        peer.acknowledge_at(all);
        peer.send(change(Segment { payload: invented.into(), flags: ACK | PSH, ..peer.at(all) }));
        let mut sent = all;
        if taken {
            // Unread, it would be answered by a RST.
            receive(&mut server, invented.len());
            sent += len(invented);
        }
        std::thread::sleep(Duration::from_millis(1_200));
        drop(server);
        peer.wait_for("a FIN", |segment| segment.has(FIN));
        if late {
            peer.acknowledge_at(sent);
            std::thread::sleep(Duration::from_millis(300));
        }
        peer.fin(sent);
        expect(
            &record(&tracer, &peer),
            &json!({ "closed_by": "local", "how": "fin", "final": "time_wait", "cause": cause, "http": http }),
        );
    }
    tracer.stop();
}

#[test]
fn what_comes_before_the_handshake_is_not_its_beginning() {
    let wire = Wire::new("early");
    let tracer = Tracer::on_port(wire.port);
    let (request, response) = (get(""), ok("Connection: close\r\n"));
    let (mut client, mut peer) = wire.connecting();
    // A retransmission of an older connection between the same ports, that the peer still believes in.
    let older = Segment { ack: peer.ack.wrapping_sub(1_000_000), ..peer.at(1_000_000) };
    let payload = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".into();
    peer.send(Segment { flags: ACK | PSH | FIN, payload, ..older });
    peer.wait_for("a RST", |segment| segment.has(RST));
    peer.shake(&client);
    client.write_all(request.as_bytes()).expect("the connection is open");
    peer.receive(request.len());
    peer.data(0, &response);
    receive(&mut client, response.len());
    peer.fin(len(&response));
    end_of(&mut client);
    drop(client);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge_at(len(&response) + 1);
    expect(
        &record(&tracer, &peer),
        &json!({
            "closed_by": "remote", "how": "fin", "final": "closed", "cause": "response_close",
            "http": { "requests": 1, "responses": 1, "status": 200, "response_connection": "close" },
        }),
    );
    tracer.stop();
}

#[test]
fn a_reset_with_a_text() {
    let wire = Wire::new("rsttext");
    let tracer = Tracer::on_port(wire.port);
    let request = get("");
    let (mut client, mut peer) = wire.connected();
    client.write_all(request.as_bytes()).expect("the connection is open");
    peer.receive(request.len());
    // RFC 9293, section 3.5.3, allows it; it is no payload.
    peer.send(Segment { flags: ACK | RST, payload: ok("Connection: close\r\n").into(), ..peer.at(0) });
    expect(
        &record(&tracer, &peer),
        &json!({
            "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer", "rx_bytes": 0,
            "http": { "requests": 1, "responses": 0, "status": null, "response_connection": null, "answered": false },
        }),
    );
    tracer.stop();
}

/// Both ends' FINs and the heads are seen behind what stands between IP and TCP, or said to be unobserved.
fn behind(wire: &Wire, between: (u8, Vec<u8>)) {
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("Connection: close\r\n");
    let (mut server, mut peer) = wire.accepted(&listener);
    peer.between = between.clone();
    peer.data(0, &request);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    expect(
        &record(&tracer, &peer),
        &json!({
            "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "request_close",
            "rx_bytes": request.len(), "http": { "requests": 1, "request_connection": "close" },
        }),
    );
    // The peer closes first, and then resets.
    let (server, mut peer) = wire.accepted(&listener);
    peer.between = between.clone();
    peer.fin(0);
    peer.wait_for("the ACK of a FIN", |segment| segment.ack == peer_end(1));
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge_at(1);
    expect(&record(&tracer, &peer), &json!({ "closed_by": "remote", "how": "fin", "final": "closed" }));
    let (server, mut peer) = wire.accepted(&listener);
    peer.between = between.clone();
    peer.rst(0);
    expect(&record(&tracer, &peer), &json!({ "closed_by": "remote", "how": "rst", "cause": "reset_by_peer" }));
    drop(server);
    // The segment with the request completes the handshake.
    let mut peer = wire.client(port);
    peer.between = between;
    peer.open();
    peer.data(0, &request);
    let mut server = accept(&listener);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    expect(&record(&tracer, &peer), &json!({ "cause": "request_close" }));
    tracer.stop();
}

/// The number of the byte `at` of what every peer sends.
fn peer_end(at: i32) -> u32 {
    crate::peer::FIRST.wrapping_add_signed(at)
}

#[test]
fn behind_ip_options() {
    // Router alert, and a record route with no room.
    behind(&Wire::new("ipopt"), (6, vec![0x94, 4, 0, 0, 7, 3, 4, 1]));
}

#[test]
fn behind_hop_by_hop_options() {
    behind(&Wire::v6("hop"), (0, vec![6, 0, 1, 4, 0, 0, 0, 0]));
}

#[test]
fn behind_destination_options() {
    // An option of an experiment, to be ignored by who does not know it (RFC 4727).
    behind(&Wire::v6("dest"), (60, [&[6, 2, 0x1e, 20][..], &[0; 20]].concat()));
}

#[test]
fn behind_several_extension_headers() {
    behind(&Wire::v6("ext"), (0, [&[60, 0, 1, 4, 0, 0, 0, 0, 6, 1, 0x1e, 12][..], &[0; 12]].concat()));
}

#[test]
fn behind_more_extension_headers_than_are_followed() {
    let wire = Wire::v6("unseen");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let (first, second) = (get(""), get("Connection: close\r\n"));
    let header = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
    let hidden = (60, [header(60), header(60), header(60), header(60), header(60), header(6)].concat());
    // Part of a request that nobody sees, or all of it, or the only one.
    for (whole, seen) in [(true, 0), (true, 10), (false, 0)] {
        let (mut server, mut peer) = wire.accepted(&listener);
        let mut at = 0;
        if whole {
            peer.data(0, &first);
            receive(&mut server, first.len());
            server.write_all(ok("").as_bytes()).expect("the connection is open");
            peer.receive(ok("").len());
            at = len(&first);
        }
        if seen > 0 {
            peer.data(at, &second[..seen]);
        }
        peer.between = hidden.clone();
        peer.data(at + i32::try_from(seen).expect("small"), &second[seen..]);
        receive(&mut server, second.len());
        peer.between = (6, Vec::new());
        answer_and_close(server, &mut peer, at + len(&second), &ok(""));
        let close = record(&tracer, &peer);
        expect(
            &close,
            &json!({
                "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "unknown",
                "http": { "request_connection": "unobserved" },
            }),
        );
    }
    tracer.stop();
}

#[test]
fn probes_are_no_payload() {
    let wire = Wire::new("probe");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let (request, response) = (get(""), ok(""));
    // A keep-alive probe of some systems: a byte that was acknowledged long ago, whatever it is.
    let probe = |peer: &mut Peer<'_>, at: i32| {
        let ack = peer.at(at).seq;
        peer.data(at - 1, "G");
        peer.wait_for("the answer to a probe", |segment| segment.ack == ack && segment.payload.is_empty());
    };
    let (server, mut peer) = wire.accepted(&listener);
    probe(&mut peer, 0);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.fin(0);
    expect(
        &record(&tracer, &peer),
        &json!({ "rx_bytes": 0, "protocol": "none", "cause": "unused", "idle_us": null, "closed_by": "local" }),
    );

    let (mut server, mut peer) = wire.accepted(&listener);
    probe(&mut peer, 0);
    peer.data(0, &request);
    receive(&mut server, request.len());
    server.write_all(response.as_bytes()).expect("the connection is open");
    peer.receive(response.len());
    peer.acknowledge_at(len(&request));
    // It is idle for a second, probes or not.
    for _ in 0..3 {
        std::thread::sleep(std::time::Duration::from_millis(400));
        probe(&mut peer, len(&request));
    }
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.fin(len(&request));
    let close = record(&tracer, &peer);
    expect(
        &close,
        &json!({
            "rx_bytes": request.len(), "cause": "idle_timeout",
            "http": { "requests": 1, "request_connection": "absent", "response_connection": "absent" },
        }),
    );
    assert!(close["idle_us"].as_u64().is_some_and(|idle| idle >= 1_000_000), "{close:#}");
    tracer.stop();
}

#[test]
fn a_zero_window_and_its_probes() {
    let wire = Wire::new("zero");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let (request, response) = (get("Connection: close\r\n"), ok("X-Filler: some bytes\r\n"));
    let (mut server, mut peer) = wire.accepted(&listener);
    peer.data(0, &request);
    receive(&mut server, request.len());
    // The peer has no room: the kernel probes, and answers once it has.
    peer.window = 0;
    peer.acknowledge_at(len(&request));
    server.write_all(response.as_bytes()).expect("the connection is open");
    let old = peer.ack.wrapping_sub(1);
    peer.wait_for("a window probe", |segment| segment.seq == old && segment.payload.is_empty());
    // A tiny window, a byte or a few at a time.
    peer.window = 7;
    peer.acknowledge_at(len(&request));
    peer.receive(7);
    peer.window = 65000;
    peer.acknowledge_at(len(&request));
    peer.receive(response.len() - 7);
    peer.acknowledge_at(len(&request));
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.fin(len(&request));
    expect(
        &record(&tracer, &peer),
        &json!({
            "rx_bytes": request.len(), "tx_bytes": response.len(), "cause": "request_close", "final": "time_wait",
            "http": { "responses": 1, "status": 200, "response_connection": "absent", "answered": true },
        }),
    );
    tracer.stop();
}

#[test]
fn a_window_that_the_peer_probes() {
    let wire = Wire::new("fill");
    let (listener, port) = wire.listen();
    // Little room, and nobody reads.
    set_option(&listener, libc::SOL_SOCKET, libc::SO_RCVBUF, 4096);
    let tracer = Tracer::on_port(port);
    let body = "x".repeat(20_000);
    let request = format!("POST /path HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let (mut server, mut peer) = wire.accepted(&listener);
    let mut sent = 0;
    let mut probed = false;
    // One byte of real data into a window of zero, then what fits.
    while sent < request.len() {
        let at = i32::try_from(sent).expect("small");
        let window = if sent == 0 { 1000 } else { peer.window_of_host() };
        if window == 0 {
            peer.data(at, &request[sent..=sent]);
            probed = true;
            let mut some = vec![0; 1 << 16];
            std::io::Read::read(&mut server, &mut some).expect("there is some");
            peer.data(at, &request[sent..=sent]);
        }
        let n = window.min(1000).min(request.len() - sent);
        peer.data(at, &request[sent..sent + n]);
        let behind = peer.at(at).seq.wrapping_add(u32::try_from(n).expect("small"));
        peer.wait_for("an ACK", |segment| segment.ack.wrapping_sub(behind) < 2);
        sent = usize::try_from(peer.acknowledged()).expect("positive");
    }
    assert!(probed, "the window never closed");
    server.set_nonblocking(true).expect("it can be set");
    let _ = std::io::Read::read_to_end(&mut server, &mut Vec::new());
    server.set_nonblocking(false).expect("it can be set");
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    expect(
        &record(&tracer, &peer),
        &json!({
            "rx_bytes": request.len(), "cause": "request_close", "final": "time_wait",
            "http": { "requests": 1, "request_connection": "close", "answered": true },
        }),
    );
    tracer.stop();
}

#[test]
fn urgent_data_and_time_stamps() {
    let wire = Wire::new("urg");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let body = "x".repeat(20);
    let request = format!("POST /path HTTP/1.1\r\nConnection: close\r\nContent-Length: 20\r\n\r\n{body}");
    let (mut server, mut peer) = wire.accepted(&listener);
    set_option(&server, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
    // No-operation twice, a time stamp that was not agreed on.
    peer.options = vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0];
    let payload = request.clone().into();
    peer.send(Segment {
        flags: ACK | PSH | URG,
        urgent: u16::try_from(request.len()).expect("small"),
        payload,
        ..peer.at(0)
    });
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, len(&request), &ok(""));
    expect(
        &record(&tracer, &peer),
        &json!({
            "rx_bytes": request.len(), "cause": "request_close", "final": "time_wait",
            "http": { "requests": 1, "request_connection": "close", "answered": true },
        }),
    );
    tracer.stop();
}

#[test]
fn a_connection_that_both_ends_open() {
    let wire = Wire::new("both");
    let tracer = Tracer::on_port(wire.port);
    let (request, response) = (get("Connection: close\r\n"), ok(""));
    let (mut client, mut peer) = wire.connecting();
    peer.send(Segment { flags: SYN, ..peer.at(-1) });
    peer.wait_for("a SYN-ACK", |segment| segment.has(SYN | ACK));
    // Of an old connection: the RST that answers it is not the end of this one.
    peer.send(Segment { ack: peer.ack.wrapping_add(1000), ..peer.at(0) });
    peer.wait_for("a RST", |segment| segment.has(RST));
    peer.send(Segment { flags: SYN | ACK, ..peer.at(-1) });
    peer.acknowledge();
    client.set_nonblocking(false).expect("it can be set");
    crate::rig::wait_until("the connection", || client.write(b"").is_ok());
    client.write_all(request.as_bytes()).expect("the connection is open");
    peer.receive(request.len());
    peer.data(0, &response);
    receive(&mut client, response.len());
    peer.fin(len(&response));
    end_of(&mut client);
    drop(client);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge_at(len(&response) + 1);
    expect(
        &record(&tracer, &peer),
        &json!({ "role": "client", "closed_by": "remote", "how": "fin", "final": "closed", "cause": "request_close" }),
    );
    tracer.stop();
}

#[test]
fn a_reset_to_an_old_connection_is_not_the_end() {
    let wire = Wire::new("old");
    let tracer = Tracer::on_port(wire.port);
    let (client, mut peer) = wire.connecting();
    // Of a connection that the peer had before, on the same ports.
    peer.send(Segment { ack: peer.ack.wrapping_sub(1000), ..peer.at(-100) });
    peer.wait_for("the RST that answers it", |segment| segment.has(RST));
    peer.wait_for("the SYN once more", |segment| segment.has(SYN));
    peer.rst(0);
    wait_until("the refusal", || client.take_error().expect("it can be asked").is_some());
    drop(client);
    expect(
        &record(&tracer, &peer),
        &json!({
            "role": "client", "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer",
            "process": { "pid": std::process::id(), "source": "connect" },
        }),
    );
    tracer.stop();
}

#[test]
fn segments_on_two_processors_at_once() {
    const CONNECTIONS: usize = 100;
    let wire = Wire::new("cpus");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let request = get("X-Filler: some bytes\r\nConnection: close\r\nX-More: yet more bytes\r\n");
    let mut unobserved = 0;
    for n in 0..CONNECTIONS {
        let cut = 1 + n % (request.len() - 1);
        let (mut server, mut peer) = wire.accepted(&listener);
        let barrier = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                peer.data(0, &request[..cut]);
            });
            barrier.wait();
            peer.data(i32::try_from(cut).expect("small"), &request[cut..]);
        });
        receive(&mut server, request.len());
        answer_and_close(server, &mut peer, len(&request), &ok(""));
        let close = record(&tracer, &peer);
        right_or_unobserved(&close, "request_connection", "close");
        assert!(matches!(close["cause"].as_str(), Some("request_close" | "unknown")), "{close:#}");
        expect(&close, &json!({ "rx_bytes": request.len(), "closed_by": "local", "final": "time_wait" }));
        unobserved += usize::from(close["cause"] == "unknown");
    }
    eprintln!("{unobserved} of {CONNECTIONS} requests unobserved");
    tracer.stop();
}

#[test]
fn a_path_that_loses_packets() {
    const THREADS: usize = 12;
    const EACH: usize = 25;
    let (one, two) = (Namespace::new("lossy-s"), Namespace::new("lossy-c"));
    let (left, right) = (&one.name, &two.name);
    run(Command::new("ip").args(["-n", left, "link", "add", "wire", "type", "veth", "peer", "wire", "netns", right]));
    for (name, address) in [(left, "192.0.2.1/24"), (right, "192.0.2.2/24")] {
        run(Command::new("ip").args(["-n", name, "addr", "add", address, "dev", "wire"]));
        run(Command::new("ip").args(["-n", name, "link", "set", "wire", "up"]));
        // A lost SYN would cost a second; everything else is repeated soon.
        let route = ["-n", name, "route", "change", "192.0.2.0/24", "dev", "wire", "rto_min", "20ms"];
        run(Command::new("ip").args(route));
        let rules = "table inet loss { chain input { type filter hook input priority 0; \
                     tcp flags & syn == 0 numgen random mod 12 == 0 drop; }; }";
        run(Command::new("ip").args(["netns", "exec", name, "nft", rules]));
    }
    let port = free_port();
    let listener = one.enter(|| TcpListener::bind(("192.0.2.1", port)).expect("the namespace is ours"));
    let tracer = Tracer::on_port(port);
    let request = get("X-Filler: some bytes\r\nConnection: close\r\n");
    // More than one segment, so that a loss makes a gap.
    let response =
        format!("HTTP/1.1 200 OK\r\nContent-Length: 9000\r\nKeep-Alive: timeout=7\r\n\r\n{}", "x".repeat(9000));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..EACH {
                    let (mut server, _) = listener.accept().expect("it listens");
                    server.set_read_timeout(Some(*PATIENCE)).expect("it can be set");
                    receive(&mut server, request.len());
                    server.write_all(response.as_bytes()).expect("the connection is open");
                }
            });
            scope.spawn(|| {
                two.enter(|| {
                    for _ in 0..EACH {
                        let mut client = TcpStream::connect(("192.0.2.1", port)).expect("it listens");
                        client.set_read_timeout(Some(*PATIENCE)).expect("it can be set");
                        // In two segments.
                        client.set_nodelay(true).expect("it can be set");
                        client.write_all(&request.as_bytes()[..30]).expect("the connection is open");
                        client.write_all(&request.as_bytes()[30..]).expect("the connection is open");
                        end_of(&mut client);
                    }
                });
            });
        }
    });
    let closes = tracer.wait_for_closes(not_hidden(2 * THREADS * EACH), |_| true);
    let mut unobserved = [0; 2];
    for close in &closes {
        let server = close["role"] == "server";
        let bytes = if server { ("rx_bytes", "tx_bytes") } else { ("tx_bytes", "rx_bytes") };
        expect(close, &json!({ bytes.0: request.len(), bytes.1: response.len(), "how": "fin" }));
        right_or_unobserved(close, "request_connection", "close");
        right_or_unobserved(close, "response_connection", "absent");
        assert!(matches!(close["cause"].as_str(), Some("request_close" | "unknown")), "{close:#}");
        unobserved[usize::from(server)] += usize::from(close["cause"] == "unknown");
        let (by, fate) = if server { ("local", "time_wait") } else { ("remote", "closed") };
        expect(close, &json!({ "closed_by": by }));
        // A late segment, answered by a RST, can end TIME_WAIT before the kernel is asked for it.
        assert!(close["final"] == fate || server && close["final"] == "unknown", "{close:#}");
    }
    eprintln!(
        "of {} requests {} unobserved at the client, {} at the server",
        closes.len() / 2,
        unobserved[0],
        unobserved[1]
    );
    // What this end sends is seen in order; of what arrives most is.
    assert!(unobserved[0] == 0 && unobserved[1] < closes.len() / 4, "{unobserved:?}");
    tracer.stop();
}
