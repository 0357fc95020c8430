//! A TCP peer that plays segments: the other end of its connections is this kernel's own stack, behind a TUN device in a
//! network namespace of the test. What is sent, twice, late, cut or not at all, is the test's to say.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use crate::rig::{Namespace, PATIENCE, free_port, run, wait_until};

pub(crate) const FIN: u8 = 1 << 0;
pub(crate) const SYN: u8 = 1 << 1;
pub(crate) const RST: u8 = 1 << 2;
pub(crate) const PSH: u8 = 1 << 3;
pub(crate) const ACK: u8 = 1 << 4;
pub(crate) const URG: u8 = 1 << 5;

const TCP: u8 = 6;
const ICMP: u8 = 1;
/// Sequence number of the first byte of payload that a peer sends: near the end, so that they wrap within a test.
pub(crate) const FIRST: u32 = u32::MAX - 300;
/// Maximum segment size 1400.
const MSS: [u8; 4] = [2, 4, 0x05, 0x78];

/// The kernel's and the peer's address.
const V4: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
const V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2)];

/// The wire: a TUN device that is the only way out of a namespace.
pub(crate) struct Wire {
    pub(crate) namespace: Namespace,
    /// The port of peers that are connected to.
    pub(crate) port: u16,
    tun: File,
    v6: bool,
    /// Read from the device, and not asked for yet.
    read: Mutex<VecDeque<(Ports, Segment)>>,
}

/// The kernel's port and the peer's.
type Ports = (u16, u16);

/// A TCP segment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    /// TCP options, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Segment {
    pub(crate) fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// Sequence number behind it.
    fn end(&self) -> u32 {
        let len = u32::try_from(self.payload.len()).expect("segments are small");
        self.seq.wrapping_add(len + u32::from(self.has(FIN)) + u32::from(self.has(SYN)))
    }
}

impl Wire {
    /// For IPv4.
    pub(crate) fn new(of: &str) -> Self {
        Self::of_family(of, false)
    }

    /// For IPv6.
    pub(crate) fn v6(of: &str) -> Self {
        Self::of_family(of, true)
    }

    fn of_family(of: &str, v6: bool) -> Self {
        let namespace = Namespace::new(of);
        let tun = namespace.enter(|| {
            // The device belongs to the namespace that the file was opened in.
            let open = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).expect("a small number"))
                .open("/dev/net/tun");
            open.expect("the kernel has TUN devices")
        });
        create_device(&tun);
        let ip = |args: &[&str]| run(Command::new("ip").args(["-n", &namespace.name]).args(args));
        ip(&["link", "set", "wire", "up"]);
        if v6 {
            ip(&["addr", "add", &format!("{}/64", V6[0]), "dev", "wire", "nodad"]);
        } else {
            ip(&["addr", "add", &format!("{}/24", V4[0]), "dev", "wire"]);
        }
        Self { namespace, port: free_port(), tun, v6, read: Mutex::default() }
    }

    /// Sets a sysctl of the namespace, below `/proc/sys/net`.
    pub(crate) fn sysctl(&self, name: &str, value: &str) {
        let set = || std::fs::write(format!("/proc/sys/net/{name}"), value);
        self.namespace.enter(set).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// The kernel's address and the peer's.
    fn addresses(&self) -> [IpAddr; 2] {
        if self.v6 { V6.map(Into::into) } else { V4.map(Into::into) }
    }

    /// A listening socket of the kernel's end.
    pub(crate) fn listen(&self) -> (TcpListener, u16) {
        let (port, [host, _]) = (free_port(), self.addresses());
        (self.namespace.enter(|| TcpListener::bind((host, port)).expect("the namespace is ours")), port)
    }

    /// A peer that will connect to a port of the kernel's end.
    pub(crate) fn client(&self, host_port: u16) -> Peer<'_> {
        Peer::new(self, host_port, free_port())
    }

    /// The kernel's end starts to connect: its socket, which is non-blocking, and the peer, which has read the SYN.
    pub(crate) fn connecting(&self) -> (TcpStream, Peer<'_>) {
        let (port, [_, to]) = (self.port, self.addresses());
        let family = if self.v6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let create = || socket_with(family, SocketType::STREAM, flags, None).expect("TCP is there");
        let stream = TcpStream::from(self.namespace.enter(create));
        let pending = connect(&stream, &SocketAddr::new(to, port));
        assert_eq!(pending, Err(Errno::INPROGRESS));
        let host_port = stream.local_addr().expect("it has a port").port();
        let mut peer = Peer::new(self, host_port, port);
        let syn = peer.wait_for("a SYN", |segment| segment.has(SYN));
        peer.ack = syn.end();
        (stream, peer)
    }

    /// A connection that the kernel's end opened.
    pub(crate) fn connected(&self) -> (TcpStream, Peer<'_>) {
        let (stream, mut peer) = self.connecting();
        peer.shake(&stream);
        (stream, peer)
    }

    /// A connection that the peer opened.
    pub(crate) fn accepted(&self, listener: &TcpListener) -> (TcpStream, Peer<'_>) {
        let mut peer = self.client(listener.local_addr().expect("it has one").port());
        peer.open();
        peer.acknowledge();
        (accept(listener), peer)
    }

    fn write(&self, packet: &[u8]) {
        let n = (&self.tun).write(packet).expect("the device is up");
        assert_eq!(n, packet.len());
    }

    /// Forgets all that the kernel has sent and nobody has asked for.
    pub(crate) fn discard(&self) {
        self.read().clear();
    }

    /// The next segment that the kernel sent from and to these ports, if there is one.
    fn next(&self, ports: Ports) -> Option<Segment> {
        let mut read = self.read();
        let at = read.iter().position(|(found, _)| *found == ports)?;
        read.remove(at).map(|(_, segment)| segment)
    }

    /// What was not asked for yet, with all that the device has.
    fn read(&self) -> MutexGuard<'_, VecDeque<(Ports, Segment)>> {
        let mut read = self.read.lock().expect("no reader panics");
        let mut packet = [0; 65536];
        loop {
            match (&self.tun).read(&mut packet) {
                Ok(n) => read.extend(parse(&packet[..n])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        read
    }
}

/// Makes the TUN device `wire`, without a packet information header.
fn create_device(tun: &File) {
    const TUNSETIFF: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
    const IFF_TUN: u16 = 0x0001;
    const IFF_NO_PI: u16 = 0x1000;
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    let mut name = [0; 16];
    name[..4].copy_from_slice(b"wire");
    let request = Request { name, flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    // SAFETY: `Request` is laid out as the `struct ifreq` that this operation reads and writes.
    let made = unsafe { rustix::ioctl::ioctl(tun, rustix::ioctl::Updater::<TUNSETIFF, _>::new(&mut { request })) };
    made.expect("we are root");
}

/// A connection that is waiting to be accepted.
pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).expect("it can be set");
    let mut accepted = None;
    wait_until("a connection to accept", || {
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (stream, _) = accepted.expect("just seen");
    ready(&stream);
    stream
}

fn ready(stream: &TcpStream) {
    stream.set_nonblocking(false).expect("it can be set");
    stream.set_read_timeout(Some(*PATIENCE)).expect("it can be set");
    stream.set_nodelay(true).expect("it can be set");
}

/// Sets an option that is an `int`, one of those that the standard library does not know.
pub(crate) fn set_option(socket: impl AsFd, level: i32, name: i32, value: i32) {
    let size = libc::socklen_t::try_from(size_of::<i32>()).expect("four");
    // SAFETY: the value lives until the call returns.
    let set = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), size) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// Reads so many bytes.
pub(crate) fn receive(stream: &mut TcpStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    stream.read_exact(&mut bytes).expect("the peer sent them");
    bytes
}

/// One end of one connection, played by the test.
pub(crate) struct Peer<'a> {
    wire: &'a Wire,
    pub(crate) host_port: u16,
    pub(crate) port: u16,
    /// The next sequence number that it expects, and so acknowledges.
    pub(crate) ack: u32,
    /// What the kernel's end acknowledged last, and the window that it gave.
    acknowledged: u32,
    host_window: u16,
    pub(crate) window: u16,
    /// TCP options of every segment but a SYN.
    pub(crate) options: Vec<u8>,
    /// What stands between IP and TCP: IPv4 options, or IPv6 extension headers, the number of the first with them.
    pub(crate) between: (u8, Vec<u8>),
}

impl<'a> Peer<'a> {
    fn new(wire: &'a Wire, host_port: u16, port: u16) -> Self {
        let (options, between) = (Vec::new(), (TCP, Vec::new()));
        Self { wire, host_port, port, ack: 0, acknowledged: FIRST, host_window: 0, window: 65000, options, between }
    }

    /// An empty segment at the byte `at` of what the peer sends.
    pub(crate) fn at(&self, at: i32) -> Segment {
        let seq = FIRST.wrapping_add_signed(at);
        let options = self.options.clone();
        Segment { seq, ack: self.ack, flags: ACK, window: self.window, options, ..Segment::default() }
    }

    /// Sends payload that begins at the byte `at` of what the peer sends.
    pub(crate) fn data(&self, at: i32, payload: impl AsRef<[u8]>) {
        self.send(Segment { flags: ACK | PSH, payload: payload.as_ref().to_vec(), ..self.at(at) });
    }

    /// Sends a FIN behind the byte `at`.
    pub(crate) fn fin(&self, at: i32) {
        self.send(Segment { flags: ACK | FIN, ..self.at(at) });
    }

    /// Sends a RST whose sequence number is that of the byte `at`.
    pub(crate) fn rst(&self, at: i32) {
        self.send(Segment { flags: ACK | RST, ..self.at(at) });
    }

    /// Sends an ACK of all that was received, from the byte 0.
    pub(crate) fn acknowledge(&self) {
        self.acknowledge_at(0);
    }

    /// Likewise, after having sent `at` bytes.
    pub(crate) fn acknowledge_at(&self, at: i32) {
        self.send(self.at(at));
    }

    /// Sends a SYN and waits for its answer; the handshake is not complete yet.
    pub(crate) fn open(&mut self) {
        self.send(Segment { flags: SYN, options: MSS.to_vec(), ..self.at(-1) });
        let answer = self.wait_for("a SYN-ACK", |segment| segment.has(SYN | ACK));
        self.ack = answer.end();
    }

    /// Answers the SYN of a socket that connects.
    pub(crate) fn shake(&mut self, stream: &TcpStream) {
        self.send(Segment { flags: SYN | ACK, options: MSS.to_vec(), ..self.at(-1) });
        self.wait_for("the ACK that completes the handshake", |segment| segment.has(ACK) && !segment.has(RST));
        ready(stream);
    }

    /// How many bytes of payload the kernel's end has acknowledged.
    pub(crate) fn acknowledged(&self) -> u32 {
        self.acknowledged.wrapping_sub(FIRST)
    }

    /// The window that it gave with that.
    pub(crate) fn window_of_host(&self) -> usize {
        usize::from(self.host_window)
    }

    /// Sends one segment as it is.
    pub(crate) fn send(&self, segment: Segment) {
        self.wire.write(&self.packet(&segment));
    }

    /// The packet of a segment.
    pub(crate) fn packet(&self, segment: &Segment) -> Vec<u8> {
        assert!(segment.options.len().is_multiple_of(4) && segment.options.len() <= 40);
        let mut tcp = Vec::new();
        tcp.extend(self.port.to_be_bytes());
        tcp.extend(self.host_port.to_be_bytes());
        tcp.extend(segment.seq.to_be_bytes());
        tcp.extend(segment.ack.to_be_bytes());
        tcp.push(u8::try_from((20 + segment.options.len()) / 4).expect("checked") << 4);
        tcp.push(segment.flags);
        tcp.extend(segment.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(segment.urgent.to_be_bytes());
        tcp.extend(&segment.options);
        tcp.extend(&segment.payload);
        let [host, peer] = self.wire.addresses();
        let sum = checksum(&[&octets(peer), &octets(host), &[0, TCP], &length(tcp.len()), &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        self.ip(TCP, &tcp)
    }

    /// What ICMP says when a router has dropped what the kernel sent last: type 3 with this code.
    pub(crate) fn unreachable(&self, code: u8) {
        let [host, peer] = self.wire.addresses();
        let mut icmp = vec![3, code, 0, 0, 0, 0, 0, 0];
        // The beginning of the packet that is spoken of: the kernel sent it.
        icmp.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0]);
        icmp.extend([octets(host), octets(peer)].concat());
        icmp.extend(self.host_port.to_be_bytes());
        icmp.extend(self.port.to_be_bytes());
        // It must lie in what is not acknowledged yet.
        icmp.extend(self.ack.to_be_bytes());
        let sum = checksum(&[&icmp]);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        self.wire.write(&self.ip(ICMP, &icmp));
    }

    /// Puts the IP header in front.
    fn ip(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let [host, peer] = self.wire.addresses();
        let (first, between) = &self.between;
        let len = length(between.len() + payload.len());
        let mut packet = if self.wire.v6 {
            [&[0x60, 0, 0, 0], &len[..], &[*first, 64]].concat()
        } else {
            let words = u8::try_from(5 + between.len() / 4).expect("options are short");
            [&[0x40 | words, 0], &length(20 + between.len() + payload.len())[..], &[0, 0, 0x40, 0, 64, protocol, 0, 0]]
                .concat()
        };
        packet.extend([octets(peer), octets(host)].concat());
        packet.extend(between);
        if !self.wire.v6 {
            let sum = checksum(&[&packet]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    /// Puts a packet on the wire.
    pub(crate) fn write(&self, packet: &[u8]) {
        self.wire.write(packet);
    }

    /// The next segment from the kernel, if there is one.
    pub(crate) fn next(&mut self) -> Option<Segment> {
        let segment = self.wire.next((self.host_port, self.port))?;
        if segment.seq == self.ack && !segment.has(SYN) {
            self.ack = segment.end();
        }
        if segment.has(ACK) && !segment.has(RST) {
            (self.acknowledged, self.host_window) = (segment.ack, segment.window);
        }
        Some(segment)
    }

    /// Waits for a segment that `wanted` holds for; those before it are passed over, but acknowledged with the next
    /// segment that is sent if they came in order.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, what: &str, wanted: impl Fn(&Segment) -> bool) -> Segment {
        let mut found = None;
        wait_until(what, || {
            found = self.next().filter(|segment| wanted(segment));
            found.is_some()
        });
        found.expect("just seen")
    }

    /// Reads payload up to `n` bytes behind `self.ack` as it is now.
    #[track_caller]
    pub(crate) fn receive(&mut self, n: usize) {
        let end = self.ack.wrapping_add(u32::try_from(n).expect("tests send little"));
        wait_until("payload from the kernel", || {
            while self.ack != end && self.next().is_some() {}
            self.ack == end
        });
    }
}

fn length(n: usize) -> [u8; 2] {
    u16::try_from(n).expect("packets are small").to_be_bytes()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The Internet checksum (RFC 1071); each part but the last has an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// A TCP segment that the kernel sent. (Other packets, as those of IPv6's neighbour discovery, are none.)
fn parse(packet: &[u8]) -> Option<(Ports, Segment)> {
    let tcp = match packet[0] >> 4 {
        4 if packet[9] == TCP => &packet[usize::from(packet[0] & 15) * 4..],
        6 if packet[6] == TCP => &packet[40..],
        _ => return None,
    };
    let half = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    let word = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
    let payload_at = usize::from(tcp[12] >> 4) * 4;
    let segment = Segment {
        seq: word(4),
        ack: word(8),
        flags: tcp[13],
        window: half(14),
        urgent: half(18),
        options: tcp[20..payload_at].to_vec(),
        payload: tcp[payload_at..].to_vec(),
    };
    Some(((half(0), half(2)), segment))
}
