//! Sockets whose end the kernel showed to no BPF program.
//!
//! A kernel may keep its tracepoints from BPF programs while certain tasks run, and still have them traced: one was seen that
//! did so for threads of its first process, and counted no miss. If softirq ends a socket on top of such a task, tracer cannot
//! know of it. Two witnesses decide: ftrace, which tells of each socket that is destroyed, and a program that does
//! nothing but keep the cookies of the sockets that end. What only the former has was hidden; where ftrace cannot be
//! used, nothing was.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::bpf::{Recent, Types, tracepoint, uapi};

/// Of so many ends one may be hidden: ten times what was seen. Where more are said to be, the witnesses are not believed.
pub(crate) const ONE_OF: u64 = 500;
/// The last so many cookies are kept: many more than a host ends sockets during one batch, or until
/// they are asked for.
const SOCKETS: u32 = 1 << 18;
const TCP_CLOSE: i32 = 7;

/// Both witnesses, at work.
pub(crate) struct Hidden {
    ended: Recent,
    _program: [OwnedFd; 2],
    /// `None`: ftrace cannot be used here.
    destroyed: Option<Ftrace>,
}

impl Hidden {
    /// Watches; of what ftrace tells, only the sockets of these ports.
    pub(crate) fn watch(ports: std::ops::RangeInclusive<u16>) -> Result<Self> {
        let ended = Recent::create(SOCKETS).context("cannot make a map")?;
        let program = tracepoint("inet_sock_set_state", &keeps_cookies(&ended), &Types::read()?)?;
        let destroyed = Ftrace::start(ports).inspect_err(|error| {
            eprintln!("xtask: ftrace cannot be used, so a record that is missing is tracer's: {error:#}")
        });
        Ok(Self { ended, _program: program, destroyed: destroyed.ok() })
    }

    /// Reads what ftrace has told since.
    pub(crate) fn read(&mut self) -> Result<()> {
        self.destroyed.as_mut().map_or(Ok(()), Ftrace::read)
    }

    /// The same; answers the local and remote addresses of those sockets that were hidden, and forgets all. To be called again and
    /// again: what ftrace tells is held in the kernel only until that has no room.
    pub(crate) fn take(&mut self) -> Result<Vec<(SocketAddr, SocketAddr)>> {
        self.read()?;
        let told = self.destroyed.as_mut().map(|ftrace| std::mem::take(&mut ftrace.cookies)).unwrap_or_default();
        let mut hidden = Vec::new();
        for (ends, cookies) in told {
            for cookie in cookies {
                if !self.was_seen(cookie)? {
                    hidden.push(ends);
                }
            }
        }
        Ok(hidden)
    }

    /// How many sockets with these addresses were hidden, up to the last [`Hidden::read`].
    pub(crate) fn count(&self, local: SocketAddr, remote: SocketAddr) -> Result<usize> {
        let cookies = self.destroyed.as_ref().and_then(|ftrace| ftrace.cookies.get(&(local, remote)));
        let mut hidden = 0;
        for cookie in cookies.into_iter().flatten() {
            hidden += usize::from(!self.was_seen(*cookie)?);
        }
        Ok(hidden)
    }

    /// # Errors
    /// The kernel does not say.
    fn was_seen(&self, cookie: u64) -> Result<bool> {
        self.ended.contains(cookie).context("a cookie cannot be looked up")
    }
}

/// `if (newstate == TCP_CLOSE) ended[cookie] = 0`, for
/// `trace_inet_sock_set_state(const struct sock *sk, const int oldstate, const int newstate)`.
fn keeps_cookies(ended: &Recent) -> [u64; 17] {
    use uapi::{instruction as op, mov};
    [
        op(0xbf, 6, 1, 0, 0),                                    // r6 = ctx
        op(0x79, 1, 6, 16, 0),                                   // r1 = newstate
        op(0x56, 1, 0, 12, TCP_CLOSE),                           // if w1 != TCP_CLOSE goto out
        op(0x79, 1, 6, 0, 0),                                    // r1 = sk
        op(0x85, 0, 0, 0, uapi::GET_SOCKET_COOKIE),              // r0 = the cookie
        op(0x7b, 10, 0, -8, 0),                                  // *(u64 *)(fp - 8) = r0
        op(0x7a, 10, 0, -16, 0),                                 // *(u64 *)(fp - 16) = 0
        op(0x18, 1, uapi::PSEUDO_MAP_FD, 0, ended.descriptor()), // r1 = the map, in two
        0,
        op(0xbf, 2, 10, 0, 0),                    // r2 = fp
        op(0x07, 2, 0, 0, -8),                    // r2 -= 8
        op(0xbf, 3, 10, 0, 0),                    // r3 = fp
        op(0x07, 3, 0, 0, -16),                   // r3 -= 16
        mov(4, 0),                                // r4 = BPF_ANY
        op(0x85, 0, 0, 0, uapi::MAP_UPDATE_ELEM), // update
        mov(0, 0),                                // out: r0 = 0
        uapi::EXIT,
    ]
}

/// What the tracepoint `tcp_destroy_sock` tells.
struct Ftrace {
    /// Closed first: as long as it is open the instance is busy.
    pipe: File,
    instance: Instance,
    /// The last line, if it is not whole yet.
    rest: String,
    /// By local and remote address.
    cookies: HashMap<(SocketAddr, SocketAddr), Vec<u64>>,
}

impl Ftrace {
    fn start(ports: std::ops::RangeInclusive<u16>) -> Result<Self> {
        let instance = Instance::make()?;
        let (first, last) = (ports.start(), ports.end());
        let event = instance.path.join("events/tcp/tcp_destroy_sock");
        let filter = format!("(sport >= {first} && sport <= {last}) || (dport >= {first} && dport <= {last})");
        fs::write(event.join("filter"), filter).context("this kernel's tcp_destroy_sock cannot be filtered")?;
        // Per CPU: what a batch may need, which is read at its end.
        fs::write(instance.path.join("buffer_size_kb"), "16384")?;
        fs::write(event.join("enable"), "1")?;
        let pipe = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(instance.path.join("trace_pipe"))?;
        Ok(Self { pipe, instance, rest: String::new(), cookies: HashMap::new() })
    }

    fn read(&mut self) -> Result<()> {
        let mut buffer = [0; 1 << 16];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => self.rest.push_str(&String::from_utf8_lossy(&buffer[..read])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    return Err(error).with_context(|| format!("{}/trace_pipe", self.instance.path.display()));
                }
            }
            let whole = self.rest.rfind('\n').map_or(0, |at| at + 1);
            for line in self.rest[..whole].lines() {
                if let Some((ends, cookie)) = destroyed(line) {
                    self.cookies.entry(ends).or_default().push(cookie);
                } else if line.contains("LOST") {
                    eprintln!("xtask: ftrace: {line}");
                }
            }
            self.rest.drain(..whole);
        }
    }
}

/// Local and remote address, and the cookie: `… tcp_destroy_sock: family=AF_INET sport=80 … saddrv6=::ffff:10.0.0.1 …
/// sock_cookie=3f`.
fn destroyed(line: &str) -> Option<((SocketAddr, SocketAddr), u64)> {
    let (_, fields) = line.split_once(": tcp_destroy_sock: ")?;
    let field = |name| fields.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    let address = |ip, port| -> Option<SocketAddr> {
        let ip: IpAddr = field(ip)?.parse().ok()?;
        Some(SocketAddr::new(ip.to_canonical(), field(port)?.parse().ok()?))
    };
    let cookie = u64::from_str_radix(field("sock_cookie")?, 16).ok()?;
    Some(((address("saddrv6", "sport")?, address("daddrv6", "dport")?), cookie))
}

/// An ftrace instance of its own, in a tracefs that is mounted for it; both are gone when it goes out of scope.
struct Instance {
    path: PathBuf,
    mounted: tempfile::TempDir,
}

impl Instance {
    fn make() -> Result<Self> {
        let mounted = tempfile::Builder::new().prefix("tracer-oracle-tracefs-").tempdir()?;
        mount("none", mounted.path(), "tracefs", MountFlags::empty(), None).context("cannot mount tracefs")?;
        let instances = mounted.path().join("instances");
        let made = Self { path: instances.join(format!("{PREFIX}{}", std::process::id())), mounted };
        // What runs that were killed have left.
        for entry in fs::read_dir(&instances).context("this tracefs has no instances")?.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                remove(&entry.path()).with_context(|| format!("{} is left, and cannot be removed", name.display()))?;
            }
        }
        fs::create_dir(&made.path).context("cannot make an instance")?;
        Ok(made)
    }
}

/// What instances are called, before the process id.
const PREFIX: &str = "tracer-oracle-";

fn remove(instance: &Path) -> io::Result<()> {
    fs::write(instance.join("events/enable"), "0")?;
    fs::remove_dir(instance)
}

impl Drop for Instance {
    fn drop(&mut self) {
        let removed = if self.path.exists() { remove(&self.path) } else { Ok(()) };
        // Whether it could be removed or not: the directory is emptied next.
        for done in [removed, unmount(self.mounted.path(), UnmountFlags::DETACH).map_err(io::Error::from)] {
            if let Err(error) = done {
                eprintln!("xtask: {}: {error}", self.path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ftrace_is_read() {
        let line = "     ksoftirqd/0-14      [000] ..s1. 23649.597659: tcp_destroy_sock: family=AF_INET sport=20006 dport=58002 \
                    saddr=10.77.0.1 daddr=10.77.0.250 saddrv6=::ffff:10.77.0.1 daddrv6=::ffff:10.77.0.250 sock_cookie=13bfead";
        let ends = ("10.77.0.1:20006".parse().expect("an address"), "10.77.0.250:58002".parse().expect("an address"));
        assert_eq!(destroyed(line), Some((ends, 0x13b_fead)));
        assert_eq!(destroyed("CPU:1 [LOST 3 EVENTS]"), None);
    }
}
