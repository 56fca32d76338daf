//! The ledger: bytes by class, disjoint, one sum.

use std::fmt;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Weights mapped from the engine file or held in memory.
    Weights,
    /// The activation arena.
    Activations,
    /// Inputs and outputs.
    Io,
    /// States, such as the KV cache.
    Kv,
}

impl Class {
    /// All classes.
    pub const ALL: [Class; 4] = [Class::Weights, Class::Activations, Class::Io, Class::Kv];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Weights => "weights",
            Class::Activations => "activations",
            Class::Io => "io",
            Class::Kv => "kv",
        }
    }
}

/// Bytes held now and at most, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    now: [u64; 4],
    peak: [u64; 4],
}

impl Ledger {
    /// Bytes held now.
    pub fn now(&self, class: Class) -> u64 {
        self.now[class as usize]
    }

    /// Most bytes held at one time.
    pub fn peak(&self, class: Class) -> u64 {
        self.peak[class as usize]
    }

    /// Bytes held now in all classes.
    pub fn total(&self) -> u64 {
        self.now.iter().sum()
    }

    pub(crate) fn set(&mut self, class: Class, bytes: u64) {
        self.now[class as usize] = bytes;
        self.peak[class as usize] = self.peak[class as usize].max(bytes);
    }

    pub(crate) fn add(&mut self, class: Class, bytes: u64) {
        self.set(class, self.now(class) + bytes);
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for class in Class::ALL {
            write!(f, "{} {} (peak {}), ", class.name(), self.now(class), self.peak(class))?;
        }
        write!(f, "total {}", self.total())
    }
}
