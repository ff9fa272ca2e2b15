"""A run so small that a step takes milliseconds, for scripts about pauses: what they measure is
not the model."""

import random

# A short sequence makes a step as short as that of the peers that some scripts compare with.
RUN_FILE = """
[model]
preset = "260k"

[data]
paths = ["text.txt"]

[batch]
sequence_length = 64

[recipe]
steps = 10000000

[cluster]
workers = {workers}
threads = 1
"""


def write(folder, workers):
    """The run file, with its text beside it."""
    (folder / "text.txt").write_text(text())
    run_file = folder / "small.toml"
    run_file.write_text(RUN_FILE.format(workers=workers))
    return run_file


def text():
    """Enough text for a vocabulary of 512, the same every time."""
    dice = random.Random(1)
    words = ["".join(dice.choices("etaoinshrdlucm", k=dice.randint(1, 9))) for _ in range(3000)]
    lines = (" ".join(dice.choices(words, k=12)) for _ in range(8000))
    return ".\n".join(lines)
