//! Slices: the grain in which training state is owned, moved and reduced.
//!
//! The cut is a function of the model shape alone, so every worker, plan and checkpoint of a
//! run means the same thing by a slice number. A slice never crosses a unit's border and
//! starts at a multiple of [`BLOCK`] within its unit; squared gradient norms are taken per
//! block, so the global norm has the same bits however slices are dealt out.

use crate::{ModelShape, SliceId, UnitId};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Elements of a block: 64 KiB of fp32, about what stays in a core's second-level cache
/// together with its moments.
pub const BLOCK: u64 = 16384;

/// No slice is larger than this many blocks (64 · 64 KiB = 4 MiB of fp32 a message).
pub const MOST_BLOCKS: u64 = 64;

/// Aim for this many slices where blocks allow: enough to balance a few dozen owners within
/// some percent, few enough that per-slice bookkeeping is nothing.
const AIM: u64 = 512;

/// One slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The unit it is a part of.
    pub unit: UnitId,
    /// Its elements in the flat model.
    pub range: Range<u64>,
}

impl Slice {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// Whether it has no elements; never so in a table.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Number of norm blocks, the last of which may be short.
    #[must_use]
    pub fn blocks(&self) -> usize {
        (self.range.end - self.range.start).div_ceil(BLOCK) as usize
    }
}

/// All slices of a model, in the order of the flat model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceTable {
    slices: Vec<Slice>,
}

impl SliceTable {
    /// Cuts a model.
    #[must_use]
    pub fn new(shape: &ModelShape) -> Self {
        let units = (0..shape.units()).map(UnitId);
        let blocks: u64 = units.clone().map(|u| len(&shape.unit_range(u)).div_ceil(BLOCK)).sum();
        let grain = (blocks / AIM).clamp(1, MOST_BLOCKS) * BLOCK;
        let mut slices = Vec::new();
        for unit in units {
            let range = shape.unit_range(unit);
            let mut start = range.start;
            while start < range.end {
                let end = (start + grain).min(range.end);
                slices.push(Slice { unit, range: start..end });
                start = end;
            }
        }
        Self { slices }
    }

    /// Number of slices.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slices.len()
    }

    /// Whether there is none; never so for a valid shape.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// One slice; none where the id is out of range.
    #[must_use]
    pub fn get(&self, id: SliceId) -> Option<&Slice> {
        self.slices.get(id.0 as usize)
    }

    /// All slices with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (SliceId, &Slice)> {
        self.slices.iter().enumerate().map(|(i, s)| (SliceId(i as u32), s))
    }
}

fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// A set of slices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<Range<u32>>", into = "Vec<Range<u32>>")]
pub struct SliceSet {
    words: Vec<u64>,
}

impl SliceSet {
    /// The set of the first `n` slices.
    #[must_use]
    pub fn all(n: usize) -> Self {
        (0..n as u32).map(SliceId).collect()
    }

    /// Adds a slice; false where it was there already.
    pub fn insert(&mut self, id: SliceId) -> bool {
        let (word, bit) = (id.0 as usize / 64, 1 << (id.0 % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Takes a slice out; false where it was not there.
    pub fn remove(&mut self, id: SliceId) -> bool {
        let had = self.contains(id);
        if had {
            self.words[id.0 as usize / 64] &= !(1 << (id.0 % 64));
            self.trim();
        }
        had
    }

    /// Whether the slice is in the set.
    #[must_use]
    pub fn contains(&self, id: SliceId) -> bool {
        self.words.get(id.0 as usize / 64).is_some_and(|w| w >> (id.0 % 64) & 1 == 1)
    }

    /// Number of slices in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Whether every slice of `other` is in this set.
    #[must_use]
    pub fn is_superset(&self, other: &Self) -> bool {
        let mine = self.words.iter().copied().chain(std::iter::repeat(0));
        other.words.iter().zip(mine).all(|(theirs, mine)| theirs & !mine == 0)
    }

    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = SliceId> + '_ {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            let some = |word: u64| (word != 0).then_some(word);
            // Clearing the lowest bit gives the rest of a word.
            let rest = std::iter::successors(some(*word), move |w| some(w & (w - 1)));
            rest.map(move |w| SliceId(i as u32 * 64 + w.trailing_zeros()))
        })
    }

    /// How many slices of a range are in the set.
    #[must_use]
    pub fn len_in(&self, range: Range<u32>) -> usize {
        let (first, last) = (range.start as usize / 64, range.end.div_ceil(64) as usize);
        let ones = |i: usize| -> usize {
            let word = self.words.get(i).copied().unwrap_or(0);
            let below = |id: u32| match (id as usize).saturating_sub(i * 64) {
                bits @ 0..64 => (1 << bits) - 1,
                _ => u64::MAX,
            };
            (word & below(range.end) & !below(range.start)).count_ones() as usize
        };
        (first..last.min(self.words.len())).map(ones).sum()
    }

    /// The slices that are in this set or in `other`.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (long, short) = if self.words.len() >= other.words.len() { (self, other) } else { (other, self) };
        let mut words = long.words.clone();
        words.iter_mut().zip(&short.words).for_each(|(word, more)| *word |= more);
        Self { words }
    }

    /// The slices that are in this set and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut words = self.words.clone();
        words.iter_mut().zip(&other.words).for_each(|(word, less)| *word &= !less);
        let mut set = Self { words };
        set.trim();
        set
    }

    /// The members as the fewest ascending ranges.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<u32>> {
        let mut out: Vec<Range<u32>> = Vec::new();
        for SliceId(id) in self.iter() {
            match out.last_mut() {
                Some(last) if last.end == id => last.end = id + 1,
                _ => out.push(id..id + 1),
            }
        }
        out
    }

    /// Keeps equal sets equal as values: no trailing empty words.
    fn trim(&mut self) {
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }
}

impl FromIterator<SliceId> for SliceSet {
    fn from_iter<I: IntoIterator<Item = SliceId>>(ids: I) -> Self {
        let mut set = Self::default();
        set.extend(ids);
        set
    }
}

impl Extend<SliceId> for SliceSet {
    fn extend<I: IntoIterator<Item = SliceId>>(&mut self, ids: I) {
        for id in ids {
            self.insert(id);
        }
    }
}

impl From<Vec<Range<u32>>> for SliceSet {
    fn from(ranges: Vec<Range<u32>>) -> Self {
        ranges.into_iter().flatten().map(SliceId).collect()
    }
}

impl From<SliceSet> for Vec<Range<u32>> {
    fn from(set: SliceSet) -> Self {
        set.ranges()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn slices_tile_the_model_start_at_blocks_and_stay_inside_units() {
        for preset in ["260k", "15m", "7b"] {
            let shape = ModelShape::preset(preset).unwrap();
            let table = SliceTable::new(&shape);
            let mut at = 0;
            for (_, slice) in table.iter() {
                let unit = shape.unit_range(slice.unit);
                assert_eq!(slice.range.start, at);
                assert_eq!((at - unit.start) % BLOCK, 0);
                assert!(slice.range.end <= unit.end && !slice.is_empty());
                at = slice.range.end;
            }
            assert_eq!(at, shape.parameters());
        }
    }

    proptest! {
        #[test]
        fn a_slice_set_behaves_like_a_set(ops in proptest::collection::vec((any::<bool>(), 0u32..200), 0..100)) {
            let (mut ours, mut model) = (SliceSet::default(), BTreeSet::new());
            for (add, id) in ops {
                if add {
                    prop_assert_eq!(ours.insert(SliceId(id)), model.insert(id));
                } else {
                    prop_assert_eq!(ours.remove(SliceId(id)), model.remove(&id));
                }
                prop_assert_eq!(ours.len(), model.len());
            }
            prop_assert_eq!(ours.iter().map(|s| s.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let (low, rest): (SliceSet, SliceSet) = (ours.iter().filter(|s| s.0 < 77).collect(), ours.iter().filter(|s| s.0 >= 77).collect());
            prop_assert_eq!((low.len(), rest.len()), (ours.len_in(0..77), ours.len_in(77..1000)));
            prop_assert_eq!(ours.len_in(13..77), ours.iter().filter(|s| (13..77).contains(&s.0)).count());
            prop_assert_eq!(&low.union(&rest), &ours);
            prop_assert_eq!(&ours.difference(&rest), &low);
            prop_assert!(ours.is_superset(&low) && (rest.is_empty() || !low.is_superset(&ours)));
            let json = serde_json::to_string(&ours).unwrap();
            prop_assert_eq!(serde_json::from_str::<SliceSet>(&json).unwrap(), ours);
        }
    }
}
