//! Connections that are older than the tracer: what is known of them, and what is not claimed.

use std::net::Shutdown;

use serde_json::json;

use crate::rig::{Listener, Tracer, end_of, expect, get, ok};

#[test]
fn half_closed_before_the_start() {
    let listener = Listener::new();
    let mut pair = listener.connect();
    pair.request(get(""));
    pair.respond(ok(""));
    pair.client.shutdown(Shutdown::Write).expect("open");
    end_of(&mut pair.server);

    let tracer = Tracer::on_port(listener.port);
    let (server, client) = (pair.server_port, pair.client_port);
    drop(pair.server);
    end_of(&mut pair.client);
    drop(pair.client);
    let me = json!({ "started_before": true, "process": { "pid": std::process::id() }, "idle_us": null });
    let at_server = tracer.wait_for_close(server, client);
    expect(&at_server, &me);
    // The client's FIN came before the server's, and before the tracer.
    expect(&at_server, &json!({ "closed_by": "remote", "how": "fin", "final": "closed", "cause": "unknown" }));
    assert!(at_server["http"].is_null(), "heads from before the start were not seen: {at_server:#}");
    let at_client = tracer.wait_for_close(client, server);
    expect(&at_client, &me);
    expect(&at_client, &json!({ "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "unknown" }));
}

#[test]
fn the_next_exchange_is_seen() {
    let listener = Listener::new();
    let mut pair = listener.connect();
    pair.request(get(""));
    pair.respond(ok(""));

    let tracer = Tracer::on_port(listener.port);
    pair.request(get("Connection: close\r\n"));
    pair.respond(ok("Connection: close\r\n"));
    let (server, client) = pair.server_closes_first();
    let at_server = tracer.wait_for_close(server, client);
    expect(
        &at_server,
        &json!({
            "started_before": true, "role": "server", "closed_by": "local", "final": "time_wait", "cause": "request_close",
            "http": { "requests": 1, "request_connection": "close", "response_connection": "close" },
        }),
    );
    // Bytes are the socket's own count: of both exchanges.
    assert_eq!(at_server["rx_bytes"], get("").len() * 2 + "Connection: close\r\n".len());
    expect(&tracer.wait_for_close(client, server), &json!({ "role": "client", "cause": "request_close" }));
}

#[test]
fn nothing_is_claimed_of_a_body_that_was_on_its_way() {
    let listener = Listener::new();
    let mut pair = listener.connect();
    pair.request("POST / HTTP/1.1\r\nContent-Length: 40\r\n\r\n0123456789");

    let tracer = Tracer::on_port(listener.port);
    pair.request("Connection: close\r\n\r\n0123456789");
    pair.respond(ok(""));
    let (server, client) = pair.server_closes_first();
    for (local, remote) in [(server, client), (client, server)] {
        let close = tracer.wait_for_close(local, remote);
        expect(&close, &json!({ "started_before": true, "protocol": "unobserved", "cause": "unknown" }));
    }
}
