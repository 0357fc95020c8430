//! The books: of each end of a TCP socket that was seen, what became of it, counted by CPU.
//!
//! What comes in: that a socket ends, and then what was done with that; two counts for each end, made in different places, so
//! that a way through the programs that forgets its end shows as a sum that does not add up. What goes out: rows of counters
//! that user space reads. They are no atomics, and need not be: each row is written by one program in one context on one CPU.
//! (A softirq can interrupt a process in the middle of a count, and the second program runs where the first is interrupted; but
//! neither meets its like.)

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use tracer_ebpf::book::{COLUMNS, Column, ROWS};

use crate::sock::{self, Sock, tcp};

#[btf_map]
static LEDGER: PerCpuArray<[u64; COLUMNS], { ROWS as usize }> = PerCpuArray::new();

/// The row of one program (0 or 1) for a transition of `sk`.
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`.
#[inline(always)]
pub(crate) unsafe fn row(program: u32, sk: Sock) -> u32 {
    // SAFETY: by the caller's word.
    program * 2 + u32::from(unsafe { sock::locked_by_process(sk) })
}

/// Adds to one column of a row.
#[inline(always)]
pub(crate) fn add(row: u32, column: Column, what: u64) {
    let Some(columns) = LEDGER.get_ptr_mut(row) else { return };
    // SAFETY: the column is one of the row's; who writes the row is alone.
    unsafe {
        let column = columns.cast::<u64>().add(column as usize);
        column.write_volatile(column.read_volatile().wrapping_add(what));
    }
}

/// A TCP socket enters CLOSE from `old`, whatever will be made of it.
///
/// # Safety
/// As for [`row`]; it is one of TCP.
#[inline(always)]
pub(crate) unsafe fn seen(row: u32, sk: Sock, old: i32) {
    add(row, Column::Seen, 1);
    // SAFETY: by the caller's word.
    unsafe {
        // The kernel's own counters know of nothing that ends twice, and of no connect that sent nothing.
        if sock::is_here(sk) && old != tcp::CLOSE && !(old == tcp::SYN_SENT && sock::has_sent_nothing(sk)) {
            add(row, Column::SeenHere, 1);
        }
    }
}

/// A socket begins or ends to listen.
///
/// # Safety
/// As for [`row`].
#[inline(always)]
pub(crate) unsafe fn listens(row: u32, sk: Sock, begins: bool) {
    // SAFETY: by the caller's word.
    if unsafe { sock::is_tcp(sk) && sock::is_here(sk) } {
        add(row, Column::ListenersHere, if begins { 1 } else { u64::MAX });
    }
}
