//! What `millrace explain` shows of Millrace's own passes: the header of the source file, and an example that a test
//! runs.

macro_rules! pages {
    ($($name:literal $file:literal),* $(,)?) => {
        /// The source file of the pass called `name`, empty for passes from elsewhere.
        pub(crate) fn doc(name: &str) -> &'static str {
            match name {
                $($name => include_str!(concat!($file, ".rs")),)*
                _ => "",
            }
        }

        /// The example of the pass called `name`, empty for passes from elsewhere.
        pub(crate) fn example(name: &str) -> &'static str {
            match name {
                $($name => include_str!(concat!("examples/", $name, ".ir")),)*
                _ => "",
            }
        }
    };
}

pages! {
    "canonicalize" "canonicalize",
    "const-fold" "const_fold",
    "cse" "cse",
    "dce" "dce",
    "recover" "recover/mod",
    "begin-fusion" "begin_fusion",
    "fuse-linear" "fuse_linear",
    "merge-matmuls" "merge_matmuls",
    "fuse-glu" "fuse_glu",
    "fuse-add-norm" "fuse_add_norm",
    "fuse-epilogue" "fuse_epilogue",
    "fuse-pointwise" "fuse_pointwise",
    "chunk-mlp" "chunk_mlp",
    "chunk-attention" "chunk_attention/mod",
    "pack-weights" "pack_weights",
    "schedule" "schedule",
    "group-launches" "group_launches",
    "plan-memory" "plan_memory",
    "mark-streamable" "mark_streamable",
}

/// The documentation in `doc`: the `//!` header of a source file, or the text itself.
pub fn header(doc: &str) -> String {
    if !doc.starts_with("//!") {
        return doc.trim_end().to_string();
    }
    let lines = doc.lines().map_while(|l| l.strip_prefix("//!")).map(|l| l.strip_prefix(' ').unwrap_or(l));
    let mut text: String = lines.filter(|l| !l.starts_with("```")).map(|l| format!("{l}\n")).collect();
    text.truncate(text.trim_end().len());
    text
}
