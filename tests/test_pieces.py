"""Pieces and their own tokens: documents longer than a window, and text that need not be tokenized twice."""

from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import pieces
from pipelines.chunking import ChunkingConfig
from tests.chunks import CONFIGS, MIXED_TEXTS, check_chunks, chunk
from tests.sample_tokenizers import CHINESE, HINDI, THAI, SeparatingTokenizer, WrappedTokenizer, make_tokenizer


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20)
@given(texts=st.lists(MIXED_TEXTS, min_size=1, max_size=3))
def test_separable_places_change_nothing(name: str, texts: list[str]) -> None:
    separating = make_tokenizer("words")
    assert isinstance(separating, SeparatingTokenizer)
    plain = WrappedTokenizer(separating._tokenizer)
    titles = ["The bank", None, "a"][: len(texts)]
    assert chunk(texts, separating, CONFIGS[name], titles).equals(chunk(texts, plain, CONFIGS[name], titles))


def test_text_between_separable_places_is_tokenized_once() -> None:
    separating = make_tokenizer("words")
    assert isinstance(separating, SeparatingTokenizer)
    texts = [topics[name] for name in sorted(topics)[:15]]
    num_bytes = sum(len(text.encode()) for text in texts)
    separating.num_encoded_bytes = 0
    table = chunk(texts, separating, ChunkingConfig())
    assert separating.num_encoded_bytes < 1.05 * num_bytes
    plain = WrappedTokenizer(separating._tokenizer)
    assert table.equals(chunk(texts, plain, ChunkingConfig()))
    assert plain.num_encoded_bytes > 1.9 * num_bytes


@pytest.mark.parametrize("kind", ["byte_bpe", "words", "dropping"])
@pytest.mark.parametrize("name", ["tiling", "lines"])
def test_a_document_longer_than_a_window_is_covered(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.setattr(pieces, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(pieces, "GROUP_BYTES", 2500)
    texts = [CHINESE * 15, THAI * 12, HINDI * 12, "x" * 2001, "word" + "!" * 2500 + " word", "e" + "\u0301" * 750]
    assert check_chunks(texts, make_tokenizer(kind), CONFIGS[name]).num_rows > (20 if kind == "dropping" else 100)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_is_cut_the_same_in_windows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = ["".join(topics[name] for name in sorted(topics)[:12]), topics["specialnames"][:20_000]]
    tokenizer = make_tokenizer("words")
    whole = chunk(texts, tokenizer, CONFIGS[name], ["The bank", "Python"])
    monkeypatch.setattr(pieces, "WINDOW_BYTES", 3000)
    monkeypatch.setattr(pieces, "GROUP_BYTES", 7000)
    assert chunk(texts, tokenizer, CONFIGS[name], ["The bank", "Python"]).equals(whole)
