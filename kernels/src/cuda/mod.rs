//! CUDA kernels: sources, and the functions that write them for a graph's types, shapes and architecture.
//!
//! A *site* is a run of nodes that is launched together: one node, or a launch group such as a norm with its matmul. A
//! *family* answers a site with a [`Planned`]: the variants of which the runtime chooses by shape, each a list of launches
//! of generated [`Source`]s. The compiler asks [`plan_site`] for every site of a module and joins the answers into a launch
//! table; compiling the sources is the compiler's business, launching them the runtime's. Nothing here touches a device
//! or a CUDA library.

pub mod arch;
pub mod argmax;
pub mod attention;
mod body;
pub mod conv;
mod copy;
#[cfg(test)]
mod device_tests;
pub mod matmul;
pub mod movement;
pub mod plan;
pub mod pointwise;
pub mod reduce;
mod regions;
pub mod rope;
pub mod rows;
pub mod select;
pub mod source;
pub mod space;

pub use arch::Arch;
pub use matmul::Choices;
pub use plan::{Argument, Planned, Site, SiteLaunch, SiteLibrary, SiteVariant};
pub use select::{plan as plan_site, plan_with as plan_site_with};
pub use source::{Promise, Source};

use std::sync::Arc;

/// Kernels beside the graph: name, source, threads of a block.
pub fn helpers(_arch: Arch) -> Vec<(&'static str, Arc<Source>, u32)> {
    vec![("argmax_split", argmax::argmax_split(), argmax::SPLIT_THREADS)]
}
