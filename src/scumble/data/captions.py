"""Captions: the words of one visit, by template, tag order and dropout, from (streams, position) alone.

Every choice is bounded unless asked otherwise, so that all captions of a run can be listed, and encoded,
before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from scumble.data.settings import DataSettings
from scumble.rng import Streams

_WHOLE = 1 << 63  # Streams.number is below this


def spoken(captions: Sequence[str], settings: DataSettings, streams: Streams, position: int) -> str:
    """The caption of the visit at `position`: "" when dropped for guidance.

    A function of its arguments alone. `captions` are the record's; one of them is chosen.
    """
    if streams.number("data.caption dropout", position) < settings.caption_dropout * _WHOLE:
        return ""
    caption = captions[streams.number("data.caption", position) % len(captions)]
    template = settings.templates[streams.number("data.template", position) % len(settings.templates)]
    if settings.shuffle_tags:
        if settings.tag_variants:
            caption = shuffled(
                caption, settings, streams, streams.number("data.tags", position) % settings.tag_variants
            )
        else:
            caption = shuffled(caption, settings, streams, position)
    return template.replace("{caption}", caption).strip()


def every(captions: Sequence[str], settings: DataSettings, streams: Streams) -> tuple[str, ...] | None:
    """All that `spoken` may ever return for these captions, sorted; None when tag orders are not bounded."""
    if settings.shuffle_tags and settings.tag_variants == 0:
        return None
    said = {""} if settings.caption_dropout > 0 else set()
    for caption in captions:
        orders = {caption}
        if settings.shuffle_tags:
            orders = {shuffled(caption, settings, streams, index) for index in range(settings.tag_variants)}
        said |= {
            template.replace("{caption}", order).strip()
            for template in settings.templates
            for order in orders
        }
    return tuple(sorted(said))


def plain(captions: Sequence[str], settings: DataSettings) -> str:
    """The first caption in the first template, tags in their order: for the contact sheet and the held-out
    loss."""
    return settings.templates[0].replace("{caption}", captions[0]).strip()


def to_check(captions: Sequence[str], settings: DataSettings, streams: Streams) -> tuple[str, ...]:
    """What is looked at before a run in place of all that it may say: all of it, or where that is not bounded the plain
    one."""
    return every(captions, settings, streams) or (plain(captions, settings),)


def tags(caption: str, separator: str) -> list[str]:
    """The tags of a caption, without the blanks around them; empty ones are left out."""
    return [tag for part in caption.split(separator) if (tag := part.strip())]


def shuffled(caption: str, settings: DataSettings, streams: Streams, index: int) -> str:
    """The `index`-th order of the caption's tags; the first `keep_tags` stay in front."""
    words = tags(caption, settings.tag_separator)
    first, rest = words[: settings.keep_tags], words[settings.keep_tags :]
    streams.python(f"data.tag order/{caption}", index).shuffle(rest)
    separator = settings.tag_separator
    return (separator if separator[-1].isspace() else separator + " ").join(first + rest)
