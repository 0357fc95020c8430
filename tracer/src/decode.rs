//! Bytes of the ring buffer in, typed facts out.
//!
//! Accepts any bytes without a panic: what is not a record of this version's size and kinds is refused with a reason.
//! From here on nothing knows the wire format. Times stay nanoseconds of `CLOCK_MONOTONIC`; `connection` dates them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tracer_ebpf::head::{self, bit, protocol, token};
use tracer_ebpf::{Record, first_end, flag, kind, role, source, unpack_state};

use crate::event::{ClosedBy, Connection, Family, Http, HttpVersion, Protocol, Role, Source, TcpState};

/// What one record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A socket ended: it reached `CLOSE`.
    Ended(Box<Socket>),
    /// A socket changed its state otherwise.
    Changed(Box<Socket>),
    /// A socket's peer closed long ago, its process has not.
    CloseWait(Box<Socket>),
    /// A socket that had already ended sent a RST.
    ResetAfterEnd {
        /// Its cookie.
        cookie: u64,
    },
}

/// A process as the kernel named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id on the host.
    pub pid: u32,
    /// Nanoseconds from boot to its start: tells two processes with one id apart.
    pub start_ns: u64,
    /// Real user id.
    pub uid: u32,
    /// NUL-padded name of the main thread.
    pub comm: [u8; 16],
    /// How it was learnt.
    pub source: Source,
}

/// Everything that the kernel programs know of a socket at one transition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// When the transition happened.
    pub at_ns: u64,
    /// The kernel's socket cookie.
    pub cookie: u64,
    /// The mini-socket that may be left does not carry `cookie`.
    pub cookie_late: bool,
    /// Inode number of the network namespace.
    pub netns: u32,
    /// The device that the socket is bound to; 0: none.
    pub bound_dev: u32,
    /// Address family, IPv4-mapped addresses counted as IPv4.
    pub family: Family,
    /// Local address and port.
    pub local: SocketAddr,
    /// Remote address and port.
    pub remote: SocketAddr,
    /// Which end this is.
    pub role: Role,
    /// The owner.
    pub owner: Option<Task>,
    /// Who made the local close; the same process as `owner`, another, or not known.
    pub closer: Option<Task>,
    /// Who sent the first FIN or RST; [`ClosedBy::None`] if neither was seen.
    pub first_end: ClosedBy,
    /// State before the transition.
    pub old: TcpState,
    /// State after it.
    pub new: TcpState,
    /// All transitions so far with their times, this one last.
    pub states: Vec<(TcpState, u64)>,
    /// When ESTABLISHED was entered (or the socket first seen, if `started_before`).
    pub established_ns: Option<u64>,
    /// The last payload byte in either direction.
    pub payload_ns: Option<u64>,
    /// The first FIN or RST in either direction.
    pub end_ns: Option<u64>,
    /// The socket was open before the programs were attached.
    pub started_before: bool,
    /// The peer's FIN was processed.
    pub fin_received: bool,
    /// Everything that was sent, a FIN included, was acknowledged.
    pub all_acknowledged: bool,
    /// An acceptable RST arrived.
    pub rst_received: bool,
    /// A RST was sent.
    pub rst_sent: bool,
    /// The local close was made by an exiting process.
    pub closed_by_exit: bool,
    /// The local close was made by tracer, which had the file in hand as somebody closed it: who, and whether at its exit, is not known.
    pub closed_in_walk: bool,
    /// Whether the namespace's TIME_WAIT table had room at the end of the socket; `None`: not known on this kernel.
    pub time_wait_room: Option<bool>,
    /// The transition ran in the process that holds the socket lock, not in softirq.
    pub in_process: bool,
    /// Both directions were shut down; in LAST_ACK and CLOSING that says nothing of the application.
    pub shut_down: bool,
    /// `sk_err`, a positive errno.
    pub sk_err: u16,
    /// Payload bytes received.
    pub rx_bytes: u64,
    /// Payload bytes sent.
    pub tx_bytes: u64,
    /// What the payload was.
    pub protocol: Protocol,
    /// The last HTTP/1.x exchange.
    pub http: Option<Http>,
    /// What the scanner knows beyond [`Http`].
    pub scan: Scan,
    /// What this host cannot tell of any socket. Not in the record: see [`crate::connection::Connections::blind`].
    pub blind: Blind,
}

/// Hooks that could not be attached, where it matters for what is said of a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blind {
    /// `tcp_receive_reset`: `rst_received` is never set.
    pub receive_reset: bool,
    /// `tcp_send_reset`: `rst_sent` is set only for a RST that answers data after `close`, and [`Fact::ResetAfterEnd`] never
    /// comes.
    pub send_reset: bool,
    /// `sched_process_exit`: `closed_by_exit` is not set where the kernel closes for a process that has ended.
    pub exits: bool,
}

/// What the head scanner knows beyond what is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Part of the request direction was not seen.
    pub requests_lost: bool,
    /// Part of the response direction was not seen.
    pub responses_lost: bool,
    /// The last final response announced a body that has not ended.
    pub body_incomplete: bool,
    /// The last final response's body ends with the connection, or where cannot be told.
    pub body_until_close: bool,
    /// The last request's body has not ended, or its end cannot be told.
    pub request_incomplete: bool,
    /// After a 101, or a `CONNECT` that was accepted.
    pub upgraded: bool,
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotARecord {
    /// The size differs from this version's.
    Size(usize),
    /// The kind is none of this version's.
    Kind(u8),
    /// A state is none of the kernel's.
    State(u8),
}

impl std::fmt::Display for NotARecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Size(n) => write!(f, "{n} bytes instead of {}", size_of::<Record>()),
            Self::Kind(kind) => write!(f, "unknown kind {kind}"),
            Self::State(state) => write!(f, "unknown TCP state {state}"),
        }
    }
}

/// Decodes one item of the ring buffer.
///
/// # Errors
/// Bytes that are not a record of this version.
pub fn decode(bytes: &[u8]) -> Result<Fact, NotARecord> {
    if bytes.len() != size_of::<Record>() {
        return Err(NotARecord::Size(bytes.len()));
    }
    let copy: Record;
    let record: &Record = match bytemuck::try_from_bytes(bytes) {
        Ok(record) => record,
        // In the ring buffer they are aligned.
        Err(_) => {
            copy = bytemuck::pod_read_unaligned(bytes);
            &copy
        }
    };
    match record.kind {
        kind::CLOSE => Ok(Fact::Ended(Box::new(socket(record)?))),
        kind::STATE => Ok(Fact::Changed(Box::new(socket(record)?))),
        kind::CLOSE_WAIT => Ok(Fact::CloseWait(Box::new(socket(record)?))),
        kind::RESET_AFTER_CLOSE => Ok(Fact::ResetAfterEnd { cookie: record.cookie }),
        other => Err(NotARecord::Kind(other)),
    }
}

fn socket(record: &Record) -> Result<Socket, NotARecord> {
    let has = |bit: u32| record.flags & bit != 0;
    let (family, local, remote) = addresses(record);
    let mut states = Vec::with_capacity(record.states.len());
    for word in record.states.into_iter().filter(|word| *word != 0) {
        let (state, at_ns) = unpack_state(word);
        states.push((tcp_state(state)?, at_ns));
    }
    let exchange = &record.http;
    Ok(Socket {
        at_ns: record.at_ns,
        cookie: record.cookie,
        cookie_late: has(flag::COOKIE_LATE),
        netns: record.netns,
        bound_dev: record.bound_dev,
        family,
        local,
        remote,
        role: match record.role {
            role::CLIENT => Role::Client,
            role::SERVER => Role::Server,
            _ if exchange.flags & bit::REQUESTS_IN != 0 => Role::Server,
            _ if exchange.flags & bit::REQUESTS_OUT != 0 => Role::Client,
            _ => Role::Unknown,
        },
        owner: task(&record.owner, record.owner_source),
        closer: task(&record.closer, source::CLOSE),
        first_end: match record.first_end {
            first_end::LOCAL => ClosedBy::Local,
            first_end::REMOTE => ClosedBy::Remote,
            first_end::BOTH => ClosedBy::Both,
            _ => ClosedBy::None,
        },
        old: tcp_state(record.old_state)?,
        new: tcp_state(record.new_state)?,
        states,
        established_ns: some_ns(record.established_ns),
        payload_ns: some_ns(record.payload_ns),
        end_ns: some_ns(record.end_ns),
        started_before: has(flag::STARTED_BEFORE),
        fin_received: has(flag::FIN_RECEIVED),
        all_acknowledged: has(flag::ALL_ACKNOWLEDGED),
        rst_received: has(flag::RST_RECEIVED),
        rst_sent: has(flag::RST_SENT),
        closed_by_exit: has(flag::CLOSED_BY_EXIT),
        closed_in_walk: has(flag::CLOSED_IN_WALK),
        time_wait_room: if has(flag::TIME_WAIT_COUNT_UNKNOWN) { None } else { Some(!has(flag::TIME_WAIT_FULL)) },
        in_process: has(flag::IN_PROCESS),
        shut_down: has(flag::SHUT_DOWN),
        sk_err: record.sk_err,
        rx_bytes: record.rx_bytes,
        tx_bytes: record.tx_bytes,
        protocol: payload_protocol(record),
        http: http(exchange),
        scan: Scan {
            requests_lost: exchange.flags & bit::REQUESTS_LOST != 0,
            responses_lost: exchange.flags & bit::RESPONSES_LOST != 0,
            body_incomplete: exchange.flags & bit::BODY_INCOMPLETE != 0,
            body_until_close: exchange.flags & bit::BODY_UNTIL_CLOSE != 0,
            request_incomplete: exchange.flags & bit::REQUEST_INCOMPLETE != 0,
            upgraded: exchange.flags & bit::UPGRADED != 0,
        },
        blind: Blind::default(),
    })
}

const fn some_ns(ns: u64) -> Option<u64> {
    if ns == 0 { None } else { Some(ns) }
}

fn task(task: &tracer_ebpf::Task, by: u8) -> Option<Task> {
    let source = match by {
        source::OPEN_FILES => Source::OpenFiles,
        source::CLOSE => Source::Close,
        source::CONNECT => Source::Connect,
        source::READ => Source::Read,
        _ => return None,
    };
    (task.tgid != 0).then_some(Task { pid: task.tgid, start_ns: task.start_ns, uid: task.uid, comm: task.comm, source })
}

/// The two ends; an IPv4-mapped IPv6 address becomes the IPv4 address that is on the wire.
fn addresses(record: &Record) -> (Family, SocketAddr, SocketAddr) {
    let ip = |bytes: &[u8; 16]| -> IpAddr {
        if record.family == 6 {
            Ipv6Addr::from(*bytes).to_canonical()
        } else {
            let [a, b, c, d, ..] = *bytes;
            Ipv4Addr::new(a, b, c, d).into()
        }
    };
    let (mut local, mut remote) = (ip(&record.local), ip(&record.remote));
    // A dual-stack socket that never connected has `::` on one side and a mapped address on the other.
    if local.is_ipv4() != remote.is_ipv4() {
        let unspecified = |ip: IpAddr| if ip.is_unspecified() { Ipv4Addr::UNSPECIFIED.into() } else { ip };
        (local, remote) = (unspecified(local), unspecified(remote));
    }
    let family = if local.is_ipv4() && remote.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    (family, SocketAddr::new(local, record.local_port), SocketAddr::new(remote, record.remote_port))
}

const fn tcp_state(state: u8) -> Result<TcpState, NotARecord> {
    Ok(match state {
        1 => TcpState::Established,
        2 => TcpState::SynSent,
        3 => TcpState::SynRecv,
        4 => TcpState::FinWait1,
        5 => TcpState::FinWait2,
        6 => TcpState::TimeWait,
        7 => TcpState::Close,
        8 => TcpState::CloseWait,
        9 => TcpState::LastAck,
        10 => TcpState::Listen,
        11 => TcpState::Closing,
        12 => TcpState::NewSynRecv,
        other => return Err(NotARecord::State(other)),
    })
}

fn payload_protocol(record: &Record) -> Protocol {
    let exchange = &record.http;
    match exchange.protocol {
        protocol::HTTP1 => {
            match if exchange.request_version != 0 { exchange.request_version } else { exchange.response_version } {
                0 => Protocol::Unobserved,
                10 => Protocol::Http10,
                _ => Protocol::Http11,
            }
        }
        protocol::H2 => Protocol::H2,
        protocol::WEBSOCKET => Protocol::Websocket,
        protocol::TLS => Protocol::Tls,
        protocol::OTHER => Protocol::Other,
        // Too few bytes to say more than that they are no HTTP head, unless the beginning was missed.
        protocol::UNDECIDED if record.flags & flag::STARTED_BEFORE == 0 && !lost(exchange) => Protocol::Other,
        protocol::NONE if record.rx_bytes == 0 && record.tx_bytes == 0 => Protocol::None,
        _ => Protocol::Unobserved,
    }
}

const fn lost(exchange: &head::Exchange) -> bool {
    exchange.flags & (bit::REQUESTS_LOST | bit::RESPONSES_LOST) != 0
}

fn http(exchange: &head::Exchange) -> Option<Http> {
    let has = |bit: u16| exchange.flags & bit != 0;
    let spoken = match exchange.protocol {
        protocol::HTTP1 | protocol::WEBSOCKET => true,
        protocol::H2 => has(bit::UPGRADED),
        _ => false,
    };
    if !spoken {
        return None;
    }
    let text =
        |bytes: &[u8], len: u8| String::from_utf8_lossy(bytes.get(..usize::from(len)).unwrap_or(bytes)).into_owned();
    // Once part of the requests was missed, the one that was seen last need not be the last one. A response that was seen
    // answers the last request: a further request would have cleared it.
    let request = exchange.request_version != 0 && !has(bit::REQUESTS_LOST);
    let response = exchange.response_version != 0;
    Some(Http {
        requests: exchange.requests,
        responses: exchange.responses,
        method: request.then(|| text(&exchange.method, exchange.method_len)),
        target: request.then(|| {
            let target = text(&exchange.target, exchange.target_len);
            // `CONNECT`, padded: only that has an authority without a scheme.
            without_userinfo(target, exchange.method.starts_with(b"CONNECT\0"), has(bit::TARGET_TRUNCATED))
        }),
        target_truncated: request && has(bit::TARGET_TRUNCATED),
        status: response.then_some(exchange.status),
        request_version: version(exchange.request_version).filter(|_| request),
        response_version: version(exchange.response_version).filter(|_| response),
        request_connection: connection(exchange.request_connection, request, has(bit::REQUESTS_LOST)),
        response_connection: connection(exchange.response_connection, response, has(bit::RESPONSES_LOST)),
        keep_alive_timeout_s: has(bit::HAS_TIMEOUT).then_some(exchange.keep_alive_timeout_s),
        keep_alive_max: has(bit::HAS_MAX).then_some(exchange.keep_alive_max),
        // Counts alone do not tell: the head of one more request may have begun, which is not counted yet.
        answered: response && exchange.responses > 0 && exchange.responses >= exchange.requests,
    })
}

/// Takes the user information out of a target's authority: `http://user:password@host/path`, `user:password@host:443`. It
/// has no place there (RFC 9110, section 4.2.4), and is a credential where it is sent all the same. An authority whose end
/// was cut off (`truncated`) may be nothing but user information, so it is left out.
fn without_userinfo(target: String, connect: bool, truncated: bool) -> String {
    // Nearly all targets are of this form: an absolute path has no authority.
    if target.starts_with('/') {
        return target;
    }
    let from = match target.find("://") {
        Some(at) => at + 3,
        None if connect => 0,
        None => return target,
    };
    let rest = &target[from..];
    let end = rest.find(['/', '?', '#']);
    let authority = &rest[..end.unwrap_or(rest.len())];
    let keep = match authority.rfind('@') {
        // A password may hold that sign.
        _ if truncated && end.is_none() => authority.len(),
        Some(at) => at + 1,
        None => return target,
    };
    format!("{}{}", &target[..from], &rest[keep..])
}

const fn version(version: u8) -> Option<HttpVersion> {
    match version {
        10 => Some(HttpVersion::V10),
        11 => Some(HttpVersion::V11),
        _ => None,
    }
}

fn connection(tokens: u8, head: bool, lost: bool) -> Option<Connection> {
    if !head {
        return lost.then_some(Connection::Unobserved);
    }
    if tokens & token::COMPLETE == 0 {
        return Some(Connection::Unobserved);
    }
    let has = |bit: u8| tokens & bit != 0;
    if tokens & !token::COMPLETE == 0 {
        return Some(Connection::Absent);
    }
    Some(Connection::Tokens {
        close: has(token::CLOSE),
        keep_alive: has(token::KEEP_ALIVE),
        upgrade: has(token::UPGRADE),
        other: has(token::OTHER),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_shows_no_user_information() {
        let cases = [
            ("/path@x", false, "/path@x"),
            ("*", false, "*"),
            ("host:443", false, "host:443"),
            ("user:word@host:443", false, "host:443"),
            ("http://host/a@b", false, "http://host/a@b"),
            ("http://user:word@host/path", false, "http://host/path"),
            ("http://user:w@rd@host/p@th", false, "http://host/p@th"),
            ("http://user:word@host?a@b", false, "http://host?a@b"),
            ("http://user:a very long wo", true, "http://"),
            ("user:a very long wo", true, ""),
            ("http://user:wo@rd", true, "http://"),
            ("http://host/a very long", true, "http://host/a very long"),
            ("", false, ""),
        ];
        for (target, truncated, shown) in cases {
            assert_eq!(without_userinfo(target.to_owned(), !target.contains("//"), truncated), shown, "{target}");
        }
        assert_eq!(without_userinfo("neither@of both".to_owned(), false, true), "neither@of both");
    }
}
