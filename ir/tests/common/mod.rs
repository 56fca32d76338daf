//! What the tests of the text form share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

/// A path below the crate's folder.
pub fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

/// Name and text of every module in `tests/modules`, by name.
pub fn modules() -> Vec<(String, String)> {
    let folder = path("tests/modules");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|file| file.extension().is_some_and(|e| e == "ir"))
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|file| {
            let name = file.file_stem().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&file).unwrap())
        })
        .collect()
}

/// Fails at the first line in which `text` differs from its canonical form.
pub fn assert_canonical(name: &str, text: &str, printed: &str) {
    for (number, (line, canonical)) in text.lines().zip(printed.lines()).enumerate() {
        assert_eq!(line, canonical, "{name}: line {} is not canonical", number + 1);
    }
    assert_eq!(text, printed, "{name} is not canonical");
}

/// Numbers that look random and are the same in every run (splitmix64, Steele et al. 2014).
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 for an empty range.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { (self.next() % bound as u64) as usize }
    }
}
