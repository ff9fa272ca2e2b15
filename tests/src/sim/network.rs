//! The virtual network: connections that deliver in order after a random delay, can be cut, and
//! break where they were cut for too long.

use super::random::Random;
use caravan_coordinator_core::Session;
use caravan_types::message::{FromWorker, Hello, ToWorker};
use caravan_types::peer::PeerMessage;
use caravan_types::{Generation, Step, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A process, numbered once. The coordinator's incarnations are one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum End {
    Coordinator,
    Worker(u64),
}

/// Something on its way.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    Hello(Session, Hello),
    Up(Session, FromWorker),
    /// A session ended; to either end.
    Closed(Session),
    Welcome(Session, WorkerId, Step),
    Refused(Session),
    Down(Session, ToWorker),
    Peer {
        generation: Generation,
        from: WorkerId,
        message: PeerMessage,
        payload: Vec<f32>,
    },
    PeerLost {
        generation: Generation,
        peer: WorkerId,
    },
}

/// Which connection: frames of one are delivered in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Line {
    pub(super) from: End,
    pub(super) to: End,
    /// 0 for sessions.
    pub(super) generation: u64,
}

#[derive(Debug)]
pub(super) struct Network {
    /// When the last frame of a line arrives.
    last: BTreeMap<Line, u64>,
    /// Directions in which nothing is delivered.
    cut: BTreeSet<(End, End)>,
    /// What waits for a direction to be open again, oldest first.
    pub(super) held: Vec<(Line, Frame)>,
    random: Random,
}

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        let random = Random::new(seed ^ 0x6e65_7477);
        Self { last: BTreeMap::new(), cut: BTreeSet::new(), held: Vec::new(), random }
    }

    /// When a frame that is sent now arrives.
    pub(super) fn arrival(&mut self, now: u64, line: Line) -> u64 {
        // Mostly a fraction of a step; now and then as long as many.
        let delay = match self.random.below(40) {
            0 => self.random.below(150),
            1..=8 => self.random.below(8),
            _ => self.random.below(2),
        };
        let at = (now + delay).max(self.last.get(&line).copied().unwrap_or(0));
        self.last.insert(line, at);
        at
    }

    pub(super) fn is_cut(&self, from: End, to: End) -> bool {
        self.cut.contains(&(from, to))
    }

    pub(super) fn is_whole(&self) -> bool {
        self.cut.is_empty()
    }

    pub(super) fn set_cut(&mut self, from: End, to: End, cut: bool) {
        if cut {
            self.cut.insert((from, to));
        } else {
            self.cut.remove(&(from, to));
        }
    }

    /// Everything is open; what waited goes on its way.
    pub(super) fn take_open(&mut self) -> Vec<(Line, Frame)> {
        let held = std::mem::take(&mut self.held);
        let (cut, open) = held.into_iter().partition(|(line, _)| self.cut.contains(&(line.from, line.to)));
        self.held = cut;
        open
    }

    /// What a dead process sent and nobody has got is lost, and so is what is for it.
    pub(super) fn forget(&mut self, end: End) {
        self.held.retain(|(line, _)| line.from != end && line.to != end);
        self.cut.retain(|(from, to)| *from != end && *to != end);
    }
}
