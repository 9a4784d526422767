"""What follows from the replies to questions about facts: which tests passed, and how sure the rates are.

    replies (:mod:`flows.evaluating.knowledge.fact_tests`) -> outcomes, fact by fact -> measurements, failures

An outcome is true or false of one fact. The rates are over all facts, over those of one kind of value, and over those
of documents that the model has or has not been trained on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flows.evaluating.knowledge.auroc import measure_auroc, measure_confidence
from flows.evaluating.knowledge.fact_questions import NEW, OLD, AskedFact, ChosenFacts
from flows.evaluating.knowledge.fact_tests import FactReplies, Replies
from flows.evaluating.knowledge.questions import Reply
from flows.evaluating.measurements import CHANGE, Measurement, measure_share

EQUAL_NATS = 0.05
"""Log-likelihoods that differ by less count as equal: memories written in another batch differ in their last bits."""

UPDATE, FORGET, COUNTER = "update passed", "forget passed", "counterfactual passed"
"""The outcomes that tell whether a test has passed."""

CONTRADICTED, UNCHANGED = (
    "counterfactual passed where the unchanged bank says otherwise",
    "the same preference there with the unchanged bank",
)
"""What the bank's answer does, and what any memory would do by changing preferences."""

REPEATED, ALONE = "another memory says the old value", "update passed where no other memory says the old value"

GROUPED = {"choice", "exact", UPDATE, FORGET, COUNTER}
"""What is also measured by kind of value and by whether the document was seen."""

SEEN, UNSEEN = "documents seen in training", "documents not seen"

NO_MEMORY, RIGHT_FIRST = "no memory", ", right one first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactFigures:
    """The figures of all tests.

    Attributes:
        measurements: the rates.
        failures: the facts that failed a test.
    """

    measurements: list[Measurement]
    failures: list[dict[str, Any]]


GIVEN = "AUROC of the confidence in the answer given"


def name_way(number: int) -> str:
    """Returns what reading some memories is called."""
    return f"{number} {'memory' if number == 1 else 'memories'}"


def name_right_first(number: int) -> str:
    """Returns what reading the right memory with its neighbours is called."""
    return f"{name_way(number)}{RIGHT_FIRST}"


def judge_facts(chosen: ChosenFacts, replies: FactReplies, numbers: Sequence[int]) -> FactFigures:
    """Returns the figures of all tests.

    Args:
        chosen: the facts.
        replies: what was said about them.
        numbers: how many memories were read in all tests.
    """
    keys = [fact.key for fact in chosen.asked]
    figures: list[Measurement] = []
    failures: list[dict[str, Any]] = []
    for name, outcomes in (
        ("choice", {key: replies.plain[key].choice == OLD for key in keys}),
        ("choice by token", {key: replies.plain[key].choice_by_token == OLD for key in keys}),
        ("exact", {key: replies.plain[key].gives(OLD) for key in keys}),
    ):
        figures += _measure_groups(name, NO_MEMORY, outcomes, chosen.asked)
    for number in sorted(replies.before):
        figures += _measure_reading(name_way(number), replies.before[number], replies.references, chosen.asked)
        way = name_right_first(number)
        figures += _measure_reading(way, replies.right_first[number], replies.references, chosen.asked)
    for number in numbers:
        way = name_way(number)
        outcomes_by_name = {
            **judge_updates(replies.before[number], replies.updated[number], keys),
            REPEATED: replies.repeated[number],
            **judge_deletions(
                replies.before[number], replies.forgotten[number], replies.never[number], replies.plain, keys
            ),
            **judge_contradictions(replies.plain, replies.countered[number], replies.stated, keys),
        }
        for name, outcomes in outcomes_by_name.items():
            figures += _measure_groups(name, way, outcomes, chosen.asked)
        alone = [key for key in keys if not replies.repeated[number][key]]
        if alone:
            passed = outcomes_by_name[UPDATE]
            figures.append(measure_share(ALONE, way, alone, [passed[key] for key in alone]))
        figures += _measure_unchanged(replies, outcomes_by_name[COUNTER], number)
        figures += _measure_controls(chosen.controls, replies.before[number], replies.updated[number], way)
        figures += _measure_confidence(replies.before[number], replies.forgotten[number], keys, way)
        failures += _list_failures(number, chosen.asked, replies, outcomes_by_name)
    return FactFigures(measurements=figures, failures=failures)


def judge_updates(before: Replies, after: Replies, keys: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Returns the outcomes of the test of updates: the old value was preferred to the new one, and now it is not."""
    old_before = {key: before[key].prefers(OLD, NEW) for key in keys}
    new_after = {key: after[key].prefers(NEW, OLD) for key in keys}
    exact_before = {key: before[key].gives(OLD) for key in keys}
    exact_after = {key: after[key].gives(NEW) for key in keys}
    return {
        "old value preferred before": old_before,
        "new value preferred after": new_after,
        UPDATE: {key: old_before[key] and new_after[key] for key in keys},
        "update passed, by token": {
            key: before[key].prefers_by_token(OLD, NEW) and after[key].prefers_by_token(NEW, OLD) for key in keys
        },
        "odds moved to the new value": {
            key: measure_odds(after[key], NEW, OLD) > measure_odds(before[key], NEW, OLD) for key in keys
        },
        "old value given before": exact_before,
        "new value given after": exact_after,
        "old given before, new after": {key: exact_before[key] and exact_after[key] for key in keys},
        "old value still given": {key: after[key].gives(OLD) for key in keys},
    }


def judge_deletions(
    before: Replies, after: Replies, never: Replies, plain: Replies, keys: Sequence[str]
) -> dict[str, dict[str, bool]]:
    """Returns the outcomes of the test of deletions: the model then answers as if it had never had the document."""
    return {
        "preferred before": {key: before[key].choice == OLD for key in keys},
        "preferred after": {key: after[key].choice == OLD for key in keys},
        "preferred if never known": {key: never[key].choice == OLD for key in keys},
        "given before": {key: before[key].gives(OLD) for key in keys},
        "given after, not without memory": {key: after[key].gives(OLD) and not plain[key].gives(OLD) for key in keys},
        FORGET: {key: are_equal(after[key], never[key]) for key in keys},
    }


def judge_contradictions(
    plain: Replies, countered: Replies, stated: Mapping[str, int], keys: Sequence[str]
) -> dict[str, dict[str, bool]]:
    """Returns the outcomes of the test of contradictions: the bank's answer is preferred to that of the parameters."""
    return {
        COUNTER: {key: countered[key].prefers(stated[key], plain[key].choice) for key in keys},
        "bank's answer likeliest of all": {key: countered[key].choice == stated[key] for key in keys},
        "bank's answer given": {key: countered[key].gives(stated[key]) for key in keys},
        "parameters' answer still likeliest": {key: countered[key].choice == plain[key].choice for key in keys},
    }


def measure_odds(reply: Reply, place: int, other: int) -> float:
    """Returns by how many nats one candidate is likelier than another."""
    return reply.logprobs[place] - reply.logprobs[other]


def are_equal(reply: Reply, other: Reply) -> bool:
    """Tells whether two replies to a question are the same: answer, references and log-likelihoods up to rounding."""
    pairs = zip(reply.logprobs, other.logprobs, strict=True)
    is_close = all(abs(one - another) < EQUAL_NATS for one, another in pairs)
    return is_close and reply.given == other.given and reply.ref_ids == other.ref_ids


def _measure_groups(
    name: str, way: str, outcomes: Mapping[str, bool | float], facts: Sequence[AskedFact]
) -> list[Measurement]:
    """Returns the rate over all facts, and where it is to be known its rates in the groups."""
    keys = [fact.key for fact in facts]
    whole = measure_share(name, way, keys, [outcomes[key] for key in keys])
    if name not in GROUPED or way.endswith(RIGHT_FIRST):
        return [whole]
    groups: dict[str, list[str]] = {}
    for fact in facts:
        groups.setdefault(fact.fact.kind, []).append(fact.key)
        groups.setdefault(SEEN if fact.is_seen else UNSEEN, []).append(fact.key)
    parts = [whole.select(group, some) for group, some in sorted(groups.items()) if len(some) < len(keys)]
    return [whole, *parts]


def _measure_reading(
    way: str, replies: Replies, references: Mapping[str, tuple[str, ...]], facts: Sequence[AskedFact]
) -> list[Measurement]:
    """Returns how often the answer is right, whether the right reference was read, and how much attention it got."""
    asked = {fact.key: replies[fact.key] for fact in facts}
    attention = {
        key: sum(
            share for ref_id, share in zip(reply.ref_ids, reply.attention, strict=False) if ref_id in references[key]
        )
        for key, reply in asked.items()
    }
    outcomes: dict[str, Mapping[str, bool | float]] = {
        "choice": {key: reply.choice == OLD for key, reply in asked.items()},
        "choice by token": {key: reply.choice_by_token == OLD for key, reply in asked.items()},
        "exact": {key: reply.gives(OLD) for key, reply in asked.items()},
        "right reference read": {
            key: not set(references[key]).isdisjoint(reply.ref_ids) for key, reply in asked.items()
        },
        "attention to the right reference": attention,
    }
    figures = [part for name in outcomes for part in _measure_groups(name, way, outcomes[name], facts)]
    read = [key for key in asked if outcomes["right reference read"][key]]
    if read:
        figures.append(measure_share("choice where it was read", way, read, [outcomes["choice"][key] for key in read]))
    return figures


def _measure_controls(controls: Sequence[AskedFact], before: Replies, after: Replies, way: str) -> list[Measurement]:
    keys = [fact.key for fact in controls]
    if not keys:
        return []
    choices = [before[key].choice == after[key].choice for key in keys]
    answers = [before[key].given == after[key].given for key in keys]
    right = [(after[key].choice == OLD) - float(before[key].choice == OLD) for key in keys]
    return [
        measure_share("unchanged document, same choice", way, keys, choices),
        measure_share("unchanged document, same answer", way, keys, answers),
        measure_share("unchanged document, change of right choices", way, keys, right, unit=CHANGE),
    ]


def _measure_unchanged(replies: FactReplies, passed: Mapping[str, bool], number: int) -> list[Measurement]:
    """Returns how often the answer of the counterfactual is preferred with it in the bank, and with the bank as it was.

    The facts are those whose answer is not that of the documents, so that the bank as it was does not state it.
    """
    keys = [key for key, place in replies.stated.items() if place != OLD]
    if not keys:
        return []
    before, way = replies.before[number], name_way(number)
    preferred = [before[key].prefers(replies.stated[key], replies.plain[key].choice) for key in keys]
    return [
        measure_share(CONTRADICTED, way, keys, [passed[key] for key in keys]),
        measure_share(UNCHANGED, way, keys, preferred),
    ]


def _measure_confidence(known: Replies, unknown: Replies, keys: Sequence[str], way: str) -> list[Measurement]:
    """Returns how well confidence tells questions whose document is in the bank from those whose document is not."""

    def find_best(reply: Reply) -> float:
        return max(total / size for total, size in zip(reply.logprobs, reply.num_tokens, strict=True))

    return [
        *measure_confidence(
            GIVEN,
            way,
            {key: known[key].confidence for key in keys},
            {key: unknown[key].confidence for key in keys},
        ),
        measure_auroc(
            "AUROC of the confidence in the best candidate",
            way,
            {key: find_best(known[key]) for key in keys},
            {key: find_best(unknown[key]) for key in keys},
        ),
    ]


def _list_failures(
    number: int,
    facts: Sequence[AskedFact],
    replies: FactReplies,
    outcomes: Mapping[str, Mapping[str, bool]],
) -> list[dict[str, Any]]:
    """Returns the facts that failed a test, with what was wanted, what came, and whether the reference was read."""
    tests = {
        UPDATE: (replies.updated[number], dict.fromkeys(replies.stated, NEW)),
        FORGET: (replies.forgotten[number], {}),
        COUNTER: (replies.countered[number], replies.stated),
    }
    failures = []
    for test, (after, wanted) in tests.items():
        for fact in facts:
            if outcomes[test][fact.key]:
                continue
            reply, candidates = after[fact.key], fact.question.candidates
            was = replies.before[number][fact.key]
            failures.append(
                {
                    "test": test.removesuffix(" passed"),
                    "memories": number,
                    "key": fact.key,
                    "question": fact.question.prompt,
                    "wanted": candidates[wanted[fact.key]] if wanted else "as if never known",
                    "given": reply.given,
                    "given before": was.given,
                    "log-probabilities": dict(zip(candidates, _round(reply.logprobs), strict=True)),
                    "log-probabilities before": dict(zip(candidates, _round(was.logprobs), strict=True)),
                    "another memory says the old value": replies.repeated[number][fact.key],
                    "right reference read before": not set(replies.references[fact.key]).isdisjoint(was.ref_ids),
                }
            )
    return failures


def _round(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
