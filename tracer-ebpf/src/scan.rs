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

use crate::sock;
use crate::traffic::Segment;

/// What one step of the loop is given.
#[repr(C)]
struct Context {
    skb: *mut __sk_buff,
    http: *mut Http,
    window: *mut Window,
    payload_at: u32,
    direction: u32,
    /// 1: done; 0: the steps did not suffice, or the payload could not be read.
    finished: u64,
}

/// For the bytes that are looked at: the stack has no room.
#[repr(C)]
struct Buffer {
    /// 1: a program reads there.
    busy: u32,
    /// The segment for which the window was used last, and finished, if that one left: bytes of payload, the address of its headers in
    /// memory (0: there is none), and these from the last eight bytes of the IP addresses on: ports, sequence and acknowledgment number, flags, window.
    len: u32,
    headers_at: u64,
    headers: [u64; 3],
    window: Window,
}

/// For each CPU, one; and further ones where a program was interrupted or, as newer kernels do, preempted, while it read. With none left
/// the segment is not looked at, and its direction lost. One for both directions, because of [`is_same`].
const BUFFERS: u32 = 8;
#[btf_map]
static WINDOWS: PerCpuArray<Buffer, { BUFFERS as usize }> = PerCpuArray::new();

/// Scans `len` bytes of payload that begin at `payload_at` of the packet and at `seq` of the stream.
///
/// # Safety
/// `skb` is the context of the running program and `http` its socket's state, in map memory.
#[inline(always)]
pub(crate) unsafe fn scan(skb: *mut __sk_buff, direction: usize, segment: &Segment, http: *mut Http) {
    let (seq, len) = (segment.seq, segment.len);
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
        unsafe { run(skb, direction, segment, at, state) };
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
        sock::rcv_nxt(sk.cast())
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

/// Clears a word, behind everything that was written before: for who comes next on this CPU.
#[inline(always)]
unsafe fn give_back(word: *mut u32) {
    // SAFETY: a store to the word, which the caller vouches for. In assembly, across which the compiler moves no access to memory.
    unsafe { core::arch::asm!("*(u32 *)({0} + 0) = {1}", in(reg) word, in(wreg) 0u32, options(nostack)) };
}

/// One that nobody else uses until `busy` is cleared.
#[inline(always)]
fn buffer() -> Option<*mut Buffer> {
    let buffer = WINDOWS.get_ptr_mut(0)?;
    // SAFETY: an aligned word of the map.
    if unsafe { exchange(&raw mut (*buffer).busy, 1) } == 0 {
        return Some(buffer);
    }
    WINDOWS.get_ptr_mut(another_buffer())
}

/// The number of one that is free, and was taken; [`BUFFERS`] if there is none.
#[inline(never)]
fn another_buffer() -> u32 {
    macro_rules! buffers {
        ($($i:literal)*) => { $(
            if let Some(buffer) = WINDOWS.get_ptr_mut($i)
                // SAFETY: an aligned word of the map.
                && unsafe { exchange(&raw mut (*buffer).busy, 1) } == 0
            {
                return $i;
            }
        )* };
    }
    buffers!(1 2 3 4 5 6 7);
    BUFFERS
}

/// Whether a segment is the one that left when the window was used last, and was finished. Between two processes of one host each segment passes
/// twice in a row on one CPU, as it leaves and as it arrives, and it is the same memory: whoever changes a packet on its way copies it,
/// since TCP keeps it until it is acknowledged. (What a device has received can lie where another segment was.) The headers are compared, too.
///
/// # Safety
/// `skb` is the context of the running program and `segment` of its packet; the buffer is the program's own.
#[inline(always)]
unsafe fn is_same(skb: *mut __sk_buff, direction: usize, segment: &Segment, buffer: &mut Buffer) -> bool {
    // SAFETY: by the caller's word; in front of the TCP header, of 20 bytes at least, is an IP header.
    unsafe {
        let Some(header) = segment.header else {
            buffer.headers_at = 0;
            return false;
        };
        let word = |at: usize| head::word_at::<0>(at as *const u8);
        let headers = [word(header - 8), word(header), word(header + 8)];
        let at = u64::from((*skb).data);
        // Through memory: to a verifier it is a pointer otherwise, with which not all can be done.
        let before = (&raw const buffer.headers_at).read_volatile();
        // Not the arrays, for which a loop over their bytes would be called.
        let ([a, b, c], [d, e, f]) = (headers, buffer.headers);
        let is_same = before == at && buffer.len == segment.len && a == d && b == e && c == f;
        if direction == head::INGRESS {
            buffer.headers_at = 0;
        } else {
            (&raw mut buffer.headers_at).write_volatile(at);
            buffer.len = segment.len;
            buffer.headers = headers;
        }
        is_same
    }
}

/// The turns of the scanner.
///
/// # Safety
/// As for [`scan`]; the caller has what [`head::enter`] answered.
#[inline(always)]
unsafe fn run(skb: *mut __sk_buff, direction: usize, segment: &Segment, at: u32, http: &mut Http) {
    let Some(buffer) = buffer() else {
        head::leave(http, direction, false);
        return;
    };
    let mut context = core::mem::MaybeUninit::<Context>::uninit();
    let context = context.as_mut_ptr();
    // SAFETY: every field of `context` is written before it is read; the buffer is this program's own. Words of the window behind
    // what was filled are of an earlier one: the scanner may read these, and any value of them gives the same answer.
    unsafe {
        (*context).skb = skb;
        (*context).http = http;
        (*context).window = &raw mut (*buffer).window;
        (*context).payload_at = segment.payload_at;
        (*context).direction = direction as u32;
        (*context).finished = 0;
        let same = is_same(skb, direction, segment, &mut *buffer);
        head::begin(&mut (*buffer).window, at, segment.len, same);
        // Most segments need but one turn. It is cheaper outside of the loop.
        if turn(context) == 0 {
            bpf_loop(head::MAX_STEPS, step as *mut c_void, context.cast(), 0);
        }
        let finished = (&raw const (*context).finished).read_volatile() != 0;
        head::leave(http, direction, finished);
        if !finished {
            (*buffer).headers_at = 0;
        }
        give_back(&raw mut (*buffer).busy);
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
        let window = (*context).window;
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
