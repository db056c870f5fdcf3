"""A loaded model of tables: raw columns in, probabilities or values out; without torch."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hashtab.features.storage import Array
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.golden import read_arrays, under, write_arrays
from hashtab.serving.manifest import GOLDEN
from hashtab.serving.session import open_session
from hashtab.serving.table_columns import CATEGORICAL, Rows, matrices
from hashtab.serving.table_manifest import GRAPH, TableManifest

_TOLERANCE = 1e-4  # of a prediction, between two machines' arithmetic
_AT_ONCE = 1024  # rows of one call: more take more memory and no less time

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TableGolden:
    """What went into the graph at export, and what came out.

    Args:
        inputs: of the graph, by name.
        outputs: `[N, K]` float32, or `[N]`.
    """

    inputs: dict[str, Array]
    outputs: Array

    def write(self, path: Path) -> None:
        """Write the arrays as one file, text as fixed widths: nothing is pickled."""
        plain = {
            name: values.astype(np.str_) if values.dtype == object else values
            for name, values in self.inputs.items()
        }
        inputs = {f"input/{name}": values for name, values in plain.items()}
        write_arrays(path, inputs | {"outputs": self.outputs})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            BundleError: if it cannot be read.
        """
        arrays = read_arrays(path, ("outputs",))
        inputs = under("input/", arrays)
        if CATEGORICAL in inputs:
            inputs[CATEGORICAL] = inputs[CATEGORICAL].astype(object)
        return cls(inputs=inputs, outputs=arrays["outputs"])


class TableBundle:
    """One exported model of tables, ready to serve; open it once in each process.

    Args:
        folder: of the bundle.
        manifest: checked.
        threads: that one call may use.
    """

    graph = GRAPH

    def __init__(self, folder: Path, manifest: TableManifest, threads: int = 1) -> None:
        self.folder = folder
        self.manifest = manifest
        self._session = open_session(folder / GRAPH, threads)

    @classmethod
    def open(cls, path: str | Path, *, threads: int = 1) -> Self:
        """Open a bundle: check each file's digest, load it and replay its golden batch.

        Raises:
            BundleError: naming the file that is missing, altered, of another bundle or unusable
                here.
        """
        folder = Path(path)
        manifest = TableManifest.read(folder)
        manifest.check_files(folder)
        bundle = cls(folder, manifest, threads)
        bundle.replay(TableGolden.read(folder / GOLDEN))
        return bundle

    def run(self, inputs: dict[str, Array]) -> Float32:
        """Run the graph on its inputs by name."""
        outputs: Float32 = self._session.run(None, inputs)[0]
        return outputs

    def raw(self, rows: Rows) -> Float32:
        """Return what the graph gives for rows: `[N, K]`, or `[N]` for a plain regression.

        Raises:
            RequestError: if the rows lack a column that the model reads, or a value is none that
                its column takes.
        """
        inputs = matrices(rows, self.manifest.columns)
        count = len(next(iter(inputs.values())))
        if count <= _AT_ONCE:
            return self.run(inputs)
        starts = range(0, count, _AT_ONCE)
        pieces = [{n: v[i : i + _AT_ONCE] for n, v in inputs.items()} for i in starts]
        return np.concatenate([self.run(piece) for piece in pieces])

    def predict_proba(self, rows: Rows) -> Float32:
        """Return the probability of each class `[N, K]`, in the order of the manifest's classes.

        Args:
            rows: mappings, a mapping of columns, a frame of polars or pandas, or an array in column
                order.

        Raises:
            RequestError: as of `raw`, or if the model predicts no classes.
        """
        if self.manifest.task != "classification":
            raise RequestError(f"{self.folder} predicts a number, and no probabilities")
        return self.raw(rows)

    def predict(self, rows: Rows) -> NDArray[Any]:
        """Return the likeliest label of each row, or its predicted value, `[N]`.

        Several quantiles give `[N, Q]`.

        Raises:
            RequestError: as of `raw`.
        """
        outputs = self.raw(rows)
        return self.labels[outputs.argmax(1)] if self.manifest.classes else outputs

    def score(self, rows: Rows) -> Float32:
        """Return one number a row `[N]`: the probability of the second of two classes, or a value.

        More classes or quantiles give `[N, K]`.

        Raises:
            RequestError: as of `raw`.
        """
        outputs = self.raw(rows)
        return outputs[:, 1] if len(self.manifest.classes) == 2 else outputs

    @cached_property
    def labels(self) -> NDArray[Any]:
        """The classes as they were in training, in the order of the probabilities."""
        classes = self.manifest.classes
        if self.manifest.labels == "boolean":
            return np.array([text == "true" for text in classes])
        kinds: dict[str, type] = {"integer": int, "number": float}
        return np.array([kinds.get(self.manifest.labels, str)(text) for text in classes])

    def example(self) -> dict[str, Array]:
        """Return inputs of the graph by name, of one row."""
        golden = TableGolden.read(self.folder / GOLDEN)
        return {name: values[:1] for name, values in golden.inputs.items()}

    def replay(self, golden: TableGolden) -> None:
        """Compute the golden batch again.

        Raises:
            BundleError: if this machine's answers are not those of the export.
        """
        difference = largest_difference(self.run(golden.inputs), golden.outputs)
        if not difference <= _TOLERANCE:
            raise BundleError(
                f"{self.folder / GRAPH} scores its golden batch {difference:.2g} apart from its "
                f"export, more than {_TOLERANCE:g}; this onnxruntime cannot serve it"
            )


def largest_difference(found: Array, expected: Array) -> float:
    """Between predictions, as a share of the largest one where that is above 1; 0 of no rows."""
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / scale
