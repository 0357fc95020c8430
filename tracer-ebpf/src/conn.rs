//! The state of one socket, the maps, and the way into the ring buffer.
//!
//! [`Conn`] is reachable from the tracepoints and from `cgroup_skb`; where it is, [`crate::slot`] says. It starts as zeroes.

use aya_ebpf::bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_map_lookup_elem;
use aya_ebpf::macros::btf_map;
use tracer_ebpf::head::{self, EGRESS, Http, INGRESS, clamp};
use tracer_ebpf::{
    NAMESPACES, PORT_WORDS, PREFIXES, Record, STATES, TICK_NS, Task, WAKEUP_NS, counter, filter, flag, kind,
    pack_state, unpack_state,
};

use crate::sock::{self, tcp};

/// Bits of [`Conn::marks`]: what only the programs need to know. Never changed by ingress.
pub(crate) mod mark {
    /// The owner is one of the processes asked for.
    pub(crate) const OWNER_ASKED: u8 = 1 << 0;
    /// The closer is one of them.
    pub(crate) const CLOSER_ASKED: u8 = 1 << 1;
    /// The record of the socket's end was written.
    pub(crate) const ENDED: u8 = 1 << 2;
    /// Payload was read before the socket was cloned from its listener.
    pub(crate) const HANDED_OVER: u8 = 1 << 3;
    /// It was that of a SYN (TCP Fast Open).
    pub(crate) const HANDED_SYN: u8 = 1 << 4;
}

/// What is known of one socket. Times are `bpf_ktime_get_ns`.
///
/// Tracepoints and egress run where the socket is locked; ingress and the walks over open files and over sockets do not, and
/// may run on another CPU at the same time. So ingress writes only what nobody else does (`rst_seen`), what [`Http`] says, or
/// single words whose last writer may win (`first_end` and when that was); the first sight of a socket, from wherever, is one
/// program's alone (who sets `cookie`); and `owner` is written by whoever holds `owner_busy`.
///
/// With what the kernel adds in storage (72 bytes) it must not be larger than 512: the next larger block of memory has 1,024 bytes,
/// all of which are cleared for each socket. There the kernel puts it 8 bytes behind the begin of a cache line, and in a slot it is
/// so, too. That line is read by each program, so what is written for each message is not in it: see [`Http`].
#[repr(C)]
pub(crate) struct Conn {
    /// 0: nobody has seen the socket yet.
    pub(crate) cookie: u64,
    pub(crate) owner: Task,
    /// [`flag`] bits.
    pub(crate) flags: u32,
    /// 1: somebody writes the owner.
    pub(crate) owner_busy: u32,
    pub(crate) role: u8,
    pub(crate) first_end: u8,
    pub(crate) owner_source: u8,
    /// [`mark`] bits.
    pub(crate) marks: u8,
    pub(crate) states_len: u8,
    /// Not 0: older than the programs ([`flag::STARTED_BEFORE`]).
    pub(crate) older: u8,
    /// Not 0: a RST segment arrived; whether TCP accepted it, `tcp_receive_reset` tells.
    pub(crate) rst_seen: u8,
    /// Not 0: that it stays in CLOSE_WAIT was told. Only the walk that tells it changes this.
    pub(crate) close_wait_told: u8,
    pub(crate) http: Http,
    pub(crate) states: [u64; STATES],
    pub(crate) established_ns: u64,
    /// Sequence number and size of the payload that was read before the socket was cloned, if [`mark::HANDED_OVER`].
    pub(crate) handed_seq: u32,
    pub(crate) handed_len: u32,
}
const _: () = assert!(size_of::<Conn>() <= 512 - 72);
const _: () = assert!((8 + core::mem::offset_of!(Conn, http)) % 64 == 0);
// Verifiers believe that `push_state` may write up to here.
const _: () = assert!(core::mem::offset_of!(Conn, states) + 8 * 8 <= size_of::<Conn>());

/// A request that arrived at a listener, waiting for the socket that will be cloned from it.
#[repr(C)]
pub(crate) struct Handover {
    pub(crate) valid: u32,
    pub(crate) seq: u32,
    pub(crate) len: u32,
    /// Not 0: with a SYN.
    pub(crate) syn: u32,
    pub(crate) http: Http,
}

/// A transition that was seen.
#[repr(C)]
pub(crate) struct Seen {
    /// The address of its socket; 0: none.
    pub(crate) sk: u64,
    /// The states before and after it.
    pub(crate) change: u64,
    /// Its socket's cookie; 0: it had none yet.
    pub(crate) cookie: u64,
}

/// The ring buffer's size where user space asks for no other.
const RING_BYTES: usize = 4 << 20;

#[btf_map]
static RING: RingBuf<Record, RING_BYTES> = RingBuf::new();
#[btf_map]
static COUNTERS: PerCpuArray<u64, { counter::COUNT as usize }> = PerCpuArray::new();
/// Until when the reader looks by itself (`bpf_ktime_get_ns`): what is written before needs no wake-up. The reader prolongs
/// it as long as it finds records, see [`WAKEUP_NS`].
#[btf_map]
static LOOKS_UNTIL: Array<u64, 1> = Array::new();
/// The processes asked for and their descendants: process id to start time in [`TICK_NS`]. How many find room user space says.
#[btf_map]
pub(crate) static PIDS: HashMap<u32, u64, 1> = HashMap::new();
/// The ports asked for, a bit for each; overridden before the load. No map: to ask one for both ports of each packet costs more than all
/// else that is done with a packet that does not pass.
#[unsafe(no_mangle)]
static PORTS: [u64; PORT_WORDS] = [0; PORT_WORDS];
/// The process names asked for.
#[btf_map]
static COMMS: HashMap<[u8; 16], u8, 256> = HashMap::new();
/// The peers asked for, by prefix: 1, or 0 where it was not asked for, but lies in one that was. IPv4 addresses are mapped
/// into IPv6, so that they pass whichever family the socket has.
#[btf_map]
static PEERS: LpmTrie<[u8; 16], u8, PREFIXES> = LpmTrie::new();
/// Likewise the local addresses.
#[btf_map]
static LOCALS: LpmTrie<[u8; 16], u8, PREFIXES> = LpmTrie::new();
/// Inode numbers of the network namespaces asked for.
#[btf_map]
static NETNS: HashMap<u32, u8, NAMESPACES> = HashMap::new();
/// Processes that exited lately: process id to `start_boottime`.
#[btf_map]
pub(crate) static EXITED: LruHashMap<u32, u64, 4096> = LruHashMap::new();
#[btf_map]
pub(crate) static HANDOVER: PerCpuArray<Handover, 1> = PerCpuArray::new();

/// What was seen last in softirq, and what in a process.
#[btf_map]
pub(crate) static SEEN: PerCpuArray<Seen, 2> = PerCpuArray::new();

/// Copies `N` words. Not `copy_nonoverlapping`: that becomes a loop of bytes in BPF.
///
/// # Safety
/// `from` can be read and `to` written for `N` words.
#[inline(always)]
pub(crate) unsafe fn copy_words<const N: usize>(to: *mut u64, from: *const u64) {
    const { assert!(N <= 56) };
    macro_rules! words {
        ($($i:literal)*) => {
            // SAFETY: by the caller's word; `N` is a constant, so each line is either one move or nothing.
            unsafe { $( if $i < N { to.add($i).write_volatile(from.add($i).read_volatile()); } )* }
        };
    }
    words!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
        40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55);
}

/// Clears `N` words.
///
/// # Safety
/// `to` can be written for `N` words.
#[inline(always)]
pub(crate) unsafe fn clear_words<const N: usize>(to: *mut u64) {
    const { assert!(N <= 56) };
    macro_rules! words {
        ($($i:literal)*) => {
            // SAFETY: by the caller's word.
            unsafe { $( if $i < N { to.add($i).write_volatile(0); } )* }
        };
    }
    words!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
        40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55);
}

/// Adds one to a [`counter`].
#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: an aligned word of a map. Atomic, because a program in softirq may interrupt
        // this one; in assembler, because this target has no atomic types.
        unsafe { core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) value, in(reg) 1u64) };
    }
}

/// Whether what is counted by [`count`] should be told on this CPU again: each time that it has doubled.
#[inline(always)]
pub(crate) fn worth_a_warning(index: u32) -> bool {
    match COUNTERS.get(index) {
        Some(count) => *count & count.wrapping_sub(1) == 0,
        None => false,
    }
}

impl Conn {
    /// Notes a transition.
    #[inline(always)]
    pub(crate) fn push_state(&mut self, state: i32, at_ns: u64) {
        let at = self.states_len;
        if at < STATES as u8 {
            // The mask is for the verifier, which does not see the bound above: it lets nothing beyond `Conn` through.
            let slot = clamp::<7>(u64::from(at)) as usize;
            // SAFETY: `at` is below `STATES`, and so is `slot`.
            unsafe { self.states.as_mut_ptr().add(slot).write_volatile(pack_state(state as u8, at_ns)) };
            self.states_len = at + 1;
        }
    }

    /// The last transition that was noted: the state, and when.
    #[inline(always)]
    pub(crate) fn last_state(&self) -> Option<(u8, u64)> {
        if self.states_len == 0 || self.states_len > STATES as u8 {
            return None;
        }
        // The mask is for the verifier, as in `push_state`.
        let last = clamp::<7>(u64::from(self.states_len) - 1) as usize;
        // SAFETY: `last` is below `STATES`.
        Some(unpack_state(unsafe { self.states.as_ptr().add(last).read_volatile() }))
    }

    /// Notes who sent the first FIN or RST, if nobody has been noted yet.
    #[inline(always)]
    pub(crate) fn first_end(&mut self, who: u8, at_ns: u64) {
        if self.first_end == tracer_ebpf::first_end::NONE {
            self.first_end = who;
            self.http.ending.at_ns = at_ns;
        }
    }
}

/// Whether a process that began at `start_ns` is the one whose start [`PIDS`] holds. What user space wrote there may be a tick
/// too little, in some time namespaces; within a tick no other process gets the same id.
#[inline(always)]
pub(crate) fn began(start_ns: u64, ticks: u64) -> bool {
    (start_ns / TICK_NS).wrapping_sub(ticks) <= 1
}

/// Whether the process asked for with `--pid`, or a descendant, is `task`; without `--pid` nobody is.
#[inline(always)]
pub(crate) fn pid_asked(task: &Task) -> bool {
    if sock::config_filters() & filter::PID == 0 {
        return false;
    }
    // SAFETY: the value is read at once.
    match unsafe { PIDS.get(task.tgid) } {
        Some(start) => began(task.start_ns, *start),
        None => false,
    }
}

/// Whether the ports pass `--port`.
#[inline(always)]
pub(crate) fn port_passes(local: u16, remote: u16) -> bool {
    sock::config_filters() & filter::PORT == 0 || port_asked(local) || port_asked(remote)
}

#[inline(always)]
fn port_asked(port: u16) -> bool {
    let word = clamp::<{ PORT_WORDS as i32 - 1 }>(u64::from(port) / 64) as usize;
    // SAFETY: `word` is below `PORT_WORDS`.
    let word = sock::frozen(unsafe { &*(&raw const PORTS).cast::<u64>().add(word) });
    word >> (port % 64) & 1 != 0
}

/// The filters by address and network namespace. A connection's are known before anything else is, and never change: what
/// they leave out is not followed at all.
const ENDS: u32 = filter::PEER | filter::LOCAL | filter::NETNS;

/// Whether the addresses and the network namespace of `sk` pass `--peer`, `--local` and `--netns`.
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`, or `__sk_buff.sk` checked against NULL.
#[inline(always)]
pub(crate) unsafe fn ends_pass(sk: *mut c_void) -> bool {
    let filters = sock::config_filters();
    if filters & ENDS == 0 {
        return true;
    }
    // SAFETY: by the caller's word.
    let Some(ends) = (unsafe { sock::ends(sk) }) else { return false };
    (filters & filter::NETNS == 0 || NETNS.get_ptr(ends.netns).is_some())
        && (filters & filter::PEER == 0 || is_among((&raw const PEERS).cast(), ends.remote))
        && (filters & filter::LOCAL == 0 || is_among((&raw const LOCALS).cast(), ends.local))
}

/// Whether `map`, which is one of prefixes, has the address.
#[inline(always)]
fn is_among(map: *const c_void, address: [u64; 2]) -> bool {
    #[repr(C)]
    struct Key {
        bits: u32,
        address: [u32; 4],
    }
    let [first, second] = address;
    let key = Key { bits: 128, address: [first as u32, (first >> 32) as u32, second as u32, (second >> 32) as u32] };
    // SAFETY: the map's keys have this layout, and its values are bytes.
    unsafe {
        let found = bpf_map_lookup_elem(map.cast_mut(), (&raw const key).cast()).cast::<u8>();
        !found.is_null() && found.read_volatile() != 0
    }
}

/// Whether a socket that ended now, at `at_ns`, passes `--min-duration`.
#[inline(always)]
fn lasted(conn: &Conn, at_ns: u64) -> bool {
    let least = sock::config_min_duration_ns();
    least == 0 || (conn.established_ns != 0 && at_ns.saturating_sub(conn.established_ns) >= least)
}

#[inline(always)]
fn passes(conn: &Conn) -> bool {
    let filters = sock::config_filters();
    if filters & filter::PID != 0 && conn.marks & (mark::OWNER_ASKED | mark::CLOSER_ASKED) == 0 {
        return false;
    }
    filters & filter::COMM == 0
        || COMMS.get_ptr(conn.owner.comm).is_some()
        || COMMS.get_ptr(conn.http.ending.closer.comm).is_some()
}

/// What became of a record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Written,
    Filtered,
    /// There was no room for it.
    Lost,
}

/// Writes one record, if the filters let it pass.
///
/// # Safety
/// `sk` is a BTF pointer to a full TCP `struct sock`.
#[inline(always)]
pub(crate) unsafe fn emit(sk: sock::Sock, conn: &mut Conn, kind: u8, old: i32, new: i32, at_ns: u64) -> Outcome {
    if !passes(conn) || (matches!(kind, kind::CLOSE | kind::RESET_AFTER_CLOSE) && !lasted(conn, at_ns)) {
        return Outcome::Filtered;
    }
    // At the end only: what is settled stays so, and before it what is missing may still come.
    if kind == kind::CLOSE {
        // SAFETY: by the caller's word.
        let (rcv_nxt, snd_una) = unsafe { sock::progress(sk) };
        // Behind the peer's FIN nothing comes that TCP would have taken.
        let closed =
            matches!(old, tcp::FIN_WAIT1 | tcp::FIN_WAIT2) && conn.flags & flag::FIN_RECEIVED == 0 && conn.older == 0;
        head::settle(&mut conn.http, rcv_nxt, snd_una, closed);
    }
    let Some(mut entry) = RING.reserve(0) else {
        count(counter::LOST);
        return Outcome::Lost;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: every member of the reserved record is written; `conn` and `sk` are valid by the caller's word.
    unsafe {
        sock::describe(sk, record);
        (*record).at_ns = at_ns;
        (*record).cookie = conn.cookie;
        (*record).established_ns = conn.established_ns;
        let [received, sent] = [conn.http.streams[INGRESS].payload_ns, conn.http.streams[EGRESS].payload_ns];
        (*record).payload_ns = if received > sent { received } else { sent };
        (*record).end_ns = conn.http.ending.at_ns;
        copy_words::<STATES>((&raw mut (*record).states).cast(), (&raw const conn.states).cast());
        copy_words::<4>((&raw mut (*record).owner).cast(), (&raw const conn.owner).cast());
        copy_words::<4>((&raw mut (*record).closer).cast(), (&raw const conn.http.ending.closer).cast());
        (*record).flags = conn.flags | if conn.older != 0 { flag::STARTED_BEFORE } else { 0 };
        (*record).kind = kind;
        (*record).old_state = old as u8;
        (*record).new_state = new as u8;
        (*record).role = conn.role;
        (*record).first_end = conn.first_end;
        // While somebody writes the owner (see `owner::own`) nobody can say who it is.
        let settled = (&raw const conn.owner_busy).read_volatile() == 0;
        let source = if settled { conn.owner_source } else { tracer_ebpf::source::NONE };
        // With `_pad`, which would be written byte by byte.
        (&raw mut (*record).owner_source).cast::<u64>().write_volatile(source.into());
        copy_words::<{ size_of::<tracer_ebpf::head::Exchange>() / 8 }>(
            (&raw mut (*record).http).cast(),
            (&raw const conn.http.exchange).cast(),
        );
    }
    // A transition that is told late, has its own time.
    entry.submit(wakeup(if kind == kind::STATE { now() } else { at_ns }));
    Outcome::Written
}

/// Whether the reader must be woken: not while it looks by itself. A wake-up costs more than all else here, on a virtual
/// machine 20 µs and more.
#[inline(always)]
fn wakeup(now: u64) -> u64 {
    let Some(until) = LOOKS_UNTIL.get_ptr_mut(0) else { return 0 };
    // SAFETY: an aligned word. Two CPUs may both read the old value: then the reader is woken twice.
    unsafe {
        if now < until.read_volatile() {
            return u64::from(BPF_RB_NO_WAKEUP);
        }
        until.write_volatile(now + WAKEUP_NS);
    }
    u64::from(BPF_RB_FORCE_WAKEUP)
}

/// Now, in the clock of all records.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_ns() }
}
