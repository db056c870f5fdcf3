"""Keys of a store: fingerprint (8 bytes), one tag byte, then the user or a note's name.

A new model has a new fingerprint, so it never meets the tables of an old one, and all keys of one
fingerprint lie together. Integer users keep their order.
"""

import operator
import struct
from typing import Final

from hashtab.serving.store.errors import StoreError

User = int | str

FINGERPRINT_BYTES: Final = 8
KEY_LIMIT: Final = 511
"""Bytes of the longest key that LMDB takes."""

NOTE_TAG: Final = b"\x00"  # the lowest: notes come, and are dropped, before the records
INT_TAG: Final = b"i"
STR_TAG: Final = b"s"
DELTA_TAGS: Final = {INT_TAG: b"I", STR_TAG: b"S"}  # of a user's delta, by their record's

FORMAT_KEY: Final = b"format"
"""Key of the store's format; shorter than a fingerprint and a tag, so no other key is like it."""

_INT_KEY = struct.Struct(">8scQ")
_SHIFTED = struct.Struct(">Q")
_OFFSET = 1 << 63  # moves int64 to uint64, whose big-endian bytes sort as numbers


def user_key(fingerprint: bytes, user: User) -> bytes:
    """Key of a user's record.

    Args:
        fingerprint: 8 bytes.
        user: an int64, or a string of at most 502 bytes of UTF-8.

    Raises:
        StoreError: naming the user that cannot be a key.
    """
    if isinstance(user, str):
        return _text_key(check_fingerprint(fingerprint) + STR_TAG, user, "user")
    try:
        shifted = operator.index(user) + _OFFSET  # index: numpy's own integers would overflow
        return _INT_KEY.pack(check_fingerprint(fingerprint), INT_TAG, shifted)
    except (struct.error, TypeError) as error:
        raise StoreError(
            f"user {user!r} must be an integer of 64 bits or a string; store it as a string"
        ) from error


def delta_key(key: bytes) -> bytes:
    """Key of the delta of the record that has this key."""
    end = FINGERPRINT_BYTES + 1
    return key[:FINGERPRINT_BYTES] + DELTA_TAGS[key[FINGERPRINT_BYTES:end]] + key[end:]


def note_key(fingerprint: bytes, name: str) -> bytes:
    """Key of a note of a fingerprint.

    Raises:
        StoreError: if the name is longer than 502 bytes of UTF-8.
    """
    return _text_key(check_fingerprint(fingerprint) + NOTE_TAG, name, "note")


def user_of(key: bytes) -> User:
    """User of a record's key: the inverse of `user_key`.

    Raises:
        StoreError: if the key is not one of a record.
    """
    tag, rest = key[FINGERPRINT_BYTES:][:1], key[FINGERPRINT_BYTES + 1 :]
    try:
        if tag == STR_TAG:
            return rest.decode()
        if tag == INT_TAG:
            return int(_SHIFTED.unpack(rest)[0]) - _OFFSET
    except (struct.error, UnicodeDecodeError):
        pass
    raise StoreError(f"key {key!r} is not one of a user; did another program write it?")


def is_user_key(key: bytes) -> bool:
    """Whether a key is one of a record rather than of a note or of the store's format."""
    return key[FINGERPRINT_BYTES : FINGERPRINT_BYTES + 1] in (INT_TAG, STR_TAG)


def check_fingerprint(fingerprint: bytes) -> bytes:
    """Return the fingerprint.

    Raises:
        StoreError: if it does not have 8 bytes.
    """
    if len(fingerprint) != FINGERPRINT_BYTES:
        raise StoreError(f"fingerprint must have 8 bytes, got {fingerprint!r}")
    return fingerprint


def _text_key(start: bytes, text: str, what: str) -> bytes:
    try:
        key = start + text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"{what} {text!r} has no UTF-8; clean it at its source") from error
    if len(key) > KEY_LIMIT:
        limit = KEY_LIMIT - len(start)
        raise StoreError(
            f"{what} {text!r} has {len(key) - len(start)} bytes of UTF-8, more than {limit}; "
            "use a shorter one, such as its hash"
        )
    return key
