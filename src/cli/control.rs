//! Options that watch and steer the pass manager; `opt` and `compile` take them.

use std::path::PathBuf;

use millrace::compiler::Registry;
use millrace::compiler::manager::ROLLED;
use millrace::compiler::pass::Context;
use millrace::compiler::pipeline::{Controls, PassRun, Pipeline};
use millrace::ir::{Module, text};
use millrace::{Error, Result};
use serde_json::{Map, Value, json};

use super::usage;

/// How a report is written.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Lines of text
    Text,
    /// One line of JSON
    Json,
}

/// Watching and steering passes.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Passes")]
pub struct Control {
    /// Verify after every pass
    #[arg(long)]
    pub verify_each: bool,
    /// Print the module after these passes: all, changed, import, or names separated by commas
    #[arg(long, value_name = "PASSES", value_delimiter = ',')]
    dump_after: Vec<String>,
    /// Write dumps into this folder as 003-cse.ir instead of to standard error
    #[arg(long, value_name = "DIR", requires = "dump_after")]
    dump_dir: Option<PathBuf>,
    /// Print the counters of the passes to standard error
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<Format>,
    /// Print the time of every pass to standard error
    #[arg(long)]
    time_passes: bool,
    /// Print remarks to standard error, all or those of one pass
    #[arg(long, value_name = "PASS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    remarks: Option<String>,
    /// How remarks are printed
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    remarks_format: Format,
    /// Let only the first N rewrites happen; -1 prints what each number stands for
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    opt_bisect_limit: Option<i64>,
    /// Put passes in before or after one of the pipeline, such as before:pack-weights=chunk-mlp,chunk-attention
    #[arg(long, value_name = "PLACE:PASS=PASSES")]
    pass_at: Vec<String>,
    /// Leave a pass out
    #[arg(long, value_name = "PASS")]
    disable_pass: Vec<String>,
    /// Stop after a pass, or as soon as the module reaches a phase
    #[arg(long, value_name = "PASS|PHASE")]
    pub stop_at: Option<String>,
    /// Where the reproducer of a failing pass is written
    #[arg(long, value_name = "DIR", default_value = ".")]
    reproducer_dir: PathBuf,
}

impl Control {
    /// Puts the passes of `--pass-at` into `pipeline`.
    ///
    /// # Errors
    /// As [`Pipeline::insert`].
    pub fn insert(&self, pipeline: &mut Pipeline, registry: &Registry) -> Result<()> {
        self.pass_at.iter().try_for_each(|place| pipeline.insert(place, registry))
    }

    /// Whether counters are printed.
    pub fn wants_stats(&self) -> bool {
        self.stats.is_some()
    }

    /// The manager's controls.
    ///
    /// # Errors
    /// Unknown passes, with the nearest name.
    pub fn controls(&self, registry: &Registry) -> Result<Controls> {
        for name in &self.disable_pass {
            registry.get(name)?;
        }
        if let Some(name) = self.remarks.as_ref().filter(|n| !n.is_empty() && *n != ROLLED) {
            registry.get(name)?;
        }
        let limit = match self.opt_bisect_limit {
            None | Some(-1) => None,
            Some(limit) => Some(u64::try_from(limit).map_err(|_| {
                usage("usage/bisect-limit", format!("{limit} is no number of rewrites"))
                    .hint("use 0 or more, or -1 to see what each number stands for")
            })?),
        };
        Ok(Controls {
            disabled: self.disable_pass.clone(),
            stop: self.stop_at.as_deref().map(|s| registry.stop(s)).transpose()?,
            limit,
            trace: self.opt_bisect_limit == Some(-1),
            reproducers: Some(self.reproducer_dir.clone()),
            // Remarks are wanted for every layer, but for those about layers that are not looked at one by one.
            whole: self.remarks.as_ref().is_some_and(|name| name != ROLLED),
        })
    }

    /// What writes the dumps.
    ///
    /// # Errors
    /// Unknown passes, a folder that cannot be made.
    pub fn dumper(&self, registry: &Registry) -> Result<Dumper> {
        for name in &self.dump_after {
            if !["all", "changed", "import"].contains(&name.as_str()) {
                registry.get(name)?;
            }
        }
        if let Some(folder) = &self.dump_dir {
            std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
        }
        Ok(Dumper { after: self.dump_after.clone(), folder: self.dump_dir.clone(), number: 0, failed: None })
    }

    /// Prints what was asked for to standard error.
    pub fn report(&self, runs: &[PassRun], context: &Context) {
        context.numbering.events.iter().for_each(|event| eprintln!("bisect: {event}"));
        if self.time_passes {
            times(runs);
        }
        match self.stats {
            None => {}
            Some(Format::Text) => {
                context.stats.iter().for_each(|(name, value)| eprintln!("{name} = {value}"))
            }
            Some(Format::Json) => eprintln!("{}", stats(context)),
        }
        if let Some(filter) = &self.remarks {
            let wanted = context.remarks.iter().filter(|r| filter.is_empty() || r.pass == filter);
            match self.remarks_format {
                Format::Text => {
                    wanted.for_each(|r| eprintln!("{r}"));
                    if context.remarks_left_out > 0 {
                        eprintln!("and {} more remarks", context.remarks_left_out);
                    }
                }
                Format::Json => {
                    let list = wanted.map(|r| {
                        json!({"pass": r.pass, "node": r.node.to_string(), "loc": r.loc, "message": r.message})
                    });
                    let list: Vec<Value> = list.collect();
                    eprintln!("{}", json!({"remarks": list, "left_out": context.remarks_left_out}));
                }
            }
        }
    }
}

/// Counters by pass: `{"cse": {"merged": 3}}`.
fn stats(context: &Context) -> Value {
    let mut passes = Map::new();
    for (name, value) in &context.stats {
        let (pass, counter) = name.split_once('.').unwrap_or(("", name));
        let entry = passes.entry(pass).or_insert_with(|| json!({}));
        if let Some(counters) = entry.as_object_mut() {
            counters.insert(counter.to_string(), json!(value));
        }
    }
    Value::Object(passes)
}

fn times(runs: &[PassRun]) {
    let total: f64 = runs.iter().map(|r| r.time.as_secs_f64()).sum();
    eprintln!("{:>12} {:>7}  {:<18} {:>8}", "time", "share", "pass", "nodes");
    for run in runs {
        let seconds = run.time.as_secs_f64();
        let share = if total > 0.0 { 100.0 * seconds / total } else { 0.0 };
        let unchanged = if run.changed { "" } else { "  unchanged" };
        eprintln!("{:>9.3} ms {share:>5.1} %  {:<18} {:>8}{unchanged}", seconds * 1e3, run.name, run.nodes);
    }
    eprintln!("{:>9.3} ms {:>5.1} %  {} runs", total * 1e3, 100.0, runs.len());
}

/// Writes modules after passes.
pub struct Dumper {
    after: Vec<String>,
    folder: Option<PathBuf>,
    number: usize,
    failed: Option<Error>,
}

impl Dumper {
    /// Whether there is anything to take note of.
    pub fn watches(&self) -> bool {
        !self.after.is_empty()
    }

    /// Takes note of the module after a pass, or before the first one, which is called `import`.
    pub fn observe(&mut self, pass: &str, module: &Module, changed: bool) {
        let number = self.number;
        self.number += 1;
        let wanted = self.after.iter().any(|after| match after.as_str() {
            "all" => true,
            "changed" => changed,
            name => name == pass,
        });
        if !wanted {
            return;
        }
        let dump = format!("// after {pass}\n{}", text::print(module));
        match &self.folder {
            None => eprintln!("{dump}"),
            Some(folder) => {
                let path = folder.join(format!("{number:03}-{pass}.ir"));
                if let Err(e) = std::fs::write(&path, dump) {
                    self.failed.get_or_insert(Error::io("write", &path, &e));
                }
            }
        }
    }

    /// The first dump that could not be written.
    ///
    /// # Errors
    /// As told.
    pub fn finish(self) -> Result<()> {
        self.failed.map_or(Ok(()), Err)
    }
}
