//! Scratch memory of a thread, kept between uses so that steady work allocates nothing.

// Line's two marker traits are unsafe to claim.
#![allow(unsafe_code)]

use crate::Element;
use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;

/// A cache line: what vector loads want to be aligned to.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: bytes of any value, all zeros included, and as large as its alignment: no padding.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

thread_local! {
    /// Buffers not in use. A stack, since an operation may need one while it holds another.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of unspecified content.
pub(crate) fn with<E: Element, T>(len: usize, f: impl FnOnce(&mut [E]) -> T) -> T {
    let mut lines = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    let needed = (len * size_of::<E>()).div_ceil(size_of::<Line>());
    if lines.len() < needed {
        lines.resize(needed, Line::zeroed());
    }
    let out = f(&mut bytemuck::cast_slice_mut(&mut lines)[..len]);
    FREE.with_borrow_mut(|free| free.push(lines));
    out
}

/// Calls `f` with two buffers.
pub(crate) fn with2<A: Element, B: Element, T>(
    a: usize,
    b: usize,
    f: impl FnOnce(&mut [A], &mut [B]) -> T,
) -> T {
    with(a, |a| with(b, |b| f(a, b)))
}

/// Cuts the first `len` elements off a buffer.
pub(crate) fn take<'a, R>(buffer: &mut &'a mut [R], len: usize) -> &'a mut [R] {
    let (head, tail) = std::mem::take(buffer).split_at_mut(len);
    *buffer = tail;
    head
}
