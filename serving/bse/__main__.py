"""Runs the BSE service, or replays files of past behaviours into its event log.

`python -m hashtab.serving.bse --store tables --bundle runs/<name>/bundle` serves;
`python -m hashtab.serving.bse replay --store tables --files 'purchases/*.parquet' --user user_id
--item item_id --time bought_at` fills the log, also while the service runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from hashtab.serving.bse.replay import ReplaySettings, replay
from hashtab.serving.bse.service import BseService
from hashtab.serving.bse.settings import BseSettings, StreamSettings
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.http import SettingsError, add_server_arguments, run, server_settings
from hashtab.serving.store import StoreError, open_store


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, or replay; what cannot be done ends with one line and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _replay(given[1:]) if given[:1] == ["replay"] else _serve(given)
    except (SettingsError, StoreError, BundleError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def _serve(arguments: Sequence[str]) -> int:
    options = serve_parser().parse_args(arguments)
    url = options.stream or os.environ.get("HASHTAB_STREAM")
    stream = StreamSettings(url=url, name=options.stream_name, group=options.group) if url else None
    settings = BseSettings(
        store=options.store,
        bundle=options.bundle,
        window_days=options.window_days,
        count=options.count,
        keep_old_s=options.keep_old_s,
        stream=stream,
        tracking_uri=options.tracking_uri,
    )
    return run(partial(BseService, settings), server_settings(options))


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser of the service's options."""
    parser = argparse.ArgumentParser(
        prog="python -m hashtab.serving.bse",
        description="Keep user tables up to date from behaviours.",
        epilog="replay, in place of options, fills the log from files: see replay --help",
    )
    parser.add_argument("--store", required=True, help="a folder, or a redis:// URL")
    parser.add_argument(
        "--bundle", help="a model's folder, or models:/name@champion, which is followed"
    )
    parser.add_argument(
        "--tracking-uri", default=BseSettings.tracking_uri, help="of MLflow (%(default)s)"
    )
    parser.add_argument("--window-days", type=float, help="days that a behaviour stays; all stay")
    parser.add_argument("--count", type=int, help="latest behaviours of a user that stay; all stay")
    parser.add_argument(
        "--keep-old-s",
        type=float,
        default=BseSettings.keep_old_s,
        help="seconds that tables of a replaced model stay (%(default)s)",
    )
    parser.add_argument("--stream", help="redis:// URL of a stream of events; or HASHTAB_STREAM")
    parser.add_argument("--stream-name", default=StreamSettings.name, help="(%(default)s)")
    parser.add_argument("--group", default=StreamSettings.group, help="consumers (%(default)s)")
    add_server_arguments(parser)
    parser.set_defaults(port=8001)  # beside a scorer
    return parser


def _replay(arguments: Sequence[str]) -> int:
    options = replay_parser().parse_args(arguments)
    settings = ReplaySettings(
        files=options.files,
        user=options.user,
        item=options.item,
        time=options.time,
        time_unit=options.time_unit,
        id=options.id,
        side=tuple(options.side),
    )
    with open_store(options.store) as store:
        found = replay(settings, store)
        counts = ", ".join(f"{count:,} {outcome.value}" for outcome, count in found.items())
        print(f"{store.name}: {counts} of this run")
        print(
            f"next: {sys.executable} -m hashtab.serving.bse --store {options.store} --bundle "
            "models:/my_model@champion, or a bundle's folder"
        )
    return 0


def replay_parser() -> argparse.ArgumentParser:
    """Return the parser of `replay`."""
    parser = argparse.ArgumentParser(
        prog="python -m hashtab.serving.bse replay",
        description="Write past behaviours from files into the event log, each exactly once.",
    )
    parser.add_argument("--store", required=True, help="a folder, or a redis:// URL")
    parser.add_argument("--files", required=True, help="CSV or Parquet: a file, folder or glob")
    for name in ("user", "item", "time"):
        parser.add_argument(f"--{name}", required=True, metavar="COLUMN", help="that holds it")
    parser.add_argument("--time-unit", help="of times that are whole numbers: s, ms or us")
    parser.add_argument(
        "--id", metavar="COLUMN", help="of event ids; made from the row if left out"
    )
    parser.add_argument(
        "--side",
        action="append",
        default=[],
        metavar="COLUMN",
        help="of a side feature; repeatable",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
