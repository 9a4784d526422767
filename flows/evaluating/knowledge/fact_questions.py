"""Which facts of a catalogue are asked for, and between which answers.

facts -> one a document, unseen ones first -> question with its candidates: what the document says, what it will be
made to say, and what other documents say
"""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable

from flows.evaluating.knowledge.facts import Catalogue, Entry, Fact, make_order
from flows.evaluating.knowledge.questions import Question
from model.answering import normalize_answer
from schemas.errors import InputError

OLD, NEW = 0, 1
"""Places of candidates: what the document says, and what the test of updates makes it say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedFact:
    """A fact and its question.

    Attributes:
        fact: the fact.
        question: the question; its candidates are the value, the one it is changed to, and other documents' values.
        is_seen: whether the model was trained on the document.
    """

    fact: Fact
    question: Question
    is_seen: bool

    @property
    def key(self) -> str:
        """Its name in every run."""
        return self.fact.key


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenFacts:
    """The facts of a run.

    Attributes:
        asked: those whose documents are edited and deleted.
        controls: those whose documents stay as they are.
    """

    asked: list[AskedFact]
    controls: list[AskedFact]


def choose_facts(
    catalogue: Catalogue,
    seen: Collection[str],
    *,
    num_facts: int,
    num_controls: int,
    num_alternatives: int,
    with_fields: bool,
) -> ChosenFacts:
    """Chooses facts in an order that has nothing to do with what they say: one a document, seen ones only to fill up.

    Args:
        catalogue: the facts.
        seen: ids of documents that the model was trained on.
        num_facts: facts to edit and delete.
        num_controls: further facts that are left alone, as far as there are any.
        num_alternatives: wrong answers of each question.
        with_fields: whether a question holds the fields before the one asked for.

    Raises:
        InputError: no fact can be asked for.
    """
    values = defaultdict(list)
    for fact in catalogue.facts:
        values[fact.group].append(fact)
    chosen: list[AskedFact] = []
    taken: set[str] = set()
    for fact in sorted(catalogue.facts, key=lambda fact: (fact.doc_id in seen, make_order(fact.key))):
        others = find_alternatives(fact, values[fact.group], num_alternatives)
        if fact.doc_id in taken or len(others) < num_alternatives:
            continue
        taken.add(fact.doc_id)
        entry = catalogue.entries[fact.entry_id]
        question = make_question(fact, entry, (fact.value, *others), with_fields=with_fields)
        chosen.append(AskedFact(fact=fact, question=question, is_seen=fact.doc_id in seen))
        if len(chosen) == num_facts + num_controls:
            break
    if not chosen:
        raise InputError(
            f"no fact can be asked for: {catalogue.num_documents:,} documents have {catalogue.num_read:,} fields, "
            "none of which differs enough between them; name a larger corpus with --corpus"
        )
    # Few facts are better edited than kept as controls; of many, unseen ones are on both sides.
    num_asked = min(num_facts, max(len(chosen) - num_controls, (len(chosen) + 1) // 2))
    return ChosenFacts(asked=chosen[:num_asked], controls=chosen[num_asked:])


def find_alternatives(fact: Fact, others: Iterable[Fact], number: int) -> list[str]:
    """Returns values of the same field in other documents, different from each other and from that of a fact.

    Those of the same kind and of as many words come first, since the shorter of two answers is the likelier one for
    reasons of its own; which of these is decided by the fact's key alone.
    """
    distinct = {normalize_answer(other.value): other for other in others}
    distinct.pop(normalize_answer(fact.value), None)
    ordered = sorted(distinct, key=lambda value: (distinct[value].kind != fact.kind, make_order(f"{fact.key} {value}")))
    return [distinct[value].value for value in ordered[:number]]


def make_question(fact: Fact, entry: Entry, candidates: tuple[str, ...], *, with_fields: bool) -> Question:
    """Returns the question for a fact: its entry up to the value, and in words."""
    named = ", ".join(line.lstrip("# ") for line in entry.subject)
    return Question(
        key=fact.key,
        prompt=entry.begin(fact.field, with_fields=with_fields),
        words=f"What is the {fact.field} of {named}?",
        candidates=candidates,
    )
