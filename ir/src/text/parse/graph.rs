//! The graph: nodes line by line, names of values when all lines are read.

use std::sync::Arc;

use super::super::lexer::Tok;
use super::cursor::Parser;
use crate::arena::Id;
use crate::attr::Attrs;
use crate::error::{Error, Result};
use crate::graph::*;
use crate::nearest::nearest;
use crate::ops::Op;
use crate::types::TensorType;

/// A node as read, before names of values are resolved.
pub(super) struct Line {
    op: Op,
    operands: Vec<(Operand, usize)>,
    results: Vec<(u64, usize)>,
    loc: Vec<Loc>,
    kernel: Option<KernelId>,
    joined: bool,
    types: Vec<TensorType>,
    places: Vec<Place>,
}

impl<'a> Parser<'a> {
    pub(super) fn value_id(&mut self) -> Result<(u64, usize)> {
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

    pub(super) fn graph(&mut self, module: &mut Module) -> Result<()> {
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

    pub(super) fn node(&mut self) -> Result<Line> {
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
        let joined = self.take_word("joined");
        let kernel = if self.take_word("via") { Some(self.kernel_id()?) } else { None };
        let loc = if self.take_word("loc") {
            self.expect("(")?;
            self.list(")", |p| p.name("a layer's name").map(Arc::from))?
        } else {
            Vec::new()
        };
        Ok(Line { op, operands, results, loc, kernel, joined, types, places })
    }

    pub(super) fn operand(&mut self) -> Result<(Operand, usize)> {
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
    pub(super) fn place(&mut self) -> Result<Place> {
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

    pub(super) fn unknown_arena(&self, at: usize, name: &str) -> Error {
        let mut names: Vec<&str> = self.arenas.keys().map(String::as_str).collect();
        names.sort_unstable();
        let error = self.error_at(at, format!("there is no arena {}", Tok::Word(name).show()));
        match nearest(name, names) {
            Some(close) => error.hint(format!("did you mean `{close}`?")),
            None => error,
        }
    }

    pub(super) fn resolve(&self, module: &mut Module, lines: Vec<Line>) -> Result<()> {
        let graph = &mut module.graph;
        let mut uses = Vec::new();
        for Line { op, operands, results, loc, kernel, joined, types, places } in lines {
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
            let pushed =
                graph.nodes.push(Node { op: op.into(), operands, results, loc: loc.into(), kernel, joined });
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
