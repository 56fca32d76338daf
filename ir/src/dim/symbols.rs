//! Symbols of dims, what is declared of them, and their values.

use std::fmt;

/// A symbol: a dimension whose value is bound per call, spelled `$name`. At most 15 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sym([u8; 16]);

impl Sym {
    /// A symbol named `name` (without `$`): 1 to 15 ASCII letters, digits or `_`, not starting with a digit.
    pub fn new(name: &str) -> Option<Sym> {
        let bytes = name.as_bytes();
        let valid = (1..=15).contains(&bytes.len())
            && !bytes[0].is_ascii_digit()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_');
        valid.then(|| {
            let mut inline = [0; 16];
            inline[..bytes.len()].copy_from_slice(bytes);
            Sym(inline)
        })
    }

    /// A symbol that the program itself names: `name` is short and valid.
    pub(crate) const fn reserved(name: &'static str) -> Sym {
        let bytes = name.as_bytes();
        let mut inline = [0; 16];
        let mut at = 0;
        while at < bytes.len() {
            inline[at] = bytes[at];
            at += 1;
        }
        Sym(inline)
    }

    /// The first eight bytes of the name as a number.
    pub(super) fn number(&self) -> u64 {
        let [first, ..] = self.0.as_chunks::<8>().0 else { return 0 };
        u64::from_le_bytes(*first)
    }

    /// The name without `$`.
    pub fn name(&self) -> &str {
        let len = self.0.iter().position(|b| *b == 0).unwrap_or(16);
        std::str::from_utf8(&self.0[..len]).unwrap_or("")
    }
}

impl fmt::Display for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "${}", self.name())
    }
}

impl fmt::Debug for Sym {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Declaration of a symbol: its range and what to expect of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SymDecl {
    /// The symbol.
    pub sym: Sym,
    /// Smallest legal value.
    pub min: u64,
    /// Largest legal value; static allocation uses it.
    pub max: u64,
    /// Values are multiples of this.
    pub multiple: u64,
    /// Typical value, for cost estimates.
    pub hint: Option<u64>,
}

/// Values of symbols for one call, in declaration order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bindings(Vec<(Sym, u64)>);

impl Bindings {
    /// No symbol bound.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every symbol at its upper bound.
    pub fn maxima(decls: &[SymDecl]) -> Self {
        Bindings(decls.iter().map(|d| (d.sym, d.max)).collect())
    }

    /// Every symbol at its lower bound.
    pub fn minima(decls: &[SymDecl]) -> Self {
        Bindings(decls.iter().map(|d| (d.sym, d.min)).collect())
    }

    /// Every symbol at its hint, or at its upper bound without one.
    pub fn hints(decls: &[SymDecl]) -> Self {
        Bindings(decls.iter().map(|d| (d.sym, d.hint.unwrap_or(d.max))).collect())
    }

    /// Binds `sym`, replacing an earlier value.
    pub fn set(&mut self, sym: Sym, value: u64) {
        match self.0.iter_mut().find(|(s, _)| *s == sym) {
            Some(slot) => slot.1 = value,
            None => self.0.push((sym, value)),
        }
    }

    /// The value of `sym`.
    pub fn get(&self, sym: Sym) -> Option<u64> {
        self.0.iter().find(|(s, _)| *s == sym).map(|(_, v)| *v)
    }

    /// All pairs in binding order.
    pub fn iter(&self) -> impl Iterator<Item = (Sym, u64)> + '_ {
        self.0.iter().copied()
    }
}
