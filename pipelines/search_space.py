"""What a tuning may try: declared ranges, drawn from by seed and trial number alone."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, ClassVar

import numpy as np

from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.settings import TrainSettings

RATES = ("learning_rate", "embedding_learning_rate")
_MAX_TAU = 16
_HASHING = ("sdim", "sdim_long_short")
_READ_BY = {
    "tau": _HASHING,
    "groups": _HASHING,
    "window": ("din", "target_attention", "sdim_long_short"),
}

Values = Mapping[str, int | float]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Declared ranges by setting, and what is drawn from them. An empty one is not searched.

    Attributes:
        logarithmic: settings with a lowest and a highest value, between which trials are
            log-uniform.
        choices: settings with values to choose from; all others are uniform between two values.
    """

    logarithmic: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in self.choices:
                self._check_choice(field.name)
            else:
                self._check_range(field.name)
        self._check_all((*self.logarithmic, *self.choices), lambda value: value > 0, "be positive")

    def draw_of(self, names: tuple[str, ...], trials: int, seed: int) -> list[Values]:
        """Return the values of each trial for some settings; no two trials are alike.

        The first trials of a longer tuning are those of a shorter one, and a setting's values do
        not depend on what else is searched, but where a trial is left out for being there already.

        Raises:
            SettingsError: if there is not enough to search for so many trials.
        """
        if all(name in self.choices for name in names):
            combinations = math.prod(len(getattr(self, name)) for name in names)
            if combinations < trials:
                raise SettingsError(
                    f"{trials} trials are asked for, the space has {combinations}: "
                    f"give --trials {combinations}, or more values"
                )
        found: list[Values] = []
        for values in self._endless(names, seed):
            if values not in found:
                found.append(values)
            if len(found) == trials:
                break
        return found

    def _endless(self, names: tuple[str, ...], seed: int) -> Iterator[Values]:
        every = [field.name for field in fields(self)]
        for number in count():
            yield {
                name: self._value(name, np.random.default_rng([seed, number, every.index(name)]))
                for name in names
            }

    def _value(self, name: str, random: np.random.Generator) -> int | float:
        if name in self.choices:
            return int(random.choice(getattr(self, name)))
        low, high = map(float, getattr(self, name))
        if name in self.logarithmic:
            drawn = math.exp(random.uniform(math.log(low), math.log(high)))
        else:
            drawn = random.uniform(low, high)
        # Three digits, so that tables, YAML and a person's notes hold the very value.
        return min(max(float(f"{drawn:.3g}"), low), high)

    def _check_range(self, name: str) -> None:
        values = getattr(self, name)
        if values and (len(values) != 2 or values[0] >= values[1]):
            raise SettingsError(
                f"space.{name} must hold the lowest and the highest value, or nothing, "
                f"got {list(values)}"
            )

    def _check_choice(self, name: str) -> None:
        values = getattr(self, name)
        if len(set(values)) < len(values):
            raise SettingsError(f"space.{name} names a value twice, got {list(values)}")

    def _check_all(self, names: tuple[str, ...], holds: Callable[[Any], bool], words: str) -> None:
        for name in names:
            values = getattr(self, name)
            if not all(holds(value) for value in values):
                raise SettingsError(f"values of space.{name} must {words}, got {list(values)}")


@dataclass(frozen=True, kw_only=True)
class SearchSpace(Ranges):
    """Ranges to search for a click model. One that is empty is not searched: its base value stays.

    A range of a setting that the history encoder does not read is not searched either.

    Args:
        learning_rate: the lowest and the highest, between which trials are log-uniform.
        embedding_learning_rate: the lowest and the highest, between which trials are log-uniform.
        embedding_size: values to choose from.
        tau: values to choose from.
        groups: values to choose from; planes = tau * groups.
        window: values to choose from.
        dropout: the lowest and the highest, between which trials are uniform.

    Raises:
        SettingsError: if a range is reversed, or a value is out of its setting's range or named
            twice.
    """

    logarithmic: ClassVar[tuple[str, ...]] = RATES
    choices: ClassVar[tuple[str, ...]] = ("embedding_size", "tau", "groups", "window")

    learning_rate: tuple[float, ...] = (3e-4, 3e-3)
    embedding_learning_rate: tuple[float, ...] = (5e-3, 5e-2)
    embedding_size: tuple[int, ...] = (16, 32, 64)
    tau: tuple[int, ...] = (3, 5, 8)
    groups: tuple[int, ...] = (8, 16, 24)
    window: tuple[int, ...] = (20, 50, 100)
    dropout: tuple[float, ...] = (0.0, 0.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_all(("tau",), lambda tau: tau <= _MAX_TAU, f"be at most {_MAX_TAU}")
        self._check_all(("dropout",), lambda share: 0 <= share < 1, "be in [0, 1)")

    def searched(self, encoder: str) -> tuple[str, ...]:
        """Return the names of the settings that are searched with a history encoder."""
        names = [field.name for field in fields(self) if getattr(self, field.name)]
        return tuple(name for name in names if encoder in _READ_BY.get(name, (encoder,)))

    def draw(self, encoder: str, trials: int, seed: int) -> list[Values]:
        """Return the values of each trial; no two trials are alike: see `draw_of`.

        Raises:
            SettingsError: if there is nothing to search, or not enough of it for so many trials.
        """
        names = self.searched(encoder)
        if not names:
            raise SettingsError(
                f"nothing to search: the encoder {encoder!r} reads no setting with a range; "
                "give one, for example --space.learning_rate [3e-4,3e-3]"
            )
        return self.draw_of(names, trials, seed)


def with_values(settings: TrainSettings, values: Values) -> TrainSettings:
    """Return settings with a trial's values in their places.

    Raises:
        ValueError: if a value is not one that its setting takes.
    """
    plain: dict[str, Any] = dict(values)
    rates = {name: plain.pop(name) for name in RATES if name in plain}
    tau = plain.pop("tau", settings.model.tau)
    groups = plain.pop("groups", settings.model.planes // settings.model.tau)
    return replace(
        settings,
        model=replace(settings.model, **plain, tau=tau, planes=tau * groups),
        optimiser=replace(settings.optimiser, **rates),
    )
