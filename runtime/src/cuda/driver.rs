//! The CUDA driver: presence, devices, contexts, memory, streams, events, images.
//!
//! Every handle is owned by a type that gives it back when dropped and keeps its context alive. Nothing of the driver is
//! touched before [`present`] has found its library, and no function is called that drivers older than
//! [`NEEDED_DRIVER`] lack. Device addresses are numbers here: nothing in this process reads through them.

use std::ffi::{CStr, CString, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use millrace_ir::{Error, Kind, Result};
use sys::CUdevice_attribute as Attribute;

use super::granules::Granules;
use super::management::free_bytes;
use super::range::Range;
use super::report::PoolReport;

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

/// The primary context of a device, retained, with what is counted and remembered about it.
#[derive(Debug)]
pub(super) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
    /// What the device is.
    pub info: DeviceInfo,
    /// Version of the driver.
    pub driver: u32,
    poison: OnceLock<String>,
    allocations: AtomicU64,
    pinned: AtomicU64,
    granules: Granules,
    /// Bytes of blocks from the pool.
    pooled: AtomicU64,
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

    /// Makes the context current on this thread; an error once it has failed.
    pub fn enter(&self) -> Result<()> {
        if let Some(cause) = self.poison.get() {
            return Err(poisoned(cause));
        }
        // SAFETY: the context is retained as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "enter the context")
    }

    /// An error unless `result` is success; a fatal one is remembered.
    pub(super) fn check(&self, result: sys::CUresult, what: &str) -> Result<()> {
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

    pub(super) fn count_pinned(&self, before: u64, after: u64) {
        self.pinned.fetch_add(after, Ordering::Relaxed);
        self.pinned.fetch_sub(before, Ordering::Relaxed);
    }

    /// The pool of this context, made when it is first needed.
    fn pool(&self) -> Result<sys::CUmemoryPool> {
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

fn poisoned(cause: &str) -> Error {
    Error::new(Kind::Device, "cuda/poisoned", format!("the device has failed: {cause}")).hint(
        "start the process again; if it recurs, run with --no-graphs under compute-sanitizer and report it",
    )
}

/// A stream that the caller of this library made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(usize);

impl RawStream {
    /// Names a `CUstream` of the device's primary context.
    ///
    /// # Safety
    /// The stream must stay valid as long as a session uses it, and must not be capturing.
    pub unsafe fn new(stream: *mut c_void) -> RawStream {
        RawStream(stream as usize)
    }
}

/// A stream: work in order.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) raw: sys::CUstream,
    owned: bool,
    pub(super) context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}
// SAFETY: as for `Context`.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of its own, not ordered with the default stream.
    pub fn new(context: &Arc<Context>) -> Result<Arc<Stream>> {
        context.enter()?;
        let mut raw = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; the stream is destroyed when dropped.
        context.check(unsafe { sys::cuStreamCreate(&mut raw, flags) }, "make a stream")?;
        Ok(Arc::new(Stream { raw, owned: true, context: context.clone() }))
    }

    /// The caller's stream.
    pub fn borrowed(context: &Arc<Context>, stream: RawStream) -> Arc<Stream> {
        Arc::new(Stream { raw: stream.0 as sys::CUstream, owned: false, context: context.clone() })
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the stream is live.
        self.context.check(unsafe { sys::cuStreamSynchronize(self.raw) }, "run a step")
    }

    /// What is enqueued from here on waits for the point that `event` marks.
    pub fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: both are live and of one context.
        self.context.check(unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }, "wait for an event")
    }

    /// [`Stream::wait`] for an event that was recorded outside of the graph for which this stream records.
    pub fn wait_outside(&self, event: &Event) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_EXTERNAL as u32;
        // SAFETY: both are live and of one context.
        let done = unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, flags) };
        self.context.check(done, "wait for an event of another graph")
    }

    /// Fills device memory with zeros.
    pub fn zero(&self, range: Range) -> Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: device memory only; the range is inside a block by construction of ranges.
        let done = unsafe { sys::cuMemsetD8Async(range.base, 0, range.len as usize, self.raw) };
        self.context.check(done, "clear memory")
    }

    /// Copies between ranges of device memory of the same length.
    pub fn copy(&self, from: Range, to: Range) -> Result<()> {
        if to.len == 0 || from == to {
            return Ok(());
        }
        // SAFETY: device memory only; both ranges are inside blocks by construction of ranges.
        let done =
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.base, from.base, from.len.min(to.len) as usize, self.raw) };
        self.context.check(done, "copy on the device")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: the stream is live and this is its owner; work in it goes on.
            unsafe {
                sys::cuCtxSetCurrent(self.context.raw);
                sys::cuStreamDestroy_v2(self.raw);
            }
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`.
unsafe impl Sync for Event {}

impl Event {
    /// An event; one without `timing` is cheaper.
    pub fn new(context: &Arc<Context>, timing: bool) -> Result<Event> {
        context.enter()?;
        let flags = match timing {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let mut raw = null_mut();
        // SAFETY: a context is current; the event is destroyed when dropped.
        context.check(unsafe { sys::cuEventCreate(&mut raw, flags as u32) }, "make an event")?;
        Ok(Event { raw, context: context.clone() })
    }

    /// Marks the end of what `stream` holds.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are live and of one context.
        self.context.check(unsafe { sys::cuEventRecord(self.raw, stream.raw) }, "record an event")
    }

    /// [`Event::record`] in a stream that records for a graph: each launch of the graph marks the point anew, for others
    /// than the graph.
    pub fn record_outside(&self, stream: &Stream) -> Result<()> {
        let flags = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: both are live and of one context.
        let done = unsafe { sys::cuEventRecordWithFlags(self.raw, stream.raw, flags) };
        self.context.check(done, "record an event of a graph")
    }

    /// Waits for the point; returns at once if it was never recorded.
    pub fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the event is live.
        self.context.check(unsafe { sys::cuEventSynchronize(self.raw) }, "run a step")
    }

    /// Seconds from `start` to this event; both must have passed.
    pub fn seconds_since(&self, start: &Event) -> Result<f64> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let missing = || Error::new(Kind::Device, "cuda/driver", "the driver does not tell times");
        let mut milliseconds = 0f32;
        // The declarations have only a later version of this function, which drivers before 12.8 lack.
        // SAFETY: every driver has this one, with this signature. Both events are live; the result is written to a
        // live number.
        let got = unsafe {
            let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0").map_err(|_| missing())?;
            elapsed(&mut milliseconds, start.raw, self.raw)
        };
        self.context.check(got, "read a time").map(|()| f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is live and this is its owner.
        unsafe {
            sys::cuCtxSetCurrent(self.context.raw);
            sys::cuEventDestroy_v2(self.raw);
        }
    }
}

/// Device memory, given back when dropped.
#[derive(Debug)]
pub(super) struct Block {
    range: Range,
    context: Arc<Context>,
    /// The stream whose order allocation and release follow; without one both take effect at once.
    stream: Option<Arc<Stream>>,
}

impl Block {
    /// `len` bytes, what they hold is unknown.
    pub fn new(context: &Arc<Context>, len: u64, what: &str) -> Result<Block> {
        let mut base = 0;
        if len > 0 {
            context.enter()?;
            // SAFETY: a context is current; the memory is freed when dropped.
            let done = unsafe { sys::cuMemAlloc_v2(&mut base, len as usize) };
            context.check(done, &format!("allocate {len} bytes for {what}"))?;
            context.allocations.fetch_add(1, Ordering::Relaxed);
            context.granules.add(len);
        }
        Ok(Block { range: Range { base, len }, context: context.clone(), stream: None })
    }

    /// `len` bytes from the pool, for work in `stream`.
    pub fn from_pool(stream: &Arc<Stream>, len: u64, what: &str) -> Result<Block> {
        let context = &stream.context;
        let mut base = 0;
        if len > 0 {
            context.enter()?;
            let pool = context.pool()?;
            // SAFETY: pool and stream are live; the memory is freed when dropped.
            let done = unsafe { sys::cuMemAllocFromPoolAsync(&mut base, len as usize, pool, stream.raw) };
            context.check(done, &format!("allocate {len} bytes for {what}"))?;
            context.allocations.fetch_add(1, Ordering::Relaxed);
            context.pooled.fetch_add(len, Ordering::Relaxed);
        }
        Ok(Block { range: Range { base, len }, context: context.clone(), stream: Some(stream.clone()) })
    }

    /// Where it is.
    pub fn range(&self) -> Range {
        self.range
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.range.len == 0 {
            return;
        }
        match &self.stream {
            Some(_) => {
                self.context.pooled.fetch_sub(self.range.len, Ordering::Relaxed);
            }
            None => self.context.granules.remove(self.range.len),
        }
        // SAFETY: the memory is live and this is its owner. `cuMemFree` waits for work that may use it, and the
        // stream-ordered release comes after such work in its stream.
        unsafe {
            sys::cuCtxSetCurrent(self.context.raw);
            match &self.stream {
                Some(stream) => sys::cuMemFreeAsync(self.range.base, stream.raw),
                None => sys::cuMemFree_v2(self.range.base),
            };
        }
    }
}

/// A loaded image.
#[derive(Debug)]
pub(super) struct Image {
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
pub(super) struct Function {
    pub(super) raw: sys::CUfunction,
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
