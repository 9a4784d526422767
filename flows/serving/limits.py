"""What is looked at before a request is understood: its key and its size.

Plain ASGI, in front of everything that parses: who has no key cannot make the server read a body.
"""

import asyncio
import contextlib
import hmac
from collections.abc import Mapping

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serving.errors import ApiError
from flows.serving.settings import ListeningConfig, is_loopback

PROTECTED = "/v1/"
"""Where a key is asked for: health and metrics tell nothing of texts."""

BODY_SECONDS = 30.0
"""Time for a client to send its request."""

DRAIN_SECONDS = 5.0
"""Time in which what a client still sends of a refused request is read, so that it gets to see the answer."""


def find_header(scope: Scope, name: bytes) -> bytes:
    """Returns a header of a request, empty if it is not there."""
    headers: Mapping[bytes, bytes] = dict(scope["headers"])
    return headers.get(name, b"")


async def _drain(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body"):
                pass


class KeyCheck:
    """Lets nobody in who does not know the key."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        """Stands before an application; without a key everybody is let in."""
        self._app, self._api_key = app, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401, or hands the request on."""
        if self._api_key is not None and scope["type"] == "http" and scope["path"].startswith(PROTECTED):
            scheme, _, given = find_header(scope, b"authorization").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._api_key):
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.make_response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class HostCheck:
    """Answers only who calls this machine by a name of its own.

    A web page can lead its visitor's browser to a loopback address under the page's own name, and then read answers.
    """

    def __init__(self, app: ASGIApp, *, enabled: bool) -> None:
        """Stands before an application that only this machine can reach; elsewhere it is to be switched off."""
        self._app, self._enabled = app, enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 400, or hands the request on."""
        if self._enabled and scope["type"] == "http":
            host = find_header(scope, b"host").decode("latin-1")
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):
                error = ApiError(400, "this server is called by the name of another host; call it localhost")
                await error.make_response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads the body of a request, up to a size and within a time."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Stands before an application."""
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413 or 408, or hands the request on with its body."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await error.make_response()(scope, receive, send)
            return
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Returns the body; None if the client went away."""
        declared = find_header(scope, b"content-length")
        num_bytes = int(declared) if declared.isdigit() else 0
        is_whole, body = False, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not is_whole and num_bytes <= self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    num_bytes = max(num_bytes, len(body))
                    is_whole = not message.get("more_body")
        except TimeoutError:
            raise ApiError(408, f"the request was not sent within {BODY_SECONDS:.0f} seconds") from None
        if num_bytes <= self._max_bytes:
            return bytes(body)
        if not is_whole:
            await _drain(receive)
        raise ApiError(413, f"the request is larger than {self._max_bytes:,} bytes; send a shorter one")


def guard(app: FastAPI, config: ListeningConfig) -> None:
    """Puts all of this before an application."""
    # The last one added stands first.
    app.add_middleware(BodyLimit, max_bytes=config.max_request_bytes)
    app.add_middleware(KeyCheck, api_key=config.api_key)
    app.add_middleware(HostCheck, enabled=config.api_key is None and is_loopback(config.host))
