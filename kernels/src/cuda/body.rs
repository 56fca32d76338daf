//! Text of a region's steps: straight-line CUDA that computes one element of every result.
//!
//! Numbers are `float` where every operand is a float or a truth value, as on the host. As soon as an integer takes part
//! in arithmetic the step is computed in `double`, which gives what the reference evaluator gives.

use std::fmt::Write;

use millrace_ir::DType;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::pointwise::{Source, Step};
use millrace_ir::ops::unary::UnaryFn;

use super::source::float;
use super::space::element;

/// What a step's variable holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// A `float`.
    Float,
    /// A `float` that holds an 8-bit integer: exact itself, but arithmetic with it needs `double`.
    Whole,
    /// A `double`.
    Double,
}

#[derive(Clone, Debug)]
enum Term {
    Const(f64),
    Var(String, Class),
}

impl Term {
    fn whole(&self) -> bool {
        matches!(self, Term::Var(_, Class::Whole | Class::Double))
    }

    fn float(&self) -> String {
        match self {
            Term::Const(c) => float(*c as f32),
            Term::Var(name, Class::Double) => format!("(float){name}"),
            Term::Var(name, _) => name.clone(),
        }
    }

    fn double(&self) -> String {
        match self {
            Term::Const(c) => format!("__longlong_as_double(0x{:016x}ll)", c.to_bits()),
            Term::Var(name, Class::Double) => name.clone(),
            Term::Var(name, _) => format!("(double){name}"),
        }
    }

    fn native(&self) -> String {
        match self {
            Term::Const(_) => self.double(),
            Term::Var(name, _) => name.clone(),
        }
    }

    fn truth(&self) -> String {
        match self {
            Term::Const(c) => format!("{}", *c != 0.0),
            Term::Var(name, Class::Double) => format!("{name} != 0.0"),
            Term::Var(name, _) => format!("{name} != 0.0f"),
        }
    }
}

/// Writes the body of a function whose parameters are the elements `x0`, `x1`, .. of `operands` and the references
/// `y0`, `y1`, .. to elements of `results`. `None` for element types smaller than a byte.
pub fn write(body: &[Step], out: &[Source], operands: &[DType], results: &[DType]) -> Option<String> {
    if operands.iter().chain(results).any(|d| d.size_bytes().is_none()) {
        return None;
    }
    let mut text = String::new();
    let mut inputs = Vec::new();
    for (i, dtype) in operands.iter().enumerate() {
        let (kind, class) = match dtype {
            DType::I32 | DType::I64 => ("double", Class::Double),
            DType::I8 | DType::U8 => ("float", Class::Whole),
            _ => ("float", Class::Float),
        };
        let _ = writeln!(text, "    const {kind} n{i} = number(x{i});");
        inputs.push(Term::Var(format!("n{i}"), class));
    }
    let mut steps: Vec<Term> = Vec::new();
    for (t, step) in body.iter().enumerate() {
        let term = |source: &Source| match source {
            Source::Input(i) => inputs.get(*i).cloned(),
            Source::Step(t) => steps.get(*t).cloned(),
            Source::Const(c) => Some(Term::Const(*c)),
        };
        let (class, value) = match step {
            Step::Unary(f, a) => unary(*f, &term(a)?),
            Step::Binary(f, a, b) => binary(*f, &term(a)?, &term(b)?),
            Step::Select(c, a, b) => select(&term(c)?, &term(a)?, &term(b)?),
            Step::Cast(dtype, a) => cast(*dtype, &term(a)?),
            // Rows are reduced by kernels of their own.
            Step::Reduce(..) => return None,
        };
        let kind = if class == Class::Double { "double" } else { "float" };
        let _ = writeln!(text, "    const {kind} t{t} = {value};");
        steps.push(Term::Var(format!("t{t}"), class));
    }
    for (i, (source, dtype)) in out.iter().zip(results).enumerate() {
        let term = match source {
            Source::Input(i) => inputs.get(*i).cloned()?,
            Source::Step(t) => steps.get(*t).cloned()?,
            Source::Const(c) => Term::Const(*c),
        };
        let _ = writeln!(text, "    y{i} = Narrow<{}>::of({});", element(*dtype), term.native());
    }
    Some(text)
}

fn unary(f: UnaryFn, a: &Term) -> (Class, String) {
    if let Term::Const(c) = a {
        let value = Term::Const(f.apply(*c));
        return (Class::Float, value.float());
    }
    let class = if a.whole() { Class::Double } else { Class::Float };
    let a = if a.whole() { a.double() } else { a.float() };
    (class, format!("fn_{}({a})", f.name()))
}

fn binary(f: BinaryFn, a: &Term, b: &Term) -> (Class, String) {
    let double = a.whole() || b.whole();
    let (a, b) = if double { (a.double(), b.double()) } else { (a.float(), b.float()) };
    let infix = |sign: &str| format!("{a} {sign} {b}");
    let truth = |sign: &str| format!("{a} {sign} {b} ? 1.0f : 0.0f");
    let value = match f {
        BinaryFn::Add => infix("+"),
        BinaryFn::Sub => infix("-"),
        BinaryFn::Mul => infix("*"),
        BinaryFn::Div => infix("/"),
        BinaryFn::Max | BinaryFn::Min | BinaryFn::Pow => format!("fn_{}({a}, {b})", f.name()),
        BinaryFn::Lt => truth("<"),
        BinaryFn::Le => truth("<="),
        BinaryFn::Gt => truth(">"),
        BinaryFn::Ge => truth(">="),
        BinaryFn::Eq => truth("=="),
        BinaryFn::Ne => truth("!="),
    };
    (if double && !f.compares() { Class::Double } else { Class::Float }, value)
}

fn select(c: &Term, a: &Term, b: &Term) -> (Class, String) {
    let class = |term: &Term| match term {
        Term::Const(_) => None,
        Term::Var(_, class) => Some(*class),
    };
    let class = match (class(a), class(b)) {
        (Some(Class::Double), _) | (_, Some(Class::Double)) => Class::Double,
        (Some(a), Some(b)) if a == b => a,
        (Some(Class::Whole), None) | (None, Some(Class::Whole)) => Class::Double,
        _ => Class::Float,
    };
    let text = |term: &Term| if class == Class::Double { term.double() } else { term.float() };
    (class, format!("{} ? {} : {}", c.truth(), text(a), text(b)))
}

fn cast(to: DType, a: &Term) -> (Class, String) {
    let class = match to {
        DType::I32 | DType::I64 => Class::Double,
        DType::I8 | DType::U8 | DType::I4 => Class::Whole,
        _ => Class::Float,
    };
    let value = match to {
        DType::F32 => a.float(),
        DType::I64 => format!("trunc({})", a.double()),
        DType::I4 => format!("(float)max(-8, min(7, (int)Narrow<i8>::of({})))", a.native()),
        other => format!("number(Narrow<{}>::of({}))", element(other), a.native()),
    };
    (class, value)
}

/// Whether approximations of about 2^-20 vanish in the rounding of every result.
pub fn approximate(results: &[DType]) -> bool {
    results.iter().all(|d| d.is_float() && *d != DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_stay_in_float_and_integers_go_through_double() {
        let body = [
            Step::Unary(UnaryFn::Silu, Source::Input(0)),
            Step::Binary(BinaryFn::Mul, Source::Step(0), Source::Input(1)),
        ];
        let text = write(&body, &[Source::Step(1)], &[DType::BF16; 2], &[DType::BF16]).unwrap();
        assert!(text.contains("const float t1 = t0 * n1;"), "{text}");
        assert!(!text.contains("double"), "{text}");
        let body = [Step::Binary(BinaryFn::Add, Source::Input(0), Source::Const(1.0))];
        let text = write(&body, &[Source::Step(0)], &[DType::I64], &[DType::I64]).unwrap();
        assert!(
            text.contains("const double t0 = n0 + __longlong_as_double(0x3ff0000000000000ll);"),
            "{text}"
        );
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        assert!(write(&[], &[Source::Step(0)], &[], &[DType::F32]).is_none());
        assert!(write(&[], &[Source::Input(0)], &[DType::I4], &[DType::I4]).is_none());
    }
}
