//! The graph as a graph: users of values, and nodes with their edges for the algorithms of `petgraph`.
//!
//! [`Uses`] answers "who reads this value", [`Dag`] answers questions about paths. Both are computed once from a
//! [`Graph`] and borrow or copy what they need; an edit makes them stale. They tolerate broken graphs: what does not
//! exist has no edges. No algorithm here recurses, so a chain of a million nodes is fine.

use std::collections::BTreeSet;

use petgraph::Direction;
use petgraph::algo::dominators::{self, Dominators};
use petgraph::algo::{kosaraju_scc, toposort};
use petgraph::visit::{
    Dfs, GraphBase, IntoNeighbors, IntoNeighborsDirected, IntoNodeIdentifiers, NodeCount, NodeIndexable,
    VisitMap, Visitable,
};

use crate::arena::Id;
use crate::attr::Quoted;
use crate::fold;
use crate::graph::*;

/// One place where a value is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Use {
    /// The reader.
    pub node: NodeId,
    /// Which of its operands.
    pub operand: usize,
}

/// Lists per index, stored one after the other.
#[derive(Clone, Debug)]
struct Table<T> {
    starts: Vec<usize>,
    items: Vec<T>,
}

impl<T: Copy> Table<T> {
    /// Sorts pairs into `bound` lists; pairs of one list keep their order, pairs beyond `bound` are left out.
    fn new(bound: usize, pairs: &[(usize, T)]) -> Self {
        let mut starts = vec![0; bound + 1];
        for (index, _) in pairs.iter().filter(|(index, _)| *index < bound) {
            starts[index + 1] += 1;
        }
        for index in 0..bound {
            starts[index + 1] += starts[index];
        }
        let mut sorted: Vec<(usize, T)> = pairs.iter().copied().filter(|(index, _)| *index < bound).collect();
        sorted.sort_by_key(|(index, _)| *index);
        Table { starts, items: sorted.into_iter().map(|(_, item)| item).collect() }
    }

    fn list(&self, index: usize) -> &[T] {
        match (self.starts.get(index), self.starts.get(index + 1)) {
            (Some(start), Some(end)) => &self.items[*start..*end],
            _ => &[],
        }
    }
}

/// Readers of every value, in execution order. Returning a value as an output is no use.
#[derive(Clone, Debug)]
pub struct Uses(Table<Use>);

impl Uses {
    /// The uses in `graph`.
    pub fn of(graph: &Graph) -> Self {
        let mut pairs = Vec::new();
        for id in &graph.order {
            let Some(node) = graph.nodes.get(*id) else { continue };
            for (at, operand) in node.operands.iter().enumerate() {
                if let Operand::Value(value) = operand {
                    pairs.push((value.index(), Use { node: *id, operand: at }));
                }
            }
        }
        Uses(Table::new(graph.values.bound(), &pairs))
    }

    /// The readers of `value`; one that reads it twice stands twice.
    pub fn get(&self, value: ValueId) -> &[Use] {
        self.0.list(value.index())
    }

    /// The reader, if there is exactly one use.
    pub fn single(&self, value: ValueId) -> Option<Use> {
        match self.get(value) {
            [only] => Some(*only),
            _ => None,
        }
    }
}

/// Nodes and the edges between them; parallel edges are one.
#[derive(Clone, Debug)]
pub struct Dag<'a> {
    graph: &'a Graph,
    successors: Table<NodeId>,
    predecessors: Table<NodeId>,
}

impl<'a> Dag<'a> {
    /// An edge from each node to the readers of its results.
    pub fn data(graph: &'a Graph) -> Self {
        Self::from_edges(graph, data_edges(graph))
    }

    /// The edges every execution order must respect: those of [`Dag::data`], and one from each reader of a version
    /// of a state to the node that overwrites it.
    pub fn order(graph: &'a Graph) -> Self {
        let mut edges = data_edges(graph);
        let version = |operand: &Operand| match operand {
            Operand::Value(value) => Some((1, value.index())),
            Operand::State(state) => Some((0, state.index())),
            Operand::Weight(_) => None,
        };
        let writers: Vec<((u8, usize), NodeId)> = {
            let writes = graph.nodes.iter().filter(|(_, node)| node.op.traits().writes_state);
            let mut writers: Vec<_> =
                writes.filter_map(|(id, node)| Some((version(node.operands.first()?)?, id))).collect();
            writers.sort_unstable();
            writers
        };
        for (reader, node) in graph.nodes.iter() {
            for version in node.operands.iter().filter_map(version) {
                let first = writers.partition_point(|(written, _)| *written < version);
                let writes = writers[first..].iter().take_while(|(written, _)| *written == version);
                edges.extend(writes.map(|(_, writer)| (reader, *writer)).filter(|(a, b)| a != b));
            }
        }
        Self::from_edges(graph, edges)
    }

    fn from_edges(graph: &'a Graph, mut edges: Vec<(NodeId, NodeId)>) -> Self {
        edges.sort_unstable();
        edges.dedup();
        let bound = graph.nodes.bound();
        let forward: Vec<_> = edges.iter().map(|(from, to)| (from.index(), *to)).collect();
        let backward: Vec<_> = edges.iter().map(|(from, to)| (to.index(), *from)).collect();
        Dag { graph, successors: Table::new(bound, &forward), predecessors: Table::new(bound, &backward) }
    }

    /// Nodes right after `node`, by id.
    pub fn successors(&self, node: NodeId) -> &[NodeId] {
        self.successors.list(node.index())
    }

    /// Nodes right before `node`, by id.
    pub fn predecessors(&self, node: NodeId) -> &[NodeId] {
        self.predecessors.list(node.index())
    }

    /// All nodes, each after its predecessors; `None` if there is a cycle.
    pub fn toposort(&self) -> Option<Vec<NodeId>> {
        toposort(self, None).ok()
    }

    /// Whether some node precedes itself.
    pub fn is_cyclic(&self) -> bool {
        self.toposort().is_none()
    }

    /// The nodes of each cycle: strongly connected components of more than one node, or of one that reads itself.
    pub fn cycles(&self) -> Vec<Vec<NodeId>> {
        let mut found: Vec<Vec<NodeId>> = kosaraju_scc(self)
            .into_iter()
            .filter(|part| part.len() > 1 || part.iter().any(|n| self.successors(*n).contains(n)))
            .collect();
        found.iter_mut().for_each(|part| part.sort_unstable());
        found.sort_unstable();
        found
    }

    /// The nodes that `from` reaches, itself included, as a table by id.
    pub fn reachable(&self, from: NodeId) -> Reached {
        let mut reached = self.visit_map();
        if self.graph.nodes.get(from).is_some() {
            let mut walk = Dfs::new(self, from);
            while walk.next(self).is_some() {}
            reached = walk.discovered;
        }
        reached
    }

    /// Whether a path leads from `from` to `to`; a node reaches itself.
    pub fn reaches(&self, from: NodeId, to: NodeId) -> bool {
        self.reachable(from).contains(to)
    }

    /// Dominators of the nodes that `root` reaches: `a` dominates `b` if every path from `root` to `b` meets `a`.
    pub fn dominators(&self, root: NodeId) -> Dominators<NodeId> {
        dominators::simple_fast(self, root)
    }
}

fn data_edges(graph: &Graph) -> Vec<(NodeId, NodeId)> {
    let mut edges = Vec::new();
    for (id, node) in graph.nodes.iter() {
        for operand in &node.operands {
            if let Operand::Value(value) = operand
                && let Some(def) = graph.def_node(*value)
                && graph.nodes.get(def).is_some()
            {
                edges.push((def, id));
            }
        }
    }
    edges
}

/// A set of nodes as a table by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached(Vec<bool>);

impl Reached {
    /// Whether `node` is in the set.
    pub fn contains(&self, node: NodeId) -> bool {
        self.0.get(node.index()).copied().unwrap_or(false)
    }
}

impl VisitMap<NodeId> for Reached {
    fn visit(&mut self, node: NodeId) -> bool {
        self.0.get_mut(node.index()).is_some_and(|slot| !std::mem::replace(slot, true))
    }
    fn is_visited(&self, node: &NodeId) -> bool {
        self.contains(*node)
    }
    fn unvisit(&mut self, node: NodeId) -> bool {
        self.0.get_mut(node.index()).is_some_and(std::mem::take)
    }
}

impl GraphBase for Dag<'_> {
    type NodeId = NodeId;
    type EdgeId = (NodeId, NodeId);
}

impl Visitable for Dag<'_> {
    type Map = Reached;
    fn visit_map(&self) -> Reached {
        Reached(vec![false; self.graph.nodes.bound()])
    }
    fn reset_map(&self, map: &mut Reached) {
        *map = self.visit_map();
    }
}

impl NodeCount for Dag<'_> {
    fn node_count(&self) -> usize {
        self.graph.nodes.len()
    }
}

impl NodeIndexable for Dag<'_> {
    fn node_bound(&self) -> usize {
        self.graph.nodes.bound()
    }
    fn to_index(&self, node: NodeId) -> usize {
        node.index()
    }
    fn from_index(&self, index: usize) -> NodeId {
        NodeId::from_index(index)
    }
}

impl<'b> IntoNeighbors for &'b Dag<'_> {
    type Neighbors = std::iter::Copied<std::slice::Iter<'b, NodeId>>;
    fn neighbors(self, node: NodeId) -> Self::Neighbors {
        self.successors(node).iter().copied()
    }
}

impl<'b> IntoNeighborsDirected for &'b Dag<'_> {
    type NeighborsDirected = std::iter::Copied<std::slice::Iter<'b, NodeId>>;
    fn neighbors_directed(self, node: NodeId, direction: Direction) -> Self::NeighborsDirected {
        match direction {
            Direction::Outgoing => self.successors(node).iter().copied(),
            Direction::Incoming => self.predecessors(node).iter().copied(),
        }
    }
}

impl IntoNodeIdentifiers for &Dag<'_> {
    type NodeIdentifiers = std::vec::IntoIter<NodeId>;
    fn node_identifiers(self) -> Self::NodeIdentifiers {
        self.graph.nodes.ids().collect::<Vec<_>>().into_iter()
    }
}

/// The graph in the DOT language: boxes are nodes, ellipses are inputs and outputs, edges carry values. Repeated layers
/// (see [`crate::fold`]) are one box with a count; a dashed edge leads from one layer to the next.
pub fn dot(module: &Module) -> String {
    let Graph { name, inputs, outputs, nodes: _, values, order } = &module.graph;
    let groups = fold::groups(module);
    let stands = fold::representatives(module, &groups);
    let mut text = String::new();
    let mut line = |content: std::fmt::Arguments<'_>| {
        text.push_str(&content.to_string());
        text.push('\n');
    };
    line(format_args!("digraph {} {{", Quoted(name)));
    for id in inputs {
        if let Some(Value { ty, def: Def::Input(name), place: _ }) = values.get(*id) {
            let label = format!("{name}: {ty}");
            line(format_args!("  \"{id}\" [shape=ellipse, label={}];", Quoted(&label)));
        }
    }
    let shown = |id: NodeId| stands.get(id.index()).copied().unwrap_or(id);
    let mut positions = vec![0; module.graph.nodes.bound()];
    order.iter().enumerate().for_each(|(at, id)| positions[id.index()] = at);
    let draw = |id: NodeId| {
        let node = module.graph.nodes.get(id).filter(|_| shown(id) == id)?;
        Some(format!("\"{id}\" [shape=box, label={}];", Quoted(node.op.name())))
    };
    let mut at = 0;
    for (number, group) in groups.iter().enumerate() {
        order[at..group.nodes().start]
            .iter()
            .filter_map(|id| draw(*id))
            .for_each(|d| line(format_args!("  {d}")));
        at = group.nodes().end;
        let common = group.first_of(group.common_variant());
        let inside = common.map_or(0..0, |block| block.nodes.clone());
        line(format_args!("  subgraph \"cluster{number}\" {{"));
        line(format_args!("    label={};", Quoted(&group.label())));
        order[inside.clone()].iter().filter_map(|id| draw(*id)).for_each(|d| line(format_args!("    {d}")));
        line(format_args!("  }}"));
        let outside = group.nodes().filter(|position| !inside.contains(position));
        outside.filter_map(|position| draw(order[position])).for_each(|d| line(format_args!("  {d}")));
    }
    order[at..].iter().filter_map(|id| draw(*id)).for_each(|d| line(format_args!("  {d}")));
    let source = |value: ValueId| match module.graph.def_node(value) {
        Some(node) => shown(node).to_string(),
        None => value.to_string(),
    };
    // First the edges between nodes that stand for themselves, then those that others add.
    let mut drawn = BTreeSet::new();
    for folded in [false, true] {
        for id in order {
            let Some(node) = module.graph.nodes.get(*id) else { continue };
            for operand in &node.operands {
                let Operand::Value(value) = operand else { continue };
                let def = module.graph.def_node(*value);
                let own = shown(*id) == *id && def.is_none_or(|def| shown(def) == def);
                let (from, to) = (source(*value), shown(*id));
                if own == folded || (!drawn.insert((from.clone(), to)) && folded) {
                    continue;
                }
                let back =
                    folded && def.is_some_and(|d| positions[shown(d).index()] >= positions[to.index()]);
                let style = if back { ", style=dashed, constraint=false" } else { "" };
                line(format_args!("  \"{from}\" -> \"{to}\" [label=\"{value}\"{style}];"));
            }
        }
    }
    for (n, Output { name, value }) in outputs.iter().enumerate() {
        line(format_args!("  \"out{n}\" [shape=ellipse, label={}];", Quoted(name)));
        line(format_args!("  \"{}\" -> \"out{n}\" [label=\"{value}\"];", source(*value)));
    }
    line(format_args!("}}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::parse;

    /// `n0` branches into `n1` and `n2`, which meet in `n3`; `n4` stands beside.
    fn diamond() -> Module {
        parse(
            r#"module @m phase imported {
  graph @main(%0 "x": f32[4]) -> ("y": f32[4], "z": f32[4]) {
    %1 = mul %0, %0 : f32[4]
    %2 = exp %1 : f32[4]
    %3 = silu %1 : f32[4]
    %4 = add %2, %3 : f32[4]
    %5 = exp %0 : f32[4]
    return %4, %5
  }
}"#,
        )
        .unwrap()
    }

    fn n(index: usize) -> NodeId {
        NodeId::from_index(index)
    }

    fn v(index: usize) -> ValueId {
        ValueId::from_index(index)
    }

    #[test]
    fn a_square_uses_its_operand_twice() {
        let module = diamond();
        let uses = Uses::of(&module.graph);
        let of_input: Vec<(NodeId, usize)> = uses.get(v(0)).iter().map(|u| (u.node, u.operand)).collect();
        assert_eq!(of_input, [(n(0), 0), (n(0), 1), (n(4), 0)]);
        assert_eq!(uses.get(v(4)), []);
        assert_eq!(uses.get(v(99)), []);
        assert_eq!(uses.single(v(2)), Some(Use { node: n(3), operand: 0 }));
        assert_eq!(uses.single(v(1)), None);
    }

    #[test]
    fn uses_follow_the_order_and_not_the_ids() {
        let mut module = diamond();
        module.graph.order = [0, 2, 1, 3, 4].map(n).to_vec();
        let users: Vec<NodeId> = Uses::of(&module.graph).get(v(1)).iter().map(|u| u.node).collect();
        assert_eq!(users, [n(2), n(1)]);
    }

    #[test]
    fn paths_and_dominators_of_a_diamond() {
        let module = diamond();
        let dag = Dag::data(&module.graph);
        assert_eq!(dag.successors(n(0)), [n(1), n(2)]);
        assert_eq!(dag.predecessors(n(3)), [n(1), n(2)]);
        assert!(dag.reaches(n(0), n(3)) && dag.reaches(n(1), n(1)));
        assert!(!dag.reaches(n(1), n(2)) && !dag.reaches(n(0), n(4)) && !dag.reaches(n(9), n(0)));
        let dominators = dag.dominators(n(0));
        assert_eq!(dominators.immediate_dominator(n(3)), Some(n(0)));
        assert_eq!(dominators.immediate_dominator(n(1)), Some(n(0)));
        let sorted = dag.toposort().unwrap();
        let place = |node| sorted.iter().position(|x| *x == node).unwrap();
        assert_eq!(sorted.len(), 5);
        for (before, after) in [(0, 1), (0, 2), (1, 3), (2, 3)] {
            assert!(place(n(before)) < place(n(after)));
        }
    }

    #[test]
    fn removed_nodes_leave_holes_and_no_edges() {
        let mut module = diamond();
        module.graph.order.retain(|id| *id != n(1));
        module.graph.remove_node(n(1));
        let dag = Dag::data(&module.graph);
        assert_eq!(dag.node_count(), 4);
        assert_eq!(dag.successors(n(0)), [n(2)]);
        assert_eq!(dag.toposort().unwrap().len(), 4);
        assert!(!dag.reachable(n(1)).contains(n(3)));
    }

    #[test]
    fn cycles_are_named() {
        let mut module = diamond();
        assert!(Dag::data(&module.graph).cycles().is_empty());
        module.graph.nodes[n(1)].operands[0] = Operand::Value(v(4));
        module.graph.nodes[n(4)].operands[0] = Operand::Value(v(5));
        let dag = Dag::data(&module.graph);
        assert!(dag.is_cyclic());
        assert_eq!(dag.cycles(), [vec![n(1), n(3)], vec![n(4)]]);
    }

    #[test]
    fn readers_of_a_state_precede_its_writer() {
        let module = parse(include_str!("../tests/modules/imported.ir")).unwrap();
        let graph = &module.graph;
        let write = graph.nodes.iter().find(|(_, node)| node.op.name() == "kv_append").unwrap().0;
        let read =
            graph.nodes.iter().find(|(_, node)| node.operands.contains(&graph.nodes[write].operands[0]));
        let read = read.unwrap().0;
        assert_ne!(read, write);
        assert!(!Dag::data(graph).reaches(read, write));
        assert!(Dag::order(graph).reaches(read, write));
        assert!(!Dag::order(graph).is_cyclic());
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let mut module = Module::new("chain");
        let mut last = module.graph.values.push(Value {
            ty: crate::types::TensorType::new(crate::dtype::DType::F32, [4usize]),
            def: Def::Input("x".into()),
            place: None,
        });
        module.graph.inputs.push(last);
        let op = diamond().graph.nodes[n(1)].op.clone();
        for _ in 0..100_000 {
            let node = module.new_node(op.clone(), vec![Operand::Value(last)], Vec::new()).unwrap();
            module.graph.order.push(node);
            last = module.graph.nodes[node].results[0];
        }
        let dag = Dag::data(&module.graph);
        assert_eq!(dag.toposort().unwrap(), module.graph.order);
        assert!(dag.cycles().is_empty());
        assert!(dag.reaches(n(0), n(99_999)));
    }

    #[test]
    fn dot_shows_every_edge_once() {
        let text = dot(&diamond());
        assert!(text.starts_with("digraph \"main\" {\n"));
        assert!(text.contains("\"%0\" [shape=ellipse, label=\"x: f32[4]\"];"));
        assert!(text.contains("\"n0\" -> \"n1\" [label=\"%1\"];"));
        assert!(text.contains("\"n3\" -> \"out0\" [label=\"%4\"];"));
        assert_eq!(text.matches("\"%0\" -> \"n0\"").count(), 2);
    }
}
