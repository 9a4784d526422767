"""The choice of memory layers: which layers of a model write and read memories.

The paper takes the first half, trained from scratch; for a model that exists already it suggests the layers that look
far back, and expects those in the middle to do (method section 9, Remark 4; :mod:`model.distance` measures it). A
choice is part of the model: it stands in ``config.json``, where :func:`model.checkpoint.find_memory_layers` finds it
when the model is loaded, and enters the fingerprint of its memories.

A memory is written by running all layers up to the last memory layer, so the higher that is, the more writing costs;
where the first memory layer is makes no difference to it.
"""

import dataclasses

from model.checkpoint import Checkpoint
from schemas.errors import InputError

FIRST_HALF, MIDDLE = "first-half", "middle"


def parse_memory_layers(choice: str, num_layers: int) -> tuple[int, ...]:
    """Returns the indices of the chosen layers, ascending.

    Args:
        choice: ``first-half``; ``middle``, as many layers from a quarter of the depth on; or a list of indices and
            ranges of them such as ``0,3,5-9``.
        num_layers: layers of the model.

    Raises:
        InputError: the choice is none of these, or names a layer that the model does not have.
    """
    if choice in (FIRST_HALF, MIDDLE):
        start = num_layers // 4 if choice == MIDDLE else 0
        return tuple(range(start, start + max(1, num_layers // 2)))
    layers: set[int] = set()
    for part in choice.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        numbers = [first, last] if dash else [first]
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            raise InputError(
                f"memory layers are {choice!r}, must be {FIRST_HALF}, {MIDDLE} or a list of layers such as 0,3,5-9"
            )
        start, stop = int(numbers[0]), int(numbers[-1])
        if not start <= stop < num_layers:
            raise InputError(
                f"memory layers are {choice!r}: {part.strip()} is not among the model's layers 0..{num_layers - 1}"
            )
        layers.update(range(start, stop + 1))
    return tuple(sorted(layers))


def choose_memory_layers(checkpoint: Checkpoint, choice: str) -> Checkpoint:
    """Returns the checkpoint with other memory layers, which also enter the model's configuration.

    Args:
        checkpoint: the model; its configuration is changed, its weights are not.
        choice: see :func:`parse_memory_layers`.

    Raises:
        InputError: there is no such choice.
    """
    config = checkpoint.config
    layers = parse_memory_layers(choice, int(config.num_hidden_layers))
    config.memory_layers = list(layers)
    if hasattr(config, "num_memory_layers"):
        del config.num_memory_layers  # the same choice, said in another way
    return dataclasses.replace(checkpoint, memory_layers=layers)
