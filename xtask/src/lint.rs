//! `cargo xtask lint`: formatting, and clippy without a warning, for the host, the fuzz targets and the kernel programs; and
//! whether each dependency has its reason in docs/dependencies.md.

use anyhow::Result;

use crate::{deny, ebpf, workspace};

pub(crate) fn lint() -> Result<()> {
    workspace::succeed(workspace::cargo().args(["fmt", "--all", "--check"]))?;
    let clippy = |targets: &[&str]| {
        workspace::succeed(workspace::cargo().arg("clippy").args(targets).args(["--", "-D", "warnings"]))
    };
    clippy(&["--workspace", "--all-targets"])?;
    // Not among all targets, as they need root, or a browser, to run.
    clippy(&["--package", "tracer", "--test", "kernel", "--test", "browser"])?;
    // The fuzz targets: a workspace of their own, which a stable compiler checks but does not link.
    let manifest = ["--manifest-path", "tracer-ebpf/fuzz/Cargo.toml"];
    workspace::succeed(workspace::cargo().arg("fmt").args(manifest).arg("--check"))?;
    let target = workspace::target_dir().join("fuzz");
    workspace::succeed(
        workspace::cargo().arg("clippy").args(manifest).arg("--target-dir").arg(target).args(["--", "-D", "warnings"]),
    )?;
    deny::list()?;
    ebpf::clippy()
}
