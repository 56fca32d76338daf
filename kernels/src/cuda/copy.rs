//! Copies between strided views: what transposition, repetition, cuts and joins of dense tensors are.
//!
//! Elements are moved as units of up to 16 bytes: neighbours that stay neighbours are moved together. Bases of operands
//! and results are multiples of 16 bytes.

use millrace_ir::{Dim, Module, Operand, ValueId};

use super::plan::{Argument, SiteLaunch};
use super::source::SourceWriter;
use super::space::{Extents, common_unit, divisible, product_text, split_text, strides};

const THREADS: u32 = 256;
/// Units a thread moves.
const UNITS: u32 = 2;

/// Copy of `extents` elements, strides and offsets in elements.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Extents of the space that is copied.
    pub extents: Vec<Dim>,
    /// Strides of the operand.
    pub from: Vec<Dim>,
    /// Strides of the result.
    pub to: Vec<Dim>,
    /// First element of the operand.
    pub from_base: Dim,
    /// First element of the result.
    pub to_base: Dim,
    /// Bytes of an element.
    pub size: u64,
}

/// The unsigned type of `size` bytes.
pub fn unit_type(size: u64) -> &'static str {
    match size {
        1 => "u8",
        2 => "u16",
        4 => "u32",
        8 => "u64",
        _ => "uint4",
    }
}

impl Copy {
    /// Merges axes that are one run of memory on both sides, and elements to larger units.
    fn simplify(mut self, fits: impl Fn(&Dim) -> bool) -> Self {
        let one = Dim::from(1u64);
        let mut axes: Vec<(Dim, Dim, Dim)> = Vec::new();
        for ((extent, from), to) in self.extents.iter().zip(&self.from).zip(&self.to) {
            if *extent == one {
                continue;
            }
            if let Some((e, f, t)) = axes.last_mut()
                && *f == from.mul(extent)
                && *t == to.mul(extent)
                && fits(&e.mul(extent))
            {
                (*e, *f, *t) = (e.mul(extent), from.clone(), to.clone());
                continue;
            }
            axes.push((extent.clone(), from.clone(), to.clone()));
        }
        if axes.is_empty() {
            axes.push((one.clone(), one.clone(), one.clone()));
        }
        let (inner, outer) = (axes[axes.len() - 1].clone(), &axes[..axes.len() - 1]);
        if inner.1 == one && inner.2 == one {
            let all: Vec<&Dim> = outer
                .iter()
                .flat_map(|(_, f, t)| [f, t])
                .chain([&inner.0, &self.from_base, &self.to_base])
                .collect();
            let unit = common_unit(16 / self.size, all);
            let by = unit as i64;
            let last = axes.len() - 1;
            for (i, (e, f, t)) in axes.iter_mut().enumerate() {
                if i == last {
                    *e = e.ceil_div(by);
                } else {
                    (*f, *t) = (f.ceil_div(by), t.ceil_div(by));
                }
            }
            self.from_base = self.from_base.ceil_div(by);
            self.to_base = self.to_base.ceil_div(by);
            self.size *= unit;
        }
        self.extents = axes.iter().map(|a| a.0.clone()).collect();
        self.from = axes.iter().map(|a| a.1.clone()).collect();
        self.to = axes.iter().map(|a| a.2.clone()).collect();
        self
    }

    /// The launch; `None` if an extent or stride exceeds 32 bits.
    pub fn launch(
        self,
        family: &'static str,
        module: &Module,
        from: Operand,
        to: ValueId,
    ) -> Option<SiteLaunch> {
        let mut extents = Extents::new(module);
        extents.covers_operand(from);
        extents.covers_operand(Operand::Value(to));
        let copy = self.simplify(|d| d.as_const().is_some() || extents.argument_fits(d));
        let address = [Argument::Address(from), Argument::Address(Operand::Value(to))];
        let launch = match copy.tile() {
            Some(axis) => copy.transpose(axis, family, &mut extents),
            None => copy.elementwise(family, &mut extents),
        };
        Some(launch.args(address).args(extents.arguments()?))
    }

    /// The axis along which the operand is contiguous, if the result is contiguous along another one.
    fn tile(&self) -> Option<usize> {
        let one = Dim::from(1u64);
        let last = self.extents.len() - 1;
        let zero = Dim::from(0u64);
        if self.to[last] != one || self.from[last] == one || self.from[last] == zero {
            return None;
        }
        let axis = self.from[..last].iter().position(|f| *f == one)?;
        // Short runs are no runs.
        let short = |d: &Dim| d.as_const().is_some_and(|c| c < 8);
        (!short(&self.extents[axis]) && !short(&self.extents[last])).then_some(axis)
    }

    /// Whether the result is one run of memory.
    fn dense(&self) -> bool {
        strides(&self.extents) == self.to
    }

    /// A thread moves `UNITS` units, all read before the first is written.
    fn elementwise(&self, family: &'static str, extents: &mut Extents<'_>) -> SiteLaunch {
        let sizes = extents.texts(&self.extents);
        let from = extents.texts(&self.from);
        let to = extents.texts(&self.to);
        let (from_base, to_base) = (extents.text(&self.from_base), extents.text(&self.to_base));
        let sum = |base: &str, strides: &[String]| {
            let terms = strides.iter().enumerate().map(|(i, s)| format!(" + c{i} * {s}"));
            std::iter::once(base.to_string()).chain(terms).collect::<String>()
        };
        let to = if self.dense() { format!("{to_base} + at") } else { sum(&to_base, &to) };
        let text = format!(
            "typedef {unit} Unit;
extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL(const Unit *from, Unit *to{parameters}) {{
    wait_for_predecessor();
    release_successor();
    const Index total = {total};
    const Index first = (Index)blockIdx.x * {block} + threadIdx.x;
    Unit v[{UNITS}];
    Index target[{UNITS}];
#pragma unroll
    for (int u = 0; u < {UNITS}; ++u) {{
        const Index at = first + u * {THREADS};
        if (at < total) {{
{split}            target[u] = {to};
            v[u] = from[{from}];
        }}
    }}
#pragma unroll
    for (int u = 0; u < {UNITS}; ++u) {{
        if (first + u * {THREADS} < total) to[target[u]] = v[u];
    }}
}}",
            unit = unit_type(self.size),
            parameters = extents.parameters(),
            total = product_text(&sizes),
            block = THREADS * UNITS,
            split = split_text("at", "c", &sizes),
            from = sum(&from_base, &from),
        );
        let source = SourceWriter::new(family).line(extents.index_type()).body(&text).finish();
        let units = self.extents.iter().fold(Dim::from(1u64), |n, d| n.mul(d));
        in_order(source, units.ceil_div(i64::from(THREADS * UNITS)))
    }

    /// Tiles through shared memory: the operand is contiguous along `axis`, the result along the last one.
    fn transpose(&self, axis: usize, family: &'static str, extents: &mut Extents<'_>) -> SiteLaunch {
        let last = self.extents.len() - 1;
        // Small elements are read and written as words of up to 8 bytes; small tensors have small tiles.
        let mut neighbours = (8 / self.size).min(4);
        let short = extents.most(&self.extents[axis]).min(extents.most(&self.extents[last])) as u64;
        while neighbours > 1 && 32 * neighbours > 2 * short.max(32) {
            neighbours /= 2;
        }
        let others = || {
            let rest =
                (0..=last).filter(|i| *i != axis && *i != last).flat_map(|i| [&self.from[i], &self.to[i]]);
            rest.chain([&self.from[last], &self.to[axis], &self.from_base, &self.to_base])
                .chain([&self.extents[axis], &self.extents[last]])
        };
        while neighbours > 1 && !others().all(|d| divisible(d, neighbours)) {
            neighbours /= 2;
        }
        let tile = 32 * neighbours;
        let outer: Vec<usize> = (0..=last).filter(|i| *i != axis && *i != last).collect();
        let mut sizes = extents.texts(outer.iter().map(|i| &self.extents[*i]));
        let (rows, columns) = (extents.text(&self.extents[axis]), extents.text(&self.extents[last]));
        sizes.push(format!("(({rows} + {}) / {tile})", tile - 1));
        sizes.push(format!("(({columns} + {}) / {tile})", tile - 1));
        let offset = |extents: &mut Extents<'_>, base: &Dim, strides: &[Dim]| {
            let mut text = extents.text(base);
            for (c, i) in outer.iter().enumerate() {
                text += &format!(" + c{c} * {}", extents.text(&strides[*i]));
            }
            text
        };
        let from = offset(extents, &self.from_base, &self.from);
        let to = offset(extents, &self.to_base, &self.to);
        let (from_stride, to_stride) = (extents.text(&self.from[last]), extents.text(&self.to[axis]));
        let unit = unit_type(self.size);
        let word = unit_type(self.size * neighbours);
        let (y, x) = (outer.len(), outer.len() + 1);
        let text = format!(
            "constexpr int NEAR = {neighbours}, TILE = 32 * NEAR;
typedef {unit} Unit;
typedef {word} Word;
union Cell {{ Word word; Unit units[NEAR]; }};
extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL(const Unit *from, Unit *to{parameters}) {{
    // Words of NEAR columns; rotated by row so that neither side has bank conflicts.
    __shared__ Word tile[TILE][32];
    wait_for_predecessor();
    release_successor();
{split}    from += {from};
    to += {to};
    const Index rows = {rows}, columns = {columns};
    const Index row = c{y} * TILE, column = c{x} * TILE;
    const int lane = threadIdx.x % 32, line = threadIdx.x / 32;
    // The operand runs along rows: neighbouring lanes have neighbouring rows.
    if (row + lane * NEAR < rows) {{
#pragma unroll
        for (int group = line; group < 32; group += 8) {{
            if (column + group * NEAR < columns) {{
                Cell read[NEAR];
#pragma unroll
                for (int i = 0; i < NEAR; ++i) {{
                    const Index at = (column + group * NEAR + i) * ({from_stride}) + row + lane * NEAR;
                    read[i].word = *(const Word *)(from + at);
                }}
#pragma unroll
                for (int r = 0; r < NEAR; ++r) {{
                    Cell turned;
#pragma unroll
                    for (int i = 0; i < NEAR; ++i) turned.units[i] = read[i].units[r];
                    tile[lane * NEAR + r][(group + lane) % 32] = turned.word;
                }}
            }}
        }}
    }}
    __syncthreads();
    if (column + lane * NEAR < columns) {{
#pragma unroll
        for (int j = line; j < TILE; j += 8) {{
            if (row + j < rows) {{
                *(Word *)(to + (row + j) * ({to_stride}) + column + lane * NEAR) = tile[j][(lane + j / NEAR) % 32];
            }}
        }}
    }}
}}",
            parameters = extents.parameters(),
            split = split_text("(Index)blockIdx.x", "c", &sizes),
        );
        let source = SourceWriter::new(family).line(extents.index_type()).body(&text).finish();
        let blocks = outer
            .iter()
            .map(|i| self.extents[*i].clone())
            .chain([self.extents[axis].ceil_div(tile as i64), self.extents[last].ceil_div(tile as i64)])
            .fold(Dim::from(1u64), |n, d| n.mul(&d));
        in_order(source, blocks)
    }
}

/// A launch of `blocks` blocks that waits for its predecessor by itself.
pub fn in_order(source: std::sync::Arc<super::Source>, blocks: Dim) -> SiteLaunch {
    let mut launch = SiteLaunch::new(source, [blocks, Dim::from(1u64), Dim::from(1u64)], THREADS);
    launch.dependent = true;
    launch
}
