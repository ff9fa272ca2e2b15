#!/usr/bin/env python3
"""What the fixed order of sums costs: step time against the same steps with a plain ring.

usage: bench/reduce.py [--turns N] [--seconds S] [--small]         (5 turns of 20 s, 4 workers)

In turns, on the same model, data, batch and kernels, with four members of one compute thread each:

  caravan          `caravan train`, with a process for each worker, all of its protocol, and
                   cluster.redundancy = 1: partial sums go to the one owner of each slice, who adds
                   them in the order of the fixed tree
  ring             worker/examples/ring.rs: a ring reduce-scatter of gradients and a ring all-gather
                   of weights, the same bytes, on plain TCP connections between threads; no
                   coordinator, no checksums, no votes, and a sum whose bits depend on the number
                   of members
  caravan, twice   as the first, with the default cluster.redundancy = 2: every slice has two
                   owners, which is what survives a death, and twice the bytes of gradients

A step time is the median of a turn's, after the first few; the result is the median over turns of
its ratio to the ring's in the same turn. The losses of the same step are compared as well, so that
it is known that both compute the same.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pinned
import small
import watch

WORKERS = 4
WARM_UP = 3


class Losses(watch.Feed):
    """A feed that keeps the loss of each step, too."""

    def __init__(self, address):
        super().__init__(address)
        self.losses = {}

    def add(self, now, kind, data):
        if kind == "step":
            self.losses[data["step"]] = data["loss"]
        super().add(now, kind, data)


def caravan(binary, run_file, folder, redundancy, seconds):
    """Step times in seconds, and the losses by step."""
    settings = ["--workers", str(WORKERS), "--steps", "1000000", "--set", "cluster.checkpoint_every=0"]
    settings += ["--set", f"cluster.redundancy={redundancy}", "--set", "cluster.threads=1"]
    job = watch.Job(binary, [run_file, *settings], folder, cwd=folder.parent, feed=Losses)
    try:
        job.feed.settle(WORKERS, count=WARM_UP)
        begun = len(job.feed.steps)
        time.sleep(seconds)
        at = [step.at for step in job.feed.steps[begun:]]
        return [b - a for a, b in zip(at, at[1:])], dict(job.feed.losses)
    finally:
        job.stop()


def ring(program, folder, seconds):
    command = [program, folder, str(WORKERS), str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    steps = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("step")]
    times = [float(ms) / 1e3 for _, ms, _ in steps]
    return times[WARM_UP:], {int(number): float(loss) for number, _, loss in steps}


def differ(a, b):
    """The largest relative difference of two losses of one step, of the first hundred."""
    both = sorted(set(a) & set(b))[:100]
    return max((abs(a[n] - b[n]) / abs(b[n]) for n in both), default=float("nan"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--small", action="store_true", help="a tiny model, whose steps take milliseconds")
    args = parser.parse_args()
    times = {"caravan": [], "ring": [], "caravan, twice": []}
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="caravan-reduce-", ignore_cleanup_errors=True) as folder:
        example = pinned.ROOT / "examples/dependencies.toml"
        run_file = small.write(Path(folder), WORKERS) if args.small else example
        try:
            binary, program = watch.build(), watch.build("caravan-worker", "ring")
            for turn in range(args.turns):
                run = Path(folder, f"run{turn}")
                steps, losses = caravan(binary, run_file, run, 1, args.seconds)
                times["caravan"].append(statistics.median(steps))
                steps, others = ring(program, run, args.seconds)
                times["ring"].append(statistics.median(steps))
                worst = max(worst, differ(losses, others))
                steps, _ = caravan(binary, run_file, Path(folder, f"twice{turn}"), 2, args.seconds)
                times["caravan, twice"].append(statistics.median(steps))
                shown = ", ".join(f"{name} {values[-1] * 1e3:.1f} ms" for name, values in times.items())
                print(f"turn {turn + 1}: {shown}", flush=True)
        except (watch.Stuck, subprocess.CalledProcessError) as problem:
            sys.exit(str(problem))
    for name in ("caravan", "caravan, twice"):
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["ring"])]
        watch.show(f"{name:<14} / ring", ratios, "")
    print(f"losses of the same step differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
