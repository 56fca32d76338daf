//! Text of a region's steps: straight-line CUDA that computes one element of every result.
//!
//! Numbers are `float` where every operand is a float or a truth value, as on the host. As soon as an integer takes part
//! in arithmetic the step is computed in `double`, which gives what the reference evaluator gives.

use std::fmt::Write;

use millrace_ir::DType;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::phases::Phases;
use millrace_ir::ops::pointwise::{Pointwise, Source, Step};
use millrace_ir::ops::reduce::ReduceFn;
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

/// The number an element `x` of an operand becomes: its C++ type, and what it holds.
fn number(dtype: DType) -> (&'static str, Class) {
    match dtype {
        DType::I32 | DType::I64 => ("double", Class::Double),
        DType::I8 | DType::U8 => ("float", Class::Whole),
        _ => ("float", Class::Float),
    }
}

/// The C++ type of a number.
fn kind(class: Class) -> &'static str {
    if class == Class::Double { "double" } else { "float" }
}

/// What a step other than a reduction computes.
fn step_value<'a>(step: &Step, term: impl Fn(&Source) -> Option<&'a Term>) -> Option<(Class, String)> {
    Some(match step {
        Step::Unary(f, a) => unary(*f, term(a)?),
        Step::Binary(f, a, b) => binary(*f, term(a)?, term(b)?),
        Step::Select(c, a, b) => select(term(c)?, term(a)?, term(b)?),
        Step::Cast(dtype, a) => cast(*dtype, term(a)?),
        Step::Reduce(..) => return None,
    })
}

/// The terms of a body's sources.
#[derive(Default)]
struct Terms {
    inputs: Vec<Term>,
    steps: Vec<Term>,
    consts: Vec<(f64, Term)>,
}

impl Terms {
    fn get(&self, source: &Source) -> Option<&Term> {
        match source {
            Source::Input(i) => self.inputs.get(*i),
            Source::Step(t) => self.steps.get(*t),
            Source::Const(c) => self.consts.iter().find(|(v, _)| v.to_bits() == c.to_bits()).map(|(_, t)| t),
        }
    }

    /// Makes terms of the numbers that steps and results read.
    fn name_consts<'s>(&mut self, sources: impl Iterator<Item = &'s Source>) {
        let consts = sources.filter_map(|s| if let Source::Const(c) = s { Some(*c) } else { None });
        self.consts = consts.map(|c| (c, Term::Const(c))).collect();
    }
}

fn all_sources(body: &[Step], out: impl Iterator<Item = Source>) -> Vec<Source> {
    body.iter().flat_map(Step::sources).chain(out).collect()
}

/// Writes the body of a function whose parameters are the elements `x0`, `x1`, .. of `operands` and the references
/// `y0`, `y1`, .. to elements of `results`. `None` for element types smaller than a byte and for reductions.
pub fn write(body: &[Step], out: &[Source], operands: &[DType], results: &[DType]) -> Option<String> {
    if operands.iter().chain(results).any(|d| d.size_bytes().is_none()) {
        return None;
    }
    let mut text = String::new();
    let mut terms = Terms::default();
    terms.name_consts(all_sources(body, out.iter().copied()).iter());
    for (i, dtype) in operands.iter().enumerate() {
        let (kind, class) = number(*dtype);
        let _ = writeln!(text, "    const {kind} n{i} = number(x{i});");
        terms.inputs.push(Term::Var(format!("n{i}"), class));
    }
    for (t, step) in body.iter().enumerate() {
        let (class, value) = step_value(step, |source| terms.get(source))?;
        let _ = writeln!(text, "    const {} t{t} = {value};", kind(class));
        terms.steps.push(Term::Var(format!("t{t}"), class));
    }
    for (i, (source, dtype)) in out.iter().zip(results).enumerate() {
        let value = terms.get(source)?.native();
        let _ = writeln!(text, "    y{i} = Narrow<{}>::of({value});", element(*dtype));
    }
    Some(text)
}

/// Writes a region with rows as statements that visit one row once for each of its phases. Elements of a step are
/// computed again in every phase that needs them. The statements know `a0`, .. and `r0`, .., the beginnings of the
/// row in operands and results, `lane` of `LANES`, `columns`, and `over_row`. `None` for element types smaller than a byte.
pub fn write_rows(region: &Pointwise, phases: &Phases, operands: &[DType]) -> Option<String> {
    let results = &region.dtypes;
    if operands.iter().chain(results).any(|d| d.size_bytes().is_none()) {
        return None;
    }
    let (body, mut text) = (&region.body, String::new());
    let mut terms = Terms::default();
    terms.name_consts(all_sources(body, region.out.iter().map(|o| o.source)).iter());
    for (i, dtype) in operands.iter().enumerate() {
        let (kind, class) = number(*dtype);
        if phases.inputs[i] {
            let _ = writeln!(text, "    const {kind} n{i} = number(a{i}[0]);");
        }
        terms.inputs.push(Term::Var(format!("n{i}"), class));
    }
    // Classes follow from sources alone, so every step has its term before a phase is written.
    let mut values: Vec<String> = Vec::new();
    for (t, step) in body.iter().enumerate() {
        let (class, value) = match step {
            Step::Reduce(_, source) => {
                let whole = terms.get(source)?.whole();
                (if whole { Class::Double } else { Class::Float }, String::new())
            }
            step => step_value(step, |source| terms.get(source))?,
        };
        values.push(format!("const {} t{t} = {value};", kind(class)));
        terms.steps.push(Term::Var(format!("t{t}"), class));
    }
    let declared = |t: usize| match &terms.steps[t] {
        Term::Var(_, class) => kind(*class),
        Term::Const(_) => "float",
    };
    let once = |text: &mut String, phase: usize| {
        for (t, step) in
            body.iter().enumerate().filter(|(t, _)| phases.per_row[*t] && phases.phase[*t] == phase)
        {
            let _ = match step {
                Step::Reduce(f, _) => {
                    let mean = if *f == ReduceFn::Mean { " / columns" } else { "" };
                    let (op, ty) = (*f as usize, declared(t));
                    writeln!(text, "    const {ty} t{t} = over_row<{op}>(s{t}, scratch){mean};")
                }
                _ => writeln!(text, "    {}", values[t]),
            };
        }
    };
    once(&mut text, 0);
    for phase in 0..phases.count {
        let last = phase + 1 == phases.count;
        let reductions: Vec<(usize, ReduceFn, &Term)> = body
            .iter()
            .enumerate()
            .filter_map(|(t, step)| match step {
                Step::Reduce(f, source) if phases.phase[t] == phase + 1 => Some((t, *f, terms.get(source)?)),
                _ => None,
            })
            .collect();
        for (t, f, _) in &reductions {
            let _ = writeln!(text, "    {} s{t} = start<{}>();", declared(*t), *f as usize);
        }
        text += "    for (Index c = lane; c < columns; c += LANES) {\n";
        for (i, dtype) in operands.iter().enumerate().filter(|(i, _)| !phases.inputs[*i]) {
            let _ = writeln!(text, "        const {} n{i} = number(a{i}[c]);", number(*dtype).0);
        }
        for t in (0..body.len()).filter(|t| !phases.per_row[*t] && phases.phase[*t] <= phase) {
            let _ = writeln!(text, "        {}", values[t]);
        }
        for (t, f, source) in reductions {
            let value = if declared(t) == "double" { source.double() } else { source.float() };
            let _ = writeln!(text, "        s{t} = fold<{}>(s{t}, {value});", f as usize);
        }
        for (i, (out, dtype)) in
            region.out.iter().zip(results).enumerate().filter(|(_, (o, _))| last && !o.per_row)
        {
            let value = terms.get(&out.source)?.native();
            let _ = writeln!(text, "        r{i}[c] = Narrow<{}>::of({value});", element(*dtype));
        }
        text += "    }\n";
        once(&mut text, phase + 1);
    }
    // A result may have the memory of an operand that other threads of the row have read.
    text += "    SYNCHRONIZE;\n";
    for (i, (out, dtype)) in region.out.iter().zip(results).enumerate().filter(|(_, (o, _))| o.per_row) {
        let value = terms.get(&out.source)?.native();
        let _ = writeln!(text, "    if (lane == 0) r{i}[0] = Narrow<{}>::of({value});", element(*dtype));
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
