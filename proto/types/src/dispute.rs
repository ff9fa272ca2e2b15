//! What is compared to find silent corruption: memory that flips a bit, a core that adds wrong.
//!
//! Equal inputs give equal bits, so whoever owns a slice must have what its other owners have.
//! Every vote says what its sender has: the final gradient of each of its slices, and the
//! training state that the gradient is about to change. Where owners differ, more than half of
//! them are right. Where no half is, what they differ about is computed again, and the bits of
//! that say who was wrong.

use crate::{SliceId, Step, WorkerId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// CRC-32C of fp32 values as they lie in memory: finds every error of up to 32 bits in a row
/// for certain, others but for one in 2^32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Checksum(pub u32);

/// What somebody has of a slice at some step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SliceSum {
    /// Of its weights as they are computed with.
    pub weights: Checksum,
    /// Of its training state besides the weights; none where it is not here.
    pub moments: Option<Checksum>,
}

/// What owners of one slice may differ about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The final gradient of the step.
    Gradient,
    /// The training state after the step.
    State,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gradient => "gradient",
            Self::State => "training state",
        })
    }
}

/// A value that owners say they have, as a number: equal values are equal numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Opinion(pub u64);

impl Opinion {
    /// Of a final gradient and the squared norms of its blocks.
    #[must_use]
    pub fn of_gradient(gradient: Checksum, norms: &[f64]) -> Self {
        Self::of_words([gradient.0.into()].into_iter().chain(norms.iter().map(|n| n.to_bits())))
    }

    /// Of the weights of many slices, in their order.
    #[must_use]
    pub fn of_weights(sums: impl Iterator<Item = Checksum>) -> Self {
        Self::of_words(sums.map(|sum| sum.0.into()))
    }

    /// FNV-1a over words; the values are no adversary's.
    fn of_words(words: impl Iterator<Item = u64>) -> Self {
        Self(words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3)))
    }

    /// Of training state.
    #[must_use]
    pub fn of_state(sum: SliceSum) -> Self {
        Self(u64::from(sum.weights.0) << 32 | u64::from(sum.moments.unwrap_or_default().0))
    }
}

/// Owners of one slice differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispute {
    /// The slice.
    pub slice: SliceId,
    /// The step that the gradient is for, or that the training state is at.
    pub step: Step,
    /// What they differ about.
    pub subject: Subject,
    /// Who said what, ascending by worker.
    pub said: Vec<(WorkerId, Opinion)>,
}

impl Dispute {
    /// What owners of a slice say, if they do not all say the same.
    #[must_use]
    pub fn find(
        slice: SliceId,
        step: Step,
        subject: Subject,
        said: Vec<(WorkerId, Opinion)>,
    ) -> Option<Self> {
        let differ = said.windows(2).any(|pair| pair[0].1 != pair[1].1);
        differ.then_some(Self { slice, step, subject, said })
    }

    /// What more than half of them say.
    #[must_use]
    pub fn majority(&self) -> Option<Opinion> {
        let mut counts: BTreeMap<Opinion, usize> = BTreeMap::new();
        self.said.iter().for_each(|(_, opinion)| *counts.entry(*opinion).or_default() += 1);
        counts.into_iter().find(|(_, count)| 2 * count > self.said.len()).map(|(opinion, _)| opinion)
    }

    /// Those who say something else than the truth.
    pub fn wrong(&self, truth: Opinion) -> impl Iterator<Item = WorkerId> + '_ {
        self.said.iter().filter(move |(_, opinion)| *opinion != truth).map(|(worker, _)| *worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dispute(said: &[u64]) -> Option<Dispute> {
        let said = (1..).map(WorkerId).zip(said.iter().copied().map(Opinion)).collect();
        Dispute::find(SliceId(0), Step(1), Subject::State, said)
    }

    #[test]
    fn more_than_half_are_right_and_half_are_not() {
        assert_eq!(dispute(&[7, 7, 7]), None);
        let three = dispute(&[7, 8, 7]).unwrap();
        assert_eq!(three.majority(), Some(Opinion(7)));
        assert_eq!(three.wrong(Opinion(7)).collect::<Vec<_>>(), [WorkerId(2)]);
        assert_eq!(dispute(&[7, 8]).unwrap().majority(), None);
        assert_eq!(dispute(&[7, 7, 8, 8]).unwrap().majority(), None);
        assert_eq!(dispute(&[7, 8, 9]).unwrap().majority(), None);
    }

    #[test]
    fn a_gradient_of_the_other_sign_has_equal_norms_and_is_another_opinion() {
        assert_ne!(Opinion::of_gradient(Checksum(1), &[4.0]), Opinion::of_gradient(Checksum(2), &[4.0]));
        assert_ne!(Opinion::of_gradient(Checksum(1), &[4.0]), Opinion::of_gradient(Checksum(1), &[5.0]));
    }
}
