"""The tabular benchmark: fixed splits, runs that resume, figures that cannot be chosen by test."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.tabular_benchmark import models, runs, search_space, splits
from experiments.tabular_benchmark.aggregate import Comparison
from experiments.tabular_benchmark.data import Array, DataError, Table, Task, load
from experiments.tabular_benchmark.metrics import loss
from experiments.tabular_benchmark.models import MODELS, Entry, Part, Setting
from experiments.tabular_benchmark.report import groups, write
from experiments.tabular_benchmark.runs import RunSettings, due, execute, run
from experiments.tabular_benchmark.search_space import Between, Params
from experiments.tabular_benchmark.store import Key, Record, Store, read


def table(rows: int = 300, classes: int = 3, name: str = "made") -> Table:
    random = np.random.RandomState(rows)  # its stream never changes, nor do the hashes below
    features = pd.DataFrame(
        {
            "number": random.normal(size=rows),
            "level": pd.Categorical(random.choice(["a", "b", "c"], rows)),
        }
    )
    if not classes:
        return Table(name, "regression", features, random.normal(size=rows))
    target = (random.random_sample(rows) ** 2 * classes).astype(np.int64)
    return Table(name, "binary" if classes == 2 else "multiclass", features, target)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets on disk, with their own splits.json."""
    tasks = {"one": 2, "two": 0}
    known = {}
    for name, classes in tasks.items():
        made = table(120, classes, name)
        made.features.assign(target=made.target).to_parquet(tmp_path / f"{name}.parquet")
        known[name] = splits.describe(made)
    manifest = [{"name": "one", "task": "binary"}, {"name": "two", "task": "regression"}]
    (tmp_path / "MANIFEST.json").write_text(json.dumps(manifest))
    (tmp_path / "splits.json").write_text(json.dumps(known))
    monkeypatch.setattr(splits, "SPLITS", tmp_path / "splits.json")
    runs._table.cache_clear()
    return tmp_path


# Splits


@pytest.mark.parametrize(("rows", "count"), [(2_499, 30), (2_500, 9), (50_000, 9), (50_001, 3)])
def test_number_of_splits_follows_the_rows(rows: int, count: int) -> None:
    assert len(splits.make_splits(table(rows))) == count


@pytest.mark.parametrize("rows", [301, 2_600, 50_001])
@pytest.mark.parametrize("classes", [0, 3])
def test_parts_are_disjoint_complete_and_stratified(rows: int, classes: int) -> None:
    made = table(rows, classes)
    for split in splits.make_splits(made):
        together = np.concatenate([split.fit, split.inner, split.test])
        assert np.array_equal(np.sort(together), np.arange(rows))
        assert np.array_equal(split.train, np.setdiff1d(np.arange(rows), split.test))
        shares = (0.7, 0.1, 0.2) if rows > 50_000 else (8 / 15, 2 / 15, 1 / 3)
        for part, share in zip((split.fit, split.inner, split.test), shares, strict=True):
            for label in range(classes):
                wanted = share * (made.target == label).sum()
                assert abs((made.target[part] == label).sum() - wanted) <= 2
            assert abs(len(part) - share * rows) <= 2


def test_folds_of_a_repeat_test_every_row_once() -> None:
    made = splits.make_splits(table(301))
    for repeat in range(10):
        tests = [split.test for split in made if split.name.startswith(f"r{repeat}f")]
        assert np.array_equal(np.sort(np.concatenate(tests)), np.arange(301))
    assert len({split.digest for split in made}) == 30


def test_splits_are_the_same_on_every_machine() -> None:
    digests = [splits.make_splits(table(rows))[1].digest for rows in (300, 2_600, 50_001)]
    assert digests == ["ef112d99914214b0", "302a77241c80d329", "cfb25f0cd894dc79"]


def test_data_and_splits_are_held_by_hashes(folder: Path) -> None:
    made = load(folder, "one")
    splits.verify(made)
    changed = made.features.assign(number=made.features["number"] + 1)
    with pytest.raises(DataError, match="one: the data differ"):
        splits.verify(replace(made, features=changed))
    known = splits.stored()
    known["one"]["splits"]["r0f1"] = "0" * 16
    splits.SPLITS.write_text(json.dumps(known))
    with pytest.raises(DataError, match="one: the splits made here differ"):
        splits.verify(made)
    with pytest.raises(DataError, match=r"other is not in splits\.json"):
        splits.verify(replace(made, name="other"))


def test_committed_splits_follow_the_rule() -> None:
    for name, facts in splits.stored().items():
        rows = facts["rows"]
        wanted = 30 if rows < 2_500 else 9 if rows <= 50_000 else 3
        assert len(facts["splits"]) == wanted, name


def test_oversampled_data_are_refused(folder: Path) -> None:
    levels = pd.get_dummies(pd.Series(list("abc") * 40), dtype=float)
    frame = levels.assign(number=np.linspace(0, 1, 120), target=np.arange(120) % 2)
    frame.to_parquet(folder / "one.parquet")
    load(folder, "one")
    frame.loc[110, ["a", "b", "c"]] = [0.3, 0.7, 0.0]
    frame.to_parquet(folder / "one.parquet")
    with pytest.raises(DataError, match="one: 1 rows, row 110 for one, have fractions in one-hot"):
        load(folder, "one")


# Runs


class Recorder:
    """A model that notes which rows it was shown, and predicts the mean of its target."""

    seen: list[tuple[str, Array]]

    def __init__(self, setting: Setting, params: Params) -> None:
        self._setting, self._shift = setting, params.get("shift", 0.0)
        self._mean = 0.0

    def fit(self, train: Part, validation: Part | None) -> None:
        Recorder.seen.append(("fit", train.features.index.to_numpy()))
        if validation is not None:
            Recorder.seen.append(("validation", validation.features.index.to_numpy()))
        self._mean = float(train.target.mean())

    def predict(self, features: pd.DataFrame) -> Array:
        Recorder.seen.append(("predict", features.index.to_numpy()))
        return np.full(len(features), self._mean + self._shift)


@pytest.fixture(params=[True, False], ids=["validates", "needs no validation"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    Recorder.seen = []
    monkeypatch.setitem(MODELS, "recorder", Entry(Recorder, request.param, ("numpy",)))
    monkeypatch.setitem(search_space.SPACES, "recorder", {"shift": Between(1.0, 9.0)})
    return bool(request.param)


@pytest.mark.parametrize("track", ["default", "tuned"])
def test_the_test_part_is_read_once_after_all_choices(
    folder: Path, recorder: bool, track: str
) -> None:
    found = run(Key("two", "r1f2", "recorder", track), RunSettings(data=folder, trials=4))
    split = splits.make_splits(load(folder, "two"))[5]
    assert split.name == "r1f2"
    assert found.split_hash == split.digest
    at = [n for n, (_, rows) in enumerate(Recorder.seen) if np.isin(rows, split.test).any()]
    assert len(at) == 1
    assert Recorder.seen[at[0]][0] == "predict"
    assert not any(what == "fit" for what, _ in Recorder.seen[at[0] :])
    last = [rows for what, rows in Recorder.seen if what == "fit"][-1]
    assert np.array_equal(last, split.fit if recorder else split.train)


def test_tuning_chooses_by_inner_validation(folder: Path, recorder: bool) -> None:
    found = run(Key("two", "r0f0", "recorder", "tuned"), RunSettings(data=folder, trials=4))
    assert found.params == {}  # a shift can only harm: the default of trial 0 is best
    assert found.trials == 4
    made = load(folder, "two")
    split = splits.make_splits(made)[0]
    error = made.target[split.inner] - made.target[split.fit].mean()
    assert found.validation == pytest.approx(np.sqrt((error**2).mean()))


def test_no_trial_begins_when_the_budget_is_spent(folder: Path, recorder: bool) -> None:
    settings = RunSettings(data=folder, trials=4, budget_seconds=0)
    assert run(Key("two", "r0f0", "recorder", "tuned"), settings).trials == 1


def test_draws_are_fixed_and_within_their_space() -> None:
    for model, space in search_space.SPACES.items():
        assert model in models.MODELS
        assert search_space.draw(model, 0, 3) == {}
        for trial in range(1, 20):
            drawn = search_space.draw(model, trial, 3)
            assert drawn == search_space.draw(model, trial, 3)
            assert drawn.keys() == space.keys()
            for name, value in drawn.items():
                some = space[name]
                if isinstance(some, Between):
                    assert some.low <= value <= some.high
                else:
                    assert value in some.values


def test_runs_are_ordered_so_that_a_stop_leaves_them_paired(folder: Path) -> None:
    keys = due(folder, ["one", "two"], ["linear", "lightgbm"], "default", max_splits=2)
    assert [tuple(key[:3]) for key in keys] == [
        (name, split, model)
        for split in ("r0f0", "r0f1")
        for name in ("one", "two")
        for model in ("linear", "lightgbm")
    ]


def test_a_killed_benchmark_goes_on_and_repeats_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, results = RunSettings(data=folder), tmp_path / "results"
    keys = due(folder, ["one", "two"], ["linear"], "default", max_splits=2)
    with Store(results, ["linear"], "default") as store:
        assert execute(keys[:3], store, settings) == 0
    path = results / "linear.default.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while it wrote the third
    assert len(read(results)) == 2
    with Store(results, ["linear"], "default") as store:
        assert execute(keys, store, settings) == 0
    assert "4 runs, 2 of them done before" in capsys.readouterr().out
    assert path.read_bytes().startswith(whole[: whole[:-20].rfind(b"\n") + 1])
    assert [record.key for record in read(results)] == keys


def test_worker_processes_give_the_same_scores(folder: Path, tmp_path: Path) -> None:
    settings = RunSettings(data=folder)
    keys = due(folder, ["one", "two"], ["linear"], "default", max_splits=1)
    for workers in (1, 2):
        with Store(tmp_path / f"{workers}", ["linear"], "default") as store:
            assert execute(keys, store, settings, workers) == 0
    alone, several = (
        {record.key: (record.metrics, record.split_hash) for record in read(tmp_path / workers)}
        for workers in ("1", "2")
    )
    assert alone == several


def test_a_second_writer_and_a_second_run_are_refused(folder: Path, tmp_path: Path) -> None:
    record = run(Key("one", "r0f0", "linear", "default"), RunSettings(data=folder))
    with Store(tmp_path / "results", ["linear"], "default") as store:
        store.add(record)
        with pytest.raises(ValueError, match="was run before"):
            store.add(record)
        with (
            pytest.raises(BlockingIOError, match="another process writes"),
            Store(tmp_path / "results", ["linear"], "default"),
        ):
            pass


def test_a_model_that_fails_is_named_and_stops_no_other(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(setting: Setting, params: Params) -> models.Model:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(MODELS, "broken", Entry(broken, False, ()))
    keys = due(folder, ["one"], ["broken", "linear"], "default", max_splits=1)
    with Store(tmp_path / "results", ["broken", "linear"], "default") as store:
        assert execute(keys, store, RunSettings(data=folder)) == 1
    assert "one r0f0 broken default: RuntimeError: no such thing" in capsys.readouterr().err
    assert [record.model for record in read(tmp_path / "results")] == ["linear"]


# Figures


def record(set_: str, split: int, model: str, score: float, track: str = "default") -> Record:
    return Record(
        *Key(set_, f"r0f{split}", model, track),
        task="binary",
        split_hash=f"{set_}{split}",
        metrics={"auc": score, "accuracy": score / 2},
        validation=1 - score,
        params={},
        trials=1,
        fit_seconds=1.0,
        fit_process_seconds=1.0,
        predict_seconds=0.1,
        threads=1,
        device="cpu",
        versions={},
    )


MADE = ("a", "b", "c")


def made_records() -> list[Record]:
    random = np.random.default_rng(0)
    return [
        record(set_, split, model, 0.7 + 0.02 * at + 0.05 * float(random.random()))
        for set_ in ("adult", "car", "heart")
        for split in range(3)
        for at, model in enumerate(MADE)
    ]


def figures(records: Sequence[Record]) -> list[float]:
    found = Comparison.of(records, MADE)
    gains = found.differences("a", "binary")
    assert gains is not None
    return [
        *(some.primary.mean() for some in found.sets),
        *(value for rank in found.mean_ranks() for value in (rank.value, rank.low, rank.high)),
        *(value for gain in gains for value in (gain.value, gain.low, gain.high)),
        *found.win_rates(),
        *found.wins("b"),
    ]


def test_figures_depend_on_no_order_of_runs() -> None:
    records = made_records()
    shuffled = [records[at] for at in np.random.default_rng(1).permutation(len(records))]
    assert figures(shuffled) == figures(records)


def test_means_are_of_all_splits_and_each_one_moves_them() -> None:
    records = made_records()
    before = Comparison.of(records, MADE)
    wanted = [
        np.mean([r.metrics["auc"] for r in records if (r.set, r.model) == ("car", model)])
        for model in MADE
    ]
    assert before.sets[1].primary.mean(axis=0) == pytest.approx(wanted)
    for at, some in enumerate(records):
        for shift in (0.01, -0.01):
            moved = replace(some, metrics={"auc": some.metrics["auc"] + shift, "accuracy": 0.5})
            after = Comparison.of([*records[:at], moved, *records[at + 1 :]], MADE)
            place = ["adult", "car", "heart"].index(some.set), MADE.index(some.model)
            change = (
                after.sets[place[0]].primary.mean(axis=0)
                - before.sets[place[0]].primary.mean(axis=0)
            )[place[1]]
            assert change == pytest.approx(shift / 3)


def test_validation_scores_and_times_change_no_figure() -> None:
    records = made_records()
    other = [replace(some, validation=None, fit_seconds=9.0) for some in records]
    assert figures(other) == figures(records)


def test_best_of_several_runs_cannot_be_asked_for() -> None:
    records = made_records()
    better = replace(records[0], metrics={"auc": 0.99, "accuracy": 0.99})
    with pytest.raises(ValueError, match="is there twice"):
        Comparison.of([*records, better], MADE)
    assert "seed" not in Record.__dataclass_fields__


def test_a_split_that_one_model_lacks_counts_for_none() -> None:
    records = made_records()
    worst = min(
        (r for r in records if (r.set, r.model) == ("heart", "a")), key=lambda r: r.metrics["auc"]
    )
    without = [some for some in records if some is not worst]
    lacking = [some for some in records if (some.set, some.split) != (worst.set, worst.split)]
    assert figures(without) == figures(lacking)
    assert len(Comparison.of(without, MADE).sets[2].splits) == 2


def test_runs_on_other_splits_are_refused() -> None:
    records = made_records()
    records[0] = replace(records[0], split_hash="other")
    with pytest.raises(ValueError, match="two hashes"):
        Comparison.of(records, MADE)


def test_models_without_runs_or_common_splits_are_named() -> None:
    with pytest.raises(ValueError, match="d has no runs"):
        Comparison.of(made_records(), [*MADE, "d"])
    alone = record("blood", 0, "d", 0.5)
    with pytest.raises(ValueError, match="no split has runs of all of a, b, c, d"):
        Comparison.of([*made_records(), alone], [*MADE, "d"])


def test_tracks_are_models_of_their_own() -> None:
    records = [record("car", 0, "a", 0.6), record("car", 0, "a", 0.7, "tuned")]
    found = Comparison.of(records, ["a", "a tuned"])
    assert found.sets[0].primary.tolist() == [[0.6, 0.7]]


def test_sets_that_share_rows_are_never_in_one_mean() -> None:
    records = made_records()
    twice = [replace(some, set="income-1995") for some in records if some.set == "adult"]
    twice = [replace(some, split_hash=f"i{some.split}") for some in twice]
    found = Comparison.of([*records, *twice], MADE)
    assert len(found.sets) == 4
    assert [some.name for some in found.counted] == ["adult", "car", "heart"]
    assert found.ranks.tolist() == Comparison.of(records, MADE).ranks.tolist()


def test_ranks_wins_and_critical_difference_by_hand() -> None:
    scores = {"adult": (0.9, 0.8, 0.8), "car": (0.7, 0.8, 0.6)}
    records = [
        record(set_, 0, model, score)
        for set_, three in scores.items()
        for model, score in zip(MADE, three, strict=True)
    ]
    found = Comparison.of(records, MADE)
    assert found.ranks.tolist() == [[1, 2.5, 2.5], [2, 1, 3]]
    assert found.win_rates() == [0.75, 0.625, 0.125]
    assert found.wins("c") == [2.0, 1.5, 1.0]
    # q of 3 groups at 0.05 is 2.343 (Demsar 2006, table 5).
    assert found.critical_difference() == pytest.approx(2.343 * np.sqrt(12 / 12), abs=1e-3)


def test_the_mean_decides_and_not_the_best_split() -> None:
    scores = {"a": (0.9, 0.5, 0.5), "b": (0.7, 0.7, 0.7)}
    records = [
        record("car", split, model, score)
        for model, three in scores.items()
        for split, score in enumerate(three)
    ]
    found = Comparison.of(records, ["a", "b"])
    assert found.ranks.tolist() == [[2, 1]]
    assert found.win_rates() == [0, 1]
    assert found.wins("a") == [0.5, 1]
    gains = found.differences("a", "binary")
    assert gains is not None
    assert gains[1].value == pytest.approx(0.2 / 3)
    assert gains[1].low == pytest.approx(-0.2)  # the first split drawn three times
    assert gains[1].high == pytest.approx(0.2)
    assert found.mean_ranks()[0].low == 1
    assert found.mean_ranks()[0].high == 2


def test_gains_are_positive_where_a_model_is_better() -> None:
    worse = [record("car", 0, "a", 0.6), record("car", 0, "b", 0.5)]
    records = [
        *worse,
        *(replace(r, set="abalone", task="regression", metrics={"rmse": m}, split_hash="r")
          for r, m in zip(worse, (2.0, 1.5), strict=True)),
        *(replace(r, set="letter", task="multiclass", metrics={"log_loss": m}, split_hash="m")
          for r, m in zip(worse, (0.25, 0.75), strict=True)),
    ]  # fmt: skip
    found = Comparison.of(records, ["a", "b"])
    tasks: dict[Task, float] = {"binary": -0.1, "regression": 0.25, "multiclass": -0.5}
    for task, wanted in tasks.items():
        gains = found.differences("a", task)
        assert gains is not None
        assert [gain.value for gain in gains] == pytest.approx([0, wanted])
    assert loss("auc", 0.9) < loss("auc", 0.8)
    assert loss("log_loss", 0.8) < loss("log_loss", 0.9)
    assert loss("rmse", 0.8) < loss("rmse", 0.9)


def test_bootstrap_is_paired_and_covers_the_difference() -> None:
    random = np.random.default_rng(0)
    records = []
    for set_ in map(str, range(20)):
        for split in range(9):
            hard = 0.7 + 0.2 * float(random.random())  # the same for both: pairing takes it out
            records.append(record(set_, split, "a", hard))
            records.append(record(set_, split, "b", hard + 0.01))
    gains = Comparison.of(records, ["a", "b"]).differences("a", "binary")
    assert gains is not None
    assert (gains[0].low, gains[0].high) == (0, 0)
    assert gains[1].low == pytest.approx(0.01)
    assert gains[1].high == pytest.approx(0.01)


def test_bars_join_models_within_the_critical_difference() -> None:
    assert groups([1.0, 1.5, 2.4, 4.0], 1.0) == [(0, 1), (1, 2)]
    assert groups([1.0, 1.1, 1.2], 1.0) == [(0, 2)]
    assert groups([1.0, 3.0], 1.0) == []


def test_report_names_every_model_and_set(tmp_path: Path) -> None:
    write(Comparison.of(made_records(), MADE), ["a"], tmp_path)
    page = (tmp_path / "tabular.md").read_text()
    assert "## Gain over a" in page
    for name in (*MADE, "adult", "car", "heart"):
        assert f"| {name} |" in page
    assert "<svg" in (tmp_path / "tabular_critical_difference.svg").read_text()
    rows = pd.read_csv(tmp_path / "tabular.csv")
    assert len(rows) == 3 * 2 * 3
