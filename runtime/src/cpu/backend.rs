//! Memory of a session on the CPU.

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::{Bindings, Id, Module, Result};
use millrace_kernels::cpu::Pool;

use super::residence::Residence;
use super::{Program, Regions, Streaming};
use crate::budget::Residency;
use crate::engine::Engine;
use crate::memory::{ALIGN, Buffer, Region};
use crate::profile::Profile;
use crate::session::TensorRef;
use crate::sizes::{StepSizes, bytes_at, no_size};
use crate::weights::Supply;

/// Buffers in host memory and the threads that compute in them.
pub(crate) struct Cpu {
    pool: Pool,
    program: Program,
    weights: Residence,
    states: Vec<Option<Buffer>>,
    arenas: Vec<Buffer>,
    inputs: Vec<Buffer>,
    outputs: Vec<Buffer>,
}

/// Arenas side by side in `lent`, each on the alignment of buffers.
fn arenas_in(lent: &mut [u8], sizes: &[u64]) -> Result<Vec<Region>> {
    let (whole, mut at) = (Region::of(lent), 0u64);
    let mut arenas = Vec::with_capacity(sizes.len());
    for size in sizes {
        arenas.push(whole.part(at, *size).ok_or_else(|| no_size("an arena in lent memory"))?);
        at = at.saturating_add(*size).next_multiple_of(ALIGN as u64);
    }
    Ok(arenas)
}

impl Cpu {
    /// Checks that the kernels of `module` are there; allocates nothing.
    pub fn new(module: &Module, threads: usize) -> Result<Cpu> {
        Ok(Cpu {
            program: Program::new(module)?,
            pool: Pool::new(threads),
            weights: Residence::new(),
            states: Vec::new(),
            arenas: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        })
    }

    /// Loads weights and allocates states.
    pub fn load(
        &mut self,
        engine: &Engine,
        source: Option<&dyn TensorSource>,
        maxima: &Bindings,
        residency: &Residency,
    ) -> Result<()> {
        let module = engine.module();
        self.place(engine, source, residency)?;
        self.states.resize_with(module.states.bound(), || None);
        for (id, state) in module.states.iter() {
            let bytes = bytes_at(&state.ty, maxima, &state.name)?;
            self.states[id.index()] = Some(Buffer::zeroed(bytes, "the cache")?);
        }
        Ok(())
    }

    /// Brings the weights to where `residency` has them.
    pub fn place(
        &mut self,
        engine: &Engine,
        source: Option<&dyn TensorSource>,
        residency: &Residency,
    ) -> Result<()> {
        self.weights.place(engine, source, residency)
    }

    /// Allocates what a step needs; an earlier allocation must have been released.
    pub fn allocate(&mut self, sizes: &StepSizes) -> Result<()> {
        let buffers = |sizes: &[u64], what: &str| {
            sizes.iter().map(|n| Buffer::zeroed(*n, what)).collect::<Result<Vec<Buffer>>>()
        };
        self.arenas = buffers(&sizes.arenas, "activations")?;
        self.inputs = buffers(&sizes.inputs, "inputs")?;
        self.outputs = buffers(&sizes.outputs, "outputs")?;
        Ok(())
    }

    /// Gives back what [`Cpu::allocate`] took.
    pub fn release(&mut self) {
        self.release_arenas();
        self.inputs.clear();
        self.outputs.clear();
    }

    /// Gives back activation memory.
    pub fn release_arenas(&mut self) {
        self.arenas.clear();
    }

    /// Clears every state to zero.
    pub fn reset_states(&mut self) {
        self.states.iter_mut().flatten().for_each(Buffer::clear);
    }

    /// Threads that kernels use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes of resident weights and of the ring, if less than all is resident.
    pub fn weight_bytes(&self) -> Option<(u64, u64)> {
        self.weights.bytes()
    }

    /// Runs one step whose sizes are `sizes`, with its arenas in `lent` if something was.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        supply: Supply<'_>,
        module: &Module,
        inputs: &[TensorRef<'_>],
        sizes: &StepSizes,
        bindings: &Bindings,
        lent: Option<&mut [u8]>,
        profile: Option<&mut Profile>,
    ) -> Result<()> {
        for (buffer, input) in self.inputs.iter_mut().zip(inputs) {
            buffer.bytes_mut()[..input.bytes.len()].copy_from_slice(input.bytes);
        }
        let parts = |buffers: &mut [Buffer], sizes: &[u64]| {
            let part =
                |(b, n): (&mut Buffer, &u64)| b.region().part(0, *n).ok_or_else(|| no_size("a buffer"));
            buffers.iter_mut().zip(sizes).map(part).collect::<Result<Vec<Region>>>()
        };
        let mut regions = Regions {
            inputs: parts(&mut self.inputs, &sizes.inputs)?,
            outputs: parts(&mut self.outputs, &sizes.outputs)?,
            arenas: match lent {
                Some(lent) => arenas_in(lent, &sizes.arenas)?,
                None => self.arenas.iter_mut().map(Buffer::region).collect(),
            },
            states: self.states.iter_mut().map(|s| s.as_mut().map(Buffer::region)).collect(),
            weights: self.weights.regions(module.weights.bound()),
        };
        let streamed = self.weights.streamed()?.map(|streamed| Streaming { streamed, supply });
        self.program.run(module, &self.pool, &mut regions, bindings, streamed, profile)
    }

    /// The buffer of output `index`.
    pub fn output(&self, index: usize) -> Option<&[u8]> {
        self.outputs.get(index).map(Buffer::bytes)
    }
}
