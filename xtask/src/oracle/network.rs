//! Two network namespaces joined by a veth pair, and captures of all that passes in them. Gone when they go out of scope.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::network::Namespace;
use crate::workspace;

/// How clients reach the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Over loopback.
    Loopback4,
    Loopback6,
    /// Over loopback with IPv4, to a server whose sockets are IPv6.
    Mapped,
    /// From another namespace.
    Veth4,
    Veth6,
}

impl Route {
    pub(crate) const ALL: [Self; 5] = [Self::Loopback4, Self::Loopback6, Self::Mapped, Self::Veth4, Self::Veth6];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Loopback4 => "loopback IPv4",
            Self::Loopback6 => "loopback IPv6",
            Self::Mapped => "IPv4-mapped",
            Self::Veth4 => "veth IPv4",
            Self::Veth6 => "veth IPv6",
        }
    }

    /// What the server listens on.
    pub(crate) const fn any_address(self) -> &'static str {
        match self {
            Self::Loopback4 | Self::Veth4 => "0.0.0.0",
            Self::Loopback6 | Self::Mapped | Self::Veth6 => "::",
        }
    }

    /// The server's address for one client: each has one of its own, which tells whose a connection is.
    pub(crate) fn address(self, client: u8) -> IpAddr {
        let last = u16::from(client) + 1;
        match self {
            Self::Loopback4 | Self::Mapped => Ipv4Addr::new(127, 0, 1, client + 1).into(),
            Self::Veth4 => Ipv4Addr::new(10, 77, 0, client + 1).into(),
            Self::Loopback6 => Ipv6Addr::new(0xfd00, 0xa, 0, 0, 0, 0, 0, last).into(),
            Self::Veth6 => Ipv6Addr::new(0xfd00, 0xb, 0, 0, 0, 0, 0, last).into(),
        }
    }

    pub(crate) const fn is_loopback(self) -> bool {
        matches!(self, Self::Loopback4 | Self::Loopback6 | Self::Mapped)
    }
}

/// The two namespaces: the servers' and the clients'.
pub(crate) struct Network {
    pub(crate) servers: Namespace,
    pub(crate) clients: Namespace,
}

impl Network {
    /// With addresses for so many clients.
    pub(crate) fn new(clients: u8) -> Result<Self> {
        let network = Self { servers: Namespace::new()?, clients: Namespace::new()? };
        let Self { servers, clients: other } = &network;
        servers.ip(&[
            "link",
            "add",
            "veth",
            "type",
            "veth",
            "peer",
            "name",
            "veth",
            "netns",
            &other.path().display().to_string(),
        ])?;
        for namespace in [servers, other] {
            namespace.ip(&["link", "set", "veth", "up"])?;
        }
        let add = |namespace: &Namespace, address: &str, device: &str| {
            // Without duplicate address detection an IPv6 address can be used at once.
            let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
            namespace.ip(&[&["address", "add", address, "dev", device], nodad].concat())
        };
        add(other, "10.77.0.250/24", "veth")?;
        add(other, "fd00:b::ffff/64", "veth")?;
        for client in 0..clients {
            add(servers, &format!("{}/24", Route::Veth4.address(client)), "veth")?;
            add(servers, &format!("{}/64", Route::Veth6.address(client)), "veth")?;
            add(servers, &format!("{}/128", Route::Loopback6.address(client)), "lo")?;
        }
        for namespace in [servers, other] {
            for name in ["net.core.somaxconn", "net.ipv4.tcp_max_syn_backlog"] {
                namespace.set(name, "4096");
            }
        }
        Ok(network)
    }

    /// Where the clients of a path run.
    pub(crate) const fn clients_of(&self, path: Route) -> &Namespace {
        if path.is_loopback() { &self.servers } else { &self.clients }
    }
}

/// A running `tcpdump` that writes all TCP packets of one device to a file.
pub(crate) struct Capture {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    pub(crate) file: PathBuf,
}

impl Capture {
    pub(crate) fn start(namespace: &Namespace, device: &str, file: PathBuf) -> Result<Self> {
        let mut child = namespace
            .command(&workspace::find("tcpdump").context("no tcpdump")?)
            .args(["-n", "-Z", "root", "-s", "0", "-B", "131072", "-i", device, "-w"])
            .arg(&file)
            .arg("tcp")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run tcpdump")?;
        let mut stderr = BufReader::new(child.stderr.take().context("no stderr")?);
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            if stderr.read_line(&mut line)? == 0 {
                bail!("tcpdump ended: {}", child.wait()?);
            }
        }
        Ok(Self { child, stderr, file })
    }

    /// How long the kernel may keep packets back before `tcpdump` gets them.
    pub(crate) const DELAY: Duration = Duration::from_millis(1200);

    /// Ends it, [`Capture::DELAY`] after the last packet; every packet must be in the file.
    pub(crate) fn stop(mut self) -> Result<PathBuf> {
        kill_process(Pid::from_child(&self.child), Signal::INT)?;
        let mut said = String::new();
        self.stderr.read_to_string(&mut said)?;
        self.child.wait()?;
        if !said.contains("\n0 packets dropped by kernel") {
            bail!("tcpdump did not keep up, so the witness does not know all: {}", said.trim());
        }
        Ok(std::mem::take(&mut self.file))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // It may have been stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
