"""The filter of evaluation: copies of questions are not read, paraphrases are; it applies the measure it names."""

import dataclasses
from pydoc_data.topics import topics

import numpy as np
import pytest

from flows.searching import open_retriever
from model.checkpoint import load_checkpoint
from model.overlap_filter import MAX_OVERLAP, FilteredSearch
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.overlap import measure_overlap
from schemas.stores import open_store
from tests.servers import build_bank

QUESTIONS = {
    "A function decorated with a context manager factory is called with arguments that the programmer chose. At which "
    "moment does the interpreter evaluate the expressions of the decorator list, and in which order are they applied "
    "to the function object that the definition has just created?": "When you write several decorators above a def "
    "statement, Python works them out once, while the definition runs. The one written nearest to the function wraps "
    "it first, then the others follow upwards.",
    "Suppose that a finally clause executes a return statement while an exception raised in the try clause is still "
    "being propagated to the caller. What happens to the saved exception, and which value does the calling function "
    "receive in the end?": "Returning inside finally makes Python forget an error that was on its way out; callers "
    "just get whatever the last return handed back.",
    "The names bound by a comprehension live in a scope of their own. Which part of a list comprehension is evaluated "
    "directly in the enclosing scope, so that a class body can use its own variables there, and which parts are "
    "not?": "Only the iterable of the leftmost for is computed outside; everything else of such an expression runs as "
    "if inside a nested function, thus cannot see attributes of the class under construction.",
}
"""Questions, and of each a text that gives away what it asks in words of its own."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank with a copy and a paraphrase of every question, beside other text."""
    documents = {f"other {name}": topics[name][:2000] for name in ("assert", "del", "pass")}
    for number, (question, paraphrase) in enumerate(QUESTIONS.items()):
        documents |= {f"copy {number}": question, f"paraphrase {number}": paraphrase}
    folder = build_bank(tmp_path_factory.mktemp("planted"), documents)
    return Bank.open(open_store(str(folder)))


def find_reference(bank: Bank, doc_id: str) -> str:
    places = bank.read_table("occurrences", ["doc_id", "ref_id"]).to_pylist()
    (ref_id,) = (place["ref_id"] for place in places if place["doc_id"] == doc_id)
    return str(ref_id)


def test_the_filter_drops_planted_questions_and_keeps_paraphrases(planted: Bank) -> None:
    tokenizer = load_checkpoint().tokenizer
    retriever = open_retriever(planted)
    texts = list(QUESTIONS)
    questions = [(tuple(tokens.tolist()),) for tokens in tokenizer.encode(texts)]
    copies = [find_reference(planted, f"copy {number}") for number in range(len(texts))]
    paraphrases = [find_reference(planted, f"paraphrase {number}") for number in range(len(texts))]

    unfiltered = FilteredSearch(planted, retriever, max_overlap=1).search(texts, questions, 5)
    assert [hits[0].ref_id for hits in unfiltered] == copies

    search = FilteredSearch(planted, retriever)
    for hits, copy in zip(search.search(texts, questions, 5), copies, strict=True):
        assert len(hits) == 5
        assert copy not in [hit.ref_id for hit in hits]
    assert search.dropped_ids == set(copies)
    counts = dataclasses.asdict(search.counts)
    assert counts == {"num_searches": 3, "num_compared": 18, "num_dropped": 3, "num_short": 0}

    # All that there is: nothing is missing but the copy, paraphrases are read.
    everything = {retriever.get_ref_id(row) for row in range(retriever.num_references)}
    for hits, copy, paraphrase in zip(
        search.search(texts, questions, len(everything)), copies, paraphrases, strict=True
    ):
        assert {hit.ref_id for hit in hits} == everything - {copy}
        assert paraphrase in everything
    assert search.counts.num_short == 3


def test_the_filter_is_the_measure_applied_to_every_reference(planted: Bank) -> None:
    """Against the obvious way: the overlap of all references, the best ones that are within the limit."""
    tokenizer, retriever = load_checkpoint().tokenizer, open_retriever(planted)
    texts = list(QUESTIONS)
    questions = [(tuple(tokens.tolist()),) for tokens in tokenizer.encode(texts)]
    everything = retriever.num_references
    for max_overlap in (0.05, 0.1, 0.3, MAX_OVERLAP):
        search = FilteredSearch(planted, retriever, max_overlap=max_overlap)
        found = search.search(texts, questions, 3)
        num_short = 0
        for text, (question,), hits in zip(texts, questions, found, strict=True):
            ranked = [hit.ref_id for hit in retriever.search([text], everything)[0]]
            rows = planted.read_references(ranked, ["token_ids"])["token_ids"].to_pylist()
            overlaps = [measure_overlap(np.array(question, np.int32), np.array(row, np.int32)) for row in rows]
            allowed = [ref_id for ref_id, overlap in zip(ranked, overlaps, strict=True) if overlap <= max_overlap]
            assert [hit.ref_id for hit in hits] == allowed[:3]
            num_short += len(allowed) < 3
        assert search.counts.num_short == num_short
    with pytest.raises(InputError, match="max_overlap is 1.5"):
        FilteredSearch(planted, retriever, max_overlap=1.5)


def test_references_with_a_run_of_the_question_are_dropped(planted: Bank) -> None:
    """A question that ends with the beginning of a stored text overlaps it too little for the measure alone."""
    tokenizer = load_checkpoint().tokenizer
    retriever = open_retriever(planted)
    asked = find_reference(planted, "paraphrase 0")
    stored = planted.read_references([asked], ["token_ids"])["token_ids"].to_pylist()[0]
    before = tokenizer.encode([topics["while"][:600]])[0].tolist()
    question = ((*before, *stored[:14]),)
    text = tokenizer.decode(np.array(stored))
    kept = FilteredSearch(planted, retriever).search([text], [question], 3)[0]
    assert asked in {hit.ref_id for hit in kept}
    for limit, is_dropped in ((13, True), (14, True), (15, False)):
        hits = FilteredSearch(planted, retriever, shared_run=limit).search([text], [question], 3)[0]
        assert (asked not in {hit.ref_id for hit in hits}) == is_dropped
    alone = FilteredSearch(planted, retriever, max_overlap=1, shared_run=13).search([text], [question], 3)[0]
    assert asked not in {hit.ref_id for hit in alone}
    with pytest.raises(InputError, match="shared_run is 0"):
        FilteredSearch(planted, retriever, shared_run=0)
