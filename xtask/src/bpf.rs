//! `bpf(2)` by hand, for programs of a few instructions: neither a toolchain nor a loader is in between.
//!
//! Also here: what only the running kernel's types tell.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, anyhow, bail};
use btf_rs::{Btf, Type};

/// `include/uapi/linux/bpf.h`
pub(crate) mod uapi {
    pub(crate) const BPF_MAP_CREATE: libc::c_int = 0;
    pub(crate) const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
    pub(crate) const BPF_PROG_LOAD: libc::c_int = 5;
    pub(crate) const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
    pub(crate) const BPF_LINK_CREATE: libc::c_int = 28;
    pub(crate) const BPF_ENABLE_STATS: libc::c_int = 32;

    pub(crate) const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
    pub(crate) const BPF_PROG_TYPE_TRACING: u32 = 26;
    pub(crate) const BPF_CGROUP_INET_INGRESS: u32 = 0;
    pub(crate) const BPF_CGROUP_INET_EGRESS: u32 = 1;
    pub(crate) const BPF_TRACE_RAW_TP: u32 = 23;
    pub(crate) const BPF_STATS_RUN_TIME: u32 = 0;

    /// One instruction: `dst` and `src` are registers.
    pub(crate) const fn instruction(code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> u64 {
        code as u64 | (src as u64) << 12 | (dst as u64) << 8 | (offset as u16 as u64) << 16 | (imm as u32 as u64) << 32
    }

    /// `dst = imm`
    pub(crate) const fn mov(dst: u8, imm: i32) -> u64 {
        instruction(0xb7, dst, 0, 0, imm)
    }
    pub(crate) const EXIT: u64 = 0x95;

    /// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
    #[repr(C)]
    #[derive(Default)]
    pub(crate) struct ProgLoad {
        pub(crate) prog_type: u32,
        pub(crate) insn_cnt: u32,
        pub(crate) insns: u64,
        pub(crate) license: u64,
        pub(crate) log_level: u32,
        pub(crate) log_size: u32,
        pub(crate) log_buf: u64,
        pub(crate) kern_version: u32,
        pub(crate) prog_flags: u32,
        pub(crate) prog_name: [u8; 16],
        pub(crate) prog_ifindex: u32,
        pub(crate) expected_attach_type: u32,
        pub(crate) prog_btf_fd: u32,
        pub(crate) func_info_rec_size: u32,
        pub(crate) func_info: u64,
        pub(crate) func_info_cnt: u32,
        pub(crate) line_info_rec_size: u32,
        pub(crate) line_info: u64,
        pub(crate) line_info_cnt: u32,
        pub(crate) attach_btf_id: u32,
        pub(crate) attach_prog_fd: u32,
        pub(crate) _pad: u32,
    }

    pub(crate) const BPF_MAP_TYPE_LRU_HASH: u32 = 9;
    /// The helpers `bpf_map_update_elem` and `bpf_get_socket_cookie`.
    pub(crate) const MAP_UPDATE_ELEM: i32 = 2;
    pub(crate) const GET_SOCKET_COOKIE: i32 = 46;
    /// The source register of an `ld_imm64` whose value is a map's descriptor.
    pub(crate) const PSEUDO_MAP_FD: u8 = 1;

    /// The beginning of `union bpf_attr` for `BPF_MAP_CREATE`.
    #[repr(C)]
    pub(crate) struct MapCreate {
        pub(crate) map_type: u32,
        pub(crate) key_size: u32,
        pub(crate) value_size: u32,
        pub(crate) max_entries: u32,
        pub(crate) map_flags: u32,
    }

    /// The same for `BPF_MAP_LOOKUP_ELEM`.
    #[repr(C)]
    pub(crate) struct MapElement {
        pub(crate) map_fd: i32,
        pub(crate) _pad: u32,
        pub(crate) key: u64,
        pub(crate) value: u64,
        pub(crate) flags: u64,
    }

    #[repr(C)]
    pub(crate) struct RawTracepointOpen {
        pub(crate) name: u64,
        pub(crate) prog_fd: i32,
        pub(crate) _pad: u32,
    }

    #[repr(C)]
    pub(crate) struct LinkCreate {
        pub(crate) prog_fd: i32,
        pub(crate) target_fd: i32,
        pub(crate) attach_type: u32,
        pub(crate) flags: u32,
    }
}

/// One command; its answer.
///
/// # Safety
/// `T` is laid out as the kernel expects for `command`. Each address in it is 0, or that of memory that lives until this returns,
/// is as large as the kernel is told or knows, and may be written where the command writes.
unsafe fn call<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads `attributes`, of the size that it is told, and what it points to is as the caller vouches.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    i32::try_from(answer).ok().filter(|answer| *answer >= 0).ok_or_else(io::Error::last_os_error)
}

/// A command that answers a new descriptor.
///
/// # Safety
/// As of [`call`]; and `command` is one that answers a descriptor which nobody else has.
unsafe fn descriptor<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller vouches.
    unsafe { call(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Has the kernel count and time the runs of all programs, until the descriptor is closed.
pub(crate) fn count_runs() -> io::Result<OwnedFd> {
    // SAFETY: one number, without an address; what is answered is new.
    unsafe { descriptor(uapi::BPF_ENABLE_STATS, &uapi::BPF_STATS_RUN_TIME) }
}

/// A map with keys and values of eight bytes, from which the oldest go where more than `entries` are put in.
pub(crate) struct Recent(OwnedFd);

impl Recent {
    pub(crate) fn create(entries: u32) -> io::Result<Self> {
        let create = uapi::MapCreate {
            map_type: uapi::BPF_MAP_TYPE_LRU_HASH,
            key_size: size_of::<u64>() as u32,
            value_size: size_of::<u64>() as u32,
            max_entries: entries,
            map_flags: 0,
        };
        // SAFETY: numbers, without an address; what is answered is new.
        unsafe { descriptor(uapi::BPF_MAP_CREATE, &create) }.map(Self)
    }

    /// How programs name it.
    pub(crate) fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// # Errors
    /// The kernel does not say.
    pub(crate) fn contains(&self, key: u64) -> io::Result<bool> {
        let mut value = 0_u64;
        let lookup = uapi::MapElement {
            map_fd: self.descriptor(),
            _pad: 0,
            key: std::ptr::from_ref(&key) as u64,
            value: std::ptr::from_mut(&mut value) as u64,
            flags: 0,
        };
        // SAFETY: key and value outlive the call, and are of the size that this map was made with.
        match unsafe { call(uapi::BPF_MAP_LOOKUP_ELEM, &lookup) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Attaches a program to a cgroup, while the link lives.
pub(crate) fn link(program: &OwnedFd, cgroup: impl AsFd, attach_type: u32) -> io::Result<OwnedFd> {
    let target_fd = cgroup.as_fd().as_raw_fd();
    let link = uapi::LinkCreate { prog_fd: program.as_raw_fd(), target_fd, attach_type, flags: 0 };
    // SAFETY: numbers, without an address; what is answered is new.
    unsafe { descriptor(uapi::BPF_LINK_CREATE, &link) }
}

/// Bytes of a program's name that the kernel keeps.
pub(crate) const PROGRAM_NAME: usize = 15;

/// What a program is for.
pub(crate) struct Kind {
    pub(crate) prog_type: u32,
    pub(crate) expected_attach_type: u32,
    /// Of what it attaches to, in the kernel's BTF; 0: none.
    pub(crate) attach_btf_id: u32,
}

/// Loads a program.
pub(crate) fn load(name: &str, program: &[u64], kind: &Kind) -> io::Result<OwnedFd> {
    let mut attributes = uapi::ProgLoad {
        prog_type: kind.prog_type,
        expected_attach_type: kind.expected_attach_type,
        attach_btf_id: kind.attach_btf_id,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..uapi::ProgLoad::default()
    };
    // The kernel wants a NUL behind it.
    for (to, from) in attributes.prog_name.iter_mut().take(PROGRAM_NAME).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: program and licence outlive the call, the former is as long as is said, the latter ends with NUL, and the kernel
    // writes to neither; no other address is given. What is answered is new.
    unsafe { descriptor(uapi::BPF_PROG_LOAD, &attributes) }
}

/// A program on a tracepoint (`tp_btf`), and its link.
pub(crate) fn tracepoint(name: &str, program: &[u64], types: &Types) -> Result<[OwnedFd; 2]> {
    let kind = Kind {
        prog_type: uapi::BPF_PROG_TYPE_TRACING,
        expected_attach_type: uapi::BPF_TRACE_RAW_TP,
        attach_btf_id: types.tracepoint(name)?,
    };
    let program = load(name, program, &kind)?;
    let open = uapi::RawTracepointOpen { name: 0, prog_fd: program.as_raw_fd(), _pad: 0 };
    // SAFETY: numbers, and no name; what is answered is new.
    let link = unsafe { descriptor(uapi::BPF_RAW_TRACEPOINT_OPEN, &open) }?;
    Ok([program, link])
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
