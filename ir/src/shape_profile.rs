//! Shape profiles: named ranges of symbols that an engine is asked for, such as one for decoding and one for prefill.
//!
//! A profile bounds some symbols by `min..=max` and says by `opt` what to expect; other symbols have the range of their
//! declaration. The bounds of a symbol are the union of its ranges: [`restrict`] narrows the declarations to that before any
//! pass runs. A profile *takes* a step whose symbols are at most its maxima: since no size shrinks when a symbol grows, memory for
//! the maxima serves every such step. The symbol of a state's size belongs to no profile, because states outlive steps.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dim::{Bindings, Sym, SymDecl};
use crate::error::{Error, Kind, Result};
use crate::graph::Module;

/// Most profiles of an engine.
pub const MAX_PROFILES: usize = 64;

/// The range of one symbol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SymbolRange {
    /// The symbol, without `$`.
    pub symbol: String,
    /// Smallest value.
    pub min: u64,
    /// Expected value.
    pub opt: u64,
    /// Largest value.
    pub max: u64,
}

/// A named range of shapes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapeProfile {
    /// Its name, unique in an engine.
    pub name: String,
    /// Ranges of some symbols, each once.
    pub ranges: Vec<SymbolRange>,
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, "compile/bad-profile", message)
        .hint("write NAME:SYMBOL=MIN..MAX/OPT,.. such as decode:t=1..64/8,b=1..64/8")
}

impl fmt::Display for ShapeProfile {
    /// As [`ShapeProfile::parse`] reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.name)?;
        for (at, SymbolRange { symbol, min, opt, max }) in self.ranges.iter().enumerate() {
            write!(f, "{}{symbol}={min}..{max}/{opt}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl ShapeProfile {
    /// Reads `NAME:SYMBOL=MIN..MAX/OPT,..`; without `/OPT` the largest value is expected, and a lone number is all three.
    ///
    /// # Errors
    /// `compile/bad-profile`.
    pub fn parse(text: &str) -> Result<ShapeProfile> {
        let (name, ranges) = text.split_once(':').ok_or_else(|| bad(format!("`{text}` has no name")))?;
        let range = |text: &str| -> Result<SymbolRange> {
            let wrong = || bad(format!("`{text}` is no range of a symbol"));
            let number = |text: &str| text.trim().parse::<u64>().map_err(|_| wrong());
            let (symbol, range) = text.split_once('=').ok_or_else(wrong)?;
            let (bounds, opt) = match range.split_once('/') {
                Some((bounds, opt)) => (bounds, Some(number(opt)?)),
                None => (range, None),
            };
            let (min, max) = match bounds.split_once("..") {
                Some((min, max)) => (number(min)?, number(max)?),
                None => (number(bounds)?, number(bounds)?),
            };
            let symbol = symbol.trim().trim_start_matches('$').to_string();
            Ok(SymbolRange { symbol, min, opt: opt.unwrap_or(max), max })
        };
        let ranges = ranges.split(',').map(range).collect::<Result<Vec<SymbolRange>>>()?;
        let profile = ShapeProfile { name: name.trim().to_string(), ranges };
        profile.check().map_err(bad)?;
        Ok(profile)
    }

    /// What is wrong with the profile on its own.
    fn check(&self) -> std::result::Result<(), String> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || self.name.len() > 64 || !self.name.chars().all(word) {
            return Err(format!("`{}` is no name of 1 to 64 letters, digits, - or _", self.name));
        }
        for (at, SymbolRange { symbol, min, opt, max }) in self.ranges.iter().enumerate() {
            if Sym::new(symbol).is_none() {
                return Err(format!("`{symbol}` is no symbol"));
            }
            if min > opt || opt > max {
                return Err(format!("{symbol}={min}..{max}/{opt} is not in rising order"));
            }
            if self.ranges[..at].iter().any(|r| r.symbol == *symbol) {
                return Err(format!("profile `{}` bounds `{symbol}` twice", self.name));
            }
        }
        Ok(())
    }

    fn range(&self, sym: Sym) -> Option<&SymbolRange> {
        self.ranges.iter().find(|r| r.symbol == sym.name())
    }

    /// Every symbol at its largest value of this profile.
    pub fn maxima(&self, decls: &[SymDecl]) -> Bindings {
        self.bindings(decls, |r| r.max, |d| d.max)
    }

    /// Every symbol at its expected value, or at its hint or largest value where the profile says nothing.
    pub fn expected(&self, decls: &[SymDecl]) -> Bindings {
        self.bindings(decls, |r| r.opt, |d| d.hint.unwrap_or(d.max))
    }

    /// Bytes of the arenas of a planned module at [`ShapeProfile::maxima`]; nothing if a size has no value.
    pub fn activation_bytes(&self, module: &Module) -> Option<u64> {
        let maxima = self.maxima(&module.dims);
        module.arenas.iter().try_fold(0u64, |sum, (_, arena)| sum.checked_add(arena.size.extent(&maxima)?))
    }

    fn bindings(
        &self,
        decls: &[SymDecl],
        own: impl Fn(&SymbolRange) -> u64,
        declared: impl Fn(&SymDecl) -> u64,
    ) -> Bindings {
        let mut bindings = Bindings::new();
        for decl in decls {
            bindings.set(decl.sym, self.range(decl.sym).map_or_else(|| declared(decl), &own));
        }
        bindings
    }
}

/// What is wrong with `profiles` for `module`: names, symbols that it lacks or that size a state, values out of range.
///
/// # Errors
/// The fault in words.
pub fn check_profiles(profiles: &[ShapeProfile], module: &Module) -> std::result::Result<(), String> {
    if profiles.len() > MAX_PROFILES {
        return Err(format!("{} profiles are more than {MAX_PROFILES}", profiles.len()));
    }
    for (at, profile) in profiles.iter().enumerate() {
        profile.check()?;
        if profiles[..at].iter().any(|p| p.name == profile.name) {
            return Err(format!("there are two profiles `{}`", profile.name));
        }
        for SymbolRange { symbol, min, opt, max } in &profile.ranges {
            let Some(decl) = module.dims.iter().find(|d| d.sym.name() == symbol) else {
                let known: Vec<&str> = module.dims.iter().map(|d| d.sym.name()).collect();
                return Err(format!("there is no symbol `{symbol}`; the graph has {}", known.join(", ")));
            };
            let mut state_dims = module.states.iter().flat_map(|(_, s)| &s.ty.shape);
            if state_dims.any(|d| d.symbols().contains(&decl.sym)) {
                return Err(format!("`{symbol}` is the size of a state, which outlives steps"));
            }
            if *min < decl.min || *max > decl.max {
                return Err(format!(
                    "{symbol}={min}..{max} leaves the range {}..{} of the graph",
                    decl.min, decl.max
                ));
            }
            if [min, opt, max].iter().any(|v| !v.is_multiple_of(decl.multiple.max(1))) {
                return Err(format!("values of `{symbol}` are multiples of {}", decl.multiple));
            }
        }
    }
    Ok(())
}

/// Narrows the symbols of `module` to the union of their ranges in `profiles`; the first profile gives what is expected.
///
/// # Errors
/// `compile/bad-profile`.
pub fn restrict(module: &mut Module, profiles: &[ShapeProfile]) -> Result<()> {
    check_profiles(profiles, module).map_err(bad)?;
    for decl in &mut module.dims {
        let ranges: Vec<&SymbolRange> = profiles.iter().filter_map(|p| p.range(decl.sym)).collect();
        if ranges.len() < profiles.len() || ranges.is_empty() {
            continue;
        }
        decl.min = ranges.iter().map(|r| r.min).min().unwrap_or(decl.min);
        decl.max = ranges.iter().map(|r| r.max).max().unwrap_or(decl.max);
        decl.hint = Some(ranges[0].opt);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    fn module() -> Module {
        let source = "module @m phase imported {\n  dim $t in 1..=64 multiple 1 hint 8\n  dim $b in 1..=8 multiple 1\n  dim \
                      $pages in 1..=4 multiple 1\n  state @s : f32[$pages, 4]\n  graph @main(%0 \"x\": f32[$t, 4], %1 \"y\": \
                      f32[$b, 4]) -> (\"z\": f32[$t, 4]) {\n    return %0\n  }\n}\n";
        text::parse(source).unwrap_or_else(|e| panic!("{e}"))
    }

    fn profiles(texts: &[&str]) -> Vec<ShapeProfile> {
        texts.iter().map(|t| ShapeProfile::parse(t).unwrap()).collect()
    }

    #[test]
    fn text_reads_and_prints() {
        let profile = ShapeProfile::parse("decode: t=1..64/8, $b=4, p=2..3").unwrap();
        assert_eq!(profile.to_string(), "decode:t=1..64/8,b=4..4/4,p=2..3/3");
        assert_eq!(ShapeProfile::parse(&profile.to_string()).unwrap(), profile);
        let slips = [
            "t=1..2",
            "a:",
            "a:t",
            "a:t=x",
            "a:t=2..1",
            "a:t=1..4/5",
            "a:t=1,t=2",
            "a b:t=1",
            ":t=1",
            "a:9=1",
        ];
        for slip in slips {
            assert_eq!(ShapeProfile::parse(slip).unwrap_err().code(), "compile/bad-profile", "{slip}");
        }
    }

    #[test]
    fn bounds_are_the_union_of_what_all_profiles_name() {
        let mut narrowed = module();
        let all = profiles(&["decode:t=2..8/4,b=1..8", "prefill:t=16..32"]);
        restrict(&mut narrowed, &all).unwrap();
        let bounds: Vec<_> = narrowed.dims.iter().map(|d| (d.sym.name(), d.min, d.max, d.hint)).collect();
        assert_eq!(bounds, [("t", 2, 32, Some(4)), ("b", 1, 8, None), ("pages", 1, 4, None)]);
        let maxima: Vec<u64> = all[0].maxima(&narrowed.dims).iter().map(|(_, v)| v).collect();
        assert_eq!(maxima, [8, 8, 4]);
        let expected: Vec<u64> = all[1].expected(&narrowed.dims).iter().map(|(_, v)| v).collect();
        assert_eq!(expected, [32, 8, 4]);
    }

    #[test]
    fn profiles_must_fit_the_graph() {
        for (texts, part) in [
            (vec!["a:t=1..65"], "leaves the range 1..64"),
            (vec!["a:q=1"], "no symbol `q`; the graph has t, b, pages"),
            (vec!["a:pages=1..2"], "size of a state"),
            (vec!["a:t=1", "a:t=2"], "two profiles `a`"),
        ] {
            let error = restrict(&mut module(), &profiles(&texts)).unwrap_err();
            assert!(error.message().contains(part), "{error}");
        }
    }
}
