//! The classic case: a Go client with `DisableKeepAlives` and a Go server that obeys it.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::rig::{Guard, Tracer, expect, port_of, run, states_of};
use crate::servers::{go, go_programs};

const REQUESTS: usize = 20;

#[test]
fn the_server_closes_first_because_the_client_asked() {
    let server = go();
    let tracer = Tracer::on_port(server.port);
    let mut client = Guard(
        Command::new(go_programs().join("go-client"))
            .arg(format!("http://127.0.0.1:{}/hello?secret=1", server.port))
            .arg(REQUESTS.to_string())
            .stdin(Stdio::null())
            .spawn()
            .expect("the client starts"),
    );
    let client_pid = client.id();
    assert!(client.wait().success());

    let closes = tracer.wait_for_closes(2 * REQUESTS, |_| true);
    let (at_server, at_client): (Vec<_>, Vec<_>) =
        closes.iter().partition(|close| port_of(close, "local") == Some(server.port));
    let http = json!({
        "requests": 1, "responses": 1, "method": "GET", "target": "/hello", "target_truncated": false, "status": 200,
        "request_version": "1.1", "response_version": "1.1",
        "request_connection": "close", "response_connection": "close", "answered": true,
    });
    assert_eq!(at_server.len(), REQUESTS);
    for close in &at_server {
        expect(
            close,
            &json!({
                "role": "server", "family": "ipv4", "closed_by": "local", "how": "fin", "final": "time_wait",
                "cause": "request_close", "protocol": "http/1.1", "started_before": false, "closer": null,
                "process": { "pid": server.pid(), "comm": "go-server", "uid": 0, "source": "read" },
                "http": http,
            }),
        );
        assert!(states_of(close).ends_with(&["FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"]), "{close:#}");
    }
    assert_eq!(at_client.len(), REQUESTS);
    for close in &at_client {
        expect(
            close,
            &json!({
                "role": "client", "family": "ipv4", "closed_by": "remote", "how": "fin", "final": "closed",
                "cause": "request_close", "protocol": "http/1.1", "started_before": false, "closer": null,
                "process": { "pid": client_pid, "comm": "go-client", "uid": 0 },
                "http": http,
            }),
        );
    }

    // What the kernel lists is what was reported, tuple by tuple.
    let tuple = |close: &&Value| {
        format!("{} {}", close["local"].as_str().unwrap_or(""), close["remote"].as_str().unwrap_or(""))
    };
    let reported: BTreeSet<_> = at_server.iter().map(tuple).collect();
    assert_eq!(listed_in_time_wait(server.port), reported);

    let run = tracer.stop();
    assert_eq!(run.closes().len(), 2 * REQUESTS);
    expect(&run.summary, &json!({ "closes": 2 * REQUESTS, "time_wait": REQUESTS, "lost": 0 }));
    expect(&run.summary["groups"][0], &json!({ "closes": REQUESTS, "cause": "request_close", "peer": "127.0.0.1" }));
}

/// `local remote` of each socket in TIME_WAIT that has this port at either end.
fn listed_in_time_wait(port: u16) -> BTreeSet<String> {
    let filter = format!("( sport = :{port} or dport = :{port} )");
    run(Command::new("ss").args(["-Htan", "state", "time-wait", &filter]))
        .lines()
        .map(|line| line.split_whitespace().skip(2).take(2).collect::<Vec<_>>().join(" "))
        .collect()
}
