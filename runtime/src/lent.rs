//! Memory that sessions take turns in.
//!
//! An [`Arena`] is memory for activations; [`Arena::lend`] borrows it exclusively as [`Lent`], which a session takes for a step
//! ([`Session::run_in`](crate::Session::run_in)) and a [`Decoder`](crate::Decoder) or [`Encoder`](crate::Encoder) for as
//! long as it lives. So the borrow checker sees to it that sessions take turns:
//!
//! ```compile_fail,E0499
//! # use millrace_runtime::lent::Arena;
//! let mut arena = Arena::host(1 << 20)?;
//! let mut first = arena.lend();
//! let mut second = arena.lend(); // while `first` is in use
//! assert_eq!(first.len(), second.len());
//! # Ok::<(), millrace_ir::Error>(())
//! ```
//!
//! Nothing of a step stays in lent memory: outputs are the session's own. A session keeps no hold of it between steps.

use millrace_ir::{Error, Kind, Result};

use crate::cuda::DeviceArena;
use crate::memory::{ALIGN, Buffer};
use crate::options::Device;

/// Activation memory that outlives sessions.
pub struct Arena(Memory);

enum Memory {
    Host(Buffer),
    Device(Box<DeviceArena>),
}

impl Arena {
    /// `bytes` of host memory, for sessions on the CPU.
    ///
    /// # Errors
    /// `run/out-of-memory`.
    pub fn host(bytes: u64) -> Result<Arena> {
        Ok(Arena(Memory::Host(Buffer::zeroed(bytes, "an arena")?)))
    }

    /// `bytes` of memory for sessions on `device`.
    ///
    /// # Errors
    /// `run/out-of-memory`, `cuda/..` if there is no such device.
    pub fn on(device: Device, bytes: u64) -> Result<Arena> {
        match device {
            Device::Cpu => Arena::host(bytes),
            Device::Cuda(index) => Ok(Arena(Memory::Device(Box::new(DeviceArena::new(index, bytes)?)))),
        }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Memory::Host(buffer) => buffer.bytes().len() as u64,
            Memory::Device(arena) => arena.len(),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The arena for one turn.
    pub fn lend(&mut self) -> Lent<'_> {
        Lent(match &mut self.0 {
            Memory::Host(buffer) => Turn::Host(buffer.bytes_mut()),
            Memory::Device(arena) => Turn::Device(arena),
        })
    }
}

/// Memory that is a session's for a turn: an [`Arena`], or bytes of the caller.
pub struct Lent<'m>(Turn<'m>);

enum Turn<'m> {
    Host(&'m mut [u8]),
    Device(&'m mut DeviceArena),
}

impl<'m> From<&'m mut [u8]> for Lent<'m> {
    /// Host memory of the caller; what lies before its first multiple of 64 bytes is not used.
    fn from(bytes: &'m mut [u8]) -> Lent<'m> {
        let skip = bytes.as_ptr().align_offset(ALIGN).min(bytes.len());
        Lent(Turn::Host(&mut bytes[skip..]))
    }
}

fn elsewhere(found: &str, wanted: &str) -> Error {
    let message = format!("the memory is {found}, the session runs on {wanted}");
    Error::new(Kind::Usage, "run/lent-elsewhere", message).hint("use Arena::on with the session's device")
}

impl Lent<'_> {
    /// Bytes that can be used.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Turn::Host(bytes) => bytes.len() as u64,
            Turn::Device(arena) => arena.len(),
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, for a session on the CPU.
    pub(crate) fn host(&mut self) -> Result<&mut [u8]> {
        match &mut self.0 {
            Turn::Host(bytes) => Ok(bytes),
            Turn::Device(arena) => Err(elsewhere(&format!("on GPU {}", arena.device()), "the processor")),
        }
    }

    /// The device memory, for a session on GPU `index`.
    pub(crate) fn device(&mut self, index: u32) -> Result<&mut DeviceArena> {
        let wanted = format!("GPU {index}");
        match &mut self.0 {
            Turn::Device(arena) => match arena.device() {
                found if found == index => Ok(arena),
                found => Err(elsewhere(&format!("on GPU {found}"), &wanted)),
            },
            Turn::Host(_) => Err(elsewhere("the processor's", &wanted)),
        }
    }
}
