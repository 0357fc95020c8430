//! What this host must have, checked before BPF is touched.
//!
//! Each refusal names the cause and the remedy, and has its own exit code. What is missing but can be done without is
//! not a refusal: it is listed in the `start` event. Each message reads "what it means; how to mend it". `tracer run` asks
//! for all of it at once by [`check`], `tracer doctor` step by step.

use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::offsets::{Layout, Types, VMLINUX};
use crate::time_namespace;

/// Why tracer does not start, and what to do about it.
#[derive(Debug)]
pub struct Refusal {
    /// The exit code.
    pub code: u8,
    /// Cause and remedy.
    pub message: String,
}

impl Refusal {
    /// `--pid` names a process that does not exist; or that is not to be seen.
    pub fn no_such_process(pid: u32) -> Self {
        let exists = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .is_some_and(|pid| !matches!(rustix::process::test_kill_process(pid), Err(Errno::SRCH)));
        match processes() {
            Err(hidden) if exists => Self { code: exit::PRIVILEGES, message: format!("--pid {pid}: {hidden}") },
            _ => Self { code: exit::USAGE, message: format!("--pid {pid}: there is no such process") },
        }
    }

    /// `--pid` asks for more processes than are followed.
    pub fn too_many_processes(there_are: usize, most: u32) -> Self {
        let message = format!(
            "--pid: there are {there_are} processes with all descendants, and {most} at most are followed; ask for some of them"
        );
        Self { code: exit::USAGE, message }
    }

    /// The file that something is to be written to cannot be made.
    pub fn cannot_make(path: &Path, error: &std::io::Error) -> Self {
        Self { code: exit::FAILURE, message: format!("cannot make {}: {error}", path.display()) }
    }

    /// All is printed, but not every close is accounted for; with `--strict` only.
    pub fn unaccounted(why: &str) -> Self {
        Self { code: exit::UNACCOUNTED, message: format!("--strict: {why}") }
    }

    /// Tracing went on, but writing the recording failed, which was said then.
    pub fn recording_incomplete() -> Self {
        Self { code: exit::INCOMPLETE, message: "the recording is incomplete".to_owned() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

/// Exit codes; `--help` and the README list them.
pub mod exit {
    /// Ended: by a signal, after `--duration`, or because stdout was closed.
    pub const SUCCESS: u8 = 0;
    /// Failed while running.
    pub const FAILURE: u8 = 1;
    /// Bad usage; also a process id that does not exist.
    pub const USAGE: u8 = 2;
    /// Not enough privileges.
    pub const PRIVILEGES: u8 = 3;
    /// The kernel lacks something that is needed.
    pub const KERNEL: u8 = 4;
    /// The kernel has no BTF.
    pub const BTF: u8 = 5;
    /// No cgroup-v2 hierarchy can be used.
    pub const CGROUP: u8 = 6;
    /// The kernel refused for security policy.
    pub const POLICY: u8 = 7;
    /// A recording is incomplete: it could not be written to its end, or not be read to it.
    pub const INCOMPLETE: u8 = 8;
    /// `tracer doctor --strict`: it works, but not all of it.
    pub const DEGRADED: u8 = 9;
    /// `tracer run --strict`: not every close is accounted for.
    pub const UNACCOUNTED: u8 = 10;
}

/// What was found.
pub struct Host {
    /// The root of the cgroup-v2 hierarchy.
    pub cgroup: OwnedFd,
    /// What this kernel's types tell.
    pub layout: Layout,
    /// What is missing and what that costs.
    pub degraded: Vec<String>,
}

/// The capabilities without which nothing works; `CAP_SYS_ADMIN` holds the first two.
const NEEDED: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN];

/// What the programs need of the kernel: a helper, what it is for, and the version that brought it.
const HELPERS: [(&str, &str, &str); 2] = [
    ("BPF_FUNC_sock_from_file", "socket storage in tracing programs (bpf_sk_storage_get, bpf_sock_from_file)", "5.11"),
    ("BPF_FUNC_loop", "bpf_loop", "5.17"),
];

/// Checks everything in the order in which one would mend it.
///
/// # Errors
/// The first thing that is missing.
pub fn check() -> Result<Host, Refusal> {
    let mut degraded = Vec::new();
    privileges(&mut degraded)?;
    let layout = kernel()?;
    let cgroup = cgroup(&mut degraded)?;
    degraded.extend(pid_namespace().err());
    degraded.extend(time_namespace().err());
    degraded.extend(processes().err());
    jit()?;
    Ok(Host { cgroup, layout, degraded })
}

/// Whether process ids are the host's.
///
/// # Errors
/// What it costs that they are not.
pub(crate) fn pid_namespace() -> Result<(), String> {
    // Without `/proc` that is not known; `processes` says so.
    if in_initial_pid_namespace() || !Path::new("/proc/self/ns/pid").exists() {
        return Ok(());
    }
    Err("not in the host's pid namespace: process ids are the host's, and exe, cgroup and container are not looked up; of \
         connections that are open already only those of its own namespace have a process; run tracer on the host (in a \
         container: --pid=host)"
        .to_owned())
}

/// Whether it is known how far the clocks are from the host's.
///
/// # Errors
/// What it costs that it is not.
pub(crate) fn time_namespace() -> Result<(), String> {
    if time_namespace::is_known() {
        return Ok(());
    }
    Err("in a time namespace that is another one than that of its children, so that its shifts cannot be read: dates are off \
         by them, lines may come late, and --pid finds no process; run tracer on the host, or once more from within \
         (unshare --fork tracer run)"
        .to_owned())
}

/// Whether `/proc` shows the processes, those of other users, too.
///
/// # Errors
/// What it costs that it does not.
pub(crate) fn processes() -> Result<(), String> {
    if !Path::new("/proc/self/stat").exists() {
        return Err("/proc is not mounted: exe, cgroup and container of processes, --pid, and what is left of a \
                    connection whose peer has not closed its end are unknown; mount -t proc proc /proc"
            .to_owned());
    }
    // `hidepid` shows other users' processes to nobody but `CAP_SYS_PTRACE` and a group. A security module may keep the first
    // process even from those; the second is the kernel's, on the host.
    let seen = |pid: u32| fs::read(format!("/proc/{pid}/stat")).is_ok();
    if !(seen(1) || in_initial_pid_namespace() && seen(2)) {
        return Err(
            "/proc hides processes of other users (hidepid): their exe, cgroup and container are unknown, and \
                    --pid does not find them; run tracer as root, or mount -o remount,hidepid=0 /proc"
                .to_owned(),
        );
    }
    Ok(())
}

/// Says whether the kernel compiles BPF programs: 0 if it does not. Only in the first network namespace, and for root.
pub(crate) const JIT: &str = "/proc/sys/net/core/bpf_jit_enable";
const COMPILE: &str = "sysctl -w net.core.bpf_jit_enable=1";

/// Whether the kernel compiles BPF programs; false: not known, as [`JIT`] cannot be read. What calls `bpf_loop` it does not
/// interpret (<https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/verifier.c#L20245>).
///
/// # Errors
/// It does not.
pub(crate) fn jit() -> Result<bool, Refusal> {
    let Ok(setting) = fs::read_to_string(JIT) else { return Ok(false) };
    if setting.trim() != "0" {
        return Ok(true);
    }
    let release = kernel_release();
    let message =
        format!("kernel {release} does not compile BPF programs, and interprets none with bpf_loop; {COMPILE}");
    Err(Refusal { code: exit::KERNEL, message })
}

/// What it costs that `sock_diag` does not answer.
pub(crate) fn without_sock_diag(error: &std::io::Error) -> String {
    format!(
        "sock_diag for TCP does not answer ({error}): what is left of a connection whose peer has not closed its end is \
         unknown; modprobe tcp_diag"
    )
}

/// What it costs (`cost`) that `hook` was refused.
pub(crate) fn without_hook(hook: &str, cost: &str, error: &anyhow::Error) -> String {
    let (why, remedy) = match denied(error).then(policy) {
        Some((policy, remedy)) => (format!("; {policy}"), remedy),
        None => (String::new(), "run a kernel that has it"),
    };
    // The verifier's report, if there is one, is no part of this.
    let error = one_line(&format!("{error:#}"));
    format!("without {hook} {cost} ({error}{why}); {remedy}")
}

/// The first line, without what would read as the end of what it means.
fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().replace("; ", ", ")
}

/// Whether this process may load programs and attach them; what it may not do besides is appended to `degraded`.
///
/// # Errors
/// It may not.
pub(crate) fn privileges(degraded: &mut Vec<String>) -> Result<(), Refusal> {
    let refuse =
        |what: String| Refusal { code: exit::PRIVILEGES, message: format!("{what}; run it as root: sudo tracer run") };
    let have = caps::read(None, CapSet::Effective)
        .map_err(|error| refuse(format!("cannot read the capabilities of this process ({error})")))?;
    let has = |capability: &Capability| {
        have.contains(capability)
            || (*capability != Capability::CAP_NET_ADMIN && have.contains(&Capability::CAP_SYS_ADMIN))
    };
    let missing: Vec<String> = NEEDED.iter().filter(|needed| !has(needed)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        return Err(refuse(format!("tracer needs root; this process lacks {}", missing.join(", "))));
    }
    let stays_root = [Capability::CAP_SETUID, Capability::CAP_SETGID].iter().any(|needed| !have.contains(needed));
    if rustix::process::geteuid().is_root() && stays_root {
        let what = "without CAP_SETUID and CAP_SETGID tracer stays root, though without capabilities";
        degraded.push(format!("{what}; run it with them, or as another user (packaging/tracer.service)"));
    }
    for (capability, cost) in [
        (Capability::CAP_SYS_ADMIN, "what is left of a connection in another network namespace is unknown"),
        (Capability::CAP_SYS_PTRACE, "exe and network namespace of other users' processes are not looked up"),
    ] {
        if !have.contains(&capability) {
            degraded.push(format!("without {capability} {cost}; run tracer as root"));
        }
    }
    Ok(())
}

/// The kernel's release, as `uname -r`.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Distributions carry features back to older versions: so the kernel is asked for what is needed, not for its number.
///
/// # Errors
/// It has no BTF, or lacks something.
pub(crate) fn kernel() -> Result<Layout, Refusal> {
    let release = kernel_release();
    if !Path::new(VMLINUX).exists() {
        return Err(Refusal {
            code: exit::BTF,
            message: format!(
                "kernel {release} has no BTF ({VMLINUX} is missing); tracer needs a kernel that is built with \
                 CONFIG_DEBUG_INFO_BTF=y, as all large distributions' kernels since 5.11 are, and /sys mounted"
            ),
        });
    }
    let refuse = |code, error: anyhow::Error| Refusal { code, message: format!("kernel {release}: {error:#}") };
    let types = Types::read().map_err(|error| refuse(exit::BTF, error))?;
    let have = types.helpers(&HELPERS.map(|(helper, ..)| helper)).map_err(|error| refuse(exit::BTF, error))?;
    let missing: Vec<_> = HELPERS.iter().filter(|(helper, ..)| !have.contains(helper)).collect();
    if let Some((.., needs)) = missing.last() {
        let what: Vec<_> = missing.iter().map(|(_, what, since)| format!("{what} (Linux {since})")).collect();
        return Err(Refusal {
            code: exit::KERNEL,
            message: format!("kernel {release} lacks {}; tracer needs Linux {needs} or later", what.join(" and ")),
        });
    }
    let mut layout = types.layout().map_err(|error| refuse(exit::KERNEL, error))?;
    layout.bears_storage_walk &= version(&release).is_some_and(|version| version < (7, 0));
    Ok(layout)
}

/// The state of kernel lockdown, for the explanation of a refusal; `None` where the kernel has none.
pub(crate) fn lockdown() -> Option<String> {
    let modes = fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    let (_, rest) = modes.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    (mode != "none").then(|| mode.to_owned())
}

/// Explains what the kernel refused when the programs were loaded and attached.
pub fn explain(error: anyhow::Error) -> Refusal {
    let error = match error.downcast::<Refusal>() {
        Ok(refusal) => return refusal,
        Err(error) => error,
    };
    let release = kernel_release();
    if denied(&error) {
        let (policy, remedy) = policy();
        return Refusal {
            code: exit::POLICY,
            message: format!("kernel {release} refused: {error:#}\n{policy}; {remedy}"),
        };
    }
    // In the verifier's report, where `JIT` could not be read before.
    let interprets = error.chain().any(|cause| cause.to_string().contains("not allowed in non-JITed programs"));
    let remedy = if interprets { format!("\nit does not compile BPF programs; {COMPILE}") } else { String::new() };
    Refusal { code: exit::KERNEL, message: format!("kernel {release} refused: {error:#}{remedy}") }
}

/// Whether it was refused for security policy, and not by the verifier, whose answer is the same error with a report.
fn denied(error: &anyhow::Error) -> bool {
    let denied = error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .and_then(Errno::from_io_error)
            .is_some_and(|errno| matches!(errno, Errno::PERM | Errno::ACCESS))
    });
    denied && !error.chain().any(|cause| cause.to_string().contains("processed "))
}

/// Which policy that is, as far as it can be told, and what to do about it. Lockdown is the host's, wherever tracer runs; but that
/// there is one does not say that it was the one that refused.
fn policy() -> (String, &'static str) {
    match lockdown() {
        None => (
            "a security policy (LSM, seccomp, a container's profile) forbids it".to_owned(),
            "run tracer on the host, outside of it",
        ),
        Some(mode) => (
            format!(
                "kernel lockdown is in {mode} mode, or another security policy (seccomp, a container's profile) forbids it"
            ),
            "run tracer on the host, outside of a container, or boot without lockdown (on many distributions: without Secure Boot)",
        ),
    }
}

/// Whether process ids here are the host's: the initial pid namespace has a fixed inode number
/// (`PROC_PID_INIT_INO`, `include/linux/proc_ns.h`).
pub(crate) fn in_initial_pid_namespace() -> bool {
    fs::metadata("/proc/self/ns/pid").is_ok_and(|meta| meta.ino() == 0xEFFF_FFFC)
}

/// Opens the root of the cgroup-v2 hierarchy: where it is mounted, or through a detached mount of our own, which needs no
/// mount point and vanishes with its descriptor.
///
/// # Errors
/// There is none, and none can be mounted.
pub(crate) fn cgroup(degraded: &mut Vec<String>) -> Result<OwnedFd, Refusal> {
    let refuse = |what: String| Refusal {
        code: exit::CGROUP,
        message: format!(
            "no cgroup-v2 hierarchy can be used: {what}; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified"
        ),
    };
    // Without `/proc` it is not known where one is mounted.
    let mounts = mountinfo();
    let open =
        |path: &Path| rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let cgroup = match mounted(&mounts).iter().find_map(|path| open(path).ok().filter(is_root)) {
        Some(cgroup) => cgroup,
        None => detached().map_err(|error| refuse(format!("none is mounted, and none can be ({error})")))?,
    };
    if !is_root(&cgroup) {
        degraded.push(
            "in a cgroup namespace: only the traffic of its own cgroups is seen; run tracer on the host (in a container: \
             --cgroupns=host)"
                .to_owned(),
        );
    }
    Ok(cgroup)
}

/// The root directory of the hierarchy has the first inode number of its kernfs; a cgroup namespace's root has another.
fn is_root(cgroup: &OwnedFd) -> bool {
    rustix::fs::fstat(cgroup).is_ok_and(|stat| stat.st_ino == 1)
}

/// Where cgroup-v2 hierarchies are mounted from their root, by `/proc/self/mountinfo`.
pub(crate) fn mounted(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            (after.split(' ').next()? == "cgroup2").then_some(())?;
            let mut fields = before.split(' ').skip(3);
            let (root, at) = (fields.next()?, fields.next()?);
            (root == "/").then(|| PathBuf::from(unescape(at)))
        })
        .collect()
}

/// `/proc/self/mountinfo`; empty without `/proc`. A mount point may have any bytes (users may mount, with FUSE): one that is
/// no UTF-8 must not hide the others.
pub(crate) fn mountinfo() -> String {
    String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap_or_default()).into_owned()
}

/// Undoes the octal escapes of blanks in `mountinfo`.
pub(crate) fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

fn detached() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    openat(&mount, ".", OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mounts_of_cgroup_v2_roots() {
        let mountinfo = "\
26 24 0:23 / /sys/fs/cgroup ro,nosuid shared:7 - tmpfs tmpfs ro,mode=755
27 26 0:24 / /sys/fs/cgroup/unified rw,nosuid shared:8 - cgroup2 cgroup2 rw
28 26 0:25 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu
29 26 0:24 /system.slice /mnt/part rw - cgroup2 cgroup2 rw
30 26 0:24 / /mnt/with\\040blank rw master:1 - cgroup2 none rw";
        assert_eq!(mounted(mountinfo), [PathBuf::from("/sys/fs/cgroup/unified"), PathBuf::from("/mnt/with blank")]);
        assert_eq!(mounted("garbage\n\n - cgroup2"), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_refusal_by_policy_is_told_from_one_by_the_verifier() {
        let denied = || anyhow::Error::from(std::io::Error::from_raw_os_error(1));
        assert_eq!(explain(denied().context("bpf_prog_load failed")).code, exit::POLICY);
        assert_eq!(explain(anyhow::anyhow!("processed 12 insns (limit 1000000)")).code, exit::KERNEL);
        assert_eq!(explain(denied().context("processed 12 insns")).code, exit::KERNEL);
    }
}
