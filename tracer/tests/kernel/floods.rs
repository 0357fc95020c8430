//! Floods: what strangers can send without end takes bounded memory, and makes no answer wrong.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{ChildStdout, Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::peer::{SYN, Segment, Wire, receive};
use crate::rig::{
    Guard, Namespace, PATIENCE, Tracer, anonymous_kib, expect, free_port, get, ok, resident_kib, run, tracer,
    wait_until,
};
use crate::wire::answer_and_close;

/// Connects from ever another address, and closes; waits when half of them are done.
const CROWD: &str = "
import socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
listener = socket.create_server(('0.0.0.0', port))
for n in range(count):
    client = socket.socket()
    client.bind((f'127.{1 + (n >> 14)}.{(n >> 7) & 127}.{1 + (n & 127)}', 0))
    client.connect(('127.0.0.1', port))
    server, _ = listener.accept()
    client.sendall(b'GET /%d HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n' % n)
    server.recv(200)
    server.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n')
    server.close()
    client.recv(200)
    client.close()
    if 2 * (n + 1) == count:
        print('half', flush=True)
        sys.stdin.readline()
";

/// Sends heads that never end, a byte at a time, on all connections in turn.
const SLOW: &str = "
import socket, sys
port, count = int(sys.argv[1]), int(sys.argv[2])
listener = socket.create_server(('127.0.0.1', port))
pairs = []
for _ in range(count):
    client = socket.create_connection(('127.0.0.1', port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server, _ = listener.accept()
    pairs.append((client, server))
for byte in b'GET /slow HTTP/1.1\\r\\nCookie: a':
    for client, _ in pairs:
        client.send(bytes([byte]))
print('slow', flush=True)
sys.stdin.readline()
for client, server in pairs:
    server.recv(200)
    client.close()
    server.close()
";

/// A tracer of one port in one namespace, that prints to a pipe.
fn start(namespace: &Namespace, port: u16) -> (Guard, BufReader<ChildStdout>) {
    start_with(namespace, port, &[])
}

fn start_with(namespace: &Namespace, port: u16, args: &[&str]) -> (Guard, BufReader<ChildStdout>) {
    let mut command = tracer();
    command.args(["run", "--json", "--netns", &namespace.inode().to_string(), "--port", &port.to_string()]).args(args);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let process = Guard(child);
    let mut start = String::new();
    stdout.read_line(&mut start).expect("it prints");
    assert!(start.contains(r#""type":"start""#), "{start}");
    (process, stdout)
}

fn script(namespace: &Namespace, script: &str, port: u16, count: usize) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &namespace.name, "python3", "-c", script, &port.to_string(), &count.to_string()]);
    command
}

/// Runs [`SLOW`] up to where all heads have begun; a line on its stdin ends it.
fn slow(namespace: &Namespace, port: u16, count: usize) -> Guard {
    let mut command = script(namespace, SLOW, port, count);
    let mut slow = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts"));
    let mut line = String::new();
    BufReader::new(slow.0.stdout.take().expect("piped")).read_line(&mut line).expect("it prints");
    assert_eq!(line, "slow\n");
    slow
}

/// Reads all that a tracer prints up to its summary, and gives each close to `each`.
///
/// It is understood only when all is there: what waits for a slow reader takes memory of tracer.
fn read(mut stdout: BufReader<ChildStdout>, mut each: impl FnMut(&Value)) -> Value {
    let mut last = Value::Null;
    let mut printed = String::new();
    stdout.read_to_string(&mut printed).expect("UTF-8");
    for line in printed.lines() {
        last = serde_json::from_str(line).expect("JSON");
        if last["type"] == "close" {
            each(&last);
        }
    }
    assert_eq!(last["type"], "summary");
    assert_eq!(last["ledger"]["balanced"], true, "every close is accounted for: {}", last["ledger"]);
    last
}

#[test]
fn a_crowd_of_peers_takes_bounded_memory() {
    const COUNT: usize = 20_000;
    let namespace = Namespace::new("crowd");
    namespace.enter(|| {
        fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "1000000").expect("we are root");
    });
    let port = free_port();
    let (process, stdout) = start(&namespace, port);
    let before_kib = resident_kib(process.id());
    let (summary, closes, wrong) = std::thread::scope(|scope| {
        let mut process = process;
        let reader = scope.spawn(move || {
            let (mut closes, mut wrong) = (0, Vec::new());
            let summary = read(stdout, |close| {
                closes += 1;
                if close["cause"] != "request_close" {
                    wrong.push(close.clone());
                }
            });
            (summary, closes, wrong)
        });
        let mut command = script(&namespace, CROWD, port, COUNT);
        let mut crowd = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts"));
        let mut line = String::new();
        BufReader::new(crowd.0.stdout.take().expect("piped")).read_line(&mut line).expect("it prints");
        assert_eq!(line, "half\n");
        // By then the ring buffer has been used up to its end, and there are as many groups as may be.
        let half_kib = resident_kib(process.id());
        writeln!(crowd.0.stdin.as_mut().expect("piped")).expect("it reads");
        assert!(crowd.wait().success());
        let after_kib = resident_kib(process.id());
        eprintln!(
            "{COUNT} connections, addresses: {before_kib} KiB before, {half_kib} after half, {after_kib} after all"
        );
        // Lines that wait to be written vary by some MiB. A group of up to 2 KiB for each address would take far more.
        assert!(after_kib.saturating_sub(half_kib) < 8 << 10, "{half_kib} KiB, then {after_kib} KiB");
        process.signal(Signal::INT);
        assert!(process.wait().success());
        reader.join().expect("reading does not fail")
    });
    // Each end has its line, or is counted as lost.
    assert_eq!(closes + summary["lost"].as_u64().expect("a number"), 2 * COUNT as u64, "{closes} closes");
    assert_eq!(wrong.len(), 0, "{:#?}", wrong.first());
    assert!(summary["groups"].as_array().expect("a list").len() <= 1_000);
}

/// Handshakes that nobody completes are no connections: nothing is remembered of them, and nothing told. Where the kernel answers
/// with cookies, because there are too many, a connection among them is told as ever.
#[test]
fn a_flood_of_syns_takes_nothing() {
    const COUNT: u16 = 20_000;
    const FIRST: u16 = 40_000;
    let wire = Wire::new("syns");
    let (listener, port) = wire.listen();
    let tracer = Tracer::on_port(port);
    let before_kib = anonymous_kib(tracer.pid());
    let mut flood = wire.client(port);
    for n in 0..COUNT {
        flood.port = FIRST + n;
        flood.send(Segment { flags: SYN, ..flood.at(-1) });
        wire.discard();
    }
    let (mut server, mut peer) = wire.accepted(&listener);
    let request = get("Connection: close\r\n");
    peer.data(0, &request);
    receive(&mut server, request.len());
    answer_and_close(server, &mut peer, i32::try_from(request.len()).expect("small"), &ok(""));
    expect(
        &tracer.wait_for_close(port, peer.port),
        &json!({ "role": "server", "closed_by": "local", "final": "time_wait", "cause": "request_close" }),
    );
    let after_kib = anonymous_kib(tracer.pid());
    assert!(after_kib.saturating_sub(before_kib) < 1 << 10, "{before_kib} KiB, then {after_kib} KiB");
    let nstat = ["netns", "exec", &wire.namespace.name, "nstat", "-asz", "TcpExtSyncookiesSent"];
    let cookies = run(Command::new("ip").args(nstat));
    let sent = cookies.lines().find_map(|line| line.strip_prefix("TcpExtSyncookiesSent")?.split_whitespace().next());
    eprintln!("{COUNT} SYNs, {sent:?} cookies: {before_kib} KiB before, {after_kib} KiB after");
    assert!(sent.is_some_and(|sent| sent.parse::<u32>().is_ok_and(|sent| sent > 1_000)), "{cookies}");
    assert_eq!(tracer.stop().closes().len(), 1);
}

#[test]
fn heads_that_never_end_take_nothing_of_tracer() {
    const COUNT: usize = 4_000;
    let namespace = Namespace::new("slow");
    let port = free_port();
    let (process, stdout) = start(&namespace, port);
    let before_kib = anonymous_kib(process.id());
    let (summary, ends) = std::thread::scope(|scope| {
        let mut process = process;
        let reader = scope.spawn(move || {
            let mut ends = Vec::new();
            let summary = read(stdout, |close| ends.push(close.clone()));
            (summary, ends)
        });
        let mut slow = slow(&namespace, port, COUNT);
        let after_kib = anonymous_kib(process.id());
        eprintln!("{COUNT} unfinished heads: {before_kib} KiB before, {after_kib} KiB after");
        // All that is known of them is in the kernel, and of a fixed size for each socket.
        assert!(after_kib.saturating_sub(before_kib) < 1 << 10, "{before_kib} KiB, then {after_kib} KiB");
        writeln!(slow.0.stdin.as_mut().expect("piped")).expect("it reads");
        wait_until("its end", || slow.0.try_wait().expect("it is our child").is_some());
        process.signal(Signal::INT);
        assert!(process.wait().success());
        reader.join().expect("reading does not fail")
    });
    assert_eq!((ends.len(), summary["lost"].as_u64()), (2 * COUNT, Some(0)));
    let finished = ends.iter().find(|end| end["http"]["requests"].as_u64().is_some_and(|requests| requests > 0));
    assert_eq!(finished, None, "a head that has not ended is no request");
}

/// What is charged to each socket of a namespace besides its queues, bytes: BPF programs' storage, most of all. By local and remote
/// address.
pub(crate) fn charged(namespace: &Namespace) -> HashMap<(String, String), u64> {
    let listed =
        run(Command::new("ip").args(["netns", "exec", &namespace.name, "ss", "-HtnmO", "state", "established"]));
    let socket = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        // `skmem:(r0,rb131072,t0,tb46080,f0,w0,o688,bl0,d0)`
        let memory = words.iter().find_map(|word| word.strip_prefix("skmem:("))?;
        let other = memory.split(',').find_map(|part| part.strip_prefix('o')?.parse().ok())?;
        Some(((words[2].to_owned(), words[3].to_owned()), other))
    };
    listed.lines().map(|line| socket(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

/// By the kernel's own accounts: what sockets are charged with tracer and without, where they have no slots.
#[test]
fn a_flood_takes_a_fixed_size_of_kernel_memory_for_each_socket() {
    const COUNT: usize = 500;
    /// A state, and the list of all states of a socket, which differs by the kernel: the first for each tracer, the second but once.
    const MOST: u64 = 512 + 192;
    let namespace = Namespace::new("memory");
    let mut seen = Vec::new();
    // Other tests may begin or end to trace everything meanwhile: then once more.
    for _ in 0..5 {
        let port = free_port();
        let (process, stdout) = start_with(&namespace, port, &["--slots", "1"]);
        let (with, without) = std::thread::scope(|scope| {
            let mut process = process;
            let reader = scope.spawn(move || read(stdout, |_| {}));
            let mut slow = slow(&namespace, port, COUNT);
            let with = charged(&namespace);
            process.signal(Signal::INT);
            assert!(process.wait().success());
            reader.join().expect("reading does not fail");
            // Its map goes a moment later.
            let mut without = charged(&namespace);
            wait_until("the sockets to be free of it", || {
                without = charged(&namespace);
                // One has the slot.
                without.iter().filter(|(socket, charged)| **charged >= with[*socket]).count() <= 1
            });
            writeln!(slow.0.stdin.as_mut().expect("piped")).expect("it reads");
            wait_until("its end", || slow.0.try_wait().expect("it is our child").is_some());
            (with, without)
        });
        assert_eq!((with.len(), without.len()), (2 * COUNT, 2 * COUNT));
        let each = with.iter().map(|(socket, charged)| charged - without[socket]);
        let (least, most) = (each.clone().min().expect("sockets"), each.max().expect("sockets"));
        eprintln!("{COUNT} connections: each socket is charged {least} to {most} bytes for tracer");
        seen.push((least, most));
        if most <= MOST {
            return;
        }
    }
    panic!("more than {MOST} bytes for a socket: {seen:?}");
}

/// While one connects, its own port is not known, and might be the one asked for.
#[test]
fn what_a_port_leaves_out_takes_no_memory_once_it_is_connected() {
    let namespace = Namespace::new("left-out");
    let mut seen = Vec::new();
    // Other tests may begin or end to trace everything meanwhile: then once more.
    for _ in 0..10 {
        let (asked, other) = (free_port(), free_port());
        let (mut process, stdout) = start(&namespace, asked);
        let slow = slow(&namespace, other, 20);
        let with = charged(&namespace);
        process.signal(Signal::INT);
        assert!(process.wait().success());
        read(stdout, |close| panic!("it was left out: {close:#}"));
        // Its map goes a moment later.
        std::thread::sleep(*PATIENCE / 20);
        let without = charged(&namespace);
        drop(slow);
        assert_eq!((with.len(), without.len()), (40, 40));
        if with == without {
            return;
        }
        seen.push((with, without));
    }
    panic!("with tracer, and without: {seen:?}");
}
