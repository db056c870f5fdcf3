"""Figures as JSON and as a table in Markdown."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

Cell = str | int | float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one part of a measurement came to.

    Args:
        title: what was measured.
        notes: how, a sentence each.
        rows: by column; all with the columns of the first.
    """

    title: str
    notes: list[str]
    rows: list[dict[str, Cell]]

    def markdown(self) -> str:
        """Return title, table and notes."""
        columns = list(self.rows[0])
        lines = [
            " | ".join(columns),
            " | ".join("---" if i == 0 else "---:" for i in range(len(columns))),
            *(" | ".join(_shown(row[column]) for column in columns) for row in self.rows),
        ]
        table = "\n".join(f"| {line} |" for line in lines)
        return "\n".join([f"## {self.title}", "", table, "", *(f"- {n}" for n in self.notes), ""])


def _shown(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def write(figures: Figures, machine: dict[str, str], folder: Path, name: str) -> None:
    """Write `name.json` and `name.md`, and print the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"machine": machine, **asdict(figures)}
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n")
    measured = "; ".join(f"{what}: {value}" for what, value in machine.items())
    text = figures.markdown() + f"- {measured}\n"
    (folder / f"{name}.md").write_text(text)
    print(text, flush=True)
