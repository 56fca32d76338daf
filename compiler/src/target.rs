//! Targets: what code generation knows of them, from `targets/*.toml`.

use millrace_ir::{Error, Kind, Result};
use serde::Deserialize;

/// A target's facts.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Name on the command line and in engines.
    pub name: String,
    /// Rows of a packed weight panel.
    pub panel: usize,
    /// Alignment of arenas and offsets in bytes, a power of two.
    pub align: u64,
}

/// The files of all targets.
const FILES: [&str; 1] = [include_str!("../../targets/cpu.toml")];

impl Target {
    /// The target called `name`.
    ///
    /// # Errors
    /// `compile/target` for an unknown name.
    pub fn named(name: &str) -> Result<Target> {
        let mut known = Vec::new();
        for file in FILES {
            let target: Target = toml::from_str(file).map_err(|e| {
                Error::new(Kind::Internal, "compile/target-file", format!("a target file is malformed: {e}"))
            })?;
            if target.name == name {
                return Ok(target);
            }
            known.push(target.name);
        }
        Err(Error::new(Kind::Unsupported, "compile/target", format!("target `{name}` is not supported"))
            .hint(format!("supported targets: {}", known.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_target_is_what_its_kernels_expect() {
        let cpu = Target::named("cpu").unwrap();
        assert_eq!(cpu.panel, millrace_kernels::cpu::matmul::PANEL);
        assert!(cpu.align.is_power_of_two());
        assert_eq!(Target::named("tpu").unwrap_err().code(), "compile/target");
    }
}
