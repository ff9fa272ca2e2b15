"""torchft and torchrun as elastic.py runs them: started, watched and killed at like Caravan.

Each is kept as small and as quick as it goes, so that a pause is the peer's own: a model of two
layers, no more processes than it takes to lose one and go on, and everything on this machine.
What a script learns comes from the lines that a survivor adds to its log with each step.
"""

import collections
import os
import random
import signal
import socket
import subprocess
import time

import pinned
import watch

HERE = pinned.ROOT / "bench"
TORCHFT = "torchft==0.2.0"

# Fewer than Caravan's four, which is to the peers' advantage: there is less to start and to wait
# for. With two, torchft's survivor would be alone and have nobody to agree with.
PROCESSES = 3

# torchft's lighthouse by default waits 60 s for stragglers when groups start, and importing
# PyTorch in all of them takes long on few cores.
WHOLE_S = 120.0

# Steps in a row that show that everybody is back.
STEPS = 5

Row = collections.namedtuple("Row", "at step who")


class Log:
    """The steps in a worker's log; the third column is kept as the worker writes it."""

    def __init__(self, path):
        self.path, self.rows, self.position = path, [], 0

    def read(self):
        if self.path.exists():
            with open(self.path) as file:
                file.seek(self.position)
                text, end, _ = file.read().rpartition("\n")
                self.position += len(text + end)
            for line in text.splitlines():
                at, step, who = line.split()
                self.rows.append(Row(float(at), int(step), int(who)))
        return self.rows

    def after(self, moment):
        return [row for row in self.read() if row.at > moment]


class Peer:
    """What the peers have in common: processes with an output file, and waiting."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []

    def spawn(self, name, command, **environment):
        output = open(self.folder / f"{name}.output", "ab")
        # Names of this machine need not resolve.
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment}
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        output.close()
        self.processes.append(process)
        return process

    def wait(self, what, patience):
        deadline = time.monotonic() + patience
        while not what():
            if time.monotonic() > deadline:
                raise watch.Stuck(f"waited {patience:.0f} s in vain; {self.words()}")
            time.sleep(0.01)

    def words(self):
        """The last line of what each process printed."""
        found = {f.stem: f.read_text(errors="replace").split("\n") for f in self.folder.glob("*.output")}
        last = {name: [line for line in lines if line.strip()][-1:] for name, lines in found.items()}
        return "; ".join(f"{name}: {lines[0]}" for name, lines in sorted(last.items()) if lines)

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


class Torchft(Peer):
    """Replica groups of one process each, and a lighthouse with the settings given."""

    def __init__(self, python, folder, **settings):
        super().__init__(folder)
        self.python = python
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.lighthouse = f"http://127.0.0.1:{port}"
        settings = {"min_replicas": 1, "bind": f"0.0.0.0:{port}", **settings}
        command = [python.parent / "torchft_lighthouse"]
        command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self.spawn("lighthouse", command)
        self.logs = [Log(folder / f"group-{n}.log") for n in range(PROCESSES)]
        self.groups = [self.group(n) for n in range(PROCESSES)]

    def group(self, n):
        command = [self.python, HERE / "torchft_group.py", self.logs[n].path, str(n)]
        return self.spawn(f"group-{n}", command, TORCHFT_LIGHTHOUSE=self.lighthouse)

    def settle(self):
        begun = time.monotonic()

        def settled():
            newest = [log.after(begun)[-STEPS:] for log in self.logs]
            return all(len(rows) == STEPS and all(r.who == PROCESSES for r in rows) for rows in newest)

        self.wait(settled, WHOLE_S)
        times = [row.at for row in self.logs[0].rows[-STEPS:]]
        return [b - a for a, b in zip(times, times[1:])]

    def kill(self, within, patience):
        """Kills a group; returns the survivors' longest time between two committed steps until
        one is committed without it, and how many steps were done again. Starts it again."""
        victim = random.randrange(PROCESSES)
        survivor = self.logs[(victim + 1) % PROCESSES]
        time.sleep(random.uniform(0, within))
        self.groups[victim].kill()
        killed = time.monotonic()
        self.wait(lambda: any(row.who == PROCESSES - 1 for row in survivor.after(killed)), patience)
        after = survivor.after(killed)
        without = next(i for i, row in enumerate(after) if row.who == PROCESSES - 1)
        rows = [survivor.rows[-len(after) - 1], *after[: without + 1]]
        pause, again = max(longest(a, b) for a, b in zip(rows, rows[1:]))
        self.groups[victim].wait()
        self.groups[victim] = self.group(victim)
        return pause, again


class Torchrun(Peer):
    """Workers under one agent, which starts all of them again when one dies.

    By default a new attempt shares its store with the attempt before, and reads addresses of
    workers that are dead: it fails to connect and is started once more, often several times,
    for up to more than 40 s. A store for each attempt avoids that.
    """

    def __init__(self, python, folder):
        super().__init__(folder)
        command = [python, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000"]
        command += ["--nproc-per-node", str(PROCESSES), HERE / "torchrun_worker.py", folder]
        self.spawn("torchrun", command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        self.logs = [Log(folder / str(rank)) for rank in range(PROCESSES)]

    def settle(self):
        begun = time.monotonic()
        self.wait(lambda: all(len(log.after(begun)) >= STEPS for log in self.logs), WHOLE_S)
        times = [row.at for row in self.logs[0].rows[-STEPS:]]
        return [b - a for a, b in zip(times, times[1:])]

    def kill(self, within, patience):
        """Kills a worker; returns the time between the last step before and the first one by
        the workers started anew, and how many steps were done again to get there."""
        log = self.logs[0]
        old = log.read()[-1].who
        time.sleep(random.uniform(0, within))
        os.kill(random.choice(self.logs).read()[-1].who, signal.SIGKILL)
        self.wait(lambda: log.read()[-1].who != old, patience)
        new = next(i for i, row in enumerate(log.rows) if i and log.rows[i - 1].who == old != row.who)
        return longest(log.rows[new - 1], log.rows[new])


def longest(before, after):
    """A pause with what comes of it: the time, and the steps done again."""
    return after.at - before.at, max(0, before.step - after.step + 1)
