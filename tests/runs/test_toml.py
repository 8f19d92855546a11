"""Settings written as TOML read back the same, and the template says every setting."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.methods.method import METHODS
from scumble.runs.config import RunConfig
from scumble.runs.load import assemble, load, read
from scumble.runs.toml import dump, key, template, value

VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_every_value_reads_back(item: object) -> None:
    assert tomllib.loads(f"x = {value(item)}")["x"] == item


@given(st.text())
def test_every_key_reads_back(name: str) -> None:
    assert tomllib.loads(f"{key(name)} = 1") == {name: 1}


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load(
        base="some/base",
        output="runs/x",
        data={"images": "pictures", "caption": 'a "quoted" word\nand a line', "held_out": 0.25},
        train={"steps": 7, "held_out_every": 3, "optimizer": {"betas": (0.8, 0.9)}},
        adapter={"rank_pattern": {"*.attn2.*": 8}, "targets": ["*.attn?.to_q", "conv"]},
        preview={"prompts": ["a fox", "an owl"]},
    )
    file = tmp_path / "run.toml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config


SMALLEST: dict[str, dict[str, object]] = {
    "text-to-image": {},
    "dreambooth": {},
    "textual-inversion": {"placeholders": "zorbik"},
    "pivotal": {"placeholders": "zorbik", "inversion_steps": 1},
    "slider": {"positive": "a big fox", "negative": "a small fox", "neutral": "a fox"},
}
"""Method -> what it can't do without."""


@pytest.mark.parametrize("method", list(METHODS))
def test_every_methods_resolved_config_reads_back_equal(method: str, tmp_path: Path) -> None:
    own = {method.replace("-", "_"): SMALLEST[method]} if SMALLEST[method] else {}
    data = {"data": {"images": "pictures"}} if METHODS.get(method).needs_pictures else {}
    config = load(base="some/base", output="runs/x", method=method, train={"steps": 2}, **own, **data)
    file = tmp_path / "run.toml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config, "a run resumes from what it wrote"


def test_the_template_says_every_setting_and_its_default(tmp_path: Path) -> None:
    text = template(RunConfig, {"base": "picturebook", "output": "runs/first", "data.images": "pictures/"})
    file = tmp_path / "run.toml"
    file.write_text(text)
    plain = load(file)
    assert plain == load(base="picturebook", output="runs/first", data={"images": "pictures/"})
    # With every default uncommented it means the same; a setting without a default stays a comment.
    file.write_text(re.sub(r"^# (\w+ = \S.*)$", r"\1", text, flags=re.MULTILINE))
    assert assemble(RunConfig, read(file)) == plain
    for name in ("optimizer", "rank_stabilized", "caption_dropout", "gradient_checkpointing", "guidance"):
        assert name in text
    assert "Optimizer steps." in text, "a setting's docstring is its comment"


def test_a_required_setting_left_empty_is_refused(tmp_path: Path) -> None:
    from scumble.errors import ConfigError

    file = tmp_path / "run.toml"
    file.write_text(template(RunConfig, {"base": "picturebook"}))
    with pytest.raises(ConfigError, match=r"run\.toml:\d+:\d+: this is not TOML"):
        load(file)
