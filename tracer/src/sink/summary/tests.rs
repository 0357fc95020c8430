//! Closes as traffic would give them in, summaries out.

use std::net::SocketAddr;
use std::sync::Arc;

use jiff::tz::TimeZone;

use super::*;
use crate::event::{
    Advice, Alert, AlertState, Event, Family, FinalSource, How, Http, HttpVersion, Metric, Process, Protocol, Source,
};
use crate::sink::{Json, Text};

const SERVER: &str = "10.0.0.1:80";

fn noon() -> Timestamp {
    "2026-01-02T12:00:00Z".parse().expect("a date")
}

fn process(pid: u32, comm: &str) -> Process {
    let cgroup = Some("/system.slice/web.service".to_owned());
    Process { pid, comm: comm.to_owned(), exe: None, uid: 0, cgroup, container: None, source: Source::Read }
}

/// The server's end of a connection that the client asked to close, after so many requests.
fn at_server(client: &str, requests: u32) -> Close {
    let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
    Close {
        time: noon(),
        cookie: 1,
        netns: 1,
        family: Family::Ipv4,
        local: address(SERVER),
        remote: address(client),
        role: Role::Server,
        process: Some(process(4711, "server").into()),
        closed_by: ClosedBy::Local,
        closer: None,
        how: Some(How::Fin),
        fate: Some(Final::TimeWait),
        fate_source: Some(FinalSource::Fin),
        states: Vec::new(),
        duration_us: 1_500,
        started_before: false,
        idle_us: Some(100),
        rx_bytes: 1,
        tx_bytes: 1,
        protocol: Protocol::Http11,
        http: Some(Http {
            requests,
            responses: requests,
            method: None,
            target: None,
            target_truncated: false,
            status: Some(200),
            request_version: Some(HttpVersion::V11),
            response_version: Some(HttpVersion::V11),
            request_connection: None,
            response_connection: None,
            keep_alive_timeout_s: None,
            keep_alive_max: None,
            answered: true,
        }),
        cause: Cause::RequestClose,
    }
}

/// The other end.
fn at_client(end: &Close, pid: u32, comm: &str) -> Close {
    Close {
        local: end.remote,
        remote: end.local,
        role: Role::Client,
        process: Some(process(pid, comm).into()),
        closed_by: match end.closed_by {
            ClosedBy::Local => ClosedBy::Remote,
            ClosedBy::Remote => ClosedBy::Local,
            other => other,
        },
        fate: Some(if end.fate == Some(Final::TimeWait) { Final::Closed } else { Final::TimeWait }),
        ..end.clone()
    }
}

/// A run of so many seconds.
struct Scene {
    began: Instant,
    summarizer: Summarizer,
    port: u16,
}

impl Scene {
    fn new(every: bool) -> Self {
        let began = Instant::now();
        Self { began, summarizer: Summarizer::new(began, every, Some(131_072)), port: 10_000 }
    }

    /// A client's address with a port that no other connection has.
    fn client(&mut self, address: &str) -> String {
        self.port += 1;
        format!("{address}:{}", self.port)
    }

    fn summary(&mut self, about: About, second: u64) -> Summary {
        let now = self.began + Duration::from_secs(second);
        let missed = Missed::default();
        self.summarizer.pass(now);
        self.summarizer
            .summary(about, &Moment { time: noon(), now, missed, time_wait_sockets: Some(304), ledger: None })
    }

    /// One client asks to close each time; the other makes ten requests on each connection, until the server has enough.
    fn two_clients(&mut self, both_ends: bool) {
        for at in 0..1_500 {
            let guilty = at_server(&self.client("10.22.34.48"), 1);
            self.ends(&guilty, both_ends, 100, "guilty");
            if at % 10 == 0 {
                let kept = Close { cause: Cause::ResponseClose, ..at_server(&self.client("10.22.34.49"), 10) };
                self.ends(&kept, both_ends, 200, "kept");
            }
        }
    }

    fn ends(&mut self, end: &Close, both: bool, pid: u32, comm: &str) {
        self.summarizer.close(end);
        if both {
            self.summarizer.close(&at_client(end, pid, comm));
        }
    }
}

fn text(summary: Summary) -> String {
    print(&[Event::Summary(Box::new(summary))], false)
}

fn print(events: &[Event], styled: bool) -> String {
    let mut out = Vec::new();
    let mut text = Text::new(TimeZone::UTC, styled);
    for event in events {
        text.event(event, &mut out).expect("written");
    }
    String::from_utf8(out).expect("UTF-8")
}

fn near(one: Option<f64>, other: f64) -> bool {
    one.is_some_and(|one| (one - other).abs() < 1e-6)
}

fn sentences(summary: &Summary) -> Vec<&str> {
    summary.advice.iter().map(|advice| &advice.text[..]).collect()
}

#[test]
fn the_client_that_asks_to_close_is_named_with_what_would_be_left() {
    let mut scene = Scene::new(false);
    scene.two_clients(false);
    let summary = scene.summary(About::Run, 60);
    let Advice { address, closes, of_closes, time_wait_expected, time_wait_after, reuse, .. } = &summary.advice[0];
    assert_eq!(address.map(|address| address.to_string()).as_deref(), Some("10.22.34.48"));
    assert_eq!((*closes, *of_closes), (1_500, 1_650));
    // 27.5 a second now; 2.5 by the others, and as many by the same requests at ten per connection.
    assert!(near(Some(*time_wait_expected), 1_650.0));
    assert!(near(*time_wait_after, 300.0) && near(*reuse, 10.0));
    insta::assert_snapshot!(text(summary), @"
    12:00:00 1650 closed in 60.0 s (27.5/s), 1650 of them left TIME_WAIT (27.5/s), 0 lost
      1,500 of 1,650 closes: client 10.22.34.48 (or a proxy there) sends Connection: close (1 request per connection). Turn
        keep-alive on in that client; on this host TIME_WAIT would fall from about 1,700 to about 300, at 10 requests per
        connection as others have.
      150 of 1,650 closes: server 4711/server (:80) answers with Connection: close (10 requests per connection). Raise its
        limit of requests per connection.
      CLOSES      /S TIME_WAIT PROCESS            CLOSED CAUSE          PEER                     REQUESTS  LIFETIME
        1500    25.0      1500 4711/server        local  request_close  :80 < 10.22.34.48        1/1       1 ms/1 ms
         150     2.5       150 4711/server        local  response_close :80 < 10.22.34.49        10/10     1 ms/1 ms
    ");
}

#[test]
fn as_json() {
    let mut scene = Scene::new(false);
    for _ in 0..20 {
        let end = at_server(&scene.client("10.22.34.48"), 1);
        scene.summarizer.close(&end);
    }
    let summary = scene.summary(About::Run, 10);
    let mut out = Vec::new();
    Json::default().event(&Event::Summary(Box::new(summary)), &mut out).expect("written");
    insta::assert_snapshot!(String::from_utf8(out).expect("UTF-8").trim_end(), @r#"{"type":"summary","time":"2026-01-02T12:00:00Z","final":true,"duration_s":10.0,"closes":20,"time_wait":20,"close_wait":0,"lost":0,"untracked":0,"window_s":10.0,"window_closes":20,"window_time_wait":20,"window_connections":20,"closes_per_s":2.0,"time_wait_per_s":2.0,"time_wait_sockets":304,"advice":[{"cause":"request_close","at_fault":"client","comm":null,"pids":[],"more_pids":false,"address":"10.22.34.48","port":80,"closes":20,"of_closes":20,"requests_p50":1,"requests_mean":1.0,"time_wait_per_s":2.0,"time_wait_expected":120.0,"time_wait_after":0.0,"reuse":null,"text":"20 of 20 closes: client 10.22.34.48 (or a proxy there) sends Connection: close (1 request per connection). Turn keep-alive on in that client; on this host TIME_WAIT would fall from about 120 to about 0 if its connections stay open."}],"groups":[{"comm":"server","pid":4711,"pids":[4711],"more_pids":false,"cgroup":"/system.slice/web.service","role":"server","closed_by":"local","cause":"request_close","at_fault":"client","peer":"10.22.34.48","port":80,"closes":20,"time_wait":20,"window_closes":20,"window_time_wait":20,"both_ends":0,"closes_per_s":2.0,"time_wait_per_s":2.0,"requests_p50":1,"requests_p95":1,"lifetime_p50_us":1471,"lifetime_p95_us":1471}],"other_closes":0,"ledger":null}"#);
}

/// One connection, two records: it counts once, and only the end that can change something is named.
#[test]
fn both_ends_on_one_host_count_once() {
    let mut scene = Scene::new(false);
    scene.two_clients(true);
    let summary = scene.summary(About::Run, 60);
    assert_eq!((summary.closes, summary.window_connections), (3_300, 1_650));
    insta::assert_snapshot!(sentences(&summary).join("\n"), @"
    1,500 of 1,650 closes: client 100/guilty sends Connection: close (1 request per connection). Turn keep-alive on in that client; on this host TIME_WAIT would fall from about 1,700 to about 300, at 10 requests per connection as others have.
    150 of 1,650 closes: server 4711/server (:80) answers with Connection: close (10 requests per connection). Raise its limit of requests per connection.
    ");
    let advice = &summary.advice[0];
    assert_eq!((advice.closes, advice.of_closes, &advice.pids[..]), (1_500, 1_650, &[100][..]));
    assert!(near(Some(advice.time_wait_expected), 1_650.0) && near(advice.time_wait_after, 300.0));
}

/// The passive end's record may come first, too.
#[test]
fn the_order_of_the_ends_does_not_matter() {
    let (mut one, mut other) = (Scene::new(false), Scene::new(false));
    for _ in 0..20 {
        let end = at_server(&one.client("10.0.0.9"), 1);
        let opposite = at_client(&end, 7, "curl");
        [&end, &opposite].into_iter().for_each(|close| one.summarizer.close(close));
        [&opposite, &end].into_iter().for_each(|close| other.summarizer.close(close));
    }
    let (one, other) = (one.summary(About::Run, 9), other.summary(About::Run, 9));
    assert_eq!(one.advice, other.advice);
    assert_eq!(one.groups, other.groups);
    assert_eq!(one.advice.len(), 1);
}

/// Workers of one server, and a command that is started for each request, are one group each.
#[test]
fn many_process_ids_are_one_program() {
    let mut scene = Scene::new(false);
    for at in 0..1_000 {
        let mut end = at_server(&scene.client("10.0.0.9"), 1);
        end.process = Some(process(4_000 + at % 4, "nginx").into());
        scene.ends(&end, true, 10_000 + at, "curl");
    }
    let summary = scene.summary(About::Run, 10);
    let groups: Vec<_> =
        summary.groups.iter().map(|group| (group.comm.as_deref(), group.pids.len(), group.more_pids)).collect();
    assert_eq!(groups, [(Some("nginx"), 4, false), (Some("curl"), 8, true)]);
    assert_eq!(summary.groups[0].pid, None);
    assert!(
        summary.advice[0].text.contains("client 8+ pids/curl sends Connection: close"),
        "{}",
        summary.advice[0].text
    );
    // The same name in another cgroup is another program.
    let mut end = at_server(&scene.client("10.0.0.9"), 1);
    Arc::make_mut(end.process.as_mut().expect("it has one")).cgroup = Some("/system.slice/other.service".to_owned());
    scene.summarizer.close(&end);
    assert_eq!(scene.summary(About::Run, 11).groups.len(), 3);
}

#[test]
fn a_frequent_process_id_is_not_lost_among_many() {
    let mut pids = Pids::default();
    for pid in 1..=1_000 {
        pids.add(pid, 1);
        if pid > 500 {
            pids.add(77_777, 1);
        }
    }
    assert!(pids.more && pids.list().contains(&77_777));
}

/// With `--every`: each is about what came since the one before, the last one about all.
#[test]
fn summaries_in_between() {
    let mut scene = Scene::new(true);
    let add = |scene: &mut Scene, address: &str, count| {
        for _ in 0..count {
            let end = at_server(&scene.client(address), 1);
            scene.summarizer.close(&end);
        }
    };
    add(&mut scene, "10.0.0.8", 100);
    let first = scene.summary(About::SinceLast, 10);
    assert_eq!((first.closes, first.window_closes, first.last), (100, 100, false));
    add(&mut scene, "10.0.0.9", 20);
    // One in between takes nothing away.
    assert_eq!(scene.summary(About::Recent, 15).window_closes, 120);
    let second = scene.summary(About::SinceLast, 20);
    assert_eq!((second.closes, second.window_closes), (120, 20));
    assert!(near(Some(second.window_s), 10.0) && near(Some(second.closes_per_s), 2.0));
    insta::assert_snapshot!(text(second), @"
    12:00:00 20 closed in the last 10.0 s (2.0/s), 20 of them left TIME_WAIT (2.0/s), 0 lost
             120 closed since the start, 120 left TIME_WAIT; 304 sockets are in TIME_WAIT now, whoever made them
      20 of 20 closes: client 10.0.0.9 (or a proxy there) sends Connection: close (1 request per connection). Turn
        keep-alive on in that client; on this host TIME_WAIT would fall from about 120 to about 0 if its connections stay
        open.
      CLOSES      /S TIME_WAIT PROCESS            CLOSED CAUSE          PEER                     REQUESTS  LIFETIME
          20     2.0        20 4711/server        local  request_close  :80 < 10.0.0.9           1/1       1 ms/1 ms
    ");
    let last = scene.summary(About::Run, 30);
    assert_eq!((last.window_closes, last.groups.len(), last.last), (120, 2, true));
    assert_eq!(last.groups[0].requests_p50, Some(1));
    assert!(near(Some(last.closes_per_s), 4.0));
}

/// Without `--every`: the last 30 to 60 seconds, however long it has run.
#[test]
fn the_recent_window_follows_by_itself() {
    let mut scene = Scene::new(false);
    for second in 0..200 {
        let end = at_server(&scene.client("10.0.0.9"), 1);
        scene.summarizer.close(&end);
        let summary = scene.summary(About::Recent, second);
        assert!(summary.window_s <= 60.0 && summary.window_s >= (second as f64).min(30.0), "{}", summary.window_s);
        assert!(summary.window_closes.abs_diff(second.min(60)) <= 31);
    }
    assert_eq!(scene.summary(About::Run, 200).window_closes, 200);
}

/// A client that asks at a low rate would time out in between: keep-alive alone does not mend it.
#[test]
fn no_number_where_none_follows() {
    let slow = |seconds| {
        let mut scene = Scene::new(false);
        for _ in 0..20 {
            let end = at_server(&scene.client("10.0.0.9"), 1);
            scene.summarizer.close(&end);
        }
        scene.summary(About::Run, seconds).advice.remove(0).time_wait_after
    };
    assert!(near(slow(99), 0.0));
    assert_eq!(slow(101), None);
}

#[test]
fn no_advice_on_thin_evidence() {
    let advice = |guilty, others| {
        let mut scene = Scene::new(false);
        for at in 0..guilty + others {
            let mut end = at_server(&scene.client("10.0.0.9"), 1);
            if at >= guilty {
                end.cause = Cause::NotHttp;
            }
            scene.summarizer.close(&end);
        }
        scene.summary(About::Run, 10).advice.len()
    };
    assert_eq!((advice(9, 0), advice(10, 0)), (0, 1));
    assert_eq!((advice(10, 190), advice(10, 191)), (1, 0));
}

/// Each cause, from the side that has something to change, and from the other.
#[test]
fn every_advice() {
    let mut lines = Vec::new();
    let http10 = |end: &mut Close, request, response| {
        let http = end.http.as_mut().expect("it has");
        (http.request_version, http.response_version) = (Some(request), Some(response));
    };
    type Case = (&'static str, fn(&mut Close));
    let cases: [Case; 12] = [
        ("1.1", |end| end.cause = Cause::RequestClose),
        ("1.1", |end| end.cause = Cause::ResponseClose),
        ("1.1", |end| {
            end.cause = Cause::ResponseClose;
            end.http.as_mut().expect("it has").requests = 50;
        }),
        ("1.0", |end| end.cause = Cause::Http10),
        // The server has no other choice.
        ("1.0", |end| end.cause = Cause::ResponseClose),
        ("1.1", |end| {
            end.cause = Cause::Http10;
            end.http.as_mut().expect("it has").response_version = Some(HttpVersion::V10);
        }),
        ("1.1", |end| end.cause = Cause::IdleTimeout),
        ("1.1", |end| {
            (end.cause, end.closed_by, end.fate) = (Cause::IdleTimeout, ClosedBy::Remote, Some(Final::Closed))
        }),
        ("1.1", |end| end.cause = Cause::NoReuse),
        ("1.1", |end| (end.cause, end.closed_by, end.fate) = (Cause::NoReuse, ClosedBy::Remote, Some(Final::Closed))),
        ("1.1", |end| {
            end.http = None;
            (end.cause, end.closed_by, end.fate) = (Cause::Unused, ClosedBy::Remote, Some(Final::Closed));
        }),
        // Nobody can change something, or it is not known who could.
        ("1.1", |end| {
            end.cause = Cause::ResponseClose;
            end.http.as_mut().expect("it has").status = Some(503);
        }),
    ];
    for (version, change) in cases {
        for client_side in [false, true] {
            let mut scene = Scene::new(false);
            for _ in 0..600 {
                let mut end = at_server(&scene.client("10.22.34.48"), 1);
                if version == "1.0" {
                    http10(&mut end, HttpVersion::V10, HttpVersion::V10);
                }
                change(&mut end);
                scene.summarizer.close(&if client_side { at_client(&end, 100, "client") } else { end });
            }
            let summary = scene.summary(About::Run, 60);
            assert!(summary.advice.len() <= 1);
            lines.extend(summary.advice.into_iter().map(|advice| advice.text));
        }
    }
    insta::assert_snapshot!(lines.join("\n"), @"
    600 of 600 closes: client 10.22.34.48 (or a proxy there) sends Connection: close (1 request per connection). Turn keep-alive on in that client; on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: client 100/client sends Connection: close (1 request per connection). Turn keep-alive on in that client; none of them left TIME_WAIT on this host.
    600 of 600 closes: server 4711/server (:80) answers with Connection: close (1 request per connection). Turn keep-alive on in that server; on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: server 10.0.0.1:80 (or a proxy there) answers with Connection: close (1 request per connection). Turn keep-alive on in that server; none of them left TIME_WAIT on this host.
    600 of 600 closes: server 4711/server (:80) answers with Connection: close (50 requests per connection). Raise its limit of requests per connection.
    600 of 600 closes: server 10.0.0.1:80 (or a proxy there) answers with Connection: close (50 requests per connection). Raise its limit of requests per connection; none of them left TIME_WAIT on this host.
    600 of 600 closes: client 10.22.34.48 (or a proxy there) speaks HTTP/1.0 without keep-alive (1 request per connection). Let it speak HTTP/1.1 (nginx as a proxy: proxy_http_version 1.1); on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: client 100/client speaks HTTP/1.0 without keep-alive (1 request per connection). Let it speak HTTP/1.1 (nginx as a proxy: proxy_http_version 1.1); none of them left TIME_WAIT on this host.
    600 of 600 closes: client 10.22.34.48 (or a proxy there) speaks HTTP/1.0 without keep-alive (1 request per connection). Let it speak HTTP/1.1 (nginx as a proxy: proxy_http_version 1.1); on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: client 100/client speaks HTTP/1.0 without keep-alive (1 request per connection). Let it speak HTTP/1.1 (nginx as a proxy: proxy_http_version 1.1); none of them left TIME_WAIT on this host.
    600 of 600 closes: server 4711/server (:80) answers in HTTP/1.0 without keep-alive (1 request per connection). Let it answer in HTTP/1.1; on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: server 10.0.0.1:80 (or a proxy there) answers in HTTP/1.0 without keep-alive (1 request per connection). Let it answer in HTTP/1.1; none of them left TIME_WAIT on this host.
    600 of 600 closes: server 4711/server (:80) closes connections that were idle (1 request per connection). Raise its keep-alive time-out; or make that of its clients the shorter one, so that they close first.
    600 of 600 closes: server 10.0.0.1:80 (or a proxy there) closes connections that were idle (1 request per connection). Raise its keep-alive time-out; or make that of its clients the shorter one, so that they close first; none of them left TIME_WAIT on this host.
    600 of 600 closes: client 10.22.34.48 (or a proxy there) closes connections that were idle (1 request per connection). Let it keep more of them, or for longer; none of them left TIME_WAIT on this host.
    600 of 600 closes: client 100/client closes connections that were idle (1 request per connection). Let it keep more of them, or for longer.
    600 of 600 closes: server 4711/server (:80) closes after the response, though nobody asked (1 request per connection). Turn keep-alive on in that server; on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: server 10.0.0.1:80 (or a proxy there) closes after the response, though nobody asked (1 request per connection). Turn keep-alive on in that server; none of them left TIME_WAIT on this host.
    600 of 600 closes: client 10.22.34.48 (or a proxy there) closes after the response, though nobody asked (1 request per connection). Use one client with a pool of connections in it; none of them left TIME_WAIT on this host.
    600 of 600 closes: client 100/client closes after the response, though nobody asked (1 request per connection). Use one client with a pool of connections in it; on this host TIME_WAIT would fall from about 600 to about 0 if its connections stay open.
    600 of 600 closes: client 10.22.34.48 (or a proxy there) opens connections and sends nothing. Health check, port scan, or a pool that opens too much: let it ask less often; none of them left TIME_WAIT on this host.
    600 of 600 closes: client 100/client opens connections and sends nothing. Health check, port scan, or a pool that opens too much: let it ask less often; on this host TIME_WAIT would fall from about 600 to about 0.
    ");
}

/// An exit that closes the connection is no fault that the client's record tells of; the server's does.
#[test]
fn one_end_that_knows_is_enough_and_two_that_differ_are_not() {
    let both = |server: Cause, client: Cause| {
        let mut scene = Scene::new(false);
        for _ in 0..20 {
            let mut end = at_server(&scene.client("10.0.0.9"), 1);
            (end.cause, end.closed_by, end.fate) = (server, ClosedBy::Remote, Some(Final::Closed));
            scene.summarizer.close(&end);
            scene.summarizer.close(&Close { cause: client, ..at_client(&end, 100, "client") });
        }
        scene
            .summary(About::Run, 10)
            .advice
            .into_iter()
            .map(|advice| (advice.cause, advice.address.is_some()))
            .collect::<Vec<_>>()
    };
    assert_eq!(both(Cause::NoReuse, Cause::ProcessExit), [(Cause::NoReuse, true)]);
    assert_eq!(both(Cause::NoReuse, Cause::NoReuse), [(Cause::NoReuse, false)]);
    assert_eq!(both(Cause::ResponseClose, Cause::RequestClose), []);
}

/// Of the clients at one address some are processes of this host, some are not (such as containers behind its address).
#[test]
fn what_is_matched_in_part_is_shared_out() {
    let mut scene = Scene::new(false);
    for at in 0..100 {
        let end = at_server(&scene.client("10.0.0.9"), 1);
        scene.ends(&end, at % 10 < 3, 100, "client");
    }
    let summary = scene.summary(About::Run, 10);
    let found: Vec<_> = summary.advice.iter().map(|of| (of.address.is_some(), of.closes, of.time_wait_per_s)).collect();
    assert_eq!(found, [(true, 70, 7.0), (false, 30, 3.0)]);
    assert!(summary.advice.iter().all(|advice| advice.of_closes == 100));
}

#[test]
fn a_late_culprit_finds_room_among_too_many_groups() {
    let mut scene = Scene::new(false);
    for peer in 0..10_000_u32 {
        let mut end = at_server("10.0.0.9:1000", 1);
        end.remote.set_ip(IpAddr::V4(peer.into()));
        scene.summarizer.close(&end);
        assert!(scene.summarizer.groups.len() <= COUNTED);
    }
    for _ in 0..500 {
        let end = at_server(&scene.client("10.22.34.48"), 1);
        scene.summarizer.close(&end);
    }
    let summary = scene.summary(About::Run, 60);
    // Behind those of no longer known peers.
    assert_eq!((summary.groups[0].peer, summary.groups[0].closes > 8_000), (None, true));
    assert_eq!((summary.closes, summary.groups[1].closes), (10_500, 500));
    assert_eq!(summary.groups.iter().map(|group| group.closes).sum::<u64>() + summary.other_closes, 10_500);
}

#[test]
fn an_end_at_fault_whose_process_is_not_known_is_an_address() {
    let mut scene = Scene::new(false);
    for _ in 0..600 {
        let server = at_server(&scene.client("10.22.34.48"), 1);
        let client = Close { process: None, ..at_client(&server, 100, "unseen") };
        scene.summarizer.close(&client);
        scene.summarizer.close(&server);
    }
    let summary = scene.summary(About::Run, 60);
    let [advice] = &summary.advice[..] else { panic!("{:#?}", summary.advice) };
    assert_eq!((advice.closes, advice.of_closes, advice.comm.as_deref()), (600, 600, None));
    assert_eq!(advice.address, Some("10.22.34.48".parse().expect("an address")));
}

#[test]
fn a_server_at_fault_is_named_however_many_clients_it_has() {
    let mut scene = Scene::new(false);
    for peer in 0..20_000_u32 {
        let mut end = Close { cause: Cause::ResponseClose, ..at_server("10.0.0.9:1000", 1) };
        end.remote.set_ip(IpAddr::V4(peer.into()));
        scene.summarizer.close(&end);
    }
    let summary = scene.summary(About::Run, 60);
    let [advice] = &summary.advice[..] else { panic!("{:#?}", summary.advice) };
    assert_eq!((advice.cause, advice.at_fault), (Cause::ResponseClose, Role::Server));
    assert_eq!((advice.closes, advice.of_closes), (20_000, 20_000));
    assert!(text(summary).contains(":80 < many"));
}

/// Found by the borrowed key, or there would be a group for each close.
#[test]
fn both_forms_of_a_key_are_one() {
    use std::hash::BuildHasher as _;
    let hasher = RandomState::default();
    let mut unknown = at_server("10.0.0.9:1000", 1);
    (unknown.process, unknown.role) = (None, Role::Unknown);
    let mut nowhere = at_server("10.0.0.9:1000", 1);
    Arc::make_mut(nowhere.process.as_mut().expect("it has one")).cgroup = None;
    for close in [at_server("[::1]:1000", 1), unknown, nowhere] {
        let of = KeyOf::new(&close);
        let key = of.to_key();
        assert_eq!(hasher.hash_one(&of), hasher.hash_one(&key));
        assert!(of.equivalent(&key));
    }
}

#[test]
fn names_cannot_break_a_line() {
    let mut scene = Scene::new(false);
    for _ in 0..20 {
        let end = at_server(&scene.client("10.0.0.9"), 1);
        scene.ends(&end, true, 5, "\x1b[2J\n\u{202e} \u{9b}x");
    }
    let text = text(scene.summary(About::Run, 10));
    assert!(text.chars().all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}')), "{text:?}");
    assert!(text.contains(r"5/\x1b[2J\x0a\u{202e} \x9bx sends"), "{text}");
}

/// Raised and over, of either kind, and what a terminal is given for it.
#[test]
fn alerts() {
    let mut scene = Scene::new(false);
    for _ in 0..320 {
        let end = at_server(&scene.client("10.22.34.48"), 1);
        scene.summarizer.close(&end);
    }
    let advice = scene.summary(About::Recent, 10).advice.pop();
    let alert = |metric, state, value, limit, advice| {
        let (time_wait_sockets, time_wait_per_s) = (Some(312), 32.0);
        let alert = Alert { time: noon(), state, metric, value, limit, time_wait_sockets, time_wait_per_s, advice };
        Event::Alert(Box::new(alert))
    };
    let events = [
        alert(Metric::TimeWait, AlertState::Raised, 312.0, 300.0, advice.clone()),
        alert(Metric::TimeWait, AlertState::Cleared, 120.0, 300.0, None),
        alert(Metric::Rate, AlertState::Raised, 32.0, 2.5, None),
        alert(Metric::Rate, AlertState::Cleared, 0.4, 2.5, None),
    ];
    let plain = print(&events, false);
    insta::assert_snapshot!(plain, @"
    12:00:00 ALERT: 312 sockets in TIME_WAIT, the limit of 300 is reached (32.0 made a second)
      320 of 320 closes: client 10.22.34.48 (or a proxy there) sends Connection: close (1 request per connection). Turn
        keep-alive on in that client; on this host TIME_WAIT would fall from about 1,900 to about 0 if its connections stay
        open.
    12:00:00 alert over: 120 sockets in TIME_WAIT, the limit of 300 is no longer near (32.0 made a second)
    12:00:00 ALERT: 32.0 TIME_WAIT made a second, the limit of 2.5 is reached (312 sockets)
    12:00:00 alert over: 0.4 TIME_WAIT made a second, the limit of 2.5 is no longer near (312 sockets)
    ");
    let styled = print(&events, true);
    assert!(styled.lines().next().is_some_and(|line| line.contains('\x1b')));
    // No style goes over the end of a line.
    assert!(styled.lines().all(|line| !line.contains('\x1b') || line.contains("\x1b[0m")), "{styled:?}");
    assert_eq!(anstream::adapter::strip_str(&styled).to_string(), plain);
    let mut out = Vec::new();
    Json::default().event(&alert(Metric::Rate, AlertState::Raised, 32.0, 2.5, None), &mut out).expect("written");
    insta::assert_snapshot!(String::from_utf8(out).expect("UTF-8").trim_end(), @r#"{"type":"alert","time":"2026-01-02T12:00:00Z","state":"raised","metric":"rate","value":32.0,"limit":2.5,"time_wait_sockets":312,"time_wait_per_s":32.0,"advice":null}"#);
}
