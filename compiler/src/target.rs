//! Targets: what code generation knows of them, from `targets/*.toml`.

use millrace_ir::{Error, Kind, Result};
use millrace_kernels::cuda::Arch;
use serde::Deserialize;

use crate::pipeline::Pipeline;

/// A target's facts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Name on the command line and in engines.
    pub name: String,
    /// Rows of a packed weight panel; 0 for a target without panels.
    #[serde(default)]
    pub panel: usize,
    /// Whether matmul weights of 16-bit elements are stored in cores.
    #[serde(default)]
    pub cores: bool,
    /// Whether nodes that one launch runs are joined before memory is planned.
    #[serde(default)]
    pub launch_groups: bool,
    /// Alignment of arenas and offsets in bytes, a power of two.
    pub align: u64,
    /// Passes of the levels that the target leaves out.
    #[serde(default)]
    pub without: Vec<String>,
}

/// What to generate code for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetChoice {
    /// The target's facts.
    pub target: Target,
    /// Architectures of a CUDA engine, each once, PTX last; none for other targets.
    pub archs: Vec<Arch>,
}

impl Default for TargetChoice {
    fn default() -> Self {
        // The file is part of the program, and a test reads it.
        let target = Target::named("cpu").unwrap_or_default();
        TargetChoice { target, archs: Vec::new() }
    }
}

impl TargetChoice {
    /// Reads `cpu`, `cuda` (every architecture), or a list such as `cuda:sm_90a,cuda:sm_80,ptx`; `cuda:` may be left out
    /// after the first. `ptx` adds PTX text for parts that none of the others is for.
    ///
    /// # Errors
    /// `compile/target` for an unknown target or architecture.
    pub fn parse(text: &str) -> Result<TargetChoice> {
        let name = text.split([':', ',']).next().unwrap_or("");
        let target = Target::named(name)?;
        let bad = |what: String| {
            let known: Vec<&str> = Arch::ALL.iter().map(|a| a.name()).collect();
            Error::new(Kind::Unsupported, "compile/target", what)
                .hint(format!("write cuda:sm_90a,cuda:sm_80; architectures are {}, ptx", known.join(", ")))
        };
        if text == name {
            let archs = if name == "cuda" { Arch::ALL.to_vec() } else { Vec::new() };
            return Ok(TargetChoice { target, archs });
        }
        if name != "cuda" {
            return Err(bad(format!("target `{name}` has no architectures and stands alone")));
        }
        let mut archs = Vec::new();
        for part in text.split(',') {
            let arch = part.strip_prefix("cuda:").unwrap_or(part);
            match arch {
                "cuda" => archs.extend(Arch::ALL),
                "ptx" => archs.push(Arch::Compute80),
                _ => archs.push(
                    Arch::parse(arch).ok_or_else(|| bad(format!("there is no architecture `{arch}`")))?,
                ),
            }
        }
        let mut seen = Vec::new();
        archs.retain(|a| {
            !seen.contains(a) && {
                seen.push(*a);
                true
            }
        });
        archs.sort_by_key(|a| a.is_virtual());
        Ok(TargetChoice { target, archs })
    }

    /// The pipeline of a level without the passes the target leaves out.
    pub fn level(&self, level: usize) -> Pipeline {
        Pipeline::level(level).without(&self.target.without)
    }
}

/// The files of all targets.
const FILES: [&str; 2] = [include_str!("../../targets/cpu.toml"), include_str!("../../targets/cuda.toml")];

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

    #[test]
    fn architectures_are_read_from_the_target() {
        let archs = |text: &str| TargetChoice::parse(text).map(|t| t.archs);
        assert_eq!(archs("cpu").unwrap(), []);
        assert_eq!(archs("cuda").unwrap(), Arch::ALL);
        assert_eq!(archs("cuda:sm_90a,cuda:sm_80,sm_80").unwrap(), [Arch::Sm90a, Arch::Sm80]);
        assert_eq!(archs("cuda:ptx,sm_90a,ptx").unwrap(), [Arch::Sm90a, Arch::Compute80]);
        assert_eq!(archs("cuda,ptx").unwrap().len(), Arch::ALL.len() + 1);
        for bad in ["ptx", "tpu", "cpu:sm_80", "cuda:sm_91", "cuda:", "cuda,cpu"] {
            assert_eq!(archs(bad).unwrap_err().code(), "compile/target", "{bad}");
        }
        let cuda = TargetChoice::parse("cuda").unwrap();
        let without: Vec<String> = (0..3).map(|level| cuda.level(level).to_string()).collect();
        assert!(
            without.iter().all(|p| !p.contains("fuse-add-norm") && p.contains("group-launches")),
            "{without:?}"
        );
    }
}
