"""What a client sees when a request cannot be served: one status and OpenAI's error body."""

import json
from dataclasses import dataclass, field
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than success.

    `message` says the value, the limit and the remedy; `param` names the request's field; `retry_after_s` is in seconds.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        return json.dumps({"error": self.fields()}, ensure_ascii=True).encode()

    def event(self) -> bytes:
        """The same object as one server-sent event; a stream that carries it is never followed by `[DONE]`."""
        return b"data: " + self.body() + b"\n\n"

    def fields(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def all_headers(self) -> dict[str, str]:
        """Headers of the response; Retry-After is whole seconds, at least 1."""
        headers = {"content-type": "application/json", **self.headers}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        return headers


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


def unavailable(message: str, code: str, retry_after_s: float = 5) -> ApiError:
    return ApiError(503, message, code, retry_after_s=retry_after_s)


def deadline_exceeded(timeout_s: float) -> ApiError:
    return ApiError(504, f"not finished within the deadline of {timeout_s:g} s", "deadline_exceeded")
