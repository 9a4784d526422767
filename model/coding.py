"""Codecs: how the keys and values of memories become the bytes of a record, and come back when they are read.

Writers encode, readers decode on the device of the model. What the names mean and how many bytes a vector takes is
said in :mod:`schemas.codec_names`; a codec that is trained comes as a file (:mod:`model.codec_files`).

Shape letters: N records, L memory layers, H KV heads, S slots, D head dimension, C bytes of a coded vector.
"""

import dataclasses
from pathlib import Path
from typing import Protocol

import torch

from model.additive_codecs import ProductResidualCodec, RotatedResidualCodec
from model.codec_files import Parameters, TrainedCodec, load_trained
from model.lloyd_codec import LloydCodec
from model.mapped_codec import MappedCodec
from model.plain_codecs import ByteCodec, PlainCodec
from model.turbo_codec import TurboCodec
from schemas.codec_names import NONE, VectorCodecName, count_code_bytes, is_trained, parse_codec, parse_vector_codec
from schemas.errors import InputError
from schemas.records import ITEM_SIZES_BYTES

TRAINED_SUFFIX = ".safetensors"


class VectorCodec(Protocol):
    """Codes the keys, or the values, of all layers and heads of a model."""

    @property
    def name(self) -> str:
        """The codec's name without digest, as in :mod:`schemas.codec_names`."""

    @property
    def code_bytes(self) -> int:
        """Bytes of a coded vector."""

    def encode(self, vectors_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the codes of vectors of any float type, uint8 (N, L, H, S, C)."""

    def decode(self, codes_NLHSC: torch.Tensor) -> torch.Tensor:
        """Returns what codes stand for, float32 (N, L, H, S, D) on their device; finite whatever the codes are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueCodec:
    """Codes whole payloads: layer by layer all keys (H, S), then all values (H, S).

    Attributes:
        name: the codec's name with digest, as it stands in :class:`schemas.records.RecordLayout`.
        keys: codes the keys.
        values: codes the values.
        shape: (L, H, S, D) of the keys, or values, of one memory.
        dtype: the type of vectors that are stored as they are.
    """

    name: str
    keys: VectorCodec
    values: VectorCodec
    shape: tuple[int, int, int, int]
    dtype: str

    @property
    def payload_bytes(self) -> int:
        """Bytes of the key-values of one memory."""
        num_layers, num_heads, num_slots, _ = self.shape
        return num_layers * num_heads * num_slots * (self.keys.code_bytes + self.values.code_bytes)

    def encode(self, keys_NLHSD: torch.Tensor, values_NLHSD: torch.Tensor) -> torch.Tensor:
        """Returns the payloads of memories, uint8 (N, payload_bytes), contiguous, on the device of the keys."""
        coded = (self.keys.encode(keys_NLHSD), self.values.encode(values_NLHSD))
        return torch.cat([codes.flatten(2) for codes in coded], 2).flatten(1)

    def decode(self, payload: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of payloads, two tensors (N, L, H, S, D), on the device of the payloads.

        Vectors that are stored as they are come without a copy where the type is already the one asked for.

        Args:
            payload: uint8 (N, payload_bytes), whose rows may be parts of longer records.
            dtype: the type to return.
        """
        num_layers, num_heads, num_slots, head_dim = self.shape
        if self.keys.name == self.values.name == NONE:
            stored = payload.view(getattr(torch, self.dtype)).unflatten(
                1, (num_layers, 2, num_heads, num_slots, head_dim)
            )
            return stored[:, :, 0].to(dtype), stored[:, :, 1].to(dtype)
        coded = payload.unflatten(1, (num_layers, -1))
        end = num_heads * num_slots * self.keys.code_bytes
        keys = self.keys.decode(coded[..., :end].unflatten(2, (num_heads, num_slots, -1)))
        values = self.values.decode(coded[..., end:].unflatten(2, (num_heads, num_slots, -1)))
        return _cast(keys, dtype), _cast(values, dtype)


def _cast(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Changes the type; what float16 cannot hold becomes its largest number, not infinity."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        vectors = vectors.clamp(-largest, largest)
    return vectors.to(dtype)


def load_codec(
    codec: str,
    *,
    num_layers: int,
    num_kv_heads: int,
    num_slots: int,
    head_dim: int,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
) -> KeyValueCodec:
    """Makes a codec ready for the memories of one model.

    Args:
        codec: a name that needs no training, such as ``int8``, or the path of a trained codec's file.
        num_layers: memory layers.
        num_kv_heads: key-value heads a layer.
        num_slots: tokens kept a head.
        head_dim: size of a key or value vector.
        dtype: the type of vectors that are stored as they are.
        device: where decoding will be done; its tables are put there.

    Raises:
        InputError: there is no such codec or file, or it is for another shape.
        BankFormatError: the file is damaged.
    """
    if dtype not in ITEM_SIZES_BYTES:
        raise InputError(f"codec: dtype is {dtype!r}, must be one of {sorted(ITEM_SIZES_BYTES)}")
    shape = (num_layers, num_kv_heads, head_dim)
    if codec.endswith(TRAINED_SUFFIX):
        trained = load_trained(Path(codec))
        if trained.shape != shape:
            raise InputError(
                f"the codec {codec} is for (layers, KV heads, head dim) = {trained.shape}, the model has {shape}"
            )
    else:
        parsed = parse_codec(codec)
        if is_trained(parsed.keys) or is_trained(parsed.values):
            raise InputError(
                f"the codec {codec!r} has to be trained: make its file with memory3 codec train and give its path"
            )
        trained = TrainedCodec(keys=parsed.keys, values=parsed.values, shape=shape, tensors={})
    return build_codec(trained, num_slots=num_slots, dtype=dtype, device=device)


def build_codec(
    trained: TrainedCodec, *, num_slots: int, dtype: str = "bfloat16", device: torch.device | str = "cpu"
) -> KeyValueCodec:
    """Makes a codec of what was learnt for it, or of nothing where its names need no training.

    Args:
        trained: names, shape and tables.
        num_slots: tokens kept a head.
        dtype: the type of vectors that are stored as they are.
        device: where decoding will be done; its tables are put there.

    Raises:
        InputError: the codec is not for vectors of this size.
    """
    num_layers, num_kv_heads, head_dim = trained.shape
    return KeyValueCodec(
        name=trained.name,
        keys=make_codec(trained.keys, trained.get_tables("keys"), head_dim=head_dim, dtype=dtype, device=device),
        values=make_codec(trained.values, trained.get_tables("values"), head_dim=head_dim, dtype=dtype, device=device),
        shape=(num_layers, num_kv_heads, num_slots, head_dim),
        dtype=dtype,
    )


def make_codec(
    name: str, tables: Parameters, *, head_dim: int, dtype: str = "bfloat16", device: torch.device | str = "cpu"
) -> VectorCodec:
    """Makes a codec of keys or of values.

    Args:
        name: its name, without digest.
        tables: what was learnt for it, see :func:`model.codec_files.list_shapes`.
        head_dim: size of a vector.
        dtype: the type of vectors that are stored as they are.
        device: where decoding will be done.

    Raises:
        InputError: there is no such codec, or not for vectors of this size.
    """
    count_code_bytes(name, head_dim, ITEM_SIZES_BYTES[dtype])
    parsed = parse_vector_codec(name)
    if parsed.family == NONE:
        return PlainCodec(head_dim=head_dim, dtype=dtype)
    tables = {label: table.to(device) for label, table in tables.items()}
    inner = _make_inner(parsed, tables, head_dim, device)
    return MappedCodec(inner, tables["mean"], tables["map"], tables["inverse"]) if parsed.mapped else inner


def _make_inner(
    parsed: VectorCodecName, tables: Parameters, head_dim: int, device: torch.device | str
) -> ByteCodec | TurboCodec | LloydCodec | ProductResidualCodec | RotatedResidualCodec:
    match parsed.family:
        case "int8":
            return ByteCodec(head_dim=head_dim)
        case "turbo":
            return TurboCodec(parsed.numbers[0], head_dim, device=device)
        case "lloyd":
            return LloydCodec(parsed.numbers[0], tables["bits"], tables["levels"])
        case "PRQ":
            return ProductResidualCodec(name=parsed.inner_name, stages_PKRE=tables["stages"])
        case _:
            return RotatedResidualCodec(
                name=parsed.inner_name,
                basis_DD=tables["basis"],
                stages_KRD=tables["stages"],
                parts_PRE=tables["parts"],
            )
