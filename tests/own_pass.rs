//! The example of a pass from outside works, in filetests and in a level.

#[path = "../examples/own_pass.rs"]
#[allow(dead_code)]
mod own_pass;

use std::path::Path;

#[test]
fn its_filetests_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/own_pass");
    match millrace::filetest::run(&folder, &own_pass::registry().unwrap()) {
        Ok(files) => assert_eq!(files, 1),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn its_level_contains_it() {
    let registry = own_pass::registry().unwrap();
    let level = registry.level(2).unwrap().to_string();
    assert!(level.starts_with("cancel-neg,rolled{fixpoint{canonicalize,"), "{level}");
    assert_eq!(registry.pipeline("O2").unwrap().to_string(), level);
    assert!(
        registry.with_level(0, "cancel-negg").unwrap_err().to_string().contains("did you mean `cancel-neg`?")
    );
}
