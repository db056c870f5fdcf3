"""Settings of a click model, checked where they are made."""

from dataclasses import dataclass
from difflib import get_close_matches

from hashtab.models.ctr.encoders import ENCODERS


@dataclass(frozen=True, kw_only=True)
class ClickModelSettings:
    """What a click model is made of.

    Args:
        encoder: history encoder, a name from `hashtab.models.ctr.encoders.ENCODERS`.
        embedding_size: length D of the vectors of behaviours and candidates.
        planes: number M of hash planes; M / tau groups are read.
        tau: bits of a group's code, 1 to 16.
        history_limit: behaviours that a sample sees at most, the latest; all when None.
        window: of these the latest, which is what "din", "target_attention" and the short part of
            "sdim_long_short" see.
        hidden: widths of the head's hidden layers.
        dropout: share of the head's hidden units dropped in training.
        counters: whether the head reads how often the user met the candidate's features before.
        initial_std: standard deviation of the initial embeddings.

    Raises:
        ValueError: if the encoder is unknown, a setting is out of its range, or tau does not
            divide `planes`.
    """

    encoder: str = "sdim"
    embedding_size: int = 32
    planes: int = 80
    tau: int = 5
    history_limit: int | None = 2000
    window: int = 50
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.28
    counters: bool = False
    initial_std: float = 0.5

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            near = get_close_matches(self.encoder, ENCODERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"encoder must be one of {sorted(ENCODERS)}, got {self.encoder!r}{hint}"
            )
        for name in ("embedding_size", "planes", "window", "initial_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.history_limit is not None and self.history_limit <= 0:
            raise ValueError(f"history_limit must be positive, got {self.history_limit}")
        if not 1 <= self.tau <= 16:
            raise ValueError(f"tau must be between 1 and 16, got {self.tau=}")
        if self.planes % self.tau:
            raise ValueError(f"tau must divide planes, got {self.tau=}, {self.planes=}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout=}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden widths must be positive, got {self.hidden=}")

    @property
    def recent(self) -> int:
        """Behaviours that encoders of the recent history see."""
        return min(self.window, self.history_limit or self.window)
