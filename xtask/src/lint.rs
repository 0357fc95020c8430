//! `cargo xtask lint`: formatting, and clippy without a warning, for the host and for the kernel programs.

use anyhow::Result;

use crate::{ebpf, workspace};

pub(crate) fn lint() -> Result<()> {
    workspace::succeed(workspace::cargo().args(["fmt", "--all", "--check"]))?;
    let clippy = |targets: &[&str]| {
        workspace::succeed(workspace::cargo().arg("clippy").args(targets).args(["--", "-D", "warnings"]))
    };
    clippy(&["--workspace", "--all-targets"])?;
    // Not among all targets, as it needs root to run.
    clippy(&["--package", "tracer", "--test", "kernel"])?;
    ebpf::clippy()
}
