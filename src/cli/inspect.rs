//! `millrace inspect`: everything an engine is, traced to the layers of the source model.

mod device;

pub use device::tables;

use std::path::PathBuf;

use millrace::compiler::codegen::WeightMode;
use millrace::fit::{Question, Subject};
use millrace::ir::{Bindings, Module, ShapeProfile, text};
use millrace::page::{Facts, FileFacts, Streaming, page_with};
use millrace::{Engine, Result, SessionOptions};
use serde_json::{Value, json};

use super::compile::{weight_bytes, write_page};
use super::{memory, print, print_json, size};

/// Show what an engine is made of.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file
    engine: PathBuf,
    /// Report everything as JSON
    #[arg(long)]
    json: bool,
    /// Print the lowered graph as IR text
    #[arg(long)]
    ir: bool,
    /// Print the graph in the DOT language, repeated layers once
    #[arg(long)]
    dot: bool,
    /// Write everything as one self-contained HTML page
    #[arg(long, value_name = "PAGE", conflicts_with_all = ["json", "ir", "dot", "weights", "kernels"])]
    html: Option<PathBuf>,
    /// Print the memory plan, one line a buffer; with --weights-budget, the streaming schedule too
    #[arg(long)]
    memory: bool,
    /// Weight budget whose residency and copies are shown: 6GiB, 40% or resident
    #[arg(long, value_name = "BUDGET")]
    weights_budget: Option<String>,
    /// Bytes of a slot of the ring [default: 32MiB]
    #[arg(long, value_name = "SIZE", requires = "weights_budget")]
    ring_slot: Option<String>,
    /// Slots of the ring [default: 2]
    #[arg(long, value_name = "N", requires = "weights_budget")]
    ring_slots: Option<usize>,
    /// Weights of fewer bytes never stream [default: 1MiB]
    #[arg(long, value_name = "SIZE", requires = "weights_budget")]
    ring_small: Option<String>,
    /// Print the weights
    #[arg(long)]
    weights: bool,
    /// Print the kernels with their source layers
    #[arg(long)]
    kernels: bool,
    /// Print the launches of a GPU engine at some sizes, such as t=1,b=1; others take their smallest values
    #[arg(long, value_name = "SIZES")]
    at: Option<String>,
    /// Print the CUDA C++ of a kernel of a GPU engine, or of `all`
    #[arg(long, value_name = "ENTRY")]
    source: Option<String>,
}

fn memory_json(module: &Module, profiles: &[ShapeProfile]) -> Value {
    let maxima = Bindings::maxima(&module.dims);
    let plan = millrace::compiler::passes::plan_report(module, &maxima);
    let streamable: u64 = module
        .used_weights()
        .into_iter()
        .filter(|w| module.weights[*w].stream.is_some())
        .filter_map(|w| millrace::ir::weights::WeightReader::new(module).len(w).ok())
        .sum();
    let states = module.states.iter().filter_map(|(_, s)| s.ty.bytes().extent(&maxima)).sum::<u64>();
    json!({
        "activations": {
            "peak_bytes": plan.map_or(0, |p| p.peak_bytes),
            "lower_bound_bytes": plan.map_or(0, |p| p.lower_bound_bytes),
            "buffers": plan.map_or(0, |p| p.buffers),
            "static_bytes": most_of(profiles, module).or(plan.map(|p| p.peak_bytes)),
            "profiles": super::compile::profiles(module, profiles),
        },
        "weights": {"total_bytes": weight_bytes(module), "streamable_bytes": streamable},
        "states": {"max_bytes": states},
    })
}

/// What static allocation takes where there are profiles: the most that one of them does.
fn most_of(profiles: &[ShapeProfile], module: &Module) -> Option<u64> {
    profiles.iter().filter_map(|p| p.activation_bytes(module)).max()
}

fn kernels(module: &Module) -> Value {
    let mut list = Vec::new();
    for (id, kernel) in module.kernels.iter() {
        let nodes: Vec<Value> = module
            .graph
            .order
            .iter()
            .filter(|n| module.graph.nodes[**n].kernel == Some(id))
            .map(|n| {
                let node = &module.graph.nodes[*n];
                json!({"node": n.to_string(), "op": node.op.name(), "layers": node.loc.iter().map(|l| l.to_string()).collect::<Vec<_>>()})
            })
            .collect();
        let mut layers: Vec<String> = module
            .graph
            .nodes
            .iter()
            .filter(|(_, n)| n.kernel == Some(id))
            .flat_map(|(_, n)| n.loc.iter().map(|l| l.to_string()))
            .collect();
        layers.sort();
        layers.dedup();
        list.push(json!({
            "kernel": id.to_string(),
            "name": kernel.name,
            "dtypes": kernel.dtypes,
            "layers": layers,
            "nodes": nodes,
        }));
    }
    json!(list)
}

fn weights(engine: &Engine) -> Value {
    let module = engine.module();
    let list = module.used_weights().into_iter().map(|id| {
        let weight = &module.weights[id];
        let record = engine.file().weight(&weight.name);
        json!({
            "name": weight.name,
            "dtype": weight.ty.dtype,
            "shape": weight.ty.const_shape(),
            "bytes": millrace::ir::weights::WeightReader::new(module).len(id).ok(),
            "stored": record.is_some() && !engine.file().is_stripped(),
            "sources": record.map(|r| r.sources.clone()),
            "hash": record.map(|r| millrace::compiler::compile::hex(&r.hash)),
            "streamable": weight.stream.as_ref().map(|s| json!({
                "first_use": s.first_use, "tile_axis": s.tile_axis, "tile_bytes": s.tile_bytes,
            })),
        })
    });
    json!(list.collect::<Vec<_>>())
}

/// What a page shows besides the module.
fn facts(engine: &Engine) -> Facts<'_> {
    let (file, module) = (engine.file(), engine.module());
    let all = || module.used_weights().iter().all(|id| file.weight(&module.weights[*id].name).is_some());
    Facts {
        manifest: engine.manifest(),
        weights: match file.is_stripped() {
            true => WeightMode::Stripped,
            false if all() => WeightMode::Complete,
            false => WeightMode::Stored,
        },
        file: Some(FileFacts {
            bytes: file.file_len(),
            identity: millrace::compiler::compile::hex(&file.identity()),
            producer: file.producer().to_string(),
            sections: file.sections().iter().map(|s| (s.label(), s.len)).collect(),
        }),
    }
}

/// The placement that `--weights-budget` asks for.
fn streaming(args: &Args, engine: &Engine) -> Result<Option<Streaming>> {
    let Some(text) = &args.weights_budget else { return Ok(None) };
    let session = SessionOptions {
        budget: memory::budget(text)?,
        ring: memory::ring(args.ring_slot.as_deref(), args.ring_slots, args.ring_small.as_deref())?,
        ..SessionOptions::default()
    };
    let tables = tables(engine)?;
    let subject = Subject { module: engine.module(), manifest: engine.manifest(), table: tables.first() };
    Streaming::of(subject, &Question { session, ..Question::default() }).map(Some)
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let engine = Engine::open(&args.engine)?;
    let module = engine.module();
    if let Some(path) = &args.html {
        let streaming = streaming(args, &engine)?;
        let text = page_with(module, &facts(&engine), None, streaming.as_ref());
        write_page(path, &text)?;
        return print(&format!("wrote {} ({})\n", path.display(), size::show(text.len() as u64)));
    }
    if args.ir {
        return print(&text::print(module));
    }
    if args.dot {
        return print(&millrace::ir::dag::dot(module));
    }
    if let Some(sizes) = &args.at {
        return device::print_at(&engine, sizes, args.json);
    }
    if let Some(entry) = &args.source {
        return device::print_source(&engine, entry);
    }
    if args.json {
        let sections: Vec<Value> = engine
            .file()
            .sections()
            .iter()
            .map(|s| json!({"kind": s.label(), "offset": s.offset, "bytes": s.len}))
            .collect();
        let dims: Vec<Value> = module
            .dims
            .iter()
            .map(|d| json!({"symbol": d.sym.to_string(), "min": d.min, "max": d.max, "hint": d.hint}))
            .collect();
        let named = |list: Vec<(&str, &millrace::ir::TensorType)>| -> Vec<Value> {
            list.into_iter().map(|(n, t)| json!({"name": n, "type": t.to_string()})).collect()
        };
        return print_json(&json!({
            "manifest": engine.manifest(),
            "identity": millrace::compiler::compile::hex(&engine.file().identity()),
            "producer": engine.file().producer(),
            "bytes": engine.file().file_len(),
            "sections": sections,
            "symbols": dims,
            "inputs": named(module.input_types()),
            "outputs": named(module.output_types()),
            "nodes": module.graph.order.len(),
            "memory": memory_json(module, &engine.manifest().profiles),
            "kernels": kernels(module),
            "device": device::json(&engine)?,
            "weights": weights(&engine),
        }));
    }
    if args.memory {
        print_memory(module, &engine.manifest().profiles)?;
        return match streaming(args, &engine)? {
            Some(s) => print(&millrace::ir::plan::stream::schedule(module, &s.demand, &s.placement)),
            None => Ok(()),
        };
    }
    if args.weights {
        for id in module.used_weights() {
            let weight = &module.weights[id];
            let stream = weight.stream.as_ref().map_or_else(String::new, |s| {
                format!("  streamable, first use {}, tiles of {}", s.first_use, size::show(s.tile_bytes))
            });
            let bytes = millrace::ir::weights::WeightReader::new(module).len(id).unwrap_or(0);
            print(&format!("{:>12}  @{} : {}{stream}\n", size::show(bytes), weight.name, weight.ty))?;
        }
        return Ok(());
    }
    if args.kernels {
        for (id, kernel) in module.kernels.iter() {
            let nodes: Vec<_> = module.graph.nodes.iter().filter(|(_, n)| n.kernel == Some(id)).collect();
            print(&format!("{id} {} ({} nodes)\n", kernel.name, nodes.len()))?;
            for (node, n) in nodes {
                let layers: Vec<&str> = n.loc.iter().map(|l| l.as_ref()).collect();
                print(&format!("    {node} {}: {}\n", n.op.name(), layers.join(", ")))?;
            }
        }
        return device::print_kernels(&engine);
    }
    let manifest = engine.manifest();
    let memory = memory_json(module, &manifest.profiles);
    print(&format!(
        "{} {:?} for {}, {}\n{} nodes, {} kernels, pipeline {}\n",
        manifest.family,
        manifest.kind,
        manifest.target,
        manifest.dtype,
        module.graph.order.len(),
        module.kernels.len(),
        manifest.pipeline
    ))?;
    let bytes = |pointer: &str| memory.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    print(&format!(
        "activations {} (lower bound {}), weights {} ({} streamable)\n",
        size::show(bytes("/activations/peak_bytes")),
        size::show(bytes("/activations/lower_bound_bytes")),
        size::show(bytes("/weights/total_bytes")),
        size::show(bytes("/weights/streamable_bytes")),
    ))?;
    print_profiles(module, &manifest.profiles)?;
    for (name, ty) in module.input_types() {
        print(&format!("in   {name}: {ty}\n"))?;
    }
    for (name, ty) in module.output_types() {
        print(&format!("out  {name}: {ty}\n"))?;
    }
    for section in engine.file().sections() {
        print(&format!("{:>12}  {}\n", size::show(section.len), section.label()))?;
    }
    Ok(())
}

/// One line a profile, and what static allocation takes.
fn print_profiles(module: &Module, profiles: &[ShapeProfile]) -> Result<()> {
    for profile in profiles {
        let bytes = profile.activation_bytes(module).unwrap_or(0);
        print(&format!("profile {profile}: activations {}\n", size::show(bytes)))?;
    }
    match most_of(profiles, module) {
        Some(most) => {
            print(&format!("static allocation takes {}, the most of all profiles\n", size::show(most)))
        }
        None => Ok(()),
    }
}

/// One line a buffer: bytes at the upper bounds, lifetime, offset, the layer that makes it.
fn print_memory(module: &Module, profiles: &[ShapeProfile]) -> Result<()> {
    print_profiles(module, profiles)?;
    let maxima = Bindings::maxima(&module.dims);
    for (_, arena) in module.arenas.iter() {
        let bytes = arena.size.extent(&maxima).unwrap_or(0);
        print(&format!(
            "arena {} = {} ({} at the upper bounds)\n",
            arena.name,
            arena.size,
            size::show(bytes)
        ))?;
    }
    for buffer in millrace::ir::plan::liveness(module, true).buffers {
        let value = buffer.values[0];
        let place = module.graph.values[value].place.as_ref();
        let offset = match place {
            Some(millrace::ir::Place::Arena { offset, .. }) => offset.to_string(),
            _ => "-".to_string(),
        };
        let layer = module.graph.def_node(value).and_then(|n| module.graph.nodes[n].loc.first().cloned());
        print(&format!(
            "{:>12}  {:>5}..{:<5} {value} at {offset}  {}\n",
            size::show(buffer.bytes.extent(&maxima).unwrap_or(0)),
            buffer.start,
            buffer.end,
            layer.as_deref().unwrap_or("")
        ))?;
    }
    Ok(())
}
