//! Which nodes the rules have to look at one by one.
//!
//! Models repeat their layers. A node is a **copy** of the node one layer before it if it has the same op, kernel and
//! launch group, operands and results of the same types, the same offsets, and reads either the same values or those
//! one layer later. A rule that holds for a node holds for its copies, because no rule asks for more than that, but for
//! versions of states (V10) and who defines what (V5), which are checked for every node. So a copy needs one look,
//! in order of memory, where the rules would take one each.
//!
//! Copies are only looked for where nodes and values are numbered as `Module::compact` does: values by the nodes that
//! define them, nodes by their position. Then a value that is `n` numbers later than one defined before node `a` is
//! defined before the node whose results are `n` numbers later than those of `a`, which is V7 for the copy.

use crate::arena::Id;
use crate::distinct::Types;
use crate::graph::*;

/// Fewest nodes of a module in which copies are looked for.
const FEWEST: usize = 256;

/// Longest layer.
const LONGEST: usize = 512;

/// What the rules look at.
pub(super) struct Scope<'a> {
    module: &'a Module,
    /// The types of the whole module.
    pub(super) types: Types<'a>,
    /// The nodes that are no copies, in order; none if that is not known. Nodes and values are numbered by position then.
    fresh: Option<Vec<NodeId>>,
    /// Whether V10 is known to hold, because every node that writes a state takes the state itself, and nobody reads
    /// it afterwards.
    pub(super) states_written_once: bool,
}

impl<'a> Scope<'a> {
    /// Everything.
    pub(super) fn whole(module: &'a Module) -> Self {
        Scope { module, types: Types::of(module), fresh: None, states_written_once: false }
    }

    /// Everything but copies.
    pub(super) fn without_copies(module: &'a Module) -> Self {
        let mut types = Types::of_declarations(module);
        match period(module, &types).and_then(|period| fresh(module, &mut types, period)) {
            Some((fresh, states_written_once)) => {
                Scope { module, types, fresh: Some(fresh), states_written_once }
            }
            None => Scope::whole(module),
        }
    }

    /// Whether nodes are left out. Those that are not stand where their ids say, and agree with their results.
    pub(super) fn leaves_out(&self) -> bool {
        self.fresh.is_some()
    }

    /// Positions and ids of nodes, in order.
    pub(super) fn order(&self) -> impl Iterator<Item = (usize, NodeId)> + '_ {
        let all = self.fresh.is_none().then(|| self.module.graph.order.iter().copied().enumerate());
        let some = self.fresh.iter().flatten().map(|id| (id.index(), *id));
        all.into_iter().flatten().chain(some)
    }

    /// Nodes, by id.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (NodeId, &'a Node)> + '_ {
        let graph = &self.module.graph;
        let all = self.fresh.is_none().then(|| graph.nodes.iter());
        let some = self.fresh.iter().flatten().filter_map(|id| Some((*id, graph.nodes.get(*id)?)));
        all.into_iter().flatten().chain(some)
    }

    /// Inputs and results of nodes, by id.
    pub(super) fn values(&self) -> impl Iterator<Item = (ValueId, &'a Value)> + '_ {
        let graph = &self.module.graph;
        let all = self.fresh.is_none().then(|| graph.values.iter());
        let inputs = self.fresh.is_some().then(|| graph.inputs.iter());
        let results = self.fresh.iter().flatten().filter_map(|id| graph.nodes.get(*id));
        let some = inputs.into_iter().flatten().chain(results.flat_map(|node| &node.results));
        all.into_iter().flatten().chain(some.filter_map(|id| Some((*id, graph.values.get(*id)?))))
    }
}

/// Nodes of a layer, if there are layers in the middle of the order.
fn period(module: &Module, types: &Types<'_>) -> Option<usize> {
    let order = &module.graph.order;
    if order.len() < FEWEST {
        return None;
    }
    let middle = order.len() / 2;
    let repeats = |period: usize| {
        (middle..middle + period).all(|at| {
            let node = |at: usize| module.graph.nodes.get(*order.get(at)?);
            node(at - period).zip(node(at)).is_some_and(|(a, b)| is_copy(module, types, a, b))
        })
    };
    (1..=LONGEST.min(order.len() / 8)).find(|period| repeats(*period))
}

/// The nodes that are no copies of those `period` positions before them, and whether each state is written once, and read
/// before only; adds the types of all values. None if nodes and values are numbered in another way, or do not agree.
fn fresh<'a>(module: &'a Module, types: &mut Types<'a>, period: usize) -> Option<(Vec<NodeId>, bool)> {
    let Graph { name: _, inputs, outputs: _, nodes, values, order } = &module.graph;
    let dense = nodes.len() == nodes.bound() && order.len() == nodes.len() && values.len() == values.bound();
    if !dense {
        return None;
    }
    let mut next = 0;
    for input in inputs {
        let value = values.get(*input).filter(|v| matches!(v.def, Def::Input(_)) && input.index() == next)?;
        types.add(*input, &value.ty);
        next += 1;
    }
    let mut fresh = Vec::new();
    let mut written = vec![false; module.states.bound()];
    let mut written_once = true;
    for (at, id) in order.iter().enumerate() {
        let node = nodes.get(*id).filter(|_| id.index() == at)?;
        for (index, result) in node.results.iter().enumerate() {
            let def = Def::Node { node: *id, index };
            values.get(*result).filter(|v| v.def == def && result.index() == next)?;
            next += 1;
        }
        written_once = written_once && writes_first_version(node, &mut written);
        let before = at.checked_sub(period).and_then(|at| nodes.get(NodeId::from_index(at)));
        if let Some(before) = before.filter(|before| is_copy(module, types, before, node)) {
            before.results.iter().zip(&node.results).for_each(|(from, to)| types.add_copy(*from, *to));
        } else {
            fresh.push(*id);
            node.results.iter().for_each(|result| types.add(*result, &values[*result].ty));
        }
    }
    (next == values.len()).then_some((fresh, written_once))
}

/// Whether a node reads no state that is `written`, and writes at most a state itself, which is then written.
fn writes_first_version(node: &Node, written: &mut [bool]) -> bool {
    let stale = |o: &Operand| matches!(o, Operand::State(s) if written.get(s.index()).is_none_or(|w| *w));
    if node.operands.iter().any(stale) {
        return false;
    }
    if !node.op.traits().writes_state {
        return true;
    }
    let (Some(Operand::State(state)), Some(_)) = (node.operands.first(), node.results.first()) else {
        return false;
    };
    written[state.index()] = true;
    !node.operands[1..].contains(&Operand::State(*state))
}

/// Whether `b` is a copy of `a`; both are numbered by position.
fn is_copy(module: &Module, types: &Types<'_>, a: &Node, b: &Node) -> bool {
    let values = &module.graph.values;
    let alike = b.op == a.op
        && (a.kernel, a.joined) == (b.kernel, b.joined)
        && a.operands.len() == b.operands.len()
        && a.results.len() == b.results.len()
        && !b.loc.iter().any(|loc| loc.is_empty());
    let (true, Some(from), Some(to)) = (alike, a.results.first(), b.results.first()) else { return false };
    let shift = to.index().wrapping_sub(from.index());
    let same_type = |x: ValueId, y: ValueId| match (values.get(x), values.get(y)) {
        (Some(x), Some(y)) => x.ty == y.ty,
        _ => false,
    };
    let reads = |(x, y): (&Operand, &Operand)| match (x, y) {
        (Operand::Value(x), Operand::Value(y)) => {
            x == y || (x.index().wrapping_add(shift) == y.index() && same_type(*x, *y))
        }
        (Operand::Weight(_), Operand::Weight(_)) | (Operand::State(_), Operand::State(_)) => {
            types.declared(*y).is_some_and(|ty| types.declared(*x) == Some(ty))
        }
        _ => false,
    };
    if !a.operands.iter().zip(&b.operands).all(reads) {
        return false;
    }
    // Who writes a later version of a state is no copy of anybody.
    let written = match b.operands.first() {
        _ if !b.op.traits().writes_state => None,
        Some(Operand::State(state)) => Some(*state),
        _ => return false,
    };
    a.results.iter().zip(&b.results).enumerate().all(|(index, (x, y))| {
        let (Some(x), Some(y)) = (values.get(*x), values.get(*y)) else { return false };
        let placed = match (&x.place, &y.place) {
            (Some(Place::State(_)), Some(Place::State(state))) => index == 0 && written == Some(*state),
            (Some(Place::Output(_)), _) | (_, Some(Place::Output(_))) => false,
            (x, y) => x == y,
        };
        placed && x.ty == y.ty
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::binary::BinaryFn;
    use crate::ops::unary::UnaryFn;
    use crate::ops::{Binary, Op, Unary};
    use crate::verify::{verify, verify_whole};
    use crate::{Builder, DType, TensorType, WeightExpr};

    /// Layers of three nodes, each with a weight of its own.
    fn layers(count: usize) -> Module {
        let mut b = Builder::new("m");
        let ty = || TensorType::new(DType::F32, [4u64, 4]);
        let input = b.input("x", ty());
        let mut x = input;
        for layer in 0..count {
            let weight = b.weight(&format!("w{layer}"), ty(), WeightExpr::Splat(1.0));
            let y = b.one(Binary { function: BinaryFn::Mul }, &[x, weight], "mul").unwrap();
            let y = b.one(Unary { function: UnaryFn::Silu }, &[y], "silu").unwrap();
            x = b.one(Binary { function: BinaryFn::Add }, &[y, input], "add").unwrap();
        }
        b.output("y", x).unwrap();
        b.finish()
    }

    #[test]
    fn one_layer_stands_for_all() {
        let module = layers(200);
        let scope = Scope::without_copies(&module);
        assert_eq!(scope.order().map(|(at, _)| at).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(scope.values().count(), 4);
        let whole = Types::of(&module);
        assert!(module.graph.values.ids().all(|id| scope.types.value(id) == whole.value(id)));
        assert!(verify(&module).is_ok());
    }

    #[test]
    fn small_and_unnumbered_modules_are_checked_whole() {
        assert!(!Scope::without_copies(&layers(20)).leaves_out());
        let mut module = layers(200);
        module.graph.order.swap(300, 301);
        assert!(!Scope::without_copies(&module).leaves_out());
        assert!(verify(&module).is_err());
    }

    /// Whatever is broken in a layer is found, and reported as without copies.
    #[test]
    fn a_broken_copy_is_no_copy() {
        let at = |n: usize| NodeId::from_index(n);
        type Damage = fn(&mut Module, NodeId);
        let breaks: [(&str, Damage); 9] = [
            ("V6 value", |m, id| m.graph.nodes[id].operands[0] = Operand::Value(ValueId::from_index(9999))),
            ("V6 weight", |m, id| {
                m.graph.nodes[id].operands[1] = Operand::Weight(WeightId::from_index(9999))
            }),
            ("V7", |m, id| {
                let own = m.graph.nodes[id].results[0];
                m.graph.nodes[id].operands[0] = Operand::Value(own);
            }),
            ("V8", |m, id| {
                let result = m.graph.nodes[id].results[0];
                m.graph.values[result].ty = TensorType::new(DType::F32, [4u64, 5]);
            }),
            ("V8 op", |m, id| m.graph.nodes[id].op = Op::from(Unary { function: UnaryFn::Neg }).into()),
            ("V6 state", |m, id| m.graph.nodes[id].operands[1] = Operand::State(StateId::from_index(0))),
            ("V11 kernel", |m, id| m.graph.nodes[id].kernel = Some(KernelId::from_index(0))),
            ("V11 place", |m, id| {
                let result = m.graph.nodes[id].results[0];
                m.graph.values[result].place = Some(Place::Output(0));
            }),
            ("V14", |m, id| m.graph.nodes[id].loc[0] = "".into()),
        ];
        for (what, damage) in breaks {
            for layer in [1, 2, 99, 100, 101, 199] {
                let mut module = layers(200);
                damage(&mut module, at(3 * layer));
                let found = verify(&module).map(|_| ());
                assert!(found.is_err(), "{what} in layer {layer}");
                assert_eq!(found, verify_whole(&module), "{what} in layer {layer}");
            }
        }
    }

    /// Layers that each write a state of their own.
    #[test]
    fn states_are_followed_where_they_are_written_twice() {
        let text = |second: &str| {
            let mut text = String::from("module @m phase imported {\n  dim $pages in 1..=8\n");
            for layer in 0..200 {
                text.push_str(&format!("  state @kv{layer} : f32[$pages, 16, 2, 4]\n"));
            }
            text.push_str("  graph @main(%0 \"k\": f32[4, 2, 4], %1 \"s\": i32[2], %2 \"l\": i32[1], %3 \"b\": i32[1, 2]) -> (\"y\": f32[$pages, 16, 2, 4]) {\n");
            for layer in 0..200 {
                let (at, state) = (4 + 2 * layer, if layer == 150 { second } else { &format!("@kv{layer}") });
                text.push_str(&format!("    %{at} = silu %0 : f32[4, 2, 4]\n"));
                text.push_str(&format!(
                    "    %{} = kv_append {state}, %{at}, %1, %2, %3 : f32[$pages, 16, 2, 4]\n",
                    at + 1
                ));
            }
            text.push_str("    return %403\n  }\n}\n");
            crate::text::parse(&text).unwrap()
        };
        let once = text("@kv150");
        let scope = Scope::without_copies(&once);
        assert!(scope.leaves_out() && scope.states_written_once);
        assert!(verify(&once).is_ok());
        // A version that is read on, and one that is not.
        for (state, legal) in [("%303", true), ("@kv149", false)] {
            let module = text(state);
            let scope = Scope::without_copies(&module);
            assert!(scope.leaves_out() && !scope.states_written_once);
            assert_eq!(verify(&module).is_ok(), legal, "{state}");
            assert_eq!(verify(&module).map(|_| ()), verify_whole(&module));
        }
    }

    #[test]
    fn a_weight_of_another_type_makes_no_copy() {
        let mut module = layers(200);
        module.weights[WeightId::from_index(120)].ty = TensorType::new(DType::F32, [2u64, 4]);
        let found = verify(&module).map(|_| ());
        assert!(found.is_err());
        assert_eq!(found, verify_whole(&module));
    }
}
