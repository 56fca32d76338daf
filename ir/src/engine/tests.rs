use std::path::Path;

use super::layout::{self, ENTRY_LEN};
use super::*;
use crate::dtype::DType;
use crate::error::{Kind, Result};

pub(super) fn meta(name: &str, dtype: DType, shape: &[u64]) -> WeightMeta {
    let sources = vec![format!("model.{name}.weight")];
    WeightMeta { name: name.to_owned(), dtype, shape: shape.to_vec(), sources }
}

/// Writes every kind of section, and three weights with gaps between them.
fn fill(writer: &mut EngineWriter) -> Result<()> {
    writer.section(SectionKind::Manifest, "", br#"{"name":"toy"}"#)?;
    writer.section(SectionKind::Ir, "", b"module @toy phase lowered {}\n")?;
    writer.section(SectionKind::Kernels, "cuda:sm_90a", &[0xff; 300])?;
    writer.section(SectionKind::Kernels, "cpu", &[0xfe; 10])?;
    let mut weights = writer.begin_weights()?;
    weights.begin(meta("embed", DType::F32, &[2, 25]))?;
    for piece in (0..200u8).collect::<Vec<_>>().chunks(7) {
        weights.write(piece)?;
    }
    weights.weight(meta("norm", DType::BF16, &[5]), &[9; 10])?;
    weights.weight(meta("packed", DType::I4, &[3]), &[7; 128])?;
    weights.finish()?;
    writer.section(SectionKind::Tokenizer, "", b"{}")?;
    writer.section(SectionKind::Unknown(4711), "x-note", b"anything")?;
    writer.section(SectionKind::Provenance, "", b"{}")?;
    writer.section(SectionKind::KernelSources, "", br#"{"parts":[],"kernels":[]}"#)
}

/// A small engine with every feature.
pub(super) fn sample() -> Vec<u8> {
    let mut writer = EngineWriter::in_memory(&WriterOptions { producer: "test 1".into() }).unwrap();
    fill(&mut writer).unwrap();
    writer.into_bytes().unwrap()
}

/// Recomputes the hash over header and table, as a forger would.
pub(super) fn reseal(bytes: &mut [u8]) {
    let at = u64::from_le_bytes(bytes[24..32].try_into().unwrap());
    let table = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default().to_vec();
    let hash = layout::seal_hash(&bytes[..4096], &table);
    bytes[4064..4096].copy_from_slice(&hash);
}

/// Byte position of the table entry of a kind.
pub(super) fn entry_at(bytes: &[u8], kind: SectionKind) -> usize {
    let at = u64::from_le_bytes(bytes[24..32].try_into().unwrap()) as usize;
    let entries = bytes[at..].chunks_exact(ENTRY_LEN);
    let found = entries.enumerate().find(|(_, e)| e[..4] == kind.code().to_le_bytes());
    at + found.unwrap().0 * ENTRY_LEN
}

/// Replaces a section's bytes by others of the same length and makes every hash right again.
pub(super) fn forge_section(bytes: &mut [u8], kind: SectionKind, change: impl FnOnce(&mut [u8])) {
    let entry = entry_at(bytes, kind);
    let offset = u64::from_le_bytes(bytes[entry + 8..entry + 16].try_into().unwrap()) as usize;
    let len = u64::from_le_bytes(bytes[entry + 16..entry + 24].try_into().unwrap()) as usize;
    change(&mut bytes[offset..offset + len]);
    let hash = *blake3::hash(&bytes[offset..offset + len]).as_bytes();
    bytes[entry + 96..entry + 128].copy_from_slice(&hash);
    reseal(bytes);
}

#[track_caller]
fn code<T>(result: Result<T>) -> &'static str {
    let Err(error) = result else { panic!("accepted") };
    assert!(error.next_step().is_some(), "{error}");
    error.code()
}

#[track_caller]
fn rejects(expected: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = sample();
    change(&mut bytes);
    assert_eq!(code(EngineFile::from_bytes(bytes, Verify::Metadata)), expected);
}

/// Changes a field of header or table under a right hash.
#[track_caller]
fn rejects_forged(expected: &str, at: impl FnOnce(&[u8]) -> usize, value: &[u8]) {
    rejects(expected, |bytes| {
        let at = at(bytes);
        bytes[at..at + value.len()].copy_from_slice(value);
        reseal(bytes);
    });
}

#[test]
fn reads_what_was_written() {
    let engine = EngineFile::from_bytes(sample(), Verify::Full).unwrap();
    assert_eq!(engine.producer(), "test 1");
    assert_eq!(engine.manifest_json(), br#"{"name":"toy"}"#);
    assert_eq!(engine.ir_text(), "module @toy phase lowered {}\n");
    assert_eq!(
        engine.kernels().collect::<Vec<_>>(),
        [("cuda:sm_90a", &[0xff; 300][..]), ("cpu", &[0xfe; 10][..])]
    );
    assert_eq!(engine.section(SectionKind::Tokenizer), Some(&b"{}"[..]));
    assert_eq!(engine.section(SectionKind::ChatTemplate), None);
    assert_eq!(engine.named_section(SectionKind::Unknown(4711), "x-note"), None, "hashed, not held");
    assert!(engine.weights_verified() && !engine.is_stripped());

    let (start, len) = engine.weights_range().unwrap();
    assert_eq!((start % 4096, len), (0, 320 + 128));
    let offsets: Vec<_> = engine.weight_index().iter().map(|w| (w.name.as_str(), w.offset, w.len)).collect();
    assert_eq!(offsets, [("embed", 0, 200), ("norm", 256, 10), ("packed", 320, 128)]);
    let embed = engine.weight("embed").unwrap();
    assert_eq!((embed.dtype, embed.shape.as_slice()), (DType::F32, &[2, 25][..]));
    assert_eq!(embed.sources, ["model.embed.weight"]);
    assert_eq!(embed.hash, *blake3::hash(&(0..200).collect::<Vec<u8>>()).as_bytes());
    let mut part = [0; 4];
    engine.read_weight_at(embed, 196, &mut part).unwrap();
    assert_eq!(part, [196, 197, 198, 199]);
    assert_eq!(engine.read_weight_at(embed, 197, &mut part).unwrap_err().code(), "engine/read-range");
    assert_eq!(engine.read_weight_at(embed, u64::MAX, &mut part).unwrap_err().code(), "engine/read-range");
    assert!(engine.weight("none").is_none());
}

#[test]
fn the_documented_layout_is_what_is_written() {
    let bytes = sample();
    assert_eq!(bytes[..16], *b"\x89MLR\r\n\x1a\n\x01\0\0\0\0\0\0\0");
    assert_eq!(bytes[16..24], (bytes.len() as u64).to_le_bytes());
    let table = u64::from_le_bytes(bytes[24..32].try_into().unwrap()) as usize;
    assert_eq!((table % 64, bytes.len() - table), (0, 10 * 128));
    assert_eq!(bytes[32..40], *b"\x0a\0\0\0\x80\0\0\0");
    assert_eq!(bytes[48..54], *b"test 1");
    assert!(bytes[54..4064].iter().all(|&b| b == 0));
    let mut sealed = bytes[..4064].to_vec();
    sealed.extend_from_slice(&bytes[table..]);
    assert_eq!(bytes[4064..4096], *blake3::hash(&sealed).as_bytes());
    assert_eq!(bytes[4096..4096 + 14], *br#"{"name":"toy"}"#);
    let first = &bytes[table..table + 128];
    assert_eq!(first[..32], *b"\x01\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\x0e\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0");
    assert_eq!(first[96..], *blake3::hash(br#"{"name":"toy"}"#).as_bytes());
    let hashes: Vec<u8> = [(0..200).collect::<Vec<u8>>(), vec![9; 10], vec![7; 128]]
        .iter()
        .flat_map(|weight| *blake3::hash(weight).as_bytes())
        .collect();
    let entry = entry_at(&bytes, SectionKind::Weights);
    assert_eq!(bytes[entry + 96..entry + 128], *blake3::hash(&hashes).as_bytes());
}

#[test]
fn files_and_memory_hold_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("toy.engine");
    let mut writer = EngineWriter::create(&path, &WriterOptions { producer: "test 1".into() }).unwrap();
    fill(&mut writer).unwrap();
    let written = writer.finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), sample());
    let engine = EngineFile::open(&path, Verify::Full).unwrap();
    assert_eq!((engine.file_len(), engine.identity()), (written.len, written.identity));
    assert_eq!(engine.path(), Some(path.as_path()));
    assert!(engine.file().is_some());
    assert_eq!(entries(folder.path()), ["toy.engine"]);
}

fn entries(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_writer_that_does_not_finish_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("toy.engine");
    std::fs::write(&path, "old").unwrap();
    let mut writer = EngineWriter::create(&path, &WriterOptions::default()).unwrap();
    writer.section(SectionKind::Manifest, "", b"{}").unwrap();
    drop(writer);
    let mut writer = EngineWriter::create(&path, &WriterOptions::default()).unwrap();
    writer.section(SectionKind::Manifest, "", b"{}").unwrap();
    assert_eq!(code(writer.finish()), "engine/missing-section");
    assert_eq!(entries(folder.path()), ["toy.engine"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn stripped_engines_keep_the_records() {
    let mut writer = EngineWriter::in_memory(&WriterOptions::default()).unwrap();
    writer.section(SectionKind::Manifest, "", b"{}").unwrap();
    writer.section(SectionKind::Ir, "", b"").unwrap();
    let mut weights = writer.begin_stripped_weights().unwrap();
    weights.weight(meta("a", DType::U8, &[3]), &[1, 2, 3]).unwrap();
    weights.weight(meta("b", DType::U8, &[1]), &[4]).unwrap();
    weights.finish().unwrap();
    let engine = EngineFile::from_bytes(writer.into_bytes().unwrap(), Verify::Full).unwrap();
    assert!(engine.is_stripped() && engine.weights_range().is_none());
    let weight = engine.weight("b").unwrap();
    assert_eq!((weight.offset, weight.hash), (64, *blake3::hash(&[4]).as_bytes()));
    assert_eq!(code(engine.read_weight_at(weight, 0, &mut [0])), "engine/no-weights");
}

#[test]
fn engines_without_weights_or_with_empty_ones() {
    let mut writer = EngineWriter::in_memory(&WriterOptions::default()).unwrap();
    writer.section(SectionKind::Ir, "", b"").unwrap();
    writer.section(SectionKind::Manifest, "", b"").unwrap();
    let engine = EngineFile::from_bytes(writer.into_bytes().unwrap(), Verify::Full).unwrap();
    assert!(engine.weight_index().is_empty() && engine.weights_range().is_none());

    let mut writer = EngineWriter::in_memory(&WriterOptions::default()).unwrap();
    writer.section(SectionKind::Manifest, "", b"{}").unwrap();
    writer.section(SectionKind::Ir, "", b"").unwrap();
    let mut weights = writer.begin_weights().unwrap();
    weights.begin(meta("none", DType::F32, &[0, 4])).unwrap();
    weights.finish().unwrap();
    let engine = EngineFile::from_bytes(writer.into_bytes().unwrap(), Verify::Full).unwrap();
    assert_eq!(engine.weights_range().unwrap().1, 0);
    assert_eq!(engine.weight("none").unwrap().len, 0);
}

#[test]
fn large_weights_cross_chunks_and_threads() {
    let data: Vec<u8> = (0..9_000_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut writer = EngineWriter::in_memory(&WriterOptions::default()).unwrap();
    writer.section(SectionKind::Manifest, "", b"{}").unwrap();
    writer.section(SectionKind::Ir, "", b"").unwrap();
    let mut weights = writer.begin_weights().unwrap();
    for name in ["a", "b"] {
        weights.begin(meta(name, DType::U8, &[9_000_001])).unwrap();
        data.chunks(700_001).for_each(|piece| weights.write(piece).unwrap());
    }
    weights.finish().unwrap();
    let mut bytes = writer.into_bytes().unwrap();
    let engine = EngineFile::from_bytes(bytes.clone(), Verify::Auto).unwrap();
    assert!(engine.weights_verified());
    assert!(engine.weight_index().iter().all(|w| w.hash == *blake3::hash(&data).as_bytes()));
    let (start, len) = engine.weights_range().unwrap();
    bytes[(start + len) as usize - 1] ^= 1;
    assert_eq!(code(EngineFile::from_bytes(bytes, Verify::Auto)), "engine/weight-hash");
}

#[test]
fn rejects_what_is_no_engine() {
    rejects("engine/magic", Vec::clear);
    rejects("engine/magic", |b| *b = b"GGUF and more".to_vec());
    rejects("engine/magic", |b| b[4] = b'\n');
    rejects("engine/truncated", |b| b.truncate(5));
    rejects("engine/truncated", |b| b.truncate(4095));
    rejects("engine/truncated", |b| b.truncate(4096));
    rejects("engine/truncated", |b| _ = b.pop());
    rejects("engine/trailing-bytes", |b| b.push(0));
    rejects("engine/version", |b| b[8] = 0);
    let mut newer = sample();
    newer[8] = 7;
    let error = EngineFile::from_bytes(newer, Verify::Auto).unwrap_err();
    assert_eq!((error.kind(), error.code()), (Kind::Incompatible, "engine/newer-version"));
    assert!(error.message().contains("version 7") && error.message().contains("version 1"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(code(EngineFile::open(folder.path(), Verify::Auto)), "io/failed");
}

#[test]
fn rejects_damage() {
    rejects("engine/header-hash", |b| b[48] ^= 1);
    rejects("engine/header-hash", |b| b[4070] ^= 1);
    rejects("engine/header-hash", |b| *b.last_mut().unwrap() ^= 1);
    rejects("engine/section-hash", |b| b[4096] ^= 1);
    rejects("engine/padding", |b| b[4096 + 14] = 1);
    let mut gap = sample();
    let (start, _) = EngineFile::from_bytes(gap.clone(), Verify::Auto).unwrap().weights_range().unwrap();
    gap[start as usize + 201] = 1;
    assert!(EngineFile::from_bytes(gap.clone(), Verify::Metadata).is_ok_and(|e| !e.weights_verified()));
    assert_eq!(code(EngineFile::from_bytes(gap, Verify::Full)), "engine/padding");
    let mut weight = sample();
    weight[start as usize + 200 - 1] ^= 1;
    assert_eq!(code(EngineFile::from_bytes(weight, Verify::Auto)), "engine/weight-hash");
}

#[test]
fn rejects_forged_headers() {
    rejects_forged("engine/flags", |_| 12, &[2]);
    rejects_forged("engine/truncated", |_| 16, &u64::MAX.to_le_bytes());
    rejects_forged("engine/trailing-bytes", |_| 16, &[0; 8]);
    rejects_forged("engine/table-range", |_| 24, &[0; 8]);
    rejects_forged("engine/table-range", |_| 24, &u64::MAX.to_le_bytes());
    rejects_forged("engine/table-range", |_| 32, &[1]);
    rejects_forged("engine/section-count", |_| 32, &u32::MAX.to_le_bytes());
    rejects_forged("engine/table-range", |_| 36, &[64]);
    rejects_forged("engine/reserved-bytes", |_| 40, &[1]);
    rejects_forged("engine/reserved-bytes", |_| 4000, &[1]);
    rejects_forged("engine/producer", |_| 48, &[0xff]);
    rejects_forged("engine/producer", |_| 60, b"x");
    rejects_forged("engine/weight-sections", |_| 12, &[1]);
}

#[test]
fn rejects_forged_tables() {
    let entry = |kind, field| move |bytes: &[u8]| entry_at(bytes, kind) + field;
    let max = u64::MAX.to_le_bytes();
    rejects_forged("engine/section-kind", entry(SectionKind::Provenance, 0), &[99]);
    rejects_forged("engine/missing-section", entry(SectionKind::Manifest, 0), &[10]);
    rejects_forged("engine/missing-section", entry(SectionKind::Ir, 0), &[10]);
    rejects_forged("engine/duplicate-section", entry(SectionKind::Tokenizer, 0), &[1]);
    rejects_forged("engine/section-flags", entry(SectionKind::Tokenizer, 4), &[1]);
    rejects_forged("engine/section-flags", entry(SectionKind::Unknown(4711), 4), &[3]);
    rejects_forged("engine/section-offset", entry(SectionKind::Manifest, 8), &[0; 8]);
    rejects_forged("engine/section-overlap", entry(SectionKind::Ir, 8), &4096u64.to_le_bytes());
    rejects_forged("engine/section-offset", entry(SectionKind::Tokenizer, 8), &max);
    rejects_forged("engine/section-size", entry(SectionKind::Tokenizer, 16), &max);
    rejects_forged("engine/section-range", entry(SectionKind::Weights, 16), &max);
    rejects_forged("engine/section-range", entry(SectionKind::Unknown(4711), 16), &100_000u64.to_le_bytes());
    rejects_forged("engine/section-overlap", entry(SectionKind::Manifest, 16), &1000u64.to_le_bytes());
    rejects_forged("engine/table-offset", entry(SectionKind::KernelSources, 16), &[0; 8]);
    rejects_forged("engine/section-align", entry(SectionKind::Weights, 24), &64u32.to_le_bytes());
    rejects_forged("engine/section-name", entry(SectionKind::Kernels, 28), &[3]);
    rejects_forged("engine/section-name", entry(SectionKind::Kernels, 28), &u32::MAX.to_le_bytes());
    rejects_forged("engine/section-name", entry(SectionKind::Kernels, 32), b"/");
    rejects_forged("engine/section-name", entry(SectionKind::Kernels, 32), &[0xff]);
    rejects_forged("engine/section-name", entry(SectionKind::Kernels, 32), &[0; 64]);
    rejects_forged("engine/section-hash", entry(SectionKind::Weights, 96), &[0; 32]);
    rejects_forged("engine/section-hash", entry(SectionKind::Unknown(4711), 96), &[0; 32]);
    rejects("engine/not-utf8", |b| forge_section(b, SectionKind::Ir, |ir| ir[0] = 0xff));
}

#[test]
fn rejects_forged_weight_indexes() {
    // The first record starts at 8: offset 8, length 16, hash 24, type 56, rank 57, sources 58, extents 60, name 76.
    #[track_caller]
    fn forged(expected: &str, at: usize, value: &[u8]) {
        rejects(expected, |b| {
            forge_section(b, SectionKind::WeightIndex, |index| {
                index[at..at + value.len()].copy_from_slice(value)
            });
        });
    }
    forged("engine/weight-index", 0, &[2]);
    forged("engine/weight-index", 4, &u32::MAX.to_le_bytes());
    forged("engine/weight-index", 4, &[2]);
    forged("engine/weight-offset", 8, &[64]);
    forged("engine/weight-size", 16, &[199]);
    forged("engine/weight-offset", 16, &u64::MAX.to_le_bytes());
    forged("engine/section-hash", 24, &[0]);
    forged("engine/weight-index", 56, &[12]);
    forged("engine/weight-index", 57, &[255]);
    forged("engine/weight-index", 58, &[255, 255]);
    forged("engine/weight-size", 60, &u64::MAX.to_le_bytes());
    forged("engine/weight-index", 76, &u32::MAX.to_le_bytes());
    forged("engine/weight-index", 80, &[0xff]);
    forged("engine/weight-name", 80, b"\n");
    let mut index = Vec::new();
    forge_section(&mut sample(), SectionKind::WeightIndex, |bytes| index = bytes.to_vec());
    let last = weights::decode(&index, Some(448)).unwrap();
    assert_eq!(weights::encode(&last), index);
    assert_eq!(code(weights::decode(&index, Some(449))), "engine/weight-index");
    assert_eq!(code(weights::decode(&[index, vec![0]].concat(), None)), "engine/weight-index");
    let twice = [last[0].clone(), last[0].clone()];
    assert_eq!(code(weights::by_name(&twice)), "engine/duplicate-weight");
}

#[test]
fn the_writer_rejects_illegal_input() {
    let long = WriterOptions { producer: "x".repeat(65) };
    assert_eq!(EngineWriter::in_memory(&long).unwrap_err().code(), "engine/producer");
    let mut writer = EngineWriter::in_memory(&WriterOptions::default()).unwrap();
    let mut section =
        |kind, name: &str, content: &[u8]| writer.section(kind, name, content).unwrap_err().code();
    assert_eq!(section(SectionKind::Weights, "", b""), "engine/section-kind");
    assert_eq!(section(SectionKind::Unknown(1), "x", b""), "engine/section-kind");
    assert_eq!(section(SectionKind::Manifest, "x", b""), "engine/section-name");
    assert_eq!(section(SectionKind::Kernels, "", b""), "engine/section-name");
    assert_eq!(section(SectionKind::Manifest, "", &[0xff]), "engine/not-utf8");
    assert_eq!(section(SectionKind::GenerationConfig, "", &vec![b' '; (1 << 20) + 1]), "engine/section-size");
    writer.section(SectionKind::Manifest, "", b"{}").unwrap();
    assert_eq!(
        writer.section(SectionKind::Manifest, "", b"").unwrap_err().code(),
        "engine/duplicate-section"
    );

    let mut weights = writer.begin_weights().unwrap();
    assert_eq!(weights.write(b"x").unwrap_err().code(), "engine/no-weight");
    assert_eq!(weights.begin(meta("", DType::U8, &[1])).unwrap_err().code(), "engine/weight-name");
    assert_eq!(weights.begin(meta("a", DType::F32, &[u64::MAX])).unwrap_err().code(), "engine/weight-size");
    weights.begin(meta("a", DType::U8, &[2])).unwrap();
    weights.write(&[1]).unwrap();
    assert_eq!(weights.finish().unwrap_err().code(), "engine/weight-size");
    assert_eq!(code(writer.section(SectionKind::Ir, "", b"")), "engine/write-failed");
    assert_eq!(code(writer.into_bytes()), "engine/write-failed");
}

#[test]
fn the_documentation_lists_every_error_code() {
    let page = include_str!("../../../docs/engine-format.md");
    let sources = [
        include_str!("atomic.rs"),
        include_str!("hashing.rs"),
        include_str!("layout.rs"),
        include_str!("reader.rs"),
        include_str!("weights.rs"),
        include_str!("writer.rs"),
    ];
    let quoted = |text: &'static str, quote: char| {
        let parts = text.split(quote).filter(|part| part.starts_with("engine/") && !part.contains(' '));
        parts.collect::<std::collections::BTreeSet<_>>()
    };
    let used: std::collections::BTreeSet<_> = sources.iter().flat_map(|text| quoted(text, '"')).collect();
    let documented = page.split("## Error codes").nth(1).unwrap();
    assert_eq!(quoted(documented, '`'), used);
}
