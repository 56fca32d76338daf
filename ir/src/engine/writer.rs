//! Writes engine files.
//!
//! Sections are appended in the order given; weights are streamed, hashed by a second thread while they are written; the
//! header comes last, so a file without it is no engine. Memory: a few MiB beside what the caller holds. The bytes
//! are a function of what was given. Until [`EngineWriter::finish`] returns, the target path keeps what it held before.

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use super::atomic::AtomicFile;
use super::hashing::{Hashing, Message};
use super::layout::{
    self, ALIGN, HEADER_LEN, Header, MAX_SECTIONS, PRODUCER_LEN, Section, SectionKind, align_up,
};
use super::weights::{self, WeightMeta, WeightRecord};
use crate::error::{Error, Kind, Result};

/// Bytes handed to the hashing thread at a time.
const CHUNK: usize = 1 << 20;

/// What the header says of the writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// Name and version of the program; at most 64 bytes without control characters.
    pub producer: String,
}

impl Default for WriterOptions {
    fn default() -> Self {
        WriterOptions { producer: concat!("millrace ", env!("CARGO_PKG_VERSION")).to_owned() }
    }
}

/// A finished engine file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenEngine {
    /// Length in bytes.
    pub len: u64,
    /// The hash in its header, which covers every byte of content; see [`super::EngineFile::identity`].
    pub identity: [u8; 32],
}

#[derive(Debug)]
enum Sink {
    File(AtomicFile),
    Memory(Vec<u8>),
}

impl Sink {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Sink::File(out) => out.file().write_all(bytes).map_err(|e| Error::io("write", out.target(), &e)),
            Sink::Memory(out) => {
                out.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Replaces the first bytes.
    fn set_start(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Sink::File(out) => out
                .file()
                .seek(SeekFrom::Start(0))
                .and_then(|_| out.file().write_all(bytes))
                .map_err(|e| Error::io("write", out.target(), &e)),
            Sink::Memory(out) => {
                out[..bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// Writes one engine file, section by section.
#[derive(Debug)]
pub struct EngineWriter {
    sink: Sink,
    producer: String,
    position: u64,
    sections: Vec<Section>,
    stripped: bool,
    /// A write failed or a weights writer was dropped unfinished.
    broken: bool,
}

fn usage(code: &'static str, message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, code, message)
}

fn too_large() -> Error {
    usage("engine/too-large", "the engine exceeds 64-bit offsets")
}

impl EngineWriter {
    /// Starts the file that [`EngineWriter::finish`] puts at `path`, replacing what is there then. Temporary files that
    /// killed writers of the same path left behind are removed.
    ///
    /// # Errors
    /// `engine/producer` or `engine/target` for illegal arguments, or an I/O failure.
    pub fn create(path: impl AsRef<Path>, options: &WriterOptions) -> Result<EngineWriter> {
        check_producer(options)?;
        Self::start(Sink::File(AtomicFile::create(path.as_ref())?), options)
    }

    /// Starts an engine in memory, for tests and small engines; see [`EngineWriter::into_bytes`].
    ///
    /// # Errors
    /// `engine/producer` for an illegal producer.
    pub fn in_memory(options: &WriterOptions) -> Result<EngineWriter> {
        check_producer(options)?;
        Self::start(Sink::Memory(Vec::new()), options)
    }

    fn start(sink: Sink, options: &WriterOptions) -> Result<EngineWriter> {
        let producer = options.producer.clone();
        let mut writer = EngineWriter {
            sink,
            producer,
            position: 0,
            sections: Vec::new(),
            stripped: false,
            broken: false,
        };
        writer.append(&[0; HEADER_LEN as usize])?;
        Ok(writer)
    }

    /// Appends a section. `name` is empty but for [`SectionKind::Kernels`] (a target, for example `cuda:sm_90a`) and
    /// [`SectionKind::Unknown`], which is marked as optional for readers.
    ///
    /// # Errors
    /// `engine/section-kind`, `engine/section-name`, `engine/section-size`, `engine/duplicate-section`,
    /// `engine/section-count`, `engine/not-utf8` for an illegal section, or an I/O failure.
    pub fn section(&mut self, kind: SectionKind, name: &str, content: &[u8]) -> Result<()> {
        if matches!(kind, SectionKind::Weights | SectionKind::WeightIndex) {
            let what = "weights and their index are written with `begin_weights`";
            return Err(usage("engine/section-kind", what).hint("call begin_weights"));
        }
        if let SectionKind::Unknown(code) = kind
            && SectionKind::KNOWN.iter().any(|known| known.code() == code)
        {
            let what = format!("{code} is the number of a known kind");
            return Err(usage("engine/section-kind", what).hint("choose a number that has no meaning"));
        }
        if kind.is_text() && std::str::from_utf8(content).is_err() {
            return Err(
                usage("engine/not-utf8", "the content must be UTF-8").at(format!("section {}", kind.name()))
            );
        }
        self.append_section(kind, name, content)
    }

    /// Starts the weights section. Nothing else can be written until [`WeightsWriter::finish`] returned.
    ///
    /// # Errors
    /// `engine/duplicate-section` if the weights were written before, or an I/O failure.
    pub fn begin_weights(&mut self) -> Result<WeightsWriter<'_>> {
        WeightsWriter::start(self, false)
    }

    /// As [`EngineWriter::begin_weights`] for an engine that keeps the records of its weights and leaves out their
    /// bytes: what is written is hashed and dropped.
    ///
    /// # Errors
    /// As [`EngineWriter::begin_weights`].
    pub fn begin_stripped_weights(&mut self) -> Result<WeightsWriter<'_>> {
        WeightsWriter::start(self, true)
    }

    /// Completes the file, makes it durable and moves it to its path.
    ///
    /// # Errors
    /// `engine/missing-section` without a manifest or IR, `engine/write-failed` after an earlier failure, or an I/O
    /// failure. In all cases but one the path keeps what it held; if only making the rename durable failed, it holds
    /// the new engine.
    pub fn finish(mut self) -> Result<WrittenEngine> {
        let written = self.complete()?;
        match self.sink {
            Sink::File(file) => file.commit()?,
            Sink::Memory(_) => {
                return Err(usage("engine/target", "the engine is in memory: call into_bytes"));
            }
        }
        Ok(written)
    }

    /// The bytes of an engine written in memory.
    ///
    /// # Errors
    /// As [`EngineWriter::finish`]; `engine/target` if the engine is written to a file.
    pub fn into_bytes(mut self) -> Result<Vec<u8>> {
        self.complete()?;
        match self.sink {
            Sink::Memory(bytes) => Ok(bytes),
            Sink::File(_) => Err(usage("engine/target", "the engine goes to a file: call finish")),
        }
    }

    fn complete(&mut self) -> Result<WrittenEngine> {
        self.check_sound()?;
        let table_offset = self.pad_to(ALIGN)?;
        let section_count = self.sections.len() as u32;
        let table_len = (self.sections.len() * layout::ENTRY_LEN) as u64;
        let file_len = table_offset.checked_add(table_len).ok_or_else(too_large)?;
        let header = Header {
            producer: self.producer.clone(),
            stripped: self.stripped,
            file_len,
            table_offset,
            section_count,
        };
        let (page, table) = layout::encode(&header, &self.sections);
        // The reader's own rules judge what was written, so that no file is finished that cannot be opened.
        layout::decode_table(&header, &table)?;
        self.append(&table)?;
        self.sink.set_start(&page)?;
        Ok(WrittenEngine { len: file_len, identity: layout::seal_hash(&page, &table) })
    }

    fn check_sound(&self) -> Result<()> {
        if self.broken {
            let what = "the engine cannot be continued after a failed write or unfinished weights";
            return Err(usage("engine/write-failed", what).hint("start the engine again"));
        }
        Ok(())
    }

    /// Appends without a look at the content's rules.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.position.checked_add(bytes.len() as u64).ok_or_else(too_large)?;
        self.sink.append(bytes).inspect_err(|_| self.broken = true)?;
        self.position = end;
        Ok(())
    }

    /// Appends zeros up to a multiple of `align` and returns the position.
    fn pad_to(&mut self, align: u32) -> Result<u64> {
        let target = align_up(self.position, align).ok_or_else(too_large)?;
        const ZEROS: [u8; layout::WEIGHTS_ALIGN as usize] = [0; layout::WEIGHTS_ALIGN as usize];
        // Less than an alignment.
        let gap = (target - self.position) as usize;
        self.append(&ZEROS[..gap])?;
        Ok(target)
    }

    fn append_section(&mut self, kind: SectionKind, name: &str, content: &[u8]) -> Result<()> {
        let hash = *blake3::hash(content).as_bytes();
        let section = Section { kind, name: name.to_owned(), offset: 0, len: content.len() as u64, hash };
        self.check_section(&section)?;
        let offset = self.pad_to(kind.align())?;
        self.append(content)?;
        self.sections.push(Section { offset, ..section });
        Ok(())
    }

    fn check_section(&self, section: &Section) -> Result<()> {
        self.check_sound()?;
        section.check()?;
        if self.sections.iter().any(|s| s.kind == section.kind && s.name == section.name) {
            return Err(
                usage("engine/duplicate-section", "the section was written before").at(section.label())
            );
        }
        if self.sections.len() as u32 >= MAX_SECTIONS {
            return Err(usage("engine/section-count", format!("more than {MAX_SECTIONS} sections")));
        }
        Ok(())
    }
}

fn check_producer(options: &WriterOptions) -> Result<()> {
    let producer = &options.producer;
    if producer.len() > PRODUCER_LEN || producer.chars().any(char::is_control) {
        let what = format!("the producer must have at most {PRODUCER_LEN} bytes and no control characters");
        return Err(usage("engine/producer", what).hint("shorten the producer's name"));
    }
    Ok(())
}

/// Streams the weights of an engine. Dropping it unfinished spoils the engine writer.
#[derive(Debug)]
pub struct WeightsWriter<'w> {
    writer: &'w mut EngineWriter,
    stripped: bool,
    hashing: Hashing,
    chunk: Vec<u8>,
    /// The weight being written, and its start.
    current: Option<(WeightMeta, u64)>,
    /// Bytes of the section so far.
    end: u64,
    /// Hashes are filled in at the end.
    records: Vec<WeightRecord>,
    names: BTreeSet<String>,
}

impl<'w> WeightsWriter<'w> {
    fn start(writer: &'w mut EngineWriter, stripped: bool) -> Result<Self> {
        writer.check_sound()?;
        let written = [SectionKind::Weights, SectionKind::WeightIndex];
        if writer.sections.iter().any(|s| written.contains(&s.kind)) {
            return Err(usage("engine/duplicate-section", "the weights were written before"));
        }
        if !stripped {
            writer.pad_to(SectionKind::Weights.align())?;
        }
        let hashing = Hashing::start()?;
        writer.broken = true;
        let (records, names) = (Vec::new(), BTreeSet::new());
        Ok(WeightsWriter {
            writer,
            stripped,
            hashing,
            chunk: Vec::new(),
            current: None,
            end: 0,
            records,
            names,
        })
    }

    /// Starts a weight, after ending the one before.
    ///
    /// # Errors
    /// `engine/weight-name`, `engine/weight-rank`, `engine/duplicate-weight` for an illegal weight, or what ending the
    /// one before gives.
    pub fn begin(&mut self, meta: WeightMeta) -> Result<()> {
        self.end_current()?;
        weights::check(&meta.name, meta.dtype, &meta.shape, &meta.sources, u64::MAX)?;
        if !self.names.insert(meta.name.clone()) {
            return Err(usage("engine/duplicate-weight", "the weight was written before").at(meta.name));
        }
        let start = align_up(self.end, ALIGN).ok_or_else(too_large)?;
        if !self.stripped {
            self.writer.append(&[0; ALIGN as usize][..(start - self.end) as usize])?;
        }
        self.end = start;
        self.current = Some((meta, start));
        Ok(())
    }

    /// Appends bytes to the weight begun last. Pieces of any size are gathered.
    ///
    /// # Errors
    /// `engine/no-weight` before the first [`WeightsWriter::begin`], or an I/O failure.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        if self.current.is_none() {
            return Err(usage("engine/no-weight", "there is no weight to write to").hint("call begin first"));
        }
        self.end = self.end.checked_add(bytes.len() as u64).ok_or_else(too_large)?;
        while !bytes.is_empty() {
            let (head, tail) = bytes.split_at(bytes.len().min(CHUNK - self.chunk.len()));
            self.chunk.extend_from_slice(head);
            bytes = tail;
            if self.chunk.len() == CHUNK {
                self.flush(CHUNK)?;
            }
        }
        Ok(())
    }

    /// [`WeightsWriter::begin`] and [`WeightsWriter::write`] in one.
    ///
    /// # Errors
    /// As these.
    pub fn weight(&mut self, meta: WeightMeta, bytes: &[u8]) -> Result<()> {
        self.begin(meta)?;
        self.write(bytes)
    }

    /// Ends the section and writes the weight index.
    ///
    /// # Errors
    /// `engine/weight-size` if the last weight has too few bytes, `engine/section-size` for too large an index, or an
    /// I/O failure.
    pub fn finish(mut self) -> Result<()> {
        self.end_current()?;
        let WeightsWriter { writer, stripped, hashing, end, mut records, .. } = self;
        let hashes = hashing.finish()?;
        for (record, hash) in records.iter_mut().zip(hashes) {
            record.hash = hash;
        }
        writer.broken = false;
        writer.stripped = stripped;
        if !stripped {
            let hash = weights::section_hash(&records);
            let offset = writer.position - end;
            let section = Section { kind: SectionKind::Weights, name: String::new(), offset, len: end, hash };
            writer.check_section(&section)?;
            writer.sections.push(section);
        }
        writer.append_section(SectionKind::WeightIndex, "", &weights::encode(&records))
    }

    fn end_current(&mut self) -> Result<()> {
        let Some((meta, offset)) = self.current.take() else { return Ok(()) };
        self.flush(0)?;
        self.hashing.send(Message::EndOfWeight)?;
        let WeightMeta { name, dtype, shape, sources } = meta;
        let len = self.end - offset;
        weights::check(&name, dtype, &shape, &sources, len)?;
        self.records.push(WeightRecord { name, dtype, shape, offset, len, hash: [0; 32], sources });
        Ok(())
    }

    /// Hands the gathered bytes on; the file is written while they are hashed.
    fn flush(&mut self, next_capacity: usize) -> Result<()> {
        let chunk = Arc::new(std::mem::replace(&mut self.chunk, Vec::with_capacity(next_capacity)));
        if chunk.is_empty() {
            return Ok(());
        }
        self.hashing.send(Message::Data(Arc::clone(&chunk)))?;
        if self.stripped { Ok(()) } else { self.writer.append(&chunk) }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::dtype::DType;

    /// A device that refuses every byte takes the place of the disk after the first section.
    #[test]
    fn a_full_disk_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.engine");
        std::fs::write(&path, "old").unwrap();
        let mut writer = EngineWriter::create(&path, &WriterOptions::default()).unwrap();
        writer.section(SectionKind::Manifest, "", b"{}").unwrap();
        writer.section(SectionKind::Ir, "", b"").unwrap();
        let mut weights = writer.begin_weights().unwrap();
        weights.writer.sink = match std::mem::replace(&mut weights.writer.sink, Sink::Memory(Vec::new())) {
            Sink::File(mut file) => {
                *file.file() = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
                Sink::File(file)
            }
            memory => memory,
        };
        let (shape, sources) = (vec![3 << 20], Vec::new());
        weights.begin(WeightMeta { name: "w".into(), dtype: DType::U8, shape, sources }).unwrap();
        let error = weights.write(&vec![1; 3 << 20]).unwrap_err();
        assert_eq!((error.kind(), error.code()), (Kind::OutOfMemory, "io/disk-full"));
        drop(weights);
        assert_eq!(writer.finish().unwrap_err().code(), "engine/write-failed");
        let names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["x.engine"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}
