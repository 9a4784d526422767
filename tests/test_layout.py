"""The shape of the repository: names nobody else takes, a wheel with every package, pins that fit, portable files."""

import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "model", "schemas", "flows")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Written in pieces, so that this file does not contain what it looks for.
INDEX_HOSTS = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
LOCAL_FOLDERS = ["/" + name + "/" for name in ("work", "root", "opt/pypi", "opt/wheels")]
FORBIDDEN = re.compile(
    "|".join([*map(re.escape, INDEX_HOSTS), *(r"(?<![\w.})\]*-])" + re.escape(folder) for folder in LOCAL_FOLDERS)])
)
"""Hosts of package indexes, and folders of one machine where a path begins (``bank/work/`` is a place in a bank)."""


def list_files() -> list[Path]:
    """Returns the files that are or would be committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def list_dependencies() -> list[Requirement]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def read_pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_no_other_distribution_ships_our_names() -> None:
    providers = packages_distributions()
    assert providers["numpy"] == ["numpy"]
    others = {name: set(providers.get(name, [])) - {"memory3"} for name in PACKAGES}
    assert others == {name: set() for name in PACKAGES}


def test_no_module_hides_one_of_the_standard_library() -> None:
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.stem != "__init__"]
    assert len(modules) > 20
    assert [path for path in modules if path.stem in sys.stdlib_module_names] == []


def test_the_wheel_has_every_package() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == folders == set(PACKAGES)
    assert set(PROJECT["tool"]["mypy"]["packages"]) == folders | {"benchmarks", "docs"}
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == folders


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_console_scripts_can_be_called() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_pins_are_exact_sorted_and_portable() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)] == []
    assert pins == sorted(pins, key=str.lower)
    assert len(pins) == len(read_pins())


def test_every_dependency_is_pinned_inside_its_range() -> None:
    pins = read_pins()
    outside = [
        str(dependency)
        for dependency in list_dependencies()
        if not dependency.specifier.contains(pins.get(canonicalize_name(dependency.name), "0"))
    ]
    assert outside == []


def test_the_pattern_finds_what_it_should() -> None:
    for text in ("open('" + "/wo" + "rk/x')", "a " + "/ro" + "ot/.cache", "https://py" + "pi.org/simple"):
        assert FORBIDDEN.search(text)
    for text in ("bank/" + "work/x", "{bank}/" + "work/", "$HOME/" + "work/x", "network/"):
        assert not FORBIDDEN.search(text)


def test_no_file_names_a_place_on_one_machine() -> None:
    files = list_files()
    assert ROOT / "pyproject.toml" in files
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == []
