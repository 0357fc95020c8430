//! `tracer snapshot`: the TCP sockets of the host now, and how far its ephemeral ports are used up. No BPF.
//!
//! What comes in: `/proc`, and `sock_diag` in each network namespace, asked by a thread that enters it. What goes out: one
//! [`Snapshot`], as text or as one JSON object. It changes nothing, holds no namespace when it ends, and what it could
//! not see is in [`Snapshot::degraded`], never left out silently. Without root it sees its own namespace, and the
//! processes of its user. How ports are counted: [`pressure`].
//!
//! The namespaces are read one after another, not at one moment: what changes meanwhile may be seen twice, or not at all.

pub mod pressure;
pub mod sockets;
mod text;
pub(crate) mod walk;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use log::{debug, warn};
use rustix::io::Errno;
use serde::Serialize;

use crate::preflight::{self, Refusal, exit};
use crate::sink::json;
use crate::time_wait;
use pressure::{Pressure, Settings};
use sockets::{Socket, State};
pub use walk::Owner;
use walk::{Found, Namespace};

/// Sockets of one namespace that are kept, about 100 bytes each; the others are counted.
const SOCKETS: usize = 2_000_000;
/// Destinations, and groups of sockets, that are listed; the others are counted.
const LISTED: usize = 5_000;
/// Processes that are named for one group of sockets.
const PROCESSES: usize = 8;

/// The host now: the one JSON object of `tracer snapshot --json`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "snapshot")]
pub struct Snapshot {
    /// When the last namespace had been read.
    pub time: Timestamp,
    /// Version of tracer.
    pub version: &'static str,
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Host name.
    pub host: String,
    /// All sockets, by state.
    pub sockets: States,
    /// The network namespaces: tracer's own first, the others by their number of sockets in TIME_WAIT.
    pub namespaces: Vec<Netns>,
    /// Ephemeral ports in use for each source address and destination, the most pressing first; at most 5,000.
    pub pressure: Vec<Pressure>,
    /// Destinations that are not listed.
    pub pressure_omitted: u64,
    /// Sockets by local port and peer, those first that have most in TIME_WAIT, FIN_WAIT2 and CLOSE_WAIT; at most 5,000.
    pub groups: Vec<Group>,
    /// Groups that are not listed.
    pub groups_omitted: u64,
    /// What could not be seen, and how to mend that.
    pub degraded: Vec<String>,
}

/// How many sockets are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct States {
    /// TIME_WAIT
    pub time_wait: u64,
    /// FIN_WAIT2, with a process or without.
    pub fin_wait2: u64,
    /// CLOSE_WAIT
    pub close_wait: u64,
    /// ESTABLISHED
    pub established: u64,
    /// SYN_SENT, FIN_WAIT1, LAST_ACK, CLOSING: they hold ports, too.
    pub other: u64,
}

impl States {
    fn add(&mut self, state: State) {
        *match state {
            State::TimeWait => &mut self.time_wait,
            State::FinWait2 => &mut self.fin_wait2,
            State::CloseWait => &mut self.close_wait,
            State::Established => &mut self.established,
            State::Listen | State::Other => &mut self.other,
        } += 1;
    }

    fn add_all(&mut self, more: Self) {
        self.time_wait += more.time_wait;
        self.fin_wait2 += more.fin_wait2;
        self.close_wait += more.close_wait;
        self.established += more.established;
        self.other += more.other;
    }

    /// Those that wait for the end of a connection.
    const fn waiting(&self) -> u64 {
        self.time_wait + self.fin_wait2 + self.close_wait
    }

    const fn total(&self) -> u64 {
        self.waiting() + self.established + self.other
    }
}

/// A network namespace.
#[derive(Clone, Debug, Serialize)]
pub struct Netns {
    /// Its inode number.
    pub netns: u64,
    /// The name that it is mounted under (`ip netns`), if any.
    pub name: Option<String>,
    /// Whether it is tracer's own.
    pub own: bool,
    /// Its sockets, by state.
    pub sockets: States,
    /// Ports that `connect` may choose from: the range, less those reserved, less those that something listens on.
    pub ports: u32,
    /// What is set there.
    #[serde(flatten)]
    pub settings: Settings,
    /// `TCPTimeWaitOverflow`: closes that left no TIME_WAIT since its start because there were too many; `null`: not known.
    pub time_wait_overflow: Option<u64>,
    /// Seconds until there are `tcp_max_tw_buckets` in TIME_WAIT, at the present rate; 0: there are; `null`: never.
    pub time_wait_full_in_s: Option<f64>,
}

/// Sockets of one namespace with the same local port and peer; or, where the local ports are ephemeral, with the same peer
/// and port of the peer. A local port is ephemeral if nothing listens on it, it is in `ip_local_port_range`, and not more
/// sockets share it and the peer's address than share the peer's address and port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Inode number of the network namespace.
    pub netns: u64,
    /// The local port; `null`: ephemeral ones.
    pub local_port: Option<u16>,
    /// The peer's address.
    pub peer: IpAddr,
    /// The peer's port; `null`: any.
    pub peer_port: Option<u16>,
    /// The sockets, by state.
    pub sockets: States,
    /// Processes that have the sockets, by id, at most 8.
    pub processes: Vec<Owner>,
    /// Processes that are not listed.
    pub processes_omitted: u64,
    /// Sockets that no process has any more: those in TIME_WAIT, and others that were closed.
    pub no_process: u64,
    /// Sockets that a process may have which was not found.
    pub unknown_process: u64,
    /// The process that listens on the local port now; `null`: none, or not known.
    pub listener: Option<Owner>,
}

/// What one namespace said.
struct Seen {
    settings: Settings,
    unread: Vec<&'static str>,
    overflow: Option<u64>,
    listeners: Vec<Socket>,
    sockets: Vec<Socket>,
    omitted: u64,
}

/// Takes a snapshot and prints it to stdout. `styled`: with the escape sequences of a terminal.
///
/// # Errors
/// A [`Refusal`] if not even its own namespace can be read; or stdout cannot be written to. That it is closed is none.
pub fn run(as_json: bool, styled: bool) -> Result<()> {
    let snapshot = take()?;
    for missing in &snapshot.degraded {
        warn!("{missing}");
    }
    let mut out = Vec::new();
    if as_json {
        json::append(&mut out, &snapshot)?;
    } else {
        let zone = jiff::tz::TimeZone::system();
        out.extend_from_slice(text::text(&snapshot, &zone, styled).as_bytes());
    }
    let mut stdout = io::stdout().lock();
    match stdout.write_all(&out).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("cannot write to stdout"),
    }
}

/// Whether there is a network namespace of this inode number; `None`: it was not found, but not all could be looked at.
pub(crate) fn has_namespace(inode: u32) -> Option<bool> {
    let found = walk::walk();
    let is_known = found.namespaces.contains_key(&u64::from(inode));
    if is_known || (found.unreadable == 0 && found.omitted == 0) { Some(is_known) } else { None }
}

/// Has the kernel give each connection of the host a cookie that has none yet: it does so for what it lists. Where a namespace cannot be
/// listed, they have none; nor where no process is in it, and it is not mounted where `ip netns` does that.
pub(crate) fn give_cookies() {
    let mut namespaces = HashMap::new();
    for path in time_wait::namespaces() {
        if let Ok(found) = fs::metadata(&path) {
            namespaces.entry(found.ino()).or_insert(path);
        }
    }
    let list = || sockets::list_unread(&time_wait::open()?);
    let own = u64::from(time_wait::own_namespace().unwrap_or_default());
    namespaces.remove(&own);
    let elsewhere = namespaces.iter().map(|(inode, path)| (*inode, inside(*inode, path, list).map(drop)));
    for (inode, listed) in std::iter::once((own, list())).chain(elsewhere) {
        if let Err(error) = listed {
            debug!("network namespace {inode} is not listed: {error}");
        }
    }
}

/// Takes a snapshot.
///
/// # Errors
/// A [`Refusal`] if not even its own namespace can be read.
pub fn take() -> Result<Snapshot> {
    let own = fs::metadata("/proc/self/ns/net").context("cannot read /proc/self/ns/net: is /proc mounted?")?.ino();
    let mut found = walk::walk();
    let own_namespace = found.namespaces.remove(&own);
    let mut gathered = Gathered::default();

    let seen = see().map_err(|error| refusal(&error))?;
    gathered.add(own, own_namespace.and_then(|known| known.name), true, &seen, &found);
    drop(seen);
    let mut foreign: Vec<(u64, Namespace)> = found.namespaces.drain().collect();
    foreign.sort_by_key(|(inode, _)| *inode);
    let mut denied = Vec::new();
    for (inode, Namespace { path, name, is_doubtful }) in foreign {
        match inside(inode, &path, see) {
            Ok(Some(seen)) => gathered.add(inode, name, false, &seen, &found),
            // It has gone.
            Ok(None) => {}
            // It cannot be entered as a network namespace, for it is none.
            Err(error) if is_doubtful && Errno::from_io_error(&error) == Some(Errno::INVAL) => {}
            Err(error) => denied.push(format!("{inode} ({error})")),
        }
    }
    if let [first, rest @ ..] = &denied[..] {
        let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
        gathered.degraded.push(format!("not seen: network namespace {first}{more}; run it as root"));
    }
    if !preflight::in_initial_pid_namespace() {
        gathered.degraded.push(
            "not in the host's pid namespace: only the processes here are known, and the network namespaces that they are \
             in; run tracer on the host (in a container: --pid=host)"
                .to_owned(),
        );
    }
    if found.unreadable > 0 {
        gathered.degraded.push(format!(
            "{} processes could not be looked into: their sockets, and the namespaces that only they are in, are without \
             a process, or not seen; run it as root",
            found.unreadable
        ));
    }
    if found.omitted > 0 {
        let omitted = found.omitted;
        gathered
            .degraded
            .push(format!("there are very many open files or namespaces: some ({omitted} or more) were not looked at"));
    }
    Ok(gathered.finish())
}

fn refusal(error: &io::Error) -> Refusal {
    let release = preflight::kernel_release();
    match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => Refusal {
            code: exit::POLICY,
            message: format!(
                "kernel {release} refused to list TCP sockets ({error}): a security policy (LSM, seccomp, a container's \
                 profile) forbids it; run tracer on the host, outside of it"
            ),
        },
        _ => Refusal {
            code: exit::KERNEL,
            message: format!("kernel {release} does not list TCP sockets ({error}); modprobe tcp_diag"),
        },
    }
}

/// Does something in the namespace behind `path`; `None`: it is not there any more.
fn inside<T: Send + 'static>(netns: u64, path: &Path, work: fn() -> io::Result<T>) -> io::Result<Option<T>> {
    // It may be another file by now, such as a pipe that nobody writes to: that must not hold up, nor be taken for a terminal.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)) => return Ok(None),
        Err(error) => return Err(error),
    };
    // The process may have ended in between, or moved, and another taken its id.
    if file.metadata()?.ino() != netns {
        return Ok(None);
    }
    time_wait::inside(file, work).map(Some)
}

/// Reads the namespace of the calling thread.
fn see() -> io::Result<Seen> {
    let netlink = time_wait::open()?;
    let listening = netlink_packet_sock_diag::inet::StateFlags::LISTEN;
    let (listeners, _) = sockets::list(&netlink, &listening, SOCKETS)?;
    let (sockets, omitted) = sockets::list(&netlink, &sockets::connections(), SOCKETS)?;
    let mut unread = Vec::new();
    let settings = settings(&mut unread);
    // Not `/proc/net`: that is the namespace of the main thread.
    let netstat = fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default();
    Ok(Seen { settings, unread, overflow: counter(&netstat, "TCPTimeWaitOverflow"), listeners, sockets, omitted })
}

/// Reads what is set in the namespace of the calling thread; names in `unread` what could not be.
fn settings(unread: &mut Vec<&'static str>) -> Settings {
    let mut settings = Settings::default();
    let mut read = |name: &'static str, parse: &mut dyn FnMut(&str) -> Option<()>| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
        // Kernels before 6.14 have no such setting, but a fixed second.
        let absent = name == "tcp_tw_reuse_delay" && text.is_err();
        if text.ok().and_then(|text| parse(text.trim())).is_none() && !absent {
            unread.push(name);
        }
    };
    let Settings {
        ip_local_port_range,
        ip_local_reserved_ports,
        tcp_tw_reuse,
        tcp_tw_reuse_delay_ms,
        tcp_timestamps,
        tcp_max_tw_buckets,
    } = &mut settings;
    fn set<T>(place: &mut T, value: Option<T>) -> Option<()> {
        value.map(|value| *place = value)
    }
    read("ip_local_port_range", &mut |text| set(ip_local_port_range, pressure::parse_range(text)));
    read("ip_local_reserved_ports", &mut |text| set(ip_local_reserved_ports, pressure::parse_reserved(text)));
    read("tcp_tw_reuse", &mut |text| set(tcp_tw_reuse, text.parse().ok()));
    read("tcp_tw_reuse_delay", &mut |text| set(tcp_tw_reuse_delay_ms, text.parse().ok()));
    read("tcp_timestamps", &mut |text| set(tcp_timestamps, text.parse().ok()));
    read("tcp_max_tw_buckets", &mut |text| set(tcp_max_tw_buckets, text.parse().ok()));
    settings
}

/// A counter of `/proc/net/netstat`: a line of names, and one of values.
pub(crate) fn counter(netstat: &str, name: &str) -> Option<u64> {
    let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split(' ').position(|word| word == name)?;
    values.split(' ').nth(at)?.parse().ok()
}

/// What has been gathered up to now.
#[derive(Default)]
struct Gathered {
    sockets: States,
    namespaces: Vec<Netns>,
    pressure: Vec<Pressure>,
    pressure_omitted: u64,
    groups: Vec<Group>,
    groups_omitted: u64,
    degraded: Vec<String>,
}

impl Gathered {
    fn add(&mut self, netns: u64, name: Option<String>, own: bool, seen: &Seen, found: &Found) {
        let mut states = States::default();
        seen.sockets.iter().for_each(|socket| states.add(socket.state));
        self.sockets.add_all(states);
        let listening: HashSet<u16> = seen.listeners.iter().map(|socket| socket.local.port()).collect();
        let (pressures, time_wait_full_in_s) = pressure::pressure(netns, &seen.sockets, &seen.settings, &listening);
        self.pressure.extend(pressures);
        self.groups.extend(groups(netns, seen, found));
        self.cut();
        self.namespaces.push(Netns {
            netns,
            name,
            own,
            sockets: states,
            ports: seen.settings.ports(&listening),
            settings: seen.settings.clone(),
            time_wait_overflow: seen.overflow,
            time_wait_full_in_s,
        });
        if seen.omitted > 0 {
            self.degraded.push(format!(
                "network namespace {netns} has too many sockets: {} of them are not counted",
                seen.omitted
            ));
        }
        if !seen.unread.is_empty() {
            let unread = seen.unread.join(", ");
            self.degraded.push(format!(
                "network namespace {netns}: cannot read {unread} in /proc/sys/net/ipv4: the kernel's own value is assumed"
            ));
        }
    }

    /// Keeps what is listed of what there is up to now, the most pressing.
    fn cut(&mut self) {
        self.pressure.sort_by(pressure::most_pressing_first);
        self.pressure_omitted += self.pressure.len().saturating_sub(LISTED) as u64;
        self.pressure.truncate(LISTED);
        self.groups.sort_by(|one, other| {
            let key = |group: &Group| (group.sockets.waiting(), group.sockets.total());
            let name = |group: &Group| (group.netns, group.local_port, group.peer, group.peer_port);
            key(other).cmp(&key(one)).then_with(|| name(one).cmp(&name(other)))
        });
        self.groups_omitted += self.groups.len().saturating_sub(LISTED) as u64;
        self.groups.truncate(LISTED);
    }

    fn finish(mut self) -> Snapshot {
        self.namespaces.sort_by_key(|known| (!known.own, std::cmp::Reverse(known.sockets.time_wait), known.netns));
        Snapshot {
            time: Timestamp::now(),
            version: env!("CARGO_PKG_VERSION"),
            kernel: preflight::kernel_release(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            sockets: self.sockets,
            namespaces: self.namespaces,
            pressure: self.pressure,
            pressure_omitted: self.pressure_omitted,
            groups: self.groups,
            groups_omitted: self.groups_omitted,
            degraded: self.degraded,
        }
    }
}

/// Sockets by local port and peer: see [`Group`].
fn groups(netns: u64, seen: &Seen, found: &Found) -> Vec<Group> {
    #[derive(Default)]
    struct Members {
        sockets: States,
        processes: BTreeSet<Owner>,
        no_process: u64,
        unknown_process: u64,
    }
    // Of several that listen on one port, the lowest process id.
    let mut listeners: HashMap<u16, Option<Owner>> = HashMap::new();
    for socket in &seen.listeners {
        let listener = listeners.entry(socket.local.port()).or_default();
        *listener = [listener.take(), found.owner(socket.inode)].into_iter().flatten().min();
    }
    let mut groups: HashMap<(Option<u16>, IpAddr, Option<u16>), Members> = HashMap::new();
    // Where nothing tells which end is the server: a server that has ended leaves many with its port.
    let (mut here, mut there) = (HashMap::new(), HashMap::new());
    for Socket { local, remote, .. } in &seen.sockets {
        *here.entry((local.port(), remote.ip())).or_insert(0_u64) += 1;
        *there.entry(*remote).or_insert(0_u64) += 1;
    }
    for socket in &seen.sockets {
        let (port, peer) = (socket.local.port(), socket.remote);
        let key = if listeners.contains_key(&port)
            || !seen.settings.is_ephemeral(port)
            || here.get(&(port, peer.ip())) > there.get(&peer)
        {
            (Some(port), peer.ip(), None)
        } else {
            (None, peer.ip(), Some(peer.port()))
        };
        let members = groups.entry(key).or_default();
        members.sockets.add(socket.state);
        if socket.inode == 0 {
            members.no_process += 1;
        } else if let Some(owner) = found.owner(socket.inode) {
            members.processes.insert(owner);
        } else {
            members.unknown_process += 1;
        }
    }
    let group = |((local_port, peer, peer_port), members): (_, Members)| Group {
        netns,
        local_port,
        peer,
        peer_port,
        sockets: members.sockets,
        processes_omitted: members.processes.len().saturating_sub(PROCESSES) as u64,
        processes: members.processes.into_iter().take(PROCESSES).collect(),
        no_process: members.no_process,
        unknown_process: members.unknown_process,
        listener: local_port.and_then(|port: u16| listeners.get(&port)?.clone()),
    };
    groups.into_iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn socket(state: State, local: &str, remote: &str) -> Socket {
        let (local, remote) = (local.parse().expect("an address"), remote.parse().expect("an address"));
        let expires = Duration::from_secs(30);
        let inode = u32::from(state == State::Established);
        Socket { state, local, remote, inode, is_mini: state == State::TimeWait, expires }
    }

    fn seen(listeners: Vec<Socket>, sockets: Vec<Socket>) -> Seen {
        Seen { settings: Settings::default(), unread: Vec::new(), overflow: Some(3), listeners, sockets, omitted: 0 }
    }

    #[test]
    fn a_counter_of_netstat() {
        let netstat = "TcpExt: A TCPTimeWaitOverflow B\nTcpExt: 1 22 3\nIpExt: A\nIpExt: 4\n";
        assert_eq!(counter(netstat, "TCPTimeWaitOverflow"), Some(22));
        assert_eq!(counter(netstat, "C"), None);
        assert_eq!(counter("TcpExt: A\n", "A"), None);
        assert_eq!(counter("", "A"), None);
    }

    #[test]
    fn groups_by_the_end_whose_port_stays() {
        let seen = seen(
            vec![socket(State::Listen, "0.0.0.0:40000", "0.0.0.0:0")],
            vec![
                // A server in the ephemeral range, which listens; one outside of it that does not any more; a client.
                socket(State::TimeWait, "10.0.0.1:40000", "10.0.0.2:50001"),
                socket(State::TimeWait, "10.0.0.1:40000", "10.0.0.2:50002"),
                socket(State::Established, "10.0.0.1:80", "10.0.0.2:50003"),
                socket(State::FinWait2, "10.0.0.1:50004", "10.0.0.5:3306"),
                socket(State::CloseWait, "10.0.0.1:50005", "10.0.0.5:3306"),
                socket(State::Other, "10.0.0.1:50006", "10.0.0.5:3307"),
                // A server that has ended.
                socket(State::TimeWait, "10.0.0.1:45000", "10.0.0.3:50001"),
                socket(State::TimeWait, "10.0.0.1:45000", "10.0.0.3:50002"),
                socket(State::TimeWait, "10.0.0.1:45000", "10.0.0.3:50003"),
            ],
        );
        let mut gathered = Gathered::default();
        gathered.add(7, None, true, &seen, &Found::default());
        let snapshot = gathered.finish();
        let got: Vec<_> = snapshot
            .groups
            .iter()
            .map(|group| (group.local_port, group.peer_port, group.sockets.waiting(), group.sockets.total()))
            .collect();
        let wanted = [
            (Some(45_000), None, 3, 3),
            (None, Some(3306), 2, 2),
            (Some(40_000), None, 2, 2),
            (None, Some(3307), 0, 1),
            (Some(80), None, 0, 1),
        ];
        assert_eq!(got, wanted);
        let unowned: Vec<_> = snapshot.groups.iter().map(|group| (group.no_process, group.unknown_process)).collect();
        assert_eq!(unowned, [(3, 0), (2, 0), (2, 0), (1, 0), (0, 1)]);
        let states = States { time_wait: 5, fin_wait2: 1, close_wait: 1, established: 1, other: 1 };
        assert_eq!((snapshot.sockets, snapshot.namespaces[0].sockets), (states, states));
        assert_eq!(snapshot.namespaces[0].ports, 28_231);
    }

    #[test]
    fn what_is_listed_is_bounded_and_the_rest_counted() {
        let peer = |n: u32| format!("10.1.{}.{}:3306", n / 250, n % 250);
        let many: Vec<_> = (0..3_000).map(|n| socket(State::TimeWait, "10.0.0.1:40000", &peer(n))).collect();
        let mut gathered = Gathered::default();
        for netns in 1..=2 {
            gathered.add(netns, None, false, &seen(Vec::new(), many.clone()), &Found::default());
        }
        let snapshot = gathered.finish();
        assert_eq!((snapshot.groups.len(), snapshot.groups_omitted), (5_000, 1_000));
        assert_eq!((snapshot.pressure.len(), snapshot.pressure_omitted), (5_000, 1_000));
        assert_eq!(snapshot.sockets.time_wait, 6_000, "all are counted");
    }

    #[test]
    fn the_json_object() {
        let mut gathered = Gathered::default();
        let sockets = vec![socket(State::TimeWait, "10.0.0.1:40000", "10.0.0.2:3306")];
        gathered.add(7, Some("blue".to_owned()), true, &seen(Vec::new(), sockets), &Found::default());
        let value = serde_json::to_value(gathered.finish()).expect("JSON");
        assert_eq!(value["type"], "snapshot");
        let states = serde_json::json!({
            "time_wait": 1, "fin_wait2": 0, "close_wait": 0, "established": 0, "other": 0,
        });
        assert_eq!(value["sockets"], states);
        assert_eq!(
            value["namespaces"],
            serde_json::json!([{
                "netns": 7, "name": "blue", "own": true, "sockets": states, "ports": 28_232,
                "ip_local_port_range": [32_768, 60_999], "ip_local_reserved_ports": [], "tcp_tw_reuse": 2,
                "tcp_tw_reuse_delay_ms": 1_000, "tcp_timestamps": 1, "tcp_max_tw_buckets": 262_144,
                "time_wait_overflow": 3, "time_wait_full_in_s": null,
            }])
        );
        let share = 1.0 / 28_232.0;
        assert_eq!(
            value["pressure"],
            serde_json::json!([{
                "netns": 7, "from": "10.0.0.1", "to": "10.0.0.2:3306", "used": 1, "time_wait": 1, "reusable": 0,
                "ports": 28_232, "share": share, "rate_per_s": 0.0, "fails_in_s": null, "time_wait_table_first": false,
            }])
        );
        assert_eq!(
            value["groups"],
            serde_json::json!([{
                "netns": 7, "local_port": null, "peer": "10.0.0.2", "peer_port": 3306, "sockets": states,
                "processes": [], "processes_omitted": 0, "no_process": 1, "unknown_process": 0, "listener": null,
            }])
        );
    }

    #[test]
    fn sees_its_own_namespace() {
        let snapshot = take().expect("the kernel answers");
        assert!(snapshot.namespaces[0].own, "{snapshot:?}");
        let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("/proc");
        let range = pressure::parse_range(range.trim()).expect("a range");
        assert_eq!(snapshot.namespaces[0].settings.ip_local_port_range, range);
        assert!(snapshot.namespaces[0].time_wait_overflow.is_some());
    }
}
