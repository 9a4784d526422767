"""The layout of one memory as bytes: round trips for all shapes, the paper's numbers, and what is refused."""

import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BankFormatError, InputError
from schemas.records import Bytes, RecordLayout

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
TINY: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 1, "num_slots": 2, "head_dim": 4}

IDS = ["0" * 32, "0123456789abcdef" * 2, "f" * 32]


def pack_zeros(layout: RecordLayout, ref_ids: list[str]) -> Bytes:
    payload = np.zeros((len(ref_ids), layout.payload_bytes), dtype=np.uint8)
    return layout.pack(payload, np.zeros((len(ref_ids), *layout.offsets_shape), dtype=np.uint8), ref_ids)


layouts = st.builds(
    RecordLayout,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 4),
    num_slots=st.integers(1, 9),
    head_dim=st.integers(1, 20),
    dtype=st.sampled_from(sorted(SIZES)),
)


@given(layout=layouts, num_records=st.integers(1, 5), seed=st.integers(0, 999))
def test_packing_equals_joining_bytes_and_unpacking_undoes_it(
    layout: RecordLayout, num_records: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    shape = (layout.num_layers, 2, layout.num_kv_heads, layout.num_slots, layout.head_dim)
    payload = draw.integers(0, 256, (num_records, math.prod(shape) * SIZES[layout.dtype]), dtype=np.uint8)
    offsets = draw.integers(
        0, 256, (num_records, layout.num_layers, layout.num_kv_heads, layout.num_slots), dtype=np.uint8
    )
    ref_ids = [draw.bytes(16).hex() for _ in range(num_records)]
    records = layout.pack(payload, offsets, ref_ids)

    joined = [
        payload[row].tobytes() + offsets[row].tobytes() + bytes.fromhex(ref_ids[row]) for row in range(num_records)
    ]
    joined = [content + zlib.crc32(content).to_bytes(4, "little") for content in joined]
    assert [record.tobytes() for record in records] == [record.ljust(layout.stride_bytes, b"\0") for record in joined]
    assert records.shape == (num_records, layout.stride_bytes)
    assert records.dtype == np.uint8

    assert layout.read_ref_ids(records) == ref_ids
    again = layout.unpack(records, ref_ids)
    assert np.array_equal(again[0], payload)
    assert np.array_equal(again[1], offsets)
    assert again[1].shape == offsets.shape


@given(layout=layouts)
def test_the_stride_is_the_least_multiple_of_64_that_holds_a_record(layout: RecordLayout) -> None:
    vectors = 2 * layout.num_layers * layout.num_kv_heads * layout.num_slots
    needed = vectors * layout.head_dim * SIZES[layout.dtype] + vectors // 2 + 16 + 4
    assert layout.payload_bytes + layout.num_offsets + 20 == needed
    assert layout.stride_bytes % 64 == 0
    assert needed <= layout.stride_bytes < needed + 64


@given(layout=layouts)
def test_a_layout_goes_through_json(layout: RecordLayout) -> None:
    assert RecordLayout.from_json(layout.to_json()) == layout


def test_unpacking_copies_nothing() -> None:
    layout = RecordLayout(**TINY)
    records = pack_zeros(layout, IDS)
    payload, offsets = layout.unpack(records, IDS)
    assert np.shares_memory(payload, records)
    assert np.shares_memory(offsets, records)


def test_the_papers_memory_has_450560_bytes() -> None:
    layout = RecordLayout(num_layers=22, num_kv_heads=8, num_slots=8, head_dim=80)
    assert layout.payload_shape == (22, 2, 8, 8, 80)
    assert layout.payload_bytes == 450_560
    assert layout.offsets_shape == (22, 8, 8)
    assert layout.num_offsets == 1_408
    assert layout.stride_bytes == 452_032


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": -1}, "num_kv_heads is -1"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"head_dim": -80}, "head_dim is -80"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": "bf16"}, "dtype is 'bf16'"),
        ({"codec": "pq"}, "no codec 'pq'"),
        ({"codec": "PRQ2x7x8"}, "has to be trained"),
        ({"codec": "none@" + "0" * 32}, "nothing in it is trained"),
        ({"codec": "OPQ20x80-Residual2x14-PQ8x10@" + "0" * 32}, "for vectors of 80"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecordLayout(**{**TINY, **changes})
    with pytest.raises(BankFormatError, match=message):
        RecordLayout.from_json({**RecordLayout(**TINY).to_json(), **changes})


@pytest.mark.parametrize(
    "value",
    [
        {},
        TINY | {"num_heads": 8},
        {key: value for key, value in TINY.items() if key != "head_dim"},
        TINY | {"head_dim": "4"},
        TINY | {"head_dim": None},
        TINY | {"dtype": ["float32"]},
        None,
        [1, 2],
        TINY | {"num_layers": 1.5},
        TINY | {"num_layers": True},
    ],
)
def test_json_that_is_no_layout_is_refused(value: Any) -> None:
    with pytest.raises(BankFormatError, match="record layout not understood"):
        RecordLayout.from_json(value)


def test_records_of_another_shape_are_not_packed() -> None:
    layout = RecordLayout(**TINY)
    offsets = np.zeros((3, *layout.offsets_shape), dtype=np.uint8)
    with pytest.raises(ValueError, match="broadcast"):
        layout.pack(np.zeros((3, layout.payload_bytes + 2), dtype=np.uint8), offsets, IDS)
    with pytest.raises(ValueError, match="broadcast"):
        layout.pack(np.zeros((2, layout.payload_bytes), dtype=np.uint8), offsets, IDS)


def test_no_records_are_packed_and_unpacked_too() -> None:
    layout = RecordLayout(**TINY)
    no_offsets = np.zeros((0, *layout.offsets_shape), dtype=np.uint8)
    records = layout.pack(np.zeros((0, layout.payload_bytes), dtype=np.uint8), no_offsets, [])
    assert records.shape == (0, layout.stride_bytes)
    assert layout.unpack(records)[1].shape == no_offsets.shape


@given(layout=layouts, row=st.integers(0, 2), data=st.data())
def test_no_flipped_bit_is_read(layout: RecordLayout, row: int, data: st.DataObject) -> None:
    records = pack_zeros(layout, IDS)
    used_bytes = layout.payload_bytes + layout.num_offsets + 20
    place = data.draw(st.integers(0, used_bytes - 1))
    records[row, place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BankFormatError, match=f"some shard is damaged: record of reference {IDS[row]} has changed"):
        layout.unpack(records, IDS, origin="some shard")
    with pytest.raises(BankFormatError, match=f"record number {row} has changed"):
        layout.unpack(records)
    records[row, place] = pack_zeros(layout, IDS)[row, place]
    assert not layout.unpack(records, IDS)[0].any()


def test_a_record_in_the_place_of_another_is_not_read() -> None:
    layout = RecordLayout(**TINY)
    records = pack_zeros(layout, IDS)
    layout.unpack(records[[0, 0, 2]])
    message = f"some shard is damaged: it holds the memory of reference {IDS[0]} in place of that of {IDS[1]}"
    with pytest.raises(BankFormatError, match=message):
        layout.unpack(records[[0, 0, 2]], IDS, origin="some shard")
    with pytest.raises(BankFormatError, match="shape"):
        layout.unpack(records, IDS[:2])
    with pytest.raises(BankFormatError, match="shape"):
        layout.unpack(records[:, :-1], IDS)
    with pytest.raises(BankFormatError, match="'0' is no id"):
        layout.unpack(records[:1], ["0"])


def test_records_that_do_not_lie_together_are_read_too() -> None:
    layout = RecordLayout(**TINY)
    wide = np.repeat(pack_zeros(layout, IDS), 2, axis=1)
    wide[:, ::2] = pack_zeros(layout, IDS)
    layout.check_records(wide[:, ::2], IDS)
    layout.check_records(pack_zeros(layout, IDS)[::-1], IDS[::-1])


def test_zeros_are_no_record() -> None:
    layout = RecordLayout(**TINY)
    with pytest.raises(BankFormatError, match="record number 0 has changed"):
        layout.unpack(np.zeros((1, layout.stride_bytes), dtype=np.uint8))
