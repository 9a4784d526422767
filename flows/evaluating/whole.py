"""``memory3 eval all``: every suite on one bank and one model, each written to the folder as soon as it is finished.

    bank, model, held-out corpus -> each suite -> its folder (:mod:`flows.evaluating.folders`), and the page

A suite that stands in the folder already, made from the same inputs with the same settings, is not measured again:
after an interruption the same command goes on. What determines a suite is hashed into its data as ``inputs_sha256``.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.evaluating.attribution.suite import AttributionOptions, run_attribution
from flows.evaluating.folders import SUITES, check_folder, read_evaluation, write_evaluation
from flows.evaluating.knowledge.suite import KnowledgeOptions, run_knowledge
from flows.evaluating.perplexity.passages import NUM_DOCUMENTS
from flows.evaluating.perplexity.suite import PerplexityOptions, run_perplexity
from flows.evaluating.retrieval.suite import RetrievalOptions, run_retrieval
from flows.evaluating.suite_reports import SuiteReport
from model.locating import find_checkpoint
from pipelines.formats import list_corpus_files
from schemas.bank import Bank
from schemas.errors import BankError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeOptions:
    """What is measured.

    Attributes:
        corpus: held-out files and folders, for all suites but retrieval, which asks the bank.
        seen: documents that the model was trained on, for facts where ``corpus`` has too few.
        suites: which of :data:`flows.evaluating.folders.SUITES`.
        share: part of the items that each suite measures by itself.
    """

    corpus: tuple[str, ...]
    seen: tuple[str, ...] = ()
    suites: tuple[str, ...] = SUITES
    share: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds, or there is no such suite.
        """
        unknown = [name for name in self.suites if name not in SUITES]
        if unknown:
            raise InputError(f"there is no suite {unknown[0]!r}; give some of {', '.join(SUITES)}")
        if not 0 < self.share <= 1:
            raise InputError(f"evaluation: share is {self.share:g}, must be above 0 and at most 1")

    def scale(self, number: int) -> int:
        """Returns a number of items times the share, 2 at least."""
        return max(2, round(number * self.share))


def run_suites(
    bank: Bank,
    model: str | None,
    options: WholeOptions,
    out: Path,
    *,
    command: str,
    device: str | None = None,
    begin: Callable[[str, bool], None] | None = None,
) -> dict[str, str]:
    """Measures suite by suite and writes each as soon as it is finished.

    Args:
        bank: what is read.
        model: the checkpoint, by name or folder; None for the one that wrote the bank.
        options: what is measured.
        out: the folder.
        command: the command that repeats it.
        device: where to compute; None for where the bank was written.
        begin: told the name of each suite, and whether it is there already.

    Returns:
        by name the suites that could not be measured, and why.

    Raises:
        InputError: the folder holds something else.
        BankError: the bank cannot be read.
    """
    check_folder(out)
    done = {}
    if out.is_dir() and any(out.iterdir()):
        done = {
            suite.report["suite"]: suite.report["data"].get("inputs_sha256")
            for suite in read_evaluation(out, skip_damaged=True)
        }
    failed = {}
    for name in SUITES:
        if name not in options.suites:
            continue
        settings = make_options(name, bank, model, options, device)
        inputs = hash_inputs(name, bank, model, settings, options)
        if begin is not None:
            begin(name, done.get(name) == inputs)
        if done.get(name) == inputs:
            continue
        try:
            report = run_suite(name, bank, model, settings, options, command=command, device=device)
        except BankError as error:
            failed[name] = str(error)
            continue
        data = {**report.data, "inputs_sha256": inputs}
        write_evaluation(out, [dataclasses.replace(report, data=data)])
    return failed


SuiteOptions = PerplexityOptions | KnowledgeOptions | AttributionOptions | RetrievalOptions


def make_options(name: str, bank: Bank, model: str | None, options: WholeOptions, device: str | None) -> SuiteOptions:
    """Returns the settings of a suite: its own, with the share of its items."""
    if name == "perplexity":
        return PerplexityOptions(corpus=options.corpus, num_documents=options.scale(NUM_DOCUMENTS))
    if name == "knowledge":
        return KnowledgeOptions(
            corpus=options.corpus,
            seen=options.seen,
            model=model or str(bank.manifest.config["memory"]["model"]),
            num_facts=options.scale(KnowledgeOptions.num_facts),
            num_controls=options.scale(KnowledgeOptions.num_controls),
            device=device,
        )
    if name == "attribution":
        return AttributionOptions(num_chunks=options.scale(AttributionOptions.num_chunks))
    return RetrievalOptions(
        num_references=options.scale(RetrievalOptions.num_references), num_fit=options.scale(RetrievalOptions.num_fit)
    )


def run_suite(
    name: str,
    bank: Bank,
    model: str | None,
    settings: SuiteOptions,
    options: WholeOptions,
    *,
    command: str,
    device: str | None = None,
) -> SuiteReport:
    """Measures one suite; see :func:`run_suites`."""
    if isinstance(settings, PerplexityOptions):
        return run_perplexity(bank, model, settings, device=device)
    if isinstance(settings, KnowledgeOptions):
        return run_knowledge(settings)
    if isinstance(settings, AttributionOptions):
        return run_attribution(model, bank, settings, corpus=options.corpus, device=device)
    return run_retrieval(bank, settings, model=model, command=command, device=device)


def hash_inputs(name: str, bank: Bank, model: str | None, settings: SuiteOptions, options: WholeOptions) -> str:
    """Returns a digest of what determines a suite: bank, version, settings, release, and corpora and model by files.

    Raises:
        CorpusError: a file of a corpus is not there.
    """
    corpora = {"retrieval": (), "knowledge": (*options.corpus, *options.seen)}.get(name, options.corpus)
    files = list_corpus_files(list(corpora)) if corpora else []
    folder = None if model is None else find_checkpoint(model)
    weights = [] if folder is None else sorted(path for path in folder.iterdir() if path.is_file())
    inputs: dict[str, Any] = {
        "suite": name,
        "bank": bank.url,
        "version": bank.manifest.version,
        "fingerprint": bank.manifest.fingerprint.digest,
        "model": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "release": version("memory3"),
        "settings": dataclasses.asdict(settings),
        "files": [[file.path, file.size_bytes, file.fingerprint] for file in files],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
