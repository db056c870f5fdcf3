"""Named settings of TabNSA."""

from types import MappingProxyType
from typing import Any

PAPER: MappingProxyType[str, Any] = MappingProxyType(
    {
        "width": 64,
        "blocks": 1,
        "mixer_width": 256,
        "attention": "sparse",
        "heads": 4,
        "columns": "shared",
        "numeric": "linear",
        "target_statistics": False,
        "readout": "mean",
        "readout_width": 32,
        "dropout": 0.0,
        "folds": 1,
        "members": 1,
        "learning_rate": 6.1e-4,
        "weight_decay": 0.0,
        "batch_size": 96,
        "averaging": 0.0,
    }
)
"""The published form, `TabNSAClassifier(**PAPER)`: one embedding for all columns and one-hot
levels, sparse attention beside a TabMixer, summed, mean-pooled, one network.

NOTE[DIFF] from the authors' code (github.com/aseslamian/TabNSA, its settings for credit-g):

- attention: all columns see each other, where theirs sees earlier ones only; columns that correlate
  are neighbours, where theirs keeps the table's order, rotary positions and positions in blocks;
  blocks are means, where theirs are an MLP's answers; a last block may be shorter; heads divide the
  width (4 of 16 features, theirs 3 of 16); blocks and window are of 16 columns, theirs of 12 to
  compress, 10 to select and 7.
- block: a residual goes around attention and TabMixer both, theirs around the TabMixer alone.
- readout: tokens are normalised before their mean, and the hidden layer ends in a ReLU, not GELU.
- rows: numbers are scaled by quantiles and bounded, a missing one is the median; theirs are
  standardised, and a missing one is 0. Unseen and missing categories have levels of their own.
  A regressor's target is standardised.
- training: AdamW with clipped gradients and no decay, up to 400 epochs; a fifth
  of the rows is held out, ends it after `patience` epochs without a better one, and the best is
  kept. Theirs is 100 epochs of L-BFGS, and the last is kept.
"""
