//! Reading kernel structs: sockets and tasks, at the offsets that user space took from the kernel's BTF.
//!
//! rustc emits no CO-RE relocations. [`OFFSETS`] is frozen before the programs are loaded, so the verifier knows every
//! value and accepts plain loads through BTF pointers at them; a member that this kernel lacks is `u32::MAX`, and the
//! code that would read it is dead to the verifier.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_get_socket_cookie, bpf_skc_to_tcp_sock};
use tracer_ebpf::{Config, Offsets, Record, Task, cast_to};

use crate::conn::copy_words;

/// See [`Offsets`]; overridden before the load.
#[unsafe(no_mangle)]
pub(crate) static OFFSETS: Offsets = {
    // SAFETY: `Offsets` is a struct of `u32`s, for which any bytes are valid.
    unsafe { core::mem::transmute([u32::MAX; size_of::<Offsets>() / 4]) }
};

/// See [`Config`]; overridden before the load.
#[unsafe(no_mangle)]
static CONFIG: Config = Config {
    close_wait_ns: 0,
    min_duration_ns: 0,
    storage_walk_ns: u64::MAX,
    filters: 0,
    states: 0,
    full_target: 0,
    netns: 0,
    slot_mask: 0,
    slot_at: 8,
    files_trusted: 0,
    _pad: 0,
};

/// The value that the loader gave to a member of a frozen global, not the one that it is initialised with.
#[inline(always)]
pub(crate) fn frozen<T: Copy>(member: &T) -> T {
    // SAFETY: a reference can be read.
    unsafe { core::ptr::read_volatile(member) }
}

/// The value of one member of [`OFFSETS`].
macro_rules! offset {
    ($member:ident) => {
        $crate::sock::frozen(&$crate::sock::OFFSETS.$member)
    };
}

/// Loads a `$type` from member `$member` of the kernel struct at `$base`.
macro_rules! load {
    ($base:expr, $member:ident, $type:ty) => {
        core::ptr::read_volatile($base.cast::<u8>().add($crate::sock::offset!($member) as usize).cast::<$type>())
    };
}

/// [`tracer_ebpf::filter`] bits that are on.
#[inline(always)]
pub(crate) fn config_filters() -> u32 {
    frozen(&CONFIG.filters)
}

/// Whether every transition makes a record.
#[inline(always)]
pub(crate) fn config_states() -> bool {
    frozen(&CONFIG.states) != 0
}

/// Whether the query string of a target is kept.
#[inline(always)]
pub(crate) fn config_full_target() -> bool {
    frozen(&CONFIG.full_target) != 0
}

/// The number of slots less one.
#[inline(always)]
pub(crate) fn config_slot_mask() -> u32 {
    frozen(&CONFIG.slot_mask)
}

/// Where in a slot the state is.
#[inline(always)]
pub(crate) fn config_slot_at() -> u32 {
    frozen(&CONFIG.slot_at)
}

/// See [`Config::files_trusted`].
#[inline(always)]
pub(crate) fn config_files_trusted() -> bool {
    frozen(&CONFIG.files_trusted) != 0
}

/// See [`Config::storage_walk_ns`].
#[inline(always)]
pub(crate) fn config_storage_walk_ns() -> u64 {
    frozen(&CONFIG.storage_walk_ns)
}

/// How long a socket may be in CLOSE_WAIT before it is reported, nanoseconds.
#[inline(always)]
pub(crate) fn config_close_wait_ns() -> u64 {
    frozen(&CONFIG.close_wait_ns)
}

/// How long a socket must have been established for its end to be reported, nanoseconds.
#[inline(always)]
pub(crate) fn config_min_duration_ns() -> u64 {
    frozen(&CONFIG.min_duration_ns)
}

/// `struct sock *`, a BTF pointer.
pub(crate) type Sock = *mut c_void;

/// TCP states, `include/net/tcp_states.h`.
pub(crate) mod tcp {
    pub(crate) const ESTABLISHED: i32 = 1;
    pub(crate) const SYN_SENT: i32 = 2;
    pub(crate) const SYN_RECV: i32 = 3;
    pub(crate) const FIN_WAIT1: i32 = 4;
    pub(crate) const FIN_WAIT2: i32 = 5;
    pub(crate) const CLOSE: i32 = 7;
    pub(crate) const CLOSE_WAIT: i32 = 8;
    pub(crate) const LAST_ACK: i32 = 9;
    pub(crate) const LISTEN: i32 = 10;
    pub(crate) const CLOSING: i32 = 11;
}

const IPPROTO_TCP: u16 = 6;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
/// `include/linux/sched.h`: the task is shutting down.
const PF_EXITING: u32 = 0x4;
/// `include/linux/sched.h`: a kernel thread.
const PF_KTHREAD: u32 = 0x0020_0000;
/// `include/linux/sched/signal.h`: a process that exits or is killed, with all its threads.
const SIGNAL_GROUP_EXIT: u32 = 0x4;
/// `include/uapi/asm-generic/errno.h`
pub(crate) const ECONNABORTED: u32 = 103;
pub(crate) const ETIMEDOUT: u32 = 110;

/// # Safety
/// `sk` is a BTF pointer to a `struct sock`.
#[inline(always)]
pub(crate) unsafe fn is_tcp(sk: Sock) -> bool {
    // SAFETY: by the caller's word, and `OFFSETS` is this kernel's.
    unsafe {
        let family = load!(sk, skc_family, u16);
        if family != AF_INET && family != AF_INET6 {
            return false;
        }
        load!(sk, sk_protocol, u16) == IPPROTO_TCP
    }
}

/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn state(sk: Sock) -> i32 {
    // SAFETY: by the caller's word.
    unsafe { i32::from(load!(sk, skc_state, u8)) }
}

/// The socket's cookie, read where it is: the helper takes two calls within the kernel, for each packet. 0: it has none yet.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn known_cookie(sk: Sock) -> u64 {
    // SAFETY: by the caller's word.
    unsafe { load!(sk, skc_cookie, u64) }
}

/// The socket's cookie, made now if it had none.
///
/// # Safety
/// As for [`is_tcp`], in a tracing program.
#[inline(always)]
pub(crate) unsafe fn cookie(sk: Sock) -> u64 {
    // SAFETY: by the caller's word.
    unsafe {
        match known_cookie(sk) {
            0 => bpf_get_socket_cookie(sk),
            cookie => cookie,
        }
    }
}

/// The cookie of a socket that is an open file: made now if it had none, but where such a socket is not trusted. There user space has seen to
/// it that what was open before has one; 0: it has none.
///
/// # Safety
/// As for [`cookie`].
#[inline(always)]
pub(crate) unsafe fn cookie_of_file(sk: Sock) -> u64 {
    // SAFETY: by the caller's word.
    unsafe { if config_files_trusted() { cookie(sk) } else { known_cookie(sk) } }
}

/// Makes a BTF pointer of a socket: calls the helper `bpf_skc_to_tcp_sock`, with a mark ([`cast_to`]) by which user space
/// finds the call. Where the kernel has `bpf_rdonly_cast`, it puts that in its place: a call within the kernel is dear, and this one is
/// compiled to a move.
///
/// # Safety
/// As for the helper; and the socket is what the mark says, or nothing is read there but what all sockets have.
#[inline(always)]
unsafe fn cast<const MARK: i32>(sk: Sock) -> *mut c_void {
    let out: u64;
    // SAFETY: the call, and the registers that it may change. It reads the first argument only.
    unsafe {
        core::arch::asm!(
            "r2 = {mark}",
            "call {helper}",
            mark = const MARK,
            helper = const cast_to::HELPER,
            inout("r1") sk => _,
            lateout("r0") out,
            lateout("r2") _,
            lateout("r3") _,
            lateout("r4") _,
            lateout("r5") _,
            options(nostack)
        );
    }
    out as *mut c_void
}

/// `__sk_buff.sk` as a BTF pointer to a `struct sock`; NULL if it is of no TCP socket and this kernel has no `bpf_rdonly_cast`.
///
/// # Safety
/// `sk` is `__sk_buff.sk` checked against NULL.
#[inline(always)]
pub(crate) unsafe fn of_packet(sk: Sock) -> Sock {
    // SAFETY: by the caller's word.
    unsafe { cast::<{ cast_to::SOCK }>(sk) }
}

/// A socket as a BTF pointer to a `struct tcp_sock`. It is never NULL, but a verifier need not know that.
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`, which is a full TCP one.
#[inline(always)]
unsafe fn tcp_sock(sk: Sock) -> *mut c_void {
    // SAFETY: by the caller's word.
    unsafe { cast::<{ cast_to::TCP_SOCK }>(sk) }
}

/// Whether a process holds the socket's lock. In softirq it does not: what arrives while it is held goes to the backlog.
/// So where this is true the current task is the one that makes a system call on the socket.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn locked_by_process(sk: Sock) -> bool {
    // SAFETY: by the caller's word.
    unsafe { load!(sk, sk_lock_owned, u32) != 0 }
}

/// Whether anybody has put something into the socket's storage.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn has_storage(sk: Sock) -> bool {
    // SAFETY: by the caller's word.
    unsafe { load!(sk, sk_bpf_storage, u64) != 0 }
}

/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn sk_err(sk: Sock) -> u32 {
    // SAFETY: by the caller's word.
    unsafe { load!(sk, sk_err, u32) }
}

/// Whether it is in tracer's own network namespace.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn is_here(sk: Sock) -> bool {
    let own = frozen(&CONFIG.netns);
    // SAFETY: by the caller's word; `skc_net` points to a live namespace while the socket lives.
    unsafe {
        let net = load!(sk, skc_net, *mut c_void);
        own != 0 && load!(net, net_inum, u32) == own
    }
}

/// Whether not even a SYN was sent: there was no free port, or no route any more.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn has_sent_nothing(sk: Sock) -> bool {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = bpf_skc_to_tcp_sock(sk).cast::<c_void>();
        !tp.is_null() && load!(tp, segs_out, u32) == 0
    }
}

/// Whether the application has shut both directions down: it closes the socket. (`tcp_done` says the same, but after the
/// transition.)
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn shut_down(sk: Sock) -> bool {
    const SHUTDOWN_MASK: u8 = 3;
    // SAFETY: by the caller's word.
    unsafe { load!(sk, sk_shutdown, u8) & SHUTDOWN_MASK == SHUTDOWN_MASK }
}

/// The peer's FIN was processed: `tcp_fin()` sets `SOCK_DONE`, and nothing else in TCP does.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn fin_processed(sk: Sock) -> bool {
    // SAFETY: by the caller's word.
    unsafe { load!(sk, skc_flags, u64) >> offset!(sock_done) & 1 != 0 }
}

/// Whether it is a full socket, and no mini-socket.
///
/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn is_full(sk: Sock) -> bool {
    // SAFETY: by the caller's word; the helper answers NULL for what is no full TCP socket.
    unsafe { !bpf_skc_to_tcp_sock(sk).is_null() }
}

/// Local and remote port, host byte order. Of a socket in CLOSE `skc_num` is already 0, `inet_sport` is not.
///
/// # Safety
/// As for [`tcp_sock`].
#[inline(always)]
pub(crate) unsafe fn ports(sk: Sock) -> (u16, u16) {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = tcp_sock(sk);
        if tp.is_null() {
            return (0, 0);
        }
        (u16::from_be(load!(tp, inet_sport, u16)), u16::from_be(load!(sk, skc_dport, u16)))
    }
}

/// Where a socket is.
pub(crate) struct Ends {
    /// Local and remote address, network byte order, two words each; IPv4 ones are mapped into IPv6.
    pub(crate) local: [u64; 2],
    pub(crate) remote: [u64; 2],
    /// Inode number of the network namespace.
    pub(crate) netns: u32,
}

/// The second word of an IPv4-mapped address, without the IPv4 address itself.
const MAPPED: u64 = 0xffff_0000;

/// Both addresses and the network namespace, which all sockets have, mini-sockets too; `None` as for [`of_packet`].
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`, or `__sk_buff.sk` checked against NULL.
#[inline(always)]
pub(crate) unsafe fn ends(sk: Sock) -> Option<Ends> {
    // SAFETY: by the caller's word.
    unsafe {
        let sk = cast::<{ cast_to::SOCK }>(sk);
        if sk.is_null() {
            return None;
        }
        let net = load!(sk, skc_net, *mut c_void);
        let netns = load!(net, net_inum, u32);
        if load!(sk, skc_family, u16) != AF_INET6 || offset!(skc_v6_daddr) == u32::MAX {
            let local = [0, MAPPED | u64::from(load!(sk, skc_rcv_saddr, u32)) << 32];
            let remote = [0, MAPPED | u64::from(load!(sk, skc_daddr, u32)) << 32];
            return Some(Ends { local, remote, netns });
        }
        let at = sk.cast::<u8>().add(offset!(skc_v6_rcv_saddr) as usize).cast::<u64>();
        let mut local = [at.read_volatile(), at.add(1).read_volatile()];
        let at = sk.cast::<u8>().add(offset!(skc_v6_daddr) as usize).cast::<u64>();
        let remote = [at.read_volatile(), at.add(1).read_volatile()];
        if is_mapped(remote) && local == [0, 0] {
            // A dual-stack socket that is not bound yet.
            local = [0, MAPPED];
        }
        Some(Ends { local, remote, netns })
    }
}

#[inline(always)]
fn is_mapped(address: [u64; 2]) -> bool {
    address[0] == 0 && address[1] & 0xffff_ffff == MAPPED
}

/// The next sequence number expected from the peer, and the first one that it has not acknowledged.
///
/// # Safety
/// As for [`tcp_sock`].
#[inline(always)]
pub(crate) unsafe fn progress(sk: Sock) -> (u32, u32) {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = tcp_sock(sk);
        if tp.is_null() { (0, 0) } else { (load!(tp, rcv_nxt, u32), load!(tp, snd_una, u32)) }
    }
}

/// The next sequence number expected from the peer; `None` if `sk` is no full TCP socket.
///
/// # Safety
/// `sk` is `__sk_buff.sk` checked against NULL.
#[inline(always)]
pub(crate) unsafe fn rcv_nxt(sk: Sock) -> Option<u32> {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = bpf_skc_to_tcp_sock(sk).cast::<c_void>();
        if tp.is_null() { None } else { Some(load!(tp, rcv_nxt, u32)) }
    }
}

/// Whether TCP may take a byte with this sequence number: it has not received it yet, and has granted a window for it.
///
/// # Safety
/// As for [`rcv_nxt`].
#[inline(always)]
pub(crate) unsafe fn expects(sk: Sock, seq: u32) -> bool {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = bpf_skc_to_tcp_sock(sk).cast::<c_void>();
        !tp.is_null() && seq.wrapping_sub(load!(tp, rcv_nxt, u32)) <= load!(tp, rcv_wnd, u32)
    }
}

/// Whether what arrives has to wait in the backlog, because a process holds the socket's lock.
///
/// # Safety
/// As for [`rcv_nxt`].
#[inline(always)]
pub(crate) unsafe fn backlogs(sk: Sock) -> bool {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = bpf_skc_to_tcp_sock(sk).cast::<c_void>();
        !tp.is_null() && locked_by_process(tp)
    }
}

/// Whether everything that was sent, the FIN included, was acknowledged: so it is when an ACK ends a socket, and so it is
/// not when the application ends it in CLOSING or LAST_ACK.
///
/// # Safety
/// As for [`tcp_sock`].
#[inline(always)]
pub(crate) unsafe fn all_acknowledged(sk: Sock) -> bool {
    // SAFETY: by the caller's word.
    unsafe {
        let tp = tcp_sock(sk);
        !tp.is_null() && load!(tp, snd_una, u32) == load!(tp, write_seq, u32)
    }
}

/// How many TIME_WAIT sockets a network namespace has, compared with how many it may have.
pub(crate) enum TimeWaitTable {
    Room,
    Full,
    Unknown,
}

/// # Safety
/// As for [`is_tcp`].
#[inline(always)]
pub(crate) unsafe fn time_wait_table(sk: Sock) -> TimeWaitTable {
    if offset!(tw_count) == u32::MAX || offset!(max_tw_buckets) == u32::MAX {
        return TimeWaitTable::Unknown;
    }
    // SAFETY: by the caller's word; `skc_net` points to a live namespace while the socket lives.
    unsafe {
        let net = load!(sk, skc_net, *mut c_void);
        let count = load!(net, tw_count, u32).wrapping_sub(offset!(tw_count_bias));
        let most = load!(net, max_tw_buckets, u32);
        // This socket's own mini-socket is counted by now. At the limit it was the last one or the first to be refused;
        // and just below, others may have gone since it was refused.
        let margin = 64 + (most >> 6);
        if count.saturating_add(margin) < most { TimeWaitTable::Room } else { TimeWaitTable::Full }
    }
}

/// Writes addresses, ports, namespace, byte counts and error of `sk` into `record`.
///
/// # Safety
/// As for [`tcp_sock`]; `record` may be written.
#[inline(always)]
pub(crate) unsafe fn describe(sk: Sock, record: *mut Record) {
    // SAFETY: by the caller's word; every store is to a member of `record`.
    unsafe {
        let (local, remote) = ((&raw mut (*record).local).cast::<u64>(), (&raw mut (*record).remote).cast::<u64>());
        if load!(sk, skc_family, u16) == AF_INET6 && offset!(skc_v6_daddr) != u32::MAX {
            (*record).family = 6;
            let from = sk.cast::<u8>().add(offset!(skc_v6_rcv_saddr) as usize).cast::<u64>();
            copy_words::<2>(local, from);
            let from = sk.cast::<u8>().add(offset!(skc_v6_daddr) as usize).cast::<u64>();
            copy_words::<2>(remote, from);
        } else {
            (*record).family = 4;
            local.write_volatile(u64::from(load!(sk, skc_rcv_saddr, u32)));
            local.add(1).write_volatile(0);
            remote.write_volatile(u64::from(load!(sk, skc_daddr, u32)));
            remote.add(1).write_volatile(0);
        }
        (*record).remote_port = u16::from_be(load!(sk, skc_dport, u16));
        (*record).bound_dev = load!(sk, skc_bound_dev_if, u32);
        (*record).sk_err = sk_err(sk) as u16;
        let net = load!(sk, skc_net, *mut c_void);
        (*record).netns = load!(net, net_inum, u32);
        let tp = tcp_sock(sk);
        if tp.is_null() {
            (*record).local_port = 0;
            (*record).rx_bytes = 0;
            (*record).tx_bytes = 0;
        } else {
            (*record).local_port = u16::from_be(load!(tp, inet_sport, u16));
            // The FIN takes a sequence number, and `bytes_received` counts those.
            let received = load!(tp, bytes_received, u64);
            (*record).rx_bytes = received.wrapping_sub(u64::from(received != 0 && fin_processed(sk)));
            (*record).tx_bytes = load!(tp, bytes_sent, u64).wrapping_sub(load!(tp, bytes_retrans, u64));
        }
    }
}

/// What kind of task a [`Task`] was taken from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// A process.
    Process,
    /// A process that is exiting: not only one of its threads.
    Exiting,
    /// A kernel thread; the [`Task`] is not written.
    Kernel,
}

/// The current task, a BTF pointer.
#[inline(always)]
pub(crate) fn current() -> *mut c_void {
    // SAFETY: the helper takes nothing and always answers a task.
    unsafe { bpf_get_current_task_btf().cast() }
}

/// Writes the process of `task` to `out`.
///
/// # Safety
/// `task` is a BTF pointer to a `struct task_struct`; `out` may be written.
#[inline(always)]
pub(crate) unsafe fn process(task: *mut c_void, out: *mut Task) -> Who {
    // SAFETY: by the caller's word.
    unsafe {
        let flags = load!(task, task_flags, u32);
        if flags & PF_KTHREAD != 0 {
            return Who::Kernel;
        }
        let leader = load!(task, group_leader, *mut c_void);
        (&raw mut (*out).start_ns).write_volatile(load!(leader, start_boottime, u64));
        (&raw mut (*out).tgid).write_volatile(load!(task, tgid, u32));
        let cred = load!(task, cred, *mut c_void);
        (&raw mut (*out).uid).write_volatile(load!(cred, cred_uid, u32));
        let comm = leader.cast::<u8>().add(offset!(comm) as usize).cast::<u64>();
        copy_words::<2>((&raw mut (*out).comm).cast(), comm);
        // A thread that exits may have files of its own, and its process live on.
        if flags & PF_EXITING == 0 || !exits(task) { Who::Process } else { Who::Exiting }
    }
}

/// Whether the process of `task`, a thread that is exiting, exits with it.
///
/// # Safety
/// As for [`process`].
#[inline(always)]
unsafe fn exits(task: *mut c_void) -> bool {
    // SAFETY: by the caller's word.
    unsafe {
        let signal = load!(task, signal, *mut c_void);
        load!(signal, signal_live, u32) == 0 || load!(signal, signal_flags, u32) & SIGNAL_GROUP_EXIT != 0
    }
}

/// Whether the process of `task` is `known`, under the name that it had then: an id may be used again, and a process may
/// call `exec`.
///
/// # Safety
/// `task` is a BTF pointer to a `struct task_struct`.
#[inline(always)]
pub(crate) unsafe fn is_still(known: &Task, task: *mut c_void) -> bool {
    // SAFETY: by the caller's word; a name is two words.
    unsafe {
        let leader = load!(task, group_leader, *mut c_void);
        let comm = leader.cast::<u8>().add(offset!(comm) as usize).cast::<u64>();
        let known_comm = (&raw const known.comm).cast::<u64>();
        known.tgid == load!(task, tgid, u32)
            && known.start_ns == load!(leader, start_boottime, u64)
            && known_comm.read_volatile() == comm.read_volatile()
            && known_comm.add(1).read_volatile() == comm.add(1).read_volatile()
    }
}

pub(crate) use {load, offset};
