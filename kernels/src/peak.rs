//! The peak of one thread: what its register tiles do on what is in its own caches, with nothing else
//! to do. No product can be faster, so it is what utilisation is measured against, instead of a data
//! sheet.

use crate::matmul::{Into, Packed, View, ViewMut, pack_serial, packed_len, product_rows};
use crate::{Element, Family, Real};
use std::time::Instant;

/// Summed indices of a burst: so many that what a tile costs at its end does not show.
const DEPTH: usize = 256;

/// Tiles in a burst, of some tenths of a millisecond: short enough to find times when nobody else
/// has the core.
const TILES: usize = 64;

/// Bursts, of which the fastest counts.
const BURSTS: usize = 100;

/// FLOP/s of one thread in products of `E`, a multiplication and an addition each; takes some
/// milliseconds.
#[must_use]
pub fn peak<E: Element>(family: Family) -> f64 {
    let tiles = E::tiles(family);
    let (rows, cols) = (tiles.height() * TILES, tiles.width());
    let one = E::narrow(E::Sum::ONE);
    let (a, b) = (vec![one; rows * DEPTH], vec![one; DEPTH * cols]);
    let mut memory = vec![E::default(); packed_len::<E>(DEPTH, cols, family)];
    let b: Packed<'_, E> = pack_serial(family, View::rows_of(&b, cols), &mut memory);
    let mut c = vec![E::Sum::ZERO; rows * cols];
    let mut burst = || {
        let start = Instant::now();
        product_rows(family, View::rows_of(&a, DEPTH), &b, ViewMut::rows_of(&mut c, cols), Into::Set);
        start.elapsed().as_secs_f64()
    };
    let fastest = (0..BURSTS).map(|_| burst()).fold(f64::INFINITY, f64::min);
    2.0 * (rows * cols * DEPTH) as f64 / fastest.max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bf16;

    #[test]
    fn every_family_has_a_peak_and_wider_vectors_a_higher_one() {
        for family in Family::available() {
            assert!(peak::<f32>(family) > 1e7 && peak::<f64>(family) > 1e7 && peak::<Bf16>(family) > 1e7);
        }
        let (best, portable) = (peak::<f32>(Family::best()), peak::<f32>(Family::PORTABLE));
        assert!(Family::best() == Family::PORTABLE || best > portable, "{best:e} {portable:e}");
    }
}
