//! The order in which a stage computes its micro-batches: 1F1B (PipeDream-Flush, arXiv
//! 2006.09503, figure 4).
//!
//! A stage with `k` stages from itself to the end of the pipeline takes `k` micro-batches
//! forward, then one back and one forward in turn. So no more than `k` are in the air at a time,
//! and every one comes back in the order in which it went. The order is a function of the plan;
//! what has come in decides only how far it can be followed.

use caravan_types::{BatchShape, Lane, MicroId};
use std::ops::Range;

/// One thing to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Forward(MicroId),
    Backward(MicroId),
}

/// What of a step is still to be asked of the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Schedule {
    lanes: Range<Lane>,
    micro_batches: u32,
    /// Stages from this one to the last.
    depth: u32,
    forward: u32,
    backward: u32,
}

impl Schedule {
    /// The schedule of one step on a stage that has `depth` stages from itself to the end.
    pub(crate) fn new(lanes: Range<Lane>, batch: &BatchShape, depth: u32) -> Self {
        Self { lanes, micro_batches: batch.micro_batches, depth, forward: 0, backward: 0 }
    }

    fn total(&self) -> u32 {
        (self.lanes.end - self.lanes.start) * self.micro_batches
    }

    fn micro(&self, number: u32) -> MicroId {
        MicroId { lane: self.lanes.start + number / self.micro_batches, index: number % self.micro_batches }
    }

    /// What comes next; none once everything was asked for.
    pub(crate) fn next(&self) -> Option<Op> {
        let flying = self.forward - self.backward;
        if self.forward < self.total() && flying < self.depth {
            Some(Op::Forward(self.micro(self.forward)))
        } else {
            (self.backward < self.total()).then(|| Op::Backward(self.micro(self.backward)))
        }
    }

    /// The next one was asked for.
    pub(crate) fn advance(&mut self) {
        match self.next() {
            Some(Op::Forward(_)) => self.forward += 1,
            Some(Op::Backward(_)) => self.backward += 1,
            None => {}
        }
    }

    /// Whether a micro-batch is the last one of its lane.
    pub(crate) fn ends_lane(&self, micro: MicroId) -> bool {
        micro.index + 1 == self.micro_batches
    }

    /// Whether everything was asked for.
    pub(crate) fn is_done(&self) -> bool {
        self.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape(micro_batches: u32) -> BatchShape {
        BatchShape { lanes: 8, micro_batches, sequences: 1, sequence_length: 1 }
    }

    fn all(lanes: Range<Lane>, micro_batches: u32, depth: u32) -> Vec<Op> {
        let mut schedule = Schedule::new(lanes, &shape(micro_batches), depth);
        let mut ops = Vec::new();
        while let Some(op) = schedule.next() {
            ops.push(op);
            schedule.advance();
        }
        assert!(schedule.is_done());
        ops
    }

    #[test]
    fn one_stage_takes_each_micro_batch_there_and_back() {
        let m = |lane, index| MicroId { lane, index };
        let there_and_back = |m| [Op::Forward(m), Op::Backward(m)];
        let expected: Vec<Op> =
            [m(2, 0), m(2, 1), m(3, 0), m(3, 1)].into_iter().flat_map(there_and_back).collect();
        assert_eq!(all(2..4, 2, 1), expected);
        assert!(all(3..3, 2, 4).is_empty());
    }

    proptest! {
        #[test]
        fn each_goes_once_there_and_once_back_in_order_and_never_more_than_depth_fly(
            start in 0u32..4, lanes in 0u32..4, micro_batches in 1u32..4, depth in 1u32..6,
        ) {
            let ops = all(start..start + lanes, micro_batches, depth);
            let of = |forward: bool| ops.iter().filter_map(move |op| match *op {
                Op::Forward(m) => forward.then_some(m),
                Op::Backward(m) => (!forward).then_some(m),
            }).collect::<Vec<_>>();
            let expected: Vec<MicroId> = (start..start + lanes)
                .flat_map(|lane| (0..micro_batches).map(move |index| MicroId { lane, index })).collect();
            prop_assert_eq!(of(true), expected.clone());
            prop_assert_eq!(of(false), expected);
            let mut flying = 0;
            for op in ops {
                match op {
                    Op::Forward(_) => flying += 1,
                    Op::Backward(_) => flying -= 1,
                }
                prop_assert!((0..=depth as i32).contains(&flying));
            }
        }
    }
}
