//! Activation memory: who lives when, where it lies, and an independent proof that nothing overlaps.
//!
//! One symbolic plan, two evaluations: [`pack()`] solves the offsets at the symbols' upper bounds; [`symbolic`] keeps
//! only which buffer lies below which, and writes each offset as the maximum of the ends of the buffers below it.
//! Such offsets are right for every binding, so a dynamic session evaluates the same plan at the real shape.

mod check;
#[cfg(test)]
mod feasible;
mod fold;
mod greedy;
mod instants;
mod item;
mod liveness;
mod load;
mod pack;
mod portfolio;
mod search;
pub mod stream;
mod symbolic;
mod windows;

pub use check::{Overlap, check, check_all};
pub use item::{Item, Packing, check_packing, lower_bound};
pub use liveness::{Buffer, Liveness, liveness, liveness_of};
pub use pack::{Effort, pack, pack_with};
pub use symbolic::{aligned_size, symbolic};
