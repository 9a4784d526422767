"""What goes wrong with a request, in the form that clients of OpenAI's API understand.

Every error is ``{"error": {"message", "type", "param", "code"}}`` with a message of one line; ``param`` is the field.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from flows.serving.error_models import UNREACHABLE, UNREADABLE, ErrorBody, ErrorResponse
from schemas.errors import BankError, InputError

MAX_MESSAGE_CHARS = 300


class ApiError(Exception):
    """An error that a client is told.

    Attributes:
        status: status of the response.
        body: what the client is told.
        headers: headers beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Makes the error; everything below 500 is the client's."""
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(message=_clean(message), type=TYPES.get(status, "server_error"), param=param, code=code)

    def to_text(self) -> str:
        """Returns the body as it is sent."""
        return ErrorResponse(error=self.body).model_dump_json()

    def make_response(self) -> Response:
        """Returns the whole response."""
        return Response(self.to_text(), self.status, self.headers, media_type="application/json")


TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""The kind of error by status; all others are the server's."""

CAUSES = {
    400: "the request cannot be understood, or asks for what is not supported",
    401: "the API key is missing or wrong",
    404: "there is no such thing",
    413: "the request is too large",
    429: "too many requests wait; come back after Retry-After seconds",
    503: "the bank cannot be read",
    504: "the time for a request is over",
}

Responses = dict[int | str, dict[str, Any]]
"""What a route says of its responses, by status."""


def describe_errors(*statuses: int) -> Responses:
    """Returns what a route says of its errors in the server's schema."""
    return {status: {"model": ErrorResponse, "description": CAUSES[status]} for status in statuses}


def explain_error(error: BankError) -> ApiError:
    """Returns a known error as clients are told it: what they gave is theirs, the rest the server's."""
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    code = UNREACHABLE if error.may_pass else UNREADABLE
    return ApiError(503, f"the bank cannot be read: {error}", code=code)


def _clean(message: str) -> str:
    """Returns one line that can be encoded, whatever of the request it quotes."""
    line = " ".join(message.split())
    line = line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 3] + "..."
    return line.encode("utf-8", "replace").decode()


def _explain_validation(errors: Sequence[Any]) -> ApiError:
    # Where a value may be of several types, the error that is not about the type is about the one that was meant.
    first = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = [str(part) for part in first["loc"]]
    # Members of a union stand in the place too, by the name of their type: they are no fields.
    is_unknown = first["type"] == "extra_forbidden"
    inner = [part for part in place[1:-1] if (part.isidentifier() or part.isdigit()) and part != "str"]
    fields = inner + [part for part in place[1:][-1:] if is_unknown or (part.isidentifier() and part != "str")]
    name = ".".join(fields)
    param = _clean(name) if place[:1] in (["body"], ["path"], ["query"]) and name else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not supported; leave it out", param=param, code="unsupported_field")
    if first["type"] == "missing" and not name:
        return ApiError(400, "the body is missing; send JSON with the header Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message}" if name else message, param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Makes an application answer every error in this form."""

    @app.exception_handler(ApiError)
    async def answer_api_error(_request: Request, error: ApiError) -> Response:
        return error.make_response()

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(_request: Request, error: RequestValidationError) -> Response:
        return _explain_validation(error.errors()).make_response()

    @app.exception_handler(BankError)
    async def answer_bank_error(_request: Request, error: BankError) -> Response:
        return explain_error(error).make_response()

    @app.exception_handler(HTTPException)
    async def answer_http_error(_request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).make_response()

    @app.exception_handler(Exception)
    async def answer_defect(_request: Request, _error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says why").make_response()
