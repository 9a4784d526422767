"""``memory3 plan``: the cost model for the paper's model, a preset, or a checkpoint at hand; of training too."""

import json
from types import SimpleNamespace
from typing import Any

from model.locating import PRESET_NAMES, find_checkpoint
from model.planning import (
    PAPER_NUM_REFERENCES,
    ModelShape,
    PlanRow,
    describe_plan,
    paper_shape,
    shape_from_config,
)
from model.training_costs import TrainingPlan, describe_training
from schemas.codec_names import NONE
from schemas.errors import InputError

DEFAULT_NUM_REFERENCES = 1_000_000
"""References assumed where the user gives no number."""


def make_plan(model: str, num_references: int | None, *, paper: bool, codec: str | None = None) -> list[PlanRow]:
    """Returns the plan of a bank.

    Args:
        model: ``memory3-tiny``, a preset or the folder of a checkpoint; only its ``config.json`` is read.
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


def plan_training(
    model: str,
    num_references: int | None,
    *,
    paper: bool,
    codec: str | None = None,
    **settings: Any,
) -> list[PlanRow]:
    """Returns what training a model costs.

    Args:
        model: ``memory3-tiny``, a preset or the folder of a checkpoint; only its ``config.json`` is read.
        num_references: as for :func:`make_plan`.
        paper: plan for the paper's model instead.
        codec: codec of the bank; None for vectors as they are.
        settings: fields of :class:`model.training_costs.TrainingPlan`.

    Raises:
        InputError: the model has no configuration, or a number is out of bounds.
    """
    config = None if paper else read_config(model)
    shape = paper_shape() if config is None else shape_from_config(config)
    if num_references is None:
        num_references = PAPER_NUM_REFERENCES if paper else DEFAULT_NUM_REFERENCES
    plan = TrainingPlan(tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)), **settings)
    return describe_training(shape, plan, num_references=num_references, codec=codec)


def read_shape(model: str) -> ModelShape:
    """Returns the shape of a preset or of a checkpoint, of which only ``config.json`` is read.

    Raises:
        InputError: there is none, or it is not of a decoder.
    """
    return shape_from_config(read_config(model))


def read_config(model: str) -> Any:
    """Returns the configuration of a preset (``tiny``, ``0.9b``, ``2.4b``) or of a checkpoint.

    Raises:
        InputError: there is no such model.
    """
    if model in PRESET_NAMES:
        from model.presets import PRESETS

        return PRESETS[model]()
    path = find_checkpoint(model) / "config.json"
    if not path.is_file():
        raise InputError(f"{model} is not a checkpoint: it has no config.json; give a model's folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    return SimpleNamespace(**config)


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
