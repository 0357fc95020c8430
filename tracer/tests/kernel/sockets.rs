//! Kinds of sockets and of ends beyond the plain ones: IPv6, mapped addresses, an abort from outside, both at once.

use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::process::Command;

use serde_json::json;

use crate::rig::{Listener, Tracer, end_of, expect, free_port, get, ok, run};

#[test]
fn ipv6_and_mapped_addresses() {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    // One socket for both families: to it IPv4 is a mapped address, on the wire and to people it is not.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("the port is free");
    for (family, host) in [("ipv6", Ipv6Addr::LOCALHOST.into()), ("ipv4", Ipv4Addr::LOCALHOST.into())] {
        let mut client = TcpStream::connect::<(std::net::IpAddr, u16)>((host, port)).expect("it listens");
        let (mut server, _) = listener.accept().expect("it listens");
        client.write_all(get("Connection: close\r\n").as_bytes()).expect("open");
        client.shutdown(Shutdown::Write).expect("open");
        end_of(&mut server);
        server.write_all(ok("").as_bytes()).expect("open");
        let (local, remote) = (client.local_addr().expect("open"), client.peer_addr().expect("open"));
        drop(server);
        end_of(&mut client);
        let at_client = tracer.wait_for_close(local.port(), port);
        expect(&at_client, &json!({ "family": family, "local": local.to_string(), "remote": remote.to_string() }));
        expect(&at_client, &json!({ "closed_by": "local", "final": "time_wait", "cause": "request_close" }));
        let at_server = tracer.wait_for_close(port, local.port());
        expect(&at_server, &json!({ "family": family, "local": remote.to_string(), "remote": local.to_string() }));
        expect(&at_server, &json!({ "closed_by": "remote", "final": "closed", "cause": "request_close" }));
    }
}

#[test]
fn a_half_close_is_asked_of_the_kernel_in_ipv6_too() {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).expect("the port is free");
    let client = TcpStream::connect((Ipv6Addr::LOCALHOST, port)).expect("it listens");
    let (server, peer) = listener.accept().expect("it listens");
    drop(server);
    std::thread::sleep(std::time::Duration::from_millis(200));
    drop(client);
    expect(&tracer.wait_for_close(port, peer.port()), &json!({ "final": "time_wait", "final_source": "sock_diag" }));
}

#[test]
fn aborted_from_outside() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut pair = listener.connect();
    pair.request(get(""));
    pair.respond(ok(""));
    let (server, client) = (pair.server_port, pair.client_port);
    run(Command::new("ss").args(["-K", "src", "127.0.0.1", "sport", "=", &format!(":{server}")]).args([
        "dst",
        "127.0.0.1",
        "dport",
        "=",
        &format!(":{client}"),
    ]));
    let at_server = tracer.wait_for_close(server, client);
    // `ss` ended it, and is not its owner.
    expect(
        &at_server,
        &json!({
            "process": { "pid": std::process::id() }, "closer": { "comm": "ss" }, "closed_by": "local", "how": "rst",
            "final": "reset", "cause": "reset_by_local",
        }),
    );
    expect(&tracer.wait_for_close(client, server), &json!({ "closed_by": "remote", "cause": "reset_by_peer" }));
}

#[test]
fn both_ends_close_at_once() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    // Which of the two comes first is up to the scheduler; whichever it is, both records must tell one story.
    for _ in 0..50 {
        let mut pair = listener.connect();
        pair.request(get(""));
        pair.respond(ok(""));
        let (server, client) = (pair.server_port, pair.client_port);
        let barrier = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                drop(pair.server);
            });
            barrier.wait();
            drop(pair.client);
        });
        let (one, other) = (tracer.wait_for_close(server, client), tracer.wait_for_close(client, server));
        let story = (one["closed_by"].as_str(), other["closed_by"].as_str());
        let ends = (one["final"].as_str(), other["final"].as_str());
        match story {
            (Some("both"), Some("both")) => assert_eq!(ends, (Some("time_wait"), Some("time_wait"))),
            (Some("local"), Some("remote")) => assert_eq!(ends, (Some("time_wait"), Some("closed"))),
            (Some("remote"), Some("local")) => assert_eq!(ends, (Some("closed"), Some("time_wait"))),
            _ => panic!("{one:#}\n{other:#}"),
        }
    }
}
