"""One replica group of torchft with a trivial model, for elastic.py.

usage: torchft_group.py LOG NUMBER        (TORCHFT_LIGHTHOUSE says where the lighthouse is)

Adds a line to LOG for every committed step: monotonic time, step, groups that took part.

Gradients are averaged by the manager's own all-reduce. torchft's wrapper of a model is of no use
here: in 0.2.0 its hook asserts a future that a failed all-reduce does not have, and when a group
is killed in the middle of one, the survivors end with that AssertionError.
"""

import os
import sys
import time
from datetime import timedelta

import torch
from torch import nn
from torch.distributed import TCPStore
from torchft import Manager, Optimizer, ProcessGroupGloo

# Much shorter than the 60 s that are the default, to torchft's advantage: a survivor that waits
# in an all-reduce for another one that has given it up goes on after this.
COLLECTIVE = timedelta(seconds=1)
REQUEST = timedelta(seconds=10)

# The same pause in every step as torchrun_worker.py's: a step that takes a while, on idle cores.
THINK_S = 0.02


def main():
    log, number = open(sys.argv[1], "a", buffering=1), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    adamw = torch.optim.AdamW(model.parameters())

    def load(state):
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["adamw"])

    # Port 0 is any free one.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=COLLECTIVE),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "adamw": adamw.state_dict()},
        replica_id=f"group-{number}",
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        timeout=REQUEST,
    )
    optimizer = Optimizer(manager, adamw)
    parent, committed = os.getppid(), 0
    while os.getppid() == parent:
        optimizer.zero_grad()
        x = torch.randn(32, 256)
        (model(x) - x).pow(2).mean().backward()
        for work in [manager.allreduce(parameter.grad) for parameter in model.parameters()]:
            work.wait()
        optimizer.step()
        # A step that failed is not committed, and the number stays.
        if manager.current_step() != committed:
            committed = manager.current_step()
            log.write(f"{time.monotonic():.6f} {committed} {manager.num_participants()}\n")
        time.sleep(THINK_S)


main()
