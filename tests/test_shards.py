"""Payload shards: their exact bytes, random access, and that no damaged or foreign file is taken for one."""

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from schemas.errors import BankFormatError
from schemas.records import Bytes, RecordLayout
from schemas.shards import FIRST_BYTES, MAX_GAP_BYTES, MAX_REQUEST_BYTES, ShardReader, StoredSource, write_shard
from schemas.stores import LocalStore

LAYOUT = RecordLayout(num_layers=1, num_kv_heads=1, num_slots=2, head_dim=4)
FINGERPRINT = "0123456789abcdef0123456789abcdef"

REF_IDS = ["00112233445566778899aabbccddeeff", "ffffffffffffffffffffffffffffffff"]

GOLDEN = bytes.fromhex(
    "30010000000000007b225f5f6d657461646174615f5f223a7b226d656d6f727933223a227b5c2266696e6765727072696e74"
    "5c223a205c2230313233343536373839616263646566303132333435363738396162636465665c222c205c22666f726d6174"
    "5c223a20322c205c226c61796f75745c223a207b5c22636f6465635c223a205c226e6f6e655c222c205c2264747970655c22"
    "3a205c2262666c6f617431365c222c205c22686561645f64696d5c223a20342c205c226e756d5f6b765f68656164735c223a"
    "20312c205c226e756d5f6c61796572735c223a20312c205c226e756d5f736c6f74735c223a20327d7d227d2c227265636f72"
    "6473223a7b226474797065223a225538222c227368617065223a5b322c36345d2c22646174615f6f666673657473223a5b30"
    "2c3132385d7d7d2020202020000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f03ff00112233"
    "445566778899aabbccddeeffc1a9559300000000000000000000202122232425262728292a2b2c2d2e2f3031323334353637"
    "38393a3b3c3d3e3f007fffffffffffffffffffffffffffffffff97fa456000000000000000000000"
)
"""A shard of :func:`make_two_records`: header length, JSON header padded with spaces, two records of 64 bytes."""


def make_two_records() -> Bytes:
    payload = np.arange(64, dtype=np.uint8).reshape(2, 32)
    return LAYOUT.pack(payload, np.array([[[[3, 255]]], [[[0, 127]]]], dtype=np.uint8), REF_IDS)


def make_records(num_records: int, layout: RecordLayout = LAYOUT, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (num_records, layout.stride_bytes), dtype=np.uint8)


def test_a_shard_has_exactly_the_golden_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", make_two_records(), LAYOUT, FINGERPRINT)
    assert (tmp_path / "shard").read_bytes() == GOLDEN
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_the_golden_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(GOLDEN)
    with ShardReader(path) as shard:
        assert (shard.num_records, shard.layout, shard.fingerprint) == (2, LAYOUT, FINGERPRINT)
        assert np.array_equal(shard.read([0, 1]), make_two_records())


@given(
    num_records=st.integers(0, 9),
    num_slots=st.integers(1, 20),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    rows=st.lists(st.integers(0, 99), max_size=12),
    seed=st.integers(0, 99),
)
def test_records_come_back_in_the_order_asked_for(
    tmp_path_factory: pytest.TempPathFactory, num_records: int, num_slots: int, dtype: str, rows: list[int], seed: int
) -> None:
    layout = RecordLayout(num_layers=2, num_kv_heads=1, num_slots=num_slots, head_dim=3, dtype=dtype)
    records = make_records(num_records, layout, seed)
    path = tmp_path_factory.getbasetemp() / "round-trip"
    write_shard(path, records, layout, FINGERPRINT)
    wanted = [row % num_records for row in rows] if num_records else []
    with ShardReader(path) as shard:
        assert shard.layout == layout
        assert shard.num_records == num_records
        found = shard.read(wanted)
    assert found.shape == (len(wanted), layout.stride_bytes)
    assert [record.tobytes() for record in found] == [records[row].tobytes() for row in wanted]


def test_the_safetensors_library_opens_a_shard(tmp_path: Path) -> None:
    records = make_records(5)
    write_shard(tmp_path / "shard", records, LAYOUT, FINGERPRINT)
    with safe_open(tmp_path / "shard", framework="numpy") as file:
        assert list(file.keys()) == ["records"]
        assert np.array_equal(file.get_tensor("records"), records)
        described = json.loads(file.metadata()["memory3"])
    assert described == {"format": 2, "layout": LAYOUT.to_json(), "fingerprint": FINGERPRINT}


def test_equal_records_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    records = make_records(6)
    wide = np.zeros((6, 2 * LAYOUT.stride_bytes), dtype=np.uint8)
    wide[:, ::2] = records
    write_shard(tmp_path / "first", records, LAYOUT, FINGERPRINT)
    write_shard(tmp_path / "strided", wide[:, ::2], LAYOUT, FINGERPRINT)
    write_shard(tmp_path / "other", records[::-1], LAYOUT, FINGERPRINT)
    write_shard(tmp_path / "foreign", records, LAYOUT, FINGERPRINT[::-1])
    first, strided, other, foreign = (
        (tmp_path / name).read_bytes() for name in ("first", "strided", "other", "foreign")
    )
    assert first == strided
    assert len({first, other, foreign}) == 3


@pytest.mark.parametrize(
    "records",
    [
        np.zeros((3, 63), dtype=np.uint8),
        np.zeros(64, dtype=np.uint8),
        np.zeros((1, 2, 64), dtype=np.uint8),
        np.zeros((3, 64), dtype=np.float32),
    ],
)
def test_records_that_do_not_fit_the_layout_are_not_written(tmp_path: Path, records: Bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        write_shard(tmp_path / "shard", records, LAYOUT, FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


# Damage ---------------------------------------------------------------------------------------------------------------

Header = dict[str, Any]


def change_header(edit: Callable[[Header, Header], None]) -> bytes:
    """Returns the golden shard with another header: ``edit`` changes safetensors' header and the part of our own."""
    (length,) = struct.unpack("<Q", GOLDEN[:8])
    header = json.loads(GOLDEN[8 : 8 + length])
    described = json.loads(header["__metadata__"]["memory3"])
    edit(header, described)
    if "memory3" in header.get("__metadata__", {}):
        header["__metadata__"]["memory3"] = json.dumps(described)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + GOLDEN[8 + length :]


def set_records(**changes: Any) -> Callable[[Header, Header], None]:
    return lambda header, described: header["records"].update(changes)


def set_described(**changes: Any) -> Callable[[Header, Header], None]:
    return lambda header, described: described.update(changes)


def set_layout(**changes: Any) -> Callable[[Header, Header], None]:
    return lambda header, described: described["layout"].update(changes)


DAMAGED: list[Any] = [
    pytest.param(b"", id="empty"),
    pytest.param(b"\x08\0\0\0", id="shorter-than-a-length"),
    pytest.param(GOLDEN[:8], id="nothing-but-a-length"),
    pytest.param(struct.pack("<Q", 2**63) + GOLDEN[8:], id="huge-length"),
    pytest.param(struct.pack("<Q", 1 << 21) + b" " * (1 << 21), id="length-over-the-limit"),
    pytest.param(struct.pack("<Q", 0) + GOLDEN[8:], id="no-header"),
    pytest.param(struct.pack("<Q", 6) + b"{'a':}", id="not-json"),
    pytest.param(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", id="not-text"),
    pytest.param(struct.pack("<Q", 2) + b"[]", id="a-list"),
    pytest.param(struct.pack("<Q", 4) + b"null", id="null"),
    pytest.param(b"PAR1" + bytes(60), id="another-kind-of-file"),
    pytest.param(GOLDEN + b"\0", id="a-byte-longer"),
    pytest.param(GOLDEN + bytes(64), id="a-record-longer"),
    pytest.param(GOLDEN[:-64], id="a-record-shorter"),
    pytest.param(change_header(set_described(format=3)), id="newer-format"),
    pytest.param(change_header(set_described(format=1)), id="older-format"),
    pytest.param(change_header(set_described(format=None)), id="no-format"),
    pytest.param(change_header(lambda header, described: header.pop("__metadata__")), id="no-metadata"),
    pytest.param(change_header(lambda header, described: header["__metadata__"].clear()), id="foreign-metadata"),
    pytest.param(change_header(lambda header, described: header.update(__metadata__=[])), id="metadata-is-a-list"),
    pytest.param(change_header(lambda header, described: header.pop("records")), id="no-records"),
    pytest.param(change_header(lambda header, described: described.pop("layout")), id="no-layout"),
    pytest.param(change_header(lambda header, described: described.pop("fingerprint")), id="no-fingerprint"),
    pytest.param(change_header(set_records(dtype="I8")), id="wrong-dtype"),
    pytest.param(change_header(set_records(dtype=None)), id="no-dtype"),
    pytest.param(change_header(set_records(shape=[64, 2])), id="shape-turned"),
    pytest.param(change_header(set_records(shape=[3, 64])), id="more-records"),
    pytest.param(change_header(set_records(shape=[1, 64])), id="fewer-records"),
    pytest.param(change_header(set_records(shape=[128])), id="flat-shape"),
    pytest.param(change_header(set_records(shape=[2, 1, 64])), id="three-axes"),
    pytest.param(change_header(set_records(shape=2)), id="shape-is-a-number"),
    pytest.param(change_header(set_records(shape=["2", 64])), id="shape-of-text"),
    pytest.param(change_header(set_records(data_offsets=[0, 64])), id="offsets-too-short"),
    pytest.param(change_header(set_records(data_offsets=[0, 192])), id="offsets-too-long"),
    pytest.param(change_header(set_records(data_offsets=[64, 192])), id="offsets-moved"),
    pytest.param(change_header(set_records(data_offsets=[0])), id="one-offset"),
    pytest.param(change_header(set_records(data_offsets=None)), id="no-offsets"),
    pytest.param(change_header(set_layout(head_dim=400)), id="layout-of-another-stride"),
    pytest.param(change_header(set_layout(num_slots=0)), id="layout-impossible"),
    pytest.param(change_header(lambda header, described: described["layout"].pop("head_dim")), id="layout-incomplete"),
    pytest.param(change_header(set_records(shape=[3, 64], data_offsets=[-64, 128])), id="offsets-negative"),
    pytest.param(change_header(set_records(shape=[-1, 64], data_offsets=[192, 128])), id="shape-negative"),
    pytest.param(change_header(set_records(shape=[1, 64], data_offsets=[64, 128])), id="offsets-not-from-zero"),
    pytest.param(change_header(set_records(data_offsets=["0", "128"])), id="offsets-of-text"),
    pytest.param(change_header(set_records(data_offsets=[0.0, 128.0])), id="offsets-of-fractions"),
    pytest.param(struct.pack("<Q", 200_000) + b"[" * 200_000, id="nested-json"),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_and_lying_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some-shard.safetensors"
    path.write_bytes(content)
    with pytest.raises(BankFormatError, match=r"some-shard\.safetensors"):
        ShardReader(path)
    with pytest.raises(BankFormatError, match=r"some-shard\.safetensors"):
        ShardReader(StoredSource(LocalStore(tmp_path), path.name, len(content)))


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(change_header(set_described(format=3)))
    with pytest.raises(BankFormatError, match="format 3, this release reads 2; update memory3"):
        ShardReader(path)


def test_an_older_format_asks_for_another_build(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(change_header(set_described(format=1)))
    with pytest.raises(BankFormatError, match="format 1, this release reads 2; build the bank again"):
        ShardReader(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some-shard"
    for length in range(len(GOLDEN)):
        path.write_bytes(GOLDEN[:length])
        with pytest.raises(BankFormatError, match="some-shard"):
            ShardReader(path)


@given(place=st.integers(0, len(GOLDEN) - 129), value=st.integers(0, 255))
def test_a_changed_header_is_refused_or_gives_the_same_records(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(GOLDEN[:place] + bytes([value]) + GOLDEN[place + 1 :])
    try:
        shard = ShardReader(path)
    except BankFormatError:
        return
    with shard:
        assert np.array_equal(shard.read([0, 1]), make_two_records())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(BankFormatError, match="nowhere is missing"):
        ShardReader(tmp_path / "nowhere")


def test_a_folder_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(BankFormatError, match=str(tmp_path)):
        ShardReader(tmp_path)


def test_a_pipe_is_no_shard_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BankFormatError, match="pipe is not a file"):
        ShardReader(tmp_path / "pipe")


@pytest.mark.parametrize("row", [-1, 2, 2**40])
def test_a_row_outside_the_shard_is_refused(tmp_path: Path, row: int) -> None:
    path = tmp_path / "some-shard"
    path.write_bytes(GOLDEN)
    with ShardReader(path) as shard, pytest.raises(BankFormatError, match=f"some-shard has 2 records.* row {row}"):
        shard.read([0, row])


def test_a_file_that_shrinks_while_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "some-shard"
    path.write_bytes(GOLDEN)
    with ShardReader(path) as shard:
        with path.open("r+b") as file:
            file.truncate(len(GOLDEN) - 10)
        assert np.array_equal(shard.read([0]), make_two_records()[:1])
        with pytest.raises(BankFormatError, match="some-shard ends before row 1"):
            shard.read([1])


def test_closing_twice_is_harmless_and_a_closed_shard_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(GOLDEN)
    shard = ShardReader(path)
    shard.close()
    shard.close()
    with pytest.raises(OSError, match="descriptor"):
        shard.read([0])


def test_threads_read_at_once_without_disturbing_each_other(tmp_path: Path) -> None:
    layout = RecordLayout(num_layers=4, num_kv_heads=2, num_slots=8, head_dim=16)
    records = make_records(200, layout)
    write_shard(tmp_path / "shard", records, layout, FINGERPRINT)
    with ShardReader(tmp_path / "shard") as shard:

        def read_some(seed: int) -> bool:
            rows = np.random.default_rng(seed).integers(0, 200, 50)
            return np.array_equal(shard.read(rows.tolist()), records[rows])

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read_some, range(64)))


# Shards read by ranges ------------------------------------------------------------------------------------------------


def open_stored(path: Path) -> ShardReader:
    """Opens a shard as one in an object store is; the store itself is a folder here."""
    return ShardReader(StoredSource(LocalStore(path.parent), path.name, path.stat().st_size))


@given(
    num_records=st.integers(1, 40),
    head_dim=st.integers(3, 3000),
    rows=st.lists(st.integers(0, 99), max_size=30),
    seed=st.integers(0, 99),
)
def test_ranges_give_the_records_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, num_records: int, head_dim: int, rows: list[int], seed: int
) -> None:
    layout = RecordLayout(num_layers=2, num_kv_heads=1, num_slots=3, head_dim=head_dim)
    path = tmp_path_factory.getbasetemp() / "ranges"
    write_shard(path, make_records(num_records, layout, seed), layout, FINGERPRINT)
    wanted = [row % num_records for row in rows]
    with ShardReader(path) as local, open_stored(path) as stored:
        assert np.array_equal(stored.read(wanted), local.read(wanted))
        assert (stored.num_records, stored.layout, stored.fingerprint) == (num_records, layout, FINGERPRINT)
        # A request for each record that does not follow closely upon another.
        stride, groups, previous = layout.stride_bytes, 0, -(10**9)
        for row in sorted(wanted):
            groups += (row - previous - 1) * stride >= MAX_GAP_BYTES
            previous = row
        assert stored.num_requests == 1 + groups
        assert local.num_requests == 2 + len(wanted)


def test_one_memory_is_one_request_and_neighbours_are_one_too(tmp_path: Path) -> None:
    layout = RecordLayout(num_layers=4, num_kv_heads=8, num_slots=8, head_dim=80)  # 80 KB a record
    records = make_records(50, layout)
    write_shard(tmp_path / "shard", records, layout, FINGERPRINT)
    assert layout.stride_bytes > MAX_GAP_BYTES
    with open_stored(tmp_path / "shard") as shard:
        assert shard.num_requests == 1
        for rows, num_requests in (([7], 1), ([7, 8, 9], 1), ([9, 8, 7, 8], 1), ([3, 30, 4], 2), ([], 0)):
            before = shard.num_requests
            assert np.array_equal(shard.read(rows), records[rows])
            assert shard.num_requests - before == num_requests


def test_no_request_is_larger_than_its_limit(tmp_path: Path) -> None:
    layout = RecordLayout(num_layers=22, num_kv_heads=8, num_slots=8, head_dim=80)  # the paper's, 450 KB a record
    records = make_records(80, layout)
    write_shard(tmp_path / "shard", records, layout, FINGERPRINT)
    with open_stored(tmp_path / "shard") as shard:
        assert np.array_equal(shard.read(range(80)), records)
        assert shard.num_requests == 1 + -(-80 // (MAX_REQUEST_BYTES // layout.stride_bytes))


def test_a_header_longer_than_the_first_request_is_read(tmp_path: Path) -> None:
    content = change_header(lambda header, described: header["__metadata__"].update(note="x" * FIRST_BYTES))
    (tmp_path / "shard").write_bytes(content)
    with open_stored(tmp_path / "shard") as shard:
        assert np.array_equal(shard.read([1, 0]), make_two_records()[::-1])
        assert shard.num_requests == 3


def test_an_object_that_ends_early_or_goes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "some-shard"
    path.write_bytes(GOLDEN)
    with open_stored(path) as shard:
        path.write_bytes(GOLDEN[:-10])
        assert np.array_equal(shard.read([0]), make_two_records()[:1])
        with pytest.raises(BankFormatError, match="some-shard ends before row 1"):
            shard.read([0, 1])
        path.unlink()
        with pytest.raises(BankFormatError, match="some-shard is gone since it was opened"):
            shard.read([0])
    with pytest.raises(FileNotFoundError):
        StoredSource(LocalStore(tmp_path), "some-shard", 100)
