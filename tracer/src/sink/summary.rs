//! Closes in, summaries out: which process, which peer, which cause, how much of it, and what to change.
//!
//! Closes are counted in groups, by process, role, side, cause, peer and the server's port; processes of one name in one
//! cgroup are one. Everything is bounded: when there are too many groups, those of the smaller half are joined, whatever their
//! peer.
//! A close of a known group allocates nothing. Where both ends of a connection are on this host, they are matched, so that
//! advice neither counts it twice nor names both ends.

mod advice;
mod pairs;
mod quantiles;

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use indexmap::{Equivalent, IndexMap};
use jiff::Timestamp;

use crate::event::{Cause, Close, ClosedBy, Event, Final, Group, Ledger, Process, Role, Summary};
use crate::recent::Recent;
use crate::verdict;
use advice::Seen;
pub(super) use advice::{thousands, who};
use pairs::{End, Pairs};
use quantiles::{Quantiles, buckets};

/// Groups that are counted.
const COUNTED: usize = 2_048;
/// Groups that are listed.
const LISTED: usize = 1_000;
/// Groups that can be found without a search.
const RECENT: usize = 8;
/// Process ids that a group remembers.
const PIDS: usize = 8;
/// Without `--every`: a summary is about the last one to two of these.
const PERIOD: Duration = Duration::from_secs(30);

/// What the summary cannot count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// Records lost.
    pub lost: u64,
    /// Sockets that could not be followed.
    pub untracked: u64,
}

/// What is so at the moment of a summary, and what others have counted.
#[derive(Clone, Debug)]
pub struct Moment {
    /// The time of day.
    pub time: Timestamp,
    /// The same, of the clock that windows are measured with.
    pub now: Instant,
    /// What could not be counted here.
    pub missed: Missed,
    /// Sockets in TIME_WAIT, if the kernel says.
    pub time_wait_sockets: Option<u64>,
    /// The programs' books, where they were asked.
    pub ledger: Option<Box<Ledger>>,
}

/// Which part of the run a summary is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The time since the last summary of this kind, with `--every`.
    SinceLast,
    /// The last one to two periods.
    Recent,
    /// All of it: the last summary.
    Run,
}

/// Counts closes.
#[derive(Debug)]
pub struct Summarizer {
    groups: IndexMap<Key, Windows<Box<Stats>>, RandomState>,
    /// Processes, and the index of a group that they are of.
    recent: Recent<(Arc<Process>, usize), RECENT>,
    total: Windows<Count>,
    close_wait: u64,
    pairs: Pairs,
    /// Windows follow each other by themselves, unless `--every` does it.
    by_itself: bool,
    time_wait_max: Option<u64>,
    began: Instant,
    previous_began: Instant,
    current_began: Instant,
}

/// What a group has in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    process: Option<Program>,
    role: Role,
    closed_by: ClosedBy,
    cause: Cause,
    at_fault: Option<Role>,
    /// `None`: any of many, each with few closes.
    peer: Option<IpAddr>,
    port: Option<u16>,
}

/// Processes that count as one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Program {
    comm: String,
    cgroup: Option<String>,
}

/// The same, borrowed from a close. The fields are those of [`Key`], in the same order: the hashes must be equal.
#[derive(Hash)]
struct KeyOf<'a> {
    process: Option<ProgramOf<'a>>,
    role: Role,
    closed_by: ClosedBy,
    cause: Cause,
    at_fault: Option<Role>,
    peer: Option<IpAddr>,
    port: Option<u16>,
}

#[derive(Hash)]
struct ProgramOf<'a> {
    comm: &'a str,
    cgroup: Option<&'a str>,
}

impl<'a> KeyOf<'a> {
    fn new(close: &'a Close) -> Self {
        let process = close.process.as_ref();
        Self {
            process: process.map(|process| ProgramOf { comm: &process.comm, cgroup: process.cgroup.as_deref() }),
            role: close.role,
            closed_by: close.closed_by,
            cause: close.cause,
            at_fault: verdict::at_fault(close),
            peer: Some(close.remote.ip()),
            port: match close.role {
                Role::Server => Some(close.local.port()),
                Role::Client => Some(close.remote.port()),
                Role::Unknown => None,
            },
        }
    }

    fn to_key(&self) -> Key {
        let process = self.process.as_ref();
        Key {
            process: process
                .map(|of| Program { comm: of.comm.to_owned(), cgroup: of.cgroup.map(std::borrow::ToOwned::to_owned) }),
            role: self.role,
            closed_by: self.closed_by,
            cause: self.cause,
            at_fault: self.at_fault,
            peer: self.peer,
            port: self.port,
        }
    }
}

impl KeyOf<'_> {
    /// Whether all but the process is the same.
    fn is_alike(&self, key: &Key) -> bool {
        let rest = |role, closed_by, cause, at_fault, peer, port| (role, closed_by, cause, at_fault, peer, port);
        rest(self.role, self.closed_by, self.cause, self.at_fault, self.peer, self.port)
            == rest(key.role, key.closed_by, key.cause, key.at_fault, key.peer, key.port)
    }
}

impl Equivalent<Key> for KeyOf<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.is_alike(key)
            && match (&self.process, &key.process) {
                (Some(of), Some(program)) => of.comm == program.comm && of.cgroup == program.cgroup.as_deref(),
                (None, None) => true,
                _ => false,
            }
    }
}

/// One thing counted over three stretches of the run, which follow each other without a gap.
#[derive(Clone, Debug, Default)]
struct Windows<T> {
    earlier: Option<T>,
    previous: Option<T>,
    current: T,
}

/// Something that can be counted in pieces.
trait Sum: Default {
    fn add(&mut self, other: &Self);
    fn is_nothing(&self) -> bool;
}

impl<T: Sum> Windows<T> {
    /// The current window becomes the previous one.
    fn turn(&mut self) {
        if let Some(previous) = self.previous.take() {
            self.earlier.get_or_insert_default().add(&previous);
        }
        if !self.current.is_nothing() {
            self.previous = Some(std::mem::take(&mut self.current));
        }
    }

    fn add(&mut self, other: Self) {
        for (mine, theirs) in [(&mut self.earlier, other.earlier), (&mut self.previous, other.previous)] {
            if let Some(theirs) = theirs {
                mine.get_or_insert_default().add(&theirs);
            }
        }
        self.current.add(&other.current);
    }

    fn sum(&self, about: About) -> T {
        let (earlier, previous) = match about {
            About::SinceLast => (None, None),
            About::Recent => (None, self.previous.as_ref()),
            About::Run => (self.earlier.as_ref(), self.previous.as_ref()),
        };
        let mut sum = T::default();
        for part in [earlier, previous, Some(&self.current)].into_iter().flatten() {
            sum.add(part);
        }
        sum
    }
}

/// All closes together.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    closes: u64,
    time_wait: u64,
    /// Connections both of whose ends were counted.
    pairs: u64,
}

impl Sum for Count {
    fn add(&mut self, other: &Self) {
        self.closes += other.closes;
        self.time_wait += other.time_wait;
        self.pairs += other.pairs;
    }

    fn is_nothing(&self) -> bool {
        self.closes == 0 && self.pairs == 0
    }
}

/// Up to a million.
type Requests = Quantiles<{ buckets(20) }>;
/// Microseconds, up to 19 hours.
type Lifetimes = Quantiles<{ buckets(36) }>;

/// The closes of one group.
#[derive(Clone, Debug, Default)]
struct Stats {
    closes: u64,
    time_wait: u64,
    /// Those whose other end is on this host.
    paired: u64,
    /// Of them, those whose other end left TIME_WAIT.
    paired_time_wait: u64,
    /// Of them, those that advice counts at the other end.
    mirrored: u64,
    /// Connections with HTTP that were seen from their beginning, and their requests.
    http: u64,
    requests: u64,
    requests_of_each: Requests,
    lifetimes: Lifetimes,
    pids: Pids,
}

/// All groups together, in three windows each: 12 MiB at most, and a few KiB on most hosts.
const _: () = assert!(size_of::<Stats>() <= 2 << 10);

impl Stats {
    fn close(&mut self, close: &Close) {
        self.closes += 1;
        self.time_wait += u64::from(left_time_wait(close));
        if let Some(process) = &close.process {
            self.pids.add(process.pid, 1);
        }
        // What was open before can have had any number of requests, and any age.
        if close.started_before {
            return;
        }
        self.lifetimes.add(close.duration_us);
        if let Some(http) = &close.http {
            self.http += 1;
            self.requests += u64::from(http.requests);
            self.requests_of_each.add(http.requests.into());
        }
    }

    /// Sockets in TIME_WAIT on this host that these connections left, at either end.
    const fn time_wait_here(&self) -> u64 {
        self.time_wait + self.paired_time_wait
    }
}

impl Sum for Box<Stats> {
    fn add(&mut self, other: &Self) {
        self.closes += other.closes;
        self.time_wait += other.time_wait;
        self.paired += other.paired;
        self.paired_time_wait += other.paired_time_wait;
        self.mirrored += other.mirrored;
        self.http += other.http;
        self.requests += other.requests;
        self.requests_of_each.merge(&other.requests_of_each);
        self.lifetimes.merge(&other.lifetimes);
        self.pids.merge(&other.pids);
    }

    fn is_nothing(&self) -> bool {
        self.closes == 0 && self.paired == 0
    }
}

/// The most frequent process ids, by the space-saving algorithm: whoever has more than an eighth of the closes is here.
#[derive(Clone, Debug, Default)]
struct Pids {
    slots: [(u32, u64); PIDS],
    more: bool,
}

impl Pids {
    fn add(&mut self, pid: u32, count: u64) {
        let slot = match self.slots.iter_mut().find(|slot| slot.0 == pid || slot.1 == 0) {
            Some(slot) => slot,
            None => {
                self.more = true;
                match self.slots.iter_mut().min_by_key(|slot| slot.1) {
                    Some(slot) => slot,
                    None => return,
                }
            }
        };
        slot.0 = pid;
        slot.1 += count;
    }

    fn merge(&mut self, other: &Self) {
        for (pid, count) in other.slots.iter().filter(|slot| slot.1 > 0) {
            self.add(*pid, *count);
        }
        self.more |= other.more;
    }

    fn list(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self.slots.iter().filter(|slot| slot.1 > 0).map(|slot| slot.0).collect();
        pids.sort_unstable();
        pids
    }
}

fn left_time_wait(close: &Close) -> bool {
    close.fate == Some(Final::TimeWait)
}

impl Summarizer {
    /// Has counted nothing. `every`: summaries about the time since the last one will be asked for. `time_wait_max`: the
    /// kernel's limit of TIME_WAIT sockets (`tcp_max_tw_buckets`), if it is known.
    pub fn new(began: Instant, every: bool, time_wait_max: Option<u64>) -> Self {
        Self {
            groups: IndexMap::default(),
            recent: Recent::default(),
            total: Windows::default(),
            close_wait: 0,
            pairs: Pairs::default(),
            by_itself: !every,
            time_wait_max,
            began,
            previous_began: began,
            current_began: began,
        }
    }

    /// Says what the kernel's limit of TIME_WAIT sockets is.
    pub fn limit(&mut self, time_wait_max: Option<u64>) {
        self.time_wait_max = time_wait_max;
    }

    /// Counts what is to be counted of an event, live or from a recording.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Close(close) => self.close(close),
            Event::CloseWait(_) => self.close_wait(),
            _ => {}
        }
    }

    /// Counts one close.
    pub fn close(&mut self, close: &Close) {
        let time_wait = left_time_wait(close);
        self.total.current.closes += 1;
        self.total.current.time_wait += u64::from(time_wait);
        let group = self.group_of(close);
        self.groups[group].current.close(close);
        let end = End { group, time_wait };
        if let Some(other) = self.pairs.other_end(close.netns, close.local, close.remote, end) {
            self.pair(end, other);
        }
    }

    /// The index of the group that a close belongs to.
    fn group_of(&mut self, close: &Close) -> usize {
        let key = KeyOf::new(close);
        let is_it = |process: &Arc<Process>, group| {
            close.process.as_ref().is_some_and(|owner| Arc::ptr_eq(owner, process))
                && self.groups.get_index(group).is_some_and(|(known, _)| key.is_alike(known))
        };
        if let Some((_, group)) = self.recent.find(|(process, group)| is_it(process, *group)) {
            return *group;
        }
        let group = match self.groups.get_index_of(&key) {
            Some(group) => group,
            None => {
                if self.groups.len() >= COUNTED {
                    self.give_up_the_smaller_half();
                }
                self.groups.insert_full(key.to_key(), Windows::default()).0
            }
        };
        if let Some(process) = &close.process {
            self.recent.keep((Arc::clone(process), group));
        }
        group
    }

    /// Both ends of one connection were counted. Advice counts it once: at the end that can change something, where the
    /// process is known for certain.
    fn pair(&mut self, one: End, other: End) {
        self.total.current.pairs += 1;
        for (end, opposite) in [(one, other), (other, one)] {
            let at_opposite = self.reason(opposite);
            let Some((key, windows)) = self.groups.get_index_mut(end.group) else { continue };
            let stats = &mut windows.current;
            stats.paired += 1;
            stats.paired_time_wait += u64::from(opposite.time_wait);
            stats.mirrored += u64::from(match at_opposite {
                // Only this end tells who could change something.
                Some((_, None)) | None => false,
                Some(reason) if reason == (key.cause, key.at_fault) => key.at_fault != Some(key.role),
                // The ends do not agree: it is not known.
                Some(_) => true,
            });
        }
    }

    /// Why one end closed, and who could change that; `None` where it is that end, and its process is not known: then the
    /// other one, which knows its address, tells more.
    fn reason(&self, end: End) -> Option<(Cause, Option<Role>)> {
        let (key, _) = self.groups.get_index(end.group)?;
        let is_nameless = key.at_fault == Some(key.role) && key.process.is_none();
        (!is_nameless).then_some((key.cause, key.at_fault))
    }

    /// What has closed least, of late and in all: of that only the groups without a peer are kept.
    fn give_up_the_smaller_half(&mut self) {
        let closes = |stats: Option<&Box<Stats>>| stats.map_or(0, |stats| stats.closes);
        let size = |windows: &Windows<Box<Stats>>| {
            let recent = windows.current.closes + closes(windows.previous.as_ref());
            (recent, closes(windows.earlier.as_ref()))
        };
        let mut sizes: Vec<_> =
            self.groups.values().enumerate().map(|(at, group)| (Reverse(size(group)), at)).collect();
        sizes.sort_unstable();
        let mut kept = vec![false; sizes.len()];
        for (_, at) in sizes.iter().take(COUNTED / 2) {
            kept[*at] = true;
        }
        let mut given_up = IndexMap::<Key, Windows<Box<Stats>>, RandomState>::default();
        for ((key, windows), kept) in std::mem::take(&mut self.groups).into_iter().zip(kept) {
            if kept {
                self.groups.insert(key, windows);
            } else if key.peer.is_some() {
                // What they have in common but for the peer still counts: a server at fault may have very many clients.
                given_up.entry(Key { peer: None, ..key }).or_default().add(windows);
            }
        }
        given_up.sort_by(|_, one, _, other| size(other).cmp(&size(one)));
        for (key, windows) in given_up.into_iter().take(COUNTED / 4) {
            self.groups.entry(key).or_default().add(windows);
        }
        // They have other indices now.
        self.pairs.clear();
        self.recent = Recent::default();
    }

    /// Counts one socket that its process has not closed.
    pub fn close_wait(&mut self) {
        self.close_wait += 1;
    }

    /// Sockets seen going to TIME_WAIT, since tracing began.
    pub fn time_wait(&self) -> u64 {
        self.total.sum(About::Run).time_wait
    }

    /// Lets time pass. To be called about once a second.
    pub fn pass(&mut self, now: Instant) {
        if self.by_itself && now.saturating_duration_since(self.current_began) >= PERIOD {
            self.turn(now);
        }
    }

    fn turn(&mut self, now: Instant) {
        self.total.turn();
        for windows in self.groups.values_mut() {
            windows.turn();
        }
        self.previous_began = self.current_began;
        self.current_began = now;
    }

    /// What was counted.
    pub fn summary(&mut self, about: About, moment: &Moment) -> Summary {
        let began = match about {
            About::SinceLast => self.current_began,
            About::Recent => self.previous_began,
            About::Run => self.began,
        };
        let since = |began| moment.now.saturating_duration_since(began).as_secs_f64();
        let window_s = since(began);
        let window = self.total.sum(about);
        let total = self.total.sum(About::Run);
        let mut seen: Vec<Seen<'_>> = self
            .groups
            .iter()
            .filter_map(|(key, windows)| {
                let stats = windows.sum(about);
                (stats.closes > 0).then_some(Seen { key, stats, windows })
            })
            .collect();
        let connections = window.closes - window.pairs.min(window.closes);
        let advice = advice::from(&seen, window, window_s, self.time_wait_max);
        // Two runs that saw the same print the same.
        seen.sort_by(|one, other| {
            let rank = |seen: &Seen<'_>| (Reverse(seen.stats.closes), Reverse(seen.stats.time_wait));
            let rest = |seen: &Seen<'_>| {
                let key = seen.key;
                (
                    key.peer,
                    key.port,
                    key.cause,
                    key.closed_by as u8,
                    key.role as u8,
                    key.at_fault.map(|role| role as u8),
                )
            };
            rank(one)
                .cmp(&rank(other))
                .then_with(|| one.key.process.cmp(&other.key.process))
                .then_with(|| rest(one).cmp(&rest(other)))
        });
        seen.truncate(LISTED);
        let groups: Vec<Group> = seen.iter().map(|seen| seen.group(window_s)).collect();
        let listed: u64 = groups.iter().map(|group| group.closes).sum();
        let summary = Summary {
            time: moment.time,
            last: about == About::Run,
            duration_s: since(self.began),
            closes: total.closes,
            time_wait: total.time_wait,
            close_wait: self.close_wait,
            lost: moment.missed.lost,
            untracked: moment.missed.untracked,
            window_s,
            window_closes: window.closes,
            window_time_wait: window.time_wait,
            window_connections: connections,
            closes_per_s: per_second(window.closes, window_s),
            time_wait_per_s: per_second(window.time_wait, window_s),
            time_wait_sockets: moment.time_wait_sockets,
            advice,
            groups,
            other_closes: total.closes - listed,
            ledger: moment.ledger.clone().map(|ledger| Box::new(ledger.written(total.closes))),
        };
        if about == About::SinceLast {
            self.turn(moment.now);
        }
        summary
    }
}

impl Seen<'_> {
    fn group(&self, window_s: f64) -> Group {
        let Self { key, stats, windows } = self;
        let run = windows.sum(About::Run);
        let pids = stats.pids.list();
        Group {
            comm: key.process.as_ref().map(|program| program.comm.clone()),
            pid: match pids[..] {
                [pid] => Some(pid),
                _ => None,
            },
            pids,
            more_pids: stats.pids.more,
            cgroup: key.process.as_ref().and_then(|program| program.cgroup.clone()),
            role: key.role,
            closed_by: key.closed_by,
            cause: key.cause,
            at_fault: key.at_fault,
            peer: key.peer,
            port: key.port,
            closes: run.closes,
            time_wait: run.time_wait,
            window_closes: stats.closes,
            window_time_wait: stats.time_wait,
            both_ends: stats.paired.min(stats.closes),
            closes_per_s: per_second(stats.closes, window_s),
            time_wait_per_s: per_second(stats.time_wait, window_s),
            requests_p50: stats.requests_of_each.at(50),
            requests_p95: stats.requests_of_each.at(95),
            lifetime_p50_us: stats.lifetimes.at(50),
            lifetime_p95_us: stats.lifetimes.at(95),
        }
    }
}

/// Zero where no time has passed.
#[expect(clippy::cast_precision_loss, reason = "2^53 closes take a long time")]
fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests;
