//! The steps of user space, one by one: what each costs for one record. `cargo bench --package tracer`; in instructions, where
//! the clock is no use: `cargo xtask bench --steps`.
//!
//! What a step makes is freed before the next run, as it is in the daemon.

use bytemuck::Zeroable as _;
use divan::{Bencher, black_box};
use jiff::tz::TimeZone;
use tracer::connection::Connections;
use tracer::decode::{Fact, Socket, decode};
use tracer::event::{Event, Role};
use tracer::process::Processes;
use tracer::sink::summary::Summarizer;
use tracer::sink::{Json, Sink, Text};
use tracer::time_wait::SockDiag;
use tracer::verdict;
use tracer_ebpf::head::{bit, protocol, token};
use tracer_ebpf::{Record, Task, first_end, flag, kind, pack_state, role, source};

fn main() {
    divan::main();
}

const MS: u64 = 1_000_000;

/// The server's end of a connection whose client asked to close; its TIME_WAIT is certain.
fn record() -> Record {
    let mut record = Record::zeroed();
    record.kind = kind::CLOSE;
    record.cookie = 4711;
    (record.established_ns, record.payload_ns, record.end_ns, record.at_ns) = (5 * MS, 6 * MS, 7 * MS, 8 * MS);
    (record.rx_bytes, record.tx_bytes) = (78, 152);
    // Beyond what the kernel gives out: `/proc` knows nothing of it.
    let process = Task { start_ns: 77 * MS, tgid: 4_200_001, uid: 33, comm: *b"nginx\0\0\0\0\0\0\0\0\0\0\0" };
    (record.owner, record.closer) = (process, process);
    record.owner_source = source::READ;
    record.role = role::SERVER;
    record.first_end = first_end::LOCAL;
    record.flags = flag::FIN_SENT | flag::FIN_RECEIVED | flag::ALL_ACKNOWLEDGED;
    record.family = 4;
    record.local[..4].copy_from_slice(&[10, 0, 0, 7]);
    record.remote[..4].copy_from_slice(&[10, 0, 0, 9]);
    (record.local_port, record.remote_port) = (8080, 43210);
    // ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE
    for (at, state) in [1, 4, 5, 7].into_iter().enumerate() {
        record.states[at] = pack_state(state, (5 + at as u64) * MS);
    }
    (record.old_state, record.new_state) = (5, 7);
    let http = &mut record.http;
    (http.requests, http.responses, http.status) = (1, 1, 200);
    (http.request_version, http.response_version) = (11, 11);
    (http.request_connection, http.response_connection) =
        (token::COMPLETE | token::CLOSE, token::COMPLETE | token::CLOSE);
    http.protocol = protocol::HTTP1;
    http.flags = bit::REQUESTS_IN;
    (http.method_len, http.target_len) = (3, 12);
    http.method[..3].copy_from_slice(b"GET");
    http.target[..12].copy_from_slice(b"/api/v1/user");
    record
}

fn socket() -> Box<Socket> {
    match decode(bytemuck::bytes_of(&record())) {
        Ok(Fact::Ended(socket)) => socket,
        other => panic!("{other:?}"),
    }
}

fn connections() -> Connections {
    Connections::new(Processes::new(), SockDiag::new().expect("/proc"), false)
}

fn event() -> Event {
    let mut events = Vec::new();
    connections().fact(Fact::Ended(socket()), std::time::Instant::now(), &mut events);
    events.pop().expect("its end is certain")
}

#[divan::bench]
fn decoding(bencher: Bencher<'_, '_>) {
    let record = record();
    bencher.bench_local(|| drop(black_box(decode(black_box(bytemuck::bytes_of(&record))))));
}

#[divan::bench]
fn verdicts(bencher: Bencher<'_, '_>) {
    let socket = socket();
    bencher.bench_local(|| {
        let ending = verdict::ending(black_box(&socket));
        verdict::cause(black_box(&socket), &ending)
    });
}

/// From the bytes to the event, without a question to the kernel: decoding, dates, process, verdict.
#[divan::bench]
fn joining(bencher: Bencher<'_, '_>) {
    let (mut connections, now) = (connections(), std::time::Instant::now());
    let record = record();
    let mut events = Vec::new();
    bencher.bench_local(|| {
        events.clear();
        let fact = decode(black_box(bytemuck::bytes_of(&record))).expect("a record");
        connections.fact(fact, now, &mut events);
    });
}

fn printing(bencher: Bencher<'_, '_>, mut sink: Sink) {
    let event = event();
    let mut out = Vec::with_capacity(4096);
    bencher.bench_local(|| {
        out.clear();
        sink.event(black_box(&event), &mut out).expect("memory");
    });
}

#[divan::bench]
fn text(bencher: Bencher<'_, '_>) {
    printing(bencher, Sink::Text(Text::new(TimeZone::UTC, false)));
}

#[divan::bench]
fn json(bencher: Bencher<'_, '_>) {
    printing(bencher, Sink::Json(Json::default()));
}

/// For the summary: the two ends of one connection after the other, of a group each.
#[divan::bench]
fn counting(bencher: Bencher<'_, '_>) {
    let Event::Close(server) = event() else { panic!("it is one") };
    let mut client = server.clone();
    (client.local, client.remote, client.role) = (server.remote, server.local, Role::Client);
    let mut ends = [server, client];
    let mut summary = Summarizer::new(std::time::Instant::now(), false, None);
    let mut port = 0_u16;
    bencher.bench_local(|| {
        port = port.wrapping_add(1);
        ends[0].remote.set_port(port);
        ends[1].local.set_port(port);
        for end in &ends {
            summary.close(black_box(end));
        }
    });
}

/// All of it, from the bytes of the two ends' records to their lines, counted for the summary: what the daemon does for one
/// connection.
fn pipeline(bencher: Bencher<'_, '_>, mut sink: Sink) {
    let mut ends = [record(), record()];
    let (server, client) = ends.split_at_mut(1);
    let (server, client) = (&mut server[0], &mut client[0]);
    (client.local, client.remote) = (server.remote, server.local);
    (client.role, client.first_end) = (role::CLIENT, first_end::REMOTE);
    (client.old_state, client.closer.tgid) = (9, 0);
    client.owner = Task { tgid: 4_200_002, comm: *b"wrk\0\0\0\0\0\0\0\0\0\0\0\0\0", ..server.owner };
    client.http.flags = bit::REQUESTS_OUT;
    let (mut connections, now) = (connections(), std::time::Instant::now());
    let mut summary = Summarizer::new(now, false, None);
    let mut events = Vec::new();
    let mut lines = Vec::new();
    let mut port = 0_u16;
    bencher.bench_local(|| {
        port = port.wrapping_add(1);
        if port.is_multiple_of(512) {
            lines.clear();
        }
        (ends[0].remote_port, ends[1].local_port) = (port, port);
        (ends[1].remote_port, ends[0].local_port) = (8080, 8080);
        for end in &mut ends {
            end.cookie += 1;
            end.at_ns += 1_234;
            connections.fact(decode(bytemuck::bytes_of(end)).expect("a record"), now, &mut events);
        }
        for event in events.drain(..) {
            summary.event(&event);
            sink.event(&event, &mut lines).expect("memory");
        }
        lines.len()
    });
}

#[divan::bench]
fn pipeline_text(bencher: Bencher<'_, '_>) {
    pipeline(bencher, Sink::Text(Text::new(TimeZone::UTC, false)));
}

#[divan::bench]
fn pipeline_json(bencher: Bencher<'_, '_>) {
    pipeline(bencher, Sink::Json(Json::default()));
}
