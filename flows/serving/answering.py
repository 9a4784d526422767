"""How an answer comes about: what becomes of prompts in the queue is collected, or handed on event by event.

A client that goes away ends its generation, and so does the end of its time.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from flows.serving.batching import Progress
from flows.serving.errors import ApiError
from flows.serving.queueing import GenerationQueue, Order
from flows.serving.response_models import Usage

GONE = 499
"""The status, which nobody reads, of a request whose client went away."""

REASONS = {GONE: "gone", 504: "timeout"}
"""Why a generation ended early, by the status of the request."""

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events, with something to be done when they end in whatever way."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], finish: Callable[[], None]) -> None:
        """Takes the events, and what is to be done in the end."""
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish()


def _make_event(data: str) -> str:
    return f"data: {data}\n\n"


async def wait_unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what some work returns, unless the client goes away before.

    Raises:
        ApiError: it did; nobody will read this.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(GONE, "the client went away")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


class Answer:
    """The answer to a request in the making.

    Attributes:
        created: when the request came, in seconds since 1970.
        texts: of each prompt the text so far.
    """

    def __init__(self, queue: GenerationQueue, order: Order) -> None:
        """Begins with nothing.

        Args:
            queue: generates.
            order: the prompts of the request, in the queue.
        """
        self._queue, self._order = queue, order
        self.created = int(time.time())
        self.texts = [""] * len(order.tickets)
        self._last: dict[int, Progress] = {}

    @property
    def ends(self) -> list[Progress]:
        """How the prompts have ended, in their order, once they have, with all of their chunks."""
        return [self._last[row] for row in sorted(self._last)]

    @property
    def version(self) -> int:
        """The newest version of the bank that any of the prompts has read."""
        return max(progress.version for progress in self._last.values())

    def count_usage(self) -> Usage:
        """Counts the tokens of all prompts and of what was generated."""
        num_prompt = sum(len(ticket.task.tokens) for ticket in self._order.tickets)
        num_generated = sum(progress.num_tokens for progress in self._last.values())
        return Usage(prompt_tokens=num_prompt, completion_tokens=num_generated, total_tokens=num_prompt + num_generated)

    def _add(self, row: int, progress: Progress) -> None:
        self.texts[row] += progress.text
        told = self._last[row].chunks if row in self._last else []
        self._last[row] = dataclasses.replace(progress, chunks=[*told, *progress.chunks])

    @contextlib.contextmanager
    def _cancel_on_error(self) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            self._queue.cancel(self._order, REASONS.get(error.status, "failed"))
            raise
        except asyncio.CancelledError:
            self._queue.cancel(self._order, REASONS[GONE])
            raise

    async def finish(self, request: Request) -> None:
        """Waits for the end of all prompts.

        Raises:
            ApiError: one cannot be generated, or not in time.
        """

        async def collect() -> None:
            async for row, progress in self._order.follow():
                self._add(row, progress)

        with self._cancel_on_error():
            await wait_unless_gone(request, collect())

    async def stream(
        self, request: Request, render: Callable[[int, Progress], str], render_end: Callable[[], str | None]
    ) -> EventStream:
        """Returns a stream that begins with the first token: until then errors have a status of their own.

        Args:
            request: the request.
            render: makes the data of an event of what has become of a prompt.
            render_end: makes the data of an event after all others, None for none.

        Raises:
            ApiError: nothing can be generated, or not in time.
        """
        events = self._order.follow()

        async def find_first() -> tuple[int, Progress]:
            return await anext(events)

        async def list_events(row: int, progress: Progress) -> AsyncIterator[str]:
            try:
                with self._cancel_on_error():
                    self._add(row, progress)
                    yield _make_event(render(row, progress))
                    async for row, progress in events:
                        self._add(row, progress)
                        yield _make_event(render(row, progress))
            except ApiError as error:
                yield _make_event(error.to_text())
                return
            end = render_end()
            if end is not None:
                yield _make_event(end)
            yield _make_event("[DONE]")

        with self._cancel_on_error():
            first = await wait_unless_gone(request, find_first())
        return EventStream(list_events(*first), lambda: self._queue.cancel(self._order, REASONS[GONE]))
