"""Writes the pages of docs/reference from the program itself: commands, settings, views. Run by ``make docs``.

    command line, dataclasses of settings, an empty bank's views -> pages -> docs/reference/*.md

Nothing stands in these pages that the program does not say of itself: help and defaults are those of the command line,
meanings are the docstrings of the settings, bounds are what the settings answer to a value that is out of bounds, and
columns are what SQL describes.
"""

import dataclasses
import functools
import inspect
import math
import re
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import typer.main

from flows.cli import app
from flows.config import NO_SETTING, PRESETS, BuildConfig, apply_changes
from pipelines.filter_presets import FILTER_PRESETS
from schemas.errors import InputError

FOLDER = Path(__file__).parent / "reference"
SQL_PAGE = Path(__file__).parent / "sql.md"

GENERATED = "<!-- Written by make docs; what is changed here by hand is lost. -->\n"

Command: TypeAlias = Any
"""A command or group of Typer, whose classes are not public."""

PATH_LIKE = {"Path": "path", "str": "text", "int": "number", "float": "number", "bool": "yes or no"}

CORES = "one a core"
"""The default of the one setting that depends on the machine."""


def format_cell(text: str) -> str:
    """Returns a text as the cell of a table."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    parts = " ".join(text.replace("``", "`").replace("|", "\\|").split()).split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def format_value(value: Any) -> str:
    """Returns a default as people write it in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, (list, tuple, dict)):
        return f"`{list(value)}`" if value else "none"
    return f"`{value}`" if value != "" else "none"


# Commands -------------------------------------------------------------------------------------------------------------


def list_commands(command: Command | None = None, words: tuple[str, ...] = ("memory3",)) -> Iterator[tuple[str, Any]]:
    """Yields the commands that can be run, each with its name, in the order of ``memory3 --help``."""
    command = typer.main.get_command(app) if command is None else command
    members: dict[str, Command] = getattr(command, "commands", {})
    if not members or command.params:
        yield " ".join(words), command
    for name, member in members.items():
        yield from list_commands(member, (*words, name))


def split_help(help_text: str) -> tuple[str, list[str]]:
    """Splits what a command says of itself into its description and its examples."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(help_text).split("\n\n")]
    examples = [part.removeprefix("Example: ") for part in paragraphs if part.startswith("Example: ")]
    return "\n\n".join(part for part in paragraphs if not part.startswith("Example: ")), examples


def describe_parameter(parameter: Any) -> list[str]:
    """Returns the cells of an option or argument: name, default, meaning."""
    is_argument = not parameter.opts[0].startswith("-")
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-"))
    annotation = parameter.type_descriptor.annotation
    value = parameter.metavar or PATH_LIKE.get(getattr(annotation, "__name__", ""), "")
    if is_argument:
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    elif not parameter.is_flag and value:
        names += f" {value}"
    default = "required" if parameter.required else format_value(parameter.default)
    bounds = [f"at least {parameter.min}"] if parameter.min is not None else []
    bounds += [f"at most {parameter.max}"] if parameter.max is not None else []
    meaning = (parameter.help or "") + (f" ({', '.join(bounds)})" if bounds else "")
    return [format_cell(names), "" if default in ("none", "`false`") else default, format_cell(meaning)]


def write_commands() -> str:
    """Returns the page of all commands."""
    groups = typer.main.get_command(app)
    parts = [
        GENERATED,
        "# The commands\n",
        "Every command, as `--help` has it. A known error is one line on standard error, beginning with `error:`, and "
        "exit code 1; wrong usage has exit code 2. `--json` prints the result as JSON on standard output; progress "
        "goes to standard error.\n",
    ]
    commands = list(list_commands(groups))
    parts.append("\n".join(f"- [`{name}`](#{name.replace(' ', '-')})" for name, _ in commands) + "\n")
    for name, command in commands:
        description, examples = split_help(command.help or command.callback.__doc__ or "")
        parts.append(f"## {name}\n\n{description.replace('<', '&lt;')}\n")
        rows = [describe_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts.append(format_table(["option", "default", "meaning"], rows))
        parts += [f"```sh\n{example}\n```\n" for example in examples]
    return "\n".join(parts)


def format_table(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# Settings -------------------------------------------------------------------------------------------------------------


def read_meanings(kind: type) -> dict[str, str]:
    """Returns what the docstring of a dataclass says of its fields."""
    found = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.MULTILINE)
    meanings: dict[str, str] = {}
    name = ""
    for line in (found[1] if found else "").splitlines():
        begun = re.match(r" {4}(\w+): (.*)", line)
        if begun:
            name = begun[1]
        meanings[name] = f"{meanings.get(name, '')} {begun[2] if begun else line.strip()}".strip()
    return meanings


def find_bound(config: Any, path: list[str], hint: Any) -> str:
    """Returns what a setting answers to values that are out of bounds, "" if it takes every value of its type."""
    kinds = typing.get_args(hint) or (hint,)
    values: list[Any] = []
    if int in kinds or float in kinds:
        # 200 lies within the bounds of sections, and beyond one of the whole.
        values = [-1, -(10**18), 10**18, 200]
        values += [0, -0.5, 1e300, math.nan] if float in kinds else [0]
    elif str in kinds:
        values = ["?"]
    bounds: list[str] = []
    for value in values:
        changes = functools.reduce(lambda inner, key: {key: inner}, reversed(path), value)
        try:
            apply_changes(config, changes)
        except InputError as error:
            found = re.search(rf"{path[-1]}.*? must be (?!of type|given)([^;]+)", str(error))
            if found and found[1] not in bounds:
                bounds.append(found[1])
    return "; ".join(bounds)


def list_sections(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields a configuration and the sections below it, each with its path."""
    yield path, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_sections(value, (*path, field.name))


def describe_section(whole: Any, path: tuple[str, ...], section: Any) -> str:
    """Returns the table of a section's own settings, "" if it has none."""
    meanings = read_meanings(type(section))
    hints = typing.get_type_hints(type(section))
    rows = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value) or field.metadata == NO_SETTING:
            continue
        bound = find_bound(whole, [*path, field.name], hints[field.name])
        default = CORES if field.name == "num_workers" else format_value(value)
        cells = [f"`{field.name}`", describe_type(hints[field.name]), default, bound, meanings.get(field.name, "")]
        rows.append([format_cell(cell) for cell in cells])
    return format_table(["key", "type", "default", "must be", "meaning"], rows) if rows else ""


def describe_type(hint: Any) -> str:
    """Returns the type of a setting in words."""
    if typing.get_origin(hint) is tuple:
        return f"list of {describe_type(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "table"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    kinds = typing.get_args(hint) or (hint,)
    return " or ".join(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)


def describe_config(title: str, introduction: str, config: Any) -> str:
    """Returns the part of the page for one configuration."""
    parts = [f"## {title}\n", introduction + "\n"]
    for path, section in list_sections(config):
        table = describe_section(config, path, section)
        if table:
            name = ".".join(path)
            summary = inspect.cleandoc(type(section).__doc__ or "").split("\n\n")[0]
            heading = f"### {title}: `{name}`\n\n{format_cell(summary)}\n" if name else "At the top of the file:\n"
            parts.append(f"{heading}\n{table}")
    return "\n".join(parts)


def describe_presets() -> str:
    """Returns the table of what the presets of the filters, and of the whole, change."""
    presets = {name: dataclasses.asdict(make()) for name, make in FILTER_PRESETS.items()}
    names = [name for name in presets if name != "none"]
    rows = []
    for key in presets["none"]:
        values = [presets[name][key] for name in names]
        if any(value is not None for value in values):
            rows.append([f"`{key}`", *(format_value(value) if value is not None else "" for value in values)])
    described = [f"`{name}`: {format_cell(inspect.getdoc(make) or '')}" for name, make in PRESETS.items()]
    return (
        "## Presets\n\n`--preset`: "
        + " ".join(described)
        + "\n\n`--filters` sets the section `filtering`; all bounds that a preset does not name are off:\n\n"
        + format_table(["key", *names], rows)
    )


def write_settings() -> str:
    """Returns the page of all settings."""
    from flows.aligning import make_dpo_config, make_sft_config
    from flows.deploying import DeploymentConfig
    from flows.learning import make_evaluation
    from flows.preparing import PrepareConfig
    from flows.training import make_continual_config, make_warmup_config

    parts = [
        GENERATED,
        "# The settings\n",
        "A file for `--config` is YAML or TOML; it changes a preset, and options of the command line change both. "
        "An unknown key, a value of another type or out of bounds is an error that names the key. A manifest stores "
        "the settings a version was made with.\n",
        "```yaml\nchunking: {max_tokens: 96, boundary: line}\ndeduplication: {threshold: 0.7, keep: first}\n"
        "memory: {codec: turbo4}\n```\n",
        describe_config("build", "For `memory3 build --config`; `update` keeps them.", BuildConfig()),
        describe_presets(),
        describe_config("train prepare", "For `memory3 train prepare --config`.", PrepareConfig()),
        describe_config("train warmup", "For `memory3 train warmup --config`.", make_warmup_config(1000)),
        describe_config(
            "train continual",
            "For `memory3 train continual --config`: the keys of `train warmup` with other defaults.",
            make_continual_config(1000),
        ),
        describe_config("train sft", "For `memory3 train sft --config`.", make_sft_config(1000)),
        describe_config("train dpo", "For `memory3 train dpo --config`.", make_dpo_config(1000)),
        describe_config("evaluate", "For the flow `evaluate`, as its parameter `config`.", make_evaluation(["text"])),
        describe_config(
            "deployments",
            "For `memory3 deploy --file`: a list `deployments` of these; a key beside the list holds for all of it.",
            DeploymentConfig(bank="my-bank"),
        ).replace("`my-bank`", "none"),
    ]
    return "\n".join(parts)


# Views ----------------------------------------------------------------------------------------------------------------


def write_views() -> str:
    """Returns the page of the views of SQL, with their columns as DuckDB describes them."""
    from flows.building import build
    from flows.steps import Steps
    from pipelines.inspecting import VIEWS, open_views
    from schemas.bank import Bank
    from schemas.stores import LocalStore

    listed = re.findall(r"^\| (`.+?) \| (.+?) \|$", SQL_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    rows = {name: row for names, row in listed for name in re.findall(r"`(\w+)`", names)}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "note.txt"
        text.write_text("A bank of a single note has all views.")
        store = LocalStore(Path(folder) / "bank")
        changes = {"memory": {"cold": True}, "engine": {"runner": "loop"}, "document_deduplication": {"enabled": True}}
        build(store, [str(text)], apply_changes(BuildConfig(), changes), Steps())
        with open_views(Bank.open(store)) as views:
            described = {name: views.connection.execute(f'DESCRIBE "{name}"').fetchall() for name in VIEWS}
    parts = [
        GENERATED,
        "# The views of SQL\n",
        "What `memory3 sql` shows of a version, column by column, with DuckDB's types. "
        "[FORMAT.md](../../schemas/FORMAT.md#tables) says what the columns mean, [A bank in SQL](../sql.md) asks ten "
        "questions. Sizes of vectors are those of a bank with the shipped embedder.\n",
    ]
    for name in VIEWS:
        columns = [[f"`{column}`", f"`{kind}`"] for column, kind, *_ in described[name]]
        parts.append(f"## {name}\n\nA row is {rows[name]}.\n\n{format_table(['column', 'type'], columns)}")
    return "\n".join(parts)


PAGES = {"cli.md": write_commands, "settings.md": write_settings, "views.md": write_views}


def main() -> None:
    """Writes all pages."""
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main()
