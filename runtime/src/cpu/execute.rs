//! One node: typed views of its regions, and the kernel call.
//!
//! Every view is made under the same contract: the regions live for the step, and `disjoint` has shown that what is
//! written is not read through another operand. A kernel that works in place gets one mutable view of the result, into
//! which the operand was copied first if they differ.

use half::{bf16, f16};
use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::fused_matmul;
use millrace_ir::ops::rope::RopeLayout;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{FusedMatmul, Matmul as MatmulOp, Pointwise};
use millrace_ir::{Bindings, DType, Error, Id, Kind, Module, NodeId, Op, Result, TensorType};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::attention::{Heads, packed_attention, paged_attention};
use millrace_kernels::cpu::element::Element;
use millrace_kernels::cpu::indexing::{gather_rows, mean_pool};
use millrace_kernels::cpu::math::Activation;
use millrace_kernels::cpu::matmul::{Epilogue, Matmul, matmul_activations};
use millrace_kernels::cpu::normalize::{Norm, add_norm, add_norm_only, l2_normalize, norm, softmax};
use millrace_kernels::cpu::paging::{Paging, kv_append};
use millrace_kernels::cpu::program::{Data, Input, Layout, Out, run as run_program};
use millrace_kernels::cpu::rope::{Pairs, rope};
use millrace_kernels::cpu::select::REFERENCE;

use super::reference;
use crate::memory::{Plain, Region};

/// A node with its memory.
pub(super) struct Node<'a> {
    pub module: &'a Module,
    pub id: NodeId,
    pub node: &'a millrace_ir::Node,
    pub operands: &'a [Region],
    pub results: &'a [Region],
    pub bindings: &'a Bindings,
    pub frequencies: Option<&'a [f32]>,
}

fn internal(message: &str) -> Error {
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

impl<'a> Node<'a> {
    fn read<T: Plain>(&self, index: usize) -> Result<&'a [T]> {
        let region = self.operands.get(index).ok_or_else(|| internal("an operand is missing"))?;
        // SAFETY: operands live for the step and are disjoint from what the kernel writes.
        unsafe { region.slice() }
    }

    fn write<T: Plain>(&self, index: usize) -> Result<&'a mut [T]> {
        let region = self.results.get(index).ok_or_else(|| internal("a result is missing"))?;
        // SAFETY: each kernel takes each result once; results are disjoint from each other and from what is read.
        unsafe { region.slice_mut() }
    }

    /// The result that replaces operand 0, holding the operand's elements.
    fn replace<T: Plain>(&self) -> Result<&'a mut [T]> {
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

    fn ty(&self, index: usize) -> &'a TensorType {
        self.module.operand_type(self.node.operands[index])
    }

    fn result_ty(&self, index: usize) -> &'a TensorType {
        &self.module.graph.values[self.node.results[index]].ty
    }

    fn shape(&self, ty: &TensorType) -> Result<Vec<usize>> {
        let shape = ty.shape_at(self.bindings).ok_or_else(|| internal("a shape has no value"))?;
        Ok(shape.into_iter().map(|d| d as usize).collect())
    }

    fn paging(&self, first: usize, state: &[usize]) -> Result<Paging<'a>> {
        Ok(Paging {
            seq_starts: self.read(first)?,
            kv_lens: self.read(first + 1)?,
            block_table: self.read(first + 2)?,
            tokens_per_block: state[1],
            pages: state[0],
        })
    }

    /// Runs the node's kernel.
    pub fn run(&self, pool: &Pool) -> Result<()> {
        let kernel =
            self.node.kernel.and_then(|k| self.module.kernels.get(k)).map_or("", |k| k.name.as_str());
        if kernel == REFERENCE {
            return self.reference();
        }
        let dtype = self.result_ty(0).dtype;
        match &self.node.op {
            Op::Reshape(_) => self.replace::<u8>().map(|_| ()),
            Op::Embedding(_) | Op::Gather(_) => with_float!(dtype, T => self.gather::<T>()),
            Op::Rope(op) => {
                let frequencies = self.frequencies.ok_or_else(|| internal("frequencies are missing"))?;
                let shape = self.shape(self.ty(0))?;
                let pairs = if op.layout == RopeLayout::Half { Pairs::Half } else { Pairs::Interleaved };
                let positions = self.read::<i32>(1)?;
                with_float!(dtype, T => {
                    rope(pool, self.replace::<T>()?, positions, (shape[1], shape[2]), frequencies, pairs);
                    Ok(())
                })
            }
            Op::KvAppend(_) => {
                let state = self.shape(self.ty(0))?;
                let paging = self.paging(2, &state)?;
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
                let paging = self.paging(3, &state)?;
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
                let starts = self.read::<i32>(3)?;
                with_float!(dtype, T => packed_attention(pool, heads, self.read::<T>(0)?,
                    (self.read::<T>(1)?, self.read::<T>(2)?), starts, self.write::<T>(0)?))
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
            Op::Softmax(_) => {
                let n = self.shape(self.ty(0))?.last().copied().unwrap_or(1);
                with_float!(dtype, T => {
                    softmax(pool, self.replace::<T>()?, n);
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
                with_float!(dtype, T => mean_pool(self.read::<T>(0)?, width, self.read(1)?, self.write::<T>(0)?))
            }
            Op::FusedMatmul(op) => {
                with_float!(self.ty(0).dtype, T => with_float!(dtype, O => self.matmul::<T, O>(pool, op)))
            }
            Op::Matmul(op) => {
                with_float!(self.ty(0).dtype, T => with_float!(dtype, O => self.plain_matmul::<T, O>(pool, op)))
            }
            Op::Pointwise(op) => self.pointwise(pool, op),
            op => Err(internal(&format!("`{}` has no kernel", op.name()))),
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

    fn gather<T: Element + Plain>(&self) -> Result<()> {
        let shape = self.shape(self.ty(0))?;
        gather_rows(self.read::<T>(0)?, shape[1..].iter().product(), self.read(1)?, self.write::<T>(0)?)
    }

    fn matmul<T: Element + Plain, O: Element + Plain>(&self, pool: &Pool, op: &FusedMatmul) -> Result<()> {
        let x = self.shape(self.ty(0))?;
        let k = x.last().copied().unwrap_or(1);
        let m = x[..x.len() - 1].iter().product();
        let mut next = 2;
        let mut operand = || {
            next += 1;
            self.read::<T>(next - 1)
        };
        let epilogue = op
            .epilogue
            .iter()
            .map(|step| {
                Ok(match step {
                    fused_matmul::Epilogue::Bias => Epilogue::Bias(operand()?),
                    fused_matmul::Epilogue::Residual => Epilogue::Residual(operand()?),
                    fused_matmul::Epilogue::Mul => Epilogue::Mul(operand()?),
                    fused_matmul::Epilogue::Activation(f) => Epilogue::Activation(activation(*f)?),
                    fused_matmul::Epilogue::Glu(f) => Epilogue::Glu(activation(*f)?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut outputs = (0..self.results.len()).map(|i| self.write::<O>(i)).collect::<Result<Vec<_>>>()?;
        let product = Matmul {
            m,
            k,
            a: self.read::<T>(0)?,
            b: self.read::<T>(1)?,
            segments: &op.segments,
            epilogue: &epilogue,
        };
        product.run(pool, &mut outputs);
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

    fn pointwise(&self, pool: &Pool, op: &Pointwise) -> Result<()> {
        let shape = self.shape(self.result_ty(0))?;
        let columns = shape.last().copied().unwrap_or(1);
        let len: usize = shape.iter().product();
        let mut inputs = Vec::with_capacity(self.operands.len());
        for index in 0..self.operands.len() {
            let ty = self.ty(index);
            let own = self.shape(ty)?;
            let count: usize = own.iter().product();
            let layout = if index == 0 && self.operands[0].same(self.results[0]) {
                Layout::InOut
            } else if own.iter().skip_while(|d| **d == 1).eq(shape.iter().skip_while(|d| **d == 1)) {
                Layout::Full
            } else if count == 1 {
                Layout::Scalar
            } else if own.last() == Some(&columns) && count == columns {
                Layout::Row
            } else if own.last() == Some(&1) && count * columns == len {
                Layout::Column
            } else {
                return Err(internal("a region's operand has no layout"));
            };
            let data = match (layout, ty.dtype) {
                (Layout::InOut, _) => Data::F32(&[]),
                (_, DType::F32) => Data::F32(self.read(index)?),
                (_, DType::BF16) => Data::Bf16(self.read(index)?),
                (_, DType::F16) => Data::F16(self.read(index)?),
                (_, DType::Bool) => Data::Bool(self.read(index)?),
                (_, other) => return Err(internal(&format!("no region reads {other}"))),
            };
            inputs.push(Input { data, layout });
        }
        let mut outputs = Vec::with_capacity(self.results.len());
        for index in 0..self.results.len() {
            outputs.push(match self.result_ty(index).dtype {
                DType::F32 => Out::F32(self.write(index)?),
                DType::BF16 => Out::Bf16(self.write(index)?),
                DType::F16 => Out::F16(self.write(index)?),
                DType::Bool => Out::Bool(self.write(index)?),
                other => return Err(internal(&format!("no region writes {other}"))),
            });
        }
        debug_assert!(self.id.index() < self.module.graph.nodes.bound());
        run_program(pool, &op.body, &op.out, columns, len, &inputs, outputs);
        Ok(())
    }
}
