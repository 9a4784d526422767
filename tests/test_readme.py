"""The README is true: its session is run, its tree is the repository's, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def list_session() -> list[str]:
    found = re.search(r"````console\n\$ make demo\n(.*?)````", README, re.DOTALL)
    assert found, "the README has no session"
    return found[1].splitlines()


def mask(line: str) -> str:
    """Leaves the words of a line: ids, numbers, blanks and rules may differ from machine to machine."""
    line = re.sub(r"\b[0-9a-f]{32}\b", "ID", line)
    line = re.sub(r"\S*/demo/", "DEMO/", line)
    return " ".join(re.sub(r"[-+]?\d[\d,.:]*", "N", line).replace("─", "").split())


def select_stable(lines: list[str]) -> list[str]:
    """Headings, tables and figures; without progress, the text of hits and what the model wrote."""
    kept, generated = [], False
    for line in map(mask, lines):
        if line.startswith("=="):
            generated = "memory3 generate" in line
        table = re.match(r"(from token|N ID)", line)
        if (
            line
            and (line.startswith("==") or table or not generated)
            and not line.startswith(("N ID module", "N ID topic"))
        ):
            kept.append(line)
    return [
        line
        for line in kept
        if re.match(
            r"(==|documents|references|size|seconds|rate|N N? ?seconds|N tokens|the ord|N ret|N ran|loss)", line
        )
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    command = [sys.executable, "-m", "flows.cli", "demo", "--folder", str(tmp_path_factory.mktemp("cache") / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_the_session_is_what_the_demo_prints(demo: list[str]) -> None:
    expected, found = select_stable(list_session()), select_stable(demo)
    assert len(expected) >= 14
    assert found == expected


def test_the_demo_finds_generates_and_measures(demo: list[str]) -> None:
    text = "\n".join(demo)
    hits = [line for line in demo if re.match(r"0\.\d{3}  [0-9a-f]{32}  (topic|module)/", line)]
    assert len(hits) == 6
    losses = [float(value) for value in re.findall(r"memor(?:y|ies) +(\d+\.\d+)", text)]
    assert len(losses) == 3
    assert all(1.0 < loss < 7.0 for loss in losses)
    assert len([line for line in demo if line.startswith("The assert statement is a convenient way")]) == 2


def test_the_tree_names_every_file() -> None:
    tree = README[README.index("## What there is") : README.index("## Words")]
    for package in ("flows", "pipelines", "model", "schemas", "benchmarks", "docs"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                assert path.name in tree, path
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        assert any(list(ROOT.glob(f"{depth}/{name}")) for depth in ("*", "*/*", "*/*/*")), name


def test_every_command_in_the_readme_exists() -> None:
    from typer.main import get_command

    from flows.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"memory3 ([a-z]+) +(.*)", README)
    for name, arguments in used:
        assert name in known, name
        members = getattr(known[name], "commands", None)
        first = arguments.split()[0].strip(":,")
        command = known[name] if members is None or first.startswith("--") else members[first]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", arguments.partition("#")[0])) <= options, arguments
    for name, command in known.items():
        for member in getattr(command, "commands", {name: command}).values():
            assert "Example: memory3 " in member.help, name
