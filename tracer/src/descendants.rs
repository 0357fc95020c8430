//! The processes that `--pid` means at the start: those named, and all their descendants.
//!
//! What comes in: process ids. What goes out: process ids with start times, which together name a process for ever; the
//! programs add what is forked later. Read from `/proc`, where a process may vanish between any two looks.

use std::collections::{HashMap, HashSet};
use std::fs;

use crate::process;
use crate::time_namespace::host_ticks;

/// A process id and a start time in clock ticks since boot (`/proc/<pid>/stat`, field 22).
pub type Named = (u32, u64);

/// Finds the processes `pids` and their descendants.
///
/// # Errors
/// The first of `pids` that does not exist.
pub fn of(pids: &[u32]) -> Result<Vec<Named>, u32> {
    let processes: HashMap<u32, Stat> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, stat(pid)?))
        })
        .collect();
    closure(&processes, pids)
}

/// What is needed of `/proc/<pid>/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    parent: u32,
    start: u64,
}

/// `None`: it has ended.
fn stat(pid: u32) -> Option<Stat> {
    parse(&fs::read(format!("/proc/{pid}/stat")).ok()?)
}

pub(crate) fn parse(stat: &[u8]) -> Option<Stat> {
    Some(Stat { parent: process::stat_field(stat, 4)?, start: process::stat_field(stat, 22)? })
}

fn closure(processes: &HashMap<u32, Stat>, pids: &[u32]) -> Result<Vec<Named>, u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (pid, stat) in processes {
        children.entry(stat.parent).or_default().push(*pid);
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut next = pids.to_vec();
    if let Some(missing) = pids.iter().find(|pid| !processes.contains_key(pid)) {
        return Err(*missing);
    }
    while let Some(pid) = next.pop() {
        if let Some(stat) = processes.get(&pid)
            && seen.insert(pid)
        {
            found.push((pid, host_ticks(stat.start)));
            next.extend(children.get(&pid).into_iter().flatten());
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_name_with_blanks_and_parentheses() {
        let stat = b"42 (a) b (c)) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 10 18446744073709551615";
        assert_eq!(parse(stat), Some(Stat { parent: 7, start: 98765 }));
        assert_eq!(parse(b"42 (a) S 7"), None);
        assert_eq!(parse(b"\xff\xfe"), None);
    }

    #[test]
    fn descendants_of_several_once_each() {
        let processes = [(1, 0), (2, 1), (3, 2), (4, 2), (5, 1), (6, 5)]
            .into_iter()
            .map(|(pid, parent)| (pid, Stat { parent, start: u64::from(pid) * 10 }))
            .collect();
        assert_eq!(closure(&processes, &[2, 4]), Ok(vec![(2, 20), (3, 30), (4, 40)]));
        assert_eq!(closure(&processes, &[6]), Ok(vec![(6, 60)]));
        assert_eq!(closure(&processes, &[6, 99]), Err(99));
    }

    #[test]
    fn finds_this_process_and_its_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let found = of(&[std::process::id()]).expect("this process exists");
        child.kill().expect("its own child");
        child.wait().expect("its own child");
        let pids: Vec<u32> = found.iter().map(|(pid, _)| *pid).collect();
        assert!(pids.contains(&std::process::id()) && pids.contains(&child.id()), "{pids:?}");
    }
}
