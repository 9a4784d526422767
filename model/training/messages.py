"""Messages of a conversation, and rows of JSON Lines that hold them.

Where it stands: a file of conversations -> **messages** -> exchanges in tokens (:mod:`model.training.chat`). A row that
cannot be used is told with its line and the reason; nothing is passed over in silence.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from schemas.errors import InputError

ROLES = ("system", "user", "assistant")

MAX_ROUNDS = 8
"""Questions with their answers that are kept of a conversation (method section 7)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """What one side said.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: the text, without white space around it.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectedRow:
    """A row that is not used.

    Attributes:
        line: its place in the file, 1-based.
        reason: why, in a few words.
    """

    line: int
    reason: str


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yields the JSON objects of a file with their lines, 1-based; empty lines are none.

    A line that is no object comes as the error that says so.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a file of JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield number, InputError("not JSON")
            continue
        yield number, row if isinstance(row, dict) else InputError("not an object")


def parse_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the messages of a row: instructions of the system, if any, then questions and answers in turn.

    Raises:
        InputError: the row is no conversation; the error says why in a few words.
    """
    listed = row.get("messages")
    if listed is None and "prompt" in row:
        listed = [{"role": "user", "content": row["prompt"]}]
        if "completion" in row:
            listed.append({"role": "assistant", "content": row["completion"]})
    if not isinstance(listed, list) or not listed:
        raise InputError("no messages")
    messages = tuple(_parse_message(message) for message in listed)
    spoken = messages[1:] if messages[0].role == "system" else messages
    if not spoken or any(message.role != ROLES[1 + place % 2] for place, message in enumerate(spoken)):
        raise InputError("user and assistant do not take turns, beginning with the user")
    return messages


def _parse_message(message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise InputError(f"a message whose role is none of {', '.join(ROLES)}")
    return Message(role=message["role"], content=parse_content(message.get("content")))


def parse_content(content: Any) -> str:
    """Returns a text without white space around it.

    Raises:
        InputError: it is no text, or an empty one.
    """
    if not isinstance(content, str) or not content.strip():
        raise InputError("a content that is empty or no text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InputError("a content that is no valid Unicode") from error
    return content.strip()


def cut_rounds(messages: tuple[Message, ...], max_rounds: int = MAX_ROUNDS) -> tuple[Message, ...]:
    """Returns a conversation without the rounds after ``max_rounds``."""
    num_instructions = int(messages[0].role == "system")
    return messages[: num_instructions + 2 * max_rounds]
