//! Processes as the kernel named them in, described processes out: executable, cgroup, container.
//!
//! Looked up in `/proc` and kept for a while in a bounded cache. A process id alone is no name: whatever is read belongs
//! to the process that started at the moment the kernel gave, or is not used. Nor is the executable of a process that
//! has another name by now: it may have called `execve` since. What cannot be read, for whatever reason, is left out;
//! nothing here fails.

use std::ffi::CString;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;
use rustix::fs::{CWD, Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::broker::Broker;
use crate::decode::Task;
use crate::event::Process;
use crate::recent::Recent;
use crate::time_namespace::seen_ticks;

const PROC: &str = "/proc";
/// Processes that are kept.
const CACHED: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Of them, those that can be found without a search: nearly all connections are those of a few processes.
const RECENT: usize = 4;
/// How long what was read is believed: a process may call `execve` and keep its name, or be moved to another cgroup.
const BELIEVED: Duration = Duration::from_secs(1);
/// Bytes of a file in `/proc` that are read; a longer `cgroup` is not a cgroup's.
pub(crate) const MAX_FILE: usize = 16 << 10;

/// Knows processes.
pub struct Processes {
    proc: PathBuf,
    /// Looks into `proc`, if this process may not itself.
    broker: Option<Arc<Broker>>,
    /// By process id and start time.
    cache: LruCache<(u32, u64), Cached>,
    /// As they were found in it last, and when they were read.
    recent: Recent<(Task, Instant, Arc<Process>), RECENT>,
    /// [`BELIEVED`]
    believed: Duration,
    /// Process id of this process, and its start in clock ticks; `None`: `/proc` did not say.
    own: (u32, Option<u64>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Details {
    exe: Option<String>,
    cgroup: Option<String>,
    container: Option<String>,
}

struct Cached {
    /// The name that was asked for: another one is the trace of an `execve`.
    comm: [u8; 16],
    /// As it was asked for last: its connections share it.
    process: Arc<Process>,
    read_at: Instant,
}

impl Default for Processes {
    fn default() -> Self {
        Self::new()
    }
}

impl Processes {
    /// Knows none yet.
    pub fn new() -> Self {
        Self::at(Path::new(PROC))
    }

    /// The same, looking through the broker's eyes.
    pub fn by(broker: Arc<Broker>) -> Self {
        Self { broker: Some(broker), ..Self::new() }
    }

    /// With another directory for `/proc`.
    pub(crate) fn at(proc: &Path) -> Self {
        let own = std::fs::read("/proc/self/stat").ok().and_then(|stat| start_ticks(&stat));
        let own = (std::process::id(), own);
        Self {
            proc: proc.to_owned(),
            broker: None,
            cache: LruCache::new(CACHED),
            recent: Recent::default(),
            believed: BELIEVED,
            own,
        }
    }

    /// Whether it is this process, which owns no connection: but its walk over the open files at the start holds each of
    /// them for a moment, and if it is closed in that moment, its end is ours to make.
    pub fn is_own(&self, task: &Task) -> bool {
        let (pid, start) = self.own;
        pid == task.pid && start.is_none_or(|start| start == seen_ticks(task.start_ns))
    }

    /// Describes a process, `now`. Its id, name and user are what the kernel recorded at the time, whatever they are by now.
    pub fn describe(&mut self, task: &Task, now: Instant) -> Arc<Process> {
        let believed = self.believed;
        let is_believed = |read_at| now.duration_since(read_at) < believed;
        if let Some((.., process)) = self.recent.find(|(known, read_at, _)| known == task && is_believed(*read_at)) {
            return Arc::clone(process);
        }
        let key = (task.pid, task.start_ns);
        if let Some(cached) = self.cache.get_mut(&key)
            && cached.comm == task.comm
            && is_believed(cached.read_at)
        {
            let process = &cached.process;
            if (process.uid, process.source) != (task.uid, task.source) {
                cached.process = Arc::new(Process { uid: task.uid, source: task.source, ..Process::clone(process) });
            }
            self.recent.keep((*task, cached.read_at, Arc::clone(&cached.process)));
            return Arc::clone(&cached.process);
        }
        let read = self.broker.as_ref().map_or_else(|| read(&self.proc, task), |broker| broker.process(task));
        if read.is_gone
            && let Some(cached) = self.cache.get_mut(&key)
        {
            // What was read while it lived. Under another name it may have run another program.
            cached.read_at = now;
            let Process { exe, cgroup, container, .. } = Process::clone(&cached.process);
            let exe = exe.filter(|_| cached.comm == task.comm);
            return Arc::new(process(task, Details { exe, cgroup, container }));
        }
        let process = Arc::new(process(task, read.details));
        if read.is_final {
            self.cache.put(key, Cached { comm: task.comm, process: Arc::clone(&process), read_at: now });
        }
        process
    }
}

fn process(task: &Task, Details { exe, cgroup, container }: Details) -> Process {
    let comm = text(until_nul(&task.comm));
    Process { pid: task.pid, comm, exe, uid: task.uid, cgroup, container, source: task.source }
}

/// What `/proc` said.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Read {
    details: Details,
    /// The process no longer exists, or has given up most of what it had: what was read before says more.
    is_gone: bool,
    /// Asking again would not tell more: all was read, or what was not does not exist.
    is_final: bool,
}

impl Read {
    const fn gone() -> Self {
        let details = Details { exe: None, cgroup: None, container: None };
        Self { details, is_gone: true, is_final: true }
    }

    #[cfg(test)]
    pub(crate) const fn of(exe: Option<String>, cgroup: Option<String>) -> Self {
        Self { details: Details { exe, cgroup, container: None }, is_gone: false, is_final: true }
    }
}

/// Reads what there is of a process in the real `/proc`.
pub(crate) fn read_of(task: &Task) -> Read {
    read(Path::new(PROC), task)
}

fn read(proc: &Path, task: &Task) -> Read {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = match openat(CWD, proc.join(task.pid.to_string()), flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(error) if is_gone(error) => return Read::gone(),
        Err(_) => return Read::default(),
    };
    // The directory stays that of one process even if the id is given to another one meanwhile. The second check costs
    // little, does not depend on that, and notices an `execve` between the two.
    match identity(directory.as_fd(), task) {
        Ok(Some(_)) => {}
        Ok(None) => return Read::gone(),
        Err(error) if is_gone(error) => return Read::gone(),
        Err(_) => return Read::default(),
    }
    let exe = readlinkat(&directory, "exe", Vec::new()).map(|path: CString| text(path.as_bytes()));
    let cgroups = read_file(directory.as_fd(), "cgroup");
    let Ok(Some(Identity { has_its_name, exits })) = identity(directory.as_fd(), task) else {
        return Read::gone();
    };
    let is_final = [exe.as_ref().err(), cgroups.as_ref().err()].into_iter().flatten().all(|error| is_gone(*error));
    let cgroup = cgroups.ok().and_then(|file| cgroup(&file, exits).map(text));
    let container = cgroup.as_deref().and_then(container).map(str::to_owned);
    let exe = exe.ok().filter(|_| has_its_name);
    Read { details: Details { exe, cgroup, container }, is_gone: exits, is_final }
}

/// The process does not exist any more, or what was asked for never did (kernel threads have no `exe`).
const fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::SRCH)
}

/// A process that is the one which the kernel named.
struct Identity {
    /// With another name it may run another program.
    has_its_name: bool,
    /// It is exiting, or a zombie.
    exits: bool,
}

/// `None`: another one is behind this directory.
fn identity(directory: BorrowedFd<'_>, task: &Task) -> rustix::io::Result<Option<Identity>> {
    /// `include/linux/sched.h`
    const PF_EXITING: u32 = 0x4;
    let stat = read_file(directory, "stat")?;
    Ok((start_ticks(&stat) == Some(seen_ticks(task.start_ns))).then(|| Identity {
        has_its_name: stat_comm(&stat) == Some(until_nul(&task.comm)),
        exits: stat_field::<u32>(&stat, 9).is_none_or(|flags| flags & PF_EXITING != 0),
    }))
}

fn read_file(directory: BorrowedFd<'_>, name: &str) -> rustix::io::Result<Vec<u8>> {
    let file: OwnedFd = openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut content = vec![0; MAX_FILE];
    let mut len = 0;
    while len < MAX_FILE {
        match rustix::io::read(&file, &mut content[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    content.truncate(len);
    Ok(content)
}

/// The start of the process in clock ticks since boot.
pub(crate) fn start_ticks(stat: &[u8]) -> Option<u64> {
    stat_field(stat, 22)
}

/// The name in `/proc/<pid>/stat`, as it is.
pub(crate) fn stat_comm(stat: &[u8]) -> Option<&[u8]> {
    let from = stat.iter().position(|byte| *byte == b'(')? + 1;
    let to = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(from..to)
}

/// A field of `/proc/<pid>/stat` behind the name, as proc(5) numbers them: 3 and more. The name in field 2 may hold
/// anything, spaces and parentheses included, so fields are counted from its last parenthesis.
pub(crate) fn stat_field<T: FromStr>(stat: &[u8], number: usize) -> Option<T> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// The path in the cgroup-v2 hierarchy; where that is the root or missing, the first other one that says more. In those
/// others a process that `exits` is shown in the root, wherever it was.
pub(crate) fn cgroup(file: &[u8], exits: bool) -> Option<&[u8]> {
    let mut v2 = None;
    let mut v1 = None;
    for line in file.split(|byte| *byte == b'\n') {
        // `hierarchy:controllers:path`; the path may hold colons.
        let mut fields = line.splitn(3, |byte| *byte == b':');
        let (Some(hierarchy), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if hierarchy == b"0" && controllers.is_empty() {
            v2 = Some(path);
        } else if v1.is_none_or(|path| path == b"/") {
            v1 = Some(path);
        }
    }
    match (v2, v1) {
        (Some(b"/") | None, Some(b"/")) if exits => None,
        (Some(b"/") | None, Some(path)) if path != b"/" => Some(path),
        (Some(path), _) => Some(path),
        (None, v1) => v1,
    }
}

/// The container that a cgroup's path names: the innermost part that is a container's id, bare (`/docker/ID`,
/// `/kubepods/…/ID`), as a systemd scope (`docker-ID.scope`, `cri-containerd-ID.scope`, `crio-ID.scope`,
/// `libpod-ID.scope`), or as containerd writes it for systemd without its driver (`…slice:cri-containerd:ID`).
pub(crate) fn container(cgroup: &str) -> Option<&str> {
    const RUNTIMES: [&str; 6] = ["docker", "cri-containerd", "containerd", "crio", "libpod", "nerdctl"];
    let cgroup = cgroup.strip_suffix(" (deleted)").unwrap_or(cgroup);
    cgroup.rsplit('/').find_map(|part| {
        let name = part.strip_suffix(".scope").unwrap_or(part);
        let id = match name.rsplit_once(['-', ':']) {
            // A runtime's monitor (`crio-conmon-ID`) runs beside the container, not in it.
            Some((runtime, id)) if runtime.rsplit(':').next().is_some_and(|last| RUNTIMES.contains(&last)) => id,
            Some(_) => return None,
            None => name,
        };
        let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_id { id.get(..12) } else { None }
    })
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or(bytes)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tracer_ebpf::TICK_NS;

    use super::*;
    use crate::event::Source;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    impl Processes {
        fn describe_now(&mut self, task: &Task) -> Process {
            Process::clone(&self.describe(task, Instant::now()))
        }
    }

    /// A directory that looks like `/proc`.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a directory"))
        }

        fn processes(&self) -> Processes {
            Processes::at(self.0.path())
        }

        /// The name is the last part of the executable's path.
        fn start(&self, pid: u32, ticks: u64, exe: &str) {
            let name = exe.rsplit('/').next().expect("a name");
            let directory = self.0.path().join(pid.to_string());
            self.end(pid);
            fs::create_dir(&directory).expect("a directory");
            fs::write(directory.join("stat"), stat(name, ticks)).expect("stat");
            fs::write(directory.join("cgroup"), format!("0::/system.slice/docker-{ID}.scope\n")).expect("cgroup");
            std::os::unix::fs::symlink(exe, directory.join("exe")).expect("exe");
        }

        fn end(&self, pid: u32) {
            let _ = fs::remove_dir_all(self.0.path().join(pid.to_string()));
        }
    }

    fn stat(comm: &str, ticks: u64) -> String {
        format!("7 ({comm}) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {ticks} 1000 2000 18446744073709551615\n")
    }

    fn task(pid: u32, ticks: u64, name: &str) -> Task {
        let mut comm = [0; 16];
        comm[..name.len()].copy_from_slice(name.as_bytes());
        Task { pid, start_ns: ticks * TICK_NS + 123_456, uid: 33, comm, source: Source::Read }
    }

    #[test]
    fn a_process_is_described() {
        let fake = Fake::new();
        fake.start(7, 500, "/usr/sbin/nginx");
        let process = fake.processes().describe_now(&task(7, 500, "nginx"));
        assert_eq!(
            process,
            Process {
                pid: 7,
                comm: "nginx".to_owned(),
                exe: Some("/usr/sbin/nginx".to_owned()),
                uid: 33,
                cgroup: Some(format!("/system.slice/docker-{ID}.scope")),
                container: Some("0123456789ab".to_owned()),
                source: Source::Read,
            }
        );
    }

    #[test]
    fn the_name_is_the_records_own() {
        let fake = Fake::new();
        fake.start(7, 500, "/bin/a");
        let mut processes = fake.processes();
        assert_eq!(processes.describe_now(&task(7, 500, "one")).comm, "one");
        assert_eq!(processes.describe_now(&task(7, 500, "two")).comm, "two");
    }

    #[test]
    fn a_new_name_lends_no_executable_to_the_old_one() {
        let fake = Fake::new();
        fake.start(7, 500, "/usr/bin/curl");
        let process = fake.processes().describe_now(&task(7, 500, "sh"));
        assert_eq!((process.exe, process.container.as_deref()), (None, Some("0123456789ab")));
    }

    #[test]
    fn a_reused_id_lends_nothing() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        fake.start(7, 501, "/bin/newcomer");
        let process = processes.describe_now(&task(7, 500, "dead"));
        assert_eq!((process.exe, process.cgroup, process.container), (None, None, None));
        assert_eq!(processes.describe_now(&task(7, 501, "newcomer")).exe.as_deref(), Some("/bin/newcomer"));
    }

    #[test]
    fn what_was_read_while_it_lived_stays() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        fake.start(7, 500, "/bin/a");
        processes.describe_now(&task(7, 500, "a"));
        fake.end(7);
        assert_eq!(processes.describe_now(&task(7, 500, "a")).exe.as_deref(), Some("/bin/a"));
        // It may have called `execve` before it ended; its container is the same.
        let renamed = processes.describe_now(&task(7, 500, "renamed"));
        assert_eq!((renamed.exe, renamed.container.as_deref()), (None, Some("0123456789ab")));
        assert_eq!(processes.describe_now(&task(7, 500, "a")).exe.as_deref(), Some("/bin/a"));
        fake.start(7, 900, "/bin/b");
        assert_eq!(processes.describe_now(&task(7, 900, "b")).exe.as_deref(), Some("/bin/b"));
    }

    #[test]
    fn a_zombie_is_described_as_it_was() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        processes.believed = Duration::ZERO;
        fake.start(7, 500, "/bin/a");
        assert_eq!(processes.describe_now(&task(7, 500, "a")).exe.as_deref(), Some("/bin/a"));
        let directory = fake.0.path().join("7");
        fs::remove_file(directory.join("exe")).expect("removed");
        fs::write(directory.join("stat"), stat("a", 500).replace("4194560", "4194564")).expect("stat");
        fs::write(directory.join("cgroup"), "2:cpu:/\n0::/\n").expect("cgroup");
        for _ in 0..2 {
            let process = processes.describe_now(&task(7, 500, "a"));
            assert_eq!((process.exe.as_deref(), process.container.as_deref()), (Some("/bin/a"), Some("0123456789ab")));
        }
        let unknown = fake.processes().describe_now(&task(7, 500, "a"));
        assert_eq!((unknown.exe, unknown.cgroup), (None, None));
    }

    #[test]
    fn an_execve_is_noticed_by_its_name() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        fake.start(7, 500, "/bin/sh");
        assert_eq!(processes.describe_now(&task(7, 500, "sh")).exe.as_deref(), Some("/bin/sh"));
        fake.start(7, 500, "/usr/bin/curl");
        assert_eq!(processes.describe_now(&task(7, 500, "curl")).exe.as_deref(), Some("/usr/bin/curl"));
    }

    #[test]
    fn an_execve_that_keeps_the_name_is_noticed_after_a_while() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        fake.start(7, 500, "/opt/one/server");
        assert_eq!(processes.describe_now(&task(7, 500, "server")).exe.as_deref(), Some("/opt/one/server"));
        fake.start(7, 500, "/opt/two/server");
        assert_eq!(processes.describe_now(&task(7, 500, "server")).exe.as_deref(), Some("/opt/one/server"));
        processes.believed = Duration::ZERO;
        assert_eq!(processes.describe_now(&task(7, 500, "server")).exe.as_deref(), Some("/opt/two/server"));
    }

    #[test]
    fn only_what_does_not_exist_is_remembered_as_missing() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        // A process that is not there.
        processes.describe_now(&task(7, 500, "a"));
        assert_eq!(processes.cache.len(), 1);
        // One that is there and cannot be read: EISDIR is as good an error as EACCES, which root does not get.
        fake.start(8, 500, "/bin/b");
        let cgroup = fake.0.path().join("8/cgroup");
        fs::remove_file(&cgroup).expect("removed");
        fs::create_dir(&cgroup).expect("a directory");
        let process = processes.describe_now(&task(8, 500, "b"));
        assert_eq!((process.exe.as_deref(), process.cgroup), (Some("/bin/b"), None));
        assert_eq!(processes.cache.len(), 1);
        fs::remove_dir(&cgroup).expect("removed");
        fs::write(&cgroup, "0::/now\n").expect("cgroup");
        assert_eq!(processes.describe_now(&task(8, 500, "b")).cgroup.as_deref(), Some("/now"));
        assert_eq!(processes.cache.len(), 2);
    }

    /// As many as a host may have whose `kernel.pid_max` is 65,536.
    #[test]
    fn of_65_535_processes_the_latest_are_kept() {
        const PROCESSES: u32 = 65_535;
        let fake = Fake::new();
        fake.start(1, 500, "/sbin/init");
        fake.start(PROCESSES, 500, "/bin/last");
        let mut processes = fake.processes();
        for pid in 1..=PROCESSES {
            let name = if pid == 1 { "init" } else { "last" };
            let exe = processes.describe(&task(pid, 500, name), Instant::now()).exe.clone();
            assert_eq!(exe.is_some(), pid == 1 || pid == PROCESSES, "{pid}");
            assert!(processes.cache.len() <= CACHED.get(), "after {pid}");
        }
        assert_eq!(processes.cache.len(), CACHED.get());
        // One that was dropped is looked up anew, and one that was kept is known after its end.
        fake.end(1);
        fake.end(PROCESSES);
        assert_eq!(processes.describe(&task(1, 500, "init"), Instant::now()).exe, None);
        assert_eq!(processes.describe(&task(PROCESSES, 500, "last"), Instant::now()).exe.as_deref(), Some("/bin/last"));
    }

    #[test]
    fn the_cache_is_bounded() {
        let fake = Fake::new();
        let mut processes = fake.processes();
        for pid in 1..=CACHED.get() as u32 + 10 {
            processes.describe_now(&task(pid, 1, "x"));
        }
        assert_eq!(processes.cache.len(), CACHED.get());
    }

    #[test]
    fn this_process_is_known_to_the_real_proc() {
        let pid = std::process::id();
        let stat = fs::read(format!("/proc/{pid}/stat")).expect("stat");
        let ticks = start_ticks(&stat).expect("a start time");
        let comm = fs::read_to_string("/proc/self/comm").expect("comm");
        let process = Processes::new().describe_now(&task(pid, ticks, comm.trim_end()));
        assert_eq!(process.exe, Some(std::env::current_exe().expect("a path").to_string_lossy().into_owned()));
    }

    #[test]
    fn this_process_knows_itself() {
        let (pid, ticks) = Processes::new().own;
        let ticks = ticks.expect("a start time");
        assert!(Processes::new().is_own(&task(pid, ticks, "me")));
        assert!(!Processes::new().is_own(&task(pid, ticks + 1, "me")));
        assert!(!Processes::new().is_own(&task(pid + 1, ticks, "me")));
        // Without `/proc` the id must do: while this process lives it is nobody else's.
        let unknown = Processes { own: (pid, None), ..Processes::new() };
        assert!(unknown.is_own(&task(pid, ticks + 1, "me")) && !unknown.is_own(&task(pid + 1, ticks, "me")));
    }

    #[test]
    fn bytes_that_are_no_utf8_are_replaced() {
        let fake = Fake::new();
        let mut odd = task(7, 1, "");
        odd.comm = *b"a\xff\x1b[31mbcdefghij";
        assert_eq!(fake.processes().describe_now(&odd).comm, "a\u{fffd}\u{1b}[31mbcdefghij");
    }

    #[test]
    fn start_times_are_read_past_any_name() {
        for comm in ["x", "a b", ") S 1 2 3", "((", "a) b) c", ""] {
            assert_eq!(start_ticks(stat(comm, 4711).as_bytes()), Some(4711), "{comm:?}");
            assert_eq!(stat_comm(stat(comm, 4711).as_bytes()), Some(comm.as_bytes()), "{comm:?}");
        }
        assert_eq!(start_ticks(b"7 (\xff\xfe) S 1 7 7 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 99 1"), Some(99));
        for broken in
            [&b""[..], b"7", b"7 (x", b"7 (x)", b"7 (x) S 1 2", b"7 (x) S 1 7 7 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 z"]
        {
            assert_eq!(start_ticks(broken), None);
        }
    }

    #[test]
    fn cgroups_of_all_kinds() {
        let cases: [(&str, Option<&str>); 9] = [
            ("0::/system.slice/nginx.service\n", Some("/system.slice/nginx.service")),
            // Hybrid: v2 without controllers, v1 with them.
            ("12:pids:/user.slice\n1:name=systemd:/a\n0::/b\n", Some("/b")),
            ("12:pids:/\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/y\n0::/\n", Some("/docker/x")),
            ("2:cpu:/\n1:name=systemd:/a:b\n", Some("/a:b")),
            ("2:cpu:/\n1:name=systemd:/\n", Some("/")),
            ("2:cpu:/\n0::/\n", Some("/")),
            ("0::/\n", Some("/")),
            ("", None),
            ("nonsense\n0:\n", None),
        ];
        for (file, expected) in cases {
            let found = cgroup(file.as_bytes(), false).map(|path| str::from_utf8(path).expect("UTF-8"));
            assert_eq!(found, expected, "{file:?}");
        }
        // Of a process that exits, version 1 no longer tells.
        assert_eq!(cgroup(b"2:cpu:/\n0::/\n", true), None);
        assert_eq!(cgroup(b"2:cpu:/\n0::/a\n", true), Some(&b"/a"[..]));
        assert_eq!(cgroup(b"0::/\n", true), Some(&b"/"[..]));
    }

    #[test]
    fn containers_of_all_kinds() {
        let forms = [
            "/docker/ID",
            "/system.slice/docker-ID.scope",
            "/system.slice/docker-ID.scope/system.slice/nginx.service",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-ID.scope",
            "/kubepods.slice/kubepods-pod1.slice/crio-ID.scope",
            "/kubepods/burstable/pod0f1e2d3c-0000-1111-2222-333344445555/ID",
            "/machine.slice/libpod-ID.scope/container",
            "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope",
            "/system.slice/containerd.service/kubepods-burstable-pod1.slice:cri-containerd:ID",
            "/default/ID",
            "/ecs/0123/ID",
            "/system.slice/docker-ID.scope (deleted)",
            // The innermost: a node that is a container itself.
            "/docker/ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff/kubelet/kubepods/pod1/ID",
        ];
        for form in forms {
            assert_eq!(container(&form.replace("ID", ID)), Some("0123456789ab"), "{form}");
        }
        let others = [
            "/",
            "/system.slice/nginx.service",
            "/user.slice/user-1000.slice/session-1.scope",
            "/lxc.payload.web",
            "/docker/0123456789ab",
            "/machine.slice/libpod-conmon-ID.scope",
            "/kubepods.slice/crio-conmon-ID.scope",
            "/machine.slice/libpod_pod_ID.slice",
            "/docker/IDa",
            "/docker/éID",
        ];
        for other in others {
            assert_eq!(container(&other.replace("ID", ID)), None, "{other}");
        }
        assert_eq!(container(&format!("/docker/{}", ID.to_uppercase())), None);
    }
}
