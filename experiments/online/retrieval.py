"""What it costs to go from a user to ranked items in one call, beside scoring as many alone."""

import shutil

import numpy as np

from experiments.online.bench import PATHS, SCORER, Bench, say
from experiments.online.client import Load, Measured, drive, in_own_process, request
from experiments.online.inputs import score_bodies
from experiments.online.report import Cell, Figures
from hashtab.pipelines.build_index import IndexSettings, build

_COUNT = 20


def retrieval(bench: Bench, data: str | None) -> Figures:
    """Ask for recommendations and for scores in turn, on one connection.

    Args:
        bench: of the run.
        data: prepared data set that the index is built with; None for made-up users.
    """
    folder = bench.work / "bundle"
    shutil.copytree(bench.folder, folder)  # the index comes to lie beside it
    bench.folder = folder
    say("retrieval: building the index")
    _, manifest = build(IndexSettings(bundle=str(folder), data=data))
    bench.add_tables()
    with bench.server(SCORER) as server, in_own_process() as process:
        say("retrieval: recommendations and scores in turn")
        load = Load(
            address=server.address,
            requests=_in_turn(bench),
            seconds=bench.seconds * bench.rounds,
        )
        measured = process.submit(drive, load).result()
    rows = [_row(measured, number, what) for number, what in enumerate(("recommend", "score"))]
    retrieved, scored = rows
    difference: dict[str, Cell] = {"what": "difference"}
    for column in ("p50 ms", "p99 ms"):
        first, second = retrieved[column], scored[column]
        assert isinstance(first, float)
        assert isinstance(second, float)
        difference[column] = first - second
    difference["not answered well"] = ""
    return Figures(
        title=f"From a user to {_COUNT} of {manifest.items:,} items",
        notes=[
            f"recommend: {bench.candidates} candidates retrieved, those seen before left out, "
            f"scored, the best {_COUNT} answered; score: as many candidates named by the client, "
            "all answered",
            f"index: {manifest.kind}, {manifest.nprobe} of {manifest.nlist} cells searched, recall "
            f"at {manifest.recall.at} against exact search {manifest.recall.value:.4f} "
            f"({manifest.recall.users} of {manifest.recall.sample})",
        ],
        rows=[*rows, difference],
    )


def _in_turn(bench: Bench) -> list[bytes]:
    asked = []
    for body in score_bodies(bench.bundle, bench.known, bench.candidates):
        others = {name: value for name, value in body.items() if name != "items"}
        others |= {"count": _COUNT, "candidates": bench.candidates}
        asked += [request("POST", "/v1/recommend", others), request("POST", PATHS[SCORER], body)]
    return asked


def _row(measured: Measured, number: int, what: str) -> dict[str, Cell]:
    mine = np.arange(len(measured.statuses)) % 2 == number
    return {
        "what": what,
        "p50 ms": measured.milliseconds(50, measured.good & mine),
        "p99 ms": measured.milliseconds(99, measured.good & mine),
        "not answered well": int((~measured.good & mine).sum()),
    }
