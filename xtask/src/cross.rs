//! `cargo xtask cross`: whether the user side compiles for aarch64. It is checked, not linked, and nothing is run.
//!
//! Takes the standard library of that target if a toolchain here has it, or else compiles it from its source, which needs
//! no linker and no C compiler of that architecture.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::workspace;

const TARGET: &str = "aarch64-unknown-linux-gnu";

pub(crate) fn cross() -> Result<()> {
    let sysroots = ["rustc", "/usr/bin/rustc"]
        .map(|rustc| workspace::output(Command::new(rustc).args(["--print", "sysroot"])).map(PathBuf::from));
    let sysroots: Vec<PathBuf> = sysroots.into_iter().flatten().collect();
    let having = |what: &str| sysroots.iter().find(|sysroot| sysroot.join("lib/rustlib").join(what).is_dir());
    let mut command = workspace::cargo();
    command.args(["check", "--locked", "--package", "tracer", "--target", TARGET, "--target-dir"]);
    command.arg(workspace::target_dir().join("cross"));
    // As for the kernel programs: not what may be rustup's proxy.
    let rustc = |sysroot: &PathBuf| sysroot.join("bin/rustc");
    if let Some(sysroot) = having(TARGET) {
        command.env("RUSTC", rustc(sysroot));
    } else {
        let sysroot = having("src/rust/library/std").with_context(|| {
            format!(
                "no rustc here has the standard library of {TARGET} or its source: `rustup target add {TARGET}`, \
                 or on Debian `apt-get install rustc-web rust-web-src`"
            )
        })?;
        // `-Z build-std` on a stable toolchain.
        command.args(["-Z", "build-std=std,panic_abort"]).env("RUSTC", rustc(sysroot)).env("RUSTC_BOOTSTRAP", "1");
    }
    workspace::succeed(&mut command)
}
