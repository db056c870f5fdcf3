"""TabNSA on tables: scikit-learn estimators, their network and its settings."""

from hashtab.models.tabular.estimators import TabNSAClassifier, TabNSARegressor
from hashtab.models.tabular.presets import PAPER

__all__ = ["PAPER", "TabNSAClassifier", "TabNSARegressor"]
