//! `tracer doctor`, and `tracer run` beside it, on hosts that lack something: made by taking away capabilities, `/proc`, the
//! mounts of cgroup-v2 or BTF, in a mount namespace where that is needed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::features::{STORAGE_WALK, always_degraded, degraded, is_without_storage_walk, verdict};
use crate::rig::{Listener, PATIENCE, copy_executable, expect, tracer};
use crate::unit::under_the_filters_without;

/// The binary, where an unprivileged user can reach it.
fn reachable() -> (TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory can be made");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let binary = directory.path().join("tracer");
    copy_executable(tracer().get_program(), &binary);
    let path = binary.to_str().expect("a path of ASCII").to_owned();
    (directory, path)
}

/// Runs `$tracer ARGS…` of the script in a mount namespace of its own.
fn in_mounts_where(script: &str, binary: &str) -> Output {
    let propagation = ["--mount", "--propagation", "private", "sh", "-ec", script];
    Command::new("unshare").args(propagation).env("tracer", binary).output().expect("unshare runs")
}

const FEW: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all,+bpf,+perfmon,+net_admin \
                   --ambient-caps=-all,+bpf,+perfmon,+net_admin";

/// The one JSON object of `doctor --json`, which must end with `code`.
#[track_caller]
fn report(output: &Output, code: u8) -> Value {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code.into()), "{stdout}{stderr}");
    assert_eq!(stdout.lines().count(), 1, "{stdout}{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    expect(&report, &json!({ "type": "doctor", "exit_code": code }));
    for finding in report["findings"].as_array().expect("a list") {
        // What is wrong can be mended, and says what it means.
        assert!(finding["means"].as_str().is_some_and(|means| !means.is_empty()), "{finding}");
        let wrong = matches!(finding["status"].as_str(), Some("degraded" | "missing"));
        assert!(!wrong || finding["mend"].is_string(), "{finding}");
    }
    report
}

/// The findings of a name.
fn findings<'a>(report: &'a Value, name: &str) -> Vec<&'a Value> {
    let found: Vec<_> =
        report["findings"].as_array().expect("a list").iter().filter(|one| one["name"] == name).collect();
    assert!(!found.is_empty(), "nothing is said of {name}: {report:#}");
    found
}

#[track_caller]
fn status<'a>(report: &'a Value, name: &str) -> &'a str {
    findings(report, name)[0]["status"].as_str().expect("a word")
}

const HOOKS: [&str; 11] = [
    "tp_btf/sched_process_fork",
    "tp_btf/sched_process_free",
    "tp_btf/tcp_receive_reset",
    "tp_btf/tcp_send_reset",
    "tp_btf/tcp_rcv_space_adjust",
    "tp_btf/sched_process_exit",
    "cgroup_skb/ingress",
    "cgroup_skb/egress",
    "tp_btf/inet_sock_set_state",
    "iter/task_file",
    STORAGE_WALK,
];

/// What is said of a finding where nothing is missing that this kernel can have.
fn usual(name: &str) -> &'static str {
    if always_degraded().any(|hook| hook == name) { "degraded" } else { "ok" }
}

#[test]
fn as_root_every_hook_is_tried() {
    let found = report(&tracer().args(["doctor", "--json"]).output().expect("it runs"), 0);
    for name in HOOKS.into_iter().chain([
        "capabilities",
        "btf",
        "kernel",
        "cgroup2",
        "pid_namespace",
        "time_namespace",
        "proc",
        "sock_diag",
    ]) {
        assert_eq!(status(&found, name), usual(name), "{found:#}");
    }
    // It is what `run` attaches.
    let pid = std::process::id().to_string();
    let output = tracer().args(["run", "--json", "--duration", "10ms", "--pid", &pid]).output().expect("it runs");
    let start = String::from_utf8_lossy(&output.stdout).lines().next().expect("a line").to_owned();
    let start: Value = serde_json::from_str(&start).expect("JSON");
    let wanted: Vec<_> = HOOKS.into_iter().filter(|hook| *hook != STORAGE_WALK || !is_without_storage_walk()).collect();
    assert_eq!(start["hooks"], json!(wanted));
}

#[test]
fn text_has_a_line_for_each_hook_and_a_verdict() {
    let output = tracer().arg("doctor").output().expect("it runs");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    for name in HOOKS {
        let lines: Vec<_> = text.lines().filter(|line| line.split_whitespace().nth(1) == Some(name)).collect();
        assert_eq!(lines.len(), 1, "{name}: {text}");
    }
    let last = text.lines().last().expect("a line");
    assert!(last.starts_with("works") && last.contains("Linux"), "{last}");
}

#[test]
fn fewer_capabilities_degrade() {
    let (_directory, binary) = reachable();
    let run = |args: &str| {
        let script = format!("{FEW} {binary} {args}");
        Command::new("sh").args(["-c", &script]).output().expect("it runs")
    };
    let found = report(&run("doctor --json"), 0);
    expect(&found, &json!({ "verdict": "degraded" }));
    let capabilities = findings(&found, "capabilities");
    assert!(capabilities.iter().all(|finding| finding["status"] == "degraded"), "{capabilities:?}");
    for capability in ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"] {
        assert!(capabilities.iter().any(|one| one["means"].to_string().contains(capability)), "{capabilities:?}");
    }
    for hook in HOOKS {
        assert_eq!(status(&found, hook), usual(hook), "{found:#}");
    }
    report(&run("doctor --json --strict"), 9);
    // `run` says the same.
    let output = run("run --json --duration 10ms");
    let text = String::from_utf8_lossy(&output.stdout);
    let start: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
    let degraded = degraded(&start);
    assert_eq!(degraded.len(), capabilities.len(), "{start:#}");
    for finding in capabilities {
        let (means, mend) = (finding["means"].as_str().expect("text"), finding["mend"].as_str().expect("text"));
        assert!(degraded.contains(&&json!(format!("{means}; {mend}"))), "{start:#}");
    }
}

#[test]
fn without_capabilities_it_is_refused() {
    let (_directory, binary) = reachable();
    let script = format!("setpriv --reuid=65534 --regid=65534 --clear-groups {binary} doctor --json");
    let found = report(&Command::new("sh").args(["-c", &script]).output().expect("it runs"), 3);
    expect(&found, &json!({ "verdict": "refused" }));
    assert_eq!(status(&found, "capabilities"), "missing");
    // What was not tried is not said to be missing.
    assert!(HOOKS.iter().all(|hook| status(&found, hook) == "unknown"), "{found:#}");
}

#[test]
fn without_proc() {
    let (_directory, binary) = reachable();
    let found = report(&in_mounts_where("umount -l /proc; exec $tracer doctor --json", &binary), 0);
    expect(&found, &json!({ "verdict": "degraded" }));
    assert_eq!(status(&found, "proc"), "degraded");
    assert!(HOOKS.iter().all(|hook| status(&found, hook) == usual(hook)), "{found:#}");

    let refused = in_mounts_where("umount -l /proc; exec $tracer run --pid 1", &binary);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("/proc is not mounted"), "{stderr}");
}

#[test]
fn it_traces_without_proc() {
    let (_directory, binary) = reachable();
    let listener = Listener::new();
    // Slow machines take longer for as many connections.
    let seconds = (PATIENCE.as_secs() / 10).max(3);
    let script = format!("umount -l /proc; exec $tracer run --json --port {} --duration {seconds}s", listener.port);
    let tracing = std::thread::spawn(move || in_mounts_where(&script, &binary));
    let mut ports = Vec::new();
    while !tracing.is_finished() {
        ports.push(listener.serve_and_close());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let output = tracing.join().expect("it ran");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(events[0]["degraded"].to_string().contains("/proc is not mounted"), "{:#}", events[0]);
    // One may have been open when tracing began.
    let whole = |event: &&Value| event["type"] == "close" && event["started_before"] == false;
    let closes: Vec<_> = events.iter().filter(whole).collect();
    assert!(closes.len() >= 4, "{text}");
    for close in closes {
        // Processes are named by the kernel, only what `/proc` alone knows is left out.
        let me = json!({ "pid": std::process::id(), "exe": null, "cgroup": null, "container": null });
        expect(close, &json!({ "process": me, "cause": "request_close", "how": "fin" }));
    }
}

#[test]
fn with_processes_hidden() {
    let (_directory, binary) = reachable();
    let hide = "mount -t proc -o hidepid=2 proc /proc";
    let found = report(&in_mounts_where(&format!("{hide}; exec {FEW} $tracer doctor --json"), &binary), 0);
    assert_eq!(status(&found, "proc"), "degraded");
    assert!(findings(&found, "proc")[0]["means"].to_string().contains("hidepid"), "{found:#}");
    // A process that is hidden is not one that does not exist.
    let refused = in_mounts_where(&format!("{hide}; exec {FEW} $tracer run --pid 1"), &binary);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("--pid 1") && stderr.contains("hidepid"), "{stderr}");
    // Root sees them.
    let found = report(&in_mounts_where(&format!("{hide}; exec $tracer doctor --json"), &binary), 0);
    assert_eq!(status(&found, "proc"), "ok");
}

/// As older kernels leave a process that has unshared its time namespace, and then called `exec`: in the one, with its children to
/// be in another. Here its `ns` directory is made up, by the process id that stays the same.
#[test]
fn in_a_time_namespace_whose_shifts_cannot_be_read() {
    let (_directory, binary) = reachable();
    let made_up = |same: &str| {
        let script = format!(
            "of=/proc/$$/ns; mount -t tmpfs ns $of; touch $of/time; {same} $of/time_for_children; exec $tracer doctor --json"
        );
        report(&in_mounts_where(&script, &binary), 0)
    };
    let found = made_up("touch");
    let finding = findings(&found, "time_namespace")[0];
    expect(finding, &json!({ "status": "degraded" }));
    assert!(finding["mend"].to_string().contains("unshare --fork"), "{found:#}");
    assert_eq!(status(&made_up("ln $of/time"), "time_namespace"), "ok");
    // The remedy, in a namespace of its own that is real.
    let output = Command::new("unshare")
        .args(["--time", "--boottime", "100", "unshare", "--fork"])
        .arg(&binary)
        .args(["doctor", "--json"])
        .output();
    assert_eq!(status(&report(&output.expect("unshare runs"), 0), "time_namespace"), "ok");
}

#[test]
fn a_hierarchy_that_is_not_mounted() {
    let (_directory, binary) = reachable();
    let gone = "for at in $(sed -n 's/^[^ ]* \\([^ ]*\\) cgroup2 .*/\\1/p' /proc/mounts); do umount -l $at; done; \
                ! grep -q cgroup2 /proc/mounts";
    let found = report(&in_mounts_where(&format!("{gone}; exec $tracer doctor --json"), &binary), 0);
    for name in ["cgroup2", "cgroup_skb/ingress", "cgroup_skb/egress"] {
        assert_eq!(status(&found, name), "ok", "{found:#}");
    }
    // Where it cannot be mounted either.
    let found = report(&in_mounts_where(&format!("{gone}; exec {FEW} $tracer doctor --json"), &binary), 6);
    assert_eq!(status(&found, "cgroup2"), "missing");
    assert!(findings(&found, "cgroup2")[0]["mend"].to_string().contains("mount -t cgroup2"), "{found:#}");
    let refused = in_mounts_where(&format!("{gone}; exec {FEW} $tracer run"), &binary);
    assert_eq!(refused.status.code(), Some(6), "{}", String::from_utf8_lossy(&refused.stderr));
}

/// The setting is made up, as this kernel may have no other; `machine::programs_are_not_compiled` makes it for real.
#[test]
fn the_compiler_of_programs_is_off() {
    let (_directory, binary) = reachable();
    let off = "echo 0 > ${tracer%/*}/off; mount --bind ${tracer%/*}/off /proc/sys/net/core/bpf_jit_enable";
    let found = report(&in_mounts_where(&format!("{off}; exec $tracer doctor --json"), &binary), 4);
    expect(&found, &json!({ "verdict": "refused" }));
    let finding = findings(&found, "jit")[0];
    expect(finding, &json!({ "status": "missing", "mend": "sysctl -w net.core.bpf_jit_enable=1" }));
    let output = in_mounts_where(&format!("{off}; exec $tracer run --json --duration 10ms"), &binary);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(4), 0), "{stderr}");
    let message = format!("{}; sysctl -w net.core.bpf_jit_enable=1", finding["means"].as_str().expect("text"));
    assert!(stderr.contains(&message), "{stderr}");
    // Another network namespace has no such setting, which is no fault.
    let found = report(&in_mounts_where("exec unshare --net $tracer doctor --json", &binary), 0);
    assert_eq!((status(&found, "jit"), &found["verdict"]), ("unknown", &json!(verdict())), "{found:#}");
}

/// The mode is made up, as this kernel may have no lockdown; what a refusal is then taken for is not.
#[test]
fn under_lockdown() {
    let (_directory, binary) = reachable();
    for mode in ["integrity", "confidentiality"] {
        let modes = "none integrity confidentiality".replace(mode, &format!("[{mode}]"));
        let lock =
            format!("mount -t tmpfs security /sys/kernel/security; echo '{modes}' > /sys/kernel/security/lockdown");
        let found = report(&in_mounts_where(&format!("{lock}; exec $tracer doctor --json"), &binary), 0);
        let lockdown = findings(&found, "lockdown")[0];
        assert!(lockdown["status"] == "ok" && lockdown["means"].to_string().contains(mode), "{lockdown}");
        // It is not blamed for anything: whatever it does not forbid works.
        assert!(HOOKS.iter().all(|hook| status(&found, hook) == usual(hook)), "{found:#}");
        assert_eq!(found["verdict"], verdict(), "{found:#}");

        let refused = |arguments: &[&str]| {
            let in_mounts = ["--mount", "--propagation", "private", "sh", "-ec"];
            let mut command = Command::new("unshare");
            command.args(in_mounts).args([&format!("{lock}; exec \"$@\""), "sh"]);
            command.args(under_the_filters_without("bpf")).arg(&binary).args(arguments).output().expect("unshare runs")
        };
        let found = report(&refused(&["doctor", "--json"]), 7);
        expect(&found, &json!({ "verdict": "refused" }));
        let maps = findings(&found, "maps")[0];
        assert!(maps["status"] == "missing" && maps["mend"].to_string().contains("lockdown"), "{maps}");
        assert!(maps["means"].to_string().contains(&format!("kernel lockdown is in {mode} mode")), "{maps}");
        assert!(HOOKS.iter().all(|hook| status(&found, hook) == "unknown"), "{found:#}");
        let output = refused(&["run"]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(7), "{stderr}");
        assert!(stderr.contains(&format!("kernel lockdown is in {mode} mode")), "{stderr}");
    }
    // Where there is none, or the file is something else, nothing is said of a mode.
    for modes in ["[none] integrity confidentiality", "garbage"] {
        let lock =
            format!("mount -t tmpfs security /sys/kernel/security; echo '{modes}' > /sys/kernel/security/lockdown");
        let found = report(&in_mounts_where(&format!("{lock}; exec $tracer doctor --json"), &binary), 0);
        expect(findings(&found, "lockdown")[0], &json!({ "status": "ok", "means": "none" }));
    }
}

#[test]
fn without_btf() {
    let (_directory, binary) = reachable();
    let found = report(&in_mounts_where("umount -l /sys; exec $tracer doctor --json", &binary), 5);
    assert_eq!((status(&found, "btf"), status(&found, "kernel")), ("missing", "unknown"));
}
