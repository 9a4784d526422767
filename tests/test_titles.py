"""Titles before references: where they stand, how long they are, and where there is no room for them."""

from pydoc_data.topics import topics

import pytest

from pipelines.chunking import ChunkingConfig
from tests.chunks import CONFIGS, check_chunks, chunk
from tests.sample_tokenizers import make_tokenizer


def test_titles_stand_before_references_that_do_not_begin_with_them() -> None:
    text = "Assert statement\n\n" + topics["assert"]
    table = check_chunks([text], make_tokenizer("byte_bpe"), CONFIGS["titled"], ["Assert statement"])
    prefixes = table["prefix"].to_pylist()
    assert prefixes == ["", *["Assert statement\n"] * (len(prefixes) - 1)]
    assert len(prefixes) > 10
    without = chunk([text], make_tokenizer("byte_bpe"), ChunkingConfig(max_tokens=32), ["Assert statement"])
    assert set(without["prefix"].to_pylist()) == {""}


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("  A\n title\t", "A title\n"),
        (" ", ""),
        (None, ""),
        ("The bank holds references, and it is read by attention here and there", "The bank"),
        ("q" * 100, "q" * 8),
    ],
)
def test_titles_are_put_on_one_line_and_cut_at_a_word(title: str | None, expected: str) -> None:
    config = ChunkingConfig(max_tokens=32, title_prefix=True, max_title_tokens=8)
    tokenizer = make_tokenizer("byte_bpe")
    prefix = chunk(["Some text."], tokenizer, config, [title])["prefix"][0].as_py()
    assert prefix == expected or (prefix.startswith(expected) and prefix.endswith("\n"))
    assert len(tokenizer.encode([prefix.rstrip("\n")])[0]) <= 8
    if title and prefix:
        words = " ".join(title.split())
        rest = words[len(prefix) - 1 :]
        assert words.startswith(prefix[:-1])
        longer = prefix[:-1] + (" " + rest.split()[0] if rest.startswith(" ") else rest[:1])
        assert not rest or len(tokenizer.encode([longer])[0]) > 8


def test_a_character_that_leaves_no_room_for_the_title_stands_without_it() -> None:
    tokenizer = make_tokenizer("unigram")
    num_tokens = len(tokenizer.encode(["\ufdfa"])[0])
    config = ChunkingConfig(max_tokens=num_tokens + 1, title_prefix=True, max_title_tokens=8)
    table = check_chunks(["\ufdfa", "\ufdfa\ufdfa"], tokenizer, config, ["A title of it", None])
    assert table["prefix"].to_pylist() == [""] * 3
