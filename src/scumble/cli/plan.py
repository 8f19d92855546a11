"""The picture of a plan: what is trained, memory moment by moment, time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from scumble.runs.forecast import said
from scumble.training.sinks.console import fact

if TYPE_CHECKING:
    from scumble.runs.forecast import Forecast, Moment
    from scumble.runs.outlook import Outlook

WIDE = 40
"""Letters of the longest bar."""
COLOURS = {
    "activations": "yellow",
    "workspace": "bright_black",
    "gradients": "magenta",
    "optimizer": "magenta",
}
"""Of shares; weights are blue."""


def tables(outlook: Outlook) -> Iterator[Table | Text]:
    """All that is told of a run, top to bottom."""
    facts = {**outlook.facts, "output": outlook.config.output}
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(Text(str(name), style="bold"), Text(fact(value)))
    yield table
    for note in outlook.notes:
        yield Text(f"note: {note}", style="yellow")
    if outlook.forecast is not None:
        yield from _memory(outlook.forecast)
    for way in outlook.ways:
        assert outlook.forecast is not None
        yield Text(f"  {way.said(outlook.forecast)}")
    if outlook.pace is not None:
        yield _time(outlook)


def _memory(forecast: Forecast) -> Iterator[Table | Text]:
    from scumble.runs.afford import said_of

    peak = forecast.peak
    scale = max(peak.total, forecast.budget or 0) or 1
    table = Table(box=None, title=f"memory on {forecast.device}, predicted", title_justify="left")
    table.add_column("moment")
    table.add_column("at most", justify="right")
    table.add_column("", no_wrap=True, min_width=WIDE)
    table.add_column("of which")
    for moment in forecast.moments:
        style = "bold" if moment is peak else ""
        bar = _bar(moment, scale)
        table.add_row(Text(moment.name, style), Text(said(moment.total), style), bar, moment.largest)
    yield table
    budget = "" if forecast.budget is None else f"; it may take {said(forecast.budget)}"
    text = f"Most is taken in {peak.name}: {said(peak.total)}{budget}. "
    text += f"{said_of(forecast.recomputed).capitalize()}."
    if not forecast.fits:
        text += " It would be refused. What would fit, cheapest first:"
    yield Text(text, style="" if forecast.fits else "bold red")


def _bar(moment: Moment, scale: int) -> Text:
    """The shares side by side; all bars have one scale."""
    bar, drawn, passed = Text(), 0, 0
    for share in moment.shares:
        passed += share.size
        until = round(WIDE * passed / scale)
        bar.append("█" * (until - drawn), COLOURS.get(share.name, "blue"))
        drawn = until
    return bar


def _time(outlook: Outlook) -> Table:
    assert outlook.pace is not None
    pace, found = outlook.pace, outlook.seconds
    title = f"time, from {pace.steps} step{'s' if pace.steps > 1 else ''}: {pace.step:.3g} s each"
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    for name, seconds in {**found, "in all": sum(found.values())}.items():
        table.add_row(Text(name, style="bold"), Text(str(timedelta(seconds=round(seconds)))))
    return table
