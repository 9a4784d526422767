"""Supervised fine-tuning: exchanges drawn in a fixed order, with the memories that generation would read.

Where it stands: exchanges with their references (:mod:`model.training.exchanges`) -> **batches of a step** -> the loop.
The references are written in the same step with gradient (:class:`model.training.objective.LanguageObjective`), or
taken from a bank as they are (:class:`BankObjective`).

Everything about a step follows from the seed and from its number: the order of an epoch from the seed and the epoch,
and what is changed about an exchange from the seed and from how many were drawn before it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.reading import MEMORIES_PER_CHUNK, read_sequences
from model.training.batches import TrainingBatch
from model.training.exchanges import ReadExchange, make_exchange_batch
from model.training.objective import LanguageObjective
from schemas.errors import InputError
from schemas.identifiers import hash_json, make_ref_id
from schemas.protocols import IntArray, LongArray

T = TypeVar("T")

_ORDER, _CHANGES = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How exchanges, or pairs of them, are dealt out to steps.

    Attributes:
        batch_size: how many make a step, those of all processes together.
        micro_batch_size: how many go through the model at a time.
        num_memories: the most references a chunk reads.
        shuffled: False draws them as they stand in the file, in every epoch.
        seed: seed of the order and of all changes.
    """

    batch_size: int = 32
    micro_batch_size: int = 8
    num_memories: int = MEMORIES_PER_CHUNK
    shuffled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number below 1.
        """
        for name in ("batch_size", "micro_batch_size", "num_memories"):
            if getattr(self, name) < 1:
                raise InputError(f"conversations: {name} is {getattr(self, name)}, must be at least 1")
        if self.seed < 0:
            raise InputError(f"conversations: seed is {self.seed}, must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationConfig(DrawConfig):
    """How exchanges are drawn and what is changed about them.

    Attributes:
        distractor_share: part of the references, those nearest to their chunk excepted, in whose place another one of
            the data stands.
        dropped_share: part of the references that are left out.
        unread_share: part of the exchanges that read nothing at all.
    """

    distractor_share: float = 0.0
    dropped_share: float = 0.0
    unread_share: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number below 1, or a share that is not between 0 and 1.
        """
        super().__post_init__()
        for name in ("distractor_share", "dropped_share", "unread_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"conversations: {name} is {getattr(self, name)}, must be 0 to 1")


def draw_positions(config: DrawConfig, step: int, rank: int, num_ranks: int) -> list[int]:
    """Returns which of all exchanges that were ever drawn, epochs one after the other, a process draws in a step.

    Raises:
        InputError: the batch cannot be dealt out evenly.
    """
    if config.batch_size % num_ranks:
        raise InputError(
            f"conversations: batch_size is {config.batch_size}, must be a multiple of the {num_ranks} processes"
        )
    return list(range(step * config.batch_size + rank, (step + 1) * config.batch_size, num_ranks))


class EpochOrder:
    """The order in which a number of things is drawn, epoch after epoch."""

    def __init__(self, num_rows: int, config: DrawConfig) -> None:
        """Takes the number of things.

        Raises:
            InputError: there are none.
        """
        if not num_rows:
            raise InputError("conversations: there is nothing to train on")
        self._num_rows, self._config = num_rows, config
        self._known: tuple[int, LongArray] = (-1, np.empty(0, np.int64))

    def get_row(self, position: int) -> int:
        """Returns which thing is drawn after ``position`` others."""
        epoch, place = divmod(position, self._num_rows)
        if not self._config.shuffled:
            return place
        if self._known[0] != epoch:
            generator = np.random.default_rng([self._config.seed, _ORDER, epoch])
            self._known = epoch, generator.permutation(self._num_rows)
        return int(self._known[1][place])


def split_micro_batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Returns rows in groups of at most ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def hash_exchanges(rows: Sequence[ReadExchange]) -> str:
    """Returns the id of exchanges and of what they read."""
    return hash_json(
        [[row.exchange.prompt_ids.tolist(), row.exchange.answer_ids.tolist(), row.ref_ids] for row in rows]
    )


class ConversationSource:
    """Batches of exchanges; a :class:`model.training.batches.BatchSource`."""

    def __init__(
        self,
        rows: Sequence[ReadExchange],
        references: Mapping[str, IntArray],
        config: ConversationConfig,
        *,
        unread_answer: IntArray | None = None,
    ) -> None:
        """Takes the exchanges.

        Args:
            rows: exchanges with the references that they read.
            references: the tokens of these; also what distractors are taken from.
            config: how to draw.
            unread_answer: what to answer where nothing is read (:meth:`ChatTemplate.encode_answer`); by default the
                same as elsewhere.

        Raises:
            InputError: there is no exchange.
        """
        self._rows, self._references, self._config = list(rows), references, config
        self._pool = sorted(references)
        self._unread_answer = unread_answer
        self._order = EpochOrder(len(self._rows), config)
        answer = None if unread_answer is None else unread_answer.tolist()
        self._id = hash_json([hash_exchanges(rows), dataclasses.asdict(config), answer])

    @property
    def source_id(self) -> str:
        """Id of the exchanges, of what they read and of how they are drawn."""
        return self._id

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        """Returns the micro-batches of a step, see :class:`model.training.batches.BatchSource`.

        Raises:
            InputError: the batch cannot be dealt out evenly.
        """
        rows = [self._draw_one(position) for position in draw_positions(self._config, step, rank, num_ranks)]
        return [
            make_exchange_batch(group, self._references, self._config.num_memories)
            for group in split_micro_batches(rows, self._config.micro_batch_size)
        ]

    def _draw_one(self, position: int) -> ReadExchange:
        config, row = self._config, self._rows[self._order.get_row(position)]
        generator = np.random.default_rng([config.seed, _CHANGES, position])
        if generator.random() < config.unread_share:
            exchange = row.exchange
            if self._unread_answer is not None:
                exchange = dataclasses.replace(exchange, answer_ids=self._unread_answer)
            return ReadExchange.without_references(exchange)
        changed = tuple(self._change(of_chunk, generator) for of_chunk in row.ref_ids)
        return ReadExchange(exchange=row.exchange, ref_ids=changed)

    def _change(self, ref_ids: tuple[str, ...], generator: np.random.Generator) -> tuple[str, ...]:
        is_distracting = generator.random(len(ref_ids)) < self._config.distractor_share
        is_dropped = generator.random(len(ref_ids)) < self._config.dropped_share
        drawn = generator.integers(0, max(1, len(self._pool)), len(ref_ids))
        chosen: list[str] = []
        for place, ref_id in enumerate(ref_ids):
            other = self._pool[drawn[place]]
            is_new = other not in ref_ids and other not in chosen
            if not is_dropped[place]:
                chosen.append(other if place and is_distracting[place] and is_new else ref_id)
        return tuple(chosen)


def freeze_writing(checkpoint: Checkpoint) -> None:
    """Excludes from training all that enters a memory, so that banks stay valid: all up to the last memory layer.

    An output head that shares its weights with the embeddings is frozen with them.
    """
    last = checkpoint.memory_layers[-1]
    for name, parameter in checkpoint.decoder.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parameter.requires_grad_(int(parts[1]) > last)
        elif parts[0] != "norm":
            parameter.requires_grad_(False)


class BankObjective(LanguageObjective):
    """The loss of a batch whose references are read as they stand in a bank, without gradient.

    The model must be the one that wrote the bank, and stay it: see :func:`freeze_writing`.
    """

    def __init__(self, memories: BankMemories) -> None:
        """Takes a bank's memories, opened for the model to train."""
        super().__init__(memories.checkpoint)
        self._memories = memories

    def read(self, batch: TrainingBatch) -> torch.Tensor:
        """Returns the last hidden states of a batch, (B, T, E).

        Raises:
            WrongModelError: training has changed what writes memories.
            BankFormatError: the bank has no memory of a reference.
        """
        if not batch.with_prefix or not batch.references:
            return super().read(batch)
        checkpoint = self.checkpoint
        ref_ids = [make_ref_id(tokens, checkpoint.tokenizer.tokenizer_id) for tokens in batch.references]
        fetched = self._memories.fetch(ref_ids)
        hidden, _ = read_sequences(checkpoint, batch.tokens_BT, fetched, batch.index_BCM, batch.chunk_of_token_BT)
        return hidden
