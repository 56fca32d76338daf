//! Bytes of weights: any byte range of any weight expression, computed on demand from its sources.
//!
//! Reading is random access and holds at most one panel of a packed weight and one transposed source in memory, so a
//! compiler that streams an engine out needs memory for a chunk, not for the model.

mod cores;
mod pack;
mod random;

pub use cores::{core_panels, core_rows};
pub use pack::{pack_panel, packed_panels};
pub use random::normal;

use std::collections::BTreeMap;

use crate::arena::Id;
use crate::checkpoint::TensorSource;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::graph::{Module, Weight, WeightExpr, WeightId};
use crate::tensor::{Tensor, decode, encode, strides};
use crate::types::const_bytes;

/// Deepest nesting of weight expressions that is read.
pub const MAX_DEPTH: usize = 32;

/// Largest source of a transposition, which has to be in memory as a whole.
pub const MAX_TRANSPOSED_BYTES: u64 = 4 << 30;

/// Reads the bytes of a module's weights.
pub struct WeightReader<'a> {
    module: &'a Module,
    sources: BTreeMap<String, &'a dyn TensorSource>,
    panel: Option<Cached>,
    transposed: Option<Cached>,
}

struct Cached {
    weight: WeightId,
    index: u64,
    bytes: Vec<u8>,
}

fn broken(weight: &Weight, message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "weights/bad-expression", message).at(format!("@{}", weight.name))
}

impl<'a> WeightReader<'a> {
    /// A reader over `module` without sources.
    pub fn new(module: &'a Module) -> Self {
        WeightReader { module, sources: BTreeMap::new(), panel: None, transposed: None }
    }

    /// Adds the checkpoint that file expressions call `name`.
    #[must_use]
    pub fn with_source(mut self, name: &str, source: &'a dyn TensorSource) -> Self {
        self.sources.insert(name.to_string(), source);
        self
    }

    fn weight(&self, id: WeightId) -> Result<&'a Weight> {
        self.module
            .weights
            .get(id)
            .ok_or_else(|| Error::new(Kind::BadInput, "weights/missing", format!("{id} does not exist")))
    }

    /// Bytes of the weight; an error if its shape is not constant or too large.
    pub fn len(&self, id: WeightId) -> Result<u64> {
        let weight = self.weight(id)?;
        let shape = const_shape(weight)?;
        const_bytes(weight.ty.dtype, &shape).ok_or_else(|| broken(weight, "the size overflows"))
    }

    /// Fills `out` with the bytes of the weight from `offset` on.
    pub fn read(&mut self, id: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.read_at(id, offset, out, 0)
    }

    /// The whole weight as a tensor of the reference evaluator.
    pub fn tensor(&mut self, id: WeightId) -> Result<Tensor> {
        let weight = self.weight(id)?;
        let bytes = self.len(id)?;
        let shape: Vec<usize> = const_shape(weight)?.iter().map(|d| *d as usize).collect();
        let too_large = || {
            Error::new(
                Kind::OutOfMemory,
                "weights/too-large",
                format!("{bytes} bytes are too many to evaluate"),
            )
            .at(format!("@{}", weight.name))
        };
        if bytes > Tensor::MAX_ELEMENTS as u64 {
            return Err(too_large());
        }
        let mut buffer = vec![0; bytes as usize];
        self.read(id, 0, &mut buffer)?;
        Tensor::from_bytes(weight.ty.dtype, &shape, &buffer).ok_or_else(too_large)
    }

    fn read_at(&mut self, id: WeightId, offset: u64, out: &mut [u8], depth: usize) -> Result<()> {
        let weight = self.weight(id)?;
        if depth > MAX_DEPTH {
            return Err(broken(weight, format!("expressions nest deeper than {MAX_DEPTH}")));
        }
        let total = self.len(id)?;
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > total) {
            return Err(broken(weight, format!("bytes {offset}.. of {total} were asked for")));
        }
        match &weight.expr {
            WeightExpr::File { file, key } => self.read_file(weight, file, key, offset, out),
            WeightExpr::Splat(value) => fill(weight, offset, out, |_| *value),
            WeightExpr::Random { seed, std } => {
                let element = element_bytes(weight)?;
                let whole = offset.is_multiple_of(element);
                if whole && random::fill(weight.ty.dtype, *seed, *std, offset / element, out) {
                    return Ok(());
                }
                fill(weight, offset, out, |i| std * normal(*seed, i))
            }
            WeightExpr::Dense(values) => {
                fill(weight, offset, out, |i| values.get(i as usize).copied().unwrap_or(0.0))
            }
            WeightExpr::Reshape { of } => self.read_at(*of, offset, out, depth + 1),
            WeightExpr::Concat { axis, parts } => self.read_concat(weight, *axis, parts, offset, out, depth),
            WeightExpr::Cast { of } => self.read_cast(weight, *of, offset, out, depth),
            WeightExpr::Transpose { perm, of } => {
                self.read_transposed(id, weight, perm, *of, offset, out, depth)
            }
            WeightExpr::Slice { axis, start, len, of } => {
                self.read_slice(weight, *axis, (*start, *len), *of, offset, out, depth)
            }
            WeightExpr::Cores { segments, alternate, of } => {
                let panels = Panels::Cores { segments, alternate: *alternate };
                self.read_panels(id, &panels, *of, offset, out, depth)
            }
            WeightExpr::Pack { panel, segments, of } => {
                let panels = Panels::Packed { panel: *panel, segments };
                self.read_panels(id, &panels, *of, offset, out, depth)
            }
        }
    }

    fn read_file(&self, weight: &Weight, file: &str, key: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let source = self.sources.get(file).ok_or_else(|| {
            Error::new(Kind::BadInput, "weights/no-source", format!("checkpoint \"{file}\" was not given"))
                .at(format!("@{}", weight.name))
                .hint("name the model folder the weights come from")
        })?;
        let info = source.info(key).ok_or_else(|| {
            Error::new(Kind::BadInput, "weights/no-tensor", format!("checkpoint has no tensor \"{key}\""))
                .at(format!("@{}", weight.name))
        })?;
        if info.dtype != weight.ty.dtype || info.shape != const_shape(weight)? {
            return Err(Error::new(
                Kind::BadInput,
                "weights/mis-shaped",
                format!("tensor \"{key}\" is {}{:?}, expected {}", info.dtype, info.shape, weight.ty),
            )
            .at(format!("@{}", weight.name)));
        }
        source.read_at(key, offset, out)
    }

    fn read_concat(
        &mut self,
        weight: &Weight,
        axis: usize,
        parts: &[WeightId],
        offset: u64,
        out: &mut [u8],
        depth: usize,
    ) -> Result<()> {
        let element = element_bytes(weight)?;
        let inner: u64 =
            const_shape(weight)?.get(axis + 1..).unwrap_or(&[]).iter().product::<u64>() * element;
        let mut widths = Vec::with_capacity(parts.len());
        for part in parts {
            let shape = const_shape(self.weight(*part)?)?;
            let extent = *shape.get(axis).ok_or_else(|| broken(weight, "a part lacks the axis"))?;
            widths.push(extent * inner);
        }
        let row: u64 = widths.iter().sum();
        let (mut at, mut filled) = (offset, 0usize);
        while filled < out.len() {
            let outer = at.checked_div(row).ok_or_else(|| broken(weight, "the parts are empty"))?;
            let mut within = at % row;
            let Some(part) = widths.iter().position(|w| {
                let here = within < *w;
                if !here {
                    within -= w;
                }
                here
            }) else {
                return Err(broken(weight, "the parts do not cover the weight"));
            };
            let take = usize::try_from(widths[part] - within).unwrap_or(usize::MAX).min(out.len() - filled);
            let chunk = &mut out[filled..filled + take];
            self.read_at(parts[part], outer * widths[part] + within, chunk, depth + 1)?;
            filled += take;
            at += take as u64;
        }
        Ok(())
    }

    /// A slice is one run of bytes for each index of the axes before `axis`; along the first axis with more than one
    /// element it is a single run.
    #[allow(clippy::too_many_arguments)]
    fn read_slice(
        &mut self,
        weight: &Weight,
        axis: usize,
        (start, len): (usize, usize),
        of: WeightId,
        offset: u64,
        out: &mut [u8],
        depth: usize,
    ) -> Result<()> {
        let shape = const_shape(self.weight(of)?)?;
        let overflow = || broken(weight, "the slice overflows");
        let extent = *shape.get(axis).ok_or_else(|| broken(weight, "the source lacks the axis"))?;
        let inner = shape[axis + 1..]
            .iter()
            .try_fold(element_bytes(weight)?, |bytes, d| bytes.checked_mul(*d))
            .ok_or_else(overflow)?;
        let scaled = |count: u64| count.checked_mul(inner).ok_or_else(overflow);
        let (first, run, source_run) = (scaled(start as u64)?, scaled(len as u64)?, scaled(extent)?);
        if first.checked_add(run).is_none_or(|end| end > source_run) {
            return Err(broken(weight, "the slice leaves its source"));
        }
        let (mut at, mut filled) = (offset, 0usize);
        while filled < out.len() {
            let outer = at.checked_div(run).ok_or_else(|| broken(weight, "the slice is empty"))?;
            let within = at % run;
            let take = usize::try_from(run - within).unwrap_or(usize::MAX).min(out.len() - filled);
            let source = outer
                .checked_mul(source_run)
                .and_then(|at| at.checked_add(first + within))
                .ok_or_else(overflow)?;
            self.read_at(of, source, &mut out[filled..filled + take], depth + 1)?;
            filled += take;
            at += take as u64;
        }
        Ok(())
    }

    fn read_cast(
        &mut self,
        weight: &Weight,
        of: WeightId,
        offset: u64,
        out: &mut [u8],
        depth: usize,
    ) -> Result<()> {
        let source = self.weight(of)?;
        let (from, to) = (element_bytes(source)?, element_bytes(weight)?);
        let (first, last) = (offset / to, (offset + out.len() as u64).div_ceil(to));
        let mut bytes = vec![0; ((last - first) * from) as usize];
        self.read_at(of, first * from, &mut bytes, depth + 1)?;
        let converted = convert(source.ty.dtype, weight.ty.dtype, &bytes);
        let skip = (offset - first * to) as usize;
        out.copy_from_slice(&converted[skip..skip + out.len()]);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn read_transposed(
        &mut self,
        id: WeightId,
        weight: &Weight,
        perm: &[usize],
        of: WeightId,
        offset: u64,
        out: &mut [u8],
        depth: usize,
    ) -> Result<()> {
        let element = element_bytes(weight)? as usize;
        if self.transposed.as_ref().is_none_or(|c| c.weight != id) {
            let bytes = self.len(of)?;
            if bytes > MAX_TRANSPOSED_BYTES {
                return Err(Error::new(
                    Kind::Unsupported,
                    "weights/transpose-too-large",
                    format!("transposing {bytes} bytes at once"),
                )
                .at(format!("@{}", weight.name)));
            }
            let mut buffer = vec![0; bytes as usize];
            self.read_at(of, 0, &mut buffer, depth + 1)?;
            let shape: Vec<usize> = const_shape(self.weight(of)?)?.iter().map(|d| *d as usize).collect();
            let result: Vec<usize> = const_shape(weight)?.iter().map(|d| *d as usize).collect();
            let from = strides(&shape);
            let to = strides(&result);
            let mut turned = vec![0; buffer.len()];
            for at in 0..result.iter().product::<usize>() {
                let mut source = 0;
                for (axis, stride) in to.iter().enumerate() {
                    let coordinate = at / stride % result[axis];
                    source += coordinate * perm.get(axis).and_then(|p| from.get(*p)).copied().unwrap_or(0);
                }
                turned[at * element..(at + 1) * element]
                    .copy_from_slice(&buffer[source * element..(source + 1) * element]);
            }
            self.transposed = Some(Cached { weight: id, index: 0, bytes: turned });
        }
        if let Some(cached) = &self.transposed {
            out.copy_from_slice(&cached.bytes[offset as usize..offset as usize + out.len()]);
        }
        Ok(())
    }

    /// Reads a weight that is made panel by panel from rows of its source; holds the panel read last.
    fn read_panels(
        &mut self,
        id: WeightId,
        panels: &Panels<'_>,
        of: WeightId,
        offset: u64,
        out: &mut [u8],
        depth: usize,
    ) -> Result<()> {
        let weight = self.weight(id)?;
        let element = element_bytes(weight)?;
        let shape = const_shape(weight)?;
        let too_flat = || broken(weight, "a weight in panels has rank 3 or 4");
        let columns = shape.get(1).ok_or_else(too_flat)? * panels.columns_of_a_block();
        let (row_bytes, panel_bytes) = (columns * element, columns * element * panels.rows());
        let (mut at, mut filled) = (offset, 0usize);
        while filled < out.len() {
            let index = at.checked_div(panel_bytes).ok_or_else(|| broken(weight, "panels are empty"))?;
            if self.panel.as_ref().is_none_or(|c| c.weight != id || c.index != index) {
                let (row, rows) = panels
                    .source(index as usize)
                    .ok_or_else(|| broken(weight, "segments do not cover the panels"))?;
                let mut source = vec![0; rows * row_bytes as usize];
                self.read_at(of, row as u64 * row_bytes, &mut source, depth + 1)?;
                let mut bytes = match self.panel.take() {
                    Some(old) if old.bytes.len() == panel_bytes as usize => old.bytes,
                    _ => vec![0; panel_bytes as usize],
                };
                panels.fill(&source, rows, columns as usize, element as usize, &mut bytes);
                self.panel = Some(Cached { weight: id, index, bytes });
            }
            let Some(cached) = &self.panel else { break };
            let within = (at % panel_bytes) as usize;
            let take = (cached.bytes.len() - within).min(out.len() - filled);
            out[filled..filled + take].copy_from_slice(&cached.bytes[within..within + take]);
            filled += take;
            at += take as u64;
        }
        Ok(())
    }
}

/// How rows of a source become the panels of a weight.
enum Panels<'a> {
    /// See [`WeightExpr::Pack`].
    Packed { panel: usize, segments: &'a [usize] },
    /// See [`WeightExpr::Cores`].
    Cores { segments: &'a [usize], alternate: bool },
}

impl Panels<'_> {
    /// Rows of a panel.
    fn rows(&self) -> u64 {
        match self {
            Panels::Packed { panel, .. } => *panel as u64,
            Panels::Cores { .. } => 8,
        }
    }

    /// Columns that one index of the weight's second axis stands for.
    fn columns_of_a_block(&self) -> u64 {
        match self {
            Panels::Packed { .. } => 1,
            Panels::Cores { .. } => 8,
        }
    }

    /// First source row and number of rows of a panel.
    fn source(&self, index: usize) -> Option<(usize, usize)> {
        match self {
            Panels::Packed { panel, segments } => packed_panels(segments, *panel).nth(index),
            Panels::Cores { segments, alternate } => core_panels(segments, *alternate, index),
        }
    }

    /// Writes every byte of a panel.
    fn fill(&self, source: &[u8], rows: usize, columns: usize, element: usize, out: &mut [u8]) {
        match self {
            Panels::Packed { panel, .. } => pack_panel(source, rows, columns, element, *panel, out),
            Panels::Cores { .. } => {
                if rows < 8 {
                    out.fill(0);
                }
                cores::cut(source, columns * element, 8 * element, out);
            }
        }
    }
}

fn const_shape(weight: &Weight) -> Result<Vec<u64>> {
    weight.ty.const_shape().ok_or_else(|| broken(weight, format!("{} is not constant", weight.ty)))
}

fn element_bytes(weight: &Weight) -> Result<u64> {
    weight.ty.dtype.size_bytes().map(|b| b as u64).ok_or_else(|| {
        Error::new(
            Kind::Unsupported,
            "weights/packed-elements",
            format!("{} elements share bytes", weight.ty.dtype),
        )
        .at(format!("@{}", weight.name))
    })
}

fn fill(weight: &Weight, offset: u64, out: &mut [u8], value: impl Fn(u64) -> f64) -> Result<()> {
    let element = element_bytes(weight)?;
    let (first, last) = (offset / element, (offset + out.len() as u64).div_ceil(element));
    // In chunks: a whole weight of f64 values would be several times the weight.
    let (mut at, mut filled) = (first, 0usize);
    let mut skip = (offset - first * element) as usize;
    while filled < out.len() {
        let end = last.min(at + 4096);
        let values: Vec<f64> = (at..end).map(&value).collect();
        let bytes = encode(weight.ty.dtype, &values);
        let take = (bytes.len() - skip).min(out.len() - filled);
        out[filled..filled + take].copy_from_slice(&bytes[skip..skip + take]);
        filled += take;
        skip = 0;
        at = end;
    }
    Ok(())
}

/// `bytes` of `from` elements as bytes of `to` elements, rounded to nearest even.
pub fn convert(from: DType, to: DType, bytes: &[u8]) -> Vec<u8> {
    match (from, to) {
        _ if from == to => bytes.to_vec(),
        (DType::BF16, DType::F32) => {
            bytes.as_chunks::<2>().0.iter().flat_map(|[a, b]| [0, 0, *a, *b]).collect()
        }
        (DType::F32, DType::BF16) => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|c| half::bf16::from_f32(f32::from_le_bytes(*c)).to_le_bytes())
            .collect(),
        _ => encode(to, &decode(from, bytes)),
    }
}

/// Whether the bytes of a weight depend on a checkpoint; others are computed wherever they are needed.
pub fn needs_source(module: &Module, id: WeightId) -> bool {
    let mut seen = vec![false; module.weights.bound()];
    let mut work = vec![id];
    while let Some(id) = work.pop() {
        let Some(weight) = module.weights.get(id) else { continue };
        if std::mem::replace(&mut seen[id.index()], true) {
            continue;
        }
        if matches!(weight.expr, WeightExpr::File { .. }) {
            return true;
        }
        work.extend(weight.expr.parts());
    }
    false
}

#[cfg(test)]
mod tests;
