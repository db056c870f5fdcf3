"""What the bundle of a model of tables says of itself."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hashtab.serving.manifest import TABLE, Manifest

GRAPH = "model.onnx"

Values = Literal["number", "text", "integer", "boolean"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that the model reads.

    Args:
        name: of the column.
        values: what it held in training: `number` is read as a number, all else as a category;
            `integer` are numbers that were said to be categories.
    """

    name: str
    values: Values

    @property
    def numeric(self) -> bool:
        """Whether its values are numbers, and not categories."""
        return self.values == "number"


@dataclass(frozen=True, kw_only=True)
class TableParity:
    """What the export's comparison of torch and onnxruntime came to.

    Args:
        rows: compared.
        largest_difference: between two predictions; of a regression, as a share of the largest
            prediction where that is above 1.
    """

    rows: int
    largest_difference: float


@dataclass(frozen=True, kw_only=True)
class TableManifest(Manifest):
    """All that a process needs to know to serve a model of tables.

    Args:
        task: what is predicted.
        target: name of the column that is predicted.
        columns: that the model reads, in their order.
        classes: labels as text, in the order of the probabilities; none for a regression.
        labels: what the labels were in training; `predict` gives them back so.
        quantiles: of the target that are predicted; none for its mean, or classes.
        parity: of torch and onnxruntime.
    """

    KIND: ClassVar[str] = TABLE

    task: Literal["classification", "regression"]
    target: str
    columns: tuple[Column, ...]
    classes: tuple[str, ...]
    labels: Values
    quantiles: tuple[float, ...] = ()
    parity: TableParity

    @property
    def tags(self) -> dict[str, str]:
        """What a registry shows of the bundle."""
        return super().tags | {"task": self.task, "target": self.target}
