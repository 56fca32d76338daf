//! The syntax of the IR: data only, no logic. What each part means stands in the crate's header.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::arena::{Arena, id_type};
use crate::dim::{Dim, SymDecl};
use crate::dtype::DType;
use crate::list::List;
use crate::ops::SharedOp;
use crate::types::TensorType;

id_type!(
    /// A node, spelled `n3`.
    NodeId, "n"
);
id_type!(
    /// A value, spelled `%7`.
    ValueId, "%"
);
id_type!(
    /// A weight; texts spell it by name, `@w`.
    WeightId, "weight#"
);
id_type!(
    /// A state; texts spell it by name, `@kv0.k`.
    StateId, "state#"
);
id_type!(
    /// A kernel of a lowered module, spelled `k4`.
    KernelId, "k"
);
id_type!(
    /// An arena of a planned module; texts spell it by name.
    ArenaId, "arena#"
);

/// The name of a layer or tensor of the source model.
pub type Loc = Arc<str>;

/// What a node reads; few operands stand in the node itself.
pub type Operands = SmallVec<[Operand; 4]>;

/// What a node defines; few results stand in the node itself.
pub type Results = SmallVec<[ValueId; 4]>;

/// Names of layers; one name stands in the node itself.
pub type Locs = SmallVec<[Loc; 1]>;

/// How far compilation has come. Phases only move forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// As an importer or an author wrote it.
    Imported,
    /// Simplified: no dead nodes, no foldable constants.
    Canonical,
    /// Fused ops are legal from here on.
    Fused,
    /// The order of nodes is final.
    Scheduled,
    /// Every buffer has its place.
    Planned,
    /// Every node has its kernel.
    Lowered,
}

/// One compilation unit: a graph with its symbols, weights, states and, later, arenas and kernels.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// Name without `@`.
    pub name: String,
    /// How far compilation has come.
    pub phase: Phase,
    /// The target the module was fused and lowered for (`cpu`), none before.
    pub target: Option<String>,
    /// Symbols in declaration order.
    pub dims: Vec<SymDecl>,
    /// Weights by reference.
    pub weights: Arena<WeightId, Weight>,
    /// Persistent buffers such as the KV cache.
    pub states: Arena<StateId, State>,
    /// Activation arenas, from phase planned on.
    pub arenas: Arena<ArenaId, ArenaDecl>,
    /// Kernels, in phase lowered.
    pub kernels: Arena<KernelId, Kernel>,
    /// The step itself.
    pub graph: Graph,
}

/// A constant tensor, named and typed; its bytes come from `expr` when the engine is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Name without `@`, unique in the module.
    pub name: String,
    /// Type; all extents are constant.
    pub ty: TensorType,
    /// Where the bytes come from.
    pub expr: WeightExpr,
    /// Set by `mark-streamable`.
    pub stream: Option<Stream>,
}

/// What computes a weight.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightExpr {
    /// Tensor `key` of the checkpoint called `file` (always `"model"` for Hugging Face folders).
    File {
        /// Logical checkpoint name.
        file: String,
        /// Public tensor name.
        key: String,
    },
    /// Every element is this value.
    Splat(f64),
    /// Normal distribution with mean 0, reproducible from the seed and the element index.
    Random {
        /// Seed of the stream.
        seed: u64,
        /// Standard deviation.
        std: f64,
    },
    /// Literal elements, row-major; at most [`WeightExpr::DENSE_LIMIT`].
    Dense(Vec<f64>),
    /// Parts joined along `axis`.
    Concat {
        /// Axis of the join.
        axis: usize,
        /// Parts in order.
        parts: SmallVec<[WeightId; 4]>,
    },
    /// Axes permuted: result axis `i` is source axis `perm[i]`.
    Transpose {
        /// Source axis of each result axis.
        perm: Vec<usize>,
        /// Source.
        of: WeightId,
    },
    /// Same elements in row-major order, other shape.
    Reshape {
        /// Source.
        of: WeightId,
    },
    /// Element type of the weight's own type, rounded to nearest even.
    Cast {
        /// Source.
        of: WeightId,
    },
    /// The elements `start..start + len` along `axis`.
    Slice {
        /// Axis of the cut.
        axis: usize,
        /// First element along the axis.
        start: usize,
        /// Number of elements along the axis.
        len: usize,
        /// Source.
        of: WeightId,
    },
    /// Rows of a `[n, k]` source in the matmul kernels' panel order: each segment of rows is padded to a
    /// multiple of `panel` with zeros; type `[panels, k, panel]`.
    Pack {
        /// Rows per panel.
        panel: usize,
        /// Rows of each segment; their sum is `n`.
        segments: List<usize>,
        /// Source, `[n, k]`.
        of: WeightId,
    },
    /// Rows of a `[n, k]` source in blocks of eight rows by eight columns: each segment of rows is padded to a multiple
    /// of eight with zeros; type `[panels, k / 8, 8, 8]`.
    Cores {
        /// Rows of each segment; their sum is `n`.
        segments: List<usize>,
        /// Whether the panels of two equal segments alternate, for gated matmuls.
        alternate: bool,
        /// Source, `[n, k]`.
        of: WeightId,
    },
}

impl WeightExpr {
    /// Most elements a [`WeightExpr::Dense`] may hold.
    pub const DENSE_LIMIT: usize = 4096;
}

/// How a weight may be streamed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Position of the first node that reads the weight in the schedule.
    pub first_use: usize,
    /// Axis along which the bytes may be cut into tiles.
    pub tile_axis: usize,
    /// Bytes of one slice along `tile_axis`.
    pub tile_bytes: u64,
}

/// A buffer that outlives a step. Ops that write it take it and return it.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Name without `@`, unique in the module.
    pub name: String,
    /// Type.
    pub ty: TensorType,
}

/// A block of memory that holds activations.
#[derive(Clone, Debug, PartialEq)]
pub struct ArenaDecl {
    /// Name, unique in the module.
    pub name: String,
    /// Bytes, monotone in every symbol.
    pub size: Dim,
    /// Alignment of its base and of every offset, a power of two.
    pub align: u64,
}

/// A piece of target code that one or several nodes run.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Family and variant, such as `cpu.matmul.packed`.
    pub name: String,
    /// Element types the kernel reads and writes, operands first.
    pub dtypes: Vec<DType>,
}

/// Nodes, values and their order.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Graph {
    /// Name without `@`.
    pub name: String,
    /// Values the caller supplies.
    pub inputs: Vec<ValueId>,
    /// Values the caller receives.
    pub outputs: Vec<Output>,
    /// Nodes.
    pub nodes: Arena<NodeId, Node>,
    /// Values.
    pub values: Arena<ValueId, Value>,
    /// Execution order: a permutation of the live nodes.
    pub order: Vec<NodeId>,
}

/// A named result of the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Public name.
    pub name: String,
    /// The value.
    pub value: ValueId,
}

/// One operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it computes.
    pub op: SharedOp,
    /// What it reads, in the op's order.
    pub operands: Operands,
    /// What it defines.
    pub results: Results,
    /// Source layers it stands for, sorted.
    pub loc: Locs,
    /// Its kernel, in phase lowered.
    pub kernel: Option<KernelId>,
    /// Whether it is launched together with the node before it in the order. Memory that any node of such a group
    /// reads or writes is alive during the whole group.
    pub joined: bool,
}

/// What a node reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operand {
    /// A value.
    Value(ValueId),
    /// A weight.
    Weight(WeightId),
    /// A state as it is when the step begins.
    State(StateId),
}

/// A tensor during one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Type.
    pub ty: TensorType,
    /// Who defines it.
    pub def: Def,
    /// Its buffer, from phase planned on; inputs have none, the caller owns them.
    pub place: Option<Place>,
}

/// Who defines a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Def {
    /// Graph input with its public name.
    Input(String),
    /// Result `index` of a node.
    Node {
        /// The node.
        node: NodeId,
        /// Which of its results.
        index: usize,
    },
}

/// Where a value lives.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// At a byte offset of an arena.
    Arena {
        /// The arena.
        arena: ArenaId,
        /// Byte offset, a multiple of the arena's alignment.
        offset: Dim,
    },
    /// In the state it is a version of.
    State(StateId),
    /// In the caller's buffer for output number n.
    Output(usize),
}
