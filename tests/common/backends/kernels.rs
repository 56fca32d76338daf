//! Cases of one kernel family each: matmuls with every epilogue, norms before them, rotary positions, caches, attention.

use millrace::ir::ops::attention::Mask;
use millrace::ir::ops::fused_matmul::{Epilogue, FusedMatmul};
use millrace::ir::ops::rope::{RopeLayout, RopeScaling};
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{Attention, Cast, KvAppend, Matmul, MeanPool, PagedAttention, RmsNorm, Rope};
use millrace::ir::{Builder, DType, Dim, Operand, Phase, TensorType, WeightExpr};

use super::case::{Case, Seq, Step};

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Numbers of rows: around every size of a tile.
pub const ROWS: [u64; 16] = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 300];

/// Steps over a list of values of `$t`.
pub fn rows(counts: &[u64]) -> Vec<Step> {
    counts.iter().map(|t| Step::Dims(vec![("t".to_string(), *t)])).collect()
}

fn weight(b: &mut Builder, name: &str, dtype: DType, shape: &[u64], std: f64) -> Operand {
    let ty = TensorType::new(dtype, shape.iter().copied());
    let seed = name.bytes().fold(1u64, |h, c| h * 31 + u64::from(c));
    b.weight(name, ty, WeightExpr::Random { seed, std })
}

/// What a matmul case has besides the product.
#[derive(Clone)]
struct Form {
    name: &'static str,
    segments: Vec<usize>,
    epilogue: Vec<Epilogue>,
    out: Option<DType>,
    norm: bool,
}

fn form(name: &'static str, segments: &[usize], epilogue: &[Epilogue]) -> Form {
    Form { name, segments: segments.to_vec(), epilogue: epilogue.to_vec(), out: None, norm: false }
}

fn matmul(dtype: DType, k: u64, form: &Form) -> Case {
    let mut b = Builder::new("matmul");
    let t = b.dim("t", 1, 512, Some(8)).unwrap();
    let op = FusedMatmul {
        segments: form.segments.clone().into(),
        panel: 0,
        cores: false,
        epilogue: form.epilogue.clone().into(),
        out: form.out,
    };
    let n: u64 = form.segments.iter().map(|s| *s as u64).sum();
    let out = form.out.unwrap_or(dtype);
    let x = b.input("x", TensorType::new(dtype, [t.clone(), k.into()]));
    let w = weight(&mut b, "w", dtype, &[n, k], 1.0 / (k as f64).sqrt());
    let x = if form.norm {
        let scale = weight(&mut b, "norm", dtype, &[k], 1.0);
        b.one(RmsNorm { eps: 1e-5 }, &[x, scale], "norm").unwrap()
    } else {
        x
    };
    let mut operands = vec![x, w];
    for (i, step) in form.epilogue.iter().enumerate().filter(|(_, s)| s.has_operand()) {
        operands.push(match step {
            Epilogue::Bias => weight(&mut b, "bias", dtype, &[n], 0.5),
            _ => {
                let ty = TensorType::new(out, [t.clone(), op.widths()[0].into()]);
                b.input(&format!("r{i}"), ty)
            }
        });
    }
    let results = b.node(op, &operands, "matmul").unwrap();
    for (i, result) in results.into_iter().enumerate() {
        b.output(&format!("y{i}"), result).unwrap();
    }
    let mut module = b.finish();
    module.phase = Phase::Fused;
    let name = format!("matmul/{}/{dtype}-{k}x{n}", form.name);
    let case = Case::of(name, &module, rows(&ROWS));
    if form.norm { case } else { case.strict() }
}

/// Matmuls.
pub fn matmuls() -> Vec<Case> {
    use Epilogue::{Activation, Bias, Glu, Mul, Residual};
    use UnaryFn::{Gelu, GeluTanh, Relu, Sigmoid, Silu, Tanh};
    let mut cases = Vec::new();
    // Every form in one size for each type; sizes are odd multiples of 8, or no multiples at all.
    let normed = |f: Form| Form { norm: true, ..f };
    let wide = |f: Form| Form { out: Some(DType::F32), ..f };
    let forms = [
        (264, form("bias", &[136], &[Bias])),
        (136, form("bias-gelu", &[200], &[Bias, Activation(Gelu)])),
        (200, form("residual", &[264], &[Residual])),
        (328, form("bias-residual", &[72], &[Bias, Residual])),
        (72, form("silu-mul", &[104], &[Activation(Silu), Mul])),
        (136, form("gated-silu", &[168, 168], &[Glu(Silu)])),
        (104, form("gated-gelu-bias", &[88, 88], &[Bias, Glu(GeluTanh)])),
        (256, form("segments", &[128, 64, 64], &[])),
        (136, form("segments-bias", &[72, 24, 40], &[Bias])),
        (192, normed(form("norm-segments", &[128, 64, 64], &[]))),
        (264, normed(form("norm-gated", &[152, 152], &[Glu(Silu)]))),
        (200, normed(form("norm-bias", &[104, 40], &[Bias]))),
    ];
    for (i, (k, form)) in forms.iter().enumerate() {
        for (j, dtype) in FLOATS.into_iter().enumerate() {
            // All forms in bf16; the others share them.
            if dtype == DType::BF16 || (i + j) % 2 == 0 {
                cases.push(matmul(dtype, *k, form));
            }
        }
    }
    for (k, n) in [(64, 64), (72, 136), (520, 264), (1000, 24), (100, 36), (77, 51), (2056, 40), (128, 1544)]
    {
        cases.push(matmul(DType::BF16, k, &form("plain", &[n], &[])));
    }
    // Many features of few columns.
    cases.push(matmul(DType::F32, 12, &form("plain", &[5700], &[])));
    cases.push(matmul(DType::F32, 20, &normed(form("norm-gated", &[2850, 2850], &[Glu(Silu)]))));
    for (k, n) in [(77, 51), (136, 72), (1024, 128)] {
        cases.push(matmul(DType::F32, k, &form("plain", &[n], &[])));
        cases.push(matmul(DType::F16, k, &form("plain", &[n], &[])));
    }
    for (k, n) in [(256, 500), (136, 1000)] {
        cases.push(matmul(DType::BF16, k, &wide(form("logits", &[n], &[]))));
        cases.push(matmul(DType::F16, k, &wide(normed(form("norm-logits", &[n], &[])))));
    }
    for f in [Relu, Tanh, Sigmoid] {
        cases.push(matmul(DType::BF16, 64, &form(f.name(), &[40], &[Activation(f)])));
    }
    for dtype in FLOATS {
        cases.push(batched(dtype));
    }
    cases
}

/// Products of activations, with broadcast batches and both orders of the second operand.
fn batched(dtype: DType) -> Case {
    let mut b = Builder::new("batched");
    let t = b.dim("t", 1, 512, Some(8)).unwrap();
    let at = |shape: Vec<Dim>| TensorType::new(dtype, shape);
    let x = b.input("x", at(vec![3u64.into(), t.clone(), 40u64.into()]));
    let y = b.input("y", at(vec![3u64.into(), t.clone(), 40u64.into()]));
    let z = b.input("z", at(vec![t.clone(), 24u64.into()]));
    let scores = b.one(Matmul { transpose_b: true, out: None }, &[x, y], "scores").unwrap();
    b.output("scores", scores).unwrap();
    let s = b.input("s", at(vec![3u64.into(), 5u64.into(), t]));
    let mixed = b.one(Matmul { transpose_b: false, out: None }, &[s, z], "mixed").unwrap();
    b.output("mixed", mixed).unwrap();
    Case::of(format!("matmul/batched/{dtype}"), &b.finish(), rows(&[1, 7, 16, 33, 65])).at_level(0).strict()
}

fn seq(rows: usize, kv_len: usize, first: usize) -> Seq {
    Seq { rows, kv_len, first }
}

/// Batches around the edges of pages of `page` positions: prefill, decode, both mixed, continued prefill, wide tables.
/// Sequence s has 8 pages of the pool.
fn batches(page: usize) -> Vec<Step> {
    let at = |list: &[(usize, usize)]| -> Vec<Seq> {
        list.iter().enumerate().map(|(s, (rows, kv_len))| seq(*rows, *kv_len, s * 8)).collect()
    };
    let p = page;
    vec![
        Step::Batch(at(&[(p - 1, p - 1), (p, p), (p + 1, p + 1), (1, 1)]), 0),
        Step::Batch(at(&[(1, p), (1, p + 1), (1, p + 2), (1, 2)]), 0),
        Step::Batch(at(&[(1, p + 1), (p, 2 * p + 1), (1, p + 3), (5, 7)]), 3),
        Step::Batch(at(&[(1, p + 2)]), 0),
        Step::Batch(at(&[(2 * p + 3, 3 * p + 5), (1, 2 * p + 2)]), 5),
        Step::Batch(at(&[(1, 3 * p + 6), (1, 2 * p + 3), (1, p + 4), (1, 8)]), 1),
        // One long sequence over the pages of all.
        Step::Batch(vec![seq(1, 3 * p + 7, 0), seq(3, 3, 40)], 0),
    ]
}

/// Writes many short sequences, then reads all their pages as one long sequence.
fn long_context(page: usize) -> Vec<Step> {
    let write =
        |from: usize| Step::Batch((0..16).map(|s| seq(4 * page, 4 * page, from + 4 * s)).collect(), 0);
    let mut steps: Vec<Step> = (0..4).map(|i| write(64 * i)).collect();
    for positions in [256 * page, 255 * page + 1, 200 * page, 129 * page - 3] {
        steps.push(Step::Batch(vec![seq(1, positions, 0)], 0));
    }
    steps.push(Step::Batch(vec![seq(1, 128 * page, 128), seq(1, 3 * page + 2, 4), seq(1, 100 * page, 0)], 2));
    steps.push(Step::Batch(vec![seq(9, 120 * page + 4, 0), seq(1, 64 * page, 130)], 0));
    steps
}

struct Paged {
    heads: u64,
    kv_heads: u64,
    d: u64,
    page: u64,
    window: usize,
    rope: Option<Rope>,
    /// Whether lengths and block table are results of kernels right before, in memory that held something else.
    late: bool,
}

impl Paged {
    fn case(&self, name: &str, dtype: DType, steps: Vec<Step>) -> Case {
        let Paged { heads, kv_heads, d, page, window, rope, late } = self;
        let mut b = Builder::new("paged");
        let t = b.dim("t", 1, 1024, Some(8)).unwrap();
        let batch = b.dim("b", 1, 16, None).unwrap();
        let width = b.dim("p", 1, 300, None).unwrap();
        // No more than the steps use: the reference copies caches.
        let pages = b.dim("pages", 1, if name.contains("long") { 264 } else { 72 }, None).unwrap();
        let rows = |h: u64| TensorType::new(dtype, [t.clone(), h.into(), (*d).into()]);
        let i32s = |shape: Vec<Dim>| TensorType::new(DType::I32, shape);
        let (mut q, mut k, v) =
            (b.input("q", rows(*heads)), b.input("k", rows(*kv_heads)), b.input("v", rows(*kv_heads)));
        let positions = rope.as_ref().map(|_| b.input("positions", i32s(vec![t.clone()])));
        let starts = b.input("seq_starts", i32s(vec![batch.add(&Dim::from(1i64))]));
        let mut index = |name: &str, shape: Vec<Dim>| {
            let given = b.input(name, TensorType::new(if *late { DType::I64 } else { DType::I32 }, shape));
            if *late { b.one(Cast { to: DType::I32 }, &[given], name).unwrap() } else { given }
        };
        let lens = index("kv_lens", vec![batch.clone()]);
        let table = index("block_table", vec![batch, width]);
        let cache =
            || TensorType::new(dtype, [pages.clone(), (*page).into(), (*kv_heads).into(), (*d).into()]);
        let (keys, values) = (b.state("kv.k", cache()), b.state("kv.v", cache()));
        if let (Some(rope), Some(positions)) = (rope, positions) {
            q = b.one(rope.clone(), &[q, positions], "rope").unwrap();
            k = b.one(rope.clone(), &[k, positions], "rope").unwrap();
        }
        let keys = b.one(KvAppend, &[keys, k, starts, lens, table], "append").unwrap();
        let values = b.one(KvAppend, &[values, v, starts, lens, table], "append").unwrap();
        let op = PagedAttention { scale: 1.0 / (*d as f64).sqrt(), window: *window };
        let y = b.one(op, &[q, keys, values, starts, lens, table], "attention").unwrap();
        b.output("y", y).unwrap();
        let case = Case::of(format!("paged/{name}/{dtype}-{heads}-{kv_heads}-{d}"), &b.finish(), steps);
        if rope.is_some() { case } else { case.strict() }
    }
}

/// Caches and attention over them.
pub fn paged() -> Vec<Case> {
    let plain =
        |heads, kv_heads, d| Paged { heads, kv_heads, d, page: 16, window: 0, rope: None, late: false };
    let mut cases = Vec::new();
    for (i, (heads, kv_heads, d)) in
        [(4, 4, 64), (4, 2, 80), (4, 1, 128), (8, 1, 64), (8, 2, 128), (7, 1, 64), (3, 3, 24), (8, 8, 128)]
            .into_iter()
            .enumerate()
    {
        for (j, dtype) in FLOATS.into_iter().enumerate() {
            if dtype == DType::BF16 || (i + j) % 3 == 0 {
                cases.push(plain(heads, kv_heads, d).case("batches", dtype, batches(16)));
            }
        }
    }
    for (window, d, dtype) in [(1, 64, DType::BF16), (20, 128, DType::BF16), (16, 80, DType::F32)] {
        let paged = Paged { window, ..plain(4, 2, d) };
        cases.push(paged.case(&format!("window{window}"), dtype, batches(16)));
    }
    for page in [8, 32, 64] {
        let paged = Paged { page, ..plain(4, 2, 64) };
        cases.push(paged.case(&format!("pages{page}"), DType::BF16, batches(page as usize)));
    }
    for (heads, kv_heads, d, dtype) in
        [(4, 1, 128, DType::BF16), (2, 2, 64, DType::F16), (2, 1, 80, DType::BF16), (2, 1, 64, DType::F32)]
    {
        cases.push(plain(heads, kv_heads, d).case("long", dtype, long_context(16)));
    }
    let window = Paged { window: 700, ..plain(4, 1, 128) };
    cases.push(window.case("long-window", DType::BF16, long_context(16)));
    // Plain arithmetic: heads in several blocks, pieces of several lanes, types that tensor cores take at other sizes only.
    for (heads, kv_heads, d, dtype) in [
        (12, 1, 20, DType::F32),
        (20, 2, 256, DType::F32),
        (9, 1, 96, DType::F32),
        (4, 2, 12, DType::BF16),
        (4, 2, 20, DType::F16),
        (2, 1, 30, DType::F32),
    ] {
        cases.push(plain(heads, kv_heads, d).case("plain", dtype, batches(16)));
    }
    for (heads, kv_heads, d, window) in [(6, 2, 128, 0), (4, 1, 32, 700), (8, 1, 4, 20)] {
        let paged = Paged { window, late: window > 0, ..plain(heads, kv_heads, d) };
        cases.push(paged.case("plain-long", DType::F32, long_context(16)));
    }
    for (i, (layout, scaling, rotary)) in ropes().into_iter().enumerate() {
        let rope = Some(Rope { base: 10000.0, layout, scaling, rotary });
        cases.push(Paged { rope, ..plain(4, 2, 64) }.case(
            &format!("rope{i}"),
            FLOATS[(i + 1) % 3],
            batches(16),
        ));
    }
    // Every way of splitting single rows.
    let half = Rope { base: 10000.0, layout: RopeLayout::Half, scaling: RopeScaling::Default, rotary: 0 };
    for at in 1..16 {
        let rope = Some(half.clone());
        let paged = Paged { rope, ..plain(8, 2, 128) };
        cases.push(paged.case("rope-batches", DType::BF16, batches(16)).with_split(at));
    }
    for (at, heads, kv_heads, d, page, window) in
        [(4, 8, 2, 128, 16, 0), (9, 7, 1, 64, 8, 20), (10, 4, 1, 80, 16, 700), (12, 4, 1, 128, 16, 0)]
    {
        let paged = Paged { page, window, ..plain(heads, kv_heads, d) };
        cases.push(paged.case("long", DType::BF16, long_context(page as usize)).with_split(at));
    }
    // Whatever a kernel guesses from lengths and table before they are there, with and without a ring.
    for at in [0, 4] {
        for rope in [None, Some(half.clone())] {
            let name = if rope.is_some() { "late-rope" } else { "late" };
            let paged = Paged { rope, late: true, ..plain(8, 2, 128) };
            cases.push(paged.case(name, DType::BF16, batches(16)).with_split(at));
        }
        let paged = Paged { window: 700, late: true, ..plain(4, 1, 128) };
        cases.push(paged.case("late-long-window", DType::BF16, long_context(16)).with_split(at));
    }
    cases
}

fn ropes() -> Vec<(RopeLayout, RopeScaling, usize)> {
    let llama =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 32.0 };
    vec![
        (RopeLayout::Half, RopeScaling::Default, 0),
        (RopeLayout::Interleaved, RopeScaling::Default, 0),
        (RopeLayout::Half, llama, 0),
        (RopeLayout::Half, RopeScaling::Linear { factor: 2.0 }, 32),
        (RopeLayout::Interleaved, RopeScaling::Default, 16),
        (RopeLayout::Half, RopeScaling::Default, 6),
    ]
}

/// Attention without a cache, pooling, and rope alone.
pub fn sequences() -> Vec<Case> {
    let steps = || -> Vec<Step> {
        let batch = |lens: &[usize]| Step::Batch(lens.iter().map(|n| seq(*n, *n, 0)).collect(), 0);
        vec![batch(&[1]), batch(&[5, 1, 16]), batch(&[33, 64, 7, 12]), batch(&[130]), batch(&[0, 17, 0, 3])]
    };
    let mut cases = Vec::new();
    for (i, (heads, kv_heads, d, causal, window)) in [
        (4u64, 4u64, 64u64, false, 0),
        (4, 2, 80, true, 0),
        (2, 1, 128, true, 9),
        (12, 12, 32, false, 0),
        (3, 1, 20, true, 0),
    ]
    .into_iter()
    .enumerate()
    {
        for (j, dtype) in FLOATS.into_iter().enumerate() {
            if (i + j) % 3 == 2 && i > 0 {
                continue;
            }
            let mut b = Builder::new("attention");
            let t = b.dim("t", 1, 512, Some(8)).unwrap();
            let batch = b.dim("b", 1, 8, None).unwrap();
            let rows = |h: u64| TensorType::new(dtype, [t.clone(), h.into(), d.into()]);
            let (q, k, v) =
                (b.input("q", rows(heads)), b.input("k", rows(kv_heads)), b.input("v", rows(kv_heads)));
            let ty = TensorType::new(DType::I32, [batch.add(&Dim::from(1i64))]);
            let starts = b.input("seq_starts", ty);
            let mask = Mask { scale: 1.0 / (d as f64).sqrt(), causal, window };
            let y = b.one(Attention { mask }, &[q, k, v, starts], "attention").unwrap();
            b.output("y", y).unwrap();
            let x = b.input("x", TensorType::new(dtype, [t.clone(), (heads * d).into()]));
            let pooled = b.one(MeanPool, &[x, starts], "pool").unwrap();
            b.output("pooled", pooled).unwrap();
            let name = format!("attention/{dtype}-{heads}-{kv_heads}-{d}");
            cases.push(Case::of(name, &b.finish(), steps()).strict());
        }
    }
    for dtype in FLOATS {
        let mut b = Builder::new("rope");
        let t = b.dim("t", 1, 512, Some(8)).unwrap();
        let x = b.input("x", TensorType::new(dtype, [t.clone(), 3u64.into(), 64u64.into()]));
        let positions = b.input("positions", TensorType::new(DType::I32, [t]));
        for (i, (layout, scaling, rotary)) in ropes().into_iter().enumerate() {
            let rope = Rope { base: 10000.0, layout, scaling, rotary };
            let y = b.one(rope, &[x, positions], "rope").unwrap();
            b.output(&format!("y{i}"), y).unwrap();
        }
        cases.push(Case::of(format!("rope/{dtype}"), &b.finish(), rows(&[1, 5, 64, 300])).strict());
    }
    cases
}
