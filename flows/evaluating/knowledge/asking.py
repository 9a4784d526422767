"""Questions with candidate answers, asked of a model with the memories of a bank or without.

    question -> log-likelihood of each candidate (:mod:`model.loglikelihoods`), text that the generator gives -> reply

By default a question is the beginning of a text and an answer what follows on the same line, since a model that was
trained on text alone continues and does not answer. With a chat template it is asked in words.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from flows.evaluating.knowledge.questions import Question, Reply
from flows.generation import open_writer
from flows.progress import show_stage
from flows.searching import open_retriever
from flows.serving.growing_text import GrowingText
from model.checkpoint import Checkpoint
from model.fetching import BankMemories
from model.generating import GenerationConfig, Generator
from model.loglikelihoods import BATCH_SIZE, ScoredSequence, SequenceScorer
from model.overlap_filter import FilteredSearch, Questions, QuestionSearch
from model.reading import CHUNK_TOKENS
from model.retrieving import Hit
from model.training.chat import ChatTemplate
from schemas.bank import Bank

QUESTIONS_AT_ONCE = 32

MAX_ANSWER_TOKENS = CHUNK_TOKENS - 8
"""Longer answers are cut: within a chunk an answer reads one set of memories."""

LINE_END = "\n"


class RightFirst:
    """A search that puts known references first, and what else it finds behind them."""

    def __init__(self, search: QuestionSearch, right: Mapping[Questions, Sequence[str]]) -> None:
        """Takes a search and the references that each question is to read first."""
        self._search, self._right = search, right

    def search(self, texts: Sequence[str], questions: Sequence[Questions], num_hits: int) -> list[list[Hit]]:
        """Returns the references of each question, and the nearest others in their order."""
        found = []
        for asked, hits in zip(questions, self._search.search(texts, questions, num_hits), strict=True):
            first = [Hit(ref_id=ref_id, score=1.0) for ref_id in self._right.get(asked, ())]
            known = {hit.ref_id for hit in first}
            found.append([*first, *(hit for hit in hits if hit.ref_id not in known)][:num_hits])
        return found


class Asker:
    """Asks a model questions.

    Attributes:
        checkpoint: the model.
        search: finds what it reads; None for the ordinary model.
        memories: fetches it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        search: QuestionSearch | None = None,
        memories: BankMemories | None = None,
        *,
        generator: Generator | None = None,
        chat: ChatTemplate | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Joins a model with what it reads; see :func:`open_asker`.

        Args:
            checkpoint: the model.
            search: finds memories; None for the ordinary model.
            memories: fetches them.
            generator: generates with them.
            chat: the template to ask with; None to have texts continued.
            batch_size: sequences that are read together.
        """
        self.checkpoint = checkpoint
        self.search, self.memories, self._batch_size = search, memories, batch_size
        self._generator = Generator(checkpoint) if generator is None else generator
        self._chat = chat

    def put_first(self, right: Mapping[str, Sequence[str]], questions: Sequence[Question]) -> "Asker":
        """Returns an asker that reads known references first.

        Args:
            right: by key of a question the references.
            questions: what will be asked.
        """
        assert self.search is not None
        by_tokens: dict[Questions, tuple[str, ...]] = {
            (self.encode_question(question),): tuple(right[question.key])
            for question in questions
            if question.key in right
        }
        return Asker(
            self.checkpoint,
            RightFirst(self.search, by_tokens),
            self.memories,
            generator=self._generator,
            chat=self._chat,
            batch_size=self._batch_size,
        )

    def encode_question(self, question: Question) -> tuple[int, ...]:
        """Returns the tokens of a prompt."""
        if self._chat is not None:
            return tuple(self._chat.render_question(question.words))
        tokens = self.checkpoint.tokenizer.encode([question.prompt])[0].tolist()
        return (*self.checkpoint.bos_token_ids, *tokens)

    def encode_answers(self, question: Question) -> list[tuple[int, ...]]:
        """Returns the tokens of the candidates as they follow the prompt, with what ends them if that is asked for."""
        if self._chat is not None:
            answers = [tuple(self._chat.encode_answer(answer).tolist()) for answer in question.candidates]
            return answers if question.with_end else [tokens[:-1] for tokens in answers]
        end = LINE_END if question.with_end else ""
        encoded = self.checkpoint.tokenizer.encode([f" {answer}{end}" for answer in question.candidates])
        return [tuple(tokens.tolist()) for tokens in encoded]

    def ask(
        self, questions: Sequence[Question], num_memories: int, stage: str = "ask", *, with_text: bool = True
    ) -> list[Reply]:
        """Asks questions, many at a time.

        Args:
            questions: the questions; those with equal prompts may have different candidates.
            num_memories: memories that each reads; of no meaning without a bank.
            stage: what the progress calls it.
            with_text: whether an answer is generated too.

        Raises:
            InputError: a question does not fit the model, or cannot be written in the chat template.
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        prompts = [self.encode_question(question) for question in questions]
        answers = [self.encode_answers(question) for question in questions]
        replies: list[Reply | None] = [None] * len(questions)
        # Prompts of about the same length go together: the shorter ones of a batch are padded.
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
        done = 0
        with show_stage(stage, len(questions), "questions", lambda: done):
            for start in range(0, len(order), QUESTIONS_AT_ONCE):
                rows = order[start : start + QUESTIONS_AT_ONCE]
                given = [_GivenAnswer()] * len(rows)
                if with_text:
                    given = self._generate([prompts[row] for row in rows], [answers[row] for row in rows], num_memories)
                sequences = [
                    ScoredSequence(context=prompts[row], continuation=answer, questions=(prompts[row],))
                    for row, reply in zip(rows, given, strict=True)
                    for answer in (*answers[row], *([reply.tokens] if reply.tokens else []))
                ]
                scores = iter(self._make_scorer(num_memories).score(sequences))
                for row, reply in zip(rows, given, strict=True):
                    totals = tuple(next(scores).total for _ in answers[row])
                    replies[row] = Reply(
                        question=questions[row],
                        logprobs=totals,
                        num_tokens=tuple(map(len, answers[row])),
                        given=reply.text,
                        # An answer without a token is the end of the text at once; nothing is known of it.
                        confidence=next(scores).total / len(reply.tokens) if reply.tokens else None,
                        ref_ids=reply.ref_ids,
                        attention=reply.attention,
                    )
                done += len(rows)
        return [reply for reply in replies if reply is not None]

    def _make_scorer(self, num_memories: int) -> SequenceScorer:
        return SequenceScorer(
            self.checkpoint,
            self.search,
            self.memories,
            num_memories=num_memories,
            batch_size=self._batch_size,
        )

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], answers: Sequence[Sequence[tuple[int, ...]]], num_memories: int
    ) -> "list[_GivenAnswer]":
        """Returns what the generator says, with room for the longest candidate of each question."""
        ends = () if self._chat is None else (self._chat.end_token_id,)
        texts = [
            GrowingText(self.checkpoint.tokenizer.decode, () if self._chat is not None else (LINE_END,))
            for _ in prompts
        ]
        configs = [
            GenerationConfig(
                max_new_tokens=min(MAX_ANSWER_TOKENS, max(map(len, of_question)) + 2),
                num_memories=num_memories,
                prefetch_tokens=0,
            )
            for of_question in answers
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        given = [""] * len(prompts)

        def is_ended(row: int) -> bool:
            return texts[row].is_stopped or tokens[row][-1:] in ([end] for end in ends)

        find: Callable[[Sequence[int], Sequence[str], int], list[list[Hit]]] | None = None
        search = self.search
        if search is not None:
            found = search  # for the closure, whose type is then known

            def find(rows: Sequence[int], queries: Sequence[str], num_hits: int) -> list[list[Hit]]:
                return found.search(queries, [(prompts[row],) for row in rows], num_hits)

        for step in self._generator.stream_tokens(prompts, configs, is_ended, find):
            for row, token in enumerate(step):
                if token is not None:
                    tokens[row].append(token)
                    if token not in ends:
                        given[row] += texts[row].add(token)
        traces = [chunks[-1] if chunks else None for chunks in self._generator.trace.chunks]
        return [
            _GivenAnswer(
                tokens=tuple(tokens[row]),
                text=(given[row] + texts[row].finish()).strip(),
                ref_ids=() if trace is None else tuple(hit.ref_id for hit in trace.hits),
                attention=() if trace is None else tuple(trace.attention),
            )
            for row, trace in enumerate(traces)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GivenAnswer:
    """What the generator said, and what it read while it did."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    ref_ids: tuple[str, ...] = ()
    attention: tuple[float, ...] = ()


def open_asker(
    bank: Bank,
    model: str,
    *,
    device: str | None = None,
    chat: ChatTemplate | None = None,
    max_overlap: float = 1,
) -> Asker:
    """Opens a bank for questions.

    Args:
        bank: the bank.
        model: the checkpoint, by name or folder.
        device: where to compute; None for where the bank was written.
        chat: the template to ask with; None to have texts continued.
        max_overlap: the greatest overlap of a reference with a question at which it is read. 1 leaves none out, which
            is for banks that are made to hold the answers.
    """
    memories = BankMemories(bank, open_writer(bank, model, device=device))
    retriever = open_retriever(bank)
    return Asker(
        memories.checkpoint,
        FilteredSearch(bank, retriever, max_overlap=max_overlap),
        memories,
        generator=Generator(memories.checkpoint, retriever, memories),
        chat=chat,
    )
