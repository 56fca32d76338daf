//! NVRTC: CUDA C++ text to a device image. The library is loaded when first needed; whether it is there is asked before
//! anything else of it is touched.

use std::ffi::CString;
use std::sync::OnceLock;

use cudarc::nvrtc::{result, sys};
use millrace_ir::{Error, Kind, Result};

/// Whether NVRTC can be loaded, and which version it is.
///
/// # Errors
/// `compile/no-nvrtc` with what to install.
pub fn version() -> Result<(i32, i32)> {
    static VERSION: OnceLock<Option<(i32, i32)>> = OnceLock::new();
    let found = VERSION.get_or_init(|| {
        // SAFETY: only opens and closes the library.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is there, and both pointers are valid for the call.
        let answer = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        (answer == sys::nvrtcResult::NVRTC_SUCCESS).then_some((major, minor))
    });
    found.ok_or_else(|| {
        Error::new(Kind::Unsupported, "compile/no-nvrtc", "CUDA kernels are built with NVRTC, which was not found").hint(
            "install it (`pip install nvidia-cuda-nvrtc`, no GPU needed) and put its lib folder on LD_LIBRARY_PATH",
        )
    })
}

/// A compiled program.
pub struct Image {
    /// The cubin, or PTX text for a virtual architecture.
    pub bytes: Vec<u8>,
    /// What the compiler said.
    pub log: String,
}

/// Frees the program at the end of a scope.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program` and destroyed once. A failure here leaks at worst.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn text(bytes: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Compiles `source` with `options`; a cubin if the architecture is a real one.
///
/// # Errors
/// `compile/no-nvrtc`, `compile/nvrtc` with the compiler's message.
pub fn compile(source: &str, options: &[String]) -> Result<Image> {
    version()?;
    let failed = |what: String| Error::new(Kind::Internal, "compile/nvrtc", what);
    let source = CString::new(source).map_err(|_| failed("a kernel's text holds a zero byte".to_string()))?;
    if options.iter().any(|o| o.contains('\0')) {
        return Err(failed("an option holds a zero byte".to_string()));
    }
    let program = result::create_program(&source, Some(c"kernel.cu"))
        .map(Program)
        .map_err(|e| failed(format!("NVRTC takes no program: {e:?}")))?;
    // SAFETY: the program lives until the end of this function, as does its source; options hold no zero byte.
    let compiled = unsafe { result::compile_program(program.0, options) };
    // SAFETY: the program lives.
    let log = unsafe { result::get_program_log(program.0) }.map(|l| text(&l)).unwrap_or_default();
    compiled.map_err(|e| {
        let missing = log.contains("nvrtc-builtins");
        let error = failed(format!("a kernel does not compile ({e:?}): {}", log.trim()));
        match missing {
            true => error.hint("libnvrtc-builtins lies beside libnvrtc: put that folder on LD_LIBRARY_PATH"),
            false => error.hint("please report this with the model's configuration"),
        }
    })?;
    let virtual_arch = options.iter().any(|o| o.contains("compute_"));
    if virtual_arch {
        // SAFETY: the program lives and was compiled.
        let ptx = unsafe { result::get_ptx(program.0) }.map_err(|e| failed(format!("no PTX: {e:?}")))?;
        return Ok(Image { bytes: text(&ptx).into_bytes(), log });
    }
    let mut size = 0usize;
    // SAFETY: the program lives and was compiled; the pointer is valid for the call.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }
        .result()
        .map_err(|e| failed(format!("no cubin: {e:?}")))?;
    let mut bytes = vec![0u8; size];
    // SAFETY: the program lives, and the buffer has the size that was asked for.
    unsafe { sys::nvrtcGetCUBIN(program.0, bytes.as_mut_ptr().cast()) }
        .result()
        .map_err(|e| failed(format!("no cubin: {e:?}")))?;
    Ok(Image { bytes, log })
}
