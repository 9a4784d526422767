"""Requests that are generated together: one prompt each, with its own settings, all advancing token by token.

Where it stands: the queue (:mod:`flows.serving.queueing`) makes batches of what waits and calls them in the thread that
owns the model; what a step brings goes back to the requests as events.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from collections.abc import Generator as Steps

from flows.serving.cited_answers import AnswerCitations, AnswerCiter
from flows.serving.editions import Edition
from flows.serving.growing_text import UNFINISHED, GrowingText
from flows.serving.response_models import FinishReason
from model.chunk_memories import ChunkTrace
from model.citing import CitedChunk, CitedText, list_reads
from model.generating import GenerationConfig, Generator
from model.knowledge import Knowledge
from model.reading import CHUNK_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt to be continued.

    Attributes:
        tokens: the prompt, with what a context begins with.
        config: how to continue it.
        with_memory: whether memories are read.
        stops: sequences that end the text.
        end_token_id: a token that ends the text beside those of the model, None for none.
        trims_start: leave out the white space that the text begins with.
        traces: whether it is told what each chunk has read.
        cites: whether it is told which of that its text is owed to.
    """

    tokens: Sequence[int]
    config: GenerationConfig
    with_memory: bool = True
    stops: tuple[str, ...] = ()
    end_token_id: int | None = None
    trims_start: bool = False
    traces: bool = False
    cites: bool = False

    @property
    def kind(self) -> tuple[bool, int]:
        """What the prompts of a batch have in common."""
        return self.with_memory, self.config.num_memories


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedChunk:
    """A chunk of a prompt or its continuation that has been read, and what it has read.

    Attributes:
        trace: what it has read.
        num_tokens: its tokens; none if the text ended before the first.
        text: its text. That of all chunks joins to the whole: a letter of two chunks belongs to the one that ends it.
    """

    trace: ChunkTrace
    num_tokens: int
    text: str

    @property
    def version(self) -> int:
        """The version of the bank that it retrieved from."""
        assert self.trace.version is not None
        return self.trace.version


@dataclasses.dataclass(frozen=True, kw_only=True)
class CitingChunk:
    """A generated chunk, and what it cites.

    Attributes:
        chunk: the chunk with its citations.
        text: its text; that of all generated chunks joins to the whole.
    """

    chunk: CitedChunk
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a step has brought for one prompt.

    Attributes:
        versions: versions of the bank that were read so far, the last of them now.
        text: the text that has become certain.
        num_tokens: tokens generated so far.
        finish_reason: ``stop`` or ``length`` if this is the end.
        chunks: the chunks that have ended since the progress before, where they are asked for.
        citations: of all generated chunks, at the end, where they are asked for.
        citation_problem: why there are none.
    """

    versions: tuple[int, ...]
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    chunks: list[TracedChunk] = dataclasses.field(default_factory=list)
    citations: list[CitingChunk] = dataclasses.field(default_factory=list)
    citation_problem: str | None = None

    @property
    def version(self) -> int:
        """The version that is read now."""
        return self.versions[-1]


class _Sequence:
    """One prompt of a batch while it is continued."""

    def __init__(self, task: Task, generator: Generator) -> None:
        self.task = task
        self.text = GrowingText(generator.checkpoint.tokenizer.decode, task.stops, trims_start=task.trims_start)
        self.num_tokens = 0
        self.is_finished = False
        self._decode = generator.checkpoint.tokenizer.decode
        self._context = list(task.tokens)
        self._num_told = 0
        self.is_ended = False  # by what was generated, or from outside

    def add(self, token: int) -> str:
        """Takes note of the next token and returns the text that has become certain."""
        if token == self.task.end_token_id:
            self.is_ended = True
            return ""
        self.num_tokens += 1
        self._context.append(token)
        text = self.text.add(token)
        self.is_ended = self.text.is_stopped
        return text

    def list_new(self, chunks: Sequence[ChunkTrace]) -> list[TracedChunk]:
        """Returns those chunks that were not told before, if they are asked for."""
        if not self.task.traces:
            return []
        new, self._num_told = chunks[self._num_told :], len(chunks)
        return [self._describe(chunk) for chunk in new]

    def _describe(self, chunk: ChunkTrace) -> TracedChunk:
        start, num_prompt = chunk.first_token, len(self.task.tokens)
        end = min(start + CHUNK_TOKENS, num_prompt if start < num_prompt else len(self._context))
        text = self._get_text(end)[len(self._get_text(start)) :]
        return TracedChunk(trace=chunk, num_tokens=end - start, text=text)

    def list_citing(self, citations: AnswerCitations) -> list[CitingChunk]:
        """Returns the generated chunks with their texts and citations."""
        found = []
        for chunk in citations.chunks:
            start = chunk.first_token
            text = self._get_text(start + len(chunk.tokens))[len(self._get_text(start)) :]
            found.append(CitingChunk(chunk=chunk, text=text))
        return found

    def make_cited(self, chunks: Sequence[ChunkTrace]) -> CitedText | None:
        """Returns the text as it is cited; None if there is none."""
        num_prompt = len(self.task.tokens)
        generated = tuple(self._context[num_prompt:])
        if not generated:
            return None
        reads = list_reads(chunks, num_prompt, len(generated))
        return CitedText(prompt=tuple(self.task.tokens), generated=generated, reads=reads)

    def _get_text(self, end: int) -> str:
        text = self._decode(self._context[:end])
        return text if self.is_finished and end == len(self._context) else text.rstrip(UNFINISHED)


class Batch:
    """Prompts that are continued together, each chunk with the version of the bank that is served when it retrieves.

    Attributes:
        editions: what is read now, and before it what was read until then, if anything.
    """

    def __init__(self, find_edition: Callable[[], Edition], tasks: Sequence[Task]) -> None:
        """Begins a batch; nothing is computed before the first step.

        Args:
            find_edition: returns what is served at the moment; may be called from any thread.
            tasks: prompts of one kind.
        """
        self.editions = [find_edition()]
        self._find_edition = find_edition
        self._versions: tuple[int, ...] = () if tasks[0].with_memory else (self.edition.version,)
        self._generator = self.edition.make_generator(with_memory=tasks[0].with_memory, renew=self._renew)
        self._sequences = [_Sequence(task, self._generator) for task in tasks]
        self._cancelled: set[int] = set()
        self._citing: dict[int, AnswerCiter] = {}
        self._steps = self._run()

    @property
    def edition(self) -> Edition:
        """What is read now."""
        return self.editions[-1]

    def _renew(self) -> Knowledge:
        """Goes over to the edition of the moment, unless it is for another writer, whose memories have another form."""
        newest = self._find_edition()
        if newest is not self.edition and newest.writer is self.edition.writer:
            self.editions = [self.edition, newest]
        if self.edition.version not in self._versions[-1:]:
            self._versions += (self.edition.version,)
        return self.edition.knowledge

    @property
    def num_running(self) -> int:
        """Prompts that are not finished."""
        return sum(not sequence.is_finished for sequence in self._sequences)

    @property
    def num_retrievals(self) -> int:
        """Queries asked so far."""
        return self._generator.num_retrievals

    def cancel(self, row: int) -> None:
        """Ends one prompt with its next token; may be called from any thread."""
        self._cancelled.add(row)

    def step(self) -> dict[int, Progress] | None:
        """Generates the next token of every prompt.

        Returns:
            What it brings, by the number of the prompt; None if all are finished.

        Raises:
            BankError: a memory cannot be read.
        """
        return next(self._steps, None)

    def close(self) -> None:
        """Ends the batch as it is; called in the thread that calls :meth:`step`."""
        self._steps.close()

    def _is_ended(self, row: int) -> bool:
        return self._sequences[row].is_ended or row in self._cancelled

    def _run(self) -> Steps[dict[int, Progress], None, None]:
        contexts = [sequence.task.tokens for sequence in self._sequences]
        configs = [sequence.task.config for sequence in self._sequences]
        nothing: list[int | None] = [None] * len(contexts)
        steps = self._generator.stream_tokens(contexts, configs, self._is_ended)
        try:
            for tokens in itertools.chain(steps, [nothing]):
                found: dict[int, Progress] = {}
                for row, (sequence, token) in enumerate(zip(self._sequences, tokens, strict=True)):
                    if token is not None:
                        text = sequence.add(token)
                        if text or sequence.num_tokens == 1:
                            found[row] = self._report(row, sequence, text)
                    elif not sequence.is_finished and row not in self._citing and not self._begin_citing(row):
                        found[row] = self._report_end(row)
                yield found | self._cite_next()
            while self._citing:
                yield self._cite_next()
        finally:
            steps.close()

    def _begin_citing(self, row: int) -> bool:
        """Takes up the citations of a text that has ended; returns whether there are any to be found."""
        sequence, chunks = self._sequences[row], self._generator.trace.chunks[row]
        text = sequence.make_cited(chunks) if sequence.task.cites and row not in self._cancelled else None
        if text is None:
            return False
        versions = {chunk.version for chunk in chunks if chunk.version is not None}
        self._citing[row] = AnswerCiter(self._find_edition, text, versions, sequence.task.config.num_memories)
        return True

    def _cite_next(self) -> dict[int, Progress]:
        """Cites a chunk of the text that has waited longest; with its last chunk the text is told to have ended."""
        row = next(iter(self._citing), None)
        if row is None:
            return {}
        citations = AnswerCitations(chunks=[]) if row in self._cancelled else self._citing[row].step()
        if citations is None:
            return {}
        del self._citing[row]
        return {row: self._report_end(row, citations)}

    def _report(self, row: int, sequence: _Sequence, text: str) -> Progress:
        return Progress(
            versions=self._versions,
            text=text,
            num_tokens=sequence.num_tokens,
            chunks=sequence.list_new(self._generator.trace.chunks[row]),
        )

    def _report_end(self, row: int, citations: AnswerCitations | None = None) -> Progress:
        sequence = self._sequences[row]
        sequence.is_finished = True
        text = sequence.text.finish()
        is_full = sequence.num_tokens == sequence.task.config.max_new_tokens
        return Progress(
            versions=self._versions,
            text=text,
            num_tokens=sequence.num_tokens,
            finish_reason="length" if is_full and not sequence.text.is_stopped else "stop",
            chunks=sequence.list_new(self._generator.trace.chunks[row]),
            citations=[] if citations is None else sequence.list_citing(citations),
            citation_problem=None if citations is None else citations.problem,
        )
