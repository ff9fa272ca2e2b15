//! Checkpoints being written: parts come in, and what each owner has of what is written. A
//! manifest is due once the parts cover the model and all owners have vouched.

use caravan_types::task::SavedPart;
use caravan_types::{Generation, SliceId, SliceSet, SliceSum, Step, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// At most this many checkpoints are collected at once. Parts of a step come within moments of
/// each other; what is older lost a writer and can never be complete.
const MOST: usize = 4;

/// What each owner says it has.
pub(crate) type Vouched = BTreeMap<WorkerId, Vec<(SliceId, SliceSum)>>;

/// One checkpoint.
#[derive(Clone, Debug, Default)]
struct Open {
    /// As they came.
    parts: Vec<SavedPart>,
    /// Their files.
    files: BTreeSet<String>,
    covered: SliceSet,
    /// Slices of all parts; more than are covered where one is in two parts.
    named: usize,
    vouched: Vouched,
    /// Who still has to vouch.
    silent: BTreeSet<WorkerId>,
}

/// Checkpoints by who asked for them and for which step. Parts of different generations are
/// never mixed, since two generations may have dealt the slices differently.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saves {
    open: BTreeMap<(Generation, Step), Open>,
}

impl Saves {
    /// Opens a checkpoint, if it is not open: these have to vouch for it.
    pub(crate) fn open(
        &mut self,
        generation: Generation,
        step: Step,
        owners: impl FnOnce() -> BTreeSet<WorkerId>,
    ) {
        self.open.entry((generation, step)).or_insert_with(|| Open { silent: owners(), ..Open::default() });
        while self.open.len() > MOST {
            self.open.pop_first();
        }
    }

    /// Adds a part, where the checkpoint is open.
    pub(crate) fn add(&mut self, generation: Generation, step: Step, part: SavedPart) {
        let Some(open) = self.open.get_mut(&(generation, step)) else { return };
        if open.files.insert(part.file.clone()) {
            open.covered.extend(part.slices.iter().map(|(id, _)| *id));
            open.named += part.slices.len();
            open.parts.push(part);
        }
    }

    /// An owner says what it has, where the checkpoint is open.
    pub(crate) fn vouch(
        &mut self,
        generation: Generation,
        step: Step,
        worker: WorkerId,
        sums: Vec<(SliceId, SliceSum)>,
    ) {
        if let Some(open) = self.open.get_mut(&(generation, step)) {
            open.silent.remove(&worker);
            open.vouched.insert(worker, sums);
        }
    }

    /// What is complete: the parts, which hold each of the `slices` slices exactly once, and what
    /// was vouched.
    pub(crate) fn take(
        &mut self,
        generation: Generation,
        step: Step,
        slices: usize,
    ) -> Option<(Vec<SavedPart>, Vouched)> {
        let Open { covered, named, silent, .. } = self.open.get(&(generation, step))?;
        if *named != slices || covered.len() != slices || !silent.is_empty() {
            return None;
        }
        self.open.remove(&(generation, step)).map(|open| (open.parts, open.vouched))
    }

    /// What decides something still: of checkpoints newer than this one, who is missing and which
    /// parts have come.
    #[cfg(feature = "explore")]
    pub(crate) fn essence(&self, newest: Option<Step>) -> impl std::fmt::Debug + '_ {
        let newer = self.open.iter().filter(move |((_, step), _)| Some(*step) > newest);
        newer.map(|(of, open)| (of, &open.files, &open.silent)).collect::<Vec<_>>()
    }

    /// A new plan is in force: all have reported, and whoever has not vouched by then never will.
    pub(crate) fn planned(&mut self) {
        self.open.retain(|_, open| open.silent.is_empty());
    }

    /// A part could not be written: the checkpoint will not be.
    pub(crate) fn give_up(&mut self, generation: Generation, step: Step) {
        self.open.remove(&(generation, step));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::Digest;

    fn part(file: &str, slices: &[u32]) -> SavedPart {
        let slices = slices.iter().map(|s| (SliceId(*s), Digest::default())).collect();
        SavedPart { file: file.into(), bytes: 1, digest: Digest::default(), slices }
    }

    #[test]
    fn parts_of_two_generations_never_make_one_checkpoint() {
        let mut saves = Saves::default();
        for (generation, file, slice) in [(1, "a", 0), (2, "b", 1)] {
            saves.open(Generation(generation), Step(5), BTreeSet::new);
            saves.add(Generation(generation), Step(5), part(file, &[slice]));
            assert_eq!(saves.take(Generation(generation), Step(5), 2), None);
        }
        saves.add(Generation(2), Step(5), part("c", &[0]));
        assert!(saves.take(Generation(2), Step(5), 2).is_some());
    }

    #[test]
    fn what_an_owner_has_not_vouched_for_is_not_complete() {
        let (mut saves, [a, b]) = (Saves::default(), [1, 2].map(WorkerId));
        saves.open(Generation(1), Step(5), || [a, b].into());
        saves.add(Generation(1), Step(5), part("a", &[0]));
        saves.vouch(Generation(1), Step(5), a, Vec::new());
        assert_eq!(saves.take(Generation(1), Step(5), 1), None);
        saves.vouch(Generation(1), Step(5), b, Vec::new());
        assert!(saves.take(Generation(1), Step(5), 1).is_some());
    }

    #[test]
    fn what_can_never_be_complete_is_forgotten() {
        let mut saves = Saves::default();
        for step in 0..100 {
            saves.open(Generation(1), Step(step), BTreeSet::new);
            saves.add(Generation(1), Step(step), part("a", &[0]));
        }
        assert!(saves.open.len() <= MOST);
    }
}
