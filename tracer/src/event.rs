//! The events that `tracer run` prints: the JSON contract as types.
//!
//! What comes in: facts that were joined and judged. What goes out: one serialisable value a line. Field names, and the
//! words of every enum, are the product's interface; nothing here knows the kernel's records.

use std::net::SocketAddr;
use std::sync::Arc;

use clap::ValueEnum;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

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
    /// Once, last; and in between, where that is asked for.
    Summary(Box<Summary>),
    /// A limit was reached, or is no longer.
    Alert(Box<Alert>),
}

/// What is traced, and how well.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// When tracing began.
    pub time: Timestamp,
    /// Version of tracer.
    pub version: String,
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
    /// How many there may be (`tcp_max_tw_buckets`), likewise.
    pub time_wait_max: Option<u64>,
    /// What is missing on this host, or left out by `--no-sandbox`, and what that costs.
    pub degraded: Vec<String>,
}

/// The address family of a socket; an IPv4-mapped IPv6 address counts as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

/// Which end opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// A process that events share, written and read as if each had its own.
pub(crate) mod shared {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    use super::{Arc, Process};

    pub(crate) fn serialize<S: Serializer>(process: &Option<Arc<Process>>, serializer: S) -> Result<S::Ok, S::Error> {
        process.as_deref().serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<Process>>, D::Error> {
        Ok(Option::<Process>::deserialize(deserializer)?.map(Arc::new))
    }
}

/// Who sent the first FIN or RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[value(rename_all = "lower")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[value(rename_all = "snake_case")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateAt {
    /// The state that was entered.
    pub state: TcpState,
    /// When, in microseconds since ESTABLISHED (since first sight if that was not seen); negative before it.
    pub at_us: i64,
}

/// TCP states by their kernel names (`TCP_ESTABLISHED` is `ESTABLISHED`). The discriminants are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// The version of a request or response of HTTP/1.x.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HttpVersion {
    /// HTTP/1.0
    #[serde(rename = "1.0")]
    V10,
    /// HTTP/1.1
    #[serde(rename = "1.1")]
    V11,
}

/// The last exchange on the connection, with counts for all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Of the last request.
    pub request_version: Option<HttpVersion>,
    /// Of the last response.
    pub response_version: Option<HttpVersion>,
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
        if serializer.is_human_readable() {
            return serializer.collect_str(self);
        }
        serializer.serialize_u8(match *self {
            Self::Absent => 0,
            Self::Tokens { close, keep_alive, upgrade, other } => {
                [close, keep_alive, upgrade, other].iter().rev().fold(0, |bits, set| bits << 1 | u8::from(*set))
            }
            Self::Unobserved => u8::MAX,
        })
    }
}

/// From recordings only: the words are not read back.
impl<'de> Deserialize<'de> for Connection {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bits = u8::deserialize(deserializer)?;
        let set = |bit: u8| bits & 1 << bit != 0;
        match bits {
            0 => Ok(Self::Absent),
            1..16 => Ok(Self::Tokens { close: set(0), keep_alive: set(1), upgrade: set(2), other: set(3) }),
            u8::MAX => Ok(Self::Unobserved),
            _ => Err(serde::de::Error::custom("no such set of tokens")),
        }
    }
}

/// Why the connection closed: the closed set. The first rule that fits wins, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
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

impl Cause {
    /// How many there are: the last one's place and one.
    pub const COUNT: usize = Self::Unknown as usize + 1;
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
    /// The owner; `null` if unknown. Shared: most connections are those of a few processes.
    #[serde(serialize_with = "shared::serialize")]
    pub process: Option<Arc<Process>>,
    /// Who sent the first FIN or RST.
    pub closed_by: ClosedBy,
    /// The process that made the local close, if it is not `process`.
    #[serde(serialize_with = "shared::serialize")]
    pub closer: Option<Arc<Process>>,
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
    #[serde(serialize_with = "shared::serialize")]
    pub process: Option<Arc<Process>>,
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
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lost {
    /// When this was noticed.
    pub time: Timestamp,
    /// How many, since `since`.
    pub records: u64,
    /// When the last such line was written, or tracing began.
    pub since: Timestamp,
}

/// What closed and why: at the end of the run, and in between where that is asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// When it was made.
    pub time: Timestamp,
    /// It is the last one, about the whole run.
    #[serde(rename = "final")]
    pub last: bool,
    /// How long tracing has run, seconds.
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
    /// The time that rates, quantiles and advice are about, seconds up to now: the whole run in the last summary, the time
    /// since the one before with `--every`, otherwise the last 30 to 60 seconds (twice `--every` at most).
    pub window_s: f64,
    /// `close` lines written in that time.
    pub window_closes: u64,
    /// Of them, those whose `final` is `time_wait`.
    pub window_time_wait: u64,
    /// The same; a connection whose two ends are both on this host counts once.
    pub window_connections: u64,
    /// `window_closes` a second.
    pub closes_per_s: f64,
    /// `window_time_wait` a second.
    pub time_wait_per_s: f64,
    /// Sockets in TIME_WAIT now, in the network namespace of tracer, whoever made them; `null` if the kernel did not say.
    pub time_wait_sockets: Option<u64>,
    /// What can be changed, the largest part of TIME_WAIT first; at most 20.
    pub advice: Vec<Advice>,
    /// Closes by process, `role`, `closed_by`, `cause`, peer and the server's port, largest first; at most 1,000. Only those
    /// with a close in the window.
    pub groups: Vec<Group>,
    /// Closes in groups that are not listed.
    pub other_closes: u64,
    /// What became of each close that was seen; `null` where nobody asked the programs: of a recording, and for `--exec`.
    pub ledger: Option<Box<Ledger>>,
}

/// What became of each close that was seen, in all network namespaces, since tracing began:
/// `seen = written + filtered_kernel + filtered_user + lost + waiting`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ledger {
    /// Closes that the programs saw, whether or not they pass the filters.
    pub seen: u64,
    /// `close` lines written.
    pub written: u64,
    /// Those that the programs left out by the filters.
    pub filtered_kernel: u64,
    /// Those that were left out behind them.
    pub filtered_user: u64,
    /// Those whose record was lost (there was no room), or that could not be followed.
    pub lost: u64,
    /// Of `lost`, those that could not be followed, for want of kernel memory.
    pub untracked: u64,
    /// Those whose record has not been read yet, or whose end is not decided; 0 in the last summary.
    pub waiting: u64,
    /// Records that the programs wrote.
    pub emitted: u64,
    /// Records that were read.
    pub read: u64,
    /// All sums are right: of each CPU, and of what was read.
    pub balanced: bool,
    /// The programs' counts by CPU, where there are any: `seen = emitted + filtered + lost + untracked`.
    pub cpus: Vec<LedgerRow>,
    /// What the kernel's own counters say; `null` if they cannot be read.
    pub reconciled: Option<Reconciled>,
}

/// The programs' counts on one CPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LedgerRow {
    /// Its number.
    pub cpu: usize,
    /// Closes seen.
    pub seen: u64,
    /// Records written.
    pub emitted: u64,
    /// Left out by the filters.
    pub filtered: u64,
    /// Records that found no room.
    pub lost: u64,
    /// Sockets that could not be followed.
    pub untracked: u64,
}

impl LedgerRow {
    /// Whether something became of each close.
    pub const fn balances(&self) -> bool {
        self.seen == self.emitted + self.filtered + self.lost + self.untracked
    }
}

impl Ledger {
    /// With the number of lines that were written, of which the rest must be what was seen and not written.
    #[must_use]
    pub fn written(mut self, written: u64) -> Self {
        // Counted by who sent them as well.
        self.balanced &= written == self.written;
        self.written = written;
        self
    }
}

/// What the kernel's own counters say of tracer's network namespace since tracing began, whatever the filters:
/// `closed = active_opens + passive_opens + open at the start - open now`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reconciled {
    /// Inode number of that network namespace.
    pub netns: u32,
    /// TCP sockets that have closed by these counters, listening ones aside.
    pub closed: u64,
    /// Closes that were seen there, as far as these counters know them: a `connect` that sent nothing is not among them.
    pub seen: u64,
    /// By how much both may be off, because the counters moved while they were read; 0: they are exact.
    pub slack: u64,
    /// How much of what closed was seen, percent, rounded down to a tenth; `null`: nothing closed.
    pub percent: Option<f64>,
    /// `ActiveOpens`: connections that were begun here, those that failed included.
    pub active_opens: u64,
    /// `PassiveOpens`: connections that came in.
    pub passive_opens: u64,
    /// `TW` and `TWKilled`: mini-sockets made for TIME_WAIT and FIN_WAIT2.
    pub mini_sockets: Option<u64>,
    /// By how many more there are now than at the beginning (`tw` of `sockstat`): fewer, if more of them went.
    pub mini_sockets_grown: Option<i64>,
    /// Closes that left one, as far as they were seen; `null` where a filter or a loss leaves some out.
    pub mini_sockets_seen: Option<u64>,
    /// Closes of which that is not known, likewise.
    pub mini_sockets_maybe: Option<u64>,
    /// Whether as many were made as were seen to be; `null` where that cannot be told exactly: see `ledger::close_books`.
    pub mini_sockets_agree: Option<bool>,
    /// `TCPTimeWaitOverflow`: TIME_WAIT had no room.
    pub time_wait_overflow: Option<u64>,
}

impl Reconciled {
    /// The counters stood still while they were read.
    pub const fn is_exact(&self) -> bool {
        self.slack == 0
    }

    /// All that closed was seen, as far as can be told.
    pub const fn seen_all(&self) -> bool {
        self.closed.abs_diff(self.seen) <= self.slack
    }

    /// How many mini-sockets the kernel made: by the larger of two counters, which agree on every kernel that was read. If one
    /// did not count all, the other may.
    pub fn made_mini_sockets(&self) -> Option<u64> {
        let grown = self.mini_sockets_grown.and_then(|grown| u64::try_from(grown).ok()).unwrap_or(0);
        Some(self.mini_sockets?.max(grown))
    }

    /// How many mini-sockets the kernel made, and how many at least and at most were seen to be made, where these are known to
    /// disagree.
    pub fn wrong_mini_sockets(&self) -> Option<(u64, u64, u64)> {
        let seen = self.mini_sockets_seen?;
        let wrong = (self.made_mini_sockets()?, seen, seen + self.mini_sockets_maybe?);
        (self.mini_sockets_agree == Some(false)).then_some(wrong)
    }
}

/// One group of the [`Summary`]. Processes of one name in one cgroup count as one: a server with many workers, a command
/// that is started again and again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    /// Process name; `null` if unknown.
    pub comm: Option<String>,
    /// Process id; `null` if unknown, or if there are several.
    pub pid: Option<u32>,
    /// The process ids with the most closes in the window, at most 8, in ascending order.
    pub pids: Vec<u32>,
    /// There are more than these.
    pub more_pids: bool,
    /// Path in the cgroup hierarchy.
    pub cgroup: Option<String>,
    /// Which end this is.
    pub role: Role,
    /// Who closed first.
    pub closed_by: ClosedBy,
    /// Why.
    pub cause: Cause,
    /// The end that can change that; `null` if there is none, or it is not known which.
    pub at_fault: Option<Role>,
    /// Remote address, without port; `null`: many, each with few closes.
    pub peer: Option<std::net::IpAddr>,
    /// The server's port: the local one of a server, the remote one of a client; `null` if the role is not known.
    pub port: Option<u16>,
    /// How many, since tracing began.
    pub closes: u64,
    /// Of them, in TIME_WAIT.
    pub time_wait: u64,
    /// How many in the window.
    pub window_closes: u64,
    /// Of them, in TIME_WAIT.
    pub window_time_wait: u64,
    /// Of `window_closes`, those whose other end is on this host, too, and has been counted in a group of its own.
    pub both_ends: u64,
    /// `window_closes` a second.
    pub closes_per_s: f64,
    /// `window_time_wait` a second.
    pub time_wait_per_s: f64,
    /// Requests per connection in the window, connections that were seen from their beginning: the median, off by at most a
    /// sixteenth (exact below 16); `null` if none spoke HTTP/1.x.
    pub requests_p50: Option<u64>,
    /// The 95th percentile.
    pub requests_p95: Option<u64>,
    /// Lifetime of the same connections and of those without HTTP, microseconds: the median, off by at most a sixteenth.
    pub lifetime_p50_us: Option<u64>,
    /// The 95th percentile.
    pub lifetime_p95_us: Option<u64>,
}

/// Something that can be changed, by whom, and what TIME_WAIT would then be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Advice {
    /// Why the connections closed.
    pub cause: Cause,
    /// The end that can change it: `client` or `server`.
    pub at_fault: Role,
    /// That end's process name, if it is on this host.
    pub comm: Option<String>,
    /// Its process ids, as in [`Group`].
    pub pids: Vec<u32>,
    /// There are more than these.
    pub more_pids: bool,
    /// Its address if it is on another host, or not known to be on this one; a proxy or NAT may stand for others.
    pub address: Option<std::net::IpAddr>,
    /// The server's port, if there is only one.
    pub port: Option<u16>,
    /// Connections that closed so, in the window.
    pub closes: u64,
    /// Of so many (`window_connections`).
    pub of_closes: u64,
    /// Requests per connection: the median, off by at most a sixteenth (exact below 16); `null` if none spoke HTTP/1.x.
    pub requests_p50: Option<u64>,
    /// The mean.
    pub requests_mean: Option<f64>,
    /// TIME_WAIT made by them on this host, sockets a second.
    pub time_wait_per_s: f64,
    /// Sockets in TIME_WAIT to be expected from all that was seen: what is made in 60 s at the rate of the window.
    pub time_wait_expected: f64,
    /// What they would be after the change; `null` if that does not follow from what was seen.
    pub time_wait_after: Option<f64>,
    /// Requests per connection (mean) of other connections to the same server, which do not have this fault: what
    /// `time_wait_after` reckons with; `null` if there are none: then that the connections are kept for good.
    pub reuse: Option<f64>,
    /// All of it as a sentence. Holds names that another process chose: escape before showing.
    pub text: String,
}

/// A limit was reached, or is no longer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Alert {
    /// When.
    pub time: Timestamp,
    /// Reached, or over.
    pub state: AlertState,
    /// What is watched.
    pub metric: Metric,
    /// What it is now.
    pub value: f64,
    /// Its limit.
    pub limit: f64,
    /// Sockets in TIME_WAIT now, in the network namespace of tracer, whoever made them; `null` if the kernel did not say.
    pub time_wait_sockets: Option<u64>,
    /// TIME_WAIT seen made in the last ten seconds, sockets a second, in all network namespaces, within the filters.
    pub time_wait_per_s: f64,
    /// The first advice of a summary of this moment; `null` if there is none, and once it is over.
    pub advice: Option<Advice>,
}

/// What became of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlertState {
    /// The limit was reached.
    Raised,
    /// It was below four fifths of the limit for ten seconds.
    Cleared,
}

/// What an alert watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// `--alert-time-wait`: sockets in TIME_WAIT in the network namespace of tracer.
    TimeWait,
    /// `--alert-rate`: TIME_WAIT seen made, sockets a second.
    Rate,
}
