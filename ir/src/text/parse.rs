//! Parsing: a recursive descent over tokens, with a bound on nesting and on every number that allocates.

use std::collections::HashMap;
use std::sync::Arc;

use super::lexer::{Tok, Token, lex};
use crate::arena::Id;
use crate::attr::{Attr, Attrs};
use crate::dim::{self, Dim, Sym, SymDecl};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::graph::*;
use crate::nearest::nearest;
use crate::ops::Op;
use crate::types::TensorType;

/// Deepest nesting of dims and attributes.
const MAX_NESTING: usize = 32;

/// Reads a module. Syntax and names are checked; types, order and places are taken as written.
///
/// # Errors
/// `ir/syntax` with line and column.
pub fn parse(text: &str) -> Result<Module> {
    let tokens = lex(text)?;
    let (weights, states) = declarations(&tokens);
    let limit = (text.len() as u64).min(u64::from(u32::MAX));
    let mut parser = Parser { tokens, at: 0, limit, weights, states, arenas: HashMap::new() };
    let module = parser.module()?;
    parser.expect_end()?;
    Ok(module)
}

/// The first weight and the first state of each name, before the graph.
fn declarations(tokens: &[Token<'_>]) -> (HashMap<String, WeightId>, HashMap<String, StateId>) {
    let (mut weights, mut states) = (HashMap::new(), HashMap::new());
    let (mut weight_count, mut state_count) = (0, 0);
    for pair in tokens.windows(2) {
        let (Tok::Word(word), Tok::At(name)) = (&pair[0].kind, &pair[1].kind) else { continue };
        match *word {
            "weight" => {
                weights.entry(name.clone()).or_insert(WeightId::from_index(weight_count));
                weight_count += 1;
            }
            "state" => {
                states.entry(name.clone()).or_insert(StateId::from_index(state_count));
                state_count += 1;
            }
            "graph" => break,
            _ => {}
        }
    }
    (weights, states)
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    /// Ids are below the length of the text, so that arenas stay proportional to it.
    limit: u64,
    /// Every declared weight and state: expressions may name later ones.
    weights: HashMap<String, WeightId>,
    states: HashMap<String, StateId>,
    arenas: HashMap<String, ArenaId>,
}

/// A node as read, before names of values are resolved.
struct Line {
    op: Op,
    operands: Vec<(Operand, usize)>,
    results: Vec<(u64, usize)>,
    loc: Vec<Loc>,
    kernel: Option<KernelId>,
    types: Vec<TensorType>,
    places: Vec<Place>,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> &Tok<'a> {
        &self.tokens[self.at.min(self.tokens.len() - 1)].kind
    }

    fn next(&mut self) -> Tok<'a> {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn error_at(&self, at: usize, message: impl Into<String>) -> Error {
        let token = &self.tokens[at.min(self.tokens.len() - 1)];
        Error::new(Kind::BadInput, "ir/syntax", message).at(format!("{}:{}", token.line, token.column))
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        Err(self.error_at(self.at, format!("expected {expected}, found {}", self.peek().show())))
    }

    fn is(&self, punct: &str) -> bool {
        matches!(self.peek(), Tok::Punct(p) if *p == punct)
    }

    fn take(&mut self, punct: &str) -> bool {
        let found = self.is(punct);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, punct: &str) -> Result<()> {
        if self.take(punct) { Ok(()) } else { self.unexpected(&format!("`{punct}`")) }
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Tok::Word(w) if *w == word);
        self.at += usize::from(found);
        found
    }

    fn expect_word(&mut self, word: &str) -> Result<()> {
        if self.take_word(word) { Ok(()) } else { self.unexpected(&format!("`{word}`")) }
    }

    fn expect_end(&mut self) -> Result<()> {
        if *self.peek() == Tok::End { Ok(()) } else { self.unexpected("the end of the text") }
    }

    fn word(&mut self, what: &str) -> Result<&'a str> {
        match *self.peek() {
            Tok::Word(w) => {
                self.at += 1;
                Ok(w)
            }
            _ => self.unexpected(what),
        }
    }

    fn at_name(&mut self, what: &str) -> Result<String> {
        match self.peek() {
            Tok::At(name) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.unexpected(what),
        }
    }

    /// A bare or quoted name.
    fn name(&mut self, what: &str) -> Result<String> {
        match self.peek().clone() {
            Tok::Word(w) => {
                self.at += 1;
                Ok(w.to_string())
            }
            Tok::Str(s) => {
                self.at += 1;
                Ok(s)
            }
            _ => self.unexpected(what),
        }
    }

    fn string(&mut self, what: &str) -> Result<String> {
        match self.peek().clone() {
            Tok::Str(s) => {
                self.at += 1;
                Ok(s)
            }
            _ => self.unexpected(what),
        }
    }

    fn int(&mut self) -> Result<u64> {
        match *self.peek() {
            Tok::Int(i) => {
                self.at += 1;
                Ok(i)
            }
            _ => self.unexpected("a non-negative integer"),
        }
    }

    fn usize(&mut self) -> Result<usize> {
        let at = self.at;
        usize::try_from(self.int()?).map_err(|_| self.error_at(at, "the number is too large"))
    }

    fn float(&mut self) -> Result<f64> {
        let at = self.at;
        let attr = self.attr(0)?;
        crate::attr::as_float("value", &attr).map_err(|m| self.error_at(at, m))
    }

    /// `first`, then more after commas, until `close`.
    fn list<T>(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        if self.take(close) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if !self.take(",") {
                self.expect(close)?;
                return Ok(items);
            }
        }
    }

    fn module(&mut self) -> Result<Module> {
        self.expect_word("module")?;
        let name = self.at_name("the module's `@name`")?;
        let mut module = Module::new(&name);
        self.expect_word("phase")?;
        let at = self.at;
        let phase = self.word("a phase")?;
        module.phase = Phase::parse(phase).ok_or_else(|| {
            let names = Phase::ALL.map(Phase::name).join(", ");
            let error = self.error_at(at, format!("{} is no phase", Tok::Word(phase).show()));
            match nearest(phase, Phase::ALL.map(Phase::name)) {
                Some(close) => error.hint(format!("did you mean `{close}`?")),
                None => error.hint(format!("phases are {names}")),
            }
        })?;
        if self.take_word("target") {
            module.target = Some(self.string("the target in quotes")?);
        }
        self.expect("{")?;
        loop {
            let at = self.at;
            match self.next() {
                Tok::Word("dim") => self.dim_decl(&mut module)?,
                Tok::Word("weight") => self.weight(&mut module)?,
                Tok::Word("state") => self.state(&mut module)?,
                Tok::Word("arena") => self.arena(&mut module)?,
                Tok::Word("kernel") => self.kernel(&mut module)?,
                Tok::Word("graph") => break,
                other => {
                    let message = format!(
                        "expected dim, weight, state, arena, kernel or graph, found {}",
                        other.show()
                    );
                    return Err(self.error_at(at, message));
                }
            }
        }
        self.graph(&mut module)?;
        self.expect("}")?;
        Ok(module)
    }

    fn sym(&mut self) -> Result<Sym> {
        match *self.peek() {
            Tok::Sym(name) => match Sym::new(name) {
                Some(sym) => {
                    self.at += 1;
                    Ok(sym)
                }
                None => self.unexpected("a symbol of 1 to 15 letters, digits or `_`"),
            },
            _ => self.unexpected("a symbol such as `$t`"),
        }
    }

    fn dim_decl(&mut self, module: &mut Module) -> Result<()> {
        let sym = self.sym()?;
        self.expect_word("in")?;
        let min = self.int()?;
        self.expect("..=")?;
        let max = self.int()?;
        let multiple = if self.take_word("multiple") { self.int()? } else { 1 };
        let hint = if self.take_word("hint") { Some(self.int()?) } else { None };
        module.dims.push(SymDecl { sym, min, max, multiple, hint });
        Ok(())
    }

    fn weight_ref(&mut self) -> Result<WeightId> {
        let at = self.at;
        let name = self.at_name("a weight `@name`")?;
        self.weights.get(&name).copied().ok_or_else(|| self.unknown(at, "weight", &name))
    }

    /// An error for a name that is not declared, with the nearest one that is.
    fn unknown(&self, at: usize, what: &str, name: &str) -> Error {
        let weights = self.weights.keys().filter(|_| what.contains("weight"));
        let states = self.states.keys().filter(|_| what.contains("state"));
        let mut names: Vec<&str> = weights.chain(states).map(String::as_str).collect();
        names.sort_unstable();
        let name_shown = Tok::At(name.to_string()).show();
        let error = self.error_at(at, format!("there is no {what} {name_shown}"));
        match nearest(name, names) {
            Some(close) => error.hint(format!("did you mean {}?", Tok::At(close.to_string()).show())),
            None => error,
        }
    }

    fn key(&mut self, key: &str) -> Result<()> {
        self.expect_word(key)?;
        self.expect("=")
    }

    fn usize_list(&mut self) -> Result<Vec<usize>> {
        self.expect("[")?;
        self.list("]", Self::usize)
    }

    fn weight(&mut self, module: &mut Module) -> Result<()> {
        let at = self.at;
        let name = self.at_name("the weight's `@name`")?;
        self.expect(":")?;
        let ty = self.ty()?;
        self.expect("=")?;
        let expr = self.weight_expr()?;
        let stream = if self.take_word("streamable") {
            self.expect("(")?;
            self.key("first_use")?;
            let first_use = self.usize()?;
            self.expect(",")?;
            self.key("axis")?;
            let tile_axis = self.usize()?;
            self.expect(",")?;
            self.key("tile")?;
            let tile_bytes = self.int()?;
            self.expect(")")?;
            Some(Stream { first_use, tile_axis, tile_bytes })
        } else {
            None
        };
        let id = module.weights.push(Weight { name: name.clone(), ty, expr, stream });
        if self.weights.get(&name) != Some(&id) || self.states.contains_key(&name) {
            return Err(self.error_at(at, format!("{} is defined twice", Tok::At(name).show())));
        }
        Ok(())
    }

    fn weight_expr(&mut self) -> Result<WeightExpr> {
        if let Tok::Str(file) = self.peek().clone() {
            self.at += 1;
            self.expect("::")?;
            return Ok(WeightExpr::File { file, key: self.string("the tensor's name in quotes")? });
        }
        let at = self.at;
        let word = self.word("a weight expression")?;
        if word == "dense" {
            self.expect("[")?;
            return Ok(WeightExpr::Dense(self.list("]", Self::float)?));
        }
        self.expect("(")?;
        let expr = match word {
            "splat" => WeightExpr::Splat(self.float()?),
            "random" => {
                self.key("seed")?;
                let seed = self.int()?;
                self.expect(",")?;
                self.key("std")?;
                WeightExpr::Random { seed, std: self.float()? }
            }
            "concat" => {
                let mut parts = Vec::new();
                while matches!(self.peek(), Tok::At(_)) {
                    parts.push(self.weight_ref()?);
                    self.expect(",")?;
                }
                self.key("axis")?;
                WeightExpr::Concat { axis: self.usize()?, parts }
            }
            "transpose" => {
                let of = self.weight_ref()?;
                self.expect(",")?;
                self.key("perm")?;
                WeightExpr::Transpose { perm: self.usize_list()?, of }
            }
            "reshape" => WeightExpr::Reshape { of: self.weight_ref()? },
            "cast" => WeightExpr::Cast { of: self.weight_ref()? },
            "pack" => {
                let of = self.weight_ref()?;
                self.expect(",")?;
                self.key("panel")?;
                let panel = self.usize()?;
                self.expect(",")?;
                self.key("segments")?;
                WeightExpr::Pack { panel, segments: self.usize_list()?, of }
            }
            other => {
                return Err(self.error_at(at, format!("{} is no weight expression", Tok::Word(other).show())));
            }
        };
        self.expect(")")?;
        Ok(expr)
    }

    fn state(&mut self, module: &mut Module) -> Result<()> {
        let at = self.at;
        let name = self.at_name("the state's `@name`")?;
        self.expect(":")?;
        let ty = self.ty()?;
        let id = module.states.push(State { name: name.clone(), ty });
        if self.states.get(&name) != Some(&id) || self.weights.contains_key(&name) {
            return Err(self.error_at(at, format!("{} is defined twice", Tok::At(name).show())));
        }
        Ok(())
    }

    fn arena(&mut self, module: &mut Module) -> Result<()> {
        let at = self.at;
        let name = self.name("the arena's name")?;
        self.expect("=")?;
        let size = self.dim(0)?;
        self.expect_word("align")?;
        let align = self.int()?;
        let id = module.arenas.push(ArenaDecl { name: name.clone(), size, align });
        match self.arenas.insert(name, id) {
            Some(_) => Err(self.error_at(at, "this arena is defined twice")),
            None => Ok(()),
        }
    }

    fn kernel_id(&mut self) -> Result<KernelId> {
        let at = self.at;
        let word = self.word("a kernel such as `k0`")?;
        word.strip_prefix('k')
            .and_then(|n| n.parse::<u64>().ok())
            .filter(|n| *n < self.limit)
            .map(|n| KernelId::from_index(n as usize))
            .ok_or_else(|| self.error_at(at, format!("{} is no kernel", Tok::Word(word).show())))
    }

    fn kernel(&mut self, module: &mut Module) -> Result<()> {
        let at = self.at;
        let id = self.kernel_id()?;
        self.expect("=")?;
        let name = self.string("the kernel's name in quotes")?;
        self.expect("[")?;
        let dtypes = self.list("]", Self::dtype)?;
        module
            .kernels
            .insert_at(id, Kernel { name, dtypes })
            .map_err(|_| self.error_at(at, format!("`{id}` is defined twice")))
    }

    fn dtype(&mut self) -> Result<DType> {
        let at = self.at;
        let word = self.word("an element type")?;
        DType::parse(word).ok_or_else(|| {
            let error = self.error_at(at, format!("{} is no element type", Tok::Word(word).show()));
            let names = DType::ALL.map(DType::name);
            match nearest(word, names) {
                Some(close) => error.hint(format!("did you mean `{close}`?")),
                None => error.hint(format!("element types are {}", names.join(", "))),
            }
        })
    }

    fn ty(&mut self) -> Result<TensorType> {
        let dtype = self.dtype()?;
        self.expect("[")?;
        let shape = self.list("]", |p| p.dim(0))?;
        Ok(TensorType { dtype, shape })
    }

    fn deeper(&self, depth: usize) -> Result<()> {
        if depth < MAX_NESTING {
            Ok(())
        } else {
            Err(self.error_at(self.at, format!("expressions nest deeper than {MAX_NESTING}")))
        }
    }

    /// `product (+ product | - product)*`, perhaps with a sign in front.
    fn dim(&mut self, depth: usize) -> Result<Dim> {
        self.deeper(depth)?;
        let negative = self.take("-");
        let mut sum = self.dim_product(depth, negative)?;
        while let Some(negative) = self.take("+").then_some(false).or_else(|| self.take("-").then_some(true))
        {
            sum = sum.add(&self.dim_product(depth, negative)?);
            self.bounded(sum.size())?;
        }
        Ok(sum)
    }

    fn bounded(&self, size: usize) -> Result<()> {
        if size <= dim::MAX_SIZE {
            return Ok(());
        }
        Err(self.error_at(self.at, format!("the dim has more than {} terms and factors", dim::MAX_SIZE)))
    }

    fn dim_product(&mut self, depth: usize, negative: bool) -> Result<Dim> {
        // The sign belongs to a literal: the smallest integer has no positive counterpart.
        let mut product = match self.peek() {
            Tok::Int(_) => self.literal(negative)?,
            _ if negative => self.dim_atom(depth)?.mul(&Dim::from(-1i64)),
            _ => self.dim_atom(depth)?,
        };
        while self.take("*") {
            let factor = self.dim_atom(depth)?;
            self.bounded(product.term_count() * factor.term_count())?;
            product = product.mul(&factor);
            self.bounded(product.size())?;
        }
        Ok(product)
    }

    fn literal(&mut self, negative: bool) -> Result<Dim> {
        let at = self.at;
        let value = i128::from(self.int()?) * if negative { -1 } else { 1 };
        i64::try_from(value)
            .map(Dim::from)
            .map_err(|_| self.error_at(at, format!("`{value}` does not fit in 64 bits")))
    }

    fn dim_atom(&mut self, depth: usize) -> Result<Dim> {
        match *self.peek() {
            Tok::Int(_) => self.literal(false),
            Tok::Sym(_) => Ok(Dim::from(self.sym()?)),
            Tok::Punct("(") => {
                self.at += 1;
                let dim = self.dim(depth + 1)?;
                self.expect(")")?;
                Ok(dim)
            }
            Tok::Word("ceildiv") => {
                self.at += 1;
                self.expect("(")?;
                let dim = self.dim(depth + 1)?;
                self.expect(",")?;
                let at = self.at;
                let divisor = i64::try_from(self.int()?).ok().filter(|d| *d > 0);
                let divisor = divisor.ok_or_else(|| self.error_at(at, "a divisor is a positive integer"))?;
                self.expect(")")?;
                Ok(dim.ceil_div(divisor))
            }
            Tok::Word(word @ ("max" | "min")) => {
                self.at += 1;
                self.expect("(")?;
                let args = self.list(")", |p| p.dim(depth + 1))?;
                if args.is_empty() {
                    return self.unexpected("an argument");
                }
                self.bounded(args.iter().map(Dim::size).sum())?;
                Ok(if word == "max" { Dim::max_all(&args) } else { Dim::min_all(&args) })
            }
            _ => self.unexpected("a dim"),
        }
    }

    fn attr(&mut self, depth: usize) -> Result<Attr> {
        self.deeper(depth)?;
        match self.peek().clone() {
            Tok::Float(value) => {
                self.at += 1;
                Ok(Attr::Float(value))
            }
            Tok::Punct("-") => match self.tokens.get(self.at + 1).map(|t| t.kind.clone()) {
                Some(Tok::Float(value)) => {
                    self.at += 2;
                    Ok(Attr::Float(-value))
                }
                Some(Tok::Word("inf")) => {
                    self.at += 2;
                    Ok(Attr::Float(f64::NEG_INFINITY))
                }
                _ => Ok(Attr::Dim(self.dim(depth)?)),
            },
            Tok::Str(text) => {
                self.at += 1;
                Ok(Attr::Str(text))
            }
            Tok::Punct("[") => {
                self.at += 1;
                Ok(Attr::List(self.list("]", |p| p.attr(depth + 1))?))
            }
            Tok::Word("inf") => {
                self.at += 1;
                Ok(Attr::Float(f64::INFINITY))
            }
            Tok::Word("nan") => {
                self.at += 1;
                Ok(Attr::Float(f64::NAN))
            }
            // `max(i0, i1)` is a call of a step, `max($a, $b)` a dim.
            Tok::Word("ceildiv") => Ok(Attr::Dim(self.dim(depth)?)),
            Tok::Word("max" | "min") if self.starts_dim_call() => Ok(Attr::Dim(self.dim(depth)?)),
            Tok::Word(word) => {
                self.at += 1;
                if self.take("(") {
                    let args = self.list(")", |p| p.attr(depth + 1))?;
                    Ok(Attr::Call(word.to_string(), args))
                } else {
                    Ok(Attr::Word(word.to_string()))
                }
            }
            _ => Ok(Attr::Dim(self.dim(depth)?)),
        }
    }

    /// Whether the call at hand is a function of dims: steps of an op read words and floats, never these.
    fn starts_dim_call(&self) -> bool {
        let after = |n: usize| self.tokens.get(self.at + n).map(|t| &t.kind);
        match after(2) {
            Some(Tok::Int(_) | Tok::Sym(_) | Tok::Punct("(")) => true,
            Some(Tok::Word("ceildiv" | "max" | "min")) => after(3) == Some(&Tok::Punct("(")),
            Some(Tok::Punct("-")) => !matches!(after(3), Some(Tok::Float(_) | Tok::Word("inf"))),
            _ => false,
        }
    }

    fn value_id(&mut self) -> Result<(u64, usize)> {
        let at = self.at;
        match *self.peek() {
            Tok::Value(id) if id < self.limit => {
                self.at += 1;
                Ok((id, at))
            }
            Tok::Value(id) => Err(self
                .error_at(at, format!("`%{id}` is too large for this text"))
                .hint("number values from %0")),
            _ => self.unexpected("a value such as `%0`"),
        }
    }

    fn graph(&mut self, module: &mut Module) -> Result<()> {
        module.graph.name = self.at_name("the graph's `@name`")?;
        self.expect("(")?;
        let inputs = self.list(")", |p| {
            let (id, at) = p.value_id()?;
            let name = p.string("the input's name in quotes")?;
            p.expect(":")?;
            Ok((id, at, name, p.ty()?))
        })?;
        for (id, at, name, ty) in inputs {
            let id = ValueId::from_index(id as usize);
            let value = Value { ty, def: Def::Input(name), place: None };
            module
                .graph
                .values
                .insert_at(id, value)
                .map_err(|_| self.error_at(at, format!("`{id}` is defined twice")))?;
            module.graph.inputs.push(id);
        }
        self.expect("->")?;
        self.expect("(")?;
        let outputs = self.list(")", |p| {
            let at = p.at;
            let name = p.string("the output's name in quotes")?;
            p.expect(":")?;
            Ok((name, p.ty()?, at))
        })?;
        self.expect("{")?;
        let mut lines = Vec::new();
        while !matches!(self.peek(), Tok::Word("return")) {
            lines.push(self.node()?);
        }
        self.at += 1;
        let mut returned = Vec::new();
        while !self.is("}") {
            returned.push(self.value_id()?);
            if !self.take(",") {
                break;
            }
        }
        self.expect("}")?;
        self.resolve(module, lines)?;
        if returned.len() != outputs.len() {
            return Err(self.error_at(
                self.at - 1,
                format!("{} outputs are declared, {} returned", outputs.len(), returned.len()),
            ));
        }
        for ((name, ty, declared_at), (id, at)) in outputs.into_iter().zip(returned) {
            let value = ValueId::from_index(id as usize);
            let found = module.graph.values.get(value);
            let found = found.ok_or_else(|| self.error_at(at, format!("`{value}` is never defined")))?;
            if found.ty != ty {
                let message = format!("output \"{name}\" is declared {ty}, but `{value}` is {}", found.ty);
                return Err(self.error_at(declared_at, message));
            }
            module.graph.outputs.push(Output { name, value });
        }
        Ok(())
    }

    fn node(&mut self) -> Result<Line> {
        let mut results = vec![self.value_id()?];
        while self.take(",") {
            results.push(self.value_id()?);
        }
        self.expect("=")?;
        let op_at = self.at;
        let name = self.word("an op")?;
        let mut operands = Vec::new();
        if matches!(self.peek(), Tok::Value(_) | Tok::At(_)) {
            loop {
                operands.push(self.operand()?);
                if !self.take(",") {
                    break;
                }
            }
        }
        let mut attrs = Attrs::default();
        if self.take("{") {
            attrs.0 = self.list("}", |p| {
                let key = p.word("an attribute's name")?.to_string();
                p.expect("=")?;
                Ok((key, p.attr(0)?))
            })?;
        }
        let op = match Op::from_text(name, &attrs) {
            Some(Ok(op)) => op,
            Some(Err(message)) => return Err(self.error_at(op_at, format!("`{name}`: {message}"))),
            None => {
                let error = self.error_at(op_at, format!("there is no op {}", Tok::Word(name).show()));
                return Err(match nearest(name, Op::all_names()) {
                    Some(close) => error.hint(format!("did you mean `{close}`?")),
                    None => error.hint("docs/ir.md lists all ops"),
                });
            }
        };
        self.expect(":")?;
        let mut types = vec![self.ty()?];
        while self.take(",") {
            types.push(self.ty()?);
        }
        if types.len() != results.len() {
            return Err(self.error_at(op_at, format!("{} results but {} types", results.len(), types.len())));
        }
        let mut places = Vec::new();
        let places_at = self.at;
        if self.take("@") {
            loop {
                places.push(self.place()?);
                if !self.take(",") {
                    break;
                }
            }
            if places.len() != results.len() {
                return Err(self
                    .error_at(places_at, format!("{} results but {} places", results.len(), places.len())));
            }
        }
        let kernel = if self.take_word("via") { Some(self.kernel_id()?) } else { None };
        let loc = if self.take_word("loc") {
            self.expect("(")?;
            self.list(")", |p| p.name("a layer's name").map(Arc::from))?
        } else {
            Vec::new()
        };
        Ok(Line { op, operands, results, loc, kernel, types, places })
    }

    fn operand(&mut self) -> Result<(Operand, usize)> {
        let at = self.at;
        match self.peek().clone() {
            Tok::Value(_) => {
                let (id, at) = self.value_id()?;
                Ok((Operand::Value(ValueId::from_index(id as usize)), at))
            }
            Tok::At(name) => {
                self.at += 1;
                let weight = self.weights.get(&name).map(|w| Operand::Weight(*w));
                let state = || self.states.get(&name).map(|s| Operand::State(*s));
                let operand =
                    weight.or_else(state).ok_or_else(|| self.unknown(at, "weight or state", &name))?;
                Ok((operand, at))
            }
            _ => self.unexpected("a value, weight or state"),
        }
    }

    /// `arena[offset]`, `state name` or `out[n]`; an arena called `state` or `out` stands in quotes.
    fn place(&mut self) -> Result<Place> {
        if self.take_word("state") {
            let at = self.at;
            let state = self.name("the state's name")?;
            let id = self.states.get(&state).copied().ok_or_else(|| self.unknown(at, "state", &state))?;
            return Ok(Place::State(id));
        }
        let place = if self.take_word("out") {
            self.expect("[")?;
            Place::Output(self.usize()?)
        } else {
            let at = self.at;
            let name = self.name("a place")?;
            let arena = self.arenas.get(&name).copied().ok_or_else(|| self.unknown_arena(at, &name))?;
            self.expect("[")?;
            Place::Arena { arena, offset: self.dim(0)? }
        };
        self.expect("]")?;
        Ok(place)
    }

    fn unknown_arena(&self, at: usize, name: &str) -> Error {
        let mut names: Vec<&str> = self.arenas.keys().map(String::as_str).collect();
        names.sort_unstable();
        let error = self.error_at(at, format!("there is no arena {}", Tok::Word(name).show()));
        match nearest(name, names) {
            Some(close) => error.hint(format!("did you mean `{close}`?")),
            None => error,
        }
    }

    fn resolve(&self, module: &mut Module, lines: Vec<Line>) -> Result<()> {
        let graph = &mut module.graph;
        let mut uses = Vec::new();
        for Line { op, operands, results, loc, kernel, types, places } in lines {
            let node = NodeId::from_index(graph.nodes.bound());
            let mut places = places.into_iter();
            for (index, ((id, at), ty)) in results.iter().zip(types).enumerate() {
                let id = ValueId::from_index(*id as usize);
                let value = Value { ty, def: Def::Node { node, index }, place: places.next() };
                graph
                    .values
                    .insert_at(id, value)
                    .map_err(|_| self.error_at(*at, format!("`{id}` is defined twice")))?;
            }
            uses.extend(operands.iter().filter_map(|(o, at)| match o {
                Operand::Value(v) => Some((*v, *at)),
                Operand::Weight(_) | Operand::State(_) => None,
            }));
            let results = results.iter().map(|(id, _)| ValueId::from_index(*id as usize)).collect();
            let operands = operands.into_iter().map(|(o, _)| o).collect();
            let pushed = graph.nodes.push(Node { op, operands, results, loc, kernel });
            graph.order.push(pushed);
        }
        for (value, at) in uses {
            if graph.values.get(value).is_none() {
                return Err(self.error_at(at, format!("`{value}` is never defined")));
            }
        }
        Ok(())
    }
}
