"""What a client is told when a request can't be done."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status (int): The HTTP status.
        message (str): What is wrong and what to do, in one line.
        code (str, optional): OpenAI's name of it. Default: ``None``.
        headers (dict, optional): Headers of the answer. Default: ``None``.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the answer's body, as OpenAI's API has it."""
        kind = "server_error" if self.status == 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


class Gone(Exception):
    """The client has closed its connection."""


def overloaded(message: str, seconds: int = 1) -> ApiError:
    """Return a 503 that says when to come back."""
    return ApiError(503, message, "overloaded", {"Retry-After": str(seconds)})


def bad(message: str, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, code)


def told_of(error: Exception) -> ApiError:
    """Return what a client is told of an error of the generation."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(500, f"The model can't go on: {' '.join(str(error).split())[:300]}")
    return ApiError(500, f"The model failed ({type(error).__name__}). The server goes on.")
