"""The benchmark of all suites: its commands are those that users have, and what is finished is not done again."""

import shlex
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import typer
from typer.main import get_command

from benchmarks import bench_evaluation
from benchmarks.bench_evaluation import BANKS, CASES
from flows.cli import app
from flows.evaluating.folders import SUITES
from tests.corpora import write_lines
from tests.test_reference import parse


def test_every_command_can_be_parsed() -> None:
    places = dict.fromkeys((*BANKS, "banked", "held_out"), "folder")
    suites = set()
    for case in CASES.values():
        words = shlex.split(case.format(**places))
        if words[0] == "memory3":
            parse(get_command(app), "memory3", [*words[1:], "--out", "folder"])
            suites.add(words[2])
    assert suites == set(SUITES)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder of the recipe with two short corpora."""
    for part in ("banked", "held_out"):
        (tmp_path / "work" / "corpus" / part).mkdir(parents=True)
    write_lines(tmp_path / "work/corpus/banked/python-docs.jsonl", [{"id": "while", "text": topics["while"]}])
    write_lines(tmp_path / "work/corpus/held_out/docs.jsonl", [{"id": "with", "text": topics["with"]}])
    return tmp_path / "work"


def test_a_case_is_its_command_on_banks_that_are_built(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        bench_evaluation,
        "CASES",
        {"own": "memory3 eval perplexity --bank {bank-all} --corpus {held_out} --ways random --own-document"},
    )
    out = tmp_path / "out"
    bench_evaluation.main(work, out, "banks")
    assert {path.name for path in out.iterdir()} == {"bank-all", "model.txt", "reports"}
    bench_evaluation.main(work, out, "")
    printed = capfd.readouterr().out
    assert printed.startswith(f"$ memory3 eval perplexity --bank {out / 'bank-all'} ")
    assert "gain over none" in printed
    assert (out / "reports" / "own" / "perplexity" / "report.json").is_file()
    bench_evaluation.main(work, out, "")
    assert capfd.readouterr().out == printed
    (out / "own.txt").unlink()
    monkeypatch.setitem(bench_evaluation.CASES, "own", "memory3 eval perplexity --bank {bank-all} --ways wrong")
    with pytest.raises(typer.BadParameter, match="ended with 2"):
        bench_evaluation.main(work, out, "")


def test_what_is_finished_is_printed_and_not_done_again(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("knowledge", "filter"):
        (out / f"{name}.txt").write_text(f"$ {name}\n")
    bench_evaluation.main(work, out, "knowledge")
    assert capsys.readouterr().out == "$ filter\n\n\n$ knowledge\n"
    with pytest.raises(typer.BadParameter, match="no case 'speed'"):
        bench_evaluation.main(work, out, "speed")
    with pytest.raises(typer.BadParameter, match="make them"):
        bench_evaluation.main(tmp_path, out, "")
    (out / "model.txt").write_text("another")
    with pytest.raises(typer.BadParameter, match="other weights"):
        bench_evaluation.main(work, out, "knowledge")
