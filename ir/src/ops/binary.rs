//! Elementwise functions of two tensors with broadcasting: `%2 = add %0, %1`.

use super::broadcasting::{broadcast_shapes, source_index};
use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_float, need_same_dtype};
use crate::attr::{AttrReader, Attrs};
use crate::dtype::DType;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// A function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BinaryFn {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`, floats only.
    Div,
    /// The larger.
    Max,
    /// The smaller.
    Min,
    /// `a ^ b`, floats only.
    Pow,
    /// `a < b`
    Lt,
    /// `a <= b`
    Le,
    /// `a > b`
    Gt,
    /// `a >= b`
    Ge,
    /// `a = b`
    Eq,
    /// `a != b`
    Ne,
}

impl BinaryFn {
    /// All functions, in the order of [`Binary::NAMES`].
    pub const ALL: [BinaryFn; 13] = [
        BinaryFn::Add,
        BinaryFn::Sub,
        BinaryFn::Mul,
        BinaryFn::Div,
        BinaryFn::Max,
        BinaryFn::Min,
        BinaryFn::Pow,
        BinaryFn::Lt,
        BinaryFn::Le,
        BinaryFn::Gt,
        BinaryFn::Ge,
        BinaryFn::Eq,
        BinaryFn::Ne,
    ];

    /// The function spelled `name`.
    pub fn parse(name: &str) -> Option<Self> {
        let index = Binary::NAMES.iter().position(|n| *n == name)?;
        Some(Self::ALL[index])
    }

    /// Its spelling.
    pub fn name(self) -> &'static str {
        Binary::NAMES[self as usize]
    }

    /// The value at `(a, b)`; comparisons give 1 or 0.
    pub fn apply(self, a: f64, b: f64) -> f64 {
        let truth = |t: bool| f64::from(u8::from(t));
        match self {
            BinaryFn::Add => a + b,
            BinaryFn::Sub => a - b,
            BinaryFn::Mul => a * b,
            BinaryFn::Div => a / b,
            BinaryFn::Max => a.max(b),
            BinaryFn::Min => a.min(b),
            BinaryFn::Pow => a.powf(b),
            BinaryFn::Lt => truth(a < b),
            BinaryFn::Le => truth(a <= b),
            BinaryFn::Gt => truth(a > b),
            BinaryFn::Ge => truth(a >= b),
            BinaryFn::Eq => truth(a == b),
            BinaryFn::Ne => truth(a != b),
        }
    }

    /// Whether the operands may be swapped.
    pub fn commutative(self) -> bool {
        matches!(
            self,
            BinaryFn::Add | BinaryFn::Mul | BinaryFn::Max | BinaryFn::Min | BinaryFn::Eq | BinaryFn::Ne
        )
    }

    /// Whether the result is a truth value.
    pub fn compares(self) -> bool {
        self >= BinaryFn::Lt
    }
}

/// Elementwise function of two tensors of one element type, broadcast to a common shape. Comparisons give `bool`.
#[derive(Clone, Debug, PartialEq)]
pub struct Binary {
    /// Which function.
    pub function: BinaryFn,
}

impl OpDef for Binary {
    const NAMES: &'static [&'static str] =
        &["add", "sub", "mul", "div", "max", "min", "pow", "lt", "le", "gt", "ge", "eq", "ne"];

    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn attrs(&self) -> Attrs {
        Attrs::default()
    }

    fn from_attrs(name: &str, _: &mut AttrReader<'_>) -> Result<Self, String> {
        let function = BinaryFn::parse(name).ok_or_else(|| format!("`{name}` is no binary function"))?;
        Ok(Binary { function })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [a, b] = ctx.exactly()?;
        need_same_dtype(a, b)?;
        if matches!(self.function, BinaryFn::Div | BinaryFn::Pow) {
            need_float("operand 0", a)?;
        }
        let dtype = if self.function.compares() { DType::Bool } else { a.dtype };
        if a.dtype == DType::Bool && !self.function.compares() {
            return Err("truth values have no arithmetic".into());
        }
        Ok(vec![TensorType { dtype, shape: broadcast_shapes(&a.shape, &b.shape)? }])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
        let mut out = ctx.empty(0)?;
        let shape = out.shape.clone();
        for (at, v) in out.data.iter_mut().enumerate() {
            let (x, y) = (source_index(at, &shape, &a.shape), source_index(at, &shape, &b.shape));
            *v = self.function.apply(a.data[x], b.data[y]);
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        let numerics = match self.function {
            BinaryFn::Pow => Numerics::Accumulated,
            BinaryFn::Add | BinaryFn::Sub | BinaryFn::Mul | BinaryFn::Div => Numerics::Rounded,
            _ => Numerics::Exact,
        };
        OpTraits {
            elementwise: true,
            commutative: self.function.commutative(),
            in_place: if self.function.compares() { None } else { Some(0) },
            ..OpTraits::plain(numerics)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{f32s, fails, i32s, run};
    use super::*;

    #[test]
    fn broadcasts_like_an_outer_product() {
        let column = f32s(&[2, 1], &[1.0, 2.0]);
        let row = f32s(&[3], &[10.0, 20.0, 30.0]);
        for function in BinaryFn::ALL {
            let out = run(Binary { function }, &[column.clone(), row.clone()]).remove(0);
            let expected: Vec<f64> =
                [1.0, 2.0].iter().flat_map(|a| [10.0, 20.0, 30.0].map(|b| function.apply(*a, b))).collect();
            assert_eq!(out.shape, [2, 3]);
            assert_eq!(out.data, expected, "{}", function.name());
            assert_eq!(out.dtype == DType::Bool, function.compares());
        }
    }

    #[test]
    fn functions_have_their_values() {
        let at = |f: BinaryFn| f.apply(2.0, 3.0);
        let found: Vec<f64> = BinaryFn::ALL.into_iter().map(at).collect();
        assert_eq!(found, [5.0, -1.0, 6.0, 2.0 / 3.0, 3.0, 2.0, 8.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn shapes_and_types_must_agree() {
        let add = Binary { function: BinaryFn::Add };
        assert!(
            fails(add.clone(), &[f32s(&[2], &[0.0; 2]), f32s(&[3], &[0.0; 3])]).contains("do not broadcast")
        );
        let ints = Tensor::zeros(DType::I32, &[2]).unwrap();
        assert!(fails(add, &[f32s(&[2], &[0.0; 2]), ints.clone()]).contains("element types differ"));
        assert!(fails(Binary { function: BinaryFn::Div }, &[ints.clone(), ints]).contains("float"));
    }

    #[test]
    fn integers_have_exact_arithmetic_and_truth_values_none() {
        let (a, b) = (i32s(&[3], &[7.0, -8.0, 5.0]), i32s(&[1], &[5.0]));
        let of = |function| run(Binary { function }, &[a.clone(), b.clone()]).remove(0);
        assert_eq!((of(BinaryFn::Sub).dtype, of(BinaryFn::Sub).data), (DType::I32, vec![2.0, -13.0, 0.0]));
        assert_eq!(of(BinaryFn::Max).data, [7.0, 5.0, 5.0]);
        assert_eq!((of(BinaryFn::Ge).dtype, of(BinaryFn::Ge).data), (DType::Bool, vec![1.0, 0.0, 1.0]));
        let truth = Tensor::zeros(DType::Bool, &[2]).unwrap();
        assert_eq!(run(Binary { function: BinaryFn::Eq }, &[truth.clone(), truth.clone()])[0].data, [1.0; 2]);
        let add = Binary { function: BinaryFn::Add };
        assert!(fails(add.clone(), &[truth.clone(), truth]).contains("arithmetic"));
        assert!(fails(add, &[a]).contains("takes 2 operands"));
    }

    /// Swapping the operands changes nothing exactly where the flag says so.
    #[test]
    fn the_commutative_flag_is_true() {
        for function in BinaryFn::ALL {
            let pairs = [(1.0, 2.0), (3.0, -2.0), (2.0, 2.0), (0.5, 4.0)];
            let same = pairs.iter().all(|(a, b)| function.apply(*a, *b) == function.apply(*b, *a));
            assert_eq!(same, Binary { function }.traits().commutative, "{}", function.name());
        }
    }
}
