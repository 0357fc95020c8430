//! What this process may still do once the programs are attached.
//!
//! Everything is read-only from here on, so what is only needed to load and attach is given up for good, and nothing new
//! can be gained. Must be called before any thread is started: capabilities belong to threads.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};

/// What is needed while tracing, and for what.
const KEPT: [Capability; 4] = [
    // Reading the programs' counters, on kernels before 5.19.
    Capability::CAP_BPF,
    // Entering a network namespace, to ask what is left of a connection there.
    Capability::CAP_SYS_ADMIN,
    // `/proc/<pid>/exe` and `/proc/<pid>/ns/net` of other users' processes.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
];

/// Gives up every other capability, and the way to get it back.
///
/// # Errors
/// The kernel refused, as it may not: nothing is gained by this.
pub fn drop_unneeded() -> Result<()> {
    let kept: CapsHashSet = KEPT.into_iter().collect();
    let drop = || -> Result<(), caps::errors::CapsError> {
        caps::clear(None, CapSet::Ambient)?;
        for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
            let have = caps::read(None, set)?;
            caps::set(None, set, &have.intersection(&kept).copied().collect())?;
        }
        Ok(())
    };
    drop().context("cannot give up capabilities")?;
    rustix::thread::set_no_new_privs(true).context("cannot set no_new_privs")
}
