//! The walks that user space starts from time to time: over all open files, and over all sockets that have storage, where the
//! kernel can do that without danger.
//!
//! They find sockets whose peer has closed, and whose process has not, for too long: no transition tells that one did not come. Each
//! makes one record in its life. In between they cost nothing.

use aya_ebpf::cty::{c_int, c_void};
use tracer_ebpf::kind;

use crate::conn::{self, Conn, Outcome};
use crate::owner::{self, TaskFile};
use crate::slot;
use crate::sock::{self, Sock, tcp};

/// `struct bpf_iter__bpf_sk_storage_map`: a socket that has storage in the map; NULL at the end of the walk.
/// <https://github.com/torvalds/linux/blob/v6.12/net/core/bpf_sk_storage.c#L719>
#[repr(C)]
struct SocketStorage {
    meta: *mut c_void,
    map: *mut c_void,
    sk: *mut c_void,
    value: *mut c_void,
}

/// Looks at one socket that has storage.
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
#[unsafe(no_mangle)]
extern "C" fn close_wait(ctx: *mut SocketStorage) -> c_int {
    // SAFETY: the kernel passes a `struct bpf_iter__bpf_sk_storage_map`; its socket is checked, and lives for the call.
    unsafe {
        let sk = (*ctx).sk;
        if !sk.is_null() && sock::is_tcp(sk) {
            report(sk, sock::cookie(sk), true);
        }
    }
    0
}

/// Looks at one open file, and has the state of idle sockets moved out of their slots, or, where it cannot do that
/// ([`sock::config_files_trusted`]), looks for a slot for what was open before and has none. It does not find a socket that is in no process's
/// table of open files: because none has accepted it, or because it is io_uring's own, or the kernel's.
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
extern "C" fn look_at_files(ctx: *mut TaskFile) -> c_int {
    // SAFETY: the kernel passes a `struct bpf_iter__task_file`; the file is held for the call, and so is its socket.
    unsafe {
        let trusted = sock::config_files_trusted();
        if let Some(sk) = (*ctx).tcp_socket() {
            let cookie = sock::cookie_of_file(sk);
            if !trusted {
                // It may have found its slot taken.
                owner::held_by((*ctx).task, sk, true);
            }
            report(sk, cookie, trusted);
            if trusted {
                slot::pass_by(sk, cookie);
            }
        }
    }
    0
}

/// Reports a socket, if it has been in CLOSE_WAIT for long enough, and was not reported yet. `trusted` as for [`slot::peek`].
///
/// # Safety
/// `sk` is a BTF pointer to a TCP `struct sock`, and `cookie` is its own.
#[inline(always)]
unsafe fn report(sk: Sock, cookie: u64, trusted: bool) {
    // SAFETY: by the caller's word.
    unsafe {
        if sock::state(sk) != tcp::CLOSE_WAIT {
            return;
        }
        let Some(conn) = slot::peek(sk, cookie, trusted) else { return };
        let now = conn::now();
        if conn.close_wait_told != 0 || now.saturating_sub(since(conn, now)) < sock::config_close_wait_ns() {
            return;
        }
        // The slot may have become another's, if this program was stopped for long.
        if conn.cookie != cookie {
            return;
        }
        // A filter may let it pass later, when its owner is known.
        let outcome = conn::emit(sk, conn, kind::CLOSE_WAIT, tcp::CLOSE_WAIT, tcp::CLOSE_WAIT, now);
        if outcome == Outcome::Written {
            conn.close_wait_told = 1;
        }
    }
}

/// Since when it has been in CLOSE_WAIT: the last transition that was noted. Where that is another, this one is being noted
/// right now, or there was no room for it.
#[inline(always)]
fn since(conn: &Conn, now: u64) -> u64 {
    match conn.last_state() {
        Some((state, at_ns)) if i32::from(state) == tcp::CLOSE_WAIT => at_ns,
        _ => now,
    }
}
