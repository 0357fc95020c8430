//! The command line's definition in, completion scripts and man pages out.
//!
//! Both follow the visible subcommands by themselves. EXAMPLES and EXIT STATUS of a page are the ends of `--help`, so there
//! is one text for both. Nothing here looks at the host, or needs privileges.

use std::io::{self, Write};

use clap::CommandFactory as _;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::cli::Cli;

/// Writes the completion script for `shell`.
///
/// # Errors
/// Those of `out`.
pub fn completions(shell: Shell, out: &mut dyn Write) -> io::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tracer", &mut script);
    out.write_all(&script)
}

/// Writes the man page of `tracer`, and after it one for each visible subcommand.
///
/// # Errors
/// Those of `out`.
pub fn man(out: &mut dyn Write) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    page(&command, out)?;
    command.get_subcommands().filter(|sub| !sub.is_hide_set()).try_for_each(|sub| page(sub, out))
}

fn page(command: &clap::Command, out: &mut dyn Write) -> io::Result<()> {
    let man = Man::new(command.clone());
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    if command.get_subcommands().any(|sub| !sub.is_hide_set()) {
        man.render_subcommands_section(out)?;
    }
    let mut roff = Roff::default();
    for line in command.get_after_help().map(ToString::to_string).unwrap_or_default().lines() {
        match line {
            "Examples:" => roff.control("SH", ["EXAMPLES"]).control("nf", []),
            "Exit codes:" => roff.control("fi", []).control("SH", ["EXIT STATUS"]).control("nf", []),
            _ => roff.text([roman(line)]),
        };
    }
    roff.control("fi", []);
    roff.to_writer(out)
}
