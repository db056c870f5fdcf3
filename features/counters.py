"""How often something had happened before a moment, exactly, for many questions at once."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]


def count_before(
    groups: IntArray, moments: IntArray, asked_groups: IntArray, asked_moments: IntArray
) -> NDArray[np.int64]:
    """Count, for each question, the events of its group at strictly earlier moments.

    One sort and one binary search a question, whatever the lengths. Used for where a sample's
    history ends (group: user, moment: time) and for counters (group: user and value, moment:
    position in the history).

    Args:
        groups: `[N]` group of each event.
        moments: `[N]` moment of each event.
        asked_groups: `[Q]`.
        asked_moments: `[Q]`.

    Returns:
        `[Q]` int64.
    """
    known_groups, group = np.unique(groups, return_inverse=True)
    known_moments, moment = np.unique(moments, return_inverse=True)
    # Dense ranks keep the composite key far from int64's end for any ids and any time unit.
    span = len(known_moments) + 1
    keys = np.sort(group * span + moment)
    asked_group = np.searchsorted(known_groups, asked_groups)
    asked_moment = np.searchsorted(known_moments, asked_moments)
    before = np.searchsorted(keys, asked_group * span + asked_moment)
    start = np.searchsorted(keys, asked_group * span)
    capped = np.minimum(asked_group, max(len(known_groups) - 1, 0))
    met = known_groups[capped] == asked_groups if len(known_groups) else np.zeros(len(before), bool)
    return np.where(met, before - start, 0)
