//! What the hardware of a run can do at most, measured: the ceilings of `bench --profile` and `doctor --measure`.

use std::time::Duration;

use millrace::compiler::target::TargetChoice;
use millrace::ir::{DType, Kind};
use millrace::kernels::cpu::{Pool, ceilings};
use millrace::kernels::cuda::Arch;
use millrace::runtime::cuda::{DeviceInfo, rates, survey};
use millrace::{CompileOptions, Device, Engine, Error, Profile, Result, SessionOptions, TensorRef, compile};
use serde_json::{Value, json};

use super::run::Scratch;

/// Rates that no kernel of a run should exceed.
#[derive(Clone, Copy)]
pub struct Ceilings {
    /// Arithmetic in GFLOP/s, if it could be measured.
    pub gflops: Option<f64>,
    /// Memory read rate in GB/s.
    pub read_gbs: f64,
    /// What the arithmetic is.
    pub arithmetic: &'static str,
}

impl Ceilings {
    /// Those of the processor with `threads` threads; takes a second or two. The multiply-add rate is that of one
    /// thread times `threads`.
    pub fn of_cpu(threads: usize) -> Self {
        Ceilings {
            gflops: Some(ceilings::fma_gflops(&Pool::new(1)) * threads as f64),
            read_gbs: ceilings::read_gbs(&Pool::new(threads)),
            arithmetic: "f32 multiply-add",
        }
    }

    /// Those of a GPU. Without NVRTC, which builds the matmul, its rate is missing.
    ///
    /// # Errors
    /// Those of [`rates`].
    pub fn of_gpu(index: u32) -> Result<Self> {
        let read_gbs = rates(index)?.read_gbs;
        Ok(Ceilings { gflops: matmul_gflops(index).ok(), read_gbs, arithmetic: "bf16 matmul of 8192^3" })
    }

    /// Those of `device`.
    ///
    /// # Errors
    /// Those of [`Ceilings::of_gpu`].
    pub fn of(device: Device, threads: usize) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Ceilings::of_cpu(threads)),
            Device::Cuda(index) => Ceilings::of_gpu(index),
        }
    }

    /// A rate in percent of the arithmetic, or a dash.
    pub fn percent_of_peak(&self, gflops: f64) -> String {
        self.gflops.map_or_else(|| "-".to_string(), |most| format!("{:.1}", gflops / most * 100.0))
    }

    /// One line.
    pub fn line(&self) -> String {
        let arithmetic = match self.gflops {
            Some(rate) if rate >= 1e4 => format!("{:.0} TFLOP/s", rate / 1e3),
            Some(rate) => format!("{rate:.0} GFLOP/s"),
            None => "unknown".to_string(),
        };
        format!("{arithmetic} ({}) and {:.1} GB/s", self.arithmetic, self.read_gbs)
    }

    /// As an object.
    pub fn json(&self) -> Value {
        json!({"gflops": self.gflops, "arithmetic": self.arithmetic, "read_gbs": self.read_gbs})
    }
}

/// Extent of all axes of the matmul.
const SIDE: u64 = 8192;
/// Multiplications, of which the median counts.
const RUNS: usize = 9;

fn no_device(index: u32) -> Error {
    Error::new(Kind::Device, "cuda/no-such-device", format!("there is no GPU {index}"))
}

fn device(index: u32) -> Result<DeviceInfo> {
    let survey = survey();
    let found = survey.devices.into_iter().find(|d| d.index == index);
    found.ok_or_else(|| survey.problem.unwrap_or_else(|| no_device(index)))
}

/// Rate of a large matmul in bf16 by the kernels that engines get, of numbers like those of models.
///
/// # Errors
/// If it cannot be built, for lack of NVRTC, or run.
pub fn matmul_gflops(index: u32) -> Result<f64> {
    let capability = device(index)?.capability;
    let arch = Arch::ALL.into_iter().find(|a| a.capability() == capability);
    let arch = arch.ok_or_else(|| no_device(index))?;
    let text = format!(
        "module @ceiling phase imported {{
  dim $t in 1..={SIDE} hint {SIDE}
  weight @w : bf16[{SIDE}, {SIDE}] = random(seed = 1, std = 0.02)
  graph @main(%0 \"x\": bf16[$t, {SIDE}]) -> (\"y\": bf16[$t, {SIDE}]) {{
    %1 = matmul %0, @w {{transpose_b = true}} : bf16[$t, {SIDE}] loc(ceiling)
    return %1
  }}
}}
"
    );
    let scratch = Scratch::new()?;
    let (graph, file) = (scratch.0.join("ceiling.ir"), scratch.0.join("ceiling.engine"));
    std::fs::write(&graph, text).map_err(|e| Error::io("write", &graph, &e))?;
    let target = TargetChoice::parse(&format!("cuda:{}", arch.name()))?;
    let options = CompileOptions { pipeline: target.level(2), target, ..CompileOptions::default() };
    compile(&graph, &options, None)?.write(&file, &mut |_, _| {})?;
    let engine = Engine::open(&file)?;
    let device = Some(Device::Cuda(index));
    let mut session = engine.session(SessionOptions { device, ..SessionOptions::default() })?;
    // Numbers of both signs between 1 and 2.
    let number =
        |i: u64| (0x3f80u16 | (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u16 & 0x807f).to_le_bytes();
    let input: Vec<u8> = (0..SIDE * SIDE).flat_map(number).collect();
    session.attach_profile(Profile::new());
    for _ in 0..RUNS {
        session.run(&[TensorRef { dtype: DType::BF16, shape: &[SIDE, SIDE], bytes: &input }])?;
    }
    let steps = session.detach_profile().map(|p| p.steps).unwrap_or_default();
    let mut times: Vec<Duration> = steps.iter().map(|s| s.spans.iter().map(|n| n.duration).sum()).collect();
    times.sort();
    let seconds = times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64);
    if seconds <= 0.0 {
        return Err(Error::new(Kind::Internal, "cuda/ceiling", "a matmul took no time"));
    }
    Ok(2.0 * (SIDE as f64).powi(3) / seconds / 1e9)
}
