//! Ops: a closed enum, one line per op in the table below, one file per op family.
//!
//! Semantics come first: an op is its [`OpDef::eval`]. Adding an op is one file with an [`OpDef`] and one line
//! in the table; the exhaustive matches of codegen are then the to-do list. The table also asks for a
//! [`Sample`] under `sampling/`, which puts the op into random graphs.

#[cfg(test)]
mod absurdity_tests;
pub mod add_norm;
pub mod attention;
pub mod binary;
pub mod broadcasting;
pub mod conv;
pub mod def;
pub mod fused_matmul;
pub mod indexing;
pub mod kv_append;
#[cfg(test)]
mod language_tests;
pub mod matmul;
pub mod mean_pool;
pub mod movement;
pub mod normalize;
pub mod paged_attention;
pub mod paging;
pub mod phases;
pub mod pointwise;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
#[cfg(test)]
pub mod testing;
pub mod unary;

pub use def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits};

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::attr::{AttrReader, Attrs};
use crate::graph::Operand;
use crate::sampling::{Draft, Known, Sample};
use crate::tensor::Tensor;
use crate::types::TensorType;

macro_rules! op_table {
    ($($module:ident :: $ty:ident),* $(,)?) => {
        $(pub use $module::$ty;)*

        /// What a node computes.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Op {
            $(#[doc = concat!("See [`", stringify!($ty), "`].")] $ty($ty),)*
        }

        $(impl From<$ty> for Op {
            fn from(op: $ty) -> Op {
                Op::$ty(op)
            }
        })*

        impl Op {
            /// Every spelling of every op, in table order.
            pub fn all_names() -> Vec<&'static str> {
                let mut names = Vec::new();
                $(names.extend_from_slice(<$ty as OpDef>::NAMES);)*
                names
            }

            /// The op spelled `name` with `attrs`; `None` if there is no such op.
            pub fn from_text(name: &str, attrs: &Attrs) -> Option<Result<Op, String>> {
                $(if <$ty as OpDef>::NAMES.contains(&name) {
                    let mut reader = AttrReader::new(attrs);
                    let parsed = <$ty as OpDef>::from_attrs(name, &mut reader);
                    return Some(parsed.and_then(|op| reader.finish().map(|()| Op::$ty(op))));
                })*
                None
            }

            /// An op spelled `name` for a random graph, with operands; see [`Sample`].
            pub fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
                $(if <$ty as OpDef>::NAMES.contains(&name) {
                    return <$ty as Sample>::sample(name, draft);
                })*
                None
            }

            /// Bounds of the results' elements in a random graph; see [`Sample`].
            pub fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
                match self {
                    $(Op::$ty(op) => Sample::range(op, operands),)*
                }
            }

            fn def(&self) -> &dyn DynOp {
                match self {
                    $(Op::$ty(op) => op,)*
                }
            }
        }
    };
}

op_table! {
    unary::Unary,
    binary::Binary,
    movement::Select,
    movement::Cast,
    movement::Broadcast,
    movement::Reshape,
    movement::Transpose,
    movement::Slice,
    movement::Concat,
    movement::Iota,
    reduce::Reduce,
    indexing::Gather,
    indexing::Scatter,
    indexing::Embedding,
    matmul::Matmul,
    conv::Conv2d,
    conv::Pool2d,
    normalize::Softmax,
    rms_norm::RmsNorm,
    normalize::LayerNorm,
    normalize::L2Normalize,
    rope::Rope,
    kv_append::KvAppend,
    paged_attention::PagedAttention,
    attention::Attention,
    mean_pool::MeanPool,
    fused_matmul::FusedMatmul,
    pointwise::Pointwise,
    add_norm::AddNorm,
}

/// An op that clones share: the nodes of repeated layers have theirs in memory once. Changing it copies it first.
#[derive(Clone)]
pub struct SharedOp(Arc<Op>);

impl SharedOp {
    /// Whether both are one op in memory; `false` says nothing about equality.
    pub fn is_shared_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T: Into<Op>> From<T> for SharedOp {
    fn from(op: T) -> Self {
        SharedOp(Arc::new(op.into()))
    }
}

impl Deref for SharedOp {
    type Target = Op;
    fn deref(&self) -> &Op {
        &self.0
    }
}

impl DerefMut for SharedOp {
    fn deref_mut(&mut self) -> &mut Op {
        Arc::make_mut(&mut self.0)
    }
}

impl PartialEq for SharedOp {
    fn eq(&self, other: &Self) -> bool {
        self.is_shared_with(other) || **self == **other
    }
}

impl PartialEq<Op> for SharedOp {
    fn eq(&self, other: &Op) -> bool {
        **self == *other
    }
}

impl fmt::Debug for SharedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Ops that were seen, so that equal ones are one in memory.
#[derive(Debug, Default)]
pub(crate) struct SharedOps(Vec<SharedOp>);

impl SharedOps {
    /// Most ops that are remembered: those of a model's layers.
    const MOST: usize = 64;

    /// `op`, or an equal one that was seen before.
    pub(crate) fn share(&mut self, op: Op) -> SharedOp {
        if let Some(known) = self.0.iter().find(|known| **known == op) {
            return known.clone();
        }
        let new = SharedOp::from(op);
        if self.0.len() < Self::MOST {
            self.0.push(new.clone());
        }
        new
    }
}

/// The object-safe face of [`OpDef`].
trait DynOp {
    fn name(&self) -> &'static str;
    fn attrs(&self) -> Attrs;
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String>;
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String>;
    fn traits(&self) -> OpTraits;
}

impl<T: OpDef> DynOp for T {
    fn name(&self) -> &'static str {
        OpDef::name(self)
    }
    fn attrs(&self) -> Attrs {
        OpDef::attrs(self)
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        OpDef::infer(self, ctx)
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        OpDef::eval(self, ctx)
    }
    fn traits(&self) -> OpTraits {
        OpDef::traits(self)
    }
}

impl Op {
    /// Its spelling in the text form.
    pub fn name(&self) -> &'static str {
        self.def().name()
    }

    /// Its parameters.
    pub fn attrs(&self) -> Attrs {
        self.def().attrs()
    }

    /// Result types from operand types; the message says which rule is broken.
    pub fn infer(&self, operands: &[TensorType]) -> Result<Vec<TensorType>, String> {
        self.def().infer(&InferCtx { operands })
    }

    /// The definition of the op: naive, in f64. Results are not yet rounded to their element types.
    pub fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        self.def().eval(ctx)
    }

    /// Algebraic and memory properties that passes rely on.
    pub fn traits(&self) -> OpTraits {
        self.def().traits()
    }
}
