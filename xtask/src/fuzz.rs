//! `cargo xtask fuzz [--minutes N] [TARGET…]`: each fuzz target for so long, one after another.
//!
//! What is found goes to `artifacts/` beside the target, and ends the run. New inputs go to the build directory, not to the
//! committed corpus, which is read. What the targets check: docs/fuzzing.md.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::workspace;

const CARGO_FUZZ: &str = "0.13.2";

/// Where a target is, its name, and what libFuzzer needs for it.
const TARGETS: [(&str, &str, &[&str]); 6] = [
    ("tracer-ebpf", "head", &["-dict=http.dict", "-max_len=4096"]),
    ("tracer-ebpf", "differential", &["-dict=http.dict", "-max_len=4096"]),
    ("tracer", "records", &["-max_len=4096"]),
    ("tracer", "recording", &["-max_len=4096"]),
    ("tracer", "proc", &["-dict=proc.dict", "-max_len=1024"]),
    ("tracer", "replies", &["-max_len=512"]),
];

/// Runs the targets, or those named.
pub(crate) fn fuzz(minutes: u64, named: &[String]) -> Result<()> {
    let unknown: Vec<_> = named.iter().filter(|name| TARGETS.iter().all(|(_, target, _)| target != name)).collect();
    ensure!(
        unknown.is_empty(),
        "there is no fuzz target {unknown:?}; there are {:?}",
        TARGETS.map(|(_, name, _)| name)
    );
    let installed = workspace::output(workspace::cargo().args(["fuzz", "--version"])).is_ok();
    if !installed {
        workspace::succeed(workspace::cargo().args(["install", "cargo-fuzz", "--version", CARGO_FUZZ, "--locked"]))?;
    }
    for (package, target, options) in TARGETS {
        if !named.is_empty() && !named.iter().any(|name| name == target) {
            continue;
        }
        let corpus = workspace::target_dir().join("fuzz-corpus").join(target);
        fs::create_dir_all(&corpus)?;
        eprintln!("xtask: {target}, for {minutes} min");
        let directory = workspace::root().join(package).join("fuzz");
        let mut command = Command::new("cargo");
        // The sanitizer needs an unstable option.
        command.current_dir(&directory).env("RUSTC_BOOTSTRAP", "1");
        // Set by the cargo that runs this: that of another workspace.
        command.env_remove("CARGO_TARGET_DIR");
        command.args(["fuzz", "run", "--fuzz-dir", ".", "--target-dir"]).arg(workspace::target_dir().join("fuzz"));
        // (Beside the sources, what is built would be taken for executables that belong to them: `cargo xtask deny`.)
        command.arg(target).arg(&corpus).arg(format!("corpus/{target}"));
        command.args(["--", "-print_final_stats=1", "-timeout=20"]).args(options);
        command.arg(format!("-max_total_time={}", minutes * 60));
        workspace::succeed(&mut command)?;
    }
    Ok(())
}
