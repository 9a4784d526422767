"""``memory3 eval retrieval``: questions and their answers, scores of rankings, BM25, and the command on real text."""

import csv
import dataclasses
import json
import math
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.building import build
from flows.cli import app
from flows.evaluating.printing import print_suite
from flows.evaluating.retrieval.beir_folders import BUILD_SETTINGS, DocumentRanking, read_questions
from flows.evaluating.retrieval.figures import RankedQuestions, make_source_table
from flows.evaluating.retrieval.questions import BEFORE, MIN_CHARS, SENTENCE, BankQuestions, Question, pick_sentence
from flows.evaluating.retrieval.ranking_scores import (
    compute_gain,
    compute_recall,
    compute_reciprocal_rank,
    compute_success,
)
from flows.evaluating.retrieval.suite import RetrievalOptions, run_beir, run_retrieval
from flows.evaluating.retrieval.word_search import WordSearch, select_best
from flows.evaluating.suite_reports import SuiteReport
from flows.steps import Steps
from model.reading import CHUNK_TOKENS
from model.retrieving import Hit
from model.tokenizing import load_tokenizer
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import LocalStore
from tests.corpora import CHINESE
from tests.servers import MODEL
from tests.test_equality import make_config, write_corpus

NAMES = ("assert", "class", "with", "import", "try", "exprlists")

WAYS = 8
"""Three searches, one order by another, four fusions."""


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A cold bank whose references overlap; a near-copy of one document and a Chinese text are among them."""
    folder = tmp_path_factory.mktemp("bank")
    documents = {name: topics[name] for name in NAMES}
    copy = topics["with"].replace("guarantees", "promises", 1)
    corpus = write_corpus(folder, documents | {"law": CHINESE[:400], "with-again": copy})
    settings = {
        "memory": {"cold": True},
        "chunking": {"overlap_tokens": 16, "title_prefix": True},
        "reading": {"title_column": "title"},
    }
    build(LocalStore(folder / "bank"), [str(corpus)], make_config(settings), Steps())
    return Bank.open(folder / "bank")


@pytest.fixture(scope="module")
def questions(bank: Bank) -> BankQuestions:
    return BankQuestions(bank, load_tokenizer(MODEL))


def list_live(bank: Bank) -> dict[str, str]:
    """Live references with their texts, ids ascending."""
    rows = bank.read_table("references", ["ref_id", "text"]).to_pylist()
    dropped = set(bank.read_dropped_ids().to_pylist())
    return {
        row["ref_id"]: row["text"]
        for row in sorted(rows, key=lambda row: row["ref_id"])
        if row["ref_id"] not in dropped
    }


def test_questions_are_what_stands_in_the_documents(bank: Bank, questions: BankQuestions) -> None:
    live = list_live(bank)
    assert questions.num_live == len(live) > 60
    documents = {name: topics[name] for name in NAMES} | {
        "law": CHINESE[:400],
        "with-again": topics["with"].replace("guarantees", "promises", 1),
    }
    places = bank.read_table("occurrences").to_pylist()
    kept_of = {row["ref_id"]: row["kept_ref_id"] for row in bank.read_table("duplicates").to_pylist()}
    assert kept_of
    asked = {question.key: question for question in questions.make(list(live))}
    kinds = Counter(question.kind for question in asked.values())
    assert kinds[SENTENCE] > 60
    assert kinds[BEFORE] > 40
    tokenizer = load_tokenizer(MODEL)
    num_excluded = 0
    for question in asked.values():
        (ref_id,) = question.answers
        if question.kind == SENTENCE:
            assert question.text in live[ref_id]
            assert len(question.text) >= MIN_CHARS
            assert not question.excluded
            continue
        standing = [place for place in places if kept_of.get(place["ref_id"], place["ref_id"]) == ref_id]
        # The text right before the reference, in one of the places where it or its near-duplicate stands.
        before = {place["doc_id"]: documents[place["doc_id"]].encode()[: place["start_byte"]] for place in standing}
        sources = [doc_id for doc_id, text in before.items() if text.endswith(question.text.encode())]
        assert sources
        assert len(tokenizer.encode([question.text])[0]) <= CHUNK_TOKENS + 1
        # Whatever live reference has some of the asked bytes in that document is left out.
        own = [
            {
                kept_of.get(place["ref_id"], place["ref_id"])
                for place in places
                if place["doc_id"] == doc_id
                and place["start_byte"] < len(before[doc_id])
                and place["end_byte"] > len(before[doc_id]) - len(question.text.encode())
                and place["ref_id"] != ref_id
            }
            for doc_id in sources
        ]
        assert set(question.excluded) in own
        num_excluded += len(question.excluded)
    assert num_excluded > kinds[BEFORE]


def test_the_draw_is_fixed_and_its_parts_do_not_meet(questions: BankQuestions) -> None:
    whole = questions.draw_references(40, seed=3)
    assert questions.draw_references(25, seed=3, skipped=15) == whole[15:]
    assert whole != questions.draw_references(40, seed=4)
    assert len(set(whole)) == 40
    assert pick_sentence("Too short. 短。", "name") == ""
    text = "This is the first sentence of all. And this is the second one!\nA third line without a mark"
    found = {pick_sentence(text, str(name)) for name in range(30)}
    assert found == {
        "This is the first sentence of all.",
        "And this is the second one!",
        "A third line without a mark",
    }


rankings = st.lists(st.sampled_from("abcdefghij"), unique=True)
grades = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 4).map(float), min_size=1)


@given(rankings, grades, st.integers(1, 8))
def test_scores_are_their_definitions(ranking: list[str], answers: dict[str, float], depth: int) -> None:
    """Place by place, with the best ranking found by trying gains in descending order."""
    found = 0
    first = 0.0
    gain = 0.0
    for place in range(min(depth, len(ranking))):
        if ranking[place] in answers:
            found += 1
            first = first or 1 / (place + 1)
            gain += answers[ranking[place]] / math.log(place + 2, 2)
    ideal = 0.0
    for place, grade in enumerate(sorted(answers.values())[::-1]):
        ideal += grade / math.log(place + 2, 2) if place < depth else 0.0
    assert compute_recall(ranking, answers, depth) == pytest.approx(found / len(answers))
    assert compute_success(ranking, answers, depth) == (found > 0)
    assert compute_reciprocal_rank(ranking, answers, depth) == first
    assert compute_gain(ranking, answers, depth) == pytest.approx(gain / ideal)
    assert 0 <= compute_gain(ranking, answers, depth) <= 1 + 1e-12


def test_the_gain_of_a_known_ranking() -> None:
    """The example of Jarvelin and Kekalainen's measure with linear gains: grades 3 2 3 0 1 2."""
    answers = {"a": 3.0, "b": 2.0, "c": 3.0, "e": 1.0, "f": 2.0}
    assert compute_gain(list("abcdef"), answers, 6) == pytest.approx(0.9608, abs=1e-4)


def split_words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFC", text.casefold())
    return re.findall(r"[一-鿿]|[^\W一-鿿]+", folded)


def rank_words_slowly(live: dict[str, str], text: str) -> dict[str, float]:
    """BM25 as Lucene has it, a word at a time."""
    documents = {ref_id: split_words(content) for ref_id, content in live.items()}
    mean = sum(map(len, documents.values())) / len(documents)
    scores: defaultdict[str, float] = defaultdict(float)
    for word in split_words(text):
        num_with = sum(word in words for words in documents.values())
        weight = math.log(1 + (len(documents) - num_with + 0.5) / (num_with + 0.5))
        for ref_id, words in documents.items():
            count = words.count(word)
            scores[ref_id] += weight * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
    return {ref_id: score for ref_id, score in scores.items() if score > 0}


def test_words_are_ranked_as_by_hand(bank: Bank) -> None:
    live = list_live(bank)
    texts = ["The context manager's __exit__() method", "规范社会秩序", "assert assert statement", "xyzzy", ""]
    found = WordSearch(bank).search(texts, len(live))
    assert [bool(hits) for hits in found] == [True, True, True, False, False]
    for text, hits in zip(texts, found, strict=True):
        slow = rank_words_slowly(live, text)
        assert {hit.ref_id for hit in hits} == set(slow)
        assert [hit.score for hit in hits] == pytest.approx([slow[hit.ref_id] for hit in hits], rel=1e-4)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all("秩序" in live[hit.ref_id] for hit in found[1][:1])


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=12), st.integers(1, 14))
def test_the_best_scores_are_those_of_a_sort(scores: list[float], num_hits: int) -> None:
    expected = sorted(
        (place for place, score in enumerate(scores) if score > 0), key=lambda place: (-scores[place], place)
    )
    assert select_best(np.array(scores, np.float32), num_hits).tolist() == expected[:num_hits]


@pytest.fixture(scope="module")
def report(bank: Bank) -> SuiteReport:
    return run_retrieval(bank, RetrievalOptions(num_references=24, num_fit=12, num_heads=3))


def test_a_bank_is_measured(report: SuiteReport, questions: BankQuestions) -> None:
    assert report.data["fit_references"] == 12
    assert report.data["questions"].keys() == {SENTENCE, BEFORE}
    assert sum(head["is_chosen"] for head in report.data["heads"]) == 3
    recall = {one.label[1:]: one for one in report.measurements if one.name == "recall@20"}
    assert len(recall) == 2 * WAYS
    # Sentences stand word for word in what is looked for: whoever does not find them is broken.
    assert recall["bm25", SENTENCE].value == 1
    assert recall["attention", SENTENCE].value > 0.8
    for one in report.measurements:
        assert one.unit == ("change of share" if "over" in one.name else "share")
        assert (-1 if "over" in one.name else 0) <= one.value <= 1
    asked = list(questions.make(questions.draw_references(24, seed=0, skipped=12)))
    assert {key for one in report.measurements for key in one.keys} == {question.item for question in asked}
    assert report.data["questions"] == Counter(question.kind for question in asked)
    # None of the references whose questions chose the heads has a question in the tables.
    fitted = {question.key for question in questions.make(questions.draw_references(12, seed=0))}
    assert fitted.isdisjoint(question.key for question in asked)
    weights = {one.group: one.weights.sum() for one in report.measurements if one.name == "recall@20"}
    assert weights == report.data["questions"]
    assert len(report.verdicts) == 2 * (WAYS - 1)
    assert [chart.name for chart in report.charts] == ["recall-sentence", "recall-before"]
    assert all(failure["wanted"] for failure in report.failures)


def test_sources_of_enough_documents_have_a_row() -> None:
    """Thirty questions of one document say less than twenty of five."""
    asked = [
        Question(key=f"{source}{row}", item=f"{source}{row % documents}", kind=SENTENCE, source=source, text="?",
                 answers={"right": 1.0})
        for source, number, documents in (("one", 30, 1), ("five", 20, 5), ("few", 19, 19))
        for row in range(number)
    ]  # fmt: skip
    rankings = {"embedder": [["right" if row % 2 else "wrong"] for row in range(len(asked))]}
    ranked = RankedQuestions(kind=SENTENCE, questions=asked, rankings=rankings)
    table, parts = make_source_table(ranked, ranked.measure_all())
    assert [row[:2] for row in table.rows] == [["five", "20 questions of 5 documents"]]
    (part,) = parts
    assert (part.group, len(part.keys), part.weights.sum(), part.value) == ("sentence: five", 5, 20, 0.5)


def test_the_command_finds_the_same(bank: Bank, report: SuiteReport, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", "retrieval", "--bank", bank.url, "--references", "24", "--fit-references", "12", "--heads", "3"]
    result = CliRunner().invoke(app, [*asked, "--json"])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    assert [figure["value"] for figure in printed["figures"]] == [one.value for one in report.measurements]
    version = str(bank.manifest.version)
    assert shlex.split(printed["command"]) == [
        *("memory3", *asked[:4], "--at", version, "--model", str(bank.manifest.config["memory"]["model"])),
        *(*asked[4:], "--seed", "0"),
    ]
    assert printed["data"]["fingerprint"] == dataclasses.asdict(bank.manifest.fingerprint)
    for wrong in (["eval", "retrieval"], [*asked, "--beir", bank.url]):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code != 0
        assert isinstance(refused.exception, (InputError, SystemExit))
    print_suite(report)
    text = capsys.readouterr().out
    assert "all three" in text
    assert "is attention better than embedder?" in text


def write_beir(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """Writes documentation as a folder of BEIR: a query is a sentence of a page; that answers it, another a bit."""
    (folder / "qrels").mkdir(parents=True)
    related = {"class": "assert", "with": "try", "try": "with", "import": "exprlists"}
    answers: dict[str, list[tuple[str, float]]] = {}
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for name in NAMES:
            stream.write(json.dumps({"_id": name, "title": f"The {name} page", "text": topics[name]}) + "\n")
        stream.write(json.dumps({"_id": "empty", "title": "", "text": ""}) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as stream:
        for name in NAMES:
            sentence = pick_sentence(topics[name], name)
            stream.write(json.dumps({"_id": f"q-{name}", "text": sentence, "metadata": {}}) + "\n")
            answers[f"q-{name}"] = [(name, 2.0), *([(related[name], 1.0)] if name in related else [])]
        stream.write(json.dumps({"_id": "unjudged", "text": "Nobody knows."}) + "\n")
    with (folder / "qrels" / "test.tsv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["query-id", "corpus-id", "score"])
        for query, judged in answers.items():
            rows.writerows([query, name, int(score)] for name, score in judged)
        rows.writerow(["unjudged", "class", 0])
    return answers


def test_a_folder_of_beir_is_measured(tmp_path: Path) -> None:
    answers = write_beir(tmp_path / "beir")
    questions = read_questions(tmp_path / "beir")
    assert {question.key: dict(question.answers) for question in questions} == {
        f"beir/{query}": dict(judged) for query, judged in answers.items()
    }
    report = run_beir(tmp_path / "beir", RetrievalOptions(num_fit=20, num_heads=4, num_queries=6), model=MODEL)
    words = shlex.split(report.command)
    source = ["--beir", str(tmp_path / "beir"), "--model", MODEL, "--embedder", "static"]
    assert words[3:9] == source
    assert words[words.index("--queries") + 1] == "6"
    figures = {one.label[:2]: one.value for one in report.measurements}
    assert len([name for name, _ in figures if name == "nDCG@10"]) == WAYS
    # The page has the words of the query; one that answers it a bit may have none of them.
    assert figures["MRR@10", "bm25"] == 1
    assert 0.5 < figures["recall@20", "bm25"] <= 1
    assert figures["nDCG@10", "bm25"] > 0.8
    assert figures["MRR@10", "attention"] > 0.5
    assert report.data["bank"] == str(tmp_path / "beir")
    assert not list(Path(report.data["bank"]).glob("bank"))


def test_documents_are_ranked_by_their_best_reference(tmp_path: Path) -> None:
    write_beir(tmp_path)
    store = LocalStore(tmp_path / "bank")
    build(store, [str(tmp_path / "corpus.jsonl")], make_config(BUILD_SETTINGS), Steps())
    bank = Bank.open(store)
    places: dict[str, list[str]] = {}
    for row in bank.read_table("occurrences").to_pylist():
        places.setdefault(row["doc_id"], []).append(row["ref_id"])
    assert set(places) == set(NAMES)
    order = [places["with"][3], places["class"][1], places["with"][0], places["assert"][0]]
    hits = [Hit(ref_id=ref_id, score=-float(place)) for place, ref_id in enumerate(order)]
    assert DocumentRanking(bank).rank(hits, "q-with") == ["with", "class", "assert"]
    assert DocumentRanking(bank).rank(hits, "class") == ["with", "assert"]
    texts = bank.read_references([places["with"][3]], ["text"])["text"].to_pylist()
    assert texts[0].startswith("The with page")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", "{", "line 1 is no JSON"),
        ("queries.jsonl", '{"_id": 1, "text": "a"}', "line 1 has no strings _id and text"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq-with class 1\n", "line 2 is not query-id"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq-with\tclass\thigh\n", "line 2 is not query-id"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nnobody\tclass\t1\n", "judges the query 'nobody'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "no query with an answer"),
        ("qrels/test.tsv", None, "has no qrels/test.tsv"),
    ],
)
def test_a_folder_that_is_not_beir_is_refused(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    write_beir(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path)
