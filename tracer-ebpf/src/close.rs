//! The life of a socket: its transitions, who ended it, and the record of its end.
//!
//! `inet_sock_set_state` never reports TIME_WAIT: an active close ends FIN_WAIT2→CLOSE, whether or not a TIME_WAIT
//! mini-socket is left. Here only the facts are collected that tell these cases apart; user space judges.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use aya_log_ebpf::warn;
use tracer_ebpf::book::Column;
use tracer_ebpf::{counter, filter, first_end, flag, head, kind, role, source, unpack_state};

use crate::conn::{self, Conn, HANDOVER, Outcome, SEEN, Seen, copy_words, mark};
use crate::sock::{self, Sock, TimeWaitTable, tcp};
use crate::{ledger, owner, slot, traffic};

/// `trace_inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`
/// <https://github.com/torvalds/linux/blob/v6.12/include/trace/events/sock.h#L138>
#[btf_tracepoint(function = "inet_sock_set_state")]
fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    let (sk, old, new): (Sock, i32, i32) = (ctx.arg::<*mut _>(0), ctx.arg(1), ctx.arg(2));
    // SAFETY: argument 0 is a BTF pointer to a `struct sock`.
    unsafe {
        if let Some(seen) = last_seen(sk) {
            (&raw mut (*seen).sk).write_volatile(sk as u64);
            (&raw mut (*seen).change).write_volatile(change(old, new));
            (&raw mut (*seen).cookie).write_volatile(sock::known_cookie(sk));
        }
        transition(&ctx, ledger::row(0, sk), sk, old, new);
    }
    0
}

/// The same, for the transitions that the kernel keeps from the program above: while that runs for a process, softirq may
/// interrupt it and change another socket's state, and no tracing program is run while it runs already on that CPU. It is
/// rare, but a record that is never written would not be missed.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn inet_sock_set_state_nested(ctx: BtfTracePointContext) -> i32 {
    let (sk, old, new): (Sock, i32, i32) = (ctx.arg::<*mut _>(0), ctx.arg(1), ctx.arg(2));
    // SAFETY: argument 0 is a BTF pointer to a `struct sock`.
    unsafe {
        let Some(seen) = last_seen(sk) else { return 0 };
        let address = (&raw const (*seen).sk).read_volatile();
        let cookie = (&raw const (*seen).cookie).read_volatile();
        // Used up, whatever comes of it. All the same it may be of long ago, if this program was kept from that transition, and another
        // socket may be at that address by now: hence the cookie.
        (&raw mut (*seen).sk).write_volatile(0);
        let is_noted = address == sk as u64
            && (&raw const (*seen).change).read_volatile() == change(old, new)
            && (cookie == 0 || cookie == sock::known_cookie(sk));
        if !is_noted && !was_noted(sk, new) {
            transition(&ctx, ledger::row(1, sk), sk, old, new);
        }
    }
    0
}

/// Where the first of the two programs leaves for the second what it has seen: on this CPU, in this context. A process can
/// be interrupted by softirq, but neither by its like.
///
/// # Safety
/// As for [`transition`].
#[inline(always)]
unsafe fn last_seen(sk: Sock) -> Option<*mut Seen> {
    // SAFETY: by the caller's word.
    SEEN.get_ptr_mut(u32::from(unsafe { sock::locked_by_process(sk) }))
}

/// Whether the first program has seen a transition after all: where programs can be preempted (7.x), another process may have
/// overwritten [`SEEN`] in between, or this one gone to another CPU. Of a socket that has no state (it listens, or a filter
/// leaves it out) this is not known; then the books count it twice.
///
/// # Safety
/// As for [`transition`].
#[inline(always)]
unsafe fn was_noted(sk: Sock, new: i32) -> bool {
    // SAFETY: by the caller's word.
    let cookie = unsafe { sock::cookie(sk) };
    if new == tcp::CLOSE && slot::has_ended(cookie) {
        return true;
    }
    // SAFETY: by the caller's word.
    let Some(conn) = (unsafe { slot::get(sk, cookie) }) else { return false };
    // There may have been no room for its end.
    (new == tcp::CLOSE && conn.marks & mark::ENDED != 0)
        || conn.last_state().is_some_and(|(state, _)| i32::from(state) == new)
}

#[inline(always)]
fn change(old: i32, new: i32) -> u64 {
    u64::from(old as u32) << 32 | u64::from(new as u32)
}

/// `row` is where this program counts ends.
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`.
#[inline(always)]
unsafe fn transition(ctx: &BtfTracePointContext, row: u32, sk: Sock, old: i32, new: i32) {
    // SAFETY: by the caller's word; all calls are about `sk`.
    unsafe {
        if new == tcp::LISTEN || (old == tcp::LISTEN && new != tcp::SYN_RECV) {
            ledger::listens(row, sk, new == tcp::LISTEN);
            return;
        }
        if !sock::is_tcp(sk) {
            return;
        }
        if old == tcp::LISTEN {
            cloned(sk);
            return;
        }
        if new == tcp::CLOSE {
            ledger::seen(row, sk, old);
            if old == tcp::CLOSE {
                // It has ended before.
                ledger::add(row, Column::Void, 1);
                return;
            }
        }
        let cookie = sock::cookie(sk);
        // At SYN_SENT a client has no port yet.
        if sock::config_filters() & filter::PORT != 0 && new != tcp::SYN_SENT {
            let (local, remote) = sock::ports(sk);
            if !conn::port_passes(local, remote) {
                if old == tcp::SYN_SENT {
                    // Made then.
                    slot::delete(sk, cookie);
                }
                if new == tcp::CLOSE {
                    ledger::add(row, Column::Filtered, 1);
                }
                return;
            }
        }
        if new == tcp::SYN_SENT {
            // A socket that was disconnected and connects again starts anew.
            slot::delete(sk, cookie);
        }
        if !conn::ends_pass(sk) {
            // Made when it was cloned, before it had addresses.
            slot::delete(sk, cookie);
            if new == tcp::CLOSE {
                ledger::add(row, Column::Filtered, 1);
            }
            return;
        }
        let now = conn::now();
        // Two that were cloned for one request have its cookie, both of them, if it was asked for; one of them goes at once.
        let conn = if old == tcp::SYN_RECV && new == tcp::CLOSE {
            slot::of_client(sk, cookie)
        } else {
            slot::claim(sk, cookie, now)
        };
        let Some(conn) = conn else {
            // Counted once in the life of a socket.
            if new == tcp::CLOSE {
                ledger::add(row, Column::Untracked, 1);
                conn::count(counter::UNTRACKED);
                if conn::worth_a_warning(counter::UNTRACKED) {
                    let (local, remote) = sock::ports(sk);
                    warn!(ctx, "no memory to follow a socket: ports {} and {}, closed in state {}", local, remote, old);
                }
            }
            return;
        };
        if new == tcp::CLOSE && conn.marks & mark::ENDED != 0 {
            // It has ended before.
            ledger::add(row, Column::Void, 1);
            return;
        }
        if old == tcp::SYN_RECV && conn.role == role::UNKNOWN {
            conn.role = role::SERVER;
        }
        if conn.cookie == 0 {
            if new == tcp::CLOSE {
                conn.flags |= flag::COOKIE_LATE;
            }
            traffic::first_sight(conn, cookie, if new == tcp::SYN_SENT { new } else { old }, now);
        }
        if new == tcp::CLOSE && old == tcp::SYN_RECV && never_lived(sk, conn) {
            conn.push_state(new, now);
            end(conn, cookie, old, now);
            ledger::add(row, Column::Void, 1);
            return;
        }
        if sock::config_states() && old == tcp::SYN_SENT && conn.states_len != 0 {
            // At that transition it had no port yet, so it is reported now.
            let (_, connecting_ns) = unpack_state(conn.states[0]);
            conn::emit(sk, conn, kind::STATE, tcp::CLOSE, tcp::SYN_SENT, connecting_ns);
        }
        if new == tcp::ESTABLISHED {
            conn.established_ns = now;
            if old == tcp::SYN_SENT && !sock::locked_by_process(sk) {
                // TCP has had that RST, and did not take it: nothing waits in the backlog now.
                conn.rst_seen = 0;
            }
            let (rcv_nxt, snd_una) = sock::progress(sk);
            traffic::established(conn, rcv_nxt, snd_una);
        }
        if new == tcp::FIN_WAIT1 {
            let (rcv_nxt, _) = sock::progress(sk);
            head::closes(&mut conn.http, rcv_nxt);
        }
        if old != new || conn.states_len == 0 {
            conn.push_state(new, now);
        }
        owner::at_transition(sk, conn, old, new);
        match new {
            // The FINs themselves are seen in `traffic`; this holds where a packet passed it by.
            tcp::CLOSE_WAIT => {
                conn.first_end(first_end::REMOTE, now);
                // It may stay so, and be in no table of open files.
                let lasting_ns = sock::config_storage_walk_ns();
                if lasting_ns != u64::MAX
                    && (conn.owner_source == source::NONE || now.saturating_sub(conn.established_ns) >= lasting_ns)
                {
                    slot::in_storage(sk);
                }
            }
            tcp::FIN_WAIT2 => conn.first_end(first_end::LOCAL, now),
            // Our FIN left before the peer's was processed, and the peer's does not acknowledge it. (Where ours still waits
            // to be sent, the peer's was first.)
            tcp::CLOSING if conn.flags & flag::FIN_SENT != 0 || conn.older != 0 => conn.first_end = first_end::BOTH,
            _ => {}
        }
        if new == tcp::CLOSE {
            ended(row, sk, conn, old, now);
            end(conn, cookie, old, now);
        } else if sock::config_states() && new != tcp::SYN_SENT {
            conn::emit(sk, conn, kind::STATE, old, new, now);
        }
    }
}

/// A socket has ended, from `old`, and leaves its slot, if that is not another's with the same cookie.
#[inline(always)]
fn end(conn: &Conn, cookie: u64, old: i32, now: u64) {
    if old != tcp::SYN_RECV || conn.role == role::CLIENT {
        slot::end(cookie, now);
    }
}

/// Whether a socket that goes from SYN_RECV to CLOSE never was a connection: when two segments complete one handshake on
/// two CPUs, both clone a socket, and the one that comes late is discarded.
///
/// # Safety
/// As for [`transition`].
#[inline(always)]
unsafe fn never_lived(sk: Sock, conn: &Conn) -> bool {
    // SAFETY: by the caller's word.
    unsafe {
        conn.established_ns == 0
            && conn.first_end == first_end::NONE
            && conn.rst_seen == 0
            && !sock::locked_by_process(sk)
            && sock::sk_err(sk) == 0
    }
}

/// LISTEN→SYN_RECV: a socket was cloned from a listener, in the softirq that handles the segment which completed the
/// handshake. If that segment carried a request, [`traffic`] has just read it, on this CPU.
///
/// # Safety
/// As for [`transition`].
#[inline(always)]
unsafe fn cloned(sk: Sock) {
    let Some(handover) = HANDOVER.get_ptr_mut(0) else { return };
    // SAFETY: a slot of this CPU; only softirq uses it, which does not nest. The other calls: by the caller's word.
    unsafe {
        if (*handover).valid == 0 {
            return;
        }
        (*handover).valid = 0;
        // It has no addresses yet: whether it passes is asked at its next transition. Nor has it a cookie: it gets that of the
        // request that it comes from, or none.
        let Some(conn) = slot::in_storage(sk) else { return };
        copy_words::<{ size_of::<tracer_ebpf::head::Http>() / 8 }>(
            (&raw mut conn.http).cast(),
            (&raw const (*handover).http).cast(),
        );
        conn.role = role::SERVER;
        conn.marks = mark::HANDED_OVER | if (*handover).syn != 0 { mark::HANDED_SYN } else { 0 };
        conn.handed_seq = (*handover).seq;
        conn.handed_len = (*handover).len;
    }
}

/// →CLOSE: the end of the full socket.
///
/// # Safety
/// As for [`transition`].
#[inline(always)]
unsafe fn ended(row: u32, sk: Sock, conn: &mut Conn, old: i32, now: u64) {
    // SAFETY: by the caller's word.
    unsafe {
        if sock::fin_processed(sk) {
            conn.flags |= flag::FIN_RECEIVED;
        }
        if sock::locked_by_process(sk) {
            conn.flags |= flag::IN_PROCESS;
        }
        if sock::shut_down(sk) {
            conn.flags |= flag::SHUT_DOWN;
        }
        if sock::all_acknowledged(sk) {
            conn.flags |= flag::ALL_ACKNOWLEDGED;
        }
        match sock::time_wait_table(sk) {
            TimeWaitTable::Room => {}
            TimeWaitTable::Full => conn.flags |= flag::TIME_WAIT_FULL,
            TimeWaitTable::Unknown => conn.flags |= flag::TIME_WAIT_COUNT_UNKNOWN,
        }
        let column = match conn::emit(sk, conn, kind::CLOSE, old, tcp::CLOSE, now) {
            Outcome::Written => Column::Emitted,
            Outcome::Filtered => Column::Filtered,
            Outcome::Lost => Column::Lost,
        };
        ledger::add(row, column, 1);
    }
    conn.marks |= mark::ENDED;
}

/// `trace_tcp_receive_reset(struct sock *sk)`: first thing in `tcp_reset()`.
///
/// `tcp_reset()` also ends a socket that got data after its process had closed it; then no RST arrived, and one is sent.
/// <https://github.com/torvalds/linux/blob/v6.12/include/trace/events/tcp.h#L205>
#[btf_tracepoint(function = "tcp_receive_reset")]
fn tcp_receive_reset(ctx: BtfTracePointContext) -> i32 {
    let sk: Sock = ctx.arg::<*mut _>(0);
    // SAFETY: argument 0 is a BTF pointer to a `struct sock`.
    if let Some(conn) = unsafe { slot::get(sk, sock::cookie(sk)) } {
        if conn.rst_seen != 0 {
            conn.flags |= flag::RST_RECEIVED;
            conn.first_end(first_end::REMOTE, conn::now());
        } else {
            conn.flags |= flag::RST_SENT;
            conn.first_end(first_end::LOCAL, conn::now());
        }
    }
    0
}

/// `trace_tcp_send_reset(const struct sock *sk, const struct sk_buff *skb[, const enum sk_rst_reason reason])`; `sk` may
/// be NULL or a mini-socket.
/// <https://github.com/torvalds/linux/blob/v6.12/include/trace/events/tcp.h#L106>
#[btf_tracepoint(function = "tcp_send_reset")]
fn tcp_send_reset(ctx: BtfTracePointContext) -> i32 {
    let sk: Sock = ctx.arg::<*mut _>(0);
    if sk.is_null() {
        return 0;
    }
    // SAFETY: argument 0 is a BTF pointer to a `struct sock`, and not NULL. Its state is read at a BTF offset.
    unsafe {
        // A mini-socket has the cookie of the full one.
        if !sock::is_full(sk) {
            return 0;
        }
        let cookie = sock::cookie(sk);
        // It may follow the end at once.
        let held = slot::hold(cookie);
        if let Some(conn) = slot::get(sk, cookie) {
            sends_reset(&ctx, sk, conn);
        }
        if held {
            slot::end(cookie, conn::now());
        }
    }
    0
}

/// # Safety
/// `ctx` is that of `tcp_send_reset`, and `sk` its BTF pointer to a full TCP `struct sock`.
#[inline(always)]
unsafe fn sends_reset(ctx: &BtfTracePointContext, sk: Sock, conn: &mut Conn) {
    // SAFETY: by the caller's word.
    unsafe {
        if conn.flags & flag::RST_SENT != 0 {
            return;
        }
        if traffic::lives_on_after_a_reset(sock::state(sk)) && answers_a_segment(ctx) {
            return;
        }
        conn.flags |= flag::RST_SENT;
        let now = conn::now();
        conn.first_end(first_end::LOCAL, now);
        if conn.marks & mark::ENDED != 0 {
            conn::emit(sk, conn, kind::RESET_AFTER_CLOSE, tcp::CLOSE, tcp::CLOSE, now);
        }
    }
}

/// Whether a RST is the answer to a segment, and not sent because a process or a timer ends the socket: then `skb` is NULL.
///
/// # Safety
/// `ctx` is that of `tcp_send_reset`.
unsafe fn answers_a_segment(ctx: &BtfTracePointContext) -> bool {
    let mut skb = 0u64;
    // Not by `ctx.arg`: some verifiers (6.5 to 6.12) know that no argument is NULL, which is not so here, and drop the question.
    // SAFETY: by the caller's word it has three arguments, of eight bytes each.
    let read = unsafe { bpf_probe_read_kernel((&raw mut skb).cast(), 8, ctx.as_ptr().cast::<u64>().add(1).cast()) };
    read == 0 && skb != 0
}
