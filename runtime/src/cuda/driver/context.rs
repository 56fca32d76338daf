//! The context of a device, with what is counted and remembered about it.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use millrace_ir::{Error, Kind, Result};

use super::{DeviceInfo, check, describe, device, device_info, is_fatal, start};
use crate::cuda::granules::Granules;
use crate::cuda::management::free_bytes;
use crate::cuda::report::PoolReport;

/// The primary context of a device, retained, with what is counted and remembered about it.
#[derive(Debug)]
pub(in crate::cuda) struct Context {
    pub(super) raw: sys::CUcontext,
    pub(super) device: sys::CUdevice,
    /// What the device is.
    pub info: DeviceInfo,
    /// Version of the driver.
    pub driver: u32,
    pub(super) poison: OnceLock<String>,
    pub(super) allocations: AtomicU64,
    pinned: AtomicU64,
    pub(super) granules: Granules,
    /// Bytes of blocks from the pool.
    pub(super) pooled: AtomicU64,
    pool: OnceLock<Pool>,
    baseline: Baseline,
}

/// Free memory before the context was made here.
#[derive(Clone, Debug)]
struct Baseline {
    /// Where the device is on its bus; by it the management library knows it.
    bus: Option<CString>,
    free: u64,
}

impl Baseline {
    /// As the management library tells it, or after the context was made if it is not there.
    fn before(device: sys::CUdevice) -> Baseline {
        let mut name = [0u8; 32];
        // SAFETY: writes at most 32 bytes, ending in zero.
        let named = unsafe { sys::cuDeviceGetPCIBusId(name.as_mut_ptr().cast(), 32, device) };
        let bus = CStr::from_bytes_until_nul(&name).ok().map(CStr::to_owned);
        let bus = bus.filter(|_| named == sys::CUresult::CUDA_SUCCESS);
        match bus.as_deref().and_then(free_bytes) {
            Some(free) => Baseline { bus, free },
            None => Baseline { bus: None, free: 0 },
        }
    }
}

// SAFETY: the driver's functions may be called from any thread; handles are plain numbers to this process.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of device `index`.
    pub fn retain(index: u32) -> Result<Arc<Context>> {
        let driver = start()?;
        let (device, info) = (device(index)?, device_info(index)?);
        let baseline = Baseline::before(device);
        let mut raw = null_mut();
        // SAFETY: the device exists; the context is released when dropped.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) }, "open a context")?;
        let mut context = Context {
            raw,
            device,
            info,
            driver,
            poison: OnceLock::new(),
            allocations: AtomicU64::new(0),
            pinned: AtomicU64::new(0),
            granules: Granules::default(),
            pooled: AtomicU64::new(0),
            pool: OnceLock::new(),
            baseline,
        };
        context.enter()?;
        if context.baseline.bus.is_none() {
            context.baseline.free = context.memory()?.0;
        }
        Ok(Arc::new(context))
    }

    /// Keeps the device's primary context until the process ends, for what lives as long.
    pub fn keep(&self) -> Result<()> {
        let mut raw = null_mut();
        // SAFETY: the device exists; what is retained here is never released.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, self.device) }, "keep a context")
    }

    /// Makes the context current on this thread; an error once it has failed.
    pub fn enter(&self) -> Result<()> {
        if let Some(cause) = self.poison.get() {
            return Err(poisoned(cause));
        }
        // SAFETY: the context is retained as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "enter the context")
    }

    /// An error unless `result` is success; a fatal one is remembered.
    pub(in crate::cuda) fn check(&self, result: sys::CUresult, what: &str) -> Result<()> {
        if result != sys::CUresult::CUDA_SUCCESS && is_fatal(result as u32) {
            let cause = self.poison.get_or_init(|| format!("{} while trying to {what}", describe(result)));
            return Err(poisoned(cause));
        }
        check(result, what)
    }

    /// Free and total bytes of the device.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: a context is current; the results are written to live numbers.
        self.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "measure free memory")?;
        Ok((free as u64, total as u64))
    }

    /// Allocations of device memory so far.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Bytes that the device has less of than before this context was opened here, whoever took them. Without the management
    /// library the context itself is not among them.
    pub fn taken(&self) -> Result<u64> {
        let free = match self.baseline.bus.as_deref().and_then(free_bytes) {
            Some(free) => free,
            None => self.memory()?.0,
        };
        Ok(self.baseline.free.saturating_sub(free))
    }

    /// Bytes that allocations hold and nobody asked for.
    pub fn slack(&self) -> u64 {
        let pooled = self.pooled.load(Ordering::Relaxed);
        let reserved = self.reserved().unwrap_or(pooled);
        self.granules.slack().saturating_add(reserved.saturating_sub(pooled))
    }

    /// Bytes that the pool has taken from the device.
    fn reserved(&self) -> Result<u64> {
        let Some(pool) = self.pool.get() else { return Ok(0) };
        self.enter()?;
        let (what, mut value) = (sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, 0u64);
        // SAFETY: the attribute is a 64-bit number.
        let got = unsafe { sys::cuMemPoolGetAttribute(pool.0, what, (&raw mut value).cast()) };
        self.check(got, "measure the memory pool").map(|()| value)
    }

    /// Bytes of pinned memory held now.
    pub fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }

    pub(in crate::cuda) fn count_pinned(&self, before: u64, after: u64) {
        self.pinned.fetch_add(after, Ordering::Relaxed);
        self.pinned.fetch_sub(before, Ordering::Relaxed);
    }

    /// The pool of this context, made when it is first needed.
    pub(super) fn pool(&self) -> Result<sys::CUmemoryPool> {
        if let Some(pool) = self.pool.get() {
            return Ok(pool.0);
        }
        // SAFETY: all zeros is a value of every field: no handle type, no maximum, reserved bytes zero.
        let mut props: sys::CUmemPoolProps = unsafe { MaybeUninit::zeroed().assume_init() };
        props.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        props.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        props.location.id = self.device;
        let mut raw = null_mut();
        // SAFETY: a context is current; the pool is destroyed with the context.
        self.check(unsafe { sys::cuMemPoolCreate(&mut raw, &props) }, "make a memory pool")?;
        // Memory stays with the pool between steps, so that a step costs no call to the operating system.
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a 64-bit number.
        let set = unsafe { sys::cuMemPoolSetAttribute(raw, threshold, (&raw mut keep).cast()) };
        let pool = self.pool.get_or_init(|| Pool(raw));
        if pool.0 != raw {
            // SAFETY: another thread was first; this one was never used.
            unsafe { sys::cuMemPoolDestroy(raw) };
        }
        self.check(set, "set up the memory pool")?;
        Ok(pool.0)
    }

    /// What the pool holds.
    pub fn pool_report(&self) -> Result<PoolReport> {
        let Some(pool) = self.pool.get() else { return Ok(PoolReport::default()) };
        self.enter()?;
        let get = |attribute| -> Result<u64> {
            let mut value = 0u64;
            // SAFETY: the attributes are 64-bit numbers.
            let got = unsafe { sys::cuMemPoolGetAttribute(pool.0, attribute, (&raw mut value).cast()) };
            self.check(got, "measure the memory pool").map(|()| value)
        };
        Ok(PoolReport {
            reserved: get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
            used: get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            most_reserved: get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
            most_used: get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        })
    }

    /// Gives memory of the pool that is not in use back to the device.
    pub fn trim_pool(&self) -> Result<()> {
        let Some(pool) = self.pool.get() else { return Ok(()) };
        self.enter()?;
        // SAFETY: the pool lives as long as the context.
        self.check(unsafe { sys::cuMemPoolTrimTo(pool.0, 0) }, "trim the memory pool")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: all that lived in the context held it, so nothing does any more.
        unsafe {
            if let Some(pool) = self.pool.get() {
                sys::cuCtxSetCurrent(self.raw);
                sys::cuMemPoolDestroy(pool.0);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

#[derive(Debug)]
struct Pool(sys::CUmemoryPool);

pub(super) fn poisoned(cause: &str) -> Error {
    Error::new(Kind::Device, "cuda/poisoned", format!("the device has failed: {cause}")).hint(
        "start the process again; if it recurs, run with --no-graphs under compute-sanitizer and report it",
    )
}
