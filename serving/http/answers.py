"""Turns replies and errors into what ASGI sends."""

import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

import msgspec
from starlette.types import Send

from hashtab.serving.http.errors import HttpError
from hashtab.serving.http.service import Reply

_encode = msgspec.json.Encoder().encode
_NO_CONTENT = 204


class ErrorBody(msgspec.Struct, omit_defaults=True):
    """The JSON of every answer from status 400 on."""

    error: str
    field: str | None = None
    request_id: str | None = None


class Answer(NamedTuple):
    """What is sent: nothing in it can fail any more."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def answer_of(reply: Reply) -> Answer:
    """Encode a reply.

    Raises:
        TypeError: if msgspec cannot encode its content.
        UnicodeEncodeError: if its headers or its content hold what cannot be sent.
    """
    content = reply.content
    body = content if isinstance(content, bytes) else _encode(content)
    if reply.status == _NO_CONTENT:
        headers = []
    else:
        headers = [
            (b"content-type", reply.media_type.encode("latin-1")),
            (b"content-length", b"%d" % len(body)),
        ]
    for name, value in (reply.headers or {}).items():
        headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    return Answer(reply.status, headers, body)


def answer_of_error(error: HttpError, request_id: str | None) -> Answer:
    """Encode an error."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    message = error.message.encode(errors="replace").decode()
    body = ErrorBody(error=message, field=error.field, request_id=request_id)
    return answer_of(Reply(body, error.status, headers))


def on_the_wire(answer: Answer) -> tuple[bytes, bytes]:
    """Return an answer as HTTP/1.1, in two pieces between which more headers may stand."""
    phrase = HTTPStatus(answer.status).phrase
    start = f"HTTP/1.1 {answer.status} {phrase}\r\n".encode("ascii")
    return start, b"%s\r\n%s" % (header_lines(answer.headers), answer.body)


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as HTTP/1.1."""
    return b"".join(b"%s: %s\r\n" % header for header in headers)


async def send_answer(send: Send, answer: Answer) -> None:
    """Send an answer."""
    status, headers, body = answer
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
