//! What the tests stand on: a running tracer whose events can be waited for, pairs of sockets, and comparing records.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

/// Longest wait for anything that must happen; `TRACER_TEST_PATIENCE` gives slow machines more, in seconds.
pub(crate) static PATIENCE: LazyLock<Duration> = LazyLock::new(|| {
    let seconds = std::env::var("TRACER_TEST_PATIENCE").map_or(20, |text| text.parse().expect("a number of seconds"));
    Duration::from_secs(seconds)
});

/// Whether this machine was made for the tests: `cargo xtask vm`.
pub(crate) fn in_a_guest() -> bool {
    std::env::var_os("TRACER_TEST_GUEST").is_some()
}

/// The same command in a mount namespace of its own, after `script`.
pub(crate) fn in_mounts_where(script: &str, command: &Command) -> Command {
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "--propagation", "private", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"]);
    inside.arg(command.get_program()).args(command.get_args());
    inside
}

/// The real binary.
pub(crate) fn tracer() -> Command {
    assert!(rustix::process::geteuid().is_root(), "the kernel tests need root: run `cargo xtask test`");
    Command::new(env!("CARGO_BIN_EXE_tracer"))
}

/// A port for one test, outside the range that the kernel takes ephemeral ports from.
///
/// Ports are taken from blocks that nobody else uses. A block belongs to the process that listens on its first port, so
/// that two runs of the tests on one host do not meet.
pub(crate) fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const BLOCK: u16 = 100;
    const BLOCKS: u16 = 100;
    static OURS: Mutex<Vec<(TcpListener, u16)>> = Mutex::new(Vec::new());
    let listen = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some((_, next)) = ours.last_mut() {
            // Not tried out first: a child that another test forks in that moment would keep the port for a while.
            if !next.is_multiple_of(BLOCK) {
                *next += 1;
                return *next - 1;
            }
        }
        let block = (0..BLOCKS).map(|n| FIRST + n * BLOCK).find_map(|first| Some((listen(first).ok()?, first + 1)));
        ours.push(block.expect("one of the blocks is free"));
    }
}

/// Polls until `condition` holds, and fails if it never does.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + *PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {:?} in vain for: {what}", *PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The standard output of a command that must succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// The name of a process as the kernel knows it.
pub(crate) fn comm_of(pid: u32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("the process runs");
    comm.trim_end_matches('\n').to_owned()
}

/// Copies an executable. Not by this process: a child that another test starts would hold the new file open for writing, from its
/// `fork` to its `exec`, and what is open for writing cannot be run.
pub(crate) fn copy_executable(from: impl AsRef<OsStr>, to: &Path) {
    run(Command::new("cp").arg("--").arg(from).arg(to));
}

/// Resident memory of a process, KiB.
pub(crate) fn resident_kib(pid: u32) -> u64 {
    memory_kib(pid, "VmRSS")
}

/// Of it, what is no file's. Of its executable more is mapped the longer it runs, and on newer kernels in large pieces.
pub(crate) fn anonymous_kib(pid: u32) -> u64 {
    memory_kib(pid, "RssAnon")
}

fn memory_kib(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// A child process that is killed when it goes out of scope.
pub(crate) struct Guard(pub(crate) Child);

impl Guard {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, signal).expect("the process runs");
    }

    /// Waits for its end, which must come.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("a process to end", || {
            status = self.0.try_wait().expect("it is our child");
            status.is_some()
        });
        status.expect("it has ended")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network namespace of its own with a loopback device, deleted at the end.
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    pub(crate) fn new(of: &str) -> Self {
        let name = format!("tracer-{of}-{}", std::process::id());
        let namespace = Self { name };
        run(Command::new("ip").args(["netns", "add", &namespace.name]));
        run(Command::new("ip").args(["-n", &namespace.name, "link", "set", "lo", "up"]));
        namespace
    }

    fn file(&self) -> File {
        File::open(format!("/run/netns/{}", self.name)).expect("it exists")
    }

    /// Its inode number, as records name it.
    pub(crate) fn inode(&self) -> u64 {
        self.file().metadata().expect("it is a file").ino()
    }

    /// Runs `inside` in a thread that is in the namespace.
    pub(crate) fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(file.as_fd(), network).expect("we are root");
                inside()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A tracer that runs, with the events that it has printed so far.
pub(crate) struct Tracer {
    process: Guard,
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<Printed>,
    changed: Condvar,
}

#[derive(Default)]
struct Printed {
    events: Vec<Value>,
    stderr: String,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Printed> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that a tracer printed.
pub(crate) struct Run {
    pub(crate) events: Vec<Value>,
    pub(crate) summary: Value,
}

impl Tracer {
    /// Starts `tracer run --json ARGS…` and waits until it traces.
    #[track_caller]
    pub(crate) fn start<A: AsRef<str>>(args: &[A]) -> Self {
        Self::start_by(tracer(), args)
    }

    /// The same, with a command that is tracer, or becomes it.
    #[track_caller]
    pub(crate) fn start_by<A: AsRef<str>>(mut command: Command, args: &[A]) -> Self {
        command.args(["run", "--json"]).args(args.iter().map(AsRef::as_ref));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("tracer starts");
        let shared = Arc::new(Shared::default());
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let readers = vec![
            std::thread::spawn({
                let shared = Arc::clone(&shared);
                move || read_events(stdout, &shared)
            }),
            std::thread::spawn({
                let shared = Arc::clone(&shared);
                move || {
                    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                        let mut state = shared.lock();
                        state.stderr.push_str(&line);
                        state.stderr.push('\n');
                    }
                }
            }),
        ];
        let tracer = Self { process: Guard(child), shared, readers };
        let start = tracer.wait_for("the start line", |events| events.first().cloned());
        assert_eq!(start["type"], "start", "{start:#}");
        tracer
    }

    /// The same, filtered to one port.
    #[track_caller]
    pub(crate) fn on_port(port: u16) -> Self {
        Self::start(&["--port", &port.to_string()])
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// What it said on stderr so far.
    pub(crate) fn stderr(&self) -> String {
        self.shared.lock().stderr.clone()
    }

    /// The events so far.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.shared.lock().events.clone()
    }

    /// Waits until `find` finds what it looks for among the events so far.
    #[track_caller]
    pub(crate) fn wait_for<T>(&self, what: &str, find: impl FnMut(&[Value]) -> Option<T>) -> T {
        self.wait_for_at_most(*PATIENCE, what, find)
    }

    /// The same with another patience.
    #[track_caller]
    pub(crate) fn wait_for_at_most<T>(
        &self,
        patience: Duration,
        what: &str,
        mut find: impl FnMut(&[Value]) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = find(&state.events) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                panic!(
                    "{} while waiting for {what}; events:\n{}stderr:\n{}",
                    if state.ended { "tracer ended" } else { "time is up" },
                    lines(&state.events),
                    state.stderr
                );
            }
            drop(self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner));
            // Not for each event: to look through thousands of them takes so long that their reader would not get on.
            std::thread::sleep(Duration::from_millis(5));
            state = self.shared.lock();
        }
    }

    /// Waits for this many `close` records that `wanted` holds for, and returns them.
    #[track_caller]
    pub(crate) fn wait_for_closes(&self, count: usize, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        self.wait_for(&format!("{count} close records"), |events| {
            let found: Vec<_> = events.iter().filter(|event| event["type"] == "close" && wanted(event)).collect();
            (found.len() >= count).then(|| found.into_iter().cloned().collect())
        })
    }

    /// Waits for the one `close` record of the socket with this local and remote port.
    #[track_caller]
    pub(crate) fn wait_for_close(&self, local: u16, remote: u16) -> Value {
        let is_it = |event: &Value| event["type"] == "close" && is_socket(event, local, remote);
        self.wait_for(&format!("the close of {local} -> {remote}"), |events| {
            events.iter().find(|event| is_it(event)).cloned()
        })
    }

    /// Asks tracer to end, and returns all that it printed.
    pub(crate) fn stop(self) -> Run {
        self.signal(Signal::INT);
        let (run, status) = self.join();
        assert!(status.success(), "tracer: {status}");
        run
    }

    /// Waits for tracer's end.
    pub(crate) fn join(mut self) -> (Run, ExitStatus) {
        let status = self.process.wait();
        for reader in self.readers.drain(..) {
            reader.join().expect("reading does not fail");
        }
        let state = self.shared.lock();
        let events = state.events.clone();
        let summary = events.last().cloned().unwrap_or_default();
        assert_eq!(summary["type"], "summary", "{}{}", lines(&events), state.stderr);
        assert_eq!(summary["lost"], 0, "{summary:#}");
        (Run { events, summary }, status)
    }
}

impl Run {
    /// The `close` records.
    pub(crate) fn closes(&self) -> Vec<&Value> {
        self.events.iter().filter(|event| event["type"] == "close").collect()
    }
}

/// Of so many ends, those that must be told: some kernels show a few to no BPF program, one of 500 at most (`docs/oracle.md`).
pub(crate) const fn not_hidden(ends: usize) -> usize {
    ends * 499 / 500
}

/// Collects one event a line; what is no JSON object with `type` and `time` fails the test when it is looked for.
fn read_events(stdout: ChildStdout, shared: &Shared) {
    // Parsing is slow, and tracer ends without a reader that takes its time.
    let (send, lines) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::with_capacity(1 << 20, stdout).lines().map_while(Result::ok) {
            send.send(line).expect("it is read to its end");
        }
    });
    for line in lines {
        let event =
            serde_json::from_str(&line).unwrap_or_else(|error| json!({ "not JSON": line, "error": error.to_string() }));
        shared.lock().events.push(event);
        shared.changed.notify_all();
    }
    reader.join().expect("reading does not fail");
    shared.lock().ended = true;
    shared.changed.notify_all();
}

fn lines(events: &[Value]) -> String {
    events.iter().fold(String::new(), |mut all, event| {
        let _ = writeln!(all, "{event}");
        all
    })
}

/// The port of an event's `local` or `remote`.
pub(crate) fn port_of(event: &Value, end: &str) -> Option<u16> {
    event[end].as_str()?.rsplit_once(':')?.1.parse().ok()
}

/// Whether the event is about the socket with these ports.
pub(crate) fn is_socket(event: &Value, local: u16, remote: u16) -> bool {
    port_of(event, "local") == Some(local) && port_of(event, "remote") == Some(remote)
}

/// Fails unless each field of `wanted` is in the record with that value; objects are compared field by field.
#[track_caller]
pub(crate) fn expect(record: &Value, wanted: &Value) {
    let mut differences = String::new();
    let mut wanted = wanted.clone();
    if wanted.get("closer").is_some_and(Value::is_null) && record["process"]["pid"] == std::process::id() {
        forgive_forks(record, &mut wanted);
    }
    compare("", record, &wanted, &mut differences);
    assert!(differences.is_empty(), "{differences}in the record\n{record:#}");
}

/// A child that another test starts has a copy of each of this process's descriptors, from its `fork` to its `exec`. If one
/// is closed here in that moment, it is the child that lets go last, and so it is the closer.
fn forgive_forks(record: &Value, wanted: &mut Value) {
    let Some(closer) = record["closer"]["pid"].as_u64() else { return };
    // It may have ended since.
    if parent_of(closer).is_none_or(|parent| parent == std::process::id()) {
        wanted["closer"] = record["closer"].clone();
    }
}

/// The parent of a process; `None`: it has ended.
pub(crate) fn parent_of(pid: u64) -> Option<u32> {
    // Its name may be any bytes.
    let status = std::fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("each has one");
    Some(parent.trim().parse().expect("a number"))
}

fn compare(path: &str, record: &Value, wanted: &Value, differences: &mut String) {
    match wanted.as_object() {
        Some(fields) if record.is_object() => {
            for (name, value) in fields {
                compare(&format!("{path}.{name}"), &record[name], value, differences);
            }
        }
        _ if record == wanted => {}
        _ => {
            let _ = writeln!(differences, "{path} is {record}, not {wanted}");
        }
    }
}

/// A record bears the time of something that has happened since then, give or take a second.
#[track_caller]
pub(crate) fn is_dated(record: &Value, since: Timestamp) {
    const GRACE: SignedDuration = SignedDuration::from_secs(1);
    let date: Timestamp = record["time"].as_str().expect("a date").parse().expect("a date");
    let now = Timestamp::now();
    assert!((since - GRACE..=now + GRACE).contains(&date), "not between {since} and {now}: {record:#}");
}

/// The names of the states that a record lists.
pub(crate) fn states_of(record: &Value) -> Vec<&str> {
    record["states"].as_array().into_iter().flatten().filter_map(|state| state["state"].as_str()).collect()
}

/// Both ends of a TCP connection, in this process.
pub(crate) struct Pair {
    pub(crate) server: TcpStream,
    pub(crate) client: TcpStream,
    pub(crate) server_port: u16,
    pub(crate) client_port: u16,
}

/// A listener on 127.0.0.1 that connections can be made to one by one.
pub(crate) struct Listener {
    listener: TcpListener,
    pub(crate) port: u16,
}

impl Listener {
    pub(crate) fn new() -> Self {
        let port = free_port();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the port is free");
        // Should nobody connect, `accept` fails.
        set_socket_timeout(&listener, Timeout::Recv, Some(*PATIENCE)).expect("a time-out can be set");
        Self { listener, port }
    }

    pub(crate) fn connect(&self) -> Pair {
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).expect("it listens");
        prepare(&client);
        let (server, client_port) = self.accept();
        Pair { server, client, server_port: self.port, client_port }
    }

    /// One connection, whose request asks for its end; the server closes first. Answers the ports, the server's first.
    pub(crate) fn serve_and_close(&self) -> (u16, u16) {
        let mut pair = self.connect();
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        pair.server_closes_first()
    }

    /// Takes a connection that another process makes; also returns its port.
    pub(crate) fn accept(&self) -> (TcpStream, u16) {
        let (server, peer) = self.listener.accept().expect("it listens");
        prepare(&server);
        (server, peer.port())
    }
}

fn prepare(stream: &TcpStream) {
    stream.set_read_timeout(Some(*PATIENCE)).expect("a time-out can be set");
    stream.set_nodelay(true).expect("TCP_NODELAY can be set");
}

impl Pair {
    /// The client sends, the server receives all of it.
    pub(crate) fn request(&mut self, bytes: impl AsRef<[u8]>) {
        transfer(&mut self.client, &mut self.server, bytes.as_ref());
    }

    /// The server sends, the client receives all of it.
    pub(crate) fn respond(&mut self, bytes: impl AsRef<[u8]>) {
        transfer(&mut self.server, &mut self.client, bytes.as_ref());
    }

    /// The server closes, then the client.
    pub(crate) fn server_closes_first(self) -> (u16, u16) {
        let Self { server, mut client, server_port, client_port } = self;
        drop(server);
        end_of(&mut client);
        (server_port, client_port)
    }

    /// The client closes, then the server.
    pub(crate) fn client_closes_first(self) -> (u16, u16) {
        let Self { mut server, client, server_port, client_port } = self;
        drop(client);
        end_of(&mut server);
        (server_port, client_port)
    }
}

/// Writes to one end and reads as much from the other; large data in pieces, so that neither end blocks.
fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    for piece in bytes.chunks(16 << 10) {
        from.write_all(piece).expect("the connection is open");
        to.read_exact(&mut vec![0; piece.len()]).expect("the connection is open");
    }
}

/// Reads up to the peer's FIN.
pub(crate) fn end_of(stream: &mut TcpStream) {
    stream.read_to_end(&mut Vec::new()).expect("the peer sent a FIN");
}

/// Makes `close` send a RST.
pub(crate) fn abort(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("SO_LINGER can be set");
    drop(stream);
}

/// A small request and its answer, with the header lines of each.
pub(crate) fn get(headers: &str) -> String {
    format!("GET /path HTTP/1.1\r\nHost: test\r\n{headers}\r\n")
}

/// See [`get`].
pub(crate) fn ok(headers: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{headers}\r\nok")
}
