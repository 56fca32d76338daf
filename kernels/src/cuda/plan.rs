//! What a family answers: variants, launches and arguments of one site.

use std::sync::Arc;

use millrace_ir::launch::{Condition, Product, TensorMap, Tiles};
use millrace_ir::{Dim, Module, Node, NodeId, Op, Operand, TensorType};

use super::arch::Arch;
use super::source::Source;

/// Nodes that are launched together, in execution order.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// The planned module.
    pub module: &'a Module,
    /// The nodes, at least one.
    pub nodes: &'a [NodeId],
    /// The architecture.
    pub arch: Arch,
}

impl<'a> Site<'a> {
    /// Node number `index` of the site.
    pub fn node(&self, index: usize) -> &'a Node {
        &self.module.graph.nodes[self.nodes[index]]
    }

    /// The node, if the site has only one.
    pub fn only(&self) -> Option<&'a Node> {
        (self.nodes.len() == 1).then(|| self.node(0))
    }

    /// The op of the last node.
    pub fn last_op(&self) -> &'a Op {
        &self.node(self.nodes.len() - 1).op
    }

    /// Type of an operand.
    pub fn ty(&self, operand: Operand) -> &'a TensorType {
        self.module.operand_type(operand)
    }

    /// Type of operand `index` of `node`.
    pub fn operand_ty(&self, node: &Node, index: usize) -> &'a TensorType {
        self.ty(node.operands[index])
    }

    /// Type of result `index` of `node`.
    pub fn result_ty(&self, node: &Node, index: usize) -> &'a TensorType {
        &self.module.graph.values[node.results[index]].ty
    }
}

/// The answer of a family.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Ways to run the site; the last has no condition.
    pub variants: Vec<SiteVariant>,
    /// Ways to run it when a weight comes in parts; see [`millrace_ir::launch::LaunchStep::streamed`].
    pub streamed: Vec<SiteVariant>,
    /// Bytes of scratch memory, 0 for none.
    pub workspace: Dim,
    /// Bytes of counters that are zero before and after, 0 for none.
    pub counters: u64,
}

/// One way to run a site.
#[derive(Clone, Debug)]
pub struct SiteVariant {
    /// All of these hold.
    pub when: Vec<Condition>,
    /// Launches in order.
    pub launches: Vec<SiteLaunch>,
    /// What may run in their place; see [`millrace_ir::launch::Variant::library`].
    pub library: Option<SiteLibrary>,
}

/// Products of a library, in place of launches.
#[derive(Clone, Debug)]
pub struct SiteLibrary {
    /// Launches in front of them.
    pub before: Vec<SiteLaunch>,
    /// The products, in order.
    pub products: Vec<Product>,
}

impl SiteVariant {
    /// Launches that run where `when` holds.
    pub fn new(when: Vec<Condition>, launches: Vec<SiteLaunch>) -> Self {
        SiteVariant { when, launches, library: None }
    }

    /// All launches, those in front of products of a library included.
    pub fn all_launches(&self) -> impl Iterator<Item = &SiteLaunch> {
        self.launches.iter().chain(self.library.iter().flat_map(|l| &l.before))
    }
}

/// One launch.
#[derive(Clone, Debug)]
pub struct SiteLaunch {
    /// The kernel.
    pub source: Arc<Source>,
    /// Blocks.
    pub grid: [Dim; 3],
    /// Threads of a block along x.
    pub threads: u32,
    /// Blocks of a cluster along x; 1 for none.
    pub cluster: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether the kernel calls `wait_for_predecessor` before it touches memory that other kernels write.
    pub dependent: bool,
    /// Set if it may read a weight in parts.
    pub tiles: Option<Tiles>,
    /// Arguments in order.
    pub args: Vec<Argument>,
}

/// One argument; see [`millrace_ir::launch::Arg`].
#[derive(Clone, Debug)]
pub enum Argument {
    /// Address of a value, weight or state.
    Address(Operand),
    /// Address of scratch memory at a byte offset; each site has it to itself.
    Workspace(Dim),
    /// Address of the site's counters at a byte offset. Sites share them one after the other.
    Counters(u64),
    /// A 32-bit integer.
    I32(Dim),
    /// A 32-bit float.
    F32(f32),
    /// A descriptor of the tensor memory unit; the parameter is `const __grid_constant__ TensorMap`.
    Map(TensorMap),
}

impl SiteLaunch {
    /// A launch of `source` with `threads` a block and no shared memory, in order with its neighbours.
    pub fn new(source: Arc<Source>, grid: [Dim; 3], threads: u32) -> Self {
        SiteLaunch {
            source,
            grid,
            threads,
            cluster: 1,
            shared: 0,
            dependent: false,
            tiles: None,
            args: Vec::new(),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = Argument>) -> Self {
        self.args.extend(args);
        self
    }
}

impl Planned {
    /// No way to run the site yet.
    pub fn none() -> Self {
        Planned { variants: Vec::new(), streamed: Vec::new(), workspace: Dim::from(0u64), counters: 0 }
    }

    /// One launch for every shape.
    pub fn one(launch: SiteLaunch) -> Self {
        Planned::always(vec![launch])
    }

    /// The same launches for every shape.
    pub fn always(launches: Vec<SiteLaunch>) -> Self {
        Planned { variants: vec![SiteVariant::new(Vec::new(), launches)], ..Planned::none() }
    }
}

/// `min <= dim <= max`.
pub fn between(dim: &Dim, min: u64, max: u64) -> Condition {
    Condition { dim: dim.clone(), min, max }
}

/// Elements of a type.
pub fn elements(ty: &TensorType) -> Dim {
    ty.shape.iter().fold(Dim::from(1u64), |n, d| n.mul(d))
}

/// Elements of a type along all axes but the last.
pub fn rows(ty: &TensorType) -> Dim {
    ty.shape[..ty.shape.len().saturating_sub(1)].iter().fold(Dim::from(1u64), |n, d| n.mul(d))
}
