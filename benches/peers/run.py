#!/usr/bin/env python3
"""Times Millrace and its peers on BERT encoders in one interleaved run.

Every peer is one child process that stays alive (protocol: rust/protocol/src/lib.rs). In each round every peer has one
turn, in an order shuffled from a seed; a turn is one step that is not counted and then COUNT timed ones, of which the
median is kept. COUNT depends only on the shape. Between turns the driver sleeps, so that the worker threads of the peer
before have stopped spinning. Before anything is timed, every output is compared with onnxruntime's; a peer that differs
by more than the tolerance is marked wrong.

Needs only the standard library itself; --python names an interpreter that has requirements.txt.
"""
import argparse
import array
import datetime
import json
import math
import os
import pathlib
import platform
import random
import selectors
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BASE = "onnxruntime"
PYTHON_PEERS = ["onnxruntime", "torch", "transformers"]
RUST_PEERS = ["millrace", "rten", "tract", "candle"]
SHAPES = [("minilm", 1, 16), ("minilm", 1, 128), ("minilm", 8, 128), ("minilm", 32, 128), ("bert-base", 1, 128)]
# Whether the sentence embedding of a model is normalised to length 1; the hidden size.
MODELS = {"minilm": (True, 384), "bert-base": (False, 768)}
TOLERANCE = 1e-3


class Failure(Exception):
    """A peer could not do what it was asked to."""


class Child:
    """A peer's process."""

    def __init__(self, name, command, environment, timeout):
        self.name, self.timeout = name, timeout
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        if self.line() != "ready":
            raise Failure("did not start")

    def line(self):
        if not self.selector.select(self.timeout):
            self.process.kill()
            raise Failure(f"no answer within {self.timeout} s")
        # One answer a line, one command at a time: nothing can be left in the buffer when the next is awaited.
        text = self.process.stdout.readline().decode(errors="replace").strip()
        if not text:
            raise Failure(f"ended with status {self.process.wait()}")
        return text

    def ask(self, *words):
        try:
            self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"ended with status {self.process.wait()}") from None
        kind, _, rest = self.line().partition(" ")
        if kind != "ok":
            raise Failure(rest)
        return rest

    def close(self):
        if self.process.poll() is None:
            try:
                self.process.stdin.write(b"quit\n")
                self.process.stdin.flush()
                self.process.wait(10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.process.kill()
        self.process.wait()


def output_of(child, shape, scratch):
    """What a peer computes for a shape: kind and values."""
    file = scratch / f"{child.name}.f32"
    kind = child.ask("check", *shape, file)
    values = array.array("f")
    values.frombytes(file.read_bytes())
    if sys.byteorder == "big":
        values.byteswap()
    return kind, values


def embedding(hidden, shape):
    """Mean over the tokens of each sequence, normalised where the model says so: what Millrace computes."""
    model, batch, length = shape
    normalised, width = MODELS[model]
    result = []
    for row in range(batch):
        first = row * length * width
        end = first + length * width
        mean = [math.fsum(hidden[first + column : end : width]) / length for column in range(width)]
        norm = math.sqrt(math.fsum(v * v for v in mean)) if normalised else 1.0
        result.extend(v / norm for v in mean)
    return result


def largest_difference(found, expected):
    if len(found) != len(expected):
        raise Failure(f"{len(found)} values instead of {len(expected)}")
    worst = max(map(lambda a, b: abs(a - b), found, expected))
    # A comparison with NaN is false, so NaN has to be looked for.
    return math.inf if any(math.isnan(v) for v in found) else worst


def commands(args, threads):
    """The command of every wanted peer."""
    models, result = str(args.models), {}
    for peer in args.peers:
        if peer in PYTHON_PEERS:
            result[peer] = [args.python, str(HERE / "peers.py"), peer, models, str(threads)]
        else:
            program = ROOT / "target" / "peers" / "release" / f"peer-{peer}"
            result[peer] = [str(program), models, str(threads)]
    return result


def start(args, threads, failures):
    children = {}
    for peer, command in commands(args, threads).items():
        environment = dict(os.environ)
        for name in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"]:
            environment[name] = str(threads)
        try:
            children[peer] = Child(peer, command, environment, args.timeout)
        except (Failure, OSError) as error:
            failures[peer] = str(error)
    return children


def check(children, shape, scratch, row):
    """Compares outputs with the base; drops from `row` whoever fails."""
    expected = output_of(children[BASE], shape, scratch)[1] if BASE in children else None
    pooled = embedding(expected, shape) if expected is not None else None
    for peer, child in children.items():
        entry = row.setdefault(peer, {"status": "ok"})
        try:
            kind, values = output_of(child, shape, scratch)
            if expected is None:
                entry["status"] = "unchecked"
                continue
            reference = expected if kind == "hidden" else pooled
            entry["compared"] = kind
            entry["max_abs_diff"] = largest_difference(values, reference)
            if not entry["max_abs_diff"] <= TOLERANCE:
                entry["status"] = "wrong"
        except Failure as error:
            entry.update(status="failed", reason=str(error))


def measure(args, children, shape, row, order):
    """Fills samples of every peer that has an output."""
    alive = [p for p in children if row[p]["status"] != "failed"]
    if not alive:
        return 0
    pace = BASE if BASE in alive else alive[0]
    estimate = float(children[pace].ask("run", *shape, 3))
    count = max(1, min(20, round(args.turn_ms / max(estimate, 1e-3))))
    for peer in alive:
        row[peer]["samples_ms"] = []
    for turn in range(args.warmup + args.rounds):
        order.shuffle(alive)
        for peer in list(alive):
            time.sleep(args.pause_ms / 1e3)
            try:
                milliseconds = float(children[peer].ask("run", *shape, count))
            except Failure as error:
                row[peer].update(status="failed", reason=str(error))
                alive.remove(peer)
                continue
            if turn >= args.warmup:
                row[peer]["samples_ms"].append(milliseconds)
    base = row[BASE]["samples_ms"] if BASE in alive else None
    for peer in alive:
        samples = row[peer]["samples_ms"]
        median = statistics.median(samples)
        row[peer].update(median_ms=median, min_ms=min(samples), max_ms=max(samples))
        row[peer]["ratio_to_onnxruntime"] = median / statistics.median(base) if base else None
        row[peer]["ratio_of_minima"] = min(samples) / min(base) if base else None
    return count


def busy_share(seconds=2.0):
    """Share of all processors' time that other programs take; None where the system does not tell."""
    def ticks():
        fields = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        # user nice system idle iowait irq softirq steal; idle and iowait are free time.
        values = [int(v) for v in fields[:8]]
        return sum(values), values[3] + values[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total_after, idle_after = ticks()
    except (OSError, ValueError, IndexError):
        return None
    return 1 - (idle_after - idle) / max(1, total_after - total)


def processor():
    fields = {}
    if shutil.which("lscpu"):
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
        for line in text.splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = set(fields.get("Flags", "").split())
    return {
        "model": fields.get("Model name", platform.processor()),
        "family_model_stepping": [fields.get(k) for k in ["CPU family", "Model", "Stepping"]],
        "cores": os.cpu_count(),
        "caches": {k: fields.get(f"{k} cache") for k in ["L1d", "L2", "L3"]},
        "flags": sorted(flags & {"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile"}),
        "system": f"{platform.system()} {platform.machine()}",
    }


def version_of(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(args):
    found = {"python": version_of([args.python, "-c", "import platform; print(platform.python_version())"])}
    if any(p in PYTHON_PEERS for p in args.peers):
        packages = version_of([args.python, str(HERE / "peers.py"), "versions"])
        found.update(json.loads(packages) if packages else {})
    lock = HERE / "rust" / "Cargo.lock"
    if lock.exists():
        wanted = {"rten", "tract-onnx", "candle-core", "candle-transformers", "millrace"}
        for package in tomllib.loads(lock.read_text())["package"]:
            if package["name"] in wanted:
                found[package["name"]] = package["version"]
    found["rustc"] = version_of(["rustc", "--version"])
    commit = version_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    dirty = version_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    found["millrace_commit"] = f"{commit}{' with changes' if dirty else ''}" if commit else None
    return found


def table(report):
    lines = []
    for result in report["results"]:
        lines.append(f"\n{result['model']} {result['batch']} x {result['length']}, {result['threads']} thread(s)\n")
        lines.append("| peer | median ms | min | max | / onnxruntime | of minima | largest difference | |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
        ranked = sorted(result["peers"].items(), key=lambda item: item[1].get("median_ms", math.inf))
        for peer, entry in ranked:
            number = lambda key, form: format(entry[key], form) if entry.get(key) is not None else "-"  # noqa: E731
            columns = ["median_ms", "min_ms", "max_ms", "ratio_to_onnxruntime", "ratio_of_minima"]
            cells = [number(k, ".2f") for k in columns]
            cells.append(number("max_abs_diff", ".1e"))
            status = entry["status"] if entry["status"] != "ok" else ""
            lines.append(f"| {peer} | {' | '.join(cells)} | {status} {entry.get('reason', '')[:120]} |")
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = [BASE, *[p for p in [*RUST_PEERS, *PYTHON_PEERS] if p != BASE]]
    parser.add_argument("--python", default=sys.executable, help="interpreter with requirements.txt")
    parser.add_argument("--peers", default=",".join(everyone), help="comma separated")
    parser.add_argument("--threads", default="2,1", help="numbers of threads, one pass each")
    parser.add_argument(
        "--single-thread-peers",
        default="onnxruntime,millrace,rten,tract,candle",
        help="the peers of the pass with one thread",
    )
    parser.add_argument("--shapes", help="such as minilm:1x16,bert-base:1x128; all by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--turn-ms", type=float, default=100, help="length of a turn, counted in steps of onnxruntime")
    parser.add_argument("--pause-ms", type=float, default=50, help="sleep between turns")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a silent peer is given up")
    parser.add_argument("--minilm", type=pathlib.Path, default=ROOT / "target" / "models" / "minilm")
    parser.add_argument("--models", type=pathlib.Path, default=ROOT / "target" / "peers-models")
    parser.add_argument("--no-build", action="store_true", help="use the Rust peers as they are")
    parser.add_argument("--output", type=pathlib.Path, help="default: benches/results/cpu-peers-DATE.json")
    parser.add_argument("--smoke", action="store_true", help="two rounds, and the report says so")
    parser.add_argument("--note", default="", help="goes into the report")
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    args.single_thread_peers = args.single_thread_peers.split(",")
    args.threads = [int(t) for t in args.threads.split(",")]
    if args.smoke:
        args.rounds, args.warmup = 2, 1
    if unknown := set(args.peers) - set(everyone):
        parser.error(f"no peer {', '.join(sorted(unknown))}")
    if args.shapes:
        wanted = []
        for text in args.shapes.split(","):
            model, _, extents = text.partition(":")
            batch, _, length = extents.partition("x")
            if model not in MODELS or not batch.isdigit() or not length.isdigit():
                parser.error(f"`{text}` is no shape")
            wanted.append((model, int(batch), int(length)))
        args.shapes = wanted
    else:
        args.shapes = SHAPES
    return args


def main():
    args = arguments()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    if not args.no_build and any(p in RUST_PEERS for p in args.peers):
        # All packages at once: a subset would change the features of shared dependencies and build them again. Not
        # --locked: what Millrace itself depends on may have changed; the peers' versions are pinned in their manifests.
        build = ["cargo", "build", "--release", "--workspace"]
        if subprocess.run(build, cwd=HERE / "rust", check=False).returncode:
            sys.exit("a Rust peer does not build; --no-build uses the programs that are there")
    # Fails early and says what is missing.
    if not all((args.models / m / f).exists() for m in MODELS for f in ["model.onnx", "modules.json"]):
        if not (args.minilm / "model.safetensors").exists():
            sys.exit(f"{args.minilm} is missing: run scripts/fetch_minilm.sh")
        say("preparing the models")
        prepare = [args.python, str(HERE / "peers.py"), "prepare", str(args.models), str(args.minilm)]
        subprocess.run(prepare, check=True, stdout=sys.stderr)
    today = datetime.date.today().isoformat()
    busy = busy_share()
    if busy is not None and busy > 0.05:
        say(f"warning: other programs take {busy:.0%} of the processors; the figures will say little")
    report = {
        "what": "encoder step, f32, milliseconds; smoke run, not a measurement" if args.smoke else "encoder step, f32, milliseconds",
        "date": today,
        "smoke": args.smoke,
        "note": args.note,
        "hardware": processor(),
        "versions": versions(args),
        "rustflags": os.environ.get("RUSTFLAGS", ""),
        "settings": {k: getattr(args, k) for k in ["rounds", "warmup", "turn_ms", "pause_ms", "threads"]},
        "tolerance": TOLERANCE,
        "load_before": os.getloadavg(),
        "busy_before": busy,
        "results": [],
    }
    order = random.Random(1)
    everyone = args.peers
    with tempfile.TemporaryDirectory() as scratch:
        for threads in args.threads:
            args.peers = [p for p in everyone if threads > 1 or p in args.single_thread_peers]
            failures = {}
            children = start(args, threads, failures)
            try:
                for shape in args.shapes:
                    row = {p: {"status": "failed", "reason": r} for p, r in failures.items()}
                    alive = {p: c for p, c in children.items() if c.process.poll() is None}
                    say(f"{threads} thread(s), {shape[0]} {shape[1]} x {shape[2]}: {', '.join(alive)}")
                    check(alive, shape, pathlib.Path(scratch), row)
                    count = measure(args, alive, shape, row, order)
                    report["results"].append(
                        {
                            "model": shape[0],
                            "batch": shape[1],
                            "length": shape[2],
                            "threads": threads,
                            "steps_per_turn": count,
                            "peers": row,
                        }
                    )
            finally:
                for child in children.values():
                    child.close()
    report["load_after"], report["busy_after"] = os.getloadavg(), busy_share()
    output = args.output or ROOT / "benches" / "results" / f"cpu-peers-{today}{'-smoke' if args.smoke else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    say(f"wrote {output}")


if __name__ == "__main__":
    main()
