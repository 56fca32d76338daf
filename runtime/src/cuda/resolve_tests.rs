use millrace_ir::builder::Builder;
use millrace_ir::dim::Sym;
use millrace_ir::launch::{self, ByLibrary, Condition, DeviceKernel, Variant, tile_count, tile_first};
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{FusedMatmul, Reshape, Unary};
use millrace_ir::{ArenaDecl, Id, Place, StateId, TensorType, ValueId, WeightExpr, WeightId};

use super::*;
use crate::cuda::testing::library_table;

const LIMITS: Limits = Limits { capability: 90, max_shared: 227 << 10 };

fn t() -> Dim {
    Dim::from(Sym::new("t").unwrap())
}

fn dim(n: u64) -> Dim {
    Dim::from(n)
}

/// `y = tanh(reshape(tanh(x)))` over `[t, 16]` f32: `%1` and `%2` at offset 0 of the arena, `%3` the output.
fn module() -> Module {
    let mut builder = Builder::new("m");
    let rows = builder.dim("t", 0, 100, None).unwrap();
    let x = builder.input("x", TensorType::new(DType::F32, [rows.clone(), dim(16)]));
    let tanh = Unary { function: UnaryFn::Tanh };
    let a = builder.one(tanh.clone(), &[x], "a").unwrap();
    let flat = TensorType::new(DType::F32, [rows.mul(&dim(16))]).shape;
    let b = builder.one(Reshape { shape: flat }, &[a], "b").unwrap();
    let c = builder.one(tanh, &[b], "c").unwrap();
    builder.output("y", c).unwrap();
    let mut module = builder.finish();
    let size = t().mul(&dim(64));
    let arena = module.arenas.push(ArenaDecl { name: "a".into(), size, align: 64 });
    for index in [1, 2] {
        let place = Place::Arena { arena, offset: dim(0) };
        module.graph.values.get_mut(ValueId::from_index(index)).unwrap().place = Some(place);
    }
    module.graph.values.get_mut(ValueId::from_index(3)).unwrap().place = Some(Place::Output(0));
    module
}

fn value(index: usize) -> Operand {
    Operand::Value(ValueId::from_index(index))
}

fn kernel(family: &str) -> DeviceKernel {
    DeviceKernel {
        entry: family.to_string(),
        family: family.to_string(),
        source: "0".repeat(64),
        image: 0,
        registers: 0,
        shared: 0,
        local: 0,
    }
}

fn launch(args: Vec<Arg>) -> Launch {
    Launch {
        kernel: 0,
        grid: [t().ceil_div(4), dim(2), dim(1)],
        block: [128, 1, 1],
        cluster: 1,
        shared: 1024,
        dependent: true,
        tiles: None,
        args,
    }
}

fn table() -> LaunchTable {
    let always = |launches| Variant { when: Vec::new(), launches, library: None };
    let unary = |from, to| {
        let args = vec![Arg::Address(value(from)), Arg::I32(t()), Arg::Address(value(to))];
        vec![always(vec![launch(args)])]
    };
    LaunchTable {
        arch: "sm_90a".into(),
        kernels: vec![kernel("cuda.tanh")],
        steps: vec![
            LaunchStep { first: 0, nodes: 1, variants: unary(0, 1), streamed: Vec::new() },
            LaunchStep { first: 1, nodes: 1, variants: vec![always(Vec::new())], streamed: Vec::new() },
            LaunchStep { first: 2, nodes: 1, variants: unary(2, 3), streamed: Vec::new() },
        ],
        workspace: dim(4096),
        counters: 16,
        library_workspace: 0,
        helpers: Vec::new(),
    }
}

fn range(base: u64, len: u64) -> Range {
    Range { base, len }
}

/// Memory for `rows` rows.
fn addresses(rows: u64) -> Addresses {
    let bytes = rows * 64;
    Addresses {
        regions: Regions {
            inputs: vec![range(0x1_0000, bytes)],
            outputs: vec![range(0x2_0000, bytes)],
            arenas: vec![range(0x3_0000, bytes)],
            states: Vec::new(),
            weights: Vec::new(),
        },
        workspace: range(0x4_0000, 4096),
        counters: range(0x5_0000, 16),
        ring: Ring::default(),
    }
}

fn bindings(rows: u64) -> Bindings {
    let mut bindings = Bindings::new();
    bindings.set(Sym::new("t").unwrap(), rows);
    bindings
}

fn at(rows: u64, table: &LaunchTable) -> Result<Resolved> {
    resolve(&module(), table, &addresses(rows), &bindings(rows), LIMITS, None)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The launch of the first step with these arguments, at six rows.
fn with_args(args: Vec<Arg>) -> Result<Params> {
    let mut table = table();
    table.steps[0].variants[0].launches[0].args = args;
    match at(6, &table)?.actions.swap_remove(0) {
        Action::Launch(launch) => Ok(launch.params),
        other => panic!("{other:?}"),
    }
}

fn refused(found: Result<impl std::fmt::Debug>) -> String {
    let error = found.unwrap_err();
    assert_eq!(error.code(), "engine/forged", "{error}");
    error.message().to_string()
}

#[test]
fn parameters_are_laid_out_as_a_kernel_reads_them() {
    let resolved = at(6, &table()).unwrap();
    assert_eq!(resolved.steps, [(0..1, 0..1), (1..2, 1..1), (2..3, 1..2)]);
    let [Action::Launch(first), Action::Launch(second)] = resolved.actions.as_slice() else { panic!() };
    assert_eq!(
        (first.grid, first.block, first.shared, first.dependent),
        ([2, 2, 1], [128, 1, 1], 1024, true)
    );
    // A pointer, an int, four bytes of padding, a pointer.
    let params = &first.params;
    assert_eq!(params.places, [(0, 8), (8, 4), (16, 8)]);
    assert_eq!(u64_at(&params.bytes, 0), 0x1_0000);
    assert_eq!(params.bytes[8..12], 6i32.to_ne_bytes());
    assert_eq!(u64_at(&params.bytes, 16), 0x3_0000);
    // The view shares the first result's memory.
    assert_eq!((u64_at(&second.params.bytes, 0), u64_at(&second.params.bytes, 16)), (0x3_0000, 0x2_0000));
}

#[test]
fn every_kind_of_argument() {
    let params = with_args(vec![
        Arg::F32(1.5),
        Arg::Workspace(t().mul(&dim(8))),
        Arg::Counters(4),
        Arg::I32(t().mul(&dim(3))),
        Arg::Map(TensorMap {
            of: MapBase::Address(value(0)),
            dtype: DType::F32,
            shape: vec![dim(16), t()],
            strides: vec![dim(64)],
            tile: vec![16, 64],
            swizzle: 64,
        }),
        Arg::I32(dim(9)),
    ])
    .unwrap();
    assert_eq!(params.places, [(0, 4), (8, 8), (16, 8), (24, 4), (64, 128), (192, 4)]);
    assert_eq!(params.bytes[..4], 1.5f32.to_ne_bytes());
    assert_eq!((u64_at(&params.bytes, 8), u64_at(&params.bytes, 16)), (0x4_0030, 0x5_0004));
    assert_eq!(params.bytes[24..28], 18i32.to_ne_bytes());
    assert_eq!(params.bytes[192..196], 9i32.to_ne_bytes());
    let map = Map {
        base: 0x1_0000,
        dtype: DType::F32,
        shape: vec![16, 6],
        strides: vec![64],
        tile: vec![16, 64],
        swizzle: 64,
    };
    assert_eq!(params.maps, [(64, map)]);
}

#[test]
fn grids_without_blocks_do_not_happen() {
    let resolved = at(0, &table()).unwrap();
    assert_eq!(resolved.actions, []);
}

#[test]
fn variants_follow_the_bindings() {
    let mut table = table();
    let mut small = table.steps[0].variants[0].clone();
    small.when = vec![Condition { dim: t(), min: 0, max: 4 }];
    small.launches[0].block = [32, 1, 1];
    table.steps[0].variants.insert(0, small);
    let block = |rows| match &at(rows, &table).unwrap().actions[0] {
        Action::Launch(launch) => launch.block[0],
        other => panic!("{other:?}"),
    };
    assert_eq!((block(4), block(5)), (32, 128));
}

#[test]
fn older_devices_run_in_order() {
    let limits = Limits { capability: 80, ..LIMITS };
    let resolved = resolve(&module(), &table(), &addresses(6), &bindings(6), limits, None).unwrap();
    assert!(resolved.actions.iter().all(|a| matches!(a, Action::Launch(l) if !l.dependent)));
    let mut clusters = table();
    clusters.steps[0].variants[0].launches[0].cluster = 2;
    assert!(at(6, &clusters).is_ok());
    let on_older = resolve(&module(), &clusters, &addresses(6), &bindings(6), limits, None);
    assert!(refused(on_older).contains("clusters"));
    // Ten rows are three blocks: no whole number of clusters.
    assert!(refused(at(10, &clusters)).contains("clusters"));
}

#[test]
fn forged_launches_are_refused() {
    type Forge = fn(&mut Launch);
    let forgeries: &[(&str, Forge)] = &[
        ("no kernel", |l| l.kernel = 1),
        ("grid", |l| l.grid[1] = dim(65536)),
        ("grid", |l| l.grid[0] = dim(1 << 31)),
        ("no value", |l| l.grid[0] = Dim::from(Sym::new("q").unwrap())),
        ("no value", |l| l.grid[0] = t().sub(&dim(7))),
        ("block", |l| l.block = [0, 1, 1]),
        ("block", |l| l.block = [64, 64, 1]),
        ("block", |l| l.block = [1, 1, 128]),
        ("block", |l| l.block = [u32::MAX, u32::MAX, u32::MAX]),
        ("clusters", |l| l.cluster = 0),
        ("clusters", |l| l.cluster = 32),
        ("shared", |l| l.shared = u32::MAX),
        ("argument %9 has no memory", |l| l.args.push(Arg::Address(value(9)))),
        ("argument %3 has no memory", |l| l.args.push(Arg::Address(value(3)))),
        ("has no memory", |l| l.args.push(Arg::Address(Operand::Weight(WeightId::from_index(0))))),
        ("has no memory", |l| l.args.push(Arg::Address(Operand::State(StateId::from_index(7))))),
        ("scratch", |l| l.args.push(Arg::Workspace(dim(4097)))),
        ("counter", |l| l.args.push(Arg::Counters(13))),
        ("counter", |l| l.args.push(Arg::Counters(u64::MAX))),
        ("32-bit", |l| l.args.push(Arg::I32(dim(1 << 31)))),
    ];
    for (expected, forge) in forgeries {
        let mut table = table();
        forge(&mut table.steps[0].variants[0].launches[0]);
        let message = refused(at(6, &table));
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn forged_maps_are_refused() {
    let good = TensorMap {
        of: MapBase::Address(value(0)),
        dtype: DType::F32,
        shape: vec![dim(16), t()],
        strides: vec![dim(64)],
        tile: vec![16, 8],
        swizzle: 0,
    };
    let with = |map: TensorMap| with_args(vec![Arg::Map(map)]);
    assert!(with(good.clone()).is_ok());
    type Forge = fn(&mut TensorMap);
    let forgeries: &[(&str, Forge)] = &[
        ("leaves", |m| m.shape[1] = dim(7)),
        ("leaves", |m| m.strides[0] = dim(80)),
        ("leaves", |m| m.of = MapBase::Workspace(dim(4096))),
        ("aligned", |m| m.strides[0] = dim(60)),
        ("aligned", |m| m.of = MapBase::Workspace(dim(8))),
        ("scratch", |m| m.of = MapBase::Workspace(dim(8192))),
        ("belong", |m| m.strides.clear()),
        ("belong", |m| m.tile.push(1)),
        ("belong", |m| {
            m.shape.clear();
            m.strides.clear();
            m.tile.clear();
        }),
        ("extent", |m| m.shape[1] = dim(0)),
        ("extent", |m| m.tile[1] = 257),
        ("extent", |m| m.tile[1] = 0),
        ("swizzle", |m| m.tile[0] = 2),
        ("swizzle", |m| m.swizzle = 32),
        ("swizzle", |m| m.swizzle = 48),
    ];
    for (expected, forge) in forgeries {
        let mut map = good.clone();
        forge(&mut map);
        let message = refused(with(map));
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn memory_that_does_not_fit_is_refused() {
    let small = |change: fn(&mut Addresses)| {
        let mut addresses = addresses(6);
        change(&mut addresses);
        refused(resolve(&module(), &table(), &addresses, &bindings(6), LIMITS, None))
    };
    assert_eq!(small(|a| a.regions.arenas[0].len -= 1), "a result has no memory");
    assert_eq!(small(|a| a.regions.outputs[0].len -= 1), "a result has no memory");
    assert_eq!(small(|a| a.regions.arenas.clear()), "a result has no memory");
    // The arena over the input: the first result overlaps its operand, in part.
    assert_eq!(small(|a| a.regions.arenas[0].base = 0x1_0010), "a result overlaps an operand");
}

#[test]
fn a_node_that_computes_needs_a_launch() {
    let mut table = table();
    table.steps[0].variants[0].launches.clear();
    assert_eq!(refused(at(6, &table)), "a node that computes has no launch");
}

#[test]
fn views_that_do_not_share_memory_are_copied() {
    let mut module = module();
    let second = module.graph.values.get_mut(ValueId::from_index(2)).unwrap();
    let arena = module.arenas.ids().next().unwrap();
    second.place = Some(Place::Arena { arena, offset: t().mul(&dim(64)) });
    let mut addresses = addresses(6);
    addresses.regions.arenas[0].len *= 2;
    let resolved = resolve(&module, &table(), &addresses, &bindings(6), LIMITS, None).unwrap();
    let (from, to) = (range(0x3_0000, 384), range(0x3_0180, 384));
    assert_eq!(resolved.actions[1], Action::Copy { from, to });
}

#[test]
fn an_output_that_lives_elsewhere_is_copied_at_the_end() {
    let mut module = module();
    // The output names the value in the arena, and the last node's result has no reader.
    module.graph.outputs[0].value = ValueId::from_index(1);
    let third = module.graph.values.get_mut(ValueId::from_index(3)).unwrap();
    let arena = module.arenas.ids().next().unwrap();
    third.place = Some(Place::Arena { arena, offset: t().mul(&dim(64)) });
    let mut addresses = addresses(6);
    addresses.regions.arenas[0].len *= 2;
    let resolved = resolve(&module, &table(), &addresses, &bindings(6), LIMITS, None).unwrap();
    let (from, to) = (range(0x3_0000, 384), range(0x2_0000, 384));
    assert_eq!(resolved.actions.last(), Some(&Action::Copy { from, to }));
    addresses.regions.outputs[0].len -= 64;
    assert!(refused(resolve(&module, &table(), &addresses, &bindings(6), LIMITS, None)).contains("output"));
}

#[test]
fn groups_must_not_overlap_in_part() {
    // All three nodes as one group: the last result may not begin inside the first.
    let mut table = table();
    let mut all = table.steps[0].clone();
    all.nodes = 3;
    all.variants[0].launches[0].args = vec![Arg::Address(value(0)), Arg::I32(t()), Arg::Address(value(3))];
    table.steps = vec![all];
    assert!(at(6, &table).is_ok());
    let mut addresses = addresses(6);
    addresses.regions.outputs[0].base = 0x1_0040;
    let message = refused(resolve(&module(), &table, &addresses, &bindings(6), LIMITS, None));
    assert_eq!(message, "memory overlaps inside a launch group");
}

#[test]
fn tables_cover_the_graph() {
    let mut table = table();
    assert!(check_table(&module(), &table).is_ok());
    table.steps.pop();
    assert_eq!(check_table(&module(), &table).unwrap_err().code(), "engine/forged");
}

#[test]
fn parameters_are_compared_with_the_kernel() {
    let params = with_args(vec![Arg::Address(value(0)), Arg::F32(0.0)]).unwrap();
    assert!(check_params(&params, None, "k").is_ok());
    assert!(check_params(&params, Some(&[8, 4]), "k").is_ok());
    for wrong in [vec![], vec![8], vec![8, 8], vec![8, 4, 4]] {
        assert_eq!(check_params(&params, Some(&wrong), "k").unwrap_err().code(), "cuda/arguments");
    }
}

#[test]
fn packing_aligns_and_never_overflows() {
    assert_eq!(pack(&[1, 256, 0, 300]), Some((vec![0, 256, 512, 512], 1024)));
    assert_eq!(pack(&[]), Some((vec![], 0)));
    assert_eq!(pack(&[u64::MAX]), None);
    assert_eq!(pack(&[1, u64::MAX - 256]), None);
    let block = range(0x1000, 1024);
    assert_eq!(parts(block, &[0, 512], &[1, 512]), Some(vec![range(0x1000, 1), range(0x1200, 512)]));
    assert_eq!(parts(block, &[1024], &[1]), None);
}

/// `y = x w^T` with a weight of `[8, 16]`, of which the first two slices are resident and the others come in two copies.
fn streamed() -> (Module, LaunchTable, Addresses) {
    let mut builder = Builder::new("m");
    let rows = builder.dim("t", 0, 100, None).unwrap();
    let x = builder.input("x", TensorType::new(DType::F32, [rows, dim(16)]));
    let w = builder.weight("w", TensorType::new(DType::F32, [8u64, 16]), WeightExpr::Splat(0.5));
    let op = FusedMatmul {
        segments: vec![8].into(),
        panel: 0,
        cores: false,
        epilogue: Vec::new().into(),
        out: None,
    };
    let y = builder.one(op, &[x, w], "y").unwrap();
    builder.output("y", y).unwrap();
    let mut module = builder.finish();
    module.graph.values.get_mut(ValueId::from_index(1)).unwrap().place = Some(Place::Output(0));
    let weight = WeightId::from_index(0);
    let mut norm = launch(vec![Arg::Address(value(0))]);
    norm.grid[0] = dim(1);
    let mut matmul = launch(vec![
        Arg::Address(Operand::Weight(weight)),
        Arg::I32(Dim::from(tile_first())),
        Arg::I32(Dim::from(tile_count())),
    ]);
    matmul.grid[0] = Dim::from(tile_count());
    matmul.tiles = Some(Tiles { weight, slices: 8, granule: 1 });
    let mut table = table();
    let variant = Variant { when: Vec::new(), launches: vec![norm, matmul], library: None };
    table.steps = vec![LaunchStep { first: 0, nodes: 1, variants: vec![variant], streamed: Vec::new() }];
    let tile = |first, count, base| Tile { node: 0, weight, first, count, range: range(base, count * 64) };
    let mut addresses = addresses(6);
    addresses.regions.inputs = vec![range(0x1_0000, 6 * 64)];
    addresses.regions.outputs = vec![range(0x2_0000, 6 * 32)];
    addresses.regions.weights = vec![Some(range(0x6_0000, 2 * 64))];
    addresses.ring.copies = vec![tile(2, 4, 0x7_0000), tile(6, 2, 0x8_0000)];
    addresses.ring.parts.insert(weight, (2, 8));
    (module, table, addresses)
}

/// What happens in a step: of each launch its blocks and, if it reads the weight, address, first slice and slices.
fn told(module: &Module, table: &LaunchTable, addresses: &Addresses) -> Result<Vec<String>> {
    let resolved = resolve(module, table, addresses, &bindings(6), LIMITS, None)?;
    let number = |p: &Params, at: usize| i32::from_ne_bytes(p.bytes[at..at + 4].try_into().unwrap());
    let tell = |action: &Action| match action {
        Action::Launch(l) if l.params.places.len() == 3 => {
            let (at, first, count) =
                (u64_at(&l.params.bytes, 0), number(&l.params, 8), number(&l.params, 12));
            format!("{}: {at:#x} {first}+{count}", l.grid[0])
        }
        Action::Launch(l) => format!("{}: norm", l.grid[0]),
        other => format!("{other:?}"),
    };
    Ok(resolved.actions.iter().map(tell).collect())
}

#[test]
fn a_weight_in_parts_is_read_part_by_part() {
    let (module, table, mut addresses) = streamed();
    let expected = [
        "1: norm",
        "2: 0x60000 0+2",
        "Arrive(0)",
        "4: 0x70000 2+4",
        "Leave(0)",
        "Arrive(1)",
        "2: 0x80000 6+2",
        "Leave(1)",
    ];
    assert_eq!(told(&module, &table, &addresses).unwrap(), expected);
    addresses.ring = Ring::default();
    addresses.regions.weights = vec![Some(range(0x6_0000, 512))];
    assert_eq!(told(&module, &table, &addresses).unwrap(), ["1: norm", "8: 0x60000 0+8"]);
}

/// Where another variant of the step knows no tiles, the weight is one slice, which launches by tiles read as all of theirs.
#[test]
fn a_weight_that_comes_whole_is_read_at_once() {
    let (module, mut table, mut addresses) = streamed();
    let weight = WeightId::from_index(0);
    addresses.regions.weights = vec![Some(range(0x6_0000, 0))];
    addresses.ring.copies =
        vec![Tile { node: 0, weight, first: 0, count: 1, range: range(0x7_0000, 8 * 64) }];
    addresses.ring.parts.insert(weight, (0, 1));
    let expected = ["1: norm", "Arrive(0)", "8: 0x70000 0+8", "Leave(0)"];
    assert_eq!(told(&module, &table, &addresses).unwrap(), expected);
    table.steps[0].variants[0].launches[1].tiles =
        Some(Tiles { weight: WeightId::from_index(1), slices: 8, granule: 1 });
    refused(told(&module, &table, &addresses));
}

#[test]
fn tiles_that_a_launch_does_not_know_are_refused() {
    let (module, table, addresses) = streamed();
    for change in [
        |t: &mut Option<Tiles>| *t = None,
        |t: &mut Option<Tiles>| t.as_mut().unwrap().slices = 7,
        |t: &mut Option<Tiles>| t.as_mut().unwrap().granule = 4,
    ] {
        let mut table = table.clone();
        change(&mut table.steps[0].variants[0].launches[1].tiles);
        refused(told(&module, &table, &addresses));
    }
}

/// A library that takes what it is told to, and remembers what it was asked.
struct Taker {
    takes: bool,
    asked: std::cell::RefCell<Vec<Call>>,
}

impl Taker {
    fn new(takes: bool) -> Taker {
        Taker { takes, asked: Default::default() }
    }
}

impl Takes for Taker {
    fn takes(&self, call: &Call) -> bool {
        self.asked.borrow_mut().push(call.clone());
        self.takes
    }
}

/// `x` `[t, 4]` at value 0, the weight `[8, 4]`, `y` `[t, 4]` at value 1, all of f32.
fn product_memory(rows: u64) -> (Addresses, Vec<Option<Range>>) {
    let mut addresses = addresses(rows);
    addresses.regions.weights = vec![Some(range(0x6_0000, 8 * 16))];
    (addresses, vec![Some(range(0x1_0000, rows * 16)), Some(range(0x2_0000, rows * 16))])
}

fn by(library: &Taker, table: &LaunchTable, rows: u64) -> Result<Vec<Action>> {
    let (addresses, values) = product_memory(rows);
    resolve_step(table, &addresses, &values, &bindings(rows), LIMITS, library)
}

fn product_of(table: &mut LaunchTable) -> &mut launch::Product {
    &mut table.steps[0].variants[0].library.as_mut().unwrap().products[0]
}

#[test]
fn products_have_their_rows_and_places() {
    let mut table = library_table();
    product_of(&mut table).first = 4;
    product_of(&mut table).bias = Some(Operand::Weight(WeightId::from_index(0)));
    let taker = Taker::new(true);
    let actions = by(&taker, &table, 6).unwrap();
    let [Action::Product(call)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(*taker.asked.borrow(), std::slice::from_ref(call));
    let product = call.question.product;
    assert_eq!((product.m, product.n, product.k), (6, 4, 4));
    assert!(call.question.bias && !call.question.residual);
    assert_eq!((call.at, call.suggestion), (64, 0));
    // The second half of the weight, and of the bias.
    assert_eq!(call.places.w, range(0x6_0000 + 64, 64));
    assert_eq!(call.places.bias, Some(range(0x6_0000 + 16, 16)));
    assert_eq!(call.places.y, range(0x2_0000, 96));
    assert_eq!(by(&taker, &table, 0).unwrap(), [], "no rows, no product");
}

#[test]
fn what_is_not_taken_is_an_error_where_only_the_library_counts() {
    let refused = by(&Taker::new(false), &library_table(), 6).unwrap_err();
    assert_eq!((refused.code(), refused.kind()), ("cuda/library", Kind::Unsupported));
}

#[test]
fn products_that_leave_their_memory_are_forged() {
    type Change = fn(&mut launch::Product);
    let of = |index| Some(Operand::Value(ValueId::from_index(index)));
    assert_eq!(of(1), Some(product_of(&mut library_table()).y));
    let changes: [Change; 9] = [
        |p| p.n = 9,
        |p| p.first = 5,
        |p| p.first = u64::MAX,
        |p| p.n = u64::MAX,
        |p| p.k = 5,
        |p| p.y = Operand::Value(ValueId::from_index(0)),
        |p| p.weight = Operand::Weight(WeightId::from_index(7)),
        |p| p.residual = Some(Operand::Value(ValueId::from_index(9))),
        |p| p.rows = dim(7),
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut table = library_table();
        change(product_of(&mut table));
        assert_eq!(by(&Taker::new(true), &table, 6).unwrap_err().code(), "engine/forged", "{at}");
    }
    // In place is allowed, beside it is not.
    let mut table = library_table();
    product_of(&mut table).residual = of(1);
    assert!(by(&Taker::new(true), &table, 6).is_ok());
    let (addresses, mut values) = product_memory(6);
    values.push(Some(range(0x2_0010, 96)));
    product_of(&mut table).residual = of(2);
    let beside = resolve_step(&table, &addresses, &values, &bindings(6), LIMITS, &Taker::new(true));
    assert_eq!(beside.unwrap_err().code(), "engine/forged");
}

/// A graph whose second step may run by a library: `tanh` of a tensor is as good as a product to these tests.
fn with_library() -> LaunchTable {
    let mut table = table();
    let product = launch::Product {
        x: value(2),
        weight: Operand::Weight(WeightId::from_index(0)),
        y: value(3),
        rows: t(),
        n: 16,
        k: 16,
        ..product_of(&mut library_table()).clone()
    };
    let before = table.steps[2].variants[0].launches.clone();
    table.steps[2].variants[0].library = Some(ByLibrary { before, products: vec![product] });
    table.library_workspace = launch::LIBRARY_WORKSPACE;
    table
}

#[test]
fn a_step_runs_by_the_library_or_by_its_kernels() {
    let mut memory = addresses(6);
    memory.regions.weights = vec![Some(range(0x6_0000, 16 * 64))];
    let at = |library: Option<&dyn Takes>| {
        resolve(&module(), &with_library(), &memory, &bindings(6), LIMITS, library).unwrap()
    };
    let kernels = resolve(&module(), &table(), &memory, &bindings(6), LIMITS, None).unwrap();
    // Absent, or there and refusing.
    assert_eq!(at(None), kernels);
    assert_eq!(at(Some(&Taker::new(false))), kernels);
    let taken = at(Some(&Taker::new(true)));
    assert_eq!(taken.steps.len(), kernels.steps.len());
    assert_eq!(taken.actions.len(), kernels.actions.len() + 1, "what stands in front, and the product");
    let products = taken.actions.iter().filter(|a| matches!(a, Action::Product(_))).count();
    assert_eq!(products, 1);
    assert!(matches!(taken.actions[taken.steps[2].1.end - 1], Action::Product(_)));
}
