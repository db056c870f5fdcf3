"""Tensors of the Open Inference Protocol, as JSON and in Triton's binary extension."""

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from hashtab.features.storage import Array
from hashtab.serving.http import HttpError
from hashtab.serving.scorer.values import Value

HEADER_LENGTH = "Inference-Header-Content-Length"

BYTES, BOOL = "BYTES", "BOOL"
_DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_LENGTH = struct.Struct("<I")
_DIMENSIONS = 4  # of a shape that may be a list of candidates


class Tensor(msgspec.Struct):
    """An input of a request.

    Args:
        name: of the input.
        shape: sizes.
        datatype: INT64, FP32, BYTES, ...
        parameters: `binary_data_size` where the data follow the JSON.
        data: where they do not: numbers, truths or texts, nested or flat.
    """

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class Output(msgspec.Struct):
    """An output that is asked for.

    Args:
        name: of the output.
        parameters: `binary_data`, whether its data are to follow the JSON.
    """

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    """The JSON part of a request.

    Args:
        inputs: tensors.
        outputs: those that are asked for; all if there are none.
        id: repeated in the answer.
        parameters: `binary_data_output`, whether all outputs' data are to follow the JSON.
    """

    inputs: list[Tensor]
    outputs: list[Output] = []
    id: str = ""
    parameters: dict[str, Any] = {}


_decode = msgspec.json.Decoder(InferRequest).decode


def wrong(tensor: str, message: str) -> HttpError:
    """An error that names a tensor."""
    return HttpError(400, f"tensor {tensor!r} {message}", tensor)


def parse(
    body: bytes, header_length: str | None, limit: int
) -> tuple[InferRequest, dict[str, list[Value]]]:
    """Read a request and the values of its tensors, flat.

    Args:
        body: JSON, and after it the binary data of inputs in their order.
        header_length: bytes of the JSON, as its header says; all where there is none.
        limit: values of a tensor.

    Raises:
        HttpError: 400, or 422 for too many values, naming the tensor.
    """
    length = _header_length(header_length, len(body))
    try:
        request = _decode(body[:length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the request's JSON cannot be read: {error}", "body") from error
    values: dict[str, list[Value]] = {}
    left = memoryview(body)[length:]
    for tensor in request.inputs:
        if tensor.name in values:
            raise wrong(tensor.name, "is given twice")
        count = _count(tensor)
        if limit < count <= len(body):  # beyond that, the shape cannot be right
            raise HttpError(
                422, f"at most {limit} candidates are scored at once, got {count}", tensor.name
            )
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            values[tensor.name] = _from_json(tensor, count)
            continue
        if type(size) is not int or not 0 <= size <= len(left):
            raise wrong(
                tensor.name, f"has binary_data_size {size!r}, but {len(left)} bytes are left"
            )
        if tensor.data is not None:
            raise wrong(tensor.name, "has both data and binary_data_size")
        values[tensor.name] = _from_bytes(tensor, count, left[:size])
        left = left[size:]
    if len(left):
        raise HttpError(400, f"{len(left)} bytes follow the data of the last tensor", "body")
    return request, values


def _header_length(text: str | None, most: int) -> int:
    if text is None:
        return most
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) > most:
        raise HttpError(
            400,
            f"{HEADER_LENGTH} must be 0 to {most}, the body's bytes, got {text[:40]!r}",
            HEADER_LENGTH,
        )
    return int(text)


def _count(tensor: Tensor) -> int:
    shape = tensor.shape
    if tensor.datatype not in _DTYPES and tensor.datatype != BYTES:
        known = ", ".join((*_DTYPES, BYTES))
        raise wrong(tensor.name, f"has datatype {tensor.datatype[:40]!r}; known: {known}")
    if not 1 <= len(shape) <= _DIMENSIONS or not all(0 <= size < 1 << 31 for size in shape):
        raise wrong(tensor.name, f"has an impossible shape {str(shape)[:80]}")
    return math.prod(shape)


def _from_bytes(tensor: Tensor, count: int, data: memoryview) -> list[Value]:
    if tensor.datatype == BYTES:
        values: list[Value] = list(islice(_texts(tensor.name, data), count + 1))
        if len(values) != count:
            more = " or more" if len(values) > count else ""
            raise wrong(
                tensor.name,
                f"has {len(values)}{more} texts, which do not fit its shape {tensor.shape}",
            )
        return values
    dtype = _DTYPES[tensor.datatype]
    if len(data) != count * dtype.itemsize:
        raise wrong(
            tensor.name,
            f"has {len(data)} bytes of data; shape {tensor.shape} of {tensor.datatype} takes "
            f"{count * dtype.itemsize}",
        )
    if tensor.datatype == BOOL:  # a byte other than 0 and 1 is no value of a bool array
        return [bool(byte) for byte in data]
    found: list[Value] = np.frombuffer(data, dtype).tolist()
    return found


def _texts(name: str, data: memoryview) -> Iterator[str]:
    place = 0
    while place < len(data):
        if place + _LENGTH.size > len(data):
            raise wrong(name, "ends within the length of a text")
        begin = place + _LENGTH.size
        place = begin + _LENGTH.unpack_from(data, place)[0]
        if place > len(data):
            raise wrong(name, f"has a text of {place - begin} bytes, beyond the end of its data")
        try:
            yield str(data[begin:place], "utf-8")
        except UnicodeDecodeError as error:
            raise wrong(name, f"has a text that is not UTF-8: {error}") from error


def _from_json(tensor: Tensor, count: int) -> list[Value]:
    if tensor.data is None:
        raise wrong(tensor.name, "has neither data nor binary_data_size")
    values = list(islice(_flat(tensor.name, tensor.data, _DIMENSIONS), count + 1))
    if len(values) != count:
        more = " or more" if len(values) > count else ""
        raise wrong(
            tensor.name, f"has {len(values)}{more} values; its shape {tensor.shape} takes {count}"
        )
    kinds: tuple[type, ...] = (int,)
    if tensor.datatype == BYTES:
        kinds = (str,)
    elif tensor.datatype == BOOL:
        kinds = (bool,)
    elif tensor.datatype.startswith("FP"):
        kinds = (float, int)
    for value in values:
        if type(value) not in kinds:
            raise wrong(tensor.name, f"is {tensor.datatype} and holds a {type(value).__name__}")
    if "INT" in tensor.datatype:
        limits = np.iinfo(tensor.datatype.lower())
        if values and not limits.min <= min(values) <= max(values) <= limits.max:
            raise wrong(tensor.name, f"holds a value that {tensor.datatype} does not")
    return values


def _flat(name: str, data: Sequence[Any], depth: int) -> Iterator[Any]:
    for value in data:
        if not isinstance(value, list):
            yield value
        elif depth > 1:
            yield from _flat(name, value, depth - 1)
        else:
            raise wrong(name, f"has data nested deeper than {_DIMENSIONS} lists")


def answer(
    header: dict[str, Any], name: str, scores: Array, binary: bool
) -> tuple[bytes, int | None]:
    """Return the body of an answer with one FP32 output, and the bytes of its JSON part.

    Args:
        header: of the answer, without its outputs.
        name: of the output.
        scores: `[C]` float32.
        binary: whether the data follow the JSON; the length is None where they do not.
    """
    output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [len(scores)]}
    if not binary:
        output["data"] = scores.tolist()
        return msgspec.json.encode(header | {"outputs": [output]}), None
    data = scores.astype("<f4", copy=False).tobytes()
    output["parameters"] = {"binary_data_size": len(data)}
    encoded = msgspec.json.encode(header | {"outputs": [output]})
    return encoded + data, len(encoded)
