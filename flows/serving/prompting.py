"""From what a client asks to prompts in the queue: tokens, settings, and whether there is room for the answer."""

import asyncio
import dataclasses
import secrets
from collections.abc import Sequence

from flows.serving.answering import Answer
from flows.serving.batching import CitingChunk, Progress, Task
from flows.serving.cited_answers import MAX_CITED_TOKENS
from flows.serving.errors import ApiError
from flows.serving.queueing import GenerationQueue
from flows.serving.request_models import GenerationRequest
from flows.serving.response_models import ChoiceMemory, CitedMemory, CitingPart, ReadChunk, ReadMemory
from model.citing import CONFIRMED
from model.generating import GenerationConfig


class Prompter:
    """Puts prompts into the queue of the model that is served."""

    def __init__(self, model_name: str, queue: GenerationQueue) -> None:
        """Joins a queue with its model's name."""
        self.model_name, self._queue = model_name, queue

    def check_model(self, name: str) -> None:
        """Makes sure that a client means the model that is served.

        Raises:
            ApiError: it means another.
        """
        if name != self.model_name:
            raise ApiError(
                404,
                f"there is no model {name!r} here; ask for {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Returns the contexts that begin with prompts, ``<s>`` included.

        Raises:
            ApiError: a prompt is empty, or has a token that the model does not have.
        """
        checkpoint = self._queue.shelf.edition.checkpoint
        bos, num_words = checkpoint.bos_token_ids, int(checkpoint.config.vocab_size)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await asyncio.to_thread(checkpoint.tokenizer.encode, texts))
        contexts = []
        for prompt in prompts:
            tokens = next(encoded).tolist() if isinstance(prompt, str) else prompt
            if max(tokens, default=0) >= num_words:
                raise ApiError(
                    400,
                    f"prompt: token {max(tokens)} is none of the model's, which end at {num_words - 1}",
                    param="prompt",
                )
            tokens = tokens if tokens[: len(bos)] == list(bos) else [*bos, *tokens]
            if len(tokens) == len(bos):
                raise ApiError(400, "prompt: is empty; send some text", param="prompt")
            contexts.append(tokens)
        return contexts

    def submit(
        self,
        asked: GenerationRequest,
        contexts: Sequence[Sequence[int]],
        *,
        param: str,
        max_tokens: int | None,
        default_tokens: int,
        end_token_id: int | None = None,
    ) -> tuple[Answer, int]:
        """Puts the prompts of a request into the queue.

        Args:
            asked: the request.
            contexts: tokens of its prompts.
            param: the field they are from.
            max_tokens: tokens to generate at most, None if the request does not say.
            default_tokens: how many then, if there is room for them.
            end_token_id: a token that ends an answer; given for chats, whose answers begin without white space.

        Returns:
            The answer in the making, and the seed it is sampled with.

        Raises:
            ApiError: there is no room, in the model or in the queue.
        """
        options = asked.memory3
        if options.cite and not options.memory:
            raise ApiError(
                400, "memory3.cite: only a text that reads memories can cite them; leave out memory", param="memory3"
            )
        generator = self._queue.shelf.edition.make_generator(with_memory=options.memory)
        longest = max(map(len, contexts))
        room = generator.num_places - longest
        if room < (max_tokens or 1):
            raise ApiError(
                400,
                f"{param}: the prompt has {longest} tokens and {max_tokens or 1} more are to be generated; the model "
                f"has room for {generator.num_places}",
                param=param,
                code="context_length_exceeded",
            )
        num_new = max_tokens or min(default_tokens, room)
        if options.cite and num_new > MAX_CITED_TOKENS:
            raise ApiError(
                400,
                f"memory3.cite: {num_new:,} tokens are to be generated; at most {MAX_CITED_TOKENS:,} can be cited",
                param="memory3",
            )
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        tasks = [
            Task(
                tokens=tokens,
                config=GenerationConfig(
                    max_new_tokens=num_new,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    repetition_penalty=options.repetition_penalty,
                    seed=seed + row,
                    num_memories=options.num_memories,
                ),
                with_memory=options.memory,
                stops=asked.stops,
                end_token_id=end_token_id,
                trims_start=end_token_id is not None,
                traces=options.trace,
                cites=options.cite,
            )
            for row, tokens in enumerate(contexts)
        ]
        return Answer(self._queue, self._queue.submit(tasks)), seed


def describe_choice(asked: GenerationRequest, progress: Progress) -> ChoiceMemory:
    """Returns what is told of the memories of a choice: new chunks of its trace, and in the end what it cites."""
    chunks = None
    if asked.memory3.trace and (progress.chunks or progress.finish_reason is not None):
        chunks = [
            ReadChunk(
                first_token=chunk.trace.first_token,
                version=chunk.version,
                num_tokens=chunk.num_tokens,
                text=chunk.text,
                memories=[
                    ReadMemory(ref_id=hit.ref_id, score=hit.score, attention=attention)
                    for hit, attention in zip(chunk.trace.hits, chunk.trace.attention, strict=True)
                ],
            )
            for chunk in progress.chunks
        ]
    tells_citations = asked.memory3.cite and progress.finish_reason is not None and progress.citation_problem is None
    return ChoiceMemory(
        version=progress.version,
        versions=list(progress.versions),
        num_tokens=progress.num_tokens,
        trace=chunks,
        citations=[_describe_citing(part) for part in progress.citations] if tells_citations else None,
        citation_problem=progress.citation_problem,
    )


def _describe_citing(part: CitingChunk) -> CitingPart:
    chunk = part.chunk
    return CitingPart(
        first_token=chunk.first_token,
        num_tokens=len(chunk.tokens),
        text=part.text,
        logprob=chunk.logprob,
        support=chunk.support,
        noise=chunk.noise,
        citations=[
            CitedMemory.model_validate({**dataclasses.asdict(one), "confirmed": one.verdict == CONFIRMED})
            for one in chunk.citations
        ],
    )
