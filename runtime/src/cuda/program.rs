//! The launch table and kernels of an engine for one device.

use std::sync::Arc;

use millrace_ir::launch::{Bundle, LaunchStep, LaunchTable};
use millrace_ir::{Module, Result};

use super::arch::choose;
use super::driver::{Context, Function, Image};
use super::launch::{Ready, ReadyLaunch};
use super::products::Supply;
use super::range::Range;
use super::resolve::{Action, Limits, Params, Resolution, check_table};
use crate::engine::Engine;
use crate::places::forged;

/// The helper that finds the largest element of rows.
const ARGMAX: &str = "argmax_split";

/// See the module.
pub(super) struct Program {
    pub table: LaunchTable,
    pub limits: Limits,
    /// Multiprocessors of the device.
    pub multiprocessors: u32,
    functions: Vec<Arc<Function>>,
    entries: Vec<String>,
}

/// Chooses the section of `engine` for a device and decodes it: the first that is for its compute capability and whose
/// launches have enough shared memory, or the first if there is no such; its kernels then say what they lack.
pub(super) fn bundle(engine: &Engine, device: Limits) -> Result<Bundle> {
    let sections: Vec<(&str, &[u8])> = engine.file().kernels().collect();
    let names: Vec<&str> = sections.iter().map(|(name, _)| *name).collect();
    let mut first = None;
    for index in choose(&names, device.capability)? {
        let (name, bytes) = sections[index];
        let bundle = Bundle::decode(bytes)?;
        if bundle.table.arch != name {
            let message = format!("section {name} holds a launch table for {}", bundle.table.arch);
            return Err(forged(message));
        }
        check_bundle(engine.module(), &bundle)?;
        if most_shared(&bundle.table) <= device.max_shared {
            return Ok(bundle);
        }
        first = first.or(Some(bundle));
    }
    first.ok_or_else(|| forged("the engine has no device code"))
}

/// Most bytes of dynamic shared memory of a launch.
fn most_shared(table: &LaunchTable) -> u32 {
    let launches = table.steps.iter().flat_map(LaunchStep::all_launches);
    launches.map(|l| l.shared).max().unwrap_or(0)
}

/// What can be checked without a device and without bindings.
fn check_bundle(module: &Module, bundle: &Bundle) -> Result<()> {
    check_table(module, &bundle.table)?;
    for helper in &bundle.table.helpers {
        if !(1..=1024).contains(&helper.threads) {
            return Err(forged(format!("helper {} has {} threads", helper.name, helper.threads)));
        }
    }
    Ok(())
}

impl Program {
    /// Loads the device code.
    pub fn load(context: &Arc<Context>, bundle: Bundle) -> Result<Program> {
        let Bundle { table, images } = bundle;
        let loaded = images.iter().map(|bytes| Image::load(context, bytes)).collect::<Result<Vec<_>>>()?;
        // Dynamic shared memory has to be allowed for a kernel before its first launch.
        let mut shared = vec![0; table.kernels.len()];
        for launch in table.steps.iter().flat_map(LaunchStep::all_launches) {
            if let Some(most) = shared.get_mut(launch.kernel) {
                *most = launch.shared.max(*most);
            }
        }
        let functions = table
            .kernels
            .iter()
            .zip(shared)
            .map(|(kernel, shared)| {
                let image = loaded.get(kernel.image).ok_or_else(|| forged("a kernel names no image"))?;
                Function::find(image, &kernel.entry, shared).map(Arc::new).map_err(|e| e.at(&kernel.family))
            })
            .collect::<Result<Vec<_>>>()?;
        let entries = table.kernels.iter().map(|k| k.entry.clone()).collect();
        let limits = Limits::of(&context.info);
        let multiprocessors = context.info.multiprocessors;
        Ok(Program { table, limits, multiprocessors, functions, entries })
    }

    /// Prepares what was resolved; `library` is who took its products, with scratch memory.
    pub fn ready(&self, actions: &[Action], library: Option<(&Supply, Range)>) -> Result<Vec<Ready>> {
        actions.iter().map(|action| Ready::new(action, &self.functions, &self.entries, library)).collect()
    }

    /// Whether the table has the argmax of rows.
    pub fn has_argmax(&self) -> bool {
        self.table.helpers.iter().any(|h| h.name == ARGMAX)
    }

    /// The launch that finds the argmax of rows of `width` elements with blocks of (parts, rows), if the table has it.
    /// `memory` is that of the rows, the indices, scratch and counters.
    pub fn argmax(
        &self,
        memory: &[Range; 4],
        [parts, rows]: [u32; 2],
        width: u64,
    ) -> Result<Option<ReadyLaunch>> {
        let Some(helper) = self.table.helpers.iter().find(|h| h.name == ARGMAX) else { return Ok(None) };
        let (Some(function), Ok(width)) = (self.functions.get(helper.kernel), i32::try_from(width)) else {
            return Ok(None);
        };
        let [from, out, best, arrived] = memory;
        let mut params = Params::default();
        params.push(&from.base.to_ne_bytes());
        params.push(&out.base.to_ne_bytes());
        params.push(&width.to_ne_bytes());
        params.push(&best.base.to_ne_bytes());
        params.push(&arrived.base.to_ne_bytes());
        let launch = Resolution {
            kernel: helper.kernel,
            grid: [parts, rows, 1],
            block: [helper.threads, 1, 1],
            cluster: 1,
            shared: 0,
            dependent: self.limits.capability >= 90,
            params,
        };
        let entry = self.entries.get(helper.kernel).map_or("", String::as_str);
        ReadyLaunch::new(&launch, function, entry).map(Some)
    }
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
