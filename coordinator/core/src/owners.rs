//! Deals out slices to owners.
//!
//! A small pure problem of ordinals: `members` columns, `slices` rows, `redundancy` marks in
//! each row, column sums that differ by one at most, and as many of the marks as possible where
//! the state already is. Solved in passes: keep what is held, fill rows that have too few marks,
//! move marks from the fullest column to the emptiest until they are level. Each move is one
//! transfer and lowers an excess that had to be lowered by somebody. Last, `hosts` exchanges
//! marks between rows until the owners of a slice are on different hosts, as far as they can be.
//!
//! New marks go to members that compute with the slice where there is one that has room for
//! more: its weights are there, and nobody has to publish them to it.

mod hosts;

use crate::around::Around;
use caravan_types::{SliceId, SliceSet};
use std::collections::{BTreeMap, BTreeSet};

/// Members that are compared for a mark: all, in small clusters.
const COMPARED: usize = 32;

/// Slices that are compared for a move. Where a member shares units with another, some of the
/// first few are of those.
const MOVES_COMPARED: usize = 8;

/// Who may own what.
pub(crate) struct Question<'a> {
    /// Owners of each slice, where there are so many members.
    pub(crate) redundancy: usize,
    /// What each member holds.
    pub(crate) held: &'a [&'a SliceSet],
    /// The host of each member, as a number; below the number of members.
    pub(crate) hosts: &'a [usize],
    /// The unit of each slice.
    pub(crate) units: &'a [u32],
    /// For each unit, the members that compute with it.
    pub(crate) computing: &'a [Vec<usize>],
}

/// For each slice, the members (by position) that own it. Every slice gets `redundancy` owners,
/// or all members where there are fewer; nobody has two more than another; and no host has more
/// owners of one slice than redundancy · its members / all members, rounded up.
pub(crate) fn assign(question: &Question<'_>) -> Vec<Vec<usize>> {
    let (slices, members) = (question.units.len(), question.held.len());
    let wanted = question.redundancy.min(members);
    let mut deal = Deal {
        question,
        owners: vec![Vec::with_capacity(wanted); slices],
        loads: vec![0; members],
        owned: None,
        by_load: None,
        limits: hosts::limits(question.hosts, wanted),
        together: Together::new(members),
    };
    deal.keep(wanted);
    deal.fill(wanted);
    deal.level();
    hosts::spread(&mut deal);
    deal.owners
}

struct Deal<'a> {
    question: &'a Question<'a>,
    owners: Vec<Vec<usize>>,
    /// For each member the number of its slices.
    loads: Vec<usize>,
    /// For each member its slices, ascending, once that is asked for.
    owned: Option<Vec<Vec<usize>>>,
    /// All members with the number of their slices, the emptiest first, once asked for.
    by_load: Option<BTreeSet<(usize, usize)>>,
    /// For each host, how many owners of one slice it may have.
    limits: Vec<usize>,
    /// How many slices two members own together. Partners are mixed, so that what a dead
    /// member leaves behind is spread over all others.
    together: Together,
}

/// A number for each pair of members: in a table where few, else for those that have one.
enum Together {
    Table(usize, Vec<u32>),
    Pairs(BTreeMap<(usize, usize), u32>),
}

impl Together {
    fn new(members: usize) -> Self {
        match members {
            // 1 MiB.
            0..=512 => Self::Table(members, vec![0; members * members]),
            _ => Self::Pairs(BTreeMap::new()),
        }
    }

    fn met(&self, a: usize, b: usize) -> u32 {
        match self {
            Self::Table(members, table) => table[a.min(b) * members + a.max(b)],
            Self::Pairs(pairs) => pairs.get(&(a.min(b), a.max(b))).copied().unwrap_or(0),
        }
    }

    fn meet(&mut self, a: usize, b: usize) {
        match self {
            Self::Table(members, table) => table[a.min(b) * *members + a.max(b)] += 1,
            Self::Pairs(pairs) => *pairs.entry((a.min(b), a.max(b))).or_default() += 1,
        }
    }
}

impl Deal<'_> {
    /// Marks holders; where a slice has more than wanted, the fullest give way, and those on a
    /// host that has enough of its owners.
    fn keep(&mut self, wanted: usize) {
        let mut holders: Vec<Vec<usize>> = vec![Vec::new(); self.owners.len()];
        for (m, held) in self.question.held.iter().enumerate() {
            held.iter().for_each(|SliceId(slice)| holders[slice as usize].push(m));
        }
        for (slice, mut holders) in holders.into_iter().enumerate() {
            holders.sort_by_key(|&m| (self.loads[m], m));
            while self.owners[slice].len() < wanted && !holders.is_empty() {
                let apart = holders.iter().position(|&m| !self.crowds(slice, m));
                let m = holders.remove(apart.unwrap_or(0));
                self.mark(slice, m);
            }
        }
    }

    /// Gives slices with too few owners to the emptiest members that compute with them, while
    /// those have no more than their share; else to the emptiest of all.
    fn fill(&mut self, wanted: usize) {
        let limit = (self.owners.len() * wanted).div_ceil(self.loads.len().max(1));
        let mut computing: Vec<Around> =
            self.question.computing.iter().map(|members| Around::new(members.clone())).collect();
        for slice in 0..self.owners.len() {
            let unit = self.question.units[slice] as usize;
            while self.owners[slice].len() < wanted {
                let near = computing[unit].next(COMPARED);
                let near = near.filter(|&m| self.loads[m] < limit && !self.owners[slice].contains(&m));
                let near = near.min_by_key(|&m| self.worth(slice, m));
                let near = near.filter(|&m| !self.crowds(slice, m));
                let Some(m) = near.or_else(|| self.emptiest(slice)) else { break };
                self.mark(slice, m);
            }
        }
    }

    /// The best of the emptiest members that do not own a slice.
    fn emptiest(&mut self, slice: usize) -> Option<usize> {
        let loads = &self.loads;
        self.by_load.get_or_insert_with(|| loads.iter().copied().zip(0..).collect());
        let members = self.by_load.iter().flatten().map(|(_, m)| *m);
        let free = members.filter(|m| !self.owners[slice].contains(m));
        free.take(COMPARED).min_by_key(|&m| self.worth(slice, m))
    }

    /// The less, the better a member is as one more owner of a slice.
    fn worth(&self, slice: usize, m: usize) -> (bool, usize, u32, usize) {
        let met = self.owners[slice].iter().map(|&o| self.together.met(o, m)).sum();
        (self.crowds(slice, m), self.loads[m], met, m)
    }

    /// Moves ownership until no two members differ by more than one slice. A fuller member
    /// owns a slice that an emptier one does not, so every turn makes progress; each turn
    /// lowers the sum of squared loads, so it ends.
    fn level(&mut self) {
        let mut cursor = 0;
        let spread = |loads: &[usize]| Some(loads.iter().max()? - loads.iter().min()?);
        if spread(&self.loads).is_none_or(|spread| spread < 2) {
            return;
        }
        let loads = &self.loads;
        self.by_load.get_or_insert_with(|| loads.iter().copied().zip(0..).collect());
        loop {
            let Some(by_load) = &self.by_load else { return };
            let (Some(&(most, from)), Some(&(least, to))) = (by_load.last(), by_load.first()) else { return };
            if most <= least + 1 {
                return;
            }
            let Some(slice) = self.movable(from, to, cursor) else { return };
            cursor = slice + 1;
            self.unmark(slice, from);
            self.mark(slice, to);
        }
    }

    /// A slice that one member can hand to another, the best of the next ones from `cursor` on:
    /// one that keeps hosts apart, and one that the taker computes with.
    fn movable(&mut self, from: usize, to: usize, cursor: usize) -> Option<usize> {
        let (owners, members) = (&self.owners, self.loads.len());
        self.owned.get_or_insert_with(|| {
            let mut owned = vec![Vec::new(); members];
            for (slice, owners) in owners.iter().enumerate() {
                owners.iter().for_each(|&m| owned[m].push(slice));
            }
            owned
        });
        let owned = self.owned.as_ref()?;
        let (mine, theirs) = (&owned[from], &owned[to]);
        let (before, behind) = mine.split_at(mine.partition_point(|slice| *slice < cursor));
        let turns = behind.iter().chain(before).copied();
        let lacking = turns.filter(|slice| theirs.binary_search(slice).is_err()).take(MOVES_COMPARED);
        let apart = self.question.hosts[from] != self.question.hosts[to];
        let mut best: Option<(usize, usize)> = None;
        for slice in lacking {
            let worth =
                2 * usize::from(apart && self.crowds(slice, to)) + usize::from(!self.computes(slice, to));
            if worth == 0 {
                return Some(slice);
            }
            // The first of equals.
            if best.is_none_or(|(least, _)| worth < least) {
                best = Some((worth, slice));
            }
        }
        best.map(|(_, slice)| slice)
    }

    fn computes(&self, slice: usize, m: usize) -> bool {
        self.question.computing[self.question.units[slice] as usize].binary_search(&m).is_ok()
    }

    /// Whether a member's host has as many owners of a slice as it may have.
    fn crowds(&self, slice: usize, m: usize) -> bool {
        let host = self.question.hosts[m];
        self.on(slice, host) >= self.limits[host]
    }

    /// How many owners of a slice are on a host.
    fn on(&self, slice: usize, host: usize) -> usize {
        self.owners[slice].iter().filter(|&&m| self.question.hosts[m] == host).count()
    }

    fn mark(&mut self, slice: usize, m: usize) {
        for i in 0..self.owners[slice].len() {
            self.together.meet(self.owners[slice][i], m);
        }
        self.owners[slice].push(m);
        if let Some(owned) = &mut self.owned {
            let place = owned[m].partition_point(|other| *other < slice);
            owned[m].insert(place, slice);
        }
        self.set_load(m, self.loads[m] + 1);
    }

    fn unmark(&mut self, slice: usize, m: usize) {
        self.owners[slice].retain(|&o| o != m);
        if let Some(owned) = &mut self.owned {
            owned[m].retain(|other| *other != slice);
        }
        self.set_load(m, self.loads[m] - 1);
    }

    fn set_load(&mut self, m: usize, load: usize) {
        if let Some(by_load) = &mut self.by_load {
            by_load.remove(&(self.loads[m], m));
            by_load.insert((load, m));
        }
        self.loads[m] = load;
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

    /// Each member on a host of its own, and all compute with all of one unit.
    fn assign(slices: usize, redundancy: usize, held: &[SliceSet]) -> Vec<Vec<usize>> {
        let everybody: Vec<usize> = (0..held.len()).collect();
        on_hosts(&vec![0; slices], redundancy, held, &everybody, std::slice::from_ref(&everybody))
    }

    fn on_hosts(
        units: &[u32],
        redundancy: usize,
        held: &[SliceSet],
        hosts: &[usize],
        computing: &[Vec<usize>],
    ) -> Vec<Vec<usize>> {
        let held: Vec<&SliceSet> = held.iter().collect();
        super::assign(&Question { redundancy, held: &held, hosts, units, computing })
    }

    fn is_dealt(owners: &[Vec<usize>], redundancy: usize, members: usize) -> Result<(), TestCaseError> {
        for o in owners {
            let unique: BTreeSet<usize> = o.iter().copied().collect();
            prop_assert_eq!(unique.len(), redundancy.min(members));
            prop_assert_eq!(o.len(), unique.len());
        }
        let loads: Vec<usize> = sets(members, owners).iter().map(SliceSet::len).collect();
        prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{:?}", loads);
        Ok(())
    }

    fn held(slices: usize, most: usize) -> impl Strategy<Value = Vec<SliceSet>> {
        let set = proptest::collection::vec(any::<bool>(), slices).prop_map(|bits| {
            (0..).map(SliceId).zip(bits).filter(|(_, held)| *held).map(|(id, _)| id).collect()
        });
        proptest::collection::vec(set, 1..=most)
    }

    proptest! {
        #[test]
        fn every_slice_has_its_owners_and_nobody_has_two_more_than_another(
            held in held(37, 6), redundancy in 1usize..4,
        ) {
            is_dealt(&assign(37, redundancy, &held), redundancy, held.len())?;
        }

        #[test]
        fn owners_of_a_slice_are_on_different_hosts_as_far_as_equal_loads_allow(
            held in held(23, 9), redundancy in 1usize..4, many in 1usize..6,
            places in proptest::collection::vec(any::<usize>(), 9), starts in any::<bool>(),
        ) {
            let held = if starts { vec![SliceSet::default(); held.len()] } else { held };
            let members = held.len();
            let hosts: Vec<usize> = places[..members].iter().map(|place| place % many.min(members)).collect();
            let computing = [(0..members).collect()];
            let owners = on_hosts(&[0; 23], redundancy, &held, &hosts, &computing);
            is_dealt(&owners, redundancy, members)?;
            for host in 0..members {
                let here = hosts.iter().filter(|h| **h == host).count();
                let limit = (here * redundancy.min(members)).div_ceil(members);
                for (slice, o) in owners.iter().enumerate() {
                    let on = o.iter().filter(|m| hosts[**m] == host).count();
                    prop_assert!(on <= limit, "slice {slice} has {on} owners on host {host}, {hosts:?}: {o:?}");
                }
            }
        }
    }

    #[test]
    fn nothing_moves_where_nothing_changed() {
        let before = sets(4, &assign(100, 2, &vec![SliceSet::default(); 4]));
        assert_eq!(moves(&before, &assign(100, 2, &before)), 0);
        let hosts = [0, 0, 1, 1, 2];
        let computing = [vec![0, 2, 4], vec![1, 3]];
        let units: Vec<u32> = (0..100).map(|s| s / 60).collect();
        let first = on_hosts(&units, 2, &vec![SliceSet::default(); 5], &hosts, &computing);
        let before = sets(5, &first);
        assert_eq!(moves(&before, &on_hosts(&units, 2, &before, &hosts, &computing)), 0);
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

    #[test]
    fn a_death_on_four_hosts_moves_little_more_than_what_the_dead_one_had() {
        let hosts = [0, 0, 1, 1, 2, 2, 3, 3];
        let computing = [(0..8).collect()];
        let first = on_hosts(&[0; 200], 2, &vec![SliceSet::default(); 8], &hosts, &computing);
        let before = sets(8, &first);
        let computing = [(0..7).collect()];
        let moved = moves(&before[..7], &on_hosts(&[0; 200], 2, &before[..7], &hosts[..7], &computing));
        assert!(moved <= 2 * before[7].len(), "{moved} slices moved, the dead one had {}", before[7].len());
    }

    #[test]
    fn those_who_compute_with_a_slice_own_it_where_loads_are_level_all_the_same() {
        // Two pipelines of two stages, as many slices in each stage.
        let computing = [vec![0, 2], vec![1, 3]];
        let units: Vec<u32> = (0..80).map(|s| s / 40).collect();
        let owners = on_hosts(&units, 2, &vec![SliceSet::default(); 4], &[0, 1, 2, 3], &computing);
        for (unit, o) in units.iter().zip(&owners) {
            let mut o = o.clone();
            o.sort_unstable();
            assert_eq!(o, computing[*unit as usize]);
        }
    }
}
