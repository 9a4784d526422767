"""Documents to references: tiling, token limits, equal text giving equal ids, and nothing that depends on the batch."""

import itertools
import re
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizing import load_tokenizer
from pipelines.chunking import CHUNKS, ChunkingConfig, chunk_documents
from pipelines.python_docs import iterate_python_docs
from schemas.errors import InputError
from schemas.tables import OCCURRENCES, REFERENCES
from tests.chunks import CONFIGS, FRAGMENTS, MIXED_TEXTS, SMALL, check_chunks, chunk
from tests.sample_tokenizers import ARABIC, CHINESE, FAMILY, HINDI, KINDS, THAI, WrappedTokenizer, make_tokenizer

TITLES = [None, "", "The bank", "e.g. 中文"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(texts=st.lists(MIXED_TEXTS, max_size=3), titles=st.tuples(*[st.sampled_from(TITLES)] * 3))
def test_chunks_cover_any_text_within_the_token_limit(
    kind: str, name: str, texts: list[str], titles: tuple[str | None, ...]
) -> None:
    check_chunks(texts, make_tokenizer(kind), CONFIGS[name], titles[: len(texts)])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["words", "dropping"])
@settings(max_examples=10)
@given(texts=st.lists(MIXED_TEXTS, min_size=2, max_size=4))
def test_a_document_is_cut_the_same_in_any_batch(kind: str, name: str, texts: list[str]) -> None:
    tokenizer, config = make_tokenizer(kind), CONFIGS[name]
    doc_ids = [f"{row}" for row in range(len(texts))]
    titles = ["The bank", None, "", "a"][: len(texts)]
    together = chunk_documents(pa.array(doc_ids), pa.array(texts), pa.array(titles), tokenizer, config)
    alone = [
        chunk_documents(pa.array([doc_id]), pa.array([text]), pa.array([title], pa.string()), tokenizer, config)
        for doc_id, text, title in zip(doc_ids, texts, titles, strict=True)
    ]
    assert together.equals(pa.concat_tables(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_real_text_is_cut_at_ends_of_sentences_and_lines(kind: str) -> None:
    texts = [topics[name] for name in sorted(topics)[::8]]
    table = check_chunks(texts, make_tokenizer(kind), ChunkingConfig())
    num_good = 0
    for doc_id, end, part in zip(*(table[name].to_pylist() for name in ("doc_id", "end_char", "text")), strict=True):
        text = texts[int(doc_id.removeprefix("doc-"))]
        at_line_end = text[end : end + 1] in ("", "\n") or part.endswith("\n")
        num_good += at_line_end or re.search(r"[.!?]['\")\]}`*_]*\s*$", part) is not None
    assert num_good / table.num_rows > 0.95
    assert table["num_tokens"].to_numpy().mean() > 0.7 * 128
    assert not any(part.isspace() for part in table["text"].to_pylist())


def test_cutting_keeps_the_tokens_of_a_byte_level_bpe() -> None:
    tokenizer = make_tokenizer("byte_bpe")
    texts = [topics[name] for name in sorted(topics)[::3]]
    table = chunk(texts, tokenizer, ChunkingConfig())
    num_whole = sum(len(token_ids) for token_ids in tokenizer.encode(texts))
    assert abs(pc.sum(table["num_tokens"]).as_py() - num_whole) / num_whole < 0.01
    assert sum(part.startswith(" ") for part in table["text"].to_pylist()) > 10


def test_equal_text_has_an_equal_id_wherever_it_stands() -> None:
    paragraphs = [f"{topics[name][:300]}\n\n" for name in sorted(topics)[:30]]
    table = check_chunks(["".join(paragraphs), "".join(reversed(paragraphs))], make_tokenizer("byte_bpe"), SMALL)
    first, second = (
        dict(zip(own["text"].to_pylist(), own["ref_id"].to_pylist(), strict=True))
        for own in (table.filter(pc.equal(table["doc_id"], name)) for name in ("doc-0", "doc-1"))
    )
    shared = first.keys() & second.keys()
    assert len(shared) > len(first) / 2
    assert all(first[text] == second[text] for text in shared)
    assert len(set(first.values())) == len(first)


def test_the_fast_tokenizer_gives_the_references_of_the_slow_one() -> None:
    fast = load_tokenizer("memory3-tiny")
    slow = WrappedTokenizer(fast._tokenizer)
    texts = [document["text"] for document in itertools.islice(iterate_python_docs(), 0, 160, 16)]
    texts += [CHINESE * 4, HINDI * 4, THAI * 4, ARABIC * 4, FAMILY * 20, "".join(FRAGMENTS) * 3]
    for name in ("overlapping", "titled"):
        titles = ["The title"] * len(texts)
        found, expected = (chunk(texts, tokenizer, CONFIGS[name], titles) for tokenizer in (fast, slow))
        assert found.drop_columns("ref_id").equals(expected.drop_columns("ref_id"))


def test_no_documents_give_an_empty_table() -> None:
    for texts in ([], [""], ["", ""]):
        for config in (SMALL, CONFIGS["titled"]):
            table = chunk(texts, make_tokenizer("byte_bpe"), config, ["Title"] * len(texts))
            assert table.schema == CHUNKS
            assert table.num_rows == 0


def test_arrays_may_be_slices_chunked_or_sequences() -> None:
    texts = ["no", "The bank holds references. " * 20, "Another text.", "no"]
    names = [f"doc-{row}" for row in range(4)]
    tokenizer = make_tokenizer("byte_bpe")
    expected = chunk_documents(pa.array(names[1:3]), pa.array(texts[1:3]), None, tokenizer, SMALL)
    for doc_ids, values in (
        (pa.array(names)[1:3], pa.array(texts)[1:3]),
        (pa.chunked_array([names[1:2], names[2:3]]), pa.chunked_array([texts[1:2], texts[2:3]])),
        (pa.array(names, pa.large_string())[1:3], pa.array(texts, pa.large_string())[1:3]),
        (names[1:3], texts[1:3]),
    ):
        assert chunk_documents(doc_ids, values, None, tokenizer, SMALL).equals(expected)


def test_columns_are_those_of_the_tables_of_the_bank() -> None:
    for schema in (OCCURRENCES, REFERENCES):
        for field in schema:
            assert CHUNKS.field(field.name) == field


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 15},
        {"max_tokens": 256},
        {"min_fill": -0.1},
        {"min_fill": 1.0},
        {"boundary": "page"},
        {"overlap_tokens": -1},
        {"overlap_tokens": 64},
        {"max_title_tokens": 0},
        {"max_title_tokens": 65, "title_prefix": True},
    ],
    ids=str,
)
def test_config_out_of_bounds_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        ChunkingConfig(**values)  # type: ignore[arg-type]
