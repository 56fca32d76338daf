//! Writes the CUDA sources and launches of one site, for measuring kernels apart from the rest:
//! `site_launches MODULE.ir ARCH OUT_FOLDER NAME dim=value..` treats all nodes of the module as one site and writes
//! `NAME.json` with the launches at the given dims, and a `.cu` file for each kernel.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::Path;

use millrace_ir::{Bindings, Operand, Sym, text};
use millrace_kernels::cuda::plan::{Argument, SiteVariant};
use millrace_kernels::cuda::{Arch, Site, plan_site};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn argument(arg: &Argument, bindings: &Bindings) -> Outcome<String> {
    let value = |dim: &millrace_ir::Dim| dim.eval(bindings).ok_or("a dim has no value");
    Ok(match arg {
        Argument::Address(Operand::Value(id)) => format!("[\"value\", \"{id}\"]"),
        Argument::Address(Operand::Weight(id)) => format!("[\"weight\", \"{id}\"]"),
        Argument::Address(Operand::State(id)) => format!("[\"state\", \"{id}\"]"),
        Argument::Workspace(at) => format!("[\"workspace\", {}]", value(at)?),
        Argument::Counters(at) => format!("[\"counters\", {at}]"),
        Argument::I32(dim) => format!("[\"i32\", {}]", value(dim)?),
        Argument::F32(v) => format!("[\"f32\", {v}]"),
        Argument::Map(map) => {
            let dims = |dims: &[millrace_ir::Dim]| -> Outcome<Vec<i64>> {
                dims.iter().map(|d| Ok(value(d)?)).collect()
            };
            let of = match &map.of {
                millrace_ir::launch::MapBase::Address(operand) => {
                    argument(&Argument::Address(*operand), bindings)?
                }
                millrace_ir::launch::MapBase::Workspace(at) => {
                    argument(&Argument::Workspace(at.clone()), bindings)?
                }
            };
            format!(
                "[\"map\", {{\"of\": {of}, \"shape\": {:?}, \"strides\": {:?}, \"tile\": {:?}, \"swizzle\": {}}}]",
                dims(&map.shape)?,
                dims(&map.strides)?,
                map.tile,
                map.swizzle
            )
        }
    })
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [module, arch, out, name, dims @ ..] = args.as_slice() else {
        return Err("usage: site_launches MODULE.ir ARCH OUT_FOLDER NAME dim=value..".into());
    };
    let module = text::parse(&std::fs::read_to_string(module)?)?;
    let arch = Arch::parse(arch).ok_or("unknown architecture")?;
    let mut bindings = Bindings::new();
    for dim in dims {
        let (sym, value) = dim.split_once('=').ok_or("a dim is name=value")?;
        bindings.set(Sym::new(sym).ok_or("bad name of a dim")?, value.parse()?);
    }
    let site = Site { module: &module, nodes: &module.graph.order, arch };
    let planned = plan_site(site).ok_or("no family plans this site")?;
    let holds = |v: &&SiteVariant| v.when.iter().all(|c| c.holds(&bindings));
    let variant = planned.variants.iter().find(holds).ok_or("no variant holds")?;
    let mut json = String::from("{\"launches\": [");
    for (index, launch) in variant.launches.iter().enumerate() {
        let mut hasher = DefaultHasher::new();
        launch.source.text.hash(&mut hasher);
        let file = format!("{:016x}", hasher.finish());
        std::fs::write(Path::new(out).join(format!("{file}.cu")), &launch.source.text)?;
        let grid: Vec<i64> = launch.grid.iter().filter_map(|d| d.eval(&bindings)).collect();
        let args: Outcome<Vec<String>> = launch.args.iter().map(|a| argument(a, &bindings)).collect();
        let comma = if index > 0 { ", " } else { "" };
        write!(
            json,
            "{comma}{{\"file\": \"{file}\", \"family\": \"{}\", \"grid\": {grid:?}, \"threads\": {}, \"cluster\": {}, \
             \"shared\": {}, \"args\": [{}]}}",
            launch.source.family,
            launch.threads,
            launch.cluster,
            launch.shared,
            args?.join(", ")
        )?;
    }
    let workspace = planned.workspace.eval(&bindings).ok_or("the workspace has no size")?;
    write!(json, "], \"workspace\": {workspace}, \"counters\": {}}}", planned.counters)?;
    std::fs::write(Path::new(out).join(format!("{name}.json")), json)?;
    Ok(())
}
