"""The file of a trained codec: plain tables in one safetensors file, and a digest that is part of the codec's name.

The file's metadata has one entry, ``memory3_codec``: format number, names, shape, digest and how it was trained. The
digest is over names, shape and tensors; a file whose tensors have another is damaged.

Shape letters: as in :mod:`model.coding`.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from schemas.atomic import write_bytes_atomically
from schemas.codec_names import MOST_BITS, CodecName, count_code_bytes, parse_codec, parse_vector_codec
from schemas.errors import BankFormatError, InputError
from schemas.identifiers import hash_bytes

FORMAT = 1

METADATA = "memory3_codec"

LARGEST = 1e6
"""Largest number of a codec's tables, so that whatever codes say, sums and products of them stay finite."""

Parameters = dict[str, torch.Tensor]
"""Tensors of a codec by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedCodec:
    """What was learnt for a codec of keys and values.

    Attributes:
        keys: name of the codec of the keys.
        values: name of that of the values.
        shape: (layers, KV heads, head dim) of the model.
        tensors: the tables, by ``keys.`` or ``values.`` and their name.
        training: how it was trained, for those who ask; no part of the digest.
    """

    keys: str
    values: str
    shape: tuple[int, int, int]
    tensors: Parameters
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes sure that the tables are those the names ask for.

        Raises:
            InputError: a table is missing, unknown, of another shape or type, or holds numbers that cannot be.
        """
        for name in (self.keys, self.values):
            count_code_bytes(name, self.shape[2], 4)
        expected = {
            f"{kind}.{label}": size
            for kind, name in (("keys", self.keys), ("values", self.values))
            for label, size in list_shapes(name, self.shape).items()
        }
        found = {label: tuple(tensor.shape) for label, tensor in self.tensors.items()}
        if found != expected:
            raise InputError(f"a codec {self.keys}/{self.values} has tables {found}, expected {expected}")
        for label, tensor in self.tensors.items():
            if tensor.dtype != (torch.uint8 if label.endswith(".bits") else torch.float32):
                raise InputError(f"the table {label} of a codec is of type {tensor.dtype}")
            if not bool((tensor.float().abs() <= LARGEST).all()):
                raise InputError(f"the table {label} of a codec holds a number beyond {LARGEST:g}, or none")
            if label.endswith(".bits"):
                limit = 8 * parse_vector_codec(getattr(self, label.split(".")[0])).numbers[0]
                if int(tensor.max()) > MOST_BITS or int(tensor.sum()) > limit:
                    raise InputError(f"the table {label} of a codec deals out more than {limit} bits")

    @functools.cached_property
    def digest(self) -> str:
        """Id of the names, the shape and the tables."""
        parts = [json.dumps([FORMAT, self.keys, self.values, *self.shape]).encode()]
        for label, tensor in sorted(self.tensors.items()):
            parts.append(f"\n{label} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            parts.append(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return hash_bytes(b"".join(parts))

    @property
    def name(self) -> str:
        """The codec's name, with digest if there are tables."""
        digest = self.digest if self.tensors else ""
        return str(CodecName(keys=self.keys, values=self.values, digest=digest))

    def get_tables(self, kind: str) -> Parameters:
        """Returns the tables of ``keys`` or ``values`` by their names."""
        return {
            label.removeprefix(f"{kind}."): tensor
            for label, tensor in self.tensors.items()
            if label.startswith(f"{kind}.")
        }

    def save(self, path: Path) -> None:
        """Writes the file; the same codec always has the same bytes."""
        facts = {"format": FORMAT, "codec": self.name, "shape": self.shape, "training": self.training}
        tensors = {label: tensor.cpu().contiguous() for label, tensor in self.tensors.items()}
        text = json.dumps(facts, sort_keys=True)
        write_bytes_atomically(path, safetensors.torch.save(tensors, {METADATA: text}))


def list_shapes(name: str, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Returns the tables that a codec of keys or values has, with their shapes.

    Args:
        name: its name, without digest.
        shape: (layers, KV heads, head dim) of the model.
    """
    num_layers, num_heads, head_dim = shape
    parsed = parse_vector_codec(name)
    tables: dict[str, tuple[int, ...]] = {}
    if parsed.mapped:
        tables["mean"] = shape
        tables["map"] = tables["inverse"] = (num_layers, num_heads, head_dim, head_dim)
    if parsed.family == "lloyd":
        tables |= {"bits": (head_dim,), "levels": (head_dim, 2**MOST_BITS)}
    elif parsed.family == "PRQ":
        splits, stages, bits = parsed.numbers
        tables["stages"] = (splits, stages, 2**bits, head_dim // splits)
    elif parsed.family == "OPQ":
        _, _, stages, stage_bits, splits, bits = parsed.numbers
        tables["basis"] = (head_dim, head_dim)
        tables["stages"] = (stages, 2**stage_bits, head_dim)
        tables["parts"] = (splits, 2**bits, head_dim // splits)
    return tables


def _read_facts(path: Path) -> tuple[dict[str, Any], Parameters]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA])
            tensors = {label: file.get_tensor(label) for label in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; make a codec with memory3 codec train") from error
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise BankFormatError(f"{path} is not the file of a codec, or damaged: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise BankFormatError(f"{path} is no codec of format {FORMAT}, the only one this release knows")
    return facts, tensors


def load_trained(path: Path) -> TrainedCodec:
    """Reads the file of a codec.

    Raises:
        InputError: there is no such file.
        BankFormatError: it is no codec, or damaged.
    """
    facts, tensors = _read_facts(path)
    try:
        name, shape = facts["codec"], facts["shape"]
        if type(name) is not str or not all(type(size) is int and size >= 1 for size in shape):
            raise TypeError(f"codec {name!r} of shape {shape!r}")
        parsed = parse_codec(name)
        num_layers, num_heads, head_dim = shape
        codec = TrainedCodec(
            keys=parsed.keys,
            values=parsed.values,
            shape=(num_layers, num_heads, head_dim),
            tensors=tensors,
            training=dict(facts["training"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BankFormatError(f"{path} is damaged: {error}") from error
    if codec.digest != parsed.digest:
        raise BankFormatError(f"{path} is damaged: its tables have the digest {codec.digest}, not {parsed.digest}")
    return codec


def read_codec_name(path: Path) -> str:
    """Returns the name, with digest, of the codec in a file; errors are those of :func:`load_trained`."""
    return load_trained(path).name
