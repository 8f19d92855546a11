"""THE loop: what it does in a step, between steps, at the end, and when things go wrong."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scumble.adapters.lora import LoraSettings
from scumble.data.record import Batch
from scumble.errors import (
    ConfigError,
    Diverged,
    NoEffect,
    NothingTrained,
    PrecisionError,
    ResumeError,
    TrainingError,
)
from scumble.formats import read
from scumble.rng import Streams
from scumble.training.events import (
    Event,
    Finished,
    HeldOut,
    Noted,
    Panel,
    Previewed,
    Saved,
    Started,
    StepDone,
    StepSkipped,
)
from scumble.training.keeper import half_width
from scumble.training.loop import TrainResult, train
from scumble.training.numerics import make_accelerator
from scumble.training.optimizers import OptimizerSettings
from scumble.training.plan import Plan
from scumble.training.proofs import digests
from scumble.training.schedules import ScheduleSettings, factor
from scumble.training.settings import TrainSettings
from scumble.training.state import Layout
from scumble.training.state import load as load_state
from tests.training.world import Listener, bytes_of, make_plan

FAST = OptimizerSettings(learning_rate=1e-3)


def settings_for(steps: int = 4, **others: object) -> TrainSettings:
    return TrainSettings.model_validate(
        {"steps": steps, "batch": 2, "checkpoint_every": 0, "optimizer": FAST} | others
    )


def run_it(
    folder: Path, settings: TrainSettings, plan: Plan | None = None, **others: object
) -> tuple[TrainResult, Listener]:
    listener = Listener()
    made = plan if plan is not None else make_plan(settings)[0]
    return train(made, folder, settings, [listener], Streams(settings.seed), **others), listener  # type: ignore[arg-type]


def weights(plan: Plan) -> dict[str, str]:
    return digests(
        {
            f"{t.name}/{n}": p
            for phase in plan.phases
            for t in phase.trainables
            for n, p in t.parameters.items()
        }
    )


# -- a whole run ----------------------------------------------------------------------------------


def test_a_run_tells_its_events_in_order_and_leaves_its_files(tmp_path: Path) -> None:
    settings = settings_for(5, checkpoint_every=2, held_out_every=2, checkpoint_limit=2, accumulate=2)
    plan, _ = make_plan(settings, held_out=True)
    result, heard = run_it(tmp_path, settings, plan)
    kinds = [type(event).__name__ for event in heard.events]
    assert kinds == [
        *("Started", "StepDone", "StepDone", "HeldOut", "Saved", "StepDone", "StepDone", "HeldOut", "Saved"),
        *("StepDone", "HeldOut", "Saved", "Saved", "Noted", "Finished"),
    ]
    assert heard.closed == 1
    assert (result.step, result.reason, result.exit_code) == (5, "complete", 0)
    assert (
        result.adapter == tmp_path / "adapter.safetensors"
        and result.best is not None
        and result.best.is_file()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("adapter.safetensors", "best", "checkpoint-000004", "checkpoint-000005"),
    ]
    steps = heard.all(StepDone)
    assert [event.step for event in steps] == [1, 2, 3, 4, 5]
    assert all(event.samples == 4 and math.isfinite(event.gradient_norm) for event in steps)
    assert heard.all(Finished)[0].reason == "complete"
    assert heard.all(Started)[0].facts["layers"] == 32


def test_the_finished_file_is_the_live_adapter_and_says_where_it_is_from(tmp_path: Path) -> None:
    settings = settings_for()
    plan, base = make_plan(settings, settings='{"train": {}}')
    result, _ = run_it(tmp_path, settings, plan)
    found = read(result.adapter).state  # type: ignore[arg-type]
    assert replace(found, metadata=plan.export().metadata).equal(plan.export())
    said = found.metadata
    assert (said.base_name, said.base_family, said.prediction_type) == ("tiny-sd1", "sd1", "epsilon")
    assert said.base_fingerprint == base.fingerprint() and said.dataset_fingerprint == "latents-6-0"
    assert said.settings == '{"train": {}}' and said.version
    assert result.difference == 0.0


def test_two_runs_in_one_process_give_the_same_file(tmp_path: Path) -> None:
    settings = settings_for(3, accumulate=2)
    adapter = LoraSettings(rank=2, dropout=0.3)
    torch.manual_seed(1)
    first, _ = run_it(tmp_path / "a", settings, make_plan(settings, adapter=adapter)[0])
    torch.manual_seed(2)
    second, _ = run_it(tmp_path / "b", settings, make_plan(settings, adapter=adapter)[0])
    assert bytes_of(first.adapter) == bytes_of(second.adapter)


def test_another_seed_gives_another_file(tmp_path: Path) -> None:
    """The test above can fail."""
    first, _ = run_it(tmp_path / "a", settings_for(2))
    second, _ = run_it(tmp_path / "b", settings_for(2, seed=1))
    assert bytes_of(first.adapter) != bytes_of(second.adapter)


def test_the_callers_generators_are_left_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run_it(tmp_path, settings_for(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulating_gives_the_weights_of_one_large_batch(tmp_path: Path) -> None:
    schedule = ScheduleSettings(name="cosine", warmup_steps=2)
    whole = settings_for(6, batch=4, schedule=schedule)
    parts = settings_for(6, batch=2, accumulate=2, schedule=schedule)
    (one, _), (two, _) = make_plan(whole), make_plan(parts)
    _, heard_one = run_it(tmp_path / "a", whole, one)
    _, heard_two = run_it(tmp_path / "b", parts, two)
    for (name, a), (_, b) in zip(parameters(one), parameters(two), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    rates = [event.learning_rates for event in heard_one.all(StepDone)]
    assert rates == [event.learning_rates for event in heard_two.all(StepDone)]
    assert rates == [{"unet": 1e-3 * factor(schedule, step, 6, 1e-3)} for step in range(6)]


def parameters(plan: Plan) -> list[tuple[str, torch.Tensor]]:
    return [(n, p) for phase in plan.phases for t in phase.trainables for n, p in t.parameters.items()]


def test_clipping_acts_on_what_the_optimizer_gets(tmp_path: Path) -> None:
    """AdamW hardly sees a gradient's size, but a limit near its epsilon must show in the weights."""
    moved = []
    for limit in (None, 1e-6):
        settings = settings_for(2, max_grad_norm=limit)
        plan, _ = make_plan(settings)
        _, heard = run_it(tmp_path / str(limit), settings, plan)
        assert heard.all(StepDone)[0].gradient_norm > 1e-3  # told before clipping
        moved.append(dict(parameters(plan)))
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["attention", ("attention", "text_encoder.attention")])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precision_targets_and_checkpointing_combine(
    tmp_path: Path, checkpointing: bool, targets: str | tuple[str, ...], precision: str
) -> None:
    settings = settings_for(2, precision=precision, gradient_checkpointing=checkpointing)
    plan, base = make_plan(settings, targets=targets)
    result, heard = run_it(tmp_path, settings, plan)
    assert result.reason == "complete" and not heard.all(StepSkipped)
    assert all(p.dtype is torch.float32 and p.requires_grad for _, p in parameters(plan))
    assert not base.denoiser.conv_in.weight.requires_grad


def test_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        settings = settings_for(3, gradient_checkpointing=checkpointing)
        _, heard = run_it(tmp_path / str(checkpointing), settings)
        losses.append([event.loss for event in heard.all(StepDone)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_fp16_without_a_gpu_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="bf16"):
        run_it(tmp_path, settings_for(precision="fp16"))


def test_fp16_lowers_its_loss_scale_without_counting_that_as_divergence(tmp_path: Path) -> None:
    """Accelerate refuses fp16 on a CPU, torch does not: the path of a GPU, with the scaler made to overflow
    at first."""
    settings = settings_for(24, nonfinite_limit=3, checkpoint_every=24, precision="fp16")
    plan, _ = make_plan(settings)
    accelerator = make_accelerator("no", torch.device("cpu"))
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36)
    try:
        result, heard = run_it(tmp_path, settings, plan, accelerator=accelerator)
    finally:
        accelerator.state._mixed_precision = "no"
    skipped = heard.all(StepSkipped)
    assert 3 < len(skipped) < 24 and skipped[0].step == 1, "more than the limit, and the run goes on"
    assert all("the loss scale is now" in event.reason and event.in_a_row == 0 for event in skipped)
    assert result.reason == "complete" and len(heard.all(StepDone)) + len(skipped) == 24
    saved = load_state(tmp_path / "checkpoint-000024")
    assert saved.scaler is not None and saved.scaler["scale"] == 2.0 ** (36 - len(skipped))


def test_prodigy_trains(tmp_path: Path) -> None:
    settings = settings_for(3, optimizer=OptimizerSettings(name="prodigy", learning_rate=1.0))
    result, _ = run_it(tmp_path, settings)
    assert result.reason == "complete"


def test_a_root_may_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    settings = settings_for(2)
    both = ("attention", "text_encoder.attention")
    plan, _ = make_plan(settings, targets=both, learning_rates={"text_encoder": 5e-4})
    _, heard = run_it(tmp_path, settings, plan)
    assert heard.all(StepDone)[0].learning_rates == {"unet": 1e-3, "text_encoder": 5e-4}


def test_the_running_mean_is_what_is_exported(tmp_path: Path) -> None:
    settings = settings_for(4, ema=0.9)
    plan, _ = make_plan(settings)
    result, _ = run_it(tmp_path, settings, plan)
    saved, live = read(result.adapter).state, plan.export()  # type: ignore[arg-type]
    path = next(iter(live.layers))
    assert not torch.equal(saved.layers[path].tensors["up"], live.layers[path].tensors["up"])
    assert result.difference == 0.0


def test_reports_may_be_read_in_groups_without_changing_the_weights(tmp_path: Path) -> None:
    one, heard_one = run_it(tmp_path / "a", settings_for(5))
    grouped, heard_grouped = run_it(tmp_path / "b", settings_for(5, log_every=3))
    assert [e.loss for e in heard_one.all(StepDone)] == [e.loss for e in heard_grouped.all(StepDone)]
    assert bytes_of(one.adapter) == bytes_of(grouped.adapter)


# -- what is not finite ---------------------------------------------------------------------------


class Watching(Listener):
    """Notes the weights at each event about a step."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.seen: dict[int, dict[str, str]] = {}

    def handle(self, event: Event) -> None:
        super().handle(event)
        if isinstance(event, StepDone | StepSkipped):
            self.seen[event.step] = weights(self.plan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", [FAST, OptimizerSettings(name="prodigy", learning_rate=1.0)])
def test_a_poisoned_step_is_skipped_counted_and_named(
    tmp_path: Path, value: float, optimizer: OptimizerSettings
) -> None:
    settings = settings_for(4, accumulate=2, optimizer=optimizer)
    plan, _ = make_plan(settings, poison={9: value})  # step 3, second half, of positions 8 to 11
    heard = Watching(plan)
    result = train(plan, tmp_path, settings, [heard], Streams(0))
    (skipped,) = heard.all(StepSkipped)
    clean, _ = make_plan(settings)
    (poisoned_key,) = clean.phases[0].batches.batch([9]).keys  # type: ignore[attr-defined]
    assert (skipped.step, skipped.in_a_row, list(skipped.pictures)) == (3, 1, [poisoned_key])
    assert "loss is" in skipped.reason
    assert heard.seen[2] == heard.seen[3] != heard.seen[4]
    assert result.reason == "complete" and [e.step for e in heard.all(StepDone)] == [1, 2, 4]


def test_a_non_finite_loss_counts_even_where_its_gradient_is_finite(tmp_path: Path) -> None:
    settings = settings_for(3)
    plan, _ = make_plan(settings)
    objective = plan.phases[0].objective
    forward = objective.forward

    def spoiled(batch: Batch) -> torch.Tensor:
        return forward(batch) + (math.inf if batch.positions[0] == 2 else 0.0)

    objective.forward = spoiled  # type: ignore[method-assign]
    _, heard = run_it(tmp_path, settings, plan)
    assert [event.step for event in heard.all(StepSkipped)] == [2]


@pytest.mark.parametrize("log_every", [1, 4])
def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_file(tmp_path: Path, log_every: int) -> None:
    settings = settings_for(20, checkpoint_every=2, nonfinite_limit=3, log_every=log_every)
    plan, _ = make_plan(settings, poison={position: math.nan for position in range(6, 40)})
    listener = Listener()
    with pytest.raises(Diverged, match=r"3 steps in a row.*checkpoint-00000\d/adapter.safetensors") as caught:
        train(plan, tmp_path, settings, [listener], Streams(0))
    assert caught.value.exit_code == 3
    assert [event.in_a_row for event in listener.all(StepSkipped)] == [1, 2, 3]
    assert listener.all(Finished)[0].reason.startswith("Diverged")
    assert listener.closed == 1
    good = Layout().checkpoints(tmp_path)[-1][1] / "adapter.safetensors"
    assert all(
        torch.isfinite(t).all() for layer in read(good).state.layers.values() for t in layer.tensors.values()
    )
    assert not (tmp_path / "adapter.safetensors").exists()


def test_good_steps_between_start_the_count_anew(tmp_path: Path) -> None:
    settings = settings_for(8, nonfinite_limit=2)
    plan, _ = make_plan(settings, poison={4: math.nan, 8: math.nan, 12: math.nan})  # steps 3, 5, 7
    result, heard = run_it(tmp_path, settings, plan)
    assert result.reason == "complete" and [e.in_a_row for e in heard.all(StepSkipped)] == [1, 1, 1]


# -- what does not train --------------------------------------------------------------------------


def test_an_adapter_out_of_reach_is_found_at_the_first_step(tmp_path: Path) -> None:
    """Text-encoder targets with cached embeddings: the loss can't depend on them."""
    settings = settings_for()
    plan, _ = make_plan(settings, targets="text_encoder.attention")
    with pytest.raises(NothingTrained, match="depends on nothing that trains"):
        run_it(tmp_path, settings, plan)


def test_half_an_adapter_out_of_reach_is_named(tmp_path: Path) -> None:
    settings = settings_for()
    plan, base = make_plan(settings, targets=("attention", "text_encoder.attention"))
    cached = make_plan(settings)[0].phases[0].batches
    plan = replace(plan, phases=(replace(plan.phases[0], batches=cached),))
    with pytest.raises(NothingTrained, match=r"step 1: 16 trainable tensors \(text_encoder/"):
        run_it(tmp_path, settings, plan)
    del base


def test_a_warm_up_from_zero_is_not_mistaken_for_a_dead_gradient(tmp_path: Path) -> None:
    schedule = ScheduleSettings(name="constant_with_warmup", warmup_steps=3)
    result, heard = run_it(tmp_path, settings_for(5, schedule=schedule))
    assert result.reason == "complete" and heard.all(StepDone)[0].learning_rates == {"unet": 0.0}


def test_weights_that_never_move_are_an_error_at_the_end(tmp_path: Path) -> None:
    settings = settings_for(2, optimizer=OptimizerSettings(learning_rate=1e-30))
    with pytest.raises(NothingTrained):
        run_it(tmp_path, settings)


def test_a_file_without_effect_is_an_error(tmp_path: Path) -> None:
    settings = settings_for(2)
    plan, base = make_plan(settings)
    dead = replace(plan, verify=lambda state: plan.verify(zeroed(state)))
    with pytest.raises(NoEffect):
        run_it(tmp_path, settings, dead)
    del base


def zeroed(state: object) -> object:
    layers = {
        path: replace(layer, tensors={n: torch.zeros_like(t) for n, t in layer.tensors.items()})
        for path, layer in state.layers.items()  # type: ignore[attr-defined]
    }
    return replace(state, layers=layers)  # type: ignore[type-var]


def test_a_file_that_acts_otherwise_than_the_live_model_is_an_error(tmp_path: Path) -> None:
    settings = settings_for(2)
    plan, _ = make_plan(settings)

    def after_training(state: object) -> float:
        for _, parameter in parameters(plan):
            parameter.data += 0.1  # the live model moves on after the file was written
        return plan.verify(state)  # type: ignore[arg-type]

    with pytest.raises(TrainingError, match="answers otherwise"):
        run_it(tmp_path, settings, replace(plan, verify=after_training))


# -- between steps --------------------------------------------------------------------------------


def test_held_out_loss_is_repeatable_and_the_best_is_kept(tmp_path: Path) -> None:
    settings = settings_for(6, held_out_every=2)
    plan, _ = make_plan(settings, held_out=True)
    assert plan.held_out is not None
    first, base_first = plan.held_out()
    again, base_again = plan.held_out()
    assert torch.equal(first, again) and torch.equal(base_first, base_again)
    assert torch.equal(first, base_first)  # before training, the adapter changes nothing
    result, heard = run_it(tmp_path, settings, plan)
    found = heard.all(HeldOut)
    assert [event.step for event in found] == [2, 4, 6]
    assert len({event.base for event in found}) == 1 and all(event.interval > 0 for event in found)
    best = min(found, key=lambda event: event.adapter)
    assert [event.best for event in found][
        found.index(best)
    ] and result.best == tmp_path / "best/adapter.safetensors"
    said = json.loads((tmp_path / "best/held_out.json").read_text())
    assert said["step"] == best.step and said["adapter"] == best.adapter


def test_the_interval_is_students() -> None:
    from statistics import stdev

    values = [0.1, -0.2, 0.4, 0.3]
    expected = 3.182 * stdev(values) / 2
    assert half_width(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)
    assert half_width(torch.tensor([1.0])) == math.inf


def test_previews_and_measurements_change_no_weight(tmp_path: Path) -> None:
    plain, _ = run_it(tmp_path / "plain", settings_for(4))
    seen: list[tuple[Path, int, int]] = []

    def draw(file: Path, step: int) -> Sequence[Panel]:
        torch.randn(100)  # advances the generator
        seen.append((file, step, len(read(file).state.layers)))
        return [Panel("a fox", 0, file, file, 1.5)]

    settings = settings_for(4, preview_every=2, held_out_every=1)
    plan, _ = make_plan(settings, held_out=True)
    watched, heard = run_it(tmp_path / "watched", settings, plan, previewer=draw)
    assert [(step, layers) for _, step, layers in seen] == [(2, 32), (4, 32)]
    assert [event.step for event in heard.all(Previewed)] == [2, 4]
    assert bytes_of(plain.adapter) == bytes_of(watched.adapter)
    assert not list((tmp_path / "watched").glob(".preview*"))


def test_a_preview_is_drawn_from_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    seen: list[Path] = []

    def draw(file: Path, step: int) -> Sequence[Panel]:
        seen.append(file)
        return [Panel("a fox", 0, file, file, 0.0)]

    _, heard = run_it(tmp_path, settings_for(2, preview_every=2, checkpoint_every=2), previewer=draw)
    assert seen == [tmp_path / "checkpoint-000002/adapter.safetensors"]
    assert any("the very same picture" in event.text for event in heard.all(Noted))


def test_a_failed_preview_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    def fail(file: Path, step: int) -> Sequence[Panel]:
        raise MemoryError("no room")

    result, heard = run_it(tmp_path, settings_for(2, preview_every=1), previewer=fail)
    assert result.reason == "complete"
    assert sum("MemoryError: no room" in event.text for event in heard.all(Noted)) == 2


@pytest.mark.parametrize(("spoil", "message"), [("cast", r"torch\.float16"), ("move", "changed 1 weights")])
def test_a_preview_that_touches_the_live_weights_stops_the_run(
    tmp_path: Path, spoil: str, message: str
) -> None:
    settings = settings_for(2, preview_every=1)
    plan, _ = make_plan(settings)
    parameter = parameters(plan)[0][1]

    def meddle(file: Path, step: int) -> Sequence[Panel]:
        parameter.data = parameter.data.half() if spoil == "cast" else parameter.data + 1
        return []

    with pytest.raises(TrainingError, match=message):
        run_it(tmp_path, settings, plan, previewer=meddle)


def test_a_sink_that_fails_does_not_stop_the_run(tmp_path: Path) -> None:
    class Broken(Listener):
        def handle(self, event: Event) -> None:
            raise OSError("disk gone")

    settings = settings_for(2)
    heard = Listener()
    result = train(make_plan(settings)[0], tmp_path, settings, [Broken(), heard], Streams(0))
    assert result.reason == "complete" and any("Broken failed" in event.text for event in heard.all(Noted))


# -- stopping and going on ------------------------------------------------------------------------


class Stopping(Listener):
    """Sends a signal to this process at a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__()
        self.step, self.number = step, number

    def handle(self, event: Event) -> None:
        super().handle(event)
        if isinstance(event, StepDone) and event.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly_and_the_run_goes_on_exactly(
    tmp_path: Path, number: signal.Signals
) -> None:
    settings = settings_for(5, accumulate=2)
    straight, _ = run_it(tmp_path / "straight", settings)
    heard = Stopping(2, number)
    stopped = train(make_plan(settings)[0], tmp_path / "run", settings, [heard], Streams(0))
    assert (stopped.reason, stopped.exit_code, stopped.step) == ("interrupted", 130, 2)
    assert stopped.adapter == tmp_path / "run/checkpoint-000002/adapter.safetensors"
    assert (
        heard.all(Finished)[0].reason == "interrupted" and not (tmp_path / "run/adapter.safetensors").exists()
    )
    resumed, heard_again = run_it(tmp_path / "run", settings, resume="latest")
    assert [event.step for event in heard_again.all(StepDone)] == [3, 4, 5]
    assert heard_again.all(Started)[0].first_step == 2
    assert bytes_of(resumed.adapter) == bytes_of(straight.adapter)


def test_a_signal_in_the_middle_of_a_step_drops_the_half_step(tmp_path: Path) -> None:
    settings = settings_for(4, accumulate=3)
    straight, _ = run_it(tmp_path / "straight", settings)
    plan, _ = make_plan(settings)
    objective, calls = plan.phases[0].objective, [0]
    forward = objective.forward

    def counted(batch: Batch) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 8:  # step 3, second of three
            os.kill(os.getpid(), signal.SIGINT)
        return forward(batch)

    objective.forward = counted  # type: ignore[method-assign]
    stopped, _ = run_it(tmp_path / "run", settings, plan)
    assert (stopped.reason, stopped.step, calls[0]) == ("interrupted", 2, 8)
    resumed, _ = run_it(tmp_path / "run", settings, resume="latest")
    assert bytes_of(resumed.adapter) == bytes_of(straight.adapter)


def stop_at(folder: Path, settings: TrainSettings, step: int, **others: object) -> None:
    listener = Stopping(step, signal.SIGINT)
    train(make_plan(settings, **others)[0], folder, settings, [listener], Streams(settings.seed))  # type: ignore[arg-type]


CHANGES = {
    r"adapter\.alpha: None -> 8": ({}, {"adapter": LoraSettings(rank=2, alpha=8)}),
    r"optimizer\.learning_rate: 0\.001 -> 0\.002": ({"optimizer": OptimizerSettings(learning_rate=2e-3)}, {}),
    r"data: latents-6-0 -> latents-5-0": ({}, {"samples": 5}),
    r"pictures per step: 2 -> 4": ({"batch": 4}, {}),
    r"seed: 0 -> 3": ({"seed": 3}, {}),
    r"snr_gamma: None -> 5": ({"objective": {"snr_gamma": 5.0}}, {}),
    r"schedule\.name: constant -> cosine": ({"schedule": ScheduleSettings(name="cosine")}, {}),
}


@pytest.mark.parametrize("line", CHANGES)
def test_a_changed_setting_is_refused_by_name_and_may_be_accepted(tmp_path: Path, line: str) -> None:
    stop_at(tmp_path, settings_for(4), 2)
    changed, others = CHANGES[line]
    settings = settings_for(4, **changed)
    with pytest.raises(ResumeError, match=line):
        run_it(tmp_path, settings, make_plan(settings, **others)[0], resume="latest")  # type: ignore[arg-type]
    plan, _ = make_plan(settings, **others)  # type: ignore[arg-type]
    result, heard = run_it(tmp_path, settings, plan, resume="latest", accept_changes=True)
    assert result.reason == "complete" and [e.step for e in heard.all(StepDone)] == [3, 4]
    assert any("as accepted" in event.text for event in heard.all(Noted))


def test_another_rank_can_not_even_be_accepted(tmp_path: Path) -> None:
    stop_at(tmp_path, settings_for(4), 2)
    settings = settings_for(4)
    plan, _ = make_plan(settings, adapter=LoraSettings(rank=3))
    with pytest.raises(ResumeError, match=r"(?s)other weights.*adapter\.rank: 2 -> 3"):
        run_it(tmp_path, settings, plan, resume="latest", accept_changes=True)


def test_another_split_of_the_same_pictures_is_no_change(tmp_path: Path) -> None:
    stop_at(tmp_path, settings_for(3, batch=4), 2)
    result, _ = run_it(tmp_path, settings_for(3, batch=2, accumulate=2), resume="latest")
    assert result.step == 3


def test_a_longer_run_needs_no_consent_where_the_rates_stay(tmp_path: Path) -> None:
    short, longer = settings_for(2, checkpoint_every=2), settings_for(4, checkpoint_every=2)
    run_it(tmp_path, short)
    extended, heard = run_it(tmp_path, longer, resume="latest")
    straight, _ = run_it(tmp_path / "straight", longer)
    assert [event.step for event in heard.all(StepDone)] == [3, 4]
    assert bytes_of(extended.adapter) == bytes_of(straight.adapter)


def test_a_longer_run_on_a_falling_rate_needs_consent(tmp_path: Path) -> None:
    linear = {"schedule": ScheduleSettings(name="linear"), "checkpoint_every": 2}
    run_it(tmp_path, settings_for(2, **linear))
    with pytest.raises(ResumeError, match="every learning rate"):
        run_it(tmp_path, settings_for(4, **linear), resume="latest")


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    settings = settings_for(4, checkpoint_every=1)
    run_it(tmp_path, settings)
    _, heard = run_it(tmp_path, settings, resume="checkpoint-000003")
    assert [event.step for event in heard.all(StepDone)] == [4]
    with pytest.raises(ResumeError, match="no such folder"):
        run_it(tmp_path, settings, resume="checkpoint-000009")


def test_resuming_a_finished_run_trains_nothing_and_proves_the_file_again(tmp_path: Path) -> None:
    settings = settings_for(2, checkpoint_every=2)
    first, _ = run_it(tmp_path, settings)
    content = bytes_of(first.adapter)
    again, heard = run_it(tmp_path, settings, resume="latest")
    assert not heard.all(StepDone) and again.difference == 0.0 and bytes_of(again.adapter) == content


def test_latest_without_a_checkpoint_starts_anew_and_says_so(tmp_path: Path) -> None:
    result, heard = run_it(tmp_path, settings_for(2), resume="latest")
    assert result.step == 2 and any("starts at step 0" in event.text for event in heard.all(Noted))


def test_old_checkpoints_in_the_folder_are_mentioned(tmp_path: Path) -> None:
    settings = settings_for(2, checkpoint_every=2)
    run_it(tmp_path, settings)
    _, heard = run_it(tmp_path, settings)
    assert any("of an earlier run" in event.text for event in heard.all(Noted))


def test_the_saved_event_names_every_file(tmp_path: Path) -> None:
    _, heard = run_it(tmp_path, settings_for(2, checkpoint_every=1))
    assert [(e.step, e.path.name, e.final) for e in heard.all(Saved)] == [
        (1, "checkpoint-000001", False),
        (2, "checkpoint-000002", False),
        (2, "adapter.safetensors", True),
    ]


# -- several phases -------------------------------------------------------------------------------


def two_phases(settings: TrainSettings) -> tuple[Plan, list[int]]:
    """The text encoder's half of an adapter for two steps, then the denoiser's for the rest; calls of
    `after_step`."""
    plan, _ = make_plan(settings, targets=("attention", "text_encoder.attention"))
    (phase,), called = plan.phases, []
    unet, text = phase.trainables
    first = replace(phase, name="text", trainables=(text,), steps=2, after_step=lambda: called.append(1))
    return replace(plan, phases=(first, replace(phase, trainables=(unet,), steps=settings.steps - 2))), called


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_of_two_phases_goes_on_in_the_phase_it_was_in(tmp_path: Path, step: int) -> None:
    settings = settings_for(5, schedule=ScheduleSettings(name="linear"), held_out_every=0)
    plan, called = two_phases(settings)
    straight, heard = run_it(tmp_path / "straight", settings, plan)
    assert [(event.step, event.phase) for event in heard.all(StepDone)] == [
        *((1, "text"), (2, "text"), (3, "adapter"), (4, "adapter"), (5, "adapter"))
    ]
    rates = [next(iter(event.learning_rates.values())) for event in heard.all(StepDone)]
    assert rates == pytest.approx([1e-3, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3]), "each phase has its own schedule"
    assert len(called) == 2
    train(two_phases(settings)[0], tmp_path / "run", settings, [Stopping(step, signal.SIGINT)], Streams(0))
    resumed, _ = run_it(tmp_path / "run", settings, two_phases(settings)[0], resume="latest")
    assert bytes_of(resumed.adapter) == bytes_of(straight.adapter)


@pytest.mark.parametrize("step", [2, 3])
def test_with_a_running_mean_what_rests_is_what_the_next_phase_trained_around(
    tmp_path: Path, step: int
) -> None:
    settings = settings_for(5, ema=0.9, held_out_every=0)
    plan, _ = two_phases(settings)
    straight, _ = run_it(tmp_path / "straight", settings, plan)
    saved, live = (
        {path.replace("text_model.", ""): layer.tensors["up"] for path, layer in state.layers.items()}
        for state in (read(straight.adapter).state, plan.export())  # type: ignore[arg-type]
    )
    same = {path: torch.equal(saved[path], live[path]) for path in live}
    assert {path.startswith("text_encoder") for path in same} == {True, False}
    assert all(same[path] == path.startswith("text_encoder") for path in same)
    train(two_phases(settings)[0], tmp_path / "run", settings, [Stopping(step, signal.SIGINT)], Streams(0))
    resumed, _ = run_it(tmp_path / "run", settings, two_phases(settings)[0], resume="latest")
    assert bytes_of(resumed.adapter) == bytes_of(straight.adapter)


def test_an_optimizer_that_a_later_phase_can_not_have_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    settings = settings_for(5)
    plan, _ = two_phases(settings)
    first, second = plan.phases
    prodigy = OptimizerSettings(name="prodigy", learning_rate=1e-3)
    plan, heard = replace(plan, phases=(first, replace(second, optimizer=prodigy))), Listener()
    with pytest.raises(ConfigError, match="prodigy estimates the learning rate"):
        train(plan, tmp_path, settings, [heard], Streams(0))
    assert not heard.all(StepDone)


def test_an_accelerator_of_another_precision_is_refused(tmp_path: Path) -> None:
    accelerator = make_accelerator("no", torch.device("cpu"))
    with pytest.raises(ConfigError, match='"bf16" in the settings and "no"'):
        run_it(tmp_path, settings_for(precision="bf16"), accelerator=accelerator)
