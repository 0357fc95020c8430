//! The command: arguments in, exit code out. Events go to stdout, everything else to stderr.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use anstream::{AutoStream, ColorChoice};
use anyhow::{Context as _, Result};
use clap::Parser as _;
use tracer::cli::{self, Cli, Command};
use tracer::kernel::Ask;
use tracer::preflight::Refusal;
use tracer::sink::Sink;
use tracer::{demo, descendants, doctor, run, snapshot};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to be done where stderr is closed, too.
            let _ = writeln!(io::stderr(), "tracer: {error:#}");
            ExitCode::from(run::exit_code(&error))
        }
    }
}

fn start(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Run(arguments) => trace(arguments, cli.color.into()),
        Command::Snapshot(arguments) => {
            log_to_stderr();
            snapshot::run(arguments.json, styled(cli.color.into()))
        }
        Command::Doctor(arguments) => {
            log_to_stderr();
            let code = doctor::run(arguments.json, arguments.strict, styled(cli.color.into()))?;
            // All is written; what a code says of the host is no error.
            std::process::exit(code.into())
        }
        Command::DemoServer => Ok(demo::serve()?),
        Command::DemoClient { port } => Ok(demo::request_loop(port)?),
    }
}

fn log_to_stderr() {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .parse_default_env()
        .format(|out, record| writeln!(out, "tracer: {}", record.args()))
        .init();
}

fn trace(arguments: cli::Run, color: ColorChoice) -> Result<()> {
    log_to_stderr();
    // Before anything else, so that a mistyped number needs no privileges to be found.
    descendants::of(&arguments.pid).map_err(Refusal::no_such_process)?;
    let sink = if arguments.json { Sink::json() } else { Sink::text(styled(color)) };
    let mut options = run::Options {
        filters: arguments.filters(),
        ask: Ask {
            pids: arguments.pid,
            ports: arguments.port,
            comms: arguments.comm.iter().map(|comm| comm.0).collect(),
            states: arguments.states,
            full_target: arguments.full_target,
            close_wait_after: arguments.close_wait_after,
            ring_bytes: arguments.ring_size,
        },
        duration: arguments.duration,
        sink,
    };
    // Held until tracing has ended.
    let demo = arguments.demo.then(demo::start).transpose().context("the demo did not start")?;
    if let Some(demo) = &demo
        && !options.ask.ports.is_empty()
    {
        options.ask.ports.push(demo.port());
    }
    run::run(options)
}

fn styled(color: ColorChoice) -> bool {
    match color {
        ColorChoice::Never => false,
        ColorChoice::Auto => io::stdout().is_terminal() && AutoStream::choice(&io::stdout()) != ColorChoice::Never,
        _ => true,
    }
}
