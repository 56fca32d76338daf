//! One node: typed views of its regions, and the kernel call.
//!
//! Every view is made under the same contract: the regions live for the step, and `disjoint` has shown that what is
//! written is not read through another operand. A kernel that works in place gets one mutable view of the result, into
//! which the operand was copied first if they differ.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::fused_matmul;
use millrace_ir::ops::rope::RopeLayout;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{FusedMatmul, Matmul as MatmulOp};
use millrace_ir::{Bindings, DType, Dim, Error, Kind, Module, Op, Result, TensorType};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::attention::{Heads, packed_attention, paged_attention};
use millrace_kernels::cpu::element::Element;
use millrace_kernels::cpu::indexing::mean_pool;
use millrace_kernels::cpu::math::Activation;
use millrace_kernels::cpu::matmul::{Epilogue, Matmul, Order, PANEL, matmul_activations, repack};
use millrace_kernels::cpu::normalize::{
    Norm, add_norm, add_norm_only, l2_normalize, norm, softmax, softmax_axis,
};
use millrace_kernels::cpu::paging::{Paging, kv_append};
use millrace_kernels::cpu::rope::{Pairs, rope};
use millrace_kernels::cpu::select::{POINTWISE, POINTWISE_ROWS, REFERENCE};

use super::reference;
use crate::memory::{Plain, Region};

/// Reads rows of a table that is not in memory: of so many bytes, at these places, into the result.
pub(super) type Table<'a> = &'a dyn Fn(usize, &[usize], &mut [u8]) -> Result<()>;

/// A node with its memory.
pub(super) struct Node<'a> {
    pub module: &'a Module,
    pub node: &'a millrace_ir::Node,
    pub operands: &'a [Region],
    pub results: &'a [Region],
    pub bindings: &'a Bindings,
    pub frequencies: Option<&'a [f32]>,
    /// The panels that operand 1 holds of the weight of a matmul, if not all.
    pub panels: Option<Range<usize>>,
    /// What reads operand 0 if it is not in memory.
    pub table: Option<Table<'a>>,
}

pub(super) fn internal(message: &str) -> Error {
    Error::new(Kind::Internal, "run/no-kernel", message)
}

/// Runs `$call` with `$t` standing for the host type of a float element type.
macro_rules! with_float {
    ($dtype:expr, $t:ident => $call:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                $call
            }
            DType::BF16 => {
                type $t = bf16;
                $call
            }
            DType::F16 => {
                type $t = f16;
                $call
            }
            other => Err(internal(&format!("no kernel computes in {other}"))),
        }
    };
}

fn paging<'a>(ids: &'a [Cow<'_, [i32]>; 3], state: &[usize]) -> Paging<'a> {
    Paging {
        seq_starts: &ids[0],
        kv_lens: &ids[1],
        block_table: &ids[2],
        tokens_per_block: state[1],
        pages: state[0],
    }
}

fn activation(f: UnaryFn) -> Result<Activation> {
    match f {
        UnaryFn::Silu => Ok(Activation::Silu),
        UnaryFn::Gelu => Ok(Activation::Gelu),
        UnaryFn::GeluTanh => Ok(Activation::GeluTanh),
        UnaryFn::Relu => Ok(Activation::Relu),
        UnaryFn::Tanh => Ok(Activation::Tanh),
        UnaryFn::Sigmoid => Ok(Activation::Sigmoid),
        other => Err(internal(&format!("no matmul kernel applies {}", other.name()))),
    }
}

/// Copies a value to another place.
pub(super) fn copy(from: Region, to: Region) -> Result<()> {
    if from.overlaps(to) || from.len() != to.len() {
        return Err(internal("a value is copied onto itself or to another size"));
    }
    // SAFETY: both live for the step and are disjoint, and no kernel runs.
    let (source, target) = unsafe { (from.slice::<u8>()?, to.slice_mut::<u8>()?) };
    target.copy_from_slice(source);
    Ok(())
}

impl<'a> Node<'a> {
    pub(super) fn read<T: Plain>(&self, index: usize) -> Result<&'a [T]> {
        let region = self.operands.get(index).ok_or_else(|| internal("an operand is missing"))?;
        // SAFETY: operands live for the step and are disjoint from what the kernel writes.
        unsafe { region.slice() }
    }

    pub(super) fn write<T: Plain>(&self, index: usize) -> Result<&'a mut [T]> {
        let region = self.results.get(index).ok_or_else(|| internal("a result is missing"))?;
        // SAFETY: each kernel takes each result once; results are disjoint from each other and from what is read.
        unsafe { region.slice_mut() }
    }

    /// The result that replaces operand 0, holding the operand's elements.
    pub(super) fn replace<T: Plain>(&self) -> Result<&'a mut [T]> {
        let same = self.operands[0].same(self.results[0]);
        let out = self.write::<T>(0)?;
        if !same {
            let from = self.read::<T>(0)?;
            if from.len() != out.len() {
                return Err(internal("an in-place result has another size"));
            }
            out.copy_from_slice(from);
        }
        Ok(out)
    }

    pub(super) fn ty(&self, index: usize) -> &'a TensorType {
        self.module.operand_type(self.node.operands[index])
    }

    pub(super) fn result_ty(&self, index: usize) -> &'a TensorType {
        &self.module.graph.values[self.node.results[index]].ty
    }

    pub(super) fn shape(&self, ty: &TensorType) -> Result<Vec<usize>> {
        self.extents(&ty.shape)
    }

    /// The values of dims.
    pub(super) fn extents(&self, dims: &[Dim]) -> Result<Vec<usize>> {
        let extent = |d: &Dim| d.extent(self.bindings).and_then(|n| usize::try_from(n).ok());
        dims.iter().map(|d| extent(d).ok_or_else(|| internal("a shape has no value"))).collect()
    }

    /// An index operand as i32.
    fn ids(&self, index: usize) -> Result<Cow<'a, [i32]>> {
        if self.ty(index).dtype != DType::I64 {
            return self.read(index).map(Cow::Borrowed);
        }
        let narrow = |id: &i64| {
            i32::try_from(*id).map_err(|_| {
                let message = format!("index {id} is outside -2147483648..2147483648");
                Error::new(Kind::BadInput, "run/bad-index", message)
            })
        };
        self.read::<i64>(index)?.iter().map(narrow).collect::<Result<Vec<_>>>().map(Cow::Owned)
    }

    /// Index operands `first..` of a paged cache.
    fn paging_ids(&self, first: usize) -> Result<[Cow<'a, [i32]>; 3]> {
        Ok([self.ids(first)?, self.ids(first + 1)?, self.ids(first + 2)?])
    }

    /// Runs the node's kernel.
    pub fn run(&self, pool: &Pool) -> Result<()> {
        let kernel =
            self.node.kernel.and_then(|k| self.module.kernels.get(k)).map_or("", |k| k.name.as_str());
        if kernel == REFERENCE {
            return self.reference();
        }
        let dtype = self.result_ty(0).dtype;
        match &*self.node.op {
            Op::Reshape(_) => self.replace::<u8>().map(|_| ()),
            Op::Rope(op) => {
                let frequencies = self.frequencies.ok_or_else(|| internal("frequencies are missing"))?;
                let shape = self.shape(self.ty(0))?;
                let pairs = if op.layout == RopeLayout::Half { Pairs::Half } else { Pairs::Interleaved };
                let positions = self.ids(1)?;
                with_float!(dtype, T => {
                    rope(pool, self.replace::<T>()?, &positions, (shape[1], shape[2]), frequencies, pairs);
                    Ok(())
                })
            }
            Op::KvAppend(_) => {
                let state = self.shape(self.ty(0))?;
                let ids = self.paging_ids(2)?;
                let paging = paging(&ids, &state);
                with_float!(dtype, T => kv_append(self.replace::<T>()?, self.read::<T>(1)?, state[2] * state[3], &paging))
            }
            Op::PagedAttention(op) => {
                let (q, state) = (self.shape(self.ty(0))?, self.shape(self.ty(1))?);
                let heads = Heads {
                    heads: q[1],
                    kv_heads: state[2],
                    d: q[2],
                    scale: op.scale as f32,
                    causal: true,
                    window: op.window,
                };
                let ids = self.paging_ids(3)?;
                let paging = paging(&ids, &state);
                with_float!(dtype, T => paged_attention(pool, heads, self.read::<T>(0)?,
                    (self.read::<T>(1)?, self.read::<T>(2)?), &paging, self.write::<T>(0)?))
            }
            Op::Attention(op) => {
                let (q, k) = (self.shape(self.ty(0))?, self.shape(self.ty(1))?);
                let heads = Heads {
                    heads: q[1],
                    kv_heads: k[1],
                    d: q[2],
                    scale: op.mask.scale as f32,
                    causal: op.mask.causal,
                    window: op.mask.window,
                };
                let starts = self.ids(3)?;
                with_float!(dtype, T => packed_attention(pool, heads, self.read::<T>(0)?,
                    (self.read::<T>(1)?, self.read::<T>(2)?), &starts, self.write::<T>(0)?))
            }
            Op::RmsNorm(op) => with_float!(dtype, T => {
                norm(pool, Norm::Rms(op.eps as f32), self.replace::<T>()?, self.read::<T>(1)?, None);
                Ok(())
            }),
            Op::LayerNorm(op) => with_float!(dtype, T => {
                let bias = if self.operands.len() > 2 { Some(self.read::<T>(2)?) } else { None };
                norm(pool, Norm::Layer(op.eps as f32), self.replace::<T>()?, self.read::<T>(1)?, bias);
                Ok(())
            }),
            Op::AddNorm(op) => {
                let kind = match op.kind {
                    NormKind::Rms => Norm::Rms(op.eps as f32),
                    NormKind::Layer => Norm::Layer(op.eps as f32),
                };
                with_float!(dtype, T => {
                    let bias = if op.kind == NormKind::Layer { Some(self.read::<T>(3)?) } else { None };
                    let vectors = (self.read::<T>(2)?, bias);
                    if op.sum {
                        add_norm(pool, kind, self.replace::<T>()?, self.read::<T>(1)?, vectors, self.write::<T>(1)?);
                    } else {
                        add_norm_only(pool, kind, self.replace::<T>()?, self.read::<T>(1)?, vectors);
                    }
                    Ok(())
                })
            }
            Op::Softmax(op) => {
                let shape = self.shape(self.ty(0))?;
                let (n, inner) = (shape[op.axis], shape[op.axis + 1..].iter().product());
                with_float!(dtype, T => {
                    if op.axis + 1 == shape.len() {
                        softmax(pool, self.replace::<T>()?, n);
                    } else {
                        softmax_axis(pool, self.replace::<T>()?, n, inner);
                    }
                    Ok(())
                })
            }
            Op::L2Normalize(op) => {
                let n = self.shape(self.ty(0))?.last().copied().unwrap_or(1);
                with_float!(dtype, T => {
                    l2_normalize(pool, self.replace::<T>()?, n, op.eps as f32);
                    Ok(())
                })
            }
            Op::MeanPool(_) => {
                let width = self.shape(self.ty(0))?.last().copied().unwrap_or(1);
                with_float!(dtype, T => mean_pool(self.read::<T>(0)?, width, &self.ids(1)?, self.write::<T>(0)?))
            }
            Op::FusedMatmul(op) => {
                with_float!(self.ty(0).dtype, T => with_float!(dtype, O => self.matmul::<T, O>(pool, op)))
            }
            Op::Matmul(op) => {
                with_float!(self.ty(0).dtype, T => with_float!(dtype, O => self.plain_matmul::<T, O>(pool, op)))
            }
            Op::Pointwise(op) if kernel == POINTWISE_ROWS => self.region_of_rows(pool, op),
            Op::Unary(_) | Op::Binary(_) | Op::Cast(_) | Op::Pointwise(_) => {
                self.elementwise(pool, kernel == POINTWISE)
            }
            Op::Reduce(op) => with_float!(dtype, T => self.reduce::<T>(pool, op)),
            Op::Conv2d(op) => with_float!(dtype, T => self.conv2d::<T>(pool, op)),
            Op::Pool2d(op) => with_float!(dtype, T => self.pool2d::<T>(pool, op)),
            Op::Transpose(_)
            | Op::Broadcast(_)
            | Op::Slice(_)
            | Op::Concat(_)
            | Op::Gather(_)
            | Op::Embedding(_)
            | Op::Scatter(_)
            | Op::Select(_)
            | Op::Iota(_) => self.movement(pool),
        }
    }

    fn reference(&self) -> Result<()> {
        let operands = (0..self.operands.len()).map(|i| self.read::<u8>(i)).collect::<Result<Vec<_>>>()?;
        let computed = reference::evaluate(self.module, self.node, &operands, self.bindings)?;
        drop(operands);
        for (index, bytes) in computed.iter().enumerate() {
            let out = self.write::<u8>(index)?;
            if out.len() != bytes.len() {
                return Err(internal("the evaluator gave another size"));
            }
            out.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn matmul<T: Element + Plain, O: Element + Plain>(&self, pool: &Pool, op: &FusedMatmul) -> Result<()> {
        let x = self.shape(self.ty(0))?;
        let k = x.last().copied().unwrap_or(1);
        let m = x[..x.len() - 1].iter().product();
        // A residual that the result replaces is read through the result only.
        let replaced = self.node.op.traits().in_place.filter(|i| self.operands[*i].same(self.results[0]));
        if replaced.is_some() && self.results[0].len() > 0 && self.ty(0).dtype != self.result_ty(0).dtype {
            return Err(internal("an operand cannot be replaced"));
        }
        let mut next = 2;
        let epilogue = op
            .epilogue
            .iter()
            .map(|step| {
                let at = next;
                next += usize::from(step.has_operand());
                let operand = || self.read::<T>(at);
                Ok(match step {
                    fused_matmul::Epilogue::Bias => Epilogue::Bias(operand()?),
                    fused_matmul::Epilogue::Residual if replaced == Some(at) => Epilogue::Accumulate,
                    fused_matmul::Epilogue::Residual => Epilogue::Residual(operand()?),
                    fused_matmul::Epilogue::Mul => Epilogue::Mul(operand()?),
                    fused_matmul::Epilogue::Activation(f) => Epilogue::Activation(activation(*f)?),
                    fused_matmul::Epilogue::Glu(f) => Epilogue::Glu(activation(*f)?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut outputs = (0..self.results.len()).map(|i| self.write::<O>(i)).collect::<Result<Vec<_>>>()?;
        let b = self.read::<T>(1)?;
        let panels = self.panels.clone();
        let b = match op.panel {
            PANEL => Cow::Borrowed(b),
            _ if panels.is_some() => return Err(internal("a weight of other panels has no tiles")),
            0 => Cow::Owned(repack(pool, b, Order::Rows, &op.segments, k)),
            width => Cow::Owned(repack(pool, b, Order::Panels(width), &op.segments, k)),
        };
        let product =
            Matmul { m, k, a: self.read::<T>(0)?, b: &b, segments: &op.segments, epilogue: &epilogue };
        product.run_panels(pool, panels.unwrap_or(0..product.panels()), &mut outputs);
        Ok(())
    }

    fn plain_matmul<T: Element + Plain, O: Element + Plain>(&self, pool: &Pool, op: &MatmulOp) -> Result<()> {
        let (a, b, out) = (self.shape(self.ty(0))?, self.shape(self.ty(1))?, self.shape(self.result_ty(0))?);
        let rank = out.len();
        let (m, n, k) = (out[rank - 2], out[rank - 1], a[a.len() - 1]);
        let lead = &out[..rank - 2];
        let index = millrace_ir::ops::broadcasting::source_index;
        let offsets: Vec<(usize, usize)> = (0..lead.iter().product())
            .map(|at| {
                (index(at, lead, &a[..a.len() - 2]) * m * k, index(at, lead, &b[..b.len() - 2]) * n * k)
            })
            .collect();
        let (a, b) = (self.read::<T>(0)?, self.read::<T>(1)?);
        matmul_activations(pool, (m, n, k), op.transpose_b, &offsets, a, b, self.write::<O>(0)?);
        Ok(())
    }
}
