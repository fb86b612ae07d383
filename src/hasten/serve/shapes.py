"""What an error looks like, by the API that a path belongs to."""

from typing import Any

import msgspec

from hasten.serve.errors import ApiError

ANTHROPIC = ("/v1/messages",)
"""What paths of Anthropic's API begin with; all others are OpenAI's, or of the same shape."""


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """As the API's own clients read it."""
    return _anthropic(error) if path.startswith(ANTHROPIC) else error.body


def error_event(path: str, error: ApiError) -> bytes:
    """The last event of a stream that fails."""
    head = b"event: error\n" if path.startswith(ANTHROPIC) else b""
    return head + b"data: " + msgspec.json.encode(error_body(path, error)) + b"\n\n"


def _anthropic(error: ApiError) -> dict[str, Any]:
    kinds = {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
        503: "overloaded_error", 504: "timeout_error",
    }  # fmt: skip
    kind = kinds.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    named = error.param is None or error.param in error.message
    return {"type": "error", "error": {"type": kind, "message": error.message if named else f"{error.param}: {error.message}"}}
