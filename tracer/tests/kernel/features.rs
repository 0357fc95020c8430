//! What kernels can do, and since which version: the one list by which a test may pass something over.
//!
//! What comes in: the name of a feature. What goes out: whether this kernel has it. Where it has not, although its version
//! should, the test fails: what is passed over must never look like what was tested. What is passed over is said, in a line
//! that `cargo xtask vm` counts: in the file that `TRACER_TEST_SKIPPED` names, or on stdout.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::{Value, json};
use tracer::sandbox::{self, Support};
use tracer_ebpf::cast_to;

use crate::leftovers::held_by;
use crate::rig::{Listener, Tracer, expect, run, tracer};

/// A feature, as `tracer doctor` names it or as [`lacks`] asks for it, and the Linux that brought it.
const FEATURES: [(&str, (u32, u32)); 21] = [
    ("kernel", (5, 17)),
    ("tp_btf/sched_process_fork", (5, 5)),
    ("tp_btf/sched_process_free", (5, 5)),
    ("tp_btf/tcp_receive_reset", (5, 5)),
    ("tp_btf/tcp_send_reset", (5, 5)),
    ("tp_btf/tcp_rcv_space_adjust", (5, 5)),
    ("tp_btf/sched_process_exit", (5, 5)),
    ("cgroup_skb/ingress", (4, 10)),
    ("cgroup_skb/egress", (4, 10)),
    ("tp_btf/inet_sock_set_state", (5, 5)),
    ("iter/task_file", (5, 8)),
    (STORAGE_WALK, (5, 9)),
    ("sock_diag", (4, 2)),
    (SECCOMP, (4, 14)),
    // The versions of its interface; the last one is the newest that tracer uses.
    ("Landlock (interface 1)", (5, 13)),
    ("Landlock (interface 2)", (5, 19)),
    ("Landlock (interface 3)", (6, 2)),
    ("Landlock (interface 4)", (6, 7)),
    ("Landlock (interface 6)", (6, 12)),
    (MAPS_WITHOUT_CAPABILITY, (5, 19)),
    (CAST, (6, 2)),
];

const SECCOMP: &str = "seccomp";

/// The walk over the storage of all sockets.
pub(crate) const STORAGE_WALK: &str = "iter/bpf_sk_storage_map";

/// The walk over open files, and what it can do with the sockets that it finds.
pub(crate) const OPEN_FILES: &str = "iter/task_file";

/// A process may read its own maps without `CAP_BPF`.
pub(crate) const MAPS_WITHOUT_CAPABILITY: &str = "maps without CAP_BPF";

/// By which the programs cast sockets without a call.
const CAST: &str = "bpf_rdonly_cast";

/// `uname -r`, and its first two numbers.
static RELEASE: LazyLock<(String, (u32, u32))> = LazyLock::new(|| {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let numbers = version(&release);
    (release, numbers)
});

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().expect("a number"));
    let mut next = || numbers.next().expect("a release begins with two numbers");
    (next(), next())
}

/// Whether something that is missing from a kernel of this version may be missing.
fn may_lack(feature: &str, version: (u32, u32)) -> bool {
    let (_, since) = FEATURES.iter().find(|(name, _)| *name == feature).expect("it is in the list");
    // From 7.0 on tracer leaves it alone: it can crash those kernels.
    let left_alone = feature == STORAGE_WALK && version >= (7, 0);
    version < *since || left_alone
}

/// Whether a kernel of this version lacks a feature.
///
/// # Panics
/// It is missing, and must not be.
#[track_caller]
fn is_lacking(feature: &str, found: bool, release: &str, version: (u32, u32)) -> bool {
    assert!(
        found || may_lack(feature, version),
        "this kernel, {release}, lacks {feature}, and is new enough to have it"
    );
    !found
}

/// Whether this kernel lacks a feature, `found` being what was seen of it.
///
/// # Panics
/// It is missing, and must not be.
#[track_caller]
pub(crate) fn lacks(feature: &str, found: bool) -> bool {
    let (release, version) = &*RELEASE;
    let is_refused =
        !found && (feature == STORAGE_WALK && *REFUSES_STORAGE_WALK || feature == OPEN_FILES && *DISTRUSTS_OPEN_FILES);
    if !is_refused && !is_lacking(feature, found, release, *version) {
        return false;
    }
    let thread = std::thread::current();
    let line = format!("skipped: {}: this kernel, {release}, lacks {feature}\n", thread.name().unwrap_or("?"));
    say(&line, std::env::var_os("TRACER_TEST_SKIPPED").as_deref()).expect("it can be said");
    true
}

/// Whether tracer leaves the walk over the storage of all sockets alone on this kernel, for its version.
pub(crate) fn leaves_storage_walk() -> bool {
    may_lack(STORAGE_WALK, RELEASE.1)
}

/// Whether it does without that walk on this kernel. Then it says so on each start.
pub(crate) fn is_without_storage_walk() -> bool {
    leaves_storage_walk() || *REFUSES_STORAGE_WALK
}

/// Whether this kernel is one that refuses any program for that walk (`EPERM`), as some do that are built for guests.
static REFUSES_STORAGE_WALK: LazyLock<bool> = LazyLock::new(|| {
    // r0 = 0; exit
    refusal("bpf_iter_bpf_sk_storage_map", &[0xb7, 0x95]) == Some(libc::EPERM)
});

/// Whether this kernel is one whose helpers do not take what a program has read from an open file (`EACCES`).
static DISTRUSTS_OPEN_FILES: LazyLock<bool> = LazyLock::new(|| {
    let btf = btf_rs::Btf::from_file("/sys/kernel/btf/vmlinux").expect("types");
    let holder = btf.resolve_types_by_name("socket").expect("it has sockets");
    let mut members = holder.iter().filter_map(|found| match found {
        btf_rs::Type::Struct(found) => {
            found.members.iter().find(|member| btf.resolve_name(*member).is_ok_and(|name| name == "sk"))
        }
        _ => None,
    });
    let sk = u64::from(members.next().expect("a socket has one").bit_offset()) / 8;
    // r1 = ctx->file; if (!r1) goto out; r0 = bpf_sock_from_file(r1); if (!r0) goto out;
    // r1 = r0->sk; bpf_get_socket_cookie(r1); out: r0 = 0; exit
    let program = [
        0x79 | 0x11 << 8 | 24 << 16,
        0x15 | 0x01 << 8 | 4 << 16,
        0x85 | 162 << 32,
        0x15 | 2 << 16,
        0x79 | 0x01 << 8 | sk << 16,
        0x85 | 46 << 32,
        0xb7,
        0x95,
    ];
    refusal("bpf_iter_task_file", &program) == Some(libc::EACCES)
});

/// With which error this kernel refuses a program for a walk, which is the function `target`.
fn refusal(target: &str, program: &[u64]) -> Option<i32> {
    /// `BPF_PROG_LOAD`, and the beginning of its `union bpf_attr` (`include/uapi/linux/bpf.h`).
    const LOAD: i32 = 5;
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info_rec_size: u32,
        func_info: u64,
        func_info_cnt: u32,
        line_info_rec_size: u32,
        line_info: u64,
        line_info_cnt: u32,
        attach_btf_id: u32,
    }
    const TRACING: u32 = 26;
    const TRACE_ITER: u32 = 28;
    let btf = btf_rs::Btf::from_file("/sys/kernel/btf/vmlinux").expect("types");
    let target = btf.resolve_ids_by_name(target).unwrap_or_default();
    let load = Load {
        prog_type: TRACING,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: TRACE_ITER,
        attach_btf_id: target.first().copied().unwrap_or_default(),
        ..Load::default()
    };
    // SAFETY: the kernel reads `load`, of the size that it is told, and what it points to; what it answers is new, and nobody else has it.
    unsafe {
        let program = libc::syscall(libc::SYS_bpf, LOAD, &raw const load, size_of::<Load>());
        let error = io::Error::last_os_error();
        if program >= 0 {
            drop(OwnedFd::from_raw_fd(program as i32));
            return None;
        }
        error.raw_os_error()
    }
}

/// Whether helpers take no socket of an open file on this kernel. Then tracer says so on each start.
pub(crate) fn distrusts_open_files() -> bool {
    *DISTRUSTS_OPEN_FILES
}

/// The hooks of which it is said on each start, on this kernel, that they are not there, or cannot do all.
pub(crate) fn always_degraded() -> impl Iterator<Item = &'static str> {
    let open_files = distrusts_open_files().then_some(OPEN_FILES);
    open_files.into_iter().chain(is_without_storage_walk().then_some(STORAGE_WALK))
}

/// Whether a line says one of these.
pub(crate) fn is_always_said(line: &str) -> bool {
    always_degraded().any(|hook| line.contains(hook))
}

/// What a `start` line says is degraded, but for what is so on every start on this kernel.
pub(crate) fn degraded(start: &Value) -> Vec<&Value> {
    let said = start["degraded"].as_array().expect("a list");
    let always = |line: &Value| line.as_str().is_some_and(is_always_said);
    assert_eq!(said.iter().filter(|line| always(line)).count(), always_degraded().count(), "{start:#}");
    said.iter().filter(|line| !always(line)).collect()
}

/// What `tracer doctor` says of this kernel where nothing is missing that a host can have.
pub(crate) fn verdict() -> &'static str {
    if always_degraded().next().is_some() { "degraded" } else { "works" }
}

/// Appends a line to a file, or else prints it. On stdout the test harness may be in the middle of a line of its own.
fn say(line: &str, file: Option<&OsStr>) -> io::Result<()> {
    match file {
        Some(file) => File::options().append(true).create(true).open(file)?.write_all(line.as_bytes()),
        // Not by `println!`, which the test harness keeps to itself.
        None => io::stdout().lock().write_all(line.as_bytes()),
    }
}

/// Whether this kernel lets a process without any capability read a map that it has open.
pub(crate) fn maps_without_capability() -> bool {
    /// `BPF_MAP_CREATE`, `BPF_MAP_LOOKUP_ELEM`, and the beginnings of their `union bpf_attr` (`include/uapi/linux/bpf.h`).
    const CREATE: i32 = 0;
    const LOOKUP: i32 = 1;
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    #[repr(C)]
    struct Lookup {
        map_fd: u32,
        _pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    // Capabilities belong to threads.
    let asked = std::thread::spawn(|| {
        const ARRAY: u32 = 2;
        let create = Create { map_type: ARRAY, key_size: 4, value_size: 4, max_entries: 1 };
        // SAFETY: the kernel reads `create`, of the size that it is told; what it answers is new, and nobody else has it.
        let map = unsafe {
            let map = libc::syscall(libc::SYS_bpf, CREATE, &raw const create, size_of::<Create>());
            assert!(map >= 0, "a map can be made: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(map as i32)
        };
        caps::clear(None, caps::CapSet::Effective).expect("they can be given up");
        let (key, mut value) = (0_u32, 0_u32);
        let lookup = Lookup {
            map_fd: map.as_raw_fd() as u32,
            _pad: 0,
            key: (&raw const key) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads `lookup` and the key, and writes the value; they are as large as the map's, and outlive the
        // call.
        let answer = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP, &raw const lookup, size_of::<Lookup>()) };
        let error = io::Error::last_os_error();
        assert!(answer == 0 || error.raw_os_error() == Some(libc::EPERM), "{error}");
        answer == 0
    });
    asked.join().expect("it answers")
}

/// Whether of tracer's programs, as the kernel has them, none calls the helper by which a socket is cast.
fn casts_without_calls() -> bool {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--port", &listener.port.to_string()]);
    let programs = held_by(tracer.pid()).into_iter().filter(|(kind, _)| *kind == "prog");
    let marked = programs.filter(|(_, id)| {
        let instructions = run(Command::new("bpftool").args(["prog", "dump", "xlated", "id", &id.to_string()]));
        [cast_to::SOCK, cast_to::TCP_SOCK].iter().any(|mark| instructions.contains(&format!("r2 = {mark}\n")))
    });
    let marked = marked.count();
    tracer.stop();
    // The programs for packets and for transitions, and those that make records besides.
    assert!(marked == 0 || marked >= 3, "{marked}");
    marked == 0
}

#[test]
fn this_kernel_has_what_its_version_brought() {
    let output = tracer().args(["doctor", "--json"]).output().expect("it runs");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = report["findings"].as_array().expect("a list");
    let finding = |name: &str| findings.iter().find(|one| one["name"] == name);
    let Support { landlock, seccomp } = sandbox::support();
    let confined = finding("sandbox").expect("it is looked for")["status"] == "ok";
    assert_eq!(confined, landlock.is_ok() && seccomp.is_ok(), "{report:#}");
    let mut all = true;
    for (feature, _) in FEATURES {
        let found = match finding(feature) {
            Some(finding) => finding["status"] == "ok",
            None if feature == SECCOMP => seccomp.is_ok(),
            None if feature == MAPS_WITHOUT_CAPABILITY => maps_without_capability(),
            None if feature == CAST => casts_without_calls(),
            None => {
                let wanted: u32 =
                    feature.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("a finding, or an interface");
                landlock.is_ok_and(|interface| interface >= wanted)
            }
        };
        all &= !lacks(feature, found);
    }
    if all {
        expect(&report, &json!({ "verdict": "works", "exit_code": 0 }));
    }
}

#[test]
fn what_is_missing_is_passed_over_on_older_kernels_only() {
    assert_eq!(version("6.12.0-rc1+deb13-cloud-amd64"), (6, 12));
    assert_eq!(version("5.4"), (5, 4));
    for (feature, since) in FEATURES {
        assert!(!may_lack(feature, since) && !may_lack(feature, (since.0 + 1, 0)), "{feature}");
        assert!(may_lack(feature, (since.0 - 1, 99)), "{feature}");
    }
    let (feature, since) = FEATURES[0];
    let older = (since.0 - 1, 99);
    assert!(
        !is_lacking(feature, true, "", since) && !is_lacking(feature, true, "", older),
        "what is there is not lacking"
    );
    assert!(is_lacking(feature, false, "", older), "it may be missing");
    assert!(std::panic::catch_unwind(|| is_lacking(feature, false, "", since)).is_err(), "it must not be missing");
}

#[test]
fn lines_of_tests_that_run_at_once_stay_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("skipped");
    std::thread::scope(|scope| {
        for n in 0..4 {
            let file = file.as_os_str();
            scope.spawn(move || (0..50).for_each(|_| say(&format!("skipped: {n}\n"), Some(file)).expect("written")));
        }
    });
    let text = std::fs::read_to_string(file).expect("written");
    for n in 0..4 {
        assert_eq!(text.lines().filter(|line| *line == format!("skipped: {n}")).count(), 50, "{text}");
    }
}
