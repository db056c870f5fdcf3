"""The measurements run from their begin to their figures; what they measure is not judged here."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.online.bench import Bench
from experiments.online.client import BROKEN, Connection, Load, drive, request
from experiments.online.freshness import freshness
from experiments.online.report import Figures, write
from experiments.online.scoring import scoring
from experiments.online.servers import Server, free_port, serving


@pytest.fixture
def bench(shop_bundle: Path, tmp_path: Path) -> Bench:
    return Bench(folder=shop_bundle, work=tmp_path, users=10, candidates=20, seconds=0.3, rounds=1)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that answers 100 bytes to everything."""
    log = tmp_path_factory.mktemp("nothing") / "log"
    with serving(["-m", "experiments.online.nothing", "--size=100"], log, "/") as server:
        yield server


def test_scorer_and_rival_answer_all_that_is_asked(bench: Bench) -> None:
    rows = scoring(bench).rows
    measured = [row for row in rows if " / " not in str(row["server"])]
    assert len(measured) == 6
    assert all(row["not answered well"] == 0 for row in measured)
    assert all(float(row["p50 ms"]) <= float(row["p99 ms"]) for row in measured)


def test_every_event_that_is_posted_shows_in_a_score(bench: Bench) -> None:
    figures = freshness(bench, rate=200, batch=5, seconds=1.0)
    assert [row["probes"] for row in figures.rows] == [20, 20, 20]
    assert "0 probes never seen, 0 refused" in figures.notes[2]


def test_a_connection_asks_as_soon_as_it_is_answered(nothing: Server) -> None:
    measured = drive(
        Load(address=nothing.address, requests=[request("GET", "/")], connections=3, seconds=0.2)
    )
    assert set(measured.count()) == {200}
    assert measured.left_out == 0
    assert (np.diff(measured.ends) >= 0).all()


def test_what_is_due_is_sent_whether_or_not_answers_come(nothing: Server) -> None:
    load = Load(address=nothing.address, requests=[request("GET", "/")], seconds=0.5, rate=100)
    assert len(drive(load).statuses) == 50


def test_bodies_of_any_size_are_read_whole(nothing: Server) -> None:
    connection = Connection(nothing.address)
    assert connection.ask(request("POST", "/", {"long": "x" * 300_000})) == (200, b"0" * 100)
    connection.close()


def test_a_server_that_is_away_is_said_at_once() -> None:
    load = Load(address=("127.0.0.1", free_port()), requests=[request("GET", "/")], seconds=9.0)
    with pytest.raises(ConnectionRefusedError):
        drive(load)


def test_connections_that_break_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Thread(target=_accept_and_close, args=[listener])
        closing.start()
        measured = drive(
            Load(address=listener.getsockname(), requests=[request("GET", "/")], seconds=0.2)
        )
        listener.shutdown(socket.SHUT_RDWR)
        closing.join()
    assert set(measured.count()) == {BROKEN}
    assert not measured.good.any()


def _accept_and_close(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # when it is shut down
        while True:
            listener.accept()[0].close()


def test_figures_are_written_as_json_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, str | int | float]] = [{"what": "a", "count": 12345, "ms": 0.12345}]
    figures = Figures(title="Title", notes=["how"], rows=rows)
    write(figures, {"cores": "2"}, tmp_path, "part")
    assert "| a | 12,345 | 0.123 |" in (tmp_path / "part.md").read_text()
    assert '"cores": "2"' in (tmp_path / "part.json").read_text()
    assert "## Title" in capsys.readouterr().out
