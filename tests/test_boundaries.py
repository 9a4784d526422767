"""The ranks of places to cut: the kernel against regular expressions and against questions asked place by place."""

import itertools
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.boundaries import (
    CLAUSE_END,
    INNER,
    LINE_END,
    NO_BOUNDARY,
    NO_CHARACTER,
    PARAGRAPH_END,
    SENTENCE_END,
    WORD_END,
    find_text_ends,
    rank_places,
)
from pipelines.python_docs import iterate_python_docs

NEWLINES = "\n\x0c\r\x85\u2028\u2029"
CLOSERS = "\"'’”›»)\\]}`*_」』】）〉》〕］｝〗〙〛｣﹂﹄＂＇"
SPACED_ENDS = ".!?…‽‼⁇-⁉"
PLAIN_ENDS = "。！？；｡।॥؟۔։።፧។៕။\u0f0d༎"
SPACED_CLAUSE_ENDS = ",;:—–"
PLAIN_CLAUSE_ENDS = "，、：､،؛"
MARKS = re.compile(
    rf"[{SPACED_ENDS}{PLAIN_ENDS}{SPACED_CLAUSE_ENDS}{PLAIN_CLAUSE_ENDS}](?:"
    rf"(?:(?<=[{SPACED_ENDS}])[{SPACED_ENDS}]*+[{CLOSERS}]*+(?=\s++(?![a-zß-öø-ÿα-ωа-яё]))"
    rf"|(?:(?<=[{PLAIN_ENDS}])|(?<=…)…)(?:[{PLAIN_ENDS}]|…{{2,}})*+[{CLOSERS}]*+)()"
    rf"|(?<=[{SPACED_CLAUSE_ENDS}])(?=\s)|(?<=[{PLAIN_CLAUSE_ENDS}]))"
)
NUMBER = re.compile(r"\s*[0-9.]*[0-9]")
INITIAL = re.compile(r"(?:\A|[\s.(\[{])[^\W\d_]\Z")
TITLE = re.compile(r"(?:\A|[\s.(\[{])[A-Z][bcdfghjklmnpqrstvwxz]{1,2}\Z")
EXTENDING = {0x200C, 0x200D, 0x0E33, 0x0EB3, *range(0x1160, 0x1200), *range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)}


def is_abbreviation_slowly(head: str) -> bool:
    line = re.split(f"[{NEWLINES}]", head)[-1]
    initial = INITIAL.search(line) and unicodedata.category(line[-1]) in ("Lu", "Ll", "Lt")
    return bool(NUMBER.fullmatch(line) or initial or TITLE.search(line))


def is_inner_slowly(text: str, place: int) -> bool:
    before, after = text[place - 1], text[place]
    return (
        (before, after) == ("\r", "\n")
        or unicodedata.category(after)[0] == "M"
        or ord(after) in EXTENDING
        or before == "\u200d"
        or all("\U0001f1e6" <= half <= "\U0001f1ff" for half in (before, after))
    )


def rank_slowly(text: str, boundary: str = "sentence") -> list[int]:
    """Returns the rank of each character's place, by regular expressions over the text."""
    ranks = [NO_BOUNDARY] * (len(text) + 1)
    gap_ends = {}
    for gap in re.finditer(r"\s+", text):
        newlines = list(re.finditer(rf"\r\n|[{NEWLINES}]", gap.group()))
        gap_ends[gap.start()] = gap.start() + newlines[-1].end() if newlines else gap.end()
        rank = (WORD_END, LINE_END, PARAGRAPH_END)[min(len(newlines), 2)]
        if boundary != "hard":
            ranks[gap.start()] = ranks[gap_ends[gap.start()]] = rank
    for mark in MARKS.finditer(text) if boundary == "sentence" else ():
        if mark.group() == "." and is_abbreviation_slowly(text[max(0, mark.start() - 500) : mark.start()]):
            continue
        rank = SENTENCE_END if mark.lastindex else CLAUSE_END
        for place in (mark.end(), gap_ends.get(mark.end(), mark.end())):
            ranks[place] = min(ranks[place], rank)
    for place in range(1, len(text)):
        if is_inner_slowly(text, place):
            ranks[place] = INNER
    return [NO_BOUNDARY, *ranks[1 : len(text)]] if text else []


def rank_texts(texts: list[str], boundary: str = "sentence") -> list[list[int]]:
    """Returns the ranks of each text's characters; checks what stands inside their bytes."""
    contents = [text.encode() for text in texts]
    offsets = np.cumsum([0, *(len(content) for content in contents)])
    ranks = rank_places(np.frombuffer(b"".join(contents), dtype=np.uint8), offsets, boundary)
    assert ranks.dtype == np.uint8
    assert len(ranks) == offsets[-1] + 1
    assert ranks[-1] == NO_BOUNDARY
    found = []
    for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        widths = [len(character.encode()) for character in text]
        firsts = start + np.cumsum([0, *widths], dtype=np.int64)[:-1]
        assert np.delete(ranks[start:end], firsts - start).tolist() == [NO_CHARACTER] * (end - start - len(text))
        found.append(ranks[firsts].tolist())
    return found


def list_boundaries(text: str) -> dict[int, int]:
    """Returns the places of a text with a boundary, and their ranks."""
    return {place: rank for place, rank in enumerate(rank_texts([text])[0]) if rank < NO_BOUNDARY}


CHARACTERS = (
    "aAxXmrDö1 \n\r\t\x0c\x1c\x85\u00a0\u2028.!?…;:,—。！？，、।؟،\"')]}([_*'」”\x00\u200b\u200c\u200d\u0301"
    "\u0e33\u0e01中अ्ß\U0001f468\U0001f3fd\U0001f1e9\ufe0f\U000e0101\U000e0041\U00020000\U0010ffff\u1161"
)


@pytest.mark.parametrize("boundary", ["sentence", "line", "hard"])
@settings(max_examples=250)
@given(texts=st.lists(st.text(alphabet=CHARACTERS, max_size=30) | st.text(max_size=20), max_size=3))
def test_ranks_match_regular_expressions(boundary: str, texts: list[str]) -> None:
    assert rank_texts(texts, boundary) == [rank_slowly(text, boundary) for text in texts]


@settings(max_examples=250)
@given(st.text(alphabet="aB1.. \n…!", max_size=14))
def test_ranks_match_regular_expressions_around_full_stops(text: str) -> None:
    assert rank_texts([text]) == [rank_slowly(text)]


def test_ranks_match_regular_expressions_on_real_text() -> None:
    texts = [document["text"][:5_000] for document in itertools.islice(iterate_python_docs(), 0, 160, 4)]
    for text, ranks in zip(texts, rank_texts(texts), strict=True):
        assert ranks == rank_slowly(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two", {4: SENTENCE_END, 5: SENTENCE_END}),
        (
            'He said "No!" Then',
            {2: WORD_END, 3: WORD_END, 7: WORD_END, 8: WORD_END, 13: SENTENCE_END, 14: SENTENCE_END},
        ),
        ("v3.14 e.g. this", {5: WORD_END, 6: WORD_END, 10: WORD_END, 11: WORD_END}),
        ("if x:\n    y", {2: WORD_END, 3: WORD_END, 5: LINE_END, 6: LINE_END}),
        ("a\n\n  b", {1: PARAGRAPH_END, 3: PARAGRAPH_END}),
        ("他说：“好。”然后……走", {3: CLAUSE_END, 7: SENTENCE_END, 11: SENTENCE_END}),
        ("है। वह", {3: SENTENCE_END, 4: SENTENCE_END}),
        ("تفهم؟نعم", {5: SENTENCE_END}),
        ("ไม่มีช่องว่าง", {}),
        ("", {}),
    ],
)
def test_boundaries_of_known_texts(text: str, expected: dict[int, int]) -> None:
    assert list_boundaries(text) == expected


@pytest.mark.parametrize(
    "head",
    ["1.", "a\n  12.", "x\n2.3.", "J.", "by J.", "(J.", "e.g.", "U.S.", "С.", "Mr.", "see Mrs.", "(Dr.", "x\nSt."],
)
def test_a_full_stop_of_a_number_or_an_abbreviation_ends_no_sentence(head: str) -> None:
    assert list_boundaries(f"{head} Then")[len(head)] == WORD_END


@pytest.mark.parametrize(
    "head",
    [
        "in 1.",
        "it.",
        "Be.",
        "mr.",
        "no Ice.",
        "it's.",
        "是。 1.",
        "J.)",
        "J!",
        "1...",
        "tcp.",
        "Hmmm.",
        "-1.",
        "中.",
        "x1.",
    ],
)
def test_other_full_stops_end_a_sentence(head: str) -> None:
    assert list_boundaries(f"{head} Then")[len(head)] == SENTENCE_END


def test_inner_places_are_those_within_what_a_reader_sees_as_one_character() -> None:
    family, accented, flag = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301", "\U0001f1e9\U0001f1ea"
    wholes = ["a", accented, family, "x", "\r\n", flag, "b", "\U0001f44d\U0001f3fd", "\u2764\ufe0f", "न्", "स", "ab"]
    text = "".join(wholes)
    edges = {0, *itertools.accumulate(len(whole) for whole in wholes)}
    inner = {place for place, rank in enumerate(rank_texts([text])[0]) if rank == INNER}
    assert inner == set(range(len(text))) - edges - {len(text) - 1}


@pytest.mark.parametrize("unit", [".x", "…x", "….", "….x", '."', "1. ", ". ", "a.\n", "``", "…", "! a"])
def test_long_runs_of_marks_are_ranked_like_short_ones(unit: str) -> None:
    text = unit * 100_000  # a search that begins again at each mark would not end here
    ranks = rank_texts([text])[0]
    period = len(unit) * 60
    assert ranks[: period // 2] == rank_slowly(unit * 60)[: period // 2]
    assert ranks[-period // 2 :] == rank_slowly(unit * 60)[-period // 2 :]


@given(st.lists(st.text(alphabet="a \n\u3000\u00a0中\u200b", max_size=8), min_size=1))
def test_text_ends_are_those_of_rstrip(texts: list[str]) -> None:
    contents = [text.encode() for text in texts]
    offsets = np.cumsum([0, *(len(content) for content in contents)])
    found = find_text_ends(np.frombuffer(b"".join(contents), dtype=np.uint8), offsets[:-1], offsets[1:])
    assert (found - offsets[:-1]).tolist() == [len(text.rstrip().encode()) for text in texts]
