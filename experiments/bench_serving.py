"""What serving costs without torch: loading, encoding, scoring one request, and whole batches.

`python experiments/bench_serving.py` needs the data of `make demo`. Models are not trained: time
does not depend on weights. Scoring and encoding run in one thread; the batch commands run on two
Ray workers, first with their start and then warm. Rivals run beside: exact attention over 1,024
behaviours in the same runtime, and SDIM in torch.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import polars as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.dataset import Dataset
from hashtab.features.storage import Array
from hashtab.models.ctr import ClickModel, ClickModelSettings, FeatureSpec
from hashtab.models.ctr.served import ServedScorer
from hashtab.pipelines.bundles import export_model
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.encoding import Encoding, moment
from hashtab.pipelines.requests import RequestFiles
from hashtab.pipelines.saved_model import load_model, save_model
from hashtab.pipelines.scoring import Scoring
from hashtab.pipelines.shard_tasks import run_shards
from hashtab.serving.bundle import Bundle, Candidates
from hashtab.serving.store import UserRecord

CANDIDATES, HIDDEN = 500, (128, 64)
MODELS = {
    "SDIM, D 32, tau 5, G 16": ClickModelSettings(hidden=HIDDEN, counters=True),
    "SDIM, D 64, tau 3, G 16": ClickModelSettings(
        hidden=HIDDEN, counters=True, embedding_size=64, tau=3, planes=48
    ),
    "exact attention, D 32, 1,024 behaviours": ClickModelSettings(
        hidden=HIDDEN, counters=True, encoder="full_target_attention", history_limit=1024
    ),
}
MAIN = next(iter(MODELS))


def make(folder: Path, dataset: Dataset, settings: ClickModelSettings) -> Path:
    torch.manual_seed(0)
    spec = FeatureSpec.from_dict(asdict(dataset.manifest.features))
    save_model(folder / "model", ClickModel(spec, settings), dataset.manifest)
    export_model(folder / "model", dataset, folder / "bundle", {})
    return folder / "bundle"


def milliseconds(work: Callable[[], object], seconds: float = 3.0) -> tuple[float, float]:
    """Return median and 99th percentile of one call."""
    for _ in range(5):
        work()
    spent: list[float] = []
    while sum(spent) < seconds:
        begun = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent)) * 1e3, float(np.percentile(spent, 99)) * 1e3


def history(bundle: Bundle, length: int, seed: int = 0) -> tuple[dict[str, Array], Array]:
    rows = np.random.default_rng(seed).integers(0, len(bundle.catalogue), length)
    names = [feature.name for feature in bundle.manifest.features.behaviour]
    return bundle.catalogue.columns(rows, names), rows


def record(bundle: Bundle, length: int) -> UserRecord:
    behaviours, rows = history(bundle, length)
    return bundle.record(behaviours, np.arange(length), rows)


def candidates(bundle: Bundle, count: int) -> Candidates:
    random = np.random.default_rng(1)
    rows = random.integers(0, len(bundle.catalogue), count)
    features = bundle.manifest.features
    return Candidates(
        features=bundle.catalogue.columns(rows, [f.name for f in features.candidate]),
        context={f.name: random.integers(2, f.size, count) for f in features.context},
        counters=random.random((count, len(features.counters)), np.float32),
    )


def gemm_rate() -> float:
    """Return the rate of one thread of onnxruntime in GFLOP/s, for what bounds a scorer."""
    rows, inner, columns = 500, 256, 256
    weight = np.ones((inner, columns), np.float32)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, inner])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, columns])
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [product], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = {"x": np.ones((rows, inner), np.float32)}
    median, _ = milliseconds(lambda: session.run(None, feed), 1.0)
    return 2 * rows * inner * columns / median / 1e6


def operations(settings: ClickModelSettings, features: FeatureSpec) -> float:
    """Return what one candidate costs: hashing, reading and the head, in FLOP."""
    size, groups = settings.embedding_size, settings.planes // settings.tau
    widths = (4 * size + len(features.counters), *settings.hidden, 1)
    head = sum(2 * a * b for a, b in pairwise(widths))
    return head + 2 * size * settings.planes + groups * size


def score_one(folders: dict[str, Path]) -> None:
    rate = gemm_rate()
    print(f"one thread multiplies matrices at {rate:.0f} GFLOP/s\n")
    print(f"{CANDIDATES} candidates, one thread, ms{'':<28}p50    p99  floor  ratio to the first")
    first = None
    for name, folder in folders.items():
        bundle = Bundle.open(folder)
        asked = candidates(bundle, CANDIDATES)
        settings = MODELS[name]
        lengths = (100, 1_000, 10_000, 100_000) if settings.encoder == "sdim" else (1_024,)
        floor = CANDIDATES * operations(settings, load_model(folder.parent / "model").features)
        for length in lengths:
            kept = record(bundle, length)
            inputs = bundle.scorer_inputs([kept], [asked])
            p50, p99 = milliseconds(partial(bundle.run_scorer, inputs))
            first = first or p50
            bound = f"{floor / rate / 1e6:6.2f}" if settings.encoder == "sdim" else "     -"
            print(f"{name}, history {length:>7,}".ljust(58), end="")
            print(f"{p50:6.2f} {p99:6.2f} {bound} {p50 / first:6.1f}")
    folder = folders[MAIN]
    bundle, model = Bundle.open(folder), ServedScorer(load_model(folder.parent / "model")).eval()
    inputs = bundle.scorer_inputs([record(bundle, 1_000)], [candidates(bundle, CANDIDATES)])
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in inputs.items()}
    with torch.inference_mode():
        p50, p99 = milliseconds(lambda: model({"inputs": tensors}["inputs"]))
    print(
        f"{MAIN}, in torch".ljust(58) + f"{p50:6.2f} {p99:6.2f}      - {p50 / (first or p50):6.1f}"
    )


def encode_one(folders: dict[str, Path]) -> None:
    print("\nincrements of one user, one thread, ms" + " " * 26 + "p50    p99")
    for name in list(folders)[:2]:
        bundle = Bundle.open(folders[name])
        for length in (1, 32, 595, 1_024):
            behaviours, _ = history(bundle, length)
            p50, p99 = milliseconds(partial(bundle.increments, behaviours), 1.0)
            print(f"{name}, {length:>5,} behaviours".ljust(58) + f"{p50:6.3f} {p99:6.3f}")


def load(folder: Path) -> None:
    code = (
        "import sys, time\n"
        "for name in ('torch', 'ray', 'mlflow'): sys.modules[name] = None\n"
        "begun = time.perf_counter()\n"
        "from hashtab.serving.bundle import Bundle\n"
        "imported = time.perf_counter()\n"
        f"bundle = Bundle.open({str(folder)!r}); bundle.catalogue; bundle.encoders\n"
        "print(imported - begun, time.perf_counter() - imported)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(5)
    ]
    imports, opens = np.median([list(map(float, r.stdout.split())) for r in runs], axis=0)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(
        f"\nbundle: {size:.1f} MB, opened with catalogue and encoders in {opens:.3f} s after "
        f"{imports:.2f} s of imports"
    )


def encode_all(folder: Path, dataset: Dataset, work: Path) -> Path:
    encoding = Encoding(
        bundle=str(folder),
        bundle_digest=Bundle.open(folder).manifest.digest,
        data=str(dataset.folder.resolve()),
        data_digest=dataset.manifest.digest,
        store=str(work / "tables"),
        as_of=moment(dataset, "validation"),
    )
    shards = range(dataset.manifest.shards)
    # Another moment: all is to be encoded anew, by workers that are there and a store that is full.
    for name, job in (("cold", encoding), ("warm", replace(encoding, as_of=moment(dataset, None)))):
        begun = time.perf_counter()
        run_shards(job, shards, 2)
        seconds = time.perf_counter() - begun
        behaviours = sum(int((h.ends - h.starts).sum()) for h in map(job.histories, shards))
        print(
            f"encode_users, 2 workers, {name}: {dataset.manifest.users / seconds:,.0f} users/s, "
            f"{behaviours / seconds / 1e6:.2f} million behaviours/s"
        )
    return work / "tables"


def score_all(folder: Path, dataset: Dataset, store: Path, work: Path) -> None:
    random = np.random.default_rng(0)
    bundle = Bundle.open(folder)
    users = pl.read_ipc(dataset.folder / "tables" / "users.arrow")["_user"]
    count = 3_000
    rows = random.integers(0, len(bundle.catalogue), (count, CANDIDATES))
    frame = pl.DataFrame(
        {
            "user": users.gather(random.integers(0, len(users), count)),
            "candidates": [bundle.catalogue.items.gather(row) for row in rows],
            "time": [datetime(2017, 7, 1)] * count,
            "display_location": ["0"] * count,
            "mailer_location": ["A"] * count,
        }
    )
    frame.write_parquet(work / "requests.parquet")
    for name in ("cold", "warm"):
        output = work / f"scores-{name}"
        output.mkdir()
        scoring = Scoring(
            bundle=str(folder),
            bundle_digest=bundle.manifest.digest,
            requests=(),
            count=count,
            one_a_row=False,
            rows=250,
            store=str(store),
            tables=None,
            data=None,
            data_digest=None,
            as_of=None,
            top=None,
            output=str(output),
        )
        files = RequestFiles.find(str(work / "requests.parquet"), bundle)
        files.write(scoring.asked, scoring.rows)
        begun = time.perf_counter()
        run_shards(scoring, range(scoring.parts), 2)
        seconds = time.perf_counter() - begun
        print(
            f"score_batch, 2 workers, {name}: {count * CANDIDATES / seconds:,.0f} candidates/s, "
            f"{count / seconds:,.0f} requests/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/complete_journey")
    dataset = Dataset.open(parser.parse_args().data)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = {
            model: make(work / str(i), dataset, settings)
            for i, (model, settings) in enumerate(MODELS.items())
        }
        score_one(folders)
        encode_one(folders)
        load(folders[MAIN])
        with cluster(2, None):
            store = encode_all(folders[MAIN], dataset, work)
            score_all(folders[MAIN], dataset, store, work)


if __name__ == "__main__":
    main()
