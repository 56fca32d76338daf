//! The weight index: one record per stored weight.
//!
//! Invariants of a decoded index: records are in file order; the first weight starts at 0 and each other at the first
//! multiple of 64 after the end of the one before; the last ends the weights section; names are unique; a weight has at
//! least the bytes its type and shape need (packed layouts may have more). Byte layout: `docs/engine-format.md`.

use super::layout::{ALIGN, FORGED, align_up, bad};
use crate::dtype::DType;
use crate::error::Result;

const INDEX_VERSION: u32 = 1;
/// Longest name or source key in bytes.
pub(super) const MAX_NAME: usize = 4096;
/// Most extents of a weight.
const MAX_RANK: usize = 16;

/// What is known of a weight before its bytes are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMeta {
    /// Name in the IR, without `@`; unique in the engine.
    pub name: String,
    /// Element type as stored.
    pub dtype: DType,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Names of the source model's tensors it is made of; empty for generated weights.
    pub sources: Vec<String>,
}

/// A weight of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightRecord {
    /// Name in the IR, without `@`; unique in the engine.
    pub name: String,
    /// Element type as stored.
    pub dtype: DType,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the weights section; a multiple of 64.
    pub offset: u64,
    /// Stored bytes; at least what type and shape need.
    pub len: u64,
    /// BLAKE3 of the stored bytes.
    pub hash: [u8; 32],
    /// Names of the source model's tensors it is made of; empty for generated weights.
    pub sources: Vec<String>,
}

fn dtype_code(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
        DType::F8E4M3 => 4,
        DType::F8E5M2 => 5,
        DType::I8 => 6,
        DType::U8 => 7,
        DType::I4 => 8,
        DType::I32 => 9,
        DType::I64 => 10,
        DType::Bool => 11,
    }
}

fn legal_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// Checks names and counts of a record; `len` is its stored size.
pub(super) fn check(name: &str, dtype: DType, shape: &[u64], sources: &[String], len: u64) -> Result<()> {
    let fail = |code, what: String| Err(bad(code, what).at(format!("weight {}", name.escape_debug())));
    if !legal_name(name) || !sources.iter().all(|s| legal_name(s)) {
        return fail(
            "engine/weight-name",
            format!("a name must have 1 to {MAX_NAME} bytes and no control characters"),
        );
    }
    if shape.len() > MAX_RANK || sources.len() > usize::from(u16::MAX) {
        return fail("engine/weight-rank", format!("more than {MAX_RANK} extents or {} sources", u16::MAX));
    }
    let elements = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent));
    match elements.and_then(|elements| dtype.bytes_for(elements)) {
        Some(dense) if dense <= len => Ok(()),
        Some(dense) => {
            fail("engine/weight-size", format!("{dtype} {shape:?} needs {dense} bytes, it has {len}"))
        }
        None => fail("engine/weight-size", format!("the size of {dtype} {shape:?} exceeds 64 bits")),
    }
}

/// The hash of a weights section: BLAKE3 of the concatenated hashes of its weights.
pub(super) fn section_hash(records: &[WeightRecord]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for record in records {
        hasher.update(&record.hash);
    }
    *hasher.finalize().as_bytes()
}

pub(super) fn encode(records: &[WeightRecord]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(INDEX_VERSION.to_le_bytes());
    out.extend((records.len() as u32).to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    };
    for WeightRecord { name, dtype, shape, offset, len, hash, sources } in records {
        out.extend(offset.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend(hash);
        out.push(dtype_code(*dtype));
        out.push(shape.len() as u8);
        out.extend((sources.len() as u16).to_le_bytes());
        for extent in shape {
            out.extend(extent.to_le_bytes());
        }
        text(&mut out, name);
        for source in sources {
            text(&mut out, source);
        }
    }
    out
}

/// A cursor that never reads past its end.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let len = self.u32()? as usize;
        std::str::from_utf8(self.bytes(len)?).ok().map(str::to_owned)
    }

    fn record(&mut self) -> Option<WeightRecord> {
        let (offset, len, hash) = (self.u64()?, self.u64()?, self.array()?);
        let [code, rank] = self.array()?;
        let sources = u16::from_le_bytes(self.array()?);
        let dtype = DType::ALL.into_iter().find(|&d| dtype_code(d) == code)?;
        let shape = (0..rank).map(|_| self.u64()).collect::<Option<_>>()?;
        let name = self.text()?;
        // Each source takes four bytes at least, so the bytes present bound what is collected.
        let sources = (0..sources).map(|_| self.text()).collect::<Option<_>>()?;
        Some(WeightRecord { name, dtype, shape, offset, len, hash, sources })
    }
}

/// Decodes an index. `section_len` is the length of the weights section, `None` if the engine has none.
pub(super) fn decode(bytes: &[u8], section_len: Option<u64>) -> Result<Vec<WeightRecord>> {
    let malformed = |what: &str| bad("engine/weight-index", what).at("section weight_index").hint(FORGED);
    let mut cursor = Cursor(bytes);
    if cursor.u32() != Some(INDEX_VERSION) {
        return Err(malformed("the version of the index is unknown"));
    }
    let count = cursor.u32().ok_or_else(|| malformed("the index is too short"))?;
    let mut records = Vec::new();
    let mut end = 0u64;
    for number in 0..count {
        let record = cursor.record().ok_or_else(|| malformed(&format!("record {number} is malformed")))?;
        let WeightRecord { name, dtype, shape, offset, len, hash: _, sources } = &record;
        check(name, *dtype, shape, sources, *len).map_err(|e| e.hint(FORGED))?;
        if align_up(end, ALIGN) != Some(*offset) {
            let what = format!("it starts at {offset}, the weight before ends at {end}");
            return Err(bad("engine/weight-offset", what).at(format!("weight {name}")).hint(FORGED));
        }
        end =
            offset.checked_add(*len).ok_or_else(|| malformed(&format!("record {number} exceeds 64 bits")))?;
        records.push(record);
    }
    if !cursor.0.is_empty() {
        return Err(malformed("bytes follow the last record"));
    }
    if section_len.is_some_and(|len| len != end) {
        return Err(malformed(&format!("the weights end at {end}, their section does not")));
    }
    Ok(records)
}

/// The numbers of `records` in the order of their names.
pub(super) fn by_name(records: &[WeightRecord]) -> Result<Vec<u32>> {
    let name = |i: u32| records[i as usize].name.as_str();
    let mut order: Vec<u32> = (0..records.len() as u32).collect();
    order.sort_by_key(|&i| name(i));
    match order.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
        Some(pair) => Err(bad("engine/duplicate-weight", "two weights have this name")
            .at(format!("weight {}", name(pair[0])))
            .hint(FORGED)),
        None => Ok(order),
    }
}
