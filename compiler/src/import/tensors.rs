//! Matching the weights a graph asks for with the tensors a checkpoint has, all problems at once.

use std::collections::BTreeSet;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::nearest::nearest;
use millrace_ir::{Builder, DType, Error, Kind, Operand, Result, TensorType, WeightExpr};

/// Hands out weights and collects what does not fit.
pub(super) struct Tensors<'a> {
    source: Option<&'a dyn TensorSource>,
    names: Vec<String>,
    prefix: String,
    dtype: DType,
    used: BTreeSet<String>,
    problems: Vec<String>,
    seed: u64,
}

impl<'a> Tensors<'a> {
    /// Weights of element type `dtype` from `source`, or seeded random ones without a source. `prefix` stands before
    /// every name in the checkpoint.
    pub fn new(source: Option<&'a dyn TensorSource>, names: Vec<String>, prefix: &str, dtype: DType) -> Self {
        Tensors {
            source,
            names,
            prefix: prefix.to_string(),
            dtype,
            used: BTreeSet::new(),
            problems: Vec::new(),
            seed: 0,
        }
    }

    /// The tensor `name` of `shape` as an operand; norms' weights are 1 when random.
    pub fn get(&mut self, builder: &mut Builder, name: &str, shape: &[u64]) -> Operand {
        let key = format!("{}{name}", self.prefix);
        let target = TensorType::new(self.dtype, shape.iter().copied());
        let Some(source) = self.source else {
            self.seed += 1;
            let is_norm = shape.len() == 1 && name.ends_with("weight");
            let is_bias = name.ends_with("bias");
            let expr = match (is_norm, is_bias) {
                (true, _) => WeightExpr::Splat(1.0),
                (_, true) => WeightExpr::Splat(0.0),
                _ => WeightExpr::Random { seed: self.seed, std: 0.02 },
            };
            return builder.weight(&key, target, expr);
        };
        self.used.insert(key.clone());
        let expr = WeightExpr::File { file: "model".to_string(), key: key.clone() };
        let Some(info) = source.info(&key) else {
            let hint = nearest(&key, self.names.iter().map(String::as_str));
            self.problems.push(match hint {
                Some(close) => format!("missing: \"{key}\" (the checkpoint has \"{close}\")"),
                None => format!("missing: \"{key}\""),
            });
            return builder.weight(&key, target, expr);
        };
        if info.shape != shape {
            self.problems.push(format!("mis-shaped: \"{key}\" is {:?}, expected {shape:?}", info.shape));
            return builder.weight(&key, target, expr);
        }
        if !info.dtype.is_float() {
            self.problems.push(format!("mis-typed: \"{key}\" is {}, expected a float type", info.dtype));
            return builder.weight(&key, target, expr);
        }
        if info.dtype == self.dtype {
            return builder.weight(&key, target, expr);
        }
        let stored = builder.weight(&format!("{key}.stored"), target.with_dtype(info.dtype), expr);
        let Operand::Weight(of) = stored else { return stored };
        builder.weight(&key, target, WeightExpr::Cast { of })
    }

    /// Reports all problems; tensors that nobody asked for count unless `ignored` accepts their name.
    pub fn finish(self, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let unused =
            self.names.iter().filter(|n| self.source.is_some() && !self.used.contains(*n) && !ignored(n));
        let mut problems = self.problems;
        problems.extend(unused.map(|n| format!("unused: \"{n}\"")));
        if problems.is_empty() {
            return Ok(());
        }
        let total = problems.len();
        let shown: Vec<String> = problems.into_iter().take(40).collect();
        let more =
            if total > shown.len() { format!("\n  and {} more", total - shown.len()) } else { String::new() };
        Err(Error::new(
            Kind::BadInput,
            "import/tensors",
            format!("{total} tensor(s) do not fit the configuration\n  {}{more}", shown.join("\n  ")),
        )
        .hint("config.json and the weights must belong to the same model"))
    }
}
