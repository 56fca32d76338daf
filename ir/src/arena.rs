//! Typed arenas: ids are handed out once, deletion leaves a tombstone, and only `compact` renumbers.

use std::fmt;
use std::marker::PhantomData;

/// An index type of one arena.
pub trait Id: Copy + Eq + Ord + std::hash::Hash + fmt::Display + fmt::Debug {
    /// The id of slot `index`.
    fn from_index(index: usize) -> Self;
    /// The slot of this id.
    fn index(self) -> usize;
}

/// Declares an id type whose `Display` is its spelling in text, logs and errors.
macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(u32);

        impl $crate::arena::Id for $name {
            fn from_index(index: usize) -> Self {
                $name(u32::try_from(index).unwrap_or(u32::MAX))
            }
            fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{self}")
            }
        }
    };
}
pub(crate) use id_type;

/// Slots addressed by `I`; a removed slot stays empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Arena<I, T> {
    slots: Vec<Option<T>>,
    live: usize,
    id: PhantomData<I>,
}

impl<I: Id, T> Default for Arena<I, T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<I: Id, T> Arena<I, T> {
    /// An empty arena.
    pub fn new() -> Self {
        Arena { slots: Vec::new(), live: 0, id: PhantomData }
    }

    /// Makes room for `more` items.
    pub fn reserve(&mut self, more: usize) {
        self.slots.reserve_exact(more);
    }

    /// Appends `item` and returns its id.
    pub fn push(&mut self, item: T) -> I {
        self.slots.push(Some(item));
        self.live += 1;
        I::from_index(self.slots.len() - 1)
    }

    /// Fills slot `id`, leaving tombstones below it; returns the item back if the slot is taken.
    pub fn insert_at(&mut self, id: I, item: T) -> Result<(), T> {
        if id.index() >= self.slots.len() {
            self.slots.resize_with(id.index() + 1, || None);
        }
        match &mut self.slots[id.index()] {
            Some(_) => Err(item),
            slot => {
                *slot = Some(item);
                self.live += 1;
                Ok(())
            }
        }
    }

    /// Removes the item, leaving a tombstone.
    pub fn remove(&mut self, id: I) -> Option<T> {
        let item = self.slots.get_mut(id.index())?.take();
        self.live -= usize::from(item.is_some());
        item
    }

    /// Forgets the slots from `bound` on, as if they had never been used.
    pub fn truncate(&mut self, bound: usize) {
        let gone = self.slots.iter().skip(bound).filter(|slot| slot.is_some()).count();
        self.slots.truncate(bound);
        self.live -= gone;
    }

    /// The item, unless it was removed or never existed.
    pub fn get(&self, id: I) -> Option<&T> {
        self.slots.get(id.index())?.as_ref()
    }

    /// Whether the item exists; without tombstones this reads no slot.
    pub fn contains(&self, id: I) -> bool {
        if self.live == self.slots.len() { id.index() < self.live } else { self.get(id).is_some() }
    }

    /// Mutable access to the item.
    pub fn get_mut(&mut self, id: I) -> Option<&mut T> {
        self.slots.get_mut(id.index())?.as_mut()
    }

    /// Live items with their ids, by id.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (I, &T)> + Clone {
        self.slots.iter().enumerate().filter_map(|(i, s)| s.as_ref().map(|t| (I::from_index(i), t)))
    }

    /// Live items with their ids, mutable, by id.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (I, &mut T)> {
        self.slots.iter_mut().enumerate().filter_map(|(i, s)| s.as_mut().map(|t| (I::from_index(i), t)))
    }

    /// Ids of live items.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = I> + Clone + '_ {
        self.iter().map(|(id, _)| id)
    }

    /// Number of live items.
    pub fn len(&self) -> usize {
        self.live
    }

    /// True without live items.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// One more than the largest id ever used: the length of a side table.
    pub fn bound(&self) -> usize {
        self.slots.len()
    }
}

impl<I: Id, T> std::ops::Index<I> for Arena<I, T> {
    type Output = T;
    /// Panics on a tombstone: an id held across a removal is a defect of the caller, never of input.
    fn index(&self, id: I) -> &T {
        match self.get(id) {
            Some(item) => item,
            None => panic!("{id} was removed or never existed"),
        }
    }
}

impl<I: Id, T> std::ops::IndexMut<I> for Arena<I, T> {
    fn index_mut(&mut self, id: I) -> &mut T {
        match self.get_mut(id) {
            Some(item) => item,
            None => panic!("{id} was removed or never existed"),
        }
    }
}
