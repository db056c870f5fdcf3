"""Whoever is killed while users are encoded and requests scored: nothing is lost, torn or twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
import psutil
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.prepare import prepare
from hashtab.pipelines import shard_tasks
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.encode_users import EncodeSettings, encode
from hashtab.pipelines.requests import write_split
from hashtab.pipelines.score_batch import ScoreSettings, score
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import StoreError, User, open_store
from tests.features import prepared
from tests.pipelines.conftest import USERS, write_likes

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"
KILLS = 2
SHARDS = 150  # most of them of no or one user: many moments to be killed at


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `likes` in many shards."""
    folder = tmp_path_factory.mktemp("shards")
    prepare(write_likes(folder / "raw"), folder / "likes", shards=SHARDS)
    return folder / "likes"


@pytest.fixture(scope="module")
def encoding(
    data: Path, sdim_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> EncodeSettings:
    """An undisturbed encoding, done."""
    store = tmp_path_factory.mktemp("whole") / "tables"
    settings = EncodeSettings(
        bundle=str(sdim_bundle), data=str(data), store=str(store), as_of="test", workers=0
    )
    encode(settings)
    return settings


@pytest.fixture(scope="module")
def scoring(encoding: EncodeSettings, data: Path) -> ScoreSettings:
    """An undisturbed scoring, done."""
    folder = Path(encoding.store).parent
    write_split(Dataset.open(data), "test", folder / "requests.parquet")
    settings = ScoreSettings(
        bundle=encoding.bundle,
        requests=str(folder / "requests.parquet"),
        store=encoding.store,
        output=str(folder / "scores"),
        rows=3,
        workers=0,
    )
    score(settings)
    return settings


def records(settings: EncodeSettings) -> dict[User, bytes]:
    fingerprint = Bundle.open(str(settings.bundle)).layout.fingerprint
    with open_store(settings.store, readonly=True) as store:
        return dict(store.items(fingerprint))


def files(settings: ScoreSettings) -> dict[str, bytes]:
    """All that is left of a scoring but its place, which only the manifest tells."""
    found = prepared.tree(Path(settings.output))
    del found["_MANIFEST.json"]
    return found


def options(settings: EncodeSettings | ScoreSettings, *names: str) -> list[str]:
    return [f"--{name}={getattr(settings, name)}" for name in names]


def encoded(settings: EncodeSettings) -> int:
    """Users with a record so far."""
    if not (Path(settings.store) / "data.mdb").exists():
        return 0
    try:
        return len(records(settings))
    except StoreError:  # it is being made right now
        return 0


def scored(settings: ScoreSettings) -> int:
    """Parts so far."""
    return len(list(Path(settings.output).glob("part-*.parquet")))


def wait_for(what: Callable[[], bool]) -> None:
    """Wait without a limit of its own: how long processes take to start is the machine's."""
    while not what():
        time.sleep(0.005)


def kill_and_run_again(
    script: str, arguments: list[str], done: Callable[[], int], whole: int
) -> int:
    """Run a script until it is done, and kill its driver each time when it is some way further.

    Returns:
        How many times it was killed at work.
    """

    def beyond(run: subprocess.Popen[bytes], target: int) -> bool:
        return done() > target or run.poll() is not None

    chance, kills = random.Random(whole), 0
    command = [sys.executable, str(PIPELINES / script), *arguments]
    for i in range(KILLS):
        target = int(0.9 * whole * (i + chance.random()) / KILLS)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            wait_for(partial(beyond, run, target))
            run.kill()
        kills += run.returncode == -signal.SIGKILL and done() < whole
    subprocess.run(command, check=True, capture_output=True)
    return kills


@pytest.mark.slow
def test_users_encoded_by_drivers_that_are_killed_have_the_same_records(
    encoding: EncodeSettings, tmp_path: Path
) -> None:
    killed = replace(encoding, store=str(tmp_path / "tables"))
    arguments = options(killed, "bundle", "data", "store", "as_of", "workers")
    kills = kill_and_run_again("encode_users.py", arguments, lambda: encoded(killed), USERS)
    assert kills == KILLS
    assert records(killed) == records(encoding)
    assert len(records(killed)) == USERS


@pytest.mark.slow
def test_requests_scored_by_drivers_that_are_killed_come_once_and_the_same(
    scoring: ScoreSettings, tmp_path: Path
) -> None:
    killed = replace(scoring, output=str(tmp_path / "scores"))
    arguments = options(killed, "bundle", "requests", "store", "output", "rows", "workers")
    parts = scored(scoring)
    kills = kill_and_run_again("score_batch.py", arguments, lambda: scored(killed), parts)
    assert kills == KILLS
    assert files(killed) == files(scoring)
    asked = pl.read_parquet(scoring.requests or "")["request"]
    found = pl.read_parquet(f"{killed.output}/part-*.parquet")["request"]
    assert found.to_list() == asked.to_list()


@contextmanager
def a_worker_killed(when: Callable[[], bool]) -> Iterator[None]:
    """Kill one of the Ray workers that are at a task, as soon as `when` holds."""
    ended = threading.Event()

    def at_work() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # gone since it was listed
                found += [child] if child.name().startswith("ray::_call") else []
        return found

    def kill() -> bool:
        wait_for(lambda: ended.is_set() or (when() and bool(at_work())))
        for worker in at_work()[:1]:
            worker.kill()
            return True
        return False

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        try:
            yield
        finally:
            ended.set()
    assert killed.result(), "all was done before a worker could be killed"


def end_itself(shard: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
def test_ray_workers_that_are_killed_cost_nothing_but_their_shard(
    encoding: EncodeSettings,
    scoring: ScoreSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded_here = replace(encoding, store=str(tmp_path / "tables"), workers=2)
    scored_here = replace(scoring, output=str(tmp_path / "scores"), workers=2)
    with cluster(2, None):
        with a_worker_killed(lambda: encoded(encoded_here) > 5):
            encode(encoded_here)
        assert records(encoded_here) == records(encoding)

        with a_worker_killed(lambda: scored(scored_here) > 5):
            score(scored_here)
        assert files(scored_here) == files(scoring)

        monkeypatch.setattr(shard_tasks, "_RETRIES", 1)
        with pytest.raises(SettingsError, match="a worker was killed 2 times over one shard"):
            run_shards(end_itself, [0], 1)
