//! A simulated run's size and faults, all from one seed.

use super::random::Random;
use caravan_engine::Flaw;
use caravan_types::run_spec::RUN_SPEC_VERSION;
use caravan_types::{
    BatchShape, DataSpec, Digest, ModelShape, NonFinitePolicy, NotFinite, NumericsClass, Precision, Recipe,
    RunSpec, Step,
};
use std::fmt;

/// The failure budget of simulated runs, in milliseconds.
pub(super) const DETECT_MS: u64 = 1000;

/// A pause that outlasts every run.
pub(super) const FOR_EVER_MS: u64 = 1_000_000_000;

/// A classic bug, reintroduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A bug of the coordinator's core.
    Coordinator(caravan_coordinator_core::Mutant),
    /// A bug of the worker's core.
    Worker(caravan_worker_core::Mutant),
    /// Generations start from nothing after a coordinator restart.
    ForgetGenerations,
    /// Some of what the coordinator tells a worker never comes, and no session breaks.
    LostNews,
    /// Liveness goes by the clock of the worker that speaks.
    ForeignClock,
    /// A part of a checkpoint counts as written before it is.
    SavedBeforeWritten,
    /// A redone step has other data.
    OtherData,
    /// A second coordinator leads without having seen what the first one has announced.
    TwoLeaders,
    /// Connections of old generations stay open, and their frames are taken.
    OldConnections,
}

/// One run's size and faults.
#[derive(Clone, Debug)]
pub struct Options {
    /// Key of all that is random.
    pub seed: u64,
    /// Workers at the start.
    pub workers: u32,
    /// Lanes, and micro-batches of each.
    pub lanes: u32,
    /// Micro-batches of each lane.
    pub micro_batches: u32,
    /// Stages of each pipeline; the planner's choice where none.
    pub stages: Option<u32>,
    /// Steps.
    pub steps: u64,
    /// Owners per slice.
    pub redundancy: u32,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Whether layers are recomputed on the way back: the coordinator's plans say so, or
    /// not, in turn each time that it is started.
    pub recompute: [bool; 4],
    /// Faults, at random moments of the time that the run takes without any.
    pub faults: Vec<(u64, Fault)>,
    /// Steps that are not finite, as a property of their data.
    pub bad: Vec<Bad>,
    /// What is done about them.
    pub non_finite: NonFinitePolicy,
    /// A bug to be found.
    pub mutant: Option<Mutant>,
}

/// A step that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bad {
    /// The step.
    pub step: Step,
    /// What of it.
    pub what: NotFinite,
}

/// Something that goes wrong, or is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A worker dies; whoever started it starts it again.
    Kill,
    /// A worker stands still for so long, and goes on.
    Pause(u64),
    /// A worker cannot be reached by others, or cannot reach them, or both, for so long.
    Partition {
        /// Milliseconds.
        ms: u64,
        /// Nothing comes in.
        inward: bool,
        /// Nothing goes out.
        outward: bool,
        /// The coordinator's connection, too.
        coordinator: bool,
    },
    /// A connection between two workers breaks.
    Break,
    /// A worker's clock jumps ahead.
    ClockJump(u64),
    /// The coordinator dies, in the middle of what it does, and is started again after so long.
    CoordinatorDies(u64),
    /// The coordinator's store says no: it ends, and is started again.
    StoreFails,
    /// The newest checkpoint is lost while the coordinator is restarted.
    DiskLost,
    /// A worker joins.
    Join,
    /// A worker is asked to leave.
    Leave,
    /// The run is asked to stop with a checkpoint.
    Drain,
    /// A worker's memory or one of its cores fails once, and nothing says so.
    Corrupt(Flaw),
}

impl Options {
    /// Steps on one worker without faults.
    #[must_use]
    pub fn quiet(lanes: u32, micro_batches: u32, steps: u64) -> Self {
        Self {
            seed: 0,
            workers: 1,
            lanes,
            micro_batches,
            stages: None,
            steps,
            redundancy: 1,
            checkpoint_every: 0,
            recompute: [false; 4],
            faults: Vec::new(),
            bad: Vec::new(),
            non_finite: NonFinitePolicy::Skip,
            mutant: None,
        }
    }

    /// A random cluster with at least five random faults.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        let mut r = Random::new(seed);
        let steps = r.below(6) + 4;
        let count = 5 + r.below(4);
        let mut faults: Vec<(u64, Fault)> =
            (0..count).map(|_| (r.below(60 * steps), fault(&mut r))).collect();
        faults.sort_by_key(|(at, _)| *at);
        let (workers, lanes, micro_batches) = (r.below(4) as u32 + 1, 1 << r.below(4), r.below(2) as u32 + 1);
        let (stages, redundancy) = (Some(r.below(5) as u32).filter(|s| *s > 0), r.below(3) as u32 + 1);
        let checkpoint_every = r.below(4);
        // Some runs have steps that are not finite, some of these stop at the first of them.
        let count = [0, 0, 1, 2][r.below(4) as usize];
        let mut bad: Vec<Bad> = (0..count).map(|_| bad(&mut r, steps)).collect();
        bad.sort_unstable();
        bad.dedup_by_key(|bad| bad.step);
        let non_finite = if r.below(6) == 0 { NonFinitePolicy::Stop } else { NonFinitePolicy::Skip };
        Self {
            seed,
            workers,
            lanes,
            micro_batches,
            stages,
            steps,
            redundancy,
            checkpoint_every,
            recompute: recompute(seed),
            faults,
            bad,
            non_finite,
            mutant: None,
        }
    }

    /// The run that is simulated.
    #[must_use]
    pub fn spec(&self) -> RunSpec {
        RunSpec {
            version: RUN_SPEC_VERSION,
            name: "simulated".into(),
            model: ModelShape {
                dim: 8,
                layers: 3,
                heads: 2,
                kv_heads: 1,
                hidden: 12,
                vocab: 16,
                context: 8,
                norm_eps: 1e-5,
                rope_theta: 1e4,
                rope_scaling: None,
            },
            data: DataSpec { digest: Digest::default(), tokens: 1 << 20 },
            batch: BatchShape {
                lanes: self.lanes,
                micro_batches: self.micro_batches,
                sequences: 1,
                sequence_length: 6,
            },
            // A norm that is clipped, so that a wrong one shows in every weight.
            recipe: Recipe {
                steps: self.steps,
                warmup_steps: 2,
                learning_rate: 0.01,
                clip_norm: 0.01,
                non_finite: self.non_finite,
                ..Recipe::default()
            },
            init: caravan_types::Initial::Seed,
            seed: 1,
            numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
        }
    }
}

/// A stream of its own: a seed's sizes and faults are what they would be without it.
fn recompute(seed: u64) -> [bool; 4] {
    let mut r = Random::new(seed ^ 0x7265_636f);
    [(); 4].map(|()| r.below(2) == 0)
}

fn bad(r: &mut Random, steps: u64) -> Bad {
    let what = [NotFinite::Loss, NotFinite::Gradient][r.below(2) as usize];
    Bad { step: Step(r.below(steps) + 1), what }
}

fn fault(r: &mut Random) -> Fault {
    match r.below(18) {
        0..=3 => Fault::Kill,
        4 if r.below(4) == 0 => Fault::Pause(FOR_EVER_MS),
        4 => Fault::Pause(r.below(2 * DETECT_MS) + 50),
        5 | 6 => {
            let (inward, outward) = [(true, true), (true, false), (false, true)][r.below(3) as usize];
            Fault::Partition {
                ms: r.below(3 * DETECT_MS) + 50,
                inward,
                outward,
                coordinator: r.below(2) == 0,
            }
        }
        7 => Fault::Break,
        8 => Fault::ClockJump(r.below(3 * DETECT_MS)),
        9 | 10 => Fault::CoordinatorDies(r.below(2 * DETECT_MS)),
        11 => Fault::StoreFails,
        12 => Fault::DiskLost,
        13 | 14 => Fault::Join,
        15 | 16 => {
            let bit = r.below(1 << 20);
            Fault::Corrupt([Flaw::Memory(bit), Flaw::Sum(bit), Flaw::Update(bit)][r.below(3) as usize])
        }
        _ => match r.below(3) {
            0 => Fault::Drain,
            _ => Fault::Leave,
        },
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, workers, lanes, micro_batches, stages, steps, redundancy, .. } = self;
        write!(
            f,
            "seed {seed}: {workers} workers, {lanes} lanes × {micro_batches}, stages {stages:?}, {steps} steps, r = \
             {redundancy}, a checkpoint every {} steps, recompute {:?}, faults {:?}, not finite {:?} ({}), mutant {:?}",
            self.checkpoint_every, self.recompute, self.faults, self.bad, self.non_finite, self.mutant
        )
    }
}
