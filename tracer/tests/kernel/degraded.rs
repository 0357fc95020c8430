//! Hooks that the kernel does not have: tracing goes on without those that it can do without, says what that costs, and says
//! nothing that only they could have told.
//!
//! Here this kernel has them all. So the binary is shown types without them; or, to see what each costs, the loader is given other
//! tracepoints, which do not exist, for the same programs, and what it gives is joined as `tracer run` does it. (This process is
//! the tracer then, so it is named as nobody's owner.)

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tracer::connection::Connections;
use tracer::decode::{Fact, decode};
use tracer::doctor;
use tracer::event::Event;
use tracer::kernel::{self, Ask, Attached, Hook, Kernel, Place};
use tracer::preflight::{self, Host, exit};
use tracer::process::Processes;
use tracer::time_wait::SockDiag;

use crate::features::{
    OPEN_FILES, STORAGE_WALK, always_degraded, distrusts_open_files, is_without_storage_walk, leaves_storage_walk,
};
use crate::peer::{ACK, FIN, PSH, RST, Segment, Wire};
use crate::rig::{
    Guard, Listener, Namespace, PATIENCE, Tracer, abort, end_of, expect, free_port, get, in_mounts_where, is_socket,
    port_of, tracer,
};
use crate::script::{REQUEST, Script, connect, exchange};

/// Long enough to look once before.
const CLOSE_WAIT_AFTER: Duration = Duration::from_secs(2);

/// As the function that stands for a walk: any program for it is refused, so also the one that tracer has on trial.
const NO_FUNCTION: Option<u32> = Some(0);

/// The hooks of a kernel that lacks `missing`.
fn hooks_without(missing: &[&str]) -> Vec<Hook> {
    let mut hooks = kernel::hooks(false);
    for name in missing {
        let hook = hooks.iter_mut().find(|hook| hook.name == *name).expect("one of the hooks");
        let Place::Tracepoint(_, programs) = hook.place else { panic!("{hook:?} is no tracepoint") };
        hook.place = Place::Tracepoint("tracer_tests_no_such_tracepoint", programs);
    }
    hooks
}

/// Tracing one port without some hooks.
struct Blinded {
    attached: Attached,
    connections: Connections,
    events: Vec<Event>,
}

impl Blinded {
    /// Attaches all but `missing`, of which must be said that it costs `cost`.
    fn without(missing: &str, cost: &str, port: u16) -> Self {
        let blinded = Self::without_all(&[missing], port);
        let said = &blinded.attached.kernel.degraded[0];
        assert!(said.contains(missing) && said.contains(cost) && said.contains("; run a kernel"), "{said}");
        blinded
    }

    fn without_all(missing: &[&str], port: u16) -> Self {
        let host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
        Self::on(&host, missing, vec![port])
    }

    fn on(host: &Host, missing: &[&str], ports: Vec<u16>) -> Self {
        Self::with_slots(host, missing, ports, Ask::usual_slots())
    }

    fn with_slots(host: &Host, missing: &[&str], ports: Vec<u16>, slots: u32) -> Self {
        let ask = Ask { ports, ring_bytes: 1 << 18, close_wait_after: CLOSE_WAIT_AFTER, slots, ..Ask::default() };
        // By a thread of its own: who walks over open files is not taken for the one that closes them.
        let attach = || Kernel::attach_to(&hooks_without(missing), &ask, &host.cgroup, &host.layout).expect("attached");
        let attached = std::thread::scope(|scope| scope.spawn(attach).join().expect("it does not panic"));
        let kernel = &attached.kernel;
        let is_without = !host.layout.bears_storage_walk || is_without_storage_walk();
        let left_alone = is_without.then_some(STORAGE_WALK);
        // Where helpers do not take the sockets of open files, nothing but a cast makes them of use.
        let no_files = (distrusts_open_files() && host.layout.cast.is_none()).then_some(OPEN_FILES);
        let missing: Vec<_> = missing.iter().copied().chain(left_alone).chain(no_files).collect();
        let is_limited = distrusts_open_files() || host.layout.task_file == NO_FUNCTION;
        let limited = usize::from(is_limited && no_files.is_none());
        let wanted: Vec<_> =
            kernel::hooks(false).iter().map(|hook| hook.name).filter(|hook| !missing.contains(hook)).collect();
        assert_eq!(kernel.hooks, wanted);
        assert_eq!(kernel.degraded.len(), missing.len() + limited, "{:?}", kernel.degraded);
        let connections =
            Connections::new(Processes::new(), SockDiag::new().expect("/proc"), false).blind(kernel.blind);
        Self { attached, connections, events: Vec::new() }
    }

    /// Waits for the record of the socket with these ports.
    #[track_caller]
    fn close(&mut self, local: u16, remote: u16) -> Value {
        self.close_that(|event| is_socket(event, local, remote))
    }

    /// Waits for the record that `wanted` holds for.
    #[track_caller]
    fn close_that(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + *PATIENCE;
        loop {
            let now = Instant::now();
            while let Some(record) = self.attached.ring.next() {
                self.connections.fact(decode(&record).expect("a record"), now, &mut self.events);
            }
            self.connections.poll(now, false, &mut self.events);
            let mut events = self.events.iter().map(|event| serde_json::to_value(event).expect("JSON"));
            if let Some(close) = events.find(&wanted) {
                assert_eq!(close["type"], "close");
                return close;
            }
            assert!(now < deadline, "it does not come: {:?}", self.events);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A close by FINs is told in full.
    #[track_caller]
    fn tells_a_close(&mut self, listener: &Listener) {
        let (server, client) = listener.serve_and_close();
        let wanted = json!({ "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "request_close" });
        expect(&self.close(server, client), &wanted);
        let wanted = json!({ "closed_by": "remote", "how": "fin", "final": "closed", "cause": "request_close" });
        expect(&self.close(client, server), &wanted);
    }
}

#[test]
fn without_tcp_receive_reset() {
    let listener = Listener::new();
    let mut tracer = Blinded::without("tp_btf/tcp_receive_reset", "error alone", listener.port);
    tracer.tells_a_close(&listener);
    // The error tells.
    let pair = listener.connect();
    let (server, client) = (pair.server_port, pair.client_port);
    abort(pair.client);
    let wanted = json!({ "closed_by": "remote", "how": "rst", "final": "reset", "cause": "reset_by_peer" });
    expect(&tracer.close(server, client), &wanted);
    let wanted = json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": "reset_by_local" });
    expect(&tracer.close(client, server), &wanted);
    // The same error comes by ICMP.
    let refused = listener.port;
    drop(listener);
    let error = TcpStream::connect(("127.0.0.1", refused)).expect_err("nobody listens");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    // Its own port is not known, but it never was established.
    let close =
        tracer.close_that(|event| event["states"][1]["state"] == "CLOSE" && port_of(event, "remote") == Some(refused));
    let wanted = json!({ "closed_by": "unobserved", "how": "unobserved", "final": "unknown", "cause": "unknown" });
    expect(&close, &wanted);
}

#[test]
fn without_tcp_send_reset() {
    let listener = Listener::new();
    let mut tracer = Blinded::without("tp_btf/tcp_send_reset", "follows the end of a socket", listener.port);
    tracer.tells_a_close(&listener);
    // Before any FIN only a RST ends it.
    let pair = listener.connect();
    let (server, client) = (pair.server_port, pair.client_port);
    abort(pair.server);
    expect(&tracer.close(server, client), &json!({ "closed_by": "local", "how": "rst", "cause": "reset_by_local" }));
    expect(&tracer.close(client, server), &json!({ "closed_by": "remote", "how": "rst", "cause": "reset_by_peer" }));
    // After one, with unread data, the RST comes when the socket has ended.
    let mut pair = listener.connect();
    pair.server.shutdown(Shutdown::Write).expect("open");
    end_of(&mut pair.client);
    pair.client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("open");
    let (server, client) = (pair.server_port, pair.client_port);
    pair.server.read_exact(&mut [0]).expect("it has come");
    drop(pair.server);
    let wanted = json!({ "closed_by": "local", "how": "unobserved", "final": "unknown", "cause": "unknown" });
    expect(&tracer.close(server, client), &wanted);
    // Its peer has the RST.
    expect(&tracer.close(client, server), &json!({ "closed_by": "remote", "how": "rst", "cause": "reset_by_peer" }));
}

/// `tracer run` as it is, where the kernel's types have a tracepoint by another name.
fn where_there_is_no(tracepoint: &str, directory: &Path) -> Command {
    let (name, types) = (format!("btf_trace_{tracepoint}"), directory.join(tracepoint));
    let mut bytes = fs::read("/sys/kernel/btf/vmlinux").expect("it has types");
    let at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).expect("this kernel has it");
    bytes[at + name.len() - 1] = b'_';
    fs::write(&types, bytes).expect("it is ours");
    in_mounts_where(&format!("mount --bind {} /sys/kernel/btf/vmlinux", types.display()), &tracer())
}

#[test]
fn it_runs_without_a_hook_and_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    for tracepoint in ["tcp_send_reset", "tcp_receive_reset", "tcp_rcv_space_adjust", "sched_process_exit"] {
        let listener = Listener::new();
        let options = ["--port", &listener.port.to_string(), "--strict"];
        let tracer = Tracer::start_by(where_there_is_no(tracepoint, directory.path()), &options);
        let start = tracer.events()[0].clone();
        let hook = format!("tp_btf/{tracepoint}");
        assert!(!start["hooks"].as_array().expect("a list").contains(&json!(hook)), "{start:#}");
        let degraded = start["degraded"].as_array().expect("a list");
        assert!(degraded.iter().any(|said| said.to_string().contains(&format!("without {hook} "))), "{start:#}");
        let (server, client) = listener.serve_and_close();
        let wanted = json!({ "closed_by": "local", "how": "fin", "final": "time_wait", "cause": "request_close" });
        expect(&tracer.wait_for_close(server, client), &wanted);
        let run = tracer.stop();
        assert_eq!(run.summary["ledger"]["balanced"], true, "{:#}", run.summary);
    }
}

/// Segment by segment: the process has closed, the peer has not acknowledged that, and a RST of either side comes.
#[test]
fn resets_after_our_close_without_their_hooks() {
    const RECEIVE: &str = "tp_btf/tcp_receive_reset";
    const SEND: &str = "tp_btf/tcp_send_reset";
    let wire = Wire::new("blind");
    let reset_by = |cause: &str| json!({ "closed_by": "local", "how": "rst", "final": "reset", "cause": cause });
    let unobserved = json!({ "closed_by": "local", "how": "unobserved", "final": "unknown", "cause": "unknown" });
    let (by_local, by_peer, by_somebody) = (reset_by("reset_by_local"), reset_by("reset_by_peer"), reset_by("unknown"));
    let cases: [(&[&str], _); 4] = [
        (&[], [&by_local, &by_local, &by_peer]),
        (&[RECEIVE], [&by_somebody, &by_local, &by_somebody]),
        (&[SEND], [&by_local, &unobserved, &by_peer]),
        (&[RECEIVE, SEND], [&by_somebody, &unobserved, &by_somebody]),
    ];
    for (missing, [late, late_with_ack, reset]) in cases {
        let (listener, port) = wire.listen();
        let mut tracer = Blinded::without_all(missing, port);
        let closed = || {
            let (server, mut peer) = wire.accepted(&listener);
            drop(server);
            peer.wait_for("our FIN", |segment| segment.has(FIN));
            peer
        };
        // Late data, which is answered by a RST.
        let mut peer = closed();
        let ack = peer.ack.wrapping_sub(1);
        peer.send(Segment { ack, flags: ACK | PSH, payload: "late".into(), ..peer.at(0) });
        peer.wait_for("a RST", |segment| segment.has(RST));
        expect(&tracer.close(port, peer.port), late);
        // The same with the acknowledgement.
        let mut peer = closed();
        peer.data(0, "late");
        peer.wait_for("a RST", |segment| segment.has(RST));
        expect(&tracer.close(port, peer.port), late_with_ack);
        // The peer's.
        let peer = closed();
        let ack = peer.ack.wrapping_sub(1);
        peer.send(Segment { ack, flags: ACK | RST, ..peer.at(0) });
        expect(&tracer.close(port, peer.port), reset);
    }
}

#[test]
fn without_tcp_rcv_space_adjust() {
    let port = free_port();
    let mut tracer = Blinded::without("tp_btf/tcp_rcv_space_adjust", "--pid and --comm", port);
    let mut server = Script::start(
        port,
        "listener = listen()\n\
         say('listening')\n\
         for _ in range(2):\n\
         \x20   connection, _ = listener.accept()\n\
         \x20   connection.recv(4096)\n\
         \x20   say('read')\n\
         \x20   hear()\n\
         \x20   connection.close()\n\
         hear()",
    );
    server.expect("listening");
    // Who closes is known all the same.
    let (mut stream, client) = connect(port);
    stream.write_all(REQUEST).expect("open");
    server.expect("read");
    server.tell("close");
    end_of(&mut stream);
    drop(stream);
    expect(
        &tracer.close(port, client),
        &json!({ "closed_by": "local", "process": { "pid": server.pid(), "source": "close" }, "closer": null }),
    );
    // Who only reads is not, and nobody else is named.
    let (mut stream, client) = connect(port);
    stream.write_all(REQUEST).expect("open");
    server.expect("read");
    abort(stream);
    expect(&tracer.close(port, client), &json!({ "cause": "reset_by_peer", "process": null, "closer": null }));
}

#[test]
fn without_sched_process_exit() {
    let listener = Listener::new();
    let mut tracer = Blinded::without("tp_btf/sched_process_exit", "io_uring", listener.port);
    tracer.tells_a_close(&listener);
    // A process that is killed closes its files itself.
    let script =
        format!("exec 3<>/dev/tcp/127.0.0.1/{}; printf 'GET / HTTP/1.1\\r\\n\\r\\n' >&3; kill -9 $$", listener.port);
    let mut client = Guard(std::process::Command::new("bash").args(["-c", &script]).spawn().expect("a shell starts"));
    let (mut server, port) = listener.accept();
    client.wait();
    end_of(&mut server);
    drop(server);
    expect(&tracer.close(port, listener.port), &json!({ "closed_by": "local", "cause": "process_exit" }));
}

#[test]
fn what_is_left_in_a_ring_without_sched_process_exit() {
    let port = free_port();
    let mut tracer = Blinded::without("tp_btf/sched_process_exit", "io_uring", port);
    let mut server = Script::start(
        port,
        "listener = listen()\n\
         ring = Ring()\n\
         ring.register_slots(1)\n\
         say('listening')\n\
         ring.run(Ring.ACCEPT, listener.fileno(), file_index=1)\n\
         buffer = ctypes.create_string_buffer(4096)\n\
         ring.run(Ring.RECV, 0, ctypes.addressof(buffer), 4096, Ring.FIXED_FILE)\n\
         ring.run(Ring.SEND, 0, ctypes.addressof(ctypes.create_string_buffer(RESPONSE)), len(RESPONSE), Ring.FIXED_FILE)\n\
         os._exit(0)",
    );
    server.expect("listening");
    let client = exchange(port);
    server.ends();
    // With the hook it is `process_exit`; without, it must not be the request's doing.
    expect(
        &tracer.close(port, client),
        &json!({ "closed_by": "local", "how": "fin", "cause": "unknown", "closer": null, "process": { "pid": server.pid() } }),
    );
    // The other end closed by itself.
    expect(&tracer.close(client, port), &json!({ "closed_by": "remote", "cause": "request_close" }));
}

#[test]
fn doctor_says_what_tracing_says() {
    const MISSING: [&str; 2] = ["tp_btf/tcp_send_reset", "tp_btf/sched_process_exit"];
    let hooks = hooks_without(&MISSING);
    let report = doctor::examine_with(&hooks, true);
    let report = serde_json::to_value(report).expect("JSON");
    expect(&report, &json!({ "verdict": "degraded", "exit_code": exit::DEGRADED }));
    let said: Vec<_> = MISSING
        .iter()
        .map(|missing| {
            let mut findings = report["findings"].as_array().expect("a list").iter();
            let finding = findings.find(|finding| finding["name"] == *missing).expect("it was tried");
            assert_eq!(finding["status"], "degraded");
            format!("{}; {}", finding["means"].as_str().expect("text"), finding["mend"].as_str().expect("text"))
        })
        .collect();
    let others = hooks.iter().map(|hook| hook.name).filter(|hook| !MISSING.contains(hook));
    let others = others.filter(|hook| !always_degraded().any(|degraded| degraded == *hook));
    for other in others {
        let mut findings = report["findings"].as_array().expect("a list").iter();
        assert!(findings.any(|finding| finding["name"] == other && finding["status"] == "ok"), "{other}: {report:#}");
    }
    assert_eq!(Blinded::without_all(&MISSING, free_port()).attached.kernel.degraded[..MISSING.len()], said);
}

#[test]
fn more_processes_than_are_followed_are_counted_or_refused() {
    let host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
    let mut parent = Script::start(
        free_port(),
        "say('ready')\n\
         hear()\n\
         children = [fork(signal.pause) for _ in range(6)]\n\
         say('forked')\n\
         hear()\n\
         for child in children: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)",
    );
    parent.expect("ready");
    let ask = Ask { pids: vec![parent.pid()], most_processes: 4, ring_bytes: 1 << 16, ..Ask::default() };
    let attached = Kernel::attach(&ask, &host.cgroup, &host.layout).expect("it is one process");
    assert_eq!(attached.kernel.counters().expect("they can be read").left_out, 0);
    parent.tell("fork");
    parent.expect("forked");
    let left_out = attached.kernel.counters().expect("they can be read").left_out;
    assert_eq!(left_out, 3, "of seven processes");
    drop(attached);
    let Err(error) = Kernel::attach(&ask, &host.cgroup, &host.layout) else { panic!("they are too many") };
    let refusal = preflight::explain(error);
    assert_eq!(refusal.code, exit::USAGE, "{refusal}");
    assert!(refusal.message.contains("there are 7 processes") && refusal.message.contains("4 at most"), "{refusal}");
    parent.tell("end");
    parent.ends();
}

/// As on a kernel before 6.2: then a helper casts sockets, and what is told is the same.
#[test]
fn without_bpf_rdonly_cast() {
    let mut host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
    host.layout.cast = None;
    let listener = Listener::new();
    Blinded::on(&host, &[], vec![listener.port]).tells_a_close(&listener);
}

/// As on a kernel whose helpers take no socket that a program has found in an open file.
#[test]
fn where_open_files_are_not_trusted_what_was_open_before_is_found_in_its_slot() {
    let mut host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
    host.layout.task_file = NO_FUNCTION;
    let (listener, namespace) = (Listener::new(), Namespace::new("slots"));
    let elsewhere = namespace.enter(Listener::new);
    let pairs = || [listener.connect(), namespace.enter(|| elsewhere.connect())];
    let (leaking, leaked) = (pairs(), pairs());
    let ports = [free_port(), free_port()];
    // Of the process that traces nobody is told.
    let hold = |port| {
        Script::start(
            port,
            "listener = listen()\n\
             client = connect()\n\
             server, _ = listener.accept()\n\
             say(client.getsockname()[1])\n\
             hear()\n\
             server.close()\n\
             client.close()\n\
             say('closed')\n\
             hear()",
        )
    };
    let mut holders = [hold(ports[0]), namespace.enter(|| hold(ports[1]))];
    let clients = holders.each_mut().map(|holder| holder.hear_number::<u16>());
    // Before the start.
    let leaked = leaked.map(|pair| {
        drop(pair.client);
        (pair.server, pair.client_port)
    });
    let mut tracer = Blinded::on(&host, &[], [&ports[..], &[listener.port, elsewhere.port]].concat());
    assert!(tracer.attached.kernel.hooks.iter().any(|hook| hook == OPEN_FILES));
    let said = &tracer.attached.kernel.degraded[0];
    assert!(said.contains(OPEN_FILES) && said.contains("; run a kernel"), "{said}");
    // Their slots may be taken by what other tests do, or rest for a quarter of a second after that.
    let mut told = Vec::new();
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(100));
        told.extend(look(&mut tracer));
    }
    for ((holder, server), client) in holders.iter_mut().zip(ports).zip(clients) {
        holder.tell("close");
        holder.expect("closed");
        let held = json!({ "pid": holder.pid(), "source": "open-files" });
        let wanted = json!({ "started_before": true, "closed_by": "local", "final": "time_wait", "process": held });
        expect(&tracer.close(server, client), &wanted);
        let wanted = json!({ "started_before": true, "closed_by": "remote", "final": "closed", "process": held });
        expect(&tracer.close(client, server), &wanted);
    }
    let leaking = leaking.map(|pair| {
        drop(pair.client);
        (pair.server, pair.client_port)
    });
    std::thread::sleep(CLOSE_WAIT_AFTER + Duration::from_millis(10));
    told.extend(look(&mut tracer));
    told.sort_unstable();
    let mut wanted: Vec<_> = leaking.iter().chain(&leaked).map(|(_, client_port)| *client_port).collect();
    wanted.sort_unstable();
    assert_eq!(told, wanted);
}

#[test]
fn where_open_files_are_not_trusted_no_walk_takes_what_is_in_storage_for_older() {
    let mut host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
    host.layout.task_file = NO_FUNCTION;
    let port = free_port();
    let mut tracer = Blinded::with_slots(&host, &[], vec![port], 1);
    // Of four sockets one at most finds the slot.
    let mut server = Script::start(
        port,
        "listener = listen()\n\
         pairs = [(connect(), listener.accept()[0]) for _ in range(2)]\n\
         say(' '.join(str(client.getsockname()[1]) for client, _ in pairs))\n\
         for pair in pairs:\n\
         \x20   hear()\n\
         \x20   for end in pair: end.close()\n\
         hear()",
    );
    let clients: Vec<u16> = server.hear().split(' ').map(|port| port.parse().expect("a port")).collect();
    for client in clients {
        // Long enough for a slot to be used again.
        for _ in 0..6 {
            std::thread::sleep(Duration::from_millis(100));
            assert!(look(&mut tracer).is_empty());
        }
        server.tell("close");
        let owner = json!({ "pid": server.pid(), "source": "connect" });
        let wanted = json!({ "started_before": false, "closed_by": "local", "final": "time_wait", "process": owner });
        expect(&tracer.close(client, port), &wanted);
        expect(&tracer.close(port, client), &json!({ "started_before": false, "closed_by": "remote" }));
    }
}

/// Has all files, and where it can be all storage, looked at: the remote ports of what stays in CLOSE_WAIT.
fn look(tracer: &mut Blinded) -> Vec<u16> {
    for walk in &tracer.attached.walks {
        walk.run().expect("the walk works");
    }
    let mut told = Vec::new();
    while let Some(record) = tracer.attached.ring.next() {
        if let Fact::CloseWait(socket) = decode(&record).expect("a record") {
            told.push(socket.remote.port());
        }
    }
    told
}

/// As on a kernel that a walk over the storage of sockets can crash.
#[test]
fn without_the_walk_over_storage_those_in_close_wait_are_found_by_their_files() {
    let mut host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
    assert_eq!(
        host.layout.bears_storage_walk,
        !leaves_storage_walk(),
        "it is told by a type, and known by the version"
    );
    host.layout.bears_storage_walk = false;
    let (listener, namespace) = (Listener::new(), Namespace::new("files"));
    let elsewhere = namespace.enter(Listener::new);
    let mut tracer = Blinded::on(&host, &[], vec![listener.port, elsewhere.port]);
    let mut said = tracer.attached.kernel.degraded.iter();
    let said = said.find(|line| line.contains(&format!("without {STORAGE_WALK}"))).expect("that hook is missing");
    let release = preflight::kernel_release();
    for part in [STORAGE_WALK, "no process has accepted", "can crash kernel", &release, "; run a kernel"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let began = Instant::now();
    let leaks = [listener.connect(), namespace.enter(|| elsewhere.connect())].map(|mut pair| {
        pair.request(get(""));
        drop(pair.client);
        (pair.server, pair.client_port)
    });
    let early = look(&mut tracer);
    assert!(early.is_empty() || began.elapsed() >= CLOSE_WAIT_AFTER, "too early: {early:?}");
    let unaccepted = Command::new("python3")
        .args(["-c", &format!("import socket; socket.create_connection(('127.0.0.1', {})).close()", listener.port)])
        .status();
    assert!(unaccepted.expect("python3 runs").success());
    std::thread::sleep(CLOSE_WAIT_AFTER + Duration::from_millis(10));
    let mut told = [early, look(&mut tracer)].concat();
    told.sort_unstable();
    let mut wanted = leaks.each_ref().map(|(_, client_port)| *client_port);
    wanted.sort_unstable();
    assert_eq!(told, wanted);
    assert!(look(&mut tracer).is_empty(), "each is told once");
}

#[test]
fn without_inet_sock_set_state_it_refuses() {
    let host = preflight::check().unwrap_or_else(|refusal| panic!("{refusal}"));
    let hooks = hooks_without(&["tp_btf/inet_sock_set_state"]);
    let ask = Ask { ports: vec![free_port()], ring_bytes: 1 << 16, ..Ask::default() };
    let Err(error) = Kernel::attach_to(&hooks, &ask, &host.cgroup, &host.layout) else { panic!("it did not refuse") };
    let refusal = preflight::explain(error);
    assert_eq!(refusal.code, exit::KERNEL, "{refusal}");
    assert!(refusal.message.contains("tp_btf/inet_sock_set_state"), "{refusal}");
    // Tried one by one, the others work.
    let tried = kernel::try_each(&hooks, &ask, &host.cgroup, &host.layout).expect("the maps can be created");
    let failed: Vec<_> =
        hooks.iter().zip(&tried).filter(|(_, tried)| tried.is_err()).map(|(hook, _)| hook.name).collect();
    let left_alone = is_without_storage_walk().then_some(STORAGE_WALK);
    assert_eq!(failed, ["tp_btf/inet_sock_set_state"].into_iter().chain(left_alone).collect::<Vec<_>>());
}
