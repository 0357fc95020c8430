//! A [`Snapshot`] in, text for people out: ports first, then namespaces, then sockets, the most pressing first.
//!
//! Each list is cut, and says how much is left out. Names that others chose are escaped and cut; addresses are never cut,
//! they push what is behind them. Columns are at most 120 wide, unless an IPv6 address is.

use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};
use jiff::tz::TimeZone;

use super::{Group, Netns, Pressure, Snapshot};
use crate::sink::escape::fit;
use crate::sink::text::WIDTH;

/// Destinations that are shown.
const DESTINATIONS: usize = 10;
/// A destination is shown if it holds this share of its ports; so is the first one in any case.
const SHARE: f64 = 0.01;
/// From here on ports are scarce.
const SCARCE: f64 = 0.8;
/// Namespaces that are shown.
const NAMESPACES: usize = 10;
/// Groups of sockets that are shown.
const GROUPS: usize = 20;
/// Columns for the name of a namespace, and for the least of a process.
const NAME: usize = 15;
const PROCESS: usize = 23;

const HEADER: Style = Style::new().bold();
const ALARM: Style = AnsiColor::Red.on_default();
const TIME_WAIT: Style = AnsiColor::Yellow.on_default();

/// Formats it; times in `zone`; `styled`: with the escape sequences of a terminal.
pub(super) fn text(snapshot: &Snapshot, zone: &TimeZone, styled: bool) -> String {
    let mut page = Page { text: String::new(), styled };
    let local = zone.to_datetime(snapshot.time);
    let states = &snapshot.sockets;
    page.line(
        HEADER,
        &format!(
            "{:02}:{:02}:{:02} {} in TIME_WAIT, {} in FIN_WAIT2, {} in CLOSE_WAIT, {} ESTABLISHED, in {}",
            local.hour(),
            local.minute(),
            local.second(),
            thousands(states.time_wait),
            thousands(states.fin_wait2),
            thousands(states.close_wait),
            thousands(states.established),
            count(snapshot.namespaces.len() as u64, "network namespace"),
        ),
    );
    ports(&mut page, snapshot);
    namespaces(&mut page, snapshot);
    groups(&mut page, snapshot);
    page.text
}

fn ports(page: &mut Page, snapshot: &Snapshot) {
    if snapshot.pressure.is_empty() {
        return;
    }
    page.heading("EPHEMERAL PORTS, by destination");
    let is_pressing = |one: &&Pressure| one.share >= SHARE || one.fails_in_s.is_some() || one.time_wait_table_first;
    let first = snapshot.pressure.iter().take(1);
    let pressing = snapshot.pressure.iter().skip(1).filter(is_pressing).take(DESTINATIONS - 1);
    let mut shown = 0;
    for one in first.chain(pressing) {
        shown += 1;
        destination(page, one, snapshot);
    }
    let rest = snapshot.pressure.len() as u64 + snapshot.pressure_omitted - shown;
    page.rest(rest, "destination");
}

fn destination(page: &mut Page, one: &Pressure, snapshot: &Snapshot) {
    let mut line = format!("  to {} from {}", one.to, one.from);
    if let Some(known) = snapshot.namespaces.iter().find(|known| known.netns == one.netns)
        && !known.own
    {
        line.push_str(" in ");
        name(&mut line, known);
    }
    let blocked = one.used - one.reusable;
    let held = one.time_wait - one.reusable;
    // Writing to a string does not fail.
    let _ = write!(
        line,
        ": {} of {} ports ({}), {} in TIME_WAIT",
        thousands(blocked.into()),
        thousands(one.ports.into()),
        percent(one.share),
        thousands(held.into()),
    );
    let style = if one.share >= SCARCE || one.fails_in_s.is_some() { ALARM } else { Style::new() };
    let reusable = (one.reusable > 0)
        .then(|| format!("{} more in TIME_WAIT can be reused (tcp_tw_reuse)", thousands(one.reusable.into())));
    let end = match one.fails_in_s {
        Some(0.0) => Some("connect() fails now".to_owned()),
        Some(seconds) => {
            Some(format!("connect() fails in about {} at the present rate ({})", about(seconds), rate(one)))
        }
        None if one.time_wait_table_first => {
            Some(format!("at the present rate ({}) the TIME_WAIT table is full before the ports are", rate(one)))
        }
        None if one.rate_per_s > 0.0 => Some(format!("enough at the present rate ({})", rate(one))),
        None => None,
    };
    for part in [reusable, end].into_iter().flatten() {
        line.push(';');
        if line.chars().count() + 1 + part.chars().count() <= WIDTH {
            line.push(' ');
        } else {
            page.line(style, &line);
            "    ".clone_into(&mut line);
        }
        line.push_str(&part);
    }
    page.line(style, &line);
}

fn rate(one: &Pressure) -> String {
    if one.rate_per_s < 10.0 {
        format!("{:.1}/s", one.rate_per_s)
    } else {
        // At most some millions.
        format!("{}/s", thousands(one.rate_per_s.round() as u64))
    }
}

fn namespaces(page: &mut Page, snapshot: &Snapshot) {
    page.heading("NETNS           TIME_WAIT FIN_WAIT2 CLOSE_WAIT ESTABLISHED  PORTS TW_REUSE TW_MAX   TW_OVERFLOWS");
    for known in snapshot.namespaces.iter().take(NAMESPACES) {
        let mut line = String::new();
        column(&mut line, NAME, |line| name(line, known));
        let states = &known.sockets;
        let reuse = match known.settings.tcp_tw_reuse {
            _ if known.settings.tcp_timestamps == 0 => "no",
            0 => "no",
            1 => "yes",
            _ => "loopback",
        };
        let overflows = known.time_wait_overflow.map_or("unknown".to_owned(), |number| number.to_string());
        let _ = write!(
            line,
            "{:>9} {:>9} {:>10} {:>11} {:>6} {reuse:<8} {:<8} {overflows}",
            states.time_wait,
            states.fin_wait2,
            states.close_wait,
            states.established,
            known.ports,
            known.settings.tcp_max_tw_buckets,
        );
        page.line(Style::new(), &line);
        match known.time_wait_full_in_s {
            Some(0.0) => {
                page.line(ALARM, "  its TIME_WAIT table is full: closes leave no TIME_WAIT (tcp_max_tw_buckets)")
            }
            Some(seconds) => {
                let seconds = about(seconds);
                page.line(TIME_WAIT, &format!("  its TIME_WAIT table is full in about {seconds} (tcp_max_tw_buckets)"));
            }
            None => {}
        }
    }
    page.rest(snapshot.namespaces.len().saturating_sub(NAMESPACES) as u64, "network namespace");
}

fn groups(page: &mut Page, snapshot: &Snapshot) {
    if snapshot.groups.is_empty() {
        return;
    }
    page.heading("NETNS           PORT  PEER                   TIME_WAIT FIN_WAIT2 CLOSE_WAIT ESTABLISHED  PROCESS");
    for group in snapshot.groups.iter().take(GROUPS) {
        let mut line = String::new();
        let known = snapshot.namespaces.iter().find(|known| known.netns == group.netns);
        column(&mut line, NAME, |line| match known {
            Some(known) => name(line, known),
            None => line.push_str(&group.netns.to_string()),
        });
        column(&mut line, 5, |line| line.push_str(&group.local_port.map_or("*".to_owned(), |port| port.to_string())));
        let peer = match group.peer_port {
            Some(port) => std::net::SocketAddr::new(group.peer, port).to_string(),
            None => group.peer.to_string(),
        };
        column(&mut line, 22, |line| line.push_str(&peer));
        let states = &group.sockets;
        let _ = write!(
            line,
            "{:>9} {:>9} {:>10} {:>11}  ",
            states.time_wait, states.fin_wait2, states.close_wait, states.established
        );
        process(&mut line, group);
        page.line(if states.close_wait > 0 { ALARM } else { Style::new() }, &line);
    }
    page.rest(snapshot.groups.len().saturating_sub(GROUPS) as u64 + snapshot.groups_omitted, "group");
}

/// The processes of a group; without any, who listens there.
fn process(line: &mut String, group: &Group) {
    match (&group.processes[..], &group.listener) {
        ([first, rest @ ..], _) => {
            fit(line, &format!("{}/{}", first.pid, first.comm), PROCESS);
            let more = rest.len() as u64 + group.processes_omitted;
            if more > 0 {
                let _ = write!(line, " +{more}");
            }
        }
        ([], Some(listener)) => {
            fit(line, &format!("{}/{}", listener.pid, listener.comm), PROCESS - 8);
            line.push_str(" listens");
        }
        ([], None) => line.push_str(if group.unknown_process > 0 { "unknown" } else { "-" }),
    }
}

/// A namespace: its name, or its inode number.
fn name(line: &mut String, known: &Netns) {
    match &known.name {
        Some(name) => {
            fit(line, name, NAME);
        }
        None if known.own => line.push_str("own"),
        None => line.push_str(&known.netns.to_string()),
    }
}

/// Appends a column that is at least `width` wide, and a blank.
fn column(line: &mut String, width: usize, put: impl FnOnce(&mut String)) {
    let mut cell = String::new();
    put(&mut cell);
    let used = unicode_width::UnicodeWidthStr::width(cell.as_str());
    line.push_str(&cell);
    line.extend(std::iter::repeat_n(' ', width.saturating_sub(used) + 1));
}

/// `1,234,567`
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn count(number: u64, what: &str) -> String {
    format!("{} {what}{}", thousands(number), if number == 1 { "" } else { "s" })
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    // Not "100 %" while there is one left.
    if percent > 0.0 && percent < 0.1 {
        return "<0.1 %".to_owned();
    }
    if percent < 10.0 { format!("{percent:.1} %") } else { format!("{:.0} %", percent.floor()) }
}

fn about(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
}

struct Page {
    text: String,
    styled: bool,
}

impl Page {
    fn line(&mut self, style: Style, line: &str) {
        // Writing to a string does not fail.
        let _ = if self.styled && style != Style::new() {
            writeln!(self.text, "{style}{}{style:#}", line.trim_end())
        } else {
            writeln!(self.text, "{}", line.trim_end())
        };
    }

    fn heading(&mut self, line: &str) {
        self.text.push('\n');
        self.line(HEADER, line);
    }

    fn rest(&mut self, number: u64, what: &str) {
        if number > 0 {
            self.line(Style::new(), &format!("  and {}", count(number, &format!("more {what}"))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pressure::Settings;
    use super::super::{Owner, States};
    use super::*;

    fn owner(pid: u32, comm: &str) -> Owner {
        Owner { pid, comm: comm.to_owned() }
    }

    fn snapshot() -> Snapshot {
        let states = States { time_wait: 24_870, fin_wait2: 2, close_wait: 12, established: 30, other: 0 };
        let netns = |netns, name: Option<&str>, own| Netns {
            netns,
            name: name.map(str::to_owned),
            own,
            sockets: states,
            ports: 28_232,
            settings: Settings::default(),
            time_wait_overflow: Some(17),
            time_wait_full_in_s: None,
        };
        let pressure = |to: &str, netns| Pressure {
            netns,
            from: "10.0.0.7".parse().expect("an address"),
            to: to.parse().expect("an address"),
            used: 24_900,
            time_wait: 24_870,
            reusable: 0,
            ports: 28_232,
            share: 24_900.0 / 28_232.0,
            rate_per_s: 83.3,
            fails_in_s: Some(40.2),
            time_wait_table_first: false,
        };
        let group = |local_port, peer: &str, peer_port, close_wait| Group {
            netns: 1,
            local_port,
            peer: peer.parse().expect("an address"),
            peer_port,
            sockets: States { close_wait, ..states },
            processes: Vec::new(),
            processes_omitted: 0,
            no_process: 1,
            unknown_process: 0,
            listener: None,
        };
        Snapshot {
            time: jiff::Timestamp::UNIX_EPOCH,
            version: "0",
            kernel: String::new(),
            host: String::new(),
            sockets: states,
            namespaces: vec![
                netns(1, None, true),
                Netns { time_wait_full_in_s: Some(0.0), ..netns(4_026_532_300, Some("b\x1b[2J"), false) },
            ],
            pressure: vec![
                pressure("10.0.0.5:3306", 1),
                Pressure {
                    fails_in_s: Some(0.0),
                    share: 1.0,
                    reusable: 100,
                    ..pressure("[2001:db8:0:1:2:3:4:5]:3306", 4_026_532_300)
                },
                Pressure { fails_in_s: None, time_wait_table_first: true, ..pressure("10.0.0.6:1", 1) },
                Pressure { fails_in_s: None, share: 0.001, ..pressure("10.0.0.8:1", 1) },
            ],
            pressure_omitted: 5,
            groups: vec![
                Group { listener: Some(owner(12, "nginx")), ..group(Some(80), "10.0.0.9", None, 0) },
                Group {
                    processes: vec![owner(7, "a\u{202e}b"), owner(8, "c")],
                    processes_omitted: 2,
                    ..group(None, "10.0.0.5", Some(3306), 12)
                },
                group(None, "2001:db8:0:1:2:3:4:5", Some(3306), 0),
            ],
            groups_omitted: 1,
            degraded: Vec::new(),
        }
    }

    #[test]
    fn a_page() {
        let got = text(&snapshot(), &TimeZone::UTC, false);
        insta::assert_snapshot!(got, @r"
        00:00:00 24,870 in TIME_WAIT, 2 in FIN_WAIT2, 12 in CLOSE_WAIT, 30 ESTABLISHED, in 2 network namespaces

        EPHEMERAL PORTS, by destination
          to 10.0.0.5:3306 from 10.0.0.7: 24,900 of 28,232 ports (88 %), 24,870 in TIME_WAIT;
            connect() fails in about 40 s at the present rate (83/s)
          to [2001:db8:0:1:2:3:4:5]:3306 from 10.0.0.7 in b\x1b[2J: 24,800 of 28,232 ports (100 %), 24,770 in TIME_WAIT;
            100 more in TIME_WAIT can be reused (tcp_tw_reuse); connect() fails now
          to 10.0.0.6:1 from 10.0.0.7: 24,900 of 28,232 ports (88 %), 24,870 in TIME_WAIT;
            at the present rate (83/s) the TIME_WAIT table is full before the ports are
          and 6 more destinations

        NETNS           TIME_WAIT FIN_WAIT2 CLOSE_WAIT ESTABLISHED  PORTS TW_REUSE TW_MAX   TW_OVERFLOWS
        own                 24870         2         12          30  28232 loopback 262144   17
        b\x1b[2J            24870         2         12          30  28232 loopback 262144   17
          its TIME_WAIT table is full: closes leave no TIME_WAIT (tcp_max_tw_buckets)

        NETNS           PORT  PEER                   TIME_WAIT FIN_WAIT2 CLOSE_WAIT ESTABLISHED  PROCESS
        own             80    10.0.0.9                   24870         2          0          30  12/nginx listens
        own             *     10.0.0.5:3306              24870         2         12          30  7/a\u{202e}b +3
        own             *     [2001:db8:0:1:2:3:4:5]:3306     24870         2          0          30  -
          and 1 more group
        ");
    }

    #[test]
    fn nothing_foreign_reaches_the_terminal_and_lists_are_bounded() {
        let mut many = snapshot();
        many.groups = vec![many.groups[1].clone(); 500];
        many.pressure = vec![many.pressure[0].clone(); 500];
        many.namespaces.extend(vec![many.namespaces[1].clone(); 500]);
        let got = text(&many, &TimeZone::UTC, false);
        let is_harmless = |text: &str| text.chars().all(|c| c == '\n' || !crate::sink::escape::is_hostile(c));
        assert!(is_harmless(&got), "{got:?}");
        for hostile in [
            "\x1b]0;x\x07",
            "a\r\nb",
            "\u{9b}31m",
            "\u{202a}\u{202e}\u{2066}\u{2069}",
            "\"'\\</script>&",
            "\0\u{fffd}\u{200b}",
        ] {
            let mut odd = snapshot();
            odd.namespaces[1].name = Some(hostile.to_owned());
            odd.groups[0].listener = Some(owner(12, hostile));
            odd.groups[1].processes = vec![owner(7, hostile)];
            (odd.host, odd.kernel) = (hostile.to_owned(), hostile.to_owned());
            let text = text(&odd, &TimeZone::UTC, false);
            assert!(is_harmless(&text), "{text:?}");
            assert_eq!(text.lines().count(), self::text(&snapshot(), &TimeZone::UTC, false).lines().count(), "{text}");
            let mut json = Vec::new();
            crate::sink::json::append(&mut json, &odd).expect("JSON");
            let json = String::from_utf8(json).expect("UTF-8");
            assert!(is_harmless(&json) && json.matches('\n').count() == 1, "{json:?}");
            let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
            assert_eq!(value["namespaces"][1]["name"], hostile);
            assert_eq!(value["groups"][1]["processes"][0]["comm"], hostile);
        }
        assert!(got.lines().count() < 80, "{got}");
        for rest in ["and 495 more destinations", "and 492 more network namespaces", "and 481 more groups"] {
            assert!(got.contains(rest), "{rest}:\n{got}");
        }
        let styled = text(&many, &TimeZone::UTC, true);
        assert_eq!(anstream::adapter::strip_str(&styled).to_string(), got, "colour is all that differs");
    }

    #[test]
    fn numbers() {
        let cases = [(0, "0"), (999, "999"), (1_000, "1,000"), (28_232, "28,232"), (1_234_567, "1,234,567")];
        for (number, wanted) in cases {
            assert_eq!(thousands(number), wanted);
        }
        assert_eq!(percent(0.9999), "99 %");
        assert_eq!((percent(0.0), percent(0.0001)), ("0.0 %".to_owned(), "<0.1 %".to_owned()));
        assert_eq!(percent(0.0123), "1.2 %");
        assert_eq!(about(3.25), "3.2 s");
        assert_eq!(about(40.2), "40 s");
    }
}
