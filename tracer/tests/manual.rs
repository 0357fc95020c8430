//! Completions and man pages, as bash and man read them. No root.

use std::process::{Command, Output, Stdio};

use clap::CommandFactory as _;
use tracer::cli::Cli;

fn succeed(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().expect("it starts");
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8_lossy(&stdout).into_owned()
}

const TRACER: &str = env!("CARGO_BIN_EXE_tracer");

#[test]
fn bash_completes_a_subcommand() {
    let script = "eval \"$($0 completions bash)\"
        COMP_WORDS=(tracer ru) COMP_CWORD=1; _tracer tracer ru tracer; echo \"${COMPREPLY[@]}\"";
    assert_eq!(succeed(Command::new("bash").args(["-c", script, TRACER])).trim(), "run");
}

#[test]
fn every_visible_subcommand_has_a_page_with_its_sections() {
    let page = succeed(Command::new(TRACER).arg("man"));
    let pages = 1 + Cli::command().get_subcommands().filter(|command| !command.is_hide_set()).count();
    assert!(pages > 4);
    assert_eq!(page.matches(".TH ").count(), pages, "{page}");
    for section in ["NAME", "SYNOPSIS", "EXAMPLES", "\"EXIT STATUS\""] {
        assert_eq!(page.matches(&format!(".SH {section}\n")).count(), pages, "{section}: {page}");
    }
    assert!(!page.contains("demo-server") && !page.contains("demo-client"), "{page}");
}
