//! The body of a frame: little-endian fields, one after the other.
//!
//! Every list begins with its length, and no list is allocated before the bytes that it needs
//! have been seen to be there.

use super::FrameError;
use crate::limits::{MAX_COUNT, MAX_LANES, MAX_SLICES};
use caravan_types::peer::{Key, LaneResult, PeerMessage, Prepared, SliceVote};
use caravan_types::slices::MOST_BLOCKS;
use caravan_types::{
    Checksum, Digest, Generation, Lane, MicroId, Node, Opinion, SliceId, SliceSum, Step, WorkerId,
};

/// Bytes of a slice's vote without its norms: slice, their number, sums of gradient, weights and
/// moments, the last one with a mark.
const SLICE: usize = 4 + 4 + 4 + 4 + 1 + 4;

/// Bytes of a lane's result: lane, loss, tokens.
const LANE: usize = 4 + 8 + 8;

/// A tree over [`MAX_LANES`] lanes is this high.
const MAX_LEVEL: u8 = MAX_LANES.trailing_zeros() as u8;

pub(super) fn put_hello(out: &mut Vec<u8>, run: Digest, to: WorkerId) {
    out.extend_from_slice(&run.0);
    out.extend_from_slice(&to.0.to_le_bytes());
}

pub(super) fn put_message(out: &mut Vec<u8>, message: &PeerMessage) {
    match message {
        PeerMessage::Data(key) => {
            out.extend_from_slice(&key.step().0.to_le_bytes());
            match key {
                Key::Partial { slice, node, .. } => {
                    out.extend_from_slice(&slice.0.to_le_bytes());
                    out.push(node.level);
                    out.extend_from_slice(&node.index.to_le_bytes());
                }
                Key::Weights { slice, .. } | Key::State { slice, .. } => {
                    out.extend_from_slice(&slice.0.to_le_bytes());
                }
                Key::Activation { micro, .. } | Key::ActivationGradient { micro, .. } => {
                    out.extend_from_slice(&micro.lane.to_le_bytes());
                    out.extend_from_slice(&micro.index.to_le_bytes());
                }
            }
        }
        PeerMessage::Prepared(prepared) => put_prepared(out, prepared),
    }
}

fn put_prepared(out: &mut Vec<u8>, prepared: &Prepared) {
    out.extend_from_slice(&prepared.step.0.to_le_bytes());
    out.push(prepared.stop_for.is_some().into());
    out.extend_from_slice(&prepared.stop_for.unwrap_or_default().0.to_le_bytes());
    out.extend_from_slice(&(prepared.slices.len() as u32).to_le_bytes());
    for SliceVote { slice, norms, gradient, state } in &prepared.slices {
        out.extend_from_slice(&slice.0.to_le_bytes());
        out.extend_from_slice(&(norms.len() as u32).to_le_bytes());
        norms.iter().for_each(|norm| out.extend_from_slice(&norm.to_le_bytes()));
        out.extend_from_slice(&gradient.0.to_le_bytes());
        out.extend_from_slice(&state.weights.0.to_le_bytes());
        out.push(state.moments.is_some().into());
        out.extend_from_slice(&state.moments.unwrap_or_default().0.to_le_bytes());
    }
    out.extend_from_slice(&prepared.weights.0.to_le_bytes());
    out.extend_from_slice(&(prepared.lanes.len() as u32).to_le_bytes());
    for LaneResult { lane, loss, tokens } in &prepared.lanes {
        out.extend_from_slice(&lane.to_le_bytes());
        out.extend_from_slice(&loss.to_le_bytes());
        out.extend_from_slice(&tokens.to_le_bytes());
    }
}

/// Reads fields from the front of some bytes.
pub(super) struct Body<'a> {
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn array<const N: usize>(&mut self, early: &'static str) -> Result<[u8; N], FrameError> {
        let (first, rest) = self.rest.split_first_chunk().ok_or(FrameError::Body(early))?;
        self.rest = rest;
        Ok(*first)
    }

    pub(super) fn u8(&mut self) -> Result<u8, FrameError> {
        Ok(u8::from_le_bytes(self.array("fields end early")?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, FrameError> {
        Ok(u32::from_le_bytes(self.array("fields end early")?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, FrameError> {
        Ok(u64::from_le_bytes(self.array("fields end early")?))
    }

    fn f64(&mut self) -> Result<f64, FrameError> {
        Ok(f64::from_le_bytes(self.array("fields end early")?))
    }

    /// A number of things of which each one takes at least `bytes` more bytes.
    fn list(&mut self, bytes: usize) -> Result<usize, FrameError> {
        let length = self.u32()? as usize;
        if length > self.rest.len() / bytes {
            return Err(FrameError::Body("list is longer than the body"));
        }
        Ok(length)
    }

    fn count(&mut self) -> Result<u64, FrameError> {
        let value = self.u64()?;
        if value < MAX_COUNT { Ok(value) } else { Err(FrameError::Body("counter is out of range")) }
    }

    fn slice(&mut self) -> Result<SliceId, FrameError> {
        let id = self.u32()?;
        if id < MAX_SLICES { Ok(SliceId(id)) } else { Err(FrameError::Body("slice is out of range")) }
    }

    pub(super) fn hello(&mut self) -> Result<(Digest, WorkerId), FrameError> {
        let run = Digest(self.array("fields end early")?);
        Ok((run, WorkerId(self.count()?)))
    }

    pub(super) fn step_and_slice(&mut self) -> Result<(Step, SliceId), FrameError> {
        Ok((Step(self.count()?), self.slice()?))
    }

    pub(super) fn step_and_micro(&mut self) -> Result<(Step, MicroId), FrameError> {
        let step = Step(self.count()?);
        Ok((step, MicroId { lane: self.lane()?, index: self.u32()? }))
    }

    pub(super) fn partial(&mut self) -> Result<Key, FrameError> {
        let (step, slice) = self.step_and_slice()?;
        let node = Node { level: self.u8()?, index: self.u32()? };
        if node.level > MAX_LEVEL || node.lanes().end > MAX_LANES.into() {
            return Err(FrameError::Body("tree node is out of range"));
        }
        Ok(Key::Partial { step, slice, node })
    }

    pub(super) fn prepared(&mut self) -> Result<Prepared, FrameError> {
        let step = Step(self.count()?);
        let stop_for = match (self.u8()?, self.count()?) {
            (0, 0) => None,
            (1, generation) => Some(Generation(generation)),
            _ => return Err(FrameError::Body("stop mark is neither there nor absent")),
        };
        let slices = (0..self.list(SLICE)?).map(|_| self.slice_vote()).collect::<Result<_, _>>()?;
        let weights = Opinion(self.u64()?);
        let lanes = (0..self.list(LANE)?).map(|_| self.result()).collect::<Result<_, _>>()?;
        Ok(Prepared { step, slices, weights, lanes, stop_for })
    }

    fn slice_vote(&mut self) -> Result<SliceVote, FrameError> {
        let slice = self.slice()?;
        let blocks = self.list(8)?;
        if blocks as u64 > MOST_BLOCKS {
            return Err(FrameError::Body("slice has too many blocks"));
        }
        let norms = (0..blocks).map(|_| self.f64()).collect::<Result<_, _>>()?;
        let (gradient, weights) = (Checksum(self.u32()?), Checksum(self.u32()?));
        let moments = match (self.u8()?, self.u32()?) {
            (0, 0) => None,
            (1, sum) => Some(Checksum(sum)),
            _ => return Err(FrameError::Body("sum of moments is neither there nor absent")),
        };
        Ok(SliceVote { slice, norms, gradient, state: SliceSum { weights, moments } })
    }

    fn lane(&mut self) -> Result<Lane, FrameError> {
        let lane = self.u32()?;
        if lane < MAX_LANES { Ok(lane) } else { Err(FrameError::Body("lane is out of range")) }
    }

    fn result(&mut self) -> Result<LaneResult, FrameError> {
        Ok(LaneResult { lane: self.lane()?, loss: self.f64()?, tokens: self.count()? })
    }

    pub(super) fn end(&self) -> Result<(), FrameError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FrameError::Body("fields end before it does")) }
    }
}
