//! Matmuls: `y = x w^T` with norms before and epilogues behind.
//!
//! Weights come in two layouts. *Rows* is the plain `[n, k]`. *Cores* is `[n / 8, k / 8, 8, 8]`: blocks of eight rows by
//! eight columns, 128 contiguous bytes for 16-bit elements. A warp reads four neighbouring blocks as 512 contiguous bytes,
//! and a tile of blocks is what the matrix instructions read from shared memory without a swizzle.

pub mod large;
pub mod problem;
pub mod tile_epilogue;

pub use problem::{Layout, Norm, Problem, Term};
