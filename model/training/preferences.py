"""Direct preference optimisation: pairs of answers, of which one is to become likelier than the other.

Where it stands: pairs in JSON Lines -> two exchanges each, with their references (:mod:`model.training.exchanges`) ->
batches -> :class:`PreferenceObjective` -> the loop. For a prompt, a chosen and a rejected answer the loss is

    -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))

with p the model that is trained and q the model it was at the start (Rafailov et al., arXiv 2305.18290; method
section 7). Both read the same references. What the start says of every answer is measured once, before anything has
changed, and kept in a file: no second model is held in memory, and a run that goes on uses the very same numbers.

Shape letters: P pairs, B = 2 x P sequences, T tokens, E size of the hidden states.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model.training.batches import IGNORED, TrainingBatch
from model.training.chat import ChatTemplate, Exchange
from model.training.conversations import DrawConfig, EpochOrder, draw_positions, hash_exchanges, split_micro_batches
from model.training.exchanges import ReadExchange, make_exchange_batch
from model.training.messages import ROLES, Message, RejectedRow, parse_content, parse_messages, read_rows
from model.training.objective import LanguageObjective
from schemas.atomic import replace_atomically
from schemas.errors import InputError
from schemas.identifiers import hash_json
from schemas.protocols import IntArray

BETA = 0.01
"""How much a log-ratio counts (method section 7)."""

START_TOLERANCE = 0.05
"""By how much, in nats and in parts, measurements of one model may differ, in another type or on another device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadPairs:
    """What a file of pairs holds: its rows are those kept and those rejected.

    Attributes:
        pairs: the chosen and the rejected exchange of each row that is kept; their prompts are equal.
        rejected: the other rows, with their reasons.
    """

    pairs: list[tuple[Exchange, Exchange]]
    rejected: list[RejectedRow]


def read_pairs(path: Path, chat: ChatTemplate, *, sequence_tokens: int) -> ReadPairs:
    """Reads pairs from JSON Lines.

    A row is ``{"prompt": ..., "chosen": ..., "rejected": ...}``, or has ``messages`` that end with a question in the
    place of ``prompt``.

    Args:
        path: the file.
        chat: the template of the model.
        sequence_tokens: a row with more tokens, in prompt and either answer, is rejected.

    Raises:
        InputError: the file cannot be read.
    """
    pairs, rejected = [], []
    for line, row in read_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            messages = parse_messages({name: row[name] for name in ("messages", "prompt") if name in row})
            if messages[-1].role != "user":
                raise InputError("the last message is no question")
            answers = [parse_content(row.get(name)) for name in ("chosen", "rejected")]
            if answers[0] == answers[1]:
                raise InputError("chosen and rejected are the same")
            chosen, other = (
                chat.make_exchange([*messages, Message(role=ROLES[-1], content=answer)]) for answer in answers
            )
            if max(chosen.num_tokens, other.num_tokens) > sequence_tokens:
                raise InputError(f"longer than {sequence_tokens} tokens")
        except InputError as error:
            rejected.append(RejectedRow(line=line, reason=str(error)))
            continue
        pairs.append((chosen, other))
    return ReadPairs(pairs=pairs, rejected=rejected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceBatch(TrainingBatch):
    """Pairs of answers: the chosen one of each in the even rows, the rejected one in the odd rows.

    Attributes:
        start_log_probs_B: the log-probability of each answer before training, in nats.
    """

    start_log_probs_B: torch.Tensor

    @property
    def num_targets(self) -> int:
        """Pairs."""
        return len(self.tokens_BT) // 2

    def to(self, device: torch.device) -> "PreferenceBatch":
        """Returns the batch on a device."""
        moved = super().to(device)
        assert isinstance(moved, PreferenceBatch)
        return dataclasses.replace(moved, start_log_probs_B=self.start_log_probs_B.to(device))


class PreferenceSource:
    """Batches of pairs; a :class:`model.training.batches.BatchSource`.

    Attributes:
        start_log_probs_P2: what the start says of the chosen and the rejected answer of each pair, float32.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[ReadExchange, ReadExchange]],
        references: Mapping[str, IntArray],
        config: DrawConfig,
    ) -> None:
        """Takes the pairs, whose log-probabilities are still to be measured (:func:`measure_start`).

        Args:
            pairs: the chosen and the rejected exchange of each, with the references that they read.
            references: the tokens of these.
            config: how to draw; sizes are numbers of pairs.

        Raises:
            InputError: there is no pair.
        """
        self._pairs, self._references, self._config = list(pairs), references, config
        self._order = EpochOrder(len(self._pairs), config)
        self._data_id = hash_exchanges([row for pair in pairs for row in pair])
        self.start_log_probs_P2: torch.Tensor | None = None

    @property
    def source_id(self) -> str:
        """Id of the pairs, of what they read and of how they are drawn."""
        return hash_json([self._data_id, dataclasses.asdict(self._config)])

    @property
    def data_id(self) -> str:
        """Id of the pairs and of what they read."""
        return self._data_id

    @property
    def num_pairs(self) -> int:
        """Pairs there are."""
        return len(self._pairs)

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        """Returns the micro-batches of a step, see :class:`model.training.batches.BatchSource`.

        Raises:
            InputError: the batch cannot be dealt out evenly.
            RuntimeError: the start was not measured.
        """
        rows = [self._order.get_row(position) for position in draw_positions(self._config, step, rank, num_ranks)]
        return [self.make_batch(group) for group in split_micro_batches(rows, self._config.micro_batch_size)]

    def make_batch(self, rows: Sequence[int]) -> PreferenceBatch:
        """Lays out some pairs.

        Raises:
            RuntimeError: the start was not measured.
        """
        if self.start_log_probs_P2 is None:
            raise RuntimeError("call measure_start() before pairs are drawn")
        plain = self.make_plain_batch(rows)
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return PreferenceBatch(**fields, start_log_probs_B=self.start_log_probs_P2[list(rows)].flatten())

    def make_plain_batch(self, rows: Sequence[int]) -> TrainingBatch:
        """Lays out the answers of some pairs, a row each."""
        exchanges = [exchange for row in rows for exchange in self._pairs[row]]
        return make_exchange_batch(exchanges, self._references, self._config.num_memories)


def sum_log_probs(hidden_BTE: torch.Tensor, targets_BT: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Returns the log-probability of all targets of each sequence together, (B,) float32, in nats."""
    counts_BT = targets_BT != IGNORED
    # Only answers are predicted: the logits of a prompt would be most of the memory that a step takes.
    log_probs = head(hidden_BTE[counts_BT]).float().log_softmax(-1)
    chosen = log_probs.gather(1, targets_BT[counts_BT][:, None])[:, 0]
    rows = counts_BT.nonzero()[:, 0]
    return torch.zeros(len(targets_BT), dtype=torch.float32, device=chosen.device).index_add(0, rows, chosen)


def sum_preference_losses(log_probs_B: torch.Tensor, start_log_probs_B: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the loss of the module's docstring summed over pairs, in nats; rows as in :class:`PreferenceBatch`."""
    ratios_P2 = (log_probs_B - start_log_probs_B).unflatten(0, (-1, 2))
    return -nn.functional.logsigmoid(beta * (ratios_P2[:, 0] - ratios_P2[:, 1])).sum()


class PreferenceObjective(nn.Module):
    """The loss of a batch of pairs.

    Attributes:
        reader: reads batches, with references written on the way or taken from a bank.
        beta: how much a log-ratio counts.
    """

    def __init__(self, reader: LanguageObjective, beta: float = BETA) -> None:
        """Takes what reads batches.

        Raises:
            InputError: ``beta`` is not greater than 0.
        """
        super().__init__()
        if not beta > 0:
            raise InputError(f"preferences: beta is {beta}, must be greater than 0")
        self.reader = reader
        self.beta = beta

    def forward(self, batch: PreferenceBatch) -> torch.Tensor:
        """Returns the loss summed over pairs, in nats."""
        hidden = self.reader.read(batch)
        log_probs = sum_log_probs(hidden, batch.targets_BT, self.reader.checkpoint.head)
        return sum_preference_losses(log_probs, batch.start_log_probs_B, self.beta)


@torch.no_grad()
def measure_start(
    source: PreferenceSource, objective: PreferenceObjective, file: Path, *, batch_size: int = 16
) -> None:
    """Measures what the model says of all answers before training, or reads the file where an earlier start did so.

    To be called with the weights that training begins with, also where a run goes on. Of a file that is there the first
    pairs are measured again, to see that it belongs to this model.

    Args:
        source: gets the numbers.
        objective: the model.
        file: where the numbers are kept, in the folder of the run.
        batch_size: pairs at a time.

    Raises:
        InputError: the file is damaged, of other pairs or of another model.
    """
    if file.exists():
        found = _load_start(file, source)
        again = _measure(source, objective, range(min(batch_size, source.num_pairs)))
        if not torch.allclose(found[: len(again)], again, rtol=START_TOLERANCE, atol=START_TOLERANCE):
            raise InputError(f"{file} was measured with another model; name another folder for this run")
        source.start_log_probs_P2 = found
        return
    starts = range(0, source.num_pairs, batch_size)
    measured = [
        _measure(source, objective, range(start, min(start + batch_size, source.num_pairs))) for start in starts
    ]
    source.start_log_probs_P2 = torch.cat(measured)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(file) as temporary:
        save_file({"log_probs": source.start_log_probs_P2}, temporary, metadata={"data_id": source.data_id})


def _measure(source: PreferenceSource, objective: PreferenceObjective, rows: Sequence[int]) -> torch.Tensor:
    checkpoint, was_training = objective.reader.checkpoint, objective.training
    objective.eval()
    batch = source.make_plain_batch(rows).to(checkpoint.device)
    log_probs = sum_log_probs(objective.reader.read(batch), batch.targets_BT, checkpoint.head)
    objective.train(was_training)
    pairs_P2: torch.Tensor = log_probs.cpu().unflatten(0, (-1, 2))
    return pairs_P2


def _load_start(file: Path, source: PreferenceSource) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            found: torch.Tensor = tensors.get_tensor("log_probs")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}; remove the run's folder to start anew") from error
    if metadata.get("data_id") != source.data_id or found.shape != (source.num_pairs, 2):
        raise InputError(f"{file} is of other pairs or other references; name another folder for this run")
    return found
