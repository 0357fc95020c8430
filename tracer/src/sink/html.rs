//! Events in, one HTML page out: to be attached to an incident, and read years later without anything beside it.
//!
//! Everything that grows with the recording is bounded: time in so many buckets, whose width doubles; so many
//! processes, peers and rows. The page loads nothing, and is complete without its few lines of script, which only search.
//! All that came from the network or from a process is escaped as for a terminal, and then for HTML; should that ever fail,
//! the page's own policy forbids every script but that one.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt::{self, Display, Write as _};
use std::hash::Hash;

use clap::ValueEnum as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::escape::fit;
use super::summary::who;
use super::text::{cause_word, closed_by_word, elapsed, fate_word};
use crate::event::{
    Alert, AlertState, Cause, Close, Event, Final, FinalSource, Group, Http, Lost, Metric, Process, Role, Start,
    Summary, TcpState,
};
use crate::verdict;

/// Rows of the table of connections, and bytes in them.
const ROWS: usize = 10_000;
const ROW_BYTES: usize = 4_000_000;
/// Rows that a browser lays out at once. All of them would take it seconds; tables that are out of sight it leaves for later.
const PART: usize = 200;
const PART_END: &str = "</table></div>\n";
/// The parts are to look like one table. "Why" and "Request" take what is left.
const COLUMN_WIDTHS: &str = "<colgroup><col style=width:15em><col style=width:10.5em><col style=width:16em>\
    <col style=width:5.2em><col style=width:6.4em><col style=width:9em><col><col><col style=width:5.5em></colgroup>\n";
/// Buckets of time.
const BUCKETS: usize = 120;
/// Processes and peers that are counted one by one; and that are listed.
const COUNTED: usize = 10_000;
const LISTED: usize = 15;
/// Connections in each of the lists of the slowest and the longest.
const RANKED: usize = 10;
/// Sockets in CLOSE_WAIT that are listed.
const STUCK: usize = 50;
/// Columns that any foreign text may take, as for a terminal.
const COLUMNS: usize = 80;
/// Causes with a colour of their own; the others share the last one.
const COLOURS: usize = 7;

/// Something for each cause, by its discriminant.
type ByCause = [u64; Cause::COUNT];

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// SHA-256 of [`SCRIPT`], for the policy.
const SCRIPT_HASH: &str = "bcsV9WWqA4NaR+vLzRcUv1A1zoAOV+cm9VNS74VFXt8=";

/// Collects what the page shows.
#[derive(Debug)]
pub struct Page {
    zone: TimeZone,
    start: Option<Start>,
    lost: Vec<Lost>,
    alerts: Vec<Alert>,
    /// Time-ordered, as far as the recording is.
    timeline: Timeline,
    total: Tally,
    /// Name and cgroup.
    processes: Counter<Option<(String, Option<String>)>>,
    peers: Counter<std::net::IpAddr>,
    slowest: Ranking,
    longest: Ranking,
    stuck: Vec<String>,
    rows: String,
    shown: usize,
}

/// Closes, by cause.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    closes: ByCause,
    time_wait: ByCause,
}

impl Tally {
    fn add(&mut self, close: &Close) {
        let at = close.cause as usize;
        self.closes[at] += 1;
        self.time_wait[at] += u64::from(close.fate == Some(Final::TimeWait));
    }

    fn merge(&mut self, other: &Self) {
        add(&mut self.closes, &other.closes);
        add(&mut self.time_wait, &other.time_wait);
    }
}

/// Closes over time, in buckets of equal width from the first event on.
#[derive(Debug)]
struct Timeline {
    /// Seconds since the epoch, of the first bucket.
    begin: Option<i64>,
    /// Seconds.
    width: i64,
    buckets: Vec<Tally>,
}

impl Timeline {
    fn begin_at(&mut self, time: Timestamp) -> i64 {
        *self.begin.get_or_insert(time.as_second())
    }

    fn add(&mut self, close: &Close) {
        let at = self.reach(close.time);
        self.buckets[at].add(close);
    }

    /// The bucket of a time, which is there from then on. What lies before the beginning belongs to the first one: a clock
    /// was set back.
    fn reach(&mut self, time: Timestamp) -> usize {
        let after = time.as_second().saturating_sub(self.begin_at(time)).max(0);
        while after / self.width >= BUCKETS as i64 {
            self.width *= 2;
            self.buckets = self
                .buckets
                .chunks(2)
                .map(|pair| {
                    let mut both = pair[0];
                    pair.iter().skip(1).for_each(|second| both.merge(second));
                    both
                })
                .collect();
        }
        let at = usize::try_from(after / self.width).unwrap_or(0);
        if self.buckets.len() <= at {
            self.buckets.resize(at + 1, Tally::default());
        }
        at
    }
}

/// Closes by something; what comes once there are too many is only counted together.
#[derive(Debug)]
struct Counter<K> {
    counts: HashMap<K, Tally>,
    others: u64,
}

impl<K: Eq + Hash + Ord> Counter<K> {
    fn new() -> Self {
        Self { counts: HashMap::new(), others: 0 }
    }

    fn add(&mut self, key: K, close: &Close) {
        if self.counts.len() >= COUNTED && !self.counts.contains_key(&key) {
            self.give_up_the_smaller_half();
        }
        self.counts.entry(key).or_default().add(close);
    }

    /// So that one that comes late finds room.
    fn give_up_the_smaller_half(&mut self) {
        let mut sizes: Vec<u64> = self.counts.values().map(|tally| sum(&tally.closes)).collect();
        sizes.sort_unstable();
        let least = sizes.get(sizes.len() / 2).copied().unwrap_or(0);
        let mut room = COUNTED / 2;
        self.counts.retain(|_, tally| {
            let closes = sum(&tally.closes);
            let kept = closes >= least && room > 0;
            room -= usize::from(kept);
            self.others += if kept { 0 } else { closes };
            kept
        });
    }

    /// The largest, and the closes of all others.
    fn largest(&self) -> (Vec<(&K, &Tally)>, u64) {
        let mut all: Vec<_> = self.counts.iter().collect();
        all.sort_by_key(|(key, tally)| (Reverse(sum(&tally.closes)), *key));
        let rest = all.iter().skip(LISTED).map(|(_, tally)| sum(&tally.closes)).sum::<u64>() + self.others;
        all.truncate(LISTED);
        (all, rest)
    }
}

/// The connections with the largest value; of equal ones the first.
#[derive(Debug, Default)]
struct Ranking {
    heap: BinaryHeap<Reverse<(u64, Reverse<u64>, String)>>,
    seen: u64,
}

impl Ranking {
    fn add(&mut self, value: u64, row: impl FnOnce() -> String) {
        self.seen += 1;
        if self.heap.len() == RANKED {
            if self.heap.peek().is_some_and(|Reverse((least, ..))| *least >= value) {
                return;
            }
            self.heap.pop();
        }
        self.heap.push(Reverse((value, Reverse(self.seen), row())));
    }

    fn largest_first(self) -> impl Iterator<Item = String> {
        self.heap.into_sorted_vec().into_iter().map(|Reverse((.., row))| row)
    }
}

/// Foreign text: escaped as for a terminal, cut, and escaped for HTML, in text as in attributes.
struct Foreign<'a>(&'a str);

impl Display for Foreign<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut plain = String::new();
        fit(&mut plain, self.0, COLUMNS);
        for c in plain.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// A process, which may be unknown.
struct Named<'a>(Option<(u32, &'a str)>);

impl<'a> Named<'a> {
    fn of(process: Option<&'a Process>) -> Self {
        Self(process.map(|process| (process.pid, process.comm.as_str())))
    }
}

impl Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((pid, comm)) => write!(f, "{pid}/{}", Foreign(comm)),
            None => f.write_str("<span class=dim>unknown</span>"),
        }
    }
}

/// `GET /path 200`
struct Request<'a>(Option<&'a Http>);

impl Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(http) = self.0 else { return Ok(()) };
        let Some((method, target)) = http.method.as_deref().zip(http.target.as_deref()) else { return Ok(()) };
        let more = if http.target_truncated { "…" } else { "" };
        write!(f, "{} {}{more}", Foreign(method), Foreign(target))?;
        match http.status {
            Some(status) => write!(f, " {status}"),
            None => f.write_str(" -"),
        }
    }
}

/// `1,234,567`
struct Number(u64);

impl Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                f.write_char(',')?;
            }
            f.write_char(digit)?;
        }
        Ok(())
    }
}

fn sum(by_cause: &ByCause) -> u64 {
    by_cause.iter().sum()
}

fn add(to: &mut ByCause, more: &ByCause) {
    to.iter_mut().zip(more).for_each(|(to, more)| *to += more);
}

/// The cause that has this place.
fn cause_at(at: usize) -> Cause {
    Cause::value_variants()[at]
}

/// What a cause means, and what there is to be done about it: the README's table.
const fn meaning(cause: Cause) -> (&'static str, &'static str) {
    match cause {
        Cause::RequestClose => {
            ("the client asked: Connection: close on the request", "mend the client: let it keep connections")
        }
        Cause::ResponseClose => (
            "the server decided: Connection: close on the response",
            "mend the server: keep-alive off, or a limit of requests per connection",
        ),
        Cause::Http10 => {
            ("HTTP/1.0 without keep-alive on both sides", "raise the version (nginx: proxy_http_version 1.1)")
        }
        Cause::IdleTimeout => (
            "a persistent connection closed after a time without payload",
            "make the client's idle time-out shorter than the server's",
        ),
        Cause::NoReuse => (
            "a persistent connection closed at once after an exchange",
            "use one client with a pool, not one for each request",
        ),
        Cause::ResetByLocal => {
            ("this end sent a RST: unread data, SO_LINGER 0, an abort", "look at this side: it reset")
        }
        Cause::ResetByPeer => ("the peer sent a RST: unread data, SO_LINGER 0, an abort", "look at the peer: it reset"),
        Cause::Timeout => (
            "retransmissions, keep-alive probes or the user time-out gave up",
            "look at the network, or at the peer's host",
        ),
        Cause::ProcessExit => {
            ("a process ended with the connection open", "look for a crash, a kill, or no graceful shutdown")
        }
        Cause::Unanswered => ("the last request got no response", "look at the server: overload, time-out, crash"),
        Cause::Truncated => (
            "the response's announced body did not end",
            "look at who closed: the server cut it short, or the client left",
        ),
        Cause::Unused => ("no payload at all", "health checks, port scans, pools that open too much"),
        Cause::Tls => ("opaque here: TLS", "who closed and TIME_WAIT still hold"),
        Cause::H2 => ("HTTP/2, whose streams are not followed", "who closed and TIME_WAIT still hold"),
        Cause::Upgraded => ("after a 101", "who closed and TIME_WAIT still hold"),
        Cause::NotHttp => ("another protocol", "who closed and TIME_WAIT still hold"),
        Cause::Unknown => ("something that is needed was not seen", ""),
    }
}

/// From the first FIN to the socket's end, microseconds: how long closing took.
fn closing_us(close: &Close) -> Option<u64> {
    let first = close.states.iter().find(|at| matches!(at.state, TcpState::FinWait1 | TcpState::CloseWait))?;
    let last = close.states.last()?;
    u64::try_from(last.at_us.saturating_sub(first.at_us)).ok()
}

impl Page {
    /// A page with times of `zone`.
    pub fn new(zone: TimeZone) -> Self {
        Self {
            zone,
            start: None,
            lost: Vec::new(),
            alerts: Vec::new(),
            timeline: Timeline { begin: None, width: 1, buckets: Vec::new() },
            total: Tally::default(),
            processes: Counter::new(),
            peers: Counter::new(),
            slowest: Ranking::default(),
            longest: Ranking::default(),
            stuck: Vec::new(),
            rows: String::new(),
            shown: 0,
        }
    }

    /// Takes one event. Transitions are not shown one by one.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Start(start) => {
                self.timeline.begin_at(start.time);
                self.start.get_or_insert_with(|| start.clone());
            }
            Event::Close(close) => self.close(close),
            Event::CloseWait(open) => {
                if self.stuck.len() < STUCK {
                    self.stuck.push(self.stuck_row(open));
                }
            }
            Event::Lost(lost) => {
                if self.lost.len() < LISTED {
                    self.lost.push(lost.clone());
                }
            }
            Event::Alert(alert) => {
                if self.alerts.len() < LISTED {
                    self.alerts.push(Alert::clone(alert));
                }
            }
            Event::State(_) | Event::Summary(_) => {}
        }
    }

    fn close(&mut self, close: &Close) {
        self.timeline.add(close);
        self.total.add(close);
        // Processes of one name in one cgroup are one, as in the summary.
        let program = |process: &Process| (process.comm.clone(), process.cgroup.clone());
        self.processes.add(close.process.as_deref().map(program), close);
        self.peers.add(close.remote.ip(), close);
        if let Some(us) = closing_us(close) {
            self.slowest.add(us, || ranked_row(&self.zone, us, close));
        }
        self.longest.add(close.duration_us, || ranked_row(&self.zone, close.duration_us, close));
        if self.shown < ROWS && self.rows.len() < ROW_BYTES {
            if self.shown.is_multiple_of(PART) {
                self.rows.push_str(if self.shown > 0 { PART_END } else { "" });
                self.rows.push_str("<div class=part><table>");
                self.rows.push_str(COLUMN_WIDTHS);
            }
            self.shown += 1;
            self.row(close);
        }
    }

    /// One connection. Writing to a string does not fail. End tags that HTML does not need are left out.
    fn row(&mut self, close: &Close) {
        let fate = close.fate.unwrap_or(Final::Unknown);
        let inferred = close.fate_source == Some(FinalSource::Inferred) && fate != Final::Unknown;
        let advice = verdict::advice(close);
        let _ =
            write!(self.rows, "<tr><td>{}<td>{}", Time(close.time, &self.zone), Named::of(close.process.as_deref()),);
        if let Some(closer) = &close.closer {
            let _ = write!(self.rows, ", closed by {}", Named::of(Some(closer)));
        }
        let _ = writeln!(
            self.rows,
            "<td>{}<td>{}<td>{}{}<td>{}<td>{}<td>{}<td class=n>{}",
            Socket(close),
            closed_by_word(close.closed_by),
            fate_word(fate),
            if inferred { "?" } else { "" },
            cause_word(close.cause),
            Foreign(advice.as_deref().unwrap_or("")),
            Request(close.http.as_ref()),
            elapsed(close.duration_us),
        );
    }

    fn stuck_row(&self, open: &Close) -> String {
        let since_us = open.states.last().map_or(0, |last| last.at_us.try_into().unwrap_or(0));
        format!(
            "<tr><td class=t>{}<td>{}<td>{}<td class=n>{}<td>{}\n",
            Time(open.time, &self.zone),
            Named::of(open.process.as_deref()),
            Socket(open),
            elapsed(open.duration_us.saturating_sub(since_us)),
            Request(open.http.as_ref()),
        )
    }

    /// The page. `trouble`: why the recording could not be read to its end.
    pub fn finish(mut self, summary: &Summary, trouble: Option<&str>) -> String {
        // A time in which nothing closed is a part of the picture.
        self.timeline.reach(summary.time);
        let mut out = String::with_capacity(self.rows.len() + (1 << 20));
        // Writing to a string does not fail.
        let _ = self.write(&mut out, summary, trouble);
        out
    }

    fn write(self, out: &mut String, summary: &Summary, trouble: Option<&str>) -> fmt::Result {
        let host = self.start.as_ref().map_or("an unknown host", |start| &start.host);
        write!(
            out,
            "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n\
             <meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; \
             script-src 'sha256-{SCRIPT_HASH}'; base-uri 'none'; form-action 'none'\">\n\
             <meta name=viewport content=\"width=device-width,initial-scale=1\">\n\
             <title>TCP closes on {}</title>\n<style>\n{STYLE}</style>\n",
            Foreign(host),
        )?;
        self.head(out, host, summary)?;
        self.notes(out, summary, trouble)?;
        self.tiles(out, summary)?;
        advice(out, summary)?;
        self.causes(out, summary)?;
        self.charts(out)?;
        let Self { processes, peers, slowest, longest, stuck, rows, shown, .. } = self;
        out.push_str("<div class=two>\n<section>\n<h2>Top processes</h2>\n");
        counted(out, "Process", &processes, |out, process| match process {
            Some((comm, Some(cgroup))) => write!(out, "{} <span class=dim>{}</span>", Foreign(comm), Foreign(cgroup)),
            Some((comm, None)) => write!(out, "{}", Foreign(comm)),
            None => write!(out, "{}", Named(None)),
        })?;
        out.push_str("</section>\n<section>\n<h2>Top peers</h2>\n");
        counted(out, "Peer", &peers, |out, peer| write!(out, "{peer}"))?;
        out.push_str("</section>\n</div>\n");
        ranked(out, "Slowest to close", "From the first FIN to the end of the socket.", "Closing took", slowest)?;
        ranked(out, "Open for longest", "From ESTABLISHED, or from first sight, to the end.", "Open for", longest)?;
        if !stuck.is_empty() {
            out.push_str("<h2>Stuck in CLOSE_WAIT</h2>\n<p class=dim>The peer has closed, the process has not.");
            if (stuck.len() as u64) < summary.close_wait {
                write!(out, " The first {} of {}.", stuck.len(), Number(summary.close_wait))?;
            }
            out.push_str(
                "</p>\n<div class=wide><table><tr><th>Time<th>Process<th>Socket<th class=n>Since<th>Request\n",
            );
            stuck.iter().for_each(|row| out.push_str(row));
            out.push_str("</table></div>\n");
        }
        out.push_str("<h2>Connections</h2>\n");
        if summary.closes > shown as u64 {
            writeln!(
                out,
                "<p class=dim>The first {} of {}; all are in the figures above. For the others: <code>tracer report</code> \
                 with a filter, such as <code>--cause</code>, <code>--peer</code> or <code>--comm</code>.</p>",
                Number(shown as u64),
                Number(summary.closes),
            )?;
        }
        out.push_str(
            "<input id=q type=search placeholder=\"Search: words that a row must hold\" aria-label=\"Search the table\" \
             hidden><span id=n class=dim role=status></span>\n<div class=wide id=all>\n<table>",
        );
        out.push_str(COLUMN_WIDTHS);
        out.push_str(
            "<tr><th>Time<th>Process<th>Socket<th>Closed<th>Final<th>Cause<th>Why<th>Request<th class=n>Open for</table>\n",
        );
        out.push_str(&rows);
        if shown > 0 {
            out.push_str(PART_END);
        }
        write!(out, "</div>\n<script>{SCRIPT}</script>\n</html>\n")
    }

    fn head(&self, out: &mut String, host: &str, summary: &Summary) -> fmt::Result {
        let zone = self.zone.to_offset(summary.time);
        writeln!(out, "<h1>TCP closes on {}</h1>", Foreign(host))?;
        out.push_str("<p class=dim>");
        if let Some(start) = &self.start {
            write!(out, "{} to ", Time(start.time, &self.zone))?;
        }
        write!(out, "{} (UTC{zone}), {:.1} s", Time(summary.time, &self.zone), summary.duration_s)?;
        if let Some(start) = &self.start {
            write!(out, "; Linux {}; tracer {}", Foreign(&start.kernel), Foreign(&start.version))?;
            if !start.filters.is_empty() {
                out.push_str("; only ");
                for filter in start.filters.iter().take(LISTED) {
                    write!(out, "<code>{}</code> ", Foreign(filter))?;
                }
            }
        }
        out.push_str("</p>\n");
        Ok(())
    }

    /// What must be known before any figure is believed.
    fn notes(&self, out: &mut String, summary: &Summary, trouble: Option<&str>) -> fmt::Result {
        if let Some(trouble) = trouble {
            writeln!(out, "<p class=note><b>Incomplete.</b> {}</p>", Long(trouble))?;
        }
        if summary.lost > 0 {
            write!(
                out,
                "<p class=note><b>Records lost: {}.</b> Up to as many closes are missing.",
                Number(summary.lost)
            )?;
            for lost in &self.lost {
                let (since, time) = (Time(lost.since, &self.zone), Time(lost.time, &self.zone));
                write!(out, "<br>{} from {since} to {time}", Number(lost.records))?;
            }
            out.push_str("</p>\n");
        }
        if summary.untracked > 0 {
            writeln!(
                out,
                "<p class=note><b>Could not be followed</b> for want of kernel memory, and are missing: {} sockets.</p>",
                Number(summary.untracked)
            )?;
        }
        for alert in &self.alerts {
            let (what, unit) = match alert.metric {
                Metric::TimeWait => ("sockets in TIME_WAIT", ""),
                Metric::Rate => ("TIME_WAIT made", " a second"),
            };
            let became = match alert.state {
                AlertState::Raised => "Alert",
                AlertState::Cleared => "Alert over",
            };
            let (time, value, limit) = (Time(alert.time, &self.zone), alert.value, alert.limit);
            writeln!(out, "<p class=note><b>{became}</b> {time}: {value:.1} {what}{unit}, the limit is {limit}.</p>")?;
        }
        for missing in self.start.iter().flat_map(|start| &start.degraded).take(LISTED) {
            writeln!(out, "<p class=note>{}</p>", Long(missing))?;
        }
        Ok(())
    }

    fn tiles(&self, out: &mut String, summary: &Summary) -> fmt::Result {
        out.push_str("<div class=tiles>\n");
        let mut tile = |value: u64, alarm: bool, what: &str| {
            let class = if alarm && value > 0 { " class=alarm" } else { "" };
            writeln!(out, "<div><b{class}>{}</b>{what}</div>", Number(value))
        };
        tile(summary.closes, false, "closed")?;
        tile(summary.time_wait, false, "left TIME_WAIT here")?;
        if let Some(before) = self.start.as_ref().and_then(|start| start.time_wait) {
            tile(before, false, "in TIME_WAIT at the start")?;
        }
        tile(summary.close_wait, true, "stuck in CLOSE_WAIT")?;
        tile(summary.lost, true, "records lost")?;
        out.push_str("</div>\n");
        Ok(())
    }

    /// One line for each cause, with what there is to be done.
    fn causes(&self, out: &mut String, summary: &Summary) -> fmt::Result {
        let ranks = ranks(&self.total);
        if ranks.is_empty() {
            out.push_str("<p>No connection closed.</p>\n");
            return Ok(());
        }
        out.push_str(
            "<h2>Why they closed</h2>\n<div class=wide><table><tr><th>Cause<th class=n>Closes\
             <th class=n>TIME_WAIT<th>It means<th>What to do<th>Largest group\n",
        );
        for (rank, at) in ranks.iter().enumerate() {
            let cause = cause_at(*at);
            let (means, to_do) = meaning(cause);
            write!(
                out,
                "<tr><td class=t>{}{}<td class=n>{}<td class=n>{}<td>{means}<td>{to_do}<td>",
                Key(rank),
                cause_word(cause),
                Number(self.total.closes[*at]),
                Number(self.total.time_wait[*at]),
            )?;
            // Groups are the largest first.
            if let Some(group) = summary.groups.iter().find(|group| group.cause == cause) {
                let Group { comm, pids, more_pids, closed_by, peer, closes, .. } = group;
                let process = comm.as_ref().map_or_else(|| "unknown".to_owned(), |comm| who(comm, pids, *more_pids));
                let peer = peer.map_or_else(|| "many".to_owned(), |peer| peer.to_string());
                let first = match closed_by {
                    crate::event::ClosedBy::Local => ", this end first",
                    crate::event::ClosedBy::Remote => ", the peer first",
                    crate::event::ClosedBy::Both => ", both at once",
                    crate::event::ClosedBy::None | crate::event::ClosedBy::Unobserved => "",
                };
                write!(out, "{} with {peer}{first}: {}", Foreign(&process), Number(*closes))?;
            }
            out.push('\n');
        }
        out.push_str("</table></div>\n");
        Ok(())
    }

    fn charts(&self, out: &mut String) -> fmt::Result {
        let ranks = ranks(&self.total);
        let Some(begin) = self.timeline.begin.filter(|_| !ranks.is_empty()) else { return Ok(()) };
        out.push_str("<h2>Over time</h2>\n<p class=legend>");
        for (rank, at) in ranks.iter().take(COLOURS).enumerate() {
            write!(out, "<span>{}{}</span>", Key(rank), cause_word(cause_at(*at)))?;
        }
        if ranks.len() > COLOURS {
            write!(out, "<span>{}other</span>", Key(COLOURS))?;
        }
        out.push_str("</p>\n");
        let chart = Chart { begin, width: self.timeline.width, ranks: &ranks, zone: &self.zone };
        let closes: Vec<_> = self.timeline.buckets.iter().map(|bucket| &bucket.closes).collect();
        chart.draw(out, "Closes", &closes)?;
        let time_wait: Vec<_> = self.timeline.buckets.iter().map(|bucket| &bucket.time_wait).collect();
        if time_wait.iter().any(|bucket| sum(bucket) > 0) {
            chart.draw(out, "Closes that left TIME_WAIT here", &time_wait)?;
        }
        Ok(())
    }
}

/// Who can change what: it is read first.
fn advice(out: &mut String, summary: &Summary) -> fmt::Result {
    if summary.advice.is_empty() {
        return Ok(());
    }
    out.push_str("<h2>Who can change what</h2>\n<ul class=advice>\n");
    for advice in &summary.advice {
        writeln!(out, "<li>{}", Long(&advice.text))?;
    }
    out.push_str("</ul>\n");
    Ok(())
}

/// The places of the causes that there are, most closes first.
fn ranks(total: &Tally) -> Vec<usize> {
    let mut ranks: Vec<usize> = (0..Cause::COUNT).filter(|at| total.closes[*at] > 0).collect();
    ranks.sort_by_key(|at| (Reverse(total.closes[*at]), *at));
    ranks
}

/// The colour of a cause.
struct Key(usize);

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<i class=\"key f{}\"></i>", self.0.min(COLOURS))
    }
}

/// Bars over time, each stacked by cause, the most frequent at the bottom.
struct Chart<'a> {
    begin: i64,
    width: i64,
    ranks: &'a [usize],
    zone: &'a TimeZone,
}

impl Chart<'_> {
    const LEFT: usize = 62;
    const TOP: usize = 8;
    const PLOT: (usize, usize) = (1_000, 150);

    fn draw(&self, out: &mut String, what: &str, buckets: &[&ByCause]) -> fmt::Result {
        let (left, top, (wide, high)) = (Self::LEFT, Self::TOP, Self::PLOT);
        let most = buckets.iter().map(|bucket| sum(bucket)).max().unwrap_or(0).max(1);
        let per = if self.width == 1 { "second".to_owned() } else { format!("{} s", self.width) };
        write!(
            out,
            "<figure><figcaption>{what}, per {per}</figcaption>\n<svg viewBox=\"0 0 {} {}\" role=img aria-label=\"{what}, per \
             {per}; at most {}\">\n",
            left + wide + 8,
            top + high + 22,
            Number(most),
        )?;
        for (share, value) in [(0, most), (1, most / 2), (2, 0)] {
            let y = top + high * share / 2;
            // Half of an odd number would be a wrong label.
            if share != 1 || most.is_multiple_of(2) {
                write!(out, "<text x={} y={} text-anchor=end>{}</text>", left - 6, y + 4, Number(value))?;
            }
            writeln!(out, "<line class=grid x1={left} x2={} y1={y} y2={y} />", left + wide)?;
        }
        // At least so many, so that a short recording has no bars as broad as walls.
        let columns = buckets.len().max(20);
        let x = |at: usize| left as f64 + at as f64 * wide as f64 / columns as f64;
        for (at, bucket) in buckets.iter().enumerate() {
            if sum(bucket) == 0 {
                continue;
            }
            self.bar(out, bucket, (x(at), x(at + 1) - x(at)), most, at)?;
        }
        let marks = [0, columns / 2, columns];
        for (at, anchor) in marks.into_iter().zip(["start", "middle", "end"]) {
            let time = self.clock(at);
            write!(out, "<text x={:.0} y={} text-anchor={anchor}>{time}</text>", x(at), top + high + 17)?;
        }
        out.push_str("\n</svg></figure>\n");
        Ok(())
    }

    fn bar(&self, out: &mut String, bucket: &ByCause, (x, width): (f64, f64), most: u64, at: usize) -> fmt::Result {
        let (top, (_, high)) = (Self::TOP as f64, Self::PLOT);
        let scale = high as f64 / most as f64;
        write!(out, "<g><title>{} to {}: {}", self.clock(at), self.clock(at + 1), Number(sum(bucket)))?;
        for cause in self.ranks.iter().filter(|cause| bucket[**cause] > 0) {
            write!(out, "\n{} {}", Number(bucket[*cause]), cause_word(cause_at(*cause)))?;
        }
        out.push_str("</title>");
        let mut below = 0;
        let mut colour = |out: &mut String, rank: usize, count: u64| {
            let (height, foot) = (count as f64 * scale, below as f64 * scale);
            below += count;
            let y = top + high as f64 - foot - height;
            let inner = (width - 1.0).max(width * 0.8);
            write!(out, "<rect class=f{rank} x={x:.1} y={y:.2} width={inner:.1} height={height:.2} />")
        };
        let mut others = 0;
        for (rank, cause) in self.ranks.iter().enumerate() {
            match bucket[*cause] {
                0 => {}
                count if rank < COLOURS => colour(out, rank, count)?,
                count => others += count,
            }
        }
        if others > 0 {
            colour(out, COLOURS, others)?;
        }
        writeln!(out, "<rect class=hit x={x:.1} y={top} width={width:.1} height={high} /></g>")
    }

    /// The time at which a bucket begins.
    fn clock(&self, at: usize) -> String {
        let second = self.width.saturating_mul(at as i64).saturating_add(self.begin);
        let Ok(time) = Timestamp::from_second(second) else { return String::new() };
        let local = self.zone.to_datetime(time);
        let clock = format!("{:02}:{:02}:{:02}", local.hour(), local.minute(), local.second());
        // From two hours on a recording soon spans midnight.
        if self.width < 60 { clock } else { format!("{} {clock}", local.date()) }
    }
}

/// A local time with its date.
struct Time<'a>(Timestamp, &'a TimeZone);

impl Display for Time<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let local = self.1.to_datetime(self.0);
        let (h, m, s, ms) = (local.hour(), local.minute(), local.second(), local.millisecond());
        write!(f, "{} {h:02}:{m:02}:{s:02}.{ms:03}", local.date())
    }
}

/// `:8080 < 10.0.0.9:43210`, as in the text.
struct Socket<'a>(&'a Close);

impl Display for Socket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrow = match self.0.role {
            Role::Server => "&lt;",
            Role::Client => "&gt;",
            Role::Unknown => "-",
        };
        write!(f, ":{} {arrow} {}", self.0.local.port(), self.0.remote)
    }
}

/// A sentence of tracer's own, which may quote something: escaped, not cut.
struct Long<'a>(&'a str);

impl Display for Long<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Each piece takes at most ten columns for each of its characters.
        let mut rest = self.0;
        while !rest.is_empty() {
            let cut = rest.char_indices().nth(COLUMNS / 10).map_or(rest.len(), |(at, _)| at);
            let (piece, after) = rest.split_at(cut);
            Foreign(piece).fmt(f)?;
            rest = after;
        }
        Ok(())
    }
}

fn ranked_row(zone: &TimeZone, us: u64, close: &Close) -> String {
    format!(
        "<tr><td class=n>{}<td class=t>{}<td>{}<td>{}<td>{}<td>{}<td>{}\n",
        elapsed(us),
        Time(close.time, zone),
        Named::of(close.process.as_deref()),
        Socket(close),
        closed_by_word(close.closed_by),
        cause_word(close.cause),
        Request(close.http.as_ref()),
    )
}

fn ranked(out: &mut String, title: &str, means: &str, column: &str, ranking: Ranking) -> fmt::Result {
    if ranking.heap.is_empty() {
        return Ok(());
    }
    write!(
        out,
        "<h2>{title}</h2>\n<p class=dim>{means}</p>\n<div class=wide><table><tr><th class=n>{column}<th>Time<th>Process\
         <th>Socket<th>Closed<th>Cause<th>Request\n"
    )?;
    ranking.largest_first().for_each(|row| out.push_str(&row));
    out.push_str("</table></div>\n");
    Ok(())
}

fn counted<K: Eq + Hash + Ord>(
    out: &mut String,
    name: &str,
    counter: &Counter<K>,
    mut show: impl FnMut(&mut String, &K) -> fmt::Result,
) -> fmt::Result {
    let (largest, rest) = counter.largest();
    writeln!(out, "<table><tr><th>{name}<th class=n>Closes<th class=n>TIME_WAIT<th>Most often")?;
    for (key, tally) in largest {
        out.push_str("<tr><td>");
        show(out, key)?;
        let most = ranks(tally).first().map_or("", |at| cause_word(cause_at(*at)));
        let (closes, time_wait) = (Number(sum(&tally.closes)), Number(sum(&tally.time_wait)));
        writeln!(out, "<td class=n>{closes}<td class=n>{time_wait}<td>{most}")?;
    }
    if rest > 0 {
        writeln!(out, "<tr><td class=dim>others<td class=n>{}<td><td>", Number(rest))?;
    }
    out.push_str("</table>\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_its_place() {
        assert_eq!(Cause::value_variants().len(), Cause::COUNT);
        for (at, cause) in Cause::value_variants().iter().enumerate() {
            assert_eq!((*cause as usize, cause_at(at)), (at, *cause));
        }
    }
}
