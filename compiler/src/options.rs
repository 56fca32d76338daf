//! Options of passes: each pass declares them with type, default and help, and the pipeline string sets them:
//! `schedule{search=true}`.

use std::fmt;

use millrace_ir::nearest::nearest;

/// What an option may be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// `true` or `false`.
    Flag {
        /// Value where the pipeline says nothing.
        default: bool,
    },
    /// A number within a range.
    Integer {
        /// Value where the pipeline says nothing.
        default: i64,
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: i64,
    },
    /// One of several words.
    Choice {
        /// Value where the pipeline says nothing.
        default: &'static str,
        /// All words.
        of: &'static [&'static str],
    },
}

/// The declaration of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassOption {
    /// Name, a word in lower case.
    pub name: &'static str,
    /// What it does, one line.
    pub help: &'static str,
    /// Type and default.
    pub kind: OptionKind,
}

impl fmt::Display for PassOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            OptionKind::Flag { default } => write!(f, "{}=true|false (default {default})", self.name),
            OptionKind::Integer { default, min, max } => {
                write!(f, "{}={min}..{max} (default {default})", self.name)
            }
            OptionKind::Choice { default, of } => {
                write!(f, "{}={} (default {default})", self.name, of.join("|"))
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OptionValue {
    Flag(bool),
    Integer(i64),
    Choice(&'static str),
}

/// The options of one pass in a pipeline: what was written, with the defaults behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassOptions {
    declared: &'static [PassOption],
    given: Vec<(&'static str, OptionValue)>,
}

impl PassOptions {
    /// Reads `pairs` of names and values against the options that `pass` declares.
    ///
    /// # Errors
    /// What is wrong, in words: an unknown name, a value of another type or out of range, a name written twice.
    pub fn read(
        pass: &str,
        declared: &'static [PassOption],
        pairs: &[(&str, &str)],
    ) -> Result<PassOptions, String> {
        let mut options = PassOptions { declared, given: Vec::new() };
        for (name, text) in pairs {
            let Some(option) = declared.iter().find(|o| o.name == *name) else {
                if declared.is_empty() {
                    return Err(format!("pass `{pass}` takes no options"));
                }
                let known: Vec<String> = declared.iter().map(ToString::to_string).collect();
                let close = nearest(name, declared.iter().map(|o| o.name));
                let close = close.map_or_else(String::new, |c| format!(", did you mean `{c}`?"));
                return Err(format!(
                    "pass `{pass}` has no option `{name}`{close}; it has {}",
                    known.join(", ")
                ));
            };
            let value = match option.kind {
                OptionKind::Flag { .. } => text.parse().ok().map(OptionValue::Flag),
                OptionKind::Integer { min, max, .. } => {
                    text.parse().ok().filter(|n| (min..=max).contains(n)).map(OptionValue::Integer)
                }
                OptionKind::Choice { of, .. } => {
                    of.iter().find(|word| *word == text).map(|word| OptionValue::Choice(word))
                }
            };
            let value =
                value.ok_or_else(|| format!("pass `{pass}` cannot take {name}={text}; it has {option}"))?;
            if options.given.iter().any(|(n, _)| n == name) {
                return Err(format!("pass `{pass}` gets option `{name}` twice"));
            }
            options.given.push((option.name, value));
        }
        Ok(options)
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    fn value(&self, name: &str) -> Option<OptionValue> {
        if let Some((_, value)) = self.given.iter().find(|(n, _)| *n == name) {
            return Some(*value);
        }
        Some(match self.declared.iter().find(|o| o.name == name)?.kind {
            OptionKind::Flag { default } => OptionValue::Flag(default),
            OptionKind::Integer { default, .. } => OptionValue::Integer(default),
            OptionKind::Choice { default, .. } => OptionValue::Choice(default),
        })
    }

    /// The value of a flag; false for a name that is no declared flag.
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.value(name), Some(OptionValue::Flag(true)))
    }

    /// The value of a number; 0 for a name that is no declared number.
    pub fn integer(&self, name: &str) -> i64 {
        if let Some(OptionValue::Integer(n)) = self.value(name) { n } else { 0 }
    }

    /// The value of a choice; empty for a name that is no declared choice.
    pub fn choice(&self, name: &str) -> &'static str {
        if let Some(OptionValue::Choice(word)) = self.value(name) { word } else { "" }
    }
}

impl fmt::Display for PassOptions {
    /// What was written: `{search=true}`, or nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, value)) in self.given.iter().enumerate() {
            write!(f, "{}{name}=", if at == 0 { "{" } else { "," })?;
            match value {
                OptionValue::Flag(flag) => write!(f, "{flag}")?,
                OptionValue::Integer(n) => write!(f, "{n}")?,
                OptionValue::Choice(word) => f.write_str(word)?,
            }
        }
        f.write_str(if self.given.is_empty() { "" } else { "}" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECLARED: &[PassOption] = &[
        PassOption { name: "search", help: "", kind: OptionKind::Flag { default: true } },
        PassOption { name: "rounds", help: "", kind: OptionKind::Integer { default: 3, min: 1, max: 9 } },
        PassOption {
            name: "order",
            help: "",
            kind: OptionKind::Choice { default: "given", of: &["given", "depth"] },
        },
    ];

    #[test]
    fn defaults_stand_behind_what_is_written() {
        let options = PassOptions::read("p", DECLARED, &[("order", "depth"), ("rounds", "5")]).unwrap();
        assert_eq!(
            (options.flag("search"), options.integer("rounds"), options.choice("order")),
            (true, 5, "depth")
        );
        assert_eq!(options.to_string(), "{order=depth,rounds=5}");
        let none = PassOptions::read("p", DECLARED, &[]).unwrap();
        assert_eq!((none.flag("search"), none.integer("rounds"), none.choice("order")), (true, 3, "given"));
        assert_eq!(none.to_string(), "");
        assert!(!none.flag("order"));
    }

    #[test]
    fn slips_are_named() {
        let message = |pair| PassOptions::read("p", DECLARED, &[pair]).unwrap_err();
        assert!(message(("serach", "true")).contains("did you mean `search`?"));
        assert!(message(("rounds", "10")).contains("rounds=1..9 (default 3)"));
        assert!(message(("order", "width")).contains("order=given|depth (default given)"));
        assert!(message(("search", "yes")).contains("search=true|false"));
        assert!(PassOptions::read("p", DECLARED, &[("rounds", "1"), ("rounds", "2")]).is_err());
    }
}
