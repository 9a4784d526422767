"""``memory3 eval knowledge``: does a model know what its bank says, and what it no longer says?

corpus -> facts -> tests on banks that are built, updated and deleted from -> figures
files with questions (:mod:`flows.evaluating.knowledge.question_files`) -> their own tests -> figures
"""

import dataclasses
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.evaluating.knowledge.fact_banks import FactBank, FactModel
from flows.evaluating.knowledge.fact_figures import judge_facts
from flows.evaluating.knowledge.fact_questions import ChosenFacts, choose_facts
from flows.evaluating.knowledge.fact_report import chart_facts, decide_facts, tabulate_facts
from flows.evaluating.knowledge.fact_tests import run_fact_tests
from flows.evaluating.knowledge.facts import Catalogue, make_catalogue, read_documents
from flows.evaluating.knowledge.file_questions import ReadFiles, read_files
from flows.evaluating.knowledge.file_tests import run_file_tests, tabulate_files
from flows.evaluating.suite_reports import SuiteReport
from flows.progress import show_stage
from model.checkpoint import load_checkpoint
from model.locating import REFERENCE_TOKENS, SHIPPED_MODEL
from model.reading import MEMORIES_PER_CHUNK
from model.tokenizing import load_tokenizer
from model.training.chat import load_chat_template
from schemas.bank import Bank
from schemas.errors import InputError

EXPLANATION = (
    "An item is a question about one field of one document, or one question of a file. References that hold the "
    "answer are not left out: whether they are read and believed is what is asked. A choice is right if the right "
    "answer, with its end, is the likeliest of the candidates; an answer is exact if greedy generation gives it. "
    "Banks of facts are made of short entries, the headers and tables of documents, and not of whole documents. The "
    "rate of the counterfactual is 0 without memory by construction; how much of it any memory would give, by changing "
    "preferences, is shown by the same preference with the unchanged bank. For TruthfulQA references of the named "
    "bank that overlap a question by more than 2/3 are left out. "
    "Intervals are 95 %, by bootstrap over items."
)

FORMS = ("entry", "subject")
"""What a question holds: the entry up to the field asked for, or its subject and the name of the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeOptions:
    """What is asked, and how.

    Attributes:
        corpus: files and folders with documents that have structured fields.
        seen: more of them, which the model was trained on: asked for where the corpus has too few facts.
        squad: files of questions in SQuAD's format.
        halueval: files of questions in the format of HaluEval's questions and answers.
        truthfulqa: files of questions in TruthfulQA's format.
        bank: a bank that is read for TruthfulQA, whose files come without texts.
        version: the version of it that is read, see :func:`schemas.tags.find_version`.
        model: ``memory3-tiny`` or the folder of a checkpoint.
        num_facts: facts in each test.
        num_controls: facts of documents that are left alone.
        num_alternatives: wrong answers of each question.
        num_memories: memories to read; one is always measured beside it.
        form: one of :data:`FORMS`.
        with_chat: ask in words, through the model's chat template.
        limit: questions of each file; None for all.
        work: a folder for the banks; None for a temporary one.
        device: where to compute.
    """

    corpus: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    squad: tuple[Path, ...] = ()
    halueval: tuple[Path, ...] = ()
    truthfulqa: tuple[Path, ...] = ()
    bank: str | None = None
    version: str | None = None
    model: str = SHIPPED_MODEL
    num_facts: int = 200
    num_controls: int = 100
    num_alternatives: int = 4
    num_memories: int = MEMORIES_PER_CHUNK
    form: str = "entry"
    with_chat: bool = False
    limit: int | None = None
    work: Path | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds, or there is nothing to ask.
        """
        if not (self.corpus or self.squad or self.halueval or self.truthfulqa):
            raise InputError("nothing to ask; name documents with --corpus, or questions with --squad, --halueval ...")
        if self.version is not None and self.bank is None:
            raise InputError("--at names a version of a bank; name the bank with --bank")
        if self.seen and not self.corpus:
            raise InputError("--seen only fills up --corpus; name the documents to ask about with --corpus")
        least = {"num_facts": 2, "num_controls": 1, "num_alternatives": 1, "num_memories": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"knowledge: {name} is {getattr(self, name)}, must be at least {bound}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"knowledge: limit is {self.limit}, must be at least 1")
        if self.form not in FORMS:
            raise InputError(f"knowledge: form is {self.form!r}, must be one of {', '.join(FORMS)}")

    @property
    def numbers(self) -> list[int]:
        """The numbers of memories that everything is measured with."""
        return sorted({1, self.num_memories})

    def to_json(self) -> dict[str, Any]:
        """Returns the options as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("squad", "halueval", "truthfulqa"):
            values[name] = [str(path) for path in values[name]]
        return {**values, "work": None if self.work is None else str(self.work)}


def run_knowledge(options: KnowledgeOptions) -> SuiteReport:
    """Runs the tests.

    Raises:
        InputError: there is no fact to ask for, a file cannot be read, or a question does not fit the model.
        BankError: see its other subclasses.
    """
    files = read_files(options)  # what is wrong with them is to be told before anything is computed
    with show_stage("model"):
        checkpoint = load_checkpoint(options.model, device=options.device or "cpu")
        chat = load_chat_template(options.model, checkpoint) if options.with_chat else None
    model = FactModel(name=options.model, device=options.device, chat=chat)
    started = time.monotonic()
    if options.work is not None:
        if options.work.exists() and any(options.work.iterdir()):
            raise InputError(f"{options.work} is not empty; name a new folder with --work")
        return _run_in(options.work, options, model, files, started)
    with tempfile.TemporaryDirectory(prefix="memory3-knowledge-") as folder:
        return _run_in(Path(folder), options, model, files, started)


def read_facts(options: KnowledgeOptions) -> tuple[Catalogue, ChosenFacts]:
    """Returns the facts of the corpora, and those that are asked for."""
    tokenizer = load_tokenizer(options.model)

    def count_tokens(texts: Sequence[str]) -> list[int]:
        return [len(tokens) for tokens in tokenizer.encode(list(texts))]

    with show_stage("facts"):
        documents = read_documents(options.corpus)
        known = {doc_id for doc_id, _, _ in documents}
        seen = [row for row in read_documents(options.seen) if row[0] not in known] if options.seen else []
        catalogue = make_catalogue([*documents, *seen], count_tokens, REFERENCE_TOKENS)
        chosen = choose_facts(
            catalogue,
            {doc_id for doc_id, _, _ in seen},
            num_facts=options.num_facts,
            num_controls=options.num_controls,
            num_alternatives=options.num_alternatives,
            with_fields=options.form == "entry",
        )
    return catalogue, chosen


def _run_in(work: Path, options: KnowledgeOptions, model: FactModel, files: ReadFiles, started: float) -> SuiteReport:
    data: dict[str, Any] = {"model": options.model}
    measurements, failures, tables, charts, verdicts = [], [], [], [], []
    if options.corpus:
        catalogue, chosen = read_facts(options)
        replies = run_fact_tests(catalogue, chosen, model, work / "facts", options.numbers)
        figures = judge_facts(chosen, replies, options.numbers)
        data["facts"] = describe_catalogue(catalogue, chosen)
        data["corpora_sha256"] = catalogue.corpora_sha256
        measurements += figures.measurements
        failures += figures.failures
        tables += tabulate_facts(figures.measurements, chosen, options.numbers)
        charts += chart_facts(figures.measurements)
        verdicts += decide_facts(figures.measurements, options.numbers)
    if files.num_questions:
        found = run_file_tests(files, options, model, work / "files")
        data["files"] = files.describe() | ({"filter": found.left_out} if found.left_out else {})
        measurements += found.measurements
        failures += found.failures
        tables += tabulate_files(files, found)
        verdicts += found.verdicts
    if files.bank is not None:
        # Another run is to read the same version, whatever is published meanwhile.
        options = dataclasses.replace(options, version=str(files.bank.manifest.version))
    built = [
        folder for folder in (work / "facts" / "catalogue", *sorted((work / "files").glob("*"))) if folder.is_dir()
    ]
    if built:
        # All banks of a run are made by the same model in the same way.
        data["fingerprint"] = dataclasses.asdict(Bank.open(FactBank(built[0], model).store).manifest.fingerprint)
    return SuiteReport(
        suite="knowledge",
        title="Does the model know what its bank says, and what it no longer says?",
        explanation=EXPLANATION,
        command=make_command(options),
        data=data,
        settings=options.to_json(),
        measurements=measurements,
        tables=tables,
        charts=charts,
        verdicts=verdicts,
        failures=failures,
        seconds=time.monotonic() - started,
    )


def describe_catalogue(catalogue: Catalogue, chosen: ChosenFacts) -> dict[str, Any]:
    """Returns the numbers of what was read, kept, dropped and asked, as JSON values."""
    return {
        "documents": catalogue.num_documents,
        "entries": len(catalogue.entries),
        "fields_read": catalogue.num_read,
        "facts_kept": len(catalogue.facts),
        "fields_dropped": catalogue.dropped,
        "facts_asked": len(chosen.asked),
        "of_seen_documents": sum(fact.is_seen for fact in chosen.asked),
        "controls": len(chosen.controls),
    }


def make_command(options: KnowledgeOptions) -> str:
    """Returns the command that repeats a run, without what is as by default."""
    words = ["memory3", "eval", "knowledge"]
    names = {"num_facts": "facts", "num_controls": "controls", "num_alternatives": "alternatives"}
    names |= {"num_memories": "memories", "with_chat": "chat", "version": "at"}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        option = f"--{names.get(field.name, field.name)}"
        # Another run needs another folder for its banks.
        if value == field.default or field.name == "work":
            continue
        if value is True:
            words.append(option)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option, str(one)]
    return shlex.join(words)
