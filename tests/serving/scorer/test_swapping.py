"""Models change between two requests or not at all, and no request sees two of them."""

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.scorer.champion import Served
from hashtab.serving.scorer.coverage import CoverageError, check_coverage
from hashtab.serving.scorer.desired import Desired, StateFolder
from hashtab.serving.scorer.swapping import Swapper
from hashtab.serving.scorer.tables import Tables
from hashtab.serving.store import KeptModel, open_store
from tests.serving.scorer.conftest import encoded
from tests.serving.scorer.servers import Server, scorer, wait_for

ASKED = {"user": 100, "items": [7, 14], "context": {"display": "d1"}, "time": 0}


class Swapping:
    """A swapper and what it serves, without a server."""

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self.served: Served | None = None
        self.tables = Tables(None if store is None else str(store), 1.0)
        self.state = StateFolder(folder)
        self.swapper = Swapper(self.state, self.tables, 0.99, lambda: self.served, self._use)

    def _use(self, served: Served) -> None:
        self.served = served

    def bring(self, bundle: Path, version: str | None = None) -> Served:
        desired = Desired.of(bundle, version)
        self.state.desire(desired)
        asyncio.run(self.swapper.bring(desired))
        assert self.served is not None
        return self.served


def test_a_bundle_comes_into_use(shop_bundle: Path, tmp_path: Path) -> None:
    served = Swapping(tmp_path).bring(shop_bundle, "7")
    manifest = BundleManifest.read(shop_bundle)
    assert (served.model.version, served.model.digest) == ("7", manifest.digest)
    assert served.model.fingerprint == manifest.fingerprint


@pytest.mark.parametrize("damage", ["missing", "altered", "cut", "none"])
def test_a_bad_bundle_changes_nothing_and_is_named(
    shop_bundle: Path, again: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    swapping, bad = Swapping(tmp_path / "state"), again("bad")
    before = swapping.bring(shop_bundle)
    file = bad / "scorer.onnx"
    if damage == "missing":
        file.unlink()
    elif damage == "altered":
        data = file.read_bytes()
        file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        shutil.rmtree(bad)
    with pytest.raises(BundleError, match=str(bad)):
        swapping.bring(bad)
    assert swapping.served is before
    assert swapping.swapper.waiting is not None
    assert str(bad) in swapping.swapper.waiting.reason
    bad = (
        again("better")
        if damage == "none"
        else shutil.copytree(shop_bundle, bad, dirs_exist_ok=True)
    )
    assert swapping.bring(bad) is not before
    assert swapping.swapper.waiting is None


def test_a_bundle_with_other_answers_than_its_golden_ones_is_refused(
    shop_bundle: Path, other_bundle: Path, again: Callable[[str], Path], tmp_path: Path
) -> None:
    swapping, bad = Swapping(tmp_path / "state"), again("bad")
    for name in ("scorer.onnx", "weights.bin"):
        shutil.copy(other_bundle / name, bad / name)
    BundleManifest.read(bad).write(bad)  # whole and unaltered, but of two models
    with pytest.raises(BundleError, match="golden"):
        swapping.bring(bad)


def test_a_bundle_that_is_overwritten_in_place_goes_on_being_served(
    again: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = again("first")
    served = Swapping(tmp_path / "state").bring(folder)
    example = served.bundle.example()
    before = served.bundle.run_scorer(example).tolist()
    for file in folder.iterdir():
        file.write_bytes(b"\xff" * 10)
    assert served.bundle.run_scorer(example).tolist() == before


def references(served: Served) -> list["weakref.ref[Any]"]:
    parts = served, served.bundle, served.bundle._scorer
    return [weakref.ref(part) for part in parts]


def test_old_generations_are_freed(again: Callable[[str], Path], tmp_path: Path) -> None:
    swapping = Swapping(tmp_path / "state")
    bundles = [again(name) for name in ("a", "b", "c")]
    gone = [ref for bundle in bundles * 2 for ref in references(swapping.bring(bundle))]
    gc.collect()
    assert [ref() is None for ref in gone] == [True] * 15 + [False] * 3
    assert len(list(swapping.state.bundles.iterdir())) == 1


def test_a_model_waits_for_its_tables(
    shop_bundle: Path, other_bundle: Path, shop_data: Path, shop_store: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(shop_store, tmp_path / "store")
    swapping = Swapping(tmp_path / "state", store)
    before = swapping.bring(shop_bundle)
    with pytest.raises(CoverageError, match="0 of 25 users"):
        swapping.bring(other_bundle)
    assert swapping.served is before
    encoded(other_bundle, shop_data, store)
    assert swapping.bring(other_bundle) is not before


def test_a_store_that_cannot_say_keeps_the_model(
    shop_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    swapping = Swapping(tmp_path / "state", tmp_path / "nowhere")
    before = swapping.bring(shop_bundle)
    with pytest.raises(CoverageError, match="cannot say"):
        swapping.bring(other_bundle)
    assert swapping.served is before


def test_a_model_with_the_same_tables_need_not_ask(
    shop_bundle: Path, again: Callable[[str], Path], tmp_path: Path
) -> None:
    swapping = Swapping(tmp_path / "state", tmp_path / "nowhere")
    swapping.bring(shop_bundle)
    swapping.bring(again("same-tables"))


BEFORE, AFTER = b"before..", b"after..."


@pytest.mark.parametrize(("have", "covered"), [(98, False), (99, True), (100, True)])
def test_a_share_of_users_must_have_a_table(tmp_path: Path, have: int, covered: bool) -> None:
    with open_store(str(tmp_path)) as store:
        store.put(BEFORE, dict.fromkeys(range(100), b"table"))
        store.put(AFTER, dict.fromkeys(range(have), b"table"))
        if covered:
            check_coverage(store, BEFORE, AFTER, 0.99)
        else:
            with pytest.raises(CoverageError, match="98 of 100"):
                check_coverage(store, BEFORE, AFTER, 0.99)


@pytest.mark.parametrize("state", ["building", "live", "retiring"])
def test_who_keeps_the_tables_says_whether_they_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    with open_store(str(tmp_path)) as store:
        store.put(BEFORE, {1: b"table"})
        kept = {AFTER: KeptModel(bundle="b", digest="d", state=state, since=0)}
        monkeypatch.setattr(store, "kept_models", lambda: kept)
        if state == "live":
            check_coverage(store, BEFORE, AFTER, 0.99)
        else:
            with pytest.raises(CoverageError, match=state):
                check_coverage(store, BEFORE, AFTER, 0.99)


class Traffic(threading.Thread):
    """Asks for scores until it is stopped; keeps model and scores of each answer."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.ended = server, threading.Event()
        self.answers: list[tuple[str, str, str, tuple[float, ...]]] = []
        self.failed: list[bytes] = []

    def run(self) -> None:
        while not self.ended.is_set():
            answer = self.server.ask("POST", "/v1/score", ASKED)
            if answer.status != 200:
                self.failed.append(answer.body)
                continue
            said = answer.json
            model = said["model"]
            scores = tuple(said["scores"])
            self.answers.append((model["digest"], model["fingerprint"], said["history"], scores))

    def __enter__(self) -> "Traffic":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def test_no_request_fails_or_sees_two_models_while_they_change(
    shop_bundle: Path, other_bundle: Path, shop_data: Path, shop_store: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(shop_store, tmp_path / "store")
    encoded(other_bundle, shop_data, store)
    options = ("--bundle", shop_bundle, "--store", store)
    with scorer(tmp_path / "server", *options) as server, Traffic(server) as traffic:
        for bundle in (other_bundle, shop_bundle) * 5:
            assert server.load(bundle).status == 200
        assert server.metric("hashtab_scorer_swaps_total") == 11
    assert traffic.failed == []
    found = {bundle: scores_of(bundle, store) for bundle in (shop_bundle, other_bundle)}
    assert set(traffic.answers) == set(found.values())


def scores_of(bundle: Path, store: Path) -> tuple[str, str, str, tuple[float, ...]]:
    """What one model answers, alone."""
    served = Served.open(bundle)
    tables = Tables(str(store), 1.0)
    asyncio.run(tables.look(served))
    context = served.context.encode({"display": "d1"}, 0, 2)
    rows = served.items.rows([7, 14])
    scores = served.score(tables.history(served, 100).record, rows, context.columns)
    tables.close()
    return served.model.digest, served.model.fingerprint, "table", tuple(scores.tolist())


def digest(bundle: Path) -> str:
    return BundleManifest.read(bundle).digest


def test_a_folder_is_followed_and_half_a_copy_waited_for(
    shop_bundle: Path, shop_store: Path, again: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, new = shutil.copytree(shop_bundle, tmp_path / "champion"), again("new")
    options = ("--bundle", folder, "--store", shop_store)
    with scorer(tmp_path / "server", *options) as server:
        before = server.models()["served"]
        (folder / "scorer.onnx").unlink()
        shutil.copy(new / "manifest.json", folder / "manifest.json")
        waiting = wait_for(lambda: server.models()["waiting"])
        assert "scorer.onnx is missing" in waiting["reason"]
        assert server.models()["served"] == before
        assert server.metric('hashtab_scorer_swap_failures_total{reason="bundle"}') >= 1
        shutil.copytree(new, folder, dirs_exist_ok=True)
        wait_for(lambda: server.models()["served"]["digest"] == digest(new))
        assert server.models()["waiting"] is None


def test_a_scorer_starts_without_a_bundle_and_is_ready_with_it(
    shop_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "later"
    with scorer(tmp_path / "server", "--bundle", folder, ready=False) as server:
        wait_for(lambda: b"holds no bundle" in server.ask("GET", "/health/ready").body)
        assert server.ask("GET", "/health/ready").status == 503
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("POST", "/v1/score", ASKED).status == 503
        events = server.events()
        assert "started" in events
        assert "ready" not in events
        assert any("holds no bundle" in event for event in events)
        shutil.copytree(shop_bundle, tmp_path / "copy").rename(folder)
        wait_for(lambda: server.ask("GET", "/health/ready").status == 200)
        assert server.score(**ASKED)["degraded"] == "no_table"
        assert "serves a model" in server.events()


def test_an_admin_is_told_why_a_bundle_is_not_served(
    shop_bundle: Path, other_bundle: Path, shop_data: Path, shop_store: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(shop_store, tmp_path / "store")
    options = ("--bundle", shop_bundle, "--store", store)
    with scorer(tmp_path / "server", *options) as server:
        answer = server.load(tmp_path)
        assert (answer.status, answer.json["field"]) == (422, "bundle")
        assert "holds no bundle" in answer.json["error"]
        assert server.models()["waiting"] is None
        answer = server.load(other_bundle)
        assert answer.status == 409
        assert "0 of 25 users" in answer.json["error"]
        rows = server.ask("POST", "/v2/repository/index").json
        assert [row["state"] for row in rows] == ["READY", "UNAVAILABLE"]
        encoded(other_bundle, shop_data, store)
        wait_for(lambda: server.models()["served"]["digest"] == digest(other_bundle))
        assert server.ask("POST", "/v2/repository/models/other/load").status == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"bundle": 7}', b'{"bundle": ""}', b"\xff"])
def test_a_wrong_load_is_refused(server: Server, body: bytes) -> None:
    assert server.ask("POST", "/v2/repository/models/hashtab/load", body).status == 400


def test_what_an_admin_loads_reaches_every_process(
    shop_bundle: Path, shop_store: Path, again: Callable[[str], Path], tmp_path: Path
) -> None:
    new = again("new")
    options = ("--bundle", shop_bundle, "--store", shop_store, "--processes", 2)
    with scorer(tmp_path / "server", *options) as server:
        wait_for(lambda: server.metric("hashtab_scorer_swaps_total") == 2)
        assert server.load(new).status == 200
        wait_for(lambda: server.metric("hashtab_scorer_swaps_total") == 4)
        served = {json.dumps(server.models()["served"]) for _ in range(20)}
        assert [json.loads(model)["digest"] for model in served] == [digest(new)]


def test_loading_is_for_those_with_the_token(shop_bundle: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    options = ("--bundle", shop_bundle, "--token-file", token)
    with scorer(tmp_path / "server", *options) as server:
        path = "/v2/repository/models/hashtab/load"
        assert server.ask("POST", path).status == 401
        assert server.ask("POST", path, headers={"Authorization": "Bearer secret"}).status == 200
