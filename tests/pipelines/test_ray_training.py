"""Trainings on Ray's workers: exact with several, and none the worse for kills."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines import demo, train_sdim
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import flatten
from hashtab.pipelines.evaluation import predict
from hashtab.pipelines.ranks import Ranks
from hashtab.pipelines.runs import Run
from hashtab.pipelines.saved_model import load_model
from hashtab.pipelines.settings import TrainSettings, identity
from tests.pipelines.conftest import environment_outside_ray

pytestmark = [
    pytest.mark.ray,
    # Ray and MLflow use deprecated names of others, and leave sockets to the end of the process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning"),
]

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "train_sdim.py"
WITHIN = 0.002  # gAUC that a resumed training may differ by
EPOCHS = 10
PATIENCE_S = 120


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    with cluster(2, None):
        yield


@pytest.fixture
def long(settings: TrainSettings) -> TrainSettings:
    """A training that goes on for seconds, time enough to kill someone."""
    optimiser = replace(settings.optimiser, epochs=EPOCHS, patience=EPOCHS)
    return replace(settings, optimiser=optimiser, checkpoint_every=5)


def wait_for(what: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """Wait without a limit of its own: how long a training takes to start is the machine's."""
    while not what():
        assert not ended()
        time.sleep(0.05)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    children = driver.children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def starts(run: Run) -> list[int]:
    """Steps at which the training was started or went on."""
    events = map(json.loads, run.log.read_text().splitlines())
    return [event["step"] for event in events if event["event"] == "start"]


def uninterrupted(settings: TrainSettings, storage: Path) -> Run:
    """The same training alone in this process."""
    here = replace(settings, workers=0, resume=False, storage=str(storage), experiment="here")
    return train_sdim.train(here)


@pytest.mark.timeout(900)  # workers start twice, which a busy machine takes minutes for
def test_two_workers_lose_one_and_still_end_as_one_does(
    long: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    long = replace(long, model=replace(long.model, dropout=0.0), workers=2)
    run = Run.find_or_resume(long, dataset.manifest)

    with ThreadPoolExecutor() as pool:
        training = pool.submit(train_sdim.train, long)
        wait_for(run.checkpoint.exists, training.done)
        workers_of(psutil.Process())[-1].kill()
    training.result()
    first, *later = starts(run)
    assert first == 0
    assert later
    assert all(step > 0 for step in later)

    found = predict(load_model(run.model), dataset, "test", long.optimiser, Ranks())
    assert found is not None
    metrics = found.metrics()
    assert run.result.metrics["test"] == pytest.approx(metrics, abs=1e-6)
    alone = uninterrupted(long, tmp_path / "alone").result
    assert metrics["gauc"] == pytest.approx(alone.metrics["test"]["gauc"], abs=WITHIN)
    assert len(run.result.epochs) == len(alone.epochs) == EPOCHS


def test_a_killed_driver_resumes_to_the_same_metrics(
    long: TrainSettings, dataset: Dataset, tmp_path: Path
) -> None:
    long = replace(long, workers=1)
    run = Run.find_or_resume(long, dataset.manifest)
    options = [f"--{name}={value}" for name, value in _options(long).items()]
    environment = environment_outside_ray()
    driver = subprocess.Popen([sys.executable, str(SCRIPT), *options], env=environment)
    wait_for(run.checkpoint.exists, lambda: driver.poll() is not None)
    workers = workers_of(psutil.Process(driver.pid))
    driver.kill()
    driver.wait()
    assert not run.finished
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not alive

    # In this process, which saves Ray's start: where a training runs does not decide its result.
    resumed = train_sdim.train(replace(long, resume=True, workers=0)).result
    assert starts(run)[-1] > 0
    alone = uninterrupted(long, tmp_path / "alone").result
    for split in ("validation", "test"):
        ours, theirs = resumed.metrics[split]["gauc"], alone.metrics[split]["gauc"]
        assert ours == pytest.approx(theirs, abs=WITHIN)


def _options(settings: TrainSettings) -> dict[str, object]:
    options = {k: v for k, v in flatten(settings).items() if not isinstance(v, bool)}
    return {name: "null" if value is None else value for name, value in options.items()}


def test_the_demo_compares_all_rivals_and_reuses_them(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        f"{part}.{name}": value
        for part in ("model", "optimiser")
        for name, value in _options(settings).items()
        if name.startswith(f"{part}.")
        for name in [name.removeprefix(f"{part}.")]
    }
    places = {name: getattr(settings, name) for name in ("data", "storage", "tracking_uri")}
    arguments = [f"--{name}={value}" for name, value in {**small, **places}.items()]
    assert demo.main(arguments) == 0
    out = capsys.readouterr().out
    for name in ("count rule", "no history + counters", "mean pooling", "SDIM", "SDIM + counters"):
        assert name in out
    for wanted in ("val gAUC", "test log loss", "seconds", "mlflow ui", "prepare.py --schema"):
        assert wanted in out
    storage = Path(settings.storage)
    assert {path.name for path in (storage / "rivals").iterdir()} == {
        "rivals.png",
        "gauc_by_history.png",
    }

    began = time.monotonic()
    assert demo.main(arguments) == 0
    again = capsys.readouterr()
    assert _table(again.out)[1:] == _table(out)[1:]
    assert again.err.count("trained before, reused") == 4
    assert time.monotonic() - began < 5


def _table(out: str) -> list[str]:
    """The table's rows of trained rivals."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    return lines[rule + 1 : rule + 6]


def test_identity_leaves_out_where_a_training_runs(settings: TrainSettings) -> None:
    elsewhere = replace(settings, workers=4, threads=3, gpu=True, address="auto", max_failures=9)
    assert identity(elsewhere, "d") == identity(settings, "d")
