"""Where models are: the names that stand for what comes with this project, everything else is a path.

Imports nothing heavy, so that commands which only need a tokenizer start fast.
"""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"

REFERENCE_TOKENS = 128
"""Longest reference, and length of the interval of positions that all references share."""

SHIPPED_MODEL = "memory3-tiny"
"""Name of the language model that comes with this project."""

PRESET_NAMES = ("tiny", "mini", "0.9b", "2.4b")
"""Names of the shapes in :mod:`model.presets`, which training can start from random weights."""


def find_checkpoint(name: str) -> Path:
    """Returns the folder of a checkpoint: the shipped one by its name, any other by its path."""
    return CHECKPOINTS / SHIPPED_MODEL if name == SHIPPED_MODEL else Path(name)
