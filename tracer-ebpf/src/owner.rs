//! Who owns a socket, and who closed it.
//!
//! The current task is the owner only where a system call is at work: `connect`, `close` and `shutdown`, `recvmsg`.
//! Everything else runs in softirq on top of whatever was running, on loopback the other end's process. A wrong process
//! is worse than none.

use aya_ebpf::btf_maps::Array;
use aya_ebpf::cty::{c_int, c_void};
use aya_ebpf::helpers::generated::bpf_sock_from_file;
use aya_ebpf::macros::{btf_map, btf_tracepoint};
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::warn;
use tracer_ebpf::{TICK_NS, Task, counter, flag, source};

use crate::conn::{self, Conn, EXITED, PIDS, mark};
use crate::sock::{self, Sock, Who, load, tcp};
use crate::{scan, slot, traffic};

/// The thread that walks over open files, as the initial pid namespace sees it; 0: no walk was made yet.
#[btf_map]
static WALKER: Array<u32, 1> = Array::new();

/// Learns what a transition tells of owner and closer.
///
/// # Safety
/// `sk` is a BTF pointer to a TCP `struct sock`.
#[inline(always)]
pub(crate) unsafe fn at_transition(sk: Sock, conn: &mut Conn, old: i32, new: i32) {
    // SAFETY: by the caller's word; the current task and `task` are valid, a copy of a `Task` is four words.
    unsafe {
        let mut aborted = false;
        let by_close = match (old, new) {
            (_, tcp::SYN_SENT) => {
                if sock::locked_by_process(sk) {
                    let mut task = Task::NONE;
                    if sock::process(sock::current(), &raw mut task) != Who::Kernel {
                        own(conn, &task, source::CONNECT);
                    }
                }
                return;
            }
            (tcp::ESTABLISHED | tcp::SYN_RECV | tcp::CLOSE_WAIT, tcp::FIN_WAIT1 | tcp::LAST_ACK) => true,
            // A close that sends a RST: nothing came from the peer or a timer, and `sk_err` is clear; or the application had
            // called `close`, and it says what ICMP once said (`IP_RECVERR`); or `tcp_abort`. (A timer that found the socket
            // locked is run by whoever unlocks it.) After a FIN of ours the local close was made before, by whom we may not
            // know.
            (tcp::ESTABLISHED | tcp::SYN_RECV | tcp::CLOSE_WAIT, tcp::CLOSE) => {
                let err = sock::sk_err(sk);
                aborted = err == sock::ECONNABORTED;
                let old = err != sock::ETIMEDOUT && conn.flags & flag::RST_SENT == 0 && sock::shut_down(sk);
                conn.http.ending.closer.tgid == 0
                    && conn.flags & flag::RST_RECEIVED == 0
                    && (err == 0 || aborted || old)
            }
            _ => false,
        };
        if !by_close || !sock::locked_by_process(sk) {
            return;
        }
        let current = sock::current();
        if WALKER.get(0) == Some(&load!(current, pid, u32)) {
            conn.flags |= flag::CLOSED_IN_WALK;
            return;
        }
        let mut task = Task::NONE;
        match sock::process(current, &raw mut task) {
            Who::Kernel => {
                // The last reference was dropped by a worker: after an exit, for example through io_uring.
                if exited(&conn.owner) {
                    conn.flags |= flag::CLOSED_BY_EXIT;
                }
                return;
            }
            Who::Exiting => conn.flags |= flag::CLOSED_BY_EXIT,
            Who::Process => {}
        }
        conn::copy_words::<4>((&raw mut conn.http.ending.closer).cast(), (&raw const task).cast());
        if conn::pid_asked(&task) {
            conn.marks |= mark::CLOSER_ASKED;
        }
        if conn.owner_source != source::NONE && conn.owner.tgid == task.tgid && conn.owner.start_ns == task.start_ns {
            // It may have called `exec` since: a new name.
            own(conn, &task, conn.owner_source);
        } else if conn.owner_source == source::NONE && !aborted {
            // Who aborts a socket (`ss -K`) need not hold it.
            own(conn, &task, source::CLOSE);
        }
    }
}

/// Makes `task` the owner, unless somebody writes another one at this instant: then that one stays. Only the walk over the
/// open files and a process that holds the socket's lock can meet so.
#[inline(always)]
fn own(conn: &mut Conn, task: &Task, by: u8) {
    // SAFETY: an aligned word of `conn`; an owner is four words, and written by one program at a time.
    unsafe {
        if scan::exchange(&raw mut conn.owner_busy, 1) != 0 {
            return;
        }
        // By the walk, which need not have seen what was learnt since it looked.
        if by != source::OPEN_FILES || conn.owner_source <= source::OPEN_FILES {
            conn::copy_words::<4>((&raw mut conn.owner).cast(), (&raw const *task).cast());
            (&raw mut conn.owner_source).write_volatile(by);
            if conn::pid_asked(task) {
                conn.marks |= mark::OWNER_ASKED;
            } else {
                conn.marks &= !mark::OWNER_ASKED;
            }
        }
        scan::exchange(&raw mut conn.owner_busy, 0);
    }
}

#[inline(always)]
fn exited(task: &Task) -> bool {
    // SAFETY: the value is read at once.
    match unsafe { EXITED.get(task.tgid) } {
        Some(start_ns) => *start_ns == task.start_ns,
        None => false,
    }
}

/// `trace_tcp_rcv_space_adjust(struct sock *sk)`: a reader has copied data out of the socket.
/// <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/tcp_input.c#L717>
#[btf_tracepoint(function = "tcp_rcv_space_adjust")]
fn tcp_rcv_space_adjust(ctx: BtfTracePointContext) -> i32 {
    let sk: Sock = ctx.arg::<*mut _>(0);
    // SAFETY: argument 0 is a BTF pointer to a `struct sock`.
    unsafe {
        let Some(conn) = slot::get(sk, sock::cookie(sk)) else { return 0 };
        let current = sock::current();
        if conn.owner_source == source::READ && sock::is_still(&conn.owner, current) {
            return 0;
        }
        // `tcp_read_sock` reads in softirq for kernel TLS and sockmap: no process there.
        if !sock::locked_by_process(sk) {
            return 0;
        }
        let mut task = Task::NONE;
        if sock::process(current, &raw mut task) == Who::Process {
            own(conn, &task, source::READ);
        }
    }
    0
}

/// `trace_sched_process_exit(struct task_struct *p[, bool group_dead])`: before the files of the process are closed.
/// <https://github.com/torvalds/linux/blob/v6.12/include/trace/events/sched.h#L331>
#[btf_tracepoint(function = "sched_process_exit")]
fn sched_process_exit(ctx: BtfTracePointContext) -> i32 {
    let task: *mut c_void = ctx.arg(0);
    // SAFETY: argument 0 is a BTF pointer to a `struct task_struct`.
    unsafe {
        let signal = load!(task, signal, *mut c_void);
        if load!(signal, signal_live, u32) != 0 {
            return 0;
        }
        let leader = load!(task, group_leader, *mut c_void);
        let start_ns = load!(leader, start_boottime, u64);
        // Full is no matter: the least recently used entry makes room.
        let _ = EXITED.insert(load!(task, tgid, u32), start_ns, 0);
    }
    0
}

/// `trace_sched_process_fork(struct task_struct *parent, struct task_struct *child)`; attached for `--pid` only.
/// <https://github.com/torvalds/linux/blob/v6.12/include/trace/events/sched.h#L395>
#[btf_tracepoint(function = "sched_process_fork")]
fn sched_process_fork(ctx: BtfTracePointContext) -> i32 {
    let (parent, child): (*mut c_void, *mut c_void) = (ctx.arg(0), ctx.arg(1));
    // SAFETY: both are BTF pointers to a `struct task_struct`.
    unsafe {
        let (mut of_parent, mut of_child) = (Task::NONE, Task::NONE);
        sock::process(parent, &raw mut of_parent);
        if !conn::pid_asked(&of_parent) {
            return 0;
        }
        sock::process(child, &raw mut of_child);
        if of_child.tgid != of_parent.tgid && PIDS.insert(of_child.tgid, of_child.start_ns / TICK_NS, 0).is_err() {
            conn::count(counter::LEFT_OUT);
            if conn::worth_a_warning(counter::LEFT_OUT) {
                warn!(&ctx, "--pid follows no more processes at once: {} is left out", of_child.tgid);
            }
        }
    }
    0
}

/// `trace_sched_process_free(struct task_struct *p)`: after its files were closed; attached for `--pid` only.
/// <https://github.com/torvalds/linux/blob/v6.12/include/trace/events/sched.h#L324>
#[btf_tracepoint(function = "sched_process_free")]
fn sched_process_free(ctx: BtfTracePointContext) -> i32 {
    let task: *mut c_void = ctx.arg(0);
    // SAFETY: argument 0 is a BTF pointer to a `struct task_struct`.
    unsafe {
        let (pid, tgid) = (load!(task, pid, u32), load!(task, tgid, u32));
        if pid == tgid
            && let Some(start) = PIDS.get(tgid)
            && conn::began(load!(task, start_boottime, u64), *start)
        {
            // Gone already: nothing to remove.
            let _ = PIDS.remove(tgid);
        }
    }
    0
}

/// `struct bpf_iter__task_file`: a process and one of its open files, either NULL at the end of the walk.
/// <https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/task_iter.c#L363>
#[repr(C)]
pub(crate) struct TaskFile {
    meta: *mut c_void,
    pub(crate) task: *mut c_void,
    fd: u64,
    file: *mut c_void,
}

impl TaskFile {
    /// The TCP socket that this file is, if it is one. Then it is noted whose walk this is, before that can close the file.
    ///
    /// # Safety
    /// The kernel made it, for the program that runs.
    #[inline(always)]
    pub(crate) unsafe fn tcp_socket(&self) -> Option<Sock> {
        if self.file.is_null() {
            return None;
        }
        // SAFETY: by the caller's word the file is held; what is read from its socket is read at BTF offsets. An aligned word of a map.
        unsafe {
            let socket = bpf_sock_from_file(self.file.cast()).cast::<c_void>();
            if socket.is_null() {
                return None;
            }
            let sk = load!(socket, socket_sk, *mut c_void);
            if sk.is_null() || !sock::is_tcp(sk) {
                return None;
            }
            if let Some(walker) = WALKER.get_ptr_mut(0) {
                walker.write_volatile(load!(sock::current(), pid, u32));
            }
            Some(sk)
        }
    }
}

/// Walks every open file of every process, in all network namespaces: the owners of what was open before the start.
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
extern "C" fn open_files(ctx: *mut TaskFile) -> c_int {
    // SAFETY: the kernel passes a `struct bpf_iter__task_file`; the file is held for the call, and so is its socket.
    unsafe {
        if let Some(sk) = (*ctx).tcp_socket() {
            held_by((*ctx).task, sk, false);
        }
    }
    0
}

/// Notes that a process holds a socket, if nobody knows more of whose it is. `late`: in a later walk than the first, where that counts only
/// for what is older than the programs.
///
/// # Safety
/// `task` is NULL or a BTF pointer to a `struct task_struct`, and `sk` one to a TCP `struct sock` which is an open file of it.
#[inline(always)]
pub(crate) unsafe fn held_by(task: *mut c_void, sk: Sock, late: bool) {
    // SAFETY: by the caller's word; what is read from them is read at BTF offsets.
    unsafe {
        let state = sock::state(sk);
        if task.is_null() || state == tcp::LISTEN || state == tcp::CLOSE {
            return;
        }
        let (local, remote) = sock::ports(sk);
        if !conn::port_passes(local, remote) {
            return;
        }
        let cookie = sock::cookie_of_file(sk);
        let Some(conn) = slot::of_file(sk, cookie) else { return };
        if conn.cookie == 0 {
            traffic::first_sight(conn, cookie, state, conn::now());
        }
        if late && conn.older == 0 {
            return;
        }
        let mut found = Task::NONE;
        if sock::process(task, &raw mut found) != Who::Process {
            return;
        }
        // One that several processes share goes to one that was asked for, if there is any among them; and among those, or else all, to
        // the one that began first: another that has it for a moment only, between `fork` and `exec`, is its child.
        let known = conn.owner_source;
        let (asked, known_asked) = (conn::pid_asked(&found), conn.marks & mark::OWNER_ASKED != 0);
        let is_first = if asked == known_asked { found.start_ns < conn.owner.start_ns } else { asked };
        if known == source::NONE || (known == source::OPEN_FILES && is_first) {
            own(conn, &found, source::OPEN_FILES);
        }
    }
}
