"""Several processes that train together, for tests of the loop: ``launch_ranks`` starts them, each runs ``main``."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.distributed.tensor import DTensor

from model.checkpoint import Checkpoint
from model.training.adapting import AdapterConfig, add_adapter, merge_adapter
from model.training.batches import TrainingBatch
from model.training.loop import LoopConfig, StepReport, run_training
from model.training.objective import LanguageObjective
from tests.test_training_loop import ROOT, RepeatingSource, make_config, make_model

ADAPTER = AdapterConfig(rank=2)


class UnevenSource(RepeatingSource):
    """Of four sequences the first has no reference in every third step: nothing is written in the first process."""

    source_id = "uneven"

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        batches = super().draw(step, rank, num_ranks)
        if rank == 0 and step % 3 == 1:
            index = batches[0].index_BCM
            batches[0] = dataclasses.replace(batches[0], references=(), index_BCM=index.new_full(index.shape, -1))
        return batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
        folder: its folder.
        config: its settings, those of ``make_config`` changed.
        stop_after: the step after which it is stopped.
        with_adapter: train an adapter and merge it.
    """

    folder: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    stop_after: int | None = None
    with_adapter: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to, as the first process has it.

    Attributes:
        losses: of all steps.
        resumed_at: see ``TrainingSummary``.
        norm: of the weights at the end.
        part: the part of the weights that the first process held between steps.
        layers_part: the part of the weights of all layers that it held as writing or reading began.
        processes: number of processes.
    """

    losses: list[float]
    resumed_at: int
    norm: float
    part: float
    layers_part: float
    processes: int


def run_job(job: Job) -> Outcome:
    """Runs a job in this process, one of several or the only one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # the job before may have been of another precision
    checkpoint = make_model()
    adapter = add_adapter(checkpoint, ADAPTER) if job.with_adapter else None
    objective = LanguageObjective(checkpoint)
    config: LoopConfig = make_config(**job.config)
    reports: list[StepReport] = []
    parts: list[float] = []
    layers_parts: list[float] = []
    layers = checkpoint.decoder.get_submodule("layers")
    checkpoint.decoder.get_submodule("embed_tokens").register_forward_pre_hook(
        lambda *_: layers_parts.append(measure_part(layers))
    )

    def look() -> bool:
        parts.append(measure_part(objective))
        return bool(reports) and reports[-1].step == job.stop_after

    summary = run_training(objective, UnevenSource(), config, Path(job.folder), report=reports.append, should_stop=look)
    if adapter is not None and is_first():
        merge_adapter(adapter)
    return Outcome(
        losses=[told.loss for told in reports],
        resumed_at=summary.resumed_at,
        norm=measure_norm(checkpoint) if is_first() else 0.0,
        part=max(parts, default=0.0),
        layers_part=max(layers_parts, default=0.0),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def measure_norm(checkpoint: Checkpoint) -> float:
    squares = [float(tensor.detach().double().square().sum()) for tensor in checkpoint.model.parameters()]
    return float(np.sqrt(sum(squares)))


def measure_part(module: nn.Module) -> float:
    """Returns the part of the weights of a module that this process holds."""
    parameters = list(module.parameters())
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters]
    return sum(tensor.numel() for tensor in local) / sum(tensor.numel() for tensor in parameters)


def launch_ranks(jobs: list[Job], num_ranks: int, folder: Path) -> list[Outcome]:
    """Runs jobs one after the other in new processes, joined by gloo."""
    file = folder / f"jobs-{num_ranks}.json"
    file.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["--master-port", str(port), "-m", "tests.train_ranks", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Outcome(**values) for values in json.loads(file.with_suffix(".out").read_text())]


def main() -> None:
    """Runs the jobs of a file; the first process writes what they came to."""
    file = Path(sys.argv[1])
    outcomes = [dataclasses.asdict(run_job(Job(**values))) for values in json.loads(file.read_text())]
    if is_first():
        file.with_suffix(".out").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
