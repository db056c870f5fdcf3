"""The prepare script as people run it: a process, its output and its exit code."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hashtab.features.dataset import Dataset
from hashtab.pipelines import prepare
from tests.features import logs, prepared

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "prepare.py"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """A schema in YAML beside its files."""
    plain = logs.feed(tmp_path).to_dict()
    for table in ("behaviours", "exposures"):
        plain[table]["files"] = Path(plain[table]["files"]).name
    path = tmp_path / "feed.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def test_ones_own_log_from_yaml_to_batches(declared: Path, tmp_path: Path) -> None:
    done = run("--schema", str(declared), "--shards", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (following,) = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
    command = following.removeprefix("next: ").split()
    assert command[-2:] == ["--data", "data/feed"]
    pasted = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert pasted.returncode == 0, pasted.stderr
    dataset = Dataset.open(tmp_path / "data" / "feed")
    assert f"{dataset.manifest.splits['test'].samples:,}" in done.stdout
    assert sum(len(b.labels) for b in dataset.batches("train", 200)) > 0
    again = run("--schema", str(declared), "--shards", "3", cwd=tmp_path)
    assert again.returncode == 0
    assert dataset.manifest.digest[:12] in again.stdout


def test_help_names_every_setting(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("--config", "--dataset", "--schema", "--output", "--shards", "--workers"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "complete_jorney"], "did you mean 'complete_journey'?"),
        (["--shards", "0"], "shards must be positive, got 0"),
        (["--shards", "many"], "Expected a <class 'int'>"),
        (["--shard", "3"], "--shard"),
        (["--schema", "nowhere.yaml"], "schema nowhere.yaml cannot be read"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_said_before_any_work(
    declared: Path, tmp_path: Path
) -> None:
    options = ["--workers", "2", "--address", nobody_listens()]
    done = run("--schema", str(declared), *options, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: the Ray cluster \S+ cannot be joined \(.*\n", done.stderr)
    assert not (tmp_path / "data").exists()


def nobody_listens() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
    return f"{host}:{port}"


def test_ctrl_c_ends_with_what_to_do(
    declared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "prepare", stopped)
    assert prepare.main(["--schema", str(declared)]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.ray
def test_ray_tasks_write_the_same_bytes(declared: Path, tmp_path: Path) -> None:
    for name, workers in (("here", "0"), ("ray", "2")):
        done = run(
            *("--schema", str(declared), "--output", name),
            *("--shards", "3", "--workers", workers),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    assert prepared.tree(tmp_path / "ray") == prepared.tree(tmp_path / "here")
