//! What must hold for any plan, and cases that people can follow.

use super::*;
use caravan_types::Part;
use std::ops::Range;

/// Everybody gets what it must have, once, from somebody who has it, and nothing else.
fn is_healed_once(demand: &Demand, candidates: &[Candidate], plan: &Plan) -> Result<(), TestCaseError> {
    let table = SliceTable::new(&demand.shape);
    let place = |worker: WorkerId| candidates.iter().position(|c| c.member.worker == worker).unwrap();
    let mut state: Vec<SliceSet> = candidates.iter().map(|c| c.state.clone()).collect();
    let mut weights: Vec<SliceSet> = candidates.iter().map(|c| c.state.union(&c.weights)).collect();
    let somebody = |part: Part, slice| {
        candidates
            .iter()
            .any(|c| c.state.contains(slice) || part == Part::Weights && c.weights.contains(slice))
    };
    for t in &plan.transfers {
        let owned = plan.owned_by(t.to);
        let mut stages = plan.pipelines.iter().flat_map(|p| &p.stages);
        let units = stages.find(|s| s.worker == t.to).map_or(0..0, |s| s.units.clone());
        for slice in t.slices.iter() {
            match t.from {
                Source::Peer(from) => {
                    let source = &candidates[place(from)];
                    let has = source.state.contains(slice)
                        || t.part == Part::Weights && source.weights.contains(slice);
                    prop_assert!(has, "{from} does not have {slice:?}");
                }
                _ => prop_assert!(!somebody(t.part, slice), "a member has {slice:?}"),
            }
            match t.part {
                Part::State => prop_assert!(owned.contains(slice), "nobody asked for {slice:?}"),
                Part::Weights => prop_assert!(units.contains(&table.get(slice).unwrap().unit.0)),
            }
            let gets = if t.part == Part::State { &mut state } else { &mut weights };
            prop_assert!(gets[place(t.to)].insert(slice), "moved twice, or was there");
            weights[place(t.to)].insert(slice);
        }
    }
    for (i, c) in candidates.iter().enumerate() {
        prop_assert!(state[i].is_superset(&plan.owned_by(c.member.worker)));
    }
    for stage in plan.pipelines.iter().flat_map(|p| &p.stages) {
        let needed = table.iter().filter(|(_, s)| stage.units.contains(&s.unit.0));
        let needed: SliceSet = needed.map(|(id, _)| id).collect();
        prop_assert!(weights[place(stage.worker)].is_superset(&needed));
    }
    Ok(())
}

fn is_whole(demand: &Demand, candidates: &[Candidate], plan: &Plan) -> Result<(), TestCaseError> {
    let table = SliceTable::new(&demand.shape);
    World::new(demand, &table, candidates).judge(plan);
    is_healed_once(demand, candidates, plan)?;
    prop_assert!(plan.members.is_sorted_by(|a, b| a.worker < b.worker));
    prop_assert_eq!(plan.members.len(), candidates.len());
    let working = plan.pipelines.iter().flat_map(|p| &p.stages).map(|s| s.worker);
    let mut all: Vec<WorkerId> = working.chain(plan.idle.iter().map(|(worker, _)| *worker)).collect();
    all.sort_unstable();
    prop_assert_eq!(all, plan.members.iter().map(|m| m.worker).collect::<Vec<_>>(), "works or is idle");
    for (worker, reason) in &plan.idle {
        let none = [IdleReason::TooSmall, IdleReason::Leaving].contains(reason);
        prop_assert!(!none || plan.owned_by(*worker).is_empty(), "{} owns something: {}", worker, reason);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn a_plan_is_whole_and_the_order_of_candidates_means_nothing(
        (demand, candidates) in workers(14, demands(1..12, 0..6)),
        leaves in any::<u32>(), order in any::<u64>(), hosts in 1u64..5,
    ) {
        let mut candidates = candidates;
        for (i, c) in candidates.iter_mut().enumerate().skip(1) {
            c.leaving = leaves >> i & 1 == 1 && leaves >> (i + 3) & 1 == 1;
            c.host = format!("host {}", c.member.worker.0 % hosts);
        }
        let plan = planned(&demand, &candidates);
        let mut shuffled = candidates.clone();
        shuffled.sort_by_key(|c| (c.member.worker.0 + 1).wrapping_mul(order | 1) >> 7);
        prop_assert_eq!(&planned(&demand, &shuffled), &plan);
        if let Ok(plan) = plan {
            is_whole(&demand, &candidates, &plan)?;
        }
    }

    #[test]
    fn nothing_moves_where_nothing_changed(
        (demand, candidates) in workers(14, demands(1..12, 0..6)),
    ) {
        if let Ok(first) = planned(&demand, &candidates) {
            let healed = healed(&demand, &first, &candidates);
            let second = after(&demand, &healed, &first.pipelines).unwrap();
            prop_assert_eq!(&second.transfers, &[], "{:#?}\n{:#?}", first.pipelines, second.pipelines);
            if candidates.len() <= 8 {
                prop_assert_eq!(&second.pipelines, &first.pipelines);
            }
        }
    }

    #[test]
    fn an_error_says_what_would_do(
        (demand, candidates) in workers(5, demands(1..8, 0..4)),
    ) {
        let answer = planned(&demand, &candidates);
        if let Err(NoPlan::DoesNotFit { more_bytes, more_workers, recompute, .. }) = answer {
            let recomputed = Demand { recompute: true, ..demand.clone() };
            prop_assert_eq!(recompute, planned(&recomputed, &candidates).is_ok());
            if let Some(bytes) = more_bytes {
                let more = |c: &Candidate| match c.memory {
                    0 => c.clone(),
                    memory => Candidate { memory: memory + bytes, ..c.clone() },
                };
                let larger: Vec<Candidate> = candidates.iter().map(more).collect();
                prop_assert!(planned(&demand, &larger).is_ok());
            }
            if let Some((count, memory)) = more_workers {
                let new = (0..u64::from(count)).map(|i| candidate(100 + i, 1e6, memory));
                let more: Vec<Candidate> = candidates.iter().cloned().chain(new).collect();
                prop_assert!(planned(&demand, &more).is_ok());
            }
            prop_assert!(more_bytes.is_some());
        }
    }
}

/// Workers of one speed without a bound on their memory.
fn equal(count: u64) -> Vec<Candidate> {
    (1..=count).map(|id| candidate(id, 1e6, 0)).collect()
}

fn stages(plan: &Plan) -> Vec<Vec<(u64, Range<u32>)>> {
    let stage = |s: &caravan_types::Stage| (s.worker.0, s.units.clone());
    plan.pipelines.iter().map(|p| p.stages.iter().map(stage).collect()).collect()
}

fn lanes(plan: &Plan) -> Vec<u32> {
    plan.pipelines.iter().map(|p| p.lanes.len() as u32).collect()
}

#[test]
fn equal_workers_with_room_have_a_pipeline_each() {
    let plan = planned(&demand(6, 8, 2), &equal(4)).unwrap();
    assert_eq!(stages(&plan), (1..=4).map(|w| vec![(w, 0..8)]).collect::<Vec<_>>());
    assert_eq!(lanes(&plan), [2, 2, 2, 2]);
    assert_eq!(plan.idle, []);
}

#[test]
fn more_workers_than_lanes_make_pipelines_deeper() {
    let plan = planned(&demand(6, 2, 8), &equal(4)).unwrap();
    assert_eq!(stages(&plan), [[(1, 0..4), (2, 4..8)], [(3, 0..4), (4, 4..8)]]);
    assert_eq!(plan.idle, []);
}

#[test]
fn pipelines_of_different_depth_stand_side_by_side() {
    let candidates = [candidate(1, 1e6, 0), candidate(2, 2e6, 0), candidate(3, 1e6, 0)];
    let plan = planned(&demand(6, 2, 4), &candidates).unwrap();
    assert_eq!(stages(&plan), [vec![(1, 0..4), (3, 4..8)], vec![(2, 0..8)]]);
}

#[test]
fn small_memories_force_depth() {
    let demand = demand(6, 4, 2);
    // Half of the state and a bit: less than the weights, sums and activations of everything.
    let small = demand.shape.parameters() * 18;
    let plan = planned(&demand, &(1..=4).map(|id| candidate(id, 1e6, small)).collect::<Vec<_>>()).unwrap();
    assert!(plan.pipelines.iter().all(|p| p.stages.len() > 1), "{:?}", plan.pipelines);
    let mixed = [candidate(1, 1e6, 0), candidate(2, 1e6, small), candidate(3, 1e6, small)];
    let plan = planned(&demand, &mixed).unwrap();
    let alone: Vec<&Pipeline> = plan.pipelines.iter().filter(|p| p.stages.len() == 1).collect();
    assert!(alone.iter().all(|p| p.stages[0].worker == WorkerId(1)), "{:?}", plan.pipelines);
}

#[test]
fn fast_workers_get_more_lanes_and_more_layers() {
    let fast_and_slow = [candidate(1, 3e6, 0), candidate(2, 1e6, 0)];
    let plan = planned(&Demand { stages: Some(1), ..demand(6, 8, 1) }, &fast_and_slow).unwrap();
    assert_eq!(lanes(&plan), [6, 2]);
    assert_eq!(plan.pipelines[0].stages[0].worker, WorkerId(1));
    let plan = planned(&Demand { stages: Some(2), ..demand(6, 8, 1) }, &fast_and_slow).unwrap();
    let units = |worker| {
        let mut all = plan.pipelines[0].stages.iter();
        all.find(|s| s.worker == WorkerId(worker)).unwrap().units.len()
    };
    assert!(units(1) > units(2), "{:?}", plan.pipelines);
}

#[test]
fn a_link_that_is_slow_is_not_crossed_for_nothing() {
    let slow = Demand { link_bytes_per_s: 1e3, ..demand(6, 2, 8) };
    let plan = planned(&slow, &equal(4)).unwrap();
    assert!(plan.pipelines.iter().all(|p| p.stages.len() == 1));
    let reasons: Vec<IdleReason> = plan.idle.iter().map(|(_, reason)| *reason).collect();
    assert_eq!(reasons, [IdleReason::WouldSlow; 2]);
}

#[test]
fn whoever_is_idle_is_told_why() {
    let reason = |demand: &Demand, candidates: &[Candidate]| planned(demand, candidates).unwrap().idle;
    let one = Demand { stages: Some(1), ..demand(6, 2, 1) };
    assert_eq!(reason(&one, &equal(3)), [(WorkerId(3), IdleReason::MoreWorkersThanLanes)]);
    let two = Demand { stages: Some(2), ..demand(6, 4, 1) };
    assert_eq!(reason(&two, &equal(5)), [(WorkerId(5), IdleReason::TooFewForAPipeline)]);
    let mut tiny = equal(3);
    tiny[1].memory = 1000;
    assert_eq!(reason(&demand(6, 4, 1), &tiny), [(WorkerId(2), IdleReason::TooSmall)]);
    // A share of the state is two thirds of it, eight bytes a parameter.
    tiny[1].memory = demand(6, 4, 1).shape.parameters() * 8 + 1000;
    assert_eq!(reason(&demand(6, 4, 1), &tiny), [(WorkerId(2), IdleReason::NoRoomForAStage)]);
    let mut slow = equal(2);
    slow[1].speed = 1.0;
    assert_eq!(reason(&demand(6, 4, 1), &slow), [(WorkerId(2), IdleReason::WouldSlow)]);
}

#[test]
fn a_leaving_member_gives_but_gets_no_lanes_and_no_slices() {
    let demand = demand(6, 4, 1);
    let all = SliceSet::all(demand.shape.units() as usize);
    let leaver = Candidate { state: all.clone(), leaving: true, ..candidate(1, 1e6, 0) };
    let candidates = [leaver, Candidate { weights: all, ..candidate(2, 1e6, 0) }];
    let plan = planned(&demand, &candidates).unwrap();
    assert_eq!(plan.idle, [(WorkerId(1), IdleReason::Leaving)]);
    assert_eq!(plan.pipelines.len(), 1);
    assert!(plan.owned_by(WorkerId(1)).is_empty());
    assert_eq!(plan.transfers.len(), 1);
    assert_eq!(plan.transfers[0].from, Source::Peer(WorkerId(1)));
    assert_eq!(plan.transfers[0].part, Part::State);
    let gone: Vec<Candidate> = candidates.iter().map(|c| Candidate { leaving: true, ..c.clone() }).collect();
    assert_eq!(planned(&demand, &gone), Err(NoPlan::NobodyStays));
}

#[test]
fn a_death_moves_no_weights_where_whole_pipelines_are_left() {
    for workers in [6, 24] {
        let demand = Demand { stages: Some(2), ..demand(10, 32, 2) };
        let candidates = equal(workers);
        let first = planned(&demand, &candidates).unwrap();
        assert!(first.pipelines.iter().all(|p| p.stages.len() == 2));
        let healed = healed(&demand, &first, &candidates);
        let dead = first.pipelines[1].stages[0].worker;
        let survivors: Vec<Candidate> = healed.iter().filter(|c| c.member.worker != dead).cloned().collect();
        let second = after(&demand, &survivors, &first.pipelines).unwrap();
        assert_eq!(second.pipelines.len() + 1, first.pipelines.len());
        assert_eq!(second.idle[0].1, IdleReason::TooFewForAPipeline);
        let weights: Vec<_> = second.transfers.iter().filter(|t| t.part == Part::Weights).collect();
        assert!(weights.is_empty(), "{weights:?}");
    }
}

#[test]
fn a_newcomer_is_healed_and_nobody_else_is() {
    let demand = Demand { stages: Some(1), ..demand(10, 32, 2) };
    for workers in [4, 20] {
        let candidates = equal(workers);
        let first = planned(&demand, &candidates).unwrap();
        let mut healed = healed(&demand, &first, &candidates);
        healed.push(candidate(workers + 1, 1e6, 0));
        let second = after(&demand, &healed, &first.pipelines).unwrap();
        assert!(second.transfers.iter().all(|t| t.to == WorkerId(workers + 1)), "{:?}", second.transfers);
    }
}

#[test]
fn the_error_of_a_model_that_does_not_fit_can_be_read() {
    let said = |workers, more_bytes, more_workers, recompute| {
        let reason = NoPlan::DoesNotFit { workers, more_bytes, more_workers, recompute }.to_string();
        let rest = reason.strip_prefix("the model with its training state does not fit into the memory of ");
        rest.unwrap().to_owned()
    };
    assert_eq!(
        said(3, Some(1 << 30), Some((2, 8 << 30)), false),
        "the 3 workers: 1.0 GiB more memory on each would do, or 2 more workers with 8.0 GiB each"
    );
    assert_eq!(
        said(3, Some(1 << 30), Some((2, 8 << 30)), true),
        "the 3 workers: 1.0 GiB more memory on each would do, or 2 more workers with 8.0 GiB each, \
         or recompute = true"
    );
    assert_eq!(said(1, Some(1), None, false), "the worker: 0.1 MiB more memory on each would do");
    assert_eq!(said(1, None, None, true), "the worker: recompute = true would do");
    assert_eq!(said(1, None, None, false), "the worker");
}

/// One worker with so much memory, for a model of many layers: what is said of it.
fn said_of(recompute: bool, memory: u64) -> Result<Plan, String> {
    let demand = Demand { recompute, ..demand(8, 4, 1) };
    planned(&demand, &[candidate(1, 1e6, memory)]).map_err(|reason| reason.to_string())
}

/// The least memory with which one worker will do.
fn least_memory(recompute: bool) -> u64 {
    let sizes: Vec<u64> = (1..1 << 22).step_by(1 << 8).collect();
    sizes[sizes.partition_point(|memory| said_of(recompute, *memory).is_err())]
}

#[test]
fn recompute_is_proposed_where_the_model_would_fit_with_it() {
    let (with, without) = (least_memory(true), least_memory(false));
    assert!(with < without, "{with} {without}");
    for memory in [with, (with + without) / 2] {
        let reason = said_of(false, memory).unwrap_err();
        assert!(reason.ends_with(", or recompute = true"), "{memory}: {reason}");
        assert!(said_of(true, memory).is_ok(), "{memory}");
    }
}

#[test]
fn recompute_is_not_proposed_where_the_model_would_not_fit_with_it_either() {
    for memory in [1, least_memory(true) / 2] {
        let reason = said_of(false, memory).unwrap_err();
        assert!(reason.contains("would do") && !reason.contains("recompute"), "{memory}: {reason}");
    }
}

#[test]
fn recompute_is_not_proposed_where_it_is_on() {
    for memory in [1, least_memory(true) / 2, least_memory(true) - (1 << 8)] {
        let reason = said_of(true, memory).unwrap_err();
        assert!(reason.contains("would do") && !reason.contains("recompute"), "{memory}: {reason}");
    }
}
