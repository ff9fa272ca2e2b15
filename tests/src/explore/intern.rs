//! Everything that can be in a state gets a number, the same one wherever it is met again: so a
//! state is a handful of numbers, and what a process does with an input is worked out once.

use std::collections::HashMap;
use std::fmt::{self, Debug, Write};
use std::hash::{BuildHasherDefault, Hasher};

/// Things by number.
#[derive(Debug)]
pub(super) struct Interner<T> {
    numbers: HashMap<u128, u32, Plain>,
    things: Vec<T>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { numbers: HashMap::default(), things: Vec::new() }
    }
}

impl<T> Interner<T> {
    /// The number of a thing; things whose essence has the same digest are the same.
    pub(super) fn number(&mut self, essence: u128, thing: impl FnOnce() -> T) -> u32 {
        let next = self.things.len() as u32;
        let number = *self.numbers.entry(essence).or_insert(next);
        if number == next {
            self.things.push(thing());
        }
        number
    }

    pub(super) fn get(&self, number: u32) -> &T {
        &self.things[number as usize]
    }

    pub(super) fn len(&self) -> usize {
        self.things.len()
    }
}

struct Stream(blake3::Hasher);

impl Write for Stream {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

/// 128 bits of a hash over all that `Debug` shows.
pub(super) fn digest(essence: &dyn Debug) -> u128 {
    let mut stream = Stream(blake3::Hasher::new());
    // Writing into a hash cannot fail.
    let _ = write!(stream, "{essence:?}");
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&stream.0.finalize().as_bytes()[..16]);
    u128::from_le_bytes(bytes)
}

/// For keys that are hashes already.
pub(super) type Plain = BuildHasherDefault<Low>;

/// The low bits of a number that is a hash.
#[derive(Debug, Default)]
pub(super) struct Low(u64);

impl Hasher for Low {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, n: u128) {
        self.0 = n as u64;
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }

    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
