//! `--pid` on a server that already runs: what it and its descendants do, and nothing else.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::json;

use crate::rig::{Listener, Tracer, end_of, expect, get, is_socket, ok, port_of, run};
use crate::servers::{self, Client};

const KEEP: &str = "GET /index.html HTTP/1.1\r\nHost: test\r\n\r\n";
const CLOSE: &str = "GET /index.html HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";

/// The process at the server's end of each connection, by the client's port, as `ss` sees it.
fn owners(server: u16) -> BTreeMap<u16, u32> {
    let filter = format!("( sport = :{server} )");
    run(Command::new("ss").args(["-Htnp", "state", "established", &filter]))
        .lines()
        .map(|line| {
            let peer = line.split_whitespace().nth(3).and_then(|peer| peer.rsplit_once(':')).expect("an address").1;
            let pid = line.split_once("pid=").and_then(|(_, rest)| rest.split_once(',')).expect("an owner").0;
            (peer.parse().expect("a port"), pid.parse().expect("a process id"))
        })
        .collect()
}

#[test]
fn a_master_with_connections_that_are_open_already() {
    let server = servers::nginx("keepalive_timeout 30s;");
    let mut clients: Vec<_> = (0..6).map(|_| Client::connect(&server)).collect();
    for client in &mut clients {
        client.exchange(KEEP);
    }
    let owners = owners(server.port);
    assert_eq!(owners.len(), clients.len(), "{owners:?}");

    let tracer = Tracer::start(&["--pid", &server.pid().to_string()]);
    // What another process does at the same time.
    let listener = Listener::new();
    let mut noise = listener.connect();
    noise.request(get(""));
    noise.respond(ok(""));
    noise.server_closes_first();

    // Three ways to end: the client just closes; it asks the server to close; one more exchange, then it closes.
    for (i, mut client) in clients.into_iter().enumerate() {
        let port = client.port;
        match i % 3 {
            0 => {}
            1 => {
                client.exchange(CLOSE);
                end_of(&mut client.stream);
            }
            _ => {
                client.exchange(KEEP);
            }
        }
        drop(client);
        let close = tracer.wait_for_close(server.port, port);
        expect(
            &close,
            &json!({
                "role": if i % 3 == 0 { "unknown" } else { "server" },
                "process": { "pid": owners[&port], "comm": "nginx" },
                "started_before": true,
                "closed_by": if i % 3 == 1 { "local" } else { "remote" },
                "final": if i % 3 == 1 { "time_wait" } else { "closed" },
            }),
        );
        let source = close["process"]["source"].as_str();
        assert!(matches!(source, Some("open-files" | "read")), "{close:#}");
        match i % 3 {
            // Its heads came before tracer: whether they asked for anything is not known, and must not be invented.
            0 => assert_eq!(close["http"], json!(null), "{close:#}"),
            1 => expect(&close, &json!({ "cause": "request_close", "http": { "request_connection": "close" } })),
            _ => expect(&close, &json!({ "http": { "requests": 1, "request_connection": "absent" } })),
        }
    }

    // A connection from now on.
    let mut client = Client::connect(&server);
    client.exchange(CLOSE);
    end_of(&mut client.stream);
    let port = client.port;
    drop(client);
    let close = tracer.wait_for_close(server.port, port);
    expect(&close, &json!({ "started_before": false, "cause": "request_close", "process": { "source": "read" } }));

    let run = tracer.stop();
    for close in run.closes() {
        assert_eq!(port_of(close, "local"), Some(server.port), "of another process: {close:#}");
        let pid = close["process"]["pid"].as_u64().expect("known");
        assert!(server.workers().iter().any(|worker| u64::from(*worker) == pid), "{close:#}");
    }
    assert!(!run.events.iter().any(|event| is_socket(event, listener.port, port)));
    assert_eq!(run.closes().len(), 7);
}

#[test]
fn a_descendant_that_is_born_later() {
    // A shell that is traced starts the client only when told to.
    let listener = Listener::new();
    let script = format!("read line; curl --silent --output /dev/null http://127.0.0.1:{0}/one; exit 0", listener.port);
    let mut shell = crate::rig::Guard(
        Command::new("sh").args(["-c", &script]).stdin(std::process::Stdio::piped()).spawn().expect("a shell starts"),
    );
    let tracer = Tracer::start(&["--pid", &shell.id().to_string()]);
    drop(shell.0.stdin.take());
    let (server, client_port) = listener.accept();
    let mut pair = crate::rig::Pair {
        client: server.try_clone().expect("a socket can be shared"),
        server,
        server_port: listener.port,
        client_port,
    };
    let mut head = [0; 4096];
    assert!(std::io::Read::read(&mut pair.server, &mut head).expect("the client asks") > 0);
    std::io::Write::write_all(&mut pair.server, ok("Connection: close\r\n").as_bytes()).expect("it is open");
    drop(pair);
    let close = tracer.wait_for_close(client_port, listener.port);
    expect(&close, &json!({ "role": "client", "process": { "comm": "curl" } }));
    shell.wait();
    let run = tracer.stop();
    assert_eq!(run.closes().len(), 1, "the server's end is another process's");
}

#[test]
fn only_processes_of_a_name() {
    let listener = Listener::new();
    // Longer than the kernel keeps: both sides cut it to 15 bytes.
    let name = format!("named-{}-and-longer-than-that", std::process::id());
    let tracer = Tracer::start(&["--comm", &name]);
    let script = format!(
        "import socket\n\
         open('/proc/self/comm', 'w').write('{name}')\n\
         s = socket.create_connection(('127.0.0.1', {}))\n\
         s.sendall({:?}.encode())\n\
         while s.recv(4096): pass\n",
        listener.port,
        get("Connection: close\r\n"),
    );
    let mut client = crate::rig::Guard(Command::new("python3").args(["-c", &script]).spawn().expect("Python starts"));
    let (mut server, port) = listener.accept();
    std::io::Read::read_exact(&mut server, &mut vec![0; get("Connection: close\r\n").len()]).expect("the client asks");
    std::io::Write::write_all(&mut server, ok("").as_bytes()).expect("it is open");
    drop(server);
    assert!(client.wait().success());
    let close = tracer.wait_for_close(port, listener.port);
    expect(&close, &json!({ "process": { "comm": name[..15], "pid": client.id() }, "cause": "request_close" }));
    let run = tracer.stop();
    assert_eq!(run.closes().len(), 1, "the server's end is another process's");
}
