#!/usr/bin/env python3
"""Train a click model over long histories (SDIM or a rival) on Ray Train, tracked in MLflow.

`python pipelines/train_sdim.py` trains on data/complete_journey; `--data` on another prepared data
set, `--model.encoder mean` another encoder, `--workers 4 --gpu` on four GPUs, `--resume` goes on
with a run that was stopped. All settings may stand in a YAML file, `--config my.yaml`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError, disk_errors
from hashtab.pipelines.bundles import export_model
from hashtab.pipelines.checkpoints import CheckpointError
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.driver import train_runs
from hashtab.pipelines.leave import STOPPED, leave
from hashtab.pipelines.report import summary
from hashtab.pipelines.runs import Run
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.tracking import Tracking
from hashtab.pipelines.training import check
from hashtab.serving.errors import BundleError


def train(settings: TrainSettings) -> Run:
    """Train one run to its end and return it.

    Raises:
        SettingsError: if the run was begun before and is not to be resumed, its settings or data
            are not those it was begun with, the data cannot serve them, or the cluster, the GPUs
            or the tracking store are not there.
        DataError: if the data is not a finished data set.
        CheckpointError: if the checkpoint is of another training, or cannot be read or written.
        BundleError: if the model is to be exported, and torch and onnxruntime disagree.
    """
    dataset = Dataset.open(settings.data)
    check(settings, dataset)
    manifest = dataset.manifest
    run = Run.find_or_resume(settings, manifest)
    run.check_resume()
    if not run.published:
        gpus = max(1, settings.workers) if settings.gpu else 0
        cores = settings.workers * settings.threads
        with disk_errors(run.folder), cluster(cores, settings.address, gpus=gpus):
            tracking = Tracking(settings.tracking_uri, settings.experiment)
            train_runs([run], manifest, tracking)
    if settings.export:
        export_model(run.model, dataset, run.folder / "bundle", run.result.metrics)
    return run


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, report; bad settings and data end with one line and exit code 2."""
    try:
        settings = parse(TrainSettings, arguments, __doc__)
        run = train(settings)
    except (SettingsError, DataError, CheckpointError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "stopped; the same command with --resume goes on from its last checkpoint",
            file=sys.stderr,
        )
        return STOPPED
    print(summary(run))
    return 0


if __name__ == "__main__":
    leave(main())
