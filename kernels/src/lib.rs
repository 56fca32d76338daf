//! Millrace kernels: fast host kernels, and the generators of CUDA kernels.
//!
//! `unsafe` is confined to `cpu::simd` (vector instructions) and `cpu::parallel` (disjoint writes from threads).
#![deny(unsafe_code)]

pub mod cpu;
pub mod cuda;
