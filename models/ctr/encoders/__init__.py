"""History encoders by name: to add one, write its file and its entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hashtab.models.ctr.encoders.base import EmbeddedUsers, HistoryEncoder
from hashtab.models.ctr.encoders.din import DeepInterest
from hashtab.models.ctr.encoders.long_short import LongShort
from hashtab.models.ctr.encoders.mean import MeanPooling
from hashtab.models.ctr.encoders.none import NoHistory
from hashtab.models.ctr.encoders.sdim import HashSampledAttention
from hashtab.models.ctr.encoders.target_attention import TargetAttention

if TYPE_CHECKING:  # the settings check their encoder against the table below
    from hashtab.models.ctr.settings import ClickModelSettings


def _sdim(settings: ClickModelSettings) -> HashSampledAttention:
    return HashSampledAttention(
        settings.embedding_size, settings.planes, settings.tau, settings.history_limit
    )


def _target_attention(settings: ClickModelSettings) -> TargetAttention:
    return TargetAttention(settings.embedding_size, settings.recent)


def _full_target_attention(settings: ClickModelSettings) -> TargetAttention:
    return TargetAttention(settings.embedding_size, settings.history_limit)


ENCODERS: dict[str, Callable[[ClickModelSettings], HistoryEncoder]] = {
    "none": lambda _: NoHistory(),
    "mean": lambda settings: MeanPooling(settings.embedding_size, settings.history_limit),
    "din": lambda settings: DeepInterest(settings.embedding_size, settings.recent),
    "target_attention": _target_attention,
    "full_target_attention": _full_target_attention,
    "sdim": _sdim,
    "sdim_long_short": lambda settings: LongShort(_sdim(settings), _target_attention(settings)),
}

__all__ = [
    "ENCODERS",
    "DeepInterest",
    "EmbeddedUsers",
    "HashSampledAttention",
    "HistoryEncoder",
    "LongShort",
    "MeanPooling",
    "NoHistory",
    "TargetAttention",
]
