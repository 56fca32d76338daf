//! Steps of a session, and what they leave behind.

use std::time::Duration;

use millrace_ir::bind::bind;
use millrace_ir::checkpoint::TensorSource;
use millrace_ir::{DType, Error, Kind, NodeId, Result, TensorType};

use super::{Backend, Session, TensorRef, on_backend};
use crate::cuda::After;
use crate::ledger::Class;
use crate::lent::Lent;
use crate::profile::sequences;
use crate::sizes::{StepSizes, no_size};
use crate::weights::Supply;

impl<'e> Session<'e> {
    /// Clears every state to zero. On a device that has failed it does nothing: the next step tells.
    pub fn reset_states(&mut self) {
        on_backend!(&mut self.backend, b => b.reset_states());
    }

    /// Runs one step. `inputs` are in the order of the graph's inputs; outputs are read by [`Session::output`]. On a
    /// device the step may still be running when this returns; reading an output waits for it.
    ///
    /// # Errors
    /// `run/bad-inputs`, `run/bad-dtype`, `run/bad-shape`, `run/out-of-range` for inputs that do not fit, `run/cap` and
    /// `run/out-of-memory` for dynamic sessions, `run/bad-index` for index values that point nowhere,
    /// `cuda/poisoned` on a device that has failed.
    pub fn run(&mut self, inputs: &[TensorRef<'_>]) -> Result<()> {
        self.run_lent(inputs, None)
    }

    /// [`Session::run`] with activations in memory that the caller lends for this step; for [`Allocation::UserManaged`](crate::Allocation::UserManaged).
    ///
    /// ```no_run
    /// # use millrace_runtime::{Arena, Engine, Session, TensorRef};
    /// # fn turns(large: &mut Session<'_>, small: &mut Session<'_>, inputs: &[TensorRef<'_>]) -> millrace_ir::Result<()> {
    /// let bytes = large.most_lent_bytes()?.max(small.most_lent_bytes()?);
    /// let mut arena = Arena::on(large.device(), bytes)?;
    /// large.run_in(&mut arena.lend(), inputs)?;
    /// small.run_in(&mut arena.lend(), inputs)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Session::run`], `run/lent-too-small` with the bytes that are needed, `run/lent-elsewhere` for memory of another
    /// device, `run/not-user-managed` under other allocations.
    pub fn run_in(&mut self, lent: &mut Lent<'_>, inputs: &[TensorRef<'_>]) -> Result<()> {
        self.run_lent(inputs, Some(lent))
    }

    /// [`Session::run`] and then [`Session::argmax`] of an output, on a device without a pause between them.
    ///
    /// # Errors
    /// As those two.
    pub fn run_argmax(&mut self, inputs: &[TensorRef<'_>], output: usize) -> Result<Vec<i32>> {
        self.run_argmax_with(inputs, output, None)
    }

    /// Begins a step and the argmax of output `output`, and returns before they have ended; [`Session::take_argmax`]
    /// waits for them. At most two steps are on their way at once. With `fed` that input of the step is the argmax of
    /// the step begun before it, which nobody has taken yet, and what `inputs` holds there is not read: so a device goes
    /// from step to step without waiting for the host. [`Session::run`] and [`Session::run_argmax`] forget steps that
    /// were not taken.
    ///
    /// Returns false, and has done nothing, where steps cannot be begun ahead: on the CPU, where memory for steps
    /// moves or is lent, and where the engine has no kernel for the argmax.
    ///
    /// # Errors
    /// As [`Session::run`] and [`Session::argmax`]; `run/bad-order` if two steps are on their way, if no step is that
    /// could feed, or if the input has not an i32 a row.
    pub fn start_argmax(
        &mut self,
        inputs: &[TensorRef<'_>],
        output: usize,
        fed: Option<usize>,
    ) -> Result<bool> {
        if !self.runs_ahead() {
            return Ok(false);
        }
        if fed.is_none() {
            self.drop_ahead();
        }
        self.run_with(inputs, Some(output), fed, None).map(|()| true)
    }

    /// The argmax of the first step begun by [`Session::start_argmax`] and not taken, as [`Session::argmax`] tells it;
    /// -2 if the largest element of a row is not finite.
    ///
    /// # Errors
    /// `run/bad-order` if there is none, `cuda/poisoned` on a device that has failed.
    pub fn take_argmax(&mut self) -> Result<Vec<i32>> {
        let told = match &mut self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => cuda.take()?,
        };
        told.ok_or_else(|| Error::new(Kind::Usage, "run/bad-order", "no step is on its way"))
    }

    /// Whether [`Session::start_argmax`] begins steps.
    pub fn runs_ahead(&self) -> bool {
        match &self.backend {
            Backend::Cpu(_) => false,
            Backend::Cuda(cuda) => self.ahead && self.stays() && cuda.runs_ahead(),
        }
    }

    pub(super) fn drop_ahead(&mut self) {
        if let Backend::Cuda(cuda) = &mut self.backend {
            cuda.drop_ahead();
        }
    }

    /// Runs a step; a device may begin the argmax of output `argmax` as well.
    pub(super) fn run_with(
        &mut self,
        inputs: &[TensorRef<'_>],
        argmax: Option<usize>,
        fed: Option<usize>,
        lent: Option<&mut Lent<'_>>,
    ) -> Result<()> {
        let module = self.module();
        let declared = module.input_types();
        if declared.len() != inputs.len() {
            let names: Vec<&str> = declared.iter().map(|(n, _)| *n).collect();
            let message = format!("takes {} inputs, got {}", declared.len(), inputs.len());
            return Err(Error::new(Kind::Usage, "run/bad-inputs", message)
                .hint(format!("inputs are {}", names.join(", "))));
        }
        for ((name, ty), input) in declared.iter().zip(inputs) {
            if ty.dtype != input.dtype {
                let message = format!("holds {}, declared {ty}", input.dtype);
                return Err(Error::new(Kind::BadInput, "run/bad-dtype", message).at(format!("\"{name}\"")));
            }
            let bytes = millrace_ir::types::const_bytes(input.dtype, input.shape);
            if bytes != Some(input.bytes.len() as u64) {
                let message =
                    format!("shape {:?} needs {bytes:?} bytes, got {}", input.shape, input.bytes.len());
                return Err(Error::new(Kind::BadInput, "run/bad-shape", message).at(format!("\"{name}\"")));
            }
        }
        let mut tensors: Vec<(&str, &TensorType, &[u64])> =
            declared.iter().zip(inputs).map(|((n, t), i)| (*n, *t, i.shape)).collect();
        for (id, shape) in &self.state_shapes {
            let state = &module.states[*id];
            tensors.push((&state.name, &state.ty, shape));
        }
        let bindings = bind(&module.dims, &tensors)?;
        self.check_lent(lent.as_ref().map(|l| l.len()), &bindings)?;
        self.hold_for(&bindings)?;
        if let Some(profile) = &mut self.profile {
            let names: Vec<&str> = declared.iter().map(|(n, _)| *n).collect();
            profile.begin(bindings.clone(), sequences(&names, inputs), module.graph.order.len());
        }
        let sizes = StepSizes::at(module, &bindings)?;
        if lent.is_some() {
            self.ledger.set(Class::Activations, sizes.activations());
        }
        self.output_shapes = module
            .output_types()
            .into_iter()
            .map(|(name, ty)| ty.shape_at(&bindings).ok_or_else(|| no_size(name)))
            .collect::<Result<_>>()?;
        let rows = argmax.map(|output| self.rows(output).map(|(rows, width)| (output, rows, width)));
        let profile = self.profile.as_mut();
        let result = match &mut self.backend {
            Backend::Cpu(cpu) => {
                let source = self.source.as_ref().map(|c| c as &dyn TensorSource);
                let supply = Supply::new(self.engine, source);
                let lent = lent.map(Lent::host).transpose();
                lent.and_then(|lent| cpu.run(supply, module, inputs, &sizes, &bindings, lent, profile))
            }
            Backend::Cuda(cuda) => {
                let lent = lent.map(|l| l.device(cuda.index())).transpose();
                let source = self.source.as_ref().map(|c| c as &dyn TensorSource);
                rows.transpose().and_then(|argmax| {
                    let after = After { argmax, fed };
                    cuda.start((self.engine, source), inputs, &sizes, &bindings, after, lent?, profile)
                })
            }
        };
        if let Some(profile) = &mut self.profile {
            profile.end();
        }
        self.after_step();
        self.note_device_memory();
        if let Backend::Cuda(cuda) = &mut self.backend
            && cuda.has_recorded()
        {
            self.note_driver();
        }
        result
    }

    /// Rows and width of output `index`, which must be f32.
    pub(super) fn rows(&self, index: usize) -> Result<(u64, u64)> {
        let shape = self.output_shapes.get(index);
        let ty = self.module().output_types().into_iter().nth(index).map(|(_, ty)| ty.dtype);
        let width = shape.and_then(|s| s.last()).copied().filter(|w| *w > 0 && *w <= i32::MAX as u64);
        match (shape, ty, width) {
            (Some(shape), Some(DType::F32), Some(width)) => {
                Ok((shape[..shape.len() - 1].iter().product(), width))
            }
            _ => Err(Error::new(
                Kind::Usage,
                "run/bad-output",
                format!("output {index} of the last step has no rows of f32"),
            )),
        }
    }

    /// For each row of output `index` of the last step, an f32 tensor whose last axis is a row: the index of the
    /// largest element, the lowest among equals; -1 if the row holds a NaN or its largest element is not finite.
    ///
    /// # Errors
    /// `run/bad-output` if there is no such output, `cuda/poisoned` on a device that has failed.
    pub fn argmax(&mut self, index: usize) -> Result<Vec<i32>> {
        let (rows, width) = self.rows(index)?;
        if let Backend::Cuda(cuda) = &mut self.backend
            && let Some(indices) = cuda.argmax(index, rows, width)?
        {
            return Ok(indices);
        }
        let output = self.read_output(index)?;
        let values: Vec<f32> =
            output.bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        Ok(values.chunks_exact(width as usize).map(argmax_row).collect())
    }

    /// The time of the launches of each group of nodes in the last step, by themselves: one after the other, overlapping as they do
    /// in a step, as a CUDA graph that is replayed. That is what a kernel takes without the events around it that a
    /// [`Profile`](crate::Profile) needs. `None` for groups without launches or of which weights stream, in sessions that
    /// do not keep their memory, and on a processor.
    ///
    /// Launches compute with whatever is in memory, so that states and outputs hold nothing of meaning afterwards: begin
    /// new sequences.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn time_nodes(&mut self, groups: &[Vec<NodeId>]) -> Result<Vec<Option<Duration>>> {
        let module = self.engine.module();
        let times = match &mut self.backend {
            Backend::Cpu(_) => return Ok(vec![None; groups.len()]),
            Backend::Cuda(cuda) => cuda.time_nodes(module, groups)?,
        };
        self.note_driver();
        Ok(times.into_iter().map(|time| time.and_then(|t| Duration::try_from_secs_f64(t).ok())).collect())
    }

    /// Output `index` of the last step; `None` if there is none or its device has failed.
    pub fn output(&self, index: usize) -> Option<TensorRef<'_>> {
        self.read_output(index).ok()
    }

    /// [`Session::output`] with the reason for an absence. A device's output is fetched when it is first asked for.
    ///
    /// # Errors
    /// `run/bad-output` if there is no such output, `cuda/poisoned` on a device that has failed.
    pub fn read_output(&self, index: usize) -> Result<TensorRef<'_>> {
        let missing =
            || Error::new(Kind::Usage, "run/bad-output", format!("the last step has no output {index}"));
        let shape = self.output_shapes.get(index).ok_or_else(missing)?;
        let (_, ty) = self.module().output_types().into_iter().nth(index).ok_or_else(missing)?;
        let len = millrace_ir::types::const_bytes(ty.dtype, shape).ok_or_else(missing)?;
        let bytes = match &self.backend {
            Backend::Cpu(cpu) => cpu.output(index),
            Backend::Cuda(cuda) => cuda.output(index, len)?,
        };
        let bytes = usize::try_from(len).ok().and_then(|len| bytes?.get(..len)).ok_or_else(missing)?;
        Ok(TensorRef { dtype: ty.dtype, shape, bytes })
    }
}

/// See [`Session::argmax`].
fn argmax_row(row: &[f32]) -> i32 {
    let mut best = 0;
    for (at, value) in row.iter().enumerate() {
        if value.is_nan() {
            return -1;
        }
        if *value > row[best] {
            best = at;
        }
    }
    // The width was compared with the range of i32.
    if row.get(best).is_some_and(|v| v.is_finite()) { best as i32 } else { -1 }
}
