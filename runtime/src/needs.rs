//! What a session of a module will hold, told from the module alone, and which options would make it fit a limit.
//!
//! A session asks the same questions before it allocates; a report can ask them without a session, a device or weights.

use std::fmt;

use millrace_ir::launch::{LaunchTable, Tiles};
use millrace_ir::plan::stream::{self, Cut, Demand, Placement, Ring};
use millrace_ir::{Bindings, Error, Kind, Module, Result};

use crate::cuda::reads;
use crate::ledger::Class;
use crate::sizes::{StepSizes, no_size, state_bytes};

/// The symbol that sizes caches.
pub(crate) const PAGES: &str = "pages";

/// What the weights of `module` can do: on a device, weights stream in tiles where its launch `table` computes with tiles.
///
/// # Errors
/// As [`Demand::of`].
pub fn demand(module: &Module, table: Option<&LaunchTable>) -> Result<Demand> {
    let mut demand = Demand::of(module)?;
    for step in table.map_or(&[][..], |t| &t.steps) {
        let first = demand.uses.partition_point(|u| u.node < step.first);
        let uses = demand.uses[first..].iter().take_while(|u| u.node < step.first + step.nodes);
        let items: Vec<usize> = uses.map(|u| u.item).collect();
        for index in items {
            let item = &mut demand.items[index];
            let Some(Cut::Tiles { granule, .. }) = item.cut else { continue };
            let mut launches =
                step.streamed().iter().flat_map(|v| &v.launches).filter(|l| reads(l, item.weight));
            let fits =
                |t: Tiles| t.weight == item.weight && t.slices == item.slices && granule % t.granule == 0;
            if !launches.all(|l| l.tiles.is_some_and(fits)) {
                (item.cut, item.slices, item.slice_bytes) = (Some(Cut::Whole), 1, item.bytes);
            }
        }
    }
    Ok(demand)
}

/// Bytes that a session holds in each class at `bindings` with its weights placed by `placement`; staging memory left out.
/// `table` is the launch table of a device, which needs scratch memory; that of a library counts as if it were there.
///
/// # Errors
/// `run/no-size` if a size has no value.
pub fn required(
    module: &Module,
    table: Option<&LaunchTable>,
    placement: &Placement,
    bindings: &Bindings,
) -> Result<Vec<(Class, u64)>> {
    let scratch = |table: &LaunchTable| {
        let bytes = table.workspace.extent(bindings).and_then(|bytes| bytes.checked_add(table.counters));
        bytes.ok_or_else(|| no_size("scratch memory"))
    };
    let mut classes = required_but_scratch(module, placement, bindings)?;
    if let Some(table) = table {
        classes.push((Class::Workspace, scratch(table)?));
        if table.library_workspace > 0 {
            classes.push((Class::Library, table.library_workspace));
        }
    }
    Ok(classes)
}

/// [`required`] without scratch memory.
pub(crate) fn required_but_scratch(
    module: &Module,
    placement: &Placement,
    bindings: &Bindings,
) -> Result<Vec<(Class, u64)>> {
    let sizes = StepSizes::at(module, bindings)?;
    Ok(vec![
        (Class::Weights, placement.resident_bytes),
        (Class::Ring, placement.ring_bytes()),
        (Class::Activations, sizes.activations()),
        (Class::Io, sizes.io()),
        (Class::Kv, state_bytes(module, bindings)?),
    ])
}

/// The upper bounds of the symbols, with `pages` cache pages if given.
///
/// # Errors
/// `run/bad-pages` if the module cannot have so many.
pub fn upper_bounds(module: &Module, pages: Option<u64>) -> Result<Bindings> {
    let mut maxima = Bindings::maxima(&module.dims);
    if let (Some(pages), Some(decl)) = (pages, module.dims.iter().find(|d| d.sym.name() == PAGES)) {
        if !(decl.min..=decl.max).contains(&pages) {
            let message = format!("{pages} cache pages are outside {}..={}", decl.min, decl.max);
            return Err(Error::new(Kind::Usage, "run/bad-pages", message)
                .hint(format!("use --kv-pages {} to {}", decl.min, decl.max)));
        }
        maxima.set(decl.sym, pages);
    }
    Ok(maxima)
}

/// The lower bounds of the symbols with as many cache pages as `upper` has: what a dynamic session needs at least.
pub fn lower_bounds(module: &Module, upper: &Bindings) -> Bindings {
    let mut minima = Bindings::minima(&module.dims);
    upper.iter().filter(|(s, _)| s.name() == PAGES).for_each(|(s, v)| minima.set(s, v));
    minima
}

/// Bytes of all states that one cache page adds; `None` without a cache.
pub fn page_bytes(module: &Module) -> Option<u64> {
    let decl = module.dims.iter().find(|d| d.sym.name() == PAGES)?;
    let at = |pages: u64| {
        let mut bindings = Bindings::minima(&module.dims);
        bindings.set(decl.sym, pages);
        state_bytes(module, &bindings).ok()
    };
    at(decl.min.checked_add(1)?)?.checked_sub(at(decl.min)?).filter(|bytes| *bytes > 0)
}

/// An option that would make a session fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// This weight budget.
    Weights(u64),
    /// This many cache pages.
    Pages(u64),
    /// Dynamic allocation; the smallest step then takes these bytes in all.
    Dynamic(u64),
    /// All of these together.
    Together(Vec<Remedy>),
    /// Compiling with weight streaming: the weights then need at most the bytes that are there for them.
    Streaming,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remedy::Weights(bytes) => write!(f, "--weights-budget {}", option_size(*bytes)),
            Remedy::Pages(pages) => write!(f, "--kv-pages {pages}"),
            Remedy::Dynamic(bytes) => {
                write!(f, "--memory dynamic (the smallest step takes {})", option_size(*bytes))
            }
            Remedy::Streaming => f.write_str("compile with --weight-streaming"),
            Remedy::Together(all) => {
                let all: Vec<String> = all.iter().map(ToString::to_string).collect();
                f.write_str(&all.join(" together with "))
            }
        }
    }
}

/// `bytes` as an option takes them, rounded down to a whole MiB or KiB where that loses less than a hundredth.
pub fn option_size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (unit, name) in UNITS {
        if bytes >= unit && (bytes.is_multiple_of(unit) || bytes / unit >= 128) {
            return format!("{}{name}", bytes / unit);
        }
    }
    format!("{bytes}B")
}

/// A session that does not fit: what there is to choose from.
pub struct Squeeze<'a> {
    /// The module.
    pub module: &'a Module,
    /// What its weights ask for.
    pub demand: &'a Demand,
    /// Their ring.
    pub ring: &'a Ring,
    /// Bytes by class as asked for.
    pub required: &'a [(Class, u64)],
    /// Bytes that there are.
    pub limit: u64,
    /// Cache pages as asked for.
    pub pages: u64,
    /// Bytes of all classes at the smallest step under dynamic allocation, if allocation is static.
    pub dynamic: Option<u64>,
}

impl Squeeze<'_> {
    fn total(&self) -> u64 {
        self.required.iter().map(|(_, bytes)| *bytes).sum()
    }

    fn weights(&self) -> u64 {
        let weights = self.required.iter().filter(|(c, _)| matches!(c, Class::Weights | Class::Ring));
        weights.map(|(_, bytes)| *bytes).sum()
    }

    /// Whether there is a weight to stream.
    fn streams(&self) -> bool {
        self.demand.items.iter().any(|i| i.streams(self.ring.small))
    }

    /// The weight budget that fits beside `rest` bytes.
    fn budget(&self, rest: u64) -> Option<Remedy> {
        let room = self.limit.checked_sub(rest)?;
        let least = stream::minimum(self.demand, self.ring);
        // Rounded for the command line, the budget must still be one.
        let told = |bytes: u64| if bytes < least { room } else { bytes };
        (self.streams() && room >= least && room < self.weights())
            .then(|| Remedy::Weights(told(if room >= 128 << 20 { room >> 20 << 20 } else { room })))
    }

    /// The cache pages that fit beside `rest` bytes.
    fn fewer_pages(&self, rest: u64) -> Option<Remedy> {
        let least = self.module.dims.iter().find(|d| d.sym.name() == PAGES)?.min;
        let pages = self.limit.checked_sub(rest)? / page_bytes(self.module)?;
        (pages >= least.max(1) && pages < self.pages).then_some(Remedy::Pages(pages))
    }

    /// Options that suffice, each by itself; if none does, those that do together.
    pub fn remedies(&self) -> Vec<Remedy> {
        let (total, weights) = (self.total(), self.weights());
        let cache = self.pages.saturating_mul(page_bytes(self.module).unwrap_or(0)).min(total);
        let mut alone: Vec<Remedy> = Vec::new();
        alone.extend(self.budget(total - weights));
        alone.extend(self.fewer_pages(total - cache));
        alone.extend(self.dynamic.filter(|bytes| *bytes <= self.limit).map(Remedy::Dynamic));
        if !alone.is_empty() {
            return alone;
        }
        if self.streams() {
            let least = stream::minimum(self.demand, self.ring).min(weights);
            let rest = total - weights - cache.min(total - weights);
            if let Some(pages) = self.fewer_pages(rest + least) {
                return vec![Remedy::Together(vec![Remedy::Weights(least), pages])];
            }
            let dynamic = self.dynamic.map(|bytes| bytes.saturating_sub(weights));
            if let Some((rest, Remedy::Weights(budget))) = dynamic.and_then(|r| Some((r, self.budget(r)?))) {
                let dynamic = Remedy::Dynamic(rest + budget);
                return vec![Remedy::Together(vec![Remedy::Weights(budget), dynamic])];
            }
        } else if self.demand.items.iter().all(|i| i.cut.is_none()) && total - weights < self.limit {
            return vec![Remedy::Streaming];
        }
        Vec::new()
    }

    /// What to do, in words.
    pub fn advice(&self, raise: &str) -> String {
        let remedies: Vec<String> = self.remedies().iter().map(ToString::to_string).collect();
        match remedies.split_last() {
            None => format!(
                "no option makes it fit: {raise}, or compile with smaller --max-num-tokens, --max-batch-size or \
                 --max-seq-len"
            ),
            Some((last, [])) => format!("use {last}, or {raise}"),
            Some((last, others)) => format!("use {}, {last}, or {raise}", others.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_ir::text;

    /// 100 pages of 64 bytes, a matrix of 4096 and a vector of 16 bytes.
    fn module(stream: bool) -> Module {
        let marked = if stream { " streamable(first_use = 0, axis = 0, tile = 64)" } else { "" };
        let source = format!(
            "module @m phase imported {{
  dim $pages in 1..=100
  dim $t in 1..=8
  weight @w : f32[64, 16] = splat(1.0){marked}
  weight @b : f32[4] = splat(1.0)
  state @k : f32[$pages, 16]
  graph @main(%0 \"x\": f32[$t, 16], %1 \"z\": f32[4]) -> (\"y\": f32[$t, 64], \"a\": f32[4]) {{
    %2 = matmul %0, @w {{transpose_b = true}} : f32[$t, 64]
    %3 = add %1, @b : f32[4]
    return %2, %3
  }}
}}"
        );
        text::parse(&source).unwrap()
    }

    const RING: Ring = Ring { slots: 2, slot_bytes: 256, small: 64, align: 1 };

    fn remedies(stream: bool, limit: u64, pages: u64, dynamic: Option<u64>) -> Vec<Remedy> {
        let module = module(stream);
        let demand = Demand::of(&module).unwrap();
        let required = [
            (Class::Weights, 4096 + 16),
            (Class::Ring, 0),
            (Class::Activations, 1000),
            (Class::Io, 500),
            (Class::Kv, pages * 64),
        ];
        let (demand, ring, required, module) = (&demand, &RING, &required, &module);
        Squeeze { module, demand, ring, required, limit, pages, dynamic }.remedies()
    }

    #[test]
    fn each_option_is_told_with_its_value() {
        // 12012 bytes are needed.
        let module = module(true);
        assert_eq!(page_bytes(&module), Some(64));
        // Imported matmuls read their weight whole: no less than two slots of 4096 bytes, more than the weight itself.
        assert_eq!(remedies(true, 12_000, 100, None), [Remedy::Pages(99)]);
        assert_eq!(remedies(true, 5612 + 64, 100, Some(9000)), [Remedy::Pages(1)]);
        assert_eq!(remedies(true, 9000, 100, Some(9000)), [Remedy::Pages(52), Remedy::Dynamic(9000)]);
        assert_eq!(remedies(true, 5000, 100, None), []);
        assert_eq!(remedies(false, 5000, 50, None), [Remedy::Streaming]);
    }

    #[test]
    fn sizes_are_ones_that_options_take() {
        assert_eq!(option_size(3 << 30), "3GiB");
        assert_eq!(option_size((3 << 30) + (200 << 20) + 5), "3272MiB");
        assert_eq!(option_size(1000), "1000B");
        assert_eq!(option_size((1 << 20) + 1), "1024KiB");
    }

    #[test]
    fn bounds_keep_the_pages() {
        let module = module(true);
        let upper = upper_bounds(&module, Some(7)).unwrap();
        let lower = lower_bounds(&module, &upper);
        let named = |b: &Bindings| b.iter().map(|(s, v)| (s.name().to_string(), v)).collect::<Vec<_>>();
        assert_eq!(named(&upper), [("pages".to_string(), 7), ("t".to_string(), 8)]);
        assert_eq!(named(&lower), [("pages".to_string(), 7), ("t".to_string(), 1)]);
        assert_eq!(upper_bounds(&module, Some(101)).unwrap_err().code(), "run/bad-pages");
    }
}
