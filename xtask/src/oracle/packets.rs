//! The witness: a capture in, what happened on the wire of each connection out.
//!
//! `tshark` decodes the packets; nothing here shares code with tracer. Each end is judged by the capture of its own side:
//! what a capture shows is what left or reached that end, in that order.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

const FIN: u16 = 1 << 0;
const SYN: u16 = 1 << 1;
const RST: u16 = 1 << 2;
const ACK: u16 = 1 << 4;

/// The fields that `tshark` prints, in this order.
const FIELDS: [&str; 11] = [
    "frame.time_epoch",
    "ip.src",
    "ipv6.src",
    "ip.dst",
    "ipv6.dst",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.flags",
    "tcp.seq_raw",
    "tcp.ack_raw",
    "tcp.payload",
];
/// Likewise of the packets in which a message ends.
const MESSAGE_FIELDS: [&str; 4] = ["frame.number", "http.request.method", "http.request.uri", "http.response.code"];

/// One TCP segment.
#[derive(Debug)]
struct Segment {
    /// When it was captured.
    time_us: u64,
    from: SocketAddr,
    to: SocketAddr,
    flags: u16,
    seq: u32,
    ack: u32,
    payload: Vec<u8>,
    /// The HTTP messages that `tshark` saw end here.
    messages: Vec<Message>,
}

/// An HTTP message, as `tshark` dissects it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Method and target.
    Request(String, String),
    /// Status.
    Response(u16),
}

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It sent the SYN.
    Client,
    /// It answered it.
    Server,
}

impl End {
    /// The other one.
    pub(crate) const fn peer(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// What one end sent.
#[derive(Debug, Default)]
pub(crate) struct Half {
    /// The sequence number of its SYN.
    isn: Option<u32>,
    /// Payload in order, as far as there is no gap.
    pub(crate) stream: Vec<u8>,
    /// Lengths of `stream` after each segment that made it longer.
    pub(crate) boundaries: Vec<usize>,
    /// What `tshark` makes of it.
    pub(crate) messages: Vec<Message>,
    /// Segments that came before the ones in front of them.
    early: Vec<(u32, Vec<u8>)>,
    /// Payload that came more than once, early, or not at all: there was loss or disorder.
    pub(crate) disorder: bool,
    /// Payload bytes that the other end has acknowledged.
    pub(crate) acknowledged: usize,
    /// The other end's acknowledgement covers the FIN.
    pub(crate) fin_acknowledged: bool,
    pub(crate) fin: Option<EndSegment>,
    pub(crate) rst: Option<EndSegment>,
}

/// A FIN or RST.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndSegment {
    /// Its place in the capture.
    at: usize,
    /// How many bytes of the sender's stream are before it.
    offset: u32,
    /// What it acknowledges of the other end's sequence numbers, from the ISN on; `None`: nothing (no ACK flag).
    ack: Option<u32>,
}

/// One connection, as one capture shows it.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
    from_client: Half,
    from_server: Half,
    /// The server answered the SYN.
    pub(crate) answered: bool,
    /// New payload before the first FIN or RST, and that: when, and who sent it.
    payload: Vec<(u64, End)>,
    ended: Option<(u64, End)>,
}

impl Connection {
    /// From the last payload to the first FIN or RST: what this may be to `end`. If that has ended the connection, then what the
    /// capture shows up to `slack_us` before may have come to its socket only after that.
    pub(crate) fn idle_us(&self, end: End, slack_us: u64) -> Vec<u64> {
        let mut idle_us = Vec::new();
        let Some((ended_us, by)) = self.ended else { return idle_us };
        for (at_us, from) in self.payload.iter().rev() {
            let idle = ended_us.saturating_sub(*at_us);
            idle_us.push(idle);
            if by != end || *from == end || idle > slack_us {
                break;
            }
        }
        idle_us
    }

    pub(crate) const fn sent_by(&self, end: End) -> &Half {
        match end {
            End::Client => &self.from_client,
            End::Server => &self.from_server,
        }
    }

    const fn half(&mut self, end: End) -> &mut Half {
        match end {
            End::Client => &mut self.from_client,
            End::Server => &mut self.from_server,
        }
    }

    /// The address of an end.
    pub(crate) const fn address(&self, end: End) -> SocketAddr {
        match end {
            End::Client => self.client,
            End::Server => self.server,
        }
    }

    /// A client that resets before it has said anything may never have reached the server's socket: with
    /// `TCP_DEFER_ACCEPT` there is none until data comes.
    pub(crate) fn may_have_had_no_socket(&self, end: End) -> bool {
        let Half { stream, fin, rst, .. } = &self.from_client;
        end == End::Server && stream.is_empty() && fin.is_none() && rst.is_some()
    }

    /// A RST reached `end` after both FINs: if it was in TIME_WAIT, that has ended it before its time (RFC 1337). On
    /// loopback an ACK that is overtaken on another CPU is enough: TIME_WAIT answers it, to a peer that is gone.
    pub(crate) fn may_have_cut_time_wait_short(&self, end: End) -> bool {
        let (sent, received) = (self.sent_by(end), self.sent_by(end.peer()));
        match (sent.fin, received.fin, received.rst) {
            (Some(ours), Some(theirs), Some(rst)) => rst.at > ours.at && rst.at > theirs.at,
            _ => false,
        }
    }

    /// A few words on what was seen.
    pub(crate) fn summary(&self) -> String {
        let half = |half: &Half| {
            let at =
                |end: Option<EndSegment>| end.map_or_else(|| "none".to_owned(), |end| format!("packet {}", end.at));
            format!("{} bytes, FIN: {}, RST: {}", half.stream.len(), at(half.fin), at(half.rst))
        };
        format!("client: {}; server: {}", half(&self.from_client), half(&self.from_server))
    }

    /// Any RST at all.
    pub(crate) const fn was_reset(&self) -> bool {
        self.from_client.rst.is_some() || self.from_server.rst.is_some()
    }

    /// Both ends have ended: both sent their FIN, or one a RST.
    pub(crate) const fn has_ended(&self) -> bool {
        self.was_reset() || self.from_client.fin.is_some() && self.from_server.fin.is_some()
    }

    /// Who sent the first FIN or RST.
    pub(crate) fn first_end(&self) -> FirstEnd {
        let first = |end| {
            let half: &Half = self.sent_by(end);
            match (half.fin, half.rst) {
                (Some(fin), Some(rst)) => Some(if fin.at < rst.at { (fin, false) } else { (rst, true) }),
                (fin, rst) => fin.map(|fin| (fin, false)).or(rst.map(|rst| (rst, true))),
            }
        };
        match (first(End::Client), first(End::Server)) {
            (None, None) => FirstEnd::Nobody,
            (Some(_), None) => FirstEnd::One(End::Client),
            (None, Some(_)) => FirstEnd::One(End::Server),
            (Some((client, client_reset)), Some((server, server_reset))) => {
                // The end of one that acknowledges the other's comes after it. A RST takes no sequence number: its place
                // in the capture decides.
                let earlier = if client.at < server.at { End::Client } else { End::Server };
                let (one, two) = if earlier == End::Client { (client, server) } else { (server, client) };
                if client_reset || server_reset {
                    let second_knew = two.ack.is_none_or(|ack| ack > one.offset + 1);
                    return if second_knew { FirstEnd::One(earlier) } else { FirstEnd::Crossing(earlier) };
                }
                // Sequence numbers count the SYN: the FIN is acknowledged by its offset and two.
                if two.ack.is_some_and(|ack| ack >= one.offset + 2) { FirstEnd::One(earlier) } else { FirstEnd::Both }
            }
        }
    }

    fn add(&mut self, from: End, at: usize, segment: Segment) {
        let peer_isn = self.sent_by(from.peer()).isn;
        let ack = (segment.flags & ACK != 0).then(|| peer_isn.map(|isn| segment.ack.wrapping_sub(isn))).flatten();
        let half = self.half(from);
        if segment.flags & SYN != 0 {
            half.isn.get_or_insert(segment.seq);
        }
        let Some(isn) = half.isn else { return };
        // The SYN takes the first sequence number.
        let offset = segment.seq.wrapping_sub(isn).wrapping_sub(u32::from(segment.flags & SYN == 0));
        half.messages.extend(segment.messages);
        let length = u32::try_from(segment.payload.len()).unwrap_or(u32::MAX);
        let is_new = length != 0 && half.take(offset, segment.payload);
        if is_new && self.ended.is_none() {
            self.payload.push((segment.time_us, from));
        }
        if segment.flags & (FIN | RST) != 0 {
            self.ended.get_or_insert((segment.time_us, from));
        }
        let half = self.half(from);
        let end = || EndSegment { at, offset: offset.wrapping_add(length), ack };
        if segment.flags & FIN != 0 && half.fin.is_none() {
            half.fin = Some(end());
        }
        if segment.flags & RST != 0 && half.rst.is_none() {
            half.rst = Some(end());
        }
        if let Some(ack) = ack {
            let peer = self.half(from.peer());
            let acknowledged = (ack as usize).saturating_sub(1);
            if acknowledged > peer.stream.len() && peer.fin.is_some() {
                peer.fin_acknowledged = true;
            }
            // A RST may repeat what its cause said, however wrong.
            if acknowledged <= peer.stream.len() + 1 {
                peer.acknowledged = peer.acknowledged.max(acknowledged.min(peer.stream.len()));
            }
        }
    }
}

impl Half {
    /// Adds payload to the stream; answers whether it ends with a byte that had not come yet.
    fn take(&mut self, offset: u32, payload: Vec<u8>) -> bool {
        let end = |(offset, payload): &(u32, Vec<u8>)| *offset as usize + payload.len();
        let known = self.early.iter().map(end).max().unwrap_or(0).max(self.stream.len());
        let is_new = offset as usize + payload.len() > known;
        if offset as usize != self.stream.len() {
            self.disorder = true;
        }
        self.early.push((offset, payload));
        while let Some(next) = self.early.iter().position(|(offset, _)| *offset as usize <= self.stream.len()) {
            let (offset, payload) = self.early.swap_remove(next);
            if let Some(fresh) = payload.get(self.stream.len() - offset as usize..)
                && !fresh.is_empty()
            {
                self.stream.extend_from_slice(fresh);
                self.boundaries.push(self.stream.len());
            }
        }
        is_new
    }
}

/// Who ended a connection first, by its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstEnd {
    Nobody,
    One(End),
    /// Both FINs were sent before the other had arrived.
    Both,
    /// A RST and a FIN, or two RSTs, were under way at once. Each end did so on its own account; the one named was captured
    /// first.
    Crossing(End),
}

/// Reads a capture of one side: its connections, in the order of their SYNs.
///
/// `tshark` takes what goes to or comes from `ports` for HTTP.
pub(crate) fn connections(capture: &Path, ports: RangeInclusive<u16>) -> Result<Vec<Connection>> {
    // Twice: where it puts messages together it does not show all payload as such.
    let text = tshark(capture, &["--disable-protocol", "http"], &FIELDS)?;
    let port = format!("tcp.port=={}-{},http", ports.start(), ports.end());
    let dissected = tshark(capture, &["-d", &port, "-Y", "http"], &MESSAGE_FIELDS)?;
    let mut messages: HashMap<usize, Vec<Message>> =
        dissected.lines().map(messages).collect::<Result<_>>().context("tshark's HTTP")?;
    let mut connections: Vec<Connection> = Vec::new();
    // The latest connection of each pair of addresses.
    let mut latest: HashMap<(SocketAddr, SocketAddr), usize> = HashMap::new();
    for (at, line) in text.lines().enumerate() {
        let mut segment = segment(line).with_context(|| format!("tshark printed {line:?}"))?;
        // Frames are counted from 1.
        segment.messages = messages.remove(&(at + 1)).unwrap_or_default();
        if segment.flags & (SYN | ACK) == SYN {
            let known = latest.get(&(segment.from, segment.to)).map(|known| &connections[*known]);
            if known.is_none_or(|known| known.from_client.isn != Some(segment.seq)) {
                latest.insert((segment.from, segment.to), connections.len());
                connections.push(Connection {
                    client: segment.from,
                    server: segment.to,
                    from_client: Half::default(),
                    from_server: Half::default(),
                    answered: false,
                    payload: Vec::new(),
                    ended: None,
                });
            }
        }
        let of_client = latest.get(&(segment.from, segment.to));
        let of_server = latest.get(&(segment.to, segment.from));
        // What belongs to a connection that began before the capture is left out.
        let (from, index) = match (of_client, of_server) {
            (Some(index), _) => (End::Client, *index),
            (_, Some(index)) => (End::Server, *index),
            _ => continue,
        };
        let connection = &mut connections[index];
        connection.answered |= from == End::Server && segment.flags & SYN != 0;
        connection.add(from, at, segment);
    }
    Ok(connections)
}

/// The fields of each packet of a capture, a line each.
fn tshark(capture: &Path, options: &[&str], fields: &[&str]) -> Result<String> {
    let output = Command::new("tshark")
        .arg("-n")
        .args(options)
        .arg("-r")
        .arg(capture)
        // All occurrences: a segment may carry several messages.
        .args(["-T", "fields", "-E", "separator=/t", "-E", "occurrence=a", "-E", "aggregator=/s"])
        .args(fields.iter().flat_map(|field| ["-e", *field]))
        .stderr(Stdio::piped())
        .output()
        .context("cannot run tshark")?;
    if !output.status.success() {
        bail!("tshark: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("tshark printed no UTF-8")
}

fn segment(line: &str) -> Result<Segment> {
    let columns: Vec<&str> = line.split('\t').collect();
    let [time, ip4_from, ip6_from, ip4_to, ip6_to, port_from, port_to, flags, seq, ack, payload] = columns[..] else {
        bail!("{} columns instead of {}", columns.len(), FIELDS.len());
    };
    let address = |ip4: &str, ip6: &str, port: &str| -> Result<SocketAddr> {
        let ip: IpAddr = if ip4.is_empty() { ip6 } else { ip4 }.parse()?;
        Ok(SocketAddr::new(ip, port.parse()?))
    };
    let (seconds, fraction) = time.split_once('.').context("a time without a fraction")?;
    let micros: u64 = fraction.get(..6).context("a time without microseconds")?.parse()?;
    Ok(Segment {
        time_us: seconds.parse::<u64>()? * 1_000_000 + micros,
        from: address(ip4_from, ip6_from, port_from)?,
        to: address(ip4_to, ip6_to, port_to)?,
        flags: u16::from_str_radix(flags.trim_start_matches("0x"), 16)?,
        seq: seq.parse()?,
        ack: if ack.is_empty() { 0 } else { ack.parse()? },
        payload: payload_of(payload)?,
        messages: Vec::new(),
    })
}

/// The number of a frame, and the messages that end there.
fn messages(line: &str) -> Result<(usize, Vec<Message>)> {
    let columns: Vec<&str> = line.split('\t').collect();
    let [frame, methods, targets, statuses] = columns[..] else { bail!("tshark printed {line:?}") };
    let requests = methods.split_whitespace().zip(targets.split_whitespace());
    let requests = requests.map(|(method, target)| Ok(Message::Request(method.to_owned(), target.to_owned())));
    let responses = statuses.split_whitespace().map(|status| Ok(Message::Response(status.parse()?)));
    Ok((frame.parse()?, requests.chain(responses).collect::<Result<_>>()?))
}

/// `47:45:54` or `474554`.
fn payload_of(hex: &str) -> Result<Vec<u8>> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| *byte != b':').collect();
    digits.chunks(2).map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?)).collect::<Result<_>>()
}
