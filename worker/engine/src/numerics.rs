//! What this machine can do in a numerics class.

use caravan_kernels::{Bf16, Family};
use caravan_types::{NumericsClass, Precision};

/// FLOP/s of one thread in the products of a numerics class, as measured now; none where this
/// machine has no such family.
#[must_use]
pub fn peak(numerics: &NumericsClass) -> Option<f64> {
    let family = Family::named(&numerics.family)?;
    Some(match numerics.precision {
        Precision::Fp32 => caravan_kernels::peak::<f32>(family),
        Precision::Mixed => caravan_kernels::peak::<Bf16>(family),
    })
}

/// The fastest instruction family of this machine in that precision.
#[must_use]
pub fn fastest(precision: Precision) -> Family {
    match precision {
        Precision::Fp32 => Family::best(),
        Precision::Mixed => Family::best_for_bf16(),
    }
}
