//! The slots that young sockets have, and the storage of the others: what is known of a socket is the same in either, and stays its own
//! when it moves from one to the other, or when another socket gets the slot.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::close_wait::wait_for_close_wait;
use crate::features::{OPEN_FILES, distrusts_open_files, lacks};
use crate::floods::charged;
use crate::rig::{Guard, Listener, Namespace, PATIENCE, Pair, Tracer, abort, expect, get, ok, states_of};

/// Longer than a slot is kept for a socket that has ended, and than it takes until one that is idle leaves its slot.
const GRACE: Duration = Duration::from_millis(400);
const IDLE: Duration = Duration::from_secs(2);

fn tracer(listener: &Listener, args: &[&str]) -> Tracer {
    // With such a time the walks come often.
    let usual = ["--close-wait-after", "1s", "--port", &listener.port.to_string()];
    Tracer::start(&[usual.as_slice(), args].concat())
}

fn exchange(pair: &mut Pair, headers: &str) {
    pair.request(get(headers));
    pair.respond(ok(""));
}

/// What both ends say of a connection with two exchanges and some idle time between them.
fn expect_both_exchanges(tracer: &Tracer, (server, client): (u16, u16)) {
    let http =
        json!({ "requests": 2, "responses": 2, "method": "GET", "target": "/path", "request_connection": "close" });
    let pid = std::process::id();
    let of_both = json!({
        "how": "fin", "cause": "request_close", "http": http, "process": { "pid": pid, "source": "read" }, "started_before": false,
    });
    let of_server = tracer.wait_for_close(server, client);
    let of_client = tracer.wait_for_close(client, server);
    expect(&of_server, &of_both);
    expect(&of_client, &of_both);
    expect(&of_server, &json!({ "role": "server", "closed_by": "local", "final": "time_wait" }));
    expect(&of_client, &json!({ "role": "client", "closed_by": "remote", "final": "closed" }));
    assert_eq!(states_of(&of_server), ["ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"], "{of_server:#}");
    assert_eq!(states_of(&of_client), ["SYN_SENT", "ESTABLISHED", "CLOSE_WAIT", "LAST_ACK", "CLOSE"], "{of_client:#}");
}

#[test]
fn what_is_idle_leaves_its_slot_and_takes_all_that_is_known_of_it_along() {
    /// Of storage, which is more; of what else is charged to a socket there is less.
    const STORAGE: u64 = 440;
    if lacks(OPEN_FILES, !distrusts_open_files()) {
        return;
    }
    let mut seen = Vec::new();
    // Other tests may begin or end to trace everything meanwhile: then once more.
    for _ in 0..5 {
        let namespace = Namespace::new("idle");
        let listener = namespace.enter(Listener::new);
        let tracer = tracer(&listener, &[]);
        let mut idle: Vec<_> = (0..8).map(|_| namespace.enter(|| listener.connect())).collect();
        let mut busy = namespace.enter(|| listener.connect());
        idle.iter_mut().chain([&mut busy]).for_each(|pair| exchange(pair, ""));
        let young = charged(&namespace);
        let since = Instant::now();
        let mut exchanges = 1;
        let mut old = charged(&namespace);
        // The more files others have open, the fewer walks there are.
        while since.elapsed() < 3 * *PATIENCE
            && old.iter().filter(|(socket, now)| **now >= young[*socket] + STORAGE).count() < 16
        {
            for _ in 0..10 {
                exchange(&mut busy, "");
                exchanges += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            old = charged(&namespace);
        }
        let busy_ports = (busy.server_port, busy.client_port);
        for pair in &mut idle {
            exchange(pair, "Connection: close\r\n");
        }
        for pair in idle {
            expect_both_exchanges(&tracer, pair.server_closes_first());
        }
        busy.server_closes_first();
        let close = tracer.wait_for_close(busy_ports.0, busy_ports.1);
        expect(&close, &json!({ "http": { "requests": exchanges, "responses": exchanges }, "final": "time_wait" }));
        let run = tracer.stop();
        assert_eq!(run.closes().len(), 18);
        expect(&run.summary, &json!({ "lost": 0, "untracked": 0 }));

        let client = busy_ports.1.to_string();
        let grown: HashMap<_, _> =
            young.iter().map(|(socket, before)| (socket, old[socket].saturating_sub(*before))).collect();
        let (of_busy, of_idle): (Vec<_>, Vec<_>) = grown.into_iter().partition(|((local, remote), _)| {
            [local, remote].iter().any(|end| end.rsplit(':').next() == Some(&client))
        });
        assert_eq!((of_busy.len(), of_idle.len()), (2, 16));
        let (of_busy, of_idle) =
            (of_busy.iter().map(|(_, more)| *more).max(), of_idle.iter().map(|(_, more)| *more).min());
        if of_busy < Some(STORAGE) && of_idle >= Some(STORAGE) {
            return;
        }
        seen.push((of_busy, of_idle));
    }
    panic!("charged more than before, to those that are busy at most, and to those that are idle at least: {seen:?}");
}

/// All but one have storage; which one has the slot changes.
#[test]
fn with_one_slot_all_is_told_of_all() {
    let listener = Listener::new();
    let tracer = tracer(&listener, &["--slots", "1"]);
    let mut pairs: Vec<_> = (0..20).map(|_| listener.connect()).collect();
    pairs.iter_mut().for_each(|pair| exchange(pair, ""));
    std::thread::sleep(IDLE);
    // Whoever had it is idle.
    let mut young = listener.connect();
    exchange(&mut young, "");
    for pair in pairs.iter_mut().chain([&mut young]) {
        exchange(pair, "Connection: close\r\n");
    }
    for pair in pairs.into_iter().chain([young]) {
        expect_both_exchanges(&tracer, pair.server_closes_first());
    }
    let run = tracer.stop();
    assert_eq!(run.closes().len(), 42);
    expect(&run.summary, &json!({ "lost": 0, "untracked": 0 }));
}

#[test]
fn nothing_is_left_in_a_slot_for_the_next_socket() {
    // One for each end of what is alone: others' sockets are left out before they get one.
    let namespace = Namespace::new("slots");
    let listener = namespace.enter(Listener::new);
    let tracer = tracer(&listener, &["--slots", "2", "--full-target", "--netns", &namespace.inode().to_string()]);
    for _ in 0..3 {
        let mut pair = namespace.enter(|| listener.connect());
        pair.request("POST /secret?of=one HTTP/1.1\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
        pair.respond(ok("Keep-Alive: timeout=5\r\nConnection: keep-alive\r\n"));
        let (server, client) = (pair.server_port, pair.client_port);
        // With data that was not read: the RST comes behind the end of a socket that has a slot.
        pair.request("x");
        pair.client.write_all(b"unread").expect("it is open");
        std::thread::sleep(Duration::from_millis(20));
        drop(pair.server);
        let close = tracer.wait_for_close(server, client);
        expect(&close, &json!({ "closed_by": "local", "how": "rst", "final": "reset" }));
        drop(pair.client);
        tracer.wait_for_close(client, server);
        std::thread::sleep(GRACE);

        let pair = namespace.enter(|| listener.connect());
        let ports = pair.client_closes_first();
        let close = tracer.wait_for_close(ports.1, ports.0);
        expect(
            &close,
            &json!({
                "role": "client", "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "unused", "http": null,
                "process": { "source": "connect" }, "started_before": false,
            }),
        );
        tracer.wait_for_close(ports.0, ports.1);
        std::thread::sleep(GRACE);

        let mut pair = namespace.enter(|| listener.connect());
        exchange(&mut pair, "");
        let (server, client) = (pair.server_port, pair.client_port);
        abort(pair.client);
        let close = tracer.wait_for_close(server, client);
        expect(
            &close,
            &json!({
                "closed_by": "remote", "how": "rst", "http": { "method": "GET", "target": "/path", "request_connection": "absent" },
            }),
        );
        tracer.wait_for_close(client, server);
        std::thread::sleep(GRACE);
    }
    assert_eq!(tracer.stop().closes().len(), 18);
}

#[test]
fn a_leak_is_told_of_what_has_left_its_slot() {
    let listener = Listener::new();
    let tracer = tracer(&listener, &[]);
    let mut pair = listener.connect();
    exchange(&mut pair, "");
    std::thread::sleep(IDLE);
    let (server, client) = (pair.server_port, pair.client_port);
    drop(pair.client);
    let told = wait_for_close_wait(&tracer, server, client);
    let pid = std::process::id();
    let known =
        json!({ "process": { "pid": pid, "source": "read" }, "http": { "requests": 1 }, "started_before": false });
    expect(&told, &known);
    drop(pair.server);
    let close = tracer.wait_for_close(server, client);
    expect(&close, &known);
    expect(&close, &json!({ "cookie": told["cookie"], "closed_by": "remote", "final": "closed" }));
    tracer.stop();
}

/// A socket that connects again has the same cookie.
#[test]
fn a_socket_that_connects_again_begins_anew() {
    const TWICE: &str = "
import ctypes, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
client, address = socket.socket(), ('127.0.0.1', int(sys.argv[1]))
for target in (b'/first', b''):
    client.connect(address)
    if target:
        client.sendall(b'GET ' + target + b' HTTP/1.1\\r\\n\\r\\n')
        client.recv(100)
    print(client.getsockname()[1], flush=True)
    # AF_UNSPEC
    assert libc.connect(client.fileno(), bytes(16), 16) == 0, ctypes.get_errno()
";
    let listener = Listener::new();
    let tracer = tracer(&listener, &[]);
    let mut command = Command::new("python3");
    command.args(["-c", TWICE, &listener.port.to_string()]).stdout(Stdio::piped());
    let client = Guard(command.spawn().expect("python3 starts"));
    let (mut first, first_port) = listener.accept();
    first.read_exact(&mut [0; 23]).expect("a request");
    first.write_all(ok("").as_bytes()).expect("it is open");
    let (second, second_port) = listener.accept();
    let pid = client.id();
    let of_first = tracer.wait_for_close(first_port, listener.port);
    let of_second = tracer.wait_for_close(second_port, listener.port);
    let both = json!({ "role": "client", "closed_by": "local", "how": "rst", "process": { "pid": pid }, "started_before": false });
    expect(&of_first, &both);
    expect(&of_first, &json!({ "http": { "requests": 1, "target": "/first" } }));
    expect(&of_second, &both);
    expect(&of_second, &json!({ "http": null, "cookie": of_first["cookie"] }));
    drop((first, second, client));
    tracer.stop();
}
