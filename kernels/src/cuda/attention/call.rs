//! What an attention node asks for, taken apart once for all families.

use millrace_ir::{DType, Dim, Node, Op, Operand};

use crate::cuda::plan::{Argument, Site};
use crate::cuda::source::SourceWriter;

/// Declarations shared by the attention kernels.
const COMMON: &str = include_str!("common.cu");

/// The paged cache of a call.
#[derive(Clone, Debug)]
pub(super) struct Paged {
    /// `kv_lens [b]`.
    pub lens: Operand,
    /// `block_table [b, width]`.
    pub table: Operand,
    /// Columns of the table.
    pub width: Dim,
    /// Pages of the cache.
    pub pages: Dim,
    /// Slots of a page.
    pub tokens_per_block: usize,
}

/// One attention node.
#[derive(Clone, Debug)]
pub(super) struct Call<'a> {
    /// Where it stands.
    pub site: Site<'a>,
    /// Queries `[t, heads, d]`.
    pub q: Operand,
    /// Keys `[t, kv_heads, d]`, or their cache `[pages, tokens_per_block, kv_heads, d]`.
    pub k: Operand,
    /// Values, as keys.
    pub v: Operand,
    /// `seq_starts [b + 1]`.
    pub starts: Operand,
    /// The cache, if there is one.
    pub paged: Option<Paged>,
    /// Result `[t, heads, d]`.
    pub out: Operand,
    /// Rows.
    pub t: Dim,
    /// Sequences.
    pub b: Dim,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Head size.
    pub d: usize,
    /// Element type.
    pub dtype: DType,
    /// Factor on `q . k`.
    pub scale: f64,
    /// Whether a row sees no later rows.
    pub causal: bool,
    /// Rows a row sees, itself included; 0 for all.
    pub window: usize,
}

/// A constant extent.
pub(super) fn constant(dim: &Dim) -> Option<usize> {
    usize::try_from(dim.as_const()?).ok()
}

/// Extents of a kernel are `int`.
const MOST: usize = 1 << 24;

impl<'a> Call<'a> {
    /// The call of a site of one `attention` or `paged_attention`.
    pub fn of(site: Site<'a>) -> Option<Call<'a>> {
        let node: &Node = site.only()?;
        let (scale, causal, window, paged) = match &*node.op {
            Op::Attention(op) => (op.mask.scale, op.mask.causal, op.mask.window, None),
            Op::PagedAttention(op) => {
                let paged = Paged {
                    lens: node.operands[4],
                    table: node.operands[5],
                    width: site.operand_ty(node, 5).shape[1].clone(),
                    pages: site.operand_ty(node, 1).shape[0].clone(),
                    tokens_per_block: constant(&site.operand_ty(node, 1).shape[1])?,
                };
                (op.scale, true, op.window, Some(paged))
            }
            _ => return None,
        };
        let (q_ty, k_ty) = (site.operand_ty(node, 0), site.operand_ty(node, 1));
        let call = Call {
            site,
            q: node.operands[0],
            k: node.operands[1],
            v: node.operands[2],
            starts: node.operands[3],
            paged,
            out: Operand::Value(node.results[0]),
            t: q_ty.shape[0].clone(),
            b: site.operand_ty(node, 3).shape[0].sub(&Dim::from(1i64)),
            heads: constant(&q_ty.shape[1])?,
            kv_heads: constant(&k_ty.shape[k_ty.rank() - 2])?,
            d: constant(&q_ty.last())?,
            dtype: q_ty.dtype,
            scale,
            causal,
            // No row is further away than this.
            window: if window > MOST { 0 } else { window },
        };
        let sizes = [call.heads, call.kv_heads, call.d];
        let positive =
            sizes.iter().all(|n| (1..=MOST).contains(n)) && call.heads.is_multiple_of(call.kv_heads);
        let pages = call.paged.as_ref().is_none_or(|p| (1..=MOST).contains(&p.tokens_per_block));
        let float = matches!(call.dtype, DType::F32 | DType::F16 | DType::BF16);
        (positive && pages && call.d <= 1024 && float).then_some(call)
    }

    /// Query heads of a key head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Whether the tensor core families can run it: 16-bit elements and heads of whole 16-byte pieces.
    pub fn fits_tensor_cores(&self) -> bool {
        matches!(self.dtype, DType::BF16 | DType::F16)
            && (16..=256).contains(&self.d)
            && self.d.is_multiple_of(8)
            && self.scale > 0.0
    }

    /// A source of `family` with the constants of the call.
    pub fn source(&self, family: &'static str) -> SourceWriter {
        let starts = self.site.ty(self.starts).dtype;
        let mut writer = SourceWriter::new(family)
            .ty("Element", self.dtype)
            .ty("Starts", starts)
            .int("HEADS", self.heads)
            .int("KV_HEADS", self.kv_heads)
            .int("GROUP", self.group())
            .int("D", self.d)
            .int("WINDOW", self.window)
            .line(&format!("constexpr bool CAUSAL = {};", self.causal))
            .float("SCALE", self.scale as f32)
            .float("SCALE_LOG2", (self.scale * std::f64::consts::LOG2_E) as f32);
        writer = match &self.paged {
            Some(paged) => writer
                .line("#define PAGED 1")
                .ty("Lens", self.site.ty(paged.lens).dtype)
                .ty("Table", self.site.ty(paged.table).dtype)
                .int("TOKENS_PER_BLOCK", paged.tokens_per_block)
                .line("#define PAGING_PARAMETERS const Lens *lens, const Table *table, int width,"),
            None => writer.line("#define PAGED 0").line("#define PAGING_PARAMETERS"),
        };
        writer.body(COMMON).body(super::SEQUENCES)
    }

    /// Arguments of kernels whose blocks join their results through memory: [`Call::arguments`] without numbers, workspace,
    /// counters, sequences, columns of the table.
    pub fn joined_arguments(&self) -> Vec<Argument> {
        let mut args = self.arguments();
        args.retain(|a| !matches!(a, Argument::I32(_)));
        args.extend([Argument::Workspace(0u64.into()), Argument::Counters(0), Argument::I32(self.b.clone())]);
        args.extend(self.paged.as_ref().map(|paged| Argument::I32(paged.width.clone())));
        args
    }

    /// Arguments `q, k, v, starts`, those of the cache, `out`.
    pub fn arguments(&self) -> Vec<Argument> {
        let mut args: Vec<Argument> =
            [self.q, self.k, self.v, self.starts].into_iter().map(Argument::Address).collect();
        if let Some(paged) = &self.paged {
            args.extend([Argument::Address(paged.lens), Argument::Address(paged.table)]);
            args.push(Argument::I32(paged.width.clone()));
        }
        args.push(Argument::Address(self.out));
        args
    }
}
