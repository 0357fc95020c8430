//! The events that `tracer run` prints: the JSON contract as types.
//!
//! What comes in: facts that were joined and judged. What goes out: one serialisable value a line. Field names, and the
//! words of every enum, are the product's interface; nothing here knows the kernel's records.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::Serialize;

/// One line of output.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// Once, first.
    Start(Start),
    /// One for each TCP socket that closed.
    Close(Box<Close>),
    /// One for each TCP socket whose peer has closed and whose process has not, for `--close-wait-after`.
    CloseWait(Box<Close>),
    /// With `--states`, one for each transition.
    State(Box<State>),
    /// Whenever records were lost since the last such line.
    Lost(Lost),
    /// Once, last.
    Summary(Summary),
}

/// What is traced, and how well.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// When tracing began.
    pub time: Timestamp,
    /// Version of tracer.
    pub version: &'static str,
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Host name.
    pub host: String,
    /// The filters in force, as on the command line (`--port 80`).
    pub filters: Vec<String>,
    /// The hooks that are attached.
    pub hooks: Vec<String>,
    /// Sockets in TIME_WAIT now, in the network namespace of tracer; `null` if the kernel did not say.
    pub time_wait: Option<u64>,
    /// What is missing on this host and what that costs.
    pub degraded: Vec<String>,
}

/// The address family of a socket; an IPv4-mapped IPv6 address counts as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

/// Which end opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// This end accepted.
    Server,
    /// This end connected.
    Client,
    /// Not known.
    Unknown,
}

/// How the process of a socket was learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// It read from the socket.
    Read,
    /// It made the local close.
    Close,
    /// It called `connect`.
    Connect,
    /// It held the socket open when tracing began.
    OpenFiles,
}

/// A process. `comm`, `exe`, `cgroup` hold bytes that another process chose: escape before showing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Process id as the host sees it.
    pub pid: u32,
    /// The name of the process's main thread, at most 15 bytes.
    pub comm: String,
    /// Path of the executable; `null` if it could not be read (the process was gone, or kernel).
    pub exe: Option<String>,
    /// Real user id.
    pub uid: u32,
    /// Path in the cgroup-v2 hierarchy (in the first v1 hierarchy with a path other than `/` where v2 has none).
    pub cgroup: Option<String>,
    /// Container id, if the cgroup's path names one (64 hexadecimal digits, shortened to 12).
    pub container: Option<String>,
    /// How it was learnt.
    pub source: Source,
}

/// Who sent the first FIN or RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClosedBy {
    /// This end.
    Local,
    /// The peer.
    Remote,
    /// Both, at once.
    Both,
    /// Nobody: a time-out, or an abort without a segment.
    None,
    /// This host lacks the hook that would tell.
    Unobserved,
}

/// How the connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// By FINs.
    Fin,
    /// By a RST.
    Rst,
    /// By a time-out.
    Timeout,
    /// This host lacks the hook that would tell.
    Unobserved,
}

/// What is left of the connection at this end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Final {
    /// A TIME_WAIT socket.
    TimeWait,
    /// The peer never sent its FIN.
    FinWait2,
    /// Nothing: the passive end; or the TIME_WAIT table was full.
    Closed,
    /// Nothing: ended by a RST.
    Reset,
    /// Nothing: ended by a time-out.
    TimedOut,
    /// Not known.
    Unknown,
}

/// How [`Final`] is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalSource {
    /// The peer's FIN was processed before the socket's end.
    Fin,
    /// The kernel was asked afterwards.
    SockDiag,
    /// It follows from the last transition.
    State,
    /// It is the likeliest reading of what was seen.
    Inferred,
}

/// One transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StateAt {
    /// The state that was entered.
    pub state: TcpState,
    /// When, in microseconds since ESTABLISHED (since first sight if that was not seen); negative before it.
    pub at_us: i64,
}

/// TCP states by their kernel names (`TCP_ESTABLISHED` is `ESTABLISHED`). The discriminants are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the states of RFC 9293, section 3.3.2, and the kernel's two more")]
pub enum TcpState {
    Established = 1,
    SynSent = 2,
    SynRecv = 3,
    #[serde(rename = "FIN_WAIT1")]
    FinWait1 = 4,
    #[serde(rename = "FIN_WAIT2")]
    FinWait2 = 5,
    TimeWait = 6,
    Close = 7,
    CloseWait = 8,
    LastAck = 9,
    Listen = 10,
    Closing = 11,
    NewSynRecv = 12,
}

/// What the payload was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Protocol {
    /// HTTP/1.0: the last request (without one, the last response) said so.
    #[serde(rename = "http/1.0")]
    Http10,
    /// HTTP/1.1
    #[serde(rename = "http/1.1")]
    Http11,
    /// HTTP/2
    #[serde(rename = "h2")]
    H2,
    /// WebSocket after a 101.
    #[serde(rename = "websocket")]
    Websocket,
    /// TLS
    #[serde(rename = "tls")]
    Tls,
    /// Payload, but none of the above.
    #[serde(rename = "other")]
    Other,
    /// No payload.
    #[serde(rename = "none")]
    None,
    /// There was payload, but its beginning was not seen.
    #[serde(rename = "unobserved")]
    Unobserved,
}

/// The last exchange on the connection, with counts for all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Http {
    /// Request heads seen.
    pub requests: u32,
    /// Final response heads seen.
    pub responses: u32,
    /// Method of the last request. Bytes of the network, made printable only by the sinks.
    pub method: Option<String>,
    /// Target of the last request, at most 64 bytes; without its query string unless asked for.
    pub target: Option<String>,
    /// Not all of the target is shown.
    pub target_truncated: bool,
    /// Status of its final response.
    pub status: Option<u16>,
    /// `1.0` or `1.1`
    pub request_version: Option<&'static str>,
    /// `1.0` or `1.1`
    pub response_version: Option<&'static str>,
    /// Tokens of the last request's `Connection`.
    pub request_connection: Option<Connection>,
    /// Tokens of the last response's `Connection`.
    pub response_connection: Option<Connection>,
    /// `timeout` of the response's `Keep-Alive`.
    pub keep_alive_timeout_s: Option<u32>,
    /// `max` of the response's `Keep-Alive`.
    pub keep_alive_max: Option<u32>,
    /// The last request got a final response head.
    pub answered: bool,
}

/// What one head said in its `Connection` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// The whole head was seen and has no such header.
    Absent,
    /// Part of the head was not seen.
    Unobserved,
    /// The tokens; at least one is set. Written in this order, joined by `, `.
    #[expect(missing_docs, reason = "the tokens themselves")]
    Tokens { close: bool, keep_alive: bool, upgrade: bool, other: bool },
}

impl Connection {
    /// The whole head was seen and asked to close.
    pub const fn is_close(self) -> bool {
        matches!(self, Self::Tokens { close: true, .. })
    }

    /// The whole head was seen and asked to keep the connection.
    pub const fn is_keep_alive(self) -> bool {
        matches!(self, Self::Tokens { close: false, keep_alive: true, .. })
    }
}

impl std::fmt::Display for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Absent => f.write_str("absent"),
            Self::Unobserved => f.write_str("unobserved"),
            Self::Tokens { close, keep_alive, upgrade, other } => {
                let words = [(close, "close"), (keep_alive, "keep-alive"), (upgrade, "upgrade"), (other, "other")];
                let mut first = true;
                for (_, word) in words.into_iter().filter(|(set, _)| *set) {
                    if !std::mem::take(&mut first) {
                        f.write_str(", ")?;
                    }
                    f.write_str(word)?;
                }
                Ok(())
            }
        }
    }
}

impl Serialize for Connection {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why the connection closed: the closed set. The first rule that fits wins, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Ended by a time-out (retransmission, keep-alive probe, user time-out).
    Timeout,
    /// A RST was received.
    ResetByPeer,
    /// A RST was sent by this end.
    ResetByLocal,
    /// The local close was made by an exiting process that had not closed it itself.
    ProcessExit,
    /// No payload in either direction.
    Unused,
    /// Opaque TLS.
    Tls,
    /// After a 101.
    Upgraded,
    /// HTTP/2.
    H2,
    /// Payload, but no HTTP.
    NotHttp,
    /// The last request has no final response head.
    Unanswered,
    /// The last response's announced body was not complete.
    Truncated,
    /// The last request carried `Connection: close`.
    RequestClose,
    /// The last response carried `Connection: close`, its request did not.
    ResponseClose,
    /// HTTP/1.0 without `keep-alive` on both sides.
    Http10,
    /// A persistent connection closed after a time without payload.
    IdleTimeout,
    /// A persistent connection closed at once after a complete exchange.
    NoReuse,
    /// None fits; something needed was not observed.
    Unknown,
}

/// One closed TCP socket; as [`Event::CloseWait`] one that is still half open, and then `time` is now and `cause` is why
/// the peer closed.
#[derive(Clone, Debug, Serialize)]
pub struct Close {
    /// When the socket ended.
    pub time: Timestamp,
    /// The kernel's socket cookie.
    pub cookie: u64,
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Address family.
    pub family: Family,
    /// Local address and port.
    pub local: SocketAddr,
    /// Remote address and port.
    pub remote: SocketAddr,
    /// Which end this is.
    pub role: Role,
    /// The owner; `null` if unknown.
    pub process: Option<Process>,
    /// Who sent the first FIN or RST.
    pub closed_by: ClosedBy,
    /// The process that made the local close, if it is not `process`.
    pub closer: Option<Process>,
    /// How it ended; `null` if neither FIN, RST nor time-out ended it.
    pub how: Option<How>,
    /// What is left of it; `None` if it has not ended.
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    pub fate: Option<Final>,
    /// How that is known.
    #[serde(rename = "final_source", skip_serializing_if = "Option::is_none")]
    pub fate_source: Option<FinalSource>,
    /// The transitions.
    pub states: Vec<StateAt>,
    /// Since ESTABLISHED, or since first sight; microseconds. 0 if it never was established.
    pub duration_us: u64,
    /// The socket was open before tracing began: times and counts of heads begin with the first sight.
    pub started_before: bool,
    /// From the last payload byte in either direction to the first FIN or RST (to the end, if there was none);
    /// microseconds. `null` without payload.
    pub idle_us: Option<u64>,
    /// Payload bytes received.
    pub rx_bytes: u64,
    /// Payload bytes sent.
    pub tx_bytes: u64,
    /// What the payload was.
    pub protocol: Protocol,
    /// The last HTTP/1.x exchange.
    pub http: Option<Http>,
    /// Why it closed.
    pub cause: Cause,
}

/// One transition, with what was known by then.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// When.
    pub time: Timestamp,
    /// The kernel's socket cookie.
    pub cookie: u64,
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Local address and port.
    pub local: SocketAddr,
    /// Remote address and port.
    pub remote: SocketAddr,
    /// Which end this is.
    pub role: Role,
    /// The owner as known by then.
    pub process: Option<Process>,
    /// State before.
    pub old: TcpState,
    /// State after.
    pub new: TcpState,
    /// Microseconds since the transition before it; `null` for the first one seen.
    pub delta_us: Option<u64>,
    /// Who sent the first FIN or RST, as known by then.
    pub closed_by: ClosedBy,
    /// The last exchange by then.
    pub http: Option<Http>,
}

/// Records were lost.
#[derive(Clone, Debug, Serialize)]
pub struct Lost {
    /// When this was noticed.
    pub time: Timestamp,
    /// How many, since `since`.
    pub records: u64,
    /// When the last such line was written, or tracing began.
    pub since: Timestamp,
}

/// The end of the run.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// When tracing ended.
    pub time: Timestamp,
    /// How long it ran, seconds.
    pub duration_s: f64,
    /// `close` lines written.
    pub closes: u64,
    /// Of them, those whose `final` is `time_wait`.
    pub time_wait: u64,
    /// `close_wait` lines written.
    pub close_wait: u64,
    /// Records lost.
    pub lost: u64,
    /// Sockets that could not be followed, for want of kernel memory: their ends are not reported.
    pub untracked: u64,
    /// Closes by process, `closed_by`, `cause` and peer address, largest first; at most 1,000.
    pub groups: Vec<Group>,
    /// Closes in groups that are not listed.
    pub other_closes: u64,
}

/// One group of the [`Summary`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Process name; `null` if unknown.
    pub comm: Option<String>,
    /// Process id; `null` if unknown.
    pub pid: Option<u32>,
    /// Who closed first.
    pub closed_by: ClosedBy,
    /// Why.
    pub cause: Cause,
    /// Remote address, without port.
    pub peer: std::net::IpAddr,
    /// How many.
    pub closes: u64,
    /// Of them, in TIME_WAIT.
    pub time_wait: u64,
}
