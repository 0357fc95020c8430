//! Very many connections, and addresses that are used again at once.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket, sockopt};
use rustix::process::Signal;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::rig::{
    Guard, Listener, Namespace, Tracer, expect, free_port, ok, port_of, resident_kib, tracer, wait_until,
};

/// What is looked at of a record; of so many the whole would be too much.
#[derive(Deserialize)]
struct Record {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    local: String,
    #[serde(default)]
    remote: String,
    #[serde(default)]
    closed_by: String,
    /// A word; of the summary, whether it is the last one.
    #[serde(default, rename = "final")]
    fate: serde_json::Value,
    #[serde(default)]
    states: serde_json::Value,
    #[serde(default)]
    lost: u64,
}

/// Open connections of one process: both ends are its own, and it may have 20,000 files or more.
const EACH: usize = 9_500;
const PROCESSES: usize = 11;
const OPEN: usize = EACH * PROCESSES;
/// Closed one after another before they are waited for: less than the ring buffer holds.
const BATCH: usize = 2_500;

/// Opens connections to itself, with a request on each, and closes as many of them as each line of its input says.
const HOLDER: &str = "
import socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
listener = socket.create_server(('127.0.0.1', port))
pairs = []
for _ in range(count):
    client = socket.create_connection(('127.0.0.1', port))
    server, _ = listener.accept()
    client.sendall(b'GET / HTTP/1.1\\r\\nHost: test\\r\\n\\r\\n')
    server.recv(100)
    pairs.append((client, server))
print('open', flush=True)
for line in sys.stdin:
    for client, server in pairs[:int(line)]:
        client.close()
        server.close()
    del pairs[:int(line)]
";

/// Has `python` open that many connections on each port, all at the same time, and waits until all are open.
fn hold(ports: &[u16], python: impl Fn() -> Command) -> Vec<Guard> {
    let start = |port: &u16| {
        let mut command = python();
        command.args(["-c", HOLDER, &port.to_string(), &EACH.to_string()]);
        Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts"))
    };
    let mut holders: Vec<Guard> = ports.iter().map(start).collect();
    for holder in &mut holders {
        let mut line = String::new();
        BufReader::new(holder.0.stdout.take().expect("piped")).read_line(&mut line).expect("it prints");
        assert_eq!(line, "open\n");
    }
    holders
}

#[test]
fn a_hundred_thousand_connections_open_at_once() {
    let namespace = Namespace::new("scale");
    namespace.enter(|| {
        let set = |name: &str, value: &str| {
            fs::write(format!("/proc/sys/net/ipv4/{name}"), value).expect("we are root");
        };
        // Far from full, so that no TIME_WAIT is in doubt.
        set("tcp_max_tw_buckets", "1000000");
        set("ip_local_port_range", "30000 60000");
    });
    let ports: Vec<u16> = (0..PROCESSES).map(|_| free_port()).collect();
    // Elsewhere somebody may have one of so many ports, too.
    let mut child = tracer()
        .args(["run", "--json", "--netns", &namespace.inode().to_string()])
        .args(ports.iter().flat_map(|port| ["--port".to_owned(), port.to_string()]))
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut start = String::new();
    stdout.read_line(&mut start).expect("it prints");
    assert!(start.contains(r#""type":"start""#), "{start}");
    let process = Guard(child);
    let before_kib = resident_kib(process.id());

    // And how many were lost, once the summary has come.
    type Records = HashMap<(String, String), Record>;
    let records: Mutex<(Records, Option<u64>)> = Mutex::default();
    let seen = || records.lock().expect("no panic").0.len();
    std::thread::scope(|scope| {
        // Ended here, too, if something below fails: the reader of its output is waited for.
        let mut process = process;
        let stdout = &mut stdout;
        let records = &records;
        scope.spawn(move || {
            for line in stdout.lines() {
                let record: Record = serde_json::from_str(&line.expect("UTF-8")).expect("JSON");
                let mut records = records.lock().expect("no panic");
                match record.kind.as_str() {
                    "close" => {
                        let twice = records.0.insert((record.local.clone(), record.remote.clone()), record);
                        assert!(twice.is_none(), "one socket, two records");
                    }
                    "summary" => records.1 = Some(record.lost),
                    _ => {}
                }
            }
        });

        let mut holders = hold(&ports, || {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &namespace.name, "python3"]);
            command
        });
        assert_eq!(seen(), 0, "all are open");
        // What is open is known in the kernel only.
        let grown_kib = resident_kib(process.id()).saturating_sub(before_kib);
        assert!(grown_kib < 4 << 10, "{grown_kib} KiB more for {OPEN} connections");

        let mut closed = 0;
        for holder in &mut holders {
            let mut left = EACH;
            while left > 0 {
                let batch = BATCH.min(left);
                writeln!(holder.0.stdin.as_mut().expect("piped"), "{batch}").expect("it reads");
                left -= batch;
                closed += 2 * batch;
                wait_until(&format!("{closed} records"), || seen() >= closed);
            }
        }
        process.signal(Signal::INT);
        assert!(process.wait().success());
    });

    let (records, lost) = records.into_inner().expect("no panic");
    assert_eq!((records.len(), lost), (2 * OPEN, Some(0)));
    let mut otherwise = 0;
    for ((local, _), record) in &records {
        let is_server = ports.iter().any(|port| local.ends_with(&format!(":{port}")));
        let [client, server] = [("local", "time_wait"), ("remote", "closed")];
        let (wanted, reverse) = if is_server { (server, client) } else { (client, server) };
        let got = (record.closed_by.as_str(), record.fate.as_str().unwrap_or_default());
        let states = record.states.to_string();
        // One process closes both ends, one right after the other: where it is kept from it, and softirq comes late, FINs cross.
        // Or another test's tracer, which walks over open files at its start, holds the client's as it is closed.
        if (got.0 == "both" && states.contains("CLOSING"))
            || (got == reverse && states.contains("CLOSE_WAIT") != is_server)
        {
            otherwise += 1;
            continue;
        }
        assert_eq!(got, wanted, "{local} - {}: {states}", record.remote);
    }
    assert!(otherwise < records.len() / 1000, "{otherwise} of {} not in the usual order", records.len());
}

/// Many times as many records as the ring buffer holds, much faster than they can be turned into lines: processes are killed
/// that have both ends of them open.
#[test]
fn of_all_that_ends_at_once_nothing_is_lost() {
    const AT_ONCE: usize = 4;
    // Where other tests keep tracer from a processor for long, some are lost all the same.
    const ATTEMPTS: usize = 3;
    let mut lost = Vec::new();
    while lost.len() < ATTEMPTS {
        let ports: Vec<u16> = (0..AT_ONCE).map(|_| free_port()).collect();
        // Nobody is as fast as a file.
        let output = tempfile::NamedTempFile::new().expect("a file");
        let mut process = tracer();
        process.args(["run", "--json"]).stdout(output.reopen().expect("it is open"));
        process.args(ports.iter().flat_map(|port| ["--port".to_owned(), port.to_string()]));
        let mut process = Guard(process.spawn().expect("it starts"));
        let read = || fs::read_to_string(output.path()).expect("UTF-8");
        wait_until("the start line", || read().ends_with('\n'));
        let mut holders = hold(&ports, || Command::new("python3"));
        for holder in &holders {
            holder.signal(Signal::KILL);
        }
        for holder in &mut holders {
            holder.wait();
        }
        process.signal(Signal::INT);
        assert!(process.wait().success());
        let said = read();
        let cookie = |line: &str| Some(line.split_once(r#""cookie":"#)?.1.split_once(',')?.0.to_owned());
        let closes = said.lines().filter(|line| line.starts_with(r#"{"type":"close""#));
        let sockets: HashSet<String> = closes.clone().map(|line| cookie(line).expect("a cookie")).collect();
        let closes = closes.count();
        assert_eq!(sockets.len(), closes, "no end is told twice");
        let summary: Value = serde_json::from_str(said.lines().last().expect("a summary")).expect("JSON");
        expect(&summary, &json!({ "type": "summary", "closes": closes, "ledger": { "balanced": true } }));
        let missed = summary["lost"].as_u64().expect("a number");
        // The last ends may come a moment later, or on top of a task that the kernel hides.
        let ends = 2 * EACH * AT_ONCE;
        assert!((ends - ends / 100..=ends).contains(&(closes + missed as usize)), "{closes} and {missed} of {ends}");
        if missed == 0 {
            return;
        }
        lost.push(missed);
    }
    panic!("lost: {lost:?}");
}

/// As often as the same addresses are used.
const AGAIN: usize = 1_000;

/// Connects from a port of our choice, which may still be in use by a TIME_WAIT socket.
fn connect_from(port: u16, to: SocketAddr) -> TcpStream {
    let mut stream = None;
    wait_until("the last socket to let go of the address", || {
        let fd = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        sockopt::set_socket_reuseaddr(&fd, true).expect("it can be set");
        bind(&fd, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).expect("it may be bound again");
        match connect(&fd, &to) {
            Ok(()) => stream = Some(TcpStream::from(fd)),
            // The ACK that ends LAST_ACK may be on its way.
            Err(Errno::ADDRNOTAVAIL) => {}
            Err(error) => panic!("it listens: {error}"),
        }
        stream.is_some()
    });
    stream.expect("it was waited for")
}

/// The server closes first and is left in TIME_WAIT, which gives way to the next SYN from the same port at once.
#[test]
fn the_same_addresses_again_and_again() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.port));
    let client_port = free_port();
    for n in 0..AGAIN {
        let mut client = connect_from(client_port, to);
        let (mut server, _) = listener.accept();
        let request = format!("GET /{n} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).expect("it is open");
        server.read_exact(&mut vec![0; request.len()]).expect("it came");
        server.write_all(ok("").as_bytes()).expect("it is open");
        drop(server);
        client.read_to_end(&mut Vec::new()).expect("the server has closed");
        drop(client);
    }
    // Not those of attempts that found the address in use.
    let closes = tracer.wait_for_closes(2 * AGAIN, |close| !close["http"].is_null());
    assert_eq!(closes.len(), 2 * AGAIN);
    let cookies: HashSet<_> = closes.iter().map(|close| close["cookie"].as_u64().expect("a cookie")).collect();
    assert_eq!(cookies.len(), 2 * AGAIN, "each is a socket of its own");
    for end in [listener.port, client_port] {
        let targets: HashSet<_> = closes
            .iter()
            .filter(|close| port_of(close, "local") == Some(end))
            .map(|close| {
                let (by, fate) = if end == client_port { ("remote", "closed") } else { ("local", "time_wait") };
                let wanted = json!({
                    "closed_by": by, "cause": "request_close", "http": { "requests": 1, "responses": 1 },
                });
                expect(close, &wanted);
                // If its FIN_WAIT2 was a mini-socket, TIME_WAIT may have given way before it was asked for.
                let gone = close["final"] == "unknown" && close["final_source"] == "inferred";
                assert!(close["final"] == fate || end != client_port && gone, "{close:#}");
                close["http"]["target"].as_str().expect("a target").to_owned()
            })
            .collect();
        assert_eq!(targets, (0..AGAIN).map(|n| format!("/{n}")).collect(), "each exchange belongs to one connection");
    }
    tracer.stop();
}
