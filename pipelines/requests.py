"""Requests to score: files of several forms become one, and what cannot be scored is named."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from hashtab.features.dataset import Dataset
from hashtab.features.encoders import FIRST_ID, Encoder, Scaler, Vocabulary
from hashtab.features.plain import did_you_mean
from hashtab.features.samples import TIME_FEATURE_SIZES
from hashtab.features.sources import (
    ITEM,
    LABEL,
    TIME,
    USER,
    SourceFile,
    key,
    microseconds,
)
from hashtab.features.storage import map_arrow
from hashtab.features.tables import INDEX, ROW
from hashtab.pipelines.table_files import find_files, hashes, one_line, scan
from hashtab.serving.bundle import Bundle
from hashtab.serving.errors import RequestError
from hashtab.serving.manifest import BundleManifest

REQUEST, USER_COLUMN, CANDIDATES, CANDIDATE, TIME_COLUMN = (
    "request",
    "user",
    "candidates",
    "candidate",
    "time",
)
_WHAT = "requests"
_OTHERS = "_different_"  # before a column: how many values of it one request's rows have


@dataclass(frozen=True, kw_only=True)
class RequestFiles:
    """Files of requests, all of one form.

    A request has a `user`, its candidates as a list `candidates` or one a row in `candidate`, a
    `time` if the model reads features of it, and a column for each context feature: one value, or
    a list with one for each candidate. `request` names it; without, its row number does, and one
    candidate a row needs it.

    Args:
        paths: CSV or Parquet, in order.
        one_a_row: whether a row is a candidate and not a request.
        columns: name -> type, those that are read.
        types: of the columns that a CSV does not tell rightly: "007" may be text, 5 may be 5.0.
        text_users: whether the model knows users as text, and not as integers.
        ignored: columns that are not.
    """

    paths: tuple[Path, ...]
    one_a_row: bool
    columns: dict[str, pl.DataType]
    types: dict[str, type[pl.DataType]]
    text_users: bool
    ignored: tuple[str, ...]

    @classmethod
    def find(cls, pattern: str, bundle: Bundle) -> "RequestFiles":
        """Find files by a path, a folder or a glob, and check their columns.

        Raises:
            RequestError: if there is none, or a file lacks a column that the model reads.
        """
        paths = find_files(pattern, _WHAT)
        manifest, types = bundle.manifest, _types(bundle)
        schema = dict(scan(paths, types, _WHAT).collect_schema())
        one_a_row = CANDIDATE in schema
        if not one_a_row and CANDIDATES not in schema:
            raise RequestError(
                f"{paths[0]} needs a column {CANDIDATES!r} with lists of items or {CANDIDATE!r} "
                f"with one item a row{did_you_mean(CANDIDATES, list(schema))}"
            )
        wanted = [USER_COLUMN, CANDIDATE if one_a_row else CANDIDATES, *context_columns(manifest)]
        wanted += [REQUEST] if one_a_row else []
        for name in wanted:
            if name not in schema:
                raise RequestError(
                    f"{paths[0]} has no column {name!r}, which the model reads"
                    f"{did_you_mean(name, list(schema))}"
                )
        wanted += [REQUEST] if REQUEST in schema and not one_a_row else []
        _check_types(paths[0], schema, one_a_row, manifest)
        return cls(
            paths=paths,
            one_a_row=one_a_row,
            columns={name: schema[name] for name in wanted},
            types=types,
            text_users=manifest.text_users,
            ignored=tuple(name for name in schema if name not in wanted),
        )

    def hashes(self) -> list[SourceFile]:
        """Return name, size and sha256 of each file."""
        return hashes(self.paths)

    def write(self, target: Path, rows_per_group: int) -> int:
        """Write all requests as Parquet, one a row, in the order of the files.

        Its columns are `request`, `user`, `candidates` as lists, `time` in microseconds and each
        context feature.

        Returns:
            The number of requests.

        Raises:
            RequestError: if a file cannot be read to its end, a request's name comes twice, or a
                list of context has another length than its candidates.
        """
        frame = scan(self.paths, self.types, _WHAT).select(*self.columns)
        user = _user(self.columns[USER_COLUMN], self.text_users)
        frame = frame.with_columns(user.alias(USER_COLUMN))
        if TIME_COLUMN in self.columns:
            time = microseconds(TIME_COLUMN, self.columns[TIME_COLUMN], None)
            frame = frame.with_columns(time.alias(TIME_COLUMN))
        if self.one_a_row:
            frame = _together(frame, [n for n in self.columns if n not in (REQUEST, CANDIDATE)])
        elif REQUEST not in self.columns:
            frame = frame.with_row_index(REQUEST).cast({REQUEST: pl.Int64})
        frame = frame.with_columns(pl.col(CANDIDATES).fill_null([]))
        frame = frame.with_columns(self._missing_lists())
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            frame.sink_parquet(temporary, row_group_size=rows_per_group)
        except pl.exceptions.PolarsError as error:
            raise RequestError(
                f"requests {self.paths[0]} cannot be read: {one_line(error)}"
            ) from error
        count = self._check(temporary)
        temporary.replace(target)
        return count

    def _missing_lists(self) -> list[pl.Expr]:
        """A list of context that is missing lacks a value for each candidate."""
        nothing = pl.lit(None).repeat_by(pl.col(CANDIDATES).list.len())
        return [
            pl.col(name).fill_null(nothing.cast(dtype))
            for name, dtype in self.columns.items()
            if isinstance(dtype, pl.List) and name != CANDIDATES
        ]

    def _check(self, written: Path) -> int:
        requests = pl.scan_parquet(written)
        names = requests.select(REQUEST).collect()[REQUEST]
        if names.null_count():
            raise RequestError(f"{self.paths[0]}: {names.null_count()} requests have no name")
        if names.n_unique() != len(names):
            twice = names.filter(names.is_duplicated())[0]
            raise RequestError(f"request {twice!r} comes more than once: names must be unique")
        for name, dtype in requests.collect_schema().items():
            if name.startswith(_OTHERS):
                wrong = requests.filter(pl.col(name) > 1).select(REQUEST).head(1).collect()
                if len(wrong):
                    raise RequestError(
                        f"the rows of request {wrong[REQUEST][0]!r} have more than one "
                        f"{name.removeprefix(_OTHERS)}: names of requests must be unique"
                    )
            elif isinstance(dtype, pl.List) and name != CANDIDATES:
                uneven = pl.col(name).list.len() != pl.col(CANDIDATES).list.len()
                wrong = requests.filter(uneven).select(REQUEST).head(1).collect()
                if len(wrong):
                    raise RequestError(
                        f"request {wrong[REQUEST][0]!r}: the list {name!r} must have one value for "
                        "each candidate"
                    )
        return len(names)


def context_columns(manifest: BundleManifest) -> list[str]:
    """Return the columns of a request that the model reads besides user and candidates."""
    names = [f.name for f in manifest.features.context if f.name not in manifest.time_features]
    return [*names, *([TIME_COLUMN] if manifest.time_features else [])]


def _types(bundle: Bundle) -> dict[str, type[pl.DataType]]:
    """Return the types that a CSV's columns are read as; others are read as they look."""
    manifest, encoders = bundle.manifest, bundle.encoders
    types: dict[str, type[pl.DataType]] = {}
    for name in context_columns(manifest):
        encoder = encoders.get(name)
        if isinstance(encoder, Scaler):
            types[name] = pl.Float64
        elif encoder is not None and any(map(_altered_by_parsing, encoder.values)):
            types[name] = pl.String
    types[USER_COLUMN] = pl.String  # whole numbers too: no text among them may end the reading
    if manifest.text_items:
        types[CANDIDATE] = pl.String
    return types


def _altered_by_parsing(value: int | str) -> bool:
    """Whether a category looks like a number, truth or time, but is not what one is kept as."""
    if not isinstance(value, str):
        return False
    if value.lower() in ("true", "false"):
        return value != value.lower()
    if not re.match(r"[+-]?\.?\d", value):
        return False
    if re.fullmatch(r"\d{4}-\d\d-\d\d( \d\d:\d\d:\d\d\.\d{6})?", value):
        return False
    for kind in (int, float):
        with suppress(ValueError):
            if str(kind(value)) == value:
                return False
    return True


def _user(dtype: pl.DataType, text: bool) -> pl.Expr:
    """Users as the model's log had them; null, and so unknown, where they cannot be.

    Where one is missing, other programs write whole numbers as 7.0.
    """
    if dtype.is_float():
        whole = pl.col(USER_COLUMN).cast(pl.Int64, strict=False)
        users = pl.when(whole == pl.col(USER_COLUMN)).then(whole).otherwise(None)
        return users.cast(pl.String) if text else users
    users = key(USER_COLUMN, dtype)
    if text or dtype.is_integer():
        return users.cast(pl.String if text else pl.Int64, strict=False)
    return users.str.strip_chars().str.replace(r"\.0+$", "").cast(pl.Int64, strict=False)


def _check_types(
    path: Path, schema: dict[str, pl.DataType], one_a_row: bool, manifest: BundleManifest
) -> None:
    if not one_a_row and not isinstance(schema[CANDIDATES], pl.List):
        raise RequestError(
            f"{path}: {CANDIDATES!r} must be a list, got {schema[CANDIDATES]}; in CSV give one "
            f"candidate a row, in a column {CANDIDATE!r}, with {REQUEST!r} naming the request"
        )
    for feature in manifest.features.context:
        dtype = schema.get(feature.name)
        inner = dtype.inner if isinstance(dtype, pl.List) and not one_a_row else dtype
        number = inner is None or inner.is_numeric() or inner in (pl.Boolean, pl.Null)
        if inner is not None and (inner.is_nested() or not (number or feature.kind != "numeric")):
            raise RequestError(
                f"{path}: {feature.name!r} must hold one {feature.kind} value a request or "
                f"candidate, got {dtype}"
            )
    time = schema.get(TIME_COLUMN)
    if manifest.time_features and not isinstance(time, pl.Datetime | pl.Date):
        raise RequestError(f"{path}: {TIME_COLUMN!r} must be a date or time (UTC), got {time}")


def _together(rows: pl.LazyFrame, others: list[str]) -> pl.LazyFrame:
    """Join the rows of each request; context becomes a list with a value for each candidate."""
    single = (USER_COLUMN, TIME_COLUMN)
    return rows.group_by(REQUEST, maintain_order=True).agg(
        pl.col(CANDIDATE).alias(CANDIDATES),
        *(pl.col(name).first() if name in single else pl.col(name) for name in others),
        *(pl.col(name).n_unique().alias(f"{_OTHERS}{name}") for name in single if name in others),
    )


def write_split(dataset: Dataset, split: str, target: Path) -> None:
    """Write the requests of a split as people have them: raw values, with labels beside them.

    The file is written whole or not at all. One row a request: `request`, `user`, `time`,
    `candidates`, context as lists, and `labels`.
    """
    folder, manifest = dataset.folder, dataset.manifest
    temporary = target.with_name(f".{target.name}.tmp")
    shards = [
        pl.DataFrame(map_arrow(folder / "samples" / split / f"{shard:05d}.arrow"))
        for shard in range(manifest.shards)
    ]
    users = pl.read_ipc(folder / "tables" / "users.arrow")[USER]
    items = pl.read_ipc(folder / "tables" / "catalogue.arrow")[ITEM]
    samples = pl.concat(shards)
    context = {
        f.name: _raw(samples[f.name], dataset.encoders[f.name])
        for f in manifest.features.context
        if f.name not in TIME_FEATURE_SIZES
    }
    samples.select(
        users.gather(samples[INDEX]).alias(USER_COLUMN),
        pl.col(TIME).cast(pl.Datetime("us")).alias(TIME_COLUMN),
        items.gather(samples[ROW]).alias(CANDIDATES),
        **context,
        labels=pl.col(LABEL),
    ).group_by(USER_COLUMN, TIME_COLUMN, maintain_order=True).agg(pl.all()).with_row_index(
        REQUEST
    ).write_parquet(temporary)
    temporary.replace(target)


def _raw(ids: pl.Series, encoder: Encoder) -> pl.Series:
    """Return the values that were encoded; unknown ones become null."""
    if isinstance(encoder, Vocabulary):
        values = pl.Series([None] * FIRST_ID + list(encoder.values))
        return values.gather(ids)
    return ids.cast(pl.Float64) * encoder.std + encoder.mean
