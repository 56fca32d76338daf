use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::dtype::DType;

const F32_2X2: &str = r#""a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}"#;

/// A safetensors file with a header as given.
fn raw_file(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend((0..data).map(|i| i as u8));
    file
}

fn folder_with(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn open_single(file: &[u8]) -> Result<Checkpoint> {
    Checkpoint::open(folder_with(&[(SINGLE, file)]).path())
}

/// The code of the error, which must name a place and a next step.
#[track_caller]
fn code<T>(result: Result<T>) -> &'static str {
    let Err(error) = result else { panic!("accepted") };
    assert!(error.place().is_some() && error.next_step().is_some(), "{error}");
    error.code()
}

#[track_caller]
fn rejects(header: &str, data: usize, expected: &str) {
    assert_eq!(code(open_single(&raw_file(header, data))), expected, "{header}");
}

#[test]
fn reads_what_was_written() {
    let ids: Vec<u8> = [1i64, -2, 3].iter().flat_map(|v| v.to_le_bytes()).collect();
    let half: Vec<u8> = (0..24).collect();
    let tensors: [NamedTensor<'_>; 4] = [
        ("w.b", DType::BF16, &[3, 4], &half),
        ("w.a", DType::I64, &[3], &ids),
        ("scalar", DType::Bool, &[], &[1]),
        ("empty", DType::F32, &[0, 7], &[]),
    ];
    let bytes = safetensors_bytes(&tensors).unwrap();
    let checkpoint = open_single(&bytes).unwrap();
    let names: Vec<_> = checkpoint.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["empty", "scalar", "w.a", "w.b"]);
    for (name, dtype, shape, data) in tensors {
        let info = checkpoint.tensor(name).unwrap();
        assert_eq!((info.dtype, info.shape.as_slice(), info.bytes), (dtype, shape, data.len() as u64));
        assert_eq!(checkpoint.read_all(name).unwrap(), data);
    }
    let mut part = [0; 5];
    checkpoint.read_at("w.b", 7, &mut part).unwrap();
    assert_eq!(part, [7, 8, 9, 10, 11]);
    assert_eq!(checkpoint.files(), [CheckpointFile { name: SINGLE.into(), bytes: bytes.len() as u64 }]);
    assert_eq!(checkpoint.total_bytes(), 49);

    // The reference implementation of the format agrees.
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.tensor("w.b").unwrap().data(), half);
    assert_eq!(reference.tensor("w.a").unwrap().shape(), [3]);
    assert_eq!(reference.len(), 4);
}

#[test]
fn reads_what_the_reference_implementation_wrote() {
    let data: Vec<u8> = (0..48).collect();
    let view = |dtype, shape: &[usize], range: std::ops::Range<usize>| {
        safetensors::tensor::TensorView::new(dtype, shape.to_vec(), &data[range]).unwrap()
    };
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(
        [
            ("x", view(safetensors::Dtype::F16, &[2, 3], 0..12)),
            ("y", view(safetensors::Dtype::F8_E4M3, &[5], 12..17)),
            ("z", view(safetensors::Dtype::I32, &[4], 20..36)),
        ],
        Some(metadata),
    )
    .unwrap();
    let checkpoint = open_single(&bytes).unwrap();
    assert_eq!(checkpoint.read_all("x").unwrap(), data[0..12]);
    assert_eq!(checkpoint.read_all("y").unwrap(), data[12..17]);
    assert_eq!(checkpoint.read_all("z").unwrap(), data[20..36]);
    assert_eq!(checkpoint.tensor("y").unwrap().dtype, DType::F8E4M3);
}

#[test]
fn reads_outside_a_tensor_are_errors() {
    let checkpoint = open_single(&raw_file(&format!("{{{F32_2X2}}}"), 16)).unwrap();
    let mut buf = [0; 8];
    assert_eq!(checkpoint.read_at("a", 9, &mut buf).unwrap_err().code(), "checkpoint/read-range");
    assert_eq!(checkpoint.read_at("a", u64::MAX, &mut buf).unwrap_err().code(), "checkpoint/read-range");
    assert_eq!(checkpoint.read_at("b", 0, &mut buf).unwrap_err().code(), "checkpoint/no-tensor");
    assert!(checkpoint.info("b").is_none());
}

#[test]
fn a_file_cut_while_open_is_an_error() {
    let folder = folder_with(&[(SINGLE, &raw_file(&format!("{{{F32_2X2}}}"), 16))]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(folder.path().join(SINGLE)).unwrap();
    file.set_len(40).unwrap();
    assert_eq!(code(checkpoint.read_all("a")), "checkpoint/changed");
}

#[test]
fn memory_source_behaves_like_a_checkpoint() {
    let mut memory = MemorySource::new();
    memory.insert("a", DType::U8, &[4], vec![1, 2, 3, 4]).unwrap();
    assert_eq!(
        memory.insert("b", DType::F32, &[4], vec![0; 15]).unwrap_err().code(),
        "checkpoint/tensor-size"
    );
    let source: &dyn TensorSource = &memory;
    assert_eq!(source.read_all("a").unwrap(), [1, 2, 3, 4]);
    assert_eq!(source.info("a").unwrap().bytes, 4);
    assert_eq!(source.read_at("a", 2, &mut [0; 3]).unwrap_err().code(), "checkpoint/read-range");
    assert_eq!(source.read_all("c").unwrap_err().code(), "checkpoint/no-tensor");
}

#[test]
fn rejects_wrong_lengths() {
    for length in 0..8 {
        assert_eq!(code(open_single(&vec![0; length])), "checkpoint/truncated");
    }
    let mut file = raw_file(&format!("{{{F32_2X2}}}"), 16);
    let length = file.len() as u64;
    file[..8].copy_from_slice(&length.to_le_bytes());
    assert_eq!(code(open_single(&file)), "checkpoint/truncated");
    file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(code(open_single(&file)), "checkpoint/header-length");
}

#[test]
fn rejects_malformed_headers() {
    rejects("", 0, "checkpoint/header-json");
    rejects(" {}", 0, "checkpoint/header-json");
    rejects("[]", 0, "checkpoint/header-json");
    rejects("{} x", 0, "checkpoint/header-json");
    rejects(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#, 0, "checkpoint/header-json");
    rejects(r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,0]}}"#, 0, "checkpoint/header-json");
    rejects(r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4, "checkpoint/header-json");
    rejects(
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}"#,
        4,
        "checkpoint/header-json",
    );
    rejects(
        r#"{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#,
        4,
        "checkpoint/header-json",
    );
    rejects(r#"{"__metadata__":{"a":1}}"#, 0, "checkpoint/header-json");
    rejects(&"{\"a\":[".repeat(5000), 0, "checkpoint/header-json");
    let mut not_utf8 = raw_file(r#"{"a?":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, 0);
    not_utf8[8 + 3] = 0xff;
    assert_eq!(code(open_single(&not_utf8)), "checkpoint/header-json");
}

#[test]
fn rejects_duplicate_keys() {
    let twice = r#""b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    rejects(&format!("{{{twice},{twice}}}"), 0, "checkpoint/duplicate-key");
    rejects(r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0, "checkpoint/duplicate-key");
    rejects(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "checkpoint/duplicate-key");
}

#[test]
fn rejects_wrong_tensors() {
    let one = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
    };
    rejects(&one("F99", "[1]", 0, 4), 4, "checkpoint/dtype-unknown");
    rejects(&one("f32", "[1]", 0, 4), 4, "checkpoint/dtype-unknown");
    rejects(&one("F64", "[1]", 0, 8), 8, "checkpoint/dtype-unsupported");
    rejects(&one("F32", "[2]", 0, 4), 4, "checkpoint/tensor-size");
    rejects(&one("F32", "[]", 0, 0), 0, "checkpoint/tensor-size");
    rejects(&one("F32", "[4611686018427387904,4]", 0, 0), 0, "checkpoint/tensor-size");
    rejects(&one("F32", "[4611686018427387904]", 0, 0), 0, "checkpoint/tensor-size");
    rejects(&one("F32", "[1]", 4, 0), 4, "checkpoint/data-range");
    rejects(&one("F32", "[1]", 0, 4), 3, "checkpoint/data-range");
    rejects(&one("F32", "[1]", 18446744073709551611, 18446744073709551615), 4, "checkpoint/data-range");
    rejects(r#"{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, 0, "checkpoint/tensor-name");
    rejects(r#"{"a\nb":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, 0, "checkpoint/tensor-name");
}

#[test]
fn rejects_data_that_is_not_covered_once() {
    let two =
        |b: u64| format!(r#"{{{F32_2X2},"b":{{"dtype":"U8","shape":[4],"data_offsets":[{b},{}]}}}}"#, b + 4);
    assert!(open_single(&raw_file(&two(16), 20)).is_ok());
    rejects(&two(15), 20, "checkpoint/overlap");
    rejects(&two(0), 20, "checkpoint/overlap");
    rejects(&two(17), 21, "checkpoint/hole");
    rejects(&two(16), 21, "checkpoint/trailing-bytes");
}

#[test]
fn collects_problems_and_bounds_the_list() {
    let entries: Vec<String> =
        (0..30).map(|i| format!(r#""t{i}":{{"dtype":"F32","shape":[1],"data_offsets":[0,9]}}"#)).collect();
    let error = open_single(&raw_file(&format!("{{{}}}", entries.join(",")), 4)).unwrap_err();
    assert_eq!(error.code(), "checkpoint/data-range");
    assert!(error.message().starts_with("30 problems:"), "{error}");
    assert!(error.message().contains("model.safetensors: t19:"), "{error}");
    assert!(error.message().ends_with("and 10 more"), "{error}");
}

#[test]
fn folders_without_safetensors() {
    assert_eq!(code(Checkpoint::open(folder_with(&[]).path())), "checkpoint/no-weights");
    assert_eq!(
        code(Checkpoint::open(folder_with(&[("other.safetensors", b"")]).path())),
        "checkpoint/no-weights"
    );
    let error = Checkpoint::open(folder_with(&[("pytorch_model.bin", b"")]).path()).unwrap_err();
    assert_eq!((error.kind(), error.code()), (Kind::Unsupported, "checkpoint/pickle"));
    assert!(error.next_step().unwrap().contains("safetensors"));
    let folder = folder_with(&[("file", b"")]);
    assert_eq!(code(Checkpoint::open(folder.path().join("file"))), "checkpoint/not-a-folder");
    assert_eq!(code(Checkpoint::open(folder.path().join("none"))), "io/failed");
    fs::create_dir(folder.path().join(SINGLE)).unwrap();
    assert_eq!(code(Checkpoint::open(folder.path())), "io/failed");
}

fn sharded() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_sharded(
        folder.path(),
        &[
            ("model-1.safetensors", &[("b", DType::U8, &[2], &[1, 2]), ("c", DType::U8, &[1], &[3])]),
            ("model-2.safetensors", &[("a", DType::U8, &[3], &[4, 5, 6])]),
        ],
    )
    .unwrap();
    folder
}

fn set_index(folder: &TempDir, text: &str) {
    fs::write(folder.path().join(INDEX), text).unwrap();
}

#[test]
fn shards_read_as_one_checkpoint() {
    let folder = sharded();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names: Vec<_> = checkpoint.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(checkpoint.read_all("a").unwrap(), [4, 5, 6]);
    assert_eq!(checkpoint.read_all("c").unwrap(), [3]);
    assert_eq!(checkpoint.files().len(), 2);

    let single = tempfile::tempdir().unwrap();
    let tensors: [NamedTensor<'_>; 3] =
        [("a", DType::U8, &[3], &[0; 3]), ("b", DType::U8, &[2], &[0; 2]), ("c", DType::U8, &[1], &[0])];
    write_safetensors(&single.path().join(SINGLE), &tensors).unwrap();
    assert_eq!(Checkpoint::open(single.path()).unwrap().fingerprint(), checkpoint.fingerprint());
    write_safetensors(&single.path().join(SINGLE), &tensors[..2]).unwrap();
    assert_ne!(Checkpoint::open(single.path()).unwrap().fingerprint(), checkpoint.fingerprint());
}

#[test]
fn rejects_shard_names_that_leave_the_folder() {
    let folder = sharded();
    for name in
        ["/etc/x.safetensors", "../x.safetensors", "d/x.safetensors", "d\\\\x.safetensors", "..", "", "C:x"]
    {
        set_index(&folder, &format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#));
        assert_eq!(code(Checkpoint::open(folder.path())), "checkpoint/shard-name", "{name}");
    }
    for name in ["model.bin", "modeling.py", "safetensors"] {
        set_index(&folder, &format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#));
        assert_eq!(code(Checkpoint::open(folder.path())), "checkpoint/shard-format", "{name}");
    }
}

#[test]
fn rejects_wrong_indexes() {
    let folder = sharded();
    let check = |index: &str, expected: &str| {
        set_index(&folder, index);
        assert_eq!(code(Checkpoint::open(folder.path())), expected, "{index}");
    };
    check("{", "checkpoint/index-json");
    check("[]", "checkpoint/index-json");
    check("{}", "checkpoint/index-json");
    check(r#"{"weight_map":{"a":1}}"#, "checkpoint/index-json");
    check(r#"{"weight_map":{},"weight_map":{}}"#, "checkpoint/duplicate-key");
    let (one, two) = ("model-1.safetensors", "model-2.safetensors");
    check(&format!(r#"{{"weight_map":{{"a":"{one}","a":"{two}"}}}}"#), "checkpoint/duplicate-key");
    check(&format!(r#"{{"weight_map":{{"a":"{one}"}}}}"#), "checkpoint/index-mismatch");
    check(r#"{"weight_map":{"a":"gone.safetensors"}}"#, "checkpoint/missing-file");
}

#[test]
fn rejects_a_tensor_in_two_shards() {
    let folder = sharded();
    write_sharded(
        folder.path(),
        &[
            ("model-1.safetensors", &[("a", DType::U8, &[1], &[1]), ("b", DType::U8, &[1], &[1])]),
            ("model-2.safetensors", &[("a", DType::U8, &[1], &[1])]),
        ],
    )
    .unwrap();
    set_index(&folder, r#"{"weight_map":{"b":"model-1.safetensors","a":"model-2.safetensors"}}"#);
    assert_eq!(code(Checkpoint::open(folder.path())), "checkpoint/tensor-twice");
}

#[cfg(unix)]
#[test]
fn links_are_followed_only_when_allowed() {
    use std::os::unix::fs::symlink;
    let target = sharded();
    let folder = tempfile::tempdir().unwrap();
    let link = |name: &str| symlink(target.path().join(name), folder.path().join(name)).unwrap();
    let follow = CheckpointOptions { follow_links: true };
    link(INDEX);
    assert_eq!(code(Checkpoint::open(folder.path())), "checkpoint/symlink");
    fs::remove_file(folder.path().join(INDEX)).unwrap();
    fs::copy(target.path().join(INDEX), folder.path().join(INDEX)).unwrap();
    link("model-1.safetensors");
    link("model-2.safetensors");
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_eq!(error.code(), "checkpoint/symlink");
    assert!(error.next_step().unwrap().contains("--follow-links"));
    let checkpoint = Checkpoint::open_with(folder.path(), &follow).unwrap();
    assert_eq!(checkpoint.read_all("b").unwrap(), [1, 2]);

    // Names are checked even where links are followed, and a dangling link is a link.
    set_index(&folder, r#"{"weight_map":{"a":"../x.safetensors"}}"#);
    assert_eq!(code(Checkpoint::open_with(folder.path(), &follow)), "checkpoint/shard-name");
    symlink("nowhere", folder.path().join(SINGLE)).unwrap();
    assert_eq!(code(Checkpoint::open(folder.path())), "checkpoint/symlink");
    assert_eq!(code(Checkpoint::open_with(folder.path(), &follow)), "io/failed");
}

proptest! {
    /// Any header text and data give an error or a checkpoint all of whose bytes can be read.
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((0usize..400, any::<u8>()), 0..4),
        cut in 0usize..400,
    ) {
        let mut file = safetensors_bytes(&[
            ("a", DType::F32, &[2, 2], &[7; 16]),
            ("b", DType::U8, &[5], &[8; 5]),
        ])
        .unwrap();
        for (at, value) in edits {
            if let Some(byte) = file.get_mut(at) {
                *byte = value;
            }
        }
        file.truncate(cut.max(1));
        let (name, folder) = (SINGLE, tempfile::tempdir().unwrap());
        fs::write(folder.path().join(name), &file).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            for tensor in checkpoint.tensors() {
                prop_assert_eq!(checkpoint.read_all(&tensor.name).unwrap().len() as u64, tensor.bytes);
            }
        }
    }
}
