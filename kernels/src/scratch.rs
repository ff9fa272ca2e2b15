//! Scratch memory of a thread, kept between uses so that steady work allocates nothing.

use crate::{Buffer, Element};
use std::cell::RefCell;

thread_local! {
    /// Buffers not in use. A stack, since an operation may need one while it holds another.
    static FREE: RefCell<Vec<Buffer<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of unspecified content.
pub(crate) fn with<E: Element, T>(len: usize, f: impl FnOnce(&mut [E]) -> T) -> T {
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    buffer.fit(len * size_of::<E>());
    let out = f(bytemuck::cast_slice_mut(&mut buffer));
    FREE.with_borrow_mut(|free| free.push(buffer));
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
