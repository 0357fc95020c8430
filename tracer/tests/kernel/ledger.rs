//! The books: every close that was seen is written, filtered or lost, on each CPU; and the kernel knows of no other.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, bind, connect, socket, sockopt};
use rustix::process::Signal;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};

use crate::rig::{
    Guard, Listener, Namespace, PATIENCE, Tracer, abort, end_of, expect, free_port, in_mounts_where, resident_kib,
    tracer, wait_until,
};

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Fails unless the ledger of a last summary adds up, on each CPU and over all; returns it.
#[track_caller]
fn balanced(summary: &Value) -> &Value {
    let ledger = &summary["ledger"];
    let of = |name: &str| number(&ledger[name]);
    let sum = |name: &str| ledger["cpus"].as_array().expect("a list").iter().map(|row| number(&row[name])).sum::<u64>();
    for row in ledger["cpus"].as_array().expect("a list") {
        let of = |name: &str| number(&row[name]);
        assert_eq!(of("seen"), of("emitted") + of("filtered") + of("lost") + of("untracked"), "{row}");
    }
    assert_eq!((of("seen"), of("emitted"), of("filtered_kernel")), (sum("seen"), sum("emitted"), sum("filtered")));
    assert_eq!(of("lost"), sum("lost") + sum("untracked"));
    assert_eq!(of("seen"), of("written") + of("filtered_kernel") + of("filtered_user") + of("lost"), "{ledger:#}");
    assert_eq!((of("emitted"), of("waiting")), (of("read"), 0), "{ledger:#}");
    assert_eq!(ledger["balanced"], true, "{ledger:#}");
    assert_eq!(ledger["written"], summary["closes"]);
    ledger
}

#[test]
fn a_known_number_of_connections() {
    const CONNECTIONS: u64 = 25;
    // Of its own, so that nobody else's closes are counted with these.
    let namespace = Namespace::new("books");
    let inode = namespace.inode().to_string();
    let in_all = ["--netns", &inode];
    for (filters, written, behind) in [
        // In the kernel, behind it, and both.
        (&in_all[..], 2 * CONNECTIONS, 0),
        (&["--netns", &inode, "--closed-by", "local"], CONNECTIONS, CONNECTIONS),
        (&["--netns", &inode, "--cause", "timeout"], 0, 2 * CONNECTIONS),
        (&["--netns", &inode, "--min-duration", "1h"], 0, 0),
        (&["--closed-by", "remote", "--netns", &inode, "--states"], CONNECTIONS, CONNECTIONS),
    ] {
        let (listener, tracer) = namespace.enter(|| {
            let tracer = Tracer::start(&[&["--strict"][..], filters].concat());
            (Listener::new(), tracer)
        });
        namespace.enter(|| (0..CONNECTIONS).for_each(|_| _ = listener.serve_and_close()));
        tracer.wait_for_closes(usize::try_from(written).expect("small"), |_| true);
        // What is asked for in between is not short of anything either.
        tracer.signal(Signal::USR1);
        let is_interim = |event: &&Value| event["type"] == "summary" && event["final"] == false;
        let interim = tracer.wait_for("a summary", |events| events.iter().find(is_interim).cloned());
        assert_eq!(interim["ledger"]["balanced"], true, "{interim:#}");
        // Exit code 0, though it is strict.
        let run = tracer.stop();
        let ledger = balanced(&run.summary);
        expect(ledger, &json!({ "written": written, "filtered_user": behind, "lost": 0, "untracked": 0 }));
        // Whatever the filters: each connection has two ends.
        expect(
            &ledger["reconciled"],
            &json!({
                "netns": namespace.inode(), "seen": 2 * CONNECTIONS, "closed": 2 * CONNECTIONS, "slack": 0,
                "percent": 100.0, "active_opens": CONNECTIONS, "passive_opens": CONNECTIONS,
            }),
        );
        drop(listener);
    }
}

/// Two sockets with one address, which cannot connect to the same one: the second sends nothing.
fn connect_without_a_port(listener: &Listener) {
    let port = free_port();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.port));
    let from = || {
        let fd = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        sockopt::set_socket_reuseaddr(&fd, true).expect("it can be set");
        bind(&fd, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).expect("it may be bound again");
        fd
    };
    let (first, second) = (from(), from());
    connect(&first, &to).expect("it listens");
    let (server, _) = listener.accept();
    assert_eq!(connect(&second, &to), Err(rustix::io::Errno::ADDRNOTAVAIL));
    let mut first = TcpStream::from(first);
    drop(server);
    end_of(&mut first);
}

#[test]
fn the_kernel_knows_of_no_other_close() {
    let namespace = Namespace::new("witness");
    let (run, open) = namespace.enter(|| {
        let (listener, refused) = (Listener::new(), free_port());
        // Open before the start; one of them stays so.
        let (before, still) = (listener.connect(), listener.connect());
        let tracer = Tracer::start(&WHOLE_HOST);
        before.client_closes_first();
        for n in 0..30 {
            match n % 3 {
                0 => _ = listener.serve_and_close(),
                1 => {
                    let pair = listener.connect();
                    abort(pair.client);
                }
                _ => {
                    TcpStream::connect((Ipv4Addr::LOCALHOST, refused)).expect_err("nobody listens");
                }
            }
        }
        connect_without_a_port(&listener);
        // A connection that is left in the queue of its listener, and goes with it.
        let other = Listener::new();
        let mut queued = TcpStream::connect((Ipv4Addr::LOCALHOST, other.port)).expect("it listens");
        drop(other);
        std::io::Read::read(&mut queued, &mut [0]).expect_err("it was reset");
        drop(queued);
        // Opened now, and not closed.
        let after = listener.connect();
        let netns = namespace.inode();
        tracer.wait_for_closes(2 + 20 + 20 + 10 + 3 + 2, |close| close["netns"] == netns);
        (tracer.stop(), (listener, still, after))
    });
    let ledger = balanced(&run.summary);
    expect(ledger, &json!({ "filtered_kernel": 0, "filtered_user": 0, "lost": 0 }));
    let closed = 2 + 20 + 20 + 10 + 2 + 2;
    expect(
        &ledger["reconciled"],
        &json!({
            "closed": closed, "seen": closed, "slack": 0, "percent": 100.0,
            "active_opens": 10 + 10 + 10 + 1 + 1 + 1, "passive_opens": 10 + 10 + 1 + 1 + 1,
        }),
    );
    // With every record read, each mini-socket is accounted for, too: of those that were closed by both ends.
    let reconciled = &ledger["reconciled"];
    let (made, seen) = (number(&reconciled["mini_sockets"]), number(&reconciled["mini_sockets_seen"]));
    assert!((seen..=seen + number(&reconciled["mini_sockets_maybe"])).contains(&made), "{reconciled:#}");
    assert_eq!((made, &reconciled["mini_sockets_agree"]), (12, &json!(true)), "{reconciled:#}");
    // They are still there, but for one or another that a late RST ended.
    let grown = number(&reconciled["mini_sockets_grown"]);
    assert!((1..=made).contains(&grown), "{reconciled:#}");
    drop(open);
}

/// Runs `tracer ARGS…` where another file is in the place of one of `/proc/net`. (That is the directory of a process id, which
/// stays the same here; its thread has another one.)
fn where_is(of: &str, file: &Path) -> Command {
    let script = format!(
        "net=/proc/$$/net; mount -t tmpfs net $net; for file in snmp sockstat sockstat6 netstat; do
           ln -s /proc/thread-self/net/$file $net/$file; done
         ln -sf {} $net/{of}",
        file.display()
    );
    in_mounts_where(&script, &tracer())
}

/// With room for all that other tests do meanwhile: the floods among them are faster than a tracer that gets no processor.
const WHOLE_HOST: [&str; 3] = ["--strict", "--ring-size", "256M"];

/// What the kernel's counters would say if some TIME_WAIT sockets came from closes that were not seen.
#[test]
fn the_kernel_made_more_mini_sockets() {
    let directory = tempfile::tempdir().expect("a directory");
    let netstat = directory.path().join("netstat");
    let says = |made: u64| {
        fs::write(&netstat, format!("TcpExt: TW TWKilled TCPTimeWaitOverflow\nTcpExt: 1{made:03} 7 0\n"))
            .expect("it is ours");
    };
    for (more, code) in [(0, 0), (3, 10)] {
        says(0);
        let namespace = Namespace::new(&format!("more-{more}"));
        let (listener, tracer) = namespace.enter(|| {
            let tracer = Tracer::start_by(where_is("netstat", &netstat), &WHOLE_HOST);
            (Listener::new(), tracer)
        });
        namespace.enter(|| (0..5).for_each(|_| _ = listener.serve_and_close()));
        let netns = namespace.inode();
        tracer.wait_for_closes(10, |close| close["netns"] == netns);
        says(5 + more);
        tracer.signal(Signal::INT);
        let stderr = |tracer: &Tracer| tracer.stderr();
        wait_until("its last word", || code == 0 || stderr(&tracer).contains("were seen"));
        let said = stderr(&tracer);
        let (run, status) = tracer.join();
        assert_eq!(status.code(), Some(code), "{said}{:#}", run.summary);
        expect(
            &run.summary["ledger"]["reconciled"],
            &json!({
                "mini_sockets": 5 + more, "mini_sockets_seen": 5, "mini_sockets_maybe": 0,
                "mini_sockets_agree": more == 0, "percent": 100.0,
            }),
        );
        let complains =
            said.contains("8 sockets were left in TIME_WAIT or FIN_WAIT2") && said.contains("5 to 5 were seen");
        assert_eq!(complains, more > 0, "{said}");
    }
}

/// Then there is nothing to compare with: that is said at the start, and is no success where it is strict.
#[test]
fn the_kernels_counters_cannot_be_read() {
    for (strict, code) in [(&[][..], 0), (&["--strict"], 10)] {
        // What other tests do is too much to read in the time.
        let port = free_port().to_string();
        let options = [strict, &["--duration", "1s", "--port", &port]].concat();
        let tracer = Tracer::start_by(where_is("snmp", Path::new("/dev/null")), &options);
        let start = tracer.events()[0].clone();
        let degraded = start["degraded"].to_string();
        assert!(degraded.contains("not compared") && degraded.contains("ActiveOpens"), "{start:#}");
        wait_until("the warning", || tracer.stderr().contains("not compared"));
        let (run, status) = tracer.join();
        assert_eq!(status.code(), Some(code), "{:#}", run.summary);
        assert_eq!(run.summary["ledger"]["reconciled"], Value::Null);
    }
}

/// What was read of a tracer that goes on; of so many closes the whole would be too much.
#[derive(Default)]
struct Printed {
    closes: u64,
    time_wait: u64,
    others: Vec<Value>,
}

#[derive(Default)]
struct Lines {
    printed: Mutex<Printed>,
    more: Condvar,
}

impl Lines {
    fn push(&self, line: &str) {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let mut printed = self.printed.lock().expect("no panic");
        if event["type"] == "close" {
            printed.closes += 1;
            printed.time_wait += u64::from(event["final"] == "time_wait");
        } else {
            printed.others.push(event);
        }
        self.more.notify_all();
    }

    fn wait_for(&self, what: &str, found: impl Fn(&Printed) -> bool) {
        let printed = self.printed.lock().expect("no panic");
        let (printed, timeout) =
            self.more.wait_timeout_while(printed, *PATIENCE, |printed| !found(printed)).expect("no panic");
        assert!(!timeout.timed_out(), "waited in vain for {what}, {} closes", printed.closes);
    }

    /// Waits until all that had waited is printed.
    fn wait_until_quiet(&self) {
        const QUIET: Duration = Duration::from_millis(500);
        let mut printed = self.printed.lock().expect("no panic");
        loop {
            let (guard, timeout) = self.more.wait_timeout(printed, QUIET).expect("no panic");
            printed = guard;
            if timeout.timed_out() {
                return;
            }
        }
    }
}

fn losses(printed: &Printed) -> Vec<u64> {
    printed.others.iter().filter(|event| event["type"] == "lost").map(|event| number(&event["records"])).collect()
}

/// A tracer of one listener in a namespace, with what it prints to a pipe, and the first line of that.
fn printing(namespace: &Namespace, options: &[&str]) -> (Listener, Guard, BufReader<ChildStdout>, String) {
    let (listener, mut process) = namespace.enter(|| {
        let listener = Listener::new();
        let mut command = tracer();
        command.arg("run").args(options).args(["--port", &listener.port.to_string()]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        (listener, Guard(child))
    });
    let mut stdout = BufReader::new(process.0.stdout.take().expect("piped"));
    let mut first = String::new();
    stdout.read_line(&mut first).expect("it prints");
    (listener, process, stdout, first)
}

/// Nobody reads for as long as it takes to lose records; the host goes on, and so does the stream, once somebody reads.
#[test]
fn nobody_reads() {
    /// The pipe takes a megabyte, the queue to the thread that writes four chunks. Three seconds later the ring fills.
    const STALL: Duration = Duration::from_secs(7);
    const AFTER: u64 = 50;
    let namespace = Namespace::new("stalled");
    let (listener, process, stdout, start) = printing(&namespace, &["--json", "--strict", "--ring-size", "64K"]);
    assert!(start.contains(r#""type":"start""#), "{start}");
    let before_kib = resident_kib(process.id());

    let mut stalled = 0;
    namespace.enter(|| {
        let began = Instant::now();
        while stalled < 4_000 || began.elapsed() < STALL {
            // Nothing is left in TIME_WAIT, or ports would run out.
            abort(listener.connect().client);
            stalled += 1;
        }
    });
    let grown_kib = resident_kib(process.id()).saturating_sub(before_kib);
    assert!(grown_kib < 100 << 10, "{grown_kib} KiB more");

    let lines = Lines::default();
    std::thread::scope(|scope| {
        // Ended here, too, if something below fails: the reader of its output is waited for.
        let mut process = process;
        let reader = scope.spawn(|| stdout.lines().for_each(|line| lines.push(&line.expect("UTF-8"))));
        lines.wait_for("word of the losses", |printed| !losses(printed).is_empty());
        // As long as the ring is nearly full, what comes next would be lost, too.
        lines.wait_until_quiet();
        namespace.enter(|| (0..AFTER).for_each(|_| _ = listener.serve_and_close()));
        lines.wait_for("the stream to go on", |printed| printed.time_wait == AFTER);
        process.signal(Signal::INT);
        let status = process.wait();
        reader.join().expect("no panic");
        let mut said = String::new();
        std::io::Read::read_to_string(process.0.stderr.as_mut().expect("piped"), &mut said).expect("UTF-8");
        assert_eq!(status.code(), Some(10), "{said}");
        assert!(said.contains("--ring-size"), "{said}");
    });

    let printed = lines.printed.into_inner().expect("no panic");
    let summary = printed.others.last().expect("a summary");
    let ledger = balanced(summary);
    let lost = number(&ledger["lost"]);
    assert!(lost > 0, "{ledger:#}");
    // Two ends each: what is not a line is counted, to the last one.
    let all = 2 * (stalled + AFTER);
    assert_eq!(printed.closes + lost, all, "{ledger:#}");
    expect(ledger, &json!({ "written": printed.closes, "filtered_user": 0, "untracked": 0 }));
    // A RST that follows the end has a record of its own, which can be lost, too.
    let told: u64 = losses(&printed).iter().sum();
    assert!(told >= lost && told == number(&summary["lost"]), "{told} told: {ledger:#}");
    expect(&ledger["reconciled"], &json!({ "seen": all, "closed": all, "slack": 0, "percent": 100.0 }));
}

/// As people read it.
#[test]
fn in_the_text() {
    let namespace = Namespace::new("words");
    let (listener, mut process, mut stdout, mut text) = printing(&namespace, &["--strict"]);
    namespace.enter(|| (0..3).for_each(|_| _ = listener.serve_and_close()));
    for _ in 0..6 {
        assert!(stdout.read_line(&mut text).expect("it prints") > 0, "{text}");
    }
    process.signal(Signal::INT);
    std::io::Read::read_to_string(&mut stdout, &mut text).expect("UTF-8");
    assert_eq!(process.wait().code(), Some(0));
    let line = text.lines().find(|line| line.contains(" seen = ")).unwrap_or_else(|| panic!("{text}"));
    // Others may have closed something elsewhere meanwhile.
    assert!(line.starts_with("         saw 100.0 % of closes"), "{text}");
    assert!(line.contains(" seen = 6 written") && line.ends_with(" + 0 lost"), "{text}");
}

/// Where something was lost, people read on which CPU.
#[test]
fn losses_in_the_text() {
    const EACH: u64 = 200;
    let namespace = Namespace::new("cpu-words");
    let (listener, mut process, mut stdout, mut text) = printing(&namespace, &["--ring-size", "64K"]);
    // Nothing is read meanwhile, and 64 KiB are few records.
    process.signal(Signal::STOP);
    let usable = sched_getaffinity(None).expect("it has some");
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| usable.is_set(*cpu)).take(2).collect();
    for cpu in &cpus {
        namespace.enter(|| {
            let mut only = CpuSet::new();
            only.set(*cpu);
            sched_setaffinity(None, &only).expect("it is one of ours");
            (0..EACH).for_each(|_| abort(listener.connect().client));
        });
    }
    process.signal(Signal::CONT);
    process.signal(Signal::INT);
    std::io::Read::read_to_string(&mut stdout, &mut text).expect("UTF-8");
    assert_eq!(process.wait().code(), Some(0));

    let number = |text: &str| text.replace(',', "").parse::<u64>().unwrap_or_else(|error| panic!("{error}: {text}"));
    // `…: 850 seen = 600 written + 50 filtered + 200 lost`; what is filtered other tests closed.
    let counts = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let before = |word: &str| words.iter().position(|found| *found == word).map_or(0, |at| number(words[at - 1]));
        [before("seen"), before("written") + before("recorded"), before("filtered"), before("lost")]
    };
    let total = text.lines().find(|line| line.contains(" written + ")).unwrap_or_else(|| panic!("{text}"));
    let [seen, written, filtered, lost] = counts(total);
    assert_eq!((written + lost, seen), (2 * EACH * cpus.len() as u64, written + filtered + lost), "{text}");
    assert!(lost > 0, "{text}");
    if cpus.len() > 1 {
        // Each has its own row, and they are all.
        let rows: Vec<_> =
            text.lines().filter_map(|line| Some((line.trim_start().strip_prefix("CPU ")?, counts(line)))).collect();
        for cpu in cpus {
            let row = rows.iter().find(|(line, _)| line.starts_with(&format!("{cpu}:")));
            assert!(row.is_some_and(|(_, [_, written, _, lost])| written + lost >= EACH), "CPU {cpu}: {text}");
        }
        let sum = |of: usize| rows.iter().map(|(_, row)| row[of]).sum::<u64>();
        assert_eq!([sum(0), sum(1), sum(2), sum(3)], [seen, written, filtered, lost], "{text}");
    }
}
