#!/usr/bin/env python3
"""Millrace and its peers on one NVIDIA GPU, in one interleaved run: decoding, prefill and decode attention.

Stages, in this order: `ceilings` measures what the GPU can do (reads of its memory, copies from pinned host memory, a
bf16 matmul); `1b` and `8b` time decode steps of the Llama 3.2 1B and 3.1 8B shapes; `prefill` adds prompts of 2048 tokens
for each of these shapes; `attention` times paged attention of a decode step at a long context. A round is one turn of
Millrace and one of each peer; medians over rounds are compared, and every sample is kept.

Peers are transformers, eager and through torch.compile with a static cache (`reduce-overhead`), with random weights in
bf16. By default Millrace makes random weights of its own (--dummy-weights); --folder writes one checkpoint for a shape
and gives both sides the same weights. Without `ceilings` no share of a ceiling is told.

Needs torch and transformers; nothing is fetched. Runs anywhere with a GPU that Millrace compiles for.
"""
import argparse
import datetime
import gc
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

import gpu_common as common
from gpu_common import ROOT, SHAPES, say, spread

PROMPT = 128
PROMPT_LONG = 2048
LIMITS = [
    "--max-batch-size", "32", "--max-num-tokens", "16384", "--max-seq-len", "4096", "--max-input-len", "2048",
]  # fmt: skip


def event_ms(work, count, warmup=2):
    """Milliseconds of each of `count` calls, by events."""
    import torch

    for _ in range(warmup):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def ceilings():
    """GB/s and TFLOP/s. The read rate is the best of three reductions."""
    import torch

    gib = 1 << 30
    result = {}
    block = torch.empty(2 * gib, dtype=torch.float32, device="cuda").normal_()
    bytes_read = block.numel() * 4
    wide = block.view(-1, 1 << 20)
    ways = {
        "sum": lambda: block.sum(),
        "sum_of_rows": lambda: wide.sum(1),
        "largest": lambda: block.view(torch.int32).amax(),
    }
    reads = {}
    for name, work in ways.items():
        reads[name] = spread([bytes_read / ms / 1e6 for ms in event_ms(work, 8)])
    result["read_gbs"] = max(r["median"] for r in reads.values())
    result["read_ways_gbs"] = reads
    other = torch.empty_like(block)
    result["copy_gbs"] = spread([2 * bytes_read / ms / 1e6 for ms in event_ms(lambda: other.copy_(block), 6)])
    del block, other, wide, ways
    torch.cuda.empty_cache()
    host = torch.empty(gib, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(gib, dtype=torch.uint8, device="cuda")
    times = event_ms(lambda: device.copy_(host, non_blocking=True), 6)
    result["host_to_device_gbs"] = spread([gib / ms / 1e6 for ms in times])
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    times = event_ms(lambda: torch.matmul(a, b, out=out), 30, 5)
    result["matmul_tflops"] = spread([2 * size**3 / ms / 1e9 for ms in times])
    del a, b, out, host, device
    torch.cuda.empty_cache()
    say(
        f"read {result['read_gbs']:.0f} GB/s, copy {result['copy_gbs']['median']:.0f} GB/s, host to device "
        f"{result['host_to_device_gbs']['median']:.1f} GB/s, matmul {result['matmul_tflops']['median']:.0f} TFLOP/s"
    )
    return result


class Torch:
    """The peers for one shape: a transformers model, and its compiled decode steps by batch size."""

    def __init__(self, fields, weights):
        self.model = common.torch_model(fields, weights)
        self.compiled, self.caches, self.compile_seconds = {}, {}, {}

    def cache(self, batch, length):
        import torch
        from transformers import StaticCache

        if (batch, length) not in self.caches:
            self.caches[batch, length] = StaticCache(
                config=self.model.config, max_batch_size=batch, max_cache_len=length, device="cuda", dtype=torch.bfloat16
            )
        return self.caches[batch, length]

    def decode(self, batch, steps, compiled):
        """Milliseconds a step after a prompt. The cache holds `PROMPT + steps + 8` tokens."""
        import torch

        cache = self.cache(batch, PROMPT + steps + 8)
        cache.reset()

        def step(token, positions, place):
            out = self.model(
                input_ids=token, past_key_values=cache, cache_position=place, position_ids=positions, use_cache=True
            )
            return out.logits[:, -1:].argmax(-1)

        key = (batch, steps)
        if compiled and key not in self.compiled:
            # Fixed shapes for every batch size: the fastest that torch.compile makes.
            self.compiled[key] = torch.compile(step, mode="reduce-overhead", fullgraph=False, dynamic=False)
        run = self.compiled[key] if compiled else step
        prompt = torch.randint(0, 1000, (batch, PROMPT), device="cuda")
        place = torch.arange(PROMPT, device="cuda")
        token = step(prompt, place[None], place)

        def advance(at, token):
            place = torch.tensor([at], device="cuda")
            return run(token.clone(), place[None].expand(batch, 1).contiguous(), place).clone()

        begin = time.perf_counter()
        for i in range(5):
            token = advance(PROMPT + i, token)
        torch.cuda.synchronize()
        if compiled and key not in self.compile_seconds:
            self.compile_seconds[key] = time.perf_counter() - begin
        begin = time.perf_counter()
        for i in range(steps):
            token = advance(PROMPT + 5 + i, token)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3 / steps

    def prefill(self, batch, runs=3):
        """Milliseconds of each run."""
        import torch

        ids = torch.randint(0, 1000, (batch, PROMPT_LONG), device="cuda")
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        return sorted(times)[runs // 2]


def layer_parameters(fields):
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    width = fields.get("head_dim") or hidden // fields["num_attention_heads"]
    queries, pairs = fields["num_attention_heads"] * width, fields["num_key_value_heads"] * width
    one = hidden * (2 * queries + 2 * pairs) + 3 * hidden * inner + 2 * hidden
    return one * fields["num_hidden_layers"]


def decode_bytes(fields, batch, context):
    """Bytes a decode step has to read at least: weights once, caches of all sequences."""
    width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    cache = 2 * fields["num_key_value_heads"] * width * fields["num_hidden_layers"] * context * batch
    return 2 * (layer_parameters(fields) + fields["vocab_size"] * fields["hidden_size"] + cache)


def prefill_flops(fields, batch, length):
    layers, hidden = fields["num_hidden_layers"], fields["hidden_size"]
    return 2 * layer_parameters(fields) * batch * length + 2 * 2 * layers * batch * length * length * hidden / 2


def prepare(args, millrace, name, scratch):
    """Fields, weights on the device and the engine of a shape."""
    fields = json.loads((SHAPES[name] / "config.json").read_text())
    if args.layers:
        fields["num_hidden_layers"] = args.layers
    seconds = {}
    weights = common.make_weights(fields, 1)
    limits = list(LIMITS)
    if args.folder:
        model = args.folder / f"checkpoint-{name}"
        engine = args.folder / f"{name}.engine"
        if not engine.exists():
            seconds["write_checkpoint"] = common.write_checkpoint(fields, weights, model)
            seconds["compile"] = millrace.compile(model, engine, *limits)
            shutil.rmtree(model)
    else:
        model = scratch / f"config-{name}"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(fields))
        engine = scratch / f"{name}.engine"
        seconds["compile"] = millrace.compile(model, engine, "--dummy-weights", *limits)
    say(f"{name}: engine ready, {', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())}")
    return fields, weights, engine, seconds


def shape_stage(args, millrace, name, scratch, limits):
    """Decode and prefill of one shape."""
    import torch

    fields, weights, engine, seconds = prepare(args, millrace, name, scratch)
    peers = Torch(fields, weights) if args.peers else None
    del weights
    decode = {b: {} for b in args.batches} if "decode" in args.parts else {}
    prefill = {b: {} for b in args.prefill_batches} if "prefill" in args.stages else {}
    row = lambda table, who, value: table.setdefault(who, []).append(value)  # noqa: E731
    errors = {}
    for turn in range(args.rounds):
        begin = time.perf_counter()
        if decode:
            lengths = f"{PROMPT},{args.steps + 1}"
            for cells in millrace.bench(engine, decode, lengths, runs=args.runs):
                row(decode[cells["batch_size"]], "millrace", cells["decode_ms_per_step"])
        if prefill:
            for cells in millrace.bench(engine, prefill, f"{PROMPT_LONG},2", runs=args.runs):
                row(prefill[cells["batch_size"]], "millrace", cells["prefill_ms"])
        ours = time.perf_counter() - begin
        say(f"{name}: round {turn + 1}, millrace took {ours:.1f} s")
        for kind in args.peers:
            try:
                for batch in decode:
                    steps = args.steps if kind == "compile" else min(args.steps, 48)
                    row(decode[batch], kind, peers.decode(batch, steps, kind == "compile"))
                if kind == "eager":
                    for batch in prefill:
                        row(prefill[batch], kind, peers.prefill(batch))
            except Exception as error:  # a peer that fails is part of the report
                errors[kind] = repr(error)[:500]
                say(f"{name}: {kind} failed: {errors[kind]}")
        say(f"{name}: round {turn + 1} took {time.perf_counter() - begin:.1f} s")
    result = {"layers": fields["num_hidden_layers"], "seconds": seconds, "errors": errors, "decode": [], "prefill": []}
    if peers:
        result["peer_compile_seconds"] = {f"batch {k[0]}": v for k, v in peers.compile_seconds.items()}
    for batch, table in decode.items():
        least = decode_bytes(fields, batch, PROMPT + args.steps / 2)
        entry = {"batch": batch, "prompt": PROMPT, "bytes": least}
        if limits:
            entry["floor_ms"] = least / limits["read_gbs"] / 1e6
        entry["ms"] = {who: spread(samples) for who, samples in table.items()}
        result["decode"].append(entry)
    for batch, table in prefill.items():
        work = prefill_flops(fields, batch, PROMPT_LONG)
        entry = {"batch": batch, "length": PROMPT_LONG, "flops": work}
        entry["ms"] = {who: spread(samples) for who, samples in table.items()}
        entry["tflops"] = {who: work / s["median"] / 1e9 for who, s in entry["ms"].items()}
        result["prefill"].append(entry)
    del peers
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return result


def sdpa_ms(fields, batch, context):
    """torch's attention over a contiguous cache, milliseconds of a layer, as a replayed graph of one call."""
    import torch
    from torch.nn import functional

    heads, pairs, width = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    query = make(batch, heads, 1, width)
    # More bytes than any cache of the chip holds, so that no call finds its keys there.
    copies = max(1, -(-(400 << 20) // (4 * batch * pairs * context * width)))
    caches = [(make(batch, pairs, context, width), make(batch, pairs, context, width)) for _ in range(copies)]

    def work():
        for key, value in caches:
            functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return sorted(event_ms(graph.replay, 9))[4] / copies


def attention_stage(args, millrace, scratch, limits):
    """Paged attention of decode steps, by batch size; a batch that fails has an `error`."""
    result = []
    for batch in args.attention_batches:
        entry = {"batch": batch, "context": args.context}
        try:
            attention(args, millrace, scratch, limits, entry)
        except Exception as error:  # the other batches still count
            entry["error"] = str(error)[:800]
            say(f"attention batch {batch}: {entry['error']}")
        result.append(entry)
    return result


def attention(args, millrace, scratch, limits, entry):
    """One batch size: a decoder whose other parts are small, profiled kernel by kernel."""
    import torch

    batch, context, tokens = entry["batch"], entry["context"], 16384
    # Prompts are read in steps of `tokens` tokens, one after the other, and early sequences decode meanwhile: enough new
    # tokens that the last sequence has begun to decode before the first has ended.
    steps = 24 + batch // 8 + -(-batch * context // tokens)
    layers = max(2, 16 // batch)
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 2 * context, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    model = scratch / f"attention-{batch}"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(fields))
    engine = scratch / f"attention-{batch}.engine"
    millrace.compile(
        model, engine, "--dummy-weights", "--max-batch-size", batch, "--max-num-tokens", tokens, "--max-seq-len",
        context + 64, "--max-input-len", context,
    )  # fmt: skip
    entry.update(layers=layers, new_tokens=steps + 1)
    full = 4 * fields["num_key_value_heads"] * fields["head_dim"] * batch * (context - steps)
    gbs, us, replayed, adds, differences = [], [], [], [], []
    trace = scratch / "trace.json"
    for _ in range(args.attention_rounds):
        [row] = millrace.bench(
            engine, [batch], f"{context - steps},{steps + 1}", "--trace", trace, "--profile", runs=1
        )
        # The launches of all layers as one graph, and what the step takes more with than without them.
        kernels = row["profile"]["replayed"]["kernels"]
        [kernel] = [k for k in kernels if "attention" in k["kernel"]]
        bytes_read = kernel["read_bytes"] / kernel["calls"]
        # It is the last step that is replayed, in which early sequences have ended.
        if bytes_read >= full:
            replayed.append(kernel["us_each"])
            adds.append(kernel["adds_us_each"])
        calls = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "paged_attention"]
        # Steps in which every sequence decodes at the long context.
        calls = [e for e in calls if e["args"]["phase"] == "decode" and e["args"]["read_bytes"] >= full]
        if not calls:
            raise RuntimeError("no step in which all sequences decode")
        us.append(statistics.median(e["dur"] for e in calls))
        gbs.append(statistics.median(e["args"]["read_bytes"] / e["dur"] / 1e3 for e in calls))
        entry.setdefault("calls", []).append(len(calls))
        if batch == 1:
            # Replayed as a graph: what a step takes more than one with a short context.
            [short] = millrace.bench(engine, [batch], f"{PROMPT},{steps + 1}", runs=args.runs)
            more = (row["decode_ms_per_step"] - short["decode_ms_per_step"]) / layers
            differences.append(full / max(more, 1e-9) / 1e6)
    entry.update(us=spread(us), gbs=spread(gbs))
    if replayed:
        entry.update(replayed_us=spread(replayed), adds_us=spread(adds))
        entry["replayed_gbs"] = spread([bytes_read / each / 1e3 for each in replayed])
        entry["adds_gbs"] = spread([bytes_read / each / 1e3 for each in adds])
    if differences:
        entry["gbs_by_difference"] = spread(differences)
    if limits:
        entry["of_read_rate"] = entry["gbs"]["median"] / limits["read_gbs"]
    say(f"attention batch {batch}: {entry['us']['median']:.1f} us, {entry['gbs']['median']:.0f} GB/s")
    if replayed:
        say(f"  replayed {entry['replayed_us']['median']:.1f} us, adds {entry['adds_us']['median']:.1f} us to a step")
    if args.peers:
        try:
            entry["torch_sdpa_gbs"] = 4 * 8 * 128 * batch * context / sdpa_ms(fields, batch, context) / 1e6
        except Exception as error:
            entry["torch_sdpa_error"] = repr(error)[:300]
        torch.cuda.empty_cache()


def table(report):
    """The report as markdown."""
    lines, limits = [], report.get("ceilings")
    if limits:
        lines += ["| ceiling | |", "| --- | ---: |"]
        lines.append(f"| memory read | {limits['read_gbs']:.0f} GB/s |")
        lines.append(f"| memory copy, bytes both ways | {limits['copy_gbs']['median']:.0f} GB/s |")
        lines.append(f"| pinned host to device | {limits['host_to_device_gbs']['median']:.1f} GB/s |")
        lines.append(f"| bf16 matmul 8192^3 | {limits['matmul_tflops']['median']:.0f} TFLOP/s |")
    cell = lambda s: f"{s['median']:.3f} ({s['min']:.3f}..{s['max']:.3f})" if s else "-"  # noqa: E731
    if any(s["decode"] for s in report["shapes"].values()):
        lines += ["", "| decode, ms a step | millrace | compile | eager | floor | compile / millrace | of read rate |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, shape in report["shapes"].items():
        for entry in shape["decode"]:
            ms = entry["ms"]
            ours, best = ms["millrace"]["median"], ms.get("compile")
            floor = entry.get("floor_ms")
            cells = [cell(ms.get(k)) for k in ["millrace", "compile", "eager"]]
            cells.append(f"{floor:.3f}" if floor else "-")
            cells.append(f"{best['median'] / ours:.2f}" if best else "-")
            cells.append(f"{floor / ours:.0%}" if floor else "-")
            lines.append(f"| {name} batch {entry['batch']} | {' | '.join(cells)} |")
    if any(s["prefill"] for s in report["shapes"].values()):
        lines += ["", "| prefill | millrace ms | eager ms | millrace TFLOP/s | eager TFLOP/s | eager / millrace |"]
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, shape in report["shapes"].items():
        for entry in shape["prefill"]:
            ms, rate = entry["ms"], entry["tflops"]
            theirs = ms.get("eager")
            cells = [cell(ms["millrace"]), cell(theirs), f"{rate['millrace']:.0f}"]
            cells.append(f"{rate['eager']:.0f}" if theirs else "-")
            cells.append(f"{theirs['median'] / ms['millrace']['median']:.2f}" if theirs else "-")
            lines.append(f"| {name} {entry['batch']} x {entry['length']} | {' | '.join(cells)} |")
    if report.get("attention"):
        columns = ["us between events", "GB/s", "of read rate", "us replayed", "by difference GB/s", "torch sdpa GB/s"]
        lines += ["", f"| decode attention, a layer | {' | '.join(columns)} |"]
        lines.append("| --- |" + " ---: |" * len(columns))
        for entry in report["attention"]:
            if "error" in entry:
                lines.append(f"| batch {entry['batch']}, context {entry['context']} | failed | - | - | - | - | - |")
                continue
            share = entry.get("of_read_rate")
            cells = [f"{entry['us']['median']:.1f}", f"{entry['gbs']['median']:.0f}", f"{share:.0%}" if share else "-"]
            cells.append(f"{entry['replayed_us']['median']:.1f}" if "replayed_us" in entry else "-")
            cells.append(f"{entry['gbs_by_difference']['median']:.0f}" if "gbs_by_difference" in entry else "-")
            cells.append(f"{entry['torch_sdpa_gbs']:.0f}" if "torch_sdpa_gbs" in entry else "-")
            lines.append(f"| batch {entry['batch']}, context {entry['context']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def numbers(text):
    return [int(part) for part in text.split(",") if part]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program = os.environ.get("MILLRACE") or ROOT / "target" / "release" / "millrace"
    parser.add_argument("--millrace", type=pathlib.Path, default=program, help="or environment MILLRACE")
    parser.add_argument("--target", help="such as cuda:sm_90a; this GPU's by default")
    parser.add_argument("--stages", default="ceilings,1b,8b,prefill,attention", help="comma separated")
    parser.add_argument("--no-decode", action="store_true", help="only prefill of the shapes")
    parser.add_argument("--peers", default="eager,compile", help="comma separated; empty for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention-rounds", type=int, default=1, help="each is one profiled run")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of Millrace in a round; their median counts")
    parser.add_argument("--steps", type=int, default=128, help="decode steps of a turn (48 for eager)")
    parser.add_argument("--batches", type=numbers, default=[1, 32], help="of decode")
    parser.add_argument("--prefill-batches", type=numbers, default=[1, 8])
    parser.add_argument("--attention-batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=32768, help="of attention")
    parser.add_argument("--layers", type=int, help="fewer layers, for trying things out")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="write a checkpoint and an engine here, 32 GB for 8b; the engine stays"
    )
    parser.add_argument("--output", type=pathlib.Path, help="default: benches/results/gpu-peers-DATE.json")
    parser.add_argument("--note", default="", help="goes into the report")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    args.peers = [p for p in args.peers.split(",") if p]
    args.parts = [] if args.no_decode else ["decode"]
    if unknown := set(args.stages) - {"ceilings", "1b", "8b", "prefill", "attention"}:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    if unknown := set(args.peers) - {"eager", "compile"}:
        parser.error(f"no peer {', '.join(sorted(unknown))}")
    return args


def main():
    args = arguments()
    begin = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_grad_enabled(False)
    millrace = common.Millrace(args.millrace, args.target)
    today = datetime.date.today().isoformat()
    report = {
        "what": "Llama shapes in bf16 on one GPU; milliseconds",
        "date": today,
        "note": args.note,
        "hardware_and_versions": common.head(millrace),
        "settings": {
            key: getattr(args, key)
            for key in ["stages", "peers", "rounds", "runs", "steps", "batches", "prefill_batches", "context", "layers"]
        },
        "shapes": {},
    }
    output = args.output or ROOT / "benches" / "results" / f"gpu-peers-{today}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    def save():
        report["seconds"] = time.perf_counter() - begin
        output.write_text(json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        limits = None
        if "ceilings" in args.stages:
            limits = report["ceilings"] = ceilings()
        # What failed is told at the end; a stage that ended is in the file by then.
        failures = []
        for name in SHAPES:
            if name in args.stages:
                try:
                    report["shapes"][name] = shape_stage(args, millrace, name, scratch, limits)
                except RuntimeError as error:
                    failures.append(f"{name}: {error}")
                    say(failures[-1])
                save()
        if "attention" in args.stages:
            report["attention"] = attention_stage(args, millrace, scratch, limits)
            failures += [f"attention batch {e['batch']}: {e['error']}" for e in report["attention"] if "error" in e]
        report["failures"] = failures
        save()
    print(table(report))
    say(f"wrote {output} after {report['seconds']:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
