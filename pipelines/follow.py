#!/usr/bin/env python3
"""Says which bundle an alias of a registered model names, and says it again when that changes.

`python pipelines/follow.py --bundle models:/my_model@champion` brings the bundle to this machine
and prints one line of JSON: `{"folder": ..., "version": ...}`, or `{"error": ...}` while the
registry cannot be used.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.places import DEFAULT_TRACKING
from hashtab.pipelines.registry import Registry
from hashtab.serving.errors import BundleError

_ALIAS = re.compile(r"models:/(?P<name>[^/@:]+)@(?P<alias>[^/@]+)")


@dataclass(frozen=True, kw_only=True)
class FollowSettings:
    """Settings of following an alias.

    Args:
        bundle: `models:/name@alias`.
        every_s: seconds between two looks at the registry.
        parent: process id of who started this one, which then ends with it; None to go on.
        tracking_uri: of MLflow.
    """

    bundle: str = "models:/hashtab@champion"
    every_s: float = 2.0
    parent: int | None = None
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if not _ALIAS.fullmatch(self.bundle):
            raise SettingsError(f"bundle must be models:/name@alias, got {self.bundle!r}")
        if not self.every_s > 0:
            raise SettingsError(f"every_s must be positive, got {self.every_s}")


def follow(settings: FollowSettings) -> Iterator[dict[str, str]]:
    """Look at the registry once an element; what it says is what a line says."""
    named = _ALIAS.fullmatch(settings.bundle)
    assert named is not None
    registry: Registry | None = None
    while True:
        try:
            _check_there(settings)
            registry = registry or Registry(settings.tracking_uri, named["name"])
            version = registry.version_of(named["alias"])
            yield {"folder": str(registry.download(version)), "version": str(version)}
        except (SettingsError, BundleError, OSError) as error:
            yield {"error": str(error)}


def _check_there(settings: FollowSettings) -> None:
    """Raise `SettingsError` for a database file that is not there: MLflow would make it, empty."""
    uri = settings.tracking_uri
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).exists():
        raise SettingsError(f"{settings.bundle} is looked for in {uri}, which is not there")


def main(arguments: list[str] | None = None) -> int:
    """Print a line whenever there is something new to say; return the exit code."""
    try:
        settings = parse(FollowSettings, arguments, __doc__)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt):
        _say_all(settings)
    return 0


def _say_all(settings: FollowSettings) -> None:
    said: dict[str, str] = {}
    for found in follow(settings):
        if found != said:
            print(json.dumps(found), flush=True)
        said = found
        time.sleep(settings.every_s)
        if settings.parent not in (None, os.getppid()):
            return


if __name__ == "__main__":
    sys.exit(main())
