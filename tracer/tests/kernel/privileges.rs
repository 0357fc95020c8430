//! What tracer may still do while it traces, and that its answers are no worse for it.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::features::{MAPS_WITHOUT_CAPABILITY, degraded, lacks, maps_without_capability};
use crate::names::Cgroup;
use crate::rig::{Listener, Namespace, Pair, Tracer, copy_executable, expect, tracer, wait_until};
use crate::script::Script;

/// The sets of capabilities in `/proc/<pid>/status`.
const SETS: [&str; 5] = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"];

/// Fails unless each thread of a process is of this user, has these [`SETS`] and cannot gain any. Returns how many there are.
#[track_caller]
fn threads_are(pid: u32, uid: u32, sets: [&str; 5], seccomp: &str) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let check = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.expect("it can be read").path().join("status")).expect("it runs");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
        };
        // The real, effective, saved one, and that of files.
        assert_eq!(field("Uid:"), vec![uid.to_string(); 4].join("\t"), "{status}");
        assert_eq!(SETS.map(field), sets, "{status}");
        assert_eq!([field("NoNewPrivs:"), field("Seccomp:")], ["1", seccomp], "{status}");
    };
    tasks.map(check).count()
}

/// The process that looks into `/proc` for a tracer.
pub(crate) fn broker_of(tracer: &Tracer) -> u32 {
    let pid = tracer.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("it runs");
    children.trim().parse().expect("one child")
}

/// Capabilities as a mask of that many digits.
const NONE: &str = "0000000000000000";
/// `CAP_SYS_ADMIN` and `CAP_SYS_PTRACE`.
const TWO: &str = "0000000000280000";
/// `CAP_BPF`.
const BPF: &str = "0000008000000000";
const NOBODY: u32 = 65534;

/// What the reader has: nothing, but on a kernel that makes it keep one capability.
fn of_reader(bounding: &str) -> [&str; 5] {
    let kept = if lacks(MAPS_WITHOUT_CAPABILITY, maps_without_capability()) { BPF } else { NONE };
    [NONE, kept, kept, bounding, NONE]
}

fn of_broker(bounding: &str) -> [&str; 5] {
    [NONE, TWO, TWO, bounding, NONE]
}

#[test]
fn every_thread_has_given_up_what_it_does_not_need() {
    for (option, seccomp) in [(None, "2"), (Some("--no-sandbox"), "0")] {
        let listener = Listener::new();
        let port = listener.port.to_string();
        let arguments: Vec<&str> = ["--port", &port].into_iter().chain(option).collect();
        let tracer = Tracer::start(&arguments);
        // The second one writes.
        assert!(threads_are(tracer.pid(), NOBODY, of_reader(NONE), seccomp) > 1);
        threads_are(broker_of(&tracer), NOBODY, of_broker(NONE), seccomp);
        let run = tracer.stop();
        // Nobody needs to be warned of what was asked for; who reads the events knows.
        let degraded = run.events[0]["degraded"].as_array().expect("a list");
        let said = degraded.iter().any(|missing| missing.to_string().contains("--no-sandbox"));
        assert_eq!(said, option.is_some(), "{degraded:?}");
    }
}

/// As the unit runs it. What a program could gain that it starts stays the unit's: there is none, by `no_new_privs`.
#[test]
fn under_the_unit_it_gives_up_as_much() {
    let directory = tempfile::tempdir().expect("a directory");
    let tracer = Tracer::start_by(nobody_with(&unit_capabilities(), directory.path()), &["--port", "1"]);
    // Their numbers: CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF.
    let five = format!("{:016x}", [12, 19, 21, 38, 39].map(|number| 1u64 << number).iter().sum::<u64>());
    threads_are(tracer.pid(), NOBODY, of_reader(&five), "2");
    threads_are(broker_of(&tracer), NOBODY, of_broker(&five), "2");
    for pid in [tracer.pid(), broker_of(&tracer)] {
        // Not its user's: others of that user can neither trace nor read it.
        assert_eq!(fs::metadata(format!("/proc/{pid}/fd")).expect("it runs").uid(), 0);
    }
    tracer.stop();
}

/// Nobody, with these capabilities and no others: `setpriv` and a copy of the binary that nobody can reach.
pub(crate) fn nobody_with(capabilities: &str, directory: &Path) -> Command {
    nobody_by(capabilities, directory, &[])
}

/// The same; `by` is a program with arguments that becomes the binary.
pub(crate) fn nobody_by(capabilities: &str, directory: &Path, by: &[String]) -> Command {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let binary = directory.join("tracer");
    copy_executable(tracer().get_program(), &binary);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    for set in ["inh-caps", "ambient-caps", "bounding-set"] {
        command.arg(format!("--{set}=-all,{capabilities}"));
    }
    command.args(by).arg(binary);
    command
}

/// Whatever is harder to know: the executable and the container of another user's process that connects, and what is left of
/// a half-closed connection in another network namespace.
pub(crate) fn names_everything(of: &str, command: Command) {
    let id = format!("{:064x}", u128::from(std::process::id()) << 64 | u128::from(of.len() as u64) << 32 | 0xfeed);
    let cgroup = Cgroup::new(&format!("docker-{id}.scope"));
    let procs = cgroup.0.join("cgroup.procs").display().to_string();
    let namespace = Namespace::new(of);
    let inode = namespace.inode();
    let listener = namespace.enter(Listener::new);
    let tracer = Tracer::start_by(command, &["--port", &listener.port.to_string()]);

    let script = format!(
        "open('{procs}', 'w').write('0')\nos.setgid(33)\nos.setuid(33)\nconnection = connect()\n\
         connection.sendall(REQUEST)\nread(connection, len(RESPONSE))\nconnection.close()\nhear()"
    );
    let mut client = namespace.enter(|| Script::start(listener.port, &script));
    let (server, port) = listener.accept();
    let mut pair = Pair { client: server.try_clone().expect("it is open"), server, server_port: 0, client_port: port };
    crate::script::read_request(&mut pair.server);
    std::io::Write::write_all(&mut pair.server, crate::script::RESPONSE).expect("it is open");
    // The script closes first, and its socket is half-closed until we close, long after it has ended as a socket.
    crate::rig::end_of(&mut pair.server);
    std::thread::sleep(std::time::Duration::from_millis(100));
    drop(pair);
    let close = tracer.wait_for_close(port, listener.port);
    let exe = fs::read_link(format!("/proc/{}/exe", client.pid())).expect("it runs");
    expect(
        &close,
        &json!({
            "netns": inode, "closed_by": "local", "final": "time_wait", "final_source": "sock_diag",
            "process": {
                "pid": client.pid(), "uid": 33, "exe": exe.to_string_lossy(), "container": id[..12],
            },
        }),
    );
    client.tell("end");
    client.ends();
    let run = tracer.stop();
    assert_eq!(degraded(&run.events[0]), [&Value::Null; 0]);
}

#[test]
fn confined_it_names_as_much() {
    names_everything("confined", tracer());
}

/// The capabilities that the unit gives, as `setpriv` wants them.
pub(crate) fn unit_capabilities() -> String {
    let unit = include_str!("../../../packaging/tracer.service");
    let given = |name| unit.lines().find_map(|line| line.strip_prefix(name)).expect("the unit names them");
    let capabilities = given("AmbientCapabilities=");
    assert_eq!(given("CapabilityBoundingSet="), capabilities);
    let words = capabilities.split(' ').map(|word| word.trim_start_matches("CAP_").to_lowercase());
    let capabilities = words.map(|word| format!("+{word}")).collect::<Vec<_>>().join(",");
    assert_eq!(capabilities.matches('+').count(), 5, "{capabilities}");
    capabilities
}

#[test]
fn five_capabilities_are_enough() {
    let directory = tempfile::tempdir().expect("a directory");
    names_everything("five", nobody_with(&unit_capabilities(), directory.path()));
}

/// A container's root that may not become another user: it stays root, and says so.
#[test]
fn where_it_must_stay_root_it_says_so() {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-setuid", "--inh-caps=-setuid"]).arg(tracer().get_program());
    let tracer = Tracer::start_by(command, &["--port", "1"]);
    assert!(tracer.events()[0]["degraded"].to_string().contains("stays root"), "{:#}", tracer.events()[0]);
    threads_are(tracer.pid(), 0, of_reader(NONE), "2");
    tracer.stop();
}

#[test]
fn three_capabilities_are_enough_for_all_but_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let command = nobody_with("+bpf,+perfmon,+net_admin", directory.path());
    let listener = Listener::new();
    let tracer = Tracer::start_by(command, &["--port", &listener.port.to_string()]);
    let (server, client) = listener.serve_and_close();
    let close = tracer.wait_for_close(server, client);
    expect(
        &close,
        &json!({
            "closed_by": "local", "final": "time_wait", "cause": "request_close",
            // What everybody may read is there.
            "process": { "pid": std::process::id(), "exe": null },
        }),
    );
    assert!(close["process"]["cgroup"].is_string(), "{close:#}");
    let run = tracer.stop();
    let degraded = run.events[0]["degraded"].to_string();
    for missing in ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"] {
        assert!(degraded.contains(missing), "{degraded}");
    }
}

#[test]
fn without_its_broker_it_goes_on() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let broker = broker_of(&tracer);
    kill_process(Pid::from_raw(broker.cast_signed()).expect("a process id"), Signal::KILL).expect("it runs");
    for _ in 0..2 {
        let (server, client) = listener.serve_and_close();
        let close = tracer.wait_for_close(server, client);
        let process = json!({ "pid": std::process::id(), "exe": null, "cgroup": null });
        expect(&close, &json!({ "final": "time_wait", "cause": "request_close", "process": process }));
    }
    wait_until("a warning", || tracer.stderr().contains("does not answer"));
    assert_eq!(tracer.stderr().matches("does not answer").count(), 1, "said once: {}", tracer.stderr());
    tracer.stop();
}

#[test]
fn the_broker_ends_with_tracer() {
    for signal in [Signal::INT, Signal::KILL] {
        let listener = Listener::new();
        let tracer = Tracer::on_port(listener.port);
        let broker = broker_of(&tracer);
        // A service manager tells all; it must not go before tracer does.
        kill_process(Pid::from_raw(broker.cast_signed()).expect("a process id"), Signal::TERM).expect("it runs");
        assert_eq!(broker_of(&tracer), broker);
        if signal == Signal::INT {
            tracer.stop();
        } else {
            drop(tracer);
        }
        wait_until("the broker to go", || {
            let stat = fs::read_to_string(format!("/proc/{broker}/stat")).unwrap_or_default();
            // Whose child it was, an init that collects nobody.
            stat.is_empty() || stat.contains(") Z ")
        });
    }
}
