//! Strided views: how the elements of a dense result lie in an operand. Broadcasting, transposition and slicing are
//! views; a stride of 0 repeats an element.

use millrace_ir::{Error, Kind, Result};

/// Strides of a result's axes in an operand, without axes of extent 1 and with mergeable neighbours merged.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct View {
    /// Extents, outermost first.
    pub extents: Vec<usize>,
    /// Distance in the operand of neighbours along each axis.
    pub strides: Vec<usize>,
}

/// The error of an operand that does not fit its shape.
pub(crate) fn misfit(what: &str) -> Error {
    Error::new(Kind::Internal, "run/no-kernel", format!("{what} does not have the size of its shape"))
}

/// Number of elements of a shape.
///
/// # Errors
/// `run/no-kernel` beyond the address space.
pub fn elements(shape: &[usize]) -> Result<usize> {
    if shape.contains(&0) {
        return Ok(0);
    }
    shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(|| misfit("a tensor"))
}

/// Row-major strides of a shape whose elements can be counted; all 0 if there are none.
pub fn dense_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; shape.len()];
    if !shape.contains(&0) {
        let mut stride = 1;
        for axis in (0..shape.len()).rev() {
            strides[axis] = stride;
            stride *= shape[axis];
        }
    }
    strides
}

impl View {
    /// A view of `extents` with a stride for each.
    pub fn new(extents: &[usize], strides: &[usize]) -> View {
        let mut view = View::default();
        for (n, stride) in extents.iter().zip(strides) {
            match (view.extents.last_mut(), view.strides.last_mut()) {
                _ if *n == 1 => {}
                (Some(extent), Some(outer)) if Some(*outer) == stride.checked_mul(*n) => {
                    *extent *= n;
                    *outer = *stride;
                }
                _ => {
                    view.extents.push(*n);
                    view.strides.push(*stride);
                }
            }
        }
        view
    }

    /// How a dense operand of shape `from` repeats to `shape` by numpy's rule; `None` if it does not.
    pub fn broadcast(shape: &[usize], from: &[usize]) -> Option<View> {
        let missing = shape.len().checked_sub(from.len())?;
        let mut strides = vec![0; shape.len()];
        for (axis, stride) in dense_strides(from).into_iter().enumerate() {
            match from[axis] {
                1 => {}
                n if n == shape[missing + axis] => strides[missing + axis] = stride,
                _ => return None,
            }
        }
        Some(View::new(shape, &strides))
    }

    /// Elements of the result.
    pub fn len(&self) -> usize {
        if self.extents.contains(&0) { 0 } else { self.extents.iter().product() }
    }

    /// Whether the result has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether result and operand have the same order without gaps.
    pub fn is_dense(&self) -> bool {
        matches!(self.strides.as_slice(), [] | [1])
    }

    /// Elements an operand must have for every element of the result to exist.
    pub fn reach(&self) -> usize {
        if self.is_empty() {
            return 0;
        }
        let last = self.extents.iter().zip(&self.strides).map(|(n, s)| (n - 1).saturating_mul(*s));
        last.fold(1, usize::saturating_add)
    }

    /// The place of result element `start`.
    pub fn cursor(&self, start: usize) -> Cursor<'_> {
        let mut index = vec![0; self.extents.len()];
        let (mut rest, mut offset) = (start, 0);
        for axis in (0..index.len()).rev() {
            let n = self.extents[axis].max(1);
            index[axis] = rest % n;
            offset += index[axis] * self.strides[axis];
            rest /= n;
        }
        Cursor { view: self, index, offset }
    }
}

/// A place in a view that moves forward.
pub struct Cursor<'a> {
    view: &'a View,
    index: Vec<usize>,
    offset: usize,
}

impl Cursor<'_> {
    /// The element's place in the operand.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Steps along `axis`, then carries outwards.
    pub fn step(&mut self, axis: usize, by: usize) {
        let View { extents, strides } = self.view;
        self.index[axis] += by;
        self.offset += by * strides[axis];
        for axis in (0..=axis).rev() {
            if self.index[axis] < extents[axis] {
                return;
            }
            self.offset -= self.index[axis] * strides[axis];
            self.index[axis] = 0;
            if axis > 0 {
                self.index[axis - 1] += 1;
                self.offset += strides[axis - 1];
            }
        }
    }

    /// Copies the next elements of the result into `out` and moves behind them.
    pub fn load<E: Copy>(&mut self, x: &[E], mut out: &mut [E]) {
        let Some(last) = self.index.len().checked_sub(1) else {
            out.fill(x[0]);
            return;
        };
        let (n, stride) = (self.view.extents[last], self.view.strides[last]);
        while !out.is_empty() {
            let run = out.len().min(n - self.index[last]);
            let (part, rest) = out.split_at_mut(run);
            match stride {
                1 => part.copy_from_slice(&x[self.offset..self.offset + run]),
                0 => part.fill(x[self.offset]),
                _ => part.iter_mut().zip(x[self.offset..].iter().step_by(stride)).for_each(|(o, v)| *o = *v),
            }
            self.step(last, run);
            out = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_merge_and_ones_vanish() {
        assert_eq!(View::new(&[2, 1, 3, 4], &[12, 7, 4, 1]), View { extents: vec![24], strides: vec![1] });
        assert_eq!(View::broadcast(&[2, 3, 4], &[4]).unwrap().extents, [6, 4]);
        assert_eq!(View::broadcast(&[2, 3, 4], &[3, 1]).unwrap().strides, [0, 1, 0]);
        assert!(View::broadcast(&[2, 3], &[2]).is_none() && View::broadcast(&[3], &[1, 3]).is_none());
        assert!(View::broadcast(&[2, 3, 4], &[2, 3, 4]).unwrap().is_dense());
        assert_eq!(View::broadcast(&[2, 0], &[1]).unwrap().reach(), 0);
    }

    proptest! {
        /// Every element, loaded in pieces of any size from any start.
        #[test]
        fn cursors_visit_in_order(
            axes in proptest::collection::vec((1usize..4, 0usize..5), 0..4),
            start in 0usize..80, piece in 1usize..9,
        ) {
            let (extents, strides): (Vec<_>, Vec<_>) = axes.into_iter().unzip();
            let view = View::new(&extents, &strides);
            let total: usize = extents.iter().product();
            let dense = dense_strides(&extents);
            let place = |at: usize| -> usize {
                (0..extents.len()).map(|a| at / dense[a] % extents[a] * strides[a]).sum()
            };
            let x: Vec<usize> = (0..view.reach()).collect();
            let start = start % total;
            let mut cursor = view.cursor(start);
            let mut at = start;
            while at < total {
                let mut out = vec![usize::MAX; piece.min(total - at)];
                cursor.load(&x, &mut out);
                for o in out {
                    prop_assert_eq!(o, place(at));
                    at += 1;
                }
            }
        }
    }
}
