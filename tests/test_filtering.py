"""Filters: every rule at its bound, every dropped record with its reason, and what the presets keep."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.filter_presets import FILTER_PRESETS, no_filters, paper_filters, technical_filters
from pipelines.filtering import RULES, FilterConfig, Rule, filter_records, list_rules, measure_texts
from pipelines.measuring import MEASURES, compute_measures
from pipelines.python_docs import iterate_python_docs
from pipelines.records import RECORDS
from schemas.errors import InputError
from tests.corpora import CHINESE
from tests.test_measuring import HINDI, MIXED, THAI, texts_strategy

HINDI_ARTICLES = HINDI + (
    "उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए। "
    "प्रत्येक व्यक्ति को जीवन, स्वाधीनता और वैयक्तिक सुरक्षा का अधिकार है। "
    "कोई भी ग़ुलामी या दासता की हालत में न रखा जाएगा, ग़ुलामी-प्रथा और ग़ुलामों का व्यापार अपने सभी रूपों में निषिद्ध होगा। "
)


def make_records(texts: Sequence[str | None]) -> pa.RecordBatch:
    """Kept records of the texts; where there is none, a reject."""
    columns = {
        "path": ["corpus/a.jsonl"] * len(texts),
        "position": range(1, len(texts) + 1),
        "doc_id": [f"d{row}" for row in range(len(texts))],
        "source": ["a.jsonl"] * len(texts),
        "metadata": ['{"language":"en"}'] * len(texts),
        "text": texts,
        "content_hash": [None if text is None else f"hash {text[:9]}" for text in texts],
        "size_bytes": [len((text or "").encode()) for text in texts],
        "num_chars": [len(text or "") for text in texts],
        "reason": ["not_json" if text is None else None for text in texts],
        "detail": ["expected value" if text is None else "" for text in texts],
        "title": [f"title {row}" for row in range(len(texts))],
        "value": [None] * len(texts),
        "threshold": [None] * len(texts),
    }
    arrays = [pa.array(list(columns[field.name]), field.type) for field in RECORDS]
    return pa.RecordBatch.from_arrays(arrays, schema=RECORDS)


def test_only_what_active_rules_ask_for_is_measured() -> None:
    texts = pa.array(["a b c", None])
    assert measure_texts(texts, no_filters()) == {}
    measures = measure_texts(texts, FilterConfig(min_words=1, max_words=5, max_top_2gram_char_share=0.5))
    assert list(measures) == ["words", "top_2gram_char_share"]
    assert measures["words"].tolist() == [3, 0]
    assert measures["words"].dtype == np.float64


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_passes_at_its_bound_and_drops_beyond(rule: Rule) -> None:
    value = compute_measures(pa.array([MIXED]), MEASURES)[rule.measure][0]
    assert value > 0
    inside, outside = (0, math.inf) if rule.is_minimum else (math.inf, 0)
    if rule.field.endswith("_share"):
        inside, outside = min(inside, 1), min(outside, 1)
    records = make_records([MIXED])
    at_bound = FilterConfig(**{rule.field: value})
    assert filter_records(records, at_bound) is records
    assert filter_records(records, FilterConfig(**{rule.field: np.nextafter(value, inside)})) is records
    if value != outside:
        beyond = float(np.nextafter(value, outside))
        (dropped,) = filter_records(records, FilterConfig(**{rule.field: beyond})).to_pylist()
        assert dropped["reason"] == rule.name
        assert (dropped["value"], dropped["threshold"]) == (value, beyond)


def test_every_rule_has_a_field_and_every_field_a_rule() -> None:
    assert sorted(rule.field for rule in RULES) == sorted(field.name for field in dataclasses.fields(FilterConfig))
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert {rule.measure for rule in RULES} == set(MEASURES)


def test_dropped_records_become_rejects() -> None:
    good = topics["assert"]
    records = make_records([good, "short", None, "a " * 60, good])
    filtered = filter_records(records, paper_filters())
    assert filtered.schema.equals(records.schema)
    kept = filtered.filter(filtered["reason"].is_null())
    assert kept.equals(records.take(pa.array([0, 4])))
    assert filtered.slice(2, 1).equals(records.slice(2, 1))
    few, repeated = filtered.take(pa.array([1, 3])).to_pylist()
    assert few == {
        **records.slice(1, 1).to_pylist()[0],
        "text": None,
        "content_hash": None,
        "size_bytes": 0,
        "num_chars": 0,
        "reason": "too_few_words",
        "detail": "the number of words is 1, must be at least 50",
        "value": 1.0,
        "threshold": 50.0,
    }
    assert (repeated["reason"], repeated["value"], repeated["threshold"]) == ("short_words", 1.0, 3.0)


def test_the_first_failing_rule_is_the_reason() -> None:
    both = FilterConfig(min_words=3, max_curly_brackets=0, min_lines=1)
    reasons = filter_records(make_records(["{", "a b c {", "a b c"]), both)["reason"].to_pylist()
    assert reasons == ["too_few_words", "curly_brackets", None]


@settings(max_examples=50)
@given(st.lists(st.none() | texts_strategy, max_size=8), st.integers(0, 8))
def test_read_is_kept_plus_dropped_however_records_are_batched(texts: list[str | None], cut: int) -> None:
    records = make_records(texts)
    filtered = filter_records(records, paper_filters())
    halves = [filter_records(half, paper_filters()) for half in (records[:cut], records[cut:])]
    assert pa.Table.from_batches(halves).combine_chunks().equals(pa.Table.from_batches([filtered]).combine_chunks())
    assert filtered["position"].equals(records["position"])
    has_text, has_reason = filtered["text"].is_valid(), filtered["reason"].is_valid()
    assert [not text for text in has_text.to_pylist()] == has_reason.to_pylist()


def test_nothing_is_dropped_without_rules() -> None:
    records = make_records(["", None, "x"])
    assert filter_records(records, no_filters()) is records
    assert filter_records(records[:0], paper_filters()).num_rows == 0


JUNK = {
    "blank page": ("Untitled document", "too_few_words"),
    "table of contents": ("\n".join(f"Chapter {number} ......" for number in range(40)), "too_many_ellipses"),
    "ruled table": ("| 0.13 | 7.25 | 1.00 | -9.1 |\n" * 30 + "a b", "too_few_letters"),
    "base64": (" ".join(f"{'QmFzZTY0IGVuY29kZWQ' * 4}{number}" for number in range(60)), "long_words"),
    "boilerplate": ("All rights reserved by the owner of this page.\n" * 40, "duplicate_line_chars"),
    "one word": ("buy " * 200, "low_entropy"),
}


@pytest.mark.parametrize("name", JUNK)
def test_technical_filters_drop_junk(name: str) -> None:
    text, reason = JUNK[name]
    assert filter_records(make_records([text]), technical_filters())["reason"].to_pylist() == [reason]


def test_technical_filters_keep_technical_documents() -> None:
    documents = list(iterate_python_docs())
    reasons = filter_records(make_records([document["text"] for document in documents]), technical_filters())["reason"]
    dropped = {document["id"] for document, reason in zip(documents, reasons.to_pylist(), strict=True) if reason}
    assert len(documents) > 300
    assert len(dropped) < 0.01 * len(documents)
    assert all(len(document["text"]) < 50 for document in documents if document["id"] in dropped)


def test_paper_filters_keep_prose_of_every_script() -> None:
    prose = [topics["assert"], topics["lambda"], CHINESE[: len(CHINESE) // 8] + THAI, HINDI_ARTICLES]
    reasons = filter_records(make_records(prose), paper_filters())["reason"].to_pylist()
    assert reasons == [None] * 4


def test_presets_list_their_rules() -> None:
    assert list_rules(FilterConfig()) == list_rules(no_filters()) == []
    rules = list_rules(paper_filters())
    assert [tuple(rule) for rule in rules[:2]] == [
        ("too_few_words", "number of words", "at least", 50),
        ("too_many_words", "number of words", "at most", 100_000),
    ]
    assert {name: len(list_rules(preset())) for name, preset in FILTER_PRESETS.items()} == {
        "none": 0,
        "paper": 26,
        "technical": 10,
    }


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"min_words": -1}, "filters: min_words is -1, must be a finite number of at least 0"),
        ({"max_words": math.inf}, "max_words is inf"),
        ({"max_non_alphabetic_share": 1.5}, "max_non_alphabetic_share is 1.5, must be between 0 and 1"),
        ({"max_top_2gram_char_share": math.nan}, "max_top_2gram_char_share is nan, must be between 0 and 1"),
        ({"min_lines": "3"}, "min_lines is '3', must be a number or null"),
        ({"min_lines": True}, "min_lines is True"),
        ({"min_words": 9, "max_words": 8}, "min_words is 9, must be at most max_words, 8"),
        ({"min_mean_word_chars": 5, "max_mean_word_chars": 4.5}, "min_mean_word_chars is 5, must be at most"),
    ],
)
def test_bounds_are_checked(settings_given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        FilterConfig(**settings_given)
