//! `cargo xtask deny`: licences, sources, duplicates and known weaknesses of all dependencies, those of the fuzz targets' own
//! workspaces too, by cargo-deny and `deny.toml`; and, also with `cargo xtask lint`, whether `docs/dependencies.md` says of each direct one why it is there.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::workspace;

const CARGO_DENY: &str = "0.20.2";
const LIST: &str = "docs/dependencies.md";
/// One for each workspace.
const MANIFESTS: [&str; 3] = ["Cargo.toml", "tracer/fuzz/Cargo.toml", "tracer-ebpf/fuzz/Cargo.toml"];

/// Checks all dependencies.
pub(crate) fn deny() -> Result<()> {
    list()?;
    if workspace::find("cargo-deny").is_none() {
        workspace::succeed(workspace::cargo().args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked"]))?;
    }
    for manifest in MANIFESTS {
        check(manifest, "--locked", &["licenses", "bans", "sources"])?;
    }
    // The list of weaknesses is a git repository; where it cannot be had, that is said, and no reason to fail.
    if let Err(error) = workspace::output(workspace::cargo().args(["deny", "fetch", "db"])) {
        eprintln!("xtask: the advisories could not be fetched, and were NOT checked: {error:#}");
        return Ok(());
    }
    // `--frozen`: with what has just been fetched.
    MANIFESTS.into_iter().try_for_each(|manifest| check(manifest, "--frozen", &["advisories"]))
}

/// Of one workspace, as it is locked. What `deny.toml` makes an exception for need not occur in each of them; in the first, what
/// does not occur any more is told, but for what only the fuzz targets have.
fn check(manifest: &str, network: &str, what: &[&str]) -> Result<()> {
    eprintln!("xtask: dependencies of {manifest}");
    let mut cargo = workspace::cargo();
    cargo.args(["deny", "--manifest-path", manifest, "--config", "deny.toml", network, "--all-features", "check"]);
    let surplus: &[&str] = match manifest {
        "Cargo.toml" => &["license-exception-not-encountered"],
        _ => &["license-exception-not-encountered", "license-not-encountered", "unmatched-skip-root"],
    };
    cargo.args(surplus.iter().flat_map(|lint| ["--allow", lint]));
    workspace::succeed(cargo.args(what))
}

/// Compares the manifests with the list.
pub(crate) fn list() -> Result<()> {
    let text = fs::read_to_string(workspace::root().join(LIST)).context(LIST)?;
    let mut wanted = BTreeSet::new();
    for manifest in MANIFESTS {
        let mut cargo = workspace::cargo();
        cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path", manifest]);
        let metadata: Value = serde_json::from_str(&workspace::output(&mut cargo)?)?;
        wanted.extend(direct(&metadata));
    }
    let listed = listed(&text);
    let missing: Vec<_> = wanted.difference(&listed).collect();
    let surplus: Vec<_> = listed.difference(&wanted).collect();
    ensure!(missing.is_empty(), "{LIST} does not say why these are needed: {missing:?}");
    ensure!(surplus.is_empty(), "{LIST} lists what no manifest has any more: {surplus:?}");
    Ok(())
}

/// Names of direct dependencies, without the workspace's own packages.
fn direct(metadata: &Value) -> BTreeSet<String> {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let dependencies = packages.flat_map(|package| package["dependencies"].as_array().into_iter().flatten());
    dependencies
        .filter(|dependency| dependency["path"].is_null())
        .filter_map(|dependency| dependency["name"].as_str().map(str::to_owned))
        .collect()
}

/// The first column of the tables: a name in backquotes.
fn listed(text: &str) -> BTreeSet<String> {
    text.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_list_and_the_manifests() {
        let listed = listed("| crate | why |\n| --- | --- |\n| `lru` | a cache |\n| `serde_json` (tests) | JSON |\n");
        assert_eq!(listed.into_iter().collect::<Vec<_>>(), ["lru", "serde_json"]);
        let metadata = serde_json::json!({ "packages": [
            { "dependencies": [{ "name": "lru", "path": null }, { "name": "tracer-ebpf", "path": "/x" }] },
            { "dependencies": [{ "name": "lru" }] },
        ] });
        assert_eq!(direct(&metadata).into_iter().collect::<Vec<_>>(), ["lru"]);
    }

    #[test]
    fn each_dependency_has_its_reason() {
        list().expect("the list is complete");
    }
}
