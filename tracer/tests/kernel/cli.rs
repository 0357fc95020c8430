//! How the program starts, ends and refuses; and that nothing foreign reaches a terminal.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harmless::is_harmless;
use crate::rig::{Guard, Listener, Tracer, copy_executable, expect, ok, tracer};

/// Runs a tracer that must refuse to, and returns what it said.
fn refused(command: &mut Command, code: i32) -> String {
    let Output { status, stdout, stderr } = command.output().expect("tracer starts");
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert!(stdout.is_empty(), "{}", String::from_utf8_lossy(&stdout));
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

#[test]
fn arguments_out_of_range() {
    for port in ["0", "65536", "-1", "http", ""] {
        refused(tracer().args(["run", "--port", port]), 2);
    }
    for pid in ["0", "-1", "4294967296", "nginx", ""] {
        refused(tracer().args(["run", "--pid", pid]), 2);
    }
    refused(tracer().args(["run", "--no-such-option"]), 2);
}

#[test]
fn a_pid_that_does_not_exist() {
    let mut ended = Command::new("true").spawn().expect("it starts");
    let pid = ended.id().to_string();
    ended.wait().expect("it is our child");
    let said = refused(tracer().args(["run", "--pid", &pid]), 2);
    assert!(said.contains(&pid), "{said}");
}

#[test]
fn without_privileges() {
    // Where an unprivileged user can reach it.
    let directory = tempfile::tempdir().expect("a directory can be made");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let binary = directory.path().join("tracer");
    copy_executable(tracer().get_program(), &binary);
    let said = refused(Command::new(binary).arg("run").uid(65534).gid(65534), 3);
    assert!(said.contains("root") || said.contains("CAP_"), "{said}");
}

#[test]
fn sigterm_and_sigint_end_it_with_a_summary() {
    for signal in [Signal::TERM, Signal::INT] {
        let listener = Listener::new();
        let tracer = Tracer::on_port(listener.port);
        let (server, client) = listener.serve_and_close();
        tracer.wait_for_close(server, client);
        tracer.wait_for_close(client, server);
        tracer.signal(signal);
        let (run, status) = tracer.join();
        assert_eq!(status.code(), Some(0));
        expect(&run.summary, &json!({ "closes": 2, "time_wait": 1, "lost": 0 }));
    }
}

#[test]
fn duration() {
    let listener = Listener::new();
    let begun = Instant::now();
    let tracer = Tracer::start(&["--duration", "2s", "--port", &listener.port.to_string()]);
    let (server, client) = listener.serve_and_close();
    tracer.wait_for_close(server, client);
    let (run, status) = tracer.join();
    assert_eq!(status.code(), Some(0));
    assert!(begun.elapsed() >= Duration::from_secs(2));
    let lasted = run.summary["duration_s"].as_f64().expect("a number");
    assert!((1.9..4.0).contains(&lasted), "{lasted}");
}

#[test]
fn a_closed_stdout_is_success() {
    for format in [&["--json"][..], &[]] {
        let listener = Listener::new();
        let mut process = Guard(
            tracer()
                .arg("run")
                .args(format)
                .args(["--port", &listener.port.to_string()])
                .stdout(Stdio::piped())
                .spawn()
                .expect("tracer starts"),
        );
        // `head -1`
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().expect("piped")).read_line(&mut line).expect("it prints");
        assert!(!line.is_empty());
        let begun = Instant::now();
        while process.0.try_wait().expect("it is our child").is_none() {
            assert!(begun.elapsed() < *crate::rig::PATIENCE, "tracer goes on without a reader");
            listener.serve_and_close();
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(process.wait().code(), Some(0));
    }
}

#[test]
fn what_others_chose_is_escaped() {
    let listener = Listener::new();
    let mut process = Guard(
        tracer()
            .args(["run", "--port", &listener.port.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("tracer starts"),
    );
    let mut stdout = BufReader::new(process.0.stdout.take().expect("piped"));
    let mut text = String::new();
    stdout.read_line(&mut text).expect("it prints");

    // A client whose name is an escape sequence. First a target that is no HTTP but would be obeyed by a terminal, then
    // one with bytes that may stand in a target, and still control or reorder what is shown.
    let script = format!(
        "import socket\n\
         open('/proc/self/comm', 'w').write('\\x1b[2J\\x07x')\n\
         for target in ['\\x1b[31m\\x00\\x7f', '\\x9b31m\\u202e\\u2066\\ufeff']:\n\
         \x20 s = socket.create_connection(('127.0.0.1', {}))\n\
         \x20 s.sendall(('GET /' + target + ' HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n').encode())\n\
         \x20 while s.recv(4096): pass\n",
        listener.port
    );
    let mut client = Guard(Command::new("python3").args(["-c", &script]).spawn().expect("Python starts"));
    for _ in 0..2 {
        let (mut server, _) = listener.accept();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            server.read_exact(&mut byte).expect("the client asks");
            head.push(byte[0]);
        }
        server.write_all(ok("Connection: close\r\n").as_bytes()).expect("the connection is open");
    }
    assert!(client.wait().success());

    // Four closes, then the summary.
    let mut closes = 0;
    while closes < 4 {
        let from = text.len();
        assert!(stdout.read_line(&mut text).expect("tracer runs") > 0, "tracer ended: {text}");
        closes += usize::from(text[from..].contains(&listener.port.to_string()));
    }
    process.signal(Signal::INT);
    stdout.read_to_string(&mut text).expect("it is UTF-8");
    assert_eq!(process.wait().code(), Some(0));
    assert!(is_harmless(&text), "{text:?}");
    assert!(text.contains(r"\x1b[2J"), "the name is shown, escaped: {text:?}");
    assert!(text.contains("Connection: close"), "the second request is HTTP: {text:?}");
}

#[test]
fn json_has_no_raw_control_characters() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    let mut pair = listener.connect();
    pair.request("GET /\u{1b}[31m\0\u{7f} HTTP/1.1\r\nConnection: close\r\n\r\n");
    pair.respond(ok("Connection: close\r\n"));
    let (server, client) = pair.server_closes_first();
    // That its record is one line of JSON is what matters; its request cannot be read, but its response is HTTP.
    let close = tracer.wait_for_close(server, client);
    expect(&close, &json!({ "cause": "unknown", "http": { "target": null, "request_connection": "unobserved" } }));
    tracer.stop();
}

#[test]
fn a_process_that_dies_at_once() {
    let listener = Listener::new();
    let tracer = Tracer::on_port(listener.port);
    // By the time that its record is read there is no such process.
    let script =
        format!("exec 3<>/dev/tcp/127.0.0.1/{}; printf 'GET / HTTP/1.1\\r\\n\\r\\n' >&3; kill -9 $$", listener.port);
    let mut client = Guard(Command::new("bash").args(["-c", &script]).spawn().expect("a shell starts"));
    let (server, port) = listener.accept();
    client.wait();
    drop(server);
    let close = tracer.wait_for_close(port, listener.port);
    expect(&close, &json!({ "role": "client", "process": { "pid": client.id(), "comm": "bash" } }));
    tracer.stop();
}

/// While hooks come and go, connections do, too: a record must not be made of what only some of them saw.
#[test]
fn the_first_and_the_last_connections_are_told_in_full() {
    let listener = Listener::new();
    let mut whole = 0;
    for _ in 0..5 {
        let mut command = tracer();
        command.args(["run", "--json", "--duration", "100ms", "--port", &listener.port.to_string()]);
        let running = std::thread::spawn(move || command.output().expect("it runs"));
        while !running.is_finished() {
            listener.serve_and_close();
        }
        let output = running.join().expect("it ran");
        let text = String::from_utf8_lossy(&output.stdout);
        let events = text.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        for close in events.filter(|event: &Value| event["type"] == "close" && event["started_before"] == false) {
            expect(&close, &json!({ "cause": "request_close", "protocol": "http/1.1", "how": "fin" }));
            whole += 1;
        }
    }
    assert!(whole > 0);
}
