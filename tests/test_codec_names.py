"""Names of codecs: what they say, how many bytes a vector takes, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec_names import CodecName, count_code_bytes, is_trained, parse_codec, parse_vector_codec
from schemas.errors import InputError
from schemas.records import RecordLayout

DIGEST = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("name", "head_dim", "num_bytes"),
    [
        ("none", 80, 160),
        ("int8", 80, 82),
        ("turbo1", 80, 12),
        ("turbo2", 80, 22),
        ("turbo3", 80, 32),
        ("turbo3", 32, 14),
        ("turbo3", 30, 14),
        ("turbo4", 80, 42),
        ("lloyd14", 32, 14),
        ("lloyd32", 32, 32),
        ("PRQ2x7x8", 32, 14),
        ("PRQ2x3x5", 32, 4),
        ("OPQ20x80-Residual2x14-PQ8x10", 80, 14),
        ("OPQ8x32-Residual2x14-PQ8x10", 32, 14),
    ],
)
def test_bytes_of_a_vector(name: str, head_dim: int, num_bytes: int) -> None:
    assert count_code_bytes(name, head_dim, 2) == num_bytes
    if name != "none":
        assert count_code_bytes(f"mapped-{name}", head_dim, 2) == num_bytes
        assert count_code_bytes(name, head_dim, 4) == num_bytes


def test_names_are_taken_apart() -> None:
    assert parse_codec("turbo4/turbo3") == CodecName(keys="turbo4", values="turbo3")
    assert parse_codec(f"mapped-lloyd14@{DIGEST}") == CodecName(
        keys="mapped-lloyd14", values="mapped-lloyd14", digest=DIGEST
    )
    paper = parse_vector_codec("mapped-OPQ20x80-Residual2x14-PQ8x10")
    assert (paper.mapped, paper.family, paper.numbers) == (True, "OPQ", (20, 80, 2, 14, 8, 10))
    assert paper.inner_name == "OPQ20x80-Residual2x14-PQ8x10"
    assert [is_trained(name) for name in ("none", "int8", "turbo1", "lloyd9", "mapped-int8", "PRQ1x1x1")] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


names = st.one_of(
    st.sampled_from(["none", "int8", "turbo1", "turbo4", "OPQ8x32-Residual2x14-PQ8x10"]),
    st.builds("lloyd{}".format, st.integers(1, 32)),
    st.builds("PRQ{}x{}x{}".format, st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(1, 12)),
)


@given(keys=names, values=names, mapped=st.booleans())
def test_a_written_name_is_read_as_what_it_was_and_its_bytes_make_the_payload(
    keys: str, values: str, mapped: bool
) -> None:
    keys = f"mapped-{keys}" if mapped and keys != "none" else keys
    digest = DIGEST if is_trained(keys) or is_trained(values) else ""
    name = CodecName(keys=keys, values=values, digest=digest)
    assert parse_codec(str(name)) == name
    layout = RecordLayout(num_layers=3, num_kv_heads=2, num_slots=5, head_dim=32, codec=str(name))
    assert layout.key_bytes == count_code_bytes(keys, 32, 2)
    assert layout.payload_bytes == 3 * 2 * 5 * (layout.key_bytes + count_code_bytes(values, 32, 2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int9",
        "turbo5",
        "turbo",
        "mapped-none",
        "mapped-",
        "none/none",
        "int8/",
        "int8/int8",
        "turbo3@" + DIGEST,
        "lloyd14@short",
        "lloyd14@" + DIGEST.upper(),
        "PRQ2x7",
        "OPQ20x80-Residual2x14",
        "turbo3 ",
    ],
)
def test_no_such_codec(text: str) -> None:
    with pytest.raises(InputError, match="codec"):
        parse_codec(text)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        ("PRQ3x7x8", 32),
        ("PRQ0x7x8", 32),
        ("PRQ2x0x8", 32),
        ("PRQ2x7x17", 32),
        ("PRQ2x7x0", 32),
        ("lloyd0", 32),
        ("lloyd33", 32),
        ("OPQ20x80-Residual2x14-PQ8x10", 64),
        ("OPQ7x80-Residual2x14-PQ8x10", 80),
        ("OPQ8x80-Residual2x14-PQ7x10", 80),
        ("OPQ20x80-Residual0x14-PQ8x10", 80),
    ],
)
def test_a_codec_that_does_not_fit_vectors_is_refused(name: str, head_dim: int) -> None:
    with pytest.raises(InputError, match="codec"):
        count_code_bytes(name, head_dim, 2)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("turbo4", 40_000), ("int8", 0), ("PRQ40x500x16", 80), ("lloyd4", 33), ("mapped-int8", 1025), ("turbo1", -4)],
)
def test_sizes_that_would_take_all_memory_are_refused(name: str, head_dim: int) -> None:
    with pytest.raises(InputError, match=name):
        count_code_bytes(name, head_dim, 2)
