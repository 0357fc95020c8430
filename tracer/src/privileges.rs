//! What each of the two processes may still do once the programs are attached.
//!
//! Everything is read-only from then on. Both are nobody's, where they were root's. The process that reads records gives up
//! every capability; the broker keeps two, for what no other process can do. Nothing can be gained again. To be called before
//! any thread is started: capabilities belong to threads.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid, geteuid, set_dumpable_behavior};
use rustix::thread::{set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// What the broker needs, and for what.
const BROKER: [Capability; 2] = [
    // Entering a network namespace, to open a socket there that asks what is left of a connection.
    Capability::CAP_SYS_ADMIN,
    // `/proc/<pid>/exe` and `/proc/<pid>/ns/net` of other users' processes.
    Capability::CAP_SYS_PTRACE,
];

/// The user that root becomes: the kernel's `nobody`, who usually owns nothing.
const NOBODY: u32 = 65534;

/// Where this is root's, becomes nobody's: root owns files, and user namespaces, in whose network namespaces it may do
/// everything without any capability. To be followed by [`drop_all`] or [`keep_for_broker`], as no capability is given up.
///
/// # Errors
/// The kernel refused; not where it is not allowed (a container's root need not be). Then root it stays, which `preflight` has
/// said.
pub fn leave_root() -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    let leave = || -> Result<(), Errno> {
        // What is needed still, is kept by who calls this.
        set_keep_capabilities(true)?;
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    };
    // Behind it nothing is effective any more.
    lower_bound().context("cannot give up capabilities")?;
    let left = leave();
    set_keep_capabilities(false).context("cannot give up capabilities")?;
    match left {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(error) => Err(error).context("cannot become another user than root"),
    }
}

/// Gives up every capability, and the way to get one back. Before Linux 5.19 a process without `CAP_BPF` may not even read
/// its own maps: it is kept where `works` fails without.
///
/// # Errors
/// The kernel refused, as it may not: nothing is gained by this.
pub fn drop_all(works: impl FnOnce() -> bool) -> Result<()> {
    let give_up = || -> Result<CapsHashSet, caps::errors::CapsError> {
        lower_bound()?;
        let permitted = caps::read(None, CapSet::Permitted)?;
        caps::clear(None, CapSet::Effective)?;
        if works() {
            return Ok(CapsHashSet::new());
        }
        // Either one will do.
        let needed = [Capability::CAP_BPF, Capability::CAP_SYS_ADMIN];
        Ok(needed.into_iter().find(|needed| permitted.contains(needed)).into_iter().collect())
    };
    let kept = give_up().context("cannot give up capabilities")?;
    keep(&kept)
}

/// Gives up what the broker does not need, and the way to get it back.
///
/// # Errors
/// As [`drop_all`].
pub fn keep_for_broker() -> Result<()> {
    keep(&BROKER.into_iter().collect())
}

/// What a program that is started could have at most. It takes `CAP_SETPCAP`; without that, `no_new_privs` does.
fn lower_bound() -> Result<(), caps::errors::CapsError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    Ok(())
}

fn keep(kept: &CapsHashSet) -> Result<()> {
    let drop = || -> Result<(), caps::errors::CapsError> {
        caps::clear(None, CapSet::Ambient)?;
        lower_bound()?;
        caps::clear(None, CapSet::Inheritable)?;
        let permitted: CapsHashSet = caps::read(None, CapSet::Permitted)?.intersection(kept).copied().collect();
        // The effective ones must be permitted at all times.
        caps::clear(None, CapSet::Effective)?;
        caps::set(None, CapSet::Permitted, &permitted)?;
        caps::set(None, CapSet::Effective, &permitted)
    };
    drop().context("cannot give up capabilities")?;
    rustix::thread::set_no_new_privs(true).context("cannot set no_new_privs")
}

/// Keeps others of the same user from taking this process over (`ptrace`, `/proc/<pid>/mem`), and its memory from a core file.
///
/// # Errors
/// The kernel refused.
pub fn seal() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("cannot keep other processes out of this one")
}
