//! Rotary position embedding and writes to the paged cache: `rope` alone, `kv_append` alone, and the launch group of a
//! decoder layer, `rope q, rope k, kv_append k, kv_append v`, as one launch that rotates keys on their way to the cache.
//!
//! Angles are counted in turns, as a sum of two floats: the kernel's product with the position is exact before whole
//! turns are dropped, so that sines are as good at position 100,000 as at 1, without the slow reduction of `sincosf`.

use millrace_ir::ops::rope::{Rope, RopeLayout};
use millrace_ir::{DType, Def, Dim, Node, Op, Operand, ValueId};

use super::attention::SEQUENCES;
use super::plan::{Argument, Planned, Site, SiteLaunch, SiteVariant, between};
use super::source::{Promise, SourceWriter, float_table};

/// Up to this many rows every thread has one head; beyond, heads share sines and cosines.
const FEW_ROWS: u64 = 64;

/// Plans a site of `rope` and `kv_append` nodes with reshapes between.
pub fn plan(site: Site<'_>) -> Option<Planned> {
    if matches!(site.last_op(), Op::PagedAttention(_)) {
        return None;
    }
    let parts = Parts::of(site)?;
    if let Some(planned) = Group::of(&parts).and_then(|group| group.plan()) {
        return Some(planned);
    }
    // Any other mix runs node by node.
    let mut variants = [Vec::new(), Vec::new()];
    for node in &parts.nodes {
        match &*node.op {
            Op::Rope(rope) => {
                let launches = rotate(&parts, node, rope)?;
                variants.iter_mut().zip(launches).for_each(|(all, own)| all.push(own));
            }
            _ => {
                let launch = append(&parts, node)?;
                variants.iter_mut().for_each(|all| all.push(launch.clone()));
            }
        }
    }
    let rope = parts.nodes.iter().find(|n| matches!(*n.op, Op::Rope(_)));
    let [few, many] = variants;
    Some(match rope {
        Some(node) => by_rows(&site.operand_ty(node, 0).shape[0], few, many),
        None => Planned::always(many),
    })
}

/// What rope and cache writes do in front of the attention node that ends their group, for a kernel that does it all.
pub(super) struct BeforeAttention<'a> {
    rope: &'a Rope,
    d: usize,
    position_type: DType,
    /// Queries before the rotation.
    pub q: Operand,
    /// Keys before the rotation.
    pub k: Operand,
    /// Values.
    pub v: Operand,
    /// Positions of the rotation.
    pub positions: Operand,
}

impl<'a> BeforeAttention<'a> {
    /// `None` unless the last node of the site is a `paged_attention` that reads what rope and cache writes before it
    /// make, and nothing outside the site reads rotated queries or keys.
    pub fn of(site: Site<'a>) -> Option<BeforeAttention<'a>> {
        let attention = site.node(site.nodes.len() - 1);
        if !matches!(*attention.op, Op::PagedAttention(_)) {
            return None;
        }
        let parts = Parts::of(site)?;
        let group = Group::of(&parts)?;
        let (q, k) = (group.q.0, group.k.0);
        let feeds = attention.operands.len() == 6
            && parts.behind(attention.operands[0]) == Operand::Value(q.results[0])
            && attention.operands[1] == Operand::Value(group.append_k.results[0])
            && attention.operands[2] == Operand::Value(group.append_v.results[0])
            && attention.operands[3..] == group.append_k.operands[2..]
            && site.operand_ty(attention, 0).shape == site.operand_ty(q, 0).shape
            && site.operand_ty(attention, 1).shape[2] == site.operand_ty(k, 0).shape[1];
        if !feeds || parts.read_outside(q.results[0]) || parts.read_outside(k.results[0]) {
            return None;
        }
        Some(BeforeAttention {
            rope: group.q.1,
            d: constant(&site.operand_ty(q, 0).shape[2])?,
            position_type: site.operand_ty(q, 1).dtype,
            q: parts.behind(q.operands[0]),
            k: parts.behind(k.operands[0]),
            v: parts.behind(group.append_v.operands[1]),
            positions: q.operands[1],
        })
    }

    /// Columns that rotate.
    pub fn rotary(&self) -> usize {
        self.rope.rotated(self.d)
    }

    /// Whether a pair's elements lie half the rotated columns apart, else next to each other.
    pub fn halves(&self) -> bool {
        self.rope.layout == RopeLayout::Half
    }

    /// Adds the declarations that rotate pairs.
    pub fn angles(&self, writer: SourceWriter) -> SourceWriter {
        angles(writer, self.rope, self.d, self.position_type)
    }
}

/// `few` for few rows, else `many`.
fn by_rows(t: &Dim, few: Vec<SiteLaunch>, many: Vec<SiteLaunch>) -> Planned {
    Planned {
        streamed: Vec::new(),
        variants: vec![
            SiteVariant::new(vec![between(t, 0, FEW_ROWS)], few),
            SiteVariant::new(Vec::new(), many),
        ],
        workspace: Dim::from(0u64),
        counters: 0,
    }
}

/// The nodes of a site, reshapes apart, up to an attention node that may end it.
struct Parts<'a> {
    site: Site<'a>,
    /// Ropes and appends in order.
    nodes: Vec<&'a Node>,
    /// Result and operand of each reshape.
    views: Vec<(ValueId, Operand)>,
}

impl<'a> Parts<'a> {
    fn of(site: Site<'a>) -> Option<Parts<'a>> {
        let mut parts = Parts { site, nodes: Vec::new(), views: Vec::new() };
        for index in 0..site.nodes.len() {
            let node = site.node(index);
            match &*node.op {
                Op::Rope(_) | Op::KvAppend(_) => parts.nodes.push(node),
                Op::Reshape(_) => parts.views.push((node.results[0], node.operands[0])),
                Op::PagedAttention(_) if index > 0 && index + 1 == site.nodes.len() => {}
                _ => return None,
            }
        }
        // A reshape that others read must be the same memory.
        let renames = parts.views.iter().all(|(view, of)| {
            let place = |value: ValueId| site.module.graph.values[value].place.as_ref();
            let same = matches!(of, Operand::Value(v) if place(*v) == place(*view));
            same || !parts.read_outside(*view)
        });
        (renames && !parts.nodes.is_empty()).then_some(parts)
    }

    /// The operand behind reshapes of the site.
    fn behind(&self, mut operand: Operand) -> Operand {
        // A view is defined before it is read, so one pass backwards suffices.
        for (view, of) in self.views.iter().rev() {
            if operand == Operand::Value(*view) {
                operand = *of;
            }
        }
        operand
    }

    /// Whether anything but the site's nodes reads `value` or a view of it.
    fn read_outside(&self, value: ValueId) -> bool {
        let graph = &self.site.module.graph;
        let read = |value: ValueId| {
            graph.outputs.iter().any(|o| o.value == value)
                || graph.order.iter().any(|id| {
                    !self.site.nodes.contains(id)
                        && graph.nodes[*id].operands.contains(&Operand::Value(value))
                })
        };
        let views =
            self.views.iter().filter(|(v, _)| self.behind(Operand::Value(*v)) == Operand::Value(value));
        read(value) || views.into_iter().any(|(v, _)| read(*v))
    }
}

/// Heads and pieces of a rope node.
struct Heads<'a> {
    rope: &'a Rope,
    heads: usize,
    d: usize,
    dtype: DType,
    /// Elements of a piece.
    vec: usize,
    /// Threads of a block and the heads they cover at a time.
    threads: u32,
    slots: usize,
}

fn constant(dim: &Dim) -> Option<usize> {
    usize::try_from(dim.as_const()?).ok().filter(|n| (1..1 << 24).contains(n))
}

/// Bytes of an element; none below a byte.
fn bytes(dtype: DType) -> Option<usize> {
    let bits = dtype.bits();
    bits.is_multiple_of(8).then_some(bits / 8)
}

impl<'a> Heads<'a> {
    fn of(site: Site<'_>, node: &Node, rope: &'a Rope) -> Option<Heads<'a>> {
        let ty = site.operand_ty(node, 0);
        let (heads, d) = (constant(&ty.shape[1])?, constant(&ty.shape[2])?);
        if !matches!(ty.dtype, DType::F32 | DType::F16 | DType::BF16) {
            return None;
        }
        let rotary = rope.rotated(d);
        let most = 16 / bytes(ty.dtype)?;
        let divides = |v: &usize| (rotary / 2).is_multiple_of(*v) && d.is_multiple_of(*v);
        let vec = [8, 4, 2, 1].into_iter().filter(|v| *v <= most).find(divides)?;
        let pieces = rotary / 2 / vec + (d - rotary) / vec;
        if !(1..=1024).contains(&pieces) {
            return None;
        }
        let slots = (128 / pieces).max(1);
        let threads = (slots * pieces).next_multiple_of(32) as u32;
        Some(Heads { rope, heads, d, dtype: ty.dtype, vec, threads, slots: threads as usize / pieces })
    }

    /// The source with tables and pieces, up to what depends on the cache.
    fn source(&self, positions: DType, family: &'static str) -> Option<SourceWriter> {
        // Both elements of interleaved pairs travel together, as far as heads are aligned.
        let size = bytes(self.dtype)?;
        let align = [16, 8, 4, 2]
            .into_iter()
            .find(|a| (2 * self.vec * size).is_multiple_of(*a) && (self.d * size).is_multiple_of(*a))?;
        let writer = SourceWriter::new(family)
            .ty("Element", self.dtype)
            .int("HEADS", self.heads)
            .int("D", self.d)
            .int("VEC", self.vec)
            .int("PAIR_ALIGN", align)
            .int("THREADS", self.threads);
        Some(angles(writer, self.rope, self.d, positions))
    }

    /// Launches for few and for many rows; `heads` of them in all.
    fn launches(&self, launch: SiteLaunch, heads: usize) -> [SiteLaunch; 2] {
        let (mut few, mut many) = (launch.clone(), launch);
        few.grid[1] = heads.div_ceil(self.slots).into();
        many.grid[1] = heads.div_ceil(self.slots * 4).into();
        [few, many]
    }
}

/// Declarations that rotate pairs of a head of `d`: `Positions`, `ROTARY`, `HALVES`, the tables and `angles.cu`.
fn angles(writer: SourceWriter, rope: &Rope, d: usize, positions: DType) -> SourceWriter {
    let rotary = rope.rotated(d);
    let turns: Vec<f64> =
        rope.frequencies(rotary).iter().map(|f| f64::from(*f) / std::f64::consts::TAU).collect();
    let high: Vec<f32> = turns.iter().map(|t| *t as f32).collect();
    let low: Vec<f32> = turns.iter().zip(&high).map(|(t, h)| (t - f64::from(*h)) as f32).collect();
    writer
        .ty("Positions", positions)
        .int("ROTARY", rotary)
        .line(&format!("#define HALVES {}", u8::from(rope.layout == RopeLayout::Half)))
        .line(&float_table("TURNS", &high))
        .line(&float_table("TURNS_LOW", &low))
        .body(include_str!("angles.cu"))
}

const PROMISE: Promise = Promise { registers: 0, no_local: true };

/// Launches of a lone rope, for few and for many rows.
fn rotate(parts: &Parts<'_>, node: &Node, rope: &Rope) -> Option<[SiteLaunch; 2]> {
    let site = parts.site;
    let heads = Heads::of(site, node, rope)?;
    let source = heads
        .source(site.operand_ty(node, 1).dtype, "cuda.rope")?
        .line("#define ROTATE 1\n#define APPEND 0")
        .body(include_str!("rope.cu"))
        .promise(PROMISE)
        .finish();
    let t = site.operand_ty(node, 0).shape[0].clone();
    let mut launch = SiteLaunch::new(source, [t, 1u64.into(), 1u64.into()], heads.threads).args([
        Argument::Address(parts.behind(node.operands[0])),
        Argument::Address(node.operands[1]),
        Argument::Address(Operand::Value(node.results[0])),
    ]);
    launch.dependent = true;
    Some(heads.launches(launch, heads.heads))
}

/// Launch of a lone append.
fn append(parts: &Parts<'_>, node: &Node) -> Option<SiteLaunch> {
    let site = parts.site;
    let state = site.operand_ty(node, 0);
    let row = constant(&state.shape[2])? * constant(&state.shape[3])? * bytes(state.dtype)?;
    let (size, unit) = [(16, "uint4"), (8, "u64"), (4, "u32"), (2, "u16"), (1, "u8")]
        .into_iter()
        .find(|(size, _)| row.is_multiple_of(*size))?;
    let threads = (row / size).next_multiple_of(32).min(256) as u32;
    let source = paging(SourceWriter::new("cuda.kv_append"), site, node)?
        .line(&format!("typedef {unit} Unit;"))
        .line("#define ROTATE 0")
        // Of heads and pieces nothing is needed here.
        .line("typedef u8 Element;")
        .int("D", 2)
        .int("ROTARY", 2)
        .int("VEC", 1)
        .int("PAIR_ALIGN", 1)
        .int("THREADS", threads)
        .int("UNITS", row / size)
        .body(include_str!("rope.cu"))
        .promise(PROMISE)
        .finish();
    let t = site.operand_ty(node, 1).shape[0].clone();
    let mut launch = SiteLaunch::new(source, [t, 1u64.into(), 1u64.into()], threads)
        .args([node.operands[0], parts.behind(node.operands[1])].map(Argument::Address))
        .args(node.operands[2..5].iter().copied().map(Argument::Address))
        .args(table_arguments(site, node));
    launch.dependent = true;
    Some(launch)
}

/// Declarations that find a row's slot.
fn paging(writer: SourceWriter, site: Site<'_>, append: &Node) -> Option<SourceWriter> {
    let [starts, lens, table] = [2, 3, 4].map(|i| site.operand_ty(append, i).dtype);
    Some(
        writer
            .line("#define APPEND 1")
            .ty("Starts", starts)
            .ty("Lens", lens)
            .ty("Table", table)
            .int("TOKENS_PER_BLOCK", constant(&site.operand_ty(append, 0).shape[1])?)
            .body(SEQUENCES),
    )
}

/// Number of sequences and width of the block table.
fn table_arguments(site: Site<'_>, append: &Node) -> [Argument; 2] {
    let table = site.operand_ty(append, 4);
    [Argument::I32(table.shape[0].clone()), Argument::I32(table.shape[1].clone())]
}

/// Rotated queries and keys, and the writes of keys and values.
struct Group<'p, 'a> {
    parts: &'p Parts<'a>,
    q: (&'a Node, &'a Rope),
    k: (&'a Node, &'a Rope),
    append_k: &'a Node,
    append_v: &'a Node,
}

impl<'p, 'a> Group<'p, 'a> {
    fn of(parts: &'p Parts<'a>) -> Option<Group<'p, 'a>> {
        let (mut ropes, mut appends) = (Vec::new(), Vec::new());
        for node in &parts.nodes {
            match &*node.op {
                Op::Rope(rope) => ropes.push((*node, rope)),
                _ => appends.push(*node),
            }
        }
        let ([one, two], [first, second]) = (ropes.as_slice(), appends.as_slice()) else { return None };
        let feeds =
            |rope: &Node, append: &Node| parts.behind(append.operands[1]) == Operand::Value(rope.results[0]);
        let (q, k, append_k, append_v) = match () {
            () if feeds(two.0, first) => (one, two, first, second),
            () if feeds(two.0, second) => (one, two, second, first),
            () if feeds(one.0, first) => (two, one, first, second),
            () if feeds(one.0, second) => (two, one, second, first),
            () => return None,
        };
        let group = Group { parts, q: *q, k: *k, append_k, append_v };
        group.agrees().then_some(group)
    }

    /// Whether the four nodes are about the same rows, pages and angles, and read nothing that the group writes.
    fn agrees(&self) -> bool {
        let site = self.parts.site;
        let ((q, q_rope), (k, k_rope)) = (self.q, self.k);
        let (x, keys) = (site.operand_ty(q, 0), site.operand_ty(k, 0));
        let state = |append: &Node| site.operand_ty(append, 0).shape[1..].to_vec();
        let made_here = |operand: Operand| {
            let Operand::Value(value) = self.parts.behind(operand) else { return false };
            match site.module.graph.values[value].def {
                Def::Node { node, .. } => site.nodes.contains(&node),
                Def::Input(_) => false,
            }
        };
        q_rope == k_rope
            && q.operands[1] == k.operands[1]
            && x.dtype == keys.dtype
            && x.shape[2] == keys.shape[2]
            && self.append_k.operands[2..] == self.append_v.operands[2..]
            && state(self.append_k) == state(self.append_v)
            && site.operand_ty(self.append_k, 0).dtype == keys.dtype
            && site.operand_ty(self.append_v, 0).dtype == keys.dtype
            && !made_here(q.operands[0])
            && !made_here(k.operands[0])
            && !made_here(self.append_v.operands[1])
            && !made_here(self.append_v.operands[0])
            && !made_here(self.append_k.operands[0])
            && self.append_k.operands[0] != self.append_v.operands[0]
    }

    fn plan(&self) -> Option<Planned> {
        let (parts, site) = (self.parts, self.parts.site);
        let (q, k) = (self.q.0, self.k.0);
        let heads = Heads::of(site, q, self.q.1)?;
        let kv_heads = constant(&site.operand_ty(k, 0).shape[1])?;
        let keep = parts.read_outside(k.results[0]);
        let source =
            paging(heads.source(site.operand_ty(q, 1).dtype, "cuda.rope_append")?, site, self.append_k)?
                .int("KV_HEADS", kv_heads)
                .line(&format!("#define ROTATE 2\n#define KEEP_K {}", u8::from(keep)))
                .body(include_str!("rope.cu"))
                .promise(PROMISE)
                .finish();
        let (t, b) = (site.operand_ty(q, 0).shape[0].clone(), table_arguments(site, self.append_k));
        let addresses = [
            parts.behind(q.operands[0]),
            Operand::Value(q.results[0]),
            parts.behind(k.operands[0]),
            parts.behind(self.append_v.operands[1]),
            self.append_k.operands[0],
            self.append_v.operands[0],
            q.operands[1],
            self.append_k.operands[2],
            self.append_k.operands[3],
            self.append_k.operands[4],
        ];
        let kept = keep.then_some(Argument::Address(Operand::Value(k.results[0])));
        let mut launch = SiteLaunch::new(source, [t.clone(), 1u64.into(), 1u64.into()], heads.threads)
            .args(addresses.map(Argument::Address))
            .args(b)
            .args(kept);
        launch.dependent = true;
        let [few, many] = heads.launches(launch, heads.heads + 2 * kv_heads);
        Some(by_rows(&t, vec![few], vec![many]))
    }
}
