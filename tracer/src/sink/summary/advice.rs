//! Groups in, advice out: who can change what, and what TIME_WAIT would then be. Pure functions: no I/O, no clock.
//!
//! A TIME_WAIT socket lasts 60 s, so at a steady rate there are (Little's law) as many as are made in 60 s, at most what the
//! kernel allows. After the change, those at fault make as many a second as follows from their requests and from how the
//! other connections to the same server are reused:
//!
//! `after = 60 s × (made by all − made by them + their requests a second × made per request on reused connections)`
//!
//! Where no reused connection was seen, the last term is taken for zero, and the advice says so. No advice is given on thin
//! evidence, and no number where it does not follow from what was seen.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use super::{Count, Key, Pids, Program, Requests, Stats, Windows, per_second};
use crate::event::{Advice, Cause, Role};

/// `TCP_TIMEWAIT_LEN`, seconds.
const TIME_WAIT_S: f64 = 60.0;
/// Advice that is given.
const GIVEN: usize = 20;
/// It needs so many connections,
const MIN_CLOSES: u64 = 10;
/// and this part of all connections, or of TIME_WAIT; in percent.
const MIN_PERCENT: u64 = 5;
/// Connections that carry more requests than this are no longer worth a word.
const WELL_REUSED: u64 = 100;
/// Requests a second (of all clients of one advice) below which a kept connection would time out in between: the shortest
/// keep-alive time-outs that are common are 5 s.
const MIN_REQUESTS_PER_S: f64 = 0.2;

/// What is left of TIME_WAIT is said if it is at most this part of what there is now.
const WORTH_A_WORD: f64 = 0.95;

/// A group, and what was counted in the window.
pub(super) struct Seen<'a> {
    pub(super) key: &'a Key,
    pub(super) stats: Box<Stats>,
    pub(super) windows: &'a Windows<Box<Stats>>,
}

/// Who could change something.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Party<'a> {
    /// On this host.
    Here(&'a Program),
    /// At the other end; servers by their port as well.
    There(IpAddr, Option<u16>),
}

/// The server of a connection, as one of its ends knows it.
type Server<'a> = (bool, Option<&'a Program>, Option<IpAddr>, Option<u16>);

/// What one party does for one reason.
#[derive(Default)]
struct Draft<'a> {
    closes: u64,
    /// TIME_WAIT on this host.
    time_wait: u64,
    http: u64,
    requests: u64,
    requests_of_each: Requests,
    pids: Pids,
    groups: HashSet<usize>,
    servers: HashSet<Server<'a>>,
    ports: HashSet<Option<u16>>,
}

/// Advice on what was seen in a window of so many seconds. `max`: the kernel's limit of TIME_WAIT sockets.
pub(super) fn from(seen: &[Seen<'_>], total: Count, window_s: f64, max: Option<u64>) -> Vec<Advice> {
    let connections = total.closes.saturating_sub(total.pairs);
    let mut drafts: HashMap<(Party<'_>, Cause, Role), Draft<'_>> = HashMap::new();
    for (at, group) in seen.iter().enumerate() {
        let Some((party, at_fault)) = party(group.key) else { continue };
        // Most of them are counted at the other end; the rest may be no more than what the matching missed.
        if group.stats.mirrored * 2 > group.stats.closes {
            continue;
        }
        drafts.entry((party, group.key.cause, at_fault)).or_default().add(at, group);
    }
    let mut drafts: Vec<_> = drafts
        .into_iter()
        .filter(|(_, draft)| {
            let part = |of: u64, all: u64| of > 0 && of * 100 >= all * MIN_PERCENT;
            draft.closes >= MIN_CLOSES
                && (part(draft.closes, connections) || part(draft.time_wait, total.time_wait))
                && draft.requests_of_each.at(50).is_none_or(|median| median < WELL_REUSED)
        })
        .collect();
    drafts.sort_by(|(one, a), (other, b)| {
        (Reverse(a.time_wait), Reverse(a.closes))
            .cmp(&(Reverse(b.time_wait), Reverse(b.closes)))
            .then_with(|| (&one.0, one.1, one.2 as u8).cmp(&(&other.0, other.1, other.2 as u8)))
    });
    drafts.truncate(GIVEN);
    drafts
        .into_iter()
        .map(|((party, cause, at_fault), draft)| {
            let reuse = Reuse::of_others(seen, &draft);
            let estimate = Estimate {
                made_per_s: per_second(total.time_wait, window_s),
                by_them_per_s: per_second(draft.time_wait, window_s),
                requests_per_s: draft.requests_per_s(window_s),
                reuse,
                max,
            };
            let after = draft.is_estimable(cause, &estimate).then(|| estimate.after());
            let (program, address) = match party {
                Party::Here(program) => (Some(program), None),
                Party::There(address, _) => (None, Some(address)),
            };
            let mut advice = Advice {
                cause,
                at_fault,
                comm: program.map(|program| program.comm.clone()),
                pids: if program.is_some() { draft.pids.list() } else { Vec::new() },
                more_pids: program.is_some() && draft.pids.more,
                address,
                port: match draft.ports.iter().next() {
                    Some(port) if draft.ports.len() == 1 => *port,
                    _ => None,
                },
                closes: draft.closes,
                of_closes: connections,
                requests_p50: draft.requests_of_each.at(50),
                requests_mean: draft.requests_mean(),
                time_wait_per_s: estimate.by_them_per_s,
                time_wait_expected: estimate.expected(),
                time_wait_after: after,
                reuse: if after.is_some() && cause != Cause::Unused {
                    reuse.map(Reuse::requests_per_connection)
                } else {
                    None
                },
                text: String::new(),
            };
            advice.text = sentence(&advice);
            advice
        })
        .collect()
}

/// Who could change why these connections closed.
fn party(key: &Key) -> Option<(Party<'_>, Role)> {
    let at_fault = key.at_fault?;
    let party = match (key.role, at_fault) {
        (Role::Unknown, _) | (_, Role::Unknown) => return None,
        // A process that is not known cannot be named.
        (role, fault) if role == fault => Party::Here(key.process.as_ref()?),
        (_, Role::Server) => Party::There(key.peer?, key.port),
        (_, Role::Client) => Party::There(key.peer?, None),
    };
    Some((party, at_fault))
}

fn server(key: &Key) -> Option<Server<'_>> {
    match key.role {
        Role::Server => Some((true, key.process.as_ref(), None, key.port)),
        Role::Client => Some((false, None, Some(key.peer?), key.port)),
        Role::Unknown => None,
    }
}

impl<'a> Draft<'a> {
    fn add(&mut self, at: usize, Seen { key, stats, .. }: &Seen<'a>) {
        let counted_here = stats.closes - stats.mirrored;
        self.closes += counted_here;
        // The rest goes with the other end.
        self.time_wait += stats.time_wait_here() * counted_here / stats.closes;
        self.http += stats.http;
        self.requests += stats.requests;
        self.requests_of_each.merge(&stats.requests_of_each);
        self.pids.merge(&stats.pids);
        self.groups.insert(at);
        self.servers.extend(server(key));
        self.ports.insert(key.port);
    }

    /// Connections whose beginning was not seen are taken to have as many as the others.
    fn requests_per_s(&self, window_s: f64) -> f64 {
        per_second(self.closes, window_s) * self.requests_mean().unwrap_or(0.0)
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    fn requests_mean(&self) -> Option<f64> {
        (self.http > 0).then(|| self.requests as f64 / self.http as f64)
    }

    /// Whether it follows from what was seen what TIME_WAIT would be.
    fn is_estimable(&self, cause: Cause, estimate: &Estimate) -> bool {
        let one_request_each = self.requests_of_each.at(50).is_some_and(|median| median <= 1);
        self.time_wait > 0
            && match cause {
                // What carries nothing is not needed.
                Cause::Unused => true,
                // They are reused as it is, or do not close for want of it: how much more they would be is open.
                Cause::IdleTimeout => false,
                _ => one_request_each && estimate.requests_per_s >= MIN_REQUESTS_PER_S,
            }
    }
}

/// How connections are reused that do not have the fault.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reuse {
    connections: f64,
    requests: f64,
    /// TIME_WAIT that they left on this host.
    time_wait: f64,
}

impl Reuse {
    /// That of the other groups of the same servers with two requests per connection or more, in the mean.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    fn of_others(seen: &[Seen<'_>], draft: &Draft<'_>) -> Option<Self> {
        let mut sum = Self { connections: 0.0, requests: 0.0, time_wait: 0.0 };
        for (at, Seen { key, stats, .. }) in seen.iter().enumerate() {
            if !draft.groups.contains(&at)
                && server(key).is_some_and(|server| draft.servers.contains(&server))
                && stats.http > 0
                && stats.requests >= 2 * stats.http
            {
                sum.connections += stats.http as f64;
                sum.requests += stats.requests as f64;
                // Of the connections whose requests are known.
                sum.time_wait += stats.time_wait_here() as f64 * (stats.http as f64 / stats.closes as f64);
            }
        }
        (sum.connections > 0.0).then_some(sum)
    }

    fn requests_per_connection(self) -> f64 {
        self.requests / self.connections
    }
}

/// What the estimate rests on.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    /// TIME_WAIT made on this host, a second.
    made_per_s: f64,
    /// Of them, by those at fault.
    by_them_per_s: f64,
    /// Their requests a second.
    requests_per_s: f64,
    reuse: Option<Reuse>,
    max: Option<u64>,
}

impl Estimate {
    /// Sockets in TIME_WAIT, if all goes on as it is.
    fn expected(&self) -> f64 {
        self.of(self.made_per_s)
    }

    /// After the change.
    fn after(&self) -> f64 {
        let still = self.reuse.map_or(0.0, |reuse| self.requests_per_s * reuse.time_wait / reuse.requests);
        self.of(self.made_per_s - self.by_them_per_s + still.min(self.by_them_per_s))
    }

    #[expect(clippy::cast_precision_loss, reason = "a limit of 2^53 is none")]
    fn of(&self, per_s: f64) -> f64 {
        let sockets = per_s.max(0.0) * TIME_WAIT_S;
        self.max.map_or(sockets, |max| sockets.min(max as f64))
    }
}

/// The advice in words.
fn sentence(advice: &Advice) -> String {
    let mut text = format!("{} of {} closes: ", thousands(advice.closes), thousands(advice.of_closes));
    text.push_str(if advice.at_fault == Role::Client { "client" } else { "server" });
    text.push(' ');
    name(&mut text, advice);
    let (does, change) = words(advice);
    // Writing to a string does not fail.
    let _ = write!(text, " {does}");
    if let Some(mean) = advice.requests_mean {
        let _ = write!(text, " ({})", requests(mean));
    }
    let _ = write!(text, ". {change}");
    let from = advice.time_wait_expected;
    match advice.time_wait_after {
        Some(to) if to <= from * WORTH_A_WORD => {
            let _ = write!(
                text,
                "; on this host TIME_WAIT would fall from about {} to about {}",
                thousands(about(from)),
                thousands(about(to))
            );
            match advice.reuse {
                Some(reuse) => {
                    let _ = write!(text, ", at {} as others have", requests(reuse));
                }
                None if advice.cause != Cause::Unused => text.push_str(" if its connections stay open"),
                None => {}
            }
        }
        // Where it is then, nobody here has seen.
        _ if advice.time_wait_per_s == 0.0 => text.push_str("; none of them left TIME_WAIT on this host"),
        _ => {}
    }
    text.push('.');
    text
}

/// `1 request per connection`, `2.5 requests per connection`
fn requests(mean: f64) -> String {
    let digits = if (mean - mean.round()).abs() < 0.05 { 0 } else { 1 };
    let word = if digits == 0 && mean < 1.5 { "request" } else { "requests" };
    format!("{mean:.digits$} {word} per connection")
}

/// `4711/nginx`, `3 pids/nginx`, or an address.
fn name(text: &mut String, advice: &Advice) {
    let port = advice.port.filter(|_| advice.at_fault == Role::Server);
    // Writing to a string does not fail.
    let _ = match (&advice.comm, advice.address) {
        (Some(comm), _) => {
            text.push_str(&who(comm, &advice.pids, advice.more_pids));
            port.map_or(Ok(()), |port| write!(text, " (:{port})"))
        }
        (None, Some(address)) => {
            let _ = match (address, port) {
                (IpAddr::V6(ip), Some(port)) => write!(text, "[{ip}]:{port}"),
                (ip, Some(port)) => write!(text, "{ip}:{port}"),
                (ip, None) => write!(text, "{ip}"),
            };
            // Whoever is behind it is not seen.
            write!(text, " (or a proxy there)")
        }
        (None, None) => Ok(()),
    };
}

/// A process, or several that count as one.
pub(in crate::sink) fn who(comm: &str, pids: &[u32], more: bool) -> String {
    match (pids, more) {
        (_, true) => format!("{}+ pids/{comm}", pids.len()),
        ([pid], false) => format!("{pid}/{comm}"),
        _ => format!("{} pids/{comm}", pids.len()),
    }
}

/// What they do, and what to do about it.
fn words(advice: &Advice) -> (&'static str, &'static str) {
    let reused = advice.requests_p50.is_some_and(|median| median > 1);
    let it = if reused { "Let it make more requests on each connection" } else { "Turn keep-alive on in that client" };
    let client = advice.at_fault == Role::Client;
    match advice.cause {
        Cause::RequestClose => ("sends Connection: close", it),
        Cause::ResponseClose | Cause::Http10 if client => {
            ("speaks HTTP/1.0 without keep-alive", "Let it speak HTTP/1.1 (nginx as a proxy: proxy_http_version 1.1)")
        }
        Cause::ResponseClose if reused => {
            ("answers with Connection: close", "Raise its limit of requests per connection")
        }
        Cause::ResponseClose => ("answers with Connection: close", "Turn keep-alive on in that server"),
        Cause::Http10 => ("answers in HTTP/1.0 without keep-alive", "Let it answer in HTTP/1.1"),
        Cause::IdleTimeout if client => {
            ("closes connections that were idle", "Let it keep more of them, or for longer")
        }
        Cause::IdleTimeout => (
            "closes connections that were idle",
            "Raise its keep-alive time-out; or make that of its clients the shorter one, so that they close first",
        ),
        Cause::NoReuse if client => {
            ("closes after the response, though nobody asked", "Use one client with a pool of connections in it")
        }
        Cause::NoReuse => ("closes after the response, though nobody asked", "Turn keep-alive on in that server"),
        // Unused: nobody is at fault for any other cause.
        _ => (
            "opens connections and sends nothing",
            "Health check, port scan, or a pool that opens too much: let it ask less often",
        ),
    }
}

/// Two digits are as much as an estimate is worth.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sockets: not negative, not many")]
fn about(sockets: f64) -> u64 {
    let mut unit = 1.0;
    while sockets / unit >= 99.5 {
        unit *= 10.0;
    }
    ((sockets / unit).round() * unit) as u64
}

/// `1204567` as `1,204,567`
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 50 requests a second, half of them on connections of their own; the other half on connections of ten.
    const CLASSIC: Estimate = Estimate {
        made_per_s: 27.5,
        by_them_per_s: 25.0,
        requests_per_s: 25.0,
        reuse: Some(Reuse { connections: 150.0, requests: 1500.0, time_wait: 150.0 }),
        max: None,
    };

    fn near(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-9
    }

    #[test]
    fn time_wait_is_what_is_made_in_sixty_seconds() {
        assert!(near(CLASSIC.expected(), 1650.0));
        // 2.5 a second by the others, and as many by those that are mended.
        assert!(near(CLASSIC.after(), 300.0));
    }

    #[test]
    fn without_reuse_seen_only_the_others_remain() {
        let estimate = Estimate { reuse: None, ..CLASSIC };
        assert!(near(estimate.after(), 150.0));
    }

    #[test]
    fn reused_connections_that_the_other_end_closes_leave_nothing_here() {
        let reuse = Reuse { connections: 150.0, requests: 1500.0, time_wait: 0.0 };
        assert!(near(Estimate { reuse: Some(reuse), ..CLASSIC }.after(), 150.0));
    }

    #[test]
    fn it_never_gets_worse_and_never_negative() {
        // Those who reuse leave TIME_WAIT here, those at fault do so half the time.
        let reuse = Reuse { connections: 10.0, requests: 20.0, time_wait: 10.0 };
        let estimate = Estimate { by_them_per_s: 5.0, requests_per_s: 25.0, reuse: Some(reuse), ..CLASSIC };
        assert!(near(estimate.after(), estimate.expected()));
        let estimate = Estimate { made_per_s: 1.0, by_them_per_s: 1.1, reuse: None, ..CLASSIC };
        assert!(near(estimate.after(), 0.0));
    }

    #[test]
    fn the_kernel_allows_only_so_many() {
        let estimate = Estimate { max: Some(200), ..CLASSIC };
        assert!(near(estimate.expected(), 200.0) && near(estimate.after(), 200.0));
        assert!(near(Estimate { max: Some(1_000), ..CLASSIC }.expected(), 1_000.0));
    }

    #[test]
    fn numbers_in_words() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_204_567, "1,204,567")] {
            assert_eq!(thousands(number), text);
        }
        for (mean, text) in [(1.0, "1 request"), (1.04, "1 request"), (1.06, "1.1 requests"), (99.96, "100 requests")] {
            assert_eq!(requests(mean), format!("{text} per connection"));
        }
        for (sockets, rounded) in [(0.4, 0), (1.5, 2), (99.0, 99), (99.6, 100), (304.0, 300), (2_951.0, 3_000)] {
            assert_eq!(about(sockets), rounded, "{sockets}");
        }
    }
}
