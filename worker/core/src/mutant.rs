//! Classic bugs of elastic trainers, for the simulator to find. Only with the feature `mutants`,
//! and even then off unless asked for.

/// A bug.
#[cfg(feature = "mutants")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A step is applied when one vote is still missing.
    ApplyEarly,
    /// A plan of any generation is obeyed.
    StalePlan,
    /// A vote counts whatever step it is for.
    VoteOfAnotherStep,
    /// Frames of old generations are taken.
    OldFrames,
    /// Norms are added member by member.
    NormByMember,
    /// What only the old plan needed is dropped before the new one has committed.
    DropBeforeCommit,
    /// Votes are counted, and not compared.
    BlindVote,
    /// A report is no promise: what is in flight goes on.
    ReportAndGoOn,
    /// A skipped step is applied by who was only prepared for it.
    ApplySkipped,
}

/// Whether a bug is switched on.
#[cfg(feature = "mutants")]
macro_rules! mutant {
    ($core:expr, $bug:ident) => {
        $core.mutant == Some(crate::Mutant::$bug)
    };
}

/// There are no bugs to switch on.
#[cfg(not(feature = "mutants"))]
macro_rules! mutant {
    ($core:expr, $bug:ident) => {
        false
    };
}
