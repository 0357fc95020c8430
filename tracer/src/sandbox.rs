//! Confinement: what each of the two processes may still ask of the kernel once it is at work.
//!
//! What comes in: which process it is. What goes out: nothing but the restriction, which can never be lifted. Landlock
//! takes all files, ports, signals and abstract sockets from the process that reads records; a seccomp allow-list takes
//! from both whatever system call they do not make. A call that is not on the list fails with `EPERM`, and the kernel logs
//! it (audit, `type=1326`): a tool that watches production must say that something failed, not vanish. Must be called
//! before any thread is started, for both belong to threads.
//!
//! The broker has no Landlock: a process in a Landlock domain may not look at one outside of it (the kernel counts
//! `/proc/<pid>/exe` and `ns/net` as `ptrace`), whatever capabilities it has. Nothing could be named.

use std::collections::BTreeMap;
use std::{fmt, io};

use anyhow::{Context as _, Result};
use landlock::{ABI, Access as _, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr as _, Scope};
use log::debug;
use rustix::io::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Which process is to be confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The one that reads records and prints them.
    Reader {
        /// It ends processes that it has started (`--demo`).
        ends_children: bool,
    },
    /// See [`crate::broker`].
    Broker,
}

/// What this kernel offers, or how it refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    /// The version of Landlock's interface, 1 or more.
    pub landlock: Result<u32, Errno>,
    /// Filters of system calls, with `EPERM` as an answer.
    pub seccomp: Result<(), Errno>,
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.landlock {
            Ok(interface) => write!(f, "Landlock (interface {interface}), ")?,
            Err(_) => f.write_str("no Landlock, ")?,
        }
        f.write_str(if self.seccomp.is_ok() { "seccomp" } else { "no seccomp" })
    }
}

impl Support {
    /// What is missing: of each part what that costs, and how to mend it, as the messages of [`crate::preflight`]. It costs no answer.
    pub fn missing(&self) -> Vec<String> {
        const BY_FILTER: &str = "let the filter of system calls that it runs under (of a container, of a unit) allow";
        let mut missing = Vec::new();
        if let Err(error) = self.landlock {
            let by = if self.seccomp.is_ok() { "by seccomp alone" } else { "by the lack of capabilities alone" };
            let mend = match error {
                Errno::OPNOTSUPP => "add landlock to lsm= on the kernel's command line".to_owned(),
                Errno::PERM | Errno::ACCESS => {
                    format!("{BY_FILTER} landlock_create_ruleset and landlock_restrict_self")
                }
                _ => "run Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK=y, and landlock in lsm=".to_owned(),
            };
            missing.push(format!(
                "without Landlock ({error}) the process that reads records is kept from files and other processes {by}; {mend}"
            ));
        }
        if let Err(error) = self.seccomp {
            let mend = match error {
                Errno::PERM | Errno::ACCESS => format!("{BY_FILTER} seccomp"),
                _ => "run a kernel with CONFIG_SECCOMP_FILTER=y".to_owned(),
            };
            missing.push(format!(
                "without seccomp ({error}) both processes may make whatever system call their capabilities allow; {mend}"
            ));
        }
        missing
    }
}

/// The same, where nothing is missing but confinement is not wanted.
pub const UNCONFINED: &str = "with --no-sandbox neither Landlock nor seccomp confines tracer, only that it has given up \
                              capabilities; leave --no-sandbox out";

/// Finds out what confinement is possible. Changes nothing.
pub fn support() -> Support {
    /// `include/uapi/linux/landlock.h`
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel answers a number; it reads and writes no memory.
    let interface = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    let landlock = answer(interface).and_then(|interface| u32::try_from(interface).map_err(|_| Errno::INVAL));
    let action = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads one number, which outlives the call.
    let available = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0u32, std::ptr::from_ref::<u32>(&action))
    };
    Support { landlock, seccomp: answer(available).map(|_| ()) }
}

/// What a system call answered that was just made.
fn answer(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::NOSYS))
}

/// Confines the calling thread and all that it starts, for good, as far as this kernel can.
///
/// # Errors
/// The kernel refused although it has what it takes.
pub fn confine(part: Part) -> Result<()> {
    let support = support();
    debug!("confinement: {support}");
    if let Part::Reader { ends_children } = part
        && support.landlock.is_ok()
    {
        landlock(ends_children).context("Landlock refused; --no-sandbox does without")?;
    }
    if support.seccomp.is_ok() {
        seccomp(part).context("seccomp refused; --no-sandbox does without")?;
    }
    Ok(())
}

/// The part of [`confine`] that is Landlock's: no files, no ports, and no signals or abstract sockets beyond this process. A
/// list of rights, and nothing that has them. By itself only in tests: under the filter little of it can be told from the filter.
///
/// # Errors
/// The kernel refused, or has no Landlock.
pub fn landlock(ends_children: bool) -> Result<()> {
    // Older kernels leave out what they do not know.
    let abi = ABI::V7;
    let scopes = if ends_children { BitFlags::from(Scope::AbstractUnixSocket) } else { Scope::from_all(abi) };
    Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(scopes)?
        .create()?
        .restrict_self()?;
    Ok(())
}

/// By system call: any of the rules allows it; without one it is allowed whatever its arguments.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn seccomp(part: Part) -> Result<()> {
    // The flags of clone3 lie in memory, where no filter sees them. Where it does not exist, libraries take clone.
    let clone3: Rules = [(libc::SYS_clone3, Vec::new())].into();
    install(&compile(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()))?)?;
    install(&compile(allowed(part)?, SeccompAction::Errno(libc::EPERM.cast_unsigned()), SeccompAction::Allow)?)
}

fn compile(rules: Rules, otherwise: SeccompAction, listed: SeccompAction) -> Result<BpfProgram> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, listed, architecture)?.try_into()?)
}

/// Not seccompiler's own, which does not ask for a log.
fn install(program: &BpfProgram) -> Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().context("the filter is too long")?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies the program, whose instructions have the layout of `struct sock_filter` and outlive the
    // call, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_LOG,
            std::ptr::from_ref(&program),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().into()) }
}

/// `include/uapi/linux/bpf.h`: what is done with maps, and the walks over open files and sockets, while tracing.
const BPF_COMMANDS: [u64; 3] = [
    1,  // BPF_MAP_LOOKUP_ELEM
    2,  // BPF_MAP_UPDATE_ELEM
    33, // BPF_ITER_CREATE
];

/// What both do: read, write and talk over what is open, memory, threads, time, their end.
const BOTH: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_ppoll,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Answered with ENOSYS by a filter of its own.
    libc::SYS_clone3,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What only the reader does: wait for many things, end its output, and know of its children's end.
const READER: &[i64] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_shutdown,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_wait4,
    libc::SYS_waitid,
];

/// What only the broker does: look into directories and links. It cannot seek: `/proc/<pid>/mem` has nothing where it begins.
const BROKER: &[i64] = &[
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_bind,
    libc::SYS_connect,
];

fn allowed(part: Part) -> Result<Rules> {
    let own = match part {
        Part::Reader { .. } => READER,
        Part::Broker => BROKER,
    };
    let mut rules: Rules = BOTH.iter().chain(own).map(|call| (*call, Vec::new())).collect();
    let mut only = |call: i64, conditions: Vec<SeccompCondition>| -> Result<()> {
        rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    // Memory, but none that can be executed.
    let none_of = |argument, bits: libc::c_int| -> Result<SeccompCondition> {
        let bits = u64::from(bits.cast_unsigned());
        Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), 0)?)
    };
    let is = |argument, value: u64| -> Result<SeccompCondition> {
        Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?)
    };
    only(libc::SYS_mmap, vec![none_of(2, libc::PROT_EXEC)?])?;
    only(libc::SYS_mprotect, vec![none_of(2, libc::PROT_EXEC)?])?;
    // Advice, but not that a page of memory is broken: with `CAP_SYS_ADMIN`, which the broker has, the kernel takes it from all
    // who use it, though it may be a file's.
    let is_not = |argument, value: libc::c_int| -> Result<SeccompCondition> {
        let value = u64::from(value.cast_unsigned());
        Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, value)?)
    };
    only(libc::SYS_madvise, vec![is_not(2, libc::MADV_HWPOISON)?, is_not(2, libc::MADV_SOFT_OFFLINE)?])?;
    // Threads, but no processes.
    let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
    let is_thread = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(thread), thread)?;
    only(libc::SYS_clone, vec![is_thread])?;
    // What is asked of a descriptor, and one more of it. Others make it signal any process of the same user, or hold up who
    // opens or locks a file.
    for command in [libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC] {
        only(libc::SYS_fcntl, vec![is(1, u64::from(command.cast_unsigned()))?])?;
    }
    // A name for a thread, or for the memory of an allocator.
    for option in [libc::PR_SET_NAME, libc::PR_SET_VMA] {
        only(libc::SYS_prctl, vec![is(0, u64::from(option.cast_unsigned()))?])?;
    }
    // Its own limits, to be read.
    only(libc::SYS_prlimit64, vec![SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?])?;
    // What `abort` does.
    only(libc::SYS_tgkill, vec![is(0, std::process::id().into())?])?;
    match part {
        Part::Reader { ends_children } => {
            for command in BPF_COMMANDS {
                only(libc::SYS_bpf, vec![is(0, command)?])?;
            }
            // Whether it is a terminal. The type of libc's own constant depends on the library.
            only(libc::SYS_ioctl, vec![is(1, 0x5401 /* TCGETS */)?])?;
            if ends_children {
                only(libc::SYS_kill, vec![is(1, u64::from(libc::SIGKILL.cast_unsigned()))?])?;
            }
        }
        Part::Broker => {
            let writes = libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
            only(libc::SYS_openat, vec![none_of(2, writes)?])?;
            only(libc::SYS_setns, vec![is(1, u64::from(libc::CLONE_NEWNET.cast_unsigned()))?])?;
            let (netlink, diag) = (libc::AF_NETLINK.cast_unsigned(), libc::NETLINK_SOCK_DIAG.cast_unsigned());
            only(libc::SYS_socket, vec![is(0, netlink.into())?, is(2, diag.into())?])?;
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    /// Runs `attempt` in a thread that is confined, which nothing can be undone of.
    fn confined<T: Send + 'static>(part: Part, attempt: impl FnOnce() -> T + Send + 'static) -> T {
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).expect("the kernel has it");
            confine(part).expect("the kernel has it");
            attempt()
        });
        thread.join().expect("it does not panic")
    }

    const READER: Part = Part::Reader { ends_children: false };

    fn errno<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }

    #[test]
    fn this_kernel_has_what_it_takes() {
        let Support { landlock, seccomp } = support();
        assert!(seccomp.is_ok() && landlock.is_ok_and(|interface| interface >= 1), "{landlock:?} {seccomp:?}");
    }

    #[test]
    fn what_is_missing_can_be_mended() {
        let all = Support { landlock: Ok(7), seccomp: Ok(()) };
        assert_eq!(all.to_string(), "Landlock (interface 7), seccomp");
        assert!(all.missing().is_empty());
        let one = |support: Support| match &support.missing()[..] {
            [message] => message.clone(),
            missing => panic!("not one: {missing:?}"),
        };
        for (error, mend) in [
            (Errno::NOSYS, "; run Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK=y, and landlock in lsm="),
            (Errno::OPNOTSUPP, "; add landlock to lsm= on the kernel's command line"),
            (Errno::PERM, " allow landlock_create_ruleset and landlock_restrict_self"),
        ] {
            let message = one(Support { landlock: Err(error), ..all });
            assert!(message.contains("by seccomp alone; ") && message.ends_with(mend), "{message}");
        }
        for (error, mend) in
            [(Errno::INVAL, "; run a kernel with CONFIG_SECCOMP_FILTER=y"), (Errno::PERM, " allow seccomp")]
        {
            let message = one(Support { seccomp: Err(error), ..all });
            assert!(message.starts_with("without seccomp") && message.ends_with(mend), "{message}");
        }
        let neither = Support { landlock: Err(Errno::NOSYS), seccomp: Err(Errno::INVAL) };
        assert_eq!((neither.missing().len(), neither.to_string()), (2, "no Landlock, no seccomp".to_owned()));
        assert!(!neither.missing()[0].contains("by seccomp"), "{neither}");
    }

    #[test]
    fn the_reader_opens_nothing_connects_nowhere_and_starts_nothing() {
        let (file, socket, process, thread) = confined(READER, || {
            let file = errno(std::fs::File::open("/dev/null"));
            let socket = errno(std::net::TcpListener::bind(("127.0.0.1", 0)));
            let process = errno(std::process::Command::new("true").spawn());
            let thread = std::thread::spawn(|| 7).join().expect("threads are allowed");
            (file, socket, process, thread)
        });
        let no = Some(libc::EPERM);
        assert_eq!((file, socket, process, thread), (no, no, no, 7));
    }

    #[test]
    fn the_broker_reads_but_cannot_seek_and_never_writes() {
        let (read, written, sought, other, netlink) = confined(Part::Broker, || {
            let memory = std::fs::File::open("/proc/self/mem");
            let sought = errno(memory.and_then(|mut file| io::Seek::seek(&mut file, io::SeekFrom::Start(4096))));
            let read = rustix::fs::readlink("/proc/self/exe", Vec::new()).is_ok();
            let written = errno(std::fs::OpenOptions::new().write(true).open("/dev/null"));
            let other = errno(std::net::TcpListener::bind(("127.0.0.1", 0)));
            let netlink = [libc::NETLINK_SOCK_DIAG, libc::NETLINK_ROUTE, libc::NETLINK_GENERIC]
                .map(|protocol| errno(netlink_sys::Socket::new(protocol as isize)));
            (read, written, sought, other, netlink)
        });
        let no = Some(libc::EPERM);
        assert_eq!((read, written, sought, other, netlink), (true, no, no, no, [None, no, no]));
    }

    /// A socket can be told to signal any process of its user when something comes: `kill` by another name.
    #[test]
    fn neither_signals_nor_locks_by_fcntl() {
        for part in [Part::Broker, READER, Part::Reader { ends_children: true }] {
            let mut victim = std::process::Command::new("sleep").arg("60").spawn().expect("it starts");
            let pid = i32::try_from(victim.id()).expect("an id");
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
            let file = std::fs::File::open("/proc/self/exe").expect("it can be read");
            let answers = confined(part, move || {
                let fcntl = |fd: i32, command, argument: i64| {
                    // SAFETY: numbers only, or a lock that outlives the call.
                    let answer = unsafe { libc::fcntl(fd, command, argument) };
                    (answer < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
                };
                let fd = ours.as_raw_fd();
                let answers = [
                    fcntl(fd, libc::F_SETOWN, pid.into()),
                    fcntl(fd, 10 /* F_SETSIG */, libc::SIGKILL.into()),
                    fcntl(fd, libc::F_SETFL, libc::O_ASYNC.into()),
                    fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK.into()),
                ];
                // What the standard library asks, and what duplicates.
                assert_eq!(fcntl(fd, libc::F_GETFD, 0), None);
                ours.try_clone().expect("a descriptor can be had twice");
                io::Write::write_all(&mut &theirs, b"x").expect("it is open");
                answers
            });
            std::thread::sleep(std::time::Duration::from_millis(200));
            let ended = victim.try_wait().expect("it can be asked");
            victim.kill().expect("it can be ended");
            victim.wait().expect("it ends");
            assert_eq!((answers, ended), ([Some(libc::EPERM); 4], None), "{part:?}");
        }
    }

    #[test]
    fn no_page_is_declared_broken() {
        for part in [Part::Broker, READER] {
            let answers = confined(part, || {
                [libc::MADV_DONTNEED, libc::MADV_HWPOISON, libc::MADV_SOFT_OFFLINE].map(|advice| {
                    // SAFETY: an aligned address, and no byte behind it.
                    let answer = unsafe { libc::madvise(std::ptr::without_provenance_mut(4096), 0, advice) };
                    (answer < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
                })
            });
            assert_eq!(answers, [None, Some(libc::EPERM), Some(libc::EPERM)], "{part:?}");
        }
    }

    #[test]
    fn no_memory_becomes_code() {
        let executable = confined(READER, || {
            let (read, run) = (rustix::mm::ProtFlags::READ, rustix::mm::ProtFlags::EXEC);
            let private = rustix::mm::MapFlags::PRIVATE;
            let map = |protection| {
                // SAFETY: a new mapping, at an address that the kernel chooses; nothing is done with it.
                unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 4096, protection, private) }.is_ok()
            };
            (map(read), map(read | run))
        });
        assert_eq!(executable, (true, false));
    }

    #[test]
    fn every_part_compiles_for_this_architecture() {
        for part in [READER, Part::Reader { ends_children: true }, Part::Broker] {
            let rules = allowed(part).expect("they are well-formed");
            compile(rules, SeccompAction::Errno(1), SeccompAction::Allow).expect("it compiles");
        }
    }
}
