//! Launches, and graphs of launches.
//!
//! A [`Ready`] list holds everything that the driver is told, so that running it costs one call a launch. What it names
//! was checked before: addresses by [`super::resolve`], parameters against the kernel where the driver tells them.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;
use millrace_ir::{DType, Error, Kind, Result};

use super::driver::{Context, Function, Stream};
use super::products::{ReadyProduct, Supply};
use super::range::Range;
use super::residence::Copier;
use super::resolve::{Action, Map, Params, Resolution, check_params};

/// Parameters of one launch, in memory that is aligned for tensor maps.
#[derive(Debug)]
struct Packed {
    lines: Vec<Line>,
    offsets: Vec<usize>,
}

/// Bytes that only the driver reads.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

/// One launch, ready to go.
#[derive(Debug)]
pub(super) struct ReadyLaunch {
    function: Arc<Function>,
    grid: [u32; 3],
    block: [u32; 3],
    cluster: u32,
    shared: u32,
    dependent: bool,
    params: Packed,
}

/// One entry of a stream.
#[derive(Debug)]
pub(super) enum Ready {
    Launch(ReadyLaunch),
    /// A product of a library, with its scratch memory.
    Product(ReadyProduct, Range),
    Copy {
        from: Range,
        to: Range,
    },
    /// What follows reads this copy of the ring.
    Arrive(usize),
    /// Nothing that follows reads this copy in this step.
    Leave(usize),
}

impl Ready {
    /// Prepares an action; `functions` are those of the table, in order, and `library` is who took its products, with
    /// scratch memory.
    pub fn new(
        action: &Action,
        functions: &[Arc<Function>],
        entries: &[String],
        library: Option<(&Supply, Range)>,
    ) -> Result<Ready> {
        match action {
            Action::Product(call) => {
                let missing =
                    || Error::new(Kind::Internal, "cuda/library", "a product is nobody's to compute");
                let (supply, workspace) = library.ok_or_else(missing)?;
                let ready = supply.ready(call)?.ok_or_else(missing)?;
                Ok(Ready::Product(ready, workspace))
            }
            Action::Copy { from, to } => Ok(Ready::Copy { from: *from, to: *to }),
            Action::Arrive(copy) => Ok(Ready::Arrive(*copy)),
            Action::Leave(copy) => Ok(Ready::Leave(*copy)),
            Action::Launch(launch) => {
                let missing = || Error::new(Kind::Internal, "cuda/no-kernel", "a launch names no kernel");
                let function = functions.get(launch.kernel).ok_or_else(missing)?;
                let entry = entries.get(launch.kernel).map_or("", String::as_str);
                ReadyLaunch::new(launch, function, entry).map(Ready::Launch)
            }
        }
    }

    /// Enqueues it. `overlap` allows a dependent kernel to start before its predecessor has ended, which must be a
    /// kernel. `recorded` tells whether the stream records.
    pub fn enqueue(&self, stream: &Stream, copier: Copier<'_>, overlap: bool, recorded: bool) -> Result<()> {
        match self {
            Ready::Copy { from, to } => stream.copy(*from, *to),
            Ready::Launch(launch) => launch.enqueue(stream, overlap),
            Ready::Product(product, workspace) => product.plan.enqueue(stream, &product.places, *workspace),
            Ready::Arrive(copy) => copier.arrive(*copy, stream, recorded),
            Ready::Leave(copy) => copier.leave(*copy, stream, recorded),
        }
    }

    /// Enqueues it where no weights come in parts.
    pub fn enqueue_alone(&self, stream: &Stream, overlap: bool) -> Result<()> {
        match self {
            Ready::Copy { from, to } => stream.copy(*from, *to),
            Ready::Launch(launch) => launch.enqueue(stream, overlap),
            Ready::Product(product, workspace) => product.plan.enqueue(stream, &product.places, *workspace),
            Ready::Arrive(_) | Ready::Leave(_) => {
                Err(Error::new(Kind::Internal, "cuda/no-ring", "a copy of a weight without a ring"))
            }
        }
    }

    /// Whether it is a kernel of ours, whose end the next kernel may await by itself. What a library launches is not: the
    /// next kernel begins when it has ended.
    pub fn is_launch(&self) -> bool {
        matches!(self, Ready::Launch(_))
    }

    /// Whether it orders copies of weights that stream.
    pub fn is_streaming(&self) -> bool {
        matches!(self, Ready::Arrive(_) | Ready::Leave(_))
    }

    /// Whether a library computes it.
    pub fn is_product(&self) -> bool {
        matches!(self, Ready::Product(..))
    }
}

impl ReadyLaunch {
    /// Prepares a launch of `function`.
    pub fn new(launch: &Resolution, function: &Arc<Function>, entry: &str) -> Result<ReadyLaunch> {
        check_params(&launch.params, function.parameters.as_deref(), entry)?;
        let threads: u32 = launch.block.iter().product();
        if threads > function.max_threads {
            let message =
                format!("a launch has {threads} threads, the kernel takes {}", function.max_threads);
            return Err(Error::new(Kind::BadInput, "cuda/arguments", message)
                .at(entry)
                .hint("build the engine again"));
        }
        let room = function.context().info.max_shared.saturating_sub(function.shared);
        if launch.shared > room {
            let message = format!("a launch asks for {} bytes of shared memory of {room}", launch.shared);
            return Err(Error::new(Kind::Incompatible, "cuda/shared-memory", message).at(entry));
        }
        Ok(ReadyLaunch {
            function: function.clone(),
            grid: launch.grid,
            block: launch.block,
            cluster: launch.cluster,
            shared: launch.shared,
            dependent: launch.dependent,
            params: Packed::new(&launch.params)?,
        })
    }

    /// Enqueues it.
    pub fn enqueue(&self, stream: &Stream, overlap: bool) -> Result<()> {
        let mut attributes = [EMPTY_ATTRIBUTE; 2];
        let mut used = 0;
        if self.dependent && overlap {
            attributes[used].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[used].value.programmaticStreamSerializationAllowed = 1;
            used += 1;
        }
        if self.cluster > 1 {
            attributes[used].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[used].value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster, y: 1, z: 1 };
            used += 1;
        }
        let [grid_x, grid_y, grid_z] = self.grid;
        let [block_x, block_y, block_z] = self.block;
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: self.shared,
            hStream: stream.raw,
            attrs: attributes.as_mut_ptr(),
            numAttrs: used as u32,
        };
        let bytes = self.params.lines.as_ptr().cast::<u8>().cast_mut();
        let mut pointers: Vec<*mut c_void> =
            // SAFETY: `Packed` has checked that every parameter lies inside its lines.
            self.params.offsets.iter().map(|at| unsafe { bytes.add(*at) }.cast()).collect();
        // SAFETY: function and stream are live and of one context. The driver reads each parameter's bytes before it
        // returns; their number and sizes are those of the kernel, as compared where the driver tells them and as the
        // engine's table promises elsewhere. What the kernel reads and writes is device memory.
        let done =
            unsafe { sys::cuLaunchKernelEx(&config, self.function.raw, pointers.as_mut_ptr(), null_mut()) };
        self.function.context().check(done, "launch a kernel")
    }
}

const EMPTY_ATTRIBUTE: sys::CUlaunchAttribute = sys::CUlaunchAttribute {
    id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
    pad: [0; 4],
    value: sys::CUlaunchAttributeValue { pad: [0; 64] },
};

impl Packed {
    fn new(params: &Params) -> Result<Packed> {
        let mut bytes = params.bytes.clone();
        for (at, map) in &params.maps {
            let encoded = encode(map)?;
            bytes[*at..*at + encoded.len()].copy_from_slice(&encoded);
        }
        // A driver that tells nothing of parameters may read 16 bytes of a small one.
        bytes.resize((bytes.len() + 16).next_multiple_of(64), 0);
        let inside =
            params.places.iter().all(|(at, len)| at.checked_add(*len).is_some_and(|e| e <= bytes.len()));
        if !inside {
            return Err(Error::new(Kind::Internal, "cuda/arguments", "a parameter lies outside"));
        }
        let lines = bytes.as_chunks::<64>().0.iter().map(|line| Line(*line)).collect();
        Ok(Packed { lines, offsets: params.places.iter().map(|(at, _)| *at).collect() })
    }
}

fn element(dtype: DType) -> sys::CUtensorMapDataType {
    use sys::CUtensorMapDataType as T;
    match dtype {
        DType::F32 => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::F16 => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => T::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::I32 => T::CU_TENSOR_MAP_DATA_TYPE_INT32,
        DType::I64 => T::CU_TENSOR_MAP_DATA_TYPE_INT64,
        DType::F8E4M3 | DType::F8E5M2 | DType::I8 | DType::U8 | DType::I4 | DType::Bool => {
            T::CU_TENSOR_MAP_DATA_TYPE_UINT8
        }
    }
}

/// The 128 bytes of a tensor map, whose numbers were checked. Elements outside of the extents read as zero.
fn encode(map: &Map) -> Result<[u8; 128]> {
    use sys::CUtensorMapSwizzle as S;
    let swizzle = match map.swizzle {
        32 => S::CU_TENSOR_MAP_SWIZZLE_32B,
        64 => S::CU_TENSOR_MAP_SWIZZLE_64B,
        128 => S::CU_TENSOR_MAP_SWIZZLE_128B,
        _ => S::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let ones = [1u32; 5];
    let mut out = MaybeUninit::<sys::CUtensorMap>::zeroed();
    // SAFETY: the lists have as many numbers as the rank says (strides one less), at most five; the map is aligned by
    // its type. The call computes bytes and touches no device.
    let done = unsafe {
        sys::cuTensorMapEncodeTiled(
            out.as_mut_ptr(),
            element(map.dtype),
            map.shape.len() as u32,
            map.base as *mut c_void,
            map.shape.as_ptr(),
            map.strides.as_ptr(),
            map.tile.as_ptr(),
            ones.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    if done != sys::CUresult::CUDA_SUCCESS {
        let message = format!("the driver does not take the tensor map {map:?}");
        return Err(Error::new(Kind::BadInput, "cuda/tensor-map", message).hint("build the engine again"));
    }
    // SAFETY: zeroed at first and written by the call; a map is 128 bytes without padding.
    let words = unsafe { out.assume_init() }.opaque;
    let mut bytes = [0; 128];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(bytes)
}

/// Captures that are tried before a step runs without a graph.
const CAPTURES: usize = 4;

/// A recorded list of launches and copies.
#[derive(Debug)]
pub(super) struct Graph {
    raw: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the driver's functions may be called from any thread; the handle is a plain number to this process.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Records what `enqueue` puts into `stream`, which is used for nothing else. Nothing of it runs. Another thread of the
    /// process that waits for the whole context ends a capture, so `enqueue` may be called several times.
    ///
    /// The graph names the memory of staging, landing and device that was enqueued; whoever launches it keeps that alive.
    pub fn record(stream: &Stream, mut enqueue: impl FnMut(&Stream) -> Result<()>) -> Result<Graph> {
        let mut made = Graph::capture(stream, &mut enqueue);
        let mut left = CAPTURES - 1;
        while made.is_err() && left > 0 {
            made = Graph::capture(stream, &mut enqueue);
            left -= 1;
        }
        made
    }

    fn capture(stream: &Stream, enqueue: &mut dyn FnMut(&Stream) -> Result<()>) -> Result<Graph> {
        let context = &stream.context;
        context.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live and idle.
        context.check(unsafe { sys::cuStreamBeginCapture_v2(stream.raw, mode) }, "begin a capture")?;
        let enqueued = enqueue(stream);
        let mut graph = null_mut();
        // SAFETY: the stream is capturing; this ends it whatever happened meanwhile.
        let ended =
            context.check(unsafe { sys::cuStreamEndCapture(stream.raw, &mut graph) }, "end a capture");
        let mut raw = null_mut();
        let made = enqueued.and(ended).and_then(|()| {
            // SAFETY: the graph is live.
            context.check(unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0) }, "make a graph")
        });
        if !graph.is_null() {
            // SAFETY: the graph is live; what was instantiated from it stands alone.
            unsafe { sys::cuGraphDestroy(graph) };
        }
        made.map(|()| Graph { raw, context: context.clone() })
    }

    /// Enqueues the whole list.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: graph and stream are live and of one context.
        self.context.check(unsafe { sys::cuGraphLaunch(self.raw, stream.raw) }, "launch a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the graph is live and this is its owner; a launch that is running is not disturbed.
        unsafe {
            let _ = self.context.enter();
            sys::cuGraphExecDestroy(self.raw);
        }
    }
}
