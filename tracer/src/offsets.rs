//! Offsets of kernel struct members, from the running kernel's BTF, and what else its types tell.
//!
//! What comes in: `/sys/kernel/btf/vmlinux`. What goes out: the frozen global that the programs read kernel structs by.
//! A member that every supported kernel has and this one lacks is an error; where kernels differ, each layout is tried.

use anyhow::{Context, Result, anyhow, bail};
use btf_rs::{Btf, BtfType, Type};
use tracer_ebpf::Offsets;

use crate::cast::Cast;

/// The kernel's own types.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// A member that this kernel lacks.
const LACKING: u32 = u32::MAX;

/// What the types of the running kernel tell.
pub struct Layout {
    /// Where it keeps what the programs read.
    pub offsets: Offsets,
    /// Whether it bears a walk over the storage of all sockets (`iter/bpf_sk_storage_map`). From Linux 7.0 on what belongs to a
    /// socket that goes at that moment loses its link to it (`bpf_selem_unlink_nofail`), and the kernel follows that link all the
    /// same: `__bpf_sk_storage_map_seq_show` was seen to crash so on 7.2.13 (a NULL pointer; the thread that reads dies of it).
    /// The change came with a new member of `struct bpf_local_storage_elem`, by which it is recognised where it was carried back.
    /// `preflight` also asks for the version.
    pub bears_storage_walk: bool,
    /// Where in a slot a socket's state is to be, so that it begins 8 bytes behind a cache line: [`tracer_ebpf::Config::slot_at`].
    pub slot_at: u32,
    /// How a socket can be cast without a call; before 6.2 it cannot.
    pub cast: Option<Cast>,
    /// Type id of the function that stands for the walk over open files.
    pub task_file: Option<u32>,
    /// Likewise over socket storage.
    pub sk_storage_map: Option<u32>,
}

/// The kernel's types.
pub struct Types(Btf);

impl Types {
    /// Reads them.
    ///
    /// # Errors
    /// The BTF cannot be read.
    pub fn read() -> Result<Self> {
        // Parsed from memory: from a file it is done in hundreds of thousands of small reads.
        let bytes = std::fs::read(VMLINUX).with_context(|| format!("cannot read {VMLINUX}"))?;
        Ok(Self(Btf::from_bytes(&bytes).with_context(|| format!("cannot parse {VMLINUX}"))?))
    }

    /// All that is asked of them.
    ///
    /// # Errors
    /// The kernel lacks a member that is needed.
    pub fn layout(&self) -> Result<Layout> {
        let bears_storage_walk = self.member("bpf_local_storage_elem", "map_node").is_ok()
            && self.member("bpf_local_storage_elem", "state").is_err();
        Ok(Layout {
            offsets: self.offsets()?,
            bears_storage_walk,
            slot_at: self.slot_at(),
            cast: self.cast(),
            task_file: self.function("bpf_iter_task_file"),
            sk_storage_map: self.function("bpf_iter_bpf_sk_storage_map"),
        })
    }

    /// Slots are elements of an array map. The first one lies behind its `struct bpf_array`, which begins with a page. Where that is not
    /// known, slots are slower, and no more.
    fn slot_at(&self) -> u32 {
        const LINE: u32 = 64;
        let first = self.member("bpf_array", "value").unwrap_or(0);
        // The tag is before the state.
        8 + (LINE - first % LINE) % LINE
    }

    fn cast(&self) -> Option<Cast> {
        let holder = |name| self.id(name, |found| matches!(found, Type::Struct(_)));
        Some(Cast { function: self.function("bpf_rdonly_cast")?, sock: holder("sock")?, tcp_sock: holder("tcp_sock")? })
    }

    fn function(&self, name: &str) -> Option<u32> {
        self.id(name, |found| matches!(found, Type::Func(_)))
    }

    fn id(&self, name: &str, is_it: fn(&Type) -> bool) -> Option<u32> {
        let ids = self.0.resolve_ids_by_name(name).ok()?;
        ids.into_iter().find(|id| self.0.resolve_type_by_id(*id).is_ok_and(|found| is_it(&found)))
    }

    /// Resolves every member of [`Offsets`].
    fn offsets(&self) -> Result<Offsets> {
        let optional = |holder: &str, path: &str| self.member(holder, path).unwrap_or(LACKING);
        let offset = |holder: &str, path: &str| self.member(holder, path);
        // 6.0 counts references, that is one more than sockets; before, sockets. From 5.19 to 6.0 the table is not embedded.
        let (tw_count, tw_count_bias) = match self.member("net", "ipv4.tcp_death_row.tw_refcount") {
            Ok(offset) => (offset, 1),
            Err(_) => (optional("net", "ipv4.tcp_death_row.tw_count"), 0),
        };
        Ok(Offsets {
            skc_family: offset("sock", "__sk_common.skc_family")?,
            skc_state: offset("sock", "__sk_common.skc_state")?,
            skc_daddr: offset("sock", "__sk_common.skc_daddr")?,
            skc_rcv_saddr: offset("sock", "__sk_common.skc_rcv_saddr")?,
            skc_dport: offset("sock", "__sk_common.skc_dport")?,
            skc_v6_daddr: optional("sock", "__sk_common.skc_v6_daddr"),
            skc_v6_rcv_saddr: optional("sock", "__sk_common.skc_v6_rcv_saddr"),
            skc_net: offset("sock", "__sk_common.skc_net.net")?,
            skc_bound_dev_if: offset("sock", "__sk_common.skc_bound_dev_if")?,
            skc_flags: offset("sock", "__sk_common.skc_flags")?,
            skc_cookie: offset("sock", "__sk_common.skc_cookie")?,
            sk_protocol: offset("sock", "sk_protocol")?,
            sk_err: offset("sock", "sk_err")?,
            sk_shutdown: offset("sock", "sk_shutdown")?,
            sk_lock_owned: offset("sock", "sk_lock.owned")?,
            sk_bpf_storage: offset("sock", "sk_bpf_storage")?,
            inet_sport: offset("inet_sock", "inet_sport")?,
            rcv_nxt: offset("tcp_sock", "rcv_nxt")?,
            rcv_wnd: offset("tcp_sock", "rcv_wnd")?,
            snd_una: offset("tcp_sock", "snd_una")?,
            write_seq: offset("tcp_sock", "write_seq")?,
            bytes_received: offset("tcp_sock", "bytes_received")?,
            bytes_sent: offset("tcp_sock", "bytes_sent")?,
            bytes_retrans: offset("tcp_sock", "bytes_retrans")?,
            segs_out: offset("tcp_sock", "segs_out")?,
            net_inum: offset("net", "ns.inum")?,
            tw_count,
            tw_count_bias,
            max_tw_buckets: optional("net", "ipv4.tcp_death_row.sysctl_max_tw_buckets"),
            group_leader: offset("task_struct", "group_leader")?,
            tgid: offset("task_struct", "tgid")?,
            pid: offset("task_struct", "pid")?,
            task_flags: offset("task_struct", "flags")?,
            start_boottime: offset("task_struct", "start_boottime")?,
            comm: offset("task_struct", "comm")?,
            cred: offset("task_struct", "cred")?,
            cred_uid: offset("cred", "uid")?,
            signal: offset("task_struct", "signal")?,
            signal_live: offset("signal_struct", "live")?,
            signal_flags: offset("signal_struct", "flags")?,
            socket_sk: offset("socket", "sk")?,
            sock_done: self.enumerator("sock_flags", "SOCK_DONE")?,
        })
    }

    /// Of the BPF helpers `names` (`BPF_FUNC_…`), those that this kernel has.
    ///
    /// # Errors
    /// The BTF is damaged.
    pub fn helpers<'a>(&self, names: &[&'a str]) -> Result<Vec<&'a str>> {
        // `enum bpf_func_id` is found by its first member: before 6.0 it has no name.
        for id in self.0.resolve_ids_by_name("")?.into_iter().chain(self.0.resolve_ids_by_name("bpf_func_id")?) {
            let Type::Enum(found) = self.0.resolve_type_by_id(id)? else { continue };
            let Some(first) = found.members.first() else { continue };
            if self.0.resolve_name(first)? != "BPF_FUNC_unspec" {
                continue;
            }
            let have = found.members.iter().map(|member| self.0.resolve_name(member));
            let have = have.collect::<Result<Vec<_>, _>>()?;
            return Ok(names.iter().copied().filter(|name| have.iter().any(|have| have == name)).collect());
        }
        Ok(Vec::new())
    }
}

impl Types {
    /// The offset in bytes of `path` (members joined by dots; anonymous structs and unions are looked through) in struct `holder`.
    fn member(&self, holder: &str, path: &str) -> Result<u32> {
        let missing = || anyhow!("this kernel's struct {holder} has no member {path}");
        let mut at = self
            .0
            .resolve_types_by_name(holder)
            .ok()
            .and_then(|types| types.into_iter().find(|found| matches!(found, Type::Struct(_))))
            .ok_or_else(|| anyhow!("this kernel has no struct {holder}"))?;
        let mut bits = 0;
        for name in path.split('.') {
            let (offset, member) = self.find(&at, name)?.ok_or_else(missing)?;
            bits += offset;
            at = member;
        }
        if bits % 8 != 0 {
            bail!("{path} of this kernel's struct {holder} is a bit field");
        }
        Ok(bits / 8)
    }

    /// A direct member of `holder`, or of an anonymous struct or union in it: its offset in bits, and its type.
    fn find(&self, holder: &Type, name: &str) -> Result<Option<(u32, Type)>> {
        let (Type::Struct(holder) | Type::Union(holder)) = holder else { return Ok(None) };
        for member in &holder.members {
            let found = self.0.resolve_name(member)?;
            if found == name {
                return Ok(Some((member.bit_offset(), self.plain(member)?)));
            }
            if found.is_empty()
                && let Some((inner, at)) = self.find(&self.plain(member)?, name)?
            {
                return Ok(Some((member.bit_offset() + inner, at)));
            }
        }
        Ok(None)
    }

    /// The type of `of` without typedefs and qualifiers.
    fn plain(&self, of: &dyn BtfType) -> Result<Type> {
        let mut at = self.0.resolve_chained_type(of)?;
        loop {
            at = match &at {
                Type::Typedef(inner) => self.0.resolve_chained_type(inner)?,
                Type::Const(inner) | Type::Volatile(inner) | Type::Restrict(inner) => {
                    self.0.resolve_chained_type(inner)?
                }
                Type::TypeTag(inner) => self.0.resolve_chained_type(inner)?,
                _ => return Ok(at),
            };
        }
    }

    /// The value of enumerator `name` of `enum holder`.
    fn enumerator(&self, holder: &str, name: &str) -> Result<u32> {
        for found in self.0.resolve_types_by_name(holder)? {
            let Type::Enum(found) = found else { continue };
            for member in &found.members {
                if self.0.resolve_name(member)? == name {
                    return Ok(member.val());
                }
            }
        }
        bail!("this kernel's enum {holder} has no {name}")
    }
}
