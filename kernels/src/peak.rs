//! The peak of a thread: what its register tiles do on what is in its own caches, with nothing else
//! to do. No product can be faster, so it is what utilisation is measured against, instead of a data
//! sheet.

use crate::matmul::{Into, Packed, View, ViewMut, pack_serial, packed_len, product_rows};
use crate::{Element, Family, Real};
use std::thread;
use std::time::{Duration, Instant};

/// Summed indices of a burst: so many that what a tile costs at its end does not show.
const DEPTH: usize = 256;

/// Tiles in a burst, of some tenths of a millisecond: short enough that hardly any is interrupted
/// where others compute on the same cores, too.
const TILES: usize = 64;

/// Bursts in a round. Its median is what counts: neither one that was interrupted, nor one during
/// which the other thread of a core stood still.
const ROUND: usize = 9;

/// How long all threads repeat rounds, of which each thread's fastest counts: by then, cores have
/// the clock that they keep.
const MEASURED: Duration = Duration::from_millis(20);

/// FLOP/s of one thread in products of `E` while so many of them are at it, a multiplication and an
/// addition each; takes some hundredths of a second.
#[must_use]
pub fn peak<E: Element>(family: Family, threads: usize) -> f64 {
    let until = Instant::now() + MEASURED;
    thread::scope(|scope| {
        // Where the system gives no more threads, those that there are say what one can do.
        let start = |_| thread::Builder::new().spawn_scoped(scope, || fastest::<E>(family, until)).ok();
        let others: Vec<_> = (1..threads).filter_map(start).collect();
        let own = fastest::<E>(family, until);
        let all: Vec<f64> = others.into_iter().filter_map(|t| t.join().ok()).chain([own]).collect();
        all.iter().sum::<f64>() / all.len() as f64
    })
}

/// FLOP/s of this thread in its fastest round.
fn fastest<E: Element>(family: Family, until: Instant) -> f64 {
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
    let mut round = || {
        let mut times: [f64; ROUND] = std::array::from_fn(|_| burst());
        times.sort_by(f64::total_cmp);
        times[ROUND / 2]
    };
    let mut fastest = round();
    while Instant::now() < until {
        fastest = fastest.min(round());
    }
    2.0 * (rows * cols * DEPTH) as f64 / fastest.max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bf16;

    #[test]
    fn every_family_has_a_peak_and_wider_vectors_a_higher_one() {
        let one = |family| [peak::<f32>(family, 1), peak::<f64>(family, 1), peak::<Bf16>(family, 1)];
        for family in Family::available() {
            assert!(one(family).iter().all(|peak| *peak > 1e7), "{family:?}");
        }
        let (best, portable) = (peak::<f32>(Family::best(), 1), peak::<f32>(Family::PORTABLE, 1));
        assert!(Family::best() == Family::PORTABLE || best > portable, "{best:e} {portable:e}");
    }

    #[test]
    fn more_threads_than_cores_have_no_higher_peak_each() {
        let family = Family::best();
        let [alone, crowd] = [1, 32].map(|threads| peak::<f32>(family, threads));
        assert!(crowd < 1.5 * alone, "{crowd:e} {alone:e}");
    }
}
