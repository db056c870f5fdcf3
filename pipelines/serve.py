#!/usr/bin/env python3
"""Serve a model on this machine: the BSE service and the scorer, beside one LMDB store.

`python pipelines/serve.py` serves what `make demo` made: it fills the event log with the data set's
behaviours, builds the index of items, starts both services, prints commands to try, and ends both
on Ctrl-C. Run again, it goes on with what is there.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.errors import DataError
from hashtab.features.manifest import FILE
from hashtab.pipelines.build_index import IndexSettings, build
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.item_names import write_names
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.past_events import ITEM_COLUMN, TIME_COLUMN, USER_COLUMN, write_events
from hashtab.pipelines.places import DEFAULT_TRACKING, shown
from hashtab.pipelines.registry import find_bundle
from hashtab.pipelines.services import Service, running, wait_for_end
from hashtab.pipelines.try_online import example, what_to_try
from hashtab.serving.bse.replay import ReplaySettings, replay
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.manifest import BundleManifest
from hashtab.serving.store import StoreError, open_store


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of the services on one machine.

    Args:
        bundle: folder of a bundle, or models:/<name>@champion in the registry.
        data: prepared data set whose behaviours fill the event log.
        folder: of the event log with the tables, and of what the services say.
        port: of the scorer.
        bse_port: of the BSE service.
        tracking_uri: of MLflow, for a bundle in the registry.
    """

    bundle: str = "models:/hashtab@champion"
    data: str = "data/complete_journey"
    folder: str = "runs/online"
    port: int = 8000
    bse_port: int = 8001
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        for name in ("port", "bse_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise SettingsError(f"{name} must lie in 1 to 65535, got {getattr(self, name)}")

    @property
    def store(self) -> Path:
        """Folder of the event log and the tables."""
        return Path(self.folder).resolve() / "store"


def fill_log(settings: ServeSettings) -> None:
    """Write the data set's behaviours into the event log; those that are there stay as they are.

    Raises:
        DataError, RequestError, StoreError: if the data or the log cannot be used.
    """
    folder = Path(settings.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"filling the event log {shown(settings.store)}", file=sys.stderr)
    events = folder / "past_events.parquet"
    side = write_events(Path(settings.data), events)
    columns = ReplaySettings(
        files=str(events),
        user=USER_COLUMN,
        item=ITEM_COLUMN,
        time=TIME_COLUMN,
        time_unit="us",
        side=side,
    )
    with open_store(str(settings.store)) as store:
        replay(columns, store)
    events.unlink()


def index_items(settings: ServeSettings, bundle: Path) -> None:
    """Build the index that recommendations come from, unless it is there or the model has none.

    Raises:
        SettingsError, BundleError, DataError: if it cannot be built.
    """
    if BundleManifest.read(bundle).table.groups:
        print("building the index of items", file=sys.stderr)
        build(IndexSettings(bundle=str(bundle), data=settings.data))


@contextmanager
def services(settings: ServeSettings, bundle: Path) -> Iterator[tuple[Service, Service]]:
    """Run the scorer and the BSE service, both ready, until the block ends.

    Raises:
        SettingsError: if one ends before it is ready, saying where its log lies.
    """
    options = [f"--bundle={bundle}", f"--store={settings.store}"]
    logs = settings.store.parent
    names = logs / "names.parquet"
    named = [f"--names={names}"] if write_names(bundle, names) else []
    with running(
        "the BSE service", "hashtab.serving.bse", options, settings.bse_port, logs / "bse.log"
    ) as bse:
        print("building every user's table", file=sys.stderr)
        bse.wait_for_tables(BundleManifest.read(bundle).fingerprint)
        with running(
            "the scorer",
            "hashtab.serving.scorer",
            [*options, *named],
            settings.port,
            logs / "scorer.log",
        ) as scorer:
            yield scorer, bse


def serve(settings: ServeSettings) -> None:
    """Fill the log, index, start both services, say what to try, and wait until one of them ends.

    Raises:
        SettingsError: if something to serve is missing, or a service ended by itself.
        BundleError, DataError, RequestError, StoreError: if one of these cannot be used.
    """
    if not (Path(settings.data) / FILE).exists():
        raise SettingsError(f"{settings.data} holds no data set to serve: run make demo first")
    bundle = find_bundle(settings.bundle, settings.tracking_uri).resolve()
    fill_log(settings)
    index_items(settings, bundle)
    with services(settings, bundle) as (scorer, bse):
        print(what_to_try(example(bundle, str(settings.store)), scorer.url, bse.url), flush=True)
        wait_for_end(scorer, bse)


def main(arguments: list[str] | None = None) -> int:
    """Parse and serve; what cannot be served ends with one line and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the services as Ctrl-C does
    try:
        serve(parse(ServeSettings, arguments, __doc__))
    except (SettingsError, DataError, BundleError, RequestError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
