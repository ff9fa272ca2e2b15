//! A list of which everybody has a turn.

/// Members of a list, and whose turn it is.
#[derive(Clone, Debug)]
pub(crate) struct Around {
    members: Vec<usize>,
    turn: usize,
}

impl Around {
    pub(crate) fn new(members: Vec<usize>) -> Self {
        Self { members, turn: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The next `most` members, or all where they are no more; then it is the turn of those
    /// behind. To compare some of many is nearly as good as to compare all, and cheap.
    pub(crate) fn next(&mut self, most: usize) -> impl Iterator<Item = usize> + '_ {
        let (count, start) = (self.members.len().min(most), self.turn);
        if count < self.members.len() {
            self.turn = (start + count) % self.members.len();
        }
        (start..start + count).map(|i| self.members[i % self.members.len()])
    }
}
