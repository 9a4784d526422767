"""The proof of a purge: what a bank is to forget, looked for in every byte and every table that is left.

    files of all versions --collect--> traces of forgotten references --(purge)--> search of all files that are left

Tables are compressed, so their bytes prove little by themselves: their columns are searched as well.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.reusing import read_ids
from schemas.bank import Bank
from schemas.errors import BankFormatError
from schemas.records import CHECKSUM_BYTES, EMPTY_SLOT, ID_BYTES, Bytes, RecordLayout
from schemas.tables import REFERENCES

KEY_VALUES = "key-values"
"""What traces of key-values begin with. Two texts that begin alike leave equal ones for that beginning, so that they
say nothing in a shard of records that stay, each with its id."""

NEEDLE_BYTES = 32
"""Bytes looked for of each trace: more than chance ever repeats, fewer than any trace has."""

MIN_FILTER_BITS = 20

RECORDS_PER_READ = 256

LoadCold = Callable[[Bank, list[str]], dict[str, Bytes]]
"""Returns the records of references that are kept beside a version's files, by ``ref_id``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traces:
    """What must not be found any more.

    Attributes:
        references: ``ref_id`` and ``text`` of the forgotten references, by ascending id.
        needles: NEEDLE_BYTES of each id, signature, embedding and memory of them, each with what it is of. What a
            reference that stays has too, a signature of the same words for instance, is left out.
        texts: their texts of NEEDLE_BYTES and more by their beginnings, each with its ``ref_id``; those that are part
            of a reference that stays are left out.
        num_standing: references of them whose text is part of one that stays, which a purge does not touch.
    """

    references: pa.Table
    needles: dict[bytes, str]
    texts: dict[bytes, dict[bytes, str]]
    num_standing: int

    @functools.cached_property
    def finder(self) -> "NeedleFinder":
        """Finds needles and beginnings of texts."""
        return NeedleFinder({*self.needles, *self.texts})


# Collection -----------------------------------------------------------------------------------------------------------


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


def _cut_ends(layout: RecordLayout, records: Bytes) -> Bytes:
    """Returns the last bytes of records (N, stride_bytes) before their padding: the id and the checksum are in them."""
    end = layout.payload_bytes + layout.num_offsets + ID_BYTES + CHECKSUM_BYTES
    return records[:, max(0, end - NEEDLE_BYTES) :][:, :NEEDLE_BYTES]


def _cut_values(layout: RecordLayout, records: Bytes) -> Bytes:
    """Returns bytes of the key-values in records (N, stride_bytes).

    They are those of the last layer for the last token that was kept, which depend on all the text before it: memories
    of texts that begin alike are alike at their beginning.
    """
    offsets = records[:, layout.payload_bytes :][:, : layout.num_offsets].reshape(-1, *layout.offsets_shape)
    last = offsets[:, -1].reshape(len(records), -1).astype(np.int64)
    last[last == EMPTY_SLOT] = -1
    starts = layout.payload_bytes + (last.argmax(1) - last.shape[1]) * layout.value_bytes
    starts = np.minimum(starts, layout.stride_bytes - NEEDLE_BYTES)
    return np.take_along_axis(records, starts[:, None] + np.arange(NEEDLE_BYTES), 1)


def _cut_records(layout: RecordLayout, ref_ids: Sequence[str], records: Bytes) -> dict[bytes, str]:
    """Returns two pieces of each memory: one that no other can have, and one of what the model reads."""
    needles = {
        needle.tobytes(): f"{what} of {ref_id}"
        for what, cut in ((KEY_VALUES, _cut_values), ("memory", _cut_ends))
        for ref_id, needle in zip(ref_ids, cut(layout, records), strict=True)
    }
    return {needle: what for needle, what in needles.items() if any(needle)}


def _iterate_records(
    bank: Bank, path: Path, folder: str, ref_ids: pa.Array, *, are_wanted: bool
) -> Iterator[tuple[list[str], Bytes]]:
    """Yields the memories of a segment that are, or are not, of some references: ids and records, a batch at a time."""
    shards = {file.path: file for file in bank.manifest.list_files("shard")}
    places = _take(pq.read_table(path, columns=["ref_id", "shard", "row"]), ref_ids, are_wanted=are_wanted)
    for name in pc.unique(places["shard"]).to_pylist():
        mine = places.filter(pc.equal(places["shard"], name))
        with bank.open_shard(shards[f"{folder}/{name}"]) as shard:
            for start in range(0, len(mine), RECORDS_PER_READ):
                batch = mine.slice(start, RECORDS_PER_READ)
                yield batch["ref_id"].to_pylist(), shard.read(batch["row"].to_pylist())


def _cut_memories(bank: Bank, path: Path, folder: str, ref_ids: pa.Array, *, are_wanted: bool) -> dict[bytes, str]:
    needles: dict[bytes, str] = {}
    for names, records in _iterate_records(bank, path, folder, ref_ids, are_wanted=are_wanted):
        needles |= _cut_records(bank.manifest.layout, names, records)
    return needles


def _iterate_cold(bank: Bank, ref_ids: Sequence[str], load_cold: LoadCold) -> Iterator[tuple[list[str], Bytes]]:
    for start in range(0, len(ref_ids), RECORDS_PER_READ):
        found = load_cold(bank, list(ref_ids[start : start + RECORDS_PER_READ]))
        # Nothing has checked them yet.
        whole = {name: record for name, record in found.items() if len(record) == bank.manifest.layout.stride_bytes}
        if whole:
            yield list(whole), np.stack(list(whole.values()))


def _cut_cold(bank: Bank, ref_ids: Sequence[str], load_cold: LoadCold) -> dict[bytes, str]:
    needles: dict[bytes, str] = {}
    for names, records in _iterate_cold(bank, ref_ids, load_cold):
        needles |= _cut_records(bank.manifest.layout, names, records)
    return needles


def _find_shared(bank: Bank, ref_ids: pa.Array, needles: Iterable[bytes], load_cold: LoadCold) -> set[bytes]:
    """Returns the needles that stand anywhere in memories of some references.

    Texts that begin alike are alike in the key-values of their beginnings, but may keep other tokens of it, so that the
    same key-values stand in other places.
    """
    finder = NeedleFinder(needles)
    shared: set[bytes] = set()
    parts = [_iterate_cold(bank, ref_ids.to_pylist(), load_cold)]
    for file in bank.manifest.list_files("memories"):
        folder = file.path.rpartition("/")[0]
        parts.append(_iterate_records(bank, bank.locate(file), folder, ref_ids, are_wanted=True))
    for _, records in itertools.chain.from_iterable(parts):
        shared.update(needle for _, needle in finder.find(records.reshape(-1)))
    return shared


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


def _group_texts(references: pa.Table) -> dict[bytes, dict[bytes, str]]:
    """Returns texts by their first NEEDLE_BYTES, or by the whole text if it is shorter, each with its ``ref_id``."""
    texts: dict[bytes, dict[bytes, str]] = {}
    for ref_id, text in zip(references["ref_id"].to_pylist(), references["text"].to_pylist(), strict=True):
        encoded = text.encode()
        texts.setdefault(encoded[:NEEDLE_BYTES], {})[encoded] = ref_id
    return texts


def _find_standing(bank: Bank, ref_ids: pa.Array, texts: dict[bytes, dict[bytes, str]]) -> set[str]:
    """Returns the references whose text is part of one of the references ``ref_ids``."""
    finder = NeedleFinder(beginning for beginning in texts if len(beginning) == NEEDLE_BYTES)
    short = [beginning for beginning in texts if len(beginning) < NEEDLE_BYTES]
    standing: set[str] = set()
    for path in bank.locate_all("references"):
        table = _take(pq.read_table(path, columns=["ref_id", "text"]), ref_ids, are_wanted=True)
        joined = b"\xff".join(text.encode() for text in table["text"].to_pylist())  # no text has this byte
        for place, beginning in finder.find(np.frombuffer(joined, np.uint8)):
            standing.update(ref_id for text, ref_id in texts[beginning].items() if joined.startswith(text, place))
        standing.update(texts[text][text] for text in short if text in joined)
    return standing


def collect_traces(newest: Bank, versions: Sequence[Bank], load_cold: LoadCold) -> Traces:
    """Collects what the versions of a bank hold of references that stand in no document of the newest one.

    Args:
        newest: the version that stays.
        versions: all versions, the newest included.
        load_cold: returns the records that were made when they were first retrieved.
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
    ref_ids = references["ref_id"].to_pylist()
    for bank in versions:
        needles |= _cut_cold(bank, ref_ids, load_cold)
    if needles:
        memories = {file.path for file in newest.manifest.list_files("memories")}
        kept = {*_cut_all(newest, current, are_wanted=True, done=memories)}
        kept |= _find_shared(newest, current, needles, load_cold)
        needles = {needle: what for needle, what in needles.items() if needle not in kept}
    needles |= {ref_id.encode(): f"id {ref_id}" for ref_id in ref_ids}
    texts = _group_texts(references)
    standing = _find_standing(newest, current, texts) if texts else set()
    looked_for = {
        beginning: left
        for beginning, of_beginning in texts.items()
        if len(beginning) == NEEDLE_BYTES
        and (left := {text: ref_id for text, ref_id in of_beginning.items() if ref_id not in standing})
    }
    return Traces(references=references, needles=needles, texts=looked_for, num_standing=len(standing))


# Search ---------------------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _hash_word(content: Bytes, place: int, shift: np.uint64) -> np.uint64:
    """Returns the bits of the filter for the 8 bytes at a place, little endian."""
    word = np.uint64(0)
    for byte in range(8):
        word |= np.uint64(content[place + byte]) << np.uint64(8 * byte)
    return (word * np.uint64(0x9E3779B97F4A7C15)) >> shift


@numba.njit(cache=True, nogil=True)
def _mark_words(words: np.ndarray, shift: np.uint64, is_known: np.ndarray) -> None:
    for word in words:
        is_known[(word * np.uint64(0x9E3779B97F4A7C15)) >> shift] = True


@numba.njit(cache=True, nogil=True)
def _list_candidates(content: Bytes, shift: np.uint64, is_known: np.ndarray) -> list[int]:
    """Returns the places where each 8 of NEEDLE_BYTES fall on a marked bit: nearly always those of needles."""
    found = [0][:0]
    key = np.uint64(0)
    for end in range(len(content) - NEEDLE_BYTES + 8):
        # The word that ends here, moved on by a byte.
        key = (key >> np.uint64(8)) | (np.uint64(content[end]) << np.uint64(56))
        if end < 7 or not is_known[(key * np.uint64(0x9E3779B97F4A7C15)) >> shift]:
            continue
        place = end - 7
        is_candidate = True
        for word in range(8, NEEDLE_BYTES, 8):
            if not is_known[_hash_word(content, place + word, shift)]:
                is_candidate = False
                break
        if is_candidate:
            found.append(place)
    return found


class NeedleFinder:
    """Finds byte strings of NEEDLE_BYTES each, however many, in one pass."""

    def __init__(self, needles: Iterable[bytes]) -> None:
        """Marks the words of the needles in a filter of which an eighth is marked at most."""
        self._needles = set(needles)
        words = np.frombuffer(b"".join(self._needles), "<u8") if self._needles else np.empty(0, "<u8")
        num_bits = max(MIN_FILTER_BITS, (8 * len(words)).bit_length())
        self._shift = np.uint64(64 - num_bits)
        self._is_known = np.zeros(1 << num_bits, np.bool_)
        _mark_words(words, self._shift, self._is_known)

    def find(self, content: Bytes) -> list[tuple[int, bytes]]:
        """Returns place and needle of every occurrence in bytes, uint8 (N,), by place."""
        if not self._needles or len(content) < NEEDLE_BYTES:
            return []
        pieces = (
            (place, content[place : place + NEEDLE_BYTES].tobytes())
            for place in _list_candidates(content, self._shift, self._is_known)
        )
        return [(place, piece) for place, piece in pieces if piece in self._needles]


def search_file(path: Path, traces: Traces) -> list[str]:
    """Looks for traces in the bytes of a file; returns what was found."""
    return search_bytes(np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8), traces)


def search_bytes(content: Bytes, traces: Traces) -> list[str]:
    """Looks for traces in bytes, uint8 (N,); returns what was found.

    The beginning of a text counts only if the whole text is there.
    """
    found = []
    for place, needle in traces.finder.find(content):
        if needle in traces.needles:
            found.append(traces.needles[needle])
        for text, ref_id in traces.texts.get(needle, {}).items():
            if content[place : place + len(text)].tobytes() == text:
                found.append(f"text of {ref_id}")
    return found


def search_table(path: Path, traces: Traces) -> list[str]:
    """Looks for traces in the columns of a Parquet file; returns what was found.

    Raises:
        BankFormatError: the file cannot be read, so that nobody knows what it holds.
    """
    ids, texts = traces.references["ref_id"].combine_chunks(), traces.references["text"].combine_chunks()
    found = []
    try:
        for name in pq.read_schema(path).names:
            if name == "cluster" or name.endswith("ref_id"):
                column = pq.read_table(path, columns=[name])[name]
                found += [f"id {value}" for value in column.filter(pc.is_in(column, value_set=ids)).to_pylist()]
            elif name == "text":
                column = pq.read_table(path, columns=[name])[name]
                found += ["text" for _ in column.filter(pc.is_in(column, value_set=texts)).to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise BankFormatError(
            f"{path} cannot be read as Parquet, so that nobody knows what it holds: {str(error).splitlines()[0]}; "
            "restore it, or move it away if it is no part of the bank, and run memory3 purge again"
        ) from error
    return found
