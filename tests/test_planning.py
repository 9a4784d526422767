"""The cost model: the paper's printed figures, and a count of multiply-adds one at a time."""

import dataclasses
import itertools
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import find_memory_layers
from model.planning import (
    PAPER_NUM_REFERENCES,
    ModelShape,
    compute_costs,
    compute_read_overhead,
    compute_storage,
    count_parameters,
    describe_plan,
    find_break_even,
    make_record_layout,
    paper_shape,
    shape_from_config,
)
from schemas.errors import InputError

TINY = ModelShape(
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    hidden_size=10,
    mlp_size=5,
    vocab_size=7,
    memory_layers=(0, 1),
    reference_tokens=6,
    kept_tokens=2,
    chunk_tokens=4,
    train_tokens=8,
)

TERA = 1e12


def print_to(value: float, digits: int) -> str:
    return f"{value:.{digits}g}"


def test_the_papers_costs() -> None:
    costs = compute_costs(paper_shape())
    assert print_to(costs.write_parameters / TERA, 3) == "2.24"
    assert print_to(costs.write_memory / TERA, 3) == "0.308"
    assert print_to(costs.read_memory / TERA, 3) == "0.000144"
    assert print_to(costs.read_text / TERA, 3) == "0.624"
    assert costs.write_text == costs.read_parameters == 0


def test_the_papers_break_even() -> None:
    first, last = find_break_even(compute_costs(paper_shape()))
    assert print_to(first, 3) == "0.494"
    assert print_to(last, 3) == "1.34e+04"


def test_memory_is_cheapest_exactly_inside_the_interval() -> None:
    costs = compute_costs(paper_shape())
    first, last = find_break_even(costs)
    for uses, best in ((first * 0.99, 2), (first * 1.01, 1), (last * 0.99, 1), (last * 1.01, 0)):
        totals = [
            costs.write_parameters + uses * costs.read_parameters,
            costs.write_memory + uses * costs.read_memory,
            costs.write_text + uses * costs.read_text,
        ]
        assert totals.index(min(totals)) == best


def test_the_papers_parameters_and_memory() -> None:
    assert print_to(count_parameters(paper_shape()), 2) == "2.4e+09"
    layout = make_record_layout(paper_shape())
    assert layout.payload_shape == (22, 2, 8, 8, 80)
    assert layout.payload_bytes == 450_560


def test_the_papers_reading_overhead() -> None:
    assert f"{100 * compute_read_overhead(paper_shape()):.3f}" == "0.228"


def test_the_papers_storage() -> None:
    dense, _, _, sparse, compressed = compute_storage(paper_shape())
    assert print_to(dense.total_bytes / 2**50, 3) == "7.17"
    assert print_to(dense.total_bytes / 2**40, 3) == "7.34e+03"
    assert print_to(sparse.total_bytes / 2**40, 3) == "45.9"
    assert print_to(compressed.total_bytes / 2**40, 3) == "4.02"
    assert dense.reference_bytes == 160 * sparse.reference_bytes
    assert print_to(compressed.factor, 3) == "11.4"
    assert print_to(dense.reference_bytes / compressed.reference_bytes, 3) == "1.83e+03"


def test_only_1_12e8_references_and_binary_units_give_the_printed_storage() -> None:
    fitting = set()
    for hundredths in range(50, 200):
        num_references = hundredths * 10**6
        dense, _, _, sparse, compressed = compute_storage(paper_shape(), num_references=num_references)
        for base in (1000, 1024):
            printed = (
                print_to(dense.total_bytes / base**5, 3),
                print_to(dense.total_bytes / base**4, 3),
                print_to(sparse.total_bytes / base**4, 3),
                print_to(compressed.total_bytes / base**4, 3),
            )
            if printed == ("7.17", "7.34e+03", "45.9", "4.02"):
                fitting.add((num_references, base))
    assert fitting == {(PAPER_NUM_REFERENCES, 1024)}


class Counter:
    """Counts multiply-adds one at a time, over the loops that a forward pass would run."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.count = Fraction(0)

    def multiply(self, rows: int, inner: int, columns: int) -> None:
        for _ in range(rows):
            for _ in range(columns):
                for _ in range(inner):
                    self.count += 1

    def project(self, tokens: int) -> None:
        shape = self.shape
        for _ in range(shape.num_heads):
            self.multiply(tokens, shape.hidden_size, shape.head_dim)
            self.multiply(tokens, shape.head_dim, shape.hidden_size)
        for _ in range(2 * shape.num_kv_heads):
            self.multiply(tokens, shape.hidden_size, shape.head_dim)

    def run_mlp(self, tokens: int) -> None:
        self.multiply(tokens, self.shape.hidden_size, self.shape.mlp_size)
        self.multiply(tokens, self.shape.hidden_size, self.shape.mlp_size)
        self.multiply(tokens, self.shape.mlp_size, self.shape.hidden_size)

    def attend(self, visible: Fraction, products: int = 2) -> None:
        """One token against some visible ones: scores, then weighted values."""
        for _ in range(self.shape.num_heads):
            for _ in range(products):
                for _ in range(self.shape.head_dim):
                    self.count += visible

    def attend_causally(self, tokens: int) -> None:
        """A token sees the earlier ones and, in the paper's convention of half a sequence, half of itself."""
        for position in range(tokens):
            self.attend(position + Fraction(1, 2))


def count_parameter_write(shape: ModelShape) -> Fraction:
    counter = Counter(shape)
    tokens = shape.reference_tokens
    for _ in range(shape.num_layers):
        counter.project(tokens)
        counter.run_mlp(tokens)
        for _ in range(tokens):
            for position in range(shape.train_tokens):
                counter.attend((position + Fraction(1, 2)) / shape.train_tokens)
    counter.multiply(tokens, shape.hidden_size, shape.vocab_size)
    return 3 * 2 * counter.count


def count_memory_write(shape: ModelShape) -> Fraction:
    counter = Counter(shape)
    tokens = shape.reference_tokens
    last = max(shape.memory_layers)
    for layer in range(last + 1):
        counter.project(tokens)
        counter.attend_causally(tokens)
        if layer < last:
            counter.run_mlp(tokens)
        if layer in shape.memory_layers:
            for _ in range(tokens):
                counter.attend(Fraction(tokens), products=1)
    return 2 * counter.count


def count_memory_read(shape: ModelShape) -> Fraction:
    counter = Counter(shape)
    for _ in shape.memory_layers:
        for _ in range(shape.chunk_tokens):
            counter.attend(Fraction(shape.kept_tokens))
    return 2 * counter.count


def count_text_read(shape: ModelShape) -> Fraction:
    counter = Counter(shape)
    for layer in range(shape.num_layers):
        counter.project(shape.reference_tokens)
        counter.attend_causally(shape.reference_tokens)
        for _ in range(shape.chunk_tokens):
            counter.attend(Fraction(shape.reference_tokens))
        if layer < shape.num_layers - 1:
            counter.run_mlp(shape.reference_tokens)
    return 2 * counter.count


SMALL_SIZES = st.integers(1, 3)


@st.composite
def small_shapes(draw: st.DrawFn) -> ModelShape:
    num_layers, num_kv_heads = draw(SMALL_SIZES), draw(st.integers(1, 2))
    reference_tokens = draw(st.integers(1, 4))
    layers = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    return ModelShape(
        num_layers=num_layers,
        num_heads=num_kv_heads * draw(st.integers(1, 2)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(SMALL_SIZES),
        hidden_size=draw(SMALL_SIZES),
        mlp_size=draw(SMALL_SIZES),
        vocab_size=draw(SMALL_SIZES),
        memory_layers=tuple(sorted(layers)),
        reference_tokens=reference_tokens,
        kept_tokens=draw(st.integers(1, reference_tokens)),
        chunk_tokens=draw(SMALL_SIZES),
        train_tokens=reference_tokens + draw(st.integers(0, 3)),
    )


def compare_with_counting(shape: ModelShape) -> None:
    costs = compute_costs(shape)
    assert costs.write_parameters == count_parameter_write(shape)
    assert costs.write_memory == count_memory_write(shape)
    assert costs.read_memory == count_memory_read(shape)
    assert costs.read_text == count_text_read(shape)


def test_costs_equal_a_count_of_multiply_adds() -> None:
    compare_with_counting(TINY)
    compare_with_counting(dataclasses.replace(TINY, memory_layers=(2,)))


@given(small_shapes())
def test_costs_of_any_shape_equal_a_count_of_multiply_adds(shape: ModelShape) -> None:
    compare_with_counting(shape)


@given(small_shapes(), st.integers(1, 100), st.integers(1, 2))
def test_storage_equals_a_count_of_numbers(shape: ModelShape, num_references: int, code_bytes: int) -> None:
    steps = compute_storage(shape, num_references=num_references, dtype="float32", code_bytes=code_bytes)
    numbers = sum(
        1
        for _layer in range(shape.num_layers)
        for _kind in ("key", "value")
        for _head in range(shape.num_heads)
        for _token in range(shape.reference_tokens)
        for _number in range(shape.head_dim)
    )
    vectors = sum(
        1
        for _layer in shape.memory_layers
        for _kind in ("key", "value")
        for _head in range(shape.num_kv_heads)
        for _token in range(shape.kept_tokens)
    )
    assert steps[0].total_bytes == num_references * numbers * 4
    assert steps[3].total_bytes == num_references * make_record_layout(shape, dtype="float32").payload_bytes
    assert steps[4].total_bytes == num_references * vectors * code_bytes
    for before, after in itertools.pairwise(steps):
        assert after.factor == before.total_bytes / after.total_bytes


def test_reading_overhead_of_a_tiny_shape() -> None:
    # Forward pass of a chunk of 4 tokens that see 5: weights 3 * (360 + 150), scores and values 3 * 2 * 5 * 12.
    forward = 2 * 4 * (3 * (2 * 10 * 12 + 2 * 10 * 3 * 2 + 3 * 10 * 5) + 3 * 2 * 5 * 12)
    found = compute_read_overhead(TINY, num_memories=3, num_visible_tokens=5)
    assert found == pytest.approx(3 * float(count_memory_read(TINY)) / forward, rel=1e-12)


def test_the_plan_is_json_and_states_its_assumption() -> None:
    rows = [dataclasses.asdict(row) for row in describe_plan(paper_shape())]
    assert json.loads(json.dumps(rows)) == rows
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows)
    dense = found["storage: dense multi-head"]
    assert (print_to(dense["value"], 3), dense["unit"]) == ("7.17", "PB")
    assert dense["note"] == "1.12e+08 references; TB = 2**40, PB = 2**50 bytes"
    assert (print_to(found["storage: kept tokens only"]["value"], 3), found["storage: kept tokens only"]["unit"]) == (
        "45.9",
        "TB",
    )
    assert found["storage: sparse"]["value"] == 160
    assert found["one memory"]["value"] == 450_560
    assert print_to(found["explicit memory: write"]["value"], 3) == "0.308"


@pytest.mark.parametrize(
    ("num_references", "value", "unit"), [(1, 528.0, "B"), (2, 1056 / 1024, "kB"), (2**50, 528.0, "PB")]
)
def test_sizes_have_a_readable_unit(num_references: int, value: float, unit: str) -> None:
    shape = dataclasses.replace(TINY, num_layers=2, head_dim=11, reference_tokens=3, num_kv_heads=1, num_heads=2)
    row = next(
        row for row in describe_plan(shape, num_references=num_references) if row.name == "storage: dense multi-head"
    )
    assert (row.value, row.unit) == (value, unit)


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(num_memory_layers=3),
        SimpleNamespace(memory_layers=[4, 2]),
        SimpleNamespace(),
    ],
)
def test_a_configuration_has_the_checkpoints_memory_layers(config: SimpleNamespace) -> None:
    vars(config).update(
        num_hidden_layers=5, num_attention_heads=4, hidden_size=12, intermediate_size=7, vocab_size=9, head_dim=None
    )
    shape = shape_from_config(config)
    assert shape.memory_layers == find_memory_layers(config)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (5, 4, 4, 3)
    assert (shape.hidden_size, shape.mlp_size, shape.vocab_size) == (12, 7, 9)


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(InputError, match="hidden_size"):
        shape_from_config(SimpleNamespace(num_hidden_layers=2, num_attention_heads=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 3}, "num_heads is 3"),
        ({"memory_layers": ()}, "memory_layers"),
        ({"memory_layers": (1, 0)}, "memory_layers"),
        ({"memory_layers": (0, 3)}, "memory_layers"),
        ({"kept_tokens": 7}, "kept_tokens is 7"),
        ({"train_tokens": 5}, "train_tokens is 5"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)


def test_impossible_storage_is_refused() -> None:
    with pytest.raises(InputError, match="num_references is 0"):
        compute_storage(TINY, num_references=0)
    with pytest.raises(InputError, match="code_bytes is 14"):
        compute_storage(TINY)
    with pytest.raises(InputError, match="'int8'"):
        compute_storage(TINY, dtype="int8")


def test_planning_loads_no_torch() -> None:
    code = "import sys, model.planning; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
