//! One case: a graph, how it is compiled, and the steps it is run with.

use std::path::PathBuf;

use millrace::compiler::compile::SourceModel;
use millrace::compiler::import::Precision;
use millrace::ir::checkpoint::{Checkpoint, TensorSource};
use millrace::ir::sampling::{Random, RandomGraph};
use millrace::ir::tensor::Tensor;
use millrace::ir::{Bindings, DType, Module, Op, Operand, Sym, text};
use millrace::{CompileOptions, Result};

/// One sequence of a batch: rows of this step, length after it, and where its pages begin in the shuffled pool.
#[derive(Clone, Copy, Debug)]
pub struct Seq {
    pub rows: usize,
    pub kv_len: usize,
    pub first: usize,
}

/// One step: values of symbols, or packed sequences from which they follow.
#[derive(Clone, Debug)]
pub enum Step {
    Dims(Vec<(String, u64)>),
    /// Sequences, and columns of the block table beyond those in use.
    Batch(Vec<Seq>, usize),
}

/// Where a graph comes from.
#[derive(Clone)]
pub enum Source {
    /// IR text.
    Text(String),
    /// A model folder, with the element type and at most so many tokens a step and positions a sequence.
    Folder { path: PathBuf, dtype: DType, tokens: u64, positions: u64, dummy: bool },
    /// A random graph with the inputs that it draws for itself.
    Random(u64),
}

/// See the module.
#[derive(Clone)]
pub struct Case {
    /// Slashes separate group, kernel and form.
    pub name: String,
    pub source: Source,
    /// Level of the pipeline.
    pub level: usize,
    pub steps: Vec<Step>,
    /// Whether every kernel rounds once, at its store, and none reads what another has rounded.
    pub strict: bool,
    /// Which way of splitting single rows of attention a tuning file chooses, by its place in the list.
    pub split: Option<usize>,
}

/// A case with everything that does not depend on a backend.
pub struct Prepared {
    pub module: Module,
    pub checkpoint: Option<Checkpoint>,
    pub states: Vec<Tensor>,
    pub steps: Vec<(Bindings, Vec<Tensor>)>,
}

impl Case {
    /// A case of IR text at level 2.
    pub fn of(name: impl Into<String>, module: &Module, steps: Vec<Step>) -> Case {
        let source = Source::Text(text::print(module));
        Case { name: name.into(), source, level: 2, steps, strict: false, split: None }
    }

    /// The same, of kernels that do not feed each other.
    pub fn strict(mut self) -> Case {
        self.strict = true;
        self
    }

    /// The same at another level.
    pub fn at_level(mut self, level: usize) -> Case {
        self.level = level;
        self
    }

    /// The same with another way of splitting single rows; the last where there are fewer.
    pub fn with_split(mut self, at: usize) -> Case {
        self.name = format!("{}/split{at}", self.name);
        self.split = Some(at);
        self
    }

    /// Options of compilation but for the target.
    pub fn options(&self) -> CompileOptions {
        let mut options = CompileOptions::default();
        if let Source::Folder { dtype, tokens, positions, dummy, .. } = &self.source {
            options.import.precision = Precision::Fixed(*dtype);
            options.import.max_num_tokens = Some(*tokens);
            options.import.max_seq_len = Some(*positions);
            options.import.max_logit_rows = Some(16);
            options.import.dummy_weights = *dummy;
        }
        options
    }

    /// Draws all inputs.
    pub fn prepare(&self, seed: u64) -> Result<Prepared> {
        let mut random = Random::new(seed ^ hash(&self.name));
        let (module, checkpoint) = match &self.source {
            Source::Text(source) => (text::parse(source)?, None),
            Source::Folder { path, dummy, .. } => {
                let model = SourceModel::read(path, &self.options().import)?;
                let checkpoint = if *dummy { None } else { Some(Checkpoint::open(path)?) };
                (model.module, checkpoint)
            }
            Source::Random(graph) => return Ok(random_case(*graph, &mut random)),
        };
        let mut fixed = Bindings::new();
        for decl in module.dims.iter().filter(|d| d.sym.name() == "pages") {
            fixed.set(decl.sym, decl.max);
        }
        let mut pool: Vec<usize> = (0..fixed.iter().next().map_or(0, |(_, n)| n as usize)).collect();
        (1..pool.len()).rev().for_each(|i| pool.swap(i, random.below(i + 1)));
        let steps = self
            .steps
            .iter()
            .map(|step| {
                let bindings = bindings(&module, &fixed, step);
                let inputs = inputs(&module, &bindings, step, &pool, &mut random);
                (bindings, inputs)
            })
            .collect();
        let states = RandomGraph::of(module.clone()).zero_states(&fixed);
        Ok(Prepared { module, checkpoint, states, steps })
    }
}

impl Prepared {
    /// What weights are read from.
    pub fn source(&self) -> Option<&dyn TensorSource> {
        self.checkpoint.as_ref().map(|c| c as &dyn TensorSource)
    }
}

fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

fn random_case(seed: u64, random: &mut Random) -> Prepared {
    let graph = millrace::ir::sampling::graph(seed, 4 + (seed as usize * 7) % 13);
    let first = graph.bindings(random);
    let mut second = graph.bindings(random);
    let pages = first.iter().find(|(s, _)| s.name() == "pages");
    pages.into_iter().for_each(|(sym, value)| second.set(sym, value));
    let states = graph.zero_states(&first);
    let steps = [first, second]
        .map(|bindings| {
            let inputs = graph.inputs(&bindings, random);
            (bindings, inputs)
        })
        .into();
    Prepared { module: graph.module, checkpoint: None, states, steps }
}

/// Positions of a cache page.
fn page_size(module: &Module) -> usize {
    let first = module.states.iter().next();
    first.and_then(|(_, s)| s.ty.shape.get(1)?.as_const()).map_or(1, |n| n as usize)
}

/// Columns of the block table that a batch needs.
fn width(module: &Module, batch: &[Seq], more: usize) -> usize {
    let longest = batch.iter().map(|s| s.kv_len.div_ceil(page_size(module))).max();
    longest.unwrap_or(1).max(1) + more
}

fn bindings(module: &Module, fixed: &Bindings, step: &Step) -> Bindings {
    let mut bindings = fixed.clone();
    let mut set = |name: &str, value: u64| {
        if let Some(decl) = module.dims.iter().find(|d| d.sym.name() == name) {
            bindings.set(decl.sym, value);
        }
    };
    match step {
        Step::Dims(dims) => dims.iter().for_each(|(name, value)| set(name, *value)),
        Step::Batch(batch, more) => {
            set("t", batch.iter().map(|s| s.rows as u64).sum());
            set("b", batch.len() as u64);
            set("p", width(module, batch, *more) as u64);
            set("r", batch.iter().filter(|s| s.rows > 0).count() as u64);
        }
    }
    for decl in &module.dims {
        if bindings.get(decl.sym).is_none() {
            bindings.set(decl.sym, decl.hint.unwrap_or(decl.max));
        }
    }
    bindings
}

/// One more than the largest index that an input may hold, from the op that looks it up.
fn rows_of_table(module: &Module, input: usize) -> Option<usize> {
    let value = *module.graph.inputs.get(input)?;
    let reads = module.graph.nodes.iter().filter(|(_, n)| n.operands.get(1) == Some(&Operand::Value(value)));
    let mut tables = reads.filter_map(|(_, node)| {
        let ty = module.operand_type(node.operands[0]);
        let axis = match &*node.op {
            Op::Embedding(_) => 0,
            Op::Gather(op) => op.axis,
            Op::Scatter(op) => op.axis,
            _ => return None,
        };
        ty.shape[axis].as_const().map(|n| n as usize)
    });
    tables.next()
}

/// Values where conversions and comparisons differ from one another.
const EDGES: [f64; 24] = [
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -1.5,
    127.0,
    128.0,
    -129.0,
    255.0,
    256.0,
    300.7,
    1e-3,
    447.0,
    449.0,
    465.0,
    65504.0,
    61440.0,
    1e9,
    3e9,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
];

fn inputs(
    module: &Module,
    bindings: &Bindings,
    step: &Step,
    pool: &[usize],
    random: &mut Random,
) -> Vec<Tensor> {
    let get = |name: &str| Sym::new(name).and_then(|s| bindings.get(s)).unwrap_or(1) as usize;
    let batch: Vec<Seq> = match step {
        Step::Batch(batch, _) => batch.clone(),
        Step::Dims(_) => vec![Seq { rows: get("t"), kv_len: get("t"), first: 0 }],
    };
    let block = page_size(module);
    let columns = get("p");
    let page = |i: usize, random: &mut Random| {
        let (sequence, column) = (batch[i / columns], i % columns);
        // Columns that no position reaches hold any page.
        let used = column < sequence.kv_len.div_ceil(block);
        let any = |random: &mut Random| if i.is_multiple_of(2) { 0 } else { random.below(pool.len().max(1)) };
        if used { pool[(sequence.first + column) % pool.len()] } else { any(random) }
    };
    let starts: Vec<usize> = batch
        .iter()
        .scan(0, |end, s| {
            *end += s.rows;
            Some(*end)
        })
        .collect();
    let last_rows: Vec<usize> =
        batch.iter().zip(&starts).filter(|(s, _)| s.rows > 0).map(|(_, end)| end - 1).collect();
    let positions: Vec<usize> = batch.iter().flat_map(|s| s.kv_len - s.rows..s.kv_len).collect();
    let input = |(index, (name, ty)): (usize, (&str, &millrace::ir::TensorType))| {
        let shape: Vec<usize> =
            ty.shape_at(bindings).unwrap_or_default().into_iter().map(|d| d as usize).collect();
        let mut tensor = Tensor::zeros(ty.dtype, &shape).unwrap();
        let below = rows_of_table(module, index);
        for (i, v) in tensor.data.iter_mut().enumerate() {
            *v = match name {
                "positions" => positions.get(i).copied().unwrap_or(i) as f64,
                "seq_starts" => i.checked_sub(1).map_or(0, |i| starts[i]) as f64,
                "kv_lens" => batch[i].kv_len as f64,
                "block_table" => page(i, random) as f64,
                "logit_rows" => last_rows.get(i).copied().unwrap_or(0) as f64,
                "type_ids" => random.below(2) as f64,
                _ if below.is_some() => random.below(below.unwrap_or(1)) as f64,
                "positive" => random.uniform(0.1, 3.0),
                "wide" => random.uniform(-20.0, 20.0),
                "edges" if ty.dtype.is_float() || EDGES[i % 24].abs() < 1e12 => {
                    if random.once_in(3) {
                        random.uniform(-300.0, 300.0)
                    } else {
                        EDGES[i % 24]
                    }
                }
                _ if ty.dtype == DType::Bool => random.below(2) as f64,
                _ if ty.dtype.is_float() => random.uniform(-2.0, 2.0),
                _ => random.uniform(-100.0, 100.0).floor().max(if ty.dtype == DType::U8 {
                    0.0
                } else {
                    -100.0
                }),
            };
        }
        if !ty.dtype.is_float() {
            tensor.data.iter_mut().for_each(|v| *v = v.trunc());
        }
        // Only values that the type has: what a conversion does is not what is tested.
        Tensor::from_bytes(ty.dtype, &shape, &tensor.to_bytes()).unwrap()
    };
    module.input_types().into_iter().enumerate().map(input).collect()
}
