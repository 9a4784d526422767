"""What a flow run leaves in Prefect beside its state: its name, lines of its log, events, tables and a report.

All of it is for people to look at. A server that is old, slow or gone may lose it, and nothing fails for that.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.logging import get_logger, get_run_logger
from prefect.runtime import flow_run
from pydantic import ValidationError

from schemas.identifiers import hash_json

if TYPE_CHECKING:
    import logging

SERVER_FAULTS = (httpx.HTTPError, PrefectException, ValidationError, OSError, RuntimeError)
"""What the client of a server raises that is gone, or that answers in a way it does not know."""

COMMITTED = "memory3.version.committed"
VERIFY_FAILED = "memory3.verify.failed"

KEY_DIGITS = 6


@contextmanager
def tolerate_server() -> Iterator[None]:
    """Passes over whatever a server cannot take; the log says what."""
    try:
        yield
    except SERVER_FAULTS as error:
        get_logger("memory3").debug("not told to the Prefect server: %s", error)


def get_run_log() -> "logging.LoggerAdapter[logging.Logger]":
    """Returns the log of the flow run at hand."""
    return cast("logging.LoggerAdapter[logging.Logger]", get_run_logger())


def get_flow_run_id() -> UUID | None:
    """Returns the id of the flow run at hand, None outside of one."""
    context = FlowRunContext.get()
    return context.flow_run.id if context is not None and context.flow_run is not None else None


def get_place_name(place: str) -> str:
    """Returns what people call a bank or folder: the last part of its URL or path."""
    return place.rstrip("/").rpartition("/")[2] or place


def make_run_name() -> str:
    """Returns the name of the run that is beginning: what it does, and to which bank or run folder."""
    verb = (flow_run.flow_name or "").partition("_")[0]
    parameters: dict[str, Any] = flow_run.parameters
    place = parameters.get("bank") or parameters.get("out") or ""
    return f"{verb} {get_place_name(str(place))}".strip()


def rename_run(name: str) -> None:
    """Gives the run at hand another name, once more is known of it."""
    run_id = get_flow_run_id()
    if run_id is None:
        return
    with tolerate_server(), get_client(sync_client=True) as client:
        client.update_flow_run(run_id, name=name)


def make_key(place: str, what: str) -> str:
    """Returns the key under which Prefect lines up the artifacts of one kind of a bank: all of its runs have it."""
    slug = re.sub("[^a-z0-9]+", "-", get_place_name(place).lower()).strip("-") or "bank"
    return f"{slug}-{hash_json([place])[:KEY_DIGITS]}-{what}"


def publish_table(place: str, what: str, rows: list[dict[str, Any]], description: str) -> None:
    """Leaves a table with the run; none if it has no row."""
    if rows:
        with tolerate_server():
            create_table_artifact(key=make_key(place, what), table=rows, description=description)


def publish_markdown(place: str, what: str, text: str, description: str) -> None:
    """Leaves a page of Markdown with the run."""
    with tolerate_server():
        create_markdown_artifact(key=make_key(place, what), markdown=text, description=description)


def tell_event(event: str, bank: str, payload: dict[str, Any]) -> None:
    """Emits an event about a bank, which automations of Prefect can react to.

    Args:
        event: its name.
        bank: URL of the bank, which is the event's resource.
        payload: JSON values.
    """
    resource = {"prefect.resource.id": f"memory3.bank.{bank}", "prefect.resource.name": get_place_name(bank)}
    with tolerate_server():
        emit_event(event=event, resource=resource, payload=payload)
