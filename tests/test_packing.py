"""Packing: every token of every document is there, each but the first a target once, and its place is known."""

import functools
import itertools
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import reading
from model.tokenizing import CheckpointTokenizer
from pipelines.candidates import split_chunks
from pipelines.packing import PackingConfig, order_documents, pack_documents
from schemas.errors import InputError
from schemas.sequences import CHUNK_TOKENS, PACKED, count_chunks
from tests.corpora import CHINESE
from tests.models import train_tokenizer

CONFIG = PackingConfig(bos_token_id=1, eos_token_id=2, sequence_tokens=64)


@functools.cache
def get_tokenizer() -> CheckpointTokenizer:
    return train_tokenizer()


def pack(texts: dict[str, str], config: PackingConfig = CONFIG) -> list[dict[str, Any]]:
    table = pack_documents(pa.array(texts, pa.string()), pa.array(texts.values(), pa.string()), get_tokenizer(), config)
    table.validate(full=True)
    assert table.schema == PACKED
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


paragraphs = st.sampled_from(
    [topics[name][:800] for name in sorted(topics)[:12]] + [CHINESE[:90], "👩‍👩‍👧🇨🇭 สวัสดี " * 9]
)
documents = st.lists(st.one_of(paragraphs, st.text(min_size=1, max_size=60)), max_size=7)


@settings(max_examples=60)
@given(texts=documents, num_chunks=st.integers(1, 3), seed=st.integers(0, 3))
def test_nothing_is_lost_and_every_token_but_the_first_is_a_target_once(
    texts: list[str], num_chunks: int, seed: int
) -> None:
    config = PackingConfig(bos_token_id=1, eos_token_id=2, sequence_tokens=64 * num_chunks, seed=seed)
    corpus = {f"d{number}": text for number, text in enumerate(texts)}
    names = [list(corpus)[place] for place in order_documents(list(corpus), seed)]
    expected = [token for name in names for token in (1, *get_tokenizer().encode([corpus[name]])[0].tolist(), 2)]
    rows = pack(corpus, config)
    if not texts:
        assert rows == []
        return
    assert expected == rows[0]["tokens"][:1] + [token for row in rows for token in row["tokens"][1:]]
    assert [row["num_tokens"] for row in rows] == [len(row["tokens"]) for row in rows]
    assert all(row["num_tokens"] == 64 * num_chunks + 1 for row in rows[:-1])
    assert 2 <= rows[-1]["num_tokens"] <= 64 * num_chunks + 1
    for before, after in itertools.pairwise(rows):
        assert before["tokens"][-1] == after["tokens"][0]


@settings(max_examples=60)
@given(texts=documents)
def test_spans_say_where_in_which_document_the_tokens_are_from(texts: list[str]) -> None:
    corpus = {f"d{number}": text for number, text in enumerate(texts)}
    reached = dict.fromkeys(corpus, 0)
    for row in pack(corpus):
        is_text = np.zeros(row["num_tokens"], np.bool_)
        for span in row["documents"]:
            text = corpus[span["doc_id"]]
            tokens = row["tokens"][span["start_token"] : span["end_token"]]
            is_text[span["start_token"] : span["end_token"]] = True
            found = text[span["start_char"] : span["end_char"]]
            # Letters that are cut between sequences belong to the spans of both.
            decoded = get_tokenizer().decode(tokens)
            assert decoded.strip("\ufffd") in found
            assert len(found) <= len(decoded)
            assert found.encode().find(decoded.strip("\ufffd").encode()) >= 0
            assert span["start_char"] <= reached[span["doc_id"]] <= span["end_char"]
            reached[span["doc_id"]] = span["end_char"]
        # What is in no span is <s> or </s>, which no text can spell.
        assert all(token in (1, 2) for token in np.array(row["tokens"])[~is_text].tolist())
        assert not {1, 2} & set(np.array(row["tokens"])[is_text].tolist())
    assert reached == {name: len(text) for name, text in corpus.items()}


def test_the_order_depends_on_ids_and_seed_alone() -> None:
    corpus = {name: topics[name][:500] for name in sorted(topics)[:9]}
    turned = dict(reversed(corpus.items()))
    assert pack(corpus) == pack(turned)
    orders = {tuple(order_documents(list(corpus), seed)) for seed in range(5)}
    assert len(orders) == 5


def test_chunks_are_what_is_read() -> None:
    assert CHUNK_TOKENS == reading.CHUNK_TOKENS
    for num_tokens in (2, 64, 65, 66, 129, 130, 513):
        chunks = split_chunks(np.arange(num_tokens, dtype=np.int32))
        assert np.concatenate(chunks).tolist() == list(range(num_tokens - 1))
        assert len(chunks) == count_chunks(num_tokens)
        assert all(len(chunk) == CHUNK_TOKENS for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_tokens": 100}, "sequence_tokens is 100, must be a positive multiple of 64"),
        ({"sequence_tokens": 0}, "sequence_tokens is 0"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackingConfig(**{"bos_token_id": 1, "eos_token_id": 2, **changes})
