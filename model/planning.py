"""What a memory costs, before anything is built: compute, break-even uses and storage, by arithmetic alone.

Stands outside the data flow: a person asks it which format knowledge should have and how large a bank will be. The
formulas are those of the paper (method sections 1, 2, 4 and 5); they count a multiply-add as two FLOPs and leave out
norms, softmax and rotary embedding. Where the paper writes d for the width of a layer's queries, the formulas here have
heads x head dimension, so that they also hold for models in which the two differ.

Symbols of the paper: L layers, H query heads, H_kv key-value heads, d_h head dimension, d hidden size, W width of the
MLP, n_vocab vocabulary, L_mem memory layers, l_ref, l_mem, l_chunk and l_train tokens of a reference, of a memory (kept
tokens a head), of a chunk and of a training sequence.
"""

import dataclasses
from typing import Any

from schemas.codec_names import NONE, is_trained, parse_codec
from schemas.errors import InputError
from schemas.identifiers import ID_LENGTH
from schemas.records import ITEM_SIZES_BYTES, RecordLayout

PAPER_NUM_REFERENCES = 112_000_000
"""References behind the paper's storage figures. It prints 1.1e8, but 7.17 PB, 7340 TB, 45.9 TB and 4.02 TB come out
together only for 1.12e8 references, and only with binary units (PB = 2**50 bytes, TB = 2**40 bytes)."""

PAPER_CODE_BYTES = 14
"""Bytes of one compressed key or value vector: two 14-bit coarse codes and eight 10-bit codes, 108 bits."""

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
"""Binary units, each 1024 of the one before, as in the paper's storage figures."""

NUM_READ_MEMORIES = 5
"""Memories a chunk reads."""

TERA = 10**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the costs depend on; symbols in the module's legend.

    Attributes:
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: H_kv.
        head_dim: d_h.
        hidden_size: d.
        mlp_size: W.
        vocab_size: n_vocab.
        memory_layers: indices of the L_mem layers that write and read memories, ascending.
        reference_tokens: l_ref.
        kept_tokens: l_mem.
        chunk_tokens: l_chunk.
        train_tokens: l_train.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    memory_layers: tuple[int, ...]
    reference_tokens: int = 128
    kept_tokens: int = 8
    chunk_tokens: int = 64
    train_tokens: int = 2048

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a size below 1, heads that do not divide into groups, layers that do not exist, or more tokens
                kept than a reference or a training sequence has.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "memory_layers" and value < 1:
                raise InputError(f"model shape: {field.name} is {value}, must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"model shape: num_heads is {self.num_heads}, must be a multiple of {self.num_kv_heads}")
        layers = self.memory_layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= self.num_layers:
            raise InputError(
                f"model shape: memory_layers is {list(layers)}, must be ascending within 0..{self.num_layers - 1}"
            )
        if self.kept_tokens > self.reference_tokens:
            raise InputError(f"model shape: kept_tokens is {self.kept_tokens}, must be at most {self.reference_tokens}")
        if self.train_tokens < self.reference_tokens:
            raise InputError(
                f"model shape: train_tokens is {self.train_tokens}, must be at least {self.reference_tokens}"
            )

    @property
    def num_memory_layers(self) -> int:
        """L_mem."""
        return len(self.memory_layers)

    @property
    def num_written_layers(self) -> int:
        """Layers a writer runs: up to the last memory layer; equal to L_mem in the paper's models."""
        return self.memory_layers[-1] + 1

    @property
    def query_size(self) -> int:
        """Width of a layer's queries, H * d_h; equal to d in the paper's models."""
        return self.num_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of the four attention projections of a layer."""
        return 2 * self.hidden_size * self.query_size + 2 * self.hidden_size * self.head_dim * self.num_kv_heads

    @property
    def mlp_weights(self) -> int:
        """Weights of the gated MLP of a layer."""
        return 3 * self.hidden_size * self.mlp_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs of one reference in each format; a format used n times costs its write plus n times its read.

    Attributes:
        write_parameters: learning it, once, by training.
        read_parameters: 0, a lower bound.
        write_memory: encoding it.
        read_memory: attending to it from one chunk.
        write_text: 0.
        read_text: encoding it in the context, and attending to it from one chunk.
    """

    write_parameters: int
    read_parameters: int
    write_memory: int
    read_memory: int
    write_text: int
    read_text: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageStep:
    """One step from dense key-values to compressed memories.

    Attributes:
        name: what is left out or compressed.
        reference_bytes: bytes of one reference after the step.
        total_bytes: bytes of all references after the step.
        factor: how many times smaller than the step before; 1 for the first.
    """

    name: str
    reference_bytes: int
    total_bytes: int
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One line of a plan; ``value`` is a whole number where it is exact, and None where there is none."""

    name: str
    value: int | float | None
    unit: str
    note: str


def paper_shape() -> ModelShape:
    """Returns the shape of the paper's 2.4B model (method section 2)."""
    return ModelShape(
        num_layers=44,
        num_heads=40,
        num_kv_heads=8,
        head_dim=80,
        hidden_size=3200,
        mlp_size=3200,
        vocab_size=60416,
        memory_layers=tuple(range(22)),
    )


def shape_from_config(config: Any) -> ModelShape:
    """Returns the shape of a transformers configuration, with the paper's lengths of references and chunks.

    Memory layers are those the configuration names, else the first half.

    Args:
        config: any object with transformers' names (``num_hidden_layers``, ``hidden_size`` ...).

    Raises:
        InputError: a size is missing or is not possible.
    """
    try:
        num_layers, num_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
        hidden_size, mlp_size = int(config.hidden_size), int(config.intermediate_size)
        vocab_size = int(config.vocab_size)
    except (AttributeError, TypeError) as error:
        raise InputError(f"the configuration is not of a decoder: {error}; give a causal language model") from error
    listed = getattr(config, "memory_layers", None)
    if listed is None:
        listed = range(getattr(config, "num_memory_layers", None) or max(1, num_layers // 2))
    return ModelShape(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden_size // max(1, num_heads)),
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        vocab_size=vocab_size,
        memory_layers=tuple(sorted({int(layer) for layer in listed})),
        kept_tokens=int((getattr(config, "memory_selection", None) or {}).get("num_slots", ModelShape.kept_tokens)),
    )


def count_parameters(shape: ModelShape) -> int:
    """Returns the parameters outside the input and output embeddings: projections and norms of a Llama decoder."""
    norms = 2 * shape.hidden_size
    return shape.num_layers * (shape.attention_weights + shape.mlp_weights + norms) + shape.hidden_size


def compute_costs(shape: ModelShape) -> Costs:
    """Returns what one reference costs in each format (method section 1), in FLOPs.

    A token attends on average to half of its sequence. Training counts three times a forward pass.
    """
    length, queries = shape.reference_tokens, shape.query_size
    projections = length * shape.attention_weights
    mlp = length * shape.mlp_weights
    output = length * shape.vocab_size * shape.hidden_size
    # Scores and weighted values of l_ref tokens that see on average half of a sequence: 2 * l_ref * (length / 2).
    within_training = length * shape.train_tokens * queries
    within_reference = length * length * queries
    from_chunk = 2 * length * shape.chunk_tokens * queries
    selecting = length * length * queries
    layers, written = shape.num_layers, shape.num_written_layers
    return Costs(
        write_parameters=3 * 2 * (layers * (projections + mlp + within_training) + output),
        read_parameters=0,
        write_memory=2
        * (written * (projections + within_reference) + (written - 1) * mlp + shape.num_memory_layers * selecting),
        read_memory=2 * shape.num_memory_layers * 2 * shape.chunk_tokens * shape.kept_tokens * queries,
        write_text=0,
        read_text=2 * (layers * (projections + within_reference + from_chunk) + (layers - 1) * mlp),
    )


def find_break_even(costs: Costs) -> tuple[float, float]:
    """Returns the interval of uses in which explicit memory is the cheapest format.

    Below the first number text is cheaper, above the second parameters are. If the first is the larger one, memory is
    never the cheapest.
    """
    from_text = (costs.write_memory - costs.write_text) / (costs.read_text - costs.read_memory)
    to_parameters = (costs.write_parameters - costs.write_memory) / (costs.read_memory - costs.read_parameters)
    return from_text, to_parameters


def compute_read_overhead(
    shape: ModelShape, *, num_memories: int = NUM_READ_MEMORIES, num_visible_tokens: int = 128
) -> float:
    """Returns the share of compute that reading adds to a chunk's forward pass.

    With 128 visible tokens, the average in the paper's throughput runs, and the output embedding left out, its model
    gets the 0.228 % of method section 8.
    """
    weights = shape.num_layers * (shape.attention_weights + shape.mlp_weights)
    attention = shape.num_layers * 2 * num_visible_tokens * shape.query_size
    return num_memories * compute_costs(shape).read_memory / (2 * shape.chunk_tokens * (weights + attention))


def make_record_layout(shape: ModelShape, *, dtype: str = "bfloat16", codec: str = NONE) -> RecordLayout:
    """Returns the layout of the model's memories; a codec that is trained may be named without a digest.

    Raises:
        InputError: an unknown dtype or codec.
    """
    parsed = parse_codec(codec)
    if not parsed.digest and (is_trained(parsed.keys) or is_trained(parsed.values)):
        codec = str(dataclasses.replace(parsed, digest="0" * ID_LENGTH))  # any parameters take as many bytes
    return RecordLayout(
        num_layers=shape.num_memory_layers,
        num_kv_heads=shape.num_kv_heads,
        num_slots=shape.kept_tokens,
        head_dim=shape.head_dim,
        dtype=dtype,
        codec=codec,
    )


def compute_storage(
    shape: ModelShape,
    *,
    num_references: int = PAPER_NUM_REFERENCES,
    dtype: str = "bfloat16",
    code_bytes: float = PAPER_CODE_BYTES,
) -> list[StorageStep]:
    """Returns the steps from dense multi-head key-values to compressed memories (method section 5), key-values only.

    Args:
        shape: the model.
        num_references: references in the bank.
        dtype: type of an uncompressed vector.
        code_bytes: bytes of a compressed vector, the mean of keys and values.

    Raises:
        InputError: no references, an unknown dtype, or codes larger than the vectors.
    """
    if num_references < 1:
        raise InputError(f"num_references is {num_references}, must be at least 1")
    if dtype not in ITEM_SIZES_BYTES:
        raise InputError(f"dtype is {dtype!r}, must be one of {', '.join(sorted(ITEM_SIZES_BYTES))}")
    vector_bytes = shape.head_dim * ITEM_SIZES_BYTES[dtype]
    if not 1 <= code_bytes <= vector_bytes:
        raise InputError(f"code_bytes is {code_bytes}, must be 1..{vector_bytes}, the size of a {dtype} vector")
    layers, kept = shape.num_memory_layers, shape.kept_tokens
    sizes = {
        "dense multi-head": (shape.num_layers, shape.num_heads, shape.reference_tokens, vector_bytes),
        "memory layers only": (layers, shape.num_heads, shape.reference_tokens, vector_bytes),
        "key-value heads only": (layers, shape.num_kv_heads, shape.reference_tokens, vector_bytes),
        "kept tokens only": (layers, shape.num_kv_heads, kept, vector_bytes),
        "compressed vectors": (layers, shape.num_kv_heads, kept, code_bytes),
    }
    steps: list[StorageStep] = []
    for name, (num_layers, num_heads, num_tokens, size_bytes) in sizes.items():
        reference_bytes = int(num_layers * 2 * num_heads * num_tokens * size_bytes)
        factor = steps[-1].reference_bytes / reference_bytes if steps else 1.0
        total_bytes = num_references * reference_bytes
        steps.append(StorageStep(name=name, reference_bytes=reference_bytes, total_bytes=total_bytes, factor=factor))
    return steps


def describe_plan(
    shape: ModelShape,
    *,
    num_references: int = PAPER_NUM_REFERENCES,
    dtype: str = "bfloat16",
    code_bytes: float = PAPER_CODE_BYTES,
    codec: str | None = None,
) -> list[PlanRow]:
    """Returns the plan of a bank line by line, for a person or as JSON.

    Args:
        shape: as for :func:`compute_storage`.
        num_references: as there.
        dtype: as there.
        code_bytes: as there, where no codec is named.
        codec: the codec of the bank, which then says what a vector takes; None for vectors stored as they are, with
            the compressed size beside them.

    Raises:
        InputError: as :func:`compute_storage`, or no such codec.
    """
    costs = compute_costs(shape)
    from_text, to_parameters = find_break_even(costs)
    layout = make_record_layout(shape, dtype=dtype, codec=codec or NONE)
    if codec is not None:
        code_bytes = (layout.key_bytes + layout.value_bytes) / 2
    steps = compute_storage(shape, num_references=num_references, dtype=dtype, code_bytes=code_bytes)
    kept, length, chunk = shape.kept_tokens, shape.reference_tokens, shape.chunk_tokens
    shown = " x ".join(map(str, layout.payload_shape))
    rows = [
        ("parameters outside the embeddings", count_parameters(shape), "", f"{shape.num_layers} layers"),
        ("parameters: write", costs.write_parameters / TERA, "TFLOPs", f"one training step over {length} tokens"),
        ("parameters: read", costs.read_parameters / TERA, "TFLOPs", "a lower bound"),
        ("explicit memory: write", costs.write_memory / TERA, "TFLOPs", f"{shape.num_written_layers} layers, once"),
        ("explicit memory: read", costs.read_memory / TERA, "TFLOPs", f"a use, by a chunk of {chunk} tokens"),
        ("text: write", costs.write_text / TERA, "TFLOPs", "nothing to prepare"),
        ("text: read", costs.read_text / TERA, "TFLOPs", f"a use, {length} tokens more in the context"),
        ("memory pays from", from_text, "uses", "below, text is cheaper"),
        ("memory pays up to", to_parameters, "uses", "above, parameters are cheaper"),
        ("reading adds", 100 * compute_read_overhead(shape), "%", f"of compute, {NUM_READ_MEMORIES} memories a chunk"),
        (
            "one memory",
            layout.payload_bytes,
            "B",
            f"layers x 2 x heads x tokens x dimension = {shown}, {codec or dtype}",
        ),
        ("one memory on disk", layout.stride_bytes, "B", "with the places of the kept tokens, padded"),
    ]
    value, unit = scale_bytes(num_references * layout.stride_bytes)
    rows.append(("memories of the bank", value, unit, f"on disk, {num_references:.4g} references"))
    counted = f"{num_references:.4g} references; TB = 2**40, PB = 2**50 bytes"
    for step in steps:
        value, unit = scale_bytes(step.total_bytes)
        note = counted if step is steps[0] else f"{step.factor:.3g}x less"
        rows.append((f"storage: {step.name}", value, unit, note))
    rows.append(
        (
            "storage: sparse",
            steps[0].reference_bytes / steps[3].reference_bytes,
            "x less",
            f"{kept} of {length} tokens, memory layers, KV heads",
        )
    )
    rows.append(
        (
            "storage: in all",
            steps[0].reference_bytes / steps[-1].reference_bytes,
            "x less",
            f"{code_bytes:g} bytes a vector",
        )
    )
    return [PlanRow(name=name, value=value, unit=unit, note=note) for name, value, unit, note in rows]


def scale_bytes(size_bytes: int) -> tuple[float, str]:
    """Returns a size in the largest binary unit in which it is at least 1."""
    power = min(max(0, size_bytes.bit_length() - 1) // 10, len(BYTE_UNITS) - 1)
    return size_bytes / 1024**power, BYTE_UNITS[power]
