//! The TCP sockets of one network namespace, by a dump of `sock_diag`.
//!
//! What comes in: a netlink socket in the namespace, and the states that are wanted. What goes out: one [`Socket`] each,
//! mini-sockets included, as many as there may be. It only reads, and a reply of any bytes is an error, never a panic.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, SOCK_DIAG_BY_FAMILY, TCP_CLOSE_WAIT, TCP_ESTABLISHED, TCP_FIN_WAIT2, TCP_LISTEN, TCP_TIME_WAIT,
};
use netlink_packet_sock_diag::inet::{SocketId, StateFlags};
use netlink_sys::Socket as Netlink;

use crate::time_wait::{EXPIRES_AT, invalid, refused, request, send};

/// What the kernel writes at once: it makes its messages as large as the reader's buffer, up to this.
const BUFFER: usize = 32 << 10;

/// One TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its state.
    pub state: State,
    /// Local address and port; an IPv4-mapped address is IPv4.
    pub local: SocketAddr,
    /// Remote address and port.
    pub remote: SocketAddr,
    /// Inode number; 0: no process has it any more.
    pub inode: u32,
    /// All that is left of it is a mini-socket.
    pub is_mini: bool,
    /// Of a mini-socket: what is left of its time; of others it means nothing.
    pub expires: Duration,
}

/// The states that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// TIME_WAIT
    TimeWait,
    /// FIN_WAIT2, with a process or without.
    FinWait2,
    /// CLOSE_WAIT
    CloseWait,
    /// ESTABLISHED
    Established,
    /// LISTEN
    Listen,
    /// On the way to one of the others, or to the end.
    Other,
}

/// All connections: every state that has a peer.
pub fn connections() -> StateFlags {
    StateFlags::ESTABLISHED
        | StateFlags::SYN_SENT
        | StateFlags::FIN_WAIT1
        | StateFlags::FIN_WAIT2
        | StateFlags::TIME_WAIT
        | StateFlags::CLOSE_WAIT
        | StateFlags::LAST_ACK
        | StateFlags::CLOSING
}

/// Lists the sockets in these states, of both address families. What is beyond `limit` is only counted: the second
/// value. Takes about a microsecond a socket.
///
/// # Errors
/// The kernel does not answer: its module `tcp_diag` is missing, or a security policy refuses.
pub fn list(netlink: &Netlink, states: &StateFlags, limit: usize) -> io::Result<(Vec<Socket>, u64)> {
    let mut found = Vec::new();
    let mut omitted = 0;
    dump(netlink, states, |replies, sequence| {
        read(replies, sequence, &mut |socket| {
            if found.len() < limit {
                found.push(socket);
            } else {
                omitted += 1;
            }
        })
    })?;
    Ok((found, omitted))
}

/// Has the kernel list all connections but those in TIME_WAIT, of both address families, and looks at none of them.
///
/// # Errors
/// As for [`list`].
pub(crate) fn list_unread(netlink: &Netlink) -> io::Result<()> {
    dump(netlink, &connections().difference(StateFlags::TIME_WAIT), |mut replies, sequence| {
        while let Ok(message) = NetlinkBuffer::new_checked(replies)
            && message.message_type() == SOCK_DIAG_BY_FAMILY
        {
            replies = behind(replies, message.length());
        }
        read(replies, sequence, &mut |_| ())
    })
}

/// Has the kernel list the sockets in these states, of both address families. `read` gets what came at once, and the number of the
/// request; it answers whether the dump has ended.
fn dump(
    netlink: &Netlink,
    states: &StateFlags,
    mut read: impl FnMut(&[u8], u32) -> io::Result<bool>,
) -> io::Result<()> {
    for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let mut buffer = vec![0; BUFFER];
        let sequence = u32::from(family);
        let request = request(family, states.clone(), id);
        send(netlink, NLM_F_REQUEST | NLM_F_DUMP, sequence, request, &mut buffer)?;
        loop {
            let received = netlink.recv(&mut &mut buffer[..], 0)?;
            if read(buffer.get(..received).unwrap_or_default(), sequence)? {
                break;
            }
        }
    }
    Ok(())
}

/// What follows a message of this length: messages begin at multiples of four bytes.
fn behind(replies: &[u8], length: u32) -> &[u8] {
    let length = usize::try_from(length).unwrap_or(usize::MAX).max(16).checked_next_multiple_of(4);
    length.and_then(|length| replies.get(length..)).unwrap_or_default()
}

/// Reads what came at once; answers whether the dump has ended.
pub(crate) fn read(mut replies: &[u8], sequence: u32, found: &mut impl FnMut(Socket)) -> io::Result<bool> {
    while !replies.is_empty() {
        let message =
            NetlinkMessage::<SockDiagMessage>::deserialize(replies).map_err(|error| invalid(&error.to_string()))?;
        if message.header.sequence_number != sequence {
            return Err(invalid("a reply to another request"));
        }
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                let header = &response.header;
                // The crate does not keep the time that a mini-socket has left.
                let expires = replies.get(EXPIRES_AT..EXPIRES_AT + 4).and_then(|bytes| bytes.try_into().ok());
                let expires = u32::from_ne_bytes(expires.ok_or_else(|| invalid("a short reply"))?);
                found(Socket {
                    state: match header.state {
                        TCP_TIME_WAIT => State::TimeWait,
                        TCP_FIN_WAIT2 => State::FinWait2,
                        TCP_CLOSE_WAIT => State::CloseWait,
                        TCP_ESTABLISHED => State::Established,
                        TCP_LISTEN => State::Listen,
                        _ => State::Other,
                    },
                    local: address(header.socket_id.source_address, header.socket_id.source_port),
                    remote: address(header.socket_id.destination_address, header.socket_id.destination_port),
                    inode: header.inode,
                    // The timer of a mini-socket has a number of its own, whatever its state.
                    is_mini: header.timer == Some(netlink_packet_sock_diag::inet::Timer::TimeWait),
                    expires: Duration::from_millis(expires.into()),
                });
            }
            NetlinkPayload::Done(done) if done.code == 0 => return Ok(true),
            NetlinkPayload::Done(done) => return Err(refused(done.code)),
            NetlinkPayload::Error(error) => return Err(refused(error.raw_code())),
            _ => return Err(invalid("an unexpected message")),
        }
        replies = behind(replies, message.header.length);
    }
    Ok(false)
}

fn address(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;
    use crate::time_wait::open;

    /// The sockets between these two ports, in whatever order.
    fn between(port: u16, other: u16) -> Vec<Socket> {
        let netlink = open().expect("a netlink socket");
        let (all, omitted) = list(&netlink, &connections(), usize::MAX).expect("the kernel answers");
        assert_eq!(omitted, 0);
        all.into_iter()
            .filter(|socket| {
                let ports = (socket.local.port(), socket.remote.port());
                ports == (port, other) || ports == (other, port)
            })
            .collect()
    }

    #[test]
    fn lists_both_families_and_what_becomes_of_a_connection() {
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let listener = TcpListener::bind((ip, 0)).expect("a port");
            let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
            let (server, peer) = listener.accept().expect("it connected");
            let (port, other) = (listener.local_addr().expect("bound").port(), peer.port());
            let open = between(port, other);
            assert_eq!(open.len(), 2, "{open:?}");
            assert!(open.iter().all(|one| one.state == State::Established && one.inode != 0 && !one.is_mini));
            assert!(open.iter().all(|one| one.local.ip() == ip && one.remote.ip() == ip), "{open:?}");
            drop(server);
            drop(client);
            let until = std::time::Instant::now() + Duration::from_secs(10);
            let left = loop {
                let left = between(port, other);
                if matches!(&left[..], [one] if one.state == State::TimeWait) || std::time::Instant::now() > until {
                    break left;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            let [one] = &left[..] else { panic!("{left:?}") };
            assert!(one.state == State::TimeWait && one.is_mini && one.inode == 0, "{one:?}");
            assert!(one.expires > Duration::from_secs(45) && one.expires <= Duration::from_secs(60), "{one:?}");
            let netlink = crate::time_wait::open().expect("a netlink socket");
            let (none, omitted) = list(&netlink, &connections(), 0).expect("the kernel answers");
            assert!(none.is_empty() && omitted >= 1, "what is beyond the limit is counted");
        }
    }

    proptest! {
        #[test]
        fn any_reply_is_read_without_a_panic(
            kind in prop_oneof![Just(20u16), Just(2), Just(3), any::<u16>()],
            length in prop_oneof![Just(None), any::<u32>().prop_map(Some)],
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut reply = Vec::new();
            let real = u32::try_from(body.len() + 16).expect("small");
            reply.extend_from_slice(&length.unwrap_or(real).to_ne_bytes());
            reply.extend_from_slice(&kind.to_ne_bytes());
            reply.extend_from_slice(&[0; 2]);
            reply.extend_from_slice(&1u32.to_ne_bytes());
            reply.extend_from_slice(&[0; 4]);
            reply.extend_from_slice(&body);
            let _ = read(&reply, 1, &mut |_| ());
            let _ = read(&body, 1, &mut |_| ());
        }
    }
}
