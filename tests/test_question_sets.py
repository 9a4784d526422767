"""Question sets: entries of real headers, what is asked of them, and what changes when fields are swapped."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.bench_alignment import find_sources, select_found
from benchmarks.question_sets import (
    QUESTION_TYPES,
    Entry,
    Question,
    ask_for_entries,
    ask_questions,
    make_pairs,
    parse_page,
    parse_pep,
    parse_rfc,
    rank_entries,
    swap_fields,
    write_lines,
    write_question_sets,
)
from flows.building import build
from flows.config import BuildConfig, MemoryConfig
from flows.searching import open_retriever
from flows.steps import Steps
from model.answering import AnswerReport, AskedQuestion
from pipelines.clustering import DeduplicationConfig
from pipelines.running import EngineConfig
from schemas.bank import Bank
from schemas.stores import LocalStore

PEP = """PEP: 671
Title: Syntax for late-bound function
       argument defaults
Author: Chris Angelico <rosuav@gmail.com>,
        Ada Lovelace (on leave)
Discussions-To: https://mail.python.org/archives/list/python-ideas@python.org/
Status: Draft
Type: Standards Track
Created: 24-Oct-2021 (again)

Abstract: this is no field
"""

RFC = """- Feature Name: `north_star`
- Start Date: 2016-08-07
- RFC PR: [rust-lang/rfcs#1728](https://github.com/rust-lang/rfcs/pull/1728)
- Rust Issue: [rust-lang/rust#38402](https://github.com/rust-lang/rust/issues/38402)

## Summary
"""

PAGE = """---
external help file: x
Module Name: CimCmdlets
ms.date: 01/16/2026
aliases:
  - gcim
  - other
title: Get-CimInstance
---

# Get-CimInstance

## SYNOPSIS
Gets the CIM instances of a class.
"""


def test_entries_hold_the_fields_of_a_header() -> None:
    pep, rfc = parse_pep("peps/pep-0671.rst", PEP), parse_rfc("rfcs/text/1728-north-star.md", RFC)
    page = parse_page("psdocs/reference/7.5/Get-CimInstance.md", PAGE)
    assert pep is not None
    assert pep.text == (
        "PEP: 671\nTitle: Syntax for late-bound function argument defaults\nAuthor: Chris Angelico, Ada Lovelace\n"
        "Status: Draft\nType: Standards Track\nCreated: 24-Oct-2021"
    )
    assert rfc is not None
    assert rfc.text == "RFC: 1728\nFeature Name: north star\nStart Date: 2016-08-07\nRust Issue: 38402"
    assert page is not None
    assert page.text == (
        "Command: Get-CimInstance\nModule: CimCmdlets\nDate: 01/16/2026\nAlias: gcim\n"
        "Synopsis: Gets the CIM instances of a class."
    )
    asked = {question.kind: question for question in ask_questions([pep, rfc, page])}
    assert asked["pep-author"].completion == "Chris Angelico"
    assert asked["pep-author"].prompt.startswith("Who is the first author of PEP 671")
    assert set(asked) == {of_type.kind for of_type in QUESTION_TYPES}


def test_whole_entries_are_asked_for_by_what_names_them() -> None:
    entries = [parse_pep("peps/pep-0671.rst", PEP), parse_page("psdocs/reference/7.5/Get-CimInstance.md", PAGE)]
    asked = list(ask_for_entries(entry for entry in entries if entry is not None))
    assert [question.prompt for question in asked] == [
        "Tell all about PEP 671, Title: Syntax for late-bound function argument defaults.",
        "Tell all about the command Get-CimInstance, Module: CimCmdlets.",
    ]
    assert [question.completion for question in asked] == [entry.text for entry in entries if entry is not None]


@pytest.mark.parametrize("text", ["", "Title: x", PEP.replace("Author", "Autor"), PEP.replace("Created", "Made")])
def test_a_header_without_its_fields_makes_no_entry(text: str) -> None:
    assert parse_pep("peps/pep-0001.rst", text) is None
    assert parse_rfc("rfcs/text/0001-x.md", text) is None
    assert parse_page("psdocs/reference/7.5/x.md", text) is None


def test_versions_of_a_page_are_held_out_together() -> None:
    fields = {"Command": "x"}
    for number in range(200):
        names = [f"psdocs/reference/{version}/Module/Page-{number}.md" for version in ("5.1", "7.4", "7.6")]
        assert len({Entry(doc_id=name, kind="page", fields=fields).is_held_out for name in names}) == 1


def make_entries(number: int) -> list[Entry]:
    headers = [
        PEP.replace("671", str(place))
        .replace("24-Oct", f"{place}-Oct")
        .replace("Angelico", f"A{place}")
        .replace("Syntax", f"Syntax {place}")
        for place in range(number)
    ]
    entries = [parse_pep(f"peps/pep-{place:04}.rst", text) for place, text in enumerate(headers)]
    return [entry for entry in entries if entry is not None]


def test_swapped_fields_are_those_of_other_documents() -> None:
    entries = make_entries(12)
    changed = swap_fields(entries)
    for before, after in zip(entries, changed, strict=True):
        assert list(after.fields) == list(before.fields)
        for name, value in before.fields.items():
            assert (after.fields[name] != value) == (name in ("Author", "Created"))
    for name in ("Author", "Created"):
        assert Counter(entry.fields[name] for entry in entries) == Counter(entry.fields[name] for entry in changed)


def test_the_rejected_answer_is_that_of_another_document() -> None:
    questions = list(ask_questions(make_entries(9)))
    right = {question.prompt: question for question in questions}
    pairs = make_pairs(questions)
    assert len(pairs) == len(questions) == 27
    for pair in pairs:
        question = right[pair["prompt"]]
        others = {other.completion for other in questions if other.kind == question.kind}
        assert pair["chosen"] == question.completion
        assert pair["rejected"] in others - {question.completion}
    same = [Question(doc_id=name, kind="k", prompt=name, completion="x") for name in "ab"]
    assert make_pairs(same) == []


def test_entries_are_ranked_as_the_bank_retrieves_them(tmp_path: Path) -> None:
    entries = make_entries(12)
    rows = [{"id": entry.doc_id, "text": entry.text} for entry in entries]
    catalogue = tmp_path / "catalogue.jsonl"
    write_lines(catalogue, rows)
    config = BuildConfig(
        engine=EngineConfig(runner="loop"),
        deduplication=DeduplicationConfig(enabled=False),
        memory=MemoryConfig(cold=True),
    )
    build(LocalStore(tmp_path / "bank"), [str(catalogue)], config, Steps())
    bank = Bank.open(tmp_path / "bank")
    retriever = open_retriever(bank)
    # The text of an entry is nearest to itself, and what is asked of another document is not what it is ranked for.
    questions = [Question(doc_id=entry.doc_id, kind="k", prompt=entry.text, completion="x") for entry in entries]
    assert rank_entries(questions, catalogue, bank, retriever, 3) == [0] * len(entries)
    other = [
        dataclasses.replace(question, prompt=following.prompt)
        for question, following in zip(questions, [*questions[1:], questions[0]], strict=True)
    ]
    texts = dict(zip(*bank.read_table("references", ["ref_id", "text"]).to_pydict().values(), strict=True))
    for question, place in zip(other, rank_entries(other, catalogue, bank, retriever, 3), strict=True):
        hits = [texts[hit.ref_id] for hit in retriever.search([question.prompt], 3)[0]]
        own = next(entry.text for entry in entries if entry.doc_id == question.doc_id)
        assert place == (hits.index(own) if own in hits else None)
        assert place != 0


def test_only_questions_whose_entry_is_read_are_trained_on() -> None:
    questions = [Question(doc_id=str(place), kind="k", prompt="p", completion="c") for place in range(4)]
    assert select_found(questions, [0, None, 4, 1], 1) == questions[:1]
    assert select_found(questions, [0, None, 4, 1], 5) == [questions[0], *questions[2:]]


def test_a_wrong_answer_may_be_that_of_another_reference() -> None:
    answers = {"Zhu": "Author: Zhu", "zhu": "Author:  Zhu", "Lev": "Author: Zhu", "": "Author: Zhu"}
    asked = [AskedQuestion(prompt="p", expected="x", answer=answer) for answer in answers]
    assert find_sources(AnswerReport(questions=asked), list(answers.values())) == [True, True, False, False]


DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the corpora are not beside the project")
def test_sets_of_the_real_corpora(tmp_path: Path) -> None:
    questions = write_question_sets(DATA, tmp_path)
    catalogue = {row["id"]: row["text"] for row in map(json.loads, (tmp_path / "catalogue.jsonl").open())}
    changed = {row["id"]: row["text"] for row in map(json.loads, (tmp_path / "changed.jsonl").open())}
    assert not {question.doc_id for question in questions["train"]} & {
        question.doc_id for question in questions["held_out"]
    }
    assert len(questions["held_out"]) >= 100
    prompts = [question.prompt for name in ("train", "held_out") for question in questions[name]]
    assert len(set(prompts)) == len(prompts)
    recited = {question.doc_id for question in questions["recite"]}
    assert recited >= {question.doc_id for question in questions["train"]}
    assert not recited & {question.doc_id for question in questions["held_out"]}
    assert all(question.completion == catalogue[question.doc_id] for question in questions["recite"])
    for name, texts in (("train", catalogue), ("held_out", catalogue), ("changed_answers", changed)):
        assert all(question.completion in texts[question.doc_id] for question in questions[name])
    answers = {(question.doc_id, question.kind): question.completion for question in questions["held_out"]}
    for question in questions["changed_answers"]:
        assert question.completion != answers[question.doc_id, question.kind]
