#!/usr/bin/env python3
"""A Llama checkpoint with seeded random weights through Millrace and through transformers, on one GPU.

Writes the checkpoint (safetensors, bf16) and compiles it. Then
- load to first token: `millrace run` with one new token, the engine in the page cache; wall time of the whole process,
  and the times that the program tells itself;
- logits of every position of one sequence, against transformers in bf16 and in f32;
- greedy tokens of a generation, each against the largest logit of transformers after the same tokens.
The weights are such that the largest logit stands out (`gpu_common.tensors`). How far two programs in bf16 may differ depends
on the weights: the less the embedded token counts in the sum of all layers (--embedding), the more roundings are
amplified. The f32 model tells how far from the truth either side is, which is the fairer measure.

The 8B shape needs 34 GB in --folder, 32 GB of memory for the page cache, and 60 GB on the GPU (25 with --no-f32).
Exit code 1 if a goal is missed.
"""
import argparse
import datetime
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

import gpu_common as common
from gpu_common import ROOT, SHAPES, say

TOP1, RELATIVE, FIRST_TOKEN = 0.99, 2e-2, 1.5


def read_through(path):
    """Reads a file once, so that it is in the page cache; seconds and bytes."""
    begin, total = time.perf_counter(), 0
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return time.perf_counter() - begin, total


def first_token(millrace, engine, ids, runs):
    """Times of processes that load the engine and make one token."""
    command = ["run", engine, "--token-ids", ",".join(map(str, ids)), "--max-new-tokens", 1, "--ignore-eos", "--json"]
    walls, told = [], []
    for _ in range(runs):
        answer, wall = millrace.json(*command)
        walls.append(wall)
        entry = answer[0] if isinstance(answer, list) else answer
        told.append({k: v for k, v in entry.items() if k.endswith("_ms")})
    return {"wall_s": walls, "median_s": statistics.median(walls), "told": told}


def start_up(millrace, scratch):
    """The same for a model of a few kilobytes: what process and driver take before any weight."""
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 512,
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    model = scratch / "small"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(fields))
    engine = scratch / "small.engine"
    millrace.compile(model, engine, "--dummy-weights", "--max-batch-size", 1)
    return first_token(millrace, engine, range(16), 3)


def our_logits(millrace, engine, ids, scratch):
    """Rows of logits by position as a float32 array, or None if the program has no option for that."""
    import numpy

    text, _ = millrace.run("eval", "--help")
    if "--logits" not in text:
        return None
    source, target = scratch / "ids.txt", scratch / "logits.npy"
    source.write_text("\n".join(map(str, ids)) + "\n")
    millrace.run("eval", engine, "--token-ids-file", source, "--logits", target)
    result = numpy.load(target)
    target.unlink()
    return result


def our_largest(millrace, engine, ids, positions):
    """The token with the largest logit at each position, by prompts that end there."""
    command = ["run", engine, "--max-new-tokens", 1, "--ignore-eos", "--json"]
    for position in positions:
        command += ["--token-ids", ",".join(map(str, ids[: position + 1]))]
    done, _ = millrace.json(*command)
    return [entry["token_ids"][0] for entry in done]


def torch_logits(model, ids):
    import torch

    return model(input_ids=torch.tensor([ids], device="cuda"), use_cache=False).logits[0].float()


def compare(found, expected):
    """Agreement of two arrays of logits, by rows."""
    import torch

    difference = found - expected
    top, wanted = found.argmax(-1), expected.argmax(-1)
    rows = difference.norm(dim=-1) / expected.norm(dim=-1)
    differ = torch.nonzero(top != wanted).flatten()
    # How much larger the expected token is than the found one, in deviations of the row.
    gaps = expected[differ, wanted[differ]] - expected[differ, top[differ]]
    gaps = gaps / expected.std(dim=-1)[differ]
    return {
        "top1": (top == wanted).float().mean().item(),
        "relative_error": (difference.norm() / expected.norm()).item(),
        "largest_relative_error_of_a_row": rows.max().item(),
        "largest_absolute_error": difference.abs().max().item(),
        "gaps_where_top1_differs": [round(g, 4) for g in sorted(gaps.tolist(), reverse=True)[:32]],
    }


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program = os.environ.get("MILLRACE") or ROOT / "target" / "release" / "millrace"
    parser.add_argument("--millrace", type=pathlib.Path, default=program, help="or environment MILLRACE")
    parser.add_argument("--target", help="such as cuda:sm_90a; this GPU's by default")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers, for trying things out")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first new one")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the generation")
    parser.add_argument("--runs", type=int, default=5, help="processes from load to first token")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--embedding", type=float, default=2.0, help="deviation of embedded rows; layers add about 1.5")
    parser.add_argument("--likeness", type=float, help="of the head to the embedding: larger, clearer tokens")
    parser.add_argument("--no-f32", action="store_true", help="leave out the f32 reference")
    parser.add_argument("--folder", type=pathlib.Path, help="where files go [default: a temporary folder, removed]")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    return parser.parse_args()


def measure(args, millrace, scratch, report):
    import torch

    fields = json.loads((SHAPES[args.shape] / "config.json").read_text())
    fields["num_hidden_layers"] = args.layers or fields["num_hidden_layers"]
    # A tied head would make every token its own successor.
    fields["tie_word_embeddings"] = False
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, fields["vocab_size"], (args.positions,), generator=generator).tolist()
    folder, engine = scratch / "checkpoint", scratch / "model.engine"
    seconds = report["seconds"] = {}
    weights = common.make_weights(fields, args.seed, args.embedding, args.likeness)
    seconds["write_checkpoint"] = common.write_checkpoint(fields, weights, folder)
    seconds["compile"] = millrace.compile(
        folder, engine, "--max-batch-size", 1, "--max-seq-len", max(args.positions, args.prompt + args.new_tokens) + 8,
        "--max-num-tokens", args.positions, "--max-logit-rows", args.positions,
    )  # fmt: skip
    shutil.rmtree(folder)
    say(", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()))

    seconds["read_engine"], report["engine_bytes"] = read_through(engine)
    prompt = ids[: args.prompt]
    report["first_token"] = first_token(millrace, engine, prompt, args.runs)
    report["first_token_small_model"] = start_up(millrace, scratch)
    told = report["first_token"]["told"][-1]
    say(
        f"load to first token: {report['first_token']['median_s']:.3f} s wall ({told or 'the program tells no times'}), "
        f"small model {report['first_token_small_model']['median_s']:.3f} s, goal {FIRST_TOKEN} s"
    )
    logits = our_logits(millrace, engine, ids, scratch)
    positions = range(7, args.positions, 8)
    largest = our_largest(millrace, engine, ids, positions) if logits is None else None
    done, _ = millrace.json(
        "run", engine, "--token-ids", ",".join(map(str, prompt)), "--max-new-tokens", args.new_tokens, "--ignore-eos",
        "--json",
    )  # fmt: skip
    new = done[0]["token_ids"]

    model = common.torch_model(fields, weights)
    references = {"transformers bf16": torch_logits(model, ids)}
    continued = {"transformers bf16": torch_logits(model, prompt + new)}
    del model
    if not args.no_f32:
        model = common.torch_model(fields, weights, dtype=torch.float32)
        references["transformers f32"] = torch_logits(model, ids)
        continued["transformers f32"] = torch_logits(model, prompt + new)
        del model
    base = references["transformers bf16"]
    row = base.std(dim=-1).mean().item()
    follow = torch.tensor([common.successor(i, fields["vocab_size"]) for i in ids], device="cuda")
    report["logits"] = {
        "deviation": row,
        "successors_on_top": (base.argmax(-1) == follow).float().mean().item(),
        "different_tokens_on_top": len(set(base.argmax(-1).tolist())),
    }
    rows = report["comparisons"] = {}
    for name, expected in references.items():
        if logits is not None:
            rows[f"millrace / {name}"] = compare(torch.from_numpy(logits).to(expected.device).float(), expected)
        else:
            wanted = expected.argmax(-1)[list(positions)].tolist()
            same = sum(a == b for a, b in zip(largest, wanted, strict=True)) / len(wanted)
            rows[f"millrace / {name}"] = {"top1": same, "positions": len(wanted)}
    if "transformers f32" in references:
        rows["transformers bf16 / transformers f32"] = compare(base, references["transformers f32"])
    report["generation"] = {}
    for name, expected in continued.items():
        wanted = expected.argmax(-1)[len(prompt) - 1 : -1].tolist()
        report["generation"][name] = sum(a == b for a, b in zip(new, wanted, strict=True)) / len(wanted)
    judged = rows["millrace / transformers bf16"]
    report["goals"] = {
        f"first token within {FIRST_TOKEN} s": report["first_token"]["median_s"] <= FIRST_TOKEN,
        f"top-1 agreement at least {TOP1:.0%}": judged["top1"] >= TOP1,
    }
    if "relative_error" in judged and "transformers f32" in references:
        ours = rows["millrace / transformers f32"]["relative_error"]
        theirs = rows["transformers bf16 / transformers f32"]["relative_error"]
        report["goals"]["as near to f32 as transformers in bf16"] = ours <= 1.05 * theirs
    if "relative_error" in judged:
        report["goals"][f"relative error below {RELATIVE}"] = judged["relative_error"] < RELATIVE


def table(report):
    lines = ["| | top-1 | relative error | worst row | largest absolute |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in report["comparisons"].items():
        cells = [f"{row['top1']:.2%}"]
        for key in ["relative_error", "largest_relative_error_of_a_row", "largest_absolute_error"]:
            cells.append(f"{row[key]:.2e}" if key in row else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, share in report["generation"].items():
        lines.append(f"| greedy tokens / {name} | {share:.2%} | - | - | - |")
    lines += [""] + [f"{'ok  ' if good else 'MISS'} {goal}" for goal, good in report["goals"].items()]
    return "\n".join(lines)


def main():
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_grad_enabled(False)
    # The f32 reference in full f32.
    torch.backends.cuda.matmul.allow_tf32 = False
    millrace = common.Millrace(args.millrace, args.target)
    report = {
        "what": "one checkpoint with seeded random weights in Millrace and in transformers",
        "date": datetime.date.today().isoformat(),
        "settings": {k: v for k, v in vars(args).items() if k not in ["millrace", "folder", "output"]},
        "hardware_and_versions": common.head(millrace),
    }
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        measure(args, millrace, pathlib.Path(scratch), report)
    print(table(report))
    say(json.dumps(report["logits"]))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(report["goals"].values()) else 1)


if __name__ == "__main__":
    main()
