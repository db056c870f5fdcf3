"""Settings of a TabNSA network and of its training, checked where they are made."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Literal, get_args

Attention = Literal["auto", "none", "dense", "sparse"]
Numeric = Literal["piecewise", "periodic", "linear"]
Readout = Literal["auto", "flatten", "mean"]
Fusion = Literal["sum", "gate"]
Columns = Literal["own", "shared"]

# From so many rows on, a network of default size is a large one (see README, "Tables").
LARGE_FROM = 10_000
# Above, a dense layer over all tokens is most of the network (see README, "Tables").
WIDEST_FLATTENED = 4096
_MOST_DROPPED = 0.99


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """What a TabNSA network is made of.

    A size that is None is chosen by the number of rows to learn from: `width`, `blocks`,
    `mixer_width`, `bins` and `readout_width` are 16, 1, 32, 8 and 64 below 10,000 rows, and 32, 2,
    64, 128 (32 frequencies) and 256 from there on.

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
        target_statistics: whether columns of eight or more categories have the mean target of each
            category as a number beside it; only where the target is a number or of two classes,
            and with "own" columns.
        readout: "flatten" reads all tokens through a hidden layer, "mean" their mean (the paper);
            "auto" flattens up to 4,096 features.
        readout_width: units of the readout's hidden layer.
        members: BatchEnsemble members that share a network's weights (TabM, arXiv 2410.24210).
        dropout: share of hidden units dropped in training, 0.99 at most.

    Raises:
        ValueError: a setting is out of its range.
    """

    width: int | None = None
    blocks: int | None = None
    mixer: bool = True
    mixer_width: int | None = None
    attention: Attention = "auto"
    heads: int = 2
    block: int = 16
    selected: int = 2
    window: int = 16
    fusion: Fusion = "sum"
    columns: Columns = "own"
    numeric: Numeric = "piecewise"
    bins: int | None = None
    target_statistics: bool = True
    readout: Readout = "auto"
    readout_width: int | None = None
    members: int = 1
    dropout: float = 0.15

    def __post_init__(self) -> None:
        given = {name for name in (*_WHOLE, "blocks") if getattr(self, name) is not None}
        _whole(self, given)
        _positive(self, given - {"blocks"})
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                )
        if self.blocks is not None and self.blocks < 0:
            raise ValueError(f"blocks must not be negative, got {self.blocks}")
        attends = self.attention in ("dense", "sparse")
        if attends and self.width is not None and self.width % self.heads:
            raise ValueError(f"heads must divide width, got heads={self.heads}, width={self.width}")
        if not 0 <= self.dropout <= _MOST_DROPPED:
            raise ValueError(
                f"dropout must be in [0, {_MOST_DROPPED}], got {self.dropout=}; it is applied in "
                "steps of 1/256, and above that might drop everything"
            )

    def sized(self, rows: int) -> "SizedSettings":
        """Return these settings with the sizes that are None chosen for so many rows."""
        if rows < LARGE_FROM:
            return self._sized(_SMALL)
        periodic = {"bins": _MOST_FREQUENCIES} if self.numeric == "periodic" else {}
        return self._sized(_LARGE | periodic)

    def sized_like(self, other: "SizedSettings") -> "SizedSettings":
        """Return these settings with the sizes that are None taken from others."""
        return self._sized({name: getattr(other, name) for name in _SMALL})

    def _sized(self, sizes: Mapping[str, int]) -> "SizedSettings":
        own = asdict(self)
        return SizedSettings(**own | {k: v for k, v in sizes.items() if own[k] is None})


@dataclass(frozen=True, kw_only=True)
class SizedSettings(NetworkSettings):
    """Settings whose sizes are all chosen, as a network is built from."""

    width: int
    blocks: int
    mixer_width: int
    bins: int
    readout_width: int

    def flattens(self, columns: int) -> bool:
        """Whether the readout of a table of that many tokens reads them one by one."""
        if self.readout == "auto":
            return columns * self.width <= WIDEST_FLATTENED
        return self.readout == "flatten"


_SMALL = {"width": 16, "blocks": 1, "mixer_width": 32, "bins": 8, "readout_width": 64}
_LARGE = {"width": 32, "blocks": 2, "mixer_width": 64, "bins": 128, "readout_width": 256}
_MOST_FREQUENCIES = 32  # a bin costs nothing, a frequency does
_WHOLE = (*_SMALL, "heads", "block", "selected", "window", "members")
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
        weight_decay: share of itself that an epoch takes from each weight and embedding, not from
            biases and norms. AdamW's own factor, of a step and scaled by the rate, follows from it:
            so one value serves tables of any length (arXiv 2405.13698).
        batch_size: rows a step and network; None chooses by the number of rows.
        max_epochs: passes over the rows at most.
        patience: epochs without a better validation loss after which a network stops.
        clip: largest norm of a network's gradient.
        averaging: epochs over which weights are averaged (exponentially); the averages are what is
            validated and kept. 0 keeps the weights themselves.
        time_budget: seconds after which training stops, at the end of an epoch and with the best
            one so far; None is no limit.

    Raises:
        ValueError: a setting is out of its range.
    """

    folds: int = 8
    learning_rate: float = 4e-3
    weight_decay: float = 1 / 60
    batch_size: int | None = None
    max_epochs: int = 400
    patience: int = 16
    clip: float = 1.0
    averaging: float = 3.0
    time_budget: float | None = None

    def __post_init__(self) -> None:
        _whole(self, ("folds", "max_epochs", "patience"))
        if self.batch_size is not None:
            _whole(self, ("batch_size",))
        _positive(self, ("folds", "learning_rate", "max_epochs", "patience", "clip"))
        for name in ("batch_size", "time_budget"):
            if getattr(self, name) is not None:
                _positive(self, (name,))
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"weight_decay must be in [0, 1), got {self.weight_decay}")
        if not self.averaging >= 0:
            raise ValueError(f"averaging must not be negative, got {self.averaging}")

    def batch(self, rows: int) -> int:
        """Return the rows of a step for a training set of that many (as TabM's defaults)."""
        if self.batch_size is not None:
            return self.batch_size
        for limit, size in ((3_000, 64), (8_000, 128), (32_000, 256)):
            if rows < limit:
                return size
        return 512


def _whole(settings: object, names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(getattr(settings, name), Integral):
            raise ValueError(f"{name} must be a whole number, got {getattr(settings, name)!r}")


def _positive(settings: object, names: Iterable[str]) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")
