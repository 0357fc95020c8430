//! What to report: the filters of the command line in, whether an event passes out.
//!
//! [`Args`] are the options as they were given; [`Filter`] is what they mean, names looked up: a pure predicate on events
//! that knows every filter, wherever the events come from. While tracing, the kernel programs apply those that they can, and
//! [`Filter::beyond_kernel`] is the rest. Several values of one filter: any of them; several filters: all of them. What is
//! certain to match nothing is refused, and nothing that might match.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::cli::{self, Comm};
use crate::event::{Cause, Close, ClosedBy, Event, Final, Process};
use crate::preflight::{Refusal, exit, in_initial_pid_namespace, mountinfo, unescape};
use crate::snapshot;

/// At most so many values of `--peer` and of `--local`: the programs' maps have room for one more.
const PREFIXES: usize = tracer_ebpf::PREFIXES - 1;

/// Over the filters in `--help`.
const HEADING: &str = "Filters (several of one kind: any of them; of several kinds: all of them)";

/// The filters as on the command line.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// Only this process, its threads and its descendants (of a recording: without descendants)
    #[arg(help_heading = HEADING, long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    pub pid: Vec<u32>,
    /// Only processes of this name. The kernel keeps 15 bytes of a name, so do we
    #[arg(help_heading = HEADING, long, value_name = "NAME", value_parser = OsStringValueParser::new().try_map(Comm::new))]
    pub comm: Vec<Comm>,
    /// Only processes in this cgroup, or one below it: /system.slice/nginx.service, or as mounted in /sys/fs/cgroup
    #[arg(help_heading = HEADING, long, value_name = "PATH")]
    pub cgroup: Vec<String>,
    /// Only connections with this local or remote port
    #[arg(help_heading = HEADING, long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Vec<u16>,
    /// Only connections with a remote address in this network: 10.0.0.0/8, 2001:db8::/32, or one address
    #[arg(help_heading = HEADING, long, value_name = "CIDR", value_parser = network)]
    pub peer: Vec<IpNet>,
    /// Only connections with a local address in this network
    #[arg(help_heading = HEADING, long, value_name = "CIDR", value_parser = network)]
    pub local: Vec<IpNet>,
    /// Only this network namespace: its name (ip netns), a path such as /proc/1234/ns/net, or its inode number
    #[arg(help_heading = HEADING, long, value_name = "NETNS")]
    pub netns: Vec<String>,
    /// Only connections that closed for this reason
    #[arg(help_heading = HEADING, long, value_name = "CAUSE")]
    pub cause: Vec<Cause>,
    /// Only connections whose first FIN or RST came from there
    #[arg(help_heading = HEADING, long, value_name = "END")]
    pub closed_by: Vec<ClosedBy>,
    /// Only connections that left this behind
    #[arg(help_heading = HEADING, long = "final", value_name = "FINAL")]
    pub fate: Vec<Final>,
    /// Only connections that were open for at least so long when they closed: 10s, 500ms, 1m, 1h
    #[arg(help_heading = HEADING, long, value_name = "TIME", value_parser = cli::duration)]
    pub min_duration: Option<Duration>,
}

impl Args {
    /// The filters in force, each as on the command line (`--port 80`).
    pub fn shown(&self) -> Vec<String> {
        fn all<T: Display>(option: &str, values: impl IntoIterator<Item = T>) -> Vec<String> {
            values.into_iter().map(|value| format!("--{option} {value}")).collect()
        }
        [
            all("pid", &self.pid),
            all("port", &self.port),
            all("comm", &self.comm),
            all("cgroup", &self.cgroup),
            all("peer", &self.peer),
            all("local", &self.local),
            all("netns", &self.netns),
            all("cause", self.cause.iter().map(word)),
            all("closed-by", self.closed_by.iter().map(word)),
            all("final", self.fate.iter().map(word)),
            all("min-duration", self.min_duration.map(|least| format!("{}s", least.as_secs_f64()))),
        ]
        .concat()
    }

    /// What they mean on this host, for events to come. `run_for` is `--duration`. Whether the processes of `--pid` exist is
    /// not asked here.
    ///
    /// # Errors
    /// What does not exist on this host, or is certain to match nothing; exit code 2, or 3 for want of privileges.
    pub fn resolve(&self, run_for: Option<Duration>) -> Result<Filter, Refusal> {
        self.check()?;
        if let (Some(least), Some(run_for)) = (self.min_duration, run_for)
            && least > run_for
        {
            return Err(usage(
                "--min-duration is longer than --duration: a connection's time counts from when it was first seen, so none \
                 can match"
                    .to_owned(),
            ));
        }
        let netns = self.netns.iter().map(|netns| namespace(netns)).collect::<Result<_, _>>()?;
        let mounts = Mounts::read();
        let cgroups = self.cgroup.iter().map(|path| mounts.cgroup(path).map_err(usage)).collect::<Result<_, _>>()?;
        Ok(self.filter(netns, cgroups))
    }

    /// What they mean for events that were recorded, maybe on another host: nothing is looked up. `--pid` means that process
    /// without its descendants.
    ///
    /// # Errors
    /// A network namespace that is not given by its number, and what is certain to match nothing; exit code 2.
    pub fn on_record(&self) -> Result<Filter, Refusal> {
        self.check()?;
        let number = |netns: &String| {
            netns.parse().map_err(|_| {
                usage(format!(
                    "--netns {netns}: in a recording network namespaces have numbers only, see `netns` there"
                ))
            })
        };
        let netns = self.netns.iter().map(number).collect::<Result<_, _>>()?;
        let cgroups = self.cgroup.iter().map(|path| absolute(path).map_err(usage)).collect::<Result<_, _>>()?;
        Ok(self.filter(netns, cgroups))
    }

    fn filter(&self, netns: Vec<u32>, cgroups: Vec<String>) -> Filter {
        Filter {
            pids: self.pid.clone(),
            comms: self.comm.iter().map(ToString::to_string).collect(),
            cgroups,
            ports: self.port.clone(),
            peers: self.peer.clone(),
            locals: self.local.clone(),
            netns,
            causes: self.cause.clone(),
            closed_by: self.closed_by.clone(),
            fates: self.fate.clone(),
            min_us: self.min_duration.map(micros),
        }
    }

    /// Refuses what can match nothing, wherever and whenever.
    fn check(&self) -> Result<(), Refusal> {
        for (option, networks) in [("peer", &self.peer), ("local", &self.local)] {
            if networks.len() > PREFIXES {
                return Err(usage(format!("--{option}: at most {PREFIXES}")));
            }
        }
        if self.netns.len() > tracer_ebpf::NAMESPACES {
            return Err(usage(format!("--netns: at most {}", tracer_ebpf::NAMESPACES)));
        }
        if let Some(group) = self.peer.iter().find(|peer| peer.network().is_multicast()) {
            return Err(usage(format!("--peer {group}: no TCP connection has a multicast group for its peer")));
        }
        // None is ever without an address; who writes it may mean all.
        for (option, networks) in [("peer", &self.peer), ("local", &self.local)] {
            let all = |any: &IpNet| if is_ipv4(any) { "0.0.0.0/0" } else { "::/0" };
            let nobody =
                |network: &&IpNet| network.prefix_len() == network.max_prefix_len() && network.addr().is_unspecified();
            if let Some(nobody) = networks.iter().find(nobody) {
                return Err(usage(format!(
                    "--{option} {nobody}: no connection has this address; {} is all of them",
                    all(nobody)
                )));
            }
        }
        let meet = |peer: &IpNet| self.local.iter().any(|local| is_ipv4(local) == is_ipv4(peer));
        if !self.peer.is_empty() && !self.local.is_empty() && !self.peer.iter().any(meet) {
            return Err(usage(
                "--peer and --local can match nothing together: the two ends of a connection are of one family, and these are \
                 IPv4 and IPv6"
                    .to_owned(),
            ));
        }
        self.check_endings()
    }

    /// Whether a connection can end as `--cause`, `--closed-by` and `--final` ask for.
    fn check_endings(&self) -> Result<(), Refusal> {
        let mut reason = None;
        for cause in any_of(&self.cause) {
            for closed_by in any_of(&self.closed_by) {
                for fate in any_of(&self.fate) {
                    match impossible(cause, closed_by, fate) {
                        None => return Ok(()),
                        Some(why) => reason = reason.or(Some(why)),
                    }
                }
            }
        }
        let asked = Self {
            cause: self.cause.clone(),
            closed_by: self.closed_by.clone(),
            fate: self.fate.clone(),
            ..Self::default()
        };
        Err(usage(format!(
            "{} can match nothing together: {}",
            asked.shown().join(" "),
            reason.unwrap_or("no connection ends so")
        )))
    }
}

/// The values that a filter asks for; `None`: any.
fn any_of<T: Copy>(asked: &[T]) -> Vec<Option<T>> {
    if asked.is_empty() { vec![None] } else { asked.iter().copied().map(Some).collect() }
}

/// Why no connection can end so; `None` if one may. Only what is certain: by the rules of [`crate::verdict`], not by what is
/// usual. That the end which closed second leaves TIME_WAIT is not impossible: its FIN may wait to be sent while the peer's
/// arrives.
fn impossible(cause: Option<Cause>, closed_by: Option<ClosedBy>, fate: Option<Final>) -> Option<&'static str> {
    match (cause, closed_by, fate) {
        (Some(Cause::Timeout), _, Some(Final::TimedOut)) => None,
        (Some(Cause::Timeout), _, Some(_)) | (Some(_), _, Some(Final::TimedOut)) => {
            Some("cause timeout and final timed_out are said of the same connections, and only together")
        }
        (Some(Cause::ResetByPeer | Cause::ResetByLocal), _, Some(fate)) if fate != Final::Reset => {
            Some("the final of what a reset ended is reset")
        }
        (Some(Cause::ResetByPeer), Some(ClosedBy::None), _) => {
            Some("a peer that sent a RST has closed the connection, unless that was done before")
        }
        (Some(Cause::ProcessExit), Some(ClosedBy::Remote | ClosedBy::None), _) => {
            Some("process_exit is said of an end that closed first, or at once with its peer")
        }
        (Some(Cause::IdleTimeout | Cause::NoReuse), Some(ClosedBy::None), _) => {
            Some("idle_timeout and no_reuse are said of connections that an end has closed")
        }
        (_, Some(ClosedBy::Remote | ClosedBy::None), Some(Final::FinWait2)) => {
            Some("only an end that sent its FIN before the peer's came can be left in FIN_WAIT2")
        }
        (_, Some(ClosedBy::None), Some(Final::TimeWait)) => Some("TIME_WAIT follows the FINs of both ends"),
        _ => None,
    }
}

/// The word of the JSON contract.
fn word<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Which events are wanted. Empty, it lets all pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Ids of the owner or the closer.
    pub pids: Vec<u32>,
    /// Names of the owner or the closer.
    pub comms: Vec<String>,
    /// Cgroups of the owner or the closer, or above them; without a slash at the end.
    pub cgroups: Vec<String>,
    /// Local or remote ports.
    pub ports: Vec<u16>,
    /// Networks of the remote address; an IPv4 one has the addresses that are IPv4-mapped, too.
    pub peers: Vec<IpNet>,
    /// Networks of the local address, likewise.
    pub locals: Vec<IpNet>,
    /// Inode numbers of network namespaces.
    pub netns: Vec<u32>,
    /// Of a connection that closed: why.
    pub causes: Vec<Cause>,
    /// Who closed first.
    pub closed_by: Vec<ClosedBy>,
    /// What is left.
    pub fates: Vec<Final>,
    /// How long it was open at least, microseconds.
    pub min_us: Option<u64>,
}

impl Filter {
    /// Whether it lets all pass.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an event is wanted. What is about no connection always is.
    ///
    /// A `close_wait` has no `final`, so it passes no filter by that; how long it will be open is not known, and not asked. A
    /// `state` comes before it is known how its connection ends: no filter by that applies to it.
    pub fn passes(&self, event: &Event) -> bool {
        match event {
            Event::Start(_) | Event::Lost(_) | Event::Alert(_) | Event::Summary(_) => true,
            Event::Close(close) => {
                self.ending_passes(close) && self.min_us.is_none_or(|least| close.duration_us >= least)
            }
            Event::CloseWait(close) => self.ending_passes(close),
            Event::State(state) => {
                self.processes_pass([state.process.as_deref(), None])
                    && (self.ports.is_empty() || self.has_port([state.local.port(), state.remote.port()]))
                    && self.ends_pass(state.netns, state.local.ip(), state.remote.ip())
            }
        }
    }

    /// The part of it that the kernel programs do not apply. With `states` they would keep the last transition of a short
    /// connection back, too, so then they are not told the shortest duration.
    #[must_use]
    pub fn beyond_kernel(self, states: bool) -> Self {
        Self {
            cgroups: self.cgroups,
            causes: self.causes,
            closed_by: self.closed_by,
            fates: self.fates,
            min_us: self.min_us.filter(|_| states),
            ..Self::default()
        }
    }

    fn ending_passes(&self, close: &Close) -> bool {
        (self.causes.is_empty() || self.causes.contains(&close.cause))
            && (self.closed_by.is_empty() || self.closed_by.contains(&close.closed_by))
            && (self.fates.is_empty() || close.fate.is_some_and(|fate| self.fates.contains(&fate)))
            && self.processes_pass([close.process.as_deref(), close.closer.as_deref()])
            && (self.ports.is_empty() || self.has_port([close.local.port(), close.remote.port()]))
            && self.ends_pass(close.netns, close.local.ip(), close.remote.ip())
    }

    fn processes_pass(&self, processes: [Option<&Process>; 2]) -> bool {
        let one = |wanted: &dyn Fn(&Process) -> bool| processes.into_iter().flatten().any(wanted);
        (self.pids.is_empty() || one(&|process| self.pids.contains(&process.pid)))
            && (self.comms.is_empty() || one(&|process| self.comms.contains(&process.comm)))
            && (self.cgroups.is_empty()
                || one(&|process| {
                    let cgroup = process.cgroup.as_deref();
                    cgroup.is_some_and(|cgroup| self.cgroups.iter().any(|asked| is_in(cgroup, asked)))
                }))
    }

    fn has_port(&self, ports: [u16; 2]) -> bool {
        ports.iter().any(|port| self.ports.contains(port))
    }

    fn ends_pass(&self, netns: u32, local: IpAddr, remote: IpAddr) -> bool {
        let among =
            |networks: &[IpNet], ip| networks.is_empty() || networks.iter().any(|network| network.contains(&ip));
        (self.netns.is_empty() || self.netns.contains(&netns))
            && among(&self.locals, local.to_canonical())
            && among(&self.peers, remote.to_canonical())
    }
}

/// Whether a cgroup is `asked` or one below it. The kernel marks one that was removed.
fn is_in(cgroup: &str, asked: &str) -> bool {
    let cgroup = cgroup.strip_suffix(" (deleted)").unwrap_or(cgroup);
    asked == "/" || cgroup.strip_prefix(asked).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whole microseconds, as events have them.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn is_ipv4(network: &IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// An address, or a network without host bits. IPv4-mapped ones become IPv4.
fn network(text: &str) -> Result<IpNet, String> {
    let network = match text.parse::<IpAddr>() {
        Ok(ip) => IpNet::from(ip),
        Err(_) => text
            .parse()
            .map_err(|_| "expected an address or a network such as 10.0.0.0/8 or 2001:db8::/32".to_owned())?,
    };
    let network = match network {
        IpNet::V6(mapped) => unmapped(mapped).map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    };
    if network == network.trunc() {
        Ok(network)
    } else {
        Err(format!(
            "it has bits beyond its prefix; the network is {}, the address alone {}",
            network.trunc(),
            network.addr()
        ))
    }
}

fn unmapped(network: Ipv6Net) -> Option<Ipv4Net> {
    let bits = network.prefix_len().checked_sub(96)?;
    Ipv4Net::new(network.addr().to_ipv4_mapped()?, bits).ok()
}

/// Networks as the programs' map has them: the bits that count, the address in IPv6, and whether it is wanted. The longest
/// entry that fits decides. IPv4 addresses are mapped into IPv6, but in no IPv6 network: that is what the first entry is for.
pub(crate) fn prefixes(networks: &[IpNet]) -> Vec<(u32, [u8; 16], bool)> {
    let mapped = |ip: Ipv4Addr| ip.to_ipv6_mapped().octets();
    let ipv4 = (96, mapped(Ipv4Addr::UNSPECIFIED), false);
    let asked = networks.iter().map(|network| match network {
        IpNet::V4(network) => (96 + u32::from(network.prefix_len()), mapped(network.network()), true),
        IpNet::V6(network) => (u32::from(network.prefix_len()), Ipv6Addr::octets(&network.network()), true),
    });
    // Behind it, so that it gives way to 0.0.0.0/0.
    std::iter::once(ipv4).chain(asked).collect()
}

fn usage(message: String) -> Refusal {
    Refusal { code: exit::USAGE, message }
}

/// The inode number of a network namespace that exists.
fn namespace(netns: &str) -> Result<u32, Refusal> {
    if let Ok(number) = netns.parse() {
        return if snapshot::has_namespace(number) == Some(false) && in_initial_pid_namespace() {
            Err(usage(format!(
                "--netns {netns}: there is no network namespace of this number: no process is in it or holds it open, and it \
                 is not mounted; that of a single thread can be given as /proc/PID/task/TID/ns/net"
            )))
        } else {
            Ok(number)
        };
    }
    let path = if netns.contains('/') { PathBuf::from(netns) } else { Path::new("/run/netns").join(netns) };
    let refuse = |why: &str| usage(format!("--netns {netns}: {why}; `ip netns` and `lsns -t net` list what there is"));
    inode_of(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => refuse(&format!("there is no {}", path.display())),
        ErrorKind::InvalidData => refuse(&format!("{} is no network namespace", path.display())),
        ErrorKind::PermissionDenied => Refusal {
            code: exit::PRIVILEGES,
            message: format!("--netns {netns}: {} cannot be read ({error}); run it as root", path.display()),
        },
        _ => refuse(&format!("{} cannot be read ({error})", path.display())),
    })
}

/// The inode number of the network namespace at `path`; [`ErrorKind::InvalidData`] if it is none.
fn inode_of(path: &Path) -> io::Result<u32> {
    /// `include/uapi/linux/nsfs.h`: the `CLONE_NEW…` flag of a namespace.
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    let no_namespace = || io::Error::from(ErrorKind::InvalidData);
    // Before it is opened: to open another kind of file may have effects.
    if fs::metadata(path)?.dev() != fs::metadata("/proc/self/ns/net")?.dev() {
        return Err(no_namespace());
    }
    let file = File::open(path)?;
    // SAFETY: the descriptor is open, and the request takes no argument.
    if unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) } != libc::CLONE_NEWNET {
        return Err(no_namespace());
    }
    u32::try_from(file.metadata()?.ino()).map_err(|_| no_namespace())
}

/// Where cgroup hierarchies are mounted.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    /// The cgroup that is mounted, and where.
    cgroups: Vec<(PathBuf, PathBuf)>,
    /// The hierarchy of version 2 is among them.
    has_v2: bool,
}

impl Mounts {
    fn read() -> Self {
        Self::parse(&mountinfo())
    }

    pub(crate) fn parse(mountinfo: &str) -> Self {
        let mut mounts = Self::default();
        for (before, after) in mountinfo.lines().filter_map(|line| line.split_once(" - ")) {
            let kind = after.split(' ').next();
            let mut fields = before.split(' ').skip(3);
            if let (Some("cgroup" | "cgroup2"), Some(root), Some(at)) = (kind, fields.next(), fields.next()) {
                mounts.has_v2 |= kind == Some("cgroup2");
                mounts.cgroups.push((PathBuf::from(unescape(root)), PathBuf::from(unescape(at))));
            }
        }
        mounts
    }

    /// The path in its hierarchy, as events have it, of a cgroup that is given so or as it is mounted. Where not all
    /// hierarchies are mounted, it cannot be told that one does not exist.
    fn cgroup(&self, path: &str) -> Result<String, String> {
        let asked = absolute(path)?;
        let as_mounted =
            self.cgroups.iter().filter_map(|(root, at)| Some((root, Path::new(&asked).strip_prefix(at).ok()?)));
        if let Some((root, below)) = as_mounted.min_by_key(|(_, below)| below.as_os_str().len())
            && Path::new(&asked).is_dir()
        {
            return absolute(&root.join(below).to_string_lossy());
        }
        let directory = |(root, at): &(PathBuf, PathBuf)| Some(at.join(Path::new(&asked).strip_prefix(root).ok()?));
        if self.has_v2 && !self.cgroups.iter().filter_map(directory).any(|directory| directory.is_dir()) {
            return Err(format!(
                "--cgroup {path}: there is no such cgroup; `systemd-cgls` or `ls /sys/fs/cgroup` list them"
            ));
        }
        Ok(asked)
    }
}

/// A cgroup's path from the root of its hierarchy, without a slash at the end.
fn absolute(path: &str) -> Result<String, String> {
    let parts = || Path::new(path).components();
    if parts().next() != Some(Component::RootDir) || parts().any(|part| part == Component::ParentDir) {
        return Err(format!(
            "--cgroup {path}: expected a path that begins with /, such as /system.slice/nginx.service"
        ));
    }
    Ok(parts().collect::<PathBuf>().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
