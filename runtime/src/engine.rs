//! An engine file, opened and checked: container, manifest, IR, verifier. Touches no device.

use std::path::Path;

use millrace_ir::engine::{EngineFile, SectionKind, Verify};
use millrace_ir::manifest::{Manifest, ModelKind};
use millrace_ir::shape_profile::check_profiles;
use millrace_ir::verify::check;
use millrace_ir::{Error, Kind, Module, Phase, Result, text};

use crate::generation::{ChatTemplate, Tokenizer, TokenizerConfig};
use crate::options::SessionOptions;
use crate::session::Session;

/// A checked engine.
pub struct Engine {
    file: EngineFile,
    manifest: Manifest,
    module: Module,
}

impl Engine {
    /// Opens `path`. The order of trust is container, hashes, manifest, IR text, verifier; weights are hashed up
    /// to 512 MiB.
    ///
    /// # Errors
    /// `engine/..` for a damaged or forged file, `ir/..` for IR that breaks rules.
    pub fn open(path: impl AsRef<Path>) -> Result<Engine> {
        Self::open_with(path, Verify::Auto)
    }

    /// [`Engine::open`] with a choice of how much to hash.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn open_with(path: impl AsRef<Path>, verify: Verify) -> Result<Engine> {
        let place = path.as_ref().display().to_string();
        let file = EngineFile::open(path.as_ref(), verify)?;
        Self::from_file(file).map_err(|e| e.at(place))
    }

    /// An engine from bytes in memory; its weights stay in the file object.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn from_bytes(bytes: Vec<u8>, verify: Verify) -> Result<Engine> {
        Self::from_file(EngineFile::from_bytes(bytes, verify)?)
    }

    fn from_file(file: EngineFile) -> Result<Engine> {
        let manifest = Manifest::from_json(file.manifest_json())?;
        let module = text::parse(file.ir_text())?;
        check(&module)?;
        if module.phase != Phase::Lowered {
            let message = format!("the engine's graph is {}, expected lowered", module.phase);
            return Err(Error::new(Kind::Incompatible, "engine/not-lowered", message)
                .hint("build the engine again with this version"));
        }
        if module.target.as_deref() != Some(&manifest.target) {
            return Err(Error::new(
                Kind::BadInput,
                "engine/manifest",
                "manifest and graph name different targets",
            ));
        }
        check_profiles(&manifest.profiles, &module).map_err(|fault| {
            Error::new(Kind::BadInput, "engine/manifest", fault).hint("the file was altered: build it again")
        })?;
        Ok(Engine { file, manifest, module })
    }

    /// What the engine is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The lowered graph.
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// The container.
    pub fn file(&self) -> &EngineFile {
        &self.file
    }

    /// A session with memory of its own.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn session(&self, options: SessionOptions) -> Result<Session<'_>> {
        Session::new(self, options)
    }

    /// The tokenizer the model came with.
    ///
    /// # Errors
    /// `run/no-tokenizer` if the engine has none, and tokenizer errors.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let bytes = self.file.section(SectionKind::Tokenizer).ok_or_else(|| {
            Error::new(Kind::BadInput, "run/no-tokenizer", "the engine has no tokenizer")
                .hint("use --token-ids, or compile from a folder with tokenizer.json")
        })?;
        Tokenizer::from_bytes(bytes)
    }

    /// The chat template the model came with, if any: `chat_template.jinja` before `tokenizer_config.json`.
    ///
    /// # Errors
    /// Malformed templates or configuration.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        let config = match self.file.section(SectionKind::TokenizerConfig) {
            Some(bytes) => Some(TokenizerConfig::from_bytes(bytes)?),
            None => None,
        };
        let source = match self.file.text(SectionKind::ChatTemplate) {
            Some(text) => Some(text.to_string()),
            None => config.as_ref().and_then(|c| c.default_chat_template().map(str::to_string)),
        };
        let (bos, eos) =
            config.as_ref().map_or((None, None), |c| (c.bos_token.as_deref(), c.eos_token.as_deref()));
        source.map(|s| ChatTemplate::new(&s, bos, eos)).transpose()
    }

    /// Fails unless the engine is of `kind`.
    ///
    /// # Errors
    /// `run/wrong-kind`.
    pub fn need_kind(&self, kind: ModelKind) -> Result<()> {
        if self.manifest.kind == kind {
            return Ok(());
        }
        let message =
            format!("the engine is a {:?}, this needs a {kind:?}", self.manifest.kind).to_lowercase();
        Err(Error::new(Kind::Usage, "run/wrong-kind", message)
            .hint("--prompt runs decoders, --text encoders, --input other graphs"))
    }
}
