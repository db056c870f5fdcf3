"""Serves scores: `python -m hashtab.serving.scorer --bundle FOLDER --store FOLDER`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hashtab.serving.http import SettingsError, add_server_arguments, run, server_settings
from hashtab.serving.scorer.service import ScorerService
from hashtab.serving.scorer.settings import ScorerSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Exit code: 0, or 2 if the settings cannot be used.
    """
    options = serve_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hashtab-scorer-") as state:
        try:
            server = server_settings(options)
            settings = ScorerSettings(
                bundle=options.bundle,
                state=Path(state),
                store=options.store,
                tracking_uri=options.tracking_uri,
                names=options.names,
                max_candidates=options.max_candidates,
                store_deadline_ms=options.store_deadline_ms,
                coverage=options.coverage,
            )
            return run(partial(ScorerService, settings), server)
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser of the scorer's options."""
    parser = argparse.ArgumentParser(
        prog="python -m hashtab.serving.scorer",
        description="Score candidates over HTTP with the champion model and users' tables.",
    )
    default = ScorerSettings(bundle=".", state=Path())
    parser.add_argument(
        "--bundle",
        required=True,
        help="folder of a bundle, or models:/name@alias; followed when it changes",
    )
    parser.add_argument("--store", help="users' tables: a folder or a redis:// URL")
    parser.add_argument(
        "--tracking-uri", default=default.tracking_uri, help="of MLflow (%(default)s)"
    )
    parser.add_argument("--names", type=Path, help="CSV or Parquet file of items and names to show")
    parser.add_argument(
        "--max-candidates",
        type=int,
        default=default.max_candidates,
        help="of a request; more get 422 (%(default)s)",
    )
    parser.add_argument(
        "--store-deadline-ms",
        type=float,
        default=default.store_deadline_ms,
        help="that a request waits for a server of tables (%(default)s)",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        default=default.coverage,
        help="share of users who need a table of a new model (%(default)s)",
    )
    add_server_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
