//! What goes wrong around tracer: it is killed, nobody reads it, disks are full, mounts are missing, namespaces vanish, processes
//! come and go by the thousand. `docs/faults.md` says what is expected of each; other tests that it names are elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::ClockId;
use serde_json::{Value, json};

use crate::features::{degraded, is_always_said};
use crate::leftovers::{exists, held_by, mounts};
use crate::names::stopped;
use crate::privileges::{broker_of, names_everything, nobody_with, unit_capabilities};
use crate::rig::{
    Guard, Listener, Namespace, Tracer, abort, end_of, expect, get, in_a_guest, in_mounts_where, is_dated, is_socket,
    not_hidden, ok, port_of, resident_kib, run, tracer, wait_until,
};
use crate::script::Script;
use crate::summary::launcher_of;

/// Some connections, one after another, each closed by the server first.
fn traffic(listener: &Listener, count: usize) -> Vec<(u16, u16)> {
    (0..count).map(|_| listener.serve_and_close()).collect()
}

/// So many connections that their lines do not fit into the pipe at stdout (1 MiB; a line has 900 bytes, and there are two). Not
/// all at once: what a small ring buffer has no room for is lost before it is a line.
fn more_than_a_pipe(listener: &Listener) {
    for _ in 0..15 {
        traffic(listener, 200);
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// `tracer run --json` on one port, whose output nobody collects.
fn tracer_on(listener: &Listener) -> Command {
    let mut command = tracer();
    command.args(["run", "--json", "--port", &listener.port.to_string()]);
    command
}

fn state_of(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn children_of(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// What a process holds, by kind; nothing if it has ended.
fn kinds_of(pid: u32) -> BTreeSet<&'static str> {
    if fs::read_dir(format!("/proc/{pid}/fdinfo")).is_err() {
        return BTreeSet::new();
    }
    held_by(pid).into_iter().map(|(kind, _)| kind).collect()
}

/// Stops a process as it is, kills it, and waits until all is gone that it held, with its children.
fn killed_it_leaves_nothing(process: &mut Guard) {
    let pid = process.id();
    process.signal(Signal::STOP);
    wait_until("it to stop or to end", || matches!(state_of(pid), None | Some('T' | 'Z')));
    let (held, children) = (held_by(pid), children_of(pid));
    process.signal(Signal::KILL);
    process.wait();
    wait_until("programs, maps and links to go", || !held.iter().any(|of| exists(*of)));
    // Whose children they were, an init that collects nobody.
    wait_until("the broker to go", || children.iter().all(|pid| matches!(state_of(*pid), None | Some('Z'))));
}

#[test]
fn sigkill_at_any_moment_of_the_start() {
    let before = mounts();
    // In the order in which they come: the broker, the first map, the first program, the first link.
    let reached = |pid, what| match what {
        "the broker" => !children_of(pid).is_empty(),
        "a map" => kinds_of(pid).contains("map"),
        "a program" => kinds_of(pid).contains("prog"),
        _ => kinds_of(pid).contains("link"),
    };
    let listener = Listener::new();
    let mut seen = Vec::new();
    for what in ["the broker", "a map", "a program", "a link"] {
        let mut process = Guard(tracer_on(&listener).stdout(Stdio::null()).spawn().expect("it starts"));
        let pid = process.id();
        // Without a pause: the moments are short.
        let deadline = Instant::now() + *crate::rig::PATIENCE;
        while !reached(pid, what) {
            assert!(Instant::now() < deadline, "{what} does not come");
        }
        seen.push((what, kinds_of(pid)));
        killed_it_leaves_nothing(&mut process);
    }
    // It was before all was there, at least once.
    assert!(seen.iter().any(|(_, kinds)| !kinds.contains("link")), "{seen:?}");
    assert_eq!(mounts(), before);
}

/// Says so when it goes out of scope.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whatever it does then: most moments are of the start, which takes longest, some of tracing, with all kinds of programs.
#[test]
fn sigkill_at_random_moments() {
    // A guest is slow, and has the same moments.
    let kills = if in_a_guest() { 8 } else { 24 };
    let before = mounts();
    let listener = Listener::new();
    let start = |options: &[&str]| {
        let mut command = tracer_on(&listener);
        Guard(command.args(options).stdout(Stdio::null()).spawn().expect("it starts"))
    };
    let began = Instant::now();
    let mut process = start(&[]);
    wait_until("it to trace", || started(process.id()));
    // Of this machine, as busy as it is.
    let start_takes = began.elapsed();
    killed_it_leaves_nothing(&mut process);
    let (pid, ends) = (std::process::id().to_string(), AtomicBool::new(false));
    let options: [&[&str]; 4] = [&[], &["--states"], &["--pid", &pid], &["--no-sandbox", "--close-wait-after", "1ms"]];
    std::thread::scope(|scope| {
        // However this ends: the traffic is waited for.
        let _ends = Ends(&ends);
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                traffic(&listener, 1);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        for n in 0..kills {
            let random = RandomState::new().hash_one(n) as f64 / u64::MAX as f64;
            let moment = start_takes.mul_f64(random * 1.5);
            let mut process = start(options[n % options.len()]);
            std::thread::sleep(moment);
            eprintln!("{:?} after {moment:?}: {:?}", options[n % options.len()], kinds_of(process.id()));
            assert!(process.0.try_wait().expect("it is our child").is_none(), "it has ended by itself");
            killed_it_leaves_nothing(&mut process);
        }
    });
    assert_eq!(mounts(), before);
}

#[test]
fn sigkill_while_it_ends() {
    let listener = Listener::new();
    // Nobody reads, so its end takes a while.
    let mut process = Guard(tracer_on(&listener).stdout(Stdio::piped()).spawn().expect("it starts"));
    wait_until("all links", || kinds_of(process.id()).contains("link") && started(process.id()));
    more_than_a_pipe(&listener);
    std::thread::sleep(Duration::from_millis(300));
    process.signal(Signal::INT);
    wait_until("the links to go", || !kinds_of(process.id()).contains("link"));
    assert!(kinds_of(process.id()).contains("map"), "it has ended already");
    killed_it_leaves_nothing(&mut process);
}

/// Whether it traces: its second thread, which writes, is the last thing that it makes.
fn started(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 1)
}

/// A broker that hangs is given up after three answers that do not come; it dies with tracer nevertheless.
#[test]
fn a_broker_that_hangs() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let broker = broker_of(&tracer);
    let signal = |signal| kill_process(Pid::from_raw(broker.cast_signed()).expect("an id"), signal).expect("it runs");
    signal(Signal::STOP);
    for (server, client) in traffic(&listener, 3) {
        let wanted = json!({ "process": { "pid": std::process::id(), "exe": null }, "cause": "request_close" });
        expect(&tracer.wait_for_close(server, client), &wanted);
        expect(&tracer.wait_for_close(client, server), &wanted);
    }
    wait_until("a warning", || tracer.stderr().contains("does not answer"));
    tracer.signal(Signal::KILL);
    drop(tracer);
    wait_until("the broker to go", || matches!(state_of(broker), None | Some('Z')));
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).expect("an id"), Signal::KILL).expect("it runs");
}

fn has_ended(pid: u32) -> bool {
    matches!(state_of(pid), None | Some('Z'))
}

/// A tracer that runs this command where a few sockets are in TIME_WAIT; in a namespace of its own, so that nobody else's count.
fn with_exec(namespace: &Namespace, command: &str) -> (Listener, Tracer) {
    namespace.enter(|| {
        let listener = Listener::new();
        let port = listener.port.to_string();
        let alerts = ["--alert-time-wait", "2", "--alert-rate", "0.2", "--exec", command];
        let tracer = Tracer::start(&[&["--port", &port][..], &alerts].concat());
        (listener, tracer)
    })
}

#[test]
fn sigkill_of_the_launcher() {
    let directory = tempfile::tempdir().expect("a directory");
    let ran = directory.path().join("ran");
    let namespace = Namespace::new("launcher");
    let (listener, tracer) = with_exec(&namespace, &format!("touch {}", ran.display()));
    let launcher = launcher_of(&tracer);
    kill(launcher);
    wait_until("the launcher to go", || has_ended(launcher));
    // Two alerts, of which neither finds it.
    namespace.enter(|| traffic(&listener, 3));
    for metric in ["time_wait", "rate"] {
        tracer.wait_for("an alert", |events| {
            events.iter().any(|event| event["type"] == "alert" && event["metric"] == metric).then_some(())
        });
    }
    for (server, client) in namespace.enter(|| traffic(&listener, 3)) {
        expect(&tracer.wait_for_close(server, client), &json!({ "cause": "request_close", "final": "time_wait" }));
        expect(&tracer.wait_for_close(client, server), &json!({ "cause": "request_close" }));
    }
    wait_until("a warning", || tracer.stderr().contains("--exec"));
    // One more check, at least.
    std::thread::sleep(Duration::from_millis(1_500));
    let said = tracer.stderr();
    assert_eq!((said.matches("--exec").count(), said.matches("is gone").count()), (1, 1), "{said}");
    assert_eq!(tracer.stop().summary["closes"], 12);
    assert!(!ran.exists(), "nothing was there to run it");
}

#[test]
fn sigkill_while_the_command_of_exec_runs() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    // It ends when it is told to, or the directory goes.
    let command = format!(
        "echo $$ > {0}/new; mv {0}/new {0}/pid; while [ -e {0}/pid ] && [ ! -e {0}/end ]; do sleep 0.05; done; cat > {0}/new; mv {0}/new {0}/got",
        directory.path().display()
    );
    let namespace = Namespace::new("exec");
    let (listener, tracer) = with_exec(&namespace, &command);
    namespace.enter(|| traffic(&listener, 3));
    wait_until("the command to run", || path("pid").exists());
    let command: u32 = fs::read_to_string(path("pid")).expect("it is there").trim().parse().expect("an id");
    let (held, children) = (held_by(tracer.pid()), children_of(tracer.pid()));
    assert!(children.len() == 2 && children.contains(&launcher_of(&tracer)), "a broker and a launcher: {children:?}");
    tracer.signal(Signal::KILL);
    drop(tracer);
    wait_until("programs, maps and links to go", || !held.iter().any(|of| exists(*of)));
    wait_until("the broker and the launcher to go", || children.iter().all(|pid| has_ended(*pid)));
    // The command is not tracer's own: it goes on, with all of its summary.
    assert!(!has_ended(command), "it goes on");
    fs::write(path("end"), "").expect("it is ours");
    wait_until("the command to end", || path("got").exists() && has_ended(command));
    let summary: Value = serde_json::from_slice(&fs::read(path("got")).expect("it is there")).expect("JSON");
    expect(&summary, &json!({ "type": "summary", "final": false }));
}

#[test]
fn a_full_stdout_is_an_error() {
    for format in [&["--json"][..], &[], &["--summary-only", "--duration", "1s"]] {
        let listener = Listener::new();
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("it is there");
        let mut command = tracer();
        command.arg("run").args(format).args(["--port", &listener.port.to_string()]);
        let mut process = Guard(command.stdout(full).stderr(Stdio::piped()).spawn().expect("it starts"));
        let status = process.wait();
        let mut said = String::new();
        process.0.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
        assert_eq!(status.code(), Some(1), "{format:?}: {said}");
        assert!(said.contains("cannot write to stdout") && said.contains("space"), "{format:?}: {said}");
        // Beside what is said at each start on this kernel.
        let others = said.lines().filter(|line| !is_always_said(line));
        assert_eq!(others.count(), 1, "{format:?}: {said}");
    }
}

/// As if it were `/dev/null`: what is asked for besides is still done.
#[test]
fn a_stdout_that_is_closed_from_the_beginning() {
    let (directory, listener) = (tempfile::tempdir().expect("a directory"), Listener::new());
    let recording = directory.path().join("run.rec");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" >&-", "sh"]).arg(tracer().get_program());
    command.args(["run", "--json", "--port", &listener.port.to_string(), "--record"]).arg(&recording);
    let mut process = Guard(command.spawn().expect("it starts"));
    wait_until("it to trace", || fs::metadata(&recording).is_ok_and(|meta| meta.len() > 16));
    traffic(&listener, 2);
    // A child that another test starts may hold one of the sockets for a moment longer.
    let is_close = |event: &&Value| event["type"] == "close";
    wait_until("all closes", || report(&recording).0.iter().filter(is_close).count() == 4);
    process.signal(Signal::INT);
    assert_eq!(process.wait().code(), Some(0));
    let (events, code, said) = report(&recording);
    assert_eq!((code, events.last().expect("a summary")["closes"].as_u64()), (0, Some(4)), "{said}");
}

/// What `tracer report` says, with its exit code and what it complains of.
fn report(recording: &Path) -> (Vec<Value>, i32, String) {
    let Output { status, stdout, stderr } =
        tracer().args(["report", "--json"]).arg(recording).output().expect("it starts");
    let events = stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(serde_json::from_slice);
    let events = events.collect::<Result<_, _>>().expect("JSON");
    (events, status.code().expect("not killed"), String::from_utf8_lossy(&stderr).into_owned())
}

/// Starts tracer with room for few records, on a port, and reads no more than its first line.
fn unread(listener: &Listener) -> (Guard, BufReader<ChildStdout>) {
    let mut command = tracer_on(listener);
    command.args(["--ring-size", "64K"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Guard(command.spawn().expect("it starts"));
    // A buffer that holds the first line and little more.
    let mut stdout = BufReader::with_capacity(256, process.0.stdout.take().expect("piped"));
    let mut start = String::new();
    stdout.read_line(&mut start).expect("it prints");
    assert!(start.contains(r#""type":"start""#), "{start}");
    (process, stdout)
}

#[test]
fn a_reader_that_stalls_costs_records_and_each_is_counted() {
    // For three seconds tracer sets aside what its ring has no room for.
    const STALL: Duration = Duration::from_secs(5);
    let listener = Listener::new();
    let (process, stdout) = unread(&listener);
    // Nobody waits for tracer: these go on.
    let (began, mut made) = (Instant::now(), 0);
    while made < 5_000 || began.elapsed() < STALL {
        made += traffic(&listener, 100).len() as u64;
        // Ports are left.
        std::thread::sleep(Duration::from_millis(20));
    }
    let (say, said) = std::sync::mpsc::channel::<Value>();
    let reader = std::thread::spawn(move || {
        for line in stdout.lines() {
            // Nobody listens any more where the test has failed.
            let _ = say.send(serde_json::from_str(&line.expect("UTF-8")).expect("JSON"));
        }
    });
    // All that was kept, until nothing more comes.
    let mut events: Vec<Value> = Vec::new();
    while let Ok(event) = said.recv_timeout(Duration::from_secs(2)) {
        events.push(event);
    }
    // From then on nothing is lost.
    let (server, client) = traffic(&listener, 1)[0];
    for (local, remote) in [(server, client), (client, server)] {
        while !events.iter().any(|event| event["type"] == "close" && is_socket(event, local, remote)) {
            events.push(said.recv_timeout(*crate::rig::PATIENCE).expect("it goes on"));
        }
    }
    let mut process = process;
    process.signal(Signal::INT);
    assert_eq!(process.wait().code(), Some(0));
    reader.join().expect("all is JSON");
    events.extend(said.try_iter());
    let closes = events.iter().filter(|event| event["type"] == "close").count() as u64;
    let lost: u64 = events.iter().filter_map(|event| event["records"].as_u64()).sum();
    let summary = events.last().expect("a summary");
    expect(summary, &json!({ "type": "summary", "closes": closes, "lost": lost }));
    assert!(lost > 0, "there was room for all: {summary:#}");
    assert_eq!(closes + lost, 2 * (made + 1));
}

#[test]
fn a_reader_that_never_comes_does_not_hold_up_the_end() {
    let listener = Listener::new();
    let (mut process, stdout) = unread(&listener);
    more_than_a_pipe(&listener);
    let asked = Instant::now();
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    let mut said = String::new();
    process.0.stderr.take().expect("piped").read_to_string(&mut said).expect("UTF-8");
    assert!(said.contains("stdout was not read"), "{said}");
    drop(stdout);
}

/// A file system of its own that is really full.
#[test]
fn a_full_disk_ends_the_recording_and_nothing_else() {
    let (directory, listener) = (tempfile::tempdir().expect("a directory"), Listener::new());
    let at = directory.path().display();
    let mount = format!("mount -t tmpfs -o size=64k none {at}");
    let path = directory.path().join("run.rec");
    let command = in_mounts_where(&mount, &tracer());
    let tracer =
        Tracer::start_by(command, &["--port", &listener.port.to_string(), "--record", path.to_str().expect("UTF-8")]);
    let disk =
        Path::new("/proc").join(tracer.pid().to_string()).join("root").join(at.to_string().trim_start_matches('/'));
    let recording = disk.join("run.rec");
    let begun = traffic(&listener, 2);
    for (server, client) in &begun {
        tracer.wait_for_close(*server, *client);
        tracer.wait_for_close(*client, *server);
    }
    // What was printed is in the file a second later.
    std::thread::sleep(Duration::from_millis(1500));
    let error = fs::write(disk.join("fill"), vec![0; 128 << 10]).expect_err("it does not fit");
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    // More than the last page has room for.
    let mut made = begun.len();
    wait_until("a warning", || {
        made += traffic(&listener, 50).len();
        std::thread::sleep(Duration::from_millis(100));
        tracer.stderr().contains("cannot write to")
    });
    made += traffic(&listener, 2).len();
    tracer.wait_for_closes(2 * made, |_| true);
    let said = tracer.stderr();
    assert!(said.contains("No space left") && said.contains("tracing goes on"), "{said}");
    assert_eq!(said.matches("cannot write to").count(), 1, "{said}");
    let copy = tempfile::NamedTempFile::new().expect("a file");
    fs::copy(&recording, copy.path()).expect("it can be read");
    tracer.signal(Signal::INT);
    let (run, status) = tracer.join();
    assert_eq!(status.code(), Some(8), "the recording is incomplete");
    assert_eq!(run.closes().len(), 2 * made, "the tracing is not");
    let (events, code, said) = report(copy.path());
    assert_eq!(code, 8, "{said}");
    let recorded: Vec<_> = events.iter().filter(|event| event["type"] == "close").collect();
    assert!(recorded.len() >= 2 * begun.len(), "{}", recorded.len());
    assert!(recorded.iter().zip(run.closes()).all(|(one, other)| **one == *other));
}

const HIDE: &str = "mount -t proc -o hidepid=2 proc /proc";

#[test]
fn with_processes_hidden_the_units_capabilities_are_enough() {
    let directory = tempfile::tempdir().expect("a directory");
    names_everything("hidepid", in_mounts_where(HIDE, &nobody_with(&unit_capabilities(), directory.path())));
}

#[test]
fn with_processes_hidden_from_it_it_names_by_the_kernel_alone() {
    let (directory, listener) = (tempfile::tempdir().expect("a directory"), Listener::new());
    let command = in_mounts_where(HIDE, &nobody_with("+bpf,+perfmon,+net_admin", directory.path()));
    let tracer = Tracer::start_by(command, &["--port", &listener.port.to_string()]);
    for (server, client) in traffic(&listener, 2) {
        // Hidden is not gone: nothing is said to be known.
        let process = json!({ "pid": std::process::id(), "exe": null, "cgroup": null, "container": null });
        let wanted = json!({ "final": "time_wait", "cause": "request_close", "process": process });
        expect(&tracer.wait_for_close(server, client), &wanted);
    }
    let degraded = tracer.stop().events[0]["degraded"].to_string();
    assert!(degraded.contains("hidepid"), "{degraded}");
}

#[test]
fn it_traces_where_no_hierarchy_is_mounted() {
    let gone = "for at in $(sed -n 's/^[^ ]* \\([^ ]*\\) cgroup2 .*/\\1/p' /proc/mounts); do umount -l $at; done\n\
                if grep -q cgroup2 /proc/mounts; then exit 1; fi";
    let listener = Listener::new();
    let port = listener.port.to_string();
    let tracer = Tracer::start_by(in_mounts_where(gone, &tracer()), &["--port", &port]);
    let [(server, client)] = traffic(&listener, 1)[..] else { panic!("one") };
    // Heads are read where the traffic passes, so these hooks are there.
    expect(
        &tracer.wait_for_close(server, client),
        &json!({
            "cause": "request_close", "final": "time_wait", "final_source": "fin",
            "http": { "target": "/path", "status": 200 },
        }),
    );
    let held = held_by(tracer.pid());
    let mounted = fs::read_to_string(format!("/proc/{}/mounts", tracer.pid())).expect("it runs");
    assert!(!mounted.contains("cgroup2"), "it is mounted nowhere: {mounted}");
    let run = tracer.stop();
    assert_eq!(degraded(&run.events[0]), [&Value::Null; 0]);
    wait_until("programs, maps and links to go", || !held.iter().any(|of| exists(*of)));
}

/// `umount` in the mount namespace of a tracer that runs.
fn unmount(tracer: &Tracer, at: &str) {
    let target = tracer.pid().to_string();
    run(Command::new("nsenter").args(["--target", &target, "--mount", "umount", "--lazy", at]));
}

#[test]
fn proc_is_unmounted_while_it_traces() {
    let listener = Listener::new();
    let port = listener.port.to_string();
    let tracer = Tracer::start_by(in_mounts_where("", &tracer()), &["--port", &port]);
    unmount(&tracer, "/proc");
    // Who owns what, and why it closed, the kernel programs know.
    for (server, client) in traffic(&listener, 2) {
        let wanted = json!({
            "cause": "request_close", "final": "time_wait",
            "process": { "pid": std::process::id(), "exe": null, "cgroup": null, "container": null },
        });
        expect(&tracer.wait_for_close(server, client), &wanted);
    }
    let run = tracer.stop();
    assert_eq!(run.summary["ledger"]["balanced"], true, "{:#}", run.summary);
}

#[test]
fn the_hierarchy_is_unmounted_while_it_traces() {
    let listener = Listener::new();
    let port = listener.port.to_string();
    let tracer = Tracer::start_by(in_mounts_where("", &tracer()), &["--port", &port]);
    let hierarchies = || -> Vec<String> {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", tracer.pid())).expect("it runs");
        let points = mounts.lines().filter_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, at, "cgroup2", ..] => Some(at.to_owned()),
            _ => None,
        });
        points.collect()
    };
    assert!(!hierarchies().is_empty(), "it is mounted");
    // The last first: it may lie in another one.
    while let Some(at) = hierarchies().last() {
        unmount(&tracer, at);
    }
    // Its links hold what they are attached to.
    let [(server, client)] = traffic(&listener, 1)[..] else { panic!("one") };
    let exe = std::env::current_exe().expect("it runs");
    let wanted = json!({
        "cause": "request_close", "final": "time_wait", "final_source": "fin",
        "http": { "target": "/path", "status": 200 }, "process": { "exe": exe.to_string_lossy() },
    });
    expect(&tracer.wait_for_close(server, client), &wanted);
    tracer.stop();
}

#[test]
fn two_at_once_see_the_same() {
    const CONNECTIONS: usize = 200;
    let listener = Listener::new();
    let tracers = [Tracer::on_port(listener.port), Tracer::on_port(listener.port)];
    traffic(&listener, CONNECTIONS);
    let seen = tracers.each_ref().map(|tracer| -> BTreeMap<u64, Value> {
        let closes = tracer.wait_for_closes(2 * CONNECTIONS, |_| true);
        assert_eq!(closes.len(), 2 * CONNECTIONS);
        let told = closes.into_iter().map(|mut close| {
            // Each looks at the clocks by itself, and may be asked at another moment what is left.
            for field in ["time", "states", "duration_us", "idle_us", "final_source"] {
                close.as_object_mut().expect("an object").remove(field);
            }
            // A child that another test starts, and that may be gone when one of them looks it up.
            if let Some(closer) = close["closer"].as_object_mut() {
                closer.retain(|field, _| !["exe", "cgroup", "container"].contains(&field.as_str()));
            }
            (close["cookie"].as_u64().expect("a cookie"), close)
        });
        told.collect()
    });
    assert_eq!(seen[0], seen[1]);
    // One goes, the other stays as it was.
    let [killed, other] = tracers;
    killed.signal(Signal::KILL);
    drop(killed);
    for (server, client) in traffic(&listener, 3) {
        let wanted = json!({ "cause": "request_close", "final": "time_wait", "http": { "requests": 1 } });
        expect(&other.wait_for_close(server, client), &wanted);
    }
    assert_eq!(other.stop().closes().len(), 2 * (CONNECTIONS + 3));
}

/// A namespace with a half-closed socket in it that no process has any more; its peer will never close. A device in another
/// namespace goes with it.
fn orphaned(of: &str, listen: impl FnOnce(&Listener)) -> (Namespace, Namespace, u16, u16) {
    let (namespace, witness) = (Namespace::new(of), Namespace::new(&format!("{of}-witness")));
    let (inside, outside) = (&namespace.name, &witness.name);
    run(Command::new("ip").args(["-n", outside, "link", "add", "seen", "type", "veth", "peer", "name", "v"]));
    run(Command::new("ip").args(["-n", outside, "link", "set", "v", "netns", inside]));
    let listener = namespace.enter(Listener::new);
    listen(&listener);
    let (server_port, client_port) = namespace.enter(|| {
        fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "2").expect("we are root");
        let mut pair = listener.connect();
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        drop(pair.server);
        end_of(&mut pair.client);
        std::thread::sleep(Duration::from_millis(200));
        // The RST is lost.
        let rules = "table inet silent { chain input { type filter hook input priority 0; policy drop; }; }";
        run(Command::new("nft").arg(rules));
        let ports = (pair.server_port, pair.client_port);
        abort(pair.client);
        ports
    });
    (namespace, witness, server_port, client_port)
}

fn exists_in(witness: &Namespace) -> bool {
    let shown = Command::new("ip").args(["-n", &witness.name, "link", "show", "seen"]).output().expect("ip runs");
    shown.status.success()
}

/// It is asked for while it is there, and so it stays for as long: until the half-closed socket is settled.
#[test]
fn a_namespace_that_goes_while_it_is_asked_is_let_go() {
    let mut tracer = None;
    let (namespace, witness, server, client) =
        orphaned("while", |listener| tracer = Some(Tracer::on_port(listener.port)));
    let tracer = tracer.expect("it was started");
    drop(namespace);
    let close = tracer.wait_for_close(server, client);
    expect(
        &close,
        &json!({ "closed_by": "local", "final": "fin_wait2", "final_source": "sock_diag", "cause": "request_close" }),
    );
    wait_until("the namespace to go", || !exists_in(&witness));
    tracer.stop();
}

/// It is gone before it is asked for: what is left is unknown, and nothing is made of that.
#[test]
fn a_namespace_that_is_gone_before_it_is_asked() {
    let mut tracer = None;
    let (namespace, witness, server, client) = orphaned("before", |listener| {
        let started = Tracer::on_port(listener.port);
        stopped(&started);
        tracer = Some(started);
    });
    let tracer = tracer.expect("it was started");
    drop(namespace);
    wait_until("the namespace to go", || !exists_in(&witness));
    tracer.signal(Signal::CONT);
    expect(
        &tracer.wait_for_close(server, client),
        &json!({ "closed_by": "local", "final": "unknown", "final_source": "inferred", "cause": "request_close" }),
    );
    tracer.stop();
}

/// A time namespace shifts the clocks that processes see, and the starts that `/proc` tells, but not those of the kernel.
#[test]
fn in_a_time_namespace_dates_and_names_are_right() {
    // They differ where the host was suspended.
    let seconds = |clock| rustix::time::clock_gettime(clock).tv_sec;
    // So that this process, outside, has started before the clocks of the last namespace begin.
    std::thread::sleep(Duration::from_secs(2));
    let (monotonic, boottime) = (seconds(ClockId::Monotonic), seconds(ClockId::Boottime));
    for (monotonic, boottime) in [(100_000, 100_000), (-30, -30), (-monotonic, -boottime)] {
        let listener = Listener::new();
        let mut command = Command::new("unshare");
        let (monotonic, boottime) = (monotonic.to_string(), boottime.to_string());
        command.args(["--time", "--monotonic", &monotonic, "--boottime", &boottime, "--"]);
        // Older kernels (6.1) do not enter it with `exec`, and start no thread for who has not entered it.
        command.args(["nsenter", "--time=/proc/self/ns/time_for_children", "--"]).arg(tracer().get_program());
        let (port, pid) = (listener.port.to_string(), std::process::id().to_string());
        let tracer = Tracer::start_by(command, &["--port", &port, "--pid", &pid]);
        let exe = std::env::current_exe().expect("a path").display().to_string();
        let since = Timestamp::now();
        for (server, client) in traffic(&listener, 3) {
            let close = tracer.wait_for_close(server, client);
            expect(&close, &json!({ "process": { "pid": std::process::id(), "exe": exe }, "final": "time_wait" }));
            is_dated(&close, since);
        }
        tracer.stop();
    }
}

/// More than are kept in memory. Each has one connection, and ends with it, but for some that stay until the tracer has looked:
/// for these there is no excuse not to know their executable.
#[test]
fn short_lived_processes_by_the_thousand() {
    const PROCESSES: usize = 5_000;
    let listener = Listener::new();
    let port = listener.port;
    drop(listener);
    let tracer = Tracer::on_port(port);
    let server = Script::start(
        port,
        "listener = listen(1024)\n\
         say('listening')\n\
         while True:\n\
        \x20    serve(listener.accept()[0])",
    );
    server.expect("listening");
    let mut clients = Script::start(
        port,
        &format!(
            "def client():\n\
            \x20    connection = connect()\n\
            \x20    say(connection.getsockname()[1], os.getpid(), int(stays))\n\
            \x20    connection.sendall(REQUEST)\n\
            \x20    while connection.recv(4096): pass\n\
            \x20    if stays: connection.close(); signal.pause()\n\
             running, staying = [], []\n\
             for n in range({PROCESSES}):\n\
            \x20    stays = n % 100 == 99\n\
            \x20    (staying if stays else running).append(fork(client))\n\
            \x20    if len(running) == 16: reap(running.pop(0))\n\
             for child in running: reap(child)\n\
             hear()\n\
             for child in staying: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)"
        ),
    );
    let mut pids: BTreeMap<u16, BTreeSet<u32>> = BTreeMap::new();
    let mut staying = BTreeSet::new();
    let mut warm = None;
    for n in 0..PROCESSES {
        let line = clients.hear();
        let words: Vec<u32> = line.split(' ').map(|word| word.parse().expect("a number")).collect();
        let [port, pid, stays] = words[..] else { panic!("{line}") };
        pids.entry(port as u16).or_default().insert(pid);
        if stays == 1 {
            staying.insert(u64::from(pid));
        }
        if n == PROCESSES / 10 {
            warm = Some(resident_kib(tracer.pid()));
        }
    }
    let python = fs::read_link(format!("/proc/{}/exe", server.pid())).expect("it runs").display().to_string();
    let closes = tracer.wait_for_closes(not_hidden(2 * PROCESSES), |_| true);
    clients.tell("end");
    clients.ends();
    let grown = resident_kib(tracer.pid()).saturating_sub(warm.expect("there were as many"));
    // What is kept, and what had not been read yet by a tracer that got no processor.
    assert!(grown < 8 << 10, "{grown} KiB more for {PROCESSES} processes");
    let (mut named, mut stayed) = (0, 0);
    for close in closes.iter().filter(|close| port_of(close, "remote") == Some(port)) {
        // Which of them it was where a port was used twice cannot be told; that it was another process can.
        let truth = &pids[&port_of(close, "local").expect("a port")];
        let pid = close["process"]["pid"].as_u64().expect("who connects is known");
        assert!(truth.iter().any(|known| u64::from(*known) == pid), "{truth:?}: {close:#}");
        let exe = &close["process"]["exe"];
        let stays = staying.contains(&pid);
        assert!(*exe == python.as_str() || (exe.is_null() && !stays), "stays: {stays}; {close:#}");
        stayed += usize::from(stays);
        named += usize::from(!exe.is_null());
    }
    assert!(stayed > staying.len() / 2, "of {} that stayed, {stayed} have a record", staying.len());
    eprintln!("{named} of {PROCESSES} executables are known, {grown} KiB more");
    tracer.stop();
}
