//! Privilege separation: the one process that keeps a privilege while tracing, and what it does for the other.
//!
//! What reads the kernel's records, the peers' bytes in them and everybody's names has no privilege left. Two things need
//! one, again and again: `/proc/<pid>/exe` of other users' processes, and a `sock_diag` socket in another network
//! namespace. A child process, the broker, does these two and nothing else. What comes in: the name of a process, or of a
//! namespace. What goes out: two paths, or a netlink socket. It is started before anything is attached, so it holds
//! nothing of the kernel programs; it ends with tracer; and without it tracer goes on, and shows less.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use log::warn;
use netlink_sys::Socket;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use crate::decode::Task;
use crate::event::Source;
use crate::process::{self, Read};
use crate::sandbox::{self, Part};
use crate::{privileges, time_namespace, time_wait};

/// Name of the hidden subcommand that runs [`serve`].
pub const BROKER: &str = "broker";

/// Bytes of a message: a `cgroup` of [`process::MAX_FILE`] bytes, each escaped.
const MESSAGE: usize = 128 << 10;
/// How long an answer may take; they take some ten microseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for its start.
const START: Duration = Duration::from_secs(30);
/// So many answers in a row that do not come, and it is asked no more.
const SILENT: u32 = 3;

#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    Process { pid: u32, start_ns: u64, comm: [u8; 16] },
    Netlink { netns: u32, pid: Option<u32> },
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It has given up what it does not need.
    Ready,
    Process(Read),
    /// With a descriptor.
    Netlink,
    Failed(String),
}

#[derive(Debug, Serialize, Deserialize)]
struct Message<T> {
    sequence: u64,
    content: T,
}

/// The broker, as seen from tracer.
pub struct Broker {
    link: Mutex<Option<Link>>,
    child: Child,
}

struct Link {
    socket: OwnedFd,
    sequence: u64,
    /// Answers in a row that did not come.
    silent: u32,
}

impl Broker {
    /// Starts it, with what privileges this process has by now, and waits until it has given up those that it does not
    /// need. `confined`: it is to confine itself, see [`sandbox`]. To be called on the main thread: it dies with the thread
    /// that started it.
    ///
    /// # Errors
    /// The binary could not be started again.
    pub fn start(confined: bool) -> Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context("cannot make a socket")?;
        set_socket_timeout(&ours, Timeout::Recv, Some(START))?;
        set_socket_timeout(&ours, Timeout::Send, Some(PATIENCE))?;
        // Not by its path, which may lead to another binary by now, or to none.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("tracer").arg(BROKER);
        if !confined {
            command.arg("--no-sandbox");
        }
        // Ctrl-C is for tracer, and so are stdout and stderr: who reads them waits for the last one who has them open.
        let child = command.process_group(0).stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        // With it goes the other end, so that the broker's end is seen here.
        drop(command);
        let child = child.context("cannot start the process that looks into /proc (/proc/self/exe)")?;
        let mut link = Link { socket: ours, sequence: 0, silent: 0 };
        // From here on its end is waited for.
        let broker = |link| Self { link: Mutex::new(Some(link)), child };
        match link
            .receive()
            .with_context(|| format!("the process that looks into /proc was not ready within {START:?}"))?
            .0
        {
            Answer::Ready => {}
            answer => anyhow::bail!("the process that looks into /proc did not start: {answer:?}"),
        }
        set_socket_timeout(&link.socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(broker(link))
    }

    /// What `/proc` says of a process.
    pub(crate) fn process(&self, task: &Task) -> Read {
        match self.ask(Ask::Process { pid: task.pid, start_ns: task.start_ns, comm: task.comm }) {
            Ok((Answer::Process(read), _)) => read,
            Ok(_) | Err(_) => Read::default(),
        }
    }

    /// A netlink socket for `sock_diag` in a network namespace; `pid`: a process that was in it, if one is known.
    pub(crate) fn netlink(&self, netns: u32, pid: Option<u32>) -> io::Result<Socket> {
        match self.ask(Ask::Netlink { netns, pid })? {
            // SAFETY: the descriptor is ours alone, and nothing has it but the socket from here on.
            (Answer::Netlink, Some(fd)) => Ok(unsafe { Socket::from_raw_fd(fd.into_raw_fd()) }),
            (Answer::Failed(error), _) => Err(io::Error::other(error)),
            _ => Err(time_wait::invalid("an unexpected answer")),
        }
    }

    fn ask(&self, ask: Ask) -> io::Result<(Answer, Option<OwnedFd>)> {
        let mut slot = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let link = slot.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        match link.round_trip(ask) {
            Ok(answer) => {
                link.silent = 0;
                Ok(answer)
            }
            Err(error) => {
                link.silent += 1;
                let silent = error.kind() == io::ErrorKind::WouldBlock && link.silent < SILENT;
                if !silent {
                    warn!(
                        "the process that looks into /proc does not answer ({error}): exe, cgroup and container are not \
                         looked up any more, nor what is left in other network namespaces; start tracer again"
                    );
                    *slot = None;
                }
                Err(error)
            }
        }
    }
}

impl Drop for Broker {
    /// Lets it end, and waits a moment for that; should it hang, it is killed when this process ends.
    fn drop(&mut self) {
        *self.link.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        let until = Instant::now() + Duration::from_millis(200);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Link {
    fn round_trip(&mut self, ask: Ask) -> io::Result<(Answer, Option<OwnedFd>)> {
        self.sequence += 1;
        send(self.socket.as_fd(), &Message { sequence: self.sequence, content: ask }, None)?;
        self.receive()
    }

    /// The answer to the last question; those to earlier ones came too late.
    fn receive(&mut self) -> io::Result<(Answer, Option<OwnedFd>)> {
        let mut buffer = Vec::new();
        loop {
            let (message, fd): (Message<Answer>, _) = match receive(self.socket.as_fd(), &mut buffer)? {
                Some(message) => message,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            };
            if message.sequence == self.sequence {
                return Ok((message.content, fd));
            }
        }
    }
}

fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &Message<T>, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let fds = fd.as_slice();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    // No signal where the other end is gone.
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// `None`: the other end is gone.
fn receive<T: for<'de> Deserialize<'de>>(
    socket: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<(Message<T>, Option<OwnedFd>)>> {
    buffer.resize(MESSAGE, 0);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(time_wait::invalid("a message that is too long"));
    }
    let message = serde_json::from_slice(buffer.get(..received.bytes).unwrap_or_default())?;
    Ok(Some((message, fd)))
}

/// The broker itself: answers what comes over stdin until its other end is gone.
///
/// # Errors
/// It could not give up its privileges, or stdin is not what [`Broker::start`] made.
pub fn serve(confined: bool) -> Result<()> {
    // A service manager signals every process of the service: this one is still needed for what tracer prints last.
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: no handler is installed, and nothing else here deals with signals.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    std::fs::write("/proc/self/comm", "tracer-broker")?;
    // It works little, and a process may be gone before its turn comes. Where that is not allowed it is no harm.
    let _ = rustix::process::setpriority_process(None, -10);
    privileges::leave_root()?;
    privileges::keep_for_broker()?;
    // Sent by who dies: another user's would not be let through. Who becomes another user loses it.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let own = time_wait::own_namespace()?;
    // Asked again with each process that is looked up.
    time_namespace::shifts();
    privileges::seal()?;
    if confined {
        sandbox::confine(Part::Broker)?;
    }
    let stdin = io::stdin();
    let socket = stdin.as_fd();
    send(socket, &Message { sequence: 0, content: Answer::Ready }, None)?;
    let mut buffer = Vec::new();
    while let Some((Message { sequence, content }, _)) = receive(socket, &mut buffer)? {
        let (answer, fd) = answer(content, own);
        send(socket, &Message { sequence, content: answer }, fd.as_ref().map(AsFd::as_fd))?;
    }
    Ok(())
}

fn answer(ask: Ask, own: u32) -> (Answer, Option<Socket>) {
    match ask {
        Ask::Process { pid, start_ns, comm } => {
            let task = Task { pid, start_ns, comm, uid: 0, source: Source::Read };
            (Answer::Process(process::read_of(&task)), None)
        }
        Ask::Netlink { netns, pid } => match time_wait::open_for(own, netns, pid) {
            Ok(socket) => (Answer::Netlink, Some(socket)),
            Err(error) => (Answer::Failed(error.to_string()), None),
        },
    }
}

/// Reads bytes as a message of either kind, as [`receive`] does.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_any(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Message<Ask>>(bytes);
    let _ = serde_json::from_slice::<Message<Answer>>(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("sockets")
    }

    /// A broker that a thread plays.
    fn played(play: impl FnOnce(OwnedFd) + Send + 'static) -> (Broker, std::thread::JoinHandle<()>) {
        let (ours, theirs) = pair();
        set_socket_timeout(&ours, Timeout::Recv, Some(Duration::from_millis(50))).expect("a time-out can be set");
        let link = Link { socket: ours, sequence: 0, silent: 0 };
        let child = Command::new("true").spawn().expect("it starts");
        (Broker { link: Mutex::new(Some(link)), child }, std::thread::spawn(move || play(theirs)))
    }

    fn hear(socket: &OwnedFd) -> Option<u64> {
        let message: Option<(Message<Ask>, _)> = receive(socket.as_fd(), &mut Vec::new()).expect("a message");
        message.map(|(message, _)| message.sequence)
    }

    fn say(socket: &OwnedFd, sequence: u64, text: &str) {
        let content = Answer::Failed(text.to_owned());
        send(socket.as_fd(), &Message { sequence, content }, None).expect("it is open");
    }

    fn asked(broker: &Broker) -> String {
        broker.netlink(1, None).expect_err("there is no such namespace").to_string()
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next_ones() {
        let (broker, thread) = played(|socket| {
            let late = hear(&socket).expect("asked");
            let next = hear(&socket).expect("asked");
            say(&socket, late, "late");
            say(&socket, next, "in time");
        });
        assert_ne!(asked(&broker), "late");
        assert_eq!(asked(&broker), "in time");
        thread.join().expect("it does not panic");
    }

    #[test]
    fn one_that_is_silent_or_gone_is_asked_no_more() {
        let (broker, thread) = played(|socket| {
            let mut heard = 0;
            while hear(&socket).is_some() {
                heard += 1;
            }
            assert_eq!(heard, SILENT);
        });
        for _ in 0..10 {
            asked(&broker);
        }
        thread.join().expect("it was asked as often as that");
        let (broker, thread) = played(drop);
        thread.join().expect("it does not panic");
        assert_eq!(broker.process(&task()), Read::default());
        assert!(broker.link.lock().expect("not poisoned").is_none());
    }

    fn task() -> Task {
        Task { pid: std::process::id(), start_ns: 0, uid: 0, comm: [0; 16], source: Source::Read }
    }

    #[test]
    fn a_descriptor_comes_over() {
        let (ours, theirs) = pair();
        let content = Answer::Netlink;
        send(ours.as_fd(), &Message { sequence: 7, content }, Some(ours.as_fd())).expect("it is open");
        let got: Option<(Message<Answer>, _)> = receive(theirs.as_fd(), &mut Vec::new()).expect("a message");
        let (message, fd) = got.expect("a message");
        assert_eq!((message.sequence, fd.is_some()), (7, true));
    }

    #[test]
    fn the_longest_paths_fit() {
        let (ours, theirs) = pair();
        let path = "\u{1}".repeat(process::MAX_FILE + 4096);
        let content = Answer::Process(Read::of(Some(path.clone()), Some("\u{1}".to_owned())));
        let message = Message { sequence: 1, content };
        let thread = std::thread::spawn(move || send(ours.as_fd(), &message, None));
        let got: io::Result<Option<(Message<Answer>, _)>> = receive(theirs.as_fd(), &mut Vec::new());
        thread.join().expect("it does not panic").expect("sent");
        assert!(matches!(got, Ok(Some((Message { content: Answer::Process(_), .. }, None)))), "{got:?}");
    }
}
