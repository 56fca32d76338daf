//! Building device images: in parallel, cached by the hash of everything that enters, and held against what each kernel
//! promises.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use millrace_ir::launch::DeviceKernel;
use millrace_ir::{Error, Kind, Result};
use millrace_kernels::cuda::{Arch, Source};

use super::nvrtc;
use crate::compile::hex;

/// A kernel to build: its source and for which architecture.
#[derive(Clone, Copy)]
pub struct Order<'a> {
    /// The source.
    pub source: &'a Source,
    /// The architecture.
    pub arch: Arch,
}

/// A kernel that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// What goes into the launch table; [`DeviceKernel::image`] is 0.
    pub kernel: DeviceKernel,
    /// The device image.
    pub image: Vec<u8>,
}

/// How many kernels came from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BuildCounts {
    /// Compiled now.
    pub compiled: usize,
    /// Read from the cache.
    pub cached: usize,
}

/// Builds kernels.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    /// Folder of the cache; none for no cache.
    pub cache: Option<PathBuf>,
    /// Threads; one for each processor by default.
    pub threads: Option<usize>,
    /// Build nothing: kernels get names and no images. For plans of engines that are not written.
    pub plan_only: bool,
}

/// A kernel and whether the cache had it, or why there is none.
type Outcome = Result<(Built, bool)>;

/// What a line of the cache begins with: a change of the format changes it.
const FORMAT: &str = "millrace kernel 1";

impl Builder {
    /// With the cache in its usual place: `$MILLRACE_KERNEL_CACHE`, or `millrace/kernels` in the user's cache folder.
    pub fn usual() -> Builder {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache = var("MILLRACE_KERNEL_CACHE").or_else(|| {
            let base = var("XDG_CACHE_HOME").or_else(|| var("HOME").map(|h| h.join(".cache")))?;
            Some(base.join("millrace").join("kernels"))
        });
        Builder { cache, ..Builder::default() }
    }

    /// Builds all of `orders`; results are in their order.
    ///
    /// # Errors
    /// `compile/no-nvrtc` if something has to be compiled without NVRTC, `compile/nvrtc` and `compile/kernel-promise` for
    /// a kernel that does not compile or breaks its promise.
    pub fn build(&self, orders: &[Order<'_>]) -> Result<(Vec<Built>, BuildCounts)> {
        let mut counts = BuildCounts::default();
        let mut built = Vec::with_capacity(orders.len());
        let mut skipped = false;
        for outcome in self.outcomes(orders, true) {
            match outcome {
                Some(result) => {
                    let (kernel, cached) = result?;
                    counts.cached += usize::from(cached);
                    counts.compiled += usize::from(!cached);
                    built.push(kernel);
                }
                None => skipped = true,
            }
        }
        if skipped {
            return Err(Error::new(Kind::Internal, "compile/nvrtc", "a kernel was not built"));
        }
        Ok((built, counts))
    }

    /// Builds each of `orders` for itself; results are in their order.
    pub fn build_each(&self, orders: &[Order<'_>]) -> Vec<Result<Built>> {
        let missing = || Error::new(Kind::Internal, "compile/nvrtc", "a kernel was not built");
        let outcomes = self.outcomes(orders, false).into_iter();
        outcomes.map(|o| o.ok_or_else(missing).and_then(|built| Ok(built?.0))).collect()
    }

    /// What became of each order; none for those that were not begun since another had failed.
    fn outcomes(&self, orders: &[Order<'_>], stop: bool) -> Vec<Option<Outcome>> {
        let results: Vec<Mutex<Option<Outcome>>> = orders.iter().map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.unwrap_or(processors).clamp(1, orders.len().max(1));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(at) =
                        Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < orders.len())
                    {
                        let built = self.one(&orders[at]);
                        let failed = stop && built.is_err();
                        if let Ok(mut slot) = results[at].lock() {
                            *slot = Some(built);
                        }
                        if failed {
                            next.store(orders.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        results.into_iter().map(|slot| slot.into_inner().unwrap_or_default()).collect()
    }

    fn one(&self, order: &Order<'_>) -> Result<(Built, bool)> {
        let options = options(order.arch);
        let hash = key(order.source, &options);
        let entry = format!("{}_{}", order.source.family.replace(['.', '-'], "_"), &hash[..12]);
        if self.plan_only {
            let family = order.source.family.to_string();
            let kernel =
                DeviceKernel { entry, family, source: hash, image: 0, registers: 0, shared: 0, local: 0 };
            return Ok((Built { kernel, image: Vec::new() }, false));
        }
        // The version is part of the key where a compiler is at hand; without one, any version's image serves.
        let version = nvrtc::version().ok();
        let file = self.cache.as_ref().map(|c| c.join(format!("{hash}.{}.kernel", order.arch)));
        if let Some(bytes) = file.as_ref().and_then(|f| std::fs::read(f).ok())
            && let Some((found, log, image)) = read_cached(&bytes)
            && version.is_none_or(|v| found == format!("{}.{}", v.0, v.1))
        {
            let kernel = inspect(order, &entry, &hash, &log)?;
            return Ok((Built { kernel, image: image.to_vec() }, true));
        }
        let (major, minor) = nvrtc::version()?;
        let text = format!("#define KERNEL {entry}\n{}", order.source.text);
        let image = nvrtc::compile(&text, &options)
            .map_err(|e| e.at(format!("{} for {}", order.source.family, order.arch)))?;
        let kernel = inspect(order, &entry, &hash, &image.log)?;
        if let Some(file) = &file {
            // A cache that cannot be written costs time, nothing else.
            let _ = write_cached(file, &format!("{major}.{minor}"), &image.log, &image.bytes);
        }
        Ok((Built { kernel, image: image.bytes }, false))
    }
}

fn options(arch: Arch) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={arch}"),
        "--std=c++17".to_string(),
        "--ptxas-options=--verbose".to_string(),
    ];
    // Sources use neither textures nor launches from the device, and are read faster without their declarations.
    if nvrtc::version().is_ok_and(|version| version >= (13, 0)) {
        options.push("--minimal".to_string());
    }
    options
}

/// Hash of source and options, as hexadecimal digits.
fn key(source: &Source, options: &[String]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in options.iter().map(String::as_str).chain([source.family, source.text.as_str()]) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hex(hasher.finalize().as_bytes())
}

/// Version, log and image of a cached kernel whose hash is right.
fn read_cached(bytes: &[u8]) -> Option<(String, String, &[u8])> {
    let (hash, rest) = bytes.split_at_checked(32)?;
    if blake3::hash(rest).as_bytes() != hash {
        return None;
    }
    let (head, rest) = rest.split_at_checked(16)?;
    let log = u64::from_le_bytes(*head.first_chunk::<8>()?) as usize;
    let line = u64::from_le_bytes(*head.last_chunk::<8>()?) as usize;
    let (line, rest) = rest.split_at_checked(line)?;
    let (log, image) = rest.split_at_checked(log)?;
    let version = std::str::from_utf8(line).ok()?.strip_prefix(FORMAT)?.trim().to_string();
    Some((version, String::from_utf8_lossy(log).into_owned(), image))
}

fn write_cached(file: &Path, version: &str, log: &str, image: &[u8]) -> std::io::Result<()> {
    let line = format!("{FORMAT} {version}");
    let mut rest = Vec::with_capacity(image.len() + log.len() + 64);
    rest.extend((log.len() as u64).to_le_bytes());
    rest.extend((line.len() as u64).to_le_bytes());
    rest.extend(line.as_bytes());
    rest.extend(log.as_bytes());
    rest.extend(image);
    let mut bytes = blake3::hash(&rest).as_bytes().to_vec();
    bytes.extend(rest);
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Written beside and renamed: a reader sees the whole file or none.
    let part = file.with_extension(format!("part{}", std::process::id()));
    std::fs::write(&part, bytes)?;
    std::fs::rename(&part, file)
}

/// What the compiler reports about the entry point, against what the kernel promises.
fn inspect(order: &Order<'_>, entry: &str, hash: &str, log: &str) -> Result<DeviceKernel> {
    let usage = Usage::of(log, entry);
    let broken = |what: String| {
        Error::new(Kind::Internal, "compile/kernel-promise", what)
            .at(format!("{} for {}", order.source.family, order.arch))
            .hint("please report this with the model's configuration")
    };
    let promise = order.source.promise;
    if promise.no_local && usage.local > 0 {
        return Err(broken(format!("uses {} bytes of local memory, promised none", usage.local)));
    }
    if promise.registers > 0 && usage.registers > promise.registers {
        return Err(broken(format!("uses {} registers, promised {}", usage.registers, promise.registers)));
    }
    Ok(DeviceKernel {
        entry: entry.to_string(),
        family: order.source.family.to_string(),
        source: hash.to_string(),
        image: 0,
        registers: usage.registers,
        shared: usage.shared,
        local: usage.local,
    })
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    registers: u32,
    shared: u32,
    local: u32,
}

impl Usage {
    /// Reads the assembler's lines about `entry`.
    fn of(log: &str, entry: &str) -> Usage {
        let mut usage = Usage::default();
        let mut about = false;
        for line in log.lines() {
            if let Some(at) = line.find("Compiling entry function '") {
                about = line[at..].contains(&format!("'{entry}'"));
            }
            let number = |unit: &str| -> u32 {
                let before = line.find(unit).map(|at| line[..at].trim_end());
                let digits = before.and_then(|b| b.rsplit(|c: char| !c.is_ascii_digit()).next());
                digits.and_then(|d| d.parse().ok()).unwrap_or(0)
            };
            if about && line.contains("stack frame") {
                usage.local = number(" bytes stack frame") + number(" bytes spill stores");
            } else if about && line.contains("Used ") {
                usage.registers = number(" registers");
                usage.shared = number(" bytes smem");
            }
        }
        usage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas         .     64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 47 registers, used 0 barriers
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 32 bytes smem
";

    #[test]
    fn usage_is_that_of_the_entry() {
        assert_eq!(Usage::of(LOG, "k"), Usage { registers: 31, shared: 32, local: 12 });
        assert_eq!(Usage::of(LOG, "other"), Usage { registers: 47, shared: 0, local: 64 });
    }

    #[test]
    fn broken_promises_are_errors() {
        let promise = millrace_kernels::cuda::Promise { registers: 30, no_local: false };
        let mut source = Source { family: "cuda.test", text: String::new(), promise };
        let check = |source: &Source| inspect(&Order { source, arch: Arch::Sm80 }, "k", "", LOG);
        assert_eq!(check(&source).unwrap_err().code(), "compile/kernel-promise");
        source.promise.registers = 31;
        assert_eq!(check(&source).unwrap().registers, 31);
        source.promise.no_local = true;
        assert_eq!(check(&source).unwrap_err().code(), "compile/kernel-promise");
    }

    #[test]
    fn the_cache_gives_back_what_it_took_or_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("deep").join("x.kernel");
        write_cached(&file, "13.0", "a log", b"an image").unwrap();
        let mut bytes = std::fs::read(&file).unwrap();
        let (version, log, image) = read_cached(&bytes).unwrap();
        assert_eq!((version.as_str(), log.as_str(), image), ("13.0", "a log", b"an image".as_slice()));
        for at in [0, 31, 32, 40, 48, bytes.len() - 1] {
            bytes[at] ^= 1;
            assert!(read_cached(&bytes).is_none(), "{at}");
            bytes[at] ^= 1;
        }
        assert!(read_cached(&bytes[..20]).is_none());
    }
}
