//! Matrix products by cuBLASLt, to compare kernels with. Engines never need it: it is asked for by measurements alone,
//! and its absence is an answer. Nothing of the library is touched before [`present`] has found it.

use std::ffi::c_void;
use std::mem::{MaybeUninit, size_of_val};
use std::ptr::null_mut;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use cudarc::cublaslt::sys;
use millrace_ir::{DType, Error, Kind, Result};

use super::driver::{Context, Stream};
use super::range::Range;

/// Bytes of scratch memory that algorithms may ask for.
pub(super) const WORKSPACE: u64 = 64 << 20;

/// `CUBLAS_OP_T`, which the declarations of this library lack.
const TRANSPOSE: i32 = 1;

/// Whether the library can be opened.
pub(super) fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens the library, whose initialisers are those of the installed one, and closes it.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

fn check(status: sys::cublasStatus_t, what: &str) -> Result<()> {
    if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(Error::new(Kind::Device, "cuda/library", format!("cuBLASLt failed to {what}: {status:?}")))
}

fn element(dtype: DType) -> Result<sys::cudaDataType> {
    Ok(match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        other => {
            let message = format!("cuBLASLt is not asked for products of {other}");
            return Err(Error::new(Kind::Unsupported, "cuda/library", message));
        }
    })
}

/// `y = x w^T` with `x` `[m, k]`, `w` `[n, k]` and `y` `[m, n]`, all row by row, sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Rows of `x`.
    pub m: u64,
    /// Rows of `w`.
    pub n: u64,
    /// Columns of both.
    pub k: u64,
    /// Element type of `x` and `w`.
    pub dtype: DType,
    /// Element type of `y`.
    pub out: DType,
}

/// The library, opened for one context.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    context: Arc<Context>,
}

impl Library {
    /// Opens the library; `None` where it is not there.
    pub fn open(context: &Arc<Context>) -> Result<Option<Rc<Library>>> {
        if !present() {
            return Ok(None);
        }
        context.enter()?;
        let mut handle = null_mut();
        // SAFETY: the library is there and a context is current; the handle is destroyed when dropped.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "start")?;
        Ok(Some(Rc::new(Library { handle, context: context.clone() })))
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle is live and this is its owner; plans hold the library.
        unsafe {
            let _ = self.context.enter();
            sys::cublasLtDestroy(self.handle);
        }
    }
}

/// Descriptors of a product.
struct Descriptors {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of `w`, `x` and `y`.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    library: Rc<Library>,
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: each is null or was made by the library and is destroyed once.
        unsafe {
            if !self.operation.is_null() {
                sys::cublasLtMatmulDescDestroy(self.operation);
            }
            for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
                sys::cublasLtMatrixLayoutDestroy(layout);
            }
        }
    }
}

/// A way to compute a product.
pub(super) struct Plan {
    descriptors: Rc<Descriptors>,
    algorithm: sys::cublasLtMatmulAlgo_t,
    bytes: [u64; 3],
}

impl Plan {
    /// At most `most` ways, those first that the library thinks best.
    pub fn all(library: &Rc<Library>, product: Product, most: usize) -> Result<Vec<Plan>> {
        let Product { m, n, k, dtype, out } = product;
        let (input, output) = (element(dtype)?, element(out)?);
        let mut made =
            Descriptors { operation: null_mut(), layouts: [null_mut(); 3], library: library.clone() };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let scale = sys::cudaDataType::CUDA_R_32F;
        // SAFETY: the library is there; the result is written to a live pointer.
        let created = unsafe { sys::cublasLtMatmulDescCreate(&mut made.operation, compute, scale) };
        check(created, "describe a product")?;
        // The library counts by columns: w is [k, n] there and to be transposed, x is [k, m], y is [n, m].
        let transpose: i32 = TRANSPOSE;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the descriptor is live; the attribute is read from a live value of its size.
        let set = unsafe {
            let value = (&raw const transpose).cast();
            sys::cublasLtMatmulDescSetAttribute(made.operation, attribute, value, size_of_val(&transpose))
        };
        check(set, "describe a product")?;
        for (layout, (ty, rows, columns)) in
            made.layouts.iter_mut().zip([(input, k, n), (input, k, m), (output, n, m)])
        {
            // SAFETY: the library is there; the result is written to a live pointer.
            let created = unsafe { sys::cublasLtMatrixLayoutCreate(layout, ty, rows, columns, rows as i64) };
            check(created, "describe a matrix")?;
        }
        let mut preference = null_mut();
        // SAFETY: as above; destroyed below.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut preference) }, "ask for algorithms")?;
        let room = WORKSPACE as usize;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let mut found = vec![MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed(); most];
        let mut count = 0;
        let [w, x, y] = made.layouts;
        // SAFETY: all descriptors are live, the attribute has its size, and the array has room for what is asked for.
        let asked = unsafe {
            let value = (&raw const room).cast();
            let set =
                sys::cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, size_of_val(&room));
            let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                library.handle,
                made.operation,
                w,
                x,
                y,
                y,
                preference,
                most as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            );
            sys::cublasLtMatmulPreferenceDestroy(preference);
            check(set, "ask for algorithms").and(check(asked, "find an algorithm"))
        };
        asked?;
        let size = |dtype: DType| dtype.size_bytes().unwrap_or(0) as u64;
        let bytes = [n * k * size(dtype), m * k * size(dtype), m * n * size(out)];
        let descriptors = Rc::new(made);
        let plans = found.iter().take(usize::try_from(count).unwrap_or(0)).filter_map(|result| {
            // SAFETY: zeroed at first, which is a value of every field, and written by the library up to `count`.
            let result = unsafe { result.assume_init() };
            let fits =
                result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= room;
            fits.then(|| Plan { descriptors: descriptors.clone(), algorithm: result.algo, bytes })
        });
        Ok(plans.collect())
    }

    /// Enqueues the product of the rows at `x` and `w`, with scratch memory of [`WORKSPACE`] bytes.
    pub fn enqueue(&self, stream: &Stream, w: Range, x: Range, y: Range, workspace: Range) -> Result<()> {
        let short = [w, x, y].iter().zip(self.bytes).any(|(range, bytes)| range.len < bytes);
        if short || workspace.len < WORKSPACE {
            return Err(Error::new(Kind::Internal, "cuda/library", "a product has too little memory"));
        }
        let (alpha, beta) = (1.0f32, 0.0f32);
        let Descriptors { operation, layouts: [w_layout, x_layout, y_layout], library } = &*self.descriptors;
        // SAFETY: handle, descriptors and stream are live and of one context; the ranges are device memory of the sizes
        // that the descriptors say; the factors are read before the call returns.
        let done = unsafe {
            sys::cublasLtMatmul(
                library.handle,
                *operation,
                (&raw const alpha).cast(),
                w.base as *const c_void,
                *w_layout,
                x.base as *const c_void,
                *x_layout,
                (&raw const beta).cast(),
                y.base as *const c_void,
                *y_layout,
                y.base as *mut c_void,
                *y_layout,
                &self.algorithm,
                workspace.base as *mut c_void,
                WORKSPACE as usize,
                stream.raw.cast(),
            )
        };
        check(done, "multiply")
    }
}

#[cfg(test)]
mod tests {
    use super::super::survey;
    use super::*;

    /// The bindings abort where the library is missing, so its presence is asked first; asking is always allowed.
    #[test]
    fn presence_is_an_answer() {
        assert_eq!(present(), present());
        if survey().problem.is_some() {
            return;
        }
        let context = Context::retain(0).unwrap();
        assert_eq!(Library::open(&context).unwrap().is_some(), present());
    }

    #[test]
    fn other_types_are_refused() {
        assert_eq!(element(DType::I8).unwrap_err().code(), "cuda/library");
        assert!([DType::F32, DType::F16, DType::BF16].into_iter().all(|d| element(d).is_ok()));
    }
}
