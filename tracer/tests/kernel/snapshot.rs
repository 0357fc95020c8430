//! `tracer snapshot`: beside `ss` in each namespace, and beside what `connect` itself says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rig::{Guard, Namespace, comm_of, copy_executable, end_of, expect, run, tracer, wait_until};

/// Local port, peer, and port of the peer; as a group has them.
type Key = (Option<u16>, IpAddr, Option<u16>);
/// TIME_WAIT, FIN_WAIT2, CLOSE_WAIT, ESTABLISHED.
type Counts = [u64; 4];

// Of the namespaces alone, but outside what the tracers of other tests filter by.
const SERVER: u16 = 10_080;
const OTHER: u16 = 10_081;

fn set(name: &str, value: &str) {
    fs::write(format!("/proc/sys/net/ipv4/{name}"), value).expect("we are root");
}

fn namespace(name: &str, ports: &str) -> Namespace {
    let namespace = Namespace::new(name);
    namespace.enter(|| {
        set("ip_local_port_range", ports);
        // No TIME_WAIT gives way to another connection.
        set("tcp_tw_reuse", "0");
    });
    namespace
}

fn listen(ip: IpAddr, port: u16) -> TcpListener {
    TcpListener::bind((ip, port)).expect("the namespace is ours")
}

/// A connection to a listener: the client's end, the server's.
fn connect(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    let (server, _) = listener.accept().expect("it was connected");
    (client, server)
}

/// Connections that are closed by one end, then by the other.
fn close(listener: &TcpListener, count: usize, client_first: bool) {
    for _ in 0..count {
        let (client, server) = connect(listener);
        let (first, mut second) = if client_first { (client, server) } else { (server, client) };
        drop(first);
        end_of(&mut second);
    }
}

fn snapshot() -> Value {
    let text = run(tracer().args(["snapshot", "--json"]));
    assert_eq!(text.lines().count(), 1, "{text}");
    let snapshot: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(snapshot["type"], "snapshot");
    snapshot
}

/// What `ss` lists in a namespace: state, local and remote address.
fn ss(namespace: &Namespace) -> Vec<(usize, SocketAddr, SocketAddr)> {
    let listed = run(Command::new("ip").args(["netns", "exec", &namespace.name, "ss", "-tanH"]));
    let states = ["TIME-WAIT", "FIN-WAIT-2", "CLOSE-WAIT", "ESTAB"];
    let mut sockets: Vec<_> = listed
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let state = states.iter().position(|state| *state == words[0])?;
            let address = |text: &str| {
                let address: SocketAddr = text.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
                SocketAddr::new(address.ip().to_canonical(), address.port())
            };
            Some((state, address(words[3]), address(words[4])))
        })
        .collect();
    sockets.sort_unstable();
    sockets
}

/// The groups of a namespace in a snapshot.
fn groups(snapshot: &Value, netns: u64) -> BTreeMap<Key, Counts> {
    let groups = snapshot["groups"].as_array().expect("a list").iter().filter(|group| group["netns"] == netns);
    let port = |value: &Value| value.as_u64().map(|port| u16::try_from(port).expect("a port"));
    groups
        .map(|group| {
            let peer = group["peer"].as_str().expect("an address").parse().expect("an address");
            let key = (port(&group["local_port"]), peer, port(&group["peer_port"]));
            (key, counts(&group["sockets"]))
        })
        .collect()
}

fn counts(states: &Value) -> Counts {
    ["time_wait", "fin_wait2", "close_wait", "established"].map(|state| states[state].as_u64().expect("a number"))
}

fn of_netns<'a>(snapshot: &'a Value, list: &str, netns: u64) -> Vec<&'a Value> {
    snapshot[list].as_array().expect("a list").iter().filter(|one| one["netns"] == netns).collect()
}

#[test]
fn agrees_with_ss_for_ten_thousand_time_wait_sockets_in_three_namespaces() {
    const ENOUGH: usize = 10_000;
    // A few more than enough: on loopback, where an ACK overtakes another, a TIME_WAIT can end at once.
    const SERVERS: usize = 4_500;
    const CLIENTS: usize = 4_400;
    const MIXED: usize = 600;
    const OVER_IPV6: usize = 600;
    let spaces = [
        namespace("ss-servers", "30000 60999"),
        namespace("ss-clients", "30000 35999"),
        namespace("ss-mixed", "30000 60999"),
    ];
    let [servers, clients, mixed] = &spaces;
    let lo = IpAddr::from(Ipv4Addr::LOCALHOST);
    let listeners = std::thread::scope(|scope| {
        let many = |space: &'static str, namespace, count, client_first| {
            std::thread::Builder::new()
                .name(space.to_owned())
                .spawn_scoped(scope, move || {
                    let namespace: &Namespace = namespace;
                    namespace.enter(|| {
                        let listener = listen(lo, SERVER);
                        close(&listener, count, client_first);
                        listener
                    })
                })
                .expect("a thread starts")
        };
        let threads = [many("servers", servers, SERVERS, false), many("clients", clients, CLIENTS, true)];
        threads.map(|thread| thread.join().expect("no panic"))
    });
    // Also what other states there are, either address family, and IPv4 on a socket for both.
    let open = mixed.enter(|| {
        let both = listen(Ipv6Addr::UNSPECIFIED.into(), SERVER);
        let other = listen(lo, OTHER);
        close(&other, MIXED, true);
        close(&other, MIXED, false);
        let to = SocketAddr::new(lo, SERVER);
        let mut open = Vec::new();
        for n in 0..OVER_IPV6 {
            let to = if n % 2 == 0 { to } else { SocketAddr::new(Ipv6Addr::LOCALHOST.into(), SERVER) };
            let client = TcpStream::connect(to).expect("it listens");
            let (mut server, _) = both.accept().expect("it was connected");
            drop(client);
            end_of(&mut server);
        }
        for _ in 0..7 {
            open.extend(<[TcpStream; 2]>::from(connect(&other)));
        }
        // CLOSE_WAIT there, FIN_WAIT2 here.
        for _ in 0..5 {
            let (client, mut server) = connect(&other);
            client.shutdown(std::net::Shutdown::Write).expect("it is open");
            end_of(&mut server);
            open.extend([client, server]);
        }
        (open, both, other)
    });

    // The rest may be on its way for a moment, and one or the other may end meanwhile.
    let mut taken = None;
    wait_until("a moment in which nothing changes", || {
        let before = [0, 1, 2].map(|n| ss(&spaces[n]));
        let snapshot = snapshot();
        let after = [0, 1, 2].map(|n| ss(&spaces[n]));
        let is_quiet = before == after;
        taken = Some((snapshot, after));
        is_quiet
    });
    let (snapshot, listed) = taken.expect("it was waited for");
    let time_wait = listed.iter().flatten().filter(|(state, ..)| *state == 0).count();
    assert!(time_wait >= ENOUGH, "only {time_wait}");

    let mut checked = 0;
    for (namespace, sockets) in spaces.iter().zip(&listed) {
        let netns = namespace.inode();
        let mut wanted: BTreeMap<Key, Counts> = BTreeMap::new();
        let mut all = Counts::default();
        for (state, local, remote) in sockets {
            let key = if [SERVER, OTHER].contains(&local.port()) {
                (Some(local.port()), remote.ip(), None)
            } else {
                (None, remote.ip(), Some(remote.port()))
            };
            wanted.entry(key).or_default()[*state] += 1;
            all[*state] += 1;
        }
        assert_eq!(groups(&snapshot, netns), wanted, "{}", namespace.name);
        let [known] = of_netns(&snapshot, "namespaces", netns)[..] else { panic!("{}", snapshot["namespaces"]) };
        assert_eq!(counts(&known["sockets"]), all, "{}", namespace.name);
        expect(known, &json!({ "name": namespace.name, "own": false, "tcp_tw_reuse": 0, "time_wait_overflow": 0 }));
        checked += all[0];
        // Ports in use, for each destination.
        let mut in_use: BTreeMap<SocketAddr, BTreeSet<u16>> = BTreeMap::new();
        for (_, local, remote) in sockets.iter().filter(|(_, local, _)| ![SERVER, OTHER].contains(&local.port())) {
            in_use.entry(*remote).or_default().insert(local.port());
        }
        let got: BTreeMap<SocketAddr, u64> = of_netns(&snapshot, "pressure", netns)
            .into_iter()
            .map(|one| {
                let to = one["to"].as_str().expect("an address").parse().expect("an address");
                (to, one["used"].as_u64().expect("a number"))
            })
            .collect();
        let wanted: BTreeMap<SocketAddr, u64> =
            in_use.into_iter().map(|(to, ports)| (to, ports.len() as u64)).collect();
        assert_eq!(got, wanted, "{}", namespace.name);
    }
    assert_eq!(checked, time_wait as u64);

    // The processes of what is open, and of who listens.
    let process = json!([{ "pid": std::process::id(), "comm": comm_of(std::process::id()) }]);
    let netns = mixed.inode();
    let group = |local_port: Value, peer_port: Value| {
        of_netns(&snapshot, "groups", netns)
            .into_iter()
            .find(|group| group["local_port"] == local_port && group["peer_port"] == peer_port)
            .unwrap_or_else(|| panic!("{}", snapshot["groups"]))
    };
    expect(
        group(json!(OTHER), Value::Null),
        &json!({
            "processes": process, "unknown_process": 0, "listener": process[0],
            "sockets": { "established": 7, "close_wait": 5, "fin_wait2": 0 },
        }),
    );
    expect(
        group(Value::Null, json!(OTHER)),
        &json!({
            "processes": process, "unknown_process": 0, "listener": null,
            "sockets": { "established": 7, "close_wait": 0, "fin_wait2": 5 },
        }),
    );
    // 4,400 of 6,000 ports, taken within seconds.
    let [pressed] = of_netns(&snapshot, "pressure", clients.inode())[..] else { panic!("{}", snapshot["pressure"]) };
    expect(
        pressed,
        &json!({ "from": "127.0.0.1", "to": format!("127.0.0.1:{SERVER}"), "ports": 6_000, "reusable": 0 }),
    );
    let text = run(tracer().arg("snapshot"));
    assert!(text.contains(&format!("to 127.0.0.1:{SERVER} from 127.0.0.1 in ")), "{text}");
    drop((open, listeners));
}

/// The snapshot's one destination in a namespace.
fn pressed(netns: u64) -> Value {
    let snapshot = snapshot();
    let [one] = of_netns(&snapshot, "pressure", netns)[..] else { panic!("{}", snapshot["pressure"]) };
    one.clone()
}

#[test]
fn says_when_connect_fails() {
    const PORTS: usize = 200;
    // The rate is that of the last five seconds: on a busy machine they may have passed before it is looked at.
    let (namespace, listener, in_range, half) = (0..5)
        .find_map(|attempt| {
            let namespace = namespace(&format!("pressure{attempt}"), "30000 30203");
            let listener = namespace.enter(|| {
                set("ip_local_reserved_ports", "30100-30102,40000");
                listen(Ipv4Addr::LOCALHOST.into(), SERVER)
            });
            // In the range, so it is one less.
            let in_range = namespace.enter(|| listen(Ipv4Addr::LOCALHOST.into(), 30_050));
            let began = Instant::now();
            namespace.enter(|| close(&listener, PORTS / 2, true));
            let half = pressed(namespace.inode());
            (began.elapsed() < Duration::from_secs(4)).then_some((namespace, listener, in_range, half))
        })
        .expect("one of five is in time");
    let netns = namespace.inode();
    let to = listener.local_addr().expect("bound");
    let connects = || namespace.enter(|| TcpStream::connect(to)).map_err(|error| error.kind());
    expect(&half, &json!({ "used": PORTS / 2, "time_wait": PORTS / 2, "ports": PORTS, "share": 0.5, "reusable": 0 }));
    assert!(half["fails_in_s"].as_f64().is_some_and(|seconds| seconds > 0.0 && seconds <= 60.0), "{half:#}");

    namespace.enter(|| close(&listener, PORTS / 2, true));
    expect(&pressed(netns), &json!({ "used": PORTS, "share": 1.0, "fails_in_s": 0.0 }));
    let text = run(tracer().arg("snapshot"));
    assert!(text.contains(": 200 of 200 ports (100 %), 200 in TIME_WAIT"), "{text}");
    assert!(text.contains("connect() fails now"), "{text}");
    assert_eq!(connects().expect_err("there is no port"), io::ErrorKind::AddrNotAvailable);

    // Ports in TIME_WAIT for a second are free again for the same destination.
    namespace.enter(|| set("tcp_tw_reuse", "2"));
    wait_until("all to be reusable", || pressed(netns)["reusable"] == PORTS);
    expect(&pressed(netns), &json!({ "used": PORTS, "share": 0.0, "fails_in_s": null }));
    let client = connects().expect("one is reused");
    expect(&pressed(netns), &json!({ "used": PORTS, "time_wait": PORTS - 1, "reusable": PORTS - 1 }));
    drop((client, in_range));
}

#[test]
fn a_full_time_wait_table_and_a_namespace_without_a_name() {
    const ROOM: usize = 5;
    let namespace = namespace("nameless", "30000 30999");
    let listener = namespace.enter(|| {
        set("tcp_max_tw_buckets", &ROOM.to_string());
        let listener = listen(Ipv4Addr::LOCALHOST.into(), SERVER);
        close(&listener, ROOM + 3, true);
        listener
    });
    let netns = namespace.inode();
    // Nothing but a file of this process keeps it.
    let held = File::open(format!("/run/netns/{}", namespace.name)).expect("it exists");
    drop(namespace);
    let snapshot = snapshot();
    let [known] = of_netns(&snapshot, "namespaces", netns)[..] else { panic!("{}", snapshot["namespaces"]) };
    expect(
        known,
        &json!({
            "name": null, "tcp_max_tw_buckets": ROOM, "time_wait_overflow": 3, "time_wait_full_in_s": 0.0,
            "sockets": { "time_wait": ROOM },
        }),
    );
    drop((held, listener));
}

#[test]
fn without_root_it_shows_its_own_namespace_and_says_what_is_missing() {
    // Where an unprivileged user can reach it.
    let directory = tempfile::tempdir().expect("a directory can be made");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let binary = directory.path().join("tracer");
    copy_executable(tracer().get_program(), &binary);
    let namespace = namespace("stranger", "30000 30999");
    let output = Command::new(binary).args(["snapshot", "--json"]).uid(65534).gid(65534).output().expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let snapshot: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    expect(&snapshot["namespaces"][0], &json!({ "own": true }));
    assert!(of_netns(&snapshot, "namespaces", namespace.inode()).is_empty(), "{}", snapshot["namespaces"]);
    let degraded = snapshot["degraded"].to_string();
    assert!(degraded.contains("not seen: network namespace") && degraded.contains("run it as root"), "{degraded}");
    assert!(stderr.contains("run it as root"), "{stderr}");
}

#[test]
fn in_a_container_it_says_that_it_does_not_see_the_host() {
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--mount-proc"]).arg(tracer().get_program()).args(["snapshot", "--json"]);
    let snapshot: Value = serde_json::from_str(&run(&mut unshare)).expect("JSON");
    let degraded = snapshot["degraded"].to_string();
    assert!(degraded.contains("pid namespace") && degraded.contains("--pid=host"), "{degraded}");
}

#[test]
fn a_closed_stdout_is_success_for_a_snapshot() {
    for format in [&["--json"][..], &[]] {
        let mut child = Guard(tracer().arg("snapshot").args(format).stdout(Stdio::piped()).spawn().expect("it starts"));
        drop(child.0.stdout.take());
        assert_eq!(child.wait().code(), Some(0));
    }
}
