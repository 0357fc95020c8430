//! Recordings: events in, the same events out, whatever happens to the file in between. No root, no kernel programs.
//!
//! `golden/v1.rec` is a recording of version 1: what was recorded once must be read for good, and always in the same way.

mod harmless;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use tracer::event::{
    Alert, AlertState, Cause, Close, ClosedBy, Connection, Event, Family, Final, FinalSource, How, Http, HttpVersion,
    Lost, Metric, Process, Protocol, Role, Source, Start, State, StateAt, Summary, TcpState,
};
use tracer::filter::Filter;
use tracer::record::{End, Reader, Recorded, Recorder, Unreadable, VERSION};
use tracer::report::replay;
use tracer::sink::summary::{About, Missed, Moment, Summarizer};
use tracer::sink::{Json, Page, Sink, Text};

use harmless::is_harmless;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(1_767_355_200_000 + ms).expect("a date")
}

fn process(pid: u32, comm: &str) -> Process {
    Process {
        pid,
        comm: comm.to_owned(),
        exe: Some(format!("/usr/sbin/{comm}")),
        uid: 33,
        cgroup: Some(format!("/system.slice/{comm}.service")),
        container: None,
        source: Source::Read,
    }
}

fn start() -> Event {
    Event::Start(Start {
        time: at(0),
        version: "0.1.0".to_owned(),
        kernel: "6.12.0".to_owned(),
        host: "web-1".to_owned(),
        filters: vec!["--port 8080".to_owned()],
        hooks: vec!["tp_btf/inet_sock_set_state".to_owned()],
        time_wait: Some(312),
        time_wait_max: Some(131_072),
        degraded: Vec::new(),
    })
}

/// The `n`th of many: all different, as on a busy host.
fn close(n: u64) -> Close {
    // Not random, and yet without a pattern that would help a compressor.
    let mix = |salt: u64| {
        let mut x = n.wrapping_add(salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^= x >> 29;
        x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^ x >> 32
    };
    let causes = [
        (Cause::RequestClose, ClosedBy::Local, Final::TimeWait),
        (Cause::RequestClose, ClosedBy::Local, Final::TimeWait),
        (Cause::NoReuse, ClosedBy::Remote, Final::Closed),
        (Cause::ResponseClose, ClosedBy::Local, Final::TimeWait),
        (Cause::IdleTimeout, ClosedBy::Local, Final::TimeWait),
        (Cause::ResetByPeer, ClosedBy::Remote, Final::Reset),
        (Cause::Unanswered, ClosedBy::Remote, Final::Closed),
        (Cause::Unused, ClosedBy::Remote, Final::Closed),
    ];
    let (cause, closed_by, fate) = causes[(mix(1) % 8) as usize];
    let workers = ["nginx", "api-server", "envoy", "postgres"];
    let worker = mix(2) % 24;
    let took = 400 + mix(3) % 90_000;
    let closing = mix(4) % 4_000;
    let states = [
        (TcpState::Established, 0),
        (TcpState::FinWait1, took),
        (TcpState::FinWait2, took + closing / 2),
        (TcpState::TimeWait, took + closing),
    ];
    let remote_port = 32_768 + (mix(5) % 28_000) as u16;
    Close {
        time: at((n / 4) as i64) + Duration::from_nanos(mix(6) % 1_000_000),
        cookie: 0x1_0000 + n,
        netns: 4_026_531_840,
        family: Family::Ipv4,
        local: "10.0.0.7:8080".parse().expect("an address"),
        remote: format!("10.1.{}.{}:{remote_port}", mix(7) % 4, mix(8) % 250).parse().expect("an address"),
        role: Role::Server,
        process: Some(process(1_000 + worker as u32, workers[(worker % 4) as usize]).into()),
        closed_by,
        closer: None,
        how: Some(if fate == Final::Reset { How::Rst } else { How::Fin }),
        fate: Some(fate),
        fate_source: Some(FinalSource::Fin),
        states: states.map(|(state, us)| StateAt { state, at_us: us as i64 }).to_vec(),
        duration_us: took + closing,
        started_before: false,
        idle_us: Some(mix(9) % took),
        rx_bytes: 70 + mix(10) % 2_000,
        tx_bytes: 150 + mix(11) % 60_000,
        protocol: Protocol::Http11,
        http: Some(Http {
            requests: 1 + (mix(12) % 9) as u32,
            responses: 1,
            method: Some("GET".to_owned()),
            target: Some(format!("/api/v1/items/{}", mix(13) % 100_000)),
            target_truncated: false,
            status: Some(200),
            request_version: Some(HttpVersion::V11),
            response_version: Some(HttpVersion::V11),
            request_connection: Some(Connection::Tokens {
                close: cause == Cause::RequestClose,
                keep_alive: cause != Cause::RequestClose,
                upgrade: false,
                other: false,
            }),
            response_connection: Some(Connection::Absent),
            keep_alive_timeout_s: (mix(14) % 2 == 0).then_some(75),
            keep_alive_max: None,
            answered: cause != Cause::Unanswered,
        }),
        cause,
    }
}

/// An event of each kind, and every field once with a value and once without.
fn of_all_kinds() -> Vec<Event> {
    let full = |change: fn(&mut Close)| {
        let mut close = close(1);
        change(&mut close);
        Box::new(close)
    };
    vec![
        start(),
        Event::Close(full(|_| {})),
        Event::Close(full(|close| {
            (close.process, close.how, close.http, close.idle_us) = (None, None, None, None);
            (close.closed_by, close.fate, close.cause) = (ClosedBy::None, Some(Final::Unknown), Cause::Unknown);
            close.states.clear();
            close.time = Timestamp::UNIX_EPOCH;
        })),
        Event::Close(full(|close| {
            close.family = Family::Ipv6;
            (close.local, close.remote) =
                ("[::1]:65535".parse().expect("an address"), "[2001:db8::ffff]:1".parse().expect("an address"));
            let container = Some("0123456789ab".to_owned());
            close.closer = Some(Process { container, ..process(7, "closer") }.into());
            close.states[0].at_us = i64::MIN;
            (close.rx_bytes, close.tx_bytes, close.duration_us) = (u64::MAX, 0, u64::MAX);
            let http = close.http.as_mut().expect("HTTP");
            http.request_connection = Some(Connection::Unobserved);
            http.response_connection =
                Some(Connection::Tokens { close: true, keep_alive: true, upgrade: true, other: true });
            (http.method, http.target) = (Some("\x1b[31m\u{202e}<script>".to_owned()), Some("é\u{fffd}".to_owned()));
        })),
        Event::Alert(Box::new(Alert {
            time: at(4),
            state: AlertState::Raised,
            metric: Metric::Rate,
            value: 20.5,
            limit: 20.0,
            time_wait_sockets: None,
            time_wait_per_s: 20.5,
            advice: None,
        })),
        Event::State(Box::new(State {
            time: at(5),
            cookie: 5,
            netns: 6,
            local: "127.0.0.1:1".parse().expect("an address"),
            remote: "127.0.0.1:2".parse().expect("an address"),
            role: Role::Client,
            process: Some(process(1, "systemd").into()),
            old: TcpState::SynSent,
            new: TcpState::Established,
            delta_us: None,
            closed_by: ClosedBy::None,
            http: None,
        })),
        Event::CloseWait(full(|open| {
            (open.fate, open.fate_source, open.how) = (None, None, None);
            open.states = vec![StateAt { state: TcpState::CloseWait, at_us: 1_000 }];
            open.duration_us = 61_000_000;
        })),
        Event::Lost(Lost { time: at(900), records: 3, since: at(0) }),
    ]
}

fn end() -> End {
    End {
        time: at(1_000),
        ran: Duration::from_millis(1_000),
        missed: Missed { lost: 3, untracked: 1 },
        time_wait_sockets: Some(7),
    }
}

/// A frame for each event.
fn record(events: &[Event]) -> Vec<u8> {
    let mut recorder = Recorder::new(Vec::new()).expect("memory");
    for event in events {
        recorder.event(event).expect("memory");
        recorder.flush().expect("memory");
    }
    ended(recorder)
}

fn ended(mut recorder: Recorder<Vec<u8>>) -> Vec<u8> {
    recorder.end(&end()).expect("memory");
    recorder.into_inner()
}

/// What can be read, as JSON, and how it ended.
fn read(bytes: &[u8]) -> (Vec<String>, Result<Option<End>, Unreadable>) {
    let mut lines = Vec::new();
    let mut reader = match Reader::new(bytes) {
        Ok(reader) => reader,
        Err(why) => return (lines, Err(why)),
    };
    loop {
        match reader.next() {
            Ok(Some(Recorded::Event(event))) => lines.push(json(&event)),
            Ok(Some(Recorded::End(end))) => {
                assert!(matches!(reader.next(), Ok(None)), "the end is the last");
                return (lines, Ok(Some(end)));
            }
            Ok(None) => return (lines, Ok(None)),
            Err(why) => {
                assert!(matches!(reader.next(), Ok(None)), "nothing comes after an error");
                return (lines, Err(why));
            }
        }
    }
}

fn json(event: &Event) -> String {
    let mut out = Vec::new();
    Json::default().event(event, &mut out).expect("memory");
    String::from_utf8(out).expect("UTF-8")
}

fn jsons(events: &[Event]) -> Vec<String> {
    events.iter().map(json).collect()
}

#[test]
fn what_is_recorded_is_read() {
    let events = of_all_kinds();
    let (lines, ended) = read(&record(&events));
    assert_eq!(lines, jsons(&events));
    assert_eq!(ended.expect("whole"), Some(end()));
}

/// The bytes of version 1. If this fails, old recordings are no longer read, or read wrongly: give the format a new version,
/// and keep the reader of this one. (`TRACER_WRITE_GOLDEN=1` writes the file anew: only before a version is released.)
#[test]
fn version_1_is_read_for_good() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1.rec");
    let events = of_all_kinds();
    if std::env::var_os("TRACER_WRITE_GOLDEN").is_some() {
        fs::write(&golden, record(&events)).expect("written");
    }
    let bytes = fs::read(&golden).expect("it is in the repository");
    let (lines, ended) = read(&bytes);
    assert_eq!(lines, jsons(&events));
    assert_eq!(ended.expect("whole"), Some(end()));
}

#[test]
fn cut_anywhere_it_is_read_up_to_there() {
    let events = of_all_kinds();
    let (whole, lines) = (record(&events), jsons(&events));
    let mut most = 0;
    for len in 0..whole.len() {
        let (got, ended) = read(&whole[..len]);
        assert_eq!(got, lines[..got.len()], "{len}");
        assert!(got.len() >= most, "a longer file holds no less");
        most = got.len();
        match ended {
            Err(Unreadable::NotARecording) => assert!(len < 8, "{len}"),
            Err(Unreadable::Unfinished { at }) => assert!(at <= len as u64),
            other => panic!("{len}: {other:?}"),
        }
    }
    assert_eq!(most, events.len(), "without the end nothing else is missing");
}

#[test]
fn each_flipped_bit_is_found() {
    let events = of_all_kinds();
    let (whole, lines) = (record(&events), jsons(&events));
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            let (got, ended) = read(&bytes);
            assert_eq!(got, lines[..got.len()], "{at}.{bit}");
            ended.expect_err("it is damaged");
        }
    }
}

#[test]
fn newer_versions_and_other_files() {
    let mut newer = record(&[start()]);
    newer[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
    let sum = crc32fast::hash(&newer[..12]);
    newer[12..16].copy_from_slice(&sum.to_le_bytes());
    let (lines, ended) = read(&newer);
    assert!(lines.is_empty() && matches!(ended, Err(Unreadable::Newer(version)) if version == VERSION + 1));
    for other in [&b""[..], b"\x89PNG\r\n\x1a\n", b"{\"type\":\"start\"}\n{\"type\":\"close\"}", &[0; 4096]] {
        assert!(matches!(read(other).1, Err(Unreadable::NotARecording)));
    }
    let mut longer = record(&[start()]);
    longer.push(0);
    assert!(matches!(read(&longer).1, Err(Unreadable::Damaged { .. })));
}

/// A recording with a frame that holds what it should not, and whose checksum is right.
fn forged(lengths: (u32, u32), stored: &[u8]) -> Vec<u8> {
    let mut bytes = record(&[])[..16].to_vec();
    let mut lens = lengths.0.to_le_bytes().to_vec();
    lens.extend(lengths.1.to_le_bytes());
    let mut sum = crc32fast::Hasher::new();
    sum.update(&lens);
    sum.update(stored);
    bytes.extend(lens);
    bytes.extend(sum.finalize().to_le_bytes());
    bytes.extend(stored);
    bytes
}

fn forged_block(block: &[u8]) -> Vec<u8> {
    let stored = lz4_flex::block::compress(block);
    forged((u32::try_from(stored.len()).expect("short"), u32::try_from(block.len()).expect("short")), &stored)
}

#[test]
fn lengths_are_checked_before_they_are_believed() {
    for (stored, len) in [(u32::MAX, u32::MAX), (u32::MAX, 10), (10, u32::MAX), (5, 0), (0, 5), (3, 1 << 20)] {
        let (lines, ended) = read(&forged((stored, len), b"abc"));
        assert!(lines.is_empty());
        ended.expect_err("it cannot be");
    }
}

/// Everything that a reader does with a recording.
fn use_all(bytes: &[u8]) {
    for html in [false, true] {
        let Ok(reader) = Reader::new(bytes) else { return };
        let mut page = Page::new(TimeZone::UTC);
        let mut sinks = [Sink::Text(Text::new(TimeZone::UTC, true)), Sink::json()];
        let mut summary = None;
        let filter = Filter { ports: if html { Vec::new() } else { vec![8080] }, ..Filter::default() };
        let ended = replay(reader, &filter, &[], |event| {
            page.event(event);
            if let Event::Summary(last) = event {
                summary = Some(last.clone());
            }
            sinks.iter_mut().try_for_each(|sink| sink.event(event, &mut std::io::sink()))
        });
        let trouble = ended.expect("a sink takes all").map(|why| why.to_string());
        let page = page.finish(&summary.expect("always"), trouble.as_deref());
        assert!(page.ends_with("</html>\n"));
    }
}

proptest! {
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let mut after_a_header = record(&[])[..16].to_vec();
        after_a_header.extend(&bytes);
        use_all(&bytes);
        use_all(&after_a_header);
        use_all(&forged((u32::try_from(bytes.len()).expect("short"), 300), &bytes));
        use_all(&forged_block(&bytes));
    }

    /// With right checksums, so that the changes reach the events themselves, and what prints them.
    #[test]
    fn changed_events(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        let whole = record(&of_all_kinds());
        let mut block = Vec::new();
        let mut rest = &whole[16..];
        while rest.len() > 12 {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().expect("four")) as usize;
            let (stored, len) = (word(0), word(4));
            block.extend(lz4_flex::block::decompress(&rest[12..12 + stored], len).expect("ours"));
            rest = &rest[12 + stored..];
        }
        for (at, byte) in changes {
            let at = at.index(block.len());
            block[at] = byte;
        }
        use_all(&forged_block(&block));
    }
}

#[test]
fn an_event_is_in_the_file_when_it_is_due() {
    let mut recorder = Recorder::new(Vec::new()).expect("memory");
    let begun = Instant::now();
    recorder.event(&start()).expect("memory");
    recorder.flush_if_due(begun).expect("memory");
    recorder.event(&Event::Close(Box::new(close(1)))).expect("memory");
    recorder.flush_if_due(Instant::now() + tracer::record::FLUSH_AFTER).expect("memory");
    let frames_of = |bytes: &[u8]| {
        let (mut at, mut frames) = (16, 0);
        while at < bytes.len() {
            at += 12 + u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four")) as usize;
            frames += 1;
        }
        frames
    };
    // One for both events, one for the end.
    assert_eq!(frames_of(&ended(recorder)), 2);
}

/// Runs `tracer report`, in UTC.
fn report(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tracer"));
    command.arg("report").args(args).env("TZ", "UTC").output().expect("it starts")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("UTF-8")
}

struct Kept {
    directory: tempfile::TempDir,
}

impl Kept {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    fn put(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).expect("written");
        path
    }
}

fn two_services() -> Vec<Event> {
    let of = |n: u64, pid: u32, comm: &str, port: u16| {
        let mut close = close(n);
        close.process = Some(process(pid, comm).into());
        close.local.set_port(port);
        Event::Close(Box::new(close))
    };
    vec![start(), of(1, 10, "nginx", 8080), of(2, 10, "nginx", 8080), of(3, 20, "api", 9090), of(4, 30, "nginx", 80)]
}

#[test]
fn the_report_is_what_the_run_printed() {
    let kept = Kept::new();
    let events = of_all_kinds();
    let file = kept.put("a.rec", &record(&events));
    let last = Event::Summary(Box::new(summary_of(&events)));
    let all: Vec<Event> = events.into_iter().chain([last]).collect();
    let mut text = Text::new(TimeZone::UTC, false);
    let mut expected = Vec::new();
    all.iter().for_each(|event| text.event(event, &mut expected).expect("memory"));

    let printed = report(&[&file]);
    assert_eq!(stdout(&printed), String::from_utf8(expected).expect("UTF-8"));
    assert_eq!((printed.status.code(), stderr(&printed)), (Some(0), ""));
    let printed = report(&[&file, "--json"]);
    assert_eq!(stdout(&printed), jsons(&all).concat());
    assert_eq!(printed.status.code(), Some(0));
}

#[test]
fn filters() {
    let kept = Kept::new();
    let file = kept.put("a.rec", &record(&two_services()));
    let cases: [(&[&str], usize); 8] = [
        (&[], 4),
        (&["--pid", "10"], 2),
        (&["--pid", "10", "--pid", "30"], 3),
        (&["--port", "9090"], 1),
        (&["--comm", "nginx"], 3),
        (&["--comm", "nginx", "--port", "80"], 1),
        (&["--comm", "api", "--port", "80"], 0),
        (&["--pid", "11"], 0),
    ];
    for (args, closes) in cases {
        let printed = report(&[&[file.as_str(), "--json"], args].concat());
        let lines: Vec<serde_json::Value> =
            stdout(&printed).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), closes + 2, "{args:?}");
        assert_eq!(lines[closes + 1]["closes"], closes, "{args:?}");
        let filters = lines[0]["filters"].as_array().expect("a list");
        assert_eq!(filters[0], "--port 8080");
        assert_eq!(filters.len(), 1 + args.len() / 2);
    }
}

#[test]
fn a_run_of_any_length_is_reported() {
    let kept = Kept::new();
    let mut recorder = Recorder::new(Vec::new()).expect("memory");
    recorder.event(&start()).expect("memory");
    recorder.end(&End { ran: Duration::MAX, ..end() }).expect("memory");
    assert_eq!(report(&[&kept.put("long.rec", &recorder.into_inner())]).status.code(), Some(0));
}

#[test]
fn what_cannot_be_read_is_said() {
    let kept = Kept::new();
    let whole = record(&two_services());
    // Not a line of the summary: that begins with white space.
    let is_close = |line: &str| line.starts_with(|c: char| c.is_ascii_digit()) && line.contains(":8080 <");
    let said = |bytes: &[u8], code: i32, lines: usize, words: &str| {
        let printed = report(&[&kept.put("a.rec", bytes)]);
        assert_eq!(printed.status.code(), Some(code), "{}", stderr(&printed));
        assert!(stderr(&printed).contains(words) && stderr(&printed).contains("a.rec"), "{}", stderr(&printed));
        assert_eq!(stdout(&printed).lines().filter(|line| is_close(line)).count(), lines);
        assert_eq!(stdout(&printed).contains(" closed in "), code == 8, "a summary of what there is");
    };
    // The two closes on port 8080 are in the second and the third frame.
    said(&whole[..whole.len() - 1], 8, 2, "without its end");
    let mut damaged = whole.clone();
    let middle = whole.len() - 100;
    damaged[middle] ^= 1;
    said(&damaged, 8, 2, "damaged");
    said(b"no recording", 1, 0, "no recording");
    // Not even its header is whole: without an event there is no summary either.
    for cut in [&whole[..10], &[&whole[..12], &[0; 4]].concat()] {
        assert_eq!(report(&[&kept.put("a.rec", cut)]).status.code(), Some(8));
    }
    let itself = kept.put("a.rec", &whole);
    let printed = report(&[&itself, "--html", &itself, "--overwrite"]);
    assert!(!printed.status.success() && stderr(&printed).contains("it is the recording"), "{}", stderr(&printed));
    assert_eq!(fs::read(&itself).expect("still there"), whole);
    let mut newer = whole;
    newer[8] = 9;
    let sum = crc32fast::hash(&newer[..12]);
    newer[12..16].copy_from_slice(&sum.to_le_bytes());
    said(&newer, 1, 0, "newer tracer");

    let printed = report(&[&kept.path("none.rec")]);
    assert_eq!(printed.status.code(), Some(1));
    assert!(stderr(&printed).contains("No such file"), "{}", stderr(&printed));
    let printed = report(&["/"]);
    assert_eq!(stderr(&printed).matches("Is a directory").count(), 1, "{}", stderr(&printed));
}

/// What an incident needs first, without the lines that nobody reads.
#[test]
fn a_summary_can_be_had_alone() {
    let kept = Kept::new();
    let mut events = of_all_kinds();
    events.retain(|event| !matches!(event, Event::Summary(_)));
    let file = kept.put("a.rec", &record(&events));
    let types = |args: &[&str]| {
        let printed = report(&[&[file.as_str(), "--json"], args].concat());
        assert_eq!(printed.status.code(), Some(0), "{}", stderr(&printed));
        let of = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["type"].to_string();
        let mut types: Vec<_> = stdout(&printed).lines().map(of).collect();
        types.sort_unstable();
        types.dedup();
        types
    };
    assert_eq!(
        types(&[]),
        ["alert", "close", "close_wait", "lost", "start", "state", "summary"].map(|word| format!("\"{word}\""))
    );
    assert_eq!(types(&["--summary-only"]), ["alert", "lost", "start", "summary"].map(|word| format!("\"{word}\"")));
    // The same summary.
    let last = |args: &[&str]| {
        let printed = report(&[&[file.as_str()], args].concat());
        stdout(&printed).split_once(" closed in ").expect("a summary").1.to_owned()
    };
    assert_eq!(last(&[]), last(&["--summary-only"]));
}

#[test]
fn a_closed_stdout_is_no_error() {
    let kept = Kept::new();
    let events: Vec<Event> = (0..20_000).map(|n| Event::Close(Box::new(close(n)))).collect();
    let mut recorder = Recorder::new(Vec::new()).expect("memory");
    events.iter().for_each(|event| recorder.event(event).expect("memory"));
    let file = kept.put("a.rec", &ended(recorder));
    let mut command = Command::new(env!("CARGO_BIN_EXE_tracer"));
    let mut child = command.args(["report", &file]).stdout(Stdio::piped()).spawn().expect("it starts");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn a_page_is_private_and_replaces_nothing_unasked() {
    let kept = Kept::new();
    let file = kept.put("a.rec", &record(&two_services()));
    let to = kept.path("a.html");
    let printed = report(&[&file, "--html", &to]);
    assert_eq!((printed.status.code(), stdout(&printed), stderr(&printed)), (Some(0), "", ""));
    let first = fs::read(&to).expect("written");
    assert_eq!(fs::metadata(&to).expect("written").permissions().mode() & 0o777, 0o600);

    let refused = report(&[&file, "--html", &to, "--port", "80"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("--overwrite"), "{}", stderr(&refused));
    assert_eq!(fs::read(&to).expect("written"), first);

    assert_eq!(report(&[&file, "--html", &to, "--port", "80", "--overwrite"]).status.code(), Some(0));
    assert_ne!(fs::read(&to).expect("written"), first);

    // Neither through a link nor to a device.
    let link = kept.path("link.html");
    symlink(&to, &link).expect("made");
    assert_eq!(report(&[&file, "--html", &link, "--overwrite"]).status.code(), Some(1));
    assert_eq!(report(&[&file, "--html", "/dev/null", "--overwrite"]).status.code(), Some(1));

    let cut = record(&two_services());
    let printed = report(&[&kept.put("cut.rec", &cut[..cut.len() - 1]), "--html", &to, "--overwrite"]);
    assert_eq!(printed.status.code(), Some(8));
    assert!(fs::read_to_string(&to).expect("written").contains("<b>Incomplete.</b>"));
}

/// The last summary of a run.
fn summary_of(events: &[Event]) -> Summary {
    let began = Instant::now();
    let mut summary = Summarizer::new(began, false, Some(131_072));
    events.iter().for_each(|event| summary.event(event));
    let End { time, ran, missed, time_wait_sockets } = end();
    summary.summary(About::Run, &Moment { time, now: began + ran, missed, time_wait_sockets, ledger: None })
}

fn page_of(events: &[Event]) -> String {
    let mut page = Page::new(TimeZone::UTC);
    events.iter().for_each(|event| page.event(event));
    page.finish(&summary_of(events), Some("it is \u{202e}<b>cut</b>"))
}

/// What others may call themselves, their files, cgroups and paths. (What was no UTF-8 has become U+FFFD before.)
const HOSTILE: [&str; 10] = [
    "<script>alert(1)</script>'\"&\u{202e}\u{2066}\x1b[31m\0",
    "\x1b]0;title\x07\x1b[2J\x1b[1A\x08",
    "\u{9b}31m\u{90}\u{9d}0;x\u{9c}",
    "\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}x\u{2066}\u{2067}\u{2068}\u{2069}\u{200e}\u{200f}\u{61c}",
    "a\r\n12:00:00 1/forged :80 < 10.0.0.1:1\n{\"type\":\"close\"}\u{85}\u{2028}\u{2029}\u{b}\u{c}",
    "\"'`\\\\\"}],",
    "</script></style></title></textarea>--><img src=x onerror=alert(1)>",
    "<!--&lt;&#60;&amp",
    "\0\u{1}\u{7f}\u{200b}\u{200d}\u{feff}\u{ad}\u{e0041}",
    "\u{fffd}\u{fffd}e\u{301}",
];

/// Events of all kinds, with `hostile` wherever somebody else chose what is there.
fn saying(hostile: &str) -> Vec<Event> {
    let mut events = of_all_kinds();
    // The clients here are at fault, so that the advice names one.
    events.extend((0..20).map(|n| {
        let mut close = close(n);
        (close.role, close.cause) = (Role::Client, Cause::RequestClose);
        Event::Close(Box::new(close))
    }));
    for event in &mut events {
        let (processes, http) = match event {
            Event::Start(start) => {
                for text in [&mut start.host, &mut start.kernel, &mut start.version] {
                    hostile.clone_into(text);
                }
                start.filters = vec![hostile.to_owned()];
                start.degraded = vec![hostile.to_owned()];
                continue;
            }
            Event::Close(close) | Event::CloseWait(close) => {
                ([&mut close.process, &mut close.closer].into_iter().flatten().collect(), &mut close.http)
            }
            Event::State(state) => (state.process.iter_mut().collect::<Vec<_>>(), &mut state.http),
            _ => continue,
        };
        for process in processes.into_iter().map(Arc::make_mut) {
            hostile.clone_into(&mut process.comm);
            for path in [&mut process.exe, &mut process.cgroup, &mut process.container] {
                *path = Some(hostile.to_owned());
            }
        }
        if let Some(http) = http {
            (http.method, http.target) = (Some(hostile.to_owned()), Some(hostile.to_owned()));
        }
    }
    let advice = summary_of(&events).advice.into_iter().find(|advice| advice.text.contains(hostile));
    assert!(advice.is_some(), "a summary says who is at fault");
    for event in &mut events {
        if let Event::Alert(alert) = event {
            alert.advice.clone_from(&advice);
        }
    }
    events
}

/// Text, with colours and without; JSON, which is also what `--exec` gets on its stdin; and the page.
#[test]
fn whatever_others_are_called_no_output_does_anything_but_show_it() {
    for hostile in HOSTILE {
        let mut events = saying(hostile);
        events.push(Event::Summary(Box::new(summary_of(&events))));
        let print = |sink: &mut Sink, event: &Event| {
            let mut out = Vec::new();
            sink.event(event, &mut out).expect("memory");
            String::from_utf8(out).expect("UTF-8")
        };
        let [mut plain, mut styled] = [false, true].map(|styled| Sink::Text(Text::new(TimeZone::UTC, styled)));
        for event in &events {
            let text = print(&mut plain, event);
            assert!(is_harmless(&text), "{text:?}");
            assert!(!text.lines().any(|line| line.contains("1/forged") && !line.contains(r"\x0a")), "{text:?}");
            let colours = print(&mut styled, event);
            assert_eq!(anstream::adapter::strip_str(&colours).to_string(), text, "colours are all that is added");
            let json = print(&mut Sink::json(), event);
            assert!(is_harmless(&json) && json.matches('\n').count() == 1, "{json:?}");
            let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
            if matches!(event, Event::Close(close) if close.process.is_some()) {
                for name in ["comm", "exe", "cgroup", "container"] {
                    assert_eq!(value["process"][name], hostile, "JSON says exactly what it is");
                }
            }
        }
        let page = page_of(&events);
        assert!(is_harmless(&page));
        // Its own, in this order, and nothing else that a browser would take for a tag of these.
        for (tag, count) in [("<script", 1), ("</script", 1), ("<style", 1), ("</style", 1), ("<!", 1), ("<img", 0)] {
            assert_eq!(page.matches(tag).count(), count, "{tag} for {hostile:?}");
        }
    }
}

#[test]
fn nothing_foreign_gets_into_a_page_as_it_is() {
    let mut events = saying(HOSTILE[0]);
    for event in &mut events {
        if let Event::Close(close) | Event::CloseWait(close) = event {
            close.cause = Cause::Unanswered;
        }
    }
    let page = page_of(&events);
    // Its own, at the end.
    assert_eq!(page.matches("<script").count(), 1);
    assert_eq!(
        page.matches("alert(1)").count(),
        page.matches("&lt;script&gt;alert(1)&lt;/script&gt;&#39;&quot;&amp;").count()
    );
    assert!(page.matches("alert(1)").count() > 10);
    assert!(page.contains(r"\u{202e}") && page.contains(r"it is \u{202e}&lt;b&gt;cut&lt;/b&gt;"));
    assert!(!page.chars().any(|c| c.is_control() && c != '\n'), "no raw control");
    assert!(!page.contains(['\u{202e}', '\u{2066}']), "no raw bidi control");
}

/// However long the recording, and whatever is in it.
#[test]
fn a_page_stays_below_five_megabytes() {
    let long = "<'\u{202e}\"&>".repeat(40);
    let events: Vec<Event> = (0..30_000)
        .map(|n| {
            let mut close = close(n);
            close.time = at(n as i64 * 7_000_000);
            close.remote.set_ip(std::net::Ipv6Addr::from(u128::from(n) << 64 | 0x2001).into());
            let mut foreign = process(n as u32, "x");
            long.clone_into(&mut foreign.comm);
            let foreign = Arc::new(foreign);
            (close.process, close.closer) = (Some(Arc::clone(&foreign)), Some(foreign));
            let http = close.http.as_mut().expect("HTTP");
            (http.method, http.target) = (Some(long.clone()), Some(long.clone()));
            Event::Close(Box::new(close))
        })
        .collect();
    let page = page_of(&events);
    assert!((3_900_000..5_000_000).contains(&page.len()), "{}", page.len());
    assert!(page.contains("of 30,000; all are in the figures above"));
    assert!(page.matches("<g><title>").count() <= 240, "two charts of bounded length");
}

/// What a browser does before it runs a script, so that one that was changed and a policy that was not are found.
#[test]
fn the_policy_allows_the_one_script() {
    let page = page_of(&two_services());
    let script = page.split("<script>").nth(1).and_then(|rest| rest.split("</script>").next()).expect("a script");
    let policy = page.split("'sha256-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a hash");
    let digest = Sha256::digest(script.as_bytes());
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let base64: String = digest
        .chunks(3)
        .map(|three| three.iter().chain([0; 2].iter()).take(3).fold(0, |all, byte| all << 8 | u32::from(*byte)))
        .flat_map(|word| [18, 12, 6, 0].map(|shift| char::from(DIGITS[(word >> shift & 63) as usize])))
        .take(43)
        .chain(['='])
        .collect();
    assert_eq!(base64, policy);
    for network in ["http:", "https:", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(network), "{network}");
    }
}

#[test]
fn the_page_says_what_the_events_say() {
    let page = page_of(&two_services());
    for words in [
        "<h1>TCP closes on web-1</h1>",
        "<b>4</b>closed",
        "<b>312</b>in TIME_WAIT at the start",
        "<code>--port 8080</code>",
        "<b>Records lost: 3.</b>",
        // All processes of that name, whatever their ids.
        "<td>nginx <span class=dim>",
        "</span><td class=n>3<td",
        "Slowest to close",
        "Open for longest",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert_eq!(page.matches("<tr><td>2026-01-02 12:00:00.").count(), 4, "a row for each close");
    assert_eq!(page_of(&[start()]).matches("No connection closed.").count(), 1);
}

/// Resident memory at its highest, in KiB, of the children that have ended.
fn children_peak_kib() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is ours, and as long as the call expects.
    let usage = unsafe {
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    usage.ru_maxrss
}

/// The figures are for `--release`: `cargo test --release -p tracer --test recording -- --ignored --nocapture`
#[test]
#[ignore = "takes long without --release"]
fn a_million_closes() {
    const MIB: u64 = 1 << 20;
    let kept = Kept::new();
    let path = kept.path("a-million.rec");
    let mut recorder = Recorder::new(fs::File::create(&path).expect("made")).expect("written");
    recorder.event(&start()).expect("written");
    let mut writing = Duration::ZERO;
    for batch in 0..100 {
        let events: Vec<Event> = (0..10_000).map(|n| Event::Close(Box::new(close(batch * 10_000 + n)))).collect();
        let begun = Instant::now();
        events.iter().for_each(|event| recorder.event(event).expect("written"));
        writing += begun.elapsed();
    }
    recorder.end(&end()).expect("written");
    let size = fs::metadata(&path).expect("written").size();
    println!("recorded: {} MiB, {} ns an event", size / MIB, writing.as_nanos() / 1_000_000);
    assert!(size < 100 * MIB);

    let html = kept.path("a.html");
    let runs: [(&str, &[&str]); 3] = [("text", &[]), ("json", &["--json"]), ("html", &["--html", &html])];
    for (name, args) in runs {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tracer"));
        let begun = Instant::now();
        let status = command.arg("report").arg(&path).args(args).stdout(Stdio::null()).status().expect("it starts");
        let took = begun.elapsed();
        println!("{name}: {:.2} s, peak so far {} MiB", took.as_secs_f64(), children_peak_kib() / 1024);
        assert!(status.success());
        if !cfg!(debug_assertions) {
            assert!(took < Duration::from_secs(5), "{name}");
        }
    }
    assert!(children_peak_kib() < 100 * 1024);
    let page = fs::metadata(&html).expect("written").size();
    println!("page: {} KiB", page / 1024);
    assert!(page < 5 * MIB);
    if let Some(to) = std::env::var_os("TRACER_KEEP_RECORDING") {
        fs::copy(&path, to).expect("copied");
    }
}
