//! How a session is set up.

use std::path::PathBuf;

use millrace_ir::plan::stream::Ring;

use crate::budget::WeightBudget;
use crate::cuda::RawStream;

/// When activation memory is allocated. Inputs and outputs go with it, but where a variant says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Allocation {
    /// Once, for the largest need of all profiles.
    #[default]
    Static,
    /// For one profile, when it is selected or a step's shape asks for another one.
    OnProfileChange,
    /// For each step, at its shape.
    Dynamic,
    /// Never: steps run in memory of the caller ([`Session::run_in`](crate::Session::run_in)). Inputs and outputs are the
    /// session's, allocated once for the largest need of all profiles.
    UserManaged,
}

impl Allocation {
    /// All of them.
    pub const ALL: [Allocation; 4] =
        [Allocation::Static, Allocation::OnProfileChange, Allocation::Dynamic, Allocation::UserManaged];

    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Allocation::Static => "static",
            Allocation::OnProfileChange => "on-profile-change",
            Allocation::Dynamic => "dynamic",
            Allocation::UserManaged => "user-managed",
        }
    }
}

/// Which profile of the engine steps run under.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum ProfileChoice {
    /// For each step the profile of least memory that takes its shape.
    #[default]
    Automatic,
    /// The profile of this number.
    Index(usize),
    /// The profile of this name.
    Name(String),
}

impl From<usize> for ProfileChoice {
    fn from(index: usize) -> Self {
        ProfileChoice::Index(index)
    }
}

impl From<&str> for ProfileChoice {
    fn from(name: &str) -> Self {
        ProfileChoice::Name(name.to_string())
    }
}

/// What a session does when memory does not suffice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnOutOfMemory {
    /// It fails, and says what would fit.
    #[default]
    Fail,
    /// It lowers its weight budget to what is left beside the rest; see [`crate::Session::shrinks`]. It fails if the minimum
    /// does not fit either.
    ShrinkWeights,
}

/// Where a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
    /// The CUDA device of this number.
    Cuda(u32),
}

/// How a session is set up.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// When activation memory is allocated.
    pub allocation: Allocation,
    /// Which profile steps run under.
    pub profile: ProfileChoice,
    /// Where to run; what the engine was compiled for by default, on the first such device.
    pub device: Option<Device>,
    /// Threads that compute, or that load weights onto a device; all processors by default.
    pub threads: Option<usize>,
    /// Memory for weights; what does not fit streams.
    pub budget: WeightBudget,
    /// The ring that weights stream through.
    pub ring: Ring,
    /// Queues of a device that take the copies of a step in turn, fewer than the ring has slots: with two, one copy begins
    /// while the one before it ends.
    pub copy_queues: usize,
    /// What to do when memory does not suffice.
    pub on_out_of_memory: OnOutOfMemory,
    /// Bound on pinned host memory for the weights of a device session that stream; what exceeds it comes from the engine
    /// file in every step.
    pub host_cap: Option<u64>,
    /// Bound on all bytes the session holds, but for staging memory.
    pub cap: Option<u64>,
    /// Cache pages; the engine's maximum by default.
    pub kv_pages: Option<u64>,
    /// Model folder that a stripped engine takes its weights from.
    pub weights: Option<PathBuf>,
    /// CUDA stream of the caller that all work is ordered on; a stream of its own by default.
    pub stream: Option<RawStream>,
    /// Whether steps of static sessions that recur are replayed as CUDA graphs.
    pub graphs: bool,
    /// Whether cuBLASLt computes the products that an engine names it for, where it is installed; kernels do otherwise.
    pub library: bool,
    /// Whether [`crate::Session::start_argmax`] begins steps before the one before them has ended.
    pub ahead: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            allocation: Allocation::default(),
            profile: ProfileChoice::default(),
            budget: WeightBudget::default(),
            ring: Ring::DEFAULT,
            copy_queues: 1,
            host_cap: None,
            on_out_of_memory: OnOutOfMemory::default(),
            device: None,
            threads: None,
            cap: None,
            kv_pages: None,
            weights: None,
            stream: None,
            graphs: true,
            library: true,
            ahead: true,
        }
    }
}
