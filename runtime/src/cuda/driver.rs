//! The CUDA driver: presence, devices, contexts, memory, streams, events, images.
//!
//! Every handle is owned by a type that gives it back when dropped and keeps its context alive. Nothing of the driver is
//! touched before [`present`] has found its library, and no function is called that drivers older than
//! [`NEEDED_DRIVER`] lack. Device addresses are numbers here: nothing in this process reads through them.

mod block;
mod code;
mod context;
mod stream;

use std::ffi::{CStr, c_int};
use std::ptr::null;
use std::sync::OnceLock;

use cudarc::driver::sys;
use millrace_ir::{Error, Kind, Result};
use sys::CUdevice_attribute as Attribute;

pub(super) use block::Block;
pub(super) use code::{Function, Image};
pub(super) use context::Context;
pub use stream::RawStream;
pub(super) use stream::{Event, Stream};

/// Oldest driver that will do, as the driver spells it: 12000 is 12.0.
pub(super) const NEEDED_DRIVER: u32 = 12000;

/// Whether the driver's library can be opened.
pub(super) fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens the library, whose initialisers are those of the installed driver, and closes it.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Starts the driver once and returns its version.
pub(super) fn start() -> Result<u32> {
    if !present() {
        return Err(Error::new(Kind::Device, "cuda/no-driver", "this machine has no NVIDIA driver")
            .hint("install the driver, or compile with --target cpu"));
    }
    let mut version: c_int = 0;
    // SAFETY: the library is there; the result is written to a live number.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }, "ask for the version")?;
    let version = u32::try_from(version).unwrap_or(0);
    if version < NEEDED_DRIVER {
        return Err(too_old(version));
    }
    // SAFETY: the library is there.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(no_device()),
        other => check(other, "start").map(|()| version),
    }
}

pub(super) fn no_device() -> Error {
    Error::new(Kind::Device, "cuda/no-device", "this machine has an NVIDIA driver but no GPU that it can use")
        .hint("check CUDA_VISIBLE_DEVICES and nvidia-smi, or compile with --target cpu")
}

pub(super) fn too_old(version: u32) -> Error {
    let show = |v: u32| format!("{}.{}", v / 1000, v % 1000 / 10);
    let message =
        format!("the driver is for CUDA {}, {} or later is needed", show(version), show(NEEDED_DRIVER));
    Error::new(Kind::Incompatible, "cuda/driver-too-old", message).hint("install a newer NVIDIA driver")
}

/// Name and explanation of a result.
fn describe(result: sys::CUresult) -> String {
    let text = |get: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut text = null();
        // SAFETY: the library is there, since it gave the result; the text is static and ends in zero.
        unsafe {
            if get(result, &mut text) != sys::CUresult::CUDA_SUCCESS || text.is_null() {
                return String::new();
            }
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    };
    let (name, why) = (text(sys::cuGetErrorName), text(sys::cuGetErrorString));
    if name.is_empty() { format!("error {}", result as u32) } else { format!("{name} ({why})") }
}

/// Whether a result means that the context is of no use any more.
pub(super) fn is_fatal(code: u32) -> bool {
    // ECC, NVLink and contained faults; then what a kernel can do wrong; then what the driver cannot explain.
    matches!(code, 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 999)
}

/// An error unless `result` is success. `what` completes "the driver failed to ..".
fn check(result: sys::CUresult, what: &str) -> Result<()> {
    use sys::CUresult as R;
    let kind = match result {
        R::CUDA_SUCCESS => return Ok(()),
        R::CUDA_ERROR_OUT_OF_MEMORY => {
            let message = format!("the device has no memory left to {what}");
            return Err(Error::new(Kind::OutOfMemory, "run/out-of-memory", message)
                .hint("free device memory, lower the limits, or use --memory dynamic"));
        }
        R::CUDA_ERROR_INVALID_IMAGE | R::CUDA_ERROR_INVALID_PTX | R::CUDA_ERROR_NOT_FOUND => {
            let message = format!("the engine's device code does not fit: {}", describe(result));
            return Err(Error::new(Kind::BadInput, "cuda/image", message)
                .at(what)
                .hint("build the engine again"));
        }
        R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | R::CUDA_ERROR_JIT_COMPILER_NOT_FOUND => {
            let message = format!("the driver failed to {what}: {}", describe(result));
            return Err(Error::new(Kind::Incompatible, "cuda/driver", message)
                .hint("PTX needs a driver as new as the NVRTC that built the engine: install it, or build for this GPU"));
        }
        R::CUDA_ERROR_NO_BINARY_FOR_GPU => Kind::Incompatible,
        _ => Kind::Device,
    };
    Err(Error::new(kind, "cuda/driver", format!("the driver failed to {what}: {}", describe(result))))
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number of the device.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Compute capability: ten times the major number plus the minor one.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Most bytes of shared memory a block may ask for.
    pub max_shared: u32,
}

impl DeviceInfo {
    /// What `compile --target cuda:..` calls the code for the device: the name of an architecture, or `ptx` for parts that
    /// this version does not know. `None` for parts that are too old.
    pub fn target(&self) -> Option<&'static str> {
        super::arch::target(self.capability)
    }
}

/// Number of devices; the driver must have been started.
pub(super) fn device_count() -> Result<u32> {
    let mut count: c_int = 0;
    // SAFETY: `start` has found the library; the result is written to a live number.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }, "count devices")?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn device(index: u32) -> Result<sys::CUdevice> {
    let count = device_count()?;
    if count == 0 {
        return Err(no_device());
    }
    if index >= count {
        let message = format!("there is no GPU {index}; the driver lists {count}");
        return Err(Error::new(Kind::Usage, "cuda/no-such-device", message));
    }
    let mut device = 0;
    // SAFETY: as above.
    check(unsafe { sys::cuDeviceGet(&mut device, index as c_int) }, "open the device")?;
    Ok(device)
}

/// What device `index` is; the driver must have been started.
pub(super) fn device_info(index: u32) -> Result<DeviceInfo> {
    let device = device(index)?;
    let attribute = |attribute| -> Result<u32> {
        let mut value: c_int = 0;
        // SAFETY: the device exists; the result is written to a live number.
        check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) }, "describe the device")?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let mut name = [0u8; 256];
    // SAFETY: writes at most 256 bytes, ending in zero.
    let named = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) };
    check(named, "name the device")?;
    let mut memory = 0usize;
    // SAFETY: the device exists; the result is written to a live number.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut memory, device) }, "measure the device's memory")?;
    let (major, minor) = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    Ok(DeviceInfo {
        index,
        name: CStr::from_bytes_until_nul(&name).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        capability: major * 10 + minor,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory as u64,
        max_shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}
