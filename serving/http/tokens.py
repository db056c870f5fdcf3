"""Who may use protected endpoints: those with the bearer token, or without one this machine."""

import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from hashtab.serving.http.errors import HttpError
from hashtab.serving.http.settings import is_loopback


class Guard:
    """Lets requests with the right token pass.

    Args:
        token: that is right; None lets requests pass that name this machine. A web page of
            elsewhere that a browser here shows cannot make such ones.
    """

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode("ascii")

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Check a request.

        Raises:
            HttpError: 401 without the token; 403 where none is asked for and another machine is
                named.
        """
        if self._token is None:
            _check_local(headers)
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


def _check_local(headers: Mapping[bytes, bytes]) -> None:
    host = headers.get(b"host", b"localhost")
    origin = headers.get(b"origin")
    for name, given in (("Host", b"//" + host), ("Origin", origin)):
        if given is not None and not _names_this_machine(given):
            raise HttpError(
                403,
                f"without a token this is for requests to localhost alone, and {name} names "
                "another machine: give the server a token (HASHTAB_TOKEN or --token-file)",
                name,
            )


def _names_this_machine(url: bytes) -> bool:
    try:
        return is_loopback(urlsplit(url.decode("latin-1")).hostname or "")
    except ValueError:
        return False
