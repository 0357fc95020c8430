//! A close is only half a close until the peer closes too: what becomes of it must be asked of the kernel.

use std::time::Duration;

use serde_json::json;

use crate::rig::{Listener, Pair, Tracer, abort, expect, get, is_socket, ok, states_of};

/// The server has answered and closed, the client has not, and all of that has been seen.
fn half_closed(tracer: &Tracer, listener: &Listener) -> (std::net::TcpStream, u16, u16) {
    let mut pair = listener.connect();
    pair.request(get("Connection: close\r\n"));
    pair.respond(ok("Connection: close\r\n"));
    let Pair { server, client, server_port, client_port } = pair;
    drop(server);
    tracer.wait_for("FIN_WAIT2", |events| {
        let reached = |event| is_socket(event, server_port, client_port) && event["new"] == "FIN_WAIT2";
        events.iter().any(reached).then_some(())
    });
    (client, server_port, client_port)
}

fn has_closed(tracer: &Tracer, local: u16, remote: u16) -> bool {
    tracer.events().iter().any(|event| event["type"] == "close" && is_socket(event, local, remote))
}

#[test]
fn pending_until_the_peer_closes() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--states", "--port", &listener.port.to_string()]);
    let (client, server_port, client_port) = half_closed(&tracer, &listener);
    // Nothing can be waited for: nothing must come.
    std::thread::sleep(Duration::from_millis(500));
    assert!(!has_closed(&tracer, server_port, client_port), "closed while the peer holds its end open");

    drop(client);
    let close = tracer.wait_for_close(server_port, client_port);
    expect(
        &close,
        &json!({
            "role": "server", "closed_by": "local", "how": "fin", "final": "time_wait", "final_source": "sock_diag",
            "cause": "request_close", "process": { "pid": std::process::id() },
        }),
    );
    assert!(states_of(&close).ends_with(&["FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"]), "{close:#}");
    // The transition that the kernel never reports is an event of its own.
    tracer.wait_for("FIN_WAIT2 -> TIME_WAIT", |events| {
        let is_it = |event| {
            is_socket(event, server_port, client_port) && event["old"] == "FIN_WAIT2" && event["new"] == "TIME_WAIT"
        };
        events.iter().any(is_it).then_some(())
    });
    tracer.stop();
}

#[test]
fn a_reset_of_the_peer_leaves_no_time_wait() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--states", "--port", &listener.port.to_string()]);
    let (client, server_port, client_port) = half_closed(&tracer, &listener);
    abort(client);
    let close = tracer.wait_for_close(server_port, client_port);
    expect(&close, &json!({ "role": "server", "closed_by": "local" }));
    assert_ne!(close["final"], "time_wait", "{close:#}");
    assert!(!states_of(&close).contains(&"TIME_WAIT"), "{close:#}");
    tracer.stop();
}

#[test]
fn many_at_once() {
    const MANY: usize = 200;
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let clients: Vec<_> = (0..MANY)
        .map(|_| {
            let mut pair = listener.connect();
            pair.request(get("Connection: close\r\n"));
            pair.respond(ok("Connection: close\r\n"));
            drop(pair.server);
            pair.client
        })
        .collect();
    drop(clients);
    let closes = tracer.wait_for_closes(MANY, |close| close["role"] == "server");
    for close in &closes {
        expect(close, &json!({ "closed_by": "local", "final": "time_wait" }));
    }
    tracer.stop();
}

#[test]
fn pending_ones_are_reported_at_the_end() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--states", "--port", &listener.port.to_string()]);
    let (client, server_port, client_port) = half_closed(&tracer, &listener);
    let run = tracer.stop();
    let close = run.closes().into_iter().find(|close| is_socket(close, server_port, client_port));
    let close = close.expect("a socket that closed is reported, whatever is still unknown of it");
    assert_ne!(close["final"], "time_wait", "{close:#}");
    drop(client);
}
