//! a += b, a = b, also rounded, and a = 0, by all threads.

use crate::{Cpu, Element, Real};
use rayon::prelude::*;

/// Elements that a thread takes at a time: 256 KiB of f32, a sixteenth of a millisecond.
const CHUNK: usize = 1 << 16;

/// a += b, element by element.
///
/// # Panics
/// Where lengths differ.
pub fn add<R: Real>(cpu: &Cpu, a: &mut [R], b: &[R]) {
    assert_eq!(a.len(), b.len());
    let family = cpu.family();
    cpu.install(|| {
        a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| add_chunk(family, a, b));
    });
}

/// a = b.
///
/// # Panics
/// Where lengths differ.
pub fn copy<R: Real>(cpu: &Cpu, a: &mut [R], b: &[R]) {
    assert_eq!(a.len(), b.len());
    cpu.install(|| {
        a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| a.copy_from_slice(b));
    });
}

/// a = b, rounded.
///
/// # Panics
/// Where lengths differ.
pub fn narrow<E: Element>(cpu: &Cpu, a: &mut [E], b: &[E::Sum]) {
    assert_eq!(a.len(), b.len());
    let family = cpu.family();
    cpu.install(|| {
        a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| narrow_chunk(family, a, b));
    });
}

/// a = 0.
pub fn zero<R: Real>(cpu: &Cpu, a: &mut [R]) {
    cpu.install(|| a.par_chunks_mut(CHUNK).for_each(|a| a.fill(R::ZERO)));
}

kernel! {
    pub(crate) fn narrow_chunk<E: Element>(a: &mut [E], b: &[E::Sum]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a = E::narrow(*b);
        }
    }
}

kernel! {
    pub(crate) fn add_chunk<R>(a: &mut [R], b: &[R]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += *b;
        }
    }
}
