//! Index spaces: extents as literals or arguments, the width of indices, axes merged where memory is contiguous.
//!
//! Kernels that are written for a graph know its constant extents as literals; symbolic ones are `int` parameters
//! called `e0`, `e1`, .., one per distinct dim. In the text an extent is always an expression of the type `Index`, which
//! has 64 bits if a tensor may have 2^31 elements or more.

use millrace_ir::{Bindings, DType, Dim, Id, Module, Operand, TensorType, ValueId};

use super::plan::Argument;

/// Extents that a kernel's text mentions.
pub struct Extents<'a> {
    module: &'a Module,
    maxima: Bindings,
    dims: Vec<Dim>,
    wide: bool,
    fits: bool,
}

/// Largest extent that an argument can hold.
const MOST: i64 = i32::MAX as i64;

impl<'a> Extents<'a> {
    /// No extent yet.
    pub fn new(module: &'a Module) -> Self {
        let maxima = Bindings::maxima(&module.dims);
        Extents { module, maxima, dims: Vec::new(), wide: false, fits: true }
    }

    /// Largest value of a dim, `i64::MAX` if unknown.
    pub fn most(&self, dim: &Dim) -> i64 {
        dim.eval(&self.maxima).unwrap_or(i64::MAX)
    }

    /// Whether a dim fits an argument at every legal binding.
    pub fn argument_fits(&self, dim: &Dim) -> bool {
        self.most(dim) <= MOST
    }

    /// Makes indices wide enough for `ty`.
    pub fn covers(&mut self, ty: &TensorType) {
        // Room for the padding of the last block.
        self.wide |= self.most(&ty.elements()) > MOST - (1 << 16);
    }

    /// Makes indices wide enough for an operand.
    pub fn covers_operand(&mut self, operand: Operand) {
        let module = self.module;
        self.covers(module.operand_type(operand));
    }

    /// A dim as an expression of type `Index`.
    pub fn text(&mut self, dim: &Dim) -> String {
        if let Some(value) = dim.as_const() {
            return format!("(Index){value}");
        }
        self.fits &= self.argument_fits(dim);
        let at = self.dims.iter().position(|d| d == dim).unwrap_or_else(|| {
            self.dims.push(dim.clone());
            self.dims.len() - 1
        });
        format!("(Index)e{at}")
    }

    /// Expressions of several dims.
    pub fn texts<'d>(&mut self, dims: impl IntoIterator<Item = &'d Dim>) -> Vec<String> {
        dims.into_iter().map(|d| self.text(d)).collect()
    }

    /// `typedef .. Index;`
    pub fn index_type(&self) -> &'static str {
        if self.wide { "typedef u64 Index;" } else { "typedef u32 Index;" }
    }

    /// Parameters after others: `, int e0, int e1`.
    pub fn parameters(&self) -> String {
        (0..self.dims.len()).map(|i| format!(", int e{i}")).collect()
    }

    /// Arguments for [`Extents::parameters`]; `None` if an extent may exceed 32 bits.
    pub fn arguments(self) -> Option<Vec<Argument>> {
        self.fits.then(|| self.dims.into_iter().map(Argument::I32).collect())
    }
}

/// Product of expressions, 1 of none.
pub fn product_text(factors: &[String]) -> String {
    if factors.is_empty() { "(Index)1".to_string() } else { factors.join(" * ") }
}

/// Statements that split `index`, row-major, into coordinates called `prefix0`, `prefix1`, ..; the outermost is not
/// reduced.
pub fn split_text(index: &str, prefix: &str, extents: &[String]) -> String {
    let mut text = format!("    Index {prefix}_rest = {index};\n");
    for axis in (1..extents.len()).rev() {
        let extent = &extents[axis];
        text += &format!(
            "    const Index {prefix}{axis} = {prefix}_rest % ({extent});\n    {prefix}_rest /= {extent};\n"
        );
    }
    text + &format!("    const Index {prefix}0 = {prefix}_rest;\n")
}

/// Whether every value of `dim` is a multiple of `unit`.
pub fn divisible(dim: &Dim, unit: u64) -> bool {
    dim.coefficients_divisible(unit as i64)
}

/// The largest power of two up to `most` that divides all of `dims` at every binding.
pub fn common_unit<'d>(most: u64, dims: impl IntoIterator<Item = &'d Dim> + Clone) -> u64 {
    let mut unit = most.max(1);
    while unit > 1 && !dims.clone().into_iter().all(|d| divisible(d, unit)) {
        unit /= 2;
    }
    unit
}

/// Row-major strides.
pub fn strides(shape: &[Dim]) -> Vec<Dim> {
    let mut strides = vec![Dim::from(1u64); shape.len()];
    for axis in (0..shape.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1].mul(&shape[axis + 1]);
    }
    strides
}

/// An element type as these families spell it.
pub fn element(dtype: DType) -> &'static str {
    if dtype == DType::Bool { "truth" } else { super::source::type_name(dtype) }
}

/// Whether a result is known to have the memory of an operand.
pub fn same_memory(module: &Module, operand: Operand, result: ValueId) -> bool {
    use millrace_ir::Place;
    let place = &module.graph.values[result].place;
    match (operand, place) {
        (Operand::Value(v), Some(place)) => {
            v.index() == result.index() || module.graph.values[v].place.as_ref() == Some(place)
        }
        (Operand::State(s), Some(Place::State(t))) => s == *t,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_ir::{Builder, Sym};

    #[test]
    fn equal_dims_are_one_argument() {
        let mut b = Builder::new("m");
        let t = b.dim("t", 1, 100, None).unwrap();
        let module = b.finish();
        let mut extents = Extents::new(&module);
        let double = t.mul(&Dim::from(2u64));
        let texts = extents.texts([&t, &double, &t, &Dim::from(7u64)]);
        assert_eq!(texts, ["(Index)e0", "(Index)e1", "(Index)e0", "(Index)7"]);
        assert_eq!(extents.parameters(), ", int e0, int e1");
        assert_eq!(extents.index_type(), "typedef u32 Index;");
        assert_eq!(extents.arguments().unwrap().len(), 2);
    }

    #[test]
    fn extents_beyond_an_argument_are_refused_and_large_tensors_have_wide_indices() {
        let mut b = Builder::new("m");
        let t = b.dim("t", 1, 1 << 20, None).unwrap();
        let module = b.finish();
        let mut extents = Extents::new(&module);
        extents.covers(&TensorType::new(DType::F32, [t.clone(), Dim::from(1i64 << 12)]));
        assert_eq!(extents.index_type(), "typedef u64 Index;");
        extents.text(&t.mul(&Dim::from(1i64 << 12)));
        assert!(extents.arguments().is_none());
        let unknown = Dim::from(Sym::new("u").unwrap());
        assert!(!Extents::new(&module).argument_fits(&unknown));
    }

    #[test]
    fn units_divide_all_extents() {
        let t = Dim::from(Sym::new("t").unwrap());
        let four = t.mul(&Dim::from(4u64));
        assert_eq!(common_unit(8, [&four, &Dim::from(24u64)]), 4);
        assert_eq!(common_unit(8, [&t]), 1);
        assert_eq!(strides(&[t.clone(), Dim::from(3u64), Dim::from(5u64)])[0], Dim::from(15u64));
    }
}
