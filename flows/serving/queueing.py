"""The queue between requests and the model: bounded, in order, batched.

One thread owns the model; the queue lives in the event loop and calls that thread step by step. What waits is admitted
as a batch: prompts that agree in :attr:`flows.serving.batching.Task.kind`, in the order they came. Up to
:data:`MAX_BATCHES` batches take turns, a token each, so that a short question need not wait for the end of a long
answer; fewer, larger batches are faster as a whole, so there are only a few.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from flows.serving.batching import Batch, Progress, Task
from flows.serving.editions import Shelf, choose_num_threads, warm_up
from flows.serving.errors import ApiError, explain_error
from flows.serving.metrics import ServingMetrics
from flows.serving.settings import ServingConfig
from schemas.errors import BankError

MAX_BATCHES = 3
"""Batches that take turns."""

MAX_BATCH_TOKENS = 4096
"""Tokens of a batch's prompts, padding included: their memories are in RAM at a time, five for every 64."""

_LOGGER = logging.getLogger(__name__)


Event = Progress | ApiError
"""What becomes of a prompt: progress, or the reason why there is none."""


class Ticket:
    """A prompt in the queue.

    Attributes:
        task: the prompt.
        is_done: whether nothing more will come, or is wanted.
        has_begun: whether something of it was given out.
        arrived: when it came, in seconds of a clock that only goes forward.
    """

    def __init__(self, task: Task, put: Callable[[Event], None]) -> None:
        """Begins to wait.

        Args:
            task: the prompt.
            put: takes what becomes of it.
        """
        self.task = task
        self.is_done = False
        self.has_begun = False
        self.arrived = time.monotonic()
        self._put = put

    def put(self, event: Event) -> None:
        """Gives the request what becomes of the prompt."""
        self.has_begun = True
        self.is_done = isinstance(event, ApiError) or event.finish_reason is not None
        self._put(event)


class Order:
    """The prompts of one request, in the queue together.

    Attributes:
        tickets: the prompts.
    """

    def __init__(self, tasks: Sequence[Task], deadline: float) -> None:
        """Begins to wait.

        Args:
            tasks: the prompts.
            deadline: when they are given up, by the clock of the event loop.
        """
        self._deadline = deadline
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tickets = [Ticket(task, functools.partial(self._put, row)) for row, task in enumerate(tasks)]

    def _put(self, row: int, event: Event) -> None:
        self._events.put_nowait((row, event))

    async def follow(self) -> AsyncIterator[tuple[int, Progress]]:
        """Yields what becomes of the prompts, each with its number, until all are finished.

        Raises:
            ApiError: one cannot be generated, or not in time.
        """
        num_left = len(self.tickets)
        while num_left:
            try:
                async with asyncio.timeout_at(self._deadline):
                    row, event = await self._events.get()
            except TimeoutError:
                raise ApiError(
                    504, "the time for this request is over; ask for fewer tokens, or when less is going on"
                ) from None
            if isinstance(event, ApiError):
                raise event
            num_left -= event.finish_reason is not None
            yield row, event


@dataclasses.dataclass(kw_only=True)
class _Running:
    """A batch that takes turns, with the tickets of its prompts."""

    batch: Batch
    tickets: list[Ticket]
    num_retrievals: int = 0
    generated: list[int] = dataclasses.field(default_factory=list)


class GenerationQueue:
    """Takes prompts, and has them generated in batches.

    Attributes:
        shelf: the version that new batches read.
    """

    def __init__(self, config: ServingConfig, shelf: Shelf, metrics: ServingMetrics) -> None:
        """Makes an empty queue and the thread that owns the model."""
        self.shelf = shelf
        self._config, self._metrics = config, metrics
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Running] = []
        self._something_waits = asyncio.Event()
        self._answer_seconds = 1.0  # of late, from arrival to end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=self._set_threads)

    def _set_threads(self) -> None:
        num_threads = self._config.num_threads or choose_num_threads(self.shelf.edition.writer.checkpoint)
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)

    @property
    def num_waiting(self) -> int:
        """Prompts that wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Prompts that are generated."""
        return sum(running.batch.num_running for running in self._running)

    @property
    def is_full(self) -> bool:
        """Whether nothing more is taken."""
        return len(self._waiting) >= self._config.max_queue

    def submit(self, tasks: Sequence[Task]) -> Order:
        """Puts the prompts of a request into the queue, all or none.

        Raises:
            ApiError: there is no room for them.
        """
        if len(tasks) > self._config.max_queue:
            raise ApiError(
                400, f"prompt: {len(tasks)} prompts are too many, send at most {self._config.max_queue}", param="prompt"
            )
        if len(self._waiting) + len(tasks) > self._config.max_queue:
            seconds = math.ceil(self._answer_seconds)
            raise ApiError(
                429,
                f"{len(self._waiting)} prompts wait, and there is room for {self._config.max_queue}; come back later",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        order = Order(tasks, asyncio.get_running_loop().time() + self._config.timeout_seconds)
        self._waiting.extend(order.tickets)
        self._something_waits.set()
        return order

    def cancel(self, order: Order, reason: str) -> None:
        """Gives up what is not finished: it leaves the queue, or its generation ends with the next token."""
        for ticket in order.tickets:
            if not ticket.is_done:
                self._metrics.cancelled.labels(reason).inc()
                self._cancel(ticket)

    def _cancel(self, ticket: Ticket) -> None:
        ticket.is_done = True
        with contextlib.suppress(ValueError):
            self._waiting.remove(ticket)
        for running in self._running:
            if ticket in running.tickets:
                running.batch.cancel(running.tickets.index(ticket))

    async def warm_up(self) -> None:
        """Generates a token in the model's thread.

        Raises:
            BankError: see :func:`flows.serving.editions.warm_up`.
        """
        await asyncio.get_running_loop().run_in_executor(self._pool, warm_up, self.shelf.edition)

    async def run(self) -> None:
        """Generates what waits, for as long as the server runs."""
        while True:
            if not self._waiting and not self._running:
                self._something_waits.clear()
                await self._something_waits.wait()
            if self._waiting:
                self._admit()
            for running in list(self._running):
                await self._step(running)

    def _admit(self) -> None:
        """Makes a batch of the first prompt that waits and of those that can go with it, if there is room for it."""
        room = self._config.max_batch - self.num_running
        if room <= 0 or len(self._running) >= MAX_BATCHES:
            return
        edition = self.shelf.edition
        first = self._waiting[0]
        num_places = edition.make_generator(with_memory=first.task.with_memory).num_places
        chosen: list[Ticket] = []
        longest = most_new = 0
        for ticket in self._waiting:
            task = ticket.task
            length, num_new = max(longest, len(task.tokens)), max(most_new, task.config.max_new_tokens)
            fits = length + num_new <= num_places and length * (len(chosen) + 1) <= MAX_BATCH_TOKENS
            if task.kind == first.task.kind and (fits or not chosen):
                chosen.append(ticket)
                longest, most_new = length, num_new
            if len(chosen) == room:
                break
        for ticket in chosen:
            self._waiting.remove(ticket)
        self._metrics.batch_sizes.observe(len(chosen))
        batch = Batch(lambda: self.shelf.edition, [ticket.task for ticket in chosen])
        self._running.append(_Running(batch=batch, tickets=chosen, generated=[0] * len(chosen)))

    async def _step(self, running: _Running) -> None:
        """Has a batch generate its next tokens, and hands them out."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, running.batch.step)
        await asyncio.wait([future])
        error = future.exception()
        if error is not None:
            self._running.remove(running)
            self._fail(running, error)
            return
        for edition in running.batch.editions:
            self._metrics.count_memories(edition.memories)
        self._metrics.retrievals.inc(running.batch.num_retrievals - running.num_retrievals)
        running.num_retrievals = running.batch.num_retrievals
        found = future.result()
        if found is None:
            self._running.remove(running)
            return
        for row, progress in found.items():
            ticket = running.tickets[row]
            self._metrics.generated_tokens.inc(progress.num_tokens - running.generated[row])
            running.generated[row] = progress.num_tokens
            if ticket.is_done:
                continue
            if not ticket.has_begun:
                self._metrics.first_token_seconds.observe(time.monotonic() - ticket.arrived)
                self._metrics.prompt_tokens.inc(len(ticket.task.tokens))
            ticket.put(progress)
            if ticket.is_done:
                self._answer_seconds += 0.2 * (time.monotonic() - ticket.arrived - self._answer_seconds)

    def _fail(self, running: _Running, error: BaseException) -> None:
        """Tells the prompts of a batch that it failed."""
        if isinstance(error, BankError):
            told = explain_error(error)
            _LOGGER.error("version %d: %s", running.batch.edition.version, error)
        else:
            told = ApiError(500, "the generation failed; the log of the server says why")
            _LOGGER.error("a generation failed", exc_info=error)
        for ticket in running.tickets:
            if not ticket.is_done:
                ticket.put(told)

    async def close(self) -> None:
        """Ends everything: what is still generated, and the thread of the model."""
        for running in self._running:
            for ticket in running.tickets:
                self._cancel(ticket)
            self._pool.submit(running.batch.close)
        await asyncio.to_thread(self._pool.shutdown)
