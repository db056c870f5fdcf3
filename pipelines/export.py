#!/usr/bin/env python3
"""Export a trained model as a bundle: all that serving needs, in one folder, without torch.

`python pipelines/export.py --run runs/sdim-1a2b3c4d --data data/my_shop` writes the bundle beside
the run, but only if onnxruntime and torch agree. A run of train_tabnsa.py needs no `--data`.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.dataset import Dataset
from hashtab.features.errors import DataError, disk_errors
from hashtab.pipelines.bundles import export_model
from hashtab.pipelines.checkpoints import CheckpointError
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.places import DEFAULT_TRACKING, python_script, shown, tracking_option
from hashtab.pipelines.registry import register
from hashtab.pipelines.runs import FinishedRun
from hashtab.pipelines.table_bundles import MEANING, export_table
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.table_manifest import TableManifest


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export.

    Args:
        run: folder of a finished training run.
        data: folder of the prepared data set that a click model was trained on.
        output: folder of the bundle; `bundle` in the run's folder by default.
        register: name of the registered model that the bundle becomes the challenger of; none by
            default.
        tracking_uri: of MLflow, to register in.
    """

    run: str | None = None
    data: str = "data/complete_journey"
    output: str | None = None
    register: str | None = None
    tracking_uri: str = DEFAULT_TRACKING


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A bundle's folder and manifest, and its version in the registry, if it is there."""

    folder: Path
    manifest: BundleManifest | TableManifest
    version: int | None


def export(settings: ExportSettings) -> Exported:
    """Export a run, and register its bundle if that is asked for.

    Raises:
        SettingsError: if the run, the data or MLflow cannot be used.
        DataError: if the data is not a finished data set.
        BundleError: if torch and onnxruntime disagree.
    """
    if settings.run is None:
        raise SettingsError("--run must name the folder of a finished training run")
    folder = Path(settings.run)
    run = FinishedRun.read(folder)
    target = Path(settings.output or folder / "bundle").resolve()
    manifest: BundleManifest | TableManifest
    with disk_errors(target):
        if (folder / "model" / MEANING).exists():
            manifest = export_table(folder / "model", target, run.metrics)
        else:
            dataset = Dataset.open(settings.data)
            manifest = export_model(folder / "model", dataset, target, run.metrics)
    version = None
    if settings.register is not None:
        known = run.mlflow_run_id if run.tracking_uri == settings.tracking_uri else None
        version = register(target, settings.register, settings.tracking_uri, known)
    return Exported(folder=target, manifest=manifest, version=version)


def report(settings: ExportSettings, exported: Exported, seconds: float) -> str:
    """Say what was made, where it lies and what to run next."""
    manifest, folder = exported.manifest, shown(exported.folder)
    size = sum(info.size for info in manifest.files.values()) / 1e6
    made = f"{size:.1f} MB in {seconds:.1f} s"
    if isinstance(manifest, TableManifest):
        parity = manifest.parity
        lines = [
            f"{folder}: {manifest.task} of {manifest.target!r}, {made}",
            f"torch and onnxruntime agree: {parity.rows:,} rows within "
            f"{parity.largest_difference:.1g}",
        ]
        data = shown(Path(str(settings.run)) / "test.parquet")
        command = f"{python_script('score_table.py')} --bundle {folder} --rows {data}"
    else:
        lines = _of_clicks(manifest, folder, made)
        data = settings.data
        command = (
            f"{python_script('encode_users.py')} --bundle {folder} --store tables --data {data}"
        )
    if exported.version is not None:
        lines.append(f"registered as version {exported.version} of {settings.register}")
        tracked = tracking_option(settings.tracking_uri)
        command = f"{python_script('promote.py')} --name {settings.register}{tracked} --data {data}"
    return "\n".join([*lines, f"next: {command}"])


def _of_clicks(manifest: BundleManifest, folder: str, made: str) -> list[str]:
    parity, table = manifest.parity, manifest.table
    lines = [
        f"{folder}: {manifest.encoder}, {made}, fingerprint {manifest.fingerprint}",
        f"torch and onnxruntime agree: {parity.scores:,} scores of {parity.requests} requests "
        f"within {parity.largest_difference:.1g}, {parity.codes:,} hash codes all equal",
    ]
    if table.groups:
        lines.append(
            f"a user's table: {table.groups} groups of {table.buckets} buckets of {table.size}"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, report; what cannot be exported ends with one line and exit code 2."""
    start = time.perf_counter()
    try:
        settings = parse(ExportSettings, arguments, __doc__)
        exported = export(settings)
    except (SettingsError, DataError, CheckpointError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(settings, exported, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
