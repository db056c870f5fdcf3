"""What the tuned track draws from, for every model; draw 0 is always the default settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Between:
    """A number between two others; drawn on a log scale, or rounded, when asked."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, random: np.random.Generator) -> float | int:
        if self.log:
            value = float(np.exp(random.uniform(np.log(self.low), np.log(self.high))))
        else:
            value = float(random.uniform(self.low, self.high))
        return round(value) if self.whole else value


@dataclass(frozen=True)
class OneOf:
    """One of several values."""

    values: tuple[Any, ...]

    def draw(self, random: np.random.Generator) -> Any:
        return self.values[int(random.integers(len(self.values)))]


SPACES: dict[str, dict[str, Between | OneOf]] = {
    "linear": {"penalty": Between(1e-3, 1e4, log=True)},
    "lightgbm": {
        "learning_rate": Between(0.01, 0.2, log=True),
        "num_leaves": Between(4, 256, log=True, whole=True),
        "min_child_samples": Between(2, 100, log=True, whole=True),
        "subsample": Between(0.5, 1.0),
        "colsample_bytree": Between(0.4, 1.0),
        "reg_lambda": Between(1e-4, 10.0, log=True),
    },
    "catboost": {
        "learning_rate": Between(0.01, 0.3, log=True),
        "depth": Between(3, 8, whole=True),
        "l2_leaf_reg": Between(1.0, 30.0, log=True),
        "random_strength": Between(0.1, 20.0, log=True),
        "one_hot_max_size": OneOf((2, 8, 32)),
    },
    "realmlp": {  # after the space of TabArena
        "lr": Between(0.02, 0.3, log=True),
        "hidden_sizes": OneOf(((256, 256, 256), (64, 64, 64), (512,))),
        "p_drop": OneOf((0.0, 0.15, 0.3)),
        "wd": OneOf((0.0, 0.02)),
        "plr_sigma": Between(0.05, 0.5, log=True),
    },
    "tabm": {  # after the space of its paper
        "lr": Between(3e-4, 5e-3, log=True),
        "weight_decay": OneOf((0.0, 1e-4, 1e-3, 1e-2)),
        "n_blocks": OneOf((1, 2, 3, 4)),
        "d_block": OneOf((128, 256, 512)),
        "dropout": OneOf((0.0, 0.1, 0.3)),
        "num_emb_n_bins": OneOf((8, 16, 48, 96)),
    },
    "tabnsa": {
        "learning_rate": Between(1e-3, 1e-2, log=True),
        "weight_decay": Between(2e-3, 0.1, log=True),
        "dropout": Between(0.0, 0.4),
        "width": OneOf((8, 16, 32)),
        "mixer_width": OneOf((16, 32, 64)),
        "bins": OneOf((4, 8, 16, 32, 64, 128)),
        "readout_width": OneOf((64, 128, 256)),
    },
}


def draw(model: str, trial: int, seed: int) -> Params:
    """Return the settings of one trial: the defaults for trial 0, drawn ones after it.

    Raises:
        ValueError: for a model that has no search space.
    """
    if model not in SPACES:
        raise ValueError(f"{model} has no search space; it can run in the default track only")
    if trial == 0:
        return {}
    random = np.random.default_rng([seed, trial])
    return {name: some.draw(random) for name, some in SPACES[model].items()}
