"""How often a user met each candidate: `Bundle.counters` without its searches."""

import numpy as np
from numpy.typing import NDArray

from hashtab.serving.bundle import Bundle, Float32
from hashtab.serving.store import UserRecord

_SEARCHED = 4  # values that a user has met, for each candidate, from which on these are searched
UInt32 = NDArray[np.uint32]


class CounterReader:
    """Reads a user's counters in tables that are cleared after each user: by one thread alone.

    A candidate costs two reads where `Bundle.counters` searches a user's keys for it; of a user who
    has met so many more values than there are candidates, they are searched here too.

    Args:
        bundle: of the model.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._names = bundle.layout.counters
        self._counted = {name: bundle.counted(name) for name in self._names}
        self._met = {
            name: np.zeros(int(counted.max(initial=0)) + 1, np.float32)
            for name, counted in self._counted.items()
        }

    def read(self, record: UserRecord, rows: NDArray[np.int64]) -> Float32:
        """Return log(1 + times the user met each candidate's value), `[C, K]`.

        Args:
            record: of the user.
            rows: `[C]`, catalogue row of each candidate, -1 where it is unknown.
        """
        counts = np.empty((len(rows), len(self._names)), np.float32)
        for k, name in enumerate(self._names):
            keys, times = record.counters[name]
            wanted = self._counted[name][rows]
            if len(keys) > _SEARCHED * len(rows):
                counts[:, k] = _search(keys, times, wanted)
            else:
                counts[:, k] = self._look_up(name, keys, times, wanted)
        return np.log1p(counts)

    def _look_up(
        self, name: str, keys: UInt32, times: UInt32, wanted: NDArray[np.int64]
    ) -> Float32:
        met = self._met[name]
        known = keys < len(met)  # a record may count what this catalogue does not know
        if not known.all():
            keys, times = keys[known], times[known]
        met[keys] = times
        found: Float32 = met[wanted]
        met[keys] = 0
        return found


def _search(keys: UInt32, times: UInt32, wanted: NDArray[np.int64]) -> NDArray[np.uint32]:
    wanted = wanted.astype(np.uint32)
    place = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, times[place], 0)
