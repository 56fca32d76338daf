//! Ways to run a matmul site that a measurement may choose from, and how its choice replaces the built-in one.
//!
//! Rows are cut into [`RANGES`], each with a choice of its own. A *candidate* is a way to run the site for the rows of a
//! range, under a name that says everything about it; a *key* says everything about site, range and architecture that
//! the time of a candidate depends on. [`Choices`] maps keys to names. A name that is not among the candidates of its
//! key chooses nothing. What is not chosen runs as built in. A [`library`] has keys of its own: what it is chosen for keeps
//! the launches that are chosen or built in, and gains its products beside them.

use std::collections::BTreeMap;
use std::fmt::Write;

use millrace_ir::ops::fused_matmul::Epilogue;

use super::gemv;
use super::large::{self, Tile};
use super::library;
use super::norm;
use super::problem::{Layout, Problem};
use super::simple;
use super::simt;
use super::skinny::{self, Shape};
use crate::cuda::plan::{SiteLaunch, SiteLibrary, SiteVariant, between};

/// Rows that have one choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRange {
    /// Fewest rows.
    pub first: u64,
    /// Most rows.
    pub last: u64,
    /// Rows to measure with.
    pub at: u64,
}

const fn range(first: u64, last: u64) -> RowRange {
    RowRange { first, last, at: if last == u64::MAX { 8192 } else { last } }
}

/// All ranges, in increasing order; together every number of rows. Up to 64 rows they are those of [`skinny`].
pub const RANGES: [RowRange; 19] = [
    range(0, 1),
    range(2, 4),
    range(5, 8),
    range(9, 16),
    range(17, 32),
    range(33, 48),
    range(49, 64),
    range(65, 127),
    range(128, 128),
    range(129, 256),
    range(257, 384),
    range(385, 512),
    range(513, 768),
    range(769, 1024),
    range(1025, 1536),
    range(1537, 2048),
    range(2049, 3072),
    range(3073, 4096),
    range(4097, u64::MAX),
];

/// Most candidates of the skinny family in a range.
const SKINNY: usize = 10;

/// Most candidates of the gemv family in a range.
const GEMV: usize = 10;

/// Names of chosen candidates by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices(BTreeMap<String, String>);

impl Choices {
    /// The name chosen for `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Whether nothing is chosen.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, String)> for Choices {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        Choices(pairs.into_iter().collect())
    }
}

/// One way to run a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By [`skinny`].
    Skinny(Shape),
    /// By [`large`].
    Large(Tile),
    /// By [`gemv`].
    Gemv(gemv::Shape),
    /// By [`simt`], tiles of this edge.
    Simt(u64),
    /// By [`simple`].
    Simple,
}

impl Way {
    /// The name, unique among the candidates of a key.
    pub fn name(&self) -> String {
        match self {
            Way::Skinny(s) => {
                let after = if s.after() { "-norm" } else { "" };
                let Shape { tile, warps_n, warps_k, columns, whole, .. } = s;
                format!("skinny-t{tile}-n{warps_n}-k{warps_k}-c{columns}-w{whole}{after}")
            }
            Way::Gemv(s) => format!("gemv-r{}-u{}-k{}-c{}", s.rows, s.unroll, s.split, s.columns),
            Way::Simt(edge) => format!("simt-e{edge}"),
            Way::Simple => "simple".to_string(),
            Way::Large(Tile::Wgmma { consumers, columns, stages, cluster, split, boxes, group }) => format!(
                "wgmma-m{}-c{columns}-s{stages}-x{cluster}-p{split}-b{boxes}-g{group}",
                64 * consumers
            ),
            Way::Large(Tile::Mma { warps_m, warps_n, stages, group }) => {
                format!("mma-m{}-c{}-s{stages}-g{group}", 64 * warps_m, 64 * warps_n)
            }
        }
    }

    /// The launches, a norm in front included.
    pub fn launches(&self, problem: &Problem<'_>) -> Option<Vec<SiteLaunch>> {
        let (launch, normed) = match self {
            Way::Skinny(shape) => (skinny::launch(problem, shape)?, shape.norm),
            Way::Gemv(shape) => (gemv::launch(problem, shape)?, shape.norm),
            Way::Large(tile) => (large::launch(problem, *tile)?, false),
            Way::Simt(edge) => (simt::launch(problem, *edge)?, false),
            Way::Simple => return simple::launches(problem),
        };
        let norm = norm::launch(problem).filter(|_| !normed);
        Some(norm.into_iter().chain([launch]).collect())
    }
}

/// What the time of a candidate depends on: architecture, types, layout, extents, what is fused, rows.
pub fn key(problem: &Problem<'_>, rows: RowRange) -> String {
    let list = |values: Vec<String>, by: &str| values.join(by);
    let segments = list(problem.segments.iter().map(ToString::to_string).collect(), "+");
    let step = |s: &Epilogue| match s {
        Epilogue::Bias => "bias".to_string(),
        Epilogue::Residual => "residual".to_string(),
        Epilogue::Mul => "mul".to_string(),
        Epilogue::Activation(f) => format!("{f:?}").to_lowercase(),
        Epilogue::Glu(f) => format!("glu({})", format!("{f:?}").to_lowercase()),
    };
    let epilogue = list(problem.epilogue.iter().map(|t| step(&t.step)).collect(), ",");
    let layout = match problem.layout {
        Layout::Rows => "rows",
        Layout::Cores => "cores",
    };
    let mut text = format!("matmul {} {}", problem.site.arch, problem.dtype);
    // Writing to a string has no reason to fail.
    let _ = write!(text, " out={} {layout} k={} n={segments}", problem.out, problem.k);
    if problem.norm.is_some() {
        text.push_str(" rms_norm");
    }
    if !epilogue.is_empty() {
        let _ = write!(text, " epilogue={epilogue}");
    }
    let _ = match rows.last {
        u64::MAX => write!(text, " m={}..", rows.first),
        last => write!(text, " m={}..{last}", rows.first),
    };
    text
}

/// What the key of a library adds to that of kernels.
const BY_LIBRARY: &str = " library";

/// The key of the library's choice for what `key` names.
pub fn library_key(key: &str) -> String {
    format!("{key}{BY_LIBRARY}")
}

/// The key of kernels beside a library's key; `None` for any other key.
pub fn kernel_key(key: &str) -> Option<&str> {
    key.strip_suffix(BY_LIBRARY)
}

/// Ways to run the problem for the rows of a range, the built-in one first, then from the cost models' best to worst
/// within a family. One is none to choose from.
pub fn candidates(problem: &Problem<'_>, rows: RowRange) -> Vec<Way> {
    let mut ways = Vec::new();
    if rows.last <= skinny::MAX_ROWS {
        ways.extend(skinny::shapes(problem, rows.last as usize).into_iter().take(SKINNY).map(Way::Skinny));
    }
    // Below this a tile is mostly rows that are not there.
    if rows.last > 8 || ways.is_empty() {
        let large = large::tiles(problem, rows.at).into_iter().map(Way::Large);
        let at = if rows.first < large::fewest_rows(problem) { ways.len() } else { 0 };
        ways.splice(at..at, large);
    }
    if ways.is_empty() {
        ways.extend(gemv::shapes(problem, rows).into_iter().take(GEMV).map(Way::Gemv));
        ways.push(Way::Simple);
        // Below this a tile is mostly rows that are not there.
        if rows.last > 16 {
            ways.extend(simt::edges(problem, rows.at).into_iter().map(Way::Simt));
        }
    }
    ways
}

/// The candidate that `choices` have for a range, with its launches.
fn chosen(problem: &Problem<'_>, rows: RowRange, choices: &Choices) -> Option<Vec<SiteLaunch>> {
    let name = choices.get(&key(problem, rows))?;
    let way = candidates(problem, rows).into_iter().find(|way| way.name() == name)?;
    way.launches(problem)
}

/// Puts what was chosen in front of the variants that serve the same rows; those that serve none any more are left out.
pub fn apply(problem: &Problem<'_>, choices: &Choices, variants: &mut Vec<SiteVariant>) {
    if choices.is_empty() {
        return;
    }
    for rows in RANGES {
        let Some(launches) = chosen(problem, rows, choices) else { continue };
        let overlaps = |v: &SiteVariant| v.when.iter().all(|c| c.min <= rows.last && rows.first <= c.max);
        let at = variants.iter().position(overlaps).unwrap_or(variants.len());
        let when = vec![between(&problem.m, rows.first, rows.last)];
        variants.insert(at, SiteVariant::new(when, launches));
    }
    prune(variants);
    // A library reads no weight in parts.
    if problem.tiles().is_none() {
        for rows in RANGES {
            if let Some(library) = chosen_library(problem, rows, choices) {
                put_beside(problem, rows, &library, variants);
            }
        }
        prune(variants);
    }
}

/// The library's way that `choices` have for a range.
fn chosen_library(problem: &Problem<'_>, rows: RowRange, choices: &Choices) -> Option<SiteLibrary> {
    let name = choices.get(&library_key(&key(problem, rows)))?;
    library::run(problem, rows, library::suggestion(name)?)
}

/// Rows that a variant of a matmul serves, if none in front of it does.
fn bounds(variant: &SiteVariant) -> (u64, u64) {
    variant.when.first().map_or((0, u64::MAX), |c| (c.min, c.max))
}

/// Puts `library` beside the launches that serve each number of rows of a range.
fn put_beside(problem: &Problem<'_>, rows: RowRange, library: &SiteLibrary, variants: &mut Vec<SiteVariant>) {
    let mut next = rows.first;
    while let Some(at) = variants.iter().position(|v| (bounds(v).0..=bounds(v).1).contains(&next)) {
        // Up to where a variant in front begins to serve.
        let begin = variants[..at].iter().map(|v| bounds(v).0).filter(|first| *first > next).min();
        let last = bounds(&variants[at]).1.min(rows.last).min(begin.map_or(u64::MAX, |first| first - 1));
        let mut beside = variants[at].clone();
        beside.when = vec![between(&problem.m, next, last)];
        beside.library = Some(library.clone());
        variants.insert(at, beside);
        match last.checked_add(1) {
            Some(after) if after <= rows.last => next = after,
            _ => return,
        }
    }
}

/// Leaves out variants that serve no rows, since others in front do.
fn prune(variants: &mut Vec<SiteVariant>) {
    let mut served: Vec<(u64, u64)> = Vec::new();
    variants.retain(|variant| {
        let (min, max) = bounds(variant);
        let needed = !covers(&served, min, max);
        served.push((min, max));
        needed
    });
    // The last serves what is left, whatever it is.
    if let Some(last) = variants.last_mut() {
        last.when.clear();
    }
}

/// Whether the union of `ranges` holds every number from `first` to `last`.
fn covers(ranges: &[(u64, u64)], first: u64, last: u64) -> bool {
    let mut next = first;
    while next <= last {
        let Some((_, end)) = ranges.iter().find(|(min, max)| (*min..=*max).contains(&next)) else {
            return false;
        };
        let Some(after) = end.checked_add(1) else { return true };
        next = after;
    }
    true
}

#[cfg(test)]
#[path = "choice_tests.rs"]
mod tests;
