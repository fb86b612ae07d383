"""What an HTTP client is told when something is wrong, in OpenAI's shape."""

from typing import Any

from hasten.base.errors import UserError

FAILED = "the server failed on this request; its log says why"
"""What a client is told of a mistake of the server's own."""


class ApiError(Exception):
    """A request that is answered with an error. ``param`` names the field at fault, ``code`` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: int | None = None
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        return {} if self.retry_s is None else {"retry-after": str(self.retry_s)}

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": error_type(self.status), "param": self.param, "code": self.code}}


def error_type(status: int) -> str:
    """OpenAI's name for a kind of error."""
    names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return names.get(status, "server_error" if status >= 500 else "invalid_request_error")


def refused(error: UserError, param: str | None = None) -> ApiError:
    """A user's mistake, as the engine words it; its messages begin with the field they are about."""
    message = str(error)
    return ApiError(400, message, param=param or field_of(message))


def field_of(message: str) -> str | None:
    """The field that a message of `hasten.engine` or of this package begins with."""
    words = message.removeprefix("the ").split(" ", 2)
    if words[:2] == ["beam", "width"]:
        return "beam_width"
    first = words[0].partition("[")[0].partition(".")[0].rstrip(":")
    return words[0].rstrip(":") if first in FIELDS else None


FIELDS = frozenset({
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "min_tokens", "stop", "stop_token_ids", "logit_bias", "logprobs", "prompt_logprobs", "n", "best_of", "ignore_eos", "echo", "grammar",
    "max_completion_tokens", "length_penalty", "early_stopping", "regex", "choices", "prompt", "messages", "response_format", "tokens",
    "top_logprobs", "tools", "tool_choice", "input", "text", "json_schema",
})  # fmt: skip
"""Names that messages and the API both give a field."""


def unready(retry_s: int, why: str) -> ApiError:
    """No engine answers now."""
    return ApiError(503, f"{why}; try again in {retry_s} s", code="unavailable", retry_s=retry_s)
