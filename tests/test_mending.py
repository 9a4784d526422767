"""Pieces that have other tokens alone than within their document: too many, or none."""

from pydoc_data.topics import topics

import pyarrow as pa
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from pipelines.chunking import ChunkingConfig
from pipelines.pieces import cut_documents
from pipelines.spans import read_corpus
from schemas.errors import InputError
from tests.chunks import SMALL, check_chunks, chunk
from tests.sample_tokenizers import WrappedTokenizer, make_tokenizer


def test_a_tokenizer_that_puts_a_space_before_every_text_stays_within_the_limit() -> None:
    tokenizer = make_tokenizer("prepending")
    text = "".join(topics[name] for name in sorted(topics)[:10])
    corpus = read_corpus(pa.array([text]), None, tokenizer, boundary="sentence", max_title_tokens=1)
    pieces = cut_documents(corpus, tokenizer, max_tokens=SMALL.max_tokens, min_fill=0.5, overlap_tokens=0)
    assert pieces.counts.max() > SMALL.max_tokens  # so the case is met
    check_chunks([text], tokenizer, SMALL)


def test_text_without_tokens_has_no_references() -> None:
    tokenizer = make_tokenizer("dropping")
    table = check_chunks(["!!! ???", "", "...word...", "*** " * 200 + "word"], tokenizer, SMALL)
    assert table["doc_id"].to_pylist() == ["doc-2", "doc-3"]


def test_punctuation_without_a_token_stays_with_its_sentence() -> None:
    text = "The value of the object. " * 30 + "The name!\n\n" * 30
    table = check_chunks([text], make_tokenizer("dropping"), SMALL)
    assert table.num_rows > 5
    assert all(part.endswith((".", "!\n\n")) for part in table["text"].to_pylist()[:-1])


def test_a_tokenizer_that_takes_back_its_tokens_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "-": 1}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace(Regex("^-+$"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with pytest.raises(InputError, match=r"gives no token to '-+' alone"):
        chunk(["a" * 32 + "-" * 32], WrappedTokenizer(tokenizer), SMALL)


def test_a_character_with_more_tokens_than_a_reference_is_named() -> None:
    with pytest.raises(InputError, match=r"max_tokens is 16.*'\ufdfa' alone takes \d+ tokens"):
        chunk(["\ufdfa"], make_tokenizer("unigram"), ChunkingConfig(max_tokens=16))
