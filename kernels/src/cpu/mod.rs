//! Host kernels. All arithmetic accumulates in f32, and every result is *batch invariant*: an output row is bitwise
//! the same however many rows, threads or sequences share the call. Each output element is one chain of fused
//! multiply-adds in rising order; attention visits keys in blocks of 32 from position 0.
//!
//! Kernels take dense row-major slices whose sizes the caller has checked; values of index operands are checked
//! here and reported as [`millrace_ir::Error`].

pub mod attention;
pub mod ceilings;
pub mod conv;
pub mod element;
pub mod indexing;
pub mod math;
pub mod matmul;
pub mod movement;
pub mod normalize;
pub mod numbers;
pub mod paging;
#[allow(unsafe_code)]
pub mod parallel;
pub mod pool2d;
pub mod program;
pub mod reduce;
pub mod rope;
pub mod rows;
pub mod select;
#[allow(unsafe_code)]
pub mod simd;
pub mod view;
mod workers;

pub use element::Element;
pub use parallel::Pool;
pub use simd::Isa;
