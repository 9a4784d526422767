"""The training loop: batches from a source, an objective's gradient, AdamW, checkpoints, metrics.

The same loop trains all stages, in one process or in several: accelerate gives each a copy of the model (DDP), or the
model is sharded over them (FSDP, :mod:`model.training.sharding`). What a step computes does not depend on it but for
rounding. A step is a function of its number and of the weights before it:
a run that was stopped goes on from its last checkpoint as if nothing had happened, with the same weights to the last
bit on the same machine.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from model.training.batches import BatchSource
from model.training.guarding import GuardConfig, SpikeGuard
from model.training.metrics import MetricsWriter, plot_run
from model.training.optimizing import OptimizerConfig, make_optimizer
from model.training.saving import (
    describe_weights,
    list_checkpoints,
    load_states,
    load_weights,
    read_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from model.training.schedule import ScheduleConfig
from model.training.sharding import gather_parameters, shard_objective
from schemas.errors import BankError, InputError

PRECISIONS = ("auto", "float32", "bfloat16")

FREE_FIELDS = ("save_every", "num_kept", "log_every", "sharded")
"""Settings that a run may change when it goes on: like the number of processes, they change no weight but by rounding.
"""


class TrainingLostError(BankError):
    """The loss leapt up again and again, or was no number: going on would be of no use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of a run.

    Attributes:
        num_steps: optimizer steps that the schedule spans.
        optimizer: AdamW.
        schedule: the learning rate over the steps.
        guard: what to do about loss spikes.
        max_grad_norm: gradients are scaled down to this norm.
        precision: ``bfloat16`` computes products in bfloat16, states stay in float32; ``auto`` does so on a GPU.
        sharded: True shards parameters, gradients and states over the processes (FSDP), where there are several.
        seed: seed of what the model draws itself (dropout).
        save_every: steps from one checkpoint to the next.
        num_kept: checkpoints kept.
        log_every: steps from one line of metrics to the next.
    """

    num_steps: int
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    max_grad_norm: float = 1.0
    precision: str = "auto"
    sharded: bool = False
    seed: int = 0
    save_every: int = 200
    num_kept: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number below 1, or an unknown precision.
        """
        for name in ("num_steps", "save_every", "num_kept", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"training: {name} is {getattr(self, name)}, must be at least 1")
        if not self.max_grad_norm > 0:
            raise InputError(f"training: max_grad_norm is {self.max_grad_norm}, must be greater than 0")
        if self.precision not in PRECISIONS:
            raise InputError(f"training: precision is {self.precision!r}, must be one of {', '.join(PRECISIONS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step, for whoever watches.

    Attributes:
        step: steps done.
        num_steps: steps of the run.
        loss: mean over the targets, in nats.
        learning_rate: the rate of the step.
        grad_norm: norm of the gradient before it was scaled down.
        num_tokens: tokens read since the beginning of the run, by all processes.
        tokens_per_second: tokens read a second since this process began.
        skipped: True if the guard let the step change nothing.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    skipped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What a run came to.

    Attributes:
        step: steps done in all.
        is_finished: False if it was stopped before its end.
        resumed_at: steps that earlier parts of the run had done.
        loss: mean loss of the last steps, see :class:`SpikeGuard`.
        num_tokens: tokens read in all.
        num_skipped: steps that the guard let change nothing.
    """

    step: int
    is_finished: bool
    resumed_at: int
    loss: float
    num_tokens: int
    num_skipped: int


def _describe(
    config: LoopConfig, source: BatchSource, objective: nn.Module, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what a run must have in common with the one it goes on with."""
    settings = dataclasses.asdict(config)
    mine = {name: settings[name] for name in settings if name not in FREE_FIELDS}
    return {"source": source.source_id, "start": describe_weights(objective), **identity, **mine}


def _check_same_run(checkpoint: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    different = [
        f"{name} was {saved.get(name)!r}, is {mine.get(name)!r}"
        for name in sorted((saved.keys() | mine.keys()) - set(FREE_FIELDS))
        if saved.get(name) != mine.get(name)
    ]
    if different:
        raise InputError(
            f"{checkpoint} is of a run with other settings: {'; '.join(different[:3])}; go on with the same ones, or "
            "name another folder"
        )


def make_accelerator(config: LoopConfig, *, on_cpu: bool = False) -> Any:
    """Returns accelerate's view of the processes and devices; the environment says how many (torchrun, accelerate)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    has_gpu = torch.cuda.is_available() and not on_cpu
    in_half = config.precision == "bfloat16" or (config.precision == "auto" and has_gpu)
    # accelerate keeps the precision of the first run of a process and refuses another; the processes stay as they are.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="bf16" if in_half else "no", cpu=on_cpu or not has_gpu)


def _prepare(accelerator: Any, objective: nn.Module, config: LoopConfig, *, is_sharded: bool) -> tuple[nn.Module, Any]:
    """Puts an objective on its device and its processes; returns what to call, and the optimizer."""
    if is_sharded:
        in_half = accelerator.mixed_precision == "bf16"
        shard_objective(objective, accelerator.device.type, accelerator.num_processes, in_half=in_half)
        return objective, make_optimizer(objective, config.optimizer)
    wrapped, prepared = accelerator.prepare(objective, make_optimizer(objective, config.optimizer))
    return wrapped, prepared


def _resume(
    folder: Path, described: dict[str, Any], objective: nn.Module, optimizer: torch.optim.Optimizer, guard: SpikeGuard
) -> tuple[int, int]:
    """Takes over the last checkpoint of a folder, if it has one; returns the steps done and the tokens read."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return 0, 0
    state = read_state(checkpoints[-1])
    _check_same_run(checkpoints[-1], state["run"], described)
    load_weights(checkpoints[-1], objective)
    load_states(checkpoints[-1], objective, optimizer)
    guard.restore(state["guard"])
    return state["step"], state["num_tokens"]


def run_training(
    objective: nn.Module,
    source: BatchSource,
    config: LoopConfig,
    folder: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    report: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingSummary:
    """Trains to the end of the schedule, from the last checkpoint of the folder if it has one.

    Args:
        objective: ``forward(batch)`` returns the loss summed over the targets of the batch; parameters in float32. Once
            it was sharded, it is whole again in the first process, to be saved, and is not to be run in any.
        source: the batches.
        config: settings of the run.
        folder: where checkpoints and metrics go.
        identity: what else determines the weights, as JSON: a run is gone on with only if all of it is the same, and
            the model it started from.
        report: is told of every step, in the first process.
        should_stop: asked after every step; True saves a checkpoint and returns.

    Raises:
        InputError: the folder holds a run with other settings, or the device cannot be used.
        TrainingLostError: too many spikes in a row; the last checkpoint is from before them.
    """
    described = _describe(config, source, objective, identity or {})
    accelerator = make_accelerator(config)
    objective.train()
    is_sharded = config.sharded and accelerator.num_processes > 1
    wrapped, prepared = _prepare(accelerator, objective, config, is_sharded=is_sharded)
    inner, raw_optimizer = accelerator.unwrap_model(wrapped), getattr(prepared, "optimizer", prepared)
    guard = SpikeGuard(config.guard)
    step, num_tokens = _resume(folder, described, inner, raw_optimizer, guard)
    resumed_at, num_before = step, num_tokens

    def save() -> None:
        state = {"run": described, "guard": guard.to_json(), "num_tokens": num_tokens}
        save_checkpoint(folder, step, inner, raw_optimizer, state, writes=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            remove_old_checkpoints(folder, config.num_kept)

    metrics = MetricsWriter(folder, step) if accelerator.is_main_process else None
    saved_at = step
    started = time.monotonic()
    try:
        while step < config.num_steps:
            rate = config.optimizer.learning_rate * config.schedule.get_factor(step, config.num_steps)
            for group in prepared.param_groups:
                group["lr"] = rate
            torch.manual_seed(hash((config.seed, step, accelerator.process_index)))
            loss, grad_norm, num_read = _take_gradient(accelerator, wrapped, source, step, config)
            accepted = guard.accept(loss if math.isfinite(grad_norm) else math.nan)
            if accepted:
                prepared.step()
            prepared.zero_grad(set_to_none=True)
            step += 1
            num_tokens += num_read
            told = StepReport(
                step=step,
                num_steps=config.num_steps,
                loss=loss,
                learning_rate=rate,
                grad_norm=grad_norm,
                num_tokens=num_tokens,
                tokens_per_second=(num_tokens - num_before) / max(1e-9, time.monotonic() - started),
                skipped=not accepted,
            )
            if metrics is not None and (step % config.log_every == 0 or step == config.num_steps or not accepted):
                metrics.write(step, _make_row(told))
            if report is not None and accelerator.is_main_process:
                report(told)
            if guard.is_lost:
                raise TrainingLostError(
                    f"the loss was {loss:.4g} at step {step}, which made {guard.num_in_row} spikes in a row; start "
                    f"again in another folder, with a lower learning rate; checkpoints in {folder} are from before them"
                )
            stops = _agree(accelerator, should_stop is not None and should_stop())
            # While spikes last, only a stop or the end is worth a checkpoint: the one before them is to be kept.
            if stops or (step % config.save_every == 0 and accepted) or step == config.num_steps:
                save()
                saved_at = step
            if stops:
                break
        if saved_at != step:
            save()
    finally:
        if metrics is not None:
            metrics.close()
    if metrics is not None:
        plot_run(folder)
    if is_sharded:
        gather_parameters(objective, keeps=accelerator.is_main_process)
    return TrainingSummary(
        step=step,
        is_finished=step == config.num_steps,
        resumed_at=resumed_at,
        loss=guard.mean,
        num_tokens=num_tokens,
        num_skipped=guard.num_skipped,
    )


def _take_gradient(
    accelerator: Any, objective: nn.Module, source: BatchSource, step: int, config: LoopConfig
) -> tuple[float, float, int]:
    """Runs forward and backward of one step; returns its mean loss, the norm of its gradient and the tokens read.

    The loss is the mean over the targets of all processes and micro-batches, however they are spread.
    """
    num_ranks = accelerator.num_processes
    batches = source.draw(step, accelerator.process_index, num_ranks)
    counts = torch.tensor(
        [sum(batch.num_targets for batch in batches), sum(batch.num_tokens for batch in batches)],
        dtype=torch.float64,
        device=accelerator.device,
    )
    num_targets, num_tokens = accelerator.reduce(counts, "sum").tolist()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(batches):
        # Sharded gradients are summed after every batch all the same: waiting would keep them whole in every process.
        waits = number + 1 < len(batches)
        with accelerator.no_sync(objective) if waits else contextlib.nullcontext(), accelerator.autocast():
            loss = objective(batch.to(accelerator.device))
            # Processes average their gradients; the mean over all targets is their sum over the count.
            accelerator.backward(loss * (num_ranks / max(1.0, num_targets)))
        total += loss.detach()
    trained = [parameter for parameter in objective.parameters() if parameter.grad is not None]
    norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    mean = accelerator.reduce(total, "sum").item() / max(1.0, num_targets)
    return mean, float(norm), int(num_tokens)


def _agree(accelerator: Any, wish: bool) -> bool:
    """Tells whether any process wishes something: all must stop after the same step."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.reduce(torch.tensor(float(wish), device=accelerator.device), "sum").item() > 0)


def _make_row(told: StepReport) -> dict[str, float | None]:
    return {
        "loss": round(told.loss, 5) if math.isfinite(told.loss) else None,
        "tokens": told.num_tokens,
        "learning_rate": told.learning_rate,
        "grad_norm": round(told.grad_norm, 4) if math.isfinite(told.grad_norm) else None,
        "tokens_per_second": round(told.tokens_per_second, 1),
        "skipped": int(told.skipped),
    }
