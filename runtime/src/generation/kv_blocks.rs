//! Which page of the paged KV cache belongs to which sequence.
//!
//! Invariants: a page belongs to at most one sequence; a failed reservation changes nothing; pages are
//! handed out lowest first, so the same calls give the same block tables.
//!
//! The pool knows page numbers only, not what or where a page is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use millrace_ir::{Error, Kind, Result};

/// Allocator of KV pages with one block table per sequence.
#[derive(Clone, Debug)]
pub struct BlockPool {
    pages: usize,
    tokens_per_block: usize,
    /// Pages from this one on were never handed out; all returned ones are below.
    untouched: usize,
    returned: BinaryHeap<Reverse<i32>>,
    tables: BTreeMap<usize, Vec<i32>>,
}

impl BlockPool {
    /// A pool of pages 0 to `pages` - 1, each for `tokens_per_block` tokens. Takes memory by use, not by size.
    ///
    /// Error `generation/kv-size` if there are no tokens per block or page numbers exceed 31 bits.
    pub fn new(pages: usize, tokens_per_block: usize) -> Result<Self> {
        if tokens_per_block == 0 || i32::try_from(pages).is_err() {
            let message = format!("{pages} pages of {tokens_per_block} tokens are no KV cache");
            return Err(Error::new(Kind::BadInput, "generation/kv-size", message));
        }
        let (returned, tables) = (BinaryHeap::new(), BTreeMap::new());
        Ok(BlockPool { pages, tokens_per_block, untouched: 0, returned, tables })
    }

    /// Makes sure that sequence `seq` has pages for `tokens` tokens in all; it never loses pages by this.
    ///
    /// Error `generation/kv-cache-full`, with the pages needed and free, if the pool cannot give them.
    pub fn reserve(&mut self, seq: usize, tokens: usize) -> Result<()> {
        let held = self.table(seq).len();
        let needed = self.pages_for(tokens).saturating_sub(held);
        if needed > self.free_pages() {
            let message = format!(
                "sequence {seq} needs {needed} more pages of {} tokens, {} of {} are free",
                self.tokens_per_block,
                self.free_pages(),
                self.pages
            );
            return Err(Error::new(Kind::OutOfMemory, "generation/kv-cache-full", message)
                .hint("give the KV cache more memory, or run fewer or shorter sequences at once"));
        }
        for _ in 0..needed {
            let page = match self.returned.pop() {
                Some(Reverse(page)) => page,
                None => {
                    self.untouched += 1;
                    (self.untouched - 1) as i32 // < pages, which fit
                }
            };
            self.tables.entry(seq).or_default().push(page);
        }
        Ok(())
    }

    /// Takes all pages of sequence `seq` back; nothing happens if it has none.
    pub fn release(&mut self, seq: usize) {
        if let Some(pages) = self.tables.remove(&seq) {
            self.returned.extend(pages.into_iter().map(Reverse));
        }
    }

    /// Pages of sequence `seq`, in order of its tokens; empty if it has none.
    pub fn table(&self, seq: usize) -> &[i32] {
        self.tables.get(&seq).map_or(&[], Vec::as_slice)
    }

    /// How many pages `tokens` tokens take.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// Pages that belong to no sequence.
    pub fn free_pages(&self) -> usize {
        self.pages - self.untouched + self.returned.len()
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Tokens per page.
    pub fn tokens_per_block(&self) -> usize {
        self.tokens_per_block
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lowest_pages_first_and_reuse() {
        let mut pool = BlockPool::new(6, 4).unwrap();
        pool.reserve(7, 5).unwrap();
        pool.reserve(3, 1).unwrap();
        pool.reserve(7, 12).unwrap();
        assert_eq!((pool.table(7), pool.table(3)), (&[0, 1, 3][..], &[2][..]));
        pool.reserve(7, 2).unwrap();
        assert_eq!(pool.table(7).len(), 3);
        pool.release(7);
        pool.reserve(5, 17).unwrap();
        assert_eq!(pool.table(5), [0, 1, 3, 4, 5]);
        assert_eq!(pool.free_pages(), 0);
        pool.release(99);
    }

    #[test]
    fn a_full_pool_names_needed_and_free_and_changes_nothing() {
        let mut pool = BlockPool::new(3, 4).unwrap();
        pool.reserve(0, 4).unwrap();
        let error = pool.reserve(1, 12).unwrap_err();
        assert_eq!((error.code(), error.kind()), ("generation/kv-cache-full", Kind::OutOfMemory));
        assert!(
            error.message().contains("needs 3 more pages") && error.message().contains("2 of 3 are free")
        );
        assert_eq!((pool.free_pages(), pool.table(1).len()), (2, 0));
        assert!(BlockPool::new(1, 0).is_err() && BlockPool::new(usize::MAX, 1).is_err());
    }

    proptest! {
        /// Against a model that keeps the set of free pages.
        #[test]
        fn agrees_with_a_set_of_free_pages(
            pages in 0usize..12,
            calls in prop::collection::vec((0usize..5, prop::option::of(0usize..30)), 0..60),
        ) {
            let mut pool = BlockPool::new(pages, 3).unwrap();
            let mut free: BTreeSet<i32> = (0..pages as i32).collect();
            let mut tables = vec![Vec::new(); 5];
            for (seq, call) in calls {
                if let Some(tokens) = call {
                    let needed = tokens.div_ceil(3).saturating_sub(tables[seq].len());
                    prop_assert_eq!(pool.reserve(seq, tokens).is_ok(), needed <= free.len());
                    if needed <= free.len() {
                        tables[seq].extend((0..needed).map(|_| free.pop_first().unwrap()));
                    }
                } else {
                    pool.release(seq);
                    free.extend(tables[seq].drain(..));
                }
                prop_assert_eq!(pool.free_pages(), free.len());
                prop_assert!((0..5).all(|s| pool.table(s) == tables[s]));
            }
        }
    }
}
