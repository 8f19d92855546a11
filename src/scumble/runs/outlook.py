"""Outlook: what a run would be: what it trains, how much memory it takes and when, and how long it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scumble.data.check import DataReport
from scumble.data.loader import no_progress
from scumble.runs.afford import Way, predicted, ways
from scumble.runs.build import Progress, check_data
from scumble.runs.config import RunConfig
from scumble.runs.forecast import Forecast
from scumble.runs.rehearsal import NotPlayable
from scumble.runs.train import recomputing, resolve_config
from scumble.runs.warmup import STEPS, Pace, warm_up


@dataclass(frozen=True)
class Outlook:
    """A run, told before it begins."""

    config: RunConfig
    """With what is recomputed settled."""
    report: DataReport | None
    """Of its data."""
    forecast: Forecast | None
    """Its memory; None where that can't be told."""
    ways: tuple[Way, ...]
    """Other settings with which it would fit; none where it does."""
    pace: Pace | None
    """None where no step was done: it does not fit, or none was asked for."""
    notes: tuple[str, ...] = ()
    planned: Mapping[str, object] = field(default_factory=dict)
    """What the plan says of itself before the data is opened."""

    @property
    def fits(self) -> bool:
        """Whether it is predicted to keep its memory budget."""
        return self.forecast is None or self.forecast.fits

    @property
    def facts(self) -> Mapping[str, object]:
        """What the plan says of itself."""
        return self.planned if self.pace is None else self.pace.facts

    @property
    def seconds(self) -> dict[str, float]:
        """What takes how long; empty without a pace. Phases whose steps were not done are taken to compute as fast as
        the one that was."""
        pace, forecast = self.pace, self.forecast
        if pace is None:
            return {}
        pictures = len(self.report.pictures) if self.report else 0
        found = {"loading": pace.loading, "encoding": pictures * pace.encoding}
        if forecast is None or not forecast.work:
            return {**found, "training": pace.step * self.config.train.steps}
        first = forecast.work[0]
        rate = first.flops / pace.step if pace.step else 0.0
        for work in forecast.work:
            found[work.name] = work.times * (work.flops / rate if rate else pace.step)
        return found


def plan(
    config: RunConfig | str | Path | None = None,
    *overrides: str,
    steps: int = STEPS,
    progress: Progress = no_progress,
    **settings: object,
) -> Outlook:
    """Predict a run: memory first, from shapes alone; then, where it fits, time, from its first steps. Writes nothing
    that stays.

        print(scumble.plan("run.toml", "train.batch=8").forecast)

    Args:
        config, overrides, settings: as for `scumble.train`.
        steps: done for real; 0 loads no weight.
        progress: told how far the check of the data is.

    Raises:
        ScumbleError: what is wrong with settings, base or data; a run that doesn't fit is told, not raised.
    """
    asked = resolve_config(config, overrides, settings)
    _, report, warnings = check_data(asked, progress=progress)
    forecast, planned, found = None, dict[str, object](), list[Way]()
    notes = [str(problem) for problem in warnings] if report is None else []
    try:
        forecaster, forecast = predicted(asked, report)
        planned = dict(forecaster.rehearsal().plan.facts)
        if asked.train.gradient_checkpointing == "auto":
            asked = recomputing(asked, forecast.recomputed)
        if not forecast.fits:
            found = ways(forecaster, forecast)
    except NotPlayable as why:
        notes.append(f"How much memory it takes can't be told. {why}")
    pace = warm_up(asked, steps) if steps and (forecast is None or forecast.fits) else None
    return Outlook(asked, report, forecast, tuple(found), pace, tuple(notes), planned)
