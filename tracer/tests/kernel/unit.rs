//! The systemd unit, as far as a kernel without systemd can tell: under its capabilities and its filters of system calls, put
//! together by systemd's own lists, tracer must be no worse. `cargo xtask lint` has systemd look at the rest of it.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::{Value, json};

use crate::privileges::{names_everything, nobody_by, unit_capabilities};
use crate::rig::{expect, run, tracer};

const UNIT: &str = include_str!("../../../packaging/tracer.service");

/// The words of each assignment of a setting, in their order.
fn assigned(setting: &str) -> Vec<Vec<&'static str>> {
    let lines = UNIT.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    let values: Vec<Vec<_>> = lines.map(|value| value.split_whitespace().collect()).collect();
    assert!(!values.is_empty(), "the unit does not say {setting}=");
    values
}

/// A system call, or all of a set of systemd's.
fn expand(name: &str, calls: &mut BTreeSet<String>) {
    if !name.starts_with('@') {
        calls.insert(name.to_owned());
        return;
    }
    let set = run(Command::new("systemd-analyze").args(["syscall-filter", "--no-pager", name]));
    // Behind its name and a comment.
    let members = set.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#') && *line != name);
    members.for_each(|member| expand(member, calls));
}

/// What `SystemCallFilter=` allows, as `systemd.exec(5)` says how its assignments follow one another.
fn allowed() -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    expand("@default", &mut allowed);
    for words in assigned("SystemCallFilter") {
        let taken_away = words[0].starts_with('~');
        let mut calls = BTreeSet::new();
        words.iter().for_each(|word| expand(word.trim_start_matches('~'), &mut calls));
        if taken_away {
            allowed.retain(|call| !calls.contains(call));
        } else {
            allowed.append(&mut calls);
        }
    }
    allowed
}

/// The flags of `clone` for namespaces.
const NAMESPACES: [(&str, i32); 7] = [
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("ipc", libc::CLONE_NEWIPC),
    ("net", libc::CLONE_NEWNET),
    ("mnt", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("user", libc::CLONE_NEWUSER),
    ("uts", libc::CLONE_NEWUTS),
];

/// A program that becomes another one under the unit's filters, which forbid `missing`, too.
pub(crate) fn under_the_filters_without(missing: &str) -> [String; 4] {
    // What the script takes for granted.
    assert_eq!(assigned("SystemCallErrorNumber"), [["EPERM"]]);
    assert_eq!(assigned("MemoryDenyWriteExecute"), [["yes"]]);
    let families = assigned("RestrictAddressFamilies").concat().into_iter().map(|family| match family {
        "AF_UNIX" => libc::AF_UNIX,
        "AF_NETLINK" => libc::AF_NETLINK,
        _ => panic!("{family} is another family"),
    });
    let namespaces = assigned("RestrictNamespaces").concat();
    let denied = NAMESPACES.iter().filter(|(name, _)| !namespaces.contains(name)).map(|(_, flag)| flag);
    let mut allowed = allowed();
    assert!(missing.is_empty() || allowed.remove(missing), "the unit does not allow {missing}");
    let unit = json!({
        "allowed": allowed,
        "families": families.collect::<Vec<_>>(),
        "denied_namespaces": denied.collect::<Vec<_>>(),
    });
    ["/usr/bin/python3".to_owned(), "-c".to_owned(), include_str!("unit.py").to_owned(), unit.to_string()]
}

fn under_the_filters() -> [String; 4] {
    under_the_filters_without("")
}

#[test]
fn under_the_units_filters_it_names_as_much() {
    let directory = tempfile::tempdir().expect("a directory");
    let by = under_the_filters();
    names_everything("unit-file", nobody_by(&unit_capabilities(), directory.path(), &by));
}

/// What the filters forbid nobody with these capabilities; and that they are there at all.
#[test]
fn the_units_filters_are_the_units() {
    let script = format!(
        "import ctypes, mmap, os, socket\n\
         libc = ctypes.CDLL(None, use_errno=True)\n\
         def by_libc(answer):\n\
         \x20   if answer < 0: raise OSError(ctypes.get_errno(), 'no')\n\
         for attempt in [\n\
         \x20   lambda: os.nice(1),\n\
         \x20   lambda: socket.socket(socket.AF_INET),\n\
         \x20   lambda: by_libc(libc.unshare({uts})),\n\
         \x20   lambda: mmap.mmap(-1, 4096, prot=7),\n\
         \x20   lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, {sock_diag}),\n\
         \x20   lambda: by_libc(libc.unshare({net})),\n\
         ]:\n\
         \x20   try: attempt(); print(0)\n\
         \x20   except OSError as error: print(error.errno)",
        uts = libc::CLONE_NEWUTS,
        net = libc::CLONE_NEWNET,
        sock_diag = libc::NETLINK_SOCK_DIAG,
    );
    let answers = |by: &[String]| -> Vec<i32> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        for set in ["inh-caps", "ambient-caps", "bounding-set"] {
            command.arg(format!("--{set}=-all,{}", unit_capabilities()));
        }
        let printed = run(command.args(by).args(["/usr/bin/python3", "-c", &script]));
        printed.lines().map(|line| line.parse().expect("a number")).collect()
    };
    assert_eq!(answers(&[]), [0; 6]);
    let no = libc::EPERM;
    assert_eq!(answers(&under_the_filters()), [no, libc::EAFNOSUPPORT, no, no, 0, 0]);
}

/// As on a kernel that has it not, or under a container's profile that is older than it.
#[test]
fn what_it_cannot_confine_itself_with_is_said() {
    for (call, name, other) in
        [("landlock_create_ruleset", "without Landlock", "by seccomp alone"), ("seccomp", "without seccomp", "")]
    {
        let run = |arguments: &[&str]| -> (Option<i32>, Value, String) {
            let mut command = Command::new("env");
            let command = command.args(under_the_filters_without(call)).arg(tracer().get_program()).args(arguments);
            let output = command.output().expect("it runs");
            let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let first = stdout.lines().next().unwrap_or_else(|| panic!("{stderr}"));
            (output.status.code(), serde_json::from_str(first).expect("JSON"), stderr.into_owned())
        };
        let (code, report, _) = run(&["doctor", "--json", "--strict"]);
        let findings = report["findings"].as_array().expect("a list");
        let found: Vec<_> = findings.iter().filter(|one| one["name"] == "sandbox").collect();
        let [finding] = found[..] else { panic!("{found:?}") };
        expect(finding, &json!({ "status": "degraded" }));
        let (means, mend) = (finding["means"].as_str().expect("text"), finding["mend"].as_str().expect("text"));
        assert!(means.starts_with(name) && means.contains(other) && mend.contains(call), "{finding}");
        assert_eq!((code, &report["verdict"]), (Some(9), &json!("degraded")), "{report:#}");
        // `run` says the same, and warns of it, but for who does not want it.
        let message = json!(format!("{means}; {mend}"));
        let said = |arguments: &[&str]| {
            let (code, start, stderr) = run(&[&["run", "--json", "--duration", "10ms"], arguments].concat());
            assert_eq!(code, Some(0), "{stderr}");
            (start["degraded"].as_array().expect("a list").contains(&message), stderr.contains(means))
        };
        assert_eq!((said(&[]), said(&["--no-sandbox"])), ((true, true), (false, false)));
    }
}
