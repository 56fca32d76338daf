//! Matmuls of few rows with weights row by row, for a device: a driver launches every candidate, compares with sums in
//! double precision and among numbers of rows, and times it.
//!
//! `MILLRACE_CUDA_GEMV=folder cargo test -p millrace-kernels write_gemv -- --ignored` writes sources `g0.cu`, .. and
//! `gemv.json`.

use std::collections::BTreeMap;

use crate::cuda::Arch;
use crate::cuda::matmul::choice::{RANGES, RowRange, Way, candidates};
use crate::cuda::matmul::skinny::tests::{Case, case};
use crate::cuda::matmul::{Layout, Problem};
use crate::cuda::plan::Site;

use super::tiles::{Writer, at_rows};

/// Cases to time, those of a decoder with a hidden size of 2048, and cases to check.
fn cases() -> Vec<(&'static str, Case)> {
    let glu = |n, k| Case { segments: vec![n, n], norm: true, epilogue: "glu(silu)", ..case(n, k) };
    vec![
        ("1b.qkv", Case { segments: vec![2048, 512, 512], norm: true, ..case(0, 2048) }),
        ("1b.o", Case { epilogue: "residual", ..case(2048, 2048) }),
        ("1b.up", glu(8192, 2048)),
        ("1b.down", Case { epilogue: "residual", ..case(2048, 8192) }),
        ("1b.head", case(128256, 2048)),
        ("few", Case { segments: vec![7, 9], epilogue: "silu", ..case(0, 8) }),
        ("one", case(1, 1)),
        ("thousand", case(1000, 1000)),
        ("odd", Case { epilogue: "bias", norm: true, ..case(333, 1543) }),
        ("even", Case { epilogue: "gelu_tanh, residual", ..case(129, 1030) }),
        ("glu33", glu(33, 22)),
        ("three", Case { segments: vec![130, 70, 9], epilogue: "bias, relu", norm: true, ..case(0, 2056) }),
        ("gated", Case { segments: vec![41, 41], epilogue: "bias, glu(gelu), mul", ..case(0, 4100) }),
    ]
}

/// Problems with their ways, and the kernels by text.
fn written() -> (Vec<String>, BTreeMap<(Arch, String), usize>) {
    let (mut out, mut kernels) = (Vec::new(), BTreeMap::new());
    for (name, case) in cases() {
        for dtype in ["f32", "bf16", "f16"] {
            let timed = name.starts_with("1b.");
            if dtype != "f32" && (timed || case.k.is_multiple_of(8)) {
                continue;
            }
            let module = case.module(Layout::Rows, dtype);
            let nodes = module.graph.order.clone();
            let problem = Problem::of(Site { module: &module, nodes: &nodes, arch: Arch::Sm90a }).unwrap();
            let problem = Problem { whole: true, ..problem };
            let rows: &[u64] = match timed {
                true if name == "1b.head" => &[1, 4, 8, 16, 32],
                true => &[1, 4, 8, 16, 32, 64, 128, 256],
                false => &[1, 2, 4, 7, 9, 16, 17, 61, 129],
            };
            for m in rows {
                let range = RANGES.into_iter().find(|r| (r.first..=r.last).contains(m)).unwrap();
                let ways = candidates(&problem, range);
                let keep = |way: &Way, at: usize| at < 2 || *way == Way::Simple || timed && *m <= 16;
                let ways: Vec<Way> = ways
                    .into_iter()
                    .enumerate()
                    .filter(|(at, way)| keep(way, *at))
                    .map(|(_, way)| way)
                    .collect();
                let mut writer =
                    Writer { module: &module, nodes: &nodes, arch: Arch::Sm90a, kernels: &mut kernels };
                let bindings = at_rows(*m);
                let ways: Vec<String> = ways
                    .iter()
                    .map(|way| {
                        let launches: Vec<String> = way
                            .launches(&problem)
                            .unwrap()
                            .iter()
                            .map(|launch| writer.launch(launch, &bindings))
                            .collect();
                        format!("{{\"name\": \"{}\", \"launches\": [{}]}}", way.name(), launches.join(", "))
                    })
                    .collect();
                let RowRange { first, last, .. } = range;
                out.push(format!(
                    "{{\"name\": \"{name}\", \"timed\": {timed}, \"m\": {m}, \"range\": [{first}, {last}], \"dtype\": \"{dtype}\", \
                     \"k\": {}, \"segments\": {:?}, \"gated\": {}, \"norm\": {}, \"epilogue\": \"{}\", \"ways\": [{}]}}",
                    case.k,
                    case.segments,
                    problem.gated(),
                    case.norm,
                    case.epilogue,
                    ways.join(", ")
                ));
            }
        }
    }
    (out, kernels)
}

#[test]
fn every_case_has_a_gemv_and_tiles() {
    let (problems, kernels) = written();
    assert!(problems.iter().all(|p| p.contains("\"gemv-r") && p.contains("\"simple\"")));
    assert!(problems.len() > 100 && kernels.len() > 100, "{} {}", problems.len(), kernels.len());
}

#[test]
#[ignore = "writes launches for a device into the folder MILLRACE_CUDA_GEMV"]
fn write_gemv() {
    let folder = super::folder("MILLRACE_CUDA_GEMV");
    let (problems, kernels) = written();
    for ((_, text), at) in &kernels {
        std::fs::write(folder.join(format!("g{at}.cu")), text).unwrap();
    }
    let json = format!("{{\"problems\": [\n{}\n]}}", problems.join(",\n"));
    std::fs::write(folder.join("gemv.json"), json).unwrap();
}
