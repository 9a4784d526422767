"""``memory3 verify``: the files, the tables, the index and a sample of the memories, checked against each other."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows.progress import show_stage
from pipelines.assembling import hash_file
from schemas.bank import Bank
from schemas.errors import BankError
from schemas.records import EMPTY_SLOT
from schemas.shards import ShardReader

SAMPLE_SIZE = 64
"""References encoded again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether all is well.
        detail: what was found, with names of files where something is wrong.
    """

    name: str
    passed: bool
    detail: str


def check_files(bank: Bank) -> Check:
    """Compares size and SHA-256 of every file with the manifest."""
    wrong = []
    files = bank.manifest.files
    done = 0
    with show_stage("hash", len(files), "files", lambda: done):
        for file in files:
            path = bank.path / file.path
            if not path.is_file():
                wrong.append(f"{file.path} is missing")
            elif path.stat().st_size != file.size_bytes:
                wrong.append(f"{file.path} has {path.stat().st_size} bytes, not {file.size_bytes}")
            elif hash_file(path) != file.sha256:
                wrong.append(f"{file.path} has other bytes than when it was written")
            done += 1
    return Check(name="files", passed=not wrong, detail="; ".join(wrong) or f"{len(files)} files, sizes and SHA-256")


def _list_unsorted(column: pa.ChunkedArray) -> bool:
    values = column.combine_chunks()
    return bool(pc.any(pc.less_equal(values[1:], values[:-1])).as_py() or False)


def check_tables(bank: Bank) -> Check:
    """Checks keys, counts and references between the tables, and that references tile their documents."""
    wrong = []
    documents = bank.read_table("documents", ["doc_id", "size_bytes", "num_chars", "num_references"])
    occurrences = bank.read_table("occurrences")
    references = bank.read_table("references", ["ref_id", "num_tokens"])
    duplicates = bank.read_table("duplicates", ["ref_id", "kept_ref_id"])
    embeddings = bank.read_table("embeddings", ["ref_id"])
    for name, column in (("documents", documents["doc_id"]), ("references", references["ref_id"])):
        if _list_unsorted(column):
            wrong.append(f"{name} is not sorted by a unique id")
    contaminated = bank.read_table("contaminated", ["ref_id"]) if bank.manifest.list_files("contaminated") else None
    dropped = pa.concat_tables([duplicates.select(["ref_id"]), *([contaminated] if contaminated else [])])["ref_id"]
    live = references["ref_id"].filter(pc.invert(pc.is_in(references["ref_id"], value_set=dropped)))
    if not live.combine_chunks().equals(embeddings["ref_id"].combine_chunks()):
        wrong.append("embeddings are not those of the live references")
    if not bank.manifest.cold:
        memories = bank.read_table("memories", ["ref_id"])
        if not live.combine_chunks().equals(memories["ref_id"].combine_chunks()):
            wrong.append("memories are not those of the live references")
    if not pc.all(pc.is_in(duplicates["kept_ref_id"], value_set=live), min_count=0).as_py():
        wrong.append("a duplicate was dropped for a reference that is not live")
    if not pc.all(pc.is_in(occurrences["ref_id"], value_set=references["ref_id"]), min_count=0).as_py():
        wrong.append("an occurrence names a reference that is not there")
    if not pc.all(
        pc.and_(pc.greater(references["num_tokens"], 0), pc.less_equal(references["num_tokens"], 128)), min_count=0
    ).as_py():
        wrong.append("a reference has no token or more than 128")
    wrong += _check_tiling(documents, occurrences, bank.manifest.config["chunking"].get("overlap_tokens", 0) > 0)
    wrong += _check_counts(bank, len(documents), len(occurrences), len(references), len(live))
    detail = f"{len(documents)} documents, {len(occurrences)} occurrences, {len(live)} live references"
    return Check(name="tables", passed=not wrong, detail="; ".join(wrong) or detail)


def _check_tiling(documents: pa.Table, occurrences: pa.Table, may_overlap: bool) -> list[str]:
    ids = occurrences["doc_id"].combine_chunks()
    new_document = np.ones(len(ids), dtype=np.bool_)
    new_document[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    last = np.append(new_document[1:], True)
    for start, end, size in (("start_byte", "end_byte", "size_bytes"), ("start_char", "end_char", "num_chars")):
        starts, ends = occurrences[start].to_numpy(), occurrences[end].to_numpy()
        before = np.append(0, ends[:-1])
        sizes = documents.filter(pc.greater(documents["num_references"], 0))[size].to_numpy()
        gaps = starts[~new_document] - before[~new_document]
        if (starts[new_document] != 0).any() or (gaps > 0).any() or ((gaps < 0).any() and not may_overlap):
            return [f"the references of a document do not follow each other ({start})"]
        if len(sizes) != last.sum() or (ends[last] != sizes).any():
            return [f"the references of a document do not reach its end ({end})"]
    return []


def _check_counts(
    bank: Bank, num_documents: int, num_occurrences: int, num_references: int, num_live: int
) -> list[str]:
    wrong = []
    counts = bank.manifest.counts
    for name in ("documents", "references"):
        read, kept, dropped = (counts[name][key] for key in ("read", "kept", "dropped"))
        if read != kept + sum(dropped.values()):
            wrong.append(f"{name}: {read} read, but {kept} kept and {sum(dropped.values())} dropped")
    found = (num_documents, num_occurrences, num_live)
    said = (counts["documents"]["kept"], counts["references"]["read"], counts["references"]["kept"])
    if found != said:
        wrong.append(f"the manifest counts {said} documents, occurrences and live references, the tables {found}")
    rows = {file.kind: file.num_rows for file in bank.manifest.files}
    if rows.get("references") != num_references:
        wrong.append("the manifest has another number of references than the table")
    return wrong


def check_shards(bank: Bank) -> Check:
    """Opens every shard and compares its header with the manifest, and its rows with the table of memories."""
    if bank.manifest.cold:
        return Check(name="shards", passed=True, detail="a cold bank has none")
    wrong = []
    places = bank.read_table("memories", ["shard", "row"])
    expected = {
        row["shard"]: row["row_count"] for row in places.group_by("shard").aggregate([("row", "count")]).to_pylist()
    }
    files = bank.manifest.list_files("shard")
    for file in files:
        name = Path(file.path).name
        try:
            with ShardReader(bank.path / file.path) as shard:
                if shard.fingerprint != bank.manifest.fingerprint.digest or shard.layout != bank.manifest.layout:
                    wrong.append(f"{file.path} belongs to another bank")
                elif shard.num_records != expected.get(name):
                    wrong.append(f"{file.path} has {shard.num_records} memories, the table {expected.get(name)}")
        except BankError as error:
            wrong.append(str(error))
    if set(expected) != {Path(file.path).name for file in files}:
        wrong.append("the table of memories names other shards than the manifest")
    return Check(name="shards", passed=not wrong, detail="; ".join(wrong) or f"{len(files)} shards")


def check_index(bank: Bank) -> Check:
    """Searches the index with stored embeddings: each must find itself."""
    import faiss

    embeddings = bank.read_table("embeddings")
    vectors = embeddings["vector"].combine_chunks().flatten().to_numpy().reshape(len(embeddings), -1)
    try:
        index = faiss.read_index(str(bank.locate_all("index")[0]))
    except RuntimeError as error:
        return Check(name="index", passed=False, detail=f"the index cannot be read: {str(error).splitlines()[-1]}")
    if index.ntotal != len(vectors):
        return Check(name="index", passed=False, detail=f"{index.ntotal} vectors, {len(vectors)} embeddings")
    rows = np.random.default_rng(0).choice(len(vectors), min(1000, len(vectors)), replace=False)
    similarities, _ = index.search(vectors[rows], 1)
    itself = np.einsum("nd,nd->n", vectors[rows], vectors[rows])
    found = similarities[:, 0] >= itself - 0.01
    return Check(
        name="index", passed=bool(found.mean() >= 0.99), detail=f"{found.mean():.1%} of {len(rows)} embeddings found"
    )


def _pair_heads(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    slots = left.shape[-1]
    return zip(left.reshape(-1, slots), right.reshape(-1, slots), strict=True)


def check_memories(bank: Bank) -> Check:
    """Encodes a sample again with the model that wrote it and compares with what is stored."""
    if bank.manifest.cold:
        return Check(name="memories", passed=True, detail="a cold bank stores none")
    import torch

    from flows.generation import open_writer
    from model.fetching import BankMemories

    writer = open_writer(bank, bank.manifest.config["memory"]["model"])
    memories = BankMemories(bank, writer, cache_bytes=0)
    ref_ids = bank.read_table("memories", ["ref_id"])["ref_id"].to_pylist()
    rows = np.sort(np.random.default_rng(0).choice(len(ref_ids), min(SAMPLE_SIZE, len(ref_ids)), replace=False))
    sample = [ref_ids[row] for row in rows]
    stored = memories.fetch(sample)
    tokens = bank.read_references(sample, ["token_ids"])["token_ids"].to_pylist()
    written = writer.write([np.asarray(ids, dtype=np.int32) for ids in tokens])
    offsets = stored.offsets_LBHS.movedim(1, 0).numpy()
    same = offsets == written.offsets
    kept = np.mean([np.isin(row, other).mean() for row, other in _pair_heads(offsets, written.offsets)])
    again = torch.from_numpy(written.payload).view(getattr(torch, writer.layout.dtype))
    key_values = again.view(len(sample), *writer.layout.payload_shape).float().movedim(0, 2)  # (L, 2, R, H, S, D)
    before = torch.stack((stored.keys_LBHSD, stored.values_LBHSD), 1).float()
    comparable = torch.from_numpy(same & (offsets != EMPTY_SLOT)).movedim(1, 0)[:, None, ..., None]
    error = ((key_values - before) * comparable).norm() / (before * comparable).norm()
    passed = bool(kept >= 0.99 and error <= 0.01)
    detail = f"{len(sample)} encoded again: {kept:.2%} of the kept tokens equal, relative error {error:.1e}"
    return Check(name="memories", passed=passed, detail=detail)


def verify_bank(bank: Bank) -> list[Check]:
    """Runs all checks; one that cannot run because of damage counts as failed, and the others still run."""
    checks = []
    for name, check in (
        ("files", check_files),
        ("tables", check_tables),
        ("shards", check_shards),
        ("index", check_index),
        ("memories", check_memories),
    ):
        try:
            checks.append(check(bank))
        except BankError as error:
            checks.append(Check(name=name, passed=False, detail=str(error)))
    return checks
