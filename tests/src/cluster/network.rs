//! Links that deliver in order, and break when an end dies.

use super::Random;
use caravan_coordinator_core::Session;
use caravan_types::message::{FromWorker, ToWorker};
use caravan_types::peer::PeerMessage;
use caravan_types::{Generation, WorkerId};
use std::collections::{BTreeMap, VecDeque};

/// Something on its way.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    Up(WorkerId, FromWorker),
    Closed(Session),
    Down(WorkerId, ToWorker),
    Peer { from: WorkerId, to: WorkerId, generation: Generation, message: PeerMessage, value: Option<u64> },
    PeerLost { to: WorkerId, generation: Generation, peer: WorkerId },
}

/// One direction between two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Link {
    Up(WorkerId),
    Down(WorkerId),
    Peer { from: WorkerId, to: WorkerId, generation: Generation },
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Network {
    links: BTreeMap<Link, VecDeque<Frame>>,
    dead: Vec<WorkerId>,
}

impl Network {
    pub(crate) fn up(&mut self, worker: WorkerId, message: FromWorker) {
        self.links.entry(Link::Up(worker)).or_default().push_back(Frame::Up(worker, message));
    }

    pub(crate) fn down(&mut self, worker: WorkerId, message: ToWorker) {
        if !self.dead.contains(&worker) {
            self.links.entry(Link::Down(worker)).or_default().push_back(Frame::Down(worker, message));
        }
    }

    pub(crate) fn send(
        &mut self,
        from: WorkerId,
        to: WorkerId,
        generation: Generation,
        message: PeerMessage,
        value: Option<u64>,
    ) {
        if !self.dead.contains(&to) {
            let link = self.links.entry(Link::Peer { from, to, generation }).or_default();
            link.push_back(Frame::Peer { from, to, generation, message, value });
        }
    }

    /// Opens a member's connections; those to the dead break at once.
    pub(crate) fn connect(
        &mut self,
        to: WorkerId,
        generation: Generation,
        peers: impl Iterator<Item = WorkerId>,
    ) {
        for from in peers {
            let link = self.links.entry(Link::Peer { from, to, generation }).or_default();
            if self.dead.contains(&from) && link.is_empty() {
                link.push_back(Frame::PeerLost { to, generation, peer: from });
            }
        }
    }

    /// A worker's last messages arrive up to a random point; then its links break.
    pub(crate) fn kill(&mut self, victim: WorkerId, session: Session, random: &mut Random) {
        self.dead.push(victim);
        self.links.retain(|link, _| !matches!(link, Link::Down(to) | Link::Peer { to, .. } if *to == victim));
        for (link, frames) in &mut self.links {
            match *link {
                Link::Peer { from, to, generation } if from == victim => {
                    frames.truncate(random.below(frames.len() as u64 + 1) as usize);
                    frames.push_back(Frame::PeerLost { to, generation, peer: victim });
                }
                Link::Up(from) if from == victim => {
                    frames.truncate(random.below(frames.len() as u64 + 1) as usize)
                }
                _ => {}
            }
        }
        self.links.entry(Link::Up(victim)).or_default().push_back(Frame::Closed(session));
    }

    /// Links whose first message may be delivered now. A connection of a generation that its
    /// receiver has not reached waits; one that the receiver has left is closed.
    pub(crate) fn deliverable(&mut self, generations: &BTreeMap<WorkerId, Generation>) -> Vec<Link> {
        let reached = |to: &WorkerId| generations.get(to).copied().unwrap_or_default();
        self.links.retain(|link, frames| match link {
            Link::Peer { to, generation, .. } => *generation >= reached(to),
            _ => !frames.is_empty(),
        });
        let ready = |link: &Link| match link {
            Link::Peer { to, generation, .. } => *generation == reached(to),
            _ => true,
        };
        self.links.iter().filter(|(l, f)| !f.is_empty() && ready(l)).map(|(l, _)| *l).collect()
    }

    /// The first message of a deliverable link.
    #[allow(clippy::expect_used, reason = "a deliverable link has a first message")]
    pub(crate) fn take(&mut self, link: Link) -> Frame {
        self.links.get_mut(&link).and_then(VecDeque::pop_front).expect("a deliverable link")
    }
}
