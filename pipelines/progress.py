"""What the user's terminal shows while a training goes on."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from hashtab.pipelines.checkpoints import Epoch

_SECONDS_BETWEEN_LINES = 15


class ProgressBar:
    """A bar on a terminal; a line now and then where the output is a file or a pipe.

    Args:
        name: of the run.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar = tqdm(
            desc=name,
            leave=False,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar:24}| {postfix}",
        )
        self._shown = 0
        self._last_line = time.monotonic()

    def show(self, event: dict[str, Any], epochs: Sequence[Epoch]) -> None:
        """Show one event and the epochs finished until then."""
        if event["event"] == "start":
            self._start(event, epochs)
        elif event["event"] == "step":
            self._step(event)
        for epoch in epochs[self._shown :]:
            self._say(
                f"epoch {epoch.number}: loss {epoch.loss:.4f}, validation gAUC {epoch.gauc:.4f}, "
                f"{epoch.samples_per_s:,.0f} samples/s, {epoch.seconds:.0f} s"
            )
        self._shown = max(self._shown, len(epochs))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _start(self, event: dict[str, Any], epochs: Sequence[Epoch]) -> None:
        self._bar.total = event["steps"]
        if event["step"]:
            batch = event["step"] - event["epoch"] * event["batches"]
            self._say(f"goes on from its checkpoint: epoch {event['epoch'] + 1}, batch {batch}")
            self._shown = len(epochs)

    def _step(self, event: dict[str, Any]) -> None:
        text = (
            f"epoch {event['epoch'] + 1}, loss {event['loss']:.4f}, "
            f"{event['samples_per_s']:,.0f} samples/s, {clock(event['seconds_left'])} left"
        )
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.n = event["step"]
        self._bar.refresh()
        since = time.monotonic() - self._last_line
        if self._bar.disable and since >= _SECONDS_BETWEEN_LINES:
            self._say(text)

    def _say(self, text: str) -> None:
        self._last_line = time.monotonic()
        tqdm.write(f"{self._name}  {text}", file=sys.stderr)


def clock(seconds: float) -> str:
    """Minutes and seconds, as `1:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
