"""Search the settings of TabNSA on a table, on rows held out of training, tracked in MLflow.

`python pipelines/tune.py tabnsa --data.file churn.csv --data.target churned` tries 16 trainings,
two at a time; `--space.width [16,32] --space.dropout []` narrows what is searched, `--resume` goes
on with a tuning that was stopped. The best settings are written as a YAML file that train_tabnsa.py
takes. The rows that train_tabnsa.py tests on are never read.
"""

import sys

from hashtab.features.errors import DataError, disk_errors
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, flatten, parse
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.places import python_script, shown
from hashtab.pipelines.report import next_commands, table
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.pipelines.table_data import load
from hashtab.pipelines.table_tuning import (
    TableTrial,
    TableTuneSettings,
    TableTuning,
    Try,
    forget_failures,
    part,
    tuning_identity,
)
from hashtab.pipelines.tracking import TrackedRun, Tracking
from hashtab.pipelines.tune_plots import Tried, searched_settings
from hashtab.pipelines.tuning import TuningError


def tune(chosen: TableTuneSettings) -> TableTuning:
    """Run one tuning to its end and return it.

    Raises:
        SettingsError: if the tuning was begun before and is not to be resumed, or the cluster or
            the tracking store is not there.
        DataError: if the table cannot be used.
        TuningError: if all trials failed.
    """
    data = load(chosen.data, chosen.seed)
    part(data, chosen.seed)  # what would fail every trial fails here
    tuning = TableTuning.find(chosen, data)
    tuning.check_resume()
    if tuning.published:
        return tuning
    with tuning.locked(), disk_errors(tuning.folder):
        tuning.make(tuning_identity(chosen, data))
        tracking = Tracking(chosen.tracking_uri, chosen.experiment)
        tracked = tracking.begin(tuning, data.digest)
        try:
            trials = tuning.trials
            forget_failures(trials)
            _try(chosen, trials)
            tuning.conclude()
            _draw(tuning)
            _tell(tuning, tracking, tracked, data.digest)
        except BaseException as error:
            tracked.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        if len(tuning.ranking) == len(trials):
            tuning.publish()
    return tuning


def _try(chosen: TableTuneSettings, trials: list[TableTrial]) -> None:
    left = [number for number, trial in enumerate(trials) if not trial.finished]
    if left:
        with cluster(chosen.workers, chosen.address):
            run_shards(Try(tuple(trials)), left, chosen.workers)


def _draw(tuning: TableTuning) -> None:
    tuning.plots.mkdir(parents=True, exist_ok=True)
    ranking = [Tried(t.name, t.values, t.state, t.result.loss or 0.0) for t in tuning.ranking]
    path = tuning.plots / "searched_settings.png"
    searched_settings(ranking, "validation loss", tuning.chosen.space.logarithmic, path)


def _tell(tuning: TableTuning, tracking: Tracking, tracked: TrackedRun, digest: str) -> None:
    """Tell MLflow of each trial, in a run within that of the tuning, and of the best one."""
    for trial in tuning.trials:
        if not trial.published:
            trial.make({"tuning": tuning.name})
            result = trial.result
            found = {f"best/validation/{name}": v for name, v in result.metrics.items()}
            found |= {} if result.loss is None else {"best/validation/loss": result.loss}
            tags = {"mlflow.parentRunId": tracked.run_id, "state": trial.state}
            told = tracking.begin(trial, digest)
            told.add_tags(tags | ({"failure": result.failure} if result.failure else {}))
            told.finish(found | {"seconds": result.seconds, "epochs": result.epochs}, 0, ())
            trial.publish()
    best = tuning.ranking[0]
    space = {f"space.{name}": values for name, values in flatten(tuning.chosen.space).items()}
    tracked.add_params({"trials": tuning.chosen.trials, **space})
    tracked.add_tags({"best_trial": best.name})
    found = {f"best/validation/{name}": v for name, v in best.result.metrics.items()}
    found |= {"best/validation/loss": best.result.loss or 0.0}
    tracked.finish(found, 0, (tuning.plots, tuning.best_settings))


def trials_table(tuning: TableTuning) -> str:
    """Return the table of all trials, the lowest validation loss first, those that failed last."""
    failed = [trial for trial in tuning.trials if trial.result.loss is None]
    searched = list(tuning.trials[0].values)
    rows = []
    for trial in (*tuning.ranking, *failed):
        result = trial.result
        loss = "-" if result.loss is None else f"{result.loss:.4g}"
        values = [str(trial.values[name]) for name in searched]
        row = [trial.name, trial.state, str(result.epochs), loss, f"{result.seconds:.0f}"]
        rows.append([*row, *values])
    return table(["trial", "state", "epochs", "val loss", "seconds", *searched], rows)


def summary(tuning: TableTuning) -> str:
    """Return a tuning's table, where everything lies, and what to do next."""
    failed = [t for t in tuning.trials if t.result.failure is not None]
    reasons = [f"{trial.name} failed: {trial.result.failure}" for trial in failed]
    train = f"{python_script('train_tabnsa.py')} --config {shown(tuning.best_settings)}"
    return "\n".join(
        [
            "",
            trials_table(tuning),
            "",
            *([*reasons, "--resume tries them again", ""] if failed else []),
            f"best   {shown(tuning.best_settings)}",
            f"trials {shown(tuning.folder / 'trials')}",
            f"plots  {shown(tuning.plots)}",
            f"MLflow {tuning.tracked_in}, run {tuning.tracked_as}",
            "",
            *next_commands(tuning.tracked_in),
            "  train with the best settings, and read the rows to test on for the first time:",
            f"    {train}",
        ]
    )


def main(arguments: list[str]) -> int:
    """Parse, tune, report; bad settings and data end with one line and exit code 2."""
    try:
        tuning = tune(parse(TableTuneSettings, arguments, __doc__))
    except (SettingsError, DataError, TuningError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped; the same command with --resume goes on: trials that ended are kept",
            file=sys.stderr,
        )
        return STOPPED
    print(summary(tuning))
    return 0
