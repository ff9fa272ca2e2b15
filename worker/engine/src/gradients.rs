//! Lane gradients on their way up the tree.
//!
//! Sums that were computed here are whole flat gradients, one for each node of the cover of
//! our lanes; sums received from others are single slices. Buffers of whole gradients are
//! kept and used again: a step in steady state takes none.

use crate::EngineError;
use caravan_kernels::{Cpu, add};
use caravan_types::peer::Key;
use caravan_types::{Node, Slice, SliceId, SliceSet, Step};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

/// The final gradient of a slice.
#[derive(Debug, Default)]
enum Final {
    /// None.
    #[default]
    None,
    /// We computed all lanes: it lies in the root's own sum.
    Root(Step),
    /// Summed up.
    Sum(Step, Vec<f32>),
}

/// What an executor holds of gradients.
#[derive(Debug)]
pub(crate) struct Gradients {
    lanes: u32,
    /// The step that `own` is for.
    step: Option<Step>,
    /// Sums computed here, from left to right, no two of them siblings.
    own: Vec<(Node, Vec<f32>)>,
    /// Whole-gradient buffers not in use.
    spare: Vec<Vec<f32>>,
    /// Sums of others.
    received: BTreeMap<(Step, SliceId, Node), Vec<f32>>,
    finals: Vec<Final>,
}

fn elements(slice: &Slice) -> Range<usize> {
    slice.range.start as usize..slice.range.end as usize
}

impl Gradients {
    pub(crate) fn new(lanes: u32, slices: usize) -> Self {
        let finals = (0..slices).map(|_| Final::None).collect();
        Self { lanes, step: None, own: Vec::new(), spare: Vec::new(), received: BTreeMap::new(), finals }
    }

    /// Forgets everything but the memory of our own sums.
    pub(crate) fn reset(&mut self) {
        self.clear_own();
        self.received.clear();
        self.finals.fill_with(Final::default);
    }

    fn clear_own(&mut self) {
        self.step = None;
        self.spare.extend(self.own.drain(..).map(|(_, buffer)| buffer));
    }

    /// Starts computing a step: what is left of earlier ones goes.
    pub(crate) fn start(&mut self, step: Step) {
        self.clear_own();
        self.received.retain(|(s, ..), _| *s >= step);
        self.step = Some(step);
    }

    /// Gives up computing: nothing of it stays.
    pub(crate) fn abandon(&mut self) {
        self.clear_own();
    }

    /// A zeroed buffer for one lane's gradient.
    pub(crate) fn buffer(&mut self, cpu: &Cpu, parameters: usize) -> Vec<f32> {
        match self.spare.pop() {
            Some(mut buffer) => {
                add::zero(cpu, &mut buffer);
                buffer
            }
            None => vec![0.0; parameters],
        }
    }

    /// Returns a buffer that is not needed.
    pub(crate) fn give_back(&mut self, buffer: Vec<f32>) {
        self.spare.push(buffer);
    }

    /// Takes the gradient of the next lane and adds up every sub-tree that is complete: like
    /// a carry in a binary counter, so that at most log₂(lanes) + 1 sums exist.
    pub(crate) fn push(&mut self, cpu: &Cpu, lane: u32, gradient: Vec<f32>) {
        let (mut node, mut sum) = (Node::leaf(lane), gradient);
        while let Some((left, mut total)) = self.own.pop() {
            if !left.is_left() || left.parent() != node.parent() {
                self.own.push((left, total));
                break;
            }
            add::add(cpu, &mut total, &sum);
            self.spare.push(std::mem::replace(&mut sum, total));
            node = node.parent();
        }
        self.own.push((node, sum));
    }

    /// Stores a sum that someone else computed.
    pub(crate) fn receive(
        &mut self,
        step: Step,
        slice: SliceId,
        node: Node,
        sum: Vec<f32>,
    ) -> Result<(), EngineError> {
        if node.level > Node::root(self.lanes).level || node.lanes().end > u64::from(self.lanes) {
            return Err(EngineError::UnknownNode { node, lanes: self.lanes });
        }
        self.received.insert((step, slice, node), sum);
        Ok(())
    }

    /// A sum that was computed here.
    pub(crate) fn own(
        &self,
        step: Step,
        id: SliceId,
        slice: &Slice,
        node: Node,
    ) -> Result<&[f32], EngineError> {
        let missing = EngineError::Missing(Key::Partial { step, slice: id, node });
        self.find_own(step, node).map(|sum| &sum[elements(slice)]).ok_or(missing)
    }

    fn find_own(&self, step: Step, node: Node) -> Option<&Vec<f32>> {
        let found = self.own.iter().find(|(n, _)| *n == node && self.step == Some(step));
        found.map(|(_, sum)| sum)
    }

    /// Adds up a slice to the root, frees what was received for it, and returns the result.
    pub(crate) fn reduce(
        &mut self,
        cpu: &Cpu,
        step: Step,
        id: SliceId,
        slice: &Slice,
    ) -> Result<&[f32], EngineError> {
        let root = Node::root(self.lanes);
        let sum = match self.total(cpu, step, id, slice, root)? {
            Cow::Borrowed(_) if self.find_own(step, root).is_some() => Final::Root(step),
            sum => Final::Sum(step, sum.into_owned()),
        };
        let (first, last) = (Node { level: 0, index: 0 }, Node { level: u8::MAX, index: u32::MAX });
        let used = self.received.range((step, id, first)..=(step, id, last));
        let used: Vec<_> = used.map(|(key, _)| *key).collect();
        for key in used {
            self.received.remove(&key);
        }
        self.finals[id.0 as usize] = sum;
        self.last(step, id, slice)
    }

    /// The sum of a sub-tree: as it is here, or its left half plus its right half.
    fn total(
        &self,
        cpu: &Cpu,
        step: Step,
        id: SliceId,
        slice: &Slice,
        node: Node,
    ) -> Result<Cow<'_, [f32]>, EngineError> {
        if let Some(sum) = self.find_own(step, node) {
            return Ok(Cow::Borrowed(&sum[elements(slice)]));
        }
        if let Some(sum) = self.received.get(&(step, id, node)) {
            return Ok(Cow::Borrowed(sum));
        }
        let Some((left, right)) = node.children() else {
            return Err(EngineError::MissingPartial { step, slice: id, node });
        };
        let mut sum = self.total(cpu, step, id, slice, left)?.into_owned();
        add::add(cpu, &mut sum, &self.total(cpu, step, id, slice, right)?);
        Ok(Cow::Owned(sum))
    }

    /// The final gradient of a slice.
    pub(crate) fn last(&self, step: Step, id: SliceId, slice: &Slice) -> Result<&[f32], EngineError> {
        let missing = EngineError::NotReduced { step, slice: id };
        match &self.finals[id.0 as usize] {
            Final::Root(s) if *s == step => {
                let root = self.find_own(step, Node::root(self.lanes));
                root.map(|sum| &sum[elements(slice)]).ok_or(missing)
            }
            Final::Sum(s, sum) if *s == step => Ok(sum),
            _ => Err(missing),
        }
    }

    /// Frees the final gradients of slices that are applied, and what was received for this
    /// step or earlier ones: a step is applied only when every sum of it has been used.
    pub(crate) fn applied(&mut self, step: Step, slices: &SliceSet) {
        slices.iter().for_each(|id| self.finals[id.0 as usize] = Final::None);
        self.received.retain(|(s, ..), _| *s > step);
    }
}
