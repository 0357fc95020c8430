//! Two tracers at once: what a change gives or takes, to about a hundredth.
//!
//! Both are attached under one load, and what they use in the same two seconds is compared: what else the machine does falls on both
//! alike. The one that is attached second finds in the caches what the first has fetched, so it is done in both orders.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::Bench;
use super::contender::{Contender, Reading, Starter};
use super::floor::Counting;
use super::load::Workload;
use super::measure::{self, Usage};
use super::report::{median, number};

/// Times that each is started first.
const TURNS: u32 = 3;
/// Loads of two seconds for each such time.
const ROUNDS: u32 = 3;

/// What this one takes, as a multiple of what the other one takes: attached first, and second.
type Ratios = [Vec<f64>; 2];

impl Bench<'_> {
    /// This tracer, compared with another one.
    pub(super) fn against(&mut self, other: &Path) -> Result<()> {
        let _counting = Counting::start()?;
        let this = &self.starter;
        let hooks = this.hooks.clone();
        let other =
            Starter { tracer: other, namespace: this.namespace, directory: this.directory, types: this.types, hooks };
        let mut text = format!(
            "## Against {}\n\n\
             What this tracer takes, as a multiple of what that one takes: a run of each of its programs, and the daemon for each \
             connection, request or packet. Both run at once, in both orders; the medians' mean.\n\n\
             | load | | first | second | |\n| --- | --- | ---: | ---: | ---: |\n",
            other.tracer.display()
        );
        let mut seen = Vec::new();
        for workload in [Workload::Short, Workload::KeepAlive, Workload::Cookie, Workload::Bulk] {
            self.load.run(workload, 2)?;
            let mut ratios = BTreeMap::<String, Ratios>::new();
            for turn in 0..TURNS {
                for second in [false, true] {
                    eprintln!(
                        "bench: {workload:?}: turn {} of {TURNS}, started {}",
                        turn + 1,
                        if second { "second" } else { "first" }
                    );
                    let starters = if second { [&other, &self.starter] } else { [&self.starter, &other] };
                    let start = |starter: &Starter<'_>| starter.start(Contender::Text, Reading::Lines, &[]);
                    let [a, b] = [start(starters[0])?, start(starters[1])?];
                    for _ in 0..ROUNDS {
                        let ([a, b], _) = self.round(workload, [&a, &b])?;
                        let (of_this, of_other) = if second { (b, a) } else { (a, b) };
                        let of_other = costs(&of_other);
                        for (what, cost) in costs(&of_this) {
                            if let Some(other) = of_other.get(&what) {
                                ratios.entry(what).or_default()[usize::from(second)].push(cost / other);
                            }
                        }
                    }
                    a.stop(Contender::Text)?;
                    b.stop(Contender::Text)?;
                }
            }
            for (what, ratios) in ratios {
                let [first, second] = ratios.map(|ratios| median(&ratios));
                let mean = (first.context("a round")? * second.context("a round")?).sqrt();
                let _ = writeln!(
                    text,
                    "| {workload:?} | {what} | {} | {} | {} |",
                    number(first, 3),
                    number(second, 3),
                    number(Some(mean), 3)
                );
                seen.push(json!({ "load": format!("{workload:?}"), "of": what, "first": first, "second": second, "ratio": mean }));
            }
        }
        self.report.section(text);
        self.report.value("against", seen.into());
        Ok(())
    }
}

/// Nanoseconds for a run of each program that runs often enough, and the daemon's in all.
fn costs(usage: &Usage) -> BTreeMap<String, f64> {
    /// In two seconds.
    const OFTEN: u64 = 1000;
    let often = usage.programs.iter().filter(|(_, runs)| runs.count >= OFTEN);
    let programs = often.filter_map(|(id, runs)| {
        Some((format!("`{}`", measure::program_name(*id)?), runs.ns as f64 / runs.count as f64))
    });
    programs.chain([("daemon".to_owned(), usage.cpu_ns as f64)]).collect()
}
