//! `--exec`: summaries in, a command that is run with each of them on its stdin out.
//!
//! The process that reads records is confined, and starts nothing. So a child, the launcher, is started before that, with
//! the command, which is fixed from then on. It has no capability and can gain none, holds nothing of the kernel programs, and
//! does not look into what comes: it is the command's stdin, from memory, so that neither holds tracer up. At most one command
//! runs at a time. The launcher ends when tracer does; a command that runs then goes on.

use std::fs::File;
use std::io::{self, Read, Seek as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use log::warn;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::privileges;

/// Name of the hidden subcommand that runs [`serve`].
pub const LAUNCHER: &str = "launcher";

/// Bytes of a summary: a thousand groups are about one million.
const MOST: u32 = 16 << 20;
/// How long it may take the launcher to start, and to take a summary, which it puts into memory at once.
const START: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_millis(100);
/// What it says once it has given up its privileges.
const READY: u8 = b'r';

/// The launcher, as seen from tracer.
#[derive(Debug)]
pub struct Launcher {
    /// `None`: it is gone, or hangs.
    link: Option<UnixStream>,
    child: Child,
}

impl Launcher {
    /// Starts it, and waits until it has given up its privileges. The `command` is for `sh -c`.
    ///
    /// # Errors
    /// The binary could not be started again; `/proc` must be mounted for that.
    pub fn start(command: &str) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
        ours.set_read_timeout(Some(START))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        // Not by its path, which may lead to another binary by now, or to none.
        let mut launcher = Command::new("/proc/self/exe");
        // A command that begins with a dash is no option.
        launcher.arg0("tracer").args([LAUNCHER, "--"]).arg(command);
        // Ctrl-C is for tracer, and so is stdout: who reads it waits for the last one who has it open.
        let child = launcher.process_group(0).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn();
        // With it goes the other end, so that the launcher's end is seen here.
        drop(launcher);
        let child = child.context("--exec: cannot start the process that runs the command (/proc/self/exe)")?;
        let mut launcher = Self { link: Some(ours), child };
        let ready = launcher.link.as_mut().map(|link| link.read_exact(&mut [0]));
        ready.transpose().context("--exec: the process that runs the command did not start")?;
        Ok(launcher)
    }

    /// Has the command run with this on its stdin, unless it still runs for an earlier one. Waits only where the
    /// other end is slow to take it, and then for a moment.
    pub fn run(&mut self, summary: &[u8]) {
        let Some(link) = &mut self.link else { return };
        let Some(size) = u32::try_from(summary.len()).ok().filter(|size| *size <= MOST) else {
            warn!("--exec: the summary is too large, and the command is not run");
            return;
        };
        if let Err(error) = link.write_all(&size.to_ne_bytes()).and_then(|()| link.write_all(summary)) {
            warn!(
                "--exec: the process that runs the command is gone, or too slow ({error}), and is asked no more; start \
                 tracer again"
            );
            self.link = None;
            // Collected now or when tracer ends.
            let _ = self.child.try_wait();
        }
    }
}

impl Drop for Launcher {
    /// Lets it end, and waits a moment for that.
    fn drop(&mut self) {
        self.link = None;
        let until = Instant::now() + Duration::from_millis(200);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The launcher itself: runs the command for each summary that comes over stdin, until its other end is gone.
///
/// # Errors
/// It could not give up its privileges, or stdin is not what [`Launcher::start`] made.
pub fn serve(command: &str) -> Result<()> {
    std::fs::write("/proc/self/comm", "tracer-launcher")?;
    privileges::drop_all(|| true)?;
    // Who tells all processes of a service to print a summary does not mean this one, nor the command: a handler, unlike
    // a signal that is ignored, does not outlive `exec`.
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGUSR1, on_usr1 as *const () as libc::sighandler_t) };
    let mut link = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    link.write_all(&[READY])?;
    serve_link(&mut link, command)
}

extern "C" fn on_usr1(_signal: libc::c_int) {}

fn serve_link(link: &mut UnixStream, command: &str) -> Result<()> {
    let running = Arc::new(AtomicBool::new(false));
    while let Some(summary) = receive(link)? {
        if running.load(Ordering::Acquire) {
            warn!("--exec: the command still runs for an earlier alert, and is not started again");
            continue;
        }
        match start(command, summary) {
            Ok(child) => {
                running.store(true, Ordering::Release);
                let running = Arc::clone(&running);
                std::thread::Builder::new().name("waiter".to_owned()).spawn(move || {
                    wait(child);
                    running.store(false, Ordering::Release);
                })?;
            }
            Err(error) => warn!("--exec: the command could not be started: {error}"),
        }
    }
    // What still runs is not waited for.
    Ok(())
}

/// The next summary, in memory, to be read from its beginning; `None`: the other end is gone.
fn receive(link: &mut UnixStream) -> io::Result<Option<File>> {
    let mut size = [0; 4];
    match link.read_exact(&mut size) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let size = u32::from_ne_bytes(size);
    if size > MOST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a summary that is too large"));
    }
    let mut summary = File::from(
        // Where `vm.memfd_noexec` forbids any other; before 6.3 no kernel knows it.
        memfd_create("tracer-summary", MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| memfd_create("tracer-summary", MemfdFlags::CLOEXEC))?,
    );
    let copied = io::copy(&mut link.take(size.into()), &mut summary)?;
    if copied < size.into() {
        // It went in the middle of it.
        return Ok(None);
    }
    summary.rewind()?;
    Ok(Some(summary))
}

/// What it prints goes to stderr: stdout is for events.
fn start(command: &str, summary: File) -> io::Result<Child> {
    let stderr = || io::stderr().as_fd().try_clone_to_owned().map(Stdio::from);
    Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(summary)
        .stdout(stderr()?)
        .stderr(stderr()?)
        // A signal for the launcher is not for the command.
        .process_group(0)
        .spawn()
}

fn wait(mut child: Child) {
    match child.wait() {
        Ok(status) if status.success() => {}
        Ok(status) => warn!("--exec: the command failed: {status}"),
        Err(error) => warn!("--exec: the command cannot be waited for: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// A launcher that a thread plays, with its privileges.
    fn played(command: String) -> (Launcher, std::thread::JoinHandle<Result<()>>) {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let child = Command::new("true").spawn().expect("it starts");
        let thread = std::thread::spawn(move || serve_link(&mut theirs, &command));
        (Launcher { link: Some(ours), child }, thread)
    }

    fn wait_for(path: &Path, size: u64) {
        let begun = Instant::now();
        while fs::metadata(path).map_or(0, |file| file.len()) < size {
            assert!(begun.elapsed() < Duration::from_secs(20), "{} is not there", path.display());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn the_command_gets_all_of_a_large_summary_and_can_run_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let (got, pid) = (directory.path().join("got"), directory.path().join("pid"));
        let command = format!("cat >> '{}'; echo $$ > '{}.new'; mv '{1}.new' '{1}'", got.display(), pid.display());
        let (mut launcher, thread) = played(command);
        // More than any pipe holds.
        let summary = vec![b'x'; 3 << 20];
        launcher.run(&summary);
        wait_for(&pid, 1);
        assert_eq!(fs::read(&got).expect("written"), summary);
        // It has said so, but need not have ended: until then it is not started again.
        let begun = Instant::now();
        while fs::metadata(&got).expect("written").len() < 2 * summary.len() as u64 {
            assert!(begun.elapsed() < Duration::from_secs(20), "it runs again");
            launcher.run(&summary);
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(launcher);
        thread.join().expect("it does not panic").expect("it ends in order");
    }

    #[test]
    fn a_command_that_does_not_read_holds_nothing_up_and_runs_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let begun = directory.path().join("begun");
        // It ends when the directory goes.
        let (mut launcher, thread) =
            played(format!("echo $$ >> '{0}'; while [ -e '{0}' ]; do sleep 0.05; done", begun.display()));
        launcher.run(&vec![b'x'; 4 << 20]);
        wait_for(&begun, 1);
        launcher.run(b"again");
        drop(launcher);
        thread.join().expect("it does not panic").expect("it does not wait for the command");
        assert_eq!(fs::read_to_string(&begun).expect("written").lines().count(), 1, "one at a time");
    }

    #[test]
    fn what_is_no_summary_ends_it() {
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        ours.write_all(&u32::MAX.to_ne_bytes()).expect("it is open");
        let mut link = theirs;
        let error = serve_link(&mut link, "true").expect_err("too large");
        assert!(error.to_string().contains("too large"), "{error}");
    }

    #[test]
    fn one_that_is_gone_is_asked_no_more() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        drop(theirs);
        let child = Command::new("true").spawn().expect("it starts");
        let mut launcher = Launcher { link: Some(ours), child };
        launcher.run(b"{}");
        assert!(launcher.link.is_none());
        launcher.run(b"{}");
    }
}
