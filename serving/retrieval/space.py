"""The space of retrieval: where the inner product of a user and an item ranks items for the user.

Behaviours of one user, and those of all, are taken for two normal clouds of one covariance. The
logarithm of how much likelier an item is in the user's cloud is then linear in the item's vector v,

    (m - mu) (Sigma + ridge)^-1 v + log(1 + times the item was met),

with m the mean of the user's behaviours, from the table, and mu that of all. It is one inner
product, so an index finds the best items; a user without history gets the popular ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hashtab.serving.golden import read_arrays, write_arrays
from hashtab.serving.retrieval.vectors import mean_behaviour
from hashtab.serving.store import UserRecord

# Chosen on Complete Journey's validation weeks; experiments/bench_retrieval.py shows the choice.
RIDGE = 0.5  # of the mean variance of a component
SHRINKAGE = 30  # behaviours of everyone that a user's own are averaged with

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_LEAST = 1e-3  # of a direction's mean energy, for directions in which no user differs


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """How users and items come to their vectors of D + 1 components.

    Items are turned so that the distance of two is how differently users rate them, on average:
    an index made of cells then needs to look into few of them.

    Args:
        centre: `[D]` float64, mean behaviour of all users.
        users: `[D + 1, D]` float64, of what sets a user apart to a query.
        nobody: `[D + 1]` float64, query of a user without history.
        items: `[D + 1, D + 1]` float64, of an item's vector and log(1 + count) to its place.
    """

    centre: Float64
    users: Float64
    nobody: Float64
    items: Float64

    @classmethod
    def fit(cls, vectors: Float32, counts: Float64, means: Float64, behaviours: Float64) -> "Space":
        """Fit the space to items and to a sample of users.

        Args:
            vectors: `[N, D]`, of the items.
            counts: `[N]`, times each item was met; of an item without any it is 0.
            means: `[U, D]`, mean behaviour of each user.
            behaviours: `[U]`, behaviours of each user.
        """
        weight = counts / counts.sum() if counts.any() else np.full(len(counts), 1 / len(counts))
        centred = vectors - weight @ vectors
        size = vectors.shape[1]
        covariance = (centred * weight[:, None]).T @ centred
        # A catalogue of one item has no variance at all.
        ridge = RIDGE * max(np.trace(covariance) / size, np.finfo(np.float32).eps)
        inverse = np.linalg.inv(covariance + ridge * np.eye(size))
        centre = behaviours @ means / max(behaviours.sum(), 1)
        apart = (means - centre) * _own_share(behaviours)[:, None]
        queries = np.column_stack([apart @ inverse, np.ones(len(means))])
        turn, back = _roots(queries)
        return cls(centre=centre, users=back[:, :-1] @ inverse, nobody=back[:, -1], items=turn)

    def place(self, vectors: Float32, counts: Float64) -> Float32:
        """Return the places of items, `[N, D + 1]` float32."""
        whole = np.column_stack([vectors, np.log1p(counts)])
        return np.ascontiguousarray(whole @ self.items, np.float32)

    def query(self, record: UserRecord) -> Float32:
        """Return a user's query, `[D + 1]` float32."""
        means, behaviours = mean_behaviour(record)[None], np.array([record.behaviours], float)
        query: Float32 = self.queries(means, behaviours)[0]
        return query

    def queries(self, means: Float64, behaviours: Float64) -> Float32:
        """Return the queries of users, `[U, D + 1]` float32; arguments as of `fit`."""
        apart = (means - self.centre) * _own_share(behaviours)[:, None]
        return np.ascontiguousarray(apart @ self.users.T + self.nobody, np.float32)

    def write(self, path: Path) -> None:
        """Write the arrays as one npz file."""
        write_arrays(path, self.__dict__)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            BundleError: if it cannot be read.
        """
        names = tuple(cls.__dataclass_fields__)
        arrays = read_arrays(path, names)
        return cls(**{name: arrays[name] for name in names})


def _own_share(behaviours: Float64) -> Float64:
    return behaviours / (behaviours + SHRINKAGE)


def _roots(queries: Float64) -> tuple[Float64, Float64]:
    """Return the root of the queries' second moment `[D, D]` and its inverse."""
    moment = queries.T @ queries / len(queries)
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, _LEAST * values.mean())
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
