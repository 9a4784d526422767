"""Generation: text token by token, new memories every 64 generated tokens, several prompts at a time.

A prompt is split into chunks of 64 tokens; each retrieves with its own text and all are read in one call. The first
generated chunk inherits the memories of the last prompt chunk; when 64 tokens have been generated, those 64 are the
query for the next memories (method section 6). A prompt of 128 tokens and 128 generated ones make 3 retrievals. Prompts
of a batch may differ in length; each sequence reads its own memories.
"""

import collections.abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from model.checkpoint import Checkpoint
from model.chunk_memories import ChunkMemories, ChunkTrace, FindHits, GenerationTrace, pad_contexts
from model.fetching import FetchedMemories, FetchStatistics
from model.knowledge import Knowledge, KnowledgeSource
from model.prefetching import Prefetcher
from model.reading import CHUNK_TOKENS, MEMORIES_PER_CHUNK, ReadingSession
from model.retrieving import MemorySearch
from model.sampling import SamplingConfig, TokenChooser
from model.text_references import ReferenceTexts
from schemas.errors import InputError

PREFETCH_TOKENS = 16
"""Tokens before the end of a chunk at which the loads for the next begin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How to generate.

    Attributes:
        max_new_tokens: when to stop at the latest.
        num_memories: memories a chunk, or references in the prompt.
        prefetch_tokens: tokens before the end of a chunk at which the loads for the next begin; 0 is off.
        stop_at_end: False goes on past the end-of-text token, so that every sequence has ``max_new_tokens``.
    """

    max_new_tokens: int = 128
    num_memories: int = MEMORIES_PER_CHUNK
    prefetch_tokens: int = PREFETCH_TOKENS
    stop_at_end: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise InputError(f"generation: max_new_tokens is {self.max_new_tokens}, must be at least 1")
        if self.num_memories < 1:
            raise InputError(f"generation: num_memories is {self.num_memories}, must be at least 1")
        if not 0 <= self.prefetch_tokens < CHUNK_TOKENS:
            raise InputError(f"generation: prefetch_tokens is {self.prefetch_tokens}, must be 0 to {CHUNK_TOKENS - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedPiece:
    """A piece of generated text.

    Attributes:
        text: the text that has become certain; may be empty in the middle of a letter.
        token_id: the token.
    """

    text: str
    token_id: int


class Generator:
    """Generates from prompts: with the memories of a bank, with its references as text, or without either.

    Attributes:
        checkpoint: the model.
        trace: what the last generation read; complete once it has ended.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        retriever: MemorySearch | None = None,
        memories: FetchedMemories | None = None,
        *,
        texts: ReferenceTexts | None = None,
        renew: KnowledgeSource | None = None,
    ) -> None:
        """Joins a model with a bank; without one it is the ordinary model, without the prefix.

        Args:
            checkpoint: the model.
            retriever: finds memories.
            memories: fetches them.
            texts: in the place of both: puts references into the prompt.
            renew: in the place of both from the first retrieval on: says what each is made from, so that a bank may
                change while it is read.
        """
        if (retriever is None) != (memories is None) or (texts is not None and memories is not None):
            raise InputError("give a retriever and the memories of its bank, or the texts of references, or neither")
        self.checkpoint = checkpoint
        self._memories, self._texts = memories, texts
        self._source: KnowledgeSource | None = None
        if retriever is not None and memories is not None:
            knowledge = Knowledge(retriever=retriever, memories=memories)
            self._source = renew or (lambda: knowledge)
        self._prompt_cache: tuple[list[int], ReadingSession] | None = None
        self.trace = GenerationTrace(chunks=[[]])

    @property
    def traces(self) -> list[ChunkTrace]:
        """What each chunk of the first sequence read."""
        return self.trace.chunks[0]

    @property
    def num_retrievals(self) -> int:
        """Queries of the last generation."""
        return self.trace.num_retrievals

    @property
    def memories(self) -> FetchedMemories | None:
        """What fetches memories, of the bank that was given; None without memories."""
        return self._memories

    @property
    def statistics(self) -> FetchStatistics | None:
        """Where memories came from in all generations so far; None without memories."""
        return None if self._memories is None else self._memories.statistics

    @property
    def num_places(self) -> int:
        """Tokens that there is room for, of a prompt and its continuation together."""
        num_before = self.checkpoint.context_start if self._memories is not None else 0
        return int(self.checkpoint.config.max_position_embeddings) - num_before

    def generate(self, prompt: str, config: GenerationConfig) -> Iterator[GeneratedPiece]:
        """Yields the continuation of a prompt, token by token; ends at the end-of-text token or the limit.

        Raises:
            InputError: the prompt is empty, or does not fit the model together with what is to be generated.
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        decode = self.checkpoint.tokenizer.decode
        generated: list[int] = []
        shown = ""
        for (token,) in self.stream_tokens(self._encode([prompt]), [config]):
            assert token is not None
            generated.append(token)
            text = decode(generated)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield GeneratedPiece(text="", token_id=token)
            else:
                yield GeneratedPiece(text=text[len(shown) :], token_id=token)
                shown = text

    def generate_batch(self, prompts: Sequence[str], config: GenerationConfig) -> list[list[int]]:
        """Returns the tokens that continue each prompt, without the end-of-text token; all prompts advance together.

        Prompt ``i`` is sampled with the seed ``config.seed + i``.

        Raises:
            InputError: as :meth:`generate`, for any of the prompts.
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        return self.generate_tokens(self._encode(prompts), config)

    def generate_tokens(self, contexts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
        """:meth:`generate_batch` for prompts that are tokens already, with what a context begins with (``<s>``)."""
        generated: list[list[int]] = [[] for _ in contexts]
        configs = [dataclasses.replace(config, seed=config.seed + row) for row in range(len(contexts))]
        for tokens in self.stream_tokens(contexts, configs):
            for of_sequence, token in zip(generated, tokens, strict=True):
                if token is not None:
                    of_sequence.append(token)
        return generated

    def stream_tokens(
        self,
        contexts: Sequence[Sequence[int]],
        configs: Sequence[GenerationConfig],
        is_ended: Callable[[int], bool] | None = None,
        find: FindHits | None = None,
    ) -> collections.abc.Generator[list[int | None], None, None]:
        """Yields the next token of each sequence, None once it has ended; all advance together, each in its own way.

        By the time None is yielded for a sequence, or nothing any more, its part of ``trace`` is complete. The order of
        the additions, and so the last bit of a logit, depends on the batch; all else that a sequence gets does not.

        Args:
            contexts: the tokens of each prompt, with what a context begins with (``<s>``).
            configs: how each is continued; ``num_memories`` and ``prefetch_tokens`` are those of the first.
            is_ended: asked before each token with the number of a sequence that is running, whether it is to end here.
            find: finds references in the place of the retriever, where they depend on the sequence.

        Raises:
            InputError: as :meth:`generate`, for any of the prompts.
            MemoryNotReadError: memories were retrieved but got no attention.
        """
        generated: list[list[int]] = [[] for _ in contexts]
        self.trace = GenerationTrace(
            chunks=[[] for _ in contexts], contexts=[list(tokens) for tokens in contexts], generated=generated
        )
        num_new = max((config.max_new_tokens for config in configs), default=0)
        ready = self._prepare(contexts, num_new, configs, find)
        with contextlib.ExitStack() as stack:
            reading = self._open_memories(ready, num_new, configs[0], find, stack)
            num_expected = max(map(len, ready)) + num_new
            if reading is None:
                session, logits = self._read_plainly(ready, num_expected)
            else:
                session, logits = reading.read_prompts(ready, num_expected)
            # What counts as said before is the prompt: references may be quoted, wherever they stand.
            chooser = TokenChooser(configs, contexts, logits.shape[-1])
            ends = _list_stop_tokens(self.checkpoint)
            stops = [ends if config.stop_at_end else set() for config in configs]
            running = [True] * len(ready)
            for step in range(num_new):
                chosen = chooser.choose(logits)
                tokens = chosen.tolist()
                for row, config in enumerate(configs):
                    running[row] = (
                        running[row]
                        and step < config.max_new_tokens
                        and tokens[row] not in stops[row]
                        and not (is_ended is not None and is_ended(row))
                    )
                if not any(running):
                    break
                is_last = step == num_new - 1
                if reading is not None:
                    reading.advance(tokens, running, is_last=is_last)
                for of_sequence, token, alive in zip(generated, tokens, running, strict=True):
                    if alive:
                        of_sequence.append(token)
                yield [token if alive else None for alive, token in zip(running, tokens, strict=True)]
                if not is_last:
                    logits = session.step(chosen)
            if reading is not None:
                reading.note_attention()

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        bos = self.checkpoint.bos_token_ids
        return [[*bos, *ids.tolist()] for ids in self.checkpoint.tokenizer.encode(list(prompts))]

    def _prepare(
        self,
        contexts: Sequence[Sequence[int]],
        num_new: int,
        configs: Sequence[GenerationConfig],
        find: FindHits | None,
    ) -> list[list[int]]:
        """Returns the contexts as the model reads them, with references as text where that is asked for."""
        ready = [list(tokens) for tokens in contexts]
        if not ready or min(map(len, ready)) <= len(self.checkpoint.bos_token_ids):
            raise InputError("the prompt is empty; give some text with --prompt")
        if self._texts is not None:
            ready = self._put_references(ready, configs[0], find)
        longest = max(map(len, ready))
        if longest + num_new > self.num_places:
            what = "the prompt" if self._texts is None else "the prompt with its references"
            raise InputError(
                f"{what} has {longest} tokens and {num_new} more are to be generated; "
                f"the model has room for {self.num_places}: shorten the prompt or lower --max-new-tokens"
            )
        return ready

    def _put_references(
        self, contexts: list[list[int]], config: GenerationConfig, find: FindHits | None
    ) -> list[list[int]]:
        assert self._texts is not None
        num_bos = len(self.checkpoint.bos_token_ids)
        queries = [tokens[num_bos:][-CHUNK_TOKENS:] for tokens in contexts]
        if find is None:
            hits = self._texts.find(queries, config.num_memories)
        else:
            texts = [self.checkpoint.tokenizer.decode(query) for query in queries]
            hits = find(range(len(contexts)), texts, config.num_memories)
        self.trace.num_retrievals += len(contexts)
        for traces, of_context in zip(self.trace.chunks, hits, strict=True):
            traces.append(ChunkTrace(first_token=0, hits=of_context, attention=[]))
        laid_out = self._texts.lay_out(hits)
        return [
            [*tokens[:num_bos], *before, *tokens[num_bos:]] for tokens, before in zip(contexts, laid_out, strict=True)
        ]

    def _open_memories(
        self,
        contexts: Sequence[Sequence[int]],
        num_new: int,
        config: GenerationConfig,
        find: FindHits | None,
        stack: contextlib.ExitStack,
    ) -> ChunkMemories | None:
        if self._memories is None or self._source is None:
            return None
        prefetcher = None
        needed_bytes = len(contexts) * config.num_memories * self._memories.stride_bytes
        if config.prefetch_tokens and self._memories.cache_bytes >= 2 * needed_bytes:
            prefetcher = stack.enter_context(Prefetcher())
        return ChunkMemories(
            self.checkpoint,
            self._source,
            self.trace,
            num_memories=config.num_memories,
            num_new_tokens=num_new,
            prefetcher=prefetcher,
            prefetch_tokens=config.prefetch_tokens,
            find=find,
        )

    def _read_plainly(self, contexts: list[list[int]], num_expected: int) -> tuple[ReadingSession, torch.Tensor]:
        """Reads prompts without memory; one whose references were read in the last call is read from there on."""
        device = self.checkpoint.device
        if len(contexts) == 1 and self._prompt_cache is not None:
            known, session = self._prompt_cache
            self._prompt_cache = None  # until it is whole again
            num_equal = _count_equal(known, contexts[0][:-1])
            session.rewind(num_equal)
            logits, _ = session.read(torch.tensor([contexts[0][num_equal:]], device=device), last_only=True)
        else:
            session = ReadingSession(
                self.checkpoint, batch_size=len(contexts), with_prefix=False, num_expected=num_expected
            )
            tokens, lengths = pad_contexts(contexts, device)
            logits, _ = session.read(tokens, lengths_B=lengths, last_only=True)
        if len(contexts) == 1 and self._texts is not None:
            self._prompt_cache = contexts[0], session
        return session, logits[:, -1]


def _count_equal(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns how many tokens two sequences begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def _list_stop_tokens(checkpoint: Checkpoint) -> set[int]:
    eos = checkpoint.config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}
