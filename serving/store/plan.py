"""What all writers of a log agree on: how long events stay, and which models' tables are kept."""

from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from hashtab.serving.store.errors import StoreError

PLAN, HEARTBEAT = "plan", "heartbeat"  # names of values in the log
State = Literal["building", "live", "retiring", "dropping"]


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """A model whose tables are kept up to date.

    Args:
        bundle: folder, the same for every writer.
        digest: of the bundle's manifest.
        state: building while some users of the log may have no table yet; live when all have;
            retiring when another model is live and this one's tables are about to go; dropping
            while they go, from when on nobody keeps them.
        since: microseconds, when it came into this state.
    """

    bundle: str
    digest: str
    state: State
    since: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every writer reads in the transaction in which it writes.

    Args:
        window_us: events older than so many microseconds leave the log; None keeps all.
        count: a user's latest events that stay; None keeps all.
        models: by fingerprint as 16 hex digits.
        wanted: of the model that is to be live.
        named: digest of the bundle that a service was started with the last time.
    """

    window_us: int | None = None
    count: int | None = None
    models: dict[str, KeptModel] = field(default_factory=dict)
    wanted: str | None = None
    named: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("window_us", self.window_us), ("count", self.count)):
            if value is not None and value < 1:
                raise StoreError(f"{name} must be positive or None, got {value}")

    def with_model(self, fingerprint: bytes, model: KeptModel | None) -> "Plan":
        """Return the plan with one model changed, or without it."""
        others = {k: v for k, v in self.models.items() if k != fingerprint.hex()}
        return replace(
            self, models=others if model is None else {**others, fingerprint.hex(): model}
        )

    def to_bytes(self) -> bytes:
        """Return the plan as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes | None) -> "Plan":
        """Read what `to_bytes` wrote; an empty plan where there is none yet.

        Raises:
            StoreError: if the bytes are not those of a plan.
        """
        if data is None:
            return cls()
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise StoreError(
                f"the plan of the log cannot be read ({error}); was it written by another version?"
            ) from error
