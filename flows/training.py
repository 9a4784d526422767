"""Training a language model in the paper's two stages, from prepared sequences to a checkpoint folder.

    dataset (:mod:`flows.preparing`) + model -> **run folder**: checkpoints, metrics, picture, RUN/model

Here model, loader and loop are joined, with progress. The commands are in :mod:`flows.train_commands`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from flows.progress import show_stage
from flows.workplace import lock_bank
from model.locating import PRESET_NAMES, SHIPPED_MODEL
from model.selecting import find_selection, record_selection
from model.training.batches import BatchSource
from model.training.drawing import DrawingConfig
from model.training.loop import LoopConfig, StepReport, TrainingSummary, run_training
from model.training.objective import LanguageObjective
from model.training.optimizing import OptimizerConfig
from model.training.planting import plant_copying
from model.training.saving import list_checkpoints, read_state
from model.training.schedule import ScheduleConfig
from model.training.starting import check_length, check_saved_dtype, save_model, start_model
from model.training.streaming import SequenceDataset, SequenceSource, StreamConfig
from pipelines.running import is_stopping
from schemas.atomic import write_bytes_atomically
from schemas.errors import InputError
from schemas.stores import LocalStore, explain_write_errors

MODEL_FOLDER = "model"
"""Where in its folder a run leaves the trained checkpoint."""

SETTINGS_FILE = "settings.json"

FREE_SETTINGS = ("loop", "stream", "saved_dtype", "save_every")
"""Settings of a stage that are not compared when a run goes on: the loop and the source compare theirs themselves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that determines a run beside its data and the model it starts from.

    Attributes:
        loop: steps, optimizer, schedule, checkpoints.
        drawing: how sequences are drawn and what makes training robust.
        stream: sequences a step, and their order.
        num_slots: tokens of a reference that a memory keeps at each KV head; None, as for the two below, for what the
            model was trained with before. The trained model says so, and is read with the same.
        score: how they are chosen, see :class:`model.selecting.SelectionConfig`.
        refit: whether their values are fitted.
        copying_heads: random weights begin with heads that copy, see :mod:`model.training.planting`.
        memory_layers: the layers that write and read: ``first-half``, ``middle``, or a list such as ``0,3,5-9``; empty
            for those of the model.
        adapter_rank: train low-rank adapters (LoRA) of this rank instead of all weights; 0 for all weights.
        saved_dtype: the type the trained weights are stored in.
    """

    loop: LoopConfig
    drawing: DrawingConfig = dataclasses.field(default_factory=DrawingConfig)
    stream: StreamConfig = dataclasses.field(
        default_factory=lambda: StreamConfig(sequences_per_step=4, sequences_per_batch=4)
    )
    num_slots: int | None = None
    score: str | None = None
    refit: bool | None = None
    copying_heads: bool = False
    memory_layers: str = ""
    adapter_rank: int = 0
    saved_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a rank below 0, or another type.
        """
        check_saved_dtype(self.saved_dtype)
        if self.adapter_rank < 0:
            raise InputError(f"training: adapter_rank is {self.adapter_rank}, must be at least 0")


def make_warmup_config(num_steps: int) -> TrainingConfig:
    """Stage one, for a small model: ordinary language modelling, a quarter of the sequences with a repeated span."""
    return TrainingConfig(
        loop=LoopConfig(num_steps=num_steps, optimizer=OptimizerConfig(learning_rate=2e-3)),
        drawing=DrawingConfig(stage="warmup", repeat_share=0.25),
    )


def make_continual_config(num_steps: int) -> TrainingConfig:
    """Stage two, for a small model: chunks read memories; now and then none, poorer ones, or copies of themselves."""
    return TrainingConfig(
        # Not the order of stage one: what that has read would come first again.
        stream=StreamConfig(sequences_per_step=4, sequences_per_batch=4, seed=1),
        loop=LoopConfig(
            num_steps=num_steps,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            schedule=ScheduleConfig(decay_share=0.3),
        ),
        drawing=DrawingConfig(
            stage="continual",
            repeat_share=0.1,
            pick_share=0.1,
            distractor_share=0.25,
            dropout_share=0.05,
            echo_share=0.25,
            unread_share=0.1,
            plain_share=0.05,
        ),
    )


STAGES = {"warmup": make_warmup_config, "continual": make_continual_config}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        summary: of the loop.
        folder: the run's folder.
        model: the folder of the trained checkpoint.
    """

    summary: TrainingSummary
    folder: str
    model: str

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {**dataclasses.asdict(self.summary), "folder": self.folder, "model": self.model}


@contextmanager
def show_steps(name: str, num_steps: int, step_tokens: int, first_step: int) -> Iterator[Callable[[StepReport], None]]:
    """Shows the progress of a loop; yields what the loop is to report to.

    Args:
        name: the stage.
        num_steps: steps of the run.
        step_tokens: tokens of a step, which progress is shown in; 0 to show it in steps.
        first_step: steps that were done before, which do not count as speed.
    """
    done = first_step * (step_tokens or 1)

    def report(told: StepReport) -> None:
        nonlocal done
        done = told.step * (step_tokens or 1)

    with show_stage(name, num_steps * (step_tokens or 1), "tokens" if step_tokens else "steps", lambda: done):
        yield report


def train_stage(
    model: str, data: Path, out: Path, config: TrainingConfig, *, tokenizer: str | None = None
) -> TrainingResult:
    """Trains one stage to its end, or until it is stopped; the same call goes on where it was.

    Args:
        model: one of ``PRESET_NAMES`` to start from random weights, else a checkpoint's name or folder.
        data: folder of the prepared sequences.
        out: the run's folder.
        config: settings.
        tokenizer: folder of the tokenizer of a model that starts from random weights; by default the shipped one.

    Raises:
        InputError: the data were made with another tokenizer, or the folder holds another run.
    """
    tokenizer_folder = (tokenizer or SHIPPED_MODEL) if model in PRESET_NAMES else model
    checkpoint = start_model(model, tokenizer=tokenizer_folder, seed=config.loop.seed)
    dataset = SequenceDataset.open(data)
    if dataset.manifest.tokenizer_id != checkpoint.tokenizer.tokenizer_id:
        raise InputError(
            f"{data} was prepared with another tokenizer than that of {tokenizer_folder}; prepare it anew: "
            f"memory3 train prepare --model {tokenizer_folder}"
        )
    check_length(checkpoint, dataset.manifest.sequence_tokens)
    if config.copying_heads:
        if model not in PRESET_NAMES:
            raise InputError(f"copying_heads is for random weights, but {model} is a checkpoint; leave it out")
        plant_copying(checkpoint, seed=config.loop.seed)
    if config.memory_layers:
        from model.memory_layers import choose_memory_layers

        checkpoint = choose_memory_layers(checkpoint, config.memory_layers)
    adapter = None
    if config.adapter_rank:
        from model.training.adapting import AdapterConfig, add_adapter

        adapter = add_adapter(checkpoint, AdapterConfig(rank=config.adapter_rank, alpha=2.0 * config.adapter_rank))
    source = SequenceSource(dataset, config.drawing, config.stream)
    selection = find_selection(checkpoint.config, num_slots=config.num_slots, score=config.score, refit=config.refit)
    config = dataclasses.replace(config, **dataclasses.asdict(selection))
    objective = LanguageObjective(checkpoint, selection)
    summary = run_loop(
        config.drawing.stage,
        objective,
        source,
        config.loop,
        out,
        dataclasses.asdict(config),
        step_tokens=config.stream.sequences_per_step * dataset.manifest.sequence_tokens,
    )
    if is_first_process():
        if adapter is not None:
            from model.training.adapting import merge_adapter

            merge_adapter(adapter)
        if config.drawing.stage == "continual":
            record_selection(checkpoint.config, selection)
        save_model(checkpoint, out / MODEL_FOLDER, tokenizer=tokenizer_folder, dtype=config.saved_dtype)
    return TrainingResult(summary=summary, folder=str(out), model=str(out / MODEL_FOLDER))


def run_loop(
    name: str,
    objective: nn.Module,
    source: BatchSource,
    loop: LoopConfig,
    out: Path,
    settings: dict[str, Any],
    *,
    step_tokens: int = 0,
) -> TrainingSummary:
    """Runs the loop with progress, see :func:`show_steps`, and keeps the settings beside the checkpoints."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the run")
    first_step = 0
    with explain_write_errors(out), lock_bank(LocalStore(out)) if is_first_process() else nullcontext():
        checkpoints = list_checkpoints(out)
        if checkpoints:
            first_step = read_state(checkpoints[-1])["step"]
        elif is_first_process():
            write_bytes_atomically(out / SETTINGS_FILE, json.dumps(settings, indent=1, default=str).encode())
        with show_steps(name, loop.num_steps, step_tokens, first_step) as report:
            return run_training(
                objective,
                source,
                loop,
                out,
                identity={key: value for key, value in settings.items() if key not in FREE_SETTINGS},
                report=report,
                should_stop=is_stopping,
            )


def is_first_process() -> bool:
    """Tells whether this is the process that writes: the first of several that train together, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0
