//! The number types that every kernel is written for.

use crate::Element;
use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// f32, in which models are trained, or f64, in which the same code is checked.
pub trait Real:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Send
    + Sync
    + Element<Sum = Self>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Less than every finite number.
    const NEG_INFINITY: Self;

    /// The nearest value.
    fn from_f64(x: f64) -> Self;
    /// Exactly this value.
    fn to_f64(self) -> f64;
    /// The correctly rounded root.
    fn sqrt(self) -> Self;
    /// The larger one; `self` where `other` is no number.
    fn max(self, other: Self) -> Self;
    /// e to the `self`, within 2 units in the last place, from multiplications and additions
    /// only: the same bits in every instruction family, and a loop over it vectorises. Results
    /// below the smallest normal number are 0, those above √½ of the largest power of two infinite.
    fn exp(self) -> Self;
}

/// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| ≤ ln 2 / 2: the reduction of Cody
/// and Waite, ln 2 in two parts of which the first has trailing zeros, so that n times it is
/// exact. `$magic` is 1.5 · 2^mantissa_bits: adding it rounds to an integer, which then
/// stands in the low mantissa bits. 2^n is built from bits; two factors of it would be needed
/// for subnormal results, which are not wanted.
macro_rules! exp {
    ($x:expr, $t:ident, $int:ident, $bits:expr, $bias:expr, $magic:expr, $low:expr, $high:expr,
     $hi:expr, $lo:expr, [$first:expr $(, $c:expr)*]) => {{
        let x = $x;
        let clamped = if x > $high { $high } else if x < $low { $low } else { x };
        let shifted = clamped * std::$t::consts::LOG2_E + $magic;
        let n = shifted - $magic;
        let r = (clamped - n * $hi) - n * $lo;
        let mut p: $t = $first;
        $(p = p * r + $c;)*
        let exponent = (shifted.to_bits() as $int).wrapping_add($bias) << $bits;
        let y = p * $t::from_bits(exponent);
        if x < $low { 0.0 } else if x > $high { $t::INFINITY } else if x.is_nan() { x } else { y }
    }};
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
    /// Taylor's series to the 7th power: the next term is at most 0.3466^8 / 8! = 5e-9 of the
    /// result, a tenth of half a unit in the last place.
    #[inline(always)]
    fn exp(self) -> Self {
        exp!(
            self,
            f32,
            u32,
            23,
            127,
            12_582_912.0,
            -87.336_54,
            88.37,
            0.693_359_4,
            -2.121_944_4e-4,
            [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0]
        )
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = Self::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
    /// Taylor's series to the 13th power: the next term is at most 0.3466^14 / 14! = 4e-18 of
    /// the result.
    #[inline(always)]
    fn exp(self) -> Self {
        exp!(
            self,
            f64,
            u64,
            52,
            1023,
            6_755_399_441_055_744.0,
            -708.39,
            709.43,
            0.693_145_751_953_125,
            1.428_606_820_309_417_3e-6,
            [
                1.0 / 6_227_020_800.0,
                1.0 / 479_001_600.0,
                1.0 / 39_916_800.0,
                1.0 / 3_628_800.0,
                1.0 / 362_880.0,
                1.0 / 40_320.0,
                1.0 / 5040.0,
                1.0 / 720.0,
                1.0 / 120.0,
                1.0 / 24.0,
                1.0 / 6.0,
                0.5,
                1.0,
                1.0
            ]
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_in_f64_is_within_two_units_in_the_last_place() {
        for i in -14000..14000 {
            let x = f64::from(i) * 0.05;
            let (ours, theirs) = (Real::exp(x), libm::exp(x));
            assert!((ours - theirs).abs() <= theirs * 4.5e-16, "{x}: {ours} {theirs}");
        }
    }

    #[test]
    fn exp_in_f32_is_within_two_units_in_the_last_place() {
        for i in -87000..88300 {
            let x = i as f32 * 1e-3;
            let (ours, theirs) = (f64::from(Real::exp(x)), libm::exp(f64::from(x)));
            assert!((ours - theirs).abs() <= theirs * 2.4e-7, "{x}: {ours} {theirs}");
        }
    }

    #[test]
    fn exp_keeps_its_limits() {
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!((Real::exp(0.0f32), Real::exp(0.0f64)), (1.0, 1.0));
        assert_eq!((Real::exp(-1e9f64), Real::exp(1e9f64)), (0.0, f64::INFINITY));
    }
}
