//! The kernel side's loader: programs and maps in, attached hooks out.
//!
//! Of user space only this and `ring` know aya. Everything is held by file descriptors of this process, nothing is
//! pinned: when the process ends, however it ends, the kernel detaches and frees all of it.

use std::collections::HashSet;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};
use aya::maps::{HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::{BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Iter};
use aya::{Btf, Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use log::Log;
use tracer_ebpf::{Config, Offsets, counter, filter};

use crate::descendants;
use crate::preflight::Refusal;

/// The programs. Committed, so that building tracer needs no BPF toolchain; `TRACER_BPF_OBJECT` at build time names
/// another object, for testing programs that were just built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("TRACER_BPF_OBJECT"));

/// What the programs are asked to report.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// Processes: they and their descendants only. Empty: all.
    pub pids: Vec<u32>,
    /// Local or remote ports. Empty: all.
    pub ports: Vec<u16>,
    /// Process names, NUL-padded. Empty: all.
    pub comms: Vec<[u8; 16]>,
    /// A record for every transition.
    pub states: bool,
    /// Keep the query string of targets.
    pub full_target: bool,
}

/// Counters of the programs, summed over all CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records that found the ring buffer full.
    pub lost: u64,
    /// Sockets that could not be followed for want of memory.
    pub untracked: u64,
}

/// The attached programs; dropped, they are gone.
pub struct Kernel {
    ebpf: Option<Ebpf>,
    counters: PerCpuArray<MapData, u64>,
    /// Attached hooks by name.
    pub hooks: Vec<String>,
}

/// Tracepoints, and the programs of the same name.
const TRACEPOINTS: [&str; 4] = ["tcp_receive_reset", "tcp_send_reset", "tcp_rcv_space_adjust", "sched_process_exit"];

/// The last one to be attached: a socket's first transition must find the hooks that complete it.
const TRANSITIONS: &str = "inet_sock_set_state";

/// Only with `--pid`: its descendants.
const PID_TRACEPOINTS: [&str; 2] = ["sched_process_fork", "sched_process_free"];

impl Kernel {
    /// Loads the programs, attaches them (`cgroup` is the root of the cgroup-v2 hierarchy), and finds the owners of the
    /// sockets that are open already.
    ///
    /// # Errors
    /// What the kernel refused, with the program or map that it refused.
    pub fn attach(
        ask: &Ask,
        cgroup: &OwnedFd,
        offsets: &Offsets,
    ) -> Result<(Self, RingBuf<MapData>, EbpfLogger<&'static dyn Log>)> {
        let config = Config {
            filters: [
                (!ask.pids.is_empty(), filter::PID),
                (!ask.ports.is_empty(), filter::PORT),
                (!ask.comms.is_empty(), filter::COMM),
            ]
            .into_iter()
            .filter_map(|(on, bit)| on.then_some(bit))
            .sum(),
            states: ask.states.into(),
            full_target: ask.full_target.into(),
            _pad: 0,
        };
        let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", bytemuck::bytes_of(offsets), true)
            .override_global("CONFIG", bytemuck::bytes_of(&config), true)
            .load(OBJECT)
            .context("cannot create the maps of the kernel programs")?;
        let logger = EbpfLogger::init(&mut ebpf).context("cannot read the programs' log")?;

        fill(&mut ebpf, "PORTS", &ask.ports.iter().map(|port| (*port, 1u8)).collect::<Vec<_>>())?;
        fill(&mut ebpf, "COMMS", &ask.comms.iter().map(|comm| (*comm, 1u8)).collect::<Vec<_>>())?;

        let mut hooks = Vec::new();
        let pid_tracepoints = if ask.pids.is_empty() { &[] } else { PID_TRACEPOINTS.as_slice() };
        for name in pid_tracepoints.iter().chain(&TRACEPOINTS) {
            tracepoint(&mut ebpf, name, &btf)?;
            hooks.push(format!("tp_btf/{name}"));
        }
        follow(&mut ebpf, &ask.pids)?;
        for (name, direction) in [("ingress", CgroupSkbAttachType::Ingress), ("egress", CgroupSkbAttachType::Egress)] {
            let program: &mut CgroupSkb = program(&mut ebpf, name)?.try_into()?;
            program.load().with_context(|| format!("the kernel refused program cgroup_skb/{name}"))?;
            program
                .attach(cgroup.as_fd(), direction, CgroupAttachMode::Single)
                .with_context(|| format!("cannot attach cgroup_skb/{name} to the cgroup-v2 root"))?;
            hooks.push(format!("cgroup_skb/{name}"));
        }
        tracepoint(&mut ebpf, TRANSITIONS, &btf)?;
        hooks.push(format!("tp_btf/{TRANSITIONS}"));

        walk_open_files(&mut ebpf, &btf)?;
        hooks.push("iter/task_file".to_owned());

        let ring = RingBuf::try_from(take(&mut ebpf, "RING")?)?;
        let counters = PerCpuArray::try_from(take(&mut ebpf, "COUNTERS")?)?;
        Ok((Self { ebpf: Some(ebpf), counters, hooks }, ring, logger))
    }

    /// Detaches the programs. What they have written, and their counters, can still be read.
    pub fn detach(&mut self) {
        self.ebpf = None;
    }

    /// Reads the programs' counters.
    ///
    /// # Errors
    /// The kernel refused the look-up.
    pub fn counters(&self) -> Result<Counters> {
        let sum = |index: u32| -> Result<u64> {
            Ok(self.counters.get(&index, 0).context("cannot read the programs' counters")?.iter().sum())
        };
        Ok(Counters { lost: sum(counter::LOST)?, untracked: sum(counter::UNTRACKED)? })
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut aya::programs::Program> {
    ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    ebpf.take_map(name).with_context(|| format!("the object has no map {name}"))
}

fn fill<K: aya::Pod, V: aya::Pod>(ebpf: &mut Ebpf, name: &str, entries: &[(K, V)]) -> Result<()> {
    let map = ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))?;
    let mut map = HashMap::<_, K, V>::try_from(map)?;
    for (key, value) in entries {
        map.insert(key, value, 0).with_context(|| format!("{} entries are too many for map {name}", entries.len()))?;
    }
    Ok(())
}

/// Enters processes and their descendants. The hook on forks, which is attached already, adds the children of those that
/// are entered; so walks are made until one finds nobody who was not: then no child was born in between.
fn follow(ebpf: &mut Ebpf, pids: &[u32]) -> Result<()> {
    let mut known = HashSet::new();
    for _ in 0..100 {
        let found = descendants::of(pids).map_err(Refusal::no_such_process)?;
        let new: Vec<_> = found.into_iter().filter(|process| known.insert(*process)).collect();
        if new.is_empty() {
            break;
        }
        fill(ebpf, "PIDS", &new)?;
    }
    Ok(())
}

fn tracepoint(ebpf: &mut Ebpf, name: &str, btf: &Btf) -> Result<()> {
    let program: &mut BtfTracePoint = program(ebpf, name)?.try_into()?;
    program.load(name, btf).with_context(|| format!("the kernel refused program tp_btf/{name}"))?;
    program.attach().with_context(|| format!("cannot attach tp_btf/{name}"))?;
    Ok(())
}

/// Runs the walk over every open file once; it writes what it finds into the sockets' storage.
fn walk_open_files(ebpf: &mut Ebpf, btf: &Btf) -> Result<()> {
    let program: &mut Iter = program(ebpf, "open_files")?.try_into()?;
    program.load("task_file", btf).context("the kernel refused program iter/task_file")?;
    let link = program.attach().context("cannot attach iter/task_file")?;
    let mut walk = program.take_link(link)?.into_file()?;
    let mut nothing = Vec::new();
    walk.read_to_end(&mut nothing).context("the walk over open files failed")?;
    if !nothing.is_empty() {
        bail!("the walk over open files printed {} bytes", nothing.len());
    }
    Ok(())
}
