//! `millrace run`: generate text, embed sentences, or run a graph on arrays.

use std::path::{Path, PathBuf};
use std::time::Instant;

use millrace::generation::{Generator, Message, Request, SamplingParams, embed_texts};
use millrace::ir::manifest::ModelKind;
use millrace::{Decoder, Encoder, Engine, Error, Kind, Result, TensorRef, compile};
use serde_json::json;

use super::compile::ModelOptions;
use super::memory::{self, MemoryOptions};
use super::{npy, print, print_json, usage};

/// Run an engine, or a model folder compiled on the fly.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file or a model folder
    engine: PathBuf,
    /// Prompt of a decoder; repeat for a batch
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// Prompt as token ids, such as 1,2,3; repeat for a batch
    #[arg(long, value_name = "IDS", allow_hyphen_values = true)]
    token_ids: Vec<String>,
    /// Wrap each prompt as a user message in the model's chat template
    #[arg(long)]
    chat: bool,
    /// Sentence for an encoder; repeat for a batch
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Vec<String>,
    /// Input of a plain graph as NAME=FILE.npy
    #[arg(long, value_name = "NAME=FILE")]
    input: Vec<String>,
    /// Folder for the outputs of a plain graph, one .npy each
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Most new tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_new_tokens: usize,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true)]
    temperature: f32,
    /// Sample from the k likeliest tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the likeliest tokens that sum to this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of sampling
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after end of sequence tokens
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    model_options: ModelOptions,
    /// Report as JSON
    #[arg(long)]
    json: bool,
    /// Report memory by class on standard error
    #[arg(short, long)]
    verbose: bool,
}

/// A folder that vanishes with the value.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// A fresh folder among the temporary files.
    pub fn new() -> Result<Scratch> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let suffix = since.map_or(0, |d| d.as_nanos());
        let folder = std::env::temp_dir().join(format!("millrace-{}-{suffix:x}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|e| Error::io("create", &folder, &e))?;
        Ok(Scratch(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Leftovers in the temporary folder are harmless.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Opens an engine file, or compiles a folder or IR file to a temporary engine and opens that.
pub fn open(path: &Path, options: &ModelOptions) -> Result<(Engine, Option<Scratch>)> {
    let is_ir = path.extension().is_some_and(|e| e == "ir");
    if !path.is_dir() && !is_ir {
        return Ok((Engine::open(path)?, None));
    }
    let scratch = Scratch::new()?;
    let file = scratch.0.join("model.engine");
    compile(path, &options.resolve()?, None)?.write(&file, &mut |_, _| {})?;
    Ok((Engine::open(&file)?, Some(scratch)))
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let (engine, scratch) = open(&args.engine, &args.model_options)?;
    let built = scratch.is_some();
    match engine.manifest().kind {
        ModelKind::Decoder => generate(args, &engine, built),
        ModelKind::Encoder => embed(args, &engine, built),
        ModelKind::Graph => graph(args, &engine, built),
    }
}

fn token_ids(text: &str) -> Result<Vec<u32>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    text.split(',')
        .map(|t| {
            t.trim().parse().map_err(|_| {
                usage("usage/token-ids", format!("`{}` is no token id", t.trim()))
                    .hint("write --token-ids 1,2,3")
            })
        })
        .collect()
}

fn generate(args: &Args, engine: &Engine, built: bool) -> Result<()> {
    if !args.text.is_empty() || !args.input.is_empty() {
        return Err(usage("usage/inputs", "a decoder takes --prompt or --token-ids"));
    }
    if args.prompt.is_empty() && args.token_ids.is_empty() {
        return Err(
            usage("usage/inputs", "there is no prompt").hint("add --prompt TEXT or --token-ids 1,2,3")
        );
    }
    let tokenizer = if args.prompt.is_empty() { engine.tokenizer().ok() } else { Some(engine.tokenizer()?) };
    let template = if args.chat { engine.chat_template()? } else { None };
    if args.chat && template.is_none() {
        return Err(Error::new(Kind::BadInput, "run/no-template", "the model has no chat template")
            .hint("leave out --chat"));
    }
    let sampling = SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    sampling.check()?;
    let mut prompts: Vec<(Option<String>, Vec<u32>)> = Vec::new();
    for prompt in &args.prompt {
        let Some(tokenizer) = &tokenizer else { continue };
        let ids = match &template {
            Some(template) => {
                let text = template.render(&[Message::new("user", prompt)], true, &serde_json::Map::new())?;
                tokenizer.encode(&text, false)?
            }
            None if prompt.is_empty() => {
                return Err(Error::new(Kind::BadInput, "generation/empty-prompt", "the prompt is empty")
                    .hint("give at least one character or token"));
            }
            None => tokenizer.encode(prompt, true)?,
        };
        prompts.push((Some(prompt.clone()), ids));
    }
    for list in &args.token_ids {
        prompts.push((None, token_ids(list)?));
    }
    let requests: Vec<Request> = prompts
        .iter()
        .enumerate()
        .map(|(index, (_, ids))| Request {
            prompt_ids: ids.clone(),
            max_new_tokens: args.max_new_tokens,
            sampling,
            sequence: index as u64,
            stop_at_eos: !args.ignore_eos,
        })
        .collect();
    let loading = Instant::now();
    let mut session = args.memory.open(engine)?;
    let load_ms = loading.elapsed().as_secs_f64() * 1e3;
    let generating = Instant::now();
    let mut first_token_ms = None;
    let mut model = Decoder::new(&mut session)?;
    let mut generator = Generator::new(&mut model)?;
    // One prompt streams as it comes; a batch is printed when it is complete.
    let stream_now = requests.len() == 1 && !args.json && tokenizer.is_some();
    let mut stream = tokenizer.as_ref().map(|t| t.stream(true));
    let mut failed = None;
    let completions = generator.generate(&requests, |_, token| {
        first_token_ms.get_or_insert_with(|| generating.elapsed().as_secs_f64() * 1e3);
        if stream_now && let Some(stream) = &mut stream {
            match stream.push(token).map(|piece| piece.map(|p| print(&p))) {
                Ok(Some(Err(e))) | Err(e) => failed = Some(e),
                _ => {}
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    if stream_now {
        if let Some(stream) = &mut stream {
            print(&stream.finish()?)?;
        }
        print("\n")?;
    }
    let mut reports = Vec::new();
    for ((prompt, _), completion) in prompts.iter().zip(&completions) {
        let text = match &tokenizer {
            Some(t) => Some(t.decode(completion.text_ids(), true)?),
            None => None,
        };
        if args.json {
            reports.push(json!({
                "prompt": prompt,
                "text": text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish.name(),
                "load_ms": load_ms,
                "first_token_ms": first_token_ms,
            }));
        } else if !stream_now {
            let ids: Vec<String> = completion.token_ids.iter().map(ToString::to_string).collect();
            print(&format!("{}\n", text.unwrap_or_else(|| ids.join(","))))?;
        }
    }
    if args.verbose {
        eprint!("{}", memory::report(&session, built)?);
    }
    if args.json { print_json(&json!(reports)) } else { Ok(()) }
}

fn embed(args: &Args, engine: &Engine, built: bool) -> Result<()> {
    if !args.prompt.is_empty() || !args.token_ids.is_empty() || !args.input.is_empty() {
        return Err(usage("usage/inputs", "an encoder takes --text"));
    }
    if args.text.is_empty() {
        return Err(
            usage("usage/inputs", "there is no text").hint("add --text TEXT, several times for a batch")
        );
    }
    let tokenizer = engine.tokenizer()?;
    let mut session = args.memory.open(engine)?;
    let texts: Vec<&str> = args.text.iter().map(String::as_str).collect();
    let embeddings = embed_texts(&mut Encoder::new(&mut session)?, &tokenizer, &texts)?;
    if args.verbose {
        eprint!("{}", memory::report(&session, built)?);
    }
    if args.json {
        let pairs = texts.iter().zip(&embeddings);
        return print_json(&json!(
            pairs.map(|(t, e)| json!({"text": t, "embedding": e})).collect::<Vec<_>>()
        ));
    }
    for embedding in &embeddings {
        let values: Vec<String> = embedding.iter().map(|v| format!("{v:.6}")).collect();
        print(&format!("{}\n", values.join(" ")))?;
    }
    Ok(())
}

fn graph(args: &Args, engine: &Engine, built: bool) -> Result<()> {
    if !args.prompt.is_empty() || !args.token_ids.is_empty() || !args.text.is_empty() {
        return Err(usage("usage/inputs", "a plain graph takes --input NAME=FILE.npy"));
    }
    let mut arrays = Vec::new();
    for spec in &args.input {
        let (name, file) = spec.split_once('=').ok_or_else(|| {
            usage("usage/inputs", format!("`{spec}` is no input")).hint("write --input NAME=FILE.npy")
        })?;
        arrays.push((name.to_string(), npy::read(Path::new(file))?));
    }
    let declared = engine.module().input_types();
    if let Some((extra, _)) = arrays.iter().find(|(n, _)| !declared.iter().any(|(d, _)| d == n)) {
        let names: Vec<&str> = declared.iter().map(|(n, _)| *n).collect();
        return Err(usage("usage/inputs", format!("there is no input `{extra}`"))
            .hint(format!("inputs are {}", names.join(", "))));
    }
    let mut inputs = Vec::new();
    for (name, ty) in &declared {
        let array = arrays.iter().find(|(n, _)| n == name).map(|(_, a)| a).ok_or_else(|| {
            usage("usage/inputs", format!("input `{name}` ({ty}) is missing"))
                .hint(format!("add --input {name}=FILE.npy"))
        })?;
        inputs.push(array.cast(ty.dtype)?);
    }
    let mut session = args.memory.open(engine)?;
    let refs: Vec<TensorRef<'_>> =
        inputs.iter().map(|a| TensorRef { dtype: a.dtype, shape: &a.shape, bytes: &a.bytes }).collect();
    session.run(&refs)?;
    if args.verbose {
        eprint!("{}", memory::report(&session, built)?);
    }
    let mut report = Vec::new();
    for (index, (name, ty)) in engine.module().output_types().into_iter().enumerate() {
        let Some(output) = session.output(index) else { continue };
        let file =
            args.output_dir.as_ref().map(|d| d.join(format!("{}.npy", name.replace(['/', '\\'], "_"))));
        if let (Some(file), Some(folder)) = (&file, &args.output_dir) {
            std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
            npy::write(file, &output)?;
        }
        if args.json {
            report.push(json!({"name": name, "dtype": ty.dtype, "shape": output.shape, "file": file}));
        } else {
            let target = file.map_or_else(String::new, |f| format!(" -> {}", f.display()));
            print(&format!("{name}: {}{:?}{target}\n", ty.dtype, output.shape))?;
        }
    }
    if args.json { print_json(&json!(report)) } else { Ok(()) }
}
