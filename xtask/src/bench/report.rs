//! Figures in, a Markdown table and JSON out; and whether the budgets are met.

use std::fmt::Write as _;
use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use super::contender::Contender;
use super::load::Workload;
use crate::bpf::PROGRAM_NAME;

/// What was measured of one contender under one load; each a cost of one operation, the least of all rounds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) bpf_ns: Option<f64>,
    pub(crate) daemon_ns: Option<f64>,
    /// Of both, in one round.
    pub(crate) total_ns: Option<f64>,
    /// Of the round with the least `bpf_ns`: name, runs, nanoseconds.
    pub(crate) programs: Vec<(String, f64, f64)>,
    /// The rate divided by that without it right before and after, for each round.
    pub(crate) kept: Vec<f64>,
    pub(crate) lost: u64,
    /// In some round it had to be killed: it may have lost more.
    pub(crate) killed: bool,
    /// The most of all rounds.
    pub(crate) resident: Option<u64>,
    pub(crate) maps: Option<u64>,
    /// Why it could not be measured.
    pub(crate) failed: Option<String>,
}

/// Lowers `least`.
pub(crate) fn lower(least: &mut Option<f64>, value: f64) -> bool {
    let lower = least.is_none_or(|least| value < least);
    if lower {
        *least = Some(value);
    }
    lower
}

impl Figures {
    pub(crate) fn kept(&self) -> Option<f64> {
        median(&self.kept)
    }

    fn runs(&self) -> Option<f64> {
        (!self.programs.is_empty()).then(|| self.programs.iter().map(|(_, runs, _)| runs).sum())
    }

    fn json(&self) -> Value {
        let programs = self.programs.iter().map(|(name, runs, ns)| json!({ "name": name, "runs": runs, "ns": ns }));
        json!({
            "bpf_ns": self.bpf_ns, "daemon_ns": self.daemon_ns, "total_ns": self.total_ns,
            "programs": programs.collect::<Vec<_>>(), "kept": self.kept, "kept_median": self.kept(), "lost": self.lost, "killed": self.killed,
            "resident_bytes": self.resident, "map_bytes": self.maps, "failed": self.failed,
        })
    }
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => sorted.get(middle).copied(),
        _ => Some((sorted.get(middle - 1)? + sorted.get(middle)?) / 2.0),
    }
}

/// A line of the contract.
pub(crate) struct Budget {
    what: String,
    value: Option<f64>,
    limit: f64,
    aim: Option<f64>,
    /// The value must not be below the limit, instead of not above it.
    at_least: bool,
    digits: usize,
}

impl Budget {
    pub(crate) fn at_most(what: impl Into<String>, value: Option<f64>, limit: f64, digits: usize) -> Self {
        Self { what: what.into(), value, limit, aim: None, at_least: false, digits }
    }

    pub(crate) fn at_least(what: impl Into<String>, value: Option<f64>, limit: f64, digits: usize) -> Self {
        Self { at_least: true, ..Self::at_most(what, value, limit, digits) }
    }

    pub(crate) fn aim(self, aim: f64) -> Self {
        Self { aim: Some(aim), ..self }
    }

    fn reaches(&self, limit: f64) -> bool {
        self.value.is_some_and(|value| if self.at_least { value >= limit } else { value <= limit })
    }

    pub(crate) fn is_met(&self) -> bool {
        self.reaches(self.limit)
    }

    fn verdict(&self) -> &'static str {
        match (self.value, self.aim) {
            (None, _) => "**not measured**",
            (Some(_), Some(aim)) if self.reaches(aim) => "met, and its aim",
            (Some(_), _) if self.is_met() => "met",
            (Some(_), _) => "**missed**",
        }
    }
}

/// How to read the tables.
pub(crate) const METHOD: &str = "\
## How it is measured

nginx and its clients (wrk, curl) run in a network namespace of their own, on the same host: each connection has both of its
ends here. Who is measured is started anew for each round, and the rounds of all are interleaved, where nothing else is said. tracer
runs without a filter.

- Costs are the least of several rounds, of which there are more for tracer, the floor and tcplife than for other peers.
- BPF: as the kernel times the runs of its programs, which adds some 60 ns to each, to empty programs, too.
- Daemon: what its threads ran, by the scheduler. Its stdout, like that of all, is a pipe that is read at once.
- Throughput kept: the clients go on while one after the other is started beside them and ended; the rate of a slice of 0.7 s,
  divided by the mean of those right before and after without anything; program runs are not timed. The median, and the range.
  The control is such a slice with nothing beside the clients, either: the machine's doing is at least what it is away from 1.
- Lost: by their own account, in all rounds. Maps: what the kernel accounts to them; perf buffers are not among them.
- Programs see the connections of the whole host: what else runs there counts, too.
";

/// What a run found, section by section.
#[derive(Default)]
pub(crate) struct Report {
    sections: Vec<String>,
    json: serde_json::Map<String, Value>,
    budgets: Vec<Budget>,
}

impl Report {
    /// Adds a section of Markdown.
    pub(crate) fn section(&mut self, text: impl Into<String>) {
        self.sections.push(text.into());
    }

    /// Adds a member of the JSON object.
    pub(crate) fn value(&mut self, name: &str, value: Value) {
        self.json.insert(name.to_owned(), value);
    }

    pub(crate) fn budget(&mut self, budget: Budget) {
        self.budgets.push(budget);
    }

    /// The table of one load.
    pub(crate) fn load(&mut self, workload: Workload, rows: &[(Contender, &Figures)]) {
        let (title, unit) = match workload {
            Workload::Short => ("Short connections", "connection, both ends"),
            Workload::KeepAlive => ("Keep-alive", "request, both ends"),
            Workload::Cookie => ("Keep-alive, with a 2 KiB cookie", "request, both ends"),
            Workload::Bulk => ("Bulk transfer of 1 GiB", "packet, both ends"),
        };
        let mut text = format!(
            "## {title}\n\n\
             Costs of one {unit}.\n\n\
             | | throughput kept | BPF ns | program runs | daemon ns | lost | resident | maps |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        );
        let mut object = serde_json::Map::new();
        for (contender, figures) in rows {
            let name = contender.name();
            object.insert(name.to_owned(), figures.json());
            if let Some(reason) = &figures.failed {
                let _ = writeln!(text, "| {name} | could not be run: {reason} | | | | | | |");
                continue;
            }
            let kept = figures.kept().map_or("–".to_owned(), |kept| {
                let (low, high) = figures
                    .kept
                    .iter()
                    .fold((f64::MAX, f64::MIN), |(low, high), kept| (low.min(*kept), high.max(*kept)));
                format!("{kept:.2} ({low:.2}–{high:.2})")
            });
            let daemon = figures.daemon_ns.filter(|_| contender.is_process());
            let _ = writeln!(
                text,
                "| {name} | {kept} | {} | {} | {} | {} | {} | {} |",
                number(figures.bpf_ns.filter(|_| figures.runs().is_some()), 0),
                number(figures.runs(), 1),
                number(daemon, 0),
                match figures.lost {
                    _ if !contender.is_process() => "–".to_owned(),
                    lost if figures.killed => format!("{lost} or more"),
                    lost => lost.to_string(),
                },
                figures.resident.map_or("–".to_owned(), megabytes),
                figures.maps.filter(|maps| *maps > 0).map_or("–".to_owned(), megabytes),
            );
        }
        self.section(text);
        self.value(&format!("{workload:?}"), Value::Object(object));
    }

    /// What each program of tracer costs, beside the empty one on the same hook.
    pub(crate) fn programs(&mut self, workload: Workload, tracer: &Figures, floor: &Figures) {
        let mut text = format!(
            "### Programs of tracer ({workload:?})\n\n\
             | program | runs | ns a run | empty program, ns a run | ns |\n| --- | ---: | ---: | ---: | ---: |\n"
        );
        let mut programs = tracer.programs.clone();
        programs.sort_by(|(_, _, one), (_, _, other)| other.total_cmp(one));
        // Other connections of the host have some.
        for (name, runs, ns) in programs.iter().filter(|(_, runs, _)| *runs >= 0.01) {
            let kept = name.get(..PROGRAM_NAME).unwrap_or(name);
            let empty = floor.programs.iter().find(|(name, runs, _)| name == kept && *runs > 0.0);
            let empty = empty.map(|(_, runs, ns)| ns / runs);
            let _ = writeln!(text, "| `{name}` | {runs:.2} | {:.0} | {} | {ns:.0} |", ns / runs, number(empty, 0));
        }
        self.section(text);
    }

    pub(crate) fn missed(&self) -> usize {
        self.budgets.iter().filter(|budget| !budget.is_met()).count()
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("# Benchmark\n\n{}\n", machine());
        if !self.budgets.is_empty() {
            text.push_str("\n## Budgets\n\n| | measured | budget | aim | |\n| --- | ---: | ---: | ---: | --- |\n");
        }
        for budget in &self.budgets {
            let sign = if budget.at_least { "≥" } else { "≤" };
            let _ = writeln!(
                text,
                "| {} | {} | {sign} {} | {} | {} |",
                budget.what,
                number(budget.value, budget.digits),
                number(Some(budget.limit), budget.digits),
                budget.aim.map_or(String::new(), |aim| number(Some(aim), budget.digits)),
                budget.verdict()
            );
        }
        for section in &self.sections {
            text.push('\n');
            text.push_str(section);
        }
        text
    }

    pub(crate) fn json(&self) -> Result<String> {
        let budgets = self.budgets.iter().map(|budget| {
            json!({
                "what": budget.what, "value": budget.value, "limit": budget.limit, "aim": budget.aim,
                "at_least": budget.at_least, "met": budget.is_met(),
            })
        });
        let mut object = self.json.clone();
        object.insert("machine".to_owned(), machine().into());
        object.insert("budgets".to_owned(), budgets.collect());
        Ok(serde_json::to_string_pretty(&object)?)
    }
}

/// `12,345`, or `–` for what was not measured.
pub(crate) fn number(value: Option<f64>, digits: usize) -> String {
    let Some(value) = value else { return "–".to_owned() };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Date, kernel, processor.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("?", |(_, name)| name);
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let date = crate::workspace::output(std::process::Command::new("date").args(["--utc", "+%F %H:%M"]));
    let load = read("/proc/loadavg");
    format!(
        "`cargo xtask bench`, {} UTC: Linux {}, {cpus} × {model}; load average at the end {}.",
        date.unwrap_or_default(),
        read("/proc/sys/kernel/osrelease").trim(),
        load.split(' ').next().unwrap_or("?"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(number(Some(1_234_567.4), 0), "1,234,567");
        assert_eq!(number(Some(999.0), 0), "999");
        assert_eq!(number(Some(-1234.5), 1), "-1,234.5");
        assert_eq!(number(Some(0.934), 2), "0.93");
        assert_eq!(number(None, 2), "–");
    }

    #[test]
    fn a_budget_is_met_or_missed() {
        assert!(Budget::at_most("", Some(7.0), 7.0, 0).is_met());
        assert!(!Budget::at_most("", Some(7.1), 7.0, 0).is_met());
        assert!(!Budget::at_least("", Some(0.89), 0.9, 2).is_met());
        assert!(!Budget::at_most("", None, 7.0, 0).is_met(), "what was not measured is not met");
        assert_eq!(Budget::at_least("", Some(0.95), 0.9, 2).aim(0.94).verdict(), "met, and its aim");
        assert_eq!(Budget::at_least("", Some(0.93), 0.9, 2).aim(0.94).verdict(), "met");
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
