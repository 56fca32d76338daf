//! Matrix product: `%2 = matmul %0, %1 {transpose_b = true}`.

use super::broadcasting::{broadcast_shapes, source_index};
use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_float, need_same_dtype};
use crate::attr::{Attr, AttrReader, Attrs};
use crate::dtype::DType;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// `a [.., m, k]` times `b [.., k, n]`, or `[.., n, k]` when transposed; leading axes broadcast; result
/// `[.., m, n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matmul {
    /// `b` is `[.., n, k]`, as linear layers store their weights.
    pub transpose_b: bool,
    /// Element type of the result, if it differs from the operands'.
    pub out: Option<DType>,
}

impl OpDef for Matmul {
    const NAMES: &'static [&'static str] = &["matmul"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set_unless("transpose_b", self.transpose_b, false);
        if let Some(dtype) = self.out {
            attrs.set("out", dtype);
        }
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let transpose_b = attrs.flag("transpose_b")?;
        let out = match attrs.take("out") {
            None => None,
            Some(Attr::Word(w)) => Some(DType::parse(w).ok_or_else(|| format!("`{w}` is no element type"))?),
            Some(other) => return Err(format!("out must be an element type, not `{other}`")),
        };
        Ok(Matmul { transpose_b, out })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [a, b] = ctx.exactly()?;
        need_float("operand 0", a)?;
        need_same_dtype(a, b)?;
        if a.rank() < 2 || b.rank() < 2 {
            return Err(format!("needs two matrices, got {a} and {b}"));
        }
        let dtype = self.out.unwrap_or(a.dtype);
        if !dtype.is_float() {
            return Err(format!("out must be a float type, not {dtype}"));
        }
        let (a_lead, a_matrix) = a.shape.split_at(a.rank() - 2);
        let (b_lead, b_matrix) = b.shape.split_at(b.rank() - 2);
        let (k, n) =
            if self.transpose_b { (&b_matrix[1], &b_matrix[0]) } else { (&b_matrix[0], &b_matrix[1]) };
        need_dim("the inner extent of operand 1", k, &a_matrix[1])?;
        let mut shape = broadcast_shapes(a_lead, b_lead)?;
        shape.extend([a_matrix[0].clone(), n.clone()]);
        Ok(vec![TensorType { dtype, shape }])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
        let mut out = ctx.empty(0)?;
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let rank = out.shape.len();
        let (m, n, k) = (out.shape[rank - 2], out.shape[rank - 1], a.last());
        let lead = out.shape[..rank - 2].to_vec();
        for batch in 0..lead.iter().product::<usize>() {
            let a_at = source_index(batch, &lead, &a.shape[..a.shape.len() - 2]) * m * k;
            let b_at = source_index(batch, &lead, &b.shape[..b.shape.len() - 2]) * n * k;
            for i in 0..m {
                for j in 0..n {
                    out.data[(batch * m + i) * n + j] = (0..k)
                        .map(|l| {
                            let right = if self.transpose_b { j * k + l } else { l * n + j };
                            a.data[a_at + i * k + l] * b.data[b_at + right]
                        })
                        .sum();
                }
            }
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Accumulated)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{close, f32s, fails, ramp, run};
    use super::*;

    #[test]
    fn two_by_two_by_hand() {
        let (a, b) = (f32s(&[2, 2], &[1.0, 2.0, 3.0, 4.0]), f32s(&[2, 2], &[5.0, 6.0, 7.0, 8.0]));
        let plain = run(Matmul { transpose_b: false, out: None }, &[a.clone(), b.clone()]).remove(0);
        assert_eq!(plain.data, [19.0, 22.0, 43.0, 50.0]);
        let turned = run(Matmul { transpose_b: true, out: None }, &[a, b]).remove(0);
        assert_eq!(turned.data, [17.0, 23.0, 39.0, 53.0]);
    }

    #[test]
    fn batches_broadcast() {
        let (a, b) = (ramp(&[2, 1, 3, 4]), ramp(&[5, 4, 2]));
        let all = run(Matmul { transpose_b: false, out: None }, &[a.clone(), b.clone()]).remove(0);
        assert_eq!(all.shape, [2, 5, 3, 2]);
        for x in 0..2 {
            for y in 0..5 {
                let one = run(
                    Matmul { transpose_b: false, out: None },
                    &[f32s(&[3, 4], &a.data[x * 12..][..12]), f32s(&[4, 2], &b.data[y * 8..][..8])],
                );
                close(&all.data[(x * 5 + y) * 6..][..6], &one[0].data);
            }
        }
    }

    #[test]
    fn inner_extents_must_agree() {
        let message = fails(Matmul { transpose_b: false, out: None }, &[ramp(&[2, 3]), ramp(&[2, 3])]);
        assert!(message.contains("inner extent"), "{message}");
        assert!(
            fails(Matmul { transpose_b: false, out: Some(DType::I8) }, &[ramp(&[2, 3]), ramp(&[3, 3])])
                .contains("float")
        );
    }

    #[test]
    fn a_matrix_serves_every_batch_and_no_inner_extent_gives_zeros() {
        let (a, b) = (ramp(&[2, 3, 4]), ramp(&[5, 4]));
        let out =
            run(Matmul { transpose_b: true, out: Some(DType::BF16) }, &[a.clone(), b.clone()]).remove(0);
        assert_eq!((out.dtype, out.shape.as_slice()), (DType::BF16, [2, 3, 5].as_slice()));
        let row = |x: &Tensor, i: usize| x.data[i * 4..][..4].to_vec();
        let expected: Vec<f64> = (0..6)
            .flat_map(|i| (0..5).map(move |j| (i, j)))
            .map(|(i, j)| row(&a, i).iter().zip(row(&b, j)).map(|(x, y)| x * y).sum())
            .collect();
        close(&out.data, &expected);
        let none = run(Matmul { transpose_b: false, out: None }, &[f32s(&[2, 0], &[]), f32s(&[0, 1], &[])]);
        assert_eq!(none[0].data, [0.0; 2]);
    }

    #[test]
    fn operands_are_two_float_matrices_of_one_type() {
        let plain = Matmul { transpose_b: false, out: None };
        assert!(fails(plain.clone(), &[ramp(&[3]), ramp(&[3, 1])]).contains("two matrices"));
        assert!(fails(plain.clone(), &[ramp(&[1, 3]), ramp(&[3])]).contains("two matrices"));
        assert!(fails(plain.clone(), &[ramp(&[2, 1, 3]), ramp(&[3, 3, 1])]).contains("do not broadcast"));
        let half = Tensor::zeros(DType::F16, &[3, 1]).unwrap();
        assert!(fails(plain.clone(), &[ramp(&[1, 3]), half]).contains("element types"));
        let ints = Tensor::zeros(DType::I8, &[3, 3]).unwrap();
        assert!(fails(plain, &[ints.clone(), ints]).contains("float"));
    }
}
