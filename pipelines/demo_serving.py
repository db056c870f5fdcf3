"""The second half of the demo: from the best rival to a champion, tables, and served scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from hashtab.features.dataset import Dataset
from hashtab.pipelines.as_of import Scored, score_as_of
from hashtab.pipelines.bundles import export_model
from hashtab.pipelines.encode_users import EncodeSettings, encode
from hashtab.pipelines.encoding import moment
from hashtab.pipelines.places import python_script, shown, tracking_option
from hashtab.pipelines.promote import make_champion
from hashtab.pipelines.registry import Registry, register
from hashtab.pipelines.report import number, table
from hashtab.pipelines.requests import write_split
from hashtab.pipelines.runs import Run
from hashtab.pipelines.saved_model import load_model
from hashtab.pipelines.score_batch import ScoreSettings, Summary, score
from hashtab.pipelines.scoring import SCORES
from hashtab.serving.manifest import BundleManifest

MODEL = "hashtab"
SPLIT = "test"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the demo serves, and how it compares.

    Args:
        manifest: of the champion's bundle.
        version: of the registered model.
        store: folder of the user tables.
        requests: file of the test requests.
        scores: folder of their scores.
        summary: of these scores.
        at_once: torch, each request with all that had happened before it.
        in_torch: torch, each request with what had happened before the test weeks.
        served: from the store, the same.
        tracking_uri: of MLflow.
    """

    manifest: BundleManifest
    version: int
    store: Path
    requests: Path
    scores: Path
    summary: Summary
    at_once: dict[str, float]
    in_torch: Scored
    served: Scored
    tracking_uri: str

    @property
    def largest_difference(self) -> float:
        """Between a served score and torch's."""
        return float(np.abs(self.served.scores - self.in_torch.scores).max())


def serve(run: Run, dataset: Dataset, storage: Path, tracking_uri: str) -> Served:
    """Export a run, register it, encode all users as of the test weeks' begin, score the requests.

    What is there already is used again.
    """
    manifest = export_model(run.model, dataset, run.folder / "bundle", run.result.metrics)
    version = register(run.folder / "bundle", MODEL, tracking_uri, run.tracked_as)
    # The demo shows the model that it has just trained, whatever was registered before.
    make_champion(Registry(tracking_uri, MODEL), version)
    store = storage / "tables"
    requests = storage / f"test_requests-{dataset.manifest.digest[:8]}.parquet"
    scores = storage / f"scores-{manifest.digest[:8]}"
    champion = f"models:/{MODEL}@champion"
    encoding = EncodeSettings(
        bundle=champion,
        data=str(dataset.folder),
        store=str(store),
        as_of=SPLIT,
        workers=0,
        tracking_uri=tracking_uri,
    )
    encode(encoding)
    if not requests.exists():
        write_split(dataset, SPLIT, requests)
    scoring = ScoreSettings(
        bundle=champion,
        requests=str(requests),
        output=str(scores),
        store=str(store),
        workers=0,
        tracking_uri=tracking_uri,
    )
    summary = score(scoring)
    in_torch = score_as_of(load_model(run.model), dataset, SPLIT, moment(dataset, SPLIT))
    return Served(
        manifest=manifest,
        version=version,
        store=store,
        requests=requests,
        scores=scores,
        summary=summary,
        at_once=run.result.metrics[SPLIT],
        in_torch=in_torch,
        served=_served(scores, in_torch),
        tracking_uri=tracking_uri,
    )


def _served(scores: Path, asked: Scored) -> Scored:
    """Read the scores, which are in the order of the split's samples."""
    stored = pl.read_parquet(scores / "part-*.parquet", columns=[SCORES])
    values = stored[SCORES].explode().to_numpy().astype(np.float64)
    return Scored(labels=asked.labels, scores=values, users=asked.users)


def served_table(served: Served) -> str:
    """Return the table of served scores beside those of torch."""
    found = {
        "torch, all before each request": served.at_once,
        "torch, all before the test weeks": served.in_torch.metrics(),
        "served from tables of that moment": served.served.metrics(),
    }
    columns = {"gauc": "test gAUC", "auc": "test AUC", "log_loss": "test log loss"}
    rows = [[name, *(number(metrics, c) for c in columns)] for name, metrics in found.items()]
    agree = (
        f"{len(served.served.scores):,} served scores and torch's differ by "
        f"{served.largest_difference:.1g} at most"
    )
    return table(["scores of the champion", *columns.values()], rows) + f"\n\n{agree}"


def places(served: Served) -> list[str]:
    """Say where what was made lies."""
    return [
        f"  {'champion':<22} models:/{MODEL}@champion, version {served.version}",
        f"  {'user tables':<22} {shown(served.store)}",
        f"  {'test requests':<22} {shown(served.requests)}",
        f"  {'their scores':<22} {shown(served.scores)}",
        "",
        "score requests of your own:",
        f"  {python_script('score_batch.py')} --bundle models:/{MODEL}@champion "
        f"--store {shown(served.store)} --requests requests.parquet --output my_scores"
        f"{tracking_option(served.tracking_uri)}",
        "",
        "serve it online, with a page to look around in:",
        f"  {python_script('serve.py')}{tracking_option(served.tracking_uri)}",
    ]
