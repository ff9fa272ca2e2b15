//! The engine's thread does tasks in order, and says when they are done.

use super::*;
use crate::fabric::test_link;
use caravan_types::peer::LaneResult;
use caravan_types::task::SavedPart;
use caravan_types::{Digest, MicroId, SliceId, SliceSet, Step, Verdict};
use std::collections::BTreeMap;
use std::sync::mpsc as std_mpsc;

/// Stores payloads, and adds 1 to all of them at each `Apply`.
#[derive(Default)]
struct Fake {
    stored: BTreeMap<Key, Vec<f32>>,
    /// `Backward` waits for a word from here, where there is a way to say one.
    gate: Option<std_mpsc::Receiver<()>>,
    saver: Option<Saver>,
}

impl Machine for Fake {
    fn run(&mut self, task: Task) -> Result<Option<Done>, Fault> {
        match task {
            Task::Backward { generation, step, micro } => {
                self.gate.as_ref().map_or(Ok(()), |gate| gate.recv())?;
                let result = LaneResult { lane: micro.lane, loss: 0.0, tokens: 0 };
                Ok(Some(Done::Lane { generation, step, result }))
            }
            Task::Apply { .. } => {
                self.stored.values_mut().flatten().for_each(|v| *v += 1.0);
                Ok(None)
            }
            Task::Save { generation, step, .. } => {
                Ok(self.saver.as_ref().and_then(|saver| saver.save(generation, step, Vec::new())))
            }
            Task::Place { .. } => Ok(None),
            Task::Drop(_) => panic!("as a test wants it"),
            other => Err(format!("no {other:?}").into()),
        }
    }

    fn put(&mut self, key: Key, payload: Vec<f32>) -> Result<(), Fault> {
        self.stored.insert(key, payload);
        Ok(())
    }

    fn fail(&mut self, _: Flaw) {}

    fn get(&mut self, key: Key) -> Result<Vec<f32>, Fault> {
        self.stored.get(&key).cloned().ok_or_else(|| format!("nothing under {key:?}").into())
    }
}

fn state(slice: u32) -> Key {
    Key::State { step: Step(1), slice: SliceId(slice) }
}

fn compute(generation: u64) -> Task {
    Task::Backward { generation: Generation(generation), step: Step(1), micro: MicroId { lane: 0, index: 0 } }
}

fn apply() -> Task {
    Task::Apply { step: Step(1), verdict: Verdict::Update { norm: 1.0 }, slices: SliceSet::all(1) }
}

fn save(step: u64) -> Task {
    Task::Save { generation: Generation(1), step: Step(step), slices: SliceSet::default() }
}

fn part(file: &str) -> SavedPart {
    SavedPart { file: file.into(), bytes: 0, digest: Digest::default(), slices: Vec::new() }
}

fn no_save() -> Save {
    Box::new(|_, _, _| Err("this test saves nothing".into()))
}

fn costs() -> Costs {
    let batch = BatchShape { lanes: 2, micro_batches: 1, sequences: 1, sequence_length: 8 };
    Costs { model: ModelShape::preset("260k").unwrap(), batch }
}

#[test]
fn passes_are_worth_what_the_stage_costs_and_those_given_up_nothing() {
    let (engine, mut reports) = start(Fake::default(), no_save());
    engine.run(Span::none(), Task::Place { units: 0..3, recompute: true }).unwrap();
    engine.run(Span::none(), compute(1)).unwrap();
    assert!(matches!(reports.blocking_recv(), Some(Report::Done(Done::Lane { .. }))));
    engine.fence(Generation(2));
    engine.run(Span::none(), compute(1)).unwrap();
    engine.run(Span::none(), compute(2)).unwrap();
    let Costs { model, batch } = costs();
    let backward = cost::passes(&model, &batch, true, 0..3).1;
    for _ in 0..2 {
        assert!(matches!(reports.blocking_recv(), Some(Report::Done(Done::Lane { .. }))));
    }
    assert_eq!(engine.progress().work, 2 * backward);
}

fn start(machine: Fake, save: Save) -> (Engine, mpsc::Receiver<Report>) {
    let build = move |saver| Ok(Fake { saver: Some(saver), ..machine });
    Engine::start(build, save, Arc::default(), costs(), 1).unwrap()
}

fn failure(reports: &mut mpsc::Receiver<Report>) -> String {
    match reports.blocking_recv() {
        Some(Report::Failed { doing, fault }) => format!("{doing}: {fault}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_payload_that_is_sent_has_seen_the_tasks_before_it_and_none_after_it() {
    let (engine, _reports) = start(Fake::default(), no_save());
    let (link, mut sent) = test_link(Generation(1), 8);
    engine.put(Span::none(), state(0), vec![1.0, 2.0]).unwrap();
    engine.run(Span::none(), apply()).unwrap();
    engine.send(Span::none(), state(0), link.clone()).unwrap();
    engine.run(Span::none(), apply()).unwrap();
    engine.send(Span::none(), state(0), link).unwrap();
    assert_eq!(sent.blocking_recv(), Some((PeerMessage::Data(state(0)), vec![2.0, 3.0])));
    assert_eq!(sent.blocking_recv(), Some((PeerMessage::Data(state(0)), vec![3.0, 4.0])));
    assert_eq!(sent.blocking_recv(), None, "the job's link is dropped with the job");
}

#[test]
fn what_a_fenced_generation_wanted_to_send_is_not_looked_for() {
    let (engine, mut reports) = start(Fake::default(), no_save());
    let (old, mut nothing) = test_link(Generation(1), 8);
    engine.fence(Generation(2));
    engine.send(Span::none(), state(0), old).unwrap();
    engine.run(Span::none(), compute(2)).unwrap();
    assert!(matches!(reports.blocking_recv(), Some(Report::Done(Done::Lane { .. }))));
    assert_eq!(nothing.blocking_recv(), None);

    let (new, _sent) = test_link(Generation(2), 8);
    engine.send(Span::none(), state(0), new).unwrap();
    assert!(failure(&mut reports).contains("nothing under State"));
}

#[test]
fn an_engine_that_cannot_start_or_go_on_or_panics_says_so_once_and_ends() {
    let build = |_| Err::<Fake, _>("the data is gone".into());
    let (_engine, mut reports) = Engine::start(build, no_save(), Arc::default(), costs(), 1).unwrap();
    assert_eq!(failure(&mut reports), "starting the engine: the data is gone");

    let (engine, mut reports) = start(Fake::default(), no_save());
    engine.run(Span::none(), Task::Narrow { units: 0..1 }).unwrap();
    assert_eq!(failure(&mut reports), "Narrow { units: 0..1 }: no Narrow { units: 0..1 }");
    engine.run(Span::none(), Task::Narrow { units: 0..1 }).unwrap();

    let (engine, mut reports) = start(Fake::default(), no_save());
    engine.run(Span::none(), Task::Drop(SliceSet::default())).unwrap();
    assert!(failure(&mut reports).contains("panicked"));
}

#[test]
fn a_checkpoint_is_written_beside_the_steps_and_a_slow_disk_slows_them_and_loses_none() {
    let (go, gate) = std_mpsc::channel::<()>();
    let mut count = 0;
    let slow: Save = Box::new(move |_, _, _| {
        gate.recv()?;
        count += 1;
        Ok(part(&format!("part {count}")))
    });
    let (engine, mut reports) = start(Fake::default(), slow);
    let mut next = move || match reports.blocking_recv() {
        Some(Report::Done(Done::Saved { part, .. })) => part.map(|p| p.file),
        Some(Report::Done(Done::Lane { .. })) => Ok("step".into()),
        other => panic!("{other:?}"),
    };
    engine.run(Span::none(), save(1)).unwrap();
    engine.run(Span::none(), compute(1)).unwrap();
    assert_eq!(next(), Ok("step".into()), "the disk holds the first part, and the step is done");
    for step in 2..=5 {
        engine.run(Span::none(), save(step)).unwrap();
    }
    engine.run(Span::none(), compute(6)).unwrap();
    let mut seen = Vec::new();
    for _ in 1..=5 {
        go.send(()).unwrap();
        seen.push(next().unwrap());
    }
    seen.push(next().unwrap());
    seen.sort();
    assert_eq!(seen, ["part 1", "part 2", "part 3", "part 4", "part 5", "step"]);
}

#[test]
fn a_part_that_cannot_be_written_is_an_answer_and_no_failure() {
    let (engine, mut reports) = start(Fake::default(), Box::new(|_, _, _| Err("disk full".into())));
    engine.run(Span::none(), save(3)).unwrap();
    match reports.blocking_recv() {
        Some(Report::Done(Done::Saved { step: Step(3), part: Err(reason), .. })) => {
            assert_eq!(reason, "disk full");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_full_queue_is_an_error_and_not_a_wait() {
    let (go, gate) = std_mpsc::channel();
    let (engine, _reports) = start(Fake { gate: Some(gate), ..Fake::default() }, no_save());
    let queued = (0..=MOST_PEERS + 1).map(|_| engine.run(Span::none(), compute(1)));
    let full = queued.filter(|queued| *queued == Err(Overrun { capacity: MOST_PEERS })).count();
    assert!((1..=2).contains(&full), "{full}");
    drop(go);
}
