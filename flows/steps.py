"""How the stages of an operation are run: one after the other, measured, as tasks of a Prefect flow or directly.

Every stage leaves its result in files, so a stage that is tried again, or an operation that is started again after a
stop or a crash, goes on from the files that are finished. That is also why tasks are not cached by Prefect: what is
finished is found by content, in the workspace of the operation, on every engine and without a server.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pipelines.running import check_stop
from schemas.errors import BankError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

P = ParamSpec("P")
T = TypeVar("T")


DEFECTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors of the program: the same call would fail in the same way."""

RETRY_SECONDS = (2.0, 10.0)
"""What a user who waits can bear."""

DEPLOYED_RETRY_SECONDS = (5.0, 20.0, 60.0)
"""For a run that nobody waits for: a store or a cluster that is started again is back by then."""


def may_pass(error: BaseException) -> bool:
    """Tells whether the same call may succeed a little later.

    Of known errors only those that say so. Of others all but defects, since every engine has its own error for a worker
    that was lost.
    """
    if isinstance(error, BankError):
        return error.may_pass
    return isinstance(error, Exception) and not isinstance(error, DEFECTS)


def _is_worth_a_retry(_task: "Task[Any, Any]", _run: "TaskRun", state: "State[Any]") -> bool:
    return may_pass(state.result(raise_on_failure=False))


class Steps:
    """Runs stages and notes how long they took.

    Attributes:
        seconds: wall time of each stage that ran.
    """

    def __init__(self, *, as_tasks: bool = False, retry_seconds: Sequence[float] = RETRY_SECONDS) -> None:
        """Chooses how stages run.

        Args:
            as_tasks: as tasks of the flow that is running, tried again where that may help; else as plain calls.
            retry_seconds: how long tasks wait before each further try.
        """
        self._as_tasks = as_tasks
        self._retry_seconds = list(retry_seconds)
        self.seconds: dict[str, float] = {}

    def run(self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one stage.

        Raises:
            StoppedError: the user asked to stop.
        """
        check_stop()
        started = time.monotonic()
        result = (self._wrap(name, function) if self._as_tasks else function)(*args, **kwargs)
        self.seconds[name] = round(time.monotonic() - started, 2)
        return result

    def _wrap(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        return task(
            name=name,
            retries=len(self._retry_seconds),
            retry_delay_seconds=self._retry_seconds,
            retry_jitter_factor=0.5,
            retry_condition_fn=_is_worth_a_retry,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(function)
