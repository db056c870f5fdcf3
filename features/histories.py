"""Whole histories of a prepared data set, as of any time, in the ids of any catalogue."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from hashtab.features import encoders
from hashtab.features.catalogue import UNKNOWN_ROW, Catalogue
from hashtab.features.encoders import Encoder, Vocabulary, translation
from hashtab.features.errors import DataError
from hashtab.features.manifest import Manifest
from hashtab.features.sources import TIME, USER
from hashtab.features.storage import Array, map_arrow
from hashtab.features.tables import INDEX, ROW, stable_hash

Int64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Histories of several users in one set of columns. N behaviours of B users.

    Args:
        users: `[B]`, values of the users.
        starts: `[B]` int64, where each user's behaviours begin.
        ends: `[B]` int64, where they end.
        rows: `[N]`, catalogue row of each behaviour's item, -1 where it is unknown.
        times: `[N]` int64, microseconds since 1970 UTC, ascending within a user.
        side: side feature of a behaviour -> `[N]`, int32 ids or float32.
    """

    users: pl.Series
    starts: Int64
    ends: Int64
    rows: Array
    times: Int64
    side: dict[str, Array]

    def __len__(self) -> int:
        return len(self.users)

    def before(self, time: int | None) -> Self:
        """Return what had happened strictly before `time`, microseconds; all of it when None."""
        if time is None:
            return self
        earlier = np.concatenate([[0], np.cumsum(self.times < time)])
        return replace(self, ends=self.starts + earlier[self.ends] - earlier[self.starts])

    def of(self, user: int) -> slice:
        """Return where the behaviours of the user with this index lie."""
        return slice(int(self.starts[user]), int(self.ends[user]))


class HistoryReader:
    """Reads the histories of a prepared data set in the ids of a catalogue and encoders.

    A data set prepared later than a model was trained has learned other ids; values that the
    model's encoders do not know become unknown.

    Args:
        folder: of the prepared data set.
        catalogue: whose rows are wanted; the data set's own when None.
        learned: encoders of the side features wanted; all of the data set, as it is, when None.

    Raises:
        DataError: if the data set lacks a wanted side feature, or has it in another kind.
    """

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue | None = None,
        learned: dict[str, Encoder] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        schema = self.manifest.schema
        own = Catalogue.read(folder / "tables" / "catalogue.arrow", schema.item_name)
        self.catalogue = catalogue or own
        self._rows = np.arange(len(own)) if catalogue is None else catalogue.rows(own.items)
        stored = encoders.load(folder / "tables" / "encoders.json")
        wanted = {name: stored[name] for name in schema.side} if learned is None else learned
        self._translated = {
            name: translation(self._stored(stored, name, encoder), encoder)
            for name, encoder in wanted.items()
        }

    def shard(self, number: int) -> Histories:
        """Return all users of one shard and what they ever did."""
        columns = map_arrow(self.folder / "histories" / f"{number:05d}.arrow")
        stored = map_arrow(self.folder / "users" / f"{number:05d}.arrow")
        ends = stored["history_end"].astype(np.int64)
        return Histories(
            users=self._users[USER].gather(stored[INDEX]),
            starts=np.concatenate([[0], ends[:-1]]).astype(np.int64),
            ends=ends,
            rows=np.append(self._rows, UNKNOWN_ROW)[columns[ROW]],
            times=columns[TIME],
            side={name: turn(columns[name]) for name, turn in self._translated.items()},
        )

    def shard_of(self, user: int | str) -> int:
        """Return the shard that holds a user, whether there is such a user or not."""
        return stable_hash(user) % self.manifest.shards

    @property
    def text_users(self) -> bool:
        """Whether users are text, and not integers."""
        return self._users[USER].dtype == pl.String

    def _stored(self, stored: dict[str, Encoder], name: str, wanted: Encoder) -> Encoder:
        side = self.manifest.schema.side
        if name not in side or type(stored[name]) is not type(wanted):
            raise DataError(
                f"the behaviours of {self.folder} have no {_kind(wanted)} side feature {name!r}, "
                f"which the model reads; they have {list(side)}"
            )
        return stored[name]

    @cached_property
    def _users(self) -> pl.DataFrame:
        path = self.folder / "tables" / "users.arrow"
        return pl.read_ipc(path, columns=[USER])


def _kind(encoder: Encoder) -> str:
    return "categorical" if isinstance(encoder, Vocabulary) else "numeric"
