"""Fanout: a sink that fails is told once and dropped, and the others go on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from scumble.errors import ConfigError, UnknownName
from scumble.training.events import Event, Noted
from scumble.training.sinks import SINKS, Fanout, open_sinks
from tests.training.sinks.runs import events, feed


class Listener:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.closed = 0

    def handle(self, event: Event) -> None:
        self.heard.append(event)

    def close(self) -> None:
        self.closed += 1


class Broken(Listener):
    """Fails at its n-th event, and on close."""

    def __init__(self, at: int = 3) -> None:
        super().__init__()
        self.at = at

    def handle(self, event: Event) -> None:
        super().handle(event)
        if len(self.heard) == self.at:
            raise OSError("no space left on device")

    def close(self) -> None:
        super().close()
        raise OSError("still no space")


def test_a_failing_sink_is_reported_once_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener, broken = Listener(), Broken()
    fanout = Fanout([broken, listener])
    feed(fanout, events(tmp_path))
    expected = list(events(tmp_path))
    notes = [event for event in listener.heard if isinstance(event, Noted) and "Broken" in event.text]
    assert len(notes) == 1
    assert "OSError: no space left on device" in notes[0].text
    assert notes[0].step == 2
    assert [event for event in listener.heard if event not in notes] == expected
    assert len(broken.heard) == 3
    assert (broken.closed, listener.closed) == (1, 1)
    assert not caplog.records


def test_when_none_is_left_the_log_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fanout = Fanout([Broken(1)])
    with caplog.at_level(logging.WARNING):
        feed(fanout, events(tmp_path))
    assert [record.message for record in caplog.records if "Broken failed" in record.message]
    assert len(caplog.records) == 1
    assert fanout.sinks == ()


def test_two_failures_in_one_event_are_both_told(tmp_path: Path) -> None:
    listener = Listener()
    fanout = Fanout([Broken(1), listener, type("Torn", (Broken,), {})(1)])
    feed(fanout, events(tmp_path))
    assert (
        len([event for event in listener.heard if isinstance(event, Noted) and "failed" in event.text]) == 2
    )
    assert set(fanout.failures) == {"Broken", "Torn"}


def test_ctrl_c_is_not_a_sinks_failure(tmp_path: Path) -> None:
    class Interrupting(Listener):
        def handle(self, event: Event) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feed(Fanout([Interrupting()]), events(tmp_path))


def test_a_sink_that_can_not_be_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    fanout, listener = Fanout([Broken(99)]), Listener()
    fanout.close()
    assert "could not be closed: OSError: still no space" in caplog.text
    assert listener.closed == 0


def test_every_registered_sink_takes_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in SINKS if name != "wandb"]
    fanout = open_sinks(names, tmp_path)
    feed(fanout, events(tmp_path))
    assert fanout.failures == {}
    assert {"events.jsonl", "report.html", "tensorboard"} <= {path.name for path in tmp_path.iterdir()}


def test_unknown_sink(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match='Did you mean "tensorboard"'):
        open_sinks(["tensorbord"], tmp_path)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_sink_without_its_library_says_how_to_install_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wandb", "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install {name}"):
        open_sinks([name], tmp_path)
