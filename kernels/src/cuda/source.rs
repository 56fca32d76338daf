//! Text of one kernel: prelude, constants, body.

use std::fmt::{Display, Write};
use std::sync::Arc;

use millrace_ir::DType;

/// Declarations shared by all kernels.
pub const PRELUDE: &str = include_str!("prelude.cu");

/// What a kernel must not exceed; building checks it against what the compiler reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Promise {
    /// Most registers a thread; 0 for no promise.
    pub registers: u32,
    /// Whether the kernel uses no local memory: no stack, no spills.
    pub no_local: bool,
}

/// The source of one kernel. Equal texts are one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Family and variant, such as `cuda.matmul.skinny`.
    pub family: &'static str,
    /// CUDA C++ whose one entry point is called `KERNEL`; the build defines that name.
    pub text: String,
    /// What the build checks.
    pub promise: Promise,
}

/// Writes a [`Source`]: constants first, then the body of its family.
pub struct SourceWriter {
    family: &'static str,
    text: String,
    promise: Promise,
}

impl SourceWriter {
    /// A source of `family` that begins with the prelude.
    pub fn new(family: &'static str) -> Self {
        SourceWriter { family, text: PRELUDE.to_string(), promise: Promise::default() }
    }

    /// `constexpr int NAME = value;`
    #[must_use]
    pub fn int(self, name: &str, value: impl Display) -> Self {
        self.line(&format!("constexpr int {name} = {value};"))
    }

    /// `constexpr float NAME = value;`, exact to the last bit.
    #[must_use]
    pub fn float(self, name: &str, value: f32) -> Self {
        self.line(&format!("#define {name} {}", float(value)))
    }

    /// `typedef TYPE NAME;` for an element type.
    #[must_use]
    pub fn ty(self, name: &str, dtype: DType) -> Self {
        self.line(&format!("typedef {} {name};", type_name(dtype)))
    }

    /// One line of text.
    #[must_use]
    pub fn line(mut self, line: &str) -> Self {
        self.text.push_str(line);
        self.text.push('\n');
        self
    }

    /// A file of the family.
    #[must_use]
    pub fn body(self, text: &str) -> Self {
        self.line(text)
    }

    /// A file of the family with parts for kernels whose launches may read a weight in parts, `tiled`, and parts for those
    /// that never do: lines between `//# tiled` and `//# whole` or `//# end`, and between `//# whole` and `//# end`.
    #[must_use]
    pub fn body_for(self, text: &str, tiled: bool) -> Self {
        let mut taken = String::with_capacity(text.len());
        let mut take = true;
        for line in text.split_inclusive('\n') {
            match line.trim_end() {
                "//# tiled" => take = tiled,
                "//# whole" => take = !tiled,
                "//# end" => take = true,
                _ if take => taken.push_str(line),
                _ => {}
            }
        }
        self.line(&taken)
    }

    /// What the build checks.
    #[must_use]
    pub fn promise(mut self, promise: Promise) -> Self {
        self.promise = promise;
        self
    }

    /// The finished source.
    pub fn finish(self) -> Arc<Source> {
        let SourceWriter { family, text, promise } = self;
        Arc::new(Source { family, text, promise })
    }
}

/// An element type as kernels spell it.
pub fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F8E4M3 => "f8e4m3",
        DType::F8E5M2 => "f8e5m2",
        DType::I8 | DType::I4 => "i8",
        DType::U8 | DType::Bool => "u8",
        DType::I32 => "i32",
        DType::I64 => "i64",
    }
}

/// A float as a literal that keeps every bit.
pub fn float(value: f32) -> String {
    format!("__int_as_float(0x{:08x})", value.to_bits())
}

/// An array of floats as a constant: `__constant__ float NAME[n] = {..};`
pub fn float_table(name: &str, values: &[f32]) -> String {
    let mut text = format!("__constant__ float {name}[{}] = {{", values.len().max(1));
    for value in values {
        // Decimal with nine digits is exact for f32, and legal in an initialiser on the device.
        let _ = write!(text, "{value:.9e}f, ");
    }
    text.push_str("};");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_for_tiles_and_parts_without() {
        let text =
            "a\n//# tiled\nb\n//# whole\nc\n//# end\nd\n//# whole\ne\n//# end\n//# tiled\nf\n//# end\n";
        let of = |tiled| {
            let text = SourceWriter::new("cuda.test").body_for(text, tiled).finish().text.clone();
            text.strip_prefix(PRELUDE).unwrap().to_string()
        };
        assert_eq!(of(false), "a\nc\nd\ne\n\n");
        assert_eq!(of(true), "a\nb\nd\nf\n\n");
    }
}
