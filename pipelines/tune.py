#!/usr/bin/env python3
"""Search the settings of a click model with Ray Tune, on validation only, tracked in MLflow.

`python pipelines/tune.py` tunes SDIM on data/complete_journey; `--trials 32` tries more,
`--space.tau [5,8] --space.dropout []` narrows what is searched, `--resume` goes on with a tuning
that was stopped. All settings may stand in a YAML file, `--config my.yaml`. The best settings are
written as a YAML file that train_sdim.py takes. `python pipelines/tune.py tabnsa` tunes TabNSA on a
table instead, and has options of its own (`tune.py tabnsa --help`).
"""

import sys
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError, disk_errors
from hashtab.pipelines import tune_table
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.leave import STOPPED, leave
from hashtab.pipelines.places import python_script, shown
from hashtab.pipelines.report import next_commands, table
from hashtab.pipelines.training import check
from hashtab.pipelines.tune_driver import run_tuning
from hashtab.pipelines.tune_tracking import TuneTracking
from hashtab.pipelines.tuning import FAILED, Trial, TuneSettings, Tuning, TuningError

TABLES = "tabnsa"  # first word of a tuning on a table


def tune(settings: TuneSettings) -> tuple[Tuning, dict[str, str]]:
    """Run one tuning to its end.

    Returns:
        The tuning, and name of a trial that failed -> why.

    Raises:
        SettingsError: if the tuning was begun before and is not to be resumed, its settings or
            data are not those it was begun with, the data cannot serve a trial, or the cluster or
            the tracking store is not there.
        DataError: if the data is not a finished data set, or the disk is full.
        TuningError: if all trials failed.
    """
    dataset = Dataset.open(settings.data)
    tuning = Tuning.find(settings, dataset.manifest)
    for trial in tuning.trials:
        check(trial.run.settings, dataset)
    tuning.check_resume()
    if tuning.published:
        return tuning, {}
    cores = 0 if tuning.tried else settings.workers
    with disk_errors(tuning.folder), cluster(cores, settings.address):
        tracking = TuneTracking(settings.tracking_uri, settings.experiment)
        return tuning, run_tuning(tuning, dataset.manifest, tracking)


def trials_table(tuning: Tuning, failures: Mapping[str, str]) -> str:
    """Return the table of all trials, the best validation gAUC first, those that failed last."""
    ranking = tuning.ranking
    failed = [trial for trial in tuning.trials if trial.name in failures]
    searched = list(ranking[0].values)
    rows = [[trial.name, trial.state, *_found(trial)] for trial in ranking]
    rows += [[trial.name, FAILED, "-", "-", "-", "-"] for trial in failed]
    values = [[str(trial.values[name]) for name in searched] for trial in (*ranking, *failed)]
    header = ["trial", "state", "epochs", "best", "val gAUC", "seconds", *searched]
    return table(header, [row + shown for row, shown in zip(rows, values, strict=True)])


def _found(trial: Trial) -> list[str]:
    result = trial.run.result
    gauc = f"{trial.best.gauc:.4f}"
    return [str(len(result.epochs)), str(result.best_epoch), gauc, f"{result.seconds:.0f}"]


def summary(tuning: Tuning, failures: Mapping[str, str]) -> str:
    """Return a tuning's table, where everything lies, and what to do next."""
    failed = [f"{name} failed: {reason}" for name, reason in sorted(failures.items())]
    train = f"{python_script('train_sdim.py')} --config {shown(tuning.best_settings)}"
    return "\n".join(
        [
            "",
            trials_table(tuning, failures),
            "",
            *([*failed, "--resume tries them again", ""] if failed else []),
            f"best   {shown(tuning.best_settings)}",
            f"trials {shown(tuning.folder / 'trials')}",
            f"plots  {shown(tuning.plots)}",
            f"MLflow {tuning.tracked_in}, run {tuning.tracked_as}",
            "",
            *next_commands(tuning.tracked_in),
            "  train with the best settings, and read the test split for the first time:",
            f"    {train} --seed {tuning.settings.seed}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, tune, report; bad settings and data end with one line and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == [TABLES]:
        return tune_table.main(given[1:])
    try:
        tuning, failures = tune(parse(TuneSettings, arguments, __doc__))
    except (SettingsError, DataError, TuningError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped; the same command with --resume goes on: trials that ended are kept, "
            "those under way go on from their last checkpoints",
            file=sys.stderr,
        )
        return STOPPED
    print(summary(tuning, failures))
    return 0


if __name__ == "__main__":
    leave(main())
