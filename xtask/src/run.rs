//! `cargo xtask run [ARGS…]`: builds tracer, becomes root, and turns into `tracer run ARGS…`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;

use anyhow::{Result, anyhow};

use crate::workspace;

pub(crate) fn run(args: Vec<OsString>) -> Result<()> {
    let error = workspace::cargo()
        .args(["run", "--quiet", "--release", "--package", "tracer", "--bin", "tracer"])
        .args(workspace::as_root()?)
        .args(["--", "run"])
        .args(args)
        .exec();
    Err(anyhow!(error).context("cannot run cargo"))
}
