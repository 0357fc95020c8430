//! Processes that do with sockets what a test tells them: Python scripts, each with a port, that talk with it line by line.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::rig::{PATIENCE, end_of, wait_until};

/// What every script begins with: `say`, `hear`, `listen`, `connect`, `fork` and so on.
const PRELUDE: &str = include_str!("script.py");
/// `REQUEST` of the scripts.
pub(crate) const REQUEST: &[u8] = b"GET /path HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
/// `RESPONSE` of the scripts.
pub(crate) const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A script that runs; it is killed with all its children when it goes out of scope.
pub(crate) struct Script {
    child: Child,
    said: Receiver<String>,
}

impl Script {
    /// Starts a script about connections to or from `port` of the loopback address.
    pub(crate) fn start(port: u16, script: &str) -> Self {
        Self::start_by(Command::new("python3"), port, script)
    }

    /// The same, with `python`, which may be a command that runs it, or in whatever surroundings.
    pub(crate) fn start_by(mut python: Command, port: u16, script: &str) -> Self {
        let mut child = python
            .args(["-c", &format!("{PRELUDE}\n{script}\n"), &port.to_string()])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (say, said) = channel();
        // It ends with the last process that can write.
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| say.send(line)));
        Self { child, said }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    #[track_caller]
    pub(crate) fn hear(&self) -> String {
        self.said.recv_timeout(*PATIENCE).expect("the script says something")
    }

    /// The next line, a number.
    #[track_caller]
    pub(crate) fn hear_number<T: std::str::FromStr>(&self) -> T {
        let line = self.hear();
        line.parse().unwrap_or_else(|_| panic!("{line:?} is not what was expected"))
    }

    /// Waits until it says `word`.
    #[track_caller]
    pub(crate) fn expect(&self, word: &str) {
        assert_eq!(self.hear(), word);
    }

    /// A line for its `hear`.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{line}").expect("it listens");
    }

    /// Waits for its end, which must come and be a success.
    pub(crate) fn ends(&mut self) {
        let mut status = None;
        wait_until("the script to end", || {
            status = self.child.try_wait().expect("it is our child");
            status.is_some()
        });
        assert!(status.is_some_and(|status| status.success()), "the script: {status:?}");
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // They may have ended by themselves.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// A connection to a script's listener, and its own port.
pub(crate) fn connect(port: u16) -> (TcpStream, u16) {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    stream.set_read_timeout(Some(*PATIENCE)).expect("a time-out can be set");
    let own = stream.local_addr().expect("it is connected").port();
    (stream, own)
}

/// One exchange with a script's `serve`, up to its FIN; returns the client's port.
pub(crate) fn exchange(port: u16) -> u16 {
    let (mut stream, own) = connect(port);
    stream.write_all(REQUEST).expect("it is open");
    end_of(&mut stream);
    own
}

/// Reads a request.
pub(crate) fn read_request(stream: &mut TcpStream) {
    stream.read_exact(&mut vec![0; REQUEST.len()]).expect("a request comes");
}
