//! `tracer run --record`, and what `tracer report` makes of it, whatever became of the run.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::rig::{Guard, Listener, Tracer, tracer, wait_until};

struct Recorded {
    directory: tempfile::TempDir,
}

impl Recorded {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory can be made") }
    }

    fn path(&self) -> String {
        self.directory.path().join("run.rec").to_str().expect("UTF-8").to_owned()
    }

    fn start(&self, port: u16) -> Tracer {
        Tracer::start(&["--port", &port.to_string(), "--record", &self.path()])
    }

    /// What `tracer report` says, with its exit code and what it complains of.
    fn report(&self) -> (Vec<Value>, i32, String) {
        let Output { status, stdout, stderr } =
            tracer().args(["report", "--json", &self.path()]).output().expect("it starts");
        let events = stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(serde_json::from_slice);
        let events = events.collect::<Result<_, _>>().expect("JSON");
        (events, status.code().expect("not killed"), String::from_utf8_lossy(&stderr).into_owned())
    }
}

fn connections(listener: &Listener, tracer: &Tracer, count: usize) {
    for _ in 0..count {
        let (server, client) = listener.serve_and_close();
        tracer.wait_for_close(server, client);
        tracer.wait_for_close(client, server);
    }
}

fn closes(events: &[Value]) -> Vec<&Value> {
    events.iter().filter(|event| event["type"] == "close").collect()
}

#[test]
fn the_report_is_what_was_printed() {
    let (recorded, listener) = (Recorded::new(), Listener::new());
    let tracer = recorded.start(listener.port);
    connections(&listener, &tracer, 3);
    let mut run = tracer.stop();
    let (events, code, said) = recorded.report();
    assert_eq!((code, said.as_str()), (0, ""));
    // What the programs counted is not recorded.
    let ledger = run.events.last_mut().expect("a summary")["ledger"].take();
    assert!(ledger.is_object(), "{ledger}");
    assert_eq!(events, run.events);
    let mode = fs::metadata(recorded.path()).expect("it exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else's business");
}

#[test]
fn a_killed_run_loses_at_most_its_last_second() {
    let (recorded, listener) = (Recorded::new(), Listener::new());
    let tracer = recorded.start(listener.port);
    connections(&listener, &tracer, 3);
    std::thread::sleep(Duration::from_secs(1));
    let printed = tracer.events();
    tracer.signal(Signal::KILL);
    let (events, code, said) = recorded.report();
    assert_eq!(code, 8, "{said}");
    assert!(said.contains("without its end"), "{said}");
    assert_eq!(closes(&printed).len(), 6);
    assert_eq!(closes(&events), closes(&printed));
    assert_eq!(events[0], printed[0]);
    assert_eq!(events.last().expect("a summary")["closes"], 6);
}

/// A limit on the size of files stands for a full disk; the default of its signal would end tracer.
#[test]
fn tracing_goes_on_where_the_recording_cannot() {
    let (empty, recorded, listener) = (Recorded::new(), Recorded::new(), Listener::new());
    let size = |of: &Recorded| fs::metadata(of.path()).map_or(0, |file| file.len());
    // Room for the start, and not for much more.
    empty.start(listener.port).stop();
    let limit = size(&empty);
    let mut command = Command::new("prlimit");
    command.arg(format!("--fsize={limit}")).arg(tracer().get_program());
    let tracer = Tracer::start_by(command, &["--port", &listener.port.to_string(), "--record", &recorded.path()]);
    wait_until("the start to be recorded", || size(&recorded) > 16);
    let mut made = 0;
    wait_until("writing to fail", || {
        connections(&listener, &tracer, 1);
        made += 1;
        size(&recorded) == limit
    });
    connections(&listener, &tracer, 2);
    tracer.signal(Signal::INT);
    let (run, status) = tracer.join();
    assert_eq!(status.code(), Some(8), "the recording is incomplete");
    assert_eq!(run.summary["closes"], 2 * (made + 2), "the tracing is not");
    let (events, code, _) = recorded.report();
    assert_eq!((events[0].clone(), code), (run.events[0].clone(), 8));
}

#[test]
fn a_closed_stdout_ends_the_recording_too() {
    let (recorded, listener) = (Recorded::new(), Listener::new());
    let mut command = tracer();
    command.args(["run", "--json", "--port", &listener.port.to_string(), "--record", &recorded.path()]);
    let mut run = Guard(command.stdout(Stdio::piped()).spawn().expect("it starts"));
    let mut stdout = BufReader::new(run.0.stdout.take().expect("piped"));
    stdout.read_line(&mut String::new()).expect("the start");
    drop(stdout);
    assert_eq!(run.wait().code(), Some(0));
    let (events, code, said) = recorded.report();
    assert_eq!((events.len(), code, said.as_str()), (2, 0, ""), "start and summary");
}

#[test]
fn nothing_is_overwritten_unasked() {
    let recorded = Recorded::new();
    let refused = |command: &mut Command| {
        let Output { status, stderr, .. } = command.output().expect("it starts");
        assert_eq!(status.code(), Some(1));
        String::from_utf8_lossy(&stderr).into_owned()
    };
    let record = |path: &str| {
        let mut command = tracer();
        command.args(["run", "--duration", "10ms", "--record", path]);
        command
    };
    fs::write(recorded.path(), "precious").expect("written");
    let said = refused(&mut record(&recorded.path()));
    assert!(said.contains("run.rec") && said.contains("--overwrite"), "{said}");
    assert_eq!(fs::read(recorded.path()).expect("it is there"), b"precious");
    refused(&mut record("/no/such/directory/run.rec"));
    refused(record("/dev/null").arg("--overwrite"));

    let port = Listener::new().port.to_string();
    let output = record(&recorded.path()).args(["--overwrite", "--port", &port]).output().expect("it starts");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(recorded.report().1, 0);
}
