"""Tables and last lines that a script prints."""

import re
from collections.abc import Mapping, Sequence

from hashtab.pipelines.places import installed, python_script, shown
from hashtab.pipelines.runs import Result, Run

_COLUMNS = ("gauc", "auc", "log_loss", "calibration_error")
_TITLES = {"gauc": "gAUC", "auc": "AUC", "log_loss": "log loss", "calibration_error": "cal. error"}

# Of models of tables, in the order in which they are shown.
_TABLE_TITLES = {
    "auc": "AUC",
    "log_loss": "log loss",
    "accuracy": "accuracy",
    "calibration_error": "cal. error",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R2",
    "pinball_loss": "pinball loss",
    "coverage": "coverage",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text under a header; the first column to the left, the rest to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(len(line) for line in text)
    return "\n".join([text[0], rule, *text[1:]])


def number(metrics: Mapping[str, float], name: str) -> str:
    """Format one metric; `-` where there is none."""
    return f"{metrics[name]:.4f}" if name in metrics else "-"


def metrics_table(metrics: Mapping[str, Mapping[str, float]], first: str = "split") -> str:
    """Return a table of metrics by row, whatever the task has."""
    names = [name for name in _TABLE_TITLES if any(name in found for found in metrics.values())]
    rows = [
        [row, *(f"{found[n]:.4g}" if n in found else "-" for n in names)]
        for row, found in metrics.items()
    ]
    return table([first, *(_TABLE_TITLES[name] for name in names)], rows)


def result_table(result: Result) -> str:
    """Return the metrics of each split, then test gAUC and AUC by slice."""
    rows = [
        [split, *(number(metrics, name) for name in _COLUMNS)]
        for split, metrics in result.metrics.items()
    ]
    whole = table(["split", *(_TITLES[name] for name in _COLUMNS)], rows)
    test = result.metrics["test"]
    slices = [name.removeprefix("samples/") for name in test if name.startswith("samples/")]
    parts = [
        [
            _slice_title(name),
            f"{test[f'samples/{name}']:,.0f}",
            number(test, f"gauc/{name}"),
            number(test, f"auc/{name}"),
        ]
        for name in slices
    ]
    return whole + "\n\n" + table(["test slice", "samples", "gAUC", "AUC"], parts)


def _slice_title(name: str) -> str:
    """Write `history_1_49` as `history 1-49` and `history_2000_up` as `history 2000+`."""
    ranged = re.sub(r"_(\d+)_(\d+)$", r" \1-\2", name.replace("_up", "+"))
    return ranged.replace("_", " ")


def summary(run: Run) -> str:
    """Return a finished run's table, where everything lies, and what to do next."""
    result = run.result
    return "\n".join(
        [
            "",
            f"{run.name}: epoch {result.best_epoch} of {len(result.epochs)} is the best, "
            f"{result.parameters:,} parameters, {result.seconds:.0f} s",
            "",
            result_table(result),
            "",
            f"run    {shown(run.folder)}",
            f"model  {shown(run.model)}",
            f"plots  {shown(run.plots)}",
            f"MLflow {run.tracked_in}, run {run.tracked_as}",
            "",
            *next_commands(run.tracked_in),
        ]
    )


def next_commands(tracking_uri: str, *, own_log: bool = False) -> list[str]:
    """Return lines with the commands to try next, as they can be pasted here."""
    lines = [
        "next:",
        "  open the MLflow UI:",
        f"    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {installed('mlflow')} ui "
        f"--backend-store-uri {tracking_uri} --workers 1",
    ]
    if own_log:
        lines += [
            "  train on your own log, declared in a schema (see README):",
            f"    {python_script('prepare.py')} --schema my.yaml --output data/mine",
            f"    {python_script('train_sdim.py')} --data data/mine",
        ]
    return lines
