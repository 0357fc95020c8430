//! The command: arguments in, exit code out. Events go to stdout, everything else to stderr.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use anstream::{AutoStream, ColorChoice};
use anyhow::{Context as _, Result};
use tracer::alert::Watch;
use tracer::cli::{self, Cli, Command};
use tracer::kernel::Ask;
use tracer::preflight::Refusal;
use tracer::reporter::Wanted;
use tracer::sink::Sink;
use tracer::{broker, demo, descendants, doctor, explain, launcher, manual, record, report, run, snapshot};

fn main() -> ExitCode {
    run::ignore_usr1();
    match start(cli::parse()) {
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
        Command::Report(arguments) => tell(arguments, cli.color.into()),
        Command::Explain { cause } => {
            let styled = styled(cli.color.into());
            print(|out| explain::explain(cause, styled, out))
        }
        Command::Completions { shell } => print(|out| manual::completions(shell, out)),
        Command::Man => print(manual::man),
        Command::Doctor(arguments) => {
            log_to_stderr();
            let code = doctor::run(arguments.json, arguments.strict, styled(cli.color.into()))?;
            // All is written; what a code says of the host is no error.
            std::process::exit(code.into())
        }
        Command::Broker { no_sandbox } => broker::serve(!no_sandbox),
        Command::Launcher { command } => {
            log_to_stderr();
            launcher::serve(&command)
        }
        Command::DemoServer => Ok(demo::serve()?),
        Command::DemoClient { port } => Ok(demo::request_loop(port)?),
    }
}

/// Prints at once. That the reader has gone is success, as it is for `run`.
fn print(write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
    let mut out = io::stdout().lock();
    match write(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot write to stdout"),
        _ => Ok(()),
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
    let filter = arguments.filter.resolve(arguments.duration)?;
    descendants::of(&filter.pids).map_err(Refusal::no_such_process)?;
    let sink = if arguments.json { Sink::json() } else { Sink::text(styled(color)) };
    let mut options = run::Options {
        filters: arguments.filters(),
        ask: Ask {
            comms: arguments.filter.comm.iter().map(|comm| comm.0).collect(),
            states: arguments.states,
            full_target: arguments.full_target,
            close_wait_after: arguments.close_wait_after,
            ring_bytes: arguments.ring_size,
            slots: arguments.slots.unwrap_or_else(Ask::usual_slots),
            ..Ask::of(&filter)
        },
        filter: filter.beyond_kernel(arguments.states),
        duration: arguments.duration,
        sandbox: !arguments.no_sandbox,
        strict: arguments.strict,
        exec: arguments.exec,
        ends_children: arguments.demo,
        wanted: Wanted {
            every: arguments.every,
            summary_only: arguments.summary_only,
            watch: Watch { time_wait: arguments.alert_time_wait, rate: arguments.alert_rate, launcher: None },
        },
        sink,
        record: arguments.record.map(|path| record::Target { path, overwrite: arguments.overwrite }),
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

fn tell(arguments: cli::Report, color: ColorChoice) -> Result<()> {
    let filter = arguments.filter.on_record()?;
    let filters = arguments.filter.shown();
    let output = match arguments.html {
        Some(path) => report::Output::Html { path, overwrite: arguments.overwrite },
        None if arguments.json => report::Output::Print(Sink::json()),
        None => report::Output::Print(Sink::text(styled(color))),
    };
    let summary_only = arguments.summary_only;
    report::report(report::Options { recording: arguments.recording, filter, filters, summary_only, output })
}

fn styled(color: ColorChoice) -> bool {
    match color {
        ColorChoice::Never => false,
        ColorChoice::Auto => io::stdout().is_terminal() && AutoStream::choice(&io::stdout()) != ColorChoice::Never,
        _ => true,
    }
}
