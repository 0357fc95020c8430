//! What must not leave the kernel does not: every byte of the ring buffer, and of the maps that tracer can look into, every line of
//! every output, recordings and what is reported of them, and all that a command of `--exec` is given, are searched for words
//! that lay in cookies, credentials, query strings and bodies.
//!
//! That the search can fail is shown by a scanner that is broken on purpose: see SECURITY.md, and `docs/privacy-mutation.patch`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tracer::kernel::{Ask, Attached, Kernel};
use tracer::preflight::{self, Host};

use crate::leftovers::{bpftool, held_by};
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

/// All that is in the maps which a process holds, but for those that nobody can look into: the ring buffer (see [`memory`]), and
/// the storage of sockets, which is to be asked for by a socket.
fn maps(pid: u32) -> Vec<u8> {
    let mut all = Vec::new();
    for (_, id) in held_by(pid).into_iter().filter(|(kind, _)| *kind == "map") {
        let id = id.to_string();
        let map = bpftool(&["map", "show", "id", &id]);
        if map["type"] != "ringbuf" && map["type"] != "sk_storage" {
            bytes_in(&bpftool(&["map", "dump", "id", &id]), &mut all);
        }
    }
    all
}

/// The bytes that bpftool shows as lists of hexadecimal numbers.
fn bytes_in(dump: &Value, all: &mut Vec<u8>) {
    match dump {
        Value::Array(items) => items.iter().for_each(|item| bytes_in(item, all)),
        // By their types they are there once more.
        Value::Object(members) => {
            members.iter().filter(|(name, _)| *name != "formatted").for_each(|(_, member)| bytes_in(member, all));
        }
        Value::String(byte) => {
            let digits = byte.strip_prefix("0x").unwrap_or_else(|| panic!("{byte} is no byte"));
            all.push(u8::from_str_radix(digits, 16).expect("a byte"));
        }
        _ => {}
    }
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
    let (word, query) = (secret(24), query());
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
            request(&format!("GET {SHOWN}?{query} HTTP/1.1\r\nCookie: {long}\r\n\r\n")),
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
        format!("GET {SHOWN}?{query} HTTP/9.9\r\nCookie: {word}\r\n\r\n"),
        format!("GET {SHOWN}?{query}\r\nCookie: {word}\r\n\r\n"),
        format!("GET {SHOWN}#{query}?{query} HTTP/1.1\r\nCookie: {word}\r\n\r\n"),
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

/// What was found where it must not be, and what was not found where it must be.
#[derive(Default)]
struct Search {
    leaks: Vec<String>,
    missing: Vec<String>,
}

impl Search {
    /// None of the words may be there. `shown` must be (unless it is empty): or the search would find nothing anywhere.
    fn through(&mut self, what: &str, bytes: &[u8], shown: &str, words: &[&str]) {
        if !shown.is_empty() && !contains(bytes, shown) {
            self.missing.push(format!("{shown} is not in {what}"));
        }
        let found = words.iter().filter_map(|word| Some((word, find(word, bytes)?)));
        self.leaks.extend(found.map(|(word, around)| format!("{word} is in {what}: {around:?}")));
    }

    /// None of the words may be in the maps of a tracer, which still runs.
    fn maps(&mut self, output: &Printing, words: &[&str]) {
        let held = maps(output.process.id());
        assert!(!held.is_empty());
        self.through(&format!("the maps of {}", output.stdout.display()), &held, "", words);
    }
}

/// Programs of our own, and all that they write.
struct Watched {
    attached: Attached,
    records: Vec<u8>,
    last: bool,
}

impl Watched {
    fn attach(host: &Host, port: u16, full_target: bool) -> Self {
        let ask = Ask {
            ports: vec![port],
            states: true,
            full_target,
            close_wait_after: Duration::from_millis(100),
            ring_bytes: RING,
            ..Ask::default()
        };
        let attached = Kernel::attach(&ask, &host.cgroup, &host.layout).expect("it attaches");
        Self { attached, records: Vec::new(), last: false }
    }

    /// Takes what is there, and answers whether that of the last connection was among it.
    fn drain(&mut self) -> bool {
        while let Some(record) = self.attached.ring.next() {
            self.records.extend_from_slice(&record);
            self.last |= contains(&record, LAST);
        }
        self.last
    }

    fn search(self, search: &mut Search, how: &str, words: &[&str]) {
        search.through(&format!("the records{how}"), &self.records, SHOWN, words);
        search.through(&format!("the ring buffer's memory{how}"), &memory(&self.attached.ring), SHOWN, words);
        assert_eq!(self.attached.kernel.counters().expect("they can be read").lost, 0);
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
        // Of paths and commands among them the beginning is enough.
        let name: String = options.concat().chars().filter(|c| c.is_alphanumeric() || *c == '-').take(60).collect();
        let (stdout, stderr) = (directory.join(format!("{name}.stdout")), directory.join(format!("{name}.stderr")));
        let mut command = tracer();
        command.args(["run", "--port", &port.to_string(), "--close-wait-after", "100ms"]).args(options);
        command.env("RUST_LOG", "trace");
        command.stdout(Stdio::from(File::create_new(&stdout).expect("a file")));
        command.stderr(Stdio::from(File::create_new(&stderr).expect("a file")));
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

/// What is in the blocks of a recording: a header of 16 bytes, and then frames, each of which has the lengths of its block as it
/// is stored and as it was, a checksum, and the block, compressed.
fn decompressed(recording: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut rest = &recording[16..];
    while let Some((head, behind)) = rest.split_at_checked(12) {
        let length = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes")) as usize;
        let (block, next) = behind.split_at(length(0));
        all.extend(lz4_flex::block::decompress(block, length(4)).expect("a block"));
        rest = next;
    }
    all
}

/// Searches a recording, and all that can be reported of it.
fn search_recording(search: &mut Search, recording: &Path, port: u16, words: &[&str]) {
    let name = recording.file_name().expect("a file").display();
    let bytes = fs::read(recording).expect("it is there");
    search.through(&format!("{name}, as it is"), &bytes, "TRACE", words);
    search.through(&format!("{name}, decompressed"), &decompressed(&bytes), SHOWN, words);
    let page = recording.with_extension("html");
    let port = format!(":{port}");
    for (options, shown) in [
        (&["--color", "always"][..], SHOWN),
        (&["--json"], SHOWN),
        (&["--summary-only"], &port),
        (&["--summary-only", "--json"], &port[1..]),
        (&["--html", page.to_str().expect("UTF-8")], ""),
    ] {
        let output = tracer().env("RUST_LOG", "trace").arg("report").arg(recording).args(options).output();
        let output = output.expect("it starts");
        assert!(output.status.success(), "{options:?}: {output:?}");
        let all = [output.stdout, output.stderr].concat();
        search.through(&format!("report {} of {name}", options.join(" ")), &all, shown, words);
    }
    search.through(&format!("the page of {name}"), &fs::read(page).expect("it is there"), SHOWN, words);
}

#[test]
fn no_secret_leaves_the_kernel() {
    let listener = Listener::new();
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let text = |name: &str| path(name).to_str().expect("UTF-8").to_owned();
    let start = |options: &[&str]| Printing::start(directory.path(), listener.port, options);
    let (recording, full_recording) = (text("run.rec"), text("full.rec"));
    // All that it is given: stdin, arguments, environment.
    let exec = format!(
        "cat > {0}/new && cat /proc/$$/cmdline /proc/$$/environ > {0}/process && mv {0}/new {0}/stdin",
        directory.path().display()
    );
    let outputs = [
        start(&["--every", "1s", "--record", &recording]),
        start(&["--states", "--color", "always"]),
        start(&["--json", "--every", "1s", "--alert-rate", "5", "--exec", &exec]),
        start(&["--json", "--states"]),
    ];
    let full = [
        start(&["--full-target", "--json", "--record", &full_recording]),
        start(&["--full-target", "--states", "--every", "1s"]),
    ];
    let host = preflight::check().expect("the host has what it takes");
    let mut watched = [false, true].map(|full| Watched::attach(&host, listener.port, full));

    let conversations = conversations();
    for (n, conversation) in conversations.iter().enumerate() {
        let mut pair = listener.connect();
        hold(&mut pair, conversation);
        match n % 3 {
            0 => drop(pair.server_closes_first()),
            1 => drop(pair.client_closes_first()),
            _ => abort(pair.server),
        }
        watched.iter_mut().for_each(|watched| _ = watched.drain());
    }
    // One that its process does not close.
    let mut forgotten = listener.connect();
    hold(&mut forgotten, &[request(&full_request()), response(&full_response())]);
    forgotten.client.shutdown(std::net::Shutdown::Write).expect("it is open");
    std::thread::sleep(Duration::from_millis(300));
    for watched in &watched {
        for walk in &watched.attached.walks {
            walk.run().expect("the walk works");
        }
    }
    let mut end = listener.connect();
    end.request(format!("GET {LAST} HTTP/1.1\r\nConnection: close\r\n\r\n"));
    end.server_closes_first();

    let mut search = Search::default();
    let of = [("", &[SECRET, QUERY][..]), (" under --full-target", &[SECRET])];
    for (mut watched, (how, words)) in watched.into_iter().zip(of) {
        wait_until("the last record", || watched.drain());
        watched.search(&mut search, how, words);
    }
    wait_until("the alert's command", || path("stdin").exists());
    for (of, shown) in [("stdin", format!(":{}", listener.port)), ("process", "/proc/$$/cmdline".to_owned())] {
        let given = fs::read(path(of)).expect("it is there");
        search.through(&format!("what --exec gets, {of}"), &given, &shown, &[SECRET, QUERY, USER]);
    }
    for output in outputs {
        let name = output.stdout.display().to_string();
        search.maps(&output, &[SECRET, QUERY, USER]);
        search.through(&name, &output.stop(), SHOWN, &[SECRET, QUERY, USER]);
    }
    search_recording(&mut search, Path::new(&recording), listener.port, &[SECRET, QUERY, USER]);
    // Asked for, the query string is there, and is all that is there besides.
    for output in full {
        search.maps(&output, &[SECRET]);
        let (name, printed) = (output.stdout.display().to_string(), output.stop());
        if find(QUERY, &printed).is_none() {
            search.missing.push(format!("no query string is in {name}"));
        }
        search.through(&name, &printed, SHOWN, &[SECRET, USER]);
    }
    search_recording(&mut search, Path::new(&full_recording), listener.port, &[SECRET, USER]);
    let Search { leaks, missing } = search;
    assert!(leaks.is_empty(), "{} leaks:\n{}", leaks.len(), leaks.join("\n"));
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    drop(forgotten);
}
