"""``memory3 plan --measure``: what a piece of knowledge costs on this machine in each format, in seconds.

The same question as the paper's arithmetic, asked of the machine: text, explicit memory or parameters, for a reference
that is used n times? Writing is timed; reading is what a chunk of 64 tokens takes longer with five references than with
none, divided by five, decoding and drive included. Parameters are a lower bound, as in the paper: three forward passes
over the reference in a training sequence to write it, and nothing to read it.

Shape letters: B sequences, T tokens, M memories a chunk.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from flows.bench_storage import measure_reading
from flows.benching import time_in_turn
from model.checkpoint import Checkpoint
from model.coding import KeyValueCodec
from model.planning import NUM_READ_MEMORIES, PlanRow, make_record_layout, shape_from_config
from model.reading import CHUNK_TOKENS, ReadingSession
from model.writing import Memories, ReferenceWriter, encode_references, pad_references

NUM_ROUNDS = 3
NUM_WRITTEN = 32
BATCH_SIZE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """Seconds of one reference in each format, and of one of its uses by a chunk; used n times it costs both sums.

    Attributes:
        write_parameters: learning it in one training step, at least.
        write_memory: encoding it.
        read_memory: loading and decoding its memory, and attending to it.
        read_text: encoding it in the context, and attending to it.
        load_memory: the part of ``read_memory`` that is loading and decoding.
    """

    write_parameters: float
    write_memory: float
    read_memory: float
    read_text: float
    load_memory: float

    def find_break_even(self) -> tuple[float, float]:
        """Returns from how many uses on memory beats text, and up to how many it beats parameters.

        The first is infinite if reading a memory takes no less than reading the text: then memory never pays.
        """
        saved = self.read_text - self.read_memory
        from_text = self.write_memory / saved if saved > 0 else float("inf")
        left = self.write_parameters - self.write_memory
        to_parameters = left / self.read_memory if self.read_memory > 0 else float("inf")
        return from_text, to_parameters


def measure_costs(writer: ReferenceWriter, codec: KeyValueCodec) -> MeasuredCosts:
    """Measures a model on the device it is on, on tokens drawn at random: only their number matters.

    Args:
        writer: the model.
        codec: what its memories are decoded from.
    """
    checkpoint = writer.checkpoint
    words, length = int(checkpoint.config.vocab_size), checkpoint.max_reference_tokens
    random = np.random.default_rng(0)
    references = [random.integers(3, words, length, dtype=np.int32) for _ in range(NUM_WRITTEN)]
    tokens_BT = torch.from_numpy(random.integers(3, words, (BATCH_SIZE, length))).to(checkpoint.device)

    @torch.inference_mode()
    def run_forward() -> None:
        checkpoint.head(checkpoint.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state)

    written = time_in_turn({"write": lambda: writer.write(references), "forward": run_forward}, NUM_ROUNDS)
    chunks = time_in_turn(_make_chunks(writer, references, tokens_BT[:, :CHUNK_TOKENS]), NUM_ROUNDS)
    per_use = {name: (value - chunks["none"]) / (BATCH_SIZE * NUM_READ_MEMORIES) for name, value in chunks.items()}
    layout = make_record_layout(shape_from_config(checkpoint.config), dtype=writer.layout.dtype)
    coded = dataclasses.replace(layout, codec=codec.name)
    loaded = measure_reading(coded, codec, checkpoint.device) / NUM_READ_MEMORIES
    return MeasuredCosts(
        write_parameters=3 * written["forward"] / BATCH_SIZE,
        write_memory=written["write"] / NUM_WRITTEN,
        read_memory=max(0.0, per_use["memory"]) + loaded,
        read_text=max(0.0, per_use["text"]),
        load_memory=loaded,
    )


def _make_chunks(
    writer: ReferenceWriter, references: list[np.ndarray], first_BT: torch.Tensor
) -> dict[str, Callable[[], None]]:
    """Returns works that each generate a chunk, for each sequence with five references in one format or another."""
    checkpoint, batch_size = writer.checkpoint, len(first_BT)
    used = references[:NUM_READ_MEMORIES]
    padded, valid = pad_references(used, checkpoint.device)
    with torch.inference_mode():
        memories = encode_references(checkpoint, padded, valid, writer.selection)
    index_BM = torch.arange(NUM_READ_MEMORIES, device=checkpoint.device).expand(batch_size, -1)
    text_BT = torch.cat((padded.flatten()[None].expand(batch_size, -1), first_BT[:, :1]), 1)

    def generate(start_BT: torch.Tensor, held: Memories | None) -> None:
        session = ReadingSession(
            checkpoint,
            batch_size=batch_size,
            with_prefix=held is not None,
            num_held_slots=NUM_READ_MEMORIES * writer.selection.num_slots,
            num_expected=start_BT.shape[1] + CHUNK_TOKENS,
        )
        logits = session.read(start_BT, last_only=True)[0][:, -1]
        if held is not None:
            session.hold(held, index_BM)
        for _ in range(CHUNK_TOKENS):
            logits = session.step(logits.argmax(-1))

    return {
        "none": lambda: generate(first_BT[:, :1], None),
        "memory": lambda: generate(first_BT[:, :1], memories),
        "text": lambda: generate(text_BT, None),
    }


def _limit(uses: float) -> float | None:
    """Returns a number of uses, None where there is none: JSON knows no infinity."""
    return uses if math.isfinite(uses) else None


def describe_measured(costs: MeasuredCosts, checkpoint: Checkpoint) -> list[PlanRow]:
    """Returns the measured costs line by line, with a verdict."""
    from_text, to_parameters = costs.find_break_even()
    where = f"on this machine, {checkpoint.device.type}, {torch.get_num_threads()} threads"
    rows = [
        ("measured: parameters: write", costs.write_parameters, f"three forward passes, a lower bound; {where}"),
        ("measured: explicit memory: write", costs.write_memory, "once"),
        ("measured: explicit memory: read", costs.read_memory, f"a use; {costs.load_memory:.2g} s of it to load"),
        ("measured: text: read", costs.read_text, "a use"),
    ]
    found = [PlanRow(name=name, value=value, unit="s", note=note) for name, value, note in rows]
    if from_text == float("inf"):
        verdict = "memory loses: reading a memory takes as long as reading the text"
    elif to_parameters <= from_text:
        verdict = "memory loses: parameters are cheaper as soon as text is not"
    else:
        verdict = "below, text is cheaper"
    return [
        *found,
        PlanRow(name="measured: memory pays from", value=_limit(from_text), unit="uses", note=verdict),
        PlanRow(name="measured: memory pays up to", value=_limit(to_parameters), unit="uses", note="then parameters"),
    ]
