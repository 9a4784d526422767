"""What a bank server and its clients say to each other.

    GET  /v1/bank?at=            the version to read: what wrote it, the shape of its memories          JSON
    GET  /v1/bank/3/codec        the parameters of its codec                                            safetensors
    POST /v1/bank/3/search       query vectors (N, dimension) float32 -> hits (N, num_hits)             bytes
    POST /v1/bank/3/memories     ids (N,) -> records (N, stride_bytes), as they stand in the shards     bytes

Numbers are little endian, one row after the other, without headers: both sides know the shapes. A record carries the id
of its reference and a checksum, so the client finds out for itself whether it has got what it asked for.
"""

import re
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue

from model.retrieving import Hit
from schemas.errors import InputError
from schemas.identifiers import ID_LENGTH
from schemas.protocols import Fingerprint, FloatArray
from schemas.records import Bytes, RecordLayout

BYTES_TYPE = "application/octet-stream"

MAX_QUERIES = 128
"""Vectors of a request, as far as :data:`MAX_BODY_BYTES` has room for them."""

MAX_BODY_BYTES = 1 << 20
"""Size of a request, at most."""

MAX_HITS = 256

MAX_MEMORIES = 64
"""Memories of a request: some megabytes, so that a batch of prompts begins to arrive before all of it is read."""

HIT = np.dtype([("ref_id", f"S{ID_LENGTH}"), ("score", "<f4")])
"""A hit; where there are too few references its id is empty."""


class CodecFile(BaseModel):
    """The file with the parameters of a trained codec.

    Attributes:
        size_bytes: its size.
        sha256: digest of its bytes.
    """

    model_config = ConfigDict(frozen=True)

    size_bytes: int
    sha256: str


class BankDescription(BaseModel):
    """What a client has to know of a version.

    Attributes:
        version: its number.
        num_references: its live references.
        fingerprint: see :class:`schemas.protocols.Fingerprint`.
        layout: see :class:`schemas.records.RecordLayout`.
        embedder: name of the embedding model, as in the settings of the bank.
        embedder_id: id of its weights.
        memory: device and types of the settings of the bank.
        codec: the file of a trained codec, None if the codec has no parameters.
    """

    version: int
    num_references: int
    fingerprint: dict[str, JsonValue]
    layout: dict[str, JsonValue]
    embedder: str
    embedder_id: str
    memory: dict[str, JsonValue]
    codec: CodecFile | None = None

    def read_fingerprint(self) -> Fingerprint:
        """Returns what wrote the memories.

        Raises:
            TypeError: the server is of another release.
        """
        return Fingerprint(**self.fingerprint)  # type: ignore[arg-type]

    def read_layout(self) -> RecordLayout:
        """Returns the shape of the memories.

        Raises:
            BankFormatError: the server is of another release.
        """
        return RecordLayout.from_json(dict(self.layout))


def pack_vectors(vectors: FloatArray) -> bytes:
    """Returns vectors (N, dimension) as they are sent."""
    return np.ascontiguousarray(vectors, dtype="<f4").tobytes()


def unpack_vectors(body: bytes, dimension: int) -> FloatArray:
    """Returns the vectors (N, dimension) of a request.

    Raises:
        InputError: they are too many, of another size, or hold what is no number.
    """
    if not body or len(body) % (4 * dimension):
        raise InputError(f"the body has {len(body):,} bytes; send vectors of {dimension} little endian float32")
    vectors: FloatArray = np.frombuffer(body, "<f4").reshape(-1, dimension).astype(np.float32)
    if len(vectors) > MAX_QUERIES:
        raise InputError(f"{len(vectors):,} vectors are too many; send at most {MAX_QUERIES} at a time")
    if not np.isfinite(vectors).all():
        raise InputError("a vector holds what is no number; send unit vectors")
    return vectors


def pack_hits(hits: Sequence[Sequence[Hit]], num_hits: int) -> bytes:
    """Returns the hits of each query as they are sent, (queries, num_hits)."""
    rows = np.zeros((len(hits), num_hits), HIT)
    for row, of_query in zip(rows, hits, strict=True):
        row[: len(of_query)] = [(hit.ref_id.encode(), hit.score) for hit in of_query]
    return rows.tobytes()


def unpack_hits(body: bytes, num_queries: int, num_hits: int) -> list[list[Hit]]:
    """Returns the hits of an answer, query by query.

    Raises:
        ValueError: it is of another size.
    """
    rows = np.frombuffer(body, HIT).reshape(num_queries, num_hits)
    return [
        [Hit(ref_id=ref_id.decode("ascii"), score=float(score)) for ref_id, score in row.tolist() if ref_id]
        for row in rows
    ]


def pack_ids(ref_ids: Sequence[str]) -> bytes:
    """Returns ids as they are sent."""
    return "".join(ref_ids).encode()


def unpack_ids(body: bytes) -> list[str]:
    """Returns the ids of a request.

    Raises:
        InputError: they are too many, or no ids.
    """
    if not re.fullmatch(rb"([0-9a-f]{%d})+" % ID_LENGTH, body):
        raise InputError(f"the body has {len(body):,} bytes; send ids of {ID_LENGTH} hexadecimal digits each")
    ref_ids = [body[start : start + ID_LENGTH].decode() for start in range(0, len(body), ID_LENGTH)]
    if len(ref_ids) > MAX_MEMORIES:
        raise InputError(f"{len(ref_ids):,} ids are too many; send at most {MAX_MEMORIES} at a time")
    if len(set(ref_ids)) < len(ref_ids):
        raise InputError("an id is there twice; send each once")
    return ref_ids


def unpack_records(body: bytes, num_records: int, layout: RecordLayout) -> Bytes:
    """Returns the records (num_records, stride_bytes) of an answer, read-only and unchecked.

    Raises:
        ValueError: it is of another size.
    """
    return np.frombuffer(body, np.uint8).reshape(num_records, layout.stride_bytes)
