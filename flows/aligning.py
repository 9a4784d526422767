"""``memory3 train sft`` and ``dpo``: a model learns to answer with what its bank says.

    conversations or pairs (JSON lines) + bank -> exchanges with what they read -> run folder, RUN/model

What a prompt reads is looked up once, with the bank's own index, as generation will. The references are written in the
same step with gradient, or read as they stand in the bank; then nothing that writes memories is trained.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.progress import show_stage
from flows.searching import open_retriever
from flows.training import MODEL_FOLDER, is_first_process, run_loop
from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.selecting import SelectionConfig, find_selection, record_selection
from model.training.chat import ChatTemplate, load_chat_template, read_exchanges, stop_at_answers
from model.training.conversations import BankObjective, ConversationConfig, ConversationSource, freeze_writing
from model.training.exchanges import load_references, retrieve_references
from model.training.loop import LoopConfig, TrainingSummary
from model.training.messages import RejectedRow
from model.training.objective import LanguageObjective
from model.training.optimizing import OptimizerConfig
from model.training.preferences import BETA, PreferenceObjective, PreferenceSource, measure_start, read_pairs
from model.training.schedule import ScheduleConfig
from model.training.starting import check_length, check_saved_dtype, save_model, start_model
from model.writing import ReferenceWriter
from schemas.bank import Bank
from schemas.errors import InputError, WrongModelError

WRITTEN, STORED = "written", "bank"
"""Where memories come from: references written in the same step, or the memories of a bank."""

START_FILE = "start.safetensors"
"""In the folder of a DPO run: what the model said of all answers before training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Settings of SFT and DPO; rates and schedule of method section 7.

    Attributes:
        loop: steps, optimizer, schedule, checkpoints.
        draw: how exchanges are drawn and what is changed about them; DPO changes nothing.
        num_slots: tokens of a reference that written memories keep at each KV head; None, as for the two below, for
            what the model was trained with before. The trained model says so, and is read with the same.
        score: how they are chosen, see :class:`model.selecting.SelectionConfig`.
        refit: whether their values are fitted.
        memories: ``written`` in the same step with gradient, or those of the ``bank``.
        sequence_tokens: longest prompt with its answer.
        beta: how much a log-ratio counts, for DPO.
        saved_dtype: the type the trained weights are stored in.
    """

    loop: LoopConfig
    draw: ConversationConfig = dataclasses.field(default_factory=ConversationConfig)
    num_slots: int | None = None
    score: str | None = None
    refit: bool | None = None
    memories: str = WRITTEN
    sequence_tokens: int = 512
    beta: float = BETA
    saved_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: memories from elsewhere, or of a bank for a sharded model, another type, no room for an
                exchange, or a beta that is not positive.
        """
        check_saved_dtype(self.saved_dtype)
        if self.memories not in (WRITTEN, STORED):
            raise InputError(f"alignment: memories is {self.memories!r}, must be {WRITTEN} or {STORED}")
        if self.memories == STORED and self.loop.sharded:
            # Nobody could tell whether the bank is this model's: no process has all weights that a fingerprint is of.
            raise InputError(f"alignment: memories is {STORED!r}, must be {WRITTEN} where the loop is sharded")
        if self.sequence_tokens < 2:
            raise InputError(f"alignment: sequence_tokens is {self.sequence_tokens}, must be at least 2")
        if not self.beta > 0:
            raise InputError(f"alignment: beta is {self.beta}, must be greater than 0")


def make_sft_config(num_steps: int) -> AlignmentConfig:
    """Supervised fine-tuning with the paper's rate and schedule."""
    return AlignmentConfig(loop=_make_loop(num_steps, 5e-5))


def make_dpo_config(num_steps: int) -> AlignmentConfig:
    """Direct preference optimisation with the paper's rate and schedule."""
    return AlignmentConfig(loop=_make_loop(num_steps, 4e-6))


def _make_loop(num_steps: int, rate: float) -> LoopConfig:
    schedule = ScheduleConfig(shape="cosine", warmup_share=0.1)
    return LoopConfig(num_steps=num_steps, optimizer=OptimizerConfig(learning_rate=rate), schedule=schedule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentResult:
    """What SFT or DPO came to.

    Attributes:
        summary: of the loop.
        folder: the run's folder.
        model: the folder of the trained checkpoint.
        num_read: rows read.
        num_kept: rows trained on.
        rejects: how many of the others there were, by reason.
    """

    summary: TrainingSummary
    folder: str
    model: str
    num_read: int
    num_kept: int
    rejects: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {**dataclasses.asdict(self.summary), **{k: v for k, v in vars(self).items() if k != "summary"}}


def _open_model(
    model: str, bank: Bank | None, config: AlignmentConfig
) -> tuple[Checkpoint, LanguageObjective, AlignmentConfig]:
    """Returns a model to train, what reads its batches, and the settings with the selection that is in force.

    Raises:
        InputError: memories of a bank are wanted but there is none, or the model cannot be loaded.
        WrongModelError: the bank was cut by another tokenizer, or its memories were written by another model.
    """
    checkpoint = start_model(model)
    check_length(checkpoint, config.sequence_tokens)
    if bank is not None and checkpoint.tokenizer.tokenizer_id != bank.manifest.fingerprint.tokenizer:
        raise WrongModelError(f"bank {bank.url} was cut by another tokenizer than that of {model}; build one with it")
    if config.memories == WRITTEN:
        selection = find_selection(
            checkpoint.config, num_slots=config.num_slots, score=config.score, refit=config.refit
        )
        record_selection(checkpoint.config, selection)
        settings = dataclasses.replace(config, **dataclasses.asdict(selection))
        return checkpoint, LanguageObjective(checkpoint, selection), settings
    if bank is None:
        raise InputError("memories of a bank are read only where there is one; give --bank, or have them written")
    from model.loading import load_bank_codec

    given = [name for name in ("num_slots", "score", "refit") if getattr(config, name) is not None]
    if given:
        raise InputError(f"memories of a bank are as they are; leave out {', '.join(given)}, or have them written")
    selection = SelectionConfig(**bank.manifest.fingerprint.selection)
    dtype = bank.manifest.config["memory"]["dtype"]
    writer = ReferenceWriter(checkpoint, selection, dtype=dtype, codec=load_bank_codec(bank))
    record_selection(checkpoint.config, selection)
    freeze_writing(checkpoint)
    settings = dataclasses.replace(config, **dataclasses.asdict(selection))
    return checkpoint, BankObjective(BankMemories(bank, writer)), settings


def _check_left(file: Path, num_kept: int, rejected: Sequence[RejectedRow]) -> None:
    """Makes sure that a file has something to train on.

    Raises:
        InputError: it has not; the error says why its rows were rejected.
    """
    if not num_kept:
        reasons = Counter(row.reason for row in rejected).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "it has no row"
        raise InputError(f"{file} has nothing to train on: {listed}")


def _finish(
    checkpoint: Checkpoint,
    chat: ChatTemplate,
    summary: TrainingSummary,
    out: Path,
    model: str,
    config: AlignmentConfig,
    num_kept: int,
    rejected: Sequence[RejectedRow],
) -> AlignmentResult:
    """Saves the model, which from now on ends its answers, and says what came of the run."""
    if is_first_process():
        stop_at_answers(checkpoint, chat)
        save_model(checkpoint, out / MODEL_FOLDER, tokenizer=model, dtype=config.saved_dtype)
    return AlignmentResult(
        summary=summary,
        folder=str(out),
        model=str(out / MODEL_FOLDER),
        num_read=num_kept + len(rejected),
        num_kept=num_kept,
        rejects=dict(sorted(Counter(row.reason for row in rejected).items())),
    )


def fine_tune(
    model: str, conversations: Path, out: Path, bank: Bank | None, config: AlignmentConfig
) -> AlignmentResult:
    """Trains the answers of conversations; the same call goes on where it was.

    Args:
        model: a checkpoint's name or folder.
        conversations: JSON lines, see :func:`model.training.chat.read_exchanges`.
        out: the run's folder.
        bank: where prompts retrieve from; None for a model without memory.
        config: settings.

    Raises:
        InputError: no conversation is left, or the folder holds another run.
        WrongModelError: the bank does not belong to the model.
    """
    checkpoint, objective, config = _open_model(model, bank, config)
    chat = load_chat_template(model, checkpoint)
    read = read_exchanges(conversations, chat, sequence_tokens=config.sequence_tokens)
    _check_left(conversations, len(read.exchanges), read.rejected)
    with show_stage("retrieve", len(read.exchanges), "exchanges"):
        search = open_retriever(bank) if bank is not None else None
        rows = retrieve_references(read.exchanges, checkpoint.tokenizer, search, config.draw.num_memories)
        references = load_references(rows, bank) if bank is not None else {}
    source = ConversationSource(rows, references, config.draw)
    summary = run_loop("sft", objective, source, config.loop, out, dataclasses.asdict(config))
    return _finish(checkpoint, chat, summary, out, model, config, read.num_kept, read.rejected)


def optimise_preferences(
    model: str, pairs: Path, out: Path, bank: Bank | None, config: AlignmentConfig
) -> AlignmentResult:
    """Makes chosen answers likelier than rejected ones; the same call goes on where it was.

    Arguments and errors as in :func:`fine_tune`; ``pairs`` are read by
    :func:`model.training.preferences.read_pairs`.
    """
    checkpoint, reader, config = _open_model(model, bank, config)
    chat = load_chat_template(model, checkpoint)
    read = read_pairs(pairs, chat, sequence_tokens=config.sequence_tokens)
    _check_left(pairs, len(read.pairs), read.rejected)
    with show_stage("retrieve", len(read.pairs), "pairs"):
        search = open_retriever(bank) if bank is not None else None
        exchanges = [exchange for pair in read.pairs for exchange in pair]
        rows = retrieve_references(exchanges, checkpoint.tokenizer, search, config.draw.num_memories)
        references = load_references(rows, bank) if bank is not None else {}
    source = PreferenceSource(list(zip(rows[::2], rows[1::2], strict=True)), references, config.draw)
    objective = PreferenceObjective(reader, config.beta)
    with show_stage("start", source.num_pairs, "pairs"):
        measure_start(source, objective, out / START_FILE)
    summary = run_loop("dpo", objective, source, config.loop, out, dataclasses.asdict(config))
    return _finish(checkpoint, chat, summary, out, model, config, len(read.pairs), read.rejected)
