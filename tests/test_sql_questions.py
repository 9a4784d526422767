"""The questions of docs/sql.md are asked of a real bank, and each answer is computed again without SQL."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.building import build, update
from flows.config import BuildConfig, apply_changes
from flows.history import compare_versions
from flows.steps import Steps
from pipelines.inspecting import VIEWS, open_views, run_query
from pipelines.running import LOOP_RUNNER
from schemas.bank import Bank
from schemas.stores import LocalStore
from schemas.tags import set_tag
from tests.corpora import make_documents, write_lines

PAGE = (Path(__file__).parents[1] / "docs" / "sql.md").read_text(encoding="utf-8")

QUESTIONS = {
    int(number): sql
    for number, sql in re.findall(r"^### (\d+)\..*?^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}

SENTENCE = "convenient way to insert debugging assertions"

Row = dict[str, Any]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Two versions; the second lacks a document and has a changed one. Near-copies are in both."""
    folder = tmp_path_factory.mktemp("questions")
    documents = make_documents()
    for document in documents[:4]:
        text = document["text"].replace("the", "every", 3).replace("statement", "sentence", 1)
        documents.append({"id": f"edited/{document['id']}", "text": text, "source": "edited"})
    corpus = write_lines(folder / "corpus.jsonl", documents)
    store = LocalStore(folder / "bank")
    changes = {
        "engine": {"runner": LOOP_RUNNER},
        "deduplication": {"threshold": 0.5},
        "embedding": {"embedder": "static"},
    }
    build(store, [str(corpus)], apply_changes(BuildConfig(), changes), Steps())
    set_tag(store, "before", 1)
    documents[5]["text"] += "\nOne more sentence, which nobody has written before."
    write_lines(corpus, [document for document in documents if document["id"] != "topic/del"])
    update(store, None, {"runner": LOOP_RUNNER}, Steps())
    return Bank.open(store)


@pytest.fixture
def ask(bank: Bank) -> Callable[[int], list[Row]]:
    def run(number: int) -> list[Row]:
        with open_views(bank) as views:
            return list(run_query(views, QUESTIONS[number]).to_pylist())

    return run


def read(bank: Bank, kind: str) -> list[Row]:
    return list(bank.read_table(kind).to_pylist()) if bank.manifest.list_files(kind) else []


def read_live(bank: Bank, kind: str) -> dict[str, Row]:
    dropped = set(bank.read_dropped_ids().to_pylist())
    return {row["ref_id"]: row for row in read(bank, kind) if row["ref_id"] not in dropped}


def group_documents(bank: Bank) -> dict[str, set[str]]:
    found = defaultdict(set)
    for row in read(bank, "occurrences"):
        found[row["ref_id"]].add(row["doc_id"])
    return found


def test_there_are_ten_questions_and_every_view_is_named() -> None:
    assert sorted(QUESTIONS) == list(range(1, 11))
    table = "".join(line for line in PAGE.splitlines() if line.startswith("|"))
    assert {name for name in VIEWS if f"`{name}`" in table} == set(VIEWS)


def test_documents_by_source(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    documents = read(bank, "documents")
    rows = {row["source"]: row for row in ask(1)}
    assert rows.keys() == {"topics", "copies", "laws", "edited"}
    for source, row in rows.items():
        members = [document for document in documents if document["source"] == source]
        assert row["num_documents"] == len(members)
        assert row["first_document"] == min(document["doc_id"] for document in members)
        for name in ("num_chars", "num_references"):
            assert row[name] == sum(document[name] for document in members)


def test_where_a_sentence_stands(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    texts = {document["id"]: document["text"] for document in make_documents()}
    rows = ask(2)
    assert SENTENCE in QUESTIONS[2]
    holders = {row["ref_id"] for row in read(bank, "references") if SENTENCE in row["text"]}
    expected = [(row["doc_id"], row["ordinal"]) for row in read(bank, "occurrences") if row["ref_id"] in holders]
    assert [(row["doc_id"], row["ordinal"]) for row in rows] == sorted(expected)
    assert {row["doc_id"] for row in rows} >= {"topic/assert"}
    for row in rows:
        if row["doc_id"] in texts:
            assert SENTENCE in texts[row["doc_id"]][row["start_char"] : row["end_char"]]
        assert row["kept_ref_id"] in read_live(bank, "references")


def test_near_duplicates_and_who_shares_them(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    stored = {row["ref_id"]: row for row in read(bank, "duplicates")}
    documents = group_documents(bank)
    rows = ask(3)
    assert len(rows) == len(stored) > 2
    assert [row["jaccard"] for row in rows] == sorted(row["jaccard"] for row in rows)
    for row in rows:
        for name in ("kept_ref_id", "jaccard", "matched_jaccard"):
            assert row[name] == stored[row["ref_id"]][name]
        assert row["matched_jaccard"] >= 0.5
        assert row["documents"] == sorted(documents[row["ref_id"]])
        assert row["kept_documents"] == sorted(documents[row["kept_ref_id"]])


def test_what_was_dropped(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    expected = {("document", reason): number for reason, number in bank.manifest.counts["documents"]["dropped"].items()}
    expected |= {
        ("reference", reason): number for reason, number in bank.manifest.counts["references"]["dropped"].items()
    }
    assert {(row["what"], row["reason"]): row["num_dropped"] for row in ask(4)} == expected
    assert {("document", "empty"), ("reference", "near_duplicate"), ("reference", "exact_duplicate")} <= expected.keys()


def test_references_in_most_documents(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    live = read_live(bank, "references")
    documents = group_documents(bank)
    places = Counter(row["ref_id"] for row in read(bank, "occurrences"))
    order = sorted(live, key=lambda ref_id: (-len(documents[ref_id]), -places[ref_id], ref_id))
    rows = ask(5)
    assert [row["ref_id"] for row in rows] == order[:10]
    assert rows[0]["num_documents"] >= 2
    for row in rows:
        assert (row["num_documents"], row["num_places"]) == (len(documents[row["ref_id"]]), places[row["ref_id"]])
        assert row["text"] == live[row["ref_id"]]["text"]


def test_tokens_of_a_memory(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    references, memories = read_live(bank, "references"), read_live(bank, "memories")
    assert references.keys() == memories.keys()
    expected = []
    for ref_id in sorted(memories):
        heads = Counter(place for place in memories[ref_id]["offsets"] if place != 255)
        for place, num_heads in sorted(heads.items(), key=lambda item: (-item[1], item[0])):
            expected.append((ref_id, place, references[ref_id]["token_ids"][place], num_heads))
    assert [tuple(row.values()) for row in ask(6)] == expected[:40]


def test_bytes_by_kind(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    rows = {row["kind"]: row for row in ask(7)}
    assert rows.keys() == {file.kind for file in bank.manifest.files}
    for kind, row in rows.items():
        paths = bank.locate_all(kind)
        assert row["size_bytes"] == sum(path.stat().st_size for path in paths)
        assert (row["num_files"], row["num_segments"]) == (len(paths), len({path.parent for path in paths}))
    assert rows["references"]["num_segments"] == 2
    assert sum(row["percent"] for row in rows.values()) == pytest.approx(100, abs=1)


def test_what_changed(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    first, second = ask(8)
    older = Bank.open(bank.store, 1)
    difference = compare_versions(older, bank)
    assert (first["tags"], second["tags"]) == (["before"], [])
    assert (second["added"], second["changed"], second["removed"]) == (0, 1, 1)
    assert difference.documents_changed.to_pylist() == ["topic/pass"]
    assert difference.documents_removed.to_pylist() == ["topic/del"]
    commands = set(re.findall(r'--format csv "(select[^"]*)"', PAGE))
    assert len(commands) == 1
    answers = []
    for version in (older, bank):
        with open_views(version) as views:
            answers.append(set(map(tuple, map(dict.values, run_query(views, *commands).to_pylist()))))
    assert {doc_id for doc_id, _ in answers[0] ^ answers[1]} == {"topic/pass", "topic/del"}


def test_largest_documents(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    order = sorted(read(bank, "documents"), key=lambda row: (-row["size_bytes"], row["doc_id"]))
    rows = ask(9)
    assert [row["doc_id"] for row in rows] == [row["doc_id"] for row in order[:10]]
    assert all(row["chars_a_reference"] > 0 for row in rows)


def test_nearest_references(bank: Bank, ask: Callable[[int], list[Row]]) -> None:
    vectors = {
        ref_id: np.asarray(row["vector"], dtype=np.float64) for ref_id, row in read_live(bank, "embeddings").items()
    }
    given = min(vectors)
    scores = {
        ref_id: vector @ vectors[given] / (np.linalg.norm(vector) * np.linalg.norm(vectors[given]))
        for ref_id, vector in vectors.items()
        if ref_id != given
    }
    rows = ask(10)
    assert [row["ref_id"] for row in rows] == sorted(scores, key=lambda ref_id: -scores[ref_id])[:5]
    for row in rows:
        assert row["similarity"] == pytest.approx(scores[row["ref_id"]], abs=1e-5)
