//! The project's own commands: `cargo xtask SUBCOMMAND`, one file for each.

mod bench;
mod bpf;
mod cross;
mod deny;
mod ebpf;
mod fuzz;
mod hidden;
mod lint;
mod network;
mod nginx;
mod oracle;
mod run;
mod soak;
mod test;
mod unit;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, runs and tests tracer", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what tracer costs, beside its peers, and judge it by its budgets; as root
    Bench(bench::Options),
    /// A process of the benchmark, which holds connections open
    #[command(hide = true)]
    Hold { port: u16, count: usize },
    /// Build tracer and run it as root (through sudo if needed); every argument is passed on
    #[command(disable_help_flag = true)]
    Run {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Check that the user side compiles for aarch64; nothing is run there
    Cross,
    /// The same as `run --demo`
    Demo,
    /// Compile the kernel programs into tracer-ebpf/tracer.bpf.o
    Ebpf {
        /// Change nothing: fail if the committed object is not what this source compiles to
        #[arg(long)]
        check: bool,
    },
    /// Licences, sources, duplicates and known weaknesses of all dependencies, by cargo-deny
    Deny,
    /// Run the fuzz targets, one after another: see docs/fuzzing.md
    Fuzz {
        /// How many minutes each runs
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=24 * 60))]
        minutes: u64,
        /// Only these
        targets: Vec<String>,
    },
    /// Formatting and lints, for the host and for the kernel programs
    Lint,
    /// Compare tracer's answers with packet captures, `ss` and the truth, on real servers and clients; as root
    Oracle {
        /// A bounded set: each server once
        #[arg(long)]
        quick: bool,
    },
    /// A mixed load for a long time: does tracer grow, or lose anything? As root
    Soak(soak::Options),
    /// All tests; those with a real kernel run as root (through sudo if needed)
    Test {
        /// Only kernel tests whose name contains this; none of the others
        filter: Option<String>,
    },
    /// The kernel tests on other kernels, under qemu
    Vm {
        /// 5.10 (which tracer must refuse), 6.1, 6.12, 7.2, or all
        #[arg(long, default_value = "6.1")]
        kernel: String,
        /// The demo and fifteen tests
        #[arg(long)]
        quick: bool,
        /// Only tests whose name contains one of these
        #[arg(conflicts_with = "quick")]
        filters: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Bench(options) => bench::bench(&options),
        Command::Hold { port, count } => bench::hold(port, count),
        Command::Cross => cross::cross(),
        Command::Run { args } => run::run(args),
        Command::Demo => run::run(vec!["--demo".into()]),
        Command::Ebpf { check: false } => ebpf::install(),
        Command::Ebpf { check: true } => ebpf::check(),
        Command::Deny => deny::deny(),
        Command::Fuzz { minutes, targets } => fuzz::fuzz(minutes, &targets),
        Command::Lint => lint::lint(),
        Command::Oracle { quick } => oracle::oracle(quick),
        Command::Soak(options) => soak::soak(&options),
        Command::Test { filter } => test::test(filter.as_deref()),
        Command::Vm { kernel, quick, filters } => vm::vm(&kernel, quick, &filters),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
