"""Fine-tuning a small classifier on graded documents: the quality score that filters a corpus (method section 3).

    graded documents (:mod:`flows.grading`) -> **batches and objective** -> the loop -> a checkpoint folder
    -> :func:`model.quality.load_scorer`, in ``memory3 build``

The classifier has one output, the grade itself, and learns it by its squared error. It reads the beginning of a text,
cut as the scorer cuts it, and is measured by the scorer, on documents that it was not trained on: those with a hash of
their text below a bound, so that copies of a document are on one side.

Shape letters: B documents, T tokens.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from model.locating import find_checkpoint
from model.quality import MAX_TOKENS, load_scorer, tokenize_beginnings
from model.training.batches import IGNORED, TrainingBatch
from model.training.conversations import DrawConfig, EpochOrder, draw_positions, split_micro_batches
from schemas.atomic import replace_folder
from schemas.errors import InputError
from schemas.identifiers import hash_json
from schemas.protocols import FloatArray, IntArray

MIN_GRADE, MAX_GRADE = 0.0, 5.0

THRESHOLD = 3.0
"""From this grade on a document counts as good in the accuracy: the middle of what is worth keeping and what is not."""

MIN_DOCUMENTS = 2
"""Fewest documents to train on, and to measure on: below, there is no order to compare."""

SMALL_CLASSIFIER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
"""The shape of the BERT that is trained from random weights where no checkpoint is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradedDocuments:
    """Documents with grades.

    Attributes:
        texts: the texts.
        grades: their grades, from 0, useless, to 5, excellent.
    """

    texts: list[str]
    grades: list[float]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradingReport:
    """How well a classifier grades documents that it was not trained on.

    Attributes:
        num_trained: documents it was trained on.
        num_held_out: documents it was measured on.
        mean_error: mean absolute error of the grade.
        mean_error_of_constant: the same of the mean grade of the training documents, given to all.
        spearman: correlation of the ranks of grades and scores; None where one of them is the same for all.
        accuracy: share of documents on the right side of the threshold.
        accuracy_of_constant: the same of the more frequent side, given to all.
        threshold: the grade from which a document counts as good.
    """

    num_trained: int
    num_held_out: int
    mean_error: float
    mean_error_of_constant: float
    spearman: float | None
    accuracy: float
    accuracy_of_constant: float
    threshold: float


def split_held_out(documents: GradedDocuments, share: float) -> tuple[GradedDocuments, GradedDocuments]:
    """Returns the documents to train on and those to measure on, chosen by a hash of their text.

    Raises:
        InputError: a share that is not between 0 and 1, or one that leaves too few documents on a side.
    """
    if not 0 < share < 1:
        raise InputError(f"grading: held_out_share is {share}, must be between 0 and 1")
    sides: tuple[GradedDocuments, GradedDocuments] = tuple(  # type: ignore[assignment]
        GradedDocuments(texts=[], grades=[]) for _ in range(2)
    )
    for text, grade in zip(documents.texts, documents.grades, strict=True):
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        side = sides[int.from_bytes(digest, "big") < share * 2**64]
        side.texts.append(text)
        side.grades.append(grade)
    if min(map(len, sides)) < MIN_DOCUMENTS:
        raise InputError(
            f"grading: {len(sides[0])} documents to train on and {len(sides[1])} held out, must be at least "
            f"{MIN_DOCUMENTS} each; give more graded documents, or another held_out_share"
        )
    return sides


def start_classifier(name: str | None, *, tokenizer: str, mean_grade: float, seed: int = 0) -> tuple[nn.Module, Any]:
    """Returns a sequence classifier with one output, in float32, and its tokenizer.

    Args:
        name: folder of a transformers checkpoint, whose head is replaced if it has not one output; None for a small
            BERT from random weights.
        tokenizer: name or folder of the tokenizer of that BERT.
        mean_grade: what that BERT says of every text before it is trained.
        seed: seed of random weights.

    Raises:
        InputError: the folder holds no such checkpoint, or a tokenizer without a token for padding.
    """
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder = Path(name) if name is not None else find_checkpoint(tokenizer)
    if name is not None and not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json; give the folder of a model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = (
                BertForSequenceClassification(_make_small_config(words)) if name is None else _load_classifier(folder)
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{folder} cannot be loaded as a sequence classifier: {reason:.200}") from error
    if name is None:
        _mark_beginnings(words)
        words.model_max_length = SMALL_CLASSIFIER["max_position_embeddings"]
        with torch.no_grad():
            model.classifier.bias.fill_(mean_grade)
    if words.pad_token_id is None:
        words.pad_token = words.eos_token
    if words.pad_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no token for padding or for the end; name a pad_token")
    model.config.problem_type = "regression"
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = words.pad_token_id
    return model, words


def _load_classifier(folder: Path) -> nn.Module:
    """Loads a checkpoint with a head of one output, a new one if need be.

    Raises:
        ValueError: more is new than old, so that this is no checkpoint of the architecture it says.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is as it should be
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(loading["missing_keys"])
    if 2 * len(missing) > len(model.state_dict()):
        raise ValueError(f"it has no weights for {', '.join(missing[:3])}")
    return model  # type: ignore[no-any-return]


def _make_small_config(words: Any) -> Any:
    from transformers import BertConfig

    config: Any = BertConfig(vocab_size=len(words), pad_token_id=words.pad_token_id or 0, **SMALL_CLASSIFIER)
    config.num_labels = 1
    return config


def _mark_beginnings(words: Any) -> None:
    """Lets every text begin with the tokenizer's ``<s>``: BERT judges a text by the state of its first token."""
    from tokenizers.processors import TemplateProcessing

    first = words.bos_token or words.cls_token
    if first is None:
        raise InputError("the tokenizer of the classifier has neither bos_token nor cls_token; name one")
    template = TemplateProcessing(single=[first, "$A"], special_tokens=[(first, words.convert_tokens_to_ids(first))])
    words.backend_tokenizer.post_processor = template


def find_max_tokens(model: nn.Module, words: Any) -> int:
    """Returns the tokens of a text that a classifier reads, as :func:`model.quality.load_scorer` chooses them."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    return int(min(MAX_TOKENS, words.model_max_length, positions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradedBatch(TrainingBatch):
    """Documents with grades; no token is a target.

    Attributes:
        valid_BT: True for tokens, False for padding.
        grades_B: the grades, float32.
    """

    valid_BT: torch.Tensor
    grades_B: torch.Tensor

    @property
    def num_targets(self) -> int:
        """Documents."""
        return len(self.grades_B)

    def to(self, device: torch.device) -> "GradedBatch":
        """Returns the batch on a device."""
        moved = super().to(device)
        assert isinstance(moved, GradedBatch)
        return dataclasses.replace(moved, valid_BT=self.valid_BT.to(device), grades_B=self.grades_B.to(device))


def make_graded_batch(token_ids: Sequence[IntArray], grades: Sequence[float], padding: int) -> GradedBatch:
    """Lays documents out, padded on the right with a token."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    tokens = torch.full((len(token_ids), int(lengths.max())), padding)
    for row, ids in zip(tokens, token_ids, strict=True):
        row[: len(ids)] = torch.from_numpy(ids)
    return GradedBatch(
        tokens_BT=tokens,
        targets_BT=torch.full_like(tokens, IGNORED),
        references=(),
        index_BCM=torch.full((len(tokens), 1, 1), -1),
        chunk_of_token_BT=torch.full_like(tokens, -1),
        with_prefix=False,
        valid_BT=torch.arange(tokens.shape[1]) < lengths[:, None],
        grades_B=torch.tensor(grades, dtype=torch.float32),
    )


class GradedSource:
    """Batches of graded documents; a :class:`model.training.batches.BatchSource`."""

    def __init__(self, documents: GradedDocuments, words: Any, max_tokens: int, config: DrawConfig) -> None:
        """Tokenizes the documents; those without any token are left out.

        Args:
            documents: the documents.
            words: the classifier's tokenizer.
            max_tokens: tokens of a text that are read, special tokens included.
            config: how to draw; sizes are numbers of documents.

        Raises:
            InputError: there is no document.
        """
        found = tokenize_beginnings(words, documents.texts, max_tokens)
        rows = [(np.array(ids), grade) for ids, grade in zip(found, documents.grades, strict=True) if ids]
        self._rows, self._config, self._padding = rows, config, int(words.pad_token_id)
        self._order = EpochOrder(len(rows), config)
        self._id = hash_json([[[ids.tolist(), grade] for ids, grade in rows], dataclasses.asdict(config)])

    @property
    def source_id(self) -> str:
        """Id of the documents, of their grades and of how they are drawn."""
        return self._id

    def draw(self, step: int, rank: int, num_ranks: int) -> list[TrainingBatch]:
        """Returns the micro-batches of a step, see :class:`model.training.batches.BatchSource`.

        Raises:
            InputError: the batch cannot be dealt out evenly.
        """
        places = [self._order.get_row(position) for position in draw_positions(self._config, step, rank, num_ranks)]
        rows = sorted((self._rows[place] for place in places), key=lambda row: len(row[0]))
        groups = split_micro_batches(rows, self._config.micro_batch_size)
        return [
            make_graded_batch([ids for ids, _ in group], [grade for _, grade in group], self._padding)
            for group in groups
        ]


class GradingObjective(nn.Module):
    """The squared error of the grades of a batch, summed.

    Attributes:
        model: the classifier, whose parameters are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        """Takes the classifier to train."""
        super().__init__()
        self.model = model.requires_grad_(True)

    def forward(self, batch: GradedBatch) -> torch.Tensor:
        """Returns the sum of the squared errors, in grades squared."""
        logits = self.model(input_ids=batch.tokens_BT, attention_mask=batch.valid_BT.long()).logits
        errors_B: torch.Tensor = logits[:, 0].float() - batch.grades_B
        return errors_B.square().sum()


def save_classifier(model: nn.Module, words: Any, target: Path) -> None:
    """Writes a classifier and its tokenizer as a checkpoint folder, whole or not at all, in the place of another."""
    with replace_folder(target) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        words.save_pretrained(temporary)


def measure_grading(
    folder: Path, trained: GradedDocuments, held_out: GradedDocuments, *, threshold: float = THRESHOLD
) -> GradingReport:
    """Measures a saved classifier the way it is going to be used.

    Args:
        folder: the checkpoint folder.
        trained: the documents it was trained on.
        held_out: the documents to measure on.
        threshold: the grade from which a document counts as good.

    Raises:
        InputError: the folder cannot be loaded.
    """
    return compare_grades(load_scorer(folder).score(held_out.texts), trained, held_out, threshold=threshold)


def compare_grades(
    scores: FloatArray, trained: GradedDocuments, held_out: GradedDocuments, *, threshold: float = THRESHOLD
) -> GradingReport:
    """Compares scores with the grades of held-out documents, as :func:`measure_grading` does.

    A score that is not a number, of a text without any token, counts as the lowest grade: a filter drops such a text.
    """
    from scipy.stats import spearmanr

    scores = np.nan_to_num(scores, nan=MIN_GRADE)
    grades, mean = np.array(held_out.grades), float(np.mean(trained.grades))
    is_good = grades >= threshold
    varies = len(set(held_out.grades)) > 1 and len(set(scores.tolist())) > 1
    correlation = float(spearmanr(grades.tolist(), scores.tolist()).statistic) if varies else math.nan
    return GradingReport(
        num_trained=len(trained),
        num_held_out=len(held_out),
        mean_error=float(np.abs(scores - grades).mean()),
        mean_error_of_constant=float(np.abs(mean - grades).mean()),
        spearman=None if math.isnan(correlation) else correlation,
        accuracy=float(((scores >= threshold) == is_good).mean()),
        accuracy_of_constant=float(max(is_good.mean(), 1 - is_good.mean())),
        threshold=threshold,
    )
