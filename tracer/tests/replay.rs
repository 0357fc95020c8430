//! Replays: bytes as the ring buffer gives them in, lines as they are printed out. No root, no kernel programs.
//!
//! The records are written here by hand, as the programs would write them; all steps between ring and stdout are the real
//! ones. Also: no bytes may make any step panic, and no line may be wider than 120 columns or hold a raw control.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use bytemuck::Zeroable as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use proptest::prelude::*;
use tracer::connection::Connections;
use tracer::decode::{Blind, NotARecord, decode};
use tracer::event::{Cause, Close, ClosedBy, Event, Final, How, Ledger, LedgerRow, Lost, Reconciled, Start};
use tracer::filter;
use tracer::process::Processes;
use tracer::sink::summary::{About, Missed, Moment, Summarizer};
use tracer::sink::{Json, Text};
use tracer::time_wait::SockDiag;
use tracer_ebpf::head::{bit, protocol, token};
use tracer_ebpf::{Record, STATES, Task, first_end, flag, kind, pack_state, role, source};
use unicode_width::UnicodeWidthStr as _;

const MS: u64 = 1_000_000;
/// When each connection was established, `CLOCK_MONOTONIC`.
const BEGAN: u64 = 5_000 * MS;

const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// Beyond what the kernel gives out: `/proc` knows nothing of them.
const SERVER_PID: u32 = 4_200_001;
const CLIENT_PID: u32 = 4_200_002;

fn task(tgid: u32, name: &[u8]) -> Task {
    let mut comm = [0; 16];
    comm[..name.len()].copy_from_slice(name);
    Task { start_ns: 77 * MS, tgid, uid: 1000, comm }
}

fn set_address(record: &mut Record, local: &str, remote: &str) {
    let mut set = |text: &str, remote: bool| {
        let address: SocketAddr = text.parse().expect("an address");
        let mut bytes = [0; 16];
        match address.ip() {
            IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes = ip.octets(),
        }
        record.family = if address.is_ipv4() { 4 } else { 6 };
        if remote {
            (record.remote, record.remote_port) = (bytes, address.port());
        } else {
            (record.local, record.local_port) = (bytes, address.port());
        }
    };
    set(local, false);
    set(remote, true);
}

fn set_target(record: &mut Record, target: &[u8]) {
    record.http.target_len = u8::try_from(target.len()).expect("short");
    record.http.target[..target.len()].copy_from_slice(target);
}

fn set_states(record: &mut Record, states: &[u8]) {
    record.states = [0; STATES];
    for (at, state) in states.iter().enumerate() {
        record.states[at] = pack_state(*state, BEGAN + at as u64 * MS);
    }
    record.new_state = states[states.len() - 1];
    record.old_state = states[states.len() - 2];
    record.at_ns = BEGAN + (states.len() as u64 - 1) * MS;
}

/// The server's end of one exchange without `Connection` headers; the server closed first, and has the peer's FIN.
fn server() -> Record {
    let mut record = Record::zeroed();
    record.kind = kind::CLOSE;
    record.cookie = 4711;
    record.established_ns = BEGAN;
    record.payload_ns = BEGAN + MS / 2;
    record.end_ns = BEGAN + MS;
    (record.rx_bytes, record.tx_bytes) = (78, 152);
    record.owner = task(SERVER_PID, b"server");
    record.owner_source = source::READ;
    record.closer = task(SERVER_PID, b"server");
    record.role = role::SERVER;
    record.first_end = first_end::LOCAL;
    record.flags = flag::FIN_SENT | flag::FIN_RECEIVED | flag::ALL_ACKNOWLEDGED;
    set_address(&mut record, "127.0.0.1:8080", "127.0.0.1:43210");
    set_states(&mut record, &[ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE]);
    let http = &mut record.http;
    (http.requests, http.responses, http.status) = (1, 1, 200);
    (http.request_version, http.response_version) = (11, 11);
    (http.request_connection, http.response_connection) = (token::COMPLETE, token::COMPLETE);
    http.protocol = protocol::HTTP1;
    http.flags = bit::REQUESTS_IN;
    http.method_len = 3;
    http.method[..3].copy_from_slice(b"GET");
    set_target(&mut record, b"/hello");
    record
}

/// The other end: it asked, and closed second.
fn client() -> Record {
    let mut record = server();
    record.cookie = 4712;
    record.owner = task(CLIENT_PID, b"client");
    record.owner_source = source::CONNECT;
    record.closer = task(CLIENT_PID, b"client");
    record.role = role::CLIENT;
    record.first_end = first_end::REMOTE;
    set_address(&mut record, "127.0.0.1:43210", "127.0.0.1:8080");
    set_states(&mut record, &[SYN_SENT, ESTABLISHED, CLOSE_WAIT, LAST_ACK, CLOSE]);
    record.http.flags = bit::REQUESTS_OUT;
    record
}

fn with(mut record: Record, change: impl FnOnce(&mut Record)) -> Record {
    change(&mut record);
    record
}

/// Without HTTP.
fn payload(record: &mut Record, protocol: u8) {
    record.http = tracer_ebpf::head::Exchange::zeroed();
    record.http.protocol = protocol;
}

fn noon() -> Timestamp {
    "2026-01-02T12:00:00.123456789Z".parse().expect("a date")
}

/// The events that follow from records, all dated [`noon`].
fn replay(records: &[Record], states: bool) -> Vec<Event> {
    replay_blind(records, states, Blind::default())
}

/// The same on a host that lacks hooks.
fn replay_blind(records: &[Record], states: bool, blind: Blind) -> Vec<Event> {
    let mut connections = Connections::new(Processes::new(), SockDiag::new().expect("/proc"), states).blind(blind);
    let mut events = Vec::new();
    let now = Instant::now();
    for record in records {
        let fact = decode(bytemuck::bytes_of(record)).expect("a record");
        connections.fact(fact, now, &mut events);
    }
    connections.finish(now, &mut events);
    for event in &mut events {
        match event {
            Event::Close(close) | Event::CloseWait(close) => close.time = noon(),
            Event::State(state) => state.time = noon(),
            _ => {}
        }
    }
    events
}

fn close(record: &Record) -> Box<Close> {
    match replay(&[*record], false).pop() {
        Some(Event::Close(close)) => close,
        other => panic!("{other:?} is no close"),
    }
}

fn print_text(events: &[Event]) -> String {
    let mut text = Text::new(TimeZone::UTC, false);
    let mut out = Vec::new();
    for event in events {
        text.event(event, &mut out).expect("written");
    }
    String::from_utf8(out).expect("UTF-8")
}

fn print_json(events: &[Event]) -> String {
    let mut json = Json::default();
    let mut out = Vec::new();
    for event in events {
        json.event(event, &mut out).expect("written");
    }
    String::from_utf8(out).expect("UTF-8")
}

fn start() -> Event {
    Event::Start(Start {
        time: noon(),
        version: "0.0.0".to_owned(),
        kernel: "6.12.0".to_owned(),
        host: "host".to_owned(),
        filters: vec!["--port 8080".to_owned()],
        hooks: vec!["tp_btf/inet_sock_set_state".to_owned()],
        time_wait: Some(20),
        time_wait_max: Some(131_072),
        degraded: Vec::new(),
    })
}

/// The client asked to close, the server obeyed.
fn classic() -> [Record; 2] {
    let close = token::COMPLETE | token::CLOSE;
    [server(), client()]
        .map(|record| with(record, |r| (r.http.request_connection, r.http.response_connection) = (close, close)))
}

#[test]
fn the_classic_case_as_text() {
    let mut events = vec![start()];
    events.extend(replay(&classic(), false));
    insta::assert_snapshot!(print_text(&events), @"
    TIME     PROCESS            SOCKET                      CLOSED FINAL     WHY
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait client asked: Connection: close (GET /hel… 200)
    12:00:00 4200002/client     :43210 > 127.0.0.1:8080     remote closed    client asked: Connection: close (GET /hel… 200)
    ");
}

#[test]
fn the_classic_case_as_json() {
    let mut events = vec![start()];
    events.extend(replay(&classic(), false));
    insta::assert_snapshot!(print_json(&events), @r#"
    {"type":"start","time":"2026-01-02T12:00:00.123456789Z","version":"0.0.0","kernel":"6.12.0","host":"host","filters":["--port 8080"],"hooks":["tp_btf/inet_sock_set_state"],"time_wait":20,"time_wait_max":131072,"degraded":[]}
    {"type":"close","time":"2026-01-02T12:00:00.123456789Z","cookie":4711,"netns":0,"family":"ipv4","local":"127.0.0.1:8080","remote":"127.0.0.1:43210","role":"server","process":{"pid":4200001,"comm":"server","exe":null,"uid":1000,"cgroup":null,"container":null,"source":"read"},"closed_by":"local","closer":null,"how":"fin","final":"time_wait","final_source":"fin","states":[{"state":"ESTABLISHED","at_us":0},{"state":"FIN_WAIT1","at_us":1000},{"state":"FIN_WAIT2","at_us":2000},{"state":"TIME_WAIT","at_us":3000}],"duration_us":3000,"started_before":false,"idle_us":500,"rx_bytes":78,"tx_bytes":152,"protocol":"http/1.1","http":{"requests":1,"responses":1,"method":"GET","target":"/hello","target_truncated":false,"status":200,"request_version":"1.1","response_version":"1.1","request_connection":"close","response_connection":"close","keep_alive_timeout_s":null,"keep_alive_max":null,"answered":true},"cause":"request_close"}
    {"type":"close","time":"2026-01-02T12:00:00.123456789Z","cookie":4712,"netns":0,"family":"ipv4","local":"127.0.0.1:43210","remote":"127.0.0.1:8080","role":"client","process":{"pid":4200002,"comm":"client","exe":null,"uid":1000,"cgroup":null,"container":null,"source":"connect"},"closed_by":"remote","closer":null,"how":"fin","final":"closed","final_source":"state","states":[{"state":"SYN_SENT","at_us":0},{"state":"ESTABLISHED","at_us":1000},{"state":"CLOSE_WAIT","at_us":2000},{"state":"LAST_ACK","at_us":3000},{"state":"CLOSE","at_us":4000}],"duration_us":4000,"started_before":false,"idle_us":500,"rx_bytes":78,"tx_bytes":152,"protocol":"http/1.1","http":{"requests":1,"responses":1,"method":"GET","target":"/hello","target_truncated":false,"status":200,"request_version":"1.1","response_version":"1.1","request_connection":"close","response_connection":"close","keep_alive_timeout_s":null,"keep_alive_max":null,"answered":true},"cause":"request_close"}
    "#);
}

/// One record for each cause.
fn every_cause() -> Vec<(Cause, Record)> {
    let exchange = |record: Record, change: fn(&mut tracer_ebpf::head::Exchange)| with(record, |r| change(&mut r.http));
    let idle = |record: &mut Record, ms: u64| {
        record.end_ns = record.payload_ns + ms * MS;
        record.at_ns = record.end_ns + MS;
    };
    vec![
        (
            Cause::Timeout,
            with(client(), |r| {
                set_states(r, &[SYN_SENT, CLOSE]);
                (r.sk_err, r.established_ns, r.end_ns, r.first_end, r.flags) = (110, 0, 0, first_end::NONE, 0);
                (r.rx_bytes, r.tx_bytes, r.payload_ns) = (0, 0, 0);
                payload(r, protocol::NONE);
            }),
        ),
        (
            Cause::ResetByPeer,
            with(server(), |r| {
                set_states(r, &[ESTABLISHED, CLOSE]);
                (r.first_end, r.flags, r.sk_err) = (first_end::REMOTE, flag::RST_RECEIVED, 104);
            }),
        ),
        (
            Cause::ResetByLocal,
            with(server(), |r| {
                set_states(r, &[ESTABLISHED, CLOSE]);
                (r.first_end, r.flags) = (first_end::NONE, flag::IN_PROCESS);
            }),
        ),
        (Cause::ProcessExit, with(server(), |r| r.flags |= flag::CLOSED_BY_EXIT)),
        (
            Cause::Unused,
            with(client(), |r| {
                (r.rx_bytes, r.tx_bytes, r.payload_ns) = (0, 0, 0);
                payload(r, protocol::NONE);
            }),
        ),
        (Cause::Tls, with(server(), |r| payload(r, protocol::TLS))),
        (Cause::Upgraded, exchange(server(), |h| (h.status, h.flags) = (101, h.flags | bit::UPGRADED))),
        (Cause::H2, with(server(), |r| payload(r, protocol::H2))),
        (Cause::NotHttp, with(server(), |r| payload(r, protocol::OTHER))),
        (Cause::Unanswered, exchange(server(), |h| (h.responses, h.response_version) = (0, 0))),
        (Cause::Truncated, exchange(server(), |h| h.flags |= bit::BODY_INCOMPLETE)),
        (Cause::RequestClose, exchange(server(), |h| h.request_connection |= token::CLOSE)),
        (Cause::ResponseClose, exchange(server(), |h| h.response_connection |= token::CLOSE)),
        (Cause::Http10, exchange(server(), |h| (h.request_version, h.response_version) = (10, 10))),
        (
            Cause::IdleTimeout,
            with(server(), |r| {
                idle(r, 5_003);
                (r.http.keep_alive_timeout_s, r.http.flags) = (5, r.http.flags | bit::HAS_TIMEOUT);
            }),
        ),
        (Cause::NoReuse, client()),
        (Cause::Unknown, exchange(server(), |h| h.flags |= bit::BODY_UNTIL_CLOSE)),
    ]
}

#[test]
fn every_cause_as_text() {
    let mut events = Vec::new();
    for (cause, record) in every_cause() {
        let close = close(&record);
        assert_eq!(close.cause, cause);
        events.push(Event::Close(close));
    }
    insta::assert_snapshot!(print_text(&events), @"
    12:00:00 4200002/client     :43210 > 127.0.0.1:8080     none   timed_out connection attempt timed out
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     remote reset     reset by peer (GET /hello 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  reset     closed with unread data or SO_LINGER 0
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait its process exited (GET /hello 200)
    12:00:00 4200002/client     :43210 > 127.0.0.1:8080     remote closed    opened but never used
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait tls
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait upgraded (GET /hello 101)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait h2
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait not_http
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait no answer to GET /hello
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server cut its response short (GET /hello 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait client asked: Connection: close (GET /hel… 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server answered: Connection: close
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait HTTP/1.0 client, no keep-alive (GET /hello 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server's keep-alive time-out: idle 5.0 s
    12:00:00 4200002/client     :43210 > 127.0.0.1:8080     remote closed    server closed, nobody asked (GET /hello 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait unknown (GET /hello 200)
    ");
}

#[test]
fn lines_of_all_shapes() {
    let records = [
        // Addresses of any length, and an IPv4 address in an IPv6 socket.
        with(server(), |r| set_address(r, "255.255.255.255:65535", "255.255.255.255:65535")),
        with(server(), |r| set_address(r, "[::1]:8080", "[::1]:43210")),
        with(server(), |r| {
            set_address(
                r,
                "[2001:db8:1111:2222:3333:4444:5555:6666]:65535",
                "[2001:db8:1111:2222:3333:4444:5555:6667]:65535",
            );
        }),
        with(server(), |r| set_address(r, "[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.2]:43210")),
        // No process; another process closed; a long name.
        with(server(), |r| (r.owner, r.owner_source, r.closer) = (Task::NONE, source::NONE, Task::NONE)),
        with(server(), |r| r.closer = task(CLIENT_PID, b"helper")),
        with(server(), |r| {
            r.closer = task(CLIENT_PID, b"another-process");
            r.http.response_connection |= token::CLOSE;
        }),
        with(server(), |r| r.owner = task(SERVER_PID, b"a-name-so-long.")),
        // A role that is not known; TIME_WAIT that is only likely; a simultaneous close.
        with(server(), |r| {
            (r.role, r.flags) = (role::UNKNOWN, r.flags | flag::TIME_WAIT_COUNT_UNKNOWN | flag::STARTED_BEFORE);
            payload(r, protocol::UNDECIDED);
        }),
        with(server(), |r| {
            set_states(r, &[ESTABLISHED, FIN_WAIT1, CLOSING, CLOSE]);
            r.first_end = first_end::BOTH;
        }),
        // The kernel cannot be asked for what is left.
        with(server(), |r| r.flags = flag::FIN_SENT | flag::ALL_ACKNOWLEDGED),
        // A long target, cut and not cut by the programs.
        with(server(), |r| set_target(r, &[b'x'; 64])),
        with(server(), |r| {
            set_target(r, &[b'y'; 64]);
            r.http.flags |= bit::TARGET_TRUNCATED;
        }),
        with(server(), |r| {
            set_target(r, b"/cut");
            r.http.flags |= bit::TARGET_TRUNCATED;
        }),
    ];
    insta::assert_snapshot!(print_text(&replay(&records, false)), @"
    12:00:00 4200001/server     :65535 < 255.255.255.255:65535 local time_wait server closed, nobody asked (GET /hello 200)
    12:00:00 4200001/server     :8080 < [::1]:43210         local  time_wait server closed, nobody asked (GET /hello 200)
    12:00:00 4200001/server     :65535 < [2001:db8:1111:2222:3333:4444:5555:6667]:65535 local time_wait server closed, nobo…
    12:00:00 4200001/server     :80 < 10.0.0.2:43210        local  time_wait server closed, nobody asked (GET /hello 200)
    12:00:00 unknown            :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody asked (GET /hello 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody a…, by 4200002/helper
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server answered: Connec…, by 4200002/another-p…
    12:00:00 4200001/a-name-so… :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody asked (GET /hello 200)
    12:00:00 4200001/server     :8080 - 127.0.0.1:43210     local  time_wait? unknown
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     both   time_wait closed, nobody asked (GET /hello 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody asked (GET xxxxxxxx… 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody asked (GET yyyyyyy… 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody asked (GET /cut… 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  unknown   server closed, nobody asked (GET /hello 200)
    ");
}

#[test]
fn hostile_bytes() {
    let records = [
        with(server(), |r| {
            r.owner = task(SERVER_PID, b"\x1b[2J\xff\0\0");
            set_target(r, b"/\x1b]0;pwned\x07\0\xc2\x9b31m\xff");
        }),
        with(server(), |r| {
            set_target(r, "/\u{202e}gpj.exe\u{2028}\u{200b}日本".as_bytes());
            r.http.method = *b"M\x1b[31m\r\n\x7f\0\0\0\0\0\0\0";
            r.http.method_len = 9;
            (r.http.responses, r.http.response_version) = (0, 0);
        }),
    ];
    let events = replay(&records, false);
    insta::assert_snapshot!(print_text(&events), @r"
    12:00:00 4200001/\x1b[2J…   :8080 < 127.0.0.1:43210     local  time_wait server closed, nobody asked (GET /\x1b]0;… 200)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait no answer to M\x1b[31m\x0d\x0a\x7f /\u{202e}gp…
    ");
    let json = print_json(&events);
    let targets: Vec<&str> = json
        .lines()
        .filter_map(|line| line.split_once("\"target\":")?.1.split_once(",\"target_tr"))
        .map(|(t, _)| t)
        .collect();
    insta::assert_snapshot!(targets.join("\n"), @r#"
    "/\u001b]0;pwned\u0007\u0000\u009b31m�"
    "/\u202egpj.exe\u2028\u200b日本"
    "#);
}

#[test]
fn states_as_text() {
    let at = |states: &[u8], headers: bool| {
        with(classic()[0], |r| {
            r.kind = kind::STATE;
            if !headers {
                (r.first_end, r.end_ns) = (first_end::NONE, 0);
                payload(r, protocol::NONE);
            }
            set_states(r, states);
        })
    };
    let records = [
        at(&[3, ESTABLISHED], false),
        at(&[3, ESTABLISHED, FIN_WAIT1], true),
        at(&[3, ESTABLISHED, FIN_WAIT1, FIN_WAIT2], true),
        with(classic()[0], |r| set_states(r, &[3, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE])),
    ];
    insta::assert_snapshot!(print_text(&replay(&records, true)), @"
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     -      SYN_RECV>ESTABLISHED +1 ms
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  ESTABLISHED>FIN_WAIT1 +1 ms (req close, resp close)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  FIN_WAIT1>FIN_WAIT2 +1 ms (req close, resp close)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  FIN_WAIT2>TIME_WAIT +1 ms (req close, resp close)
    12:00:00 4200001/server     :8080 < 127.0.0.1:43210     local  time_wait client asked: Connection: close (GET /hel… 200)
    ");
}

#[test]
fn lost_and_summary() {
    let began = Instant::now();
    let moment =
        |after, missed| Moment { time: noon(), now: began + after, missed, time_wait_sockets: Some(126), ledger: None };
    let mut summary = Summarizer::new(began, false, None);
    for (at, (_, record)) in every_cause().into_iter().enumerate() {
        for _ in 0..=at {
            summary.close(&close(&record));
        }
    }
    summary.close_wait();
    let events = [
        Event::Lost(Lost { time: noon(), records: 17, since: noon() - jiff::SignedDuration::from_secs(61) }),
        Event::Summary(Box::new(
            summary.summary(About::Run, &moment(Duration::from_millis(21_040), Missed { lost: 17, untracked: 3 })),
        )),
        Event::Summary(Box::new(
            Summarizer::new(began, false, None).summary(About::Run, &moment(Duration::from_secs(1), Missed::default())),
        )),
    ];
    insta::assert_snapshot!(print_text(&events), @"
    12:00:00 LOST 17 records since 11:58:59: up to as many lines are missing
    12:00:00 153 closed in 21.0 s (7.3/s), 126 of them left TIME_WAIT (6.0/s), 17 lost, 1 stuck in CLOSE_WAIT
             3 could not be followed
      14 of 148 closes: server 4200001/server (:8080) closes connections that were idle (1 request per connection). Raise
        its keep-alive time-out; or make that of its clients the shorter one, so that they close first.
      14 of 148 closes: client 127.0.0.1 (or a proxy there) speaks HTTP/1.0 without keep-alive (1 request per connection).
        Let it speak HTTP/1.1 (nginx as a proxy: proxy_http_version 1.1); on this host TIME_WAIT would fall from about 360
        to about 320 if its connections stay open.
      13 of 148 closes: server 4200001/server (:8080) answers with Connection: close (1 request per connection). Turn
        keep-alive on in that server; on this host TIME_WAIT would fall from about 360 to about 320 if its connections stay
        open.
      12 of 148 closes: client 127.0.0.1 (or a proxy there) sends Connection: close (1 request per connection). Turn
        keep-alive on in that client; on this host TIME_WAIT would fall from about 360 to about 330 if its connections stay
        open.
      15 of 148 closes: server 127.0.0.1:8080 (or a proxy there) closes after the response, though nobody asked (1 request
        per connection). Turn keep-alive on in that server.
      CLOSES      /S TIME_WAIT PROCESS            CLOSED CAUSE          PEER                     REQUESTS  LIFETIME
          17     0.8        17 4200001/server     local  unknown        :8080 < 127.0.0.1        1/1       2 ms/2 ms
          16     0.8         0 4200002/client     remote no_reuse       > 127.0.0.1:8080         1/1       3 ms/3 ms
          15     0.7        15 4200001/server     local  idle_timeout   :8080 < 127.0.0.1        1/1       4.9 s/4.9 s
          14     0.7        14 4200001/server     local  http10         :8080 < 127.0.0.1        1/1       2 ms/2 ms
          13     0.6        13 4200001/server     local  response_close :8080 < 127.0.0.1        1/1       2 ms/2 ms
          12     0.6        12 4200001/server     local  request_close  :8080 < 127.0.0.1        1/1       2 ms/2 ms
          11     0.5        11 4200001/server     local  truncated      :8080 < 127.0.0.1        1/1       2 ms/2 ms
          10     0.5        10 4200001/server     local  unanswered     :8080 < 127.0.0.1        1/1       2 ms/2 ms
           9     0.4         9 4200001/server     local  not_http       :8080 < 127.0.0.1                  2 ms/2 ms
           8     0.4         8 4200001/server     local  h2             :8080 < 127.0.0.1                  2 ms/2 ms
          28 in other groups
    12:00:00 0 closed in 1.0 s (0.0/s), 0 of them left TIME_WAIT (0.0/s), 0 lost
    ");
    insta::assert_snapshot!(print_json(&events[2..]).trim_end(), @r#"{"type":"summary","time":"2026-01-02T12:00:00.123456789Z","final":true,"duration_s":1.0,"closes":0,"time_wait":0,"close_wait":0,"lost":0,"untracked":0,"window_s":1.0,"window_closes":0,"window_time_wait":0,"window_connections":0,"closes_per_s":0.0,"time_wait_per_s":0.0,"time_wait_sockets":126,"advice":[],"groups":[],"other_closes":0,"ledger":null}"#);
}

#[test]
fn the_books_of_a_summary() {
    let reconciled = Reconciled {
        netns: 1,
        closed: 12_034,
        seen: 12_034,
        slack: 0,
        percent: Some(100.0),
        active_opens: 6_017,
        passive_opens: 6_017,
        mini_sockets: Some(6_000),
        mini_sockets_grown: Some(-70),
        mini_sockets_seen: None,
        mini_sockets_maybe: None,
        mini_sockets_agree: None,
        time_wait_overflow: Some(0),
    };
    let books = Ledger {
        seen: 12_034,
        written: 12_000,
        filtered_kernel: 30,
        filtered_user: 4,
        lost: 0,
        untracked: 0,
        waiting: 0,
        emitted: 12_004,
        read: 12_004,
        balanced: true,
        cpus: vec![LedgerRow { cpu: 1, seen: 12_034, emitted: 12_004, filtered: 30, lost: 0, untracked: 0 }],
        reconciled: Some(reconciled.clone()),
    };
    let lines = |ledger: Ledger| {
        let began = Instant::now();
        let ledger = Some(Box::new(ledger));
        let moment = Moment { time: noon(), now: began, missed: Missed::default(), time_wait_sockets: None, ledger };
        let mut summary = Summarizer::new(began, false, None).summary(About::Run, &moment);
        // As if it had counted them.
        if let (Some(ledger), Some(given)) = (&mut summary.ledger, &moment.ledger) {
            (ledger.written, ledger.balanced) = (given.written, given.balanced);
        }
        let text = print_text(&[Event::Summary(Box::new(summary))]);
        text.lines().skip(1).map(|line| line.trim_start().to_owned()).collect::<Vec<_>>()
    };
    let shown = |ledger: Ledger| {
        let [line] = &lines(ledger)[..] else { panic!("one line") };
        line.clone()
    };
    let with =
        |percent: f64, seen: u64, slack: u64| Reconciled { percent: Some(percent), seen, slack, ..reconciled.clone() };
    let sum = "12,034 seen = 12,000 written + 34 filtered + 0 lost";
    assert_eq!(shown(books.clone()), format!("saw 100.0 % of closes in its netns; in all: {sum}"));
    // Not exact, not all, nothing to compare with, nothing to be compared.
    let said = |reconciled| shown(Ledger { reconciled, ..books.clone() });
    assert_eq!(said(Some(with(100.0, 12_034, 3))), format!("saw about 100.0 % of closes in its netns; in all: {sum}"));
    assert_eq!(said(Some(with(99.9, 12_030, 0))), format!("saw 99.9 % of closes in its netns; in all: {sum}"));
    assert_eq!(said(Some(Reconciled { percent: None, ..reconciled.clone() })), sum);
    assert_eq!(said(None), sum);
    let lost =
        Ledger { seen: 5, written: 1, filtered_kernel: 0, filtered_user: 0, lost: 3, waiting: 1, ..books.clone() };
    assert_eq!(shown(Ledger { reconciled: None, ..lost }), "5 seen = 1 written + 1 to come + 3 lost");
    let wrong = Ledger { balanced: false, reconciled: None, ..books.clone() };
    assert_eq!(shown(wrong), format!("{sum}: THIS DOES NOT ADD UP"));
    // More TIME_WAIT by the kernel's counters than was seen.
    let [seen, maybe] = [Some(5_990), Some(9)];
    let more = Reconciled { mini_sockets_seen: seen, mini_sockets_maybe: maybe, ..reconciled };
    let agree =
        |agree| Ledger { reconciled: Some(Reconciled { mini_sockets_agree: agree, ..more.clone() }), ..books.clone() };
    assert_eq!(lines(agree(None)).len(), 1);
    assert_eq!(lines(agree(Some(true))).len(), 1);
    assert_eq!(
        lines(agree(Some(false)))[1..],
        ["the kernel left 6,000 sockets in TIME_WAIT or FIN_WAIT2 there, 5,990 to 5,999 were seen"]
    );
    // Where something is lost, or does not add up, the CPUs are told apart.
    let row =
        |cpu: usize, lost: u64| LedgerRow { cpu, seen: 1_000 + lost, emitted: 990, filtered: 10, lost, untracked: 0 };
    let (two, cpus) = (vec![row(0, 0), row(3, 2)], ["CPU 0: 1,000 seen = 990 recorded + 10 filtered + 0 lost"]);
    let said = lines(Ledger { cpus: two.clone(), lost: 2, reconciled: None, ..books.clone() });
    assert_eq!(said[1..], [cpus[0], "CPU 3: 1,002 seen = 990 recorded + 10 filtered + 2 lost"]);
    assert_eq!(lines(Ledger { cpus: two, reconciled: None, ..books.clone() }).len(), 1, "nothing is lost");
    let forgotten = vec![row(0, 0), LedgerRow { filtered: 0, ..row(1, 0) }];
    let said = lines(Ledger { cpus: forgotten, balanced: false, reconciled: None, ..books.clone() });
    assert_eq!(said[1..], [cpus[0], "CPU 1: 1,000 seen = 990 recorded + 0 lost: THIS DOES NOT ADD UP"]);
    // Of very many, those that lost most.
    let many = (0..100).map(|cpu| row(cpu, 100 - cpu as u64)).collect();
    let said = lines(Ledger { cpus: many, lost: 5_050, reconciled: None, ..books });
    assert_eq!(said.len(), 1 + 16 + 1);
    assert!(said[16].starts_with("CPU 15: ") && said[17].starts_with("84 other CPUs"), "{said:#?}");
}

#[test]
fn a_socket_that_its_process_does_not_close() {
    let leak = with(server(), |record| {
        record.kind = kind::CLOSE_WAIT;
        record.first_end = first_end::REMOTE;
        record.closer = Task::NONE;
        set_states(record, &[ESTABLISHED, CLOSE_WAIT, CLOSE_WAIT]);
        record.states[2] = 0;
        record.at_ns = BEGAN + 60_100 * MS;
    });
    let events = replay(&[leak], true);
    insta::assert_snapshot!(print_text(&events), @"12:00:00 4200001/server     :8080 < 127.0.0.1:43210     remote close_wait not closed here for 60.0 s (GET /hello 200)\n");
    insta::assert_snapshot!(print_json(&events).trim_end(), @r#"{"type":"close_wait","time":"2026-01-02T12:00:00.123456789Z","cookie":4711,"netns":0,"family":"ipv4","local":"127.0.0.1:8080","remote":"127.0.0.1:43210","role":"server","process":{"pid":4200001,"comm":"server","exe":null,"uid":1000,"cgroup":null,"container":null,"source":"read"},"closed_by":"remote","closer":null,"how":null,"states":[{"state":"ESTABLISHED","at_us":0},{"state":"CLOSE_WAIT","at_us":1000}],"duration_us":60100000,"started_before":false,"idle_us":500,"rx_bytes":78,"tx_bytes":152,"protocol":"http/1.1","http":{"requests":1,"responses":1,"method":"GET","target":"/hello","target_truncated":false,"status":200,"request_version":"1.1","response_version":"1.1","request_connection":"absent","response_connection":"absent","keep_alive_timeout_s":null,"keep_alive_max":null,"answered":true},"cause":"no_reuse"}"#);
}

#[test]
fn the_summary_is_bounded_and_counts_everything() {
    let began = Instant::now();
    let mut summary = Summarizer::new(began, false, None);
    let mut close = close(&server());
    for peer in 0..20_000_u32 {
        close.remote.set_ip(IpAddr::V4(peer.into()));
        summary.close(&close);
    }
    let now = began + Duration::from_secs(1);
    let summary = summary.summary(
        About::Run,
        &Moment { time: noon(), now, missed: Missed::default(), time_wait_sockets: None, ledger: None },
    );
    assert_eq!((summary.closes, summary.time_wait), (20_000, 20_000));
    // What was given up of them is in one group without a peer.
    let listed: u64 = summary.groups.iter().map(|group| group.closes).sum();
    assert_eq!((summary.groups.len(), listed + summary.other_closes), (1_000, 20_000));
    assert!(summary.groups[0].peer.is_none() && summary.groups[0].closes > 10_000);
    check(&print_text(&[Event::Summary(Box::new(summary))]));
}

#[test]
fn styles_do_not_move_the_columns() {
    let events = replay(&every_cause().into_iter().map(|(_, record)| record).collect::<Vec<_>>(), true);
    let mut styled = Vec::new();
    let mut text = Text::new(TimeZone::UTC, true);
    for event in &events {
        text.event(event, &mut styled).expect("written");
    }
    let styled = String::from_utf8(styled).expect("UTF-8");
    assert!(styled.contains('\x1b'));
    assert_eq!(anstream::adapter::strip_str(&styled).to_string(), print_text(&events));
}

#[test]
fn other_bytes_are_refused() {
    let size = size_of::<Record>();
    assert_eq!(decode(&[]), Err(NotARecord::Size(0)));
    assert_eq!(decode(&vec![0; size + 1]), Err(NotARecord::Size(size + 1)));
    assert_eq!(decode(&vec![0; size]), Err(NotARecord::Kind(0)));
    let odd = with(server(), |r| r.old_state = 13);
    assert_eq!(decode(bytemuck::bytes_of(&odd)), Err(NotARecord::State(13)));
}

#[test]
fn a_request_that_has_only_begun_is_not_answered_by_the_one_before() {
    // One exchange, then the start line of a second request, then the end. Heads are counted when they are whole.
    let begun = with(server(), |r| {
        r.http.request_connection = 0;
        r.http.response_version = 0;
    });
    let close = close(&begun);
    assert_eq!(close.cause, Cause::Unanswered);
    assert!(close.http.is_some_and(|http| !http.answered && http.status.is_none()));
}

/// What holds for all text.
fn check(text: &str) {
    for line in text.lines() {
        assert!(line.width() <= 120, "{} columns: {line}", line.width());
        assert!(!line.chars().any(|c| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}')), "{line:?}");
    }
    assert!(text.ends_with('\n'));
}

/// Any bytes that are near enough to a record to be taken for one.
fn any_record() -> impl Strategy<Value = Record> {
    (
        proptest::collection::vec(any::<u8>(), size_of::<Record>()),
        1_u8..=2,
        1_u8..=12,
        1_u8..=12,
        any::<[(bool, u8); STATES]>(),
    )
        .prop_map(|(bytes, kind, old, new, states)| {
            let mut record: Record = bytemuck::pod_read_unaligned(&bytes);
            (record.kind, record.old_state, record.new_state) = (kind, old, new);
            for (word, (used, state)) in record.states.iter_mut().zip(states) {
                *word = if used { *word & !15 | u64::from(state % 12 + 1) } else { 0 };
            }
            // Likely enough to reach the rules for HTTP, and names and flags of all kinds.
            record.http.protocol %= 8;
            record.owner_source %= 5;
            record.family = if record.family & 1 == 0 { 4 } else { 6 };
            record.sk_err %= 128;
            // Random processes and namespaces must not be looked for on this host.
            record.owner.tgid |= 1 << 23;
            record.closer.tgid |= 1 << 23;
            record.netns = u32::MAX;
            record
        })
}

/// With each close so often that there is advice.
fn summary_of(events: &[Event]) -> Event {
    let began = Instant::now();
    let mut summary = Summarizer::new(began, false, None);
    for event in events {
        if let Event::Close(close) = event {
            (0..20).for_each(|_| summary.close(close));
        }
    }
    let now = began + Duration::from_secs(10);
    let moment = Moment { time: noon(), now, missed: Missed::default(), time_wait_sockets: None, ledger: None };
    Event::Summary(Box::new(summary.summary(About::Recent, &moment)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_decode_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2 * size_of::<Record>())) {
        let _ = decode(&bytes);
    }

    #[test]
    fn no_bytes_of_the_right_size_make_decode_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), size_of::<Record>()), kind in 0_u8..5
    ) {
        bytes[std::mem::offset_of!(Record, kind)] = kind;
        let _ = decode(&bytes);
    }

    /// Filters are refused that no connection can pass: so none may be refused that one has passed.
    #[test]
    fn how_any_record_ended_can_be_asked_for(record in any_record()) {
        for event in replay(&[record], false) {
            let (Event::Close(close) | Event::CloseWait(close)) = event else { continue };
            let args = filter::Args {
                cause: vec![close.cause],
                closed_by: vec![close.closed_by],
                fate: close.fate.into_iter().collect(),
                ..filter::Args::default()
            };
            let filter = args.on_record();
            prop_assert!(filter.is_ok(), "{:?}", filter);
        }
    }

    #[test]
    fn any_record_prints_lines_that_fit(record in any_record()) {
        let mut events = replay(&[record], true);
        prop_assert!(!events.is_empty());
        events.push(summary_of(&events));
        check(&print_text(&events));
        let json = print_json(&events);
        prop_assert!(!json.chars().any(|c| c.is_control() && c != '\n'));
        for line in json.lines() {
            prop_assert!(serde_json::from_str::<serde_json::Value>(line).is_ok());
        }
    }
}

/// `close` with unread data ends the socket first and sends the RST then: two records, one connection.
#[test]
fn a_reset_that_follows_the_end_belongs_to_it() {
    let ends = [
        (FIN_WAIT2, first_end::LOCAL, flag::FIN_SENT | flag::IN_PROCESS),
        (FIN_WAIT1, first_end::LOCAL, flag::FIN_SENT),
        (LAST_ACK, first_end::REMOTE, flag::FIN_SENT | flag::FIN_RECEIVED | flag::IN_PROCESS),
        (CLOSING, first_end::BOTH, flag::FIN_SENT | flag::FIN_RECEIVED | flag::IN_PROCESS),
    ];
    for (old, first, flags) in ends {
        let end = with(server(), |r| (r.old_state, r.first_end, r.flags) = (old, first, flags));
        let reset = with(end, |r| r.kind = kind::RESET_AFTER_CLOSE);
        let other = with(reset, |r| r.cookie += 1);
        let of = |records: &[Record]| match replay(records, false).pop() {
            Some(Event::Close(close)) => (close.how, close.fate.expect("it has ended"), close.cause),
            other => panic!("{other:?} is no close"),
        };
        assert_eq!(of(&[end, reset]), (Some(How::Rst), Final::Reset, Cause::ResetByLocal), "{old}");
        assert_ne!(of(&[end, other]).1, Final::Reset, "another socket's reset: {old}");
        assert_ne!(of(&[end]).1, Final::TimeWait, "{old}");
    }
}

/// Where the hook on it is missing, what only that reset could tell is not told.
#[test]
fn a_reset_that_may_have_followed_the_end_unseen() {
    let blind = Blind { send_reset: true, ..Blind::default() };
    let of = |record: Record| match replay_blind(&[record], false, blind).pop() {
        Some(Event::Close(close)) => (close.closed_by, close.how, close.fate.expect("it has ended"), close.cause),
        other => panic!("{other:?} is no close"),
    };
    let ends = [
        (FIN_WAIT2, first_end::LOCAL, flag::FIN_SENT | flag::IN_PROCESS, ClosedBy::Local),
        (FIN_WAIT1, first_end::NONE, 0, ClosedBy::Unobserved),
        (LAST_ACK, first_end::REMOTE, flag::FIN_SENT | flag::FIN_RECEIVED | flag::IN_PROCESS, ClosedBy::Remote),
        (CLOSING, first_end::BOTH, flag::FIN_SENT | flag::FIN_RECEIVED | flag::IN_PROCESS, ClosedBy::Both),
    ];
    for (old, first, flags, closed_by) in ends {
        let end = with(server(), |r| (r.old_state, r.first_end, r.flags) = (old, first, flags));
        assert_eq!(of(end), (closed_by, Some(How::Unobserved), Final::Unknown, Cause::Unknown), "{old}");
    }
    // Where none can follow, all is as ever.
    assert_eq!(of(server()), (ClosedBy::Local, Some(How::Fin), Final::TimeWait, Cause::NoReuse));
}
