"""Direct preference optimisation: the loss against a plain one, what the start said, and that training prefers."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.training.batches import IGNORED, TrainingBatch
from model.training.chat import ChatTemplate
from model.training.conversations import DrawConfig
from model.training.exchanges import ReadExchange
from model.training.objective import LanguageObjective
from model.training.preferences import (
    PreferenceBatch,
    PreferenceObjective,
    PreferenceSource,
    measure_start,
    read_pairs,
    sum_log_probs,
    sum_preference_losses,
)
from schemas.errors import InputError
from schemas.protocols import IntArray
from tests.chats import make_chat_checkpoint

ROWS = [
    {"prompt": "Who wrote it?", "chosen": "Ada Lovelace", "rejected": "Alan"},
    {"prompt": "When?", "chosen": "12-Mar", "rejected": "In the year of the great flood"},
    {"messages": [{"role": "user", "content": "Why is that so?"}], "chosen": "so", "rejected": "who knows"},
]


@pytest.fixture
def parts() -> tuple[Checkpoint, ChatTemplate]:
    return make_chat_checkpoint()


def make_source(chat: ChatTemplate, folder: Path, config: DrawConfig | None = None) -> PreferenceSource:
    """The rows above, each of which reads two references."""
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    read = read_pairs(path, chat, sequence_tokens=100)
    assert not read.rejected
    references: dict[str, IntArray] = {
        name: np.array(chat.encode_answer(name * 5)[:-1], np.int32)
        for name in ("the lambda", "with", "a b c", "assert")
    }
    names = list(references)
    pairs = []
    for place, (chosen, rejected) in enumerate(read.pairs):
        assert chosen.prompt_ids.tolist() == rejected.prompt_ids.tolist()
        read_by_both = ((names[place], names[place + 1]),)
        pairs.append(
            (ReadExchange(exchange=chosen, ref_ids=read_by_both), ReadExchange(exchange=rejected, ref_ids=read_by_both))
        )
    return PreferenceSource(pairs, references, config or DrawConfig(batch_size=3, micro_batch_size=2, shuffled=False))


def sum_plainly(checkpoint: Checkpoint, batch: TrainingBatch) -> list[float]:
    """The log-probability of each answer in float64, token by token."""
    with torch.no_grad():
        logits = checkpoint.head(LanguageObjective(checkpoint).read(batch)).double()
    sums = []
    for logits_TV, targets in zip(logits.tolist(), batch.targets_BT.tolist(), strict=True):
        total = 0.0
        for row, target in zip(logits_TV, targets, strict=True):
            if target != IGNORED:
                largest = max(row)
                total += row[target] - largest - math.log(math.fsum(math.exp(value - largest) for value in row))
        sums.append(total)
    return sums


def test_losses_equal_a_plain_implementation(parts: tuple[Checkpoint, ChatTemplate], tmp_path: Path) -> None:
    checkpoint, chat = parts
    objective = PreferenceObjective(LanguageObjective(checkpoint), beta=0.3)
    source = make_source(chat, tmp_path)
    measure_start(source, objective, tmp_path / "start.safetensors")
    batches = source.draw(0, 0, 1)
    assert [batch.num_targets for batch in batches] == [2, 1]
    starts = [sum_plainly(checkpoint, batch) for batch in batches]
    with torch.no_grad():  # so that the model is no longer what it was
        for parameter in checkpoint.model.parameters():
            parameter.mul_(1.02)
    for batch, start in zip(batches, starts, strict=True):
        assert isinstance(batch, PreferenceBatch)
        np.testing.assert_allclose(batch.start_log_probs_B.numpy(), start, rtol=1e-5)
        now, expected = sum_plainly(checkpoint, batch), 0.0
        for row in range(0, len(now), 2):
            margin = 0.3 * ((now[row] - start[row]) - (now[row + 1] - start[row + 1]))
            expected += math.log1p(math.exp(-margin))
        with torch.no_grad():
            assert objective(batch).item() == pytest.approx(expected, rel=1e-4)


def test_at_the_start_every_pair_loses_one_bit(parts: tuple[Checkpoint, ChatTemplate], tmp_path: Path) -> None:
    checkpoint, chat = parts
    objective, source = PreferenceObjective(LanguageObjective(checkpoint)), make_source(chat, tmp_path)
    measure_start(source, objective, tmp_path / "start.safetensors", batch_size=2)
    with torch.no_grad():
        for batch in source.draw(0, 0, 1):
            assert objective(batch).item() == pytest.approx(batch.num_targets * math.log(2), rel=1e-5)


@given(st.lists(st.floats(-50, 0), min_size=8, max_size=8), st.floats(0.01, 1.0))
def test_the_loss_falls_with_the_margin_and_has_its_gradient(values: list[float], beta: float) -> None:
    log_probs = torch.tensor(values[:4], dtype=torch.float64, requires_grad=True)
    start = torch.tensor(values[4:], dtype=torch.float64)
    loss = sum_preference_losses(log_probs, start, beta)
    loss.backward()
    expected, gradient = 0.0, []
    for chosen in (0, 2):
        margin = (values[chosen] - values[4 + chosen]) - (values[chosen + 1] - values[5 + chosen])
        expected += math.log1p(math.exp(-beta * margin))
        pull = beta / (1 + math.exp(beta * margin))
        gradient += [-pull, pull]
    assert loss.item() == pytest.approx(expected)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx(gradient)


def test_log_probs_of_answers_ignore_everything_else() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 5, 4), torch.nn.Linear(4, 7)
    targets = torch.tensor([[IGNORED, 3, 6, IGNORED, 0], [IGNORED] * 5, [1, 1, 1, 1, 1]])
    expected = torch.zeros(3)
    for row in range(3):
        for place in range(5):
            if targets[row, place] != IGNORED:
                expected[row] += head(hidden[row, place]).log_softmax(-1)[targets[row, place]]
    torch.testing.assert_close(sum_log_probs(hidden, targets, head), expected)


def test_what_the_start_said_is_measured_once(parts: tuple[Checkpoint, ChatTemplate], tmp_path: Path) -> None:
    checkpoint, chat = parts
    objective, file = PreferenceObjective(LanguageObjective(checkpoint)), tmp_path / "run" / "start.safetensors"
    first, again = make_source(chat, tmp_path), make_source(chat, tmp_path)
    with pytest.raises(RuntimeError, match="measure_start"):
        first.draw(0, 0, 1)
    measure_start(first, objective, file, batch_size=2)
    content = file.read_bytes()
    measure_start(again, objective, file, batch_size=3)
    assert first.start_log_probs_P2 is not None
    assert again.start_log_probs_P2 is not None
    assert torch.equal(first.start_log_probs_P2, again.start_log_probs_P2)
    assert first.source_id == again.source_id
    assert file.read_bytes() == content

    other = PreferenceSource(again._pairs[:2], again._references, DrawConfig())
    with pytest.raises(InputError, match="of other pairs"):
        measure_start(other, objective, file)
    with torch.no_grad():
        checkpoint.head.weight.mul_(0.5)  # type: ignore[operator]
    with pytest.raises(InputError, match="another model"):
        measure_start(again, objective, file)
    file.write_bytes(content[:-8])
    with pytest.raises(InputError, match="cannot be read"):
        measure_start(again, objective, file)


def test_training_prefers_what_was_chosen(parts: tuple[Checkpoint, ChatTemplate], tmp_path: Path) -> None:
    from model.training.loop import LoopConfig, run_training
    from model.training.optimizing import OptimizerConfig

    checkpoint, chat = parts
    source = make_source(chat, tmp_path)
    objective = PreferenceObjective(LanguageObjective(checkpoint), beta=0.5)
    measure_start(source, objective, tmp_path / "run" / "start.safetensors")
    checkpoint.model.requires_grad_(True)
    config = LoopConfig(num_steps=8, optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0))
    summary = run_training(objective, source, config, tmp_path / "run")
    assert summary.is_finished
    for batch in source.draw(0, 0, 1):
        assert isinstance(batch, PreferenceBatch)
        with torch.no_grad():
            log_probs = sum_log_probs(objective.reader.read(batch), batch.targets_BT, checkpoint.head)
        gained = log_probs - batch.start_log_probs_B
        assert (gained[::2] - gained[1::2] > 1.0).all()


def test_rows_are_kept_or_rejected_with_their_reason(parts: tuple[Checkpoint, ChatTemplate], tmp_path: Path) -> None:
    rows = {
        "no messages": {"chosen": "a", "rejected": "b"},
        "no question": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "empty or no text": {"prompt": "a", "chosen": "b"},
        "are the same": {"prompt": "a", "chosen": "b", "rejected": " b"},
        "spells the special token": {"prompt": "a", "chosen": "b", "rejected": "<|end|>"},
        "longer than 12 tokens": {"prompt": "a", "chosen": "b", "rejected": "c " * 20},
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows.values(), {"prompt": "a", "chosen": "b", "rejected": "c"}])))
    read = read_pairs(path, parts[1], sequence_tokens=12)
    assert len(read.pairs) == 1
    assert [row.line for row in read.rejected] == list(range(1, len(rows) + 1))
    for row, reason in zip(read.rejected, rows, strict=True):
        assert reason in row.reason


def test_a_batch_keeps_its_kind_when_it_moves(parts: tuple[Checkpoint, ChatTemplate], tmp_path: Path) -> None:
    source = make_source(parts[1], tmp_path)
    measure_start(source, PreferenceObjective(LanguageObjective(parts[0])), tmp_path / "start.safetensors")
    (batch, _) = source.draw(0, 0, 1)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, PreferenceBatch)
    assert moved.start_log_probs_B.is_meta
    assert moved.tokens_BT.is_meta
    assert moved.num_targets == batch.num_targets == 2
    assert {field.name for field in dataclasses.fields(moved)} > {
        field.name for field in dataclasses.fields(TrainingBatch)
    }


def test_beta_must_be_positive(parts: tuple[Checkpoint, ChatTemplate]) -> None:
    with pytest.raises(InputError, match="beta"):
        PreferenceObjective(LanguageObjective(parts[0]), beta=0.0)
