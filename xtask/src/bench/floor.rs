//! The floor: empty programs on the hooks of tracer, which do nothing but return. What they cost, no tracer can avoid.
//!
//! Loaded straight through `bpf(2)`, so that neither a toolchain nor a loader is in between. Also here: the counting of
//! program runs, and what only the kernel's types tell.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow, bail};
use btf_rs::{Btf, Type};

/// `include/uapi/linux/bpf.h`
mod uapi {
    pub(super) const BPF_PROG_LOAD: libc::c_int = 5;
    pub(super) const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
    pub(super) const BPF_LINK_CREATE: libc::c_int = 28;
    pub(super) const BPF_ENABLE_STATS: libc::c_int = 32;

    pub(super) const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
    pub(super) const BPF_PROG_TYPE_TRACING: u32 = 26;
    pub(super) const BPF_CGROUP_INET_INGRESS: u32 = 0;
    pub(super) const BPF_CGROUP_INET_EGRESS: u32 = 1;
    pub(super) const BPF_TRACE_RAW_TP: u32 = 23;
    pub(super) const BPF_STATS_RUN_TIME: u32 = 0;

    /// `r0 = imm`
    pub(super) const fn mov_r0(imm: u32) -> u64 {
        0xb7 | (imm as u64) << 32
    }
    pub(super) const EXIT: u64 = 0x95;

    /// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct ProgLoad {
        pub(super) prog_type: u32,
        pub(super) insn_cnt: u32,
        pub(super) insns: u64,
        pub(super) license: u64,
        pub(super) log_level: u32,
        pub(super) log_size: u32,
        pub(super) log_buf: u64,
        pub(super) kern_version: u32,
        pub(super) prog_flags: u32,
        pub(super) prog_name: [u8; 16],
        pub(super) prog_ifindex: u32,
        pub(super) expected_attach_type: u32,
        pub(super) prog_btf_fd: u32,
        pub(super) func_info_rec_size: u32,
        pub(super) func_info: u64,
        pub(super) func_info_cnt: u32,
        pub(super) line_info_rec_size: u32,
        pub(super) line_info: u64,
        pub(super) line_info_cnt: u32,
        pub(super) attach_btf_id: u32,
        pub(super) attach_prog_fd: u32,
        pub(super) _pad: u32,
    }

    #[repr(C)]
    pub(super) struct RawTracepointOpen {
        pub(super) name: u64,
        pub(super) prog_fd: i32,
        pub(super) _pad: u32,
    }

    #[repr(C)]
    pub(super) struct LinkCreate {
        pub(super) prog_fd: i32,
        pub(super) target_fd: i32,
        pub(super) attach_type: u32,
        pub(super) flags: u32,
    }
}

/// A command that answers a new descriptor.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `attributes`, of the size that it is told, and what it points to, which the callers keep.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    match i32::try_from(fd) {
        // SAFETY: each command that is used here answers a descriptor that nobody else has.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The kernel counts and times the runs of all programs while this lives; some 60 ns more for each.
pub(crate) struct Counting {
    _fd: OwnedFd,
}

impl Counting {
    pub(crate) fn start() -> Result<Self> {
        let fd = bpf(uapi::BPF_ENABLE_STATS, &uapi::BPF_STATS_RUN_TIME).context("cannot have program runs counted")?;
        Ok(Self { _fd: fd })
    }
}

/// Bytes of a program's name that the kernel keeps.
pub(crate) const PROGRAM_NAME: usize = 15;

/// The attached programs, and their links: detached when they go out of scope.
pub(crate) struct Floor {
    _held: Vec<OwnedFd>,
}

impl Floor {
    /// On hooks as tracer's `start` names them. Iterators run when they are asked to, and are left out.
    pub(crate) fn attach(hooks: &[String], types: &Types) -> Result<Self> {
        let mut held = Vec::new();
        for hook in hooks {
            let (kind, name) = hook.split_once('/').unwrap_or((hook, ""));
            let attached = match (kind, name) {
                ("tp_btf", name) => tracepoint(name, types),
                ("cgroup_skb", name @ "ingress") => cgroup(name, uapi::BPF_CGROUP_INET_INGRESS),
                ("cgroup_skb", name @ "egress") => cgroup(name, uapi::BPF_CGROUP_INET_EGRESS),
                ("iter", _) => continue,
                _ => bail!("tracer has a hook {hook} that the floor does not know"),
            };
            held.extend(attached.with_context(|| format!("an empty program on {hook}"))?);
            // Tracer has two programs here: the second is for what the kernel keeps from the first.
            if hook == "tp_btf/inet_sock_set_state" {
                held.extend(tracepoint(name, types).context("a second empty program on the transitions")?);
            }
        }
        Ok(Self { _held: held })
    }
}

fn load(name: &str, result: u32, mut attributes: uapi::ProgLoad) -> io::Result<OwnedFd> {
    let program = [uapi::mov_r0(result), uapi::EXIT];
    attributes.insn_cnt = 2;
    attributes.insns = program.as_ptr() as u64;
    attributes.license = c"GPL".as_ptr() as u64;
    // The kernel wants a NUL behind it.
    for (to, from) in attributes.prog_name.iter_mut().take(PROGRAM_NAME).zip(name.bytes()) {
        *to = from;
    }
    bpf(uapi::BPF_PROG_LOAD, &attributes)
}

fn tracepoint(name: &str, types: &Types) -> Result<[OwnedFd; 2]> {
    let program = load(
        name,
        0,
        uapi::ProgLoad {
            prog_type: uapi::BPF_PROG_TYPE_TRACING,
            expected_attach_type: uapi::BPF_TRACE_RAW_TP,
            attach_btf_id: types.tracepoint(name)?,
            ..uapi::ProgLoad::default()
        },
    )?;
    let open = uapi::RawTracepointOpen { name: 0, prog_fd: program.as_raw_fd(), _pad: 0 };
    let link = bpf(uapi::BPF_RAW_TRACEPOINT_OPEN, &open)?;
    Ok([program, link])
}

fn cgroup(name: &str, direction: u32) -> Result<[OwnedFd; 2]> {
    let root = File::open(cgroup_root()?)?;
    let program = load(
        name,
        1,
        uapi::ProgLoad {
            prog_type: uapi::BPF_PROG_TYPE_CGROUP_SKB,
            expected_attach_type: direction,
            ..uapi::ProgLoad::default()
        },
    )?;
    let link = uapi::LinkCreate {
        prog_fd: program.as_raw_fd(),
        target_fd: root.as_raw_fd(),
        attach_type: direction,
        flags: 0,
    };
    let link = bpf(uapi::BPF_LINK_CREATE, &link)?;
    Ok([program, link])
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

/// The running kernel's types.
pub(crate) struct Types(Btf);

impl Types {
    pub(crate) fn read() -> Result<Self> {
        // Parsed from memory: from a file it is done in hundreds of thousands of small reads.
        let bytes = fs::read("/sys/kernel/btf/vmlinux").context("cannot read the kernel's BTF")?;
        Ok(Self(Btf::from_bytes(&bytes)?))
    }

    /// The id that a program attaches to a tracepoint by.
    fn tracepoint(&self, name: &str) -> Result<u32> {
        let name = format!("btf_trace_{name}");
        let ids = self.0.resolve_ids_by_name(&name)?;
        ids.into_iter()
            .find(|id| matches!(self.0.resolve_type_by_id(*id), Ok(Type::Typedef(_))))
            .ok_or_else(|| anyhow!("this kernel has no {name}"))
    }

    /// Bytes of kernel memory that a value of this size takes in a socket's storage: the element, and the socket's list of
    /// elements, each rounded up to what the allocator gives out.
    pub(crate) fn socket_storage(&self, value: u64) -> Result<u64> {
        let element =
            self.offset("bpf_local_storage_elem", "sdata")? + self.offset("bpf_local_storage_data", "data")?;
        Ok(allocated(element + value.next_multiple_of(8)) + allocated(self.structure("bpf_local_storage")?.1))
    }

    fn offset(&self, holder: &str, name: &str) -> Result<u64> {
        let (members, _) = self.structure(holder)?;
        for member in &members {
            if self.0.resolve_name(member)? == name {
                return Ok(u64::from(member.bit_offset() / 8));
            }
        }
        bail!("this kernel's struct {holder} has no member {name}")
    }

    fn structure(&self, name: &str) -> Result<(Vec<btf_rs::Member>, u64)> {
        for found in self.0.resolve_types_by_name(name)? {
            if let Type::Struct(found) = found {
                return Ok((found.members.clone(), found.size() as u64));
            }
        }
        bail!("this kernel has no struct {name}")
    }
}

/// The size class of a `kmalloc`.
fn allocated(bytes: u64) -> u64 {
    match bytes {
        65..=96 => 96,
        129..=192 => 192,
        _ => bytes.next_power_of_two().max(8),
    }
}
