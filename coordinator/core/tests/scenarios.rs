//! Readable scenarios for the coordinator's core: `tests/scenarios/*.txt`.
//!
//! A file is a list of inputs, one a line, each followed by what the core answers, indented by
//! `>`. `REWRITE=1 cargo test -p caravan-coordinator-core --test scenarios` writes the answers
//! anew; the diff is then to be read like code. The model has five slices, s0 to s4.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use caravan_coordinator_core::{Config, Core, Input, Output, Record, Restored, Session};
use caravan_types::message::{Activity, Committed, FromWorker, Hello, PROTOCOL_VERSION, Report, ToWorker};
use caravan_types::non_finite::{Finding, LayerPart, Module, Sample, Tensor, Value};
use caravan_types::progress::{Awaited, Doing, EngineProgress, Place, Stragglers, Wait};
use caravan_types::task::SavedPart;
use caravan_types::{
    BatchShape, Checksum, Digest, Dispute, Generation, Member, MicroId, ModelShape, NonFinite, NotFinite,
    NumericsClass, Opinion, Plan, Precision, SliceId, SliceSet, SliceSum, Source, Step, Subject, Timing,
    Verdict, WorkerId,
};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

#[test]
fn every_scenario_answers_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let written = std::fs::read_to_string(&file).unwrap();
        let answered = play(&written);
        if std::env::var_os("REWRITE").is_some() {
            std::fs::write(&file, answered).unwrap();
        } else {
            assert_eq!(answered, written, "{}", file.display());
        }
    }
}

/// The same inputs with the answers of today's core.
fn play(script: &str) -> String {
    let mut answered = String::new();
    let mut stage: Option<Stage> = None;
    for line in script.lines().filter(|l| !l.starts_with('>')) {
        answered.push_str(line);
        answered.push('\n');
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words = Words::new(line);
        match &mut stage {
            None => stage = Some(Stage::new(&words)),
            Some(stage) => {
                for output in stage.take(&words) {
                    writeln!(answered, "> {}", shown(&output)).unwrap();
                }
            }
        }
    }
    answered
}

struct Stage {
    core: Core,
    now: u64,
}

/// A command, and its `key=value` arguments.
struct Words<'a> {
    line: &'a str,
    first: Vec<&'a str>,
    named: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        let (named, first): (Vec<&str>, Vec<&str>) = line.split_whitespace().partition(|w| w.contains('='));
        Self { line, first, named: named.into_iter().filter_map(|w| w.split_once('=')).collect() }
    }

    fn number(&self, name: &str, default: u64) -> u64 {
        self.named
            .get(name)
            .map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} in {:?}", self.line)))
    }

    /// `0-2,4` is slices 0, 1, 2 and 4.
    fn slices(&self, name: &str) -> Option<SliceSet> {
        let text = self.named.get(name)?;
        let ranges = text.split(',').filter(|r| !r.is_empty()).map(|r| {
            let (from, to) = r.split_once('-').unwrap_or((r, r));
            from.parse().unwrap()..to.parse::<u32>().unwrap() + 1
        });
        Some(ranges.collect::<Vec<_>>().into())
    }

    /// `sums=0:5,2:6` is what a worker has of slices 0 and 2.
    fn sums(&self) -> Vec<(SliceId, SliceSum)> {
        self.pairs("sums").map(|(slice, value)| (SliceId(slice as u32), sum(value))).collect()
    }

    /// `slice=3 about=state at=4 said=w1:5,w2:6`
    fn dispute(&self) -> Dispute {
        let subject = match self.named.get("about") {
            Some(&"state") => Subject::State,
            _ => Subject::Gradient,
        };
        // The same number stands for the same state here and in `sums`.
        let opinion = |value| match subject {
            Subject::State => Opinion::of_state(sum(value)),
            Subject::Gradient => Opinion(value),
        };
        let said = self.pairs("said").map(|(worker, value)| (WorkerId(worker), opinion(value)));
        let (slice, step) = (SliceId(self.number("slice", 0) as u32), Step(self.number("at", 0)));
        Dispute { slice, step, subject, said: said.collect() }
    }

    fn pairs(&self, name: &str) -> impl Iterator<Item = (u64, u64)> {
        let pair = |pair: &str| {
            let (of, value) = pair.split_once(':').unwrap();
            (of.trim_start_matches('w').parse().unwrap(), value.parse().unwrap())
        };
        self.named
            .get(name)
            .into_iter()
            .flat_map(|list| list.split(','))
            .map(pair)
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// The number in a word such as `w3`.
    fn id(&self, at: usize) -> u64 {
        self.first[at]
            .trim_start_matches(char::is_alphabetic)
            .parse()
            .unwrap_or_else(|_| panic!("{:?}", self.line))
    }
}

impl Stage {
    fn new(words: &Words<'_>) -> Self {
        assert_eq!(words.first, ["run"], "a scenario starts with its run");
        let shape = ModelShape {
            dim: 8,
            layers: 3,
            heads: 2,
            kv_heads: 1,
            hidden: 8,
            vocab: 16,
            context: 8,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
        };
        let config = Config {
            shape,
            batch: BatchShape {
                lanes: words.number("lanes", 4) as u32,
                micro_batches: 1,
                sequences: 1,
                sequence_length: 8,
            },
            stages: Some(words.number("stages", 1) as u32).filter(|stages| *stages > 0),
            steps: words.number("steps", 10),
            numerics: NumericsClass { precision: Precision::Fp32, family: "avx512".into() },
            recompute: words.named.get("recompute") == Some(&"true"),
            redundancy: words.number("redundancy", 2) as u32,
            workers: words.number("workers", 2) as u32,
            timing: Timing::from_millis(1000),
            stragglers: match words.named.get("stragglers") {
                Some(&"rebalance") => Stragglers::Rebalance,
                _ => Stragglers::Report,
            },
        };
        let restored = Restored {
            generation: Generation(words.number("generation", 0)),
            next_worker: words.number("next_worker", 1),
            checkpoint: words.named.get("checkpoint").map(|s| Step(s.parse().unwrap())),
            plan: words.named.get("members").map(|list| restored_plan(words, list)),
            committed: words
                .named
                .get("committed")
                .map(|s| committed(Generation(0), Step(s.parse().unwrap()))),
        };
        Self { core: Core::new(config, restored, 0), now: 0 }
    }

    fn take(&mut self, words: &Words<'_>) -> Vec<Output> {
        let mut outputs = Vec::new();
        let input = match words.first[0] {
            "hello" => Input::Hello { session: Session(words.id(1)), hello: hello(words) },
            "close" => Input::Closed { session: Session(words.id(1)) },
            "drain" => Input::Drain,
            // The driver ticks whenever it is to, the last time at the end.
            "time" => {
                let end = self.now + words.id(1);
                // Everybody is lost in fewer turns.
                for _ in 0..100 {
                    let Some(at) = self.core.next_deadline().filter(|at| *at < end) else { break };
                    self.now = self.now.max(at);
                    self.core.handle(self.now, Input::Tick, &mut outputs);
                }
                self.now = end;
                Input::Tick
            }
            // It should have, but did not.
            "away" => {
                self.now += words.id(1);
                Input::Tick
            }
            "complete" => Input::Completed {
                generation: Generation(words.number("g", 0)),
                step: Step(words.number("step", 0)),
                result: words.named.get("error").map_or(Ok(()), |e| Err((*e).into())),
            },
            "found" => Input::Found {
                until: Step(words.number("until", 0)),
                found: words.named.get("error").map_or_else(
                    || Ok(words.named.get("step").map(|step| Step(step.parse().unwrap()))),
                    |e| Err((*e).into()),
                ),
            },
            _ => Input::Message { worker: WorkerId(words.id(0)), message: message(words) },
        };
        self.core.handle(self.now, input, &mut outputs);
        outputs
    }
}

fn sum(value: u64) -> SliceSum {
    SliceSum { weights: Checksum(value as u32), moments: Some(Checksum(0)) }
}

fn hello(words: &Words<'_>) -> Hello {
    Hello {
        protocol: words.number("protocol", PROTOCOL_VERSION.into()) as u32,
        build: "test".into(),
        name: format!("session-{}", words.id(1)),
        host: (*words.named.get("host").unwrap_or(&"here")).into(),
        fabric: format!("here:{}", words.id(1)),
        families: vec![(*words.named.get("family").unwrap_or(&"avx512")).into()],
        threads: 1,
        resume: words.named.get("resume").map(|w| WorkerId(w.trim_start_matches('w').parse().unwrap())),
        memory: words.number("memory", 0),
        speed: words.number("speed", 1) as f64,
    }
}

/// A plan as a store remembers it; who does what in it does not matter to whoever restarts.
fn restored_plan(words: &Words<'_>, list: &str) -> Arc<Plan> {
    let member = |w: &str| {
        let worker = WorkerId(w.trim_start_matches('w').parse().unwrap());
        Member { worker, fabric: format!("here:{}", worker.0) }
    };
    Arc::new(Plan {
        generation: Generation(words.number("planned", 1)),
        base: Step(words.number("base", 0)),
        verdict: None,
        recompute: false,
        members: list.split(',').map(member).collect(),
        pipelines: Vec::new(),
        owners: Vec::new(),
        transfers: Vec::new(),
        idle: Vec::new(),
        disputes: Vec::new(),
    })
}

fn message(words: &Words<'_>) -> FromWorker {
    let generation = Generation(words.number("g", 0));
    let step = Step(words.number("step", 0));
    match words.first[1] {
        "beats" => FromWorker::Heartbeat {
            applied: step,
            activity: Activity::Computing,
            wait: match words.named.get("waits") {
                None => Wait::Plan,
                Some(&"engine") => Wait::Engine,
                Some(w) => {
                    let peer = WorkerId(w.trim_start_matches('w').parse().unwrap());
                    Wait::Peer { peer, what: Awaited::Vote(step.next()) }
                }
            },
            engine: EngineProgress {
                moved: words.number("moved", 0),
                busy_ms: words.number("busy", 0),
                work: words.number("work", 0),
                doing: Doing::Backward(Place { micro: MicroId { lane: 2, index: 0 }, unit: 11 }),
            },
        },
        "leaves" => FromWorker::Leaving,
        "lost" => FromWorker::PeerLost { generation, peer: WorkerId(words.id(2)) },
        "diverged" => FromWorker::Diverged { generation, step, disputes: vec![words.dispute()] },
        "settles" => FromWorker::Settled { generation, disputes: vec![words.dispute()] },
        "corrupt" => FromWorker::Corrupt { what: "a bit has flipped".into() },
        "vouches" => FromWorker::Vouched { generation, step, sums: words.sums() },
        "commits" => FromWorker::Committed(committed(generation, step)),
        "skips" => FromWorker::Committed(Committed { loss: f64::NAN, ..committed(generation, step) }),
        "finds" => {
            let skipped = words.named.contains_key("skipped");
            let finding = words.named.get("lane").map(|_| Finding {
                tensor: Tensor::Activation(Module::Layer(2, LayerPart::GateUp)),
                element: 5,
                value: Value::Nan,
                sample: Some(Sample {
                    micro: MicroId { lane: words.number("lane", 0) as u32, index: 0 },
                    sequence: 1,
                    number: 77,
                    position: Some(3),
                }),
            });
            FromWorker::NonFinite(NonFinite { generation, step, what: NotFinite::Loss, skipped, finding })
        }
        "reports" => FromWorker::Report(Report {
            generation,
            applied: step,
            verdict: (step.0 > 0).then_some(Verdict::Update { norm: step.0 as f64 + 0.5 }),
            state: words.slices("state").unwrap_or_default(),
            weights: words.slices("weights").or(words.slices("state")).unwrap_or_default(),
            prepared: words.slices("prepared"),
            sums: words.sums(),
        }),
        "saves" => {
            let slices = words.slices("slices").unwrap_or_default();
            let slices = slices.iter().map(|s| (s, Digest::default())).collect();
            let part = SavedPart { file: words.first[0].into(), bytes: 1, digest: Digest::default(), slices };
            let part = words.named.get("error").map_or(Ok(part), |e| Err((*e).into()));
            FromWorker::Saved { generation, step, part }
        }
        "cannot" => {
            let reason = (*words.named.get("because").unwrap_or(&"part-w1-is-damaged")).into();
            FromWorker::LoadFailed { generation, step, reason }
        }
        other => panic!("{other} in {:?}", words.line),
    }
}

fn committed(generation: Generation, step: Step) -> Committed {
    Committed { generation, step, loss: 2.5, norm: step.0 as f64 + 0.5, tokens: 8, took_ms: 10 }
}

fn shown(output: &Output) -> String {
    match output {
        Output::Persist(Record::Plan(plan)) => format!("persist plan\n{}", plan_lines(plan)),
        Output::Persist(record) => format!("persist {record:?}"),
        Output::Welcome { session, worker, committed } => {
            format!("welcome session {} as {worker}, knowing of step {committed}", session.0)
        }
        Output::Refuse { session, refusal } => format!("refuse session {}: {refusal}", session.0),
        Output::Send { worker, message: ToWorker::Plan(plan) } => {
            format!("{worker} <- plan {}", plan.generation)
        }
        Output::Send { worker, message: ToWorker::Stop { generation, boundary } } => {
            format!(
                "{worker} <- stop for {generation} {}",
                if *boundary { "after this step" } else { "at once" }
            )
        }
        Output::Send { worker, message: ToWorker::Save { generation, step, slices } } => {
            format!("{worker} <- save step {step} for {generation}: slices {}", set(slices))
        }
        Output::Send { worker, message: ToWorker::Goodbye(farewell) } => {
            format!("{worker} <- goodbye: {farewell}")
        }
        Output::Complete { generation, step, parts } => {
            let files: Vec<&str> = parts.iter().map(|p| p.file.as_str()).collect();
            format!("complete step {step} of {generation} from {}", files.join(" "))
        }
        Output::Find { until } => format!("find a checkpoint up to step {until}"),
        Output::Note(event) => format!("note: {event}"),
        Output::Committed { committed, members } => {
            format!("committed step {} by {} workers", committed.step, members.len())
        }
        Output::Halted { step, what } => format!("halted before step {step}: {what}"),
        Output::End(farewell) => format!("end: {farewell}"),
    }
}

fn plan_lines(plan: &Plan) -> String {
    let applied = |verdict| format!(", whoever is behind applies it with {verdict}");
    let verdict = plan.verdict.map_or(String::new(), applied);
    let recompute = if plan.recompute { ", layers recomputed" } else { "" };
    let mut lines = vec![format!("{} from step {}{verdict}{recompute}", plan.generation, plan.base)];
    for p in &plan.pipelines {
        let whole = p.stages.len() == 1;
        let stage = |s: &caravan_types::Stage| match whole {
            true => s.worker.to_string(),
            false => format!("{} units {}-{}", s.worker, s.units.start, s.units.end - 1),
        };
        let workers: Vec<String> = p.stages.iter().map(stage).collect();
        lines.push(format!("lanes {}-{}: {}", p.lanes.start, p.lanes.end - 1, workers.join(", ")));
    }
    for member in &plan.members {
        lines.push(format!("{} owns {}", member.worker, set(&plan.owned_by(member.worker))));
    }
    for t in &plan.transfers {
        let from = match t.from {
            Source::Peer(worker) => worker.to_string(),
            Source::Checkpoint => "the checkpoint".into(),
            Source::Init => "the seed".into(),
        };
        lines.push(format!("{} gets {:?} of {} from {from}", t.to, t.part, set(&t.slices)));
    }
    for d in &plan.disputes {
        lines.push(format!("{} of {} at step {} is in dispute", d.subject, d.slice, d.step));
    }
    lines.extend(plan.idle.iter().map(|(worker, reason)| format!("{worker} is idle: {reason}")));
    lines.iter().map(|l| format!(">     {l}")).collect::<Vec<_>>().join("\n")
}

fn set(slices: &SliceSet) -> String {
    let range = |r: std::ops::Range<u32>| match r.end - r.start {
        1 => format!("s{}", r.start),
        _ => format!("s{}-{}", r.start, r.end - 1),
    };
    let ranges: Vec<String> = slices.ranges().into_iter().map(range).collect();
    if ranges.is_empty() { "nothing".into() } else { ranges.join(",") }
}
