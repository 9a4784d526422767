"""Questions with candidate answers, and what a model makes of them.

They are asked in :mod:`flows.evaluating.knowledge.asking`.
"""

import dataclasses

from model.answering import normalize_answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question and what may be answered.

    Attributes:
        key: its name in every run.
        prompt: the text to be continued.
        words: the same as a question in words.
        candidates: different answers; which of them is right depends on what the bank says.
        with_end: whether the end of an answer is a part of it: without it "3.1" is at least as likely as "3.10".
    """

    key: str
    prompt: str
    words: str
    candidates: tuple[str, ...]
    with_end: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model makes of a question.

    Attributes:
        question: the question.
        logprobs: of each candidate, end of the answer included, in nats.
        num_tokens: tokens that each consists of.
        given: the answer that greedy generation gives; empty if none was asked for.
        confidence: mean log-probability of its tokens; None without any.
        ref_ids: the references that were read, best first.
        attention: the share of the memory attention that each of them got while the answer was generated.
    """

    question: Question
    logprobs: tuple[float, ...]
    num_tokens: tuple[int, ...]
    given: str
    confidence: float | None
    ref_ids: tuple[str, ...] = ()
    attention: tuple[float, ...] = ()

    @property
    def choice(self) -> int:
        """The place of the likeliest candidate."""
        return max(range(len(self.logprobs)), key=lambda place: self.logprobs[place])

    @property
    def choice_by_token(self) -> int:
        """The place of the candidate of the highest log-probability a token."""
        return max(range(len(self.logprobs)), key=lambda place: self.logprobs[place] / self.num_tokens[place])

    def prefers(self, place: int, other: int) -> bool:
        """Tells whether one candidate is likelier than another."""
        return self.logprobs[place] > self.logprobs[other]

    def prefers_by_token(self, place: int, other: int) -> bool:
        """Tells whether one candidate has a higher log-probability a token than another."""
        return self.logprobs[place] / self.num_tokens[place] > self.logprobs[other] / self.num_tokens[other]

    def gives(self, place: int) -> bool:
        """Tells whether the answer given is a candidate, white space and the case of letters aside."""
        return normalize_answer(self.given) == normalize_answer(self.question.candidates[place])
