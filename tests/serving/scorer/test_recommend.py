"""Recommendations: retrieved, filtered and scored in one call, and honest where little is known."""

import asyncio
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from hashtab.pipelines.build_index import IndexSettings, build
from hashtab.serving.bundle import Bundle
from hashtab.serving.http import SettingsError
from hashtab.serving.items import ItemIndex
from hashtab.serving.retrieval import RetrievalIndex, index_beside
from hashtab.serving.scorer.names import read_names
from hashtab.serving.scorer.recommend import seen_by
from hashtab.serving.scorer.tables import History, Tables
from hashtab.serving.store import UserRecord
from tests.serving.scorer.kept import NEW, Kept
from tests.serving.scorer.servers import Server, scorer

TIME = "2023-03-10T12:00:00Z"
USER = 105


def recommend(server: Server, **asked: Any) -> Any:
    answer = server.ask("POST", "/v1/recommend", {"time": TIME} | asked)
    assert answer.status == 200, answer.body
    return answer.json


def of(answer: Any) -> list[int]:
    return [each["item"] for each in answer["items"]]


def test_items_are_those_of_the_index_with_the_scores_of_score(shop: Server, kept: Kept) -> None:
    answer = recommend(shop, user=USER, count=5, candidates=12, exclude_seen=False)
    bundle = Bundle.open(kept.bundle)
    index = RetrievalIndex.open(index_beside(kept.bundle), bundle)
    found = index.search(kept.record(USER), 12)
    near = dict(zip(bundle.catalogue.items.gather(found.rows), found.similarity, strict=True))
    scored = shop.score(user=USER, items=list(near), time=TIME, top=5)
    assert of(answer) == scored["items"]
    assert [each["score"] for each in answer["items"]] == scored["scores"]
    for each in answer["items"]:
        assert each["similarity"] == pytest.approx(float(near[each["item"]]), rel=1e-6)
        assert each["name"] == (f"Product {each['item']}" if each["item"] != 7 else None)
    assert answer["candidates"] == 12
    assert answer["index"] == index.manifest.digest
    assert answer["model"] == scored["model"]
    assert (answer["history"], answer["degraded"]) == ("table", None)


def test_what_the_user_has_met_is_left_out(shop: Server, kept: Kept) -> None:
    items = set(Bundle.open(kept.bundle).catalogue.items)
    for user in (USER, 110):
        met = {event.item for event in kept.events(user)}
        assert len(met) > 12  # more than the table holds
        answer = recommend(shop, user=user, count=100)
        assert set(of(answer)) == items - met
        assert set(of(recommend(shop, user=user, count=100, exclude_seen=False))) == items


def test_where_the_model_counts_no_items_the_log_tells_what_was_met(kept: Kept) -> None:
    bundle = Bundle.open(kept.bundle)
    features = replace(bundle.manifest.features, counters=("kind",))
    bundle.layout = replace(bundle.manifest, features=features).layout
    service = SimpleNamespace(tables=Tables(str(kept.store), deadline_s=1.0))
    asyncio.run(service.tables.look(None))
    served = SimpleNamespace(bundle=bundle, items=ItemIndex(bundle.catalogue))
    history = History(kept.record(USER), "table", None)
    rows = asyncio.run(seen_by(service, served, USER, history))  # type: ignore[arg-type]
    assert rows is not None
    met = {event.item for event in kept.events(USER)}
    assert set(bundle.catalogue.items.gather(rows)) == met
    service.tables.close()


def test_only_allowed_items_come_and_unknown_ones_are_counted(shop: Server, kept: Kept) -> None:
    met = {event.item for event in kept.events(USER)}
    items = Bundle.open(kept.bundle).catalogue.items.to_list()
    new = [item for item in items if item not in met][:4]
    allow = [*new, new[0], min(met), 999_999, "none"]
    answer = recommend(shop, user=USER, allow=allow)
    assert set(of(answer)) == set(new)
    assert answer["unknown_items"] == 2
    assert of(recommend(shop, user=USER, allow=[])) == []
    assert of(recommend(shop, user=USER, allow=[min(met)])) == []
    assert of(recommend(shop, user=USER, allow=[min(met)], exclude_seen=False)) == [min(met)]


def test_an_unknown_user_is_offered_what_is_met_most(shop: Server, kept: Kept) -> None:
    bundle = Bundle.open(kept.bundle)
    index = RetrievalIndex.open(index_beside(kept.bundle), bundle)
    popular = index.search(UserRecord.empty(bundle.layout), 6).rows
    for user in (NEW, "nobody", None):
        answer = recommend(shop, user=user, candidates=6)
        assert set(of(answer)) == set(bundle.catalogue.items.gather(popular))
        assert (answer["history"], answer["degraded"]) == ("empty", "unknown_user")
    counts = Counter(e.item for user in range(101, 125) for e in kept.events(user))
    most = {item for item, _ in counts.most_common(3)}
    assert most <= set(of(answer))


def test_without_popularity_someone_unknown_gets_nothing_but_what_is_allowed(
    kept: Kept, tmp_path: Path
) -> None:
    bundle = shutil.copytree(kept.bundle, tmp_path / "bundle")
    build(IndexSettings(bundle=str(bundle)))
    with scorer(tmp_path / "server", "--bundle", bundle, "--store", kept.store) as server:
        answer = recommend(server, user="nobody")
        assert answer["items"] == []
        assert answer["degraded"] in ("unknown_user", "no_table")  # before it has looked
        allowed = recommend(server, user="nobody", allow=[7, 14])
        assert set(of(allowed)) == {7, 14}
        assert {each["similarity"] for each in allowed["items"]} == {None}
        assert len(of(recommend(server, user=USER))) > 0


def test_without_an_index_only_allowed_items_are_ranked(kept: Kept, tmp_path: Path) -> None:
    bundle = shutil.copytree(kept.bundle, tmp_path / "bundle")
    with scorer(tmp_path / "server", "--bundle", bundle, "--store", kept.store) as server:
        refused = server.ask("POST", "/v1/recommend", {"user": USER})
        assert refused.status == 409
        assert "build it with pipelines/build_index.py" in refused.json["error"]
        answer = recommend(server, user=USER, allow=[14, 7, 21], exclude_seen=False)
        assert answer["index"] is None
        scored = server.score(user=USER, items=[14, 7, 21], time=TIME, top=3)
        assert of(answer) == scored["items"]


def test_the_index_of_another_model_is_not_used(
    kept: Kept, other_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(other_bundle, tmp_path / "bundle")
    shutil.copytree(index_beside(kept.bundle), index_beside(bundle))
    with scorer(tmp_path / "server", "--bundle", bundle) as server:
        assert server.ask("POST", "/v1/recommend", {"user": USER}).status == 409
        assert len(server.score(user=USER, items=[7], time=TIME)["scores"]) == 1
        assert "its vectors mean something else" in server.log.read_text()


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "user"),
        ({"user": [1]}, "user"),
        ({"user": 1, "count": 0}, "count"),
        ({"user": 1, "candidates": 5001}, "candidates"),
        ({"user": 1, "candidates": 1 << 70}, "candidates"),
        ({"user": 1, "allow": 7}, "allow"),
        ({"user": 1, "allow": [[7]]}, "allow"),
        ({"user": 1, "exclude_seen": "yes"}, "exclude_seen"),
        ({"user": 1, "context": {"display": ["d1"]}}, "context"),
        ({"user": 1, "time": True}, "time"),
    ],
)
def test_what_cannot_be_recommended_is_the_callers_to_mend(
    asked: dict[str, Any], field: str, shop: Server
) -> None:
    answer = shop.ask("POST", "/v1/recommend", asked)
    assert answer.status in (400, 422), answer.body
    assert field in answer.json["error"] + answer.json.get("field", "")


def test_names_are_read_from_csv_and_parquet_alike(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"item": [7, 14, 21], "name": ["Milk, whole", None, "Brød"], "x": [1, 2, 3]}
    )
    frame.write_csv(tmp_path / "names.csv")
    frame.write_parquet(tmp_path / "names.parquet")
    wanted = {"7": "Milk, whole", "21": "Brød"}
    assert read_names(tmp_path / "names.csv") == read_names(tmp_path / "names.parquet") == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"item,title\n1,a\n", "has no column 'name', it has"),
        (b"", "cannot be read as CSV or Parquet"),
        (None, "cannot be read as CSV or Parquet"),
    ],
)
def test_a_file_of_names_that_cannot_be_read_is_named(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "names.csv").write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        read_names(tmp_path / "names.csv")
