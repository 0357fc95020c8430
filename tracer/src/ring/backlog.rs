//! Records that were taken out of the ring before their turn, to make room in it: in, and out in the same order.
//!
//! It grows up to a limit, and what it took is given back when it is empty again.

use std::collections::VecDeque;

use crate::memory;

/// Bytes that may wait: 180,000 records.
const MOST: usize = 64 << 20;
/// Bytes of a piece. It is freed when its last record is out.
const CHUNK: usize = 1 << 18;
/// So much is not left to the allocator for the next time.
const MUCH: usize = 4 << 20;

/// Where they wait.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// Each holds whole records, a length before each of them; none is empty.
    chunks: VecDeque<Vec<u8>>,
    /// Where the next record begins in the first chunk.
    at: usize,
    /// In all chunks.
    bytes: usize,
    /// At most, since there were none.
    peak: usize,
}

/// Of a record, before its bytes.
type Length = u32;

impl Backlog {
    /// Whether there is room for one more.
    pub(super) fn has_room(&self) -> bool {
        self.bytes < MOST
    }

    /// Appends a record.
    pub(super) fn push(&mut self, record: &[u8]) {
        let Ok(length) = Length::try_from(record.len()) else { unreachable!("a ring has at most 1 GiB") };
        let size = size_of::<Length>() + record.len();
        let chunk = match self.chunks.back_mut() {
            Some(chunk) if chunk.len() + size <= chunk.capacity() => chunk,
            _ => self.chunks.push_back_mut(Vec::with_capacity(CHUNK.max(size))),
        };
        chunk.extend_from_slice(&length.to_ne_bytes());
        chunk.extend_from_slice(record);
        self.bytes += size;
        self.peak = self.peak.max(self.bytes);
    }

    /// Passes the oldest record on; `false`: there is none.
    pub(super) fn pop(&mut self, record: impl FnOnce(&[u8])) -> bool {
        let Some(chunk) = self.chunks.front() else { return false };
        let Some((length, rest)) = chunk.get(self.at..).and_then(<[u8]>::split_first_chunk) else {
            unreachable!("no chunk is empty, and records are whole")
        };
        let length = Length::from_ne_bytes(*length) as usize;
        let Some(bytes) = rest.get(..length) else { unreachable!("records are whole") };
        record(bytes);
        let size = size_of::<Length>() + length;
        self.at += size;
        self.bytes -= size;
        if self.at == chunk.len() {
            self.chunks.pop_front();
            self.at = 0;
        }
        if self.chunks.is_empty() && std::mem::take(&mut self.peak) > MUCH {
            memory::give_back();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_bounded_and_gives_all_back() {
        let mut backlog = Backlog::default();
        let record = [7; 368];
        let mut count = 0;
        while backlog.has_room() {
            backlog.push(&record);
            count += 1;
        }
        let held: usize = backlog.chunks.iter().map(Vec::capacity).sum();
        assert!(held <= MOST + MOST / 100, "{held} bytes");
        assert!((150_000..200_000).contains(&count), "{count} records");
        while backlog.pop(|bytes| assert_eq!(bytes, record)) {
            count -= 1;
        }
        assert_eq!((count, backlog.bytes, backlog.chunks.len()), (0, 0, 0));
    }

    #[test]
    fn one_that_is_larger_than_a_chunk() {
        let mut backlog = Backlog::default();
        let records = [vec![1; 10], vec![2; CHUNK + 1], vec![3; 10]];
        for record in &records {
            backlog.push(record);
        }
        for record in &records {
            assert!(backlog.pop(|bytes| assert_eq!(bytes, record)));
        }
        assert!(!backlog.pop(|_| ()));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(steps in prop::collection::vec((0..5_000_usize, any::<bool>()), 1..200)) {
            let (mut backlog, mut expected) = (Backlog::default(), VecDeque::new());
            for (length, takes) in steps {
                let record: Vec<u8> = (0..length).map(|at| (at * length) as u8).collect();
                backlog.push(&record);
                expected.push_back(record);
                if takes {
                    let oldest = expected.pop_front();
                    prop_assert!(backlog.pop(|bytes| assert_eq!(Some(bytes), oldest.as_deref())));
                }
                prop_assert_eq!(backlog.chunks.is_empty(), expected.is_empty());
            }
            for record in expected {
                prop_assert!(backlog.pop(|bytes| assert_eq!(bytes, record)));
            }
            prop_assert!(!backlog.pop(|_| ()));
            prop_assert_eq!(backlog.bytes, 0);
        }
    }
}
