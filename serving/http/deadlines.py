"""How long who asked waits for an answer."""

from collections.abc import Mapping

from hashtab.serving.http.errors import HttpError

TIMEOUT_HEADER = "Request-Timeout-Ms"
LEAST_MS = 1
_KEY = TIMEOUT_HEADER.lower().encode("ascii")


def timeout_s(headers: Mapping[bytes, bytes], default_ms: float) -> float:
    """Return the seconds that a request asks for by `Request-Timeout-Ms`, at most the default.

    Raises:
        HttpError: 422 if the header is not a number from 1 on.
    """
    given = headers.get(_KEY)
    if given is None:
        return default_ms / 1000
    try:
        asked = float(given)
    except ValueError:
        asked = 0.0
    if not asked >= LEAST_MS:  # NaN too
        said = given.decode("latin-1")[:80]
        message = f"{TIMEOUT_HEADER} must be milliseconds, {LEAST_MS} or more, got {said!r}"
        raise HttpError(422, message, TIMEOUT_HEADER)
    return min(asked, default_ms) / 1000
