//! Other network namespaces: seen without being asked for, and asked in the right place.

use std::net::TcpStream;
use std::process::Command;

use serde_json::json;

use crate::rig::{Listener, Namespace, Pair, Tracer, expect, get, is_socket, ok, port_of, run};

#[test]
fn a_half_close_in_another_namespace() {
    let namespace = Namespace::new("half");
    let inode = namespace.inode();
    // The sockets stay in their namespace, wherever they are used.
    let listener = namespace.enter(Listener::new);
    let tracer = Tracer::start(&["--states", "--port", &listener.port.to_string()]);
    let Pair { server, client, server_port, client_port } = namespace.enter(|| {
        let mut pair = listener.connect();
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        pair
    });
    drop(server);
    tracer.wait_for("FIN_WAIT2", |events| {
        let reached = |event| is_socket(event, server_port, client_port) && event["new"] == "FIN_WAIT2";
        events.iter().any(reached).then_some(())
    });
    drop(client);
    let close = tracer.wait_for_close(server_port, client_port);
    expect(
        &close,
        &json!({
            "netns": inode, "role": "server", "closed_by": "local",
            "final": "time_wait", "final_source": "sock_diag", "cause": "request_close",
            "process": { "pid": std::process::id() },
        }),
    );
    tracer.stop();
}

#[test]
fn a_full_time_wait_table_leaves_none() {
    const ROOM: usize = 5;
    const CONNECTIONS: usize = 12;
    let namespace = Namespace::new("full");
    let listener = namespace.enter(Listener::new);
    let tracer = Tracer::on_port(listener.port);
    namespace.enter(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", ROOM.to_string()).expect("we are root");
        for _ in 0..CONNECTIONS {
            listener.connect().server_closes_first();
        }
    });
    let port = listener.port;
    let closes = tracer.wait_for_closes(CONNECTIONS, |close| port_of(close, "local") == Some(port));
    let left = |fate: &str| closes.iter().filter(|close| close["final"] == fate).count();
    // Where the client's FIN comes later than its ACK, nothing tells why the socket left nothing.
    assert_eq!((left("time_wait"), left("closed") + left("unknown")), (ROOM, CONNECTIONS - ROOM), "{closes:#?}");
    for close in &closes {
        expect(close, &json!({ "closed_by": "local", "how": "fin", "final_source": "sock_diag" }));
    }
    tracer.stop();
}

#[test]
fn a_peer_that_vanishes() {
    let namespace = Namespace::new("gone");
    let listener = namespace.enter(Listener::new);
    let tracer = Tracer::on_port(listener.port);
    let pair = namespace.enter(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_retries2", "1").expect("we are root");
        let mut pair = listener.connect();
        pair.request(get(""));
        let rules = "table inet vanish { chain input { type filter hook input priority 0; policy drop; }; }";
        run(Command::new("nft").arg(rules));
        std::io::Write::write_all(&mut pair.server, ok("").as_bytes()).expect("it fits the buffer");
        pair
    });
    let close = tracer.wait_for_close(pair.server_port, pair.client_port);
    expect(
        &close,
        &json!({ "closed_by": "none", "how": "timeout", "final": "timed_out", "cause": "timeout", "closer": null }),
    );
    tracer.stop();
}

#[test]
fn a_request_in_the_first_segment_of_all() {
    let namespace = Namespace::new("tfo");
    namespace.enter(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "3").expect("we are root"));
    let listener = namespace.enter(Listener::new);
    let tracer = Tracer::on_port(listener.port);
    // TCP Fast Open, which Python's standard library can: the second connection has a cookie, and its SYN a request.
    let script = format!(
        "import socket\n\
         server = socket.socket()\n\
         server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
         server.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)\n\
         server.bind(('127.0.0.1', {port}))\n\
         server.listen()\n\
         for _ in range(3):\n\
        \x20    client = socket.socket()\n\
        \x20    client.sendto({request:?}.encode(), socket.MSG_FASTOPEN, ('127.0.0.1', {port}))\n\
        \x20    accepted, _ = server.accept()\n\
        \x20    accepted.recv(1000)\n\
        \x20    accepted.sendall({response:?}.encode())\n\
        \x20    accepted.close()\n\
        \x20    while client.recv(1000): pass\n\
        \x20    client.close()\n",
        port = listener.port,
        request = get("Connection: close\r\n"),
        response = ok(""),
    );
    let port = listener.port;
    drop(listener);
    let name = namespace.name.clone();
    run(Command::new("ip").args(["netns", "exec", &name, "python3", "-c", &script]));
    let counters = run(Command::new("ip").args(["netns", "exec", &name, "nstat", "-az", "TcpExtTCPFastOpenPassive"]));
    assert!(!counters.contains("TcpExtTCPFastOpenPassive        0 "), "no SYN carried a request:\n{counters}");
    let wanted = json!({ "http": { "requests": 1, "request_connection": "close" }, "cause": "request_close" });
    for close in tracer.wait_for_closes(6, |_| true) {
        expect(&close, &wanted);
        assert_eq!(close["role"] == "server", port_of(&close, "local") == Some(port), "{close:#}");
    }
    tracer.stop();
}

#[test]
fn the_same_ports_in_two_namespaces() {
    let (one, two) = (Namespace::new("one"), Namespace::new("two"));
    let listener = one.enter(Listener::new);
    let tracer = Tracer::on_port(listener.port);
    let other =
        two.enter(|| std::net::TcpListener::bind(("127.0.0.1", listener.port)).expect("it is another namespace"));
    one.enter(|| listener.serve_and_close());
    two.enter(|| {
        let client = TcpStream::connect(("127.0.0.1", listener.port)).expect("it listens");
        let (server, _) = other.accept().expect("it was connected");
        drop(client);
        drop(server);
    });
    for (namespace, cause) in [(&one, "request_close"), (&two, "unused")] {
        let inode = namespace.inode();
        let closes = tracer.wait_for_closes(2, |close| close["netns"] == inode);
        for close in &closes {
            expect(close, &json!({ "cause": cause }));
        }
    }
    tracer.stop();
}
