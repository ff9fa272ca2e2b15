"""Runs a script in a virtual environment of its own, with pinned packages.

PyTorch and transformers are needed to compare against, never to build or test, so they are
installed on first use under target/ and nowhere else.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

# One version for goldens and benchmarks, so that both speak of the same peer.
PACKAGES = ["torch==2.15.0", "transformers==5.24.0", "safetensors==0.8.0", "numpy==2.4.6"]
ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("CARAVAN_PYTHON", ROOT / "target" / "python"))


def python(*more):
    """The environment's interpreter; the environment is made, and what lacks is installed, if
    need be. Packages named here are installed together with the pinned ones, so that they
    cannot bring other versions of those."""
    interpreter = HOME / "bin" / "python"
    stamp = HOME / "installed"
    wanted = [*PACKAGES, *more]
    if not stamp.exists() or not set(wanted) <= set(stamp.read_text().split()):
        print(f"installing {', '.join(wanted)} into {HOME} (a few gigabytes, once)", file=sys.stderr)
        venv.create(HOME, with_pip=True)
        command = [interpreter, "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        stamp.write_text(" ".join(wanted))
    return interpreter


def enter():
    """Goes on in the environment; returns where it is entered already."""
    if Path(sys.prefix).resolve() == HOME.resolve():
        return
    try:
        interpreter = python()
    except subprocess.CalledProcessError as problem:
        sys.exit(f"{problem}\n{problem.stderr or problem.output}")
    os.execv(interpreter, [str(interpreter), *sys.argv])
