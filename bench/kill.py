#!/usr/bin/env python3
"""From `kill -9` of one of three workers to the next committed step, on the example's model.

usage: bench/kill.py [KILLS]        (10 by default; needs only Python and a release build)

Starts `caravan train examples/dependencies.toml --workers 3` in a folder of its own, kills a
worker, waits for the next committed step, waits until three workers are members again and have
stepped, and so on. Prints each pause, their distribution, and the ordinary step time between
kills. The clock is this script's; steps are seen on the coordinator's live feed.
"""

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "target/release/caravan"
WORKERS = 3


class Feed(threading.Thread):
    """The live feed: steps with the moment they were seen, and the newest snapshot."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection(address)
        self.steps, self.snapshot, self.news = [], None, threading.Condition()

    def run(self):
        self.connection.request("GET", "/api/live")
        kind = None
        for line in self.connection.getresponse():
            line = line.decode().rstrip("\n")
            if line.startswith("event:"):
                kind = line[6:].strip()
            elif line.startswith("data:"):
                data = json.loads(line[5:])
                with self.news:
                    if kind == "step":
                        self.steps.append((time.monotonic(), data["step"]))
                    elif kind == "snapshot":
                        self.snapshot = data
                    self.news.notify_all()

    def wait(self, what, patience=60):
        with self.news:
            if not self.news.wait_for(what, patience):
                sys.exit(f"waited {patience} s in vain; the last snapshot: {self.snapshot}")

    def whole(self):
        members = [w for w in (self.snapshot or {}).get("workers", []) if w["member"]]
        return len(members) == WORKERS and self.snapshot["phase"] == "running"


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(p) for p in (task / "children").read_text().split()]
    return found


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    subprocess.run(["cargo", "build", "--release", "-q", "-p", "caravan"], cwd=ROOT, check=True)
    folder = tempfile.mkdtemp(prefix="caravan-kill-")
    command = [BINARY, "train", "examples/dependencies.toml", "--workers", str(WORKERS), "--run", folder]
    command += ["--steps", "100000", "--set", "cluster.checkpoint_every=0"]
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        address = Path(folder, "address")
        while not address.exists():
            if job.poll() is not None:
                sys.exit("caravan train ended; run it by hand to see why")
            time.sleep(0.05)
        feed = Feed(address.read_text().strip().removeprefix("http://"))
        feed.start()
        pauses, ordinary = [], []
        for n in range(kills):
            feed.wait(feed.whole)
            seen = len(feed.steps)
            feed.wait(lambda: len(feed.steps) >= seen + 4 and feed.whole())
            times = [t for t, _ in feed.steps[seen:]]
            ordinary += [b - a for a, b in zip(times, times[1:])]
            time.sleep(random.uniform(0, ordinary[-1]))
            victim = random.choice(children(job.pid))
            killed, seen = time.monotonic(), len(feed.steps)
            os.kill(victim, signal.SIGKILL)
            feed.wait(lambda: len(feed.steps) > seen)
            pauses.append(feed.steps[seen][0] - killed)
            print(f"kill {n + 1:3}: next committed step after {pauses[-1]:.3f} s", flush=True)
        show = lambda name, v: print(
            f"{name}: min {min(v):.3f}  median {quantile(v, 0.5):.3f}  p99 {quantile(v, 0.99):.3f}  max {max(v):.3f} s"
        )
        show(f"ordinary step, {WORKERS} workers    ", ordinary)
        show("kill -9 to next committed step", pauses)
    finally:
        job.send_signal(signal.SIGINT)
        try:
            job.wait(20)
        except subprocess.TimeoutExpired:
            job.kill()


if __name__ == "__main__":
    main()
