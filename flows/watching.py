"""A deployment that runs when its corpus changes: the files are looked at now and then, by the process that serves.

This is a loop and not a scheduled flow: a look costs a listing, while a flow run costs a process that loads Python's
half of the project, and a run in Prefect's list should mean that something has happened. Files are told apart as builds
do it (:func:`pipelines.formats.list_corpus_files`: size and time, of an object its tag), so local folders and object
stores are watched alike. A change counts once nothing has changed for a while: files are copied over some time.

The first look starts a run too, for what changed while nobody watched; a bank that is up to date is left as it is.
"""

import dataclasses
import threading
from collections.abc import Callable

from prefect.deployments import run_deployment
from prefect.logging import get_logger

from flows.run_records import SERVER_FAULTS
from pipelines.formats import list_corpus_files
from schemas.errors import CorpusError
from schemas.identifiers import hash_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is watched for which deployment.

    Attributes:
        deployment: its full name.
        paths: files, folders, patterns and URLs.
        settle_seconds: how long nothing may change before a change counts.
        poll_seconds: from one look to the next.
    """

    deployment: str
    paths: tuple[str, ...]
    settle_seconds: float
    poll_seconds: float


class Settling:
    """Decides when a change is over: each state of the files that lasts is reported once."""

    def __init__(self, settle_seconds: float) -> None:
        """Begins with nothing reported, so that the first state that lasts is."""
        self._settle_seconds = settle_seconds
        self._reported = ""
        self._seen = ""
        self._since = 0.0

    def is_due(self, fingerprint: str, seconds: float) -> bool:
        """Tells whether a state has lasted and was not reported yet.

        Args:
            fingerprint: of the state that was found.
            seconds: when, on a clock that only goes forward.
        """
        if fingerprint != self._seen:
            self._seen, self._since = fingerprint, seconds
        return fingerprint != self._reported and seconds - self._since >= self._settle_seconds

    def report(self, fingerprint: str) -> None:
        """Notes that a state was acted on."""
        self._reported = fingerprint

    def forget(self) -> None:
        """Notes that nothing could be seen: what is seen next has to last anew."""
        self._seen = ""


def fingerprint_corpus(paths: tuple[str, ...]) -> str:
    """Returns what identifies the files of a corpus and their content.

    Raises:
        CorpusError: a path is not there, holds nothing that can be read, or cannot be reached.
    """
    return hash_json([[file.path, file.fingerprint] for file in list_corpus_files(paths)])


def start_run(deployment: str) -> None:
    """Has the server make a run of a deployment, to be executed by whoever executes its scheduled ones."""
    run_deployment(deployment, timeout=0, as_subflow=False, tags=["watch"])


def watch_corpus(
    watch: Watch, stop: threading.Event, now: Callable[[], float], start: Callable[[str], None] = start_run
) -> None:
    """Looks at a corpus until it is told to stop, and starts a run after each change.

    A corpus that cannot be seen starts nothing: a disk that is not mounted is no empty corpus.

    Args:
        watch: what to look at.
        stop: ends the loop.
        now: a clock that only goes forward, in seconds.
        start: starts a run of a deployment.
    """
    log = get_logger("memory3.watch")
    settling = Settling(watch.settle_seconds)
    complaint = ""
    while True:
        try:
            found = fingerprint_corpus(watch.paths)
            if settling.is_due(found, now()):
                start(watch.deployment)
                settling.report(found)
                log.info("%s has settled; a run of %s is due", ", ".join(watch.paths), watch.deployment)
            complaint = ""
        except CorpusError as error:
            settling.forget()
            if str(error) != complaint:
                complaint = str(error)
                log.warning("%s; watched on", complaint)
        except SERVER_FAULTS as error:
            log.warning("no run of %s could be started: %s; tried again", watch.deployment, error)
        except Exception:
            # Nobody would notice a watch that has ended.
            log.exception("%s could not be looked at; tried again", ", ".join(watch.paths))
        if stop.wait(watch.poll_seconds):
            return
