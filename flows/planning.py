"""``memory3 plan``: the cost model for the paper's model, or for a checkpoint at hand."""

import json
from types import SimpleNamespace

from model.locating import find_checkpoint
from model.planning import (
    PAPER_NUM_REFERENCES,
    ModelShape,
    PlanRow,
    describe_plan,
    paper_shape,
    shape_from_config,
)
from schemas.codec_names import NONE
from schemas.errors import InputError

DEFAULT_NUM_REFERENCES = 1_000_000
"""References assumed where the user gives no number."""


def make_plan(model: str, num_references: int | None, *, paper: bool, codec: str | None = None) -> list[PlanRow]:
    """Returns the plan of a bank.

    Args:
        model: ``memory3-tiny`` or the folder of a checkpoint; only its ``config.json`` is read.
        num_references: references in the bank; by default the paper's number, or a million.
        paper: plan for the paper's model instead.
        codec: codec of the bank; None for vectors of the paper's size.

    Raises:
        InputError: the model has no configuration, or a number is out of bounds.
    """
    shape = paper_shape() if paper else read_shape(model)
    if num_references is None:
        num_references = PAPER_NUM_REFERENCES if paper else DEFAULT_NUM_REFERENCES
    return describe_plan(shape, num_references=num_references, codec=codec)


def read_shape(model: str) -> ModelShape:
    """Returns the shape of a checkpoint, of which only ``config.json`` is read.

    Raises:
        InputError: there is none, or it is not of a decoder.
    """
    path = find_checkpoint(model) / "config.json"
    if not path.is_file():
        raise InputError(f"{model} is not a checkpoint: it has no config.json; give a model's folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    return shape_from_config(SimpleNamespace(**config))


def measure_plan(model: str, device: str, dtype: str, codec: str | None = None) -> list[PlanRow]:
    """Returns what a reference costs in each format on this machine.

    Args:
        model: ``memory3-tiny`` or the folder of a checkpoint.
        device: where to compute.
        dtype: the type to compute in.
        codec: what memories are decoded from; one that has to be trained has random parameters, which take as long.

    Raises:
        InputError: the model cannot be loaded, or not be put on the device, or there is no such codec.
    """
    from flows.bench_storage import make_random_codec
    from flows.measured_costs import describe_measured, measure_costs
    from model.loading import load_writer

    writer = load_writer(model, device=device, compute_dtype=dtype)
    shape = shape_from_config(writer.checkpoint.config)
    coded_by = make_random_codec(codec or NONE, shape, writer.layout.dtype, device=device)
    return describe_measured(measure_costs(writer, coded_by), writer.checkpoint)
