#!/usr/bin/env python3
"""How near a decode step comes to the memory read rate of this machine.

Runs `millrace bench --profile` on a configuration with seeded random weights and divides the bytes a step has to move
(every weight once, the caches of its sequences, activations) by the median step time, and that by the read rate that
Millrace measures in the same process. The rate is measured again by every run, and so is the step; the fraction is the
median over runs. Needs only the standard library.
"""
import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "tests/data/configs/llama-3.2-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--millrace", type=pathlib.Path, default=ROOT / "target/release/millrace")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", default="1", help='such as "1;4"')
    parser.add_argument("--input-output-len", default="16,24", help="prompt and new tokens")
    parser.add_argument("--runs", type=int, default=5, help="processes; each measures step and ceiling")
    parser.add_argument("--output", type=pathlib.Path, help="default: benches/results/decode-rate-DATE.json")
    parser.add_argument("--smoke", action="store_true", help="one process, and the report says so")
    parser.add_argument("--note", default="", help="goes into the report")
    return parser.parse_args()


def run(args):
    """Rows of one process: batch, milliseconds, bytes and the ceiling."""
    command = [
        args.millrace, "bench", args.model, "--dummy-weights", "--dtype", args.dtype,
        "--max-seq-len", "256", "--threads", args.threads, "--batch-size", args.batch_size,
        "--input-output-len", args.input_output_len, "--runs", "1" if args.smoke else "3", "--profile", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
    rows = []
    for row in json.loads(done.stdout):
        [decode] = [p for p in row["profile"]["phases"] if p["phase"] == "decode"]
        total = decode["total"]
        moved = (total["read_bytes"] + total["written_bytes"]) / decode["steps"]
        ceiling = row["profile"]["ceilings"]["read_gbs"]
        rate = moved / row["decode_ms_per_step"] / 1e6
        rows.append(
            {
                "batch": row["batch_size"],
                "step_ms": row["decode_ms_per_step"],
                "step_ms_min": row["decode_ms_min"],
                "step_ms_max": row["decode_ms_max"],
                "bytes_per_step": moved,
                "gbs": rate,
                "read_ceiling_gbs": ceiling,
                "fraction": rate / ceiling,
                "hardware": row["hardware"],
                "build": row["build"],
            }
        )
    return rows


def model_name():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    args = arguments()
    if not args.millrace.exists():
        sys.exit(f"{args.millrace} is missing: cargo build --release")
    if args.smoke:
        args.runs = 1
    today = datetime.date.today().isoformat()
    before = os.getloadavg()
    runs = [run(args) for _ in range(args.runs)]
    summary = []
    for rows in zip(*runs):
        fractions = [row["fraction"] for row in rows]
        entry = {
            "batch": rows[0]["batch"],
            "bytes_per_step": rows[0]["bytes_per_step"],
            "step_ms": statistics.median(row["step_ms"] for row in rows),
            "gbs": statistics.median(row["gbs"] for row in rows),
            "read_ceiling_gbs": statistics.median(row["read_ceiling_gbs"] for row in rows),
            "fraction": statistics.median(fractions),
            "fraction_min": min(fractions),
            "fraction_max": max(fractions),
            # A neighbour slows a measured ceiling too; the best one is the machine's.
            "fraction_of_best_ceiling": statistics.median(row["gbs"] for row in rows)
            / max(row["read_ceiling_gbs"] for row in rows),
        }
        summary.append(entry)
        print(
            f"batch {entry['batch']}: {entry['step_ms']:.2f} ms a step, {entry['bytes_per_step'] / 1e9:.3f} GB,"
            f" {entry['gbs']:.2f} of {entry['read_ceiling_gbs']:.2f} GB/s: {entry['fraction']:.1%}"
            f" ({entry['fraction_min']:.1%}..{entry['fraction_max']:.1%};"
            f" {entry['fraction_of_best_ceiling']:.1%} of the best ceiling)"
        )
    report = {
        "what": "decode step; smoke run, not a measurement" if args.smoke else "decode step",
        "date": today,
        "smoke": args.smoke,
        "note": args.note,
        "model": args.model.name,
        "dtype": args.dtype,
        "threads": args.threads,
        "hardware": {"model": model_name(), "cores": os.cpu_count()},
        "load_before": before,
        "load_after": os.getloadavg(),
        "summary": summary,
        "runs": runs,
    }
    name = f"decode-rate-{today}{'-smoke' if args.smoke else ''}.json"
    output = args.output or ROOT / "benches" / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
