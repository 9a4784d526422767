"""``memory3 codec list``: which codecs there are, and the bytes they take; nothing is loaded for that."""

import dataclasses

from schemas.codec_names import MAPPED, NONE, count_code_bytes, is_trained, parse_codec
from schemas.errors import InputError
from schemas.records import ITEM_SIZES_BYTES, RecordLayout


def make_paper_layout(head_dim: int) -> RecordLayout:
    """Returns the shape of the memories of the paper's 2.4B model, with vectors of a size.

    Raises:
        InputError: the size is below 1.
    """
    return RecordLayout(num_layers=22, num_kv_heads=8, num_slots=8, head_dim=head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedCodec:
    """A codec, and what it takes.

    Attributes:
        name: its name.
        trained: whether it has to be trained.
        key_bytes: bytes of a key.
        value_bytes: bytes of a value.
        memory_bytes: bytes of the key-values of one reference.
        factor: how many times as many bytes they have as they are.
    """

    name: str
    trained: bool
    key_bytes: int
    value_bytes: int
    memory_bytes: int
    factor: float


def describe_codecs(layout: RecordLayout) -> list[ListedCodec]:
    """Returns the codecs there are for memories of a shape, those of the most bytes first.

    Families of codecs are shown by some of their members.
    """
    head_dim = layout.head_dim
    names = [
        *(NONE, "int8", "turbo4", "turbo4/turbo3", "turbo3", "turbo2", "turbo1"),
        *(f"{prefix}PRQ2x7x8" for prefix in ("", MAPPED)),
        *(f"{prefix}lloyd{head_dim * bits // 8}" for bits in (4, 2) for prefix in ("", MAPPED)),
        f"OPQ{head_dim // 4}x{head_dim}-Residual2x14-PQ8x10",
    ]
    num_vectors = layout.num_offsets
    plain_bytes = 2 * num_vectors * head_dim * ITEM_SIZES_BYTES[layout.dtype]
    found = []
    for name in names:
        parsed = parse_codec(name)
        try:
            sizes = [
                count_code_bytes(part, head_dim, ITEM_SIZES_BYTES[layout.dtype])
                for part in (parsed.keys, parsed.values)
            ]
        except InputError:  # not for vectors of this size
            continue
        found.append(
            ListedCodec(
                name=name,
                trained=is_trained(parsed.keys) or is_trained(parsed.values),
                key_bytes=sizes[0],
                value_bytes=sizes[1],
                memory_bytes=num_vectors * sum(sizes),
                factor=round(plain_bytes / (num_vectors * sum(sizes)), 2),
            )
        )
    return sorted(found, key=lambda codec: -codec.memory_bytes)
