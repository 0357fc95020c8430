//! What was used last in, the same out: a few things that can be found without a search.
//!
//! For what is looked up for each record and is nearly always one of a few. It is no cache to rely on: whoever asks must be
//! able to do without, and must know by itself when what is kept is no longer true.

/// Keeps so many; each new one takes the place of the oldest.
#[derive(Debug)]
pub(crate) struct Recent<T, const KEPT: usize> {
    kept: [Option<T>; KEPT],
    /// The oldest.
    next: usize,
}

impl<T, const KEPT: usize> Default for Recent<T, KEPT> {
    fn default() -> Self {
        Self { kept: [const { None }; KEPT], next: 0 }
    }
}

impl<T, const KEPT: usize> Recent<T, KEPT> {
    /// The first that is the one.
    #[inline]
    pub(crate) fn find(&self, is_it: impl Fn(&T) -> bool) -> Option<&T> {
        self.kept.iter().flatten().find(|kept| is_it(kept))
    }

    /// Keeps it, too.
    pub(crate) fn keep(&mut self, new: T) {
        self.kept[self.next] = Some(new);
        self.next = (self.next + 1) % KEPT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_kept() {
        let mut recent = Recent::<_, 3>::default();
        for number in 0..5 {
            assert_eq!(recent.find(|kept| *kept == number), None);
            recent.keep(number);
            assert_eq!(recent.find(|kept| *kept == number), Some(&number));
        }
        let found: Vec<bool> = (0..5).map(|number| recent.find(|kept| *kept == number).is_some()).collect();
        assert_eq!(found, [false, false, true, true, true]);
    }
}
