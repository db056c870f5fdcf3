"""How long who asked waits for an answer."""

from collections.abc import Mapping

from hashtab.serving.http.errors import HttpError

TIMEOUT_HEADER = "Request-Timeout-Ms"
_KEY = TIMEOUT_HEADER.lower().encode("ascii")


def timeout_s(headers: Mapping[bytes, bytes], default_ms: float) -> float:
    """Return the seconds that a request asks for by `Request-Timeout-Ms`, at most the default.

    Raises:
        HttpError: 422 if the header is not a positive number.
    """
    given = headers.get(_KEY)
    if given is None:
        return default_ms / 1000
    try:
        asked = float(given)
    except ValueError:
        asked = 0.0
    if not asked > 0:  # NaN too
        said = given.decode("latin-1")[:80]
        message = f"{TIMEOUT_HEADER} must be a positive number of milliseconds, got {said!r}"
        raise HttpError(422, message, TIMEOUT_HEADER)
    return min(asked, default_ms) / 1000
