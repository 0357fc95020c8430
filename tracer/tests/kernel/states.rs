//! `--states`: each transition with its process and its headers.

use serde_json::{Value, json};

use crate::rig::{Listener, Tracer, expect, get, is_socket, ok};

fn new_states(events: &[Value], local: u16, remote: u16) -> Vec<&Value> {
    events.iter().filter(|event| event["type"] == "state" && is_socket(event, local, remote)).collect()
}

fn names(states: &[&Value]) -> Vec<String> {
    let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    states.iter().map(|state| format!("{}->{}", word(&state["old"]), word(&state["new"]))).collect()
}

#[test]
fn the_closing_states_are_attributed() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--states", "--port", &listener.port.to_string()]);
    let mut pair = listener.connect();
    pair.request(get("Connection: close\r\n"));
    pair.respond(ok("Connection: close\r\n"));
    let (server, client) = pair.server_closes_first();
    tracer.wait_for_close(server, client);
    tracer.wait_for_close(client, server);
    let run = tracer.stop();

    let at_server = new_states(&run.events, server, client);
    let closing = at_server.iter().position(|state| state["new"] == "FIN_WAIT1").expect("the server closed first");
    assert_eq!(
        names(&at_server[closing..]),
        ["ESTABLISHED->FIN_WAIT1", "FIN_WAIT1->FIN_WAIT2", "FIN_WAIT2->TIME_WAIT"],
        "{at_server:#?}"
    );
    let close = run.closes().into_iter().find(|close| is_socket(close, server, client)).expect("waited for");
    for state in &at_server[closing..] {
        expect(
            state,
            &json!({
                "cookie": close["cookie"], "netns": close["netns"], "role": "server", "closed_by": "local",
                "process": { "pid": std::process::id() },
                "http": { "request_connection": "close", "response_connection": "close", "status": 200 },
            }),
        );
        assert!(state["delta_us"].is_u64(), "{state:#}");
    }

    let at_client = new_states(&run.events, client, server);
    assert_eq!(
        names(&at_client),
        [
            "CLOSE->SYN_SENT",
            "SYN_SENT->ESTABLISHED",
            "ESTABLISHED->CLOSE_WAIT",
            "CLOSE_WAIT->LAST_ACK",
            "LAST_ACK->CLOSE"
        ],
        "{at_client:#?}"
    );
    for state in &at_client {
        expect(state, &json!({ "role": "client", "process": { "pid": std::process::id() } }));
    }
    expect(at_client[3], &json!({ "closed_by": "remote", "http": { "request_connection": "close" } }));
}
