"""The settings of a scorer."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from hashtab.serving.http import SettingsError

DEFAULT_NAME = "hashtab"

_ALIAS = re.compile(r"models:/(?P<name>[^/@:]+)@[^/@]+")


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """What a scorer serves and how.

    Args:
        bundle: folder of a bundle, or `models:/name@alias` of a registry; both are followed.
        state: folder that the processes of one server share; gone with the server.
        store: URL of the users' tables; None scores with empty histories.
        tracking_uri: of MLflow, for a registered bundle.
        names: CSV or Parquet file of the columns `item` and `name`, to show; None shows ids.
        max_candidates: of one request.
        store_deadline_ms: milliseconds that a request waits for a server of tables.
        coverage: share of users with a table of the present model who must have one of a new model
            before it is served.

    Raises:
        SettingsError: naming the setting that cannot be used.
    """

    bundle: str
    state: Path
    store: str | None = None
    tracking_uri: str = "sqlite:///mlflow.db"
    names: Path | None = None
    max_candidates: int = 5000
    store_deadline_ms: float = 5.0
    coverage: float = 0.99
    name: str = field(init=False)

    def __post_init__(self) -> None:
        alias = _ALIAS.fullmatch(self.bundle)
        if self.bundle.startswith("models:") and alias is None:
            raise SettingsError(
                f"a registered bundle is followed as models:/name@alias, got {self.bundle!r}"
            )
        object.__setattr__(self, "name", alias["name"] if alias else DEFAULT_NAME)
        if self.max_candidates < 1:
            raise SettingsError(f"max_candidates must be at least 1, got {self.max_candidates}")
        if not (math.isfinite(self.store_deadline_ms) and self.store_deadline_ms > 0):
            raise SettingsError(f"store_deadline_ms must be positive, got {self.store_deadline_ms}")
        if not 0 <= self.coverage <= 1:
            raise SettingsError(f"coverage must lie in 0 to 1, got {self.coverage}")

    @property
    def registered(self) -> bool:
        """Whether the bundle is an alias of a registry, and not a folder."""
        return self.bundle.startswith("models:")
