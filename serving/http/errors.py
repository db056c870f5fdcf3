"""What can go wrong with a request or with the settings of a server."""

from collections.abc import Mapping


class SettingsError(ValueError):
    """Settings that a server cannot use: says which, and what to do about it."""


class HttpError(Exception):
    """An answer that says what was wrong; a handler raises it.

    The client gets `{"error": message, "field": field, "request_id": ...}`, without the field where
    there is none.

    Args:
        status: of HTTP, 400 to 599.
        message: a sentence that names the value and says what to do.
        field: what the message is about: `items[3]`, `user`, the name of a header.
        retry_after_s: seconds after which the same request may succeed; sent as `Retry-After`,
            rounded up.
        headers: of the answer, beside those.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.headers = headers or {}
