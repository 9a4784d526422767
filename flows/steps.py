"""How the stages of an operation are run: one after the other, measured, as tasks of a Prefect flow or directly.

Every stage leaves its result in files, so a stage that is tried again, or an operation that is started again after a
stop or a crash, goes on from the files that are finished.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pipelines.running import check_stop
from schemas.errors import BankError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

P = ParamSpec("P")
T = TypeVar("T")


def _may_pass(_task: "Task[Any, Any]", _run: "TaskRun", state: "State[Any]") -> bool:
    """Tells whether a failure is worth a retry: a known error stays what it is."""
    try:
        state.result()
    except BankError:
        return False
    except Exception:  # any other failure may be of the moment: a worker that died, a busy disk
        return True
    return True


class Steps:
    """Runs stages and notes how long they took.

    Attributes:
        seconds: wall time of each stage that ran.
    """

    def __init__(self, *, as_tasks: bool = False) -> None:
        """Chooses how stages run.

        Args:
            as_tasks: as tasks of the flow that is running, tried again where that may help; else as plain calls.
        """
        self._as_tasks = as_tasks
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
            retries=2,
            retry_delay_seconds=[1, 5],
            retry_condition_fn=_may_pass,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(function)
