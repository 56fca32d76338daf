//! Parsing: a recursive descent over tokens, with a bound on nesting and on every number that allocates.
//!
//! This file holds the module and its declarations.

mod cursor;
mod expressions;
mod graph;

use std::collections::HashMap;

use self::cursor::Parser;
use super::lexer::{Tok, Token, lex};
use crate::arena::Id;
use crate::dim::{Dim, SymDecl};
use crate::error::{Error, Result};
use crate::graph::*;
use crate::nearest::nearest;

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

/// Reads one dim, such as `ceildiv($t, 64)`.
///
/// # Errors
/// `ir/syntax` with line and column.
pub fn parse_dim(text: &str) -> Result<Dim> {
    let (weights, states, arenas) = (HashMap::new(), HashMap::new(), HashMap::new());
    let mut parser = Parser { tokens: lex(text)?, at: 0, limit: 0, weights, states, arenas };
    let dim = parser.dim(0)?;
    parser.expect_end()?;
    Ok(dim)
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

impl<'a> Parser<'a> {
    pub(super) fn module(&mut self) -> Result<Module> {
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

    pub(super) fn dim_decl(&mut self, module: &mut Module) -> Result<()> {
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

    pub(super) fn weight_ref(&mut self) -> Result<WeightId> {
        let at = self.at;
        let name = self.at_name("a weight `@name`")?;
        self.weights.get(&name).copied().ok_or_else(|| self.unknown(at, "weight", &name))
    }

    /// An error for a name that is not declared, with the nearest one that is.
    pub(super) fn unknown(&self, at: usize, what: &str, name: &str) -> Error {
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

    pub(super) fn weight(&mut self, module: &mut Module) -> Result<()> {
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

    pub(super) fn weight_expr(&mut self) -> Result<WeightExpr> {
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
                WeightExpr::Concat { axis: self.usize()?, parts: parts.into() }
            }
            "transpose" => {
                let of = self.weight_ref()?;
                self.expect(",")?;
                self.key("perm")?;
                WeightExpr::Transpose { perm: self.usize_list()?, of }
            }
            "reshape" => WeightExpr::Reshape { of: self.weight_ref()? },
            "cast" => WeightExpr::Cast { of: self.weight_ref()? },
            "slice" => {
                let of = self.weight_ref()?;
                self.expect(",")?;
                self.key("axis")?;
                let axis = self.usize()?;
                self.expect(",")?;
                self.key("start")?;
                let start = self.usize()?;
                self.expect(",")?;
                self.key("len")?;
                WeightExpr::Slice { axis, start, len: self.usize()?, of }
            }
            "pack" => {
                let of = self.weight_ref()?;
                self.expect(",")?;
                self.key("panel")?;
                let panel = self.usize()?;
                self.expect(",")?;
                self.key("segments")?;
                WeightExpr::Pack { panel, segments: self.usize_list()?.into(), of }
            }
            "cores" => {
                let of = self.weight_ref()?;
                self.expect(",")?;
                self.key("segments")?;
                let segments = self.usize_list()?;
                let alternate = self.take(",");
                if alternate {
                    self.expect_word("alternate")?;
                }
                WeightExpr::Cores { segments: segments.into(), alternate, of }
            }
            other => {
                return Err(self.error_at(at, format!("{} is no weight expression", Tok::Word(other).show())));
            }
        };
        self.expect(")")?;
        Ok(expr)
    }

    pub(super) fn state(&mut self, module: &mut Module) -> Result<()> {
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

    pub(super) fn arena(&mut self, module: &mut Module) -> Result<()> {
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

    pub(super) fn kernel_id(&mut self) -> Result<KernelId> {
        let at = self.at;
        let word = self.word("a kernel such as `k0`")?;
        word.strip_prefix('k')
            .and_then(|n| n.parse::<u64>().ok())
            .filter(|n| *n < self.limit)
            .map(|n| KernelId::from_index(n as usize))
            .ok_or_else(|| self.error_at(at, format!("{} is no kernel", Tok::Word(word).show())))
    }

    pub(super) fn kernel(&mut self, module: &mut Module) -> Result<()> {
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
}
