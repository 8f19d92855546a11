"""Page: a run's record as one HTML page that needs nothing else, light or dark as the reader likes."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scumble.training.sinks.charts import Curve, Mark, chart, number
from scumble.training.sinks.console import duration, fact, rate
from scumble.training.sinks.look import BRUSH, CSS, SCRIPT
from scumble.training.sinks.record import RunRecord
from scumble.training.sinks.smoothing import Smoothed

SMALL, LARGE, STEPS = 256, 512, 24
"""Longest side in pixels of a film strip's pictures, and of the latest; the most steps in a film strip."""


class Pictures:
    """Picture files as `data:` addresses, made smaller where they are large; each is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: dict[tuple[str, int, int], tuple[str, int, int]] = {}

    def get(self, path: str, side: int) -> tuple[str, int, int] | None:
        """(address, width, height), at most `side` pixels along either side; None when the file is gone."""
        # A run's folder may be moved as a whole: what was inside it is looked for inside it.
        file = Path(path)
        if not file.exists():
            file = next((f for f in (self._folder / file, *self._inside(file)) if f.exists()), file)
        if not file.exists():
            return None
        key = (str(file), file.stat().st_mtime_ns, side)
        if key not in self._cache:
            self._cache[key] = _embed(file, side)
        return self._cache[key]

    def _inside(self, file: Path) -> Iterable[Path]:
        return (self._folder / Path(*file.parts[-n:]) for n in range(1, min(4, len(file.parts)) + 1))


def _embed(file: Path, side: int) -> tuple[str, int, int]:
    from PIL import Image

    with Image.open(file) as image:
        shown = image.convert("RGB")
        # Tiny pictures grow by whole multiples: the browser would blur them, or make their pixels uneven.
        times = max(1, min(SMALL, side) // max(shown.size))
        shown = shown.resize((shown.width * times, shown.height * times), Image.Resampling.NEAREST)
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
        (width, height), buffer = shown.size, io.BytesIO()
        shown.save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode(), width, height


def render(record: RunRecord, pictures: Pictures) -> str:
    """The whole page."""
    data = json.dumps(record.as_json(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    state, word = _state(record)
    body = "".join(
        [
            _header(record, state, word),
            _figures(record),
            _gallery(record, pictures),
            _curves(record),
            _table("What was trained", record.facts, open=True),
            _notes(record),
            _table("Settings", record.settings, open=not record.previews),
            "<footer>Written by <b>scumble</b>. This page needs nothing but itself.</footer>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(record.name)}: {escape(word)}</title><style>{CSS}</style></head>\n"
        f'<body data-state="{state}"><main>{body}</main>\n'
        f'<script type="application/json" id="run">{data}</script>\n<script>{SCRIPT}</script></body></html>\n'
    )


def _state(record: RunRecord) -> tuple[str, str]:
    if record.finished is None:
        return "running", "running"
    reason = record.finished["reason"]
    # "complete" and "interrupted" are words; what went wrong is a sentence, and has a line of its own.
    return ("complete" if reason == "complete" else "stopped"), (reason if " " not in reason else "stopped")


def _header(record: RunRecord, state: str, word: str) -> str:
    done = record.steps[-1] if record.steps else 0
    share = done / record.total_steps if record.total_steps else 0
    when = record.started.replace("T", " ").replace("+00:00", " UTC")
    again = "".join(f" · resumed after step {step:,}" for step in record.resumed_after)
    reason = record.finished["reason"] if record.finished else word
    return (
        f'<header><p class="brand">{BRUSH}scumble</p><h1>{escape(record.name)} '
        f'<span class="pill {state}">{escape(word)}</span></h1>'
        f'<p class="sub">begun {escape(when)}{again}</p>'
        + (f'<p class="reason">{escape(reason)}</p>' if reason != word else "")
        + f'<div class="progress" title="{done:,} of {record.total_steps:,} steps">'
        f'<i style="width:{100 * share:.1f}%"></i></div></header>'
    )


def _figures(record: RunRecord) -> str:
    cards: list[tuple[str, str, str]] = []
    done = record.steps[-1] if record.steps else 0
    cards.append(("steps", f"{done:,}", f"of {record.total_steps:,}"))
    if record.losses:
        smooth = smoothed(record.losses)
        cards.append(
            (
                "training loss",
                f"{smooth[-1]:.4f}",
                f"smoothed; at first {smooth[min(9, len(smooth) - 1)]:.4f}",
            )
        )
    best = _best(record)
    if best:
        change = 100 * (best["adapter"] / best["base"] - 1) if best["base"] else math.nan
        cards.append(
            ("held-out loss", f"{change:+.1f} %", f"against the base, best at step {best['step']:,}")
        )
    latest = record.previews[-1]["panels"] if record.previews else []
    if latest:
        mean = sum(panel["difference"] for panel in latest) / len(latest)
        cards.append(("pictures moved", f"{mean:.1f}", "of 255, mean against the base"))
    if record.seconds:
        recent = record.seconds[-100:]
        speed = rate(sum(recent) / len(recent))
        passed = record.finished["seconds"] if record.finished else sum(record.seconds)
        value, _, unit = speed.partition(" ")
        cards.append(("speed", value, f"{unit}, {duration(passed)} in all"))
    cards.append(("skipped", f"{len(record.skipped):,}", "steps that were not finite"))
    items = "".join(
        f'<div class="figure{" bad" if name == "skipped" and record.skipped else ""}">'
        f"<span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in cards
    )
    return f'<section class="figures">{items}</section>'


def _best(record: RunRecord) -> dict[str, Any] | None:
    return next((row for row in reversed(record.held_out) if row["best"]), None)


def _gallery(record: RunRecord, pictures: Pictures) -> str:
    if not record.previews:
        return ""
    chosen = _spread(record.previews, STEPS)
    left_out = len(record.previews) - len(chosen)
    last = len(chosen) - 1
    cards = "".join(_prompt(number, chosen, pictures) for number in range(len(chosen[-1]["panels"])))
    steps = ",".join(str(row["step"]) for row in chosen)
    more = (
        f" {left_out} steps between are left out here; their pictures are in the run's folder."
        if left_out
        else ""
    )
    scrub = (
        f'<label class="scrub">step <output>{chosen[-1]["step"]:,}</output>'
        f'<input type="range" min="0" max="{last}" value="{last}" data-steps="{steps}" aria-label="step">'
        "</label>"
        if last
        else f'<span class="scrub">step <output>{chosen[-1]["step"]:,}</output></span>'
    )
    return (
        f'<section class="gallery"><div class="bar"><h2>Pictures</h2>{scrub}</div>'
        '<p class="hint">One seed, two pictures: the base, and the base with this adapter, read from its '
        f"saved file.{more}</p>"
        f'<div class="prompts">{cards}</div></section>'
    )


def _prompt(number: int, chosen: Sequence[Mapping[str, Any]], pictures: Pictures) -> str:
    panel = chosen[-1]["panels"][number]
    strip = []
    for row in chosen:
        # A resumed run may have other prompts than the run before it.
        same = (p for p in row["panels"] if (p["prompt"], p["seed"]) == (panel["prompt"], panel["seed"]))
        then = next(same, None)
        if then is None:
            continue
        image = _img(pictures, then["adapter"], SMALL, f"step {row['step']}")
        now = " aria-current=true" if row is chosen[-1] else ""
        bad = int(then["difference"] == 0)
        strip.append(
            f'<button data-step="{row["step"]}" data-words="{_moved(then)}" data-bad="{bad}"{now}>{image}'
            f"<span>{row['step']:,}</span></button>"
        )
    base, adapter = (_img(pictures, panel[word], LARGE, word) for word in ("base", "adapter"))
    word = "difference bad" if panel["difference"] == 0 else "difference"
    return (
        f'<article class="prompt"><h3>{escape(panel["prompt"]) or "<i>no words</i>"}</h3>'
        f'<div class="pair"><figure>{base}<figcaption>base</figcaption></figure>'
        f'<figure class="adapter">{adapter}<figcaption>adapter</figcaption></figure></div>'
        f'<p class="meta"><span class="{word}">{_moved(panel)}</span> · seed {panel["seed"]}</p>'
        + (f'<div class="strip">{"".join(strip)}</div>' if len(strip) > 1 else "")
        + "</article>"
    )


def _moved(panel: Mapping[str, Any]) -> str:
    if panel["difference"] == 0:
        return "the same picture: the adapter does nothing here"
    shown = f"{panel['difference']:.1f}" if panel["difference"] >= 0.1 else f"{panel['difference']:.1g}"
    return f"differs by {shown} of 255"


def _img(pictures: Pictures, path: str, side: int, word: str) -> str:
    found = pictures.get(path, side)
    if found is None:
        return f'<div class="missing">no file<br>{escape(Path(path).name)}</div>'
    address, width, height = found
    return f'<img src="{address}" width="{width}" height="{height}" alt="{escape(word)}" loading="lazy">'


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _curves(record: RunRecord) -> str:
    if not record.steps and not record.held_out:
        return ""
    end = record.steps[-1] if record.steps else record.held_out[-1]["step"]
    plots = []
    if record.held_out:
        steps = [row["step"] for row in record.held_out]
        curves = [
            Curve("base", steps, [float(row["base"]) for row in record.held_out], "dashed"),
            Curve(
                "adapter",
                steps,
                [float(row["adapter"]) for row in record.held_out],
                "main",
                [float(row["interval"]) for row in record.held_out],
            ),
        ]
        best = _best(record)
        marks = (
            [Mark(f"best {best['adapter']:.4f} at {best['step']:,}", best["step"], best["adapter"])]
            if best
            else []
        )
        plots.append(
            _plot(
                "Held-out loss",
                "on pictures kept out of training, at fixed noise; band: 95 % interval of the difference",
                [("main", "adapter"), ("dashed", "base")],
                chart("held-out loss", curves, marks=marks, last_step=end),
            )
        )
    # Several phases (tokens, then the adapter) are told apart; one needs no line.
    phases = [(float(first), name) for first, name in record.phases] if len(record.phases) > 1 else []
    if record.steps:
        plots.append(
            _plot(
                "Training loss",
                "each step draws other noise, so look at the smoothed line",
                [("main", "smoothed"), ("faint", "each step")],
                chart(
                    "training loss",
                    [
                        Curve("each step", record.steps, record.losses, "faint"),
                        Curve("smoothed", record.steps, smoothed(record.losses)),
                    ],
                    dividers=phases,
                ),
            )
        )
        plots.append(
            _plot(
                "Gradient norm",
                "before clipping",
                [("main", "smoothed"), ("faint", "each step")],
                chart(
                    "gradient norm",
                    [
                        Curve("each step", record.steps, record.norms, "faint"),
                        Curve("smoothed", record.steps, smoothed(record.norms)),
                    ],
                    log=True,
                ),
            )
        )
        styles = ("main", "second", "third", "fourth")
        rates = {
            name: Curve(
                name, record.steps, [math.nan if x is None else float(x) for x in column], styles[i % 4]
            )
            for i, (name, column) in enumerate(sorted(record.rates.items()))
        }
        if rates:
            plots.append(
                _plot(
                    "Learning rate",
                    "as used in each step",
                    [(curve.style, name) for name, curve in rates.items()],
                    chart("learning rate", list(rates.values())),
                )
            )
    return f'<section><h2>Curves</h2><div class="plots">{"".join(plots)}</div></section>'


def _plot(title: str, hint: str, legend: Sequence[tuple[str, str]], svg: str) -> str:
    keys = "".join(f'<span class="key {style}"><i></i>{escape(name)}</span>' for style, name in legend)
    return (
        f'<figure class="plot"><figcaption><b>{escape(title)}</b><span class="legend">{keys}</span>'
        f"<small>{escape(hint)}</small></figcaption>{svg}<output></output></figure>"
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """The running average, with a half-life that grows with the length of the run (5 to 100 steps)."""
    average = Smoothed(half_life=min(100.0, max(5.0, len(values) / 20)))
    return [average.add(float(value)) for value in values]


def _notes(record: RunRecord) -> str:
    rows = [(row["step"], "note", row["text"]) for row in record.notes]
    rows += [
        (row["step"], "skipped", f"{row['reason']}. Pictures: {', '.join(row['pictures']) or 'unknown'}")
        for row in record.skipped
    ]
    kept = record.saved[-1:] if record.saved else []
    rows += [(row["step"], "saved", str(row["path"])) for row in kept]
    if not rows:
        return ""
    items = "".join(
        f'<li class="{kind}"><span>step {step:,}</span><b>{kind}</b><div>{escape(text)}</div></li>'
        for step, kind, text in sorted(rows)
    )
    return f'<section><h2>Notes</h2><ol class="notes">{items}</ol></section>'


def _table(title: str, values: Mapping[str, Any], *, open: bool) -> str:
    if not values:
        return ""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in _flat(values))
    return (
        f"<section><details{' open' if open else ''}><summary><h2>{escape(title)}</h2></summary>"
        f'<table class="values">{rows}</table></details></section>'
    )


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        path = f"{before}{name}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, path + ".")
        elif isinstance(value, float):
            rows.append((path, number(value)))
        elif value is None or value == "" or value == [] or value == {}:
            rows.append((path, "none"))
        else:
            rows.append((path, fact(value)))
    return rows
