"""Click models over long histories: one model, interchangeable history encoders."""

from hashtab.models.ctr.batch import Feature, FeatureSpec, TensorBatch
from hashtab.models.ctr.click_model import ClickModel
from hashtab.models.ctr.encoders import ENCODERS
from hashtab.models.ctr.settings import ClickModelSettings

__all__ = [
    "ENCODERS",
    "ClickModel",
    "ClickModelSettings",
    "Feature",
    "FeatureSpec",
    "TensorBatch",
]
