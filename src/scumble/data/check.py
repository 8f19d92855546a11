"""check: everything that is wrong with a dataset, said at once, before any model is loaded.

Every file is opened and decoded as training will do it, so that no picture fails in the middle of a run.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from scumble.data import captions as words
from scumble.data import masks
from scumble.data.buckets import choose, target_shapes, too_small
from scumble.data.cuts import anew, bounded
from scumble.data.duplicates import Look, look_of, near_pairs
from scumble.data.images import Geometry, Measured, Size, center, cut, measure, open_upright, see_through
from scumble.data.parallel import in_order
from scumble.data.problems import Problem, Refused, raise_all
from scumble.data.record import Record
from scumble.data.settings import DataSettings
from scumble.data.sheet import MOST, Tile, contact_sheet, shrunk
from scumble.data.sources import look
from scumble.rng import Streams

TokenCounter = Callable[[Sequence[str]], tuple[list[int], int]]
"""(tokens of each caption without truncation, the limit); `BaseModel.token_counts` is one."""

ENLARGED = 1.2
"""A picture enlarged more than this is a warning."""
CROPPED = 0.05
"""A picture that loses more than this part of its area is a warning."""
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class PictureFacts:
    """What happens to one picture."""

    key: str
    geometry: Geometry
    """Cut in the middle; with random crops, one of several."""
    captions: tuple[str, ...]
    """All captions it may be trained with, or where tag orders are unbounded its plain one."""
    tokens: int | None = None
    """Of its longest caption, special tokens included; None without a tokenizer."""


@dataclass(frozen=True)
class BucketFacts:
    """The pictures of one shape."""

    size: Size
    """(height, width)"""
    pictures: int
    scales: tuple[float, float, float]
    """Smallest, median and largest scale; above 1 a picture is enlarged."""
    lost_area: float
    """Largest part of a picture's area that is cropped away."""


@dataclass(frozen=True)
class DataReport:
    """What is in a dataset, and what is wrong with it."""

    source: str
    images: str
    """As the settings name it."""
    pictures: tuple[PictureFacts, ...]
    """Those that can be trained on."""
    buckets: tuple[BucketFacts, ...]
    problems: tuple[Problem, ...]
    token_limit: int | None = None
    sheet: Path | None = None
    """The contact sheet, where one was drawn."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What stops a run."""
        return tuple(problem for problem in self.problems if problem.error)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What a person should look at."""
        return tuple(problem for problem in self.problems if not problem.error)

    def raise_if_errors(self) -> None:
        """Raise a DataError that lists all errors, if there are any."""
        raise_all(self.problems, self.images)


@dataclass(frozen=True)
class _Seen:
    """What one look at one file brought."""

    measured: Measured | None
    look: Look | None
    tiles: tuple[Tile, ...] = ()
    geometry: Geometry | None = None
    problem: Problem | None = None
    see_through: bool = False
    """Whether it has transparent parts that nobody asked for as a mask."""


def check(
    settings: DataSettings,
    *,
    resolution: int = 512,
    size_multiple: int = 8,
    count_tokens: TokenCounter | None = None,
    cut_off: Callable[[str], str] = lambda caption: "",
    seed: int = 0,
    sheet: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> DataReport:
    """Open every picture and caption that `settings` name, and report all problems at once.

    `resolution` and `size_multiple` are the base's (`BaseFacts`); the settings' own resolution goes first.
    `count_tokens` None leaves the captions' lengths unchecked. `cut_off`: what the base does not read of a caption that
    is too long; "" where that is not known. `sheet`: where the contact sheet goes, as PNG.

    Raises:
        DataError: there is nothing to report on: no folder, no pictures, no captions at all, or no such
            column; or the resolution does not fit the base.
    """
    shapes = target_shapes(settings, resolution=resolution, size_multiple=size_multiple)
    dataset = look(settings, seed=seed)
    streams = Streams(seed)
    records = dataset.records
    each = max(1, MOST // max(1, len(records)))
    shown = set(range(len(records))) if len(records) <= MOST else _evenly(len(records))

    def one(index: int) -> _Seen:
        tiles = each if sheet is not None and index in shown else 0
        return _see(records[index], settings, shapes, streams, tiles)

    seen: list[_Seen] = []
    for done, result in enumerate(in_order(one, range(len(records)), settings.workers), 1):
        seen.append(result)
        progress(done, len(records), "pictures")
    problems = [*dataset.problems, *(s.problem for s in seen if s.problem is not None)]
    good = [(r, s.geometry) for r, s in zip(records, seen, strict=True) if s.geometry is not None]
    problems += _sizes(good, settings)
    problems += _see_through([r for r, s in zip(records, seen, strict=True) if s.see_through])
    problems += _duplicates(records, seen)
    spoken = [_captions(record, settings, streams) for record, _ in good]
    counts, limit = _count(spoken, count_tokens)
    problems += _captions_problems([record for record, _ in good], spoken, counts, limit, cut_off, settings)
    pictures = tuple(
        PictureFacts(record.key, geometry, said, count)
        for (record, geometry), said, count in zip(good, spoken, counts, strict=True)
    )
    if sheet is not None:
        tiles = [tile for result in seen for tile in result.tiles]
        hidden = sum(result.geometry is not None for result in seen) - sum(
            bool(result.tiles) for result in seen
        )
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(tiles, title=dataset.source, left_out=hidden).save(sheet)
    return DataReport(
        dataset.source, settings.images, pictures, _buckets(pictures), tuple(problems), limit, sheet
    )


def _evenly(count: int) -> set[int]:
    return {index * count // MOST for index in range(MOST)}


def _see(
    record: Record, settings: DataSettings, shapes: tuple[Size, ...], streams: Streams, tiles: int
) -> _Seen:
    try:
        measured = measure(record)
        image = open_upright(record)
        target = choose(measured.size, shapes)
        geometry = center(measured.size, target)
        masks.measured(record, measured, geometry if settings.center_crop else None)
    except Refused as error:
        text = str(error).removeprefix(f"{record.key}: ")
        return _Seen(None, None, problem=Problem(error.kind, record.key, text))
    shown = bounded(measured, target, settings, streams) or (anew(measured, target, streams, 0),)
    drawn = tuple(
        Tile(
            shrunk(cut(image, one, settings.interpolation)),
            words.plain(record.captions, settings),
            _note(record, one),
        )
        for one in shown[:tiles]
    )
    if geometry.scale > 1 and not settings.allow_upscale:
        problem = Problem("too small", record.key, too_small(measured.size, target, geometry.scale))
        return _Seen(measured, look_of(image), problem=problem)
    clear = settings.masks is None and see_through(record)
    return _Seen(measured, look_of(image), drawn, geometry, see_through=clear)


def _note(record: Record, geometry: Geometry) -> str:
    height, width = geometry.original
    lost = f", -{geometry.lost_area:.0%}" if geometry.lost_area >= 0.005 else ""
    return f"{record.key}  {width}x{height} > {geometry.target[1]}x{geometry.target[0]}{lost}"


def _sizes(good: Sequence[tuple[Record, Geometry]], settings: DataSettings) -> list[Problem]:
    problems = []
    for record, geometry in good:
        height, width = geometry.original
        if geometry.scale > ENLARGED:
            text = too_small(geometry.original, geometry.target, geometry.scale)
            problems.append(Problem("too small", record.key, text, error=False))
        if geometry.lost_area > CROPPED:
            top, right, bottom, left = geometry.lost
            where = f"top {top}, right {right}, bottom {bottom}, left {left}"
            if not settings.center_crop:
                where = f"{top + bottom} of the height, {left + right} of the width, at random places"
            advice = "crop it yourself" if settings.buckets else "set buckets = true, or crop it yourself"
            text = (
                f"{width}x{height} loses {geometry.lost_area:.0%} of its area to {geometry.target[1]}x"
                f"{geometry.target[0]} (pixels: {where}). If something matters there, {advice}."
            )
            problems.append(Problem("cropped", record.key, text, error=False))
    return problems


def _see_through(records: Sequence[Record]) -> list[Problem]:
    if not records:
        return []
    several = f"and {len(records) - 1} more pictures have" if len(records) > 1 else "has"
    text = (
        f"{several} transparent parts, which are laid on white and learned like the rest. "
        f'masks = "{masks.ALPHA}" keeps the loss away from them.'
    )
    return [Problem("transparent", records[0].key, text, error=False)]


def _duplicates(records: Sequence[Record], seen: Sequence[_Seen]) -> list[Problem]:
    problems = []
    same: dict[str, list[int]] = defaultdict(list)
    for index, result in enumerate(seen):
        if result.measured is not None:
            same[result.measured.content].append(index)
    for indices in same.values():
        if len(indices) > 1:
            others = ", ".join(records[index].key for index in indices[1:])
            different = len({records[index].captions for index in indices}) > 1
            text = f"is the same file as {others}{', with another caption' if different else ''}."
            problems.append(Problem("duplicate", records[indices[0]].key, text, error=False))
    firsts = [indices[0] for indices in same.values()]
    looks = [found for index in firsts if (found := seen[index].look) is not None]
    alike: dict[int, list[int]] = defaultdict(list)
    for one, other in near_pairs(looks):
        alike[firsts[one]].append(firsts[other])
    for index, like in alike.items():
        names = ", ".join(records[other].key for other in like)
        problems.append(Problem("look alike", records[index].key, f"looks the same as {names}.", error=False))
    return problems


def _captions(record: Record, settings: DataSettings, streams: Streams) -> tuple[str, ...]:
    return words.every(record.captions, settings, streams) or (words.plain(record.captions, settings),)


def _count(
    spoken: Sequence[tuple[str, ...]], count_tokens: TokenCounter | None
) -> tuple[list[int | None], int | None]:
    """(tokens of the longest caption of each record, the limit)."""
    distinct = sorted({caption for said in spoken for caption in said})
    if count_tokens is None or not distinct:
        return [None] * len(spoken), None
    counts, limit = count_tokens(distinct)
    by_caption = dict(zip(distinct, counts, strict=True))
    return [max(by_caption[caption] for caption in said) for said in spoken], limit


def _captions_problems(
    records: Sequence[Record],
    spoken: Sequence[tuple[str, ...]],
    counts: Sequence[int | None],
    limit: int | None,
    cut_off: Callable[[str], str],
    settings: DataSettings,
) -> list[Problem]:
    problems = []
    for record, said, count in zip(records, spoken, counts, strict=True):
        if settings.caption != "" and not all(caption.strip() for caption in record.captions):
            problems.append(Problem("empty caption", record.key, "has an empty caption.", error=False))
        if limit is not None and count is not None and count > limit:
            longest = max(said, key=len)
            text = f"its caption has {count} tokens; the base reads the first {limit}: {longest[:80]!r}..."
            if lost := cut_off(longest):
                text += f" This is cut off: {lost!r}."
            problems.append(Problem("long caption", record.key, text, error=False))
    if settings.random_flip:
        sided = [r.key for r in records if any(_SIDES.search(caption) for caption in r.captions)]
        if sided:
            text = (
                f'says "left" or "right", as {len(sided)} captions do, and random_flip mirrors the picture.'
            )
            problems.append(Problem("mirrored", sided[0], text, error=False))
    if settings.shuffle_tags and not any(settings.tag_separator in c for r in records for c in r.captions):
        text = f"shuffle_tags has no effect: no caption contains {settings.tag_separator!r}."
        problems.append(Problem("no effect", "captions", text))
    return problems


def _buckets(pictures: Sequence[PictureFacts]) -> tuple[BucketFacts, ...]:
    groups: dict[Size, list[Geometry]] = defaultdict(list)
    for picture in pictures:
        groups[picture.geometry.target].append(picture.geometry)
    facts = []
    for size, found in sorted(groups.items()):
        scales = sorted(geometry.scale for geometry in found)
        lost = max(geometry.lost_area for geometry in found)
        facts.append(BucketFacts(size, len(found), (scales[0], median(scales), scales[-1]), lost))
    return tuple(facts)


def summary(report: DataReport) -> str:
    """One line: how many pictures, errors and warnings, by kind."""
    kinds = Counter(problem.kind for problem in report.problems)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "no problems"
    return f"{len(report.pictures)} pictures can be trained on; {said}."


__all__ = ["BucketFacts", "DataReport", "PictureFacts", "TokenCounter", "check", "summary"]
