//! A peer that has closed, and a process that has not: the leak that no transition tells of.

use std::net::Shutdown;
use std::process::Command;

use serde_json::{Value, json};

use crate::features::{STORAGE_WALK, is_without_storage_walk, lacks};
use crate::rig::{Listener, Namespace, PATIENCE, Tracer, expect, get, is_socket, ok, run};

const AFTER: [&str; 2] = ["--close-wait-after", "300ms"];

fn tracer(listener: &Listener) -> Tracer {
    Tracer::start(&[AFTER.as_slice(), &["--port", &listener.port.to_string()]].concat())
}

fn is_close_wait(event: &Value, local: u16, remote: u16) -> bool {
    event["type"] == "close_wait" && is_socket(event, local, remote)
}

pub(crate) fn wait_for_close_wait(tracer: &Tracer, local: u16, remote: u16) -> Value {
    // Walks over all open files are rationed to a hundredth of a processor, and another test may hold hundreds of thousands.
    let patience = *PATIENCE * if is_without_storage_walk() { 4 } else { 1 };
    tracer.wait_for_at_most(patience, "a close_wait event", |events| {
        events.iter().find(|event| is_close_wait(event, local, remote)).cloned()
    })
}

#[test]
fn a_leak_is_told_once_with_its_owner() {
    let listener = Listener::new();
    let tracer = tracer(&listener);
    let mut pair = listener.connect();
    pair.request(get(""));
    pair.respond(ok(""));
    drop(pair.client);
    let told = wait_for_close_wait(&tracer, pair.server_port, pair.client_port);
    expect(
        &told,
        &json!({
            "role": "server", "closed_by": "remote", "closer": null, "how": null, "cause": "no_reuse",
            "process": { "pid": std::process::id(), "source": "read" },
            "http": { "requests": 1, "responses": 1, "status": 200, "request_connection": "absent" },
        }),
    );
    assert!(told.get("final").is_none() && told.get("final_source").is_none(), "it has not ended: {told:#}");
    let states = told["states"].as_array().expect("states");
    let entered = states.last().filter(|last| last["state"] == "CLOSE_WAIT").expect("CLOSE_WAIT is the last");
    let waited = told["duration_us"].as_i64().expect("µs") - entered["at_us"].as_i64().expect("µs");
    assert!(waited >= 300_000, "told after {waited} µs");

    // Longer than it took to be told the first time: it is not told again.
    std::thread::sleep(std::time::Duration::from_millis(900));
    drop(pair.server);
    let close = tracer.wait_for_close(pair.server_port, pair.client_port);
    expect(&close, &json!({ "cookie": told["cookie"], "final": "closed", "closed_by": "remote", "cause": "no_reuse" }));
    let run = tracer.stop();
    let all: Vec<_> = run.events.iter().filter(|event| event["type"] == "close_wait").collect();
    assert_eq!(all.len(), 1, "{all:#?}");
    assert_eq!(run.summary["close_wait"], 1, "{:#}", run.summary);
}

#[test]
fn neither_open_nor_closed_connections_are_leaks() {
    let listener = Listener::new();
    let tracer = tracer(&listener);
    let (mut open, mut half, closed, leaked) =
        (listener.connect(), listener.connect(), listener.connect(), listener.connect());
    open.request(get(""));
    // This end has closed, the peer has not: that is FIN_WAIT2.
    half.request(get(""));
    half.server.shutdown(Shutdown::Write).expect("it is open");
    closed.client_closes_first();
    drop(leaked.client);
    wait_for_close_wait(&tracer, leaked.server_port, leaked.client_port);
    let run = tracer.stop();
    for event in run.events.iter().filter(|event| event["type"] == "close_wait") {
        // The client of `half` has got a FIN, and has not closed.
        let expected = is_close_wait(event, leaked.server_port, leaked.client_port)
            || is_close_wait(event, half.client_port, half.server_port);
        assert!(expected, "{event:#}");
    }
    drop((open, half, leaked.server));
}

#[test]
fn of_sockets_that_were_open_before_and_in_another_namespace() {
    let namespace = Namespace::new("leak");
    let listener = namespace.enter(Listener::new);
    let pair = namespace.enter(|| {
        let mut pair = listener.connect();
        pair.request(get(""));
        pair
    });
    drop(pair.client);
    let tracer = tracer(&listener);
    let told = wait_for_close_wait(&tracer, pair.server_port, pair.client_port);
    expect(
        &told,
        &json!({
            "netns": namespace.inode(), "started_before": true, "closed_by": "remote",
            "process": { "pid": std::process::id(), "source": "open-files" },
        }),
    );
    tracer.stop();
}

#[test]
fn in_the_accept_queue_nobody_is_named() {
    // No file leads to it.
    if lacks(STORAGE_WALK, !is_without_storage_walk()) {
        return;
    }
    let listener = Listener::new();
    let tracer = tracer(&listener);
    // A client that connects and leaves, while the server does not accept.
    let script = format!("import socket; socket.create_connection(('127.0.0.1', {})).close()", listener.port);
    run(Command::new("python3").args(["-c", &script]));
    let told = tracer
        .wait_for("a close_wait event", |events| events.iter().find(|event| event["type"] == "close_wait").cloned());
    expect(&told, &json!({ "role": "server", "process": null, "closed_by": "remote", "cause": "unused" }));
    drop(listener.accept());
    tracer.stop();
}
