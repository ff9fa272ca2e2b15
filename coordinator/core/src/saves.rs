//! Checkpoints being written: parts come in, a manifest is due once they cover the model.

use caravan_types::task::SavedPart;
use caravan_types::{Generation, SliceSet, Step};
use std::collections::{BTreeMap, BTreeSet};

/// At most this many checkpoints are collected at once. Parts of a step come within moments of
/// each other; what is older lost a writer and can never be complete.
const MOST: usize = 4;

/// Parts by who asked for them and for which step. Parts of different generations are never
/// mixed, since two generations may have dealt the slices differently.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saves {
    open: BTreeMap<(Generation, Step), Open>,
}

#[derive(Clone, Debug, Default)]
struct Open {
    /// As they came.
    parts: Vec<SavedPart>,
    /// Their files.
    files: BTreeSet<String>,
    covered: SliceSet,
    /// Slices of all parts; more than are covered where one is in two parts.
    named: usize,
}

impl Saves {
    /// Adds a part; all parts, once they hold each of the `slices` slices exactly once.
    pub(crate) fn add(
        &mut self,
        generation: Generation,
        step: Step,
        part: SavedPart,
        slices: usize,
    ) -> Option<Vec<SavedPart>> {
        let open = self.open.entry((generation, step)).or_default();
        if open.files.insert(part.file.clone()) {
            open.covered.extend(part.slices.iter().map(|(id, _)| *id));
            open.named += part.slices.len();
            open.parts.push(part);
        }
        if open.named == slices && open.covered.len() == slices {
            return self.open.remove(&(generation, step)).map(|open| open.parts);
        }
        while self.open.len() > MOST {
            self.open.pop_first();
        }
        None
    }

    /// A part could not be written: the checkpoint will not be.
    pub(crate) fn give_up(&mut self, generation: Generation, step: Step) {
        self.open.remove(&(generation, step));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::{Digest, SliceId};

    fn part(file: &str, slices: &[u32]) -> SavedPart {
        let slices = slices.iter().map(|s| (SliceId(*s), Digest::default())).collect();
        SavedPart { file: file.into(), bytes: 1, digest: Digest::default(), slices }
    }

    #[test]
    fn parts_of_two_generations_never_make_one_checkpoint() {
        let mut saves = Saves::default();
        assert_eq!(saves.add(Generation(1), Step(5), part("a", &[0]), 2), None);
        assert_eq!(saves.add(Generation(2), Step(5), part("b", &[1]), 2), None);
        assert!(saves.add(Generation(2), Step(5), part("c", &[0]), 2).is_some());
    }

    #[test]
    fn what_can_never_be_complete_is_forgotten() {
        let mut saves = Saves::default();
        for step in 0..100 {
            saves.add(Generation(1), Step(step), part("a", &[0]), 2);
        }
        assert!(saves.open.len() <= MOST);
    }
}
