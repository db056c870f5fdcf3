"""How much each behaviour of a user has in the interest that the scorer reads for a candidate."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashtab.serving.bundle import Bundle
from hashtab.serving.retrieval import item_columns
from hashtab.serving.store import SCALE, UserRecord

Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """The parts of L behaviours in one interest.

    The interest of a candidate q is the mean over the groups g of table[g, code_g(q)] divided by
    its norm, and that bucket is the sum of the vectors s_j of the behaviours j that were hashed
    there. So it is the sum of weight_j * s_j with

        weight_j = sum over the groups g in which j and q share a bucket of 1 / (G * norm_g),

    exactly, if all behaviours of the table are here. For mean pooling it is 1 / behaviours.

    Args:
        interest: `[D]`, as the table gives it.
        weights: `[L]`, see above.
        shares: `[L]`, part of the interest's length: weight_j * s_j along the interest, divided by
            its norm; those of all behaviours in the table add up to 1, unless the interest is 0.
        shared_groups: `[L]`, groups in which the behaviour shares the candidate's bucket.
    """

    interest: Float64
    weights: Float64
    shares: Float64
    shared_groups: NDArray[np.int64]


def shares_of(bundle: Bundle, record: UserRecord, row: int, codes: Int32, vectors: Int32) -> Shares:
    """Return how much behaviours have in the interest read for a candidate.

    Args:
        bundle: whose model keeps a table.
        record: of the user.
        row: catalogue row of the candidate, -1 for an unknown item.
        codes: `[L, G]`, of behaviours in the table, as the bundle encodes them.
        vectors: `[L, D]`, of the same, in fixed point.
    """
    _, wanted, _ = bundle.encode(item_columns(bundle, np.array([row])))
    groups = bundle.layout.groups
    buckets = record.table[np.arange(groups), wanted[0]] / SCALE
    if bundle.manifest.counts_behaviours:  # the mean of the only bucket, which is not normalised
        each = np.full(groups, 1 / max(record.behaviours, 1))
    else:
        norms = np.linalg.norm(buckets, axis=1)
        each = np.divide(1 / groups, norms, out=np.zeros(groups), where=norms > 0)
    interest = each @ buckets
    shared = codes == wanted[0]
    weights = shared @ each
    along = (vectors / SCALE) @ interest
    length = interest @ interest
    return Shares(
        interest=interest,
        weights=weights,
        shares=weights * along / length if length else np.zeros(len(weights)),
        shared_groups=shared.sum(axis=1),
    )
