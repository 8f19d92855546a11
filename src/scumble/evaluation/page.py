"""Page: an evaluation as one HTML page that needs nothing else: numbers with intervals, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.evaluation.measure import CLASS, SUBJECT, UNRELATED, Measured
from scumble.training.sinks.charts import Curve, Mark, chart
from scumble.training.sinks.look import BRUSH, CSS
from scumble.training.sinks.page import Pictures

if TYPE_CHECKING:
    from scumble.evaluation.result import Evaluation, Judged

SHOWN = {SUBJECT: 16, CLASS: 8, UNRELATED: 8}
"""Pairs of pictures of each group on the page; all of them lie beside it."""
SIDE = 256
"""Longest side of a picture on the page, in pixels."""
SECTIONS = {
    "learned": "Learned: how like the subject",
    "obeys": "Obeys: what the prompt asks",
    "broke": "Broke: what it has nothing to do with",
    "copied": "Copied: how near to a training picture",
}
TITLES = {
    SUBJECT: "The subject in new scenes",
    CLASS: "The bare class",
    UNRELATED: "Unrelated prompts, those that moved most first",
}
STYLE = """
.rows { border-collapse: separate; border-spacing: 0; width: 100%; margin-top: 12px; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; overflow: hidden; font-variant-numeric: tabular-nums }
.rows th, .rows td { padding: 7px 14px; text-align: left; border-bottom: 1px solid var(--grid) }
.rows tr:last-child>* { border-bottom: 0 }
.rows th { font-weight: 500; color: var(--soft) }
.rows small { color: var(--soft) }
.pairs { display: grid; grid-template-columns: repeat(auto-fill,minmax(min(100%,330px),1fr)); gap: 16px;
  margin-top: 14px }
.pairs .prompt { padding: 12px }
.pairs h3 { font-size: 15px }
"""


def render(found: Evaluation) -> str:
    """The whole page."""
    best = found.recommended or found.judged[-1]
    pictures = Pictures(found.folder)
    body = "".join(
        [
            _header(found, best),
            _figures(best),
            _checkpoints(found),
            *(_section(section, best.scores.of(section)) for section in SECTIONS),
            *(_gallery(group, found, best, pictures) for group in TITLES if group in found.asks),
            _copies(found, best, pictures),
            _notes(found.notes),
            "<footer>Written by <b>scumble evaluate</b>. Intervals are 95 % by bootstrap over prompts and seeds. "
            "This page needs nothing but itself.</footer>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(found.concept.phrase)}: evaluation</title><style>{CSS}{STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(found: Evaluation, best: Judged) -> str:
    pill = '<span class="pill complete">recommended</span>' if found.recommended else ""
    judge = f"judged by {found.eye}" if found.eye else "nobody to judge likeness"
    return (
        f'<header><p class="brand">{BRUSH}scumble</p><h1>{escape(found.concept.phrase)} {pill}</h1>'
        f'<p class="sub">{escape(best.candidate.label)} · {escape(str(best.candidate.file))} · on '
        f"{escape(found.base)} · {escape(judge)}</p></header>"
    )


def _figures(best: Judged) -> str:
    scores = best.scores
    cards = [
        ("learned", scores.learned, "how like the subject"),
        ("obeys", scores.obeys, "what the prompts ask"),
        ("kept", scores.kept, "of what the base could do"),
        ("overall", scores.overall, "harmonic mean of these"),
    ]
    cells = "".join(
        f'<div class="figure"><span>{word}</span><b>{_share(value)}</b><small>{about}</small></div>'
        for word, value, about in cards
    )
    copies = next((m for m in scores.of("copied") if m.name == "copies"), None)
    if copies is not None:
        cells += (
            f'<div class="figure{" bad" if copies.adapter.low > 0 else ""}"><span>copies</span>'
            f"<b>{_share(copies.adapter.value)}</b><small>of its pictures are nearly a training picture</small></div>"
        )
    return f'<section class="figures">{cells}</section>'


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0%}"


def _number(value: float, unit: str) -> str:
    return {"share": f"{value:.0%}", "cosine": f"{value:.3f}"}.get(unit, f"{value:.1f}")


def _section(section: str, measures: Sequence[Measured]) -> str:
    if not measures:
        return ""
    rows = "".join(
        f"<tr><th>{escape(m.name)}<br><small>{escape(m.about)}</small></th>"
        f"<td>{_cell(m, adapter=True)}</td><td>{_cell(m, adapter=False)}</td></tr>"
        for m in measures
    )
    return (
        f"<section><h2>{SECTIONS[section]}</h2>"
        f'<table class="rows"><tr><th></th><th>adapter</th><th>base</th></tr>{rows}</table></section>'
    )


def _cell(measured: Measured, *, adapter: bool) -> str:
    estimate = measured.adapter if adapter else measured.base
    if estimate is None:
        return "<small>none</small>"
    low, high = (_number(value, measured.unit) for value in (estimate.low, estimate.high))
    return f"{_number(estimate.value, measured.unit)} <small>{low} to {high}</small>"


def _checkpoints(found: Evaluation) -> str:
    if len(found.judged) < 2:
        return ""
    rows = []
    for one in found.judged:
        scores = one.scores
        pill = ' <span class="pill complete">recommended</span>' if one is found.recommended else ""
        cells = "".join(
            f"<td>{_share(value)}</td>"
            for value in (scores.learned, scores.obeys, scores.kept, scores.overall)
        )
        rows.append(f"<tr><th>{escape(one.candidate.label)}{pill}</th>{cells}</tr>")
    head = "".join(f"<th>{word}</th>" for word in ("", "learned", "obeys", "kept", "overall"))
    return (
        f'<section><h2>Checkpoints</h2>{_curves(found)}<table class="rows"><tr>{head}</tr>{"".join(rows)}</table>'
        "</section>"
    )


def _curves(found: Evaluation) -> str:
    steps = [float(one.candidate.step) for one in found.judged if one.candidate.step is not None]
    with_steps = [one for one in found.judged if one.candidate.step is not None]
    curves = []
    for word, style in (("learned", "main"), ("obeys", "second"), ("kept", "third"), ("overall", "fourth")):
        values = [getattr(one.scores, word) for one in with_steps]
        if all(value is not None for value in values):
            curves.append(Curve(word, steps, values, style))
    if len(steps) < 2 or not curves:
        return ""
    best = found.recommended
    marks = []
    if best is not None and best.candidate.step is not None and best.scores.overall is not None:
        marks = [Mark("recommended", best.candidate.step, best.scores.overall)]
    keys = "".join(f'<span class="key {curve.style}"><i></i>{curve.label}</span>' for curve in curves)
    return (
        f'<div class="plots"><figure class="plot"><figcaption><b>By step</b><span class="legend">{keys}</span>'
        f"</figcaption>{chart('scores by step', curves, marks=marks)}<output></output></figure></div>"
    )


def _gallery(group: str, found: Evaluation, best: Judged, pictures: Pictures) -> str:
    count, per = len(found.base_pictures[group]), len(found.seeds[group])
    order = list(range(count))
    if group == UNRELATED:
        order.sort(key=lambda number: -best.scores.drift[number])
    cards = []
    for number in order[: SHOWN[group]]:
        ask = found.asks[group][number // per]
        words = [f"seed {found.seeds[group][number % per]}"]
        if group == UNRELATED:
            words.append(f"moved by {best.scores.drift[number]:.1f} levels")
        cards.append(
            _pair(
                ask.prompt,
                ("base", found.base_pictures[group][number]),
                ("adapter", best.pictures[group][number]),
                " · ".join(words),
                pictures,
            )
        )
    more = f" {count - len(cards)} more pairs lie beside this page." if count > len(cards) else ""
    return (
        f'<section><h2>{TITLES[group]}</h2><p class="hint">One seed, two pictures: the base, and the base with the '
        f'adapter.{more}</p><div class="pairs">{"".join(cards)}</div></section>'
    )


def _copies(found: Evaluation, best: Judged, pictures: Pictures) -> str:
    if not best.scores.nearest:
        return ""
    order = sorted(range(len(best.scores.nearest)), key=lambda number: best.scores.nearest[number][1])
    per = len(found.seeds[SUBJECT])
    cards = []
    for number in order[: SHOWN[CLASS]]:
        training, far = best.scores.nearest[number]
        cards.append(
            _pair(
                found.asks[SUBJECT][number // per].prompt,
                ("training picture", found.training[training]),
                ("adapter", best.pictures[SUBJECT][number]),
                f"{far:.1f} levels apart · {found.concept.keys[training]}",
                pictures,
            )
        )
    return (
        '<section><h2>Nearest training pictures</h2><p class="hint">What was learned by heart shows here first: the '
        f'adapter\'s pictures that come nearest to a training picture.</p><div class="pairs">{"".join(cards)}</div>'
        "</section>"
    )


def _pair(title: str, left: tuple[str, Path], right: tuple[str, Path], meta: str, pictures: Pictures) -> str:
    figures = []
    for (word, path), kind in ((left, ""), (right, ' class="adapter"')):
        found = pictures.get(str(path), SIDE)
        assert found is not None, f"{path} was just written"
        address, width, height = found
        figures.append(
            f'<figure{kind}><img src="{address}" width="{width}" height="{height}" alt="{escape(word)}" '
            f'loading="lazy"><figcaption>{escape(word)}</figcaption></figure>'
        )
    return (
        f'<article class="prompt"><h3>{escape(title)}</h3><div class="pair">{"".join(figures)}</div>'
        f'<p class="meta">{escape(meta)}</p></article>'
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(
        f'<li class="note"><span></span><b>note</b><div>{escape(note)}</div></li>' for note in notes
    )
    return f'<section><h2>Notes</h2><ol class="notes">{items}</ol></section>'
