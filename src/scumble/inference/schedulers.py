"""Schedulers: any of diffusers' samplers by its class name, fitted to the base's own noise schedule."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from scumble.errors import ModelError, UnknownName
from scumble.inference.request import Request
from scumble.models.prediction import FLOW_SAMPLED, Flow, prediction_type

SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
"""What a base's noise schedule is made of, in its scheduler's config; flow matching has none of these."""

FLOW = ("prediction_type", "use_flow_sigmas", "flow_shift")
"""What a sampler that wasn't made for flow matching alone takes, where it can draw such a base."""

DEFAULT: str = Request.model_fields["scheduler"].default


def scheduler_names() -> tuple[str, ...]:
    """Every scheduler that this diffusers has, sorted."""
    from diffusers import schedulers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = []
    for name in dir(schedulers):
        if name.endswith("Scheduler") and not name.startswith("Flax"):
            value = getattr(schedulers, name)
            # A scheduler whose libraries are missing is there as a dummy, which is no SchedulerMixin.
            if isinstance(value, type) and issubclass(value, SchedulerMixin):
                found.append(name)
    return tuple(sorted(found))


def build_scheduler(name: str, own: Any) -> Any:
    """A fresh scheduler called `name`, from the config of the base's `own` scheduler.

    The default is DPM-Solver++ (Lu et al., 2022), for flow matching too; a base for which that isn't made keeps its
    own.

    Raises:
        UnknownName: diffusers has no scheduler of that name; near names are suggested.
        ModelError: it can't be built from this base's config.
    """
    from diffusers import schedulers

    known = scheduler_names()
    if name not in known:
        raise UnknownName("scheduler", name, known)
    kind = getattr(schedulers, name)
    if name == DEFAULT and not suits(kind, own):
        kind = type(own)
    # diffusers only logs what a class can't take, and draws by another noise schedule: mush.
    options: dict[str, Any] = {"algorithm_type": "dpmsolver++"} if kind.__name__ == DEFAULT else {}
    if _flows(own):
        lost = _lost_of_flow(kind, own)
        if not _made_for_flow(kind):
            shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
            options |= {"prediction_type": FLOW_SAMPLED, "use_flow_sigmas": True, "flow_shift": shift}
    else:
        lost = [key for key in SCHEDULE if key in own.config and key not in _taken(kind)]
    if lost:
        raise ModelError(
            unsuitable(name, own, f"it has no {' and no '.join(lost)}, by which this base was trained")
        )
    try:
        return kind.from_config(own.config, **options)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise ModelError(unsuitable(name, own, error)) from error


def suits(kind: type, own: Any) -> bool:
    """Whether schedulers of this class draw what the base's own draws: diffusers lists them as interchangeable, or both
    can draw by flow matching."""
    if _flows(own):
        return not _lost_of_flow(kind, own)
    return kind is type(own) or kind in own.compatibles


def _taken(kind: type) -> Collection[str]:
    """The options of a scheduler's config."""
    return inspect.signature(kind.__init__).parameters.keys()  # type: ignore[misc]


def _flows(own: Any) -> bool:
    return prediction_type(own.config)[0] == Flow.name


def _made_for_flow(kind: type) -> bool:
    return kind.__name__.startswith("FlowMatch")


def _lost_of_flow(kind: type, own: Any) -> list[str]:
    """What a scheduler would have to take to draw a base of flow matching, and doesn't."""
    wanted = [] if _made_for_flow(kind) else list(FLOW)
    if own.config.get("use_dynamic_shifting"):  # the pipeline then hands the scheduler a shift for each size
        wanted.append("use_dynamic_shifting")
    return [key for key in wanted if key not in _taken(kind)]


def unsuitable(name: str, own: Any, error: Exception | str) -> str:
    """The message for a scheduler that can't draw with this base."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    made = {kind.__name__ for kind in own.compatibles} if not _flows(own) else _flowing(own)
    others = sorted({type(own).__name__, *made})
    return f"{name} can't draw with this base ({reason}). Made for it: {', '.join(others)}."


def _flowing(own: Any) -> set[str]:
    """The names of diffusers' usual samplers that can draw a base of flow matching."""
    from diffusers import schedulers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    usual = {kind.name for kind in KarrasDiffusionSchedulers}
    kinds = [getattr(schedulers, name) for name in scheduler_names()]
    return {
        kind.__name__
        for kind in kinds
        if (_made_for_flow(kind) or kind.__name__ in usual) and not _lost_of_flow(kind, own)
    }
