//! Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3", SC 2011). A value is a function of (seed, purpose, index), so any part of a
//! stream can be had alone, by anyone, with the same bits.

/// What random numbers are for: streams of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Weights at step 0, indexed by element of the flat model.
    Init = 1,
    /// Sampled tokens, indexed by position.
    Sample = 2,
}

/// Two uniform 64-bit numbers.
pub(crate) fn draw(seed: u64, purpose: Purpose, index: u64) -> [u64; 2] {
    let key = [seed as u32, (seed >> 32) as u32];
    let c = philox([index as u32, (index >> 32) as u32, purpose as u32, 0], key);
    let join = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    [join(c[0], c[1]), join(c[2], c[3])]
}

/// Ten rounds over a counter under a key.
fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53 * u64::from(c[0]);
        let b = 0xCD9E_8D57 * u64::from(c[2]);
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A number in [0, 1), from the upper 53 bits.
pub(crate) fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' Random123 library (kat_vectors, philox4x32 10).
    #[test]
    fn it_gives_the_known_answers_of_random123() {
        let ones = u32::MAX;
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
