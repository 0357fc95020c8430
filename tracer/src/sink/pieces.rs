//! Pieces of a line in, the line out.
//!
//! A line has up to a hundred pieces, most of them a few bytes long. They are put into an array of fixed size, where a piece of
//! known length is a store or two, and not two calls; what is longer than that goes where any vector's bytes do. It escapes
//! nothing: that is up to who has the pieces.

use std::io::{self, Write};
use std::net::Ipv4Addr;

/// Bytes that nearly all lines are shorter than.
const NEAR: usize = 2048;
/// Digits of the longest number.
const DIGITS: usize = 20;
/// Bytes of the longest IPv4 address.
const ADDRESS: usize = 15;

/// A line in the making.
#[derive(Debug)]
pub(super) struct Pieces {
    near: Box<[u8; NEAR]>,
    /// Bytes of `near` that are in use.
    used: usize,
    /// What comes before them, once they were too many.
    far: Vec<u8>,
}

impl Default for Pieces {
    fn default() -> Self {
        Self::new()
    }
}

impl Pieces {
    /// Nothing.
    pub(super) fn new() -> Self {
        Self { near: Box::new([0; NEAR]), used: 0, far: Vec::new() }
    }

    /// Nothing again.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.far.clear();
    }

    /// All of them.
    pub(super) fn whole(&mut self) -> &[u8] {
        if self.far.is_empty() {
            return self.near.get(..self.used).unwrap_or_default();
        }
        self.spill(&[]);
        &self.far
    }

    /// Appends text.
    #[inline(always)]
    pub(super) fn put(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    #[inline(always)]
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        match self.near.get_mut(self.used..).and_then(|room| room.get_mut(..bytes.len())) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.used += bytes.len();
            }
            None => self.spill(bytes),
        }
    }

    #[cold]
    #[inline(never)]
    fn spill(&mut self, bytes: &[u8]) {
        self.far.extend_from_slice(self.near.get(..self.used).unwrap_or_default());
        self.far.extend_from_slice(bytes);
        self.used = 0;
    }

    /// Room for so many bytes. Those that are not used are written over by the next piece.
    #[inline(always)]
    fn room<const BYTES: usize>(&mut self) -> &mut [u8; BYTES] {
        const { assert!(BYTES <= NEAR) };
        if self.used + BYTES > NEAR {
            self.spill(&[]);
        }
        match self.near.get_mut(self.used..).and_then(|room| room.first_chunk_mut()) {
            Some(room) => room,
            None => unreachable!("it was made above"),
        }
    }

    /// Appends a number in decimal; answers how many digits it has.
    #[inline]
    pub(super) fn number(&mut self, number: u64) -> usize {
        let digits = decimal(self.room(), number);
        self.used += digits;
        digits
    }

    /// Spaces that can be appended at once.
    pub(super) const SPACES: usize = 32;

    /// Appends spaces, at most [`Pieces::SPACES`].
    #[inline]
    pub(super) fn spaces(&mut self, count: usize) {
        *self.room() = [b' '; Self::SPACES];
        self.used += count.min(Self::SPACES);
    }

    /// Appends an address as it is displayed; answers how many bytes that are.
    #[inline]
    pub(super) fn ipv4(&mut self, ip: Ipv4Addr) -> usize {
        let room = self.room::<{ ADDRESS + 1 }>();
        let mut used = 0;
        for octet in ip.octets() {
            let (text, length) = OCTETS[usize::from(octet)];
            // The longest begins at 12.
            if let Some(place) = room.get_mut(used..used + 4) {
                place.copy_from_slice(&text);
            }
            used += usize::from(length);
        }
        // No dot behind the last one.
        self.used += used - 1;
        used - 1
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Each octet in decimal with a dot, and how many bytes that are.
static OCTETS: [([u8; 4], u8); 256] = {
    let mut octets = [([b'.'; 4], 0); 256];
    let mut octet = 0;
    while octet < 256 {
        let digits = [b'0' + (octet / 100) as u8, b'0' + (octet / 10 % 10) as u8, b'0' + (octet % 10) as u8];
        octets[octet] = match octet {
            0..10 => ([digits[2], b'.', 0, 0], 2),
            10..100 => ([digits[1], digits[2], b'.', 0], 3),
            _ => ([digits[0], digits[1], digits[2], b'.'], 4),
        };
        octet += 1;
    }
    octets
};

/// Writes a number in decimal; answers how many digits it has.
#[inline]
fn decimal(room: &mut [u8; DIGITS], number: u64) -> usize {
    let digits = number.checked_ilog10().map_or(1, |log| log as usize + 1);
    let mut rest = number;
    for digit in room.iter_mut().take(digits).rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    digits
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(pieces: &mut Pieces) -> &str {
        str::from_utf8(pieces.whole()).expect("UTF-8")
    }

    #[test]
    fn numbers_of_each_length() {
        let mut pieces = Pieces::default();
        let mut expected = String::new();
        let powers = (0..20).map(|digits| 10_u64.pow(digits));
        for number in powers.flat_map(|power| [power - 1, power, power + 1]).chain([u64::MAX]) {
            pieces.number(number);
            expected.push_str(&number.to_string());
        }
        assert_eq!(text(&mut pieces), expected);
    }

    #[test]
    fn all_octets() {
        for octet in 0..=255 {
            let ip = Ipv4Addr::new(octet, 255 - octet, octet, octet);
            let mut pieces = Pieces::default();
            assert_eq!(pieces.ipv4(ip), ip.to_string().len());
            pieces.put(":");
            assert_eq!(text(&mut pieces), format!("{ip}:"));
        }
    }

    proptest! {
        /// Wherever the array ends: in the middle of any of them.
        #[test]
        fn a_long_line_is_whole(lengths in prop::collection::vec((0_usize..700, any::<u64>()), 0..40)) {
            let (mut pieces, mut expected) = (Pieces::default(), String::new());
            for (length, number) in lengths {
                let ip = Ipv4Addr::from_bits((number >> 16) as u32);
                pieces.put(&"x".repeat(length));
                pieces.number(number);
                pieces.spaces(length % 33);
                pieces.ipv4(ip);
                expected.push_str(&format!("{}{number}{}{ip}", "x".repeat(length), " ".repeat(length % 33)));
            }
            prop_assert_eq!(text(&mut pieces), &expected);
            prop_assert_eq!(text(&mut pieces), &expected);
            pieces.clear();
            prop_assert!(pieces.whole().is_empty());
        }
    }
}
