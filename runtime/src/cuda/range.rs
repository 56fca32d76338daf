//! Ranges of device memory.

use crate::places::Piece;

/// Bytes `base .. base + len` of device memory; `base` is 0 if there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub base: u64,
    pub len: u64,
}

impl Range {
    /// No bytes.
    pub const EMPTY: Range = Range { base: 0, len: 0 };
}

impl Piece for Range {
    fn part(self, start: u64, len: u64) -> Option<Range> {
        if start.checked_add(len)? > self.len {
            return None;
        }
        Some(Range { base: self.base.checked_add(start)?, len })
    }

    fn overlaps(self, other: Range) -> bool {
        let end = |r: Range| r.base.saturating_add(r.len);
        self.len > 0 && other.len > 0 && self.base < end(other) && other.base < end(self)
    }

    fn same(self, other: Range) -> bool {
        self == other
    }

    fn bytes(self) -> u64 {
        self.len
    }
}
