"""Engine: which are there, how the eager one takes another's place, and that no step makes the host wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scumble.training.engine import ENGINES, Driver, Engine, Unsuited
from scumble.training.events import StepDone
from scumble.training.settings import TrainSettings
from tests.training.test_loop import run_it, settings_for

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
"""Operations for whose result the host waits for the device."""


class Waits(TorchDispatchMode):
    """Counts those operations, but for what is read of random numbers on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in READS
        return function(*args, **(kwargs or {}))


def waits(folder: Path, steps: int, log_every: int, **others: Any) -> int:
    with Waits() as counted:
        _, heard = run_it(folder, settings_for(steps, log_every=log_every, **others))
    assert len(heard.all(StepDone)) == steps
    return counted.count


@pytest.mark.parametrize(
    "others", [{}, {"accumulate": 2, "ema": 0.9, "precision": "bf16"}], ids=["plain", "all"]
)
def test_the_host_waits_for_the_device_only_where_it_reports(tmp_path: Path, others: dict[str, Any]) -> None:
    few = waits(tmp_path / "a", 4, 100, **others)
    assert waits(tmp_path / "b", 10, 100, **others) == few, "six more steps, not one more wait"
    assert waits(tmp_path / "c", 4, 1, **others) > few, "the count can fail"


def test_the_setting_and_the_registry_name_the_same_engines() -> None:
    named = TrainSettings.model_json_schema()["properties"]["engine"]["enum"]
    assert set(named) == set(ENGINES) and TrainSettings().engine == "eager"
    assert all(ENGINES.get(name).name == name and issubclass(ENGINES.get(name), Engine) for name in named)


class Tired(Engine):
    """Goes on for one step."""

    def __init__(self, work: Any) -> None:
        super().__init__(work)
        self.notes, self.steps, self.closed = ("It is late.",), 0, 0

    def clip(self) -> torch.Tensor:
        self.steps += 1
        if self.steps > 1:
            raise Unsuited("it is tired")
        return torch.tensor(1.0)

    def close(self) -> None:
        self.closed += 1


def test_the_eager_engine_takes_over_for_good_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    tired: list[Tired] = []
    monkeypatch.setattr(
        ENGINES,
        "get",
        lambda name: lambda work: tired.append(Tired(work)) or tired[0],  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(Engine, "clip", lambda self: torch.tensor(2.0))
    driver = Driver("tired", None, told.append)  # type: ignore[arg-type]
    assert told == ["It is late."]
    assert [driver.do(lambda engine: engine.clip()).item() for _ in range(3)] == [1.0, 2.0, 2.0]
    driver.close()
    assert told[1:] == ['engine = "tired" is not used: it is tired. Training goes on with engine = "eager".']
    assert tired[0].closed == 1
