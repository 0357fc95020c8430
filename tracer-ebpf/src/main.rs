//! The kernel programs: what the sockets of this host do in, one record for each that closed out.
//!
//! All state of a socket is its [`conn::Conn`], which `slot` finds: in a slot, or in the socket's own storage. Every hook adds what it
//! alone can know; `close` writes the record. No hook changes a packet, a socket or a verdict: each `cgroup_skb` program answers "pass"
//! on every path.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod close;
mod close_wait;
mod conn;
mod ledger;
mod owner;
mod scan;
mod slot;
mod sock;
mod traffic;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: the programs contain no panic, or they would not link for the kernel.
    loop {}
}

/// The reset helpers are open to programs under a GPL-compatible licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
