"""The training loop: exact resume, checkpoints that are whole, several processes, spikes, metrics."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint
from model.training.batches import IGNORED, TrainingBatch, index_memories, make_plain_batch
from model.training.guarding import GuardConfig
from model.training.loop import LoopConfig, StepReport, TrainingLostError, TrainingSummary, run_training
from model.training.metrics import PICTURE, read_metrics
from model.training.objective import LanguageObjective
from model.training.optimizing import OptimizerConfig
from model.training.saving import OPTIMIZER, STATE, WEIGHTS, list_checkpoints
from schemas.errors import InputError
from tests.models import make_checkpoint

ROOT = Path(__file__).parents[1]
NUM_SEQUENCES, NUM_TOKENS = 4, 128


class RepeatingSource:
    """Random sequences whose second half is mostly their first, with a reference each; targets of unequal number."""

    source_id = "repeating"

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        self._bad_steps = bad_steps

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        random = np.random.default_rng(step)
        tokens = random.integers(3, 60, (NUM_SEQUENCES, NUM_TOKENS + 1))
        tokens[:, 70:] = tokens[:, : NUM_TOKENS + 1 - 70]
        if step in self._bad_steps:
            tokens = random.integers(400, 512, tokens.shape)
        references = [random.integers(3, 60, 20).astype(np.int32) for _ in range(NUM_SEQUENCES)]
        share = NUM_SEQUENCES // num_ranks
        batches = []
        for row in range(rank * share, (rank + 1) * share):
            batch = make_plain_batch(tokens[row : row + 1])
            targets = batch.targets_BT.clone()
            targets[:, : 10 * row] = IGNORED
            batches.append(
                dataclasses.replace(
                    batch,
                    targets_BT=targets,
                    references=references[row : row + 1],
                    index_BCM=index_memories(torch.tensor([[0, -1]]), 2),
                    chunk_of_token_BT=(torch.arange(NUM_TOKENS) // 64)[None],
                    with_prefix=True,
                )
            )
        return batches


def make_model() -> Checkpoint:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=True)
    checkpoint.model.requires_grad_(True)
    return checkpoint


def make_config(**changes: object) -> LoopConfig:
    return LoopConfig(num_steps=12, **{"save_every": 5, "log_every": 1, **changes})  # type: ignore[arg-type]


def train(
    folder: Path, checkpoint: Checkpoint, stop_after: int | None = None, config: LoopConfig | None = None
) -> tuple[TrainingSummary, list[StepReport]]:
    reports: list[StepReport] = []
    summary = run_training(
        LanguageObjective(checkpoint),
        RepeatingSource(),
        config or make_config(),
        folder,
        report=reports.append,
        should_stop=lambda: stop_after is not None and reports[-1].step >= stop_after,
    )
    return summary, reports


def list_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in checkpoint.model.named_parameters()}


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = make_model()
    summary, reports = train(tmp_path / "whole", whole)
    assert summary.is_finished
    assert summary.resumed_at == 0
    assert reports[-1].loss < reports[0].loss

    first = make_model()
    stopped, _ = train(tmp_path / "parts", first, stop_after=7)
    assert (stopped.step, stopped.is_finished) == (7, False)
    second = make_model()
    resumed, later = train(tmp_path / "parts", second)
    assert resumed.resumed_at == 7
    assert [told.loss for told in later] == [told.loss for told in reports[7:]]
    assert list_bytes(second) == list_bytes(whole)
    assert dataclasses.replace(resumed, resumed_at=0) == summary
    lines = [[{**row, "tokens_per_second": 0} for row in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert [row["step"] for row in lines[0]] == list(range(1, 13))
    assert (tmp_path / "whole" / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_crash_goes_back_to_the_last_checkpoint_and_comes_to_the_same(tmp_path: Path) -> None:
    """A run that is killed between checkpoints has done some steps for nothing, and what it half wrote is not read."""
    whole = make_model()
    train(tmp_path / "whole", whole)

    class CrashingSource(RepeatingSource):
        def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
            if step == 8:
                raise KeyboardInterrupt
            return super().draw(step, rank, num_ranks)

    with pytest.raises(KeyboardInterrupt):
        run_training(LanguageObjective(make_model()), CrashingSource(), make_config(), tmp_path / "parts")
    half = tmp_path / "parts" / "step-00000099.0123.tmp"
    half.mkdir()
    (half / STATE).write_text("{}")
    second = make_model()
    resumed, _ = train(tmp_path / "parts", second)
    assert resumed.resumed_at == 5
    assert list_bytes(second) == list_bytes(whole)
    assert not half.exists()


def test_only_the_last_checkpoints_are_kept_and_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    train(tmp_path, make_model())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000012"]
    assert {path.name for path in list_checkpoints(tmp_path)[-1].iterdir()} == {WEIGHTS, OPTIMIZER, STATE}
    again, reports = train(tmp_path, make_model())
    assert again.is_finished
    assert again.resumed_at == 12
    assert reports == []


def test_a_run_with_other_settings_or_of_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, make_model(), stop_after=2)
    other_rate = make_config(optimizer=OptimizerConfig(learning_rate=0.5))
    with pytest.raises(InputError, match=r"optimizer was"):
        train(tmp_path, make_model(), config=other_rate)
    wider = make_checkpoint("llama", intermediate_size=128)
    wider.model.requires_grad_(True)
    with pytest.raises(InputError, match=r"start was"):
        train(tmp_path, wider)
    faster_saving = make_config(save_every=3)
    summary, _ = train(tmp_path, make_model(), config=faster_saving)
    assert summary.is_finished


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_damaged_checkpoints_are_told_of_in_one_line(tmp_path: Path, name: str) -> None:
    train(tmp_path, make_model(), stop_after=3)
    (list_checkpoints(tmp_path)[-1] / name).write_bytes(b"{")
    with pytest.raises(InputError, match=r"remove"):
        train(tmp_path, make_model())


def test_spikes_change_no_weight_and_too_many_of_them_end_the_run(tmp_path: Path) -> None:
    config = make_config(
        guard=GuardConfig(num_deviations=2.5, num_first=6, max_in_row=3), optimizer=OptimizerConfig(learning_rate=4e-3)
    )
    reports: list[StepReport] = []
    bad = RepeatingSource(bad_steps=(8,))
    run_training(LanguageObjective(make_model()), bad, config, tmp_path / "one", report=reports.append)
    assert [told.step for told in reports if told.skipped] == [9]
    assert reports[8].loss > 1.3 * reports[7].loss
    assert read_metrics(tmp_path / "one")[8]["skipped"] == 1
    with pytest.raises(TrainingLostError, match=r"3 spikes in a row"):
        run_training(LanguageObjective(make_model()), RepeatingSource(bad_steps=(8, 9, 10)), config, tmp_path / "three")
    assert [path.name for path in list_checkpoints(tmp_path / "three")] == ["step-00000005"]


class LeapingObjective(LanguageObjective):
    """Has a finite loss and an infinite gradient at one step."""

    num_forward = 0

    def forward(self, batch: TrainingBatch) -> torch.Tensor:
        loss = super().forward(batch)
        self.num_forward += 1
        if self.num_forward == 3 * NUM_SEQUENCES:
            weight = self.checkpoint.head.weight.flatten()[0]
            loss = loss + (weight - weight.detach()).clamp(min=0).sqrt()
        return loss


def test_an_infinite_gradient_changes_no_weight(tmp_path: Path) -> None:
    checkpoint = make_model()
    reports: list[StepReport] = []
    summary = run_training(
        LeapingObjective(checkpoint), RepeatingSource(), make_config(), tmp_path, report=reports.append
    )
    assert [told.step for told in reports if told.skipped] == [3]
    assert np.isfinite(reports[2].loss)
    assert not np.isfinite(reports[2].grad_norm)
    assert summary.num_skipped == 1
    assert all(bool(parameter.isfinite().all()) for parameter in checkpoint.model.parameters())
    assert read_metrics(tmp_path)[2]["grad_norm"] is None
    assert (tmp_path / PICTURE).is_file()


def test_a_run_goes_on_only_with_what_determined_it(tmp_path: Path) -> None:
    def train_with(beta: float) -> TrainingSummary:
        objective = LanguageObjective(make_model())
        return run_training(objective, RepeatingSource(), make_config(), tmp_path, identity={"beta": beta})

    train_with(0.1)
    assert train_with(0.1).resumed_at == 12
    with pytest.raises(InputError, match=r"beta was 0.1, is 0.9"):
        train_with(0.9)


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """Real processes, gloo: the same global batch, dealt out, with targets of unequal number."""
    from tests.train_ranks import Job, launch_ranks

    (one,), (two,) = (launch_ranks([Job(folder=str(tmp_path / f"{n}"))], n, tmp_path) for n in (1, 2))
    assert (one.processes, two.processes) == (1, 2)
    assert two.part == 1.0
    assert len(one.losses) == 12
    np.testing.assert_allclose(two.losses, one.losses, atol=1e-4, rtol=0)
    np.testing.assert_allclose(two.norm, one.norm, rtol=1e-4)
