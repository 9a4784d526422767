"""``memory3 plan``: the cost model for the paper's model, or for a checkpoint at hand."""

import json
from types import SimpleNamespace

from model.locating import find_checkpoint
from model.planning import PAPER_NUM_REFERENCES, PlanRow, describe_plan, paper_shape, shape_from_config
from schemas.errors import InputError

DEFAULT_NUM_REFERENCES = 1_000_000
"""References assumed where the user gives no number."""


def make_plan(model: str, num_references: int | None, *, paper: bool) -> list[PlanRow]:
    """Returns the plan of a bank.

    Args:
        model: ``memory3-tiny`` or the folder of a checkpoint; only its ``config.json`` is read.
        num_references: references in the bank; by default the paper's number, or a million.
        paper: plan for the paper's model instead.

    Raises:
        InputError: the model has no configuration, or a number is out of bounds.
    """
    if paper:
        return describe_plan(
            paper_shape(), num_references=PAPER_NUM_REFERENCES if num_references is None else num_references
        )
    path = find_checkpoint(model) / "config.json"
    if not path.is_file():
        raise InputError(f"{model} is not a checkpoint: it has no config.json; give a model's folder, or --paper")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    shape = shape_from_config(SimpleNamespace(**config))
    return describe_plan(shape, num_references=DEFAULT_NUM_REFERENCES if num_references is None else num_references)
