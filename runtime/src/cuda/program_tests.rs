use millrace_ir::Dim;
use millrace_ir::launch::{DeviceKernel, Helper, Launch, LaunchStep, Variant};

use super::super::testing::{encoded, engine};
use super::*;
use crate::cuda::survey;
use crate::options::{Device, SessionOptions};

fn device(capability: u32) -> Limits {
    Limits { capability, max_shared: 227 << 10 }
}

fn table(arch: &str) -> LaunchTable {
    let step = |first| {
        let variants = vec![Variant { when: Vec::new(), launches: Vec::new(), library: None }];
        LaunchStep { first, nodes: 1, variants, streamed: Vec::new() }
    };
    LaunchTable {
        arch: arch.into(),
        kernels: Vec::new(),
        steps: (0..3).map(step).collect(),
        workspace: Dim::from(0u64),
        counters: 0,
        library_workspace: 0,
        helpers: Vec::new(),
    }
}

#[test]
fn a_device_gets_the_table_of_its_architecture() {
    let sections = ["sm_80", "sm_90a"].map(|arch| (arch, encoded(table(arch))));
    let engine = engine("cuda", &sections);
    assert_eq!(bundle(&engine, device(90)).unwrap().table.arch, "sm_90a");
    assert_eq!(bundle(&engine, device(80)).unwrap().table.arch, "sm_80");
    assert_eq!(bundle(&engine, device(120)).unwrap_err().code(), "cuda/arch");
}

#[test]
fn ptx_is_for_devices_that_no_image_fits() {
    let mut wide = table("sm_80");
    wide.kernels.push(DeviceKernel {
        entry: "k".into(),
        family: "cuda.test".into(),
        source: String::new(),
        image: 0,
        registers: 1,
        shared: 0,
        local: 0,
    });
    let launch = Launch {
        kernel: 0,
        grid: [Dim::from(1u64), Dim::from(1u64), Dim::from(1u64)],
        block: [32, 1, 1],
        cluster: 1,
        shared: 150 << 10,
        dependent: false,
        tiles: None,
        args: Vec::new(),
    };
    wide.steps[0].variants[0].launches.push(launch);
    let sections = [("sm_80", encoded(wide)), ("compute_80", encoded(table("compute_80")))];
    let engine = engine("cuda", &sections);
    let arch = |limits| bundle(&engine, limits).unwrap().table.arch;
    assert_eq!(arch(device(80)), "sm_80");
    assert_eq!(arch(device(90)), "compute_80");
    assert_eq!(arch(device(120)), "compute_80");
    assert_eq!(bundle(&engine, device(75)).unwrap_err().code(), "cuda/arch");
    // A smaller part of the generation lacks the shared memory.
    assert_eq!(arch(Limits { capability: 86, max_shared: 99 << 10 }), "compute_80");
}

#[test]
fn forged_sections_are_refused() {
    let refused = |table: LaunchTable| {
        let engine = engine("cuda", &[("sm_90a", encoded(table))]);
        bundle(&engine, device(90)).unwrap_err().code()
    };
    assert_eq!(refused(table("sm_80")), "engine/forged");
    let mut short = table("sm_90a");
    short.steps.pop();
    assert_eq!(refused(short), "engine/forged");
    let mut helper = table("sm_90a");
    helper.helpers.push(Helper { name: "argmax_split".into(), kernel: 0, threads: 256 });
    assert_eq!(refused(helper), "engine/launch-table");
    let damaged = engine("cuda", &[("sm_90a", b"nothing".to_vec())]);
    assert_eq!(bundle(&damaged, device(90)).unwrap_err().code(), "engine/launch-table");
}

#[test]
fn without_a_gpu_a_session_is_an_error_that_says_so() {
    let engine = engine("cuda", &[("sm_90a", encoded(table("sm_90a")))]);
    let on_cpu = SessionOptions { device: Some(Device::Cpu), ..SessionOptions::default() };
    assert_eq!(engine.session(on_cpu).err().map(|e| e.code()), Some("engine/target"));
    if let Some(problem) = survey().problem {
        let found = engine.session(SessionOptions::default()).err().map(|e| (e.code(), e.kind()));
        assert_eq!(found, Some((problem.code(), problem.kind())));
    }
}

#[test]
fn engines_of_the_cpu_stay_there() {
    let engine = engine("cpu", &[]);
    let options = SessionOptions { device: Some(Device::Cuda(0)), ..SessionOptions::default() };
    let error = engine.session(options).err().unwrap();
    assert_eq!((error.code(), error.kind().exit_code()), ("engine/target", 5));
}
