//! Joins nodes that the target's kernels run in one launch, before memory is planned: what a group reads stays alive until
//! its end, and what it writes is alive from its beginning.
//!
//! ```text
//! rms_norm %0 ; matmul.fused %1, @w           ->  the matmul joined: its kernel normalises the rows it reads
//! rope q ; rope k ; kv_append k ; kv_append v  ->  one group: rotated keys go straight to the cache
//! .. ; paged_attention                         ->  the same group, if it alone reads the rotated queries
//! ```
//!
//! Nodes are not moved: the members of a group have to stand next to each other; views may stand between them.

use std::ops::Range;

use millrace_ir::{Def, Module, Node, NodeId, Op, Operand, Phase, Result, ValueId};

use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct GroupLaunches;

impl Pass for GroupLaunches {
    fn name(&self) -> &'static str {
        "group-launches"
    }
    fn help(&self) -> &'static str {
        "joins nodes that one launch runs: a norm and its matmul; rope, cache writes and attention"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Scheduled, Phase::Scheduled)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        if !context.launch_groups {
            return Ok(false);
        }
        let readers = readers(module);
        let order = module.graph.order.clone();
        let mut joined = 0;
        let mut at = 0;
        while at < order.len() {
            let end = match norm_and_matmul(module, context, &readers, &order, at) {
                Some(end) => end,
                None => match cache_run(module, &order, at) {
                    end if end > at + 1 => with_attention(module, context, &readers, &order, at..end),
                    end => end,
                },
            };
            if end > at + 1 && context.allow(self.name(), &module.graph, order[at]) {
                order[at + 1..end].iter().for_each(|id| module.graph.nodes[*id].joined = true);
                joined += 1;
            }
            at = end;
        }
        context.count("group-launches.groups", joined);
        Ok(joined > 0)
    }
}

/// How many operands and outputs read each value.
fn readers(module: &Module) -> Vec<usize> {
    use millrace_ir::Id;
    let mut readers = vec![0; module.graph.values.bound()];
    let operands = module.graph.nodes.iter().flat_map(|(_, n)| &n.operands);
    let values = operands.filter_map(|o| if let Operand::Value(v) = o { Some(*v) } else { None });
    values.chain(module.graph.outputs.iter().map(|o| o.value)).for_each(|v| readers[v.index()] += 1);
    readers
}

/// One past a norm and the matmul behind it that alone reads the norm.
fn norm_and_matmul(
    module: &Module,
    context: &mut Context,
    readers: &[usize],
    order: &[NodeId],
    at: usize,
) -> Option<usize> {
    use millrace_ir::Id;
    let graph = &module.graph;
    let norm = &graph.nodes[order[at]];
    if !matches!(*norm.op, Op::RmsNorm(_)) {
        return None;
    }
    let normed = norm.results[0];
    let mut blocked = |reason: &str| {
        context.blocked("group-launches", graph, order[at], reason);
        None
    };
    if readers[normed.index()] != 1 {
        return blocked("the norm has other readers than one matmul");
    }
    let Some(next) = order.get(at + 1) else { return blocked("nothing reads the norm") };
    let matmul = &graph.nodes[*next];
    let reads = matmul.operands.first() == Some(&Operand::Value(normed));
    match &*matmul.op {
        Op::FusedMatmul(op) if reads && op.cores => Some(at + 2),
        Op::FusedMatmul(_) if reads => blocked("the matmul's weight is not in cores"),
        _ => blocked("the node behind the norm is no matmul that reads it"),
    }
}

/// One past the run of rope, cache writes and views that begins at `at`, if it writes a cache and does more than that;
/// else one past `at`.
fn cache_run(module: &Module, order: &[NodeId], at: usize) -> usize {
    let graph = &module.graph;
    let op = |index: usize| order.get(index).map(|id| &graph.nodes[*id].op);
    let counts = |op: &Op| matches!(op, Op::Rope(_) | Op::KvAppend(_));
    let mut end = at;
    while op(end).is_some_and(|op| counts(op) || matches!(**op, Op::Reshape(_))) {
        end += 1;
    }
    // Views behind the last rope or write belong to what follows.
    while end > at && op(end - 1).is_some_and(|op| !counts(op)) {
        end -= 1;
    }
    let run = &order[at..end];
    let number = |f: fn(&Op) -> bool| run.iter().filter(|id| f(&graph.nodes[**id].op)).count();
    let (ropes, writes) =
        (number(|op| matches!(op, Op::Rope(_))), number(|op| matches!(op, Op::KvAppend(_))));
    // One step of one layer: the writes go to different states at the same positions.
    let paging = |id: &NodeId| graph.nodes[*id].operands.get(2..).map(<[Operand]>::to_vec);
    let appends: Vec<&NodeId> =
        run.iter().filter(|id| matches!(*graph.nodes[**id].op, Op::KvAppend(_))).collect();
    let same = appends.windows(2).all(|pair| paging(pair[0]) == paging(pair[1]));
    let first_versions = appends.iter().all(|id| {
        let state = graph.nodes[**id].operands[0];
        let written_here = |v| matches!(graph.values[v].def, Def::Node { node, .. } if run.contains(&node));
        !matches!(state, Operand::Value(v) if written_here(v))
    });
    if ropes <= 2 && writes == 2 && ropes + writes > 2 && same && first_versions { end } else { at + 1 }
}

/// One past the attention node behind a run of ropes and cache writes, if it joins them: it reads the queries and the cache
/// that they make, and nobody else reads what they rotate. Else the end of the run.
fn with_attention(
    module: &Module,
    context: &mut Context,
    readers: &[usize],
    order: &[NodeId],
    run: Range<usize>,
) -> usize {
    use millrace_ir::Id;
    let graph = &module.graph;
    let is_view = |id: &&NodeId| matches!(*graph.nodes[**id].op, Op::Reshape(_));
    let at = run.end + order[run.end..].iter().take_while(is_view).count();
    let Some(attention) = order.get(at) else { return run.end };
    if !matches!(*graph.nodes[*attention].op, Op::PagedAttention(_)) {
        return run.end;
    }
    let group = &order[run.start..=at];
    let mut blocked = |reason: &str| {
        context.blocked("group-launches", graph, *attention, reason);
        run.end
    };
    // Who reads a rotated value through views, if it is one node of the group.
    let reader = |mut value: ValueId| loop {
        if readers[value.index()] != 1 {
            return None;
        }
        let reads = |id: &&NodeId| graph.nodes[**id].operands.contains(&Operand::Value(value));
        let id = *group.iter().find(reads)?;
        let Node { op, results, .. } = &graph.nodes[id];
        match **op {
            Op::Reshape(_) => value = results[0],
            _ => return Some(id),
        }
    };
    let of = |f: fn(&Op) -> bool| group.iter().filter(move |id| f(&graph.nodes[**id].op));
    let rotated: Vec<Option<NodeId>> =
        of(|op| matches!(op, Op::Rope(_))).map(|id| reader(graph.nodes[*id].results[0])).collect();
    let appends: Vec<NodeId> = of(|op| matches!(op, Op::KvAppend(_))).copied().collect();
    let operands = &graph.nodes[*attention].operands;
    let written = |operand: &Operand| {
        appends.iter().find(|id| *operand == Operand::Value(graph.nodes[**id].results[0]))
    };
    let (Some(keys), Some(values)) = (written(&operands[1]), written(&operands[2])) else {
        return blocked("attention reads another cache than the one written before it");
    };
    if operands[3..] != graph.nodes[*keys].operands[2..] || keys == values {
        return blocked("attention looks up other pages than the writes before it");
    }
    if rotated.iter().any(Option::is_none) {
        return blocked("rotated queries or keys have other readers than attention and the cache");
    }
    if rotated.len() != 2 || !rotated.contains(&Some(*attention)) || !rotated.contains(&Some(*keys)) {
        return blocked("attention's queries or keys are not rotated next to it");
    }
    at + 1
}
