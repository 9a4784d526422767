"""The structured parts of documents: headers at their beginning, and tables of fields within them.

    text -> **sections**, each with its fields as they stand there -> facts (:mod:`flows.evaluating.knowledge.facts`)

Four forms are known, by what they look like and not by whose they are: ``Name: value`` lines with continuation lines,
as in mails and Python Enhancement Proposals; front matter between lines of ``---``; bullets ``- Name: value`` as in
Rust RFCs; and, anywhere in a document, a fenced table of ``Name: value`` lines under a heading, as the parameters of a
command have it.
"""

import dataclasses
import re
from collections.abc import Iterator

MAIL, FRONT_MATTER, BULLETS, TABLE = "mail header", "front matter", "bullets", "table"

MIN_FIELDS = {MAIL: 3, FRONT_MATTER: 1, BULLETS: 2, TABLE: 4}
"""Fewer lines that happen to have a colon make no section."""

MAX_HEADER_LINES = 60
"""Where the search for a header's end stops."""

_MAIL_FIELD = re.compile(r"([A-Za-z][A-Za-z0-9-]*):(?:[ \t]+(.*))?$")
_FRONT_FIELD = re.compile(r"([A-Za-z][\w .-]*?):(?:[ \t]+(.*))?$")
_BULLET_FIELD = re.compile(r"[-*+] ([A-Za-z][\w #.-]{0,40}?):(?:[ \t]+(.*))?$")
_TABLE_FIELD = re.compile(r"([A-Za-z][\w .#-]{0,40}?):(?:[ \t]+(.*))?$")
_HEADING = re.compile(r"#{1,6}[ \t]+(.+?)[ \t]*#*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a section.

    Attributes:
        name: its name.
        value: its value on one line; None for what is no single value, as a list.
        line: the line of the document that it begins on, from 1.
    """

    name: str
    value: str | None
    line: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A structured part of a document.

    Attributes:
        form: which of the four forms.
        headings: of a table the headings that it stands under, as they are written: the first of the document, and the
            nearest; empty for a header.
        fields: its fields in order; a name that is there twice is there once, without a value.
    """

    form: str
    headings: tuple[str, ...]
    fields: tuple[Field, ...]


def find_sections(text: str) -> list[Section]:
    """Returns the header of a document, if it has one, and its tables."""
    lines = text.removeprefix("\N{BYTE ORDER MARK}").splitlines()
    header = _read_front_matter(lines) or _read_mail_header(lines) or _read_bullets(lines)
    return [*([header] if header else []), *_read_tables(lines)]


def _make_section(form: str, fields: list[Field], headings: tuple[str, ...] = ()) -> Section | None:
    distinct: dict[str, Field] = {}
    for field in fields:
        known = distinct.get(field.name)
        distinct[field.name] = field if known is None else dataclasses.replace(known, value=None)
    if len(distinct) < MIN_FIELDS[form]:
        return None
    return Section(form=form, headings=headings, fields=tuple(distinct.values()))


def _read_front_matter(lines: list[str]) -> Section | None:
    """Reads the top level of a block between ``---`` lines; what is indented below a field makes it no single value."""
    if not lines or lines[0].strip() != "---":
        return None
    fields: list[Field] = []
    for number, line in enumerate(lines[1 : MAX_HEADER_LINES + 1], start=2):
        if line.strip() in ("---", "..."):
            return _make_section(FRONT_MATTER, fields)
        found = _FRONT_FIELD.match(line)
        if found:
            fields.append(Field(name=found[1].strip(), value=(found[2] or "").strip(), line=number))
        elif line.strip() and fields and not line.startswith("#"):
            fields[-1] = dataclasses.replace(fields[-1], value=None)
    return None


def _read_mail_header(lines: list[str]) -> Section | None:
    """Reads ``Name: value`` lines up to an empty one; indented lines go on with the value above."""
    start = _skip_empty(lines)
    fields: list[Field] = []
    for number, line in enumerate(lines[start : start + MAX_HEADER_LINES], start=start + 1):
        if not line.strip():
            return _make_section(MAIL, fields)
        found = _MAIL_FIELD.match(line)
        if found:
            fields.append(Field(name=found[1].strip(), value=(found[2] or "").strip(), line=number))
        elif line[0] in " \t" and fields:
            joined = f"{fields[-1].value} {line.strip()}".strip()
            fields[-1] = dataclasses.replace(fields[-1], value=joined)
        else:
            return None  # prose, or a heading, and no header
    return None


def _read_bullets(lines: list[str]) -> Section | None:
    """Reads bullets at the beginning of a document, headings before them aside."""
    start = _skip_empty(lines)
    while start < len(lines) and (_HEADING.match(lines[start]) or not lines[start].strip()):
        start += 1
    fields: list[Field] = []
    for number, line in enumerate(lines[start : start + MAX_HEADER_LINES], start=start + 1):
        found = _BULLET_FIELD.match(line)
        if found:
            fields.append(Field(name=found[1].strip(), value=(found[2] or "").strip(), line=number))
        elif line[:1] in (" ", "\t") and line.strip() and fields:
            fields[-1] = dataclasses.replace(fields[-1], value=None)
        else:
            break
    return _make_section(BULLETS, fields)


def _read_tables(lines: list[str]) -> Iterator[Section]:
    """Yields the fenced blocks that consist of ``Name: value`` lines alone."""
    first = nearest = ""
    block: list[tuple[int, str]] | None = None
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith(("```", "~~~")):
            if block is None:
                block = []
                continue
            section = _read_table(block, tuple(dict.fromkeys(filter(None, (first, nearest)))))
            if section is not None:
                yield section
            block = None
        elif block is not None:
            block.append((number, line))
        elif _HEADING.match(line):
            first, nearest = first or line.strip(), line.strip()


def _read_table(block: list[tuple[int, str]], headings: tuple[str, ...]) -> Section | None:
    fields = []
    for number, line in block:
        found = _TABLE_FIELD.match(line.rstrip())
        if found:
            fields.append(Field(name=found[1].strip(), value=(found[2] or "").strip(), line=number))
        elif line.strip():
            return None
    return _make_section(TABLE, fields, headings) if headings else None


def _skip_empty(lines: list[str]) -> int:
    return next((place for place, line in enumerate(lines) if line.strip()), len(lines))
