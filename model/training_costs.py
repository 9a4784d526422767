"""What training costs, before it begins: FLOPs of both stages, GPU hours, and what is stored, by arithmetic alone.

Beside :mod:`model.planning`, with its shapes and symbols: a multiply-add counts as two FLOPs; norms, softmax, rotary
embedding and the optimizer are left out. The stages are those of method section 7. A backward pass costs twice its
forward pass, but for the choice of tokens, which has none.
"""

import dataclasses

from model.planning import (
    NUM_READ_MEMORIES,
    PAPER_NUM_REFERENCES,
    TERA,
    ModelShape,
    PlanRow,
    count_parameters,
    make_record_layout,
    scale_bytes,
)
from schemas.codec_names import NONE
from schemas.errors import InputError

TOKENS_PER_PARAMETER = 20
"""Tokens of warmup for each parameter outside the embeddings where nobody says how many: what uses a given amount of
compute best for a model trained once (Hoffmann et al. 2022). Models that are much used are trained on more."""

CONTINUAL_SHARE = 0.1
"""Tokens of continual training for each token of warmup where nobody says how many."""

STATE_BYTES = 12
"""Bytes of a parameter in a run's checkpoint: the weight and both means of AdamW in float32."""

TRAINED_BYTES = STATE_BYTES + 4
"""Bytes of a parameter while it is trained: its gradient too."""

TOKEN_BYTES = 4

SECONDS_PER_HOUR = 3600

EXA = 10**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How much is trained, and on what.

    Attributes:
        warmup_tokens: tokens read in warmup; None for :data:`TOKENS_PER_PARAMETER`.
        continual_tokens: tokens read in continual training; None for :data:`CONTINUAL_SHARE` of warmup.
        batch_tokens: tokens of an optimizer step; the paper's four millions.
        num_memories: memories that a chunk reads.
        prefix_tokens: tokens of the modified BOS before contexts and references.
        num_kept: checkpoints of a run that are kept.
        gpu_tflops: TFLOPs a second that a GPU has; 990 are those of an H100 or H200 in bfloat16.
        utilisation: share of them that training gets.
        tied_embeddings: whether the output head is the embedding.
    """

    warmup_tokens: int | None = None
    continual_tokens: int | None = None
    batch_tokens: int = 4_000_000
    num_memories: int = NUM_READ_MEMORIES
    prefix_tokens: int = 3
    num_kept: int = 2
    gpu_tflops: float = 990.0
    utilisation: float = 0.4
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number is out of bounds.
        """
        for name, least in (
            ("warmup_tokens", 1),
            ("continual_tokens", 0),
            ("batch_tokens", 1),
            ("num_memories", 1),
            ("prefix_tokens", 0),
            ("num_kept", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"training plan: {name} is {value}, must be at least {least}")
        if not self.gpu_tflops > 0:
            raise InputError(f"training plan: gpu_tflops is {self.gpu_tflops}, must be greater than 0")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"training plan: utilisation is {self.utilisation}, must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceCosts:
    """FLOPs of forward and backward of one sequence, by what they are for.

    Attributes:
        matrices: projections and MLPs of the context.
        attention: attention of the context to itself.
        head: the output head.
        references: writing the references, one a chunk; 0 in warmup.
        choosing: choosing the tokens that memories keep, forward only; 0 in warmup.
        reading: attention to memories; 0 in warmup.
    """

    matrices: int
    attention: int
    head: int
    references: int
    choosing: int
    reading: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def compute_sequence_costs(
    shape: ModelShape,
    *,
    with_memory: bool,
    num_memories: int = NUM_READ_MEMORIES,
    prefix_tokens: int = 3,
    skips_future: bool = True,
) -> SequenceCosts:
    """Returns what a sequence of ``shape.train_tokens`` costs in warmup or in continual training.

    In continual training each chunk brings a reference of full length, which passes the layers up to the last memory
    layer, of that only the projections to queries, keys and values. The former take no gradient.

    Args:
        shape: the model.
        with_memory: True for continual training.
        num_memories: memories that a chunk reads.
        prefix_tokens: tokens before contexts and references, in continual training.
        skips_future: True counts of attention what a token can see; False all products of a sequence's tokens, which
            simple kernels compute and throw away.
    """
    visible = 0.5 if skips_future else 1.0
    weights = shape.attention_weights + shape.mlp_weights
    queries = shape.query_size
    length = shape.train_tokens + (prefix_tokens if with_memory else 0)
    context = {
        "matrices": 6 * shape.num_layers * length * weights,
        "attention": int(6 * shape.num_layers * 2 * visible * length**2 * queries),
        "head": 6 * shape.train_tokens * shape.vocab_size * shape.hidden_size,
    }
    if not with_memory:
        return SequenceCosts(**context, references=0, choosing=0, reading=0)
    num_references = -(-shape.train_tokens // shape.chunk_tokens)
    reference, layers = shape.reference_tokens + prefix_tokens, shape.num_written_layers - 1
    to_queries = shape.hidden_size * queries
    to_keys_and_values = shape.attention_weights - 2 * to_queries
    per_reference = 6 * (layers * (reference * weights + 2 * visible * reference**2 * queries))
    per_reference += 6 * reference * to_keys_and_values + 2 * reference * to_queries
    return SequenceCosts(
        **context,
        references=int(num_references * per_reference),
        choosing=num_references * 2 * shape.num_memory_layers * shape.reference_tokens**2 * queries,
        reading=6 * shape.num_memory_layers * 2 * shape.train_tokens * num_memories * shape.kept_tokens * queries,
    )


def count_all_parameters(shape: ModelShape, *, tied_embeddings: bool = False) -> int:
    """Returns the parameters of a Llama decoder, embeddings included."""
    return count_parameters(shape) + (1 if tied_embeddings else 2) * shape.vocab_size * shape.hidden_size


def describe_training(
    shape: ModelShape,
    plan: TrainingPlan,
    *,
    num_references: int = PAPER_NUM_REFERENCES,
    dtype: str = "bfloat16",
    codec: str | None = None,
) -> list[PlanRow]:
    """Returns the plan of a training line by line, for a person or as JSON.

    Args:
        shape: the model.
        plan: how much is trained, and on what.
        num_references: references in the bank.
        dtype: type of an uncompressed vector of the bank.
        codec: codec of the bank; None for vectors as they are.

    Raises:
        InputError: no references, an unknown dtype or codec.
    """
    if num_references < 1:
        raise InputError(f"num_references is {num_references}, must be at least 1")
    outside = count_parameters(shape)
    everything = count_all_parameters(shape, tied_embeddings=plan.tied_embeddings)
    warmup_tokens = TOKENS_PER_PARAMETER * outside if plan.warmup_tokens is None else plan.warmup_tokens
    continual_tokens = plan.continual_tokens
    if continual_tokens is None:
        continual_tokens = round(CONTINUAL_SHARE * warmup_tokens)
    warmup, continual = (
        compute_sequence_costs(
            shape, with_memory=with_memory, num_memories=plan.num_memories, prefix_tokens=plan.prefix_tokens
        )
        for with_memory in (False, True)
    )
    sequences = plan.batch_tokens / shape.train_tokens
    flops = [
        tokens / shape.train_tokens * costs.total
        for tokens, costs in ((warmup_tokens, warmup), (continual_tokens, continual))
    ]
    per_hour = plan.gpu_tflops * TERA * plan.utilisation * SECONDS_PER_HOUR
    assumed = f"{TOKENS_PER_PARAMETER} a parameter, assumed" if plan.warmup_tokens is None else "as given"
    share = f"{CONTINUAL_SHARE:g} of warmup, assumed" if plan.continual_tokens is None else "as given"
    speed = f"{plan.gpu_tflops:g} TFLOPs a second, {plan.utilisation:.0%} of them used"
    layout = make_record_layout(shape, dtype=dtype, codec=codec or NONE)
    rows: list[tuple[str, int | float, str, str]] = [
        ("parameters", everything, "", f"{outside:,} outside the embeddings"),
        ("warmup: tokens", warmup_tokens, "", assumed),
        ("continual: tokens", continual_tokens, "", share),
        ("warmup: steps", -(-warmup_tokens // plan.batch_tokens), "", f"of {plan.batch_tokens:,} tokens"),
        ("continual: steps", -(-continual_tokens // plan.batch_tokens), "", f"of {plan.batch_tokens:,} tokens"),
        ("warmup: one step", sequences * warmup.total / TERA, "TFLOPs", "forward and backward"),
        ("continual: one step", sequences * continual.total / TERA, "TFLOPs", "references written in the step"),
        (
            "continual: against warmup",
            continual.total / warmup.total,
            "x",
            "FLOPs of a step; the paper: a bit more than 2",
        ),
        ("continual: writing", 100 * continual.references / continual.total, "%", "of its FLOPs"),
        ("continual: choosing tokens", 100 * continual.choosing / continual.total, "%", "of its FLOPs"),
        ("continual: reading", 100 * continual.reading / continual.total, "%", "of its FLOPs"),
        ("warmup: in all", flops[0] / EXA, "EFLOPs", "10**18 FLOPs"),
        ("continual: in all", flops[1] / EXA, "EFLOPs", ""),
        ("warmup: time", flops[0] / per_hour, "GPU hours", speed),
        ("continual: time", flops[1] / per_hour, "GPU hours", speed),
    ]
    tokens, reference = warmup_tokens + continual_tokens, shape.reference_tokens * TOKEN_BYTES
    for name, size_bytes, note in (
        ("memory of the GPUs", TRAINED_BYTES * everything, "weights, gradients, AdamW in float32; activations not"),
        ("storage: checkpoints", plan.num_kept * STATE_BYTES * everything, f"{plan.num_kept} kept, with AdamW"),
        ("storage: the model", 2 * everything, "in bfloat16"),
        ("storage: training tokens", TOKEN_BYTES * tokens, f"{TOKEN_BYTES} bytes a token"),
        ("storage: references", reference * num_references, f"{num_references:.4g} of them as tokens"),
        ("storage: bank", layout.stride_bytes * num_references, f"{codec or dtype}, memories alone"),
    ):
        value, unit = scale_bytes(size_bytes)
        rows.append((name, value, unit, note))
    return [PlanRow(name=name, value=value, unit=unit, note=note) for name, value, unit, note in rows]
