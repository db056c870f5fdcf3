"""Explanations: weights that are the interest, to the last digit, and honest answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hashtab.models.ctr.encoders.base import ServedUsers
from hashtab.pipelines.saved_model import load_model
from hashtab.serving.bse.model import Model
from hashtab.serving.bundle import Bundle
from hashtab.serving.scorer.shares import shares_of
from hashtab.serving.store import SCALE, UserRecord
from tests.pipelines.bundles import HISTORY_LIMIT
from tests.serving.scorer.kept import NEW, Kept
from tests.serving.scorer.servers import Server, scorer

TIME = "2023-03-10T12:00:00Z"
USER = 105


def explain(server: Server, **asked: Any) -> Any:
    answer = server.ask("POST", "/v1/explain", {"time": TIME} | asked)
    assert answer.status == 200, answer.body
    return answer.json


def test_the_weights_times_the_behaviours_are_the_interest_that_torch_reads(
    kept: Kept, shop_bundle: Path
) -> None:
    bundle, model = Bundle.open(kept.bundle), load_model(shop_bundle.parent / "model").eval()
    names = [f.name for f in bundle.manifest.features.candidate]
    none = torch.zeros(0)
    for user in (USER, 110, 120):
        record = kept.record(user)
        encoded = Model(bundle).encode(kept.events(user)[-record.behaviours :])
        for row in (*range(len(bundle.catalogue)), -1):
            columns = bundle.catalogue.columns(np.array([row]), names)
            tensors = {name: torch.from_numpy(c.copy()) for name, c in columns.items()}
            with torch.no_grad():
                candidate = model.objects(tensors, model.features.candidate)[None]
                table = torch.from_numpy(record.table)[None].float()
                groups, buckets = bundle.layout.groups, bundle.layout.buckets
                wanted = model.encoder.codes(candidate) + buckets * torch.arange(groups)
                read = model.encoder.long.serve(  # type: ignore[operator, union-attr]
                    ServedUsers(candidate, wanted, table, none, none, none)
                )[0, 0].numpy()
            found = shares_of(bundle, record, row, encoded.codes, encoded.vectors)
            rebuilt = found.weights @ (encoded.vectors / SCALE)
            assert np.allclose(rebuilt, read, atol=2e-6)
            assert np.allclose(found.interest, rebuilt, atol=1e-12)
            if np.abs(read).max() > 0:
                assert found.shares.sum() == pytest.approx(1.0, abs=1e-9)


def test_a_mean_shares_itself_equally_among_all_behaviours(mean_bundle: Path) -> None:
    bundle = Bundle.open(mean_bundle)
    rows = np.arange(9)
    names = [f.name for f in bundle.manifest.features.behaviour]
    behaviours = bundle.catalogue.columns(rows, names)
    record = bundle.record(behaviours, rows, rows)
    _, codes, vectors = bundle.encode(behaviours)
    found = shares_of(bundle, record, 3, codes, vectors)
    assert np.allclose(found.weights, 1 / 9)
    assert np.allclose(found.interest, vectors.mean(axis=0) / SCALE)


def test_an_empty_table_has_no_interest_to_share(kept: Kept) -> None:
    bundle = Bundle.open(kept.bundle)
    encoded = Model(bundle).encode(kept.events(USER))
    empty = UserRecord.empty(bundle.layout)
    found = shares_of(bundle, empty, 0, encoded.codes, encoded.vectors)
    assert not found.interest.any()
    assert not found.weights.any()
    assert not found.shares.any()


def test_an_answer_names_the_past_items_and_adds_up(shop: Server, kept: Kept) -> None:
    answer = explain(shop, user=USER, item=14)
    events = kept.events(USER)
    last = events[-HISTORY_LIMIT:]
    assert len(events) > HISTORY_LIMIT
    assert answer["in_table"] == answer["in_log"] == HISTORY_LIMIT
    assert answer["explained"] == pytest.approx(1.0, abs=1e-6)
    assert sum(b["share"] for b in answer["behaviours"]) == pytest.approx(1.0, abs=1e-6)
    shares = [b["share"] for b in answer["behaviours"]]
    assert shares == sorted(shares, reverse=True)
    counts = {b["item"]: b["times"] for b in answer["behaviours"]}
    assert counts
    for behaviour in answer["behaviours"]:
        met = [event for event in last if event.item == behaviour["item"]]
        assert behaviour["times"] <= len(met)
        assert behaviour["time"].startswith("2023-")
        assert 1 <= behaviour["shared_groups"] <= answer["groups"] == 4
        assert behaviour["weight"] > 0
        named = behaviour["item"] != 7
        assert behaviour["name"] == (f"Product {behaviour['item']}" if named else None)
    assert answer["name"] == "Product 14"
    assert answer["known_item"]
    assert (answer["history"], answer["degraded"]) == ("table", None)


def test_both_scores_are_those_of_score(shop: Server) -> None:
    context = {"display": "d1"}
    answer = explain(shop, user=USER, item=14, context=context)
    asked = {"items": [14], "context": context, "time": TIME}
    assert shop.score(user=USER, **asked)["scores"] == [answer["score"]]
    assert shop.score(user="nobody", **asked)["scores"] == [answer["score_without_history"]]
    assert answer["score"] != answer["score_without_history"]


def test_an_unknown_user_is_explained_by_nothing(shop: Server) -> None:
    for user in (NEW, "nobody", None):
        answer = explain(shop, user=user, item=14)
        assert answer["behaviours"] == []
        assert answer["explained"] is None
        assert answer["score"] == answer["score_without_history"]
        assert (answer["history"], answer["degraded"]) == ("empty", "unknown_user")
        assert answer["in_table"] == 0


def test_an_unknown_item_is_scored_and_said_to_be_unknown(shop: Server) -> None:
    for item in (1_000_003, "nothing", 7.5, None):
        answer = explain(shop, user=USER, item=item)
        assert not answer["known_item"]
        assert answer["name"] is None
        assert answer["score"] == shop.score(user=USER, items=[item], time=TIME)["scores"][0]
        assert sum(b["share"] for b in answer["behaviours"]) == pytest.approx(1.0, abs=1e-6)


def test_without_a_log_nothing_of_the_table_is_explained(
    shop_bundle: Path, shop_store: Path, tmp_path: Path
) -> None:
    with scorer(tmp_path, "--bundle", shop_bundle, "--store", shop_store) as server:
        answer = explain(server, user=USER, item=14)
    assert answer["history"] == "table"
    assert answer["in_table"] == HISTORY_LIMIT
    assert (answer["in_log"], answer["behaviours"], answer["explained"]) == (0, [], None)
    assert answer["score"] != answer["score_without_history"]


def test_without_a_store_the_answer_says_so(kept: Kept, tmp_path: Path) -> None:
    with scorer(tmp_path, "--bundle", kept.bundle) as server:
        answer = explain(server, user=USER, item=14)
        assert server.ask("GET", "/v1/users/105").json["behaviours"] is None
    assert answer["degraded"] == "no_table"
    assert answer["score"] == answer["score_without_history"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"item": 14}, "user"),
        ({"user": 105}, "item"),
        ({"user": 105, "item": [14]}, "item"),
        ({"user": 105, "item": 14, "context": {"display": ["a"]}}, "context"),
        ({"user": 105, "item": 14, "time": "soon"}, "time"),
        ({"user": 105, "item": 14, "time": 1 << 70}, "time"),
        ({"user": 105, "item": 14, "more": 1}, "more"),
    ],
)
def test_what_cannot_be_explained_is_the_callers_to_mend(
    asked: dict[str, Any], field: str, shop: Server
) -> None:
    answer = shop.ask("POST", "/v1/explain", asked)
    assert answer.status in (400, 422)
    assert field in answer.json["error"] + answer.json.get("field", "")


def test_a_users_view_shows_the_latest_behaviours_and_the_table(shop: Server, kept: Kept) -> None:
    view = shop.ask("GET", "/v1/users/105").json
    events, record = kept.events(USER), kept.record(USER)
    assert [past["item"] for past in view["behaviours"]] == [e.item for e in events[::-1][:20]]
    assert view["behaviours"][0]["time"].startswith("2023-")
    assert view["table"]["behaviours"] == record.behaviours == HISTORY_LIMIT
    assert view["table"]["buckets_filled"] == np.any(record.table, axis=-1).sum()
    assert view["model"]["fingerprint"] == Bundle.open(kept.bundle).manifest.fingerprint
    unknown = shop.ask("GET", "/v1/users/nobody%2F%C3%A9")
    assert unknown.status == 200
    assert unknown.json["behaviours"] == []
    assert (unknown.json["table"], unknown.json["degraded"]) == (None, "unknown_user")
