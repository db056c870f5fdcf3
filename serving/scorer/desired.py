"""Which bundle the processes of one server should serve: a file that each of them looks at."""

from pathlib import Path

import msgspec

from hashtab.features.storage import write_text
from hashtab.serving.errors import BundleError
from hashtab.serving.manifest import BundleManifest


class Desired(msgspec.Struct, frozen=True):
    """A bundle to serve.

    Args:
        folder: of the bundle.
        version: number in a registry; None where there is none.
        digest: of its manifest; empty if that could not be read when it was asked for.
    """

    folder: str
    version: str | None
    digest: str

    @classmethod
    def of(cls, folder: Path, version: str | None = None) -> "Desired":
        """Return a folder as it is now."""
        try:
            digest = BundleManifest.read(folder).digest
        except (BundleError, OSError):
            digest = ""  # whoever opens it says what is wrong
        return cls(str(folder), version, digest)


class Followed(msgspec.Struct, frozen=True):
    """What is known of the folder or alias that the server follows.

    Args:
        named: the bundle that it named last.
        problem: why it cannot be followed now; None when it can.
    """

    named: Desired | None = None
    problem: str | None = None


class StateFolder:
    """Files that the processes of one server share, each replaced whole.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.lock = path / "leader.lock"
        self.bundles = path / "bundles"
        self._desired = path / "desired.json"
        self._followed = path / "followed.json"

    def desired(self) -> Desired | None:
        """Return what is to be served; None before anyone said so."""
        return msgspec.json.decode(self._read(self._desired), type=Desired | None)

    def desire(self, desired: Desired) -> None:
        """Say what is to be served; of two at the same time, the last counts."""
        write_text(self._desired, msgspec.json.encode(desired).decode())

    def followed(self) -> Followed:
        """Return what the leading process knows of the folder or alias."""
        return msgspec.json.decode(self._read(self._followed), type=Followed | None) or Followed()

    def follow(self, followed: Followed) -> None:
        """Note what the leading process knows."""
        write_text(self._followed, msgspec.json.encode(followed).decode())

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b"null"
