//! Free device memory as the management library (NVML) tells it: before any context, which itself takes hundreds of MiB.
//!
//! The library comes with the driver but is not always installed with it, as in some containers. Its absence is an answer.

use std::sync::OnceLock;

/// Functions of the library.
#[cfg(target_os = "linux")]
mod library {
    use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
    use std::ptr::null_mut;

    unsafe extern "C" {
        fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }

    const RTLD_NOW: c_int = 2;

    type Init = unsafe extern "C" fn() -> c_uint;
    type Handle = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_uint;
    type Memory = unsafe extern "C" fn(*mut c_void, *mut [u64; 3]) -> c_uint;

    /// The library, opened and started for the life of the process.
    pub struct Library {
        handle: Handle,
        memory: Memory,
    }

    fn symbol(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the library is open and stays so; the name ends in zero.
        let found = unsafe { dlsym(library, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    impl Library {
        /// Opens and starts it.
        pub fn open() -> Option<Library> {
            // SAFETY: opens the library of the installed driver, whose initialisers are its own; the name ends in zero.
            let library = unsafe { dlopen(c"libnvidia-ml.so.1".as_ptr(), RTLD_NOW) };
            if library.is_null() {
                return None;
            }
            let init = symbol(library, c"nvmlInit_v2")?;
            let handle = symbol(library, c"nvmlDeviceGetHandleByPciBusId_v2")?;
            let memory = symbol(library, c"nvmlDeviceGetMemoryInfo")?;
            // SAFETY: these functions have had these signatures since they exist (NVML's header).
            unsafe {
                let init: Init = std::mem::transmute(init);
                (init() == 0).then(|| Library {
                    handle: std::mem::transmute::<*mut c_void, Handle>(handle),
                    memory: std::mem::transmute::<*mut c_void, Memory>(memory),
                })
            }
        }

        /// Free bytes of the device at `bus`.
        pub fn free(&self, bus: &CStr) -> Option<u64> {
            let (mut device, mut memory) = (null_mut(), [0u64; 3]);
            // SAFETY: the library is started; the bus id ends in zero; results go to live places. The memory structure is three
            // 64-bit numbers: total, free, used.
            let told = unsafe {
                (self.handle)(bus.as_ptr(), &mut device) == 0 && (self.memory)(device, &mut memory) == 0
            };
            told.then_some(memory[1])
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod library {
    pub struct Library;

    impl Library {
        pub fn open() -> Option<Library> {
            None
        }

        pub fn free(&self, _bus: &std::ffi::CStr) -> Option<u64> {
            None
        }
    }
}

/// Free bytes of the device at `bus`, if the library is there.
pub(super) fn free_bytes(bus: &std::ffi::CStr) -> Option<u64> {
    static LIBRARY: OnceLock<Option<library::Library>> = OnceLock::new();
    LIBRARY.get_or_init(library::Library::open).as_ref()?.free(bus)
}
