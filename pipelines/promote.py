#!/usr/bin/env python3
"""Make the challenger of a registered model its champion, if it is better or that is asked for.

`python pipelines/promote.py --name my_model --data data/my_shop` scores the validation split with
both and compares them user by user; for models of tables `--data` is a labelled table that neither
has learnt from, and rows are compared. `--rollback` brings back the champion before this one. The
exit code is 0 when there is a new champion, 1 when the old one stays.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # The package, and not this folder with its plain names, is what imports are to find.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hashtab.features.errors import DataError
from hashtab.pipelines.command_line import SettingsError, parse
from hashtab.pipelines.comparison import plot_comparison
from hashtab.pipelines.judging import Verdict, judge_clicks, judge_tables
from hashtab.pipelines.leave import STOPPED
from hashtab.pipelines.places import DEFAULT_TRACKING, python_script, tracking_option
from hashtab.pipelines.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from hashtab.serving.errors import BundleError, RequestError
from hashtab.serving.manifest import TABLE, read_kind
from hashtab.serving.store import TableOverflowError


@dataclass(frozen=True, kw_only=True)
class PromoteSettings:
    """Settings of a promotion.

    Args:
        name: of the registered model.
        data: prepared data set whose validation split both are scored on; it may be a later one
            than they were trained on. For models of tables a CSV or Parquet file with the target.
        force: make the challenger the champion without a comparison.
        rollback: make the champion before this one the champion again.
        resamples: of the bootstrap over users or rows.
        confidence: that the difference must be above 0 with.
        tracking_uri: of MLflow.
    """

    name: str = "hashtab"
    data: str = "data/complete_journey"
    force: bool = False
    rollback: bool = False
    resamples: int = 2000
    confidence: float = 0.95
    tracking_uri: str = DEFAULT_TRACKING

    def __post_init__(self) -> None:
        if self.force and self.rollback:
            raise SettingsError("--force and --rollback are two different things: give one")
        if self.resamples < 1:
            raise SettingsError(f"resamples must be positive, got {self.resamples}")
        if not 0 < self.confidence < 1:
            raise SettingsError(f"confidence must be in (0, 1), got {self.confidence}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a promotion came to.

    Args:
        promoted: whether there is a new champion.
        text: what to tell a person.
    """

    promoted: bool
    text: str


def promote(settings: PromoteSettings) -> Outcome:
    """Compare and promote, or roll back, as the settings say.

    Raises:
        SettingsError: if there is no challenger, nothing to roll back to, or no MLflow.
        DataError: if the data lacks what a model reads.
        BundleError: if a bundle cannot be used.
    """
    registry = Registry(settings.tracking_uri, settings.name)
    if settings.rollback:
        return roll_back(registry)
    challenger = registry.version_of(CHALLENGER)
    champion = registry.aliases().get(CHAMPION)
    if champion is None:
        make_champion(registry, challenger)
        return Outcome(promoted=True, text=f"version {challenger} is the first champion")
    if champion == challenger:
        registry.remove_alias(CHALLENGER)  # left by a promotion that was killed
        return Outcome(promoted=True, text=f"version {champion} is the champion already")
    if settings.force:
        registry.tag(challenger, {"promotion": f"forced over version {champion}"})
        make_champion(registry, challenger)
        text = f"version {challenger} is the champion, as asked, in place of version {champion}"
        return Outcome(promoted=True, text=text)
    return _compare(settings, registry, champion, challenger)


def make_champion(registry: Registry, version: int) -> None:
    """Give a version the alias champion; the champion before it becomes `previous`.

    There is a champion at every moment, and done again after a kill it comes to the same end.
    """
    before = registry.aliases().get(CHAMPION)
    if before is not None and before != version:
        registry.set_alias(PREVIOUS, before)
    registry.set_alias(CHAMPION, version)
    if registry.aliases().get(CHALLENGER) == version:
        registry.remove_alias(CHALLENGER)


def roll_back(registry: Registry) -> Outcome:
    """Make `previous` the champion again; the version that it replaces keeps no alias.

    As a challenger, the next promotion on a schedule would bring it straight back.

    Raises:
        SettingsError: if there is no champion before this one.
    """
    previous, champion = registry.version_of(PREVIOUS), registry.aliases().get(CHAMPION)
    text = f"version {previous} is the champion again"
    if champion is not None and champion != previous:  # equal where a rollback was killed
        text += f" in place of version {champion}"
    registry.set_alias(CHAMPION, previous)
    registry.remove_alias(PREVIOUS)  # a second rollback is not to undo the first
    return Outcome(promoted=True, text=text)


def _compare(
    settings: PromoteSettings, registry: Registry, champion: int, challenger: int
) -> Outcome:
    versions = {
        f"champion, version {champion}": registry.download(champion),
        f"challenger, version {challenger}": registry.download(challenger),
    }
    before, after = (read_kind(folder) for folder in versions.values())
    if before != after:
        raise SettingsError(
            f"version {champion} is a model of {before}, version {challenger} of {after}: they "
            "cannot be compared; --force promotes all the same"
        )
    judge = judge_tables if after == TABLE else judge_clicks
    verdict = judge(versions, settings.data, settings.resamples, settings.confidence)
    _keep(settings, registry, champion, challenger, verdict)
    if verdict.comparison.better:
        make_champion(registry, challenger)
    text = _text(settings, champion, challenger, verdict)
    return Outcome(promoted=verdict.comparison.better, text=text)


def _keep(
    settings: PromoteSettings,
    registry: Registry,
    champion: int,
    challenger: int,
    verdict: Verdict,
) -> None:
    """Store the comparison beside the challenger, so that one sees later why it was promoted."""
    comparison = verdict.comparison
    found = {
        "champion": champion,
        "challenger": challenger,
        "data_digest": verdict.data_digest,
        "split": verdict.split,
        "gain": comparison.gain,
        "difference": comparison.difference,
        "low": comparison.low,
        "high": comparison.high,
        "confidence": settings.confidence,
        "resamples": settings.resamples,
        "share_better": comparison.share,
    }
    tags = {
        "promotion": f"{'better' if comparison.better else 'not surely better'} than version "
        f"{champion}",
        verdict.tag: f"{comparison.difference:+.5f}",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
        plot_comparison(comparison, Path(folder) / "comparison.png")
        registry.add_files(challenger, Path(folder), f"comparison-with-{champion}")
    registry.tag(challenger, tags)


def _text(settings: PromoteSettings, champion: int, challenger: int, verdict: Verdict) -> str:
    comparison = verdict.comparison
    decided = (
        f"version {challenger} is the champion now; take it back with --rollback"
        if comparison.better
        else f"version {champion} stays the champion: the difference is not surely above 0; "
        "--force promotes all the same"
    )
    return "\n".join(
        [
            verdict.table,
            "",
            f"{comparison.gain}: {comparison.difference:+.4f}, {settings.confidence:.0%} interval "
            f"{comparison.low:+.4f} to {comparison.high:+.4f}; the challenger is better in "
            f"{comparison.share:.0%} of {settings.resamples:,} resamples of the {comparison.over}",
            decided,
        ]
    )


def _next(settings: PromoteSettings) -> str:
    """Name the command that puts the champion to use."""
    registry = Registry(settings.tracking_uri, settings.name)
    champion = f"--bundle models:/{settings.name}@champion"
    tracked = tracking_option(settings.tracking_uri)
    if read_kind(registry.download(registry.version_of(CHAMPION))) == TABLE:
        return f"{python_script('score_table.py')} {champion} --rows new.csv{tracked}"
    script = python_script("encode_users.py")
    return f"{script} {champion} --data {settings.data} --store tables{tracked}"


def main(arguments: list[str] | None = None) -> int:
    """Parse, promote, report; what cannot be compared ends with one line and exit code 2."""
    try:
        settings = parse(PromoteSettings, arguments, __doc__)
        outcome = promote(settings)
    except (SettingsError, DataError, BundleError, RequestError, TableOverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was promoted", file=sys.stderr)
        return STOPPED
    print(outcome.text)
    print(f"next: {_next(settings)}")
    return 0 if outcome.promoted else 1


if __name__ == "__main__":
    sys.exit(main())
