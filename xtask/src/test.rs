//! `cargo xtask test`: all tests. First those that need no privileges, then the page in a browser, then those that watch real
//! sockets as root.

use anyhow::{Result, bail};

use crate::workspace::{self, Program};

/// What the kernel tests drive, and the Debian package that has it.
const PROGRAMS: [Program; 13] = [
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
    // Its lists of system calls.
    ("systemd-analyze", "systemd"),
];

/// What the page of a recording is looked at with.
const BROWSER: [Program; 1] = [("chromium", "chromium")];

pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    let (plain, page) = match filter {
        Some(_) => (Ok(()), Ok(())),
        None => (unprivileged(), page()),
    };
    // A failure above does not keep the rest from being seen.
    let kernel = workspace::install("the kernel tests", &PROGRAMS).and_then(|()| kernel(filter));
    plain.and(page).and(kernel)
}

fn unprivileged() -> Result<()> {
    workspace::succeed(workspace::cargo().args(["test", "--workspace", "--no-fail-fast"]))
}

fn page() -> Result<()> {
    // Where one is named the test takes that.
    if std::env::var_os("CHROMIUM").is_none() {
        workspace::install("the test of the page", &BROWSER)?;
    }
    workspace::succeed(workspace::cargo().args(["test", "--package", "tracer", "--test", "browser"]))
}

fn kernel(filter: Option<&str>) -> Result<()> {
    const TESTS: [&str; 5] = ["test", "--package", "tracer", "--test", "kernel"];
    if let Some(filter) = filter {
        let listed = workspace::output(workspace::cargo().args(TESTS).args(["--", "--list", filter]))?;
        if !listed.lines().any(|line| line.ends_with(": test")) {
            bail!("no kernel test has {filter} in its name");
        }
    }
    workspace::succeed(
        workspace::cargo()
            .args(TESTS)
            .args(workspace::as_root()?)
            // They mostly wait: for time-outs, and for the verifier.
            .args(["--", "--test-threads=4"])
            .args(filter),
    )
}
