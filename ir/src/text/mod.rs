//! The text form: one node a line, one syntax for every op and phase. `print(parse(s)) == s` for canonical text.
//!
//! The parser knows syntax and names; whether a module makes sense is the verifier's business.

mod lexer;
mod parse;
mod print;

pub use parse::{parse, parse_dim};
pub use print::{operand_name, print, print_node};

use std::fmt;

use crate::graph::Phase;

impl Phase {
    /// All phases in order.
    pub const ALL: [Phase; 6] =
        [Phase::Imported, Phase::Canonical, Phase::Fused, Phase::Scheduled, Phase::Planned, Phase::Lowered];

    /// Its spelling.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Imported => "imported",
            Phase::Canonical => "canonical",
            Phase::Fused => "fused",
            Phase::Scheduled => "scheduled",
            Phase::Planned => "planned",
            Phase::Lowered => "lowered",
        }
    }

    /// The phase spelled `name`.
    pub fn parse(name: &str) -> Option<Phase> {
        Phase::ALL.into_iter().find(|p| p.name() == name)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a name prints without quotes.
pub(crate) fn is_bare(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}
