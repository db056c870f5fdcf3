"""The bearer token of protected endpoints."""

import hmac
from collections.abc import Mapping

from hashtab.serving.http.errors import HttpError


class Guard:
    """Lets requests with the right token pass.

    Args:
        token: that is right; None lets all pass.
    """

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode("ascii")

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Check a request's `Authorization`.

        Raises:
            HttpError: 401.
        """
        if self._token is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # In constant time: how long it takes must not tell how much of a guess is right.
        right = hmac.compare_digest(given.strip(), self._token)
        if scheme.lower() != b"bearer" or not right:
            raise HttpError(
                401,
                "this needs the header `Authorization: Bearer TOKEN` with the server's token",
                "Authorization",
                headers={"WWW-Authenticate": 'Bearer realm="hashtab"'},
            )
