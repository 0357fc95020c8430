//! However tracer ends, nothing of it stays in the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::rig::{Listener, Tracer, get, ok, run, wait_until};

/// Programs, maps and links that a process holds, as `bpftool` names them.
pub(crate) fn held_by(pid: u32) -> BTreeSet<(&'static str, u32)> {
    let mut held = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("it runs").flatten() {
        let Ok(info) = fs::read_to_string(entry.path()) else {
            continue;
        };
        for (key, kind) in [("prog_id:", "prog"), ("map_id:", "map"), ("link_id:", "link")] {
            let id = info.lines().find_map(|line| line.strip_prefix(key));
            held.extend(id.and_then(|id| Some((kind, id.trim().parse().ok()?))));
        }
    }
    held
}

/// What `bpftool` says of something that is there.
///
/// # Panics
/// It fails.
pub(crate) fn bpftool(args: &[&str]) -> Value {
    serde_json::from_str(&run(Command::new("bpftool").arg("--json").args(args))).expect("JSON")
}

/// Whether the kernel still has it.
///
/// # Panics
/// bpftool fails for another reason than that it is gone.
pub(crate) fn exists((kind, id): (&str, u32)) -> bool {
    let mut bpftool = Command::new("bpftool");
    let output = bpftool.args(["--json", kind, "show", "id", &id.to_string()]).output().expect("bpftool runs");
    if output.status.success() {
        return true;
    }
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let error = said["error"].as_str().unwrap_or_default();
    assert!(error.ends_with("No such file or directory"), "bpftool, asked for {kind} {id}: {output:?}");
    false
}

/// What tracer could mount.
pub(crate) fn mounts() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("it can be read");
    mounts.lines().filter(|line| line.contains("cgroup2") || line.contains("bpf")).map(str::to_owned).collect()
}

fn nothing_stays_after(signal: Signal) {
    let before = mounts();
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let held = held_by(tracer.pid());
    for kind in ["prog", "map", "link"] {
        assert!(held.iter().any(|(of, _)| *of == kind), "tracer holds no {kind}: {held:?}");
    }
    assert!(held.iter().all(|of| exists(*of)));

    // With sockets in storage, and one pending.
    let mut pair = listener.connect();
    pair.request(get("Connection: close\r\n"));
    pair.respond(ok(""));
    drop(pair.server);
    tracer.signal(signal);
    if signal == Signal::KILL {
        drop(tracer);
    } else {
        assert!(tracer.join().1.success());
    }
    // The kernel frees them later, on its own time.
    wait_until("programs, maps and links to go", || !held.iter().any(|of| exists(*of)));
    assert_eq!(mounts(), before);
}

#[test]
fn nothing_after_sigkill() {
    nothing_stays_after(Signal::KILL);
}

#[test]
fn nothing_after_sigint() {
    nothing_stays_after(Signal::INT);
}
