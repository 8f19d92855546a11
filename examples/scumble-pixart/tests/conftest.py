"""The package as pip would install it: its entry point on the path, read from its own pyproject.toml."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from scumble.models import FAMILIES

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    about = site / f"scumble_pixart-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("".join(lines))
    sys.path[:0] = [str(site), str(HERE / "src")]
    FAMILIES.refresh()
    yield
    sys.path.remove(str(site))
    sys.path.remove(str(HERE / "src"))
    FAMILIES.refresh()
