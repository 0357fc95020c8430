//! Ways to end: half closes, FINs and RSTs that cross, peers that fall silent, sockets that are killed, ports that are used
//! again at once.

use std::io::Write as _;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, bind, connect, socket, sockopt};
use serde_json::{Value, json};

use crate::peer::{ACK, FIN, FIRST, PSH, Peer, RST, SYN, Segment, Wire, receive, set_option};
use crate::rig::{
    Listener, Namespace, Pair, Tracer, abort, end_of, expect, free_port, get, is_socket, ok, run, states_of, wait_until,
};

/// One connection that the peer opened, and its tracer.
fn served<'a>(wire: &'a Wire) -> (Tracer, TcpListener, TcpStream, Peer<'a>) {
    let (listener, port) = wire.listen();
    let tracer = Tracer::start(&["--states", "--port", &port.to_string()]);
    let (server, peer) = wire.accepted(&listener);
    (tracer, listener, server, peer)
}

/// The record of the kernel's end.
#[track_caller]
fn record(tracer: &Tracer, peer: &Peer<'_>) -> Value {
    tracer.wait_for_close(peer.host_port, peer.port)
}

/// Waits until the kernel's end has entered this state.
#[track_caller]
fn wait_for_state(tracer: &Tracer, peer: &Peer<'_>, state: &str) {
    tracer.wait_for(state, |events| {
        let reached = |event| is_socket(event, peer.host_port, peer.port) && event["new"] == state;
        events.iter().any(reached).then_some(())
    });
}

fn len(bytes: impl AsRef<[u8]>) -> i32 {
    i32::try_from(bytes.as_ref().len()).expect("a small number")
}

#[test]
fn a_half_close_and_a_long_answer() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut pair = listener.connect();
    pair.request(get("Connection: close\r\n"));
    pair.client.shutdown(Shutdown::Write).expect("the connection is open");
    end_of(&mut pair.server);
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n";
    pair.respond(head);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(400));
        pair.respond([b'x'; 1000]);
    }
    let (server, client) = pair.server_closes_first();
    let (at_server, at_client) = (tracer.wait_for_close(server, client), tracer.wait_for_close(client, server));
    let wanted = json!({ "how": "fin", "cause": "request_close", "http": { "answered": true, "responses": 1 } });
    let sent = head.len() + 3000;
    expect(&at_client, &wanted);
    expect(
        &at_client,
        &json!({ "closed_by": "local", "final": "time_wait", "final_source": "fin", "rx_bytes": sent, "closer": null }),
    );
    expect(&at_server, &wanted);
    expect(&at_server, &json!({ "closed_by": "remote", "final": "closed", "tx_bytes": sent }));
    for close in [&at_server, &at_client] {
        // Up to the first FIN; what came behind it took a second.
        assert!(close["idle_us"].as_u64().is_some_and(|idle| idle < 1_000_000), "{close:#}");
        assert!(close["duration_us"].as_u64().is_some_and(|lasted| lasted > 1_200_000), "{close:#}");
    }
    tracer.stop();
}

#[test]
fn a_half_close_and_a_long_upload() {
    let wire = Wire::new("half");
    let (tracer, _listener, mut server, mut peer) = served(&wire);
    let body = "x".repeat(400);
    let request = format!("POST /path HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let head = request.len() - body.len();
    peer.data(0, &request[..head]);
    receive(&mut server, head);
    // The server answers and ends its direction before it has read all.
    let response = ok("Connection: close\r\n");
    server.write_all(response.as_bytes()).expect("the connection is open");
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    for at in (head..request.len()).step_by(100) {
        std::thread::sleep(Duration::from_millis(300));
        peer.data(i32::try_from(at).expect("small"), &request[at..at + 100]);
    }
    receive(&mut server, body.len());
    peer.fin(len(&request));
    end_of(&mut server);
    let close = record(&tracer, &peer);
    expect(
        &close,
        &json!({
            "closed_by": "local", "how": "fin", "final": "time_wait", "final_source": "fin", "cause": "response_close",
            "rx_bytes": request.len(), "tx_bytes": response.len(), "http": { "requests": 1, "answered": true },
        }),
    );
    assert!(states_of(&close).ends_with(&["FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"]), "{close:#}");
    assert!(close["idle_us"].as_u64().is_some_and(|idle| idle < 1_000_000), "{close:#}");
    tracer.stop();
}

#[test]
fn fins_that_cross() {
    let wire = Wire::new("cross");
    let (tracer, listener, server, mut peer) = served(&wire);
    let before = peer.at(0);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.send(Segment { flags: ACK | FIN, ..before });
    peer.wait_for("the ACK of the peer's FIN", |segment| segment.ack == FIRST.wrapping_add(1));
    wait_for_state(&tracer, &peer, "CLOSING");
    peer.acknowledge_at(1);
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "both", "how": "fin", "final": "time_wait", "final_source": "fin" }));
    assert!(states_of(&close).ends_with(&["FIN_WAIT1", "CLOSING", "TIME_WAIT"]), "{close:#}");

    // With data that nobody has acknowledged in front of each.
    let (mut server, mut peer) = wire.accepted(&listener);
    let before = peer.at(0);
    let (request, response) = (get("Connection: close\r\n"), ok(""));
    server.write_all(response.as_bytes()).expect("the connection is open");
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.send(Segment { flags: ACK | PSH | FIN, payload: request.clone().into(), ..before });
    wait_for_state(&tracer, &peer, "CLOSING");
    receive(&mut server, request.len());
    peer.acknowledge_at(len(&request) + 1);
    expect(
        &record(&tracer, &peer),
        &json!({
            "closed_by": "both", "how": "fin", "final": "time_wait", "rx_bytes": request.len(),
            "tx_bytes": response.len(),
        }),
    );
    tracer.stop();
}

#[test]
fn a_fin_in_answer_to_ours() {
    let wire = Wire::new("answer");
    let (tracer, _listener, server, mut peer) = served(&wire);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    // One segment acknowledges ours and ends the other direction.
    peer.fin(0);
    peer.wait_for("the ACK of the peer's FIN", |segment| segment.ack == FIRST.wrapping_add(1));
    expect(&record(&tracer, &peer), &json!({ "closed_by": "local", "how": "fin", "final": "time_wait" }));
    tracer.stop();
}

#[test]
fn a_fin_that_crosses_a_reset() {
    let wire = Wire::new("crossrst");
    let (tracer, listener, server, mut peer) = served(&wire);
    // Ours was first, as this end sees it.
    let before = peer.at(0);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.send(Segment { flags: ACK | RST, ..before });
    expect(
        &record(&tracer, &peer),
        &json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_peer" }),
    );
    // The peer's was.
    let (server, peer) = wire.accepted(&listener);
    peer.fin(0);
    wait_for_state(&tracer, &peer, "CLOSE_WAIT");
    abort(server);
    expect(
        &record(&tracer, &peer),
        &json!({ "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_local" }),
    );
    tracer.stop();
}

#[test]
fn a_reset_after_shutdown() {
    let wire = Wire::new("shutrst");
    let (tracer, listener, server, mut peer) = served(&wire);
    let wanted = json!({
        "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_local",
        "process": { "pid": std::process::id() }, "closer": null,
    });
    // In FIN_WAIT1.
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    abort(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    expect(&record(&tracer, &peer), &wanted);
    // In FIN_WAIT2.
    let (server, mut peer) = wire.accepted(&listener);
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    abort(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    expect(&record(&tracer, &peer), &wanted);
    // In FIN_WAIT2, by data that is not read.
    let (server, mut peer) = wire.accepted(&listener);
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.data(0, "unread");
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    server.peek(&mut [0]).expect("it came");
    drop(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    expect(&record(&tracer, &peer), &wanted);
    // In LAST_ACK.
    let (server, mut peer) = wire.accepted(&listener);
    peer.fin(0);
    wait_for_state(&tracer, &peer, "CLOSE_WAIT");
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    abort(server);
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "remote" }));
    assert!(close["final"] != "time_wait" && close["how"] != "timeout", "{close:#}");
    tracer.stop();
}

#[test]
fn a_negative_linger2() {
    let wire = Wire::new("linger2");
    let (tracer, listener, server, mut peer) = served(&wire);
    // No FIN_WAIT2 for who has closed: the ACK of our FIN is answered by a RST.
    set_option(&server, libc::IPPROTO_TCP, libc::TCP_LINGER2, -1);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    peer.wait_for("a RST", |segment| segment.has(RST));
    let wanted = json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_local" });
    expect(&record(&tracer, &peer), &wanted);
    // The same, where the ACK comes before `close`.
    let (server, mut peer) = wire.accepted(&listener);
    set_option(&server, libc::IPPROTO_TCP, libc::TCP_LINGER2, -1);
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    drop(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    expect(&record(&tracer, &peer), &wanted);
    tracer.stop();
}

/// `ss -K`, which must find the socket.
fn kill(wire: &Wire, peer: &Peer<'_>) {
    let (host_port, port) = (format!(":{}", peer.host_port), format!(":{}", peer.port));
    let filter = ["-K", "-t", "-a", "-H", "sport", "=", &host_port, "dport", "=", &port];
    let killed = run(Command::new("ip").args(["netns", "exec", &wire.namespace.name, "ss"]).args(filter));
    assert!(!killed.trim().is_empty(), "no such socket");
}

#[test]
fn killed_in_each_state() {
    let wire = Wire::new("kill");
    let (tracer, listener, server, peer) = served(&wire);
    let reset = json!({ "how": "rst", "final": "reset", "cause": "reset_by_local" });
    kill(&wire, &peer);
    let close = record(&tracer, &peer);
    expect(&close, &reset);
    expect(&close, &json!({ "closed_by": "local", "closer": { "comm": "ss" } }));
    drop(server);

    let (server, peer) = wire.accepted(&listener);
    peer.fin(0);
    wait_for_state(&tracer, &peer, "CLOSE_WAIT");
    kill(&wire, &peer);
    let close = record(&tracer, &peer);
    expect(&close, &reset);
    expect(&close, &json!({ "closed_by": "remote" }));
    drop(server);

    // FIN_WAIT1 and FIN_WAIT2 of a process, FIN_WAIT1 of nobody.
    for (acknowledged, orphan) in [(false, false), (true, false), (false, true)] {
        let (server, mut peer) = wire.accepted(&listener);
        server.shutdown(Shutdown::Write).expect("the connection is open");
        peer.wait_for("a FIN", |segment| segment.has(FIN));
        if acknowledged {
            peer.acknowledge();
            wait_for_state(&tracer, &peer, "FIN_WAIT2");
        }
        let server = (!orphan).then_some(server);
        kill(&wire, &peer);
        let close = record(&tracer, &peer);
        eprintln!("acknowledged: {acknowledged}, orphan: {orphan}");
        expect(&close, &reset);
        expect(&close, &json!({ "closed_by": "local" }));
        drop(server);
    }

    // A mini-socket goes in silence.
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    kill(&wire, &peer);
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "local", "how": "fin" }));
    assert!(matches!(close["final"].as_str(), Some("reset" | "unknown")), "{close:#}");

    tracer.stop();

    // In SYN_SENT nothing is sent.
    let tracer = Tracer::on_port(wire.port);
    let (client, peer) = wire.connecting();
    kill(&wire, &peer);
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "none", "how": null, "final": "closed", "role": "client" }));
    drop(client);

    // In SYN_RECV, where a RST that answers a segment is not the end, this one is.
    let (client, mut peer) = wire.connecting();
    peer.send(Segment { flags: SYN, ..peer.at(-1) });
    peer.wait_for("a SYN-ACK", |segment| segment.has(SYN | ACK));
    kill(&wire, &peer);
    let close = record(&tracer, &peer);
    expect(&close, &reset);
    expect(&close, &json!({ "closed_by": "local", "closer": { "comm": "ss" }, "role": "client" }));
    drop(client);
    tracer.stop();
}

#[test]
fn an_old_error_is_no_timeout() {
    const IP_RECVERR: i32 = 11;
    const HOST_UNREACHABLE: u8 = 1;
    let wire = Wire::new("recverr");
    let (tracer, listener, server, peer) = served(&wire);
    drop((server, peer));
    let wanted = json!({ "how": "rst", "final": "reset", "cause": "reset_by_local", "closer": null });
    let err = |server: &TcpStream, peer: &Peer<'_>| {
        set_option(server, libc::IPPROTO_IP, IP_RECVERR, 1);
        peer.unreachable(HOST_UNREACHABLE);
        // It is pending: whoever asks takes it away, so nobody asks. TCP answers the next segment after it.
    };
    // Unread data.
    let (server, mut peer) = wire.accepted(&listener);
    err(&server, &peer);
    peer.data(0, "unread");
    peer.wait_for("an ACK", |segment| segment.ack == FIRST.wrapping_add(6));
    drop(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    let close = record(&tracer, &peer);
    expect(&close, &wanted);
    expect(&close, &json!({ "closed_by": "local", "process": { "pid": std::process::id() } }));
    // After the peer's FIN.
    let (server, mut peer) = wire.accepted(&listener);
    err(&server, &peer);
    peer.data(0, "unread");
    peer.fin(6);
    wait_for_state(&tracer, &peer, "CLOSE_WAIT");
    drop(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    let close = record(&tracer, &peer);
    expect(&close, &wanted);
    expect(&close, &json!({ "closed_by": "remote" }));
    // After our own.
    let (server, mut peer) = wire.accepted(&listener);
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.ack = peer.ack.wrapping_sub(1);
    err(&server, &peer);
    peer.data(0, "unread");
    peer.wait_for("an ACK", |segment| segment.ack == FIRST.wrapping_add(6));
    abort(server);
    peer.wait_for("a RST", |segment| segment.has(RST));
    let close = record(&tracer, &peer);
    expect(&close, &wanted);
    expect(&close, &json!({ "closed_by": "local" }));
    // A plain close has its usual end.
    let (server, mut peer) = wire.accepted(&listener);
    err(&server, &peer);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.fin(0);
    expect(&record(&tracer, &peer), &json!({ "closed_by": "local", "how": "fin", "final": "time_wait" }));
    tracer.stop();
}

/// The record of a connection whose peer no longer answers.
#[track_caller]
fn expect_timeout(tracer: &Tracer, peer: &Peer<'_>, closed_by: &str) {
    expect(
        &record(tracer, peer),
        &json!({ "how": "timeout", "final": "timed_out", "cause": "timeout", "closed_by": closed_by }),
    );
}

#[test]
fn no_answer_to_keep_alive_probes() {
    let wire = Wire::new("alive");
    let (tracer, listener, server, peer) = served(&wire);
    let probe = |server: &TcpStream| {
        sockopt::set_socket_keepalive(server, true).expect("it can be set");
        for name in [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL, libc::TCP_KEEPCNT] {
            set_option(server, libc::IPPROTO_TCP, name, 1);
        }
    };
    probe(&server);
    // The kernel gives up with a RST.
    expect_timeout(&tracer, &peer, "local");
    // What a router said once does not change that.
    let (server, peer) = wire.accepted(&listener);
    peer.unreachable(1);
    probe(&server);
    expect_timeout(&tracer, &peer, "local");
    drop(server);
    tracer.stop();
}

#[test]
fn no_answer_to_data() {
    let wire = Wire::new("usertime");
    let (tracer, _listener, mut server, peer) = served(&wire);
    set_option(&server, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 500);
    server.write_all(ok("").as_bytes()).expect("the connection is open");
    expect_timeout(&tracer, &peer, "none");
    tracer.stop();
}

#[test]
fn no_answer_to_a_fin() {
    let wire = Wire::new("fintime");
    wire.sysctl("ipv4/tcp_orphan_retries", "1");
    wire.sysctl("ipv4/tcp_retries2", "1");
    let (tracer, listener, server, peer) = served(&wire);
    // In FIN_WAIT1, with and without a process that still has the socket.
    drop(server);
    let (server, held) = wire.accepted(&listener);
    server.shutdown(Shutdown::Write).expect("the connection is open");
    // In LAST_ACK.
    let (passive, second) = wire.accepted(&listener);
    second.fin(0);
    wait_for_state(&tracer, &second, "CLOSE_WAIT");
    drop(passive);
    // In CLOSING.
    let (closing, mut both) = wire.accepted(&listener);
    let before = both.at(0);
    drop(closing);
    both.wait_for("a FIN", |segment| segment.has(FIN));
    both.send(Segment { flags: ACK | FIN, ..before });
    expect_timeout(&tracer, &peer, "local");
    expect_timeout(&tracer, &held, "local");
    expect_timeout(&tracer, &second, "remote");
    expect_timeout(&tracer, &both, "both");
    tracer.stop();
}

#[test]
fn no_answer_to_a_syn() {
    let wire = Wire::new("syntime");
    wire.sysctl("ipv4/tcp_syn_retries", "1");
    let tracer = Tracer::on_port(wire.port);
    let (client, peer) = wire.connecting();
    let close = record(&tracer, &peer);
    expect(
        &close,
        &json!({
            "role": "client", "closed_by": "none", "how": "timeout", "final": "timed_out", "cause": "timeout",
            "process": { "pid": std::process::id() },
        }),
    );
    drop(client);
    // A router says that there is no such host: that ends it, and was no time-out.
    let (client, mut peer) = wire.connecting();
    // It speaks of the SYN.
    peer.ack = peer.ack.wrapping_sub(1);
    peer.unreachable(1);
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "role": "client", "closed_by": "none", "how": null, "final": "closed" }));
    drop(client);
    tracer.stop();
}

#[test]
fn resets_that_tcp_ignores() {
    let wire = Wire::new("rstseq");
    let (tracer, listener, server, mut peer) = served(&wire);
    // Out of the window, before it, and in it but not at its beginning.
    for at in [1_000_000, -1000, 1000] {
        peer.rst(at);
    }
    peer.wait_for("a challenge ACK", |segment| segment.has(ACK) && !segment.has(RST));
    let request = get("Connection: close\r\n");
    peer.data(0, &request);
    let mut server = server;
    receive(&mut server, request.len());
    let response = ok("");
    server.write_all(response.as_bytes()).expect("the connection is open");
    peer.receive(response.len());
    peer.rst(-1000);
    drop(server);
    peer.wait_for("a FIN", |segment| segment.has(FIN));
    peer.rst(1_000_000);
    peer.fin(len(&request));
    expect(
        &record(&tracer, &peer),
        &json!({ "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "request_close" }),
    );
    // A FIN out of the window is none.
    let (server, mut peer) = wire.accepted(&listener);
    for at in [1_000_000, -1000] {
        peer.fin(at);
    }
    peer.wait_for("an ACK", |segment| segment.payload.is_empty());
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.fin(0);
    expect(&record(&tracer, &peer), &json!({ "closed_by": "local", "how": "fin", "final": "time_wait" }));
    // After a challenge, one with the right number.
    let (server, mut peer) = wire.accepted(&listener);
    peer.rst(1000);
    peer.wait_for("a challenge ACK", |segment| segment.has(ACK));
    peer.rst(0);
    let reset = json!({ "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer" });
    expect(&record(&tracer, &peer), &reset);
    drop(server);
    // An ignored one, and then data after `close`: the RST is ours.
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    let ack = peer.ack.wrapping_sub(1);
    peer.rst(1_000_000);
    peer.send(Segment { ack, flags: ACK | PSH, payload: "late".into(), ..peer.at(0) });
    peer.wait_for("a RST", |segment| segment.has(RST));
    expect(
        &record(&tracer, &peer),
        &json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_local" }),
    );
    tracer.stop();
}

#[test]
fn a_reset_in_each_state() {
    let wire = Wire::new("rststate");
    let (tracer, listener, server, peer) = served(&wire);
    let reset = |peer: &Peer<'_>, by: &str| {
        expect(
            &record(&tracer, peer),
            &json!({ "closed_by": by, "how": "rst", "final": "reset", "cause": "reset_by_peer" }),
        );
    };
    // ESTABLISHED
    peer.rst(0);
    reset(&peer, "remote");
    drop(server);
    // CLOSE_WAIT
    let (server, peer) = wire.accepted(&listener);
    peer.fin(0);
    wait_for_state(&tracer, &peer, "CLOSE_WAIT");
    peer.rst(1);
    reset(&peer, "remote");
    drop(server);
    // LAST_ACK
    let (server, mut peer) = wire.accepted(&listener);
    peer.fin(0);
    wait_for_state(&tracer, &peer, "CLOSE_WAIT");
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.rst(1);
    reset(&peer, "remote");
    // FIN_WAIT1
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.rst(0);
    reset(&peer, "local");
    // CLOSING
    let (server, mut peer) = wire.accepted(&listener);
    let before = peer.at(0);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.send(Segment { flags: ACK | FIN, ..before });
    wait_for_state(&tracer, &peer, "CLOSING");
    peer.rst(1);
    reset(&peer, "both");
    // FIN_WAIT2, with a socket of full size.
    let (server, mut peer) = wire.accepted(&listener);
    server.shutdown(Shutdown::Write).expect("the connection is open");
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    peer.rst(0);
    reset(&peer, "local");
    drop(server);
    // FIN_WAIT2, with a mini-socket: no hook sees that, so what is known is that it went before its time.
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    peer.rst(0);
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "local", "how": "fin" }));
    assert!(matches!(close["final"].as_str(), Some("reset" | "unknown")), "{close:#}");
    // TIME_WAIT: it was there.
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.fin(0);
    peer.wait_for("the ACK of the peer's FIN", |segment| segment.ack == FIRST.wrapping_add(1));
    peer.rst(1);
    expect(&record(&tracer, &peer), &json!({ "closed_by": "local", "how": "fin", "final": "time_wait" }));
    tracer.stop();
}

#[test]
fn a_reset_in_answer_to_a_syn() {
    let wire = Wire::new("refused");
    let tracer = Tracer::on_port(wire.port);
    let (client, mut peer) = wire.connecting();
    // One that does not acknowledge the SYN is ignored.
    let ack = peer.ack;
    peer.ack = ack.wrapping_sub(1000);
    peer.rst(0);
    peer.ack = ack;
    peer.rst(0);
    expect(
        &record(&tracer, &peer),
        &json!({ "role": "client", "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer" }),
    );
    drop(client);
    // Ignored, and then accepted.
    let (mut client, mut peer) = wire.connecting();
    let ack = peer.ack;
    peer.ack = ack.wrapping_sub(1000);
    peer.rst(0);
    peer.ack = ack;
    peer.shake(&client);
    client.write_all(b"x").expect("the connection is open");
    peer.receive(1);
    peer.acknowledge();
    drop(client);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.fin(0);
    expect(&record(&tracer, &peer), &json!({ "closed_by": "local", "how": "fin", "final": "time_wait" }));
    tracer.stop();
}

#[test]
fn data_after_the_peer_has_closed() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut pair = listener.connect();
    pair.request(get("Connection: close\r\n"));
    let Pair { mut server, client, server_port, client_port } = pair;
    drop(client);
    end_of(&mut server);
    // The client is gone: its kernel answers with a RST.
    server.write_all(ok("").as_bytes()).expect("only the client's direction has ended");
    let at_server = tracer.wait_for_close(server_port, client_port);
    expect(&at_server, &json!({ "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer" }));
    let at_client = tracer.wait_for_close(client_port, server_port);
    expect(&at_client, &json!({ "closed_by": "local" }));
    assert!(matches!(at_client["final"].as_str(), Some("reset" | "unknown")), "{at_client:#}");
    tracer.stop();
}

#[test]
fn data_after_our_close() {
    let wire = Wire::new("late");
    let (tracer, listener, server, mut peer) = served(&wire);
    let wanted = json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_local" });
    // In FIN_WAIT1: the FIN is not acknowledged.
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    let ack = peer.ack.wrapping_sub(1);
    peer.send(Segment { ack, flags: ACK | PSH, payload: "late".into(), ..peer.at(0) });
    peer.wait_for("a RST", |segment| segment.has(RST));
    expect(&record(&tracer, &peer), &wanted);
    // By the segment that acknowledges it.
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.data(0, "late");
    peer.wait_for("a RST", |segment| segment.has(RST));
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "local" }));
    assert!(close["final"] != "time_wait" && close["how"] != "timeout", "{close:#}");
    // To the mini-socket, which no hook sees.
    let (server, mut peer) = wire.accepted(&listener);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.acknowledge();
    wait_for_state(&tracer, &peer, "FIN_WAIT2");
    peer.data(0, "late");
    peer.wait_for("a RST", |segment| segment.has(RST));
    let close = record(&tracer, &peer);
    expect(&close, &json!({ "closed_by": "local", "how": "fin" }));
    assert!(matches!(close["final"].as_str(), Some("reset" | "unknown")), "{close:#}");
    tracer.stop();
}

#[test]
fn a_syn_takes_the_place_of_time_wait() {
    let wire = Wire::new("again");
    let (tracer, listener, server, mut peer) = served(&wire);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.fin(0);
    peer.wait_for("the ACK of the peer's FIN", |segment| segment.ack == FIRST.wrapping_add(1));
    let first = record(&tracer, &peer);
    expect(&first, &json!({ "closed_by": "local", "final": "time_wait", "cause": "unused" }));
    // The same ports, a higher sequence number.
    const LATER: i32 = 100_000;
    peer.send(Segment { flags: SYN, ..peer.at(LATER - 1) });
    let answer = peer.wait_for("a SYN-ACK", |segment| segment.has(SYN | ACK));
    peer.ack = answer.seq.wrapping_add(1);
    let request = get("Connection: close\r\n");
    peer.data(LATER, &request);
    let mut server = crate::peer::accept(&listener);
    receive(&mut server, request.len());
    peer.fin(LATER + len(&request));
    end_of(&mut server);
    drop(server);
    peer.wait_for("our FIN", |segment| segment.has(FIN));
    peer.acknowledge_at(LATER + len(&request) + 1);
    let both = tracer.wait_for_closes(2, |close| is_socket(close, peer.host_port, peer.port));
    assert_ne!(both[0]["cookie"], both[1]["cookie"]);
    expect(
        &both[1],
        &json!({
            "closed_by": "remote", "how": "fin", "final": "closed", "cause": "unanswered", "rx_bytes": request.len(),
            "http": { "requests": 1, "request_connection": "close" },
        }),
    );
    tracer.stop();
}

#[test]
fn a_client_takes_the_place_of_time_wait() {
    let namespace = Namespace::new("reuse");
    namespace.enter(|| std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1").expect("we are root"));
    let listener = namespace.enter(Listener::new);
    let (server_port, client_port) = (listener.port, free_port());
    let tracer = Tracer::on_port(server_port);
    for n in 0..2 {
        let client = namespace.enter(|| {
            let mut client = None;
            // The second one is let in once the first one's time stamp is a second old.
            wait_until("a connection from a port that is in TIME_WAIT", || {
                let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("TCP is there");
                sockopt::set_socket_reuseaddr(&socket, true).expect("it can be set");
                bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, client_port))).expect("nobody listens there");
                let connected = connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, server_port)));
                client = connected.ok().map(|()| TcpStream::from(socket));
                client.is_some()
            });
            client.expect("just seen")
        });
        let (server, peer) = listener.accept();
        assert_eq!(peer, client_port);
        let mut pair = Pair { server, client, server_port, client_port };
        if n == 1 {
            pair.request(get("Connection: close\r\n"));
            pair.respond(ok(""));
        }
        pair.client_closes_first();
        // Once its place is taken, nobody can be asked for it.
        tracer
            .wait_for_closes(n + 1, |close| is_socket(close, client_port, server_port) && close["closed_by"] != "none");
    }
    for (local, remote, by, fate) in
        [(client_port, server_port, "local", "time_wait"), (server_port, client_port, "remote", "closed")]
    {
        let wanted = |close: &Value| is_socket(close, local, remote) && close["closed_by"] != "none";
        let mut both = tracer.wait_for_closes(2, wanted);
        // What has to be asked for comes late.
        both.sort_by_key(|close| close["time"].as_str().map(str::to_owned));
        assert_ne!(both[0]["cookie"], both[1]["cookie"]);
        for (close, cause) in both.iter().zip(["unused", "request_close"]) {
            expect(close, &json!({ "closed_by": by, "how": "fin", "final": fate, "cause": cause }));
        }
    }
    tracer.stop();
}
