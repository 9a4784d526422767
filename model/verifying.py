"""What ``memory3 verify`` needs FAISS, the tokenizer, the embedder or the model for; each check returns its findings.

Stands beside :mod:`pipelines.auditing`, which looks at everything else. Indexes are compared with the embeddings of
their segment; a sample of references is tokenized, embedded and encoded again and compared with what is stored.
"""

import struct
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.fetching import check_fingerprint
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.codec_names import NONE
from schemas.errors import BankFormatError, WrongModelError
from schemas.manifest import FileEntry
from schemas.protocols import Embedder, FloatArray, IntArray
from schemas.records import EMPTY_SLOT

SAMPLE_SIZE = 64
"""References encoded again."""

INDEX_HEADER = struct.Struct("<4siq")
"""How a FAISS index file begins: its kind, the dimension, the number of vectors."""

ROWS_AT_ONCE = 16_384

LEAST_SIMILARITY = 0.98
"""Cosine similarity of an embedding and what an index of 8-bit vectors keeps of it."""

MAX_EMBEDDING_ERROR = 1e-2
"""Length of the difference of two vectors of a text: other processors and batches round differently."""

LEAST_KEPT_SHARE = 0.99
"""Share of a sample's kept tokens that must be kept again: nearly equal scores may swap."""

MAX_RELATIVE_ERROR = 0.01

MAX_CODED_ERROR = 0.1
"""The same where vectors are coded: one that lies between two codes may get the other when it is made again."""


def _pair_indexes(bank: Bank) -> Iterator[tuple[FileEntry, FileEntry | None]]:
    """Yields each index with the embeddings of its segment."""
    tables = {PurePosixPath(file.path).parent: file for file in bank.manifest.list_files("embeddings")}
    for file in bank.manifest.list_files("index"):
        yield file, tables.get(PurePosixPath(file.path).parent)


def check_index_headers(bank: Bank) -> list[str]:
    """Compares number and size of the vectors of every index with the embeddings of its segment; reads headers only."""
    wrong = []
    for file, table in _pair_indexes(bank):
        try:
            content = bank.store.read_range(file.path, 0, INDEX_HEADER.size)
        except FileNotFoundError:
            wrong.append(f"{file.path} is missing")
            continue
        if len(content) < INDEX_HEADER.size or not content.startswith(b"I"):
            wrong.append(f"{file.path} has no header of a FAISS index")
            continue
        _, dimension, num_vectors = INDEX_HEADER.unpack(content)
        if table is None:
            wrong.append(f"{file.path} stands in a segment without embeddings")
            continue
        with bank.open_table(table) as embeddings:
            expected = embeddings.schema_arrow.field("vector").type.list_size
            num_rows = embeddings.metadata.num_rows
        if (dimension, num_vectors) != (expected, num_rows) or num_vectors != file.num_rows:
            wrong.append(
                f"{file.path} has {num_vectors} vectors of {dimension}, {table.path} {num_rows} of {expected}, "
                f"the manifest says {file.num_rows}"
            )
    paired = {table.path for _, table in _pair_indexes(bank) if table}
    lonely = [file.path for file in bank.manifest.list_files("embeddings") if file.path not in paired]
    return [*wrong, *(f"{path} has no index" for path in lonely)]


def check_indexes(bank: Bank) -> list[str]:
    """Compares the vectors of every index with the embeddings of its segment, row for row."""
    wrong = check_index_headers(bank)
    if wrong:
        return wrong
    for file, table in _pair_indexes(bank):
        if table is not None:
            wrong += _compare_index(bank, file, table)
    return wrong


def _compare_index(bank: Bank, file: FileEntry, table: FileEntry) -> list[str]:
    import faiss

    try:
        index = faiss.read_index(str(bank.check(file)))
        if isinstance(index, faiss.IndexIVF):
            index.make_direct_map()
    except RuntimeError as error:
        return [f"{file.path} cannot be read by FAISS: {str(error).splitlines()[-1]}"]
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return [f"{file.path} does not compare by inner product"]
    first_row = 0
    for batch in bank.iterate_table(table, rows_per_batch=ROWS_AT_ONCE):
        vectors = _get_vectors(batch["vector"])
        found = index.reconstruct_n(first_row, len(vectors))
        if isinstance(index, faiss.IndexIVF):
            lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(vectors, axis=1)
            is_equal = np.einsum("nd,nd->n", found, vectors) >= LEAST_SIMILARITY * lengths
        else:
            is_equal = (found == vectors).all(axis=1)
        if not is_equal.all():
            example = batch["ref_id"][int(np.argmin(is_equal))].as_py()
            return [f"{file.path} has other vectors than {table.path}, for instance that of {example}"]
        first_row += len(vectors)
    return []


def _get_vectors(column: pa.Array) -> FloatArray:
    vectors: FloatArray = column.flatten().to_numpy().reshape(len(column), -1)
    return vectors


def _choose_rows(num_rows: int) -> list[int]:
    """Returns rows of a sample, the same every time, ascending."""
    chosen = np.random.default_rng(0).choice(num_rows, min(SAMPLE_SIZE, num_rows), replace=False)
    return np.sort(chosen).tolist()  # type: ignore[no-any-return]


def _list_live(bank: Bank, kind: str) -> list[tuple[FileEntry, pa.Table]]:
    """Returns of each file of a kind the ids of the live references in it, with their rows."""
    dropped, found = bank.read_dropped_ids(), []
    for file in bank.manifest.list_files(kind):
        ids = pa.Table.from_batches(bank.iterate_table(file, ["ref_id"]), pa.schema([_REF_ID]))
        ids = ids.append_column("place", pa.array(np.arange(len(ids))))
        found.append((file, ids.filter(pc.invert(pc.is_in(ids["ref_id"], value_set=dropped)))))
    return found


_REF_ID = pa.field("ref_id", pa.string(), nullable=False)


def _sample_live(bank: Bank, kind: str) -> list[str]:
    """Returns ids of live references that stand in the tables of a kind."""
    ids = [ref_id for _, table in _list_live(bank, kind) for ref_id in table["ref_id"].to_pylist()]
    return [ids[row] for row in _choose_rows(len(ids))]


def check_tokens(bank: Bank, writer: ReferenceWriter) -> tuple[list[str], str]:
    """Tokenizes the texts of a sample of references again."""
    sample = _sample_live(bank, "references")
    rows = bank.read_references(sample, ["text", "token_ids"])
    again = writer.checkpoint.tokenizer.encode(rows["text"].to_pylist())
    pairs = zip(sample, again, rows["token_ids"].to_pylist(), strict=True)
    differing = [ref_id for ref_id, found, stored in pairs if found.tolist() != stored]
    wrong = (
        [f"the text of {differing[0]} in {_name(bank, 'references', differing[0])} has other tokens"]
        if differing
        else []
    )
    return wrong, f"{len(sample)} tokenized again"


def check_embeddings(bank: Bank, embedder: Embedder) -> tuple[list[str], str]:
    """Embeds the texts of a sample of live references again.

    Raises:
        WrongModelError: the embedder at hand is another than the bank's.
    """
    if embedder.embedder_id != bank.manifest.embedder_id:
        raise WrongModelError(
            f"bank {bank.url} was embedded by {bank.manifest.embedder_id}, the embedder at hand is "
            f"{embedder.embedder_id}; restore the embedding model it was built with"
        )
    sample = _sample_live(bank, "embeddings")
    again = embedder.embed(bank.read_references(sample, ["text"])["text"].to_pylist())
    rows = bank.read_rows("embeddings", "ref_id", sample, ["ref_id", "vector"]).combine_chunks()
    order = pc.index_in(pa.array(sample), value_set=rows["ref_id"].combine_chunks())
    stored = _get_vectors(rows["vector"].combine_chunks().take(order))
    if stored.shape != again.shape:
        return [f"the embedder gives vectors of {again.shape[1]}, the bank has {stored.shape[1]}"], ""
    errors = np.linalg.norm(stored - again, axis=1)
    wrong = [
        f"the vector of {ref_id} in {_name(bank, 'embeddings', ref_id)} is not that of its text"
        for ref_id, error in zip(sample, errors.tolist(), strict=True)
        if not error <= MAX_EMBEDDING_ERROR
    ]
    return wrong[:1], f"{len(sample)} embedded again, greatest difference {errors.max(initial=0):.1e}"


def _name(bank: Bank, kind: str, ref_id: str) -> str:
    """Returns the path of the file in which a reference stands."""
    return next(file.path for file, ids in _list_live(bank, kind) if pc.index(ids["ref_id"], ref_id).as_py() >= 0)


def check_memories(bank: Bank, writer: ReferenceWriter) -> tuple[list[str], str]:
    """Encodes a sample of the stored memories again with the model that wrote them.

    Raises:
        WrongModelError: the model at hand is another than the bank's.
    """
    check_fingerprint(bank.url, bank.manifest.fingerprint, writer)
    places = [(file, row) for file, ids in _list_live(bank, "memories") for row in ids.to_pylist()]
    sample = [places[row] for row in _choose_rows(len(places))]
    if not sample:
        return [], "no memory is stored"
    ref_ids = [row["ref_id"] for _, row in sample]
    payload, offsets = _read_records(bank, ref_ids)
    tokens: list[IntArray] = [
        np.asarray(ids, dtype=np.int32) for ids in bank.read_references(ref_ids, ["token_ids"])["token_ids"].to_pylist()
    ]
    written = writer.write(tokens)
    kept = _share_kept(offsets, written.offsets)
    stored, again = (_decode_floats(writer, content) for content in (payload, written.payload))
    is_same = (offsets == written.offsets) & (offsets != EMPTY_SLOT)
    comparable = torch.from_numpy(is_same)[..., None]
    error = float(((again - stored) * comparable).norm() / (stored * comparable).norm())
    detail = f"{len(sample)} encoded again: {kept:.2%} of the kept tokens equal, relative error {error:.1e}"
    if kept >= LEAST_KEPT_SHARE and error <= (MAX_RELATIVE_ERROR if writer.codec.name == NONE else MAX_CODED_ERROR):
        return [], detail
    names = ", ".join(sorted({file.path for file, _ in sample}))
    return [f"the memories of {names} are not those that the model writes: {detail}"], detail


def _read_records(bank: Bank, ref_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns payloads and offsets of stored memories, in the order asked for."""
    layout = bank.manifest.layout
    records = np.zeros((len(ref_ids), layout.stride_bytes), dtype=np.uint8)
    shards = {file.path: file for file in bank.manifest.list_files("shard")}
    wanted = {ref_id: place for place, ref_id in enumerate(ref_ids)}
    for file in bank.manifest.list_files("memories"):
        for batch in bank.iterate_table(file, ["ref_id", "shard", "row"]):
            mine = batch.filter(pc.is_in(batch["ref_id"], value_set=pa.array(ref_ids)))
            for row in mine.to_pylist():
                path = str(PurePosixPath(file.path).parent / row["shard"])
                if path not in shards:
                    raise BankFormatError(f"{file.path} names the shard {row['shard']!r}, which is not in its segment")
                with bank.open_shard(shards[path]) as shard:
                    records[wanted[row["ref_id"]]] = shard.read([row["row"]])[0]
    return layout.unpack(records, ref_ids, origin=bank.url)


def _share_kept(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the share of the tokens that heads keep on the left that they keep on the right too."""
    num_slots = left.shape[-1]
    pairs = zip(left.reshape(-1, num_slots), right.reshape(-1, num_slots), strict=True)
    return float(np.mean([np.isin(one, other).mean() for one, other in pairs]))


def _decode_floats(writer: ReferenceWriter, payload: np.ndarray) -> torch.Tensor:
    """Returns keys and values of payloads (N, payload_bytes), float32 (2, N, L, H, S, D)."""
    coded = torch.from_numpy(np.ascontiguousarray(payload)).to(writer.checkpoint.device)
    return torch.stack(writer.codec.decode(coded, torch.float32)).cpu()
