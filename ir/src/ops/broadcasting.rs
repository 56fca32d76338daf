//! Numpy broadcasting: shapes align at the right; an extent of 1 or a missing one repeats.

use crate::dim::Dim;
use crate::types::Shape;

/// The common shape of two operands.
pub fn broadcast_shapes(a: &[Dim], b: &[Dim]) -> Result<Shape, String> {
    let one = Dim::from(1i64);
    let rank = a.len().max(b.len());
    (0..rank)
        .map(|axis| {
            let x = (axis + a.len()).checked_sub(rank).map_or(&one, |i| &a[i]);
            let y = (axis + b.len()).checked_sub(rank).map_or(&one, |i| &b[i]);
            match (x == y, x == &one, y == &one) {
                (true, _, _) | (_, false, true) => Ok(x.clone()),
                (_, true, _) => Ok(y.clone()),
                _ => Err(format!("extents {x} and {y} do not broadcast")),
            }
        })
        .collect()
}

/// Where element `at` of a tensor of `shape` comes from in an operand of shape `from` that broadcasts to it.
pub fn source_index(at: usize, shape: &[usize], from: &[usize]) -> usize {
    let (mut rest, mut index, mut stride) = (at, 0, 1);
    for axis in (0..shape.len()).rev() {
        let coordinate = rest % shape[axis].max(1);
        rest /= shape[axis].max(1);
        if let Some(i) = (axis + from.len()).checked_sub(shape.len()) {
            if from[i] != 1 {
                index += coordinate * stride;
            }
            stride *= from[i];
        }
    }
    index
}
