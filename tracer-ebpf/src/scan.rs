//! Runs the head scanner on the payload of a segment.
//!
//! What comes in: a packet, and the scanner's state of its connection in map memory. What goes out: that state, changed.
//! A segment that lies inside a body costs no more than a look. Everything that the loop changes is in map memory, or is
//! written by global functions: what a program itself writes to its stack the verifier would follow exactly, step by step.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_loop, bpf_skb_load_bytes},
    macros::btf_map,
};
use tracer_ebpf::head::{self, Http, Window};

use crate::conn::clear_words;
use crate::sock;

/// What one step of the loop is given.
#[repr(C)]
struct Context {
    skb: *mut __sk_buff,
    http: *mut Http,
    payload_at: u32,
    direction: u32,
    window: Window,
    /// 1: done; 0: the steps did not suffice, or the payload could not be read.
    finished: u64,
}

/// Scans `len` bytes of payload that begin at `payload_at` of the packet and at `seq` of the stream.
///
/// # Safety
/// `skb` is the context of the running program and `http` its socket's state, in map memory.
#[inline(always)]
pub(crate) unsafe fn scan(skb: *mut __sk_buff, direction: usize, payload_at: u32, seq: u32, len: u32, http: *mut Http) {
    // SAFETY: valid as the caller says. The other direction may be scanned on another CPU at the same time: each writes
    // its own stream, and what the two share is written in the way that `Http` describes.
    let state = unsafe { &mut *http };
    if head::is_done(state, direction, seq) || head::is_inside_body(state, direction, seq, len) {
        return;
    }
    let busy = &raw mut state.streams[direction & 1].busy;
    // Sending is serialised by the socket's lock, receiving is not.
    // SAFETY: an aligned word of `state`.
    if direction == head::INGRESS && unsafe { exchange(busy, 1) } != 0 {
        head::miss(state, direction);
        return;
    }
    if direction == head::INGRESS && head::repeats(state, seq) {
        // SAFETY: as the caller says.
        if let Some(next) = unsafe { rcv_nxt(skb) } {
            head::again(state, seq, len, next);
        }
    }
    if let Some(at) = head::enter(state, direction, seq, len) {
        // SAFETY: as the caller says.
        unsafe { run(skb, direction, payload_at, at, len, state) };
    }
    if direction == head::INGRESS {
        // SAFETY: an aligned word of `state`. An exchange orders it behind everything that was written before.
        unsafe { exchange(busy, 0) };
    }
}

/// The next sequence number that TCP expects from the peer.
#[inline(never)]
unsafe fn rcv_nxt(skb: *mut __sk_buff) -> Option<u32> {
    // SAFETY: as in `scan`; both pointers are checked before their use.
    unsafe {
        let sk = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        sock::progress(sk.cast()).map(|(rcv_nxt, _)| rcv_nxt)
    }
}

/// Sets a word, atomically: what it was. (The target has no 32-bit atomics but in assembly.)
#[inline(always)]
pub(crate) unsafe fn exchange(word: *mut u32, value: u32) -> u32 {
    let mut value = value;
    // SAFETY: an exchange of a register and the word, which the caller vouches for.
    unsafe { core::arch::asm!("{0} = xchg32_32({1} + 0, {0})", inout(wreg) value, in(reg) word, options(nostack)) };
    value
}

/// [`exchange`] for a word of 64 bits.
#[inline(always)]
pub(crate) unsafe fn exchange_u64(word: *mut u64, value: u64) -> u64 {
    let mut value = value;
    // SAFETY: an exchange of a register and the word, which the caller vouches for.
    unsafe { core::arch::asm!("{0} = xchg_64({1} + 0, {0})", inout(reg) value, in(reg) word, options(nostack)) };
    value
}

/// The turns of the scanner, with the window in this stack frame.
///
/// # Safety
/// As for [`scan`]; the caller has what [`head::enter`] answered.
#[inline(always)]
unsafe fn run(skb: *mut __sk_buff, direction: usize, payload_at: u32, at: u32, len: u32, http: &mut Http) {
    let mut context = core::mem::MaybeUninit::<Context>::uninit();
    let context = context.as_mut_ptr();
    // SAFETY: every field of `context` is written before it is read, but for words of the window behind what was filled. The
    // scanner may read these, and any value of them gives the same answer. That they were not written the compiler cannot know:
    // the address of `context` goes to helpers and to functions of their own. Volatile words: an array copy becomes a loop.
    unsafe {
        (*context).skb = skb;
        (*context).http = http;
        (*context).payload_at = payload_at;
        (*context).direction = direction as u32;
        (*context).finished = 0;
        let window = &raw mut (*context).window;
        if sock::config_clear_stack() {
            clear_words::<{ head::WINDOW / 8 }>((&raw mut (*window).words).cast::<u64>());
        }
        head::begin(&mut *window, at, len);
        // Most segments need but one turn. It is cheaper outside of the loop.
        if turn(context) == 0 {
            bpf_loop(head::MAX_STEPS, step as *mut c_void, context.cast(), 0);
        }
        let finished = (&raw const (*context).finished).read_volatile() != 0;
        head::leave(http, direction, finished);
    }
}

/// A further turn, called by `bpf_loop`.
///
/// # Safety
/// As for [`turn`].
unsafe extern "C" fn step(_turn: u32, context: *mut Context) -> i64 {
    // SAFETY: `run` passes its own context, which outlives the loop.
    unsafe { turn(context) }
}

/// One turn: 1 ends them.
///
/// # Safety
/// `context` is that of [`run`].
#[inline(always)]
unsafe fn turn(context: *mut Context) -> i64 {
    // SAFETY: by the caller's word; a load is bounded by the size of the window.
    unsafe {
        let http = &mut *(*context).http;
        let direction = (*context).direction as usize;
        let window = &raw mut (*context).window;
        if let Some(at) = head::is_in_long_line(http, direction, &*window) {
            let passed = stretch((*context).skb, direction as u32, (*context).payload_at + at);
            head::pass(http, direction, &mut *window, passed);
        }
        if let Some((at, n)) = head::refill(http, direction, &mut *window) {
            let words = (&raw mut (*window).words).cast();
            if bpf_skb_load_bytes((*context).skb.cast(), (*context).payload_at + at, words, bounded(n)) != 0 {
                return 1;
            }
        }
        if head::step(http, direction, &mut *window) {
            return 0;
        }
        (&raw mut (*context).finished).write_volatile(1);
        1
    }
}

/// A place for a stretch of a long line. The stack has none.
#[repr(C)]
struct Stretch {
    /// 1: somebody reads it.
    busy: u32,
    words: [u64; head::STRETCH_WORDS],
}

/// For what is received and for what is sent.
#[btf_map]
static STRETCHES: PerCpuArray<Stretch, 2> = PerCpuArray::new();

/// [`head::stretch`] of the packet from `at` on, which must have as many bytes.
///
/// # Safety
/// `skb` is the context of the running program.
#[inline(never)]
unsafe fn stretch(skb: *mut __sk_buff, direction: u32, at: u32) -> u32 {
    let Some(place) = STRETCHES.get_ptr_mut(direction) else { return 0 };
    // SAFETY: a slot of this CPU, which only the holder of `busy` uses.
    unsafe {
        let busy = &raw mut (*place).busy;
        if exchange(busy, 1) != 0 {
            // It was interrupted by this program.
            return 0;
        }
        let words = &raw mut (*place).words;
        let mut passed = 0;
        if bpf_skb_load_bytes(skb.cast(), at, words.cast(), head::STRETCH_WORDS as u32 * 8) == 0 {
            passed = head::stretch(&*words);
        }
        exchange(busy, 0);
        passed
    }
}

/// A size of 1 to [`head::WINDOW`], so that the verifier sees it.
#[inline(always)]
fn bounded(n: u32) -> u32 {
    let mut n = u64::from(n);
    // SAFETY: registers and constants only, and the jumps stay inside.
    unsafe {
        core::arch::asm!(
            "if {0} > 0 goto +1",
            "{0} = 1",
            "if {0} < {1} goto +1",
            "{0} = {1}",
            inout(reg) n,
            const head::WINDOW,
            options(pure, nomem, nostack)
        );
    }
    n as u32
}
