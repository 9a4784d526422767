"""``memory3 eval perplexity`` on a real bank: every way against a slow one, folders, the page, and comparing."""

import dataclasses
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.evaluating.charts import draw_chart
from flows.evaluating.folders import check_folder, read_evaluation
from flows.evaluating.measurements import Interval
from flows.evaluating.perplexity.passages import draw_passages, name_sources, read_documents
from flows.evaluating.perplexity.suite import find_own_references
from flows.evaluating.perplexity.ways import Contestants, WayOptions
from flows.evaluating.suite_reports import Chart, Point, Series
from flows.generation import open_writer
from model.evaluating import SEQUENCE_TOKENS, score_with_text, score_without_memory
from model.loglikelihoods import ScoredSequence
from model.reading import CHUNK_TOKENS
from pipelines.formats import list_corpus_files
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.overlap import shares_run
from tests.browser import CHROMIUM, Browser
from tests.servers import build_bank

BANKED = ("assert", "del", "pass", "break", "continue", "global", "import", "raise", "return", "try", "while", "with")
HELD_OUT = ("for", "if", "nonlocal", "lambda", "yield", "class")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("bank")
    return Bank.open(build_bank(folder, {name: topics[name] for name in BANKED if name in topics}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for part in (HELD_OUT[::2], HELD_OUT[1::2]):
        lines = [json.dumps({"id": f"1.{len(name)}/{name}", "text": topics[name]}) for name in part if name in topics]
        (folder / f"{part[0]}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(bank: Bank, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two evaluations: with two references a chunk, and with one and another codec."""
    place = tmp_path_factory.mktemp("results")
    for name, options in (("a", ["--references", "2,1"]), ("b", ["--references", "1,2", "--codecs", "turbo2"])):
        command = ["eval", "perplexity", "--bank", bank.url, "--corpus", str(corpus), "--passages", "1", "--json"]
        done = CliRunner().invoke(app, [*command, *options, "--out", str(place / name)])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == json.loads((place / name / "perplexity" / "report.json").read_text())
    return [place / "a", place / "b"]


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = read_evaluation(folder)[0].report
    return report


def find_figure(report: dict[str, Any], name: str, way: str, group: str = "") -> dict[str, Any]:
    found = [part for part in report["figures"] if (part["name"], part["way"], part["group"]) == (name, way, group)]
    assert len(found) == 1
    return dict(found[0])


# The sample -----------------------------------------------------------------------------------------------------------


def test_one_version_of_a_page_is_taken_whatever_the_order(tmp_path: Path) -> None:
    rows = [{"id": f"docs/{version}/loop.md", "text": f"{topics['for']} {version}"} for version in ("1.0", "2.0")]
    rows += [{"id": "docs/1.0/try.md", "text": topics["try"]}, {"id": "docs/1.0/copy.md", "text": topics["try"]}]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "docs.jsonl").write_text("".join(lines))
    (tmp_path / "two" / "docs.jsonl").write_text("".join(lines[::-1]))
    found, num_read = read_documents([str(tmp_path / "one")])
    assert (len(found), num_read) == (2, 4)
    again = read_documents([str(tmp_path / "two")])[0]
    assert [document.content_hash for document in again] == [document.content_hash for document in found]


def test_corpora_are_named_by_files_or_by_the_folder_of_loose_ones(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", "b/train.jsonl", "b/notes.jsonl.gz", "wiki/one.md", "wiki/deep/two.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = list_corpus_files([str(tmp_path / name) for name in ("a", "b", "wiki")])
    names = {path.removeprefix(f"{tmp_path}/"): name for path, name in name_sources(files).items()}
    assert names == {
        "a/train.jsonl": "a/train.jsonl",
        "b/train.jsonl": "b/train.jsonl",
        "b/notes.jsonl.gz": "notes",
        "wiki/one.md": "wiki",
        "wiki/deep/two.txt": "wiki",
    }


def test_no_reference_of_the_scored_document_is_read(bank: Bank, tmp_path: Path) -> None:
    """A document that stands in the bank: the filter alone lets its other parts through."""
    writer = open_writer(bank, "memory3-tiny")
    (tmp_path / "known.jsonl").write_text(json.dumps({"id": "import", "text": topics["import"]}) + "\n")
    passages = draw_passages(writer.checkpoint, [str(tmp_path)], num_passages=1).passages
    excluded = find_own_references(bank, passages)
    rows = bank.read_table("occurrences", ["doc_id", "ref_id"]).to_pylist()
    own = {row["ref_id"] for row in rows if row["doc_id"] == "import"}
    tokens = tuple(passages[0].tokens.tolist())
    assert own
    assert excluded == {(tokens,): own}
    texts = [writer.checkpoint.tokenizer.decode(tokens[start : start + 64]) for start in range(0, 384, 64)]
    found = {}
    for name, left_out in (("all", None), ("others", excluded)):
        search = Contestants(bank, writer, WayOptions(num_references=(3,)), left_out).filtered
        hits = search.search(texts, [(tokens,)] * len(texts), 3)
        assert all(len(of_text) == 3 for of_text in hits)
        found[name] = {hit.ref_id for of_text in hits for hit in of_text}
    assert found["all"] & own
    assert not found["others"] & own
    without_limit = WayOptions(num_references=(3,), max_overlap=1.0)
    search = Contestants(bank, writer, without_limit, excluded).filtered
    assert not {hit.ref_id for of_text in search.search(texts, [(tokens,)] * 6, 3) for hit in of_text} & own


def test_the_rule_of_shared_runs_can_be_turned_off(bank: Bank, tmp_path: Path) -> None:
    """Without a limit of overlap it alone keeps the scored text itself from being read."""
    writer = open_writer(bank, "memory3-tiny")
    (tmp_path / "known.jsonl").write_text(json.dumps({"id": "import", "text": topics["import"]}) + "\n")
    passage = draw_passages(writer.checkpoint, [str(tmp_path)], num_passages=1).passages[0].tokens
    stored = bank.read_table("references", ["ref_id", "token_ids"]).to_pylist()
    given = {row["ref_id"] for row in stored if shares_run(passage, np.array(row["token_ids"], np.int32), 13)}
    assert given
    texts = [writer.checkpoint.tokenizer.decode(passage[start : start + 64]) for start in range(0, 384, 64)]
    for shared_run in (13, 0):
        options = WayOptions(num_references=(3,), max_overlap=1.0, shared_run=shared_run)
        search = Contestants(bank, writer, options).filtered
        found = search.search(texts, [(tuple(passage.tolist()),)] * len(texts), 3)
        assert bool({hit.ref_id for hits in found for hit in hits} & given) == (shared_run == 0)
    with pytest.raises(InputError, match="shared_run is -1"):
        WayOptions(shared_run=-1)


def test_texts_that_are_too_short_are_told_and_refused(bank: Bank, tmp_path: Path) -> None:
    checkpoint = open_writer(bank, "memory3-tiny").checkpoint
    (tmp_path / "short.jsonl").write_text('{"id": "a", "text": "Short."}\n')
    with pytest.raises(InputError, match="128 tokens"):
        draw_passages(checkpoint, [str(tmp_path)])
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "b", "text": topics["class"]}) + "\n")
    sample = draw_passages(checkpoint, [str(tmp_path)], num_passages=3)
    assert (sample.num_short, sample.sources, len(sample.content_hashes)) == (1, ["long"], 1)


# The ways -------------------------------------------------------------------------------------------------------------


def test_ways_are_scored_as_one_by_one(bank: Bank, corpus: Path) -> None:
    """No memory and text in the prompt against functions that read one passage, and one prompt a chunk."""
    writer = open_writer(bank, "memory3-tiny")
    checkpoint = writer.checkpoint
    contestants = Contestants(bank, writer, WayOptions(num_references=(2,)))
    passage = draw_passages(checkpoint, [str(corpus)]).passages[0].tokens
    tokens = tuple(passage.tolist())
    sequence = ScoredSequence(
        context=tokens[:CHUNK_TOKENS], continuation=tokens[CHUNK_TOKENS:], earlier=(), questions=(tokens,)
    )

    def score(way: str) -> float:
        scorer = contestants.make_scorer(way, 2)
        assert scorer is not None
        return -scorer.score([sequence])[0].total

    for way, with_prefix in (("plain", False), ("none", True)):
        wanted = float(score_without_memory(checkpoint, passage, with_prefix=with_prefix).sum())
        assert score(way) == pytest.approx(wanted, rel=1e-5)
    chunks = [tokens[start : start + CHUNK_TOKENS] for start in range(0, len(tokens), CHUNK_TOKENS)]
    texts = [checkpoint.tokenizer.decode(chunk) for chunk in chunks[:-1]]
    hits = contestants.filtered.search(texts, [(tokens,)] * len(texts), 2)
    rows = [bank.read_references([hit.ref_id for hit in of_chunk], ["token_ids"]) for of_chunk in hits]
    told = [[], *([np.array(part) for part in table["token_ids"].to_pylist()] for table in rows)]
    limit = checkpoint.context_start + SEQUENCE_TOKENS
    wanted = float(score_with_text(checkpoint, passage, told, max_tokens=limit).sum())
    assert score("text") == pytest.approx(wanted, rel=1e-4)
    assert len({round(score(way), 3) for way in ("none", "random", "retrieved", "all tokens", "in context")}) == 5


def test_long_prompts_lose_the_beginning_of_their_context(bank: Bank, corpus: Path) -> None:
    writer = open_writer(bank, "memory3-tiny")
    passages = draw_passages(writer.checkpoint, [str(corpus)]).passages
    passage = tuple(max((passage.tokens.tolist() for passage in passages), key=len))
    assert len(passage) > 400
    sequence = ScoredSequence(context=passage[:64], continuation=passage[64:], earlier=(), questions=(passage,))
    scores = []
    for limit in (1000, 500):
        contestants = Contestants(bank, writer, WayOptions(num_references=(2,), max_prompt_tokens=limit))
        scorer = contestants.make_scorer("text", 2)
        assert scorer is not None
        scores.append(scorer.score([sequence])[0].logprobs)
    assert np.allclose(scores[0][:64], scores[1][:64], atol=1e-4)
    assert not np.allclose(scores[0][-64:], scores[1][-64:], atol=1e-2)
    tight = Contestants(bank, writer, WayOptions(num_references=(5,), max_prompt_tokens=300))
    assert tight.make_scorer("text", 5) is None
    assert "text of 5" in tight.skipped


# The report -----------------------------------------------------------------------------------------------------------


def test_a_report_holds_what_its_items_say(folders: list[Path]) -> None:
    report = read_report(folders[0])
    ways = ["plain", "none", "random of 2", "retrieved of 2", "compressed by int8 of 2", "compressed by turbo4 of 2"]
    ways += ["compressed by turbo3 of 2", "all tokens of 2", "in context of 2", "text of 2"]
    assert [figure["way"] for figure in report["figures"] if figure["name"] == "loss"][:10] == ways
    none, retrieved = (find_figure(report, "loss", way)["value"] for way in ("none", "retrieved of 2"))
    gain = find_figure(report, "gain", "retrieved of 2")
    assert gain["value"] == pytest.approx(none - retrieved)
    assert gain["low"] <= gain["value"] <= gain["high"]
    parts = [find_figure(report, "gain", "retrieved of 2", group)["value"] for group in ("for", "if")]
    assert gain["value"] == pytest.approx(np.mean(parts))
    assert report["data"]["num_documents_in_bank"] == 0
    assert report["data"]["filter"]["num_compared"] > 0
    verdicts = {verdict["question"]: verdict["holds"] for verdict in report["verdicts"]}
    assert verdicts["Does memory beat none?"] == (gain["low"] > 0)


def test_items_are_stored_exactly(folders: list[Path]) -> None:
    suite = read_evaluation(folders[0])[0]
    for measurement, figure in zip(suite.measurements, suite.report["figures"], strict=True):
        assert dataclasses.asdict(measurement.interval) == {
            name: figure[name] for name in ("value", "low", "high", "num_items")
        }


def test_folders_are_checked_before_work_begins(folders: list[Path], tmp_path: Path) -> None:
    check_folder(folders[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        check_folder(tmp_path / "a" / "b")
    with pytest.raises(InputError, match="holds no evaluation"):
        read_evaluation(tmp_path)
    command = ["eval", "perplexity", "--bank", "nowhere", "--corpus", "nothing", "--out", str(tmp_path)]
    with pytest.raises(InputError, match="something else"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_what_is_left_of_an_interrupted_evaluation_is_used(folders: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folders[0], place)
    (place / "index.html").unlink()
    check_folder(place)
    assert len(read_evaluation(place)) == 1
    (place / "perplexity" / "report.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged; measure this suite again"):
        read_evaluation(place)
    assert read_evaluation(place, skip_damaged=True) == []


def test_charts_take_any_name() -> None:
    point = Point(x="we$x_{$y & <b>", interval=Interval(value=0.5, low=0.4, high=0.6, num_items=9))
    chart = Chart(name="a", title="$x$ _{", x_label="$", y_label="nats", series=[Series(label="$a$_", points=[point])])
    picture = draw_chart(chart)
    assert b"we$x_{$y &amp; &lt;b&gt;" in picture
    assert draw_chart(chart) == picture


def test_two_evaluations_are_compared_item_by_item(folders: list[Path]) -> None:
    done = CliRunner().invoke(app, ["eval", "compare", *map(str, folders), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    labels = {(figure["name"], figure["way"], figure["group"]): figure for figure in found["figures"]}
    same = labels["loss", "retrieved of 2", ""]
    assert same["is_paired"]
    assert same["difference"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["verdict"] == "same"
    assert any("turbo2" in label for label in found["only_second"])
    assert any("turbo4" in label for label in found["only_first"])
    assert "ways" in found["changed_data"]["perplexity"]
    shown = CliRunner().invoke(app, ["eval", "compare", *map(str, folders)])
    assert "figures compared" in shown.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_works_offline(folders: list[Path], tmp_path: Path) -> None:
    page = folders[0] / "index.html"
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        assert browser.evaluate("document.querySelectorAll('table caption').length") == 3
        widths = browser.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert len(widths) == 2
        assert min(widths) > 100
        assert not browser.complaints
        assert all(url.startswith(("file:", "data:")) for url in browser.requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--references", "two"], "whole numbers"),
        (["--references", "0"], "at least 1"),
        (["--ways", "telepathy"], "no way 'telepathy'"),
        (["--codecs", "zip"], "zip"),
        (["--max-prompt", "100000"], "has room for"),
        (["--documents", "0"], "num_documents is 0"),
    ],
)
def test_wrong_options_are_explained(bank: Bank, corpus: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(
            app, ["eval", "perplexity", "--bank", bank.url, "--corpus", str(corpus), *options], catch_exceptions=False
        )
