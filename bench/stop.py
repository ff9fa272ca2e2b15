#!/usr/bin/env python3
"""From SIGSTOP of a worker to the coordinator's event that it is lost, against `cluster.detect`.

usage: bench/stop.py [--stops N] [--detect BUDGET,...]     (20 stops each with 1s and 3s)

A stopped process keeps its connections: only its silence gives it away, which is what the failure
budget is about. Starts `caravan train` with four workers on a tiny model for each budget, in
turns of at most five stops; stops a worker at a random moment, waits until the live feed says that
it is lost, kills it, and waits until its successor has stepped with the others. The clock is this
script's. The exit code is 0 where every stop was known within its budget.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import small
import watch

WORKERS = 4
TURN = 5


def seconds(budget):
    """What a run file's "500ms" or "3s" is in seconds."""
    if budget.endswith("ms"):
        return float(budget[:-2]) / 1e3
    return float(budget.removesuffix("s"))


def turn(binary, budget, stops, known):
    """One job, and so many stops; adds how long each took to be known."""
    with tempfile.TemporaryDirectory(prefix="caravan-stop-", ignore_cleanup_errors=True) as folder:
        settings = ["--set", f"cluster.detect={budget}", "--set", "cluster.checkpoint_every=0"]
        arguments = [small.write(Path(folder), WORKERS), *settings]
        job = watch.Job(binary, arguments, Path(folder, "run"), cwd=folder)
        try:
            for _ in range(stops):
                known.append(one(job, budget))
                print(f"detect {budget}: stop {len(known)} known after {known[-1]:.3f} s", flush=True)
        finally:
            job.stop()


def one(job, budget):
    job.feed.settle(WORKERS)
    # At any moment between two of its heartbeats, which are a quarter of the budget apart.
    pid = job.victim(within=seconds(budget) / 4)
    since = len(job.feed.events)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        return job.feed.seen("lost", since, patience=seconds(budget) + 30).at - stopped
    finally:
        os.kill(pid, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--detect", default="1s,3s")
    args = parser.parse_args()
    budgets = args.detect.split(",")
    known = {budget: [] for budget in budgets}
    try:
        binary = watch.build()
        for begun in range(0, args.stops, TURN):
            for budget in budgets:
                turn(binary, budget, min(TURN, args.stops - begun), known[budget])
    except (watch.Stuck, subprocess.CalledProcessError) as problem:
        sys.exit(str(problem))
    late = 0
    for budget, times in known.items():
        watch.show(f"detect {budget}, SIGSTOP to known", times)
        late += sum(t > seconds(budget) for t in times)
    print(f"later than detect: {late} of {sum(map(len, known.values()))}")
    sys.exit(late > 0)


if __name__ == "__main__":
    main()
