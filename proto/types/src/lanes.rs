//! The canonical reduction tree over lanes.
//!
//! Lane gradients are added in one balanced binary tree over lane numbers, fixed by the run
//! spec. A [`Node`] names a sub-tree; a pipeline that owns lanes `a..b` can add exactly the
//! aligned sub-trees inside that range ([`cover`]) and no others, so that the result has the
//! same bits whoever held which lane.

use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range};

/// The number of a virtual replica, `0..lanes`.
pub type Lane = u32;

/// A sub-tree of the lane tree: lanes `index << level .. (index + 1) << level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Node {
    /// Height: a leaf (one lane) has level 0.
    pub level: u8,
    /// Position among the nodes of its level.
    pub index: u32,
}

impl Node {
    /// The leaf of one lane.
    #[must_use]
    pub fn leaf(lane: Lane) -> Self {
        Self { level: 0, index: lane }
    }

    /// The root over `lanes` lanes, a power of two.
    #[must_use]
    pub fn root(lanes: u32) -> Self {
        debug_assert!(lanes.is_power_of_two());
        Self { level: lanes.trailing_zeros() as u8, index: 0 }
    }

    /// The lanes below this node.
    #[must_use]
    pub fn lanes(self) -> Range<u64> {
        let start = u64::from(self.index) << self.level;
        start..start + (1 << self.level)
    }

    /// The node that this one is a half of.
    #[must_use]
    pub fn parent(self) -> Self {
        Self { level: self.level + 1, index: self.index / 2 }
    }

    /// The two halves, left first; none for a leaf.
    #[must_use]
    pub fn children(self) -> Option<(Self, Self)> {
        let level = self.level.checked_sub(1)?;
        let left = Self { level, index: self.index * 2 };
        Some((left, Self { level, index: left.index + 1 }))
    }

    /// Whether this is the left one of its parent's two halves.
    #[must_use]
    pub fn is_left(self) -> bool {
        self.index.is_multiple_of(2)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lanes = self.lanes();
        write!(f, "lanes {}..{}", lanes.start, lanes.end)
    }
}

/// The largest aligned sub-trees that lie whole in `lanes`, from left to right.
///
/// At most 2·log2(lanes) nodes; one node where the range is itself a sub-tree.
#[must_use]
pub fn cover(lanes: Range<Lane>) -> Vec<Node> {
    let mut nodes = Vec::new();
    let (mut at, end) = (u64::from(lanes.start), u64::from(lanes.end));
    while at < end {
        let aligned = if at == 0 { 63 } else { at.trailing_zeros() };
        let level = aligned.min((end - at).ilog2());
        nodes.push(Node { level: level as u8, index: (at >> level) as u32 });
        at += 1 << level;
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cover_tiles_its_range_and_no_two_siblings_stand_alone(a in 0u32..300, n in 0u32..300) {
            let nodes = cover(a..a + n);
            let lanes: Vec<u64> = nodes.iter().flat_map(|n| n.lanes()).collect();
            prop_assert_eq!(lanes, (u64::from(a)..u64::from(a + n)).collect::<Vec<_>>());
            for pair in nodes.windows(2) {
                prop_assert!(!(pair[0].is_left() && pair[0].parent() == pair[1].parent()));
            }
        }
    }

    #[test]
    fn a_whole_tree_is_its_root() {
        assert_eq!(cover(0..8), [Node::root(8)]);
        assert_eq!(
            Node::root(8).children(),
            Some((Node { level: 2, index: 0 }, Node { level: 2, index: 1 }))
        );
    }
}
