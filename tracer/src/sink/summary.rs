//! Closes in, the summary of the run out.
//!
//! Counts closes by process, side, cause and peer. The number of groups is bounded: once there are too many, closes that
//! would need a new one are only counted.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;

use crate::event::{Cause, Close, ClosedBy, Final, Group, Summary};

/// Groups that are counted.
const COUNTED: usize = 10_000;
/// Groups that are listed.
const LISTED: usize = 1_000;

/// What the summary cannot count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// Records lost.
    pub lost: u64,
    /// Sockets that could not be followed.
    pub untracked: u64,
}

/// Counts closes.
#[derive(Debug, Default)]
pub struct Summarizer {
    groups: HashMap<Key, Count>,
    total: Count,
    close_wait: u64,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    process: Option<(u32, String)>,
    closed_by: ClosedBy,
    cause: Cause,
    peer: IpAddr,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    closes: u64,
    time_wait: u64,
}

impl Count {
    fn add(&mut self, close: &Close) {
        self.closes += 1;
        self.time_wait += u64::from(close.fate == Some(Final::TimeWait));
    }
}

impl Summarizer {
    /// Has counted nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts one close.
    pub fn close(&mut self, close: &Close) {
        self.total.add(close);
        let key = Key {
            process: close.process.as_ref().map(|process| (process.pid, process.comm.clone())),
            closed_by: close.closed_by,
            cause: close.cause,
            peer: close.remote.ip(),
        };
        if self.groups.len() < COUNTED {
            self.groups.entry(key).or_default().add(close);
        } else if let Some(count) = self.groups.get_mut(&key) {
            count.add(close);
        }
    }

    /// Counts one socket that its process has not closed.
    pub fn close_wait(&mut self) {
        self.close_wait += 1;
    }

    /// Ends the counting.
    pub fn finish(self, time: Timestamp, ran: Duration, missed: Missed) -> Summary {
        let mut groups: Vec<Group> = self
            .groups
            .into_iter()
            .map(|(Key { process, closed_by, cause, peer }, Count { closes, time_wait })| {
                let (pid, comm) = process.unzip();
                Group { comm, pid, closed_by, cause, peer, closes, time_wait }
            })
            .collect();
        // Two runs that saw the same print the same.
        groups.sort_by(|one, other| {
            let rank = |group: &Group| (Reverse(group.closes), Reverse(group.time_wait));
            let rest = |group: &Group| (group.pid, group.peer, group.cause, group.closed_by as u8);
            rank(one)
                .cmp(&rank(other))
                .then_with(|| rest(one).cmp(&rest(other)))
                .then_with(|| one.comm.cmp(&other.comm))
        });
        groups.truncate(LISTED);
        let listed: u64 = groups.iter().map(|group| group.closes).sum();
        Summary {
            time,
            duration_s: ran.as_secs_f64(),
            closes: self.total.closes,
            time_wait: self.total.time_wait,
            close_wait: self.close_wait,
            lost: missed.lost,
            untracked: missed.untracked,
            other_closes: self.total.closes - listed,
            groups,
        }
    }
}
