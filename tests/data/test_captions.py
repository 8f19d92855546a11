from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.data.captions import every, plain, shuffled, spoken
from scumble.data.settings import DataSettings
from scumble.rng import Streams

STREAMS = Streams(7)


def wanted(**changes: Any) -> DataSettings:
    return DataSettings(**{"images": "x", **changes})


def said(settings: DataSettings, captions: tuple[str, ...], visits: int = 400) -> list[str]:
    return [spoken(captions, settings, STREAMS, position) for position in range(visits)]


def test_without_options_the_caption_is_said_as_it_is() -> None:
    assert set(said(wanted(), ("a red fox, in the snow",))) == {"a red fox, in the snow"}


def test_one_of_several_captions_at_each_visit() -> None:
    heard = said(wanted(), ("one", "two", "three"))
    assert set(heard) == {"one", "two", "three"}
    assert all(heard.count(caption) > 90 for caption in set(heard))
    assert heard == said(wanted(), ("one", "two", "three"))


def test_templates_keep_other_braces() -> None:
    settings = wanted(templates=("a photo of {caption}", "{caption}, {token}"))
    assert set(said(settings, ("a {x} fox",))) == {"a photo of a {x} fox", "a {x} fox, {token}"}


def test_dropout_drops_as_often_as_it_says() -> None:
    heard = said(wanted(caption_dropout=0.25), ("fox",), 2000)
    assert set(heard) == {"fox", ""} and 430 <= heard.count("") <= 570
    assert set(said(wanted(caption_dropout=1), ("fox",))) == {""}


@pytest.mark.parametrize("variants", [0, 3])
def test_kept_tags_stay_and_the_rest_is_a_permutation(variants: int) -> None:
    settings = wanted(shuffle_tags=True, keep_tags=2, tag_variants=variants)
    heard = set(said(settings, ("fox,  snow,red, small , old,,shy",)))
    assert all(one.startswith("fox, snow, ") for one in heard)
    assert {tuple(sorted(one.split(", "))) for one in heard} == {
        ("fox", "old", "red", "shy", "small", "snow")
    }
    assert 1 < len(heard) <= 3 if variants else len(heard) > 15


def test_other_separators() -> None:
    settings = wanted(shuffle_tags=True, tag_separator="|")
    assert sorted(shuffled("b|a | c", settings, STREAMS, 0).split("| ")) == ["a", "b", "c"]


@given(
    st.lists(st.text("ab, ", max_size=12), min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 2**40),
)
def test_every_lists_all_that_is_ever_spoken(
    captions: tuple[str, ...], tags: bool, keep: int, dropout: float, position: int
) -> None:
    settings = wanted(
        shuffle_tags=tags,
        keep_tags=keep if tags else 0,
        caption_dropout=dropout,
        templates=("{caption}", "so: {caption}"),
    )
    listed = every(captions, settings, STREAMS)
    assert listed is not None
    assert spoken(captions, settings, STREAMS, position) in listed
    assert set(listed) >= set(spoken(captions, settings, STREAMS, p) for p in range(5))


def test_unbounded_tag_orders_have_no_list() -> None:
    assert every(("a, b",), wanted(shuffle_tags=True, tag_variants=0), STREAMS) is None
    assert every(("a, b",), wanted(tag_variants=0), STREAMS) == ("a, b",)


def test_plain_is_the_first_of_each() -> None:
    assert plain(("one, two", "x"), wanted(templates=("a {caption}", "{caption}"))) == "a one, two"
