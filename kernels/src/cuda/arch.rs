//! GPU architectures that kernels are generated for.

/// An architecture as compilers spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// A100.
    Sm80,
    /// Ada: L4, L40S, RTX 40.
    Sm89,
    /// Hopper, with its own instructions: H100, H200.
    Sm90a,
    /// Blackwell data centre: B200.
    Sm100,
    /// Blackwell desktop: RTX 50.
    Sm120,
    /// No part, but PTX text that the driver of any part from A100 on compiles for it.
    Compute80,
}

impl Arch {
    /// All architectures of parts.
    pub const ALL: [Arch; 5] = [Arch::Sm80, Arch::Sm89, Arch::Sm90a, Arch::Sm100, Arch::Sm120];

    /// Its spelling: `sm_90a`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm89 => "sm_89",
            Arch::Sm90a => "sm_90a",
            Arch::Sm100 => "sm_100",
            Arch::Sm120 => "sm_120",
            Arch::Compute80 => "compute_80",
        }
    }

    /// The architecture spelled `name`.
    pub fn parse(name: &str) -> Option<Arch> {
        Arch::ALL.into_iter().chain([Arch::Compute80]).find(|a| a.name() == name)
    }

    /// Whether its code is PTX text and not made for one part.
    pub fn is_virtual(self) -> bool {
        self == Arch::Compute80
    }

    /// Compute capability, ten times the major number plus the minor one; that of the oldest part for PTX.
    pub fn capability(self) -> u32 {
        match self {
            Arch::Sm80 | Arch::Compute80 => 80,
            Arch::Sm89 => 89,
            Arch::Sm90a => 90,
            Arch::Sm100 => 100,
            Arch::Sm120 => 120,
        }
    }

    /// Whether it has the tensor memory unit, clusters and launches that overlap their predecessor.
    pub fn has_tma(self) -> bool {
        self.capability() >= 90
    }

    /// Whether it has Hopper's matrix instructions on groups of four warps.
    pub fn has_wgmma(self) -> bool {
        self == Arch::Sm90a
    }

    /// Most bytes of shared memory a block may ask for (CUDA C++ programming guide, table of technical specifications);
    /// for PTX the least of all parts.
    pub fn max_shared(self) -> u32 {
        match self {
            Arch::Sm80 => 163 << 10,
            Arch::Sm89 | Arch::Sm120 | Arch::Compute80 => 99 << 10,
            Arch::Sm90a | Arch::Sm100 => 227 << 10,
        }
    }

    /// Multiprocessors of the largest part in wide use, for choices that fill the device: A100 108, L40S 142, H200 132,
    /// B200 148, RTX 5090 170. PTX is for parts that are not known; it takes the number of B200.
    pub fn multiprocessors(self) -> u32 {
        match self {
            Arch::Sm80 => 108,
            Arch::Sm89 => 142,
            Arch::Sm90a => 132,
            Arch::Sm100 | Arch::Compute80 => 148,
            Arch::Sm120 => 170,
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
