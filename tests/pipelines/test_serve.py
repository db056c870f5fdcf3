"""Both services come up from a data set and a bundle, and each command that is printed works."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines import serve
from hashtab.pipelines.past_events import write_events
from tests.pipelines.reference import shop_log

SCRIPT = Path(__file__).resolve().parent.parent.parent / "pipelines" / "serve.py"
PATIENCE_S = 120.0
END = "Ctrl-C ends both"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running pair of services: what was printed, and the process."""

    process: "subprocess.Popen[str]"
    printed: str

    def run(self, what: str) -> Any:
        """Run the command under a title in a shell and return what it answers."""
        (command,) = re.findall(rf"  {re.escape(what)}:\n    (.*)", self.printed)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        return done.stdout if what.endswith("metrics") else json.loads(done.stdout)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def served(
    shop_data: Path, shop_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    if shutil.which("curl") is None:
        if "CI" in os.environ:
            pytest.fail("curl is missing, and CI runs the commands that people are told")
        pytest.skip("curl is not installed")
    folder = tmp_path_factory.mktemp("served")
    bundle = shutil.copytree(shop_bundle, folder / "bundle")  # its index comes to lie beside it
    options = [f"--bundle={bundle}", f"--data={shop_data}", f"--folder={folder / 'online'}"]
    ports = [f"--port={free_port()}", f"--bse_port={free_port()}"]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *options, *ports],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if END in line:
            break
    assert process.poll() is None, (folder / "said").read_text()
    yield Served(process=process, printed="".join(lines))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE_S)
    process.stdout.close()


def test_a_user_is_scored_from_the_history_of_the_data_set(served: Served) -> None:
    answer = served.run("score items for a user")
    assert answer["history"] == "table"
    assert answer["degraded"] is None
    assert len(answer["scores"]) == len(answer["items"]) > 0


def test_items_are_recommended_and_scores_explained(served: Served) -> None:
    recommended = served.run("recommend items")["items"]
    assert len(recommended) == 5
    assert any((item["name"] or "").startswith("kind-") for item in recommended)
    explained = served.run("say what a score rests on")
    assert explained["in_log"] == explained["in_table"] > 0


def test_an_event_that_is_sent_shows_in_the_scores(served: Served) -> None:
    before = served.run("and see it in the first item's score")["scores"]
    assert served.run("tell what the user just did")["accepted"] == 1
    assert served.run("and see it in the first item's score")["scores"] != before
    kept = served.run("show what is kept of the user")
    assert kept["recent"][0]["id"].startswith("try-")


def test_services_say_how_they_are(served: Served) -> None:
    assert served.run("ask whether it is ready")["ready"] is True
    assert "hashtab_scorer_tables" in served.run("read the metrics")


def test_ctrl_c_ends_both(served: Served) -> None:
    ports = set(map(int, re.findall(r"127\.0\.0\.1:(\d+)", served.printed)))
    assert len(ports) == 2
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(PATIENCE_S) == 130
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1.0)


def test_without_the_demos_data_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert serve.main([]) == 2
    error = capsys.readouterr().err
    assert "run make demo first" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_said_and_nobody_elses_log_is_touched(
    shop_data: Path,
    shop_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = shutil.copytree(shop_bundle, tmp_path / "bundle")
    options = [f"--bundle={bundle}", f"--data={shop_data}", f"--folder={tmp_path / 'online'}"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([*options, f"--bse_port={port}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: port {port} of the BSE service is taken: end what listens")
    assert not (tmp_path / "online" / "bse.log").exists()


def test_past_events_are_those_of_the_raw_log(shop_data: Path, tmp_path: Path) -> None:
    assert write_events(shop_data, tmp_path / "events.parquet") == ("store", "price")
    raw = shop_log(shop_data).select("user", "item", "time", "store", "price")
    found = pl.read_parquet(tmp_path / "events.parquet").select(raw.columns)
    order = ["user", "time", "item", "price"]
    raw, found = raw.sort(order), found.sort(order)
    assert found.drop("price").rows() == raw.drop("price").rows()
    close = (found["price"] - raw["price"]).abs().fill_null(0) < 1e-4
    assert close.all()
    assert len(found) == Dataset.open(shop_data).manifest.behaviours
