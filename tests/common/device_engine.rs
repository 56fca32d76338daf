//! An engine for a GPU whose kernels are written here, in PTX: they need no compiler, and every driver since 12.0 takes them.
#![allow(dead_code)]

use millrace_ir::engine::{EngineWriter, SectionKind, Verify, WeightMeta, WriterOptions};
use millrace_ir::launch::{
    Arg, Bundle, DeviceKernel, Helper, Launch, LaunchStep, LaunchTable, MapBase, TensorMap, Variant,
};
use millrace_ir::manifest::{Manifest, ModelKind};
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Matmul, Unary};
use millrace_ir::{
    ArenaDecl, Builder, DType, Dim, Id, Kernel, Operand, Phase, Place, TensorType, ValueId, WeightExpr,
    WeightId, text,
};
use millrace_kernels::cuda::Arch;
use millrace_runtime::cuda::{DeviceInfo, survey};
use millrace_runtime::{Arena, Engine, Session, TensorRef};

/// Columns of every matrix.
pub const WIDTH: usize = 16;
/// Most rows.
pub const ROWS: u64 = 64;

/// The first GPU, or nothing without one.
pub fn gpu(test: &str) -> Option<DeviceInfo> {
    let survey = survey();
    match survey.devices.into_iter().next() {
        Some(device) => Some(device),
        None => {
            let why = survey.problem.map(|e| e.to_string()).unwrap_or_default();
            assert!(std::env::var_os("MILLRACE_REQUIRE_GPU").is_none(), "a GPU is required: {why}");
            eprintln!("SKIPPED {test}: {why}");
            None
        }
    }
}

/// Kernels in PTX: they need no compiler, and every driver since 12.0 takes them. From Hopper on they wait for
/// their predecessor by themselves, and `relu` reads its input through the tensor memory unit.
pub fn ptx(capability: u32) -> String {
    let (version, wait) = if capability >= 90 {
        ("8.0", "griddepcontrol.wait;\n griddepcontrol.launch_dependents;")
    } else {
        ("7.0", "")
    };
    let index =
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r0, %r1, %r2, %r3;";
    let registers = ".reg .b32 %r<16>; .reg .b64 %d<16>; .reg .f32 %f<8>; .reg .pred %p<4>;";
    let mut text = format!(
        "
.version {version}
.target sm_{capability}
.address_size 64

.visible .entry relu(.param .u64 from, .param .u64 to, .param .u32 count) {{
 {registers}
 {wait}
 {index}
 ld.param.u32 %r4, [count];
 setp.ge.u32 %p0, %r0, %r4;
 @%p0 bra done;
 ld.param.u64 %d0, [from];
 ld.param.u64 %d1, [to];
 mul.wide.u32 %d2, %r0, 4;
 add.u64 %d0, %d0, %d2;
 add.u64 %d1, %d1, %d2;
 ld.global.f32 %f0, [%d0];
 max.f32 %f0, %f0, 0f00000000;
 st.global.f32 [%d1], %f0;
done:
 ret;
}}

.visible .entry matmul(.param .u64 x, .param .u64 w, .param .u64 y, .param .f32 bias) {{
 {registers}
 {wait}
 mov.u32 %r0, %ctaid.x;
 mov.u32 %r1, %tid.x;
 ld.param.u64 %d0, [x];
 ld.param.u64 %d1, [w];
 ld.param.u64 %d2, [y];
 ld.param.f32 %f0, [bias];
 mul.wide.u32 %d3, %r0, 64;
 add.u64 %d0, %d0, %d3;
 add.u64 %d2, %d2, %d3;
 mul.wide.u32 %d3, %r1, 4;
 add.u64 %d1, %d1, %d3;
 add.u64 %d2, %d2, %d3;
 mov.u32 %r2, 0;
loop:
 ld.global.f32 %f1, [%d0];
 ld.global.f32 %f2, [%d1];
 fma.rn.f32 %f0, %f1, %f2, %f0;
 add.u64 %d0, %d0, 4;
 add.u64 %d1, %d1, 64;
 add.u32 %r2, %r2, 1;
 setp.lt.u32 %p0, %r2, 16;
 @%p0 bra loop;
 st.global.f32 [%d2], %f0;
 ret;
}}

.visible .entry argmax(.param .u64 rows, .param .u64 out, .param .u32 width, .param .u64 best, .param .u64 arrived) {{
 {registers}
 {wait}
 mov.u32 %r0, %tid.x;
 setp.ne.u32 %p0, %r0, 0;
 @%p0 bra done;
 mov.u32 %r1, %ctaid.y;
 ld.param.u64 %d0, [rows];
 ld.param.u64 %d1, [out];
 ld.param.u32 %r2, [width];
 mul.lo.u32 %r3, %r1, %r2;
 mul.wide.u32 %d2, %r3, 4;
 add.u64 %d0, %d0, %d2;
 mul.wide.u32 %d2, %r1, 4;
 add.u64 %d1, %d1, %d2;
 ld.global.f32 %f0, [%d0];
 mov.u32 %r4, 0;
 mov.u32 %r5, 0;
loop:
 ld.global.f32 %f1, [%d0];
 setp.gt.f32 %p1, %f1, %f0;
 @%p1 mov.f32 %f0, %f1;
 @%p1 mov.u32 %r5, %r4;
 add.u64 %d0, %d0, 4;
 add.u32 %r4, %r4, 1;
 setp.lt.u32 %p2, %r4, %r2;
 @%p2 bra loop;
 st.global.u32 [%d1], %r5;
done:
 ret;
}}

.visible .entry fault(.param .u64 from, .param .u64 to, .param .u32 count) {{
 {registers}
 mov.u64 %d0, 8;
 st.global.u32 [%d0], 1;
 ret;
}}
"
    );
    if capability >= 90 {
        text += &format!(
            "
.visible .entry tiled(.param .align 64 .b8 map[128], .param .u64 to, .param .u32 count) {{
 {registers}
 .shared .align 128 .b8 tile[4096];
 .shared .align 8 .b64 arrived;
 {wait}
 mov.u32 %r0, %tid.x;
 mov.u32 %r5, arrived;
 mov.u32 %r6, tile;
 setp.ne.u32 %p0, %r0, 0;
 @%p0 bra ready;
 mbarrier.init.shared.b64 [%r5], 1;
 fence.proxy.async.shared::cta;
 mov.u64 %d3, map;
 cvta.param.u64 %d3, %d3;
 mov.u32 %r7, 0;
 mbarrier.arrive.expect_tx.shared.b64 %d4, [%r5], 4096;
 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r6], [%d3, {{%r7, %r7}}], [%r5];
ready:
 bar.sync 0;
wait:
 mbarrier.try_wait.parity.shared.b64 %p1, [%r5], 0;
 @!%p1 bra wait;
 ld.param.u32 %r4, [count];
 ld.param.u64 %d1, [to];
next:
 setp.ge.u32 %p2, %r0, %r4;
 @%p2 bra done;
 shl.b32 %r8, %r0, 2;
 add.u32 %r8, %r8, %r6;
 ld.shared.f32 %f0, [%r8];
 max.f32 %f0, %f0, 0f00000000;
 mul.wide.u32 %d2, %r0, 4;
 add.u64 %d2, %d1, %d2;
 st.global.f32 [%d2], %f0;
 mov.u32 %r9, %ntid.x;
 add.u32 %r0, %r0, %r9;
 bra next;
done:
 ret;
}}
"
        );
    }
    text
}

pub const KERNELS: [&str; 5] = ["relu", "matmul", "argmax", "fault", "tiled"];

pub fn rows() -> Dim {
    Dim::from(millrace_ir::Sym::new("t").unwrap())
}

pub fn value(index: usize) -> Arg {
    Arg::Address(Operand::Value(ValueId::from_index(index)))
}

pub fn launch(kernel: &str, grid: Dim, threads: u32, args: Vec<Arg>) -> Launch {
    Launch {
        kernel: KERNELS.iter().position(|k| *k == kernel).unwrap(),
        grid: [grid, Dim::from(1u64), Dim::from(1u64)],
        block: [threads, 1, 1],
        cluster: 1,
        shared: 0,
        dependent: true,
        tiles: None,
        args,
    }
}

/// How `y = relu(relu(x) w0) w1 + 1` runs: the first relu by the tensor memory unit where there is one, the second by
/// way of scratch memory.
pub fn table(device: &DeviceInfo) -> LaunchTable {
    let count = rows().mul(&Dim::from(WIDTH));
    let blocks = count.ceil_div(128);
    let elements = || Arg::I32(count.clone());
    let weight = |index| Arg::Address(Operand::Weight(WeightId::from_index(index)));
    let always = |launches| Variant { when: Vec::new(), launches, library: None };
    let first = match device.capability >= 90 {
        true => {
            let map = TensorMap {
                of: MapBase::Address(Operand::Value(ValueId::from_index(0))),
                dtype: DType::F32,
                shape: vec![Dim::from(WIDTH), rows()],
                strides: vec![Dim::from(WIDTH * 4)],
                tile: vec![WIDTH as u32, ROWS as u32],
                swizzle: 0,
            };
            launch("tiled", rows().ceil_div(ROWS as i64), 128, vec![Arg::Map(map), value(1), elements()])
        }
        false => launch("relu", blocks.clone(), 128, vec![value(0), value(1), elements()]),
    };
    let scratch = || Arg::Workspace(Dim::from(256u64));
    let second = vec![
        launch("relu", blocks.clone(), 128, vec![value(2), scratch(), elements()]),
        launch("relu", blocks, 128, vec![scratch(), value(3), elements()]),
    ];
    let product = |from, w, to, bias| {
        launch("matmul", rows(), WIDTH as u32, vec![value(from), weight(w), value(to), Arg::F32(bias)])
    };
    let steps = [vec![first], vec![product(1, 0, 2, 0.0)], second, vec![product(3, 1, 4, 1.0)]];
    let kernel = |name: &&str| DeviceKernel {
        entry: name.to_string(),
        family: format!("cuda.test.{name}"),
        source: "0".repeat(64),
        image: 0,
        registers: 0,
        shared: 0,
        local: 0,
    };
    let there = if device.capability >= 90 { KERNELS.len() } else { KERNELS.len() - 1 };
    LaunchTable {
        arch: arch(device).name().into(),
        kernels: KERNELS[..there].iter().map(kernel).collect(),
        steps: steps
            .into_iter()
            .enumerate()
            .map(|(first, launches)| LaunchStep {
                first,
                nodes: 1,
                variants: vec![always(launches)],
                streamed: Vec::new(),
            })
            .collect(),
        workspace: rows().mul(&Dim::from(WIDTH * 4)).add(&Dim::from(256u64)),
        counters: 64,
        library_workspace: 0,
        helpers: vec![Helper { name: "argmax_split".into(), kernel: 2, threads: 32 }],
    }
}

pub fn arch(device: &DeviceInfo) -> Arch {
    Arch::ALL
        .into_iter()
        .find(|a| a.capability() == device.capability)
        .expect("an architecture of this version")
}

/// The stored weight, as numbers.
pub fn stored() -> Vec<f32> {
    (0..WIDTH * WIDTH).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect()
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn manifest() -> Manifest {
    Manifest {
        kind: ModelKind::Graph,
        family: "test".into(),
        target: "cuda".into(),
        dtype: DType::F32,
        pipeline: String::new(),
        weight_streaming: false,
        model: None,
        profiles: Vec::new(),
    }
}

/// The engine as a file in memory.
pub fn engine(table: LaunchTable, image: Vec<u8>) -> Engine {
    let mut builder = Builder::new("net");
    let t = builder.dim("t", 1, ROWS, None).unwrap();
    let x = builder.input("x", TensorType::new(DType::F32, [t, Dim::from(WIDTH)]));
    let square = || TensorType::new(DType::F32, [WIDTH, WIDTH]);
    let file = WeightExpr::File { file: "model".into(), key: "stored".into() };
    let w0 = builder.weight("w0", square(), file);
    let w1 = builder.weight("w1", square(), WeightExpr::Random { seed: 3, std: 0.25 });
    let relu = || Unary { function: UnaryFn::Relu };
    let matmul = || Matmul { transpose_b: false, out: None };
    let a = builder.one(relu(), &[x], "a").unwrap();
    let b = builder.one(matmul(), &[a, w0], "b").unwrap();
    let c = builder.one(relu(), &[b], "c").unwrap();
    let d = builder.one(matmul(), &[c, w1], "d").unwrap();
    builder.output("y", d).unwrap();
    let mut module = builder.finish();
    module.phase = Phase::Lowered;
    module.target = Some("cuda".into());
    let row = rows().mul(&Dim::from(WIDTH * 4));
    let arena = module.arenas.push(ArenaDecl { name: "a".into(), size: row.add(&row), align: 64 });
    let kernel = module.kernels.push(Kernel { name: "cuda.test".into(), dtypes: vec![DType::F32] });
    for (at, id) in module.graph.order.clone().into_iter().enumerate() {
        let node = module.graph.nodes.get_mut(id).unwrap();
        node.kernel = Some(kernel);
        let result = node.results[0];
        let offset = if at % 2 == 0 { Dim::from(0u64) } else { row.clone() };
        let place = if at == 3 { Place::Output(0) } else { Place::Arena { arena, offset } };
        module.graph.values.get_mut(result).unwrap().place = Some(place);
    }
    let name = table.arch.clone();
    let mut writer = EngineWriter::in_memory(&WriterOptions { producer: "test".into() }).unwrap();
    writer.section(SectionKind::Manifest, "", &manifest().to_json()).unwrap();
    writer.section(SectionKind::Ir, "", text::print(&module).as_bytes()).unwrap();
    let bundle = Bundle { table, images: vec![image] };
    writer.section(SectionKind::Kernels, &name, &bundle.encode()).unwrap();
    let mut weights = writer.begin_weights().unwrap();
    let shape = vec![WIDTH as u64; 2];
    let meta = WeightMeta { name: "w0".into(), dtype: DType::F32, shape, sources: vec!["stored".into()] };
    weights.weight(meta, &bytes(&stored())).unwrap();
    weights.finish().unwrap();
    Engine::from_bytes(writer.into_bytes().unwrap(), Verify::Full).unwrap()
}

pub fn plain_engine(device: &DeviceInfo) -> Engine {
    engine(table(device), ptx(device.capability).into_bytes())
}

/// Input of `rows` rows that differs from call to call.
pub fn input(rows: usize, call: usize) -> Vec<f32> {
    (0..rows * WIDTH).map(|i| ((i * 13 + call * 7) % 29) as f32 / 8.0 - 1.5).collect()
}

/// What the engine computes, on the host in f64.
pub fn expected(engine: &Engine, x: &[f32]) -> Vec<f64> {
    let mut reader = millrace_ir::weights::WeightReader::new(engine.module());
    let mut w1 = vec![0; WIDTH * WIDTH * 4];
    reader.read(WeightId::from_index(1), 0, &mut w1).unwrap();
    let w1: Vec<f32> = w1.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
    let relu = |v: &f64| v.max(0.0);
    let product = |x: &[f64], w: &[f32], bias: f64| -> Vec<f64> {
        x.chunks(WIDTH)
            .flat_map(|row| {
                (0..WIDTH).map(move |n| {
                    row.iter().enumerate().map(|(k, v)| v * f64::from(w[k * WIDTH + n])).sum::<f64>() + bias
                })
            })
            .collect()
    };
    let x: Vec<f64> = x.iter().map(|v| relu(&f64::from(*v))).collect();
    let hidden: Vec<f64> = product(&x, &stored(), 0.0).iter().map(relu).collect();
    product(&hidden, &w1, 1.0)
}

pub fn tensor<'a>(shape: &'a [u64; 2], bytes: &'a [u8]) -> TensorRef<'a> {
    TensorRef { dtype: DType::F32, shape, bytes }
}

/// Runs a step and compares output and argmax with the host.
pub fn step(session: &mut Session<'_>, rows: usize, call: usize, argmax: bool) {
    let x = input(rows, call);
    let (shape, data) = ([rows as u64, WIDTH as u64], bytes(&x));
    let told = match argmax {
        true => Some(session.run_argmax(&[tensor(&shape, &data)], 0).unwrap()),
        false => {
            session.run(&[tensor(&shape, &data)]).unwrap();
            None
        }
    };
    let found = check_output(session, &x);
    let largest = |row: &[f32]| (0..WIDTH).rev().max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i32;
    let indices: Vec<i32> = found.chunks(WIDTH).map(largest).collect();
    if let Some(told) = told {
        assert_eq!(told, indices);
    }
    assert_eq!(session.argmax(0).unwrap(), indices);
}

/// Runs a step in `arena`, if there is one, and compares the output with the host.
pub fn step_in(session: &mut Session<'_>, rows: usize, call: usize, arena: Option<&mut Arena>) {
    let x = input(rows, call);
    let (shape, data) = ([rows as u64, WIDTH as u64], bytes(&x));
    match arena {
        Some(arena) => session.run_in(&mut arena.lend(), &[tensor(&shape, &data)]).unwrap(),
        None => session.run(&[tensor(&shape, &data)]).unwrap(),
    }
    check_output(session, &x);
}

/// Compares the output of the last step, on input `x`, with the host.
pub fn check_output(session: &Session<'_>, x: &[f32]) -> Vec<f32> {
    let output = session.read_output(0).unwrap();
    assert_eq!(output.shape, [(x.len() / WIDTH) as u64, WIDTH as u64]);
    let found: Vec<f32> = output.bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
    let expected = expected(session.engine(), x);
    assert_eq!(found.len(), expected.len());
    for (at, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!((f64::from(*a) - b).abs() <= 1e-4 * b.abs().max(1.0), "row {}: {a} and {b}", at / WIDTH);
    }
    found
}
