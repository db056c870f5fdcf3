"""Requests that no service should take, each with what a right answer to it is.

Bodies are made as text and not from objects, since what is to be tried is often no JSON that a
library would write: NaN, a name twice, an integer of thousands of digits, half a surrogate.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from experiments.online.client import request

OK, MALFORMED, WRONG = frozenset({200}), frozenset({400}), frozenset({422})
MISPLACED = frozenset({400, 404, 405})


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One bad request.

    Args:
        kind: of what is bad about it.
        data: its bytes.
        statuses: that are right.
        names: what the message or its field must name.
        broken: HTTP itself is broken, or its end is missing: the server may close the connection
            without an answer, and nothing else can be sent on it.
    """

    kind: str
    data: bytes
    statuses: frozenset[int]
    names: str | None = None
    broken: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """One endpoint that takes JSON.

    Args:
        path: of the endpoint.
        body: a good one.
        wrong: where to put what is wrong -> JSON texts that are wrong there. A place is a path of
            names and indices such as `events.0.user`.
        required: names that must not be left out, as places.
        strict: whether names that are not known are refused.
        list_at: place of a list, and the most entries that it may have; None where there is none.
        headers: that a good request has.
    """

    path: str
    body: Mapping[str, Any]
    wrong: Mapping[str, Sequence[str]]
    required: Sequence[str]
    strict: bool
    list_at: tuple[str, int] | None
    headers: Mapping[str, str]

    def __post_init__(self) -> None:
        probe = "0" * 50
        for place in self.wrong:
            assert probe in self.text({place: probe}), f"{self.path} has no {place}"

    def post(self, body: bytes | str, **headers: str) -> bytes:
        """Return a request with this body."""
        raw = body if isinstance(body, bytes) else body.encode()
        named = {"Content-Type": "application/json", **self.headers}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        return request("POST", self.path, raw, named)

    def text(self, places: Mapping[str, str] | None = None, without: str | None = None) -> str:
        """Return the good body as JSON, with texts put in some places, or without one."""
        return _text(self.body, "", places or {}, without)


def _text(value: Any, here: str, places: Mapping[str, str], without: str | None) -> str:
    if here in places:
        return places[here]
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(name)}:{_text(part, _place(here, name), places, without)}"
            for name, part in value.items()
            if _place(here, name) != without
        ]
        return "{" + ",".join(parts) + "}"
    if isinstance(value, list):
        parts = [_text(part, _place(here, i), places, without) for i, part in enumerate(value)]
        return "[" + ",".join(parts) + "]"
    return json.dumps(value)


def _place(here: str, name: str | int) -> str:
    return f"{here}.{name}" if here else str(name)


Maker = Callable[[Target, Random], Bad]


def wrong_value(target: Target, random: Random) -> Bad:
    """One value of the wrong type, size or sign."""
    place = random.choice(list(target.wrong))
    text = random.choice(target.wrong[place])
    # A name that the endpoint does not know beforehand, as of a context feature, may stay unnamed.
    parts = [part for part in place.split(".") if not part.isdigit()]
    name = parts[0] if parts[0] == "context" else parts[-1]
    data = target.post(target.text({place: text}))
    return Bad(kind="wrong value", data=data, statuses=WRONG, names=name)


def no_number(target: Target, random: Random) -> Bad:
    """What is no JSON: NaN, Infinity, numbers with a leading zero or plus, bare words."""
    place = random.choice(list(target.wrong))
    text = random.choice(["NaN", "-Infinity", "+1", "01", "1.", ".5", "0x10", "None", "'a'", "\\"])
    # A parser may meet the wrong type of a value before the end of what is none.
    data = target.post(target.text({place: text}))
    return Bad(kind="no JSON", data=data, statuses=MALFORMED | WRONG)


def half_surrogate(target: Target, random: Random) -> Bad:
    """A string that no UTF-8 can hold."""
    place = random.choice(list(target.wrong))
    text = random.choice(['"\\ud800"', '"\\udfff"', '"a\\ud83d"', '"\\ud800\\u0041"'])
    return Bad(kind="surrogate", data=target.post(target.text({place: text})), statuses=MALFORMED)


def missing(target: Target, random: Random) -> Bad:
    """A name that must be there is left out."""
    place = random.choice(list(target.required))
    data = target.post(target.text(without=place))
    return Bad(kind="missing", data=data, statuses=WRONG, names=place.split(".")[-1])


def unknown_name(target: Target, random: Random) -> Bad:
    """A name too many."""
    name = random.choice(["itms", "__proto__", "a" * 5000, "", "\u0000", "用户"])
    extra = json.dumps(name) + ":" + random.choice(["1", "null", "[]", '"x"'])
    data = target.post(target.text()[:-1] + "," + extra + "}")
    statuses = WRONG if target.strict else OK
    return Bad(kind="unknown name", data=data, statuses=statuses)


def name_twice(target: Target, random: Random) -> Bad:
    """A name twice; the last counts, as in most parsers, so the body must be judged by it."""
    place = random.choice([p for p in target.wrong if "." not in p] or list(target.body))
    bad = random.choice(target.wrong.get(place, ["true"]))
    data = target.post(target.text()[:-1] + f",{json.dumps(place)}:{bad}" + "}")
    return Bad(kind="name twice", data=data, statuses=WRONG, names=place)


def cut(target: Target, random: Random) -> Bad:
    """The begin of a body with the length that fits it."""
    whole = target.text().encode()
    return Bad(
        kind="cut body", data=target.post(whole[: random.randrange(len(whole))]), statuses=MALFORMED
    )


def garbled(target: Target, random: Random) -> Bad:
    """A body with bytes that are no UTF-8 within a string, or anywhere."""
    whole = bytearray(target.text().encode())
    quote = whole.find(b'"', random.randrange(len(whole) // 2))
    broken = random.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80", b"\xfe"])
    whole[quote + 1 : quote + 1] = broken
    return Bad(kind="broken UTF-8", data=target.post(bytes(whole)), statuses=MALFORMED | WRONG)


def noise(target: Target, random: Random) -> Bad:
    """Bytes at random in place of a body."""
    size = random.choice([0, 1, 2, 7, 64, 1000, 20_000])
    return Bad(kind="noise", data=target.post(random.randbytes(size)), statuses=MALFORMED | WRONG)


def deep(target: Target, random: Random) -> Bad:
    """Brackets within brackets."""
    depth, left, right = (
        random.choice([100, 10_000, 300_000]),
        *random.choice(["[]", ('{"a":', "}")]),
    )
    place = random.choice(list(target.wrong))
    text = left * depth + ("1" if left != "[" else "") + right * depth
    data = target.post(target.text({place: text}))
    return Bad(kind="deep", data=data, statuses=MALFORMED | WRONG)


def huge_number(target: Target, random: Random) -> Bad:
    """A number of thousands of digits, or beyond float64."""
    place = random.choice(list(target.wrong))
    text = random.choice(["9" * 5_000, "-" + "9" * 20_000, "1e400", "-1e99999", "1" + "0" * 400])
    data = target.post(target.text({place: text}))
    # As a user or an item, where any number may stand, it may be taken for an unknown one.
    return Bad(kind="huge number", data=data, statuses=OK | MALFORMED | WRONG)


def too_many(target: Target, random: Random) -> Bad:
    """A list that is too long, or a body that is too large."""
    if target.list_at is None or random.random() < 0.2:
        data = target.post(target.text()[:-1] + " " * (5 << 20) + "}")
        return Bad(kind="too large", data=data, statuses=frozenset({413}), broken=True)
    place, most = target.list_at
    entries: Any = target.body
    for part in place.split("."):
        entries = entries[part]
    count = most + random.choice([1, 2, 1000])
    text = "[" + ",".join([json.dumps(entries[0])] * count) + "]"
    data = target.post(target.text({place: text}))
    return Bad(kind="too many", data=data, statuses=frozenset({413, 422}), names=place)


def content_type(target: Target, random: Random) -> Bad:
    """A body that is said to be something else."""
    said = random.choice(["text/plain", "application/xml", "multipart/form-data", "é", "json", ""])
    data = target.post(target.text(), Content_Type=said)
    return Bad(kind="content type", data=data, statuses=frozenset({415}), names="Content-Type")


def timeout_header(target: Target, random: Random) -> Bad:
    """A deadline that is no positive number."""
    said = random.choice(["0", "-1", "soon", "NaN", "", "1,5", "-inf", "1e", "0x10", "1 2"])
    data = target.post(target.text(), Request_Timeout_Ms=said)
    return Bad(kind="timeout header", data=data, statuses=WRONG, names="Request-Timeout-Ms")


JSON_MAKERS: list[Maker] = [
    *[wrong_value] * 8,
    no_number,
    half_surrogate,
    *[missing] * 2,
    unknown_name,
    name_twice,
    *[cut] * 2,
    garbled,
    noise,
    deep,
    huge_number,
    too_many,
    content_type,
    timeout_header,
]


def path_trick(target: Target, random: Random) -> Bad:
    """A path that leads nowhere."""
    path = random.choice(
        [
            "/v1/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//v1/score",
            f"{target.path}/",
            f"{target.path}%00",
            f"{target.path};a=b",
            f"{target.path}%2f..%2fscore",
            "/v1/models/..%2f..%2fetc%2fpasswd",
            "/" + "a" * 8000,
            "/%ff%fe",
            "/v1/users/%ff",
            "/v2/models/%00/infer",
            "/v2/models/..%2f../infer",
            "/v2/models/" + "x" * 3000,
            "/.git/config",
            "/favicon.ico%0d%0aSet-Cookie:a=b",
        ]
    )
    method = random.choice(["GET", "POST", "PUT"])
    # What is malformed may also be refused before anyone looks for it.
    statuses = MISPLACED | {414, 422}
    return Bad(kind="path", data=request(method, path, {}), statuses=statuses)


def method(target: Target, random: Random) -> Bad:
    """A method that the path does not have."""
    name = random.choice(["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW", "get"])
    statuses = frozenset({400, 405, 501})
    return Bad(kind="method", data=request(name, target.path), statuses=statuses, broken=True)


def length_lie(target: Target, random: Random) -> Bad:
    """A Content-Length that is not that of the body, or none at all."""
    body = target.text().encode()
    said = random.choice(
        [
            *(str(len(body) + 1), str(10 * len(body)), str(len(body) // 2), "-1", "ten", "1e3"),
            *("+5", "0x20", "9" * 30, "", f"{len(body)}, {len(body) + 1}"),
            "5\r\nContent-Length: 7",
        ]
    )
    data = target.post(body, Content_Length=said)
    statuses = MALFORMED | WRONG | {408, 411, 413, 415}
    return Bad(kind="content length", data=data, statuses=statuses, broken=True)


def chunks(target: Target, random: Random) -> Bad:
    """Chunks of a wrong size, without an end, or beside a Content-Length."""
    body = target.text().encode()
    size = random.choice([b"%x" % (len(body) + 5), b"-5", b"zz", b"f" * 20, b"%x;a=b" % len(body)])
    end = random.choice([b"", b"\r\n", b"\r\n0\r\n", b"\r\n5\r\nab"])
    head = f"POST {target.path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    both = random.choice(["", "Content-Length: 4\r\n"])
    data = f"{head}{both}\r\n".encode() + size + b"\r\n" + body + end
    statuses = MALFORMED | WRONG | {401, 408, 413}
    return Bad(kind="chunks", data=data, statuses=statuses, broken=True)


def header_garbage(target: Target, random: Random) -> Bad:
    """Headers that are none, or far too many."""
    line = random.choice(
        [
            b"no colon here",
            b": no name",
            b"Bad Name: 1",
            b"A: \x00",
            b"A: b\rc",
            b"X: " + b"y" * 200_000,
            b"\r\n".join(b"H%d: 1" % i for i in range(5000)),
            b"X-Request-Id: " + random.randbytes(20).replace(b"\n", b"").replace(b"\r", b""),
            b"Traceparent: 00-" + b"g" * 32 + b"-1-0",
            b"Authorization: Bearer " + b"x" * 10_000,
            b"Content-Encoding: gzip",
            b"Expect: 100-continue",
            b"Transfer-Encoding: identity",
        ]
    )
    good = target.post(target.text())
    first, rest = good.split(b"\r\n", 1)
    data = first + b"\r\n" + line + b"\r\n" + rest
    statuses = OK | MALFORMED | {401, 413, 415, 417, 431, 501}
    return Bad(kind="headers", data=data, statuses=statuses, broken=True)


def no_http(target: Target, random: Random) -> Bad:
    """What is no HTTP/1.1 at all."""
    data = random.choice(
        [
            random.randbytes(random.choice([1, 16, 1000])) + b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(64),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET " + b"/a" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"\r\n" * 1000,
            f"POST {target.path} HTTP/1.1\r\nHost: a\r\nContent-Le".encode(),
        ]
    )
    statuses = MALFORMED | {404, 414, 431, 505}
    return Bad(kind="no HTTP", data=data, statuses=statuses, broken=True)


HTTP_MAKERS: list[Maker] = [
    path_trick,
    method,
    length_lie,
    chunks,
    header_garbage,
    no_http,
]
