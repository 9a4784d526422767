"""The tests of knowledge on facts: what is asked of which bank.

    entries -> bank --------------------------> before; fewer and more memories; the right memory and its neighbours
                 |--copy--> values swapped, update ----------> after; then another update -> counterfactual
                 |--copy--> documents deleted ---------------> forgotten
    entries of the other documents -> a bank of its own -----> never known
    no bank --------------------------------------------------> parameters

All versions are made by the flows behind ``memory3 build``, ``update`` and ``delete``. Here questions are asked; what
follows from the replies is in :mod:`flows.evaluating.knowledge.fact_figures`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.evaluating.knowledge.asking import Asker
from flows.evaluating.knowledge.fact_banks import FactBank, FactModel
from flows.evaluating.knowledge.fact_questions import NEW, AskedFact, ChosenFacts
from flows.evaluating.knowledge.facts import Catalogue, make_order
from flows.evaluating.knowledge.questions import Question, Reply

Replies = dict[str, Reply]
"""Replies by the key of their facts."""

MAX_MEMORIES = 5
"""The most memories of the test of distractors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactReplies:
    """What a model said to the questions of all tests, by number of memories.

    Attributes:
        plain: of the parameters alone.
        before: with the bank of the documents as they are.
        updated: after the values were swapped.
        repeated: for each fact whether another memory that was read then says the old value in the same field.
        countered: after the values were made to contradict the parameters.
        stated: for each fact the place of the candidate that the bank then stated.
        forgotten: after the documents were deleted.
        never: with a bank that never had them.
        right_first: with the right memory, and its neighbours where there is more than one.
        references: for each fact the references that state it in the first bank.
    """

    plain: Replies
    before: dict[int, Replies]
    updated: dict[int, Replies]
    repeated: dict[int, dict[str, bool]]
    countered: dict[int, Replies]
    stated: dict[str, int]
    forgotten: dict[int, Replies]
    never: dict[int, Replies]
    right_first: dict[int, Replies]
    references: dict[str, tuple[str, ...]]


def run_fact_tests(
    catalogue: Catalogue, chosen: ChosenFacts, model: FactModel, work: Path, numbers: Sequence[int]
) -> FactReplies:
    """Builds the banks and asks all questions.

    Args:
        catalogue: the entries.
        chosen: the facts.
        model: writes and reads the banks.
        work: a folder for the banks.
        numbers: how many memories to read, one test after the other.

    Raises:
        BankError: a bank cannot be made, or a question does not fit the model.
    """
    asked, everything = chosen.asked, [*chosen.asked, *chosen.controls]
    texts = {entry_id: entry.text for entry_id, entry in catalogue.entries.items()}
    bank = FactBank(work / "catalogue", model).build(texts)
    found = bank.list_references([fact.fact.entry_id for fact in asked])
    references = {fact.key: found.get(fact.fact.entry_id, ()) for fact in asked}
    asker = bank.open()
    right = asker.put_first(references, [fact.question for fact in asked])
    distractors = sorted({*range(1, MAX_MEMORIES + 1), *numbers})
    before = {
        number: _ask(asker, everything if number in numbers else asked, number, "before") for number in distractors
    }
    right_first = {number: _ask(right, asked, number, "right one") for number in distractors}
    plain = _ask(Asker(asker.checkpoint, chat=model.chat), asked, 1, "plain")

    edited = bank.copy(work / "updated")
    edited.update(texts | _state(catalogue, asked, {fact.key: NEW for fact in asked}))
    asker = edited.open()
    updated = {number: _ask(asker, everything, number, "updated") for number in numbers}
    repeated = {number: _find_repeated(edited, asked, updated[number]) for number in numbers}
    stated = {fact.key: choose_other(plain[fact.key]) for fact in asked}
    edited.update(texts | _state(catalogue, asked, stated))
    asker = edited.open()
    countered = {number: _ask(asker, asked, number, "countered") for number in numbers}

    gone = {fact.fact.entry_id for fact in asked}
    emptied = bank.copy(work / "deleted")
    emptied.delete(gone)
    asker = emptied.open()
    forgotten = {number: _ask(asker, asked, number, "forgotten") for number in numbers}
    others = {entry_id: text for entry_id, text in texts.items() if entry_id not in gone}
    asker = FactBank(work / "never", model).build(others).open()
    never = {number: _ask(asker, asked, number, "never had") for number in numbers}
    return FactReplies(
        plain=plain,
        before=before,
        updated=updated,
        repeated=repeated,
        countered=countered,
        stated=stated,
        forgotten=forgotten,
        never=never,
        right_first=right_first,
        references=references,
    )


def choose_other(reply: Reply) -> int:
    """Returns a candidate that contradicts the parameters: any but the one they find likeliest, the same every time."""
    others = [place for place in range(len(reply.logprobs)) if place != reply.choice]
    return min(others, key=lambda place: make_order(f"{reply.question.key} {reply.question.candidates[place]}"))


def _state(catalogue: Catalogue, asked: Sequence[AskedFact], stated: Mapping[str, int]) -> dict[str, str]:
    """Returns the entries of facts as texts in which the fact is one of the candidates of its question."""
    return {
        fact.fact.entry_id: catalogue.entries[fact.fact.entry_id]
        .change(fact.fact.field, fact.question.candidates[stated[fact.key]])
        .text
        for fact in asked
    }


def _find_repeated(bank: FactBank, asked: Sequence[AskedFact], replies: Replies) -> dict[str, bool]:
    """Tells for each fact whether a memory that was read still says its old value: one of another document."""
    texts = bank.read_texts(ref_id for fact in asked for ref_id in replies[fact.key].ref_ids)
    return {
        fact.key: any(
            f"{fact.fact.field}: {fact.fact.value}" in texts[ref_id].splitlines()
            for ref_id in replies[fact.key].ref_ids
        )
        for fact in asked
    }


def _ask(asker: Asker, facts: Sequence[AskedFact], number: int, stage: str) -> Replies:
    questions: list[Question] = [fact.question for fact in facts]
    replies = asker.ask(questions, number, f"{stage} {number}")
    return {reply.question.key: reply for reply in replies}
