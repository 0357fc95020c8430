//! Where things are, and how other programs are started.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// The root of the repository.
///
/// Asked at run time: a target directory that two clones share may run the other clone's xtask.
pub(crate) fn root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// The directory that builds go to.
pub(crate) fn target_dir() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// `cargo`, to be run at the root of the repository.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Whether this process is root already.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The arguments of cargo that make it start programs through sudo; none if this process is root already.
pub(crate) fn as_root() -> Result<Vec<OsString>> {
    if is_root() {
        return Ok(Vec::new());
    }
    if find("sudo").is_none() {
        bail!("this must run as root, and there is no sudo: become root first (`su -`), or install sudo");
    }
    Ok(vec!["--config".into(), r#"target."cfg(all())".runner = ["sudo", "-E"]"#.into()])
}

/// Finds a program along `PATH`, and where daemons live, which is seldom in a user's `PATH`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs a command to its end, and fails if it does.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!("{name} {}: {status}", args.join(" "));
    }
    Ok(())
}

/// Runs a command to its end and returns what it printed, trimmed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A program that is needed, and the Debian package that has it.
pub(crate) type Program = (&'static str, &'static str);

/// Installs what is missing for `what`, or says what is.
pub(crate) fn install(what: &str, programs: &[Program]) -> Result<()> {
    let missing: Vec<_> = programs.iter().filter(|(program, _)| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    if find("apt-get").is_none() || !(is_root() || find("sudo").is_some()) {
        let programs: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
        bail!("{what} need(s) {} (on Debian: apt-get install {})", programs.join(", "), packages.join(" "));
    }
    eprintln!("xtask: installing {}", packages.join(" "));
    let apt_get = |args: &[&str]| {
        let mut command = if is_root() { Command::new("env") } else { Command::new("sudo") };
        if !is_root() {
            command.arg("env");
        }
        // A run level of 1 keeps packages from starting their services.
        command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "--yes", "--quiet"]).args(args);
        command
    };
    succeed(&mut apt_get(&["update"]))?;
    succeed(apt_get(&["install", "--no-install-recommends"]).args(packages))
}
