#!/usr/bin/env python3
"""Fixture models on a GPU against their references: tokens, perplexity, embeddings.

Compiles every model for the GPU and runs it through the program's verbs:
- baker-street-6m: 64 greedy tokens of every prompt in f32, together and alone; perplexity of the held-out text in f32
  and in bf16;
- the tiny random models: 16 greedy tokens in f32, and every output of a step against the reference evaluator;
- all-MiniLM-L6-v2: cosine of sentence embeddings with float64 references. Without its weights (--minilm, see
  scripts/fetch_minilm.sh) its shape runs with random weights against the reference evaluator.

Needs only the standard library. Exit code 1 if anything differs; --target cpu runs the same on processors.
"""
import argparse
import datetime
import json
import math
import os
import pathlib
import sys
import tempfile

import gpu_common as common
from gpu_common import CONFIGS, ROOT, say

BAKER = ROOT / "examples" / "models" / "baker-street-6m"
TINY = ROOT / "tests" / "data" / "tiny-random"
MINILM = ROOT / "tests" / "data" / "minilm" / "reference.json"


def words(ids):
    return ",".join(map(str, ids))


def cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


class Checks:
    """What was looked at, in order."""

    def __init__(self):
        self.rows = []

    def add(self, model, what, found, wanted, good):
        self.rows.append({"model": model, "what": what, "found": found, "wanted": wanted, "good": bool(good)})
        say(f"{'ok  ' if good else 'FAIL'} {model}: {what}: {found} ({wanted})")

    def guarded(self, model, what, work):
        """Runs `work`; a failure of the program is a row of its own."""
        try:
            work()
        except Exception as error:  # one broken model must not hide the others
            self.add(model, what, str(error)[:400], "runs", False)


def generate(millrace, engine, prompts, count):
    command = ["run", engine, "--max-new-tokens", count, "--ignore-eos", "--json"]
    for prompt in prompts:
        command += ["--token-ids", words(prompt)]
    done, _ = millrace.json(*command)
    return [entry["token_ids"] for entry in done]


def equal_tokens(checks, model, what, found, expected):
    same = sum(f == e for f, e in zip(found, expected))
    count = sum(len(e) for e in expected)
    first = next((i for i, (f, e) in enumerate(zip(found, expected)) if f != e), None)
    told = f"{same} of {len(expected)} prompts equal, {count} tokens"
    if first is not None:
        at = next((i for i, (f, e) in enumerate(zip(found[first], expected[first])) if f != e), len(found[first]))
        told += f"; prompt {first} differs from token {at} on"
    checks.add(model, what, told, "all equal", len(found) == len(expected) and same == len(expected))


def baker(millrace, checks, scratch, args):
    reference = json.loads((BAKER / "reference.json").read_text())
    prompts = [p["input_ids"] for p in reference["prompts"]]
    expected = [p["greedy_ids"] for p in reference["prompts"]]
    value = reference["perplexity"]["value"]
    for dtype, short, tolerance in [("float32", "f32", 2e-3), ("bfloat16", "bf16", 1e-2)]:
        engine = scratch / f"baker-{short}.engine"
        millrace.compile(BAKER, engine, "--dtype", dtype, "--max-logit-rows", 512)
        if dtype == "float32":
            count = len(expected[0])
            together = generate(millrace, engine, prompts, count)
            equal_tokens(checks, "baker-street-6m", f"greedy tokens {short}, one batch", together, expected)
            alone = [generate(millrace, engine, [p], count)[0] for p in prompts]
            equal_tokens(checks, "baker-street-6m", f"greedy tokens {short}, one by one", alone, expected)
        command = ["eval", engine, "--text-file", BAKER / "heldout.txt", "--json"]
        command += ["--windows", args.windows or reference["perplexity"]["windows"]]
        found, wall = millrace.json(*command)
        wanted = "not judged: fewer windows" if args.windows else f"{value:.6f} within {tolerance:.1%}"
        good = abs(found["perplexity"] / value - 1) < tolerance or args.windows
        told = f"{found['perplexity']:.6f} over {found['tokens']} tokens, {wall:.1f} s"
        checks.add("baker-street-6m", f"perplexity {short}", told, wanted, good)


def evaluator(millrace, checks, model, engine, what, *options):
    """The program's own comparison with the reference evaluator."""
    done, _ = millrace.json("compare", engine, "--json", *options)
    worst = max(o["largest_error"] for o in done["outputs"])
    tolerance = max(o["tolerance"] for o in done["outputs"])
    checks.add(model, what, f"largest error {worst:.2e}", f"at most {tolerance:.0e}", done["first_bad"] is None)


def tiny(millrace, checks, scratch, folder):
    reference = json.loads((folder / "reference.json").read_text())
    expected = reference["greedy_16"]
    for dtype, short in [("float32", "f32"), ("bfloat16", "bf16")]:
        engine = scratch / f"{folder.name}-{short}.engine"
        millrace.compile(folder, engine, "--dtype", dtype)
        if dtype == "float32":
            found = generate(millrace, engine, [reference["input_ids"]], len(expected))
            equal_tokens(checks, folder.name, "greedy tokens f32", found, [expected])
        work = lambda: evaluator(  # noqa: E731
            millrace, checks, folder.name, engine, f"outputs of a step {short}", "--model", folder
        )
        checks.guarded(folder.name, f"outputs of a step {short}", work)


def minilm(millrace, checks, scratch, folder):
    sentences = json.loads(MINILM.read_text())["sentences"]
    for dtype, short, least in [("float32", "f32", 0.99999), ("bfloat16", "bf16", 0.9999)]:
        engine = scratch / f"minilm-{short}.engine"
        millrace.compile(folder, engine, "--dtype", dtype)
        command = ["run", engine, "--json"]
        for sentence in sentences:
            command += ["--text", sentence["text"]]
        done, _ = millrace.json(*command)
        values = [cosine(d["embedding"], s["embedding"]) for d, s in zip(done, sentences, strict=True)]
        told = f"least of {len(values)} {min(values):.6f}"
        checks.add("all-MiniLM-L6-v2", f"cosine {short}", told, f"at least {least}", min(values) >= least)


def minilm_shape(millrace, checks, scratch):
    for dtype, short in [("float32", "f32"), ("bfloat16", "bf16")]:
        engine = scratch / f"minilm-shape-{short}.engine"
        millrace.compile(CONFIGS / "minilm", engine, "--dtype", dtype, "--dummy-weights")
        evaluator(millrace, checks, "MiniLM shape, random weights", engine, f"outputs of a step {short}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program = os.environ.get("MILLRACE") or ROOT / "target" / "release" / "millrace"
    parser.add_argument("--millrace", type=pathlib.Path, default=program, help="or environment MILLRACE")
    parser.add_argument("--target", help="such as cuda:sm_90a; this GPU's by default")
    parser.add_argument("--minilm", type=pathlib.Path, default=ROOT / "target" / "models" / "minilm")
    parser.add_argument("--models", default="baker,tiny,minilm", help="comma separated")
    parser.add_argument("--windows", type=int, help="fewer windows of the held-out text: told, not judged")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    return parser.parse_args()


def main():
    args = arguments()
    millrace = common.Millrace(args.millrace, args.target)
    checks = Checks()
    with tempfile.TemporaryDirectory() as scratch:
        scratch, models = pathlib.Path(scratch), args.models.split(",")
        if "tiny" in models:
            for folder in sorted(f for f in TINY.iterdir() if (f / "reference.json").exists()):
                checks.guarded(folder.name, "runs", lambda folder=folder: tiny(millrace, checks, scratch, folder))
        if "baker" in models:
            checks.guarded("baker-street-6m", "runs", lambda: baker(millrace, checks, scratch, args))
        if "minilm" in models:
            if (args.minilm / "model.safetensors").exists():
                checks.guarded("all-MiniLM-L6-v2", "runs", lambda: minilm(millrace, checks, scratch, args.minilm))
            else:
                say(f"no weights in {args.minilm}: the shape with random weights instead")
                checks.guarded("MiniLM shape, random weights", "runs", lambda: minilm_shape(millrace, checks, scratch))
    print("| model | what | found | wanted | |\n| --- | --- | --- | --- | --- |")
    for row in checks.rows:
        state = "ok" if row["good"] else "FAIL"
        print(f"| {row['model']} | {row['what']} | {row['found']} | {row['wanted']} | {state} |")
    if args.output:
        report = {"date": datetime.date.today().isoformat(), "target": millrace.target, "checks": checks.rows}
        report["millrace"] = common.command_line(millrace.program, "--version")
        report["gpu"] = common.command_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if checks.rows and all(r["good"] for r in checks.rows) else 1)


if __name__ == "__main__":
    main()
