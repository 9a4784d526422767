"""The benchmark of all suites: its commands are those that users have, and what is finished is not done again."""

import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks import bench_evaluation
from benchmarks.bench_evaluation import BANKS, CASES
from flows.cli import app
from schemas.errors import InputError
from tests.test_reference import parse


def test_every_command_can_be_parsed() -> None:
    places = dict.fromkeys((*BANKS, "banked", "held_out"), "folder")
    for case in CASES.values():
        words = shlex.split(case.format(**places))
        if words[0] == "memory3":
            parse(get_command(app), "memory3", [*words[1:], "--out", "folder"])


def test_what_is_finished_is_printed_and_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work" / "corpus" / "held_out").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for name in ("knowledge", "filter"):
        (tmp_path / "out" / f"{name}.txt").write_text(f"$ {name}\n")
    bench_evaluation.main(tmp_path / "work", tmp_path / "out", "knowledge")
    assert capsys.readouterr().out == "$ filter\n\n\n$ knowledge\n"
    with pytest.raises(InputError, match="no case 'speed'"):
        bench_evaluation.main(tmp_path / "work", tmp_path / "out", "speed")
    with pytest.raises(InputError, match="make them with"):
        bench_evaluation.main(tmp_path, tmp_path / "out", "")
