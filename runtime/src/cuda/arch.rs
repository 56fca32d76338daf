//! Which of an engine's kernel sections fits a device.

use millrace_ir::{Error, Kind, Result};
use millrace_kernels::cuda::Arch;

/// The architecture whose code runs on a device of compute capability `capability`: its own, or for parts that have
/// none the nearest below of the same generation whose code is not tied to one part.
pub(super) fn wanted(capability: u32) -> Option<Arch> {
    let exact = Arch::ALL.into_iter().find(|a| a.capability() == capability);
    let general = |a: &Arch| a.capability() / 10 == capability / 10 && !a.has_wgmma();
    let below = || Arch::ALL.into_iter().filter(general).filter(|a| a.capability() < capability).max();
    exact.or_else(below)
}

/// What to write after `cuda:` for a device of compute capability `capability`, if this version has code for it.
pub(super) fn target(capability: u32) -> Option<&'static str> {
    match wanted(capability) {
        Some(arch) => Some(arch.name()),
        None => (Arch::Compute80.capability() <= capability).then_some("ptx"),
    }
}

/// The indices of the sections that a device can run, the best first: the code made for it, then PTX, which its driver
/// compiles.
///
/// # Errors
/// `cuda/arch` names what the engine has, what the device is and how to build for it.
pub(super) fn choose(sections: &[&str], capability: u32) -> Result<Vec<usize>> {
    let wanted = wanted(capability);
    let ptx = Some(Arch::Compute80).filter(|a| a.capability() <= capability);
    let place = |arch: Arch| sections.iter().position(|s| *s == arch.name());
    let found: Vec<usize> = [wanted, ptx].into_iter().flatten().filter_map(place).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let has = if sections.is_empty() { "no device code".to_string() } else { sections.join(", ") };
    let gpu = match wanted {
        Some(arch) if arch.capability() == capability => arch.name().to_string(),
        _ => format!("sm_{capability}"),
    };
    let next = match (wanted, ptx) {
        (Some(arch), _) => format!("rebuild with --target cuda:{}, no GPU needed", arch.name()),
        (None, Some(_)) => "rebuild with --target cuda:ptx, no GPU needed".to_string(),
        (None, None) => "this version generates no code for it; use --target cpu".to_string(),
    };
    let kind = if wanted.or(ptx).is_some() { Kind::Incompatible } else { Kind::Unsupported };
    Err(Error::new(kind, "cuda/arch", format!("engine has {has}; this GPU is {gpu}; {next}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_fit_exactly() {
        let sections = ["sm_80", "sm_90a", "sm_100"];
        assert_eq!(choose(&sections, 80).unwrap(), [0]);
        assert_eq!(choose(&sections, 90).unwrap(), [1]);
        assert_eq!(choose(&sections, 100).unwrap(), [2]);
        // Parts without an architecture of their own run the code of an older part of their generation.
        assert_eq!(choose(&sections, 86).unwrap(), [0]);
        assert_eq!(choose(&sections, 103).unwrap(), [2]);
    }

    #[test]
    fn ptx_stands_in_where_nothing_else_fits() {
        let sections = ["sm_90a", "compute_80"];
        assert_eq!(choose(&sections, 90).unwrap(), [0, 1]);
        // Older parts of the same generation, newer ones, and generations that came after this version.
        for capability in [80, 86, 89, 100, 120, 121, 130] {
            assert_eq!(choose(&sections, capability).unwrap(), [1], "{capability}");
        }
        assert_eq!(choose(&sections, 75).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn refusals_say_what_to_do() {
        let refusal = |sections: &[&str], capability| {
            let error = choose(sections, capability).unwrap_err();
            assert_eq!(error.code(), "cuda/arch");
            (error.kind(), error.message().to_string())
        };
        assert_eq!(
            refusal(&["sm_80", "sm_90a"], 89),
            (
                Kind::Incompatible,
                "engine has sm_80, sm_90a; this GPU is sm_89; rebuild with --target cuda:sm_89, no GPU needed"
                    .to_string()
            )
        );
        assert_eq!(
            refusal(&["sm_80"], 90).1,
            "engine has sm_80; this GPU is sm_90a; rebuild with --target cuda:sm_90a, no GPU needed"
        );
        assert_eq!(
            refusal(&["sm_90a"], 86).1,
            "engine has sm_90a; this GPU is sm_86; rebuild with --target cuda:sm_80, no GPU needed"
        );
        assert_eq!(
            refusal(&["sm_90a"], 130),
            (
                Kind::Incompatible,
                "engine has sm_90a; this GPU is sm_130; rebuild with --target cuda:ptx, no GPU needed"
                    .to_string()
            )
        );
        assert_eq!(
            refusal(&["sm_90a", "compute_80"], 75).1,
            "engine has sm_90a, compute_80; this GPU is sm_75; this version generates no code for it; use --target cpu"
        );
        assert_eq!(refusal(&[], 75).0, Kind::Unsupported);
        assert!(refusal(&[], 75).1.starts_with("engine has no device code; this GPU is sm_75; "));
    }
}
