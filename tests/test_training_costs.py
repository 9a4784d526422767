"""The cost of training: counted products of real steps, hand-made sums, and the paper's ratio."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flows.planning import plan_training, read_config
from model.locating import PRESET_NAMES
from model.memory_layers import choose_memory_layers
from model.planning import ModelShape, PlanRow, count_parameters, paper_shape, shape_from_config
from model.presets import PRESETS
from model.training.batches import TrainingBatch, index_memories, make_plain_batch
from model.training.objective import LanguageObjective
from model.training_costs import TrainingPlan, compute_sequence_costs, count_all_parameters, describe_training
from schemas.errors import InputError
from tests.models import make_checkpoint
from tests.test_exactness import make_tokens

TRAIN_TOKENS, NUM_MEMORIES = 256, 3


def count_step(objective: LanguageObjective, batch: TrainingBatch) -> int:
    """Returns the FLOPs of a real step; the math kernel computes every product and shows them all."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("memory_layers", ["first-half", "1,3", "0"])
def test_steps_cost_what_is_counted_in_real_ones(name: str, memory_layers: str) -> None:
    checkpoint = choose_memory_layers(make_checkpoint(name), memory_layers)
    checkpoint.model.requires_grad_(True)
    objective = LanguageObjective(checkpoint)
    shape = dataclasses.replace(shape_from_config(checkpoint.config), train_tokens=TRAIN_TOKENS)
    settings: dict[str, Any] = {"prefix_tokens": len(checkpoint.prefix_token_ids), "skips_future": False}

    warmup = count_step(objective, make_plain_batch(make_tokens(2, TRAIN_TOKENS + 1).numpy()))
    expected = 2 * compute_sequence_costs(shape, with_memory=False, **settings).total
    assert warmup == pytest.approx(expected, rel=0.01)

    num_chunks, tokens = TRAIN_TOKENS // 64, make_tokens(2, TRAIN_TOKENS + 1)
    batch = TrainingBatch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        references=[make_tokens(128, seed=seed).numpy() for seed in range(2 * num_chunks)],
        index_BCM=index_memories(torch.arange(2 * num_chunks).view(2, -1), NUM_MEMORIES),
        chunk_of_token_BT=(torch.arange(TRAIN_TOKENS) // 64).expand(2, -1),
    )
    costs = compute_sequence_costs(shape, with_memory=True, num_memories=NUM_MEMORIES, **settings)
    assert count_step(objective, batch) == pytest.approx(2 * costs.total, rel=0.02)
    # No part is so small that the comparison would not miss it.
    shares = [getattr(costs, part) / costs.total for part in ("references", "reading", "head", "attention", "matrices")]
    assert min(shares) > 0.01


def test_a_token_sees_half_of_its_sequence() -> None:
    shape = paper_shape()
    for with_memory in (False, True):
        half, whole = (
            compute_sequence_costs(shape, with_memory=with_memory, prefix_tokens=0, skips_future=skips)
            for skips in (True, False)
        )
        assert whole.attention == 2 * half.attention
        assert whole.matrices == half.matrices
    # Six FLOPs for each parameter and token, attention and the head beside.
    layers = count_parameters(shape) - (2 * 44 + 1) * 3200
    assert half.matrices == 6 * 2048 * layers
    assert half.attention == 3 * 2 * 44 * 2 * 3200 * 2048 * 2048 // 2
    assert half.head == 6 * 2048 * 60416 * 3200


def test_the_ratio_of_the_stages_is_near_that_of_the_paper() -> None:
    """Twice as many tokens as references pass half of the layers: close to two, without the head nearer still."""
    shape = paper_shape()
    warmup, continual = (compute_sequence_costs(shape, with_memory=stage) for stage in (False, True))
    assert 1.75 < continual.total / warmup.total < 2.1
    assert 1.85 < (continual.total - continual.head) / (warmup.total - warmup.head) < 2.1
    more = compute_sequence_costs(dataclasses.replace(shape, memory_layers=tuple(range(11, 33))), with_memory=True)
    assert more.references > 1.4 * continual.references


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    from transformers import LlamaForCausalLM

    config = PRESETS[name]()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    counted = count_all_parameters(shape_from_config(config), tied_embeddings=config.tie_word_embeddings)
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    assert shape_from_config(read_config(name)) == shape_from_config(config)
    assert list(PRESETS) == list(PRESET_NAMES)


TINY = ModelShape(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    mlp_size=48,
    vocab_size=100,
    memory_layers=(0,),
)


def find(rows: list[PlanRow], name: str) -> float:
    (row,) = (row for row in rows if row.name == name)
    return float(row.value or 0)


def test_a_plan_adds_up() -> None:
    plan = TrainingPlan(
        warmup_tokens=4096_000,
        continual_tokens=2048_000,
        batch_tokens=20_480,
        gpu_tflops=100.0,
        utilisation=0.5,
        num_kept=3,
    )
    rows = describe_training(TINY, plan, num_references=1000)
    warmup, continual = (compute_sequence_costs(TINY, with_memory=stage).total for stage in (False, True))
    assert find(rows, "warmup: steps") == 200
    assert find(rows, "continual: steps") == 100
    assert find(rows, "warmup: one step") == pytest.approx(10 * warmup / 1e12)
    assert find(rows, "continual: in all") == pytest.approx(1000 * continual / 1e18)
    assert find(rows, "warmup: time") == pytest.approx(2000 * warmup / 50e12 / 3600)
    assert find(rows, "continual: against warmup") == pytest.approx(continual / warmup)
    parameters = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 64) + 32 + 2 * 3200
    assert find(rows, "parameters") == parameters
    assert find(rows, "storage: checkpoints") == pytest.approx(3 * 12 * parameters / 2**10)
    assert find(rows, "storage: references") == pytest.approx(1000 * 512 / 2**10)
    assert find(rows, "storage: training tokens") == pytest.approx(6144_000 * 4 / 2**20)


def test_tokens_that_nobody_gives_follow_from_the_parameters() -> None:
    rows = describe_training(TINY, TrainingPlan(), num_references=1)
    assert find(rows, "warmup: tokens") == 20 * count_parameters(TINY)
    assert find(rows, "continual: tokens") == 2 * count_parameters(TINY)
    assert "assumed" in next(row.note for row in rows if row.name == "warmup: tokens")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup_tokens", 0),
        ("continual_tokens", -1),
        ("batch_tokens", 0),
        ("num_memories", 0),
        ("gpu_tflops", 0.0),
        ("utilisation", 0.0),
        ("utilisation", 1.1),
        ("utilisation", float("nan")),
    ],
)
def test_numbers_out_of_bounds_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is"):
        TrainingPlan(**{field: value})  # type: ignore[arg-type]


def test_the_command_prints_the_plan_of_a_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "plan", "--training", "--json", "--model", str(tmp_path)]
    command += ["--tokens", "1000000", "--gpu-tflops", "312", "--references", "5"]
    (tmp_path / "config.json").write_text(PRESETS["0.9b"]().to_json_string())
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    expected = plan_training("0.9b", 5, paper=False, warmup_tokens=1_000_000, gpu_tflops=312.0)
    assert rows == [dataclasses.asdict(row) for row in expected]
    assert next(row["value"] for row in rows if row["name"] == "continual: tokens") == 100_000


def test_planning_a_training_loads_no_torch() -> None:
    code = "import sys, model.training_costs; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
