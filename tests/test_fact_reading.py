"""Facts of documents: the four forms of headers, kinds of values, entries, and that read = kept + dropped."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.evaluating.knowledge.auroc import measure_auroc
from flows.evaluating.knowledge.fact_questions import NEW, OLD, choose_facts, find_alternatives
from flows.evaluating.knowledge.facts import Catalogue, make_catalogue, read_documents
from flows.evaluating.knowledge.field_values import (
    DATE,
    NAME,
    NUMBER,
    OTHER,
    clean_value,
    gives_away,
    judge_value,
    name_kind,
)
from flows.evaluating.knowledge.headers import BULLETS, FRONT_MATTER, MAIL, TABLE, Section, find_sections
from model.answering import normalize_answer
from schemas.errors import InputError

MAIL_HEADER = """PEP: 671
Title: Syntax for late-bound function
       argument defaults
Author: Chris Angelico <rosuav@gmail.com>,
        Ada Lovelace <ada@example.org>
Discussions-To: https://mail.python.org/archives/list/python-ideas@python.org/
Created: 24-Oct-2021
Post-History:

Abstract: this is no field
"""

FRONT = """---
external help file: x.dll-Help.xml
Module Name: 'CimCmdlets'
ms.date: 01/16/2026
aliases:
  - gcim
title: Get-CimInstance
---

# Get-CimInstance

## PARAMETERS

### -ClassName

```yaml
Type: System.String
Aliases: ClassId, cn

Required: False
Position: 0
```

```powershell
Get-CimInstance -ClassName Win32_Process
```
"""

BULLET = """# Some RFC

- Feature Name: `north_star`
- Start Date: 2016-08-07
- Rust Issue: [rust-lang/rust#38402](https://github.com/rust-lang/rust/issues/38402)
- Authors:
  - somebody

- a later list: is no header
"""


def describe(section: Section) -> dict[str, str | None]:
    return {field.name: field.value for field in section.fields}


def test_a_mail_header_ends_at_an_empty_line_and_goes_on_where_lines_are_indented() -> None:
    (section,) = find_sections(MAIL_HEADER)
    assert section.form == MAIL
    assert describe(section) == {
        "PEP": "671",
        "Title": "Syntax for late-bound function argument defaults",
        "Author": "Chris Angelico <rosuav@gmail.com>, Ada Lovelace <ada@example.org>",
        "Discussions-To": "https://mail.python.org/archives/list/python-ideas@python.org/",
        "Created": "24-Oct-2021",
        "Post-History": "",
    }
    assert [field.line for field in section.fields] == [1, 2, 4, 6, 7, 8]


def test_front_matter_and_the_tables_below_it() -> None:
    front, table = find_sections(FRONT)
    assert (front.form, front.headings) == (FRONT_MATTER, ())
    assert describe(front)["Module Name"] == "'CimCmdlets'"
    assert describe(front)["aliases"] is None  # a list
    assert (table.form, table.headings) == (TABLE, ("# Get-CimInstance", "### -ClassName"))
    assert describe(table) == {"Type": "System.String", "Aliases": "ClassId, cn", "Required": "False", "Position": "0"}
    lines = FRONT.splitlines()
    for field in (*front.fields, *table.fields):
        assert lines[field.line - 1].startswith(f"{field.name}:")


def test_bullets_at_the_beginning_are_a_header() -> None:
    (section,) = find_sections(BULLET)
    assert section.form == BULLETS
    found = describe(section)
    assert list(found) == ["Feature Name", "Start Date", "Rust Issue", "Authors"]
    assert found["Authors"] is None


@pytest.mark.parametrize(
    "text",
    [
        "Note: this is prose.\nIt goes on here.\n",
        "Only: one\nTwo: fields\n\nand text",
        "---\ntitle: never closed\n",
        "```\nType: a\nName: b\nnot a field\nLast: c\nMore: d\n```\n",
        "",
    ],
)
def test_what_only_looks_like_a_header_is_none(text: str) -> None:
    assert find_sections(text) == []


def test_a_name_that_is_there_twice_has_no_value() -> None:
    (section,) = find_sections("A: 1\nB: 2\nA: 3\nC: 4\n\ntext")
    assert describe(section) == {"A": None, "B": "2", "C": "4"}


def test_values_are_cleaned_and_judged() -> None:
    assert clean_value("Chris Angelico <rosuav@gmail.com>, Ada Lovelace <ada@example.org>") == (
        "Chris Angelico, Ada Lovelace"
    )
    assert clean_value("[rust-lang/rust#38402](https://github.com/rust-lang/rust/issues/38402)") == (
        "rust-lang/rust#38402"
    )
    assert clean_value("`north_star`") == "north_star"
    assert clean_value("'CimCmdlets'") == "CimCmdlets"
    reasons = {value: judge_value(value)[1] for value in ("N/A", "", "---", "see https://x.org", "[a, b]", "x " * 13)}
    assert list(reasons.values()) == [
        "no value",
        "no value",
        "no value",
        "a link",
        "no single value",
        "more than 12 words",
    ]
    assert judge_value(None) == ("", "no single value")
    assert judge_value("word " * 12)[1] == ""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("24-Oct-2021", DATE),
        ("2016-08-07", DATE),
        ("01/16/2026", DATE),
        ("2024年8月22日", DATE),
        ("May 3, 2001", DATE),
        ("3.12", NUMBER),
        ("rust-lang/rust#38402", NUMBER),
        ("1000", NUMBER),
        ("Guido van Rossum", NAME),
        ("A.M. Kuchling, Marc-André Lemburg", NAME),
        ("System.String", OTHER),
        ("a few words in a row", OTHER),
    ],
)
def test_the_kind_of_a_value_is_told_by_its_looks(value: str, kind: str) -> None:
    assert name_kind(value) == kind


def test_what_the_question_says_is_no_fact() -> None:
    assert gives_away("Document: 0528-string-patterns", "rust-lang/rfcs#528", NUMBER)
    assert not gives_away("Document: 0528-string-patterns", "rust-lang/rfcs#529", NUMBER)
    assert gives_away("Document: 3348-c-str-literal", "c_str_literal", OTHER)
    assert not gives_away("PEP: 7", "3.7", NUMBER)
    assert gives_away("About Python 3.7", "3.7", NUMBER)


def make_documents(number: int) -> list[tuple[str, str, str]]:
    """Documents with mail headers: names from a few parts, dates and versions, and a field that hardly varies."""
    draw = random.Random(7)
    first, last = ["Ada", "Brian", "Grace", "Alan", "Barbara"], ["Hopper", "Turing", "Liskov", "Kernighan", "Byron"]
    documents = []
    for place in range(number):
        author = f"{draw.choice(first)} {draw.choice(last)}"
        created = f"{draw.randint(10, 28)}-{draw.choice(['Jan', 'May', 'Oct'])}-{draw.randint(1990, 2020)}"
        lines = [
            f"Number: {100 + place}",
            f"Title: The matter of {place * 7919 % 997} things",
            f"Author: {author} <{author.split()[0].lower()}@example.org>",
            "Status: Final",
            f"Created: {created}",
            f"Post-History: {created}" if place % 2 else "Post-History:",
        ]
        documents.append((f"notes/{place:03d}.txt", "notes", "\n".join(lines) + "\n\nText.\n"))
    return documents


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return make_catalogue(make_documents(60), count_words, 128)


def test_fields_read_are_facts_or_dropped_with_a_reason(catalogue: Catalogue) -> None:
    assert catalogue.num_documents == 60
    assert catalogue.num_read == 60 * 6
    assert catalogue.num_read == len(catalogue.facts) + sum(catalogue.dropped.values())
    assert catalogue.dropped["names the document"] == 2 * 60
    assert catalogue.dropped["hardly varies"] == 60  # Status
    assert catalogue.dropped["no value"] == 30
    assert catalogue.dropped["stands in the question"] == 30  # the date said again
    assert Counter(fact.field for fact in catalogue.facts) == {"Author": 60, "Created": 60}


def test_an_entry_names_its_document_first_and_can_be_begun_and_changed(catalogue: Catalogue) -> None:
    fact = next(fact for fact in catalogue.facts if fact.field == "Created")
    entry = catalogue.entries[fact.entry_id]
    assert entry.subject[0].startswith("Number: ")
    assert entry.subject[1].startswith("Title: ")
    begun = entry.begin("Created", with_fields=True)
    assert entry.text.startswith(f"{begun} {fact.value}\n")
    assert "Author" in begun
    assert entry.begin("Created", with_fields=False) == "\n".join(entry.subject) + "\nCreated:"
    changed = entry.change("Created", "1-Jan-1970")
    assert changed.text == entry.text.replace(f"Created: {fact.value}", "Created: 1-Jan-1970", 1)
    source = next(text for doc_id, _, text in make_documents(60) if doc_id == fact.doc_id)
    assert source.splitlines()[fact.line - 1] == f"Created: {fact.value}"


def test_entries_that_are_too_long_lose_fields_at_their_end() -> None:
    found = make_catalogue(make_documents(60), count_words, 14)
    assert max(count_words([entry.text for entry in found.entries.values()])) <= 14
    assert found.dropped["no room in the entry"] > 0
    assert found.num_read == len(found.facts) + sum(found.dropped.values()) == 60 * 6


def test_of_several_versions_of_a_document_one_is_asked_about() -> None:
    documents = [
        (
            f"man/{version}/page-{place}.md",
            "man",
            f"---\ntitle: Get-{'ABCDEFGHIJKL'[place]}\nms.date: {place + 10}/0{version[0]}/2020\n---\n",
        )
        for version in ("5.1", "7.4")
        for place in range(12)
    ]
    found = make_catalogue(documents, count_words, 128)
    assert {fact.doc_id for fact in found.facts} == {f"man/7.4/page-{place}.md" for place in range(12)}
    assert found.dropped["another version of the document is taken"] == 2 * 12
    assert {fact.subject for fact in found.facts} == {f"title: Get-{letter}" for letter in "ABCDEFGHIJKL"}


def test_chosen_facts_are_of_different_documents_and_unseen_ones_come_first(catalogue: Catalogue) -> None:
    seen = {f"notes/{place:03d}.txt" for place in range(40)}
    chosen = choose_facts(catalogue, seen, num_facts=25, num_controls=10, num_alternatives=3, with_fields=True)
    everything = [*chosen.asked, *chosen.controls]
    assert len({fact.fact.doc_id for fact in everything}) == len(everything) == 35
    assert (len(chosen.asked), len(chosen.controls)) == (25, 10)
    assert [fact.is_seen for fact in everything] == [False] * 20 + [True] * 15
    for fact in everything:
        candidates = fact.question.candidates
        assert candidates[OLD] == fact.fact.value
        assert len({normalize_answer(value) for value in candidates}) == 4
        assert candidates[NEW] in {other.value for other in catalogue.facts if other.group == fact.fact.group}
    again = choose_facts(catalogue, seen, num_facts=25, num_controls=10, num_alternatives=3, with_fields=True)
    assert again == chosen


def test_few_facts_are_shared_between_those_edited_and_those_left_alone(catalogue: Catalogue) -> None:
    chosen = choose_facts(catalogue, (), num_facts=200, num_controls=100, num_alternatives=3, with_fields=True)
    assert (len(chosen.asked), len(chosen.controls)) == (30, 30)


def test_alternatives_are_of_the_same_kind_and_length_if_there_are_any(catalogue: Catalogue) -> None:
    authors = [fact for fact in catalogue.facts if fact.field == "Author"]
    dates = [fact for fact in catalogue.facts if fact.field == "Created"]
    assert {name_kind(value) for value in find_alternatives(authors[0], [*dates, *authors], 4)} == {NAME}
    assert len(find_alternatives(authors[0], authors[:1], 4)) == 0


def test_a_corpus_without_fields_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Nothing but prose.\n", encoding="utf-8")
    found = make_catalogue(read_documents([str(tmp_path)]), count_words, 128)
    assert (found.num_documents, found.num_read) == (1, 0)
    with pytest.raises(InputError, match="no fact can be asked for: 1 documents have 0 fields"):
        choose_facts(found, (), num_facts=2, num_controls=1, num_alternatives=1, with_fields=True)


scores = st.dictionaries(st.integers(0, 30).map(str), st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(scores, scores)
def test_the_area_is_the_share_of_pairs_in_order(positives: dict[str, float], negatives: dict[str, float]) -> None:
    """Against all pairs, one by one; keys in both stand for paired items."""
    pairs = [(one > other) + 0.5 * (one == other) for one in positives.values() for other in negatives.values()]
    measured = measure_auroc("a", "b", positives, negatives)
    assert measured.value == pytest.approx(sum(pairs) / len(pairs))
    assert set(measured.keys) == {*positives, *negatives}


def test_the_interval_of_the_area_is_that_of_drawing_both_kinds_anew() -> None:
    draw = random.Random(3)
    positives = {f"p{n}": draw.gauss(1, 1) for n in range(120)}
    negatives = {f"n{n}": draw.gauss(0, 1) for n in range(80)}
    interval = measure_auroc("a", "b", positives, negatives).measure_interval(rounds=4000)
    areas = []
    for _ in range(400):
        some = draw.choices(list(positives.values()), k=120)
        others = draw.choices(list(negatives.values()), k=80)
        areas.append(sum((a > b) + 0.5 * (a == b) for a in some for b in others) / (120 * 80))
    areas.sort()
    slow_width = areas[389] - areas[9]
    assert interval.high - interval.low == pytest.approx(slow_width, rel=0.25)
