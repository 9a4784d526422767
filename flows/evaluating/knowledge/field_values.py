"""The values of fields: as they are asked for, of which kind they are, and which of them are none.

Stands between sections (:mod:`flows.evaluating.knowledge.headers`) and facts
(:mod:`flows.evaluating.knowledge.facts`). Kinds are told by the looks of a value alone, whatever its field is called.
"""

import re

NUMBER, DATE, NAME, OTHER = "number", "date", "name", "other"
"""Kinds of values."""

MAX_VALUE_WORDS = 12

EMPTY, LIST, LINK, LONG = "no value", "no single value", "a link", "more than 12 words"

_NOTHING = {"", "n/a", "na", "none", "null", "nil", "tbd", "tba", "unknown", "-"}
_LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
_MAIL = re.compile(r"\s*<[^>\s]*(?:@| at )[^>]*>|\S+@\S+\.\w+")
_URL = re.compile(r"\b\w+://|\bwww\.")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATE = re.compile(
    rf"\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{4}}|\d{{1,2}}[- ]{_MONTH}[- ,]+\d{{4}}|"
    rf"{_MONTH}[- ]\d{{1,2}},? \d{{4}}|\d{{4}}年\d{{1,2}}月\d{{1,2}}日",
    re.I,
)
_NUMBER = re.compile(r"(?:[\w.-]+/)*[\w.-]*#?[+-]?\d[\d.,:x]*\+?%?$")
_WORD = re.compile(r"\w+")
_PERSON = re.compile(r"[A-Z][\w.'\u2019-]*(?: (?:de|van|von|der|la|el|da|[A-Z][\w.'\u2019-]*))+$")


def clean_value(value: str) -> str:
    """Returns a value without marks of text, link targets and mail addresses."""
    value = _MAIL.sub("", _LINK.sub(r"\1", value))
    value = " ".join(value.replace("`", "").split())
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1].strip()
    return value.strip(" ,")


def name_kind(value: str) -> str:
    """Returns the kind of a value by its looks: number, date, name of a person or people, or other."""
    if _DATE.fullmatch(value):
        return DATE
    if _NUMBER.match(value) and any(letter.isdigit() for letter in value):
        return NUMBER
    return NAME if all(_PERSON.match(part) for part in re.split(r",\s*|\s+and\s+", value)) else OTHER


def judge_value(value: str | None) -> tuple[str, str]:
    """Returns a value as it is asked for, and why it is none, empty if it is one."""
    if value is None:
        return "", LIST
    if _URL.search(_LINK.sub(r"\1", value)):
        return "", LINK
    if value.startswith(("[", "{")) and value.endswith(("]", "}")):
        return "", LIST
    cleaned = clean_value(value)
    if cleaned.casefold() in _NOTHING or not _WORD.search(cleaned):
        return "", EMPTY
    return cleaned, LONG if len(cleaned.split()) > MAX_VALUE_WORDS else ""


def gives_away(before: str, value: str, kind: str) -> bool:
    """Tells whether what stands before a value says it: its words in their order, or of ``rust#12`` the number."""
    words = [word.lstrip("0") for word in _split_words(before)]
    wanted = [word.lstrip("0") for word in _split_words(value)]
    if kind == NUMBER and wanted[-1].isdigit() and any(letter.isalpha() for letter in value):
        wanted = wanted[-1:]
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


def _split_words(text: str) -> list[str]:
    """Returns letters and digits as they follow each other, without what stands between."""
    return _WORD.findall(text.replace("_", " ").casefold())
