//! A shared place to write to, for tasks that write disjoint parts of one matrix.

// Rows that interleave the columns of several tasks cannot be split into exclusive slices.
#![allow(unsafe_code)]

/// A pointer that tasks on several threads write disjoint places through.
#[derive(Debug)]
pub(crate) struct Target<R>(*mut R);

impl<R> Clone for Target<R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Target<R> {}

impl<R> Target<R> {
    /// The start of a slice that the caller has to itself for as long as this is used.
    pub(crate) fn new(data: &mut [R]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// The element `i` places on.
    pub(crate) fn at(self, i: usize) -> *mut R {
        self.0.wrapping_add(i)
    }

    /// `len` elements from `i` on.
    ///
    /// # Safety
    /// They lie within the slice that this was made from, whose exclusive borrow still lasts,
    /// and nobody else touches them while the result lives.
    pub(crate) unsafe fn part<'a>(self, i: usize, len: usize) -> &'a mut [R] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(i), len) }
    }

    /// The `rows` × `cols` block from `i` on, of a matrix whose rows start `stride` apart.
    ///
    /// # Safety
    /// As for `part`, of each row.
    pub(crate) unsafe fn block(self, i: usize, (rows, cols): (usize, usize), stride: usize) -> Block<R> {
        Block { start: Self(self.at(i)), rows, cols, stride }
    }
}

/// A block of a matrix that nobody else touches.
#[derive(Debug)]
pub(crate) struct Block<R> {
    start: Target<R>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<R> Block<R> {
    /// Its rows.
    pub(crate) fn rows<'a>(self) -> impl Iterator<Item = &'a mut [R]>
    where
        R: 'a,
    {
        // SAFETY: whoever made it promised that for each row.
        (0..self.rows).map(move |row| unsafe { self.start.part(row * self.stride, self.cols) })
    }
}

// SAFETY: a Target is only a place; every use of it states why no two threads meet there.
unsafe impl<R: Send> Send for Target<R> {}
// SAFETY: as above.
unsafe impl<R: Send> Sync for Target<R> {}
