//! Whom a member waits for, and for what: every wait has a name.

use crate::Core;
use crate::round::Direction;
use crate::schedule::Op;
use caravan_types::peer::Key;
use caravan_types::progress::{Awaited, Wait};

impl Core {
    /// The first thing that keeps this member from going on.
    #[must_use]
    pub fn wait(&self) -> Wait {
        let Some(place) = &self.place else { return Wait::Plan };
        let owes = |peer, what| Wait::Peer { peer, what };
        if !self.heal.is_done() {
            return self
                .heal
                .first(place.base())
                .map_or(Wait::Engine, |(peer, key)| owes(peer, Awaited::Data(key)));
        }
        let step = self.applied.next();
        let Some(schedule) = &self.round.schedule else { return self.wait_for_weights() };
        let blocked = schedule.next().and_then(|op| match op {
            Op::Forward(micro) => {
                let here = self.inbox.has_stream(step, (Direction::Forward, micro));
                place.before.filter(|_| !here).map(|peer| (peer, Key::Activation { step, micro }))
            }
            Op::Backward(micro) => {
                let here = self.inbox.has_stream(step, (Direction::Backward, micro));
                place.after.filter(|_| !here).map(|peer| (peer, Key::ActivationGradient { step, micro }))
            }
        });
        if let Some((peer, key)) = blocked {
            return owes(peer, Awaited::Data(key));
        }
        // Its engine looks for the cause of what stops the run.
        if self.bad.as_ref().is_some_and(|bad| bad.step == step) {
            return Wait::Engine;
        }
        if self.round.voted {
            let silent = place.peers().find(|peer| !self.inbox.has_vote(step, *peer));
            return silent.map_or(Wait::Plan, |peer| owes(peer, Awaited::Vote(step)));
        }
        for slice in place.owned.iter().filter(|s| !self.round.reducing.contains(*s)) {
            let mut senders = place.senders(slice).into_iter().flatten().filter(|(_, w)| **w != place.me);
            let missing = senders.find(|(node, _)| !self.inbox.has_partial(step, slice, **node));
            if let Some((&node, &peer)) = missing {
                return owes(peer, Awaited::Data(Key::Partial { step, slice, node }));
            }
        }
        Wait::Engine
    }

    /// Between two steps: weights that their owners publish, or the end.
    fn wait_for_weights(&self) -> Wait {
        let Some(place) = &self.place else { return Wait::Plan };
        let missing = place.computed.iter().find(|slice| !self.weights.contains(*slice));
        let from = missing.and_then(|slice| place.owners(slice).first().map(|peer| (*peer, slice)));
        match from {
            Some((peer, slice)) if peer != place.me => {
                let step = self.applied;
                Wait::Peer { peer, what: Awaited::Data(Key::Weights { step, slice }) }
            }
            Some(_) => Wait::Engine,
            // It looks at what it has before it stops, and before the end.
            None if self.stopping.is_some() || self.finished && !self.has_sums() => Wait::Engine,
            None => Wait::Plan,
        }
    }
}
