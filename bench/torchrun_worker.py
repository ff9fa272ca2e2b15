"""One worker of torchrun with a trivial model and a checkpoint every ten steps, for elastic.py.

usage, by torchrun: torchrun_worker.py FOLDER

Adds a line to FOLDER/RANK for every step: monotonic time, step, process.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

CHECKPOINT_EVERY = 10

# The same pause in every step as torchft_group.py's.
THINK_S = 0.02


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    replicated = nn.parallel.DistributedDataParallel(model)
    adamw = torch.optim.AdamW(replicated.parameters())
    checkpoint, step = folder / "checkpoint", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        adamw.load_state_dict(saved["adamw"])
        step = saved["step"]
    log, parent = open(folder / str(rank), "a", buffering=1), os.getppid()
    while os.getppid() == parent:
        adamw.zero_grad()
        x = torch.randn(32, 256)
        (replicated(x) - x).pow(2).mean().backward()
        adamw.step()
        step += 1
        log.write(f"{time.monotonic():.6f} {step} {os.getpid()}\n")
        if rank == 0 and step % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "adamw": adamw.state_dict(), "step": step}
            torch.save(state, folder / "new")
            os.replace(folder / "new", checkpoint)
        time.sleep(THINK_S)


main()
