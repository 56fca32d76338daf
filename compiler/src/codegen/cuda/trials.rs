//! What there is to measure in a module: for each kind of matmul site and each range of rows the candidates, as launch
//! tables of one step, and the buffers they want. Nothing here measures.

use std::collections::BTreeMap;
use std::sync::Arc;

use millrace_ir::launch::{Bundle, Launch, LaunchStep, LaunchTable};
use millrace_ir::{Bindings, DType, Dim, Module, NodeId, Operand};
use millrace_kernels::cuda::attention::{self, Split};
use millrace_kernels::cuda::matmul::choice::{RANGES, RowRange, Way, candidates, key, library_key};
use millrace_kernels::cuda::matmul::{Layout, Problem, library};
use millrace_kernels::cuda::{Arch, Site, SiteLaunch, SiteVariant, Source};

use super::build::{Built, Order};
use super::{library_workspace, table_launch, table_variant};
use crate::pass::Context;
use crate::tuning::{Tuning, VERSION};

/// One choice to make.
#[derive(Clone, Debug)]
pub struct Trial {
    /// The key of the choice.
    pub key: String,
    /// The last node of the first site it is for.
    pub node: NodeId,
    /// Sites of the module that the choice is for.
    pub sites: usize,
    /// The rows it is for.
    pub rows: RowRange,
    /// Rows to measure with, as many as the module takes at most.
    pub at: u64,
    /// Dims at that number of rows.
    pub bindings: Bindings,
    /// Buffers of the launches.
    pub buffers: Vec<TrialBuffer>,
    /// Multiplications and additions of a launch, two each.
    pub operations: f64,
    /// Candidates, the built-in one first, those of a library last.
    pub candidates: Vec<TrialCandidate>,
    /// The product that they compute with whatever is fused to it.
    pub product: TrialProduct,
    /// Architecture of all candidates.
    pub arch: Arch,
}

/// `x w^T`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrialProduct {
    /// Rows of `x` and `w`, and columns of both.
    pub extents: [u64; 3],
    /// `x`, after a norm in front.
    pub x: Operand,
    /// The weight.
    pub w: Operand,
    /// Element types of both and of the result.
    pub dtypes: (DType, DType),
    /// Whether the only result is the product, and `x` and the weight lie row by row.
    pub alone: bool,
}

/// A buffer that launches read or write.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrialBuffer {
    /// What names it in the launches.
    pub operand: Operand,
    /// Element type.
    pub dtype: DType,
    /// Size.
    pub bytes: u64,
    /// What is in it.
    pub fill: TrialFill,
}

/// Contents of a buffer before launches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TrialFill {
    /// Numbers between minus and plus this much.
    Random(f32),
    /// Nothing yet; launches write it.
    Result,
}

/// One way to run the sites.
#[derive(Clone, Debug)]
pub struct TrialCandidate {
    /// Its stable name.
    pub name: String,
    /// Whether products of a library take the place of kernels. Such a candidate has a key of its own, [`library_key`], and
    /// the launches of the built-in one beside it, which do not count.
    pub by_library: bool,
    table: LaunchTable,
    sources: Vec<Arc<Source>>,
}

impl TrialCandidate {
    /// The kernels to build.
    pub fn orders(&self, arch: Arch) -> Vec<Order<'_>> {
        self.sources.iter().map(|source| Order { source: source.as_ref(), arch }).collect()
    }

    /// Its launch table with kernels that were built, in the order of [`TrialCandidate::orders`].
    pub fn bundle(&self, built: Vec<Built>) -> Bundle {
        let mut table = self.table.clone();
        let mut images = Vec::new();
        for Built { mut kernel, image } in built {
            kernel.image = images.len();
            images.push(image);
            table.kernels.push(kernel);
        }
        Bundle { table, images }
    }
}

/// The matmul sites of a module by architecture, with their last nodes.
fn problems(module: &Module, arch: Arch, mut visit: impl FnMut(&Problem<'_>, NodeId)) {
    let order = &module.graph.order;
    for group in module.graph.launch_groups(order) {
        let mut site = |range: std::ops::Range<usize>| {
            let nodes = &order[range];
            let problem = Problem::of(Site { module, nodes, arch });
            if let (Some(problem), Some(last)) = (&problem, nodes.last()) {
                visit(problem, *last);
            }
            problem.is_some()
        };
        if group.len() == 1 || !site(group.clone()) {
            group.for_each(|at| {
                site(at..at + 1);
            });
        }
    }
}

/// The choices of a module for `arch`, in the order of their sites, then of rows.
pub fn trials(module: &Module, arch: Arch) -> Vec<Trial> {
    let mut trials: Vec<Trial> = Vec::new();
    let mut index: BTreeMap<String, usize> = BTreeMap::new();
    problems(module, arch, |problem, node| {
        for rows in RANGES {
            let key = key(problem, rows);
            if let Some(at) = index.get(&key) {
                trials[*at].sites += 1;
            } else if let Some(trial) = trial(problem, node, rows, key) {
                index.insert(trial.key.clone(), trials.len());
                trials.push(trial);
            }
        }
    });
    trials
}

fn trial(problem: &Problem<'_>, node: NodeId, rows: RowRange, key: String) -> Option<Trial> {
    let (module, arch) = (problem.site.module, problem.site.arch);
    let mut bindings = Bindings::maxima(&module.dims);
    let most = problem.m.extent(&bindings)?;
    let at = rows.at.min(most);
    if rows.first > most || at == 0 {
        return None;
    }
    match problem.m.as_sym() {
        Some(sym) => bindings.set(sym, at),
        // Any other number of rows than a dim or a constant cannot be set.
        None if problem.m.as_const().is_none() || at != most => return None,
        None => {}
    }
    let mut ways: Vec<(String, SiteVariant)> = candidates(problem, rows)
        .into_iter()
        .filter_map(|w| Some((w.name(), SiteVariant::new(Vec::new(), w.launches(problem)?))))
        .collect();
    if let Some((_, built_in)) = ways.first().cloned() {
        let by = |name: String| {
            let library = library::run(problem, rows, library::suggestion(&name)?);
            Some((name, SiteVariant { library: Some(library?), ..built_in.clone() }))
        };
        ways.extend(library::names(problem).into_iter().filter_map(by));
    }
    // Where there is no choice, many rows are still worth a comparison with a library.
    if ways.is_empty() || (ways.len() < 2 && rows.first <= 64) {
        return None;
    }
    let mut buffers: Vec<TrialBuffer> = Vec::new();
    let mut buffer = |operand: Operand, fill: TrialFill| -> Option<()> {
        let ty = module.operand_type(operand);
        let elements = ty.shape.iter().try_fold(1u64, |n, d| n.checked_mul(d.extent(&bindings)?))?;
        let bytes = elements.checked_mul(ty.dtype.size_bytes()? as u64)?;
        if buffers.iter().all(|b| b.operand != operand) {
            buffers.push(TrialBuffer { operand, dtype: ty.dtype, bytes, fill });
        }
        Some(())
    };
    match problem.norm {
        Some(norm) => {
            buffer(norm.x, TrialFill::Random(1.0))?;
            buffer(norm.weight, TrialFill::Random(1.0))?;
            // Written by the norm's own launch, where there is one.
            buffer(problem.x, TrialFill::Random(1.0))?;
        }
        None => buffer(problem.x, TrialFill::Random(1.0))?,
    }
    // Results of about the size of x, whatever k is.
    buffer(problem.weight, TrialFill::Random(2.0 / (problem.k as f32).sqrt()))?;
    for operand in problem.epilogue.iter().filter_map(|t| t.operand) {
        buffer(operand, TrialFill::Random(1.0))?;
    }
    for result in &problem.results {
        buffer(*result, TrialFill::Result)?;
    }
    let candidates = ways
        .into_iter()
        .map(|(name, variant)| {
            let by_library = variant.library.is_some();
            let mut sources: Vec<Arc<Source>> = Vec::new();
            let mut launches = |launches: Vec<SiteLaunch>| -> Vec<Launch> {
                let of = |launch: SiteLaunch| {
                    let known = sources.iter().position(|s| *s == launch.source);
                    let kernel = known.unwrap_or_else(|| {
                        sources.push(launch.source.clone());
                        sources.len() - 1
                    });
                    table_launch(launch, kernel, arch)
                };
                launches.into_iter().map(of).collect()
            };
            let variants = vec![table_variant(variant, &mut launches)];
            let steps = vec![LaunchStep { first: 0, nodes: 1, variants, streamed: Vec::new() }];
            let table = LaunchTable {
                arch: arch.to_string(),
                kernels: Vec::new(),
                workspace: Dim::from(0u64),
                counters: 0,
                library_workspace: library_workspace(&steps),
                steps,
                helpers: Vec::new(),
            };
            TrialCandidate { name, by_library, table, sources }
        })
        .collect();
    let operations = 2.0 * at as f64 * problem.k as f64 * problem.n() as f64;
    let fused = problem.norm.is_some() || !problem.epilogue.is_empty() || problem.results.len() > 1;
    let product = TrialProduct {
        extents: [at, problem.n() as u64, problem.k as u64],
        x: problem.x,
        w: problem.weight,
        dtypes: (problem.dtype, problem.out),
        alone: !fused && problem.layout == Layout::Rows,
    };
    Some(Trial { key, node, sites: 1, rows, at, bindings, buffers, operations, candidates, product, arch })
}

/// The entries of a tuning that name candidates of the module's sites, by key. Remarks tell of entries for its sites that
/// choose nothing: those of another version and those whose candidate is not known.
pub fn tuned(
    module: &Module,
    archs: &[Arch],
    tuning: &Tuning,
    with_library: bool,
    context: &mut Context,
) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut told: Vec<String> = Vec::new();
    if tuning.entries.is_empty() {
        return found;
    }
    let choices = tuning.choices(with_library);
    let mut consider = |key: String, by_library: bool, node: NodeId, names: &dyn Fn() -> Vec<String>| {
        let Some(entry) = tuning.entries.get(&key) else { return };
        if found.contains_key(&key) || told.contains(&key) {
            return;
        }
        let known = names().contains(&entry.candidate);
        if known && choices.get(&key).is_some() {
            found.insert(key, entry.candidate.clone());
            return;
        }
        let why = match known {
            true if entry.version != VERSION => format!("is of version {}", entry.version),
            true if by_library && !with_library => "names a library, which is not wanted".to_string(),
            true => "names a library, and a kernel is as fast".to_string(),
            false => format!("names {}, which is not known", entry.candidate),
        };
        context.remark("tuning", &module.graph, node, format!("ignored: the entry for `{key}` {why}"));
        told.push(key);
    };
    for arch in archs {
        problems(module, *arch, |problem, node| {
            for rows in RANGES {
                let kernels = key(problem, rows);
                consider(library_key(&kernels), true, node, &|| library::names(problem));
                consider(kernels, false, node, &|| candidates(problem, rows).iter().map(Way::name).collect());
            }
        });
        for (key, node, names) in splits(module, *arch) {
            consider(key, false, node, &|| names.clone());
        }
    }
    found
}

/// What only a tuning file chooses: how the keys of steps with one row a sequence are split over blocks. Key, node of the
/// first site, and names, the built-in one first.
pub fn splits(module: &Module, arch: Arch) -> Vec<(String, NodeId, Vec<String>)> {
    let order = &module.graph.order;
    let mut found: Vec<(String, NodeId, Vec<String>)> = Vec::new();
    for group in module.graph.launch_groups(order) {
        let nodes = &order[group];
        for (key, ways) in attention::splits(Site { module, nodes, arch }) {
            if found.iter().all(|(known, ..)| *known != key) {
                found.extend(nodes.last().map(|n| (key, *n, ways.iter().map(Split::name).collect())));
            }
        }
    }
    found
}
