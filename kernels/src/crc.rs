//! CRC-32C, as fast as memory is read.
//!
//! Where there are carry-less products of 512 bits, bytes are folded 256 at a time: V. Gopal and
//! others, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009.
//! A part of a message may be replaced by any other that leaves the same remainder; the 256 bytes
//! that have been read are multiplied by what the next 256 shift them by, and added to those.

// The instructions, and loads through pointers.
#![allow(unsafe_code)]

/// The CRC-32C of these bytes.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq") {
        // SAFETY: both features were detected.
        return unsafe { x86::crc32c(bytes) };
    }
    crc32c::crc32c(bytes)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crc32c::crc32c_append;
    use std::arch::x86_64::*;

    /// Bytes that are folded into as many: four vectors.
    const RUN: usize = 256;

    /// The generator's coefficients below x³², that of x³¹ in the lowest bit.
    const GENERATOR: u32 = 0x82F6_3B78;

    /// xⁿ modulo the generator, as a factor: in bits 1 to 32, since the product of two reflected
    /// numbers comes out one bit too low.
    const fn power(n: u32) -> i64 {
        let mut value = 1u32 << 31;
        let mut i = 0;
        while i < n {
            value = (value >> 1) ^ (GENERATOR * (value & 1));
            i += 1;
        }
        (value as i64) << 1
    }

    #[target_feature(enable = "avx512f,vpclmulqdq")]
    pub(super) fn crc32c(bytes: &[u8]) -> u32 {
        let (runs, tail) = bytes.as_chunks::<RUN>();
        let Some((first, runs)) = runs.split_first() else { return crc32c_append(0, tail) };
        // A lane's first 8 bytes are shifted 64 bits further than its last 8; products of 64 with
        // 33 bits end 32 bits before the lane does.
        const SHIFT: u32 = 8 * RUN as u32;
        let (ahead, behind) = const { (power(SHIFT + 32), power(SHIFT - 32)) };
        let factors = _mm512_set_epi64(behind, ahead, behind, ahead, behind, ahead, behind, ahead);
        let mut acc = [0, 1, 2, 3].map(|i| vector(first, i));
        // The register starts with ones.
        acc[0] = _mm512_xor_si512(acc[0], _mm512_maskz_set1_epi32(1, -1));
        for run in runs {
            for (i, acc) in acc.iter_mut().enumerate() {
                let ahead = _mm512_clmulepi64_epi128::<0x00>(*acc, factors);
                let behind = _mm512_clmulepi64_epi128::<0x11>(*acc, factors);
                *acc = _mm512_ternarylogic_epi64::<0x96>(ahead, behind, vector(run, i));
            }
        }
        let mut rest = [0u8; RUN];
        for (i, acc) in acc.into_iter().enumerate() {
            // SAFETY: `rest` has four vectors' bytes.
            unsafe { _mm512_storeu_si512(rest.as_mut_ptr().cast::<__m512i>().add(i), acc) };
        }
        // Complemented it is a register of zeros: the ones are in `rest`.
        crc32c_append(crc32c_append(!0, &rest), tail)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn vector(run: &[u8; RUN], i: usize) -> __m512i {
        assert!(i < 4);
        // SAFETY: `run` has four vectors' bytes.
        unsafe { _mm512_loadu_si512(run.as_ptr().cast::<__m512i>().add(i)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_that_of_the_processors_own_instruction(
            bytes in prop::collection::vec(any::<u8>(), 0..3000), from in 0..64usize,
        ) {
            let bytes = &bytes[from.min(bytes.len())..];
            prop_assert_eq!(super::crc32c(bytes), crc32c::crc32c(bytes));
        }
    }

    #[test]
    fn it_is_that_of_rfc_3720() {
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(super::crc32c(&ascending), 0x46DD_794E);
        assert_eq!(super::crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(super::crc32c(b"123456789"), 0xE306_9283);
    }
}
