//! `tracer doctor`: what this host has and lacks for `tracer run`, and how to mend that.
//!
//! What comes in: the checks of `preflight`, and each hook, attached for real and detached at once. What goes out: one
//! [`Report`], as text or as one JSON object, and an exit code: that of the refusal which `tracer run` would end with. The
//! checks are `run`'s own, so that both say the same. It traces nothing, changes nothing, and leaves nothing behind.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};

use anstyle::{AnsiColor, Style};
use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::Serialize;

use crate::kernel::{self, Ask, Without};
use crate::offsets::VMLINUX;
use crate::preflight::{self, JIT, Refusal, exit};
use crate::sandbox;
use crate::sink::escape::fit;
use crate::sink::json;
use crate::time_wait::SockDiag;

/// What was found: the one JSON object of `tracer doctor --json`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename = "doctor")]
pub struct Report {
    /// When it was finished.
    pub time: Timestamp,
    /// Version of tracer.
    pub version: &'static str,
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Host name.
    pub host: String,
    /// What `tracer run` would do here.
    pub verdict: Verdict,
    /// With which code this ends: 0; 3 to 7 as `tracer run` would; 9 if degraded, with `--strict`.
    pub exit_code: u8,
    /// What was looked at, in the order in which one would mend it.
    pub findings: Vec<Finding>,
}

/// What `tracer run` would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Trace, and all of it works.
    Works,
    /// Trace, and say what is not known.
    Degraded,
    /// Refuse.
    Refused,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What: a hook by its name, or one of a fixed set of words.
    pub name: &'static str,
    /// How it is.
    pub status: Status,
    /// What that means. May hold bytes that others chose (paths): escape before showing.
    pub means: String,
    /// How to mend it; `null` where there is nothing to be mended, or no way is known.
    pub mend: Option<String>,
}

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Tracing works without it, but not all of it.
    Degraded,
    /// Without it `tracer run` refuses.
    Missing,
    /// It was not tried, because something before it is missing; or it cannot be told.
    Unknown,
}

impl Finding {
    fn ok(name: &'static str, means: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, means: means.into(), mend: None }
    }

    fn unknown(name: &'static str, means: impl Into<String>) -> Self {
        Self { name, status: Status::Unknown, means: means.into(), mend: None }
    }

    /// From a message of `preflight`: "what it means; how to mend it".
    fn bad(name: &'static str, status: Status, message: &str) -> Self {
        // A verifier's report is for a bug report, and `tracer run` prints it.
        let message: Vec<&str> = message.lines().filter(|line| !line.trim().is_empty()).collect();
        let message = match message[..] {
            [first, .., last] if last.contains("; ") => format!("{first}, {last}"),
            [first, ..] => first.to_owned(),
            [] => String::new(),
        };
        let (means, mend) = match message.rsplit_once("; ") {
            Some((means, mend)) => (means.to_owned(), Some(mend.to_owned())),
            None => (message, None),
        };
        Self { name, status, means, mend }
    }
}

/// What has been found up to now.
#[derive(Default)]
struct Findings {
    list: Vec<Finding>,
    /// Of the first thing that is missing: `tracer run` ends with it.
    refusal: Option<u8>,
}

impl Findings {
    fn push(&mut self, finding: Finding) {
        self.list.push(finding);
    }

    fn missing(&mut self, name: &'static str, refusal: &Refusal) {
        self.refusal.get_or_insert(refusal.code);
        self.push(Finding::bad(name, Status::Missing, &refusal.message));
    }

    /// Nothing is wrong with it, or each of `degraded`.
    fn checked(&mut self, name: &'static str, degraded: &[String], means: impl Into<String>) {
        if degraded.is_empty() {
            self.push(Finding::ok(name, means));
        }
        self.list.extend(degraded.iter().map(|message| Finding::bad(name, Status::Degraded, message)));
    }
}

/// Looks at the host and prints what was found to stdout; answers the exit code. `strict`: degraded is not 0.
/// `styled`: with the escape sequences of a terminal.
///
/// # Errors
/// Stdout cannot be written to. That it is closed is none.
pub fn run(as_json: bool, strict: bool, styled: bool) -> Result<u8> {
    let report = examine(strict);
    let mut out = Vec::new();
    if as_json {
        json::append(&mut out, &report)?;
    } else {
        out.extend_from_slice(text(&report, styled).as_bytes());
    }
    let mut stdout = io::stdout().lock();
    match stdout.write_all(&out).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot write to stdout"),
        _ => Ok(report.exit_code),
    }
}

/// Looks at the host.
pub fn examine(strict: bool) -> Report {
    examine_with(&kernel::hooks(true), strict)
}

/// The same with other hooks than those that tracing takes.
pub fn examine_with(hooks: &[kernel::Hook], strict: bool) -> Report {
    let mut findings = Findings::default();
    let mut degraded = Vec::new();
    match preflight::privileges(&mut degraded) {
        Ok(()) => findings.checked("capabilities", &degraded, "all that it uses"),
        Err(refusal) => findings.missing("capabilities", &refusal),
    }

    let types = format!("struct layouts by {VMLINUX}");
    let layout = preflight::kernel();
    match &layout {
        Ok(_) => {
            findings.push(Finding::ok("btf", types));
            findings.push(Finding::ok("kernel", "it has the BPF helpers and struct members that are needed"));
        }
        Err(refusal) if refusal.code == exit::BTF => {
            findings.missing("btf", refusal);
            findings.push(Finding::unknown("kernel", "without BTF it is not known what it can do"));
        }
        Err(refusal) => {
            findings.push(Finding::ok("btf", types));
            findings.missing("kernel", refusal);
        }
    }

    degraded.clear();
    let cgroup = preflight::cgroup(&mut degraded);
    match &cgroup {
        Ok(_) => findings.checked("cgroup2", &degraded, "the root of the hierarchy can be opened"),
        Err(refusal) => findings.missing("cgroup2", refusal),
    }
    let check = |result: Result<(), String>| result.err().into_iter().collect::<Vec<_>>();
    findings.checked("pid_namespace", &check(preflight::pid_namespace()), "process ids are the host's");
    findings.checked(
        "time_namespace",
        &check(preflight::time_namespace()),
        "how far clocks are from the host's is known",
    );
    findings.checked("proc", &check(preflight::processes()), "/proc shows all processes");
    match preflight::jit() {
        Err(refusal) => findings.missing("jit", &refusal),
        Ok(true) => findings.push(Finding::ok("jit", "the kernel compiles BPF programs")),
        Ok(false) => findings.push(Finding::unknown("jit", format!("{JIT} is not to be read here"))),
    }
    findings.push(lockdown());
    // What is missing costs no answer: tracer is less confined then.
    let confinement = sandbox::support();
    findings.checked("sandbox", &confinement.missing(), format!("tracer confines itself with {confinement}"));
    if fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").is_ok_and(|text| text.trim() == "1") {
        findings.push(Finding {
            mend: Some("sysctl -w kernel.bpf_stats_enabled=0".to_owned()),
            ..Finding::ok("bpf_stats", "on: each run of a program costs some 60 ns more")
        });
    }

    match (&layout, &cgroup, findings.refusal) {
        (Ok(layout), Ok(cgroup), None) => {
            let ask = Ask { ring_bytes: 1 << 16, ..Ask::default() };
            match kernel::try_each(hooks, &ask, cgroup, layout) {
                Ok(tried) => {
                    for (hook, tried) in hooks.iter().zip(tried) {
                        findings.hook(hook, tried);
                    }
                }
                Err(error) => {
                    findings.missing("maps", &preflight::explain(error));
                    hooks.iter().for_each(|hook| findings.push(Finding::unknown(hook.name, "not tried")));
                }
            }
        }
        _ => hooks.iter().for_each(|hook| findings.push(Finding::unknown(hook.name, "not tried"))),
    }
    // It needs no privileges.
    let answer = SockDiag::new().unwrap_or_else(|_| SockDiag::unable()).probe();
    let degraded = check(answer.map_err(|error| preflight::without_sock_diag(&error)));
    findings.checked("sock_diag", &degraded, "the kernel says what is left of a connection");

    let is_degraded = findings.list.iter().any(|finding| finding.status == Status::Degraded);
    let (verdict, exit_code) = match findings.refusal {
        Some(code) => (Verdict::Refused, code),
        None if is_degraded => (Verdict::Degraded, if strict { exit::DEGRADED } else { exit::SUCCESS }),
        None => (Verdict::Works, exit::SUCCESS),
    };
    Report {
        time: Timestamp::now(),
        version: env!("CARGO_PKG_VERSION"),
        kernel: preflight::kernel_release(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        verdict,
        exit_code,
        findings: findings.list,
    }
}

impl Findings {
    fn hook(&mut self, hook: &kernel::Hook, tried: Result<Option<&'static str>>) {
        let name = hook.name;
        match (tried, hook.without) {
            (Ok(None), _) => self.push(Finding::ok(name, "attached, and detached again")),
            (Ok(Some(cost)), _) => self.push(Finding::bad(name, Status::Degraded, cost)),
            (Err(error), Without::Refused) => self.missing(name, &preflight::explain(error)),
            (Err(error), Without::RefusedWithPid) => {
                let message = preflight::without_hook(name, "--pid is refused", &error);
                self.push(Finding::bad(name, Status::Degraded, &message));
            }
            (Err(error), Without::Degraded(cost)) => {
                let message = preflight::without_hook(name, cost, &error);
                self.push(Finding::bad(name, Status::Degraded, &message));
            }
        }
    }
}

/// Never a fault by itself: the hooks tell what it forbids.
fn lockdown() -> Finding {
    match preflight::lockdown() {
        None => Finding::ok("lockdown", "none"),
        Some(mode) => Finding::ok("lockdown", format!("{mode} mode: whether it forbids a hook, the hooks below tell")),
    }
}

const STATUS_WIDTH: usize = 10;
const NAME_WIDTH: usize = 29;

/// One line for each finding, and the verdict.
fn text(report: &Report, styled: bool) -> String {
    let mut out = String::new();
    let style = |out: &mut String, style: Style, text: &str| {
        let _ = if styled { write!(out, "{style}{text}{style:#}") } else { write!(out, "{text}") };
    };
    let (mut degraded, mut missing) = (0, 0);
    for finding in &report.findings {
        let (word, colour) = match finding.status {
            Status::Ok => ("ok", AnsiColor::Green.on_default()),
            Status::Degraded => ("degraded", AnsiColor::Yellow.on_default()),
            Status::Missing => ("missing", AnsiColor::Red.on_default()),
            Status::Unknown => ("unknown", Style::new().dimmed()),
        };
        degraded += usize::from(finding.status == Status::Degraded);
        missing += usize::from(finding.status == Status::Missing);
        style(&mut out, colour, word);
        let _ = write!(out, "{:1$}{2:3$}", "", STATUS_WIDTH - word.len(), finding.name, NAME_WIDTH);
        fit(&mut out, &finding.means, usize::MAX);
        if let Some(mend) = &finding.mend {
            out.push_str("; ");
            fit(&mut out, mend, usize::MAX);
        }
        out.push('\n');
    }
    let (word, colour) = match report.verdict {
        Verdict::Works => ("works", AnsiColor::Green.on_default()),
        Verdict::Degraded => ("works, degraded", AnsiColor::Yellow.on_default()),
        Verdict::Refused => ("refused", AnsiColor::Red.on_default()),
    };
    style(&mut out, colour.bold(), word);
    out.push_str(": tracer ");
    out.push_str(report.version);
    out.push_str(" on Linux ");
    fit(&mut out, &report.kernel, usize::MAX);
    if missing > 0 {
        let _ = write!(out, ", {missing} missing, tracer run would end with exit code {}", report.exit_code);
    }
    if degraded > 0 {
        let _ = write!(out, ", {degraded} degraded");
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(findings: Vec<Finding>, verdict: Verdict, exit_code: u8) -> Report {
        Report {
            time: Timestamp::UNIX_EPOCH,
            version: "0.0.0",
            kernel: "6.12.0".to_owned(),
            host: "host".to_owned(),
            verdict,
            exit_code,
            findings,
        }
    }

    #[test]
    fn a_message_is_split_into_meaning_and_remedy() {
        let of = |message| {
            let finding = Finding::bad("x", Status::Missing, message);
            (finding.means, finding.mend)
        };
        assert_eq!(of("a; b; c"), ("a; b".to_owned(), Some("c".to_owned())));
        assert_eq!(of("only this"), ("only this".to_owned(), None));
        let policy = preflight::explain(std::io::Error::from_raw_os_error(1).into());
        let (means, mend) = of(&policy.message);
        assert!(!means.contains('\n') && means.contains("refused"), "{means}");
        assert_eq!(mend.as_deref(), Some("run tracer on the host, outside of it"));
        // Of the verifier's report only what was refused.
        let verifier = preflight::explain(anyhow::anyhow!("load failed\n0: (b7) r0 = 1; note\nprocessed 12 insns"));
        let (means, mend) = of(&verifier.message);
        assert!(means.ends_with("load failed") && mend.is_none(), "{means}");
    }

    #[test]
    fn the_first_thing_that_is_missing_gives_the_exit_code() {
        let mut findings = Findings::default();
        findings.missing("btf", &Refusal { code: exit::BTF, message: "no BTF; build one".to_owned() });
        findings.missing("cgroup2", &Refusal { code: exit::CGROUP, message: "none; mount one".to_owned() });
        assert_eq!(findings.refusal, Some(exit::BTF));
        assert_eq!(findings.list[1].mend.as_deref(), Some("mount one"));
    }

    #[test]
    fn a_hook_that_is_refused_is_what_tracing_would_make_of_it() {
        let refused =
            |errno| Err(anyhow::Error::from(std::io::Error::from_raw_os_error(errno)).context("cannot attach"));
        let hooks = kernel::hooks(true);
        for (errno, code, mend) in [
            (libc::ENOENT, exit::KERNEL, "run a kernel that has it"),
            (libc::EPERM, exit::POLICY, "run tracer on the host"),
        ] {
            let mut kinds = [0; 3];
            for hook in &hooks {
                let mut findings = Findings::default();
                findings.hook(hook, refused(errno));
                let [finding] = &findings.list[..] else { panic!("{:?}", findings.list) };
                assert_eq!(finding.name, hook.name);
                let (kind, status, refusal, cost) = match hook.without {
                    Without::Refused => (0, Status::Missing, Some(code), "refused"),
                    Without::RefusedWithPid => (1, Status::Degraded, None, "--pid is refused"),
                    Without::Degraded(cost) => (2, Status::Degraded, None, cost),
                };
                kinds[kind] += 1;
                assert_eq!((finding.status, findings.refusal), (status, refusal), "{finding:?}");
                assert!(finding.means.contains(cost) && finding.means.contains("cannot attach"), "{finding:?}");
                // Which kernel has what tracing cannot do without is not known.
                match &finding.mend {
                    None => assert_eq!((status, errno), (Status::Missing, libc::ENOENT), "{finding:?}"),
                    Some(said) => assert!(said.starts_with(mend), "{finding:?}"),
                }
            }
            assert_eq!(kinds, [3, 2, 6]);
        }
        let mut findings = Findings::default();
        hooks.iter().for_each(|hook| findings.hook(hook, Ok(None)));
        assert!(findings.list.iter().all(|finding| finding.status == Status::Ok) && findings.refusal.is_none());
    }

    #[test]
    fn one_line_for_each_finding_and_nothing_hostile() {
        let findings = vec![
            Finding::ok("btf", "found"),
            Finding::bad("cgroup2", Status::Missing, "at /mnt/\x1b[2J\u{202e}x; mount one"),
            Finding::bad("jit", Status::Degraded, "slow; sysctl"),
            Finding::unknown("tp_btf/tcp_rcv_space_adjust", "not tried"),
        ];
        let text = text(&report(findings, Verdict::Refused, 6), false);
        assert_eq!(
            text,
            "ok        btf                          found\n\
             missing   cgroup2                      at /mnt/\\x1b[2J\\u{202e}x; mount one\n\
             degraded  jit                          slow; sysctl\n\
             unknown   tp_btf/tcp_rcv_space_adjust  not tried\n\
             refused: tracer 0.0.0 on Linux 6.12.0, 1 missing, tracer run would end with exit code 6, 1 degraded\n"
        );
    }

    #[test]
    fn json() {
        let report = report(vec![Finding::bad("jit", Status::Degraded, "slow; sysctl")], Verdict::Degraded, 9);
        assert_eq!(
            serde_json::to_value(report).expect("JSON"),
            serde_json::json!({
                "type": "doctor", "time": "1970-01-01T00:00:00Z", "version": "0.0.0", "kernel": "6.12.0", "host": "host",
                "verdict": "degraded", "exit_code": 9,
                "findings": [{ "name": "jit", "status": "degraded", "means": "slow", "mend": "sysctl" }],
            })
        );
    }
}
