//! Weights that stay in memory and weights that stream through a ring: which, when and where, as a pure function.
//!
//! [`Demand`] is what a module asks for: its weights with the ways they may be cut ([`Cut`]) and the uses of them in
//! execution order. [`place`] turns a demand, a budget and a [`Ring`] into a [`Placement`]: how much of each weight is
//! resident, and the copies of a step. [`check`] proves a placement right and shares no code with [`place`];
//! [`predict`] plays a step against [`Costs`]; [`times`], [`work`] and [`costs`] estimate them. [`schedule`] prints a
//! placement, and [`share`] and [`by_benefit`] split one budget among several engines.
//!
//! Terms. A *slice* is one index along axis 0 of a weight. A *tile* is a run of slices that is copied and computed with at
//! once. A *slot* is a place of the ring; all slots have the same size and fixed addresses. A step's copies are numbered in the
//! order of their uses; the *steady state* is a step that follows another: it finds the first copies already in
//! their slots, brings in the others, and ends by bringing in the first ones for the next step.
//!
//! A runtime keeps to this: before the first step it brings copy `j < slots` into slot `j`. Within a step it waits for the
//! copy before the tile's kernel, and after the kernel it enqueues [`Placement::next`] into the slot that became free, on a
//! copy queue that keeps its order, or on fewer queues than slots in turn.

mod check;
mod demand;
mod place;
mod predict;
mod share;
mod text;
mod work;

pub use check::check;
pub use demand::{Cut, Demand, Item, Use};
pub use place::{Copy, Placement, minimum, place, resident};
pub use predict::{Busy, Costs, Prediction, Span, predict, timeline};
pub use share::{by_benefit, curve, share};
pub use text::schedule;
pub use work::{costs, times, work};

/// The ring, and what never enters it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Slots, at least 2.
    pub slots: usize,
    /// Bytes of a slot at most. A placement that lacks little uses smaller ones, and larger ones only where weights that cannot be
    /// cut would not fit otherwise.
    pub slot_bytes: u64,
    /// Weights of fewer bytes always stay resident.
    pub small: u64,
    /// Alignment of each resident weight and of the slots.
    pub align: u64,
}

impl Ring {
    /// Two slots of 32 MiB, which reach 99 % of the rate of a host link; weights under 1 MiB stay.
    pub const DEFAULT: Ring = Ring { slots: 2, slot_bytes: 32 << 20, small: 1 << 20, align: 256 };

    /// `bytes` rounded up to the alignment.
    pub fn padded(&self, bytes: u64) -> u64 {
        bytes.checked_next_multiple_of(self.align.max(1)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
