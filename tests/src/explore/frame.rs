//! What is on its way, and what comes of an input.

use super::engine::Value;
use super::intern::{Interner, digest};
use caravan_types::message::{FromWorker, Hello, ToWorker};
use caravan_types::peer::{Key, PeerMessage};
use caravan_types::{Step, WorkerId};

/// Something on its way.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    /// The other end has hung up, after what it said.
    Closed,
    /// The other end is gone: what is before this may be lost.
    Broken,
    Hello(Hello),
    Up(FromWorker),
    Welcome(WorkerId, Step),
    Refused,
    Down(ToWorker),
    /// From a member, with what stands for its payload.
    Peer(WorkerId, PeerMessage, Value),
}

impl Frame {
    /// Whether it is only put beside others until all are there: a partial sum, a vote, what
    /// comes from the stage beside. Nothing is reported of it.
    pub(super) fn is_gathered(&self) -> bool {
        let Self::Peer(_, message, _) = self else { return false };
        !matches!(message, PeerMessage::Data(Key::Weights { .. } | Key::State { .. }))
    }

    /// Whether it tells a member of this generation to stop at once.
    pub(super) fn stops(&self, live: u16) -> bool {
        let Self::Down(ToWorker::Stop { generation, boundary: false }) = self else { return false };
        generation.0 > u64::from(live)
    }
}

/// The number of [`Frame::Closed`].
pub(super) const CLOSED: u32 = 0;

/// The number of [`Frame::Broken`].
pub(super) const BROKEN: u32 = 1;

/// Whether a frame ends a session or a connection.
pub(super) fn is_end(frame: u32) -> bool {
    frame == CLOSED || frame == BROKEN
}

/// Frames by number.
#[derive(Debug)]
pub(super) struct Frames(Interner<Frame>);

impl Frames {
    pub(super) fn new() -> Self {
        let mut frames = Self(Interner::default());
        frames.of(Frame::Closed);
        frames.of(Frame::Broken);
        frames
    }

    /// The number of a frame.
    pub(super) fn of(&mut self, frame: Frame) -> u32 {
        self.0.number(digest(&frame), || frame)
    }

    pub(super) fn get(&self, number: u32) -> &Frame {
        self.0.get(number)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A way between two processes, by their slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    Up(usize),
    Down(usize),
    Peer(usize, usize),
}

/// What an input of one process does to the rest of the world.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    /// A frame goes on its way, in a generation or a session.
    Push(Line, u16, u32),
    /// A worker has opened its fabric.
    Connect,
    /// The process ends.
    Exit,
    /// The coordinator is gone.
    Dead,
    /// The run goes back although, for each slice, these had its state: wrong where one of them
    /// lives for every slice.
    Back(Vec<u8>, String),
    /// An invariant does not hold.
    Wrong(String),
}

impl Effect {
    pub(super) fn push(line: Line, generation: u16, frame: u32) -> Self {
        Self::Push(line, generation, frame)
    }
}

/// The address of a worker's fabric names its slot.
pub(super) fn fabric_of(slot: usize) -> String {
    slot.to_string()
}

/// The slot behind an address.
pub(super) fn slot_of(fabric: &str) -> usize {
    fabric.parse().unwrap_or(0)
}
