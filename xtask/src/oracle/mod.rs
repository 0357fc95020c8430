//! `cargo xtask oracle`: are tracer's answers right? An independent witness decides.
//!
//! Real servers and real clients talk in two network namespaces. `tcpdump` and `tshark` watch the packets, `ss` the
//! TIME_WAIT sockets, and the harness knows which processes it started; tracer, which watches the whole host without a
//! filter, must say the same of each end of each connection. One batch is one server on one kind of path, with all clients
//! at once.

mod compare;
mod network;
mod packets;
mod programs;
mod raw;
mod reader;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use self::compare::{Comparison, Ends, Owners, Truth, compare};
use self::network::{Capture, Network, Route};
use self::packets::{Connection, End, connections};
use self::programs::{Client, Server};
use crate::hidden::{self, Hidden};
use crate::network::{Namespace, Running};
use crate::workspace;

/// The first port of the servers; each batch has its own.
const FIRST_PORT: u16 = 20_000;
/// The last one, and more.
const LAST_PORT: u16 = 20_999;
/// What a whole run must reach.
const WHOLE: u64 = 20_000;
/// For a hundred ends, how many fields tracer may say that it does not know.
const UNOBSERVED_PERCENT: u64 = 2;
/// Longest wait for anything that must happen. TIME_WAIT lasts 60 s, and must be looked at before.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the batches; `quick` runs each server on one kind of path.
pub(crate) fn oracle(quick: bool) -> Result<()> {
    if !workspace::is_root() {
        let mut command = Command::new("sudo");
        command.arg("-E").arg(std::env::current_exe()?).arg("oracle");
        return workspace::succeed(command.args(quick.then_some("--quick")));
    }
    workspace::install("the oracle", &programs::NEEDED)?;
    workspace::succeed(workspace::cargo().args(["build", "--release", "--package", "tracer"]))?;
    let directory = tempfile::Builder::new().prefix("tracer-oracle-").tempdir()?;
    programs::build(directory.path())?;
    let network = Network::new(u8::try_from(Client::ALL.len())?)?;
    let mut hidden = Hidden::watch(FIRST_PORT..=LAST_PORT)?;
    let tracer = Tracer::start(&workspace::target_dir().join("release/tracer"), &network)?;

    let batches: Vec<_> = Server::ALL
        .into_iter()
        .enumerate()
        .flat_map(|(n, server)| {
            let routes = Route::ALL.into_iter().enumerate();
            routes.filter(move |(m, _)| !quick || n % Route::ALL.len() == *m).map(move |(_, route)| (server, route))
        })
        .collect();
    let scale = if quick { 40 } else { 70 };
    let mut table = Table::default();
    for (n, (server, route)) in batches.iter().enumerate() {
        let port = FIRST_PORT + 2 * u16::try_from(n)?;
        eprintln!("oracle: {} of {}: {}, {}", n + 1, batches.len(), server.name(), route.name());
        let place = directory.path().join(n.to_string());
        fs::create_dir(&place)?;
        let batch = Batch {
            network: &network,
            programs: directory.path(),
            place: &place,
            server: *server,
            route: *route,
            port,
            scale,
        };
        batch
            .run(&tracer, &mut hidden, table.row(*server))
            .with_context(|| format!("{}, {}", server.name(), route.name()))?;
        // Captures are large.
        fs::remove_dir_all(&place)?;
    }
    let (lost, closes) = tracer.stop()?;
    for (key, there) in table.rows.iter().flat_map(|(_, row)| &row.missing) {
        let records = closes.get(key).map_or(&[][..], Vec::as_slice);
        let late = records.get(*there..).unwrap_or_default();
        // Was it held back, or never written?
        eprintln!("oracle: what was missing of {} - {} came at the end: {late:?}", key.1, key.2);
    }
    table.print();
    if lost != 0 {
        bail!("tracer lost {lost} records");
    }
    let total = table.total();
    if total.disagreements != 0 {
        bail!("{} disagreements", total.disagreements);
    }
    if let Some((server, row)) = table.rows.iter().find(|(_, row)| row.unobserved * 100 > row.ends * UNOBSERVED_PERCENT)
    {
        bail!("with {} tracer does not know {} fields of {} ends", server.name(), row.unobserved, row.ends);
    }
    if total.hidden * hidden::ONE_OF > total.ends {
        bail!("the kernel showed {} of {} ends to no BPF program", total.hidden, total.ends);
    }
    if !quick && total.connections < WHOLE {
        bail!("only {} connections: a whole run makes {WHOLE}", total.connections);
    }
    Ok(())
}

/// What one capture shows, and which ends of it have their sockets in that namespace.
struct Witnessed<'a> {
    connections: Vec<Connection>,
    namespace: &'a Namespace,
    ends: &'a [End],
}

/// One server on one kind of path, and all clients.
struct Batch<'a> {
    network: &'a Network,
    programs: &'a Path,
    place: &'a Path,
    server: Server,
    route: Route,
    port: u16,
    scale: u32,
}

impl Batch<'_> {
    fn run(&self, tracer: &Tracer, hidden: &mut Hidden, row: &mut Row) -> Result<()> {
        let (servers, clients) = (&self.network.servers, self.network.clients_of(self.route));
        let backend = self.port + 1;
        let behind = if self.server == Server::Haproxy {
            Some(Server::Nginx.start(servers, self.programs, self.place, "127.0.2.1", backend, 0)?)
        } else {
            None
        };
        let server =
            self.server.start(servers, self.programs, self.place, self.route.any_address(), self.port, backend)?;
        let listen = |port| wait_for("a server to listen", || listens(servers, port));
        listen(self.port)?;
        if behind.is_some() {
            listen(backend)?;
        }
        let captures = [
            Capture::start(servers, "lo", self.place.join("lo.pcap"))?,
            Capture::start(servers, "veth", self.place.join("servers.pcap"))?,
            Capture::start(&self.network.clients, "veth", self.place.join("clients.pcap"))?,
        ];

        let began = Instant::now();
        let mut owners = self.clients(clients)?;
        // Workers may have been started since.
        owners.servers.insert(self.port, server.handlers());
        if let Some(behind) = &behind {
            owners.servers.insert(backend, behind.handlers());
            owners.clients.insert(SocketAddr::new("127.0.2.1".parse()?, backend), vec![server.pid()]);
        }
        wait_for("all connections to end", || self.are_over())?;
        let mut time_wait = HashSet::new();
        // More than once: a walk over so many sockets can miss one, while others come and go beside it. No new ones appear.
        for _ in 0..3 {
            for namespace in [servers, &self.network.clients] {
                time_wait.extend(cookies(&namespace.ss(&["-a", "-e", "state", "time-wait"])?)?);
            }
        }
        if began.elapsed() > Duration::from_secs(55) {
            bail!("it took {:?}: TIME_WAIT sockets have gone by now", began.elapsed());
        }
        // By then the servers have also written their last log lines.
        std::thread::sleep(Capture::DELAY);
        for port in [self.port, backend] {
            for (ends, pid) in logged(&self.place.join(format!("who-{port}"))) {
                owners.logged.entry(ends).or_default().push(pid);
            }
        }
        let [lo, at_servers, at_clients] =
            captures.map(|capture| capture.stop().and_then(|file| connections(&file, self.port..=backend)));
        let truth = Truth { owners, time_wait };
        let clients = &self.network.clients;
        let witnessed = [
            Witnessed { connections: lo?, namespace: servers, ends: &[End::Client, End::Server] },
            Witnessed { connections: at_servers?, namespace: servers, ends: &[End::Server] },
            Witnessed { connections: at_clients?, namespace: clients, ends: &[End::Client] },
        ];
        for witnessed in &witnessed {
            self.judge(tracer, hidden, witnessed, &truth, row)?;
        }
        Ok(())
    }

    /// Runs all clients at once; the answer is who owns what.
    fn clients(&self, namespace: &Namespace) -> Result<Owners> {
        let mut owners = Owners::default();
        let mut running = Vec::new();
        for client in Client::ALL {
            let address = self.route.address(client.number());
            let to = SocketAddr::new(address, self.port);
            let pids = owners.clients.entry(to).or_default();
            if client == Client::Raw {
                pids.push(std::process::id());
                continue;
            }
            // A few thousand connections in a second are enough of them once for each server.
            if client == Client::WrkClose && self.route != Route::Loopback4 {
                continue;
            }
            for (program, args) in client.commands(self.programs, address, self.port, self.scale)? {
                let name = format!("client-{}", running.len());
                let mut command = namespace.command(&program);
                let process = Running::start(command.args(args), self.place, &name)?;
                pids.push(process.pid());
                running.push((process, to, self.place.join(format!("{name}.out"))));
            }
        }
        let raw = SocketAddr::new(self.route.address(Client::Raw.number()), self.port);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                namespace.enter()?;
                raw::run(raw, self.scale / 40)
            });
            thread.join().map_err(|_| anyhow::anyhow!("the raw client panicked"))?
        })?;
        wait_for("the clients to end", || {
            for (process, ..) in &mut running {
                if process.child.try_wait()?.is_none() {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        for (process, to, out) in &running {
            // curl says from where it connected.
            for line in fs::read_to_string(out).unwrap_or_default().lines() {
                if let Some((ip, port)) = line.split_once(' ')
                    && let (Ok(ip), Ok(port)) = (ip.parse::<IpAddr>(), port.parse())
                {
                    let ends = (SocketAddr::new(ip.to_canonical(), port), *to);
                    owners.exact.entry(ends).or_default().push(process.pid());
                }
            }
        }
        Ok(owners)
    }

    /// Nothing but listeners and TIME_WAIT sockets is left, on either side.
    fn are_over(&self) -> Result<bool> {
        for namespace in [&self.network.servers, &self.network.clients] {
            let left = namespace.ss(&["-a", "state", "connected", "exclude", "time-wait"])?;
            if !left.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Compares what the packets of one capture say with what tracer says, and counts.
    fn judge(
        &self,
        tracer: &Tracer,
        hidden: &mut Hidden,
        Witnessed { connections, namespace, ends }: &Witnessed<'_>,
        truth: &Truth,
        row: &mut Row,
    ) -> Result<()> {
        let expected = self.expected(connections, namespace, ends, row);
        self.every_client_came(connections, ends, row);
        hidden.read()?;
        let unseen = |(_, local, remote): &Key| hidden.count(*local, *remote);
        let all_there = |closes: &HashMap<Key, Vec<Value>>| -> Result<bool> {
            for (key, wanted) in &expected {
                let there = closes.get(key).map_or(0, Vec::len) + no_socket(wanted);
                // Only where some are missing: that is a question to the kernel.
                if there < wanted.len() && there + unseen(key)? < wanted.len() {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        // What is missing after that is told below.
        let _ = wait_for("tracer's records", || all_there(&tracer.closes()));
        let closes = tracer.closes();
        self.no_record_is_unexplained(&closes, connections, namespace, ends, row);
        for (key, wanted) in &expected {
            let mut records: Vec<&Value> = closes.get(key).into_iter().flatten().collect();
            records.sort_by_key(|record| record["time"].as_str());
            let unseen = if records.len() < wanted.len() { unseen(key)? } else { 0 };
            row.hidden += unseen as u64;
            let least = wanted.len().saturating_sub(no_socket(wanted) + unseen);
            if !(least..=wanted.len()).contains(&records.len()) {
                let (_, local, remote) = key;
                let seen: Vec<_> = wanted.iter().map(|(connection, _)| connection.summary()).collect();
                row.disagree(
                    self,
                    format!("{local} - {remote}: tracer's records: {records:?}; by the packets: {seen:?}"),
                );
                if records.len() < wanted.len() {
                    row.missing.push((*key, records.len()));
                }
                continue;
            }
            // Which of several is missing cannot be told.
            if records.len() != wanted.len() {
                row.undecided += u64::from(unseen == 0);
                continue;
            }
            for (n, (record, (connection, end))) in records.iter().zip(wanted).enumerate() {
                row.ends += 1;
                row.count(self, compare(record, connection, *end, n + 1 < wanted.len(), truth), record);
            }
        }
        Ok(())
    }

    /// Of each pair of addresses the connections, in order, that must have a record for an end.
    fn expected<'a>(
        &self,
        connections: &'a [Connection],
        namespace: &Namespace,
        ends: &[End],
        row: &mut Row,
    ) -> HashMap<Key, Vec<(&'a Connection, End)>> {
        let mut expected: HashMap<Key, Vec<(&Connection, End)>> = HashMap::new();
        for connection in connections.iter().filter(|connection| self.is_ours(connection)) {
            if !connection.has_ended() {
                row.disagree(self, format!("{} > {}: the packets show no end", connection.client, connection.server));
                continue;
            }
            // What passes between the namespaces is in two captures.
            row.connections += u64::from(ends.contains(&End::Client));
            // What the raw client sends, and HAProxy passes on, is not for every dissector.
            if connection.server.port() == self.port
                && connection.server.ip() != self.route.address(Client::Raw.number())
                && let Err(differs) = compare::witnesses_agree(connection)
            {
                row.disagree(
                    self,
                    format!("{} > {}: the witnesses differ: {differs}", connection.client, connection.server),
                );
            }
            for end in ends {
                expected.entry(key(namespace, connection, *end)).or_default().push((connection, *end));
            }
        }
        expected
    }

    /// An answered connection of this batch.
    fn is_ours(&self, connection: &Connection) -> bool {
        connection.answered && (self.port..=self.port + 1).contains(&connection.server.port())
    }

    /// Where the clients' ends are, each client must have made a connection at least.
    fn every_client_came(&self, connections: &[Connection], ends: &[End], row: &mut Row) {
        if !ends.contains(&End::Client) || (ends.len() == 2) != self.route.is_loopback() {
            return;
        }
        let ours = connections.iter().filter(|connection| self.is_ours(connection) && connection.has_ended());
        let servers: HashSet<SocketAddr> = ours.map(|connection| connection.server).collect();
        let silent: Vec<_> = Client::ALL
            .into_iter()
            .filter(|client| *client != Client::WrkClose)
            .filter(|client| !servers.contains(&SocketAddr::new(self.route.address(client.number()), self.port)))
            .collect();
        if !silent.is_empty() {
            row.disagree(self, format!("no connection of {silent:?}"));
        }
    }

    /// Records that no packet explains. Of a connection that is in another capture, or was not answered, there may be one.
    fn no_record_is_unexplained(
        &self,
        closes: &HashMap<Key, Vec<Value>>,
        connections: &[Connection],
        namespace: &Namespace,
        ends: &[End],
        row: &mut Row,
    ) {
        let of_connection = |one| ends.iter().map(move |end| key(namespace, one, *end));
        let known: HashSet<Key> = connections.iter().flat_map(of_connection).collect();
        let of_this_capture = |(netns, local, remote): &&Key| {
            let ports = [local.port(), remote.port()];
            *netns == namespace.inode
                && ports.iter().any(|port| (self.port..=self.port + 1).contains(port))
                && is_loopback(local, remote) == (ends.len() == 2)
        };
        for unexplained in closes.keys().filter(of_this_capture).filter(|key| !known.contains(key)) {
            row.disagree(self, format!("no packet explains {:?}", closes[unexplained]));
        }
    }
}

/// Where tracer's records of an end are found.
fn key(namespace: &Namespace, connection: &Connection, end: End) -> Key {
    (namespace.inode, connection.address(end), connection.address(end.peer()))
}

/// How many of these ends need not have had a socket.
fn no_socket(wanted: &[(&Connection, End)]) -> usize {
    wanted.iter().filter(|(connection, end)| connection.may_have_had_no_socket(*end)).count()
}

/// Whether both ends are in one namespace: then both have the addresses of the loopback device, or the same one.
fn is_loopback(local: &SocketAddr, remote: &SocketAddr) -> bool {
    local.ip() == remote.ip() || local.ip().is_loopback() || remote.ip().is_loopback()
}

/// Namespace, local and remote address.
type Key = (u64, SocketAddr, SocketAddr);

fn listens(namespace: &Namespace, port: u16) -> Result<bool> {
    Ok(!namespace.ss(&["-l", "sport", "=", &format!(":{port}")])?.is_empty())
}

fn wait_for(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition()? {
        if Instant::now() > deadline {
            bail!("waited {PATIENCE:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The cookies in what `ss --extended` prints: `sk:3f`.
fn cookies(text: &str) -> Result<Vec<u64>> {
    text.split_whitespace()
        .filter_map(|word| word.strip_prefix("sk:"))
        .map(|cookie| u64::from_str_radix(cookie, 16).with_context(|| format!("ss printed the cookie {cookie}")))
        .collect()
}

/// A server's log: for each request the process, the client's address and port, the server's address and port.
fn logged(log: &Path) -> Vec<(Ends, u32)> {
    // Only some servers write it.
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let pid = words.next()?.parse().ok()?;
            let mut address = || {
                let ip: IpAddr = words.next()?.parse().ok()?;
                Some(SocketAddr::new(ip.to_canonical(), words.next()?.parse().ok()?))
            };
            Some(((address()?, address()?), pid))
        })
        .collect()
}

/// A running tracer, and the `close` records that it has printed.
struct Tracer {
    child: Child,
    closes: Arc<Mutex<HashMap<Key, Vec<Value>>>>,
    reader: std::thread::JoinHandle<Result<u64>>,
}

impl Tracer {
    fn start(binary: &PathBuf, network: &Network) -> Result<Self> {
        let mut child = Command::new(binary)
            .args(["run", "--json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let mut stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut start = String::new();
        stdout.read_line(&mut start)?;
        if !start.contains(r#""type":"start""#) {
            bail!("tracer did not start: {}", child.wait()?);
        }
        let closes = Arc::default();
        let reader = std::thread::spawn({
            let closes = Arc::clone(&closes);
            let ours = [&network.servers, &network.clients].map(|namespace| format!("\"netns\":{},", namespace.inode));
            move || read(stdout, &ours, &closes)
        });
        Ok(Self { child, closes, reader })
    }

    fn closes(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Vec<Value>>> {
        self.closes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it: the number of lost records, and all `close` records.
    fn stop(mut self) -> Result<(u64, HashMap<Key, Vec<Value>>)> {
        kill_process(Pid::from_child(&self.child), Signal::INT)?;
        let status = self.child.wait()?;
        let lost = self.reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        if !status.success() {
            bail!("tracer: {status}");
        }
        let closes = std::mem::take(&mut *self.closes.lock().unwrap_or_else(PoisonError::into_inner));
        Ok((lost, closes))
    }
}

/// Reads to the end, what is of our namespaces: the number of lost records.
fn read(stdout: BufReader<ChildStdout>, ours: &[String], closes: &Mutex<HashMap<Key, Vec<Value>>>) -> Result<u64> {
    let mut lost = None;
    for line in stdout.lines() {
        let line = line?;
        // Quickly, or a busy host's other connections would hold tracer up.
        if line.starts_with(r#"{"type":"close""#) && !ours.iter().any(|netns| line.contains(netns)) {
            continue;
        }
        let event: Value = serde_json::from_str(&line)?;
        match event["type"].as_str() {
            Some("close") => {
                let address = |end: &str| event[end].as_str().and_then(|text| text.parse().ok());
                let (Some(netns), Some(local), Some(remote)) =
                    (event["netns"].as_u64(), address("local"), address("remote"))
                else {
                    bail!("no addresses in {event}");
                };
                let mut closes = closes.lock().unwrap_or_else(PoisonError::into_inner);
                closes.entry((netns, local, remote)).or_default().push(event);
            }
            Some("summary") => lost = event["lost"].as_u64(),
            _ => {}
        }
    }
    lost.context("tracer printed no summary")
}

/// What was found with one server.
#[derive(Default)]
struct Row {
    connections: u64,
    ends: u64,
    agreed: u64,
    /// What tracer does not know, and what the witness cannot decide.
    unobserved: u64,
    undecided: u64,
    /// Sockets whose end the kernel showed to no BPF program.
    hidden: u64,
    disagreements: u64,
    /// Where too few records came in time, and how many had come.
    missing: Vec<(Key, usize)>,
    /// By field.
    fields: BTreeMap<&'static str, u64>,
}

impl Row {
    fn count(&mut self, batch: &Batch<'_>, comparison: Comparison, record: &Value) {
        self.agreed += comparison.agreed;
        self.unobserved += comparison.unobserved;
        self.undecided += comparison.undecided;
        if comparison.differences.is_empty() {
            return;
        }
        let mut text = format!("{} - {}", record["local"], record["remote"]);
        for difference in &comparison.differences {
            *self.fields.entry(difference.field).or_default() += 1;
            text.push_str(&format!(
                "\n    {}: tracer says {}, the witness {}",
                difference.field, difference.tracer, difference.witness
            ));
        }
        self.disagree(batch, format!("{text}\n    in {record}"));
        self.disagreements += comparison.differences.len() as u64 - 1;
    }

    fn disagree(&mut self, batch: &Batch<'_>, what: String) {
        self.disagreements += 1;
        eprintln!("oracle: {}, {}: {what}", batch.server.name(), batch.route.name());
    }
}

#[derive(Default)]
struct Table {
    rows: Vec<(Server, Row)>,
}

impl Table {
    fn row(&mut self, server: Server) -> &mut Row {
        let at = match self.rows.iter().position(|(known, _)| *known == server) {
            Some(at) => at,
            None => {
                self.rows.push((server, Row::default()));
                self.rows.len() - 1
            }
        };
        &mut self.rows[at].1
    }

    fn total(&self) -> Row {
        let mut total = Row::default();
        for (_, row) in &self.rows {
            total.connections += row.connections;
            total.ends += row.ends;
            total.agreed += row.agreed;
            total.unobserved += row.unobserved;
            total.undecided += row.undecided;
            total.hidden += row.hidden;
            total.disagreements += row.disagreements;
            for (field, count) in &row.fields {
                *total.fields.entry(field).or_default() += count;
            }
        }
        total
    }

    fn print(&self) {
        println!("| server | connections | ends | fields that agree | unobserved | hidden | disagreements |");
        println!("| --- | ---: | ---: | ---: | ---: | ---: | --- |");
        let total = self.total();
        let rows = self.rows.iter().map(|(server, row)| (server.name(), row));
        for (name, row) in rows.chain([("all", &total)]) {
            let fields: String = row.fields.iter().map(|(field, count)| format!(" {field} {count}")).collect();
            println!(
                "| {name} | {} | {} | {} | {} | {} | {}{fields} |",
                row.connections,
                row.ends,
                row.agreed,
                row.unobserved + row.undecided,
                row.hidden,
                row.disagreements
            );
        }
    }
}
