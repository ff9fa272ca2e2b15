//! What thousands of members cost the coordinator's core: everybody joins and reports, a plan is
//! made and told; then virtual seconds with all their heartbeats and commits, a checkpoint, and a
//! death. Only the core's own processor time is counted, that of [`Core::next_deadline`] after every input
//! included, since a driver asks it.
//!
//! usage: members [MEMBERS [SECONDS]]        (10,000 members for 15 virtual seconds)

#![allow(clippy::print_stdout, clippy::print_stderr)]

use caravan_coordinator_core::{Config, Core, Input, Millis, Output, Restored, Session};
use caravan_types::message::{Activity, Committed, FromWorker, Hello, PROTOCOL_VERSION, Report, ToWorker};
use caravan_types::progress::{Doing, EngineProgress, Stragglers, Wait};
use caravan_types::task::SavedPart;
use caravan_types::timing::millis;
use caravan_types::{
    BatchShape, Digest, Generation, ModelShape, NumericsClass, Plan, Precision, SliceId, SliceSet, SliceSum,
    SliceTable, Step, Timing, Verdict, WorkerId,
};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const GIB: u64 = 1 << 30;

/// A step takes so long: with so many members and all their traffic it will hardly be less.
const STEP_MS: Millis = 500;

/// Members tell of a commit within so long of each other.
const SPREAD_MS: Millis = 50;

/// A core, what it costs, and what members do about what it says.
struct Bench {
    core: Core,
    table: SliceTable,
    members: u64,
    timing: Timing,
    now: Millis,
    spent: Duration,
    out: Vec<Output>,
}

impl Bench {
    fn new(members: u64) -> Option<Self> {
        let shape = ModelShape::preset("7b")?;
        let lanes = (members.next_power_of_two() as u32 / 2).clamp(16, 512);
        let timing = Timing::default();
        let config = Config {
            batch: BatchShape { lanes, micro_batches: 8, sequences: 1, sequence_length: shape.context },
            shape,
            steps: u64::MAX,
            numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
            recompute: false,
            redundancy: 2,
            stages: None,
            workers: members as u32,
            timing,
            stragglers: Stragglers::Rebalance,
        };
        let table = SliceTable::new(&config.shape);
        let core = Core::new(config, Restored::default(), 0);
        Some(Self { core, table, members, timing, now: 0, spent: Duration::ZERO, out: Vec::new() })
    }

    /// One input; what the core answered is added to `out`.
    fn tell(&mut self, input: Input) {
        let begun = computed();
        self.core.handle(self.now, input, &mut self.out);
        std::hint::black_box(self.core.next_deadline());
        self.spent += computed() - begun;
    }

    fn say(&mut self, worker: WorkerId, message: FromWorker) {
        self.tell(Input::Message { worker, message });
    }

    /// The core's time since this was asked last.
    fn lap(&mut self) -> Duration {
        std::mem::take(&mut self.spent)
    }

    fn hello(&mut self, id: u64) {
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            build: "bench".into(),
            name: format!("w{id}"),
            host: format!("host-{}", id / 8),
            fabric: format!("10.0.{}.{}:7071", id / 256, id % 256),
            families: vec!["portable".into()],
            threads: 1,
            resume: None,
            memory: 80 * GIB,
            speed: 4000.0,
        };
        self.tell(Input::Hello { session: Session(id), hello });
    }

    /// Everybody who is told to stop answers, until there is a plan; how long the longest input
    /// took, and the plan.
    fn regroup(&mut self, held: &BTreeMap<WorkerId, Held>, applied: Step) -> Option<(Duration, Arc<Plan>)> {
        let mut longest = Duration::ZERO;
        let stops = std::mem::take(&mut self.out);
        for output in stops {
            let Output::Send { worker, message: ToWorker::Stop { generation, .. } } = output else {
                continue;
            };
            let has = held.get(&worker).cloned().unwrap_or_default();
            let report = Report {
                generation,
                applied,
                verdict: Some(Verdict::Update { norm: 1.0 }),
                state: has.state,
                weights: has.weights,
                prepared: None,
                sums: Vec::new(),
            };
            let before = self.spent;
            self.say(worker, FromWorker::Report(report));
            longest = longest.max(self.spent - before);
        }
        let begun = computed();
        let out = std::mem::take(&mut self.out);
        let plan = out.iter().find_map(|output| match output {
            Output::Send { message: ToWorker::Plan(plan), .. } => Some(Arc::clone(plan)),
            _ => None,
        });
        drop(out);
        // The driver drops what it has sent.
        self.spent += computed() - begun;
        Some((longest, plan?))
    }

    /// One virtual second of all heartbeats and commits.
    fn second(&mut self, generation: Generation) {
        let (heartbeat, members) = (millis(self.timing.heartbeat()), self.members);
        for _ in 0..1000 {
            self.now += 1;
            let now = self.now;
            let (step, since) = (Step(now / STEP_MS), now % STEP_MS);
            for id in (1..=members).filter(|id| (id * 7919 + now).is_multiple_of(heartbeat)) {
                self.beat(WorkerId(id), step);
            }
            if since < SPREAD_MS && step > Step(0) {
                for id in (1..=members).filter(|id| (id * 7907) % SPREAD_MS == since) {
                    let committed = Committed {
                        generation,
                        step,
                        loss: 2.0,
                        norm: 1.0,
                        tokens: 1 << 20,
                        took_ms: STEP_MS,
                    };
                    self.say(WorkerId(id), FromWorker::Committed(committed));
                }
            }
            // What is sent is none of the core's; there is hardly anything.
            self.out.clear();
        }
    }

    fn beat(&mut self, worker: WorkerId, applied: Step) {
        let engine = EngineProgress {
            moved: self.now,
            doing: Doing::Reducing,
            busy_ms: self.now * 9 / 10,
            // A few percent between members, as on real machines.
            work: self.now * (1_000_000 + worker.0 % 97 * 500),
        };
        let beat =
            FromWorker::Heartbeat { applied, activity: Activity::Computing, wait: Wait::Engine, engine };
        self.say(worker, beat);
    }

    /// Everybody tells of its part of a checkpoint, with the slices whose primary owner it is, and
    /// what it has of all that it owns.
    fn checkpoint(&mut self, plan: &Plan) -> bool {
        let mut parts: BTreeMap<WorkerId, Vec<(SliceId, Digest)>> = BTreeMap::new();
        for (slice, owners) in (0..).map(SliceId).zip(&plan.owners) {
            parts.entry(owners[0]).or_default().push((slice, Digest::default()));
        }
        let (generation, step) = (plan.generation, self.core.step());
        let mut owned: BTreeMap<WorkerId, Vec<(SliceId, SliceSum)>> = BTreeMap::new();
        for (slice, owners) in (0..).map(SliceId).zip(&plan.owners) {
            owners.iter().for_each(|w| owned.entry(*w).or_default().push((slice, SliceSum::default())));
        }
        for (worker, sums) in owned {
            self.say(worker, FromWorker::Vouched { generation, step, sums });
        }
        for (worker, slices) in parts {
            let part =
                SavedPart { file: format!("part-{}", worker.0), bytes: 1, digest: Digest::default(), slices };
            self.say(worker, FromWorker::Saved { generation, step, part: Ok(part) });
        }
        self.out.drain(..).any(|output| matches!(output, Output::Complete { .. }))
    }
}

/// What a member has once a plan is healed.
#[derive(Clone, Default)]
struct Held {
    state: SliceSet,
    weights: SliceSet,
}

fn healed(plan: &Plan, table: &SliceTable) -> BTreeMap<WorkerId, Held> {
    let mut held: BTreeMap<WorkerId, Held> = BTreeMap::new();
    for stage in plan.pipelines.iter().flat_map(|p| &p.stages) {
        let here = table.iter().filter(|(_, slice)| stage.units.contains(&slice.unit.0));
        held.entry(stage.worker).or_default().weights = here.map(|(id, _)| id).collect();
    }
    for (slice, owners) in (0..).map(SliceId).zip(&plan.owners) {
        for owner in owners {
            held.entry(*owner).or_default().state.insert(slice);
        }
    }
    held
}

/// What this thread has computed: others may have the cores meanwhile.
fn computed() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn main() {
    let mut given = std::env::args().skip(1).filter_map(|n| n.parse().ok());
    let (members, seconds) = (given.next().unwrap_or(10_000), given.next().unwrap_or(15));
    let Some(mut bench) = Bench::new(members) else { return };
    (1..=members).for_each(|id| bench.hello(id));
    println!("{members} members join: {:.1} ms of the core's time", ms(bench.lap()));
    let Some((longest, plan)) = bench.regroup(&BTreeMap::new(), Step(0)) else {
        return eprintln!("there is no plan for {members} members");
    };
    let all = ms(bench.lap());
    println!(
        "they report and are told a plan: {all:.1} ms; the last report with its plan {:.1} ms",
        ms(longest)
    );

    let generation = plan.generation;
    let laps: Vec<f64> = (0..seconds)
        .map(|_| {
            bench.second(generation);
            ms(bench.lap())
        })
        .collect();
    let mean = laps.iter().sum::<f64>() / laps.len().max(1) as f64;
    let most = laps.iter().copied().fold(0.0, f64::max);
    let beats = 1000.0 / millis(bench.timing.heartbeat()) as f64;
    println!(
        "a second of heartbeats ({beats:.2} a member) and commits ({}): {mean:.1} ms on average, {most:.1} ms at most",
        1000 / STEP_MS
    );

    let complete = bench.checkpoint(&plan);
    let state = if complete { "complete" } else { "INCOMPLETE" };
    println!("parts of a checkpoint, {state}: {:.1} ms", ms(bench.lap()));

    let applied = bench.core.step();
    bench.tell(Input::Closed { session: Session(members / 2) });
    println!("a death, until all are told to stop: {:.1} ms", ms(bench.lap()));
    if let Some((longest, _)) = bench.regroup(&healed(&plan, &bench.table), applied) {
        let all = ms(bench.lap());
        println!(
            "they report and are told a plan: {all:.1} ms; the last report with its plan {:.1} ms",
            ms(longest)
        );
    }
}
