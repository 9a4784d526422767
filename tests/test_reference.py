"""The generated pages and pictures of docs/ are those of the program, and the examples of cli.md can be parsed."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.draw_pictures import PICTURES
from docs.write_reference import PAGES, list_commands
from flows.config import load_config
from tests.pages import read_blocks

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_what_the_program_says(name: str) -> None:
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == PAGES[name](), "run make docs"


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_the_script(name: str) -> None:
    picture = PICTURES[name]()
    assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == picture, "run make docs"
    assert "<title" in picture
    assert "<desc" in picture


def parse(command: Any, name: str, words: list[str]) -> None:
    """Parses words as a command does before it runs; what cannot be parsed raises."""
    members = getattr(command, "commands", {})
    if members and words and words[0] in members:
        parse(members[words[0]], words[0], words[1:])
    else:
        command.make_context(name, words)


def test_every_example_of_the_commands_can_be_parsed() -> None:
    from typer.main import get_command

    from flows.cli import app

    blocks = [block for block in read_blocks("docs/reference/cli.md") if block.language == "sh"]
    assert len(blocks) >= len(list(list_commands()))
    for block in blocks:
        for line in block.text.split("&&"):
            words = shlex.split(line)
            assert words[0] == "memory3", block.place
            parse(get_command(app), "memory3", words[1:])


def test_the_settings_shown_can_be_used(tmp_path: Path) -> None:
    [block] = [block for block in read_blocks("docs/reference/settings.md") if block.language == "yaml"]
    (tmp_path / "settings.yaml").write_text(block.text)
    config = load_config("tiny", tmp_path / "settings.yaml", {})
    assert config.memory.codec == yaml.safe_load(block.text)["memory"]["codec"]
    assert config.deduplication.threshold == 0.7


def test_every_command_has_an_example_and_its_options_a_meaning() -> None:
    text = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    for name, command in list_commands():
        assert f"\n## {name}\n" in text
        assert all(parameter.help for parameter in command.params if parameter.name != "help"), name
