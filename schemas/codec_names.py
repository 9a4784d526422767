"""Names of codecs: how the vectors of a memory are stored, and how many bytes a vector then takes.

A codec is named by the codec of the keys and, after a slash, that of the values where it is another. Codecs that are
trained have the digest of their parameters behind an at sign, since the name alone does not say what the codes mean::

    none                    vectors as they are, in the layout's type
    int8                    8 bits a number and a scale a vector
    turbo4/turbo3           keys by 4 bits a number, values by 3 (TurboQuant: unit vectors, rotated, and their norms)
    OPQ20x80-Residual2x14-PQ8x10@0f3c...    the codec of the paper, by its name there
    PRQ2x7x8@91ab...        product-residual quantizer: splits x stages x bits
    lloyd14@5be2...         14 bytes a vector, whose bits go to the numbers that need them; learnt levels for each
    mapped-turbo3@77de...   vectors are mapped by what was learnt of each layer and head before the codec

Everything that lays out or reads records knows a codec by this name alone; what it does is in :mod:`model.coding`.
"""

import dataclasses
import functools
import re

from schemas.errors import InputError

NONE = "none"

DEFAULT_CODEC = "int8"
"""The codec of new banks: the smallest that needs no training and changes what real contexts of the shipped model read
by less than a hundredth (``memory3 bench codec``). A trained one does so with fewer bytes."""

MAX_HEAD_DIM = 1024
"""Largest vector that is coded: rotations and maps have as many numbers as its square, and a manifest may lie."""

MAPPED = "mapped-"
"""Prefix of codecs with a map of each layer and head."""

SCALE_BYTES = 2
"""Bytes of the scale or norm of a vector, a 16-bit float."""

EXAMPLES = "none, int8, turbo2, turbo3, turbo4, PRQ2x7x8, mapped-lloyd14, OPQ20x80-Residual2x14-PQ8x10"

MOST_BITS = 8
"""Most bits of one number of a vector under ``lloyd``."""

_FAMILIES = {
    "none": re.compile("none"),
    "int8": re.compile("int8"),
    "turbo": re.compile("turbo([1-4])"),
    "lloyd": re.compile("lloyd([0-9]{1,4})"),
    "PRQ": re.compile("PRQ([0-9]{1,3})x([0-9]{1,3})x([0-9]{1,2})"),
    "OPQ": re.compile("OPQ([0-9]{1,3})x([0-9]{1,4})-Residual([0-9]{1,3})x([0-9]{1,2})-PQ([0-9]{1,3})x([0-9]{1,2})"),
}
_UNTRAINED = ("none", "int8", "turbo")
_DIGEST = re.compile("[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecName:
    """A codec's name, taken apart.

    Attributes:
        keys: name of the codec of the keys, without digest.
        values: name of that of the values.
        digest: id of the trained parameters of both; empty where nothing is trained.
    """

    keys: str
    values: str
    digest: str = ""

    def __str__(self) -> str:
        """Returns the name as it is written."""
        names = self.keys if self.keys == self.values else f"{self.keys}/{self.values}"
        return f"{names}@{self.digest}" if self.digest else names


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorCodecName:
    """The name of a codec of keys or of values, taken apart.

    Attributes:
        mapped: whether vectors are mapped before.
        family: ``none``, ``int8``, ``turbo``, ``lloyd``, ``PRQ`` or ``OPQ``.
        numbers: the numbers in the name, in their order.
        inner_name: the name without that of the map.
    """

    mapped: bool
    family: str
    numbers: tuple[int, ...]
    inner_name: str


@functools.cache
def parse_vector_codec(name: str) -> VectorCodecName:
    """Takes the name of a codec of keys or of values apart, without digest.

    Raises:
        InputError: no such codec.
    """
    plain = name.removeprefix(MAPPED)
    for family, pattern in _FAMILIES.items():
        match = pattern.fullmatch(plain)
        if match and name != MAPPED + NONE:
            numbers = tuple(map(int, match.groups()))
            return VectorCodecName(mapped=plain != name, family=family, numbers=numbers, inner_name=plain)
    raise InputError(f"there is no codec {name!r}; there are for instance {EXAMPLES}")


def is_trained(name: str) -> bool:
    """Tells whether a codec of keys or values, such as ``PRQ2x7x8``, needs trained parameters.

    Raises:
        InputError: no such codec.
    """
    parsed = parse_vector_codec(name)
    return parsed.mapped or parsed.family not in _UNTRAINED


@functools.cache
def parse_codec(text: str) -> CodecName:
    """Takes a codec's name apart; one that is to be trained may still lack its digest.

    Raises:
        InputError: no such codec.
    """
    names, _, digest = text.partition("@")
    keys, _, values = names.partition("/")
    parsed = CodecName(keys=keys, values=values or keys, digest=digest)
    for name in (parsed.keys, parsed.values):
        parse_vector_codec(name)
    if str(parsed) != text or (digest and not _DIGEST.fullmatch(digest)):
        raise InputError(f"the codec {text!r} is not written as {str(parsed)!r}, with 32 hex digits after any @")
    if digest and not (is_trained(parsed.keys) or is_trained(parsed.values)):
        raise InputError(f"the codec {text!r} has parameters, but nothing in it is trained")
    return parsed


@functools.cache
def count_code_bytes(name: str, head_dim: int, item_bytes: int) -> int:
    """Returns the bytes of one stored vector.

    Args:
        name: a codec of keys or values, without digest.
        head_dim: size of a vector.
        item_bytes: bytes of a number that is stored as it is.

    Raises:
        InputError: no such codec, or not for vectors of this size.
    """
    if name == NONE:
        return head_dim * item_bytes
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise InputError(f"the codec {name!r} is for vectors of 1..{MAX_HEAD_DIM} numbers, not {head_dim}")
    num_bytes = _count_coded(name, head_dim)
    if num_bytes > 4 * head_dim + SCALE_BYTES:
        raise InputError(f"the codec {name!r} takes {num_bytes} bytes for vectors of {head_dim}, more than they have")
    return num_bytes


def _count_coded(name: str, head_dim: int) -> int:
    parsed = parse_vector_codec(name)
    numbers = parsed.numbers
    match parsed.family:
        case "int8":
            return head_dim + SCALE_BYTES
        case "turbo":
            return -(-head_dim * numbers[0] // 8) + SCALE_BYTES
        case "lloyd":
            if head_dim % 2 or not 1 <= numbers[0] <= head_dim * MOST_BITS // 8:
                most = head_dim * MOST_BITS // 8
                raise InputError(f"the codec {name!r} must have 1..{most} bytes a vector, of an even size")
            return numbers[0]
        case "PRQ":
            splits, stages, bits = numbers
            _check_parts(name, head_dim, splits, stages, [bits])
            return -(-splits * stages * bits // 8)
        case _:
            rotated_splits, rotated_dim, stages, stage_bits, splits, bits = numbers
            if rotated_dim != head_dim:
                raise InputError(f"the codec {name!r} is for vectors of {rotated_dim}, the model has {head_dim}")
            _check_parts(name, head_dim, rotated_splits, stages, [stage_bits, bits])
            _check_parts(name, head_dim, splits, stages, [stage_bits, bits])
            return -(-(stages * stage_bits + splits * bits) // 8)


def _check_parts(name: str, head_dim: int, splits: int, stages: int, bits: list[int]) -> None:
    if stages < 1:
        raise InputError(f"the codec {name!r} has no stage, must have at least 1")
    if splits < 1 or head_dim % splits:
        raise InputError(f"the codec {name!r} cuts vectors in {splits} parts, which does not divide {head_dim}")
    for number in bits:
        if not 1 <= number <= 16:
            raise InputError(f"the codec {name!r} has codes of {number} bits, must be 1..16")
