//! Symbolic dimensions: integers known at run time, kept in one normal form.
//!
//! A [`Dim`] is a sum of products over symbols (`$t`) and the functions `ceildiv`, `max` and `min`. Equal
//! expressions have equal normal forms wherever only addition and multiplication are involved, so `==` is
//! the equality that type inference needs. Arithmetic saturates instead of panicking; the verifier rejects
//! dims outside `0..=MAX_EXTENT`, so a saturated value never reaches a plan.
//!
//! Monotonicity is what lets one symbolic plan serve every shape: a size that grows with each symbol has its
//! maximum at the upper bounds. [`Dim::is_monotone`] proves it from ranges.

mod symbols;

pub use symbols::{Bindings, Sym, SymDecl};

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// Largest extent or byte size the verifier accepts.
pub const MAX_EXTENT: i64 = 1 << 46;

/// Most terms a product may have; a product of more saturates.
pub const MAX_TERMS: usize = 256;

/// Largest [`Dim::size`] that texts may hold and the verifier accepts.
pub const MAX_SIZE: usize = 256;

/// Deepest [`Dim::nesting`] the verifier accepts; the parser allows some more for the lists around a dim.
pub const MAX_NESTING: usize = 24;

/// A symbolic integer in normal form.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dim(Repr);

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Repr {
    Const(i64),
    /// Sorted by factors, no zero coefficient, never a lone constant.
    Sum(Arc<Vec<Term>>),
}

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Term {
    /// Sorted; empty for the constant term.
    factors: Vec<Factor>,
    coeff: i64,
}

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Factor {
    Sym(Sym),
    /// Numerator and positive divisor.
    CeilDiv(Dim, i64),
    /// Sorted, at least two.
    Max(Vec<Dim>),
    /// Sorted, at least two.
    Min(Vec<Dim>),
}

impl From<i64> for Dim {
    fn from(value: i64) -> Self {
        Dim(Repr::Const(value))
    }
}

impl From<u64> for Dim {
    fn from(value: u64) -> Self {
        Dim(Repr::Const(i64::try_from(value).unwrap_or(i64::MAX)))
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Self {
        Dim::from(value as u64)
    }
}

impl From<Sym> for Dim {
    fn from(sym: Sym) -> Self {
        Dim::factor(Factor::Sym(sym))
    }
}

impl Dim {
    fn factor(factor: Factor) -> Self {
        Dim(Repr::Sum(Arc::new(vec![Term { factors: vec![factor], coeff: 1 }])))
    }

    fn terms(&self) -> Vec<Term> {
        match &self.0 {
            Repr::Const(0) => Vec::new(),
            Repr::Const(c) => vec![Term { factors: Vec::new(), coeff: *c }],
            Repr::Sum(terms) => terms.as_ref().clone(),
        }
    }

    fn from_terms(mut terms: Vec<Term>) -> Self {
        terms.sort();
        let mut merged: Vec<Term> = Vec::with_capacity(terms.len());
        for term in terms {
            match merged.last_mut() {
                Some(last) if last.factors == term.factors => {
                    last.coeff = last.coeff.saturating_add(term.coeff);
                }
                _ => merged.push(term),
            }
        }
        merged.retain(|t| t.coeff != 0);
        match merged.as_slice() {
            [] => Dim(Repr::Const(0)),
            [only] if only.factors.is_empty() => Dim(Repr::Const(only.coeff)),
            _ => Dim(Repr::Sum(Arc::new(merged))),
        }
    }

    /// Whether every coefficient is a multiple of `divisor`, looking into `max` and `min` where they stand alone:
    /// then so is every value.
    pub fn coefficients_divisible(&self, divisor: i64) -> bool {
        self.terms().iter().all(|term| {
            term.coeff % divisor.max(1) == 0
                || term.factors.iter().any(|factor| match factor {
                    Factor::Max(dims) | Factor::Min(dims) => {
                        dims.iter().all(|d| d.coefficients_divisible(divisor))
                    }
                    Factor::Sym(_) | Factor::CeilDiv(..) => false,
                })
        })
    }

    /// A sum of products of symbols that is at least `self` for all symbol values of 1 or more, with every
    /// coefficient rounded up to a multiple of `align`.
    #[must_use]
    pub fn linear_upper_bound(&self, align: i64) -> Dim {
        let align = align.max(1);
        let mut bound = Dim::from(0i64);
        for term in self.terms() {
            let mut product = Dim::from(1i64);
            let mut coeff = term.coeff;
            for factor in &term.factors {
                let value = match factor {
                    Factor::Sym(sym) => Dim::from(*sym),
                    // ceil(n / d) * c <= n * ceil(c / d) + c when c is no multiple of d.
                    Factor::CeilDiv(dim, divisor) if term.factors.len() == 1 && coeff % divisor == 0 => {
                        let scaled = dim.mul(&Dim::from(coeff / divisor)).add(&Dim::from(coeff));
                        coeff = 1;
                        scaled.linear_upper_bound(1)
                    }
                    Factor::CeilDiv(dim, _) => dim.linear_upper_bound(1).add(&Dim::from(1i64)),
                    Factor::Max(dims) => {
                        let bounds: Vec<Dim> = dims.iter().map(|d| d.linear_upper_bound(1)).collect();
                        Dim::coefficient_maximum(&bounds)
                    }
                    Factor::Min(dims) => dims.first().map_or(Dim::from(0i64), |d| d.linear_upper_bound(1)),
                };
                product = product.mul(&value);
            }
            bound = bound.add(&product.mul(&Dim::from(coeff.max(0))));
        }
        Dim::from_terms(
            bound
                .terms()
                .into_iter()
                .map(|t| Term {
                    coeff: Dim::from(t.coeff.max(0)).align_up(align).as_const().unwrap_or(i64::MAX),
                    ..t
                })
                .collect(),
        )
    }

    fn coefficient_maximum(dims: &[Dim]) -> Dim {
        let mut largest: Vec<Term> = Vec::new();
        for term in dims.iter().flat_map(|d| d.terms()) {
            match largest.iter_mut().find(|t| t.factors == term.factors) {
                Some(known) => known.coeff = known.coeff.max(term.coeff),
                None => largest.push(term),
            }
        }
        Dim::from_terms(largest)
    }

    /// Number of functions and of arguments to `max` and `min` in the expression, nested ones included.
    pub fn function_arguments(&self) -> usize {
        let Repr::Sum(terms) = &self.0 else { return 0 };
        terms
            .iter()
            .flat_map(|t| &t.factors)
            .map(|factor| match factor {
                Factor::Sym(_) => 0,
                Factor::CeilDiv(dim, _) => 1 + dim.function_arguments(),
                Factor::Max(dims) | Factor::Min(dims) => {
                    dims.len() + dims.iter().map(Dim::function_arguments).sum::<usize>()
                }
            })
            .sum()
    }

    /// Number of terms of the sum.
    pub fn term_count(&self) -> usize {
        match &self.0 {
            Repr::Const(_) => 1,
            Repr::Sum(terms) => terms.len(),
        }
    }

    /// Terms, factors and all that is nested in them: what printing and comparing cost.
    pub fn size(&self) -> usize {
        let Repr::Sum(terms) = &self.0 else { return 1 };
        let factor = |factor: &Factor| match factor {
            Factor::Sym(_) => 1,
            Factor::CeilDiv(dim, _) => 1 + dim.size(),
            Factor::Max(dims) | Factor::Min(dims) => 1 + dims.iter().map(Dim::size).sum::<usize>(),
        };
        terms.iter().map(|t| 1 + t.factors.iter().map(factor).sum::<usize>()).sum()
    }

    /// How deep functions stand in each other; 0 without any.
    pub fn nesting(&self) -> usize {
        let Repr::Sum(terms) = &self.0 else { return 0 };
        let factor = |factor: &Factor| match factor {
            Factor::Sym(_) => 0,
            Factor::CeilDiv(dim, _) => 1 + dim.nesting(),
            Factor::Max(dims) | Factor::Min(dims) => 1 + dims.iter().map(Dim::nesting).max().unwrap_or(0),
        };
        terms.iter().flat_map(|t| &t.factors).map(factor).max().unwrap_or(0)
    }

    /// The value if no symbol is involved.
    pub fn as_const(&self) -> Option<i64> {
        match self.0 {
            Repr::Const(c) => Some(c),
            Repr::Sum(_) => None,
        }
    }

    /// The symbol if the dim is exactly one symbol.
    pub fn as_sym(&self) -> Option<Sym> {
        match &self.0 {
            Repr::Sum(terms) => match terms.as_slice() {
                [Term { factors, coeff: 1 }] => match factors.as_slice() {
                    [Factor::Sym(sym)] => Some(*sym),
                    _ => None,
                },
                _ => None,
            },
            Repr::Const(_) => None,
        }
    }

    /// Sum.
    #[must_use]
    pub fn add(&self, other: &Dim) -> Dim {
        if let (Repr::Const(a), Repr::Const(b)) = (&self.0, &other.0) {
            return Dim(Repr::Const(a.saturating_add(*b)));
        }
        let mut terms = self.terms();
        terms.extend(other.terms());
        Dim::from_terms(terms)
    }

    /// Difference.
    #[must_use]
    pub fn sub(&self, other: &Dim) -> Dim {
        self.add(&other.mul(&Dim::from(-1i64)))
    }

    /// Whether both are one in memory, or one constant; `false` says nothing about equality.
    pub(crate) fn is_shared_with(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Repr::Const(a), Repr::Const(b)) => a == b,
            (Repr::Sum(a), Repr::Sum(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// A number that dims that are shared have in common.
    pub(crate) fn address(&self) -> u64 {
        match &self.0 {
            Repr::Const(value) => *value as u64,
            Repr::Sum(terms) => Arc::as_ptr(terms).addr() as u64,
        }
    }

    /// A number that is equal for equal dims; cheap, and different for most different ones.
    pub fn fingerprint(&self) -> u64 {
        match &self.0 {
            Repr::Const(value) => *value as u64,
            Repr::Sum(terms) => terms.iter().fold(terms.len() as u64, |acc, term| {
                let symbols = term.factors.iter().fold(term.coeff as u64, |acc, factor| match factor {
                    Factor::Sym(sym) => crate::types::mix(acc, sym.number()),
                    Factor::CeilDiv(_, by) => crate::types::mix(acc, *by as u64),
                    Factor::Max(of) | Factor::Min(of) => crate::types::mix(acc, of.len() as u64),
                });
                crate::types::mix(acc, symbols)
            }),
        }
    }

    /// Product.
    #[must_use]
    pub fn mul(&self, other: &Dim) -> Dim {
        if let (Repr::Const(a), Repr::Const(b)) = (&self.0, &other.0) {
            return Dim(Repr::Const(a.saturating_mul(*b)));
        }
        if let (Repr::Const(factor), Repr::Sum(terms)) | (Repr::Sum(terms), Repr::Const(factor)) =
            (&self.0, &other.0)
        {
            return match factor {
                0 => Dim::from(0i64),
                1 => Dim(Repr::Sum(terms.clone())),
                _ => {
                    let scaled = |t: &Term| Term {
                        factors: t.factors.clone(),
                        coeff: t.coeff.saturating_mul(*factor),
                    };
                    Dim(Repr::Sum(Arc::new(terms.iter().map(scaled).collect())))
                }
            };
        }
        let (left, right) = (self.terms(), other.terms());
        if left.len().saturating_mul(right.len()) > MAX_TERMS {
            return Dim(Repr::Const(i64::MAX));
        }
        let mut terms = Vec::with_capacity(left.len() * right.len());
        for a in &left {
            for b in &right {
                let mut factors = a.factors.clone();
                factors.extend(b.factors.iter().cloned());
                factors.sort();
                terms.push(Term { factors, coeff: a.coeff.saturating_mul(b.coeff) });
            }
        }
        Dim::from_terms(terms)
    }

    /// `ceil(self / divisor)`; `divisor` below 1 counts as 1. Terms that divide exactly leave the function.
    #[must_use]
    pub fn ceil_div(&self, divisor: i64) -> Dim {
        let divisor = divisor.max(1);
        if divisor == 1 {
            return self.clone();
        }
        if let Repr::Const(c) = self.0 {
            return Dim(Repr::Const(c.div_euclid(divisor) + i64::from(c.rem_euclid(divisor) != 0)));
        }
        let (whole, rest): (Vec<Term>, Vec<Term>) =
            self.terms().into_iter().partition(|t| t.coeff % divisor == 0);
        let whole = Dim::from_terms(
            whole.into_iter().map(|t| Term { coeff: t.coeff / divisor, ..t }).collect::<Vec<_>>(),
        );
        let rest = Dim::from_terms(rest);
        match rest.0 {
            Repr::Const(_) => whole.add(&rest.ceil_div(divisor)),
            Repr::Sum(_) => whole.add(&Dim::factor(Factor::CeilDiv(rest, divisor))),
        }
    }

    /// The smallest multiple of `align` that is at least `self`.
    #[must_use]
    pub fn align_up(&self, align: i64) -> Dim {
        self.ceil_div(align).mul(&Dim::from(align))
    }

    /// The larger of two dims; an argument that dominates coefficient by coefficient wins at once.
    #[must_use]
    pub fn max_of(&self, other: &Dim) -> Dim {
        Dim::extremum(&[self.clone(), other.clone()], true)
    }

    /// The smaller of two dims.
    #[must_use]
    pub fn min_of(&self, other: &Dim) -> Dim {
        Dim::extremum(&[self.clone(), other.clone()], false)
    }

    /// The largest of several dims; 0 of none.
    #[must_use]
    pub fn max_all(args: &[Dim]) -> Dim {
        if args.is_empty() { Dim::from(0i64) } else { Dim::extremum(args, true) }
    }

    /// The smallest of several dims; 0 of none.
    #[must_use]
    pub fn min_all(args: &[Dim]) -> Dim {
        if args.is_empty() { Dim::from(0i64) } else { Dim::extremum(args, false) }
    }

    fn extremum(args: &[Dim], largest: bool) -> Dim {
        let mut flat: Vec<Dim> = Vec::new();
        for arg in args {
            match arg.lone_factor() {
                Some(Factor::Max(inner)) if largest => flat.extend(inner.iter().cloned()),
                Some(Factor::Min(inner)) if !largest => flat.extend(inner.iter().cloned()),
                _ => flat.push(arg.clone()),
            }
        }
        flat.sort();
        flat.dedup();
        let beaten = |i: usize| {
            (0..flat.len()).any(|j| {
                j != i && if largest { flat[j].dominates(&flat[i]) } else { flat[i].dominates(&flat[j]) }
            })
        };
        let kept: Vec<Dim> = (0..flat.len()).filter(|i| !beaten(*i)).map(|i| flat[i].clone()).collect();
        match <[Dim; 1]>::try_from(kept) {
            Ok([only]) => only,
            Err(kept) if largest => Dim::factor(Factor::Max(kept)),
            Err(kept) => Dim::factor(Factor::Min(kept)),
        }
    }

    fn lone_factor(&self) -> Option<&Factor> {
        match &self.0 {
            Repr::Sum(terms) => match terms.as_slice() {
                [Term { factors, coeff: 1 }] if factors.len() == 1 => factors.first(),
                _ => None,
            },
            Repr::Const(_) => None,
        }
    }

    /// True if `self - other` has no negative coefficient, hence `self >= other` for all non-negative values
    /// of the factors.
    pub fn dominates(&self, other: &Dim) -> bool {
        self.sub(other).terms().iter().all(|t| t.coeff >= 0)
    }

    /// The value under `bindings`; `None` if a symbol is unbound or the result leaves the 64-bit range.
    pub fn eval(&self, bindings: &Bindings) -> Option<i64> {
        let terms = match &self.0 {
            Repr::Const(c) => return Some(*c),
            Repr::Sum(terms) => terms,
        };
        let mut sum = 0i64;
        for term in terms.iter() {
            let mut product = term.coeff;
            for factor in &term.factors {
                let value = match factor {
                    Factor::Sym(sym) => i64::try_from(bindings.get(*sym)?).ok()?,
                    Factor::CeilDiv(dim, divisor) => {
                        Dim::from(dim.eval(bindings)?).ceil_div(*divisor).as_const()?
                    }
                    Factor::Max(dims) => extreme(dims, bindings, Ordering::Greater)?,
                    Factor::Min(dims) => extreme(dims, bindings, Ordering::Less)?,
                };
                product = product.checked_mul(value)?;
            }
            sum = sum.checked_add(product)?;
        }
        Some(sum)
    }

    /// [`Dim::eval`] as an extent: `None` also for negative values.
    pub fn extent(&self, bindings: &Bindings) -> Option<u64> {
        self.eval(bindings).and_then(|v| u64::try_from(v).ok())
    }

    /// All symbols, in order, without repetition.
    pub fn symbols(&self) -> Vec<Sym> {
        let mut found = Vec::new();
        self.visit_symbols(&mut |sym| found.push(sym));
        found.sort();
        found.dedup();
        found
    }

    fn visit_symbols(&self, visit: &mut dyn FnMut(Sym)) {
        let Repr::Sum(terms) = &self.0 else { return };
        for factor in terms.iter().flat_map(|t| &t.factors) {
            match factor {
                Factor::Sym(sym) => visit(*sym),
                // The parser bounds the nesting, and with it this recursion.
                Factor::CeilDiv(dim, _) => dim.visit_symbols(visit),
                Factor::Max(dims) | Factor::Min(dims) => dims.iter().for_each(|d| d.visit_symbols(visit)),
            }
        }
    }

    /// True if the dim is proven to never shrink when a symbol grows within its declared range: every
    /// non-constant coefficient is positive and every factor is monotone and non-negative at the minima.
    pub fn is_monotone(&self, decls: &[SymDecl]) -> bool {
        let minima = Bindings::minima(decls);
        self.monotone_at(&minima)
    }

    fn monotone_at(&self, minima: &Bindings) -> bool {
        let Repr::Sum(terms) = &self.0 else { return true };
        terms.iter().filter(|t| !t.factors.is_empty()).all(|term| {
            term.coeff > 0
                && term.factors.iter().all(|factor| match factor {
                    Factor::Sym(_) => true,
                    Factor::CeilDiv(dim, _) => {
                        dim.monotone_at(minima) && (term.factors.len() == 1 || dim.eval(minima) >= Some(0))
                    }
                    Factor::Max(dims) | Factor::Min(dims) => {
                        dims.iter().all(|d| d.monotone_at(minima))
                            && (term.factors.len() == 1 || dims.iter().all(|d| d.eval(minima) >= Some(0)))
                    }
                })
        })
    }

    /// Replaces every `(symbol, dim)` of `with`.
    #[must_use]
    pub fn substitute(&self, with: &[(Sym, Dim)]) -> Dim {
        let Repr::Sum(terms) = &self.0 else { return self.clone() };
        let mut sum = Dim::from(0i64);
        for term in terms.iter() {
            let mut product = Dim::from(term.coeff);
            for factor in &term.factors {
                let value = match factor {
                    Factor::Sym(sym) => with
                        .iter()
                        .find(|(s, _)| s == sym)
                        .map_or_else(|| Dim::from(*sym), |(_, dim)| dim.clone()),
                    Factor::CeilDiv(dim, divisor) => dim.substitute(with).ceil_div(*divisor),
                    Factor::Max(dims) => {
                        Dim::extremum(&dims.iter().map(|d| d.substitute(with)).collect::<Vec<_>>(), true)
                    }
                    Factor::Min(dims) => {
                        Dim::extremum(&dims.iter().map(|d| d.substitute(with)).collect::<Vec<_>>(), false)
                    }
                };
                product = product.mul(&value);
            }
            sum = sum.add(&product);
        }
        sum
    }
}

fn extreme(dims: &[Dim], bindings: &Bindings, keep: Ordering) -> Option<i64> {
    let mut best: Option<i64> = None;
    for dim in dims {
        let value = dim.eval(bindings)?;
        if best.is_none_or(|b| value.cmp(&b) == keep) {
            best = Some(value);
        }
    }
    best
}

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, name: &str, dims: &[Dim]| {
            write!(f, "{name}(")?;
            for (i, dim) in dims.iter().enumerate() {
                write!(f, "{}{dim}", if i == 0 { "" } else { ", " })?;
            }
            write!(f, ")")
        };
        match self {
            Factor::Sym(sym) => write!(f, "{sym}"),
            Factor::CeilDiv(dim, divisor) => write!(f, "ceildiv({dim}, {divisor})"),
            Factor::Max(dims) => list(f, "max", dims),
            Factor::Min(dims) => list(f, "min", dims),
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = match &self.0 {
            Repr::Const(c) => return write!(f, "{c}"),
            Repr::Sum(terms) => terms,
        };
        // The constant sorts first and prints last.
        let (constant, others): (Vec<&Term>, Vec<&Term>) = terms.iter().partition(|t| t.factors.is_empty());
        for (i, term) in others.into_iter().chain(constant).enumerate() {
            match (i, term.coeff < 0) {
                (0, false) => {}
                (0, true) => write!(f, "-")?,
                (_, false) => write!(f, " + ")?,
                (_, true) => write!(f, " - ")?,
            }
            let magnitude = term.coeff.unsigned_abs();
            if term.factors.is_empty() || magnitude != 1 {
                write!(f, "{magnitude}")?;
            }
            for (j, factor) in term.factors.iter().enumerate() {
                if j > 0 || magnitude != 1 {
                    write!(f, "*")?;
                }
                write!(f, "{factor}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests;
