"""How well each history encoder ranks, alone and with counters: tuned on validation, three seeds.

    python experiments/compare_encoders.py --data data/complete_journey

Each encoder first tries the default rates and dropout and the same drawn ones on seed 0, ours and
the rivals alike, and keeps those of the best validation gAUC; then it is trained with all seeds.
Test figures are printed once, at the end, and choose nothing. Every training is an ordinary run in
MLflow; a rerun reads what is finished and goes on with the rest.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.features.dataset import Dataset
from hashtab.models.ctr import ClickModelSettings
from hashtab.pipelines.cluster import cluster
from hashtab.pipelines.command_line import parse
from hashtab.pipelines.driver import train_runs
from hashtab.pipelines.runs import Run
from hashtab.pipelines.search_space import SearchSpace, Values, with_values
from hashtab.pipelines.settings import TrainSettings
from hashtab.pipelines.tracking import Tracking

ENCODERS = {
    "no history": ClickModelSettings(encoder="none"),
    "mean pooling": ClickModelSettings(encoder="mean"),
    "DIN, last 50": ClickModelSettings(encoder="din"),
    "exact attention, last 50": ClickModelSettings(encoder="target_attention"),
    "exact attention, all": ClickModelSettings(encoder="full_target_attention"),
    "SDIM": ClickModelSettings(encoder="sdim"),
    "SDIM + exact attention, last 50": ClickModelSettings(encoder="sdim_long_short"),
}
VARIANTS = ENCODERS | {
    f"{name} + counters": replace(model, counters=True) for name, model in ENCODERS.items()
}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of the comparison.

    Args:
        data: folder of a prepared data set.
        storage: folder of all runs.
        seeds: of the final trainings.
        trials: rates and dropouts that each variant may choose from, the default ones among them.
        workers: trainings at a time, one core each.
        only: variants by name; all when empty.
    """

    data: str = "data/complete_journey"
    storage: str = "runs/compare_encoders"
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 8
    workers: int = 2
    only: tuple[str, ...] = ()


def main() -> None:
    """Tune on validation, train with all seeds, print one table."""
    settings = parse(CompareSettings, None, __doc__)
    variants = {
        name: model
        for name, model in VARIANTS.items()
        if not settings.only or name in settings.only
    }
    with cluster(settings.workers, None):
        chosen = _tune(settings, variants)
        runs = {
            name: [_train_settings(settings, model, chosen[name], seed) for seed in settings.seeds]
            for name, model in variants.items()
        }
        _train(run for several in runs.values() for run in several)
        found = {name: _train(several) for name, several in runs.items()}
    _print_table(found)


def _train_settings(
    settings: CompareSettings, model: ClickModelSettings, values: Values, seed: int
) -> TrainSettings:
    base = TrainSettings(
        data=settings.data,
        storage=settings.storage,
        model=model,
        seed=seed,
        workers=settings.workers,
        experiment="compare_encoders",
    )
    return with_values(base, values)


def _train(wanted: Iterable[TrainSettings]) -> list[Run]:
    """Train what is not trained yet, a run a worker; return all."""
    several = list(wanted)
    manifest = Dataset.open(several[0].data).manifest
    runs = [Run.find_or_resume(settings, manifest) for settings in several]
    tracking = Tracking(several[0].tracking_uri, several[0].experiment)
    train_runs(runs, manifest, tracking, apart=True)
    return runs


def _tune(settings: CompareSettings, variants: dict[str, ClickModelSettings]) -> dict[str, Values]:
    """Return each variant's values of the best validation gAUC on seed 0."""
    space = SearchSpace(embedding_size=(), tau=(), groups=(), window=())
    drawn = space.draw("none", settings.trials - 1, seed=0) if settings.trials > 1 else []
    values: list[Values] = [{}, *drawn]
    runs = _train(
        _train_settings(settings, model, some, 0) for model in variants.values() for some in values
    )
    scores = iter([run.result.metrics["validation"]["gauc"] for run in runs])
    return {name: max(values, key=lambda _: next(scores)) for name in variants}


def _print_table(found: dict[str, list[Run]]) -> None:
    columns = ("validation", "test", "test_uniform")
    print(
        f"{'history encoder':<44}{'rate':>9}{'embeddings':>12}{'dropout':>9}"
        + "".join(f"{c + ' gAUC':>24}" for c in columns)
        + f"{'seconds':>10}"
    )
    for name, runs in found.items():
        cells = []
        for split in columns:
            scores = [run.result.metrics[split]["gauc"] for run in runs]
            spread = f" +- {stdev(scores):.4f}" if len(scores) > 1 else ""
            cells.append(f"{mean(scores):.4f}{spread}")
        seconds = mean(run.result.seconds for run in runs)
        chosen = runs[0].settings
        rates = chosen.optimiser.learning_rate, chosen.optimiser.embedding_learning_rate
        line = f"{name:<44}{rates[0]:>9g}{rates[1]:>12g}{chosen.model.dropout:>9g}"
        line += "".join(f"{cell:>24}" for cell in cells)
        print(f"{line}{seconds:>10.0f}")


if __name__ == "__main__":
    main()
