//! Keeps the owners of one slice on different hosts, without changing any member's load by
//! more than who has the odd slice.
//!
//! A host with k of n members has about k/n of all marks, so at least redundancy · k/n of them
//! are on an average slice, and rounding up gives the least bound that a host can be held to.
//! First hosts that have more marks than that bound allows in all slices together hand an odd
//! slice to a member elsewhere. Then, while a slice has too many owners on a host, another slice
//! has too few there and hence more elsewhere; exchanging one mark of each makes both more even.
//! Every exchange lowers the sum over slices and hosts of squared owners, so this ends.

use super::{COMPARED, Deal};
use caravan_types::SliceId;

/// Passes over all slices. An exchange can leave the other slice no worse than it was, so one
/// pass is enough but where exchanges had to be put off.
const MOST_PASSES: usize = 4;

/// For each host, how many owners of one slice it may have at most.
pub(super) fn limits(hosts: &[usize], wanted: usize) -> Vec<usize> {
    let mut limits = vec![0usize; hosts.len()];
    hosts.iter().for_each(|host| limits[*host] += 1);
    limits.iter_mut().for_each(|count| *count = (*count * wanted).div_ceil(hosts.len()));
    limits
}

/// Spreads the owners of each slice over hosts.
pub(super) fn spread(deal: &mut Deal<'_>) {
    let mut pass = Pass { deal, cursor: 0 };
    pass.hand_over();
    for _ in 0..MOST_PASSES {
        if pass.exchange_all() {
            return;
        }
    }
}

struct Pass<'a, 'b> {
    deal: &'a mut Deal<'b>,
    /// Where the search for another slice goes on.
    cursor: usize,
}

impl Pass<'_, '_> {
    fn host(&self, m: usize) -> usize {
        self.deal.question.hosts[m]
    }

    /// Odd slices go from hosts with too many marks to hosts that may have more.
    fn hand_over(&mut self) {
        let (slices, members) = (self.deal.owners.len(), self.deal.loads.len());
        let mut marks = vec![0usize; members];
        (0..members).for_each(|m| marks[self.host(m)] += self.deal.loads[m]);
        // Each turn takes one of the odd slices away, of which every member has one at most.
        for _ in 0..members {
            let over = |host: &usize| marks[*host] > slices * self.deal.limits[*host];
            let Some(host) = (0..members).find(over) else { return };
            let here = (0..members).filter(|&m| self.host(m) == host);
            let Some(from) = here.max_by_key(|&m| (self.deal.loads[m], m)) else { return };
            let room = |m: &usize| {
                let there = self.host(*m);
                there != host
                    && marks[there] < slices * self.deal.limits[there]
                    && self.deal.loads[*m] < self.deal.loads[from]
            };
            let takers: Vec<usize> = (0..members).filter(room).collect();
            let mut found = takers.into_iter().filter_map(|to| Some((to, self.deal.movable(from, to, 0)?)));
            let Some((to, slice)) = found.next() else { return };
            self.deal.unmark(slice, from);
            self.deal.mark(slice, to);
            marks[host] -= 1;
            marks[self.host(to)] += 1;
        }
    }

    /// One pass over all slices; whether all are as they should be.
    fn exchange_all(&mut self) -> bool {
        let mut fine = true;
        for slice in 0..self.deal.owners.len() {
            // Each exchange takes an owner from a host that has too many.
            for _ in 0..self.deal.owners[slice].len() {
                let hosts = self.deal.owners[slice].iter().map(|&m| self.host(m));
                let crowded = hosts.filter(|&host| self.deal.on(slice, host) > self.deal.limits[host]).min();
                let Some(host) = crowded else { break };
                fine &= self.exchange(slice, host);
            }
        }
        fine
    }

    /// Takes an owner of a slice from a host, in exchange for one of another slice elsewhere;
    /// the exchange that moves the fewest states of the first ones that are found. False where
    /// none was.
    fn exchange(&mut self, slice: usize, host: usize) -> bool {
        let slices = self.deal.owners.len();
        let others = (0..slices).map(|i| (self.cursor + i) % slices).filter(|other| *other != slice);
        let found = others.filter_map(|other| self.pair(slice, other, host)).take(COMPARED);
        let Some((_, other, here, there)) = found.min() else { return false };
        self.cursor = (other + 1) % slices;
        self.deal.unmark(slice, here);
        self.deal.unmark(other, there);
        self.deal.mark(slice, there);
        self.deal.mark(other, here);
        true
    }

    /// The best exchange between two slices: what it costs, the other slice, who leaves the
    /// first one, and who leaves the other.
    fn pair(&self, slice: usize, other: usize, host: usize) -> Option<(i32, usize, usize, usize)> {
        if self.deal.on(other, host) >= self.deal.limits[host] {
            return None;
        }
        let holds =
            |m: usize, slice: usize| i32::from(self.deal.question.held[m].contains(SliceId(slice as u32)));
        let cost = |leaves: usize, from: usize, to: usize| holds(leaves, from) - holds(leaves, to);
        let owners = |slice: usize| self.deal.owners[slice].iter().copied();
        let leaves = owners(slice).filter(|&m| self.host(m) == host && !self.deal.owners[other].contains(&m));
        let here = leaves.min_by_key(|&m| (cost(m, slice, other), m))?;
        let comes = owners(other).filter(|&m| {
            let from = self.host(m);
            let now = self.deal.on(slice, from);
            from != host
                && !self.deal.owners[slice].contains(&m)
                && now < self.deal.on(other, from)
                && now < self.deal.limits[from]
        });
        let there = comes.min_by_key(|&m| (cost(m, other, slice), m))?;
        Some((cost(here, slice, other) + cost(there, other, slice), other, here, there))
    }
}
