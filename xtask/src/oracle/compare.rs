//! Two views of one end of a connection in, their differences out.
//!
//! What a capture cannot settle (bytes that were under way when a RST ended it all) is a set of possible readings, and
//! tracer must give one of them. What tracer says it has not observed is counted by itself, and excused only where the
//! packets were lost or out of order.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::oracle::packets::{Connection, End, FirstEnd, Message};
use crate::oracle::reader::{self, Reading};

/// What the harness knows beyond the packets.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    pub(crate) owners: Owners,
    /// Cookies of the sockets in TIME_WAIT, by `ss`, after everything has ended.
    pub(crate) time_wait: HashSet<u64>,
}

/// Client and server address of a connection.
pub(crate) type Ends = (SocketAddr, SocketAddr);

/// Which processes may own an end: the one that is known for the connection, or else those that it may be.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    /// The server's process that handled a connection, by the server's own log; several, if the addresses were used again.
    pub(crate) logged: HashMap<Ends, Vec<u32>>,
    /// The processes of the server that listens on this port.
    pub(crate) servers: HashMap<u16, Vec<u32>>,
    /// The client process that made a connection, by its own word; several, if the addresses were used again.
    pub(crate) exact: HashMap<Ends, Vec<u32>>,
    /// The client processes that connect to this address.
    pub(crate) clients: HashMap<SocketAddr, Vec<u32>>,
}

impl Owners {
    fn of(&self, connection: &Connection, end: End) -> Option<&Vec<u32>> {
        let ends = (connection.client, connection.server);
        let (named, possible) = match end {
            End::Server => (&self.logged, self.servers.get(&connection.server.port())),
            End::Client => (&self.exact, self.clients.get(&connection.server)),
        };
        // Neither need speak of a connection without an answer: what is said may be of another one, on the same addresses.
        let answered = !connection.sent_by(End::Server).stream.is_empty();
        named.get(&ends).filter(|_| answered).or(possible)
    }
}

/// One field that differs.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) field: &'static str,
    pub(crate) tracer: Value,
    pub(crate) witness: Value,
}

/// How one end compares.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) agreed: u64,
    /// Fields that tracer says it has not seen or does not know, where it could not.
    pub(crate) unobserved: u64,
    /// Fields that the witness cannot decide.
    pub(crate) undecided: u64,
    pub(crate) differences: Vec<Difference>,
}

impl Comparison {
    fn check(&mut self, field: &'static str, tracer: &Value, fits: bool, witness: impl FnOnce() -> Value) {
        if fits {
            self.agreed += 1;
        } else {
            self.differences.push(Difference { field, tracer: tracer.clone(), witness: witness() });
        }
    }
}

/// Compares a `close` record with what the packets say of that end.
pub(crate) fn compare(record: &Value, connection: &Connection, end: End, reused: bool, truth: &Truth) -> Comparison {
    let mut comparison = Comparison::default();
    let mut exact = |field: &'static str, witness: Value| {
        comparison.check(field, &record[field], record[field] == witness, || witness);
    };
    exact("role", json!(if end == End::Client { "client" } else { "server" }));
    exact("family", json!(if connection.client.is_ipv4() { "ipv4" } else { "ipv6" }));
    exact("started_before", json!(false));
    let ways: &[&str] = if connection.was_reset() { &["fin", "rst"] } else { &["fin"] };
    comparison.check("how", &record["how"], ways.iter().any(|way| record["how"] == *way), || json!(ways));

    let closers = closed_by(connection, end);
    comparison.check("closed_by", &record["closed_by"], is_one_of(&closers, &record["closed_by"]), || json!(closers));

    let sent = connection.sent_by(end);
    let received = connection.sent_by(end.peer());
    comparison
        .check("tx_bytes", &record["tx_bytes"], record["tx_bytes"] == sent.stream.len(), || json!(sent.stream.len()));
    // What was not acknowledged may have come too late.
    let least = if connection.was_reset() { received.acknowledged } else { received.stream.len() };
    let lengths = [least].into_iter().chain(received.boundaries.iter().copied().filter(|length| *length > least));
    let rx_bytes = &record["rx_bytes"];
    let fits = rx_bytes.as_u64().is_some_and(|bytes| (least as u64..=received.stream.len() as u64).contains(&bytes));
    comparison.check("rx_bytes", rx_bytes, fits, || json!([least, received.stream.len()]));

    let readings: Vec<Reading> = lengths
        .map(|length| {
            let received = &received.stream[..length];
            match end {
                End::Client => reader::read(&sent.stream, received),
                End::Server => reader::read(received, &sent.stream),
            }
        })
        .collect();
    let (idle_us, seen) = (&record["idle_us"], connection.idle_us(end, SLACK_US));
    let fits = match idle_us.as_u64() {
        Some(said) => seen.iter().any(|seen| said.abs_diff(*seen) <= SLACK_US),
        // A socket that had already ended need not have taken what the capture shows.
        None => seen.is_empty() || connection.was_reset() && rx_bytes == 0 && sent.stream.is_empty(),
    };
    comparison.check("idle_us", idle_us, fits, || json!(seen));
    compare_http(&mut comparison, record, connection, &readings);
    compare_cause(&mut comparison, record, connection, end, &readings);

    // Another connection on the same addresses takes the place of the TIME_WAIT socket, and a RST ends it.
    let left = record["cookie"].as_u64().is_some_and(|cookie| truth.time_wait.contains(&cookie));
    let says = record["final"] == "time_wait";
    if says && !left && (reused || connection.may_have_cut_time_wait_short(end)) {
        comparison.undecided += 1;
    } else {
        // Without a RST an end that leaves nothing is the passive one.
        let fits = says == left && (left || connection.was_reset() || record["final"] == "closed");
        comparison.check("final", &record["final"], fits, || {
            json!(if left { "ss shows it in TIME-WAIT" } else { "ss does not show it in TIME-WAIT" })
        });
    }

    if let Some(owners) = truth.owners.of(connection, end) {
        let pid = &record["process"]["pid"];
        let fits = owners.iter().any(|owner| *pid == *owner);
        // A server need not even have accepted what was reset before it read from it, or have read from what sent nothing.
        let client = connection.sent_by(End::Client);
        let unread =
            client.rst.is_some() && (client.stream.is_empty() || connection.sent_by(End::Server).stream.is_empty());
        if record["process"].is_null() && end == End::Server && unread {
            comparison.unobserved += 1;
        } else {
            comparison.check("process", &record["process"], fits, || json!(owners));
        }
        let closer = &record["closer"];
        let fits = closer.is_null() || owners.iter().any(|owner| closer["pid"] == *owner);
        comparison.check("closer", closer, fits, || json!(owners));
    }
    comparison
}

/// Whether `tshark` and our own reader of HTTP make the same of all that was said.
pub(crate) fn witnesses_agree(connection: &Connection) -> Result<(), String> {
    let [client, server] = [End::Client, End::Server].map(|end| connection.sent_by(end));
    let reading = reader::read(&client.stream, &server.stream);
    // Out of order segments `tshark` does not put together.
    if client.disorder || server.disorder {
        return Ok(());
    }
    // It shows no message that lacks a part of its body.
    if !matches!(reading.protocol, "http/1.0" | "http/1.1") || reading.unfinished {
        return Ok(());
    }
    let requests: Vec<_> = client.messages.iter().filter(|message| matches!(message, Message::Request(..))).collect();
    let statuses: Vec<u16> = server
        .messages
        .iter()
        .filter_map(|message| match message {
            Message::Response(status) if *status >= 200 || *status == 101 => Some(*status),
            _ => None,
        })
        .collect();
    let last = requests.last().map_or(json!([null, null]), |message| match message {
        Message::Request(method, target) => json!([method, target.split(['?', '#']).next()]),
        Message::Response(_) => Value::Null,
    });
    let http = &reading.http;
    // The status counts if it answers the last request.
    let status = statuses.last().filter(|_| statuses.len() >= requests.len());
    let theirs = json!([requests.len(), last, statuses.len(), status]);
    let ours = |responses: &Value, status: &Value| {
        json!([http["requests"], [http["method"], http["target"]], responses, status])
    };
    let whole = ours(&http["responses"], &http["status"]);
    let cut = reading.body != reader::Body::Complete && http["answered"] == true;
    let less = http["responses"].as_u64().map(|responses| json!(responses.saturating_sub(1)));
    if theirs == whole || cut && less.is_some_and(|less| theirs == ours(&less, &Value::Null)) {
        Ok(())
    } else {
        Err(format!("httparse reads {whole}, tshark {theirs}"))
    }
}

fn is_one_of(words: &BTreeSet<&str>, value: &Value) -> bool {
    value.as_str().is_some_and(|value| words.contains(value))
}

fn closed_by(connection: &Connection, end: End) -> BTreeSet<&'static str> {
    let seen_from = |who| if who == end { "local" } else { "remote" };
    match connection.first_end() {
        FirstEnd::Nobody => BTreeSet::from(["none"]),
        FirstEnd::One(who) => BTreeSet::from([seen_from(who)]),
        // Its socket had ended before the peer's FIN came: data that came first was answered with a RST.
        FirstEnd::Both if connection.sent_by(end).rst.is_some() && !connection.sent_by(end.peer()).fin_acknowledged => {
            BTreeSet::from(["both", "local"])
        }
        FirstEnd::Both => BTreeSet::from(["both"]),
        FirstEnd::Crossing(who) => BTreeSet::from([seen_from(who), "local"]),
    }
}

/// What is compared of the last exchange.
const EXCHANGE: [&str; 12] = [
    "requests",
    "responses",
    "method",
    "target",
    "status",
    "request_version",
    "response_version",
    "request_connection",
    "response_connection",
    "answered",
    "keep_alive_timeout_s",
    "keep_alive_max",
];

fn compare_http(comparison: &mut Comparison, record: &Value, connection: &Connection, readings: &[Reading]) {
    let fits = |reading: &&Reading| {
        record["protocol"] == reading.protocol
            && record["http"].is_null() == reading.http.is_null()
            && EXCHANGE.iter().all(|field| record["http"][field] == reading.http[field])
    };
    if readings.iter().any(|reading| fits(&reading)) {
        comparison.agreed += 1 + EXCHANGE.len() as u64;
        return;
    }
    let disorder = [End::Client, End::Server].into_iter().any(|end| connection.sent_by(end).disorder);
    let http = &record["http"];
    let unobserved = record["protocol"] == "unobserved"
        || http["request_connection"] == "unobserved"
        || http["response_connection"] == "unobserved";
    // Only what says that it was not seen is excused; of what was counted there may be more.
    let excused = |field: &&str| {
        let said = &http[*field];
        let less = |reading: &Reading| said.as_u64() <= reading.http[*field].as_u64();
        let counted = matches!(*field, "requests" | "responses") && readings.iter().any(less);
        let seen = readings.iter().any(|reading| reading.http[*field] == *said);
        said.is_null() || *said == "unobserved" || *said == false || counted || seen
    };
    if disorder && unobserved && EXCHANGE.iter().all(excused) {
        comparison.unobserved += 1;
        return;
    }
    // The whole of what was sent is the likeliest.
    let Some(reading) = readings.last() else { return };
    let protocol = &record["protocol"];
    comparison.check("protocol", protocol, *protocol == reading.protocol, || json!(reading.protocol));
    for field in EXCHANGE {
        comparison.check(field, &http[field], http[field] == reading.http[field], || reading.http[field].clone());
    }
}

/// By so much may what tracer says of a time differ: it and the capture look at their clocks one after the other, on a machine that has
/// other things to do.
const SLACK_US: u64 = 100_000;

/// The cause follows from the other fields, by the rules of the contract: here from the packets' reading of them.
fn compare_cause(comparison: &mut Comparison, record: &Value, connection: &Connection, end: End, readings: &[Reading]) {
    let mut causes = BTreeSet::new();
    if connection.sent_by(end).rst.is_some() {
        causes.insert("reset_by_local");
    }
    if connection.sent_by(end.peer()).rst.is_some() {
        causes.insert("reset_by_peer");
    }
    let closers = closed_by(connection, end);
    if end == End::Client && (closers.contains("local") || closers.contains("both")) {
        // Whether a client had closed it itself before it ended, no packet tells. The servers are still there.
        causes.insert("process_exit");
    }
    // A RST may also come when all is over.
    let mut idle_us = connection.idle_us(end, SLACK_US);
    if idle_us.is_empty() {
        idle_us.push(0);
    }
    for about in idle_us.into_iter().flat_map(|us| [us.saturating_sub(SLACK_US), us, us + SLACK_US]) {
        causes.extend(readings.iter().map(|reading| cause(reading, about)));
    }
    let unobserved = record["cause"] == "unknown" && comparison.unobserved != 0;
    comparison.check("cause", &record["cause"], unobserved || is_one_of(&causes, &record["cause"]), || json!(causes));
}

fn cause(reading: &Reading, idle_us: u64) -> &'static str {
    let http = &reading.http;
    let is = |field: &str, token: &str| {
        http[field].as_str().is_some_and(|tokens| tokens.split(", ").any(|one| one == token))
    };
    let seen = |field: &str| http[field] != "unobserved";
    match reading.protocol {
        "none" => return "unused",
        "tls" => return "tls",
        "h2" if http.is_null() => return "h2",
        "other" => return "not_http",
        _ if http["status"] == 101 => return "upgraded",
        _ => {}
    }
    if !http["method"].is_null() && http["answered"] == false {
        return "unanswered";
    }
    if reading.body == reader::Body::Incomplete {
        return "truncated";
    }
    if is("request_connection", "close") {
        return "request_close";
    }
    if seen("request_connection") && is("response_connection", "close") {
        return "response_close";
    }
    if http["method"].is_null() || !seen("request_connection") || !seen("response_connection") {
        return "unknown";
    }
    let kept = |field: &str| is(field, "keep-alive");
    let old = |field: &str| http[field] == "1.0";
    if old("request_version") && !(kept("request_connection") && kept("response_connection"))
        || old("response_version") && !kept("response_connection")
    {
        return "http10";
    }
    if reading.body == reader::Body::UntilClose || reading.garbage || reading.unfinished {
        return "unknown";
    }
    let announced = http["keep_alive_timeout_s"].as_u64().unwrap_or(0) * 1_000_000;
    let about = announced != 0 && idle_us.abs_diff(announced) <= (announced / 10).max(100_000);
    if idle_us >= 1_000_000 || about { "idle_timeout" } else { "no_reuse" }
}
