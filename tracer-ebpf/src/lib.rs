//! The wire format between the kernel programs and user space, and the HTTP head scanner.
//!
//! Everything here is plain data of fixed layout: the same definitions are compiled for the kernel (`bpfel-unknown-none`)
//! and for the host, and the sizes are asserted in both. Nothing here does I/O, allocates, or knows aya.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod head;

#[cfg(not(target_arch = "bpf"))]
use bytemuck::{Pod, Zeroable};

/// Derives what user space needs to view a wire type as bytes; the kernel side needs nothing.
macro_rules! wire {
    ($(#[$meta:meta])* pub struct $name:ident { $($body:tt)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        #[cfg_attr(not(target_arch = "bpf"), derive(Pod, Zeroable))]
        pub struct $name { $($body)* }
    };
}

/// What a [`Record`] is about.
pub mod kind {
    /// A socket reached `TCP_CLOSE`.
    pub const CLOSE: u8 = 1;
    /// Any other transition; only with `--states`.
    pub const STATE: u8 = 2;
    /// This end sent a RST after its socket had already reached `TCP_CLOSE` and its [`CLOSE`] record was written.
    pub const RESET_AFTER_CLOSE: u8 = 3;
    /// A socket has been in `TCP_CLOSE_WAIT` for [`Config::close_wait_ns`](crate::Config): its peer has closed, its process
    /// has not. Once for each socket.
    pub const CLOSE_WAIT: u8 = 4;
}

/// Which end opened the connection.
pub mod role {
    /// Not known: the socket was opened before the programs were attached and has shown no HTTP.
    pub const UNKNOWN: u8 = 0;
    /// It connected: `TCP_SYN_SENT` was seen, or requests leave it.
    pub const CLIENT: u8 = 1;
    /// It was accepted: cloned from a listener, or requests arrive at it.
    pub const SERVER: u8 = 2;
}

/// Which end sent the first FIN or RST.
pub mod first_end {
    /// Neither has been seen.
    pub const NONE: u8 = 0;
    /// This end.
    pub const LOCAL: u8 = 1;
    /// The peer.
    pub const REMOTE: u8 = 2;
    /// Both, at once: each FIN was sent before the other had been processed.
    pub const BOTH: u8 = 3;
}

/// How a [`Task`] came to be connected with a socket, from the weakest evidence to the strongest.
pub mod source {
    /// No process is known.
    pub const NONE: u8 = 0;
    /// It had the socket among its open files when the programs were attached.
    pub const OPEN_FILES: u8 = 1;
    /// It made the local close.
    pub const CLOSE: u8 = 2;
    /// It called `connect`.
    pub const CONNECT: u8 = 3;
    /// It read from the socket; the last reader wins.
    pub const READ: u8 = 4;
}

/// Bits of [`Record::flags`].
pub mod flag {
    /// The socket was open before the programs were attached.
    pub const STARTED_BEFORE: u32 = 1 << 0;
    /// The peer's FIN was processed by the full socket (`SOCK_DONE`).
    pub const FIN_RECEIVED: u32 = 1 << 1;
    /// A FIN left this end.
    pub const FIN_SENT: u32 = 1 << 2;
    /// `tcp_receive_reset`: an acceptable RST arrived.
    pub const RST_RECEIVED: u32 = 1 << 3;
    /// `tcp_send_reset`: this end sent a RST, and not in a handshake to a segment of an old connection.
    pub const RST_SENT: u32 = 1 << 4;
    /// The local close was made by a process that is exiting, or on behalf of one that has exited.
    pub const CLOSED_BY_EXIT: u32 = 1 << 5;
    /// At the end of the socket its network namespace had as many TIME_WAIT sockets as it may have: whether this
    /// one got a mini-socket is not certain.
    pub const TIME_WAIT_FULL: u32 = 1 << 6;
    /// The number of TIME_WAIT sockets of the namespace could not be read on this kernel.
    pub const TIME_WAIT_COUNT_UNKNOWN: u32 = 1 << 7;
    /// Everything that was sent, the FIN included, was acknowledged (`snd_una == write_seq`).
    pub const ALL_ACKNOWLEDGED: u32 = 1 << 8;
    /// The socket's cookie was made only at its end: its mini-socket does not carry it.
    pub const COOKIE_LATE: u32 = 1 << 9;
    /// The state change ran in the context of the process that holds the socket lock, not in softirq.
    pub const IN_PROCESS: u32 = 1 << 10;
    /// Both directions were shut down (`sk_shutdown`). The peer's FIN shuts one down: before it, and in CLOSE_WAIT, the
    /// application has called `close`, or `shutdown` for both; in LAST_ACK and CLOSING this says nothing.
    pub const SHUT_DOWN: u32 = 1 << 11;
    /// The local close was made by tracer's walk over open files, which had the file in hand as its process closed it.
    pub const CLOSED_IN_WALK: u32 = 1 << 12;
}

wire! {
    /// A process, as the kernel knew it at the moment named by [`source`].
    pub struct Task {
        /// `start_boottime` of the process: nanoseconds since boot. With `tgid` it names a process for ever.
        pub start_ns: u64,
        /// Process id as the initial pid namespace sees it; 0: no process is known.
        pub tgid: u32,
        /// Real user id in the initial user namespace.
        pub uid: u32,
        /// `comm` of the process (of its main thread), NUL-padded. Attacker-controlled bytes.
        pub comm: [u8; 16],
    }
}

impl Task {
    /// No process.
    pub const NONE: Self = Self { start_ns: 0, tgid: 0, uid: 0, comm: [0; 16] };
}

/// The unit of process start times in `/proc/<pid>/stat` (`USER_HZ` is 100), in nanoseconds.
pub const TICK_NS: u64 = 10_000_000;

/// For how long after a wake-up of the reader nothing that is written needs another, nanoseconds.
pub const WAKEUP_NS: u64 = 5_000_000;

/// Number of transitions that a [`Record`] can hold: the longest life is SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT1, CLOSING
/// (or FIN_WAIT2), CLOSE.
pub const STATES: usize = 6;

/// Packs a TCP state (`TCP_ESTABLISHED` = 1 … `TCP_NEW_SYN_RECV` = 12) and the moment it was entered
/// (`bpf_ktime_get_ns`) into a word of [`Record::states`].
#[inline(always)]
pub const fn pack_state(state: u8, at_ns: u64) -> u64 {
    at_ns << 4 | (state & 15) as u64
}

/// Reverses [`pack_state`]: the state, and the moment in nanoseconds.
#[inline(always)]
pub const fn unpack_state(word: u64) -> (u8, u64) {
    ((word & 15) as u8, word >> 4)
}

wire! {
    /// One record of the ring buffer. All times are `bpf_ktime_get_ns`, that is `CLOCK_MONOTONIC`, in nanoseconds.
    pub struct Record {
        /// When the transition happened.
        pub at_ns: u64,
        /// The kernel's socket cookie.
        pub cookie: u64,
        /// When `TCP_ESTABLISHED` was entered; of a socket that is older than the programs, when it was first seen; 0
        /// if it never was established.
        pub established_ns: u64,
        /// The last payload byte in either direction; 0: none was seen.
        pub payload_ns: u64,
        /// The first FIN or RST in either direction; 0: none was seen.
        pub end_ns: u64,
        /// Payload bytes received in order.
        pub rx_bytes: u64,
        /// Payload bytes sent, each counted once.
        pub tx_bytes: u64,
        /// Transitions in order, as of [`pack_state`]; unused ones are 0.
        pub states: [u64; STATES],
        /// The owner.
        pub owner: Task,
        /// Who made the local close, if it is known.
        pub closer: Task,
        /// Local address, network byte order; IPv4 in the first four bytes.
        pub local: [u8; 16],
        /// Remote address, likewise.
        pub remote: [u8; 16],
        /// Inode number of the network namespace.
        pub netns: u32,
        /// `skc_bound_dev_if`: the device that the socket is bound to; 0: none.
        pub bound_dev: u32,
        /// [`flag`] bits.
        pub flags: u32,
        /// Local port, host byte order.
        pub local_port: u16,
        /// Remote port, host byte order.
        pub remote_port: u16,
        /// `sk_err`, a positive errno; 0: none.
        pub sk_err: u16,
        /// One of [`kind`].
        pub kind: u8,
        /// 4 or 6.
        pub family: u8,
        /// State before the transition.
        pub old_state: u8,
        /// State after it.
        pub new_state: u8,
        /// One of [`role`].
        pub role: u8,
        /// One of [`first_end`].
        pub first_end: u8,
        /// One of [`source`], for `owner`.
        pub owner_source: u8,
        #[doc(hidden)]
        pub _pad: [u8; 7],
        /// What the head scanner found.
        pub http: head::Exchange,
    }
}

wire! {
    /// Byte offsets of kernel struct members, resolved from the running kernel's BTF before the load; a frozen global of
    /// the programs. `u32::MAX` marks a member that this kernel lacks.
    pub struct Offsets {
        /// `sock.__sk_common.skc_family`
        pub skc_family: u32,
        /// `sock.__sk_common.skc_state`
        pub skc_state: u32,
        /// `sock.__sk_common.skc_daddr`
        pub skc_daddr: u32,
        /// `sock.__sk_common.skc_rcv_saddr`
        pub skc_rcv_saddr: u32,
        /// `sock.__sk_common.skc_dport`
        pub skc_dport: u32,
        /// `sock.__sk_common.skc_v6_daddr`; `u32::MAX` without `CONFIG_IPV6`
        pub skc_v6_daddr: u32,
        /// `sock.__sk_common.skc_v6_rcv_saddr`; `u32::MAX` without `CONFIG_IPV6`
        pub skc_v6_rcv_saddr: u32,
        /// `sock.__sk_common.skc_net.net`
        pub skc_net: u32,
        /// `sock.__sk_common.skc_bound_dev_if`
        pub skc_bound_dev_if: u32,
        /// `sock.__sk_common.skc_flags` (the `sk_flags` word of [`Offsets::sock_done`])
        pub skc_flags: u32,
        /// `sock.__sk_common.skc_cookie`
        pub skc_cookie: u32,
        /// `sock.sk_protocol`
        pub sk_protocol: u32,
        /// `sock.sk_err`
        pub sk_err: u32,
        /// `sock.sk_shutdown`
        pub sk_shutdown: u32,
        /// `sock.sk_lock.owned`
        pub sk_lock_owned: u32,
        /// `sock.sk_bpf_storage`
        pub sk_bpf_storage: u32,
        /// `inet_sock.inet_sport`
        pub inet_sport: u32,
        /// `tcp_sock.rcv_nxt`
        pub rcv_nxt: u32,
        /// `tcp_sock.rcv_wnd`
        pub rcv_wnd: u32,
        /// `tcp_sock.snd_una`
        pub snd_una: u32,
        /// `tcp_sock.write_seq`
        pub write_seq: u32,
        /// `tcp_sock.bytes_received`
        pub bytes_received: u32,
        /// `tcp_sock.bytes_sent`
        pub bytes_sent: u32,
        /// `tcp_sock.bytes_retrans`
        pub bytes_retrans: u32,
        /// `tcp_sock.segs_out`
        pub segs_out: u32,
        /// `net.ns.inum`
        pub net_inum: u32,
        /// `net.ipv4.tcp_death_row.tw_refcount` (`tw_count` before 6.0); `u32::MAX` where the table is not embedded
        pub tw_count: u32,
        /// 1 where `tw_refcount` is one more than the number of sockets, 0 for `tw_count`.
        pub tw_count_bias: u32,
        /// `net.ipv4.tcp_death_row.sysctl_max_tw_buckets`
        pub max_tw_buckets: u32,
        /// `task_struct.group_leader`
        pub group_leader: u32,
        /// `task_struct.tgid`
        pub tgid: u32,
        /// `task_struct.pid`
        pub pid: u32,
        /// `task_struct.flags`
        pub task_flags: u32,
        /// `task_struct.start_boottime`
        pub start_boottime: u32,
        /// `task_struct.comm`
        pub comm: u32,
        /// `task_struct.cred`
        pub cred: u32,
        /// `cred.uid`
        pub cred_uid: u32,
        /// `task_struct.signal`
        pub signal: u32,
        /// `signal_struct.live`
        pub signal_live: u32,
        /// `signal_struct.flags`
        pub signal_flags: u32,
        /// `socket.sk`
        pub socket_sk: u32,
        /// Bit number of `SOCK_DONE` in `sk_flags`.
        pub sock_done: u32,
    }
}

/// Bits of [`Config::filters`]: which filters are on. A record passes if it passes each filter that is on.
pub mod filter {
    /// Only sockets whose owner or closer is in the `PIDS` map.
    pub const PID: u32 = 1 << 0;
    /// Only sockets whose local or remote port is in `PORTS`.
    pub const PORT: u32 = 1 << 1;
    /// Only sockets whose owner or closer has a `comm` that is in the `COMMS` map.
    pub const COMM: u32 = 1 << 2;
    /// Only sockets whose remote address is in the `PEERS` map.
    pub const PEER: u32 = 1 << 3;
    /// Only sockets whose local address is in the `LOCALS` map.
    pub const LOCAL: u32 = 1 << 4;
    /// Only sockets of a network namespace that is in the `NETNS` map.
    pub const NETNS: u32 = 1 << 5;
}

/// Words of `PORTS`, which has a bit for each port.
pub const PORT_WORDS: usize = (1 << 16) / 64;
/// Entries of the `PEERS` and `LOCALS` maps, each.
pub const PREFIXES: usize = 1024;
/// Entries of the `NETNS` map.
pub const NAMESPACES: usize = 256;

/// Marks of calls that cast a socket: no argument of the helper that they call, so user space finds them by these, and puts another call
/// there where the kernel has one that costs nothing.
pub mod cast_to {
    /// The number of that helper, `bpf_skc_to_tcp_sock`.
    pub const HELPER: u32 = 137;
    /// A BTF pointer to a `struct sock`.
    pub const SOCK: i32 = 0x7ca5_7000;
    /// Likewise to a `struct tcp_sock`.
    pub const TCP_SOCK: i32 = 0x7ca5_7001;
}

/// Size of one of `SLOTS`.
pub const SLOT_BYTES: u32 = 512;

wire! {
    /// What the command line asks of the programs; a frozen global.
    pub struct Config {
        /// How long a socket may be in `TCP_CLOSE_WAIT` before it is reported, nanoseconds.
        pub close_wait_ns: u64,
        /// A socket that ended counts only if it was established for so long, nanoseconds.
        pub min_duration_ns: u64,
        /// For how long a socket must have been established to get storage when it enters `TCP_CLOSE_WAIT`, so that a walk over storage
        /// finds it, nanoseconds; if no owner is known it always gets it. `u64::MAX`: there is no such walk.
        pub storage_walk_ns: u64,
        /// [`filter`] bits.
        pub filters: u32,
        /// Not 0: a record for every transition.
        pub states: u32,
        /// Not 0: keep the query string of the target.
        pub full_target: u32,
        /// Inode number of tracer's own network namespace; 0: not known.
        pub netns: u32,
        /// The number of `SLOTS`, a power of two, less one.
        pub slot_mask: u32,
        /// Where in each of `SLOTS` a socket's state begins: 8 to 64, a multiple of 8.
        pub slot_at: u32,
        /// Not 0: helpers take the socket of an open file. Else what is found in a walk over files can be read, and no more.
        pub files_trusted: u32,
        #[doc(hidden)]
        pub _pad: u32,
    }
}

/// Counters of the `COUNTERS` per-CPU map, by index.
pub mod counter {
    /// Records that found the ring buffer full.
    pub const LOST: u32 = 0;
    /// Sockets that could not be given storage.
    pub const UNTRACKED: u32 = 1;
    /// Processes that `PIDS` had no room for.
    pub const LEFT_OUT: u32 = 2;
    /// Sockets that found their slot taken.
    pub const CROWDED: u32 = 3;
    /// Number of counters.
    pub const COUNT: u32 = 4;
}

/// The `LEDGER` per-CPU map: what became of each end of a TCP socket.
pub mod book {
    /// Rows for each CPU: two programs make the counts, and each can be at work for a process and for softirq.
    pub const ROWS: u32 = 4;
    /// Columns of a row.
    pub const COLUMNS: usize = 8;

    /// What is counted. Of each CPU, [`Column::Seen`] is the sum of those from [`Column::Emitted`] to [`Column::Void`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Column {
        /// Transitions to CLOSE, but for those of listening sockets.
        Seen,
        /// Its record was written.
        Emitted,
        /// It did not pass the filters.
        Filtered,
        /// Its record found the ring buffer full.
        Lost,
        /// There was no memory to follow the socket.
        Untracked,
        /// It was no connection, or its end was counted before.
        Void,
        /// Of [`Column::Seen`], those in tracer's own network namespace that the kernel's counters know.
        SeenHere,
        /// Sockets that began to listen in tracer's own network namespace, less those that ended to; it may be negative.
        ListenersHere,
    }
}

const _: () = assert!(book::Column::ListenersHere as usize + 1 == book::COLUMNS);
const _: () = assert!(size_of::<Task>() == 32);
const _: () = assert!(size_of::<Record>().is_multiple_of(8));
// Written as one word.
const _: () = assert!(core::mem::offset_of!(Record, owner_source).is_multiple_of(8));
const _: () = assert!(core::mem::offset_of!(Record, owner_source) + 8 == core::mem::offset_of!(Record, http));
