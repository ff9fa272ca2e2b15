//! Lane gradients on their way up the tree.
//!
//! Sums that were computed here have the gradients of all units of our stage, one sum for each
//! node of the cover of our lanes; sums received from others are single slices. Buffers of whole
//! stages are kept and used again: a step in steady state takes none.

use crate::EngineError;
use caravan_kernels::checksum::{checksum, flip};
use caravan_kernels::{Buffer, Cpu, add};
use caravan_types::peer::Key;
use caravan_types::{Checksum, Lane, MicroId, Node, Slice, SliceId, SliceSet, Step, Subject};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

/// The final gradient of a slice.
#[derive(Debug, Default)]
struct Final {
    sum: Sum,
    /// Of its values, when they were summed up.
    checksum: Checksum,
}

/// Where it lies.
#[derive(Debug, Default)]
enum Sum {
    /// Nowhere.
    #[default]
    None,
    /// We computed all lanes: it lies in the root's own sum.
    Root(Step),
    /// Summed up.
    Here(Step, Vec<f32>),
}

/// What an executor holds of gradients.
#[derive(Debug)]
pub(crate) struct Gradients {
    lanes: u32,
    /// Elements of the flat model that our stage computes with.
    stage: Range<u64>,
    /// The step that `own` is for.
    step: Option<Step>,
    /// Sums computed here, from left to right, no two of them siblings.
    own: Vec<(Node, Buffer<f32>)>,
    /// The lane that is being added up.
    open: Option<(Lane, Buffer<f32>)>,
    /// Buffers not in use.
    spare: Vec<Buffer<f32>>,
    /// Sums of others.
    received: BTreeMap<(Step, SliceId, Node), Vec<f32>>,
    finals: Vec<Final>,
}

impl Gradients {
    pub(crate) fn new(lanes: u32, slices: usize) -> Self {
        let finals = (0..slices).map(|_| Final::default()).collect();
        let (own, spare, received) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { lanes, stage: 0..0, step: None, own, open: None, spare, received, finals }
    }

    /// Forgets everything: from now on these elements are computed with.
    pub(crate) fn place(&mut self, stage: Range<u64>) {
        self.clear_own();
        if self.stage != stage {
            self.spare.clear();
        }
        self.stage = stage;
        self.received.clear();
        self.finals.fill_with(Final::default);
    }

    fn clear_own(&mut self) {
        self.step = None;
        self.spare.extend(self.own.drain(..).map(|(_, buffer)| buffer));
        self.spare.extend(self.open.take().map(|(_, buffer)| buffer));
    }

    /// Starts computing a step, unless that was begun: what is left of earlier ones goes.
    /// Whether it starts now.
    pub(crate) fn start(&mut self, step: Step) -> bool {
        if self.step == Some(step) {
            return false;
        }
        self.clear_own();
        self.received.retain(|(s, ..), _| *s >= step);
        self.step = Some(step);
        true
    }

    /// Gives up computing: nothing of it stays.
    pub(crate) fn abandon(&mut self) {
        self.clear_own();
    }

    /// Where a lane's gradient is added up, the elements of our stage; zeroed at its first
    /// micro-batch. None for another lane than the one that is open.
    pub(crate) fn lane(&mut self, cpu: &Cpu, micro: MicroId) -> Option<&mut [f32]> {
        if micro.index == 0 && self.open.is_none() {
            let buffer = match self.spare.pop() {
                Some(mut buffer) => {
                    add::zero(cpu, &mut buffer);
                    buffer
                }
                None => Buffer::zeros((self.stage.end - self.stage.start) as usize),
            };
            self.open = Some((micro.lane, buffer));
        }
        let open = self.open.as_mut().filter(|(lane, _)| *lane == micro.lane);
        open.map(|(_, buffer)| &mut **buffer)
    }

    /// Where a slice's elements are within our stage's.
    fn elements(&self, slice: &Slice) -> Option<Range<usize>> {
        let inside = slice.range.start >= self.stage.start && slice.range.end <= self.stage.end;
        let at = |element: u64| (element - self.stage.start) as usize;
        inside.then(|| at(slice.range.start)..at(slice.range.end))
    }

    /// Closes the open lane and adds up every sub-tree that is complete: like a carry in a
    /// binary counter, so that at most log₂(lanes) + 1 sums exist.
    pub(crate) fn close(&mut self, cpu: &Cpu) {
        let Some((lane, gradient)) = self.open.take() else { return };
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

    /// The sums that were computed here, over our stage's elements.
    pub(crate) fn own_sums(&self) -> impl Iterator<Item = &[f32]> {
        self.own.iter().map(|(_, sum)| &**sum)
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
        self.find_own(step, slice, node).ok_or(missing)
    }

    fn find_own(&self, step: Step, slice: &Slice, node: Node) -> Option<&[f32]> {
        let (_, sum) = self.own.iter().find(|(n, _)| *n == node && self.step == Some(step))?;
        Some(&sum[self.elements(slice)?])
    }

    /// Adds up a slice to the root, frees what was received for it, and returns the result with
    /// its checksum. `flaw` is a bit of it that comes out wrong, where that is to be tried.
    pub(crate) fn reduce(
        &mut self,
        cpu: &Cpu,
        step: Step,
        id: SliceId,
        slice: &Slice,
        flaw: Option<u64>,
    ) -> Result<(&[f32], Checksum), EngineError> {
        let root = Node::root(self.lanes);
        let mut sum = match self.total(cpu, step, id, slice, root)? {
            Cow::Borrowed(_) if flaw.is_none() && self.find_own(step, slice, root).is_some() => {
                Sum::Root(step)
            }
            sum => Sum::Here(step, sum.into_owned()),
        };
        if let (Some(bit), Sum::Here(_, values)) = (flaw, &mut sum) {
            flip(values, bit);
        }
        let (first, last) = (Node { level: 0, index: 0 }, Node { level: u8::MAX, index: u32::MAX });
        let used = self.received.range((step, id, first)..=(step, id, last));
        let used: Vec<_> = used.map(|(key, _)| *key).collect();
        for key in used {
            self.received.remove(&key);
        }
        self.finals[id.0 as usize].sum = sum;
        let checksum = Checksum(checksum(cpu, &[self.last(step, id, slice)?]));
        self.finals[id.0 as usize].checksum = checksum;
        Ok((self.last(step, id, slice)?, checksum))
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
        if let Some(sum) = self.find_own(step, slice, node) {
            return Ok(Cow::Borrowed(sum));
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
    fn last(&self, step: Step, id: SliceId, slice: &Slice) -> Result<&[f32], EngineError> {
        let missing = EngineError::NotReduced { step, slice: id };
        match &self.finals[id.0 as usize].sum {
            Sum::Root(s) if *s == step => self.find_own(step, slice, Node::root(self.lanes)).ok_or(missing),
            Sum::Here(s, sum) if *s == step => Ok(sum),
            _ => Err(missing),
        }
    }

    /// The same, where it is what was summed up.
    pub(crate) fn sound(
        &self,
        cpu: &Cpu,
        step: Step,
        id: SliceId,
        slice: &Slice,
    ) -> Result<&[f32], EngineError> {
        let gradient = self.last(step, id, slice)?;
        if Checksum(checksum(cpu, &[gradient])) == self.finals[id.0 as usize].checksum {
            return Ok(gradient);
        }
        Err(EngineError::Corrupt { slice: id, step, what: Subject::Gradient })
    }

    /// Frees the final gradients of slices that are applied, and what was received for this
    /// step or earlier ones: a step is applied only when every sum of it has been used.
    pub(crate) fn applied(&mut self, step: Step, slices: &SliceSet) {
        slices.iter().for_each(|id| self.finals[id.0 as usize] = Final::default());
        self.received.retain(|(s, ..), _| *s > step);
    }
}
