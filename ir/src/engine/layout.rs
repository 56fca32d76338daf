//! The fixed parts of an engine file: header page and section table.
//!
//! Byte layout and rules are in `docs/engine-format.md`. This file turns header and table into bytes and back and checks
//! everything that can be checked on them alone. It reads no file and knows no section's content.
//!
//! Invariants of a decoded table: entries are in file order; each starts at the first multiple of its alignment after the
//! end of the one before (the first after the header page), so nothing overlaps and gaps are shorter than an alignment;
//! kinds, names and flags are legal; the table itself follows the last section the same way and ends the file.

use crate::error::{Error, Kind, Result};

/// First bytes of every engine file: not text, and damaged by any text-mode transfer.
pub const MAGIC: [u8; 8] = *b"\x89MLR\r\n\x1a\n";
/// The format version written, and the only one read.
pub const FORMAT_VERSION: u32 = 1;
/// Size of the header page.
pub const HEADER_LEN: u64 = 4096;
/// Bytes of the producer field.
pub const PRODUCER_LEN: usize = 64;
/// Longest section name in bytes.
pub const SECTION_NAME_LEN: usize = 64;
/// Most sections a file may have.
pub const MAX_SECTIONS: u32 = 256;
/// Alignment of the weights section, so that it can be mapped.
pub const WEIGHTS_ALIGN: u32 = 4096;
/// Alignment of every other section, of the table, and of each weight within the weights section.
pub const ALIGN: u32 = 64;

pub(super) const ENTRY_LEN: usize = 128;
const FLAGS_AT: usize = 12;
const HASH_AT: usize = HEADER_LEN as usize - 32;
const PRODUCER_AT: usize = 48;
const STRIPPED: u32 = 1;
const OPTIONAL: u32 = 1;

pub(super) const CORRUPT: &str = "the file is damaged: copy or build it again";
pub(super) const FORGED: &str =
    "the file was not written by Millrace or was altered: build it again from the model";

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SectionKind {
    /// JSON: what the engine is, its inputs, limits and targets.
    Manifest,
    /// Text: the lowered IR.
    Ir,
    /// Device code of one target, which the section's name spells.
    Kernels,
    /// Weight bytes; never held in memory by the reader.
    Weights,
    /// One record per weight.
    WeightIndex,
    /// JSON: the model's `tokenizer.json`.
    Tokenizer,
    /// JSON: the model's `tokenizer_config.json`.
    TokenizerConfig,
    /// Text: the model's chat template.
    ChatTemplate,
    /// JSON: the model's `generation_config.json`.
    GenerationConfig,
    /// JSON: the model's `config.json`.
    Config,
    /// JSON: where the engine came from.
    Provenance,
    /// JSON: texts of device kernels.
    KernelSources,
    /// A kind of a later producer that readers may ignore.
    Unknown(u32),
}

const MIB: u64 = 1 << 20;

impl SectionKind {
    /// The kinds with a meaning in this format version.
    pub const KNOWN: [SectionKind; 12] = [
        SectionKind::Manifest,
        SectionKind::Ir,
        SectionKind::Kernels,
        SectionKind::Weights,
        SectionKind::WeightIndex,
        SectionKind::Tokenizer,
        SectionKind::TokenizerConfig,
        SectionKind::ChatTemplate,
        SectionKind::GenerationConfig,
        SectionKind::Config,
        SectionKind::Provenance,
        SectionKind::KernelSources,
    ];

    /// The number in the file.
    pub fn code(self) -> u32 {
        match self {
            SectionKind::Manifest => 1,
            SectionKind::Ir => 2,
            SectionKind::Kernels => 3,
            SectionKind::Weights => 4,
            SectionKind::WeightIndex => 5,
            SectionKind::Tokenizer => 6,
            SectionKind::TokenizerConfig => 7,
            SectionKind::ChatTemplate => 8,
            SectionKind::GenerationConfig => 9,
            SectionKind::Config => 10,
            SectionKind::Provenance => 11,
            SectionKind::KernelSources => 12,
            SectionKind::Unknown(code) => code,
        }
    }

    fn from_code(code: u32) -> SectionKind {
        SectionKind::KNOWN.into_iter().find(|kind| kind.code() == code).unwrap_or(SectionKind::Unknown(code))
    }

    /// Spelling in messages.
    pub fn name(self) -> &'static str {
        match self {
            SectionKind::Manifest => "manifest",
            SectionKind::Ir => "ir",
            SectionKind::Kernels => "kernels",
            SectionKind::Weights => "weights",
            SectionKind::WeightIndex => "weight_index",
            SectionKind::Tokenizer => "tokenizer",
            SectionKind::TokenizerConfig => "tokenizer_config",
            SectionKind::ChatTemplate => "chat_template",
            SectionKind::GenerationConfig => "generation_config",
            SectionKind::Config => "config",
            SectionKind::Provenance => "provenance",
            SectionKind::KernelSources => "kernel_sources",
            SectionKind::Unknown(_) => "unknown",
        }
    }

    /// Largest length in bytes; `None` for kinds that are never held in memory.
    pub fn max_len(self) -> Option<u64> {
        match self {
            SectionKind::Manifest | SectionKind::TokenizerConfig => Some(16 * MIB),
            SectionKind::Ir | SectionKind::WeightIndex => Some(256 * MIB),
            SectionKind::Kernels => Some(1024 * MIB),
            SectionKind::Tokenizer | SectionKind::Provenance | SectionKind::KernelSources => Some(64 * MIB),
            SectionKind::ChatTemplate | SectionKind::Config => Some(4 * MIB),
            SectionKind::GenerationConfig => Some(MIB),
            SectionKind::Weights | SectionKind::Unknown(_) => None,
        }
    }

    /// True if the content must be UTF-8.
    pub(super) fn is_text(self) -> bool {
        !matches!(
            self,
            SectionKind::Kernels | SectionKind::Weights | SectionKind::WeightIndex | SectionKind::Unknown(_)
        )
    }

    /// True if several sections of the kind may stand in a file, told apart by name.
    fn is_named(self) -> bool {
        matches!(self, SectionKind::Kernels | SectionKind::Unknown(_))
    }

    pub(super) fn align(self) -> u32 {
        if self == SectionKind::Weights { WEIGHTS_ALIGN } else { ALIGN }
    }
}

/// One entry of the section table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// Tells sections of one kind apart; empty for kinds that occur once.
    pub name: String,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// BLAKE3 of the content; for [`SectionKind::Weights`], of the concatenated hashes of the weights.
    pub hash: [u8; 32],
}

impl Section {
    /// `kind` or `kind:name`, as it stands in messages.
    pub fn label(&self) -> String {
        match self.kind {
            SectionKind::Unknown(code) => format!("section unknown#{code}:{}", self.name),
            kind if self.name.is_empty() => format!("section {}", kind.name()),
            kind => format!("section {}:{}", kind.name(), self.name),
        }
    }

    /// Checks that kind and name are legal.
    pub(super) fn check(&self) -> Result<()> {
        let legal_char = |c: char| c.is_ascii_alphanumeric() || "._:+-".contains(c);
        let length = self.name.len();
        let legal = match self.kind.is_named() {
            true => (1..=SECTION_NAME_LEN).contains(&length) && self.name.chars().all(legal_char),
            false => length == 0,
        };
        if !legal {
            let what = format!("the name {:?} is not legal for a {} section", self.name, self.kind.name());
            return Err(bad("engine/section-name", what).hint(FORGED));
        }
        if let Some(max) = self.kind.max_len()
            && self.len > max
        {
            let what = format!("{} bytes exceed the limit of {max} for this kind", self.len);
            return Err(bad("engine/section-size", what).at(self.label()).hint(FORGED));
        }
        Ok(())
    }
}

/// Everything in the header page that is not derived from the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) producer: String,
    pub(super) stripped: bool,
    pub(super) file_len: u64,
    pub(super) table_offset: u64,
    pub(super) section_count: u32,
}

pub(super) fn bad(code: &'static str, message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, code, message)
}

/// The smallest multiple of `align` (a power of two) that is at least `offset`; `None` on overflow.
pub(super) fn align_up(offset: u64, align: u32) -> Option<u64> {
    offset.checked_next_multiple_of(u64::from(align))
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// Text padded with NUL bytes; `None` if it is not UTF-8 or something follows the padding.
fn padded_text(field: &[u8]) -> Option<String> {
    let len = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    let text = std::str::from_utf8(&field[..len]).ok()?;
    let clean = field[len..].iter().all(|&b| b == 0) && !text.chars().any(char::is_control);
    clean.then(|| text.to_owned())
}

impl Header {
    /// Checks magic, version, flags and lengths of the header page, in this order. `page` may be shorter than a page
    /// if the file is; `actual_len` is the length of the file.
    pub(super) fn decode(page: &[u8], actual_len: u64) -> Result<Header> {
        let magic_len = page.len().min(MAGIC.len());
        if magic_len == 0 || page[..magic_len] != MAGIC[..magic_len] {
            let text_mode = page.starts_with(&MAGIC[..4]);
            return Err(bad("engine/magic", "this is not an engine file").hint(if text_mode {
                "the file went through a text-mode transfer: copy it in binary mode"
            } else {
                "give an engine file; `build` makes one from a model folder"
            }));
        }
        if page.len() >= FLAGS_AT {
            check_version(word32(page, 8))?;
        }
        if (page.len() as u64) < HEADER_LEN {
            let what = format!("the file has {actual_len} bytes, less than a header");
            return Err(bad("engine/truncated", what).hint(CORRUPT));
        }
        let flags = word32(page, FLAGS_AT);
        if flags & !STRIPPED != 0 {
            return Err(bad("engine/flags", format!("the header has unknown flags {flags:#x}")).hint(FORGED));
        }
        let file_len = word64(page, 16);
        if file_len > actual_len {
            let what = format!("the file has {actual_len} of {file_len} bytes");
            return Err(bad("engine/truncated", what).hint(CORRUPT));
        }
        if file_len < actual_len {
            let what = format!("the file has {} bytes after its end", actual_len - file_len);
            return Err(bad("engine/trailing-bytes", what).hint(CORRUPT));
        }
        let (table_offset, section_count) = (word64(page, 24), word32(page, 32));
        if section_count > MAX_SECTIONS {
            let what = format!("the header claims {section_count} sections, more than {MAX_SECTIONS}");
            return Err(bad("engine/section-count", what).hint(FORGED));
        }
        let table_end = table_offset.checked_add(u64::from(section_count) * ENTRY_LEN as u64);
        if word32(page, 36) as usize != ENTRY_LEN || table_offset < HEADER_LEN || table_end != Some(file_len)
        {
            return Err(bad("engine/table-range", "the section table does not end the file").hint(FORGED));
        }
        if word64(page, 40) != 0 || page[PRODUCER_AT + PRODUCER_LEN..HASH_AT].iter().any(|&b| b != 0) {
            return Err(
                bad("engine/reserved-bytes", "reserved bytes of the header are not zero").hint(FORGED)
            );
        }
        let producer = padded_text(&page[PRODUCER_AT..PRODUCER_AT + PRODUCER_LEN])
            .ok_or_else(|| bad("engine/producer", "the producer field is not text").hint(FORGED))?;
        Ok(Header { producer, stripped: flags & STRIPPED != 0, file_len, table_offset, section_count })
    }

    /// The header page without its hash.
    fn encode(&self) -> Vec<u8> {
        let Header { producer, stripped, file_len, table_offset, section_count } = self;
        let mut page = Vec::with_capacity(HEADER_LEN as usize);
        page.extend(MAGIC);
        page.extend(FORMAT_VERSION.to_le_bytes());
        page.extend((if *stripped { STRIPPED } else { 0 }).to_le_bytes());
        page.extend(file_len.to_le_bytes());
        page.extend(table_offset.to_le_bytes());
        page.extend(section_count.to_le_bytes());
        page.extend((ENTRY_LEN as u32).to_le_bytes());
        page.extend(0u64.to_le_bytes());
        page.extend(producer.as_bytes());
        page.resize(HASH_AT, 0);
        page
    }
}

fn check_version(version: u32) -> Result<()> {
    if version > FORMAT_VERSION {
        let what =
            format!("the engine has format version {version}, this program reads version {FORMAT_VERSION}");
        return Err(Error::new(Kind::Incompatible, "engine/newer-version", what).hint(
            "use the Millrace that built the engine or a newer one, or build the engine again with this one",
        ));
    }
    if version < FORMAT_VERSION {
        let what =
            format!("there is no format version {version}; this program reads version {FORMAT_VERSION}");
        return Err(bad("engine/version", what).hint(FORGED));
    }
    Ok(())
}

/// The hash that stands at the end of the header page.
pub(super) fn seal_hash(page: &[u8], table: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&page[..HASH_AT]).update(table);
    *hasher.finalize().as_bytes()
}

/// Checks the hash over header and table and returns it.
pub(super) fn check_seal(page: &[u8], table: &[u8]) -> Result<[u8; 32]> {
    let hash = seal_hash(page, table);
    if page[HASH_AT..] != hash {
        return Err(
            bad("engine/header-hash", "header and section table do not have their hash").hint(CORRUPT)
        );
    }
    Ok(hash)
}

/// Header page and table of a file with `sections`, the last of which ends before `table_offset`.
pub(super) fn encode(header: &Header, sections: &[Section]) -> (Vec<u8>, Vec<u8>) {
    let mut table = Vec::with_capacity(sections.len() * ENTRY_LEN);
    for section in sections {
        let Section { kind, name, offset, len, hash } = section;
        let optional = matches!(kind, SectionKind::Unknown(_));
        let start = table.len();
        table.extend(kind.code().to_le_bytes());
        table.extend((if optional { OPTIONAL } else { 0 }).to_le_bytes());
        table.extend(offset.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(kind.align().to_le_bytes());
        table.extend((name.len() as u32).to_le_bytes());
        table.extend(name.as_bytes());
        table.resize(start + ENTRY_LEN - hash.len(), 0);
        table.extend(hash);
    }
    let mut page = header.encode();
    page.extend(seal_hash(&page, &table));
    (page, table)
}

/// Decodes and checks the table of a file with `header`.
pub(super) fn decode_table(header: &Header, table: &[u8]) -> Result<Vec<Section>> {
    let mut sections: Vec<Section> = Vec::new();
    let mut end = HEADER_LEN;
    for entry in table.chunks_exact(ENTRY_LEN) {
        let section = decode_entry(entry)?;
        if sections.iter().any(|s| s.kind == section.kind && s.name == section.name) {
            return Err(bad("engine/duplicate-section", "the section occurs twice")
                .at(section.label())
                .hint(FORGED));
        }
        let start = align_up(end, section.kind.align());
        if start != Some(section.offset) {
            let what = format!("it starts at {}, the section before ends at {end}", section.offset);
            let overlap = section.offset < end && !sections.is_empty();
            let code = if overlap { "engine/section-overlap" } else { "engine/section-offset" };
            return Err(bad(code, what).at(section.label()).hint(FORGED));
        }
        end = match section.offset.checked_add(section.len) {
            Some(end) if end <= header.table_offset => end,
            _ => {
                let what =
                    format!("its {} bytes at {} reach past the last section", section.len, section.offset);
                return Err(bad("engine/section-range", what).at(section.label()).hint(FORGED));
            }
        };
        sections.push(section);
    }
    if align_up(end, ALIGN) != Some(header.table_offset) {
        let what = format!("the table starts at {}, the last section ends at {end}", header.table_offset);
        return Err(bad("engine/table-offset", what).hint(FORGED));
    }
    let has = |kind| sections.iter().any(|s: &Section| s.kind == kind);
    for kind in [SectionKind::Manifest, SectionKind::Ir] {
        if !has(kind) {
            return Err(
                bad("engine/missing-section", format!("there is no {} section", kind.name())).hint(FORGED)
            );
        }
    }
    let (weights, index) = (has(SectionKind::Weights), has(SectionKind::WeightIndex));
    if if header.stripped { weights || !index } else { weights != index } {
        let what = match header.stripped {
            true => "an engine without weight bytes must have a weight index and no weights section",
            false => "a weights section and a weight index must come together",
        };
        return Err(bad("engine/weight-sections", what).hint(FORGED));
    }
    Ok(sections)
}

fn decode_entry(entry: &[u8]) -> Result<Section> {
    let kind = SectionKind::from_code(word32(entry, 0));
    let (flags, align, name_len) = (word32(entry, 4), word32(entry, 24), word32(entry, 28) as usize);
    let (field, hash) = entry[32..].split_at(SECTION_NAME_LEN);
    let name = padded_text(field).filter(|name| name.len() == name_len);
    let name = name.ok_or_else(|| bad("engine/section-name", "a section's name is not text").hint(FORGED))?;
    let hash = std::array::from_fn(|i| hash[i]);
    let section = Section { kind, name, offset: word64(entry, 8), len: word64(entry, 16), hash };
    match (kind, flags) {
        (SectionKind::Unknown(code), 0) => {
            let what = format!("the engine needs sections of kind {code}, which this program does not know");
            return Err(Error::new(Kind::Incompatible, "engine/section-kind", what)
                .hint("use the Millrace that built the engine or a newer one"));
        }
        (SectionKind::Unknown(_), OPTIONAL) | (_, 0) => {}
        _ => {
            let what = format!("the section has illegal flags {flags:#x}");
            return Err(bad("engine/section-flags", what).at(section.label()).hint(FORGED));
        }
    }
    section.check()?;
    if align != kind.align() {
        let what = format!("the alignment is {align}, expected {}", kind.align());
        return Err(bad("engine/section-align", what).at(section.label()).hint(FORGED));
    }
    Ok(section)
}
