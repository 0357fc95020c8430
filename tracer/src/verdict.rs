//! Facts of one ended socket in, the verdict out: who closed first, what is left, and why.
//!
//! Pure functions: no I/O, no clock, no state. Each cause of the closed set is one rule, and the first that fits wins.
//! What was not observed never counts as absent: a rule that needs it does not fit, and in the end the cause is unknown.

use std::borrow::Cow;
use std::time::Duration;

use crate::decode::Socket;
use crate::event::{
    Cause, Close, ClosedBy, Connection, Final, FinalSource, How, Http, HttpVersion, Protocol, Role, TcpState,
};

/// Values of `sk_err` that say how a socket ended.
mod errno {
    /// What ICMP can say of a peer (`icmp_err_convert`, `icmpv6_err_convert`): `EACCES`, `ENONET`, `EPROTO`, `EMSGSIZE`,
    /// `ENOPROTOOPT`, `EOPNOTSUPP`, `ENETDOWN`, `ENETUNREACH`, `ECONNREFUSED`, `EHOSTDOWN`, `EHOSTUNREACH`.
    pub(super) const BY_ICMP: [u16; 11] = [13, 64, 71, 90, 92, 95, 100, 101, 111, 112, 113];
    pub(super) const EPIPE: u16 = 32;
    pub(super) const ECONNABORTED: u16 = 103;
    pub(super) const ECONNRESET: u16 = 104;
    pub(super) const ECONNREFUSED: u16 = 111;
    pub(super) const ETIMEDOUT: u16 = 110;
}

/// A persistent connection without payload for so long is idle.
const IDLE_US: u64 = 1_000_000;
/// How near to the announced time-out an idle time must be to count as it: the larger of this and a tenth.
const TIMEOUT_SLACK_US: u64 = 100_000;

/// How a socket ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Who sent the first FIN or RST.
    pub closed_by: ClosedBy,
    /// FIN, RST or time-out; `None`: nothing of these.
    pub how: Option<How>,
    /// What is left.
    pub fate: Fate,
}

/// What is left of a connection, as far as the facts tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is certain, or as certain as it can be.
    Known(Final, FinalSource),
    /// The kernel must be asked: there may be a FIN_WAIT2 mini-socket, or no room for a TIME_WAIT one.
    Ask,
}

/// How a socket ended that went from `socket.old` to CLOSE.
///
/// The kernel ends the full socket in the same way for TIME_WAIT, for a reset and for an abort; what tells them apart is
/// the state before, `sk_err`, and which segments were seen.
pub fn ending(socket: &Socket) -> Ending {
    if let Some(open) = left_open(socket) {
        return open;
    }
    if reset_arrived(socket) {
        return by_reset(socket, ClosedBy::Remote);
    }
    match socket.old {
        // The peer's FIN is there and ours is acknowledged: `tcp_time_wait`. An error that ICMP left behind on a socket
        // that lived on says nothing about that; only a time-out does.
        TcpState::FinWait1 | TcpState::FinWait2 | TcpState::Closing
            if (socket.fin_received || socket.old == TcpState::Closing)
                && (socket.all_acknowledged || socket.old != TcpState::Closing)
                && !aborted(socket)
                && !timed_out(socket) =>
        {
            let fallback = if socket.old == TcpState::Closing { ClosedBy::Both } else { ClosedBy::Local };
            Ending { closed_by: first_end_or(socket, fallback), how: Some(How::Fin), fate: time_wait(socket) }
        }
        // Likewise in the other role.
        TcpState::LastAck if socket.all_acknowledged && !aborted(socket) && !timed_out(socket) => Ending {
            closed_by: first_end_or(socket, ClosedBy::Remote),
            how: Some(How::Fin),
            fate: Fate::Known(Final::Closed, FinalSource::State),
        },
        _ if timed_out(socket) || given_up(socket) => Ending {
            closed_by: first_end_or(socket, ClosedBy::None),
            how: Some(How::Timeout),
            fate: Fate::Known(Final::TimedOut, FinalSource::State),
        },
        _ if socket.rst_sent => by_reset(socket, ClosedBy::Local),
        _ if aborted(socket) => without_segment(socket),
        // Not by the ACK of our FIN, but by the application: `close` with unread data or SO_LINGER 0 after `shutdown`. If
        // it sends a RST, then right after the transition.
        TcpState::LastAck | TcpState::Closing => {
            let fallback = if socket.old == TcpState::Closing { ClosedBy::Both } else { ClosedBy::Remote };
            Ending { closed_by: first_end_or(socket, fallback), how: Some(How::Fin), fate: Fate::Ask }
        }
        // Our FIN is acknowledged, the peer's has not come. A mini-socket may wait for it.
        TcpState::FinWait2 => {
            Ending { closed_by: first_end_or(socket, ClosedBy::Local), how: Some(How::Fin), fate: Fate::Ask }
        }
        // Without an error only `close` with unread data, SO_LINGER 0 and `disconnect` do this, and the RST leaves right
        // after the transition.
        TcpState::Established | TcpState::CloseWait | TcpState::SynRecv => by_reset(socket, ClosedBy::Local),
        TcpState::FinWait1 if socket.in_process => by_reset(socket, ClosedBy::Local),
        // In softirq: data came after the application's `close`, and is answered by a RST right after the transition; or
        // the kernel gave up an orphan (its namespace is gone, or there are too many) in silence.
        TcpState::FinWait1 => Ending { fate: Fate::Ask, ..without_segment(socket) },
        // SYN_SENT: the application gave up, or ICMP refused.
        _ => without_segment(socket),
    }
}

/// The ending as far as it is known, where a hook that this host lacks would decide it.
fn left_open(socket: &Socket) -> Option<Ending> {
    if by_somebodys_reset(socket) {
        return Some(Ending {
            how: Some(How::Rst),
            fate: Fate::Known(Final::Reset, FinalSource::State),
            ..unobserved(socket)
        });
    }
    // A RST refuses a connection, or ICMP does.
    let refused = socket.blind.receive_reset
        && !socket.rst_received
        && socket.old == TcpState::SynSent
        && socket.sk_err == errno::ECONNREFUSED;
    // Before `tcp_abort`, and after a keep-alive probe that ICMP has answered, a RST is sent; or there was nothing to reset,
    // and the error is an old one.
    let gave_up = socket.blind.send_reset
        && !socket.rst_sent
        && !socket.rst_received
        && !timed_out(socket)
        && (aborted(socket) || (socket.old == TcpState::FinWait2 && errno::BY_ICMP.contains(&socket.sk_err)));
    (refused || gave_up).then(|| unobserved(socket))
}

/// A RST ended it, but the error does not say whose. The kernel ends a socket in the same way when data comes after its
/// process had closed it, and then sends one.
const fn by_somebodys_reset(socket: &Socket) -> bool {
    socket.blind.receive_reset
        && !socket.rst_received
        && !socket.rst_sent
        && socket.shut_down
        && matches!(socket.sk_err, errno::ECONNRESET | errno::EPIPE)
}

/// How a socket ended of which that was not seen.
pub const fn unobserved(socket: &Socket) -> Ending {
    let closed_by = match socket.first_end {
        ClosedBy::None => ClosedBy::Unobserved,
        seen => seen,
    };
    Ending { closed_by, how: Some(How::Unobserved), fate: Fate::Known(Final::Unknown, FinalSource::Inferred) }
}

/// A socket in CLOSE_WAIT, which has not ended: its peer has.
pub fn half_closed(socket: &Socket) -> Ending {
    Ending { closed_by: first_end_or(socket, ClosedBy::Remote), how: None, fate: Fate::Ask }
}

/// A RST came in. The error alone proves it, too, unless this end answered data after its `close`: then the kernel runs
/// the same function to send one.
fn reset_arrived(socket: &Socket) -> bool {
    socket.rst_received || (matches!(socket.sk_err, errno::ECONNRESET | errno::EPIPE) && !socket.rst_sent)
}

/// `sk_err` says that the peer no longer answered.
const fn timed_out(socket: &Socket) -> bool {
    socket.sk_err == errno::ETIMEDOUT
}

/// Likewise: when a connection is given up, the kernel prefers what ICMP last said of the peer to `ETIMEDOUT`. A timer does
/// that (or, if a process had the socket locked just then, that process on its behalf); where a process closes the socket, the
/// error is an old one that nobody asked for (`IP_RECVERR`). Before it is established, ICMP ends it at once. In FIN_WAIT2 nothing of ours is on the way: there only a keep-alive probe can fail,
/// and that sends a RST.
fn given_up(socket: &Socket) -> bool {
    errno::BY_ICMP.contains(&socket.sk_err)
        && !(socket.in_process && socket.shut_down)
        && match socket.old {
            TcpState::SynSent => false,
            TcpState::FinWait2 => socket.rst_sent,
            _ => true,
        }
}

/// `tcp_abort` (`ss -K`).
const fn aborted(socket: &Socket) -> bool {
    socket.sk_err == errno::ECONNABORTED
}

fn first_end_or(socket: &Socket, fallback: ClosedBy) -> ClosedBy {
    match socket.first_end {
        ClosedBy::None => fallback,
        // Our FIN left first, and yet the peer's did not acknowledge it. The programs say so where they see the transition to
        // CLOSING, but not each one is shown to them.
        ClosedBy::Local if socket.old == TcpState::Closing => ClosedBy::Both,
        known => known,
    }
}

fn by_reset(socket: &Socket, by: ClosedBy) -> Ending {
    Ending {
        closed_by: first_end_or(socket, by),
        how: Some(How::Rst),
        fate: Fate::Known(Final::Reset, FinalSource::State),
    }
}

const fn without_segment(socket: &Socket) -> Ending {
    Ending { closed_by: socket.first_end, how: None, fate: Fate::Known(Final::Closed, FinalSource::State) }
}

/// Both FINs are there: TIME_WAIT, if its table had room.
const fn time_wait(socket: &Socket) -> Fate {
    match socket.time_wait_room {
        Some(true) => Fate::Known(Final::TimeWait, FinalSource::Fin),
        Some(false) => Fate::Ask,
        None => Fate::Known(Final::TimeWait, FinalSource::Inferred),
    }
}

/// Whether a cause fits.
type Rule = fn(&Socket, &Ending) -> bool;

/// One rule for each cause, in the order of the contract.
const RULES: [(Cause, Rule); 16] = [
    (Cause::Timeout, timeout),
    (Cause::ResetByPeer, reset_by_peer),
    (Cause::ResetByLocal, reset_by_local),
    (Cause::ProcessExit, process_exit),
    (Cause::Unused, unused),
    (Cause::Tls, tls),
    (Cause::Upgraded, upgraded),
    (Cause::H2, h2),
    (Cause::NotHttp, not_http),
    (Cause::Unanswered, unanswered),
    (Cause::Truncated, truncated),
    (Cause::RequestClose, request_close),
    (Cause::ResponseClose, response_close),
    (Cause::Http10, http10),
    (Cause::IdleTimeout, idle_timeout),
    (Cause::NoReuse, no_reuse),
];

/// Why a socket ended: the first rule that fits, or [`Cause::Unknown`].
pub fn cause(socket: &Socket, ending: &Ending) -> Cause {
    let found = RULES.iter().find(|(_, fits)| fits(socket, ending)).map_or(Cause::Unknown, |(cause, _)| *cause);
    // An earlier rule might fit, if it could be asked on this host.
    let open = ending.how == Some(How::Unobserved)
        || by_somebodys_reset(socket)
        || (found > Cause::ProcessExit && may_be_exit(socket, ending));
    if open { Cause::Unknown } else { found }
}

fn timeout(_: &Socket, ending: &Ending) -> bool {
    ending.how == Some(How::Timeout)
}

fn reset_by_peer(socket: &Socket, ending: &Ending) -> bool {
    ending.how == Some(How::Rst) && reset_arrived(socket)
}

/// A RST that was sent counts only if it ended the socket.
fn reset_by_local(socket: &Socket, ending: &Ending) -> bool {
    ending.how == Some(How::Rst) && !reset_arrived(socket)
}

fn process_exit(socket: &Socket, ending: &Ending) -> bool {
    socket.closed_by_exit && matches!(ending.closed_by, ClosedBy::Local | ClosedBy::Both)
}

/// Likewise, for all that this host can tell: no process made the local close, so the kernel did, and for whom is not known.
fn may_be_exit(socket: &Socket, ending: &Ending) -> bool {
    (socket.blind.exits || socket.closed_in_walk)
        && socket.closer.is_none()
        && matches!(ending.closed_by, ClosedBy::Local | ClosedBy::Both)
}

fn unused(socket: &Socket, _: &Ending) -> bool {
    socket.rx_bytes == 0 && socket.tx_bytes == 0
}

fn tls(socket: &Socket, _: &Ending) -> bool {
    socket.protocol == Protocol::Tls
}

fn upgraded(socket: &Socket, _: &Ending) -> bool {
    socket.scan.upgraded || socket.protocol == Protocol::Websocket
}

fn h2(socket: &Socket, _: &Ending) -> bool {
    socket.protocol == Protocol::H2
}

fn not_http(socket: &Socket, _: &Ending) -> bool {
    socket.protocol == Protocol::Other
}

/// A request was seen, or its beginning, and all of the other direction, and no final response head is in it.
fn unanswered(socket: &Socket, _: &Ending) -> bool {
    socket.http.as_ref().is_some_and(|http| {
        (http.requests > 0 || http.method.is_some()) && !http.answered && !socket.scan.responses_lost
    })
}

fn truncated(socket: &Socket, _: &Ending) -> bool {
    socket.http.is_some() && socket.scan.body_incomplete && !socket.scan.responses_lost
}

fn request_close(socket: &Socket, _: &Ending) -> bool {
    socket.http.as_ref().is_some_and(|http| matches!(request(socket, http), Said::Close))
}

/// A response that was sent unasked (408) has no request that could have carried `close`.
fn response_close(socket: &Socket, _: &Ending) -> bool {
    socket.http.as_ref().is_some_and(|http| {
        matches!(request(socket, http), Said::KeepAlive | Said::Silent | Said::Nothing)
            && matches!(response(http), Said::Close)
    })
}

fn http10(socket: &Socket, _: &Ending) -> bool {
    exchange(socket) == Some(Persistence::Http10)
}

/// A response whose body ends with the connection has closed it for that reason, not for idling: it is not persistent,
/// and the set has no word for it.
fn idle_timeout(socket: &Socket, ending: &Ending) -> bool {
    persistent(socket, ending)
        && idle_us(socket).is_some_and(|idle| {
            idle >= IDLE_US || announced_us(socket).is_some_and(|announced| is_about(idle, announced))
        })
}

/// Idle for a shorter time than [`idle_timeout`] wants, which is asked before.
fn no_reuse(socket: &Socket, ending: &Ending) -> bool {
    persistent(socket, ending) && idle_us(socket).is_some()
}

/// What one head said about the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// `close`
    Close,
    /// `keep-alive`, and not `close`.
    KeepAlive,
    /// Neither.
    Silent,
    /// There was no head.
    Nothing,
    /// Not all of the head was seen, or it is not known whether it was the last one.
    Unobserved,
}

impl Said {
    const fn of(connection: Option<Connection>) -> Self {
        match connection {
            None | Some(Connection::Unobserved) => Self::Unobserved,
            Some(connection) if connection.is_close() => Self::Close,
            Some(connection) if connection.is_keep_alive() => Self::KeepAlive,
            Some(_) => Self::Silent,
        }
    }
}

fn request(socket: &Socket, http: &Http) -> Said {
    let seen_from_the_first_byte = !socket.started_before && !socket.scan.requests_lost;
    if http.requests == 0 && http.method.is_none() && http.request_connection.is_none() && seen_from_the_first_byte {
        return Said::Nothing;
    }
    Said::of(http.request_connection)
}

const fn response(http: &Http) -> Said {
    Said::of(http.response_connection)
}

/// What RFC 9112, section 9.3, makes of the last exchange, if all of it was seen and nobody said `close`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Persistence {
    Persistent,
    Http10,
}

/// An HTTP/1.1 message persists unless it says `close`, an HTTP/1.0 one only if it says `keep-alive`. A client that
/// speaks 1.0 must also be told so by the response, of whatever version: it knows no other sign.
fn exchange(socket: &Socket) -> Option<Persistence> {
    let http = socket.http.as_ref()?;
    let (asked, told) = (request(socket, http), response(http));
    if !http.answered
        || !matches!(asked, Said::KeepAlive | Said::Silent)
        || !matches!(told, Said::KeepAlive | Said::Silent)
    {
        return None;
    }
    match (http.request_version?, http.response_version?) {
        (HttpVersion::V10, _) if asked != Said::KeepAlive || told != Said::KeepAlive => Some(Persistence::Http10),
        (_, HttpVersion::V10) if told != Said::KeepAlive => Some(Persistence::Http10),
        _ => Some(Persistence::Persistent),
    }
}

/// Nothing in the last exchange ended the connection, and it was complete: somebody did.
fn persistent(socket: &Socket, ending: &Ending) -> bool {
    exchange(socket) == Some(Persistence::Persistent)
        && !socket.scan.body_until_close
        && !socket.scan.request_incomplete
        && !socket.scan.requests_lost
        && !socket.scan.responses_lost
        && !matches!(ending.closed_by, ClosedBy::None | ClosedBy::Unobserved)
}

/// From the last payload byte to the first FIN or RST, or to the socket's end if there was none; microseconds. `None`
/// without payload, and where the first FIN came before tracing began.
pub fn idle_us(socket: &Socket) -> Option<u64> {
    let end = match (socket.end_ns, socket.first_end) {
        (Some(end), _) => end,
        (None, ClosedBy::None) => socket.at_ns,
        (None, _) => return None,
    };
    Some(end.saturating_sub(socket.payload_ns?) / 1000)
}

fn announced_us(socket: &Socket) -> Option<u64> {
    let seconds = socket.http.as_ref()?.keep_alive_timeout_s.filter(|seconds| *seconds > 0)?;
    Some(u64::from(seconds) * 1_000_000)
}

fn is_about(idle: u64, announced: u64) -> bool {
    idle.abs_diff(announced) <= TIMEOUT_SLACK_US.max(announced / 10)
}

/// The end of a connection that speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Server,
    Client,
}

/// Which side closed first, if one did and it is known which it is.
const fn closing_side(close: &Close) -> Option<Side> {
    match (close.role, close.closed_by) {
        (Role::Server, ClosedBy::Local) | (Role::Client, ClosedBy::Remote) => Some(Side::Server),
        (Role::Server, ClosedBy::Remote) | (Role::Client, ClosedBy::Local) => Some(Side::Client),
        _ => None,
    }
}

/// A few words for who has to change what, where somebody can. They may hold bytes from the network: escape before
/// showing.
pub fn advice(close: &Close) -> Option<Cow<'static, str>> {
    let side = closing_side(close);
    let established = close.started_before || close.states.iter().any(|at| at.state == TcpState::Established);
    let fixed = match close.cause {
        Cause::RequestClose => "client asked: Connection: close",
        Cause::ResponseClose => return Some(response_close_advice(close)),
        Cause::Http10 => http10_advice(close),
        Cause::IdleTimeout => return Some(idle_advice(close, side).into()),
        Cause::NoReuse => match side {
            Some(Side::Server) => "server closed, nobody asked",
            Some(Side::Client) => "client did not reuse the connection",
            None => "closed, nobody asked",
        },
        Cause::Timeout if established => "peer no longer answered",
        Cause::Timeout => "connection attempt timed out",
        Cause::ResetByPeer if !established => "connection refused",
        Cause::ResetByPeer if is_unanswered(close) => {
            return Some(format!("reset by peer, {}", no_answer(close)).into());
        }
        Cause::ResetByPeer => "reset by peer",
        Cause::ResetByLocal => "closed with unread data or SO_LINGER 0",
        Cause::ProcessExit => "its process exited",
        Cause::Unused => "opened but never used",
        Cause::Unanswered => return Some(no_answer(close).into()),
        Cause::Truncated => match side {
            Some(Side::Server) => "server cut its response short",
            Some(Side::Client) => "client left before the response's end",
            None => "response cut short",
        },
        Cause::Tls | Cause::Upgraded | Cause::H2 | Cause::NotHttp | Cause::Unknown => return None,
    };
    Some(fixed.into())
}

/// The end that can change why the connection closed: the one that asked for it, that speaks HTTP/1.0, or that closed first
/// without being asked. `None` where there is nothing to change, or it is not known who could.
pub fn at_fault(close: &Close) -> Option<Role> {
    let status = close.http.as_ref().and_then(|http| http.status);
    match close.cause {
        // Whoever closed it: the client opened it.
        Cause::RequestClose | Cause::Unused => Some(Role::Client),
        Cause::ResponseClose if is_old_client(close) => Some(Role::Client),
        // The error is what has to be looked into.
        Cause::ResponseClose if status.is_some_and(|status| status >= 400) => None,
        Cause::ResponseClose => Some(Role::Server),
        Cause::Http10 if is_old_client(close) => Some(Role::Client),
        Cause::Http10 => Some(Role::Server),
        Cause::IdleTimeout | Cause::NoReuse => match closing_side(close)? {
            Side::Server => Some(Role::Server),
            Side::Client => Some(Role::Client),
        },
        _ => None,
    }
}

/// The client knows no persistent connections, and the server no other choice.
fn is_old_client(close: &Close) -> bool {
    close.http.as_ref().is_some_and(|http| {
        http.request_version == Some(HttpVersion::V10)
            && !http.request_connection.is_some_and(Connection::is_keep_alive)
    })
}

fn response_close_advice(close: &Close) -> Cow<'static, str> {
    let http = close.http.as_ref();
    match http.and_then(|http| http.status) {
        _ if is_old_client(close) => "HTTP/1.0 client, no keep-alive".into(),
        // An error is often the reason that the server gives the connection up.
        Some(status) if status >= 400 => format!("server answered {status}: Connection: close").into(),
        _ => "server answered: Connection: close".into(),
    }
}

fn http10_advice(close: &Close) -> &'static str {
    let http = close.http.as_ref();
    if http.is_some_and(|http| http.request_version != Some(HttpVersion::V10)) {
        "HTTP/1.0 server, no keep-alive"
    } else if http.is_some_and(|http| http.request_connection.is_some_and(Connection::is_keep_alive)) {
        "server ignored HTTP/1.0 keep-alive"
    } else {
        "HTTP/1.0 client, no keep-alive"
    }
}

fn idle_advice(close: &Close, side: Option<Side>) -> String {
    let idle = seconds(close.idle_us.unwrap_or(0));
    match side {
        Some(Side::Server) => format!("server's keep-alive time-out: idle {idle}"),
        Some(Side::Client) => format!("client closed it after {idle} idle"),
        None => format!("closed after {idle} idle"),
    }
}

fn is_unanswered(close: &Close) -> bool {
    close.http.as_ref().is_some_and(|http| {
        http.method.is_some() && !http.answered && http.response_connection != Some(Connection::Unobserved)
    })
}

fn no_answer(close: &Close) -> String {
    match close.http.as_ref().and_then(|http| Some((http.method.as_deref()?, http.target.as_deref()?))) {
        Some((method, target)) => format!("no answer to {method} {target}"),
        None => "no answer to a request".to_owned(),
    }
}

/// `1.0 s`; without decimals from 100 s on.
fn seconds(us: u64) -> String {
    let time = Duration::from_micros(us);
    if time.as_secs() < 100 { format!("{:.1} s", time.as_secs_f64()) } else { format!("{} s", time.as_secs()) }
}

#[cfg(test)]
mod tests;
