//! What must not leave the kernel does not: every byte of the ring buffer, and every line of every output, is searched for
//! words that lay in cookies, credentials, query strings and bodies.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use tracer::kernel::{Ask, Attached, Kernel};
use tracer::preflight;

use crate::rig::{Guard, Listener, Pair, abort, tracer, wait_until};

/// Lies where nothing may leave the kernel, repeated: so each part of five bytes or more is one of four.
const SECRET: &str = "Wk3~";
/// Lies in query strings, which `--full-target` shows.
const QUERY: &str = "Zq9_";
/// Lies in the user information of a target, which the programs keep as a part of it; no output shows it.
const USER: &str = "Vx5-";
/// Lies in paths, which are shown: that it is found proves that the search can find something.
const SHOWN: &str = "/shown";
/// The same, in the last connection of all.
const LAST: &str = "/end";
const RING: u32 = 1 << 20;

fn secret(len: usize) -> String {
    SECRET.chars().cycle().take(len).collect()
}

fn query() -> String {
    QUERY.repeat(8)
}

/// Where five bytes in a row of a repeated word are, with what stands around them.
fn find(word: &str, bytes: &[u8]) -> Option<String> {
    let cycle: Vec<u8> = word.bytes().cycle().take(4 + 5).collect();
    let parts: Vec<&[u8]> = (0..4).map(|from| &cycle[from..from + 5]).collect();
    let at = bytes.windows(5).position(|window| parts.contains(&window))?;
    Some(String::from_utf8_lossy(&bytes[at.saturating_sub(40)..bytes.len().min(at + 40)]).into_owned())
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The whole memory of a ring buffer, whatever has been read of it: what was written and then withdrawn is there, too.
fn memory(ring: &impl std::os::fd::AsFd) -> Vec<u8> {
    let page = rustix::param::page_size();
    let length = page + RING as usize;
    let (read, shared) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
    // SAFETY: a new mapping; behind the consumer's page and the producer's lie the data.
    let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, read, shared, ring.as_fd(), page as u64) };
    let address = address.expect("the ring buffer can be mapped");
    // SAFETY: it is mapped for reading; programs may write to it meanwhile, which a copy of bytes need not mind.
    let copy = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), length) }.to_vec();
    // SAFETY: it is ours, and nothing refers to it any more.
    unsafe { rustix::mm::munmap(address, length) }.expect("it is mapped");
    copy
}

enum Step {
    Request(Vec<u8>),
    Response(Vec<u8>),
}
use Step::{Request, Response};

fn request(text: &str) -> Step {
    Request(text.as_bytes().to_vec())
}

fn response(text: &str) -> Step {
    Response(text.as_bytes().to_vec())
}

/// A request with secrets wherever a head or a body can have them.
fn full_request() -> String {
    let (secret, query) = (secret(24), query());
    format!(
        "POST {SHOWN}?{query} HTTP/1.1\r\nHost: {secret}\r\nCookie: a={secret}; b={secret}\r\n\
         Authorization: Basic {secret}\r\nConnection: keep-alive, {secret}\r\nKeep-Alive: {secret}\r\n\
         X-Folded: a\r\n {secret}\r\n{secret}: {secret}\r\nContent-Length: 24\r\n\r\n{secret}"
    )
}

fn full_response() -> String {
    let secret = secret(24);
    format!(
        "HTTP/1.1 200 {secret}\r\nSet-Cookie: {secret}\r\nKeep-Alive: timeout=5, {secret}\r\nConnection: {secret}\r\n\
         Transfer-Encoding: chunked\r\n\r\n18;{secret}\r\n{secret}\r\n0\r\nTrailer: {secret}\r\n\r\n"
    )
}

/// Conversations, each in a connection of its own.
fn conversations() -> Vec<Vec<Step>> {
    let (asked, answered) = (full_request(), full_response());
    let word = secret(24);
    let ok = format!("HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{word}");
    let mut all = Vec::new();
    // Cut at each byte.
    for cut in 1..asked.len().max(answered.len()) {
        let (first, second) = asked.split_at(cut.min(asked.len() - 1));
        let (third, fourth) = answered.split_at(cut.min(answered.len() - 1));
        all.push(vec![request(first), request(second), response(third), response(fourth)]);
    }
    // Byte by byte, and pipelined.
    all.push(asked.bytes().map(|byte| Request(vec![byte])).chain([response(&answered)]).collect());
    all.push(vec![request(&asked.repeat(3)), response(&answered.repeat(3))]);
    // Longer than is read, with the end of the head behind that.
    for len in [60 << 10, 63 << 10, 65 << 10, 100 << 10] {
        let long = secret(len);
        all.push(vec![
            request(&format!("GET {SHOWN}?{word} HTTP/1.1\r\nCookie: {long}\r\n\r\n")),
            response(&format!("HTTP/1.1 200 OK\r\nSet-Cookie: {long}\r\nContent-Length: {len}\r\n\r\n{long}")),
            request(&format!("GET {SHOWN} HTTP/1.1\r\nCookie: {word}\r\n\r\n{word}")),
        ]);
    }
    let malformed = [
        format!("GET {SHOWN} HTTP/1.1\r\n{word}\r\n\r\n"),
        format!("GET {SHOWN} HTTP/1.1\nCookie: {word}\n\n{word}"),
        format!("GET {SHOWN} HTTP/1.1\r\nCookie: {word}\0\r\nContent-Length: {word}\r\n\r\n{word}"),
        format!("GET {SHOWN} HTTP/1.1\r\nTransfer-Encoding: {word}\r\nContent-Length: 24\r\n\r\n{word}"),
        format!("GET {SHOWN} HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n{word}"),
        format!("GET {SHOWN} HTTP/1.1\r\nConnection : {word}\r\n\r\n"),
        format!("POST {SHOWN} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{word}\r\n{word}"),
        format!("GET {SHOWN}?{word} HTTP/9.9\r\nCookie: {word}\r\n\r\n"),
        format!("GET {SHOWN}?{word}\r\nCookie: {word}\r\n\r\n"),
        format!("GET {SHOWN}#{word}?{word} HTTP/1.1\r\nCookie: {word}\r\n\r\n"),
        // A body that looks like a head.
        format!("POST {SHOWN} HTTP/1.1\r\nContent-Length: 60\r\n\r\nGET /{word} HTTP/1.1\r\n\r\nGET /{word}"),
        // Other protocols, line by line like HTTP.
        format!("SSH-2.0-{word}\r\n"),
        format!("{word}\r\n"),
        format!("AUTH {word}\r\n"),
        format!("AUTH PLAIN {word}\r\n"),
        format!("USER {word} PASS {word}\r\n"),
        format!("a1 LOGIN {word} {word}\r\n"),
        format!("GET http://user:{user}@host{SHOWN} HTTP/1.1\r\n\r\n", user = USER.repeat(6)),
        format!("GET http://user:{user}@host{SHOWN} HTTP/1.1\r\n\r\n", user = USER.repeat(60)),
        format!("CONNECT user:{user}@host:443 HTTP/1.1\r\n\r\n", user = USER.repeat(6)),
        format!("*2\r\n$4\r\nAUTH\r\n$24\r\n{word}\r\n"),
        format!("\0\0\0\x08{word}\0{word}"),
        format!("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n{asked}"),
        // HTTP/2: the preface, SETTINGS, HEADERS with literal fields.
        format!(
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x36\x01\x05\0\0\0\x01\x40\x18{word}\x18{word}"
        ),
        // TLS: a ClientHello with a name.
        format!("\x16\x03\x01\0\x40\x01\0\0\x3c\x03\x03{word}{word}\0\0"),
    ];
    for odd in malformed {
        for cut in [1, 5, 20, odd.len() - 1] {
            let (first, second) = odd.split_at(cut);
            all.push(vec![request(first), request(second), response(&ok)]);
        }
    }
    all.push(vec![
        request(&format!("GET {SHOWN} HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")),
        response("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
        request(&word),
        response(&word),
    ]);
    // An answer that is none, and one of HTTP/0.9.
    all.push(vec![request(&asked), response(&word)]);
    all
}

fn hold(pair: &mut Pair, conversation: &[Step]) {
    for step in conversation {
        match step {
            Request(bytes) => pair.request(bytes),
            Response(bytes) => pair.respond(bytes),
        }
    }
}

/// A tracer whose stdout and stderr are files.
pub(crate) struct Printing {
    process: Guard,
    pub(crate) stdout: PathBuf,
    stderr: PathBuf,
}

impl Printing {
    pub(crate) fn start(directory: &Path, port: u16, options: &[&str]) -> Self {
        let file = |of: &str| directory.join(format!("{}.{of}", options.join("")));
        let (stdout, stderr) = (file("stdout"), file("stderr"));
        let mut command = tracer();
        command.args(["run", "--port", &port.to_string(), "--close-wait-after", "100ms"]).args(options);
        command.env("RUST_LOG", "trace");
        command.stdout(Stdio::from(File::create(&stdout).expect("a file")));
        command.stderr(Stdio::from(File::create(&stderr).expect("a file")));
        let printing = Self { process: Guard(command.spawn().expect("tracer starts")), stdout, stderr };
        wait_until("the first line", || !printing.printed().is_empty());
        printing
    }

    pub(crate) fn printed(&self) -> Vec<u8> {
        fs::read(&self.stdout).expect("it is ours")
    }

    /// All that it printed, of either kind.
    pub(crate) fn stop(mut self) -> Vec<u8> {
        wait_until("the last connection", || contains(&self.printed(), LAST));
        self.process.signal(Signal::INT);
        assert!(self.process.wait().success());
        let mut all = self.printed();
        all.extend(fs::read(&self.stderr).expect("it is ours"));
        all
    }
}

#[test]
fn no_secret_leaves_the_kernel() {
    let listener = Listener::new();
    let directory = tempfile::tempdir().expect("a directory");
    let start = |options: &[&str]| Printing::start(directory.path(), listener.port, options);
    let outputs =
        [start(&[]), start(&["--states", "--color", "always"]), start(&["--json"]), start(&["--json", "--states"])];
    let full = start(&["--json", "--full-target"]);
    let host = preflight::check().expect("the host has what it takes");
    let ask = Ask {
        ports: vec![listener.port],
        states: true,
        close_wait_after: Duration::from_millis(100),
        ring_bytes: RING,
        ..Ask::default()
    };
    let Attached { kernel, mut ring, looks_until: _looks_until, log: _log } =
        Kernel::attach(&ask, &host.cgroup, &host.offsets).expect("it attaches");
    let (mut records, mut last) = (Vec::new(), false);
    let mut drain = || {
        while let Some(record) = ring.next() {
            records.extend_from_slice(&record);
            last |= contains(&record, LAST);
        }
        last
    };

    let conversations = conversations();
    for (n, conversation) in conversations.iter().enumerate() {
        let mut pair = listener.connect();
        hold(&mut pair, conversation);
        match n % 3 {
            0 => drop(pair.server_closes_first()),
            1 => drop(pair.client_closes_first()),
            _ => abort(pair.server),
        }
        drain();
    }
    // One that its process does not close.
    let mut forgotten = listener.connect();
    hold(&mut forgotten, &[request(&full_request()), response(&full_response())]);
    forgotten.client.shutdown(std::net::Shutdown::Write).expect("it is open");
    std::thread::sleep(Duration::from_millis(300));
    kernel.look_for_close_wait().expect("the walk works");
    let mut end = listener.connect();
    end.request(format!("GET {LAST} HTTP/1.1\r\nConnection: close\r\n\r\n"));
    end.server_closes_first();

    wait_until("the last record", &mut drain);
    for (what, bytes) in [("the records", &records), ("the ring buffer's memory", &memory(&ring))] {
        assert!(contains(bytes, SHOWN), "paths are in {what}");
        for word in [SECRET, QUERY] {
            assert_eq!(find(word, bytes), None, "{word} is in {what}");
        }
    }
    assert_eq!(kernel.counters().expect("they can be read").lost, 0);
    for output in outputs {
        let name = output.stdout.clone();
        let printed = output.stop();
        assert!(contains(&printed, SHOWN), "paths are in {name:?}");
        for word in [SECRET, QUERY, USER] {
            assert_eq!(find(word, &printed), None, "{word} is in {name:?}");
        }
    }
    // Asked for, the query string is there; and nothing else.
    let printed = full.stop();
    assert!(find(QUERY, &printed).is_some(), "--full-target shows query strings");
    assert_eq!(find(USER, &printed), None, "no user information");
    drop(forgotten);
}
