//! The CUDA backend: runs a lowered graph by the launch table that was compiled for the device's architecture.
//!
//! Nothing here needs a GPU or its driver to build or to start: the driver's library is opened when a session or
//! [`survey`] asks for it, and its absence is an answer. A session holds its context's memory, one stream, and lists of
//! launches prepared for the bindings it has seen; steps that recur are recorded as CUDA graphs and replayed. Weights that
//! stream are copied by a second stream, inside the same graph: see `residence`.
//!
//! The engine is not trusted to name memory: see `resolve`. Its device code is trusted like a program: a kernel can
//! write wherever the device lets it, so run engines of those you would run programs of.

mod arch;
mod argmax;
mod backend;
mod device_arena;
#[allow(unsafe_code)]
mod driver;
mod granules;
#[allow(unsafe_code)]
mod launch;
#[allow(unsafe_code)]
mod library;
#[allow(unsafe_code)]
mod management;
mod products;
mod program;
mod range;
mod rates;
mod recent;
mod report;
mod residence;
mod resolve;
#[cfg(test)]
mod testing;
mod timing;
#[allow(unsafe_code)]
mod transfer;
mod upload;

pub use driver::{DeviceInfo, RawStream};
pub use library::{Product, present as has_library};
pub use rates::{Rates, rates};
pub use report::{GraphReport, LibraryReport, PoolReport, Survey, survey};
pub use timing::{Bench, Timed, TimedBuffer, Timer, distance};

pub(crate) use backend::{After, Cuda};
pub(crate) use device_arena::DeviceArena;
pub(crate) use resolve::reads;
