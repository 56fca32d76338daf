//! Engines for tests, built without a compiler.

use millrace_ir::engine::{EngineWriter, SectionKind, Verify, WeightMeta, WriterOptions};
use millrace_ir::launch::{
    Arg, Bundle, ByLibrary, DeviceKernel, LIBRARY_WORKSPACE, Launch, LaunchStep, LaunchTable, Product,
    Variant,
};
use millrace_ir::manifest::{Manifest, ModelKind};
use millrace_ir::ops::Binary;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::{
    ArenaDecl, Builder, DType, Dim, Id, Kernel, Module, Operand, Phase, Place, Sym, TensorType, ValueId,
    WeightExpr, WeightId, text,
};

use crate::engine::Engine;

/// Elements of each tensor, an odd number so that nothing is aligned by itself.
pub(super) const ELEMENTS: usize = 4099;

/// `y = x + stored + random + splat`, lowered for cuda.
pub(super) fn sums() -> Module {
    let mut builder = Builder::new("sums");
    let ty = || TensorType::new(DType::F32, [ELEMENTS]);
    let mut sum = builder.input("x", ty());
    let exprs = [
        WeightExpr::File { file: "model".into(), key: "stored".into() },
        WeightExpr::Random { seed: 7, std: 1.0 },
        WeightExpr::Splat(0.5),
    ];
    for (index, expr) in exprs.into_iter().enumerate() {
        let weight = builder.weight(&format!("w{index}"), ty(), expr);
        sum = builder.one(Binary { function: BinaryFn::Add }, &[sum, weight], "sum").unwrap();
    }
    builder.output("y", sum).unwrap();
    let mut module = builder.finish();
    module.phase = Phase::Lowered;
    module.target = Some("cuda".into());
    let size = Dim::from(2 * 16448u64);
    let arena = module.arenas.push(ArenaDecl { name: "a".into(), size, align: 64 });
    let kernel = module.kernels.push(Kernel { name: "cuda.test".into(), dtypes: vec![DType::F32; 3] });
    for id in module.graph.order.clone() {
        let node = module.graph.nodes.get_mut(id).unwrap();
        node.kernel = Some(kernel);
        let (at, result) = (id.index(), node.results[0]);
        let offset = Dim::from(at as u64 % 2 * 16448);
        let place = if at == 2 { Place::Output(0) } else { Place::Arena { arena, offset } };
        module.graph.values.get_mut(result).unwrap().place = Some(place);
    }
    module
}

/// The bytes of the weight that is stored.
pub(super) fn stored() -> Vec<u8> {
    (0..ELEMENTS).flat_map(|i| (i as f32 - 100.0).to_le_bytes()).collect()
}

/// An engine of [`sums`] for `target` with kernel sections.
pub(super) fn engine(target: &str, bundles: &[(&str, Vec<u8>)]) -> Engine {
    let mut module = sums();
    module.target = Some(target.into());
    let manifest = Manifest {
        kind: ModelKind::Graph,
        family: "test".into(),
        target: target.into(),
        dtype: DType::F32,
        pipeline: String::new(),
        weight_streaming: false,
        model: None,
        profiles: Vec::new(),
    };
    let mut writer = EngineWriter::in_memory(&WriterOptions { producer: "test".into() }).unwrap();
    writer.section(SectionKind::Manifest, "", &manifest.to_json()).unwrap();
    writer.section(SectionKind::Ir, "", text::print(&module).as_bytes()).unwrap();
    for (name, bytes) in bundles {
        writer.section(SectionKind::Kernels, name, bytes).unwrap();
    }
    let mut weights = writer.begin_weights().unwrap();
    let meta = WeightMeta {
        name: "w0".into(),
        dtype: DType::F32,
        shape: vec![ELEMENTS as u64],
        sources: vec!["stored".into()],
    };
    weights.weight(meta, &stored()).unwrap();
    weights.finish().unwrap();
    Engine::from_bytes(writer.into_bytes().unwrap(), Verify::Full).unwrap()
}

/// The bytes of a bundle.
pub(super) fn encoded(table: LaunchTable) -> Vec<u8> {
    Bundle { table, images: vec![b"none".to_vec()] }.encode()
}

/// A table of one step of one node that may run by a library: `%1 = %0 weight#0^T` with `t` rows, 4 columns each.
pub(super) fn library_table() -> LaunchTable {
    let t = || Dim::from(Sym::new("t").unwrap());
    let (one, weight) = (|| Dim::from(1u64), Operand::Weight(WeightId::from_index(0)));
    let value = |index| Operand::Value(ValueId::from_index(index));
    let launch = Launch {
        kernel: 0,
        grid: [t(), one(), one()],
        block: [32, 1, 1],
        cluster: 1,
        shared: 0,
        dependent: true,
        tiles: None,
        args: [value(0), weight, value(1)].map(Arg::Address).to_vec(),
    };
    let product = Product {
        x: value(0),
        weight,
        first: 0,
        y: value(1),
        bias: None,
        residual: None,
        rows: t(),
        n: 4,
        k: 4,
        dtype: DType::F32,
        out: DType::F32,
        suggestion: 0,
        at: 64,
    };
    let library = Some(ByLibrary { before: Vec::new(), products: vec![product] });
    let kernel = DeviceKernel {
        entry: "k".into(),
        family: "cuda.test".into(),
        source: "0".repeat(64),
        image: 0,
        registers: 0,
        shared: 0,
        local: 0,
    };
    LaunchTable {
        arch: "sm_90a".into(),
        kernels: vec![kernel],
        steps: vec![LaunchStep {
            first: 0,
            nodes: 1,
            variants: vec![Variant { when: Vec::new(), launches: vec![launch], library }],
            streamed: Vec::new(),
        }],
        workspace: Dim::from(0u64),
        counters: 0,
        library_workspace: LIBRARY_WORKSPACE,
        helpers: Vec::new(),
    }
}
