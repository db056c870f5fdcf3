#!/usr/bin/env python3
"""Export a trained click model as a bundle: all that serving needs, in one folder, without torch.

`python pipelines/export.py --run runs/sdim-1a2b3c4d --data data/my_shop` writes the bundle beside
the run, but only if onnxruntime and torch agree.
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
from hashtab.pipelines.places import python_script, shown
from hashtab.pipelines.runs import finished_metrics
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export.

    Args:
        run: folder of a finished training run.
        data: folder of the prepared data set that it was trained on.
        output: folder of the bundle; `bundle` in the run's folder by default.
    """

    run: str | None = None
    data: str = "data/complete_journey"
    output: str | None = None


def export(settings: ExportSettings) -> tuple[Path, BundleManifest]:
    """Export a run; returns the bundle's folder and manifest.

    Raises:
        SettingsError: if the run or data cannot be used.
        DataError: if the data is not a finished data set.
        BundleError: if torch and onnxruntime disagree.
    """
    if settings.run is None:
        raise SettingsError("--run must name the folder of a finished training run")
    run = Path(settings.run)
    metrics = finished_metrics(run)
    dataset = Dataset.open(settings.data)
    target = Path(settings.output or run / "bundle").resolve()
    with disk_errors(target):
        return target, export_model(run / "model", dataset, target, metrics)


def report(folder: Path, manifest: BundleManifest, seconds: float) -> str:
    """Say what was made, where it lies and what to run next."""
    parity, table = manifest.parity, manifest.table
    size = sum(info.size for info in manifest.files.values()) / 1e6
    lines = [
        f"{shown(folder)}: {manifest.encoder}, {size:.1f} MB in {seconds:.1f} s, "
        f"fingerprint {manifest.fingerprint}",
        f"torch and onnxruntime agree: {parity.scores:,} scores of {parity.requests} requests "
        f"within {parity.largest_difference:.1g}, {parity.codes:,} hash codes all equal",
    ]
    if table.groups:
        lines.append(
            f"a user's table: {table.groups} groups of {table.buckets} buckets of {table.size}"
        )
    command = python_script("encode_users.py")
    lines.append(f"next: {command} --bundle {shown(folder)} --data ... --store tables")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, report; what cannot be exported ends with one line and exit code 2."""
    start = time.perf_counter()
    try:
        folder, manifest = export(parse(ExportSettings, arguments, __doc__))
    except (SettingsError, DataError, CheckpointError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(folder, manifest, time.perf_counter() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
