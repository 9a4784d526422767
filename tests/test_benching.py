"""The commands that measure, on a small real bank: what they run is what users run, and what they print adds up."""

import dataclasses
import json
import math
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.bench_reading import UniqueHits, cut_prompts, forget_pages
from flows.benching import time_in_turn
from flows.building import build
from flows.cli import app
from flows.codec_training import CodecRequest, train_on_bank
from flows.measured_costs import MeasuredCosts, describe_measured
from flows.searching import open_retriever
from flows.steps import Steps
from model.loading import load_writer
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import LocalStore
from tests.test_equality import make_config, write_corpus

NUM_VECTORS = 4 * 6 * 32 * 2
"""Keys and values of a memory of the shipped model: layers, heads, kept tokens."""

DOCUMENTS = {name: topics[name] for name in ("assert", "class", "for", "import", "with")}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("benched")
    config = make_config({"memory": {"references_per_shard": 16}})
    build(LocalStore(folder / "bank"), [str(write_corpus(folder, DOCUMENTS))], config, Steps())
    return Bank.open(folder / "bank")


def run(*arguments: str | Path) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_encode_compares_writing_with_the_bare_forward_pass(bank: Bank) -> None:
    report = run("bench", "encode", "--bank", bank.url, "--references", 12, "--rounds", 1)
    mixed, full, *operations = report["rows"]
    for row in (mixed, full):
        assert row["unit"] == "references/s"
        assert row["value"] > 0
        assert row["ratio"] > 0
    shares = [row["value"] for row in operations]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100
    assert set(report["machine"]) == {"processor", "device", "versions", "command"}


def test_read_compares_memory_with_none_and_with_text(bank: Bank) -> None:
    report = run(
        "bench", "read", "--bank", bank.url, "--batch-size", 2, "--prompt-tokens", 70, "--new-tokens", 66,
        "--long-tokens", 130, "--rounds", 1,
    )  # fmt: skip
    profiled = [row for row in report["rows"] if row["name"].startswith("  of it")]
    assert 8 < len(profiled) <= 16
    rows = {(row["name"].partition(",")[0], row["against"]): row for row in report["rows"]}
    none = rows["no memory", ""]["value"]
    worst = rows["with memory", "no memory"]
    text = rows["5 references as text", "no memory"]["value"]
    assert none > 0
    assert text > 0
    assert worst["ratio"] > 0
    (against_text,) = [row for row in report["rows"] if row["against"] == "5 references as text"]
    assert against_text["ratio"] == pytest.approx(against_text["value"] / text)
    assert "read ahead" in next(row["note"] for row in report["rows"] if "usual" in row["name"])


def test_codec_orders_codecs_by_their_bits(bank: Bank) -> None:
    codecs = ("none", "int8", "turbo4", "turbo2")
    given = [part for name in codecs for part in ("--codec", name)]
    rows = run("bench", "codec", "--bank", bank.url, "--references", 20, "--rounds", 1, *given)["rows"]
    errors = [row["value"] for row in rows]
    assert [row["name"].partition(":")[0] for row in rows] == list(codecs)
    assert errors == sorted(errors)
    assert errors[0] < 1 < errors[-1]


def test_storage_measures_the_layout_that_banks_have(bank: Bank, tmp_path: Path) -> None:
    codecs = ("none", "int8", "PRQ2x2x4", "mapped-lloyd8", "OPQ8x32-Residual2x4-PQ8x4")
    given = [part for name in codecs for part in ("--codec", name)]
    report = run("bench", "storage", "--model", "memory3-tiny", "--reads", 5, "--folder", tmp_path, *given)
    sizes = {row["name"].partition(":")[0]: row["value"] for row in report["rows"] if row["unit"] == "B"}
    assert sizes["int8"] == bank.manifest.layout.payload_bytes
    assert {name: size // NUM_VECTORS for name, size in sizes.items()} == {
        "none": 64, "int8": 34, "PRQ2x2x4": 2, "mapped-lloyd8": 8, "OPQ8x32-Residual2x4-PQ8x4": 5,
    }  # fmt: skip
    assert all(row["value"] > 0 for row in report["rows"])
    assert list(tmp_path.iterdir()) == []


def test_the_paper_codec_takes_the_paper_bytes() -> None:
    report = run("bench", "storage", "--reads", 5, "--codec", "none", "--codec", "OPQ20x80-Residual2x14-PQ8x10")
    sizes = [row["value"] for row in report["rows"] if row["unit"] == "B"]
    assert sizes == [450_560, 39_424]


def test_plan_measures_the_model_at_hand() -> None:
    rows = {row["name"]: row for row in run("plan", "--measure", "--codec", "int8", "--references", 1000)}
    assert rows["measured: explicit memory: write"]["value"] > 0
    assert rows["measured: explicit memory: read"]["value"] > 0
    assert rows["one memory"]["value"] == NUM_VECTORS * 34
    assert "int8" in rows["one memory"]["note"]
    assert rows["memories of the bank"]["value"] * 1024**2 >= 1000 * rows["one memory"]["value"]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({"write_parameters": 9.0, "write_memory": 1.0, "read_memory": 0.5, "read_text": 1.0}, (2.0, 16.0)),
        ({"write_parameters": 9.0, "write_memory": 1.0, "read_memory": 1.0, "read_text": 0.9}, (math.inf, 8.0)),
        ({"write_parameters": 2.0, "write_memory": 1.0, "read_memory": 0.5, "read_text": 0.6}, (10.0, 2.0)),
    ],
)
def test_break_even_is_where_costs_meet(costs: dict[str, float], expected: tuple[float, float]) -> None:
    measured = MeasuredCosts(**costs, load_memory=0.1)
    found = measured.find_break_even()
    assert found == pytest.approx(expected)
    for uses in (found[0], found[1]):
        if math.isfinite(uses):
            memory = measured.write_memory + uses * measured.read_memory
            others = (uses * measured.read_text, measured.write_parameters)
            assert any(memory == pytest.approx(other) for other in others)


def test_the_plan_says_when_memory_loses() -> None:
    checkpoint = load_writer().checkpoint
    dear = MeasuredCosts(write_parameters=9.0, write_memory=1.0, read_memory=1.0, read_text=0.9, load_memory=0.5)
    late = MeasuredCosts(write_parameters=2.0, write_memory=1.0, read_memory=0.5, read_text=0.6, load_memory=0.1)
    good = MeasuredCosts(write_parameters=9.0, write_memory=1.0, read_memory=0.1, read_text=0.6, load_memory=0.1)
    described = [describe_measured(costs, checkpoint) for costs in (dear, late, good)]
    json.dumps([[dataclasses.asdict(row) for row in rows] for rows in described], allow_nan=False)
    assert [row.value for row in described[0] if row.name == "measured: memory pays from"] == [None]
    notes = [" ".join(row.note for row in rows) for rows in described]
    assert ["memory loses" in note for note in notes] == [True, True, False]


def test_in_the_worst_case_no_reference_is_asked_for_twice(bank: Bank) -> None:
    unique = UniqueHits(open_retriever(bank))
    num_live = open_retriever(bank).num_references
    found = [hit.ref_id for _ in range(num_live // 10) for hits in unique.search(["with", "import"], 5) for hit in hits]
    assert len(set(found)) == len(found) == num_live // 10 * 10
    assert unique.seconds > 0
    assert unique.num_repeated == 0
    unique.begin()
    again = [hit.ref_id for _ in range(num_live // 5 + 1) for hit in unique.search(["with"], 5)[0]]
    assert again[: len(found)] == found
    assert unique.num_repeated == len(again) - num_live > 0


def test_prompts_are_real_text_of_the_length_asked_for(bank: Bank) -> None:
    before = {path: path.read_bytes() for path in Path(bank.url).rglob("*.safetensors")}
    for size in (3, 130, 100_000):
        first, second = islice(cut_prompts(bank, (1,), size), 2)
        assert len(first) == len(second) == size
        assert first[0] == second[0] == 1
    forget_pages(bank)
    assert {path: path.read_bytes() for path in before} == before


def test_works_are_timed_in_turn() -> None:
    order: list[str] = []
    seconds = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    time_in_turn({"c": lambda: order.append("c")}, 2, prepare=lambda: order.append("-"))
    assert order[6:] == ["-", "c"] * 2
    assert set(seconds) == {"a", "b"}


def test_several_prompts_and_references_as_text_from_the_command_line(bank: Bank) -> None:
    two = run(
        "generate", "--bank", bank.url, "--prompt", "The with statement", "--prompt", "An assert statement is a",
        "--max-new-tokens", 8, "--rag",
    )  # fmt: skip
    assert len(two) == 2
    for found in two:
        (chunk,) = found["chunks"]
        assert len(chunk["hits"]) == 5
        assert chunk["attention"] == []
    done = CliRunner().invoke(
        app, ["generate", "--bank", bank.url, "--prompt", "The with statement", "--max-new-tokens", "8", "--trace"]
    )
    assert done.exit_code == 0
    assert "0 from the cache in RAM, 5 from the bank" in done.stdout


def test_what_cannot_be_measured_is_told_in_a_line(bank: Bank, tmp_path: Path) -> None:
    out = tmp_path / "codec.safetensors"
    train_on_bank(bank, CodecRequest(name="PRQ2x2x4", out=out, num_references=30, seed=3))
    for arguments, message in (
        (["storage", "--folder", tmp_path / "missing"], "is no folder"),
        (["codec", "--bank", bank.url, "--codec", out], "was trained with seed 3"),
        (["storage", "--codec", "PRQ40x500x16"], "more than they have"),
    ):
        done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)


def test_generation_refuses_two_baselines_at_once(bank: Bank) -> None:
    done = CliRunner().invoke(app, ["generate", "--bank", bank.url, "--prompt", "x", "--rag", "--no-memory"])
    assert "exclude each other" in str(done.exception)
