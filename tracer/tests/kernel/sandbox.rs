//! What Landlock keeps from the process that reads records, apart from the filter of system calls.
//!
//! A file that is opened, a port, a signal: whatever of these the real confinement is asked for, the filter refuses first, with
//! the same error as if there were no Landlock. So one test asks, confined for real, for the two things that the filter lets
//! through and only Landlock forbids: a look at a process outside, by a file of `/proc` that was open before, and a datagram
//! to an abstract socket outside. The other test is about Landlock alone, and asks for all of it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;

use rustix::process::{Pid, test_kill_process};
use tracer::sandbox::{self, Part};

use crate::features::lacks;
use crate::rig::{Guard, Listener, comm_of, wait_until};

/// Whether Landlock's interface is older than this one.
fn lacks_interface(wanted: u32) -> bool {
    let found = sandbox::support().landlock.is_ok_and(|interface| interface >= wanted);
    lacks(&format!("Landlock (interface {wanted})"), found)
}

/// Runs `attempt` in a thread that `restrict` restricts, which nothing can be undone of.
fn restricted<T: Send + 'static>(
    restrict: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    attempt: impl FnOnce() -> T + Send + 'static,
) -> T {
    let thread = std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).expect("the kernel has it");
        restrict().expect("the kernel has it");
        attempt()
    });
    thread.join().expect("it does not panic")
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Where the code of a process begins, by its open `/proc/<pid>/stat`: 1 for who may not look at it (`do_task_stat` of
/// `fs/proc/array.c`), which the kernel asks with each `read`.
fn code_begins(mut stat: &File) -> u64 {
    let mut buffer = [0; 1024];
    let length = stat.read(&mut buffer).expect("it is open");
    let text = String::from_utf8_lossy(&buffer[..length]);
    // The 26th field; two are before the third.
    let (_, fields) = text.rsplit_once(") ").expect("a name");
    fields.split(' ').nth(26 - 3).and_then(|field| field.parse().ok()).expect("a number")
}

/// A process that does nothing, and its `stat`, opened as often as one likes.
struct Outsider(Guard);

impl Outsider {
    fn start() -> Self {
        let outsider = Self(Guard(Command::new("sleep").arg("600").spawn().expect("it starts")));
        // Not before its `exec` is done: until it has its new name its code is ours, and then, for a moment, nowhere.
        wait_until("a process to begin", || comm_of(outsider.0.id()) == "sleep" && code_begins(&outsider.stat()) > 1);
        outsider
    }

    fn stat(&self) -> File {
        File::open(format!("/proc/{}/stat", self.0.id())).expect("it runs")
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed()).expect("a process id")
    }
}

/// An abstract address that no other test has.
fn abstract_address(of: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("tracer-tests-{of}-{}", std::process::id())).expect("it is short")
}

const READERS: [Part; 2] = [Part::Reader { ends_children: false }, Part::Reader { ends_children: true }];

#[test]
fn confined_it_looks_at_nobody_outside() {
    if lacks_interface(1) {
        return;
    }
    let outsider = Outsider::start();
    let truth = code_begins(&outsider.stat());
    // The broker is there to look at others.
    for (part, wanted) in READERS.map(|part| (part, 1)).into_iter().chain([(Part::Broker, truth)]) {
        let stat = outsider.stat();
        let seen = restricted(move || sandbox::confine(part), move || code_begins(&stat));
        assert_eq!(seen, wanted, "{part:?}");
    }
}

#[test]
fn confined_it_sends_nothing_to_abstract_sockets_outside() {
    if lacks_interface(6) {
        return;
    }
    let outside = UnixDatagram::bind_addr(&abstract_address("confined")).expect("nobody has it");
    for part in READERS {
        let sender = UnixDatagram::unbound().expect("a socket");
        let answers = restricted(
            move || sandbox::confine(part),
            move || {
                ["confined", "nobody"].map(|name| errno(sender.send_to_addr(b"from inside", &abstract_address(name))))
            },
        );
        // That nobody has the other address is found out behind the filter, which refuses neither.
        assert_eq!(answers, [Some(libc::EPERM), Some(libc::ECONNREFUSED)], "{part:?}");
    }
    let sender = UnixDatagram::unbound().expect("a socket");
    sender.send_to_addr(b"from outside", &abstract_address("confined")).expect("it is there");
    let mut buffer = [0; 64];
    let length = outside.recv(&mut buffer).expect("it has come");
    assert_eq!(&buffer[..length], b"from outside");
}

#[test]
fn landlock_alone_keeps_files_ports_and_others_from_the_reader() {
    if lacks_interface(1) {
        return;
    }
    let outsider = Outsider::start();
    let listener = Listener::new();
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    fs::write(&file, "content").expect("written");
    let _outside = UnixDatagram::bind_addr(&abstract_address("landlock")).expect("nobody has it");
    for ends_children in [false, true] {
        let (stat, pid, port) = (outsider.stat(), outsider.pid(), listener.port);
        let (path, datagram) = (file.clone(), UnixDatagram::unbound().expect("a socket"));
        let attempts = move || {
            let truncated = {
                let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("no NUL");
                // SAFETY: the path ends with a NUL, and outlives the call.
                let answer = unsafe { libc::truncate(path.as_ptr(), 0) };
                if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            };
            [
                (1, "a file of /proc", errno(File::open("/proc/self/stat"))),
                (1, "a device", errno(File::open("/dev/null"))),
                (1, "a file that is written to", errno(File::options().append(true).open(&path))),
                (1, "a directory", errno(fs::read_dir("/"))),
                (1, "a file that goes", errno(fs::remove_file(&path))),
                (1, "a program", errno(Command::new("true").spawn().map(drop))),
                (1, "a process outside", (code_begins(&stat) == 1).then_some(libc::EACCES)),
                (3, "a file that is cut", errno(truncated)),
                (4, "a port that is listened on", errno(TcpListener::bind(("127.0.0.1", 0)))),
                (4, "a connection", errno(TcpStream::connect(("127.0.0.1", port)))),
                (6, "an abstract socket", errno(datagram.send_to_addr(b"x", &abstract_address("landlock")))),
                (6, "a signal", errno(test_kill_process(pid).map_err(io::Error::from))),
            ]
        };
        for (interface, what, answer) in restricted(move || sandbox::landlock(ends_children), attempts) {
            let wanted = match what {
                "a signal" if ends_children => None,
                "a signal" | "an abstract socket" => Some(libc::EPERM),
                _ => Some(libc::EACCES),
            };
            if answer != wanted && lacks_interface(interface) {
                continue;
            }
            assert_eq!(answer, wanted, "{what}, with ends_children {ends_children}");
        }
    }
    // Before interface 3 it was cut.
    let content = fs::read_to_string(&file).expect("it is there");
    assert!(content == "content" || lacks_interface(3), "{content}");
}
