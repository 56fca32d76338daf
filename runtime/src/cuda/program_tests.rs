use millrace_ir::Dim;
use millrace_ir::launch::{Helper, LaunchStep, Variant};

use super::super::testing::{encoded, engine};
use super::*;
use crate::cuda::survey;
use crate::options::{Device, SessionOptions};

fn table(arch: &str) -> LaunchTable {
    let step = |first| {
        let variants = vec![Variant { when: Vec::new(), launches: Vec::new() }];
        LaunchStep { first, nodes: 1, variants }
    };
    LaunchTable {
        arch: arch.into(),
        kernels: Vec::new(),
        steps: (0..3).map(step).collect(),
        workspace: Dim::from(0u64),
        counters: 0,
        helpers: Vec::new(),
    }
}

#[test]
fn a_device_gets_the_table_of_its_architecture() {
    let sections = ["sm_80", "sm_90a"].map(|arch| (arch, encoded(table(arch))));
    let engine = engine("cuda", &sections);
    assert_eq!(bundle(&engine, 90).unwrap().table.arch, "sm_90a");
    assert_eq!(bundle(&engine, 80).unwrap().table.arch, "sm_80");
    assert_eq!(bundle(&engine, 120).unwrap_err().code(), "cuda/arch");
}

#[test]
fn forged_sections_are_refused() {
    let refused = |table: LaunchTable| {
        let engine = engine("cuda", &[("sm_90a", encoded(table))]);
        bundle(&engine, 90).unwrap_err().code()
    };
    assert_eq!(refused(table("sm_80")), "engine/forged");
    let mut short = table("sm_90a");
    short.steps.pop();
    assert_eq!(refused(short), "engine/forged");
    let mut helper = table("sm_90a");
    helper.helpers.push(Helper { name: "argmax_split".into(), kernel: 0, threads: 256 });
    assert_eq!(refused(helper), "engine/launch-table");
    let damaged = engine("cuda", &[("sm_90a", b"nothing".to_vec())]);
    assert_eq!(bundle(&damaged, 90).unwrap_err().code(), "engine/launch-table");
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
