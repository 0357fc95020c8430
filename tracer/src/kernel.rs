//! The kernel side's loader: programs and maps in, attached hooks out.
//!
//! Of user space only this and `ring` know aya. Everything is held by file descriptors of this process, nothing is
//! pinned: when the process ends, however it ends, the kernel detaches and frees all of it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Iter};
use aya::{Btf, Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use ipnet::IpNet;
use log::{Log, debug};
use rustix::time::{ClockId, clock_gettime};
use tracer_ebpf::{Config, PORT_WORDS, book, counter, filter};

use crate::decode::Blind;
use crate::descendants;
use crate::filter::{Filter, prefixes};
use crate::ledger::Row;
use crate::offsets::Layout;
use crate::preflight::{self, Refusal};
use crate::{snapshot, time_wait, trial};

/// The programs. Committed, so that building tracer needs no BPF toolchain; `TRACER_BPF_OBJECT` at build time names
/// another object, for testing programs that were just built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("TRACER_BPF_OBJECT"));

/// What the programs are asked to report.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// Processes: they and their descendants only. Empty: all.
    pub pids: Vec<u32>,
    /// How many processes, with descendants, are followed at once. Each takes some 80 bytes of kernel memory from the beginning.
    pub most_processes: u32,
    /// Local or remote ports. Empty: all.
    pub ports: Vec<u16>,
    /// Process names, NUL-padded. Empty: all.
    pub comms: Vec<[u8; 16]>,
    /// Networks of the remote address. Empty: all.
    pub peers: Vec<IpNet>,
    /// Networks of the local address. Empty: all.
    pub locals: Vec<IpNet>,
    /// Inode numbers of network namespaces. Empty: all.
    pub netns: Vec<u32>,
    /// How long a connection must have been open for its end to be reported, microseconds; not with `states`.
    pub min_duration_us: Option<u64>,
    /// A record for every transition.
    pub states: bool,
    /// Keep the query string of targets.
    pub full_target: bool,
    /// How long a socket may be in CLOSE_WAIT before it is reported.
    pub close_wait_after: Duration,
    /// Size of the ring buffer, bytes: a power of two, and at least a page.
    pub ring_bytes: u32,
    /// Slots for the states of sockets, of [`tracer_ebpf::SLOT_BYTES`] each: a power of two, or 0, which is one.
    pub slots: u32,
}

impl Ask {
    /// Enough for every host that was seen; 10 MB.
    const MOST_PROCESSES: u32 = 1 << 17;

    /// As many [`Ask::slots`] as are enough for 130,000 sockets a second, if they are short-lived, and more on a large host: 17 to 67 MB.
    pub fn usual_slots() -> u32 {
        let processors = aya::util::online_cpus().map_or(1, |processors| processors.len());
        u32::try_from(processors.saturating_mul(1 << 13).next_power_of_two())
            .map_or(1 << 17, |slots| slots.clamp(1 << 15, 1 << 17))
    }

    /// What a filter asks of the programs, but for names.
    pub fn of(filter: &Filter) -> Self {
        Self {
            pids: filter.pids.clone(),
            most_processes: Self::MOST_PROCESSES,
            ports: filter.ports.clone(),
            peers: filter.peers.clone(),
            locals: filter.locals.clone(),
            netns: filter.netns.clone(),
            min_duration_us: filter.min_us,
            ..Self::default()
        }
    }
}

/// What [`Kernel::attach`] gives.
pub struct Attached {
    /// The programs.
    pub kernel: Kernel,
    /// Their records.
    pub ring: RingBuf<MapData>,
    /// Until when they wake nobody, see [`crate::ring`].
    pub looks_until: Array<MapData, u64>,
    /// Their warnings.
    pub log: EbpfLogger<&'static dyn Log>,
    /// The walks that are to be made from time to time.
    pub walks: Vec<Walk>,
}

/// Counters of the programs, summed over all CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records that found the ring buffer full.
    pub lost: u64,
    /// Sockets that could not be followed for want of memory.
    pub untracked: u64,
    /// Processes that could not be followed, as there were too many at once: [`Ask::most_processes`].
    pub left_out: u64,
    /// Sockets that found their slot taken, and got storage.
    pub crowded: u64,
}

/// The attached programs; dropped, they are gone.
pub struct Kernel {
    ebpf: Option<Ebpf>,
    counters: PerCpuArray<MapData, u64>,
    ledger: PerCpuArray<MapData, Row>,
    /// Attached hooks by name.
    pub hooks: Vec<String>,
    /// What could not be attached, and what that costs.
    pub degraded: Vec<String>,
    /// The same, for the verdict.
    pub blind: Blind,
}

/// A place in the kernel where programs are attached.
#[derive(Clone, Debug)]
pub struct Hook {
    /// As it is shown.
    pub name: &'static str,
    /// Where.
    pub place: Place,
    /// What it means that it cannot be had.
    pub without: Without,
}

/// Where a [`Hook`] is.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A tracepoint, and the programs that are attached to it, in their order.
    Tracepoint(&'static str, &'static [&'static str]),
    /// Packets at the cgroup-v2 root, and the program.
    Packets(Direction),
    /// The walks over every open file: one is made at once, another is prepared.
    OpenFiles,
    /// The walk over every socket that has storage: it is prepared.
    Sockets,
}

/// Which packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that arrive.
    Ingress,
    /// Those that leave.
    Egress,
}

/// What it means that a [`Hook`] cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Without {
    /// Tracing is refused.
    Refused,
    /// Likewise, but it is asked for with `--pid` only.
    RefusedWithPid,
    /// Tracing goes on, and this is what is not known.
    Degraded(&'static str),
}

/// Only with `--pid`: its descendants.
const PID_HOOKS: [Hook; 2] = [
    tracepoint("tp_btf/sched_process_fork", "sched_process_fork", &["sched_process_fork"], Without::RefusedWithPid),
    tracepoint("tp_btf/sched_process_free", "sched_process_free", &["sched_process_free"], Without::RefusedWithPid),
];

/// In the order in which they are attached. A socket's first transition must find the hooks that complete it, so that hook
/// is the last one; behind its program is another for what that one is kept from seeing. The walks come when all is there.
const HOOKS: [Hook; 9] = [
    tracepoint(
        RECEIVE_RESET,
        "tcp_receive_reset",
        &["tcp_receive_reset"],
        Without::Degraded(
            "a RST is told by the socket's error alone: of a connection that its process had closed before, or that was \
             refused, who ended it is unobserved, and its cause unknown",
        ),
    ),
    tracepoint(
        SEND_RESET,
        "tcp_send_reset",
        &["tcp_send_reset"],
        Without::Degraded(
            "a RST that follows the end of a socket, or precedes its abort, is not seen: where there may be one, how it \
             ended is unobserved, and its cause unknown",
        ),
    ),
    tracepoint(
        "tp_btf/tcp_rcv_space_adjust",
        "tcp_rcv_space_adjust",
        &["tcp_rcv_space_adjust"],
        Without::Degraded(
            "who reads from a socket is not seen: the process is who connected, who closed, or who held it at the start; \
             else it is unknown, and --pid and --comm leave it out",
        ),
    ),
    tracepoint(
        PROCESS_EXIT,
        "sched_process_exit",
        &["sched_process_exit"],
        Without::Degraded(
            "a close that the kernel makes for a process that has ended (io_uring) is not told from others: where it may be \
             one, the cause is unknown",
        ),
    ),
    Hook { name: "cgroup_skb/ingress", place: Place::Packets(Direction::Ingress), without: Without::Refused },
    Hook { name: "cgroup_skb/egress", place: Place::Packets(Direction::Egress), without: Without::Refused },
    tracepoint(
        "tp_btf/inet_sock_set_state",
        TRANSITIONS,
        &["inet_sock_set_state", "inet_sock_set_state_nested"],
        Without::Refused,
    ),
    Hook {
        name: "iter/task_file",
        place: Place::OpenFiles,
        without: Without::Degraded(
            "connections that were open before have no process until one reads from them, connects or closes, sockets that stay \
             in CLOSE_WAIT are reported only if they have lasted for a while, and idle ones do not make room for others, which \
             cost more then",
        ),
    },
    Hook {
        name: "iter/bpf_sk_storage_map",
        place: Place::Sockets,
        without: Without::Degraded(
            "sockets that stay in CLOSE_WAIT are looked for among the open files of the processes of tracer's pid namespace: \
             those are not reported that no process has accepted, or that are io_uring's own",
        ),
    },
];

/// For so many sockets it is known that their state is in storage, where a walk over open files cannot tell. Each takes some 80 bytes.
const STORED: u32 = 1 << 16;

/// What it costs that helpers do not take the socket of an open file: [`Config::files_trusted`].
const UNTRUSTED_FILES: &str = "this kernel lets the walk over open files (iter/task_file) read sockets, and no more: of connections that were \
     open before, some may have no process, and those not be reported that stay in CLOSE_WAIT, and idle ones do not make room for \
     others, which cost more then; run a kernel that trusts what it has found itself, as upstream ones do";

/// A connection that lasts so long is no short one, so storage for it is no matter: [`Config::storage_walk_ns`].
const LASTING_NS: u64 = 100_000_000;

const TRANSITIONS: &str = "inet_sock_set_state";
const RECEIVE_RESET: &str = "tp_btf/tcp_receive_reset";
const SEND_RESET: &str = "tp_btf/tcp_send_reset";
const PROCESS_EXIT: &str = "tp_btf/sched_process_exit";

const fn tracepoint(
    name: &'static str,
    tracepoint: &'static str,
    programs: &'static [&'static str],
    without: Without,
) -> Hook {
    Hook { name, place: Place::Tracepoint(tracepoint, programs), without }
}

/// The hooks that tracing takes, in order; `with_pids`: those for `--pid`, too.
pub fn hooks(with_pids: bool) -> Vec<Hook> {
    let pid_hooks = if with_pids { PID_HOOKS.as_slice() } else { &[] };
    pid_hooks.iter().chain(&HOOKS).cloned().collect()
}

/// A bit for each port.
fn port_bits(ports: &[u16]) -> [u64; PORT_WORDS] {
    let mut bits = [0; PORT_WORDS];
    for port in ports {
        bits[usize::from(port / 64)] |= 1 << (port % 64);
    }
    bits
}

/// The programs and their maps, created but not yet loaded, and where they go.
struct Object<'a> {
    ebpf: Ebpf,
    btf: Btf,
    cgroup: &'a OwnedFd,
    layout: &'a Layout,
    walks: Vec<Walk>,
    /// [`Config::files_trusted`]
    files_trusted: bool,
}

impl<'a> Object<'a> {
    fn new(ask: &Ask, cgroup: &'a OwnedFd, layout: &'a Layout) -> Result<Self> {
        let slots = ask.slots.max(1);
        let walks_storage =
            layout.bears_storage_walk && layout.sk_storage_map.is_some_and(|walk| trial::walk(walk).is_ok());
        let files_trusted =
            layout.task_file.is_none_or(|walk| trial::trusts_open_files(walk, layout.offsets.socket_sk));
        let config = Config {
            filters: [
                (!ask.pids.is_empty(), filter::PID),
                (!ask.ports.is_empty(), filter::PORT),
                (!ask.comms.is_empty(), filter::COMM),
                (!ask.peers.is_empty(), filter::PEER),
                (!ask.locals.is_empty(), filter::LOCAL),
                (!ask.netns.is_empty(), filter::NETNS),
            ]
            .into_iter()
            .filter_map(|(on, bit)| on.then_some(bit))
            .sum(),
            states: ask.states.into(),
            full_target: ask.full_target.into(),
            close_wait_ns: u64::try_from(ask.close_wait_after.as_nanos()).unwrap_or(u64::MAX),
            min_duration_ns: ask.min_duration_us.filter(|_| !ask.states).unwrap_or(0).saturating_mul(1000),
            storage_walk_ns: if !walks_storage {
                u64::MAX
            } else if preflight::in_initial_pid_namespace() {
                LASTING_NS
            } else {
                // Most files are not seen.
                0
            },
            // Without `/proc` it is not known, and nothing is counted for it.
            netns: time_wait::own_namespace().unwrap_or(0),
            slot_mask: slots - 1,
            slot_at: layout.slot_at,
            files_trusted: files_trusted.into(),
            _pad: 0,
        };
        // The loader wants it aligned.
        let mut object = vec![0u64; OBJECT.len().div_ceil(8)];
        let object = &mut bytemuck::cast_slice_mut(&mut object)[..OBJECT.len()];
        object.copy_from_slice(OBJECT);
        match layout.cast.map(|cast| (cast, trial::cast(cast))) {
            Some((cast, Ok(()))) => cast.put_into(object),
            Some((_, Err(error))) => debug!("the programs are slower: this kernel refuses bpf_rdonly_cast ({error})"),
            None => debug!("the programs are slower: this kernel has no bpf_rdonly_cast"),
        }
        let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("PORTS", bytemuck::bytes_of(&port_bits(&ask.ports)), true)
            .override_global("OFFSETS", bytemuck::bytes_of(&layout.offsets), true)
            .override_global("CONFIG", bytemuck::bytes_of(&config), true)
            .map_max_entries("RING", ask.ring_bytes)
            .map_max_entries("SLOTS", slots)
            .map_max_entries("STORED", if files_trusted { 1 } else { STORED })
            .map_max_entries("PIDS", if ask.pids.is_empty() { 1 } else { ask.most_processes })
            .load(object)
            .context("cannot create the maps of the kernel programs")?;
        fill(&mut ebpf, "NETNS", &ask.netns.iter().map(|netns| (*netns, 1u8)).collect::<Vec<_>>())?;
        fill_prefixes(&mut ebpf, "PEERS", &ask.peers)?;
        fill_prefixes(&mut ebpf, "LOCALS", &ask.locals)?;
        fill(&mut ebpf, "COMMS", &ask.comms.iter().map(|comm| (*comm, 1u8)).collect::<Vec<_>>())?;
        Ok(Self { ebpf, btf, cgroup, layout, walks: Vec::new(), files_trusted })
    }

    /// Loads the programs of one hook and attaches them. Answers what they cannot do on this kernel, if anything.
    fn attach(&mut self, hook: &Hook) -> Result<Option<&'static str>> {
        let name = hook.name;
        match hook.place {
            Place::Tracepoint(tracepoint, programs) => {
                for program in programs {
                    let program: &mut BtfTracePoint = self::program(&mut self.ebpf, program)?.try_into()?;
                    program
                        .load(tracepoint, &self.btf)
                        .with_context(|| format!("the kernel refused program {name}"))?;
                    program.attach().with_context(|| format!("cannot attach {name}"))?;
                }
            }
            Place::Packets(direction) => {
                let direction = match direction {
                    Direction::Ingress => CgroupSkbAttachType::Ingress,
                    Direction::Egress => CgroupSkbAttachType::Egress,
                };
                let program: &mut CgroupSkb = self::program(&mut self.ebpf, "packets")?.try_into()?;
                // One program for both.
                if program.fd().is_err() {
                    program.load().with_context(|| format!("the kernel refused program {name}"))?;
                }
                program
                    .attach(self.cgroup.as_fd(), direction, CgroupAttachMode::Single)
                    .with_context(|| format!("cannot attach {name} to the cgroup-v2 root"))?;
            }
            Place::OpenFiles => {
                walk_open_files(&mut self.ebpf, &self.btf)?;
                self.walks.push(Walk::over_files(&mut self.ebpf, &self.btf, self.files_trusted)?);
            }
            Place::Sockets => self.walks.push(Walk::over_storage(&mut self.ebpf, &self.btf, self.layout)?),
        }
        Ok((matches!(hook.place, Place::OpenFiles) && !self.files_trusted).then_some(UNTRUSTED_FILES))
    }
}

/// Attaches each of `hooks`, as tracing does, except that one which is refused does not end it; then detaches all. Answers what those that
/// are not refused cannot do on this kernel, if anything.
///
/// # Errors
/// Not even the maps can be created.
pub fn try_each(
    hooks: &[Hook],
    ask: &Ask,
    cgroup: &OwnedFd,
    layout: &Layout,
) -> Result<Vec<Result<Option<&'static str>>>> {
    let mut object = Object::new(ask, cgroup, layout)?;
    Ok(hooks.iter().map(|hook| object.attach(hook)).collect())
}

impl Kernel {
    /// Loads the programs, attaches them (`cgroup` is the root of the cgroup-v2 hierarchy), and finds the owners of the
    /// sockets that are open already.
    ///
    /// # Errors
    /// What the kernel refused, with the program or map that it refused. A hook that can be done without is no error, but
    /// in [`Kernel::degraded`].
    pub fn attach(ask: &Ask, cgroup: &OwnedFd, layout: &Layout) -> Result<Attached> {
        Self::attach_to(&hooks(!ask.pids.is_empty()), ask, cgroup, layout)
    }

    /// The same with other hooks than [`hooks`].
    ///
    /// # Errors
    /// As for [`Kernel::attach`].
    pub fn attach_to(hooks: &[Hook], ask: &Ask, cgroup: &OwnedFd, layout: &Layout) -> Result<Attached> {
        match Self::attach_once(hooks, ask, cgroup, layout) {
            Err(error) if layout.cast.is_some() && !error.is::<Refusal>() => {
                // A program on trial may be accepted, and another one not.
                debug!("once more without bpf_rdonly_cast: {error:#}");
                Self::attach_once(hooks, ask, cgroup, &Layout { cast: None, ..*layout })
            }
            attached => attached,
        }
    }

    fn attach_once(hooks: &[Hook], ask: &Ask, cgroup: &OwnedFd, layout: &Layout) -> Result<Attached> {
        let mut object = Object::new(ask, cgroup, layout)?;
        let log = EbpfLogger::init(&mut object.ebpf).context("cannot read the programs' log")?;

        if !object.files_trusted {
            // Before a program sees a packet: what was open before is to be found in its slot, and not to be in storage by then.
            snapshot::give_cookies();
        }
        let mut attached = Vec::new();
        let mut degraded = Vec::new();
        let mut blind = Blind::default();
        let mut followed = false;
        for hook in hooks {
            // Behind the hook on forks, and before the first that sees a socket.
            if matches!(hook.place, Place::Packets(..)) && !followed {
                follow(&mut object.ebpf, ask)?;
                followed = true;
            }
            match (object.attach(hook), hook.without) {
                (Ok(cost), _) => {
                    attached.push(hook.name.to_owned());
                    degraded.extend(cost.map(str::to_owned));
                }
                // It may be for a cast that it is refused.
                (Err(error), _) if matches!(hook.place, Place::OpenFiles) && layout.cast.is_some() => {
                    return Err(error);
                }
                (Err(error), Without::Degraded(cost)) => {
                    degraded.push(preflight::without_hook(hook.name, cost, &error));
                    blind.receive_reset |= hook.name == RECEIVE_RESET;
                    blind.send_reset |= hook.name == SEND_RESET;
                    blind.exits |= hook.name == PROCESS_EXIT;
                }
                (Err(error), _) => return Err(error),
            }
        }
        let Object { mut ebpf, walks, .. } = object;

        for (name, program) in ebpf.programs() {
            // Only those that were loaded have any; since Linux 5.16.
            if let Some(count) = program.info().ok().and_then(|info| info.verified_instruction_count()) {
                debug!("program {name}: {count} verified instructions");
            }
        }

        let ring = RingBuf::try_from(take(&mut ebpf, "RING")?)?;
        let looks_until = Array::try_from(take(&mut ebpf, "LOOKS_UNTIL")?)?;
        let counters = PerCpuArray::try_from(take(&mut ebpf, "COUNTERS")?)?;
        let ledger = PerCpuArray::try_from(take(&mut ebpf, "LEDGER")?)?;
        // Holds payload as it came. It is the programs' alone: who reads records must not be able to look there.
        drop(take(&mut ebpf, "WINDOWS")?);
        // Likewise with what will be records.
        drop(take(&mut ebpf, "SLOTS")?);
        let kernel = Self { ebpf: Some(ebpf), counters, ledger, hooks: attached, degraded, blind };
        Ok(Attached { kernel, ring, looks_until, log, walks })
    }

    /// Detaches the programs. What they have written, and their counters, can still be read.
    ///
    /// First those that write records: what a record says must not depend on hooks that are gone already.
    pub fn detach(&mut self) {
        if let Some(ebpf) = &mut self.ebpf {
            let transitions = HOOKS.iter().filter_map(|hook| match hook.place {
                Place::Tracepoint(TRANSITIONS, programs) => Some(programs),
                _ => None,
            });
            for name in transitions.flatten() {
                let unloaded =
                    program(ebpf, name).and_then(|program| Ok(<&mut BtfTracePoint>::try_from(program)?.unload()?));
                if let Err(error) = unloaded {
                    debug!("program {name} goes with the others: {error:#}");
                }
            }
        }
        self.ebpf = None;
    }

    /// Reads the books of the programs: a row for each CPU, summed over its programs.
    ///
    /// # Errors
    /// The kernel refused the look-up.
    pub fn ledger(&self) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = Vec::new();
        for row in 0..book::ROWS {
            let of_cpus = self.ledger.get(&row, 0).context("cannot read the programs' ledger")?;
            rows.resize(of_cpus.len(), [0; book::COLUMNS]);
            for (sum, columns) in rows.iter_mut().zip(of_cpus.iter()) {
                sum.iter_mut().zip(columns).for_each(|(sum, column)| *sum = sum.wrapping_add(*column));
            }
        }
        Ok(rows)
    }

    /// Reads the programs' counters.
    ///
    /// # Errors
    /// The kernel refused the look-up.
    pub fn counters(&self) -> Result<Counters> {
        let sum = |index: u32| -> Result<u64> {
            Ok(self.counters.get(&index, 0).context("cannot read the programs' counters")?.iter().sum())
        };
        Ok(Counters {
            lost: sum(counter::LOST)?,
            untracked: sum(counter::UNTRACKED)?,
            left_out: sum(counter::LEFT_OUT)?,
            crowded: sum(counter::CROWDED)?,
        })
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

fn fill_prefixes(ebpf: &mut Ebpf, name: &str, networks: &[IpNet]) -> Result<()> {
    let map = ebpf.map_mut(name).with_context(|| format!("the object has no map {name}"))?;
    let mut map = LpmTrie::<_, [u8; 16], u8>::try_from(map)?;
    for (bits, address, is_wanted) in prefixes(networks) {
        map.insert(&Key::new(bits, address), u8::from(is_wanted), 0)
            .with_context(|| format!("{} networks are too many for map {name}", networks.len()))?;
    }
    Ok(())
}

/// Enters processes and their descendants. The hook on forks, which is attached already, adds the children of those that
/// are entered; so walks are made until one finds nobody who was not: then no child was born in between.
fn follow(ebpf: &mut Ebpf, ask: &Ask) -> Result<()> {
    let mut known = HashSet::new();
    for _ in 0..100 {
        let found = descendants::of(&ask.pids).map_err(Refusal::no_such_process)?;
        let new: Vec<_> = found.into_iter().filter(|process| known.insert(*process)).collect();
        if new.is_empty() {
            break;
        }
        if known.len() > ask.most_processes as usize {
            return Err(Refusal::too_many_processes(known.len(), ask.most_processes).into());
        }
        fill(ebpf, "PIDS", &new)?;
    }
    Ok(())
}

/// A walk over open files or sockets, to be made again and again; all of them by one thread.
pub struct Walk {
    link: OwnedFd,
    /// What it goes over.
    pub over: Over,
    /// Whether idle sockets leave their slots.
    pub makes_room: bool,
}

/// What a [`Walk`] goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Every open file of every process.
    Files,
    /// Every socket that has storage.
    Storage,
}

impl Walk {
    /// Over every socket that has storage.
    fn over_storage(ebpf: &mut Ebpf, btf: &Btf, layout: &Layout) -> Result<Self> {
        if !layout.bears_storage_walk {
            let release = preflight::kernel_release();
            bail!("a walk over the storage of sockets can crash kernel {release}");
        }
        let map = match ebpf.map("SOCKETS") {
            Some(Map::SkStorage(map)) => map.fd().as_fd().try_clone_to_owned()?,
            _ => bail!("the object has no map SOCKETS of sockets"),
        };
        let program: &mut Iter = program(ebpf, "close_wait")?.try_into()?;
        program.load("bpf_sk_storage_map", btf).context("the kernel refused program iter/bpf_sk_storage_map")?;
        let link = bpf::link_iterator(program.fd()?.as_fd(), Some(map.as_fd()))
            .context("cannot attach iter/bpf_sk_storage_map")?;
        Ok(Self { link, over: Over::Storage, makes_room: false })
    }

    /// Over every open file of every process.
    fn over_files(ebpf: &mut Ebpf, btf: &Btf, makes_room: bool) -> Result<Self> {
        let program: &mut Iter = program(ebpf, "look_at_files")?.try_into()?;
        program.load("task_file", btf).context("the kernel refused a second program iter/task_file")?;
        let link = bpf::link_iterator(program.fd()?.as_fd(), None).context("cannot attach a second iter/task_file")?;
        Ok(Self { link, over: Over::Files, makes_room })
    }

    /// Has every open file of the host looked at, or every socket that has storage: those are reported that have been in CLOSE_WAIT
    /// for too long, and the state of those that are open files and idle makes room for that of others. Answers how much time of a
    /// processor that took: some 0.5 µs for each.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn run(&self) -> Result<Duration> {
        let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
        let began = now();
        run_walk(bpf::iterator(self.link.as_fd())?.into())?;
        Ok(now().saturating_sub(began))
    }
}

/// The `bpf` system call where aya does not make it: an iterator over one map, and one that is run more than once.
pub(crate) mod bpf {
    use std::io;
    use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

    /// `include/uapi/linux/bpf.h`: commands, and an attach type.
    const BPF_LINK_CREATE: libc::c_int = 28;
    const BPF_ITER_CREATE: libc::c_int = 33;
    pub(crate) const BPF_TRACE_ITER: u32 = 28;

    /// `link_create` of `union bpf_attr`, for an iterator.
    #[repr(C)]
    struct LinkCreate {
        prog_fd: i32,
        target_fd: i32,
        attach_type: u32,
        flags: u32,
        /// Address of a `union bpf_iter_link_info`.
        iter_info: u64,
        iter_info_len: u32,
        /// The kernel wants what lies behind to be zero.
        _pad: u32,
    }

    /// `iter_create` of `union bpf_attr`.
    #[repr(C)]
    struct IterCreate {
        link_fd: i32,
        flags: u32,
    }

    /// `over`: the map whose elements it goes through, if it is an iterator over a map.
    pub(super) fn link_iterator(program: BorrowedFd<'_>, over: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
        // `union bpf_iter_link_info`, of which a walk over a map reads `map.map_fd` only.
        let info = over.map(|map| map.as_raw_fd());
        call(
            BPF_LINK_CREATE,
            &LinkCreate {
                prog_fd: program.as_raw_fd(),
                target_fd: 0,
                attach_type: BPF_TRACE_ITER,
                flags: 0,
                iter_info: info.as_ref().map_or(0, |info| std::ptr::from_ref(info) as u64),
                iter_info_len: info.map_or(0, |info| size_of_val(&info) as u32),
                _pad: 0,
            },
        )
    }

    pub(super) fn iterator(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        call(BPF_ITER_CREATE, &IterCreate { link_fd: link.as_raw_fd(), flags: 0 })
    }

    /// A command that answers a new descriptor.
    pub(crate) fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
        // SAFETY: the kernel reads `attributes`, of the size that it is told, and what it points to, which outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
        match i32::try_from(fd) {
            // SAFETY: each of the commands answers a descriptor that nobody else has.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Runs the walk over every open file once; it writes what it finds into the states of the sockets.
fn walk_open_files(ebpf: &mut Ebpf, btf: &Btf) -> Result<()> {
    let program: &mut Iter = program(ebpf, "open_files")?.try_into()?;
    program.load("task_file", btf).context("the kernel refused program iter/task_file")?;
    let link = program.attach().context("cannot attach iter/task_file")?;
    run_walk(program.take_link(link)?.into_file()?).context("the walk over open files failed")
}

/// Lets an iterator go through all it has. Its program prints nothing.
fn run_walk(mut walk: File) -> Result<()> {
    let mut buffer = [0; 64];
    loop {
        match walk.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(printed) => bail!("it printed {printed} bytes"),
            // After a million objects the kernel takes breath: `bpf_seq_read`, `MAX_ITER_OBJECTS`.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tracer_ebpf::cast_to;

    use super::*;
    use crate::cast::Cast;

    #[test]
    fn each_cast_of_the_programs_can_be_replaced() {
        let marks = |mark: i32| {
            let argument = [&[0xb7, 2, 0, 0], &mark.to_le_bytes()[..]].concat();
            OBJECT.windows(argument.len()).filter(|bytes| **bytes == argument).count()
        };
        let (sock, tcp_sock) = (marks(cast_to::SOCK), marks(cast_to::TCP_SOCK));
        assert!(sock > 0 && tcp_sock > 0);
        // Such a function differs from the helper by one byte.
        let cast = Cast { function: cast_to::HELPER, sock: cast_to::SOCK as u32, tcp_sock: cast_to::TCP_SOCK as u32 };
        let mut object = OBJECT.to_vec();
        cast.put_into(&mut object);
        let replaced = object.iter().zip(OBJECT).filter(|(new, old)| new != old).count();
        assert_eq!(replaced, sock + tcp_sock);
    }

    #[test]
    fn each_port_has_its_bit() {
        let set = |ports: &[u16]| -> Vec<u16> {
            let bits = port_bits(ports);
            (0..=u16::MAX).filter(|port| bits[usize::from(port >> 6)] & 1 << (port & 63) != 0).collect()
        };
        for ports in [&[][..], &[80], &[0, 63, 64, 127, 128, 8080, u16::MAX - 1, u16::MAX]] {
            assert_eq!(set(ports), ports);
        }
        assert_eq!(set(&[443, 443, 80]), [80, 443]);
    }
}
