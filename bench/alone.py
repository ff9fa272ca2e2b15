#!/usr/bin/env python3
"""Step time while the coordinator is dead, against step time with it, in turns; and steps lost.

usage: bench/alone.py [--turns N] [--seconds S] [--workers N] [--small]     (4 turns of 30 s, 3 workers)

Starts `caravan coordinator` and workers with `caravan worker --join`, each a process of its own. In
each turn steps are counted for S seconds with the coordinator, which is then killed (SIGKILL); after
S seconds it is started again from the run's folder, and the workers come back with what they did
meanwhile. Step time is time over steps, by this script's clock and the steps that it saw: without
a coordinator from the last step before the kill to one after everybody was back, so that coming
back counts as well. The workers' own times of the same steps stand beside it. At the end the run
is drained, and `caravan audit` must find every step once, all in one generation.
"""

import argparse
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pinned
import small
import watch


class Cluster:
    """A coordinator at a fixed address, and its workers."""

    def __init__(self, binary, run_file, folder, workers):
        self.binary, self.run = binary, Path(folder, "run")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = "127.0.0.1:{}".format(free.getsockname()[1])
        listen = f'cluster.listen="{self.address}"'
        settings = ["--workers", str(workers), "--steps", "1000000", "--set", "cluster.checkpoint_every=0"]
        self.command = [binary, "coordinator", run_file, "--run", self.run, *settings, "--set", listen]
        self.log = open(Path(folder, "log"), "wb")
        self.coordinator = self.feed = None
        self.start()
        join = [binary, "worker", "--threads", "1", "--join", self.address]
        self.workers = [self.process(join) for _ in range(workers)]

    def process(self, command):
        return subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True)

    def start(self):
        """Starts the coordinator, and listens to it as soon as it does to us."""
        self.coordinator = self.process(self.command)
        deadline = time.monotonic() + watch.START_S
        while True:
            try:
                socket.create_connection(self.address.split(":"), timeout=1).close()
                break
            except OSError:
                if self.coordinator.poll() is not None or time.monotonic() > deadline:
                    raise watch.Stuck("the coordinator did not start")
                time.sleep(0.02)
        self.feed = watch.Feed(self.address)
        self.feed.start()

    def kill(self):
        self.coordinator.kill()
        self.coordinator.wait()

    def ask(self, path):
        connection = http.client.HTTPConnection(self.address)
        connection.request("GET", path)
        return json.load(connection.getresponse())

    def stop(self):
        self.coordinator.send_signal(signal.SIGINT)
        try:
            self.coordinator.wait(60)
        except subprocess.TimeoutExpired:
            pass
        for process in [self.coordinator, *self.workers]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self.log.close()


def pace(first, last):
    """Seconds a step between two steps that were seen."""
    return (last.at - first.at) / (last.number - first.number)


def with_coordinator(cluster, seconds):
    feed = cluster.feed
    first = feed.steps[-1]
    time.sleep(seconds)
    return first, feed.steps[-1]


def without(cluster, seconds):
    """The last step before the kill, and one that was seen live after everybody was back."""
    first = cluster.feed.steps[-1]
    cluster.kill()
    time.sleep(seconds)
    cluster.start()
    feed = cluster.feed
    feed.wait(lambda: any(e.kind in ("recovered", "planned") for e in feed.events), watch.START_S)
    # What was done meanwhile is told in a moment; the next steps come one by one again.
    told = time.monotonic() + 0.5
    feed.wait(lambda: feed.steps and feed.steps[-1].at > told)
    return first, feed.steps[-1]


def told(run, first, last):
    """The median of what the workers said of the same steps, in seconds; the coordinator records it."""
    took = []
    for line in Path(run, "control.jsonl").read_text().splitlines():
        if '"Committed"' in line:
            said = json.loads(line)["input"][1]["Message"]["message"]["Committed"]
            took += [said["took_ms"]] if first.number < said["step"] <= last.number else []
    return statistics.median(took) / 1e3


def measure(cluster, turns, seconds):
    cluster.feed.settle(len(cluster.workers), patience=watch.START_S)
    ratios, told_ratios, times = [], [], ([], [])
    for turn in range(turns):
        spans = [with_coordinator(cluster, seconds), without(cluster, seconds)]
        seen, said = [pace(*span) for span in spans], [told(cluster.run, *span) for span in spans]
        ratios.append(seen[1] / seen[0])
        told_ratios.append(said[1] / said[0])
        for kind, value in zip(times, seen):
            kind.append(value)
        count = spans[1][1].number - spans[1][0].number
        print(
            f"turn {turn + 1}: a step takes {seen[0] * 1e3:.1f} ms with a coordinator, {seen[1] * 1e3:.1f} ms "
            f"without ({count} steps); by the workers' clocks {said[0] * 1e3:.0f} and {said[1] * 1e3:.0f} ms",
            flush=True,
        )
    watch.show("step with a coordinator   ", times[0])
    watch.show("step without              ", times[1])
    watch.show("without / with            ", ratios, "")
    watch.show("by the workers' clocks    ", told_ratios, "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model, whose steps take milliseconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="caravan-alone-", ignore_cleanup_errors=True) as folder:
        example = pinned.ROOT / "examples/dependencies.toml"
        run_file = small.write(Path(folder), args.workers) if args.small else example
        try:
            binary = watch.build()
            cluster = Cluster(binary, run_file, folder, args.workers)
            try:
                measure(cluster, args.turns, args.seconds)
                last = cluster.ask("/api/snapshot")
            finally:
                cluster.stop()
        except (watch.Stuck, subprocess.CalledProcessError) as problem:
            sys.exit(str(problem))
        audit = subprocess.run([binary, "audit", Path(folder, "run"), "--json"], capture_output=True, text=True)
        report = json.loads(audit.stdout)
        whole = report["holds"] and report["steps"] >= last["step"] and last["generation"] == 1
        print(f"steps in the ledger: {report['steps']}, generation {last['generation']}: ", end="")
        print("none lost" if whole else f"NOT as it should be: {audit.stdout}")
    sys.exit(not whole)


if __name__ == "__main__":
    main()
