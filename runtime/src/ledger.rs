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
    /// Scratch memory of a library of matrix products.
    Library,
    /// Pinned host memory that data passes through on its way to and from a device.
    Staging,
    /// What allocations of device memory take beyond what was asked for: the rest of their granules, and what the pool of
    /// dynamic steps keeps.
    Slack,
    /// What the driver took for itself: the device's context and the code of kernels.
    Context,
}

const CLASSES: usize = 11;

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
        Class::Library,
        Class::Staging,
        Class::Slack,
        Class::Context,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Weights => "weights resident",
            Class::Ring => "weight ring",
            Class::HostWeights => "host weights",
            Class::Activations => "activations",
            Class::Io => "I/O",
            Class::Kv => "KV device",
            Class::Workspace => "workspace",
            Class::Library => "library workspace",
            Class::Staging => "staging",
            Class::Slack => "allocator slack",
            Class::Context => "driver context",
        }
    }

    /// Whether only some sessions hold such memory.
    pub fn is_optional(self) -> bool {
        let always = matches!(self, Class::Weights | Class::Activations | Class::Io | Class::Kv);
        !always
    }

    /// Whether a device session holds such memory on the host.
    pub fn is_on_host(self) -> bool {
        matches!(self, Class::HostWeights | Class::Staging)
    }

    /// Whether the session asked for such memory itself, and could give it back.
    pub fn is_own(self) -> bool {
        !matches!(self, Class::Slack | Class::Context)
    }
}

/// The ledger against what the system reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reconciliation {
    /// Bytes that the ledger counts: of a device session those on the device.
    pub counted: u64,
    /// Bytes that the device has less of than before the session; of a CPU session, by how much the resident set of the process
    /// has grown.
    pub reported: u64,
}

impl Reconciliation {
    /// What is counted beyond what is reported; negative if something is held that no class counts.
    pub fn difference(&self) -> i64 {
        (i128::from(self.counted) - i128::from(self.reported)).clamp(i64::MIN.into(), i64::MAX.into()) as i64
    }

    /// The difference as a part of what is reported; 0 if both are.
    pub fn relative(&self) -> f64 {
        self.difference() as f64 / (self.reported.max(1)) as f64
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

    /// Bytes held now on the device of a device session.
    pub fn on_device(&self) -> u64 {
        Class::ALL.iter().filter(|c| !c.is_on_host()).map(|c| self.now(*c)).sum()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_disjoint_and_add_up() {
        let mut ledger = Ledger::default();
        for (at, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, at);
            ledger.set(class, 1 << at);
        }
        assert_eq!(ledger.total(), (1 << CLASSES) - 1);
        let host = (1 << Class::HostWeights as usize) + (1 << Class::Staging as usize);
        assert_eq!(ledger.on_device(), ledger.total() - host);
        ledger.set(Class::Kv, 3);
        assert_eq!((ledger.now(Class::Kv), ledger.peak(Class::Kv)), (3, 1 << Class::Kv as usize));
        let mut names: Vec<&str> = Class::ALL.iter().map(|c| c.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CLASSES);
        let plain = Ledger::default().to_string();
        assert_eq!(
            plain,
            "weights resident 0 (peak 0), activations 0 (peak 0), I/O 0 (peak 0), KV device 0 (peak 0), total 0"
        );
    }

    #[test]
    fn reconciling_is_signed() {
        let at = |counted, reported| Reconciliation { counted, reported };
        assert_eq!((at(103, 100).difference(), at(97, 100).difference()), (3, -3));
        assert_eq!(at(103, 100).relative(), 0.03);
        assert_eq!(at(0, 0).relative(), 0.0);
        assert_eq!(at(u64::MAX, 0).difference(), i64::MAX);
    }
}
