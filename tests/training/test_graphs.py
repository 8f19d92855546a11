"""Graphs: what is recorded, when, and for which shapes. A recorder that repeats the work stands for CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scumble.rng import Streams
from scumble.training import graphs
from scumble.training.engine import Unsuited, Work
from scumble.training.events import Noted, StepDone, StepSkipped
from scumble.training.graphs import WARM, GraphEngine, Recorded, hindrance
from scumble.training.loop import train
from scumble.training.optimizers import OptimizerSettings, ProdigySettings
from scumble.training.settings import TrainSettings
from tests.training.world import Listener, bytes_of, make_plan

FAST = OptimizerSettings(
    learning_rate=2**-10
)  # which fp32 holds exactly: recorded steps read the rate from there


class Repeater:
    """Records by keeping the work, and repeats by doing it, on the memory that it was recorded with."""

    def __init__(self) -> None:
        self.warmed = 0
        self.recorded = 0
        self.repeated = 0

    def warm(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def again() -> None:
            self.repeated += 1
            work()

        return again


class Refuser(Repeater):
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")


def run_it(folder: Path, engine: str, **others: Any) -> tuple[bytes, Listener]:
    poison = others.pop("poison", None)
    settings = TrainSettings.model_validate(
        {"steps": 7, "batch": 2, "checkpoint_every": 0, "optimizer": FAST, "engine": engine} | others
    )
    listener = Listener()
    made, _ = make_plan(settings, poison=poison)
    return bytes_of(train(made, folder, settings, [listener], Streams(0)).adapter), listener


@pytest.fixture
def repeater(monkeypatch: pytest.MonkeyPatch) -> Repeater:
    return stand_in(monkeypatch, Repeater())


def stand_in(monkeypatch: pytest.MonkeyPatch, recorder: Repeater) -> Repeater:
    ask = hindrance
    monkeypatch.setattr(graphs, "hindrance", lambda work, device: ask(work, None))
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: recorder)
    return recorder


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"accumulate": 2, "ema": 0.9, "schedule": {"name": "constant_with_warmup", "warmup_steps": 4}},
        {"precision": "bf16", "poison": {8: float("nan")}, "log_every": 5},
    ],
)
def test_recorded_steps_give_the_bytes_of_eager_ones(
    tmp_path: Path, repeater: Repeater, others: dict[str, Any]
) -> None:
    plain, heard_plain = run_it(tmp_path / "eager", "eager", **others)
    recorded, heard = run_it(tmp_path / "graph", "graph", **others)
    assert recorded == plain
    assert [e.loss for e in heard.all(StepDone)] == [e.loss for e in heard_plain.all(StepDone)]
    assert [e.step for e in heard.all(StepSkipped)] == [e.step for e in heard_plain.all(StepSkipped)]
    assert bool(heard.all(StepSkipped)) == ("poison" in others)
    assert not [event for event in heard.all(Noted) if "engine" in event.text]
    passes = 7 * others.get("accumulate", 1)
    # forward and backward, clipping, optimizer
    assert (repeater.recorded, repeater.warmed) == (3, 3 * WARM)
    assert repeater.repeated == passes + 7 + 7 - 3 * WARM


def test_each_shape_of_batch_is_recorded_by_itself_and_reads_what_it_is_given() -> None:
    engine, repeater, seen = small()
    losses = []
    for length in (4, 6, 4, 6, 4, 6, 4, 6, 4):
        engine.zero()
        losses.append(engine.backward(Said(torch.full((2, length), float(len(losses)))), 2, last=True))  # type: ignore[arg-type]
    assert repeater.recorded == 2 and repeater.warmed == 2 * WARM and repeater.repeated == 3
    assert [loss.tolist() for loss in losses] == [[2.0 * n] * 2 for n in range(9)], (
        "none is overwritten by a later one"
    )
    assert len({id(value) for value in seen}) == 2, "one set of inputs for each shape, whatever is given"
    assert len(engine._buckets) == 2
    engine.backward(Said(torch.ones(2, 4)), 4, last=True)  # type: ignore[arg-type]
    assert len(engine._buckets) == 3, "what losses are divided by is recorded too"


def test_gradients_stay_where_they_are_and_rates_come_back() -> None:
    engine, _, _ = small()
    weight = engine.work.parameters[0]
    places = set()
    for _ in range(5):
        engine.zero()
        engine.backward(Said(torch.ones(2, 4)), 2, last=True)  # type: ignore[arg-type]
        assert weight.grad is not None and weight.grad.item() == 1.0
        places.add(weight.grad.data_ptr())
    assert len(places) == 1
    before = weight.item()
    engine.step({"all": 0.5}, torch.tensor(1.0))
    assert weight.item() == before, "a step that is to be left out is left out"
    engine.step({"all": 0.5}, torch.tensor(0.0))
    assert weight.item() == pytest.approx(before - 0.5, abs=1e-5)
    assert isinstance(engine._optimizer.param_groups[0]["lr"], torch.Tensor)
    engine.close()
    assert (
        engine._optimizer.param_groups[0]["lr"] == 0.1 and not engine._optimizer.param_groups[0]["capturable"]
    )


def test_work_is_recorded_once_and_what_cannot_be_says_why() -> None:
    done: list[int] = []
    recorded = Recorded(lambda: done.append(1), repeater := Repeater())
    for _ in range(WARM + 4):
        recorded.run()
    assert len(done) == WARM + 4 and (repeater.recorded, repeater.repeated) == (1, 4)
    refused = Recorded(lambda: None, Refuser())
    for _ in range(WARM):
        refused.run()
    with pytest.raises(
        Unsuited, match=r"can't be recorded \(operation not permitted when stream is capturing\)"
    ):
        refused.run()


def test_a_step_that_cannot_be_recorded_is_done_eagerly_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run_it(tmp_path / "eager", "eager", accumulate=2)
    stand_in(monkeypatch, Refuser())
    fallen, heard = run_it(tmp_path / "graph", "graph", accumulate=2)
    assert fallen == plain
    (said,) = [event for event in heard.all(Noted) if "engine" in event.text]
    assert said.text.startswith(
        'engine = "graph" is not used: the step can\'t be recorded (operation not permitted'
    )
    assert said.text.endswith('Training goes on with engine = "eager".') and said.step == 1


def test_without_a_gpu_the_run_is_eager_and_says_so(tmp_path: Path) -> None:
    plain, _ = run_it(tmp_path / "eager", "eager", steps=2)
    fallen, heard = run_it(tmp_path / "graph", "graph", steps=2)
    assert fallen == plain
    assert (
        'engine = "graph" is not used: CUDA graphs need a GPU, and this run computes on cpu. Training goes'
        in "\n".join(event.text for event in heard.all(Noted))
    )


def test_an_optimizer_that_reads_numbers_is_not_recorded(tmp_path: Path, repeater: Repeater) -> None:
    prodigy = OptimizerSettings(name="prodigy", learning_rate=1.0, prodigy=ProdigySettings())
    plain, _ = run_it(tmp_path / "eager", "eager", optimizer=prodigy)
    recorded, heard = run_it(tmp_path / "graph", "graph", optimizer=prodigy)
    assert recorded == plain and repeater.recorded == 2
    assert any("Prodigy is not: it reads numbers on the host" in event.text for event in heard.all(Noted))


def test_an_objective_that_decides_on_the_host_is_refused_by_name() -> None:
    with pytest.raises(Unsuited, match="Linear decides on the host"):
        GraphEngine(work_of(nn.Linear(1, 1)), Repeater())


def test_captions_read_in_each_step_are_refused() -> None:
    engine, _, _ = small()
    with pytest.raises(Unsuited, match="captions are read anew"):
        engine.backward(Said(torch.ones(2, 4), conditioning=None), 2, last=True)  # type: ignore[arg-type]


class Said:
    """As much of a batch as `Summing` needs."""

    def __init__(self, latents: torch.Tensor, conditioning: object = "words") -> None:
        self.latents, self.conditioning = latents, conditioning


class Summing(nn.Module):
    """losses = weight * the samples' means * 2; remembers which tensors it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen: list[torch.Tensor] = []

    def drawn(self, batch: Said) -> torch.Tensor:
        return batch.latents

    def measured(self, drawn: torch.Tensor) -> torch.Tensor:
        self.seen.append(drawn)
        return self.weight * drawn.mean(1)


def work_of(objective: nn.Module) -> Work:
    from scumble.training.numerics import make_accelerator
    from scumble.training.optimizers import build_optimizer

    accelerator = make_accelerator("no", torch.device("cpu"))
    parameters = list(objective.parameters())
    groups = [{"params": parameters, "lr": 0.1, "name": "all"}]
    optimizer = build_optimizer(OptimizerSettings(learning_rate=0.1, weight_decay=0.0), groups)
    prepared, stepper = accelerator.prepare(objective, optimizer)
    return Work(objective, prepared, stepper, parameters, None, (), accelerator)


def small() -> tuple[GraphEngine, Repeater, list[torch.Tensor]]:
    objective, repeater = Summing(), Repeater()
    return GraphEngine(work_of(objective), repeater), repeater, objective.seen
