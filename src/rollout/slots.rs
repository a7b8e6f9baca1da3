//! Places for keys and values: contiguous runs of a cache's rows.

/// Rows of a cache, those in use as `[first, end)` in ascending order.
pub struct Slots {
    rows: usize,
    used: Vec<(usize, usize)>,
}

impl Slots {
    pub fn new(rows: usize) -> Self {
        Self { rows, used: Vec::new() }
    }

    /// The first place for `rows` rows, at least one, if there is any.
    pub fn take(&mut self, rows: usize) -> Option<usize> {
        assert!(rows > 0, "a slot holds at least one row");
        let starts = std::iter::once(0).chain(self.used.iter().map(|(_, end)| *end));
        let ends = self.used.iter().map(|(first, _)| *first).chain([self.rows]);
        let (at, start) =
            starts.zip(ends).enumerate().find_map(|(at, (start, end))| (end - start >= rows).then_some((at, start)))?;
        self.used.insert(at, (start, start + rows));
        Some(start)
    }

    /// Rows that are taken.
    pub fn in_use(&self) -> usize {
        self.used.iter().map(|(first, end)| end - first).sum()
    }

    /// Gives back the place that starts at `first`.
    pub fn free(&mut self, first: usize) {
        let at = self.used.binary_search_by_key(&first, |(first, _)| *first).expect("it was taken");
        self.used.remove(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_disjoint_and_used_again() {
        let mut slots = Slots::new(10);
        assert_eq!([slots.take(4), slots.take(3), slots.take(4)], [Some(0), Some(4), None]);
        assert_eq!(slots.take(3), Some(7));
        slots.free(4);
        assert_eq!([slots.take(2), slots.take(2), slots.take(1)], [Some(4), None, Some(6)]);
        slots.free(0);
        assert_eq!(slots.take(5), None);
        assert_eq!(slots.take(4), Some(0));
    }
}
