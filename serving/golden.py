"""Golden batches: inputs and answers that a bundle carries, to be replayed where it is loaded."""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from hashtab.features.storage import Array
from hashtab.serving.errors import BundleError


@dataclass(frozen=True, kw_only=True)
class GoldenBatch:
    """What went into the two graphs of a click model at export, and what came out.

    Args:
        scorer_inputs: by name, of U users and C candidates.
        scores: `[U, C]` float32.
        encoder_inputs: by name, of U users and L behaviours; empty for a model without a table.
        increments: `[U, G, buckets, D]` int32.
        codes: `[U, L, G]` int32.
    """

    scorer_inputs: dict[str, Array]
    scores: Array
    encoder_inputs: dict[str, Array]
    increments: Array
    codes: Array

    def write(self, path: Path) -> None:
        """Write the arrays as one compressed npz file."""
        arrays = {f"scorer/{name}": array for name, array in self.scorer_inputs.items()}
        arrays |= {f"encoder/{name}": array for name, array in self.encoder_inputs.items()}
        answers = {"scores": self.scores, "increments": self.increments, "codes": self.codes}
        write_arrays(path, arrays | answers)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            BundleError: if it cannot be read.
        """
        arrays = read_arrays(path, ("scores", "increments", "codes"))
        return cls(
            scorer_inputs=under("scorer/", arrays),
            scores=arrays["scores"],
            encoder_inputs=under("encoder/", arrays),
            increments=arrays["increments"],
            codes=arrays["codes"],
        )


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as one compressed npz file."""
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read_arrays(path: Path, needed: Iterable[str]) -> dict[str, Array]:
    """Read what `write_arrays` wrote.

    Raises:
        BundleError: if it cannot be read, or lacks an array that is needed.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        for name in needed:
            arrays[name]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}; export the model again") from error
    return arrays


def under(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
