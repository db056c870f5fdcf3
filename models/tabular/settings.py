"""Settings of a TabNSA network and of its training, checked where they are made."""

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

Attention = Literal["auto", "none", "dense", "sparse"]
Numeric = Literal["piecewise", "periodic", "linear"]
Readout = Literal["auto", "flatten", "mean"]
Fusion = Literal["sum", "gate"]
Columns = Literal["own", "shared"]

# Above, a dense layer over all tokens is most of the network (see README, "Tables").
WIDEST_FLATTENED = 4096
_MOST_DROPPED = 0.99


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """What a TabNSA network is made of.

    Args:
        width: features D of a token; a token is a column.
        blocks: TabNSA blocks, each of attention and a TabMixer side by side.
        mixer: whether blocks have a TabMixer.
        mixer_width: hidden units of its two MLPs.
        attention: "none", "dense" (all pairs of columns), "sparse" (native sparse attention) or
            "auto", which is "none"; see README for when attention pays.
        heads: of attention, if there is any; divides `width` then.
        block: columns that sparse attention compresses into one and selects together.
        selected: blocks that a column selects.
        window: columns that a column sees on one side, its own included.
        fusion: "sum" of the branches (the paper) or a learned "gate" for each feature.
        columns: whether each column has its "own" embedding, or all numbers and categories share
            one (the published model); "shared" ignores `numeric` and `bins`, and takes a missing
            number for the median.
        numeric: "piecewise" linear over quantile bins beside a linear part, "periodic", "linear".
        bins: quantile bins, or frequencies of a periodic embedding.
        readout: "flatten" reads all tokens through a hidden layer, "mean" their mean (the paper);
            "auto" flattens up to 4,096 features.
        readout_width: units of the readout's hidden layer.
        members: BatchEnsemble members that share a network's weights (TabM, arXiv 2410.24210).
        dropout: share of hidden units dropped in training, 0.99 at most.

    Raises:
        ValueError: a setting is out of its range.
    """

    width: int = 16
    blocks: int = 1
    mixer: bool = True
    mixer_width: int = 32
    attention: Attention = "auto"
    heads: int = 2
    block: int = 16
    selected: int = 2
    window: int = 16
    fusion: Fusion = "sum"
    columns: Columns = "own"
    numeric: Numeric = "piecewise"
    bins: int = 8
    readout: Readout = "auto"
    readout_width: int = 128
    members: int = 1
    dropout: float = 0.15

    def __post_init__(self) -> None:
        _whole(self, (*_SIZES, "blocks"))
        _positive(self, _SIZES)
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                )
        if self.blocks < 0:
            raise ValueError(f"blocks must not be negative, got {self.blocks}")
        if self.attention in ("dense", "sparse") and self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads=}, {self.width=}")
        if not 0 <= self.dropout <= _MOST_DROPPED:
            raise ValueError(
                f"dropout must be in [0, {_MOST_DROPPED}], got {self.dropout=}; it is applied in "
                "steps of 1/256, and above that might drop everything"
            )

    def flattens(self, columns: int) -> bool:
        """Whether the readout of a table of that many tokens reads them one by one."""
        if self.readout == "auto":
            return columns * self.width <= WIDEST_FLATTENED
        return self.readout == "flatten"


_SIZES = (
    "width",
    "mixer_width",
    "heads",
    "block",
    "selected",
    "window",
    "bins",
    "readout_width",
    "members",
)
_CHOICES = {
    "attention": Attention,
    "fusion": Fusion,
    "columns": Columns,
    "numeric": Numeric,
    "readout": Readout,
}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a TabNSA network is trained.

    Args:
        folds: networks, each of which validates on a part of the rows of its own and trains on
            the others; 1 holds a fifth out for one network.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on weights and embeddings, not on biases and norms; it is scaled
            by `learning_rate`, so a step shrinks them by the product of both.
        batch_size: rows a step and network; None chooses by the number of rows.
        max_epochs: passes over the rows at most.
        patience: epochs without a better validation loss after which a network stops.
        clip: largest norm of a network's gradient.
        time_budget: seconds after which training stops, at the end of an epoch and with the best
            one so far; None is no limit.

    Raises:
        ValueError: a setting is out of its range.
    """

    folds: int = 8
    learning_rate: float = 4e-3
    weight_decay: float = 0.3
    batch_size: int | None = None
    max_epochs: int = 200
    patience: int = 16
    clip: float = 1.0
    time_budget: float | None = None

    def __post_init__(self) -> None:
        _whole(self, ("folds", "max_epochs", "patience"))
        if self.batch_size is not None:
            _whole(self, ("batch_size",))
        _positive(self, ("folds", "learning_rate", "max_epochs", "patience", "clip"))
        for name in ("batch_size", "time_budget"):
            if getattr(self, name) is not None:
                _positive(self, (name,))
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay=}")

    def batch(self, rows: int) -> int:
        """Return the rows of a step for a training set of that many (as TabM's defaults)."""
        if self.batch_size is not None:
            return self.batch_size
        for limit, size in ((3_000, 64), (8_000, 128), (32_000, 256)):
            if rows < limit:
                return size
        return 512


def _whole(settings: object, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(getattr(settings, name), Integral):
            raise ValueError(f"{name} must be a whole number, got {getattr(settings, name)!r}")


def _positive(settings: object, names: tuple[str, ...]) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")
