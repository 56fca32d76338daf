//! Opens engine files.
//!
//! Order of trust: magic, version, lengths, hash of header and table, table, padding, hashes of sections, weight index,
//! weights. Each step relies only on those before it. Memory is taken only for lengths that were checked against the
//! file's length and the limit of the section's kind. Weight bytes are not held: callers map or read them in the range
//! given. Content of sections is hashed, not understood: manifest and IR are parsed by those who use them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::layout::{self, CORRUPT, FORGED, HEADER_LEN, Header, Section, SectionKind, bad};
use super::weights::{self, WeightRecord};
use crate::error::{Error, Kind, Result};
use crate::positioned::PositionedFile;

/// Largest weights section that [`Verify::Auto`] reads.
pub const AUTO_VERIFY_LIMIT: u64 = 512 << 20;
/// Bytes hashed at a time.
const CHUNK: usize = 1 << 20;
/// Weights sections up to this size are hashed on the calling thread.
const ONE_THREAD_LIMIT: u64 = 16 << 20;

/// How much of the weights is read when an engine is opened. All else is always verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// No weight bytes.
    Metadata,
    /// All weight bytes if there are at most 512 MiB of them, else none.
    #[default]
    Auto,
    /// All weight bytes.
    Full,
}

#[derive(Debug)]
enum Source {
    File(PositionedFile, PathBuf),
    Memory(Vec<u8>),
}

impl Source {
    fn len(&self) -> u64 {
        match self {
            Source::File(file, _) => file.len(),
            Source::Memory(bytes) => bytes.len() as u64,
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let short = || bad("engine/truncated", "the file became shorter while it was in use").hint(CORRUPT);
        match self {
            Source::File(file, path) => file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
                std::io::ErrorKind::UnexpectedEof => short(),
                _ => Error::io("read", path, &e),
            }),
            Source::Memory(bytes) => {
                let start = usize::try_from(offset).map_err(|_| short())?;
                let end = start.checked_add(buf.len()).ok_or_else(short)?;
                buf.copy_from_slice(bytes.get(start..end).ok_or_else(short)?);
                Ok(())
            }
        }
    }

    /// `len` bytes, which the caller has checked against the file's length.
    fn read_vec(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(len).map_err(|_| {
            Error::new(Kind::OutOfMemory, "engine/section-size", "the section exceeds the address space")
        })?;
        let mut bytes = vec![0; len];
        self.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// BLAKE3 of a range, read in chunks into `buffer`.
    fn hash(&self, mut offset: u64, mut len: u64, buffer: &mut Vec<u8>) -> Result<[u8; 32]> {
        let mut hasher = blake3::Hasher::new();
        while len > 0 {
            let take = len.min(CHUNK as u64);
            buffer.resize(take as usize, 0);
            self.read_at(offset, buffer)?;
            hasher.update(buffer);
            offset += take;
            len -= take;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Checks that a range shorter than a page is zero.
    fn check_zero(&self, from: u64, to: u64, place: &str) -> Result<()> {
        let padding = self.read_vec(from, to.saturating_sub(from))?;
        if padding.iter().any(|&b| b != 0) {
            let what = format!("the padding bytes {from}..{to} are not zero");
            return Err(bad("engine/padding", what).at(place).hint(CORRUPT));
        }
        Ok(())
    }
}

/// An open engine file whose metadata is verified.
#[derive(Debug)]
pub struct EngineFile {
    source: Source,
    header: Header,
    identity: [u8; 32],
    sections: Vec<Section>,
    /// Content of `sections`; `None` for those that are not held.
    contents: Vec<Option<Vec<u8>>>,
    records: Vec<WeightRecord>,
    records_by_name: Vec<u32>,
    weights_verified: AtomicBool,
}

impl EngineFile {
    /// Opens and verifies the engine at `path`.
    ///
    /// # Errors
    /// Codes `engine/...` as listed in `docs/engine-format.md`, or an I/O failure.
    pub fn open(path: impl AsRef<Path>, verify: Verify) -> Result<EngineFile> {
        let path = path.as_ref();
        let file = PositionedFile::open(path, true).map_err(|e| Error::io("open", path, &e))?;
        Self::read(Source::File(file, path.to_owned()), verify).map_err(|e| e.at(path.display()))
    }

    /// As [`EngineFile::open`] for an engine in memory.
    ///
    /// # Errors
    /// As [`EngineFile::open`].
    pub fn from_bytes(bytes: Vec<u8>, verify: Verify) -> Result<EngineFile> {
        Self::read(Source::Memory(bytes), verify)
    }

    fn read(source: Source, verify: Verify) -> Result<EngineFile> {
        let page = source.read_vec(0, source.len().min(HEADER_LEN))?;
        let header = Header::decode(&page, source.len())?;
        let table = source.read_vec(header.table_offset, header.file_len - header.table_offset)?;
        let identity = layout::check_seal(&page, &table)?;
        let sections = layout::decode_table(&header, &table)?;

        let mut end = HEADER_LEN;
        for section in &sections {
            source.check_zero(end, section.offset, &format!("before {}", section.label()))?;
            end = section.offset + section.len;
        }
        source.check_zero(end, header.table_offset, "before the section table")?;

        let mut contents = Vec::with_capacity(sections.len());
        for section in &sections {
            contents.push(load(&source, section).map_err(|e| e.at(section.label()))?);
        }
        let (records, weights) = read_index(&sections, &contents)?;
        let records_by_name = weights::by_name(&records)?;
        let engine = EngineFile {
            source,
            header,
            identity,
            sections,
            contents,
            records,
            records_by_name,
            weights_verified: AtomicBool::new(false),
        };
        let read_weights = match verify {
            Verify::Metadata => false,
            Verify::Auto => weights.is_none_or(|len| len <= AUTO_VERIFY_LIMIT),
            Verify::Full => true,
        };
        if read_weights {
            engine.verify_weights()?;
        }
        Ok(engine)
    }

    /// Name and version of the program that wrote the file.
    pub fn producer(&self) -> &str {
        &self.header.producer
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.header.file_len
    }

    /// The hash in the header. It covers every byte of content through the hashes of the table, so equal identities
    /// mean equal engines.
    pub fn identity(&self) -> [u8; 32] {
        self.identity
    }

    /// True if the weight bytes were left out and have to be bound at load by key and hash.
    pub fn is_stripped(&self) -> bool {
        self.header.stripped
    }

    /// The section table, in file order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The content of the section of `kind`, for kinds that occur once; `None` if it is absent or not held.
    pub fn section(&self, kind: SectionKind) -> Option<&[u8]> {
        self.named_section(kind, "")
    }

    /// The content of the section of `kind` and `name`.
    pub fn named_section(&self, kind: SectionKind, name: &str) -> Option<&[u8]> {
        let i = self.sections.iter().position(|s| s.kind == kind && s.name == name)?;
        self.contents[i].as_deref()
    }

    /// Target and content of every kernels section, in file order.
    pub fn kernels(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let all = self.sections.iter().zip(&self.contents).filter(|(s, _)| s.kind == SectionKind::Kernels);
        all.map(|(section, content)| (section.name.as_str(), content.as_deref().unwrap_or_default()))
    }

    /// The text of a section that is text; `None` if it is absent.
    pub fn text(&self, kind: SectionKind) -> Option<&str> {
        std::str::from_utf8(self.section(kind)?).ok()
    }

    /// The manifest: JSON by convention, UTF-8 for certain.
    pub fn manifest_json(&self) -> &[u8] {
        self.section(SectionKind::Manifest).unwrap_or_default()
    }

    /// The lowered IR.
    pub fn ir_text(&self) -> &str {
        self.text(SectionKind::Ir).unwrap_or_default()
    }

    /// All weights in file order.
    pub fn weight_index(&self) -> &[WeightRecord] {
        &self.records
    }

    /// The weight `name`.
    pub fn weight(&self, name: &str) -> Option<&WeightRecord> {
        let found =
            self.records_by_name.binary_search_by(|&i| self.records[i as usize].name.as_str().cmp(name));
        found.ok().map(|i| &self.records[self.records_by_name[i] as usize])
    }

    /// Offset and length of the weights section in the file; `None` if there is none. The offset is a multiple of 4096.
    pub fn weights_range(&self) -> Option<(u64, u64)> {
        let section = self.sections.iter().find(|s| s.kind == SectionKind::Weights)?;
        Some((section.offset, section.len))
    }

    /// The open file, to map or read the weights from; `None` for an engine in memory.
    pub fn file(&self) -> Option<&File> {
        match &self.source {
            Source::File(file, _) => Some(file.file()),
            Source::Memory(_) => None,
        }
    }

    /// The path given to [`EngineFile::open`]; `None` for an engine in memory.
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::File(_, path) => Some(path),
            Source::Memory(_) => None,
        }
    }

    /// Fills `buf` from byte `offset` of `weight`, a record of this engine.
    ///
    /// # Errors
    /// `engine/no-weights` if the engine is stripped, `engine/read-range` if the range leaves the weight or the record
    /// is not of this engine, or an I/O failure.
    pub fn read_weight_at(&self, weight: &WeightRecord, offset: u64, buf: &mut [u8]) -> Result<()> {
        let place = format!("weight {}", weight.name);
        let Some((start, section_len)) = self.weights_range() else {
            return Err(Error::new(
                Kind::Incompatible,
                "engine/no-weights",
                "the engine was built without weights",
            )
            .at(place)
            .hint("give the model folder to bind the weights from"));
        };
        let inside = |from: u64, len: u64, limit: u64| from.checked_add(len).is_some_and(|end| end <= limit);
        if !inside(offset, buf.len() as u64, weight.len) || !inside(weight.offset, weight.len, section_len) {
            let what = format!("{} bytes at {offset} leave the weight's {} bytes", buf.len(), weight.len);
            return Err(Error::new(Kind::Usage, "engine/read-range", what).at(place));
        }
        self.source.read_at(start + weight.offset + offset, buf)
    }

    /// True if all weight bytes were compared with their hashes.
    pub fn weights_verified(&self) -> bool {
        self.weights_verified.load(Ordering::Acquire)
    }

    /// Reads all weights, compares each with its hash, and checks that the bytes between them are zero. Several
    /// threads share the work for large engines. Does nothing if the engine has no weights section.
    ///
    /// # Errors
    /// `engine/weight-hash` or `engine/padding` for the first weight in file order that fails, or an I/O failure.
    pub fn verify_weights(&self) -> Result<()> {
        let Some((start, len)) = self.weights_range() else {
            self.weights_verified.store(true, Ordering::Release);
            return Ok(());
        };
        let threads = match std::thread::available_parallelism() {
            Ok(threads) if len > ONE_THREAD_LIMIT => threads.get().min(8),
            _ => 1,
        };
        let next = AtomicUsize::new(0);
        // Each worker stops at its first failure; numbers are handed out in order, so the lowest failing one is seen.
        let work = || -> Result<(), (usize, Error)> {
            let mut buffer = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= self.records.len() {
                    return Ok(());
                }
                self.verify_record(start, i, &mut buffer).map_err(|e| (i, e))?;
            }
        };
        let results = std::thread::scope(|scope| {
            let helpers: Vec<_> = (1..threads)
                .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let mut results = vec![work()];
            for helper in helpers {
                results.push(helper.join().unwrap_or_else(|_| {
                    Err((0, Error::new(Kind::Internal, "engine/thread", "a hashing thread ended early")))
                }));
            }
            results
        });
        match results.into_iter().filter_map(Result::err).min_by_key(|(i, _)| *i) {
            Some((_, error)) => Err(error),
            None => {
                self.weights_verified.store(true, Ordering::Release);
                Ok(())
            }
        }
    }

    fn verify_record(&self, start: u64, i: usize, buffer: &mut Vec<u8>) -> Result<()> {
        let record = &self.records[i];
        let place = format!("weight {}", record.name);
        let gap_start =
            i.checked_sub(1).map_or(0, |before| self.records[before].offset + self.records[before].len);
        self.source.check_zero(start + gap_start, start + record.offset, &format!("before {place}"))?;
        if self.source.hash(start + record.offset, record.len, buffer)? != record.hash {
            let what = "the weight's bytes do not have their hash";
            return Err(bad("engine/weight-hash", what).at(place).hint(CORRUPT));
        }
        Ok(())
    }
}

/// Reads, hashes and returns a section; hashes only, for what is not held. Weights are left alone.
fn load(source: &Source, section: &Section) -> Result<Option<Vec<u8>>> {
    let Section { kind, name: _, offset, len, hash } = section;
    let wrong_hash =
        || bad("engine/section-hash", "the section's bytes do not have their hash").hint(CORRUPT);
    if *kind == SectionKind::Weights {
        return Ok(None);
    }
    if kind.max_len().is_none() {
        let found = source.hash(*offset, *len, &mut Vec::new())?;
        return if found == *hash { Ok(None) } else { Err(wrong_hash()) };
    }
    let content = source.read_vec(*offset, *len)?;
    if blake3::hash(&content) != *hash {
        return Err(wrong_hash());
    }
    if kind.is_text() && std::str::from_utf8(&content).is_err() {
        return Err(bad("engine/not-utf8", "the section is not UTF-8").hint(FORGED));
    }
    Ok(Some(content))
}

/// The weight records and the length of the weights section, after comparing the section's hash with the records.
fn read_index(
    sections: &[Section],
    contents: &[Option<Vec<u8>>],
) -> Result<(Vec<WeightRecord>, Option<u64>)> {
    let weights = sections.iter().find(|s| s.kind == SectionKind::Weights);
    let index = sections.iter().position(|s| s.kind == SectionKind::WeightIndex);
    let Some(index) = index.and_then(|i| contents[i].as_deref()) else { return Ok((Vec::new(), None)) };
    let records = weights::decode(index, weights.map(|s| s.len))?;
    if weights.is_some_and(|s| s.hash != weights::section_hash(&records)) {
        let what = "the hash of the weights section is not that of its index";
        return Err(bad("engine/section-hash", what).at("section weights").hint(FORGED));
    }
    Ok((records, weights.map(|s| s.len)))
}
