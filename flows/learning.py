"""The flows ``train_model`` and ``evaluate_model``: a stage of training, and the loss of texts with a bank's memories.

Training goes on where it was when the same run is begun again, so a run that was lost costs the steps since its last
checkpoint. Parameters and results are plain JSON.
"""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.config import apply_changes
from flows.evaluating.perplexity.suite import PerplexityOptions, run_perplexity
from flows.evaluating.perplexity.ways import WayOptions
from flows.flow_runs import end_run, run_work
from flows.run_records import get_place_name, make_run_name, publish_table, rename_run
from model.reading import MEMORIES_PER_CHUNK
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import open_store
from schemas.tags import find_version

EVALUATED_WAYS = ("plain", "random", "retrieved")
"""What the flow measures beside no memory: what every night can pay for."""


def make_evaluation(corpus: list[str]) -> PerplexityOptions:
    """Returns what the flow ``evaluate_model`` measures unless told otherwise."""
    return PerplexityOptions(
        corpus=tuple(corpus), ways=WayOptions(num_references=(MEMORIES_PER_CHUNK,), ways=EVALUATED_WAYS)
    )


@flow(name="train_model", flow_run_name=make_run_name, persist_result=False)
def train_model(
    stage: str,
    data: str,
    out: str,
    steps: int,
    model: str = "tiny",
    tokenizer: str | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains one stage to its end, see :func:`flows.training.train_stage`.

    Args:
        stage: warmup or continual.
        data: folder of sequences, from ``memory3 train prepare``.
        out: folder of the run.
        steps: optimizer steps.
        model: a preset to start from random weights, or a checkpoint's folder.
        tokenizer: folder of the tokenizer of random weights; None for the shipped one.
        config: changes to the settings of the stage, nested by section.

    Returns:
        The loop's summary, with ``folder`` and ``model``.
    """

    def train() -> tuple[dict[str, Any], str]:
        from flows.training import STAGES, train_stage

        if stage not in STAGES:
            raise InputError(f"stage is {stage!r}, must be one of {', '.join(STAGES)}")
        settings = apply_changes(STAGES[stage](steps), config or {})
        place = Path(data), Path(out)
        result = run_work(
            lambda stages: stages.run("train", train_stage, model, *place, settings, tokenizer=tokenizer)
        ).to_json()
        publish_table(out, "training", [result], f"{stage} of {model} on {data}")
        state = "finished" if result["is_finished"] else "stopped"
        return (
            result,
            f"{state} after {result['step']:,} steps, loss {result['loss']:.4f}; the model is {result['model']}",
        )

    return end_run(train)


@flow(name="evaluate_model", flow_run_name=make_run_name, persist_result=False)
def evaluate_model(
    bank: str,
    corpus: list[str],
    model: str | None = None,
    at: str | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures the loss of texts with no memory, random and retrieved memories, as ``memory3 eval perplexity``.

    Args:
        bank: the bank's folder or URL.
        corpus: files and folders of texts that the model has not seen.
        model: memory3-tiny, or the folder of a model that reads this bank; None for the one that wrote it.
        at: a version's number or tag; None for the newest.
        config: changes to :class:`flows.evaluating.perplexity.suite.PerplexityOptions`, by default for
            :data:`EVALUATED_WAYS` and five references.

    Returns:
        A :class:`flows.evaluating.suite_reports.SuiteReport` as JSON.
    """

    def measure() -> tuple[dict[str, Any], str]:
        store = open_store(bank)
        opened = Bank.open(store, find_version(store, at))
        version = opened.manifest.version
        rename_run(f"evaluate {get_place_name(bank)} v{version}")
        options = apply_changes(make_evaluation(corpus), config or {})
        report = run_work(lambda steps: steps.run("evaluate", run_perplexity, opened, model, options))
        table = report.tables[0]
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        publish_table(opened.url, "losses", rows, f"{report.data['model']}: {table.title}")
        gains = {part.way: part.interval for part in report.measurements if part.name == "gain" and not part.group}
        told = ", ".join(f"{way} {gain.format(signed=True)}" for way, gain in gains.items())
        return report.to_json(), f"version {version}, gain over no memory in nats a token: {told}"

    return end_run(measure)
