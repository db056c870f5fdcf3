"""`POST /v1/score` answers with the batch's scores, whatever is asked, and names what is wrong."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.storage import Array
from hashtab.pipelines import scoring
from hashtab.pipelines.requests import write_split
from hashtab.pipelines.score_batch import ScoreSettings, score
from hashtab.serving.bundle import Bundle
from hashtab.serving.scorer.champion import Served
from hashtab.serving.store import open_store, unpack
from tests.pipelines.reference import Reference, shop_items, shop_log
from tests.serving.scorer.servers import Server

ASKED = {"user": 100, "items": [7, 14], "context": {"display": "d1"}, "time": "2023-03-01T12:00:00"}


@pytest.fixture(scope="module")
def requests(shop_data: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """Real requests, and hard ones: nobody, unknown items, no context, more than fit one call."""
    file = tmp_path_factory.mktemp("requests") / "requests.parquet"
    write_split(Dataset.open(shop_data), "test", file)
    real = pl.read_parquet(file).drop("labels").head(60)
    many = [i % 44 * 7 for i in range(4500)]
    hard = pl.DataFrame(
        {
            "request": [1001, 1002, 1003],
            "user": [None, 100, 100],
            "time": [real["time"][0], None, real["time"][1]],
            "candidates": [[7, 9999], [14], many],
            "display": [["d0", None], [None], [f"d{i % 5}" for i in range(len(many))]],
        },
        schema=real.schema,
    )
    return pl.concat([real, hard])


@pytest.fixture(scope="module")
def batch(
    requests: pl.DataFrame,
    shop_bundle: Path,
    shop_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> pl.DataFrame:
    folder = tmp_path_factory.mktemp("batch")
    requests.write_parquet(folder / "asked.parquet")
    score(
        ScoreSettings(
            bundle=str(shop_bundle),
            store=str(shop_store),
            requests=str(folder / "asked.parquet"),
            output=str(folder / "scores"),
            workers=0,
        )
    )
    parts = sorted((folder / "scores").glob("part-*"))
    return pl.concat([pl.read_parquet(part) for part in parts])


def asked_online(request: Mapping[str, Any]) -> dict[str, Any]:
    time = request["time"]
    return {
        "user": request["user"],
        "items": request["candidates"],
        "context": {"display": request["display"]},
        "time": None if time is None else time.isoformat(),
    }


def test_scores_are_those_of_the_batch_bit_for_bit(
    server: Server, requests: pl.DataFrame, batch: pl.DataFrame
) -> None:
    rows = zip(requests.to_dicts(), batch.to_dicts(), strict=True)
    for request, expected in rows:
        answer = server.score(**asked_online(request))
        assert np.array(answer["scores"], np.float32).tolist() == expected["scores"]
        assert answer["scores"] == expected["scores"]  # nothing is rounded on the way
        assert answer["unknown_items"] == expected["unknown_candidates"]
        assert answer["missing_context"] == expected["missing_context"]
        assert (answer["history"] == "table") == (expected["history"] == "stored")


def test_long_lists_are_cut_as_the_batch_cuts_them(
    shop_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served.open(shop_bundle)
    run, widths = served.bundle._online.scores, list[int]()

    def spied(inputs: dict[str, Array]) -> Array:
        widths.append(inputs["item.vector"].shape[1])
        return run(inputs)

    monkeypatch.setattr(served.bundle._online, "scores", spied)
    context = served.context.encode({}, None, 4500)
    served.score(served.empty, np.full(4500, 3), context.columns)
    assert widths == [scoring._AT_ONCE, 4500 - scoring._AT_ONCE]


def test_scores_are_those_of_torch(
    server: Server, requests: pl.DataFrame, shop_bundle: Path, shop_data: Path, shop_store: Path
) -> None:
    reference = Reference(shop_bundle, shop_log(shop_data), shop_items(shop_data))
    layout = Bundle.open(shop_bundle).layout
    with open_store(str(shop_store), readonly=True) as store:
        _, record = next(store.items(layout.fingerprint))
    moment = unpack(record, layout).watermark
    for request in requests.head(20).to_dicts():
        context = {
            "display": request["display"],
            "time": [request["time"]] * len(request["candidates"]),
        }
        expected = reference.scores(request["user"], moment, request["candidates"], context)
        answer = server.score(**asked_online(request))
        np.testing.assert_allclose(answer["scores"], expected, atol=1e-6, rtol=0)


def test_one_value_of_context_holds_for_all_items(server: Server) -> None:
    listed = {"context": {"display": ["d1", "d1"]}}
    assert server.score(**ASKED)["scores"] == server.score(**{**ASKED, **listed})["scores"]


def test_the_best_come_first_where_that_is_asked(server: Server) -> None:
    items = [7 * i for i in range(40)]
    every = server.score(**{**ASKED, "items": items})["scores"]
    best = server.score(**{**ASKED, "items": items, "top": 5})
    assert best["scores"] == sorted(every, reverse=True)[:5]
    assert best["items"] == [items[every.index(score)] for score in best["scores"]]


def test_no_items_get_no_scores(server: Server) -> None:
    answer = server.score(**{**ASKED, "items": []})
    assert (answer["scores"], answer["items"], answer["unknown_items"]) == ([], [], 0)


@pytest.mark.parametrize("user", [100, "100", " 100 ", "0100", "100.0", 100.0])
def test_a_user_is_known_in_each_form_that_files_may_give(server: Server, user: Any) -> None:
    answer = server.score(**{**ASKED, "user": user})
    assert (answer["history"], answer["degraded"]) == ("table", None)


@pytest.mark.parametrize("user", [None, -1, 100.5, "nobody", 2**64, "x" * 600, 10**400])
def test_who_is_not_known_is_scored_with_an_empty_history_and_said(
    server: Server, user: Any
) -> None:
    before = server.metric('hashtab_scorer_degraded_total{reason="unknown_user"}')
    answer = server.score(**{**ASKED, "user": user})
    assert (answer["history"], answer["degraded"]) == ("empty", "unknown_user")
    after = server.metric('hashtab_scorer_degraded_total{reason="unknown_user"}')
    assert after == before + 1


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"user": True}, "user"),
        ({"user": [1]}, "user"),
        ({"items": [7, False]}, "items[1]"),
        ({"items": [[7]]}, "items[0]"),
        ({"items": 7}, "items"),
        ({"items": [7] * 5001}, "items"),
        ({"context": {"display": ["d1"]}}, "context.display"),
        ({"context": {"display": {}}}, "context"),
        ({"time": "yesterday"}, "time"),
        ({"time": 2**63}, "time"),
        ({"time": 10**400}, "time"),
        ({"top": 0}, "top"),
        ({"tops": 1}, "tops"),
    ],
)
def test_what_is_wrong_is_named(server: Server, wrong: dict[str, Any], field: str) -> None:
    answer = server.ask("POST", "/v1/score", {**ASKED, **wrong})
    assert answer.status == 422
    assert field in str(answer.json["field"])


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"user": NaN}'])
def test_what_is_no_json_is_refused(server: Server, body: bytes) -> None:
    assert server.ask("POST", "/v1/score", body).status == 400


def test_context_that_the_model_does_not_read_does_no_harm(server: Server) -> None:
    more = {"context": {"display": "d1", "of an older model": 5}}
    assert server.score(**{**ASKED, **more})["scores"] == server.score(**ASKED)["scores"]


def test_no_process_that_scores_imports_torch_or_mlflow(server: Server) -> None:
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in mapped
    assert "torch" not in mapped
    code = (
        "import sys; import hashtab.serving.scorer.service; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'mlflow', 'pandas', 'ray')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
