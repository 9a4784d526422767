"""``memory3 eval all``: every suite to one folder, going on where it was, and telling what cannot be measured."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.evaluating.folders import SUITES, read_evaluation
from flows.evaluating.whole import WholeOptions
from schemas.errors import InputError
from tests.servers import build_bank

NAMES = ("assert", "del", "pass", "break", "continue", "global", "import", "raise", "return", "try", "while", "with")

STATUSES = ("Draft", "Final", "Active", "Rejected", "Deferred", "Withdrawn")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bank(tmp_path_factory.mktemp("bank"), {name: topics[name] for name in NAMES if name in topics})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long texts that begin with headers."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for number, name in enumerate(sorted(name for name in topics if len(topics[name]) > 1500)[:24]):
        header = f"Title: The topic {name}\nNumber: {100 + 7 * number}\nStatus: {STATUSES[number % len(STATUSES)]}\n"
        header += f"Created: {1991 + number}-03-{number + 1:02d}\n"
        rows.append({"id": f"topic/{name}", "text": f"{header}\n{topics[name]}"})
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["eval", "all", *words])
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


@pytest.mark.slow
def test_all_suites_are_measured_once(bank: Path, corpus: Path, tmp_path: Path) -> None:
    words = ("--bank", str(bank), "--corpus", str(corpus), "--out", str(tmp_path / "out"), "--share", "0.02")
    code, output = run(*words)
    assert code == 0, output
    stored = read_evaluation(tmp_path / "out")
    assert [suite.report["suite"] for suite in stored] == list(SUITES)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for suite in stored:
        assert suite.report["title"] in page.replace("&#39;", "'")
        assert suite.measurements
        assert suite.report["command"]
        assert all(table["title"] in page for table in suite.report["tables"][:1])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/report.json")}
    code, output = run(*words)
    assert code == 0, output
    assert output.count("is there already") == len(SUITES)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/report.json")}
    done = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / "out"), str(tmp_path / "out"), "--json"])
    assert {figure["verdict"] for figure in json.loads(done.stdout)["figures"]} == {"same"}


def test_a_suite_that_cannot_be_measured_does_not_stop_the_others(bank: Path, corpus: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "one.txt").write_text(topics["class"], encoding="utf-8")
    out = tmp_path / "out"
    words = ("--bank", str(bank), "--corpus", str(plain), "--out", str(out), "--share", "0.02")
    code, output = run(*words, "--suites", "perplexity,knowledge")
    assert code == 1
    assert "not measured: knowledge:" in output
    assert [suite.report["suite"] for suite in read_evaluation(out)] == ["perplexity"]


def test_other_inputs_are_measured_again(bank: Path, corpus: Path, tmp_path: Path) -> None:
    words = ("--bank", str(bank), "--corpus", str(corpus), "--out", str(tmp_path / "out"), "--suites", "perplexity")
    assert run(*words, "--share", "0.02")[0] == 0
    code, output = run(*words, "--share", "0.1")
    assert code == 0
    assert "is there already" not in output
    report = read_evaluation(tmp_path / "out")[0].report
    assert report["settings"]["num_documents"] == 4


@pytest.mark.parametrize(
    ("options", "message"), [({"suites": ("speed",)}, "no suite 'speed'"), ({"share": 0.0}, "share is 0")]
)
def test_wrong_options_are_explained(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WholeOptions(corpus=("docs",), **options)  # type: ignore[arg-type]


def test_a_folder_of_something_else_is_left_alone(bank: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, output = run("--bank", str(bank), "--corpus", str(corpus), "--out", str(tmp_path))
    assert code == 1
    assert "something else" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
