"""The files of questions that a run is asked with, read before anything is computed.

    options -> files (:mod:`flows.evaluating.knowledge.question_files`) -> **questions**
    -> tests (:mod:`flows.evaluating.knowledge.file_tests`)

All of them are read first, so that a wrong file is told at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flows.evaluating.knowledge.question_files import (
    ChoiceQuestion,
    FileQuestion,
    number_repeats,
    read_halueval,
    read_squad,
    read_truthfulqa,
)
from schemas.bank import Bank
from schemas.identifiers import hash_bytes
from schemas.stores import open_store
from schemas.tags import find_version

SQUAD, HALUEVAL, TRUTHFULQA = "SQuAD", "HaluEval-QA", "TruthfulQA"


class FileOptions(Protocol):
    """What of the suite's options is meant for files."""

    @property
    def squad(self) -> tuple[Path, ...]:
        """Files in SQuAD's format."""
        ...

    @property
    def halueval(self) -> tuple[Path, ...]:
        """Files in HaluEval's format."""
        ...

    @property
    def truthfulqa(self) -> tuple[Path, ...]:
        """Files in TruthfulQA's format."""
        ...

    @property
    def bank(self) -> str | None:
        """The bank that is read for TruthfulQA."""
        ...

    @property
    def version(self) -> str | None:
        """The version of it."""
        ...

    @property
    def num_alternatives(self) -> int:
        """Wrong answers of a question of SQuAD."""
        ...

    @property
    def numbers(self) -> list[int]:
        """How many memories are read."""
        ...

    @property
    def limit(self) -> int | None:
        """Questions of each file."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadFiles:
    """The questions of all files.

    Attributes:
        squad: of files in SQuAD's format.
        halueval: of files in HaluEval's format.
        truthfulqa: of files in TruthfulQA's format.
        sha256: digests of the files.
        bank: what is read for TruthfulQA; None for nothing.
    """

    squad: list[FileQuestion]
    halueval: list[FileQuestion]
    truthfulqa: list[ChoiceQuestion]
    sha256: dict[str, str]
    bank: Bank | None

    @property
    def num_questions(self) -> int:
        """All of them."""
        return sum(self.count().values())

    def count(self) -> dict[str, int]:
        """Returns the number of questions of each kind."""
        return {SQUAD: len(self.squad), HALUEVAL: len(self.halueval), TRUTHFULQA: len(self.truthfulqa)}

    def describe(self) -> dict[str, Any]:
        """Returns what was read as JSON values."""
        known = None if self.bank is None else {"bank": self.bank.url, "version": self.bank.manifest.version}
        return {"questions": self.count(), "sha256": self.sha256, "bank": known}


def read_files(options: FileOptions) -> ReadFiles:
    """Reads all files, and opens the bank for TruthfulQA.

    Raises:
        InputError: a file is not of its format.
        BankError: the bank cannot be opened.
    """
    files = (*options.squad, *options.halueval, *options.truthfulqa)
    bank = None
    if options.bank is not None:
        store = open_store(options.bank)
        bank = Bank.open(store, find_version(store, options.version))
    return ReadFiles(
        squad=_read_all(options.squad, read_squad, options.limit),
        halueval=_read_all(options.halueval, read_halueval, options.limit),
        truthfulqa=_read_all(options.truthfulqa, read_truthfulqa, options.limit),
        sha256={str(path): hash_bytes(path.read_bytes()) for path in files},
        bank=bank,
    )


def _read_all(paths: Sequence[Path], read: Callable[[Path], list[Any]], limit: int | None) -> list[Any]:
    questions = [question for path in paths for question in read(path)[:limit]]
    return number_repeats(questions)  # the same name in two files is another question
