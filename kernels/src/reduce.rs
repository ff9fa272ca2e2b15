//! Sums and maxima of a row, in an order that its length alone decides.
//!
//! Sixteen running values, element i going to value i mod 16, then folded in halves: wide
//! enough for the widest vectors, and the same order in narrow ones.

use crate::Real;

/// Number of running values: one 512-bit vector of f32.
pub(crate) const LANES: usize = 16;

#[inline(always)]
pub(crate) fn fold<R: Real>(mut acc: [R; LANES], op: impl Fn(R, R) -> R) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            acc[l] = op(acc[l], acc[l + width]);
        }
        width /= 2;
    }
    acc[0]
}

/// Σ term(a_i, b_i) over two rows of one length.
#[inline(always)]
pub(crate) fn sum2<T: Copy, R: Real>(a: &[T], b: &[T], term: impl Fn(T, T) -> R) -> R {
    let mut acc = [R::ZERO; LANES];
    let (ab, at) = a.as_chunks::<LANES>();
    let (bb, bt) = b.as_chunks::<LANES>();
    for (a, b) in ab.iter().zip(bb) {
        for l in 0..LANES {
            acc[l] += term(a[l], b[l]);
        }
    }
    for (acc, (a, b)) in acc.iter_mut().zip(at.iter().zip(bt)) {
        *acc += term(*a, *b);
    }
    fold(acc, |a, b| a + b)
}

/// Σ term(a_i).
#[inline(always)]
pub(crate) fn sum<R: Real>(a: &[R], term: impl Fn(R) -> R) -> R {
    sum2(a, a, |a, _| term(a))
}

/// The largest element; −∞ for none.
#[inline(always)]
pub(crate) fn max<R: Real>(a: &[R]) -> R {
    let mut acc = [R::NEG_INFINITY; LANES];
    let (blocks, tail) = a.as_chunks::<LANES>();
    for a in blocks {
        for l in 0..LANES {
            acc[l] = acc[l].max(a[l]);
        }
    }
    for (acc, a) in acc.iter_mut().zip(tail) {
        *acc = acc.max(*a);
    }
    fold(acc, R::max)
}

/// Replaces each element by exp(a_i − shift) and returns the sum of the results.
#[inline(always)]
pub(crate) fn exp_sum<R: Real>(a: &mut [R], shift: R) -> R {
    let mut acc = [R::ZERO; LANES];
    let (blocks, tail) = a.as_chunks_mut::<LANES>();
    for a in blocks {
        for l in 0..LANES {
            a[l] = (a[l] - shift).exp();
            acc[l] += a[l];
        }
    }
    for (acc, a) in acc.iter_mut().zip(tail) {
        *a = (*a - shift).exp();
        *acc += *a;
    }
    fold(acc, |a, b| a + b)
}
