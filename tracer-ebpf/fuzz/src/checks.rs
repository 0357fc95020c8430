//! The scanner, driven as the kernel's programs drive it, and what must hold of it for any input.
//!
//! Inputs are conversations as text: a first byte of options, then payload, with these marks in it:
//!
//! | byte | meaning |
//! | --- | --- |
//! | `0xff` | the other direction speaks |
//! | `0xfe` | the segment ends here |
//! | `0xfd n` | the next segment begins `n` bytes (signed) from where it should |
//! | `0xfc` | the direction is lost, or missed by another CPU |
//! | `0xfb` | the segment that follows is dropped by TCP: what it sends for these bytes later need not be the same |

use super::head::{self, EGRESS, Exchange, Http, INGRESS, MAX_STEPS, TARGET, WINDOW, Window, bit, protocol, token};
use super::reader::{Head, Reader};

/// The smallest head: `M / HTTP/1.1`, or `HTTP/1.1 200`, and two line ends.
const SMALLEST_HEAD: usize = 14;
/// The longest input that is looked at: shorter than the longest head, and with fewer steps than a segment may take.
pub const LONGEST: usize = 12 << 10;

/// What is behind the filled part of the window, if nothing else is said.
const USUAL: &[u8] = b"\r\nclose\n";
/// What a scanner that looks behind the filled part of its window would like to find there.
const TEMPTING: [&[u8]; 8] = [
    b"on: close\r\nX: y",
    b"ose\r\nContent-Length: 7\r\n\r\n",
    b"\n\r\nGET /z HTTP/1.1\r\n\r\n",
    b" HTTP/1.1\r\n\r\n",
    b"7\r\n\r\n",
    b"ive\r\nX",
    b"ed\r\nX: y\r\n\r\n",
    b"00 OK\r\n\r\n",
];

/// As far as it may look.
const BEHIND: usize = 64;

/// Gives a segment to the scanner, as the kernel's programs do; and again, in ways that must not matter: with something else behind the
/// filled part of the window, where another head is in the kernel; and with a window in which the same segment was looked at before,
/// for this socket or for another one.
pub fn segment(http: &mut Http, direction: usize, seq: u32, bytes: &[u8]) {
    let before = *http;
    let mut used = Window::EMPTY;
    scan(http, direction, seq, bytes, USUAL, &mut used, false);
    let mut again = before;
    let tempting = TEMPTING[(seq as usize ^ bytes.len()) % TEMPTING.len()];
    scan(&mut again, direction, seq, bytes, tempting, &mut { Window::EMPTY }, false);
    assert_eq!(bytemuck::bytes_of(http), bytemuck::bytes_of(&again), "what lies behind the window's end matters");
    again = before;
    scan(&mut again, direction, seq, bytes, USUAL, &mut used, true);
    assert_eq!(bytemuck::bytes_of(http), bytemuck::bytes_of(&again), "that it was looked at before matters");
    for role in [roles::CLIENT, roles::SERVER] {
        let mut other = Http::ZERO;
        head::role(&mut other, role);
        let mut used = Window::EMPTY;
        scan(&mut other, EGRESS, seq, bytes, USUAL, &mut used, false);
        again = before;
        scan(&mut again, direction, seq, bytes, USUAL, &mut used, true);
        // How long a head was that is too long can differ: it is known at the end of a window.
        assert_eq!(raw(&http.exchange), raw(&again.exchange), "that it was looked at for another socket matters");
    }
    // What follows must come out the same from there.
    if seq.is_multiple_of(2) {
        *http = again;
    }
}

/// The same, with `behind` behind the filled part of the window, again and again. `same`: the window was used for this segment last.
fn scan(http: &mut Http, direction: usize, seq: u32, bytes: &[u8], behind: &[u8], window: &mut Window, same: bool) {
    let Some(at) = head::enter(http, direction, seq, bytes.len() as u32) else { return };
    head::begin(window, at, bytes.len() as u32, same);
    let mut finished = false;
    for turn in 0..MAX_STEPS {
        assert!(turn as usize <= bytes.len() * 2, "a step takes a byte, or is followed by one that does");
        if let Some((at, n)) = head::refill(http, direction, window) {
            let (at, n) = (at as usize, n as usize);
            assert!(n > 0 && n <= WINDOW && at + n <= bytes.len(), "the window leaves the segment");
            let filled = bytes[at..at + n].iter().chain(behind.iter().cycle()).take(n + BEHIND);
            for (i, byte) in filled.enumerate() {
                let shift = (i % 8) * 8;
                window.words[i / 8] = window.words[i / 8] & !(0xff << shift) | u64::from(*byte) << shift;
            }
        }
        if !head::step(http, direction, window) {
            finished = true;
            break;
        }
    }
    head::leave(http, direction, finished);
}

/// Asks what the kernel's programs ask first. `next` is the first byte that TCP has not received.
pub fn arrive(http: &mut Http, direction: usize, seq: u32, bytes: &[u8], next: u32) {
    let len = bytes.len() as u32;
    if head::is_done(http, direction, seq) || head::is_inside_body(http, direction, seq, len) {
        return;
    }
    if direction == INGRESS && head::repeats(http, seq) {
        head::again(http, seq, len, next);
    }
    segment(http, direction, seq, bytes);
}

/// Something that happens in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A segment, at an offset from where it should begin.
    Segment(usize, i8, Vec<u8>),
    /// Likewise, but TCP does not take it.
    Dropped(usize, i8, Vec<u8>),
    /// `head::lose`, `head::miss`.
    Lost(usize),
    Missed(usize),
}

/// Options of an input.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The role that is told: unknown, client, server.
    pub role: u8,
    pub full_target: bool,
    pub mid_stream: bool,
    /// Offsets are meant: the segments are pieces of whole streams.
    pub disorder: bool,
}

/// Reads an input.
pub fn conversation(data: &[u8]) -> Option<(Options, Vec<Event>)> {
    let (&options, data) = data.split_first()?;
    let data = &data[..data.len().min(LONGEST)];
    let options = Options {
        role: (options & 3) % 3,
        full_target: options & 4 != 0,
        mid_stream: options & 8 != 0,
        disorder: options & 16 != 0,
    };
    // Requests first.
    let mut direction = if options.role == roles::CLIENT { EGRESS } else { INGRESS };
    let (mut events, mut offset, mut dropped, mut bytes) = (Vec::new(), 0, false, Vec::new());
    let mut data = data.iter();
    loop {
        let byte = data.next();
        if matches!(byte, None | Some(0xfb..=0xff)) && !bytes.is_empty() {
            let event = if dropped { Event::Dropped } else { Event::Segment };
            events.push(event(direction, offset, std::mem::take(&mut bytes)));
            (offset, dropped) = (0, false);
        }
        match byte {
            None => return Some((options, events)),
            Some(0xff) => direction = 1 - direction,
            Some(0xfe) => {}
            Some(0xfd) => offset = data.next().map_or(0, |n| *n as i8),
            Some(0xfc) if events.len() % 2 == 0 => events.push(Event::Lost(direction)),
            Some(0xfc) => events.push(Event::Missed(direction)),
            Some(0xfb) => dropped = true,
            Some(byte) => bytes.push(*byte),
        }
    }
}

/// Values of `tracer_ebpf::role`.
mod roles {
    pub(super) const CLIENT: u8 = 1;
    pub(super) const SERVER: u8 = 2;
}

fn new(options: Options) -> Http {
    let mut http = Http::ZERO;
    http.full_target = u8::from(options.full_target);
    head::role(&mut http, options.role);
    http
}

/// Bytes as they are told apart by [`Exchange`].
fn raw(exchange: &Exchange) -> Vec<u8> {
    let e = exchange;
    let words = [e.requests, e.responses, e.keep_alive_timeout_s, e.keep_alive_max, e.flags.into(), e.status.into()];
    let bytes = [
        e.request_connection,
        e.response_connection,
        e.request_version,
        e.response_version,
        e.protocol,
        e.method_len,
        e.target_len,
    ];
    [&words.map(u32::to_le_bytes).concat()[..], &bytes, &e.method, &e.target].concat()
}

/// What holds of any exchange.
fn is_sane(exchange: &Exchange, request_bytes: usize, response_bytes: usize) {
    let e = exchange;
    let has = |bits: u16| e.flags & bits != 0;
    assert!(e.requests as usize <= request_bytes / SMALLEST_HEAD, "more requests than fit: {e:?}");
    assert!(e.responses as usize <= response_bytes / SMALLEST_HEAD, "more responses than fit: {e:?}");
    assert!(usize::from(e.method_len) <= e.method.len() && usize::from(e.target_len) <= TARGET);
    assert!(e.method[usize::from(e.method_len)..].iter().all(|b| *b == 0), "rest of an older method: {e:?}");
    assert!(e.target[usize::from(e.target_len)..].iter().all(|b| *b == 0), "rest of an older target: {e:?}");
    assert!(!has(bit::REQUESTS_LOST) || e.request_connection & token::COMPLETE == 0, "not the last: {e:?}");
    assert!(e.request_connection & token::COMPLETE == 0 || e.request_version != 0, "{e:?}");
    assert!(!has(bit::REQUESTS_IN) || !has(bit::REQUESTS_OUT), "two roles: {e:?}");
    assert!(e.response_version == 0 || (100..1000).contains(&e.status) && matches!(e.response_version, 10 | 11));
    assert!(e.request_version == 0 || e.method_len > 0 && matches!(e.request_version, 10 | 11));
    assert!(!has(bit::RESPONSES_LOST) || !has(bit::BODY_INCOMPLETE), "{e:?}");
}

/// Any segments, in any order: nothing panics, and nothing is claimed that cannot be.
pub fn head(data: &[u8]) {
    let Some((options, events)) = conversation(data) else { return };
    any_order(options, &events);
    if !options.mid_stream {
        segmentation(options, &events);
    }
    if options.disorder && options.role != 0 {
        pieces_of_a_stream(options, &events);
    }
}

fn any_order(options: Options, events: &[Event]) {
    let mut http = new(options);
    if options.mid_stream {
        head::mid_stream(&mut http);
    }
    // One of them right before the sequence numbers wrap.
    let mut next = [0xffff_fff0u32, 77];
    let mut bytes = 0;
    for event in events {
        match event {
            Event::Segment(direction, offset, segment) => {
                let seq = next[*direction].wrapping_add_signed(i32::from(*offset));
                arrive(&mut http, *direction, seq, segment, next[INGRESS]);
                next[*direction] = seq.wrapping_add(segment.len() as u32);
                bytes += segment.len();
            }
            Event::Dropped(direction, offset, segment) => {
                let seq = next[*direction].wrapping_add_signed(i32::from(*offset));
                arrive(&mut http, *direction, seq, segment, next[INGRESS]);
                bytes += segment.len();
            }
            Event::Lost(direction) => head::lose(&mut http, *direction),
            Event::Missed(direction) => head::miss(&mut http, *direction),
        }
        // `miss` speaks for another CPU: the verdict on the last request follows with the next segment.
        if !events.iter().any(|event| matches!(event, Event::Missed(_))) {
            is_sane(&http.exchange, bytes, bytes);
        }
        let mut end = http;
        head::settle(&mut end, next[INGRESS], next[EGRESS], false);
        is_sane(&end.exchange, bytes, bytes);
    }
}

/// How a stream is cut does not matter.
fn segmentation(options: Options, events: &[Event]) {
    let mut cut = new(options);
    let mut whole = new(options);
    let mut single = new(options);
    let mut next = [[0u32; 2]; 3];
    let mut send = |which: usize, http: &mut Http, direction: usize, bytes: &[u8]| {
        let seq = &mut next[which][direction];
        segment(http, direction, *seq, bytes);
        *seq = seq.wrapping_add(bytes.len() as u32);
    };
    let mut run: Option<(usize, Vec<u8>)> = None;
    for event in events {
        let Event::Segment(direction, _, bytes) = event else { continue };
        send(0, &mut cut, *direction, bytes);
        for byte in bytes {
            send(1, &mut single, *direction, &[*byte]);
        }
        match &mut run {
            Some((last, so_far)) if last == direction => so_far.extend_from_slice(bytes),
            _ => {
                if let Some((last, so_far)) = run.replace((*direction, bytes.clone())) {
                    send(2, &mut whole, last, &so_far);
                }
            }
        }
    }
    if let Some((last, so_far)) = run {
        send(2, &mut whole, last, &so_far);
    }
    assert_eq!(raw(&cut.exchange), raw(&single.exchange), "{:?}\n{:?}", cut.exchange, single.exchange);
    assert_eq!(raw(&cut.exchange), raw(&whole.exchange), "{:?}\n{:?}", cut.exchange, whole.exchange);
}

/// Pieces of streams at their true places, with gaps, again, or in another order: what is said of a whole head is true of
/// a head that is in the stream, and all of whose bytes came.
fn pieces_of_a_stream(options: Options, events: &[Event]) {
    let requests_in = options.role != roles::CLIENT;
    let of = |request: bool| if request == requests_in { INGRESS } else { EGRESS };
    let all = |direction: usize| -> Vec<u8> {
        let bytes = events.iter().filter_map(|event| match event {
            Event::Segment(d, _, bytes) if *d == direction => Some(bytes.as_slice()),
            _ => None,
        });
        bytes.collect::<Vec<_>>().concat()
    };
    let streams = [all(INGRESS), all(EGRESS)];
    let mut truth = Reader::default();
    truth.read(true, &streams[of(true)]);
    truth.read(false, &streams[of(false)]);
    // Requests in disorder, and then their answers in order; or the other way round. (An answer never comes before its
    // request: that the stream allows it does not matter.)
    for disorder in [true, false] {
        let mut http = new(options);
        for direction in [INGRESS, EGRESS] {
            head::sync(&mut http, direction, 0);
        }
        for request in [true, false] {
            let (direction, stream) = (of(request), &streams[of(request)]);
            let mut seen = vec![false; stream.len()];
            if request != disorder {
                segment(&mut http, direction, 0, stream);
                continue;
            }
            let mut at = 0usize;
            // What the programs saw need not be what TCP took.
            let mut believed = true;
            for event in events {
                let (d, offset, bytes, dropped) = match event {
                    Event::Segment(d, offset, bytes) => (d, offset, bytes, false),
                    Event::Dropped(d, offset, bytes) => (d, offset, bytes, true),
                    Event::Lost(_) | Event::Missed(_) => continue,
                };
                if *d != direction || dropped && direction == EGRESS {
                    continue;
                }
                let from = at.saturating_add_signed(isize::from(*offset)).min(stream.len());
                let to = (from + bytes.len()).min(stream.len());
                if dropped {
                    arrive(&mut http, INGRESS, from as u32, &bytes[..to - from], first_unseen(&seen));
                    believed = false;
                    continue;
                }
                if direction == INGRESS {
                    arrive(&mut http, INGRESS, from as u32, &stream[from..to], first_unseen(&seen));
                } else {
                    segment(&mut http, direction, from as u32, &stream[from..to]);
                }
                seen[from..to].fill(true);
                at = to;
                if believed {
                    is_true(&http.exchange, options, request, &truth, &seen);
                    counts_are_true(&http.exchange, request, &truth, &seen);
                    let mut end = http;
                    settle(&mut end, direction, first_unseen(&seen), streams[1 - direction].len() as u32);
                    is_true(&end.exchange, options, request, &truth, &seen);
                }
            }
            if direction == INGRESS {
                // In the end all of it comes, in order, in small segments.
                while (first_unseen(&seen) as usize) < stream.len() {
                    let from = first_unseen(&seen) as usize;
                    let to = (from + 7).min(stream.len());
                    arrive(&mut http, INGRESS, from as u32, &stream[from..to], from as u32);
                    seen[from..to].fill(true);
                }
                let mut end = http;
                settle(&mut end, direction, stream.len() as u32, streams[1 - direction].len() as u32);
                is_true(&end.exchange, options, request, &truth, &seen);
            }
        }
    }
}

/// `rcv_nxt`, where `seen` is what TCP has.
fn first_unseen(seen: &[bool]) -> u32 {
    seen.iter().position(|seen| !seen).unwrap_or(seen.len()) as u32
}

/// [`head::settle`], with what was received of a direction and all of the other one.
fn settle(http: &mut Http, direction: usize, end: u32, of_the_other: u32) {
    let (received, acknowledged) = if direction == INGRESS { (end, of_the_other) } else { (of_the_other, end) };
    head::settle(http, received, acknowledged, false);
}

/// The heads that came whole.
fn seen_whole<'a>(request: bool, truth: &'a Reader, seen: &'a [bool]) -> impl Iterator<Item = &'a Head> + Clone {
    let heads = if request { truth.request_heads() } else { truth.response_heads() };
    let counts = move |head: &&Head| request || head.status >= 200 || head.status == 101;
    heads.iter().filter(counts).filter(|head| seen[head.from..head.to].iter().all(|seen| *seen))
}

/// Not where TCP dropped a segment: its heads stay counted, though what is said of the last one is taken back.
fn counts_are_true(e: &Exchange, request: bool, truth: &Reader, seen: &[bool]) {
    let counted = if request { e.requests } else { e.responses };
    assert!(counted as usize <= seen_whole(request, truth, seen).count(), "a head that is none: {e:?}");
}

fn is_true(e: &Exchange, options: Options, request: bool, truth: &Reader, seen: &[bool]) {
    let seen_whole = seen_whole(request, truth, seen);
    if request {
        if e.request_connection & token::COMPLETE != 0 {
            assert!(seen_whole.clone().any(|head| is_request(e, options, head)), "no such request: {e:?}\n{truth:?}");
        }
    } else {
        if e.response_version != 0 && e.response_connection & token::COMPLETE != 0 {
            assert!(seen_whole.clone().any(|head| is_response(e, head)), "no such response: {e:?}\n{truth:?}");
        }
    }
}

fn is_request(e: &Exchange, options: Options, head: &Head) -> bool {
    let query = head.target.iter().position(|b| matches!(b, b'?' | b'#'));
    let shown = if options.full_target { None } else { query }.unwrap_or(head.target.len());
    let target = &head.target[..shown.min(TARGET)];
    e.method[..usize::from(e.method_len)] == head.method
        && e.target[..usize::from(e.target_len)] == *target
        && (e.flags & bit::TARGET_TRUNCATED != 0) == (shown > TARGET)
        && (e.request_version, e.request_connection) == (head.version, head.connection)
}

fn is_response(e: &Exchange, head: &Head) -> bool {
    (e.status, e.response_version, e.response_connection) == (head.status, head.version, head.connection)
}

/// Both directions in order, compared with the [`Reader`].
pub fn differential(data: &[u8]) {
    let Some((mut options, events)) = conversation(data) else { return };
    options.role = options.role.max(1);
    let segments = events.iter().filter_map(|event| match event {
        Event::Segment(direction, _, bytes) => Some((*direction, bytes.as_slice())),
        _ => None,
    });
    compare(options, segments);
}

/// See [`differential`]; after each segment.
pub fn compare<'a>(options: Options, segments: impl Iterator<Item = (usize, &'a [u8])>) {
    let mut http = new(options);
    let mut reader = Reader::default();
    let mut next = [0xffff_fff0u32, 77];
    for (direction, bytes) in segments {
        segment(&mut http, direction, next[direction], bytes);
        next[direction] = next[direction].wrapping_add(bytes.len() as u32);
        reader.read((direction == EGRESS) == (options.role == roles::CLIENT), bytes);
        agree(options, &http.exchange, &reader);
    }
}

fn agree(options: Options, e: &Exchange, reader: &Reader) {
    let has = |bits: u16| e.flags & bits != 0;
    let show = || format!("{e:#?}\n{reader:#?}");
    assert_eq!(e.protocol, reader.protocol, "protocol {}", show());
    if matches!(e.protocol, protocol::OTHER | protocol::TLS) {
        return;
    }
    assert_eq!(e.requests as usize, reader.request_heads().len(), "requests {}", show());
    assert_eq!(e.responses, reader.final_responses, "responses {}", show());
    assert_eq!(has(bit::UPGRADED), reader.upgraded, "upgraded {}", show());
    assert_eq!(has(bit::REQUESTS_LOST), reader.requests_lost(), "requests lost {}", show());
    assert_eq!(has(bit::RESPONSES_LOST), reader.responses_lost(), "responses lost {}", show());
    assert_eq!(e.request_version != 0, reader.has_request, "has request {}", show());
    assert_eq!(e.response_version != 0, reader.has_response, "has response {}", show());
    assert_eq!(has(bit::BODY_INCOMPLETE), reader.body_incomplete, "response body {}", show());
    assert_eq!(has(bit::BODY_UNTIL_CLOSE), reader.body_until_close, "response body's end {}", show());
    let request = reader.request.as_ref().filter(|_| !reader.requests_lost());
    assert_eq!(e.request_connection & token::COMPLETE != 0, request.is_some(), "request {}", show());
    if let Some(request) = request {
        assert!(is_request(e, options, request), "request {}", show());
        assert_eq!(has(bit::REQUEST_INCOMPLETE), reader.request_incomplete, "request body {}", show());
    }
    if reader.has_response {
        assert_eq!(e.response_connection & token::COMPLETE != 0, reader.response.is_some(), "response {}", show());
        assert!(reader.response.as_ref().is_none_or(|head| is_response(e, head)), "response {}", show());
    }
}
