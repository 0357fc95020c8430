//! Whole numbers in, their quantiles out, from a histogram of fixed size.
//!
//! The buckets are logarithmic: each octave is cut into eight of equal width, so a quantile is off by at most a sixteenth of
//! its value. Numbers below 16 are exact. Nothing here allocates.

/// Buckets in an octave, as a power of two.
const SPLIT: u32 = 3;

/// So many buckets tell numbers below 2^`octaves` apart; those beyond share the last one.
pub(super) const fn buckets(octaves: usize) -> usize {
    (octaves - SPLIT as usize + 1) << SPLIT
}

/// A histogram.
#[derive(Clone, Debug)]
pub(super) struct Quantiles<const BUCKETS: usize> {
    counts: [u32; BUCKETS],
}

impl<const BUCKETS: usize> Default for Quantiles<BUCKETS> {
    fn default() -> Self {
        Self { counts: [0; BUCKETS] }
    }
}

impl<const BUCKETS: usize> Quantiles<BUCKETS> {
    /// Counts one number.
    pub(super) fn add(&mut self, value: u64) {
        let count = &mut self.counts[bucket_of(value).min(BUCKETS - 1)];
        *count = count.saturating_add(1);
    }

    /// Counts what another has counted as well.
    pub(super) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count = count.saturating_add(more);
        }
    }

    /// The smallest number such that `percent` of all are not larger (the nearest rank), off by at most a sixteenth of it;
    /// `None` if none was counted. `percent`: 1 to 100.
    pub(super) fn at(&self, percent: u64) -> Option<u64> {
        let all: u64 = self.counts.iter().copied().map(u64::from).sum();
        let rank = (all * percent).div_ceil(100);
        if rank == 0 {
            return None;
        }
        let mut before = 0;
        let bucket = self.counts.iter().position(|count| {
            before += u64::from(*count);
            before >= rank
        })?;
        Some(middle_of(bucket))
    }
}

/// As if there were enough of them.
fn bucket_of(value: u64) -> usize {
    let Some(octave) = value.checked_ilog2().filter(|octave| *octave >= SPLIT) else {
        return usize::try_from(value).unwrap_or(0);
    };
    let within = (value >> (octave - SPLIT)) & ((1 << SPLIT) - 1);
    let bucket = (u64::from(octave - SPLIT + 1) << SPLIT) + within;
    usize::try_from(bucket).unwrap_or(usize::MAX)
}

fn middle_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let (row, within) = (bucket >> SPLIT, bucket & ((1 << SPLIT) - 1));
    if row == 0 {
        return within;
    }
    let width = 1 << (row - 1);
    ((1 << SPLIT) + within) * width + (width - 1) / 2
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Some42 = Quantiles<{ buckets(42) }>;

    #[test]
    fn small_numbers_are_exact() {
        let mut quantiles = Some42::default();
        assert_eq!(quantiles.at(50), None);
        for value in 0..16 {
            quantiles.add(value);
            assert_eq!(middle_of(bucket_of(value)), value);
        }
        assert_eq!((quantiles.at(1), quantiles.at(50), quantiles.at(95)), (Some(0), Some(7), Some(15)));
    }

    #[test]
    fn merging_is_counting_both() {
        let (mut one, mut other) = (Some42::default(), Some42::default());
        (0..90).for_each(|_| one.add(1));
        (0..10).for_each(|_| other.add(6));
        one.merge(&other);
        assert_eq!((one.at(50), one.at(90), one.at(91)), (Some(1), Some(1), Some(6)));
    }

    #[test]
    fn the_largest_numbers_share_a_bucket() {
        assert_eq!(bucket_of((1 << 42) - 1), buckets(42) - 1);
        let (mut quantiles, mut largest) = (Some42::default(), Some42::default());
        quantiles.add(u64::MAX);
        largest.add((1 << 42) - 1);
        assert_eq!(quantiles.at(50), largest.at(50));
    }

    proptest! {
        #[test]
        fn off_by_a_sixteenth_at_most(value in 0_u64..1 << 42) {
            let shown = middle_of(bucket_of(value));
            prop_assert!(shown.abs_diff(value) * 16 <= value, "{value} is shown as {shown}");
        }

        #[test]
        fn larger_numbers_are_never_in_smaller_buckets(one in any::<u64>(), other in any::<u64>()) {
            prop_assert!(bucket_of(one.min(other)) <= bucket_of(one.max(other)));
        }
    }
}
