//! Weights at step 0: a pure function of (seed, element), so that any slice can be made alone.

use crate::random::{Purpose, draw, unit};
use caravan_types::model::Init;
use caravan_types::{ModelShape, UnitId};
use std::f64::consts::TAU;
use std::ops::Range;

/// Fills `out` with the initial values of the elements `range` of the flat model.
pub fn fill(shape: &ModelShape, seed: u64, range: Range<u64>, out: &mut [f32]) {
    for unit in (0..shape.units()).map(UnitId) {
        let span = shape.unit_range(unit);
        if span.end <= range.start || range.end <= span.start {
            continue;
        }
        for parameter in shape.unit(unit) {
            let span = parameter.range();
            let (start, end) = (span.start.max(range.start), span.end.min(range.end));
            if start >= end {
                continue;
            }
            let out = &mut out[(start - range.start) as usize..(end - range.start) as usize];
            match parameter.init {
                Init::Ones => out.fill(1.0),
                Init::Normal(deviation) => normal(seed, start, f64::from(deviation), out),
            }
        }
    }
}

/// Normal numbers for the elements from `start` on: Box and Muller's transform makes two of
/// one draw, for elements 2i and 2i + 1.
fn normal(seed: u64, start: u64, deviation: f64, out: &mut [f32]) {
    let mut pair = (u64::MAX, [0.0; 2]);
    for (element, out) in (start..).zip(out) {
        if pair.0 != element / 2 {
            let [a, b] = draw(seed, Purpose::Init, element / 2);
            // 1 − u is in (0, 1], where the logarithm is finite.
            let radius = deviation * (-2.0 * libm::log(1.0 - unit(a))).sqrt();
            let angle = TAU * unit(b);
            pair = (element / 2, [radius * libm::cos(angle), radius * libm::sin(angle)]);
        }
        *out = pair.1[(element % 2) as usize] as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_made_alone_has_the_bits_of_the_whole() {
        let shape = ModelShape::preset("260k").unwrap();
        let n = shape.parameters();
        let mut whole = vec![0.0; n as usize];
        fill(&shape, 7, 0..n, &mut whole);
        for (start, end) in [(0, 1), (1, 2), (12345, 54321), (32767, 32771), (n - 3, n)] {
            let mut part = vec![f32::NAN; (end - start) as usize];
            fill(&shape, 7, start..end, &mut part);
            assert_eq!(part, whole[start as usize..end as usize]);
        }
    }

    #[test]
    fn matrices_have_their_deviation_and_gains_are_one() {
        let shape = ModelShape::preset("260k").unwrap();
        let mut all = vec![0.0; shape.parameters() as usize];
        fill(&shape, 1, 0..shape.parameters(), &mut all);
        for p in shape.all_parameters() {
            let values = &all[p.offset as usize..p.range().end as usize];
            let n = values.len() as f64;
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
            let deviation = (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n).sqrt();
            match p.init {
                Init::Ones => assert!(values.iter().all(|v| *v == 1.0)),
                Init::Normal(d) => {
                    // Five standard errors of each estimate.
                    assert!(mean.abs() < 5.0 * f64::from(d) / n.sqrt(), "{}: mean {mean}", p.name);
                    let error = (deviation / f64::from(d) - 1.0).abs();
                    assert!(error < 5.0 / (2.0 * n).sqrt(), "{}: {deviation} for {d}", p.name);
                }
            }
        }
        let mut other = vec![0.0; 100];
        fill(&shape, 2, 0..100, &mut other);
        assert_ne!(other, all[..100]);
    }
}
