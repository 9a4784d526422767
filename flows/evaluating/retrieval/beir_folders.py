"""Folders in the format of BEIR: a corpus, queries, and which documents answer which query, from none to very well.

    corpus.jsonl       {"_id", "title", "text"} a line
    queries.jsonl      {"_id", "text"} a line
    qrels/test.tsv     query-id, corpus-id, score, separated by tabs, with a header

The corpus becomes a bank by the project's own build, with cold memories and without rules that drop documents. A
document may be several references: it is ranked by its best, and by the one kept of those that are near-duplicates.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from flows.evaluating.retrieval.questions import Question
from model.retrieving import Hit
from schemas.bank import Bank
from schemas.errors import InputError

BEIR = "beir"

CORPUS_FILE, QUERIES_FILE, JUDGEMENTS_FILE = "corpus.jsonl", "queries.jsonl", "qrels/test.tsv"

BUILD_SETTINGS: dict[str, Any] = {
    "reading": {"id_column": "_id", "text_column": "text", "title_column": "title", "metadata_columns": ["title"]},
    "chunking": {"title_prefix": True},
    "memory": {"cold": True},
}
"""How the corpus is read: titles stand before each reference, as BEIR's own rankers see them."""


def locate_file(folder: Path, name: str) -> Path:
    """Returns the path of one of the files of a folder.

    Raises:
        InputError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(
            f"{folder} has no {name}; give a folder with {CORPUS_FILE}, {QUERIES_FILE} and {JUDGEMENTS_FILE}"
        )
    return path


def _read_queries(path: Path) -> dict[str, str]:
    queries: dict[str, str] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number} is no JSON: {error}; write an object with _id and text"
                ) from error
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("_id", "text")):
                raise InputError(f"{path}, line {number} has no strings _id and text; write both")
            queries[row["_id"]] = row["text"]
    return queries


def _iterate_judgements(path: Path) -> Iterator[tuple[str, str, float]]:
    with path.open(encoding="utf-8", newline="") as stream:
        lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(lines, None)  # the header
        for line in lines:
            try:
                query, document, score = line
                yield query, document, float(score)
            except ValueError as error:
                place = f"{path}, line {lines.line_num}"
                raise InputError(f"{place} is not query-id, corpus-id and score, separated by tabs") from error


def read_questions(folder: Path) -> list[Question]:
    """Returns the queries of a folder that some document answers, in the order of the file; answers are documents.

    Raises:
        InputError: a file is missing or not as described, or no query has an answer.
    """
    queries = _read_queries(locate_file(folder, QUERIES_FILE))
    path = locate_file(folder, JUDGEMENTS_FILE)
    answers: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for query, document, score in _iterate_judgements(path):
        if query not in queries:
            raise InputError(f"{path} judges the query {query!r}, which {QUERIES_FILE} does not have; restore it")
        if score > 0:
            answers[query][document] = score
    found = [
        Question(key=f"{BEIR}/{query}", item=f"{BEIR}/{query}", kind=BEIR, source="", text=text, answers=answers[query])
        for query, text in queries.items()
        if answers.get(query)
    ]
    if not found:
        raise InputError(f"{path} has no query with an answer whose score is above 0; give another folder")
    return found


def get_query_id(question: Question) -> str:
    """Returns the id that a question of :func:`read_questions` has in its folder."""
    return question.key.removeprefix(f"{BEIR}/")


class DocumentRanking:
    """Turns rankings of references into rankings of documents."""

    def __init__(self, bank: Bank) -> None:
        """Reads where the references of a version stand.

        Raises:
            BankFormatError: a table is missing or damaged.
        """
        places = bank.read_table("occurrences", ["doc_id", "ref_id"])
        kept_of: dict[str, str] = {}
        if bank.manifest.list_files("duplicates"):
            rows = bank.read_table("duplicates", ["ref_id", "kept_ref_id"])
            kept_of = dict(zip(rows["ref_id"].to_pylist(), rows["kept_ref_id"].to_pylist(), strict=True))
        documents: defaultdict[str, set[str]] = defaultdict(set)
        for doc_id, ref_id in zip(places["doc_id"].to_pylist(), places["ref_id"].to_pylist(), strict=True):
            documents[kept_of.get(ref_id, ref_id)].add(doc_id)
        self._documents = {ref_id: sorted(found) for ref_id, found in documents.items()}

    def rank(self, hits: list[Hit], query_id: str) -> list[str]:
        """Returns the documents of references, best first, each at the place of its best reference.

        Args:
            hits: the references, best first.
            query_id: the query's id; the document with the same id is left out, as BEIR does: some queries are
                documents of the corpus.
        """
        found = dict.fromkeys(doc_id for hit in hits for doc_id in self._documents[hit.ref_id])
        return [doc_id for doc_id in found if doc_id != query_id]
