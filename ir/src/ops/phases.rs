//! In which order a pointwise region is computed over a row: what is known once per row, what must be complete before
//! what, and what has to be kept in between.

use super::pointwise::{Pointwise, Source, Step};

/// Order of a region's steps over one row. Phase 0 visits the row once; each later phase visits it again with the
/// reductions of the phases before complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phases {
    /// For each input, whether it has one value per row.
    pub inputs: Vec<bool>,
    /// For each step, whether it has one value per row.
    pub per_row: Vec<bool>,
    /// For each step, the first phase in which its value is known. A reduction reads its source one phase earlier.
    pub phase: Vec<usize>,
    /// For each step with a value per element, whether a later phase reads it or the last one stores it: it is kept
    /// for a whole row, or computed again.
    pub kept: Vec<bool>,
    /// Number of phases, at least 1. Results of the region's shape are stored in the last one.
    pub count: usize,
}

impl Phases {
    /// Whether a source has one value per row.
    pub fn is_per_row(&self, source: &Source) -> bool {
        match source {
            Source::Input(i) => self.inputs[*i],
            Source::Step(t) => self.per_row[*t],
            Source::Const(_) => true,
        }
    }

    /// The first phase in which a source is known.
    pub fn of(&self, source: &Source) -> usize {
        match source {
            Source::Step(t) => self.phase[*t],
            Source::Input(_) | Source::Const(_) => 0,
        }
    }

    /// Values per element that a row needs at hand between its phases: kept steps and inputs of the row's length.
    pub fn row_values(&self) -> usize {
        let kept = self.kept.iter().filter(|k| **k).count();
        kept + self.inputs.iter().filter(|per_row| !**per_row).count()
    }
}

impl Pointwise {
    /// The phases of a region whose inputs have one value per row where `inputs` says so. Every source must exist.
    pub fn phases(&self, inputs: &[bool]) -> Phases {
        let mut phases = Phases {
            inputs: inputs.to_vec(),
            per_row: Vec::with_capacity(self.body.len()),
            phase: Vec::with_capacity(self.body.len()),
            kept: vec![false; self.body.len()],
            count: 1,
        };
        for step in &self.body {
            let sources = step.sources();
            let after = sources.iter().map(|s| phases.of(s)).max().unwrap_or(0);
            let reduces = matches!(step, Step::Reduce(..));
            let per_row = reduces || sources.iter().all(|s| phases.is_per_row(s));
            phases.per_row.push(per_row);
            phases.phase.push(after + usize::from(reduces));
            phases.count = phases.count.max(after + usize::from(reduces) + 1);
        }
        let mut keep = |source: &Source, read_in: usize| {
            if let Source::Step(t) = source
                && !phases.per_row[*t]
                && phases.phase[*t] < read_in
            {
                phases.kept[*t] = true;
            }
        };
        for (t, step) in self.body.iter().enumerate() {
            let read_in = phases.phase[t] - usize::from(matches!(step, Step::Reduce(..)));
            step.sources().iter().for_each(|s| keep(s, read_in));
        }
        self.out.iter().filter(|o| !o.per_row).for_each(|o| keep(&o.source, phases.count - 1));
        phases
    }
}

#[cfg(test)]
mod tests {
    use super::super::binary::BinaryFn;
    use super::super::pointwise::Out;
    use super::super::reduce::ReduceFn;
    use super::super::unary::UnaryFn;
    use super::*;
    use crate::dtype::DType;

    /// `e = exp(x - max x); e / sum e`, and the sum.
    #[test]
    fn softmax_has_three_phases() {
        let (i, t) = (Source::Input, Source::Step);
        let region = Pointwise {
            body: vec![
                Step::Reduce(ReduceFn::Max, i(0)),
                Step::Binary(BinaryFn::Sub, i(0), t(0)),
                Step::Unary(UnaryFn::Exp, t(1)),
                Step::Reduce(ReduceFn::Sum, t(2)),
                Step::Unary(UnaryFn::Recip, t(3)),
                Step::Binary(BinaryFn::Mul, t(2), t(4)),
            ]
            .into(),
            out: vec![Out::full(t(5)), Out::row(t(3))].into(),
            dtypes: vec![DType::F32; 2].into(),
        };
        let phases = region.phases(&[false]);
        assert_eq!(phases.per_row, [true, false, false, true, true, false]);
        assert_eq!(phases.phase, [1, 1, 1, 2, 2, 2]);
        assert_eq!(phases.kept, [false, false, true, false, false, false]);
        assert_eq!((phases.count, phases.row_values()), (3, 2));
    }

    #[test]
    fn elementwise_regions_have_one_phase_and_keep_nothing() {
        let body =
            vec![Step::Unary(UnaryFn::Exp, Source::Input(0)), Step::Unary(UnaryFn::Neg, Source::Input(1))];
        let out = vec![Source::Step(0), Source::Step(1)];
        let phases = Pointwise::elementwise(body, out, vec![DType::F32; 2]).phases(&[false, true]);
        assert_eq!((phases.count, phases.kept), (1, vec![false, false]));
        assert_eq!(phases.per_row, [false, true]);
    }
}
