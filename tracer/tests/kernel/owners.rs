//! Who owns a socket that passes from process to process, and who makes its last close.

use std::io::Write as _;
use std::process::Command;

use serde_json::{Value, json};

use crate::rig::{Listener, Namespace, Tracer, end_of, expect, free_port, run, wait_until};
use crate::script::{REQUEST, RESPONSE, Script, connect, exchange, read_request};
use crate::servers::{self, Client};

/// What both ends say of [`exchange`] with `server`, a process: it read, and closed first.
#[track_caller]
fn expect_served(tracer: &Tracer, port: u16, client: u16, server: u32) -> Value {
    let at_server = tracer.wait_for_close(port, client);
    expect(
        &at_server,
        &json!({
            "role": "server", "closed_by": "local", "cause": "request_close",
            "process": { "pid": server, "source": "read" }, "closer": null,
        }),
    );
    let at_client = tracer.wait_for_close(client, port);
    expect(
        &at_client,
        &json!({
            "role": "client", "closed_by": "remote", "cause": "request_close",
            "process": { "pid": std::process::id(), "source": "read" }, "closer": null,
        }),
    );
    at_server
}

/// A server that handles each connection by the statements `handle`; it says who will have read and closed it.
fn one_exchange(handle: &str) {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let mut server = Script::start(port, &format!("listener = listen()\nsay('listening')\n{handle}"));
    server.expect("listening");
    let client = exchange(port);
    let pid = server.hear_number();
    expect_served(&tracer, port, client, pid);
    server.ends();
    assert_eq!(tracer.stop().closes().len(), 2);
}

#[test]
fn forked_after_accept() {
    one_exchange(
        "connection, _ = listener.accept()\n\
         ready, set_ready = os.pipe()\n\
         child = fork(lambda: (os.read(ready, 1), serve(connection)))\n\
         connection.close()\n\
         os.write(set_ready, b'x')\n\
         reap(child)\n\
         say(child)",
    );
}

#[test]
fn forked_after_accept_and_another_program() {
    // As inetd does it: the socket is standard input.
    one_exchange(
        "connection, _ = listener.accept()\n\
         program = f'import socket; c = socket.socket(fileno=0); c.recv(4096); c.sendall({RESPONSE!r})'\n\
         alone, tell_alone = os.pipe()\n\
         def child():\n\
        \x20    os.read(alone, 1)\n\
        \x20    os.dup2(connection.fileno(), 0)\n\
        \x20    os.execvp('python3', ['python3', '-c', f'{program}; c.close()'])\n\
         child = fork(child)\n\
         connection.close()\n\
         os.write(tell_alone, b'x')\n\
         reap(child)\n\
         say(child)",
    );
}

#[test]
fn preforked_workers_share_the_listener() {
    const CONNECTIONS: usize = 12;
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let script = "listener = listen()\n\
         def worker():\n\
        \x20    while True:\n\
        \x20        connection, (_, peer) = listener.accept()\n\
        \x20        say(peer, os.getpid())\n\
        \x20        serve(connection)\n\
         for _ in range(3): fork(worker)\n\
         say('listening')\n\
         hear()";
    let server = Script::start(port, script);
    server.expect("listening");
    for _ in 0..CONNECTIONS {
        let client = exchange(port);
        let line = server.hear();
        let (peer, pid) = line.split_once(' ').expect("a port and a process id");
        assert_eq!(peer.parse(), Ok(client));
        expect_served(&tracer, port, client, pid.parse().expect("a process id"));
    }
}

#[test]
fn passed_to_an_unrelated_process() {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    // The abstract address goes with its socket.
    let mut handler = Script::start(
        port,
        "unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
         unix.bind(f'\\0tracer-{PORT}')\n\
         unix.listen()\n\
         say('waiting')\n\
         sender, _ = unix.accept()\n\
         _, fds, _, _ = socket.recv_fds(sender, 1, 1)\n\
         sender.recv(1)\n\
         serve(socket.socket(fileno=fds[0]))",
    );
    handler.expect("waiting");
    let mut acceptor = Script::start(
        port,
        "listener = listen()\n\
         unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
         unix.connect(f'\\0tracer-{PORT}')\n\
         say('listening')\n\
         connection, _ = listener.accept()\n\
         socket.send_fds(unix, [b'x'], [connection.fileno()])\n\
         connection.close()\n\
         unix.send(b'x')",
    );
    acceptor.expect("listening");
    let client = exchange(port);
    expect_served(&tracer, port, client, handler.pid());
    acceptor.ends();
    handler.ends();
}

#[test]
fn a_listener_that_is_inherited() {
    // As systemd passes it: a descriptor, over exec.
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let mut server = Script::start(
        port,
        "listener = listen()\n\
         fd = listener.fileno()\n\
         os.set_inheritable(fd, True)\n\
         program = f'import socket; c, _ = socket.socket(fileno={fd}).accept(); c.recv(4096); c.sendall({RESPONSE!r})'\n\
         say('listening')\n\
         os.execvp('python3', ['python3', '-c', program])",
    );
    server.expect("listening");
    let client = exchange(port);
    expect_served(&tracer, port, client, server.pid());
    server.ends();
}

/// Whether any record of a close was printed.
fn any_close(tracer: &Tracer) -> bool {
    tracer.events().iter().any(|event| event["type"] == "close")
}

#[test]
fn shared_by_two_the_last_close_counts() {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let mut server = Script::start(
        port,
        "listener = listen()\n\
         say('listening')\n\
         connection, _ = listener.accept()\n\
         child = fork(lambda: (hear(), connection.close()))\n\
         read(connection)\n\
         connection.sendall(RESPONSE)\n\
         connection.close()\n\
         say(child)\n\
         reap(child)",
    );
    server.expect("listening");
    let (mut stream, client) = connect(port);
    stream.write_all(REQUEST).expect("it is open");
    std::io::Read::read_exact(&mut stream, &mut vec![0; RESPONSE.len()]).expect("it answers");
    let child: u32 = server.hear_number();
    // The first one has closed; no FIN comes of it.
    stream.set_nonblocking(true).expect("a socket can be set so");
    assert_eq!(
        stream.peek(&mut [0]).map_err(|error| error.kind()),
        Err(std::io::ErrorKind::WouldBlock),
        "closed too early"
    );
    assert!(!any_close(&tracer));
    stream.set_nonblocking(false).expect("a socket can be set so");
    server.tell("close");
    end_of(&mut stream);
    drop(stream);
    // Who read is the owner, who closed last the closer.
    expect(
        &tracer.wait_for_close(port, client),
        &json!({
            "closed_by": "local", "cause": "request_close",
            "process": { "pid": server.pid(), "source": "read" }, "closer": { "pid": child, "source": "close" },
        }),
    );
    server.ends();
}

#[test]
fn a_child_keeps_it_when_its_parent_exits() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    // The child lives on: the pipe to it is one of its own, its parent's end does not reach it.
    let mut client = Script::start(
        listener.port,
        "connection = connect()\n\
         connection.sendall(REQUEST)\n\
         read(connection, len(RESPONSE))\n\
         if os.fork() == 0:\n\
        \x20    say(os.getpid())\n\
        \x20    hear()\n\
        \x20    connection.close()\n\
        \x20    say('closed')\n\
        \x20    hear()\n\
         os._exit(0)",
    );
    let (mut server, port) = listener.accept();
    read_request(&mut server);
    server.write_all(RESPONSE).expect("it is open");
    let child: u32 = client.hear_number();
    let parent = client.pid();
    client.ends();
    server.set_nonblocking(true).expect("a socket can be set so");
    assert_eq!(server.peek(&mut [0]).map_err(|error| error.kind()), Err(std::io::ErrorKind::WouldBlock));
    assert!(!any_close(&tracer));
    server.set_nonblocking(false).expect("a socket can be set so");
    client.tell("close");
    client.expect("closed");
    end_of(&mut server);
    drop(server);
    // Closed, not exited: neither the parent's exit nor that the child is about to.
    expect(
        &tracer.wait_for_close(port, listener.port),
        &json!({
            "closed_by": "local", "cause": "request_close",
            "process": { "pid": parent, "source": "read" }, "closer": { "pid": child, "source": "close" },
        }),
    );
}

/// The client's record, and its process id, after an exchange and then `end`, statements that are the last ones.
fn client_that_ends(end: &str) -> (Value, u32) {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let client = Script::start(
        listener.port,
        &format!(
            "connection = connect()\n\
             connection.sendall(REQUEST)\n\
             read(connection, len(RESPONSE))\n\
             {end}"
        ),
    );
    let (mut server, port) = listener.accept();
    read_request(&mut server);
    server.write_all(RESPONSE).expect("it is open");
    end_of(&mut server);
    drop(server);
    let close = tracer.wait_for_close(port, listener.port);
    expect(&tracer.wait_for_close(listener.port, port), &json!({ "process": { "pid": std::process::id() } }));
    let pid = client.pid();
    expect(&close, &json!({ "closed_by": "local", "process": { "pid": pid, "source": "read" }, "closer": null }));
    (close, pid)
}

#[test]
fn by_an_exit_while_another_thread_reads() {
    let (close, _) = client_that_ends(
        "threading.Thread(target=lambda: connection.recv(1), daemon=True).start()\n\
         while not open(f'/proc/self/task/{max(os.listdir(\"/proc/self/task\"), key=int)}/wchan').read(): pass\n\
         os._exit(0)",
    );
    expect(&close, &json!({ "cause": "process_exit" }));
}

#[test]
fn by_a_signal_that_kills_a_process_of_many_threads() {
    let (close, _) = client_that_ends(
        "for _ in range(8): threading.Thread(target=lambda: connection.recv(1), daemon=True).start()\n\
         os.kill(os.getpid(), signal.SIGKILL)",
    );
    expect(&close, &json!({ "cause": "process_exit" }));
}

#[test]
fn by_exec_with_close_on_exec() {
    // The descriptor is closed within `execve`, which by then has given the process its new name.
    let (close, _) = client_that_ends("assert not connection.get_inheritable()\nos.execvp('sleep', ['sleep', '60'])");
    expect(&close, &json!({ "cause": "request_close", "process": { "comm": "sleep" } }));
}

#[test]
fn by_the_exit_of_a_thread_with_files_of_its_own() {
    // A thread ends, not a process: CLONE_FILES undone, the socket is the thread's alone.
    let (close, _) = client_that_ends(
        "unshared, closed = threading.Event(), threading.Event()\n\
         def keep_it():\n\
        \x20    checked(libc.unshare(0x400))\n\
        \x20    unshared.set()\n\
        \x20    closed.wait()\n\
         threading.Thread(target=keep_it).start()\n\
         unshared.wait()\n\
         connection.close()\n\
         closed.set()\n\
         hear()",
    );
    expect(&close, &json!({ "cause": "request_close" }));
}

#[test]
fn multipath_tcp_after_its_process_has_closed_and_gone() {
    // A kernel thread sends the FIN, once the peer has acknowledged the end of the data: here not before the process exits.
    let namespace = Namespace::new("mptcp");
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let socket = "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)";
    let server = format!(
        "listener = {socket}\n\
         listener.bind(('127.0.0.1', PORT))\n\
         listener.listen()\n\
         say('listening')\n\
         connection, _ = listener.accept()\n\
         read(connection)\n\
         connection.sendall(RESPONSE)\n\
         assert not connection.recv(1)\n\
         connection.close()\n\
         hear()"
    );
    let client = format!(
        "connection = {socket}\n\
         connection.connect(('127.0.0.1', PORT))\n\
         connection.sendall(REQUEST)\n\
         read(connection, len(RESPONSE))\n\
         say(connection.getsockname()[1])\n\
         hear()\n\
         connection.close()"
    );
    let server = namespace.enter(|| Script::start(port, &server));
    server.expect("listening");
    let mut client = namespace.enter(|| Script::start(port, &client));
    let own: u16 = client.hear_number();
    let nft = |command: &str| namespace.enter(|| run(Command::new("nft").arg(command)));
    nft("table inet vanish { chain input { type filter hook input priority 0; policy drop; }; }");
    client.tell("close");
    client.ends();
    nft("delete table inet vanish");
    // The subflows' ends say what they know, and no more.
    let at_client = tracer.wait_for_close(own, port);
    expect(
        &at_client,
        &json!({ "cause": "request_close", "process": { "pid": client.pid(), "source": "connect" }, "closer": null }),
    );
    let at_server = tracer.wait_for_close(port, own);
    assert!(at_server["process"].is_null() || at_server["process"]["pid"] == server.pid(), "{at_server:#}");
}

#[test]
fn by_a_process_that_had_shut_it_down_before_the_start() {
    // The FIN left long ago, and not because of the exit.
    let listener = Listener::new();
    let mut client = Script::start(
        listener.port,
        "connection = connect()\n\
         connection.sendall(REQUEST)\n\
         read(connection, len(RESPONSE))\n\
         connection.shutdown(socket.SHUT_WR)\n\
         hear()\n\
         os._exit(0)",
    );
    let (mut server, port) = listener.accept();
    read_request(&mut server);
    server.write_all(RESPONSE).expect("it is open");
    end_of(&mut server);
    let tracer = Tracer::on_port(listener.port);
    client.tell("exit");
    client.ends();
    drop(server);
    let close = tracer.wait_for_close(port, listener.port);
    expect(
        &close,
        &json!({
            "started_before": true, "closed_by": "local", "final": "time_wait",
            "process": { "pid": client.pid(), "source": "open-files" },
        }),
    );
    assert_ne!(close["cause"], "process_exit", "{close:#}");
}

#[test]
fn nginx_its_worker_and_not_its_master() {
    let server = servers::nginx("keepalive_timeout 30s; add_header X-Worker $pid always;");
    let tracer = Tracer::on_port(server.port);
    for request in ["GET /index.html HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"; 8] {
        let mut client = Client::connect(&server);
        let response = client.exchange(request);
        let worker = response.lines().find_map(|line| line.strip_prefix("X-Worker: ")).expect("nginx says who it is");
        let worker: u32 = worker.trim().parse().expect("a process id");
        assert_ne!(worker, server.pid());
        end_of(&mut client.stream);
        let port = client.port;
        drop(client);
        expect_served(&tracer, server.port, port, worker);
    }
}

/// The process at the server's end of a connection that is open.
fn owner(server: u16, client: u16) -> u32 {
    let filter = format!("( sport = :{server} and dport = :{client} )");
    let line = run(Command::new("ss").args(["-Htnp", "state", "established", &filter]));
    let pid = line.split_once("pid=").and_then(|(_, rest)| rest.split_once(',')).expect("an owner").0;
    pid.parse().expect("a process id")
}

fn apache(mpm: &str) {
    const KEEP: &str = "GET /index.html HTTP/1.1\r\nHost: test\r\n\r\n";
    const CLOSE: &str = "GET /index.html HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    let server = servers::apache_with(mpm);
    let tracer = Tracer::on_port(server.port);
    // All open at once, so that a server of one process for each connection needs several.
    let mut clients: Vec<_> = (0..4).map(|_| Client::connect(&server)).collect();
    let mut owners = std::collections::BTreeSet::new();
    for client in &mut clients {
        client.exchange(KEEP);
    }
    let clients: Vec<_> = clients.into_iter().map(|client| (owner(server.port, client.port), client)).collect();
    for (worker, mut client) in clients {
        assert_ne!(worker, server.pid());
        owners.insert(worker);
        client.exchange(CLOSE);
        end_of(&mut client.stream);
        let port = client.port;
        drop(client);
        expect_served(&tracer, server.port, port, worker);
    }
    assert_eq!(owners.len() > 1, mpm == "prefork", "{owners:?}");
    wait_until("tracer to see all", || tracer.events().iter().filter(|event| event["type"] == "close").count() == 8);
}

#[test]
fn apache_with_a_process_for_each_connection() {
    apache("prefork");
}

#[test]
fn apache_with_threads() {
    apache("event");
}
