"""The form of an error as clients get it, and the codes they may look at."""

from pydantic import BaseModel

UNREACHABLE, UNREADABLE = "bank_unreachable", "bank_unreadable"
"""Codes of a bank that may be read a little later, and of one that may not."""


class ErrorBody(BaseModel):
    """What went wrong.

    Attributes:
        message: one sentence.
        type: the kind of error.
        param: the field it is about, if it is about one.
        code: a name for programs, if there is one.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is none.

    Attributes:
        error: what went wrong.
    """

    error: ErrorBody
