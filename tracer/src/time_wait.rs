//! What is left of a connection: asking the kernel by `sock_diag` for one exact mini-socket.
//!
//! What comes in: the 4-tuple, cookie and network namespace of a socket that has ended. What goes out: the state of the
//! mini-socket that it left. The mini-socket keeps the socket's cookie and the kernel compares it, so another connection
//! on the same 4-tuple is never mistaken for this one. It changes nothing, and lets go of a foreign namespace about a
//! second after the last connection there is settled.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, TCP_FIN_WAIT2, TCP_LISTEN, TCP_TIME_WAIT};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::broker::Broker;

/// One socket that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Inode number of its network namespace.
    pub netns: u32,
    /// A process that was in that namespace, if one is known.
    pub pid: Option<u32>,
    /// Local address and port.
    pub local: SocketAddr,
    /// Remote address and port.
    pub remote: SocketAddr,
    /// The device it was bound to; 0: none.
    pub bound_dev: u32,
    /// Its cookie.
    pub cookie: u64,
}

/// What is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A TIME_WAIT mini-socket.
    TimeWait,
    /// A FIN_WAIT2 mini-socket, which will be given up after this time.
    FinWait2(Duration),
    /// The full socket, in whatever state: it has not ended after all.
    Alive,
    /// Nothing.
    Gone,
    /// Nothing: another socket has its addresses by now.
    Replaced,
    /// The kernel could not be asked.
    Unknown,
}

/// `INET_DIAG_NOCOOKIE`, twice.
const ANY_COOKIE: u64 = u64::MAX;

/// How many network namespaces are held at once.
const NAMESPACES: usize = 64;

/// Asks, with a netlink socket for each network namespace.
pub struct SockDiag {
    /// The namespace of tracer.
    own: u32,
    /// Netlink sockets by namespace; `None`: it could not be entered.
    sockets: HashMap<u32, Option<Socket>>,
    /// Opens them, if this process may not itself.
    broker: Option<Arc<Broker>>,
    sequence: u32,
    buffer: Vec<u8>,
    /// The kernel answers such questions at all.
    answers: bool,
    /// Answers instead of the kernel's.
    #[cfg(any(test, feature = "fuzzing"))]
    script: Option<std::collections::VecDeque<Answer>>,
}

impl SockDiag {
    /// Prepares; opens nothing yet.
    ///
    /// # Errors
    /// The own namespace is not known: `/proc` is not mounted.
    pub fn new() -> io::Result<Self> {
        let own = own_namespace()?;
        Ok(Self { own, buffer: vec![0; 4096], answers: true, ..Self::unable() })
    }

    /// The same, with sockets that the broker opens.
    ///
    /// # Errors
    /// As [`SockDiag::new`].
    pub fn by(broker: Arc<Broker>) -> io::Result<Self> {
        Ok(Self { broker: Some(broker), ..Self::new()? })
    }

    /// One that knows no namespace, not even its own: every answer will be [`Answer::Unknown`].
    pub fn unable() -> Self {
        Self {
            own: 0,
            sockets: HashMap::new(),
            sequence: 0,
            buffer: Vec::new(),
            answers: false,
            broker: None,
            #[cfg(any(test, feature = "fuzzing"))]
            script: None,
        }
    }

    /// One that answers with these, in order, and asks nobody.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn scripted(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self { script: Some(answers.into_iter().collect()), ..Self::unable() }
    }

    /// Finds out whether the kernel answers such questions at all: without its module it says "no such socket" to each. If
    /// it does not, every answer will be [`Answer::Unknown`].
    ///
    /// # Errors
    /// It does not.
    pub fn probe(&mut self) -> io::Result<()> {
        let probed = Self::walk_nothing();
        self.answers = probed.is_ok() && self.own != 0;
        probed
    }

    fn walk_nothing() -> io::Result<()> {
        let socket = open()?;
        let mut buffer = vec![0; 4096];
        // A walk over no state at all.
        let request = request(AF_INET, StateFlags::empty(), SocketId::new_v4());
        let reply = round_trip(&socket, NLM_F_REQUEST | NLM_F_DUMP, 1, request, &mut buffer)?;
        let message =
            NetlinkMessage::<SockDiagMessage>::deserialize(reply).map_err(|error| invalid(&error.to_string()))?;
        match message.payload {
            NetlinkPayload::Done(_) => Ok(()),
            NetlinkPayload::Error(error) => Err(refused(error.raw_code())),
            _ => Err(invalid("an unexpected message")),
        }
    }

    /// Asks for one socket. Takes some ten microseconds; the first question in another namespace some more.
    pub fn ask(&mut self, question: &Question) -> Answer {
        #[cfg(any(test, feature = "fuzzing"))]
        if let Some(script) = &mut self.script {
            return script.pop_front().unwrap_or(Answer::Unknown);
        }
        if !self.answers {
            return Answer::Unknown;
        }
        if !self.sockets.contains_key(&question.netns) {
            if self.sockets.len() >= NAMESPACES {
                self.release(|_| false);
            }
            let (netns, pid) = (question.netns, question.pid);
            let socket = match &self.broker {
                Some(broker) => broker.netlink(netns, pid),
                None => open_for(self.own, netns, pid),
            };
            if let Err(error) = &socket {
                log::debug!("network namespace {}: {error}", question.netns);
            }
            // That its own could not be had, which is never let go, was for the moment.
            if socket.is_ok() || question.netns != self.own {
                self.sockets.insert(question.netns, socket.ok());
            }
        }
        let Some(Some(socket)) = self.sockets.get(&question.netns) else { return Answer::Unknown };
        let mut ask = |cookie| {
            self.sequence = self.sequence.wrapping_add(1);
            exchange(socket, self.sequence, question, cookie, &mut self.buffer)
        };
        let answer = match ask(question.cookie) {
            // The kernel does not say which it is: is there another?
            Ok(Answer::Gone) => match ask(ANY_COOKIE) {
                Ok(Answer::Gone) => Ok(Answer::Gone),
                Ok(_) => Ok(Answer::Replaced),
                Err(error) => Err(error),
            },
            answer => answer,
        };
        match answer {
            Ok(answer) => answer,
            Err(error) => {
                log::debug!("sock_diag: {error}");
                // A late answer must not be taken for the next one's.
                self.sockets.remove(&question.netns);
                Answer::Unknown
            }
        }
    }

    /// Whether another namespace than tracer's own is held, or known not to be enterable.
    pub fn holds_foreign(&self) -> bool {
        self.sockets.keys().any(|netns| *netns != self.own)
    }

    /// Lets go of the namespaces that are not needed any more.
    pub fn release(&mut self, needed: impl Fn(u32) -> bool) {
        let own = self.own;
        self.sockets.retain(|netns, _| *netns == own || needed(*netns));
    }
}

fn inode(path: &PathBuf) -> Option<u32> {
    u32::try_from(fs::metadata(path).ok()?.ino()).ok()
}

/// Opens a netlink socket that asks in the network namespace of the calling thread.
///
/// # Errors
/// Those of the system calls.
pub(crate) fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    // The kernel answers within the request; this is for what cannot happen.
    let timeout = Some(Duration::from_millis(200));
    rustix::net::sockopt::set_socket_timeout(socket.as_fd(), rustix::net::sockopt::Timeout::Recv, timeout)?;
    Ok(socket)
}

/// The network namespace of this process.
pub(crate) fn own_namespace() -> io::Result<u32> {
    inode(&PathBuf::from("/proc/self/ns/net"))
        .ok_or_else(|| io::Error::other("cannot read /proc/self/ns/net: is /proc mounted?"))
}

/// Opens a netlink socket in a namespace; `own` is the one that this thread is in, and stays in.
pub(crate) fn open_for(own: u32, netns: u32, pid: Option<u32>) -> io::Result<Socket> {
    if netns == own { open() } else { open_in(netns, pid) }
}

/// Opens a netlink socket in another namespace; this thread stays where it is.
fn open_in(netns: u32, pid: Option<u32>) -> io::Result<Socket> {
    let file = find(netns, pid).ok_or_else(|| io::Error::other("no process and no name of it is left"))?;
    inside(file, open)
}

/// Runs something in another namespace, in a thread of its own, which ends there.
///
/// # Errors
/// It cannot be entered (without `CAP_SYS_ADMIN`: `EPERM`), or those of `work`.
pub(crate) fn inside<T: Send + 'static>(
    namespace: File,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })?
        .join()
        .map_err(|_| io::Error::other("the thread that entered the namespace panicked"))?
}

fn of_process(pid: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/net"))
}

/// What the network namespaces can be entered by: names given by `ip netns`, and processes. Many are the same.
pub(crate) fn namespaces() -> impl Iterator<Item = PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.bytes().all(|byte| byte.is_ascii_digit()).then(|| of_process(&name))
    });
    let named = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    named.chain(processes)
}

/// Finds a namespace by its inode: through the process that is known, any other, or a name.
fn find(netns: u32, pid: Option<u32>) -> Option<File> {
    let known = pid.map(|pid| of_process(&pid.to_string()));
    known.into_iter().chain(namespaces()).find_map(|path| {
        (inode(&path)? == netns).then_some(())?;
        let file = File::open(&path).ok()?;
        // The process may have ended in between, and another taken its id.
        (u32::try_from(file.metadata().ok()?.ino()).ok()? == netns).then_some(file)
    })
}

/// One question, one answer.
fn exchange(
    socket: &Socket,
    sequence: u32,
    question: &Question,
    with_cookie: u64,
    buffer: &mut Vec<u8>,
) -> io::Result<Answer> {
    let id = SocketId {
        source_port: question.local.port(),
        destination_port: question.remote.port(),
        source_address: question.local.ip(),
        destination_address: question.remote.ip(),
        interface_id: question.bound_dev,
        cookie: cookie(with_cookie),
    };
    let family = if question.local.is_ipv4() { AF_INET } else { AF_INET6 };
    let request = request(family, StateFlags::all(), id);
    answer(round_trip(socket, NLM_F_REQUEST, sequence, request, buffer)?, sequence)
}

/// Two words, the low one first: `sock_diag_save_cookie()`.
fn cookie(cookie: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&((cookie & 0xffff_ffff) as u32).to_ne_bytes());
    bytes[4..].copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

/// A question for sockets in these states; `family`: `AF_INET` or `AF_INET6`.
pub(crate) fn request(family: u8, states: StateFlags, socket_id: SocketId) -> SockDiagMessage {
    let extensions = ExtensionFlags::empty();
    SockDiagMessage::InetRequest(InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id })
}

/// Sends a request and receives what comes next.
fn round_trip<'a>(
    socket: &Socket,
    flags: u16,
    sequence: u32,
    request: SockDiagMessage,
    buffer: &'a mut Vec<u8>,
) -> io::Result<&'a [u8]> {
    send(socket, flags, sequence, request, buffer)?;
    let received = socket.recv(&mut &mut buffer[..], 0)?;
    Ok(buffer.get(..received).unwrap_or_default())
}

/// Sends a request; `buffer` holds it meanwhile, and grows if it must.
///
/// # Errors
/// Those of the system call.
pub(crate) fn send(
    socket: &Socket,
    flags: u16,
    sequence: u32,
    request: SockDiagMessage,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, request.into());
    message.finalize();
    let length = message.buffer_len();
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    message.serialize(&mut buffer[..length]);
    socket.send(&buffer[..length], 0).map(|_| ())
}

pub(crate) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// What a negative errno in a reply says. (The crate's own conversion panics, or wraps, for the smallest number.)
pub(crate) fn refused(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code.checked_neg().unwrap_or(i32::MAX))
}

/// Offset of `idiag_expires` in a reply: behind `struct nlmsghdr` and the first members of `struct inet_diag_msg`.
pub(crate) const EXPIRES_AT: usize = 16 + 4 + 48;

/// Reads a reply.
///
/// # Errors
/// It is no reply to `sequence`.
pub(crate) fn answer(reply: &[u8], sequence: u32) -> io::Result<Answer> {
    let message = NetlinkMessage::<SockDiagMessage>::deserialize(reply).map_err(|error| invalid(&error.to_string()))?;
    if message.header.sequence_number != sequence {
        return Err(invalid("a reply to another request"));
    }
    match message.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => Ok(match response.header.state {
            TCP_TIME_WAIT => Answer::TimeWait,
            // Without a cookie the listener answers for a connection that is not there.
            TCP_LISTEN => Answer::Gone,
            // The crate does not keep the time that a mini-socket has left.
            TCP_FIN_WAIT2 if response.header.inode == 0 => {
                let expires = reply.get(EXPIRES_AT..EXPIRES_AT + 4).and_then(|bytes| bytes.try_into().ok());
                let expires = u32::from_ne_bytes(expires.ok_or_else(|| invalid("a short reply"))?);
                Answer::FinWait2(Duration::from_millis(expires.into()))
            }
            _ => Answer::Alive,
        }),
        NetlinkPayload::Error(error) => match error.code.map(|code| code.get().wrapping_neg()) {
            // No such socket; or one on the 4-tuple that has another cookie.
            Some(code)
                if code == rustix::io::Errno::NOENT.raw_os_error()
                    || code == rustix::io::Errno::STALE.raw_os_error() =>
            {
                Ok(Answer::Gone)
            }
            code => Err(invalid(&format!("error {code:?}"))),
        },
        _ => Err(invalid("an unexpected message")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;

    fn question(local: SocketAddr, remote: SocketAddr, cookie: u64) -> Question {
        Question {
            netns: inode(&PathBuf::from("/proc/self/ns/net")).expect("/proc"),
            pid: None,
            local,
            remote,
            bound_dev: 0,
            cookie,
        }
    }

    /// The cookie of a socket, as the kernel tells it.
    fn cookie_of(socket: &TcpStream) -> u64 {
        rustix::net::sockopt::socket_cookie(socket).expect("a socket has a cookie")
    }

    /// As a flood of namespaces would have it: none of them can be entered, which is remembered like a socket.
    #[test]
    fn few_namespaces_are_held() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let own = question(address, address, 1);
        let mut sock_diag = SockDiag::new().expect("/proc");
        sock_diag.probe().expect("the kernel answers");
        assert_eq!(sock_diag.ask(&own), Answer::Gone);
        // The kernel's numbers begin far above.
        for netns in 1..=3 * u32::try_from(NAMESPACES).expect("few") {
            assert_eq!(sock_diag.ask(&Question { netns, ..own.clone() }), Answer::Unknown);
            assert!(sock_diag.sockets.len() <= NAMESPACES, "{} are held", sock_diag.sockets.len());
            assert!(sock_diag.sockets.contains_key(&netns) && sock_diag.sockets.contains_key(&own.netns));
        }
    }

    #[test]
    fn tells_alive_from_half_closed_from_time_wait_from_gone() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (server, _) = listener.accept().expect("it connected");
        let (local, remote) = (server.local_addr().expect("open"), server.peer_addr().expect("open"));
        let asked = question(local, remote, cookie_of(&server));
        let mut sock_diag = SockDiag::new().expect("/proc");
        sock_diag.probe().expect("the kernel answers");
        assert_eq!(sock_diag.ask(&asked), Answer::Alive);
        assert_eq!(
            sock_diag.ask(&Question { cookie: asked.cookie + 1, ..asked.clone() }),
            Answer::Replaced,
            "another's cookie"
        );
        // The segments of the close may be on their way for a moment.
        let mut settled = |passing: fn(Answer) -> bool| {
            let until = std::time::Instant::now() + Duration::from_secs(10);
            loop {
                let answer = sock_diag.ask(&asked);
                if !passing(answer) || std::time::Instant::now() > until {
                    return answer;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        drop(server);
        let half_closed = settled(|answer| answer == Answer::Alive);
        let Answer::FinWait2(left) = half_closed else { panic!("{half_closed:?}") };
        assert!(left > Duration::ZERO && left <= Duration::from_secs(120), "{left:?}");
        drop(client);
        assert_eq!(settled(|answer| matches!(answer, Answer::FinWait2(_))), Answer::TimeWait);
        let other = SocketAddr::new(remote.ip(), remote.port() ^ 1);
        assert_eq!(sock_diag.ask(&Question { remote: other, ..asked }), Answer::Gone);
    }

    #[test]
    fn a_namespace_that_does_not_exist_is_unknown_not_gone() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let mut asked = question(address, address, 1);
        asked.netns = 1;
        assert_eq!(SockDiag::new().expect("/proc").ask(&asked), Answer::Unknown);
    }

    proptest! {
        #[test]
        fn any_reply_is_read_without_a_panic(reply in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = answer(&reply, 1);
        }

        #[test]
        fn any_reply_with_a_good_header_is_read_without_a_panic(
            kind in prop_oneof![Just(20u16), Just(2), Just(3), any::<u16>()],
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut reply = Vec::new();
            reply.extend_from_slice(&u32::try_from(body.len() + 16).expect("small").to_ne_bytes());
            reply.extend_from_slice(&kind.to_ne_bytes());
            reply.extend_from_slice(&[0; 2]);
            reply.extend_from_slice(&1u32.to_ne_bytes());
            reply.extend_from_slice(&[0; 4]);
            reply.extend_from_slice(&body);
            let _ = answer(&reply, 1);
        }
    }
}
