"""What the GPU scripts of this folder share: the millrace program, model shapes, seeded checkpoints, and the report's head."""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "tests" / "data" / "configs"
SHAPES = {"1b": CONFIGS / "llama-3.2-1b", "8b": CONFIGS / "llama-3.1-8b"}


def say(text):
    print(text, file=sys.stderr, flush=True)


def environment():
    """This process's environment, with the folders of NVIDIA's Python packages for the runtime compiler."""
    result = dict(os.environ)
    try:
        import nvidia
    except ImportError:
        return result
    folders = [str(f) for root in nvidia.__path__ for f in sorted(pathlib.Path(root).glob("*/lib"))]
    result["LD_LIBRARY_PATH"] = ":".join([f for f in [result.get("LD_LIBRARY_PATH")] if f] + folders)
    return result


class Millrace:
    """The program, and its target on this machine."""

    def __init__(self, program, target=None):
        self.program, self.environment = str(program), environment()
        self.target = target or self.find_target()

    @staticmethod
    def find_target():
        found = command_line("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        if not found:
            sys.exit("nvidia-smi finds no GPU; --target names one")
        number = found.splitlines()[0].replace(".", "")
        return f"cuda:sm_{number}{'a' if number == '90' else ''}"

    def run(self, *words, timeout=600):
        """Standard output and wall seconds; raises with the program's message."""
        begin = time.perf_counter()
        done = subprocess.run(
            [self.program, *map(str, words)], capture_output=True, text=True, env=self.environment, timeout=timeout
        )
        wall = time.perf_counter() - begin
        if done.returncode:
            shown = " ".join(str(w)[:80] for w in words[:12])
            raise RuntimeError(f"millrace {shown}: status {done.returncode}: {done.stderr.strip()[-800:]}")
        return done.stdout, wall

    def json(self, *words, timeout=600):
        text, wall = self.run(*words, timeout=timeout)
        return json.loads(text), wall

    def compile(self, model, engine, *options, target=None):
        """Compiles unless the engine is there already; returns seconds."""
        if pathlib.Path(engine).exists():
            return 0.0
        _, wall = self.run("compile", model, "-o", engine, "--target", target or self.target, *options)
        return wall

    def bench(self, engine, batches, lengths, *options, runs=3):
        """Rows of a sweep."""
        rows, _ = self.json(
            "bench", engine, "--batch-size", ";".join(map(str, batches)), "--input-output-len", lengths,
            "--runs", runs, "-o", "json", *options,
        )  # fmt: skip
        return rows


def spread(samples):
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
    }


def command_line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def head(millrace):
    """Hardware, driver and versions."""
    import torch

    found = {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": command_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": command_line("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "millrace": command_line(millrace.program, "--version"),
        "commit": os.environ.get("MILLRACE_COMMIT") or command_line("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "target": millrace.target,
    }
    try:
        import transformers

        found["transformers"] = transformers.__version__
    except ImportError:
        found["transformers"] = None
    return found


def tensors(fields):
    """Names, shapes and standard deviations of a Llama checkpoint's tensors, in the order of the file.

    Projections keep the deviation of normed rows near 1, and those that add to the residual stream are divided by the root
    of twice the number of layers, as usual before training: without that, a random network of 32 layers amplifies
    roundings so much that no two programs in bf16 agree. The head's rows are part those of the embedding in another
    order (`successor`), part noise, so that a token's successor has a larger logit than chance gives as long as every
    layer adds what it should: the largest logit stands out as in trained models, and is not often a matter of rounding.
    """
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    heads, pairs = fields["num_attention_heads"], fields["num_key_value_heads"]
    width = fields.get("head_dim") or hidden // heads
    deviation, layers = 0.02 * (4096 / hidden) ** 0.5, fields["num_hidden_layers"]
    added = deviation / (2 * layers) ** 0.5
    yield "model.embed_tokens.weight", (fields["vocab_size"], hidden), None
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,), 0.0
        yield at + "self_attn.q_proj.weight", (heads * width, hidden), deviation
        yield at + "self_attn.k_proj.weight", (pairs * width, hidden), deviation
        yield at + "self_attn.v_proj.weight", (pairs * width, hidden), deviation
        yield at + "self_attn.o_proj.weight", (hidden, heads * width), added
        yield at + "post_attention_layernorm.weight", (hidden,), 0.0
        yield at + "mlp.gate_proj.weight", (inner, hidden), deviation
        yield at + "mlp.up_proj.weight", (inner, hidden), deviation
        yield at + "mlp.down_proj.weight", (hidden, inner), added
    yield "model.norm.weight", (hidden,), 0.0
    if not fields.get("tie_word_embeddings"):
        yield "lm_head.weight", (fields["vocab_size"], hidden), None


# A token's successor is the token itself times this, modulo the vocabulary.
STEP = 48271


def successor(token, vocabulary):
    return token * STEP % vocabulary


def make_weights(fields, seed, embedding=2.0, likeness=None, device="cuda"):
    """All tensors in bf16 on the device. `embedding` is the deviation of embedded rows, `likeness` the part of them in the
    head's, in deviations of its noise."""
    import torch

    weights, vocabulary = {}, fields["vocab_size"]
    likeness = 9 * fields["hidden_size"] ** -0.5 if likeness is None else likeness
    for index, (name, shape, deviation) in enumerate(tensors(fields)):
        generator = torch.Generator(device).manual_seed(seed * 100_003 + index)
        if name == "lm_head.weight":
            rows = weights["model.embed_tokens.weight"]
            head = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            order = torch.arange(vocabulary, device=device) * STEP % vocabulary
            head[order] += rows * (likeness / embedding)
            head *= shape[1] ** -0.5
            weights[name] = head
            continue
        tensor = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        if deviation is None:
            tensor *= embedding
        elif deviation == 0.0:
            tensor = 1 + 0.1 * tensor
        else:
            tensor *= deviation
        weights[name] = tensor
    return weights


def write_checkpoint(fields, weights, folder, shard_bytes=4 << 30):
    """A model folder: config.json and safetensors shards. Returns seconds."""
    import threading

    import torch
    from safetensors.torch import save_file

    begin = time.perf_counter()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in weights.items():
        length = tensor.numel() * tensor.element_size()
        if size + length > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += length
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]

    def write(name, shard):
        save_file({k: v.cpu() for k, v in shard.items()}, str(folder / name), metadata={"format": "pt"})

    threads = [threading.Thread(target=write, args=pair) for pair in zip(names, shards)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    missing = [n for n in names if not (folder / n).exists()]
    if missing:
        raise RuntimeError(f"could not write {', '.join(missing)}")
    places = {key: name for name, shard in zip(names, shards) for key in shard}
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def torch_model(fields, weights, implementation="sdpa", dtype=None):
    """The transformers model over these tensors: they are shared unless `dtype` is another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {k: v for k, v in fields.items() if k not in ("architectures", "model_type", "torch_dtype", "dtype")}
    config = LlamaConfig(**fields)
    config._attn_implementation = implementation
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {k: v if dtype is None else v.to(dtype) for k, v in weights.items()}
    if fields.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    # The rotary table is no part of the state: built again on the device.
    rotary = model.model.rotary_emb
    with torch.device("cuda"):
        model.model.rotary_emb = type(rotary)(config)
    if fields.get("tie_word_embeddings"):
        model.tie_weights()
    return model.eval()
