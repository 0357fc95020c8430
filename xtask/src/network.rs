//! Network namespaces, and the programs that run in them. Gone when they go out of scope.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::workspace;

/// A network namespace without a name: it is gone with this process, however that ends.
pub(crate) struct Namespace {
    file: File,
    pub(crate) inode: u64,
}

impl Namespace {
    pub(crate) fn new() -> Result<Self> {
        // A thread of its own makes it, and ends: the others stay where they are.
        let thread = std::thread::spawn(|| -> Result<File> {
            // SAFETY: a network namespace has no part in what threads of a process must share.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.context("cannot make a network namespace")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        });
        let file = thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        let inode = file.metadata()?.ino();
        let namespace = Self { file, inode };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Runs `ip` in this namespace.
    pub(crate) fn ip(&self, args: &[&str]) -> Result<()> {
        workspace::succeed(self.command(Path::new("ip")).args(args))
    }

    /// Where other processes find it, while this one runs.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    /// Sets a kernel parameter, where this kernel has it for each namespace: they make room, no more.
    pub(crate) fn set(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let _ = self.command(Path::new("sh")).args(["-c", &format!("echo {value} > {path}")]).status();
    }

    /// A program that runs in this namespace, and dies with us.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "nsenter"]);
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Moves the calling thread into this namespace, for good.
    pub(crate) fn enter(&self) -> Result<()> {
        Ok(move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// What `ss` prints of this namespace's TCP sockets.
    pub(crate) fn ss(&self, args: &[&str]) -> Result<String> {
        workspace::output(self.command(Path::new("ss")).args(["-H", "-t", "-n"]).args(args))
    }
}

/// A process that was started, killed with its group when it goes out of scope.
pub(crate) struct Running {
    pub(crate) child: Child,
}

impl Running {
    pub(crate) fn start(command: &mut Command, directory: &Path, name: &str) -> Result<Self> {
        let out = fs::File::create(directory.join(format!("{name}.out")))?;
        let log = fs::File::create(directory.join(format!("{name}.log")))?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        Ok(Self { child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that handle connections: the children, if there are any, else the process itself.
    pub(crate) fn handlers(&self) -> Vec<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<u32> = children.split_whitespace().filter_map(|child| child.parse().ok()).collect();
        if children.is_empty() { vec![pid] } else { children }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}
