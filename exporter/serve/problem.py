"""What is told to a client whose request cannot be served: a status, a sentence, the field that it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPENAI = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}  # others by their hundred
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Problem(Exception):
    """param: the field; code: a word for programs; headers: of the answer."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    def openai(self) -> dict[str, Any]:
        kind = _OPENAI.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def wrong(param: str, message: str, code: str | None = None) -> Problem:
    """A field of a request that cannot be taken as it is."""
    return Problem(400, f"{param}: {message}", param, code)


def unsupported(param: str, why: str) -> Problem:
    return wrong(param, f"is not supported: {why}", "unsupported_parameter")
