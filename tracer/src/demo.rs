//! `tracer run --demo`: the classic case on loopback, for a first look.
//!
//! What comes in: nothing. What goes out: two child processes of tracer's own binary, a small HTTP/1.1 server that keeps
//! connections alive, and a client that sends `Connection: close` once a second. The server obeys and therefore closes
//! first: TIME_WAIT piles up on its side, though the client asked for it. Two processes, because each end of a connection
//! shall be seen to have its own owner. Neither may outlive tracer, and nothing that arrives may make the server panic,
//! wait for ever or grow.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{interval, timeout};

use crate::privileges;

/// Name of the hidden subcommand that runs [`serve`].
pub const SERVER: &str = "demo-server";
/// Name of the hidden subcommand that runs [`request_loop`]; its argument is the port.
pub const CLIENT: &str = "demo-client";

const EVERY: Duration = Duration::from_secs(1);
/// How long a connection may be idle.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: usize = 16;
const MAX_HEAD: usize = 8 << 10;

/// The running demo; dropping it ends both processes.
pub struct Demo {
    server: Child,
    client: Child,
    port: u16,
}

impl Demo {
    /// The server's port on 127.0.0.1.
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // The client first: a server that dies in the middle of an exchange would be a cause of its own.
        for child in [&mut self.client, &mut self.server] {
            end(child);
        }
    }
}

/// Starts both processes. To be called on the main thread: they die with the thread that started them.
///
/// # Errors
/// The binary could not be started again, or the server found no port.
pub fn start() -> io::Result<Demo> {
    let mut server = this_binary()?.arg(SERVER).stdout(Stdio::piped()).spawn()?;
    let client = port_of(&mut server).and_then(|port| {
        let client = this_binary()?.args([CLIENT, &port.to_string()]).stdout(Stdio::null()).spawn()?;
        Ok((client, port))
    });
    match client {
        Ok((client, port)) => Ok(Demo { server, client, port }),
        Err(error) => {
            end(&mut server);
            Err(error)
        }
    }
}

fn this_binary() -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    // Ctrl-C is for tracer, which then ends these two.
    command.stdin(Stdio::null()).process_group(0);
    Ok(command)
}

/// Reads the port that [`serve`] prints.
fn port_of(server: &mut Child) -> io::Result<u16> {
    let stdout = server.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    line.trim().parse().map_err(|_| io::Error::other("the demo server did not start"))
}

fn end(child: &mut Child) {
    // Errors mean that it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// What both processes do first: die with tracer, bear a name that shows in its output, and keep no privilege.
fn become_child(name: &str) -> io::Result<tokio::runtime::Runtime> {
    std::fs::write("/proc/self/comm", name)?;
    // It answers whoever connects to it.
    privileges::leave_root().and_then(|()| privileges::drop_all(|| true)).map_err(io::Error::other)?;
    set_parent_process_death_signal(Some(Signal::KILL))?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// The server: prints its port, then answers until it is killed.
///
/// # Errors
/// No port could be had.
pub fn serve() -> io::Result<()> {
    become_child(SERVER)?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        writeln!(io::stdout(), "{}", listener.local_addr()?.port())?;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return Ok(());
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(async move {
                        // The peer's errors end its own connection only.
                        let _ = converse(stream).await;
                        drop(slot);
                    });
                }
                // Such as too many open files: that passes.
                Err(_) => tokio::time::sleep(EVERY).await,
            }
        }
    })
}

/// Answers request after request, until one asks to close, or none comes.
async fn converse(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let head = match timeout(KEEP_ALIVE, next_head(&mut stream, &mut buffer)).await {
            Ok(head) => head?,
            Err(_) => return Ok(()),
        };
        let Some(head) = head else {
            return Ok(());
        };
        let close = asks_to_close(&head);
        let connection = if close { "close" } else { "keep-alive" };
        let response = format!("HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: {connection}\r\n\r\nhello\n");
        timeout(KEEP_ALIVE, stream.write_all(response.as_bytes())).await??;
        if close {
            return Ok(());
        }
    }
}

/// Takes the next request head out of the stream; `None` if there is none any more.
async fn next_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = buffer.split_off(end + 4);
            return Ok(Some(std::mem::replace(buffer, rest)));
        }
        if buffer.len() >= MAX_HEAD || stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn asks_to_close(head: &[u8]) -> bool {
    head.split(|byte| *byte == b'\n').any(|line| line.trim_ascii().eq_ignore_ascii_case(b"connection: close"))
}

/// The client: one request a second, each on a connection of its own, until it is killed.
///
/// # Errors
/// The process could not be set up.
pub fn request_loop(port: u16) -> io::Result<()> {
    become_child(CLIENT)?.block_on(async {
        let mut ticks = interval(EVERY);
        loop {
            ticks.tick().await;
            if let Ok(Err(error)) = timeout(KEEP_ALIVE, request(port)).await {
                writeln!(io::stderr(), "demo-client: {error}")?;
            }
        }
    })
}

async fn request(port: u16) -> io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let request = format!("GET /demo HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    // To the end: the server is to close first.
    tokio::io::copy(&mut stream.take(MAX_HEAD as u64), &mut tokio::io::sink()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::asks_to_close;

    #[test]
    fn obeys_only_a_whole_header_line() {
        assert!(asks_to_close(b"GET / HTTP/1.1\r\nconnection: CLOSE\r\n\r\n"));
        assert!(!asks_to_close(b"GET /connection: close HTTP/1.1\r\nX-Connection: close\r\n\r\n"));
        assert!(!asks_to_close(b"GET / HTTP/1.1\r\n\r\n"));
    }
}
