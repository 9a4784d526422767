"""``memory3 eval retrieval``: what the embedder, BM25 and the model's own attention find, and all of them together.

    bank -> questions of its own references --+
    BEIR folder -> bank, queries -------------+-> rankers -> figures -> SuiteReport

The method of the paper retrieves with an embedder; its Remark 2 would do without, with the model's attention queries
against the stored keys. This compares both, on the questions that generation asks among others.
"""

import dataclasses
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.building import build
from flows.config import BuildConfig, apply_changes
from flows.evaluating.measurements import Measurement
from flows.evaluating.retrieval.beir_folders import (
    BEIR,
    BUILD_SETTINGS,
    CORPUS_FILE,
    DocumentRanking,
    get_query_id,
    locate_file,
    read_questions,
)
from flows.evaluating.retrieval.figures import (
    RankedQuestions,
    compare_rankers,
    make_source_table,
    make_table,
)
from flows.evaluating.retrieval.questions import SENTENCE, BankQuestions, Question
from flows.evaluating.retrieval.rankers import NUM_SEARCHES, RANKING_DEPTH, AskedQuestions, Rankers
from flows.evaluating.suite_reports import Chart, SuiteReport, Table, Verdict
from flows.progress import show_stage
from flows.steps import Steps
from model.attention_heads import NUM_HEADS
from model.locating import SHIPPED_MODEL
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import LocalStore

FIT_SHARE = 4
"""At most one in so many of a bank's references chooses heads."""

BEIR_DEPTH = 500
"""References of a ranking from which one of documents is made: some documents are many references."""

EXPLANATION = (
    "An item is a document, all versions of it together, with the questions of all its references. 'sentence' is a "
    "sentence of a reference, which the reference has word for word; 'before' are the 64 tokens before a reference, "
    "which is what generation asks with, and the references that these stand in are left out. The answer is the "
    "reference; the kept one stands for its near-duplicates, and for a sentence any reference that has it counts. Form "
    "and sharpness of the attention score were chosen on 120 other questions of Python's documentation and PEPs, its "
    "heads on questions of references that no table uses. "
    "Fusions add 1 / (60 + rank)."
)

BEIR_EXPLANATION = (
    "A query is an item. The corpus is built to a bank of its own, a document is ranked by its best reference; one "
    "whose id is that of the query is left out of its ranking, as BEIR does. Heads for attention are chosen on "
    "questions made of the corpus, not on queries. Fusions add 1 / (60 + rank)."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """What is asked, and how attention searches.

    Attributes:
        num_references: references of the bank that questions are made of, up to two each.
        num_fit: references of whose questions heads are chosen; they are no part of the tables.
        num_heads: pairs of memory layer and KV head whose keys are searched.
        num_queries: queries of a BEIR folder, the first ones; None for all.
        seed: of the draw of references.
    """

    num_references: int = 1200
    num_fit: int = 150
    num_heads: int = NUM_HEADS
    num_queries: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number is below 1.
        """
        for name in ("num_references", "num_fit", "num_heads", "num_queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"retrieval: {name} is {value}, must be at least 1")


def run_retrieval(
    bank: Bank, options: RetrievalOptions, *, model: str | None = None, device: str | None = None, command: str = ""
) -> SuiteReport:
    """Measures the rankers on questions made from a bank.

    Args:
        bank: the version; cold memories that are searched are written and kept.
        options: what is asked.
        model: the checkpoint, by name or folder; None for the one that wrote the bank.
        device: where to compute; None for where the bank was written.
        command: the command that repeats it; made of the above if empty.

    Raises:
        InputError: no question can be made of the bank.
        WrongModelError: the bank was written by another model.
    """
    name = model or str(bank.manifest.config["memory"]["model"])
    rankers = _open_rankers(bank, name, device)
    started = time.monotonic()
    maker = BankQuestions(bank, rankers.checkpoint.tokenizer)
    num_fit = _choose_heads(rankers, maker, options)
    drawn = maker.draw_references(options.num_references, seed=options.seed, skipped=num_fit)
    questions = list(maker.make(drawn))
    if not questions:
        raise InputError(f"no question can be made of bank {bank.url}; it needs more than {num_fit} references of text")
    asked = _ask(rankers, questions)
    ranked = []
    for kind in dict.fromkeys(question.kind for question in questions):
        places = [place for place, question in enumerate(questions) if question.kind == kind]
        rankings = {way: [[hit.ref_id for hit in hits[place]] for place in places] for way, hits in asked.hits.items()}
        of_kind = [questions[place] for place in places]
        if kind == SENTENCE:
            of_kind = [_add_answers(maker, *row) for row in zip(of_kind, *rankings.values(), strict=True)]
        ranked.append(RankedQuestions(kind=kind, questions=of_kind, rankings=rankings))
    data = _describe(bank, name, rankers, questions) | {"fit_references": num_fit}
    if not command:
        source = {"--bank": bank.url, "--at": bank.manifest.version, "--model": name}
        command = make_command(source, options, device)
    return _report(ranked, rankers, asked, options, data, EXPLANATION, command, time.monotonic() - started)


def run_beir(
    folder: Path,
    options: RetrievalOptions,
    *,
    model: str | None = None,
    embedder: str = "static",
    device: str | None = None,
    command: str = "",
) -> SuiteReport:
    """Measures the rankers on a folder in the format of BEIR, which is built to a bank that is removed again.

    Args:
        folder: see :mod:`flows.evaluating.retrieval.beir_folders`.
        options: what is asked.
        model: the checkpoint, by name or folder; None for the shipped one.
        embedder: as in a build.
        device: where to compute; None for the CPU.
        command: the command that repeats it; made of the above if empty.

    Raises:
        InputError: the folder is not as described, or its corpus has too little text.
    """
    questions = read_questions(folder)[: options.num_queries]
    corpus = locate_file(folder, CORPUS_FILE)
    name = model or SHIPPED_MODEL
    with tempfile.TemporaryDirectory(prefix="memory3-beir-") as place:
        memory = {"model": name} | ({} if device is None else {"device": device})
        config = apply_changes(
            apply_changes(BuildConfig(), BUILD_SETTINGS), {"memory": memory, "embedding": {"embedder": embedder}}
        )
        store = LocalStore(Path(place) / "bank")
        build(store, [str(corpus)], config, Steps())
        bank = Bank.open(store)
        rankers = _open_rankers(bank, name, device)
        started = time.monotonic()
        maker = BankQuestions(bank, rankers.checkpoint.tokenizer)
        num_fit = _choose_heads(rankers, maker, options)
        asked = _ask(rankers, questions, BEIR_DEPTH)
        documents = DocumentRanking(bank)
        rankings = {
            way: [documents.rank(hits, get_query_id(one)) for one, hits in zip(questions, rows, strict=True)]
            for way, rows in asked.hits.items()
        }
        ranked = [RankedQuestions(kind=BEIR, questions=questions, rankings=rankings)]
        data = _describe(bank, name, rankers, questions) | {"bank": str(folder), "fit_references": num_fit}
        seconds = time.monotonic() - started
    if not command:
        source = {"--beir": folder, "--model": name, "--embedder": embedder}
        command = make_command(source, options, device)
    return _report(ranked, rankers, asked, options, data, BEIR_EXPLANATION, command, seconds)


def make_command(source: Mapping[str, Any], options: RetrievalOptions, device: str | None) -> str:
    """Returns the command that repeats a run.

    Args:
        source: by option what is asked, and by which model.
        options: how.
        device: where it was computed; None for where that is by default.
    """
    values = {
        **source,
        "--references": options.num_references,
        "--fit-references": options.num_fit,
        "--heads": options.num_heads,
        "--queries": options.num_queries,
        "--seed": options.seed,
        "--device": device,
    }
    words = [word for option, value in values.items() if value is not None for word in (option, str(value))]
    return shlex.join(["memory3", "eval", "retrieval", *words])


def _open_rankers(bank: Bank, model: str, device: str | None) -> Rankers:
    with show_stage("open"):
        return Rankers(bank, model, device=device)


def _choose_heads(rankers: Rankers, maker: BankQuestions, options: RetrievalOptions) -> int:
    """Makes the search by attention; returns of how many references it saw questions, the first of the draw."""
    num_fit = min(options.num_fit, max(1, maker.num_live // FIT_SHARE))
    questions = list(maker.make(maker.draw_references(num_fit, seed=options.seed)))
    if not questions:
        raise InputError("no question can be made of the references that choose heads; the bank has too little text")
    with show_stage("heads"):
        rankers.choose_heads(questions, options.num_heads)
    return num_fit


def _ask(rankers: Rankers, questions: Sequence[Question], depth: int = RANKING_DEPTH) -> AskedQuestions:
    answered: Counter[str] = Counter()
    with show_stage("ask", NUM_SEARCHES * len(questions), "answers", answered.total):
        return rankers.ask(questions, depth=depth, done=lambda way, number: answered.update({way: number}))


def _add_answers(maker: BankQuestions, question: Question, *rankings: list[str]) -> Question:
    """Returns a question whose answers are all that was found and has its text."""
    found = {ref_id: 1.0 for ranking in rankings for ref_id in ranking if maker.has_text(ref_id, question.text)}
    return dataclasses.replace(question, answers=question.answers | found)


def _describe(bank: Bank, model: str, rankers: Rankers, questions: Sequence[Question]) -> dict[str, Any]:
    manifest = bank.manifest
    return {
        "bank": bank.url,
        "version": manifest.version,
        "model": model,
        "fingerprint": dataclasses.asdict(manifest.fingerprint),
        "embedder": manifest.embedder_id,
        "references": rankers.num_references,
        "kept_tokens": manifest.layout.num_slots,
        "codec": manifest.layout.codec,
        "questions": dict(Counter(question.kind for question in questions)),
        "attention_bytes": rankers.attention.size_bytes,
        "heads": [dataclasses.asdict(head) for head in rankers.heads],
    }


def _make_head_table(rankers: Rankers) -> Table:
    rows: list[list[Any]] = [
        [head.layer, head.head, f"{head.value:.3f}", "yes" if head.is_chosen else ""] for head in rankers.heads
    ]
    return Table(
        title="attention: what each head finds alone, among a hundred candidates, on other questions",
        columns=["layer", "KV head", "MRR", "searched"],
        rows=rows,
        numeric=frozenset({0, 1, 2}),
    )


def _report(
    ranked: Sequence[RankedQuestions],
    rankers: Rankers,
    asked: AskedQuestions,
    options: RetrievalOptions,
    data: dict[str, Any],
    explanation: str,
    command: str,
    seconds: float,
) -> SuiteReport:
    measurements: list[Measurement] = []
    tables: list[Table] = []
    charts: list[Chart] = []
    verdicts: list[Verdict] = []
    failures: list[dict[str, Any]] = []
    with show_stage("figures"):
        for part in ranked:
            found = part.measure_all()
            sources, of_sources = make_source_table(part, found)
            differences, answers = compare_rankers(part, found)
            measurements += [
                *(one for by_name in found.values() for one in by_name.values()),
                *differences,
                *of_sources,
            ]
            tables += [make_table(part, found, asked.seconds), *([sources] if sources.rows else [])]
            charts.append(part.draw_chart())
            verdicts += answers
            failures += part.list_failures()
    data["unanswered"] = len(failures)
    return SuiteReport(
        suite="retrieval",
        title="Retrieval: embedder, BM25, the model's own attention, and fusions",
        explanation=explanation,
        command=command,
        data=data,
        settings=dataclasses.asdict(options),
        measurements=measurements,
        tables=[*tables, _make_head_table(rankers)],
        charts=charts,
        verdicts=verdicts,
        failures=failures,
        seconds=seconds,
    )
