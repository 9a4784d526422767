"""Texts cut into references, with every promise of the table checked."""

import itertools
from collections.abc import Sequence

import pyarrow as pa
from hypothesis import strategies as st

from pipelines.chunking import CHUNKS, ChunkingConfig, chunk_documents
from schemas.identifiers import make_ref_id
from schemas.protocols import TextTokenizer
from tests.sample_tokenizers import ACCENTED, ARABIC, CHINESE, FAMILY, HINDI, THAI

FRAGMENTS = [
    "The bank holds references. ",
    "It is read by attention, e.g. here; and (there). ",
    "    indented = code[0]\n",
    "\r\n",
    "\n\n",
    "\n",
    " ",
    "\t",
    "   ",
    "\x00",
    "\u200b",
    "\ufeff",
    "\ufdfa",
    "\u00a0",
    FAMILY,
    ACCENTED,
    "e" + "\u0316" * 13,
    "\U0001f1e9\U0001f1ea",
    "\u2764\ufe0f",
    "ﬁ①Å",
    CHINESE[:60],
    HINDI[:40],
    THAI[:40],
    ARABIC[:40],
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....................",
    "%$#@!&^*()_+" * 3,
]

MIXED_TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=12), max_size=30).map("".join)
"""Texts where everything that makes cutting hard stands side by side."""

SMALL = ChunkingConfig(max_tokens=32)

CONFIGS = {
    "tiling": SMALL,
    "overlapping": ChunkingConfig(max_tokens=32, overlap_tokens=9),
    "lines": ChunkingConfig(max_tokens=32, boundary="line", overlap_tokens=15, min_fill=0.0),
    "hard": ChunkingConfig(max_tokens=32, boundary="hard"),
    "titled": ChunkingConfig(max_tokens=32, overlap_tokens=4, title_prefix=True, max_title_tokens=16),
}


def chunk(
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    config: ChunkingConfig,
    titles: Sequence[str | None] | None = None,
) -> pa.Table:
    doc_ids = pa.array([f"doc-{row}" for row in range(len(texts))], pa.string())
    title_array = None if titles is None else pa.array(titles, pa.string())
    return chunk_documents(doc_ids, pa.array(texts, pa.string()), title_array, tokenizer, config)


def check_chunks(
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    config: ChunkingConfig,
    titles: Sequence[str | None] | None = None,
) -> pa.Table:
    """Checks every promise of the table and returns it. Titles are short and on one line."""
    table = chunk(texts, tokenizer, config, titles)
    assert table.schema == CHUNKS
    table.validate(full=True)
    rows = table.to_pylist()
    names = [f"doc-{row}" for row in range(len(texts))]
    assert [row["doc_id"] for row in rows] == sorted((row["doc_id"] for row in rows), key=names.index)
    for name, text, title in zip(names, texts, titles or [None] * len(texts), strict=True):
        own = [row for row in rows if row["doc_id"] == name]
        if not own:
            assert not len(tokenizer.encode([text])[0])
            continue
        content = text.encode()
        assert [row["ordinal"] for row in own] == list(range(len(own)))
        for unit, size in (("char", len(text)), ("byte", len(content))):
            starts = [row[f"start_{unit}"] for row in own]
            ends = [row[f"end_{unit}"] for row in own]
            assert (starts[0], ends[-1]) == (0, size)
            assert all(first < second for places in (starts, ends) for first, second in itertools.pairwise(places))
            if config.overlap_tokens == 0:
                assert starts[1:] == ends[:-1]
            assert all(start <= end for start, end in zip(starts[1:], ends, strict=False))
        for row in own:
            span = text[row["start_char"] : row["end_char"]]
            assert span.encode() == content[row["start_byte"] : row["end_byte"]]
            assert row["text"] == row["prefix"] + span
            wanted = f"{title}\n" if title and config.title_prefix and not span.startswith(title) else ""
            assert row["prefix"] == wanted or (row["prefix"] == "" and len(span) == 1)
    for row, token_ids in zip(rows, tokenizer.encode([row["text"] for row in rows]), strict=True):
        assert 1 <= row["num_tokens"] == len(row["token_ids"]) <= config.max_tokens
        assert row["token_ids"] == token_ids.tolist()
        assert row["ref_id"] == make_ref_id(token_ids, tokenizer.tokenizer_id)
    return table
