"""Settings dataclasses as a command line: dotted options, `--config file.yaml`, one-line errors."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, cast, get_args, get_type_hints

import jsonargparse

Settings = TypeVar("Settings")


class SettingsError(ValueError):
    """Settings that cannot be used: says which, and what to do about it."""


def parse(kind: type[Settings], arguments: list[str] | None, description: str | None) -> Settings:
    """Return settings of type `kind` from a command line; `--help` prints its options.

    A field of type bool is a bare flag, `--resume`. Options after `--config` overrule the file.

    Args:
        kind: a dataclass, its fields of plain types or dataclasses themselves.
        arguments: of the command line; None for those of this process.
        description: shown by `--help`.

    Raises:
        SettingsError: for an unknown or misspelt option or a wrong value, in one line.
    """
    flags = [name for name, hint in get_type_hints(kind).items() if hint is bool]
    parser = jsonargparse.ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description=description
    )
    parser.add_argument("--config", action="config", help="YAML file with these settings")
    parser.add_class_arguments(kind, as_group=False, skip=set(flags))
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=_flag_help(kind, name))
    try:
        plain = parser.parse_args(arguments).as_dict()
        return from_plain(kind, plain)
    except (jsonargparse.ArgumentError, ValueError) as error:
        hint = _misspelt(kind, arguments or sys.argv[1:])
        raise SettingsError(" ".join(str(error).split()) + hint) from error


def _misspelt(kind: type[Any], arguments: Sequence[str]) -> str:
    """Name the options that were meant, if some are not known."""
    known = [f"--{name}" for name in ("config", "help", *flatten(kind()))]
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    near = [get_close_matches(name, known, n=1) for name in given if name not in known]
    meant = [option for found in near for option in found]
    return f"; did you mean {', '.join(meant)}?" if meant else ""


def from_plain(kind: type[Settings], plain: Mapping[str, Any]) -> Settings:
    """Build nested settings from plain data of the right names and types; lists become tuples.

    Raises:
        SettingsError: for a null that a field does not take, or a value where settings are due.
    """
    hints = get_type_hints(kind)
    values = {name: value for name, value in plain.items() if name in hints}
    for name, value in values.items():
        # The parser lets a null pass everywhere, and any value in place of nested settings.
        if value is None and type(None) not in get_args(hints[name]):
            raise SettingsError(f"{name} must not be null")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise SettingsError(f"{name} must hold settings by name, got {value!r}")
            values[name] = from_plain(cast(type[Any], hints[name]), value)
        elif isinstance(value, list):
            values[name] = tuple(value)
    return kind(**values)


def _flag_help(kind: type[Any], name: str) -> str:
    """Take the flag's sentence out of the `Args:` of the docstring."""
    lines = (kind.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(f"{name}: ")), None)
    if start is None:
        return ""
    return lines[start].split(": ", 1)[1].strip().rstrip(".;")


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dotted names and values of nested dataclasses, as the command line has them."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = list(value) if isinstance(value, tuple) else value
    return flat
