//! Summaries, their advice, and alerts, of real traffic.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::rig::{
    Guard, Listener, Namespace, PATIENCE, Tracer, comm_of, expect, free_port, get, ok, port_of, run, tracer, wait_until,
};
use crate::script::Script;
use crate::servers::{self, Server};

/// Requests a second of each client.
const RATE: u32 = 25;
/// Requests that the server allows on a connection.
const REUSE: u32 = 10;

/// A client that makes requests at a fixed rate, each on a connection of its own or on one that it keeps for as long as the
/// server lets it. The server always closes first. `PORT`'s server; from an address of its own, under a name of its own.
const CLIENT: &str = "
NAME, ADDRESS, RATE = hear().split()
rename(NAME)

def connect_from():
    connection = socket.socket()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.bind((ADDRESS, 0))
    connection.connect(('127.0.0.1', PORT))
    return connection

def response(connection):
    head = b''
    while not head.endswith(b'\\r\\n\\r\\n'):
        byte = connection.recv(1)
        assert byte, head
        head += byte
    fields = dict(line.lower().split(b': ', 1) for line in head.split(b'\\r\\n')[1:-2])
    read(connection, int(fields[b'content-length']))
    return fields.get(b'connection') == b'close'

def run(keep, seconds):
    made, connection, begun = 0, None, time.monotonic()
    for at in range(int(float(RATE) * seconds)):
        time.sleep(max(0, begun + at / float(RATE) - time.monotonic()))
        if connection is None:
            connection, made = connect_from(), made + 1
        header = b'' if keep else b'Connection: close\\r\\n'
        connection.sendall(b'GET /index.html HTTP/1.1\\r\\nHost: test\\r\\n' + header + b'\\r\\n')
        if response(connection):
            assert connection.recv(1) == b''
            connection.close()
            connection = None
    # What is left of the second, so that both clients end together.
    time.sleep(max(0, begun + seconds - time.monotonic()))
    return made, connection is not None

while True:
    how, seconds = hear().split()
    say(*run(how == 'keep', float(seconds)))
";

struct Client(Script);

impl Client {
    fn new(server: &Server, name: &str, address: &str) -> Self {
        let mut script = Script::start(server.port, CLIENT);
        script.tell(&format!("{name} {address} {RATE}"));
        Self(script)
    }

    fn go(&mut self, how: &str, seconds: u64) {
        self.0.tell(&format!("{how} {seconds}"));
    }

    /// Connections made, once it is done; `wait` is how long that takes.
    fn made(&self, wait: Duration) -> u64 {
        std::thread::sleep(wait);
        let said = self.0.hear();
        let (made, open) = said.split_once(' ').expect("two words");
        assert_eq!(open, "False", "the number of requests fills whole connections");
        made.parse().expect("a number")
    }
}

/// Sockets in TIME_WAIT of this server, as the kernel lists them.
fn in_time_wait(server: &Server) -> f64 {
    let filter = format!("( sport = :{} )", server.port);
    let listed = run(Command::new("ss").args(["-Htan", "state", "time-wait", &filter]));
    u32::try_from(listed.lines().count()).expect("not that many").into()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn near(one: f64, other: f64, percent: f64) -> bool {
    (one - other).abs() <= other.abs() * percent / 100.0
}

/// What the classic case came to.
struct Classic {
    /// The first advice of the summary, and how many seconds that is about.
    advice: Value,
    window: f64,
    /// Whom it was about, in truth: connections of the one that asks to close, and of both.
    guilty: u64,
    all: u64,
    /// TIME_WAIT of the server before the change.
    before: f64,
    /// After the change: made in so many seconds, or all that there are once the old ones have gone.
    after: f64,
}

/// What comes after the change.
#[derive(PartialEq)]
enum After {
    Nothing,
    /// As long as before.
    TheSame,
    /// So many seconds longer, so that all TIME_WAIT of before has gone.
    Longer(u64),
}

/// Two clients for so many seconds, one of which asks to close each time; then it keeps its connections as well.
fn classic(trace: impl FnOnce(&Server) -> Tracer, seconds: u64, change: &After) -> Classic {
    let server = servers::nginx(&format!("keepalive_requests {REUSE};"));
    let tracer = trace(&server);
    let mut guilty = Client::new(&server, "closer", "127.0.0.2");
    let mut kept = Client::new(&server, "keeper", "127.0.0.3");
    guilty.go("close", seconds);
    kept.go("keep", seconds);
    let guilty_made = guilty.made(Duration::from_secs(seconds));
    let kept_made = kept.made(Duration::ZERO);
    let closes = usize::try_from(guilty_made + kept_made).expect("not that many");
    // Of the server, whatever else is traced.
    tracer.wait_for_closes(closes, |close| close["role"] == "server");
    let before = in_time_wait(&server);
    let run = tracer.stop();
    let (advice, window) = (run.summary["advice"][0].clone(), number(&run.summary["window_s"]));

    let more = match change {
        After::Nothing => 0,
        After::TheSame => seconds,
        After::Longer(by) => seconds + by,
    };
    if more > 0 {
        guilty.go("keep", more);
        kept.go("keep", more);
        guilty.made(Duration::from_secs(more));
        kept.made(Duration::ZERO);
    }
    let since = if *change == After::TheSame { before } else { 0.0 };
    let after = in_time_wait(&server) - since;
    Classic { advice, window, guilty: guilty_made, all: guilty_made + kept_made, before, after }
}

/// Fails unless the guilty one has its share, within one percent.
fn check_share(Classic { advice, guilty, all, .. }: &Classic) {
    let ratio = |part: f64, all: f64| part / all;
    let said = ratio(number(&advice["closes"]), number(&advice["of_closes"]));
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let truth = ratio(*guilty as f64, *all as f64);
    assert!(near(said, truth, 1.0), "{said}, not {truth}: {advice:#}");
    expect(advice, &json!({ "cause": "request_close", "at_fault": "client", "requests_p50": 1 }));
}

/// With both ends in sight the process is named, and each connection counts once.
#[test]
fn the_client_without_keep_alive_is_named() {
    let case = classic(|server| Tracer::on_port(server.port), 8, &After::TheSame);
    check_share(&case);
    expect(&case.advice, &json!({ "comm": "closer", "address": null }));
    assert_eq!(case.advice["pids"].as_array().map(Vec::len), Some(1), "{:#}", case.advice);
    // What the same requests make, in however long; the minute of it all is below.
    let predicted = number(&case.advice["time_wait_after"]) / 60.0 * case.window;
    assert!(near(predicted, case.after, 10.0), "{predicted} were predicted, {} made: {:#}", case.after, case.advice);
}

/// With the server's end alone, as on another host, it is the address.
#[test]
fn a_client_elsewhere_is_named_by_its_address() {
    let case = classic(|server| Tracer::start(&["--pid", &server.pid().to_string()]), 4, &After::Nothing);
    check_share(&case);
    expect(&case.advice, &json!({ "comm": null, "address": "127.0.0.2" }));
}

/// Its clients keep their connections to it; it does not keep its own. They must not be blamed.
#[test]
fn a_proxy_is_the_client_of_what_is_behind_it() {
    let (behind, port) = (servers::go(), free_port());
    let proxy = servers::nginx(&format!(
        "server {{ listen 127.0.0.1:{port}; location / {{
           proxy_pass http://127.0.0.1:{}; proxy_http_version 1.0; proxy_set_header Connection close; }} }}",
        behind.port
    ));
    let tracer = Tracer::start(&["--port", &behind.port.to_string(), "--port", &port.to_string()]);
    let mut client = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    client.set_read_timeout(Some(*PATIENCE)).expect("a time-out can be set");
    for _ in 0..40 {
        client.write_all(get("").as_bytes()).expect("the connection is open");
        let mut response = Vec::new();
        while !response.windows(4).any(|window| window == b"\r\n\r\n") {
            let mut piece = [0; 4096];
            let n = client.read(&mut piece).expect("the proxy answers");
            assert!(n > 0, "it keeps the connection");
            response.extend_from_slice(&piece[..n]);
        }
    }
    drop((client, proxy));
    tracer.wait_for_closes(2 * 40, |close| {
        ["local", "remote"].iter().any(|end| port_of(close, end) == Some(behind.port))
    });
    let run = tracer.stop();
    let advice = run.summary["advice"].as_array().expect("a list");
    assert_eq!(advice.len(), 1, "{advice:#?}");
    expect(&advice[0], &json!({ "at_fault": "client", "comm": "nginx", "port": behind.port, "closes": 40 }));
}

/// The whole of it, at its real length: two minutes and a quarter. `cargo test -p tracer --test kernel -- --ignored
/// --nocapture classic_case_for_a_minute`
#[test]
#[ignore = "takes more than two minutes"]
fn classic_case_for_a_minute() {
    let case = classic(|server| Tracer::on_port(server.port), 60, &After::Longer(12));
    let Classic { advice, guilty, all, before, after, .. } = &case;
    println!("{}", advice["text"]);
    println!("truth: {guilty} of {all} connections; TIME_WAIT {before}, after the change {after}");
    println!("expected {}, after the change {}", advice["time_wait_expected"], advice["time_wait_after"]);
    check_share(&case);
    assert!(near(number(&advice["time_wait_after"]), *after, 10.0), "{advice:#}");
}

/// One connection of the classic case.
fn traffic(listener: &Listener) {
    let mut pair = listener.connect();
    pair.request(get("Connection: close\r\n"));
    pair.respond(ok("Connection: close\r\n"));
    pair.server_closes_first();
}

fn is_interim(event: &&Value) -> bool {
    event["type"] == "summary" && event["final"] == false
}

#[test]
fn every() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--every", "1s", "--summary-only", "--port", &listener.port.to_string()]);
    // For longer than a second, so that one summary does not have it all.
    for _ in 0..20 {
        traffic(&listener);
        std::thread::sleep(Duration::from_millis(75));
    }
    let summaries = tracer.wait_for("all closes in summaries", |events| {
        let found: Vec<Value> = events.iter().filter(is_interim).cloned().collect();
        (number(&found.last()?["closes"]) >= 40.0).then_some(found)
    });
    assert!(summaries.iter().filter(|summary| number(&summary["window_closes"]) > 0.0).count() >= 2);
    let mut closes = 0.0;
    for summary in &summaries {
        closes += number(&summary["window_closes"]);
        assert!(near(number(&summary["closes"]), closes, 0.0), "{summary:#}");
        assert!(number(&summary["window_s"]) < 10.0);
    }
    let run = tracer.stop();
    expect(&run.summary, &json!({ "final": true, "closes": 40, "window_closes": 40, "window_connections": 20 }));
    assert!(run.closes().is_empty(), "no line for each connection");
}

#[test]
fn sigusr1_asks_for_a_summary() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    traffic(&listener);
    tracer.wait_for_closes(2, |_| true);
    tracer.signal(Signal::USR1);
    let summary = tracer.wait_for("a summary", |events| events.iter().find(is_interim).cloned());
    expect(&summary, &json!({ "closes": 2, "time_wait": 1, "window_closes": 2 }));
    traffic(&listener);
    tracer.wait_for_closes(4, |_| true);
    let run = tracer.stop();
    expect(&run.summary, &json!({ "final": true, "closes": 4, "time_wait": 2, "window_closes": 4 }));
    assert_eq!(run.events.iter().filter(|event| event["type"] == "summary").count(), 2);
}

/// While the programs are loaded it must not end tracer, as it would by default.
#[test]
fn sigusr1_before_it_traces() {
    const USR1: u64 = 1 << (10 - 1);
    let mut process = Guard(tracer().args(["run", "--json"]).stdout(Stdio::piped()).spawn().expect("tracer starts"));
    let handles_it = || {
        let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap_or_default();
        let mask = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
            u64::from_str_radix(line.trim(), 16).expect("a mask")
        };
        (mask("SigIgn:") | mask("SigCgt:")) & USR1 != 0
    };
    // From its first instruction on, as near as can be.
    while !handles_it() {}
    let mut stdout = BufReader::new(process.0.stdout.take().expect("piped"));
    for _ in 0..50 {
        process.signal(Signal::USR1);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(process.0.try_wait().expect("it is our child"), None, "it lives on");
    }
    let mut first = String::new();
    stdout.read_line(&mut first).expect("it prints");
    assert!(first.starts_with(r#"{"type":"start""#), "{first}");
    process.signal(Signal::INT);
    // So that it is not held up.
    stdout.lines().map_while(Result::ok).for_each(drop);
    assert_eq!(process.wait().code(), Some(0));
}

/// A line of `/proc/<pid>/status` that is a mask.
fn mask(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}: {status}"));
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).expect("a mask")
}

/// The processes that any thread of a process has started and not yet reaped.
fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let children: String =
        tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok()).collect();
    children.split_whitespace().map(|pid| pid.parse().expect("a process id")).collect()
}

/// The process that runs the command of `--exec`.
pub(crate) fn launcher_of(tracer: &Tracer) -> u32 {
    let mut children = children(tracer.pid()).into_iter();
    children.find(|pid| comm_of(*pid) == "tracer-launcher").expect("it is a child")
}

#[test]
fn an_alert_runs_its_command_once() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let path = |name: &str| directory.path().join(name);
    let command = format!(
        "cat /proc/self/status > {0}/status; cat > {0}/new && echo once >> {0}/runs && mv {0}/new {0}/summary; echo done",
        directory.path().display()
    );
    // Of its own, so that nobody else's TIME_WAIT counts.
    let namespace = Namespace::new("alert");
    let (listener, tracer) = namespace.enter(|| {
        let listener = Listener::new();
        let port = listener.port.to_string();
        (listener, Tracer::start(&["--port", &port, "--alert-time-wait", "20", "--exec", &command]))
    });
    namespace.enter(|| (0..15).for_each(|_| traffic(&listener)));
    tracer.wait_for_closes(30, |_| true);
    // At least one look.
    std::thread::sleep(Duration::from_millis(1_500));
    let is_alert = |event: &&Value| event["type"] == "alert";
    assert!(!tracer.events().iter().any(|event| is_alert(&event)), "there is no reason");
    namespace.enter(|| (0..15).for_each(|_| traffic(&listener)));
    let alert = tracer.wait_for("an alert", |events| events.iter().find(is_alert).cloned());
    expect(&alert, &json!({ "state": "raised", "metric": "time_wait", "limit": 20.0 }));
    assert!((20.0..=30.0).contains(&number(&alert["value"])), "{alert:#}");
    assert_eq!(alert["time_wait_sockets"].as_f64(), alert["value"].as_f64());
    expect(&alert["advice"], &json!({ "cause": "request_close", "at_fault": "client" }));

    wait_until("the command to have written", || path("summary").exists());
    let summary: Value = serde_json::from_slice(&fs::read(path("summary")).expect("it is there")).expect("JSON");
    expect(&summary, &json!({ "type": "summary", "final": false, "lost": 0 }));
    assert!(number(&summary["window_closes"]) >= 40.0, "{summary:#}");
    assert_eq!(summary["advice"][0]["cause"], "request_close");
    // It can do no more than tracer can.
    let its = fs::read_to_string(path("status")).expect("it is there");
    let ours = fs::read_to_string(format!("/proc/{}/status", tracer.pid())).expect("it runs");
    assert_eq!(mask(&its, "CapPrm") & !mask(&ours, "CapPrm"), 0, "{its}");
    assert_eq!(mask(&its, "CapEff") & !mask(&ours, "CapPrm"), 0, "{its}");
    assert_eq!(mask(&its, "NoNewPrivs"), 1, "{its}");
    // It is not confined, tracer is, and who started it cannot do more either.
    assert_eq!((mask(&its, "Seccomp"), mask(&ours, "Seccomp")), (0, 2), "{its}");
    let launcher = launcher_of(&tracer);
    let status = fs::read_to_string(format!("/proc/{launcher}/status")).expect("it runs");
    assert_eq!((mask(&status, "CapPrm"), mask(&status, "CapBnd"), mask(&status, "NoNewPrivs")), (0, 0, 1), "{status}");
    wait_until("the command to be reaped", || children(launcher).is_empty());

    // It stays as it is: neither another alert nor another run.
    namespace.enter(|| (0..10).for_each(|_| traffic(&listener)));
    std::thread::sleep(Duration::from_millis(2_500));
    let run = tracer.stop();
    wait_until("the launcher to go", || !Path::new(&format!("/proc/{launcher}")).exists());
    assert_eq!(run.events.iter().filter(is_alert).count(), 1);
    assert_eq!(fs::read_to_string(path("runs")).expect("it is there"), "once\n");
    assert!(run.events.iter().all(|event| event["type"].is_string()), "what it prints is not in the output");
}

#[test]
fn an_alert_on_the_rate() {
    let listener = Listener::new();
    let tracer = Tracer::start(&["--port", &listener.port.to_string(), "--alert-rate", "2"]);
    // In ten seconds: 1.9 a second, then 2.
    (0..19).for_each(|_| traffic(&listener));
    tracer.wait_for_closes(38, |_| true);
    std::thread::sleep(Duration::from_millis(1_200));
    assert!(!tracer.events().iter().any(|event| event["type"] == "alert"));
    traffic(&listener);
    let alert = tracer.wait_for("an alert", |events| events.iter().find(|event| event["type"] == "alert").cloned());
    expect(&alert, &json!({ "state": "raised", "metric": "rate", "value": 2.0, "limit": 2.0, "time_wait_per_s": 2.0 }));
    tracer.stop();
}
