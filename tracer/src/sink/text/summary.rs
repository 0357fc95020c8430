//! Summaries and alerts in, a table and sentences out.

use std::cmp::Reverse;

use anstyle::Style;
use unicode_width::UnicodeWidthStr as _;

use super::{ADVICE, ALARM, GROUPS, HEADER, Line, PROCESS_WIDTH, Text, WIDTH, column, elapsed};
use super::{cause_word, closed_by_word};
use crate::event::{Advice, Alert, AlertState, Group, Ledger, LedgerRow, Metric, Reconciled, Role, Summary};
use crate::sink::escape::fit;
use crate::sink::summary::{thousands, who};

/// CPUs that are shown: those that lost most.
const CPUS: usize = 16;
/// Advice that is shown.
const ADVICES: usize = 5;
/// Where what is advised begins, and its further lines.
const ADVICE_INDENT: usize = 2;
const ADVICE_HANGING: usize = 4;

/// Where the columns of the table begin.
mod at {
    pub(super) const PROCESS: usize = 27;
    pub(super) const CLOSED: usize = PROCESS + super::PROCESS_WIDTH + 1;
    pub(super) const CAUSE: usize = CLOSED + 7;
    pub(super) const PEER: usize = CAUSE + 15;
    pub(super) const REQUESTS: usize = PEER + 25;
    pub(super) const LIFETIME: usize = REQUESTS + 10;
}

impl Text {
    pub(super) fn summary(&mut self, summary: &Summary) {
        self.time(summary.time);
        let line = &mut self.line;
        line.stop(column::PROCESS);
        let Summary { window_s, window_closes: closes, window_time_wait: time_wait, lost, untracked, .. } = summary;
        let Summary { closes_per_s, time_wait_per_s, close_wait, groups, .. } = summary;
        let of = if summary.last { "" } else { "the last " };
        line.style(HEADER, |line| {
            line.put(&format!(
                "{closes} closed in {of}{window_s:.1} s ({closes_per_s:.1}/s), \
                 {time_wait} of them left TIME_WAIT ({time_wait_per_s:.1}/s)"
            ));
        });
        line.put(", ");
        line.style(if *lost > 0 { ALARM } else { Style::new() }, |line| line.put(&format!("{lost} lost")));
        if *close_wait > 0 {
            line.put(", ");
            line.style(ALARM, |line| line.put(&format!("{close_wait} stuck in CLOSE_WAIT")));
        }
        line.end();
        if *untracked > 0 {
            line.stop(column::PROCESS);
            line.style(ALARM, |line| line.put(&format!("{untracked} could not be followed")));
            line.end();
        }
        if let Some(ledger) = &summary.ledger {
            line.ledger(ledger);
        }
        if !summary.last {
            line.stop(column::PROCESS);
            line.put(&format!("{} closed since the start, {} left TIME_WAIT", summary.closes, summary.time_wait));
            if let Some(sockets) = summary.time_wait_sockets {
                line.put(&format!("; {sockets} sockets are in TIME_WAIT now, whoever made them"));
            }
            line.end();
        }
        if groups.is_empty() {
            return;
        }
        for advice in summary.advice.iter().take(ADVICES) {
            line.advice(advice);
        }
        line.table_header();
        for group in groups.iter().take(GROUPS) {
            line.group(group);
        }
        let shown: u64 = groups.iter().take(GROUPS).map(|group| group.window_closes).sum();
        let rest = closes.saturating_sub(shown);
        if rest > 0 {
            line.put(&format!("{rest:>8} in other groups"));
            line.end();
        }
    }

    pub(super) fn alert(&mut self, alert: &Alert) {
        self.time(alert.time);
        let line = &mut self.line;
        line.stop(column::PROCESS);
        let Alert { value, limit, .. } = alert;
        let raised = alert.state == AlertState::Raised;
        let (word, verb) = if raised { ("ALERT", "reached") } else { ("alert over", "no longer near") };
        let what = match alert.metric {
            Metric::TimeWait => format!("{word}: {value:.0} sockets in TIME_WAIT, the limit of {limit:.0} is {verb}"),
            Metric::Rate => format!("{word}: {value:.1} TIME_WAIT made a second, the limit of {limit} is {verb}"),
        };
        line.style(if raised { ALARM.bold() } else { Style::new() }, |line| line.put(&what));
        match (alert.metric, alert.time_wait_sockets) {
            (Metric::TimeWait, _) => line.put(&format!(" ({:.1} made a second)", alert.time_wait_per_s)),
            (Metric::Rate, Some(sockets)) => line.put(&format!(" ({sockets} sockets)")),
            (Metric::Rate, None) => {}
        }
        line.end();
        if let Some(advice) = &alert.advice {
            line.advice(advice);
        }
    }
}

impl Line {
    /// What became of each close.
    fn ledger(&mut self, ledger: &Ledger) {
        let Ledger { written, lost, waiting, .. } = ledger;
        let filtered = ledger.filtered_kernel + ledger.filtered_user;
        let seen = thousands(ledger.seen);
        self.stop(column::PROCESS);
        let about = ledger.reconciled.as_ref().and_then(|reconciled| Some((reconciled, reconciled.percent?)));
        if let Some((reconciled, percent)) = about {
            let style = if reconciled.seen_all() { Style::new() } else { ALARM };
            self.style(style, |line| {
                let about = if reconciled.is_exact() { "" } else { "about " };
                line.put(&format!("saw {about}{percent:.1} % of closes"));
            });
            // The kernel's counters are about one network namespace; what was seen is of all.
            self.put(" in its netns; in all: ");
        }
        self.put(&format!("{seen} seen = {} written", thousands(*written)));
        if filtered > 0 {
            self.put(&format!(" + {} filtered", thousands(filtered)));
        }
        if *waiting > 0 {
            self.put(&format!(" + {} to come", thousands(*waiting)));
        }
        self.put(" + ");
        self.style(if *lost > 0 { ALARM } else { Style::new() }, |line| {
            line.put(&format!("{} lost", thousands(*lost)))
        });
        if !ledger.balanced {
            self.style(ALARM, |line| line.put(": THIS DOES NOT ADD UP"));
        }
        self.end();
        if let Some((made, least, most)) = ledger.reconciled.as_ref().and_then(Reconciled::wrong_mini_sockets) {
            self.stop(column::PROCESS);
            self.style(ALARM, |line| {
                line.put(&format!(
                    "the kernel left {} sockets in TIME_WAIT or FIN_WAIT2 there, {} to {} were seen",
                    thousands(made),
                    thousands(least),
                    thousands(most)
                ));
            });
            self.end();
        }
        if ledger.cpus.len() > 1 && (*lost > 0 || !ledger.balanced) {
            self.cpus(&ledger.cpus);
        }
    }

    /// The programs' counts for each CPU: where something is missing, it may be on one of them only.
    fn cpus(&mut self, rows: &[LedgerRow]) {
        let mut shown: Vec<_> = rows.iter().collect();
        shown.sort_by_key(|row| (row.balances(), Reverse(row.lost + row.untracked), row.cpu));
        shown.truncate(CPUS);
        shown.sort_by_key(|row| row.cpu);
        for row in &shown {
            self.stop(column::PROCESS);
            self.put(&format!("CPU {}: {} seen = {} recorded", row.cpu, thousands(row.seen), thousands(row.emitted)));
            if row.filtered > 0 {
                self.put(&format!(" + {} filtered", thousands(row.filtered)));
            }
            let lost = row.lost + row.untracked;
            self.put(" + ");
            self.style(if lost > 0 { ALARM } else { Style::new() }, |line| {
                line.put(&format!("{} lost", thousands(lost)))
            });
            if !row.balances() {
                self.style(ALARM, |line| line.put(": THIS DOES NOT ADD UP"));
            }
            self.end();
        }
        if rows.len() > shown.len() {
            self.stop(column::PROCESS);
            self.put(&format!("{} other CPUs, which lost no more: see ledger in --json", rows.len() - shown.len()));
            self.end();
        }
    }

    /// A sentence, over as many lines as it needs.
    fn advice(&mut self, advice: &Advice) {
        let mut rest = String::new();
        let mut indent = ADVICE_INDENT;
        for word in advice.text.split(' ') {
            let mut escaped = String::new();
            // A word of hostile bytes may be wider than a line.
            fit(&mut escaped, word, WIDTH - ADVICE_HANGING);
            if indent + rest.width() + 1 + escaped.width() > WIDTH {
                self.sentence_line(indent, &rest);
                indent = ADVICE_HANGING;
                rest.clear();
            }
            if !rest.is_empty() {
                rest.push(' ');
            }
            rest.push_str(&escaped);
        }
        self.sentence_line(indent, &rest);
    }

    fn sentence_line(&mut self, indent: usize, text: &str) {
        self.stop(indent);
        self.style(ADVICE, |line| line.put(text));
        self.end();
    }

    fn table_header(&mut self) {
        self.style(HEADER, |line| {
            line.put("  CLOSES      /S TIME_WAIT");
            let columns = [
                (at::PROCESS, "PROCESS"),
                (at::CLOSED, "CLOSED"),
                (at::CAUSE, "CAUSE"),
                (at::PEER, "PEER"),
                (at::REQUESTS, "REQUESTS"),
                (at::LIFETIME, "LIFETIME"),
            ];
            for (at, name) in columns {
                line.stop(at);
                line.put(name);
            }
        });
        self.end();
    }

    /// Counts, then who and whom, then the median and the 95th percentile of requests and lifetime.
    fn group(&mut self, group: &Group) {
        let Group { window_closes: closes, closes_per_s, window_time_wait: time_wait, .. } = group;
        self.put(&format!("{closes:>8} {closes_per_s:>7.1} {time_wait:>9}"));
        self.stop(at::PROCESS);
        match &group.comm {
            Some(comm) => self.put_within(&who(comm, &group.pids, group.more_pids), PROCESS_WIDTH),
            None => self.put("unknown"),
        }
        self.stop(at::CLOSED);
        self.put(closed_by_word(group.closed_by));
        self.stop(at::CAUSE);
        self.put(cause_word(group.cause));
        self.stop(at::PEER);
        let port = group.port.unwrap_or(0);
        self.put(&match (group.role, group.peer) {
            (Role::Server, Some(peer)) => format!(":{port} < {peer}"),
            (Role::Server, None) => format!(":{port} < many"),
            (Role::Client, Some(peer)) => format!("> {}", std::net::SocketAddr::new(peer, port)),
            (Role::Client, None) => format!("> many:{port}"),
            (Role::Unknown, Some(peer)) => peer.to_string(),
            (Role::Unknown, None) => "many".to_owned(),
        });
        if let (Some(p50), Some(p95)) = (group.requests_p50, group.requests_p95) {
            self.stop(at::REQUESTS);
            self.put(&format!("{p50}/{p95}"));
        }
        if let (Some(p50), Some(p95)) = (group.lifetime_p50_us, group.lifetime_p95_us) {
            self.stop(at::LIFETIME);
            self.put(&format!("{}/{}", elapsed(p50), elapsed(p95)));
        }
        self.end();
    }
}
