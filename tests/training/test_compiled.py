"""Compiled blocks: the losses of an eager run, nothing compiled twice, and a reason where it can't be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from scumble.adapters import Adapter, LoraSettings
from scumble.models import FAMILIES
from scumble.rng import Streams
from scumble.training import compiled
from scumble.training.compiled import CompiledBlocks, open_sizes, said
from scumble.training.events import HeldOut, Noted, StepDone
from scumble.training.loop import TrainResult, train
from scumble.training.settings import TrainSettings
from tests.training.world import Listener, make_plan


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken and differentiated ahead of time, but no C++ is compiled."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def run_it(folder: Path, engine: str, count: int | None = 1, **others: Any) -> tuple[TrainResult, Listener]:
    """`count`: so many layers are compiled, each in the place of a block, which takes ten times as long; None is all
    blocks."""
    settings = TrainSettings.model_validate(
        {
            "steps": 3,
            "batch": 2,
            "checkpoint_every": 0,
            "engine": engine,
            "optimizer": {"learning_rate": 1e-2},
        }
        | others
    )
    plan, _ = make_plan(settings, held_out=True, adapter=LoraSettings(rank=4))
    blocks: Any = plan.blocks
    if count is not None:
        blocks = [block.attn1.to_q for block in blocks[:count]]
    plan, listener = replace(plan, blocks=blocks), Listener()
    result = train(plan, folder, settings, [listener], Streams(0))
    assert not any("forward" in block.__dict__ for block in blocks)
    return result, listener


def notes(heard: Listener) -> list[str]:
    return [event.text for event in heard.all(Noted) if "engine" in event.text]


@pytest.mark.parametrize(
    "others",
    [{"accumulate": 2, "held_out_every": 2}, {"gradient_checkpointing": True}],
    ids=["accumulated", "checkpointed"],
)
def test_losses_are_those_of_an_eager_run(tmp_path: Path, quick: None, others: dict[str, Any]) -> None:
    _, plain = run_it(tmp_path / "eager", "eager", **others)
    result, heard = run_it(tmp_path / "compile", "compile", **others)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "something was compiled"
    assert not torch._dynamo.utils.counters["graph_break"] and not notes(heard)
    for kind in (StepDone, HeldOut):
        values = [
            getattr(event, name)
            for event in plain.all(kind)
            for name in ("loss", "adapter")
            if hasattr(event, name)
        ]
        found = [
            getattr(event, name)
            for event in heard.all(kind)
            for name in ("loss", "adapter")
            if hasattr(event, name)
        ]
        assert found == pytest.approx(values, rel=1e-5)
    assert result.difference == 0.0, "measuring and proving see the model as it is without an engine"


def test_in_bf16_losses_agree_to_its_rounding(tmp_path: Path, quick: None) -> None:
    _, plain = run_it(tmp_path / "eager", "eager", precision="bf16")
    _, heard = run_it(tmp_path / "compile", "compile", precision="bf16")
    assert not notes(heard)
    losses = [[event.loss for event in each.all(StepDone)] for each in (plain, heard)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_a_block_is_compiled_once_for_buckets_strengths_and_ranks() -> None:
    """tests/adapters/test_compiling.py shows on one layer that the count can fail."""
    base = FAMILIES.get("sd1").tiny(0)
    block, counter = base.blocks[1], CompileCounterWithBackend("eager")

    def step(height: int, width: int, count: int = 2) -> None:
        x = torch.randn(
            count, height * width, block.get_submodule("norm1").normalized_shape[0], requires_grad=True
        )
        blocks = CompiledBlocks([block], backend=counter)
        with blocks.running():
            block(x, encoder_hidden_states=torch.randn(count, 77, 32)).square().sum().backward()
        blocks.close()

    with Adapter.inject(base.roots, "attention", LoraSettings(rank=4)) as adapter:
        for height, width, count in ((8, 8, 2), (8, 16, 2), (12, 4, 2), (16, 16, 3)):
            step(height, width, count)
        adapter.strength = 0.3
        step(8, 8)
    for rank, alpha in ((2, None), (3, 8.0)):
        with Adapter.inject(base.roots, "attention", LoraSettings(rank=rank, alpha=alpha)):
            step(8, 16)
    assert counter.frame_count == 1


def test_what_cannot_be_compiled_is_done_eagerly_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise ValueError("no such instruction")

    _, plain = run_it(tmp_path / "eager", "eager", accumulate=2)
    monkeypatch.setattr(compiled, "BACKEND", broken)
    _, heard = run_it(tmp_path / "compile", "compile", accumulate=2)
    assert [event.loss for event in heard.all(StepDone)] == [event.loss for event in plain.all(StepDone)]
    (note,) = notes(heard)
    assert note.startswith('engine = "compile" is not used: torch.compile failed: BackendCompilerFailed: ')
    assert "no such instruction" in note and note.endswith('Training goes on with engine = "eager".')


def test_a_failure_in_the_backward_pass_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With open sizes torch compiles it only when the first backward pass comes."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.exc import CppCompileError

    def broken(graph: object, inputs: object) -> Any:
        raise CppCompileError(["g++"], "too many registers")

    _, plain = run_it(tmp_path / "eager", "eager", accumulate=2)
    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    _, heard = run_it(tmp_path / "compile", "compile", accumulate=2)
    assert [event.loss for event in heard.all(StepDone)] == [event.loss for event in plain.all(StepDone)]
    (note,) = notes(heard)
    assert "too many registers" in note


def test_too_many_kinds_of_block_end_it_with_a_reason(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would go on without compiling, and not say so."""
    monkeypatch.setattr(compiled, "VERSIONS", 1)
    _, heard = run_it(tmp_path, "compile", 2)
    (note,) = notes(heard)
    assert "limit" in note.lower()
    assert len(heard.all(StepDone)) == 3


def test_without_a_compiler_or_blocks_the_run_is_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    _, heard = run_it(tmp_path / "a", "compile", steps=1)
    assert notes(heard) == [
        'engine = "compile" is not used: there is no C++ compiler (RuntimeError: No working C++ compiler found). '
        'Install one, such as g++. Training goes on with engine = "eager".'
    ]
    _, heard = run_it(tmp_path / "b", "compile", 0, steps=1)
    assert notes(heard)[0].startswith('engine = "compile" is not used: this base names no repeated blocks.')


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_names_blocks_that_it_has(family: str) -> None:
    base = FAMILIES.get(family).tiny(0)
    assert base.blocks and {type(block).__name__ for block in base.blocks} <= set(base.repeated)
    inside = {part for block in base.blocks for part in block.modules() if part is not block}
    assert not inside & set(base.blocks), "no block is in another"


def test_blocks_and_settings_of_torch_come_back() -> None:
    block = nn.Linear(2, 2)
    config: Any = torch._dynamo.config
    before = (config.force_parameter_static_shapes, config.recompile_limit)
    blocks = CompiledBlocks([block], backend="eager")
    with blocks.running():
        assert "forward" in block.__dict__ and not config.force_parameter_static_shapes
        assert block(torch.ones(3, 2)).shape == (3, 2)
    assert "forward" not in block.__dict__
    assert (config.force_parameter_static_shapes, config.recompile_limit) == before
    with open_sizes():
        assert config.recompile_limit == compiled.VERSIONS
    blocks.close()


def test_a_long_error_is_cut() -> None:
    assert said(ValueError("first\n\n  second\nthird\nfourth")) == "ValueError: first second third"
    assert len(said(ValueError("x" * 5000))) < 330
    assert said(KeyError()) == "KeyError: no reason given"


@pytest.mark.slow
def test_compiled_by_inductor_the_losses_are_the_golden_ones(tmp_path: Path) -> None:
    from tests.golden.test_losses import CASES

    given: dict[str, Any] = CASES["text-to-image-sd1"]["train"]
    _, plain = run_it(tmp_path / "eager", "eager", None, **given)
    _, heard = run_it(tmp_path / "compile", "compile", None, **given)
    assert not notes(heard) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    losses = [[event.loss for event in each.all(StepDone)] for each in (plain, heard)]
    assert len(losses[0]) == 10 and losses[1] == pytest.approx(losses[0], rel=1e-4)
