"""Reads the body of a request and decodes it, with errors that name what is wrong."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import Receive

from hashtab.serving.http.errors import HttpError

_AT = re.compile(r"(?P<what>.*) - at `(?P<path>[^`]*)`", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL)


class ClientGoneError(Exception):
    """The client closed the connection before its request was answered."""


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> bytes:
    """Return the body as it came.

    Args:
        receive: of ASGI.
        headers: by lower-case name.
        limit: bytes that a body may have.

    Raises:
        HttpError: 413 if it is longer than that, 400 if `Content-Length` is no number.
        ClientGoneError: if the client closes the connection first.
    """
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise HttpError(400, "Content-Length must be a number", "Content-Length")
    if len(length) > 18 or int(length) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    left = limit
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        piece = message.get("body", b"")
        left -= len(piece)
        if left < 0:
            raise _too_large(limit)
        pieces.append(piece)
        if not message.get("more_body"):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes: send less at once")


def check_json(content_type: bytes | None) -> None:
    """Check that a body is said to be JSON; one that says nothing is taken for it.

    Raises:
        HttpError: 415.
    """
    if content_type is None or content_type == b"application/json":
        return
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        said = content_type.decode("latin-1")
        message = f"the body must be application/json, got {said!r}"
        raise HttpError(415, message, "Content-Type")


def decode_json(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Decode and check a body.

    Raises:
        HttpError: 400 if it is not JSON, 422 if it is not what the endpoint takes.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error)) from None
    except msgspec.DecodeError as error:
        reason = "it is empty" if not body else str(error).removeprefix("JSON is malformed: ")
        raise HttpError(400, f"the body is not JSON: {reason}") from None
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is not UTF-8: {error.reason}") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply") from None


def _wrong_value(message: str) -> HttpError:
    found = _AT.fullmatch(message)
    what, path = (found["what"], found["path"]) if found else (message, "$")
    field = path.removeprefix("$").removeprefix(".")
    if named := _NAMED.fullmatch(what):
        field = f"{field}.{named['name']}" if field else named["name"]
    return HttpError(422, f"{field or 'the body'}: {what[0].lower()}{what[1:]}", field or None)
