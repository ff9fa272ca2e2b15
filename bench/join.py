#!/usr/bin/env python3
"""The pause of the others when a worker joins, against two steps and the time for what moves.

usage: bench/join.py [--joins N] [--small]        (20 joins, on the example's model)

Starts `caravan train` with two workers, and N times a third one with `caravan worker --join`,
which is asked to leave again (SIGTERM) once it has stepped with the others. The pause is the time
between the last step before the new generation and its first one, less an ordinary step; it may be
two ordinary steps and bytes / bandwidth. The bytes are what the plan moves, by the coordinator's
event; the bandwidth is that of a loopback connection of this script, which sends as many bytes
while the workers step. The exit code is 0 where nine of ten joins took no longer than that.
"""

import argparse
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pinned
import small
import watch

WORKERS = 2


def bandwidth(size):
    """Bytes a second through a loopback connection, for so many bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as to:
        sender = threading.Thread(target=lambda: to.sendall(bytes(size)))
        at, _ = server.accept()
        with at:
            begun, left, buffer = time.monotonic(), size, bytearray(1 << 20)
            sender.start()
            while left > 0:
                left -= at.recv_into(buffer, min(left, len(buffer)))
            took = time.monotonic() - begun
        sender.join()
    return size / took


class Change:
    """A change of members, as seen on the feed: `kind` of it, the gap and what moved."""

    def __init__(self, feed, generation, since, patience=60.0):
        steps = feed.steps
        feed.wait(lambda: steps[-1].generation != generation, patience)
        new = next(i for i in range(len(steps) - 1, 0, -1) if steps[i - 1].generation == generation)
        self.gap = steps[new].at - steps[new - 1].at
        self.again = max(0, steps[new - 1].number - steps[new].number + 1)
        self.bytes = feed.seen("planned", since).data["bytes"]


def one(job, binary):
    """A join and a leave: both changes, and the ordinary steps before and after the join."""
    feed, address = job.feed, job.feed.address
    before = feed.settle(WORKERS)
    generation, since = feed.steps[-1].generation, len(feed.events)
    joiner = subprocess.Popen([binary, "worker", "--join", address], stderr=subprocess.DEVNULL)
    try:
        join = Change(feed, generation, since)
        after = feed.settle(WORKERS + 1)
        generation, since = feed.steps[-1].generation, len(feed.events)
        joiner.send_signal(signal.SIGTERM)
        leave = Change(feed, generation, since)
        joiner.wait(30)
    finally:
        joiner.kill()
    return join, leave, before, after


def measure(job, binary, joins):
    pauses, ratios, leaves, moved, speeds, ordinary, again = [], [], [], [], [], [], 0
    for n in range(joins):
        join, leave, before, after = one(job, binary)
        step = statistics.median(before + after)
        speed = bandwidth(max(join.bytes, 1))
        pause, bound = join.gap - step, 2 * step + join.bytes / speed
        pauses.append(pause)
        ratios.append(pause / bound)
        leaves.append(leave.gap - step)
        moved.append(join.bytes / 1e6)
        speeds.append(speed / 1e6)
        ordinary += before + after
        again += join.again
        text = f"{join.bytes / 1e6:.1f} MB at {speed / 1e6:.0f} MB/s"
        print(f"join {n + 1:3}: pause {pause:.3f} s of {bound:.3f} s that it may take ({text})", flush=True)
    watch.show("ordinary step          ", ordinary)
    watch.show("pause when one joins   ", pauses)
    watch.show("pause when one leaves  ", leaves)
    watch.show("moved to the joiner    ", moved, "MB")
    watch.show("loopback bandwidth     ", speeds, "MB/s")
    watch.show("pause / what it may be ", ratios, "")
    late = sum(ratio > 1 for ratio in ratios)
    print(f"joins that took longer than they may: {late} of {joins}; steps done again: {again}")
    return late * 10 <= joins


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joins", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a tiny model, whose steps take milliseconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="caravan-join-", ignore_cleanup_errors=True) as folder:
        run_file = small.write(Path(folder), WORKERS) if args.small else pinned.ROOT / "examples/dependencies.toml"
        settings = ["--workers", str(WORKERS), "--steps", "1000000", "--set", "cluster.checkpoint_every=0"]
        try:
            binary = watch.build()
            job = watch.Job(binary, [run_file, *settings], Path(folder, "run"), cwd=folder)
            try:
                fine = measure(job, binary, args.joins)
            finally:
                job.stop()
        except (watch.Stuck, subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
            sys.exit(str(problem))
    sys.exit(not fine)


if __name__ == "__main__":
    main()
