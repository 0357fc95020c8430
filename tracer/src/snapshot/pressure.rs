//! Port pressure: sockets and settings of one network namespace in, ephemeral ports in use for each destination out.
//!
//! A pure calculation: no I/O, no clock. `connect` without `bind` takes a local port from `ip_local_port_range`, less
//! `ip_local_reserved_ports` and less the ports that something listens on. One port serves one connection for each source
//! address and destination (address and port), so that is what is counted by. Ports that another socket has bound without
//! listening, and a range that a program set for its own sockets, are not seen.
//!
//! **What TIME_WAIT holds.** A TIME_WAIT socket holds its port for L = 60 s. Where `tcp_tw_reuse` allows (1: everywhere, 2:
//! on loopback; with `tcp_timestamps`), a new connection to the same destination may take it over after L =
//! `tcp_tw_reuse_delay` (1 s): it is *reusable* then, and no pressure. That the peer uses timestamps, too, is assumed.
//!
//! **The present rate.** The timer of a TIME_WAIT socket tells how long ago it became one. The rate r is the number of those
//! younger than the window W, divided by it; W = 5 s, or L if that is shorter. No second sample is needed.
//!
//! **When `connect` fails.** With U ports held now, C that there are, and E(t) of the present TIME_WAIT sockets gone by t
//! (known exactly, from the same timers), it is the first t ≤ L with U + r·t − E(t) ≥ C. If there is none up to L, there
//! is none at all: from then on as many go as come. Connections that stay open are taken to stay as many as they are. If
//! by then the namespace's TIME_WAIT table (`tcp_max_tw_buckets`), by the same formula, is full, ports do not run out: the
//! kernel then closes without TIME_WAIT, and counts `TCPTimeWaitOverflow`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Serialize;

use super::sockets::{Socket, State};

/// How long a TIME_WAIT socket lives: `TCP_TIMEWAIT_LEN`, the same in all kernels.
pub const TIME_WAIT: Duration = Duration::from_secs(60);
/// What the rate is measured over.
const WINDOW: Duration = Duration::from_secs(5);

/// What is set in a network namespace, as far as it bears on ports. What cannot be read is as the kernel sets it itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// `ip_local_port_range`: first and last.
    pub ip_local_port_range: (u16, u16),
    /// `ip_local_reserved_ports`: ranges, first and last.
    pub ip_local_reserved_ports: Vec<(u16, u16)>,
    /// `tcp_tw_reuse`: 0 never, 1 everywhere, 2 on loopback.
    pub tcp_tw_reuse: u8,
    /// `tcp_tw_reuse_delay`, milliseconds.
    pub tcp_tw_reuse_delay_ms: u32,
    /// `tcp_timestamps`: 0 off; without them nothing is reused.
    pub tcp_timestamps: u8,
    /// `tcp_max_tw_buckets`: so many sockets may be in TIME_WAIT.
    pub tcp_max_tw_buckets: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ip_local_port_range: (32_768, 60_999),
            ip_local_reserved_ports: Vec::new(),
            tcp_tw_reuse: 2,
            tcp_tw_reuse_delay_ms: 1_000,
            tcp_timestamps: 1,
            tcp_max_tw_buckets: 262_144,
        }
    }
}

/// Reads `ip_local_port_range`, such as `32768 60999`; `None`: it is no such range.
pub fn parse_range(text: &str) -> Option<(u16, u16)> {
    let mut words = text.split_ascii_whitespace();
    let (first, last) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (words.next().is_none() && first <= last).then_some((first, last))
}

/// Reads `ip_local_reserved_ports`, such as `8080,9000-9100`; empty: none. `None`: it is no such list.
pub fn parse_reserved(text: &str) -> Option<Vec<(u16, u16)>> {
    let text = text.trim();
    if text.is_empty() {
        return Some(Vec::new());
    }
    text.split(',')
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            (first <= last).then_some((first, last))
        })
        .collect()
}

impl Settings {
    /// Whether `connect` may choose this port, if nothing listens on it.
    fn allows(&self, port: u16) -> bool {
        let within = |&(first, last): &(u16, u16)| (first..=last).contains(&port);
        within(&self.ip_local_port_range) && !self.ip_local_reserved_ports.iter().any(within)
    }

    /// Whether the port is in `ip_local_port_range`.
    pub fn is_ephemeral(&self, port: u16) -> bool {
        (self.ip_local_port_range.0..=self.ip_local_port_range.1).contains(&port)
    }

    /// How many ports `connect` may choose from, with those that something listens on left out.
    pub fn ports(&self, listening: &HashSet<u16>) -> u32 {
        let range: RangeInclusive<u16> = self.ip_local_port_range.0..=self.ip_local_port_range.1;
        let ports = range.filter(|port| self.allows(*port) && !listening.contains(port)).count();
        u32::try_from(ports).unwrap_or(u32::MAX)
    }

    /// How long TIME_WAIT holds the port of a connection between these addresses.
    fn held_for(&self, from: IpAddr, to: IpAddr) -> Duration {
        let may = match self.tcp_tw_reuse {
            0 => false,
            1 => true,
            _ => from.to_canonical().is_loopback() || to.to_canonical().is_loopback(),
        };
        if may && self.tcp_timestamps != 0 {
            Duration::from_millis(self.tcp_tw_reuse_delay_ms.into()).min(TIME_WAIT)
        } else {
            TIME_WAIT
        }
    }
}

/// How many ephemeral ports are in use for one destination.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pressure {
    /// Inode number of the network namespace.
    pub netns: u64,
    /// The source address.
    pub from: IpAddr,
    /// The destination.
    pub to: SocketAddr,
    /// Ephemeral ports in use, those in TIME_WAIT included.
    pub used: u32,
    /// Of them: in TIME_WAIT.
    pub time_wait: u32,
    /// Of those: may be taken over by a new connection, and so do not count.
    pub reusable: u32,
    /// Ports that `connect` may choose from.
    pub ports: u32,
    /// Share of the ports that cannot be had, 0 to 1: `(used - reusable) / ports`.
    pub share: f64,
    /// Sockets that became TIME_WAIT each second, lately.
    pub rate_per_s: f64,
    /// Seconds until `connect` fails at this rate; 0: it fails now; `null`: it will not.
    pub fails_in_s: Option<f64>,
    /// Ports would run out, but the TIME_WAIT table is full before: then closes leave no TIME_WAIT.
    pub time_wait_table_first: bool,
}

/// What holds a port of a destination.
#[derive(Clone, Copy)]
enum Held {
    /// A connection that is no TIME_WAIT.
    Open,
    /// A TIME_WAIT socket of this age.
    TimeWait(Duration),
}

/// The pressure on each source address and destination, the most pressing first; and in how many seconds the TIME_WAIT
/// table of the namespace is full (`None`: it will not be).
pub fn pressure(
    netns: u64,
    sockets: &[Socket],
    settings: &Settings,
    listening: &HashSet<u16>,
) -> (Vec<Pressure>, Option<f64>) {
    let mut by_destination: HashMap<(IpAddr, SocketAddr), BTreeMap<u16, Held>> = HashMap::new();
    let ours = |socket: &&Socket| {
        let port = socket.local.port();
        settings.allows(port) && !listening.contains(&port)
    };
    for socket in sockets.iter().filter(ours) {
        let held = match socket.state {
            State::TimeWait => Held::TimeWait(TIME_WAIT.saturating_sub(socket.expires)),
            _ => Held::Open,
        };
        let ports = by_destination.entry((socket.local.ip(), socket.remote)).or_default();
        // A socket may change its state while the kernel lists it, and be listed twice.
        let first = ports.entry(socket.local.port()).or_insert(held);
        if matches!(held, Held::Open) {
            *first = held;
        }
    }

    // FIN_WAIT2 without a process has its place in the table, too.
    let in_table = |socket: &&Socket| socket.state == State::TimeWait || socket.is_mini;
    let ages: Vec<Duration> = sockets
        .iter()
        .filter(|socket| socket.state == State::TimeWait)
        .map(|socket| TIME_WAIT.saturating_sub(socket.expires))
        .collect();
    let table = sockets.iter().filter(in_table).count();
    let table_full = reaches(table, settings.tcp_max_tw_buckets, rate(&ages, TIME_WAIT), &ages, TIME_WAIT);

    let ports = settings.ports(listening);
    let mut all: Vec<Pressure> = by_destination
        .into_iter()
        .map(|((from, to), held)| one(netns, from, to, &held, ports, settings, table_full))
        .collect();
    all.sort_by(most_pressing_first);
    (all, table_full)
}

/// First those that run out, the soonest first; then the fullest. Two calls with the same sockets give the same order.
pub fn most_pressing_first(one: &Pressure, other: &Pressure) -> std::cmp::Ordering {
    let soon = |pressure: &Pressure| pressure.fails_in_s.unwrap_or(f64::INFINITY);
    soon(one)
        .total_cmp(&soon(other))
        .then_with(|| other.share.total_cmp(&one.share))
        .then_with(|| other.used.cmp(&one.used))
        .then_with(|| (one.netns, one.from, one.to).cmp(&(other.netns, other.from, other.to)))
}

fn one(
    netns: u64,
    from: IpAddr,
    to: SocketAddr,
    held: &BTreeMap<u16, Held>,
    ports: u32,
    settings: &Settings,
    table_full: Option<f64>,
) -> Pressure {
    let life = settings.held_for(from, to.ip());
    let ages: Vec<Duration> = held
        .values()
        .filter_map(|held| match held {
            Held::TimeWait(age) => Some(*age),
            Held::Open => None,
        })
        .collect();
    // What is left of its time may round to nothing, and it still be there: only reuse makes a port free before that.
    let young: Vec<Duration> = ages.iter().copied().filter(|age| *age < life || life == TIME_WAIT).collect();
    let (used, time_wait, reusable) = (held.len(), ages.len(), ages.len() - young.len());
    let rate_per_s = rate(&ages, life);
    let blocked = used - reusable;
    let runs_out = reaches(blocked, ports, rate_per_s, &young, life);
    let time_wait_table_first = match (runs_out, table_full) {
        (Some(ports), Some(table)) => ports > 0.0 && table < ports,
        _ => false,
    };
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Pressure {
        netns,
        from,
        to,
        used: count(used),
        time_wait: count(time_wait),
        reusable: count(reusable),
        ports,
        share: if ports == 0 { 1.0 } else { f64::from(count(blocked)) / f64::from(ports) },
        rate_per_s,
        fails_in_s: runs_out.filter(|_| !time_wait_table_first),
        time_wait_table_first,
    }
}

/// Entries each second, from the ages of what was entered and lives for `life`.
fn rate(ages: &[Duration], life: Duration) -> f64 {
    let window = WINDOW.min(life);
    if window.is_zero() {
        return 0.0;
    }
    let young = ages.iter().filter(|age| **age < window).count();
    f64::from(u32::try_from(young).unwrap_or(u32::MAX)) / window.as_secs_f64()
}

/// Seconds until `now` things, to which `rate` a second are added, and of which those of these `ages` go when they are
/// `life` old, are `limit`. 0: they are; `None`: never.
fn reaches(now: usize, limit: u32, rate: f64, ages: &[Duration], life: Duration) -> Option<f64> {
    let now = f64::from(u32::try_from(now).unwrap_or(u32::MAX));
    let limit = f64::from(limit);
    if now >= limit {
        return Some(0.0);
    }
    if rate <= 0.0 {
        return None;
    }
    let mut ends: Vec<f64> = ages.iter().map(|age| life.saturating_sub(*age).as_secs_f64()).collect();
    ends.sort_by(f64::total_cmp);
    // Up to the next end it only grows: so it is enough to ask whether it gets there before that.
    let mut gone = 0.0;
    for end in ends.into_iter().chain([life.as_secs_f64()]) {
        let at = (limit - now + gone) / rate;
        if at <= end {
            return Some(at);
        }
        gone += 1.0;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 5)), 3306);

    fn socket(state: State, port: u16, to: SocketAddr, age_ms: u64) -> Socket {
        let from = if to.ip().is_loopback() { Ipv4Addr::LOCALHOST } else { Ipv4Addr::new(10, 0, 0, 7) };
        Socket {
            state,
            local: SocketAddr::new(from.into(), port),
            remote: to,
            inode: 0,
            is_mini: state == State::TimeWait,
            expires: if state == State::TimeWait { TIME_WAIT - Duration::from_millis(age_ms) } else { Duration::ZERO },
        }
    }

    /// `count` TIME_WAIT sockets from the port `first` on, one each `every_ms`, the youngest of this age.
    fn closed(first: u16, count: u16, to: SocketAddr, youngest_ms: u64, every_ms: f64) -> Vec<Socket> {
        let age = |n: u16| youngest_ms + (f64::from(n) * every_ms) as u64;
        (0..count).map(|n| socket(State::TimeWait, first + n, to, age(n))).collect()
    }

    fn only(sockets: &[Socket], settings: &Settings) -> Pressure {
        let (mut all, _) = pressure(1, sockets, settings, &HashSet::new());
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    #[test]
    fn ranges() {
        assert_eq!(parse_range("32768\t60999\n"), Some((32_768, 60_999)));
        for text in ["", "1", "2 1", "1 65536", "-1 5", "a b", "1 2 3"] {
            assert_eq!(parse_range(text), None, "{text:?}");
        }
        assert_eq!(parse_reserved("\n"), Some(vec![]));
        assert_eq!(parse_reserved("8080,9000-9100\n"), Some(vec![(8_080, 8_080), (9_000, 9_100)]));
        for text in [",", "1,", "5-4", "1-", "x", "65536"] {
            assert_eq!(parse_reserved(text), None, "{text:?}");
        }
    }

    #[test]
    fn reserved_and_listened_on_ports_narrow_the_range() {
        let mut settings = Settings::default();
        assert_eq!(settings.ports(&HashSet::new()), 28_232);
        // Partly outside of the range, and one that is both.
        settings.ip_local_reserved_ports = vec![(32_000, 32_769), (40_000, 40_000)];
        assert_eq!(settings.ports(&HashSet::from([40_000, 50_000, 80])), 28_232 - 2 - 1 - 1);
        settings.ip_local_port_range = (1, 65_535);
        settings.ip_local_reserved_ports = vec![(1, 65_535)];
        assert_eq!(settings.ports(&HashSet::new()), 0);
        assert_eq!(pressure(1, &[], &settings, &HashSet::new()), (vec![], None));
    }

    #[test]
    fn counts_each_port_once_for_each_source_and_destination() {
        let other = SocketAddr::new(SERVER.ip(), 3307);
        let mut sockets = vec![
            socket(State::Established, 40_000, SERVER, 0),
            socket(State::TimeWait, 40_001, SERVER, 20_000),
            // Listed in both states.
            socket(State::TimeWait, 40_002, SERVER, 0),
            socket(State::FinWait2, 40_002, SERVER, 0),
            // No port that `connect` chose.
            socket(State::Established, 1_000, SERVER, 0),
            socket(State::Established, 45_000, SERVER, 0),
            // The same port, another destination.
            socket(State::Other, 40_000, other, 0),
        ];
        sockets.push(Socket {
            local: "10.0.0.8:40000".parse().expect("an address"),
            ..socket(State::CloseWait, 0, SERVER, 0)
        });
        let (all, full) = pressure(7, &sockets, &Settings::default(), &HashSet::from([45_000]));
        let got: Vec<_> = all.iter().map(|one| (one.from.to_string(), one.to, one.used, one.time_wait)).collect();
        let (seven, eight) = ("10.0.0.7".to_owned(), "10.0.0.8".to_owned());
        assert_eq!(got, [(seven.clone(), SERVER, 3, 1), (seven, other, 1, 0), (eight, SERVER, 1, 0)]);
        assert!(all.iter().all(|one| one.ports == 28_231 && one.netns == 7), "{all:?}");
        assert_eq!(full, None);
    }

    /// 415 a second for 40 s are 16,600 of 28,232: 11,632 more take 28 s, and none is gone before 20.
    #[test]
    fn tells_when_ports_run_out() {
        // At 1000 / 415 ms each the first of them end after 60 - 40 s: at 20 s already, so that 8,300 more are taken by then.
        let sockets = closed(32_768, 16_600, SERVER, 0, 1000.0 / 415.0);
        let steady = only(&sockets, &Settings::default());
        assert!((steady.rate_per_s - 415.0).abs() < 2.0, "{steady:?}");
        // 415 * 60 = 24,900 is less than there are: in the end as many go as come.
        assert_eq!(steady.fails_in_s, None, "{steady:?}");
        // The same load on a narrower range.
        let narrow = Settings { ip_local_port_range: (32_768, 52_767), ..Settings::default() };
        let out = only(&sockets, &narrow);
        let expected = (20_000.0 - 16_600.0) / out.rate_per_s;
        assert!(out.fails_in_s.is_some_and(|s| (s - expected).abs() < 0.01), "{out:?}, {expected}");
        assert!((out.share - 0.83).abs() < 1e-9, "{out:?}");
        // A narrower one still: all are in use.
        let full = Settings { ip_local_port_range: (32_768, 49_367), ..Settings::default() };
        assert_eq!(only(&sockets, &full).fails_in_s, Some(0.0));
    }

    #[test]
    fn what_ends_meanwhile_is_taken_into_account() {
        let range = Settings { ip_local_port_range: (32_768, 33_767), ..Settings::default() };
        // 800 end within a second, 50 came in the last 5 s: 10 a second will never be 1,000.
        let mut sockets = closed(32_768, 800, SERVER, 59_500, 0.5);
        sockets.extend(closed(33_600, 50, SERVER, 0, 100.0));
        let calm = only(&sockets, &range);
        assert_eq!((calm.used, calm.rate_per_s, calm.fails_in_s), (850, 10.0, None));
        // 800 that end late, instead.
        let mut sockets = closed(32_768, 800, SERVER, 10_000, 0.5);
        sockets.extend(closed(33_600, 50, SERVER, 0, 100.0));
        assert_eq!(only(&sockets, &range).fails_in_s, Some(15.0));
        // Nothing new comes.
        assert_eq!(only(&sockets[..800], &range).fails_in_s, None);
    }

    #[test]
    fn connections_that_stay_open_count() {
        let range = Settings { ip_local_port_range: (32_768, 33_767), ..Settings::default() };
        let mut sockets: Vec<_> = (0..900).map(|n| socket(State::CloseWait, 32_768 + n, SERVER, 0)).collect();
        sockets.extend(closed(33_700, 10, SERVER, 0, 500.0));
        let out = only(&sockets, &range);
        assert_eq!((out.used, out.time_wait, out.rate_per_s, out.fails_in_s), (910, 10, 2.0, Some(45.0)));
    }

    #[test]
    fn what_may_be_reused_is_no_pressure() {
        // 10 in the last second, 490 before that.
        let sockets = |to| closed(32_768, 500, to, 0, 100.0);
        let with = |tcp_tw_reuse, tcp_timestamps| Settings {
            ip_local_port_range: (32_768, 33_267),
            tcp_tw_reuse,
            tcp_timestamps,
            ..Settings::default()
        };
        let lo = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 80);
        for (to, settings, reused) in [
            (SERVER, with(0, 1), false),
            (SERVER, with(1, 1), true),
            (SERVER, with(1, 0), false),
            (SERVER, with(2, 1), false),
            (lo, with(2, 1), true),
            (lo, with(0, 1), false),
        ] {
            let got = only(&sockets(to), &settings);
            let wanted = if reused { (490, 10.0 / 500.0, None) } else { (0, 1.0, Some(0.0)) };
            assert_eq!((got.reusable, got.share, got.fails_in_s), wanted, "{to} {settings:?}");
            assert_eq!((got.used, got.time_wait, got.rate_per_s), (500, 500, 10.0));
        }
        // So many a second that even one second's are too many.
        let mut fast = with(1, 1);
        fast.ip_local_port_range = (32_768, 33_767);
        let out = only(&closed(32_768, 800, SERVER, 0, 0.5), &fast);
        assert_eq!(out.fails_in_s, Some(200.0 / 800.0), "{out:?}");
    }

    #[test]
    fn a_full_table_comes_before_full_ports() {
        let range = Settings { ip_local_port_range: (32_768, 33_767), tcp_max_tw_buckets: 900, ..Settings::default() };
        let mut sockets = closed(32_768, 800, SERVER, 10_000, 0.5);
        sockets.extend(closed(33_600, 50, SERVER, 0, 100.0));
        let (all, full) = pressure(1, &sockets, &range, &HashSet::new());
        assert_eq!(full, Some(5.0));
        assert_eq!((all[0].fails_in_s, all[0].time_wait_table_first), (None, true));
        // Ports that are all in use are, whatever the table.
        let tiny = Settings { ip_local_port_range: (32_768, 33_567), tcp_max_tw_buckets: 10, ..range };
        let (all, full) = pressure(1, &sockets[..800], &tiny, &HashSet::new());
        assert_eq!((all[0].fails_in_s, all[0].time_wait_table_first, full), (Some(0.0), false, Some(0.0)));
    }

    #[test]
    fn the_most_pressing_comes_first() {
        let range = Settings { ip_local_port_range: (32_768, 33_767), ..Settings::default() };
        let to = |port| SocketAddr::new(SERVER.ip(), port);
        let mut sockets = closed(32_768, 400, to(1), 30_000, 0.5);
        sockets.extend(closed(32_768, 500, to(2), 0, 5.0));
        sockets.extend(closed(32_768, 900, to(3), 30_000, 0.5));
        let (all, _) = pressure(1, &sockets, &range, &HashSet::new());
        let ports: Vec<_> = all.iter().map(|one| one.to.port()).collect();
        assert_eq!(ports, [2, 3, 1], "{all:?}");
    }
}
