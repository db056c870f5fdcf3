"""An alias of the registry is followed, alone and by a running scorer, whatever happens to it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.follow import FollowSettings, follow
from hashtab.pipelines.promote import make_champion
from hashtab.pipelines.registry import Registry, register
from hashtab.serving.manifest import BundleManifest
from tests.serving.scorer.servers import Server, scorer, wait_for

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts of a database lie in the current folder, downloads in the user's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A registered model that no other test has."""
    return str(request.node.originalname)


def another(bundle: Path, folder: Path) -> Path:
    """Copy a bundle and alter what decides nothing, so that it is another one."""
    copytree(bundle, folder)
    replace(BundleManifest.read(folder), run=folder.name).write(folder)
    return folder


def crown(bundle: Path, name: str, database: str) -> int:
    """Register a bundle and make it the champion."""
    version = register(bundle, name, database, None)
    make_champion(Registry(database, name), version)
    return version


def digest(folder: Path | str) -> str:
    return BundleManifest.read(Path(folder)).digest


def test_what_an_alias_names_is_said_each_time(
    sdim_bundle: Path, database: str, name: str, tmp_path: Path
) -> None:
    settings = FollowSettings(bundle=f"models:/{name}@champion", tracking_uri=database)
    said = follow(settings)
    assert "champion" in next(said)["error"]
    crown(sdim_bundle, name, database)
    found = next(said)
    assert (found["version"], digest(found["folder"])) == ("1", digest(sdim_bundle))
    other = another(sdim_bundle, tmp_path / "other")
    crown(other, name, database)
    found = next(said)
    assert (found["version"], digest(found["folder"])) == ("2", digest(other))


def test_a_registry_that_is_away_is_said_and_tried_again(name: str, tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path}/slip.db"
    settings = FollowSettings(bundle=f"models:/{name}@champion", tracking_uri=nowhere)
    assert all("is not there" in line["error"] for line in islice(follow(settings), 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bundle", ["some/folder", "models:/name", "models:/name/3"])
def test_only_an_alias_can_be_followed(bundle: str) -> None:
    with pytest.raises(SettingsError, match="models:/name@alias"):
        FollowSettings(bundle=bundle)


@pytest.fixture
def server(sdim_bundle: Path, database: str, name: str, tmp_path: Path) -> Iterator[Server]:
    """A scorer that follows a champion."""
    crown(sdim_bundle, name, database)
    options = ("--bundle", f"models:/{name}@champion", "--tracking-uri", database)
    with scorer(tmp_path / "server", *options) as running:
        yield running


def follower_of(server: Server) -> int:
    """Process id of the follower that a scorer started."""
    task = Path(f"/proc/{server.process.pid}/task")
    children = [f.read_text().split() for f in task.glob("*/children")]
    found = [int(pid) for pids in children for pid in pids if _follows(int(pid))]
    return found[0] if found else 0


def _follows(pid: int) -> bool:
    return b"hashtab.pipelines.follow" in Path(f"/proc/{pid}/cmdline").read_bytes()


def version(server: Server) -> str:
    return str(server.models()["served"]["version"])


@pytest.mark.slow
def test_a_scorer_follows_the_champion_and_survives_its_follower(
    server: Server, sdim_bundle: Path, database: str, name: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"user": 1, "items": [1, 2]}
    assert version(server) == "1"
    crown(another(sdim_bundle, tmp_path / "second"), name, database)
    wait_for(lambda: version(server) == "2")
    assert server.metric("hashtab_scorer_registry_up") == 1
    killed = follower_of(server)
    os.kill(killed, signal.SIGKILL)
    problem = wait_for(lambda: server.models()["source_problem"])
    assert "started again" in problem
    assert server.score(**asked)["model"]["version"] == "2"
    crown(another(sdim_bundle, tmp_path / "third"), name, database)
    wait_for(lambda: version(server) == "3")
    assert server.models()["source_problem"] is None


@pytest.mark.slow
def test_a_follower_ends_with_who_started_it(database: str, name: str) -> None:
    command = [sys.executable, "-m", "hashtab.pipelines.follow", "--every_s", "0.1"]
    command += ["--bundle", f"models:/{name}@champion", "--tracking_uri", database, "--parent"]
    start = (
        "import os, subprocess; "
        f"child = subprocess.Popen({command!r} + [str(os.getpid())], stdout=subprocess.DEVNULL); "
        "print(child.pid)"
    )
    ran = subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, check=True)
    pid = int(ran.stdout)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
