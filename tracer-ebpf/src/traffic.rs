//! The packets of every socket: HTTP heads, who sent the first FIN, the last activity.
//!
//! Attached at the cgroup-v2 root, where the packets of all sockets of all network namespaces pass: at ingress before TCP
//! sees them (so with duplicates and gaps), at egress with retransmissions. Most packets cost a few instructions: a pure
//! ACK is done after its header. Every path answers 1: the packet passes.

use core::mem::offset_of;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_jiffies64, bpf_skb_load_bytes};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use tracer_ebpf::head::{self, EGRESS, INGRESS, clamp};
use tracer_ebpf::{first_end, flag, role};

use crate::conn::{self, Conn, HANDOVER, mark};
use crate::sock::tcp;
use crate::{scan, slot, sock};

/// `BPF_CGROUP_INET_INGRESS` and `BPF_CGROUP_INET_EGRESS`: pass.
const PASS: i32 = 1;

const FIN: u8 = 1 << 0;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

const IPPROTO_TCP: u8 = 6;

/// `BPF_CGROUP_INET_INGRESS` and `BPF_CGROUP_INET_EGRESS`. At ingress the listener is the socket of a segment that completes a
/// handshake. <https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/cgroup.c#L1352>
///
/// One program for both: between two processes of one host each segment passes it twice in a row, and the second time finds it
/// in the processor's cache. What is received bears the device that it came from
/// (<https://github.com/torvalds/linux/blob/v6.12/net/core/dev.c#L5509>), what a socket sends does not.
#[cgroup_skb]
fn packets(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context of a `cgroup_skb` program.
    unsafe {
        packet(skb, if (*skb).ingress_ifindex != 0 { INGRESS } else { EGRESS });
    }
    PASS
}

/// A TCP segment, as its headers say.
pub(crate) struct Segment {
    /// Where the TCP header is, if the IP header in front of it is of the usual size.
    pub(crate) header: Option<usize>,
    /// Offset of the payload in the packet.
    pub(crate) payload_at: u32,
    /// Bytes of payload.
    pub(crate) len: u32,
    /// Sequence number of the first byte of payload.
    pub(crate) seq: u32,
    flags: u8,
    source_port: u16,
    dest_port: u16,
}

/// Reads the headers, which are in the linear part of the packet.
///
/// # Safety
/// `skb` is the context of a `cgroup_skb` program.
#[inline(always)]
unsafe fn segment(skb: *mut __sk_buff) -> Option<Segment> {
    // SAFETY: by the caller's word; every load from the packet is checked against its end first.
    unsafe {
        let (data, end) = ((*skb).data as usize, (*skb).data_end as usize);
        if data + 40 > end {
            return None;
        }
        let first = *(data as *const u8);
        let (header, at, usual) = if first == 0x45 {
            if *((data + 9) as *const u8) != IPPROTO_TCP {
                return None;
            }
            (data + 20, 20, true)
        } else if first >> 4 == 6 {
            if *((data + 6) as *const u8) != IPPROTO_TCP {
                return behind_extensions(skb);
            }
            if data + 60 > end {
                return None;
            }
            (data + 40, 40, true)
        } else if first >> 4 == 4 {
            // IPv4 with options.
            if *((data + 9) as *const u8) != IPPROTO_TCP {
                return None;
            }
            let ip = clamp::<15>(u64::from(first)) as usize * 4;
            if ip < 20 || data + ip + 20 > end {
                return None;
            }
            (data + ip, ip as u32, false)
        } else {
            return None;
        };
        Some(Segment::new(
            (*skb).len,
            at,
            usual.then_some(header),
            [word::<0>(header), word::<4>(header), word::<12>(header)],
        ))
    }
}

/// The word `N` bytes behind `at`, which is in network byte order.
///
/// # Safety
/// It can be read.
#[inline(always)]
unsafe fn word<const N: usize>(at: usize) -> u32 {
    let word: u32;
    // SAFETY: by the caller's word. In assembly: where it is not known to be aligned, rustc would load byte by byte.
    unsafe {
        core::arch::asm!("{0} = *(u32 *)({1} + {2})", out(wreg) word, in(reg) at, const N, options(pure, readonly, nostack))
    };
    u32::from_be(word)
}

impl Segment {
    /// From the words of the TCP header, which is at `at` of a packet of `packet_len` bytes, that hold the ports, the
    /// sequence number, and the header's length with the flags.
    #[inline(always)]
    fn new(packet_len: u32, at: u32, header: Option<usize>, [ports, seq, offset_flags]: [u32; 3]) -> Self {
        let payload_at = at + (offset_flags >> 28) * 4;
        let flags = (offset_flags >> 16) as u8;
        // The payload of a RST is a text for people.
        let len = if flags & RST != 0 { 0 } else { packet_len.saturating_sub(payload_at) };
        Self {
            header,
            payload_at,
            len,
            seq: seq.wrapping_add(u32::from(flags & SYN != 0)),
            flags,
            source_port: (ports >> 16) as u16,
            dest_port: ports as u16,
        }
    }
}

/// TCP behind IPv6 extension headers: up to four of those that end systems send. They are rare; a segment behind others
/// counts as not seen.
///
/// # Safety
/// As for [`segment`].
#[inline(never)]
unsafe fn behind_extensions(skb: *mut __sk_buff) -> Option<Segment> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION: u8 = 60;
    // SAFETY: by the caller's word; each load goes to as many bytes as there are.
    unsafe {
        let mut next = [0u8; 2];
        if bpf_skb_load_bytes(skb.cast(), 6, next.as_mut_ptr().cast(), 1) != 0 {
            return None;
        }
        let mut at = 40;
        macro_rules! header {
            () => {
                if next[0] != IPPROTO_TCP {
                    if !matches!(next[0], HOP_BY_HOP | ROUTING | DESTINATION)
                        || bpf_skb_load_bytes(skb.cast(), at, next.as_mut_ptr().cast(), 2) != 0
                    {
                        return None;
                    }
                    at += (u32::from(next[1]) + 1) * 8;
                }
            };
        }
        header!();
        header!();
        header!();
        header!();
        let mut words = [0u32; 4];
        if next[0] != IPPROTO_TCP || bpf_skb_load_bytes(skb.cast(), at, words.as_mut_ptr().cast(), 16) != 0 {
            return None;
        }
        let [ports, seq, _, offset_flags] = words.map(u32::from_be);
        Some(Segment::new((*skb).len, at, None, [ports, seq, offset_flags]))
    }
}

/// # Safety
/// `skb` is the context of a `cgroup_skb` program.
#[inline(always)]
unsafe fn packet(skb: *mut __sk_buff, direction: usize) {
    // SAFETY: by the caller's word; `sk` is checked before its use.
    unsafe {
        let Some(mut segment) = segment(skb) else {
            if direction == INGRESS {
                forget_handover();
            }
            return;
        };
        let carries = segment.len != 0 || segment.flags & (FIN | RST) != 0;
        if direction == EGRESS && !carries {
            return;
        }
        let sk = (*skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return;
        }
        // On some kernels a RST that answers a segment bears the socket. Where it is the end all the same, because a process or a
        // timer makes it so, `tcp_send_reset` tells.
        if direction == EGRESS && segment.flags & RST != 0 && lives_on_after_a_reset((*sk).state as i32) {
            return;
        }
        if direction == INGRESS {
            if (*sk).state == tcp::LISTEN as u32 {
                listener(skb, &segment);
                return;
            }
            if !carries {
                return;
            }
            if (*sk).state == tcp::SYN_SENT as u32 {
                // TCP takes no payload and no FIN yet: what comes now is an older connection's, or will come again.
                if segment.flags & RST == 0 {
                    return;
                }
                segment.flags = RST;
            } else if segment.flags & (ACK | RST) == 0 {
                // Nor does it take any of what acknowledges nothing.
                return;
            }
        }
        if !conn::port_passes(segment.source_port, segment.dest_port) {
            return;
        }
        let cookie = cookie(skb, sk.cast());
        let Some(conn) = slot::get_or_create(sk.cast(), cookie) else { return };
        if conn.cookie == 0 {
            first_sight(conn, cookie, (*sk).state as i32, conn::now());
        }
        if direction == INGRESS && segment.flags & RST == 0 && conn.rst_seen != 0 && !sock::backlogs(sk.cast()) {
            // TCP has had that RST, and did not take it.
            conn.rst_seen = 0;
        }
        if segment.len != 0 {
            active(skb, direction, conn, &segment);
        }
        if segment.flags & (FIN | RST) != 0 {
            if direction == INGRESS {
                end_arrives(sk.cast(), conn, &segment);
            } else {
                end_leaves(skb, (*sk).state as i32, conn, &segment);
            }
        }
        // Last: the verifier follows all that comes behind it once for each of the many ways through it.
        if segment.len != 0 {
            scan::scan(skb, direction, &segment, &raw mut conn.http);
        }
    }
}

/// The cookie of a packet's socket, made now if it had none.
///
/// # Safety
/// `skb` is the context of a `cgroup_skb` program, and `sk` its socket, checked against NULL.
#[inline(always)]
unsafe fn cookie(skb: *mut __sk_buff, sk: sock::Sock) -> u64 {
    // SAFETY: by the caller's word.
    unsafe {
        let sk = sock::of_packet(sk);
        let known = if sk.is_null() { 0 } else { sock::known_cookie(sk) };
        if known == 0 { bpf_get_socket_cookie(skb.cast()) } else { known }
    }
}

/// When a packet came or leaves. Asked only where it is needed: reading the clock is the dearest thing that most segments
/// cost. What leaves bears the time at which TCP made it, in the same clock (where it is to leave later, the time that it was
/// given); SYN cookies and the like bear none.
///
/// # Safety
/// `skb` is the context of a `cgroup_skb` program.
#[inline(always)]
unsafe fn time(skb: *mut __sk_buff, direction: usize) -> u64 {
    if direction == EGRESS {
        // SAFETY: by the caller's word.
        let made = unsafe { (&raw const (*skb).tstamp).read_volatile() };
        if made != 0 {
            return made;
        }
    }
    conn::now()
}

/// # Safety
/// `sk` is `__sk_buff.sk` checked against NULL.
#[inline(always)]
unsafe fn end_arrives(sk: sock::Sock, conn: &mut Conn, segment: &Segment) {
    if segment.flags & RST != 0 {
        // Whether TCP takes it, `tcp_receive_reset` tells.
        conn.rst_seen = 1;
    } else if conn.first_end == first_end::NONE {
        // Not one of an older connection. One that TCP cannot process yet, because something before it is missing, counts:
        // the peer has sent it.
        // SAFETY: by the caller's word.
        if unsafe { sock::expects(sk, segment.seq.wrapping_add(segment.len)) } {
            conn.first_end(first_end::REMOTE, conn::now());
        }
    }
}

/// Whether a RST that answers a segment is not the end of a socket in this state. A listener refuses others; and before the
/// handshake is complete, a segment of an old connection between the same addresses is answered so, and the new one goes on
/// (RFC 9293, 3.10.7.2 to 3.10.7.4).
#[inline(always)]
pub(crate) fn lives_on_after_a_reset(state: i32) -> bool {
    matches!(state, tcp::LISTEN | tcp::SYN_SENT | tcp::SYN_RECV)
}

/// `state` is that of the socket.
///
/// # Safety
/// `skb` is the context of a `cgroup_skb` program.
#[inline(always)]
unsafe fn end_leaves(skb: *mut __sk_buff, state: i32, conn: &mut Conn, segment: &Segment) {
    if segment.flags & FIN != 0 {
        if conn.flags & flag::FIN_SENT == 0 && state == tcp::FIN_WAIT1 && conn.first_end == first_end::REMOTE {
            // The peer's is here, but was not processed when ours was sent: neither acknowledges the other.
            conn.first_end = first_end::BOTH;
        }
        conn.flags |= flag::FIN_SENT;
    }
    if conn.first_end == first_end::NONE {
        // SAFETY: by the caller's word.
        conn.first_end(first_end::LOCAL, unsafe { time(skb, EGRESS) });
    }
}

/// Notes the time of payload that is new, and came before the end: not that of a retransmission or a probe. Of what arrives
/// within one tick of the kernel (1 to 10 ms), that of the first: there may be many segments, and the clock is dear.
///
/// # Safety
/// `skb` is the context of a `cgroup_skb` program.
#[inline(always)]
unsafe fn active(skb: *mut __sk_buff, direction: usize, conn: &mut Conn, segment: &Segment) {
    let end = segment.seq.wrapping_add(segment.len);
    let stream = &mut conn.http.streams[direction & 1];
    let known = stream.payload_end;
    if known == 0 || (end.wrapping_sub(known) as i32) > 0 {
        stream.payload_end = end;
        if conn.http.ending.at_ns == 0 {
            if direction == INGRESS {
                // SAFETY: the helper takes nothing.
                let tick = unsafe { bpf_jiffies64() } as u32;
                if stream.payload_tick == tick && stream.payload_ns != 0 {
                    return;
                }
                stream.payload_tick = tick;
            }
            // SAFETY: by the caller's word.
            stream.payload_ns = unsafe { time(skb, direction) };
        }
    }
}

/// A segment whose socket is still the listener: it completes a handshake, or opens one. With `TCP_DEFER_ACCEPT`, TCP
/// Fast Open or a lost ACK it carries the first request. In the same softirq, before any other segment on this CPU, TCP
/// clones the new socket, and `close` hands over what is read here.
///
/// # Safety
/// `skb` is the context of a `cgroup_skb` program.
#[inline(always)]
unsafe fn listener(skb: *mut __sk_buff, segment: &Segment) {
    forget_handover();
    let Some(handover) = HANDOVER.get_ptr_mut(0) else { return };
    // SAFETY: a slot of this CPU; only softirq uses it, which does not nest.
    unsafe {
        if segment.len == 0 || !conn::port_passes(segment.source_port, segment.dest_port) {
            return;
        }
        conn::clear_words::<{ size_of::<tracer_ebpf::head::Http>() / 8 }>((&raw mut (*handover).http).cast());
        (*handover).http.streams[INGRESS].payload_ns = conn::now();
        (*handover).seq = segment.seq;
        (*handover).len = segment.len;
        (*handover).syn = u32::from(segment.flags & SYN != 0);
        (*handover).http.full_target = u8::from(sock::config_full_target());
        head::role(&mut (*handover).http, role::SERVER);
        scan::scan(skb, INGRESS, segment, &raw mut (*handover).http);
        (*handover).valid = 1;
    }
}

/// What was read for a socket that was not cloned then must not be taken for the next one's.
#[inline(always)]
fn forget_handover() {
    if let Some(handover) = HANDOVER.get_ptr_mut(0) {
        // SAFETY: as in `listener`.
        unsafe { (*handover).valid = 0 };
    }
}

/// The handshake is complete: the first byte of the peer will be, or was, `rcv_nxt`, and our first one is `snd_una`.
#[inline(always)]
pub(crate) fn established(conn: &mut Conn, rcv_nxt: u32, snd_una: u32) {
    let handed = conn.marks & mark::HANDED_OVER != 0;
    // A segment that was read before the socket was cloned. With TCP Fast Open it is counted by now.
    let (seq, len) = if handed { (conn.handed_seq, conn.handed_len) } else { (rcv_nxt, 0) };
    let begins = if conn.marks & mark::HANDED_SYN != 0 { seq.wrapping_add(len) } else { seq };
    let claimed = begins != rcv_nxt && restart(conn);
    conn.http.streams[INGRESS].payload_end = seq.wrapping_add(len);
    let role = conn.role;
    head::role(&mut conn.http, role);
    head::sync(&mut conn.http, INGRESS, rcv_nxt);
    head::sync(&mut conn.http, EGRESS, snd_una);
    if begins != rcv_nxt {
        head::set_aside(&mut conn.http, seq, len);
    }
    if claimed {
        // SAFETY: an aligned word of `conn`.
        unsafe { scan::exchange(&raw mut conn.http.streams[INGRESS].busy, 0) };
    }
}

/// What was read before the socket was cloned was not the beginning: another segment, on its way still, holds that. Answers
/// whether it was forgotten; then no segment is scanned until the caller gives `busy` back.
#[inline(always)]
fn restart(conn: &mut Conn) -> bool {
    let full_target = conn.http.full_target;
    // SAFETY: an aligned word of `conn`; and `Http` is so many words. (`head::sync` sets what is beside `busy`.)
    unsafe {
        if scan::exchange(&raw mut conn.http.streams[INGRESS].busy, 1) != 0 {
            // A segment is being read on another CPU right now, from the wrong beginning.
            head::miss(&mut conn.http, INGRESS);
            return false;
        }
        // All but what is not the scanner's, the time of the payload, and `busy`.
        const BESIDE: usize = offset_of!(head::Http, ending) / 8;
        const STREAM: usize = size_of::<head::Stream>() / 8;
        const PAYLOAD: usize = offset_of!(head::Stream, payload_ns) / 8;
        const BUSY: usize = offset_of!(head::Stream, busy) / 8;
        let words = (&raw mut conn.http).cast::<u64>();
        conn::clear_words::<BESIDE>(words);
        let stream = (&raw mut conn.http.streams[INGRESS]).cast::<u64>();
        conn::clear_words::<PAYLOAD>(stream);
        conn::clear_words::<{ STREAM - BUSY - 1 }>(stream.add(BUSY + 1));
        let stream = (&raw mut conn.http.streams[EGRESS]).cast::<u64>();
        conn::clear_words::<PAYLOAD>(stream);
        conn::clear_words::<{ STREAM - BUSY }>(stream.add(BUSY));
    }
    conn.http.full_target = full_target;
    true
}

/// The first sight of a socket, in `state`. The cookie is made by then, so that the mini-socket of a later TIME_WAIT
/// inherits it.
#[inline(always)]
pub(crate) fn first_sight(conn: &mut Conn, cookie: u64, state: i32, now: u64) {
    // SAFETY: an aligned word of `conn`.
    if unsafe { scan::exchange_u64(&raw mut conn.cookie, cookie) } != 0 {
        return;
    }
    conn.http.full_target = u8::from(sock::config_full_target());
    match state {
        // Not older than the programs, or nothing has been missed.
        tcp::SYN_SENT => conn.role = role::CLIENT,
        tcp::SYN_RECV => {}
        _ => {
            conn.older = 1;
            conn.established_ns = now;
            head::mid_stream(&mut conn.http);
            // Whose FIN came first is told by the state, when it came is not.
            conn.first_end = match state {
                tcp::FIN_WAIT1 | tcp::FIN_WAIT2 => first_end::LOCAL,
                tcp::CLOSE_WAIT | tcp::LAST_ACK => first_end::REMOTE,
                tcp::CLOSING => first_end::BOTH,
                _ => first_end::NONE,
            };
            conn.push_state(state, now);
        }
    }
}
