//! `cargo xtask test`: all tests. First those that need no privileges, then those that watch real sockets as root.

use std::process::Command;

use anyhow::{Result, bail};

use crate::workspace;

/// What the kernel tests drive, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 12] = [
    ("ab", "apache2-utils"),
    // Not `apache2`: that one would also start a server on port 80.
    ("apache2", "apache2-bin"),
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("go", "golang-go"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nginx", "nginx"),
    ("node", "nodejs"),
    ("python3", "python3"),
    ("setpriv", "util-linux"),
    ("ss", "iproute2"),
];

pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    let plain = match filter {
        Some(_) => Ok(()),
        None => unprivileged(),
    };
    // A failure above does not keep the rest from being seen.
    let kernel = install().and_then(|()| kernel(filter));
    plain.and(kernel)
}

fn unprivileged() -> Result<()> {
    workspace::succeed(workspace::cargo().args(["test", "--workspace", "--no-fail-fast"]))
}

fn kernel(filter: Option<&str>) -> Result<()> {
    workspace::succeed(
        workspace::cargo()
            .args(["test", "--package", "tracer", "--test", "kernel"])
            .args(workspace::as_root()?)
            // They mostly wait: for time-outs, and for the verifier.
            .args(["--", "--test-threads=4"])
            .args(filter),
    )
}

/// Installs what is missing, or says what is.
fn install() -> Result<()> {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(program, _)| workspace::find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    if workspace::find("apt-get").is_none() || !(workspace::is_root() || workspace::find("sudo").is_some()) {
        let programs: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
        bail!("the kernel tests need {} (on Debian: apt-get install {})", programs.join(", "), packages.join(" "));
    }
    eprintln!("xtask: installing {}", packages.join(" "));
    let apt_get = |args: &[&str]| {
        let mut command = if workspace::is_root() { Command::new("env") } else { Command::new("sudo") };
        if !workspace::is_root() {
            command.arg("env");
        }
        // A run level of 1 keeps packages from starting their services.
        command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "--yes", "--quiet"]).args(args);
        command
    };
    workspace::succeed(&mut apt_get(&["update"]))?;
    workspace::succeed(apt_get(&["install", "--no-install-recommends"]).args(packages))
}
