//! One walk through `/proc`: the network namespaces of the host, and which process has which socket.
//!
//! Namespaces are found where a process is in one, where one is mounted (`ip netns`) as tracer sees it, and where a process
//! holds one open. One that only a socket, or a thread other than the first, keeps alive is not found. A socket that several processes
//! have is said to be that of the lowest process id. What another user's process has is not readable without privileges:
//! then it is counted, and nothing here fails. How much is looked at, and kept, is bounded.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::preflight::{mountinfo, unescape};

/// Namespaces that are kept.
const NAMESPACES: usize = 4_096;
/// Open files that are looked at.
const FILES: u64 = 4_000_000;
/// Sockets whose process is kept.
const SOCKETS: usize = 2_000_000;

/// A process that has a socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Owner {
    /// Process id, as `/proc` shows it.
    pub pid: u32,
    /// Name of its main thread, at most 15 bytes; another process chose it: escape before showing.
    pub comm: String,
}

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    /// What it can be entered by.
    pub(super) path: PathBuf,
    /// The name that it is mounted under; escape before showing.
    pub(super) name: Option<String>,
    /// It may be a namespace of another kind.
    pub(super) is_doubtful: bool,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// By inode number.
    pub(super) namespaces: HashMap<u64, Namespace>,
    /// Process ids by the inode number of a socket.
    sockets: HashMap<u64, u32>,
    /// Names of those processes.
    comms: HashMap<u32, String>,
    /// Processes whose files, or whose namespace, could not be read.
    pub(super) unreadable: u64,
    /// Namespaces, files and sockets beyond the bounds.
    pub(super) omitted: u64,
}

impl Found {
    /// The process that has this socket, if it was found.
    pub(super) fn owner(&self, inode: u32) -> Option<Owner> {
        let pid = *self.sockets.get(&inode.into())?;
        Some(Owner { pid, comm: self.comms.get(&pid).cloned().unwrap_or_default() })
    }

    fn namespace(&mut self, inode: u64, namespace: Namespace) {
        let full = self.namespaces.len() >= NAMESPACES;
        match self.namespaces.entry(inode) {
            std::collections::hash_map::Entry::Occupied(_) => {}
            std::collections::hash_map::Entry::Vacant(_) if full => self.omitted += 1,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(namespace);
            }
        }
    }

    /// Looks at the open files of one process; `nsfs` is the device of namespaces, `left` how many files may still be
    /// looked at.
    fn files(&mut self, process: &Path, pid: u32, nsfs: Option<u64>, left: &mut u64) {
        let Ok(files) = fs::read_dir(process.join("fd")) else {
            // A process that has ended in the meantime is not missed.
            self.unreadable += u64::from(process.exists());
            return;
        };
        let mut has_sockets = false;
        for file in files.flatten() {
            if *left == 0 {
                self.omitted += 1;
                return;
            }
            *left -= 1;
            let Ok(target) = fs::read_link(file.path()) else { continue };
            let target = target.as_os_str().as_bytes();
            if let Some(inode) = inode(target, b"socket:[") {
                if self.sockets.len() < SOCKETS {
                    self.sockets.entry(inode).or_insert(pid);
                    has_sockets = true;
                } else {
                    self.omitted += 1;
                }
            } else if let Some(inode) = inode(target, b"net:[") {
                self.namespace(inode, Namespace { path: file.path(), name: None, is_doubtful: false });
            } else if target == b"/"
                && let Ok(meta) = fs::metadata(file.path())
                && Some(meta.dev()) == nsfs
            {
                // It was opened by a name that it had, and that has been taken away since.
                self.namespace(meta.ino(), Namespace { path: file.path(), name: None, is_doubtful: true });
            }
        }
        if has_sockets {
            let comm = fs::read(process.join("comm")).unwrap_or_default();
            let comm = String::from_utf8_lossy(comm.strip_suffix(b"\n").unwrap_or(&comm)).into_owned();
            self.comms.insert(pid, comm);
        }
    }
}

/// Walks.
pub(super) fn walk() -> Found {
    let mut found = Found::default();
    // Names first: they stay when processes end.
    for (inode, path) in mounted(&mountinfo()) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        found.namespace(inode, Namespace { path, name, is_doubtful: false });
    }
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    // The lowest id, of several that have a socket.
    pids.sort_unstable();
    let mut left = FILES;
    let nsfs = fs::metadata("/proc/self/ns/net").ok().map(|meta| meta.dev());
    for pid in pids {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let path = process.join("ns/net");
        if let Some(inode) = fs::read_link(&path).ok().and_then(|link| inode(link.as_os_str().as_bytes(), b"net:[")) {
            found.namespace(inode, Namespace { path, name: None, is_doubtful: false });
        }
        found.files(&process, pid, nsfs, &mut left);
    }
    found
}

/// The number in `kind[number]`.
pub(crate) fn inode(link: &[u8], kind: &[u8]) -> Option<u64> {
    std::str::from_utf8(link.strip_prefix(kind)?.strip_suffix(b"]")?).ok()?.parse().ok()
}

/// Network namespaces that are mounted, by `/proc/self/mountinfo`.
pub(crate) fn mounted(mountinfo: &str) -> impl Iterator<Item = (u64, PathBuf)> {
    mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "nsfs").then_some(())?;
        let mut fields = before.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        Some((inode(root.as_bytes(), b"net:[")?, PathBuf::from(unescape(at))))
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn mounted_namespaces_have_names() {
        let mountinfo = "\
26 24 0:23 / /sys/fs/cgroup ro shared:7 - tmpfs tmpfs ro
40 24 0:4 net:[4026532300] /run/netns/blue rw shared:1 - nsfs nsfs rw
41 24 0:4 net:[4026532301] /run/netns/with\\040blank rw - nsfs nsfs rw
42 24 0:4 mnt:[4026532302] /run/other rw - nsfs nsfs rw
garbage

 - nsfs";
        let got: Vec<_> = mounted(mountinfo).collect();
        let wanted = [(4_026_532_300, "/run/netns/blue"), (4_026_532_301, "/run/netns/with blank")];
        assert_eq!(got, wanted.map(|(inode, path)| (inode, PathBuf::from(path))));
    }

    #[test]
    fn finds_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
        let socket = fs::metadata(format!("/proc/self/fd/{fd}")).expect("it is open").ino();
        // Held open.
        let _namespace = fs::File::open("/proc/self/ns/net").expect("/proc");
        let found = walk();
        let own = fs::metadata("/proc/self/ns/net").expect("/proc").ino();
        assert!(found.namespaces.contains_key(&own), "{:?}", found.namespaces);
        let owner = found.owner(u32::try_from(socket).expect("small")).expect("it has an owner");
        let comm = fs::read_to_string("/proc/self/comm").expect("/proc");
        assert_eq!(owner, Owner { pid: std::process::id(), comm: comm.trim_end_matches('\n').to_owned() });
        assert_eq!(found.owner(0), None);
    }
}
