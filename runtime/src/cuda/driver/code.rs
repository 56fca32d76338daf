//! Images and their entry points.

use std::ffi::{CString, c_int};
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;
use millrace_ir::{Error, Kind, Result};

use super::context::Context;

/// A loaded image.
#[derive(Debug)]
pub(in crate::cuda) struct Image {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Image {}
// SAFETY: as for `Context`.
unsafe impl Sync for Image {}

impl Image {
    /// Loads a cubin or PTX text.
    pub fn load(context: &Arc<Context>, bytes: &[u8]) -> Result<Arc<Image>> {
        context.enter()?;
        // PTX is read to its zero; a cubin knows its length, and padding keeps a cut one from being read past its end.
        let mut padded = bytes.to_vec();
        padded.extend([0; 64]);
        let mut raw = null_mut();
        // SAFETY: the image ends in zeros and outlives the call. Device code is trusted to be what the driver
        // validates it to be; it runs on the device, not in this process.
        let done =
            unsafe { sys::cuModuleLoadDataEx(&mut raw, padded.as_ptr().cast(), 0, null_mut(), null_mut()) };
        context.check(done, "load device code")?;
        Ok(Arc::new(Image { raw, context: context.clone() }))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: the module is live and this is its owner; functions of it hold it.
        unsafe {
            sys::cuCtxSetCurrent(self.context.raw);
            sys::cuModuleUnload(self.raw);
        }
    }
}

/// An entry point of an image.
#[derive(Debug)]
pub(in crate::cuda) struct Function {
    pub(in crate::cuda) raw: sys::CUfunction,
    image: Arc<Image>,
    /// Size of each parameter, if the driver tells. Their offsets count from the driver's own start of parameters.
    pub parameters: Option<Vec<usize>>,
    /// Most threads of a block.
    pub max_threads: u32,
    /// Bytes of shared memory fixed at build.
    pub shared: u32,
}

// SAFETY: as for `Context`.
unsafe impl Send for Function {}
// SAFETY: as for `Context`.
unsafe impl Sync for Function {}

/// Shared memory a block may ask for without asking the driver first.
const PLAIN_SHARED: u32 = 48 << 10;

impl Function {
    /// The entry point `name`, allowed to ask for `dynamic_shared` bytes of shared memory.
    pub fn find(image: &Arc<Image>, name: &str, dynamic_shared: u32) -> Result<Function> {
        use sys::CUfunction_attribute as F;
        let context = &image.context;
        let missing = || {
            Error::new(Kind::BadInput, "cuda/entry", format!("device code has no entry `{name}`"))
                .hint("build the engine again")
        };
        let entry = CString::new(name).map_err(|_| missing())?;
        let mut raw = null_mut();
        context.enter()?;
        // SAFETY: the module is live, the name ends in zero.
        match unsafe { sys::cuModuleGetFunction(&mut raw, image.raw, entry.as_ptr()) } {
            sys::CUresult::CUDA_ERROR_NOT_FOUND => return Err(missing()),
            other => context.check(other, "find an entry")?,
        }
        let attribute = |attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: the function is live; the result is written to a live number.
            let got = unsafe { sys::cuFuncGetAttribute(&mut value, attribute, raw) };
            context.check(got, "describe a kernel").map(|()| u32::try_from(value).unwrap_or(0))
        };
        let shared = attribute(F::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let max_threads = attribute(F::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        let room = context.info.max_shared.saturating_sub(shared);
        if dynamic_shared > room {
            let message = format!(
                "kernel `{name}` asks for {dynamic_shared} bytes of shared memory, this GPU has {room} for it"
            );
            return Err(Error::new(Kind::Incompatible, "cuda/shared-memory", message)
                .hint("build the engine for this GPU, or with `ptx` among the architectures of --target"));
        }
        if dynamic_shared > PLAIN_SHARED.saturating_sub(shared) {
            let most = F::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is live.
            let set = unsafe { sys::cuFuncSetAttribute(raw, most, dynamic_shared as c_int) };
            context.check(set, "allow shared memory")?;
        }
        let parameters = (context.driver >= 12040).then(|| {
            let mut all = Vec::new();
            // A kernel takes at most 32764 bytes of parameters.
            for index in 0..8192 {
                let (mut offset, mut size) = (0usize, 0usize);
                // SAFETY: the function is live and this driver has the call; an index past the end is an error.
                let got = unsafe { sys::cuFuncGetParamInfo(raw, index, &mut offset, &mut size) };
                if got != sys::CUresult::CUDA_SUCCESS {
                    break;
                }
                all.push(size);
            }
            all
        });
        Ok(Function { raw, image: image.clone(), parameters, max_threads, shared })
    }

    /// The context it belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.image.context
    }
}
