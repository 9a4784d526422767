"""Work done in threads beside the event loop: so much waits, so long, and no more."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from flows.serving.errors import ApiError
from model.prefetching import use_one_core

P = ParamSpec("P")
T = TypeVar("T")


class BoundedPool:
    """Calls functions in threads of its own."""

    def __init__(self, *, num_threads: int, max_queue: int, timeout_seconds: float) -> None:
        """Makes the threads.

        Args:
            num_threads: calls at a time.
            max_queue: calls that wait or are done, at most.
            timeout_seconds: time for a call, waiting included.
        """
        self._max_queue, self._timeout_seconds = max_queue, timeout_seconds
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="look-up", initializer=use_one_core)
        # Nothing waits in the pool itself: there a call that was given up would stay with all that it was given.
        self._free_threads = asyncio.Semaphore(num_threads)
        self._num_waiting = 0

    async def run(self, function: Callable[P, T], *arguments: P.args, **settings: P.kwargs) -> T:
        """Calls a function in a thread.

        Raises:
            ApiError: too many wait, or it was not done in time.
            BankError: what the function raises.
        """
        if self._num_waiting >= self._max_queue:
            raise ApiError(429, "too many searches wait; come back later", headers={"Retry-After": "1"})
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._free_threads.acquire()
                loop = asyncio.get_running_loop()
                future = self._pool.submit(function, *arguments, **settings)
                # A call that takes too long goes on, and its thread is free only at its end.
                future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free_threads.release))
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise ApiError(504, "the time for this request is over; ask again when less is going on") from None
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        """Ends the threads."""
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
