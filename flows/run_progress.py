"""Progress of a flow run as Prefect shows it: an artifact for each stage that takes a while, and a line of the log.

Stands between :func:`flows.progress.show_stage` and whatever else shows progress. A thread of its own talks to the
server, so that a slow or absent server holds nothing up; what cannot be told is left out.
"""

import contextvars
import queue
import threading
import time
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from flows.progress import Display, RunningStage
from flows.run_records import get_run_log, tolerate_server

if TYPE_CHECKING:
    import logging

PUBLISH_SECONDS = 5.0
"""From one update to the next; a stage that is shorter has no artifact."""

CLOSE_SECONDS = 10.0
"""How long the end of a run waits for the last update."""


class _PublishedStage:
    """A stage with the artifact it has, if any."""

    def __init__(self, stage: RunningStage) -> None:
        self.stage = stage
        self.done = 0
        self.is_over = False
        self.artifact_id: UUID | None = None

    def describe(self) -> tuple[float, str]:
        """Returns the percentage and a line."""
        stage = self.stage
        rate, left = stage.describe(self.done)
        percent = 100.0 * self.done / stage.total if stage.total else 0.0
        ended = f"{stage.describe_time()} in all" if self.is_over else ""
        parts = (stage.describe_share(self.done), rate, ended or left)
        line = ", ".join(part for part in parts if part)
        return (100.0 if self.is_over else min(percent, 100.0)), f"{stage.name}: {line or 'at work'}"


class PublishedDisplay:
    """Hands progress on to another display, and publishes it as artifacts of the flow run at hand."""

    def __init__(self, inner: Display, flow_run_id: UUID) -> None:
        """Starts the thread that publishes.

        Args:
            inner: the display that shows progress as well; it is not closed.
            flow_run_id: the run whose progress it is.
        """
        self._inner, self._flow_run_id = inner, flow_run_id
        self._log: logging.LoggerAdapter[logging.Logger] = get_run_log()
        self._current: _PublishedStage | None = None
        self._finished: queue.SimpleQueue[_PublishedStage] = queue.SimpleQueue()
        self._ended = threading.Event()
        # A new thread has none of the context that says which server and which settings are meant.
        run = contextvars.copy_context().run
        self._publisher = threading.Thread(target=run, args=(self._publish_all,), name="run-progress", daemon=True)
        self._publisher.start()

    def start(self, stage: str, total: int, item: str) -> None:
        """Begins a stage."""
        self._inner.start(stage, total, item)
        self._current = _PublishedStage(RunningStage(stage, total, item))

    def update(self, done: int) -> None:
        """Notes how many items are done."""
        self._inner.update(done)
        if self._current is not None:
            self._current.done = done

    def finish(self, done: int) -> None:
        """Ends the stage, and writes it to the run's log."""
        self._inner.finish(done)
        shown, self._current = self._current, None
        if shown is None:
            return
        shown.done, shown.is_over = done, True
        self._log.info(shown.describe()[1])
        self._finished.put(shown)

    def close(self) -> None:
        """Publishes what is left, unless the server takes too long."""
        self._ended.set()
        self._publisher.join(CLOSE_SECONDS)

    def _publish_all(self) -> None:
        with tolerate_server(), get_client(sync_client=True) as client:
            while not self._ended.wait(PUBLISH_SECONDS):
                self._publish_finished(client)
                current = self._current
                if current is not None and time.monotonic() - current.stage.started >= PUBLISH_SECONDS:
                    self._publish(client, current)
            self._publish_finished(client)

    def _publish_finished(self, client: SyncPrefectClient) -> None:
        """Completes the artifacts of stages that are over."""
        while not self._finished.empty():
            shown = self._finished.get()
            if shown.artifact_id is not None:
                self._publish(client, shown)

    def _publish(self, client: SyncPrefectClient, shown: _PublishedStage) -> None:
        percent, line = shown.describe()
        if shown.artifact_id is None:
            wanted = ArtifactCreate(type="progress", data=percent, description=line, flow_run_id=self._flow_run_id)
            shown.artifact_id = client.create_artifact(wanted).id
        else:
            client.update_artifact(shown.artifact_id, ArtifactUpdate(data=percent, description=line))
