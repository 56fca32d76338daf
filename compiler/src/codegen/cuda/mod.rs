//! Code generation of the CUDA target: sites, launch tables, device images.

mod build;
#[allow(unsafe_code)]
mod nvrtc;
mod trials;

pub use build::{BuildCounts, Builder, Built, Order};
pub use nvrtc::version as nvrtc_version;
pub use trials::{Trial, TrialBuffer, TrialCandidate, TrialFill, TrialProduct, splits, trials, tuned};

use std::collections::HashMap;
use std::sync::Arc;

use millrace_ir::launch::{
    Arg, Bundle, ByLibrary, Helper, LIBRARY_WORKSPACE, Launch, LaunchStep, LaunchTable, Variant,
};
use millrace_ir::verify::Verified;
use millrace_ir::{DType, Dim, Error, Id, Kernel, KernelId, Kind, Module, NodeId, Phase, Result, text};
use millrace_kernels::cuda::{
    Arch, Argument, Choices, Planned, Site, SiteLaunch, SiteVariant, Source, helpers, plan_site_with,
};

/// The target's name.
pub const TARGET: &str = "cuda";

fn unsupported(module: &Module, id: NodeId, arch: Arch) -> Error {
    let message = format!("no {arch} kernel runs `{}`", text::print_node(module, id));
    Error::new(Kind::Unsupported, "compile/no-kernel", message)
        .at(module.graph.nodes[id].loc.first().map_or_else(|| id.to_string(), ToString::to_string))
        .hint("compile for cpu, or change the element type")
}

/// The answers for every site of a module, in order. A group that no family takes as a whole runs node by node.
fn plan(module: &Module, arch: Arch, choices: &Choices) -> Result<Vec<(std::ops::Range<usize>, Planned)>> {
    let order = &module.graph.order;
    let mut planned = Vec::new();
    for group in module.graph.launch_groups(order) {
        let site = |range: std::ops::Range<usize>| Site { module, nodes: &order[range], arch };
        if group.len() > 1
            && let Some(answer) = plan_site_with(site(group.clone()), choices)
        {
            planned.push((group, answer));
            continue;
        }
        for at in group {
            let answer = plan_site_with(site(at..at + 1), choices)
                .ok_or_else(|| unsupported(module, order[at], arch))?;
            planned.push((at..at + 1, answer));
        }
    }
    Ok(planned)
}

/// A launch table whose kernels are not built yet: `kernel` indexes `sources`.
struct Draft {
    arch: Arch,
    steps: Vec<LaunchStep>,
    helpers: Vec<Helper>,
    sources: Vec<Arc<Source>>,
    workspace: Dim,
    counters: u64,
}

impl Draft {
    fn of(module: &Module, arch: Arch, choices: &Choices) -> Result<Draft> {
        let mut draft = Draft {
            arch,
            steps: Vec::new(),
            helpers: Vec::new(),
            sources: Vec::new(),
            workspace: Dim::from(0u64),
            counters: 0,
        };
        let mut known = HashMap::new();
        let mut index = |sources: &mut Vec<Arc<Source>>, source: Arc<Source>| {
            *known.entry(source.text.clone()).or_insert_with(|| {
                sources.push(source);
                sources.len() - 1
            })
        };
        for (range, planned) in plan(module, arch, choices)? {
            draft.workspace = draft.workspace.max_of(&planned.workspace);
            draft.counters = draft.counters.max(planned.counters);
            let mut table = |planned: Vec<SiteVariant>| {
                let mut variants = Vec::with_capacity(planned.len());
                for variant in planned {
                    let mut launches = |launches: Vec<SiteLaunch>| -> Vec<Launch> {
                        let of = |launch: SiteLaunch| {
                            let kernel = index(&mut draft.sources, launch.source.clone());
                            table_launch(launch, kernel, arch)
                        };
                        launches.into_iter().map(of).collect()
                    };
                    variants.push(table_variant(variant, &mut launches));
                }
                variants
            };
            let (variants, streamed) = (table(planned.variants), table(planned.streamed));
            draft.steps.push(LaunchStep { first: range.start, nodes: range.len(), variants, streamed });
        }
        for (name, source, threads) in helpers(arch) {
            let kernel = index(&mut draft.sources, source);
            draft.helpers.push(Helper { name: name.to_string(), kernel, threads });
        }
        Ok(draft)
    }
}

/// Bytes of scratch memory for products of a library, if any of `steps` names them.
fn library_workspace(steps: &[LaunchStep]) -> u64 {
    let named = steps.iter().flat_map(|s| &s.variants).any(|v| v.library.is_some());
    if named { LIBRARY_WORKSPACE } else { 0 }
}

/// A variant as a table has it; `launches` finds the kernels.
fn table_variant(variant: SiteVariant, launches: &mut dyn FnMut(Vec<SiteLaunch>) -> Vec<Launch>) -> Variant {
    let SiteVariant { when, launches: own, library } = variant;
    let own = launches(own);
    let library = library.map(|l| ByLibrary { before: launches(l.before), products: l.products });
    Variant { when, launches: own, library }
}

/// A launch as a table has it.
fn table_launch(launch: SiteLaunch, kernel: usize, arch: Arch) -> Launch {
    let SiteLaunch { source: _, grid, threads, cluster, shared, dependent, tiles, args } = launch;
    Launch {
        kernel,
        grid,
        block: [threads, 1, 1],
        cluster,
        shared,
        dependent: dependent && arch.has_tma(),
        tiles,
        args: args.into_iter().map(argument).collect(),
    }
}

fn argument(argument: Argument) -> Arg {
    match argument {
        Argument::Address(operand) => Arg::Address(operand),
        Argument::Workspace(offset) => Arg::Workspace(offset),
        Argument::Counters(offset) => Arg::Counters(offset),
        Argument::I32(value) => Arg::I32(value),
        Argument::F32(value) => Arg::F32(value),
        Argument::Map(map) => Arg::Map(map),
    }
}

/// A module lowered for CUDA, with the device code of each architecture.
pub struct Lowered {
    /// The module; each node names the family that runs it.
    pub module: Module,
    /// Launch table and images by architecture.
    pub bundles: Vec<Bundle>,
    /// How many kernels came from where.
    pub counts: BuildCounts,
    /// CUDA C++ of every kernel by its hash, in order of first use.
    pub sources: Vec<(String, Arc<Source>)>,
}

/// Chooses kernels for every node of a planned module and builds them for `archs`; `choices` replace built-in ones.
///
/// # Errors
/// `compile/no-kernel` for a node that no family runs, and what [`Builder::build`] gives.
pub fn lower(module: Verified<'_>, archs: &[Arch], builder: &Builder, choices: &Choices) -> Result<Lowered> {
    let mut lowered = module.module().clone();
    let drafts = archs.iter().map(|arch| Draft::of(&lowered, *arch, choices)).collect::<Result<Vec<_>>>()?;
    let orders: Vec<Order<'_>> = drafts
        .iter()
        .flat_map(|d| d.sources.iter().map(|source| Order { source: source.as_ref(), arch: d.arch }))
        .collect();
    let (built, counts) = builder.build(&orders)?;
    name_kernels(&mut lowered, drafts.first());
    let mut built = built.into_iter();
    let mut bundles = Vec::new();
    let mut sources: Vec<(String, Arc<Source>)> = Vec::new();
    for draft in &drafts {
        let (mut kernels, mut images) = (Vec::new(), Vec::new());
        for (source, mut one) in draft.sources.iter().zip(built.by_ref()) {
            if !sources.iter().any(|(hash, _)| *hash == one.kernel.source) {
                sources.push((one.kernel.source.clone(), source.clone()));
            }
            one.kernel.image = images.len();
            images.push(one.image);
            kernels.push(one.kernel);
        }
        let table = LaunchTable {
            arch: draft.arch.to_string(),
            kernels,
            steps: draft.steps.clone(),
            workspace: draft.workspace.clone(),
            counters: draft.counters,
            library_workspace: library_workspace(&draft.steps),
            helpers: draft.helpers.clone(),
        };
        bundles.push(Bundle { table, images });
    }
    lowered.phase = Phase::Lowered;
    lowered.target = Some(TARGET.to_string());
    Ok(Lowered { module: lowered, bundles, counts, sources })
}

/// Gives each node the family of its step's first variant, `cuda.view` where nothing is launched.
fn name_kernels(module: &mut Module, draft: Option<&Draft>) {
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut index: HashMap<(String, Vec<DType>), KernelId> = HashMap::new();
    let steps = draft.map_or(&[][..], |d| &d.steps);
    for step in steps {
        let launch = step.variants.first().and_then(|v| v.launches.last());
        let family =
            launch.zip(draft).and_then(|(l, d)| d.sources.get(l.kernel)).map_or("cuda.view", |s| s.family);
        for at in step.first..step.first + step.nodes {
            let Some(id) = module.graph.order.get(at).copied() else { continue };
            let node = &module.graph.nodes[id];
            let operands = node.operands.iter().map(|o| module.operand_type(*o).dtype);
            let dtypes: Vec<DType> =
                operands.chain(node.results.iter().map(|r| module.graph.values[*r].ty.dtype)).collect();
            let kernel = *index.entry((family.to_string(), dtypes.clone())).or_insert_with(|| {
                kernels.push(Kernel { name: family.to_string(), dtypes });
                KernelId::from_index(kernels.len() - 1)
            });
            module.graph.nodes[id].kernel = Some(kernel);
        }
    }
    for kernel in kernels {
        module.kernels.push(kernel);
    }
}
