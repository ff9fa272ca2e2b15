//! Deals out slices to owners.
//!
//! A small pure problem of ordinals: `members` columns, `slices` rows, `redundancy` marks in
//! each row, column sums that differ by one at most, and as many of the marks as possible where
//! the state already is. Solved in three passes: keep what is held, fill rows that have too few
//! marks, move marks from the fullest column to the emptiest until they are level. Each move is
//! one transfer and lowers an excess that had to be lowered by somebody.

use caravan_types::{SliceId, SliceSet};
use std::collections::BTreeMap;

/// For each slice, the members (by position) that own it; `held[m]` is what member m holds.
/// Every slice gets `redundancy` owners, or all members where there are fewer.
pub(crate) fn assign(slices: usize, redundancy: usize, held: &[SliceSet]) -> Vec<Vec<usize>> {
    let wanted = redundancy.min(held.len());
    let mut deal =
        Deal { owners: vec![Vec::new(); slices], load: vec![0; held.len()], together: BTreeMap::new() };
    deal.keep(held, wanted);
    deal.fill(wanted);
    deal.level();
    deal.owners
}

struct Deal {
    owners: Vec<Vec<usize>>,
    load: Vec<usize>,
    /// How many slices two members own together. Partners are mixed, so that what a dead
    /// member leaves behind is spread over all others.
    together: BTreeMap<(usize, usize), usize>,
}

impl Deal {
    /// Marks holders; where a slice has more than wanted, the fullest give way.
    fn keep(&mut self, held: &[SliceSet], wanted: usize) {
        for slice in 0..self.owners.len() {
            let holds = |m: &usize| held[*m].contains(SliceId(slice as u32));
            let mut holders: Vec<usize> = (0..held.len()).filter(holds).collect();
            holders.sort_by_key(|&m| (self.load[m], m));
            holders.truncate(wanted);
            for m in holders {
                self.mark(slice, m);
            }
        }
    }

    /// Gives slices with too few owners to the emptiest members.
    fn fill(&mut self, wanted: usize) {
        for slice in 0..self.owners.len() {
            while self.owners[slice].len() < wanted {
                let free = (0..self.load.len()).filter(|m| !self.owners[slice].contains(m));
                let met = |m: usize| -> usize { self.owners[slice].iter().map(|&o| self.met(o, m)).sum() };
                let Some(emptiest) = free.min_by_key(|&m| (self.load[m], met(m), m)) else { break };
                self.mark(slice, emptiest);
            }
        }
    }

    /// Moves ownership until no two members differ by more than one slice. A fuller member
    /// owns a slice that an emptier one does not, so every turn makes progress; each turn
    /// lowers the sum of squared loads, so it ends.
    fn level(&mut self) {
        let members = 0..self.load.len();
        let mut cursor = 0;
        loop {
            let Some(most) = members.clone().max_by_key(|&m| (self.load[m], m)) else { return };
            let Some(least) = members.clone().min_by_key(|&m| (self.load[m], m)) else { return };
            if self.load[most] <= self.load[least] + 1 {
                return;
            }
            let slices = self.owners.len();
            let mut turns = (cursor..slices).chain(0..cursor);
            let movable = |&s: &usize| self.owners[s].contains(&most) && !self.owners[s].contains(&least);
            let Some(slice) = turns.find(movable) else { return };
            cursor = slice + 1;
            self.owners[slice].retain(|&m| m != most);
            self.load[most] -= 1;
            self.mark(slice, least);
        }
    }

    fn met(&self, a: usize, b: usize) -> usize {
        self.together.get(&(a.min(b), a.max(b))).copied().unwrap_or(0)
    }

    fn mark(&mut self, slice: usize, member: usize) {
        for &other in &self.owners[slice] {
            *self.together.entry((other.min(member), other.max(member))).or_default() += 1;
        }
        self.owners[slice].push(member);
        self.load[member] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn moves(before: &[SliceSet], after: &[Vec<usize>]) -> usize {
        let owned = after.iter().enumerate().flat_map(|(s, o)| o.iter().map(move |&m| (s, m)));
        owned.filter(|&(s, m)| !before[m].contains(SliceId(s as u32))).count()
    }

    fn sets(members: usize, owners: &[Vec<usize>]) -> Vec<SliceSet> {
        let of = |m| (0..owners.len()).filter(move |&s| owners[s].contains(&m)).map(|s| SliceId(s as u32));
        (0..members).map(|m| of(m).collect()).collect()
    }

    proptest! {
        #[test]
        fn every_slice_has_its_owners_and_nobody_has_two_more_than_another(
            held in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 37), 1..7),
            redundancy in 1usize..4,
        ) {
            let held: Vec<SliceSet> = held.iter().map(|h| {
                (0..37u32).filter(|&s| h[s as usize]).map(SliceId).collect()
            }).collect();
            let owners = assign(37, redundancy, &held);
            for o in &owners {
                let mut unique = o.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert_eq!(unique.len(), redundancy.min(held.len()));
                prop_assert_eq!(o.len(), unique.len());
            }
            let loads: Vec<usize> = sets(held.len(), &owners).iter().map(SliceSet::len).collect();
            prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1);
        }
    }

    #[test]
    fn nothing_moves_where_nothing_changed() {
        let before = sets(4, &assign(100, 2, &vec![SliceSet::default(); 4]));
        assert_eq!(moves(&before, &assign(100, 2, &before)), 0);
    }

    #[test]
    fn a_death_moves_only_what_the_dead_one_had_and_a_join_only_its_share() {
        let before = sets(4, &assign(100, 2, &vec![SliceSet::default(); 4]));
        let survivors = before[..3].to_vec();
        let moved = moves(&survivors, &assign(100, 2, &survivors));
        assert!((50..=51).contains(&moved), "{moved} slices moved, the dead one had {}", before[3].len());
        let mut joined = before.clone();
        joined.push(SliceSet::default());
        assert_eq!(moves(&joined, &assign(100, 2, &joined)), 100 * 2 / 5, "its even share");
    }
}
