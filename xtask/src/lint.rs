//! `cargo xtask lint`: formatting, and clippy without a warning, for the host, the fuzz targets and the kernel programs; and
//! whether each dependency has its reason in docs/dependencies.md; what systemd says of the unit; and whether the patch of
//! SECURITY.md still applies.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{deny, ebpf, unit, workspace};

pub(crate) fn lint() -> Result<()> {
    workspace::succeed(workspace::cargo().args(["fmt", "--all", "--check"]))?;
    let clippy = |targets: &[&str]| {
        workspace::succeed(workspace::cargo().arg("clippy").args(targets).args(["--", "-D", "warnings"]))
    };
    clippy(&["--workspace", "--all-targets"])?;
    // Not among all targets, as they need root, or a browser, to run.
    clippy(&["--package", "tracer", "--test", "kernel", "--test", "browser"])?;
    // The fuzz targets: workspaces of their own, which a stable compiler checks but does not link.
    let target = workspace::target_dir().join("fuzz");
    for manifest in ["tracer/fuzz/Cargo.toml", "tracer-ebpf/fuzz/Cargo.toml"] {
        let manifest = ["--manifest-path", manifest];
        workspace::succeed(workspace::cargo().arg("fmt").args(manifest).arg("--check"))?;
        let mut clippy = workspace::cargo();
        clippy.arg("clippy").args(manifest).arg("--target-dir").arg(&target).args(["--", "-D", "warnings"]);
        workspace::succeed(&mut clippy)?;
    }
    deny::list()?;
    unit::check()?;
    let mut patch = Command::new("git");
    patch.current_dir(workspace::root()).args(["apply", "--check", "docs/privacy-mutation.patch"]);
    workspace::succeed(&mut patch).context(
        "the patch that breaks the head scanner must be made anew: see SECURITY.md, \"What leaves the kernel\"",
    )?;
    ebpf::clippy()
}
