#!/usr/bin/env python3
"""Train TabNSA on any table, CSV or Parquet, tracked in MLflow, to a bundle that serves it.

`python pipelines/train_tabnsa.py --data.file churn.csv --data.target churned` holds a fifth of the
rows out, trains on the others, tests, and exports. Columns are numbers or categories by their
types; values may be missing. All settings may stand in a YAML file, `--config my.yaml`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.errors import DataError, disk_errors
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.leave import STOPPED, leave
from hashtab.pipelines.places import python_script, shown, tracking_option
from hashtab.pipelines.registry import register
from hashtab.pipelines.report import metrics_table, next_commands, table
from hashtab.pipelines.table_data import TableData, load
from hashtab.pipelines.table_runs import TableRun, TableTrainSettings, table_identity
from hashtab.pipelines.tracking import Tracking
from hashtab.serving.errors import BundleError

_MOST_COLUMNS = 8


def train(settings: TableTrainSettings) -> TableRun:
    """Train one run to its end and return it.

    Raises:
        SettingsError: if the run was begun before and is not to be resumed, or the tracking store
            is not there.
        DataError: if the table cannot be used.
        BundleError: if torch and onnxruntime disagree.
    """
    data = load(settings.data, settings.seed)
    for line in data.said:
        print(line, file=sys.stderr)
    run = TableRun.find(settings, data)
    run.check_resume()
    if not run.published:
        bring_to_end(run, data)
    if settings.register is not None:
        register(run.bundle, settings.register, settings.tracking_uri, run.tracked_as)
    return run


def bring_to_end(run: TableRun, data: TableData) -> None:
    """Train a run and tell MLflow; what is done already is not done again.

    Raises:
        SettingsError: if another process is training it, or MLflow cannot be used.
        BundleError: if torch and onnxruntime disagree.
    """
    from hashtab.pipelines.table_training import train_run  # slow to import, as torch is

    with run.locked(), disk_errors(run.folder):
        run.make(table_identity(run.settings, data))
        settings = run.settings
        tracked = Tracking(settings.tracking_uri, settings.experiment).begin(run, data.digest)
        try:
            if not run.finished:
                train_run(run, data)
            result = run.result
            tracked.log_curves(
                [{f"fit/{k}": v for k, v in epoch.items()} for epoch in result.curves]
            )
            final = {f"best/test/{name}": v for name, v in result.metrics["test"].items()}
            final |= {f"rows/{split}": float(rows) for split, rows in result.rows.items()}
            final |= {"columns": float(result.columns), "seconds": result.seconds}
            tracked.finish(final, 0, (run.plots, run.bundle))
        except BaseException as error:
            tracked.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        run.publish()


def importances_table(importances: dict[str, float]) -> str:
    """Return a table of the columns that matter most."""
    rows = [[name, f"{value:.4f}"] for name, value in list(importances.items())[:_MOST_COLUMNS]]
    return table(["column", "worth in test loss"], rows)


def summary(run: TableRun) -> str:
    """Return a finished run's tables, where everything lies, and what to do next."""
    result, settings = run.result, run.settings
    bundle, uri = shown(run.bundle), run.tracked_in
    held_out = shown(run.held_out)
    score = f"{python_script('score_table.py')} --bundle {bundle} --rows {held_out}"
    next_ones = [
        "  score a table, the rows held out or any other with these columns:",
        f"    {score}",
    ]
    if settings.register is not None:
        command = f"{python_script('promote.py')} --name {settings.register}"
        next_ones += [
            "  make it the champion, if it is better on labelled rows that neither has learnt from",
            "  (those held out here are such only where the champion held the same ones out, or is",
            "  older than they are):",
            f"    {command} --data labelled.csv{tracking_option(settings.tracking_uri)}",
        ]
    return "\n".join(
        [
            "",
            f"{run.name}: {result.rows['train']:,} rows of {result.columns} columns learnt from, "
            f"{result.rows['test']:,} tested on, {result.seconds:.0f} s",
            "",
            metrics_table(result.metrics),
            "",
            importances_table(result.importances),
            "",
            f"run    {shown(run.folder)}",
            f"bundle {bundle}",
            f"test   {held_out}, the rows held out",
            f"plots  {shown(run.plots)}",
            f"MLflow {uri}, run {run.tracked_as}",
            "",
            *next_commands(uri),
            *next_ones,
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, report; bad settings and data end with one line and exit code 2."""
    try:
        run = train(parse(TableTrainSettings, arguments, __doc__))
    except (SettingsError, DataError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume trains it again", file=sys.stderr)
        return STOPPED
    print(summary(run))
    return 0


if __name__ == "__main__":
    leave(main())
