//! What a process is called: its name, its id and user as the host sees them, its executable, cgroup and container.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::rig::{
    Listener, Namespace, Tracer, abort, end_of, expect, free_port, is_socket, parent_of, port_of, wait_until,
};
use crate::script::{REQUEST, RESPONSE, Script, connect, exchange, read_request};

/// A script's side of an exchange with [`answer`].
const ASK: &str = "connection.sendall(REQUEST)\nread(connection, len(RESPONSE))";

/// The record of a script that connects, asks, is answered, closes first and then waits to be told to end.
fn client(tracer: &Tracer, listener: &Listener, script: &Script) -> Value {
    let (mut server, port) = listener.accept();
    answer(&mut server);
    end_of(&mut server);
    drop(server);
    let close = tracer.wait_for_close(port, listener.port);
    expect(&close, &json!({ "closed_by": "local", "cause": "request_close", "closer": null }));
    let exe = fs::read_link(format!("/proc/{}/exe", close["process"]["pid"])).expect("it runs");
    assert_eq!(close["process"]["exe"], exe.to_string_lossy().as_ref(), "{close:#}");
    // The script, or a child of it: ids wrap, so the child's can be the lower one.
    let pid = close["process"]["pid"].as_u64().expect("an id");
    assert!(pid == u64::from(script.pid()) || parent_of(pid) == Some(script.pid()), "{close:#}");
    close
}

fn answer(server: &mut TcpStream) {
    read_request(server);
    server.write_all(RESPONSE).expect("it is open");
}

/// The record of a script of these statements.
fn client_of(script: &str) -> (Value, u32) {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let script = Script::start(listener.port, &format!("{script}\nhear()"));
    (client(&tracer, &listener, &script), script.pid())
}

#[test]
fn a_thread_has_its_processs_name() {
    let (close, pid) = client_of(
        "rename('the process')\n\
         def work():\n\
        \x20    rename('a thread')\n\
        \x20    connection = connect()\n\
        \x20    connection.sendall(REQUEST)\n\
        \x20    read(connection, len(RESPONSE))\n\
        \x20    connection.close()\n\
         thread = threading.Thread(target=work)\n\
         thread.start()\n\
         thread.join()",
    );
    expect(&close, &json!({ "process": { "pid": pid, "comm": "the process", "source": "read" } }));
}

#[test]
fn renamed_before_it_closes() {
    let (close, pid) =
        client_of(&format!("rename('before')\nconnection = connect()\n{ASK}\nrename('after')\nconnection.close()"));
    expect(&close, &json!({ "process": { "pid": pid, "comm": "after", "source": "read" } }));
}

#[test]
fn renamed_before_it_is_reset() {
    // It does nothing under its new name, so it is not known by it. That `/proc` describes who had the old one is not
    // certain: it could be what came after `exec`.
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let script = "rename('before')\nconnection = connect()\nrename('after')\nsay('renamed')\nhear()";
    let client = Script::start(listener.port, script);
    let (server, port) = listener.accept();
    client.expect("renamed");
    abort(server);
    expect(
        &tracer.wait_for_close(port, listener.port),
        &json!({ "process": { "pid": client.pid(), "comm": "before", "exe": null, "source": "connect" } }),
    );
}

#[test]
fn a_name_of_odd_bytes() {
    let (close, pid) =
        client_of(&format!("rename(b'a) S 1\\n\\x1b[31m\"\\xff(')\nconnection = connect()\n{ASK}\nconnection.close()"));
    expect(&close, &json!({ "process": { "pid": pid, "comm": "a) S 1\n\u{1b}[31m\"\u{fffd}(" } }));
}

#[test]
fn a_name_of_nothing() {
    let (close, pid) = client_of(&format!("rename(b'')\nconnection = connect()\n{ASK}\nconnection.close()"));
    expect(&close, &json!({ "process": { "pid": pid, "comm": "" } }));
}

#[test]
fn a_pid_namespace() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut inside = Command::new("unshare");
    inside.args(["--pid", "--fork", "--mount-proc", "python3"]);
    let script = format!("assert os.getpid() == 1\nconnection = connect()\n{ASK}\nconnection.close()\nhear()");
    let script = Script::start_by(inside, listener.port, &script);
    let close = client(&tracer, &listener, &script);
    let unshare = script.pid();
    let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).expect("it runs");
    let pid: u32 = children.trim().parse().expect("one child");
    expect(&close, &json!({ "process": { "pid": pid, "comm": "python3", "uid": 0 } }));
}

#[test]
fn a_user_namespace() {
    // Root inside, whose user outside is another one.
    let (close, _) = client_of(&format!(
        "unshared, tell_unshared = os.pipe()\n\
         mapped, tell_mapped = os.pipe()\n\
         def child():\n\
        \x20    checked(libc.unshare(0x10000000))\n\
        \x20    os.write(tell_unshared, b'x')\n\
        \x20    os.read(mapped, 1)\n\
        \x20    os.setresuid(0, 0, 0)\n\
        \x20    connection = connect()\n\
        \x20    {}\n\
        \x20    connection.close()\n\
        \x20    hear()\n\
         child = fork(child)\n\
         os.read(unshared, 1)\n\
         open(f'/proc/{{child}}/uid_map', 'w').write('0 123456 1')\n\
         os.write(tell_mapped, b'x')",
        ASK.replace('\n', "; "),
    ));
    expect(&close, &json!({ "process": { "uid": 123_456, "source": "read" } }));
}

/// A cgroup in the cgroup-v2 hierarchy; removed at the end.
pub(crate) struct Cgroup(pub(crate) PathBuf);

impl Cgroup {
    pub(crate) fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("it can be read");
        let is_v2 = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
        let root = mounts.lines().find(is_v2).and_then(|line| line.split(' ').nth(1)).expect("cgroup v2 is mounted");
        let path = PathBuf::from(root).join(name);
        fs::create_dir(&path).expect("we are root");
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            wait_until("the cgroup to be empty", || fs::remove_dir(&self.0).is_ok());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_container() {
    let id = format!("{:064x}", u128::from(std::process::id()) << 64 | 0xfeed_0000_0000_0000);
    let name = format!("docker-{id}.scope");
    let cgroup = Cgroup::new(&name);
    let procs = cgroup.0.join("cgroup.procs").display().to_string();
    let (close, pid) =
        client_of(&format!("open('{procs}', 'w').write('0')\nconnection = connect()\n{ASK}\nconnection.close()"));
    expect(&close, &json!({ "process": { "pid": pid, "container": id[..12] } }));
    let path = close["process"]["cgroup"].as_str().expect("a cgroup");
    assert!(path.ends_with(&format!("/{name}")), "{path}");
}

#[test]
fn the_same_port_in_two_namespaces() {
    const SCRIPT: &str = "listener = listen()\nsay('listening')\nserve(listener.accept()[0])\nhear()";
    let port = free_port();
    let tracer = Tracer::on_port(port);
    for name in ["owner1", "owner2"] {
        let namespace = Namespace::new(name);
        let inode = namespace.inode();
        let server = namespace.enter(|| Script::start(port, SCRIPT));
        server.expect("listening");
        let client = namespace.enter(|| exchange(port));
        for (local, remote, pid) in [(port, client, server.pid()), (client, port, std::process::id())] {
            let is_it = |close: &Value| close["netns"] == inode && is_socket(close, local, remote);
            let close = &tracer.wait_for_closes(1, is_it)[0];
            expect(close, &json!({ "process": { "pid": pid, "source": "read" }, "closer": null }));
        }
    }
}

/// Stops a process, so that nothing is looked up before it is told to go on.
pub(crate) fn stopped(tracer: &Tracer) {
    tracer.signal(Signal::STOP);
    let state = || fs::read_to_string(format!("/proc/{}/stat", tracer.pid())).expect("it runs");
    wait_until("tracer to stop", || state().rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')));
}

#[test]
fn gone_before_it_was_looked_up() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    stopped(&tracer);
    let mut client = Script::start(listener.port, &format!("connection = connect()\n{ASK}\nconnection.close()"));
    let (mut server, port) = listener.accept();
    answer(&mut server);
    end_of(&mut server);
    drop(server);
    client.ends();
    tracer.signal(Signal::CONT);
    expect(
        &tracer.wait_for_close(port, listener.port),
        &json!({
            "cause": "request_close",
            "process": { "pid": client.pid(), "comm": "python3", "exe": null, "cgroup": null, "uid": 0 },
        }),
    );
}

#[test]
fn a_zombie() {
    // Its executable is gone, and in cgroup v1 it is shown in the root.
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    stopped(&tracer);
    let script = format!(
        "def child():\n\
        \x20    connection = connect()\n\
        \x20    {}\n\
        \x20    connection.close()\n\
         pid = fork(child)\n\
         os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n\
         say(pid)\n\
         hear()",
        ASK.replace('\n', "; ")
    );
    let client = Script::start(listener.port, &script);
    let (mut server, port) = listener.accept();
    answer(&mut server);
    end_of(&mut server);
    drop(server);
    let pid: u32 = client.hear_number();
    tracer.signal(Signal::CONT);
    let close = tracer.wait_for_close(port, listener.port);
    expect(&close, &json!({ "process": { "pid": pid, "comm": "python3", "exe": null } }));
    // All of these processes are in one cgroup.
    let ours = &tracer.wait_for_close(listener.port, port)["process"]["cgroup"];
    let cgroup = &close["process"]["cgroup"];
    assert!(cgroup.is_null() || cgroup == ours, "{cgroup} is not {ours}");
}

#[test]
fn an_id_that_is_used_again_lends_nothing() {
    // `/proc` knows start times to a clock tick, 10 ms: the second process starts in another one.
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    stopped(&tracer);
    let script = format!(
        "def first():\n\
        \x20    connection = connect()\n\
        \x20    {}\n\
        \x20    connection.close()\n\
         pid = fork(first)\n\
         reap(pid)\n\
         time.sleep(0.02)\n\
         fork_as(pid, lambda: os.execvp('sleep', ['sleep', '60']))\n\
         while open(f'/proc/{{pid}}/comm').read() != 'sleep\\n': time.sleep(0.001)\n\
         say(pid)\n\
         hear()",
        ASK.replace('\n', "; ")
    );
    let client = Script::start(listener.port, &script);
    let (mut server, port) = listener.accept();
    answer(&mut server);
    end_of(&mut server);
    drop(server);
    let pid: u32 = client.hear_number();
    tracer.signal(Signal::CONT);
    expect(
        &tracer.wait_for_close(port, listener.port),
        &json!({ "process": { "pid": pid, "comm": "python3", "exe": null, "cgroup": null, "container": null } }),
    );
}

/// The server's record of a connection on which the client sends `requests`, a process reads one and ends, then another
/// one with its id does `then`, and the client `end`s it.
fn after_reuse(requests: usize, then: &str, end: impl FnOnce(TcpStream)) -> (Value, u32) {
    let port = free_port();
    let tracer = Tracer::on_port(port);
    let server = Script::start(
        port,
        &format!(
            "listener = listen()\n\
             say('listening')\n\
             connection, _ = listener.accept()\n\
             pid = fork(lambda: (rename('first'), read(connection)))\n\
             reap(pid)\n\
             alone, tell_alone = os.pipe()\n\
             def second():\n\
            \x20    rename('second')\n\
            \x20    os.read(alone, 1)\n\
            \x20    {then}\n\
            \x20    say(os.getpid())\n\
            \x20    hear()\n\
             fork_as(pid, second)\n\
             connection.close()\n\
             os.write(tell_alone, b'x')\n\
             reap(pid)"
        ),
    );
    server.expect("listening");
    let (mut stream, client) = connect(port);
    stream.write_all(&REQUEST.repeat(requests)).expect("it is open");
    let pid = server.hear_number();
    end(stream);
    (tracer.wait_for_close(port, client), pid)
}

#[test]
fn an_id_that_is_used_again_to_read() {
    let (close, pid) = after_reuse(2, "read(connection)", abort);
    expect(&close, &json!({ "process": { "pid": pid, "comm": "second", "source": "read" }, "closer": null }));
    assert!(close["process"]["exe"].is_string(), "{close:#}");
}

#[test]
fn an_id_that_is_used_again_to_close() {
    let (close, pid) = after_reuse(1, "connection.close()", |mut stream| end_of(&mut stream));
    expect(
        &close,
        &json!({
            "closed_by": "local",
            "process": { "pid": pid, "comm": "first", "source": "read", "exe": null },
            "closer": { "pid": pid, "comm": "second", "source": "close" },
        }),
    );
}

#[test]
fn a_pid_and_all_its_threads() {
    let listener = Listener::new();
    let mut asked = Script::start(
        listener.port,
        &format!(
            "hear()\n\
             def work():\n\
            \x20    connection = connect()\n\
            \x20    {}\n\
            \x20    connection.close()\n\
             for thread in [threading.Thread(target=work) for _ in range(3)]:\n\
            \x20    thread.start()\n\
            \x20    thread.join()\n\
             reap(fork(work))\n\
             hear()",
            ASK.replace('\n', "; ")
        ),
    );
    let tracer = Tracer::start(&["--pid", &asked.pid().to_string()]);
    asked.tell("start");
    for i in 0..4 {
        let (mut server, port) = listener.accept();
        answer(&mut server);
        end_of(&mut server);
        drop(server);
        let close = tracer.wait_for_close(port, listener.port);
        assert_eq!(close["process"]["pid"] == asked.pid(), i < 3, "{close:#}");
    }
    let run = tracer.stop();
    assert!(run.closes().iter().all(|close| port_of(close, "remote") == Some(listener.port)), "the other end's");
    assert_eq!(run.closes().len(), 4);
}

#[test]
fn a_pid_that_gives_its_socket_away() {
    // One socket it connects and closes itself; one goes to a process outside, which reads and closes it; and one comes
    // from there, and is closed by it.
    let listener = Listener::new();
    let mut outside = Script::start(
        listener.port,
        &format!(
            "unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
             unix.bind(f'\\0tracer-{{PORT}}')\n\
             unix.listen()\n\
             say('waiting')\n\
             peer, _ = unix.accept()\n\
             connection = socket.socket(fileno=socket.recv_fds(peer, 1, 1)[1][0])\n\
             peer.recv(1)\n\
             {ASK}\n\
             connection.close()\n\
             connection = connect()\n\
             {ASK}\n\
             socket.send_fds(peer, [b'x'], [connection.fileno()])\n\
             connection.close()\n\
             peer.send(b'x')\n\
             hear()"
        ),
    );
    outside.expect("waiting");
    let mut asked = Script::start(
        listener.port,
        &format!(
            "hear()\n\
             connection = connect()\n\
             {ASK}\n\
             connection.close()\n\
             unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
             unix.connect(f'\\0tracer-{{PORT}}')\n\
             connection = connect()\n\
             socket.send_fds(unix, [b'x'], [connection.fileno()])\n\
             connection.close()\n\
             unix.send(b'x')\n\
             fd = socket.recv_fds(unix, 1, 1)[1][0]\n\
             unix.recv(1)\n\
             os.close(fd)\n\
             hear()"
        ),
    );
    let tracer = Tracer::start(&["--pid", &asked.pid().to_string()]);
    asked.tell("start");
    let mut ports = Vec::new();
    for _ in 0..3 {
        let (mut server, port) = listener.accept();
        answer(&mut server);
        end_of(&mut server);
        ports.push(port);
    }
    let own = tracer.wait_for_close(ports[0], listener.port);
    expect(&own, &json!({ "process": { "pid": asked.pid() }, "closer": null }));
    let taken = tracer.wait_for_close(ports[2], listener.port);
    expect(
        &taken,
        &json!({ "process": { "pid": outside.pid() }, "closer": { "pid": asked.pid(), "source": "close" } }),
    );
    // The one that it gave away is the other one's.
    assert_eq!(tracer.stop().closes().len(), 2);
    outside.tell("end");
    outside.ends();
}
