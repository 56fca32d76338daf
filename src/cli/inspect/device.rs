//! What an engine for GPUs launches: kernels, steps with their variants, launches at given sizes, CUDA C++.

use std::collections::BTreeMap;
use std::fmt::Write;

use millrace::ir::engine::SectionKind;
use millrace::ir::fold::layer;
use millrace::ir::kernel_sources::KernelSources;
use millrace::ir::launch::{Bundle, ByLibrary, Launch, LaunchStep, LaunchTable, Variant};
use millrace::ir::{Bindings, Module, Sym};
use millrace::{Engine, Error, Kind, Result};
use serde_json::{Value, json};

use crate::cli::{print, print_json, usage};

/// The launch tables of an engine in the order of its file; none for other targets.
pub fn tables(engine: &Engine) -> Result<Vec<LaunchTable>> {
    if engine.manifest().target != "cuda" {
        return Ok(Vec::new());
    }
    engine.file().kernels().map(|(_, bytes)| Bundle::decode(bytes).map(|b| b.table)).collect()
}

/// Nodes of a step as `n3 rms_norm`, and the source layers they stand for.
fn nodes(module: &Module, step: &LaunchStep) -> (Vec<String>, Vec<String>) {
    let order = module.graph.order.iter().skip(step.first).take(step.nodes);
    let (mut nodes, mut layers) = (Vec::new(), Vec::new());
    for id in order {
        let node = &module.graph.nodes[*id];
        nodes.push(format!("{id} {}", node.op.name()));
        layers.extend(node.loc.iter().map(|l| l.to_string()));
    }
    layers.sort();
    layers.dedup();
    (nodes, layers)
}

/// Threads of a block, and most bytes of dynamic shared memory, of each kernel.
fn blocks(table: &LaunchTable) -> Vec<(u32, u32)> {
    let mut blocks = vec![(0, 0); table.kernels.len()];
    for launch in table.steps.iter().flat_map(LaunchStep::all_launches) {
        let (threads, shared) = &mut blocks[launch.kernel];
        *threads = launch.block.iter().product::<u32>().max(*threads);
        *shared = launch.shared.max(*shared);
    }
    table.helpers.iter().for_each(|h| blocks[h.kernel].0 = h.threads.max(blocks[h.kernel].0));
    blocks
}

fn conditions(variant: &Variant) -> String {
    let one = |c: &millrace::ir::launch::Condition| match (c.min, c.max) {
        (min, u64::MAX) => format!("{} >= {min}", c.dim),
        (min, max) if min == max => format!("{} = {min}", c.dim),
        (min, max) => format!("{} in {min}..={max}", c.dim),
    };
    match variant.when.is_empty() {
        true => "else".to_string(),
        false => variant.when.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

fn launch(table: &LaunchTable, launch: &Launch) -> Value {
    json!({
        "entry": table.kernels[launch.kernel].entry,
        "grid": launch.whole_grid().iter().map(ToString::to_string).collect::<Vec<_>>(),
        "block": launch.block,
        "cluster": launch.cluster,
        "shared": launch.shared,
        "dependent": launch.dependent,
    })
}

/// What runs instead where the library is there.
fn by_library(table: &LaunchTable, run: &ByLibrary) -> Value {
    let products = run.products.iter().map(|p| {
        json!({
            "library": "cuBLASLt", "algorithm": p.suggestion, "rows": p.rows.to_string(), "n": p.n, "k": p.k,
            "bias": p.bias.is_some(), "residual": p.residual.is_some(), "dtype": p.dtype.name(), "out": p.out.name(),
        })
    });
    json!({
        "before": run.before.iter().map(|l| launch(table, l)).collect::<Vec<_>>(),
        "products": products.collect::<Vec<_>>(),
    })
}

/// The same in words.
fn library_words(table: &LaunchTable, run: &ByLibrary) -> String {
    let before = run.before.iter().map(|l| table.kernels[l.kernel].entry.clone());
    let products = run.products.iter().map(|p| {
        let bias = if p.bias.is_some() { " + bias" } else { "" };
        let residual = if p.residual.is_some() { " + residual" } else { "" };
        format!("cublaslt-{} [{}, {}] x [{}, {}]{bias}{residual}", p.suggestion, p.rows, p.k, p.n, p.k)
    });
    before.chain(products).collect::<Vec<_>>().join(", ")
}

/// The tables for programs.
pub fn json(engine: &Engine) -> Result<Value> {
    let module = engine.module();
    let table = |table: &LaunchTable| {
        let kernels = table.kernels.iter().zip(blocks(table)).map(|(k, (threads, dynamic))| {
            json!({
                "entry": k.entry, "family": k.family, "source": k.source,
                "registers": (k.registers > 0).then_some(k.registers),
                "threads": threads, "shared": k.shared, "dynamic_shared": dynamic, "local": k.local,
            })
        });
        let steps = table.steps.iter().map(|step| {
            let (nodes, layers) = nodes(module, step);
            let variants = step.variants.iter().map(|v| {
                let when: Vec<Value> = v
                    .when
                    .iter()
                    .map(|c| json!({"dim": c.dim.to_string(), "min": c.min, "max": c.max}))
                    .collect();
                let launches: Vec<Value> = v.launches.iter().map(|l| launch(table, l)).collect();
                json!({"when": when, "launches": launches, "library": v.library.as_ref().map(|l| by_library(table, l))})
            });
            json!({"nodes": nodes, "layers": layers, "variants": variants.collect::<Vec<_>>()})
        });
        json!({
            "arch": table.arch,
            "kernels": kernels.collect::<Vec<_>>(),
            "steps": steps.collect::<Vec<_>>(),
            "workspace": table.workspace.to_string(),
            "counters": table.counters,
            "library_workspace": table.library_workspace,
        })
    };
    Ok(tables(engine)?.iter().map(table).collect())
}

/// Prints kernels and steps of each architecture.
pub fn print_kernels(engine: &Engine) -> Result<()> {
    for table in tables(engine)? {
        let mut text = format!(
            "{}: {} kernels, {} steps, {} bytes of workspace, {} of counters\n",
            table.arch,
            table.kernels.len(),
            table.steps.len(),
            table.workspace,
            table.counters
        );
        if table.library_workspace > 0 {
            let _ = writeln!(
                text,
                "  cuBLASLt, where it is installed: {} variants, {} bytes of workspace",
                table.by_library().count(),
                table.library_workspace
            );
        }
        for (kernel, (threads, dynamic)) in table.kernels.iter().zip(blocks(&table)) {
            // Writing to a string cannot fail.
            let _ = match kernel.registers {
                // What the driver makes of PTX shows on the device.
                0 => writeln!(
                    text,
                    "  {} {}: {threads} threads, PTX, shared {dynamic}",
                    kernel.entry, kernel.family
                ),
                registers => writeln!(
                    text,
                    "  {} {}: {threads} threads, {registers} registers, shared {} + {dynamic}, local {}",
                    kernel.entry, kernel.family, kernel.shared, kernel.local
                ),
            };
        }
        for step in table.steps.iter().filter(|s| s.variants.iter().any(|v| !v.launches.is_empty())) {
            let (nodes, layers) = nodes(engine.module(), step);
            let _ = writeln!(text, "  {}: {}", nodes.join(", "), layers.join(", "));
            for variant in step.all_variants() {
                if let Some(run) = &variant.library {
                    let _ = writeln!(
                        text,
                        "    {}: where cuBLASLt is installed {}",
                        conditions(variant),
                        library_words(&table, run)
                    );
                }
                for (at, launch) in variant.launches.iter().enumerate() {
                    let when = if at == 0 { conditions(variant) } else { "then".to_string() };
                    let [x, y, z] = launch.whole_grid();
                    let _ = writeln!(
                        text,
                        "    {when}: {} grid [{x}, {y}, {z}]",
                        table.kernels[launch.kernel].entry
                    );
                }
            }
        }
        print(&text)?;
    }
    Ok(())
}

/// Reads `t=1,b=1`; symbols that are not named take their smallest values.
///
/// # Errors
/// `usage/bindings` for another form, an unknown symbol or a value outside its range.
fn bindings(module: &Module, text: &str) -> Result<Bindings> {
    let bad = |what: String| {
        let known: Vec<String> =
            module.dims.iter().map(|d| format!("{}={}..{}", d.sym.name(), d.min, d.max)).collect();
        usage("usage/bindings", what).hint(format!("symbols and their values are {}", known.join(", ")))
    };
    let mut bindings = Bindings::minima(&module.dims);
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let pair = part.split_once('=').map(|(name, value)| (name.trim().trim_start_matches('$'), value));
        let (name, value) = pair.ok_or_else(|| bad(format!("`{part}` is not of the form t=1")))?;
        let value: u64 = value.trim().parse().map_err(|_| bad(format!("`{value}` is no number")))?;
        let decl = Sym::new(name).and_then(|sym| module.dims.iter().find(|d| d.sym == sym));
        let decl = decl.ok_or_else(|| bad(format!("there is no symbol `{name}`")))?;
        if !(decl.min..=decl.max).contains(&value) || !value.is_multiple_of(decl.multiple.max(1)) {
            return Err(bad(format!("{name} = {value} is outside its range")));
        }
        bindings.set(decl.sym, value);
    }
    Ok(bindings)
}

/// The launches of a step at `text`, with their number by layer.
pub fn print_at(engine: &Engine, text: &str, as_json: bool) -> Result<()> {
    let module = engine.module();
    let bindings = bindings(module, text)?;
    let tables = tables(engine)?;
    if tables.is_empty() {
        return Err(usage("usage/no-launches", "the engine launches no kernels")
            .hint("--at and --source are for engines of the target cuda"));
    }
    let mut list = Vec::new();
    for table in &tables {
        let launches = table.launches_at(&bindings).ok_or_else(|| {
            Error::new(Kind::BadInput, "engine/launch-table", "a grid has no value at these sizes")
        })?;
        let mut per_layer: BTreeMap<String, usize> = BTreeMap::new();
        let mut lines = Vec::new();
        for at in &launches {
            let (nodes, layers) = nodes(module, &table.steps[at.step]);
            let of = layers
                .iter()
                .find_map(|l| layer(l))
                .map_or("(none)".to_string(), |(stem, n)| format!("{stem}.{n}"));
            *per_layer.entry(of.clone()).or_default() += 1;
            let kernel = &table.kernels[at.launch.kernel];
            lines.push(json!({
                "entry": kernel.entry, "family": kernel.family, "grid": at.grid, "block": at.launch.block,
                "shared": at.launch.shared, "layer": of, "nodes": nodes, "library": at.library,
            }));
        }
        let mut layers_of: BTreeMap<usize, usize> = BTreeMap::new();
        per_layer
            .iter()
            .filter(|(l, _)| *l != "(none)")
            .for_each(|(_, n)| *layers_of.entry(*n).or_default() += 1);
        if !as_json {
            let mut text = format!("{}: {} launches", table.arch, launches.len());
            for (count, layers) in &layers_of {
                let _ = write!(text, ", {count} in each of {layers} layers");
            }
            text.push('\n');
            for line in &lines {
                let nodes: Vec<&str> =
                    line["nodes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let field = |name: &str| line[name].as_str().unwrap_or("");
                let _ = writeln!(
                    text,
                    "  {} {}: {} ({}){}",
                    field("entry"),
                    line["grid"],
                    nodes.join(", "),
                    field("layer"),
                    if line["library"] == true { ", or cuBLASLt" } else { "" }
                );
            }
            print(&text)?;
        }
        list.push(json!({"arch": table.arch, "launches": lines, "per_layer": per_layer}));
    }
    if as_json { print_json(&json!(list)) } else { Ok(()) }
}

/// Prints the CUDA C++ of one kernel, or of all, as the compiler got it.
pub fn print_source(engine: &Engine, entry: &str) -> Result<()> {
    let bytes = engine.file().section(SectionKind::KernelSources).ok_or_else(|| {
        usage("usage/no-launches", "the engine has no texts of kernels")
            .hint("--at and --source are for engines of the target cuda")
    })?;
    let sources = KernelSources::decode(bytes)?;
    let mut found = false;
    for table in tables(engine)? {
        for kernel in table.kernels.iter().filter(|k| entry == "all" || k.entry == entry) {
            let text = sources.text(&kernel.source).ok_or_else(|| {
                Error::new(
                    Kind::BadInput,
                    "engine/kernel-sources",
                    format!("there is no text of {}", kernel.entry),
                )
            })?;
            found = true;
            print(&format!(
                "// {} for {}\n#define KERNEL {}\n{text}",
                kernel.family, table.arch, kernel.entry
            ))?;
        }
    }
    if found {
        return Ok(());
    }
    Err(usage("usage/no-kernel", format!("there is no kernel `{entry}`"))
        .hint("`inspect --kernels` lists them; `all` prints every one"))
}
