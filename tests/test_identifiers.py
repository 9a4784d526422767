"""Names by content: golden ids computed elsewhere (``b2sum -l 128``), and what they do and do not depend on."""

from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.identifiers import ID_LENGTH, hash_bytes, hash_json, make_ref_id
from tests.models import train_tokenizer

token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "cae66941d9efbd404e4d88758ea67670"), (b"memory", "ef1b4d34c48a7363ea824e032fae0a78")],
)
def test_golden_ids_of_bytes(content: bytes, expected: str) -> None:
    assert hash_bytes(content) == expected
    assert len(expected) == ID_LENGTH


def test_golden_ids_of_references() -> None:
    """The hashed bytes are the tokenizer's id, a zero byte, and the tokens as little-endian 32-bit numbers."""
    assert make_ref_id([1, 2, 2**31 - 1], "tok") == "34a0717253006b3681d15d53b03d58e9"
    assert make_ref_id([], "tok") == "3b161ebaddf1e01102012f5dc64bc25f"


def test_golden_ids_of_json() -> None:
    assert hash_json({"b": None, "a": [1, "é"]}) == "71d77e187866a1e5be66e2a9a48c2ea3"


@given(tokens=token_lists)
def test_equal_tokens_have_an_equal_id_whatever_holds_them(tokens: list[int]) -> None:
    expected = make_ref_id(tokens, "tok")
    for dtype in ("<i4", ">i4", "<i8", "<u4"):
        assert make_ref_id(np.array(tokens, dtype=dtype), "tok") == expected
    strided = np.repeat(np.array(tokens, dtype=np.int32), 2)[::2]
    assert make_ref_id(strided, "tok") == expected
    assert make_ref_id(tuple(tokens), "tok") == expected


@given(first=token_lists, second=token_lists)
def test_ids_are_equal_only_for_equal_tokens(first: list[int], second: list[int]) -> None:
    assert (make_ref_id(first, "tok") == make_ref_id(second, "tok")) == (first == second)


def test_the_order_of_tokens_and_the_tokenizer_matter() -> None:
    ids = {make_ref_id(tokens, name) for tokens in ([1, 2], [2, 1], [1, 2, 0]) for name in ("tok", "tokenizer", "")}
    assert len(ids) == 9


def test_equal_text_has_an_equal_id_and_another_tokenizer_gives_another() -> None:
    tokenizer, same, other = train_tokenizer(), train_tokenizer(), train_tokenizer(400)
    assert tokenizer.tokenizer_id == same.tokenizer_id != other.tokenizer_id
    texts = [topics["assert"][:300], topics["with"][:300], topics["assert"][:300]]
    ids = [make_ref_id(tokens, tokenizer.tokenizer_id) for tokens in tokenizer.encode(texts)]
    assert ids[0] == ids[2] != ids[1]
    assert ids == [make_ref_id(tokens, same.tokenizer_id) for tokens in same.encode(texts)]
    assert set(ids).isdisjoint(make_ref_id(tokens, other.tokenizer_id) for tokens in other.encode(texts))


@pytest.mark.parametrize(
    "tokens",
    [
        [2**31],
        [-(2**31) - 1],
        np.array([2**31 + 5]),
    ],
)
def test_a_number_that_is_no_token_has_no_id(tokens: list[int] | np.ndarray) -> None:
    with pytest.raises((OverflowError, ValueError)):
        make_ref_id(tokens, "tok")


def test_json_ids_depend_on_values_and_not_on_the_order_of_keys() -> None:
    assert hash_json({"a": 1, "b": {"c": 2, "d": 3}}) == hash_json({"b": {"d": 3, "c": 2}, "a": 1})
    assert hash_json((1, 2)) == hash_json([1, 2]) != hash_json([2, 1])
    values = [None, 0, 1, 1.5, "", "1", [], {}, [1], {"1": 1}, "é", "e\u0301"]
    assert len({hash_json(value) for value in values}) == len(values)


@given(contents=st.lists(st.binary(max_size=8), min_size=2, max_size=8))
def test_ids_sort_the_same_as_bytes_and_as_text(contents: list[bytes]) -> None:
    ids = [hash_bytes(content) for content in contents]
    assert sorted(ids) == [digest.hex() for digest in sorted(bytes.fromhex(ref_id) for ref_id in ids)]
