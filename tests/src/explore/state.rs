//! A state: a handful of numbers, and what they are of.

use super::frame::Line;
use super::setting::SLOTS;

/// Where things are in a state.
pub(super) const NODES: usize = 1;
pub(super) const UP: usize = NODES + SLOTS;
const DOWN: usize = UP + SLOTS;
const PEERS: usize = DOWN + SLOTS;
pub(super) const FAULTS: usize = PEERS + SLOTS * SLOTS;
pub(super) const CELLS: usize = FAULTS + 1;

/// A slot whose process has not been started.
pub(super) const UNBORN: u32 = 0;
/// A slot whose process is gone.
pub(super) const GONE: u32 = 1;

/// A state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(pub(super) [u32; CELLS]);

impl State {
    /// A hash of 128 bits.
    pub(super) fn hash(&self) -> u128 {
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            (product >> 64) as u64 ^ product as u64
        };
        let (mut low, mut high) = (0x9e37_79b9_7f4a_7c15u64, 0xc2b2_ae3d_27d4_eb4fu64);
        for pair in self.0.chunks(2) {
            let word = u64::from(pair[0]) << 32 | u64::from(pair.get(1).copied().unwrap_or(0));
            low = fold(low ^ word, 0xa076_1d64_78bd_642f).wrapping_add(low.rotate_left(23));
            high = fold(high ^ word, 0xe703_7ed1_a0b4_28db).wrapping_add(high.rotate_left(41));
        }
        u128::from(fold(low ^ high.rotate_left(32), 0x8ebc_6af0_9c88_c6e3)) << 64
            | u128::from(fold(high ^ low, 0x5899_65cc_7537_4cc3))
    }

    /// Whether nothing is on a line, and nothing is to be noticed about it.
    pub(super) fn is_empty(&self, line: Line) -> bool {
        self.0[cell(line)] == 0
    }

    pub(super) fn faults(&self) -> usize {
        self.0[FAULTS] as usize
    }
}

pub(super) fn cell(line: Line) -> usize {
    match line {
        Line::Up(a) => UP + a,
        Line::Down(a) => DOWN + a,
        Line::Peer(a, b) => PEERS + a * SLOTS + b,
    }
}

/// What is on its way on one line, oldest first, with the generation or session of each frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Way {
    pub(super) frames: Vec<(u16, u32)>,
    /// What is sent in this generation or an older one goes nowhere.
    pub(super) closed: u16,
    /// The receiver's own connection to the sender is closed in this generation, and the
    /// receiver does not know.
    pub(super) notice: u16,
}
