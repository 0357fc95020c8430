//! By which calls a process becomes the owner of a socket, and by which it does not: then nobody is, rather than a wrong one.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::rig::{Listener, Tracer, abort, end_of, expect, free_port, port_of};
use crate::script::{REQUEST, Script, connect, exchange};

/// The server's record of a connection that sends a request, which a script handles by the statements `handle`, and is
/// then reset by the client: so the server's end never closes, and only what it did before can name its process.
fn after(handle: &str) -> (Value, u32) {
    after_sending(|stream| stream.write_all(REQUEST).expect("it is open"), handle)
}

/// The same for anything that a client may send.
fn after_sending(send: impl FnOnce(&mut TcpStream), handle: &str) -> (Value, u32) {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let server = Script::start(
        port,
        &format!(
            "listener = listen()\n\
             say('listening')\n\
             connection, _ = listener.accept()\n\
             fd = connection.fileno()\n\
             poll = select.poll()\n\
             poll.register(fd, select.POLLIN | select.POLLPRI)\n\
             poll.poll()\n\
             {handle}\n\
             say('done')\n\
             hear()"
        ),
    );
    server.expect("listening");
    let (mut stream, client) = connect(port);
    send(&mut stream);
    server.expect("done");
    abort(stream);
    let close = tracer.wait_for_close(port, client);
    expect(&close, &json!({ "role": "server", "cause": "reset_by_peer", "closed_by": "remote", "closer": null }));
    expect(&tracer.wait_for_close(client, port), &json!({ "process": { "pid": std::process::id() } }));
    (close, server.pid())
}

/// The script is known by this call.
#[track_caller]
fn known_by(handle: &str) {
    let (close, pid) = after(handle);
    expect(&close, &json!({ "process": { "pid": pid, "source": "read" } }));
}

/// It is not, and nobody else is named.
#[track_caller]
fn unknown_by(handle: &str) {
    expect(&after(handle).0, &json!({ "process": null }));
}

#[test]
fn read() {
    known_by("os.read(fd, 4096)");
}

#[test]
fn readv() {
    known_by("os.readv(fd, [bytearray(5), bytearray(4096)])");
}

#[test]
fn recvmsg() {
    known_by("connection.recvmsg(4096)");
}

#[test]
fn recvmmsg() {
    known_by(
        "buffer = ctypes.create_string_buffer(4096)\n\
         iov = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 4096)\n\
         message = (ctypes.c_uint64 * 8)(0, 0, ctypes.addressof(iov), 1, 0, 0, 0, 0)\n\
         assert checked(libc.recvmmsg(fd, message, 1, 0, None)) == 1\n\
         assert buffer.value == REQUEST",
    );
}

#[test]
fn peek() {
    known_by("assert connection.recv(4096, socket.MSG_PEEK) == REQUEST");
}

#[test]
fn truncate() {
    known_by("assert checked(libc.recv(fd, None, 4096, socket.MSG_TRUNC)) == len(REQUEST)");
}

#[test]
fn splice() {
    known_by("_, to = os.pipe()\nassert os.splice(fd, to, 4096) == len(REQUEST)");
}

#[test]
fn epoll_edge_triggered_and_not_blocking() {
    known_by(
        "connection.setblocking(False)\n\
         epoll = select.epoll()\n\
         epoll.register(fd, select.EPOLLIN | select.EPOLLET)\n\
         epoll.poll()\n\
         assert connection.recv(4096) == REQUEST",
    );
}

#[test]
fn zero_copy() {
    // TCP_ZEROCOPY_RECEIVE: what is smaller than a page is copied to a buffer that is passed along.
    known_by(
        "libc.mmap.restype = ctypes.c_void_p\n\
         room = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))\n\
         copy = ctypes.create_string_buffer(4096)\n\
         argument = ctypes.create_string_buffer(\n\
        \x20    struct.pack('=QIIIiQiIQQII', room, 4096, 0, 0, 0, ctypes.addressof(copy), 4096, 0, 0, 0, 0, 0), 64)\n\
         size = ctypes.c_uint32(64)\n\
         checked(libc.getsockopt(fd, socket.IPPROTO_TCP, 35, argument, ctypes.byref(size)))\n\
         assert copy.value == REQUEST",
    );
}

#[test]
fn nothing_at_all() {
    unknown_by("connection.sendall(RESPONSE)");
}

#[test]
fn urgent_data_alone() {
    // Not part of the stream, and read past it: no hook sees that.
    let handle = "assert connection.recv(1, socket.MSG_OOB) == b'!'";
    let send = |stream: &mut TcpStream| {
        rustix::net::send(stream, b"!", rustix::net::SendFlags::OOB).expect("it is open");
    };
    expect(&after_sending(send, handle).0, &json!({ "process": null }));
}

#[test]
fn a_client_that_only_writes() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let client = Script::start(listener.port, "connection = connect()\nconnection.sendall(REQUEST)\nhear()");
    let (server, port) = listener.accept();
    server.peek(&mut [0]).expect("the client asks");
    drop(server);
    expect(
        &tracer.wait_for_close(port, listener.port),
        &json!({ "cause": "reset_by_peer", "closer": null, "process": { "pid": client.pid(), "source": "connect" } }),
    );
}

#[test]
fn a_server_that_only_closes() {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let server = Script::start(port, "listener = listen()\nsay('listening')\nlistener.accept()[0].close()\nhear()");
    server.expect("listening");
    let (mut stream, client) = connect(port);
    end_of(&mut stream);
    drop(stream);
    expect(
        &tracer.wait_for_close(port, client),
        &json!({ "closed_by": "local", "closer": null, "process": { "pid": server.pid(), "source": "close" } }),
    );
}

#[test]
fn nobody_accepted_it() {
    // The listener's end takes with it what waits in its queue; who that was for is not known.
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let mut server = Script::start(port, "listener = listen()\nsay('listening')\nhear()\nlistener.close()\nhear()");
    server.expect("listening");
    let (mut stream, client) = connect(port);
    stream.write_all(REQUEST).expect("it is open");
    server.tell("close");
    let close = tracer.wait_for_close(port, client);
    expect(&close, &json!({ "closed_by": "local", "how": "rst", "process": null, "closer": null }));
    let at_client = tracer.wait_for_close(client, port);
    expect(&at_client, &json!({ "cause": "reset_by_peer", "process": { "source": "connect" } }));
}

/// A server all of whose calls go through an io_uring with these set-up flags, each operation with these flags.
fn served_by_a_ring(setup: &str, flags: &str) {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let mut server = Script::start(
        port,
        &format!(
            "listener = listen()\n\
             ring = Ring({setup})\n\
             say('listening')\n\
             ring.serve(listener, {flags})\n\
             hear()"
        ),
    );
    server.expect("listening");
    let client = exchange(port);
    // The process itself, not one of the threads that the kernel gives it for this.
    expect(
        &tracer.wait_for_close(port, client),
        &json!({
            "closed_by": "local", "cause": "request_close", "closer": null,
            "process": { "pid": server.pid(), "comm": "python3", "source": "read" },
        }),
    );
    expect(&tracer.wait_for_close(client, port), &json!({ "process": { "pid": std::process::id() }, "closer": null }));
    server.tell("end");
    server.ends();
}

#[test]
fn io_uring() {
    served_by_a_ring("0", "0");
}

#[test]
fn io_uring_with_worker_threads() {
    served_by_a_ring("0", "Ring.ASYNC");
}

#[test]
fn io_uring_with_a_polling_thread() {
    served_by_a_ring("Ring.SQPOLL", "0");
}

#[test]
fn io_uring_with_both() {
    served_by_a_ring("Ring.SQPOLL", "Ring.ASYNC");
}

/// A connection whose only reference is in a ring, and the statements that end it.
fn in_a_ring_until(end: &str) -> (Value, u32) {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let mut server = Script::start(
        port,
        &format!(
            "listener = listen()\n\
             ring = Ring()\n\
             ring.register_slots(1)\n\
             say('listening')\n\
             ring.run(Ring.ACCEPT, listener.fileno(), file_index=1)\n\
             buffer = ctypes.create_string_buffer(4096)\n\
             ring.run(Ring.RECV, 0, ctypes.addressof(buffer), 4096, Ring.FIXED_FILE)\n\
             ring.run(Ring.SEND, 0, ctypes.addressof(ctypes.create_string_buffer(RESPONSE)), len(RESPONSE), Ring.FIXED_FILE)\n\
             {end}\n\
             hear()"
        ),
    );
    server.expect("listening");
    let client = exchange(port);
    let close = tracer.wait_for_close(port, client);
    expect(
        &close,
        &json!({ "closed_by": "local", "closer": null, "process": { "pid": server.pid(), "source": "read" } }),
    );
    if !end.contains("exit") {
        server.tell("end");
    }
    server.ends();
    (close, server.pid())
}

#[test]
fn io_uring_without_a_descriptor() {
    expect(&in_a_ring_until("ring.run(Ring.CLOSE, 0, file_index=1)").0, &json!({ "cause": "request_close" }));
}

#[test]
fn io_uring_that_ends_with_its_process() {
    // A kernel thread closes what was left in the ring.
    expect(&in_a_ring_until("os._exit(0)").0, &json!({ "cause": "process_exit" }));
}

#[test]
fn io_uring_that_ends_before_its_process() {
    expect(&in_a_ring_until("ring.close()").0, &json!({ "cause": "request_close" }));
}

#[test]
fn found_among_the_open_files() {
    let listener = Listener::new();
    let mut client =
        Script::start(listener.port, "connection = connect()\nsay('connected')\nhear()\nconnection.close()");
    let (mut server, port) = listener.accept();
    client.expect("connected");
    let tracer = Tracer::on_port(listener.port);
    client.tell("close");
    end_of(&mut server);
    drop(server);
    expect(
        &tracer.wait_for_close(port, listener.port),
        &json!({
            "started_before": true, "role": "unknown", "closed_by": "local", "closer": null,
            "process": { "pid": client.pid(), "source": "open-files" },
        }),
    );
    expect(
        &tracer.wait_for_close(listener.port, port),
        &json!({ "started_before": true, "process": { "pid": std::process::id() }, "closer": null }),
    );
}

#[test]
fn found_among_the_open_files_of_several() {
    let listener = Listener::new();
    let mut client = Script::start(
        listener.port,
        "connection = connect()\n\
         close_it, tell_it = os.pipe()\n\
         child = fork(lambda: (os.read(close_it, 1), connection.close(), say('closed'), hear()))\n\
         say(child)\n\
         hear()\n\
         connection.close()\n\
         say('closed')\n\
         hear()\n\
         os.write(tell_it, b'x')\n\
         reap(child)",
    );
    let (mut server, port) = listener.accept();
    let child: u32 = client.hear_number();
    let tracer = Tracer::on_port(listener.port);
    for _ in 0..2 {
        client.tell("close");
        client.expect("closed");
    }
    end_of(&mut server);
    drop(server);
    let close = tracer.wait_for_close(port, listener.port);
    // Both had it: the child has it from its parent.
    let parent = json!({ "pid": client.pid(), "source": "open-files" });
    expect(&close, &json!({ "process": parent, "closer": { "pid": child, "source": "close" } }));
}

#[test]
fn in_the_accept_queue_at_the_start() {
    let port = free_port();
    let mut server = Script::start(
        port,
        "listener = listen()\n\
         say('listening')\n\
         hear()\n\
         connection, _ = listener.accept()\n\
         read(connection)\n\
         connection.sendall(RESPONSE)\n\
         say('answered')\n\
         hear()\n\
         second, _ = listener.accept()\n\
         read(second)\n\
         read(second)\n\
         say('read')\n\
         hear()",
    );
    server.expect("listening");
    let ((mut first, one), (mut second, two), (third, three)) = (connect(port), connect(port), connect(port));
    first.write_all(REQUEST).expect("it is open");
    let tracer = Tracer::on_port(port);
    // Nobody has this one; its end is its peer's reset.
    abort(third);
    expect(&tracer.wait_for_close(port, three), &json!({ "started_before": true, "process": null, "closer": null }));
    // What had come before the start is read and answered.
    server.tell("accept");
    server.expect("answered");
    abort(first);
    let close = tracer.wait_for_close(port, one);
    assert!(close["process"].is_null() || close["process"]["pid"] == server.pid(), "{close:#}");
    assert_eq!(close["closer"], json!(null), "{close:#}");
    // What comes after it.
    second.write_all(REQUEST).expect("it is open");
    server.tell("accept");
    second.write_all(REQUEST).expect("it is open");
    server.expect("read");
    abort(second);
    expect(&tracer.wait_for_close(port, two), &json!({ "process": { "pid": server.pid(), "source": "read" } }));
}

#[test]
fn thousands_over_loopback_are_never_swapped() {
    const CONNECTIONS: usize = 1500;
    let port = free_port();
    let tracer = Tracer::on_port(port);
    // The client's port says who ends the connection, and how. Whichever it is, the softirq of either end runs on top of
    // either process.
    let server = Script::start(
        port,
        "listener = listen(1024)\n\
         def worker():\n\
        \x20    while True:\n\
        \x20        connection, (_, peer) = listener.accept()\n\
        \x20        how = peer % 5\n\
        \x20        say(peer, os.getpid())\n\
        \x20        try:\n\
        \x20            if how < 4:\n\
        \x20                read(connection)\n\
        \x20                if how != 2: connection.sendall(RESPONSE)\n\
        \x20            if how in (1, 3): connection.recv(1)\n\
        \x20            abort(connection) if how == 2 else connection.close()\n\
        \x20        except ConnectionError:\n\
        \x20            connection.close()\n\
         for _ in range(2): fork(worker)\n\
         say('listening')\n\
         hear()",
    );
    server.expect("listening");
    let script = format!(
        "def client():\n\
        \x20    for _ in range({CONNECTIONS}):\n\
        \x20        connection = connect()\n\
        \x20        port = connection.getsockname()[1]\n\
        \x20        how = port % 5\n\
        \x20        say(port, os.getpid())\n\
        \x20        try:\n\
        \x20            connection.sendall(REQUEST)\n\
        \x20            if how in (1, 3): read(connection, len(RESPONSE))\n\
        \x20            if how in (0, 2): connection.recv(4096) and connection.recv(1)\n\
        \x20        except ConnectionError:\n\
        \x20            pass\n\
        \x20        abort(connection) if how == 3 else connection.close()\n\
         for child in [fork(client) for _ in range(2)]: reap(child)\n\
         say('done')"
    );
    let mut clients = Script::start(port, &script);
    // By the client's port; older kernels give some of them twice, and whose is whose cannot be said then.
    let hear_all = |script: &Script| -> BTreeMap<u16, Option<u32>> {
        let mut pids = BTreeMap::new();
        for _ in 0..2 * CONNECTIONS {
            let line = script.hear();
            let (port, pid) = line.split_once(' ').expect("a port and a process id");
            let pid: u32 = pid.parse().expect("a process id");
            pids.entry(port.parse().expect("a port")).and_modify(|known| *known = None).or_insert(Some(pid));
        }
        pids
    };
    let (accepted, connected) = (hear_all(&server), hear_all(&clients));
    clients.expect("done");
    clients.ends();
    assert!(accepted.keys().eq(connected.keys()));
    assert!(accepted.values().flatten().count() > CONNECTIONS, "too few ports that were used only once");
    tracer.wait_for("all closes", |events| (events.len() > 4 * CONNECTIONS).then_some(()));
    let run = tracer.stop();
    let mut unknown = 0;
    for close in run.closes() {
        let (local, remote) = (port_of(close, "local"), port_of(close, "remote"));
        let at_server = local == Some(port);
        let peer = if at_server { remote } else { local }.expect("a port");
        let truth = if at_server { accepted[&peer] } else { connected[&peer] };
        if close["process"].is_null() {
            unknown += 1;
            assert!(at_server && peer % 5 == 4, "{close:#}");
        } else if let Some(pid) = truth {
            assert_eq!(close["process"]["pid"], pid, "{close:#}");
        }
        assert_eq!(close["closer"], json!(null), "{close:#}");
    }
    assert_eq!(run.closes().len(), 4 * CONNECTIONS);
    eprintln!("{unknown} unknown");
}
