//! What this machine can do in a numerics class.

use caravan_kernels::{Bf16, Family};
use caravan_types::{NumericsClass, Precision};
use std::sync::{Mutex, PoisonError};

/// What was measured in this process: precision, family and threads, and FLOP/s of one thread.
static MEASURED: Mutex<Vec<(Precision, Family, usize, f64)>> = Mutex::new(Vec::new());

/// FLOP/s of one thread in the products of a numerics class while so many threads are at it; none
/// where this machine has no such family. Measured when a process asks for the first time, which
/// should be before it computes anything; two that ask at once do not disturb each other.
#[must_use]
pub fn peak(numerics: &NumericsClass, threads: usize) -> Option<f64> {
    let (precision, family) = (numerics.precision, Family::named(&numerics.family)?);
    let mut measured = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let known = measured.iter().find(|(p, f, t, _)| (*p, *f, *t) == (precision, family, threads));
    if let Some((.., peak)) = known {
        return Some(*peak);
    }
    let peak = match precision {
        Precision::Fp32 => caravan_kernels::peak::<f32>(family, threads),
        Precision::Mixed => caravan_kernels::peak::<Bf16>(family, threads),
    };
    measured.push((precision, family, threads, peak));
    Some(peak)
}

/// The fastest instruction family of this machine in that precision.
#[must_use]
pub fn fastest(precision: Precision) -> Family {
    match precision {
        Precision::Fp32 => Family::best(),
        Precision::Mixed => Family::best_for_bf16(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_measured_once_in_a_class_that_the_machine_has() {
        let class = |precision, family: &str| NumericsClass { precision, family: family.into() };
        let portable = class(Precision::Fp32, "portable");
        let first = peak(&portable, 1).unwrap();
        assert_eq!(peak(&portable, 1), Some(first), "two measurements do not have the same bits");
        assert_ne!(peak(&class(Precision::Mixed, "portable"), 1), Some(first));
        assert_eq!(peak(&class(Precision::Fp32, "abacus"), 1), None);
    }
}
