//! Repeated layers, found by their source names, so that a model of a hundred layers can be shown as one.
//!
//! A **layer** is named by the first number between the dots of a source name: `model.layers.12.mlp` is number 12 of
//! the stem `model.layers`. A **block** is a stretch of the execution order that belongs to one layer; a **group** is
//! a run of blocks with one stem. Blocks of a group with equal ops, attributes, types and kernels are of one
//! **variant**; names of weights and values do not count. Nothing is lost by folding: each block keeps its place in
//! the order. This module knows no output format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use crate::arena::Id;
use crate::graph::*;

/// Largest block whose nodes are aligned with another variant's; the cost is the product of both lengths.
const ALIGN_LIMIT: usize = 1024;

/// The nodes of one layer, a stretch of the execution order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Number of the layer.
    pub index: u64,
    /// Positions in the execution order.
    pub nodes: Range<usize>,
    /// Blocks of a group with one number are equal; numbers count from 0 in the order of first appearance.
    pub variant: usize,
}

/// At least two blocks in a row whose layers share a stem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What stands before the number, such as `model.layers`.
    pub stem: String,
    /// Blocks in execution order.
    pub blocks: Vec<Block>,
}

impl Group {
    /// The variant with most blocks, the first of those that tie.
    pub fn common_variant(&self) -> usize {
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        self.blocks.iter().for_each(|b| *counts.entry(b.variant).or_default() += 1);
        counts.into_iter().max_by_key(|(variant, count)| (*count, usize::MAX - variant)).map_or(0, |(v, _)| v)
    }

    /// The first block of a variant.
    pub fn first_of(&self, variant: usize) -> Option<&Block> {
        self.blocks.iter().find(|b| b.variant == variant)
    }

    /// Positions of all its nodes.
    pub fn nodes(&self) -> Range<usize> {
        let start = self.blocks.first().map_or(0, |b| b.nodes.start);
        start..self.blocks.last().map_or(start, |b| b.nodes.end)
    }

    /// Such as `model.layers.0..31 × 32`.
    pub fn label(&self) -> String {
        let first = self.blocks.first().map_or(0, |b| b.index);
        let last = self.blocks.last().map_or(0, |b| b.index);
        format!("{}.{first}..{last} × {}", self.stem, self.blocks.len())
    }
}

/// Stem and number of the layer that a source name belongs to.
///
/// ```
/// use millrace_ir::fold::layer;
/// assert_eq!(layer("model.layers.12.mlp"), Some(("model.layers", 12)));
/// assert_eq!(layer("model.norm"), None);
/// ```
pub fn layer(name: &str) -> Option<(&str, u64)> {
    let mut start = 0;
    for part in name.split('.') {
        if start > 0
            && part.bytes().all(|b| b.is_ascii_digit())
            && let Ok(number) = part.parse()
        {
            return Some((&name[..start - 1], number));
        }
        start += part.len() + 1;
    }
    None
}

/// The name with each number replaced by `*`, equal for the same part of every layer.
pub fn generalise(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            '0'..='9' if out.ends_with('*') => {}
            '0'..='9' => out.push('*'),
            other => out.push(other),
        }
    }
    out
}

/// The groups of a module in execution order.
pub fn groups(module: &Module) -> Vec<Group> {
    let order = &module.graph.order;
    let layers = layers(module);
    let signatures = signatures(module);
    let mut runs: Vec<Group> = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let Some((stem, index)) = layer else { continue };
        let continues = |group: &&mut Group| group.stem == *stem && group.nodes().end == at;
        match runs.last_mut().filter(continues) {
            Some(group) => match group.blocks.last_mut() {
                Some(block) if block.index == *index => block.nodes.end = at + 1,
                _ => group.blocks.push(Block { index: *index, nodes: at..at + 1, variant: 0 }),
            },
            None => runs.push(Group {
                stem: stem.to_string(),
                blocks: vec![Block { index: *index, nodes: at..at + 1, variant: 0 }],
            }),
        }
    }
    runs.retain(|group| group.blocks.len() > 1);
    for group in &mut runs {
        let mut variants: BTreeMap<&[u32], usize> = BTreeMap::new();
        for block in &mut group.blocks {
            let next = variants.len();
            block.variant = *variants.entry(&signatures[block.nodes.clone()]).or_insert(next);
        }
    }
    debug_assert!(runs.iter().all(|g| g.nodes().end <= order.len()));
    runs
}

/// The layer of each position: the lowest of the node's source names. A node that stands among the nodes of a later
/// layer counts to that one, and so does a node without a layer that stands between nodes of one layer.
fn layers(module: &Module) -> Vec<Option<(&str, u64)>> {
    let own = |id: &NodeId| module.graph.nodes.get(*id)?.loc.iter().filter_map(|l| layer(l)).min();
    let mut found: Vec<Option<(&str, u64)>> = module.graph.order.iter().map(own).collect();
    let mut current: Option<(usize, &str, u64)> = None;
    for at in 0..found.len() {
        let Some((stem, index)) = found[at] else { continue };
        let index = match current {
            Some((before, last_stem, last)) if last_stem == stem && index <= last => {
                found[before + 1..at].iter_mut().for_each(|slot| *slot = Some((stem, last)));
                last
            }
            _ => index,
        };
        found[at] = Some((stem, index));
        current = Some((at, stem, index));
    }
    found
}

/// A number for each position, equal for nodes that differ in names only.
fn signatures(module: &Module) -> Vec<u32> {
    let mut known: BTreeMap<String, u32> = BTreeMap::new();
    let mut list = Vec::with_capacity(module.graph.order.len());
    for id in &module.graph.order {
        let mut text = String::new();
        if let Some(node) = module.graph.nodes.get(*id) {
            text.push_str(node.op.name());
            node.op.attrs().0.iter().for_each(|(key, value)| {
                let _ = write!(text, " {key}={value}");
            });
            for operand in &node.operands {
                let tag = match operand {
                    Operand::Value(_) => 'v',
                    Operand::Weight(_) => 'w',
                    Operand::State(_) => 's',
                };
                let _ = write!(text, " {tag}{}", module.operand_type(*operand));
            }
            for value in node.results.iter().filter_map(|r| module.graph.values.get(*r)) {
                let _ = write!(text, " -> {}", value.ty);
            }
            if let Some(kernel) = node.kernel {
                let _ = write!(text, " via {kernel}");
            }
        }
        let next = known.len() as u32;
        list.push(*known.entry(text).or_insert(next));
    }
    list
}

/// Which node stands for which when every group is shown by its common variant: itself for nodes outside of groups
/// and for nodes that the common variant lacks. Variants are aligned by op names; a variant of which less than three
/// quarters align is shown by itself, once.
pub fn representatives(module: &Module, groups: &[Group]) -> Vec<NodeId> {
    let order = &module.graph.order;
    let mut stands: Vec<NodeId> = (0..module.graph.nodes.bound()).map(NodeId::from_index).collect();
    let op = |at: usize| module.graph.nodes.get(order[at]).map_or("", |n| n.op.name());
    for group in groups {
        let Some(shown) = group.first_of(group.common_variant()) else { continue };
        for block in &group.blocks {
            let first = group.first_of(block.variant).unwrap_or(block);
            let pairs = if block.variant == shown.variant {
                block.nodes.clone().zip(shown.nodes.clone()).collect()
            } else {
                let pairs = align(block.nodes.clone(), shown.nodes.clone(), &op);
                let near = pairs.len() * 4 >= block.nodes.len().max(shown.nodes.len()) * 3;
                if near { pairs } else { block.nodes.clone().zip(first.nodes.clone()).collect() }
            };
            pairs.into_iter().for_each(|(at, to)| stands[order[at].index()] = order[to]);
        }
    }
    stands
}

/// Longest common subsequence of two stretches by op name, as pairs of positions.
fn align<'m>(a: Range<usize>, b: Range<usize>, op: &dyn Fn(usize) -> &'m str) -> Vec<(usize, usize)> {
    let (n, m) = (a.len(), b.len());
    if n > ALIGN_LIMIT || m > ALIGN_LIMIT {
        return Vec::new();
    }
    let (left, right): (Vec<&str>, Vec<&str>) = (a.clone().map(op).collect(), b.clone().map(op).collect());
    // longest[i * (m + 1) + j]: best length of the tails that start at i and j.
    let mut longest = vec![0u16; (n + 1) * (m + 1)];
    let at = |i: usize, j: usize| i * (m + 1) + j;
    for i in (0..n).rev() {
        for j in (0..m).rev() {
            longest[at(i, j)] = if left[i] == right[j] {
                longest[at(i + 1, j + 1)] + 1
            } else {
                longest[at(i + 1, j)].max(longest[at(i, j + 1)])
            };
        }
    }
    let (mut i, mut j, mut pairs) = (0, 0, Vec::new());
    while i < n && j < m {
        // Skipping a node that occurs on one side only is preferred to pairing it with a later twin.
        if longest[at(i + 1, j)] == longest[at(i, j)] {
            i += 1;
        } else if longest[at(i, j + 1)] == longest[at(i, j)] {
            j += 1;
        } else {
            pairs.push((a.start + i, b.start + j));
            (i, j) = (i + 1, j + 1);
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::parse;

    /// Three layers of `exp, add`; the first has a leading `neg`, the last adds by `mul`.
    fn stack() -> Module {
        parse(
            r#"module @m phase imported {
  graph @main(%0 "x": f32[4]) -> ("y": f32[4]) {
    %1 = tanh %0 : f32[4] loc(embed)
    %2 = neg %1 : f32[4] loc(m.h.0.norm)
    %3 = exp %2 : f32[4] loc(m.h.0.act)
    %4 = abs %3 : f32[4]
    %5 = add %4, %1 : f32[4] loc(m.h.0, m.h.1.norm)
    %6 = exp %5 : f32[4] loc(m.h.1.act)
    %7 = abs %6 : f32[4]
    %8 = add %7, %5 : f32[4] loc(m.h.1)
    %9 = exp %8 : f32[4] loc(m.h.2.act)
    %10 = abs %9 : f32[4]
    %11 = add %10, %8 : f32[4] loc(m.h.2)
    %12 = silu %11 : f32[4] loc(head)
    return %12
  }
}"#,
        )
        .unwrap()
    }

    #[test]
    fn layers_fold_into_variants() {
        let found = groups(&stack());
        let [group] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(group.label(), "m.h.0..2 × 3");
        let blocks: Vec<_> = group.blocks.iter().map(|b| (b.index, b.nodes.clone(), b.variant)).collect();
        assert_eq!(blocks, [(0, 1..5, 0), (1, 5..8, 1), (2, 8..11, 1)]);
        assert_eq!(group.common_variant(), 1);
    }

    #[test]
    fn a_near_variant_is_shown_by_the_common_one() {
        let module = stack();
        let stands = representatives(&module, &groups(&module));
        let name = |at: usize| stands[at].index();
        // `neg` is the first layer's own; the others of layers 0 and 2 are shown by layer 1.
        assert_eq!((0..12).map(name).collect::<Vec<_>>(), [0, 1, 5, 6, 7, 5, 6, 7, 5, 6, 7, 11]);
    }

    #[test]
    fn dot_draws_repeated_layers_once() {
        let text = crate::dag::dot(&stack());
        assert_eq!(text.matches("× 3").count(), 1);
        let boxes = |op: &str| text.matches(&format!("shape=box, label=\"{op}\"")).count();
        assert_eq!(["tanh", "neg", "exp", "abs", "add", "silu"].map(boxes), [1; 6]);
        // From the addition of one layer to `exp` of the next, and to the addition of the next.
        assert_eq!(text.matches("style=dashed").count(), 2);
        assert!(text.contains("\"n7\" -> \"n5\" [label=\"%5\", style=dashed, constraint=false];"));
    }

    #[test]
    fn names_without_a_number_are_no_layers() {
        assert_eq!(layer("0.weight"), None);
        assert_eq!(layer("a.1x.b"), None);
        assert_eq!(layer("a..b.7"), Some(("a..b", 7)));
        assert_eq!(layer("a.99999999999999999999.b"), None);
        assert_eq!(generalise("kv12.k+h.3.w.pack32"), "kv*.k+h.*.w.pack*");
    }

    #[test]
    fn one_block_is_no_group() {
        let mut module = stack();
        module.graph.order.truncate(5);
        assert_eq!(groups(&module), []);
    }
}
