//! Names that others chose: whatever a process calls itself, its file or its cgroup, no output does anything but show it.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harmless::is_harmless;
use crate::names::Cgroup;
use crate::privacy::Printing;
use crate::rig::{Guard, Listener, Namespace, copy_executable, expect, is_socket, ok, run, tracer, wait_until};

/// An escape sequence, quotes, bidirectional controls, C1 and an element.
const ODD: &str = "\u{1b}[2J\"'\\\u{9b}31m\u{202e}\u{2066}\u{200b}{}<script src=x>&";

#[test]
fn names_do_nothing_to_a_terminal_to_json_nor_to_a_page() {
    let listener = Listener::new();
    let directory = tempfile::tempdir().expect("a directory");
    let cgroup = Cgroup::new(&format!("{ODD}{}", std::process::id()));
    // A path may hold line ends, a cgroup's may not. Its first 15 bytes become the process's name.
    let comm = "\u{1b}[2J\"\nFO\u{202e}X'\\x";
    let exe = directory.path().join(format!("{comm}{ODD}"));
    copy_executable(fs::canonicalize("/bin/bash").expect("bash"), &exe);
    fs::set_permissions(&exe, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let recording = directory.path().join("recording");
    let record = ["--record", recording.to_str().expect("UTF-8")];
    let outputs = [&[][..], &["--states"], &["--json"], &["--json", "--states"], &record]
        .map(|options| Printing::start(directory.path(), listener.port, options));

    let script = r#"
        echo $$ > "$1/cgroup.procs"
        exec 3<> /dev/tcp/127.0.0.1/$2
        printf 'GET /end HTTP/1.1\r\nConnection: close\r\n\r\n' >&3
        while read -r line <&3; do :; done
        exec 3>&-
        read -r line"#;
    let mut bash = Command::new(&exe);
    bash.args(["-c", script, "bash"]).arg(&cgroup.0).arg(listener.port.to_string()).stdin(Stdio::piped());
    let mut client = Guard(bash.spawn().expect("it starts"));
    let (mut server, port) = listener.accept();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        server.read_exact(&mut byte).expect("it asks");
        head.push(byte[0]);
    }
    server.write_all(ok("Connection: close\r\n").as_bytes()).expect("it is open");
    drop(server);

    let closes = |output: &Printing| {
        let printed = String::from_utf8(output.printed()).expect("UTF-8");
        printed.lines().filter(|line| line.contains("/end") && line.contains(&port.to_string())).count()
    };
    wait_until("both ends", || outputs.iter().all(|output| closes(output) >= 2));
    drop(client.0.stdin.take());
    client.wait();
    for output in outputs {
        let name = output.stdout.clone();
        let printed = String::from_utf8(output.stop()).expect("UTF-8");
        assert!(is_harmless(&printed), "{name:?}: {printed:?}");
        assert!(printed.lines().all(|line| !line.starts_with("FO")), "{name:?}: {printed:?}");
        if !name.to_string_lossy().contains("json") {
            assert!(printed.contains(r#"\x1b[2J""#), "the name is shown, escaped: {printed:?}");
            continue;
        }
        let events = printed.lines().filter(|line| line.starts_with('{'));
        let events: Vec<Value> = events.map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let close = events.iter().find(|event| event["type"] == "close" && is_socket(event, port, listener.port));
        let close = close.expect("its record");
        let path = close["process"]["cgroup"].as_str().expect("a cgroup");
        assert!(path.ends_with(cgroup.0.file_name().and_then(|name| name.to_str()).expect("UTF-8")), "{path:?}");
        expect(close, &json!({ "process": { "comm": comm, "exe": exe.to_string_lossy(), "cgroup": path } }));
    }
    let page = directory.path().join("page.html");
    run(tracer().args(["report", "--html"]).args([&page, &recording]));
    let page = fs::read_to_string(page).expect("UTF-8");
    assert!(is_harmless(&page), "{page:?}");
    assert!(page.contains(r#"\x1b[2J"#) && page.contains(&port.to_string()), "the name is shown, escaped: {page}");
    assert_eq!(page.matches("<script").count(), 1, "its own: {page}");
}

/// A mount point may have any bytes, and users may mount (FUSE).
#[test]
fn a_mount_point_that_is_no_text_hides_no_namespace() {
    let namespace = Namespace::new("mounts");
    let directory = tempfile::tempdir().expect("a directory");
    let odd = directory.path().join(OsStr::from_bytes(b"\xff\xfe\x1b[2J"));
    fs::create_dir(&odd).expect("it is ours");
    // In a mount namespace that ends with it.
    let script = r#"mount -t tmpfs none "$1" && exec "$2" snapshot --json"#;
    let mut snapshot = Command::new("unshare");
    snapshot.args(["--mount", "sh", "-c", script, "sh"]).arg(&odd).arg(env!("CARGO_BIN_EXE_tracer"));
    let snapshot: Value = serde_json::from_str(&run(&mut snapshot)).expect("JSON");
    let namespaces = snapshot["namespaces"].as_array().expect("a list");
    assert!(namespaces.iter().any(|known| known["name"] == namespace.name.as_str()), "{namespaces:#?}");
}
