"""Requests of the Open Inference Protocol that no server should take: broken binary tensors."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from experiments.online.bad_requests import Bad
from experiments.online.client import request
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import User

PATH = "/v2/models/hashtab/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"
REFUSED, TAKEN = frozenset({400, 422}), frozenset({200})
_SIZE = "binary_data_size"


@dataclass(kw_only=True)
class Message:
    """A good request in parts, to be broken.

    Args:
        header: of the JSON part.
        parts: bytes of each input, in their order.
        headers: of HTTP.
    """

    header: dict[str, Any]
    parts: list[bytes]
    headers: dict[str, str] = field(default_factory=dict)
    path: str = PATH

    def data(self, cut: int = 0, more: bytes = b"") -> bytes:
        """Return the whole request, some bytes cut from its end or added there."""
        plain = json.dumps(self.header).encode()
        body = plain + b"".join(self.parts) + more
        body = body[: len(body) - cut]
        named = {HEADER_LENGTH: str(len(plain)), **self.headers}
        return request("POST", self.path, body, named)

    def input(self, random: Random) -> dict[str, Any]:
        """Return one of the inputs' descriptions."""
        chosen: dict[str, Any] = random.choice(self.header["inputs"])
        return chosen


def good(bundle: Bundle, user: User, count: int, random: np.random.Generator) -> Message:
    """Return a request with user and items as binary tensors."""
    items = bundle.catalogue.items.gather(random.integers(0, len(bundle.catalogue), count))
    values: list[tuple[str, list[Any]]] = [("USER", [user]), ("ITEMS", items.to_list())]
    inputs, parts = [], []
    for name, column in values:
        text = isinstance(column[0], str)
        raw = _texts(column) if text else np.array(column, "<i8").tobytes()
        kind = "BYTES" if text else "INT64"
        inputs.append(
            {
                "name": name,
                "shape": [len(column)],
                "datatype": kind,
                "parameters": {_SIZE: len(raw)},
            }
        )
        parts.append(raw)
    outputs = [{"name": "SCORES", "parameters": {"binary_data": True}}]
    return Message(header={"inputs": inputs, "outputs": outputs}, parts=parts)


def _texts(values: list[str]) -> bytes:
    raw = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in raw)


Breaker = Callable[[Message, Random], Bad]


def header_length(message: Message, random: Random) -> Bad:
    """A length of the JSON part that is none, too long or too short."""
    plain = len(json.dumps(message.header))
    said = random.choice(["-1", "abc", str(10**30), "1e3", "", "0", str(plain - 1), str(10**6)])
    message.headers[HEADER_LENGTH] = said
    return Bad(kind="header length", data=message.data(), statuses=REFUSED)


def binary_size(message: Message, random: Random) -> Bad:
    """A size of a tensor's data that is not that of its data."""
    tensor = message.input(random)
    size = tensor["parameters"][_SIZE]
    wrong = [-1, 0, size - 1, size + 1, 2**31, 2**63, 2**70, 1.5, "8", True, [], {}]
    tensor["parameters"][_SIZE] = random.choice(wrong)
    return Bad(kind="binary size", data=message.data(), statuses=REFUSED)


def shape(message: Message, random: Random) -> Bad:
    """A shape that does not fit, or is none."""
    tensor = message.input(random)
    count = tensor["shape"][0]
    wrong = [[-1], [0], [count + 1], [2**40], [2**70], [1] * 9 + [count], [-count, -1], [], None]
    tensor["shape"] = random.choice([*wrong, [str(count)], [count + 0.5], count, [[count]]])
    return Bad(kind="shape", data=message.data(), statuses=REFUSED)


def datatype(message: Message, random: Random) -> Bad:
    """A type of values that there is not, or that these are not."""
    tensor = message.input(random)
    tensor["datatype"] = random.choice(["FP99", "", "BF16", "int64", "FP16", "x" * 9000, None, 7])
    return Bad(kind="datatype", data=message.data(), statuses=REFUSED)


def names(message: Message, random: Random) -> Bad:
    """Inputs that are missing, unknown or there twice."""
    inputs, parts = message.header["inputs"], message.parts
    place = random.randrange(len(inputs))
    name = inputs[place]["name"]
    how = random.choice(["missing", "unknown", "twice", "none"])
    if how == "missing":
        del inputs[place], parts[place]
    elif how == "unknown":
        name = inputs[place]["name"] = random.choice(["user", "X", "", "\u0000", "a" * 3000])
    elif how == "twice":
        inputs.append(inputs[place])
        parts.append(parts[place])
    else:
        message.header["inputs"], message.parts = [], []
        name = "USER"
    return Bad(kind=f"{how} input", data=message.data(), statuses=REFUSED, names=name[:80] or None)


def both_or_neither(message: Message, random: Random) -> Bad:
    """Data in JSON and behind it, or nowhere."""
    tensor = message.input(random)
    if random.random() < 0.5:
        tensor["data"] = [1]
    else:
        tensor["parameters"] = {}
    return Bad(kind="data twice", data=message.data(), statuses=REFUSED)


def ends(message: Message, random: Random) -> Bad:
    """Data that end too soon or too late."""
    if random.random() < 0.5:
        data = message.data(cut=random.randint(1, sum(map(len, message.parts))))
    else:
        data = message.data(more=random.randbytes(random.randint(1, 100)))
    return Bad(kind="cut tensor", data=data, statuses=REFUSED)


def text_lengths(message: Message, random: Random) -> Bad:
    """Texts that reach beyond the data, or are no UTF-8."""
    raw = random.choice(
        [
            b"\xff\xff\xff\xff",
            b"\x05\x00\x00\x00abc",
            b"\x01\x00",
            b"\x02\x00\x00\x00\xff\xfe",
            b"\x00\x00\x00\x80",
        ]
    )
    _put(message, "ITEMS", "BYTES", raw, 1)
    return Bad(kind="texts", data=message.data(), statuses=REFUSED, names="ITEMS")


def outputs(message: Message, random: Random) -> Bad:
    """Outputs that there are not."""
    message.header["outputs"] = random.choice(
        [
            [{"name": "PROBABILITIES"}],
            [{"name": "SCORES", "parameters": {"classification": 3}}],
            [{"name": None}],
            "SCORES",
            [{}],
        ]
    )
    return Bad(kind="outputs", data=message.data(), statuses=REFUSED)


def json_data(message: Message, random: Random) -> Bad:
    """Data in JSON of the wrong type, number or depth."""
    data = random.choice(
        [["a"], [None], [{}], [1.5], [2**63], [True], [1, 2, 3], [[[[[[1]]]]]], "abc", 5, []]
    )
    tensor = {"name": "USER", "shape": [1], "datatype": "INT64", "data": data}
    message.header["inputs"][0], message.parts[0] = tensor, b""
    return Bad(kind="JSON data", data=message.data(), statuses=REFUSED)


def odd_items(message: Message, random: Random) -> Bad:
    """Items that no catalogue has are unknown, those that no item can be are refused."""
    if random.random() < 0.5:
        values = [-1, 0, 2**63 - 1, -(2**63), 2**32]
        drawn = [random.choice(values) for _ in range(5)]
        _put(message, "ITEMS", "INT64", struct.pack("<5q", *drawn), 5)
        return Bad(kind="unknown items", data=message.data(), statuses=TAKEN)
    numbers = [float("nan"), float("inf"), -float("inf"), 1e300, -1.0, 0.5]
    _put(message, "ITEMS", "FP64", struct.pack("<5d", *random.sample(numbers, 5)), 5)
    return Bad(kind="items that are none", data=message.data(), statuses=REFUSED, names="ITEMS")


def elsewhere(message: Message, random: Random) -> Bad:
    """A model or a version that is not served, or a body that is compressed."""
    if random.random() < 0.2:
        message.headers["Content-Encoding"] = random.choice(["gzip", "br", "deflate"])
        return Bad(kind="compressed", data=message.data(), statuses=frozenset({415}))
    model = random.choice(["other", "..%2f..%2fetc", "%00", "hashtab%20", "a" * 2000])
    path = f"/v2/models/{model}/infer"
    message.path = random.choice([path, "/v2/models/hashtab/versions/-1/infer"])
    return Bad(kind="elsewhere", data=message.data(), statuses=frozenset({400, 404}))


def _put(message: Message, name: str, kind: str, raw: bytes, count: int) -> None:
    place = [tensor["name"] for tensor in message.header["inputs"]].index(name)
    tensor = message.header["inputs"][place]
    tensor |= {"datatype": kind, "shape": [count], "parameters": {_SIZE: len(raw)}}
    message.parts[place] = raw


BREAKERS: list[Breaker] = [
    header_length,
    binary_size,
    shape,
    datatype,
    names,
    both_or_neither,
    ends,
    text_lengths,
    outputs,
    json_data,
    odd_items,
    elsewhere,
]
