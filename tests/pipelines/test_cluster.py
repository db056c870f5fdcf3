"""The cluster that a training runs on is there and has what is asked, or that is said."""

import socket
from pathlib import Path

import pytest
import ray
import torch

from hashtab.pipelines import train_sdim
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError


@pytest.fixture(autouse=True)
def nothing_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster in the environment, and none is started by mistake."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", _not_to_be_called)


def _not_to_be_called(**_: object) -> None:
    raise AssertionError


@pytest.mark.parametrize(("workers", "needed"), [(0, 1), (1, 1), (4, 4)])
def test_too_few_gpus_are_said_at_once(
    workers: int,
    needed: int,
    likes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: needed - 1)
    assert train_sdim.main(["--data", str(likes), "--gpu", f"--workers={workers}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --gpu wants one GPU a worker: ")
    assert f"{needed} needed, {needed - 1} on this machine" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_where_nobody_listens_is_said(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
    address = f"{scheme}{host}:{port}"
    with pytest.raises(SettingsError, match="cannot be joined") as caught, cluster(1, address):
        pass
    assert address in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Could not find any running Ray instance.\nStart one."),
        ValueError("Invalid address format: auto"),
        RuntimeError("Version mismatch"),
    ],
)
def test_what_ray_says_of_a_cluster_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    said = "the Ray cluster auto cannot be joined"
    with pytest.raises(SettingsError, match=said) as caught, cluster(1, None):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cores", "gpus", "said"),
    [
        (4, 0, "4 cores and 0 GPUs are asked for, the cluster has 2 and 1: "),
        (2, 2, "2 cores and 2 GPUs are asked for, the cluster has 2 and 1: "),
        (2, 1, ""),
    ],
)
def test_a_cluster_that_is_too_small_is_said_and_waited_for(
    cores: int,
    gpus: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    with cluster(cores, "auto", gpus=gpus):
        pass
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == bool(said)
