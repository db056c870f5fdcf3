"""Tuning: what is tried follows from the seed, no kill loses a trial, no test sample is read."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException

from hashtab.features.dataset import Dataset
from hashtab.pipelines import tune
from hashtab.pipelines.checkpoints import Epoch, Progress
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, flatten, parse
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.search_space import SearchSpace, with_values
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.training import Training, check, train
from hashtab.pipelines.tune_driver import Followed
from hashtab.pipelines.tune_tracking import TuneTracking
from hashtab.pipelines.tuning import (
    FINISHED,
    STOPPED_EARLY,
    Trial,
    TuneSettings,
    Tuning,
    TuningError,
)
from tests.pipelines.conftest import SMALL_MODEL, SMALL_OPTIMISER, environment_outside_ray

pytestmark = [
    # Ray and MLflow use deprecated names of others, and leave sockets to the end of the process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "tune.py"
SPACE = SearchSpace(
    learning_rate=(5e-3, 3e-2),
    embedding_learning_rate=(2e-2, 1e-1),
    embedding_size=(4, 8),
    tau=(2, 3),
    groups=(4, 8),
)


@pytest.fixture
def chosen(settings: TrainSettings) -> TuneSettings:
    """A tuning of seconds."""
    return TuneSettings(
        data=settings.data,
        space=SPACE,
        model=settings.model,
        optimiser=settings.optimiser,
        trials=3,
        storage=settings.storage,
        tracking_uri=settings.tracking_uri,
        experiment=Path(settings.storage).parent.name,
    )


@pytest.fixture
def tuning(chosen: TuneSettings, dataset: Dataset) -> Tuning:
    """A tuning that was begun, its settings asking to go on with it."""
    found = Tuning.find(replace(chosen, resume=True), dataset.manifest)
    found.folder.mkdir(parents=True)
    found.begin(dataset.manifest)
    return found


def epochs(*gaucs: float) -> list[Epoch]:
    return [
        Epoch(number=n, loss=0.5, seconds=1.0, samples_per_s=9.0, validation={"gauc": gauc})
        for n, gauc in enumerate(gaucs, start=1)
    ]


def finish(trial: Trial, dataset: Dataset, *gaucs: float) -> None:
    """Let a trial have ended with these validation gAUCs."""
    trial.run.begin(dataset.manifest)
    trial.finish(epochs(*gaucs), 3.0)


def as_options(settings: TuneSettings) -> list[str]:
    plain = {name: value for name, value in flatten(settings).items() if name != "resume"}
    return [f"--{name}={'null' if value is None else value}" for name, value in plain.items()]


def alone(trial: Trial, data: str, checkpoint: Path) -> Progress:
    """Train a trial in this process, uninterrupted and on other data."""
    training = Training(trial.run.settings, Dataset.open(data), checkpoint, Ranks())
    return train(training, lambda *_: None)[1]


def test_a_seed_decides_the_trials_and_more_of_them_begin_alike() -> None:
    first = SPACE.draw("sdim", 20, seed=0)
    assert SPACE.draw("sdim", 20, seed=0) == first
    assert SPACE.draw("sdim", 7, seed=0) == first[:7]
    assert SPACE.draw("sdim", 20, seed=1) != first
    narrower = replace(SPACE, tau=()).draw("sdim", 20, seed=0)
    assert [trial["learning_rate"] for trial in narrower] == [t["learning_rate"] for t in first]


def test_values_lie_in_their_ranges_and_no_trial_comes_twice() -> None:
    drawn = SPACE.draw("sdim", 200, seed=0)
    assert all(5e-3 <= values["learning_rate"] <= 3e-2 for values in drawn)
    assert all(0 <= values["dropout"] <= 0.3 for values in drawn)
    assert {values["tau"] for values in drawn} == {2, 3}
    middle = (5e-3 * 3e-2) ** 0.5
    below = sum(values["learning_rate"] < middle for values in drawn)
    assert 70 < below < 130
    choices = SearchSpace(learning_rate=(), embedding_learning_rate=(), dropout=())
    every = choices.draw("sdim", 27, seed=0)
    assert len({tuple(values.values()) for values in every}) == 27


@pytest.mark.parametrize(
    ("encoder", "searched"),
    [
        ("sdim", {"tau", "groups"}),
        ("sdim_long_short", {"tau", "groups", "window"}),
        ("din", {"window"}),
        ("target_attention", {"window"}),
        ("mean", set()),
        ("none", set()),
    ],
)
def test_what_an_encoder_does_not_read_is_not_searched(encoder: str, searched: set[str]) -> None:
    always = {"learning_rate", "embedding_learning_rate", "embedding_size", "dropout"}
    assert set(SearchSpace().searched(encoder)) == always | searched
    assert "dropout" not in SearchSpace(dropout=()).searched(encoder)


def test_groups_become_planes_and_what_is_not_searched_stays(settings: TrainSettings) -> None:
    changed = with_values(settings, {"tau": 5, "groups": 4, "learning_rate": 0.01})
    assert (changed.model.tau, changed.model.planes) == (5, 20)
    assert changed.optimiser == replace(settings.optimiser, learning_rate=0.01)
    kept = with_values(settings, {"tau": 5})
    assert kept.model == replace(settings.model, tau=5, planes=5 * (12 // 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space.learning_rate=[1e-2,1e-3]"], "the lowest and the highest value"),
        (["--space.learning_rate=[1e-2]"], "the lowest and the highest value"),
        (["--space.learning_rate=[0,1e-3]"], "space.learning_rate must be positive"),
        (["--space.dropout=[0.5,1]"], "space.dropout must be in [0, 1)"),
        (["--space.tau=[3,17]"], "space.tau must be at most 16"),
        (["--space.window=[0]"], "space.window must be positive"),
        (["--space.tau=[3,3]"], "space.tau names a value twice"),
        (["--space.tua=[3]"], "did you mean --space.tau?"),
        ([f"--space.{name}=[]" for name in flatten(SPACE)], "nothing to search"),
        (
            [f"--space.{name}=[]" for name in flatten(SPACE) if name != "tau"],
            "16 trials are asked for, the space has 3",
        ),
        (["--trials=0"], "trials must be positive, got 0"),
        (["--workers=0"], "workers must be positive, got 0"),
        (["--run_name=a/b"], "run_name must be the name of a folder"),
        (["--data=nowhere"], "nowhere holds no finished data set"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tune.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_used_is_said_before_any_trial(
    chosen: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuning, "tried", True)  # no cluster is needed to find out
    with pytest.raises(SettingsError, match="MLflow cannot use bogus://there"):
        tune.tune(replace(chosen, tracking_uri="bogus://there"))
    assert not Path(chosen.storage).exists()


def test_the_script_runs_from_anywhere_and_help_names_every_setting(tmp_path: Path) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(
        [str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for name in flatten(TuneSettings()):
        assert f"--{name}" in done.stdout


def test_a_name_stands_for_one_tuning_only(
    chosen: TuneSettings, dataset: Dataset, other_likes: Path
) -> None:
    others = [
        replace(chosen, seed=1),
        replace(chosen, trials=4),
        replace(chosen, space=replace(SPACE, tau=(3,))),
        replace(chosen, optimiser=replace(chosen.optimiser, epochs=5)),
        replace(chosen, data=str(other_likes)),
    ]
    found = [Tuning.find(s, Dataset.open(s.data).manifest).name for s in [chosen, *others]]
    assert len(set(found)) == 6
    elsewhere = replace(chosen, workers=7, address="auto", experiment="other")
    assert Tuning.find(elsewhere, dataset.manifest).name == found[0]

    named = replace(chosen, run_name="mine")
    Tuning.find(named, dataset.manifest).begin(dataset.manifest)
    with pytest.raises(SettingsError, match=r"trials was 3, now 4.*or another --run_name"):
        tune.tune(replace(named, trials=4, resume=True))


def test_a_tuning_is_neither_begun_twice_nor_resumed_unbegun(
    chosen: TuneSettings, tuning: Tuning
) -> None:
    with pytest.raises(SettingsError, match=r"begun before.*--resume to go on.*--run_name or"):
        tune.tune(chosen)
    with pytest.raises(SettingsError, match="nothing to resume"):
        tune.tune(replace(chosen, seed=5, resume=True))


def test_the_best_settings_are_a_file_that_the_training_takes(
    tuning: Tuning, dataset: Dataset
) -> None:
    for trial, gauc in zip(tuning.trials, (0.6, 0.7, 0.65), strict=True):
        finish(trial, dataset, gauc)
    tuning.conclude({})
    assert set(yaml.safe_load(tuning.best_settings.read_text())) == {"data", "model", "optimiser"}
    found = parse(TrainSettings, ["--config", str(tuning.best_settings)], None)
    best = tuning.trials[1].run.settings
    assert (found.model, found.optimiser) == (best.model, best.optimiser)
    assert Dataset.open(found.data).manifest.digest == dataset.manifest.digest
    check(found, dataset)


def test_of_equal_trials_the_first_is_the_best_and_no_number_is_the_worst(
    tuning: Tuning, dataset: Dataset
) -> None:
    first, second, third = tuning.trials
    finish(first, dataset, float("nan"), 0.1, float("nan"))
    finish(second, dataset, 0.7, 0.5, 0.5, 0.5)
    finish(third, dataset, 0.2, 0.7)
    assert [trial.name for trial in tuning.ranking] == ["trial-02", "trial-03", "trial-01"]
    assert [trial.state for trial in tuning.ranking] == [FINISHED, STOPPED_EARLY, STOPPED_EARLY]
    assert [trial.run.result.best_epoch for trial in tuning.ranking] == [1, 2, 2]


def test_when_all_fail_the_first_reason_is_the_error(tuning: Tuning) -> None:
    with pytest.raises(TuningError, match=r"all 2 trials failed, trial-01 so: no luck; .*--resume"):
        tuning.conclude({"trial-02": "other", "trial-01": "no luck"})
    assert not tuning.best_settings.exists()


def test_each_trial_is_a_run_within_that_of_the_tuning(tuning: Tuning, dataset: Dataset) -> None:
    tracking = TuneTracking(tuning.settings.tracking_uri, tuning.settings.experiment)
    first, second, third = tuning.trials
    with suppress(KeyboardInterrupt), Followed(tuning, dataset.manifest, tracking) as followed:
        followed.begin(first.name)
        followed.add_epoch(first.name, epochs(0.6)[0], 1.0)
        raise KeyboardInterrupt
    client = mlflow.MlflowClient(tuning.settings.tracking_uri)
    for run in (tuning, first.run):
        assert client.get_run(str(run.tracked_as)).info.status == "KILLED"
    finish(second, dataset, 0.5, 0.7, 0.6, 0.6)  # and was killed before MLflow heard of it
    with Followed(tuning, dataset.manifest, tracking) as followed:
        followed.begin(first.name)
        for epoch in epochs(0.6, 0.65):
            followed.add_epoch(first.name, epoch, 2.0)
        followed.end(first.name, None)
        followed.begin(third.name)
        followed.end(third.name, "no luck")
        followed.conclude()
    assert followed.failures == {third.name: "no luck"}
    assert not tuning.published  # so that --resume tries the third again

    whole = client.get_run(str(tuning.tracked_as))
    assert whole.info.status == "FINISHED"
    assert whole.data.params["space.tau"] == "[2, 3]"
    assert whole.data.params["data_digest"] == dataset.manifest.digest
    assert whole.data.metrics["best/validation/gauc"] == 0.7
    assert {item.path for item in client.list_artifacts(whole.info.run_id)} == {
        "best.yaml",
        "plots",
    }
    assert {path.name for path in tuning.plots.iterdir()} == {
        "searched_settings.png",
        "learning_curves.png",
    }
    states = {}
    for run in client.search_runs([whole.info.experiment_id]):
        if run.info.run_id != whole.info.run_id:
            assert run.data.tags["mlflow.parentRunId"] == whole.info.run_id
            states[run.info.run_name] = (run.info.status, run.data.tags["state"])
    assert states == {
        first.name: ("FINISHED", STOPPED_EARLY),
        second.name: ("FINISHED", FINISHED),
        third.name: ("FAILED", "failed"),
    }
    for trial, steps in ((first, [1, 2]), (second, [1, 2, 3, 4])):
        history = client.get_metric_history(str(trial.run.tracked_as), "validation/gauc")
        assert [metric.step for metric in history] == steps
    assert client.get_run(str(first.run.tracked_as)).data.params["model.tau"] == str(
        first.values["tau"]
    )


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    with cluster(2, None):
        yield


@dataclass(frozen=True)
class Resumed:
    """A tuning whose driver was killed, after it went on.

    Args:
        settings: of the tuning.
        tuning: at its end.
        begun_as: MLflow runs of the tuning and of a trial that was under way when it was killed.
        going: that trial's name.
        out: what was printed in the end.
        err: what was said of progress.
    """

    settings: TuneSettings
    tuning: Tuning
    begun_as: tuple[str | None, str | None]
    going: str
    out: str
    err: str


@pytest.fixture(scope="module")
def resumed(
    two_workers: None, likes: Path, database: str, tmp_path_factory: pytest.TempPathFactory
) -> Resumed:
    """On a data set with noise in the place of its test samples."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(likes, folder / "likes")
    for file in (folder / "likes" / "samples" / "test").iterdir():
        file.write_bytes(os.urandom(file.stat().st_size))
    settings = TuneSettings(
        data=str(folder / "likes"),
        space=SPACE,
        model=SMALL_MODEL,
        optimiser=SMALL_OPTIMISER,
        trials=3,
        storage=str(folder / "runs"),
        tracking_uri=database,
        experiment="killed",
    )
    tuning = Tuning.find(settings, Dataset.open(settings.data).manifest)
    going = kill_when_under_way(settings, tuning)
    begun_as = (tuning.tracked_as, going.run.tracked_as)
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert tune.main([*as_options(settings), "--resume"]) == 0
    return Resumed(settings, tuning, begun_as, going.name, out.getvalue(), err.getvalue())


def kill_when_under_way(settings: TuneSettings, tuning: Tuning) -> Trial:
    """Start the script, kill it once a trial has a checkpoint, and return that trial."""
    environment = environment_outside_ray()
    command = [sys.executable, str(SCRIPT), *as_options(settings)]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (going := [t for t in tuning.trials if t.run.checkpoint.exists()]):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert not tuning.tried
    return going[0]


@pytest.mark.ray
def test_a_tuning_finds_good_settings_without_the_test_split(resumed: Resumed) -> None:
    with pytest.raises(ValueError, match="Not an Arrow file"):
        next(Dataset.open(resumed.settings.data).batches("test"))
    assert resumed.tuning.published
    assert resumed.tuning.ranking[0].best.gauc > 0.65


@pytest.mark.ray
def test_a_killed_tuning_goes_on_from_its_checkpoints_to_the_same_bits(
    resumed: Resumed, likes: Path, tmp_path: Path
) -> None:
    assert f"{resumed.going} of 3  goes on from its checkpoint" in resumed.err
    for trial in resumed.tuning.trials:
        whole = alone(trial, str(likes), tmp_path / f"{trial.name}.pt").epochs
        kept = trial.run.result.epochs
        assert [e.validation for e in kept] == [e.validation for e in whole[: len(kept)]]


@pytest.mark.ray
def test_a_killed_tuning_goes_on_in_the_same_runs(resumed: Resumed) -> None:
    (trial,) = [trial for trial in resumed.tuning.trials if trial.name == resumed.going]
    assert (resumed.tuning.tracked_as, trial.run.tracked_as) == resumed.begun_as
    client = mlflow.MlflowClient(resumed.settings.tracking_uri)
    history = client.get_metric_history(str(trial.run.tracked_as), "train/loss")
    steps = [epoch.number for epoch in trial.run.result.epochs]
    assert [metric.step for metric in history] == steps


@pytest.mark.ray
def test_the_summary_shows_trials_places_and_what_to_do_next(resumed: Resumed) -> None:
    for wanted in ("val gAUC", "trial-03", "best.yaml", "mlflow ui", "train_sdim.py --config"):
        assert wanted in resumed.out
    assert not list(resumed.tuning.folder.rglob("*.pt"))
    assert not (resumed.tuning.folder / "ray").exists()
    again = tune.tune(replace(resumed.settings, resume=True))
    assert tune.summary(*again) + "\n" == resumed.out


@pytest.mark.ray
def test_a_resumed_tuning_knows_its_trials_and_lists_those_that_fail(
    two_workers: None, tuning: Tuning, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = tuning.trials
    finish(first, dataset, 0.99)
    before = (first.run.folder / "result.json").read_bytes()
    second.run.folder.mkdir(parents=True)
    second.run.checkpoint.write_bytes(b"damaged")
    found, failures = tune.tune(tuning.chosen)
    assert (first.run.folder / "result.json").read_bytes() == before
    assert "cannot be read" in failures[second.name]
    assert "\n" not in failures[second.name]
    assert third.state == STOPPED_EARLY
    assert len(third.run.result.epochs) == 1
    text = tune.summary(found, failures)
    assert [trial.name for trial in found.ranking] == [first.name, third.name]
    assert f"{second.name} failed: CheckpointError" in text


def test_a_server_lost_meanwhile_stops_no_trial_and_learns_all_by_resuming(
    tuning: Tuning,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracking = TuneTracking(tuning.settings.tracking_uri, tuning.settings.experiment)

    def away(*_: object, **__: object) -> None:
        raise MlflowException("the server is gone")

    first, second, third = tuning.trials
    with Followed(tuning, dataset.manifest, tracking) as followed, monkeypatch.context() as patch:
        for call in ("create_run", "log_batch", "log_artifacts", "set_terminated", "get_run"):
            patch.setattr(mlflow.MlflowClient, call, away)
        for trial in (first, second, third):
            followed.begin(trial.name)
            for epoch in epochs(0.6, 0.65):
                followed.add_epoch(trial.name, epoch, 2.0)
            followed.end(trial.name, None)
        followed.conclude()
    assert capsys.readouterr().err.count("the server is gone; ") == 1
    assert tuning.best_settings.exists()
    assert not tuning.published
    with Followed(tuning, dataset.manifest, tracking) as followed:
        followed.conclude()
    assert tuning.published
    client = mlflow.MlflowClient(tuning.settings.tracking_uri)
    for trial in (first, second, third):
        run = client.get_run(str(trial.run.tracked_as))
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "validation/gauc")
        assert [metric.step for metric in history] == [1, 2]
