//! The load: nginx and its clients in a network namespace of their own, and processes that hold connections open.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, getrlimit, setrlimit};

use super::measure;
use crate::network::{Namespace, Running};
use crate::nginx::{self, Settings};
use crate::workspace;

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Workload {
    /// A connection for each request.
    Short,
    /// Sixteen connections, with all requests on them.
    KeepAlive,
    /// The same, with a 2 KiB cookie in each request.
    Cookie,
    /// One body of 1 GiB.
    Bulk,
}

/// What the clients did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// Connections, requests, or packets of a bulk transfer.
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
}

impl Done {
    pub(crate) fn rate(self) -> f64 {
        self.operations as f64 / self.seconds
    }
}

pub(crate) const PORT: u16 = 80;
const BODY: u64 = 1 << 30;
const COOKIE: usize = 2 << 10;

/// nginx in a namespace.
pub(crate) struct Load {
    pub(crate) namespace: Namespace,
    nginx: Running,
}

impl Load {
    pub(crate) fn start(directory: &Path) -> Result<Self> {
        let namespace = Namespace::new()?;
        // No TIME_WAIT must be in doubt for want of room. Each short connection leaves one, of which there are as many as
        // local ports at most: a port is used again while its last connection is in TIME_WAIT on the server's side.
        for (name, value) in [
            ("net.ipv4.tcp_max_tw_buckets", "1000000"),
            ("net.core.somaxconn", "4096"),
            ("net.ipv4.tcp_max_syn_backlog", "4096"),
        ] {
            namespace.set(name, value);
        }
        std::fs::File::create(directory.join("large"))?.set_len(BODY)?;
        let http = "keepalive_requests 1000000000; keepalive_timeout 600s; sendfile on;";
        let settings = Settings { port: PORT, backlog: Some(4096), connections: 4096, http };
        let nginx = nginx::start(&namespace, directory, &settings)?;
        Ok(Self { namespace, nginx })
    }

    /// A process of the namespace.
    pub(crate) fn pid(&self) -> u32 {
        self.nginx.pid()
    }

    /// Has the clients go on until what is returned is dropped.
    pub(crate) fn go_on(&self, workload: Workload, directory: &Path) -> Result<Running> {
        Running::start(&mut self.wrk(workload, 3600)?, directory, "wrk")
    }

    /// Requests that were answered so far.
    pub(crate) fn requests(&self) -> Result<u64> {
        let mut curl = self.namespace.command(&workspace::find("curl").context("no curl")?);
        let said =
            workspace::output(curl.args(["-s", "-S", "-f", &format!("http://127.0.0.1:{PORT}{}", nginx::STATUS)]))?;
        requests_of(&said).with_context(|| format!("nginx said: {said}"))
    }

    fn wrk(&self, workload: Workload, seconds: u32) -> Result<Command> {
        let mut wrk = self.namespace.command(&workspace::find("wrk").context("no wrk")?);
        wrk.args(["-t", "1", "-c", "16", "-d", &format!("{seconds}s")]);
        match workload {
            Workload::Short => wrk.args(["-H", "Connection: close"]),
            Workload::Cookie => wrk.args(["-H", &format!("Cookie: session={}", "x".repeat(COOKIE))]),
            Workload::KeepAlive | Workload::Bulk => &mut wrk,
        };
        wrk.arg(format!("http://127.0.0.1:{PORT}/"));
        Ok(wrk)
    }

    /// Runs the clients for some seconds (a bulk transfer takes what it takes).
    pub(crate) fn run(&self, workload: Workload, seconds: u32) -> Result<Done> {
        if workload == Workload::Bulk {
            let before = measure::packets(self.pid())?;
            let began = Instant::now();
            let mut curl = self.namespace.command(&workspace::find("curl").context("no curl")?);
            workspace::succeed(curl.args([
                "-s",
                "-S",
                "-f",
                "-o",
                "/dev/null",
                &format!("http://127.0.0.1:{PORT}/large"),
            ]))?;
            let seconds = began.elapsed().as_secs_f64();
            return Ok(Done { operations: measure::packets(self.pid())? - before, seconds });
        }
        let said = workspace::output(&mut self.wrk(workload, seconds)?)?;
        parse(&said).with_context(|| format!("wrk said: {said}"))
    }
}

/// What nginx tells: the number of requests is the third of a line of three.
fn requests_of(said: &str) -> Option<u64> {
    let numbers = |line: &str| line.split_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<u64>>>();
    said.lines().filter_map(numbers).find_map(|numbers| (numbers.len() == 3).then(|| numbers.last().copied())?)
}

/// What wrk prints: `  52340 requests in 2.00s, 7.84MB read`
fn parse(said: &str) -> Option<Done> {
    let words: Vec<&str> = said.split_whitespace().collect();
    let at = words.windows(2).position(|two| two == ["requests", "in"])?;
    let operations: u64 = words.get(at.checked_sub(1)?)?.parse().ok()?;
    let rate: f64 = words.iter().skip_while(|word| **word != "Requests/sec:").nth(1)?.parse().ok()?;
    // An answer that is no 2xx would make it another benchmark.
    (operations > 0 && rate > 0.0 && !said.contains("Non-2xx"))
        .then_some(Done { operations, seconds: operations as f64 / rate })
}

/// Processes that hold connections open, each of them to itself.
pub(crate) struct Held {
    holders: Vec<Child>,
}

impl Held {
    /// Opens connections, with a request on each, and waits until all are open.
    pub(crate) fn open(namespace: &Namespace, connections: u64) -> Result<Self> {
        let files = getrlimit(Resource::Nofile).maximum.unwrap_or(20_000).min(20_000);
        let each = (files - 100) / 2;
        let mut held = Self { holders: Vec::new() };
        let (mut left, mut port) = (connections, 10_000);
        while left > 0 {
            let count = left.min(each);
            let mut command = namespace.command(&std::env::current_exe()?);
            command.args(["hold", &port.to_string(), &count.to_string()]);
            held.holders.push(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
            left -= count;
            port += 1;
        }
        for holder in &mut held.holders {
            let mut line = String::new();
            BufReader::new(holder.stdout.as_mut().context("no stdout")?).read_line(&mut line)?;
            if line != "open\n" {
                bail!("connections could not be held open");
            }
        }
        Ok(held)
    }

    /// Has all of them closed, at once.
    pub(crate) fn close(mut self) -> Result<()> {
        for holder in &mut self.holders {
            drop(holder.stdin.take());
        }
        for holder in &mut self.holders {
            holder.wait()?;
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for holder in &mut self.holders {
            // It may have ended.
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

/// `cargo xtask hold PORT COUNT`: one of those processes. Ends with its standard input.
pub(crate) fn hold(port: u16, count: usize) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let mut pairs = Vec::with_capacity(count);
    let request = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n";
    for _ in 0..count {
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        let (mut server, _) = listener.accept()?;
        client.write_all(request)?;
        server.read_exact(&mut vec![0; request.len()])?;
        pairs.push((client, server));
    }
    println!("open");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(pairs);
    Ok(())
}

/// What the load needs, and the Debian package that has it.
pub(crate) const NEEDED: [workspace::Program; 8] = [
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("ip", "iproute2"),
    ("nginx", "nginx"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
    ("wrk", "wrk"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nginx_tells() {
        let said = "Active connections: 17 \nserver accepts handled requests\n 5 5 4711 \nReading: 0 Writing: 17 Waiting: 0 \n";
        assert_eq!(requests_of(said), Some(4711));
        assert_eq!(requests_of("404 Not Found\n"), None);
    }
}
