"""``memory3 eval lm``: tasks of the lm-evaluation-harness, offline, on a model with or without memory.

    tasks (:mod:`flows.evaluating.harness.harness_tasks`) -> requests
    -> answers (:mod:`flows.evaluating.harness.harness_model`) -> metrics -> a report

The harness is an optional dependency and imported here only when a task is run.
"""

import dataclasses
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.evaluating.evaluated_model import EvaluatedModel, EvaluationOptions
from flows.evaluating.harness.harness_tasks import TaskOptions, load_tasks
from flows.evaluating.harness.offline import go_offline
from flows.progress import show_stage
from schemas.atomic import write_bytes_atomically
from schemas.bank import Bank
from schemas.errors import InputError

BOOTSTRAP_ROUNDS = 1000
"""Rounds of the harness's bootstrap, for metrics whose standard error has no formula."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A metric of a task.

    Attributes:
        task: the task, or a group of tasks.
        num_fewshot: examples in its prompts; None for a group.
        filter: what was done to the answers before.
        metric: the metric.
        value: its value; None where it is no number.
        stderr: its standard error; None where the harness has none.
        higher_is_better: which way is better; None where that is not known.
        num_samples: documents.
    """

    task: str
    num_fewshot: int | None
    filter: str
    metric: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    num_samples: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessReport:
    """What tasks found, and how.

    Attributes:
        model: the model.
        knowledge: what it read: ``memory``, ``text`` or ``none``.
        bank: URL of the bank; None for the ordinary model.
        version: of the bank.
        options: how it was measured.
        tasks: how the tasks were run.
        rows: the metrics.
        counts: what was asked, searched, dropped by the filter, and read.
        attention_share: the part of the attention in memory layers that went to memories; None without memories.
        seconds: of the run, loading aside.
        harness_version: the version of lm-eval.
        samples: by task, every request with its answer; empty unless asked for.
    """

    model: str
    knowledge: str
    bank: str | None
    version: int | None
    options: dict[str, Any]
    tasks: dict[str, Any]
    rows: list[MetricRow]
    counts: dict[str, int]
    attention_share: float | None
    seconds: float
    harness_version: str
    samples: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


def run_tasks(
    model: str | None, bank: Bank | None, options: EvaluationOptions, tasks: TaskOptions, *, device: str | None = None
) -> HarnessReport:
    """Runs tasks on a model.

    Args:
        model: the checkpoint, by name or folder; None for the one that wrote the bank.
        bank: what it reads, see :class:`flows.evaluating.evaluated_model.EvaluatedModel`.
        options: how it is measured.
        tasks: which tasks.
        device: where to compute; None for where the bank was written.

    Raises:
        InputError: the harness is not installed, a task cannot be loaded without network or asks for what the model
            does not have, or an option is out of its bounds.
        WrongModelError: the bank was written by another model.
    """
    go_offline()
    with show_stage("tasks"):
        loaded = load_tasks(tasks)
    with show_stage("model"):
        evaluated = EvaluatedModel(model, bank, options, device=device)
    from lm_eval.evaluator import evaluate

    from flows.evaluating.harness.harness_model import MemoryLM

    # A share of the documents is below 1, a number of them is whole.
    limit = tasks.limit if tasks.limit is None or tasks.limit < 1 else int(tasks.limit)
    lm = MemoryLM(evaluated)
    started = time.monotonic()
    results = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ROUNDS,
        log_samples=tasks.with_samples,
        apply_chat_template=tasks.with_chat,
        fewshot_as_multiturn=tasks.with_chat,
    )
    counts = dataclasses.asdict(evaluated.plain_scorer.counts) | dataclasses.asdict(lm.counts)
    if evaluated.search is not None:
        counts |= dataclasses.asdict(evaluated.search.counts)
        counts["num_dropped_references"] = len(evaluated.search.dropped_ids)
    del counts["attention"]
    reads = options.knowledge == "memory"
    return HarnessReport(
        model=evaluated.name,
        knowledge=options.knowledge,
        bank=None if evaluated.bank is None else evaluated.bank.url,
        version=None if evaluated.bank is None else evaluated.bank.manifest.version,
        options=dataclasses.asdict(options) | {"max_length": evaluated.max_length},
        tasks=dataclasses.asdict(tasks) | {"include_path": tasks.include_path and str(tasks.include_path)},
        rows=list_rows(results),
        counts=counts,
        attention_share=evaluated.plain_scorer.attention_share if reads else None,
        seconds=round(time.monotonic() - started, 3),
        harness_version=version("lm_eval"),
        samples=_make_plain(results.get("samples", {})),
    )


def list_rows(results: dict[str, Any]) -> list[MetricRow]:
    """Returns the metrics of the harness's results, task by task."""
    rows = []
    for task, values in results["results"].items():
        known = results["higher_is_better"].get(task, {})
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            rows.append(
                MetricRow(
                    task=task,
                    num_fewshot=results["n-shot"].get(task),
                    filter=name,
                    metric=metric,
                    value=_find_number(value),
                    stderr=_find_number(values.get(f"{metric}_stderr,{name}")),
                    higher_is_better=known.get(metric),
                    num_samples=results["n-samples"].get(task, {}).get("effective"),
                )
            )
    return rows


def write_report(path: Path, report: HarnessReport) -> None:
    """Writes a report as JSON.

    Raises:
        InputError: the folder of the file is not there.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; make it, or name another with --out")
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes_atomically(path, text.encode() + b"\n")


def _find_number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _make_plain(value: Any) -> Any:
    """Returns what samples are made of as JSON values; what is no number is null."""
    if isinstance(value, dict):
        return {str(key): _make_plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
