//! Ends of connections in, those out that have their other end on this host as well.
//!
//! Such a connection gives two records. They are matched by their addresses, through a table of fixed size: an end that
//! waits for its other end is forgotten when another needs its place, and is then counted as if it were alone.
//!
//! A host hands out its local ports about one after the other, and so are the places of its connections: those of one moment
//! lie side by side, and near by in the CPU's caches.

use std::hash::BuildHasher as _;
use std::net::SocketAddr;

use foldhash::fast::RandomState;

/// Ends that may wait; each for as long as so many connections need to close, about.
const PLACES: usize = 8192;

/// An end that has been counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// The index of its group.
    pub(super) group: usize,
    /// It left TIME_WAIT.
    pub(super) time_wait: bool,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// A hash of the two addresses.
    hosts: u64,
    ports: (u16, u16),
    /// Which of the two ends: whether its local address is the smaller one.
    smaller: bool,
    end: End,
}

/// The ends whose other end has not been seen.
#[derive(Debug)]
pub(super) struct Pairs {
    hasher: RandomState,
    places: Box<[Option<Waiting>]>,
}

impl Default for Pairs {
    fn default() -> Self {
        Self { hasher: RandomState::default(), places: vec![None; PLACES].into_boxed_slice() }
    }
}

impl Pairs {
    /// Takes the other end of the same connection out of the table, or puts this one in.
    pub(super) fn other_end(&mut self, netns: u32, local: SocketAddr, remote: SocketAddr, end: End) -> Option<End> {
        let smaller = local < remote;
        let (one, other) = if smaller { (local, remote) } else { (remote, local) };
        // Each network namespace has loopback addresses of its own. Other connections may cross from one to another.
        let netns = if local.ip().is_loopback() { netns } else { 0 };
        let hosts = self.hasher.hash_one((netns, one.ip(), other.ip()));
        let ports = (one.port(), other.port());
        // Of the ports, every other one is for `connect`.
        let nth = (usize::from(ports.0) + usize::from(ports.1)) / 2;
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are what is wanted")]
        let place = &mut self.places[(hosts as usize).wrapping_add(nth) % PLACES];
        match place {
            Some(waiting) if waiting.hosts == hosts && waiting.ports == ports && waiting.smaller != smaller => {
                let found = waiting.end;
                *place = None;
                Some(found)
            }
            _ => {
                *place = Some(Waiting { hosts, ports, smaller, end });
                None
            }
        }
    }

    /// Forgets all: the groups have other indices now.
    pub(super) fn clear(&mut self) {
        self.places.fill(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ends_of_one_connection_meet_once() {
        let mut pairs = Pairs::default();
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let (server, client) = (address("10.0.0.1:80"), address("10.0.0.2:4000"));
        let end = |group| End { group, time_wait: group == 1 };
        assert_eq!(pairs.other_end(1, server, client, end(1)), None);
        // The same end again, such as of the next connection on the same addresses.
        assert_eq!(pairs.other_end(1, server, client, end(2)), None);
        // In another namespace: these are no loopback addresses.
        assert_eq!(pairs.other_end(7, client, server, end(3)), Some(end(2)));
        assert_eq!(pairs.other_end(1, client, server, end(4)), None);
        assert_eq!(pairs.other_end(1, server, address("10.0.0.2:4001"), end(5)), None);
        pairs.clear();
        assert_eq!(pairs.other_end(1, server, client, end(6)), None);
    }

    #[test]
    fn loopback_addresses_belong_to_their_namespace() {
        let mut pairs = Pairs::default();
        let (server, client) = (SocketAddr::from(([127, 0, 0, 1], 80)), SocketAddr::from(([127, 0, 0, 1], 4000)));
        let end = End { group: 0, time_wait: false };
        assert_eq!(pairs.other_end(1, server, client, end), None);
        assert_eq!(pairs.other_end(2, client, server, end), None);
        let mut pairs = Pairs::default();
        assert_eq!(pairs.other_end(1, server, client, end), None);
        assert_eq!(pairs.other_end(1, client, server, end), Some(end));
    }
}
