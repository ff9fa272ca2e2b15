//! What tensors are stored as, and the type in which they are computed with.

// Bf16's two marker traits are unsafe to claim.
#![allow(unsafe_code)]

use crate::matmul::Tiles;
use crate::{Family, Real};
use bytemuck::{Pod, Zeroable};
use std::fmt::Debug;

/// A number as it lies in memory: f32, f64 or [`Bf16`]. Weights, activations and the factors of
/// matrix products are elements; sums, norms and the residual stream are in its [`Sum`](Self::Sum).
pub trait Element: Copy + Debug + Default + PartialEq + Send + Sync + Pod + 'static {
    /// What products of two elements are added up in.
    type Sum: Real;
    /// Whether that is the element itself.
    const IS_SUM: bool;

    /// Exactly this value.
    fn widen(self) -> Self::Sum;
    /// The nearest element, ties to even.
    fn narrow(value: Self::Sum) -> Self;

    #[doc(hidden)]
    fn tiles(family: Family) -> Tiles<Self>;
}

impl Element for f32 {
    type Sum = Self;
    const IS_SUM: bool = true;

    #[inline(always)]
    fn widen(self) -> Self {
        self
    }
    #[inline(always)]
    fn narrow(value: Self) -> Self {
        value
    }
    fn tiles(family: Family) -> Tiles<Self> {
        Tiles::f32(family)
    }
}

impl Element for f64 {
    type Sum = Self;
    const IS_SUM: bool = true;

    #[inline(always)]
    fn widen(self) -> Self {
        self
    }
    #[inline(always)]
    fn narrow(value: Self) -> Self {
        value
    }
    fn tiles(family: Family) -> Tiles<Self> {
        Tiles::f64(family)
    }
}

/// bfloat16: the upper half of an f32, 8 bits of precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(u16);

// SAFETY: a u16, of which every value is one.
unsafe impl Zeroable for Bf16 {}
// SAFETY: as above.
unsafe impl Pod for Bf16 {}

impl Bf16 {
    /// From its bits.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Its bits.
    #[must_use]
    pub const fn to_bits(self) -> u16 {
        self.0
    }
}

impl Element for Bf16 {
    type Sum = f32;
    const IS_SUM: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    /// Adds half a unit in the last place, less one where the result is even already; what is no
    /// number stays none.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        Self(if value.is_nan() { quiet } else { rounded } as u16)
    }
    fn tiles(family: Family) -> Tiles<Self> {
        Tiles::bf16(family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_holds_its_own_values_and_rounds_others_to_the_nearest_even() {
        for bits in 0..=u16::MAX {
            let x = Bf16::from_bits(bits);
            let back = Bf16::narrow(x.widen());
            assert!(back == x || x.widen().is_nan() && back.widen().is_nan(), "{bits:#x}");
        }
        let narrow = |bits: u32| Bf16::narrow(f32::from_bits(bits)).to_bits();
        assert_eq!(narrow(0x3f80_8000), 0x3f80, "a tie goes to the even one below");
        assert_eq!(narrow(0x3f81_8000), 0x3f82, "a tie goes to the even one above");
        assert_eq!(narrow(0x3f80_8001), 0x3f81);
        assert_eq!(narrow(0x3f80_7fff), 0x3f80);
        assert_eq!(narrow(0x7f7f_ffff), 0x7f80, "what is too large is infinite");
        assert!(Bf16::narrow(f32::from_bits(0x7f80_0001)).widen().is_nan());
        assert_eq!(Bf16::narrow(f32::NEG_INFINITY).widen(), f32::NEG_INFINITY);
    }
}
