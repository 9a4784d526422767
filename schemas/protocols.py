"""What pipelines asks of a model, and how flows hands it over.

``pipelines`` and ``model`` never import each other. ``flows`` passes picklable factories (``functools.partial`` of a
function of ``model``) to the jobs of ``pipelines``; a worker calls the factory once a process and gets one of these.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from schemas.identifiers import hash_json
from schemas.records import Bytes, RecordLayout

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
LongArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
MaskArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """The tokens of N texts, one text after the other, T tokens in all.

    Attributes:
        token_ids: int32 (T,).
        starts: first byte of each token in the UTF-8 of its own text, int64 (T,). Starts and ends ascend within a text;
            tokens that share a letter (bytes of a rare one, for some tokenizers) may overlap, and bytes that the
            tokenizer drops lie in no token.
        ends: the byte after the last of each token, int64 (T,).
        separable: bool (T,). True before a token: cut there, the text's parts have the same tokens alone, so that the
            tokens between two such places are those of the text between them. False is no promise of the contrary.
        offsets: tokens of text i are ``offsets[i]:offsets[i + 1]``, int64 (N+1,).
    """

    token_ids: IntArray
    starts: LongArray
    ends: LongArray
    separable: MaskArray
    offsets: LongArray


class TextTokenizer(Protocol):
    """A language model's tokenizer without its special tokens."""

    @property
    def tokenizer_id(self) -> str:
        """Id of the tokenizer: equal ids give equal tokens for every text."""
        ...

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        """Returns the token ids of each text."""
        ...

    def encode_texts(self, texts: pa.Array) -> EncodedTexts:
        """Returns the tokens of an array of strings with where they stand."""
        ...


class Embedder(Protocol):
    """A text embedding model."""

    @property
    def embedder_id(self) -> str:
        """Id of the model: equal ids give equal vectors for every text, up to rounding."""
        ...

    @property
    def dimension(self) -> int:
        """Size of a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Returns unit vectors, shape (texts, dimension), float32."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What determines a stored memory. Two writers with equal fingerprints write equal memories, up to rounding.

    Attributes:
        weights: digest of the weights up to the last memory layer, adapters included.
        tokenizer: id of the tokenizer.
        architecture: the model type and the settings that enter the keys and values.
        rope: the rotary settings.
        prefix_token_ids: tokens of the modified BOS ``<s>Reference:``.
        memory_layers: indices of the layers that write and read.
        selection: the rule that keeps tokens, with its settings.
        compute_dtype: the type the writer computes in.
        storage: the record layout: shape, stored type and codec.
    """

    weights: str
    tokenizer: str
    architecture: dict[str, Any]
    rope: dict[str, Any]
    prefix_token_ids: list[int]
    memory_layers: list[int]
    selection: dict[str, Any]
    compute_dtype: str
    storage: dict[str, Any]

    @property
    def digest(self) -> str:
        """The id of the fingerprint as a whole."""
        return hash_json(dataclasses.asdict(self))

    def list_differences(self, other: "Fingerprint") -> list[str]:
        """Returns the names of the parts in which two fingerprints differ."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenMemories:
    """Memories of a batch of references, N of them, in the batch's order.

    Attributes:
        payload: key-values as raw bytes, (N, payload_bytes) uint8.
        offsets: kept token offsets, (N, L, H, S) uint8, ascending, 255 for an empty slot.
    """

    payload: Bytes
    offsets: Bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundRecords:
    """Records that a source had.

    Attributes:
        records: each (stride_bytes,), checked, by the id of its reference.
        num_encoded: how many of them were encoded just now.
    """

    records: dict[str, Bytes]
    num_encoded: int = 0


class RecordSource(Protocol):
    """Where the records of one version of a bank come from: its files, or a server that has them."""

    @property
    def url(self) -> str:
        """Where the bank is, as a user writes it."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """What wrote the records."""
        ...

    @property
    def layout(self) -> RecordLayout:
        """Their shape and type."""
        ...

    def read(self, ref_ids: Sequence[str]) -> FoundRecords:
        """Returns the records of distinct references.

        Raises:
            InputError: a reference is stored but not live in this version.
            BankFormatError: a reference has no memory here, or its record is damaged.
        """
        ...


class ChunkSearch(Protocol):
    """Search for the references nearest to chunks of tokens."""

    @property
    def tokenizer_id(self) -> str:
        """Id of the tokenizer whose tokens chunks are made of."""
        ...

    def search(self, chunks: Sequence[IntArray], num_candidates: int) -> list[list[tuple[str, float]]]:
        """Returns for each chunk the ids of the nearest references and their similarities, best first."""
        ...


class TextScorer(Protocol):
    """A model that scores the quality of texts."""

    @property
    def scorer_id(self) -> str:
        """Id of the model: equal ids give equal scores for every text, up to rounding."""
        ...

    def score(self, texts: Sequence[str]) -> FloatArray:
        """Returns a score a text, float32 (texts,); the higher the better."""
        ...


class MemoryWriter(Protocol):
    """A model that encodes references into explicit memories."""

    @property
    def layout(self) -> RecordLayout:
        """Shape and type of the memories it writes."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """What determines the memories it writes."""
        ...

    def write(self, token_ids: Sequence[IntArray]) -> WrittenMemories:
        """Encodes references, each 1..128 tokens, each alone."""
        ...


TokenizerFactory = Callable[[], TextTokenizer]
EmbedderFactory = Callable[[], Embedder]
ChunkSearchFactory = Callable[[], ChunkSearch]
ScorerFactory = Callable[[], TextScorer]
WriterFactory = Callable[[], MemoryWriter]
