//! Who stands still when everybody does.
//!
//! A step needs all members, so one that hangs stops them all, and soon all of them report that
//! nothing moves. The one to cut out is not a victim but the first cause: from a member that
//! stands still, follow what it waits for. Who stands still and waits for its own engine is the
//! cause. Where the way goes in a circle, something that was sent never came: the one for whom
//! most others wait is cut out, since new connections are made then.

use crate::members::Worker;
use caravan_types::WorkerId;
use caravan_types::progress::Wait;
use std::collections::{BTreeMap, BTreeSet};

/// A member to be cut out, and one that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Culprit {
    pub(crate) worker: WorkerId,
    pub(crate) waiting: Option<WorkerId>,
}

/// The first cause among members that `still` says stand still.
pub(crate) fn culprit(
    members: &BTreeMap<WorkerId, &Worker>,
    still: impl Fn(&Worker) -> bool,
) -> Option<Culprit> {
    let stuck: BTreeMap<WorkerId, &Worker> =
        members.iter().filter(|(_, w)| still(w)).map(|(id, w)| (*id, *w)).collect();
    let mut waited: BTreeMap<WorkerId, Vec<WorkerId>> = BTreeMap::new();
    for (id, worker) in members {
        if let Wait::Peer { peer, .. } = worker.wait {
            waited.entry(peer).or_default().push(*id);
        }
    }
    let named = |worker| Culprit { worker, waiting: waited.get(&worker).map(|w| w[0]) };
    // Longest still first: later ones may only have noticed since.
    let mut order: Vec<_> = stuck.iter().map(|(id, w)| (w.moved, *id)).collect();
    order.sort_unstable();
    let at_work = order.iter().find(|(_, id)| matches!(stuck[id].wait, Wait::Engine));
    if let Some((_, id)) = at_work {
        return Some(named(*id));
    }
    for (_, start) in order {
        let (mut at, mut seen) = (start, BTreeSet::new());
        // Every turn sees one more member.
        while seen.insert(at) {
            match stuck.get(&at).map(|w| w.wait) {
                Some(Wait::Peer { peer, .. }) => at = peer,
                // It moves, or waits for a plan: what it owes is still to come.
                _ => break,
            }
        }
        if stuck.contains_key(&at) && matches!(stuck[&at].wait, Wait::Peer { .. }) {
            let most = seen.iter().filter(|id| stuck.contains_key(id));
            let most = most.max_by_key(|id| (waited.get(id).map_or(0, Vec::len), **id));
            return most.map(|id| named(*id));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Session;
    use crate::members::Members;
    use caravan_types::Step;
    use caravan_types::message::{Activity, Hello};
    use caravan_types::progress::{Awaited, EngineProgress};

    fn on(peer: u64) -> Wait {
        Wait::Peer { peer: WorkerId(peer), what: Awaited::Vote(Step(3)) }
    }

    /// Members with what each waits for and when it last moved; who moved after 100 is not stuck.
    fn find(waits: &[(Wait, u64)]) -> Option<(u64, Option<u64>)> {
        let mut members = Members::default();
        for (i, (wait, moved)) in (1..).zip(waits) {
            let hello = Hello {
                protocol: 0,
                build: String::new(),
                name: String::new(),
                host: String::new(),
                fabric: String::new(),
                families: Vec::new(),
                threads: 1,
                memory: 0,
                speed: 1.0,
                resume: None,
            };
            members.add(WorkerId(i), Session(i), hello, 0);
            members.beat(
                WorkerId(i),
                *moved,
                (Step(1), Activity::Computing, *wait, EngineProgress::default()),
            );
        }
        let all: BTreeMap<_, _> = members.iter().collect();
        let found = culprit(&all, |w| w.moved <= 100)?;
        Some((found.worker.0, found.waiting.map(|w| w.0)))
    }

    #[test]
    fn whose_engine_stands_still_is_the_cause_and_not_those_who_wait_for_it() {
        assert_eq!(find(&[(on(2), 50), (on(3), 20), (Wait::Engine, 30)]), Some((3, Some(2))));
    }

    #[test]
    fn waiting_for_one_who_moves_is_no_hang() {
        assert_eq!(find(&[(on(2), 50), (on(3), 20), (Wait::Engine, 500)]), None);
        assert_eq!(find(&[(on(2), 50), (Wait::Plan, 20)]), None);
        assert_eq!(find(&[]), None);
    }

    #[test]
    fn in_a_circle_the_one_is_cut_out_for_whom_most_wait() {
        assert_eq!(find(&[(on(2), 50), (on(1), 50), (on(1), 60)]), Some((1, Some(2))));
        assert_eq!(find(&[(on(2), 50), (on(1), 50)]), Some((2, Some(1))));
    }
}
