"""What tests of base models share: a machine without a network, and folders of tiny bases."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from scumble.models import tiny


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to reach the network fails the test."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> its tiny base as a diffusers folder. Don't write into it; copy it."""
    place = tmp_path_factory.mktemp("bases")
    return {family: tiny.save(family, place / family, seed=3) for family in ("sd1", "sd2", "sdxl")}
