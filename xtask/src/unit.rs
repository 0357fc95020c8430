//! The systemd unit, as systemd sees it: whether it understands each line, and how tight the unit is. Nothing is started, and no
//! systemd need run. `tracer/tests/kernel/unit.rs` tests that tracer works under it.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::workspace::{self, Program};

const PROGRAMS: [Program; 1] = [("systemd-analyze", "systemd")];

/// The most that `systemd-analyze security` may find exposed, in tenths.
const MOST_EXPOSED: u32 = 20;

pub(crate) fn check() -> Result<()> {
    workspace::install("the checks of the systemd unit", &PROGRAMS)?;
    let root = workspace::root();
    let unit = fs::read_to_string(root.join("packaging/tracer.service")).context("packaging/tracer.service")?;
    understood(&unit)?;
    let exposure = exposure(&unit)?;
    let version = workspace::output(analyze().arg("--version"))?;
    let version = version.split_whitespace().nth(1).context("systemd-analyze says no version")?;
    let security = fs::read_to_string(root.join("SECURITY.md")).context("SECURITY.md")?;
    agrees(&security, &exposure, version)
}

fn analyze() -> Command {
    let program = workspace::find("systemd-analyze").unwrap_or_else(|| "systemd-analyze".into());
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").arg("--no-pager");
    command
}

/// A copy of the unit, where it has its name.
fn copy(unit: &str) -> Result<(tempfile::TempDir, std::path::PathBuf)> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("tracer.service");
    fs::write(&file, unit)?;
    Ok((directory, file))
}

/// Whether systemd knows each setting and each value. What it does not know it passes over, says so, and succeeds.
fn understood(unit: &str) -> Result<()> {
    // The binary is not installed here.
    let start = unit.lines().find(|line| line.starts_with("ExecStart=")).context("the unit starts nothing")?;
    let (_directory, file) = copy(&unit.replace(start, "ExecStart=/bin/true"))?;
    let output = analyze().args(["verify", "--man=no"]).arg(&file).output().context("cannot run systemd-analyze")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.trim().is_empty(), "systemd-analyze verify: {}: {said}", output.status);
    Ok(())
}

/// Its exposure, as a number with one decimal, if that is not too much.
fn exposure(unit: &str) -> Result<String> {
    let (_directory, file) = copy(unit)?;
    let threshold = format!("--threshold={MOST_EXPOSED}");
    let output = analyze().args(["security", "--offline=true", &threshold]).arg(file).output();
    let output = output.context("cannot run systemd-analyze")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "the unit is more exposed than {MOST_EXPOSED} tenths:\n{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let level = said.lines().find_map(|line| line.split_once("exposure level for ")?.1.split_whitespace().nth(1));
    Ok(level.context("systemd-analyze security says no level")?.to_owned())
}

/// Whether SECURITY.md has the figure. Other versions of systemd than the one that it names weigh differently.
fn agrees(security: &str, exposure: &str, version: &str) -> Result<()> {
    // It may be cut into lines anywhere.
    let security = security.split_whitespace().collect::<Vec<_>>().join(" ");
    let said = security.split_once("exposure of ").and_then(|(_, rest)| rest.split_once(" (by systemd "));
    let Some((figure, by)) = said.and_then(|(figure, rest)| Some((figure, rest.split_once(')')?.0))) else {
        bail!("SECURITY.md does not say `exposure of N (by systemd V)`");
    };
    if by != version {
        eprintln!("xtask: SECURITY.md has the exposure by systemd {by}; systemd {version} finds {exposure}");
        return Ok(());
    }
    ensure!(figure == exposure, "SECURITY.md says an exposure of {figure}, and systemd {version} {exposure}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_of_the_same_systemd_must_be_the_one_that_is_written() {
        let text = "gives an\nexposure of 2.0 (by\nsystemd 252). More.";
        assert!(agrees(text, "2.0", "252").is_ok() && agrees(text, "1.9", "257").is_ok());
        assert!(agrees(text, "1.9", "252").is_err() && agrees("nothing", "2.0", "252").is_err());
    }
}
