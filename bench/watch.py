"""A `caravan train` of a script's own: started, watched from outside, and killed at.

What the scripts that measure pauses share. Steps are seen on the coordinator's live feed, and
the clock is the script's, so that nothing Caravan says about its own speed is believed.
"""

import collections
import http.client
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

from pinned import ROOT

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

# `caravan train` calls six deaths in a row, each within 30 s of a start, a crash loop and gives
# the worker up. Three at most, and a second to spare: its pauses before a restart stay short too.
GOOD_LIFE_S = 31.0
SHORT_LIVES = 3

# First start: preparing the data, and workers that all start at once on few cores.
START_S = 120.0

Step = collections.namedtuple("Step", "at number generation workers")
Notice = collections.namedtuple("Notice", "at kind data")


class Stuck(Exception):
    """What was waited for did not come in time."""


def build(package="caravan", example=None):
    """The release binary, or a package's example, built if need be."""
    command = ["cargo", "build", "--release", "--quiet", "--package", package]
    command += ["--example", example] if example else []
    subprocess.run(command, cwd=ROOT, check=True)
    return TARGET / "release" / (Path("examples", example) if example else package)


def read(path):
    """A file of /proc; nothing where its process or thread has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def show(name, values, unit="s"):
    low, high = min(values), max(values)
    median, p99 = (quantile(values, q) for q in (0.5, 0.99))
    print(f"{name}: min {low:.3f}  median {median:.3f}  p99 {p99:.3f}  max {high:.3f} {unit}")


class Feed(threading.Thread):
    """The live feed: committed steps and events, with the moment they were seen."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self.address = address
        self.connection = http.client.HTTPConnection(address)
        self.steps, self.events, self.news = [], [], threading.Condition()

    def run(self):
        self.connection.request("GET", "/api/live")
        kind = None
        try:
            for line in self.connection.getresponse():
                now, line = time.monotonic(), line.decode().rstrip("\n")
                if line.startswith("event:"):
                    kind = line[6:].strip()
                elif line.startswith("data:") and kind in ("step", "event"):
                    self.add(now, kind, json.loads(line[5:]))
        except (OSError, http.client.HTTPException):
            pass  # The coordinator was killed; whoever waits for it is told by their patience.

    def add(self, now, kind, data):
        with self.news:
            if kind == "step":
                self.steps.append(Step(now, data["step"], data["generation"], data["workers"]))
            else:
                self.events.append(Notice(now, data["kind"], data))
            self.news.notify_all()

    def seen(self, kind, since, patience=60.0):
        """Waits for an event of this kind after the first `since` ones."""
        found = lambda: next((e for e in self.events[since:] if e.kind == kind), None)
        self.wait(found, patience)
        return found()

    def wait(self, what, patience=60.0):
        with self.news:
            if not self.news.wait_for(what, patience):
                last = self.steps[-1] if self.steps else "none"
                raise Stuck(f"waited {patience:.0f} s in vain; the last step seen: {last}")

    def settle(self, workers, count=5, patience=60.0):
        """Waits until the newest `count` steps are new and by so many workers in one generation;
        returns how long each took after the one before."""
        seen = len(self.steps)

        def settled():
            newest = self.steps[-count:]
            whole = all(s.workers == workers and s.generation == newest[0].generation for s in newest)
            return len(self.steps) >= seen + count and whole

        self.wait(settled, patience)
        times = [step.at for step in self.steps[-count:]]
        return [b - a for a, b in zip(times, times[1:])]


class Job:
    """A running `caravan train`; `arguments` are those after `train`, less the run's folder."""

    def __init__(self, binary, arguments, run, cwd=ROOT, feed=Feed):
        command = [binary, "train", *arguments, "--run", run]
        # A session of its own: Ctrl-C on the terminal is for the script, which then ends the job.
        self.process = subprocess.Popen(
            command, cwd=cwd, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.deaths = collections.Counter()
        self.words = collections.deque(maxlen=5)
        threading.Thread(target=lambda: self.words.extend(self.process.stderr), daemon=True).start()
        try:
            self.feed = feed(self.address(Path(run, "address")))
        except BaseException:
            self.stop()
            raise
        self.feed.start()

    def address(self, file):
        deadline = time.monotonic() + START_S
        while not file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                words = b"".join(self.words).decode(errors="replace").strip()
                raise Stuck(f"caravan train did not start; its last words: {words}")
            time.sleep(0.05)
        return file.read_text().strip().removeprefix("http://")

    def workers(self):
        """Name, process and age in seconds of every worker."""
        now, found = time.clock_gettime(time.CLOCK_BOOTTIME), []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in read(task / "children").split():
                words = read(Path(f"/proc/{pid}/cmdline")).split("\0")
                stat = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
                if "--name" in words and stat:
                    # Field 22 of proc(5), less the two before the split: the start in ticks.
                    age = now - int(stat[19]) / os.sysconf("SC_CLK_TCK")
                    found.append((words[words.index("--name") + 1], int(pid), age))
        return found

    def kill(self, within):
        """Kills a worker at some moment `within` so many seconds; returns the moment."""
        pid = self.victim(within)
        os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    def victim(self, within):
        """The process of a worker that may die, at some moment `within` so many seconds. Waits
        first where any further death would look like a crash loop."""
        deadline = time.monotonic() + GOOD_LIFE_S
        while True:
            workers = self.workers()
            fit = [w for w in workers if w[2] > GOOD_LIFE_S or self.deaths[w[0]] < SHORT_LIVES]
            if fit:
                break
            if time.monotonic() > deadline:
                raise Stuck(f"no worker to kill among {workers}")
            time.sleep(0.1)
        time.sleep(random.uniform(0, within))
        name, pid, age = random.choice(fit)
        self.deaths[name] = 1 if age > GOOD_LIFE_S else self.deaths[name] + 1
        return pid

    def stop(self):
        """Drains the job; a drain that takes longer than a checkpoint can is ended."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
