//! The load of a soak: what a busy host does to its connections, at a bounded rate, in namespaces of its own.
//!
//! nginx and one client thread in each of some namespaces that stay, a namespace now and then that comes and goes, and
//! short-lived processes. What goes out: how many connections were made. It never leaves the loopback devices of these
//! namespaces, and ends with the process that made it.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::net::sockopt::set_socket_linger;

use crate::network::{Namespace, Running};
use crate::nginx::{self, Settings};
use crate::workspace::Program;

/// nginx.
pub(super) const SERVER: u16 = 18_480;
/// Both ends are ours.
pub(super) const OWN: u16 = 18_481;
/// Those that stay.
const NAMESPACES: usize = 3;
/// Between two that come and go.
const VISIT: Duration = Duration::from_secs(10);
/// Connections in such a one.
const VISITED: usize = 8;
/// Longest wait for a peer, or for a process.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the load needs, and the Debian package that has it.
pub(super) const NEEDED: [Program; 6] = [
    ("bash", "bash"),
    ("ip", "iproute2"),
    ("nginx", "nginx"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("ss", "iproute2"),
];

/// What becomes of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `Connection: close`: the server is left in TIME_WAIT.
    Close,
    /// HTTP/1.0.
    Http10,
    /// Ten requests, then the client closes.
    KeepAlive,
    /// One request with a cookie of 2 KiB, which spans segments.
    Cookie,
    /// An exchange, then a RST of the client.
    Reset,
    /// Left open, until the server's keep-alive time-out.
    Idle,
    /// Opened and closed.
    Unused,
    /// The client closes, and the server does so late: FIN_WAIT2 there, CLOSE_WAIT here.
    Late,
    /// Made by a process that ends with it.
    Process,
}

/// One after the other, again and again.
const MIX: [Kind; 20] = [
    Kind::Close,
    Kind::KeepAlive,
    Kind::Late,
    Kind::Close,
    Kind::Process,
    Kind::Http10,
    Kind::Close,
    Kind::Cookie,
    Kind::Idle,
    Kind::KeepAlive,
    Kind::Close,
    Kind::Reset,
    Kind::Late,
    Kind::Close,
    Kind::Process,
    Kind::Http10,
    Kind::Unused,
    Kind::KeepAlive,
    Kind::Cookie,
    Kind::Close,
];

/// A load that runs.
pub(super) struct Load {
    ends: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
    servers: Vec<(Running, Arc<Namespace>)>,
}

impl Load {
    /// Starts what listens; nothing connects yet.
    pub(super) fn prepare(directory: &Path) -> Result<Self> {
        let mut servers = Vec::new();
        for n in 0..NAMESPACES {
            let namespace = Namespace::new()?;
            let directory = directory.join(n.to_string());
            std::fs::create_dir(&directory)?;
            let nginx = serve(&namespace, &directory)?;
            servers.push((nginx, Arc::new(namespace)));
        }
        Ok(Self { ends: Arc::default(), made: Arc::default(), threads: Vec::new(), servers })
    }

    /// Begins, with so many connections a second.
    pub(super) fn begin(&mut self, rate: u32) -> Result<()> {
        let period = Duration::from_secs_f64(NAMESPACES as f64 / f64::from(rate));
        let namespaces: Vec<_> = self.servers.iter().map(|(_, namespace)| Arc::clone(namespace)).collect();
        for namespace in namespaces {
            self.spawn(move |ends, made| {
                namespace.enter()?;
                let mut clients = Clients::new(made)?;
                let mut next = Instant::now();
                for kind in MIX.into_iter().cycle() {
                    if ends.load(Ordering::Relaxed) {
                        break;
                    }
                    clients.make(kind).with_context(|| format!("{kind:?}"))?;
                    clients.settle()?;
                    let now = Instant::now();
                    // What cannot be kept up is not made up for: the rate is a bound.
                    next = (next + period).max(now - period);
                    std::thread::sleep(next.saturating_duration_since(now));
                }
                clients.end()
            })?;
        }
        self.spawn(|ends, made| {
            let mut next = Instant::now();
            while !ends.load(Ordering::Relaxed) {
                if Instant::now() >= next {
                    next += VISIT;
                    visit(made).context("a namespace that comes and goes")?;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        })
    }

    fn spawn(&mut self, work: impl FnOnce(&AtomicBool, &AtomicU64) -> Result<()> + Send + 'static) -> Result<()> {
        let (ends, made) = (Arc::clone(&self.ends), Arc::clone(&self.made));
        self.threads.push(std::thread::Builder::new().spawn(move || work(&ends, &made))?);
        Ok(())
    }

    /// Fails if a part of it has.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(at) = self.threads.iter().position(JoinHandle::is_finished) {
            join(self.threads.swap_remove(at))?;
            bail!("a part of the load ended too early");
        }
        Ok(())
    }

    /// Ends the clients, and waits until the servers have let go of what they had; answers how many connections were made.
    pub(super) fn end(&mut self) -> Result<u64> {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            join(thread)?;
        }
        let deadline = Instant::now() + PATIENCE;
        for (_, namespace) in &self.servers {
            while !namespace.ss(&["state", "connected", "exclude", "time-wait"])?.is_empty() {
                if Instant::now() > deadline {
                    bail!("connections of the load stay open");
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(self.made.load(Ordering::Relaxed))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

fn join(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().map_err(|_| anyhow!("a part of the load panicked"))?
}

/// nginx, which is done with a connection that nobody uses before the soak is.
fn serve(namespace: &Namespace, directory: &Path) -> Result<Running> {
    let http = "keepalive_timeout 2s; large_client_header_buffers 4 8k;";
    nginx::start(namespace, directory, &Settings { port: SERVER, backlog: None, connections: 1024, http })
}

/// The clients of one namespace, in the thread that is in it.
struct Clients<'a> {
    made: &'a AtomicU64,
    listener: TcpListener,
    /// When each is closed, the first in front.
    held: VecDeque<(Instant, TcpStream)>,
    /// Since when each runs.
    children: VecDeque<(Instant, Child)>,
}

impl<'a> Clients<'a> {
    fn new(made: &'a AtomicU64) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, OWN))?;
        Ok(Self { made, listener, held: VecDeque::new(), children: VecDeque::new() })
    }

    fn connect(&self, port: u16) -> Result<TcpStream> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        self.made.fetch_add(1, Ordering::Relaxed);
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn make(&mut self, kind: Kind) -> Result<()> {
        // So long that those of both kinds are let go in the order in which they came.
        let held_until = Instant::now() + Duration::from_secs(3);
        match kind {
            Kind::Close => {
                let mut stream = self.connect(SERVER)?;
                request(&mut stream, "HTTP/1.1", "Connection: close\r\n")?;
                stream.read_to_end(&mut Vec::new())?;
            }
            Kind::Http10 => {
                let mut stream = self.connect(SERVER)?;
                request(&mut stream, "HTTP/1.0", "")?;
                stream.read_to_end(&mut Vec::new())?;
            }
            Kind::KeepAlive => {
                let mut stream = self.connect(SERVER)?;
                for _ in 0..10 {
                    exchange(&mut stream, "")?;
                }
            }
            Kind::Cookie => {
                exchange(&mut self.connect(SERVER)?, &format!("Cookie: session={}\r\n", "x".repeat(2 << 10)))?;
            }
            Kind::Reset => {
                let mut stream = self.connect(SERVER)?;
                exchange(&mut stream, "")?;
                set_socket_linger(&stream, Some(Duration::ZERO))?;
            }
            Kind::Idle => {
                let mut stream = self.connect(SERVER)?;
                exchange(&mut stream, "")?;
                self.held.push_back((held_until, stream));
            }
            Kind::Unused => drop(self.connect(SERVER)?),
            Kind::Late => {
                let client = self.connect(OWN)?;
                let (server, _) = self.listener.accept()?;
                drop(client);
                self.held.push_back((held_until, server));
            }
            Kind::Process => {
                let script = format!(
                    "exec 3<>/dev/tcp/127.0.0.1/{SERVER}; \
                     printf 'GET / HTTP/1.1\\r\\nHost: soak\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
                     while read -r line <&3; do :; done"
                );
                let child = Command::new("bash").args(["-c", &script]).stdin(Stdio::null()).spawn()?;
                self.children.push_back((Instant::now(), child));
            }
        }
        Ok(())
    }

    /// Closes what is due, and collects the processes that have ended.
    fn settle(&mut self) -> Result<()> {
        while self.held.front().is_some_and(|(until, _)| *until <= Instant::now()) {
            self.held.pop_front();
        }
        while let Some((since, child)) = self.children.front_mut() {
            match child.try_wait()? {
                Some(status) if status.success() => {
                    self.made.fetch_add(1, Ordering::Relaxed);
                    self.children.pop_front();
                }
                Some(status) => bail!("a short-lived process: {status}"),
                None if since.elapsed() > PATIENCE => bail!("a short-lived process does not end"),
                None => break,
            }
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.held.clear();
        while !self.children.is_empty() {
            self.settle()?;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Clients<'_> {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn request(stream: &mut TcpStream, version: &str, header: &str) -> Result<()> {
    Ok(stream.write_all(format!("GET / {version}\r\nHost: soak\r\n{header}\r\n").as_bytes())?)
}

/// A request and the response, which ends with its body.
fn exchange(stream: &mut TcpStream, header: &str) -> Result<()> {
    request(stream, "HTTP/1.1", header)?;
    let mut response = Vec::new();
    let mut buffer = [0; 1024];
    while !response.ends_with(b"\r\n\r\nhello\n") {
        match stream.read(&mut buffer)? {
            0 => bail!("nginx closed: {}", String::from_utf8_lossy(&response)),
            n => response.extend_from_slice(buffer.get(..n).unwrap_or_default()),
        }
    }
    Ok(())
}

/// A namespace that comes, has some connections, and goes with the TIME_WAIT sockets that they leave.
fn visit(made: &AtomicU64) -> Result<()> {
    let namespace = Namespace::new()?;
    let inside = || -> Result<()> {
        namespace.enter()?;
        let clients = Clients::new(made)?;
        let mut open = Vec::new();
        for n in 0..VISITED {
            let client = clients.connect(OWN)?;
            let (server, _) = clients.listener.accept()?;
            match n % 3 {
                0 => open.push((Some(client), server)),
                1 => open.push((None, server)),
                _ => {}
            }
        }
        // For as long as that tracer asks there.
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(inside).join().map_err(|_| anyhow!("the visitor panicked"))?)
}
