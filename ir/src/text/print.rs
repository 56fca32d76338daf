//! Printing. Every struct is taken apart without `..`: a new field has to be thought of here.

use std::fmt::{self, Display, Formatter};

use super::is_bare;
use crate::attr::{Attr, Attrs, Quoted};
use crate::dim::SymDecl;
use crate::graph::*;

/// The module as canonical text.
pub fn print(module: &Module) -> String {
    ModuleText(module).to_string()
}

/// One node as its line of text, without indentation.
pub fn print_node(module: &Module, id: NodeId) -> String {
    match module.graph.nodes.get(id) {
        Some(node) => NodeText(module, node).to_string(),
        None => format!("({id} does not exist)"),
    }
}

struct ModuleText<'a>(&'a Module);
struct NodeText<'a>(&'a Module, &'a Node);
struct Name<'a>(&'a str);
/// The name of an arena: two words mean other places and stand in quotes.
struct ArenaName<'a>(&'a str);
struct List<'a, T>(&'a [T]);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if is_bare(self.0) { f.write_str(self.0) } else { write!(f, "{}", Quoted(self.0)) }
    }
}

impl Display for ArenaName<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            "state" | "out" => write!(f, "{}", Quoted(self.0)),
            name => write!(f, "{}", Name(name)),
        }
    }
}

impl<T: Display> Display for List<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

fn weight_name(module: &Module, id: WeightId) -> String {
    module.weights.get(id).map_or_else(|| format!("@\"missing {id}\""), |w| format!("@{}", Name(&w.name)))
}

fn state_name(module: &Module, id: StateId) -> String {
    module.states.get(id).map_or_else(|| "\"missing\"".to_string(), |s| Name(&s.name).to_string())
}

/// An operand as texts spell it: `%7`, `@w`.
pub fn operand_name(module: &Module, operand: Operand) -> String {
    match operand {
        Operand::Value(v) => v.to_string(),
        Operand::Weight(w) => weight_name(module, w),
        Operand::State(s) => format!("@{}", state_name(module, s)),
    }
}

impl Display for ModuleText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let module = self.0;
        let Module { name, phase, target, dims, weights, states, arenas, kernels, graph } = module;
        write!(f, "module @{} phase {phase}", Name(name))?;
        if let Some(target) = target {
            write!(f, " target {}", Quoted(target))?;
        }
        writeln!(f, " {{")?;
        for SymDecl { sym, min, max, multiple, hint } in dims {
            write!(f, "  dim {sym} in {min}..={max}")?;
            if *multiple != 1 {
                write!(f, " multiple {multiple}")?;
            }
            if let Some(hint) = hint {
                write!(f, " hint {hint}")?;
            }
            writeln!(f)?;
        }
        for (_, Weight { name, ty, expr, stream }) in weights.iter() {
            write!(f, "  weight @{} : {ty} = ", Name(name))?;
            write_expr(f, module, expr)?;
            if let Some(Stream { first_use, tile_axis, tile_bytes }) = stream {
                write!(f, " streamable(first_use = {first_use}, axis = {tile_axis}, tile = {tile_bytes})")?;
            }
            writeln!(f)?;
        }
        for (_, State { name, ty }) in states.iter() {
            writeln!(f, "  state @{} : {ty}", Name(name))?;
        }
        for (_, ArenaDecl { name, size, align }) in arenas.iter() {
            writeln!(f, "  arena {} = {size} align {align}", ArenaName(name))?;
        }
        for (id, Kernel { name, dtypes }) in kernels.iter() {
            writeln!(f, "  kernel {id} = {} [{}]", Quoted(name), List(dtypes))?;
        }
        let Graph { name, inputs, outputs, nodes: _, values: _, order: _ } = graph;
        write!(f, "  graph @{}(", Name(name))?;
        for (i, id) in inputs.iter().enumerate() {
            write!(f, "{}{id}", if i == 0 { "" } else { ", " })?;
            if let Some(Value { ty, def: Def::Input(name), place: _ }) = graph.values.get(*id) {
                write!(f, " {}: {ty}", Quoted(name))?;
            }
        }
        write!(f, ") -> (")?;
        for (i, Output { name, value }) in outputs.iter().enumerate() {
            write!(f, "{}{}: ", if i == 0 { "" } else { ", " }, Quoted(name))?;
            match graph.values.get(*value) {
                Some(value) => write!(f, "{}", value.ty)?,
                None => write!(f, "missing")?,
            }
        }
        writeln!(f, ") {{")?;
        for id in &graph.order {
            writeln!(f, "    {}", print_node(module, *id))?;
        }
        let returned: Vec<ValueId> = outputs.iter().map(|o| o.value).collect();
        let space = if returned.is_empty() { "" } else { " " };
        writeln!(f, "    return{space}{}\n  }}\n}}", List(&returned))
    }
}

fn write_expr(f: &mut Formatter<'_>, module: &Module, expr: &WeightExpr) -> fmt::Result {
    let name = |id: &WeightId| weight_name(module, *id);
    match expr {
        WeightExpr::File { file, key } => write!(f, "{}::{}", Quoted(file), Quoted(key)),
        WeightExpr::Splat(value) => write!(f, "splat({})", Attr::Float(*value)),
        WeightExpr::Random { seed, std } => write!(f, "random(seed = {seed}, std = {})", Attr::Float(*std)),
        WeightExpr::Dense(values) => {
            let values: Vec<Attr> = values.iter().map(|v| Attr::Float(*v)).collect();
            write!(f, "dense[{}]", List(&values))
        }
        WeightExpr::Concat { axis, parts } => {
            let parts: Vec<String> = parts.iter().map(name).collect();
            write!(f, "concat({}, axis = {axis})", List(&parts))
        }
        WeightExpr::Transpose { perm, of } => write!(f, "transpose({}, perm = [{}])", name(of), List(perm)),
        WeightExpr::Reshape { of } => write!(f, "reshape({})", name(of)),
        WeightExpr::Cast { of } => write!(f, "cast({})", name(of)),
        WeightExpr::Slice { axis, start, len, of } => {
            write!(f, "slice({}, axis = {axis}, start = {start}, len = {len})", name(of))
        }
        WeightExpr::Pack { panel, segments, of } => {
            write!(f, "pack({}, panel = {panel}, segments = [{}])", name(of), List(segments))
        }
        WeightExpr::Cores { segments, alternate, of } => {
            let alternate = if *alternate { ", alternate" } else { "" };
            write!(f, "cores({}, segments = [{}]{alternate})", name(of), List(segments))
        }
    }
}

impl Display for NodeText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let NodeText(module, Node { op, operands, results, loc, kernel, joined }) = self;
        write!(f, "{} = {}", List(results), op.name())?;
        for (i, o) in operands.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { " " } else { ", " }, operand_name(module, *o))?;
        }
        let Attrs(attrs) = op.attrs();
        if !attrs.is_empty() {
            let attrs: Vec<String> = attrs.iter().map(|(k, v)| format!("{k} = {v}")).collect();
            write!(f, " {{{}}}", List(&attrs))?;
        }
        let values: Vec<Option<&Value>> = results.iter().map(|r| module.graph.values.get(*r)).collect();
        let types: Vec<String> =
            values.iter().map(|v| v.map_or_else(|| "missing".to_string(), |v| v.ty.to_string())).collect();
        write!(f, " : {}", List(&types))?;
        let places: Vec<String> = values
            .iter()
            .filter_map(|v| v.and_then(|v| v.place.as_ref()))
            .map(|place| match place {
                Place::Arena { arena, offset } => {
                    let name = module.arenas.get(*arena).map_or("missing", |a| a.name.as_str());
                    format!("{}[{offset}]", ArenaName(name))
                }
                Place::State(state) => format!("state {}", state_name(module, *state)),
                Place::Output(n) => format!("out[{n}]"),
            })
            .collect();
        if !places.is_empty() {
            write!(f, " @ {}", List(&places))?;
        }
        if *joined {
            write!(f, " joined")?;
        }
        if let Some(kernel) = kernel {
            write!(f, " via {kernel}")?;
        }
        if !loc.is_empty() {
            let loc: Vec<String> = loc.iter().map(|l| Name(l).to_string()).collect();
            write!(f, " loc({})", List(&loc))?;
        }
        Ok(())
    }
}
