//! The HTTP/1.x head scanner: payload bytes of one connection in, a verdict on its heads out.
//!
//! What comes in: the payload of a socket's segments, in both directions, cut at any byte, duplicated or with gaps. What
//! goes out: [`Exchange`], which leaves the kernel as it is. It must never take a body for a head or a head for a body,
//! never say "absent" of what it has not seen, and never copy anything else of a head out.

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
    /// Any other token, or an empty `Connection` header.
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
    /// The last final response's body ends with the connection (neither `Content-Length` nor chunked).
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
    /// A request's start line was seen whole (`method`, `target`, `request_version` are set).
    pub const HAS_REQUEST: u16 = 1 << 10;
    /// The status line of a response to the last request was seen whole (`status`, `response_version` are set).
    pub const HAS_RESPONSE: u16 = 1 << 11;
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
    /// 10 or 11; 0: unknown.
    pub request_version: u8,
    /// 10 or 11; 0: unknown.
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
