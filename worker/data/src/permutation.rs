//! A pseudo-random order of 0..size that needs no memory: any place of it is known at once.
//!
//! A balanced Feistel network permutes the smallest power of four that covers `size`; cycle
//! walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, §3) keeps the
//! result below `size`. It shuffles data, it protects nothing: the round function is a mixer,
//! not a cipher.

/// Rounds. Four suffice with ideal round functions (Luby and Rackoff, 1988); twice as many
/// for one that is not.
const ROUNDS: usize = 8;

/// One order of `0..size`.
#[derive(Clone, Debug)]
pub(crate) struct Permutation {
    size: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The order that `(seed, epoch)` gives. `size` is at least 1 and at most 2^62, more
    /// windows than any disk holds.
    pub(crate) fn new(seed: u64, epoch: u64, size: u64) -> Self {
        let bits = u64::BITS - size.saturating_sub(1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        let mut hasher = blake3::Hasher::new_derive_key("caravan data 1: order of windows in an epoch");
        hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes());
        let mut random = hasher.finalize_xof();
        let keys = std::array::from_fn(|_| {
            let mut key = [0; 8];
            random.fill(&mut key);
            u64::from_le_bytes(key)
        });
        Self { size, half_bits, keys }
    }

    /// What stands at place `place`, which must be below `size`.
    pub(crate) fn at(&self, place: u64) -> u64 {
        let mut value = place;
        // The network permutes a domain of less than 4 · size values, so fewer than four rounds
        // on average lead back below `size`; at the latest at `place` itself, where the cycle closes.
        loop {
            value = self.network(value);
            if value < self.size || value == place {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_value_comes_exactly_once(seed: u64, epoch in 0_u64..100, size in 1_u64..3000) {
            let order = Permutation::new(seed, epoch, size);
            let mut seen = vec![false; size as usize];
            for place in 0..size {
                let value = order.at(place) as usize;
                prop_assert!(!std::mem::replace(&mut seen[value], true));
            }
        }
    }

    #[test]
    fn seeds_and_epochs_give_different_orders_and_neighbours_part() {
        let order = |seed, epoch| {
            let p = Permutation::new(seed, epoch, 1000);
            (0..1000).map(|i| p.at(i)).collect::<Vec<_>>()
        };
        assert_eq!(order(1, 1), order(1, 1));
        for other in [order(1, 2), order(2, 1)] {
            let same = order(1, 1).iter().zip(&other).filter(|(a, b)| a == b).count();
            // Two random orders agree in one place on average; 12 has a chance of 1e-9.
            assert!(same < 12, "{same} places agree");
        }
        let neighbours = order(1, 1).windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count();
        // Two of 999 pairs on average.
        assert!(neighbours < 15, "{neighbours} neighbours stayed together");
    }

    #[test]
    fn the_order_is_pinned_because_runs_depend_on_it() {
        let order = Permutation::new(42, 0, 10);
        let got: Vec<_> = (0..10).map(|i| order.at(i)).collect();
        assert_eq!(got, [6, 7, 0, 2, 1, 3, 9, 8, 4, 5]);
    }
}
