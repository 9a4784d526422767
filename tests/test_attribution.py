"""``memory3 eval attribution``: its figures against counting by hand, its prompts, and its command on a real bank."""

import dataclasses
import json
import shlex
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from flows.cli import app
from flows.evaluating.attribution.figures import (
    CORRELATION,
    LARGEST,
    LEAST,
    NEAREST,
    POSITIVE,
    RANDOM,
    SUPPORT,
    TOP,
    TRUE,
    JudgedChunk,
    correlate_ranks,
    measure_new,
    rate_chunk,
)
from flows.evaluating.attribution.prompts import choose_passages
from flows.evaluating.attribution.reporting import measure_way
from flows.evaluating.attribution.suite import GREEDY, REAL, AttributionOptions, count_known, run_attribution
from flows.evaluating.printing import print_suite
from flows.evaluating.suite_reports import SuiteReport
from model.checkpoint import load_checkpoint
from model.citing import Citation, CitedChunk, judge_supports
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.identifiers import hash_bytes
from tests.servers import build_bank

NOISE = 0.1


def make_chunk(supports: list[float], attention: list[float], scores: list[float]) -> CitedChunk:
    verdicts = judge_supports(supports, NOISE)
    columns = zip(supports, attention, scores, verdicts, strict=True)
    citations = [
        Citation(ref_id=f"{place}", score=score, attention=share, support=support, verdict=verdict)
        for place, (support, share, score, verdict) in enumerate(columns)
    ]
    return CitedChunk(
        first_token=0,
        tokens=(1, 2),
        logprob=-1.0,
        support=sum(supports),
        noise=NOISE,
        citations=tuple(sorted(citations, key=lambda citation: -citation.attention)),
    )


CHUNKS = {
    "a": [
        make_chunk([2.0, 1.0, -1.0], [0.5, 0.3, 0.2], [0.1, 0.2, 0.3]),
        make_chunk([-1.0, 0.5, 0.0], [0.5, 0.2, 0.3], [0.9, 0.2, 0.3]),
    ],
    "b": [make_chunk([0.05, -3.0], [0.6, 0.4], [0.1, 0.9])],
}


def test_figures_are_what_counting_gives() -> None:
    judged = [
        JudgedChunk(item=item, name=item, way="w", chunk=chunk, share_new=1.0)
        for item, chunks in CHUNKS.items()
        for chunk in chunks
    ]
    found = {(measurement.name, measurement.way): measurement.value for measurement in measure_way("w", judged)}
    expected = {
        (LARGEST, TOP): (1 + 0 + 1) / 3,
        (LARGEST, RANDOM): (1 / 3 + 1 / 3 + 1 / 2) / 3,
        (LARGEST, NEAREST): 0.0,
        (LARGEST, LEAST): (0 + 1 + 0) / 3,
        (POSITIVE, TOP): (1 + 0 + 0) / 3,
        (POSITIVE, RANDOM): (2 / 3 + 1 / 3 + 0) / 3,
        (TRUE, TOP): 1 / 3,
        (TRUE, RANDOM): (1 / 3 + 1 / 3 + 0) / 3,
        (SUPPORT, TOP): (2.0 - 1.0 + 0.05) / 3,
        (SUPPORT, RANDOM): (2 / 3 - 0.5 / 3 - 2.95 / 2) / 3,
        (SUPPORT, NEAREST): (-1.0 - 1.0 - 3.0) / 3,
        (SUPPORT, LEAST): (-1.0 + 0.5 - 3.0) / 3,
    }
    for (name, which), value in expected.items():
        assert found[name, f"w, {which}"] == pytest.approx(value), (name, which)
    assert found[f"{LARGEST}, more", f"w, {TOP} over {RANDOM}"] == pytest.approx(2 / 3 - 7 / 18)
    assert found[SUPPORT, "w, all memories"] == pytest.approx((2.0 - 0.5 - 2.95) / 3)
    ranked = [
        spearmanr([one.attention for one in chunk.citations], [one.support for one in chunk.citations]).statistic
        for chunks in CHUNKS.values()
        for chunk in chunks
    ]
    assert found[CORRELATION, "w"] == pytest.approx(float(np.mean(ranked)))


def test_the_mean_over_memories_is_what_drawing_one_gives() -> None:
    chunk = CHUNKS["a"][0]
    generator = np.random.default_rng(0)
    drawn = [chunk.citations[place].support for place in generator.integers(0, 3, 20_000)]
    assert rate_chunk(chunk, SUPPORT, RANDOM) == pytest.approx(np.mean(drawn), abs=0.05)


def test_equal_supports_share_the_first_place_and_have_no_ranks() -> None:
    chunk = make_chunk([0.5, 0.5], [0.6, 0.4], [0.1, 0.2])
    assert rate_chunk(chunk, LARGEST, TOP) == rate_chunk(chunk, LARGEST, LEAST) == 0.5
    assert correlate_ranks(chunk) is None


def test_new_is_what_stands_nowhere_before() -> None:
    assert measure_new([1, 2, 3, 4], [5, 6, 7]) == 1.0
    assert measure_new([1, 2, 3, 4], [1, 2, 3, 4]) == 0.75
    assert measure_new([], [7] * 8) == pytest.approx(1 / 5)
    assert measure_new([1], [2]) == 1.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which one is there in two versions."""
    names = ("class", "with", "import", "try", "assignment", "lambda")
    rows = [{"id": name, "text": topics[name]} for name in names]
    rows += [{"id": f"page/{number}/a", "text": topics["if"] + topics["for"]} for number in ("1.0", "2.0")]
    path = tmp_path_factory.mktemp("corpus") / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    documents = {name: topics[name] for name in ("class", "with", "import", "raise", "del", "pass")}
    return Bank.open(build_bank(tmp_path_factory.mktemp("bank"), documents))


@pytest.fixture(scope="module")
def report(bank: Bank, corpus: Path) -> SuiteReport:
    options = AttributionOptions(
        num_chunks=6, chunks_per_text=1, prompt_tokens=64, temperatures=(0.0,), num_memories=3, batch_size=4
    )
    return run_attribution(None, bank, options, corpus=[str(corpus)])


def test_a_passage_of_each_document_comes_before_the_second_of_any(corpus: Path) -> None:
    checkpoint = load_checkpoint()

    def choose(num_texts: int, seed: int = 0) -> list[tuple[str, tuple[int, ...]]]:
        source = choose_passages(
            checkpoint, [str(corpus)], num_texts=num_texts, prompt_tokens=64, new_tokens=64, seed=seed
        )
        for prompt in source.prompts:
            assert (len(prompt.tokens), len(prompt.following), prompt.tokens[0]) == (64, 64, 1)
        return [(prompt.item, prompt.tokens) for prompt in source.prompts]

    first = choose(7)
    long = {item for item, _ in first}
    assert "held.jsonl: page/a" in long
    assert len({item for item, _ in first[:6]}) == len(long) == 6  # one has too few tokens
    assert choose(5) == first[:5]
    assert {item for item, _ in choose(6, seed=1)} == long
    assert choose(6, seed=1) != first[:6]
    text = checkpoint.tokenizer.encode([topics["class"]])[0].tolist()
    assert dict(first[:6])["held.jsonl: class"][1:] == tuple(text[:63])
    with pytest.raises(InputError, match=r"passages of 64 and 64 tokens, and 1,000 are wanted"):
        choose(1000)


def test_documents_of_two_files_are_two_items_and_versions_are_one(tmp_path: Path) -> None:
    row = json.dumps({"id": "1", "text": topics["class"]}) + "\n"
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(row, encoding="utf-8")
    for version in ("7.4", "7.5"):
        (tmp_path / "reference" / version).mkdir(parents=True)
        (tmp_path / "reference" / version / "page.txt").write_text(topics["with"], encoding="utf-8")
    source = choose_passages(load_checkpoint(), [str(tmp_path)], num_texts=3, prompt_tokens=32, new_tokens=64, seed=0)
    folder = tmp_path.name
    assert {prompt.item for prompt in source.prompts} == {"a.jsonl: 1", "b.jsonl: 1", f"{folder}: reference/page.txt"}


def test_the_report_says_how_often_citations_are_true(
    report: SuiteReport, bank: Bank, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {(figure["name"], figure["way"], figure["group"]): figure for figure in report.to_json()["figures"]}
    for way in (GREEDY, REAL):
        counts = report.data["chunks"][way]
        assert counts["chunks"] == 6
        assert counts["items"] == figures[LARGEST, f"{way}, {TOP}", ""]["num_items"] == 6
        assert figures[LARGEST, f"{way}, {RANDOM}", ""]["value"] == pytest.approx(1 / 3)
        more = figures[f"{LARGEST}, more", f"{way}, {TOP} over {RANDOM}", ""]
        assert more["value"] == pytest.approx(figures[LARGEST, f"{way}, {TOP}", ""]["value"] - 1 / 3)
        for failure in (one for one in report.failures if one["way"] == way):
            assert failure["support"] < -0.1
            assert failure["best_support"] >= failure["support"]
    assert report.data["documents"] == 6
    assert report.data["documents_in_bank"] == 3  # class, with, import
    by_text = hash_bytes(topics["class"].encode())
    assert count_known(bank, [("class", ""), ("another name", by_text), ("another name", "")]) == 2
    assert report.data["fingerprint"] == dataclasses.asdict(bank.manifest.fingerprint)
    num_refuted = sum(round(6 * report.data["chunks"][way]["share_refuted"]) for way in (GREEDY, REAL))
    assert len(report.failures) == num_refuted
    # Half of the documents are in the bank: their own text is likelier with what it is of.
    assert figures[SUPPORT, f"{REAL}, all memories", ""]["value"] > 1
    assert figures[SUPPORT, f"{REAL}, {TOP}", ""]["value"] > figures[SUPPORT, f"{REAL}, {LEAST}", ""]["value"]
    verdicts = {verdict.question: verdict for verdict in report.verdicts}
    assert len(verdicts) == 6
    for way in (GREEDY, REAL):
        answers = [verdict.holds for question, verdict in verdicts.items() if question.startswith(way)]
        lows = [
            figures[f"{name}, more", f"{way}, {TOP} over {RANDOM}", ""]["low"] for name in (LARGEST, POSITIVE, TRUE)
        ]
        assert answers == [low > 0 for low in lows]
    print_suite(report)
    assert "real text" in capsys.readouterr().out


def test_the_command_repeats_itself(report: SuiteReport, bank: Bank, corpus: Path) -> None:
    words = shlex.split(report.command)
    assert words[:3] == ["memory3", "eval", "attribution"]
    done = CliRunner().invoke(app, [*words[1:], "--json"])
    assert done.exit_code == 0, done.output
    again = json.loads(done.stdout[done.stdout.index("{") :])
    for one, other in zip(report.to_json()["figures"], again["figures"], strict=True):
        assert (one["name"], one["way"], one["group"]) == (other["name"], other["way"], other["group"])
        assert one["value"] == pytest.approx(other["value"], abs=1e-4)
    assert again["command"] == report.command


def test_prompts_of_a_file_are_continued(bank: Bank, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{name}: {topics[name][:200]}"} for name in ("class", "with", "with", "import")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = AttributionOptions(num_chunks=5, chunks_per_text=2, temperatures=(1.0,), num_memories=2)
    report = run_attribution(None, bank, options, prompts=path)
    assert set(report.data["chunks"]) == {"temperature 1"}
    assert report.data["items"] == 3
    assert report.data["chunks"]["temperature 1"]["chunks"] == 6
    with pytest.raises(InputError, match="has 3 different prompts, and 500 are wanted"):
        run_attribution(None, bank, AttributionOptions(chunks_per_text=1), prompts=path)
    path.write_text('{"question": "x"}\n')
    with pytest.raises(InputError, match="line 1 is no prompt"):
        run_attribution(None, bank, options, prompts=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chunks": 0}, "num_chunks is 0"),
        ({"num_memories": 1}, "at least 2 can be told apart"),
        ({"prompt_tokens": 1}, "prompt_tokens is 1"),
        ({"temperatures": (0.0, 0.0)}, "given twice"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttributionOptions(**settings)


def test_what_is_to_be_continued_is_given_once(bank: Bank, corpus: Path, tmp_path: Path) -> None:
    for given in ({}, {"corpus": [str(corpus)], "prompts": tmp_path / "prompts.jsonl"}):
        with pytest.raises(InputError, match="give held-out documents with --corpus, or a file with --prompts"):
            run_attribution(None, bank, AttributionOptions(), **given)
