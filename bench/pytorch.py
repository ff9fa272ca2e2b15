"""Training speed against PyTorch on this machine, in turns.

usage: python3 bench/pytorch.py [PRESET[:BATCH]...] [--precision fp32|mixed|both] [--threads N]
                                [--rounds N] [--eager]

Installs PyTorch into target/python on first use and builds the engine's benchmark. For each shape
and precision it runs the two one after the other, `--rounds` times, and prints the ratio of their
median tokens/s and the spread of the rounds' ratios. PyTorch is at its best: compiled (unless
--eager), fused AdamW, and with jemalloc where the system has it (Debian: libjemalloc2). Neither is
pinned to cores.
"""

import argparse
import ctypes.util
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import pinned

pinned.enter()

SHAPES = ["15m:16", "110m:2"]


def speed(command, **more):
    """Runs it; the tokens/s that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | more)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    line = done.stdout.strip()
    print(line, flush=True)
    return float(re.search(r"tok/s=(\d+)", line)[1])


def jemalloc():
    """What the loader is to be told for PyTorch to have it."""
    found = ctypes.util.find_library("jemalloc")
    return {"LD_PRELOAD": found} if found else {}


def compare(shape, precision, args, ours, theirs):
    """The ratio, as a line."""
    preset, _, batch = shape.partition(":")
    common = [preset, "--precision", precision, "--threads", args.threads, "--steps", args.steps]
    common += ["--batch", batch or "16"]
    eager = [] if args.eager else ["--compile"]
    runs = []
    for _ in range(args.rounds):
        runs.append((speed([ours, *common]), speed([*theirs, *common, *eager], **jemalloc())))
    medians = [statistics.median(side) for side in zip(*runs)]
    ratios = [a / b for a, b in runs]
    return (
        f"{shape:>8} {precision:>6} {medians[0]:>10.0f} {medians[1]:>10.0f} "
        f"{medians[0] / medians[1]:>8.2f}   {min(ratios):.2f} to {max(ratios):.2f}"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--precision", choices=["fp32", "mixed", "both"], default="both")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--steps", default="6")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    build = ["cargo", "build", "--release", "-p", "caravan-engine", "--example", "bench"]
    subprocess.run(build, check=True, cwd=pinned.ROOT)
    target = Path(os.environ.get("CARGO_TARGET_DIR", pinned.ROOT / "target"))
    ours = str(target / "release" / "examples" / "bench")
    theirs = [str(pinned.HOME / "bin" / "python"), str(pinned.ROOT / "bench" / "torch_llama.py")]
    precisions = ["mixed", "fp32"] if args.precision == "both" else [args.precision]
    lines = [compare(shape, p, args, ours, theirs) for p in precisions for shape in args.shapes]
    kind = "eager" if args.eager else "compiled"
    allocator = "jemalloc" if jemalloc() else "the system's allocator"
    print(f"\n{platform.machine()}, {args.threads} threads; PyTorch {kind}, with {allocator}")
    print("   shape class     Caravan    PyTorch    ratio   of the rounds")
    print("\n".join(lines))


main()
