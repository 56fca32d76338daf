//! The ledger: bytes by class, disjoint, one sum.

use std::fmt;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Weights: mapped from the engine file, held in memory or on the device.
    Weights,
    /// The ring that weights stream through.
    Ring,
    /// Weights in pinned host memory, from which a device's ring is filled.
    HostWeights,
    /// The activation arena.
    Activations,
    /// Inputs and outputs.
    Io,
    /// States, such as the KV cache.
    Kv,
    /// Scratch memory and counters of device kernels.
    Workspace,
    /// Pinned host memory that data passes through on its way to and from a device.
    Staging,
}

const CLASSES: usize = 8;

impl Class {
    /// All classes.
    pub const ALL: [Class; CLASSES] = [
        Class::Weights,
        Class::Ring,
        Class::HostWeights,
        Class::Activations,
        Class::Io,
        Class::Kv,
        Class::Workspace,
        Class::Staging,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Weights => "weights",
            Class::Ring => "weight ring",
            Class::HostWeights => "host weights",
            Class::Activations => "activations",
            Class::Io => "io",
            Class::Kv => "kv",
            Class::Workspace => "workspace",
            Class::Staging => "staging",
        }
    }

    /// Whether only some sessions hold such memory.
    pub fn is_optional(self) -> bool {
        matches!(self, Class::Ring | Class::HostWeights | Class::Workspace | Class::Staging)
    }
}

/// Bytes held now and at most, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    now: [u64; CLASSES],
    peak: [u64; CLASSES],
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

    /// Classes that every session has, and those that this session has held memory of.
    pub fn classes(&self) -> impl Iterator<Item = Class> + '_ {
        Class::ALL.into_iter().filter(|c| !c.is_optional() || self.peak(*c) > 0)
    }

    pub(crate) fn set(&mut self, class: Class, bytes: u64) {
        self.now[class as usize] = bytes;
        self.peak[class as usize] = self.peak[class as usize].max(bytes);
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for class in self.classes() {
            write!(f, "{} {} (peak {}), ", class.name(), self.now(class), self.peak(class))?;
        }
        write!(f, "total {}", self.total())
    }
}
