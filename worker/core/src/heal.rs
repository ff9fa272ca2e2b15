//! What a member still lacks of what its plan says it must have.

use crate::part::Place;
use caravan_types::peer::Key;
use caravan_types::{Part, SliceId, SliceSet, Source, Step, WorkerId};
use std::collections::BTreeMap;

/// Pieces that were asked for and are not here yet, with who brings each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heal {
    missing: BTreeMap<(SliceId, Part), Source>,
}

impl Heal {
    pub(crate) fn new(place: &Place) -> Self {
        let pieces = place.wanted().flat_map(|(from, part, slices)| {
            slices.iter().map(move |slice| ((slice, part), from)).collect::<Vec<_>>()
        });
        Self { missing: pieces.collect() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.missing.is_empty()
    }

    /// The first piece that a peer still owes, and who does.
    pub(crate) fn first(&self, step: Step) -> Option<(WorkerId, Key)> {
        self.missing.iter().find_map(|(&(slice, part), from)| match (from, part) {
            (Source::Peer(peer), Part::Weights) => Some((*peer, Key::Weights { step, slice })),
            (Source::Peer(peer), Part::State) => Some((*peer, Key::State { step, slice })),
            (Source::Checkpoint | Source::Init, _) => None,
        })
    }

    /// A peer brings a piece: which one it is, if it is one that is missed from that peer.
    /// A piece of another step is not the piece that is missed.
    pub(crate) fn arrives(&mut self, from: WorkerId, key: Key, base: Step) -> Option<(SliceId, Part)> {
        let (step, piece) = match key {
            Key::Weights { step, slice } => (step, (slice, Part::Weights)),
            Key::State { step, slice } => (step, (slice, Part::State)),
            Key::Partial { .. } | Key::Activation { .. } | Key::ActivationGradient { .. } => return None,
        };
        let expected = step == base && self.missing.get(&piece) == Some(&Source::Peer(from));
        expected.then(|| self.missing.remove(&piece)).map(|_| piece)
    }

    /// Pieces that do not come from a peer are here.
    pub(crate) fn local(&mut self, part: Part, slices: &SliceSet) {
        for slice in slices.iter() {
            self.missing.remove(&(slice, part));
        }
    }
}
