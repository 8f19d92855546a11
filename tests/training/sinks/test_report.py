"""Report: one page with everything, which needs nothing else and survives a resume."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from scumble.training.events import Finished, Noted, Started, StepDone
from scumble.training.sinks.page import STEPS, smoothed
from scumble.training.sinks.report import ReportSink, read_record
from tests.training.sinks.runs import events, feed, loss


class Page(HTMLParser):
    """Tags, texts and addresses of a page; unclosed tags are an error."""

    VOID = frozenset(
        {"meta", "img", "input", "br", "line", "circle", "rect", "polyline", "polygon", "path", "i"}
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def whole(tmp_path: Path) -> tuple[Page, str]:
    feed(ReportSink(tmp_path), events(tmp_path))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page, html = whole(tmp_path)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|url\((?!#)|@import|<link", html)
    assert "prefers-color-scheme:dark" in html


def test_pictures_are_there_base_beside_adapter_for_every_step(tmp_path: Path) -> None:
    page, _ = whole(tmp_path)
    images = [attributes for tag, attributes in page.seen if tag == "img"]
    assert [image["alt"] for image in images if image["alt"] in ("base", "adapter")] == [
        "base",
        "adapter",
    ] * 2
    assert [image["alt"] for image in images].count("step 20") == 2
    data = next(image["src"] for image in images if image["alt"] == "adapter")
    assert data is not None
    shown = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    assert shown.getpixel((0, 0)) == (200, 40, 30)
    assert shown.width % 16 == 0


def test_words_are_words_and_not_tags(tmp_path: Path) -> None:
    page, html = whole(tmp_path)
    assert "a <b>small</b> & red fox" in page.text
    assert "one <i>thing</i> to know" in page.text
    assert "<b>small</b>" not in html
    assert html.count("</script>") == 2


def test_what_a_person_asks_is_answered(tmp_path: Path) -> None:
    page, _ = whole(tmp_path)
    text = page.text
    for expected in (
        tmp_path.name,
        "complete",
        "49,152",
        "adapter.rank",
        "-15.0 %",  # held-out 0.17 against 0.2, at step 30
        "best at step 30",
        "best 0.1700 at 30",
        "the loss is not finite (inf). Pictures: 7.png, 9.png",
        "the same picture: the adapter does nothing here",
        "differs by 61.2 of 255",
        "20.0",
        "pytorch_lora_weights.safetensors",
    ):
        assert expected in text, expected
    labels = {attributes.get("data-label") for tag, attributes in page.seen if tag == "polyline"}
    assert {"smoothed", "each step", "base", "adapter", "unet", "text_encoder"} <= labels


def test_a_resume_gives_the_curves_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    feed(ReportSink(tmp_path / "a"), events(tmp_path / "a"))
    feed(
        ReportSink(tmp_path / "b"), events(tmp_path / "b", last=27), close=False
    )  # killed at 27, saved at 20
    feed(ReportSink(tmp_path / "b"), events(tmp_path / "b", first=20))
    one, two = (read_record(tmp_path / name / "report.html") for name in "ab")
    assert two.steps == one.steps == [step for step in range(1, 41) if step != 13]
    assert (two.losses, two.norms, two.rates, two.skipped) == (one.losses, one.norms, one.rates, one.skipped)
    assert [row["step"] for row in two.held_out] == [row["step"] for row in two.previews] == [10, 20, 30, 40]
    assert two.resumed_after == [20]
    assert two.started <= one.started or two.started
    assert abs(one.losses[4] - loss(5)) < 1e-6


def test_a_new_run_in_the_folder_starts_a_new_page(tmp_path: Path) -> None:
    feed(ReportSink(tmp_path), events(tmp_path))
    feed(ReportSink(tmp_path), events(tmp_path, last=10))
    assert read_record(tmp_path / "report.html").steps == list(range(1, 11))


def test_a_page_that_can_not_be_read_is_told_and_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("something else", encoding="utf-8")
    feed(ReportSink(tmp_path), events(tmp_path, first=20))
    record = read_record(tmp_path / "report.html")
    assert record.steps[0] == 21
    assert "could not be read" in record.notes[0]["text"]


def test_the_page_is_whole_at_every_moment(tmp_path: Path) -> None:
    sink = ReportSink(tmp_path)
    for event in events(tmp_path, last=21):
        sink.handle(event)
        Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert read_record(tmp_path / "report.html").finished is None


def test_a_moved_run_keeps_its_pictures_and_lost_ones_are_named(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    feed(ReportSink(old), events(old, last=20), close=False)
    old.rename(new)
    (new / "previews" / "000010-01.png").unlink()
    feed(ReportSink(new), events(new, first=20))
    page = Page((new / "report.html").read_text(encoding="utf-8"))
    assert "000010-01.png" in page.text
    assert sum(attributes.get("alt") == "step 20" for tag, attributes in page.seen if tag == "img") == 2


def test_a_long_run_stays_readable(tmp_path: Path) -> None:
    sink = ReportSink(tmp_path)
    feed(sink, events(tmp_path, last=600, total=600, every=10))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    strips = sum(tag == "button" for tag, _ in page.seen)
    assert strips == 2 * STEPS
    assert "36 steps between are left out here" in page.text
    assert len(html) < 400_000


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    sink = ReportSink(tmp_path)
    for event in events(tmp_path, last=10):
        sink.handle(event)
    for path in (tmp_path / "previews").iterdir():
        Image.effect_noise((1024, 768), 90).convert("RGB").save(path)
    sink.close()
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    sizes = {(attributes["width"], attributes["height"]) for tag, attributes in page.seen if tag == "img"}
    assert sizes == {("512", "384")}


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    sink = ReportSink(tmp_path)
    sink.handle(Started(tmp_path, 3, 0, {}, {}))
    sink.handle(StepDone(1, "adapter", math.nan, {}, math.inf, 0.0, 4))
    sink.handle(StepDone(2, "adapter", 0.5, {}, 1.0, 0.0, 4))
    sink.handle(Finished(2, 1.0, None, "Diverged: 10 steps in a row <were> not finite"))
    record = read_record(tmp_path / "report.html")
    assert math.isnan(record.losses[0])
    assert math.isinf(record.norms[0])
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Diverged: 10 steps in a row <were> not finite" in text
    assert "stopped" in text


def test_several_phases_are_told_apart(tmp_path: Path) -> None:
    sink = ReportSink(tmp_path)
    sink.handle(Started(tmp_path, 4, 0, {}, {}))
    for step in range(1, 5):
        name = "tokens" if step < 3 else "adapter"
        sink.handle(StepDone(step, name, 1 / step, {name: 1e-3}, 1.0, 0.1, 4))
    sink.handle(Noted(4, "x"))
    sink.close()
    record = read_record(tmp_path / "report.html")
    assert record.phases == [(1, "tokens"), (3, "adapter")]
    assert record.rates == {"tokens": [1e-3, 1e-3, None, None], "adapter": [None, None, 1e-3, 1e-3]}
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [
        attributes["x1"]
        for tag, attributes in page.seen
        if (attributes.get("class") or "") == "divider" and tag == "line"
    ]


def test_smoothing_keeps_the_length() -> None:
    assert smoothed([]) == []
    assert smoothed([2.0, 2.0, math.nan]) == [2.0, 2.0, 2.0]
