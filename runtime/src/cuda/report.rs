//! What there is to tell about devices and graphs.

use millrace_ir::Error;

use super::driver::{DeviceInfo, device_count, device_info, no_device, start};

/// What this machine has.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Version of CUDA the driver is for: 13000 is 13.0. `None` without a usable driver.
    pub driver: Option<u32>,
    /// Devices, by number.
    pub devices: Vec<DeviceInfo>,
    /// Why CUDA engines cannot run here: `cuda/no-driver`, `cuda/driver-too-old`, `cuda/no-device` or a failure of
    /// the driver.
    pub problem: Option<Error>,
}

/// Looks at the driver and the devices; reserves nothing on them.
pub fn survey() -> Survey {
    let driver = match start() {
        Ok(driver) => driver,
        Err(problem) => return Survey { driver: None, devices: Vec::new(), problem: Some(problem) },
    };
    let devices = device_count().and_then(|n| (0..n).map(device_info).collect::<Result<Vec<_>, _>>());
    match devices {
        Ok(devices) => {
            let problem = devices.is_empty().then(no_device);
            Survey { driver: Some(driver), devices, problem }
        }
        Err(problem) => Survey { driver: Some(driver), devices: Vec::new(), problem: Some(problem) },
    }
}

/// The pool that a dynamic session takes device memory from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolReport {
    /// Bytes that the pool has taken from the device.
    pub reserved: u64,
    /// Bytes of them that are in use.
    pub used: u64,
    /// Most bytes that it ever had taken.
    pub most_reserved: u64,
    /// Most bytes that were ever in use.
    pub most_used: u64,
}

impl PoolReport {
    /// Bytes that the pool has and nobody uses: what trimming may give back.
    pub fn free(&self) -> u64 {
        self.reserved.saturating_sub(self.used)
    }
}

/// What has become of CUDA graphs in a session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GraphReport {
    /// Whether the session may use them.
    pub enabled: bool,
    /// Graphs recorded so far.
    pub recorded: u64,
    /// Graphs held now.
    pub held: u64,
    /// Steps that replayed a graph.
    pub replayed: u64,
    /// Steps whose kernels were launched one by one.
    pub plain: u64,
    /// Kernels and copies of the last step.
    pub last_launches: u64,
    /// Why the last recording that failed did so; its steps run one by one.
    pub failure: Option<Error>,
}

/// What has become of the products that an engine may have a library compute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LibraryReport {
    /// Variants of the launch table that name the library.
    pub variants: usize,
    /// Version of cuBLASLt, 130100 is 13.1; `None` if kernels run everywhere.
    pub version: Option<u64>,
    /// Bytes of scratch memory that it got.
    pub bytes: u64,
    /// Why kernels run instead, each reason once: of everything, or of products it does not take.
    pub reasons: Vec<String>,
    /// Products of the last step.
    pub last_products: u64,
}

impl std::fmt::Display for LibraryReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let LibraryReport { variants, version, bytes, reasons, .. } = self;
        match version {
            Some(version) => {
                let (major, minor, patch) = (version / 10000, version / 100 % 100, version % 100);
                write!(
                    f,
                    "cuBLASLt {major}.{minor}.{patch} computes what {variants} variants of the engine name it for, with {bytes} \
                     bytes of scratch memory"
                )?;
                match reasons.is_empty() {
                    true => Ok(()),
                    false => write!(f, "; kernels run the rest: {}", reasons.join("; ")),
                }
            }
            None => write!(
                f,
                "kernels run {variants} variants that the engine names cuBLASLt for: {}",
                reasons.join("; ")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{is_fatal, present, too_old};
    use super::*;

    #[test]
    fn no_driver_is_an_answer() {
        let survey = survey();
        match survey.problem {
            None => assert!(survey.driver.is_some() && !survey.devices.is_empty()),
            Some(problem) => {
                assert!(survey.devices.is_empty());
                assert_eq!(problem.code() == "cuda/no-driver", !present());
                assert!(problem.code().starts_with("cuda/"), "{problem}");
            }
        }
    }

    #[test]
    fn an_old_driver_is_told_by_its_numbers() {
        let error = too_old(11080);
        assert_eq!(error.message(), "the driver is for CUDA 11.8, 12.0 or later is needed");
        assert_eq!((error.code(), error.kind().exit_code()), ("cuda/driver-too-old", 5));
    }

    #[test]
    fn faults_of_kernels_are_fatal_and_refusals_are_not() {
        assert!([700, 702, 710, 715, 716, 719, 999].into_iter().all(is_fatal));
        // Invalid value, out of memory, not found, launch out of resources, not ready.
        assert!(![1, 2, 500, 701, 600].into_iter().any(is_fatal));
    }
}
