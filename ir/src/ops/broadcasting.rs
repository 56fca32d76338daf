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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Sym;

    #[test]
    fn symbols_broadcast_only_with_themselves_and_one() {
        let (t, b, one) =
            (Dim::from(Sym::new("t").unwrap()), Dim::from(Sym::new("b").unwrap()), Dim::from(1i64));
        let shape = |dims: &[&Dim]| dims.iter().map(|d| (*d).clone()).collect::<Shape>();
        assert_eq!(broadcast_shapes(&shape(&[&t, &one]), &shape(&[&b])), Ok(shape(&[&t, &b])));
        assert_eq!(broadcast_shapes(&shape(&[&one]), &shape(&[&one])), Ok(shape(&[&one])));
        assert_eq!(broadcast_shapes(&[], &shape(&[&t])), Ok(shape(&[&t])));
        assert!(broadcast_shapes(&shape(&[&t]), &shape(&[&b])).unwrap_err().contains("$t and $b"));
        assert!(broadcast_shapes(&shape(&[&t]), &[Dim::from(2i64)]).is_err());
    }

    /// Nested loops over coordinates instead of division.
    #[test]
    fn sources_follow_coordinates() {
        let shape = [2, 3, 4];
        let index = |c: [usize; 3]| (c[0] * 3 + c[1]) * 4 + c[2];
        for c in (0..2).flat_map(|i| (0..3).flat_map(move |j| (0..4).map(move |k| [i, j, k]))) {
            let at = index(c);
            assert_eq!(source_index(at, &shape, &shape), at);
            assert_eq!(source_index(at, &shape, &[]), 0);
            assert_eq!(source_index(at, &shape, &[4]), c[2]);
            assert_eq!(source_index(at, &shape, &[3, 1]), c[1]);
            assert_eq!(source_index(at, &shape, &[2, 1, 4]), c[0] * 4 + c[2]);
            assert_eq!(source_index(at, &shape, &[2, 1, 1]), c[0]);
        }
    }
}
