"""The proof of a purge: what a bank is to forget, looked for in every byte and every table that is left.

    files of all versions --collect--> traces of forgotten references --(purge)--> search of all files that are left

Tables are compressed, so their bytes prove little by themselves: their columns are searched as well.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.reusing import read_ids
from schemas.bank import Bank
from schemas.records import Bytes
from schemas.tables import REFERENCES

NEEDLE_BYTES = 32
"""Bytes looked for of each trace: more than chance ever repeats, fewer than any trace has."""

TABLE_BITS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traces:
    """What must not be found any more.

    Attributes:
        references: ``ref_id`` and ``text`` of the forgotten references, by ascending id.
        needles: NEEDLE_BYTES of each id, text, signature, embedding and memory of them, each with what it is of. What a
            reference that stays has too, a signature of the same words for instance, is left out.
        num_standing: references of them whose text is part of one that stays, which a purge does not touch.
    """

    references: pa.Table
    needles: dict[bytes, str]
    num_standing: int


def _take(table: pa.Table, ref_ids: pa.Array, *, are_wanted: bool) -> pa.Table:
    found = pc.is_in(table["ref_id"], value_set=ref_ids)
    return table.filter(found if are_wanted else pc.invert(found)).combine_chunks()


def _cut_vectors(table: pa.Table, column: str) -> dict[bytes, str]:
    """Returns the first bytes of fixed-size lists by what they are of, without those that are all zero."""
    values = table[column].combine_chunks()
    if not len(values):
        return {}
    rows = values.flatten().to_numpy().reshape(len(values), -1).view(np.uint8)[:, :NEEDLE_BYTES]
    found = {row.tobytes(): ref_id for row, ref_id in zip(rows, table["ref_id"].to_pylist(), strict=True)}
    return {needle: f"{column} of {ref_id}" for needle, ref_id in found.items() if any(needle)}


def _cut_memories(bank: Bank, path: Path, folder: str, ref_ids: pa.Array, *, are_wanted: bool) -> dict[bytes, str]:
    """Returns bytes of memories: of the values of the last layer, which depend on the whole text before them."""
    layout = bank.manifest.layout
    start = layout.payload_bytes - layout.payload_bytes // (2 * layout.num_layers)
    shards = {file.path: file for file in bank.manifest.list_files("shard")}
    places = _take(pq.read_table(path, columns=["ref_id", "shard", "row"]), ref_ids, are_wanted=are_wanted)
    needles: dict[bytes, str] = {}
    for name in pc.unique(places["shard"]).to_pylist():
        mine = places.filter(pc.equal(places["shard"], name))
        with bank.open_shard(shards[f"{folder}/{name}"]) as shard:
            for ref_id, row in zip(mine["ref_id"].to_pylist(), mine["row"].to_pylist(), strict=True):
                needle = shard.read([row])[0, start : start + NEEDLE_BYTES].tobytes()
                needles[needle] = f"memory of {ref_id}"
    return {needle: what for needle, what in needles.items() if any(needle)}


def _cut_all(bank: Bank, ref_ids: pa.Array, *, are_wanted: bool, done: set[str]) -> dict[bytes, str]:
    """Returns the needles of signatures, embeddings and memories of a version, files in ``done`` left out."""
    needles: dict[bytes, str] = {}
    for file in bank.manifest.files:
        if file.path in done or file.kind not in ("signatures", "embeddings", "memories"):
            continue
        done.add(file.path)
        path = bank.locate(file)
        if file.kind == "memories":
            folder = file.path.rpartition("/")[0]
            needles |= _cut_memories(bank, path, folder, ref_ids, are_wanted=are_wanted)
        else:
            column = {"signatures": "signature", "embeddings": "vector"}[file.kind]
            table = pq.read_table(path, columns=["ref_id", column])
            needles |= _cut_vectors(_take(table, ref_ids, are_wanted=are_wanted), column)
    return needles


def collect_traces(newest: Bank, versions: Iterable[Bank]) -> Traces:
    """Collects what the versions of a bank hold of references that stand in no document of the newest one.

    Args:
        newest: the version that stays.
        versions: all versions, the newest included.
    """
    current = pc.unique(read_ids(newest.locate_all("occurrences")))
    parts = [REFERENCES.empty_table().select(["ref_id", "text"])]
    needles: dict[bytes, str] = {}
    seen: set[str] = set()
    done: set[str] = set()
    for bank in versions:
        for file in bank.manifest.list_files("references"):
            if file.path not in seen:
                seen.add(file.path)
                table = pq.read_table(bank.locate(file), columns=["ref_id", "text"])
                parts.append(_take(table, current, are_wanted=False))
        needles |= _cut_all(bank, current, are_wanted=False, done=done)
    references = pa.concat_tables(parts).group_by("ref_id").aggregate([("text", "min")]).sort_by("ref_id")
    references = references.rename_columns({"text_min": "text"}).select(["ref_id", "text"])
    kept = _cut_all(newest, current, are_wanted=True, done=set())
    needles = {needle: what for needle, what in needles.items() if needle not in kept}
    staying = _join_texts(newest, current)
    num_standing = 0
    for ref_id, text in zip(references["ref_id"].to_pylist(), references["text"].to_pylist(), strict=True):
        needles[ref_id.encode()] = f"id {ref_id}"
        encoded = text.encode()
        if text in staying:
            num_standing += 1
        elif len(encoded) >= NEEDLE_BYTES:
            needles.setdefault(encoded[:NEEDLE_BYTES], f"text of {ref_id}")
    return Traces(references=references, needles=needles, num_standing=num_standing)


def _join_texts(bank: Bank, ref_ids: pa.Array) -> str:
    """Returns the texts of references with a character between that none has."""
    tables = [pq.read_table(path, columns=["ref_id", "text"]) for path in bank.locate_all("references")]
    return "\ud800".join(
        text for table in tables for text in _take(table, ref_ids, are_wanted=True)["text"].to_pylist()
    )


# Search ---------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _list_candidates(content: Bytes, is_begun: np.ndarray) -> list[int]:
    """Returns the places whose 8 bytes fall on a marked entry of the table."""
    found = [0][:0]
    shift = np.uint64(64 - TABLE_BITS)
    key = np.uint64(0)
    for place in range(len(content)):
        key = (key >> np.uint64(8)) | (np.uint64(content[place]) << np.uint64(56))
        if place >= 7 and is_begun[(key * np.uint64(0x9E3779B97F4A7C15)) >> shift]:
            found.append(place - 7)
    return found


def find_needles(content: Bytes, needles: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Finds byte strings of NEEDLE_BYTES each.

    Args:
        content: where to look, uint8 (N,).
        needles: what to look for.

    Returns:
        Place and needle of every occurrence, by place.
    """
    if not len(needles) or len(content) < NEEDLE_BYTES:
        return []
    begun = np.frombuffer(b"".join(needle[:8] for needle in needles), "<u8")
    with np.errstate(over="ignore"):
        places = (begun * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS)
    is_begun = np.zeros(1 << TABLE_BITS, np.bool_)
    is_begun[places] = True
    wanted = set(needles)
    found = []
    for place in _list_candidates(content, is_begun):
        piece = content[place : place + NEEDLE_BYTES].tobytes()
        if piece in wanted:
            found.append((place, piece))
    return found


def search_file(path: Path, traces: Traces) -> list[str]:
    """Looks for traces in the bytes of a file; returns what was found.

    The beginning of a text counts only if the whole text is there.
    """
    size = path.stat().st_size
    content: Bytes = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    texts = dict(zip(traces.references["ref_id"].to_pylist(), traces.references["text"].to_pylist(), strict=True))
    found = []
    for place, needle in find_needles(content, list(traces.needles)):
        what = traces.needles[needle]
        if what.startswith("text of "):
            whole = texts[what.removeprefix("text of ")].encode()
            if content[place : place + len(whole)].tobytes() != whole:
                continue
        found.append(what)
    return found


def search_table(path: Path, traces: Traces) -> list[str]:
    """Looks for traces in the columns of a Parquet file; returns what was found."""
    ids, texts = traces.references["ref_id"].combine_chunks(), traces.references["text"].combine_chunks()
    found = []
    for name in pq.read_schema(path).names:
        if name == "cluster" or name.endswith("ref_id"):
            column = pq.read_table(path, columns=[name])[name]
            found += [f"id {value}" for value in column.filter(pc.is_in(column, value_set=ids)).to_pylist()]
        elif name == "text":
            column = pq.read_table(path, columns=[name])[name]
            found += ["text" for _ in column.filter(pc.is_in(column, value_set=texts)).to_pylist()]
    return found
