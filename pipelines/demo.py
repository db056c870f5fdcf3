#!/usr/bin/env python3
"""Prepare Complete Journey, train SDIM and its simplest rivals, compare them, and serve the best.

Run again, it reuses what is finished, goes on with what was stopped, and says so.
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.dataset import Dataset
from hashtab.features.datasets import SCHEMAS
from hashtab.features.errors import DataError
from hashtab.features.manifest import FILE, Manifest
from hashtab.features.prepare import prepare
from hashtab.models.ctr import ClickModelSettings
from hashtab.pipelines.checkpoints import CheckpointError
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.count_rule import RuleResult, apply_count_rule
from hashtab.pipelines.demo_serving import places, serve, served_table
from hashtab.pipelines.driver import train_runs
from hashtab.pipelines.leave import STOPPED, leave
from hashtab.pipelines.places import DEFAULT_TRACKING, shown
from hashtab.pipelines.plots import plot_rivals
from hashtab.pipelines.report import next_commands, number, table
from hashtab.pipelines.runs import Run
from hashtab.pipelines.settings import OptimiserSettings, TrainSettings
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.pipelines.tracking import Tracking
from hashtab.pipelines.training import check
from hashtab.serving.errors import BundleError
from hashtab.serving.store import StoreError

RULE = "count rule, untrained"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of the demo.

    Args:
        data: folder of the prepared data set; Complete Journey is prepared there if it is empty.
        model: of all rivals, but for the history encoder and the counters.
        optimiser: of all rivals.
        seed: of all rivals.
        workers: rivals trained at a time, one core each.
        storage: folder of all runs.
        tracking_uri: of MLflow.
    """

    data: str = "data/complete_journey"
    model: ClickModelSettings = field(default_factory=ClickModelSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    seed: int = 0
    workers: int = 2
    storage: str = "runs"
    tracking_uri: str = DEFAULT_TRACKING

    @property
    def plots(self) -> Path:
        """Folder of the plots of all rivals."""
        return Path(self.storage).resolve() / "rivals"

    def rivals(self) -> dict[str, TrainSettings]:
        """Return the settings of the trained rivals by name, the longest trainings first."""
        common = TrainSettings(
            data=self.data,
            optimiser=self.optimiser,
            seed=self.seed,
            workers=self.workers,
            storage=self.storage,
            tracking_uri=self.tracking_uri,
        )
        rivals = {
            "SDIM + counters": ("sdim", True),
            "SDIM": ("sdim", False),
            "mean pooling": ("mean", False),
            "no history + counters": ("none", True),
        }
        return {
            name: replace(common, model=replace(self.model, encoder=encoder, counters=counters))
            for name, (encoder, counters) in rivals.items()
        }


def open_or_prepare(folder: Path) -> Dataset:
    """Return the data set in `folder`, Complete Journey if there is none yet."""
    if (folder / FILE).exists():
        print(f"{folder} is prepared already", file=sys.stderr)
    else:
        print(f"preparing {folder}", file=sys.stderr)
        prepare(SCHEMAS["complete_journey"](), folder, run_shards=partial(run_shards, workers=0))
    return Dataset.open(folder)


def find(name: str, settings: TrainSettings, dataset: Dataset) -> Run:
    """Return a rival's run, and say so if it is not new.

    Raises:
        SettingsError: if the data cannot serve the rival.
    """
    check(settings, dataset)
    run = Run.find_or_resume(settings, dataset.manifest)
    if run.published:
        print(f"{name}: trained before, reused from {shown(run.folder)}", file=sys.stderr)
    elif run.begun:
        print(f"{name}: goes on where it was stopped, {shown(run.folder)}", file=sys.stderr)
    return run


def train_rivals(runs: dict[str, Run], manifest: Manifest, settings: DemoSettings) -> None:
    """Train what is not finished, all on one group of workers, and draw the rivals together."""
    rivals = list(runs.values())
    published = all(run.published for run in rivals)
    if published and settings.plots.exists():
        return
    tracking = Tracking(settings.tracking_uri, rivals[0].settings.experiment)
    # Those there may be of other rivals, trained in this storage before.
    shutil.rmtree(settings.plots, ignore_errors=True)
    if not published:
        with cluster(settings.workers, None):
            train_runs(rivals, manifest, tracking, apart=True)
    # They get their name last: where it is, all is done.
    drawn = settings.plots.with_name(".rivals.tmp")
    plot_rivals({name: run.result.metrics["test"] for name, run in runs.items()}, drawn)
    for run in rivals:
        tracking.add_artifacts(run, drawn, settings.plots.name)
    drawn.rename(settings.plots)


def rivals_table(rule: RuleResult, runs: dict[str, Run]) -> str:
    """Return the table of all rivals, the simplest first."""
    rows = [_row(RULE, rule.metrics, rule.seconds)]
    for name, run in reversed(runs.items()):
        rows.append(_row(name, run.result.metrics, run.result.seconds))
    names = ("gAUC", "AUC", "log loss")
    header = [f"{split} {name}" for split in ("val", "test") for name in names]
    return table(["rival", *header, "seconds"], rows)


def _row(name: str, metrics: Mapping[str, Mapping[str, float]], seconds: float) -> list[str]:
    values = [
        number(metrics[split], metric)
        for split in ("validation", "test")
        for metric in ("gauc", "auc", "log_loss")
    ]
    return [name, *values, f"{seconds:.0f}"]


def compare(settings: DemoSettings) -> str:
    """Bring every rival to its end and return what to print."""
    dataset = open_or_prepare(Path(settings.data))
    rivals = settings.rivals().items()
    runs = {name: find(name, rival, dataset) for name, rival in rivals}
    rule = apply_count_rule(dataset, ("validation", "test"))
    train_rivals(runs, dataset.manifest, settings)
    best = max(runs.values(), key=lambda run: run.result.metrics["validation"]["gauc"])
    print("serving the best of them on validation", file=sys.stderr)
    storage = Path(settings.storage).resolve()
    served = serve(best, dataset, storage, settings.tracking_uri)
    return "\n".join(
        [
            "",
            rivals_table(rule, runs),
            "",
            served_table(served),
            "",
            "run, model and plots of each:",
            *(f"  {name:<22} {shown(run.folder)}" for name, run in runs.items()),
            f"  {'plots of all rivals':<22} {shown(settings.plots)}",
            *places(served),
            "",
            *next_commands(settings.tracking_uri, own_log=True),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, compare, report; bad settings and data end with one line and exit code 2."""
    try:
        text = compare(parse(DemoSettings, arguments, __doc__))
    except (SettingsError, DataError, CheckpointError, BundleError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    print(text)
    return 0


if __name__ == "__main__":
    leave(main())
