"""The options of a server on a command line."""

import argparse
import os
from pathlib import Path

from hashtab.serving.http.errors import SettingsError
from hashtab.serving.http.settings import ServerSettings

TOKEN_VARIABLE = "HASHTAB_TOKEN"


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `server_settings` reads; their names are those of `ServerSettings`.

    The token has none: it comes from `--token-file` or the variable HASHTAB_TOKEN, since other
    users of the machine can read command lines.
    """
    default = ServerSettings()
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default=default.host,
        help="to listen at; reachable ones need a token (%(default)s)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=default.port,
        help="to listen at; 0 takes a free one (%(default)s)",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        help=f"holds the bearer token of writes and admin; else the variable {TOKEN_VARIABLE}",
    )
    group.add_argument(
        "--processes", type=int, default=default.processes, help="one a core (%(default)s)"
    )
    group.add_argument(
        "--max-body-bytes",
        type=int,
        default=default.max_body_bytes,
        help="of a request (%(default)s)",
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=default.max_waiting,
        help="calls that wait for their turn in a process; more get 429 (%(default)s)",
    )
    group.add_argument(
        "--deadline-ms",
        type=float,
        default=default.deadline_ms,
        help="after which a waiting call gets 503 (%(default)s)",
    )
    group.add_argument(
        "--drain-s",
        type=float,
        default=default.drain_s,
        help="seconds to finish calls in flight after SIGTERM (%(default)s)",
    )


def server_settings(namespace: argparse.Namespace) -> ServerSettings:
    """Return the settings that parsed options name.

    Raises:
        SettingsError: naming the option that cannot be used, or the token file that cannot be read.
    """
    return ServerSettings(
        host=namespace.host,
        port=namespace.port,
        token=read_token(namespace.token_file),
        processes=namespace.processes,
        max_body_bytes=namespace.max_body_bytes,
        max_waiting=namespace.max_waiting,
        deadline_ms=namespace.deadline_ms,
        drain_s=namespace.drain_s,
    )


def read_token(file: Path | None) -> str | None:
    """Return the token in a file, else that of the variable HASHTAB_TOKEN, else None.

    Raises:
        SettingsError: if the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"token file {file} cannot be read: {error}") from error
    if not token:
        raise SettingsError(f"token file {file} is empty: put the token on its first line")
    return token
