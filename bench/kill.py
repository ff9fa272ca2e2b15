#!/usr/bin/env python3
"""From `kill -9` of one of three workers to the next committed step, on the example's model.

usage: bench/kill.py [KILLS]        (10 by default; needs only Python and a release build)

Starts `caravan train examples/dependencies.toml --workers 3` in a folder of its own, kills a
worker, waits for the next committed step, waits until three workers are members again and have
stepped, and so on. Prints each pause, their distribution, and the ordinary step time between
kills. The clock is this script's; steps are seen on the coordinator's live feed.
"""

import subprocess
import sys
import tempfile

import watch

WORKERS = 3


def measure(job, kills):
    feed, pauses, ordinary = job.feed, [], []
    for n in range(kills):
        ordinary += feed.settle(WORKERS)
        seen = len(feed.steps)
        killed = job.kill(within=ordinary[-1])
        # What was committed while the moment was waited for is not after the kill.
        feed.wait(lambda: feed.steps[seen:] and feed.steps[-1].at > killed)
        pauses.append(next(step.at for step in feed.steps[seen:] if step.at > killed) - killed)
        print(f"kill {n + 1:3}: next committed step after {pauses[-1]:.3f} s", flush=True)
    watch.show(f"ordinary step, {WORKERS} workers    ", ordinary)
    watch.show("kill -9 to next committed step", pauses)


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    arguments = ["examples/dependencies.toml", "--workers", str(WORKERS), "--steps", "100000"]
    arguments += ["--set", "cluster.checkpoint_every=0"]
    try:
        job = watch.Job(watch.build(), arguments, tempfile.mkdtemp(prefix="caravan-kill-"))
        try:
            measure(job, kills)
        finally:
            job.stop()
    except (watch.Stuck, subprocess.CalledProcessError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
