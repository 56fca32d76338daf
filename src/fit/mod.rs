//! What an engine will take and how fast it will be, told before it runs: from its module alone, without weights, kernels
//! or a device.
//!
//! Bytes are those that a session would enter into its ledger, by the same functions. Times are predictions by
//! [`millrace_ir::cost::Sustained`] rates.

mod reason;
mod report;
mod steps;

pub use reason::Reason;
pub use steps::Step;

use millrace_ir::cost::Sustained;
use millrace_ir::launch::LaunchTable;
use millrace_ir::manifest::{Manifest, ModelKind};
use millrace_ir::plan::stream::{Demand, Placement, minimum, resident};
use millrace_ir::{Bindings, Error, Kind, Module, Result};
use millrace_runtime::budget::typical_work;
use millrace_runtime::generation::{KvCapacity, kv_capacity};
use millrace_runtime::needs::{Squeeze, demand, lower_bounds, page_bytes, required, upper_bounds};
use millrace_runtime::{Allocation, Class, SessionOptions, WeightBudget};

/// An engine, or one that could be written.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The lowered graph.
    pub module: &'a Module,
    /// What it is.
    pub manifest: &'a Manifest,
    /// The launch table of the GPU that is asked about.
    pub table: Option<&'a LaunchTable>,
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The session: its cap, weight budget, ring, cache pages and allocation count.
    pub session: SessionOptions,
    /// Sequences of a step; 1 by default, and the engine's limit where a capacity is asked for.
    pub batch: Option<u64>,
    /// Tokens of a sequence; the engine's limit by default.
    pub sequence: Option<u64>,
    /// Part of free memory that a cache takes by the formula of the field.
    pub kv_fraction: f64,
    /// Rates of the device; those that stand for the target by default.
    pub device: Option<Sustained>,
}

impl Default for Question {
    fn default() -> Self {
        Question {
            session: SessionOptions::default(),
            batch: None,
            sequence: None,
            kv_fraction: 0.9,
            device: None,
        }
    }
}

/// How much context fits beside the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes for weights and ring.
    pub weights: u64,
    /// Cache pages.
    pub pages: u64,
    /// Largest batch of sequences of `sequence` tokens.
    pub batch: u64,
    /// Longest sequence of a batch of `batch_of` sequences.
    pub sequence: u64,
}

/// A step at one weight budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Percent of what can stream that stays, as [`WeightBudget::Fraction`] counts.
    pub percent: u64,
    /// Bytes for weights and ring.
    pub device: u64,
    /// Bytes that a step moves.
    pub moved: u64,
    /// Nanoseconds of a decode step, and of it those that it waits for copies; `None` without a cache.
    pub decode: Option<(u64, u64)>,
    /// The same of the largest step that takes prompts, or of any step of other graphs.
    pub prefill: (u64, u64),
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Bytes by class that the session holds.
    pub classes: Vec<(Class, u64)>,
    /// Pinned host memory for weights that are not resident on a GPU.
    pub pinned: u64,
    /// What a driver takes besides, about.
    pub context: u64,
    /// Bytes of all classes if activations are allocated for the smallest step.
    pub smallest: u64,
    /// Bytes of weights that may stream; 0 without weight streaming.
    pub streamable: u64,
    /// The least weight budget.
    pub minimum: u64,
    /// Bytes of the weights and the ring under the budget asked for.
    pub placement: Placement,
    /// The cap asked for.
    pub cap: Option<u64>,
    /// Options that make it fit the cap, as one text each; none if it fits, or if nothing helps.
    pub remedies: Vec<String>,
    /// Cache pages asked for, and tokens of each.
    pub pages: u64,
    /// Tokens of a page.
    pub tokens_per_block: u64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Batch and sequence that capacities and predictions are for.
    pub asked: (u64, u64),
    /// What fits the cap: with the weights under the budget asked for, and at their minimum if that is less.
    pub capacities: Vec<Capacity>,
    /// What the formula of the field gives for the cache under the cap.
    pub field: Option<KvCapacity>,
    /// Steps at rising budgets.
    pub rows: Vec<Row>,
    /// The decode step and the prefill step that the rows are about.
    pub steps: (Option<Step>, Step),
    /// Why the largest class is as large as it is.
    pub reason: Reason,
}

const PERCENTS: [u64; 6] = [0, 25, 50, 75, 90, 100];

impl Fit {
    /// Answers `question` about `subject`.
    ///
    /// # Errors
    /// `run/bad-pages`, `run/weight-budget` and `run/not-streamable` for options that a session would refuse,
    /// `usage/auto` for an automatic budget without a cap, `generation/kv-fraction`, `run/no-size`.
    pub fn of(subject: Subject<'_>, question: &Question) -> Result<Fit> {
        let Subject { module, manifest, table } = subject;
        let options = &question.session;
        let demand = demand(module, table)?;
        let work = typical_work(module, &demand);
        let block = manifest.model.as_ref().map_or(1, |m| m.tokens_per_block.max(1));
        let longest = manifest.model.as_ref().map_or(1, |m| m.max_seq_len);
        let asked = (question.batch.unwrap_or(1), question.sequence.unwrap_or(longest));
        let pages = match (options.kv_pages, question.batch, question.sequence) {
            (Some(pages), ..) => Some(pages),
            (None, None, None) => None,
            (None, ..) => page_bytes(module).map(|_| asked.0.saturating_mul(asked.1.div_ceil(block))),
        };
        let upper = upper_bounds(module, pages)?;
        let lower = lower_bounds(module, &upper);
        let bindings = if options.allocation == Allocation::Static { &upper } else { &lower };
        let everything = WeightBudget::Resident.place(&demand, &options.ring, &work, || Ok(u64::MAX))?;
        let rest = {
            let classes = required(module, table, &everything, bindings)?;
            let weights = |c: &Class| matches!(c, Class::Weights | Class::Ring);
            classes.iter().filter(|(c, _)| !weights(c)).map(|(_, bytes)| bytes).sum::<u64>()
        };
        let placement = options.budget.place(&demand, &options.ring, &work, || {
            let cap = options.cap.ok_or_else(|| {
                Error::new(Kind::Usage, "usage/auto", "an automatic weight budget depends on free memory")
                    .hint("say how much there is with --memory-cap, or name a budget")
            })?;
            Ok(cap.saturating_sub(rest))
        })?;
        let classes = required(module, table, &placement, bindings)?;
        let total: u64 = classes.iter().map(|(_, bytes)| bytes).sum();
        let at_least = required(module, table, &placement, &lower)?;
        let smallest = at_least.iter().map(|(_, bytes)| bytes).sum();
        let all = resident(&demand, &options.ring);
        let least = minimum(&demand, &options.ring).min(all);
        let pages = upper.iter().find(|(s, _)| s.name() == "pages").map_or(0, |(_, v)| v);
        let remedies = match options.cap.filter(|cap| total > *cap) {
            None => Vec::new(),
            Some(limit) => {
                let dynamic = (options.allocation == Allocation::Static).then_some(smallest);
                let (demand, ring, required) = (&demand, &options.ring, &classes[..]);
                let squeeze = Squeeze { module, demand, ring, required, limit, pages, dynamic };
                squeeze.remedies().iter().map(ToString::to_string).collect()
            }
        };
        let device = question.device.unwrap_or_else(|| Sustained::of_target(&manifest.target));
        let page = page_bytes(module).unwrap_or(0);
        let mut fit = Fit {
            pinned: if manifest.target == "cuda" { not_resident(&demand, &placement) } else { 0 },
            context: if manifest.target == "cuda" { device.context } else { 0 },
            smallest,
            streamable: demand.streamable(options.ring.small),
            minimum: least,
            cap: options.cap,
            remedies,
            pages,
            tokens_per_block: block,
            page_bytes: page,
            asked,
            capacities: Vec::new(),
            field: None,
            rows: Vec::new(),
            steps: steps(manifest, asked),
            reason: Reason::of(module, &demand, &placement, &classes, &upper),
            classes,
            placement,
        };
        fit.capacities(module, manifest, question, rest)?;
        for percent in PERCENTS {
            if fit.streamable == 0 && percent < 100 {
                continue;
            }
            // An engine of which nothing streams takes no other budget than all.
            let budget = match percent {
                100 => WeightBudget::Resident,
                _ => WeightBudget::Fraction(percent as f64 / 100.0),
            };
            let placement = budget.place(&demand, &options.ring, &work, || Ok(0))?;
            let told = |step: &Step| {
                let told = step.predict((module, manifest), &device, (&demand, &placement));
                (told.time, told.stalled())
            };
            fit.rows.push(Row {
                percent,
                device: placement.device_bytes(),
                moved: placement.moved(),
                decode: fit.steps.0.as_ref().map(told),
                prefill: told(&fit.steps.1),
            });
        }
        Ok(fit)
    }

    /// Bytes of all classes.
    pub fn total(&self) -> u64 {
        self.classes.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Whether it fits the cap.
    pub fn fits(&self) -> bool {
        self.cap.is_none_or(|cap| self.total() <= cap)
    }

    /// What fits the cap beside `rest` bytes that are no weights.
    fn capacities(
        &mut self,
        module: &Module,
        manifest: &Manifest,
        question: &Question,
        rest: u64,
    ) -> Result<()> {
        let (Some(cap), Some(model)) = (self.cap, &manifest.model) else { return Ok(()) };
        let Some(decl) = module.dims.iter().find(|d| d.sym.name() == "pages").filter(|_| self.page_bytes > 0)
        else {
            return Ok(());
        };
        let rest = rest.saturating_sub(self.pages.saturating_mul(self.page_bytes));
        let mut weights = vec![self.placement.device_bytes()];
        if self.streamable > 0 && self.minimum < weights[0] {
            weights.push(self.minimum);
        }
        for (index, weights) in weights.into_iter().enumerate() {
            let free = cap.saturating_sub(rest).saturating_sub(weights);
            let pages = (free / self.page_bytes).min(decl.max);
            let pages = if pages < decl.min { 0 } else { pages };
            let (batch, sequence) = self.asked;
            let each = sequence.div_ceil(self.tokens_per_block).max(1);
            self.capacities.push(Capacity {
                weights,
                pages,
                batch: (pages / each).min(model.max_batch_size),
                sequence: (pages / batch.max(1) * self.tokens_per_block).min(model.max_seq_len),
            });
            if index == 0 && self.page_bytes >= self.tokens_per_block {
                let per_token = self.page_bytes / self.tokens_per_block;
                self.field =
                    Some(kv_capacity(free, question.kv_fraction, None, per_token, self.tokens_per_block)?);
            }
        }
        Ok(())
    }
}

/// The decode step, for engines with a cache, and the largest step that takes a prompt.
fn steps(manifest: &Manifest, (batch, sequence): (u64, u64)) -> (Option<Step>, Step) {
    let Some(model) = &manifest.model else { return (None, Step { batch: 1, tokens: 1, past: 0 }) };
    let tokens = (model.max_num_tokens / batch.max(1)).min(model.max_input_len).min(sequence).max(1);
    let decode =
        (manifest.kind == ModelKind::Decoder).then_some(Step { batch, tokens: 1, past: sequence / 2 });
    (decode, Step { batch, tokens, past: 0 })
}

/// Bytes of weights that are not on the device as a whole: host memory holds all of each.
fn not_resident(demand: &Demand, placement: &Placement) -> u64 {
    let items = demand.items.iter().zip(&placement.resident);
    items.filter(|(item, resident)| **resident < item.slices).map(|(item, _)| item.bytes).sum()
}

/// Values of the symbols as text.
fn show_bindings(bindings: &Bindings) -> String {
    bindings.iter().map(|(s, v)| format!("{s}={v}")).collect::<Vec<_>>().join(", ")
}
