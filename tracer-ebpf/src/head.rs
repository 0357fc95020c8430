//! The HTTP/1.x head scanner: payload bytes of one connection in, a verdict on its heads out.
//!
//! What comes in: the payload of a socket's segments, in both directions, cut at any byte, duplicated or with gaps. What
//! goes out: [`Exchange`], which leaves the kernel as it is. It must never take a body for a head or a head for a body,
//! never say "absent" of what it has not seen, and never copy anything else of a head out.

use core::mem::offset_of;

/// Bytes of the target that are kept.
pub const TARGET: usize = 64;
/// Bytes of the method that are kept; a longer method is not taken for HTTP.
pub const METHOD: usize = 16;

/// `Connection` tokens of one head ([`Exchange::request_connection`], [`Exchange::response_connection`]).
pub mod token {
    /// `close`
    pub const CLOSE: u8 = 1 << 0;
    /// `keep-alive`
    pub const KEEP_ALIVE: u8 = 1 << 1;
    /// `upgrade`
    pub const UPGRADE: u8 = 1 << 2;
    /// Any other token, or a `Connection` header that is empty or malformed.
    pub const OTHER: u8 = 1 << 3;
    /// The whole head was seen; without it the other bits are what was seen so far.
    pub const COMPLETE: u8 = 1 << 7;
}

/// What the payload is ([`Exchange::protocol`]).
pub mod protocol {
    /// No payload yet.
    pub const NONE: u8 = 0;
    /// Payload whose kind is not decided: the first bytes were not seen, or are too few.
    pub const UNDECIDED: u8 = 1;
    /// HTTP/1.x: at least one whole start line was seen.
    pub const HTTP1: u8 = 2;
    /// HTTP/2 with prior knowledge or after an upgrade.
    pub const H2: u8 = 3;
    /// WebSocket, after a 101.
    pub const WEBSOCKET: u8 = 4;
    /// A TLS record.
    pub const TLS: u8 = 5;
    /// Anything else.
    pub const OTHER: u8 = 6;
}

/// Bits of [`Exchange::flags`].
pub mod bit {
    /// Part of the request direction was not seen: further requests are unobserved.
    pub const REQUESTS_LOST: u16 = 1 << 0;
    /// Likewise of the response direction.
    pub const RESPONSES_LOST: u16 = 1 << 1;
    /// `target` holds not all of it.
    pub const TARGET_TRUNCATED: u16 = 1 << 2;
    /// The last final response announced a body (`Content-Length` or chunked) that has not ended.
    pub const BODY_INCOMPLETE: u16 = 1 << 3;
    /// The last final response's body ends with the connection (neither `Content-Length` nor chunked), or where cannot be
    /// told.
    pub const BODY_UNTIL_CLOSE: u16 = 1 << 4;
    /// A 101 was answered (or a `CONNECT` accepted): what follows is not HTTP/1.x.
    pub const UPGRADED: u16 = 1 << 5;
    /// The response's `Keep-Alive` had `timeout`.
    pub const HAS_TIMEOUT: u16 = 1 << 6;
    /// The response's `Keep-Alive` had `max`.
    pub const HAS_MAX: u16 = 1 << 7;
    /// Requests arrive at this socket: it is the server's.
    pub const REQUESTS_IN: u16 = 1 << 8;
    /// Requests leave this socket: it is the client's.
    pub const REQUESTS_OUT: u16 = 1 << 9;
    /// The last request announced a body that has not ended, or whose end cannot be told.
    pub const REQUEST_INCOMPLETE: u16 = 1 << 10;
}

/// The last exchange on a connection, with counts for all of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "bpf"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Exchange {
    /// Request heads seen whole.
    pub requests: u32,
    /// Final response heads seen whole (1xx other than 101 do not count).
    pub responses: u32,
    /// `timeout` of the last response's `Keep-Alive`, seconds.
    pub keep_alive_timeout_s: u32,
    /// `max` of the last response's `Keep-Alive`.
    pub keep_alive_max: u32,
    /// [`bit`]s.
    pub flags: u16,
    /// Status code of the last final response.
    pub status: u16,
    /// [`token`]s of the last request.
    pub request_connection: u8,
    /// [`token`]s of the last final response.
    pub response_connection: u8,
    /// 10 or 11; 0: the start line of the last request was not seen whole, `method` and `target` are not set.
    pub request_version: u8,
    /// 10 or 11; 0: no status line of a response to the last request was seen whole, `status` is not set.
    pub response_version: u8,
    /// One of [`protocol`].
    pub protocol: u8,
    /// Bytes of `method` that are set.
    pub method_len: u8,
    /// Bytes of `target` that are set.
    pub target_len: u8,
    #[doc(hidden)]
    pub _pad: [u8; 5],
    /// The method, as sent.
    pub method: [u8; METHOD],
    /// The target, as sent, without its query string unless asked for. Attacker-controlled bytes.
    pub target: [u8; TARGET],
}
const _: () = assert!(size_of::<Exchange>() == 112);

/// The direction of what the socket receives: the index of its [`Stream`] and the `D` of the functions below.
pub const INGRESS: usize = 0;
/// The direction of what the socket sends.
pub const EGRESS: usize = 1;

/// Bytes of payload that the window is filled with at most: all of most heads. What is filled in vain is the body's, which may be in no
/// cache.
const FILL: u32 = 512;
/// Likewise in a line of no interest, which is passed over in blocks.
pub const WINDOW: usize = 1024;
/// Bytes that are searched at once.
const REACH: usize = 64;
const WINDOW_WORDS: usize = (WINDOW + REACH) / 8;
/// What is looked at lies up to here: [`REACH`] bytes follow.
const LAST_POSITION: u32 = (WINDOW - 1) as u32;
// Masks are made of it.
const _: () = assert!(WINDOW.is_power_of_two() && FILL as usize > REACH && FILL as usize <= WINDOW);

/// The bytes of a segment that [`step`] reads, and how far it is. It does not belong to the socket, whose state two
/// processors share: what is written here is no other's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Position in the current segment, and its length.
    at: u32,
    len: u32,
    /// Where in the segment the window begins, and how much of it is filled.
    from: u32,
    filled: u32,
    /// The last position in the window that may be looked at: what is filled goes on for [`REACH`] bytes, or to the segment's end.
    last: u32,
    lines: Lines,
    /// To be filled where [`refill`] says so. Behind what is filled may be anything, another connection's head as well.
    pub words: [u64; WINDOW_WORDS],
}

impl Window {
    /// With nothing in it.
    pub const EMPTY: Self =
        Self { at: 0, len: 0, from: 0, filled: 0, last: 0, lines: Lines::NONE, words: [0; WINDOW_WORDS] };
}

/// What the lines of a head say, if all of them are usual: what [`walk`] needs to take them in again without reading them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Lines {
    /// Where in the segment they begin, behind the start line; 0: these are not known.
    from: u32,
    /// Behind the end of the head; 0: not reached yet.
    to: u32,
    /// The `Content-Length`, if [`framing`] says that there was one.
    length: u64,
    /// Of the head: [`kind`].
    kind: u8,
    /// [`framing`] bits.
    framing: u8,
    /// `Connection` tokens.
    tokens: u8,
    _pad: [u8; 5],
}

impl Lines {
    const NONE: Self = Self { from: 0, to: 0, length: 0, kind: 0, framing: 0, tokens: 0, _pad: [0; 5] };
}

/// Longest head that is followed (RFC 9112 names no limit; common servers stop at 8 to 64 KiB).
pub const MAX_HEAD: u32 = 64 * 1024;
/// Steps that one segment may take. One takes in up to 24 usual lines, and of any other at least a byte, or else the next one does: so
/// only a hostile segment comes near. Its direction is then lost.
pub const MAX_STEPS: u32 = 16 * 1024;
/// Requests that may be outstanding, as many as `Http::heads` has bits.
const MAX_OUTSTANDING: u32 = 64;

/// Whether the first bytes of `word` are `$text` (in lower case), in any case.
macro_rules! begins {
    ($word:expr, $text:literal) => {{
        const WORD: u64 = word_of($text);
        const CASE: u64 = case_of($text);
        const MASK: u64 = u64::MAX >> (64 - 8 * $text.len());
        ($word | CASE) & MASK == WORD
    }};
}

/// What a direction carries ([`Stream::kind`]).
mod kind {
    pub(super) const UNKNOWN: u8 = 0;
    pub(super) const REQUESTS: u8 = 1;
    pub(super) const RESPONSES: u8 = 2;
}

/// Where in a message the next byte is ([`Stream::phase`]). The order matters: see the ranges below.
mod phase {
    /// Before the first byte of a head.
    pub(super) const START: u8 = 0;
    /// After an `H` that begins either `HEAD` or `HTTP/`, in a direction of unknown kind.
    pub(super) const START_H: u8 = 1;
    /// After the first, the second byte of what may be a TLS record.
    pub(super) const TLS_MAJOR: u8 = 2;
    pub(super) const TLS_MINOR: u8 = 3;
    pub(super) const METHOD: u8 = 4;
    /// The part of the target that is kept, and the part that is not.
    pub(super) const TARGET: u8 = 5;
    pub(super) const TARGET_REST: u8 = 6;
    pub(super) const VERSION: u8 = 7;
    pub(super) const VERSION_END: u8 = 8;
    pub(super) const VERSION_LF: u8 = 9;
    pub(super) const STATUS_VERSION: u8 = 10;
    pub(super) const STATUS_SP: u8 = 11;
    pub(super) const STATUS_CODE: u8 = 12;
    pub(super) const STATUS_END: u8 = 13;
    pub(super) const REASON: u8 = 14;
    /// Before the first byte of a line of the head.
    pub(super) const LINE: u8 = 15;
    pub(super) const LINE_LF: u8 = 16;
    pub(super) const NAME: u8 = 17;
    pub(super) const VALUE: u8 = 18;
    /// In a line of no interest. The last phase of a head.
    pub(super) const SKIP: u8 = 19;
    pub(super) const CHUNK_SIZE: u8 = 20;
    pub(super) const CHUNK_EXT: u8 = 21;
    /// Behind the data of a chunk.
    pub(super) const CHUNK_END: u8 = 22;
    pub(super) const CHUNK_LF: u8 = 23;
    pub(super) const TRAILER: u8 = 24;
    pub(super) const TRAILER_LF: u8 = 25;
    pub(super) const TRAILER_SKIP: u8 = 26;
    /// In the header of the PROXY protocol, in front of all else: version 1 is a line, version 2 binary.
    pub(super) const PROXY_LINE: u8 = 27;
    pub(super) const PROXY: u8 = 28;
    /// `Stream::length` bytes to pass over.
    pub(super) const BODY: u8 = 29;
    pub(super) const CHUNK_DATA: u8 = 30;
    /// Mid-stream: ignore segments until one begins like a head.
    pub(super) const HUNT: u8 = 31;
    /// Behind a head whose framing is unknown: the next byte loses the direction.
    pub(super) const UNFRAMED: u8 = 32;
    /// Behind the head of a `CONNECT`: likewise, unless its answer comes first.
    pub(super) const CONNECT: u8 = 33;
    /// The rest of the connection is body.
    pub(super) const UNTIL_CLOSE: u8 = 34;
    pub(super) const LOST: u8 = 35;
    /// Only within a step: see [`super::reject`].
    pub(super) const REJECTED: u8 = 36;
}

/// Fields of interest ([`Stream::field`]).
mod field {
    pub(super) const NONE: u8 = 0;
    pub(super) const CONNECTION: u8 = 1;
    pub(super) const CONTENT_LENGTH: u8 = 2;
    pub(super) const TRANSFER_ENCODING: u8 = 3;
    pub(super) const KEEP_ALIVE: u8 = 4;
    pub(super) const UPGRADE: u8 = 5;
}

/// What the head in progress said about its body, and about an upgrade ([`Stream::framing`]).
mod framing {
    /// A `Connection` field was seen.
    pub(super) const CONNECTION: u8 = 1 << 0;
    /// A valid `Content-Length` was seen.
    pub(super) const LENGTH: u8 = 1 << 1;
    /// A malformed or conflicting one was.
    pub(super) const LENGTH_BAD: u8 = 1 << 2;
    /// A `Transfer-Encoding` was seen.
    pub(super) const CODED: u8 = 1 << 3;
    /// Its last coding is `chunked`.
    pub(super) const CHUNKED: u8 = 1 << 4;
    pub(super) const WEBSOCKET: u8 = 1 << 5;
    pub(super) const H2C: u8 = 1 << 6;
}

/// Bits of [`Stream::marks`].
mod mark {
    /// `next` is set.
    pub(super) const SYNCED: u8 = 1 << 0;
    /// Found by [`phase::HUNT`], and the start line is not whole yet.
    pub(super) const PROVISIONAL: u8 = 1 << 1;
    /// White space was seen behind the current list element: another byte makes it unknown.
    pub(super) const GAP: u8 = 1 << 2;
}

/// Words that a name or a list element begins with ([`Stream::part`]); what follows is in `Stream::word`.
mod part {
    pub(super) const NONE: u8 = 0;
    pub(super) const CONNECTI: u8 = 1;
    pub(super) const CONTENT: u8 = 2;
    pub(super) const TRANSFER: u8 = 3;
    pub(super) const TRANSFER_ENCODIN: u8 = 4;
    pub(super) const KEEP_ALI: u8 = 5;
    pub(super) const WEBSOCKE: u8 = 6;
    /// Parameters of `Keep-Alive`: `word` is the number behind the `=`.
    pub(super) const TIMEOUT: u8 = 7;
    pub(super) const MAX: u8 = 8;
    pub(super) const OTHER: u8 = 9;
}

/// `Stream::count` of a list element that cannot be any known one.
const SPOILED: u8 = u8::MAX;

/// The parse state of one direction. All zero is its valid initial state.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "bpf"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Stream {
    /// In a body: bytes to pass over. In a head: its `Content-Length`. In a method: its bytes 8 to 15.
    length: u64,
    /// The name, list element or number that is being collected, and the first bytes of a method.
    word: u64,
    /// When new payload passed last, by the clock of all records; 0: none yet. (Here, and so is what belongs to it, because
    /// this cache line is at hand with each segment.)
    pub payload_ns: u64,
    /// Held by the program that scans this direction, for [`enter`] to [`leave`]: ingress can run on two CPUs at once.
    pub busy: u32,
    /// Sequence number of the first byte that has not been looked at.
    next: u32,
    /// Bytes of the head in progress.
    head: u32,
    /// Sequence number after the last new payload byte; 0: none yet.
    pub payload_end: u32,
    /// When that was: the low half of the kernel's count of ticks.
    pub payload_tick: u32,
    phase: u8,
    kind: u8,
    marks: u8,
    /// Set by [`miss`], on another CPU than the one that holds `busy`.
    missed: u8,
    /// Of the head in progress, as what follows: a word, which [`begin_head`] clears.
    status: u16,
    version: u8,
    field: u8,
    /// Bytes or digits collected.
    count: u8,
    part: u8,
    /// `Connection` tokens.
    tokens: u8,
    framing: u8,
    _pad: [u8; 8],
}

/// Who ended a connection, and when. No matter of the scanner, but it fills a cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "bpf"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Ending {
    /// The process that closed the socket.
    pub closer: crate::Task,
    /// When the first FIN or RST was sent or received; 0: not yet, or before the programs were there.
    pub at_ns: u64,
}

/// The scanner's state of one connection. It lives in socket storage; all zero is its valid initial state.
///
/// The two directions of a connection may be scanned at once. Each writes its own [`Stream`]; what they share is either
/// changed atomically (`exchange.flags`), or is written by one direction alone unless requests are pipelined.
///
/// Between two processes on one host each direction has a processor of its own, and a cache line that both write travels
/// between them with each message, for as much time as all the rest of a scan takes. So what both write for each message is in
/// the first line, with the exchange up to its method. The next two change seldom, if what is the same is not written again,
/// and then each direction has its own. That holds where this begins with a line.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "bpf"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Http {
    /// Request heads begun; of them those whose method is known; of those begun the ones that were answered.
    begun: u32,
    named: u32,
    answered: u32,
    /// Not 0: nothing in this connection can change the verdict any more; [`enter`] returns at once.
    pub stopped: u8,
    /// Not 0: the target is kept with its query string. To be set before the first segment.
    pub full_target: u8,
    /// The last request is a `CONNECT`.
    connect: u8,
    /// The role was told, not found.
    told: u8,
    /// Of what is received: the sequence number behind the last segment that was looked at, rather than passed over.
    looked: u32,
    /// Likewise: where what came too early begins and ends; nothing did if both are the same. See [`set_aside`].
    aside_at: u32,
    aside_end: u32,
    /// Likewise, when this end closed: behind what was looked at and not received by then; 0: nothing was.
    not_received: u32,
    /// The verdict, right at any moment.
    pub exchange: Exchange,
    /// Whether a request is a `HEAD`, by its number modulo 64.
    heads: u64,
    /// Not the scanner's.
    pub ending: Ending,
    /// [`INGRESS`], [`EGRESS`].
    pub streams: [Stream; 2],
}
const _: () = assert!(size_of::<Stream>() == 64);
const _: () = assert!(size_of::<Http>() == 320);
const _: () = assert!((offset_of!(Http, exchange) + offset_of!(Exchange, method)) % 64 == 0);
const _: () = assert!(offset_of!(Http, streams) % 64 == 0);

impl Http {
    /// The initial state.
    pub const ZERO: Self = {
        // SAFETY: every field is an integer, for which zero is a value.
        unsafe { core::mem::zeroed() }
    };
}

/// Says which direction carries requests, where that is known: `role` is one of [`crate::role`].
#[inline(always)]
pub fn role(http: &mut Http, role: u8) {
    if role == crate::role::CLIENT {
        http.told = 1;
        decide(http, EGRESS, kind::REQUESTS);
    } else if role == crate::role::SERVER {
        http.told = 1;
        decide(http, INGRESS, kind::REQUESTS);
    }
}

/// Says where the payload of a direction begins. Without it, it begins with the first segment seen.
#[inline(always)]
pub fn sync(http: &mut Http, direction: usize, next: u32) {
    let s = stream(http, direction);
    if s.marks & mark::SYNCED == 0 {
        s.marks |= mark::SYNCED;
        s.next = next;
        if direction == INGRESS {
            http.looked = next;
        }
    }
}

/// Says that the connection is older than the programs: what comes first may be the middle of a message.
///
/// Each direction is then ignored until a segment begins like a head: with a known method and a space, and in the other
/// direction, once a request was found, with `HTTP/1.`. What remains is the risk that a segment of a *body* begins so and
/// has a whole valid start line; and that with pipelining the first response found answers an earlier request.
#[inline(always)]
pub fn mid_stream(http: &mut Http) {
    for s in &mut http.streams {
        if s.phase == phase::START && s.marks & mark::SYNCED == 0 {
            s.phase = phase::HUNT;
        }
    }
}

/// Gives a direction up: something of it was missed.
#[inline(always)]
pub fn lose(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    s.phase = phase::LOST;
    let kind = s.kind;
    tell_lost(http, kind);
}

/// [`lose`] for a program that finds `busy` held by another CPU: the verdict says so at once, the scan stops soon.
#[inline(always)]
pub fn miss(http: &mut Http, direction: usize) {
    stream(http, direction).missed = 1;
    let kind = stream(http, direction).kind;
    tell_lost(http, kind);
}

/// Puts bytes aside that came too early: others before them, which are not part of a body, have not come yet. The segments
/// that hold those will come; these may come again, or not. Until then nobody knows what they are.
///
/// Only where they begin and end is kept, over all of them: if they turn out to lie in a body, they are passed over
/// ([`pass_aside`]); if they do not, and do not come again, the direction is lost ([`settle`]).
#[inline(always)]
pub fn set_aside(http: &mut Http, seq: u32, len: u32) {
    let end = seq.wrapping_add(len);
    let none = http.aside_at == http.aside_end;
    if none || (seq.wrapping_sub(http.aside_at) as i32) < 0 {
        http.aside_at = seq;
    }
    if none || (end.wrapping_sub(http.aside_end) as i32) > 0 {
        http.aside_end = end;
    }
}

/// Whether it is not known yet what was put aside: it has not come again, and does not lie in a body either.
#[inline(never)]
fn aside_is_unknown(http: &mut Http) -> bool {
    let (at, end) = (http.aside_at, http.aside_end);
    let s = stream(http, INGRESS);
    let behind = end.wrapping_sub(s.next) as i32;
    if behind <= 0 || s.phase == phase::HUNT {
        return false;
    }
    let reached = at.wrapping_sub(s.next) as i32 <= 0;
    let in_body = (s.phase == phase::BODY || s.phase == phase::CHUNK_DATA) && s.length >= behind as u64;
    !(reached && in_body)
}

/// Passes over what was put aside, once it is known.
#[inline(always)]
fn pass_aside(http: &mut Http) {
    if aside_is_unknown(http) {
        return;
    }
    let end = http.aside_end;
    http.aside_at = end;
    let s = stream(http, INGRESS);
    let behind = end.wrapping_sub(s.next) as i32;
    if behind > 0 && (s.phase == phase::BODY || s.phase == phase::CHUNK_DATA) {
        s.length = s.length.wrapping_sub(behind as u64);
        s.next = end;
        if s.length == 0 {
            end_data(http, INGRESS);
        }
    }
}

/// To be called before the verdict is read, with the sequence numbers behind what was received, and behind what was sent
/// and acknowledged. What was put aside, and is still not known, is lost; so is what passed by unseen. What was looked at and
/// not received, because TCP refused it, is taken back; if this end had closed, only what came before that ([`closes`]): TCP
/// refuses all that comes then, but it came.
#[inline(always)]
pub fn settle(http: &mut Http, received: u32, acknowledged: u32, closed: bool) {
    let looked = if closed { http.not_received } else { http.looked };
    let any = if closed { looked != 0 } else { stream(http, INGRESS).marks & mark::SYNCED != 0 };
    if any && looked.wrapping_sub(received) as i32 > 0 {
        take_back(http);
        if stream(http, INGRESS).kind == kind::REQUESTS {
            // Which exchange was the last one before is not known any more, and so neither is its response. None waits for one.
            lose(http, EGRESS);
            let e = &mut http.exchange;
            if e.requests > e.responses {
                e.requests = e.responses;
            }
        }
    }
    let mut in_lost = stream(http, INGRESS).missed != 0;
    let mut out_lost = stream(http, EGRESS).missed != 0;
    if http.stopped == 0 {
        if http.aside_at != http.aside_end {
            pass_aside(http);
            in_lost |= http.aside_at != http.aside_end;
        }
        in_lost |= unseen(stream(http, INGRESS), received);
        out_lost |= unseen(stream(http, EGRESS), acknowledged);
    }
    if in_lost && stream(http, INGRESS).phase < phase::UNTIL_CLOSE {
        lose(http, INGRESS);
    }
    if out_lost && stream(http, EGRESS).phase < phase::UNTIL_CLOSE {
        lose(http, EGRESS);
    }
}

/// This end closes, and has received all before `received` by now: what was looked at beyond that is on its way into TCP, or TCP has
/// refused it. [`settle`] finds out which.
#[inline(always)]
pub fn closes(http: &mut Http, received: u32) {
    let looked = http.looked;
    if stream(http, INGRESS).marks & mark::SYNCED != 0 && looked.wrapping_sub(received) as i32 > 0 {
        http.not_received = looked;
    }
}

/// Whether there are bytes before `end` that were not seen. One may be the FIN: it has a sequence number.
#[inline(always)]
fn unseen(s: &Stream, end: u32) -> bool {
    let behind = end.wrapping_sub(s.next) as i32;
    let in_body = s.phase == phase::BODY || s.phase == phase::CHUNK_DATA;
    // Whatever the bytes of a body are, and whether they were looked at: it is passed over.
    let known = in_body && s.length + 1 >= u64::from(behind.unsigned_abs());
    s.marks & mark::SYNCED != 0 && s.phase != phase::HUNT && behind > 1 && !known
}

/// Whether a received segment may repeat bytes that were looked at: then [`again`] is to be called.
#[inline(always)]
pub fn repeats(http: &mut Http, seq: u32) -> bool {
    // Nothing is looked at in a long body, or behind all heads: kept within reach, or the difference would wrap.
    const REACH: i32 = 1 << 30;
    if seq.wrapping_sub(http.looked) as i32 > REACH {
        http.looked = seq.wrapping_sub(REACH as u32);
    }
    http.looked.wrapping_sub(seq) as i32 > 0 && stream(http, INGRESS).marks & mark::SYNCED != 0
}

/// Takes a received segment that may repeat bytes: `next` is the first byte that TCP itself has not received. If TCP has
/// received what was looked at, this is nothing new. If it has not, it dropped that segment (its checksum was wrong, or there
/// was no room), and takes this one: what was looked at need not be what the socket reads.
#[inline(always)]
pub fn again(http: &mut Http, seq: u32, len: u32, next: u32) {
    let end = seq.wrapping_add(len);
    let looked = http.looked;
    let repeated = if (looked.wrapping_sub(end) as i32) < 0 { looked } else { end };
    if (repeated.wrapping_sub(next) as i32) > 0 {
        take_back(http);
    }
}

/// Takes back what was read last from what is received: TCP has not taken it.
#[inline(never)]
fn take_back(http: &mut Http) {
    // Its kind, too, was read from what need not be there.
    if http.stopped != 0 || http.exchange.protocol > protocol::HTTP1 {
        http.stopped = 0;
        http.exchange.protocol = protocol::UNDECIDED;
        // What the other direction had begun was forgotten, and what it sent meanwhile not looked at.
        lose(http, EGRESS);
    }
    lose(http, INGRESS);
    // What was seen before stays known otherwise. This may be what was dropped.
    if stream(http, INGRESS).kind == kind::RESPONSES {
        http.exchange.response_connection = 0;
        http.exchange.response_version = 0;
        clear(http, bit::HAS_TIMEOUT | bit::HAS_MAX);
    } else if stream(http, INGRESS).kind == kind::REQUESTS {
        forget(http);
    }
}

/// Whether nothing that a segment holds can change anything: its direction is lost, or the rest of the connection is body or
/// no HTTP/1.x, and it does not repeat what was looked at. May be asked while another CPU scans the direction: it does not
/// come back from there, but for [`again`] and within a step (then what is passed over here is a gap).
#[inline(always)]
pub fn is_done(http: &mut Http, direction: usize, seq: u32) -> bool {
    let done = http.stopped != 0 || stream(http, direction).phase >= phase::UNTIL_CLOSE;
    done && !(direction == INGRESS && repeats(http, seq))
}

/// Takes a segment: sequence number and number of its payload bytes. Whether they must be looked at: then [`step`] is
/// to be called until it returns false, at most [`MAX_STEPS`] times, with a window filled whenever [`refill`] says so;
/// then [`leave`].
#[inline(always)]
pub fn enter(http: &mut Http, direction: usize, seq: u32, len: u32) -> Option<u32> {
    if http.stopped != 0 || len == 0 {
        return None;
    }
    if direction == INGRESS && http.aside_at != http.aside_end {
        pass_aside(http);
    }
    let s = stream(http, direction);
    if s.phase >= phase::UNTIL_CLOSE {
        return None;
    }
    if s.missed != 0 {
        lose(http, direction);
        return None;
    }
    if s.marks & mark::SYNCED == 0 || s.phase == phase::HUNT {
        s.next = seq;
        s.marks |= mark::SYNCED;
    }
    let ahead = seq.wrapping_sub(s.next) as i32;
    let fresh = ahead.wrapping_add(len as i32);
    if fresh <= 0 {
        return None;
    }
    if http.exchange.protocol == protocol::NONE {
        http.exchange.protocol = protocol::UNDECIDED;
    }
    if direction == EGRESS && http.aside_at != http.aside_end && aside_is_unknown(http) {
        // Whoever sends this may have read what was put aside, and be answering it.
        miss(http, INGRESS);
    }
    let s = stream(http, direction);
    let mut at = 0;
    if ahead <= 0 {
        at = ahead.unsigned_abs();
    }
    if s.phase == phase::BODY || s.phase == phase::CHUNK_DATA {
        // A gap in a body is harmless: whatever the missing bytes are, they are passed over.
        if s.length >= fresh as u64 {
            s.length -= fresh as u64;
            s.next = s.next.wrapping_add(fresh as u32);
            if s.length == 0 {
                end_data(http, direction);
            }
            return None;
        }
        if ahead > 0 {
            if s.length < ahead as u64 {
                early(http, direction, seq, len);
                return None;
            }
            s.length -= ahead as u64;
        }
    } else if s.phase >= phase::UNFRAMED {
        lose(http, direction);
        return None;
    } else if ahead > 0 {
        early(http, direction, seq, len);
        return None;
    }
    s.next = seq.wrapping_add(len);
    Some(at)
}

/// A segment that comes before others. What this end sends is seen in order.
#[inline(always)]
fn early(http: &mut Http, direction: usize, seq: u32, len: u32) {
    if direction == INGRESS {
        set_aside(http, seq, len);
    } else {
        lose(http, direction);
    }
}

/// Ends what [`enter`] began: `finished` is false if there were not enough steps, or a window could not be filled.
#[inline(always)]
pub fn leave(http: &mut Http, direction: usize, finished: bool) {
    if direction == INGRESS {
        http.looked = stream(http, direction).next;
    }
    if !finished || stream(http, direction).missed != 0 {
        lose(http, direction);
    }
}

/// Begins with a segment of `len` bytes of payload, at the one that [`enter`] has answered. `same`: the window was used for this segment
/// last, and that was finished.
///
/// Between two processes of one host each segment passes twice in a row, as it leaves and as it arrives: the second time what its lines
/// say is known, and its beginning is in the window, if that was filled once.
#[inline(always)]
pub fn begin(window: &mut Window, at: u32, len: u32, same: bool) {
    window.at = at;
    window.len = len;
    // Of a head that the segment does not end, the end is not to come from another one.
    if !same || window.lines.to == 0 {
        window.lines.from = 0;
        window.lines.to = 0;
    }
    if !same || window.from != at {
        window.from = at;
        window.filled = 0;
    }
}

/// Whether the window must be filled before the next [`step`]: from which byte of the segment, and with how many bytes
/// (1 to [`WINDOW`], more in a line of no interest than elsewhere).
#[inline(always)]
pub fn refill(http: &mut Http, direction: usize, window: &mut Window) -> Option<(u32, u32)> {
    let s = stream(http, direction);
    let position = window.at.wrapping_sub(window.from);
    let data = s.phase == phase::BODY || s.phase == phase::CHUNK_DATA;
    // Data is passed over unseen.
    if data || position <= window.last && position < window.filled {
        return None;
    }
    let most = if s.phase == phase::SKIP { WINDOW as u32 } else { FILL };
    let rest = window.len.wrapping_sub(window.at);
    let (n, last) = if rest > most { (most, most - REACH as u32 - 1) } else { (rest, rest.wrapping_sub(1)) };
    window.from = window.at;
    window.filled = n;
    window.last = last;
    Some((window.at, n))
}

/// Whether a segment lies within a body, and does not end it: nothing that it holds can change anything. As [`is_done`], it may
/// be asked while another CPU scans the direction.
#[inline(always)]
pub fn is_inside_body(http: &mut Http, direction: usize, seq: u32, len: u32) -> bool {
    // What was put aside, `enter` passes over.
    let no_aside = direction == EGRESS || http.aside_at == http.aside_end;
    let s = stream(http, direction);
    let ahead = seq.wrapping_sub(s.next);
    // As it is not noted, it must not grow so far that the difference wraps, also that to `looked`, which may lag behind as much again
    // and more: see `repeats`.
    (s.phase == phase::BODY || s.phase == phase::CHUNK_DATA)
        && s.busy == 0
        && no_aside
        && ahead < 1 << 29
        && s.length > u64::from(ahead) + u64::from(len)
}

/// Looks at some bytes of the segment, when the window was filled as [`refill`] has said; false: it is done with.
#[inline(always)]
pub fn step(http: &mut Http, direction: usize, window: &mut Window) -> bool {
    match head_usual(http, window, direction as u32) {
        DONE => return false,
        OTHER => {
            if window.lines.to == 0 {
                // Not all of them are usual.
                window.lines.from = 0;
            }
            head_other(http, window, direction as u32);
        }
        _ => {}
    }
    let s = stream(http, direction);
    if s.phase >= phase::METHOD && s.phase <= phase::SKIP && s.head > MAX_HEAD {
        s.phase = phase::REJECTED;
    }
    if s.phase == phase::REJECTED {
        reject(http, direction);
        if stream(http, direction).phase == phase::HUNT {
            // The rest of the segment is of no interest.
            window.at = window.len;
        }
    }
    let s = stream(http, direction);
    window.at < window.len && s.phase < phase::UNTIL_CLOSE && http.stopped == 0
}

/// [`head_usual`] leaves something over that only [`head_other`] knows.
const OTHER: u32 = 0;
/// There is more of the segment.
const MORE: u32 = 1;
/// The segment is done with, and nothing special came of it.
const DONE: u32 = 2;

/// What most heads and bodies consist of: a start line, lines, the end.
///
/// A global function: the verifier looks at it once, by itself, and lets it read the window anywhere. One, for what calls
/// cost: on processors that guard their returns, as much as a line of a head.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
extern "C" fn head_usual(http: *mut Http, window: *mut Window, direction: u32) -> u32 {
    if http.is_null() || window.is_null() {
        return OTHER;
    }
    // SAFETY: the caller's own.
    let (http, window) = unsafe { (&mut *http, &mut *window) };
    let direction = direction as usize;
    let first = stream(http, direction).phase;
    let mut usual = true;
    if first != phase::BODY && first != phase::CHUNK_DATA {
        if first == phase::START && !glance(http, direction, window) {
            return OTHER;
        }
        let s = stream(http, direction);
        if s.phase != phase::LINE && s.phase != phase::SKIP {
            return OTHER;
        }
        usual = walk(http, direction, window, first == phase::START);
    }
    let phase = stream(http, direction).phase;
    if phase == phase::BODY || phase == phase::CHUNK_DATA {
        data(http, direction, window);
    }
    if !usual {
        OTHER
    } else if window.at >= window.len && stream(http, direction).phase == phase::START {
        DONE
    } else {
        MORE
    }
}

/// A start line at the beginning of the window, if it is whole and like most are: whether it was read. If not, only a part of
/// the target may have been written, which [`begin_request`] clears.
#[inline(always)]
fn glance(http: &mut Http, direction: usize, window: &mut Window) -> bool {
    let s = stream(http, direction);
    let left = window.filled;
    if window.at != window.from || s.marks != mark::SYNCED || left < 16 {
        return false;
    }
    let kind = s.kind;
    let bytes: *const u8 = (&raw const window.words).cast();
    // SAFETY: no place is behind `LAST_POSITION`.
    unsafe {
        let (word, more) = (word_at::<0>(bytes), word_at::<8>(bytes));
        if kind == kind::RESPONSES {
            let Some((version, status)) = status_line(word, more) else { return false };
            let behind = bytes.add(STATUS_LINE as usize);
            let mut used = 0;
            macro_rules! words {
                ($($i:literal)*) => { 'search: { $(
                    let hit = equal(word_at::<{ $i * 8 }>(behind), b'\n');
                    if hit != 0 {
                        used = STATUS_LINE + $i * 8 + first(hit) + 1;
                        break 'search;
                    }
                )* } };
            }
            words!(0 1 2 3 4 5 6 7);
            if used == 0 || used > left {
                return false;
            }
            begin_response(http, direction);
            let s = stream(http, direction);
            s.version = version;
            s.status = status;
            advance(http, direction, window, used);
            end_status_line(http, direction);
            return true;
        }
        let method = known_method(word);
        if kind != kind::REQUESTS || method == 0 {
            return false;
        }
        let full = http.full_target != 0;
        // Whatever comes of it: the next request begins here, and its target replaces the one that is known. What is the same is
        // not written.
        let kept = exchange_words(http).add(6);
        let target = bytes.add(clamp::<7>(u64::from(method)) as usize + 1);
        let mut len = 0;
        let mut end = 0;
        macro_rules! words {
            ($($i:literal)*) => { 'search: { $(
                let mut word = word_at::<{ $i * 8 }>(target);
                let mut hit = below(word, b' ' + 1);
                if !full {
                    hit |= equal(word, b'?') | equal(word, b'#');
                }
                let mut n = 8;
                if hit != 0 {
                    // Exact up to the first match of each kind, hence up to the first of all.
                    n = first(hit);
                    len = $i * 8 + n;
                    end = (word >> bits(n)) as u8;
                    word &= (1u64 << bits(n)).wrapping_sub(1);
                }
                if method + 1 + $i * 8 + n > left {
                    // Behind the end may be anything: not even for a moment.
                    return false;
                }
                write_changed(kept.add($i), word);
                if hit != 0 {
                    break 'search;
                }
            )* } };
        }
        words!(0 1 2 3 4 5 6 7);
        if u32::from(http.exchange.target_len) > len {
            clear_target_behind(http, len >> 3);
        }
        let mut behind = method + 1 + len;
        if end == b'?' || end == b'#' {
            let query = bytes.add(inside(behind));
            let mut more = 0;
            macro_rules! words {
                ($($i:literal)*) => { 'search: { $(
                    let word = word_at::<{ $i * 8 }>(query);
                    let hit = below(word, b' ' + 1);
                    if hit != 0 {
                        let n = first(hit);
                        more = $i * 8 + n;
                        end = (word >> bits(n)) as u8;
                        break 'search;
                    }
                )* } };
            }
            words!(0 1 2 3 4 5 6 7);
            behind += more;
        }
        // The target, SP and version, CR and LF.
        let used = behind + 11;
        if len == 0 || end != b' ' || used > left {
            return false;
        }
        let version = bytes.add(inside(behind + 1));
        let word_of_version = word_at::<0>(version);
        if word_of_version & !(1 << 56) != word_of(b"HTTP/1.0") || !begins!(word_at::<8>(version), b"\r\n") {
            return false;
        }
        begin_head(stream(http, direction));
        http.begun = http.begun.wrapping_add(1);
        forget_all_but_target(http);
        end_method(http, direction, word & (u64::MAX >> bits(8 - method)), 0, method as u8);
        http.exchange.target_len = len as u8;
        stream(http, direction).version = 10 + (word_of_version >> 56 & 1) as u8;
        advance(http, direction, window, used);
        end_request_line(http, direction);
        true
    }
}

/// Bits of what [`usual_line`] answers, beside a position: it is within a line of no interest;
const MID: u32 = 1 << 16;
/// it is behind the empty line that ends the head;
const END: u32 = 1 << 17;
/// it is at the beginning of a line for [`line`].
const UNUSUAL: u32 = 1 << 18;

/// Lines that are looked at in one step.
const MAX_LINES: u64 = 24;

/// Lines of a head, as far as the window is filled, or to the end of the head. Answers whether the next one is not for [`line`].
#[inline(always)]
fn walk(http: &mut Http, direction: usize, window: &mut Window, behind_start_line: bool) -> bool {
    let s = stream(http, direction);
    let lines = &mut window.lines;
    let (used, ended, usual);
    if behind_start_line && lines.to != 0 && lines.from == window.at && lines.kind == s.kind {
        s.framing = lines.framing;
        s.length = lines.length;
        let tokens = lines.tokens;
        (used, ended, usual) = (lines.to.wrapping_sub(lines.from), true, true);
        add_tokens(http, direction, tokens);
    } else {
        if behind_start_line {
            lines.from = window.at;
            lines.to = 0;
        }
        let mid = s.phase == phase::SKIP;
        let (from, end) = (window.at.wrapping_sub(window.from), window.filled);
        let mut place = if mid { from | MID } else { from };
        if mid && from == 0 && end >= BLOCK_BYTES {
            place = head_stretch(window) | MID;
        }
        if !mid && s.field != field::NONE {
            place = from | UNUSUAL;
        }
        let last = window.last;
        let mut turns = 0;
        let zero = zero(window);
        while turns < MAX_LINES && place & !MID <= last {
            place = usual_line(http, direction, window, place).wrapping_add(zero);
            turns = next(turns);
        }
        let mut position = place & (MID - 1);
        let mut next = if place & MID != 0 { phase::SKIP } else { phase::LINE };
        if place & (END | UNUSUAL) == 0 && position >= end {
            // What lies beyond the end is of an earlier window.
            position = end;
            // SAFETY: a byte of the window.
            let last = unsafe { *(&raw const window.words).cast::<u8>().add(inside(end.wrapping_sub(1))) };
            next = if last == b'\n' { phase::LINE } else { phase::SKIP };
        }
        let s = stream(http, direction);
        s.phase = next;
        (used, ended, usual) = (position.wrapping_sub(from), place & END != 0, place & UNUSUAL == 0);
        let lines = &mut window.lines;
        if ended && lines.from != 0 && lines.to == 0 {
            lines.to = window.at.wrapping_add(used);
            lines.length = s.length;
            lines.kind = s.kind;
            lines.framing = s.framing;
            lines.tokens = s.tokens;
        }
    }
    advance(http, direction, window, used);
    if ended {
        end_head(http, direction, 0, window.len.wrapping_sub(window.at));
    }
    usual
}

/// Words that [`head_stretch`] looks at together.
const BLOCK: u64 = 16;
const BLOCK_BYTES: u32 = BLOCK as u32 * 8;

/// How many bytes there are before the first LF of the window, rounded down to blocks. A global function: of what it answers, the
/// verifier knows nothing.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
extern "C" fn head_stretch(window: *const Window) -> u32 {
    if window.is_null() {
        return 0;
    }
    // SAFETY: the caller's own.
    let window = unsafe { &*window };
    let filled = u64::from(window.filled) / u64::from(BLOCK_BYTES);
    let mut block = 0;
    while block < WINDOW as u64 / u64::from(BLOCK_BYTES) && block < filled {
        let from = clamp::<{ WINDOW as i32 / 8 - BLOCK as i32 }>(block * BLOCK) as usize;
        // What is not ASCII may look like a LF at first.
        if may_have_lf::<false>(window, from) && may_have_lf::<true>(window, from) {
            break;
        }
        block = next(block);
    }
    block as u32 * BLOCK_BYTES
}

/// Whether there is a LF in the block that begins with the word numbered `from` (up to 112). Unless `EXACT` it takes any byte that
/// is not ASCII for one.
#[inline(always)]
fn may_have_lf<const EXACT: bool>(window: &Window, from: usize) -> bool {
    let mut any = 0;
    macro_rules! words {
        ($($i:literal)*) => { $(
            // SAFETY: 16 words from there are in bounds. Volatile, or those of the first time are kept for the second.
            let other = unsafe { window.words.as_ptr().add(from + $i).read_volatile() } ^ (ONES * 10);
            any |= other.wrapping_sub(ONES) & if EXACT { !other } else { u64::MAX };
        )* };
    }
    words!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    any & (ONES * 0x80) != 0
}

/// The line of a head that begins at `place`, or the rest of one of no interest. Answers where that led.
#[inline(always)]
fn usual_line(http: &mut Http, direction: usize, window: &Window, place: u32) -> u32 {
    let s = stream(http, direction);
    let (requests, end) = (s.kind == kind::REQUESTS, window.filled);
    let position = inside(place & (MID - 1));
    // SAFETY: in the window, and so are the words behind it.
    let here = unsafe { (&raw const window.words).cast::<u8>().add(position) };
    let position = position as u32;
    macro_rules! word {
        ($n:expr) => {
            // SAFETY: `here` is not behind `LAST_POSITION`.
            unsafe { word_at::<{ $n }>(here) }
        };
    }
    if place & MID == 0 {
        let word = word!(0);
        let byte = word as u8;
        if byte <= b' ' {
            return if byte == b'\r' && word >> 8 & 0xff == u64::from(b'\n') && position + 2 <= end {
                END | (position + 2)
            } else if byte == b'\n' {
                END | (position + 1)
            } else {
                UNUSUAL | position
            };
        }
        // Letters of either case, and `-` or what else differs from it in that bit.
        let name = word | (ONES * 0x20);
        let letter = name as u8;
        if letter == b'c' || letter == b't' || !requests && (letter == b'k' || letter == b'u') {
            // What lies beyond the end is of an earlier window: the name, and a value that is read here with the first byte
            // of the next line, must end before it.
            let mut unusual = position + LONGEST_NAME > end;
            let more = word!(8);
            if name == word_of(b"connecti") {
                if begins!(more, b"on") {
                    unusual = true;
                    let (value, rest) = (word!(11), word!(19));
                    let (mut tokens, mut used) = (0, 0);
                    if begins!(value, b" close\r\n") && !is_blank(rest as u8) {
                        (tokens, used) = (token::CLOSE, 19);
                    } else if begins!(value, b" keep-al") && begins!(rest, b"ive\r\n") && !is_blank((rest >> 40) as u8)
                    {
                        (tokens, used) = (token::KEEP_ALIVE, 24);
                    }
                    if used != 0 && (more >> 16) as u8 == b':' && position + used < end {
                        s.framing |= framing::CONNECTION;
                        add_tokens(http, direction, tokens);
                        return position + used;
                    }
                }
            } else if name == word_of(b"content-") {
                if begins!(more, b"length") {
                    unusual = true;
                    let (digits, rest) = (word!(16), word!(24));
                    // Seven at most; `hit` marks the first byte that is none.
                    let hit = !digits_in(digits) & (ONES * 0x80);
                    let n = if hit == 0 { 0 } else { first(hit) };
                    let shift = bits(n);
                    let tail = digits >> shift | rest << 1 << (63 - shift);
                    if n != 0
                        && (word >> 56) as u8 == b'-'
                        && more >> 48 == u64::from(b':') | u64::from(b' ') << 8
                        && begins!(tail, b"\r\n")
                        && !is_blank((tail >> 16) as u8)
                        && position + n + 18 < end
                    {
                        content_length(s, decimal(digits << 1 << (63 - shift)));
                        return position + n + 18;
                    }
                }
            } else if name == word_of(b"transfer") {
                unusual = true;
                let rest = word!(24);
                if begins!(more, b"-encodin")
                    && begins!(word!(16), b"g: chunk")
                    && begins!(rest, b"ed\r\n")
                    && !is_blank((rest >> 32) as u8)
                    && position + 28 < end
                {
                    s.framing |= framing::CODED | framing::CHUNKED;
                    return position + 28;
                }
            } else if !requests && (name == word_of(b"keep-ali") || name == word_of(b"upgrade:")) {
                unusual = true;
            }
            if unusual {
                return UNUSUAL | position;
            }
        }
    }
    // To the line's end. A byte that is LF, and one that is not ASCII, leaves the highest bit here.
    let mut at = REACH as u32 - 8;
    let mut suspect = 0;
    macro_rules! words {
        ($($i:literal)*) => { 'search: { $(
            let other = word!($i * 8) ^ (ONES * 10);
            let borrowed = other.wrapping_sub(ONES);
            if borrowed & (ONES * 0x80) != 0 {
                at = $i * 8;
                suspect = borrowed & !other & (ONES * 0x80);
                break 'search;
            }
        )* } };
    }
    words!(0 1 2 3 4 5 6 7);
    if suspect == 0 { (position + at + 8) | MID } else { position + at + first(suspect) + 1 }
}

/// A step that [`head_usual`] leaves over.
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
#[inline(never)]
extern "C" fn head_other(http: *mut Http, window: *mut Window, direction: u32) -> u32 {
    if http.is_null() || window.is_null() {
        return 0;
    }
    // SAFETY: the caller's own.
    let (http, window) = unsafe { (&mut *http, &mut *window) };
    let direction = direction as usize;
    let first = stream(http, direction).phase;
    let here = Place::of(window);
    if first == phase::LINE {
        if here.reaches() {
            let used = line(http, direction, &here);
            advance(http, direction, window, used);
        }
        return 0;
    }
    let used = if first == phase::START {
        start(http, direction, &here)
    } else if first == phase::VALUE {
        value(http, direction, &here)
    } else if first != phase::TARGET && first != phase::VERSION {
        rare(http, direction, &here)
    } else {
        0
    };
    advance(http, direction, window, used);
    // What usually comes next, in the same step.
    let here = Place::of(window);
    if stream(http, direction).phase == phase::TARGET && here.reaches() {
        let used = target(http, direction, &here);
        advance(http, direction, window, used);
    }
    let here = Place::of(window);
    if stream(http, direction).phase == phase::VERSION && here.reaches() {
        let used = request_version(http, direction, &here);
        advance(http, direction, window, used);
    }
    let here = Place::of(window);
    let phase = stream(http, direction).phase;
    if matches!(phase, phase::REASON | phase::TRAILER_SKIP | phase::CHUNK_EXT) && here.reaches() {
        let (n, found) = here.find::<true>();
        advance(http, direction, window, n);
        if found {
            end_line(http, direction);
        }
    }
    0
}

/// Moves on by `used` bytes. Through memory, even within a step: the verifier forgets there what it knows of the number,
/// and so takes the many ways that lead here for one.
#[inline(always)]
fn advance(http: &mut Http, direction: usize, window: &mut Window, used: u32) {
    let s = stream(http, direction);
    s.head = s.head.wrapping_add(used);
    let at = &raw mut window.at;
    // SAFETY: a field of the window.
    unsafe { at.write_volatile(at.read_volatile().wrapping_add(used)) };
}

/// A place in the window, and the bytes from there on.
struct Place {
    words: *const u8,
    position: u64,
    /// Bytes from the position on that are filled, and those that the segment has.
    left: u32,
    rest: u32,
    last: u32,
}

impl Place {
    /// Where the segment is at.
    #[inline(always)]
    fn of(window: &mut Window) -> Self {
        // SAFETY: a field of the window.
        let at = unsafe { (&raw const window.at).read_volatile() };
        let position = at.wrapping_sub(window.from);
        Self {
            words: (&raw const window.words).cast(),
            position: u64::from(position),
            left: window.filled.wrapping_sub(position),
            rest: window.len.wrapping_sub(at),
            last: window.last,
        }
    }

    /// Whether there are bytes left, at a place that may be looked at.
    #[inline(always)]
    fn reaches(&self) -> bool {
        self.left as i32 > 0 && self.position <= u64::from(self.last)
    }

    /// The byte at the position.
    #[inline(always)]
    fn byte(&self) -> u8 {
        self.word::<0>() as u8
    }

    /// The 8 bytes that begin `N` bytes behind the position.
    #[inline(always)]
    fn word<const N: usize>(&self) -> u64 {
        // SAFETY: the position is not behind `LAST_POSITION`.
        unsafe { word_at::<N>(self.words.add(inside(self.position as u32))) }
    }

    /// Finds the next LF, or else (`!LF`) the next byte up to SP, in the bytes at the position: the bytes that
    /// are passed, the found one included, and whether it was found.
    #[inline(always)]
    fn find<const LF: bool>(&self) -> (u32, bool) {
        let left = self.left;
        let mut n = REACH as u32;
        let mut found = false;
        macro_rules! words {
            ($($i:literal)*) => { 'search: { $(
                let word = self.word::<{ $i * 8 }>();
                let hit = if LF { equal(word, b'\n') } else { below(word, b' ' + 1) };
                if hit != 0 {
                    n = $i * 8 + first(hit) + 1;
                    found = true;
                    break 'search;
                }
            )* } };
        }
        words!(0 1 2 3 4 5 6 7);
        if n > left { (left, false) } else { (n, found) }
    }
}

/// Bounds `x`, and keeps LLVM from finding out that the bound is superfluous: the verifier does not.
#[inline(always)]
pub fn clamp<const MASK: i32>(x: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut x = x;
        // SAFETY: a single `and` of a register and a constant.
        unsafe { core::arch::asm!("{0} &= {1}", inout(reg) x, const MASK, options(pure, nomem, nostack)) };
        x
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        x & MASK as u64
    }
}

/// The 8 bytes that begin `N` bytes behind `at`, wherever that is.
///
/// # Safety
/// They can be read: where `at` is not behind `LAST_POSITION` of a window, they can.
#[inline(always)]
pub unsafe fn word_at<const N: usize>(at: *const u8) -> u64 {
    const { assert!(N + 8 <= REACH) };
    #[cfg(target_arch = "bpf")]
    {
        let word: u64;
        // SAFETY: by the caller's word. In assembly: rustc would load byte by byte.
        unsafe {
            core::arch::asm!("{0} = *(u64 *)({1} + {2})", out(reg) word, in(reg) at, const N, options(pure, readonly, nostack))
        };
        word
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: by the caller's word.
    unsafe {
        at.add(N).cast::<u64>().read_unaligned()
    }
}

/// The number behind `x`, of which the compiler knows nothing: it does not unroll a loop that counts so.
#[inline(always)]
fn next(x: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut x = x;
        // SAFETY: a register and a constant.
        unsafe { core::arch::asm!("{0} += 1", inout(reg) x, options(pure, nomem, nostack)) };
        x
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        x + 1
    }
}

/// 0, of which the verifier knows nothing. What this is added to it does not follow any further, and so takes the many ways
/// that lead to a place for one.
#[inline(always)]
fn zero(window: &Window) -> u32 {
    let len = &raw const window.len;
    // SAFETY: a field. Volatile, or the compiler would know it, too.
    unsafe { len.read_volatile().wrapping_sub(len.read_volatile()) }
}

/// A place up to [`LAST_POSITION`], so that the verifier sees it. No other is passed.
#[inline(always)]
fn inside(position: u32) -> usize {
    let position = u64::from(position);
    #[cfg(target_arch = "bpf")]
    let mut position = position;
    #[cfg(target_arch = "bpf")]
    // SAFETY: a register and constants only, and the jump stays inside.
    unsafe {
        core::arch::asm!(
            "if {0} < {1} goto +1",
            "{0} = 0",
            inout(reg) position,
            const LAST_POSITION + 1,
            options(pure, nomem, nostack)
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    assert!(position <= u64::from(LAST_POSITION));
    position as usize
}

const ONES: u64 = u64::MAX / 255;

/// A word whose lowest set bit is the highest of the first byte of `word` that is `byte`; 0: there is none.
#[inline(always)]
fn equal(word: u64, byte: u8) -> u64 {
    let x = word ^ (ONES * u64::from(byte));
    x.wrapping_sub(ONES) & !x & (ONES * 0x80)
}

/// Likewise of the first byte that is less than `limit` (at most 128).
#[inline(always)]
fn below(word: u64, limit: u8) -> u64 {
    word.wrapping_sub(ONES * u64::from(limit)) & !word & (ONES * 0x80)
}

/// The number of the first byte whose highest bit is set.
#[inline(always)]
fn first(hit: u64) -> u32 {
    // BPF has no instruction that counts zeros. The product's highest byte is the byte of the constant that the bit
    // selects.
    (((hit & hit.wrapping_neg()) >> 7).wrapping_mul(0x0001_0203_0405_0607) >> 56) as u32
}

/// The bits of `n` bytes, of which there are fewer than 8.
#[inline(always)]
fn bits(n: u32) -> u32 {
    (n * 8) & 63
}

/// Up to 8 bytes as the little-endian word that they are in memory.
const fn word_of(bytes: &[u8]) -> u64 {
    let mut word = 0;
    let mut i = 0;
    while i < bytes.len() {
        word |= (bytes[i] as u64) << (8 * i);
        i += 1;
    }
    word
}

/// The bits that make letters of such a word lower case, and no other byte another.
const fn case_of(bytes: &[u8]) -> u64 {
    let mut word = 0;
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i].is_ascii_lowercase() {
            word |= 0x20 << (8 * i);
        }
        i += 1;
    }
    word
}

#[inline(always)]
fn lower(byte: u8) -> u8 {
    if byte.wrapping_sub(b'A') < 26 { byte | 0x20 } else { byte }
}

#[inline(always)]
fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// `tchar` of RFC 9110 §5.6.2.
#[inline(always)]
fn is_tchar(byte: u8) -> bool {
    const fn half(from: u8) -> u64 {
        let mut bits = 0;
        let mut i = 0;
        while i < 64 {
            let byte = from + i;
            if byte.is_ascii_alphanumeric()
                || matches!(
                    byte,
                    b'!' | b'#'
                        | b'$'
                        | b'%'
                        | b'&'
                        | b'\''
                        | b'*'
                        | b'+'
                        | b'-'
                        | b'.'
                        | b'^'
                        | b'_'
                        | b'`'
                        | b'|'
                        | b'~'
                )
            {
                bits |= 1 << i;
            }
            i += 1;
        }
        bits
    }
    const LOW: u64 = half(0);
    const HIGH: u64 = half(64);
    let half = if byte & 64 == 0 { LOW } else { HIGH };
    byte < 128 && half >> (byte & 63) & 1 != 0
}

#[inline(always)]
fn stream(http: &mut Http, direction: usize) -> &mut Stream {
    &mut http.streams[direction & 1]
}

/// Where the word that has `flags` as its low half is in [`Http`].
const FLAGS: usize = offset_of!(Http, exchange) + offset_of!(Exchange, flags);
const _: () = assert!(FLAGS.is_multiple_of(4));

/// Sets flags, so that what the other direction changes at the same time is not undone.
#[inline(always)]
fn set(http: &mut Http, bits: u16) {
    if http.exchange.flags & bits == bits {
        return;
    }
    #[cfg(target_arch = "bpf")]
    // SAFETY: the aligned word that has `flags` as its low half. (The target has no such atomics but in assembly.)
    unsafe {
        core::arch::asm!("lock *(u32 *)({0} + {2}) |= {1}", in(reg) http as *mut Http, in(wreg) u32::from(bits), const FLAGS, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        http.exchange.flags |= bits;
    }
}

/// Clears flags, likewise.
#[inline(always)]
fn clear(http: &mut Http, bits: u16) {
    if http.exchange.flags & bits == 0 {
        return;
    }
    #[cfg(target_arch = "bpf")]
    // SAFETY: as in `set`.
    unsafe {
        core::arch::asm!("lock *(u32 *)({0} + {2}) &= {1}", in(reg) http as *mut Http, in(wreg) !u32::from(bits), const FLAGS, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        http.exchange.flags &= !bits;
    }
}

#[inline(always)]
fn flag_lost(http: &mut Http, kind: u8) {
    if kind == kind::REQUESTS {
        set(http, bit::REQUESTS_LOST);
    } else if kind == kind::RESPONSES {
        set(http, bit::RESPONSES_LOST);
    }
}

/// Fixes what both directions carry, once.
#[inline(always)]
fn decide(http: &mut Http, direction: usize, kind: u8) {
    if stream(http, direction).kind != kind::UNKNOWN {
        return;
    }
    let other = kind::REQUESTS + kind::RESPONSES - kind;
    stream(http, direction).kind = kind;
    stream(http, 1 - direction).kind = other;
    if stream(http, direction).phase == phase::LOST {
        flag_lost(http, kind);
    }
    if stream(http, 1 - direction).phase == phase::LOST {
        flag_lost(http, other);
    }
}

/// Takes back what is not known if a part of a direction was not seen.
#[inline(always)]
fn tell_lost(http: &mut Http, kind: u8) {
    flag_lost(http, kind);
    if kind == kind::REQUESTS {
        // There may have been further requests, so what is known of a whole head is not known of the last one.
        if http.exchange.request_connection & token::COMPLETE != 0 {
            http.exchange.request_connection = 0;
        }
    } else if kind == kind::RESPONSES {
        // A response head that was seen stays: it answers the last request, or that one would have cleared it.
        clear(http, bit::BODY_INCOMPLETE);
    }
}

/// Ends the scan of the connection.
#[inline(always)]
fn stop(http: &mut Http, protocol: u8) {
    http.exchange.protocol = protocol;
    http.stopped = 1;
}

/// What is at the place of a start line is none: [`step`] draws the conclusion, in one place.
#[inline(always)]
fn not_http(http: &mut Http, direction: usize) {
    stream(http, direction).phase = phase::REJECTED;
}

/// The conclusion: this is not HTTP, or no longer.
#[inline(never)]
fn reject(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    let kind = s.kind;
    if s.marks & mark::PROVISIONAL != 0 {
        s.marks &= !mark::PROVISIONAL;
        s.phase = phase::HUNT;
        if s.kind == kind::REQUESTS {
            forget(http);
            http.begun = 0;
            http.named = 0;
            if http.told == 0 {
                http.streams[INGRESS].kind = kind::UNKNOWN;
                http.streams[EGRESS].kind = kind::UNKNOWN;
            }
        }
    } else if http.exchange.protocol != protocol::HTTP1 {
        // SAFETY: word 4 of the exchange is the beginning of `method`.
        let proxy = unsafe { *exchange_words(http).add(4) } == word_of(b"PROXY");
        forget(http);
        if kind == kind::REQUESTS && proxy {
            // A line of the PROXY protocol, version 1.
            http.begun = 0;
            http.named = 0;
            stream(http, direction).phase = phase::PROXY_LINE;
        } else if kind == kind::REQUESTS && http.exchange.protocol <= protocol::UNDECIDED {
            // A server that cannot read it, or reads more than this scanner, may answer in HTTP all the same.
            http.exchange.protocol = protocol::OTHER;
            http.begun = 0;
            http.named = 0;
            http.connect = 0;
            lose(http, direction);
        } else {
            let tls = http.exchange.protocol == protocol::TLS;
            stop(http, if tls { protocol::TLS } else { protocol::OTHER });
        }
    } else {
        lose(http, direction);
    }
}

/// What is said of one exchange, rather than of the connection.
const OF_ONE: u16 = bit::TARGET_TRUNCATED | bit::HAS_TIMEOUT | bit::HAS_MAX | bit::REQUEST_INCOMPLETE;

/// Clears the last exchange. Not inlined, for the size of the programs.
#[inline(never)]
fn forget(http: &mut Http) {
    clear_target_behind(http, 0);
    let words = exchange_words(http);
    // SAFETY: words 4 and 5 of the exchange are `method`, 6 is the first one of `target`. Volatile, or it becomes a loop over
    // bytes.
    unsafe {
        words.add(4).write_volatile(0);
        words.add(5).write_volatile(0);
        words.add(6).write_volatile(0);
        (&raw mut http.exchange.method_len).write_volatile(0);
        (&raw mut http.exchange.target_len).write_volatile(0);
    }
    forget_all_but_target(http);
}

/// The rest of [`forget`], where a request line is there already.
#[inline(always)]
fn forget_all_but_target(http: &mut Http) {
    let e = &mut http.exchange;
    e.keep_alive_timeout_s = 0;
    e.keep_alive_max = 0;
    // SAFETY: members of `e`. Volatile, or neighbours become a loop over bytes.
    unsafe {
        (&raw mut e.status).write_volatile(0);
        (&raw mut e.request_connection).write_volatile(0);
        (&raw mut e.response_connection).write_volatile(0);
        (&raw mut e.request_version).write_volatile(0);
        (&raw mut e.response_version).write_volatile(0);
    }
    clear(http, OF_ONE);
}

/// Clears the words of the target behind the one with this number.
#[inline(always)]
fn clear_target_behind(http: &mut Http, last: u32) {
    let words = exchange_words(http);
    macro_rules! words {
        ($($i:literal)*) => { $(
            if $i > last {
                // SAFETY: words 6 to 13 of the exchange are `target`. Volatile, or it becomes a loop over bytes.
                unsafe { words.add(6 + $i).write_volatile(0) };
            }
        )* };
    }
    words!(1 2 3 4 5 6 7);
}

/// The exchange as words, to which it is aligned.
#[inline(always)]
fn exchange_words(http: &mut Http) -> *mut u64 {
    const _: () = assert!(offset_of!(Http, exchange) % 8 == 0 && align_of::<Http>() == 8);
    const _: () = assert!(offset_of!(Exchange, method) == 32 && offset_of!(Exchange, target) == 48);
    (&raw mut http.exchange).cast()
}

/// Writes a word, if it is another than the one that is there: see [`Http`].
///
/// # Safety
/// It can be read and written.
#[inline(always)]
unsafe fn write_changed(place: *mut u64, word: u64) {
    // SAFETY: by the caller's word.
    unsafe {
        if place.read_volatile() != word {
            place.write_volatile(word);
        }
    }
}

/// Readies a stream for a new head.
#[inline(always)]
fn begin_head(s: &mut Stream) {
    // SAFETY: members of `s`. Volatile, or neighbours become a loop over bytes.
    unsafe {
        (&raw mut s.head).write_volatile(0);
        (&raw mut s.length).write_volatile(0);
        (&raw mut s.word).write_volatile(0);
        (&raw mut *s).cast::<u64>().add(offset_of!(Stream, status) / 8).write_volatile(0);
    }
}

const _: () = assert!(part::NONE == 0 && field::NONE == 0 && offset_of!(Stream, status) % 8 == 0);
const _: () = assert!(offset_of!(Stream, framing) == offset_of!(Stream, status) + 7);

#[inline(always)]
fn begin_request(http: &mut Http, direction: usize) {
    decide(http, direction, kind::REQUESTS);
    begin_head(stream(http, direction));
    http.begun = http.begun.wrapping_add(1);
    forget(http);
}

#[inline(always)]
fn begin_response(http: &mut Http, direction: usize) {
    decide(http, direction, kind::RESPONSES);
    begin_head(stream(http, direction));
}

/// The method is whole.
#[inline(always)]
fn end_method(http: &mut Http, direction: usize, word: u64, more: u64, len: u8) {
    let words = exchange_words(http);
    // SAFETY: words 4 and 5 of the exchange are `method`.
    unsafe {
        write_changed(words.add(4), word);
        write_changed(words.add(5), more);
    }
    http.exchange.method_len = len;
    let mask = 1u64 << (http.begun.wrapping_sub(1) & 63);
    let mut heads = http.heads & !mask;
    if word == word_of(b"HEAD") {
        heads |= mask;
    }
    // SAFETY: a member.
    unsafe { write_changed(&raw mut http.heads, heads) };
    http.connect = u8::from(word == word_of(b"CONNECT"));
    http.named = http.begun;
    if http.begun.wrapping_sub(http.answered) > MAX_OUTSTANDING {
        lose(http, 1 - direction);
    }
    let s = stream(http, direction);
    s.phase = phase::TARGET;
    s.count = 0;
    s.length = 0;
}

/// The start line of a request is whole.
#[inline(always)]
fn end_request_line(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    s.phase = phase::LINE;
    s.marks &= !mark::PROVISIONAL;
    http.exchange.request_version = s.version;
    http.exchange.protocol = protocol::HTTP1;
    let side = if direction == INGRESS { bit::REQUESTS_IN } else { bit::REQUESTS_OUT };
    set(http, side);
}

/// Whether the response in progress is a final one, to the last request.
#[inline(always)]
fn answers(http: &Http, status: u16) -> bool {
    (status >= 200 || status == 101) && http.answered.wrapping_add(1) >= http.begun
}

/// The status line is whole.
#[inline(always)]
fn end_status_line(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    s.phase = phase::LINE;
    s.marks &= !mark::PROVISIONAL;
    let (status, version) = (s.status, s.version);
    http.exchange.protocol = protocol::HTTP1;
    let side = if direction == INGRESS { bit::REQUESTS_OUT } else { bit::REQUESTS_IN };
    if answers(http, status) {
        let e = &mut http.exchange;
        e.status = status;
        e.response_version = version;
        e.response_connection = 0;
        e.keep_alive_timeout_s = 0;
        e.keep_alive_max = 0;
        clear(http, bit::HAS_TIMEOUT | bit::HAS_MAX);
    }
    set(http, side);
}

/// Bytes of the method that `word` begins with, if it is one of the common ones and followed by SP; else 0.
#[inline(always)]
fn known_method(word: u64) -> u32 {
    const fn starts(word: u64, text: &[u8]) -> bool {
        word & (u64::MAX >> (64 - 8 * text.len())) == word_of(text)
    }
    if starts(word, b"GET ") || starts(word, b"PUT ") {
        3
    } else if starts(word, b"POST ") || starts(word, b"HEAD ") {
        4
    } else if starts(word, b"PATCH ") || starts(word, b"TRACE ") {
        5
    } else if starts(word, b"DELETE ") {
        6
    } else if starts(word, b"OPTIONS ") || starts(word, b"CONNECT ") {
        7
    } else {
        0
    }
}

/// A step in a start line: the bytes used.
#[inline(always)]
fn start_line(http: &mut Http, direction: usize, here: &Place, byte: u8) -> u32 {
    let s = stream(http, direction);
    match s.phase {
        phase::TARGET_REST => {
            let (n, found) = here.find::<false>();
            // The byte that ended the search is looked at by itself.
            if !found {
                return n;
            }
            if n > 1 {
                return n - 1;
            }
            end_target(http, direction, byte);
            1
        }
        phase::VERSION_END | phase::VERSION_LF => {
            if byte == b'\n' {
                end_request_line(http, direction);
            } else if byte == b'\r' && s.phase == phase::VERSION_END {
                s.phase = phase::VERSION_LF;
            } else {
                not_http(http, direction);
            }
            1
        }
        phase::METHOD => {
            method_byte(http, direction, byte);
            1
        }
        phase::STATUS_VERSION => version(http, direction, byte, phase::STATUS_SP),
        phase::STATUS_SP => {
            if byte == b' ' {
                s.phase = phase::STATUS_CODE;
                s.count = 0;
            } else {
                not_http(http, direction);
            }
            1
        }
        phase::STATUS_CODE => {
            let digit = byte.wrapping_sub(b'0');
            if digit > 9 || s.count == 0 && digit == 0 {
                not_http(http, direction);
                return 1;
            }
            s.status = s.status.wrapping_mul(10).wrapping_add(u16::from(digit));
            s.count += 1;
            if s.count == 3 {
                s.phase = phase::STATUS_END;
            }
            1
        }
        phase::STATUS_END => {
            if byte == b' ' || byte == b'\r' {
                s.phase = phase::REASON;
            } else if byte == b'\n' {
                end_status_line(http, direction);
            } else {
                not_http(http, direction);
            }
            1
        }
        phase::START_H => {
            // The kind may have been decided by the other direction since.
            if s.kind == kind::RESPONSES || s.kind == kind::UNKNOWN && byte == b'T' {
                begin_response(http, direction);
                let s = stream(http, direction);
                s.phase = phase::STATUS_VERSION;
                s.count = 1;
                version(http, direction, byte, phase::STATUS_SP)
            } else {
                begin_request(http, direction);
                let s = stream(http, direction);
                s.phase = phase::METHOD;
                s.word = u64::from(b'H');
                s.count = 1;
                method_byte(http, direction, byte);
                1
            }
        }
        phase::TLS_MAJOR => {
            if byte == 3 {
                s.phase = phase::TLS_MINOR;
            } else {
                not_http(http, direction);
            }
            1
        }
        _ => {
            if byte <= 4 {
                // The other end may not know TLS, and answer in HTTP, or have done so.
                if http.exchange.protocol <= protocol::UNDECIDED {
                    http.exchange.protocol = protocol::TLS;
                }
                lose(http, direction);
            } else {
                not_http(http, direction);
            }
            1
        }
    }
}

/// The rest of the start line of a request, behind its target.
#[inline(always)]
fn request_version(http: &mut Http, direction: usize, here: &Place) -> u32 {
    let left = here.left;
    let s = stream(http, direction);
    if s.count == 0 && left >= 10 {
        let (word, end) = (here.word::<0>(), here.word::<8>());
        if word & !(1 << 56) == word_of(b"HTTP/1.0") && begins!(end, b"\r\n") {
            s.version = 10 + (word >> 56 & 1) as u8;
            end_request_line(http, direction);
            return 10;
        }
    }
    version(http, direction, here.byte(), phase::VERSION_END)
}

/// Bytes of a status line up to the SP or CR behind the code.
const STATUS_LINE: u32 = 13;

/// Version and code of a status line that begins with these words.
#[inline(always)]
fn status_line(word: u64, more: u64) -> Option<(u8, u16)> {
    // " 200" and what follows: SP, or the end of the line.
    let digits = more >> 8 & 0xff_ffff;
    let (a, b, c) = (digits & 0xff, digits >> 8 & 0xff, digits >> 16);
    let decimal = a.wrapping_sub(u64::from(b'1')) < 9
        && b.wrapping_sub(u64::from(b'0')) < 10
        && c.wrapping_sub(u64::from(b'0')) < 10;
    let end = (more >> 32) as u8;
    if word & !(1 << 56) != word_of(b"HTTP/1.0") || more as u8 != b' ' || !decimal || (end != b' ' && end != b'\r') {
        return None;
    }
    let status = (a * 100 + b * 10 + c).wrapping_sub(u64::from(b'0') * 111) as u16;
    Some((10 + (word >> 56 & 1) as u8, status))
}

/// At the first byte of a head, or before it.
#[inline(always)]
fn start(http: &mut Http, direction: usize, here: &Place) -> u32 {
    let left = here.left;
    let byte = here.byte();
    let undecided = http.exchange.protocol <= protocol::UNDECIDED;
    let s = stream(http, direction);
    if (byte == 0x16 || byte == 0) && undecided && s.marks & mark::PROVISIONAL == 0 {
        // The PROXY protocol, version 2, begins with two empty lines and a 0.
        s.phase = if byte == 0 { phase::PROXY } else { phase::TLS_MAJOR };
        s.count = 1;
        return 1;
    }
    if s.kind == kind::RESPONSES {
        begin_response(http, direction);
        let s = stream(http, direction);
        if left >= STATUS_LINE
            && let Some((version, status)) = status_line(here.word::<0>(), here.word::<8>())
        {
            s.version = version;
            s.status = status;
            s.phase = phase::REASON;
            return STATUS_LINE;
        }
        s.phase = phase::STATUS_VERSION;
        return version(http, direction, byte, phase::STATUS_SP);
    }
    if byte == b'\r' || byte == b'\n' {
        // RFC 9112 §2.2: an empty line before a request is ignored.
        return 1;
    }
    let word = here.word::<0>();
    let len = if left >= 8 { known_method(word) } else { 0 };
    if len == 0 && byte == b'H' && s.kind == kind::UNKNOWN {
        s.phase = phase::START_H;
        return 1;
    }
    begin_request(http, direction);
    if len != 0 {
        end_method(http, direction, word & (u64::MAX >> ((8 - len) * 8)), 0, len as u8);
        return len + 1;
    }
    stream(http, direction).phase = phase::METHOD;
    method_byte(http, direction, byte);
    1
}

#[inline(always)]
fn method_byte(http: &mut Http, direction: usize, byte: u8) {
    let s = stream(http, direction);
    let count = s.count;
    if byte == b' ' && count != 0 {
        let (word, more) = (s.word, s.length);
        end_method(http, direction, word, more, count);
    } else if is_tchar(byte) && count < METHOD as u8 {
        let placed = u64::from(byte) << ((count & 7) * 8);
        if count < 8 {
            s.word |= placed;
        } else {
            s.length |= placed;
        }
        s.count = count + 1;
    } else {
        not_http(http, direction);
    }
}

#[inline(always)]
fn target(http: &mut Http, direction: usize, here: &Place) -> u32 {
    let left = here.left;
    let byte = here.byte();
    let len = http.exchange.target_len;
    let full = http.full_target != 0;
    if len & 7 == 0 && len < TARGET as u8 && left >= 8 {
        // Eight bytes at once, as far as they are kept.
        let word = here.word::<0>();
        let mut hit = below(word, b' ' + 1);
        if !full {
            hit |= equal(word, b'?') | equal(word, b'#');
        }
        // `hit` is exact up to the first match of each kind, hence up to the first of all.
        let n = if hit == 0 { 8 } else { first(hit) };
        if n != 0 {
            let kept = word & (u64::MAX >> ((8 - n) * 8));
            let words = exchange_words(http);
            // SAFETY: words 6 to 13 of the exchange are `target`, and the index is at most 7.
            unsafe { *words.add(6 + clamp::<7>(u64::from(len >> 3)) as usize) = kept };
            http.exchange.target_len = len + n as u8;
            if n < 8 && (word >> (n * 8)) as u8 == b' ' {
                end_target(http, direction, b' ');
                return n + 1;
            }
            return n;
        }
    }
    if byte <= b' ' {
        end_target(http, direction, byte);
    } else if !full && (byte == b'?' || byte == b'#') {
        let s = stream(http, direction);
        // Something of the target was there, if not a byte that is kept.
        s.count = 1;
        s.phase = phase::TARGET_REST;
    } else if len < TARGET as u8 {
        // SAFETY: the index is at most 63.
        unsafe { *http.exchange.target.as_mut_ptr().add(clamp::<63>(u64::from(len)) as usize) = byte };
        http.exchange.target_len = len + 1;
    } else {
        set(http, bit::TARGET_TRUNCATED);
        stream(http, direction).phase = phase::TARGET_REST;
    }
    1
}

/// Behind the last byte of the target.
#[inline(always)]
fn end_target(http: &mut Http, direction: usize, byte: u8) {
    let len = http.exchange.target_len;
    let s = stream(http, direction);
    if byte != b' ' || len == 0 && s.count == 0 {
        not_http(http, direction);
    } else {
        s.phase = phase::VERSION;
        s.count = 0;
    }
}

/// A byte of `HTTP/1.0` or `HTTP/1.1`.
#[inline(always)]
fn version(http: &mut Http, direction: usize, byte: u8, then: u8) -> u32 {
    const NAME: u64 = word_of(b"HTTP/1.0");
    let method = u8::from(
        http.exchange.method_len == 3
            && http.exchange.method[0] == b'P'
            && http.exchange.method[1] == b'R'
            && http.exchange.method[2] == b'I',
    );
    let s = stream(http, direction);
    let expected = (NAME >> ((s.count & 7) * 8)) as u8;
    if s.count == 7 && (byte == b'0' || byte == b'1') {
        s.version = 10 + (byte - b'0');
        s.phase = then;
    } else if s.count < 7 && byte == expected {
        s.count += 1;
    } else if s.count == 5 && byte == b'2' && method != 0 && then == phase::VERSION_END {
        // `PRI` is reserved for the preface of HTTP/2 (RFC 9113 §11.6).
        forget(http);
        http.begun = http.begun.wrapping_sub(1);
        stop(http, protocol::H2);
    } else {
        not_http(http, direction);
    }
    1
}

/// Bytes of the longest name of interest, with its colon.
const LONGEST_NAME: u32 = b"transfer-encoding:".len() as u32;

/// A step at the first byte of a line of the head.
#[inline(always)]
fn line(http: &mut Http, direction: usize, here: &Place) -> u32 {
    let left = here.left;
    let byte = here.byte();
    let s = stream(http, direction);
    if is_blank(byte) {
        // obs-fold (RFC 9112 §5.2): the value goes on, and the line break was white space.
        s.phase = if s.field == field::NONE { phase::SKIP } else { phase::VALUE };
        if s.count != 0 {
            s.marks |= mark::GAP;
        }
        return 1;
    }
    if s.field != field::NONE {
        end_element(http, direction);
        stream(http, direction).field = field::NONE;
    }
    let s = stream(http, direction);
    let mut end = u32::from(byte == b'\n');
    if byte == b'\r' {
        if left < 2 || here.word::<0>() >> 8 & 0xff != u64::from(b'\n') {
            s.phase = phase::LINE_LF;
            return 1;
        }
        end = 2;
    }
    if end != 0 {
        end_head(http, direction, end, 0);
        return end;
    }
    let letter = byte | 0x20;
    if letter != b'c' && letter != b'k' && letter != b't' && letter != b'u' {
        s.phase = phase::SKIP;
        return 0;
    }
    let (word, more) = (here.word::<0>(), here.word::<8>());
    // What lies beyond `left` is of an earlier window: each match must end before it.
    let (name, len, end) = if begins!(word, b"connecti") && begins!(more, b"on") {
        (field::CONNECTION, 11, more >> 16)
    } else if begins!(word, b"content-") && begins!(more, b"length") {
        (field::CONTENT_LENGTH, 15, more >> 48)
    } else if begins!(word, b"transfer") && begins!(more, b"-encodin") && begins!(here.word::<16>(), b"g") {
        (field::TRANSFER_ENCODING, 18, here.word::<16>() >> 8)
    } else if begins!(word, b"keep-ali") && begins!(more, b"ve:") {
        (field::KEEP_ALIVE, 11, more >> 16)
    } else if begins!(word, b"upgrade:") {
        (field::UPGRADE, 8, word >> 56)
    } else {
        (field::NONE, LONGEST_NAME, 0)
    };
    if len <= left {
        if end as u8 == b':' {
            begin_value(s, name);
            return len;
        }
        if is_blank(end as u8) {
            malformed(s, name);
        }
        s.phase = phase::SKIP;
        return 0;
    }
    // The line may be cut.
    s.phase = phase::NAME;
    s.word = 0;
    s.count = 0;
    s.part = part::NONE;
    name_byte(s, byte);
    1
}

/// A byte of a field name that may be one of interest: eight at a time they are compared and dropped.
#[inline(always)]
fn name_byte(s: &mut Stream, byte: u8) {
    if byte == b'\n' {
        s.phase = phase::LINE;
        return;
    }
    if byte == b':' || is_blank(byte) {
        let name = match s.part {
            part::CONNECTI if s.word == word_of(b"on") && s.count == 10 => field::CONNECTION,
            part::CONTENT if s.word == word_of(b"length") && s.count == 14 => field::CONTENT_LENGTH,
            part::TRANSFER_ENCODIN if s.word == word_of(b"g") && s.count == 17 => field::TRANSFER_ENCODING,
            part::KEEP_ALI if s.word == word_of(b"ve") && s.count == 10 => field::KEEP_ALIVE,
            part::NONE if s.word == word_of(b"upgrade") && s.count == 7 => field::UPGRADE,
            _ => field::NONE,
        };
        if byte == b':' {
            begin_value(s, name);
        } else {
            malformed(s, name);
            s.phase = phase::SKIP;
        }
        return;
    }
    s.word |= u64::from(lower(byte)) << ((s.count & 7) * 8);
    s.count += 1;
    if s.count & 7 == 0 {
        s.part = if s.count == 8 {
            part_of(s.word)
        } else if s.count == 16 && s.part == part::TRANSFER && s.word == word_of(b"-encodin") {
            part::TRANSFER_ENCODIN
        } else {
            part::OTHER
        };
        s.word = 0;
        if s.part == part::OTHER {
            s.phase = phase::SKIP;
        }
    }
}

/// White space before the colon: servers refuse it, ignore it or ignore the line (RFC 9112 §5.1), so the value is not read.
#[inline(always)]
fn malformed(s: &mut Stream, name: u8) {
    if name == field::CONNECTION {
        s.framing |= framing::CONNECTION;
        s.tokens |= token::OTHER;
    } else if name == field::CONTENT_LENGTH {
        s.framing |= framing::LENGTH_BAD;
    } else if name == field::TRANSFER_ENCODING {
        s.framing |= framing::CODED;
    }
}

/// Which known name or token begins with these eight bytes.
#[inline(always)]
fn part_of(word: u64) -> u8 {
    if word == word_of(b"connecti") {
        part::CONNECTI
    } else if word == word_of(b"content-") {
        part::CONTENT
    } else if word == word_of(b"transfer") {
        part::TRANSFER
    } else if word == word_of(b"keep-ali") {
        part::KEEP_ALI
    } else if word == word_of(b"websocke") {
        part::WEBSOCKE
    } else {
        part::OTHER
    }
}

/// Behind the colon.
#[inline(always)]
fn begin_value(s: &mut Stream, name: u8) {
    s.word = 0;
    s.count = 0;
    s.part = part::NONE;
    s.marks &= !mark::GAP;
    s.phase = phase::SKIP;
    s.field = field::NONE;
    if name == field::NONE || s.kind == kind::REQUESTS && name >= field::KEEP_ALIVE {
        return;
    }
    s.field = name;
    s.phase = phase::VALUE;
    if name == field::CONNECTION {
        s.framing |= framing::CONNECTION;
    } else if name == field::TRANSFER_ENCODING {
        s.framing |= framing::CODED;
    }
}

/// A step in the value of a field of interest.
#[inline(always)]
fn value(http: &mut Http, direction: usize, here: &Place) -> u32 {
    let left = here.left;
    let byte = here.byte();
    let s = stream(http, direction);
    if s.count == 0 && s.part == part::NONE && byte == b' ' {
        // The common values, if they are the whole line and the next line does not continue them.
        let (word, more) = (here.word::<0>(), here.word::<8>());
        if s.field == field::CONNECTION {
            if left >= 9 && begins!(word, b" close\r\n") && !is_blank(more as u8) {
                s.field = field::NONE;
                s.phase = phase::LINE;
                add_tokens(http, direction, token::CLOSE);
                return 8;
            }
            if left >= 14 && begins!(word, b" keep-al") && begins!(more, b"ive\r\n") && !is_blank((more >> 40) as u8) {
                s.field = field::NONE;
                s.phase = phase::LINE;
                add_tokens(http, direction, token::KEEP_ALIVE);
                return 13;
            }
        } else if s.field == field::CONTENT_LENGTH {
            // Seven digits at most behind the SP; `hit` marks the first byte that is none.
            let digits = word >> 8 | more << 56;
            let hit = !digits_in(digits) & (ONES * 0x80);
            let n = if hit == 0 { 8 } else { first(hit) };
            if n != 0 && n != 8 {
                // Two bytes behind them, and one of the next line: at most bytes 8, 9, 10.
                let shift = n * 8;
                let tail = digits >> shift | more >> 8 << (64 - shift);
                if left >= n + 4 && begins!(tail, b"\r\n") && !is_blank((tail >> 16) as u8) {
                    s.word = decimal(digits << (64 - shift));
                    s.count = n as u8;
                    end_element(http, direction);
                    let s = stream(http, direction);
                    s.field = field::NONE;
                    s.phase = phase::LINE;
                    return n + 3;
                }
            }
        }
    }
    match byte {
        b'\n' => s.phase = phase::LINE,
        b' ' | b'\t' | b'\r' => {
            if s.count != 0 {
                s.marks |= mark::GAP;
            }
        }
        b',' => end_element(http, direction),
        _ => element_byte(s, byte),
    }
    1
}

/// 0x80 in each byte that is a digit.
#[inline(always)]
fn digits_in(word: u64) -> u64 {
    let high = (word & (ONES * 0xf0)) ^ (ONES * 0x30);
    let over = ((word & (ONES * 0x0f)) + ONES * 6) & (ONES * 0x10);
    let other = high | over;
    // A byte of `other` is 0 for a digit, and else at least 0x10: no borrow reaches the bit that is tested.
    other.wrapping_sub(ONES) & !other & (ONES * 0x80)
}

/// Eight decimal digits, the first in the lowest byte; bytes that are 0 count as digits 0.
#[inline(always)]
fn decimal(digits: u64) -> u64 {
    let x = digits & (ONES * 0x0f);
    let x = (x * 10 + (x >> 8)) & 0x00ff_00ff_00ff_00ff;
    let x = (x * 100 + (x >> 16)) & 0x0000_ffff_0000_ffff;
    (x * 10_000 + (x >> 32)) & 0xffff_ffff
}

/// A byte of a list element.
#[inline(always)]
fn element_byte(s: &mut Stream, byte: u8) {
    if s.count == SPOILED || s.marks & mark::GAP != 0 {
        s.count = SPOILED;
        return;
    }
    let digit = byte.wrapping_sub(b'0');
    if s.field == field::CONTENT_LENGTH {
        if digit > 9 || s.word > u64::MAX / 20 {
            s.count = SPOILED;
            return;
        }
        s.word = s.word * 10 + u64::from(digit);
        s.count = 1;
        return;
    }
    if s.field == field::KEEP_ALIVE {
        if s.part != part::NONE {
            if digit <= 9 {
                let number = s.word * 10 + u64::from(digit);
                s.word = if number > u64::from(u32::MAX) { u64::from(u32::MAX) } else { number };
                s.count = 1;
            } else if byte != b'"' {
                s.count = SPOILED;
            }
            return;
        }
        if byte == b'=' {
            s.part = if s.count == 7 && s.word == word_of(b"timeout") {
                part::TIMEOUT
            } else if s.count == 3 && s.word == word_of(b"max") {
                part::MAX
            } else {
                part::OTHER
            };
            s.word = 0;
            s.count = 0;
            return;
        }
        if s.count >= 8 {
            s.count = SPOILED;
            return;
        }
    }
    if s.count >= 16 {
        s.count = SPOILED;
        return;
    }
    s.word |= u64::from(lower(byte)) << ((s.count & 7) * 8);
    s.count += 1;
    if s.count == 8 && s.field != field::KEEP_ALIVE {
        s.part = part_of(s.word);
        s.word = 0;
    }
}

/// Adds to the `Connection` tokens of the head in progress.
#[inline(always)]
fn add_tokens(http: &mut Http, direction: usize, tokens: u8) {
    let s = stream(http, direction);
    s.tokens |= tokens;
    let (kind, status) = (s.kind, s.status);
    if kind == kind::REQUESTS {
        http.exchange.request_connection |= tokens;
    } else if answers(http, status) {
        http.exchange.response_connection |= tokens;
    }
}

/// A valid `Content-Length`.
#[inline(always)]
fn content_length(s: &mut Stream, length: u64) {
    if s.framing & framing::LENGTH != 0 && s.length != length {
        s.framing |= framing::LENGTH_BAD;
    } else {
        s.framing |= framing::LENGTH;
        s.length = length;
    }
}

/// A list element is whole. Not inlined, for the size of the programs.
#[inline(never)]
fn end_element(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    let (count, part, word, status) = (s.count, s.part, s.word, s.status);
    s.word = 0;
    s.count = 0;
    s.part = part::NONE;
    s.marks &= !mark::GAP;
    match s.field {
        field::CONNECTION => {
            let tokens = if count == 0 {
                0
            } else if part == part::NONE && count == 5 && word == word_of(b"close") {
                token::CLOSE
            } else if part == part::KEEP_ALI && count == 10 && word == word_of(b"ve") {
                token::KEEP_ALIVE
            } else if part == part::NONE && count == 7 && word == word_of(b"upgrade") {
                token::UPGRADE
            } else {
                token::OTHER
            };
            add_tokens(http, direction, tokens);
        }
        field::CONTENT_LENGTH => {
            if count == 0 || count == SPOILED {
                s.framing |= framing::LENGTH_BAD;
            } else {
                content_length(s, word);
            }
        }
        field::TRANSFER_ENCODING => {
            if part == part::NONE && count == 7 && word == word_of(b"chunked") {
                s.framing |= framing::CHUNKED;
            } else if count != 0 {
                s.framing &= !framing::CHUNKED;
            }
        }
        field::UPGRADE => {
            if part == part::WEBSOCKE && count == 9 && word == u64::from(b't') {
                s.framing |= framing::WEBSOCKET;
            } else if part == part::NONE && count == 3 && word == word_of(b"h2c") {
                s.framing |= framing::H2C;
            }
        }
        _ => {
            if count != 1 || !answers(http, status) {
                return;
            }
            if part == part::TIMEOUT {
                http.exchange.keep_alive_timeout_s = word as u32;
                set(http, bit::HAS_TIMEOUT);
            } else if part == part::MAX {
                http.exchange.keep_alive_max = word as u32;
                set(http, bit::HAS_MAX);
            }
        }
    }
}

/// Behind the LF of a line that was passed over.
#[inline(always)]
fn end_line(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    match s.phase {
        phase::REASON => end_status_line(http, direction),
        phase::TRAILER_SKIP => s.phase = phase::TRAILER,
        _ => end_chunk_size(s),
    }
}

#[inline(always)]
fn end_chunk_size(s: &mut Stream) {
    s.phase = if s.length == 0 { phase::TRAILER } else { phase::CHUNK_DATA };
}

/// Behind the last byte of a body of known length, or of a chunk's data.
#[inline(always)]
fn end_data(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    if s.phase == phase::CHUNK_DATA {
        s.phase = phase::CHUNK_END;
    } else {
        end_message(http, direction);
    }
}

#[inline(always)]
fn end_message(http: &mut Http, direction: usize) {
    let s = stream(http, direction);
    s.phase = phase::START;
    let done = if s.kind == kind::RESPONSES { bit::BODY_INCOMPLETE } else { bit::REQUEST_INCOMPLETE };
    clear(http, done);
}

/// `value`, stored and read again: the verifier forgets in map memory what it knows of a number, and so takes the many
/// ways that lead here for one.
#[inline(always)]
fn through_memory(place: &mut u8, value: u8) -> u8 {
    let place = &raw mut *place;
    // SAFETY: a member of the state. Volatile, or the load is left out.
    unsafe {
        place.write_volatile(value);
        place.read_volatile()
    }
}

/// Behind the empty line: RFC 9112 §6.3 says what follows. `rest` is what the segment has of it, at least.
#[inline(always)]
fn end_head(http: &mut Http, direction: usize, used: u32, rest: u32) {
    let s = stream(http, direction);
    if s.head.wrapping_add(used) > MAX_HEAD {
        s.phase = phase::REJECTED;
        return;
    }
    if s.framing & framing::CONNECTION != 0 && s.tokens == 0 {
        s.tokens = token::OTHER;
    }
    let (kind, tokens, framing, status, length) = (s.kind, s.tokens, s.framing, s.status, s.length);
    s.count = 0;
    let sized = framing & framing::LENGTH != 0;
    let mut next = if framing & framing::CODED != 0 && s.version == 10 {
        // RFC 9112 §6.1: HTTP/1.0 has no such field.
        phase::UNFRAMED
    } else if framing & framing::CHUNKED != 0 {
        phase::CHUNK_SIZE
    } else if framing & framing::CODED != 0 {
        if kind == kind::REQUESTS { phase::UNFRAMED } else { phase::UNTIL_CLOSE }
    } else if framing & framing::LENGTH_BAD != 0 {
        phase::UNFRAMED
    } else if length != 0 {
        phase::BODY
    } else if sized || kind == kind::REQUESTS {
        phase::START
    } else {
        phase::UNTIL_CLOSE
    };
    next = through_memory(&mut s.phase, next);
    if next == phase::CHUNK_SIZE {
        s.length = 0;
    }
    if kind == kind::REQUESTS {
        if http.connect != 0 {
            next = phase::CONNECT;
        }
        http.exchange.request_connection = tokens | token::COMPLETE;
        http.exchange.requests = http.exchange.requests.saturating_add(1);
        stream(http, direction).phase = next;
        if next != phase::START && next != phase::CONNECT {
            set(http, bit::REQUEST_INCOMPLETE);
        }
        return;
    }
    if status < 200 && status != 101 {
        s.phase = phase::START;
        return;
    }
    let number = http.answered;
    let known = number < http.named;
    let is_head = known && http.heads >> (number & 63) & 1 != 0;
    let last = answers(http, status);
    let connect = last && http.connect != 0;
    if last {
        http.exchange.response_connection = tokens | token::COMPLETE;
    }
    http.exchange.responses = http.exchange.responses.saturating_add(1);
    if number < http.begun {
        http.answered = number.wrapping_add(1);
    }
    if status == 101 || connect && status < 300 {
        set(http, bit::UPGRADED);
        let protocol = if status != 101 {
            protocol::HTTP1
        } else if framing & framing::WEBSOCKET != 0 {
            protocol::WEBSOCKET
        } else if framing & framing::H2C != 0 {
            protocol::H2
        } else {
            protocol::HTTP1
        };
        stop(http, protocol);
        return;
    }
    if connect {
        // Refused: requests go on.
        http.connect = 0;
        let requests = stream(http, 1 - direction);
        if requests.phase == phase::CONNECT {
            requests.phase = phase::START;
        }
    }
    if is_head || status == 204 || status == 304 {
        next = phase::START;
    } else if !known && next != phase::START && http.exchange.flags & bit::REQUESTS_LOST != 0 {
        // It may answer a HEAD.
        next = phase::UNFRAMED;
    }
    next = through_memory(&mut stream(http, direction).phase, next);
    let whole = next == phase::BODY && length <= u64::from(rest);
    if next == phase::BODY && !whole || next == phase::CHUNK_SIZE {
        set(http, bit::BODY_INCOMPLETE);
    } else if next == phase::UNTIL_CLOSE || next == phase::UNFRAMED {
        set(http, bit::BODY_UNTIL_CLOSE);
    }
    stream(http, direction).phase = next;
}

/// Data of a body.
#[inline(always)]
fn data(http: &mut Http, direction: usize, window: &mut Window) {
    let s = stream(http, direction);
    let rest = window.len.wrapping_sub(window.at);
    if s.length > u64::from(rest) {
        s.length -= u64::from(rest);
        window.at = window.len;
        return;
    }
    window.at = window.at.wrapping_add(s.length as u32);
    s.length = 0;
    end_data(http, direction);
}

/// A step in one of the other phases.
#[inline(always)]
fn rare(http: &mut Http, direction: usize, here: &Place) -> u32 {
    let left = here.left;
    let byte = here.byte();
    if stream(http, direction).phase <= phase::STATUS_END {
        return start_line(http, direction, here, byte);
    }
    let begun = http.begun;
    let s = stream(http, direction);
    match s.phase {
        phase::NAME => name_byte(s, byte),
        phase::LINE_LF => {
            if byte == b'\n' {
                end_head(http, direction, 1, 0);
            } else {
                s.phase = phase::REJECTED;
            }
        }
        phase::CHUNK_SIZE => {
            let digit = byte.wrapping_sub(b'0');
            let letter = (byte | 0x20).wrapping_sub(b'a');
            if digit <= 9 || letter < 6 {
                if s.length >> 56 != 0 {
                    s.phase = phase::REJECTED;
                    return 1;
                }
                s.length = s.length << 4 | u64::from(if digit <= 9 { digit } else { letter + 10 });
                s.count = 1;
            } else if s.count == 0 {
                s.phase = phase::REJECTED;
            } else if byte == b'\n' {
                end_chunk_size(s);
            } else if byte == b';' || byte == b'\r' || is_blank(byte) {
                s.phase = phase::CHUNK_EXT;
            } else {
                s.phase = phase::REJECTED;
            }
        }
        phase::CHUNK_END | phase::CHUNK_LF => {
            if byte == b'\n' {
                s.phase = phase::CHUNK_SIZE;
                s.count = 0;
                s.length = 0;
            } else if byte == b'\r' && s.phase == phase::CHUNK_END {
                s.phase = phase::CHUNK_LF;
            } else {
                s.phase = phase::REJECTED;
            }
        }
        phase::TRAILER => {
            if byte == b'\n' {
                end_message(http, direction);
            } else if byte == b'\r' {
                s.phase = phase::TRAILER_LF;
            } else {
                s.phase = phase::TRAILER_SKIP;
            }
        }
        phase::TRAILER_LF => {
            if byte == b'\n' {
                end_message(http, direction);
            } else {
                s.phase = phase::REJECTED;
            }
        }
        phase::PROXY_LINE | phase::PROXY => proxy_byte(s, byte),
        phase::HUNT => {
            let word = here.word::<0>();
            let found = left >= 8
                && if s.kind == kind::RESPONSES {
                    begun != 0 && begins_status_line(word)
                } else {
                    known_method(word) != 0
                };
            if !found {
                return here.rest;
            }
            s.phase = phase::START;
            s.marks |= mark::PROVISIONAL;
            return 0;
        }
        phase::UNFRAMED | phase::CONNECT => s.phase = phase::REJECTED,
        // A line that is being passed over: `step` goes on with it.
        _ => return 0,
    }
    1
}

/// A byte of the header of the PROXY protocol. Not inlined, for the size of the programs.
#[inline(never)]
fn proxy_byte(s: &mut Stream, byte: u8) {
    const SIGNATURE: u64 = word_of(b"\0\r\nQUIT\n");
    if s.phase == phase::PROXY_LINE {
        if byte == b'\n' {
            s.phase = phase::START;
        }
        return;
    }
    // Behind the signature: version and command, family, and the length of the rest.
    s.length = (s.length << 8 | u64::from(byte)) & 0xffff;
    if s.kind == kind::RESPONSES || s.count < 8 && byte != (SIGNATURE >> ((s.count & 7) * 8)) as u8 {
        s.phase = phase::REJECTED;
    } else if s.count == 11 {
        s.phase = phase::BODY;
    }
    s.count += 1;
}

#[inline(always)]
fn begins_status_line(word: u64) -> bool {
    word & (u64::MAX >> 8) == word_of(b"HTTP/1.")
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
