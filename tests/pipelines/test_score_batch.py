"""Scores of request files: those of the model, whatever the form, the parts and what is missing."""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hashtab.features.dataset import Dataset
from hashtab.features.encoders import FIRST_ID, Vocabulary
from hashtab.features.prepare import prepare
from hashtab.features.storage import exclusive
from hashtab.pipelines import encode_users, outputs, score_batch
from hashtab.pipelines.as_of import score_as_of
from hashtab.pipelines.encode_users import EncodeSettings, encode
from hashtab.pipelines.encoding import Encoding
from hashtab.pipelines.requests import RequestFiles, write_split
from hashtab.pipelines.saved_model import load_model
from hashtab.pipelines.score_batch import ScoreSettings, Summary, score
from hashtab.pipelines.scoring import Scoring
from hashtab.pipelines.shard_tasks import Task, run_shards
from hashtab.serving.bundle import Bundle
from hashtab.serving.store import StoreError, open_store
from tests.features import logs, prepared
from tests.pipelines.bundles import export_bundle, small_model
from tests.pipelines.reference import Reference, likes_items, likes_log, shop_items, shop_log

BUNDLES = ["sdim", "mean", "none", "din", "shop", "feed"]
WHEN = datetime(2024, 2, 10, 12)


@pytest.fixture(scope="session")
def feed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users and items whose names are text, context with a number and a category."""
    folder = tmp_path_factory.mktemp("feed")
    prepare(logs.feed(folder / "raw"), folder / "feed", shards=3)
    return folder / "feed"


@pytest.fixture(scope="session")
def feed_bundle(feed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = Dataset.open(feed_data)
    model = small_model(dataset, "none", counters=True)
    return export_bundle(tmp_path_factory.mktemp("none") / "feed-run", model, dataset)


class Made:
    """A bundle with its data, the tables of all users at the test split, and the test requests."""

    def __init__(self, name: str, bundle: Path, data: Path, folder: Path) -> None:
        self.bundle, self.data, self.store = bundle, data, folder / "tables"
        logs_of = {"shop": (shop_log, shop_items), "feed": (_feed_log, _feed_items)}
        log, items = logs_of.get(name, (likes_log, likes_items))
        self.reference = Reference(bundle, log(data), items(data))
        encoded = encode(
            EncodeSettings(
                bundle=str(bundle), data=str(data), store=str(self.store), as_of="test", workers=0
            )
        )
        self.as_of = encoded.encoding.as_of
        write_split(Dataset.open(data), "test", folder / "requests.parquet")
        self.requests = pl.read_parquet(folder / "requests.parquet").head(80)

    def settings(self, requests: Path, output: Path, **other: Any) -> ScoreSettings:
        places = {"bundle": str(self.bundle), "store": str(self.store), "workers": 0}
        return ScoreSettings(requests=str(requests), output=str(output), **{**places, **other})

    def score(
        self, requests: pl.DataFrame, folder: Path, **other: Any
    ) -> tuple[pl.DataFrame, Summary]:
        """Score requests into `folder`."""
        folder.mkdir()
        requests.write_parquet(folder / "asked.parquet")
        summary = score(self.settings(folder / "asked.parquet", folder / "scores", **other))
        return scores_of(folder / "scores"), summary

    def in_torch(self, request: Mapping[str, Any], before: int | None = None) -> np.ndarray:
        """Scores of one request by the model in torch, from the raw log."""
        names = [f.name for f in self.reference.model.features.context]
        length = len(request["candidates"])
        read = [n for n in (*names, "time") if n in request]
        context = {
            n: request[n] if isinstance(request[n], list) else [request[n]] * length for n in read
        }
        moment = self.as_of if before is None else before
        return self.reference.scores(request["user"], moment, request["candidates"], context)


def _feed_log(data: Path) -> pl.DataFrame:
    log = pl.read_parquet(data.parent / "raw" / "watches.parquet")
    return log.select(user="who", item="video", time=pl.col("ms") * 1000)


def _feed_items(data: Path) -> pl.DataFrame:
    return pl.DataFrame({"item": []}, schema={"item": pl.String})


def scores_of(output: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(part) for part in sorted(output.glob("part-*"))])


@pytest.fixture(scope="session")
def make(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            data = {"shop": "shop_data", "feed": "feed_data"}.get(name, "likes")
            bundle, prepared = map(request.getfixturevalue, (f"{name}_bundle", data))
            made[name] = Made(name, bundle, prepared, tmp_path_factory.mktemp("made"))
        return made[name]

    return get


@pytest.fixture
def sdim(make: Callable[[str], Made]) -> Made:
    return make("sdim")


@pytest.fixture
def feed(make: Callable[[str], Made]) -> Made:
    return make("feed")


def likes_requests(requests: list[tuple[Any, Any, list[Any] | None]]) -> pl.DataFrame:
    """Requests of `likes`: name, user, candidates."""
    named = [("request", pl.String()), ("user", pl.Int64()), ("candidates", pl.List(pl.Int64))]
    types = pl.Schema(named)
    frame = pl.DataFrame(requests, schema=types, orient="row")
    return frame.with_columns(time=pl.lit(WHEN))


@pytest.mark.parametrize("name", BUNDLES)
def test_scores_are_those_of_the_model_in_torch(
    name: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(name)
    scores, summary = made.score(made.requests, tmp_path / "it")
    for answer, request in zip(
        scores.iter_rows(named=True), made.requests.iter_rows(named=True), strict=True
    ):
        for part in ("request", "user", "candidates"):
            assert answer[part] == request[part]
        assert np.abs(made.in_torch(request) - answer["scores"]).max() < 1e-4
    assert scores["scores"].explode().to_numpy().std() > 1e-3
    assert (scores["history"] == "stored").all()
    assert summary == Summary(
        requests=80,
        candidates=int(made.requests["candidates"].list.len().sum()),
        stored=80,
        encoded=0,
        empty=0,
        unknown_candidates=0,
        missing_context=int(scores["missing_context"].sum()),
    )


@pytest.mark.parametrize("name", BUNDLES)
def test_scores_depend_on_no_part_and_no_order(
    name: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(name)
    whole, _ = made.score(made.requests, tmp_path / "whole")
    for rows in (1, 7):
        parts, _ = made.score(made.requests, tmp_path / str(rows), rows=rows)
        assert parts.equals(whole)
        assert len(list((tmp_path / str(rows) / "scores").glob("part-*"))) == -(-80 // rows)
    shuffled, _ = made.score(made.requests.sample(fraction=1, shuffle=True, seed=0), tmp_path / "x")
    assert shuffled["request"].to_list() != whole["request"].to_list()
    assert shuffled.sort("request").equals(whole)


@pytest.mark.parametrize("name", ["shop", "feed"])
def test_a_csv_with_one_candidate_a_row_scores_the_same(
    name: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(name)
    whole, summary = made.score(made.requests, tmp_path / "lists")
    lists = [n for n, t in made.requests.schema.items() if isinstance(t, pl.List)]
    rows = made.requests.explode(lists).rename({"candidates": "candidate"})
    rows.write_csv(tmp_path / "rows.csv")
    found = score(made.settings(tmp_path / "rows.csv", tmp_path / "scores", rows=9))
    flat = whole.explode("candidates", "scores").rename(
        {"candidates": "candidate", "scores": "score"}
    )
    assert scores_of(tmp_path / "scores").equals(flat.cast({"request": pl.Int64}))
    assert found == summary
    assert score(made.settings(tmp_path / "rows.csv", tmp_path / "scores", verify=True)) == summary


def test_the_best_come_first_and_equal_ones_in_the_order_asked(sdim: Made, tmp_path: Path) -> None:
    many = list(range(5000))  # hardly any of them known, so that nearly all are equal
    asked = [[3, 9, 3, 12, 44, 9], [7], [], [999, 20, 998], list(range(50)), many]
    requests = likes_requests([(f"{i}", i, candidates) for i, candidates in enumerate(asked)])
    every, _ = sdim.score(requests, tmp_path / "every")
    for top in (1, 3, 100):
        best, summary = sdim.score(requests, tmp_path / str(top), top=top, rows=2)
        for all_of, row in zip(
            every.iter_rows(named=True), best.iter_rows(named=True), strict=True
        ):
            pairs = list(zip(all_of["candidates"], all_of["scores"], strict=True))
            pairs = sorted(pairs, key=lambda pair: -pair[1])[:top]  # sorted keeps ties in order
            assert list(zip(row["candidates"], row["scores"], strict=True)) == pairs
        assert summary.candidates == sum(min(top, len(candidates)) for candidates in asked)


def test_strangers_gaps_and_repetitions_are_scored_and_flagged(sdim: Made, tmp_path: Path) -> None:
    requests = likes_requests(
        [
            ("no one knows", 12_345, [1, 2, 3]),
            ("no name", None, [1, 2, 3]),
            ("items", 1, [4, None, 4, 777]),
            ("nothing", 1, []),
            ("no list", 1, None),
            ("usual", 1, [4]),
        ]
    )
    scores, summary = sdim.score(requests, tmp_path / "it")
    by_name = {row["request"]: row for row in scores.iter_rows(named=True)}
    assert list(by_name) == requests["request"].to_list()
    assert {n: row["history"] for n, row in by_name.items()} == {
        "no one knows": "empty",
        "no name": "empty",
        "items": "stored",
        "nothing": "stored",
        "no list": "stored",
        "usual": "stored",
    }
    assert by_name["no name"]["scores"] == by_name["no one knows"]["scores"]
    stranger = requests.row(0, named=True)
    assert np.allclose(by_name["no one knows"]["scores"], sdim.in_torch(stranger), atol=1e-4)
    known, null, again, unknown = by_name["items"]["scores"]
    assert known == again != unknown == null
    assert np.allclose(
        by_name["items"]["scores"], sdim.in_torch(requests.row(2, named=True)), atol=1e-4
    )
    assert by_name["items"]["candidates"] == [4, None, 4, 777]
    assert by_name["nothing"]["scores"] == by_name["no list"]["scores"] == []
    assert scores["unknown_candidates"].to_list() == [0, 0, 2, 0, 0, 0]
    assert summary == Summary(
        requests=6,
        candidates=11,
        stored=4,
        encoded=0,
        empty=2,
        unknown_candidates=2,
        missing_context=0,
    )


def test_missing_context_is_scored_as_unknown_and_flagged(feed: Made, tmp_path: Path) -> None:
    usual = {"user": "u1", "candidates": ["v1", "v2", "v3"], "tab": [0, 1, 2], "load": [5.0] * 3}
    changes: list[dict[str, Any]] = [
        {},
        {"load": [float("nan"), None, 5.0]},
        {"load": None},
        {"tab": [None, 1, None]},
        {"tab": None, "load": None},
        {"tab": [99, 1, 2]},  # unknown, and not missing
        {"load": [float("inf"), 5.0, 5.0]},
        {"candidates": None, "tab": None, "load": None},
    ]
    types = pl.Schema({"tab": pl.List(pl.Int64), "load": pl.List(pl.Float64)})
    requests = pl.DataFrame([{**usual, **change} for change in changes], schema_overrides=types)
    scores, summary = feed.score(requests, tmp_path / "lists")
    assert scores["missing_context"].to_list() == [0, 2, 3, 2, 3, 0, 1, 0]
    assert summary.missing_context == 11
    for request, found in zip(requests.iter_rows(named=True), scores["scores"], strict=True):
        if request["candidates"]:
            assert np.allclose(feed.in_torch(request), found, atol=1e-4)
    first, unknown = scores["scores"][3], scores["scores"][5]
    assert first[0] == unknown[0] != scores["scores"][0][0]

    single = pl.DataFrame({**usual, "candidates": [["v1", "v2"]], "tab": [None], "load": [4.0]})
    scores, _ = feed.score(single, tmp_path / "single")
    assert scores["missing_context"].to_list() == [2]
    assert np.allclose(scores["scores"][0], feed.in_torch(single.row(0, named=True)), atol=1e-4)


def test_a_missing_time_is_unknown_and_zones_are_minded(sdim: Made, tmp_path: Path) -> None:
    requests = likes_requests([("a", 1, [2, 3]), ("b", 1, [2, 3]), ("c", 1, [2, 3])])
    times = pl.Series("time", [WHEN, None, datetime(2024, 2, 10, 23, 30)])
    zoned = times.dt.replace_time_zone("America/New_York")
    scores, _ = sdim.score(requests.with_columns(zoned), tmp_path / "it")
    assert scores["missing_context"].to_list() == [0, 2, 0]
    utc = zoned.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    assert utc[2].day == 11
    asked = requests.with_columns(utc).iter_rows(named=True)
    for row, found in zip(asked, scores["scores"], strict=True):
        assert np.allclose(sdim.in_torch(row), found, atol=1e-6)
    assert scores["scores"].n_unique() == 3


GOOD = pl.DataFrame(
    {
        "request": ["a", "b"],
        "user": ["u1", "u2"],
        "candidates": [["v1", "v2"], ["v3"]],
        "tab": [[0, 1], [2]],
        "load": [1.0, 2.0],
    }
)
ROWS = pl.DataFrame(
    {
        "request": [1, 1, 2],
        "user": ["u1", "u1", "u2"],
        "candidate": ["v1", "v2", "v3"],
        "tab": [0, 1, 2],
        "load": [1.0, 2.0, 3.0],
    }
)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (
            GOOD.rename({"load": "laod"}),
            "has no column 'load', which the model reads; did you mean",
        ),
        (
            GOOD.rename({"user": "users"}),
            "no column 'user', which the model reads; did you mean 'users'",
        ),
        (GOOD.rename({"candidates": "candidats"}), "did you mean 'candidats'?"),
        (ROWS.drop("request"), "has no column 'request'"),
        (GOOD.with_columns(candidates=pl.lit("v1")), "'candidates' must be a list, got String"),
        (GOOD.with_columns(request=pl.lit("c")), "request 'c' comes more than once"),
        (GOOD.with_columns(request=None), "2 requests have no name"),
        (GOOD.with_columns(tab=pl.Series([[0], [2]])), "request 'a': the list 'tab' must have one"),
        (GOOD.with_columns(load=pl.lit("low")), "'load' must hold one numeric value a request"),
        (GOOD.with_columns(load=pl.lit(WHEN)), "'load' must hold one numeric value a request"),
        (
            GOOD.with_columns(tab=pl.struct("user")),
            "'tab' must hold one categorical value a request",
        ),
        (
            ROWS.with_columns(tab=pl.Series([[0], [1], [2]])),
            "'tab' must hold one categorical value",
        ),
        (ROWS.with_columns(request=7), "rows of request 7 have more than one user: names of requ"),
    ],
)
def test_requests_that_cannot_be_scored_are_named(
    frame: pl.DataFrame,
    said: str,
    feed: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frame.write_parquet(tmp_path / "requests.parquet")
    assert refused(feed, tmp_path, capsys).count(said) == 1


def refused(made: Made, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the one line that a run which cannot be done ends with."""
    places = [f"--bundle={made.bundle}", f"--store={made.store}", f"--output={folder / 'scores'}"]
    given = [f"--requests={folder / 'requests.parquet'}", "--workers=0", *options]
    assert score_batch.main([*places, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--requests={folder}/nowhere.csv"], "no requests in"),
        (["--requests={folder}/*.parq"], "no requests in"),
        (["--requests={folder}"], "must all be CSV or all be Parquet"),
        (["--requests={folder}/rows.csv"], "rows.csv cannot be read: could not parse `low`"),
        (["--requests={folder}/cut.parquet"], "cut.parquet cannot be read: "),
        (["--store={folder}/nowhere"], "nowhere holds no store; check the path, or encode"),
        (["--store=null"], "the model reads histories: give the --store of user tables, or the"),
        (["--bundle={folder}/nowhere"], "nowhere holds no bundle"),
        (["--top=0"], "top must be positive, got 0"),
        (["--rows=0"], "rows must be positive"),
        (["--request=x"], "did you mean --requests?"),
        (["--verify"], "scores is not finished (_SUCCESS is missing): run the command again"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line_and_leaves_nothing(
    options: list[str], said: str, feed: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GOOD.write_parquet(tmp_path / "requests.parquet")
    bad = pl.concat([ROWS] * 10_000).with_columns(load=pl.col("load").cast(pl.String))
    bad[-1, "load"] = "low"
    bad.write_csv(tmp_path / "rows.csv")
    whole = (tmp_path / "requests.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    given = [option.format(folder=tmp_path) for option in options]
    assert said in refused(feed, tmp_path, capsys, *given)
    assert not list(tmp_path.glob("scores/part*"))


def test_a_csv_column_that_begins_with_whole_numbers_may_go_on_with_others(
    feed: Made, tmp_path: Path
) -> None:
    rows = pl.concat([ROWS] * 4000).drop("request").with_row_index("request")
    rows = rows.with_columns(load=pl.lit("5"))
    rows[-1, "load"] = "5.5"
    rows.write_csv(tmp_path / "rows.csv")
    summary = score(feed.settings(tmp_path / "rows.csv", tmp_path / "scores", rows=20_000))
    assert summary.requests == 12_000
    whole, half = (
        pl.DataFrame({"user": ["u2"], "candidates": [["v3"]], "tab": [2], "load": [load]})
        for load in (5.0, 5.5)
    )
    found = scores_of(tmp_path / "scores")["score"]
    for name, frame, at in (("whole", whole, -4), ("half", half, -1)):
        assert feed.score(frame, tmp_path / name)[0]["scores"][0][0] == found[at]
    assert found[-1] != found[-4]


def test_further_columns_are_reported_and_not_read(
    feed: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = feed.score(GOOD, tmp_path / "plain")
    assert capsys.readouterr().err.count("columns not read") == 0
    more = GOOD.with_columns(price=1, user_name=pl.lit("x"), time=pl.lit("not a time"))
    scores, _ = feed.score(more, tmp_path / "more")
    assert "columns not read: price, user_name, time\n" in capsys.readouterr().err
    assert scores.equals(plain)


@pytest.mark.parametrize("frame", [GOOD, ROWS])
def test_no_requests_give_a_file_with_none(frame: pl.DataFrame, feed: Made, tmp_path: Path) -> None:
    some, _ = feed.score(frame, tmp_path / "some")
    none, summary = feed.score(frame.clear(), tmp_path / "none")
    assert (len(none), summary.requests, summary.candidates) == (0, 0, 0)
    assert none.schema == some.schema


def test_files_of_a_folder_or_glob_are_read_in_the_order_of_their_names(
    sdim: Made, tmp_path: Path
) -> None:
    requests = sdim.requests.drop("request").head(30)
    whole, _ = sdim.score(requests, tmp_path / "whole")
    folder = tmp_path / "day[1]" / "hour=3"  # no pattern, and no column of Hive
    folder.mkdir(parents=True)
    for i in (2, 0, 1):
        requests.slice(i * 10, 10).write_parquet(folder / f"{i}.parquet")
    (folder / "notes.txt").touch()
    for i, pattern in enumerate((f"{folder}", f"{tmp_path}/day?1?/*/?.parquet")):
        output = tmp_path / f"scores-{i}"
        assert score(sdim.settings(Path(pattern), output)).requests == 30
        assert scores_of(output).equals(whole)
    named, summary = sdim.score(pl.read_parquet(folder / "1.parquet", glob=False), tmp_path / "one")
    assert summary.requests == 10
    assert named["scores"].to_list() == whole["scores"][10:20].to_list()


@pytest.fixture
def finished(sdim: Made, tmp_path: Path) -> tuple[ScoreSettings, Summary]:
    requests = sdim.requests.head(20)
    requests.write_parquet(tmp_path / "requests.parquet")
    settings = sdim.settings(tmp_path / "requests.parquet", tmp_path / "scores", rows=6)
    return settings, score(settings)


def test_a_finished_output_is_left_as_it_is(
    finished: tuple[ScoreSettings, Summary], tmp_path: Path
) -> None:
    settings, summary = finished
    names = [f"part-{i:05d}-of-00004.parquet" for i in range(4)]
    files = [p for p in (tmp_path / "scores").iterdir() if p.name != ".lock"]
    assert sorted(path.name for path in files) == ["_MANIFEST.json", "_SUCCESS", *names]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert score(settings) == summary
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before


def test_nothing_is_left_of_a_worker_that_was_killed_while_it_wrote(
    sdim: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored_by_one_that_was_killed_before(job: Task, shards: list[int], workers: int) -> None:
        (tmp_path / "scores" / ".part-00000-of-00004.parquet.4711.tmp").write_bytes(b"PAR1 half")
        run_shards(job, shards, workers)

    monkeypatch.setattr(outputs, "run_shards", scored_by_one_that_was_killed_before)
    sdim.requests.head(20).write_parquet(tmp_path / "requests.parquet")
    score(sdim.settings(tmp_path / "requests.parquet", tmp_path / "scores", rows=6))
    names = [path.name for path in (tmp_path / "scores").iterdir()]
    assert [name for name in names if name.endswith(".tmp")] == []
    assert sum(name.startswith("part-") for name in names) == 4


def test_another_job_in_the_same_folder_is_refused(
    sdim: Made,
    make: Callable[[str], Made],
    finished: tuple[ScoreSettings, Summary],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = prepared.tree(tmp_path / "scores")
    sdim.requests.head(21).write_parquet(tmp_path / "others.parquet")
    for option, said in (
        ("--rows=5", "rows was 6, now 5"),
        ("--top=3", "top was None, now 3"),
        (f"--bundle={make('mean').bundle}", "bundle_digest was"),
        (f"--store={make('mean').store}", "store was"),
        (f"--data={sdim.data}", "data_digest was None"),
        (f"--requests={tmp_path / 'others.parquet'}", "requests was"),
    ):
        error = refused(sdim, tmp_path, capsys, "--rows=6", option)
        assert "scores holds the scores of another job: " in error
        assert said in error
    assert prepared.tree(tmp_path / "scores") == before


def test_two_at_once_are_refused(
    finished: tuple[ScoreSettings, Summary],
    sdim: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with exclusive(tmp_path / "scores" / ".lock"):
        assert "another process writes to" in refused(sdim, tmp_path, capsys, "--rows=6")


def _edit(part: Path) -> None:
    frame = pl.read_parquet(part)
    frame.with_columns(pl.col("scores").list.eval(pl.element() / 2)).write_parquet(part)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "part-00002-of-00004.parquet is missing: remove"),
        (lambda part: part.write_bytes(part.read_bytes()[:-9]), "was altered or damaged: remove"),
        (_edit, "part-00002-of-00004.parquet was altered or damaged: remove"),
        (lambda part: pl.read_parquet(part).head(3).write_parquet(part), "altered or damaged"),
        (lambda part: (part.parent / "_SUCCESS").write_text("{}"), "_SUCCESS was altered: remove"),
        (lambda part: (part.parent / "_SUCCESS").write_text(""), "_SUCCESS was altered: remove"),
        (lambda part: (part.parent / "_MANIFEST.json").unlink(), "_MANIFEST.json cannot be read"),
        (lambda part: (part.parent / "_MANIFEST.json").write_text("["), "json cannot be read"),
        (lambda part: (part.parent / "_SUCCESS").unlink(), "is not finished (_SUCCESS is missing)"),
    ],
)
def test_verify_finds_what_is_missing_or_was_altered(
    spoil: Callable[[Path], object],
    said: str,
    finished: tuple[ScoreSettings, Summary],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verify = [f"--output={tmp_path / 'scores'}", "--verify"]
    assert score_batch.main(verify) == 0
    assert "20 requests" in capsys.readouterr().out
    spoil(tmp_path / "scores" / "part-00002-of-00004.parquet")
    assert score_batch.main(verify) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_tables_of_another_model_are_not_used(
    sdim: Made, make: Callable[[str], Made], tmp_path: Path
) -> None:
    requests = sdim.requests
    stored, _ = sdim.score(requests, tmp_path / "stored")
    others = str(make("mean").store)
    empty, summary = sdim.score(requests, tmp_path / "empty", store=others)
    assert (summary.stored, summary.encoded, summary.empty) == (0, 0, 80)
    request = requests.row(0, named=True)
    assert np.allclose(empty["scores"][0], sdim.in_torch(request, before=0), atol=1e-4)
    for store in (others, None):
        folder = tmp_path / f"encoded-{store is None}"
        encoded, summary = sdim.score(
            requests, folder, store=store, data=str(sdim.data), as_of="test"
        )
        assert (summary.stored, summary.encoded, summary.empty) == (0, 80, 0)
        assert (encoded["history"] == "encoded").all()
        assert encoded.drop("history").equals(stored.drop("history"))


def test_a_damaged_record_is_named_and_built_from_the_data(
    sdim: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = likes_requests([("a", 1, [2, 3]), ("b", 2, [2, 3])])
    whole, _ = sdim.score(requests, tmp_path / "whole")
    fingerprint = Bundle.open(sdim.bundle).layout.fingerprint
    with (
        open_store(str(sdim.store), readonly=True) as store,
        open_store(str(tmp_path / "damaged")) as damaged,
    ):
        records = dict(store.items(fingerprint))
        damaged.put(fingerprint, {**records, 2: records[2][:-1] + b"?"})
    capsys.readouterr()
    for name, options in (("empty", {}), ("encoded", {"data": str(sdim.data), "as_of": "test"})):
        scores, _ = sdim.score(
            requests, tmp_path / name, store=str(tmp_path / "damaged"), **options
        )
        error = capsys.readouterr().err
        assert f"user 2 in {tmp_path / 'damaged'}: a record's checksum does not fit" in error
        assert scores["history"].to_list() == ["stored", name]
        assert scores["scores"][0].to_list() == whole["scores"][0].to_list()
    assert scores.drop("history").equals(whole.drop("history"))


def test_users_of_any_type_find_their_tables(sdim: Made, feed: Made, tmp_path: Path) -> None:
    requests = likes_requests([("a", 1, [2, 3])])
    for dtype in (pl.UInt8, pl.Int32, pl.Int64):
        _, summary = sdim.score(requests.cast({"user": dtype}), tmp_path / str(dtype))
        assert summary.stored == 1
    # Hashes that fill 64 bits are kept as text, as preparation keeps them.
    fingerprint = Bundle.open(feed.bundle).layout.fingerprint
    with open_store(str(feed.store)) as store, open_store(str(tmp_path / "hashes")) as hashes:
        (record,) = store.get(fingerprint, ["u1"])
        assert record is not None
        hashes.put(fingerprint, {str(2**63 + 5): record})
    asked = GOOD.head(1).with_columns(user=pl.lit(2**63 + 5, pl.UInt64))
    found, summary = feed.score(asked, tmp_path / "hash", store=str(tmp_path / "hashes"))
    assert summary.stored == 1
    plain, _ = feed.score(GOOD.head(1), tmp_path / "plain")
    assert found["scores"].to_list() == plain["scores"].to_list()
    named = GOOD.cast({"user": pl.Categorical, "candidates": pl.List(pl.Categorical)})
    _, summary = feed.score(named, tmp_path / "text")
    assert (summary.stored, summary.unknown_candidates) == (2, 0)


def test_names_of_digits_are_text_where_the_log_had_text(
    feed_bundle: Path, sdim_bundle: Path, tmp_path: Path
) -> None:
    text = Bundle.open(feed_bundle)
    assert text.manifest.text_users
    assert text.manifest.text_items
    asked = tmp_path / "asked.csv"
    asked.write_text("request,user,candidate,tab,load\n1,007,010,0,1.5\n")
    RequestFiles.find(str(asked), text).write(tmp_path / "text.parquet", 1)
    row = pl.read_parquet(tmp_path / "text.parquet").row(0, named=True)
    assert (row["user"], row["candidates"]) == ("007", ["010"])
    whole = Bundle.open(sdim_bundle)
    assert not whole.manifest.text_users
    frame = likes_requests([("1", 7, [3]), ("2", 8, [4])]).cast({"user": pl.String})
    frame.write_parquet(tmp_path / "whole.parquet")
    RequestFiles.find(str(tmp_path / "whole.parquet"), whole).write(tmp_path / "it.parquet", 1)
    assert pl.read_parquet(tmp_path / "it.parquet")["user"].to_list() == [7, 8]


def test_a_model_without_a_history_needs_no_tables(
    feed_without_counters: Path, tmp_path: Path
) -> None:
    dataset = Dataset.open(feed_without_counters)
    bundle = export_bundle(tmp_path / "run", small_model(dataset, "none"), dataset)
    requests = likes_requests([("a", 1, [2, 3])])
    requests.write_parquet(tmp_path / "requests.parquet")
    summary = score(
        ScoreSettings(
            bundle=str(bundle),
            requests=str(tmp_path / "requests.parquet"),
            output=str(tmp_path / "scores"),
            workers=0,
        )
    )
    assert (summary.requests, summary.empty) == (1, 1)


def test_an_output_that_may_not_be_written_is_named(
    sdim: Made, tiny_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdim.requests.write_parquet(tmp_path / "requests.parquet")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    error = refused(sdim, tmp_path, capsys, f"--output={tiny_disk / 'scores'}")
    assert "scores cannot be written (Read-only file system): give another --output" in error


def test_a_full_disk_costs_only_the_part_in_flight(
    sdim: Made, tiny_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdim.requests.write_parquet(tmp_path / "requests.parquet")
    whole, _ = sdim.score(sdim.requests, tmp_path / "whole", rows=40)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(16_000))
    options = [f"--output={tiny_disk / 'scores'}", "--rows=40"]
    assert "is full: free some space and run again" in refused(sdim, tmp_path, capsys, *options)
    ballast.unlink()
    settings = sdim.settings(tmp_path / "requests.parquet", tiny_disk / "scores", rows=40)
    assert score(settings).requests == 80
    assert scores_of(tiny_disk / "scores").equals(whole)


def test_scores_of_two_encodings_are_never_mixed(
    sdim: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdim.requests.write_parquet(tmp_path / "requests.parquet")
    encoding = EncodeSettings(
        bundle=str(sdim.bundle),
        data=str(sdim.data),
        store=str(tmp_path / "tables"),
        as_of="validation",
        workers=0,
    )
    encode(encoding)
    store, output = f"--store={tmp_path / 'tables'}", tmp_path / "scores"
    settings = sdim.settings(tmp_path / "requests.parquet", output, store=encoding.store, rows=40)
    score(settings)
    (output / "_SUCCESS").unlink()
    next(output.glob("part-00001*")).unlink()
    encode(replace(encoding, as_of=None))
    assert "another job: tables" in refused(sdim, tmp_path, capsys, store, "--rows=40")
    encode(encoding)
    assert score(settings).requests == 80


@pytest.fixture
def encoded(sdim: Made, tmp_path: Path) -> EncodeSettings:
    """Tables as of now in a store of their own, and requests to score with them."""
    sdim.requests.write_parquet(tmp_path / "requests.parquet")
    settings = EncodeSettings(
        bundle=str(sdim.bundle), data=str(sdim.data), store=str(tmp_path / "tables"), workers=0
    )
    encode(settings)
    return settings


def test_a_store_encoded_anew_while_it_is_read_is_told(
    encoded: EncodeSettings, sdim: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_part = Scoring.score

    def and_encode(job: Scoring, requests: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
        scores = score_part(job, requests)
        encode(replace(encoded, as_of="test"))
        return scores

    monkeypatch.setattr(Scoring, "score", and_encode)
    settings = sdim.settings(
        tmp_path / "requests.parquet", tmp_path / "scores", store=encoded.store
    )
    with pytest.raises(StoreError, match=r"encoded anew into .* while it was read"):
        score(settings)
    assert not list((tmp_path / "scores").glob("part-*"))


def test_tables_of_an_encoding_that_was_stopped_are_not_read(
    encoded: EncodeSettings, sdim: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(task: Encoding, shards: list[int], workers: int) -> None:
        task(shards[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_users, "run_shards", stopped)
    later = replace(encoded, as_of="test")
    with pytest.raises(KeyboardInterrupt):
        encode(later)
    settings = sdim.settings(
        tmp_path / "requests.parquet", tmp_path / "scores", store=encoded.store
    )
    with pytest.raises(StoreError, match=r"not all of one moment\. Wait, or run the same"):
        score(settings)
    monkeypatch.undo()
    encode(later)
    assert score(settings).requests == 80


def test_whole_numbers_stay_users_however_a_file_holds_them(sdim: Made, tmp_path: Path) -> None:
    asked = likes_requests([("a", 1, [3]), ("b", None, [3]), ("c", 2, [4])])
    expected, summary = sdim.score(asked, tmp_path / "whole")
    assert (summary.stored, summary.empty) == (2, 1)
    found, _ = sdim.score(asked.cast({"user": pl.Float64}), tmp_path / "float")
    assert found.equals(expected)
    lines = ["request,user,candidate,time", "a,1.0,3,2024-02-01", "b,,3,2024-02-01"]
    lines += [f"{i},nobody,3,2024-02-01" for i in range(12_000)]
    (tmp_path / "asked.csv").write_text("\n".join([*lines, "c,2.0,v4,2024-02-01"]) + "\n")
    summary = score(sdim.settings(tmp_path / "asked.csv", tmp_path / "csv"))
    assert (summary.stored, summary.unknown_candidates) == (2, 1)


@pytest.mark.parametrize(
    ("values", "written"),
    [
        (("false", "true"), ["True", "False"]),
        (("1.0", "2.5"), ["1", "2.5"]),
        (("2024-01-01 00:00:00.000000",), ["2024-01-01T00:00:00"]),
        (("0", "2", "A"), ["2", "0"]),
        (("00501", "K1A"), ["00501", "00501"]),
        (("TRUE", "x"), ["TRUE", "TRUE"]),
    ],
)
def test_a_category_in_csv_is_what_it_was_in_the_log(
    values: tuple[str, ...],
    written: list[str],
    feed: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, tab = Bundle.open(feed.bundle), Vocabulary(values)
    monkeypatch.setitem(bundle.__dict__, "encoders", {**bundle.encoders, "tab": tab})
    lines = [f"{i},u1,v1,{value},1.5" for i, value in enumerate(written)]
    asked = tmp_path / "asked.csv"
    asked.write_text("\n".join(["request,user,candidate,tab,load", *lines]) + "\n")
    RequestFiles.find(str(asked), bundle).write(tmp_path / "it.parquet", 1)
    found = pl.read_parquet(tmp_path / "it.parquet").explode("tab")
    ids = found.select(tab.encode(pl.col("tab")))["tab"].to_list()
    assert min(ids) >= FIRST_ID  # none is unknown


@pytest.mark.parametrize("name", BUNDLES)
def test_a_split_scored_in_torch_as_of_a_moment_is_what_the_tables_serve(
    name: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(name)
    dataset = Dataset.open(made.data)
    write_split(dataset, "test", tmp_path / "all.parquet")
    requests = pl.read_parquet(tmp_path / "all.parquet")
    served, _ = made.score(requests, tmp_path / "it")
    in_torch = score_as_of(load_model(made.bundle.parent / "model"), dataset, "test", made.as_of)
    assert in_torch.labels.tolist() == requests["labels"].explode().to_list()
    np.testing.assert_allclose(in_torch.scores, served["scores"].explode(), rtol=0, atol=1e-6)
