//! Who is cut out when connections between members break although all of them live.
//!
//! A member that loses a connection accuses the other end, but either end may be at fault, or the
//! way between them. So an accusation is an edge between two members, and what has to go is a
//! member that is on all of them. A connection that broke once may have been an accident: then
//! everybody stays and gets new ones. Nobody waits for a third one, as each may take a whole
//! failure budget to break:
//!
//! 1. After the first accusation more of them are waited for, for `Timing::grace`. A dead member's
//!    session closes meanwhile, and that decides at once.
//! 2. A member that is on broken connections with two others or more, or on one that broke in an
//!    earlier generation of this step as well, is cut out: the one with the most others, of these
//!    the one that most others accuse, then the one accused most often, then the highest id.
//! 3. One member is cut out at a time. What is still broken then breaks again, between those who
//!    are left, and is known from before.

use crate::{Core, Millis, Output};
use caravan_types::status::{LossReason, Phase};
use caravan_types::timing::millis;
use caravan_types::{Generation, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A member, and the one at the other end of the connection that it lost.
pub(crate) type Accusation = (WorkerId, WorkerId);

/// What members said of each other since a step was last committed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accusations {
    /// In generations that are over, with how many of them.
    earlier: BTreeMap<Accusation, u32>,
    /// In the one that is in force.
    current: BTreeSet<Accusation>,
    /// When it is decided about these.
    pub(crate) until: Option<Millis>,
}

impl Accusations {
    /// Somebody is accused; what has been said is decided about at `until` or earlier.
    fn add(&mut self, accuser: WorkerId, accused: WorkerId, until: Millis) {
        self.current.insert((accuser, accused));
        self.until.get_or_insert(until);
    }

    /// The generation is over, or about to be.
    pub(crate) fn stopped(&mut self) {
        self.until = None;
        for accusation in std::mem::take(&mut self.current) {
            *self.earlier.entry(accusation).or_default() += 1;
        }
    }

    /// A step was committed: what broke before did not keep the members from stepping.
    pub(crate) fn stepped(&mut self) {
        self.earlier.clear();
    }

    /// Who is to be cut out of those who are `there`; nobody where everybody should try again.
    fn verdict(&self, there: impl Fn(WorkerId) -> bool) -> Option<WorkerId> {
        let mut known = self.earlier.clone();
        for accusation in &self.current {
            *known.entry(*accusation).or_default() += 1;
        }
        known.retain(|(accuser, accused), _| there(*accuser) && there(*accused));
        let mut seen: BTreeMap<WorkerId, Seen> = BTreeMap::new();
        for ((accuser, accused), times) in &known {
            seen.entry(*accuser).or_default().others.insert(*accused);
            let accused = seen.entry(*accused).or_default();
            accused.others.insert(*accuser);
            accused.accusers += 1;
            accused.times += times;
        }
        let most = seen.iter().map(|(id, s)| (s.others.len(), s.accusers, s.times, *id)).max()?;
        let (others, .., worker) = most;
        (others > 1 || self.again(&there)).then_some(worker)
    }

    /// Whether a connection is broken that was broken before, whoever said so.
    fn again(&self, there: impl Fn(WorkerId) -> bool) -> bool {
        let before = |a, b| self.earlier.contains_key(&(a, b)) || self.earlier.contains_key(&(b, a));
        self.current.iter().any(|(a, b)| there(*a) && there(*b) && before(*a, *b))
    }
}

/// A member's part in the accusations.
#[derive(Default)]
struct Seen {
    /// With whom it has a broken connection.
    others: BTreeSet<WorkerId>,
    /// How many of them accuse it.
    accusers: u32,
    /// How often they did.
    times: u32,
}

impl Core {
    /// A member lost its connection to another one.
    pub(crate) fn suspect(
        &mut self,
        now: Millis,
        generation: Generation,
        accuser: WorkerId,
        accused: WorkerId,
        out: &mut Vec<Output>,
    ) {
        let current = self.plan.as_ref().is_some_and(|p| p.generation == generation && p.has(accuser));
        // Once everybody stops at once, connections break because the other end has stopped.
        if !current || self.phase == Phase::Regrouping && !self.boundary {
            return;
        }
        if self.phase == Phase::Recovering {
            self.missed.insert((accuser, accused));
            return self.recover(now, false, out);
        }
        self.accuse(now, (accuser, accused));
    }

    /// What a member said of another one is decided about soon, where both are there.
    pub(crate) fn accuse(&mut self, now: Millis, (accuser, accused): Accusation) {
        let there = |worker| self.members.has(worker);
        if there(accuser) && there(accused) && accused != accuser {
            self.accusations.add(accuser, accused, now + millis(self.config.timing.grace()));
        }
    }

    /// Decides about what members said of each other, all of whom live.
    pub(crate) fn judge(&mut self, now: Millis, out: &mut Vec<Output>) {
        self.accusations.until = None;
        match self.accusations.verdict(|worker| self.members.has(worker)) {
            Some(worker) => self.lose(now, worker, LossReason::Unreachable, out),
            None => self.stop(now, false, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict after these accusations, in so many generations.
    fn verdict(generations: &[&[(u64, u64)]]) -> Option<u64> {
        let mut accusations = Accusations::default();
        for (i, said) in generations.iter().enumerate() {
            if i > 0 {
                accusations.stopped();
            }
            said.iter().for_each(|(a, b)| accusations.add(WorkerId(*a), WorkerId(*b), 0));
        }
        accusations.verdict(|_| true).map(|w| w.0)
    }

    #[test]
    fn one_broken_connection_is_an_accident_and_the_same_one_again_is_not() {
        assert_eq!(verdict(&[&[(1, 2)]]), None);
        assert_eq!(verdict(&[&[(1, 2), (2, 1)]]), None);
        assert_eq!(verdict(&[&[(1, 2)], &[(1, 2)]]), Some(2));
        assert_eq!(verdict(&[&[(2, 1)], &[(2, 1)]]), Some(1), "the accused, not the higher id");
        assert_eq!(verdict(&[&[(1, 2)], &[(2, 1)]]), Some(2), "the higher id on a tie");
        assert_eq!(verdict(&[&[(1, 2)], &[(3, 4)]]), None, "two accidents");
    }

    #[test]
    fn one_that_is_on_all_broken_connections_goes_whoever_accuses() {
        assert_eq!(verdict(&[&[(1, 3), (2, 3)]]), Some(3));
        assert_eq!(verdict(&[&[(1, 2), (1, 3)]]), Some(1), "it reaches nobody");
        assert_eq!(verdict(&[&[(1, 2)], &[(1, 3)]]), Some(1));
        assert_eq!(verdict(&[&[(1, 2), (2, 3), (4, 2)]]), Some(2));
    }

    #[test]
    fn those_who_are_gone_and_steps_that_were_committed_accuse_nobody() {
        let mut accusations = Accusations::default();
        accusations.add(WorkerId(1), WorkerId(3), 0);
        accusations.add(WorkerId(2), WorkerId(3), 0);
        assert_eq!(accusations.verdict(|w| w != WorkerId(3)), None);
        accusations.stopped();
        accusations.stepped();
        accusations.add(WorkerId(1), WorkerId(3), 0);
        assert_eq!(accusations.verdict(|_| true), None);
    }
}
