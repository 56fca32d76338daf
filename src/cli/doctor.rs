//! `millrace doctor`: what this machine has.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use millrace::compiler::codegen::cuda::nvrtc_version;
use millrace::kernels::cpu::{Isa, Pool, ceilings};
use millrace::runtime::cuda::{Rates, has_library, rates, survey};
use millrace::{Error, Result};
use serde_json::json;

use super::ceilings::matmul_gflops;
use super::{print, print_json, size};

/// Report what this machine has and what it can do at most.
#[derive(clap::Args)]
pub struct Args {
    /// Measure arithmetic and memory rates (takes a few seconds)
    #[arg(long)]
    measure: bool,
    /// With --measure, also the rate at which this file is read: an engine whose weights are to stream from it
    #[arg(long, value_name = "FILE", requires = "measure")]
    file: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// A driver's number, 13000, as people write it: 13.0.
fn cuda_version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// GB/s of reading `path` from its beginning in pieces of 32 MiB, for about two seconds at most. What the system has cached of it
/// is read from there.
fn file_gbs(path: &Path) -> Result<f64> {
    let fail = |e: std::io::Error| Error::io("read", path, &e);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let mut buffer = vec![0; 32 << 20];
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed().as_secs_f64() < 2.0 {
        match file.read(&mut buffer).map_err(fail)? {
            0 => break,
            read => bytes += read,
        }
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64() / 1e9)
}

/// What a GPU can do at most.
struct Measured {
    rates: Rates,
    matmul_gflops: Result<f64>,
}

impl Measured {
    fn of(index: u32) -> Option<Measured> {
        Some(Measured { rates: rates(index).ok()?, matmul_gflops: matmul_gflops(index) })
    }

    fn text(&self, index: u32) -> String {
        let Rates { read_gbs, up_gbs, down_gbs } = self.rates;
        let matmul = match &self.matmul_gflops {
            Ok(rate) => format!("{:.0} TFLOP/s", rate / 1e3),
            Err(error) => format!("not measured ({error})"),
        };
        format!(
            "gpu {index}: memory read {read_gbs:.0} GB/s, pinned copy {up_gbs:.1} GB/s up and {down_gbs:.1} down, \
             bf16 matmul of 8192^3 {matmul}\n"
        )
    }
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::detect();
    let rates =
        args.measure.then(|| (ceilings::fma_gflops(&Pool::new(1)), ceilings::read_gbs(&Pool::new(threads))));
    let file = args.file.as_deref().map(file_gbs).transpose()?;
    let nvrtc = nvrtc_version();
    let gpus = survey();
    let measured: Vec<Option<Measured>> =
        gpus.devices.iter().map(|d| args.measure.then(|| Measured::of(d.index)).flatten()).collect();
    if args.json {
        return print_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "targets": ["cpu", "cuda"],
            "cpu": {"threads": threads, "instruction_set": format!("{isa:?}").to_lowercase()},
            "fma_gflops_per_thread": rates.map(|r| r.0),
            "memory_read_gbs": rates.map(|r| r.1),
            "file_read_gbs": file,
            "nvrtc": nvrtc.as_ref().ok().map(|v| format!("{}.{}", v.0, v.1)),
            "cuda_driver": gpus.driver.map(cuda_version),
            "gpus": gpus.devices.iter().zip(&measured).map(|(d, m)| json!({
                "index": d.index,
                "name": d.name,
                "architecture": format!("sm_{}", d.capability),
                "target": d.target().map(|t| format!("cuda:{t}")),
                "multiprocessors": d.multiprocessors,
                "memory_bytes": d.memory,
                "read_gbs": m.as_ref().map(|m| m.rates.read_gbs),
                "to_device_gbs": m.as_ref().map(|m| m.rates.up_gbs),
                "from_device_gbs": m.as_ref().map(|m| m.rates.down_gbs),
                "matmul_gflops": m.as_ref().and_then(|m| m.matmul_gflops.as_ref().ok()),
            })).collect::<Vec<_>>(),
            "cublaslt": has_library(),
            "gpu_problem": gpus.problem.as_ref().map(ToString::to_string),
        }));
    }
    print(&format!("millrace {}\ncpu: {threads} threads, {isa:?}\n", env!("CARGO_PKG_VERSION")))?;
    match &nvrtc {
        Ok((major, minor)) => print(&format!("nvrtc: {major}.{minor}, CUDA engines can be built here\n"))?,
        Err(error) => print(&format!("nvrtc: none ({error})\n"))?,
    }
    let library =
        if has_library() { "installed" } else { "none; engines run kernels of their own in its place" };
    print(&format!("cublaslt: {library}\n"))?;
    for (gpu, measured) in gpus.devices.iter().zip(&measured) {
        print(&format!(
            "gpu {}: {}, sm_{} ({}), {} multiprocessors, {}\n",
            gpu.index,
            gpu.name,
            gpu.capability,
            gpu.target().map_or("too old".to_string(), |t| format!("--target cuda:{t}")),
            gpu.multiprocessors,
            size::show(gpu.memory)
        ))?;
        if let Some(measured) = measured {
            print(&measured.text(gpu.index))?;
        }
    }
    if let Some(problem) = &gpus.problem {
        print(&format!("gpu: none ({problem})\n"))?;
    }
    if let Some(gbs) = file {
        print(&format!("file read: {gbs:.2} GB/s (`fit --link-rate {:.0}MB`)\n", gbs * 1e3))?;
    }
    match rates {
        Some((gflops, gbs)) => {
            print(&format!("f32 multiply-add: {gflops:.0} GFLOP/s a thread\nmemory read: {gbs:.1} GB/s\n"))
        }
        None => print("add --measure for arithmetic and memory rates\n"),
    }
}
