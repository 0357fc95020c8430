//! Other people's servers and clients: the record that each must give, written down field by field.

use std::process::Command;

use serde_json::{Value, json};

use crate::rig::{Tracer, end_of, expect, free_port, port_of, run};
use crate::servers::{self, Client, Server};

const CLOSE: &str = "GET /index.html HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
const KEEP: &str = "GET /index.html HTTP/1.1\r\nHost: test\r\n\r\n";

/// The two records of one connection: the server's, then the client's.
fn both_ends(tracer: &Tracer, server: &Server, client: u16) -> (Value, Value) {
    (tracer.wait_for_close(server.port, client), tracer.wait_for_close(client, server.port))
}

/// One request by hand; the server closes first, the client then.
fn server_closes(server: &Server, request: &str) -> (Value, Value) {
    let tracer = Tracer::on_port(server.port);
    let mut client = Client::connect(server);
    client.exchange(request);
    end_of(&mut client.stream);
    let port = client.port;
    drop(client);
    let ends = both_ends(&tracer, server, port);
    assert_eq!(tracer.stop().closes().len(), 2);
    ends
}

/// Fields that follow from the server having closed first.
fn expect_server_first((at_server, at_client): &(Value, Value), cause: &str) {
    expect(
        at_server,
        &json!({ "role": "server", "closed_by": "local", "how": "fin", "final": "time_wait", "cause": cause }),
    );
    expect(
        at_client,
        &json!({
            "role": "client", "closed_by": "remote", "how": "fin", "final": "closed", "cause": cause,
            "process": { "pid": std::process::id() },
        }),
    );
}

#[test]
fn nginx_with_curl_that_asks_to_close() {
    // Workers run as root here, so that they may read the directory of the test.
    let server = servers::nginx("");
    let tracer = Tracer::on_port(server.port);
    // A client this slow has not read the response when the server closes: who is first is no matter of luck.
    let body = run(Command::new("curl")
        .args(["--silent", "--fail", "--http1.1", "--limit-rate", "64k", "--header", "Connection: close"])
        .arg(format!("http://127.0.0.1:{}/large?query=left-out", server.port)));
    assert_eq!(body.len(), servers::LARGE);
    let at_server = &tracer.wait_for_closes(1, |close| port_of(close, "local") == Some(server.port))[0];
    let at_client = &tracer.wait_for_closes(1, |close| port_of(close, "remote") == Some(server.port))[0];
    let http = json!({
        "requests": 1, "responses": 1, "method": "GET", "target": "/large", "status": 200, "answered": true,
        "request_version": "1.1", "response_version": "1.1",
        "request_connection": "close", "response_connection": "close",
    });
    expect(
        at_server,
        &json!({
            "role": "server", "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "request_close",
            "process": { "comm": "nginx", "source": "read" }, "closer": null, "http": http,
        }),
    );
    let worker = at_server["process"]["pid"].as_u64().expect("a number");
    assert!(server.workers().iter().any(|pid| u64::from(*pid) == worker), "{worker} is no worker");
    expect(
        at_client,
        &json!({
            "role": "client", "closed_by": "remote", "how": "fin", "final": "closed", "cause": "request_close",
            "process": { "comm": "curl" }, "http": http,
        }),
    );
    tracer.stop();
}

#[test]
fn nginx_keepalive_timeout() {
    let server = servers::nginx("keepalive_timeout 1s 1s;");
    let ends = server_closes(&server, KEEP);
    expect_server_first(&ends, "idle_timeout");
    let http = json!({
        "request_connection": "absent", "response_connection": "keep-alive",
        "keep_alive_timeout_s": 1, "keep_alive_max": null,
    });
    for end in [&ends.0, &ends.1] {
        expect(end, &json!({ "http": http }));
        let idle = end["idle_us"].as_u64().expect("a number");
        assert!((900_000..5_000_000).contains(&idle), "{end:#}");
    }
    assert_eq!(ends.0["process"]["comm"], "nginx");
}

#[test]
fn apache_whose_listener_takes_the_request() {
    let server = servers::apache();
    let ends = server_closes(&server, CLOSE);
    expect_server_first(&ends, "request_close");
    // The request's segment completes the handshake: it is the listener's, and must reach its child.
    expect(
        &ends.0,
        &json!({
            "process": { "comm": "apache2" },
            "http": {
                "requests": 1, "responses": 1, "method": "GET", "target": "/index.html", "status": 200,
                "request_connection": "close", "response_connection": "close",
            },
        }),
    );
    let pid = ends.0["process"]["pid"].as_u64().expect("a number");
    assert!(server.workers().iter().any(|worker| u64::from(*worker) == pid), "{pid} is no worker");
}

#[test]
fn apache_keep_alive_timeout() {
    let server = servers::apache();
    // Only a client that names it gets an answer to it.
    let request = "GET /index.html HTTP/1.1\r\nHost: test\r\nConnection: keep-alive\r\n\r\n";
    let ends = server_closes(&server, request);
    expect_server_first(&ends, "idle_timeout");
    expect(
        &ends.0,
        &json!({
            "http": {
                "requests": 1, "request_connection": "keep-alive", "response_connection": "keep-alive",
                "keep_alive_timeout_s": 1, "keep_alive_max": 100,
            },
        }),
    );
}

#[test]
fn python_answers_with_http_1_0() {
    let server = servers::python();
    let ends = server_closes(&server, KEEP);
    expect_server_first(&ends, "http10");
    expect(
        &ends.0,
        &json!({
            "process": { "pid": server.pid(), "comm": server.comm() },
            "http": {
                "request_version": "1.1", "response_version": "1.0", "status": 200,
                "request_connection": "absent", "response_connection": "absent",
            },
        }),
    );
}

#[test]
fn node_keeps_alive_until_its_time_out() {
    let server = servers::node("server.keepAliveTimeout = 1000;");
    let ends = server_closes(&server, KEEP);
    expect_server_first(&ends, "idle_timeout");
    expect(
        &ends.0,
        &json!({
            "process": { "pid": server.pid(), "comm": server.comm(), "source": "read" },
            "http": {
                "request_connection": "absent", "response_connection": "keep-alive", "keep_alive_timeout_s": 1,
            },
        }),
    );
}

#[test]
fn node_closed_by_a_client_that_does_not_reuse() {
    let server = servers::node("");
    let tracer = Tracer::on_port(server.port);
    let mut client = Client::connect(&server);
    client.exchange(KEEP);
    let port = client.port;
    drop(client);
    let (at_server, at_client) = both_ends(&tracer, &server, port);
    expect(
        &at_server,
        &json!({
            "role": "server", "closed_by": "remote", "how": "fin", "final": "closed", "cause": "no_reuse",
            "process": { "pid": server.pid(), "comm": server.comm() },
            "http": { "response_connection": "keep-alive", "keep_alive_timeout_s": 5 },
        }),
    );
    expect(
        &at_client,
        &json!({
            "role": "client", "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "no_reuse",
            "process": { "pid": std::process::id() },
        }),
    );
    tracer.stop();
}

#[test]
fn ab_without_keep_alive() {
    let server = servers::nginx("");
    let tracer = Tracer::on_port(server.port);
    ab(&server, &[]);
    let closes = tracer.wait_for_closes(40, |_| true);
    let http = json!({
        "requests": 1, "responses": 1, "request_version": "1.0", "request_connection": "absent",
        "response_connection": "close",
    });
    for close in &closes {
        let ours = if port_of(close, "local") == Some(server.port) {
            json!({ "role": "server", "closed_by": "local", "final": "time_wait", "process": { "comm": "nginx" } })
        } else {
            json!({ "role": "client", "closed_by": "remote", "final": "closed", "process": { "comm": "ab" } })
        };
        expect(close, &ours);
        expect(close, &json!({ "how": "fin", "cause": "response_close", "protocol": "http/1.0", "http": http }));
    }
    assert_eq!(tracer.stop().closes().len(), 40);
}

#[test]
fn ab_with_keep_alive() {
    let server = servers::nginx("");
    let tracer = Tracer::on_port(server.port);
    ab(&server, &["-k"]);
    // All requests go over one connection, which ab then closes.
    let closes = tracer.wait_for_closes(2, |_| true);
    for close in &closes {
        let ours = if port_of(close, "local") == Some(server.port) {
            json!({ "role": "server", "closed_by": "remote", "final": "closed", "process": { "comm": "nginx" } })
        } else {
            json!({ "role": "client", "closed_by": "local", "final": "time_wait", "process": { "comm": "ab" } })
        };
        expect(close, &ours);
        expect(
            close,
            &json!({
                "how": "fin", "cause": "no_reuse", "protocol": "http/1.0",
                "http": {
                    "requests": 20, "responses": 20, "request_version": "1.0", "response_version": "1.1",
                    "request_connection": "keep-alive", "response_connection": "keep-alive",
                },
            }),
        );
    }
    assert_eq!(tracer.stop().closes().len(), 2);
}

fn ab(server: &Server, args: &[&str]) {
    let out = run(Command::new("ab")
        .args(["-q", "-n", "20", "-c", "1"])
        .args(args)
        .arg(format!("http://127.0.0.1:{}/index.html", server.port)));
    assert!(out.contains("Complete requests:      20"), "{out}");
}

#[test]
fn nothing_of_another_port_is_reported() {
    let server = servers::node("");
    let tracer = Tracer::on_port(free_port());
    let mut client = Client::connect(&server);
    client.exchange(CLOSE);
    end_of(&mut client.stream);
    drop(client);
    assert_eq!(tracer.stop().closes().len(), 0);
}
