//! Other network namespaces: seen without being asked for, and asked in the right place.

use std::fs::File;
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;

use crate::rig::{Listener, Pair, Tracer, expect, get, is_socket, ok, run};

/// A network namespace of its own with a loopback device, deleted at the end.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new(of: &str) -> Self {
        let name = format!("tracer-{of}-{}", std::process::id());
        let namespace = Self { name };
        run(Command::new("ip").args(["netns", "add", &namespace.name]));
        run(Command::new("ip").args(["-n", &namespace.name, "link", "set", "lo", "up"]));
        namespace
    }

    fn file(&self) -> File {
        File::open(format!("/run/netns/{}", self.name)).expect("it exists")
    }

    /// Runs `inside` in a thread that is in the namespace.
    fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), network).expect("we are root");
                inside()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[test]
fn a_half_close_in_another_namespace() {
    let namespace = Namespace::new("half");
    let inode = namespace.file().metadata().expect("it is a file").ino();
    // The sockets stay in their namespace, wherever they are used.
    let listener = namespace.enter(Listener::new);
    let tracer = Tracer::start(&["--states", "--port", &listener.port.to_string()]);
    let Pair { server, client, server_port, client_port } = namespace.enter(|| {
        let mut pair = listener.connect();
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        pair
    });
    drop(server);
    tracer.wait_for("FIN_WAIT2", |events| {
        let reached = |event| is_socket(event, server_port, client_port) && event["new"] == "FIN_WAIT2";
        events.iter().any(reached).then_some(())
    });
    drop(client);
    let close = tracer.wait_for_close(server_port, client_port);
    expect(
        &close,
        &json!({
            "netns": inode, "role": "server", "closed_by": "local",
            "final": "time_wait", "final_source": "sock_diag", "cause": "request_close",
            "process": { "pid": std::process::id() },
        }),
    );
    tracer.stop();
}

#[test]
fn the_same_ports_in_two_namespaces() {
    let (one, two) = (Namespace::new("one"), Namespace::new("two"));
    let listener = one.enter(Listener::new);
    let tracer = Tracer::on_port(listener.port);
    let other =
        two.enter(|| std::net::TcpListener::bind(("127.0.0.1", listener.port)).expect("it is another namespace"));
    one.enter(|| {
        let mut pair = listener.connect();
        pair.request(get("Connection: close\r\n"));
        pair.respond(ok(""));
        pair.server_closes_first()
    });
    two.enter(|| {
        let client = TcpStream::connect(("127.0.0.1", listener.port)).expect("it listens");
        let (server, _) = other.accept().expect("it was connected");
        drop(client);
        drop(server);
    });
    for (namespace, cause) in [(&one, "request_close"), (&two, "unused")] {
        let inode = namespace.file().metadata().expect("it is a file").ino();
        let closes = tracer.wait_for_closes(2, |close| close["netns"] == inode);
        for close in &closes {
            expect(close, &json!({ "cause": cause }));
        }
    }
    tracer.stop();
}
