"""``memory3 train quality``: from graded documents to the classifier that filters a corpus.

    JSON lines or Parquet with a text and a grade -> documents, rejects -> training -> OUT/model, OUT/quality.json

``OUT/model`` is what the setting ``quality: model`` of ``memory3 build`` names.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from flows.training import MODEL_FOLDER, is_first_process, run_loop
from model.locating import SHIPPED_MODEL
from model.training.conversations import DrawConfig
from model.training.grading import (
    MAX_GRADE,
    MIN_GRADE,
    THRESHOLD,
    GradedDocuments,
    GradedSource,
    GradingObjective,
    GradingReport,
    find_max_tokens,
    measure_grading,
    save_classifier,
    split_held_out,
    start_classifier,
)
from model.training.loop import LoopConfig, TrainingSummary
from model.training.optimizing import OptimizerConfig
from model.training.schedule import ScheduleConfig
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.atomic import write_bytes_atomically
from schemas.errors import InputError

REPORT_FILE = "quality.json"

MISSING_GRADE = "missing_grade"
GRADE_NOT_A_NUMBER = "grade_not_a_number"
GRADE_OUT_OF_RANGE = "grade_out_of_range"

RATE_OF_CHECKPOINT, RATE_OF_RANDOM = 5e-5, 1e-3
"""Learning rates where none is given: of a model that knows language, and of one that does not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """Settings of the training of a classifier.

    Attributes:
        model: folder of a transformers checkpoint to start from; None for a small BERT from random weights.
        text_column: the column that holds the text.
        grade_column: the column that holds the grade, a number from 0 to 5.
        held_out_share: part of the documents that is measured on.
        threshold: grade from which a document counts as good in the accuracy.
        num_steps: optimizer steps.
        learning_rate: the greatest rate; None for 5e-5 from a checkpoint, 1e-3 from random weights.
        draw: documents of a step and of a forward pass, and the seed of their order and of random weights.
        save_every: steps from one checkpoint to the next.
    """

    model: str | None = None
    text_column: str = "text"
    grade_column: str = "grade"
    held_out_share: float = 0.1
    threshold: float = THRESHOLD
    num_steps: int = 1000
    learning_rate: float | None = None
    draw: DrawConfig = dataclasses.field(default_factory=lambda: DrawConfig(batch_size=32, micro_batch_size=32))
    save_every: int = 200

    def __post_init__(self) -> None:
        """Checks what is not checked elsewhere.

        Raises:
            InputError: a threshold that is no grade.
        """
        if not MIN_GRADE <= self.threshold <= MAX_GRADE:
            raise InputError(f"grading: threshold is {self.threshold}, must be {MIN_GRADE:g} to {MAX_GRADE:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradingResult:
    """What a training of a classifier came to.

    Attributes:
        summary: of the loop.
        report: measured on held-out documents; None if it was stopped before its end.
        num_read: records read.
        rejects: how many of them were left out, by reason.
        model: folder of the classifier.
    """

    summary: TrainingSummary
    report: GradingReport | None
    num_read: int
    rejects: dict[str, int]
    model: str

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


def read_graded(paths: list[str], *, text_column: str, grade_column: str) -> tuple[GradedDocuments, dict[str, int]]:
    """Reads graded documents.

    Args:
        paths: files, folders and globs.
        text_column: the column that holds the text.
        grade_column: the column that holds the grade.

    Returns:
        The documents, and how many records were left out, by reason: read = documents + left out.

    Raises:
        CorpusError: the files cannot be read.
        InputError: one column is named for two purposes.
    """
    config = ReadingConfig(text_column=text_column, metadata_columns=(grade_column,))
    documents, rejects = GradedDocuments(texts=[], grades=[]), Counter[str]()
    for file in list_corpus_files(paths):
        for batch in read_records(file, config):
            for record in batch.select(["text", "reason", "metadata"]).to_pylist():
                grade = orjson.loads(record["metadata"]).get(grade_column)
                reason = record["reason"] or _find_fault(grade)
                if reason is not None:
                    rejects[reason] += 1
                    continue
                documents.texts.append(record["text"])
                documents.grades.append(float(grade))
    return documents, dict(sorted(rejects.items()))


def _find_fault(grade: Any) -> str | None:
    """Returns why a value is no grade; None if it is one."""
    if grade is None:
        return MISSING_GRADE
    if isinstance(grade, bool) or not isinstance(grade, int | float):
        return GRADE_NOT_A_NUMBER
    return None if MIN_GRADE <= grade <= MAX_GRADE else GRADE_OUT_OF_RANGE


def train_quality(paths: list[str], out: Path, config: GradingConfig) -> GradingResult:
    """Trains a classifier to its end, or until it is stopped; the same call goes on where it was.

    Args:
        paths: files, folders and globs of graded documents.
        out: the run's folder.
        config: settings.

    Raises:
        CorpusError: the files cannot be read.
        InputError: too few documents, or the folder holds another run.
    """
    documents, rejects = read_graded(paths, text_column=config.text_column, grade_column=config.grade_column)
    trained, held_out = split_held_out(documents, config.held_out_share)
    model, words = start_classifier(
        config.model,
        tokenizer=SHIPPED_MODEL,
        mean_grade=sum(trained.grades) / len(trained),
        seed=config.draw.seed,
    )
    source = GradedSource(trained, words, find_max_tokens(model, words), config.draw)
    default = RATE_OF_RANDOM if config.model is None else RATE_OF_CHECKPOINT
    loop = LoopConfig(
        num_steps=config.num_steps,
        optimizer=OptimizerConfig(learning_rate=config.learning_rate or default, weight_decay=0.01),
        schedule=ScheduleConfig(shape="cosine", warmup_share=0.1),
        seed=config.draw.seed,
        save_every=config.save_every,
    )
    summary = run_loop("grade", GradingObjective(model), source, loop, out, dataclasses.asdict(config))
    target, report = out / MODEL_FOLDER, None
    if is_first_process() and summary.is_finished:
        save_classifier(model, words, target)
        report = measure_grading(target, trained, held_out, threshold=config.threshold)
        text = json.dumps(dataclasses.asdict(report), indent=1, allow_nan=False)
        write_bytes_atomically(out / REPORT_FILE, text.encode())
    return GradingResult(
        summary=summary,
        report=report,
        num_read=len(documents) + sum(rejects.values()),
        rejects=rejects,
        model=str(target),
    )
