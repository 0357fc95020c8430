//! One connection for each cause, made by hand so that there is only one way in which it can go; both ends' records.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::rig::{Guard, Listener, Pair, Tracer, abort, end_of, expect, free_port, get, ok, port_of};

/// Runs `script` on a new connection; it ends both sockets and returns their ports. Then compares both records.
fn case(script: impl FnOnce(Pair) -> (u16, u16), at_server: &Value, at_client: &Value) {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let (server, client) = script(listener.connect());
    let (server_end, client_end) = (tracer.wait_for_close(server, client), tracer.wait_for_close(client, server));
    let me = json!({ "process": { "pid": std::process::id() }, "closer": null });
    for (record, role, wanted) in [(&server_end, "server", at_server), (&client_end, "client", at_client)] {
        expect(record, &json!({ "role": role }));
        expect(record, &me);
        expect(record, wanted);
    }
    assert_eq!(tracer.stop().closes().len(), 2);
}

/// The record of the end that closed first, by FIN.
fn first(cause: &str) -> Value {
    json!({ "closed_by": "local", "how": "fin", "final": "time_wait", "cause": cause })
}

/// The record of the other end.
fn second(cause: &str) -> Value {
    json!({ "closed_by": "remote", "how": "fin", "final": "closed", "cause": cause })
}

/// The same at both ends: the server closes first after this request and this response.
fn after_exchange(request: &str, response: &str, cause: &str) {
    let script = |mut pair: Pair| {
        pair.request(request);
        pair.respond(response);
        pair.server_closes_first()
    };
    case(script, &first(cause), &second(cause));
}

#[test]
fn request_close() {
    after_exchange(&get("Connection: close\r\n"), &ok(""), "request_close");
}

#[test]
fn response_close() {
    after_exchange(&get(""), &ok("Connection: close\r\n"), "response_close");
}

#[test]
fn http10() {
    after_exchange("GET / HTTP/1.0\r\n\r\n", "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "http10");
}

#[test]
fn no_reuse() {
    after_exchange(&get(""), &ok(""), "no_reuse");
}

#[test]
fn idle_timeout() {
    let script = |mut pair: Pair| {
        pair.request(get(""));
        pair.respond(ok(""));
        std::thread::sleep(Duration::from_millis(1200));
        pair.server_closes_first()
    };
    case(script, &first("idle_timeout"), &second("idle_timeout"));
}

#[test]
fn unused() {
    let fields = json!({ "protocol": "none", "http": null, "rx_bytes": 0, "tx_bytes": 0, "idle_us": null });
    let with = |mut record: Value| {
        for (name, value) in fields.as_object().into_iter().flatten() {
            record[name] = value.clone();
        }
        record
    };
    case(Pair::client_closes_first, &with(second("unused")), &with(first("unused")));
}

#[test]
fn unanswered() {
    let script = |mut pair: Pair| {
        pair.request(get(""));
        pair.server_closes_first()
    };
    case(script, &first("unanswered"), &second("unanswered"));
}

#[test]
fn truncated_by_content_length() {
    after_exchange(&get(""), "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnot all", "truncated");
}

#[test]
fn truncated_in_chunks() {
    after_exchange(&get(""), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "truncated");
}

#[test]
fn whole_in_chunks() {
    after_exchange(
        &get("Connection: close\r\n"),
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "request_close",
    );
}

#[test]
fn upgraded() {
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    after_exchange(
        &get(upgrade),
        &format!("HTTP/1.1 101 Switching Protocols\r\n{upgrade}\r\n\u{1}\u{2}frames"),
        "upgraded",
    );
}

#[test]
fn h2() {
    after_exchange("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0", "\0\0\0\u{4}\0\0\0\0\0", "h2");
}

#[test]
fn tls() {
    let script = |mut pair: Pair| {
        // The record header of a ClientHello and of a ServerHello; the rest does not matter.
        pair.request([&[22, 3, 1, 0, 64, 1, 0, 0, 60, 3, 3][..], &[7; 58]].concat());
        pair.respond([&[22, 3, 3, 0, 64, 2, 0, 0, 60, 3, 3][..], &[7; 58]].concat());
        pair.server_closes_first()
    };
    case(script, &first("tls"), &second("tls"));
}

#[test]
fn not_http() {
    let script = |mut pair: Pair| {
        let bytes: Vec<u8> = (0..=255).cycle().skip(128).take(5000).collect();
        pair.request(&bytes);
        pair.respond(&bytes);
        pair.server_closes_first()
    };
    case(script, &first("not_http"), &second("not_http"));
}

/// The records of a connection that one end reset, and whose other end then saw it.
fn reset() -> (Value, Value) {
    (
        json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_local" }),
        json!({ "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer" }),
    )
}

/// Reads until the RST is reported.
fn expect_reset(stream: &mut TcpStream) {
    let error = stream.read_to_end(&mut Vec::new()).expect_err("the peer reset the connection");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn reset_by_linger() {
    let script = |mut pair: Pair| {
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        let Pair { server, mut client, server_port, client_port } = pair;
        abort(server);
        expect_reset(&mut client);
        (server_port, client_port)
    };
    let (by, of) = reset();
    case(script, &by, &of);
}

#[test]
fn reset_by_unread_data() {
    let script = |mut pair: Pair| {
        pair.request(get(""));
        pair.client.write_all(b"GET /more HTTP/1.1\r\n\r\n").expect("the connection is open");
        let Pair { server, mut client, server_port, client_port } = pair;
        // Until it is there; it stays unread.
        server.peek(&mut [0]).expect("the client sent it");
        drop(server);
        expect_reset(&mut client);
        (server_port, client_port)
    };
    let (by, of) = reset();
    case(script, &by, &of);
}

#[test]
fn reset_by_the_client() {
    let script = |mut pair: Pair| {
        pair.request(get(""));
        pair.respond(ok(""));
        let Pair { mut server, client, server_port, client_port } = pair;
        abort(client);
        expect_reset(&mut server);
        (server_port, client_port)
    };
    let (by, of) = reset();
    case(script, &of, &by);
}

#[test]
fn connection_refused() {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect_err("nothing listens");
    let close = &tracer.wait_for_closes(1, |close| port_of(close, "remote") == Some(port))[0];
    expect(
        close,
        &json!({
            "role": "client", "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer",
            "protocol": "none", "http": null, "duration_us": 0,
            "process": { "pid": std::process::id(), "source": "connect" },
        }),
    );
    tracer.stop();
}

/// A client in a process of its own that has exchanged one request and then does what `end` says.
fn python_client(port: u16, end: &str) -> Guard {
    let script = format!(
        "import os, socket, sys\n\
         s = socket.create_connection(('127.0.0.1', {port}))\n\
         s.sendall(b'GET / HTTP/1.1\\r\\nHost: test\\r\\n\\r\\n')\n\
         s.recv(4096)\n\
         print('answered', flush=True)\n\
         sys.stdin.readline()\n\
         {end}\n"
    );
    let python = Command::new("python3").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    Guard(python.expect("Python starts"))
}

/// The client's record after its process ended by `end`, a statement, or by SIGKILL.
fn close_by_exit(end: Option<&str>) {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut client = python_client(listener.port, end.unwrap_or("pass"));
    let (mut server, peer) = listener.accept();
    let n = server.read(&mut [0; 4096]).expect("the client asks");
    assert!(n > 0);
    server.write_all(ok("").as_bytes()).expect("the connection is open");
    let mut answered = [0; 9];
    client.0.stdout.as_mut().expect("piped").read_exact(&mut answered).expect("the client runs");
    match end {
        Some(_) => drop(client.0.stdin.take()),
        None => client.signal(Signal::KILL),
    }
    client.wait();
    end_of(&mut server);
    drop(server);
    let at_client = tracer.wait_for_close(peer, listener.port);
    expect(
        &at_client,
        &json!({
            "role": "client", "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "process_exit",
            "process": { "pid": client.id() },
        }),
    );
    let at_server = tracer.wait_for_close(listener.port, peer);
    expect(&at_server, &json!({ "role": "server", "closed_by": "remote", "how": "fin", "final": "closed" }));
    assert_ne!(at_server["cause"], "process_exit", "{at_server:#}");
    tracer.stop();
}

#[test]
fn process_exit_by_sigkill() {
    close_by_exit(None);
}

#[test]
fn process_exit_without_closing() {
    close_by_exit(Some("os._exit(0)"));
}
