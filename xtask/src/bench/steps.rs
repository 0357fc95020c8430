//! The steps of the daemon, and the scan of a head, one by one: in instructions, which other work on the machine does not move.
//!
//! The same microbenchmarks that `cargo bench` times. Each is run by callgrind twice, some times and some times more; the
//! difference is what the runs alone take, without what is done once.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::report::{Report, number};
use crate::workspace;

/// Runs of a step, the first time and the second.
const RUNS: [u64; 2] = [1_000, 6_000];
/// Where the counts of the last time are.
const COUNTS: &str = "bench-steps.json";

/// Counts the instructions of each step, beside those of the last time.
pub(super) fn count(report: &mut Report) -> Result<()> {
    workspace::install("the count of instructions", &[("valgrind", "valgrind")])?;
    let kept = workspace::target_dir().join(COUNTS);
    // The first time there are none.
    let before: BTreeMap<String, f64> =
        fs::read_to_string(&kept).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for binary in binaries()? {
        for step in steps(&binary)? {
            eprintln!("bench: {step}");
            let [few, many] = RUNS.map(|runs| instructions(&binary, &step, runs));
            let more = many?.checked_sub(few?).context("more runs take fewer instructions")?;
            counts.insert(step, more as f64 / (RUNS[1] - RUNS[0]) as f64);
        }
    }
    if counts.is_empty() {
        bail!("no microbenchmarks were found");
    }
    let mut text = "## Steps, in instructions\n\n\
         What `cargo bench` times, in user space and the scan of a head for the host, counted by callgrind: one record, or both \
         ends of a connection, or one head.\n\n\
         | | instructions | the last time |\n| --- | ---: | ---: |\n"
        .to_owned();
    for (step, count) in &counts {
        let last =
            before.get(step).map(|last| format!("{} ({:+.1} %)", number(Some(*last), 0), (count / last - 1.0) * 100.0));
        let _ = writeln!(text, "| {step} | {} | {} |", number(Some(*count), 0), last.as_deref().unwrap_or("–"));
    }
    fs::write(&kept, serde_json::to_string_pretty(&counts)?)?;
    report.section(text);
    report.value("steps", json!(counts));
    Ok(())
}

/// The programs of the microbenchmarks.
fn binaries() -> Result<Vec<PathBuf>> {
    // Valgrind has no vDSO; rustix would look for the clock there.
    const THROUGH_LIBC: &str = "build.rustflags=['--cfg=rustix_use_libc']";
    let mut cargo = workspace::cargo();
    cargo.args(["bench", "--workspace", "--no-run", "--message-format=json", "--config", THROUGH_LIBC, "--target-dir"]);
    let said = workspace::output(cargo.arg(workspace::target_dir().join("steps")))?;
    let messages = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let benches = messages.filter(|message| message["target"]["kind"][0] == "bench");
    Ok(benches.filter_map(|message| Some(message["executable"].as_str()?.into())).collect())
}

/// The names of its microbenchmarks, with their arguments.
fn steps(binary: &Path) -> Result<Vec<String>> {
    // As cargo-nextest asks; otherwise they are drawn as a tree.
    let said = workspace::output(Command::new(binary).env("NEXTEST", "1").args(["--list", "--format", "terse"]))?;
    let names = said.lines().filter_map(|line| line.strip_suffix(": benchmark"));
    Ok(names.map(str::to_owned).collect())
}

/// That one takes, with all that is done before and behind it.
fn instructions(binary: &Path, step: &str, runs: u64) -> Result<u64> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(binary);
    valgrind.args(["--bench", "--exact", step, "--sample-count", "1", "--sample-size", &runs.to_string()]);
    let output = valgrind.output().context("cannot run valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    // What crashes has a count, too.
    let count = collected(&said).filter(|_| output.status.success());
    count.with_context(|| format!("valgrind, of {step}: {}: {said}", output.status))
}

/// `==12== Collected : 3456`
fn collected(said: &str) -> Option<u64> {
    said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_callgrind_says() {
        let said = "==12== \n==12== Events    : Ir\n==12== Collected : 3456\n==12== \n";
        assert_eq!(collected(said), Some(3456));
        assert_eq!(collected("valgrind: no such file"), None);
    }
}
