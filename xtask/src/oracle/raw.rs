//! The client for what no well-behaved client does.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What a script does.
#[derive(Clone, Debug)]
enum Act {
    /// Writes bytes, in one segment if they fit.
    Send(Vec<u8>),
    /// Writes them in pieces of this size, each in a segment of its own.
    Pieces(Vec<u8>, usize),
    /// Reads until the peer has been silent for a moment, or has closed.
    Read,
    /// Waits until there is something to be read, and leaves it there.
    Peek,
    ShutdownWrite,
    /// Longer than a second.
    Idle,
    /// `close` will send a RST.
    Linger0,
}

/// Runs each script `rounds` times against `to`, in this thread's network namespace.
pub(crate) fn run(to: SocketAddr, rounds: u32) -> Result<()> {
    for _ in 0..rounds {
        std::thread::scope(|scope| -> Result<()> {
            let scripts: Vec<_> = scripts().into_iter().map(|script| scope.spawn(move || play(to, &script))).collect();
            for script in scripts {
                script.join().map_err(|_| anyhow::anyhow!("a script panicked"))?.context("the raw client")?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn play(to: SocketAddr, script: &[Act]) -> Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_millis(150)))?;
    let mut buffer = vec![0; 64 << 10];
    for act in script {
        // The server may have closed in the middle of a script: that is a case, too.
        let went_on = match act {
            Act::Send(bytes) => stream.write_all(bytes).is_ok(),
            Act::Pieces(bytes, size) => bytes.chunks(*size).all(|piece| stream.write_all(piece).is_ok()),
            Act::Read => {
                while matches!(stream.read(&mut buffer), Ok(n) if n > 0) {}
                true
            }
            Act::Peek => matches!(stream.peek(&mut buffer), Ok(n) if n > 0),
            Act::ShutdownWrite => stream.shutdown(Shutdown::Write).is_ok(),
            Act::Idle => {
                std::thread::sleep(Duration::from_millis(1200));
                true
            }
            Act::Linger0 => rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).is_ok(),
        };
        if !went_on {
            break;
        }
    }
    Ok(())
}

fn send(text: impl AsRef<[u8]>) -> Act {
    Act::Send(text.as_ref().to_vec())
}

fn scripts() -> Vec<Vec<Act>> {
    use Act::{Idle, Linger0, Peek, Pieces, Read, ShutdownWrite};
    let get = "GET /raw HTTP/1.1\r\nHost: test\r\n\r\n";
    let close = "GET /raw?token=secret HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    let with = |fields: &str| format!("GET /raw HTTP/1.1\r\nHost: test\r\n{fields}\r\n");
    let cookies: String = (0..40).map(|n| format!("Cookie: c{n}={}\r\n", "v".repeat(150))).collect();
    let body = "x\r\nConnection: close\r\n\r\nGET /not-a-request HTTP/1.1\r\n\r\n";
    let post = format!("POST /raw HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let chunked = "POST /raw HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n\
                   1b;name=value\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n0\r\nConnection: close\r\n\r\n";
    vec![
        // A lone port probe.
        vec![],
        vec![Idle],
        vec![send(get), Read],
        vec![send(close), Read],
        vec![send(&get[..20]), Read],
        vec![send(get), send(get), send(close), Read],
        vec![send([get, get, close].concat()), Read],
        vec![Pieces(close.into(), 1), Read],
        vec![Pieces(close.into(), 7), Read],
        vec![send(with(&format!("{cookies}Connection: close\r\n"))), Read],
        vec![Pieces(with(&format!("{cookies}Connection: close\r\n")).into(), 1000), Read],
        vec![send(with("Connection: keep-alive\r\nX-Other: 1\r\nconnection:CLOSE\r\n")), Read],
        vec![send(with("CONNECTION: \t keep-alive ,, TE\t, close \r\nTE: trailers\r\n")), Read],
        vec![send(with("X-Connection: close\r\nConnectio: close\r\nConnections: close\r\n")), Read],
        vec![send("GET /raw HTTP/1.0\r\n\r\n"), Read],
        vec![send("GET /raw HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"), Read, send(close), Read],
        vec![send(&post), Read, send(get), Read],
        vec![send(chunked), Read],
        vec![
            send("POST /raw HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"),
            Read,
            send("ok"),
            Read,
        ],
        vec![send("HEAD /raw HTTP/1.1\r\nHost: test\r\n\r\n"), Read, send(get), Read],
        vec![send("OPTIONS * HTTP/1.1\r\nHost: test\r\n\r\n"), Read],
        vec![send("get /raw HTTP/1.1\r\nHost: test\r\n\r\n"), Read],
        vec![send("\r\n\r\nGET /raw HTTP/1.1\r\nHost: test\r\n\r\n"), Read],
        vec![send("GET http://test/raw?query HTTP/1.1\r\nHost: test\r\n\r\n"), Read],
        vec![send(format!("GET /{} HTTP/1.1\r\nHost: test\r\n\r\n", "long/".repeat(40))), Read],
        vec![send("GET /raw HTTP/1.1\nHost: test\nConnection: close\n\n"), Read],
        vec![send("SSH-2.0-OpenSSH_9.2\r\n"), Read],
        vec![send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), Read],
        vec![send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"), Read],
        vec![send(b"\0\x01\x02\x03"), Read],
        vec![send(with("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n")), Read],
        // Ways to end.
        vec![send(get), ShutdownWrite, Read],
        vec![send(close), ShutdownWrite, Read],
        vec![ShutdownWrite, Read],
        vec![send(get), Read, Idle],
        vec![send("GET /large HTTP/1.1\r\nHost: test\r\n\r\n"), Peek],
        vec![send(get), Peek, Linger0],
        vec![send(get), Read, Linger0],
        vec![send(get), Linger0],
        vec![Linger0],
        vec![send(close), Idle],
    ]
}
