//! The allocator: it keeps what is freed, for a next time that may never come.

/// Gives back to the kernel what is free: for when much has been freed, and is not wanted again soon.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it only looks at what is free.
    unsafe {
        libc::malloc_trim(0)
    };
}
