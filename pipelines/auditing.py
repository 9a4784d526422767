"""What ``memory3 verify`` looks at in the files and tables of a bank; nothing here needs a model or FAISS.

    a version's manifest -> its files -> each table alone -> the tables against each other -> memories against shards

Every audit returns its findings, each a clause that names the file it is about, and a word on what it has looked at. It
works on columns, and holds the ids of a bank at most: payloads, texts and vectors pass by in batches. Tables are read
through :class:`schemas.bank.Bank`, which checks their bytes; :func:`audit_hashes` finds what is damaged beforehand.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.documenting import DELETED
from schemas.atomic import TEMPORARY_SUFFIX
from schemas.bank import COLD_FOLDER, DROPPING_KINDS, PARTED_KINDS, SEGMENTS_FOLDER, TAGS_FOLDER, Bank
from schemas.errors import BankError, BankFormatError
from schemas.identifiers import hash_bytes
from schemas.manifest import CODEC_KIND, FileEntry, list_versions, make_manifest_name, read_manifest
from schemas.protocols import LongArray, MaskArray
from schemas.tables import find_schema

BLOCK_BYTES = 8 << 20
NUM_HASHING_THREADS = 2

RECORD_BYTES_AT_ONCE = 64 << 20

REQUIRED_KINDS = ("documents", "occurrences", "references", "duplicates", "rejects", "embeddings", "index")
"""What every version has, even if there is nothing in it."""

UNTABLED_KINDS = ("shard", "index", CODEC_KIND)
"""Kinds of files that are no tables."""

MAX_TOKENS = 128
"""Tokens of a reference, where the configuration says nothing else."""

UNIT_TOLERANCE = 1e-3
"""How much the length of a vector may differ from 1."""


class Audit(NamedTuple):
    """What an audit has found.

    Attributes:
        wrong: clauses, each naming the file that something is wrong with; none if all is well.
        detail: what was looked at.
    """

    wrong: list[str]
    detail: str


# Files ----------------------------------------------------------------------------------------------------------------


def audit_manifest(bank: Bank) -> Audit:
    """Checks what the manifest alone can tell: which kinds of files there are, and that its counts add up."""
    manifest = bank.manifest
    name = make_manifest_name(manifest.version)
    wrong = []
    kinds = [file.kind for file in manifest.files]
    wrong += [f"{name} names no file of the kind {kind!r}" for kind in REQUIRED_KINDS if kind not in kinds]
    segments = [(file.kind, _get_segment(file)) for file in manifest.files if file.kind != "shard"]
    for kind in sorted(set(kinds)):
        if kind not in UNTABLED_KINDS and find_schema(kind, pa.schema([])) is None:
            wrong.append(f"{name} names files of the unknown kind {kind!r}")
        if kind not in PARTED_KINDS and kinds.count(kind) > 1:
            wrong.append(f"{name} names {kinds.count(kind)} files of the kind {kind!r}, one is the most")
    wrong += [
        f"{name} names {segments.count(place)} files of the kind {place[0]!r} in the segment {place[1]}"
        for place in sorted(set(segments))
        if place[0] in PARTED_KINDS and segments.count(place) > 1
    ]
    for what in ("documents", "references"):
        counts = manifest.counts.get(what, {})
        if not {"read", "kept", "dropped"} <= set(counts):
            wrong.append(f"{name} does not count the {what} read, kept and dropped")
        elif counts["read"] != counts["kept"] + sum(counts["dropped"].values()):
            dropped = sum(counts["dropped"].values())
            wrong.append(f"{name}: {counts['read']} {what} read, but {counts['kept']} kept and {dropped} dropped")
    return Audit(wrong, f"{len(kinds)} files in {len({_get_segment(file) for file in manifest.files})} segments")


def audit_sizes(bank: Bank) -> Audit:
    """Compares the size of every file with the manifest."""
    wrong = []
    for file in bank.manifest.files:
        try:
            size_bytes = bank.store.get_size(file.path)
        except BankError as error:
            wrong.append(str(error))
            continue
        if size_bytes is None:
            wrong.append(f"{file.path} is missing")
        elif size_bytes != file.size_bytes:
            wrong.append(f"{file.path} has {size_bytes} bytes, not {file.size_bytes}")
    total = sum(file.size_bytes for file in bank.manifest.files)
    return Audit(wrong, f"{len(bank.manifest.files)} files of {total:,} bytes")


def audit_hashes(bank: Bank, report: Callable[[], None] = lambda: None) -> Audit:
    """Compares size and SHA-256 of every file, as it is in the bank's store, with the manifest.

    Args:
        bank: the version.
        report: called after each file.
    """

    def check(file: FileEntry) -> str | None:
        digest, size_bytes = hashlib.sha256(), 0
        try:
            while block := bank.store.read_range(file.path, size_bytes, BLOCK_BYTES):
                digest.update(block)
                size_bytes += len(block)
                if len(block) < BLOCK_BYTES:
                    break
        except FileNotFoundError:
            return f"{file.path} is missing"
        except BankError as error:
            return str(error)
        finally:
            report()
        if size_bytes != file.size_bytes:
            return f"{file.path} has {size_bytes} bytes, not {file.size_bytes}"
        return None if digest.hexdigest() == file.sha256 else f"{file.path} has other bytes than when it was written"

    with ThreadPoolExecutor(NUM_HASHING_THREADS) as threads:
        wrong = [found for found in threads.map(check, bank.manifest.files) if found]
    return Audit(wrong, f"{len(bank.manifest.files)} files, sizes and SHA-256")


def audit_headers(bank: Bank) -> Audit:
    """Reads the header of every table and shard: columns, numbers of rows, layout and writer."""
    wrong = []
    files = [file for file in bank.manifest.files if file.kind not in ("index", CODEC_KIND)]
    for file in files:
        try:
            if file.kind == "shard":
                with bank.open_shard(file) as shard:
                    if shard.num_records != file.num_rows:
                        wrong.append(f"{file.path} has {shard.num_records} memories, not {file.num_rows}")
            else:
                bank.open_table(file).close()
        except BankError as error:
            wrong.append(str(error))
    return Audit(wrong, f"{len(files)} tables and shards")


def audit_tags(bank: Bank) -> Audit:
    """Checks that every tag names a version that is there."""
    versions, wrong = list_versions(bank.store), []
    names = [name for name in bank.store.list_files(TAGS_FOLDER) if name.endswith(".json")]
    for name in names:
        try:
            version = json.loads(bank.store.read(name))["version"]
        except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError) as error:
            wrong.append(f"{name} cannot be read: {' '.join(str(error).split())}; set the tag again")
            continue
        if type(version) is not int or version not in versions:
            wrong.append(f"{name} names version {version!r}, which is not there; set the tag again or remove it")
    return Audit(wrong, f"{len(names)} tags")


def audit_cold_store(bank: Bank) -> Audit:
    """Checks the memories that were encoded when first retrieved: the database, and each record.

    It stands beside the bank on this machine, and deleting it loses nothing.
    """
    path = bank.store.scratch / COLD_FOLDER / f"{bank.manifest.fingerprint.digest}.sqlite"
    if not path.is_file():
        return Audit([], "no memory was encoded when retrieved")
    layout, num_records = bank.manifest.layout, 0
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            findings = connection.execute("PRAGMA quick_check").fetchall()
            if findings != [("ok",)]:
                return Audit([f"{path} is damaged: {findings[0][0]}; delete it"], "")
            for ref_id, record in connection.execute("SELECT ref_id, record FROM records"):
                content = np.frombuffer(record if isinstance(record, bytes) else b"", dtype=np.uint8)
                layout.check_records(content[None], [str(ref_id)], origin=str(path))
                num_records += 1
    except (sqlite3.Error, OSError, BankFormatError) as error:
        return Audit([f"{path} is damaged: {error}; delete it"], "")
    return Audit([], f"{num_records} memories encoded when retrieved")


def list_notes(bank: Bank) -> list[str]:
    """Returns what is not in order but harms nobody who reads this version, each naming the file.

    That are unfinished and forgotten files, a parent that is gone, and other versions that are not whole.
    """
    notes = []
    versions = list_versions(bank.store)
    parent = bank.manifest.parent
    if parent is not None and parent not in versions:
        notes.append(f"version {parent}, from which this one was made, is gone")
    named = {file.path for file in bank.manifest.files}
    sizes = {name: _find_size(bank, name) for name in bank.store.list_files(SEGMENTS_FOLDER)}
    is_known = True
    for version in versions:
        if version == bank.manifest.version:
            continue
        try:
            files = read_manifest(bank.store, version).files
        except BankError as error:
            notes.append(f"version {version} cannot be opened: {error}")
            is_known = False
            continue
        named |= {file.path for file in files}
        notes += [
            f"version {version} lacks {file.path}, or it has another size"
            for file in files
            if sizes.get(file.path) != file.size_bytes
        ]
    if is_known:
        notes += [f"{name} belongs to no version; remove it with: memory3 gc" for name in sizes if name not in named]
    others = [name for name in bank.store.list_files() if name.endswith(TEMPORARY_SUFFIX) and name not in sizes]
    notes += [f"{name} is unfinished; remove it with: memory3 gc" for name in others]
    return notes


def _find_size(bank: Bank, name: str) -> int | None:
    """Returns the size of a file, None if it cannot be read."""
    try:
        return bank.store.get_size(name)
    except BankError:
        return None


# Tables alone and against each other ----------------------------------------------------------------------------------


def audit_tables(bank: Bank) -> Audit:
    """Checks the ids, the counts and the relations of all tables of a version."""
    wrong = []
    references = _name_files(bank, "references")
    ids = {kind: _read_ids(bank, kind) for kind in ("references", "signatures", "embeddings", "memories")}
    for kind, found in ids.items():
        wrong += _check_order(bank, kind, "ref_id")
        if pc.count_distinct(found).as_py() != len(found):
            wrong.append(f"an id stands more than once in {_name_files(bank, kind)}")
        if kind != "references":
            wrong += _check_subset(
                found, ids["references"], f"{_name_files(bank, kind)} names references not stored in {references}"
            )
    for kind in ("documents", "document_duplicates", "document_signatures"):
        wrong += _check_order(bank, kind, "doc_id")
    for kind in DROPPING_KINDS:
        wrong += _check_order(bank, kind, "ref_id")
    stored = ids["references"]
    documents = bank.read_table("documents", ["doc_id", "size_bytes", "num_chars", "num_references"])
    occurrences = bank.read_table("occurrences", [name for name in _list_names("occurrences") if name != "prefix"])
    wrong += _check_occurrences(bank, documents, occurrences)
    occurring = pc.unique(occurrences["ref_id"])
    name = _name_files(bank, "occurrences")
    wrong += _check_subset(occurring, stored, f"{name} names references not stored in {references}")

    dropped = bank.read_dropped_ids()
    tombstones = _read_ids(bank, "tombstones")
    gone = stored.filter(pc.invert(pc.is_in(stored, value_set=occurring)))
    name = _name_files(bank, "tombstones") or make_manifest_name(bank.manifest.version)
    wrong += _check_subset(gone, tombstones, f"{name} lacks references that stand in no document")
    wrong += _check_subset(tombstones, gone, f"{name} has references that stand in a document or are not stored")
    live = stored.filter(pc.invert(pc.is_in(stored, value_set=dropped)))
    wrong += _check_subset(live, ids["embeddings"], f"{_name_files(bank, 'embeddings')} lacks live references")
    if not bank.manifest.cold:
        name = _name_files(bank, "memories") or make_manifest_name(bank.manifest.version)
        wrong += _check_subset(live, ids["memories"], f"{name} lacks live references")
    wrong += _check_duplicates(bank, "duplicates", "ref_id", live, occurring)
    if bank.manifest.list_files("contaminated"):
        contaminated = _read_ids(bank, "contaminated")
        name = _name_files(bank, "contaminated")
        wrong += _check_subset(contaminated, stored, f"{name} names references not stored in {references}")
        overlaps = bank.read_table("contaminated", ["overlap"])["overlap"]
        if not pc.all(pc.and_(pc.greater(overlaps, 0.0), pc.less_equal(overlaps, 1.0)), min_count=0).as_py():
            wrong.append(f"{name} has an overlap outside of (0, 1]")
        both = pc.and_(pc.is_in(contaminated, value_set=_read_ids(bank, "duplicates")), True)
        if pc.any(both).as_py():
            wrong.append(f"{name} names references that are dropped as near-duplicates too")
    if bank.manifest.list_files("signatures"):
        name = _name_files(bank, "signatures")
        compared = pa.concat_arrays([live, _read_ids(bank, "duplicates")])
        wrong += _check_subset(compared, ids["signatures"], f"{name} lacks references that were compared")
    wrong += _check_documents(bank, documents)
    wrong += _check_counts(bank, len(documents), len(occurrences), len(live))
    detail = f"{len(documents)} documents, {len(occurrences)} occurrences, {len(live)} live references"
    return Audit(wrong, f"{detail} of {len(stored)}")


def _get_segment(file: FileEntry) -> str:
    return PurePosixPath(file.path).parent.name


def _name_files(bank: Bank, kind: str) -> str:
    """Returns the paths of all files of a kind, for messages."""
    return ", ".join(file.path for file in bank.manifest.list_files(kind))


def _list_names(kind: str) -> list[str]:
    schema = find_schema(kind, pa.schema([]))
    return [] if schema is None else list(schema.names)


def _read_ids(bank: Bank, kind: str, column: str = "ref_id") -> pa.Array:
    """Returns a column of ids of all files of a kind; empty if there is none."""
    if not bank.manifest.list_files(kind):
        return pa.array([], pa.string())
    return bank.read_table(kind, [column])[column].combine_chunks()


def _check_order(bank: Bank, kind: str, column: str) -> list[str]:
    """Checks that the ids of each file of a kind ascend, each once."""
    wrong = []
    for file in bank.manifest.list_files(kind):
        last = ""
        for batch in bank.iterate_table(file, [column]):
            ids = batch[column]
            if len(ids) and not (ids[0].as_py() > last and pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py()):
                wrong.append(f"{file.path} is not sorted by {column}, each once")
                break
            last = ids[-1].as_py() if len(ids) else last
    return wrong


def _check_subset(part: pa.Array, whole: pa.Array, finding: str) -> list[str]:
    """Returns the finding, with an example, if an id of ``part`` is not in ``whole``."""
    missing = part.filter(pc.invert(pc.is_in(part, value_set=whole)))
    return [f"{finding}: {len(missing)}, for instance {missing[0].as_py()}"] if len(missing) else []


def _find_starts(ids: pa.Array) -> MaskArray:
    """Returns where the runs of equal ids begin, (N,)."""
    starts = np.ones(len(ids), dtype=np.bool_)
    starts[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return starts


def _check_occurrences(bank: Bank, documents: pa.Table, occurrences: pa.Table) -> list[str]:
    """Checks that the references of each document are numbered, are as many as it says, and tile it."""
    name = _name_files(bank, "occurrences")
    with_references = documents.filter(pc.greater(documents["num_references"], 0)).combine_chunks()
    ids = occurrences["doc_id"].combine_chunks()
    is_first = _find_starts(ids)
    firsts = np.flatnonzero(is_first)
    if not ids.take(pa.array(firsts)).equals(with_references["doc_id"].combine_chunks()):
        return [f"{name} has occurrences of other documents than {_name_files(bank, 'documents')}"]
    wrong = []
    counts = np.diff(np.append(firsts, len(ids)))
    if (counts != with_references["num_references"].to_numpy()).any():
        wrong.append(f"{_name_files(bank, 'documents')} has other numbers of references than {name} has occurrences")
    if (occurrences["ordinal"].to_numpy() != np.arange(len(ids)) - np.repeat(firsts, counts)).any():
        wrong.append(f"{name} does not number the references of a document from 0 on")
    may_overlap = bank.manifest.config.get("chunking", {}).get("overlap_tokens", 0) > 0
    for start, end, size in (("start_byte", "end_byte", "size_bytes"), ("start_char", "end_char", "num_chars")):
        starts, ends = occurrences[start].to_numpy(), occurrences[end].to_numpy()
        gaps = starts[~is_first] - np.append(0, ends[:-1])[~is_first]
        if (starts[is_first] != 0).any() or (gaps > 0).any() or ((gaps < 0).any() and not may_overlap):
            wrong.append(f"{name}: the references of a document do not follow each other ({start})")
        elif (ends <= starts).any() or (ends[np.append(firsts[1:], len(ids)) - 1] != with_references[size]).any():
            sizes = _name_files(bank, "documents")
            wrong.append(f"{name}: the references of a document do not reach its end ({end}), or not {size} in {sizes}")
    return wrong


def _check_duplicates(bank: Bank, kind: str, column: str, kept_among: pa.Array, dropped_among: pa.Array) -> list[str]:
    """Checks a table of near-duplicates: whom they are dropped for, how similar they are, and their clusters."""
    name = _name_files(bank, kind)
    if not name:
        return []
    table = bank.read_table(kind).combine_chunks()
    dropped, kept, cluster = (table[key].combine_chunks() for key in (column, f"kept_{column}", "cluster"))
    wrong = _check_subset(kept, kept_among, f"{name} keeps texts that are not live")
    wrong += _check_subset(dropped, dropped_among, f"{name} drops texts that are not there")
    matched = table[f"matched_{column}"].combine_chunks()
    wrong += _check_subset(matched, pa.concat_arrays([kept, dropped]), f"{name} matches texts that are in no cluster")
    section = "deduplication" if kind == "duplicates" else "document_deduplication"
    config = bank.manifest.config.get(section, {})
    threshold = config.get("threshold", 0.0)
    bounds = {"jaccard": threshold if config.get("strict") else 0.0, "matched_jaccard": threshold}
    for key, least in bounds.items():
        values = table[key].to_numpy()
        if not ((values >= least) & (values <= 1)).all():
            wrong.append(f"{name} has a {key} outside of [{least:g}, 1]")
    order = pc.sort_indices(
        pa.table({"kept": kept, "dropped": dropped}), [("kept", "ascending"), ("dropped", "ascending")]
    )
    ordered = kept.take(order)
    starts = np.flatnonzero(_find_starts(ordered)) if len(kept) else np.empty(0, np.int64)
    representatives, least_dropped = ordered.take(pa.array(starts)), dropped.take(order).take(pa.array(starts))
    clusters = pc.if_else(pc.less(representatives, least_dropped), representatives, least_dropped)
    expected = clusters.take(pc.index_in(kept, value_set=representatives))
    if not expected.equals(cluster):
        wrong.append(f"{name} has a cluster that is not named by its least id, or has two live texts")
    return wrong


def _check_documents(bank: Bank, documents: pa.Table) -> list[str]:
    """Checks what was compared and dropped of documents."""
    kept = documents["doc_id"].combine_chunks()
    dropped = _read_ids(bank, "document_duplicates", "doc_id")
    wrong = _check_duplicates(bank, "document_duplicates", "doc_id", kept, dropped)
    if pc.any(pc.is_in(dropped, value_set=kept)).as_py():
        wrong.append(f"{_name_files(bank, 'document_duplicates')} drops documents that are kept")
    if bank.manifest.list_files("document_signatures"):
        signed = _read_ids(bank, "document_signatures", "doc_id")
        name = _name_files(bank, "document_signatures")
        both = pa.concat_arrays([kept, dropped])
        wrong += _check_subset(both, signed, f"{name} lacks documents that were compared")
        wrong += _check_subset(signed, both, f"{name} has documents that are not there")
    return wrong


def _check_counts(bank: Bank, num_documents: int, num_occurrences: int, num_live: int) -> list[str]:
    """Compares the counts of the manifest with the tables."""
    name = make_manifest_name(bank.manifest.version)
    documents, references = (bank.manifest.counts.get(what, {}) for what in ("documents", "references"))
    found = (num_documents, num_occurrences, num_live)
    said = (documents.get("kept"), references.get("read"), references.get("kept"))
    wrong = []
    if found != said:
        wrong.append(f"{name} counts {said} documents, occurrences and live references, the tables have {found}")
    reasons = pc.value_counts(bank.read_table("rejects", ["reason"])["reason"]).to_pylist()
    # What was deleted is counted, but not named.
    dropped = {reason: number for reason, number in documents.get("dropped", {}).items() if reason != DELETED}
    if {entry["values"]: entry["counts"] for entry in reasons} != dropped:
        wrong.append(f"{_name_files(bank, 'rejects')} has other numbers of reasons than {name}")
    return wrong


# References and embeddings, row by row --------------------------------------------------------------------------------


def audit_references(bank: Bank) -> Audit:
    """Checks that every reference has the id that its tokens give, and as many tokens as it says."""
    wrong, num_rows = [], 0
    head = bank.manifest.fingerprint.tokenizer.encode() + b"\0"
    longest = bank.manifest.config.get("chunking", {}).get("max_tokens", MAX_TOKENS)
    for file in bank.manifest.list_files("references"):
        for batch in bank.iterate_table(file, ["ref_id", "token_ids", "num_tokens"]):
            lists, num_tokens = batch["token_ids"], batch["num_tokens"].to_numpy()
            num_rows += len(lists)
            if (lists.value_lengths().to_numpy() != num_tokens).any():
                wrong.append(f"{file.path} has a reference whose num_tokens is not the number of its tokens")
                break
            if len(num_tokens) and not (num_tokens.min() >= 1 and num_tokens.max() <= longest):
                wrong.append(f"{file.path} has a reference of no token or of more than {longest}")
                break
            content = lists.flatten().to_numpy().astype("<i4", copy=False).tobytes()
            ends = (4 * np.cumsum(num_tokens, dtype=np.int64)).tolist()
            ids = [hash_bytes(head + content[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
            is_equal = pc.equal(batch["ref_id"], pa.array(ids, pa.string()))
            if not pc.all(is_equal, min_count=0).as_py():
                example = batch["ref_id"][is_equal.index(False).as_py()].as_py()
                wrong.append(
                    f"{file.path} has references whose ids are not those of their tokens, for instance {example}"
                )
                break
    return Audit(wrong, f"{num_rows} references have the ids of their tokens")


def audit_embeddings(bank: Bank) -> Audit:
    """Checks that every embedding has the length 1, or 0 for a text without a known word."""
    wrong, num_rows = [], 0
    for file in bank.manifest.list_files("embeddings"):
        for batch in bank.iterate_table(file):
            vectors = batch["vector"].flatten().to_numpy().reshape(len(batch), -1)
            num_rows += len(batch)
            lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
            is_well = (np.abs(lengths - 1) <= UNIT_TOLERANCE) | (lengths == 0)  # false for nan
            if not is_well.all():
                example = batch["ref_id"][int(np.argmin(is_well))].as_py()
                wrong.append(f"{file.path} has vectors that are not of length 1, for instance that of {example}")
                break
    return Audit(wrong, f"{num_rows} embeddings")


# Memories and shards --------------------------------------------------------------------------------------------------


def audit_memories(bank: Bank) -> Audit:
    """Reads every record: it must be whole, be of the reference that the table says, and have its offsets.

    Each row of a shard must be used once.
    """
    wrong, num_records = [], 0
    tables = {_get_segment(file): file for file in bank.manifest.list_files("memories")}
    shards: dict[str, list[FileEntry]] = {}
    for file in bank.manifest.list_files("shard"):
        shards.setdefault(_get_segment(file), []).append(file)
    for segment in sorted(shards.keys() - tables.keys()):
        wrong.append(f"{shards[segment][0].path} and others of its segment are in no table of memories")
    for segment, table in tables.items():
        try:
            num_records += _audit_segment(bank, table, shards.get(segment, []))
        except BankError as error:
            wrong.append(str(error))
    return Audit(wrong, f"{num_records} memories in {sum(map(len, shards.values()))} shards")


def _audit_segment(bank: Bank, table: FileEntry, shards: Iterable[FileEntry]) -> int:
    """Checks the memories of one segment and returns their number.

    Raises:
        BankFormatError: the first thing that is wrong.
    """
    layout = bank.manifest.layout
    rows_per_batch = max(1, RECORD_BYTES_AT_ONCE // layout.stride_bytes)
    num_records = 0
    with contextlib.ExitStack() as stack:
        readers = {PurePosixPath(file.path).name: (file, stack.enter_context(bank.open_shard(file))) for file in shards}
        is_used = {name: np.zeros(reader.num_records, np.bool_) for name, (_, reader) in readers.items()}
        for batch in bank.iterate_table(table, rows_per_batch=rows_per_batch):
            offsets = batch["offsets"].flatten().to_numpy().reshape(len(batch), -1)
            if offsets.shape[1] != layout.num_offsets:
                raise BankFormatError(f"{table.path} has {offsets.shape[1]} offsets a memory, not {layout.num_offsets}")
            for name, places in _group_places(batch["shard"]):
                if name not in readers:
                    raise BankFormatError(f"{table.path} names the shard {name!r}, which is not in its segment")
                file, reader = readers[name]
                rows = batch["row"].to_numpy()[places]
                if rows.min() < 0 or rows.max() >= reader.num_records:
                    raise BankFormatError(f"{table.path} names rows that {file.path} does not have")
                if is_used[name][rows].any() or len(np.unique(rows)) != len(rows):
                    raise BankFormatError(f"{table.path} names a row of {file.path} more than once")
                is_used[name][rows] = True
                ref_ids = batch["ref_id"].take(pa.array(places)).to_pylist()
                _, found = layout.unpack(reader.read(rows.tolist()), ref_ids, origin=file.path)
                if not np.array_equal(found.reshape(len(rows), -1), offsets[places]):
                    raise BankFormatError(f"{table.path} has other offsets than the records of {file.path}")
                num_records += len(rows)
        unused = [file.path for name, (file, _) in readers.items() if not is_used[name].all()]
    if unused:
        raise BankFormatError(f"{unused[0]} has memories that {table.path} does not name")
    return num_records


def _group_places(names: pa.Array) -> Iterator[tuple[str, LongArray]]:
    """Yields the distinct names of a column, each with the rows where it stands."""
    encoded = names.dictionary_encode()
    codes = encoded.indices.to_numpy()
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        yield name, np.flatnonzero(codes == code)
