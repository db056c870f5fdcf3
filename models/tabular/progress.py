"""A bar over the epochs of a training, where one was asked for."""

from types import TracebackType
from typing import Any, Self


class Progress:
    """Show epochs and losses while `verbose` is not zero; needs tqdm then."""

    def __init__(self, epochs: int, verbose: int) -> None:
        self._bar: Any = None
        if verbose:
            from tqdm.auto import tqdm  # not needed by who trains in silence

            self._bar = tqdm(total=epochs, unit="epoch")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, record: dict[str, float]) -> None:
        """Show the record of one more epoch."""
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in record.items() if k != "epoch"})
            self._bar.update()
