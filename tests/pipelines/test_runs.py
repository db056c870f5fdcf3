"""A run goes on when it is asked to, and never otherwise."""

import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hashtab.features.dataset import Dataset
from hashtab.pipelines import train_sdim
from hashtab.pipelines.command_line import SettingsError, flatten
from hashtab.pipelines.events import Tail
from hashtab.pipelines.runs import Run
from hashtab.pipelines.settings import TrainSettings


@pytest.fixture
def run(settings: TrainSettings, dataset: Dataset) -> Run:
    """A run that was begun."""
    run = Run.find_or_resume(settings, dataset.manifest)
    run.folder.mkdir(parents=True)
    run.begin(dataset.manifest)
    return run


def test_an_old_run_is_not_continued_unasked(run: Run) -> None:
    with pytest.raises(SettingsError, match=r"begun before.*--resume.*--run_name or --seed"):
        train_sdim.train(run.settings)
    assert not run.checkpoint.exists()


def test_there_must_be_something_to_resume(settings: TrainSettings) -> None:
    with pytest.raises(SettingsError, match="nothing to resume"):
        train_sdim.train(replace(settings, resume=True))


def test_a_name_stands_for_one_training_only(
    settings: TrainSettings, dataset: Dataset, other_likes: Path
) -> None:
    named = replace(settings, run_name="mine")
    run = Run.find_or_resume(named, dataset.manifest)
    run.folder.mkdir(parents=True)
    run.begin(dataset.manifest)
    again = replace(named, resume=True)
    with pytest.raises(SettingsError, match="seed was 0, now 1"):
        train_sdim.train(replace(again, seed=1))
    with pytest.raises(SettingsError, match="data digest was"):
        train_sdim.train(replace(again, data=str(other_likes)))
    with pytest.raises(SettingsError, match=r"optimiser.epochs was 4, now 5"):
        train_sdim.train(replace(again, optimiser=replace(named.optimiser, epochs=5)))


def test_names_differ_where_results_would(
    settings: TrainSettings, dataset: Dataset, other_likes: Path
) -> None:
    def name(settings: TrainSettings) -> str:
        return Run.find_or_resume(settings, Dataset.open(settings.data).manifest).name

    same = [settings, replace(settings, workers=4, threads=2, checkpoint_every=9)]
    assert len({name(s) for s in same}) == 1
    model = replace(settings.model, tau=2)
    others = [
        replace(settings, seed=1),
        replace(settings, model=model),
        replace(settings, data=str(other_likes)),
    ]
    assert len({name(s) for s in [settings, *others]}) == 4


def _hold(run: Run, held: "multiprocessing.synchronize.Event") -> None:
    with run.locked():
        held.set()
        multiprocessing.Event().wait()


def test_two_drivers_do_not_train_one_run(run: Run) -> None:
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    other = spawn.Process(target=_hold, args=(run, held))
    other.start()
    assert held.wait(60)
    with pytest.raises(SettingsError, match="another process is training"), run.locked():
        pass
    other.kill()
    other.join()
    with run.locked():
        pass


def test_ctrl_c_stops_a_training_in_this_process_at_once(
    settings: TrainSettings, dataset: Dataset
) -> None:
    endless = replace(settings, optimiser=replace(settings.optimiser, epochs=1000, patience=1000))
    run = Run.find_or_resume(endless, dataset.manifest)
    options = [
        f"--{name}={'null' if value is None else value}"
        for name, value in flatten(endless).items()
        if not isinstance(value, bool)
    ]
    script = Path(train_sdim.__file__)
    driver = subprocess.Popen([sys.executable, script, *options], stderr=subprocess.PIPE, text=True)
    while not run.checkpoint.exists():
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert said.splitlines()[-1].startswith("stopped; the same command with --resume goes on")


def test_a_tail_reads_whole_lines_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"n": 0}\n')
    tail = Tail(path)
    assert tail.read() == []
    with path.open("a") as file:
        file.write('{"n": 1}\n{"n": 2}\n{"n"')
    assert [record["n"] for record in tail.read()] == [1, 2]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert [record["n"] for record in tail.read()] == [3]
