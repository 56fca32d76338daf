#!/usr/bin/env python3
"""Weight streaming of the Llama 3.1 8B shape on one NVIDIA GPU, in one run with its peers.

Stages, in this order: `ceilings` (copies from pinned memory in blocks of 1 GiB and 32 MiB, reads of the GPU's memory), `offload`
(accelerate's cpu_offload, the peer that people use), `plain` (an engine without streaming), `sweep` (decode steps at parts of
the streamable weights), `prefill` (8 prompts of 2048 tokens, all resident and nothing resident), `seed` (the sweep that people
know from other tools, as CSV). The bound of a decode step is the bytes it streams over the rate at which pinned memory was
copied in this run, or the resident step if that is longer.

Needs torch, transformers and accelerate; nothing is fetched.
"""
import argparse
import datetime
import gc
import json
import pathlib
import tempfile
import time

import gpu_common as common
from gpu_common import SHAPES, say, spread

LIMITS = ["--max-batch-size", "32", "--max-num-tokens", "16384", "--max-seq-len", "4096", "--max-input-len", "2048"]
PROMPT = 128


def ceilings():
    import torch

    result = {}
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    host.random_()
    device = torch.empty_like(host, device="cuda")
    for name, block in (("gib", 1 << 30), ("32_mib", 32 << 20)):
        rates = []
        for _ in range(8):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for at in range(0, 1 << 30, block):
                device[at : at + block].copy_(host[at : at + block], non_blocking=True)
            end.record()
            end.synchronize()
            rates.append((1 << 30) / begin.elapsed_time(end) / 1e6)
        result[f"pinned_{name}_gbs"] = spread(rates[2:])
    result["pinned_gbs"] = max(result[k]["median"] for k in ("pinned_gib_gbs", "pinned_32_mib_gbs"))
    say(f"pinned memory: {result['pinned_gbs']:.2f} GB/s")
    return result


def offload(fields, batches, steps=6):
    """Milliseconds of decode steps with accelerate's cpu_offload."""
    import torch
    from accelerate import cpu_offload
    from transformers import StaticCache

    model = common.torch_model(fields, common.make_weights(fields, 1)).to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    model = cpu_offload(model, execution_device=0)
    result = {}
    for batch in batches:
        cache = StaticCache(
            config=model.config, max_batch_size=batch, max_cache_len=PROMPT + steps + 8, device="cuda", dtype=torch.bfloat16
        )
        token, times = torch.randint(0, 1000, (batch, PROMPT), device="cuda"), []
        place = torch.arange(PROMPT, device="cuda")
        for step in range(steps):
            begin = time.perf_counter()
            out = model(
                input_ids=token, past_key_values=cache, cache_position=place, position_ids=place[None], use_cache=True
            )
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
            place = torch.tensor([PROMPT + step], device="cuda")
        result[batch] = spread(times[2:])
        say(f"accelerate, batch {batch}: {result[batch]['median']:.0f} ms a step")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millrace", default="target/release/millrace")
    parser.add_argument("--stages", default="ceilings,offload,plain,sweep,prefill,seed")
    parser.add_argument("--parts", default="0.0;0.25;0.5;0.75;0.9;1.0")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--layers", type=int)
    parser.add_argument("-o", "--output", type=pathlib.Path)
    args = parser.parse_args()
    import torch

    stages = args.stages.split(",")
    millrace = common.Millrace(pathlib.Path(args.millrace).resolve())
    report = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **common.head(millrace)}
    fields = json.loads((SHAPES["8b"] / "config.json").read_text())
    if args.layers:
        fields["num_hidden_layers"] = args.layers

    def save():
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "model").mkdir()
        (scratch / "model" / "config.json").write_text(json.dumps(fields))
        plain, streaming = scratch / "plain.engine", scratch / "streaming.engine"
        for stage in stages:
            begin = time.perf_counter()
            try:
                if stage == "ceilings":
                    report[stage] = ceilings()
                elif stage == "offload":
                    report[stage] = offload(fields, [1, 32])
                elif stage == "plain":
                    millrace.compile(scratch / "model", plain, "--dummy-weights", *LIMITS)
                    report[stage] = millrace.bench(plain, [1, 32], f"{PROMPT},65", runs=args.runs)
                    if "prefill" in stages:
                        report["plain_prefill"] = millrace.bench(plain, [8], "2048,2", runs=args.runs)
                else:
                    millrace.compile(scratch / "model", streaming, "--dummy-weights", "--weight-streaming", *LIMITS)
                if stage == "sweep":
                    lengths, parts = f"{PROMPT},{args.steps + 1}", args.parts
                    report[stage] = millrace.bench(
                        streaming, [1, 32], lengths, "--gpu-weights-percent", parts, runs=args.runs
                    )
                    # Steps of resident weights are short: more of them.
                    report["resident"] = millrace.bench(
                        streaming, [1, 32], f"{PROMPT},65", "--gpu-weights-percent", "1.0", runs=args.runs
                    )
                elif stage == "prefill":
                    report[stage] = millrace.bench(
                        streaming, [8], "2048,2", "--gpu-weights-percent", "1.0;0.0", runs=args.runs
                    )
                elif stage == "seed":
                    text, _ = millrace.run(
                        "bench", streaming, "--batch-size", "1;32", "--input-output-len", "256,32",
                        "--gpu-weights-percent", "0.0;0.3;0.6;1.0", "--runs", 1, "--csv",
                    )  # fmt: skip
                    report[stage] = text.splitlines()
                    print(text)
            except Exception as error:  # the other stages still count
                report.setdefault("errors", {})[stage] = repr(error)[:1500]
                say(f"{stage}: {error!r}"[:1500])
            gc.collect()
            torch.cuda.empty_cache()
            say(f"{stage}: {time.perf_counter() - begin:.1f} s")
            save()
    table(report)


def table(report):
    """Steps against their bound."""
    rate = report.get("ceilings", {}).get("pinned_gbs")
    for row in report.get("sweep", []):
        moved = row.get("streamed_bytes_per_step") or 0
        bound = moved / rate / 1e6 if rate and moved else None
        ms = row["decode_ms_per_step"]
        share = f", {ms / bound:.3f} of the link" if bound else ""
        print(f"batch {row['batch_size']}, {row.get('weights_budget')}: {ms:.3f} ms, {moved / 1e9:.3f} GB{share}")


if __name__ == "__main__":
    main()
