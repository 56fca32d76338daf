//! The plan checker: recomputes lifetimes on its own and sweeps over the values that are alive together. Shares no code with the
//! planner, so that a mistake there cannot hide here.

use std::collections::BTreeMap;

use crate::arena::Id;
use crate::dim::Bindings;
use crate::distinct::{Dims, Types};
use crate::graph::*;

/// Two values that are alive together in the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// One value, empty text form if it has no place.
    pub first: ValueId,
    /// The other.
    pub second: ValueId,
    /// Why that is wrong.
    pub message: String,
}

/// Checks the places of a planned module under `bindings`.
///
/// # Errors
/// The first overlap found, or a value whose place has no number here.
pub fn check(module: &Module, bindings: &Bindings) -> Result<(), Overlap> {
    check_all(module, &[bindings])
}

/// [`check`] under each of `many` bindings.
///
/// # Errors
/// As [`check`].
pub fn check_all(module: &Module, many: &[&Bindings]) -> Result<(), Overlap> {
    let types = Types::of(module);
    let mut lives = Lives::of(module);
    many.iter().try_for_each(|bindings| {
        lives.place(module, &types, bindings)?;
        lives.sweep(module)
    })
}

/// A value in an arena.
struct Placed {
    value: ValueId,
    arena: ArenaId,
    /// Its bytes under the bindings that are checked.
    low: u64,
    high: u64,
    /// Position of the node that writes it, and of the last that reads it, or its own: even an unread result is written,
    /// hence alive for that instant.
    writer: u32,
    reader: u32,
}

impl Placed {
    /// Instants: node k writes at 2k + 1 and reads at 2k.
    fn born(&self) -> usize {
        2 * self.writer as usize + 1
    }

    fn dies(&self) -> usize {
        2 * self.reader as usize + 2
    }
}

/// The values in arenas, in order of birth, and when they live: the same under all bindings.
struct Lives {
    placed: Vec<Placed>,
    /// Which of them a value is.
    index: Vec<u32>,
    /// Where the launch group of each node begins, and its last node: every node of a group may read and write at any of its
    /// instants.
    begins: Vec<u32>,
    ends: Vec<u32>,
    /// For each node the last that dies with its group, and for each one the next that dies with the same.
    last_death: Vec<u32>,
    next_death: Vec<u32>,
}

const NOTHING: u32 = u32::MAX;

impl Lives {
    fn of(module: &Module) -> Self {
        let graph = &module.graph;
        let nodes = graph.order.len();
        let mut begins: Vec<u32> = Vec::with_capacity(nodes);
        let mut index = vec![NOTHING; graph.values.bound()];
        let mut placed: Vec<Placed> = Vec::with_capacity(graph.values.len());
        for (at, id) in graph.order.iter().enumerate() {
            let node = &graph.nodes[*id];
            begins.push(match begins.last() {
                Some(begin) if node.joined => *begin,
                _ => at as u32,
            });
            // Whatever is read here was written before.
            for operand in &node.operands {
                if let Operand::Value(v) = operand
                    && let Some(p) = placed.get_mut(index[v.index()] as usize)
                {
                    p.reader = p.reader.max(at as u32);
                }
            }
            for result in &node.results {
                let Some(Place::Arena { arena, .. }) = graph.values[*result].place else { continue };
                index[result.index()] = placed.len() as u32;
                let at = at as u32;
                placed.push(Placed { value: *result, arena, low: 0, high: 0, writer: at, reader: at });
            }
        }
        let mut ends: Vec<u32> = (0..nodes as u32).collect();
        for at in (1..nodes).rev() {
            if begins[at] == begins[at - 1] {
                ends[at - 1] = ends[at];
            }
        }
        let mut last_death = vec![NOTHING; nodes];
        let mut next_death = vec![NOTHING; placed.len()];
        for (i, p) in placed.iter().enumerate() {
            next_death[i] = std::mem::replace(&mut last_death[ends[p.reader as usize] as usize], i as u32);
        }
        Lives { placed, index, begins, ends, last_death, next_death }
    }

    /// The first instant of the group that writes a value.
    fn group_born(&self, placed: &Placed) -> usize {
        2 * self.begins[placed.writer as usize] as usize + 1
    }

    /// The last instant of the group that reads it last.
    fn group_dies(&self, placed: &Placed) -> usize {
        2 * self.ends[placed.reader as usize] as usize + 2
    }

    /// Computes where everything lies under `bindings`.
    fn place(&mut self, module: &Module, types: &Types<'_>, bindings: &Bindings) -> Result<(), Overlap> {
        let sizes: Vec<Option<u64>> = types.list().iter().map(|t| t.bytes().extent(bindings)).collect();
        let mut known: Dims<'_, u64> = Dims::new();
        for placed in &mut self.placed {
            let value = &module.graph.values[placed.value];
            let Some(Place::Arena { offset, .. }) = &value.place else { continue };
            let low = match known.get(offset, 0) {
                Some(low) => Some(*low),
                None => offset.extent(bindings).inspect(|low| known.remember(offset, 0, *low)),
            };
            let Some((low, bytes)) = low.zip(sizes[types.value(placed.value) as usize]) else {
                let message = format!("offset {offset} or size of {} has no value", value.ty);
                return Err(Overlap { first: placed.value, second: placed.value, message });
            };
            (placed.low, placed.high) = (low, low.saturating_add(bytes));
        }
        Ok(())
    }

    /// Compares what is alive together.
    fn sweep(&self, module: &Module) -> Result<(), Overlap> {
        let graph = &module.graph;
        let Lives { placed, index, begins, ends: _, last_death, next_death } = self;
        // A node may write over an operand that it names as its in-place operand, at the same offset.
        let shares = |a: &Placed, b: &Placed| {
            let Def::Node { node, index } = graph.values[b.value].def else { return false };
            let Some(node) = graph.nodes.get(node) else { return false };
            let traits = node.op.traits();
            let named = traits.in_place.and_then(|i| node.operands.get(i));
            let takes_over = index == 0 && named == Some(&Operand::Value(a.value)) && a.low == b.low;
            let read_once = node.operands.iter().filter(|o| **o == Operand::Value(a.value)).count() == 1;
            // Nobody else of the group may still read what the node writes over.
            let at = b.writer as usize;
            let in_group = graph.order[begins[at] as usize..at]
                .iter()
                .filter_map(|id| graph.nodes.get(*id))
                .any(|other| !other.op.traits().view && other.operands.contains(&Operand::Value(a.value)));
            takes_over && (traits.view || (a.dies() == b.born() + 1 && read_once && !in_group))
        };
        // Views of one buffer may live together; find the buffer each view starts from. With `in_place`, also through nodes
        // that replace their operand.
        let root = |start: &Placed, in_place: bool| {
            let mut value = start.value;
            for _ in 0..graph.order.len() {
                let Def::Node { node, index: 0 } = graph.values[value].def else { break };
                let node = &graph.nodes[node];
                let traits = node.op.traits();
                let from =
                    traits.in_place.filter(|_| in_place || traits.view).and_then(|o| node.operands.get(o));
                match from {
                    Some(Operand::Value(from)) if index[from.index()] != NOTHING => value = *from,
                    _ => break,
                }
            }
            value
        };
        let fits = |a: &Placed, b: &Placed| -> Result<(), Overlap> {
            let apart = a.arena != b.arena || a.high <= b.low || b.high <= a.low;
            let together = a.born() < b.dies() && b.born() < a.dies();
            let in_group = self.group_born(a) < self.group_dies(b) && self.group_born(b) < self.group_dies(a);
            if apart || !in_group || shares(a, b) || shares(b, a) {
                return Ok(());
            }
            // What a group replaces step by step is one piece of memory while nobody reads what was replaced.
            if a.low == b.low && root(a, !together) == root(b, !together) {
                return Ok(());
            }
            let message = format!(
                "{} at {}..{} and {} at {}..{} are alive together",
                a.value, a.low, a.high, b.value, b.low, b.high
            );
            Err(Overlap { first: a.value, second: b.value, message })
        };
        // A sweep over time. What is alive lies in groups of one offset, and groups are disjoint but for the exceptions
        // above; so a newcomer is compared with the groups that begin inside it and with the last one that begins below.
        let mut deaths = last_death.iter();
        let mut instant = 2;
        let mut alive: BTreeMap<(ArenaId, u64, usize), u64> = BTreeMap::new();
        for (i, new) in placed.iter().enumerate() {
            while instant <= self.group_born(new) {
                let mut dead = deaths.next().copied().unwrap_or(NOTHING);
                while let Some(Placed { arena, low, .. }) = placed.get(dead as usize) {
                    alive.remove(&(*arena, *low, dead as usize));
                    dead = next_death[dead as usize];
                }
                instant += 2;
            }
            let mut group = None;
            for ((arena, low, other), high) in alive.range(..(new.arena, new.high.max(new.low + 1), 0)).rev()
            {
                if *arena != new.arena || group.is_some_and(|g| g != *low) {
                    break;
                }
                fits(&placed[*other], new)?;
                // Below the newcomer only groups that may reach into it matter; an empty one says nothing.
                if *low < new.low && *high > *low {
                    group = Some(*low);
                }
            }
            alive.insert((new.arena, new.low, i), new.high);
        }
        Ok(())
    }
}
