//! Matrix products by cuBLASLt. Engines never need it: where a tuning chose it they have kernels beside, and its absence is
//! an answer. Nothing of the library is touched before [`present`] has found it.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::{MaybeUninit, size_of_val};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::cublaslt::sys;
use millrace_ir::{DType, Error, Kind, Result};

use super::driver::{Context, Stream};
use super::range::Range;

/// Bytes of scratch memory that algorithms may ask for.
pub(super) const WORKSPACE: u64 = millrace_ir::launch::LIBRARY_WORKSPACE;

/// Alignment of every operand.
pub(super) const ALIGN: u64 = 16;

/// `CUBLAS_OP_T`, which the declarations of this library lack.
const TRANSPOSE: i32 = 1;

/// Whether cuBLASLt is installed, which engines may name beside their kernels.
pub fn present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens the library, whose initialisers are those of the installed one, and closes it.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

fn check(status: sys::cublasStatus_t, what: &str) -> Result<()> {
    if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let message = format!("cuBLASLt failed to {what}: {status:?} ({})", status as u32);
    Err(Error::new(Kind::Device, "cuda/library", message))
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

/// What is asked of the library: a product, and what is added before its sums are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The product.
    pub product: Product,
    /// Whether a vector `[n]` is added to each row, of the elements of `y`.
    pub bias: bool,
    /// Whether `[m, n]` is added, of the elements of `y`: their own memory or that of `y`.
    pub residual: bool,
}

impl From<Product> for Question {
    fn from(product: Product) -> Question {
        Question { product, bias: false, residual: false }
    }
}

/// Memory of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Places {
    pub w: Range,
    pub x: Range,
    pub y: Range,
    pub bias: Option<Range>,
    pub residual: Option<Range>,
}

impl Question {
    /// Bytes of `w`, `x` and `y`; `None` beyond 64 bits.
    pub fn bytes(&self) -> Option<[u64; 3]> {
        let Product { m, n, k, dtype, out } = self.product;
        let of = |rows: u64, columns: u64, dtype: DType| {
            rows.checked_mul(columns)?.checked_mul(dtype.size_bytes()? as u64)
        };
        Some([of(n, k, dtype)?, of(m, k, dtype)?, of(m, n, out)?])
    }

    /// Whether `places` are of the sizes that the question has.
    pub fn fits(&self, places: &Places) -> bool {
        let Some([w, x, y]) = self.bytes() else { return false };
        let bias = y.checked_div(self.product.m);
        let optional = |asked: bool, place: Option<Range>, bytes: Option<u64>| match place {
            Some(range) => asked && bytes.is_some_and(|bytes| range.len >= bytes),
            None => !asked,
        };
        places.w.len >= w
            && places.x.len >= x
            && places.y.len >= y
            && optional(self.bias, places.bias, bias)
            && optional(self.residual, places.residual, Some(y))
    }
}

/// The library, opened for one context.
///
/// Handles are made once for each device and never destroyed: to destroy one, the library waits for the whole context, which ends the
/// captures of other threads, and the driver (580.159.04) has crashed on it while another thread captured.
#[derive(Debug)]
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    context: Arc<Context>,
}

/// The handles of this process, as numbers, by device.
static HANDLES: Mutex<BTreeMap<u32, usize>> = Mutex::new(BTreeMap::new());

// SAFETY: the library's functions may be called from any thread, with one handle too; it is a plain number to this process.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens the library; `None` where it is not there.
    pub fn open(context: &Arc<Context>) -> Result<Option<Arc<Library>>> {
        if !present() {
            return Ok(None);
        }
        context.enter()?;
        let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = match handles.get(&context.info.index) {
            Some(known) => *known as sys::cublasLtHandle_t,
            None => {
                context.keep()?;
                let mut handle = null_mut();
                // SAFETY: the library is there, and a context is current that stays as long as the handle.
                check(unsafe { sys::cublasLtCreate(&mut handle) }, "start")?;
                handles.insert(context.info.index, handle as usize);
                handle
            }
        };
        Ok(Some(Arc::new(Library { handle, context: context.clone() })))
    }

    /// Its version: 130100 is 13.1.
    pub fn version(&self) -> u64 {
        // SAFETY: the library is there; the call takes nothing.
        (unsafe { sys::cublasLtGetVersion() }) as u64
    }
}

/// A way to compute products of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Algorithm(sys::cublasLtMatmulAlgo_t);

/// Descriptors of a product, which nothing changes once they are made.
#[derive(Debug)]
struct Descriptors {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of `w`, `x` and `y`.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    library: Arc<Library>,
}

// SAFETY: the library only reads them, from any thread.
unsafe impl Send for Descriptors {}
// SAFETY: as above.
unsafe impl Sync for Descriptors {}

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

impl Descriptors {
    /// Those of a question; `bias` is the address of what is added to each row.
    fn new(library: &Arc<Library>, question: &Question, bias: u64) -> Result<Descriptors> {
        let Product { m, n, k, dtype, out } = question.product;
        let (input, output) = (element(dtype)?, element(out)?);
        let mut made =
            Descriptors { operation: null_mut(), layouts: [null_mut(); 3], library: library.clone() };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let scale = sys::cudaDataType::CUDA_R_32F;
        // SAFETY: the library is there; the result is written to a live pointer.
        let created = unsafe { sys::cublasLtMatmulDescCreate(&mut made.operation, compute, scale) };
        check(created, "describe a product")?;
        // The library counts by columns: w is [k, n] there and to be transposed, x is [k, m], y is [n, m].
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        made.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, TRANSPOSE)?;
        if question.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            made.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
            made.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        for (layout, (ty, rows, columns)) in
            made.layouts.iter_mut().zip([(input, k, n), (input, k, m), (output, n, m)])
        {
            // SAFETY: the library is there; the result is written to a live pointer.
            let created = unsafe { sys::cublasLtMatrixLayoutCreate(layout, ty, rows, columns, rows as i64) };
            check(created, "describe a matrix")?;
        }
        Ok(made)
    }

    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: T) -> Result<()> {
        let from = (&raw const value).cast();
        // SAFETY: the descriptor is live; the attribute is read from a live value of its size.
        let set = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.operation, attribute, from, size_of_val(&value))
        };
        check(set, "describe a product")
    }
}

/// What algorithms may need.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// Scratch memory of [`WORKSPACE`], operands aligned to [`ALIGN`], and parts of a sum that are added in f32, if in parts.
    fn new() -> Result<Preference> {
        let mut made = Preference(null_mut());
        // SAFETY: only called where the library is there; the result is written to a live pointer.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut made.0) }, "ask for algorithms")?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        made.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        let in_f32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        made.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, in_f32)?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            made.set(attribute, ALIGN as u32)?;
        }
        Ok(made)
    }

    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: T) -> Result<()> {
        let from = (&raw const value).cast();
        // SAFETY: the preference is live; the attribute is read from a live value of its size.
        let set = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, from, size_of_val(&value))
        };
        check(set, "ask for algorithms")
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by the library and destroyed once.
            unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
        }
    }
}

/// An address that stands for a bias where nothing is computed.
const SOME_BIAS: u64 = 256;

/// At most `most` algorithms, those first that the library thinks best for the rows of the question. The answer is a
/// function of question, library and device.
pub(super) fn suggestions(
    library: &Arc<Library>,
    question: &Question,
    most: usize,
) -> Result<Vec<Algorithm>> {
    library.context.enter()?;
    let made = Descriptors::new(library, question, SOME_BIAS)?;
    let preference = Preference::new()?;
    let mut found = vec![MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed(); most];
    let mut count = 0;
    let [w, x, y] = made.layouts;
    // SAFETY: all descriptors are live and the array has room for what is asked for.
    let asked = unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            library.handle,
            made.operation,
            w,
            x,
            y,
            y,
            preference.0,
            most as i32,
            found.as_mut_ptr().cast(),
            &mut count,
        )
    };
    // That there is no algorithm is an answer.
    if asked == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
        return Ok(Vec::new());
    }
    check(asked, "find an algorithm")?;
    let all = found.iter().take(usize::try_from(count).unwrap_or(0)).filter_map(|result| {
        // SAFETY: zeroed at first, which is a value of every field, and written by the library up to `count`.
        let result = unsafe { result.assume_init() };
        let fits = result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && result.workspaceSize as u64 <= WORKSPACE;
        fits.then_some(Algorithm(result.algo))
    });
    Ok(all.collect())
}

/// A product that is ready to be enqueued.
#[derive(Debug)]
pub(super) struct Plan {
    descriptors: Descriptors,
    algorithm: Algorithm,
    question: Question,
    bias: Option<u64>,
}

impl Plan {
    /// The question answered by `algorithm`, with the bias at `bias`; `None` if the algorithm does not take it.
    pub fn new(
        library: &Arc<Library>,
        question: Question,
        algorithm: Algorithm,
        bias: Option<Range>,
    ) -> Result<Option<Plan>> {
        let bias = bias.map(|range| range.base);
        let descriptors = Descriptors::new(library, &question, bias.unwrap_or(SOME_BIAS))?;
        let [w, x, y] = descriptors.layouts;
        let mut result = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: all descriptors are live; the result is written to a live pointer, and zeroed at first.
        let (status, result) = unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                library.handle,
                descriptors.operation,
                w,
                x,
                y,
                y,
                &algorithm.0,
                result.as_mut_ptr(),
            );
            (status, result.assume_init())
        };
        let takes =
            status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize as u64 <= WORKSPACE;
        Ok(takes.then_some(Plan { descriptors, algorithm, question, bias }))
    }

    /// Enqueues the product, with scratch memory of [`WORKSPACE`] bytes.
    pub fn enqueue(&self, stream: &Stream, places: &Places, workspace: Range) -> Result<()> {
        let same_bias = places.bias.map(|range| range.base) == self.bias;
        if !same_bias || !self.question.fits(places) || workspace.len < WORKSPACE {
            return Err(Error::new(Kind::Internal, "cuda/library", "a product has too little memory"));
        }
        let (alpha, beta) = (1.0f32, if self.question.residual { 1.0f32 } else { 0.0 });
        let Descriptors { operation, layouts: [w_layout, x_layout, y_layout], library } = &self.descriptors;
        let Places { w, x, y, residual, .. } = places;
        // SAFETY: handle, descriptors and stream are live and of one context; the ranges are device memory of the sizes
        // that the descriptors say; the factors are read before the call returns. What is added is the memory of `y` under
        // the same descriptor, or apart from it.
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
                residual.unwrap_or(*y).base as *const c_void,
                *y_layout,
                y.base as *mut c_void,
                *y_layout,
                &self.algorithm.0,
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

    #[test]
    fn codes_of_failures_are_told() {
        let failed = check(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED, "multiply").unwrap_err();
        assert_eq!(failed.code(), "cuda/library");
        assert!(failed.message().contains("CUBLAS_STATUS_NOT_SUPPORTED (15)"), "{failed}");
        assert!(check(sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS, "multiply").is_ok());
    }

    #[test]
    fn places_are_as_large_as_the_question() {
        let product = Product { m: 3, n: 8, k: 4, dtype: DType::BF16, out: DType::F32 };
        let question = Question { product, bias: true, residual: false };
        assert_eq!(question.bytes(), Some([64, 24, 96]));
        let range = |len| Range { base: 4096, len };
        let places =
            Places { w: range(64), x: range(24), y: range(96), bias: Some(range(32)), residual: None };
        assert!(question.fits(&places));
        let short = [
            Places { w: range(63), ..places },
            Places { x: range(23), ..places },
            Places { y: range(95), ..places },
            Places { bias: Some(range(31)), ..places },
            Places { bias: None, ..places },
            Places { residual: Some(range(96)), ..places },
        ];
        assert!(short.iter().all(|p| !question.fits(p)));
        let added = Question { residual: true, ..question };
        assert!(added.fits(&Places { residual: Some(range(96)), ..places }));
        assert!(!added.fits(&Places { residual: Some(range(95)), ..places }));
        let huge = Product { n: u64::MAX, ..product };
        assert_eq!(Question::from(huge).bytes(), None);
    }
}
