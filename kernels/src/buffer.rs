//! Memory that starts where a cache line does.

// Line's two marker traits are unsafe to claim.
#![allow(unsafe_code)]

use bytemuck::{Pod, Zeroable};
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: bytes of any value, all zeros included, and as large as its alignment: no padding.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

/// Numbers of one type, the first of which starts a cache line: a vector of 64 bytes, and a row of
/// an AMX tile, that starts elsewhere is two loads. New ones are zero.
#[derive(Clone)]
pub struct Buffer<T> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// So many zeros.
    #[must_use]
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::default();
        buffer.fit(len);
        buffer
    }

    /// Gives it a length. What it had before is there up to that length; what comes to it is zero
    /// where it had never been in use.
    pub fn fit(&mut self, len: usize) {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        if self.lines.len() < lines {
            self.lines.resize(lines, Line::zeroed());
        }
        self.len = len;
    }
}

impl<T: Pod> From<&[T]> for Buffer<T> {
    fn from(values: &[T]) -> Self {
        let mut buffer = Self::zeros(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl<T> Default for Buffer<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, of: PhantomData }
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.len, std::any::type_name::<T>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bf16;

    #[test]
    fn it_starts_at_a_line_and_keeps_what_it_has() {
        let mut buffer = Buffer::from(&[1.0f32, 2.0, 3.0][..]);
        for len in [3, 2, 100, 5000] {
            buffer.fit(len);
            assert_eq!((buffer.as_ptr().align_offset(64), buffer.len()), (0, len));
            assert_eq!(buffer[..2], [1.0, 2.0]);
        }
        assert!(buffer[3..].iter().all(|x| *x == 0.0));
        assert!(Buffer::<Bf16>::default().is_empty());
    }
}
