"""[adapter]: each family brings its own settings, and one family's are refused with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scumble.adapters import FAMILIES, LoraSettings
from scumble.adapters.lokr import LokrSettings
from scumble.errors import ConfigError
from scumble.runs.config import RunConfig
from scumble.runs.load import load
from scumble.runs.toml import dump, template


def config(*overrides: str, **adapter: Any) -> RunConfig:
    return load(None, overrides, base="b", output="o", data={"images": "i"}, adapter=adapter)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("changed_only", [False, True])
def test_every_family_is_written_and_read_back(family: str, changed_only: bool, tmp_path: Path) -> None:
    whole = config(f"adapter.family={family}", "adapter.alpha=3", 'adapter.targets=["conv", "*.to_q"]')
    assert isinstance(whole.adapter, FAMILIES.get(family).settings)
    assert (whole.adapter.family, whole.adapter.targets) == (family, ("conv", "*.to_q"))
    file = tmp_path / "run.toml"
    file.write_text(dump(whole, changed_only=changed_only))
    assert load(file) == whole
    assert whole.model_dump(mode="json")["adapter"]["family"] == family


def test_without_a_family_it_is_lora() -> None:
    assert config(rank=8).adapter.family == "lora"
    assert isinstance(config(rank=8).adapter, LoraSettings)


def test_options_by_dotted_override() -> None:
    adapter = config("adapter.family=lokr", "adapter.factor=8").adapter
    assert isinstance(adapter, LokrSettings) and adapter.factor == 8


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["adapter.factor=8"],
            r'adapter.factor=8: \[adapter\] has no setting "factor" with family = "lora". '
            r'It is a setting of family = "lokr".',
        ),
        (["adapter.family=loha", "adapter.dropout=0.1"], r'"dropout" with family = "loha".*"lora".*"dora"'),
        (["adapter.family=lorra"], r'adapter.family = "lorra": There is no family .*Did you mean "lora"'),
        (["adapter.family=lokr", "adapter.facto=8"], 'Did you mean "factor"'),
        (["adapter.family=lokr", "adapter.factor=0"], "adapter.factor = 0: must be greater"),
        (["adapter=3"], r"must be a section of settings, e.g. \[adapter\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(None, overrides, base="b", output="o", data={"images": "i"})


def test_a_familys_own_settings_are_a_section() -> None:
    loaded = load(base="b", output="o", data={"images": "i"}, adapter=LokrSettings(factor=8))
    built = RunConfig.model_validate(
        {"base": "b", "output": "o", "data": {"images": "i"}, "adapter": LokrSettings(factor=8)}
    )
    assert loaded == built and loaded.adapter.family == "lokr" and loaded.adapter.targets == "attention"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_template_is_of_the_chosen_family(family: str, tmp_path: Path) -> None:
    chosen = {"base": "b", "output": "o", "data.images": "i", "adapter.family": family}
    text = template(RunConfig, chosen)
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert load(file) == config(family=family)
    section = text[text.index("[adapter]") : text.index("[data]")]
    assert all(f"{name} =" in section for name in FAMILIES.get(family).settings.model_fields)
    assert all(f'"{other}"' in section for other in FAMILIES)


def test_the_schema_has_every_family() -> None:
    section = RunConfig.model_json_schema()["properties"]["adapter"]
    assert set(section["discriminator"]["mapping"]) == set(FAMILIES)
