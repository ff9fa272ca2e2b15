"""Training speed against PyTorch on this machine, in turns.

usage: python3 bench/pytorch.py [PRESET] [--batch B] [--threads N] [--rounds N] [--compile]

Installs PyTorch into target/python on first use, builds the engine's benchmark, runs the two
one after the other, `--rounds` times, and prints the ratio of median tokens/s and the spread.
"""

import argparse
import os
import re
import statistics
import subprocess
from pathlib import Path

import pinned

pinned.enter()


def speed(command):
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    print(out, flush=True)
    return float(re.search(r"tok/s=(\d+)", out)[1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("preset", nargs="?", default="15m")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    build = ["cargo", "build", "--release", "-p", "caravan-engine", "--example", "bench"]
    subprocess.run(build, check=True, cwd=pinned.ROOT)
    target = Path(os.environ.get("CARGO_TARGET_DIR", pinned.ROOT / "target"))
    common = [args.preset, "--batch", args.batch, "--threads", args.threads]
    ours = [str(target / "release" / "examples" / "bench"), *common]
    theirs = [str(pinned.HOME / "bin" / "python"), str(pinned.ROOT / "bench" / "torch_llama.py"), *common]
    theirs += ["--compile"] if args.compile else []
    runs = [(speed(ours), speed(theirs)) for _ in range(args.rounds)]
    medians = [statistics.median(side) for side in zip(*runs)]
    ratios = [a / b for a, b in runs]
    kind = "compiled" if args.compile else "eager"
    print(
        f"caravan {medians[0]:.0f} tok/s, PyTorch {kind} {medians[1]:.0f} tok/s: ratio "
        f"{medians[0] / medians[1]:.2f} (round by round {min(ratios):.2f} to {max(ratios):.2f})"
    )


main()
