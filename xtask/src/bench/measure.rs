//! What the kernel counts of a process: runs of its programs, its time on a CPU, its memory.
//!
//! From `/proc`, by the process's own descriptors: other people's programs on this host are not taken for its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::workspace;

/// Runs of one program.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Runs {
    pub(crate) ns: u64,
    pub(crate) count: u64,
}

/// What a process has used so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    /// Of its programs, by id.
    pub(crate) programs: BTreeMap<u32, Runs>,
    /// Nanoseconds that its threads have run.
    pub(crate) cpu_ns: u64,
}

impl Usage {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let mut programs = BTreeMap::new();
        for file in descriptors(pid)? {
            // Links name their program, too, but count nothing.
            if let (Some(id), Some(ns), Some(count)) =
                (number(&file, "prog_id"), number(&file, "run_time_ns"), number(&file, "run_cnt"))
            {
                programs.insert(u32::try_from(id)?, Runs { ns, count });
            }
        }
        Ok(Self { programs, cpu_ns: cpu_ns(pid)? })
    }

    /// What was used between `before` and this.
    pub(crate) fn since(mut self, before: &Self) -> Self {
        for (id, runs) in &mut self.programs {
            let before = before.programs.get(id).copied().unwrap_or_default();
            runs.ns = runs.ns.saturating_sub(before.ns);
            runs.count = runs.count.saturating_sub(before.count);
        }
        self.cpu_ns = self.cpu_ns.saturating_sub(before.cpu_ns);
        self
    }

    /// Of all programs.
    pub(crate) fn runs(&self) -> Runs {
        self.programs
            .values()
            .fold(Runs::default(), |sum, runs| Runs { ns: sum.ns + runs.ns, count: sum.count + runs.count })
    }
}

/// What the kernel tells of each open file of a process.
fn descriptors(pid: u32) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).with_context(|| format!("process {pid} has ended"))? {
        // It may be closed meanwhile.
        if let Ok(text) = fs::read_to_string(entry?.path()) {
            files.push(text);
        }
    }
    Ok(files)
}

/// The name of a program.
pub(crate) fn program_name(id: u32) -> Option<String> {
    Some(bpftool("prog", id.into()).ok()?["name"].as_str()?.to_owned())
}

/// The number behind a name, as in `VmRSS:  1234 kB`.
pub(crate) fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Exact, unlike the clock ticks of `stat`. A thread that has ended is forgotten; those that are measured live on.
fn cpu_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += text.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// Kernel memory that the maps of a process's programs take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Maps {
    pub(crate) count: usize,
    /// Socket storage is not in it: that grows with each socket.
    pub(crate) bytes: u64,
    /// Of the value that a socket gets in its storage.
    pub(crate) socket_value: Option<u64>,
}

impl Maps {
    /// The programs may have maps that the process has let go of.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let mut ids = BTreeSet::new();
        for file in descriptors(pid)? {
            ids.extend(number(&file, "map_id"));
            if let Some(program) = number(&file, "prog_id") {
                let shown = bpftool("prog", program)?;
                ids.extend(shown["map_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
            }
        }
        let mut maps = Self { count: ids.len(), ..Self::default() };
        for id in ids {
            let map = bpftool("map", id)?;
            maps.bytes += map["bytes_memlock"].as_u64().context("a map has a size")?;
            if map["type"] == "sk_storage" {
                maps.socket_value = map["bytes_value"].as_u64();
            }
        }
        Ok(maps)
    }
}

/// What bpftool shows of one program or map.
fn bpftool(what: &str, id: u64) -> Result<Value> {
    let said = workspace::output(Command::new("bpftool").args(["--json", what, "show", "id", &id.to_string()]))?;
    Ok(serde_json::from_str(&said)?)
}

/// Resident memory of a process, in bytes: now, and at most so far.
pub(crate) fn resident(pid: u32) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |name: &str| number(&status, name).with_context(|| format!("no {name} of process {pid}"));
    Ok((kib("VmRSS")? << 10, kib("VmHWM")? << 10))
}

/// From now on the peak of [`resident`] is that of what comes.
pub(crate) fn forget_peak(pid: u32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").context("the peak of resident memory")
}

/// Packets of the loopback device in the network namespace of a process, as TCP hands them over: large ones count once.
pub(crate) fn packets(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let lo = text.lines().find_map(|line| line.trim_start().strip_prefix("lo:")).context("no loopback device")?;
    Ok(lo.split_whitespace().nth(1).context("no packets")?.parse()?)
}

/// TCP sockets of a network namespace since it exists.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sockets {
    /// Connected or accepted.
    pub(crate) opened: u64,
    /// Connected now.
    pub(crate) established: u64,
    /// Segments with a RST that were sent.
    pub(crate) resets: u64,
}

impl Sockets {
    /// Of the network namespace of a process.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/net/snmp"))?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp:"));
        let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let value = |name: &str| -> Result<u64> {
            let at = names.split_whitespace().position(|known| known == name).with_context(|| format!("no {name}"))?;
            Ok(values.split_whitespace().nth(at).with_context(|| format!("no {name}"))?.parse()?)
        };
        Ok(Self {
            opened: value("ActiveOpens")? + value("PassiveOpens")?,
            established: value("CurrEstab")?,
            resets: value("OutRsts")?,
        })
    }
}
