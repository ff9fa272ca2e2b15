#!/usr/bin/env python3
"""The pause after `kill -9` of one worker: Caravan, torchft and torchrun elastic, in turns.

usage: bench/elastic.py [--kills N] [--only caravan,torchft,torchrun]

Installs PyTorch and torchft into target/python on first use, and builds Caravan. Each system
runs a tiny model on this machine, loses one worker (or replica group) at a random moment, and
is given time to be whole again before the next kill; that happens --kills times to each (20 by
default), at most ten in a row before it is the next one's turn. A pause is the time between the
last committed step before a change of members and the first one after it, less the median
ordinary step; what takes longer than 30 s counts as stuck, and the system is started anew.

  caravan            4 workers with a thread each, model preset 260k, all cluster settings as
                     they are by default
  torchft            3 replica groups and a model of two layers; the lighthouse's settings as
                     they are by default, and the best ones that were found
  torchrun           3 workers, the same model, a checkpoint every 10 steps, and a store for each
                     attempt, without which restarts fail

The exit code is 0 where Caravan was measured. A peer that cannot be had or does not work is
named with the reason, and does not stop the others.
"""

import argparse
import itertools
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
import pinned
import small
import watch

STUCK_S = 30.0
TURN = 10
WORKERS = 4

# Everything that is started carries this with the run's folder, so that nothing outlives the
# script: some of it is started by others, and lives on when they are killed.
MARK = "CARAVAN_ELASTIC"


class Caravan:
    """`caravan train` with its own supervisor, which starts killed workers again."""

    def __init__(self, binary, folder):
        self.job = watch.Job(binary, [small.write(folder, WORKERS)], folder / "run", cwd=folder)

    def settle(self):
        return self.job.feed.settle(WORKERS, patience=peers.WHOLE_S)

    def kill(self, within, patience):
        """Kills a worker; returns the time between the last step before the survivors' new
        generation and its first one, and how many steps were done again."""
        steps = self.job.feed.steps
        old = steps[-1].generation
        self.job.kill(within)
        self.job.feed.wait(lambda: steps[-1].generation != old, patience)
        new = next(i for i in range(len(steps) - 1, 0, -1) if steps[i - 1].generation == old)
        before, after = steps[new - 1], steps[new]
        return after.at - before.at, max(0, before.number - after.number + 1)

    def stop(self):
        self.job.stop()


class Measured:
    """What was seen of one system, over all its turns."""

    def __init__(self, name, start):
        self.name, self.start = name, start
        self.gaps, self.ordinary, self.again = [], [], []
        self.stuck = self.broken = 0
        self.reason = None

    def turn(self, kills, folders):
        """Starts the system, kills `kills` times, and starts it anew where it does not go on."""
        system = None
        try:
            for _ in range(kills):
                system = system or self.start(next(folders))
                if not self.one_kill(system):
                    system.stop()
                    system = None
        finally:
            if system:
                system.stop()

    def one_kill(self, system):
        """Whether the system can be killed at again."""
        try:
            self.ordinary += system.settle()
        except watch.Stuck:
            if not self.gaps:
                raise
            # The kill before is to blame, or the start; there is nothing to kill at.
            self.broken += 1
            print(f"{self.name}: not whole within {peers.WHOLE_S:.0f} s; started anew", flush=True)
            return False
        try:
            gap, again = system.kill(statistics.median(self.ordinary), STUCK_S)
        except watch.Stuck:
            self.gaps.append(STUCK_S)
            self.stuck += 1
            print(f"{self.name}: kill {len(self.gaps)}: stuck for {STUCK_S:.0f} s; started anew", flush=True)
            return False
        self.gaps.append(gap)
        self.again.append(again)
        print(f"{self.name}: kill {len(self.gaps)}: {gap:.3f} s between two steps", flush=True)
        return True

    def pauses(self):
        """Beyond an ordinary step, ascending; stuck ones are at the end and stay what they are."""
        ordinary = statistics.median(self.ordinary)
        return sorted(gap if gap >= STUCK_S else gap - ordinary for gap in self.gaps)


def contestants(only):
    """The systems that can be had, and those that cannot with the reason."""
    found = []

    def add(name, make):
        measured = Measured(name, None)
        found.append(measured)
        try:
            measured.start = make()
        except subprocess.CalledProcessError as problem:
            command, lines = " ".join(map(str, problem.cmd)), (problem.stderr or "").strip().splitlines()
            words = "; ".join(lines[-2:])
            measured.reason = f"cannot be had: `{command}` ended with {problem.returncode}. {words}"
        except OSError as problem:
            measured.reason = f"cannot be had: {problem}"

    def caravan():
        binary = watch.build()
        return lambda folder: Caravan(binary, folder)

    def torchft(**settings):
        python = pinned.python(peers.TORCHFT)
        return lambda folder: peers.Torchft(python, folder, **settings)

    def torchrun():
        python = pinned.python()
        return lambda folder: peers.Torchrun(python, folder)

    if "caravan" in only:
        add("caravan", caravan)
    if "torchft" in only:
        add("torchft, default", torchft)
        # Of the join timeouts 50 to 1000 ms with heartbeats of 0.5 to 5 s that were tried.
        add("torchft, best", lambda: torchft(join_timeout_ms=100, heartbeat_timeout_ms=1000))
    if "torchrun" in only:
        add("torchrun", torchrun)
    return found


def sweep(folder):
    """Kills whatever carries this run's mark."""
    mark = f"{MARK}={folder}".encode()

    def leftovers():
        for process in Path("/proc").glob("[0-9]*"):
            try:
                marked = mark in (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked and int(process.name) != os.getpid():
                yield int(process.name)

    # Those that are being killed may have started others meanwhile; none starts them for ever.
    for _ in range(100):
        pids = list(leftovers())
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    print(f"still there after being killed: {pids}", file=sys.stderr)


def measure(systems, kills, folder):
    folders = (Path(folder, str(n)) for n in itertools.count())
    folders = (made for made in folders if made.mkdir() is None)
    for begun in range(0, kills, TURN):
        for system in systems:
            if system.reason:
                continue
            try:
                system.turn(min(TURN, kills - begun), folders)
            except (watch.Stuck, OSError) as problem:
                system.reason = f"does not run: {problem}"
            sweep(folder)


def seconds(value):
    return f"> {STUCK_S:.0f}" if value >= STUCK_S else f"{value:.3f}"


def report(systems):
    columns = ["", "kills", "min", "median", "p99", "max", "stuck", "broken", "again", "step"]
    form = "{:<18}{:>6}{:>9}{:>9}{:>9}{:>9}{:>7}{:>8}{:>7}{:>8}".format
    packages = ", ".join([*pinned.PACKAGES[:1], peers.TORCHFT])
    print(f"\n{os.cpu_count()} cores, {platform.machine()}; peers: {packages}")
    print("pause beyond an ordinary step after kill -9 of one worker, in seconds\n")
    print(form(*columns))
    medians = {}
    for system in systems:
        if not system.gaps:
            continue
        pauses = system.pauses()
        medians[system.name] = watch.quantile(pauses, 0.5)
        shown = [pauses[0], medians[system.name], watch.quantile(pauses, 0.99), pauses[-1]]
        numbers = [system.stuck, system.broken, max(system.again, default=0)]
        step = f"{statistics.median(system.ordinary):.3f}"
        print(form(system.name, len(pauses), *map(seconds, shown), *numbers, step))
    print(f"\nstuck: no step within {STUCK_S:.0f} s   broken: not whole again within {peers.WHOLE_S:.0f} s")
    print("again: most steps done again after a kill   step: the median ordinary step\n")
    ours = medians.pop("caravan", None)
    for name, median in medians.items():
        if ours and ours > 0:
            least = "more than " if median >= STUCK_S else ""
            print(f"median of {name} / median of caravan: {least}{median / ours:.1f}")
    for system in systems:
        if system.reason:
            print(f"{system.name}: {system.reason} (after {len(system.gaps)} kills)")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="caravan,torchft,torchrun")
    args = parser.parse_args()
    only = args.only.split(",")
    if not set(only) <= {"caravan", "torchft", "torchrun"} or args.kills < 1:
        parser.error("--only takes some of caravan,torchft,torchrun, and --kills at least 1")
    # An ended script cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    systems = contestants(only)
    with tempfile.TemporaryDirectory(prefix="caravan-elastic-", ignore_cleanup_errors=True) as folder:
        os.environ[MARK] = folder
        interrupted = False
        try:
            measure(systems, args.kills, folder)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            # A second Ctrl-C would leave something behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sweep(folder)
    report(systems)
    if interrupted:
        print("interrupted: not all kills were made")
        sys.exit(130)
    sys.exit(not any(system.name == "caravan" and system.gaps for system in systems))


if __name__ == "__main__":
    main()
