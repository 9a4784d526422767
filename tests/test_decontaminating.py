"""References that overlap test texts: the paper's measure against its definition, and who is found."""

import random
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.locating import SHIPPED_MODEL
from model.tokenizing import CheckpointTokenizer, load_tokenizer
from pipelines.decontaminating import DecontaminationConfig, find_contaminated, make_needles
from schemas.errors import InputError
from schemas.overlap import find_longest_match, measure_overlap
from schemas.tables import CONTAMINATED


def find_longest_match_slowly(text: list[int], reference: list[int]) -> int:
    """The longest common subsequence over every window of twice the reference."""
    longest = 0
    for start in range(len(text)):
        lengths = [0] * (len(reference) + 1)
        for token in text[start : start + 2 * len(reference)]:
            before = 0
            for place, other in enumerate(reference):
                above = lengths[place + 1]
                lengths[place + 1] = before + 1 if token == other else max(above, lengths[place])
                before = above
        longest = max(longest, lengths[-1])
    return longest


few_tokens = st.lists(st.integers(0, 4), max_size=40)


@given(few_tokens, few_tokens.filter(bool))
def test_the_match_is_that_of_the_definition(text: list[int], reference: list[int]) -> None:
    found = find_longest_match(np.array(text, np.int32), np.array(reference, np.int32))
    assert found == find_longest_match_slowly(text, reference)


@pytest.mark.parametrize("size", [63, 64, 65, 128, 130])
def test_long_references_take_several_words_of_bits(size: int) -> None:
    generator = random.Random(size)
    for num_tokens in (2, 40):
        reference = [generator.randrange(num_tokens) for _ in range(size)]
        text = [token for token in reference if generator.random() < 0.8] + [num_tokens] * 20
        expected = find_longest_match_slowly(text, reference)
        assert find_longest_match(np.array(text, np.int32), np.array(reference, np.int32)) == expected
        assert measure_overlap(np.array(text, np.int32), np.array(reference, np.int32)) == expected / size


def test_a_match_may_not_be_spread_over_the_whole_text() -> None:
    reference = np.arange(4, dtype=np.int32)
    text = np.full(40, 9, np.int32)
    text[[0, 3, 8, 30]] = reference
    assert find_longest_match(text, reference) == 2


@pytest.fixture(scope="module")
def tokenizer() -> CheckpointTokenizer:
    return load_tokenizer(SHIPPED_MODEL)


def make_references(tokenizer: CheckpointTokenizer, texts: list[str]) -> pa.Table:
    tokens = [ids.tolist() for ids in tokenizer.encode(texts)]
    columns = {"ref_id": [f"{row:032x}" for row in range(len(texts))], "token_ids": tokens}
    return pa.table(columns, schema=pa.schema([("ref_id", pa.string()), ("token_ids", pa.list_(pa.int32()))]))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2 / 3, 0.9])
def test_the_filter_loses_no_reference(tokenizer: CheckpointTokenizer, threshold: float) -> None:
    generator = random.Random(5)
    paragraphs = [part for text in topics.values() for part in text.split("\n\n") if 100 < len(part) < 400]
    texts = generator.sample(paragraphs, 60)
    needles = generator.sample(paragraphs, 15)
    for text in texts[:20]:  # with some words left out and something around
        words = [word for word in text.split(" ") if generator.random() < generator.choice((0.99, 0.9, 0.7))]
        needles.append(f"Question: {' '.join(words)}\nAnswer:")
    references = make_references(tokenizer, texts)
    prepared = make_needles([f"n{row}" for row in range(len(needles))], pa.array(needles), tokenizer)
    found = find_contaminated(references, prepared, DecontaminationConfig(threshold=threshold))
    expected, encoded = [], tokenizer.encode(needles)
    for row, reference in enumerate(references["token_ids"].to_pylist()):
        overlaps = [measure_overlap(ids, np.array(reference, np.int32)) for ids in encoded]
        if max(overlaps) > threshold:
            expected.append((f"{row:032x}", max(overlaps), f"n{overlaps.index(max(overlaps))}"))
    assert list(zip(*(found[name].to_pylist() for name in CONTAMINATED.names), strict=True)) == expected
    assert found.schema == CONTAMINATED
    assert 0 < len(expected) <= len(texts)


def test_nothing_to_look_for_finds_nothing(tokenizer: CheckpointTokenizer) -> None:
    prepared = make_needles([], pa.array([], pa.string()), tokenizer)
    references = make_references(tokenizer, ["some text"])
    assert len(find_contaminated(references, prepared, DecontaminationConfig())) == 0


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="threshold is 1.0, must be at least 0 and below 1"):
        DecontaminationConfig(threshold=1.0)
