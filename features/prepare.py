"""From raw files to a finished data set: steps that resume, free of any cluster."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from hashtab.features import encoders, sources
from hashtab.features.encoders import Vocabulary
from hashtab.features.errors import DataError, disk_errors
from hashtab.features.manifest import (
    FILE,
    FORMAT,
    Feature,
    Features,
    FileInfo,
    Manifest,
    SplitInfo,
)
from hashtab.features.partition import partition
from hashtab.features.plain import build
from hashtab.features.samples import TIME_FEATURE_SIZES
from hashtab.features.schema import Schema
from hashtab.features.shards import ShardRecord, prepare_shard, split_names
from hashtab.features.sources import SourceFile
from hashtab.features.statistics import write_statistics
from hashtab.features.storage import TEMPORARY, exclusive, map_arrow, write_text
from hashtab.features.tables import write_tables
from hashtab.features.validation import check

ShardTask = Callable[[int], None]
RunShards = Callable[[ShardTask, Iterable[int]], None]

_LOCK = ".lock"
_QUANTILES = (0, 25, 50, 75, 90, 100)


def one_by_one(task: ShardTask, shards: Iterable[int]) -> None:
    """Run shards in this process, in order."""
    for shard in shards:
        task(shard)


def prepare(
    schema: Schema, output: Path, *, shards: int = 16, run_shards: RunShards = one_by_one
) -> Manifest:
    """Prepare a data set, resume one that was interrupted, or confirm that it is finished.

    Everything is built in a sibling folder of `output` whose name holds the digest of schema,
    input, layout and code; it is renamed to `output` at the very end. Each file appears by rename,
    so a killed run leaves only whole files and the next one goes on from there.

    Args:
        schema: of the data set.
        output: folder of the finished data set.
        shards: user shards, the unit of parallelism; changes no sample.
        run_shards: runs the shard task, which can be pickled, for every shard.

    Returns:
        The manifest, as stored in the folder.

    Raises:
        DataError: for input that cannot be used, a full disk, or another data set at `output`.
    """
    if shards < 1:
        raise DataError(f"shards must be positive, got {shards=}")
    with disk_errors(output):
        files = sources.hash_files(schema)
        digest = _request_digest(schema, files, shards)
        if output.exists() and any(output.iterdir()):
            return _finished(output, digest)
        with _building(output, digest) as folder:
            if not (folder / FILE).exists():
                _build(schema, folder, files, shards, run_shards)
            _clear(folder)
            folder.rename(output)
        return Manifest.read(output)


def _build(
    schema: Schema,
    folder: Path,
    files: tuple[SourceFile, ...],
    shards: int,
    run_shards: RunShards,
) -> None:
    check(schema)
    write_tables(schema, folder)
    partition(schema, folder, shards)
    write_statistics(schema, folder, shards)
    run_shards(partial(prepare_shard, schema, folder), range(shards))
    write_text(folder / FILE, _manifest(schema, folder, files, shards).to_json())


@contextmanager
def _building(output: Path, digest: str) -> Iterator[Path]:
    """Hold the folder in which a data set is built, for this process alone.

    Its name holds the digest of request and code, so that nothing else goes on in it. Input that
    cannot be used leaves no folder behind.
    """
    # Absolute, since a task may run in a process that stands elsewhere.
    stem = f".{output.name}.building-"
    code = hashlib.sha256(f"{digest} {_code_digest()}".encode()).hexdigest()
    folder = output.resolve().parent / f"{stem}{code[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder / _LOCK))
        except BlockingIOError as error:
            raise DataError(
                f"another process is preparing the same data in {folder}; wait for it or stop it"
            ) from error
        try:
            yield folder
        except DataError:
            shutil.rmtree(folder)
            raise
    for other in folder.parent.glob(f"{stem}*"):
        _remove_abandoned(other)


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed run of other input or code left, unless someone is at work there."""
    with suppress(OSError), exclusive(folder / _LOCK):
        shutil.rmtree(folder)


def _clear(folder: Path) -> None:
    """Remove what only preparation needs, and what a killed run left without its name."""
    shutil.rmtree(folder / "work", ignore_errors=True)
    for path in (*folder.rglob(TEMPORARY), folder / _LOCK):
        path.unlink()


def _request_digest(schema: Schema, files: Iterable[SourceFile], shards: int) -> str:
    contents = [(Path(file.path).name, file.sha256) for file in files]
    request = json.dumps([FORMAT, schema.digest(), contents, shards])
    return hashlib.sha256(request.encode()).hexdigest()


def _finished(output: Path, digest: str) -> Manifest:
    manifest = Manifest.read(output)
    if _request_digest(manifest.schema, manifest.sources, manifest.shards) != digest:
        raise DataError(
            f"{output} already holds data of another schema, input or number of shards; "
            "remove it or choose another output"
        )
    manifest.check_files(output)
    return manifest


def _manifest(schema: Schema, folder: Path, files: tuple[SourceFile, ...], shards: int) -> Manifest:
    records = [_record(folder, shard) for shard in range(shards)]
    splits = {name: _total([r.splits[name] for r in records]) for name in split_names(schema)}
    _check_result(splits, records)
    catalogue = map_arrow(folder / "tables" / "catalogue.arrow")
    return Manifest(
        format=FORMAT,
        code=_code_digest(),
        schema=schema,
        schema_digest=schema.digest(),
        sources=files,
        shards=shards,
        users=sum(record.users for record in records),
        items=len(next(iter(catalogue.values()))),
        behaviours=sum(record.behaviours for record in records),
        duplicates=_sums([record.duplicates for record in records]),
        missed_negatives=_sums([record.missed_negatives for record in records]),
        history_quantiles=_history_quantiles(folder, shards),
        splits=splits,
        features=_features(schema, encoders.load(folder / "tables" / "encoders.json")),
        files=_file_infos(folder, records),
    ).sealed()


def _record(folder: Path, shard: int) -> ShardRecord:
    plain = json.loads((folder / "work" / "shards" / f"{shard:05d}.json").read_text())
    record: ShardRecord = build(ShardRecord, plain, f"shard {shard}")
    return record


def _total(parts: list[SplitInfo]) -> SplitInfo:
    return SplitInfo(**_sums([asdict(part) for part in parts]))


def _sums(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _check_result(splits: dict[str, SplitInfo], records: list[ShardRecord]) -> None:
    for name, info in splits.items():
        if not 0 < info.positives < info.samples:
            raise DataError(
                f"split {name!r} has {info.samples} samples, {info.positives} of them positive; "
                "both classes are needed: check split, pool and negatives of the schema"
            )
    if not any(record.with_history for record in records):
        raise DataError(
            "no user with a history: no sample has an earlier behaviour; check that behaviours "
            "and exposures name the same users and that times agree"
        )


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _history_quantiles(folder: Path, shards: int) -> dict[str, int]:
    ends = [map_arrow(folder / f"users/{i:05d}.arrow")["history_end"] for i in range(shards)]
    lengths = np.concatenate([np.diff(end, prepend=0) for end in ends])
    values = np.percentile(lengths, _QUANTILES)
    return {str(q): round(float(v)) for q, v in zip(_QUANTILES, values, strict=True)}


def _features(schema: Schema, learned: dict[str, encoders.Encoder]) -> Features:
    def features(*names: str) -> tuple[Feature, ...]:
        return tuple(_feature(name, learned) for name in names)

    item = (schema.item_name, *schema.item_categorical, *schema.item_numeric)
    context, pool = schema.context, schema.pool
    shown = (*pool.categorical, *pool.numeric) if pool else ()
    return Features(
        behaviour=features(*item, *schema.side_categorical, *schema.side_numeric),
        candidate=features(*item),
        context=features(*context.time, *context.categorical, *context.numeric, *shown),
        counters=schema.counters,
    )


def _feature(name: str, learned: dict[str, encoders.Encoder]) -> Feature:
    encoder = learned.get(name)
    if encoder is None:
        return Feature(name=name, kind="categorical", size=TIME_FEATURE_SIZES[name])
    if isinstance(encoder, Vocabulary):
        return Feature(name=name, kind="categorical", size=encoder.size)
    return Feature(name=name, kind="numeric", size=encoder.size)


def _file_infos(folder: Path, records: list[ShardRecord]) -> dict[str, FileInfo]:
    hashes = {name: digest for record in records for name, digest in record.files.items()}
    for path in sorted((folder / "tables").glob("[!.]*")):
        hashes[f"tables/{path.name}"] = sources.sha256(path)
    return {
        name: FileInfo(size=(folder / name).stat().st_size, sha256=digest)
        for name, digest in sorted(hashes.items())
    }
