"""Rescue: a run that runs out of memory anywhere keeps its last whole step, says what to change, and goes on from there
as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.errors import OutOfMemory
from scumble.models.family import BaseModel
from scumble.models.shortage import Shortage
from scumble.rng import Streams
from scumble.training import state as checkpoints
from scumble.training.engine import Engine
from scumble.training.events import HeldOut, Noted, Previewed, Saved, StepDone
from scumble.training.loop import TrainResult, train
from scumble.training.optimizers import OptimizerSettings
from scumble.training.rescue import needs_less
from scumble.training.settings import TrainSettings
from tests.training.world import LatentBatches, Listener, bytes_of, make_plan

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB."
Break = Callable[[pytest.MonkeyPatch, BaseModel], None]


def greedy(*_: Any, **__: Any) -> None:
    """Asks the host for more than there is."""
    torch.empty(1 << 55, dtype=torch.uint8)


def settings(**others: Any) -> TrainSettings:
    told = {
        "steps": 7,
        "batch": 2,
        "checkpoint_every": 3,
        "optimizer": OptimizerSettings(learning_rate=1e-3),
    } | others
    return TrainSettings.model_validate(told)


def run(
    folder: Path, wanted: TrainSettings, breaks: Callable[[BaseModel], None] | None = None, **others: Any
) -> tuple[TrainResult, Listener]:
    plan, base = make_plan(wanted, held_out=bool(wanted.held_out_every))
    if breaks is not None:
        breaks(base)
    listener = Listener()
    return train(plan, folder, wanted, [listener], Streams(0), **others), listener


def from_call(number: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing, until the `number`-th call."""
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return work(*given, **named) if calls >= number else None

    return counted


def in_forward(monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> None:
    base.denoiser.mid_block.register_forward_hook(from_call(5, greedy))  # type: ignore[union-attr, operator]


def in_backward(monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> None:
    hooked = from_call(5, lambda module, given, out: out.register_hook(greedy) and None)
    base.denoiser.mid_block.register_forward_hook(hooked)  # type: ignore[union-attr, operator]


def in_clipping(monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> None:
    clip, ask = Engine.clip, from_call(5, greedy)
    monkeypatch.setattr(Engine, "clip", lambda engine: ask() or clip(engine))


def as_cuda_says_it(monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> None:
    def refuse(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError(CUDA)

    base.denoiser.mid_block.register_forward_hook(from_call(5, refuse))  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("breaks", "place", "others"),
    [
        (in_forward, "Out of memory in the forward pass of step 5", {}),
        (in_backward, "Out of memory in the backward pass of step 5", {"ema": 0.9, "log_every": 10}),
        (in_clipping, "Out of memory in the clipping of step 5", {"gradient_checkpointing": False}),
        (as_cuda_says_it, "Out of GPU memory in the forward pass of step 5", {"precision": "bf16"}),
    ],
)
def test_the_last_whole_step_is_kept_and_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Break, place: str, others: dict[str, Any]
) -> None:
    wanted = settings(**others)
    whole, heard = run(tmp_path / "whole", wanted)
    broken = tmp_path / "broken"
    listener = Listener()
    with monkeypatch.context() as patched, pytest.raises(OutOfMemory) as told:
        plan, base = make_plan(wanted)
        breaks(patched, base)
        train(plan, broken, wanted, [listener], Streams(0))
    text = str(told.value)
    assert text.startswith(place), text
    assert "with 2 pictures of 8x8 pixels (latents 2x4x4x4) at once" in text
    assert (
        f"All up to step 4 is kept in {broken / 'checkpoint-000004'}." in text and "--resume latest" in text
    )
    assert "train.batch = 1 with train.accumulate = 2" in text
    assert [event.step for event in listener.all(StepDone)] == [1, 2, 3, 4]
    assert [event.step for event in listener.all(Saved)] == [3, 4]
    assert checkpoints.damage(broken / "checkpoint-000004") is None and not list(broken.glob(".*"))
    resumed, again = run(broken, wanted, resume="latest")
    assert bytes_of(resumed.adapter) == bytes_of(whole.adapter)
    losses = {event.step: event.loss for event in heard.all(StepDone)}
    assert {event.step: event.loss for event in again.all(StepDone)} == {
        step: losses[step] for step in (5, 6, 7)
    }


def test_where_a_picture_could_not_be_encoded_the_steps_before_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OutOfMemory("Out of memory while fox.png was encoded.")

    batch, ask = LatentBatches.batch, from_call(5, refuse)
    monkeypatch.setattr(LatentBatches, "batch", lambda batches, positions: ask() or batch(batches, positions))
    with pytest.raises(
        OutOfMemory, match=r"^Out of memory while fox\.png was encoded\. All up to step 4 is kept in"
    ):
        run(tmp_path, settings())
    assert checkpoints.damage(tmp_path / "checkpoint-000004") is None


def test_with_less_at_once_it_goes_on_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings()
    with pytest.raises(OutOfMemory):
        run(tmp_path, wanted, lambda base: in_forward(monkeypatch, base))
    smaller = settings(batch=1, accumulate=2, gradient_checkpointing=True)
    assert run(tmp_path, smaller, resume="latest")[0].step == 7


def test_a_step_that_had_begun_to_move_the_weights_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ask = Engine.step, from_call(5, greedy)
    wanted = settings()
    whole, _ = run(tmp_path / "whole", wanted)
    with monkeypatch.context() as patched, pytest.raises(OutOfMemory) as told:
        patched.setattr(Engine, "step", lambda engine, rates, skip: step(engine, rates, skip) or ask())
        run(tmp_path / "broken", wanted)
    assert "in the optimizer's part of step 5" in str(told.value)
    assert f"The last good file is {tmp_path / 'broken' / 'checkpoint-000003'}" in str(told.value)
    assert not (tmp_path / "broken/checkpoint-000004").exists()
    assert bytes_of(run(tmp_path / "broken", wanted, resume="latest")[0].adapter) == bytes_of(whole.adapter)


def test_in_the_very_first_step_there_is_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="No step was done yet"):
        run(tmp_path, settings(), lambda base: base.denoiser.register_forward_hook(greedy) and None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_is_tried_twice_and_one_from_before_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.save
    calls = 0

    def once(*given: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls in refusing:
            greedy()
        return save(*given)

    monkeypatch.setattr(checkpoints, "save", once)
    refusing = {2}
    result, heard = run(tmp_path / "once", settings())
    assert [event.step for event in heard.all(Saved)] == [3, 6, 7, 7] and calls == 4
    calls, refusing = 0, {2, 3}
    with pytest.raises(OutOfMemory, match=r"while checkpoint-000006 was saved.*checkpoint-000003"):
        run(tmp_path / "twice", settings())
    assert calls == 3 and not list((tmp_path / "twice").glob(".*"))
    resumed, _ = run(tmp_path / "twice", settings(), resume="latest")
    assert bytes_of(resumed.adapter) == bytes_of(result.adapter)


def test_previews_and_measurements_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scumble.methods.parts import HeldOutLoss

    wanted = settings(preview_every=2, held_out_every=3)
    with monkeypatch.context() as patched:
        patched.setattr(HeldOutLoss, "__call__", greedy)
        result, heard = run(tmp_path / "tight", wanted, previewer=greedy)
    assert result.step == 7 and result.reason == "complete"
    assert not heard.all(Previewed) and not heard.all(HeldOut)
    noted = [(event.step, event.text) for event in heard.all(Noted)]
    previews = [step for step, text in noted if text.startswith("Out of memory while the preview was drawn")]
    assert previews == [2, 4, 6, 7]
    measured = [
        step for step, text in noted if text.startswith("Out of memory while the held-out loss was measured")
    ]
    assert measured == [3, 6, 7]
    roomy, _ = run(tmp_path / "roomy", settings())
    assert bytes_of(result.adapter) == bytes_of(roomy.adapter)


def test_in_the_proof_the_file_is_named_and_the_last_part_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(checkpoint_every=7)
    whole, _ = run(tmp_path / "whole", wanted)
    from dataclasses import replace

    plan, _ = make_plan(wanted)
    with pytest.raises(
        OutOfMemory, match=r"finished adapter was proven.*adapter\.safetensors is written, and not"
    ):
        train(replace(plan, verify=greedy), tmp_path / "broken", wanted, [], Streams(0))  # type: ignore[arg-type]
    again, _ = run(tmp_path / "broken", wanted, resume="latest")
    assert bytes_of(again.adapter) == bytes_of(whole.adapter)


def test_only_settings_that_would_help_are_named_the_cheapest_first() -> None:
    gpu, host = Shortage(True, "", ""), Shortage(False, "", "")
    everything = needs_less(settings(batch=6, accumulate=2), gpu)
    order = [
        "gradient_checkpointing",
        "train.batch = 3 with train.accumulate = 4",
        "quantization",
        "offload",
        "bf16",
    ]
    places = [everything.index(word) for word in order]
    assert places == sorted(places)
    assert "train.batch = 1 with train.accumulate = 3" in needs_less(settings(batch=3), gpu)
    assert "offload" not in needs_less(settings(), host)
    tight = settings(
        batch=1, gradient_checkpointing=True, quantization="nf4", offload="blocks", precision="bf16"
    )
    assert needs_less(tight, gpu).startswith(
        "What needs less, the cheapest first: (1) a smaller data.resolution."
    )
    assert 'with engine = "eager"' in needs_less(settings(engine="graph"), gpu)


def test_another_process_keeps_the_step_where_it_failed_and_only_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scumble.training.keeper import Keeper

    whole, _ = run(tmp_path / "whole", settings())
    rescue = Keeper.rescue
    said: list[str] = []

    def while_another_does(keeper: Keeper, phase: Any, optimizer: Any) -> str:
        turn = keeper.run / f".rescue-{keeper.step:06d}.partial"
        turn.mkdir()
        said.append(rescue(keeper, phase, optimizer))
        assert not (keeper.run / "checkpoint-000004").exists()
        turn.rmdir()
        best = keeper.run / "best"
        best.mkdir()
        (best / "held_out.json").write_text('{"step": 2, "adapter": 0.25, "base": 0.5}')
        with monkeypatch.context() as patched:
            patched.setattr(type(keeper.accelerator), "is_main_process", property(lambda _: False))
            said.append(rescue(keeper, phase, optimizer))
        return said[-1]

    with monkeypatch.context() as patched, pytest.raises(OutOfMemory):
        patched.setattr(Keeper, "rescue", while_another_does)
        run(tmp_path / "broken", settings(), lambda base: in_forward(patched, base))
    assert said[0] == said[1] and "All up to step 4 is kept" in said[0]
    saved = checkpoints.load(tmp_path / "broken/checkpoint-000004")
    assert (saved.best_step, saved.best_loss) == (2, 0.25)
    assert bytes_of(run(tmp_path / "broken", settings(), resume="latest")[0].adapter) == bytes_of(
        whole.adapter
    )


OF_SEVERAL = """
import os, sys
from pathlib import Path
from scumble.rng import Streams
from scumble.training.loop import train
from tests.training.test_rescue import from_call, greedy, settings
from tests.training.world import make_plan

wanted = settings(batch=1, checkpoint_every=0)
plan, base = make_plan(wanted)
if os.environ["RANK"] in sys.argv[2]:
    base.denoiser.mid_block.register_forward_hook(from_call(5, greedy))
try:
    train(plan, Path(sys.argv[1]), wanted, [], Streams(0))
except Exception as error:
    print(f"<{os.environ['RANK']} {type(error).__name__}: {error}>", flush=True)
    sys.exit(getattr(error, "exit_code", 1))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing", [*(pytest.param(rank, marks=pytest.mark.thorough) for rank in ("0", "1")), "01"]
)
def test_of_several_processes_all_end_and_the_step_is_kept(tmp_path: Path, failing: str) -> None:
    root = Path(__file__).parents[2]
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(OF_SEVERAL)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, str(script), str(folder), failing],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(root / "src"), str(root))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode, done.stdout
    for rank in failing:
        assert f"<{rank} OutOfMemory: Out of memory in the forward pass of step 5" in done.stdout, done.stdout
    assert "All up to step 4 is kept" in done.stdout
    whole, _ = run(tmp_path / "whole", settings())
    resumed, _ = run(folder, settings(), resume="latest")
    assert resumed.step == 7 and checkpoints.damage(folder / "checkpoint-000004") is None
    from scumble.formats import read

    ours, theirs = (read(found.adapter).state for found in (resumed, whole))  # type: ignore[arg-type]
    for path, layer in ours.layers.items():
        for name, tensor in layer.tensors.items():
            torch.testing.assert_close(tensor, theirs.layers[path].tensors[name], atol=1e-5, rtol=0)
