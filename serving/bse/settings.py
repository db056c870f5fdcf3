"""The settings of the BSE service."""

from dataclasses import dataclass

from hashtab.serving.store import StoreError

DAY_US = 86_400 * 10**6


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """A Redis stream that events are read from.

    Args:
        url: of the server, redis://host:port/database; it need not be that of the store.
        name: of the stream.
        group: consumer group; all services of one group share the stream's events.
    """

    url: str
    name: str = "events"
    group: str = "hashtab"


@dataclass(frozen=True, kw_only=True)
class BseSettings:
    """What the BSE service keeps.

    Args:
        store: URL of the user tables and the event log.
        bundle: folder of the model whose tables are kept, or `models:/name@alias` in the registry,
            which is followed; None goes on with those that the store's plan has.
        window_days: days after which a behaviour expires; None keeps all.
        count: latest behaviours of a user that are kept; None keeps all.
        keep_old_s: seconds that tables of a replaced model stay, for scorers to change over.
        stream: read beside HTTP; None for none.
        tracking_uri: of MLflow, for bundles in the registry.

    Raises:
        StoreError: naming the setting that is out of range.
    """

    store: str
    bundle: str | None = None
    window_days: float | None = None
    count: int | None = None
    keep_old_s: float = 600.0
    stream: StreamSettings | None = None
    tracking_uri: str = "sqlite:///mlflow.db"

    def __post_init__(self) -> None:
        if self.window_days is not None and not 0 < self.window_days < 1e6:
            raise StoreError(f"window_days must be positive, got {self.window_days}")
        if self.count is not None and self.count < 1:
            raise StoreError(f"count must be positive, got {self.count}")
        if not self.keep_old_s >= 0:
            raise StoreError(f"keep_old_s must not be negative, got {self.keep_old_s}")

    @property
    def window_us(self) -> int | None:
        """The window in microseconds."""
        return None if self.window_days is None else round(self.window_days * DAY_US)
