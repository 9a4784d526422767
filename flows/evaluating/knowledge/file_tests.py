"""The tests on files of questions: their texts become a bank, and the questions are asked with it and without.

    SQuAD      contexts -> bank -> right answer among others of the article, exact match, F1; answerable or not
    HaluEval   knowledge -> bank -> is the right answer likelier than the hallucinated one?
    TruthfulQA -> MC1, MC2, by the ordinary model, and with a bank of any kind if one is named

Scores are those of the field, see :mod:`flows.evaluating.knowledge.file_scores`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.evaluating.knowledge.asking import Asker, open_asker
from flows.evaluating.knowledge.auroc import measure_confidence
from flows.evaluating.knowledge.fact_banks import FactBank, FactModel
from flows.evaluating.knowledge.fact_figures import NO_MEMORY, name_way
from flows.evaluating.knowledge.facts import make_order
from flows.evaluating.knowledge.file_questions import HALUEVAL, SQUAD, TRUTHFULQA, FileOptions, ReadFiles
from flows.evaluating.knowledge.file_scores import PRIMER, measure_choices, measure_f1, normalize_squad
from flows.evaluating.knowledge.question_files import ChoiceQuestion, FileQuestion
from flows.evaluating.knowledge.questions import Question, Reply
from flows.evaluating.measurements import Measurement, measure_share, subtract
from flows.evaluating.suite_reports import Table, Verdict
from model.checkpoint import load_checkpoint
from model.overlap_filter import MAX_OVERLAP, FilteredSearch
from schemas.identifiers import hash_bytes


@dataclasses.dataclass(kw_only=True)
class FileFigures:
    """What the files gave.

    Attributes:
        measurements: the figures.
        failures: the questions that were answered wrongly with a bank.
        verdicts: whether the bank helped.
        left_out: for TruthfulQA the limit of overlap and what it left out; empty without a bank.
    """

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    left_out: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_file_tests(files: ReadFiles, options: FileOptions, model: FactModel, work: Path) -> FileFigures:
    """Builds the banks of the files' texts and asks all questions.

    Raises:
        BankError: a bank cannot be made or read.
    """
    figures = FileFigures()
    plain = Asker(load_checkpoint(model.name, device=model.device or "cpu"), chat=model.chat)
    if files.squad:
        _test_squad(files.squad, options, plain, _open_texts(files.squad, model, work / "squad"), figures)
    if files.halueval:
        _test_halueval(files.halueval, options, plain, _open_texts(files.halueval, model, work / "halueval"), figures)
    if files.truthfulqa:
        bank = files.bank
        reading = None
        if bank is not None:
            # A bank that was not made for the test: the paper's filter holds.
            reading = open_asker(bank, model.name, device=model.device, chat=model.chat, max_overlap=MAX_OVERLAP)
        _test_truthfulqa(files.truthfulqa, options, plain, reading, figures)
        if reading is not None and isinstance(reading.search, FilteredSearch):
            figures.left_out = {"max_overlap": MAX_OVERLAP, **dataclasses.asdict(reading.search.counts)}
    return figures


def tabulate_files(files: ReadFiles, figures: FileFigures) -> list[Table]:
    """Returns a table of each kind of file."""
    tables = []
    by_name: dict[str, dict[str, dict[str, Measurement]]] = defaultdict(lambda: defaultdict(dict))
    for measured in figures.measurements:
        kind, _, name = measured.name.partition(": ")
        by_name[kind][name][measured.way] = measured
    for kind, rows in by_name.items():
        ways = list(dict.fromkeys(way for row in rows.values() for way in row))
        cells = [
            [name, *(row[way].interval.format_share() if way in row else "" for way in ways)]
            for name, row in rows.items()
        ]
        number = files.count()[kind]
        tables.append(
            Table(
                title=f"{kind}, {number:,} questions",
                columns=["figure", *ways],
                rows=cells,
                numeric=frozenset(range(1, len(ways) + 1)),
            )
        )
    return tables


def _open_texts(questions: Sequence[FileQuestion], model: FactModel, folder: Path) -> Asker:
    texts = {hash_bytes(question.knowledge.encode()): question.knowledge for question in questions}
    return FactBank(folder, model).build(texts).open()


def _ask_all(
    questions: Sequence[Question], options: FileOptions, plain: Asker, reading: Asker | None, *, with_text: bool
) -> dict[str, list[Reply]]:
    """Returns replies by what was read."""
    replies = {NO_MEMORY: plain.ask(questions, 1, with_text=with_text)}
    if reading is not None:
        for number in options.numbers:
            replies[name_way(number)] = reading.ask(questions, number, with_text=with_text)
    return replies


def _word(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _test_squad(
    questions: Sequence[FileQuestion], options: FileOptions, plain: Asker, reading: Asker, figures: FileFigures
) -> None:
    asked = {question.key: question for question in questions}
    lent: dict[str, dict[str, str]] = defaultdict(dict)
    for question in questions:
        for answer in question.right[:1]:
            lent[question.topic].setdefault(normalize_squad(answer), answer)
    prepared = []
    for question in questions:
        known = {normalize_squad(answer) for answer in question.right}
        others = [answer for text, answer in lent[question.topic].items() if text and text not in known]
        others.sort(key=lambda answer: make_order(f"{question.key} {answer}"))
        # What cannot be answered has candidates too, so that there is something to be confident of.
        candidates = (*question.right[:1], *others)[: options.num_alternatives + 1]
        if candidates:
            words = question.question
            prepared.append(Question(key=question.key, prompt=_word(words), words=words, candidates=candidates))
    for way, replies in _ask_all(prepared, options, plain, reading, with_text=True).items():
        answerable = [reply for reply in replies if asked[reply.question.key].right]
        unanswerable = [reply for reply in replies if not asked[reply.question.key].right]
        choosing = [reply for reply in answerable if len(reply.question.candidates) > 1]
        exact = [
            float(any(normalize_squad(reply.given) == normalize_squad(one) for one in asked[reply.question.key].right))
            for reply in answerable
        ]
        f1 = [measure_f1(reply.given, asked[reply.question.key].right) for reply in answerable]
        keys = [reply.question.key for reply in answerable]
        if keys:
            figures.measurements += [
                measure_share(f"{SQUAD}: exact match", way, keys, exact),
                measure_share(f"{SQUAD}: F1", way, keys, f1),
            ]
        if choosing:
            names = [reply.question.key for reply in choosing]
            flags = [reply.choice == 0 for reply in choosing]
            figures.measurements.append(measure_share(f"{SQUAD}: choice", way, names, flags))
            if way != NO_MEMORY:
                figures.failures += [_describe(SQUAD, way, reply) for reply in choosing if reply.choice]
        if answerable and unanswerable:
            confidence = [
                {reply.question.key: reply.confidence for reply in some} for some in (answerable, unanswerable)
            ]
            figures.measurements += measure_confidence(f"{SQUAD}: AUROC of the confidence", way, *confidence)
    _decide(f"{SQUAD}: choice", options, figures)


def _test_halueval(
    questions: Sequence[FileQuestion], options: FileOptions, plain: Asker, reading: Asker, figures: FileFigures
) -> None:
    prepared = [
        Question(
            key=question.key,
            prompt=_word(question.question),
            words=question.question,
            candidates=(*question.right, *question.wrong),
        )
        for question in questions
    ]
    name = f"{HALUEVAL}: right answer preferred"
    for way, replies in _ask_all(prepared, options, plain, reading, with_text=False).items():
        keys = [reply.question.key for reply in replies]
        by_token = [reply.prefers_by_token(0, 1) for reply in replies]
        figures.measurements += [
            measure_share(name, way, keys, [reply.prefers(0, 1) for reply in replies]),
            measure_share(f"{name}, by token", way, keys, by_token),
        ]
        if way != NO_MEMORY:
            figures.failures += [_describe(HALUEVAL, way, reply) for reply in replies if not reply.prefers(0, 1)]
    _decide(name, options, figures)


def _test_truthfulqa(
    questions: Sequence[ChoiceQuestion], options: FileOptions, plain: Asker, reading: Asker | None, figures: FileFigures
) -> None:
    primer = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in PRIMER)
    asked = {question.key: question for question in questions}
    prepared = [
        Question(
            key=question.key,
            prompt=f"{primer}Q: {question.question}\nA:",
            words=question.question,
            candidates=tuple(dict.fromkeys((*question.single, *question.right, *question.wrong))),
            with_end=False,
        )
        for question in questions
    ]
    for way, replies in _ask_all(prepared, options, plain, reading, with_text=False).items():
        keys = [reply.question.key for reply in replies]
        pairs = [
            measure_choices(
                asked[reply.question.key], dict(zip(reply.question.candidates, reply.logprobs, strict=True))
            )
            for reply in replies
        ]
        figures.measurements += [
            measure_share(f"{TRUTHFULQA}: MC1", way, keys, [first for first, _ in pairs]),
            measure_share(f"{TRUTHFULQA}: MC2", way, keys, [second for _, second in pairs]),
        ]
    if reading is not None:
        _decide(f"{TRUTHFULQA}: MC2", options, figures)


def _decide(name: str, options: FileOptions, figures: FileFigures) -> None:
    """Adds by how much memories raise a figure, question by question, and whether they do."""
    found = {measured.way: measured for measured in figures.measurements if measured.name == name}
    for number in options.numbers:
        way = name_way(number)
        if NO_MEMORY not in found or way not in found:
            continue
        gain = subtract(name, f"{way} against none", found[way], found[NO_MEMORY])
        figures.measurements.append(gain)
        interval = gain.interval
        figures.verdicts.append(
            Verdict(
                question=f"{name}: {way} better than none?",
                holds=interval.is_above_zero,
                evidence=f"{interval.format_share()} of {interval.num_items:,} questions",
            )
        )


def _describe(test: str, way: str, reply: Reply) -> dict[str, Any]:
    scores = [round(value, 3) for value in reply.logprobs]
    return {
        "test": test,
        "memories": way,
        "key": reply.question.key,
        "question": reply.question.words,
        "wanted": reply.question.candidates[0],
        "given": reply.given,
        "log-probabilities": dict(zip(reply.question.candidates, scores, strict=True)),
    }
