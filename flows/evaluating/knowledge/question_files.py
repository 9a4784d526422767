"""Files with questions in the formats of SQuAD, HaluEval (questions and answers) and TruthfulQA.

    file -> **questions** with the text that answers them -> tests (:mod:`flows.evaluating.knowledge.file_tests`)

Each reader says in one line where a file is not what it should be: the line, or the place in the JSON document, and the
field.
"""

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from schemas.errors import InputError
from schemas.identifiers import hash_json

T = TypeVar("T")

CSV_COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")

ANSWER_SEPARATOR = ";"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileQuestion:
    """A question of a file.

    Attributes:
        key: its name in every run.
        question: the question in words.
        knowledge: the text that it is asked about; empty if the file has none.
        topic: questions of one topic can lend each other wrong answers; empty for none.
        right: right answers, the best one first; empty where the text does not answer the question.
        wrong: wrong answers.
    """

    key: str
    question: str
    knowledge: str = ""
    topic: str = ""
    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question of TruthfulQA.

    Attributes:
        key: its name in every run.
        question: the question in words.
        single: the answers of MC1, the best one first, all others wrong.
        right: the right answers of MC2.
        wrong: the wrong answers of MC2.
    """

    key: str
    question: str
    single: tuple[str, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...]


Q = TypeVar("Q", FileQuestion, ChoiceQuestion)


def read_squad(path: Path) -> list[FileQuestion]:
    """Reads questions in SQuAD's format, version 1 or 2; one that is impossible has no right answer.

    Raises:
        InputError: the file cannot be read, or is not of the format.
    """
    document = _load(path, _read_text(path))
    questions = []
    for place, article in _list(path, "", document, "data"):
        title = article.get("title", "") if isinstance(article, dict) else ""
        for part, paragraph in _list(path, place, article, "paragraphs"):
            context = _get(path, part, paragraph, "context", str)
            for where, row in _list(path, part, paragraph, "qas"):
                is_impossible = row.get("is_impossible", False) if isinstance(row, dict) else False
                answers = [_get(path, at, one, "text", str) for at, one in _list(path, where, row, "answers")]
                if not answers and not is_impossible:
                    raise InputError(f"{path}: {where} has no answer; give one, or set is_impossible to true")
                plausible = row.get("plausible_answers") or []
                questions.append(
                    FileQuestion(
                        key=str(_get(path, where, row, "id", (str, int))),
                        question=_get(path, where, row, "question", str).strip(),
                        knowledge=context,
                        topic=str(title),
                        right=() if is_impossible else tuple(dict.fromkeys(answers)),
                        wrong=tuple(str(one.get("text", "")) for one in plausible if isinstance(one, dict)),
                    )
                )
    return _check(path, questions)


def read_halueval(path: Path) -> list[FileQuestion]:
    """Reads questions in the format of HaluEval's ``qa_data.json``: an object a line.

    Raises:
        InputError: the file cannot be read, or is not of the format.
    """
    questions = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        row = _load(path, line, where)
        question, knowledge = (_get(path, where, row, name, str).strip() for name in ("question", "knowledge"))
        questions.append(
            FileQuestion(
                key=hash_json([question, knowledge]),
                question=question,
                knowledge=knowledge,
                right=(_get(path, where, row, "right_answer", str).strip(),),
                wrong=(_get(path, where, row, "hallucinated_answer", str).strip(),),
            )
        )
    return _check(path, number_repeats(questions))


def read_truthfulqa(path: Path) -> list[ChoiceQuestion]:
    """Reads questions in TruthfulQA's formats: ``TruthfulQA.csv``, or JSON with the targets of MC1 and MC2.

    In CSV answers are separated by semicolons and end with a full stop, as TruthfulQA's own code has it; the wrong
    answers of MC1 are all wrong ones. In JSON the targets are an object of answers and labels, or one with ``choices``
    and ``labels``; it is a list, or an object a line.

    Raises:
        InputError: the file cannot be read, or is not of the format.
    """
    text = _read_text(path)
    if text.lstrip()[:1] not in ("[", "{"):
        return _check(path, number_repeats(_read_choice_rows(path, text)))
    if text.lstrip().startswith("["):
        rows = [(f"[{place}]", row) for place, row in enumerate(_load(path, text))]
    else:
        lines = enumerate(text.splitlines(), start=1)
        rows = [(f"line {number}", _load(path, line, f"line {number}")) for number, line in lines if line.strip()]
    questions = []
    for where, row in rows:
        single = _read_targets(path, where, row, "mc1_targets")
        several = _read_targets(path, where, row, "mc2_targets")
        best = [answer for answer, label in single.items() if label]
        if len(best) != 1:
            raise InputError(f"{path}: {where}, mc1_targets has {len(best)} right answers, must have 1")
        question = _get(path, where, row, "question", str).strip()
        questions.append(
            ChoiceQuestion(
                key=hash_json([question]),
                question=question,
                single=(*best, *(answer for answer, label in single.items() if not label)),
                right=tuple(answer for answer, label in several.items() if label),
                wrong=tuple(answer for answer, label in several.items() if not label),
            )
        )
    return _check(path, number_repeats(questions))


def number_repeats(questions: Iterable[Q]) -> list[Q]:
    """Returns questions, of which those with a key that stood before have it with a number: ``KEY:2``, ``KEY:3``."""
    counts: Counter[str] = Counter()
    numbered = []
    for question in questions:
        counts[question.key] += 1
        number = counts[question.key]
        numbered.append(question if number == 1 else dataclasses.replace(question, key=f"{question.key}:{number}"))
    return numbered


def _read_choice_rows(path: Path, text: str) -> Iterator[ChoiceQuestion]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}: line 1 has no column {missing[0]!r}; it must have {', '.join(CSV_COLUMNS)}")
    try:
        for row in reader:
            where = f"line {reader.line_num}"
            question, best, right, wrong = (_get(path, where, row, name, str) for name in CSV_COLUMNS)
            (best,) = _split_answers(best)[:1] or [""]
            rights, wrongs = _split_answers(right), _split_answers(wrong)
            for name, value in (("Best Answer", best), ("Incorrect Answers", wrongs)):
                if not value:
                    raise InputError(f"{path}: {where}, column {name!r} is empty; it must hold an answer")
            others = [answer for answer in wrongs if answer != best]
            if not others:
                raise InputError(f"{path}: {where} has no wrong answer but the best one; give another")
            yield ChoiceQuestion(
                key=hash_json([question.strip()]),
                question=question.strip(),
                single=(best, *others),
                right=tuple(dict.fromkeys([best, *rights])),
                wrong=tuple(wrongs),
            )
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is no CSV: {error}") from error


def _split_answers(text: str) -> list[str]:
    answers = [answer.strip() for answer in text.split(ANSWER_SEPARATOR)]
    return list(dict.fromkeys(answer if answer.endswith(".") else f"{answer}." for answer in answers if answer))


def _read_targets(path: Path, where: str, row: Any, name: str) -> dict[str, bool]:
    targets = _get(path, where, row, name, dict)
    if set(targets) == {"choices", "labels"} and isinstance(targets["choices"], list):
        choices, labels = targets["choices"], targets["labels"]
        if not isinstance(labels, list) or len(choices) != len(labels):
            raise InputError(f"{path}: {where}, {name} has {len(choices)} choices, and must have as many labels")
        targets = dict(zip(map(str, choices), labels, strict=True))
    if not all(label in (0, 1) for label in targets.values()) or len(set(map(bool, targets.values()))) < 2:
        raise InputError(f"{path}: {where}, {name} must have right answers with the label 1, and wrong ones with 0")
    for answer in targets:
        _check_text(path, where, name, answer)
    return {answer: bool(label) for answer, label in targets.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _load(path: Path, text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where or f"line {error.lineno}"
        raise InputError(f"{path}: {place} is no JSON: {error.msg}, column {error.colno}") from error


def _list(path: Path, where: str, row: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields the items of a list with their places, as ``data[3].paragraphs[0]``."""
    place = f"{where}.{name}" if where else name
    for number, item in enumerate(_get(path, where or "the document", row, name, list)):
        yield f"{place}[{number}]", item


def _get(path: Path, where: str, row: Any, name: str, kind: type[T] | tuple[type, ...]) -> T:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kinds) or value == "" or isinstance(value, bool):
        names = {str: "text", list: "list", dict: "object", int: "number"}
        expected = " or ".join(names[one] for one in kinds)
        raise InputError(f"{path}: {where} has no field {name!r} with a {expected}; it must have one")
    if isinstance(value, str):
        _check_text(path, where, name, value)
    return value  # type: ignore[return-value]


def _check_text(path: Path, where: str, name: str, text: str) -> None:
    """Makes sure that a text can be written: JSON can escape halves of characters that are none by themselves."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        message = f"{path}: {where}, field {name!r} has half a character, \\u{code:04x}; write the whole one, or none"
        raise InputError(message) from error


def _check(path: Path, questions: list[T]) -> list[T]:
    """Makes sure that there is a question, and no two have one key.

    Raises:
        InputError: that is not so.
    """
    if not questions:
        raise InputError(f"{path} has no question; give a file with one at least")
    keys: set[str] = set()
    for question in questions:
        key = question.key  # type: ignore[attr-defined]
        if key in keys:
            raise InputError(f"{path}: two questions are called {key!r}; give each another id or wording")
        keys.add(key)
    return questions
