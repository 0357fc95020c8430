//! `cargo xtask vm`: the kernel tests on other kernels than this machine's, under qemu.
//!
//! Debian's kernels boot with a small Debian of packages that were only unpacked. Nothing is installed beside qemu and a
//! few tools, the guests have no network, and all that is fetched or made stays in `target/vm`.

mod guest;
mod packages;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use self::guest::{Payload, Report};
use self::packages::Archive;
use crate::workspace::{self, Program};

const NEEDED: [Program; 8] = [
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("go", "golang-go"),
    ("mke2fs", "e2fsprogs"),
    ("objcopy", "binutils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xzcat", "xz-utils"),
];

/// A kernel to try.
struct Kernel {
    version: &'static str,
    archive: Archive,
    suite: &'static str,
    /// qemu's model of a processor. What this kernel, without hardware under it, has trouble with is left out.
    cpu: &'static str,
    /// What it lacks: then tracer must refuse to start, with exit code 4, and name this.
    lacks: Option<&'static str>,
}

const KERNELS: [Kernel; 4] = [
    Kernel {
        version: "5.10",
        archive: Archive::Security,
        suite: "bullseye-security",
        cpu: "max",
        lacks: Some("bpf_loop"),
    },
    Kernel { version: "6.1", archive: Archive::Security, suite: "bookworm-security", cpu: "max", lacks: None },
    Kernel { version: "6.12", archive: Archive::Main, suite: "bookworm-backports", cpu: "max,-cx16", lacks: None },
    Kernel { version: "7.2", archive: Archive::Main, suite: "sid", cpu: "max", lacks: None },
];

/// Tests that an emulated machine cannot run, with one kernel or with all, and why. What a kernel is too old for the tests know
/// themselves, by their list of features (`tracer/tests/kernel/features.rs`).
const SKIPPED: [(Option<&str>, &str, &str); 4] = [
    (None, "scale::a_hundred_thousand_connections_open_at_once", "an emulated processor takes too long for so many"),
    (None, "scale::of_all_that_ends_at_once_nothing_is_lost", "an emulated processor takes too long for so many"),
    (
        None,
        "snapshot::agrees_with_ss_for_ten_thousand_time_wait_sockets_in_three_namespaces",
        "an emulated processor may take longer for so many than TIME_WAIT lasts",
    ),
    (Some("7.2"), "machine::the_machine_sleeps", "with this kernel an emulated machine does not wake up again"),
];

/// How often a kernel may boot: now and then one crashes, or hangs, when it patches its own code, which an emulated processor runs.
const BOOTS: usize = 3;

/// The largest program: half of what a kernel accepts, so that the next verifier may count more.
const MOST_VERIFIED: u32 = 500_000;

/// What `--quick` runs.
const QUICK: [&str; 15] = [
    "causes::request_close",
    "causes::response_close",
    "causes::process_exit_by_sigkill",
    "causes::reset_by_unread_data",
    "close_wait::a_leak_is_told_once_with_its_owner",
    "features::this_kernel_has_what_its_version_brought",
    "fin_wait2::pending_until_the_peer_closes",
    "heads::cut_twice",
    "machine::programs_are_not_compiled",
    "machine::the_clock_is_set",
    "messages::payload_in_fragments",
    "netns::a_full_time_wait_table_leaves_none",
    "owners::nginx_its_worker_and_not_its_master",
    "sockets::ipv6_and_mapped_addresses",
    "wire::a_request_that_completes_the_handshake",
];

/// Runs the tests on one kernel, or on all; `filters`: only those whose name contains one of them.
pub(crate) fn vm(version: &str, quick: bool, filters: &[String]) -> Result<()> {
    let kernels: Vec<_> = KERNELS.iter().filter(|kernel| version == "all" || version == kernel.version).collect();
    if kernels.is_empty() {
        let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.version).collect();
        bail!("--kernel is one of {}, all", known.join(", "));
    }
    workspace::install("the VMs", &NEEDED)?;
    let directory = workspace::target_dir().join("vm");
    fs::create_dir_all(&directory)?;
    let (tracer, tests) = build()?;
    let (all, machine) = names(&tests)?;
    let exists = |name: &str| all.iter().chain(&machine).any(|known| known == name);
    if let Some((_, name, _)) = SKIPPED.iter().find(|(_, name, _)| !exists(name)) {
        bail!("there is no test {name}, which is to be skipped");
    }
    let go = go(&directory)?;
    let root = packages::root(&directory.join("root"))?;
    let mut rows = Vec::new();
    let mut fine = true;
    for kernel in kernels {
        println!("xtask: kernel {}", kernel.version);
        let place = directory.join(kernel.version);
        let unpacked = packages::kernel(&place, kernel.version, kernel.archive, kernel.suite)?;
        let asked = |name: &str| {
            let among = filters.is_empty() || filters.iter().any(|part| name.contains(part));
            among && (!quick || QUICK.contains(&name))
        };
        let concerns = |of: Option<&str>| kernel.lacks.is_none() && of.is_none_or(|of| of == kernel.version);
        let skipped: Vec<_> = SKIPPED.iter().filter(|(of, name, _)| concerns(*of) && asked(name)).collect();
        let is_skipped = |name: &str| skipped.iter().any(|(_, skipped, _)| *skipped == name);
        let wanted: Vec<_> = all.iter().map(String::as_str).filter(|name| asked(name) && !is_skipped(name)).collect();
        let alone: Vec<_> =
            machine.iter().map(String::as_str).filter(|name| asked(name) && !is_skipped(name)).collect();
        if quick && wanted.len() + alone.len() != QUICK.len() {
            bail!("`QUICK` in xtask/src/vm/mod.rs has tests that do not exist");
        }
        let limit = Duration::from_secs(if quick { 900 } else { 7200 });
        // Another boot runs the tests that have no result yet.
        let boot = |n, known: &Report| {
            let line = |names: &[&str]| {
                let names: Vec<_> = names.iter().copied().filter(|name| !known.has(name)).collect();
                (kernel.lacks.is_none() && !names.is_empty()).then(|| names.join(" "))
            };
            let payload = Payload {
                tracer: tracer.clone(),
                tests: tests.clone(),
                go: go.clone(),
                tests_asked: line(&wanted),
                machine_tests_asked: line(&alone),
            };
            guest::run(&place, &unpacked, kernel.cpu, &root, &payload, limit, n)
        };
        let mut report = boot(1, &Report::default())?;
        for n in 2..=BOOTS {
            let has_all = wanted.iter().chain(&alone).all(|name| report.has(name));
            let what = match &report {
                Report { release: None, .. } => "did not boot",
                Report { stuck: true, .. } if !has_all || report.loads.len() < 2 => "hung or crashed in the emulator",
                _ => break,
            };
            println!(
                "xtask: kernel {} {what} (see console.{} in {}); once more",
                kernel.version,
                n - 1,
                place.display()
            );
            let next = boot(n, &report)?;
            report = report.joined_by(next);
        }
        for (_, name, reason) in &skipped {
            println!("skipped: {name}: {reason}");
        }
        let verdict = judge(kernel, &report, wanted.len() + alone.len());
        if let Err(error) = &verdict {
            fine = false;
            println!("xtask: kernel {}: {error}", kernel.version);
        }
        let skipped = skipped.len() + report.skipped.len();
        rows.push(Row { version: kernel.version, skipped, fine: verdict.is_ok(), report });
    }
    print(&rows);
    if !fine {
        bail!("not all is as it should be");
    }
    Ok(())
}

/// The binaries that the guests run, of the build that `cargo test` makes.
fn build() -> Result<(PathBuf, PathBuf)> {
    let messages = workspace::output(workspace::cargo().args([
        "test",
        "--package",
        "tracer",
        "--test",
        "kernel",
        "--no-run",
        "--message-format",
        "json-render-diagnostics",
    ]))?;
    let mut binaries = (None, None);
    for line in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let Some(path) = message["executable"].as_str() else { continue };
        match (message["target"]["name"].as_str(), message["target"]["kind"][0].as_str()) {
            (Some("tracer"), Some("bin")) => binaries.0 = Some(path.into()),
            (Some("kernel"), Some("test")) => binaries.1 = Some(path.into()),
            _ => {}
        }
    }
    let (tracer, tests) = binaries;
    Ok((tracer.context("cargo built no tracer")?, tests.context("cargo built no tests")?))
}

/// The names of all tests but those that only run when they are asked for (`#[ignore]`), and of those among the latter that a
/// guest is made for.
fn names(tests: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let list = |arguments: &[&str]| -> Result<Vec<String>> {
        let list = workspace::output(Command::new(tests).args(arguments))?;
        Ok(list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    };
    let ignored = list(&["--list", "--ignored"])?;
    let usual = list(&["--list"])?.into_iter().filter(|name| !ignored.contains(name)).collect();
    Ok((usual, ignored.into_iter().filter(|name| name.starts_with("machine::")).collect()))
}

/// The tests' programs in Go, which would take a guest minutes to compile.
fn go(directory: &Path) -> Result<PathBuf> {
    let go = directory.join("go");
    let sources = workspace::root().join("tracer/tests/kernel/go");
    for name in ["go-server", "go-client"] {
        workspace::succeed(
            Command::new("go")
                .args(["build", "-o"])
                .arg(go.join(name))
                .arg(sources.join(format!("{name}.go")))
                .envs([("GOPROXY", "off"), ("GO111MODULE", "off"), ("CGO_ENABLED", "0")])
                .env("GOCACHE", directory.join("go-cache")),
        )?;
    }
    Ok(go)
}

fn judge(kernel: &Kernel, report: &Report, wanted: usize) -> Result<()> {
    let Some(release) = &report.release else { bail!("it did not boot") };
    if release.strip_prefix(kernel.version).is_none_or(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        bail!("it is {release}");
    }
    if let Some(lacks) = kernel.lacks {
        if report.loads.first().is_none_or(|(code, _)| *code != 4)
            || !report.messages.iter().any(|line| line.contains(lacks))
        {
            bail!(
                "tracer should refuse to start, with exit code 4, and name {lacks}: {:?} {:?}",
                report.loads,
                report.messages
            );
        }
        return Ok(());
    }
    if report.loads.len() != 2 || report.loads.iter().any(|(code, explained)| *code != 0 || *explained == 0) {
        bail!("the demo failed (exit code, explained): {:?}\n{}", report.loads, report.messages.join("\n"));
    }
    if let Some((name, count)) = report.verified.iter().find(|(_, count)| *count > MOST_VERIFIED) {
        bail!("program {name} has grown to {count} verified instructions, of 1,000,000 that a kernel accepts");
    }
    if !report.failed.is_empty() {
        bail!("{} tests failed: {}", report.failed.len(), report.failed.join(", "));
    }
    match report.tests {
        Some(0) if report.passed.len() == wanted => Ok(()),
        Some(code) => bail!("{} of {wanted} tests passed, exit code {code}", report.passed.len()),
        None => bail!("the tests did not end: {} of {wanted} passed", report.passed.len()),
    }
}

struct Row {
    version: &'static str,
    skipped: usize,
    fine: bool,
    report: Report,
}

/// Programs by the size that the verifier saw; the largest are the ones that grow.
const SHOWN: [&str; 3] = ["packets", "inet_sock_set_state", "close_wait"];

fn print(rows: &[Row]) {
    println!(
        "\n{:8} {:32} {:>5} {:>6} {:>6} {:>7}  verified: {}",
        "KERNEL",
        "RELEASE",
        "BOOTS",
        "PASSED",
        "FAILED",
        "SKIPPED",
        SHOWN.join(", ")
    );
    for Row { version, skipped, fine, report } in rows {
        let verified: Vec<_> = SHOWN
            .iter()
            .filter_map(|name| report.verified.iter().find(|(known, _)| known == name))
            .map(|(_, count)| count.to_string())
            .collect();
        let verified = match (verified.is_empty(), fine) {
            (true, true) => "refused, as it should be".to_owned(),
            _ => verified.join(", "),
        };
        println!(
            "{version:8} {:32} {:>5} {:>6} {:>6} {skipped:>7}  {verified}{}",
            report.release.as_deref().unwrap_or("-"),
            report.boots,
            report.passed.len(),
            report.failed.len(),
            if *fine { "" } else { "  FAILED" },
        );
    }
}
