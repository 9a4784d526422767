"""The search for what a bank is to forget: nothing that is there is missed, and nothing is made up."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.forgetting import (
    NEEDLE_BYTES,
    NeedleFinder,
    Traces,
    _cut_ends,
    _cut_values,
    _find_standing,
    _group_texts,
    search_file,
    search_table,
)
from schemas.bank import Bank
from schemas.errors import BankFormatError
from schemas.records import EMPTY_SLOT, RecordLayout
from schemas.tables import REFERENCES, write_table
from tests.banks import describe_file, open_vector_bank

FEW_BYTES = st.lists(st.sampled_from([0, 1, 255]), min_size=NEEDLE_BYTES, max_size=NEEDLE_BYTES).map(bytes)
NEEDLES = st.binary(min_size=NEEDLE_BYTES, max_size=NEEDLE_BYTES) | FEW_BYTES

SENTENCE = "Nobody but the keeper of the northern light knew where the ladder was kept."


def find_slowly(content: bytes, needles: list[bytes]) -> list[tuple[int, bytes]]:
    return sorted(
        {(place, needle) for needle in needles for place in range(len(content)) if content.startswith(needle, place)}
    )


@given(st.lists(NEEDLES, max_size=6), st.data())
def test_every_occurrence_is_found_and_no_other(needles: list[bytes], data: st.DataObject) -> None:
    pieces = [st.binary(max_size=40), FEW_BYTES]
    if needles:
        pieces += [st.sampled_from(needles), st.sampled_from(needles).map(lambda needle: needle[:-1])]
        pieces += [st.sampled_from(needles).map(lambda needle: needle[8:16] * 4)]
    content = b"".join(data.draw(st.lists(st.one_of(pieces), max_size=8)))
    found = NeedleFinder(needles).find(np.frombuffer(content, np.uint8) if content else np.empty(0, np.uint8))
    assert found == find_slowly(content, needles)


def test_many_needles_are_found_among_much_else() -> None:
    random = np.random.default_rng(0)
    needles = random.integers(0, 256, (50_000, NEEDLE_BYTES), np.uint8)
    content = random.integers(0, 256, 2_000_000, np.uint8)
    places = np.sort(random.choice(len(content) // NEEDLE_BYTES - 1, 300, replace=False)) * NEEDLE_BYTES + 7
    for row, place in enumerate(places):
        content[place : place + NEEDLE_BYTES] = needles[row]
    found = NeedleFinder(needle.tobytes() for needle in needles).find(content)
    assert found == [(place, needles[row].tobytes()) for row, place in enumerate(places.tolist())]


def make_traces(texts: dict[str, str], needles: dict[bytes, str]) -> Traces:
    references = pa.table({"ref_id": list(texts), "text": list(texts.values())})
    return Traces(references=references, needles=needles, texts=_group_texts(references), num_standing=0)


def test_a_text_counts_only_as_a_whole_and_wherever_it_begins_like_another(tmp_path: Path) -> None:
    texts = {"first": SENTENCE + " It hung behind the door.", "second": SENTENCE + " It stood in the yard."}
    traces = make_traces(texts, {})
    path = tmp_path / "file"
    path.write_bytes(b"... " + SENTENCE.encode() + b" It was gone.")
    assert search_file(path, traces) == []
    for ref_id, text in texts.items():
        path.write_bytes(b"... " + text.encode() + b" ...")
        assert search_file(path, traces) == [f"text of {ref_id}"]
    path.write_bytes(texts["second"].encode() + texts["first"].encode())
    assert search_file(path, traces) == ["text of second", "text of first"]
    path.write_bytes(texts["second"].encode()[:-1])
    assert search_file(path, traces) == []
    path.write_bytes(b"")
    assert search_file(path, traces) == []


def test_needles_are_found_at_the_ends_of_a_file(tmp_path: Path) -> None:
    needle = bytes(range(NEEDLE_BYTES))
    traces = make_traces({}, {needle: "vector of x"})
    path = tmp_path / "file"
    for content in (needle, b"x" * 100 + needle, needle + b"x", needle + needle):
        path.write_bytes(content)
        assert search_file(path, traces) == ["vector of x"] * content.count(needle)


@pytest.mark.parametrize("column", ["text", "ref_id", "kept_ref_id", "matched_ref_id", "cluster"])
def test_columns_are_searched(column: str, tmp_path: Path) -> None:
    traces = make_traces({"a" * 32: "short"}, {})
    path = tmp_path / "table.parquet"
    for value, is_trace in (("a" * 32, column != "text"), ("short", column == "text"), ("shorter", False)):
        write_table(pa.table({"number": [1, 2], column: ["b" * 32, value]}), path)
        assert len(search_table(path, traces)) == is_trace, value


def test_a_table_that_cannot_be_read_is_no_proof(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(BankFormatError, match=r"table.parquet cannot be read as Parquet.*move it away"):
        search_table(path, make_traces({}, {}))


def test_texts_that_stand_in_what_stays_are_told_from_others(tmp_path: Path) -> None:
    """A text is looked for in single references: the end of one and the beginning of the next make up none."""
    staying = {"1" * 32: f"Before. {SENTENCE} After.", "2" * 32: "ends with alpha", "3" * 32: "beta begins this"}
    gone = {"4" * 32: SENTENCE, "5" * 32: SENTENCE[:-1] + "!", "6" * 32: "begins", "7" * 32: "alphabeta"}
    rows = {**staying, **gone}
    table = pa.table([list(rows), list(rows.values()), [[1]] * len(rows), [1] * len(rows)], schema=REFERENCES)
    path = tmp_path / "segments" / "one" / "references.parquet"
    path.parent.mkdir(parents=True)
    write_table(table, path)
    bank: Bank = open_vector_bank(tmp_path, [describe_file(tmp_path, "references", path, len(rows))])
    texts = _group_texts(pa.table({"ref_id": list(gone), "text": list(gone.values())}))
    assert _find_standing(bank, pa.array(list(staying)), texts) == {"4" * 32, "6" * 32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_bytes_of_a_memory_are_those_of_its_last_kept_token(dtype: str) -> None:
    layout = RecordLayout(num_layers=2, num_kv_heads=2, num_slots=3, head_dim=16, dtype=dtype)
    random = np.random.default_rng(0)
    payload = random.integers(1, 256, (2, layout.payload_bytes), np.uint8)
    offsets = np.full((2, 2, 2, 3), EMPTY_SLOT, np.uint8)
    offsets[0, -1] = [[0, 3, 9], [1, 2, 60]]
    offsets[1, -1] = [[0, 5, EMPTY_SLOT], [1, 4, EMPTY_SLOT]]
    offsets[:, 0, 0, 0] = 127  # what other layers kept does not count
    records = layout.pack(payload, offsets, ["a" * 32, "b" * 32])
    values = payload.reshape(2, *layout.payload_shape[:-1], -1)
    cut = _cut_values(layout, records)
    assert cut[0].tobytes() == values[0, 1, 1, 1, 2].tobytes()[:NEEDLE_BYTES]
    assert cut[1].tobytes() == values[1, 1, 1, 0, 1].tobytes()[:NEEDLE_BYTES]
    for record, end, ref_id in zip(records, _cut_ends(layout, records), ("a", "b"), strict=True):
        assert end.tobytes() in record.tobytes()
        assert bytes.fromhex(ref_id * 32) in end.tobytes()


def test_the_smallest_records_have_needles() -> None:
    layout = RecordLayout(num_layers=1, num_kv_heads=1, num_slots=1, head_dim=1)
    records = layout.pack(np.ones((1, layout.payload_bytes), np.uint8), np.zeros((1, 1, 1, 1), np.uint8), ["c" * 32])
    for cut in (_cut_ends, _cut_values):
        assert cut(layout, records).shape == (1, NEEDLE_BYTES)
