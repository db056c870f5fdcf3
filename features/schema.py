"""How one behaviour log is declared: which files and columns play which role.

A schema is the only thing that differs between data sets. It is a frozen dataclass in Python and
the same names in YAML, where an unknown or misspelt key is an error.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from hashtab.features.errors import DataError
from hashtab.features.plain import build

TimeUnit = Literal["s", "ms", "us", "ns"]
TimeFeature = Literal["hour", "weekday"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Files that hold one table.

    Args:
        files: a path, a glob or several of them; CSV (`.csv`, `.csv.gz`) or Parquet. All must have
            the columns that the schema names, of one type.
        reader: optional `"package.module:function"` for logs of another form: called with the list
            of paths, returns a `polars.LazyFrame` with the named columns.
    """

    files: str | tuple[str, ...]
    reader: str | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise DataError(f"files must name at least one file, got {self.files!r}")
        if self.reader is not None and self.reader.count(":") != 1:
            raise DataError(f"reader must read 'package.module:function', got {self.reader!r}")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The paths and globs, also where a single one is given."""
        return (self.files,) if isinstance(self.files, str) else self.files


@dataclass(frozen=True, kw_only=True)
class Behaviours(Table):
    """What users did: the log that histories are made of.

    Args:
        user: column of the user, integer or string.
        item: column of the item, integer or string; its name is the name of the item feature.
        time: column of the time: a datetime, or a number in `time_unit` since 1970.
        time_unit: unit of a numeric time; datetimes need none.
        session: optional column; behaviours of one user with one session value (a basket, a page)
            are one request, made at the session's first time.
        categorical: side features of a behaviour.
        numeric: side features of a behaviour.
    """

    user: str
    item: str
    time: str
    time_unit: TimeUnit | None = None
    session: str | None = None
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        roles = {"user": self.user, "item": self.item, "time": self.time}
        if self.session is not None:
            roles["session"] = self.session
        _refuse_twice("behaviours", [*roles.items(), *_feature_roles(self)])


@dataclass(frozen=True, kw_only=True)
class Exposures(Table):
    """What users were shown, and whether they responded.

    Args:
        user: column of the user.
        item: column of the item shown.
        time: column of the request's time.
        label: column with 1 for a response and 0 for none.
        time_unit: unit of a numeric time; datetimes need none.
    """

    user: str
    item: str
    time: str
    label: str
    time_unit: TimeUnit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("user", "item", "time", "label")
        _refuse_twice("exposures", [(name, getattr(self, name)) for name in names])


@dataclass(frozen=True, kw_only=True)
class Items(Table):
    """What is known about items, whenever it is asked; a missing value is an unknown category.

    Args:
        item: column of the item, one row for each.
        categorical: features of behaviours and candidates alike.
        numeric: features of behaviours and candidates alike; scaled, missing values become 0.
    """

    item: str
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_twice("items", [("item", self.item), *_feature_roles(self)])


@dataclass(frozen=True, kw_only=True)
class Pool(Table):
    """What could have been shown to whom: the exposure rule of a log without exposures.

    A behaviour was an exposure if its item is in the pool of its `on` values; negatives are drawn
    from the same pool.

    Args:
        item: column of the item.
        on: columns that the pool shares with the behaviours, for example store and week.
        categorical: how the item was shown; context features of the exposure.
        numeric: likewise.
    """

    item: str
    on: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.on:
            raise DataError("pool: on must name the columns shared with the behaviours, got ()")
        keys = [("on", name) for name in self.on]
        _refuse_twice("pool", [("item", self.item), *keys, *_feature_roles(self)])


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """How negatives are drawn where the log has none; drawn once, with replacement, and stored.

    Args:
        name: name of the evaluation sets drawn so, `test_<name>`; the first of a schema is the main
            protocol and its sets are `train`, `validation` and `test`.
        scheme: `"popularity"` draws an item with probability proportional to its behaviours in
            training time, as positives are; `"uniform"` draws each item alike.
        per_positive: negatives for each positive.
        seed: of the draws; one positive's draws depend on the seed, its user and its request only.
    """

    name: str
    scheme: Literal["popularity", "uniform"]
    per_positive: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise DataError(f"negatives: name must be an identifier, got {self.name!r}")
        if self.per_positive < 1:
            raise DataError(f"negatives: per_positive must be positive, got {self.per_positive=}")
        if self.seed < 0:
            raise DataError(f"negatives: seed must not be negative, got {self.seed=}")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is known at request time, besides the pool's features.

    Args:
        time: features of the request's time (UTC).
        categorical: columns of the exposures, or of the behaviours where there are none (a negative
            has those of its positive).
        numeric: likewise.
    """

    time: tuple[TimeFeature, ...] = ()
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        times = [("time", name) for name in self.time]
        _refuse_twice("context", [*times, *_feature_roles(self)])


@dataclass(frozen=True, kw_only=True)
class Split:
    """The temporal split; both ends belong to the earlier side.

    Args:
        train_until: last value of the training part: a time such as `"2024-03-01T12:00:00"` or a
            date, which includes that whole day (UTC); an integer where `column` is given.
        validate_until: last value of the validation part; what is later is the test part.
        column: optional integer column that rises with time, for example a week, in place of the
            time itself. Behaviours and exposures must both have it.
    """

    train_until: int | str
    validate_until: int | str
    column: str | None = None

    def __post_init__(self) -> None:
        wanted = str if self.column is None else int
        for name in ("train_until", "validate_until"):
            value = getattr(self, name)
            if not isinstance(value, wanted):
                raise DataError(
                    f"split: {name} must be an integer with a column and a time without, "
                    f"got {value!r} with column={self.column!r}"
                )
        if self.column is not None and int(self.train_until) >= int(self.validate_until):
            raise DataError(
                f"split: train_until must be less than validate_until, "
                f"got {self.train_until} and {self.validate_until}"
            )


@dataclass(frozen=True, kw_only=True)
class Schema:
    """One data set.

    Args:
        name: of the data set.
        split: where training, validation and test time end.
        behaviours: the log of histories. May be left out where there are exposures: then a response
            is a behaviour.
        exposures: what was shown, with labels. Left out where the log has none: then each behaviour
            is a positive and negatives are drawn.
        items: item features.
        pool: what could have been shown; without it, negatives are items with a behaviour before
            the request.
        negatives: how negatives are drawn; the first is the main protocol.
        once_per: optional column of the behaviours, for example a week: within it a user's item is
            a positive once, at its first time, and never a negative. Without it the same holds
            within a request.
        context: what is known at request time.
        counters: the item column or categorical item features: each counts how often the user had
            met the candidate's value before the request.
    """

    name: str
    split: Split
    behaviours: Behaviours | None = None
    exposures: Exposures | None = None
    items: Items | None = None
    pool: Pool | None = None
    negatives: tuple[Negatives, ...] = ()
    once_per: str | None = None
    context: Context = field(default_factory=Context)
    counters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not set(self.name) <= _NAME_CHARACTERS:
            raise DataError(f"name must be letters, digits, '-' and '_', got {self.name!r}")
        self._check_logs()
        self._check_features()
        _refuse_twice("counters", [("counter", name) for name in self.counters])
        unknown = set(self.counters) - {self.item_name, *self.item_categorical}
        if unknown:
            raise DataError(
                f"counters must be the item column or categorical item features, "
                f"got {sorted(unknown)}; known: {[self.item_name, *self.item_categorical]}"
            )

    def _check_logs(self) -> None:
        if self.behaviours is None and self.exposures is None:
            raise DataError("a schema needs behaviours, exposures or both, got neither")
        drawn = bool(self.negatives or self.pool or self.once_per)
        if self.exposures is not None and drawn:
            raise DataError(
                "exposures have labels, so nothing is drawn: leave out negatives, pool and once_per"
            )
        if self.exposures is None and not self.negatives:
            raise DataError("a log without exposures needs negatives: say how they are drawn")
        _refuse_twice("negatives", [("name", rule.name) for rule in self.negatives])

    def _check_features(self) -> None:
        items = [(f"items.{role}", name) for role, name in _feature_roles(self.items)]
        context = [(f"context.{role}", name) for role, name in _feature_roles(self.context)]
        context += [("context.time", name) for name in self.context.time]
        context += [(f"pool.{role}", name) for role, name in _feature_roles(self.pool)]
        side = [(f"behaviours.{role}", name) for role, name in _feature_roles(self.behaviours)]
        item = [("item", self.item_name), *items]
        _refuse_twice("features", [*item, *context])
        _refuse_twice("features", [*item, *side])
        self._check_shared({name: role for role, name in context}, side)
        for role, name in (*item, *context, *side):
            if name.startswith("_"):
                raise DataError(
                    f"{role}: {name!r} begins with '_', as our own do; rename the column"
                )

    def _check_shared(self, context: dict[str, str], side: list[tuple[str, str]]) -> None:
        """A behaviour's side feature may be a context feature too, if it has one meaning."""
        for role, name in side:
            other = context.get(name, role)
            if other.rpartition(".")[2] != role.rpartition(".")[2]:
                raise DataError(
                    f"{name!r} is named as {role} and as {other}; one name has one kind, "
                    "rename one of the columns"
                )

    @property
    def log(self) -> Behaviours | Exposures:
        """The log that histories come from."""
        log = self.behaviours or self.exposures
        assert log is not None  # checked on construction
        return log

    @property
    def item_name(self) -> str:
        """Name of the item feature."""
        return self.log.item

    @property
    def item_categorical(self) -> tuple[str, ...]:
        """Names of the categorical item features, without the item itself."""
        return self.items.categorical if self.items else ()

    @property
    def item_numeric(self) -> tuple[str, ...]:
        """Names of the numeric item features."""
        return self.items.numeric if self.items else ()

    @property
    def side_categorical(self) -> tuple[str, ...]:
        """Names of the categorical side features of a behaviour."""
        return self.behaviours.categorical if self.behaviours else ()

    @property
    def side_numeric(self) -> tuple[str, ...]:
        """Names of the numeric side features of a behaviour."""
        return self.behaviours.numeric if self.behaviours else ()

    @property
    def side(self) -> tuple[str, ...]:
        """Names of all side features of a behaviour."""
        return (*self.side_categorical, *self.side_numeric)

    @property
    def tables(self) -> dict[str, Table]:
        """The declared tables by role."""
        roles = ("behaviours", "exposures", "items", "pool")
        return {role: getattr(self, role) for role in roles if getattr(self, role) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as plain data, as JSON and YAML hold it."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """Build a schema from plain data.

        Raises:
            DataError: for unknown keys, wrong types and contradictions, naming the key.
        """
        schema: Self = build(cls, plain, "schema")
        return schema

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a schema; relative `files` are relative to the folder of the YAML file."""
        try:
            plain = yaml.load(Path(path).read_text(), Loader=_Yaml)
        except OSError as error:
            raise DataError(f"schema {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise DataError(f"schema {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(plain, dict):
            raise DataError(f"schema {path} must be a mapping, got {type(plain).__name__}")
        for table in plain.values():
            if isinstance(table, dict) and "files" in table:
                table["files"] = _beside(Path(path).parent, table["files"])
        return cls.from_dict(plain)

    def digest(self) -> str:
        """Digest of the declaration; where the files lie is left out, what they hold is hashed."""
        plain = self.to_dict()
        for role in self.tables:
            plain[role]["files"] = [Path(name).name for name in self.tables[role].patterns]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


class _Yaml(yaml.SafeLoader):
    """Leaves dates as they are written."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the loader's own way to declare them)
        first: [(tag, expression) for tag, expression in resolvers if "timestamp" not in tag]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _once(loader: _Yaml, node: yaml.MappingNode) -> dict[str, Any]:
    """Build a mapping; a key that stands twice would hide its first value."""
    pairs = loader.construct_pairs(node, deep=True)
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {name!r} stands there twice", node.start_mark
            )
    return dict(pairs)


_Yaml.add_constructor("tag:yaml.org,2002:map", _once)


def _beside(folder: Path, files: Any) -> Any:
    """Resolve paths; what is none is left for the check of types."""
    if isinstance(files, str):
        return str(folder / files)
    return [_beside(folder, name) for name in files] if isinstance(files, list) else files


def _feature_roles(table: Any) -> list[tuple[str, str]]:
    if table is None:
        return []
    return [(role, name) for role in ("categorical", "numeric") for name in getattr(table, role)]


def _refuse_twice(place: str, roles: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for role, column in roles:
        if column in seen:
            raise DataError(
                f"{place}: {column!r} is named twice, as {seen[column]} and as {role}; "
                "one column plays one role"
            )
        seen[column] = role
