//! Each filter with what passes it and what does not, and several at once.
//!
//! What must not be reported happens first, so that it would be there when what must be is.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde_json::{Value, json};

use crate::names::Cgroup;
use crate::peer::{receive, set_option};
use crate::rig::{
    Listener, Namespace, PATIENCE, Pair, Run, Tracer, abort, end_of, expect, free_port, get, is_socket, ok, tracer,
};
use crate::script::Script;

/// `tracer run` with a port and more filters, as one text.
#[track_caller]
fn start(port: u16, filters: &str) -> Tracer {
    let port = port.to_string();
    Tracer::start(&["--port", &port].into_iter().chain(filters.split_whitespace()).collect::<Vec<_>>())
}

fn listen(ip: &str, port: u16) -> TcpListener {
    let ip: IpAddr = ip.parse().expect("an address");
    let listener = TcpListener::bind((ip, port)).expect("the port is free");
    // Should nobody connect, `accept` fails.
    set_socket_timeout(&listener, Timeout::Recv, Some(*PATIENCE)).expect("a time-out can be set");
    listener
}

/// A connection to `ip`, which the server closes first; returns the client's port.
fn visit(listener: &TcpListener, ip: &str) -> u16 {
    let (mut client, server) = connect(listener, ip);
    drop(server);
    end_of(&mut client);
    client.local_addr().expect("it is connected").port()
}

fn connect(listener: &TcpListener, ip: &str) -> (TcpStream, TcpStream) {
    let port = listener.local_addr().expect("it listens").port();
    let client = TcpStream::connect(SocketAddr::new(ip.parse().expect("an address"), port)).expect("it listens");
    (client, listener.accept().expect("it was connected").0)
}

/// Ends tracer, which must have reported just these sockets, by local and remote port, and counted no more.
#[track_caller]
fn only(tracer: Tracer, wanted: &[(u16, u16)]) -> Run {
    for (local, remote) in wanted {
        tracer.wait_for_close(*local, *remote);
    }
    let run = tracer.stop();
    let closes = run.closes();
    let is_wanted = |close: &Value| wanted.iter().any(|(local, remote)| is_socket(close, *local, *remote));
    assert!(closes.len() == wanted.len() && closes.iter().all(|close| is_wanted(close)), "{wanted:?}: {closes:#?}");
    expect(&run.summary, &json!({ "closes": wanted.len() }));
    run
}

#[test]
fn only_the_ports_that_are_asked_for() {
    // Close to each other, so that their bits share a word.
    let (port, other) = std::iter::repeat_with(|| (free_port(), free_port()))
        .find(|(port, other)| port / 64 == other / 64)
        .expect("most are");
    let (near, far) = (listen("127.0.0.1", port), listen("127.0.0.1", other));
    let traffic = || {
        visit(&far, "127.0.0.1");
        visit(&near, "127.0.0.1")
    };
    let tracer = start(port, "");
    let client = traffic();
    only(tracer, &[(client, port), (port, client)]);

    // The first and the last, and very many.
    let many = (15_000..17_000).map(|port| format!("--port {port} ")).collect::<String>();
    let tracer = start(port, &format!("{many} --port 1 --port 65535"));
    let client = traffic();
    only(tracer, &[(client, port), (port, client)]);
}

#[test]
fn peer_and_local() {
    let port = free_port();
    let (near, far) = (listen("127.1.2.3", port), listen("127.2.2.3", port));
    // The kernel connects from 127.0.0.1.
    let traffic = || {
        visit(&far, "127.2.2.3");
        visit(&near, "127.1.2.3")
    };
    // What was open before; it ends in between.
    let old = connect(&far, "127.2.2.3");
    let tracer = start(port, "--peer 127.1.0.0/16");
    drop(old);
    let client = traffic();
    let run = only(tracer, &[(client, port)]);
    expect(&run.events[0], &json!({ "filters": [format!("--port {port}"), "--peer 127.1.0.0/16"] }));
    expect(run.closes()[0], &json!({ "role": "client", "final": "closed" }));

    let tracer = start(port, "--local 127.1.2.3");
    let client = traffic();
    let run = only(tracer, &[(port, client)]);
    expect(run.closes()[0], &json!({ "role": "server", "final": "time_wait" }));

    // Any of several; and both filters at once.
    let tracer = start(port, "--peer 10.0.0.0/8 --peer ::/0 --peer 127.0.0.1 --local 127.1.0.0/16");
    let client = traffic();
    only(tracer, &[(port, client)]);
}

#[test]
fn what_was_open_before_passes_by_its_addresses() {
    let port = free_port();
    let (near, far) = (listen("127.1.2.3", port), listen("127.2.2.3", port));
    let (other, (client, mut server)) = (connect(&far, "127.2.2.3"), connect(&near, "127.1.2.3"));
    let tracer = start(port, "--local 127.1.0.0/16");
    drop(other);
    let from = client.local_addr().expect("it is connected").port();
    drop(client);
    end_of(&mut server);
    drop(server);
    let run = only(tracer, &[(port, from)]);
    expect(
        run.closes()[0],
        &json!({ "started_before": true, "process": { "pid": std::process::id(), "source": "open-files" } }),
    );
}

#[test]
fn addresses_of_both_families() {
    let namespace = Namespace::new("families");
    let port = free_port();
    // Both families: of IPv4 its sockets have IPv4-mapped addresses.
    let listener = namespace.enter(|| listen("::", port));
    let traffic = |ips: [&str; 2]| {
        namespace.enter(|| {
            let [_, last] = ips.map(|ip| visit(&listener, ip));
            last
        })
    };
    let tracer = start(port, "--peer 127.0.0.0/8");
    let client = traffic(["::1", "127.0.0.1"]);
    let run = only(tracer, &[(port, client), (client, port)]);
    for close in run.closes() {
        expect(close, &json!({ "family": "ipv4" }));
    }
    for network in ["::/0", "::1"] {
        let tracer = start(port, &format!("--peer {network}"));
        let client = traffic(["127.0.0.1", "::1"]);
        let run = only(tracer, &[(port, client), (client, port)]);
        for close in run.closes() {
            expect(close, &json!({ "family": "ipv6" }));
        }
    }
}

#[test]
fn a_network_namespace_by_name_path_and_number() {
    let (one, two) = (Namespace::new("filter1"), Namespace::new("filter2"));
    let listener = one.enter(Listener::new);
    let port = listener.port;
    let other = two.enter(|| listen("127.0.0.1", port));
    let number = one.inode().to_string();
    for netns in [one.name.clone(), format!("/run/netns/{}", one.name), number] {
        let tracer = start(port, &format!("--netns {netns}"));
        two.enter(|| visit(&other, "127.0.0.1"));
        let (server, client) = one.enter(|| listener.serve_and_close());
        let run = only(tracer, &[(server, client), (client, server)]);
        for close in run.closes() {
            expect(close, &json!({ "netns": one.inode(), "cause": "request_close", "http": { "requests": 1 } }));
        }
    }
}

#[test]
fn the_first_segment_of_a_deferred_accept() {
    let port = free_port();
    let listener = listen("127.1.2.3", port);
    set_option(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 10);
    for (filter, passes) in [("--peer 127.0.0.1", true), ("--peer 127.1.2.3", false)] {
        let tracer = start(port, filter);
        let mut client = TcpStream::connect(("127.1.2.3", port)).expect("it listens");
        let request = get("Connection: close\r\n");
        client.write_all(request.as_bytes()).expect("it is open");
        // The socket did not exist when its request came.
        let mut server = listener.accept().expect("it was connected").0;
        receive(&mut server, request.len());
        server.write_all(ok("").as_bytes()).expect("it is open");
        drop(server);
        end_of(&mut client);
        let from = client.local_addr().expect("it is connected").port();
        drop(client);
        let socket = if passes { (port, from) } else { (from, port) };
        let run = only(tracer, &[socket]);
        expect(run.closes()[0], &json!({ "cause": "request_close", "http": { "request_connection": "close" } }));
    }
}

#[test]
fn how_long_it_was_open() {
    let listener = Listener::new();
    for states in ["", " --states"] {
        let tracer = start(listener.port, &format!("--min-duration 500ms{states}"));
        let long = listener.connect();
        let (short, short_client) = listener.serve_and_close();
        std::thread::sleep(Duration::from_millis(600));
        let (server, client) = long.server_closes_first();
        let run = only(tracer, &[(server, client), (client, server)]);
        for close in run.closes() {
            assert!(close["duration_us"].as_u64() >= Some(500_000), "{close:#}");
        }
        // How long it will be open is not known at its transitions: they are all there, or none is.
        let is_state = |event: &&Value| event["type"] == "state" && is_socket(event, short, short_client);
        let last = run.events.iter().rfind(is_state).map(|state| state["new"].clone());
        assert_eq!(last, (!states.is_empty()).then(|| json!("TIME_WAIT")));
    }
}

#[test]
fn how_it_ended() {
    let listener = Listener::new();
    let port = listener.port;
    // Three endings: the client's reset, the client's close, the server's close.
    let traffic = || {
        let mut reset = listener.connect();
        reset.request(get(""));
        let by_reset = reset.client_port;
        abort(reset.client);
        // Its end must have noticed.
        let _ = std::io::Read::read(&mut reset.server, &mut [0]);
        drop(reset.server);
        let (_, by_client) = listener.connect().client_closes_first();
        let (_, by_server) = listener.serve_and_close();
        (by_reset, by_client, by_server)
    };
    let tracer = start(port, "--cause reset_by_peer --cause unused");
    let (by_reset, by_client, _) = traffic();
    only(tracer, &[(port, by_reset), (port, by_client), (by_client, port)]);

    let tracer = start(port, "--closed-by local");
    let (by_reset, by_client, by_server) = traffic();
    only(tracer, &[(by_reset, port), (by_client, port), (port, by_server)]);

    let tracer = start(port, "--final closed");
    let (_, by_client, by_server) = traffic();
    only(tracer, &[(port, by_client), (by_server, port)]);

    // All of several filters.
    let tracer = start(
        port,
        "--final time_wait --closed-by local --cause request_close --peer 127.0.0.1 --comm x --comm kernel",
    );
    traffic();
    let run = tracer.stop();
    assert!(run.closes().is_empty(), "none of these is the name of this process: {:#?}", run.closes());
    let tracer =
        start(port, "--final time_wait --final reset --closed-by local --cause request_close --peer 127.0.0.1");
    let (_, _, by_server) = traffic();
    only(tracer, &[(port, by_server)]);
}

#[test]
fn what_becomes_time_wait_later_is_reported_then() {
    let listener = Listener::new();
    let tracer = start(listener.port, "--final time_wait");
    let mut half = listener.connect();
    half.request(get("Connection: close\r\n"));
    let Pair { server, client, server_port, client_port } = half;
    drop(server);
    // Until the client closes it is FIN_WAIT2.
    std::thread::sleep(Duration::from_millis(300));
    let closed = |events: &[Value]| events.iter().any(|event| event["type"] == "close");
    assert!(!closed(&tracer.events()), "{:#?}", tracer.events());
    drop(client);
    let run = only(tracer, &[(server_port, client_port)]);
    expect(run.closes()[0], &json!({ "final": "time_wait", "final_source": "sock_diag" }));
    expect(&run.summary, &json!({ "closes": 1, "time_wait": 1 }));
}

#[test]
fn half_closed_ones_pass_by_what_is_known_of_them() {
    let listener = Listener::new();
    for (filters, told) in
        [("--cause unused --closed-by remote", true), ("--final closed", false), ("--cause tls", false)]
    {
        let tracer = start(listener.port, &format!("--close-wait-after 100ms {filters}"));
        let Pair { server, client, client_port, .. } = listener.connect();
        drop(client);
        // Several walks.
        std::thread::sleep(Duration::from_millis(500));
        drop(server);
        if told || filters.contains("closed") {
            tracer.wait_for_close(listener.port, client_port);
        }
        let run = tracer.stop();
        let tells = run.events.iter().filter(|event| event["type"] == "close_wait").count();
        assert_eq!((tells, &run.summary["close_wait"]), (usize::from(told), &json!(u8::from(told))), "{filters}");
    }
}

#[test]
fn a_cgroup_and_those_below_it() {
    let cgroup = Cgroup::new(&format!("tracer-filter-{}", std::process::id()));
    let inner = cgroup.0.join("inner");
    fs::create_dir(&inner).expect("we are root");
    let listener = Listener::new();
    for (asked, within) in [(&cgroup.0, true), (&inner, false)] {
        let tracer = start(listener.port, &format!("--cgroup {}", asked.display()));
        // This process is in another one.
        listener.serve_and_close();
        let clients = [(&cgroup.0, within), (&inner, true)].map(|(cgroup, passes)| {
            let script = format!(
                "open('{}/cgroup.procs', 'w').write('0')\nconnection = connect()\nhear()\nconnection.close()\nhear()",
                cgroup.display()
            );
            let mut client = Script::start(listener.port, &script);
            let (mut server, port) = listener.accept();
            client.tell("close");
            end_of(&mut server);
            (client, port, passes)
        });
        let wanted: Vec<_> =
            clients.iter().filter(|(_, _, passes)| *passes).map(|(_, port, _)| (*port, listener.port)).collect();
        only(tracer, &wanted);
    }
    fs::remove_dir(&inner)
        .or_else(|_| {
            // The processes that were in it have just been killed.
            std::thread::sleep(Duration::from_millis(500));
            fs::remove_dir(&inner)
        })
        .expect("it is empty");
}

#[test]
fn filters_that_can_match_nothing() {
    let namespace = Namespace::new("deleted");
    let gone = namespace.name.clone();
    drop(namespace);
    // Namespaces of all kinds share their numbers: this is one that no network namespace can get.
    let number = fs::metadata("/proc/self/ns/mnt").expect("/proc").ino().to_string();
    let cases: [(&[&str], &str); 8] = [
        (&["--peer", "10.0.0.5/8"], "10.0.0.0/8"),
        (&["--local", "nowhere"], "10.0.0.0/8"),
        (&["--peer", "10.0.0.0/8", "--local", "::1"], "family"),
        (&["--netns", &gone], &gone),
        (&["--netns", &number], &number),
        (&["--cgroup", "/tracer/no/such/cgroup"], "no such cgroup"),
        (&["--final", "fin_wait2", "--closed-by", "remote"], "FIN_WAIT2"),
        (&["--cause", "no_such_cause"], "possible values"),
    ];
    for (args, reason) in cases {
        let output = tracer().arg("run").args(args).output().expect("tracer starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(reason) && output.stdout.is_empty(), "{args:?}: {said}");
    }
}
