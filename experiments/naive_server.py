"""The server that people write first, as the rival of the scorer: FastAPI, pydantic and uvicorn.

    python experiments/naive_server.py --bundle BUNDLE --store STORE --port 8100

One process, no limits, no deadlines, no swaps. It reads the same records and runs the same bundle
in onnxruntime as the scorer does. `POST /score` takes what the scorer's `/v1/score` takes.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.catalogue import UNKNOWN_ROW
from hashtab.features.encoders import FIRST_ID, UNKNOWN_ID, Encoder, Scaler
from hashtab.features.storage import Array
from hashtab.serving.bundle import Bundle, Candidates
from hashtab.serving.store import UserRecord, open_store, unpack

Value = int | float | str | None


class ScoreRequest(BaseModel):
    """What is asked."""

    user: int | str
    items: list[int | str]
    context: dict[str, Value | list[Value]] = {}
    time: datetime | None = None


class ScoreReply(BaseModel):
    """What is answered."""

    scores: list[float]


def build_app(bundle_folder: str, store_url: str) -> FastAPI:
    """Return the application, its bundle and store open."""
    bundle = Bundle.open(bundle_folder)
    store = open_store(store_url, readonly=True)
    rows_of = {item: row for row, item in enumerate(bundle.catalogue.items.to_list())}
    encode_context = context_encoder(bundle)
    features = [feature.name for feature in bundle.manifest.features.candidate]
    app = FastAPI()

    # Not in a thread of FastAPI's pool: the hop there and back costs more than it saves.
    @app.post("/score")
    async def score(asked: ScoreRequest) -> ScoreReply:
        (found,) = store.get(bundle.layout.fingerprint, [asked.user])
        record = unpack(found, bundle.layout) if found else UserRecord.empty(bundle.layout)
        rows = np.array([rows_of.get(item, UNKNOWN_ROW) for item in asked.items])
        candidates = Candidates(
            features=bundle.catalogue.columns(rows, features),
            context=encode_context(asked),
            counters=bundle.counters(record, rows),
        )
        return ScoreReply(scores=bundle.score(record, candidates).tolist())

    return app


def context_encoder(bundle: Bundle) -> Callable[[ScoreRequest], dict[str, Array]]:
    """Return what encodes each context feature of a request to a value a candidate."""
    manifest = bundle.manifest
    raw = [f.name for f in manifest.features.context if f.name not in manifest.time_features]
    encode_one = {name: value_encoder(bundle.encoders[name]) for name in raw}

    def encode(asked: ScoreRequest) -> dict[str, Array]:
        columns: dict[str, Array] = {}
        for name, encode_value in encode_one.items():
            value = asked.context[name]
            values = value if isinstance(value, list) else [value]
            columns[name] = np.array([encode_value(v) for v in values])
        if manifest.time_features and asked.time:
            columns["hour"] = np.array([FIRST_ID + asked.time.hour])
            columns["weekday"] = np.array([FIRST_ID + asked.time.weekday()])
        return {name: np.broadcast_to(column, len(asked.items)) for name, column in columns.items()}

    return encode


def value_encoder(encoder: Encoder) -> Callable[[Value], float]:
    """Return what encodes one value: of a dictionary, or scaled."""
    if isinstance(encoder, Scaler):
        return lambda value: (float(value or encoder.mean) - encoder.mean) / encoder.std
    ids = {value: FIRST_ID + i for i, value in enumerate(encoder.values)}
    return lambda value: ids.get(value, UNKNOWN_ID)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    app = build_app(options.bundle, options.store)
    uvicorn.run(app, port=options.port, access_log=False, log_level="warning", ws="none")


if __name__ == "__main__":
    main()
