//! `cargo xtask bench`: what tracer costs, beside its peers and beside the least that its hooks can cost.
//!
//! nginx and its clients talk in a network namespace of their own. Who is measured is started anew for each round, and the
//! rounds of all are interleaved, because a machine is not equally fast at all times: of costs the least of all rounds
//! counts, of throughput the median of what was kept against the time without anything right before and after. Program
//! runs are timed in rounds of their own, since that costs, too. Stdout goes to a pipe that is read at once, for all alike.

mod against;
mod contender;
mod floor;
mod load;
pub(crate) mod measure;
mod parts;
mod report;
mod steps;

pub(crate) use load::hold;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use self::contender::{Active, Contender, Reading, Starter};
use self::floor::Counting;
use self::load::{Load, Workload};
use self::measure::{Maps, Usage, resident};
use self::report::{Budget, Figures, METHOD, Report, lower};
use crate::bpf::Types;
use crate::workspace;

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Do not fail if a budget is missed
    #[arg(long)]
    report_only: bool,
    /// Instead: does the cost of a close stay the same with 100,000 connections open, and after 5 million closes?
    #[arg(long)]
    scale: bool,
    /// Instead: what happens if nobody reads stdout for half a minute?
    #[arg(long)]
    stall: bool,
    /// Instead: what is the size of the ring worth?
    #[arg(long)]
    rings: bool,
    /// Instead: how many instructions does each step of the daemon take?
    #[arg(long)]
    steps: bool,
    /// Instead: what does this tracer take, compared with the one in that file? To a hundredth, where other figures move by tens of
    /// percent
    #[arg(long, value_name = "TRACER", conflicts_with_all = ["scale", "stall", "rings", "steps", "all"])]
    against: Option<PathBuf>,
    /// All of it
    #[arg(long, conflicts_with_all = ["scale", "stall", "rings", "steps"])]
    all: bool,
    /// Also write the tables to this file
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

pub(crate) fn bench(options: &Options) -> Result<()> {
    if !workspace::is_root() {
        let mut command = std::process::Command::new("sudo");
        return workspace::succeed(command.arg("-E").arg(std::env::current_exe()?).args(std::env::args_os().skip(1)));
    }
    let mut report = Report::default();
    if !options.steps || options.scale || options.stall || options.rings {
        run(options, &mut report)?;
    }
    if options.steps || options.all {
        steps::count(&mut report)?;
    }
    println!("{}", report.markdown());
    let json = workspace::target_dir().join("bench.json");
    fs::write(&json, report.json()?)?;
    eprintln!("xtask: the figures as JSON are in {}", json.display());
    if let Some(file) = &options.write {
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(file, report.markdown())?;
    }
    match report.missed() {
        0 => Ok(()),
        _ if options.report_only => Ok(()),
        missed => bail!("{missed} budgets are missed"),
    }
}

/// What needs a load.
fn run(options: &Options, report: &mut Report) -> Result<()> {
    workspace::install("the benchmark", &load::NEEDED)?;
    workspace::succeed(workspace::cargo().args(["build", "--release", "--package", "tracer"]))?;
    report.section(METHOD);
    let directory = tempfile::Builder::new().prefix("tracer-bench-").tempdir()?;
    let load = Load::start(directory.path())?;
    let types = Types::read()?;
    let tracer = workspace::target_dir().join("release/tracer");
    let mut bench = Bench::new(&load, &tracer, directory.path(), &types, report)?;
    if let Some(other) = &options.against {
        return bench.against(other);
    }
    if options.all || !(options.scale || options.stall || options.rings) {
        bench.compare()?;
    }
    if options.scale || options.all {
        bench.scale()?;
    }
    if options.rings || options.all {
        bench.rings()?;
    }
    if options.stall || options.all {
        bench.stall()?;
    }
    Ok(())
}

/// Rounds of each contender in which program runs are timed, and in which they are not.
type Plan<'a> = &'a [(Contender, u32, u32)];

const SHORT: Plan<'_> = &[
    (Contender::Nothing, 0, 9),
    (Contender::Floor, 4, 9),
    (Contender::Text, 5, 15),
    (Contender::Json, 5, 9),
    (Contender::Tcplife, 4, 3),
    (Contender::Tcpstates, 1, 3),
    (Contender::Bpftrace, 1, 3),
    (Contender::Tcpdump, 1, 3),
];
const KEEP_ALIVE: Plan<'_> = &[
    (Contender::Nothing, 0, 9),
    (Contender::Floor, 4, 9),
    (Contender::Text, 4, 15),
    (Contender::Json, 1, 0),
    (Contender::Tcplife, 1, 1),
    (Contender::Tcpstates, 1, 0),
    (Contender::Bpftrace, 1, 0),
    (Contender::Tcpdump, 1, 1),
];
const COOKIE: Plan<'_> = &[(Contender::Floor, 3, 0), (Contender::Text, 3, 0)];
const BULK: Plan<'_> = &[(Contender::Floor, 4, 0), (Contender::Text, 4, 0)];

/// Connections that are open while resident memory is judged.
const OPEN: u64 = 100_000;
/// After the load, until a daemon has done all that it caused.
const SETTLE: Duration = Duration::from_millis(200);
/// How long the clients are watched for their rate.
const SLICE: Duration = Duration::from_millis(700);

/// Of sorted values.
fn percentile(sorted: &[u32], percent: usize) -> Option<u32> {
    sorted.get(sorted.len() * percent / 100).copied()
}

struct Bench<'a> {
    load: &'a Load,
    starter: Starter<'a>,
    figures: BTreeMap<(Workload, Contender), Figures>,
    report: &'a mut Report,
}

impl<'a> Bench<'a> {
    fn new(
        load: &'a Load,
        tracer: &'a Path,
        directory: &'a Path,
        types: &'a Types,
        report: &'a mut Report,
    ) -> Result<Self> {
        let mut starter = Starter { tracer, namespace: &load.namespace, directory, types, hooks: Vec::new() };
        let active = starter.start(Contender::Json, Reading::Lines, &[])?;
        let start: Value =
            serde_json::from_str(active.first_line().unwrap_or_default()).context("tracer's first line")?;
        let hooks = start["hooks"].as_array().context("tracer names no hooks")?;
        let hooks = hooks.iter().filter_map(|hook| hook.as_str().map(str::to_owned)).collect();
        active.stop(Contender::Json)?;
        starter.hooks = hooks;
        Ok(Self { load, starter, figures: BTreeMap::new(), report })
    }

    /// The default: all contenders under all loads, and the budgets.
    fn compare(&mut self) -> Result<()> {
        for peer in Contender::PEERS {
            // Where it cannot be installed its row says so.
            if let Some(program) = peer.program()
                && let Err(error) = workspace::install("the benchmark", &[program])
            {
                eprintln!("xtask: {error:#}");
            }
        }
        let loads = [
            (Workload::Short, SHORT),
            (Workload::KeepAlive, KEEP_ALIVE),
            (Workload::Cookie, COOKIE),
            (Workload::Bulk, BULK),
        ];
        for (workload, plan) in loads {
            // Warms up, and leaves as many TIME_WAIT sockets as there can be.
            self.load.run(workload, 2)?;
            self.time(workload, plan)?;
            self.keep(workload, plan)?;
            let rows: Vec<_> = plan
                .iter()
                .filter_map(|(contender, ..)| Some((*contender, self.figures.get(&(workload, *contender))?)))
                .collect();
            self.report.load(workload, &rows);
            let of = |contender| self.figures.get(&(workload, contender)).cloned().unwrap_or_default();
            self.report.programs(workload, &of(Contender::Text), &of(Contender::Floor));
        }
        let latencies_us = self.latency()?;
        let resident = self.resident()?;
        let idle = self.idle()?;
        self.judge(&latencies_us, resident, idle);
        Ok(())
    }

    /// Rounds with program runs timed.
    fn time(&mut self, workload: Workload, plan: Plan<'_>) -> Result<()> {
        let _counting = Counting::start()?;
        for round in 0..plan.iter().map(|(_, timed, _)| *timed).max().unwrap_or(0) {
            for (contender, ..) in plan.iter().filter(|(_, timed, _)| round < *timed) {
                let Some(active) = self.start(workload, *contender)? else { continue };
                let ([usage], operations) = self.round(workload, [&active])?;
                let each = |n: u64| n as f64 / operations as f64;
                let (bpf, daemon) = (each(usage.runs().ns), each(usage.cpu_ns));
                let figures = self.figures.entry((workload, *contender)).or_default();
                lower(&mut figures.daemon_ns, daemon);
                lower(&mut figures.total_ns, bpf + daemon);
                if lower(&mut figures.bpf_ns, bpf) {
                    let name = |id: &u32| measure::program_name(*id).unwrap_or_else(|| id.to_string());
                    let programs = usage.programs.iter();
                    figures.programs = programs.map(|(id, runs)| (name(id), each(runs.count), each(runs.ns))).collect();
                }
                self.end(workload, *contender, active)?;
            }
        }
        Ok(())
    }

    /// What contenders that are active at once use while the load runs for two seconds, and how many operations that were.
    fn round<const N: usize>(&self, workload: Workload, active: [&Active; N]) -> Result<([Usage; N], u64)> {
        let mut used = Vec::with_capacity(N);
        for active in active {
            used.push(active.usage()?);
        }
        let done = self.load.run(workload, 2)?;
        std::thread::sleep(SETTLE);
        for (active, used) in active.into_iter().zip(&mut used) {
            *used = active.usage()?.since(used);
        }
        let used = used.try_into().ok().context("one for each")?;
        Ok((used, done.operations))
    }

    /// How much of the throughput is kept, program runs not timed. The clients go on all the while: contenders come and go beside
    /// them, and what is answered within a slice of time is counted.
    fn keep(&mut self, workload: Workload, plan: Plan<'_>) -> Result<()> {
        let rounds = plan.iter().map(|(.., kept)| *kept).max().unwrap_or(0);
        if rounds == 0 {
            return Ok(());
        }
        let _clients = self.load.go_on(workload, self.starter.directory)?;
        std::thread::sleep(SLICE);
        let mut before = self.slice()?;
        for round in 0..rounds {
            for (contender, ..) in plan.iter().filter(|(.., kept)| round < *kept) {
                let Some(active) = self.start(workload, *contender)? else { continue };
                std::thread::sleep(SETTLE);
                let with = self.slice()?;
                self.end(workload, *contender, active)?;
                std::thread::sleep(SETTLE);
                let after = self.slice()?;
                let figures = self.figures.entry((workload, *contender)).or_default();
                figures.kept.push(with / ((before + after) / 2.0));
                before = after;
            }
        }
        Ok(())
    }

    /// Requests that are answered in a second, now.
    fn slice(&self) -> Result<f64> {
        let (began, before) = (Instant::now(), self.load.requests()?);
        std::thread::sleep(SLICE);
        let took = began.elapsed().as_secs_f64();
        Ok((self.load.requests()? - before) as f64 / took)
    }

    /// Starts a contender; `None` if it cannot be run here, which only tracer and the floor must.
    fn start(&mut self, workload: Workload, contender: Contender) -> Result<Option<Active>> {
        let figures = self.figures.entry((workload, contender)).or_default();
        if figures.failed.is_some() {
            return Ok(None);
        }
        eprintln!("bench: {workload:?}: {}", contender.name());
        match self.starter.start(contender, Reading::Lines, &[]) {
            Ok(active) => Ok(Some(active)),
            Err(error) if Contender::PEERS.contains(&contender) => {
                figures.failed = Some(format!("{error:#}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn end(&mut self, workload: Workload, contender: Contender, active: Active) -> Result<()> {
        let figures = self.figures.entry((workload, contender)).or_default();
        if contender.is_process() {
            let (now, _) = resident(active.pid())?;
            figures.resident = figures.resident.max(Some(now));
            figures.maps = Some(Maps::of(active.pid())?.bytes);
        }
        let ended = active.stop(contender)?;
        figures.lost += ended.lost;
        figures.killed |= ended.killed;
        Ok(())
    }

    /// From the kernel's record to the line on stdout, at the highest rate, sorted: the round with the least 99 %.
    fn latency(&mut self) -> Result<Vec<u32>> {
        let mut rounds = Vec::new();
        for _ in 0..3 {
            eprintln!("bench: latency");
            let active = self.starter.start(Contender::Json, Reading::Latency, &[])?;
            self.load.run(Workload::Short, 2)?;
            std::thread::sleep(SETTLE);
            rounds.push(active.stop(Contender::Json)?.latencies_us);
        }
        rounds.retain(|round| !round.is_empty());
        rounds.into_iter().min_by_key(|round| percentile(round, 99)).context("no record came")
    }

    /// Of one core, at rest: the least of some periods.
    fn idle(&mut self) -> Result<f64> {
        eprintln!("bench: idle");
        const PERIOD: Duration = Duration::from_secs(4);
        let _counting = Counting::start()?;
        let active = self.starter.start(Contender::Text, Reading::Lines, &[])?;
        std::thread::sleep(SETTLE);
        let mut least = None;
        for _ in 0..3 {
            let before = active.usage()?;
            std::thread::sleep(PERIOD);
            let usage = active.usage()?.since(&before);
            let share = (usage.runs().ns + usage.cpu_ns) as f64 / PERIOD.as_nanos() as f64;
            if lower(&mut least, share) {
                let runs = usage.runs().count as f64 / PERIOD.as_secs_f64();
                self.report.value("idle", json!({ "core_share": share, "program_runs_per_s": runs }));
            }
        }
        active.stop(Contender::Text)?;
        least.context("no period")
    }

    fn judge(&mut self, latencies_us: &[u32], resident: u64, idle: f64) {
        let none = Figures::default();
        let of = |workload, contender| self.figures.get(&(workload, contender)).unwrap_or(&none);
        let ratio = |one: Option<f64>, other: Option<f64>| Some(one? / other?);
        let (floor, text) = (of(Workload::Short, Contender::Floor), of(Workload::Short, Contender::Text));
        let (json, tcplife) = (of(Workload::Short, Contender::Json), of(Workload::Short, Contender::Tcplife));
        let request = |contender| of(Workload::KeepAlive, contender);
        let above = |one: Option<f64>, other: Option<f64>| Some(one? - other?);
        let percentile = |p: usize| percentile(latencies_us, p).map(|us| f64::from(us) / 1e3);
        let lost: u64 = [Contender::Text, Contender::Json]
            .into_iter()
            .flat_map(|contender| {
                [Workload::Short, Workload::KeepAlive, Workload::Cookie, Workload::Bulk]
                    .map(|load| of(load, contender).lost)
            })
            .sum();
        let budgets = [
            Budget::at_most("short connection: BPF, times the floor", ratio(text.bpf_ns, floor.bpf_ns), 3.5, 2),
            Budget::at_most("short connection: BPF, ns", text.bpf_ns, 7_000.0, 0).aim(5_500.0),
            Budget::at_most("short connection: daemon, text, ns", text.daemon_ns, 1_500.0, 0).aim(900.0),
            Budget::at_most("short connection: daemon, JSON, ns", json.daemon_ns, 2_500.0, 0).aim(1_600.0),
            Budget::at_least("short connection: throughput kept", text.kept(), 0.90, 2).aim(0.94),
            Budget::at_most(
                "short connection: BPF + daemon, as a share of tcplife's",
                ratio(text.total_ns, tcplife.total_ns),
                0.25,
                2,
            ),
            Budget::at_most(
                "keep-alive request: BPF, times the floor",
                ratio(request(Contender::Text).bpf_ns, request(Contender::Floor).bpf_ns),
                3.2,
                2,
            ),
            Budget::at_most("keep-alive request: BPF, ns", request(Contender::Text).bpf_ns, 1_200.0, 0).aim(900.0),
            Budget::at_most("keep-alive request: daemon, ns", request(Contender::Text).daemon_ns, 100.0, 0).aim(50.0),
            Budget::at_least("keep-alive request: throughput kept", request(Contender::Text).kept(), 0.95, 2).aim(0.97),
            Budget::at_most(
                "request with a 2 KiB cookie: BPF, ns",
                of(Workload::Cookie, Contender::Text).bpf_ns,
                2_500.0,
                0,
            )
            .aim(1_800.0),
            Budget::at_most(
                "bulk transfer: BPF, ns for each packet above the floor",
                above(of(Workload::Bulk, Contender::Text).bpf_ns, of(Workload::Bulk, Contender::Floor).bpf_ns),
                60.0,
                0,
            ),
            Budget::at_most("records lost at the highest rate", Some(lost as f64), 0.0, 0),
            Budget::at_most("resident with 100,000 connections open, MB", Some(resident as f64 / 1e6), 30.0, 1),
            Budget::at_most("from record to stdout, 99 %, ms", percentile(99), 20.0, 1),
            Budget::at_most("idle: BPF + daemon, % of one core", Some(idle * 100.0), 0.1, 3),
        ];
        let p50 = percentile(50);
        let latency = format!(
            "## Latency\n\nFrom the kernel's record to the line on stdout, at the highest rate of short connections, over {} \
             records: half within {} ms, 99 % within {} ms.\n",
            latencies_us.len(),
            report::number(p50, 1),
            report::number(percentile(99), 1),
        );
        for budget in budgets {
            self.report.budget(budget);
        }
        self.report.section(latency);
        let seen = json!({ "p50_ms": p50, "p99_ms": percentile(99), "records": latencies_us.len() });
        self.report.value("latency", seen);
    }
}
