//! What is explored: sizes, faults, and a bug to be found.

use super::engine::{self, Value};
use crate::sim::Mutant;
use caravan_types::timing::millis;
use caravan_types::{BatchShape, ModelShape, SliceId, SliceTable, Step, Timing};
use std::fmt;

/// Worker processes that there can be: three, and one for each wish to join.
pub(super) const SLOTS: usize = 5;

/// Worker processes at the start.
pub(super) const WORKERS: usize = 3;

/// Something that goes wrong or is wanted, at any moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A worker's process dies.
    Crash,
    /// The coordinator dies, also in the middle of what it does, and is started again from its
    /// store.
    Coordinator,
    /// The connection from one worker to another breaks.
    Break,
    /// A worker's session breaks.
    Session,
    /// A worker is paused, or everything that it says is late, for longer than the failure
    /// budget: it is given up, lives, and does not know.
    Silence,
    /// Time is up for everybody who has not answered, though answers are on their way.
    Late,
    /// One more worker comes.
    Join,
    /// A worker is asked to leave.
    Leave,
    /// The run is asked to stop with a checkpoint.
    Drain,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Crash,
        Self::Coordinator,
        Self::Break,
        Self::Session,
        Self::Silence,
        Self::Late,
        Self::Join,
        Self::Leave,
        Self::Drain,
    ];

    /// Whether it can be the end of a worker. After other faults all of them must live.
    pub(super) fn costs_workers(self) -> bool {
        !matches!(self, Self::Coordinator | Self::Join | Self::Drain)
    }

    /// A kind by the name that `Display` gives.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_string() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crash => "crash",
            Self::Coordinator => "coordinator",
            Self::Break => "break",
            Self::Session => "session",
            Self::Silence => "silence",
            Self::Late => "late",
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Drain => "drain",
        })
    }
}

/// Sizes, faults, and a bug to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// At most so many faults, at any moments.
    pub faults: usize,
    /// Of these kinds.
    pub kinds: Vec<Kind>,
    /// The last step. It begins with step 1 committed by everybody.
    pub steps: u64,
    /// Lanes, a power of two.
    pub lanes: u32,
    /// Stages of each pipeline.
    pub stages: u32,
    /// Owners of each slice.
    pub redundancy: u32,
    /// A step that is not finite, and is skipped.
    pub skipped: Option<u64>,
    /// A bug to be found.
    pub mutant: Option<Mutant>,
    /// Whether what may as well happen now does; without, there are many more states.
    pub eager: bool,
    /// Give up after so many states.
    pub most_states: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            faults: 1,
            kinds: Kind::ALL.to_vec(),
            steps: 2,
            lanes: 2,
            stages: 1,
            redundancy: 2,
            skipped: None,
            mutant: None,
            eager: true,
            most_states: usize::MAX,
        }
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { faults, kinds, steps, lanes, stages, redundancy, .. } = self;
        let kinds: Vec<String> = kinds.iter().map(Kind::to_string).collect();
        let kinds = kinds.join(",");
        write!(
            f,
            "--faults {faults} --kinds {kinds} --steps {steps} --lanes {lanes} --stages {stages} --owners {redundancy}"
        )?;
        self.skipped.map_or(Ok(()), |step| write!(f, " --skipped {step}"))?;
        f.write_str(if self.eager { "" } else { " --all" })?;
        self.mutant.map_or(Ok(()), |mutant| write!(f, " --mutant {}", name(mutant)))
    }
}

/// A bug's name on the command line.
fn name(mutant: Mutant) -> String {
    match mutant {
        Mutant::Coordinator(mutant) => format!("{mutant:?}"),
        Mutant::Worker(mutant) => format!("{mutant:?}"),
        other => format!("{other:?}"),
    }
}

/// The bugs that an exploration can switch on.
pub const MUTANTS: [Mutant; 13] = {
    use caravan_coordinator_core::Mutant as C;
    use caravan_worker_core::Mutant as W;
    [
        Mutant::Worker(W::ApplyEarly),
        Mutant::Worker(W::StalePlan),
        Mutant::Worker(W::VoteOfAnotherStep),
        Mutant::Worker(W::NormByMember),
        Mutant::Worker(W::DropBeforeCommit),
        Mutant::Worker(W::ReportAndGoOn),
        Mutant::Worker(W::ApplySkipped),
        Mutant::Coordinator(C::HealFromAnotherStep),
        Mutant::Coordinator(C::DropLeaversSlices),
        Mutant::Coordinator(C::PlanToldOnce),
        Mutant::OldConnections,
        Mutant::ForgetGenerations,
        Mutant::TwoLeaders,
    ]
};

/// A bug by its name.
#[must_use]
pub fn mutant(wanted: &str) -> Option<Mutant> {
    MUTANTS.into_iter().find(|mutant| name(*mutant) == wanted)
}

/// What follows from the options.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub(super) options: Options,
    pub(super) shape: ModelShape,
    pub(super) batch: BatchShape,
    pub(super) table: SliceTable,
    pub(super) timing: Timing,
    /// The failure budget.
    pub(super) detect: u64,
    pub(super) steps: u64,
    /// A step that is not finite.
    pub(super) bad: Option<Step>,
    /// By step and slice.
    truth: Vec<Vec<Value>>,
}

impl Setting {
    /// # Errors
    /// Where the sizes are none that anybody can train.
    pub(super) fn new(options: Options) -> Result<Self, String> {
        // The least that has units: an embedding and a head, of one slice each; another one for
        // each stage above two.
        let shape = ModelShape {
            dim: 2,
            layers: options.stages.saturating_sub(2),
            heads: 1,
            kv_heads: 1,
            hidden: 2,
            vocab: 2,
            context: 2,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
        };
        let batch = BatchShape { lanes: options.lanes, micro_batches: 1, sequences: 1, sequence_length: 1 };
        if !options.lanes.is_power_of_two() || options.steps < 1 {
            return Err("lanes are a power of two, and there is one step at least".into());
        }
        let timing = Timing::default();
        let mut setting = Self {
            table: SliceTable::new(&shape),
            shape,
            batch,
            timing,
            detect: millis(timing.detect()),
            steps: options.steps,
            bad: options.skipped.map(Step),
            options,
            truth: Vec::new(),
        };
        setting.truth = engine::truth(&setting)?;
        Ok(setting)
    }

    /// What a quiet run has of a slice after a step.
    pub(super) fn truth(&self, step: Step, slice: SliceId) -> Option<Value> {
        self.truth.get(step.0 as usize)?.get(slice.0 as usize).copied()
    }

    pub(super) fn is(&self, mutant: Mutant) -> bool {
        self.options.mutant == Some(mutant)
    }
}
