"""The user that a request names, as the model's log had users."""

import re

from hashtab.serving.store import User

_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    chr(code) for code in range(0x2000, 0x200B)
)  # what polars strips
_ZEROS = re.compile(r"\.0+\Z")
_WHOLE = re.compile(r"[+-]?[0-9]+\Z")
_MOST_DIGITS = 4000  # int() refuses a little more
_LIMIT = 1 << 63


def user_of(value: float | str | None, text: bool) -> User | None:
    """Return a user as files of requests give users; None for one that no log can have.

    Where users are integers, "007" and 7.0 are user 7; where they are text, 7 is "7".

    Args:
        value: as it was given.
        text: whether the model's users are text.
    """
    if isinstance(value, float):
        whole = int(value) if value.is_integer() else None
        value = whole if whole is not None and -_LIMIT <= whole < _LIMIT else None
    if value is None or text:
        return None if value is None else str(value)
    if isinstance(value, str):
        digits = _ZEROS.sub("", value.strip(_SPACE))
        if len(digits) > _MOST_DIGITS or not _WHOLE.match(digits):
            return None
        value = int(digits)
    whole = int(value)
    return whole if -_LIMIT <= whole < _LIMIT else None
