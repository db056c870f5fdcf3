"""The Open Inference Protocol as Triton's own client speaks it, and whatever else may come."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from tritonclient.utils import InferenceServerException

from hashtab.serving.http import HttpError
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.scorer.tensors import parse
from tests.serving.scorer.servers import Answer, Server, scorer

ITEMS = [7, 14, 9999, 0]
TIME_US = 1_677_672_000_000_000
often = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(server.address) as made:
        yield made


def inputs(binary: bool = True, **other: tuple[str, np.ndarray]) -> list[Any]:
    tensors = {
        "USER": ("INT64", np.array([100])),
        "ITEMS": ("INT64", np.array(ITEMS)),
        "display": ("BYTES", np.array(["d1"] * len(ITEMS), object)),
        "TIME": ("INT64", np.array([TIME_US])),
        **other,
    }
    made = []
    for name, (datatype, values) in tensors.items():
        tensor = triton.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, binary_data=binary)
        made.append(tensor)
    return made


@pytest.fixture(scope="module")
def expected(server: Server) -> list[float]:
    asked = {"user": 100, "items": ITEMS, "context": {"display": "d1"}, "time": TIME_US}
    found: list[float] = server.score(**asked)["scores"]
    return found


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tritons_client_gets_the_scores(
    client: Any, expected: list[float], binary_in: bool, binary_out: bool
) -> None:
    wanted = [triton.InferRequestedOutput("SCORES", binary_data=binary_out)]
    answer = client.infer("hashtab", inputs(binary_in), outputs=wanted, request_id="mine")
    scores = answer.as_numpy("SCORES")
    assert scores.dtype == np.float32
    assert scores.tolist() == expected
    said = answer.get_response()
    assert (said["id"], said["parameters"]["history"]) == ("mine", "table")
    assert said["parameters"]["unknown_items"] == 1


@pytest.mark.parametrize(
    "other",
    [
        {"USER": ("BYTES", np.array(["0100"], object))},
        {"USER": ("INT32", np.array([100], np.int32))},
        {"ITEMS": ("BYTES", np.array([str(item) for item in ITEMS], object))},
        {"display": ("BYTES", np.array(["d1"], object))},
        {"TIME": ("BYTES", np.array(["2023-03-01T12:00:00Z"], object))},
    ],
)
def test_inputs_may_be_of_other_types_and_single(
    client: Any, expected: list[float], other: dict[str, Any]
) -> None:
    assert client.infer("hashtab", inputs(**other)).as_numpy("SCORES").tolist() == expected


def test_a_version_can_be_asked_for(client: Any, shop_bundle: Path, expected: list[float]) -> None:
    version = BundleManifest.read(shop_bundle).digest[:12]
    answer = client.infer("hashtab", inputs(), model_version=version)
    assert answer.as_numpy("SCORES").tolist() == expected
    with pytest.raises(InferenceServerException, match="not served"):
        client.infer("hashtab", inputs(), model_version="7")


def test_tritons_client_sees_server_and_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("hashtab")
    assert not client.is_model_ready("another")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    found = client.get_model_metadata("hashtab")
    assert {i["name"]: i["datatype"] for i in found["inputs"]} == {
        "USER": "INT64",
        "ITEMS": "INT64",
        "display": "BYTES",
        "TIME": "INT64",
    }
    assert found["outputs"] == [{"name": "SCORES", "datatype": "FP32", "shape": [-1]}]


def test_tritons_client_reads_statistics(client: Any) -> None:
    def counts() -> tuple[int, int]:
        (found,) = client.get_inference_statistics("hashtab")["model_stats"]
        stats = found["inference_stats"]
        return stats["success"]["count"], stats["fail"]["count"]

    succeeded, failed = counts()
    client.infer("hashtab", inputs())
    with pytest.raises(InferenceServerException):
        client.infer("hashtab", inputs()[:1])
    assert counts() == (succeeded + 1, failed + 1)


def test_tritons_client_loads_and_cannot_unload(
    shop_bundle: Path, shop_store: Path, again: Any, tmp_path: Path
) -> None:
    other = again("other")
    options = ("--bundle", shop_bundle, "--store", shop_store)
    with (
        scorer(tmp_path / "server", *options) as running,
        triton.InferenceServerClient(running.address) as client,
    ):
        client.load_model("hashtab", config=json.dumps({"bundle": str(other)}))
        (row,) = client.get_model_repository_index()
        version = BundleManifest.read(other).digest[:12]
        assert (row["name"], row["version"], row["state"]) == ("hashtab", version, "READY")
        with pytest.raises(InferenceServerException, match="only model"):
            client.unload_model("hashtab")
        with pytest.raises(InferenceServerException, match="holds no bundle"):
            client.load_model("hashtab", config=json.dumps({"bundle": str(tmp_path)}))
        assert client.get_model_metadata("hashtab")["versions"] == [version]


def tensor(name: str, shape: Any, datatype: str, **other: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, **other}


def user(**other: Any) -> dict[str, Any]:
    return tensor("USER", [1], "INT64", data=[100]) | other


def items(**other: Any) -> dict[str, Any]:
    return tensor("ITEMS", [2], "INT64", data=[7, 14]) | other


def binary(shape: Any, datatype: str, data: bytes, size: Any = None) -> tuple[Any, bytes]:
    parameters = {"binary_data_size": len(data) if size is None else size}
    return tensor("ITEMS", shape, datatype, parameters=parameters), data


def infer(
    server: Server, tensors: list[Any], data: bytes = b"", header: dict[str, str] | None = None
) -> Answer:
    head = json.dumps({"inputs": tensors}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))} | (header or {})
    return server.ask("POST", "/v2/models/hashtab/infer", head + data, length)


def test_what_the_other_cases_change_is_right(server: Server) -> None:
    assert infer(server, [user(), items()]).status == 200
    sent, data = binary([2], "INT64", struct.pack("<2q", 7, 14))
    assert infer(server, [user(), sent], data).status == 200


@pytest.mark.parametrize(
    ("sent", "data"),
    [
        (items(datatype="INT65"), b""),
        (items(datatype="FP32"), b""),
        (items(shape=[3]), b""),
        (items(shape=[-2]), b""),
        (items(shape=[]), b""),
        (items(shape=[1, 1, 1, 1, 2]), b""),
        (items(shape=[2**62, 2**62]), b""),
        (items(data=[7, "14"]), b""),
        (items(data=[7, True]), b""),
        (items(data=[7, 2**63]), b""),
        (items(data=[7, None]), b""),
        (items(data=[[[[[7, 14]]]]]), b""),
        (items(data=None), b""),
        (tensor("ITEMS", [2], "BYTES", data=[7, 14]), b""),
        (tensor("ITEMS", [2], "BOOL", data=[True, False]), b""),
        binary([2], "INT64", b"\0" * 15),
        binary([2], "INT64", b"\0" * 16, size=24),
        binary([2], "INT64", b"\0" * 16, size=-1),
        binary([2], "INT64", b"\0" * 16, size="16"),
        binary([2], "INT64", b"\0" * 16, size=True),
        binary([2**31 - 1, 2**31 - 1], "INT64", b"\0" * 16),
        binary([2], "FP64", b"\0" * 16),
        binary([1], "BYTES", b"\x05\0\0\0abc"),
        binary([1], "BYTES", b"\xff\xff\xff\xffabc"),
        binary([1], "BYTES", b"\x05\0"),
        binary([2], "BYTES", b"\x01\0\0\0a"),
        binary([1], "BYTES", b"\x01\0\0\0\xff"),
    ],
)
def test_a_wrong_tensor_is_named(server: Server, sent: dict[str, Any], data: bytes) -> None:
    answer = infer(server, [user(), sent], data)
    assert answer.status == 400
    assert "ITEMS" in answer.json["error"]


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ([items()], "USER"),
        ([user()], "ITEMS"),
        ([user(), user(), items()], "USER"),
        ([user(shape=[2], data=[1, 2]), items()], "USER"),
        ([user(), items(), tensor("COLOUR", [1], "BYTES", data=["red"])], "COLOUR"),
        ([user(), items(), tensor("display", [3], "BYTES", data=["a"] * 3)], "display"),
        ([user(), items(), tensor("TIME", [1], "BYTES", data=["now"])], "TIME"),
        ([user(), items(), tensor("TIME", [1], "FP32", data=[1.5])], "TIME"),
    ],
)
def test_a_missing_or_foreign_input_is_named(
    server: Server, tensors: list[Any], named: str
) -> None:
    answer = infer(server, tensors)
    assert answer.status == 400
    assert named in answer.json["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "999999", "", "9" * 30, "٣"])
def test_a_wrong_length_of_the_header_is_refused(server: Server, length: str) -> None:
    name = "Inference-Header-Content-Length"
    answer = infer(server, [user(), items()], header={name: length.encode().decode("latin-1")})
    assert answer.status == 400
    assert name in answer.json["error"]


def test_bytes_that_belong_to_no_tensor_are_refused(server: Server) -> None:
    assert infer(server, [user(), items()], b"more").status == 400


def test_a_compressed_body_is_refused(server: Server) -> None:
    assert infer(server, [user(), items()], header={"Content-Encoding": "gzip"}).status == 415


def parsed(body: bytes, length: str | None) -> int:
    try:
        parse(body, length, 5000)
    except HttpError as error:
        return error.status
    return 200


@given(
    body=st.binary(max_size=200),
    cut=st.integers(0, 400),
    length=st.one_of(st.none(), st.text(max_size=4), st.integers(-5, 400).map(str)),
)
@often
def test_no_bytes_bring_about_anything_but_an_answer(
    body: bytes, cut: int, length: str | None
) -> None:
    tensors = [binary([2], "INT64", b"\0" * 16)[0], binary([2], "BYTES", body)[0] | {"name": "B"}]
    head = json.dumps({"inputs": tensors}).encode()
    whole = (head + b"\0" * 16 + body)[:cut]
    for sent, said in ((whole, length), (whole, str(len(head))), (body, length)):
        assert parsed(sent, said) in (200, 400)


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda some: st.one_of(
        st.lists(some, max_size=3), st.dictionaries(st.text(), some, max_size=3)
    ),
    max_leaves=6,
)


@given(
    name=plain,
    shape=st.one_of(plain, st.lists(st.integers(), max_size=4)),
    datatype=st.one_of(plain, st.sampled_from(["INT64", "UINT8", "FP16", "BYTES", "BOOL"])),
    data=plain,
    parameters=plain,
)
@often
def test_no_json_brings_about_anything_but_an_answer(**sent: Any) -> None:
    assert parsed(json.dumps({"inputs": [sent]}).encode(), None) in (200, 400)
