//! The floor: empty programs on the hooks of tracer, which do nothing but return. What they cost, no tracer can avoid.
//!
//! Also here: the counting of program runs.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::bpf::{Kind, Types, count_runs, link, load, tracepoint, uapi};

/// `r0 = result; exit`
const fn returns(result: i32) -> [u64; 2] {
    [uapi::mov(0, result), uapi::EXIT]
}

/// The kernel counts and times the runs of all programs while this lives; some 60 ns more for each.
pub(crate) struct Counting {
    _fd: OwnedFd,
}

impl Counting {
    pub(crate) fn start() -> Result<Self> {
        let fd = count_runs().context("cannot have program runs counted")?;
        Ok(Self { _fd: fd })
    }
}

/// The attached programs, and their links: detached when they go out of scope.
pub(crate) struct Floor {
    _held: Vec<OwnedFd>,
}

impl Floor {
    /// On hooks as tracer's `start` names them. Iterators run when they are asked to, and are left out.
    pub(crate) fn attach(hooks: &[String], types: &Types) -> Result<Self> {
        // As tracer: one program for both directions.
        let packets = packets()?;
        let root = File::open(cgroup_root()?)?;
        let cgroup = |direction| link(&packets, &root, direction).map(|link| vec![link]);
        let mut held = Vec::new();
        for hook in hooks {
            let (kind, name) = hook.split_once('/').unwrap_or((hook, ""));
            let attached = match (kind, name) {
                ("tp_btf", name) => tracepoint(name, &returns(0), types).map(Vec::from),
                ("cgroup_skb", "ingress") => cgroup(uapi::BPF_CGROUP_INET_INGRESS).map_err(Into::into),
                ("cgroup_skb", "egress") => cgroup(uapi::BPF_CGROUP_INET_EGRESS).map_err(Into::into),
                ("iter", _) => continue,
                _ => bail!("tracer has a hook {hook} that the floor does not know"),
            };
            held.extend(attached.with_context(|| format!("an empty program on {hook}"))?);
            // Tracer has two programs here: the second is for what the kernel keeps from the first.
            if hook == "tp_btf/inet_sock_set_state" {
                held.extend(tracepoint(name, &returns(0), types).context("a second empty program on the transitions")?);
            }
        }
        held.push(packets);
        Ok(Self { _held: held })
    }
}

/// Under the name of tracer's own, beside which it is listed.
fn packets() -> Result<OwnedFd> {
    let kind = Kind { prog_type: uapi::BPF_PROG_TYPE_CGROUP_SKB, expected_attach_type: 0, attach_btf_id: 0 };
    load("packets", &returns(1), &kind).context("an empty program for packets")
}

/// Where the root of the cgroup-v2 hierarchy is mounted.
fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    mounts
        .lines()
        .find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let mut words = mount.split(' ').skip(3);
            let (root, place) = (words.next()?, words.next()?);
            (kind.starts_with("cgroup2 ") && root == "/").then(|| place.into())
        })
        .context("no cgroup-v2 hierarchy is mounted")
}
