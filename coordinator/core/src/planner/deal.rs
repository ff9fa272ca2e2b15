//! Deals lanes to pipelines, in contiguous runs.
//!
//! A pipeline sends one partial sum per node that covers its run ([`cover`]), so runs that
//! start and end at the borders of large sub-trees are cheap. Two deals are made: an even one,
//! and one that ends each run at the roundest number that it may. Both keep to the time of the
//! plan; the one with fewer nodes is taken, the even one among equals.

use super::problem::{Line, Problem};
use caravan_types::lanes::cover;
use caravan_types::{Lane, Pipeline, Stage, WorkerId};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// Pipelines with their lanes, of lines that together can take all lanes in `step_s` and are no
/// more than there are lanes. `ids` are the workers' names.
pub(super) fn deal(problem: &Problem, lines: &[Line], step_s: f64, ids: &[WorkerId]) -> Vec<Pipeline> {
    let lanes = problem.costs.lanes;
    let lowest = |line: &Line| line.stages.iter().map(|(worker, _)| ids[*worker]).min();
    let mut lines = lines.to_vec();
    lines.sort_by_key(lowest);
    let most: Vec<u32> = lines.iter().map(|line| problem.most_lanes(line, step_s).max(line.lanes)).collect();
    let slowest: Vec<f64> = lines.iter().map(|line| problem.slowest_s(line)).collect();
    let depth = |i: usize| lines[i].stages.len() as u32;
    let dealt = even(lanes, &most, |i, lanes| problem.costs.step_s(lanes, depth(i), slowest[i]));
    let mut order: Vec<usize> = (0..lines.len()).collect();
    order.sort_by_key(|&i| (Reverse(dealt[i]), i));
    let even = runs(order.iter().map(|&i| dealt[i]));
    let most: Vec<u32> = order.iter().map(|&i| most[i]).collect();
    let round = runs(round(lanes, &most).into_iter());
    let nodes = |runs: &[Range<Lane>]| runs.iter().map(|run| cover(run.clone()).len()).sum::<usize>();
    let runs = if nodes(&round) < nodes(&even) { round } else { even };
    let stage = |(worker, units): &(usize, Range<u32>)| Stage { worker: ids[*worker], units: units.clone() };
    let pipeline = |(&i, lanes): (&usize, Range<Lane>)| Pipeline {
        stages: lines[i].stages.iter().map(stage).collect(),
        lanes,
    };
    order.iter().zip(runs).map(pipeline).collect()
}

/// One lane for each pipeline, then each further one to whoever is done with it first, up to
/// the `most` of each. `done_s` says when a pipeline is done with so many lanes.
pub(super) fn even(lanes: u32, most: &[u32], done_s: impl Fn(usize, u32) -> f64) -> Vec<u32> {
    // Positive numbers are in the order of their bits.
    let done = |i: usize, lanes: u32| Reverse((done_s(i, lanes).to_bits(), i));
    let mut dealt = vec![1u32; most.len()];
    let mut next: BinaryHeap<_> = (0..most.len()).filter(|i| most[*i] > 1).map(|i| done(i, 2)).collect();
    for _ in most.len() as u32..lanes {
        let Some(Reverse((_, i))) = next.pop() else { break };
        dealt[i] += 1;
        if dealt[i] < most[i] {
            next.push(done(i, dealt[i] + 1));
        }
    }
    dealt
}

/// Run lengths, each as round in its end as the pipeline may have and the rest can bear.
fn round(lanes: u32, most: &[u32]) -> Vec<u32> {
    let mut others: u64 = most.iter().map(|most| u64::from(*most)).sum();
    let (mut at, mut behind) = (0, most.len() as u32);
    let mut lengths = Vec::with_capacity(most.len());
    for most in most {
        others -= u64::from(*most);
        behind -= 1;
        let left = lanes - at;
        let least = u64::from(left).saturating_sub(others).max(1) as u32;
        let end = roundest(at + least, at + (*most).min(left.saturating_sub(behind)).max(least));
        lengths.push(end - at);
        at = end;
    }
    lengths
}

/// The number from `low` to `high` that the largest power of two divides; 0 < low <= high.
fn roundest(low: u32, high: u32) -> u32 {
    let fits = |shift: &u32| (high >> shift) << shift >= low;
    let shift = (0..u32::BITS).rev().find(fits).unwrap_or(0);
    (high >> shift) << shift
}

fn runs(lengths: impl Iterator<Item = u32>) -> Vec<Range<Lane>> {
    let mut start = 0;
    let run = |length: u32| {
        start += length;
        start - length..start
    };
    lengths.map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roundest_number_of_a_range_is_found() {
        let naive = |low: u32, high: u32| (low..=high).map(|n| n.trailing_zeros()).max();
        for low in 1..70u32 {
            for high in low..140 {
                let found = roundest(low, high);
                assert!((low..=high).contains(&found));
                assert_eq!(Some(found.trailing_zeros()), naive(low, high), "{low}..={high} gives {found}");
            }
        }
    }

    #[test]
    fn round_runs_take_all_lanes_and_no_pipeline_takes_more_than_it_can() {
        for most in [vec![6, 6, 6], vec![16, 1, 1], vec![3, 9, 5], vec![4, 4, 4, 4], vec![11, 8]] {
            let lengths = round(16, &most);
            assert_eq!(lengths.iter().sum::<u32>(), 16, "{most:?}");
            assert!(
                lengths.iter().zip(&most).all(|(n, most)| (1..=*most).contains(n)),
                "{lengths:?} of {most:?}"
            );
        }
        assert_eq!(round(16, &[6, 6, 6]), [4, 6, 6], "two nodes less than 6, 5, 5");
    }
}
