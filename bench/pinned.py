"""Runs a script in a virtual environment of its own, with pinned packages.

PyTorch is needed to compare against, never to build or test, so it is installed on first use
under target/ and nowhere else.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

# One version for goldens and benchmarks, so that both speak of the same peer.
PACKAGES = ["torch==2.15.0", "safetensors==0.8.0", "numpy==2.4.6"]
ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("CARAVAN_PYTHON", ROOT / "target" / "python"))


def enter():
    """Goes on in the environment, made if need be; returns where it is entered already."""
    if Path(sys.prefix).resolve() == HOME.resolve():
        return
    python = HOME / "bin" / "python"
    stamp = HOME / "installed"
    if not stamp.exists() or stamp.read_text().split() != PACKAGES:
        print(f"installing {', '.join(PACKAGES)} into {HOME} (a few gigabytes, once)", file=sys.stderr)
        venv.create(HOME, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        stamp.write_text(" ".join(PACKAGES))
    os.execv(python, [str(python), *sys.argv])
