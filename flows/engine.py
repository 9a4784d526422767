"""Prefect's in-process engine: settings that must stand before it is imported, and its start.

With no ``PREFECT_API_URL`` set, Prefect starts a server of its own for the life of the process; with one, runs are
reported to that server and can be watched there.
"""

import os
import signal

from schemas.errors import BankError

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}
"""Defaults; a user's own environment wins. Errors reach the user as one line of the command line, not as log."""


def configure_engine(level: str | None = None) -> None:
    """Sets what the environment does not set itself.

    Args:
        level: of the log of runs, for a process that serves them; None for one whose user sees what it does.
    """
    if level is not None:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", level)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def start_engine() -> None:
    """Makes sure that a Prefect server answers, starting one in the background if none is configured.

    Ctrl-C in a terminal reaches every process of the command. The server inherits a mask that keeps it from being
    stopped so: it must outlive the build's orderly end, and is ended by Prefect when this process exits.

    Raises:
        BankError: no server answers.
    """
    configure_engine()
    import httpx
    from prefect.client.orchestration import get_client

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            client.hello()
    except (httpx.HTTPError, RuntimeError) as error:
        url = os.environ.get("PREFECT_API_URL")
        where = f"at PREFECT_API_URL={url} does not answer" if url else "of this process did not start"
        raise BankError(f"the Prefect server {where}: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
